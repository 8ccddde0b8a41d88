"""The Decoder's own promises: documents, heads, seeded values."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.models.kinds import KINDS
from tests.ranks import run_ranks
from titanmoe.config.sizes import Degrees
from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.family import get_family
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.parallelize import parallelize

SPEC = KINDS["grouped-query"]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind: str) -> None:
    model = build_model(KINDS[kind], device="cpu")
    init_weights(model, 0)
    tokens = torch.randint(97, (2, 20))
    boundaries = [0, 6, 20, 33, 40]
    positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(boundaries)])
    packed = model(tokens, position_ids=positions.view(2, 20), cu_seqlens=torch.tensor(boundaries, dtype=torch.int32))
    for start, end in itertools.pairwise(boundaries):
        alone = model(tokens.flatten()[None, start:end])[0]
        torch.testing.assert_close(packed.flatten(0, 1)[start:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_compute_the_same(kind: str) -> None:
    run_ranks(_check_compiled, 1, kind)  # a process of its own: some versions of torch cannot fork after compiling


def _check_compiled(kind: str) -> None:
    model, compiled = (build_model(KINDS[kind], device="cpu") for _ in range(2))
    tokens = torch.randint(97, (2, 20))
    for each in (model, compiled):
        init_weights(each, 0)
    for block in compiled.layers.values():
        block.compile(backend="aot_eager")
    logits, others = model(tokens), compiled(tokens)
    torch.testing.assert_close(others, logits, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (others * weight).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        error = (parameter.grad - other.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-4, f"{name}: {error:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_gpu_equals_the_cpu(kind: str, dtype: torch.dtype) -> None:
    model, on_gpu = build_model(KINDS[kind], device="cpu"), build_model(KINDS[kind], device="cuda", dtype=dtype)
    for each in (model, on_gpu):
        init_weights(each, 0)
    on_gpu.load_state_dict(model.state_dict())  # a device draws other numbers
    tokens, cu_seqlens = torch.randint(97, (2, 24)), torch.tensor([0, 7, 24, 41, 48], dtype=torch.int32)
    logits = model(tokens, cu_seqlens=cu_seqlens)
    others = on_gpu(tokens.cuda(), cu_seqlens=cu_seqlens.cuda())
    (logits.logsumexp(-1).sum() / 48).backward()
    (others.logsumexp(-1).sum() / 48).backward()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert (others.cpu() - logits).norm() < tolerance * logits.norm()
    for (name, parameter), other in zip(model.named_parameters(), on_gpu.parameters(), strict=True):
        error = (other.grad.cpu() - parameter.grad).norm() / parameter.grad.norm()
        # In bfloat16 some token's choice of experts may tip over.
        assert error < (tolerance if dtype == torch.float32 else 0.5), f"{name}: {error:.2e}"


@pytest.mark.parametrize("tied", [False, True])
def test_head_replaces_the_projection(tied: bool) -> None:
    model = build_model(replace(SPEC, tie_embeddings=tied), device="cpu")
    init_weights(model, 0)
    tokens = torch.randint(97, (1, 5))
    assert ("output.weight" in dict(model.named_parameters())) is not tied
    hidden, weight = model(tokens, head=lambda hidden, weight: (hidden, weight))
    torch.testing.assert_close(hidden @ weight.T, model(tokens))


def test_bfloat16_model_keeps_float32_where_it_must() -> None:
    spec = get_family("qwen3").flavors["debug_moe"]
    model = build_model(spec, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(layer.router.num_tokens_per_expert_E.dtype == torch.int64 for _, layer in model.moe_layers())


def test_values_depend_on_seed_and_name() -> None:
    def values(seed: int) -> dict[str, torch.Tensor]:
        model = build_model(SPEC, device="cpu")
        init_weights(model, seed)
        return dict(model.named_parameters())

    first, again, other = values(1), values(1), values(2)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if parameter.dim() > 1:
            assert not torch.equal(parameter, other[name])
    assert not torch.equal(first["layers.0.attention.q_proj.weight"], first["layers.1.attention.q_proj.weight"])
    assert first["tok_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert first["layers.1.moe.experts.down"].std().item() == pytest.approx(0.01, rel=0.05)


def _sharded_values() -> dict[str, torch.Tensor]:
    model = build_model(SPEC)
    mesh = Mesh.build(torch.device("cpu"), Degrees(dp_shard=4))
    parallelize(model, mesh, param_dtype=torch.float32, reduce_dtype=torch.float32)
    materialize(model, "cpu")
    init_weights(model, 7)
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


def test_values_do_not_depend_on_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanmoe.models.build._BLOCK_NUMEL", 100)  # so that shards begin inside blocks
    model = build_model(SPEC, device="cpu")
    init_weights(model, 7)
    expected = dict(model.named_parameters())
    for values in run_ranks(_sharded_values, 4):
        for name, value in values.items():
            assert torch.equal(value, expected[name]), name
