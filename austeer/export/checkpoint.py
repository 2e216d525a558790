"""Plan -> folded checkpoint: a model whose weights have the steering in them, for any engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import one_line
from ..plans.plan import Plan
from ..utils.progress import Progress
from .biases import NewBiases, new_biases, warn_of_unread
from .edits import Alpha, Edit, ExportError, edits_of, warn_of_another_model, with_alphas
from .folding import folded_bias, folded_weight
from .model_weights import INDEX, LoadedWeights, Piece, StoredWeights, weights_of_model
from .output_files import RECORD, REPLAY, check_output, nearest_folder, read_json, staged, write_json, write_replay
from .rewrite import DTYPES, SafetensorsHeader, TensorEntry, link_or_copy, read_header, rewrite


def export_checkpoint(
    plans: Plan | Sequence[Plan | tuple[Plan, Alpha]],
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    alpha: Alpha | None = None,
    kl: float | None = None,
    force: bool = False,
    link: bool = True,
    progress: bool | None = None,
) -> Path:
    """Writes a model with plans folded into its weights: a checkpoint as Transformers and every engine read it.

    The steered values are computed in float64 and rounded once to the dtype that the checkpoint stores; names and
    dtypes stay. ``shift`` goes into biases, those that ``austeer.steer`` writes it into (of the site ``layer``, its
    last projection's): the model's own, or those that a setting of the config gives it (``attention_bias``,
    ``mlp_bias`` ...), which is then set in the new config.json. Files with an edited tensor are written anew, one
    tensor in memory at a time; the others are linked (the same file on disk under a second name) or copied. Config,
    tokenizer and chat template go along, and ``austeer.json`` says what was folded in.

    Example:
        >>> out = austeer.export_checkpoint(plan, "models/tiny", "models/kind", alpha=8)
        >>> steered = type(model).from_pretrained(out)  # and nothing of austeer runs in it
        >>> {"config.json", "model.safetensors", "tokenizer.json"} < {file.name for file in out.iterdir()}
        True

    Args:
        plans: a plan, or several whose effects are summed, each perhaps with its own alpha: ``[(a, 8.0), (b, 0.5)]``.
        model: a folder or Hub id, read from its safetensors files; or a model in memory, offloaded or not, which is
            saved first (its tokenizer is not known).
        out: the folder to make.
        alpha: of plans that come without one; a number, or one for each of a plan's sites; 1 by default.
        kl: instead of alpha, of one plan with a dose, the KL on neutral text that is predicted, nats a token. What a
            strength does is measured by ``austeer.steer(model, plan, kl=...).alpha``.
        force: replaces ``out``.
        link: links untouched files where the file system can, so that what later writes into one of the two changes
            both; False copies them.
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Returns:
        The folder, with ``austeer_replay.json`` if the plan has a replay at this strength.

    Raises:
        PlanError: plans that are not for this model, or an alpha that is not finite.
        ExportError: a plan that is no edit of this model's weights (``push``; ``scale`` or ``ablate`` at the site
            ``layer``; ``shift`` without a bias), a quantised or steered model, ``out`` exists or has no space; nothing
            is there at ``out`` then.
    """
    pairs = with_alphas(plans, alpha, kl)
    if isinstance(model, nn.Module):
        return _of_loaded(model, pairs, out, force, progress)
    weights = weights_of_model(model)
    assert isinstance(weights, StoredWeights)
    with weights.opened():
        folding = _Folding(weights, pairs)
        needed = folding.bytes(link, Path(out))
        out = check_output(out, force, needed, (weights.folder, *folding.files, *along(weights.folder)))
        warn_of_another_model(pairs, weights.name)
        warn_of_unread(folding.biases, weights.config.get_text_config().model_type)
        with staged(out) as staging:
            folding.write(staging, link, progress)
    return out


def _of_loaded(
    model: nn.Module, pairs: list[tuple[Plan, float]], out: str | Path, force: bool, progress: bool | None
) -> Path:
    """Saves the model as Transformers does, and folds the files."""
    loaded = LoadedWeights(model)
    network: Any = loaded.network
    if hasattr(model, "get_base_model") or getattr(network, "_hf_peft_config_loaded", False):
        raise ExportError(  # save_pretrained would save the adapter alone
            "model: found one with PEFT adapters, expected a plain one; give model.merge_and_unload(), or the folder "
            "or Hub id of its base"
        )
    biases = new_biases(network, network.config, edits_of(network, pairs))  # errors come before it is saved
    if any(p.device.type == "meta" for p in network.parameters()) and not hasattr(network, "hf_device_map"):
        raise ExportError(
            "model: found weights that were offloaded, and not by a device_map, so Transformers cannot save them; give "
            "its folder or Hub id"
        )
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    out = check_output(out, force, 2 * size, [Path(loaded.name)] if Path(loaded.name).exists() else [])
    warn_of_another_model(pairs, loaded.name)
    warn_of_unread(biases, network.config.get_text_config().model_type)
    with staged(out) as staging:
        source = staging / ".source"
        try:
            network.save_pretrained(source, max_shard_size="5GB")  # what is offloaded is loaded a shard at a time
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ExportError(
                f"model: Transformers cannot save it ({one_line(error)}); give its folder or Hub id, or mend what is "
                "named"
            ) from error
        weights = StoredWeights(source)
        with weights.opened():
            weights.name = loaded.name
            _Folding(weights, pairs).write(staging, True, progress)
        shutil.rmtree(source)
    return out


class _Folding:
    """What has to be written where.

    Attributes:
        rewritten: a file -> its tensors that change. added: new tensors, by their names.
    """

    def __init__(self, weights: StoredWeights, pairs: list[tuple[Plan, float]]):
        self.weights, self.pairs = weights, pairs
        self.edits = edits_of(weights.network, pairs)
        self.biases: NewBiases = new_biases(weights.network, weights.config, self.edits)
        self.files = sorted(set(weights.keys.values()))
        for file in self.files:  # an index that names others would have us write beside the checkpoint
            if not file.is_relative_to(weights.folder) or ".." in file.relative_to(weights.folder).parts:
                raise ExportError(
                    f"{weights.folder / INDEX}: found {str(file)!r}, expected files below its own folder; copy the "
                    "checkpoint anew"
                )
        self.headers = {file: read_header(file) for file in self.files}
        self.rewritten: dict[Path, dict[str, TensorEntry]] = {}
        self.added: dict[str, TensorEntry] = {}
        for edit in self.edits:
            for piece, entry in self._entries(edit):
                self.rewritten.setdefault(piece.file, {})[piece.key] = entry
        self._add_biases()
        if self.added and not (weights.folder / INDEX).is_file():  # one file: they go into it
            self.rewritten.setdefault(self.files[0], {}).update(self.added)

    def _entries(self, edit: Edit) -> Iterator[tuple[Piece, TensorEntry]]:
        """The tensors of the checkpoint that an edit changes."""
        pieces = self._pieces(f"{edit.path}.{edit.weights.weight}")
        module = self.weights.network.get_submodule(edit.path)
        has_bias = edit.weights.bias is not None and getattr(module, edit.weights.bias, None) is not None
        biases = self._pieces(f"{edit.path}.{edit.weights.bias}") if has_bias else []
        for piece in pieces:
            shape, dtype = self._like(piece)
            if edit.rank:
                yield piece, TensorEntry(shape, dtype, partial(self._weight, edit, piece))
        for bias in biases:
            if edit.output is not None or edit.shifts:
                shape, dtype = self._like(bias)  # of experts' weights any will do: their inputs are not shifted
                yield bias, TensorEntry(shape, dtype, partial(self._bias, edit, pieces[0], bias, dtype))

    def _add_biases(self) -> None:
        shifting = {edit.path: edit for edit in self.edits}
        own = {name for name, _ in self.weights.network.named_parameters()}
        for name, shape in self.biases.shapes.items():
            path = name.rpartition(".")[0]
            if f"{path}.weight" not in own:  # tied to another, as the head to the embedding; its bias is not
                dtype = self._like(self._pieces(f"{self.edits[0].path}.{self.edits[0].weights.weight}")[0])[1]
                self.added[name] = TensorEntry(shape, dtype, partial(torch.zeros, shape, dtype=dtype, device="cpu"))
                continue
            (weight,) = self._pieces(f"{path}.weight")
            assert weight.key.endswith(".weight"), weight.key
            dtype = self._like(weight)[1]
            edit = shifting.get(path)
            make = (
                partial(torch.zeros, shape, dtype=dtype, device="cpu")
                if edit is None
                else partial(self._bias, edit, weight, None, dtype)
            )
            self.added[f"{weight.key.removesuffix('.weight')}.bias"] = TensorEntry(shape, dtype, make)

    def _pieces(self, parameter: str) -> list[Piece]:
        """As :meth:`StoredWeights.get`, without reading values."""
        if parameter not in self.weights.pieces:
            self.weights.get(parameter)  # raises
        return self.weights.pieces[parameter]

    def _like(self, piece: Piece) -> tuple[tuple[int, ...], torch.dtype]:
        header: SafetensorsHeader = self.headers[piece.file]
        entry = header.entries[piece.key]
        if entry["dtype"] not in DTYPES:
            raise ExportError(
                f"{piece.file}: {piece.key} is {entry['dtype']}, expected one of {', '.join(DTYPES)}; export for the "
                "model that this one was quantised from"
            )
        return tuple(entry["shape"]), DTYPES[entry["dtype"]]

    def _weight(self, edit: Edit, piece: Piece) -> Tensor:
        return folded_weight(edit, self.weights.read(piece))

    def _bias(self, edit: Edit, weight: Piece, bias: Piece | None, dtype: torch.dtype) -> Tensor:
        return folded_bias(edit, self.weights.read(weight), None if bias is None else self.weights.read(bias), dtype)

    def bytes(self, link: bool, out: Path) -> int:
        """That writing to ``out`` takes on its disk."""
        device = nearest_folder(out).stat().st_dev
        linked = {f for f in self.files if link and f not in self.rewritten and f.resolve().stat().st_dev == device}
        sizes = [file.stat().st_size for file in (*self.files, *along(self.weights.folder)) if file not in linked]
        return sum(sizes) + sum(entry.bytes for entry in self.added.values())

    def write(self, staging: Path, link: bool, progress: bool | None) -> None:
        """The whole checkpoint, into a folder that exists."""
        folder, record = self.weights.folder, self.record()
        metadata = {"austeer": json.dumps(record)}
        for file in along(folder):
            shutil.copyfile(file, _place(file, folder, staging))
        with Progress("folding", len(self.files), "files", progress) as bar:
            for file in self.files:
                target = _place(file, folder, staging)
                if file in self.rewritten:
                    rewrite(file, target, self.rewritten[file], metadata)
                else:
                    link_or_copy(file, target, link)
                bar.advance()
        if self.added and (folder / INDEX).is_file():
            self._write_shard(staging, metadata)
        if self.biases.settings:
            self._write_config(staging / "config.json")
        write_json(staging / RECORD, record)
        if "base" not in record:  # a replay is of the plan alone
            write_replay(staging, self.pairs)

    def _write_shard(self, staging: Path, metadata: dict[str, str]) -> None:
        """New biases in a shard of their own, so that others need not be written anew."""
        index = read_json(self.weights.folder / INDEX)
        name, number = "model-biases.safetensors", 1
        while name in index["weight_map"].values():
            number += 1
            name = f"model-biases-{number}.safetensors"
        rewrite(None, staging / name, self.added, metadata)
        index["weight_map"] |= dict.fromkeys(self.added, name)
        index["weight_map"] = dict(sorted(index["weight_map"].items()))
        totals = index.setdefault("metadata", {})
        if "total_size" in totals:
            totals["total_size"] += sum(entry.bytes for entry in self.added.values())
        if "total_parameters" in totals:
            totals["total_parameters"] += sum(entry.bytes // entry.dtype.itemsize for entry in self.added.values())
        write_json(staging / INDEX, index)

    def _write_config(self, path: Path) -> None:
        raw, config = read_json(path), self.weights.config
        text = config.get_text_config()
        if text is config:
            at = raw
        else:
            name = next(name for name in config.sub_configs if getattr(config, name, None) is text)
            at = raw.setdefault(name, {})
        at.update(dict.fromkeys(self.biases.settings, True))
        write_json(path, raw)

    def record(self) -> dict[str, Any]:
        """What was done to which model, as JSON."""
        folder = self.weights.folder
        found = self.weights.record("checkpoint", self.pairs)
        found["rewritten"] = [str(file.relative_to(folder)) for file in self.files if file in self.rewritten]
        if self.biases.settings:
            found["biases"] = {"settings": list(self.biases.settings), "added": len(self.added)}
        if (folder / RECORD).is_file():  # the model was a folded one already
            found["base"] = read_json(folder / RECORD)
        return found


def _place(file: Path, folder: Path, staging: Path) -> Path:
    """Where a file of the checkpoint is written; the folders above it are made."""
    target = staging / file.relative_to(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


#: Of the files beside the weights, those that belong to the model; params.json is of Mistral's own format.
_ALONG = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
_LEFT = ("params.json", "adapter_config.json", RECORD, REPLAY)


def along(folder: Path) -> list[Path]:
    """The files beside the weights that belong to the model."""
    here = (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja"))
    return sorted(
        file
        for file in here
        if file.is_file()
        and (file.suffix in _ALONG or file.name.startswith(("LICENSE", "NOTICE")))
        and file.name not in _LEFT
        and (file.name == INDEX or not file.name.endswith(".index.json"))
    )
