"""record_replay(): a plan's replay, with the log-probabilities of common faults."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import PlanError, SteeringError, SteeringWarning
from ..forward.neutral import neutral_texts
from ..forward.tokens import check_vocabulary, encode
from ..models.sites import find_sites
from ..models.structure import floating_dtype, is_steered, vocabulary_size
from ..plans.plan import Plan
from ..plans.replay import APPLIED, LARGEST_REPLAY, MOST_PROMPTS, NOT_APPLIED, Answer, Prompt, Replay
from ..steering.scope import parse_scope
from ..steering.steer import steer
from ..steering.strength import Strength
from ..utils.progress import Progress
from .writing import written

#: The prompts: how many of the packaged neutral texts, and how many words of each.
PROMPTS, WORDS = 6, 8

#: What is wrong with a server, by what a replay calls it: strengths times so much, and layers so far away.
STRENGTHS = {"sign flipped": -1.0, "half strength": 0.5, "double strength": 2.0}
LAYERS = {"layers + 1": 1, "layers - 1": -1}
SCOPES = {"all tokens": "all", "prompt only": "prompt", "generation only": "generation"}

Alpha = float | Mapping[str, float]
Scope = str | tuple[int, int | None]
#: Plan, strength and scope under a hypothesis.
Case = tuple[Plan, Alpha, Scope]


def record_replay(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    alpha: Alpha | None = None,
    *,
    scope: Scope = "all",
    prompts: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Plan:
    """The plan with a replay: what the model writes with it and without, for :func:`austeer.verify` to compare.

    The replay also has what the model would write if a server steered the layer above or below, the other way, half or
    twice as strongly, or other tokens, so that these faults can be told from each other. It goes into the plan's file,
    and with an export of the plan at this strength.

    Example:
        >>> plan = austeer.record_replay(model, tokenizer, plan, alpha=8)
        >>> list(plan.replay.answers)[:4]
        ['not applied', 'applied', 'layers + 1', 'layers - 1']

    Args:
        model: a causal language model, not steered; in float32 the replay is as sharp as it can be.
        tokenizer: the model's.
        plan: of which the whole is steered; for the first AUs alone give ``plan.top(k)``.
        alpha: the strength; by default the one that the plan's evidence recommends, or 1.
        scope: the tokens to steer, as in :func:`austeer.steer`. An adapter or a folded checkpoint steers all.
        prompts: what is continued, a list of texts; by default the beginnings of six of the packaged neutral texts.
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Raises:
        PlanError: the plan is for another model, prompts that are no list of texts, or so many that the replay would be
            larger than a plan is to carry.
        SteeringError: an alpha that is 0 or no number, no such scope or an answer's, or a model that is steered now.
        PairsError: another model's tokenizer.
    """
    if is_steered(model):
        raise SteeringError("model: found one that is steered now, expected a plain one; record outside the with block")
    if not isinstance(plan, Plan):
        raise PlanError(f"plan: found {type(plan).__name__}, expected an austeer.Plan")
    if alpha is None:
        alpha = 1.0 if plan.evidence is None or plan.evidence.alpha is None else plan.evidence.alpha
    if parse_scope(scope).answer is not None:
        raise SteeringError("scope: found an answer's markers, expected a name or a range of tokens")
    Strength({"": plan}, False).set_alpha(alpha)
    texts = _texts(prompts)
    ids = encode(tokenizer, texts)
    check_vocabulary(vocabulary_size(model), ids)
    given = tuple(Prompt(text, tuple(row)) for text, row in zip(texts, ids))
    answers: dict[str, tuple[Answer, ...]] = {}
    cases = _hypotheses(model, plan, alpha, scope)
    with Progress("recording", len(cases), "hypotheses", progress) as bar:
        for hypothesis, case in cases.items():
            found = _written(model, ids, hypothesis, case)
            if found is not None:
                answers[hypothesis] = found
                _check_size(answers, _texts_of(tokenizer, answers), len(cases), len(texts))
            elif hypothesis in (APPLIED, NOT_APPLIED):
                raise PlanError(
                    f"replay: found log-probabilities that are no numbers ({hypothesis}, alpha {alpha!r}), expected "
                    "finite ones; take a smaller alpha"
                )
            bar.advance()
    replay = Replay(
        digest=plan.digest,
        operation=plan.operation,
        k=len(plan),
        layers={site: tuple(plan.layer[plan.of(site)].unique().tolist()) for site in plan.sites},
        alpha=dict(alpha) if isinstance(alpha, Mapping) else alpha,
        scope=tuple(scope) if isinstance(scope, list) else scope,
        dtype=str(floating_dtype(model)).removeprefix("torch."),
        prompts=given,
        answers=answers,
        texts=_texts_of(tokenizer, answers),
    )
    return plan.with_replay(replay)


def _texts_of(tokenizer: Any, answers: Mapping[str, tuple[Answer, ...]]) -> dict[int, str]:
    """The texts of all tokens that occur."""
    tokens = {token for rows in answers.values() for row in rows for step in row for token, _ in step}
    return {token: _text(tokenizer, token) for token in sorted(tokens)}


def _text(tokenizer: Any, token: int) -> str:
    """A token as servers show it, with the blank before a word that some tokenizers leave out of a text's beginning."""
    text = tokenizer.decode([token])
    blank = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not text.startswith(" ")
    return f" {text}" if blank else text


