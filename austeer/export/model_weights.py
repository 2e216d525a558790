"""A model's weights, one at a time: of a model in memory, or in the safetensors files of a checkpoint.

A checkpoint names its tensors as its maker did: without the prefix that a head adds, with another prefix, or with each
expert apart where the model's code keeps them in one tensor. Transformers knows these conversions; here they are read,
and only the tensors that are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ModelError, one_line
from ..models.demo_model import DEMO, DEMO_ID, demo_model
from ..models.linear import FLOATING
from ..models.skeleton import load_config, named_dtype, skeleton
from ..models.structure import base_of, is_steered, name_of
from ..models.weights import read_parameter
from ..plans.plan import Plan
from ..version import __version__
from .edits import ExportError, describe
from .output_files import read_json

INDEX = "model.safetensors.index.json"
#: What is downloaded of a model: weights, and what belongs beside them.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint that is a parameter, or one expert's part of it.

    Attributes:
        key: its name. file: where it is. expert: its place in the parameter's first dimension; None: it is all of it.
        shape: that it has if it is of this model.
    """

    key: str
    file: Path
    expert: int | None
    shape: tuple[int, ...]


class ModelWeights(ABC):
    """Where the weights of one model come from.

    Attributes:
        network: the model, perhaps on the meta device: its structure.
        name: a folder, a Hub id, or the class of a model that says neither.
        revision: the commit, of a model of the Hub, where that is known.
    """

    network: nn.Module
    name: str
    revision: str | None

    @contextmanager
    def opened(self) -> Iterator[ModelWeights]:
        """Lets go of files when the context ends."""
        yield self

    @abstractmethod
    def get(self, parameter: str) -> Tensor:
        """A parameter on the CPU, by its name in ``network``; nothing but the pages that are used is read.

        Raises:
            ExportError: it is quantised, or not there.
        """

    def record(self, kind: str, plans: Iterable[tuple[Plan, float]]) -> dict[str, Any]:
        """What was made of which model with which plans, as JSON."""
        model = {"model": self.name, "revision": self.revision}
        return {"austeer": __version__, "kind": kind, **model, "plans": describe(plans)}

    def optional(self, parameter: str | None) -> Tensor | None:
        """The same of a parameter that a module may lack."""
        if parameter is None:
            return None
        path, _, name = parameter.rpartition(".")
        return None if getattr(self.network.get_submodule(path), name, None) is None else self.get(parameter)


class LoadedWeights(ModelWeights):
    """Of a model in memory, offloaded or not."""

    def __init__(self, model: nn.Module):
        self.network = base_of(model)
        config = getattr(self.network, "config", None)
        self.name = name_of(self.network)
        self.revision = getattr(config, "_commit_hash", None)
        if is_steered(model):
            raise ExportError("the model is steered now, so its weights may be folded; export outside the with block")
        refuse_quantised(config, self.name)

    def get(self, parameter: str) -> Tensor:
        return _floating(parameter, read_parameter(self.network, parameter))


class StoredWeights(ModelWeights):
    """Of a checkpoint in safetensors files. Its files are read in place; a Hub id is downloaded if it is not there.

    Args:
        name: a folder, a Hub id, or "demo".

    Attributes:
        folder: where the files are. config: the model's.
        pieces: parameter's name in ``network`` -> the tensors that it is made of.
        keys: every tensor's name -> its file.

    Raises:
        ModelError: there is no such model. ExportError: it has no safetensors files, or is quantised.
    """

    def __init__(self, name: str | Path):
        self.name = DEMO_ID if str(name) == DEMO else str(name)
        self.folder = _folder(str(name))
        in_cache = self.folder.absolute().parent.name == "snapshots"
        self.revision = self.folder.name if in_cache else None
        self.config = load_config(str(self.folder))
        refuse_quantised(self.config, self.name)
        self.network = skeleton(self.config, named_dtype(self.config) or torch.float32)
        self.keys = _keys(self.folder, self.name)
        self.pieces = _pieces(self.network, self.keys)
        # One file at a time: while a file is open, so is what was read of it in memory.
        self._open: tuple[Path, Any] | None = None

    @contextmanager
    def opened(self) -> Iterator[StoredWeights]:
        try:
            yield self
        finally:
            self._open = None

    def get(self, parameter: str) -> Tensor:
        pieces = self.pieces.get(parameter)
        if pieces is None:
            raise ExportError(
                f"{self.name}: found no tensor for {parameter} in its safetensors files; they are incomplete or of "
                "another model: copy them anew"
            )
        parts = [_floating(piece.key, self.read(piece)) for piece in pieces]
        if pieces[0].expert is None:
            return parts[0]
        experts = len(self.network.get_parameter(parameter))
        if len(parts) != experts:
            raise ExportError(
                f"{self.name}: found {len(parts)} experts' tensors for {parameter}, expected {experts}; its files "
                "are incomplete or of another model: copy them anew"
            )
        return torch.stack(parts)

    def read(self, piece: Piece) -> Tensor:
        """A tensor as it is stored. Raises ExportError where it cannot be read, or has another shape."""
        try:
            if self._open is None or self._open[0] != piece.file:
                self._open = piece.file, safe_open(piece.file, framework="pt")
            found = self._open[1].get_tensor(piece.key)
        except (SafetensorError, OSError) as error:
            raise ExportError(
                f"{piece.file}: {piece.key} could not be read ({error}); copy or download it anew"
            ) from error
        if found.shape != piece.shape:
            raise ExportError(
                f"{piece.file}: found {piece.key} of shape {list(found.shape)}, expected {list(piece.shape)} by its "
                "config.json; they are of two models: copy or download both anew"
            )
        return found


