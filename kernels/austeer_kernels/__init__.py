"""Operations on tensors: PyTorch definitions, Triton kernels.

Each has both, and a registration with torch. Needs torch only; Triton is imported when an operation first meets a CUDA
tensor.
"""

from .ops import KernelArgumentError, coalesce, momentum_counters, momentum_update, steer_columns_, steered_linear
from .reference import NO_PAIR

__all__ = [
    "NO_PAIR",
    "KernelArgumentError",
    "coalesce",
    "momentum_counters",
    "momentum_update",
    "steer_columns_",
    "steered_linear",
]
