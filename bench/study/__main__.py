"""The command of the study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import austeer
from austeer.baselines import METHODS
from austeer.causal import causal_check
from austeer.cli.common import console, load, note, split_names, write_json
from austeer.cli.search_options import bars
from austeer.errors import FileFormatError, TaskError
from austeer.momentum.momentum import Momentum
from austeer.momentum.profile import Profile
from austeer.tuning.data import Most, Parts
from austeer.utils.environment import environment
from austeer.utils.tables import show_table

from ..files import slug
from . import extras, summary
from .doses import doses
from .gemma import GEMMA, GEMMA_ID, TERMS, gemma_model
from .rows import CAA, MEASURED, middle_layers
from .subjects import QUICK, SUBJECTS, Subject, parts_of
from .trial import MOMENTUM, Setting, run

MODEL, SEEDS = "demo", 3

#: Of what is not asked for.
NOTHING: dict[str, Any] = {"found": [], "seconds": 0.0}

#: The task on which numbers of pairs and profiles of other text are compared; the task of that text; how much of it.
ASKED_OF, OTHER_TEXT, TEXTS, DRAWS = "tense", "reviews", 16, 96

#: Draws of the profile with --quick.
QUICK_DRAWS = 24

#: The task and site of the causal check; AUs, further AUs, and items of it.
CAUSAL, CAUSAL_SITE, CAUSAL_N, CAUSAL_SAMPLE, CAUSAL_ITEMS = "sentiment", "attention", 10, 24, 16


def main(
    data: Annotated[
        Path | None, typer.Option(help="The folder of the tasks' files; without it, sentiment only.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the trials and the result.")] = Path(
        "runs/study"
    ),
    only: Annotated[str, typer.Option(help="Some tasks, separated by commas. [default: all]")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="demo, gemma, or a folder or Hub id.")] = MODEL,
    seeds: Annotated[int, typer.Option(min=1, help="Splits of each task.")] = SEEDS,
    quick: Annotated[bool, typer.Option("--quick", help="Few items, one split: it works.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Compare AUs by effect and every other method on real tasks, and write bench's result file of it.

    Given again, it goes on where it was interrupted.
    """
    subjects = chosen_subjects(only, data)
    seeds, most = (1, QUICK) if quick else (seeds, None)
    splits = {s.name: [parts_of(s, data, seed, most) for seed in range(min(seeds, s.seeds))] for s in subjects}
    texts = _sentences(data) if ASKED_OF in splits else []
    show = False if quiet else None
    setting = setting_of(model, out, quick, show)
    trials: dict[str, list[dict[str, Any]]] = {}
    for name, parts in splits.items():
        for each in parts:
            trials.setdefault(name, []).append(run(setting, each, out / f"{name}-{each.seed}", not each.seed))
            console.print(f"{name}, split {each.seed}: {trials[name][-1]['seconds']:.0f} s")
    content = content_of(setting, subjects, trials)
    first = {s.name: splits[s.name][0] for s in subjects}
    stages = {
        "pairs": _pairs_needed(setting, first, trials, data, out, most),
        "texts": _other_text(setting, first, texts, out, show),
        "causal": _causal(setting, first, out, show),
        "doses": _doses(setting, [s.name for s in subjects if s.steers], out),
    }
    content |= {name: stages[name]["found"] for name in ("pairs", "texts", "doses")}
    if CAUSAL in first:
        content["tasks"][CAUSAL]["causal"] = stages["causal"]["found"]
    seconds = sum(trial["seconds"] for each in trials.values() for trial in each)
    content["seconds"] = seconds + sum(stage["seconds"] for stage in stages.values()) + setting.seconds
    console.print()
    show_result(content)
    write(out, content, quick)


def chosen_subjects(only: str, data: Path | None) -> list[Subject]:
    """Those that are named, or all that there is data for.

    Raises:
        TaskError: a name that is not known.
    """
    names = split_names(only)
    unknown = {*names} - {subject.name for subject in SUBJECTS}
    if unknown:
        raise TaskError(f"--only: found {', '.join(unknown)}, expected some of {', '.join(s.name for s in SUBJECTS)}")
    return [s for s in SUBJECTS if (s.name in names if names else data is not None or not s.file)]


