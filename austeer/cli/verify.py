"""``austeer verify``: whether a server or a model does what a plan is known to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Device, Json, console, emit
from .replays import load_sharp
from .strength import parse_alphas

if TYPE_CHECKING:
    from ..plans.plan import Plan


What = Annotated[
    str,
    typer.Argument(
        metavar="PLAN",
        help="A plan's folder or Hub id, or what was exported of it: an adapter's folder, a folded checkpoint's, or a "
        "file for llama.cpp.",
    ),
]
Url = Annotated[str | None, typer.Option(help="An OpenAI-compatible server, http://HOST:PORT/v1.", show_default=False)]
Lora = Annotated[
    str | None,
    typer.Option("--lora", metavar="NAME", help="With --url: what the server calls the adapter.", show_default=False),
]
Set = Annotated[
    str | None,
    typer.Option(
        "--set", metavar="NAME", help="With --url: what austeer's plugin in vLLM calls the plan.", show_default=False
    ),
]
Body = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='With --url: what else steered requests have, as {"lora": [{"id": 0, "scale": 1}]} for llama.cpp.',
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="With --url: the server's own model. [default: the first it lists]", show_default=False
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Instead of --url: a model to run here, folder or Hub id.", show_default=False),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="With --model: an adapter's folder, for PEFT in place of austeer.steer. [default: PLAN if it is one]",
        show_default=False,
    ),
]
Record = Annotated[
    bool, typer.Option("--record", help="With --model: first run the model, and store the replay in the plan.")
]
Alpha = Annotated[
    str | None,
    typer.Option(
        "--alpha", "-a", metavar="NUMBER", help="With --record. [default: the plan's own recommendation, or 1]"
    ),
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16, or auto (as saved). [default: float32 if that fits]")
]


def verify(
    what: What,
    url: Url = None,
    lora: Lora = None,
    steering_set: Set = None,
    body: Body = None,
    base: Base = None,
    model: Model = None,
    adapter: Adapter = None,
    record: Record = False,
    alpha: Alpha = None,
    dtype: DType = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Show whether a server or a model does what the plan does: applied, not applied, or a fault by its name.

    Example: `austeer verify adapters/kind --url http://localhost:8000/v1 --lora kind`

    A plan's replay has what its model writes after a few prompts, with the plan and without; --record stores one
    (`austeer verify plans/kind --model demo --alpha 8 --record`), as `austeer export lora ... --replay` does with the
    adapter. Steered requests are those with --lora, --set or --body; without any of them all are taken for steered. The
    exit code is 0 for "applied", 1 for every other verdict, and 2 where it could not be tried.
    """
    from ..plans.files import file_of, write
    from ..plans.plan import Plan
    from ..verifying import VerifyError, record_replay
    from ..verifying import verify as compare
    from ..verifying.sources import source_of

    if (url is None) == (model is None):
        raise VerifyError(f"found {'neither' if url is None else 'both'} of --url and --model, expected one of them")
    if (model is None and {adapter, dtype, device} != {None}) or (record and model is None):
        raise VerifyError("--adapter, --record, --dtype, --device: found one beside --url, expected --model with them")
    if alpha is not None and not record:
        raise VerifyError(f"--alpha: found {alpha} without --record, expected both: a replay has its own strength")
    plan: str | Plan = _to_record(what) if record else what
    strengths = parse_alphas([alpha] if alpha else None)
    if len(strengths) > 1:
        raise VerifyError(f"--alpha: found {len(strengths)}, expected one: the strength of the replay")
    request = None if body is None else _object(body)
    options: dict[str, Any] = {"base": base, "lora": lora, "steering_set": steering_set, "body": request}
    if model is None:
        found = compare(plan, url=url, **options)
    else:
        if not record:
            source_of(what).expect_local()  # says what is wrong before the model is loaded
        network, tokenizer = load_sharp(model, dtype, device)
        if isinstance(plan, Plan):
            plan = record_replay(network, tokenizer, plan, strengths[0] if strengths else None)
            write(plan, file_of(Path(what)))
        found = compare(plan, network, tokenizer, adapter=adapter, **options)
    if json:
        emit(found.to_json())
    else:
        console.print(str(found), markup=False)
    raise typer.Exit(0 if found.applied else 1)


def _to_record(where: str) -> Plan:
    """The plan in a folder or file, into which its replay is to go."""
    from ..plans.plan import Plan
    from ..verifying import VerifyError

    if not Path(where).exists():
        raise VerifyError(
            f"--record: found {where}, which is not here, expected a plan's folder or file to write the replay into"
        )
    return Plan.from_pretrained(where)


def _object(text: str) -> dict[str, Any]:
    from ..errors import AusteerError
    from ..utils.files import parse_json

    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise AusteerError(f'--body: found {text!r:.60}, expected a JSON object, as {{"model": "kind"}}')
    return found
