"""What the commands share: options, output, errors."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from ..errors import AusteerWarning
from ..utils.tables import console as console

if TYPE_CHECKING:
    from ..momentum.momentum import Momentum
    from ..pairs.chat import ChatForm
    from ..plans.plan import Plan

#: What the commands that are given as examples continue.
PROMPT = "The weekend trip was"

Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder or Hub id; 'demo' is SmolLM2-135M-Instruct.", show_default=False)
]
DType = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda:0 ..., or a device map such as auto. [default: cuda if there is one]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite --out.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts through the model's chat template.")]
ChatOption = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-option",
        metavar="KEY=VALUE",
        help="For the chat template, VALUE as JSON, such as enable_thinking=false; may be repeated. Implies --chat.",
        show_default=False,
    ),
]
System = Annotated[
    str | None,
    typer.Option(help="A system message before each prompt, in the chat template. Implies --chat.", show_default=False),
]
Where = Annotated[list[str] | None, typer.Option(help="Only rows where FIELD=VALUE; may be repeated.")]
Split = Annotated[str | None, typer.Option(help="Which split of a dataset.")]
PromptField = Annotated[str, typer.Option(help="The name of the prompt's field.")]
PositiveField = Annotated[str, typer.Option(help="The name of the desired continuation's field.")]
NegativeField = Annotated[str, typer.Option(help="The name of the undesired continuation's field.")]


def fail(message: str) -> NoReturn:
    """One message on standard error, and exit code 2."""
    _to_standard_error("[bold red]error:[/] ", message)
    sys.exit(2)


def to_json(data: dict[str, Any]) -> str:
    """One JSON object; what JSON has no number for (NaN, infinity) becomes null."""
    return json.dumps(_finite(data), indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def emit(data: dict[str, Any]) -> None:
    """The result as one JSON object on standard output."""
    print(to_json(data))


def note(message: str) -> None:
    """What a user should know, beside the result: on standard error."""
    _to_standard_error("[yellow]note:[/] ", message)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """What the library warns of is a note here, and other warnings are what they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", AusteerWarning)
        shown = warnings.showwarning

        def show(message, category, *where, **more) -> None:
            if issubclass(category, AusteerWarning):
                note(str(message))
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _to_standard_error(mark: str, message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(mark, end="")
    print(message, file=sys.stderr)


def note_chat_form(plans: Mapping[str, Plan], chat: ChatForm) -> None:
    """Says which plans were measured on prompts of another form than these, and how to give both one form."""
    from ..pairs.chat import chat_arguments, describe_form

    for name, plan in plans.items():
        if plan.chat_template != chat:
            own = chat_arguments(plan.chat_template).strip()
            remedy = f"give {own}" if own else "leave --chat and its options out"
            note(
                f"{name} was measured on prompts {describe_form(plan.chat_template)}, and these prompts go "
                f"{describe_form(chat)}; for the same form {remedy}"
            )


def chat_form(chat: bool, options: Sequence[str] | None, system: str | None) -> ChatForm:
    """What ``--chat``, ``--chat-option`` and ``--system`` say together."""
    from ..errors import AusteerError

    found: dict[str, Any] = {} if system is None else {"system": system}
    for option in options or ():
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise AusteerError(f"--chat-option: found {option!r}, expected KEY=VALUE, as enable_thinking=false")
        if name in found:
            raise AusteerError(f"--chat-option: found {name} twice, expected it once")
        found[name] = _json_value(value)
    return found or chat


def in_chat_form(texts: Any, tokenizer, form: ChatForm) -> Any:
    """Pairs or a task in the tokenizer's chat template, if there is to be one."""
    from ..pairs.chat import options_of

    return texts.with_chat_template(tokenizer, **options_of(form)) if form else texts


def _json_value(text: str) -> Any:
    """A value as JSON or as Python writes it (False is no text, which would be true); other texts are themselves."""
    constants = {"True": True, "False": False, "None": None}
    try:
        return constants[text] if text in constants else json.loads(text)
    except ValueError:
        return text


def next_line(*words: object) -> str:
    """The command to give next, quoted for a shell; names of files may hold blanks."""
    return "next: " + shlex.join(map(str, words))


def model_word(plan: Plan | Momentum) -> str:
    """What ``--model`` takes for the model of a plan or momentum; MODEL where that was a folder, whose place is not
    known.
    """
    from ..models.demo_model import DEMO, DEMO_ID

    name = plan.model.name
    return DEMO if name == DEMO_ID else name if "/" in name else "MODEL"


def check_writable(path: Path, force: bool) -> None:
    """Refuses, before any work is done, to overwrite a result or to write where a folder is."""
    from ..errors import AusteerError

    if path.is_dir():
        raise AusteerError(f"{path}: found a folder, expected a file name for the result")
    if path.exists() and not force:
        raise AusteerError(f"{path}: exists already; give another --out, or --force to overwrite it")
    existing = next(parent for parent in (path.absolute().parent, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise AusteerError(f"{path}: cannot be written, {existing} is no folder or not writable; give another --out")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """A result as JSON; the file is there whole or not at all."""
    from ..utils.files import write_text

    write_text(path, to_json(data) + "\n")


def parse_where(conditions: list[str] | None) -> dict[str, str]:
    """The FIELD=VALUE of ``--where`` as a mapping."""
    from ..errors import PairsError

    for condition in conditions or ():
        if "=" not in condition:
            raise PairsError(f"--where: found {condition!r}, expected FIELD=VALUE")
    return dict(condition.split("=", 1) for condition in conditions or ())


def split_names(value: str) -> list[str]:
    """Names of a comma-separated option."""
    return [name.strip() for name in value.split(",") if name.strip()]


def plan_names(sources: Sequence[str]) -> list[str]:
    """A name for each plan: its folder's or repository's, or all that was given where two are called the same."""
    short = [Path(source).resolve().name for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def load(name: str, dtype: str, device: str | None, strategy: str = "resident"):
    """A model and tokenizer, without the libraries' own progress bars; each process on its own GPU.

    Args:
        strategy: for "layerwise" the weights are left on disk; for "auto" if they do not fit into memory.
    """
    from transformers.utils import logging

    from ..models.load import fits, load_model, load_offloaded

    logging.disable_progress_bar()
    if device is None and "LOCAL_RANK" in os.environ:
        import torch

        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    by_map = device is not None and device.split(":")[0] not in ("cpu", "cuda")
    if strategy == "layerwise" or (strategy == "auto" and not by_map and not fits(name, dtype, device)):
        return load_offloaded(name, dtype, device)
    return load_model(name, dtype, device)