def weights_of_model(model: nn.Module | str | Path) -> ModelWeights:
    """The weights of a model, or of the checkpoint with that name."""
    if isinstance(model, nn.Module):
        return LoadedWeights(model)
    if not isinstance(model, (str, Path)):
        raise ExportError(f"model: found {type(model).__name__}, expected a Transformers model, a folder or a Hub id")
    return StoredWeights(model)


def refuse_quantised(config: Any, name: str) -> None:
    """Raises ExportError if a config is of a quantised model."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ExportError(
        f"{name}: found weights quantised by {getattr(kind, 'value', kind)}, expected float ones; export for the model "
        "that it was quantised from. A LoRA adapter of that one can be served on the quantised model too (its "
        "strengths are then those of the unquantised weights); a folded checkpoint has to be quantised anew"
    )


def _floating(name: str, value: Tensor) -> Tensor:
    if type(value) not in (Tensor, nn.Parameter):
        raise ExportError(
            f"{name}: found a {type(value).__name__}, which is split or quantised, expected a plain tensor; export "
            "from the model's folder or Hub id"
        )
    if value.dtype not in FLOATING:
        raise ExportError(f"{name}: found {value.dtype}, expected one of {', '.join(map(str, FLOATING))}")
    return value


def _folder(name: str) -> Path:
    if name == DEMO:
        return demo_model()
    if Path(name).is_dir():
        return Path(name)
    load_config(name)  # says in our words what is wrong with a name
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r}: its files could not be downloaded: {one_line(error)}") from error


def _keys(folder: Path, name: str) -> dict[str, Path]:
    """Every tensor's file, by the index or else by the files' own headers."""
    index, single = folder / INDEX, folder / "model.safetensors"
    try:
        files = {path for path in [single] if path.is_file()}
        if index.is_file():
            listed = {folder / file for file in read_json(index)["weight_map"].values()}
            if files - listed:  # Transformers would read the file, others what is listed
                raise ExportError(f"{folder}: found {single.name} beside {INDEX}, which does not list it; remove one")
            files = listed
        found: dict[str, Path] = {}
        for file in sorted(files):
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ExportError(f"{folder}: its safetensors files could not be read ({error}); copy them anew") from error
    if not found:
        raise ExportError(
            f"{name}: found neither model.safetensors nor {INDEX}, expected a checkpoint in safetensors; load it with "
            "Transformers and save_pretrained it"
        )
    return found


def _pieces(network: nn.Module, keys: dict[str, Path]) -> dict[str, list[Piece]]:
    """Each parameter's tensors in the checkpoint, as Transformers would load them; what it would convert is left out.

    A conversion that only puts experts' matrices on top of each other is followed; tensors that it splits, turns or
    puts together otherwise are none of ours to edit.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import MergeModulelist, WeightConverter

    transforms = get_model_conversion_mapping(network)  # type: ignore[arg-type]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    names = {name: tuple(p.shape) for name, p in network.named_parameters()}
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    found: dict[str, list[Piece]] = {}
    for key in sorted(keys, key=_natural):
        name, merged = key, False
        if key not in names:
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            for converter in converters:
                name, pattern = converter.rename_source_key(name)
                if pattern is not None:
                    merged = True
                    operations = converter.operations
                    if len(operations) != 1 or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
                        name = ""
                    break
        for candidate in (name, name.removeprefix(prefix), f"{prefix}{name}"):
            if candidate in names:
                pieces = found.setdefault(candidate, [])
                shape = names[candidate]
                piece = (len(pieces), shape[1:]) if merged else (None, shape)
                pieces.append(Piece(key, keys[key], *piece))
                break
    return found


def _natural(key: str) -> list[tuple[int, str]]:
    """Experts in the order of their numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]
