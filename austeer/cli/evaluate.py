"""``austeer evaluate``: a labelled task, unsteered and under plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common
from .common import Chat, ChatOption, Device, DType, Force, Json, Quiet, Split, System, Where
from .evaluate_text import list_templates, show, show_lm_eval
from .search_options import Neutral, Template, read_neutral
from .strength import KL, ProfileFile, alphas_at, parse_alphas, parse_kls, with_doses

if TYPE_CHECKING:
    from torch import nn

    from ..plans.plan import Plan
    from ..tasks import Variant

TaskFile = Annotated[
    str | None, typer.Argument(help="A labelled task: a file, a pattern or hf:ORG/NAME.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or Hub id; 'demo' is SmolLM2-135M-Instruct.", show_default=False),
]
Plans = Annotated[
    list[str] | None,
    typer.Option("--plan", "-p", help="A plan's folder or Hub id; may be repeated.", show_default=False),
]
Alphas = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha",
        "-a",
        metavar="NUMBER",
        help="Strength: one for each plan, one for all, or several of one plan (with commas, or repeated). [default: "
        "the plan's own, if its evidence has one]",
        show_default=False,
    ),
]
LmEval = Annotated[
    str | None,
    typer.Option(
        help="Instead of a file: tasks of lm-eval by name, comma-separated (austeer[lm-eval]).", show_default=False
    ),
]
LmEvalPath = Annotated[
    Path | None, typer.Option(help="A folder with further tasks of lm-eval, as YAML.", show_default=False)
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="A JSON file for everything, item by item.", show_default=False)
]


def evaluate(
    task: TaskFile = None,
    model: Model = None,
    template: Template = None,
    plan: Plans = None,
    alpha: Alphas = None,
    kl: KL = None,
    profile: ProfileFile = None,
    k: Annotated[list[int] | None, typer.Option(help="Only the k most important AUs; as --alpha.", min=1)] = None,
    where: Where = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="At most so many items, drawn with --seed.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the items that --limit draws.")] = 0,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out a question that comes again with the same answer.")
    ] = False,
    chat: Chat = False,
    chat_option: ChatOption = None,
    system: System = None,
    neutral: Neutral = None,
    max_new_tokens: Annotated[int, typer.Option(help="What is written for a numeric answer, at most.", min=1)] = 128,
    templates: Annotated[bool, typer.Option("--templates", help="List the templates that are shipped.")] = False,
    lm_eval: LmEval = None,
    lm_eval_path: LmEvalPath = None,
    out: Out = None,
    force: Force = False,
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

    if templates:
        list_templates(json)
        return
    model = check_sources(task, lm_eval, model)
    conditions = common.parse_where(where)
    if out is not None:
        common.check_writable(out, force)
    texts, form = read_neutral(neutral), common.chat_form(chat, chat_option, system)
    kls = parse_kls(kl, alpha or (), profile)
    asked = make_variants(
        plan or [], kls or parse_alphas(alpha), k or [], Plan.from_pretrained, "kl" if kls else "alpha"
    )
    variants = checked_variants(asked)
    strong = at_kl(variants, profile) if kls else lambda network: variants
    if lm_eval is not None:
        ignored = {"--template": template, "--where": where, "--split": split, "--neutral": neutral}
        for name in (name for name, value in ignored.items() if value):
            raise AusteerError(f"{name}: found it beside --lm-eval, whose tasks have their own data; leave it out")
        scores = lm_eval_scores(lm_eval, lm_eval_path, model, dtype, device, strong, limit=limit, chat=form)
        if out is not None:
            common.write_json(out, scores)
        common.emit(scores) if json else show_lm_eval(scores["lm_eval"])
        return
    assert task is not None
    duplicates = "drop" if drop_duplicates else None
    loaded = load_task(task, template, where=conditions, split=split, duplicates=duplicates)
    if limit is not None:
        loaded = loaded.take(limit, seed)
    network, tokenizer = common.load(model, dtype, device)
    loaded = common.in_chat_form(loaded, tokenizer, form)
    common.note_chat_form({name: variant.plan for name, variant in variants.items()}, form)
    show_bar = False if quiet else None
    result = evaluate_task(
        network, tokenizer, loaded, strong(network), neutral=texts, max_new_tokens=max_new_tokens, progress=show_bar
    )
    if out is not None:
        common.write_json(out, result.to_json())
    if json:
        common.emit(result.to_json(rows=False))
        return
    show(result)
    if out is not None:
        common.console.print(f"wrote {out}")


def check_sources(task: str | None, lm_eval: str | None, model: str | None) -> str:
    """The model's name; refuses what is no task, or two of them."""
    from ..errors import AusteerError

    if (task is None) == (lm_eval is None):
        found = "neither" if task is None else "both"
        raise AusteerError(f"found {found} a task's file and --lm-eval, expected one of them")
    if model is None:
        raise AusteerError("--model: found none, expected a folder, a Hub id, or demo")
    return model


