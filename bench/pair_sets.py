"""Real contrastive pairs for the benchmarks, from a folder of public data sets or from the demo's own pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import austeer
from austeer import Pair, Pairs, load_pairs
from austeer.tasks import load_task

DEMO_PAIRS = Path(austeer.__file__).parent / "data" / "demo_pairs.jsonl"
#: Texts are no longer than this, in characters: about 512 tokens of English. No way of measuring has to cut them.
LONGEST = 1800
#: How many other prompts are put before a prompt of the demo to make a long one.
BEFORE = 10


@dataclass(frozen=True)
class PairSet:
    """Pairs of one kind, with long prompts (a hundred tokens and more) or short ones.

    Attributes:
        public, others: with how many pairs the public algorithm is timed on a CPU, and everything else.
    """

    name: str
    pairs: Pairs
    long: bool
    public: int
    others: int


#: name -> (file, the template that reads it, long, pairs of the public algorithm, pairs of the others)
DATA = {
    "persona": ("persona_openness.jsonl", "persona", False, 16, 48),
    "caa": ("caa_hallucination_generate.jsonl", "caa", True, 4, 12),
    "boolq": ("boolq_a.jsonl", "boolq", True, 4, 12),
}
NAMES = ("demo", *DATA)


def demo_pairs() -> PairSet:
    """The demo's pairs: short, and there without any other data."""
    return PairSet("demo", replace(load_pairs(DEMO_PAIRS), source="demo pairs"), False, 16, 48)


def long_demo_pairs() -> PairSet:
    """The demo's pairs, each prompt after ten others: a stand-in for long prompts where there is no other data."""
    pairs = demo_pairs().pairs

    def before(number: int) -> str:
        return ". ".join(pairs[(number + step) % len(pairs)].prompt for step in range(1, BEFORE + 1))

    longer = [Pair(f"{before(i)}. {pair.prompt}", pair.positive, pair.negative) for i, pair in enumerate(pairs)]
    return PairSet("long demo", Pairs.of(longer, "demo pairs, lengthened"), True, 4, 12)


def load_all(names: Sequence[str], folder: Path) -> list[PairSet]:
    """The named sets, each with all pairs that are short enough, in the file's order; without the folder the demo's
    pairs alone, as they are and lengthened.

    Raises:
        AusteerError: the folder lacks a file.
    """
    if not folder.is_dir():
        return [demo_pairs(), long_demo_pairs()]
    found = []
    for name in names:
        if name == "demo":
            found.append(demo_pairs())
            continue
        file, template, *sizes = DATA[name]
        pairs = load_task(folder / file, template).pairs()
        short = [p for p in pairs if len(p.prompt) + max(len(p.positive), len(p.negative)) <= LONGEST]
        found.append(PairSet(name, Pairs.of(short, file), *sizes))
    return found
