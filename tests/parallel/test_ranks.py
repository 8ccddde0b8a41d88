"""What happens on one rank is known to all."""

from __future__ import annotations

import errno
from datetime import timedelta

import torch.distributed as dist

from tests.ranks import run_ranks
from titanmoe.config import ConfigError
from titanmoe.parallel.ranks import Ranks


def _shared(kind: str) -> tuple[str, str]:
    ranks = Ranks.create(timedelta(seconds=30))
    errors = {
        "config": ConfigError("broken", where="a.txt", mend="mend it"),
        "disk": OSError(errno.ENOSPC, "No space left on device", "/full"),
        "other": KeyError("lost"),
    }
    try:
        ranks.share_error(errors[kind] if dist.get_rank() == 1 else None)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    assert run_ranks(_shared, 2, "config") == [("ConfigError", "a.txt: broken\n  mend it")] * 2
    (kind, text), own = run_ranks(_shared, 2, "disk")
    assert (kind, text) == ("OSError", "[Errno 28] No space left on device (on rank 1): '/full'")
    assert own == ("OSError", "[Errno 28] No space left on device: '/full'")
    other, own = run_ranks(_shared, 2, "other")
    assert other == ("RuntimeError", "rank 1 failed: KeyError: 'lost'") and own[0] == "KeyError"


def test_one_rank_alone() -> None:
    ranks = Ranks.create(timedelta(seconds=1))
    assert ranks.on_first(lambda: 3) == 3 and ranks.on_all(lambda: 4) == [4]
    ranks.share_error(None)
