"""No time without a right result: what every way makes of the steered tensor, in each layer, against the formula.

What enters a site's module and what leaves it are recorded in the way's own passes. From what entered, the unsteered
output is computed again with the model's own weights, one precision higher where a linear layer makes or reads the
tensor; the formula applied to it must be what left. So nothing is looked at through the rest of a network, which hides
some AUs (norms after them) and magnifies rounding (routers of mixtures, tens of random layers).
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from austeer import Plan
from austeer.errors import AusteerError
from austeer.models.projection import why_not_the_projection
from austeer.models.sites import Site, find_sites
from austeer.models.structure import base_of, first_tensor

from .plain_ways import Formula, Strength, strengths
from .steered import Steered, twin

#: How far a value may lie off: this share of what steering does to it, and so many roundings of the values involved;
#: in float32 as much as its sums over thousands of terms may differ.
SHARE, ROUNDINGS, LEAST = 0.02, 2.0, 1e-4
#: A value counts as at least so many medians of all values.
TYPICAL = 3.0
#: alpha is doubled until, in each layer, half of what is steered changes by this many times as much as it may err by.
CLEAR = 8.0
MOST_ALPHA = 2.0**14
#: How many tokens are generated to look at: a pass over the prompt, then tokens one by one.
TOKENS = 3
#: Logits of a timed step may differ from those of the step looked at by this share of what another model's differ by.
NEAR = 0.25


class WeakGateError(AusteerError):
    """At no alpha does steering change the tensor enough to tell right results from wrong ones."""


@dataclass(frozen=True)
class Outcome:
    """What the gate found.

    Attributes:
        error, allowed: of the value that lies furthest off, for what it may. effect: what steering does to a value, the
            median. clear: whether that is far more than what is allowed, in every layer.
        reason: what is wrong; empty if nothing is.
    """

    error: float
    allowed: float
    effect: float
    clear: bool
    reason: str


@dataclass
class Seen:
    """What passed a layer's site, pass by pass: arguments of the module that makes or reads the tensor, and outputs."""

    entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)

    def enter(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        # Copies, since what follows may be in place.
        self.entered.append(tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, options)))

    def enter_layer(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Of a layer's arguments only the hidden states: all else is made anew for it."""
        self.enter((_tensor(args, options),), {})

    def leave(self, result: Any) -> None:
        self.left.append(first_tensor(result).clone())


@contextmanager
def watched(
    hooks: Sequence[tuple[nn.Module, Callable[..., Any] | None, Callable[[Any], None] | None]],
) -> Iterator[None]:
    """Hooks before all others and after all others of each module, also those that are put on later.

    Args:
        hooks: modules; what is given (args, options) of a call, and may return others; what is given its result.
    """
    handles: list[Any] = []
    for module, entering, leaving in hooks:
        last: int | None = None
        if leaving is not None:
            handles.append(module.register_forward_hook(lambda *call, see=leaving: see(call[-1])))
            last = handles[-1].id

        def enter(module: nn.Module, args: Any, options: Any, entering=entering, last=last) -> Any:
            if last is not None and not torch.compiler.is_compiling():
                module._forward_hooks.move_to_end(last)  # type: ignore[attr-defined]
            return None if entering is None else entering(args, options)

        handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Gate:
    """What a plan is to do to a model, and how near to it a way has to come.

    Args:
        ids: [batch, tokens], the prompt to look at.

    Attributes:
        alpha: the strength, found so that an unsteered model fails clearly.

    Raises:
        WeakGateError: there is none.
    """

    def __init__(self, model: nn.Module, plan: Plan, ids: Tensor):
        self._model, self._plan, self.ids = model, plan, ids
        self._sites = find_sites(model, plan.sites)[plan.sites[0]]
        self._sources = [self._source(site) for site in self._sites]
        unsteered = Steered(twin(model))
        with self.watching(unsteered.model) as seen:
            generated = self._generate(unsteered)
        self.alpha = 1.0
        while self.alpha <= MOST_ALPHA:
            self._strengths = list(strengths(model, plan, self.alpha))
            # First what costs no further passes; then the formula itself, whose inputs are steered ones.
            if self.judge(seen, generated).clear:
                outcome = self(Formula(twin(model), plan, self.alpha))
                if outcome.clear and not outcome.reason:
                    return
            self.alpha *= 2
        raise WeakGateError(
            f"steering {len(plan)} AUs of {plan.sites[0]!r} up to alpha {MOST_ALPHA:g}: found that it changes the "
            "tensor by less than rounding in some layer, expected more: right results cannot be told from wrong ones; "
            "give more AUs or a wider dtype"
        )

    def _source(self, site: Site) -> str:
        """The path of what makes or reads the tensor: its one projection, or the site's module as a whole."""
        if site.projection is None or why_not_the_projection(self._model, site) is not None:
            return site.path
        return site.projection

    def __call__(self, steered: Steered) -> Outcome:
        """Looks at a way's own generation: at all positions of the prompt, then token by token."""
        with self.watching(steered.model) as seen:
            generated = self._generate(steered)
        if generated.shape[1] != self.ids.shape[1] + TOKENS:
            length = generated.shape[1] - self.ids.shape[1]
            return self._wrong(f"generates {length} tokens, expected {TOKENS}")
        return self.judge(seen, generated)

    @torch.no_grad()
    def _generate(self, steered: Steered) -> Tensor:
        with steered.active():
            return steered.generate(self.ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[list[Seen]]:
        """Records what passes the sites of a way's model: one :class:`Seen` a layer."""
        root, found = base_of(model), [Seen() for _ in self._sites]
        hooks: list[tuple[nn.Module, Any, Any]] = []
        for site, source, seen in zip(self._sites, self._sources, found):
            hooks.append((root.get_submodule(source), seen.enter if site.name != "layer" else seen.enter_layer, None))
            hooks.append((root.get_submodule(site.path), None, seen.leave))
        with watched(hooks):
            yield found

    @torch.no_grad()
    def judge(self, seen: Sequence[Seen], ids: Tensor) -> Outcome:
        """Holds what was recorded against the formula.

        Args:
            ids: [batch, tokens], those of the recorded passes, one after another.
        """
        rows = ids.shape[0]
        for site, one in zip(self._sites, seen):
            tokens = sum(y.numel() // y.shape[-1] for y in one.left) // rows
            if len(one.entered) != len(one.left) or tokens not in (ids.shape[1], ids.shape[1] - 1):
                return self._wrong(f"runs {tokens} tokens through {site.path}, expected {ids.shape[1]} or one less")
        outputs = self._forced([one.entered for one in seen], ids) if self._plan.sites == ("layer",) else None
        layers = []
        for number, (strength, source, one) in enumerate(zip(self._strengths, self._sources, seen)):
            plain, exact = self._expected(strength, source, one, None if outputs is None else outputs[number])
            layers.append(_compared(strength, plain, exact, _flat(one.left)))
        worst = max(layers, key=lambda layer: layer.share)
        steered = [layer for layer, strength in zip(layers, self._strengths) if len(strength.index)]
        effect, clear = statistics.median(layer.effect for layer in steered), all(layer.clear for layer in steered)
        reason = ""
        if worst.share > 1:
            reason = (
                f"{worst.where} differs from the formula by {worst.error:.2g} (steering does {effect:.2g} at a value)"
            )
            reason += f", expected at most {worst.allowed:.2g}"
        return Outcome(worst.error, worst.allowed, effect, clear, reason)

    def _wrong(self, reason: str) -> Outcome:
        return Outcome(float("inf"), 0.0, 0.0, True, reason)

    def _expected(
        self, strength: Strength, source: str, seen: Seen, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """What has to leave the site's module unsteered, and steered; [tokens, width of the output], at least float32.

        Args:
            outputs: unsteered ones of a whole layer, pass by pass.
        """
        module = self._model.get_submodule(source)
        wide = torch.float64 if next(module.parameters()).dtype == torch.float32 else torch.float32
        if outputs is None and next(module.children(), None) is None:  # a projection
            module = copy.deepcopy(module).to(wide)
            x = _flat([_tensor(*one) for one in seen.entered]).to(wide)
            plain = module(x)
            at_input = strength.site.side == "input"
            return plain, module(strength.formula(x)) if at_input else strength.formula(plain)
        if outputs is None:  # a mixture: in its own precision and in the same shapes its router chooses the same
            outputs = [first_tensor(module(*args, **options)) for args, options in seen.entered]
        plain = _flat(outputs).to(wide)
        return plain, strength.formula(plain)

    def _forced(self, entered: Sequence[Sequence[tuple[Any, Any]]], ids: Tensor) -> list[list[Tensor]]:
        """What the model's layers give of recorded inputs: it runs on these tokens, each layer on what was recorded.

        Returns:
            By layer and pass.
        """
        outputs: list[list[Tensor]] = [[] for _ in entered]
        cache, begin = None, 0
        for number, (args, _) in enumerate(entered[0]):
            end = begin + args[0].shape[1]
            hooks: list[tuple[nn.Module, Any, Any]] = []
            for path, of_layer, made in zip(self._sources, entered, outputs):
                (x,) = of_layer[number][0]
                hooks.append((self._model.get_submodule(path), functools.partial(_replaced, x), made.append))
            with watched(hooks):
                cache = self._model(ids[:, begin:end], past_key_values=cache, use_cache=True).past_key_values
            begin = end
        return [[first_tensor(result) for result in made] for made in outputs]


@dataclass(frozen=True)
class Compared:
    """One layer's tensor beside the formula's.

    Attributes:
        share: the largest error, of what is allowed at that value; infinite beyond it. error, allowed, where: there.
        effect: the median of what steering changes. clear: whether half of that is far more than allowed.
    """

    share: float
    error: float
    allowed: float
    where: str
    effect: float
    clear: bool


def _compared(strength: Strength, plain: Tensor, exact: Tensor, found: Tensor) -> Compared:
    """Of [tokens, width] each: unsteered and steered ones as they should be, and what was found."""
    effect = (exact - plain).abs()
    steered = effect[effect != 0]
    median = float(steered.median()) if len(steered) else 0.0
    # Terms of a sum may be so large where the sum is not.
    typical = TYPICAL * (plain.abs().median() + median)
    rounding = max(ROUNDINGS * torch.finfo(found.dtype).eps, LEAST)
    allowed = SHARE * effect + rounding * (plain.abs() + effect + typical)
    error = (found.to(exact.dtype) - exact).abs()
    share = torch.where(error <= allowed, error / allowed.clamp_min(1e-30), torch.inf)  # of NaN, too
    place = int(share.argmax())
    where = f"layer {strength.site.layer}, {strength.site.name}, value {place % exact.shape[1]}"
    clear = len(steered) > 0 and float((effect > CLEAR * allowed)[effect != 0].float().mean()) >= 0.5
    return Compared(*(float(t.flatten()[place]) for t in (share, error, allowed)), where, median, clear)


def _replaced(x: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x, *args[1:]), options) if args else (args, options | {"hidden_states": x})


def _tensor(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    return next(t for t in (*args, *options.values()) if isinstance(t, Tensor))


def _flat(passes: Sequence[Tensor]) -> Tensor:
    """[tokens, width]."""
    return torch.cat([t.flatten(0, -2) for t in passes])


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def why_not_near(found: Tensor, expected: Tensor, other: Tensor) -> str:
    """The reason why the logits of a step are not those expected, or "".

    Args:
        other: those of another model, or 0, for a measure of what counts as far.
    """
    error, allowed = rms(found - expected), NEAR * rms(other - expected)
    if error <= allowed:  # false for NaN
        return ""
    return f"logits of a step differ from those of the step looked at by {error:.2g}, expected at most {allowed:.2g}"
