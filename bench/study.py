"""The study behind docs/study.md: momentum with every operation beside every baseline, on real tasks.

``python -m bench.study --data FOLDER`` runs it all, and goes on where it was when it is started again. Everything is
chosen on one part of a task and reported on another, at one limit on the side effect.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from austeer.baselines import METHODS
from austeer.causal import causal_check
from austeer.cli.common import console, load, split_names, write_json
from austeer.cli.search_options import bars
from austeer.cli.search_text import show_held_out
from austeer.demo.demo import load_data
from austeer.errors import TaskError
from austeer.momentum.momentum import Momentum
from austeer.statistics import discoveries, stability
from austeer.tasks import load_task
from austeer.tuning import compare
from austeer.tuning.data import Parts, split
from austeer.utils.environment import environment

MODEL = "demo"
SITES = ("attention", "ffn")
#: Momentum's AUs of the residual stream are searched by themselves, so as not to triple every baseline's arms.
RESIDUAL = ("layer",)
KS = (10, 100)
MAX_KL = 0.1

#: Momentum with every operation; of the baselines what tells choosing AUs from steering them.
COMPARED = ("momentum", "random:shift", "all:scale", "all:shift", "difference:scale", "caa", "iti", "sadi")

#: Items measured, tuned on and held out, at most.
MOST = (150, 36, 90)

#: The longest prompt, in words, unless a task says otherwise: what keeps the study within its time on two cores.
WORDS = 90

#: Numbers of AUs whose split-half stability is reported; and the site and AUs of the causal check.
STABLE_KS, CAUSAL_SITE, CAUSAL_N, CAUSAL_SAMPLE, CAUSAL_ITEMS = (10, 100), "attention", 15, 45, 24


@dataclass(frozen=True)
class Subject:
    """A task of the study.

    Attributes:
        file, template: where its items are, in the folder of data; none of the packaged pairs.
        words, most: in place of ``WORDS`` and ``MOST``, for a task of long prompts.
        causal: whether the causal check is made on it. timed: whether decoding is timed with what is chosen on it.
    """

    name: str
    file: str = ""
    template: str = ""
    words: int = WORDS
    most: tuple[int, int, int] = MOST
    causal: bool = False
    timed: bool = False


#: The packaged pairs come last; decoding is timed with what was chosen on them.
SUBJECTS = (
    Subject("persona_agreeableness", "persona_agreeableness.jsonl", "persona"),
    Subject("copa", "copa_dev.jsonl", "copa_text", causal=True),
    Subject("caa_sycophancy", "caa_sycophancy_generate.jsonl", "caa", 130, (100, 28, 60)),
    Subject("boolq", "boolq_a.jsonl", "boolq"),
    Subject("sentiment", causal=True, timed=True),
)


def parts_of(subject: Subject, data: Path | None) -> Parts:
    """What of a task is measured, tuned on and held out.

    Raises:
        TaskError: no folder of data for a task that needs one.
    """
    if not subject.file:
        packaged = load_data()
        parts = (packaged.tuning, packaged.held_out)
        return Parts(packaged.momentum, *(replace(packaged.task(pairs), name=subject.name) for pairs in parts))
    if data is None:
        raise TaskError(f"--data: found none, expected the folder with {subject.file}; see docs/study.md")
    task = load_task(data / subject.file, subject.template)
    short = [i for i, item in enumerate(task) if len(item.prompt.split()) <= subject.words]
    return split(replace(task.pick(short), name=subject.name), most=subject.most)


def run(
    subject: Subject, model, tokenizer, data: Path | None, folder: Path, *, step, progress: bool | None
) -> dict[str, Any]:
    """One task: comparison, stability of the ranking, and the causal check; kept in ``folder``."""
    parts = parts_of(subject, data)
    start = time.perf_counter()
    same = {"ks": KS, "max_kl": MAX_KL, "step": step, "progress": progress, "texts": False}
    found = compare(model, tokenizer, parts, methods=COMPARED, sites=SITES, timed=subject.timed, folder=folder, **same)
    momentum = Momentum.load(folder / "momentum.safetensors")
    alone = {"methods": ("momentum",), "sites": RESIDUAL, "momentum": momentum, "timed": False}
    residual = compare(model, tokenizer, parts, folder=folder / "layer", **alone, **same).to_json()
    result = found.to_json()
    for name in ("environment", "seconds"):
        del result[name]
    result["settings"]["data"]["source"] = subject.file or "packaged"  # not where it lies on this machine
    result["layer"] = {name: residual[name] for name in ("held_out", "trials")}
    result["stability"] = {site: _stability(momentum, site) for site in (*SITES, *RESIDUAL)}
    if subject.causal:
        checked = (model, tokenizer, parts.tune.take(CAUSAL_ITEMS), momentum, CAUSAL_SITE)
        sizes = {"n": CAUSAL_N, "sample": CAUSAL_SAMPLE}
        causal = causal_check(*checked, **sizes, record=folder / "causal.jsonl", progress=progress).to_json()
        left_out = ("environment", "seconds", "notes")
        result["causal"] = {name: value for name, value in causal.items() if name not in left_out}
    result["seconds"] = time.perf_counter() - start
    console.print(f"\n[bold]{subject.name}[/], {found.unsteered.items} held-out items")
    show_held_out(found.unsteered, found.held_out)
    return result


def _stability(momentum: Momentum, site: str) -> dict[str, Any]:
    counters = momentum.counters(site)
    found = stability(momentum, site, STABLE_KS)
    return {
        "pairs": momentum.pairs,
        "discoveries": int(discoveries(counters).sum()),
        "size": counters.positive.numel(),
        **asdict(found),
    }


def main(
    data: Annotated[
        Path | None, typer.Option(help="The folder of the tasks' files; without it, sentiment only.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the searches and the result.")] = Path(
        "runs/study"
    ),
    only: Annotated[str, typer.Option(help="Some tasks, separated by commas. [default: all]")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id.")] = MODEL,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Compare momentum and every baseline on real tasks, and write bench's result file of it.

    Given again, it goes on where it was interrupted.
    """
    names = split_names(only)
    unknown = set(names) - {subject.name for subject in SUBJECTS}
    if unknown:
        raise TaskError(f"--only: found {', '.join(unknown)}, expected some of {', '.join(s.name for s in SUBJECTS)}")
    subjects = [s for s in SUBJECTS if (s.name in names if names else data is not None or not s.file)]
    for subject in subjects:
        parts_of(subject, data)  # before minutes of work, not after
    network, tokenizer = load(model, "float32", "cpu")
    show = False if quiet else None
    tasks: dict[str, Any] = {}
    for subject in subjects:
        tasks[subject.name] = run(subject, network, tokenizer, data, out / subject.name, step=bars(show), progress=show)
    methods = {name: {"what": method.what, "source": method.source} for name, method in METHODS.items()}
    write(out, {"model": network.config._name_or_path, "methods": methods, "tasks": tasks})


def write(out: Path, content: dict[str, Any]) -> None:
    """The result file: ``study-<date>.json``."""
    path = out / f"study-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    seconds = sum(task["seconds"] for task in content["tasks"].values())
    write_json(path, {"kind": "study", **content, "seconds": seconds, "environment": environment()})
    console.print(f"\n{seconds:.0f} s; wrote {path}")


if __name__ == "__main__":
    from austeer.cli import run as run_command

    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_command(app)
