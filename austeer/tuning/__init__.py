"""Choosing which AUs, how many and how strongly, on data that was not measured, and comparing methods fairly."""

from ..baselines.arm import Arm, Candidate, Material
from .compare import CompareResult, compare
from .data import Parts
from .tune import TuneResult, tune

__all__ = ["Arm", "Candidate", "CompareResult", "Material", "Parts", "TuneResult", "compare", "tune"]
