"""``austeer evaluate``: a labelled task, unsteered and under plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Device,
    DType,
    Json,
    Quiet,
    check_writable,
    console,
    emit,
    load,
    note,
    parse_where,
    split_names,
    write_json,
)
from .evaluate_text import list_templates, show, show_lm_eval
from .search_options import Chat, Neutral, Template, read_neutral

if TYPE_CHECKING:
    from ..plans.plan import Plan
    from ..tasks import Variant


def evaluate(
    task: Annotated[
        str | None,
        typer.Argument(help="A labelled task: a file, a pattern or hf:ORG/NAME.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder or Hub id; 'demo' is SmolLM2-135M-Instruct.", show_default=False),
    ] = None,
    template: Template = None,
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", help="A plan's folder or Hub id; may be repeated.", show_default=False),
    ] = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            "--alpha",
            "-a",
            help="Strength: one for each plan, one for all, or several of one plan. [default: the plan's own, if its "
            "evidence has one]",
            show_default=False,
        ),
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="Only the k most important AUs; as --alpha.", min=1)] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only rows where FIELD=VALUE; may be repeated.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of a dataset.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many items, drawn with --seed.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the items that --limit draws.")] = 0,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out a question that comes again with the same answer.")
    ] = False,
    chat: Chat = False,
    neutral: Neutral = None,
    max_new_tokens: Annotated[int, typer.Option(help="What is written for a numeric answer, at most.", min=1)] = 128,
    templates: Annotated[bool, typer.Option("--templates", help="List the templates that are shipped.")] = False,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            help="Instead of a file: tasks of lm-eval by name, comma-separated (austeer[lm-eval]).", show_default=False
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(help="A folder with further tasks of lm-eval, as YAML.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A JSON file for everything, item by item.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    dtype: DType = "auto",
    device: Device = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How well a model does on a labelled task, and what plans change about it.

    Example: `austeer evaluate boolq.jsonl --template boolq --model demo --plan plans/kind --alpha 8 --limit 200`

    `austeer evaluate --templates` lists the templates; a file with the fields prompt, options and label (or prompt and
    answer) needs none.
    """
    from ..errors import AusteerError
    from ..plans.plan import Plan
    from ..tasks import checked_variants, load_task
    from ..tasks import evaluate as evaluate_task
    from ..tasks.lm_eval import check_tasks, lm_evaluate

    if templates:
        list_templates(json)
        return
    if (task is None) == (lm_eval is None):
        found = "neither" if task is None else "both"
        raise AusteerError(f"found {found} a task's file and --lm-eval, expected one of them")
    if model is None:
        raise AusteerError("--model: found none, expected a folder, a Hub id, or demo")
    conditions = parse_where(where)
    if out is not None:
        check_writable(out, force)
    texts = read_neutral(neutral)
    variants = checked_variants(make_variants(plan or [], alpha or [], k or [], Plan.from_pretrained))
    if lm_eval is not None:
        ignored = {"--template": template, "--where": where, "--split": split, "--neutral": neutral}
        for name, value in ignored.items():
            if value:
                raise AusteerError(f"{name}: found it beside --lm-eval, whose tasks have their own data; leave it out")
        names = check_tasks(split_names(lm_eval), lm_eval_path)
        network, tokenizer = load(model, dtype, device)
        scores = lm_evaluate(network, tokenizer, names, variants, limit=limit, chat=chat, include_path=lm_eval_path)
        data: dict[str, Any] = {"model": model, "lm_eval": scores}
        if out is not None:
            write_json(out, data)
        emit(data) if json else show_lm_eval(scores)
        return
    loaded = load_task(
        task,
        template,
        where=conditions,
        split=split,
        duplicates="drop" if drop_duplicates else None,
    )
    if limit is not None:
        loaded = loaded.take(limit, seed)
    network, tokenizer = load(model, dtype, device)
    if chat:
        loaded = loaded.with_chat_template(tokenizer)
    for name, variant in variants.items():
        if variant.plan.chat_template != chat:
            form = "through" if variant.plan.chat_template else "without"
            note(f"{name} was measured {form} a chat template, and these prompts are not; see --chat")
    result = evaluate_task(
        network,
        tokenizer,
        loaded,
        variants,
        neutral=texts,
        max_new_tokens=max_new_tokens,
        progress=False if quiet or json else None,
    )
    if out is not None:
        write_json(out, result.to_json())
    if json:
        emit(result.to_json(rows=False))
        return
    show(result)
    if out is not None:
        console.print(f"wrote {out}")


def make_variants(
    plans: Sequence[str], alphas: Sequence[float], ks: Sequence[int], read: Callable[[str], Plan]
) -> dict[str, Variant]:
    """The steerings that --plan, --alpha and --k ask for, by a name for each.

    Raises:
        TaskError: numbers of options that do not go together, or the same steering twice.
    """
    from ..errors import TaskError
    from ..tasks import Variant

    for name, given in (("--alpha", alphas), ("--k", ks)):
        if given and not plans:
            raise TaskError(f"{name}: found {given[0]} and no plan, expected --plan")
        if len(plans) > 1 and len(given) not in (0, 1, len(plans)):
            raise TaskError(f"{name}: found {len(given)} for {len(plans)} plans, expected one for all or one for each")
    if len(plans) == 1 and len(alphas) > 1 and len(ks) not in (0, 1, len(alphas)):
        raise TaskError(f"--k: found {len(ks)} for {len(alphas)} strengths, expected one for all or one for each")
    count = max(len(plans), len(alphas), len(ks)) if plans else 0
    sources, strengths, numbers = _spread(plans, count), _spread(alphas, count), _spread(ks, count)
    loaded = {source: read(source) for source in dict.fromkeys(plans)}
    short = {source: Path(source).resolve().name for source in loaded}
    if len(set(short.values())) < len(short):
        short = {source: source for source in loaded}
    found: dict[str, Variant] = {}
    for source, alpha, k in zip(sources, strengths, numbers):
        name = short[source]
        if sources.count(source) > 1:  # told apart by what differs
            name += f", alpha {alpha:.12g}" if alpha is not None and len(set(strengths)) > 1 else ""
            name += f", k {k}" if k is not None and len(set(numbers)) > 1 else ""
        if name in found:
            raise TaskError(f"--plan: found {name} twice, expected different plans, strengths or numbers of AUs")
        found[name] = Variant(loaded[source], alpha, k)
    return found


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """One value for all, or one for each; None for none."""
    return list(values) if len(values) == count else [values[0] if values else None] * count
