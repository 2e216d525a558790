"""Where a replay is: in a plan, or beside what was exported of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import PlanError
from ..export.adapter import CONFIG
from ..export.output_files import RECORD, REPLAY
from ..plans.files import FILE_NAME
from ..plans.plan import Plan
from ..plans.replay import Replay, read_replay
from .server import VerifyError

#: What to do where there is none.
RECORD_ONE = (
    "record one: austeer verify PLAN --model MODEL --record, or austeer export ... --replay; in Python "
    "austeer.record_replay(model, tokenizer, plan, alpha=...)"
)


@dataclass(frozen=True)
class Source:
    """What is to be verified.

    Attributes:
        name: for messages. plan: the plan itself, where it is one. adapter: the folder, of an adapter for PEFT.
        folded: whether it is a folder with a folded checkpoint. gguf: whether it is a file for llama.cpp.
    """

    name: str
    replay: Replay
    plan: Plan | None = None
    adapter: Path | None = None
    folded: bool = False
    gguf: bool = False

    def expect_local(self) -> None:
        """Raises VerifyError: it cannot run in Transformers."""
        if self.gguf:
            raise VerifyError(
                f"{self.name}: found a file for llama.cpp and a model of Transformers, expected a server: llama-server "
                "-m MODEL.gguf --lora FILE, and its url"
            )


def source_of(what: Plan | str | Path) -> Source:
    """Finds the replay.

    Raises:
        VerifyError: there is none, or it is of another plan: the plan was changed since.
        PlanError, FileFormatError, HubError: damaged, or no such plan.
    """
    if isinstance(what, Plan):
        return _of_plan(what, "plan")
    path = Path(what)
    if path.suffix == ".gguf" and path.is_file():
        return Source(str(path), _in_gguf(path), gguf=True)
    if path.is_dir() and (path / RECORD).is_file() and not (path / FILE_NAME).exists():
        replay = _beside(path)
        adapter = (path / CONFIG).is_file()
        return Source(str(path), replay, adapter=path if adapter else None, folded=not adapter)
    return _of_plan(Plan.from_pretrained(what), str(what))


def _of_plan(plan: Plan, name: str) -> Source:
    if plan.replay is None:
        raise VerifyError(f"{name}: found no replay in the plan, expected one; {RECORD_ONE}")
    if plan.replay.digest != plan.digest:
        raise VerifyError(
            f"{name}: found a replay of plan {plan.replay.digest[:16]}, and this is {plan.digest[:16]}: its AUs or "
            f"strengths were changed since; {RECORD_ONE}"
        )
    return Source(name, plan.replay, plan=plan)


def _beside(folder: Path) -> Replay:
    try:
        text = (folder / REPLAY).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise VerifyError(f"{folder}: found no {REPLAY}, expected one; {RECORD_ONE}, and export it anew") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{folder / REPLAY}: cannot be read ({error}); export it anew") from error
    return read_replay(text, str(folder / REPLAY))


def _in_gguf(path: Path) -> Replay:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise VerifyError("GGUF files need the package gguf: pip install 'austeer[gguf]'") from error
    try:
        field = GGUFReader(path).get_field("austeer.replay")
        text = None if field is None else field.contents()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise PlanError(f"{path}: damaged or not a GGUF file ({error}); export it anew") from error
    if not isinstance(text, str):
        raise VerifyError(f"{path}: found no replay in its metadata, expected one; {RECORD_ONE}, and export it anew")
    return read_replay(text, str(path))
