"""How many tokens a measurement will run: a sample of the pairs is tokenised and packed as the run itself does it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from ..measuring.blocks import Blocks
from ..pairs.pairs import Pair, Pairs
from ..pairs.stream import PairStream

#: Characters of a token where there is no tokenizer to ask.
CHARACTERS = 4

#: The totals of a workload that are scaled from a sample.
SCALED = ("texts", "batches", "tokens_texts", "tokens_run", "tokens_padded", "squares", "packed")


@dataclass(frozen=True)
class Workload:
    """Totals for all pairs; exact if all were tokenised, otherwise scaled by the number of pairs.

    Attributes:
        pairs, sampled: all pairs, and those tokenised.
        texts: to be run (of pairs whose two texts differ). batches: forward passes of the decoder.
        tokens_texts: tokens of all texts. tokens_run: the same, once where texts share them.
        tokens_padded: the same with padding. squares: sum over all rows of length * length, padded.
        packed: bytes of all batches on the CPU, their masks included.
        shapes: rows, length, and whether it needs a mask, of each kind of batch in the sample.
    """

    pairs: int
    sampled: int
    texts: int
    batches: int
    tokens_texts: int
    tokens_run: int
    tokens_padded: int
    squares: int
    packed: int
    shapes: frozenset[tuple[int, int, bool]]

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "shapes"}


def workload(
    tokenizer,
    pairs: Pairs | PairStream,
    *,
    vocabulary: int,
    max_length: int,
    block_pairs: int,
    batch_tokens: int,
    share: bool,
    sample: int,
) -> Workload:
    """Reads all pairs once, and packs whole blocks of them, chosen at random (the same ones each time).

    Args:
        tokenizer: None counts a token for every four characters.
        sample: pairs to tokenise, rounded to whole blocks, of which there is at least one.
        vocabulary, max_length, block_pairs, batch_tokens, share: as in :class:`austeer.measuring.blocks.Blocks`.

    Raises:
        PairsError: a damaged source, or tokens that the model does not have.
    """
    total, chosen = _blocks(pairs, block_pairs, max(1, sample // block_pairs))
    blocks = Blocks(
        tokenizer or _Characters(),
        chosen,
        source=pairs.source,
        chat_template=pairs.chat_template,
        vocabulary=vocabulary if tokenizer else 2**63,
        max_length=max_length,
        block_pairs=block_pairs,
        batch_tokens=batch_tokens,
        share=share,
    )
    found, shapes = Counter[str](), set()
    for block in blocks:
        found.update(texts=2 * block.pairs, tokens_texts=block.texts_tokens, batches=len(block.batches))
        for batch in block.batches:
            rows, length = batch.ids.shape
            packed = sum(t.nbytes for t in (batch.ids, batch.positions, batch.sees) if t is not None)
            found.update(tokens_run=batch.tokens, tokens_padded=rows * length, squares=rows * length**2, packed=packed)
            shapes.add((rows, length, batch.sees is not None))
    scaled = {what: round(found[what] * total / len(chosen)) for what in SCALED}
    return Workload(pairs=total, sampled=len(chosen), shapes=frozenset(shapes), **scaled)


def _blocks(pairs: Iterable[Pair], size: int, count: int) -> tuple[int, list[Pair]]:
    """How many pairs there are, and those of ``count`` blocks of ``size``, drawn with equal chances in one reading."""
    draw = random.Random(0)
    kept: list[tuple[int, list[Pair]]] = []
    stream, number, total = iter(pairs), 0, 0
    while block := list(islice(stream, size)):
        place = number if number < count else draw.randrange(number + 1)
        if number < count:
            kept.append((number, block))
        elif place < count:
            kept[place] = (number, block)
        number += 1
        total += len(block)
    return total, [pair for _, block in sorted(kept, key=lambda entry: entry[0]) for pair in block]


class _Characters:
    """Stands in for a tokenizer: each four characters are a token, so that equal beginnings are shared."""

    bos_token_id = eos_token_id = eos_token = None

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
        pieces = [[text[i : i + CHARACTERS] for i in range(0, len(text), CHARACTERS)] for text in texts]
        return {"input_ids": [[self._known.setdefault(p, len(self._known)) for p in found] for found in pieces]}
