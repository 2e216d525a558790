"""Host time that steering adds to a decoded token, for each steered site: what a fast model waits for.

    python -m bench.host [--rounds 40] [--json]

A Llama of 30 layers and width 64 with random weights, of which nearly all time is the host's. Each round decodes some
tokens under every variant, in a new random order, and unsteered twice; what a variant adds is its difference to the
unsteered run of the same round, over its steered sites. Beside it stands one site by itself: its MLP called over and
over, in turns with an unsteered twin; less is around it, so less noise and warmer caches. On a CPU with one thread this
is time to the end; on a GPU the time until everything is queued, and the GPU is waited for between the runs, not inside
them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import austeer
from austeer.sites import find_sites
from austeer.steering import Steering

from . import command, files, report, shapes
from .graphs import no_collection, spread, wait
from .plain_ways import AGAIN, UNSTEERED
from .plans import spread_plan

SITE, AUS_A_LAYER, ALPHA = "ffn", 4, 0.5
PROMPT = 8


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
    """The launch-bound proxy."""
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
def _decode(model: nn.Module, prompt: Tensor, steps: int) -> float:
    """Host seconds a forward pass of one token a row; the prompt and one token come before the clock starts."""
    token = prompt[:, :1]
    cache = model(prompt, use_cache=True).past_key_values
    model(token, past_key_values=cache, use_cache=True)
    return _calls(lambda: model(token, past_key_values=cache, use_cache=True), prompt.device, steps)


def _calls(call: Callable[[], Any], device: torch.device, times: int) -> float:
    """Host seconds of one of some calls; the device is waited for around them all."""
    wait(device)
    begin = time.perf_counter()
    for _ in range(times):
        call()
    took = time.perf_counter() - begin
    wait(device)
    return took / times


@torch.no_grad()
def one_site(model: nn.Module, steering: Steering | None, prompt: Tensor, rounds: int, calls: int = 100) -> list[float]:
    """What steering adds to one call of the first layer's MLP, host us, round by round."""
    layer = model.get_submodule(find_sites(model, [SITE])[SITE][0].path)
    twin, weight = copy.deepcopy(layer), next(layer.parameters())
    x = torch.randn(prompt.shape[0], 1, model.config.hidden_size).to(weight)  # type: ignore[union-attr]
    if steering is not None:
        steering.attach()
    try:
        _decode(model, prompt, 1)  # a scope and rows hold for the pass that was begun last
        added = []
        for number in range(rounds + 1):
            pair = (layer, twin) if number % 2 else (twin, layer)
            took = [_calls(lambda module=module: module(x), x.device, calls) for module in pair]
            if number:
                added.append((took[0] - took[1] if number % 2 else took[1] - took[0]) * 1e6)
        return added
    finally:
        if steering is not None:
            steering.detach()


def measure(model: nn.Module, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """What each variant adds at one batch size. One more round, not counted, warms up."""
    prompt = torch.randint(3, 64, (batch, PROMPT), device=next(model.parameters()).device)
    steerings = {name: way.steering(model, batch) for name, way in variants(model).items()}
    order, shuffle = [UNSTEERED, AGAIN, *steerings], random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    paths: dict[str, str] = {UNSTEERED: "", AGAIN: ""}
    sites = dict.fromkeys(order, len(find_sites(model, [SITE])[SITE]))
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            steering = steerings.get(name)
            if steering is not None:
                steering.attach()
            gc.collect(0)
            try:
                with no_collection():
                    took = _decode(model, prompt, steps)
            finally:
                if steering is not None:
                    found = steering.report()
                    paths[name], sites[name] = " and ".join(sorted({row.path for row in found})), len(found)
                    steering.detach()
            if number:
                seconds[name].append(took)
    base = seconds[UNSTEERED]
    rows = {}
    for name in (AGAIN, *steerings):
        added = [(a - b) / sites[name] * 1e6 for a, b in zip(seconds[name], base)]
        rows[name] = {
            "path": paths[name],
            "us_a_site": asdict(spread(added)),
            "us_by_itself": asdict(spread(one_site(model, steerings.get(name), prompt, rounds))),
        }
    same = rows[AGAIN]["us_a_site"]
    # How far two measurements of the unsteered model lie apart: no smaller difference is one.
    noise = max(abs(same["median"]), (same["high"] - same["low"]) / 2)
    return {"batch": batch, "unsteered_us": statistics.median(base) * 1e6, "variants": rows, "noise_us": noise}


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The content of the result file."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(options.layers, device, dtype)
    batches = []
    for batch in options.batch:
        report.say(f"batch {batch}: {options.rounds} rounds of {len(variants(model)) + 2} variants")
        batches.append(measure(model, batch, options.rounds, options.steps))
    return {
        "kind": "host",
        "environment": files.about(device, options.commit),
        "dtype": str(dtype).removeprefix("torch."),
        "sites": options.layers,
        "site": SITE,
        "aus_a_layer": AUS_A_LAYER,
        "rounds": options.rounds,
        "steps": options.steps,
        "batches": batches,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("host", __doc__)
    parser.add_argument("--rounds", type=int, default=40, help="at least 2")
    parser.add_argument("--steps", type=int, default=4, help="decoded tokens a run")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args(argv)
    if options.rounds < 2 or min(options.steps, options.layers, *options.batch) < 1:
        parser.error("expected at least 2 rounds, and at least 1 step, layer and row")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parse(argv)
    torch.set_num_threads(1)
    command.measure("host", options, [run(options, command.device())], report.show_host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
