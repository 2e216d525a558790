"""Pairs from a template with placeholders: every combination of their values, or some."""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import PairsError
from ..pairs.pair import Pair
from ..pairs.pairs import Pairs
from ..pairs.text_file import TextFile
from ..utils.unique_keys import DuplicateKey, unique_keys
from .made_pairs import Made

#: More combinations than these are not made unless their number is asked for.
MOST = 1_000_000


def pairs_from_template(
    prompt: str,
    positive: str,
    negative: str,
    values: Mapping[str, Sequence[str]],
    *,
    count: int | None = None,
    seed: int = 0,
) -> Made:
    """The pairs that a template's combinations of values give.

    A placeholder is a name in braces, ``{noun}``; a brace itself is doubled. Placeholders of the prompt, and those that
    both sides have, take every combination. Those of one side only are paired: the first value of each goes with the
    first of the others, and so on, so their lists must be of one length.

    Args:
        values: the values of each placeholder.
        count: so many different combinations, drawn with ``seed``, in place of all.

    Raises:
        PairsError: a placeholder without values, values without a placeholder, an empty or repeated value, lists to be
            paired that are of unlike length, sides that are equal, or a count that is out of range.
    """
    texts = {"prompt": prompt, "positive": positive, "negative": negative}
    names = {field: _placeholders(field, text) for field, text in texts.items()}
    used = dict.fromkeys(name for field in names.values() for name in field)
    _check_values(used, values)
    shared = [name for name in used if name in names["prompt"] or all(name in names[s] for s in texts if s != "prompt")]
    paired = [name for name in used if name not in shared]
    lengths = {name: len(values[name]) for name in paired}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{length} for {name!r}" for name, length in lengths.items())
        raise PairsError(
            f"values: found {found}, expected as many for each: placeholders of one side only are paired, the first "
            "with the first and so on"
        )
    sizes = [len(values[name]) for name in shared] + list(lengths.values())[:1]
    total = math.prod(sizes)
    pairs = []
    for number in _chosen(total, count, seed):
        chosen: dict[str, str] = {}
        for size, group in zip(reversed(sizes), reversed([[name] for name in shared] + ([paired] if paired else []))):
            number, place = divmod(number, size)
            chosen |= {name: values[name][place] for name in group}
        pair = Pair(*(text.format_map(chosen) for text in texts.values()))
        if pair.positive == pair.negative:
            raise PairsError(f"template: found {pair.positive!r} on both sides with {chosen}, expected different sides")
        pairs.append(pair)
    unique = list(dict.fromkeys(pairs))
    repeated = len(pairs) - len(unique)
    return Made(Pairs.of(unique, "template"), {"repeated": repeated} if repeated else {})


def read_values(path: str | Path | None, given: Iterable[str] = ()) -> dict[str, list[str]]:
    """Placeholder values from a JSON file (an object of lists of texts) and from ``NAME=VALUE,VALUE`` texts.

    Raises:
        PairsError: an unreadable file, another form, or a name that is given twice.
    """
    values: dict[str, list[str]] = {}
    if path is not None:
        try:
            with TextFile(Path(path), "") as file:
                found = json.loads(file.text(), object_pairs_hook=unique_keys)
        except DuplicateKey as error:
            raise PairsError(f"{path}: {error}; remove one") from error
        except (ValueError, RecursionError) as error:
            raise PairsError(f"{path}: not valid JSON ({error}); expected lists of texts by name") from error
        if not isinstance(found, dict) or not all(
            isinstance(v, list) and all(isinstance(text, str) for text in v) for v in found.values()
        ):
            raise PairsError(f'{path}: expected an object of lists of texts, for example {{"noun": ["film", "book"]}}')
        values |= found
    for text in given:
        name, equals, listed = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise PairsError(f"--value: found {text!r}, expected NAME=VALUE,VALUE, for example noun=film,book")
        if name in values:
            raise PairsError(f"--value: found values for {name!r} twice, expected them once")
        values[name] = [value.strip() for value in listed.split(",")]
    return values


def _placeholders(field: str, text: str) -> list[str]:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise PairsError(f"{field}: found {text!r} ({error}); expected {{name}}, and a brace itself doubled") from error
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise PairsError(f"{field}: found a placeholder {{{name}}} in {text!r}, expected a plain name, as {{noun}}")
        names.append(name)
    if not text.strip():
        raise PairsError(f"{field}: found an empty template, expected text")
    return names


def _check_values(used: Iterable[str], values: Mapping[str, Sequence[str]]) -> None:
    for name in used:
        if name not in values:
            known = ", ".join(values) or "none"
            raise PairsError(f"template: found the placeholder {{{name}}} without values; found values for {known}")
    for name, listed in values.items():
        if name not in used:
            raise PairsError(f"values: found {name!r}, which the template does not use; expected {', '.join(used)}")
        if isinstance(listed, str) or not listed or not all(isinstance(v, str) and v.strip() for v in listed):
            raise PairsError(f"values: found {listed!r:.60} for {name!r}, expected a list of texts, none of them empty")
        if len(set(listed)) < len(listed):
            twice = next(value for value in listed if list(listed).count(value) > 1)
            raise PairsError(f"values: found {twice!r} twice for {name!r}, expected each value once")


def _chosen(total: int, count: int | None, seed: int) -> Iterable[int]:
    if count is None:
        if total > MOST:
            raise PairsError(f"template: found {total} combinations; give how many of them to draw (count, --count)")
        return range(total)
    if not 2 <= count <= total:
        raise PairsError(f"count: found {count}, expected 2 to {total}, the number of combinations")
    return sorted(random.Random(seed).sample(range(total), count))
