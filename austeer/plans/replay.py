"""Replay: what a model writes after a few prompts, with a plan and without, for others to compare themselves with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import PlanError
from ..utils.files import parse_json
from .evidence import check_finite, check_text

#: The hypotheses that every replay has: what a server does that runs the plan, and one that ignores it.
APPLIED, NOT_APPLIED = "applied", "not applied"

#: One token that was written: the likeliest tokens of the vocabulary with log p of each; the first was taken.
Step = tuple[tuple[int, float], ...]
#: What was written after one prompt, greedily.
Answer = tuple[Step, ...]

#: A replay as JSON, in bytes, and its parts.
LARGEST_REPLAY, MOST_PROMPTS, MOST_HYPOTHESES, LONGEST_PROMPT = 50_000, 16, 16, 1000
#: Token ids and layers beyond it are none.
LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, and as the token ids that the model was given."""

    text: str
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not 0 < len(self.text) <= LONGEST_PROMPT:
            raise PlanError(f"replay: found the prompt {str(self.text)[:40]!r}, expected 1 to {LONGEST_PROMPT} letters")
        _check_numbers("token ids", self.ids)


@dataclass(frozen=True)
class Replay:
    """What one model wrote with a plan at one strength, and under other hypotheses of what a server may do.

    Attributes:
        digest: of the plan (``Plan.digest``). operation: its. k: how many AUs it has. layers: of each site, by name.
        alpha: the strength; a number, or one for each of the plan's sites. scope: which tokens were steered, as
            :func:`austeer.steer` takes it. dtype: of the model.
        prompts: what was continued.
        answers: for each hypothesis what was written after each prompt: ``APPLIED``, ``NOT_APPLIED``, and faults.
        texts: the tokens that occur, for servers that give no ids.

    Raises:
        PlanError: something that is no replay, or more than a plan is to carry.
    """

    digest: str
    operation: str
    k: int
    layers: dict[str, tuple[int, ...]]
    alpha: float | dict[str, float]
    scope: str | tuple[int, int | None]
    dtype: str
    prompts: tuple[Prompt, ...]
    answers: dict[str, tuple[Answer, ...]]
    texts: dict[int, str]

    def __post_init__(self) -> None:
        for name in ("digest", "operation", "dtype"):
            check_text(f"replay: {name}", getattr(self, name), 64)
        _check_numbers("k", (self.k,), least=1)
        for site, layers in _mapping("layers", self.layers).items():
            check_text("replay: site", site, 64)
            _check_numbers("layers", layers)
        object.__setattr__(self, "alpha", _alpha(self.alpha))
        _check_scope(self.scope)
        if not 1 <= len(self.prompts) <= MOST_PROMPTS:
            raise PlanError(f"replay: found {len(self.prompts)} prompts, expected 1 to {MOST_PROMPTS}")
        answers = _mapping("answers", self.answers)
        if not {APPLIED, NOT_APPLIED} <= set(answers) or len(answers) > MOST_HYPOTHESES:
            raise PlanError(
                f"replay: found the hypotheses {sorted(map(str, answers))[:MOST_HYPOTHESES]}, expected "
                f"{APPLIED!r}, {NOT_APPLIED!r} and at most {MOST_HYPOTHESES - 2} more"
            )
        for name, rows in answers.items():
            check_text("replay: hypothesis", name, 40)
            if len(rows) != len(self.prompts) or not all(map(_is_answer, rows)):
                raise PlanError(f"replay: found no answers of log-probabilities to all prompts under {name!r}")
        _check_numbers("tokens", tuple(_mapping("texts", self.texts)))
        if not all(isinstance(text, str) for text in self.texts.values()):
            raise PlanError("replay: found a token that is no text")
        size = len(json.dumps(self.to_json()))
        if size > LARGEST_REPLAY:
            raise PlanError(f"replay: found {size} bytes, expected at most {LARGEST_REPLAY}; take fewer prompts")

    @property
    def tokens(self) -> int:
        """How many were written with the plan, after all prompts."""
        return sum(map(len, self.answers[APPLIED]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Replay:
        """Raises PlanError, TypeError, ValueError, KeyError or AttributeError where ``data`` is no replay."""
        rest = dict(data)
        layers = {site: tuple(layers) for site, layers in rest.pop("layers").items()}
        scope = rest.pop("scope")
        prompts = tuple(Prompt(row["text"], tuple(row["ids"])) for row in rest.pop("prompts"))
        answers = {
            name: tuple(tuple(tuple((i, lp) for i, lp in step) for step in answer) for answer in rows)
            for name, rows in rest.pop("answers").items()
        }
        texts = {int(token): text for token, text in rest.pop("texts").items()}
        scope = tuple(scope) if isinstance(scope, list) else scope
        return cls(layers=layers, scope=scope, prompts=prompts, answers=answers, texts=texts, **rest)


def read_replay(text: str, where: str) -> Replay:
    """A replay from a file of its own, or from metadata.

    Args:
        where: what the error calls it.

    Raises:
        PlanError: it is none.
    """
    try:
        return Replay.from_json(parse_json(text))
    except (PlanError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise PlanError(f"{where}: damaged or not a replay ({error}); export it anew") from error


def _alpha(alpha: object) -> float | dict[str, float]:
    if not isinstance(alpha, Mapping):
        return check_finite("replay: alpha", alpha)
    found = {check_text("replay: site", site): check_finite("replay: alpha", one) for site, one in alpha.items()}
    return _mapping("alpha", found)


def _mapping(name: str, value: object) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise PlanError(f"replay: {name}: found {type(value).__name__}, expected a dictionary that is not empty")
    return value


def _check_numbers(name: str, values: object, least: int = 0) -> None:
    if not isinstance(values, tuple) or not values:
        raise PlanError(f"replay: {name}: found {values!r:.40}, expected a tuple of integers")
    for value in values:
        if type(value) is not int or not least <= value <= LARGEST_INT:
            raise PlanError(f"replay: {name}: found {value!r:.40}, expected integers from {least} to {LARGEST_INT}")


def _check_scope(scope: object) -> None:
    if isinstance(scope, str):
        check_text("replay: scope", scope, 64)
    elif not isinstance(scope, tuple) or len(scope) != 2:
        raise PlanError(f"replay: scope: found {scope!r:.40}, expected a name, or a first token and one after the last")
    else:
        _check_numbers("scope", tuple(end for end in scope if end is not None))


def _is_answer(answer: object) -> bool:
    return isinstance(answer, tuple) and bool(answer) and all(map(_is_step, answer))


def _is_step(step: object) -> bool:
    return (
        isinstance(step, tuple)
        and bool(step)
        and len({token for token, _ in step}) == len(step)
        and all(type(token) is int and 0 <= token <= LARGEST_INT for token, _ in step)
        and all(type(lp) is float and math.isfinite(lp) and lp <= 0 for _, lp in step)
    )