def _sentences(data: Path | None) -> list[str]:
    """The other text: sentences of another task."""
    (subject,) = (s for s in SUBJECTS if s.name == OTHER_TEXT)
    pairs = parts_of(subject, data, 0).measure
    assert pairs is not None
    return [(pair.prompt + pair.positive).strip() for pair in pairs[:TEXTS]]


def setting_of(model: str, out: Path, quick: bool, show: bool | None) -> Setting:
    """The model and its profile, which is kept in the folder.

    Raises:
        FileFormatError: the folder is of another model, or of a quick run where this one is whole, or the reverse.
    """
    if model == GEMMA:
        note(TERMS)
    network, tokenizer = load(str(gemma_model()) if model == GEMMA else model, "float32", "cpu")
    if model == GEMMA:
        network.config._name_or_path = GEMMA_ID  # not where it lies on this machine
    path, about = out / "profile.safetensors", out / "study.json"
    asked = {"model": network.config._name_or_path, "quick": quick}
    if about.exists() and (found := json.loads(about.read_text(encoding="utf-8"))) != asked:
        raise FileFormatError(f"{about}: found {found}, expected {asked}; give another --out")
    write_json(about, asked)

    def make() -> int:
        kept: dict[str, Any] = {"checkpoint": path.with_suffix(".checkpoint"), "resume": True, "progress": show}
        made = austeer.profile(network, tokenizer, list(MEASURED), draws=QUICK_DRAWS if quick else None, **kept)
        made.save(path)
        path.with_suffix(".checkpoint").unlink(missing_ok=True)
        return len(made.tokens)

    seconds = extras.kept(out / "profile.json", make)["seconds"]
    return Setting(network, tokenizer, Profile.load(path), bars(show), seconds)


