"""What the study runs on: tasks, in a folder of data but for one, and models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from austeer.demo.demo import load_data
from austeer.errors import TaskError
from austeer.tasks import Task, load_task
from austeer.tuning.data import Most, Parts, split

#: Items measured, tuned on and held out, at most: what keeps the study within its time on two cores.
MOST: Most = (100, 24, 36)

#: The same with --quick, which shows that everything works and measures nothing.
QUICK: Most = (16, 6, 8)

#: The longest prompt with its option, in words, unless a task says otherwise.
WORDS = 13


@dataclass(frozen=True)
class Subject:
    """A task of the study.

    Attributes:
        file, template: where its items are, in the folder of data; none of the packaged pairs.
        words: in place of ``WORDS``. most: in place of ``MOST``.
        seeds: of its split, at most. steers: whether an earlier study found anything that steers it.
    """

    name: str
    file: str = ""
    template: str | None = None
    words: int = WORDS
    most: Most = MOST
    seeds: int = 3
    steers: bool = True


def _earlier(name: str, file: str, template: str, words: int, most: Most = (60, 12, 24)) -> Subject:
    """A task on which nothing was found to steer: one small trial, reported in one line."""
    return Subject(name, file, template, words, most, seeds=1, steers=False)


SUBJECTS = (
    Subject("tense", "style/tense_past_future.jsonl"),
    Subject("voice", "style/voice_passive_active.jsonl"),
    Subject("toxicity", "style/detox_neutral_toxic.jsonl"),
    Subject("language", "style/language_french_english.jsonl", words=17, most=(80, 20, 30)),
    Subject("reviews", "style/sentiment_reviews.jsonl", words=61, most=(40, 9, 18)),
    Subject("formality", "style/formality.jsonl", words=80),
    Subject("sentiment", words=30),
    _earlier("persona_agreeableness", "persona_agreeableness.jsonl", "persona", 60),
    _earlier("copa", "copa_dev.jsonl", "copa_text", 60),
    _earlier("caa_sycophancy", "caa_sycophancy_generate.jsonl", "caa", 130, (30, 8, 12)),
    _earlier("boolq", "boolq_a.jsonl", "boolq", 70),
)


def parts_of(subject: Subject, data: Path | None, seed: int, most: Most | None = None) -> Parts:
    """What of a task is measured, tuned on and held out.

    Args:
        most: in place of the subject's own.

    Raises:
        TaskError: no folder of data for a task that needs one.
    """
    task = task_of(subject, data)
    short = [i for i, item in enumerate(task) if _words(item.prompt) + max(map(_words, item.options)) <= subject.words]
    return split(replace(task.pick(short), name=subject.name), most=most or subject.most, seed=seed)


def task_of(subject: Subject, data: Path | None) -> Task:
    """All items of a task; the packaged pairs are split as other data is."""
    if not subject.file:
        packaged = load_data()
        parts = (packaged.momentum, packaged.tuning, packaged.held_out)
        pairs = replace(parts[0], items=tuple(pair for part in parts for pair in part))
        return Task.of_pairs(pairs, subject.name)
    if data is None:
        raise TaskError(f"--data: found none, expected the folder with {subject.file}; see docs/study.md")
    return load_task(data / subject.file, subject.template)


def _words(text: str) -> int:
    return len(text.split())
