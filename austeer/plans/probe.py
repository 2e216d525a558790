"""Probe: a direction and a threshold that tell, at a prompt's last token, whether a plan is wanted; and its file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, PlanError
from ..models.sites import SITE_NAMES, Fingerprint, Site, fingerprint
from ..pairs.chat import ChatForm, check_chat_form
from ..utils import files
from .fit import check_architecture

FORMAT, VERSION = "austeer-probe", 1
LARGEST_FILE = 2**24
LARGEST_HEADER = 2**20


@dataclass(frozen=True)
class Rate:
    """How many of some texts a probe fired on, and the 95 % interval of that share.

    Raises:
        PlanError: no such numbers.
    """

    hits: int
    total: int
    low: float
    high: float

    def __post_init__(self) -> None:
        counts = type(self.hits) is int and type(self.total) is int and 0 <= self.hits <= self.total and self.total > 0
        bounds = [self.low, self.high]
        if not counts or not all(type(b) in (int, float) for b in bounds) or not 0 <= self.low <= self.high <= 1:
            raise PlanError(f"rate: found {self.hits!r} of {self.total!r} within {bounds!r}, expected a share")

    def __str__(self) -> str:
        return f"{self.hits / self.total:.1%} of {self.total} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class ProbeEvidence:
    """How a probe's threshold was chosen, and what it did to texts that were kept for that alone.

    Attributes:
        asked: the share of unwanted prompts that it may fire on.
        calibration: how many unwanted prompts the threshold was chosen on.
        expected_low, expected_high: the 95 % interval of the threshold's rate by those alone, whatever the scores'
            distribution.
        false_positives: of held-out unwanted prompts. true_positives: of held-out wanted ones.
        auc: how often a held-out wanted prompt scores higher than a held-out unwanted one.

    Raises:
        PlanError: a number out of its range.
    """

    asked: float
    calibration: int
    expected_low: float
    expected_high: float
    false_positives: Rate
    true_positives: Rate
    auc: float

    def __post_init__(self) -> None:
        shares = (self.asked, self.expected_low, self.expected_high, self.auc)
        if not all(type(share) in (int, float) and 0 <= share <= 1 for share in shares):
            raise PlanError(f"evidence: found {shares!r}, expected shares from 0 to 1")
        if type(self.calibration) is not int or self.calibration < 1:
            raise PlanError(f"evidence: found {self.calibration!r} prompts, expected a positive integer")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProbeEvidence:
        """Raises TypeError or PlanError where ``data`` is none."""
        rates = {name: Rate(**data[name]) for name in ("false_positives", "true_positives")}
        return cls(**{**data, **rates})


@dataclass(frozen=True, eq=False)
class Probe:
    """Fires where x . direction > threshold, x a prompt's last token at one site of one layer, in float32.

    :func:`austeer.fit_probe` makes one, and :func:`austeer.steer` takes it as ``when``.

    Attributes:
        site, layer: where x is read.
        direction: float32 [width], of length 1, so that a score is in the activation's own unit.
        threshold: a float32 number.
        model: what it was fitted on.
        chat_template: whether the prompts went through one, with its options if it had any.
        evidence: its rates.

    Raises:
        PlanError: a field of another kind, or numbers that are not finite.
    """

    site: str
    layer: int
    direction: Tensor
    threshold: float
    model: Fingerprint
    chat_template: ChatForm = False
    evidence: ProbeEvidence | None = None

    def __post_init__(self) -> None:
        if self.site not in SITE_NAMES or self.model.widths.keys() != {self.site}:
            raise PlanError(
                f"probe: found site {self.site!r}, expected one of {', '.join(SITE_NAMES)}, the model's own"
            )
        if type(self.layer) is not int or not 0 <= self.layer < self.model.layers:
            raise PlanError(f"probe: found layer {self.layer!r}, expected one from 0 to {self.model.layers - 1}")
        width = self.model.widths[self.site]
        if not isinstance(self.direction, Tensor) or self.direction.dtype != torch.float32:
            raise PlanError(f"probe: found a direction of {type(self.direction).__name__}, expected a float32 tensor")
        if self.direction.shape != (width,) or not bool(self.direction.isfinite().all()):
            raise PlanError(
                f"probe: found a direction of shape {list(self.direction.shape)}, expected {width} finite numbers"
            )
        largest = torch.finfo(torch.float32).max
        if type(self.threshold) not in (int, float) or not abs(self.threshold) <= largest:
            raise PlanError(f"probe: found threshold {self.threshold!r}, expected a finite float32 number")
        object.__setattr__(self, "direction", self.direction.detach().to("cpu", copy=True))
        try:
            check_chat_form(self.chat_template)
        except (TypeError, ValueError) as error:
            raise PlanError(str(error)) from error

    def __repr__(self) -> str:
        return f"Probe({self.site} of layer {self.layer}, {len(self.direction)} dimensions, of {self.model.name})"

    @property
    def digest(self) -> str:
        """SHA-256 of what decides where it fires."""
        text = f"{self.site} {self.layer} {self.threshold!r}".encode()
        return hashlib.sha256(text + self.direction.numpy().tobytes()).hexdigest()

    def check_fits(self, model: nn.Module, sites: Mapping[str, list[Site]]) -> None:
        """Raises PlanError where it was made for another architecture; ``sites``: the probe's at least."""
        check_architecture(
            self.model, (self.site,), fingerprint(model, {self.site: sites[self.site]}), "when: the probe"
        )

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file; it is there whole or not at all. Raises FileFormatError."""
        header = {
            "site": self.site,
            "layer": self.layer,
            "threshold": float(self.threshold),
            "model": self.model.to_json(),
            "chat_template": self.chat_template,
            "evidence": None if self.evidence is None else asdict(self.evidence),
        }
        files.write(Path(path), FORMAT, VERSION, header, {"direction": self.direction})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Raises FileFormatError: missing, damaged, or another kind of file. PlanError: its content is no probe."""
        header, tensors = files.read(
            Path(path), FORMAT, VERSION, largest=LARGEST_FILE, largest_header=LARGEST_HEADER, check=_check_tensors
        )
        try:
            evidence = header.pop("evidence")
            evidence = None if evidence is None else ProbeEvidence.from_json(evidence)
            fields = {**header, "model": Fingerprint.from_json(header["model"]), "evidence": evidence, **tensors}
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: inconsistent content ({error}); fit the probe anew") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _check_tensors(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    found = {name: (dtype, len(shape)) for name, (dtype, shape) in tensors.items()}
    if found != {"direction": ("F32", 1)}:
        raise ValueError(f"found the tensors {sorted(found)[:8]}, expected a direction of float32")
