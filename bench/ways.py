"""The ways to measure momentum that are compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

import austeer
from austeer import Pairs

from .peers import SITES, Counts, public_momentum, stacked_momentum

PUBLIC, STACKED, OURS, UNSHARED = "public", "stacked", "ours", "ours, prompts twice"


@dataclass(frozen=True)
class Run:
    """One measurement.

    Attributes:
        seconds: what it took. fixed: the part of it that hardly grows with the number of pairs.
        report: what ours says of itself: where the time went, what weights were read.
    """

    counts: Counts
    seconds: float
    fixed: float = 0.0
    report: dict[str, Any] | None = None

    def a_pair(self, pairs: int, at: int | None = None) -> float:
        """Seconds a pair, of the ``pairs`` that ran; with ``at``, if there had been so many."""
        return self.seconds / pairs if at is None else (self.seconds - self.fixed) / pairs + self.fixed / at


#: (model, tokenizer, pairs) -> one measurement, to its end: all give their counts on the CPU, so a GPU has finished.
Way = Callable[[PreTrainedModel, Any, Pairs], Run]


def _public(model: PreTrainedModel, tokenizer, pairs: Pairs) -> Run:
    begin = time.perf_counter()
    found = public_momentum.measure(model, tokenizer, pairs)
    return Run(found.counts(), time.perf_counter() - begin, found.scoring_seconds)


def _stacked(model: PreTrainedModel, tokenizer, pairs: Pairs) -> Run:
    begin = time.perf_counter()
    return Run(stacked_momentum.measure(model, tokenizer, pairs), time.perf_counter() - begin)


def ours(strategy: str = "resident", share_prompts: bool = True) -> Way:
    """austeer.measure."""

    def run(model: PreTrainedModel, tokenizer, pairs: Pairs) -> Run:
        begin = time.perf_counter()
        found = austeer.measure(
            *(model, tokenizer, pairs, SITES), strategy=strategy, share_prompts=share_prompts, progress=False
        )
        seconds = time.perf_counter() - begin
        assert found.report is not None
        counts = {site: (found.counters(site).positive, found.counters(site).negative) for site in SITES}
        # Before the first pair sites are found, and the model is asked whether it takes trees.
        return Run(counts, seconds, seconds - found.report.seconds.total, found.report.to_json())

    return run


WAYS: dict[str, Way] = {PUBLIC: _public, STACKED: _stacked, OURS: ours(), UNSHARED: ours(share_prompts=False)}


class TokensRun:
    """Counts the tokens that go into a model's embedding, padding included, while the context is open."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.count = model, 0

    def __enter__(self) -> TokensRun:
        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.count += args[0].numel()

        self._handle = self.model.get_input_embeddings().register_forward_pre_hook(add)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def tokens_of(tokenizer, pairs: Pairs) -> list[int]:
    """The length of each text."""
    texts = [pair.prompt + answer for pair in pairs for answer in (pair.positive, pair.negative)]
    return [len(ids) for ids in tokenizer(texts)["input_ids"]]
