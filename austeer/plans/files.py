"""A plan's file: one safetensors file with a JSON header, versioned, and read as if a stranger had written it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import FileFormatError, PlanError
from ..models.sites import Fingerprint
from ..utils import files
from .dose import Dose
from .evidence import Evidence, check_text
from .replay import Replay
from .table import PlanTable

FORMAT, VERSION = "austeer-plan", 4
FILE_NAME = "austeer_plan.safetensors"

Kind = TypeVar("Kind", bound=PlanTable)

#: AUs of one plan: all of one site of the largest models there are.
MOST_UNITS = 2**23
MOST_SITES = 64
LARGEST_INT = 2**31 - 1
LARGEST_HEADER = 2**20

#: Each column's dtype, as safetensors calls it.
COLUMNS = {"site": "U8", "layer": "I32", "index": "I32", "beta": "F32", "delta": "F32"}
#: What a missing file should have been.
WRITTEN_BY = f"an {FORMAT} file, as austeer select and Plan.save_pretrained write it"
#: Of a plan with a dose: that of the first 1, 2, ... AUs.
DOSE_COLUMNS = {"dose_kl": "F64", "dose_effect": "F64"}
FIELDS = {"operation", "pairs", "ties", "chat_template", "rank", "step"}
LARGEST_FILE = MOST_UNITS * (1 + 4 * 4 + 2 * 8) + LARGEST_HEADER + 8


def _with_evidence(header: dict[str, Any]) -> dict[str, Any]:
    if "evidence" in header:
        raise ValueError("found the field 'evidence' in version 1")
    return {**header, "evidence": None}


def _with_dose(header: dict[str, Any]) -> dict[str, Any]:
    new = {"dose": None, "rank": "momentum", "step": "difference"}
    if found := new.keys() & header.keys():
        raise ValueError(f"found the field {min(found)!r} in version 2")
    return {**header, **new}


def _with_replay(header: dict[str, Any]) -> dict[str, Any]:
    if "replay" in header:
        raise ValueError("found the field 'replay' in version 3")
    return {**header, "replay": None}


#: For each older version, what makes its header one of the next version. Every field added is a new version.
MIGRATIONS: dict[int, files.Migration] = {1: _with_evidence, 2: _with_dose, 3: _with_replay}


def write(plan: PlanTable, path: Path) -> Path:
    """Raises PlanError: more than a file may hold. FileFormatError: it cannot be written."""
    _check_count(len(plan), PlanError)
    _check_model(plan.model)
    names = plan.sites
    header = {
        "operation": plan.operation,
        "model": plan.model.to_json(),
        "pairs": plan.pairs,
        "ties": plan.ties,
        "chat_template": plan.chat_template,
        "evidence": None if plan.evidence is None else plan.evidence.to_json(),
        "rank": plan.rank,
        "step": plan.step,
        "dose": None if plan.dose is None else plan.dose.to_json(),
        "replay": None if plan.replay is None else plan.replay.to_json(),
        "sites": list(names),
    }
    size = len(json.dumps(json.dumps(header)))  # as it stands in the file: JSON within JSON
    if size > LARGEST_HEADER - 4096:
        sizes = {name: len(json.dumps(json.dumps(part))) for name, part in header.items()}
        first, second = sorted(sizes, key=lambda name: -sizes[name])[:2]
        raise PlanError(
            f"the plan's header would take {size} bytes, expected at most {LARGEST_HEADER - 4096}; shorten the {first} "
            f"({sizes[first]} bytes) or the {second} ({sizes[second]})"
        )
    number = {name: i for i, name in enumerate(names)}
    tensors = {name: getattr(plan, name) for name in ("layer", "index", "beta", "delta")}
    if plan.dose is not None:
        for name, values in (("dose_kl", plan.dose.kl), ("dose_effect", plan.dose.effect)):
            if values:
                tensors[name] = torch.tensor(values, dtype=torch.float64, device="cpu")
    tensors["site"] = torch.tensor([number[name] for name in plan.site], dtype=torch.uint8, device="cpu")
    files.write(path, FORMAT, VERSION, header, tensors)
    return path


def read(path: Path, kind: type[Kind]) -> Kind:
    """The plan in a file, or in a folder's file of the usual name.

    Args:
        kind: the class of plan that is made of it.

    Raises:
        FileFormatError: missing, damaged, foreign, too large, or of a newer version.
        PlanError: its content is not a valid plan.
    """
    path = file_of(path)
    try:
        header, tensors = files.read(
            path,
            FORMAT,
            VERSION,
            migrations=MIGRATIONS,
            largest=LARGEST_FILE,
            largest_header=LARGEST_HEADER,
            check=_check_columns,
        )
    except FileFormatError as error:
        if path.is_file() and files.kind_of(path) == "austeer-momentum":
            raise FileFormatError(
                f"{path}: found a momentum file, expected a plan; make one of it: "
                f"austeer select {path} --k 100 --out FOLDER"
            ) from error
        raise
    try:
        return kind(**_fields(header, tensors))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: inconsistent content ({error}); make the plan anew") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def file_of(folder: Path) -> Path:
    """A folder's file of the usual name; a file itself. Raises FileFormatError: the folder has none."""
    if not folder.is_dir():
        return folder
    path = folder / FILE_NAME
    if not path.exists():
        try:
            there = sorted(entry.name for entry in folder.iterdir())
        except OSError as error:
            raise FileFormatError(f"{folder}: cannot be read ({error.strerror})") from error
        holds = f"{', '.join(there[:5])}{' ...' if len(there) > 5 else ''}" if there else "nothing"
        raise FileFormatError(f"{path}: no such file; expected {WRITTEN_BY}. The folder holds {holds}")
    return path


