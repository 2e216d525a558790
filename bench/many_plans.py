"""Many plans in one batch: what 1, 8, 64 and 256 of them cost, in the operation alone and in a whole model.

    python -m bench.many_plans [--batch 256] [--plans 1 8 64 256] [--rounds 9] [--quick] [--json]

The operation steers a matrix with a list of AUs a plan, and, as it would have to without lists, with the union of all
plans' AUs; both beside a plain copy of the matrix, on a GPU in CUDA graphs. The model is a small random Llama that
decodes a token a row, the rows' plans in turns; on a GPU in eager mode and as a CUDA graph. Nothing is timed that is
not within twice plain PyTorch's own error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import austeer
import austeer_kernels as ak
from austeer import Plan
from austeer.models.sites import find_sites
from austeer_kernels import reference

from . import command, files, intervals, report, shapes
from .graphs import Replay, check, copies_of, interleaved, ratios, spread, warm_up
from .plain_ways import AGAIN, UNSTEERED
from .plans import spread_plan
from .steered import Steered, twin
from .steps import EAGER, GRAPH, Step, by_turns

COPY, LISTS, UNION = "copy", "lists", "union"
SITE, ALPHA, PROMPT, GROUP = "ffn", 0.5, 8, 3
#: Columns of the matrix and AUs of each plan; and of the model's layers. Those of --quick.
WIDTH, AUS, QUICK_WIDTH, QUICK_AUS = 4096, 100, 48, 5
AUS_A_LAYER = 10
#: The sizes of the Llama: on a GPU four layers of Llama-3.1-8B.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim")
LLAMA = {"cpu": (1024, 256, 688, 4, 4, 2, 64), "cuda": (128256, 4096, 14336, 4, 32, 8, 128)}
QUICK_LLAMA = (1024, 32, 64, 2, 4, 2, 8)

Lists = tuple[Tensor, Tensor, Tensor]


# --- the operation ---------------------------------------------------------------------------------------------------


def random_lists(plans: int, width: int, count: int, device: torch.device) -> Lists:
    """index, gamma and shift [plans, count]; all plans have other AUs."""
    index = torch.stack([torch.randperm(width, device=device)[:count] for _ in range(plans)])
    gamma, shift = (torch.rand(plans, count, device=device) - 0.5 for _ in range(2))
    return index, gamma, shift


def union_of(lists: Lists) -> Lists:
    """The same as one list for all plans: every AU that any of them has, with zeros where a plan does not have it."""
    index, *strengths = lists
    union = index.unique()
    place = torch.searchsorted(union, index)
    gamma, shift = (torch.zeros(len(index), len(union), device=t.device).scatter_(1, place, t) for t in strengths)
    return union.expand(gamma.shape), gamma, shift


def operation(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Every form and number of plans, checked, then timed in turns: seconds, and ratios to a plain copy."""
    width, count = (QUICK_WIDTH, QUICK_AUS) if options.quick else (WIDTH, AUS)
    torch.manual_seed(0)
    y = torch.randn(options.batch, width, device=device).to(dtype)
    copies = [y.clone() for _ in range(copies_of(y.nbytes, device))]
    target = torch.empty_like(y)
    plain = [lambda copy=copy: target.copy_(copy) for copy in copies]
    calls: dict[str, Sequence[Callable[[], Any]]] = {COPY: plain, AGAIN: plain}
    rows: dict[str, dict[str, Any]] = {COPY: {}, AGAIN: {}}
    for plans in options.plans:
        row_plan = (torch.arange(options.batch, device=device) % plans).int()
        lists = random_lists(plans, width, count, device)
        for form, (index, gamma, shift) in ((LISTS, lists), (UNION, union_of(lists))):
            name = f"{form}, {plans}"
            found = ak.steer_columns_(y.clone(), index, gamma, shift, row_plan=row_plan)
            own, exact = (reference.steer_columns(t, *lists, False, row_plan) for t in (y, y.double()))
            error, plain_error = check(name, found, own, exact)
            rows[name] = {"plans": plans, "columns": index.shape[1], "error": error, "plain_error": plain_error}
            # Only changes signs, x - 2 x: applied again and again in place, nothing grows or vanishes.
            flip, none = torch.where(gamma == 0, 0.0, -2.0), torch.zeros_like(shift)
            calls[name] = [
                lambda copy=copy, index=index, flip=flip, none=none, row_plan=row_plan: ak.steer_columns_(
                    copy, index, flip, none, row_plan=row_plan
                )
                for copy in copies
            ]
    seconds = interleaved({name: Replay(each, device, 1e-6) for name, each in calls.items()}, options.rounds)
    for name, row in rows.items():
        row["seconds"] = asdict(spread(seconds[name]))
        row["over_copy"] = asdict(ratios(seconds[name], seconds[COPY]))
    return {"width": width, "aus": count, "rows": rows}


# --- a whole model ---------------------------------------------------------------------------------------------------


