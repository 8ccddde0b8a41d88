"""torch.compile, layer by layer: the same numbers, and few graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor

from tests.models.kinds import KINDS
from tests.ranks import run_ranks
from titanmoe import ops
from titanmoe.config import load_config
from titanmoe.config.sections.machine import ActivationCheckpoint
from titanmoe.config.sizes import Degrees
from titanmoe.converters.apply import convert
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec
from titanmoe.ops.grouped_mm import PlainGroupedProduct
from titanmoe.parallel.activation_checkpoint import apply_activation_checkpoint
from titanmoe.parallel.compile import _fingerprint, compile_layers
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize
from titanmoe.parallel.tensor import finish_gradients

NUM_STEPS = 4


class _Counting:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


def _batch(step: int, has_documents: bool, parts: int = 1, part: int = 0) -> tuple[Tensor, Tensor | None]:
    """Tokens, of which other experts are chosen in each step, and documents, of which there are more in each."""
    tokens_BS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(step))
    starts = [0, *range(3 + step, 24, 7 - step), 24, 41 + step, 48]
    return tokens_BS.chunk(parts, dim=1)[part], torch.tensor(starts, dtype=torch.int32) if has_documents else None


def _step(model: nn.Module, tokens_BS: Tensor, cu_seqlens: Tensor | None, positions: Tensor | None = None) -> float:
    model.zero_grad()
    loss = model(tokens_BS, cu_seqlens=cu_seqlens, position_ids=positions).square().sum()
    loss.backward()
    return loss.item()


def _model(spec: DecoderSpec, backend: Any, **options: Any) -> Decoder:
    model = build_model(spec, device="cpu")
    init_weights(model, seed=3)
    if backend is not None:
        compile_layers(model.blocks(), backend)
    apply_activation_checkpoint(model, **options, is_compiled=backend is not None)
    return model


def _worst(model: nn.Module, reference: nn.Module) -> float:
    """Relative error of the worst gradient."""
    errors = []
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        errors.append(float((grad - expected.grad).abs().max() / expected.grad.abs().max()))
    return max(errors)


@pytest.mark.parametrize(
    ("kind", "mode", "has_documents", "most"),
    [
        ("grouped-query", "none", False, 2),
        ("grouped-query", "moe", True, 10),
        ("latent", "selective", False, 2),
        ("sinks and windows", "full", False, 6),
        ("chunks and temperature", "full", True, 18),
    ],
)
def test_equal_layers_share_their_graphs(kind: str, mode: Any, has_documents: bool, most: int) -> None:
    """Six layers of two kinds. Documents and the router's choice, where it is kept, are outside of the graphs."""
    spec = replace(KINDS[kind], layers=KINDS[kind].layers * 3)
    backend = _Counting()
    model, reference = _model(spec, backend, mode=mode), _model(spec, None, mode="none")
    numbers = []
    for step in range(NUM_STEPS):
        loss = _step(model, *_batch(step, has_documents))
        assert loss == pytest.approx(_step(reference, *_batch(step, has_documents)), rel=1e-6)
        assert _worst(model, reference) < 1e-5
        numbers.append(backend.num_graphs)
    assert 0 < numbers[-1] <= most and numbers[-1] == numbers[1], numbers


def test_on_a_cpu_in_bfloat16_rows_are_padded_in_one_graph() -> None:
    """oneDNN would build a kernel for every number of rows. Their sum is not asked for, which would end the graph."""
    backend = _Counting()
    spec = replace(KINDS["grouped-query"], layers=KINDS["grouped-query"].layers[1:])
    model, reference = _model(spec, backend, mode="none").bfloat16(), _model(spec, None, mode="none").bfloat16()
    for step in range(NUM_STEPS):
        loss = _step(model, *_batch(step, False))
        assert loss == pytest.approx(_step(reference, *_batch(step, False)), rel=1e-2)
        assert _worst(model, reference) < 0.05
    assert 0 < backend.num_graphs <= 2
    multiple = torch.compile(
        lambda x: x[: PlainGroupedProduct().row_multiple(x, True)], backend="eager", fullgraph=True
    )
    assert len(multiple(torch.ones(64, 8, dtype=torch.bfloat16))) == 32


