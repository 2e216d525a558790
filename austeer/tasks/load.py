"""Labelled tasks from files and datasets, through a template or in the neutral format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import TaskError
from ..pairs.pair import FIELDS, pair_of
from ..pairs.readers import open_source
from ..pairs.source import Row, Source
from ..pairs.stream import matches
from .numeric import parse_number
from .task import Item, Task, check_item, grouped
from .templates import DUPLICATES, Template, _listed, label_of, load_template

Make = Callable[[Mapping[str, Any], str], Item | None]

#: The neutral format: a row is one of these, told by its fields; "group" may stand beside them.
NEUTRAL = {
    "options": ("prompt", "options", "label"),
    "numeric": ("prompt", "answer"),
    "pairs": ("prompt", "positive", "negative"),
}


def load_task(
    source: str | Path | Sequence[str | Path] | Any,
    template: str | Path | Mapping[str, Any] | Template | None = None,
    *,
    where: Mapping[str, Any] | None = None,
    limit: int | None = None,
    split: str | None = None,
    kind: str | None = None,
    duplicates: str | None = None,
) -> Task:
    """A labelled task from a file, several, or a dataset.

    Args:
        source: as of :func:`austeer.load_pairs`: JSONL, JSON, CSV (each also ``.gz`` or ``.zst``), Parquet, a
            pattern, or ``hf:ORG/NAME``.
        template: a shipped template's name (:func:`shipped`), a user's JSON file, or None for the neutral format, in
            which a row has the fields prompt, options and label (the option's text, or its number from 0); prompt and
            answer (a number); or prompt, positive and negative, of which pairs of equal sides are left out; and, if
            wanted, group.
        where: keep only rows in which these fields have these values.
        limit: read at most so many items, the first ones; see also :meth:`Task.take`.
        split: which split of a dataset; needed if it has several.
        kind: of a file in the neutral format with options: "continuation" (the default), or "choice", which promises
            options of one token each.
        duplicates: what to do with a question that comes twice with the same answer: "error", or "drop" the later one;
            by default as the template says; without one "error", for pairs "drop".

    Raises:
        TaskError: a row that lacks fields or has unknown ones, a label outside the options, a question that comes
            twice, no item; file and line, what was found and what was expected are named.
        PairsError: no such source, or what cannot be read in it.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit: found {limit}, expected at least 1")
    if duplicates not in (None, *DUPLICATES):
        raise TaskError(f"duplicates: found {duplicates!r}, expected one of {', '.join(DUPLICATES)}")
    opened = open_source(source, split)
    wanted = where or {}
    make: Make
    if template is not None:
        if kind is not None:
            raise TaskError(f"kind: found {kind!r} beside a template, which has its own; expected it in the template")
        form = load_template(template)
        name, found_kind, make, repeated = form.name, form.kind, form.item, form.duplicates
        columns = {*form.required, *wanted}
    else:
        name, found_kind, make, columns, repeated = _neutral(opened, kind, set(wanted))
    items: list[Item] = []
    first_seen: dict[tuple, tuple[str, Any]] = {}
    for place, row in _rows(opened, columns, wanted):
        item = make(row, place)
        if item is None:
            continue
        answer = item.answer if found_kind == "numeric" else item.options[item.label]
        before = first_seen.setdefault((item.prompt, frozenset(item.options)), (place, answer))
        if before != (place, answer):
            if before[1] != answer:
                raise TaskError(
                    f"{place}: found the question of {before[0]} again, with the answer {answer!r:.40} and not "
                    f"{before[1]!r:.40}; expected one answer: remove the wrong row"
                )
            if (duplicates or repeated) != "drop":
                raise TaskError(
                    f"{place}: found the question and answer of {before[0]} again, expected each once: remove one, or "
                    'drop the later ones (duplicates="drop", --drop-duplicates)'
                )
            continue
        items.append(item)
        if len(items) == limit:
            break
    if not items:
        condition = f" with {dict(wanted)}; check the names and values" if wanted else "; expected at least one"
        raise TaskError(f"{opened.name}: found no row{condition}")
    members, by = grouped(items)
    return Task(name, found_kind, members, opened.name, grouped_by=by)


def _rows(source: Source, columns: set[str], where: Mapping[str, Any]) -> Iterator[Row]:
    with closing(source.read(columns)) as rows:
        for place, row in rows:
            if matches(row, where):
                yield place, row


def _neutral(source: Source, kind: str | None, extra: set[str]) -> tuple[str, str, Make, set[str], str]:
    """By the first row's fields: name, kind, what makes an item of a row, columns to be read, what duplicates do."""
    columns = {name for names in NEUTRAL.values() for name in names}  # no file has all, so all of its own are read
    with closing(source.read(columns)) as rows:
        place, row = next(rows, (source.name, {}))
    if not row:
        raise TaskError(f"{place}: found no row, expected at least one")
    forms = [form for form, names in NEUTRAL.items() if set(names) <= set(row)]
    # Files of pairs may have further fields, as for load_pairs. Elsewhere a field may be a misspelt "group".
    allowed = {*row, "group"} if forms == ["pairs"] else {"group"} | extra
    if len(forms) != 1 or not set(row) <= set(NEUTRAL[forms[0]]) | allowed:
        expected = "; or ".join(_listed(names) for names in NEUTRAL.values())
        raise TaskError(
            f"{place}: found the fields {_listed(row)}, expected {expected} (and group, if wanted) and no others; name "
            "a template (--template) for a file of another form"
        )
    (form,) = forms
    if kind is not None and (form == "numeric" or kind not in ("choice", "continuation")):
        raise TaskError(f"kind: found {kind!r}, expected choice or continuation, for a file with options")
    task_kind = "numeric" if form == "numeric" else kind or "continuation"
    needed = set(NEUTRAL[form])

    def make(row: Mapping[str, Any], place: str) -> Item | None:
        given = {name for name, value in row.items() if value is not None}
        if form == "pairs":
            pair = pair_of(row, dict(zip(FIELDS, FIELDS)), place)
            if pair.positive == pair.negative:  # says nothing
                return None
            item = Item(pair.prompt, (pair.positive, pair.negative), lead=pair.lead)
        elif not needed <= given <= needed | allowed:
            raise TaskError(
                f"{place}: found the fields {_listed(name for name in row if name in given)}, expected "
                f"{_listed(NEUTRAL[form])}, as in the first row"
                + "".join(f"; {name} is null" for name in row if name in needed - given)
            )
        else:
            item = _item(form, row, place)
        if row.get("group") is not None:
            item = replace(item, group=str(row["group"]))
        check_item(item, task_kind, place)
        return item

    duplicates = "drop" if form == "pairs" else "error"
    return Path(source.name).name.split(".")[0], task_kind, make, columns, duplicates


def _item(form: str, row: Mapping[str, Any], where: str) -> Item:
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise TaskError(f"{where}: prompt: found {prompt!r:.60}, expected text")
    if form == "numeric":
        answer = parse_number(str(row["answer"]))
        if isinstance(row["answer"], bool) or answer is None:
            raise TaskError(f"{where}: answer: found {row['answer']!r:.60}, expected a number")
        return Item(prompt, answer=answer)
    options = row["options"]
    if isinstance(options, str) or not isinstance(options, Sequence) or not all(isinstance(o, str) for o in options):
        raise TaskError(f"{where}: options: found {options!r:.60}, expected a list of texts")
    return Item(prompt, tuple(options), label_of(row["label"], options, where))
