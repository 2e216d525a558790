"""Made-up results in the form of real ones, for the report's tests; no number in them was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

#: Percent over unsteered of a decoded token at batch 1, and half the width of its interval.
OVERHEADS = {
    "unsteered again": (0.1, 0.5),
    "public": (3.1, 0.6),
    "dense hook": (1.9, 0.6),
    "sparse hook": (6.8, 0.8),
    "columns": (0.4, 0.6),
    "fused": (1.5, 0.7),
    "fold": (0.0, 0.5),
    "lora": (9.0, 1.0),
    "pyvene": (14.0, 1.5),
    "nnsight": (41.0, 2.0),
}
OURS, PEERS = ("columns", "fused", "fold"), ("lora", "pyvene", "nnsight")


def verdict(median: float, half: float, again: float) -> str:
    if median - half > 0 and median > again:
        return "slower"
    return "same" if median - half <= 0 <= median + half and 2 * half < 2 else "unclear"


def variant(name: str, percent: float, half: float, seconds: float) -> dict[str, Any]:
    timed = {
        "seconds": {"median": seconds * (1 + percent / 100), "low": seconds, "high": seconds * 1.2, "rounds": 20},
        "ratio": {
            **{"median": 1 + percent / 100, "low": 1 + (percent - half) / 100, "high": 1 + (percent + half) / 100},
            **{"level": 0.95, "count": 160},
        },
    }
    word = verdict(percent, half, OVERHEADS["unsteered again"][0])
    return {
        **{"status": "measured", "reason": "", "ours": name in OURS, "peer": name in PEERS},
        **{"error": 1e-6, "allowed": 1e-5, "effect": 1.2, "first_token": timed, "token": timed},
        **{"tokens_a_second": 1 / timed["seconds"]["median"], "launches": None},
        **{"held_bytes": 30_000, "bytes": 5.4e8, "device_seconds": None, "host_seconds": None},
        "verdict": {"first_token": word, "token": word},
    }


def case(execution: str, batch: int, k: int, layers: int, noise: float = 0.6, **more: tuple[float, float]):
    """One case. ``more``: overheads of variants that differ from ``OVERHEADS``, their spaces as underscores."""
    overheads = OVERHEADS | {name.replace("_", " "): value for name, value in more.items()}
    seconds = 0.045 * (1 + batch / 8)
    variants = {"unsteered": variant("unsteered", 0.0, 0.0, seconds)}
    variants |= {name: variant(name, *value, seconds) for name, value in overheads.items()}
    del variants["unsteered"]["verdict"], variants["unsteered again"]["verdict"]
    metrics = ("first_token", "token") if execution == "eager" else ("token",)
    if execution != "eager":
        for row in variants.values():
            del row["first_token"]
    variants["repeng"] = {"status": "skipped", "reason": "repeng is not installed", "ours": False, "peer": True}
    return {
        **{"execution": execution, "batch": batch, "site": "ffn", "k": k, "layers": layers, "prompt_tokens": 32},
        "noise": dict.fromkeys(metrics, noise / 100),
        "verdicts_possible": dict.fromkeys(metrics, noise <= 2),
        "variants": variants,
    }


def inference(name: str = "synthetic-135M", noise: float = 0.6, **more: tuple[float, float]) -> dict[str, Any]:
    """A result with all sweeps. ``noise``: of every case, percent."""
    cases = [case(execution, batch, 100, 30, noise, **more) for execution in ("eager", "compile") for batch in (1, 8)]
    by_k = [case("eager", 1, k, min(k, 30), noise, sparse_hook=(0.5 + 0.063 * k, 0.7)) for k in (1, 10, 1000)]
    by_layers = [case("eager", 1, 100, n, noise, sparse_hook=(0.2 * n, 0.7)) for n in (1, 5, 15)]
    return {
        **{"kind": "inference", "schema": 1, "complete": True},
        "environment": {
            **{"device": "Synthetic(R) CPU", "cores": 2, "packages": {"torch": "2.13.0"}, "commit": "0" * 40},
            **{"command": "austeer bench", "date": "2000-01-01T00:00:00+00:00"},
        },
        "model": {"name": name, "layers": 30, "width": 576, "parameters": 134515008, "dtype": "float32"},
        "settings": {"generations": 40, "tokens": 8, "prompt_tokens": 32, "level": 0.95, "threads": 2, "quick": False},
        "series": {"main": [0], "batch": [0, 1], "execution": [0, 2, 3], "k": [4, 5, 0, 6], "layers": [7, 8, 9, 0]},
        "cases": cases + by_k + by_layers,
    }


def dispatch() -> dict[str, Any]:
    """The kernels on a GPU, two shapes."""

    def row(n: int, k: int, tokens: int) -> dict[str, Any]:
        names = ("plain", "fused", "columns 100", "columns 100 alone")
        draw = random.Random(n + tokens)
        ratio = {"median": 1.02, "low": 1.01, "high": 1.03, "rounds": 15}
        return {
            **{"n": n, "k": k, "tokens": tokens},
            "variants": {name: {"ratio": ratio, "of_floor": draw.uniform(0.6, 0.95)} for name in names},
        }

    return {
        **{"kind": "dispatch", "dtype": "bfloat16", "complete": True, "environment": {"device": "Synthetic GPU"}},
        "ceilings": {"bandwidth": 3e12, "flops": 8e14},
        "rows": [row(n, k, m) for n, k in ((4096, 4096), (4096, 14336)) for m in (1, 16, 512)],
    }


def kernels() -> dict[str, Any]:
    """What pytest-benchmark writes of bench/test_kernels.py."""

    def row(function: str, group: str, form: str, us: float) -> dict[str, Any]:
        stats = {"median": us * 1e-6, "q1": us * 0.9e-6, "q3": us * 1.2e-6}
        return {"name": f"{function}[{form}]", "group": group, "params": {"form": form}, "stats": stats}

    steer = [
        row("test_steer_columns", f"steer ({tokens}, 576) k={k} cpu", form, us * tokens**0.5)
        for tokens in (1, 512)
        for k in (1, 100)
        for form, us in (("ours", 3.0), ("dense", 4.0), ("indexing", 9.0))
    ]
    linear = [
        row("test_steered_linear", f"linear 1536 -> 576, {tokens} tokens, cpu", form, us * tokens)
        for tokens in (1, 16)
        for form, us in (("fused", 60.0), ("linear", 55.0), ("linear then columns", 58.0))
    ]
    return {
        "commit_info": {"id": "0" * 40},
        "datetime": "2000-01-01T00:00:00",
        "benchmarks": steer + linear,
    }


def put(results: Path, device: str, name: str, content: dict[str, Any]) -> Path:
    """Writes a result file."""
    path = results / device / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
