"""What work is counted in, and where: bytes, operations and launches; a device; one site of one layer in a pass."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from operator import add, sub

import torch

from austeer_kernels import launch

#: How a model runs: operation by operation, replayed from a CUDA graph, or compiled.
EXECUTIONS = ("eager", "graph", "compile")


@dataclass(frozen=True)
class Work:
    """What some operations take.

    Attributes:
        read, written: bytes of the values themselves.
        operations: of floating-point numbers; a multiplication with an addition is two.
        launches: operations called.
        padding: bytes moved beside, because single values are read and written in whole sectors or cache lines.
    """

    read: int = 0
    written: int = 0
    operations: int = 0
    launches: int = 0
    padding: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def moved(self) -> int:
        return self.bytes + self.padding

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: Work) -> Work:
        return Work(*map(sub, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Target:
    """What work is predicted for: a device, and how the model runs on it.

    Attributes:
        kind: "cpu" or "cuda". execution: one of ``EXECUTIONS``.
        architecture, name, processors: of a GPU, as the kernels' tables know it; an H100's unless one is here.
    """

    kind: str
    execution: str = "eager"
    architecture: str = "sm_90"
    name: str = "NVIDIA H100 80GB HBM3"
    processors: int = 132

    @classmethod
    def of(cls, device: torch.device, execution: str = "eager") -> Target:
        """A device of this machine; for "cuda" without a GPU here, an H100."""
        if device.type == "cuda" and torch.cuda.is_available():
            count = torch.cuda.get_device_properties(device).multi_processor_count
            return cls("cuda", execution, *launch.names_of(torch.device("cuda", device.index or 0)), count)
        return cls(device.type, execution)

    @property
    def granule(self) -> int:
        """The fewest bytes that memory moves: a cache line of a CPU, a sector of a GPU."""
        return 64 if self.kind == "cpu" else 32


@dataclass(frozen=True)
class Place:
    """One site of one layer in one forward pass.

    Attributes:
        tokens: of all rows. width: AUs there. count: how many of them are steered; 0 in layers that are left alone.
        dtype: of activations and weights. operation: "scale", "push", "shift" or "ablate".
        side: "input" or "output" of the projection.
        projection: inputs and outputs of the linear layer at the site; None without one.
        bias: whether that has a bias, or, without a projection, the layer that could add a shift.
    """

    tokens: int
    width: int
    count: int
    dtype: torch.dtype
    operation: str
    side: str = "output"
    projection: tuple[int, int] | None = None
    bias: bool = False

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def low(self) -> bool:
        """Whether arithmetic in float32 needs a conversion."""
        return self.itemsize < 4

    @property
    def values(self) -> int:
        return self.tokens * self.width

    @property
    def chosen(self) -> int:
        return self.tokens * self.count

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs of the projection, which has to be there."""
        if self.projection is None:
            raise ValueError("found a site without a projection, expected one with")
        return self.projection
