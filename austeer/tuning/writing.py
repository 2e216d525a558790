"""What a model writes under steering, judged without a second model: does a setting derail it?

Log-odds of given options and KL on neutral text do not see what comes once a model reads its own words. So settings
write, sampled, after beginnings of neutral texts and after the task's prompts, and each text is judged: how much of it
repeats, how likely the unsteered model finds it, and on which side a linear reader puts it (reader.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..baselines.arm import Candidate
from ..forward.generation import continue_ids
from ..forward.tokens import encode
from ..models.structure import evaluating, text_config
from ..pairs.pairs import Pairs
from .budget import WRITING, Budget
from .reader import Reader, middle, read, train_reader
from .scorer import PLANS_AT_ONCE, Scorer, slices
from .search import Standing, Step, no_bars

#: Tokens that are written, and of the beginnings of neutral texts that are prompts.
TOKENS, BEGINNING = 40, 10

#: Prompts of each kind; the task's are the shortest of so many. Texts of the unsteered model after each.
PROMPTS, AMONG, USUAL = 2, 16, 3

#: Strengths at which the first setting writes, as parts of its own.
PARTS = (0.5, 1.0, 1.5)

#: Texts that are written at once.
ROWS = 64

#: Settings of a search that write before it is given up to find one that does not derail.
MOST = 12

#: With a budget: a token that is written costs about two that are read, and the reader may take a third of the time.
WRITTEN_COST = 2.0

#: A setting derails whose texts repeat themselves more than this part of the unsteered model's texts do, and by more
#: than a share of 3-grams that a fluent text may have;
USUAL_PART, REPEATED = 0.95, 0.1

#: or whose tokens are less likely than the unsteered model's own by more nats;
LESS_LIKELY = 1.0

#: or of whose texts more than this part are empty, where fewer of the unsteered model's are.
EMPTY = 0.5


@dataclass(frozen=True)
class Text:
    """Attributes:
    kind: of its prompt, "neutral" or "task". tokens: how many were written, until the model ended by itself.
    repeated: share of its 3-grams of tokens that it had before.
    distinct: share of different ones among its 1-, 2- and 3-grams; 1 where it has none.
    log_prob: mean log-probability of its tokens under the unsteered model, nats; None if it is empty.
    wanted: the reader's log-odds of the wanted side; None for an empty text, or without a reader that is trusted.
    """

    kind: str
    prompt: str
    text: str
    tokens: int
    repeated: float
    distinct: tuple[float, float, float]
    log_prob: float | None
    wanted: float | None


@dataclass(frozen=True)
class Written:
    """What the model writes under one setting at one strength.

    Attributes:
        name: of the setting; "unsteered" for none. part: its strength, as a part of the setting's own.
        tokens, repeated, distinct: means over its texts. log_prob: over those that are not empty.
        wanted: share of texts on the wanted side, by the reader; None without one that is trusted.
        derailed: in what it differs too much from what the unsteered model writes; empty if it does not.
    """

    name: str
    alpha: float | dict[str, float]
    part: float
    tokens: float
    repeated: float
    distinct: tuple[float, float, float]
    log_prob: float | None
    wanted: float | None
    derailed: str
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class Writing:
    """What was written.

    Attributes:
        reader: its ``accuracy`` on held-out answers, how many ``texts`` it was trained on and behind which ``layer`` it
            reads; None where there were too few pairs to train and check one.
        unsteered: the model as it is. settings: at their strengths, the chosen or best one first.
        others: that setting at other strengths. set_aside: better ones that derail, best first.
    """

    reader: dict[str, Any] | None
    unsteered: Written
    settings: list[Written]
    others: list[Written]
    set_aside: list[Written]


class Writer:
    """Writes and judges texts; what was written is kept in the scorer's record.

    Args:
        scorer: of the tuning part: its items' prompts and its neutral texts are continued.
        pairs: what the reader is trained on; the tuning part's own if there are none.
        seed: of all sampling.
    """

    def __init__(self, scorer: Scorer, pairs: Pairs, budget: Budget, seed: int = 0, step: Step = no_bars):
        self._scorer, self._budget, self._seed, self._step = scorer, budget, seed, step
        self._pairs = pairs if len(pairs) else scorer.task.pairs()
        self.unsteered: Written | None = None
        self._is_late = False

    def write(self, candidates: Sequence[Candidate], part: float = 1.0) -> list[Written]:
        """What the candidates write; none of it where there is no time for it.

        Args:
            part: of the candidates' strengths.
        """
        at = [replace(candidate, alpha=part * candidate.alpha) for candidate in candidates]
        first = [] if self.unsteered else [None]
        if self._is_late or not self._fill([*first, *at]):
            self._is_late = True
            return []
        if self.unsteered is None:
            self.unsteered = self._written(None, 1.0)
        return [self._written(candidate, part) for candidate in at]

    def writing(self, candidates: Sequence[Candidate], set_aside: Sequence[Written] = ()) -> Writing | None:
        """What they write, the first at other strengths, too; None where there was no time for it."""
        settings = self.write(candidates)
        if self.unsteered is None or not settings:
            return None
        others = [written for part in PARTS if part != 1 for written in self.write(candidates[:1], part)]
        return Writing(self._scorer.record.get("reader") or None, self.unsteered, settings, others, list(set_aside))

    @cached_property
    def _trained(self) -> Reader | None:
        count = None
        if self._budget.seconds is not None:
            left = (WRITING * self._budget.seconds - self._budget.spent) / 3
            count = int(left / max(self._scorer.costs.item, 1e-9))  # two answers, half of the layers: about an item
        with self._step("a reader of the two sides", 1) as advance:
            found = train_reader(self._scorer.model, self._scorer.tokenizer, self._pairs, count)
            advance(1)
        said = {} if found is None else {"accuracy": found.accuracy, "texts": found.texts, "layer": found.layer}
        self._scorer.record.put("reader", said)
        return found

    @cached_property
    def _prompts(self) -> list[tuple[str, list[int]]]:
        """Kind and tokens of each prompt, the two kinds in turns; some may be there twice."""
        scorer = self._scorer
        context = getattr(text_config(scorer.model), "max_position_embeddings", None) or 10**9
        neutral = [row[:BEGINNING] for row in encode(scorer.tokenizer, scorer.neutral[:PROMPTS])]
        some = dict.fromkeys(scorer.task[i].prompt for i in scorer.order)
        shortest = sorted(list(some)[:AMONG], key=len)[:PROMPTS]
        task = encode(scorer.tokenizer, shortest, not scorer.task.chat_template)
        found = []
        for i in range(PROMPTS):
            for kind, ids in (("neutral", neutral), ("task", task)):
                row = ids[i % len(ids)][-max(1, context - TOKENS) :]
                found += [(kind, row)] if row else []
        return found

    def _fill(self, candidates: Sequence[Candidate | None]) -> bool:
        """Lets each candidate write that has not yet; False where there is no time for it."""
        missing = {self._key(c): c for c in candidates if self._scorer.record.get(self._key(c)) is None}
        if not missing:
            return True
        rows = sum(USUAL if c is None else 1 for c in missing.values()) * len(self._prompts)
        if self._budget.seconds is not None:
            read_tokens = sum(len(ids) + TOKENS for _, ids in self._prompts) / len(self._prompts)
            cost = rows * self._scorer.costs.token * (read_tokens + WRITTEN_COST * TOKENS)
            if self._budget.is_over(WRITING) or self._budget.spent + cost > WRITING * self._budget.seconds:
                self._budget.note("settings that write", 0, len(missing) - (None in missing.values()))
                return False
        reader = self._trained
        with self._step(f"{rows} texts", rows) as advance:
            for part in slices(list(missing), max(1, min(PLANS_AT_ONCE, ROWS // len(self._prompts)))):
                texts = self._texts({key: missing[key] for key in part}, reader)
                for key in part:
                    self._scorer.record.put(key, [asdict(text) for text in texts[key]])
                    advance(len(texts[key]))
        return True

    def _key(self, candidate: Candidate | None) -> str:
        return f"written {candidate.key if candidate else 'unsteered'}"

    def _texts(self, candidates: dict[str, Candidate | None], reader: Reader | None) -> dict[str, list[Text]]:
        """Written by the candidates as rows of one batch, and read by the unsteered model."""
        model, tokenizer = self._scorer.model, self._scorer.tokenizer
        steered = {key: candidate for key, candidate in candidates.items() if candidate is not None}
        rows = [
            (key, kind, ids)
            for key, candidate in candidates.items()
            for _ in range(USUAL if candidate is None else 1)
            for kind, ids in self._prompts
        ]
        own = getattr(getattr(model, "generation_config", None), "temperature", None)
        names = [key if key in steered else None for key, _, _ in rows]
        with (
            evaluating(model),
            self._scorer.steered(steered) as steering,
            nullcontext() if steering is None else steering.rows(names),
        ):
            written = continue_ids(
                model,
                tokenizer,
                [ids for _, _, ids in rows],
                max_new_tokens=TOKENS,
                temperature=own or 1.0,
                seed=self._seed,
                remove_invalid_values=True,  # steering that is too strong may leave no number
            )
        judged = self._judged([ids for _, _, ids in rows], written, reader)
        found: dict[str, list[Text]] = {key: [] for key in candidates}
        for i, (key, kind, ids) in enumerate(rows):
            shares = (distinct_share(written[i], 1), distinct_share(written[i], 2), distinct_share(written[i], 3))
            text = tokenizer.decode(written[i], skip_special_tokens=True)
            prompt = tokenizer.decode(ids, skip_special_tokens=True)
            found[key].append(Text(kind, prompt, text, len(written[i]), 1 - shares[2], shares, *judged[i]))
        return found

    def _judged(
        self, prompts: Sequence[list[int]], written: Sequence[list[int]], reader: Reader | None
    ) -> list[tuple[float | None, float | None]]:
        """Log-probability a token of what was written, and the reader's log-odds."""
        found: list[tuple[float | None, float | None]] = [(None, None)] * len(written)
        some = [i for i, tokens in enumerate(written) if tokens]
        if some:
            model, texts = self._scorer.model, [[*prompts[i], *written[i]] for i in some]
            states, log_prob = read(model, texts, [len(prompts[i]) for i in some], middle(model), scored=True)
            logits = [None] * len(some) if reader is None or not reader.is_trusted else reader.logit(states).tolist()
            for i, chance, logit in zip(some, log_prob.tolist(), logits):
                found[i] = chance, logit
        return found

    def _written(self, candidate: Candidate | None, part: float) -> Written:
        texts = tuple(
            Text(**{**cell, "distinct": tuple(cell["distinct"])})
            for cell in self._scorer.record.get(self._key(candidate))
        )
        said = [text.log_prob for text in texts if text.log_prob is not None]
        sides = [text.wanted > 0 for text in texts if text.wanted is not None]
        ones, twos, threes = (_mean([text.distinct[n] for text in texts]) for n in range(3))
        name, alpha = ("unsteered", 0.0) if candidate is None else (candidate.arm.name, candidate.strength)
        found = Written(
            *(name, alpha, part),
            tokens=_mean([text.tokens for text in texts]),
            repeated=_mean([text.repeated for text in texts]),
            distinct=(ones, twos, threes),
            log_prob=_mean(said) if said else None,
            wanted=_mean(sides) if sides else None,
            derailed="",
            texts=texts,
        )
        return found if self.unsteered is None else replace(found, derailed=derailment(found, self.unsteered))


