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

from .costs.estimate import Estimate, estimate
from .counters import Counters
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
from .export import ExportError, ExportWarning, export_checkpoint, export_gguf, export_lora
from .measuring.measure import measure
from .measuring.profiling import profile
from .measuring.stored.count import momentum_from_activations
from .models.sites import Layout, Site, find_sites
from .models.structure import is_steered
from .momentum.momentum import Momentum
from .momentum.profile import Profile
from .pairs.pairs import Pair, Pairs, load_pairs
from .pairs.stream import PairStream, stream_pairs
from .plans.evidence import Evidence, Outcome, Overhead
from .plans.hub import HubError
from .plans.plan import Plan
from .plans.probe import Probe
from .plans.table import AtomicUnit
from .steering.answer_scope import answer_scope
from .steering.markers import Answer
from .steering.steer import steer
from .steering.steering import Steering
from .verifying import Verification, VerifyError, record_replay, verify
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .measuring.probing import fit_probe
    from .tasks import estimate_kl
    from .tuning import compare, tune

__all__ = [
    "Answer",
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
    "Probe",
    "Profile",
    "SelectionError",
    "Site",
    "SiteError",
    "Steering",
    "SteeringError",
    "SteeringWarning",
    "TaskError",
    "Verification",
    "VerifyError",
    "answer_scope",
    "compare",
    "estimate",
    "estimate_kl",
    "export_checkpoint",
    "export_gguf",
    "export_lora",
    "find_sites",
    "fit_probe",
    "is_steered",
    "load_pairs",
    "measure",
    "momentum_from_activations",
    "profile",
    "record_replay",
    "steer",
    "stream_pairs",
    "tune",
    "verify",
]


def __dir__() -> list[str]:
    """The public names; a package's folders are in its namespace, too."""
    return [*__all__, "__doc__", "__version__"]


def __getattr__(name: str) -> Any:
    """What brings scipy.stats is loaded when it is asked for: who only steers need not wait for that."""
    if name == "estimate_kl":
        from .tasks import estimate_kl

        return estimate_kl
    if name == "fit_probe":
        from .measuring.probing import fit_probe

        return fit_probe
    if name in ("compare", "tune"):
        from . import tuning

        return getattr(tuning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
