"""The order of documents: an endless sequence that goes through the source once per epoch.

Document d of the sequence belongs to epoch d // size. Each epoch has a permutation of its own, computed index by
index, so that it needs no memory at any size and any document of the sequence is found at once, as resuming needs.
"""

from __future__ import annotations

import hashlib
import math

ROUNDS = 6
MASK_64 = (1 << 64) - 1


class DocumentOrder:
    """Maps document d = 0, 1, 2, ... of the endless sequence to an index into a source of `size` documents."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        assert size > 0
        self.size, self.seed, self.shuffle = size, seed, shuffle

    def __call__(self, document: int) -> int:
        epoch, index = divmod(document, self.size)
        return permute(index, self.size, self.seed, epoch) if self.shuffle else index


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """Where a pseudo-random permutation of range(size), chosen by (seed, epoch), sends `index`.

    A Feistel network on pairs of numbers below ceil(sqrt(size)), repeated while the result is not below `size`:
    Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002). It does not depend on the version of any library.
    """
    digest = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]
    side = math.isqrt(size - 1) + 1
    while True:
        left, right = divmod(index, side)
        for key in keys:
            left, right = right, (left + _mix(right + key)) % side
        index = left * side + right
        if index < size:
            return index


def _mix(x: int) -> int:
    """The finalizer of splitmix64: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK_64
    return x ^ (x >> 31)
