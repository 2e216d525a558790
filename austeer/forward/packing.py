"""Texts into batches for one forward pass each: what texts share is run once, and like lengths go together.

A row of a batch is one text, or several that begin alike. Such a row holds the common beginning once and then what is
each text's own, as a tree written down branch by branch: a token sees its ancestors only, and its position is its
depth. To a decoder that takes a mask and positions every text looks as it would alone. For texts "a b c" and "a b d e":

====== ===================== =========
ids    a  b  c  d  e         one row of 5 tokens in place of 7
depth  0  1  2  2  3         positions
sees   a: a   b: ab  c: abc  d: abd  e: abde
====== ===================== =========

Rows are padded on the right, where causal attention never looks, so rows of one text need no mask at all. For a model
whose attention is not causal (causality.py) rows of unlike length come apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: A row costs length * (1 + length / ATTENTION) in tokens: its attention under a mask is dense. Measured on a small
#: model on a CPU; in larger ones attention weighs less, and rows that are joined a little too rarely cost little.
ATTENTION = 1024

#: A batch that is large enough for the machine takes no row shorter than this part of its longest.
FILL = 0.8

#: Below this part of ``tokens`` a batch is not large enough to be choosy.
ENOUGH = 0.25


@dataclass(frozen=True)
class Batch:
    """Texts ready for one forward pass, on the CPU.

    Attributes:
        ids: int64 [rows, length], padded on the right with 0.
        ends: int64 [texts], row * length + column of each text's last token.
        texts: int64 [texts], the number of each text.
        positions: int64 [rows, length]; None where every row is one text.
        sees: bool [rows, length, length], token i sees token j; None where every row is one text: plain causal.
        tokens: how many are not padding.
    """

    ids: Tensor
    ends: Tensor
    texts: Tensor
    positions: Tensor | None
    sees: Tensor | None
    tokens: int

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies without the host's waiting."""
        pinned: dict[str, Any] = {name: t.pin_memory() for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **pinned)

    def halves(self) -> tuple[Batch, Batch] | None:
        """The first and the second half of the rows, or of the texts of a single row; None where that is no tree."""
        rows, length = self.ids.shape
        if rows < 2:
            return self._row_halves()
        cut = rows // 2
        # A row's last token is the last of some text, so the ends tell how long it is.
        lengths = torch.zeros(rows, dtype=torch.int64, device="cpu")
        lengths.scatter_reduce_(0, self.ends // length, self.ends % length + 1, "amax")
        first = self.ends < cut * length
        parts = [
            Batch(
                self.ids[rows_],
                self.ends[chosen] - moved,
                self.texts[chosen],
                None if self.positions is None else self.positions[rows_],
                None if self.sees is None else self.sees[rows_],
                int(lengths[rows_].sum()),
            )
            for rows_, chosen, moved in ((slice(None, cut), first, 0), (slice(cut, None), ~first, cut * length))
        ]
        return parts[0], parts[1]

    def _row_halves(self) -> tuple[Batch, Batch] | None:
        if self.sees is None:
            return None
        texts = [(text, self.ids[0, self.sees[0, end]].tolist()) for text, end in zip(self.texts.tolist(), self.ends)]
        cut = len(texts) // 2
        first, second = (_Row.of(part) for part in (texts[:cut], texts[cut:]))
        return _batch([first], bool(first.branches)), _batch([second], bool(second.branches))


class _Row:
    """A tree of texts, grown one text at a time in lexicographic order."""

    def __init__(self, text: int, ids: Sequence[int]):
        self.ids, self.positions = list(ids), list(range(len(ids)))
        self.branches: list[tuple[int, np.ndarray]] = []  # where a branch begins, and the columns of its ancestors
        self.ends = [(text, len(ids) - 1)]
        self.path = np.arange(len(ids))  # columns of the newest text

    @classmethod
    def of(cls, texts: Sequence[tuple[int, Sequence[int]]]) -> _Row:
        """The tree of some numbered texts, in lexicographic order."""
        row = cls(*texts[0])
        for (_, before), (text, ids) in itertools.pairwise(texts):
            row.add(text, ids, common_prefix(before, ids))
        return row

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, text: int, ids: Sequence[int], shared: int) -> None:
        start = len(self.ids)
        self.ids.extend(ids[shared:])
        self.positions.extend(range(shared, len(ids)))
        ancestors = self.path[:shared]
        self.path = np.concatenate([ancestors, np.arange(start, len(self.ids))])
        if len(self.ids) > start:
            self.branches.append((start, ancestors))
        self.ends.append((text, int(self.path[-1])))


