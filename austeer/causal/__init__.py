"""What do AUs cause? Few are steered, alone or together, and what that does is compared with what was known before."""

from .check import WAYS, CausalResult, Unit, causal_check
from .statistics import Agreement, Correlation, Difference, Findings
from .together import ALPHAS, Group, Strength, Together

__all__ = [
    "ALPHAS",
    "WAYS",
    "Agreement",
    "CausalResult",
    "Correlation",
    "Difference",
    "Findings",
    "Group",
    "Strength",
    "Together",
    "Unit",
    "causal_check",
]
