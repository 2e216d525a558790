"""Scores candidates of a search as rows of one batch, beside the unsteered model, and remembers every score."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..baselines.arm import Candidate
from ..errors import TaskError
from ..forward.tokens import encode
from ..steering.side_effects import side_effects
from ..steering.steer import steer
from ..steering.steering import Steering
from ..tasks.scoring import option_scores
from ..tasks.task import Task
from .record import Record
from .schedule import Costs

#: Candidates that one steering carries: each has a row in the strength tables of every layer.
PLANS_AT_ONCE = 32

#: Items between two entries in the record: what an interruption may cost.
ITEMS = 32

T = TypeVar("T")
Advance = Callable[[int], None]


def ignore(count: int) -> None:
    """For whoever wants no progress."""


@dataclass(frozen=True)
class Scores:
    """Attributes:
    margin: float64 [candidates, items], log-odds of the wanted option against the best other one, nats.
    correct: bool, the same shape: whether it is the likeliest option.
    """

    margin: Tensor
    correct: Tensor


class Scorer:
    """Scores on one task's items, and side effects on some neutral texts.

    Args:
        task: of kind "choice" or "continuation". neutral: texts that should stay as they are.
        record: where scores are kept; shared by scorers of other items or texts (``name`` tells them apart).
        batch_tokens: the limit on a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        task: Task,
        neutral: Sequence[str],
        record: Record | None = None,
        *,
        name: str = "tune",
        batch_tokens: int = 2048,
    ):
        if task.kind == "numeric":
            raise TaskError(
                f"{task.name}: found a numeric task, expected options: a search compares log-odds. Make pairs of it "
                "(austeer pairs make task), and evaluate the tuned plan on the numbers"
            )
        self.model, self.tokenizer, self.task, self.neutral = model, tokenizer, task, list(neutral)
        self.record = record or Record(None, {})
        self.name, self.batch_tokens = name, batch_tokens

    def base(self, items: Sequence[int], advance: Advance = ignore) -> Scores:
        """The unsteered model's scores: [1, items]."""
        return self.scores([None], items, advance)

    def changes(self, candidates: Sequence[Candidate], items: Sequence[int], advance: Advance = ignore) -> Tensor:
        """Change of the log-odds from unsteered: float64 [candidates, items], nats."""
        return self.scores(candidates, items, advance).margin - self.base(items).margin

    @cached_property
    def order(self) -> list[int]:
        """The items' numbers in the order of a hash: a beginning of it is a sample."""
        keys = [hashlib.sha256(f"{item.group}\n{i}".encode()).digest() for i, item in enumerate(self.task)]
        return sorted(range(len(keys)), key=keys.__getitem__)

    @cached_property
    def costs(self) -> Costs:
        """What things take, from a few items under no steering; measured once, and not recorded."""
        some = self.task.pick(self.order[:16])
        tokens = 0

        def ran(more: int) -> None:
            nonlocal tokens
            tokens += more

        option_scores(self.model, self.tokenizer, some[:1])  # the first call is slower
        start = time.perf_counter()
        option_scores(self.model, self.tokenizer, some, batch_tokens=self.batch_tokens, on_batch=ran)
        seconds = time.perf_counter() - start
        text = sum(map(len, encode(self.tokenizer, self.neutral))) / len(self.neutral)
        return Costs(seconds / len(some), seconds / tokens * text, seconds / tokens)

    def side_effects(self, candidates: Sequence[Candidate], texts: int | None = None) -> list[tuple[float, float]]:
        """(KL(unsteered || steered), rise of the cross-entropy) of each candidate, nats a token, on the first texts."""
        texts = len(self.neutral) if texts is None else min(texts, len(self.neutral))
        keys = [f"{self.name} side {texts} {candidate.key}" for candidate in candidates]
        missing = _distinct(keys, candidates, lambda key: self.record.get(key) is None)
        for part in slices(list(missing), PLANS_AT_ONCE):
            chosen = {str(i): missing[key] for i, key in enumerate(part)}
            with self.steered(chosen) as steering:
                assert steering is not None
                found = side_effects(
                    self.model,
                    self.tokenizer,
                    self.neutral[:texts],
                    steering,
                    list(chosen),
                    batch_tokens=self.batch_tokens,
                )
            for key, values in zip(part, found.mean()):
                self.record.put(key, list(values))
        return [tuple(self.record.get(key)) for key in keys]

    def scores(self, candidates: Sequence[Candidate | None], items: Sequence[int], advance: Advance = ignore) -> Scores:
        """Scores of each candidate (None: the unsteered model) on each of the items, by number.

        Args:
            advance: told of every so many scores, a candidate's on an item; also of those that were known.
        """
        keys = [f"{self.name} items {candidate.key if candidate else 'unsteered'}" for candidate in candidates]
        known: dict[str, dict[str, list]] = {key: dict(self.record.get(key) or {}) for key in keys}
        missing = _distinct(keys, candidates, lambda key: any(str(i) not in known[key] for i in items))
        groups: dict[tuple[int, ...], list[str]] = {}
        for key in missing:
            groups.setdefault(tuple(i for i in items if str(i) not in known[key]), []).append(key)
        advance(len(keys) * len(items) - sum(len(wanted) * len(members) for wanted, members in groups.items()))
        for wanted, members in groups.items():
            for part in slices(members, PLANS_AT_ONCE):
                chosen = {str(i): missing[key] for i, key in enumerate(part)}
                steered = {name: candidate for name, candidate in chosen.items() if candidate is not None}
                names = [name if name in steered else None for name in chosen]
                with self.steered(steered) as steering:
                    for some in slices(wanted, ITEMS):
                        task = self.task.pick(some)
                        found = option_scores(
                            self.model, self.tokenizer, task, steering, names, batch_tokens=self.batch_tokens
                        )
                        margin, correct = found.margins(task).tolist(), found.correct(task).tolist()
                        for row, key in enumerate(part):
                            cells = zip(some, margin[row], correct[row])
                            self.record.add(key, {str(i): [m, c] for i, m, c in cells})
                        advance(len(part) * len(some))
        rows = [[self.record.get(key)[str(i)] for i in items] for key in keys]
        table = torch.tensor([[cell[0] for cell in row] for row in rows], dtype=torch.float64, device="cpu")
        return Scores(table, torch.tensor([[bool(cell[1]) for cell in row] for row in rows], device="cpu"))

    @contextmanager
    def steered(self, candidates: dict[str, Candidate]) -> Iterator[Steering | None]:
        """The model with a plan by name for each candidate; as it is where there is none."""
        if not candidates:
            yield None
            return
        with steer(
            self.model,
            {name: c.arm.plan for name, c in candidates.items()},
            {name: c.strength for name, c in candidates.items()},
            k={name: c.arm.k for name, c in candidates.items()},
            check=False,
        ) as steering:
            yield steering


def _distinct(keys: Sequence[str], candidates: Sequence[T], wanted: Callable[[str], bool]) -> dict[str, T]:
    return {key: candidate for key, candidate in zip(keys, candidates) if wanted(key)}


def slices(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The values, so many at a time."""
    return (values[i : i + size] for i in range(0, len(values), size))