def content_of(
    setting: Setting, subjects: Sequence[Subject], trials: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The result: trials, each task's rows over its trials, and the goals."""
    tasks = {s.name: {"steers": s.steers, "rows": summary.pooled(trials[s.name])} for s in subjects}
    rows = {name: task["rows"] for name, task in tasks.items()}
    methods = {name: {"what": method.what, "source": method.source} for name, method in METHODS.items()}
    return {
        "model": Path(setting.name).name if Path(setting.name).is_absolute() else setting.name,
        "methods": methods,
        "tasks": tasks,
        "trials": trials,
        "goals": summary.goals(rows, trials),
    }


def _pairs_needed(
    setting: Setting, first: dict[str, Parts], trials: dict[str, Any], data: Path | None, out: Path, most: Most | None
) -> dict[str, Any]:
    if ASKED_OF not in first:
        return NOTHING
    (subject,) = (s for s in SUBJECTS if s.name == ASKED_OF)
    _, tuned, held_out = most or subject.most
    parts = parts_of(subject, data, 0, (max(extras.PAIRS) if most is None else most[0], tuned, held_out))
    caa = next((row for row in trials[ASKED_OF][0]["rows"] if row["name"] == CAA), None)
    layer = int(caa["detail"].split()[-1]) if caa else middle_layers(setting.profile.model.layers)[-1]
    counts = extras.PAIRS if most is None else (8, most[0])
    folder = out / "pairs"
    return extras.kept(folder / "pairs.json", lambda: extras.pairs_needed(setting, parts, folder, layer, counts))


def _other_text(
    setting: Setting, first: dict[str, Parts], texts: list[str], out: Path, show: bool | None
) -> dict[str, Any]:
    if ASKED_OF not in first:
        return NOTHING
    folder = out / "texts"

    def make() -> list[dict[str, Any]]:
        folder.mkdir(parents=True, exist_ok=True)
        kept: dict[str, Any] = {"checkpoint": folder / "profile.checkpoint", "resume": True, "progress": show}
        draws = min(DRAWS, len(setting.profile.tokens))
        other = austeer.profile(setting.model, setting.tokenizer, [extras.SITE], texts, draws=draws, **kept)
        momentum = Momentum.load(out / f"{ASKED_OF}-0" / MOMENTUM)
        return extras.other_text(setting, first[ASKED_OF], folder, other, OTHER_TEXT, momentum)

    return extras.kept(folder / "texts.json", make)


def _causal(setting: Setting, first: dict[str, Parts], out: Path, show: bool | None) -> dict[str, Any]:
    """The causal check of one task; docs/causal.md shows it."""
    if CAUSAL not in first:
        return NOTHING
    folder = out / f"{CAUSAL}-0"

    def make() -> dict[str, Any]:
        items, momentum = first[CAUSAL].tune.take(CAUSAL_ITEMS), Momentum.load(folder / MOMENTUM)
        found = causal_check(
            *(setting.model, setting.tokenizer, items, momentum, CAUSAL_SITE),
            n=CAUSAL_N,
            sample=CAUSAL_SAMPLE,
            profile=setting.profile,
            record=folder / "causal.jsonl",
            progress=show,
        ).to_json()
        return {name: value for name, value in found.items() if name not in ("environment", "seconds", "notes")}

    return extras.kept(folder / "causal.json", make)


def _doses(setting: Setting, names: Sequence[str], out: Path) -> dict[str, Any]:
    """The KL that is asked for beside the measured one, of AUs by effect of the first split of each task."""
    stages = {}

    def make(path: Path) -> list[dict[str, Any]]:
        return doses(setting, Momentum.load(path / MOMENTUM))

    with setting.step("strengths in nats", len(names)) as advance:
        for name in names:
            path = out / f"{name}-0"
            stages[name] = extras.kept(path / "doses.json", partial(make, path))
            advance(1)
    rows = [{"task": name, **row} for name, stage in stages.items() for row in stage["found"]]
    return {"found": rows, "seconds": sum(stage["seconds"] for stage in stages.values())}


def show_result(content: dict[str, Any]) -> None:
    """What came of it, task by task, and the goals."""
    for name, task in content["tasks"].items():
        trials = content["trials"][name]
        items = sum(len(trial["groups"]) for trial in trials)
        console.print(f"[bold]{name}[/], {items} held-out items in {len(trials)} splits, KL at most 0.1")
        rows = sorted(task["rows"].items(), key=lambda row: -row[1]["effect"])
        cells = [
            [
                row_name,
                ", ".join(map(str, dict.fromkeys(row["k"]))),
                summary.interval(row["effect"], row["low"], row["high"]),
            ]
            + [summary.interval(*row["behind"][rival]) if rival in row["behind"] else "" for rival in summary.RIVALS]
            + [f"{row['kl']:.3f}"]
            for row_name, row in rows
        ]
        show_table(["method", "AUs", "effect, nats", *(f"minus {rival}" for rival in summary.RIVALS), "KL"], cells)
        console.print()
    show_goals(content["goals"])


def show_goals(goals: dict[str, Any]) -> None:
    """Both goals, each met or missed, and what that depends on."""
    for goal, words in (
        (goals["ten"], "above each method without gradients on every task"),
        (goals["hundred"], "not below dense vectors by gradients, on the mean over tasks"),
    ):
        console.print(f"[bold]{'met' if goal['met'] else 'missed'}[/]: {goal['row']}:\n{words}")
        if "leads" in goal:
            lines = [
                [task, rival, summary.interval(*lead)]
                for task, found in goal["leads"].items()
                for rival, lead in found.items()
            ]
            show_table(["task", "minus", "nats [95 %]"], lines)
        else:
            lines = [[rival, str(row["tasks"]), summary.interval(*row["lead"])] for rival, row in goal["means"].items()]
            show_table(["minus", "tasks", "nats [95 %]"], lines)


def write(out: Path, content: dict[str, Any], quick: bool) -> None:
    """The result file: ``study-<model>-<date>.json``, or ``study-quick-...``, which no page shows."""
    name = "study-quick" if quick else "study"
    model = slug(str(content["model"]).rpartition("/")[2])
    path = out / f"{name}-{model}-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    write_json(path, {"kind": "study", **content, "environment": environment()})
    console.print(f"\n{content['seconds']:.0f} s; wrote {path}")


if __name__ == "__main__":
    from austeer.cli import run as run_command

    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_command(app)
