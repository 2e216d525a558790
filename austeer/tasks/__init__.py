"""Labelled tasks: read through templates, run and scored."""

from ..steering.side_effects import SideEffects, side_effects
from .curvature import estimate_kl
from .evaluate import Variant, check_options, checked_variants, evaluate
from .evaluation import Comparison, Evaluation, IntervalEstimate, VariantResult
from .load import load_task
from .numeric import last_number, numeric_answers
from .scoring import cross_entropy, log_odds, option_scores
from .task import KINDS, Item, Task
from .templates import Template, load_template, shipped

__all__ = [
    "KINDS",
    "Comparison",
    "Evaluation",
    "IntervalEstimate",
    "Item",
    "SideEffects",
    "Task",
    "Template",
    "Variant",
    "VariantResult",
    "check_options",
    "checked_variants",
    "cross_entropy",
    "estimate_kl",
    "evaluate",
    "last_number",
    "load_task",
    "load_template",
    "log_odds",
    "numeric_answers",
    "option_scores",
    "shipped",
    "side_effects",
]
