"""What stands out from chance, how stable, from how many pairs.

An AU's momentum is a sign count, so everything here is a sign test or compares two rankings; nothing is assumed of the
activations themselves. Pairs are taken to be independent: pairs that repeat each other count for more than they are.
"""

from .power import DetectableRate, critical_count, detectable_rate, pairs_needed, power, smallest_pairs
from .ranking import effect_size, ranking, signed_rate
from .significance import adjusted_p_values, beta_histogram, chance_below, discoveries, p_values, rate_interval
from .stability import Stability, Ties, expected_overlap, geometric, overlap, stability, ties_at_cut

__all__ = [
    "DetectableRate",
    "Stability",
    "Ties",
    "adjusted_p_values",
    "beta_histogram",
    "chance_below",
    "critical_count",
    "detectable_rate",
    "discoveries",
    "effect_size",
    "expected_overlap",
    "geometric",
    "overlap",
    "p_values",
    "pairs_needed",
    "power",
    "ranking",
    "rate_interval",
    "signed_rate",
    "smallest_pairs",
    "stability",
    "ties_at_cut",
]
