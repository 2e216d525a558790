"""Scoring: what a model thinks of given continuations, and of neutral text, under one steering or many at once.

Several steerings of one model are scored as rows of one batch: each context is there once for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TaskError
from ..forward.logits import LOGIT_ROWS, log_probabilities
from ..forward.neutral import neutral_ids
from ..forward.packing import common_prefix
from ..forward.tokens import encode
from ..pairs.pairs import Pairs
from ..steering.side_effects import Names, hidden_states
from ..steering.steering import Steering
from .task import Task


@dataclass(frozen=True)
class OptionScores:
    """Attributes:
    log_prob: float64 [names, items, most options], log p(option | prompt), summed over its tokens, nats; -inf where
        an item has fewer options.
    greedy: bool, the same shape: whether the option is what the model itself would write, token by token.
    """

    log_prob: Tensor
    greedy: Tensor

    def margins(self, task: Task) -> Tensor:
        """Log-odds of the wanted option against the best other one, nats: float64 [names, items]."""
        label = self._labels(task)
        return self.log_prob.gather(-1, label)[..., 0] - self.log_prob.scatter(-1, label, -torch.inf).amax(-1)

    def correct(self, task: Task) -> Tensor:
        """Whether the wanted option has the largest log-probability of the options: bool [names, items]."""
        return self.margins(task) > 0

    def exact(self, task: Task) -> Tensor:
        """Exact match (paper): whether the model, writing greedily, writes the wanted option: bool [names, items]."""
        return self.greedy.gather(-1, self._labels(task))[..., 0]

    def _labels(self, task: Task) -> Tensor:
        return torch.tensor([item.label for item in task], device="cpu").expand(len(self.greedy), -1)[..., None]


@torch.no_grad()
def option_scores(
    model: nn.Module,
    tokenizer,
    task: Task,
    steering: Steering | None = None,
    names: Names = (None,),
    *,
    batch_tokens: int = 2048,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> OptionScores:
    """log p(option | prompt) of every option, for every steering.

    Contexts that begin another one are not run again: one-token options of a prompt cost one pass over the prompt.

    Args:
        task: of kind "choice" or "continuation"; of "choice" every option must be one token.
        steering: attached, with plans by name. names: which of them to score; None is the unsteered model.
        on_batch: told the tokens of each forward pass.

    Raises:
        TaskError: a numeric task, an option without a token of its own, several tokens where one was promised, or a
            model whose attention is not causal.
    """
    if task.kind == "numeric":
        raise TaskError(f"{task.name}: found a numeric task, expected options to score; see austeer.tasks.evaluate")
    texts, starts, place = _tokenise(tokenizer, task)
    most = max(len(item.options) for item in task)
    log_prob = torch.full((len(names), len(task), most), -torch.inf, dtype=torch.float64, device="cpu")
    greedy = torch.zeros(log_prob.shape, dtype=torch.bool, device="cpu")
    contexts, owner = _distinct_contexts([ids[:-1] for ids in texts])
    wanted: list[list[int]] = [[] for _ in contexts]  # context -> the texts that read it
    for text, context in enumerate(owner):
        wanted[context].append(text)
    for item, option in place:
        log_prob[:, item, option], greedy[:, item, option] = 0.0, True
    for chunk, batch, hidden in hidden_states(model, contexts, batch_tokens, steering, names, on_batch):
        reads = [
            (row, position, place[text], texts[text][position + 1])
            for row, context in enumerate(batch)
            for text in wanted[context]
            for position in range(starts[text] - 1, len(texts[text]) - 1)
        ]
        row, position, _, target = zip(*reads)
        found = hidden[:, list(row), list(position)]  # [chunk, reads, hidden]
        values, tops = _target_scores(model, found, torch.tensor(target, device="cpu"))
        for i, (_, _, (item, option), _) in enumerate(reads):
            log_prob[chunk, item, option] += values[:, i]
            greedy[chunk, item, option] &= tops[:, i]
    return OptionScores(log_prob, greedy)


@torch.no_grad()
def log_odds(model: nn.Module, tokenizer, pairs: Pairs, *, batch_tokens: int = 2048) -> Tensor:
    """log p(positive | prompt) - log p(negative | prompt) of each pair, in nats: float64 [pairs].

    0 for a pair of equal sides.
    """
    found = torch.zeros(len(pairs), dtype=torch.float64, device="cpu")
    different = [i for i, pair in enumerate(pairs) if pair.positive != pair.negative]
    task = Task.of_pairs(pairs)
    found[different] = option_scores(model, tokenizer, task, batch_tokens=batch_tokens).margins(task)[0]
    return found


@torch.no_grad()
def cross_entropy(model: nn.Module, tokenizer, texts: Sequence[str], *, batch_tokens: int = 2048) -> float:
    """Mean cross-entropy of all tokens of ``texts`` but each text's first, in nats a token."""
    ids = neutral_ids(tokenizer, texts)
    total = 0.0
    for _, batch, hidden in hidden_states(model, ids, batch_tokens):
        for row, i in enumerate(batch):
            target = torch.tensor(ids[i][1:], device="cpu")
            total -= float(_target_scores(model, hidden[:, row, : len(target)], target)[0].sum())
    return total / sum(len(row) - 1 for row in ids)


