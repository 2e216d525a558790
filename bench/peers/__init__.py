"""Other ways to measure activation momentum, written here from their descriptions, to be measured beside ours.

Each gives, for every site, how often the positive and the negative text's activation was the larger one:
site -> (positive, negative), int64 [layers, width].

Other libraries' ways to steer are in ``libraries.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor
from transformers import PreTrainedModel

SITES = ("attention", "ffn")

Counts = dict[str, tuple[Tensor, Tensor]]


@contextmanager
def reading(model: PreTrainedModel, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls ``keep(site, activations)`` at both sites of every layer of a Llama, first layer first.

    The activations are [batch, tokens, width]: the attention output projection's input, and the MLP's output.
    """
    with ExitStack() as stack:
        for layer in model.get_decoder().layers:
            handles = (
                layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: keep("attention", args[0])),
                layer.mlp.register_forward_hook(lambda module, args, output: keep("ffn", output)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield
