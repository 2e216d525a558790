"""Measuring in many processes: who takes which pairs, and counters added up once. accelerate's processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AusteerError


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. Alone: the only one.

    Attributes:
        index: 0 for the main one. count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """The processes that ``accelerate launch`` or torchrun has started; alone if there are none.

        Raises:
            AusteerError: accelerate's state was made before, without these processes.
        """
        from accelerate import PartialState

        # Without a GPU accelerate has to be told that it is to use gloo.
        state = PartialState() if PartialState._shared_state else PartialState(cpu=not torch.accelerator.is_available())
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if state.num_processes != launched:
            raise AusteerError(
                f"distributed: found {launched} processes in WORLD_SIZE and {state.num_processes} in accelerate's "
                "state, which was made earlier; make it with accelerate.PartialState(cpu=True) where there is no GPU"
            )
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        return self.index == 0

    def main_first(self, work: Callable[[], None]) -> None:
        """The main process does something before the others go on."""
        if self.main:
            work()
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        with self._others_here():
            return gather_object([value])

    def add(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums of CPU tensors over all processes, exact for integers; the same in each.

        Raises:
            AusteerError: another process has failed.
        """
        if self.count == 1:
            return dict(tensors)
        from accelerate import PartialState
        from accelerate.utils import reduce

        device = PartialState().device  # NCCL adds up on a GPU only
        with self._others_here():
            return {name: reduce(t.to(device), reduction="sum").cpu() for name, t in tensors.items()}

    @contextmanager
    def _others_here(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo: connection closed by peer
            raise AusteerError(
                f"process {self.index} of {self.count}: another process is gone ({' '.join(str(error).split()):.120}); "
                "see what it said, and run all again with resume"
            ) from error
