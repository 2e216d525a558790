"""A labelled task in memory: prompts with options and a label, or with a number to be found."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import TaskError, count_of
from ..pairs.chat import ChatForm, chat_form, check_chat, check_untemplated, prompt_as_chat
from ..pairs.groups import BY, groups_of
from ..pairs.pair import Pair, has_lone_surrogate
from ..pairs.pairs import Pairs

#: "choice": each option is one token after the prompt. "continuation": options of any length, scored by their
#: log-probability. "numeric": the model writes, and the number that it gives counts.
KINDS = ("choice", "continuation", "numeric")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        prompt: what the model reads. options: what may follow it, each joined to the prompt as it is.
        label: which option is the wanted one. answer: the number that is right, of a numeric task.
        group: items of one group are alike (variants of one problem) and stay on one side of a split; by default the
            prompt, and see :func:`grouped`.
        lead: the end of the prompt that begins the answer, such as "Answer: (" before a letter: in chat form
            it is the model's to say, not the user's.
    """

    prompt: str
    options: tuple[str, ...] = ()
    label: int = 0
    answer: float | None = None
    group: str = ""
    lead: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", self.group or self.prompt)


@dataclass(frozen=True)
class Task(Sequence[Item]):
    """An immutable list of items of one kind.

    Attributes:
        name: for people and results. kind: one of ``KINDS``.
        source: where the items come from, for messages. chat_template: whether prompts went through one, with
            its options if it had any.
        grouped_by: what groups are made by, a name of :data:`austeer.pairs.groups.BY`.

    Raises:
        TaskError: no item; options or labels that do not fit the kind; an empty option, or prompt of a number.
    """

    name: str
    kind: str
    items: tuple[Item, ...]
    source: str = "memory"
    chat_template: ChatForm = False
    grouped_by: str = "prompt"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TaskError(f"{self.name}: kind: found {self.kind!r}, expected one of {', '.join(KINDS)}")
        if not self.items:
            raise TaskError(f"{self.source}: found no item, expected at least one")
        for number, item in enumerate(self.items):
            check_item(item, self.kind, f"{self.source}, item {number}")

    @classmethod
    def of_pairs(cls, pairs: Pairs, name: str = "pairs") -> Task:
        """Pairs as a task: the positive continuation is the wanted one."""
        items, by = grouped(
            [Item(p.prompt, (p.positive, p.negative), lead=p.lead) for p in pairs if p.positive != p.negative]
        )
        return cls(name, "continuation", items, pairs.source, pairs.chat_template, by)

    def pairs(self) -> Pairs:
        """Contrastive pairs: the wanted option against each other one, in turn.

        Raises:
            TaskError: a numeric task, which has no wrong options.
        """
        if self.kind == "numeric":
            raise TaskError(f"{self.name}: found a numeric task, expected options; see austeer.making for its pairs")
        pairs = tuple(
            Pair(item.prompt, item.options[item.label], other, item.lead)
            for item in self.items
            for number, other in enumerate(item.options)
            if number != item.label
        )
        return replace(Pairs.of(pairs, self.source), chat_template=self.chat_template)

    def split(self, parts: Mapping[str, float], seed: int = 0) -> dict[str, Task]:
        """Disjoint parts by name, each with about its fraction of the items; what the fractions leave is left out.

        Which part an item is in depends on its group and the seed alone, not on the order of the items: groups are
        put in the order of a hash.

        Raises:
            TaskError: fractions that are not positive or are more than the whole, or a part without an item.
        """
        if not parts or min(parts.values()) <= 0 or sum(parts.values()) > 1 + 1e-9:
            raise TaskError(f"split: found the fractions {dict(parts)}, expected positive ones of a sum of at most 1")
        members: dict[str, list[int]] = {}
        for number, item in enumerate(self.items):
            members.setdefault(item.group, []).append(number)
        order = sorted(members, key=lambda group: hashlib.sha256(f"{seed}\n{group}".encode()).digest())
        numbers = [number for group in order for number in members[group]]
        ends = {members[group][-1] for group in order}
        found: dict[str, Task] = {}
        start, share = 0, 0.0
        for name, fraction in parts.items():
            share += fraction
            stop = round(len(numbers) * share)
            while 0 < stop < len(numbers) and numbers[stop - 1] not in ends:  # a group stays whole
                stop += 1
            if stop <= start:
                raise TaskError(
                    f"{self.source}: found {count_of(len(self.items), 'item')} in {count_of(len(members), 'group')} "
                    f"({BY[self.grouped_by]}), too few for the split {dict(parts)}: no item is left for {name!r}; give "
                    'items of more groups (the field "group" sets an item\'s), or other fractions'
                )
            found[name] = self.pick(sorted(numbers[start:stop]))
            start = stop
        return found

    def pick(self, numbers: Sequence[int]) -> Task:
        """The items of these numbers, in this order."""
        return replace(self, items=tuple(self.items[i] for i in numbers))

    def take(self, count: int, seed: int = 0) -> Task:
        """At most ``count`` items, drawn with the seed; a larger count has the smaller one's."""
        keys = [hashlib.sha256(f"{seed}\n{item.group}\n{i}".encode()).digest() for i, item in enumerate(self.items)]
        chosen = sorted(range(len(self.items)), key=keys.__getitem__)[:count]
        return self.pick(chosen)

    def with_chat_template(self, tokenizer, **options: Any) -> Task:
        """Each prompt becomes a user's message in the tokenizer's chat template, up to where the answer begins.

        An item's lead begins the model's own turn. It, or the option where there is none, is joined without the blank
        or line break that sets it off from a plain prompt. Options and errors are those of
        ``Pairs.with_chat_template``.
        """
        check_untemplated(self.chat_template, self.source)
        check_chat(tokenizer, options)
        items = tuple(_as_chat(item, tokenizer, options) for item in self.items)
        return replace(self, items=items, chat_template=chat_form(options))

    def digest(self) -> str:
        """Tells tasks of other items, or other prompts, apart."""
        digest = hashlib.sha256(f"{self.kind} {self.chat_template}".encode())
        for item in self.items:
            digest.update(repr((item.prompt, item.options, item.label, item.answer)).encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i):
        return replace(self, items=self.items[i]) if isinstance(i, slice) else self.items[i]


