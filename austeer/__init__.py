"""austeer: low-overhead activation steering of language models by atomic units (AUSteer, ICLR 2026).

pairs -> momentum -> plan -> steering, or a plan exported for another engine::

    pairs    = austeer.load_pairs("pairs.jsonl")
    momentum = austeer.measure(model, tokenizer, pairs, sites=["attention", "ffn"])
    plan     = momentum.select(site="attention", k=10, operation="shift")
    with austeer.steer(model, plan, alpha=8):
        model.generate(**inputs)
    result   = austeer.tune(model, tokenizer, pairs)                  # or all of that chosen on held-out pairs
    austeer.export_checkpoint(plan, "meta-llama/Llama-3.1-8B-Instruct", "models/kind", alpha=8)
"""

from typing import TYPE_CHECKING, Any

from .activations import momentum_from_activations
from .errors import (
    AusteerError,
    CaptureError,
    FileFormatError,
    PairsError,
    PlanError,
    SelectionError,
    SiteError,
    SteeringError,
    SteeringWarning,
    TaskError,
)
from .estimate import Estimate, estimate
from .evidence import Evidence, Outcome, Overhead
from .export import ExportError, ExportWarning, export_checkpoint, export_gguf, export_lora
from .hub import HubError
from .measuring import measure
from .momentum import Counters, Momentum
from .pairs import Pair, Pairs, load_pairs
from .plan import AtomicUnit, Plan
from .sites import Layout, Site, find_sites
from .steering import Steering, is_steered, steer
from .stream import PairStream, stream_pairs

if TYPE_CHECKING:
    from .tuning import compare, tune

__version__ = "0.1.0"

__all__ = [
    "AtomicUnit",
    "AusteerError",
    "CaptureError",
    "Counters",
    "Estimate",
    "Evidence",
    "ExportError",
    "ExportWarning",
    "FileFormatError",
    "HubError",
    "Layout",
    "Momentum",
    "Outcome",
    "Overhead",
    "Pair",
    "PairStream",
    "Pairs",
    "PairsError",
    "Plan",
    "PlanError",
    "SelectionError",
    "Site",
    "SiteError",
    "Steering",
    "SteeringError",
    "SteeringWarning",
    "TaskError",
    "compare",
    "estimate",
    "export_checkpoint",
    "export_gguf",
    "export_lora",
    "find_sites",
    "is_steered",
    "load_pairs",
    "measure",
    "momentum_from_activations",
    "steer",
    "stream_pairs",
    "tune",
]


def __getattr__(name: str) -> Any:
    """The search is loaded when it is asked for: it brings scipy.stats, and who only steers need not wait for that."""
    if name in ("compare", "tune"):
        from . import tuning

        return getattr(tuning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