def derailment(found: Written, unsteered: Written) -> str:
    """In what texts differ too much from the unsteered model's, in words; empty if they do not."""
    usual = torch.tensor([text.repeated for text in unsteered.texts], dtype=torch.float64, device="cpu")
    bound = max(REPEATED, float(torch.quantile(usual, USUAL_PART)))
    if found.repeated > bound:
        return f"repeats itself: {found.repeated:.0%} of 3-grams, unsteered {unsteered.repeated:.0%}"
    empty, before = (sum(not text.tokens for text in w.texts) / len(w.texts) for w in (found, unsteered))
    if empty > EMPTY >= before:
        return f"writes nothing: {empty:.0%} of texts are empty, unsteered {before:.0%}"
    if found.log_prob is None or unsteered.log_prob is None or found.log_prob > unsteered.log_prob - LESS_LIKELY:
        return ""
    return f"unlikely text: {found.log_prob:.1f} nats a token, unsteered {unsteered.log_prob:.1f}"


def first_not_derailed(writer: Writer, standings: Sequence[Standing]) -> tuple[Standing, list[Written]]:
    """The first setting that does not derail, and what those before it write. Where none of ``MOST`` is found that has
    an effect, or time is up, the first of all.

    Args:
        standings: best first.
    """
    aside: list[Written] = []
    for standing in [s for s in standings if s.effect > 0 or s is standings[0]][:MOST]:
        written = writer.write([standing.candidate])
        if not written:
            break
        if not written[0].derailed:
            return standing, aside
        aside += written
    return standings[0], []


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct_share(tokens: Sequence[int], n: int) -> float:
    """Share of different ones among the n-grams; 1 where there are none."""
    found = ngrams(tokens, n)
    return len(set(found)) / len(found) if found else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
