"""The model card of a plan: what it is, what is known of it, and how to use it, all from the plan itself."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import count_of
from ..pairs.chat import chat_arguments, describe_form
from .dose_table import dose_legend, dose_rows, dose_table
from .evidence import Evidence
from .hub import split_id
from .serving import KEY, VLLM_DEFAULT_RANK, VLLM_RANKS, vllm_rank
from .table import PlanTable

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

FORMULAS = {
    "scale": "x + alpha \\* beta \\* x (the paper's)",
    "push": "x + alpha \\* beta \\* abs(x)",
    "shift": "x + alpha \\* delta",
    "ablate": "x - alpha \\* d \\* (the sum of d \\* x over the AUs of its layer), d their delta at length 1",
}
TIES = {
    "effect": "by effect size, then layer and index",
    "public": "by layer, then index, as in the paper's public code",
}
RANKS = {
    "momentum": "the size of beta: on how many pairs an AU is larger on one side (the paper's)",
    "difference": "the size of the mean difference",
    "effect": "what a shift does to the wanted log-odds, for what it does to neutral text",
    "mixed": "more than one measure: a sum of plans",
}
STEPS = {
    "difference": "its mean difference, in the activation's own unit",
    "newton": "the shift at alpha = 1, in the activation's own unit: Newton's step, which has the largest effect at a "
    "given KL on neutral text",
    "mixed": "its shift at alpha = 1, in the activation's own unit, as the plans that were summed have it",
}
STRONGEST = 10
#: The KL of the examples for a plan with a dose: nats a token.
KL = 0.1


def model_card(plan: PlanTable, repo_id: str | None = None, *, license: str | None = None) -> ModelCard:
    """The card of a plan, with its metadata; ``str`` of it is the README.md.

    Figures are those of ``plan.evidence``; where there is none, the card says so.

    Args:
        repo_id: where the plan will be, for the title and the examples; by default a folder's place is left open.
        license: for the metadata; by default none is named.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = plan.model.name if split_id(plan.model.name) == (plan.model.name, None) else None
    data = ModelCardData(
        base_model=base, library_name="austeer", license=license, tags=["austeer", "activation-steering"]
    )
    if base:
        data["base_model_relation"] = "adapter"
    title = repo_id.split("/")[1] if repo_id else f"A steering plan for {_plain(plan.model.name)}"
    sections = [f"# {title}", _what(plan, base), _dose(plan), _effect(plan), _cost(plan), _use(plan, repo_id)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _what(plan: PlanTable, base: str | None) -> str:
    name = _plain(plan.model.name)
    model = f"[{name}](https://huggingface.co/{base})" if base else f"{name} (not a name on the Hub)"
    facts = {
        "model": model,
        "revision": "not known" if plan.model.revision is None else _plain(plan.model.revision),
        "architecture": f"{_plain(plan.model.model_type)}, {plan.model.layers} layers",
        **{f"site {_plain(site)}": _site(plan, site) for site in plan.sites},
        "operation": f"{plan.operation}: an AU's activation x becomes {FORMULAS[plan.operation]}",
        "k": f"{len(plan)} AUs",
        "ranked by": RANKS[plan.rank],
        "pairs": str(plan.pairs),
        "ties": TIES[plan.ties],
        "chat template": f"the prompts went {_plain(describe_form(plan.chat_template))}",
    }
    units = list(plan.top(min(STRONGEST, len(plan))))
    return "\n\n".join(
        [
            f"A steering plan for {model}: {count_of(len(plan), 'single activation dimension')} (atomic units, AUs), "
            f"and how strongly each is pushed, made with `austeer` from {count_of(plan.pairs, 'contrastive pair')} of "
            "texts. It holds no weights and no code.",
            _table(["", ""], facts.items()),
            f"The {len(units)} most important AUs:" if len(units) < len(plan) else "The AUs, most important first:",
            _table(
                ["site", "layer", "AU", "beta", "delta"],
                ([_plain(u.site), u.layer, u.index, f"{u.beta:+.3f}", f"{u.delta:+.4g}"] for u in units),
            ),
            "beta: the signed share of pairs on which the AU was larger on the wanted text. delta: "
            f"{STEPS[plan.step]}.",
        ]
    )


def _site(plan: PlanTable, site: str) -> str:
    layers = sorted(set(plan.layer[plan.of(site)].tolist()))
    shown = ", ".join(map(str, layers[:12])) + (" ..." if len(layers) > 12 else "")
    return f"{count_of(plan.site.count(site), 'AU')} in {count_of(len(layers), 'layer')} (from 0): {shown}"


def _dose(plan: PlanTable) -> str:
    if plan.dose is None or not (rows := dose_rows(plan.dose)):
        return ""
    headings, *cells = dose_table(rows)
    return "\n\n".join(
        [
            "## Dose",
            "What a strength does, without running it: `austeer.steer(model, plan, kl=...)` takes the KL and finds "
            "alpha.",
            _table(headings, cells),
            _plain(dose_legend(plan.dose, plan.rank)) + ".",
        ]
    )


def _effect(plan: PlanTable) -> str:
    evidence = plan.evidence
    if evidence is None or not evidence.tested:
        return (
            "## Effect\n\nNot tested: no strength was tried for this card. Begin with a small alpha and raise it; "
            "one that is too strong breaks the text."
        )
    rows = (
        [
            _alpha(row.alpha),
            _plain(row.data),
            f"{row.effect:+.3g}{_interval(row.low, row.high, '+.3g')}",
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.side_effect is None else f"{row.side_effect:+.3g}",
        ]
        for row in evidence.tested
    )
    side = f" Side effect: {_plain(evidence.side_effect)}." if evidence.side_effect else ""
    start = f" Start with alpha {_alpha(evidence.alpha)}." if evidence.alpha is not None else ""
    return "\n\n".join(
        [
            "## Effect",
            f"Tested with alpha {_ranges(evidence)}.{start}",
            f"Effect: {_plain(evidence.effect)}.{side}",
            _table(["alpha", "tested on", "effect", "moved the wanted way", "side effect"], rows),
        ]
    )


def _cost(plan: PlanTable) -> str:
    if plan.evidence is None or not plan.evidence.overhead:
        return (
            "## Cost\n\nNot measured. `austeer cost` predicts it from the model's config, `austeer bench` measures it "
            "on your machine."
        )
    rows = (
        [
            _plain(row.path),
            _plain(row.setting),
            _plain(row.device),
            f"{row.percent:+.1f} %{_interval(row.low, row.high, '+.1f')}",
        ]
        for row in plan.evidence.overhead
    )
    return "## Cost\n\nTime over the unsteered model's:\n\n" + _table(["path", "setting", "device", "overhead"], rows)


def _use(plan: PlanTable, repo_id: str | None) -> str:
    alpha = plan.evidence.alpha if plan.evidence and plan.evidence.alpha is not None else 1.0
    strength = "ALPHA" if isinstance(alpha, dict) else f"{alpha:.4g}"
    python_option = f"alpha={json.dumps(alpha) if isinstance(alpha, dict) else strength}"
    option = f"--alpha {strength}"
    if plan.dose is not None and dose_rows(plan.dose) and (plan.evidence is None or plan.evidence.alpha is None):
        # an engine's plugin measures nothing, so there the strength is the predicted one
        python_option, option, strength = f"kl={KL:g}", f"--kl {KL:g}", f"{plan.dose.alpha(KL):.4g}"
    where = repo_id or "FOLDER"
    python = f"""```python
import austeer
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {json.dumps(plan.model.name, ensure_ascii=False)}
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
plan = austeer.Plan.from_pretrained({json.dumps(where, ensure_ascii=False)})
with austeer.steer(model, plan, {python_option}):
    inputs = tokenizer("The weekend trip was", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```"""
    model, chat = shlex.quote(plan.model.name), chat_arguments(plan.chat_template)
    shell = f"austeer generate {where} --model {model} {option}{chat} --prompt {shlex.quote(_PROMPT)}"
    return "\n\n".join(
        [
            "## Use",
            "In Python (`pip install austeer`):",
            python,
            "In a shell, beside the unsteered text:",
            f"```sh\n{shell}\n```",
            _serve(plan, where, model, strength),
            "The plan fits this model, and models fine-tuned from it; another architecture is refused before anything "
            "is touched.",
        ]
    )


_PROMPT = "The weekend trip was"


def _serve(plan: PlanTable, where: str, model: str, strength: str) -> str:
    short = re.sub(r"[^A-Za-z0-9]+", "-", where.split("/")[-1]).strip("-") or "plan"
    why = _why_no_lora(plan)
    if why is not None:
        # a plan is JSON in a shell's single quotes: neither has any in a Hub id
        settings = json.dumps({"sets": {short: {"plan": where, "alpha": "ALPHA"}}}).replace('"ALPHA"', strength)
        return (
            f"On a server: {why}, so austeer's plugin for vLLM steers at run time the requests that have "
            f'`"vllm_xargs": {{"{KEY}": "{short}"}}`:\n\n'
            f"```sh\nausteer serve {model} --sets '{settings}'\n```"
        )
    rank = _rank(plan)
    allowed = vllm_rank(rank)
    command = f"austeer export lora {where} --model {model} --alpha {strength} --out {short}-lora"
    serve = f"vllm serve {model} --enable-lora --lora-modules {short}={short}-lora"
    if allowed is None:
        command = f"austeer export checkpoint {where} --model {model} --alpha {strength} --out {short}-folded"
        serve = f"vllm serve {short}-folded"
        what = f"folded weights, as a LoRA of rank {rank} is more than vLLM takes ({VLLM_RANKS[-1]})"
    else:
        serve += "" if allowed <= VLLM_DEFAULT_RANK else f" --max-lora-rank {allowed}"
        what = f"exactly a LoRA adapter of rank {rank}, which PEFT, vLLM and others load without a plugin"
    return (
        f"On a server: {what}. Where the model does not allow that (some mixtures of experts, a projection with a "
        f"bias), the export says so and what to do.\n\n```sh\n{command}\n{serve}\n```"
    )


def _why_no_lora(plan: PlanTable) -> str | None:
    if plan.operation == "push":
        return "`push` is not linear, so a LoRA cannot carry the plan"
    if plan.operation == "shift":
        return "`shift` adds a constant, which a LoRA cannot carry"
    if "layer" in plan.sites:
        return "no weights make the output of a whole decoder layer, so a LoRA cannot carry the plan"
    return None


def _rank(plan: PlanTable) -> int:
    """Of the plan's adapter: the most that a linear layer needs; a down projection serves two sites.

    That is one for each AU, and of "ablate" one for each site.
    """
    places = [(unit.site, unit.layer) for unit in plan]
    needed = set(places) if plan.operation == "ablate" else places
    return max(Counter((site == "attention", layer) for site, layer in needed).values())


def _ranges(evidence: Evidence) -> str:
    def one(low: float, high: float) -> str:
        return f"{low:.12g}" if low == high else f"{low:.12g} to {high:.12g}"

    ranges = evidence.ranges().items()
    return "; ".join(one(*ends) if site is None else f"{_plain(site)} {one(*ends)}" for site, ends in ranges)


def _alpha(alpha: float | dict[str, float] | None) -> str:
    if isinstance(alpha, dict):
        return ", ".join(f"{_plain(site)} {value:.4g}" for site, value in alpha.items())
    return f"{alpha:.4g}"


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f" \\[{low:{form}}, {high:{form}}\\]"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: a name or a description may come from a stranger."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", text)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
