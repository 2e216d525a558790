"""Chooses AUs and strengths on held-out data; compares methods.

Which AUs, how many and how strongly is chosen on data that was not measured, and every method is tuned alike.
"""

from ..baselines.arm import Arm, Candidate, Material
from .compare import CompareResult, compare
from .data import Parts
from .tune import TuneResult, tune

__all__ = ["Arm", "Candidate", "CompareResult", "Material", "Parts", "TuneResult", "compare", "tune"]
