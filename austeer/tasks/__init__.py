"""Labelled tasks: what a model should answer, read from data through templates, and how well it does."""

from .scoring import SideEffects, cross_entropy, log_odds, option_scores, side_effects
from .task import KINDS, Item, Task

__all__ = ["KINDS", "Item", "SideEffects", "Task", "cross_entropy", "log_odds", "option_scores", "side_effects"]
