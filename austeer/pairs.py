"""Contrastive pairs: read, check, split, tokenise.

A pair is a prompt with a desired and an undesired continuation (paper: positive and negative samples). The texts that
a model reads are ``prompt + positive`` and ``prompt + negative``, joined as they are: put the space between prompt and
continuation where the tokenizer expects it.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from .errors import PairsError

FIELDS = ("prompt", "positive", "negative")


@dataclass(frozen=True)
class Pair:
    prompt: str
    positive: str
    negative: str


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """An immutable list of pairs, with what is known of where they come from.

    Attributes:
        items: the pairs.
        source: file name or other origin, for messages and provenance.
        chat_template: whether the prompts were put through a chat template (and so hold their special tokens).
    """

    items: tuple[Pair, ...]
    source: str = "memory"
    chat_template: bool = False

    @classmethod
    def of(cls, pairs: Iterable[Pair | Mapping[str, str] | Sequence[str]], source: str = "memory") -> Pairs:
        """Pairs from (prompt, positive, negative) tuples, mappings with these keys, or ``Pair`` objects.

        Raises:
            PairsError: a field is missing, empty or no text; fewer than 2 pairs; all pairs have equal sides.
        """
        if isinstance(pairs, Pairs):
            return pairs
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
            items.append(_pair(row, dict(zip(FIELDS, FIELDS)), where))
        return _checked(items, source)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i):
        return replace(self, items=self.items[i]) if isinstance(i, slice) else self.items[i]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.items)

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

    def with_chat_template(self, tokenizer, system: str | None = None) -> Pairs:
        """Each prompt becomes a user's message in the tokenizer's chat template, up to where the answer begins.

        Raises:
            PairsError: the tokenizer has no chat template, or the pairs went through one already.
        """
        if self.chat_template:
            raise PairsError(f"{self.source}: these pairs have been put through a chat template already")
        return replace(
            self,
            items=tuple(replace(p, prompt=render_chat(tokenizer, p.prompt, system)) for p in self.items),
            chat_template=True,
        )


def render_chat(tokenizer, prompt: str, system: str | None = None) -> str:
    """One user's message in the tokenizer's chat template, with the assistant's turn opened."""
    if not getattr(tokenizer, "chat_template", None):
        raise PairsError(
            "the tokenizer has no chat template; leave the chat option out, or use an instruction-tuned model's"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise PairsError(f"the tokenizer's chat template does not take these messages: {error}") from error


def load_pairs(
    path: str | Path,
    *,
    prompt: str = "prompt",
    positive: str = "positive",
    negative: str = "negative",
    where: Mapping[str, Any] | None = None,
    limit: int | None = None,
    chat_template=None,
) -> Pairs:
    """Reads pairs from JSONL (``.jsonl``), JSON (``.json``: a list of objects) or CSV (``.csv``, with a header).

    Args:
        path: the file; its suffix tells the format.
        prompt, positive, negative: the names that the fields have in the file.
        where: keep only rows in which these fields have these values, for example ``{"split": "selection"}``.
        limit: read at most so many pairs.
        chat_template: a tokenizer whose chat template the prompts are put through (``Pairs.with_chat_template``).

    Raises:
        PairsError: no such file, an unknown format, a damaged line, a missing or empty field (file, line and field are
            named), fewer than 2 pairs, or pairs whose sides are all the same.
    """
    path = Path(path)
    names = {"prompt": prompt, "positive": positive, "negative": negative}
    if limit is not None and limit < 2:
        raise PairsError(f"limit: found {limit}, expected at least 2 pairs")
    items = []
    for place, row in _rows(path):
        if where and not all(_equals(row.get(field), value) for field, value in where.items()):
            continue
        items.append(_pair(row, names, f"{path}, {place}"))
        if limit is not None and len(items) >= limit:
            break
    if where and not items:
        raise PairsError(f"{path}: found no row with {dict(where)}; check the names and values")
    pairs = _checked(items, str(path))
    return pairs if chat_template is None else pairs.with_chat_template(chat_template)


def _equals(found: Any, wanted: Any) -> bool:
    """Whether a field has a value that may have been typed on a command line: true, True or 3 for what is no text."""
    return found == wanted or (not isinstance(found, str) and wanted in (json.dumps(found), str(found)))


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a file, and where each is: its line (in CSV its last), or its entry in a JSON list."""
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PairsError(f"{path}: found the suffix {path.suffix!r}, expected one of {', '.join(readers)}")
    if not path.is_file():
        raise PairsError(f"{path}: no such file; give the path of a file of pairs")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise PairsError(f"{path}: found bytes that are not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except RecursionError as error:
        raise PairsError(f"{path}: found JSON nested too deep; expected objects with the pair's fields") from error
    except csv.Error as error:
        raise PairsError(f"{path}: not readable as CSV ({error}); check the quoting, or use JSONL") from error
    except ValueError as error:
        raise PairsError(f"{path}: found a number that cannot be read ({error})") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise PairsError(
                    f"{path}, line {number}: not valid JSON ({error.msg}); expected one object a line"
                ) from error
            yield f"line {number}", _object(row, f"{path}, line {number}")


def _json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise PairsError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(rows, list):
        raise PairsError(f"{path}: found {type(rows).__name__} at the top, expected a list of objects")
    for number, row in enumerate(rows, 1):
        yield f"entry {number}", _object(row, f"{path}, entry {number}")


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise PairsError(f"{path}: found a column name twice in {', '.join(names)}; expected each once")
        for row in reader:
            if None in row:  # where DictReader puts what has no column
                raise PairsError(
                    f"{path}, line {reader.line_num}: found more than {len(names)} fields; put text that holds a comma "
                    "in quotes"
                )
            yield f"line {reader.line_num}", row


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise PairsError(f"{where}: found {type(row).__name__}, expected an object with the pair's fields")
    return row


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half a character, as JSON and a command line can; no tokenizer takes it."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _pair(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> Pair:
    values = {}
    for field, name in names.items():
        if row.get(name) is None:
            raise PairsError(
                f"{where}: field {name!r} is missing; found {', '.join(map(str, row)) or 'no field'} "
                f"(name the {field} field with {field}=... or --{field}-field)"
            )
        value = row[name]
        if not isinstance(value, str):
            raise PairsError(f"{where}: field {name!r} is {type(value).__name__}, expected text")
        if not value.strip():
            raise PairsError(f"{where}: field {name!r} is empty, expected text")
        if has_lone_surrogate(value):
            raise PairsError(f"{where}: field {name!r} has half of a surrogate pair, expected text that UTF-8 can hold")
        values[field] = value
    return Pair(**values)


def _checked(items: list[Pair], source: str) -> Pairs:
    if len(items) < 2:
        raise PairsError(f"{source}: found {len(items)} pair{'' if len(items) == 1 else 's'}, expected at least 2")
    pairs = Pairs(tuple(items), source)
    if pairs.identical == len(pairs):
        raise PairsError(f"{source}: in all {len(pairs)} pairs positive and negative are equal; nothing to contrast")
    return pairs


@dataclass(frozen=True)
class Tokenised:
    """Token ids of the positive and negative texts of the pairs whose two texts differ.

    Attributes:
        positive, negative: one list of ids a pair.
        number: the pair's place among all pairs.
        cut: how many texts were cut to fit.
        identical: how many pairs have the same tokens on both sides, and are left out.
    """

    positive: list[list[int]]
    negative: list[list[int]]
    number: list[int]
    cut: int
    identical: int


def encode(tokenizer, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of texts, without an end-of-text token that the tokenizer appends of itself."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]
    eos = tokenizer.eos_token_id
    for i, (text, tokens) in enumerate(zip(texts, ids)):
        if len(tokens) > 1 and tokens[-1] == eos and not text.endswith(tokenizer.eos_token):
            ids[i] = tokens[:-1]
    return ids


def tokenise(tokenizer, pairs: Pairs, max_length: int) -> Tokenised:
    """Token ids of each pair's two texts, cut on the left to ``max_length`` so that the answer stays.

    A leading beginning-of-text token survives the cut, and the last token is the answer's (:func:`encode`).
    """
    texts = [p.prompt + p.positive for p in pairs] + [p.prompt + p.negative for p in pairs]
    # A rendered chat template holds its own special tokens.
    ids = encode(tokenizer, texts, add_special_tokens=not pairs.chat_template)
    bos = tokenizer.bos_token_id
    cut = 0
    for i, tokens in enumerate(ids):
        if not tokens:
            raise PairsError(f"{pairs.source}, pair {i % len(pairs)}: found no token in {texts[i]!r:.60}")
        if len(tokens) > max_length:
            cut += 1
            head = [bos] if bos is not None and tokens[0] == bos and max_length > 1 else []
            ids[i] = head + tokens[len(tokens) - max_length + len(head) :]
    positive, negative = ids[: len(pairs)], ids[len(pairs) :]
    # Equal texts would differ by the rounding of the batches that they happen to be in, and count as evidence.
    number = [i for i in range(len(pairs)) if positive[i] != negative[i]]
    if not number:
        raise PairsError(
            f"{pairs.source}: in all {len(pairs)} pairs both texts have the same tokens"
            + (f" after {cut} texts were cut to {max_length}; give a larger max_length" if cut else "")
        )
    return Tokenised(
        [positive[i] for i in number], [negative[i] for i in number], number, cut, len(pairs) - len(number)
    )
