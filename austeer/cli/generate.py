"""``austeer generate``: a plan's text beside the unsteered one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common
from .common import Chat, ChatOption, Device, DType, Json, Model, System, console
from .strength import KL, ProfileFile, alphas_at, parse_alphas, parse_kls, with_doses

if TYPE_CHECKING:
    from torch import nn

    from ..momentum.profile import Profile
    from ..plans.plan import Plan
    from ..steering.report import Report
    from ..steering.scope import ScopeLike
    from ..steering.steering import Steering


Alphas = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha",
        "-a",
        metavar="NUMBER",
        help="Strength; several with commas, or repeated. [default: the plan's own recommendation, or 1]",
    ),
]


def generate(
    plan: Annotated[
        list[str],
        typer.Argument(help="A plan's folder, or a Hub id USER/NAME or USER/NAME@REVISION; several run in one batch."),
    ],
    model: Model,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to continue; may be repeated.")],
    alpha: Alphas = None,
    kl: KL = None,
    profile: ProfileFile = None,
    k: Annotated[int | None, typer.Option(help="Only the k most important AUs. [default: all]")] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="all, prompt, generation, answer (generation without thoughts and calls of tools, by the tokenizer's "
            "own markers), last_prompt_token, from_last_prompt_token, or tokens such as 0:16 or 16:  "
            "[default: all; with --when generation]",
            show_default=False,
        ),
    ] = None,
    when: Annotated[
        Path | None,
        typer.Option(help="Steer only after prompts on which this probe (austeer probe) fires.", show_default=False),
    ] = None,
    mode: Annotated[str, typer.Option(help="auto, fold, fused, columns or dense.")] = "auto",
    chat: Chat = False,
    chat_option: ChatOption = None,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 40,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample.", min=0, max=2**63 - 1)] = 0,
    report: Annotated[bool, typer.Option("--report", help="Also show which path each site took.")] = False,
    dtype: DType = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Continue prompts unsteered and steered, side by side.

    Example: `austeer generate plans/kind --model demo --alpha 8 --prompt "The weekend trip was"`

    With several plans every prompt is one row of a batch for each plan and one for none:
    `austeer generate plans/kind plans/brief --model demo --prompt "The weekend trip was"`
    """
    from ..forward.generation import continue_prompts
    from ..plans.plan import Plan
    from ..plans.probe import Probe
    from ..steering.steer import steer

    probe = None if when is None else Probe.load(when)
    plans = dict(zip(common.plan_names(plan), map(Plan.from_pretrained, plan)))
    only = next(iter(plans.values())) if len(plans) == 1 else None
    strengths: list[Any] = list(dict.fromkeys(parse_alphas(alpha))) or [_recommended(plans)]
    kls = list(dict.fromkeys(parse_kls(kl, alpha or (), profile)))
    steered, made = with_doses(plans, profile) if kls else (plans, None)
    form = common.chat_form(chat, chat_option, system)
    network, tokenizer = common.load(model, dtype, device)
    common.note_chat_form(plans, form)
    write = partial(
        continue_prompts,
        network,
        tokenizer,
        max_new_tokens=max_new_tokens,
        chat=form,
        seed=seed,
        temperature=temperature if sample else None,
    )
    if kls:
        strengths = [_at_kl(network, steered, one, k, made) for one in kls]
    labels = [f"kl {one:.12g}" for one in kls] or _labels(strengths)
    tokens = _scope(scope or ("all" if probe is None else "generation"), tokenizer)
    steering = steer(network, only or plans, strengths[0], k=k, scope=tokens, mode=mode, when=probe)
    results = _written(steering, plans, dict(zip(labels, strengths)), prompt, write)
    found = _report(steering, len(prompt))
    if json:
        shown: dict[str, Any] = {"alphas": dict(zip(labels, strengths))} if kls else {}
        shown |= {"report": [asdict(row) for row in found]} if report else {}
        shown |= {} if found.when is None else {"when": asdict(found.when)}
        common.emit({"prompts": prompt, "continuations": results, **shown})
        return
    for one, strength in zip(labels, strengths) if kls else ():
        console.print(f"{one}: alpha {_number(strength, 4)}", markup=False)
    _show(prompt, results)
    if report:
        console.print(str(found))
    elif when is not None:
        console.print(str(found.when))


