"""What a forward pass takes before anything is steered, from the model's skeleton: bytes, operations, launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models.sites import Site
from ..models.structure import decoder_of, text_config
from .shapes import LayerWork, experts_of, share_of

#: Operations that allocate or describe a tensor, beside views.
_NO_WORK = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view"}
_NO_WORK |= {"detach", "lift_fresh", "lift_fresh_copy", "alias", "set_", "_local_scalar_dense", "item", "equal"}


def does_work(operation: torch._ops.OpOverload) -> bool:
    """Whether an operation computes or moves values: no view, no allocation, no look at a value by the host."""
    name = operation._schema.name.partition("::")[2]
    return operation.namespace != "prim" and not operation.is_view and name not in _NO_WORK


@dataclass(frozen=True)
class UnsteeredPass:
    """What one forward pass takes at least, and what it calls.

    Attributes:
        weights: bytes of the parameters that are read, each matrix once: rows of embeddings, and of a mixture's experts
            those that are expected to be chosen by some token, if all are as likely.
        cache: bytes of the key-value cache (or other state) after the pass, each moved once.
        activations: bytes of the inputs and outputs of all matrices.
        operations: of the products; norms, activation functions and rotations are left out.
        launches: operations that do work as Transformers calls them one by one, attention counted as one. None where
            the model's code cannot run without values. Fewer run once the model is compiled.
    """

    weights: int
    cache: int
    activations: int
    operations: int
    launches: int | None

    @property
    def bytes(self) -> int:
        return self.weights + self.cache + self.activations

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


def unsteered(
    network: nn.Module, layers: Sequence[Site], works: Sequence[LayerWork], batch: int, length: int, past: int
) -> UnsteeredPass:
    """A pass of ``length`` new tokens in each of ``batch`` rows, whose ``past`` earlier tokens are in the cache.
    Of the head only the last position of each row counts, as in generation.
    """
    tokens, size = batch * length, next(network.parameters()).dtype.itemsize
    parts: dict[nn.Module, tuple[int, tuple[int, int]]]  # each module's tokens, and share of experts
    parts = dict.fromkeys(decoder_of(network).modules(), (tokens, (1, 1)))
    for site in layers:
        block = network.get_submodule(site.path)
        experts = dict(experts_of(block, text_config(network)))
        parts |= {module: (tokens, share_of(path, experts)) for path, module in block.named_modules()}
    operations = sum(work.flops(tokens, batch * length * (past + length)) for work in works)
    head: nn.Module | None = network.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        parts[head] = (batch, (1, 1))
        operations += 2 * batch * head.weight.numel()  # type: ignore[operator]
    weights = values = 0.0
    for module, (count, share) in parts.items():
        read, moved = _parameters(module, count, share)
        weights, values = weights + read, values + count * moved
    try:
        launches, cache = traced(network, batch, length, past)
    except Exception:  # of someone else's code, which looked at values, say
        config = text_config(network)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        width *= config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads)
        launches, cache = None, 2 * width * batch * (past + length) * size
    return UnsteeredPass(round(weights) * size, cache, round(values) * size, operations, launches)


def _parameters(module: nn.Module, tokens: int, share: tuple[int, int]) -> tuple[float, float]:
    """Of a module alone: values of its parameters that are read, and of its matrices' inputs and outputs, a token."""
    run, of = share
    hit = run if tokens == 1 else of * (1 - (1 - run / of) ** tokens)  # experts that some token chooses
    read = moved = 0.0
    for name, p in module._parameters.items():
        if p is None:
            continue
        if isinstance(module, nn.Embedding) and p.dim() == 2:
            read += tokens * p.shape[1]
            continue
        read += p.numel() * hit / of
        if p.dim() >= 2 and not name.endswith("bias") and not isinstance(module, nn.Conv1d):
            times = run if p.dim() == 3 else run / of
            moved += times * (p.shape[-1] + p.shape[-2])
    return read, moved


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launches += does_work(func)
        return func(*args, **(kwargs or {}))


class _OneAttention(TorchFunctionMode):
    """Attention as the one operation that it is on real devices; without values PyTorch would take it apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
            self.calls += 1
            return given["query"].new_empty(*given["query"].shape[:-1], given["value"].shape[-1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def traced(network: nn.Module, batch: int, length: int, past: int) -> tuple[int, int]:
    """(operations that a pass calls, bytes of the cache after it), by running the skeleton, which has no values."""
    if getattr(network, "_can_set_experts_implementation", bool)():
        half = next(network.parameters()).dtype.itemsize == 2  # both are forms whose shapes need no values
        network.set_experts_implementation("grouped_mm" if half else "batched_mm")  # type: ignore[operator]
    text_config(network).pad_token_id = None  # with one some models look at the values of the ids
    ids = torch.zeros(batch, past + length, dtype=torch.long, device="meta")
    calls, attention = _Calls(), _OneAttention()
    with attention:
        cache = network(input_ids=ids[:, :past], use_cache=True).past_key_values if past else None
        attention.calls = 0
        with calls:
            out = network(input_ids=ids[:, past:], past_key_values=cache, use_cache=True)
    return calls.launches + attention.calls, sum(_bytes(out.past_key_values))


def _bytes(cache: Any) -> Iterator[int]:
    for layer in cache.layers:
        yield from (
            t.nbytes for t in tree_leaves(list(vars(layer).values())) if isinstance(t, torch.Tensor) and t.dim()
        )