def _fields(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    fields = dict(header)
    names, model, evidence = fields.pop("sites"), fields.pop("model"), fields.pop("evidence")
    replay = fields.pop("replay")
    kl, effect = (tuple(tensors.pop(name).tolist()) if name in tensors else () for name in DOSE_COLUMNS)
    dose = fields.pop("dose")
    if (dose is None) != (not kl):
        raise ValueError("found a dose without its columns, or columns without a dose")
    if set(fields) != FIELDS:
        raise ValueError(f"found the fields {sorted(fields)}, expected {sorted(FIELDS)} and five more")
    for name in ("operation", "ties", "rank", "step"):
        check_text(name, fields[name])
    if not isinstance(names, list) or not 1 <= len(names) <= MOST_SITES or len(set(names)) < len(names):
        raise ValueError(f"sites must be a list of 1 to {MOST_SITES} different names")
    fingerprint = Fingerprint.from_json(model)
    _check_model(fingerprint)
    site = tuple(names[i] for i in tensors.pop("site").tolist())
    evidence = None if evidence is None else Evidence.from_json(evidence)
    dose = None if dose is None else Dose.from_json(dose, kl, effect)
    replay = None if replay is None else Replay.from_json(replay)
    more = {"evidence": evidence, "dose": dose, "replay": replay}
    return {"site": site, "model": fingerprint, **more, **tensors, **fields}


def _check_columns(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
    if dtypes != COLUMNS | {name: dtype for name, dtype in DOSE_COLUMNS.items() if name in dtypes}:
        found = ", ".join(f"{name[:20]} {dtype}" for name, (dtype, _) in list(tensors.items())[:8])
        raise ValueError(f"found the columns {found or 'none'}, expected " + ", ".join(map(" ".join, COLUMNS.items())))
    shapes = {shape for _, shape in tensors.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"found columns of shape {sorted(map(list, shapes))}, expected one length for all")
    _check_count(next(iter(shapes))[0], ValueError)


def _check_count(units: int, error: type[Exception]) -> None:
    if not 1 <= units <= MOST_UNITS:
        raise error(f"found {units} AUs, expected 1 to {MOST_UNITS}; take a part with plan.top(k)")


def _check_model(model: Fingerprint) -> None:
    check_text("model: name", model.name)
    check_text("model: model_type", model.model_type)
    if model.revision is not None:
        check_text("model: revision", model.revision)
    if len(model.widths) > MOST_SITES:
        raise PlanError(f"model: found {len(model.widths)} sites, expected at most {MOST_SITES}")
    for site in model.widths:
        check_text("model: site", site, 64)
    sizes = [model.layers, *model.widths.values()]
    if any(type(size) is not int or not 1 <= size <= LARGEST_INT for size in sizes):
        raise PlanError(f"model: found sizes {sizes[:8]}, expected integers from 1 to {LARGEST_INT}")
