"""Host time that steering adds to a decoded token, for each steered site: what a fast model waits for.

    python -m bench.host [--cold] [--rounds 40] [--json]

Each MLP of a narrow Llama with random weights is called under every variant, in turns with that of an unsteered twin,
so that nothing else is in the difference; inside a forward pass of the model, as a scope, rows and the biases that are
exchanged for a pass hold for one. What is done once a pass is not in the figures. On a CPU with one thread this is
time to the end; on a GPU the time until everything is queued, and the GPU is waited for between the runs, not inside
them.

Warm, an MLP is called over and over. ``--cold`` measures single calls too, each after a walk over more memory than
the caches hold: in a real model the weights of every layer sweep them, and what is called once a layer is read anew.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import austeer
from austeer.models.sites import find_sites
from austeer.utils.tables import console, show_table

from . import command, files, report, shapes
from .graphs import no_collection, spread, wait
from .plain_ways import AGAIN
from .plans import spread_plan

SITE, AUS_A_LAYER, ALPHA, WIDTH = "ffn", 10, 0.5, 64
#: Tokens of the prompt; warm calls of a site in a sample, few enough that other processes seldom come between.
PROMPT, CALLS = 8, 20
#: Evicted by a walk over twice the last-level cache, or over this much where its size is not known.
DEFAULT_WALK = 64 * 2**20
#: The most host us a site may take with warm caches: one operation, and what needs more; and with cold ones.
ONE_OPERATION, MORE, COLD = 3.0, 5.0, 12.0


@dataclass(frozen=True)
class Variant:
    """One way to steer with this library.

    Attributes:
        plans: one plan or several by name. rows: the names for the rows of the batch, cut or repeated to fit it.
        prompt: what the model is told of the prompt's length, in tokens.
        warm, cold: the goals, host us a site; None where there are none.
    """

    plans: Any
    mode: str = "auto"
    scope: str | tuple[int, int] = "all"
    rows: tuple[str | None, ...] = ()
    prompt: int | None = None
    warm: float | None = None
    cold: float | None = None

    def attached(self, model: nn.Module, batch: int) -> austeer.Steering:
        steering = austeer.steer(model, self.plans, ALPHA, scope=self.scope, mode=self.mode)
        if self.rows:
            steering.rows([self.rows[i % len(self.rows)] for i in range(batch)])
        if self.prompt is not None:
            steering.prompt_length = self.prompt
        return steering

    @staticmethod
    def path(steering: austeer.Steering) -> str:
        return " and ".join(sorted({row.path for row in steering.report()}))


@dataclass(frozen=True)
class Hook:
    """What one writes without this library: a PyTorch hook that changes the whole tensor in place by a dense vector.

    Attributes:
        operation: "scale" or "shift".
    """

    operation: str
    warm: float | None = None
    cold: float | None = None

    @contextmanager
    def attached(self, model: nn.Module, batch: int) -> Iterator[None]:
        handles = []
        for number, module in enumerate(modules(model)):
            generator = torch.Generator().manual_seed(number)
            weight = next(module.parameters())
            vector = torch.zeros(WIDTH).index_fill_(0, torch.randperm(WIDTH, generator=generator)[:AUS_A_LAYER], ALPHA)
            handles.append(module.register_forward_hook(self._hook(vector.to(weight))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, vector: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        if self.operation == "shift":
            return lambda module, args, output: output.add_(vector)
        factor = 1 + vector
        return lambda module, args, output: output.mul_(factor)

    @staticmethod
    def path(attached: None) -> str:
        return "hook"


def build_model(layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": layers, "head_dim": 16}
    return shapes.build(shapes.tiny(shapes.LLAMA_8B, **sizes), device, dtype)


def modules(model: nn.Module) -> list[nn.Module]:
    """The MLP of every layer."""
    return [model.get_submodule(site.path) for site in find_sites(model, [SITE])[SITE]]


def variants(model: nn.Module) -> dict[str, Variant | Hook]:
    """Every way to steer, by name, with the same number of random AUs in every layer, so that every site costs."""
    count = AUS_A_LAYER * len(modules(model))

    def plan(operation: str, seed: int = 0) -> austeer.Plan:
        return spread_plan(model, SITE, count, seed=seed, operation=operation)

    scale, shift = plan("scale"), plan("shift")
    same = {name: plan("scale", seed) for seed, name in enumerate("abc")}
    mixed = {"a": same["a"], "b": plan("shift", 1), "c": plan("push", 2)}
    some = ("a", None, "b", "c")
    one: dict[str, Any] = {"warm": ONE_OPERATION, "cold": COLD}
    more: dict[str, Any] = {"warm": MORE, "cold": COLD}
    return {
        "dense hook": Hook("scale"),
        "dense hook, shift": Hook("shift"),
        "scale": Variant(scale, **one),
        "scale, columns": Variant(scale, mode="columns", **one),
        "shift": Variant(shift, **one),
        "shift, columns": Variant(shift, mode="columns", **one),
        "push": Variant(plan("push"), **more),
        "rows of three plans": Variant(same, rows=some, **more),
        "rows, scale, shift and push": Variant(mixed, rows=some, **more),
        "generation, in scope": Variant(scale, scope="generation", prompt=PROMPT),
        "shift, generation, in scope": Variant(shift, scope="generation", prompt=PROMPT, **one),
        "generation, out of scope": Variant(scale, scope="generation", prompt=1000),
        "tokens 0 to 15": Variant(scale, scope=(0, 16)),
        "scale, fused": Variant(scale, mode="fused"),
        "scale, dense": Variant(scale, mode="dense"),
    }


class Subject:
    """The MLPs of one model under one variant, beside those of a twin.

    Args:
        model: with the variant attached. twin: the same model without.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, batch: int):
        self.model, self.pairs = model, list(zip(modules(model), modules(twin), strict=True))
        weight = next(model.parameters())
        self.prompt = torch.randint(3, WIDTH, (batch, PROMPT), device=weight.device)
        self.x = torch.randn(batch, 1, WIDTH).to(weight)

    @torch.no_grad()
    def added(self, number: int, evict: Callable[[], object] | None = None) -> float:
        """Host us that steering adds to a call, the median over all sites; a warm one, or one after ``evict``.

        Args:
            number: of the round; the order of a site and its twin changes with it.
        """
        found: list[float] = []
        cache = self.model(self.prompt, use_cache=True).past_key_values
        last = self.model.get_submodule("model.norm")
        handle = last.register_forward_pre_hook(lambda *_: found.extend(self._of_each(number, evict)))
        self.model(self.prompt[:, :1], past_key_values=cache, use_cache=True)
        handle.remove()
        return statistics.median(found)

    def _of_each(self, number: int, evict: Callable[[], object] | None) -> Iterator[float]:
        for place, pair in enumerate(self.pairs):
            took = [0.0, 0.0]
            for which in (0, 1) if (number + place) % 2 else (1, 0):
                if evict is None:
                    pair[which](self.x)
                else:
                    evict()
                calls = 1 if evict else CALLS
                took[which] = seconds(partial(self._call, pair[which], calls), self.x.device) / calls
            yield (took[0] - took[1]) * 1e6

    def _call(self, module: nn.Module, times: int) -> Tensor:
        for _ in range(times):
            y = module(self.x)
        return y


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Host seconds of a call; the device is waited for around it."""
    wait(device)
    with no_collection():
        begin = time.perf_counter_ns()
        call()
        took = time.perf_counter_ns() - begin
    wait(device)
    return took * 1e-9


def walk_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes to walk over so that no cache of the CPU keeps anything: twice the largest one's."""
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((2 * int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=DEFAULT_WALK)


def measure(model: nn.Module, batch: int, rounds: int, walk: int) -> dict[str, Any]:
    """What each variant adds at one batch size, and which paths it takes; first what a twin differs by.

    In every round each variant has its turn, on a copy of the model.

    Args:
        walk: bytes to walk over before each cold call; 0 for warm calls alone.
    """
    known: dict[str, Variant | Hook | None] = {AGAIN: None, **variants(model)}
    memory = torch.ones(walk // 8, dtype=torch.long)
    with ExitStack() as stack:
        subjects: dict[str, Subject] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name, variant in known.items():
            own, path = copy.deepcopy(model), ""
            if variant is not None:
                attached: AbstractContextManager = variant.attached(own, batch)
                path = variant.path(stack.enter_context(attached))
            # A twin of its own: where a module lies in memory changes what it takes with cold caches.
            subjects[name], rows[name] = Subject(own, copy.deepcopy(model), batch), {"path": path}
        gc.collect()
        kinds: dict[str, tuple[int, Callable[[], object] | None]] = {"us_by_itself": (rounds, None)}
        if walk:
            kinds["us_cold"] = (max(2, rounds // 2), memory.sum)
        for key, (count, evict) in kinds.items():
            found: dict[str, list[float]] = {name: [] for name in subjects}
            for number in range(count + 1):  # one more, not counted, warms up
                for name, subject in subjects.items():
                    value = subject.added(number, evict)
                    if number:
                        found[name].append(value)
            for name, values in found.items():
                rows[name][key] = asdict(spread(values))
    goals = [goal(name, known[name], rows[name]) for name in known]
    return {"batch": batch, "variants": rows, "goals": [one for some in goals for one in some]}


def goal(name: str, variant: Variant | Hook | None, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The goals of a variant for what was measured of it."""
    for key, most in (("us_by_itself", getattr(variant, "warm", None)), ("us_cold", getattr(variant, "cold", None))):
        if most is not None and key in row:
            yield {"variant": name, "of": key, "most": most, "met": row[key]["median"] <= most}


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The content of the result file."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, walk = build_model(options.layers, device, dtype), walk_bytes() if options.cold else 0
    known = {"dtype": str(dtype).removeprefix("torch."), "site": SITE, "aus_a_layer": AUS_A_LAYER, "width": WIDTH}
    sizes = {"sites": options.layers, "rounds": options.rounds, "walked_bytes": walk}
    batches: list[dict[str, Any]] = []
    for batch in options.batch:
        report.say(f"batch {batch}: {options.rounds} rounds of {len(variants(model)) + 1} variants")
        batches.append(measure(model, batch, options.rounds, walk))
        about = {"kind": "host", "environment": files.about(device, options.commit)}
        yield {**about, **known, **sizes, "batches": batches}


def show(_: object, content: dict[str, Any]) -> None:
    """Prints the result, a table for each batch size and state of the caches."""
    words = {"us_by_itself": "warm", "us_cold": "cold: caches evicted before each call"}
    for batch in content["batches"]:
        goals = {(one["variant"], one["of"]): one for one in batch["goals"]}
        for key, state in words.items():
            rows = []
            for name, row in batch["variants"].items():
                if key not in row:
                    continue
                us, one = row[key], goals.get((name, key))
                verdict = f"at most {one['most']:g}: {'met' if one['met'] else 'missed'}" if one else ""
                rows.append([name, row["path"], f"{us['median']:.1f} [{us['low']:.1f}, {us['high']:.1f}]", verdict])
            if rows:
                console.print(f"\n[bold]Host us that a steered site adds, batch {batch['batch']}, {state}[/]")
                show_table(["", "path", "median [quartiles]", "goal"], rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("host", __doc__)
    parser.add_argument("--rounds", type=command.rounds, default=40, help="at least 2; half as many cold")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--cold", action="store_true", help="also with caches evicted before each call")
    options = parser.parse_args(argv)
    if min(options.layers, *options.batch) < 1:
        parser.error("expected at least 1 layer and row")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parse(argv)
    torch.set_num_threads(1)
    command.measure("host", options, run(options, command.device()), show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
