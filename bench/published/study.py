"""The study: every method beside AUs by effect, over tasks and splits, as tables and figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scipy import stats

from ..study.doses import WAYS
from ..study.rows import CAA, ITI, KINDS
from ..study.summary import interval
from .causal import tables_of
from .load import Result, Results, slug
from .tables import picture, table

#: How near to the KL that is asked for the measured one is meant to be.
WITHIN = 0.25

#: What a row's kind is called.
WORDS = {
    "effect": "by effect",
    "momentum": "momentum",
    "plain": "without gradients",
    "dense": "dense, by gradients",
}


def report(results: Results) -> str:
    """All tables of all results, one model after the other."""
    parts = []
    for result in results.of("study"):
        content = result.content
        parts += [f"### {content['model']}", _about(result), goals(content)]
        for name, task in content["tasks"].items():
            if task["steers"]:
                parts += [f"#### {name}", rows(content, name)]
        parts += [_quiet(content), *_more("How well predictions rank sites and steps", sites(content))]
        parts += _more("Strength in nats", doses(result))
        parts += _more("How many pairs", pairs(content)) + _more("Whose text", texts(content))
    return "\n\n".join(filter(None, parts)) or "Not measured yet: `make study DATA=FOLDER` makes it."


def _about(result: Result) -> str:
    minutes = result.content["seconds"] / 60
    trials = sum(map(len, result.content["trials"].values()))
    return f"{trials} trials, {minutes:.0f} minutes on {result.machine} ({result.link})."


def _more(title: str, text: str) -> list[str]:
    return [f"#### {title}", text] if text else []


def goals(content: dict[str, Any]) -> str:
    """Both goals, met or missed, and what that depends on."""
    ten, hundred = content["goals"]["ten"], content["goals"]["hundred"]
    head = ["task", *(f"minus {rival}" for rival in _rivals(ten["leads"]))]
    leads = [
        [name, *(interval(*found[rival]) if rival in found else "" for rival in _rivals(ten["leads"]))]
        for name, found in ten["leads"].items()
    ]
    lines = [
        f"**{_met(ten)}**: ten AUs by effect (site and step by prediction) are above each method without gradients on "
        "every task where any method works; nats, item by item [95 %]:",
        table(head, leads),
        f"**{_met(hundred)}**: a hundred (the same) are not below dense vectors by gradients, on the mean over tasks:",
        table(
            ["beside", "tasks", "lead, nats [95 %]"],
            [[name, found["tasks"], interval(*found["lead"])] for name, found in hundred["means"].items()],
        ),
    ]
    return "\n\n".join(lines)


def _met(goal: dict[str, Any]) -> str:
    return "Met" if goal["met"] else "Missed"


def _rivals(leads: dict[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(rival for found in leads.values() for rival in found))


def rows(content: dict[str, Any], name: str) -> str:
    """Every method on one task, held-out items of all its splits together; the largest effect of each kind first."""
    found = content["tasks"][name]["rows"].items()
    order = sorted(found, key=lambda row: (KINDS.index(row[1]["kind"]), -row[1]["effect"]))
    head = ["method", "kind", "where", "AUs", "effect, nats [95 %]", f"minus {CAA}", f"minus {ITI}", "KL"]
    return table(
        head,
        [
            [
                *(
                    row_name,
                    WORDS[row["kind"]],
                    *("; ".join(map(str, dict.fromkeys(row[key]))) for key in ("where", "k")),
                ),
                interval(row["effect"], row["low"], row["high"]),
                *(interval(*row["behind"][rival]) if rival in row["behind"] else "" for rival in (CAA, ITI)),
                f"{row['kl']:.3f}",
            ]
            for row_name, row in order
        ],
    )


def _quiet(content: dict[str, Any]) -> str:
    """The tasks of the earlier study, in one line."""
    found = []
    for name, task in content["tasks"].items():
        if not task["steers"] and task["rows"]:
            best, row = max(task["rows"].items(), key=lambda item: item[1]["effect"])
            found.append(f"{name} {interval(row['effect'], row['low'], row['high'])} ({best})")
    return f"Where nothing was found before, the best of all methods: {'; '.join(found)}." if found else ""


def sites(content: dict[str, Any]) -> str:
    """For each task, the site and step of the largest predicted effect, the best measured one, and how ranks agree."""
    lines = []
    for name, trials in content["trials"].items():
        found = trials[0]["sites"]
        if len(found) < 3 or not content["tasks"][name]["steers"]:
            continue
        predicted, best = (max(found, key=lambda row, key=key: row[key]) for key in ("predicted", "effect"))
        rho = stats.spearmanr([row["predicted"] for row in found], [row["effect"] for row in found]).statistic
        both = [f"{'+'.join(row['sites'])}, {row['step']}: {row['effect']:+.2f}" for row in (predicted, best)]
        lines.append([name, *both, f"{rho:+.2f}"])
    head = ["task", "predicted to be best: measured", "best measured", "rank correlation"]
    return table(head, lines) if lines else ""


def doses(result: Result) -> str:
    """The KL that a plan was steered for, and the one on other neutral text that came of it."""
    found = result.content["doses"]
    near = {how: f"{sum(_near(row[how], row['kl']) for row in found)} of {len(found)}" for how in WAYS}
    line = (
        f"AUs by effect of one site, steered for some KLs; the KL on held-out neutral text is within "
        f"{WITHIN:.0%} of that in {near['measured']} cases, and with the strength that the profile predicts alone "
        f"(`exact=False`) in {near['predicted']}. Each cell: KL (by the profile alone)."
    )
    kls = dict.fromkeys(row["kl"] for row in found)
    by = {(row["task"], row["site"], row["k"], row["kl"]): row for row in found}
    lines = [
        [task, site, str(k), *(doses_cell(by.get((task, site, k, kl))) for kl in kls)]
        for task, site, k in dict.fromkeys(key[:3] for key in by)
    ]
    shown = table(["task", "site", "AUs", *(f"asked for {kl:g}" for kl in kls)], lines)
    drawn = picture(f"{result.name}-doses", "Measured KL over the KL that was asked for")
    return f"{line}\n\n{drawn}\n\n{shown}" if found else ""


def _near(kl: float | None, asked: float) -> bool:
    return kl is not None and abs(kl / asked - 1) <= WITHIN


def doses_cell(row: dict[str, Any] | None) -> str:
    """The KL that came of one that was asked for, and in brackets that by the profile alone."""
    if row is None:
        return ""
    measured, predicted = ("refused" if row[how] is None else f"{row[how]:.3f}" for how in ("measured", "predicted"))
    return f"{measured} ({predicted})"


def pairs(content: dict[str, Any]) -> str:
    """Held-out effect by the number of measured pairs."""
    kinds = dict.fromkeys((row["method"], row["k"]) for row in content["pairs"])
    counts = dict.fromkeys(row["pairs"] for row in content["pairs"])
    by = {(row["pairs"], row["method"], row["k"]): row for row in content["pairs"]}
    lines = [[str(count), *(_cell(by.get((count, *kind))) for kind in kinds)] for count in counts]
    return table(["pairs", *(f"{method}, {k} AUs" for method, k in kinds)], lines) if lines else ""


def texts(content: dict[str, Any]) -> str:
    """Held-out effect of AUs chosen with the profile of one text and of another."""
    lines = [
        [row["text"], str(row["k"]), _cell(row), f"{row['shared']:.0%}", f"{row['correlation']:.2f}"]
        for row in content["texts"]
    ]
    head = ["profile of", "AUs", "effect, nats [95 %]", "AUs shared with the first", "rank correlation of side effects"]
    return table(head, lines) if lines else ""


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else interval(row["effect"], row["low"], row["high"])


def values(result: Result) -> Iterator[tuple[str, object]]:
    """Numbers for sentences: ``<task>.<row>.<effect|low|high|kl>``, the row's name as a slug."""
    yield "minutes", result.content["seconds"] / 60
    yield from tables_of(result.content["tasks"])
    for name, task in result.content["tasks"].items():
        for row_name, row in task["rows"].items():
            for key in ("effect", "low", "high", "kl"):
                if row[key] is not None:
                    yield f"{name}.{slug(row_name)}.{key}", row[key]


