"""Random models of transformers, saved as it saves them, and read back without any code of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def random_model(model_type: str, options: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A float32 model with every parameter and buffer drawn at random, norms and biases too: none can be mixed up.

    Parameters are numbers of bfloat16, so that the model in bfloat16 has the same; buffers (which stay float32) are
    not. Gradients of unused parameters cannot be told from gradients that were lost, so every one should be used.
    """
    transformers = _quiet_transformers()
    config = transformers.AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0.0, 0.3 if tensor.ndim == 1 else 0.12, generator=generator)
            if name in parameters:
                tensor.copy_(tensor.bfloat16())
    return model


def _quiet_transformers() -> ModuleType:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def save(model: nn.Module, folder: Path, num_shards: int = 4, **options: Any) -> None:
    """Save a model as transformers does, in about this many files."""
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=num_bytes // num_shards + 1, **options)


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A folder as transformers loads it; a tensor that it misses or does not know is an error."""
    transformers = _quiet_transformers()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's files, read by the safetensors library."""
    from safetensors.torch import load_file

    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def some_tokens(vocab_size: int, num_sequences: int, seq_len: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (num_sequences, seq_len), generator=torch.Generator().manual_seed(seed))