class ManyPlans(Steered):
    """``austeer.steer`` with plans by name, the batch's rows steered by them in turns."""

    def __init__(self, model: nn.Module, plans: Sequence[Plan], batch: int):
        super().__init__(twin(model))
        self.plans = plans
        self.steering = austeer.steer(self.model, {str(i): plan for i, plan in enumerate(plans)}, ALPHA).attach()
        self.steering.rows([str(i % len(plans)) for i in range(batch)])

    def close(self) -> None:
        self.steering.detach()

    @torch.no_grad()
    def check(self, unsteered: nn.Module, ids: Tensor) -> tuple[float, float]:
        """Compares each layer's steered tensor with the formula on the unsteered module's; the worst errors.

        At the tensor itself, since behind a few layers of random weights rounding alone can grow as large as anything.

        Raises:
            WrongResultError: a layer errs by more than twice plain PyTorch's error.
        """
        worst, hooks = (0.0, 0.0), []
        row_plan = (torch.arange(ids.shape[0], device=ids.device) % len(self.plans)).int()

        def compare(path: str, layer: int, args: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal worst
            before = unsteered.get_submodule(path)(*args)[:, 0]
            lists = ak.coalesce([_units(plan, layer, before.device) for plan in self.plans])
            own, exact = (reference.steer_columns(t, *lists, False, row_plan) for t in (before, before.double()))
            worst = max(worst, check(f"{len(self.plans)} plans, layer {layer}", output[:, 0], own, exact))

        for site in find_sites(unsteered, [SITE])[SITE]:
            module = self.model.get_submodule(site.path)
            hooks.append(
                module.register_forward_hook(
                    lambda _, args, output, site=site: compare(site.path, site.layer, args, output)
                )
            )
        self.model(ids[:, :1])
        for hook in hooks:
            hook.remove()
        return worst


def _units(plan: Plan, layer: int, device: torch.device) -> Lists:
    here = plan.layer == layer
    index, gamma = plan.index[here].long().to(device), (ALPHA * plan.beta[here]).to(device)
    return index, gamma, torch.zeros_like(gamma)


def whole_model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """One entry an execution: a decoding step with each number of plans over the unsteered model's."""
    sizes = dict(zip(SIZES, QUICK_LLAMA if options.quick else LLAMA[device.type]))
    model = shapes.build(shapes.tiny(shapes.LLAMA_8B, **sizes), device, dtype)
    count = min(AUS_A_LAYER, sizes["hidden_size"] // 4) * sizes["num_hidden_layers"]
    drawn = [spread_plan(model, SITE, count, seed=seed) for seed in range(max(options.plans))]
    ways = {UNSTEERED: Steered(twin(model)), AGAIN: Steered(twin(model))}
    ways |= {str(number): ManyPlans(model, drawn[:number], options.batch) for number in options.plans}
    ids = torch.randint(3, sizes["vocab_size"], (options.batch, PROMPT), device=device)
    errors = {name: way.check(model, ids) for name, way in ways.items() if isinstance(way, ManyPlans)}
    for execution in (EAGER, GRAPH) if device.type == "cuda" else (EAGER,):
        steps = {name: Step(way, ids, execution) for name, way in ways.items()}
        seconds = by_turns(steps, GROUP, lambda groups: groups < options.rounds, lambda: None)
        rows = {}
        for name, values in seconds.items():
            row: dict[str, Any] = {"seconds": asdict(spread([v for group in values for v in group]))}
            if name != UNSTEERED:
                row["ratio"] = asdict(intervals.ratio(values, seconds[UNSTEERED]))
            if name in errors:
                row |= {"plans": int(name), "error": errors[name][0], "plain_error": errors[name][1]}
            rows[name] = row
        yield {"execution": execution, "site": SITE, "aus": count, "sizes": sizes, "rows": rows}
    for way in ways.values():
        way.close()


# --- the command -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures part by part; gives, after each, the content of the result file so far."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"dtype": str(dtype).removeprefix("torch."), "batch": options.batch, "rounds": options.rounds}
    content = {"kind": "plans", "environment": files.about(device, options.commit), **known, "quick": options.quick}
    report.say(f"the operation: {options.batch} rows, {options.plans} plans")
    warm_up(device)
    content |= {"complete": False, "operation": operation(options, device, dtype), "models": []}
    yield content
    for entry in whole_model(options, device, dtype):
        report.say(f"the model: {entry['execution']}")
        content["models"].append(entry)
        yield content
    yield content | {"complete": True}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("many_plans", __doc__, quick="tiny sizes, few plans and rounds")
    parser.add_argument("--batch", type=int, default=256, help="rows")
    parser.add_argument("--plans", type=int, nargs="+", default=[1, 8, 64, 256], help="how many of them differ")
    parser.add_argument("--rounds", type=command.rounds, default=9, help="at least 2")
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.plans, options.rounds = 4, [1, 3], 2
    if min(options.plans) < 1 or max(options.plans) > options.batch:
        parser.error(f"--plans: found {options.plans}, expected 1 to {options.batch}, the rows of the batch")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parse(argv)
    command.measure("plans", options, run(options, command.device()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
