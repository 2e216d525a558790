"""Task templates: data that say how a row of a file becomes a question; those that are shipped, and a user's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import TaskError
from ..utils.unique_keys import DuplicateKey, unique_keys
from .numeric import parse_number
from .task import KINDS, Item, check_item

DUPLICATES = ("error", "drop")


@dataclass(frozen=True)
class Template:
    """How a row becomes an item. All texts are jinja2 templates, in a sandbox, in which the row's fields are variables.

    Besides the fields there is ``row``, the whole row, for names that are no identifiers (``row["asks-for"]``), and the
    filter ``words``, the lower-case words of a text without its numbers.

    Attributes:
        name: for people and results. kind: one of ``KINDS``. description: one line.
        prompt: what the model reads. lead: how the answer begins, behind the prompt; in chat form it is in the model's
            turn.
        options: what may follow it, each joined to the prompt as it is.
        label: which option is the wanted one: a template that gives the option's text, or its number from 0; or
            ``{"field": name, "values": {value: option}}``, with the value as JSON writes it (or the text itself).
        answer: of a numeric task, a template that gives the number.
        group: items with the same text are alike and stay on one side of a split; by default the prompt.
        fields: those that a row must have; by default those that the templates use.
        duplicates: what to do with a question that comes twice with the same answer: "error", or "drop" the later one.

    Raises:
        TaskError: a template that is not jinja2, or fields that do not fit the kind.
    """

    name: str
    kind: str
    prompt: str
    options: tuple[str, ...] = ()
    label: str | Mapping[str, Any] = ""
    answer: str = ""
    group: str = ""
    fields: tuple[str, ...] = ()
    duplicates: str = "error"
    description: str = ""
    lead: str = ""

    def __post_init__(self) -> None:
        where = f"template {self.name!r}"
        for key in ("name", "prompt", "answer", "group", "description", "lead"):
            if not isinstance(getattr(self, key), str):
                raise TaskError(f"{where}: {key}: found {getattr(self, key)!r:.60}, expected text")
        for key in ("options", "fields"):
            value = getattr(self, key)
            if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
                raise TaskError(f"{where}: {key}: found {value!r:.60}, expected a list of texts")
            object.__setattr__(self, key, tuple(value))
        if self.kind not in KINDS:
            raise TaskError(f"{where}: kind: found {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.duplicates not in DUPLICATES:
            raise TaskError(f"{where}: duplicates: found {self.duplicates!r}, expected one of {', '.join(DUPLICATES)}")
        numeric = self.kind == "numeric"
        for key, wanted in (("prompt", True), ("options", not numeric), ("label", not numeric), ("answer", numeric)):
            if bool(getattr(self, key)) != wanted:
                expected = "one" if wanted else "none"
                raise TaskError(
                    f"{where}: {key}: found {getattr(self, key)!r:.60}, expected {expected} for {self.kind!r}"
                )
        if not isinstance(self.label, str) and not (
            isinstance(self.label, Mapping)
            and set(self.label) == {"field", "values"}
            and isinstance(self.label["field"], str)
            and isinstance(self.label["values"], Mapping)
        ):
            raise TaskError(
                f'{where}: label: found {self.label!r:.60}, expected {{"field": ..., "values": {{...}}}} or text'
            )
        _ = self._compiled

    @cached_property
    def _texts(self) -> dict[str, str]:
        """All that is a jinja2 template, by what it is."""
        texts = {"prompt": self.prompt, "lead": self.lead, "answer": self.answer, "group": self.group}
        texts |= {f"option {i}": option for i, option in enumerate(self.options)}
        return texts | ({"label": self.label} if isinstance(self.label, str) else {})

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        found = {}
        for name, text in self._texts.items():
            try:
                found[name] = _ENVIRONMENT.from_string(text)
            except TemplateError as error:
                raise TaskError(
                    f"template {self.name!r}: {name}: not a jinja2 template ({error}): {text!r:.80}"
                ) from error
        return found

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The fields that a row must have, in the order of the alphabet."""
        used = set() if isinstance(self.label, str) else {self.label["field"]}
        return self.fields or tuple(sorted(used.union(*map(_fields_of, self._texts.values()))))

    def item(self, row: Mapping[str, Any], where: str) -> Item:
        """The item that a row makes.

        Args:
            where: the row's place, for messages.

        Raises:
            TaskError: a missing field, a label outside the options, an answer that is no number ...
        """
        missing = [name for name in self.required if row.get(name) is None]
        if missing:
            lacks = _listed(f"{name} is {'null' if name in row else 'missing'}" for name in missing)
            raise TaskError(
                f"{where}: found the fields {_listed(row)}, expected {_listed(self.required)} for the template "
                f"{self.name!r}: {lacks}; choose another template, or write one for this file (docs/tasks.md)"
            )
        values = {**row, "row": row}
        try:
            text = {name: template.render(values) for name, template in self._compiled.items()}
        except Exception as error:  # of a user's template: whatever it raises, it does not suit this row
            raise TaskError(f"{where}: the template {self.name!r} fails ({type(error).__name__}: {error})") from error
        options = tuple(text[f"option {i}"] for i in range(len(self.options)))
        label, answer = 0, None
        if self.kind == "numeric":
            answer = parse_number(text["answer"])
            if answer is None:
                raise TaskError(f"{where}: found the answer {text['answer']!r:.60}, expected a number")
        elif isinstance(self.label, str):
            label = label_of(text["label"], options, where)
        else:
            value, known = row[self.label["field"]], self.label["values"]
            key = value if isinstance(value, str) else json.dumps(value)
            if key not in known:
                raise TaskError(
                    f"{where}: found {key!r:.60} in the field {self.label['field']!r}, expected {_listed(known)}"
                )
            label = label_of(known[key], options, where)
        item = Item(text["prompt"] + text["lead"], options, label, answer, text["group"].strip(), text["lead"])
        check_item(item, self.kind, where)
        return item


def label_of(label: Any, options: Sequence[str], where: str) -> int:
    """The number of the option that a label means: by its text (blanks around it aside), or by its number from 0.

    Raises:
        TaskError: it means none of them.
    """
    if isinstance(label, str):
        for same in (str, str.strip):
            found = [i for i, option in enumerate(options) if same(option) == same(label)]
            if len(found) == 1:
                return found[0]
    number = label
    if isinstance(label, str) and label.strip().isdecimal():
        number = int(label)
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(options):
        return number
    raise TaskError(
        f"{where}: found the label {label!r:.60}, expected one of the options {list(options)!r:.120}, or its number "
        f"from 0 to {len(options) - 1}"
    )


def shipped() -> dict[str, Template]:
    """The templates that come with the package, by name."""
    folder = files("austeer") / "data" / "tasks"
    found = (
        _parse(file.read_text(encoding="utf-8"), file.name) for file in folder.iterdir() if file.name.endswith(".json")
    )
    return {template.name: template for template in sorted(found, key=lambda template: template.name)}


def load_template(source: str | Path | Mapping[str, Any] | Template) -> Template:
    """A template by a shipped one's name, from a JSON file of a user's, or from its fields.

    Raises:
        TaskError: no such template or file, not JSON, unknown fields, or what :class:`Template` raises.
    """
    if isinstance(source, Template):
        return source
    if isinstance(source, Mapping):
        return _of_fields(source, "template")
    path = Path(source)
    if path.suffix == ".json":
        try:
            return _parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(
                f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path"
            ) from error
    known = shipped()
    if str(source) not in known:
        raise TaskError(
            f"template: found {str(source)!r}, expected one of {', '.join(known)}, or the path of a .json "
            "file (docs/tasks.md)"
        )
    return known[str(source)]


def _parse(text: str, name: str) -> Template:
    try:
        found = json.loads(text, object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise TaskError(f"{name}: {error}; remove one") from error
    except ValueError as error:
        raise TaskError(f"{name}: not valid JSON ({error}); expected a template (docs/tasks.md)") from error
    if not isinstance(found, dict):
        raise TaskError(f"{name}: found {type(found).__name__} at the top, expected an object (docs/tasks.md)")
    return _of_fields({"name": Path(name).stem, **found}, name)


def _of_fields(found: Mapping[str, Any], where: str) -> Template:
    known = [field.name for field in fields(Template)]
    if not {"kind", "prompt"} <= set(found) <= set(known):
        raise TaskError(
            f"{where}: found the fields {_listed(found)}, expected kind, prompt and others of {_listed(known)}"
        )
    return Template(**{"name": where, **found})


def _words(text: str) -> list[str]:
    """The lower-case words of a text, without its numbers: the same for variants that differ in numbers only."""
    return re.findall(r"[^\W\d_]+", str(text).lower())


def _fields_of(text: str) -> set[str]:
    """The fields that a template reads, as variables or as row["name"]."""
    tree = _ENVIRONMENT.parse(text)
    used = meta.find_undeclared_variables(tree) - {"row"} - set(_ENVIRONMENT.globals)
    for node in tree.find_all(nodes.Getitem):
        if isinstance(node.node, nodes.Name) and node.node.name == "row" and isinstance(node.arg, nodes.Const):
            used.add(str(node.arg.value))
    return used


def _listed(names) -> str:
    return ", ".join(map(str, names)) or "none"


_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_ENVIRONMENT.filters["words"] = _words
