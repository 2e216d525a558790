"""How a measurement went: what was run, how fast, and where the time went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Seconds:
    """Seconds by kind of work. Reading, tokenising and packing are done ahead, in a thread, while the model runs.

    Attributes:
        load: loading the model, if that was part of it (the command line); not in ``total``.
        read: reading pairs. tokenise: tokenising them. pack: making batches.
        wait: what the model waited for these three. weights: what it waited for weights (layer by layer).
        forward: forward passes, until the device was done. effects: the same there and
            back. count: counting, checking and saving.
        reduce: adding up over processes.
        total: from the first to the last.
    """

    load: float = 0.0
    read: float = 0.0
    tokenise: float = 0.0
    pack: float = 0.0
    wait: float = 0.0
    weights: float = 0.0
    forward: float = 0.0
    effects: float = 0.0
    count: float = 0.0
    reduce: float = 0.0
    total: float = 0.0


@dataclass
class MeasureReport:
    """Attributes:
    strategy: "resident" or "layerwise".
    pairs: how many were counted. texts: how many were run (those of pairs with equal sides are not).
    batches: forward passes of the decoder.
    tokens_texts: tokens of all texts. tokens_run: tokens that were run, once where texts share them.
    tokens_padded: the same with padding.
    batch_tokens: the limit on a batch.
    shared_prompts: whether shared beginnings ran once. shared_error: how far that moved an activation on a
        probe, relative to the largest of its site and layer: the model's rounding. None where it was not tried.
    seconds: where the time went. processes: over how many processes the pairs were split.
    resumed: pairs that were counted before this run.
    weights_read: bytes of weights read (layer by layer). weights_held: the most bytes of weights held at once.
    """

    strategy: str = "resident"
    pairs: int = 0
    texts: int = 0
    batches: int = 0
    tokens_texts: int = 0
    tokens_run: int = 0
    tokens_padded: int = 0
    batch_tokens: int = 0
    shared_prompts: bool = False
    shared_error: float | None = None
    seconds: Seconds = field(default_factory=Seconds)
    processes: int = 1
    resumed: int = 0
    weights_read: int = 0
    weights_held: int = 0

    def add(self, others: Iterable[MeasureReport]) -> None:
        """Takes in what other processes ran; the times stay this one's."""
        for other in others:
            for name in ("pairs", "texts", "batches", "tokens_texts", "tokens_run", "tokens_padded", "resumed"):
                setattr(self, name, getattr(self, name) + getattr(other, name))
            self.weights_read += other.weights_read

    @property
    def padding(self) -> float:
        """The share of padding in what was run."""
        return 1 - self.tokens_run / self.tokens_padded if self.tokens_padded else 0.0

    @property
    def pairs_per_second(self) -> float:
        return self.pairs / self.seconds.total if self.seconds.total else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens run a second, padding not counted."""
        return self.tokens_run / self.seconds.total if self.seconds.total else 0.0

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name) for name in ("padding", "pairs_per_second", "tokens_per_second")}
        return asdict(self) | rates

    def lines(self) -> list[str]:
        """For people: what was run, and where the time went."""
        s = self.seconds
        rates = (
            f"{self.pairs_per_second:.1f} pairs/s, {self.tokens_per_second:.0f} tokens/s, {self.padding:.1%} padding"
        )
        shared = ""
        if self.shared_prompts and self.tokens_texts:
            shared = f"; shared prompts ran once: {1 - self.tokens_run / self.tokens_texts:.0%} of the tokens saved"
        ahead = s.read + s.tokenise + s.pack
        time = f"time: load {s.load:.1f} s, " if s.load else "time: "
        time += f"forward {s.forward:.1f} s"
        if s.effects:
            time += f", effects {s.effects:.1f} s"
        if self.strategy == "layerwise":
            time += f", waiting for weights {s.weights:.1f} s"
        time += f", waiting for texts {s.wait:.1f} s, counting {s.count:.1f} s"
        if self.processes > 1:
            time += f", adding up {self.processes} processes {s.reduce:.1f} s"
        time += f"; read {s.read:.1f} s, tokenised {s.tokenise:.1f} s, packed {s.pack:.1f} s" if ahead >= 0.05 else ""
        return [rates + shared, time + (" (ahead, beside the model)" if ahead >= 0.05 else "")]
