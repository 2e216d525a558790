"""Real contrastive pairs for the benchmarks, from a folder of public data sets or from the demo's own pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import austeer
from austeer import Pair, Pairs

DEMO_PAIRS = Path(austeer.__file__).parent / "data" / "demo_pairs.jsonl"
#: Texts are no longer than this, in characters: about 512 tokens of English. No way of measuring has to cut them.
LONGEST = 1800
#: How many other prompts are put before a prompt of the demo to make a long one.
BEFORE = 10


@dataclass(frozen=True)
class PairSet:
    """Pairs of one kind.

    Attributes:
        long: whether the prompts are long, a hundred tokens and more, or short.
        public, others: with how many pairs the public algorithm is timed on a CPU, and everything else.
    """

    name: str
    pairs: Pairs
    long: bool
    public: int
    others: int


def _persona(row: dict[str, Any]) -> Pair:
    return Pair(row["question"], row["answer_matching_behavior"], row["answer_not_matching_behavior"])


def _caa(row: dict[str, Any]) -> Pair:
    answers = (f" {row[f'answer_{kind}_behavior']}" for kind in ("matching", "not_matching"))
    return Pair(f"{row['question']}\nAnswer:", *answers)


def _boolq(row: dict[str, Any]) -> Pair:
    answers = (" yes", " no") if row["answer"] else (" no", " yes")
    return Pair(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", *answers)


def _demo(row: dict[str, Any]) -> Pair:
    return Pair(row["prompt"], row["positive"], row["negative"])


#: name -> (file, pair of a row, long, pairs of the public algorithm, pairs of the others)
DATA: dict[str, tuple[str, Callable[[dict[str, Any]], Pair], bool, int, int]] = {
    "persona": ("persona_openness.jsonl", _persona, False, 16, 48),
    "caa": ("caa_hallucination_generate.jsonl", _caa, True, 4, 12),
    "boolq": ("boolq_a.jsonl", _boolq, True, 4, 12),
}
NAMES = ("demo", *DATA)


def demo_pairs() -> PairSet:
    """The demo's pairs: short, and there without any other data."""
    return PairSet("demo", Pairs.of(_read(DEMO_PAIRS, _demo), "demo pairs"), False, 16, 48)


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
        OSError: the folder lacks a file.
    """
    if not folder.is_dir():
        return [demo_pairs(), long_demo_pairs()]
    found = []
    for name in names:
        if name == "demo":
            found.append(demo_pairs())
            continue
        file, pair_of, *sizes = DATA[name]
        pairs = (p for p in _read(folder / file, pair_of) if _length(p) <= LONGEST)
        found.append(PairSet(name, Pairs.of(pairs, file), *sizes))
    return found


def _length(pair: Pair) -> int:
    return len(pair.prompt) + max(len(pair.positive), len(pair.negative))


def _read(file: Path, pair_of: Callable[[dict[str, Any]], Pair]) -> Iterator[Pair]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield pair_of(json.loads(line))
