"""Contrastive pairs in memory: checked, split, put through a chat template.

A pair is a prompt with a desired and an undesired continuation (paper: positive and negative samples). The texts that
a model reads are ``prompt + positive`` and ``prompt + negative``, joined as they are: put the space between prompt and
continuation where the tokenizer expects it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import PairsError
from .chat import ChatForm, chat_form, check_chat, check_untemplated
from .pair import FIELDS, Pair, check_enough, pair_as_chat, pair_of
from .stream import PairStream, stream_pairs


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """An immutable list of pairs, with what is known of where they come from.

    Attributes:
        items: the pairs.
        source: file name or other origin, for messages and provenance.
        chat_template: whether the prompts were put through a chat template (and so hold their special tokens), with
            its options if it had any.
    """

    items: tuple[Pair, ...]
    source: str = "memory"
    chat_template: ChatForm = False

    @classmethod
    def of(
        cls, pairs: PairStream | Iterable[Pair | Mapping[str, str] | Sequence[str]], source: str = "memory"
    ) -> Pairs:
        """Pairs from (prompt, positive, negative) tuples, mappings with these keys, or ``Pair`` objects.

        ``Pairs`` are returned as they are; a ``PairStream`` is read to its end.

        Raises:
            PairsError: a field is missing or no text, or a side empty; fewer than 2 pairs; all pairs have equal sides.
        """
        if isinstance(pairs, Pairs):
            return pairs
        if isinstance(pairs, PairStream):
            return cls(tuple(pairs), pairs.source, pairs.chat_template)
        if not isinstance(pairs, Iterable):
            raise PairsError(f"pairs: found {type(pairs).__name__}, expected pairs; see austeer.load_pairs")
        items = []
        for number, entry in enumerate(pairs):
            where = f"{source}, pair {number}"
            if isinstance(entry, Pair):
                row: Mapping[str, Any] = vars(entry)
            elif isinstance(entry, Mapping):
                row = entry
            elif isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 3:
                row = dict(zip(FIELDS, entry))
            else:
                raise PairsError(f"{where}: found {entry!r:.80}, expected (prompt, positive, negative)")
            items.append(pair_of(row, dict(zip(FIELDS, FIELDS)), where))
        found = cls(tuple(items), source)
        check_enough(len(found), found.identical, source)
        return found

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i):
        return replace(self, items=self.items[i]) if isinstance(i, slice) else self.items[i]

    @property
    def identical(self) -> int:
        """How many pairs have the same text on both sides."""
        return sum(p.positive == p.negative for p in self.items)

    def split(self, fraction: float, seed: int = 0) -> tuple[Pairs, Pairs]:
        """Two disjoint parts, shuffled with ``seed``; the first has ``fraction`` of the pairs, rounded.

        Raises:
            PairsError: a part would have fewer than 2 pairs.
        """
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        cut = round(len(self) * fraction)
        if min(cut, len(self) - cut) < 2:
            raise PairsError(
                f"split of {len(self)} pairs at {fraction}: found parts of {cut} and {len(self) - cut}, "
                "expected at least 2 in each; give more pairs or another fraction"
            )
        pick = [tuple(self.items[i] for i in sorted(part)) for part in (order[:cut], order[cut:])]
        return replace(self, items=pick[0]), replace(self, items=pick[1])

    def with_chat_template(self, tokenizer, **options: Any) -> Pairs:
        """Each prompt becomes a user's message in the tokenizer's chat template, up to where the answer begins.

        A pair's lead begins the model's own turn. Continuations are joined as they are.

        Args:
            options: ``system``, a system message before the prompt; others go to the template, for example
                ``enable_thinking=False`` or ``tools=[...]``.

        Raises:
            PairsError: the tokenizer has no chat template, or one that ignores an option; or the pairs went through
                one already.
        """
        check_untemplated(self.chat_template, self.source)
        check_chat(tokenizer, options)
        items = tuple(pair_as_chat(tokenizer, pair, options) for pair in self.items)
        return replace(self, items=items, chat_template=chat_form(options))


def load_pairs(
    source: str | Path | Sequence[str | Path] | Any,
    *,
    prompt: str = "prompt",
    positive: str = "positive",
    negative: str = "negative",
    where: Mapping[str, Any] | None = None,
    limit: int | None = None,
    split: str | None = None,
    chat_template=None,
) -> Pairs:
    """The pairs of a file, of several, or of a dataset, in memory.

    Example:
        >>> pairs = austeer.load_pairs("pairs.jsonl")
        >>> len(pairs)
        24
        >>> pairs[0]
        Pair(prompt='The soup was', positive=' good', negative=' bad', lead='')

    Args:
        source: a file of JSONL, JSON, CSV or Parquet, a pattern, several files, ``"hf:ORG/NAME"`` or a dataset; each
            as of :func:`austeer.stream_pairs`.
        prompt, positive, negative: the names that the fields have in the source.
        where: keep only rows in which these fields have these values. limit: read at most so many pairs.
        split: which split of a dataset; needed if it has several.
        chat_template: a tokenizer whose chat template the prompts are put through (:meth:`Pairs.with_chat_template`).

    Raises:
        PairsError: as :func:`austeer.stream_pairs`, and what is wrong in the rows (:class:`austeer.PairStream`).
    """
    names = {"prompt": prompt, "positive": positive, "negative": negative}
    return Pairs.of(stream_pairs(source, **names, where=where, limit=limit, split=split, chat_template=chat_template))
