"""Which half of the pairs a pair belongs to: two disjoint halves show how much of a ranking would be chosen again.

Texts decide wherever they are known, and nothing else: a pair is in the same half in any order, batch, block or
process, and pairs of one group (:mod:`.groups`) stay together, since they are no independent evidence of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

#: Rows in a block, where no text decides: neighbours are often alike, and stay together.
BLOCK_ROWS = 16


def half_of(group: str) -> bool:
    """Whether the pairs of a group are in the half that is counted by itself; the rest is the other half."""
    return bool(hashlib.blake2b(group.encode(), digest_size=1, person=b"austeer halves").digest()[0] & 1)


def half_rows(groups: Sequence[str]) -> Tensor:
    """The places of the groups that are in the half: int64, ascending."""
    return torch.tensor([i for i, group in enumerate(groups) if half_of(group)], dtype=torch.int64, device="cpu")


def half_rows_without_texts(name: str, start: int, stop: int) -> Tensor:
    """For stored activations of which nothing else is known: blocks of rows take turns, by the name of their file.

    Which half a row is in does not depend on other files, on how a file is read or on who reads it; counters of all
    files add up in any order.

    Returns:
        The places in rows ``start`` to ``stop - 1`` of a file that are in the half: int64, from 0.
    """
    blocks = torch.arange(start, stop, device="cpu") // BLOCK_ROWS + crc32(name.encode())
    return (blocks % 2 == 0).nonzero().flatten()
