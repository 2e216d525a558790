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
from ..models.sites import Layout, Site, find_sites, site_at
from ..models.structure import first_tensor
from ..models.tensor_parallel import held
from ..plans.probe import Probe


@dataclass(frozen=True)
class WhenReport:
    """What a probe decided.

    Attributes:
        decided: rows whose prompts it judged; of beams and return sequences each one. fired: those on which it fired,
            also where :meth:`austeer.Steering.rows` gives them no plan.
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
        layout: of a model whose family is not known. device: where the model takes its tokens.

    Raises:
        PlanError: the probe is for another model. SiteError: the model lacks its site.
        SteeringError: the model is split over processes, and the site with it.
    """

    def __init__(self, probe: Probe, model: nn.Module, layout: Layout | None, device: torch.device):
        self.probe, self._model, self._layout, self._device = probe, model, layout, device
        self._site = self._found()  # so that what cannot be is refused here
        self._patch = Patch(model.get_submodule(self._site.path))
        self._direction = probe.direction
        self._due: tuple[Tensor, int, Any] | None = None  # last tokens, columns, whether the prompts end in this pass
        self._fires: Tensor | None = None  # bool [batch]
        self._scores: Tensor | None = None  # float32 [batch]
        self._counts: Tensor | None = None  # int64 [2], decided and fired
        self._done = False  # whether the prompts at hand are judged, as far as the host knows
        self._read_once = False  # whether the pass at hand came by the site
        self._columns: int | None = None  # that direct calls have run of these texts; None: only the device knows
        self._generating = 0  # how many generate run, one inside another

    def _found(self) -> Site:
        """The probe's site, on the model as it is now."""
        sites = find_sites(self._model, self.probe.site, self._layout)
        self.probe.check_fits(self._model, sites)
        site = site_at(sites[self.probe.site], self.probe.layer)
        if held(self._model, site) is not None:
            raise SteeringError(
                f"when: site {site.name!r} of layer {site.layer} ({site.path}): found a slice of it in this process, "
                "expected the whole; fit a probe at 'layer' or 'ffn'"
            )
        return site

    def attach(self) -> None:
        """Raises what making it does, where the model has changed since."""
        self._site = self._found()
        self._patch = Patch(self._model.get_submodule(self._site.path))
        with torch.inference_mode(False):  # inference tensors could not be refilled outside of that mode
            self._direction = self.probe.direction.to(self._device)
            self._counts = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._due = self._fires = self._scores = self._columns = None
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
            else:  # its texts have ended; their scores stay, for the report
                self._fires, self._done = None, False

    # --- a forward pass ----------------------------------------------------------------------------------------------

    def begin(self, batch: int, length: int, past, end, stop, after, on_device: bool) -> None:
        """A pass begins.

        Args:
            past: columns in the cache. end: the prompt's, padding included; None: this pass has none of it. Integers,
                or tensors where only the device knows.
            stop, after: where each row's last token so far is: so many columns, [batch] or 0, before this one.
            on_device: whether the pass is compiled or captured.

        Raises:
            SteeringError: generated tokens come before their prompt was judged, or go on from another text.
        """
        self._due = None
        known = isinstance(past, int) and isinstance(end, int)
        judged = self._fires is not None and self._fires.shape[0] == batch
        if end is None or (known and past >= end):
            if not judged:
                self._refuse(f"a batch of {batch} rows that goes on from prompts which no probe has judged")
            self._move_on(past, length, on_device)
            return
        if known and end < past + length:
            if not (judged and self._done and self._generating):
                self._refuse("a prompt together with tokens after it (drafted ones?) in one forward pass")
            return  # run once more, without a cache
        self._columns = past + length if known and not on_device and not self._generating else None
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
        self._due, self._read_once = (last.expand(batch), length, ends), False
        if known:
            self._done = ends

    def _move_on(self, past, length: int, on_device: bool) -> None:
        """A direct call goes on from the texts that were judged last, or is refused."""
        if self._generating:
            return  # which texts those are is its own
        if on_device or not isinstance(past, int):
            self._columns = None
            return
        if self._columns not in (None, past):
            self._refuse(f"a cache of {past} columns, after {self._columns} of the texts that were judged last")
        self._columns = past + length

    def expect_read(self) -> None:
        """Raises SteeringError where the pass at hand should have come by the probe's site, and did not."""
        if self._due is not None and not self._read_once:
            raise SteeringError(
                f"when: found a forward pass that did not come by site {self._site.name!r} of layer "
                f"{self._site.layer} ({self._site.path}), so its prompts were not judged; expected a model that is not "
                "changed inside the block"
            )

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
        self._read_once = True
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
