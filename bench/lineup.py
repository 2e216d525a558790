"""Every way to steer on one model, plan and prompt: made, and checked against the formula, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from austeer.errors import AusteerError
from austeer.models.structure import input_device, text_config

from . import footprint, steps
from .catalogue import AGAIN, UNSTEERED
from .gate import Exact, Gate, Outcome
from .plans import spread_plan
from .steered import Steered, UnavailableError, Way, twin

EAGER = steps.EAGER
EXECUTIONS = (EAGER, steps.COMPILE, steps.GRAPH)
MEASURED = "measured"
#: How many tokens of a prompt the gate looks at.
GATE_TOKENS = 12


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        execution: "eager": Transformers' generate; "compile" or "graph": one decoding step with a static cache.
        layers: how many layers have AUs; None: as many as there are, or as k.
    """

    execution: str = EAGER
    batch: int = 1
    site: str = "ffn"
    k: int = 100
    layers: int | None = None
    prompt_tokens: int = 32

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Case:
        """The case of a part of a result file."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        layers = "" if self.layers is None else f", {self.layers} layers"
        return (
            f"{self.execution}, batch {self.batch}, {self.site}, k={self.k}{layers}, "
            f"prompt of {self.prompt_tokens} tokens"
        )

    def check(self, model: nn.Module, tokens: int = steps.ROOM) -> None:
        """
        Args:
            tokens: that are generated after the prompt, at most.

        Raises:
            AusteerError: the model cannot have the case, or the machine cannot run it.
        """
        tokens = max(tokens, steps.ROOM)
        if self.execution not in EXECUTIONS:
            raise AusteerError(f"execution: found {self.execution!r}, expected {', '.join(EXECUTIONS)}")
        if self.execution == steps.GRAPH and input_device(model).type != "cuda":
            raise AusteerError(
                "execution 'graph': found a CPU, expected a GPU; leave it out, or name a GPU with --device"
            )
        if min(self.batch, self.prompt_tokens) < 1:
            raise AusteerError(f"found {self}, expected a batch and a prompt of at least 1")
        longest = getattr(text_config(model), "max_position_embeddings", None) or self.prompt_tokens + tokens
        if self.prompt_tokens + tokens > longest:
            raise AusteerError(
                f"prompt: found {self.prompt_tokens} tokens and {tokens} after them, expected at most {longest} "
                "together (the model)"
            )
        spread_plan(model, self.site, self.k, self.layers)


def prompts(model: nn.Module, batch: int, length: int) -> Callable[[int], Tensor]:
    """Random token numbers [batch, length], the same each time that a number is asked for."""
    device, vocabulary = input_device(model), text_config(model).vocab_size

    def prompt(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number + 1)
        return torch.randint(vocabulary // 8, vocabulary, (batch, length), generator=generator).to(device)

    return prompt


class Lineup:
    """A context in which all ways of a case are ready to run.

    Attributes:
        rows: for every way its ``status`` ("measured", or why not: "skipped", "wrong", "failed"), ``reason``, bytes
            held and errors. made: those that are right. steps: their compiled or captured steps; none in an eager case.
        prompt: the token numbers [batch, prompt] of each generation, by its number; -1 is that of all looks at a way.

    Raises:
        WeakGateError: see :class:`bench.gate.Gate`.
        AusteerError: the unsteered model itself cannot run.
    """

    def __init__(
        self,
        model: nn.Module,
        exact: Exact,
        case: Case,
        ways: Mapping[str, Way],
        tell: Callable[[str], None] = lambda text: None,
    ):
        self.model, self.case, self.ways = model, case, ways
        self.plan = spread_plan(model, case.site, case.k, case.layers)
        self.prompt = prompts(model, case.batch, case.prompt_tokens)
        looked_at = prompts(model, case.batch, min(case.prompt_tokens, GATE_TOKENS))(-2)
        self.gate = Gate(model, exact, self.plan, looked_at)
        self.rows: dict[str, dict[str, Any]] = {}
        self.made: dict[str, Steered] = {}
        self.steps: dict[str, steps.Step] = {}
        try:
            for name, way in ways.items():
                tell(name)
                self._add(name, way)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lineup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes every way off again."""
        for way in self.made.values():
            way.close()
        if self.case.execution == steps.COMPILE:
            torch._dynamo.reset()

    def prefill(self, name: str) -> Any:
        """A pass of a way over the prompt, as :meth:`prompt` of -1; returns the cache. The way is active meanwhile."""
        return self.made[name].model(self.prompt(-1), use_cache=True, logits_to_keep=1).past_key_values

    def decode(self, name: str, cache: Any) -> None:
        """A token a row, after whatever the cache holds."""
        self.made[name].model(self.prompt(-1)[:, :1], past_key_values=cache, use_cache=True)

    def _add(self, name: str, way: Way) -> None:
        row = self.rows[name] = {"status": MEASURED, "reason": "", "ours": way.ours, "peer": way.peer}
        try:
            if self.case.execution != EAGER and not way.module:
                raise UnavailableError("it runs eagerly only")
            with footprint.Held() as held:
                self.made[name] = way.make(twin(self.model), self.plan, self.gate.alpha)
            row["held_bytes"] = held.bytes
            if self.case.execution != EAGER:
                self.steps[name] = steps.Step(self.made[name], self.prompt(-1), self.case.execution)
            row |= self._judged(name)
        except UnavailableError as error:
            row |= {"status": "skipped", "reason": str(error)}
        except Exception as error:  # another library's, say, on a model that it does not know
            if name in (UNSTEERED, AGAIN):
                raise
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        if row["status"] == MEASURED:
            return
        if name in (UNSTEERED, AGAIN):
            raise AusteerError(f"{self.case}: the unsteered model itself is {row['status']}: {row['reason']}")
        self.steps.pop(name, None)
        if name in self.made:
            self.made.pop(name).close()

    def _judged(self, name: str) -> dict[str, Any]:
        """What the gate says of a way, and of its compiled or captured step; of the unsteered model's, that alone."""
        unsteered, step = name in (UNSTEERED, AGAIN), self.steps.get(name)
        if unsteered and step is None:
            return {}
        outcome: Outcome | None = None if unsteered else self.gate(self.made[name])
        if step is not None and (outcome is None or not outcome.reason):
            outcome = self.gate.judge_step(step.run(), torch.cat([self.prompt(-1), step.token], 1), unsteered)
        assert outcome is not None
        found = {"error": outcome.error, "allowed": outcome.allowed, "effect": outcome.effect}
        return found | ({"status": "wrong", "reason": outcome.reason} if outcome.reason else {})
