"""How well a model does on a labelled task, unsteered and under each of several steerings, on the same items."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import TaskError
from ..forward.causality import expect_causal
from ..forward.neutral import neutral_texts
from ..models.structure import name_of
from ..plans.plan import Plan
from ..steering.side_effects import Names, side_effects
from ..steering.steer import steer
from ..steering.steering import Steering
from ..utils.progress import Progress
from .evaluation import UNSTEERED, Evaluation, Observed, summarise
from .numeric import TOLERANCE, equal_numbers, last_number, numeric_answers
from .scoring import _tokenise, option_scores
from .task import Task

#: Items between two steps of the progress bar.
ITEMS = 32


class Variant(NamedTuple):
    """A steering to be evaluated.

    Attributes:
        alpha: one number, or one a site; None: the one that the plan's evidence recommends.
        k: only so many AUs, the most important ones; None: all.
    """

    plan: Plan
    alpha: float | Mapping[str, float] | None = None
    k: int | None = None


def evaluate(
    model: nn.Module,
    tokenizer,
    task: Task,
    variants: Mapping[str, Plan | Variant | tuple] | None = None,
    *,
    neutral: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    tolerance: float = TOLERANCE,
    batch_tokens: int = 2048,
    batch_rows: int = 32,
    progress: bool | None = None,
) -> Evaluation:
    """Evaluates the unsteered model and every variant on a task; all are rows of the same batches.

    Args:
        variants: name -> plan, (plan, alpha) or (plan, alpha, k); without any, the model alone is evaluated.
        neutral: texts that steering should leave as they are; None: the packaged held-out ones; empty: none.
        max_new_tokens, tolerance: of a numeric task: how much is written, and how far from the answer is still right.
        batch_tokens, batch_rows: the limits on a batch of scores, and of texts for a numeric task.
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Raises:
        TaskError: a variant without a strength or with a reserved name, options that cannot be scored
            (:func:`check_options`), or texts to score and a model whose attention is not causal (a numeric task with
            neutral=() scores none). PlanError, SteeringError: what :func:`austeer.steer` refuses.
    """
    chosen = checked_variants(variants or {})
    if task.kind != "numeric":
        check_options(tokenizer, task)
    if neutral is None:
        neutral = neutral_texts("heldout")
    if task.kind != "numeric" or (chosen and neutral):
        expect_causal(model)
    names: list[str | None] = [None, *chosen]
    about: dict[str, dict[str, Any]] = {name: _about(variant) for name, variant in chosen.items()}
    plans = {name: variant.plan for name, variant in chosen.items()}
    alphas, k = ({name: fields[field] for name, fields in about.items()} for field in ("alpha", "k"))
    with steer(model, plans, alphas, k=k) if chosen else nullcontext() as steering:
        start = time.perf_counter()
        with Progress(f"{task.name}, {len(names)} at once", len(task), "items", progress) as bar:
            if task.kind == "numeric":
                lengths = {"max_new_tokens": max_new_tokens, "batch_rows": batch_rows}
                texts = numeric_answers(model, tokenizer, task, steering, names, **lengths, on_items=bar.advance)
                observed = _read_numbers(task, texts, tolerance)
            else:
                observed = _score_options(model, tokenizer, task, steering, names, batch_tokens, bar.advance)
        scored = time.perf_counter()
        if steering is not None and neutral:
            effects = side_effects(model, tokenizer, neutral, steering, list(chosen), batch_tokens=batch_tokens)
            for name, (kl, rise) in zip(chosen, effects.mean()):
                about[name] |= {"kl": kl, "rise": rise}
    groups = [item.group for item in task]
    results, between = summarise(observed, [UNSTEERED, *chosen], groups, about)
    return Evaluation(
        task=task.name,
        kind=task.kind,
        source=task.source,
        digest=task.digest(),
        items=len(task),
        groups=len(set(groups)),
        grouped_by=task.grouped_by,
        chat_template=task.chat_template,
        model=name_of(model),
        neutral_texts=len(neutral) if chosen else 0,
        variants=results,
        between=between,
        rows=_rows(task, [UNSTEERED, *chosen], observed),
        seconds={"task": scored - start, "neutral": time.perf_counter() - scored if chosen else 0.0},
    )


def check_options(tokenizer, task: Task) -> None:
    """Raises TaskError if an option has no token of its own, or several where one was promised (kind "choice")."""
    _tokenise(tokenizer, task)


def checked_variants(variants: Mapping[str, Plan | Variant | tuple]) -> dict[str, Variant]:
    """As they will be steered: each with its strength; raises TaskError as :func:`evaluate` does."""
    return {name: _variant(name, given) for name, given in variants.items()}


def _variant(name: str, given: Any) -> Variant:
    found = given if isinstance(given, Variant) else Variant(*given) if isinstance(given, tuple) else Variant(given)
    if not isinstance(name, str) or name == UNSTEERED:
        raise TaskError(f"variant {name!r}: found a name that is no text or is reserved, expected another one")
    if not isinstance(found.plan, Plan):
        raise TaskError(
            f"variant {name!r}: found {type(found.plan).__name__}, expected a plan, (plan, alpha) or (plan, alpha, k)"
        )
    if found.alpha is None:
        if found.plan.evidence is None or found.plan.evidence.alpha is None:
            raise TaskError(
                f"variant {name!r}: found no strength, and the plan's evidence recommends none; give one (alpha, "
                "--alpha), or choose one with austeer tune"
            )
        found = found._replace(alpha=found.plan.evidence.alpha)
    return found


def _about(variant: Variant) -> dict[str, Any]:
    plan, alpha = variant.plan, variant.alpha
    alpha = dict(alpha) if isinstance(alpha, Mapping) else alpha
    return {"operation": plan.operation, "sites": plan.sites, "k": variant.k or len(plan), "alpha": alpha}


def _score_options(
    model: nn.Module,
    tokenizer,
    task: Task,
    steering: Steering | None,
    names: Names,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> Observed:
    correct = torch.zeros(len(names), len(task), dtype=torch.bool, device="cpu")
    exact, margin = correct.clone(), torch.zeros(correct.shape, dtype=torch.float64, device="cpu")
    details: list[list[dict[str, Any]]] = [[{} for _ in task] for _ in names]
    order = sorted(range(len(task)), key=lambda i: len(task[i].prompt))  # of like lengths, so there is little padding
    for first in range(0, len(order), ITEMS):
        numbers = order[first : first + ITEMS]
        part = task.pick(numbers)
        scores = option_scores(model, tokenizer, part, steering, names, batch_tokens=batch_tokens)
        correct[:, numbers], exact[:, numbers] = scores.correct(part), scores.exact(part)
        margin[:, numbers] = scores.margins(part)
        for row, found in zip(details, scores.log_prob.tolist()):
            for number, item, values in zip(numbers, part, found):
                row[number] = {"log_prob": values[: len(item.options)]}
        advance(len(numbers))
    return Observed(correct, exact, margin, details)


def _read_numbers(task: Task, texts: list[list[str]], tolerance: float) -> Observed:
    numbers = [[last_number(text) for text in row] for row in texts]
    right = [
        [equal_numbers(number, item.answer, tolerance) for number, item in zip(row, task)]  # type: ignore[arg-type]
        for row in numbers
    ]
    details = [[{"text": text, "number": n} for text, n in zip(*row)] for row in zip(texts, numbers)]
    return Observed(None, torch.tensor(right, device="cpu"), None, details)


def _rows(task: Task, names: Sequence[str], observed: Observed) -> tuple[dict[str, Any], ...]:
    rows = []
    for i, item in enumerate(task):
        wanted = {"answer": item.answer} if task.kind == "numeric" else {"options": item.options, "label": item.label}
        variants: dict[str, dict[str, Any]] = {}
        for number, name in enumerate(names):
            found = {"exact": bool(observed.exact[number, i]), **observed.details[number][i]}
            if observed.correct is not None and observed.margin is not None:
                found |= {"correct": bool(observed.correct[number, i]), "margin": float(observed.margin[number, i])}
            variants[name] = found
        rows.append({"prompt": item.prompt, "group": item.group, **wanted, "variants": variants})
    return tuple(rows)
