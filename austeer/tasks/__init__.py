"""Labelled tasks: what a model should answer, read from data through templates, and how well it does."""

from .load import load_task
from .scoring import SideEffects, cross_entropy, log_odds, option_scores, side_effects
from .task import KINDS, Item, Task
from .templates import Template, load_template, shipped

__all__ = [
    "KINDS",
    "Item",
    "SideEffects",
    "Task",
    "Template",
    "cross_entropy",
    "load_task",
    "load_template",
    "log_odds",
    "option_scores",
    "shipped",
    "side_effects",
]
