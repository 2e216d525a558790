"""What any Transformers model is made of: its decoder inside its wrappers, its config, its devices, its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import SiteError

#: Decoder (not its wrapper, so that a model and its head-less part are one) -> how many AUs of it are steered.
steered: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def base_of(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s and PEFT's wrappers, or the model itself."""
    model = unwrap(model)
    return unwrap(model.get_base_model()) if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def decoder_of(model: nn.Module) -> nn.Module:
    """The language model without its head and without what encodes images: what has to run to fill every site.

    The same module for a model with a head, without one, compiled, or in PEFT's wrapper.
    """
    model = base_of(model)
    decoder: nn.Module | None = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    # ModernBERT's decoder calls its head so, which has no layers
    if decoder is None or not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return getattr(model, getattr(model, "base_model_prefix", "") or "_", model)
    inner = getattr(decoder, "model", None)  # Llama 4's text model with a head calls itself the decoder
    return decoder_of(inner) if isinstance(inner, nn.Module) and hasattr(inner, "get_decoder") else decoder


def has_module(parent: nn.Module, path: str) -> bool:
    try:
        parent.get_submodule(path)
    except AttributeError:
        return False
    return True


def text_config(model: nn.Module):
    """The config of the language model; raises SiteError where there is none, or more than one."""
    config = getattr(unwrap(model), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise SiteError(f"{type(model).__name__}: found no config, expected a Transformers model")
    return text_config_of(config, type(unwrap(model)).__name__)


def text_config_of(config, what: str = "config"):
    """The language model's part of a Transformers config; ``what`` names the model in the SiteError."""
    try:
        return config.get_text_config()
    except ValueError as error:  # Musicgen has a text encoder and a decoder of audio
        raise SiteError(
            f"{what} ({config.model_type}): found several text models in its config ({', '.join(config.sub_configs)}), "
            "expected a decoder alone"
        ) from error


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first weight that is no quantised one; float32 if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def name_of(model: nn.Module) -> str:
    """What a model was loaded by, a folder or Hub id; of one that was made anew its class."""
    model = unwrap(model)
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def input_device(model: nn.Module) -> torch.device:
    """Where a model expects its token ids: its embedding's device (the first real one for an offloaded model)."""
    weight = token_embedding(model).weight
    if weight.device.type != "meta":
        return weight.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights are loaded each time they are used."""
    return any(p.device.type == "meta" for p in model.parameters())


def is_steered(model: nn.Module) -> bool:
    """Whether a plan is on the model now."""
    return decoder_of(unwrap(model)) in steered


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether a PEFT adapter puts tokens of its own before the prompt (prompt or prefix tuning)."""
    return bool(getattr(getattr(unwrap(model), "active_peft_config", None), "is_prompt_learning", False))


def first_tensor(output: Tensor | tuple | list) -> Tensor:
    """A module's output without what comes beside it (attention weights, a router's logits)."""
    return output[0] if isinstance(output, (tuple, list)) else output


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens have an embedding."""
    return token_embedding(model).num_embeddings


def token_embedding(model: nn.Module) -> Any:
    """The embedding of a model's text tokens; raises SiteError where it takes images, or audio."""
    try:
        embedding = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    embedding = getattr(embedding, "base_layer", embedding)  # PEFT's wrapper of one
    if not hasattr(embedding, "weight") or not hasattr(embedding, "num_embeddings"):
        raise SiteError(
            f"{type(unwrap(model)).__name__}: found {type(embedding).__name__} as its input embedding, expected a "
            "model that takes text tokens"
        )
    return embedding


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the context: dropout would change what is read."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def first_layers(model: nn.Module, path: str, count: int) -> Iterator[None]:
    """The model with the first ``count`` entries of the module list at ``path``; afterwards as it was."""
    parent, _, name = path.rpartition(".")
    owner = unwrap(model).get_submodule(parent)
    layers = owner._modules[name]
    assert layers is not None
    if count >= len(layers._modules):
        yield
        return
    fewer = nn.ModuleList()
    fewer.training = layers.training
    fewer._modules = dict(list(layers._modules.items())[:count])  # type: ignore[arg-type]
    owner._modules[name] = fewer
    try:
        yield
    finally:
        owner._modules[name] = layers
