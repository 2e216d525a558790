"""Does momentum cause anything? Single AUs, steered alone.

Top ones stand beside matched random ones.
"""

from .check import WAYS, CausalResult, Unit, causal_check
from .statistics import Correlation, Difference, Findings

__all__ = ["WAYS", "CausalResult", "Correlation", "Difference", "Findings", "Unit", "causal_check"]