def lm_eval_scores(
    tasks: str,
    path: Path | None,
    model: str,
    dtype: str,
    device: str | None,
    strong: Callable[[nn.Module], dict[str, Variant]],
    **options: Any,
) -> dict[str, Any]:
    """What lm-eval finds on its own tasks."""
    from ..tasks.lm_eval import check_tasks, lm_evaluate

    names = check_tasks(common.split_names(tasks), path)
    network, tokenizer = common.load(model, dtype, device)
    scores = lm_evaluate(network, tokenizer, names, strong(network), include_path=path, **options)
    return {"model": model, "lm_eval": scores}


def at_kl(variants: dict[str, Variant], file: Path | None) -> Callable[[nn.Module], dict[str, Variant]]:
    """What finds, on a model, the strengths of variants whose strength is given as a KL.

    Args:
        file: a profile, for plans without a dose.

    Raises:
        SteeringError: a plan that has no dose and gets none.
    """
    plans, made = with_doses({name: variant.plan for name, variant in variants.items()}, file)

    def strong(network: nn.Module) -> dict[str, Variant]:
        kls: dict[str, Any] = {name: variant.alpha for name, variant in variants.items()}
        found = alphas_at(network, plans, kls, {name: variant.k for name, variant in variants.items()}, made)
        return {name: variant._replace(alpha=found[name]) for name, variant in variants.items()}

    return strong


def make_variants(
    plans: Sequence[str],
    alphas: Sequence[float],
    ks: Sequence[int],
    read: Callable[[str], Plan],
    unit: str = "alpha",
) -> dict[str, Variant]:
    """The steerings that --plan, --alpha and --k ask for, by a name for each.

    Args:
        unit: "kl" where ``alphas`` are those of --kl.

    Raises:
        TaskError: numbers of options that do not go together, or the same steering twice.
    """
    from ..errors import TaskError
    from ..tasks import Variant

    for name, given in ((f"--{unit}", alphas), ("--k", ks)):
        if given and not plans:
            raise TaskError(f"{name}: found {given[0]} and no plan, expected --plan")
        if len(plans) > 1 and len(given) not in (0, 1, len(plans)):
            raise TaskError(f"{name}: found {len(given)} for {len(plans)} plans, expected one for all or one for each")
    if len(plans) == 1 and len(alphas) > 1 and len(ks) not in (0, 1, len(alphas)):
        raise TaskError(f"--k: found {len(ks)} for {len(alphas)} strengths, expected one for all or one for each")
    count = max(len(plans), len(alphas), len(ks)) if plans else 0
    sources, strengths, numbers = _spread(plans, count), _spread(alphas, count), _spread(ks, count)
    loaded = {source: read(source) for source in dict.fromkeys(plans)}
    short = dict(zip(loaded, common.plan_names(list(loaded))))
    found: dict[str, Variant] = {}
    for source, alpha, k in zip(sources, strengths, numbers):
        name = short[source]
        if sources.count(source) > 1:  # told apart by what differs
            name += f", {unit} {alpha:.12g}" if alpha is not None and len(set(strengths)) > 1 else ""
            name += f", k {k}" if k is not None and len(set(numbers)) > 1 else ""
        if name in found:
            raise TaskError(f"--plan: found {name} twice, expected different plans, strengths or numbers of AUs")
        found[name] = Variant(loaded[source], alpha, k)
    return found


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """One value for all, or one for each; None for none."""
    return list(values) if len(values) == count else [values[0] if values else None] * count
