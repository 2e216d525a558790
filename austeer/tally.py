"""What a measurement has counted so far, and its safe-keeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Blocks
from .checkpoint import State
from .counting import Counting
from .errors import CaptureError
from .sites import Site


class Tally:
    """Counters of all sites of one process, and how many pairs they hold.

    Args:
        sites: what is read, the measured layers only. device: where activations come from.
    """

    def __init__(self, sites: Mapping[str, Sequence[Site]], device: torch.device):
        self.sites = sites
        self.counting = {name: Counting(len(found), found[0].width, device) for name, found in sites.items()}
        self.block, self.digest = 0, ""
        self.pairs = self.half_pairs = self.cut = self.identical = 0

    def add(self, block: Block, buffers: Mapping[str, Tensor]) -> None:
        """Counts a whole block: two kernel calls a site, one of them over the pairs of a half."""
        if block.pairs:
            for name, counting in self.counting.items():
                counting.add(buffers[name], block.pairs, block.offset, half=block.half)
        self.done(block)

    def done(self, block: Block) -> None:
        """Notes a block whose activations are counted."""
        self.block, self.digest = block.number + 1, block.digest
        self.pairs += block.size
        self.half_pairs += len(block.half)
        self.cut += block.cut
        self.identical += block.size - block.pairs

    def check(self, blocks: Blocks) -> None:
        """Raises CaptureError if an activation was NaN or infinite; waits for the device."""
        found = []
        for name, counting in self.counting.items():
            place = counting.nonfinite()
            if place is not None:
                found.append((*place, name))
        if not found:
            return
        value, row, au, name = min(found)
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
            half_pairs=self.half_pairs,
            cut=self.cut,
            identical=self.identical,
            sites={name: counting.counters() for name, counting in self.counting.items()},
            half={name: counting.half_counters() for name, counting in self.counting.items()},
            extra=extra,
        )

    def restore(self, state: State) -> None:
        for name, counting in self.counting.items():
            counting.restore(state.sites[name], state.half[name])
        self.block, self.digest = state.block, state.digest
        self.pairs, self.half_pairs = state.pairs, state.half_pairs
        self.cut, self.identical = state.cut, state.identical
