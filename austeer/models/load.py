"""Loading models for the command line and the demo; the library itself takes models as they are."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import ModelError, one_line
from ..utils.machine import free_memory
from .demo_model import DEMO, DEMO_ID
from .sites import layers_path
from .skeleton import dtypes, load_config, parse_dtype, skeleton, source_of
from .structure import decoder_of

#: The part of a device's free memory that weights may take; batches need some, too.
WEIGHTS = 0.8


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, in evaluation mode.

    Args:
        name: a folder or Hub id for ``from_pretrained``, or "demo" for SmolLM2-135M-Instruct (:func:`demo_model`).
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda:0" ..., or an accelerate ``device_map`` such as "auto"; by default CUDA if there is one.

    Raises:
        ModelError: the model cannot be found or loaded.
    """
    return _load(name, dtype, _device(device), {"device_map": _device(device)})


def load_offloaded(
    name: str, dtype: str = "auto", device: str | None = None, offload_folder: str | Path | None = None
) -> tuple[Any, Any]:
    """The same with the weights left on disk, for ``measure(strategy="layerwise")``; takes seconds and no memory.

    What is not in the format of the model's code (the experts of most mixtures, one tensor each) is converted into
    ``offload_folder`` first: it is read and written once more, and needs as much space there. With a dtype other than
    the checkpoint's, loading reads every weight once, and each is converted again when it is used.

    Args:
        name, dtype: as in :func:`load_model`. device: where to compute, no device map.
        offload_folder: by default a temporary one, which goes with the model.

    Raises:
        ModelError: the model cannot be found or loaded.
        SiteError: its layers are not known.
    """
    device = _device(device)
    folder = Path(offload_folder or tempfile.mkdtemp(prefix="austeer-offload-"))
    try:
        where = _offloading(_skeleton(name, dtype), device)
        model, tokenizer = _load(name, dtype, device, {"device_map": where, "offload_folder": folder})
    except BaseException:
        if offload_folder is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if offload_folder is None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model, tokenizer


def fits(name: str, dtype: str = "auto", device: str | None = None) -> bool:
    """Whether a model's weights fit into the free memory of a device (of all GPUs, for a device map).

    Raises:
        ModelError: the model's config cannot be found or read.
    """
    device = _device(device)
    try:
        where = [torch.device(device)]
    except RuntimeError:  # a device map
        where = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    if getattr(load_config(name), "quantization_config", None) is not None:
        return True  # its size is not known; it is loaded as its maker meant it
    model = _skeleton(name, dtype)
    needed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return needed <= WEIGHTS * sum(map(free_memory, where))


def _load(name: str, dtype: str, device: str, how: dict[str, Any]) -> tuple[Any, Any]:
    """``how``: what ``from_pretrained`` is given besides."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = parse_dtype(dtype)
    try:
        source = source_of(name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, **how)
    except (OSError, ValueError, RuntimeError, AssertionError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model {name!r} could not be loaded on {device}: {one_line(error)}. "
            f"Expected a folder with config.json and safetensors, a Hub id, or {DEMO!r}"
        ) from error
    if name == DEMO:
        model.config._name_or_path = DEMO_ID
    return model.eval(), tokenizer


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _skeleton(name: str, dtype: str) -> Any:
    """The model without weights, from its config alone."""
    config = load_config(name)
    return skeleton(config, dtypes(config, dtype)[1])


def _offloading(model: Any, device: str) -> dict[str, str]:
    """The device map that leaves all but the small modules around the decoder's layers on disk."""
    decoder, layers = decoder_of(model), model.get_submodule(layers_path(model))
    on_disk = {*layers.children(), decoder.get_input_embeddings()}  # type: ignore[operator]
    inside = set(decoder.modules())

    def places(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        if module not in on_disk and not on_disk.isdisjoint(module.modules()):
            for name, child in module.named_children():
                yield from places(f"{path}.{name}".lstrip("."), child)
        elif any(True for _ in (*module.parameters(), *module.buffers())):
            yield path, "disk" if module in on_disk or module not in inside else device

    return dict(places("", model))
