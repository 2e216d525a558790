"""Makes contrastive pairs, and checks those that are there.

Pairs are made from a labelled task (:mod:`.from_task`), written by the model itself after two instructions
(:mod:`.instructions`), or filled into a template (:mod:`.template`). :func:`check_pairs` looks for what tells the sides
of pairs apart besides their meaning: lengths, last tokens, prompts.
"""

from .check import PairsReport, check_pairs, grave_note
from .findings import PairsFinding
from .from_task import pairs_from_task
from .instructions import pairs_from_instructions
from .length_control import LengthControl, control_pairs
from .made_pairs import Made, write_pairs
from .template import pairs_from_template

__all__ = [
    "LengthControl",
    "Made",
    "PairsFinding",
    "PairsReport",
    "check_pairs",
    "control_pairs",
    "grave_note",
    "pairs_from_instructions",
    "pairs_from_task",
    "pairs_from_template",
    "write_pairs",
]
