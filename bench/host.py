"""Host time that steering adds to a decoded token, for each steered site: what a fast model waits for.

    python -m bench.host [--rounds 40] [--json]

One site of a narrow Llama with random weights: its MLP is called over and over under every variant, in turns with an
unsteered twin, so that nothing else is in the difference. On a CPU with one thread this is time to the end; on a GPU
the time until everything is queued, and the GPU is waited for between the runs, not inside them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import austeer
from austeer.models.sites import find_sites
from austeer.steering.steering import Steering

from . import command, files, report, shapes
from .graphs import no_collection, spread, wait
from .plain_ways import AGAIN
from .plans import spread_plan

SITE, AUS_A_LAYER, ALPHA = "ffn", 4, 0.5
PROMPT, CALLS = 8, 100


@dataclass(frozen=True)
class Variant:
    """One way to steer.

    Attributes:
        plans: one plan or several by name. rows: the names for the rows of the batch, cut or repeated to fit it.
        prompt: what the model is told of the prompt's length, in tokens.
    """

    plans: Any
    mode: str = "auto"
    scope: str | tuple[int, int] = "all"
    rows: tuple[str | None, ...] = ()
    prompt: int | None = None

    def steering(self, model: nn.Module, batch: int) -> Steering:
        """Not yet attached."""
        steering = austeer.steer(model, self.plans, ALPHA, scope=self.scope, mode=self.mode)
        if self.rows:
            steering.rows([self.rows[i % len(self.rows)] for i in range(batch)])
        if self.prompt is not None:
            steering.prompt_length = self.prompt
        return steering


def build_model(layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "head_dim": 16}
    return shapes.build(shapes.tiny(shapes.LLAMA_8B, **sizes), device, dtype)


def variants(model: nn.Module) -> dict[str, Variant]:
    """Every way to steer, by name, with the same number of random AUs in every layer, so that every site costs."""
    count = AUS_A_LAYER * len(find_sites(model, [SITE])[SITE])

    def plan(operation: str, seed: int = 0) -> austeer.Plan:
        return spread_plan(model, SITE, count, seed=seed, operation=operation)

    scale = plan("scale")
    same = {name: plan("scale", seed) for seed, name in enumerate("abc")}
    mixed = {"a": same["a"], "b": plan("shift", 1), "c": plan("push", 2)}
    some = ("a", None, "b", "c")
    return {
        "scale": Variant(scale),
        "scale, columns": Variant(scale, mode="columns"),
        "push": Variant(plan("push")),
        "shift": Variant(plan("shift")),
        "generation, in scope": Variant(scale, scope="generation", prompt=PROMPT),
        "generation, out of scope": Variant(scale, scope="generation", prompt=1000),
        "tokens 0 to 15": Variant(scale, scope=(0, 16)),
        "rows of three plans": Variant(same, rows=some),
        "rows, scale, shift and push": Variant(mixed, rows=some),
        "scale, fused": Variant(scale, mode="fused"),
        "scale, dense": Variant(scale, mode="dense"),
    }


@torch.no_grad()
def one_site(model: nn.Module, steering: Steering | None, batch: int, rounds: int) -> list[float]:
    """What steering adds to one call of the first layer's MLP for a decoded token, host us, round by round."""
    layer = model.get_submodule(find_sites(model, [SITE])[SITE][0].path)
    twin, weight = copy.deepcopy(layer), next(layer.parameters())
    prompt = torch.randint(3, 64, (batch, PROMPT), device=weight.device)
    x = torch.randn(batch, 1, model.config.hidden_size).to(weight)  # type: ignore[union-attr]
    with nullcontext() if steering is None else steering:
        cache = model(prompt, use_cache=True).past_key_values
        model(prompt[:, :1], past_key_values=cache, use_cache=True)  # a scope and rows hold for the last pass
        added = []
        for number in range(rounds + 1):  # one more, not counted, warms up
            pair = (layer, twin) if number % 2 else (twin, layer)
            took = [seconds(lambda module=module: module(x), x.device) for module in pair]
            if number:
                added.append((took[0] - took[1] if number % 2 else took[1] - took[0]) * 1e6)
        return added


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Host seconds of one of many calls; the device is waited for around them all."""
    wait(device)
    with no_collection():
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        took = time.perf_counter() - begin
    wait(device)
    return took / CALLS


def measure(model: nn.Module, batch: int, rounds: int) -> dict[str, Any]:
    """What each variant adds at one batch size, and which paths it takes; first what a twin differs by."""
    gc.collect()
    rows = {AGAIN: {"path": "", "us_by_itself": asdict(spread(one_site(model, None, batch, rounds)))}}
    for name, variant in variants(model).items():
        steering = variant.steering(model, batch)
        path = " and ".join(sorted({row.path for row in steering.report()}))
        rows[name] = {"path": path, "us_by_itself": asdict(spread(one_site(model, steering, batch, rounds)))}
    return {"batch": batch, "variants": rows}


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The content of the result file."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(options.layers, device, dtype)
    batches = []
    for batch in options.batch:
        report.say(f"batch {batch}: {options.rounds} rounds of {len(variants(model)) + 1} variants")
        batches.append(measure(model, batch, options.rounds))
    known = {"dtype": str(dtype).removeprefix("torch."), "site": SITE, "aus_a_layer": AUS_A_LAYER}
    sizes = {"sites": options.layers, "rounds": options.rounds, "batches": batches}
    yield {"kind": "host", "environment": files.about(device, options.commit), **known, **sizes}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("host", __doc__)
    parser.add_argument("--rounds", type=command.rounds, default=40, help="at least 2")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args(argv)
    if min(options.layers, *options.batch) < 1:
        parser.error("expected at least 1 layer and row")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parse(argv)
    torch.set_num_threads(1)
    command.measure("host", options, run(options, command.device()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
