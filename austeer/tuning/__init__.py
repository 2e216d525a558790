"""Choosing which AUs, how many and how strongly, on data that was not measured, and comparing methods fairly."""

from .arms import Arm, Material

__all__ = ["Arm", "Material"]
