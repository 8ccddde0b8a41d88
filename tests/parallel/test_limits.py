"""Models that cannot be spread over a mesh are refused with the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.models.kinds import KINDS
from titanmoe.config import ConfigError
from titanmoe.config.sizes import Degrees
from titanmoe.models.spec import Dense, LayerSpec
from titanmoe.parallel.limits import check_model_can_be_split

SPEC = KINDS["grouped-query"]  # 4 heads, 6 experts of 24 hidden units, feed-forwards of 56 and 16, 100 words
DENSE = replace(SPEC, layers=SPEC.layers[:1])
ODD = replace(SPEC, layers=(LayerSpec(SPEC.layers[0].attention, Dense(57)), SPEC.layers[1]))


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tp=4, ep=2, etp=2), Degrees(cp=2, tp=2, ep=6)])
def test_what_fits(degrees: Degrees) -> None:
    check_model_can_be_split(SPEC, degrees)
    check_model_can_be_split(DENSE, replace(degrees, ep=1))


@pytest.mark.parametrize(
    ("spec", "degrees", "where", "message"),
    [
        (SPEC, Degrees(ep=4), "expert_parallel_degree", "6 experts cannot be dealt evenly to 4 ranks"),
        (DENSE, Degrees(ep=2), "expert_parallel_degree", "the model has no experts"),
        (SPEC, Degrees(cp=3), "context_parallel_degree", "4 attention heads cannot be dealt evenly to 3"),
        (SPEC, Degrees(tp=8), "tensor_parallel_degree", "4 attention heads cannot be dealt evenly to 8"),
        (SPEC, Degrees(cp=4, tp=2), "context_parallel_degree", "4 attention heads cannot be dealt evenly to 8"),
        (ODD, Degrees(tp=2), "tensor_parallel_degree", "1 hidden units of feed-forwards cannot be dealt evenly to 2"),
        (replace(SPEC, vocab_size=101), Degrees(tp=2), "tensor_parallel_degree", "101 words cannot be dealt"),
    ],
)
def test_what_does_not_fit(spec, degrees: Degrees, where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_model_can_be_split(spec, degrees)
    assert where in str(error.value.where)