def _texts(prompts: Sequence[str] | None) -> list[str]:
    if prompts is None:
        return [" ".join(text.split()[:WORDS]) for text in neutral_texts()[:PROMPTS]]
    listed = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not listed or not all(isinstance(text, str) for text in prompts):
        raise PlanError(f"prompts: found {prompts!r:.60}, expected a list of texts")
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise PlanError(f"prompts: found {len(prompts)}, expected 1 to {MOST_PROMPTS}")
    return list(prompts)


def _check_size(answers: Mapping[str, tuple[Answer, ...]], texts: Mapping[int, str], cases: int, prompts: int) -> None:
    """Raises PlanError where the replay would be too large with the hypotheses that are left: they need not run."""
    size = len(json.dumps(answers)) // len(answers) * cases + len(json.dumps(texts))
    if size > LARGEST_REPLAY:
        raise PlanError(
            f"prompts: found {prompts}, of which the replay would have {size} bytes or more, expected at most "
            f"{LARGEST_REPLAY}; take {prompts * LARGEST_REPLAY // size} or fewer"
        )


def _written(
    model: nn.Module, ids: Sequence[Sequence[int]], hypothesis: str, case: Case | None
) -> tuple[Answer, ...] | None:
    """What the model writes under a hypothesis; None: no numbers, or a fault that cannot be put on the model."""
    try:
        with _steered(model, case):
            return written(model, ids)
    except SteeringError:  # twice the strength may be too much where the strength itself is not
        if hypothesis in (APPLIED, NOT_APPLIED):
            raise
        return None


@contextmanager
def _steered(model: nn.Module, case: Case | None) -> Iterator[None]:
    """The model under a hypothesis, without what :func:`steer` warns of: of a fault it may be right."""
    if case is None:
        yield
        return
    plan, alpha, scope = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteeringWarning)
        with steer(model, plan, alpha, scope=scope):
            yield


def _hypotheses(model: nn.Module, plan: Plan, alpha: Alpha, scope: Scope) -> dict[str, Case | None]:
    """What is steered under each hypothesis; None: nothing."""
    by_site = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(plan.sites, alpha)
    if not any(by_site.values()):
        raise SteeringError("alpha: found 0, expected a strength that changes something")
    cases: dict[str, Case | None] = {NOT_APPLIED: None, APPLIED: (plan, alpha, scope)}
    for name, by in LAYERS.items():
        moved = _moved(model, plan, by)
        if moved is not None:
            cases[name] = (moved, {site: by_site[site] for site in moved.sites}, scope)
    for name, factor in STRENGTHS.items():
        cases[name] = (plan, {site: factor * value for site, value in by_site.items()}, scope)
    return cases | {name: (plan, alpha, other) for name, other in SCOPES.items() if other != scope}


def _moved(model: nn.Module, plan: Plan, by: int) -> Plan | None:
    """The plan with each AU in another layer, without those of which there is no such layer; None: none is left."""
    there = {(name, site.layer) for name, sites in find_sites(model, plan.sites).items() for site in sites}
    left = [i for i, (site, layer, _) in enumerate(plan.keys()) if (site, layer + by) in there]
    if not left:
        return None
    plan = plan.take(torch.tensor(left, device="cpu"))
    return replace(plan, layer=plan.layer + by, evidence=None, dose=None, replay=None)