def batches(
    texts: Sequence[Sequence[int]], tokens: int, share: bool = True, apart: int | None = None, even: bool = False
) -> Iterator[Batch]:
    """Batches of at most ``tokens`` tokens with their padding, longest rows first.

    One row may have more: a text that is longer by itself, and others that join it up to half its length again.

    Args:
        texts: token ids, none empty.
        tokens: the limit. share: whether beginnings that texts have in common may run once.
        apart: texts of more tokens share no batch with shorter ones
            (:func:`austeer.forward.tree_masks.longest_short_text`).
        even: all rows of a batch have one length, so that there is no padding to be seen.
    """
    if apart is not None:
        for long in (False, True):
            numbers = [i for i, ids in enumerate(texts) if (len(ids) > apart) == long]
            for found in batches([texts[i] for i in numbers], tokens, share, even=even):
                yield replace(found, texts=torch.tensor(numbers, device="cpu")[found.texts])
        return
    rows = _rows(texts, tokens, share)
    # Rows that need a mask apart from those that do not: attention without one is faster.
    for branching in (True, False):
        group = sorted((row for row in rows if bool(row.branches) == branching), key=len, reverse=True)
        batch: list[_Row] = []
        for row in group:
            if batch:
                length, padded = len(batch[0]), len(batch[0]) * (len(batch) + 1)
                least = length if even else FILL * length if padded > ENOUGH * tokens else 0
                if padded > tokens or len(row) < least:
                    yield _batch(batch, branching)
                    batch = []
            batch.append(row)
        if batch:
            yield _batch(batch, branching)


def pair_batches(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], tokens: int, share: bool = True, apart: int | None = None
) -> Iterator[Batch]:
    """As :func:`batches`, but both texts of a pair are in one batch, and a row holds texts of one pair alone.

    Text 2 * i is the first of pair i, and text 2 * i + 1 the second.
    """
    groups = [(i, _rows_of_pair(i, pair, tokens, share)) for i, pair in enumerate(pairs)]
    keys = {
        i: (apart is not None and max(map(len, pairs[i])) > apart, any(row.branches for row in rows))
        for i, rows in groups
    }
    groups.sort(key=lambda group: (keys[group[0]], -max(map(len, group[1]))))
    for (_, branching), found in itertools.groupby(groups, key=lambda group: keys[group[0]]):
        batch: list[_Row] = []
        for _, rows in found:
            if batch and len(batch[0]) * (len(batch) + len(rows)) > tokens:
                yield _batch(batch, branching)
                batch = []
            batch += sorted(rows, key=len, reverse=True)
        yield _batch(batch, branching)


def _rows_of_pair(number: int, pair: tuple[Sequence[int], Sequence[int]], tokens: int, share: bool) -> list[_Row]:
    texts = list(zip((2 * number, 2 * number + 1), pair))
    first, second = pair
    shared = common_prefix(first, second)
    if share and _worth(len(first), len(second) - shared, len(second), tokens):
        return [_Row.of(texts)]
    return [_Row(*text) for text in texts]


def _cost(length: int) -> float:
    return length * (1 + length / ATTENTION)


def _worth(row: int, own: int, length: int, tokens: int) -> bool:
    """Whether a text of ``length`` joins a row, to which it adds ``own`` tokens, rather than having one of its own."""
    return row + own <= max(tokens, row, 3 * length // 2) and _cost(row + own) < _cost(row) + _cost(length)


def _rows(texts: Sequence[Sequence[int]], tokens: int, share: bool) -> list[_Row]:
    if not share:
        return [_Row(i, ids) for i, ids in enumerate(texts)]
    rows: list[_Row] = []
    before: Sequence[int] = []
    for i in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        ids = texts[i]
        shared = common_prefix(before, ids)
        own = len(ids) - shared  # 0 for a text that is in the row already
        if shared and _worth(len(rows[-1]), own, len(ids), tokens):
            rows[-1].add(i, ids, shared)
        else:
            rows.append(_Row(i, ids))
        before = ids
    return rows


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _batch(rows: Sequence[_Row], branching: bool) -> Batch:
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), dtype=np.int64)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = row.ids
    ends = [(text, r * length + column) for r, row in enumerate(rows) for text, column in row.ends]
    positions = sees = None
    if branching:
        positions = np.zeros((len(rows), length), dtype=np.int64)
        sees = np.zeros((len(rows), length, length), dtype=bool)
        causal = np.tri(length, dtype=bool)
        for r, row in enumerate(rows):
            positions[r, : len(row)] = row.positions
            starts = [0, *(start for start, _ in row.branches), len(row)]
            for a, b in itertools.pairwise(starts):
                sees[r, a:b, a:b] = causal[: b - a, : b - a]
            for (start, ancestors), stop in zip(row.branches, starts[2:]):
                sees[r, start:stop, ancestors] = True
            rest = np.arange(len(row), length)
            sees[r, rest, rest] = True  # padding sees itself: a row of a softmax that sees nothing is NaN
    return Batch(
        torch.from_numpy(ids),
        torch.tensor([end for _, end in ends], device="cpu"),
        torch.tensor([text for text, _ in ends], device="cpu"),
        None if positions is None else torch.from_numpy(positions),
        None if sees is None else torch.from_numpy(sees),
        sum(map(len, rows)),
    )
