"""Which half of the pairs a pair belongs to: two disjoint halves show how much of a ranking would be chosen again.

Texts decide wherever they are known, and nothing else: a pair is in the same half in any file, order, batch, block or
process, and pairs of one prompt stay together, since they are no independent evidence of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

#: Rows in a block, where no text decides: neighbours are often alike, and stay together.
BLOCK_ROWS = 16


def half_of(prompt: str) -> bool:
    """Whether the pairs of a prompt are in the half that is counted by itself; the rest is the other half."""
    return bool(hashlib.blake2b(prompt.encode(), digest_size=1, person=b"austeer halves").digest()[0] & 1)


def half_rows(prompts: Sequence[str]) -> Tensor:
    """The places of the prompts that are in the half: int64, ascending."""
    return torch.tensor([i for i, prompt in enumerate(prompts) if half_of(prompt)], dtype=torch.int64, device="cpu")


def half_rows_without_texts(name: str, start: int, stop: int) -> Tensor:
    """For stored activations of which nothing else is known: blocks of rows take turns, by the name of their file.

    Which half a row is in does not depend on other files, on how a file is read or on who reads it; counters of all
    files add up in any order.

    Returns:
        The places in rows ``start`` to ``stop - 1`` of a file that are in the half: int64, from 0.
    """
    blocks = torch.arange(start, stop, device="cpu") // BLOCK_ROWS + crc32(name.encode())
    return (blocks % 2 == 0).nonzero().flatten()
