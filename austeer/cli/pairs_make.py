"""``austeer pairs make``: pairs from a labelled task, from two instructions, or from a template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common
from .common import Device, DType, Force, Json, Model, PromptField, Quiet, Split, Where, console, note

if TYPE_CHECKING:
    from ..making import Made

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Make pairs from a labelled task, from two instructions, or from a template.",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="The file of pairs to write (.jsonl).", show_default=False)]


@app.command()
def task(
    source: Annotated[
        list[str], typer.Argument(help="The task's files, or hf:ORG/NAME; as for austeer measure.", show_default=False)
    ],
    out: Out,
    template: Annotated[
        str | None,
        typer.Option(help="A shipped template (boolq, svamp ...) or a JSON file. [default: the neutral format]"),
    ] = None,
    balance: Annotated[
        bool, typer.Option("--balance", help="Leave pairs out until each answer is right as often as wrong.")
    ] = False,
    ending: Annotated[str, typer.Option(help="Text behind both sides, for example '.'.")] = "",
    where: Where = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="Read at most so many rows.", min=1)] = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Drop questions that come again with the same answer.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For numbers that rows exchange, and for --balance.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """The right option against a wrong one; of numeric tasks the right number against another row's.

    Example: `austeer pairs make task boolq.jsonl --template boolq --balance --out pairs.jsonl`
    """
    from ..making import pairs_from_task
    from ..making.made_pairs import check_out
    from ..tasks.load import load_task

    common.check_writable(check_out(out), force)
    conditions = common.parse_where(where)
    found = load_task(
        source[0] if len(source) == 1 else source,
        template,
        where=conditions,
        limit=limit,
        split=split,
        duplicates="drop" if drop_duplicates else None,
    )
    finish(pairs_from_task(found, seed=seed, balance=balance, ending=ending), out, json)


@app.command()
def instructions(
    model: Model,
    positive_prompt: Annotated[
        str, typer.Option(help="The instruction of the desired side, for example 'Answer kindly.'", show_default=False)
    ],
    negative_prompt: Annotated[str, typer.Option(help="The other side's: 'Answer rudely.'", show_default=False)],
    out: Out,
    prompts: Annotated[
        str | None,
        typer.Argument(help="What to answer: a .txt with one a line, or rows with a prompt. [default: the package's]"),
    ] = None,
    prompt_field: PromptField = "prompt",
    limit: Annotated[int | None, typer.Option(help="The first so many prompts.", min=1)] = None,
    samples: Annotated[int, typer.Option(help="Pairs of each prompt.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 32,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at it. [default: greedy; 1 with several samples]", min=0.01)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at a time.", min=1)] = 16,
    same_length: Annotated[
        bool, typer.Option(help="Cut both sides of a pair to one number of tokens, at the end of a word.")
    ] = True,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template. [default: if there is one]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.partial, if there is one.")] = False,
    dtype: DType = "auto",
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out, and start anew over OUT.partial.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The model answers each prompt under one instruction and under another; the pair keeps the prompt alone.

    Example: `austeer pairs make instructions --model demo --positive-prompt "Answer kindly." --negative-prompt "Answer
    rudely." --out pairs.jsonl`
    """
    from ..making import pairs_from_instructions
    from ..making.instruction_forms import check_instructions
    from ..making.made_pairs import check_out
    from ..making.prompts import read_prompts
    from ..making.unfinished_run import partial_path

    common.check_writable(check_out(out), force)
    check_instructions((positive_prompt, negative_prompt))
    found = read_prompts(prompts, field=prompt_field, limit=limit)
    if force and not resume:
        partial_path(out).unlink(missing_ok=True)
    if resume and not partial_path(out).exists():
        note(f"{partial_path(out)}: there is no unfinished run; starting with the first prompt")
    network, tokenizer = common.load(model, dtype, device)
    made = pairs_from_instructions(
        network,
        tokenizer,
        found,
        positive_prompt,
        negative_prompt,
        out,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=1.0 if samples > 1 and temperature is None else temperature,
        seed=seed,
        batch_size=batch_size,
        same_length=same_length,
        chat=chat,
        resume=resume,
        progress=False if quiet else None,
    )
    finish(made, out, json, write=False, model=model)


@app.command()
def template(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="With placeholders: 'The {noun} was'.")],
    positive: Annotated[str, typer.Option(help="The desired continuation, with its blank: ' {good}'.")],
    negative: Annotated[str, typer.Option(help="The undesired one: ' {bad}'.")],
    out: Out,
    values: Annotated[
        Path | None, typer.Option(help='A JSON file: {"noun": ["film", "book"], ...}', show_default=False)
    ] = None,
    value: Annotated[list[str] | None, typer.Option(help="NAME=VALUE,VALUE; may be repeated.")] = None,
    count: Annotated[int | None, typer.Option(help="So many combinations, drawn. [default: all]", min=2)] = None,
    seed: Annotated[int, typer.Option(help="With --count.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Every combination of values; placeholders of one side only are paired, the first with the first and so on.

    Example: `austeer pairs make template -p "The {noun} was" --positive " {good}" --negative " {bad}" --value
    noun=film,book --value good=fine,clever --value bad=poor,silly --out pairs.jsonl`
    """
    from ..making import pairs_from_template
    from ..making.made_pairs import check_out
    from ..making.template import read_values

    common.check_writable(check_out(out), force)
    found = read_values(values, value or ())
    finish(pairs_from_template(prompt, positive, negative, found, count=count, seed=seed), out, json)


def finish(made: Made, out: Path, json: bool, write: bool = True, model: str = "MODEL") -> None:
    """Writes the pairs, and says what they are."""
    from ..errors import count_of
    from ..making import write_pairs

    if write:
        write_pairs(out, made.pairs)
    if json:
        common.emit({"file": out, "pairs": len(made.pairs), "dropped": dict(made.dropped), "notes": list(made.notes)})
        return
    console.print(count_of(len(made.pairs), "pair"))
    for reason, number in made.dropped.items():
        console.print(f"  left out {number}: {reason}")
    for line in made.notes:
        note(line)
    console.print(f"wrote {out}\n{common.next_line('austeer', 'pairs', 'check', out, '--model', model)}", markup=False)
