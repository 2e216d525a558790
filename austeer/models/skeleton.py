"""A model without its weights, built from its config alone.

The skeleton is a real Transformers model on torch's meta device, where a tensor has a shape and no storage. So sites,
masks and layer kinds are found on it as on the model itself, and a model of any size takes a second.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, one_line
from .demo_model import DEMO, demo_model
from .structure import text_config_of

CONFIG_NAME = "config.json"


def source_of(name: str) -> str:
    """The folder or Hub id that a model's name stands for, once it is known that there is such a thing.

    Transformers would ask the Hub for half a minute, also for a folder's name that is mistyped.

    Raises:
        ModelError: there is neither.
    """
    from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    if name == DEMO:
        return str(demo_model())
    expected = f"expected a folder with config.json and safetensors, a Hub id, or {DEMO!r}"
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in (CONFIG_NAME, "adapter_config.json")):
            raise ModelError(f"model {name!r}: found a folder without {CONFIG_NAME}, {expected}")
        return str(path)
    if path.exists():
        if path.suffix != ".json":
            raise ModelError(f"model {name!r}: found a file, {expected}")
        return str(path)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(f"model {name!r}: found no folder of that name, {expected}; check the path") from error
    if isinstance(try_to_load_from_cache(name, CONFIG_NAME), str):
        return name
    try:
        HfApi().get_hf_file_metadata(url=hf_hub_url(name, CONFIG_NAME))
    except GatedRepoError:  # Transformers tells how to get access
        return name
    except RepositoryNotFoundError as error:
        reason: Exception = error
    except HfHubHTTPError:  # it is there
        return name
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = error
    else:
        return name
    raise ModelError(
        f"model {name!r}: found no folder of that name here, and the Hub gave none ({one_line(reason)[:120]}); "
        f"{expected}. Check the name"
    ) from reason


def load_config(name: str):
    """The config of a model: a folder or Hub id, or "demo". Nothing else is read or downloaded.

    Raises:
        ModelError: there is none, or Transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source_of(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model {name!r}: its config could not be read: {one_line(error)}. "
            f"Expected a folder with config.json, a Hub id, or {DEMO!r}"
        ) from error


def load_tokenizer(name: str):
    """The tokenizer of a model, as :func:`load_config` names it; None if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source_of(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def named_dtype(config) -> torch.dtype | None:
    """The dtype that a checkpoint was saved in, by its config; None if it names none."""
    named = getattr(config, "dtype", None) or getattr(text_config_of(config), "dtype", None)
    return getattr(torch, named) if isinstance(named, str) else named


def dtypes(config, wanted: str = "auto") -> tuple[torch.dtype, torch.dtype]:
    """The dtype of a checkpoint (float32 if its config names none), and the one that ``wanted`` loads it in.

    Raises:
        ModelError: ``wanted`` is no dtype that models are loaded in.
    """
    loaded = parse_dtype(wanted)
    saved = named_dtype(config) or torch.float32
    return saved, loaded if isinstance(loaded, torch.dtype) else saved


def checkpoint_files(name: str) -> list[Path]:
    """The safetensors files of a model, as far as they are on this machine; nothing is downloaded."""
    folder = demo_model() if name == DEMO else Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):  # not in the Hub's cache, or no name of the Hub's
            return []
    return sorted(folder.glob("*.safetensors"))


def skeleton(config, dtype: torch.dtype) -> nn.Module:
    """The model of a config on the meta device, as ``from_pretrained(..., dtype=dtype)`` would build it.

    A quantised checkpoint's is that of the model before it was quantised.

    Raises:
        ModelError: Transformers has no causal language model for this config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    config = copy.deepcopy(config)  # from_config writes the dtype into it
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype).eval()
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"config of {config.model_type!r}: no model could be built from it: {one_line(error)}. "
            "Expected the config of a decoder that Transformers has"
        ) from error


def parse_dtype(dtype: str) -> torch.dtype | str:
    """A dtype that models are loaded in, by its name; "auto" stays."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(f"dtype: found {dtype!r}, expected auto, float32, bfloat16 or float16")
    return dtype if dtype == "auto" else getattr(torch, dtype)
