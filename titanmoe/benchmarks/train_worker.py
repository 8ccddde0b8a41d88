"""One contender of the `train` benchmark: builds a model and times its training steps. Run by `train.py`.

All contenders get the same weights (through a Hugging Face folder), the same batches, AdamW (fused), clipping to 1.0
and the same number of threads; with adapters, the same adapter (in the form of PEFT), of the dtype of weights.
A step is forward, backward, clipping, update and clearing of gradients.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from titanmoe.benchmarks.device_timing import synchronize
from titanmoe.benchmarks.turns import serve
from titanmoe.parallel.compile import compile_layers

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0

Step = Callable[[Tensor], Tensor]


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    build = {"titanmoe": _titanmoe, "transformers": _transformers}[job["system"]]
    step = build(job["checkpoint"], dtype, device, job["adapter"], job["lora"], job["compiles"])
    batches = load_file(job["batches"], device=job["device"])["tokens"].unbind(0)  # each (B, S + 1)
    position = 0

    def run() -> dict[str, Any]:
        nonlocal position
        losses, seconds = [], []
        for _ in range(job["steps"]):
            synchronize(device)
            start = time.perf_counter()
            loss = step(batches[position % len(batches)])
            synchronize(device)
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
            position += 1
        return {"seconds": seconds, "losses": losses}

    for _ in range(2):  # kernels are built, optimizer state is made, memory is found
        run()
    serve({"system": job["system"], "matmul_gflops": _matmul_gflops(dtype, device)}, run)


def _titanmoe(
    checkpoint: str,
    dtype: torch.dtype,
    device: torch.device,
    adapter: str,
    lora: Sequence[str],
    compiles: bool = False,
) -> Step:
    from titanmoe.checkpoint.pretrained import from_pretrained
    from titanmoe.data.packing import Batch
    from titanmoe.parallel.host_memory import keep_freed_memory
    from titanmoe.training.gradients import clip_gradients
    from titanmoe.training.loss import loss_sum
    from titanmoe.training.optimizer import build_optimizer

    if device.type == "cpu":
        keep_freed_memory()
    model = from_pretrained(checkpoint, dtype=dtype, device=device)
    if adapter:
        _adapt(model, adapter, lora)
    if compiles:
        compile_layers(model.blocks(), "inductor")
    optimizer = build_optimizer(
        model,
        name="AdamW",
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        implementation="fused",
    )

    def step(tokens: Tensor) -> Tensor:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1], device=device).expand(inputs.shape)
        loss = loss_sum(model, Batch(inputs, labels, positions, None)) / labels.numel()
        loss.backward()
        clip_gradients(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _adapt(model: Any, adapter: str, lora: Sequence[str]) -> None:
    from titanmoe.checkpoint.adapter_config import AdapterSettings
    from titanmoe.checkpoint.adapters import load_adapter
    from titanmoe.checkpoint.pretrained import family_of_spec
    from titanmoe.config import load_config
    from titanmoe.converters.apply import convert

    config = load_config(None, lora)
    convert(model, ["lora"], config)
    load_adapter(model, adapter, family_of_spec(model.spec), AdapterSettings.of(config.lora))


def _transformers(
    checkpoint: str,
    dtype: torch.dtype,
    device: torch.device,
    adapter: str,
    lora: Sequence[str],
    compiles: bool = False,
) -> Step:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    if adapter:
        from peft import PeftModel

        # By default PEFT casts adapters of a bfloat16 model to float32, and what they multiply, too.
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False)
    model.to(device).train()
    if compiles:
        layers = (module for module in model.modules() if type(module).__name__.endswith("DecoderLayer"))
        compile_layers(layers, "inductor")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {dtype}
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )

    def step(tokens: Tensor) -> Tensor:
        # Labels are passed shifted already, so that both contenders predict the same S tokens.
        inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
        loss = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _matmul_gflops(dtype: torch.dtype, device: torch.device, size: int = 1024, repeats: int = 9) -> float:
    """The rate of a plain square product on this machine at this moment, the best of a few."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


if __name__ == "__main__":
    main()
