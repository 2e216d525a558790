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
import dataclasses
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import austeer
from austeer.models.sites import find_sites, fingerprint
from austeer.steering.steering import Steering

from . import files, report
from .graphs import no_collection, spread, wait

UNSTEERED, AGAIN = "unsteered", "unsteered again"
SITE, AUS_A_LAYER, ALPHA = "ffn", 4, 0.5
PROMPT = 8
GOAL_US = 10.0


@dataclass(frozen=True)
class Variant:
    """One way to steer.

    Attributes:
        plans: one plan or several by name. rows: the names for the rows of the batch, cut or repeated to fit it.
        goal: whether the path is one that ``auto`` takes, for which there is a goal.
        prompt: what the model is told of the prompt's length, in tokens.
    """

    plans: Any
    mode: str = "auto"
    scope: str | tuple[int, int] = "all"
    rows: tuple[str | None, ...] = ()
    prompt: int | None = None

    @property
    def goal(self) -> bool:
        return self.mode == "auto"

    def steering(self, model: nn.Module, batch: int) -> Steering:
        """Not yet attached."""
        steering = austeer.steer(model, self.plans, ALPHA, scope=self.scope, mode=self.mode)
        if self.rows:
            steering.rows([self.rows[i % len(self.rows)] for i in range(batch)])
        if self.prompt is not None:
            steering.prompt_length = self.prompt
        return steering


def build_model(layers: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The launch-bound proxy."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(device, dtype)


def build_plan(model: nn.Module, operation: str, seed: int = 0) -> austeer.Plan:
    """Random AUs, the same number in every layer, so that every site costs."""
    print_ = fingerprint(model, find_sites(model))
    generator = torch.Generator().manual_seed(seed)
    width, count = print_.widths[SITE], print_.layers * AUS_A_LAYER
    index = torch.cat([torch.randperm(width, generator=generator)[:AUS_A_LAYER] for _ in range(print_.layers)])
    return austeer.Plan(
        site=(SITE,) * count,
        layer=torch.arange(print_.layers).repeat_interleave(AUS_A_LAYER).int(),
        index=index.int(),
        beta=torch.rand(count, generator=generator) * 2 - 1,
        delta=torch.randn(count, generator=generator) * 0.1,
        operation=operation,
        model=print_,
        pairs=10,
    )


def variants(model: nn.Module) -> dict[str, Variant]:
    """Every way to steer, by name."""
    scale, push, shift = (build_plan(model, operation) for operation in ("scale", "push", "shift"))
    same = {name: build_plan(model, "scale", seed) for seed, name in enumerate("abc")}
    mixed = {"a": same["a"], "b": build_plan(model, "shift", 1), "c": build_plan(model, "push", 2)}
    some = ("a", None, "b", "c")
    return {
        "scale": Variant(scale),
        "scale, columns": Variant(scale, mode="columns"),
        "push": Variant(push),
        "shift": Variant(shift),
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
    wait(prompt.device)
    begin = time.perf_counter()
    for _ in range(steps):
        model(token, past_key_values=cache, use_cache=True)
    took = time.perf_counter() - begin
    wait(prompt.device)
    return took / steps


@torch.no_grad()
def one_site(model: nn.Module, steering: Steering | None, prompt: Tensor, rounds: int, calls: int = 100) -> list[float]:
    """What steering adds to one call of the first layer's MLP, host us, round by round."""
    layer = model.get_submodule(find_sites(model, [SITE])[SITE][0].path)
    twin, x = (
        copy.deepcopy(layer),
        torch.randn(prompt.shape[0], 1, model.config.hidden_size).to(next(layer.parameters())),
    )
    if steering is not None:
        steering.attach()
    try:
        _decode(model, prompt, 1)  # a scope and rows hold for the pass that was begun last
        added = []
        for number in range(rounds + 1):
            took = [_calls(module, x, calls) for module in ((layer, twin) if number % 2 else (twin, layer))]
            if number:
                added.append((took[0] - took[1] if number % 2 else took[1] - took[0]) * 1e6)
        return added
    finally:
        if steering is not None:
            steering.detach()


def _calls(module: nn.Module, x: Tensor, calls: int) -> float:
    wait(x.device)
    begin = time.perf_counter()
    for _ in range(calls):
        module(x)
    took = time.perf_counter() - begin
    wait(x.device)
    return took / calls


def measure(
    model: nn.Module,
    batch: int,
    rounds: int,
    steps: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What each variant adds at one batch size. One more round, not counted, warms up."""
    prompt = torch.randint(3, 64, (batch, PROMPT), device=next(model.parameters()).device)
    ways = variants(model)
    steerings = {name: way.steering(model, batch) for name, way in ways.items()}
    order, shuffle = [UNSTEERED, AGAIN, *ways], random.Random(0).shuffle
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
        on_round()
    base = seconds[UNSTEERED]
    rows = {}
    for name in (AGAIN, *ways):
        added = [(a - b) / sites[name] * 1e6 for a, b in zip(seconds[name], base)]
        rows[name] = {
            "path": paths[name],
            "goal": name in ways and ways[name].goal,
            "us_a_site": dataclasses.asdict(spread(added)),
            "us_by_itself": dataclasses.asdict(spread(one_site(model, steerings.get(name), prompt, rounds))),
            "minimum_us_a_site": (min(seconds[name]) - min(base)) / sites[name] * 1e6,
            "us_a_pass": statistics.median(seconds[name]) * 1e6,
        }
    result = {"batch": batch, "unsteered_us": statistics.median(base) * 1e6, "variants": rows}
    return result | {"noise_us": noise(result)}


def goals(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each variant whose path ``auto`` took: was the median below the goal? None where noise hides the answer."""
    text = f"a site that auto steers costs below {GOAL_US:.0f} us (median)"
    found = []
    for batch in batches:
        for name, row in batch["variants"].items():
            if not row["goal"]:
                continue
            for where, key in (("in the model", "us_a_site"), ("by itself", "us_by_itself")):
                value = row[key]["median"]
                met = None if abs(value - GOAL_US) < noise(batch, key) else value < GOAL_US
                case = f"{name} ({row['path']}) {where}, batch {batch['batch']}"
                found.append({"text": text, "case": case, "value": value, "limit": GOAL_US, "met": met})
    return found


def noise(batch: dict[str, Any], key: str = "us_a_site") -> float:
    """How far, in us a site, two measurements of the unsteered model lie apart: no smaller difference is one."""
    same = batch["variants"][AGAIN][key]
    return max(abs(same["median"]), (same["high"] - same["low"]) / 2)


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
        "goals": goals(batches),
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=files.ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--rounds", type=int, default=40, help="at least 2")
    parser.add_argument("--steps", type=int, default=4, help="decoded tokens a run")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.add_argument("--commit", help="the commit, where this copy of the code has no git folder")
    options = parser.parse_args(argv)
    if options.rounds < 2 or min(options.steps, options.layers, *options.batch) < 1:
        parser.error("expected at least 2 rounds, and at least 1 step, layer and row")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 also where the goal is missed."""
    options = parse(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(1)
    report.quiet = options.json
    content = run(options, device)
    path = files.new_file(options.out, device, "host")
    files.write(path, content)
    if options.json:
        print(files.dumps(content))
    else:
        report.show_host(content)
    report.say(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
