"""What the commands ``python -m bench.NAME`` share: their options, and how a result is written and shown."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import files, report


def rounds(text: str) -> int:
    """A number of rounds, as an option."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected at least 2, for a spread")
    return int(text)


def parser(name: str, doc: str | None, quick: str = "") -> argparse.ArgumentParser:
    """The options of all of them.

    Args:
        doc: the module's, of which the first paragraph is shown. quick: what ``--quick`` does, where there is one.
    """
    found = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=(doc or "").split("\n\n")[0])
    found.add_argument("--out", type=Path, default=files.ROOT / "bench" / "results", help="folder of the results")
    found.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    found.add_argument("--commit", help="the commit, where this copy of the code has no git folder")
    if quick:
        found.add_argument("--quick", action="store_true", help=f"{quick}: only to see that it runs")
    return found


def device() -> torch.device:
    """The current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def new_file(kind: str, options: argparse.Namespace) -> Path:
    """Where the result goes; a quick one has a name of its own, since its times mean nothing."""
    report.quiet = options.json
    return files.new_file(options.out, device(), f"{kind}-quick" if getattr(options, "quick", False) else kind)


def measure(
    kind: str,
    options: argparse.Namespace,
    contents: Iterable[dict[str, Any]],
    show: Callable[[Path, dict[str, Any]], None] = report.show,
) -> tuple[Path, dict[str, Any]]:
    """Writes a result as it grows, and shows it in the end, without ``--json`` by ``show``."""
    path, content = new_file(kind, options), {}
    for content in contents:
        files.write(path, content)  # after each part: a GPU that is lent may be taken away
    if options.json:
        print(files.dumps(content))
    else:
        show(path, content)
    report.say(f"written: {path}")
    return path, content
