"""Every way to steer on one model, plan and prompt: made, and checked against the formula, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from austeer import Plan
from austeer.errors import AusteerError
from austeer.models.structure import input_device, text_config

from . import footprint, steps
from .catalogue import AGAIN, UNSTEERED
from .gate import Gate, Seen, why_not_near
from .plans import spread_plan
from .steered import Steered, UnavailableError, Way, twin

EAGER = steps.EAGER
EXECUTIONS = (EAGER, steps.COMPILE, steps.GRAPH)
MEASURED = "measured"


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        execution: "eager": Transformers' generate; "compile" or "graph": one decoding step with a static cache.
        operation: "scale", "push" or "shift".
        layers: how many layers have AUs; None: as many as there are, or as k.
    """

    execution: str = EAGER
    batch: int = 1
    site: str = "ffn"
    operation: str = "scale"
    k: int = 100
    layers: int | None = None
    prompt_tokens: int = 32

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Case:
        """The case of a part of a result file; in the first ones all are of the operation "scale"."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name in content})

    def __str__(self) -> str:
        layers = "" if self.layers is None else f", {self.layers} layers"
        return (
            f"{self.execution}, batch {self.batch}, {self.site}, {self.operation}, k={self.k}{layers}, "
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
        self.plan(model)

    def plan(self, model: nn.Module) -> Plan:
        """Raises PlanError where the model has no such one."""
        return spread_plan(model, self.site, self.k, self.layers, operation=self.operation)


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
        case: Case,
        ways: Mapping[str, Way],
        tell: Callable[[str], None] = lambda text: None,
    ):
        self.model, self.case, self.ways = model, case, ways
        self.plan = case.plan(model)
        self.prompt = prompts(model, case.batch, case.prompt_tokens)
        self.gate = Gate(model, self.plan, self.prompt(-1))
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
            if name in (UNSTEERED, AGAIN):
                row |= self._unsteered(name)
            else:
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

    def _step(self, name: str) -> steps.Step:
        return steps.Step(self.made[name], self.prompt(-1), self.case.execution)

    def _unsteered(self, name: str) -> dict[str, Any]:
        """The model itself; its compiled or captured step must give about what it gives in eager mode."""
        if self.case.execution == EAGER:
            return {}
        step = self.steps[name] = self._step(name)
        with torch.no_grad():
            expected = self.made[name].logits(torch.cat([self.prompt(-1), step.token], 1))[:, -1]
        reason = why_not_near(step.run(), expected, torch.zeros_like(expected))
        return {"status": "wrong", "reason": reason} if reason else {}

    def _judged(self, name: str) -> dict[str, Any]:
        """What the gate says of a way, and of its step: of one that is compiled or captured with the gate looking on.

        The step that is timed must give the same logits as that one.
        """
        outcome, reason = self.gate(self.made[name]), ""
        if self.case.execution != EAGER and not outcome.reason:
            with self.gate.watching(self.made[name].model) as seen:
                looked_at = self._step(name)
                logits = looked_at.run()
            passes = [Seen(one.entered[:1] + one.entered[-1:], one.left[:1] + one.left[-1:]) for one in seen]
            outcome = self.gate.judge(passes, torch.cat([self.prompt(-1), looked_at.token], 1))
            del looked_at, seen, passes  # a graph's memory
            step = self.steps[name] = self._step(name)
            reason = why_not_near(step.run(), logits, self.steps[UNSTEERED].run())
        reason = outcome.reason or reason
        found = {"error": outcome.error, "allowed": outcome.allowed, "effect": outcome.effect}
        return found | ({"status": "wrong", "reason": reason} if reason else {})
