"""What a measurement has counted so far, and its safe-keeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from austeer_kernels import NO_PAIR, momentum_counters, momentum_update

from ..counters import Counters, effect_of
from ..errors import CaptureError
from ..models.sites import Site
from .blocks import Block, Blocks


class Counts:
    """Counters of all sites of one process, and how many pairs those of a half hold."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], device: torch.device):
        self.counting = {name: Counting(*shape, device) for name, shape in shapes.items()}
        self.half_pairs = 0

    def nonfinite(self) -> tuple[int, int, int, str] | None:
        """The first pair with a NaN or an infinity, its row of layers, its AU and site; waits for the device."""
        found = [(*place, name) for name, c in self.counting.items() if (place := c.nonfinite()) is not None]
        return min(found, default=None)

    def counters(self) -> dict[str, Any]:
        """Copies on the CPU, as a momentum and a :class:`State` hold them."""
        return {
            "sites": {name: counting.counters() for name, counting in self.counting.items()},
            "half": {name: counting.half_counters() for name, counting in self.counting.items()},
            "half_pairs": self.half_pairs,
        }

    def restore(self, state: State) -> None:
        """Goes on from earlier counters."""
        for name, counting in self.counting.items():
            counting.restore(state.sites[name], state.half[name])
        self.half_pairs = state.half_pairs


class Tally(Counts):
    """The counters of blocks at the sites of the measured layers, and how many pairs they hold.

    Args:
        effects: whether effects are counted, too.
    """

    def __init__(self, sites: Mapping[str, Sequence[Site]], device: torch.device, effects: bool = False):
        shapes = {name: (len(found), found[0].width) for name, found in sites.items()}
        more = {effect_of(name): shape for name, shape in shapes.items()} if effects else {}
        super().__init__(shapes | more, device)
        self._effects: dict[str, Counting] = {}  # of the block that runs: all of a block is counted, or nothing
        self.sites = sites
        self.block, self.digest = 0, ""
        self.pairs = self.cut = self.identical = 0

    def add(self, block: Block, buffers: Mapping[str, Tensor]) -> None:
        """Counts a whole block: two kernel calls a site, one of them over the pairs of a half."""
        if block.pairs:
            for name in self.sites:
                self.counting[name].add(buffers[name], block.pairs, block.offset, half=block.half)
            for name, effects in self._effects.items():
                self.counting[name].merge(effects)
        self._effects = {}
        self.done(block)

    def add_effects(self, block: Block, pairs: Tensor, effects: Mapping[str, Tensor]) -> None:
        """Notes the effects of some pairs of a block, which :meth:`add` counts.

        Args:
            pairs: their numbers in the block, ascending. effects: site name -> float32 [pairs, layers, width].
        """
        half = torch.isin(pairs, block.half.cpu()).nonzero()[:, 0]
        for site, values in effects.items():
            name, device = effect_of(site), self.counting[site].first_nonfinite.device
            if name not in self._effects:
                self._effects[name] = Counting(*self.counting[name].shape, device)
            both = torch.cat([values, torch.zeros_like(values)]).to(device)  # an effect is a difference already
            self._effects[name].add(both, len(pairs), block.offset, half=half)

    def done(self, block: Block) -> None:
        """Notes a block whose activations are counted."""
        self.block, self.digest = block.number + 1, block.digest
        self.pairs += block.size
        self.half_pairs += len(block.half)
        self.cut += block.cut
        self.identical += block.size - block.pairs

    def check(self, blocks: Blocks) -> None:
        """Raises CaptureError if an activation was NaN or infinite; waits for the device."""
        found = self.nonfinite()
        if found is None:
            return
        value, row, au, name = found
        offset = value // blocks.block_pairs * blocks.block_pairs
        number, pair = blocks.pair(value - offset, offset)
        # Attention spreads a NaN over all texts of a row, masked or not.
        together = " or one that begins like it (share_prompts=False tells which)" if blocks.share else ""
        raise CaptureError(
            f"site {name!r}, layer {self.sites[name][row].layer}, AU {au}: found NaN or infinity on pair {number} of "
            f"{blocks.source} ({pair.prompt!r:.60}){together}; expected finite activations. Load the model in bfloat16 "
            "or float32, or leave the pair out"
        )

    def state(self, **extra: Any) -> State:
        return State(
            block=self.block,
            digest=self.digest,
            pairs=self.pairs,
            cut=self.cut,
            identical=self.identical,
            extra=extra,
            **self.counters(),
        )

    def restore(self, state: State) -> None:
        super().restore(state)
        self.block, self.digest = state.block, state.digest
        self.pairs, self.cut, self.identical = state.pairs, state.cut, state.identical