def drawn(result: Result) -> dict[str, Any]:
    """Held-out effects with intervals, a panel a task that steers: the data of a figure."""
    panels = []
    for name, task in result.content["tasks"].items():
        if not task["steers"]:
            continue
        items = sum(len(trial["groups"]) for trial in result.content["trials"][name])
        found = sorted(task["rows"].items(), key=lambda row: (KINDS.index(row[1]["kind"]), -row[1]["effect"]))
        bars = [[row_name, row["effect"], row["low"], row["high"]] for row_name, row in found if row["low"] is not None]
        panels.append({"title": f"{name}, {items} held-out items", "bars": bars})
    title = f"{result.content['model']}: every method at one limit on the side effect, {result.machine}"
    return {"title": title, "x": "change of log-odds, nats", "panels": panels}


def doses_drawn(result: Result) -> dict[str, Any]:
    """The measured KL over the one that was asked for, a row a task: the data of a figure."""
    words = {"predicted": "the strength that the profile predicts", "measured": "corrected by two measured steps"}
    panels = []
    for how, title in words.items():
        found = [row for row in result.content["doses"] if row[how] is not None]
        marks = [[row["task"], row["site"], float(f"{row[how] / row['kl']:.4g}")] for row in found]
        panels.append({"title": title, "marks": marks})
    title = f"{result.content['model']}: strength in nats, on held-out neutral text"
    return {"title": title, "x": "measured KL / KL asked for", "near": WITHIN, "panels": panels}
