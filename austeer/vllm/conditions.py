"""What decides on the device whether a token is steered: probes, and what was generated just now.

Nothing waits for the device. A probe's scores of one forward pass become decisions before the next, which is the first
that can steer what follows the prompts that were judged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..steering.markers import Answer, Automaton

#: (number of the token in the batch, place of the decision or request slot).
Pairs = list[tuple[int, int]]


@dataclass
class Batch:
    """The tokens of a batch.

    Attributes:
        rows: int32 [tokens], each one's row of the tables if it is steered; -1: it is not.
        judged: the last tokens of prompts that probes judge, and where the decision goes. judged_rows: their rows.
        decided: tokens that are steered if a probe has fired, and where that stands.
        unread: tokens of answers that only the device knows, and their requests' slots.
    """

    rows: np.ndarray
    judged: Pairs = field(default_factory=list)
    judged_rows: list[int] = field(default_factory=list)
    decided: Pairs = field(default_factory=list)
    unread: Pairs = field(default_factory=list)


class Conditions:
    """Decisions, and the states of the request slots.

    A decision has a place of its own, not its request's slot: a request that is put off keeps it.

    Args:
        slots: how many. judgements: places of decisions. vocabulary: how many tokens the model has.
        scores: float32 [tokens that a batch can have], above 0 where a probe fires.
    """

    def __init__(self, slots: int, judgements: int, scores: Tensor, vocabulary: int):
        self._device, self._scores, self._vocabulary = scores.device, scores, vocabulary
        with torch.inference_mode(False):
            self._fired = torch.zeros(judgements, dtype=torch.bool, device=self._device)
            self._state = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._judged: Pairs = []
        self._automata: dict[Answer, tuple[Tensor, Tensor, Tensor]] = {}

    def settle(self, judged: Pairs) -> None:
        """Takes the scores of the forward pass before this one for decisions.

        Between the two no trial run may write scores; vLLM makes none while a request has tokens to run.

        Args:
            judged: of the one that comes now.
        """
        if self._judged:
            tokens, places = self._indices(self._judged)
            self._fired[places] = self._scores[tokens] > 0
        self._judged = judged

    def move(self, source: int, target: int) -> None:
        """Two slots exchange their requests."""
        both, swapped = [source, target], [target, source]
        self._state[both] = self._state[swapped]

    def begin(self, slot: int, state: int) -> None:
        """A request comes into a slot whose known tokens lead to a state."""
        self._state[slot] = state

    def read(self, rows: Tensor, unread: Pairs, answers: dict[int, Answer], ids: Tensor) -> None:
        """Reads tokens that were generated just now, and takes the rows of those that are in no answer.

        Args:
            rows: of the batch. answers: each slot's. ids: the batch's tokens.
        """
        for answer in dict.fromkeys(answers[slot] for _, slot in unread):
            tokens, slots = self._indices([(token, slot) for token, slot in unread if answers[slot] == answer])
            classes, following, on = self._tables(answer)
            state = following[classes[ids[tokens].long()], self._state[slots]]
            self._state[slots] = state
            rows[tokens] = torch.where(on[state], rows[tokens], -1)

    def decide(self, rows: Tensor, decided: Pairs) -> None:
        """Takes the rows of tokens whose request's probe has not fired."""
        tokens, places = self._indices(decided)
        rows[tokens] = torch.where(self._fired[places], rows[tokens], -1)

    def _tables(self, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
        """The class of each token; for each class, the state after each state; for each state, whether it is inside."""
        if answer not in self._automata:
            automaton = Automaton(answer)
            classes = torch.zeros(self._vocabulary, dtype=torch.int64, device="cpu")
            for token, number in automaton.classes.items():
                classes[token] = number
            following = torch.tensor(automaton.next, dtype=torch.int64, device="cpu")
            on = torch.tensor(automaton.on, device="cpu")
            with torch.inference_mode(False):
                self._automata[answer] = tuple(t.to(self._device) for t in (classes, following, on))  # type: ignore[assignment]
        return self._automata[answer]

    def _indices(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        found = torch.tensor(pairs, dtype=torch.int64, device="cpu").T.contiguous()
        if self._device.type == "cuda":
            found = found.pin_memory().to(self._device, non_blocking=True)
        return found[0], found[1]
