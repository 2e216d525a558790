"""Pairs read from a source as they are wanted, so that there may be any number of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..errors import PairsError
from .chat import ChatForm, chat_form, check_chat, check_untemplated
from .pair import Pair, check_enough, optional_fields, pair_as_chat, pair_of
from .readers import Reading, Source, open_source


class PairStream:
    """Pairs of a source that is opened anew and read once by every iteration; see :func:`stream_pairs`.

    An iteration raises PairsError at a row that is damaged, or has a missing field or an empty side (source, row and
    field are named), and at its end if no row matched, if there were fewer than 2 pairs, or if all had equal sides.

    Attributes:
        source: file name or other origin, for messages and provenance.
        chat_template: whether the prompts are put through a chat template (and so hold their special tokens), with
            its options if it has any.
    """

    def __init__(
        self,
        rows: Source,
        names: Mapping[str, str],
        where: Mapping[str, Any] | None = None,
        limit: int | None = None,
        chat: tuple[Any, dict[str, Any]] | None = None,
    ):
        self._rows, self._names, self._where, self._limit, self._chat = rows, names, where or {}, limit, chat
        self._reading: Reading | None = None
        self._found = 0

    @property
    def source(self) -> str:
        return self._rows.name

    @property
    def chat_template(self) -> ChatForm:
        return False if self._chat is None else chat_form(self._chat[1])

    @property
    def fraction(self) -> float | None:
        """How far the newest iteration is, from 0 to 1, in the bytes or rows of the source (or up to the limit).

        None if it cannot be known before the end: an iterable dataset whose length is not known.
        """
        if self._reading is None:
            return 0.0
        limited = self._found / self._limit if self._limit else 0.0
        if self._reading.fraction is None:
            return limited or None
        return max(self._reading.fraction, limited)

    def with_chat_template(self, tokenizer, **options: Any) -> PairStream:
        """The same pairs in the tokenizer's chat template, rendered when one is read; as ``Pairs.with_chat_template``.

        Raises:
            PairsError: the tokenizer has no chat template, or one that ignores an option; or the pairs have one.
        """
        check_untemplated(self.chat_template, self.source)
        check_chat(tokenizer, options)
        return PairStream(self._rows, self._names, self._where, self._limit, (tokenizer, options))

    def __iter__(self) -> Iterator[Pair]:
        found = identical = 0
        needed, optional = {*self._names.values(), *self._where}, optional_fields(self._names)
        with closing(self._rows.read(needed, optional)) as reading:
            self._reading, self._found = reading, found
            for place, row in reading:
                if not matches(row, self._where):
                    continue
                pair = pair_of(row, self._names, place)
                if self._chat is not None:
                    pair = pair_as_chat(self._chat[0], pair, self._chat[1])
                found += 1
                identical += pair.positive == pair.negative
                if self._reading is reading:
                    self._found = found
                yield pair
                if found == self._limit:
                    break
        if self._where and not found:
            raise PairsError(f"{self.source}: found no row with {dict(self._where)}; check the names and values")
        check_enough(found, identical, self.source)


def stream_pairs(
    source: str | Path | Sequence[str | Path] | Any,
    *,
    prompt: str = "prompt",
    positive: str = "positive",
    negative: str = "negative",
    where: Mapping[str, Any] | None = None,
    limit: int | None = None,
    split: str | None = None,
    chat_template=None,
) -> PairStream:
    """Pairs that are read as they are wanted, as often as wanted: a source of any length takes little memory.

    Example:
        >>> pairs = austeer.stream_pairs("pairs.jsonl", limit=20)
        >>> momentum = austeer.measure(model, tokenizer, pairs)  # reads them
        >>> momentum.pairs
        20

    Args:
        source: one of

            - a file of JSONL (``.jsonl``, ``.ndjson``), JSON (``.json``: a list of objects, which is read whole) or CSV
              (``.csv``, with a header), each also with ``.gz`` or ``.zst`` after it, or of Parquet (``.parquet``);
            - a pattern of files (``"pairs/*.jsonl.gz"``) or a sequence of files, read in the order of their names;
            - ``"hf:ORG/NAME"`` or ``"hf:ORG/NAME:CONFIG"``, a dataset of the Hugging Face Hub, streamed;
            - a folder that ``Dataset.save_to_disk`` wrote;
            - a ``datasets.Dataset`` or ``IterableDataset``, or a dictionary of them by split.
        prompt, positive, negative: the names that the fields have in the source. If they are these, a field ``lead``
            may say with which end of the prompt the answer begins (:class:`austeer.pairs.pair.Pair`).
        where: keep only rows in which these fields have these values, for example ``{"split": "selection"}``.
        limit: read at most so many pairs.
        split: which split of a dataset; needed if it has several.
        chat_template: a tokenizer whose chat template the prompts are put through
            (:meth:`PairStream.with_chat_template`).

    Raises:
        PairsError: no such file or dataset, an unknown format, a package that is not installed
            (``pip install 'austeer[data]'`` for Zstandard, Parquet and datasets), or a split that is not named or does
            not exist. What is wrong in the rows is told by the iteration (:class:`PairStream`).
    """
    if limit is not None and limit < 2:
        raise PairsError(f"limit: found {limit}, expected at least 2 pairs")
    names = {"prompt": prompt, "positive": positive, "negative": negative}
    stream = PairStream(open_source(source, split), names, where, limit)
    return stream if chat_template is None else stream.with_chat_template(chat_template)


def matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether fields have these values."""
    return all(_equals(row.get(field), wanted) for field, wanted in where.items())


def _equals(found: Any, wanted: Any) -> bool:
    """Whether a field has a value that may have been typed on a command line: true, True or 3 for what is no text."""
    if isinstance(found, str) or not isinstance(wanted, str):
        return found == wanted
    return wanted in (str(found), json.dumps(found, default=str))