class Counting:
    """Counters of one site, flat over layers and width, fed buffer by buffer.

    Args:
        layers: how many layers are measured. width: AUs a layer. device: where activations come from.

    Attributes:
        totals: the counters of all pairs. half: those of one half of them (:mod:`austeer.pairs.halves`).
    """

    def __init__(self, layers: int, width: int, device: torch.device | str):
        self.shape = (layers, width)
        *self.totals, self.first_nonfinite = momentum_counters(layers * width, device)
        *self.half, self._ignored = momentum_counters(layers * width, device)  # of NaN the totals know

    def add(self, buffer: Tensor, pairs: int, offset: int, row: int | None = None, half: Tensor | None = None) -> None:
        """A kernel call over a buffer of activations, and one over the rows of a half; none waits for the device.

        Args:
            buffer: [texts, layers, width]; text r and text r + ``pairs`` are a pair, positive first.
            offset: the number of the first pair, for :meth:`nonfinite`.
            row: the row of the counters that the buffer's one layer belongs to; by default it has all.
            half: which of the pairs are in the half, int64, from 0; on the CPU. None of them by default.
        """
        rows = buffer.flatten(1)  # [texts, layers * width]
        sides, width = [rows[:pairs], rows[pairs : 2 * pairs]], self.shape[1]
        part = slice(None) if row is None else slice(row * width, (row + 1) * width)
        updates = [(sides, (*self.totals, self.first_nonfinite))]
        if half is not None and len(half):
            chosen = half.to(rows.device, non_blocking=True)
            updates.append(([side.index_select(0, chosen) for side in sides], (*self.half, self._ignored)))
        for (positive, negative), counters in updates:
            wins, losses, delta_sum, square_sum, nonfinite = (t[part] for t in counters)
            momentum_update(positive, negative, wins, losses, delta_sum, square_sum, nonfinite, offset)

    def nonfinite(self) -> tuple[int, int, int] | None:
        """The first pair with a NaN or an infinity, its row of layers and its AU; waits for the device."""
        pair, column = (int(v) for v in self.first_nonfinite.min(0))
        return None if pair == NO_PAIR else (pair, *divmod(column, self.shape[1]))

    def counters(self) -> Counters:
        """A copy on the CPU, [layers, width]."""
        return Counters(*(t.view(self.shape).clone().cpu() for t in self.totals))

    def half_counters(self) -> Counters:
        """A copy of those of the half on the CPU, [layers, width]."""
        return Counters(*(t.view(self.shape).clone().cpu() for t in self.half))

    def merge(self, other: Counting) -> None:
        """Adds what another has counted."""
        for mine, theirs in zip((*self.totals, *self.half), (*other.totals, *other.half)):
            mine += theirs

    def restore(self, counters: Counters, half: Counters) -> None:
        """Goes on from earlier counters."""
        for kept, earlier in ((self.totals, counters), (self.half, half)):
            for mine, theirs in zip(kept, earlier.tensors().values()):
                mine.copy_(theirs.flatten())


@dataclass(frozen=True)
class State:
    """What has been counted: every block of this process before ``block``.

    Attributes:
        block: the number of the next block. digest: hash of all pairs before it. pairs: how many of this
            process' pairs are counted (half_pairs, cut, identical likewise).
        sites: site name -> counters so far. half: those of one half, of ``half_pairs`` pairs.
        extra: what else has to be the same, and is found out at run time (for example the batch size).
    """

    block: int
    digest: str
    pairs: int
    half_pairs: int
    cut: int
    identical: int
    sites: Mapping[str, Counters]
    half: Mapping[str, Counters]
    extra: Mapping[str, Any]
