"""Whether a plan is wanted, row by row: a probe reads one layer at each prompt's last token, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SteeringError
from ..models.patches import Patch
from ..models.sites import Site
from ..models.structure import first_tensor
from ..models.tensor_parallel import held
from ..plans.probe import Probe


@dataclass(frozen=True)
class WhenReport:
    """What a probe decided.

    Attributes:
        decided: rows whose prompts it judged; of beams and return sequences each one. fired: those that plans run on.
        scores: of the last batch, a row each. threshold: above which it fires.
    """

    decided: int
    fired: int
    scores: tuple[float, ...]
    threshold: float

    def __str__(self) -> str:
        shown = ", ".join(f"{score:.4g}" for score in self.scores[:8]) + (" ..." if len(self.scores) > 8 else "")
        return f"when: fired for {self.fired} of {self.decided} rows (above {self.threshold:.4g}; last: {shown})"


class Deciding:
    """The decisions on the rows of the batch at hand.

    Args:
        site: the probe's, on this model. device: where the model takes its tokens.

    Raises:
        SteeringError: the model is split over processes, and the site with it.
    """

    def __init__(self, probe: Probe, model: nn.Module, site: Site, device: torch.device):
        if held(model, site) is not None:
            raise SteeringError(
                f"when: site {site.name!r} of layer {site.layer} ({site.path}): found a slice of it in this process, "
                "expected the whole; fit a probe at 'layer' or 'ffn'"
            )
        self.probe, self._site, self._device = probe, site, device
        self._patch = Patch(model.get_submodule(site.path))
        self._direction = probe.direction
        self._due: tuple[Tensor, int, Any] | None = None  # last tokens, columns, whether the prompts end in this pass
        self._fires: Tensor | None = None  # bool [batch]
        self._scores: Tensor | None = None  # float32 [batch]
        self._counts: Tensor | None = None  # int64 [2], decided and fired
        self._done = False  # whether the prompts at hand are judged, as far as the host knows
        self._generating = 0  # how many generate run, one inside another

    def attach(self) -> None:
        with torch.inference_mode(False):  # inference tensors could not be refilled outside of that mode
            self._direction = self.probe.direction.to(self._device)
            self._counts = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._due = self._fires = self._scores = None
        self._done, self._generating = False, 0
        self._patch.attach(self._at_input if self._site.side == "input" else self._at_output)

    def detach(self) -> None:
        self._due = None
        self._patch.detach()

    def report(self) -> WhenReport:
        """What was decided since steering began."""
        decided, fired = (0, 0) if self._counts is None else self._counts.tolist()
        scores = () if self._scores is None else tuple(self._scores.tolist())
        return WhenReport(decided, fired, scores, self.probe.threshold)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """A ``generate`` runs in the block, with prompts of its own."""
        around = self._fires, self._scores, self._done  # of a generate inside of which this one runs
        self._fires, self._scores, self._done = None, None, False
        self._generating += 1
        try:
            yield
        finally:
            self._generating -= 1
            if self._generating:
                self._fires, self._scores, self._done = around

    # --- a forward pass ----------------------------------------------------------------------------------------------

    def begin(self, batch: int, length: int, past, end, stop, after) -> None:
        """A pass begins.

        Args:
            past: columns in the cache. end: the prompt's, padding included; None: this pass has none of it. Integers,
                or tensors where only the device knows.
            stop, after: where each row's last token so far is: so many columns, [batch] or 0, before this one.

        Raises:
            SteeringError: generated tokens come before their prompt was judged.
        """
        self._due = None
        known = isinstance(past, int) and isinstance(end, int)
        judged = self._fires is not None and self._fires.shape[0] == batch
        if end is None or (known and past >= end):
            if not judged:
                self._refuse(f"a batch of {batch} rows that goes on from prompts which no probe has judged")
            return
        if known and end < past + length:
            if not (judged and self._done and self._generating):
                self._refuse("a prompt together with tokens after it (drafted ones?) in one forward pass")
            return  # run once more, without a cache
        if not judged:
            with torch.inference_mode(False):
                self._fires = torch.zeros(batch, dtype=torch.bool, device=self._device)
                self._scores = torch.zeros(batch, dtype=torch.float32, device=self._device)
        last = _on(stop, self._device) - _on(after, self._device) - 1 - _on(past, self._device)
        if not isinstance(last, Tensor):
            last = torch.full((), last, dtype=torch.int64, device=self._device)
        ends = _on(past, self._device) + length >= _on(end, self._device)
        if not known:
            ends = ends & (_on(past, self._device) < _on(end, self._device))
        self._due = last.expand(batch), length, ends
        if known:
            self._done = ends

    def ends(self) -> None:
        """The pass has ended: a layer that is called by itself is not judged."""
        self._due = None

    @property
    def fires(self) -> Tensor | None:
        """bool [batch, 1], the rows on which plans run; None before the first prompt."""
        return None if self._fires is None else self._fires[:, None]

    def _refuse(self, found: str) -> None:
        raise SteeringError(
            f"when: found {found}, expected each prompt to run inside this block, before what follows it: its last "
            "token decides; use generate without an assistant and prompt lookup, or set steering.prompt_length and run "
            "the prompt first"
        )

    # --- the module's forward ----------------------------------------------------------------------------------------

    def _at_input(self, *args, **kwargs):
        self._read(args[0] if args else next(iter(kwargs.values())))
        return self._patch.inner(*args, **kwargs)

    def _at_output(self, *args, **kwargs):
        output = self._patch.inner(*args, **kwargs)
        self._read(first_tensor(output))
        return output

    def _read(self, x: Tensor) -> None:
        """Judges the rows of a pass whose last prompt token it holds. The prompt is not steered, so ``x`` is not."""
        if self._due is None:
            return
        (last, length, ends), fires, scores, counts = self._due, self._fires, self._scores, self._counts
        assert fires is not None and scores is not None and counts is not None
        if x.numel() != len(last) * length * len(self.probe.direction):
            raise SteeringError(
                f"when: site {self._site.name!r} of layer {self._site.layer}: found a tensor {list(x.shape)} in a pass "
                f"of {len(last)} rows of {length} tokens, {len(self.probe.direction)} wide, expected one of those sizes"
            )
        if self._direction.device != x.device:
            self._direction = self._direction.to(x.device)
        inside = (last >= 0) & (last < length)
        row = torch.arange(len(last), device=x.device)
        at = x.detach().reshape(len(last), length, -1)[row, last.clamp(0, length - 1).to(x.device)]
        score = (at.float() * self._direction).sum(-1).to(fires.device)
        new = score > self.probe.threshold
        fires.copy_(torch.where(inside, new, fires))
        scores.copy_(torch.where(inside, score, scores))
        counts.add_(torch.stack([torch.full_like(counts[0], len(last)), fires.sum()]) * ends)


def _on(n, device: torch.device):
    return n.to(device) if isinstance(n, Tensor) else n
