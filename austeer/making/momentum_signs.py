"""Signs of momentum pair by pair, for a few AUs: does an AU follow the wanted side, or the longer one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import nn

from ..forward.batch_size import automatic_batch_tokens
from ..forward.capture import LastTokens
from ..forward.causality import plain_batches
from ..models.sites import find_sites
from ..models.structure import evaluating, input_device
from ..utils.progress import Progress

#: Pairs whose activations are held at a time.
BLOCK = 64


@dataclass(frozen=True)
class Following:
    """The top AUs of a site, on pairs whose positive side is longer and on pairs whose negative side is.

    Attributes:
        longer, shorter: how many pairs of each kind were asked.
        agree: for each AU the share of pairs in which it has its plan's sign: [k, 2], longer first; pairs in which it
            does not differ are left out, and count half where nothing else is left.
        depends: which AUs' signs depend on which side is longer (Fisher's exact test, 5 % false discoveries).
        turns: which of these have their plan's sign mostly where the one side is longer, and mostly not otherwise.
    """

    longer: int
    shorter: int
    agree: np.ndarray
    depends: np.ndarray
    turns: np.ndarray


@torch.no_grad()
def momentum_signs(
    model: nn.Module,
    positive: Sequence[list[int]],
    negative: Sequence[list[int]],
    site: str,
    layers: Sequence[int],
    indices: Sequence[int],
    progress: bool | None = None,
) -> np.ndarray:
    """The sign of m for each pair and each AU (layer, index) of a site: int8 [pairs, AUs]."""
    wanted = sorted(set(layers))
    place = torch.tensor([wanted.index(layer) for layer in layers], device="cpu")
    column = torch.tensor(list(indices), device="cpu")
    sites = {site: [found for found in find_sites(model, [site])[site] if found.layer in set(wanted)]}
    capture = LastTokens(model, sites, 2 * BLOCK)
    tokens = automatic_batch_tokens(model, input_device(model))
    signs = np.zeros((len(positive), len(column)), dtype=np.int8)
    with (
        evaluating(model),
        capture.attached(),
        Progress(f"signs at {site}", len(positive), "pairs", progress) as bar,
    ):
        for start in range(0, len(positive), BLOCK):
            texts = [*positive[start : start + BLOCK], *negative[start : start + BLOCK]]
            for batch in plain_batches(model, texts, tokens):
                capture.run(batch)
            half = len(texts) // 2
            values = capture.buffers[site][: len(texts)].cpu()[:, place, column]  # [texts, AUs]
            more, less = values[:half] > values[half:], values[:half] < values[half:]
            signs[start : start + half] = (more.to(torch.int8) - less.to(torch.int8)).numpy()
            bar.advance(half)
    return signs


def following(signs: np.ndarray, beta: np.ndarray, differences: Sequence[int], max_fdr: float = 0.05) -> Following:
    """Whether AUs have their plan's sign alike on pairs with the longer side positive, and negative.

    Args:
        signs: int8 [pairs, AUs], of :func:`momentum_signs`. beta: [AUs].
        differences: tokens of each pair's positive text less those of its negative one; pairs of equal length are not
            asked.
    """
    agrees = signs * np.where(beta >= 0, 1, -1)[None, :]  # 1: the plan's sign; -1: the other; 0: no difference
    groups = [agrees[np.array([sign * d > 0 for d in differences], dtype=bool)] for sign in (1, -1)]
    yes, no = (np.stack([(group == value).sum(0) for group in groups], 1) for value in (1, -1))  # [AUs, 2]
    agree = np.divide(yes, yes + no, out=np.full(yes.shape, 0.5), where=yes + no > 0)
    p = np.array([stats.fisher_exact([y, n]).pvalue for y, n in zip(yes, no)])
    depends = stats.false_discovery_control(np.nan_to_num(p, nan=1.0)) <= max_fdr
    turns = depends & ((agree > 0.5).sum(1) == 1) & ((agree < 0.5).sum(1) == 1)
    return Following(len(groups[0]), len(groups[1]), agree, depends, turns)