def _written(
    steering: Steering,
    plans: dict[str, Plan],
    strengths: dict[str, Any],
    prompts: list[str],
    write: Callable[..., list[str]],
) -> dict[str, list[str]]:
    """What is written after each prompt, unsteered and at each strength; several plans in one batch."""
    results: dict[str, list[str]] = {}
    if len(plans) == 1:
        results["unsteered"] = write(prompts=prompts)
    with steering:
        for label, strength in strengths.items():
            steering.alpha = strength
            if len(plans) == 1:
                results[label] = write(prompts=prompts)
                continue
            rows = [None, *plans]
            with steering.rows([row for row in rows for _ in prompts]):
                texts = write(prompts=prompts * len(rows))
            for number, row in enumerate(rows):
                part = texts[number * len(prompts) : (number + 1) * len(prompts)]
                results["unsteered" if row is None else f"{row}, {label}"] = part
    return results


def _report(steering: Steering, prompts: int) -> Report:
    """What was done, with a probe's decision on each prompt once: it judged every plan's row, at every strength."""
    report = steering.report()
    if (when := report.when) is not None:
        scores = when.scores[:prompts]
        fired = sum(score > when.threshold for score in scores)
        report.when = replace(when, decided=len(scores), fired=fired, scores=scores)
    return report


def _show(prompts: Sequence[str], results: dict[str, list[str]]) -> None:
    """Each prompt with its continuations."""
    width = max(12, *map(len, results))
    for i, text in enumerate(prompts):
        console.print(f"[bold]{_plain(text)}[/]")
        for name, texts in results.items():
            console.print(f"  [cyan]{name:<{width}}[/] {_plain(texts[i])}")


def _recommended(plans: dict[str, Plan]) -> Any:
    """The strength that each plan's evidence says to start with, 1 where there is none; of one plan without a name."""
    found = {name: plan.evidence.alpha if plan.evidence else None for name, plan in plans.items()}
    strengths = {name: 1.0 if alpha is None else alpha for name, alpha in found.items()}
    return next(iter(strengths.values())) if len(strengths) == 1 else strengths


def _at_kl(network: nn.Module, plans: dict[str, Plan], kl: float, k: int | None, profile: Profile | None) -> Any:
    """The strength at which each plan has this KL; of one plan without a name."""
    found = alphas_at(network, plans, dict.fromkeys(plans, kl), dict.fromkeys(plans, k), profile)
    return next(iter(found.values())) if len(plans) == 1 else found


def _labels(alphas: Sequence[Any]) -> list[str]:
    """A name for each strength: in as few digits as tell them apart."""
    short = [f"alpha {_number(alpha, 4)}" for alpha in alphas]
    return short if len(set(short)) == len(short) else [f"alpha {_number(alpha, 12)}" for alpha in alphas]


def _number(alpha: Any, digits: int) -> str:
    if not isinstance(alpha, dict):
        return f"{alpha:.{digits}g}"
    if len(set(map(str, alpha.values()))) == 1:
        return _number(next(iter(alpha.values())), digits)
    return ", ".join(f"{name} {_number(value, digits)}" for name, value in alpha.items())


def _scope(text: str, tokenizer: Any) -> ScopeLike:
    if text == "answer":
        from ..steering.answer_scope import answer_scope

        return answer_scope(tokenizer)
    start, colon, stop = text.partition(":")
    if not colon or not all(part.isdecimal() or not part for part in (start, stop)):
        return text
    return int(start or 0), int(stop) if stop else None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
