"""Pairs in blocks: read, tokenised and packed into batches, whatever their number.

A block is ``block_pairs`` consecutive pairs. How it is batched depends on nothing but itself, so its counts are the
same in any process, and before or after an interruption.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from itertools import count, islice
from typing import Any, NoReturn

from torch import Tensor

from ..errors import PairsError
from ..forward.packing import Batch, batches
from ..forward.pair_scores import PairBatch, scored_batches
from ..forward.tokens import Tokenised, check_vocabulary, tokenise
from ..momentum.report import Seconds
from ..pairs.chat import ChatForm
from ..pairs.groups import by_of, group_of
from ..pairs.halves import half_rows
from ..pairs.pairs import Pair


@dataclass(frozen=True)
class Block:
    """``size`` consecutive pairs, ready to run.

    Attributes:
        number: 0 for the first block. offset: the place of its first pair among all pairs. size: its pairs.
        pairs: how many of them contrast: their two texts differ. Text r and text r + pairs are a pair, positive first.
        numbers: the place of each of these among all pairs.
        half: which of these are in the half that is counted by itself (:mod:`austeer.pairs.halves`): int64, from 0.
        batches: the texts.
        cut: texts cut to fit. texts_tokens: tokens of all texts, as if each ran by itself.
        digest: a hash of this and all earlier pairs.
        pair_batches: of the pairs that contrast, for effects; none where these are not asked for.
    """

    number: int
    offset: int
    size: int
    pairs: int
    numbers: list[int]
    half: Tensor
    batches: list[Batch]
    cut: int
    texts_tokens: int
    digest: str
    pair_batches: list[PairBatch] = field(default_factory=list)


@dataclass(eq=False)
class Blocks:
    """The blocks of a set of pairs that one process has to run, in order; re-iterable.

    Args:
        pairs: any iterable of pairs; read once an iteration, and never held as a whole.
        source, chat_template: as in :class:`austeer.pairs.pairs.Pairs`.
        vocabulary: how many tokens the model has. max_length: longer texts are cut.
        batch_tokens: tokens in a batch, with padding. share: whether shared beginnings run once.
        apart, even: see :func:`austeer.forward.packing.batches`.
        first: blocks before this number are read and left out. known: the digest of all pairs in them.
        part: (i, n) takes the blocks i, i + n, i + 2 n ...
        pin: whether batches lie in page-locked memory.
        effect_tokens: the limit on a batch of pairs for effects, where these are asked for.
        seconds: where the time that is spent here is added.

    Attributes:
        digest: of all pairs read by the newest iteration. read: how many, those of other processes included.
        grouped_by: what keeps pairs in one half together (:mod:`austeer.pairs.groups`), by the first block.
    """

    tokenizer: Any
    pairs: Iterable[Pair]
    _: KW_ONLY
    source: str
    chat_template: ChatForm
    vocabulary: int
    max_length: int
    block_pairs: int
    batch_tokens: int
    share: bool
    apart: int | None = None
    even: bool = False
    first: int = 0
    known: str = ""
    part: tuple[int, int] = (0, 1)
    pin: bool = False
    effect_tokens: int | None = None
    seconds: Seconds = field(default_factory=Seconds)
    digest: str = field(default="", init=False)
    read: int = field(default=0, init=False)
    grouped_by: str = field(default="prompt", init=False)

    def __iter__(self) -> Iterator[Block]:
        stream = iter(self.pairs)
        self.read, self.digest = 0, ""
        for number in count():
            start = time.perf_counter()
            chosen = list(islice(stream, self.block_pairs))
            if not chosen:
                if number < self.first:
                    self.others()
                return
            if number == 0:  # read by every process, and by a run that goes on
                self.grouped_by = by_of([pair.prompt for pair in chosen])
            self.digest = chain(self.digest, chosen)
            offset, self.read = self.read, self.read + len(chosen)
            self.seconds.read += time.perf_counter() - start
            if number == self.first - 1 and self.digest != self.known:
                self.others()
            if number >= self.first and number % self.part[1] == self.part[0]:
                yield self._block(number, offset, chosen)

    def others(self) -> NoReturn:
        """Raises PairsError: these are not the pairs that were counted before."""
        raise PairsError(
            f"{self.source}: found other pairs than were counted before ({self.read} of them); expected the same "
            "file, unchanged. Start anew (--force)"
        )

    def _block(self, number: int, offset: int, pairs: list[Pair]) -> Block:
        start = time.perf_counter()
        found = self.tokenised(pairs, offset)
        texts = found.positive + found.negative
        check_vocabulary(self.vocabulary, texts)
        now = time.perf_counter()
        self.seconds.tokenise += now - start
        packed = list(batches(texts, self.batch_tokens, self.share, self.apart, self.even))
        paired = [] if self.effect_tokens is None else self._paired(found, offset)
        half = half_rows([self._group(pairs[i]) for i in found.number])
        if self.pin:
            packed, half = [batch.pinned() for batch in packed], half.pin_memory()
        self.seconds.pack += time.perf_counter() - now
        return Block(
            number=number,
            offset=offset,
            size=len(pairs),
            pairs=len(found.number),
            numbers=[offset + i for i in found.number],
            half=half,
            batches=packed,
            cut=found.cut,
            texts_tokens=sum(map(len, texts)),
            digest=self.digest,
            pair_batches=paired,
        )

    def _paired(self, found: Tokenised, offset: int) -> list[PairBatch]:
        """Batches of the pairs that contrast."""
        assert self.effect_tokens is not None
        for number, (positive, negative) in zip(found.number, found.together):
            if not (positive and negative) or positive[0] != negative[0]:
                raise PairsError(
                    f"{self.source}, pair {offset + number}: found two texts that begin with different tokens, "
                    "expected one before them to score them by; for effects give the prompts some text, for example "
                    "'Text:', or where texts were cut a larger max_length"
                )
        return list(scored_batches(found.together, self.effect_tokens, self.share, self.apart))

    def _group(self, pair: Pair) -> str:
        return group_of(pair.prompt, (pair.positive, pair.negative), self.grouped_by)

    def tokenised(self, pairs: list[Pair], offset: int) -> Tokenised:
        special = not self.chat_template
        return tokenise(self.tokenizer, pairs, self.max_length, special=special, source=self.source, first=offset)

    def pair(self, row: int, offset: int) -> tuple[int, Pair]:
        """Which pair is contrasted pair ``row`` of the block that begins at pair ``offset``: its number, and itself."""
        chosen = list(islice(iter(self.pairs), offset, offset + self.block_pairs))
        place = self.tokenised(chosen, offset).number[row]
        return offset + place, chosen[place]


def chain(digest: str, pairs: Iterable[Pair]) -> str:
    """The hash of all pairs so far from that of all earlier ones."""
    hashed = hashlib.sha256(digest.encode())
    for pair in pairs:
        for text in (pair.prompt, pair.positive, pair.negative):
            data = text.encode()
            hashed.update(len(data).to_bytes(8, "little"))
            hashed.update(data)
    return hashed.hexdigest()
