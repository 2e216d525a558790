"""What the parts of the GPU suite (:mod:`bench.gpu`) share: result file, clock, and what becomes of failures."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import files, shapes

RUNNING, DONE, PARTIAL, FAILED, SKIPPED = "running", "done", "partial", "failed", "skipped"
DTYPE = torch.bfloat16


class SkippedError(Exception):
    """A part that cannot be run here; the message says why."""


class BrokenDeviceError(Exception):
    """The GPU answers no more in this process."""


class Clock:
    """How much time is left, seconds."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()


@dataclass
class Suite:
    """What all parts share: the suite's result file, and what is to be in it; other files go to the same folder."""

    path: Path
    content: dict[str, Any]
    device: torch.device

    def __post_init__(self) -> None:
        self.quick, self.commit = bool(self.content["settings"]["quick"]), self.content["environment"]["commit"]

    def save(self) -> None:
        """Writes the result file; whenever the process is ended, there is a whole one."""
        files.write(self.path, self.content)

    def write(self, path: Path, content: dict[str, Any], entry: dict[str, Any]) -> None:
        """Writes a part's own file, and its name into the part's entry."""
        files.write(path, content)
        entry["files"] = [path.name]
        self.save()

    def new_file(self, kind: str, rest: str = "") -> Path:
        """A file beside the suite's, that is not there yet."""
        name = f"{kind}-quick" if self.quick else kind
        return files.new_file(self.path.parent.parent, self.device, f"{name}-{rest}" if rest else name)


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        least: it is not begun with less time, seconds. most: what it may take.
        run: measures, and fills its entry in the result file: the names of ``files`` of its own, or its ``result``,
            and, where not all went well, ``status`` and ``reason``.
    """

    name: str
    least: float
    most: float
    run: Callable[[Suite, dict[str, Any], Clock], None]


def run_part(suite: Suite, part: Part, seconds: float) -> None:
    """Runs a part, for so many seconds; whatever happens is in its entry, and the entry in the file.

    Raises:
        BrokenDeviceError: after it nothing else can run in this process.
    """
    entry: dict[str, Any] = {"status": RUNNING, "seconds": 0.0, "reason": "", "files": [], "result": None}
    suite.content["parts"][part.name] = entry
    suite.save()
    begin = time.perf_counter()
    try:
        if seconds < part.least:
            raise SkippedError(f"{max(seconds, 0):.0f} s were left for it, expected at least {part.least:.0f} s")
        part.run(suite, entry, Clock(min(seconds, part.most)))
        if entry["status"] == RUNNING:
            entry["status"] = DONE
    except (SkippedError, shapes.TooLargeError) as error:
        entry |= {"status": SKIPPED, "reason": str(error)}
    except Exception as error:  # whatever it is, the other parts are to run
        entry |= {"status": FAILED, "reason": "; ".join(filter(None, [entry["reason"], in_words(error)]))}
    entry["seconds"] = time.perf_counter() - begin
    suite.save()
    gc.collect()
    check_device(suite.device)


def in_words(error: BaseException) -> str:
    """An error in one line, with where it came from: on a machine that is lent nobody can look again."""
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = ", ".join(f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {lines[0][:400]} [{places}]"


def check_device(device: torch.device) -> None:
    """Whether a GPU still works: an error may end its context, and a broken capture what PyTorch knows of its memory.

    Raises:
        BrokenDeviceError: it does not.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.rand(8, device=device).sum().item()
    except Exception as error:
        raise BrokenDeviceError(f"the GPU answers no more in this process: {in_words(error)}") from error