def _target_scores(model: nn.Module, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the targets, float64, and whether each is the likeliest token; hidden [rows, targets, width]."""
    rows, count = hidden.shape[:2]
    flat, wanted = hidden.flatten(0, 1), target.repeat(rows).to(hidden.device)
    values, tops = [], []
    for start in range(0, len(flat), LOGIT_ROWS):
        chance = log_probabilities(model, flat[start : start + LOGIT_ROWS])
        part = wanted[start : start + LOGIT_ROWS]
        values.append(chance.gather(-1, part[:, None])[:, 0].double().cpu())
        tops.append((chance.argmax(-1) == part).cpu())
    return torch.cat(values).view(rows, count), torch.cat(tops).view(rows, count)


def _tokenise(tokenizer, task: Task) -> tuple[list[list[int]], list[int], list[tuple[int, int]]]:
    """Each option's text as ids, where its continuation begins there, and which (item, option) it is."""
    special = not task.chat_template
    prompts = encode(tokenizer, [item.prompt for item in task], special)
    place = [(i, j) for i, item in enumerate(task) for j in range(len(item.options))]
    texts = encode(tokenizer, [task[i].prompt + task[i].options[j] for i, j in place], special)
    # Where a token joins prompt and option, all options are scored from before it, so that they compare.
    start = [len(prompt) for prompt in prompts]
    for (i, _), ids in zip(place, texts):
        start[i] = min(start[i], common_prefix(prompts[i], ids))
    for (i, j), ids in zip(place, texts):
        where = f"{task.source}, item {i}, option {task[i].options[j]!r:.40}"
        if not prompts[i]:
            raise TaskError(
                f"{where}: found no token before it, expected one to score it by: the prompt is empty, and this "
                "tokenizer begins texts with no token of its own. Give the prompts some text, for example 'Text:'"
            )
        if not 0 < start[i] < len(ids):
            raise TaskError(f"{where}: found no token of its own after the prompt, expected at least one")
        if task.kind == "choice" and len(ids) - start[i] > 1:
            raise TaskError(
                f"{where}: found {len(ids) - start[i]} tokens after the prompt, expected one; choose options that are "
                'one token with their blank, or the kind "continuation"'
            )
    return texts, [start[i] for i, _ in place], place


def _distinct_contexts(contexts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The contexts that are no beginning of another, and for each context the number of the one that serves it."""
    order = sorted(range(len(contexts)), key=contexts.__getitem__)
    distinct: list[list[int]] = []
    owner = [0] * len(contexts)
    for i in reversed(order):  # a beginning sorts right before what it begins
        if not distinct or distinct[-1][: len(contexts[i])] != contexts[i]:
            distinct.append(contexts[i])
        owner[i] = len(distinct) - 1
    return distinct, owner