@pytest.mark.parametrize("dora", [[], ["--lora.use_dora"]], ids=["LoRA", "DoRA"])
def test_another_scale_of_adapters_in_the_same_process(dora: list[str]) -> None:
    """A number that changes would become a variable of the graph, which torch 2.13 cannot compile here."""
    for alpha in (8.0, 12.0):
        config = load_config(None, ["--model.converters=lora", "--lora.rank=4", f"--lora.alpha={alpha}", *dora])
        gradients = []
        for backend in ("aot_eager", None):
            model = _model(KINDS["grouped-query"], None, mode="none")
            convert(model, ["lora"], config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
            if backend is not None:
                compile_layers(model.blocks(), backend)
            _step(model, *_batch(0, False))
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        compiled, plain = gradients
        assert len(plain) > 10
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_what_a_compiler_kept_is_not_found_by_other_operators(tmp_path: Path) -> None:
    with torch.compiler.config.patch(cache_key_tag="of the user"):
        for _ in range(2):
            compile_layers([nn.Linear(2, 2)], "eager")
        tag = torch.compiler.config.cache_key_tag
    assert tag.startswith("of the user") and tag.count("titanmoe-") == 1
    assert tag.endswith(_fingerprint(Path(ops.__file__).parent))
    (tmp_path / "grouped_mm.py").write_text("# an operator\n")
    before = _fingerprint(tmp_path)
    (tmp_path / "grouped_mm.py").write_text("# an operator that was changed\n")
    assert _fingerprint(tmp_path) != before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "moe", "full"])
def test_a_real_compiler(mode: Any) -> None:
    spec = KINDS["grouped-query"]
    model, reference = _model(spec, "inductor", mode=mode), _model(spec, None, mode="none")
    for step in range(2):
        loss = _step(model, *_batch(step, False))
        assert loss == pytest.approx(_step(reference, *_batch(step, False)), rel=1e-6)
        assert _worst(model, reference) < 1e-5


def _kept_bytes(model: Decoder) -> int:
    """What the graphs leave for backward, without parameters."""
    sizes: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(_batch(0, False)[0])
    return sum(size for _, size in sizes.values())


def test_the_compiler_recomputes_what_it_is_told_to() -> None:
    """A budget is kept to; "moe" and "op" keep less than "none", and no job leaves anything to the next."""
    spec = replace(KINDS["grouped-query"], layers=KINDS["grouped-query"].layers[1:])
    kept = {}
    for name, options in {
        "least": {"mode": "memory_budget", "memory_budget": 0.0},
        "half": {"mode": "memory_budget", "memory_budget": 0.5},
        "all": {"mode": "memory_budget", "memory_budget": 1.0},
        "op": {"mode": "selective", "option": "op"},
        "moe": {"mode": "moe"},
        "none": {"mode": "none"},
    }.items():
        torch._dynamo.reset()
        kept[name] = _kept_bytes(_model(spec, "aot_eager", **options))
    assert kept["least"] < kept["half"] < kept["all"] == kept["none"], kept
    assert kept["moe"] == kept["op"] < 0.9 * kept["none"], kept


def _on_mesh(degrees: Degrees, mode: Any, spec: DecoderSpec) -> tuple[list[int], float]:
    torch._dynamo.reset()
    mesh = Mesh.build(torch.device("cpu"), degrees)
    backend = _Counting()
    model = build_model(spec)
    parallelize(
        model,
        mesh,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        recompute=ActivationCheckpoint(mode=mode, selective_ac_option="op"),
        compile_backend=backend,  # type: ignore[arg-type]
    )
    materialize(model, "cpu")
    init_weights(model, seed=3)
    reference = _model(spec, None, mode="none")
    numbers, worst = [], 0.0
    for step in range(NUM_STEPS):
        tokens_BS, cu_seqlens = _batch(step, has_documents=False)
        _step(reference, tokens_BS, cu_seqlens)
        rows = 2 // mesh.degrees.num_data_ranks
        mine = tokens_BS[mesh.data_rank * rows :][:rows].chunk(mesh.degrees.cp, dim=1)[mesh.context_rank]
        positions = torch.arange(24).chunk(mesh.degrees.cp)[mesh.context_rank]
        _step(model, mine.contiguous(), None, positions)
        finish_gradients(model)
        worst = max(worst, _worst(model, reference))
        numbers.append(backend.num_graphs)
    dist.barrier()
    return numbers, worst


@pytest.mark.parametrize(
    ("degrees", "mode", "most"),
    [
        (Degrees(dp_shard=2, ep=2), "full", 30),
        (Degrees(cp=2), "moe", 16),
        pytest.param(Degrees(tp=2, ep=2), "full", 40, marks=pytest.mark.slow),
        pytest.param(Degrees(dp_shard=2, cp=2, ep=4), "full", 30, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_on_several_ranks(degrees: Degrees, mode: str, most: int) -> None:
    """The numbers of rows that arrive differ in each step."""
    spec = replace(KINDS["latent"], layers=KINDS["latent"].layers * 2)
    for numbers, worst in run_ranks(_on_mesh, degrees.num_ranks, degrees, mode, spec):
        assert worst < 1e-5
        assert 0 < numbers[-1] <= most and numbers[-1] == numbers[2], numbers
