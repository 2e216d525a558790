"""What the tests of layer-by-layer measuring share: blocks of made-up texts, both orders of running, and snapshots."""

import random

import torch
from torch import nn

from austeer.forward.capture import LastTokens
from austeer.forward.packing import batches
from austeer.measuring.blocks import Block
from austeer.measuring.counting import Counting
from austeer.measuring.layerwise.layerwise import Layerwise
from austeer.models.hooks import hooks_on


def blocks_of(sizes=(5, 3), tokens=60, share=False):
    """Blocks of pairs with a prompt and two answers each, of unlike lengths; ``share``: in the first block."""
    choose = random.Random(0)

    def some(low, high):
        return [choose.randrange(3, 60) for _ in range(choose.randrange(low, high))]

    blocks, offset = [], 0
    for number, size in enumerate(sizes):
        prompts = [some(2, 9) for _ in range(size)]
        texts = [prompt + some(1, 5) for prompt in prompts] + [prompt + some(1, 5) for prompt in prompts]
        numbers = list(range(offset, offset + size))
        blocks.append(
            Block(
                number,
                offset,
                size,
                size,
                numbers,
                torch.arange(number % 2, size, 2),
                list(batches(texts, tokens, share and not number)),
                0,
                sum(map(len, texts)),
                "",
            )
        )
        offset += size
    return blocks


def counting_for(sites, device="cpu"):
    return {name: Counting(len(found), found[0].width, device) for name, found in sites.items()}


def counters_of(counting):
    """Of all pairs, and of one half of them."""
    found = {name: c.counters().tensors() for name, c in counting.items()}
    return found | {f"half of {name}": c.half_counters().tensors() for name, c in counting.items()}


def tensors_by_name(counting):
    """The running counters themselves, flat, by the names of :func:`counters_of`."""
    return {name: c.totals for name, c in counting.items()} | {f"half of {n}": c.half for n, c in counting.items()}


def in_plain_order(model, sites, blocks, tree="tensor"):
    """Every batch through the whole model: what must come out."""
    counting = counting_for(sites, model.device)
    capture = LastTokens(model, sites, max(2 * block.pairs for block in blocks))
    capture.tree = tree
    with capture.attached():
        for block in blocks:
            for batch in block.batches:
                capture.run(batch)
            for name in sites:
                counting[name].add(capture.buffers[name], block.pairs, block.offset, half=block.half)
    return counters_of(counting)


def layer_by_layer(model, sites, blocks, **options):
    """The counters, and the ``Layerwise`` that made them."""
    runner = Layerwise(model, sites, **options)
    counting = counting_for(sites, runner.device)
    runner.run(blocks, counting)
    return counters_of(counting), runner


def assert_equal(found, expected):
    """Counts must be the same; sums may be added up in another order."""
    assert found.keys() == expected.keys()
    for name, counters in expected.items():
        for what, values in counters.items():
            if values.dtype == torch.int64:
                assert torch.equal(found[name][what], values), (name, what)
            else:
                torch.testing.assert_close(found[name][what], values, rtol=0, atol=1e-12 * float(values.abs().max()))


def snapshot(model: nn.Module):
    """Everything that a run touches: what each module holds (by identity), its hooks, and its accelerate hooks."""
    state = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                state[path, key] = [(name, id(entry)) for name, entry in value.items()]
            elif key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                state[path, key] = list(value.items())
            else:
                state[path, key] = id(value) if isinstance(value, nn.Module) or callable(value) else repr(value)
        for i, hook in enumerate(hooks_on(module)):
            for key, value in vars(hook).items():
                if key != "input_device":  # noted anew by each forward pass
                    state[path, i, key] = id(value) if isinstance(value, dict) else repr(value)
        state[path, "order"] = list(vars(module))
    return state