def grouped(items: Sequence[Item]) -> tuple[tuple[Item, ...], str]:
    """All items of a source in their groups, and what these are made by: the items' own, if one has any, or else by
    :func:`austeer.pairs.groups.groups_of`.
    """
    if any(item.group != item.prompt for item in items):
        return tuple(items), "own"
    groups, by = groups_of([item.prompt for item in items], [item.options for item in items])
    return tuple(replace(item, group=group) for item, group in zip(items, groups)), by


def check_item(item: Item, kind: str, where: str) -> None:
    """Raises TaskError, which names the place, if an item does not fit the kind or has an empty option."""
    if not item.prompt.endswith(item.lead):
        raise TaskError(f"{where}: found the lead {item.lead!r:.40}, expected the end of {item.prompt[-40:]!r}")
    if (kind == "numeric" and not item.prompt.strip()) or has_lone_surrogate(item.prompt + "".join(item.options)):
        raise TaskError(f"{where}: found the prompt {item.prompt[:40]!r}, expected text")
    if kind == "numeric":
        if item.answer is None or not math.isfinite(item.answer):
            raise TaskError(f"{where}: found the answer {item.answer!r}, expected a number")
        return
    if len(item.options) < 2 or len(set(item.options)) < len(item.options) or not all(item.options):
        raise TaskError(f"{where}: found the options {item.options!r:.80}, expected two or more, all different")
    if not 0 <= item.label < len(item.options):
        raise TaskError(
            f"{where}: found the label {item.label!r}, expected 0 to {len(item.options) - 1} for the options "
            f"{item.options!r:.80}"
        )


def _as_chat(item: Item, tokenizer, chat: Mapping[str, Any]) -> Item:
    prompt, lead = prompt_as_chat(tokenizer, item.prompt, item.lead, chat)
    # The turn's header ends with what belongs before an answer; behind a lead options are joined as they are.
    options = item.options if lead else tuple(option.lstrip(" ") for option in item.options)
    return replace(item, prompt=prompt, lead=lead, options=options)
