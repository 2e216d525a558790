"""profile(): a model and neutral text -> its side-effect profile."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import (
    AusteerWarning,
    CaptureError,
    FileFormatError,
    GradientError,
    PairsError,
    SteeringWarning,
    check_count,
)
from ..forward.causality import is_causal, plain_batches
from ..forward.gradients import ShiftGradients
from ..forward.logits import expect_head
from ..forward.neutral import PACKAGED, neutral_ids, neutral_texts
from ..forward.tokens import check_vocabulary
from ..models.sites import Layout, available, find_sites, fingerprint, layers_path
from ..models.structure import floating_dtype, text_config, unwrap, vocabulary_size
from ..momentum.profile import DTYPE, VERSION, Profile, weights_of
from ..utils.cache import cache_folder
from ..utils.progress import Progress
from .sampled import TOGETHER, ProfileMemory, memory_of, sampled_tokens, score_gradients

#: Sites by default, of those that a model has: "layer" is the sum of the others, and rarely better.
SITES = ("attention", "ffn", "neuron")

#: The relative standard error of a predicted KL by default; of a strength it is half of that.
ERROR = 0.1


def profile(
    model: nn.Module,
    tokenizer,
    sites: str | Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    *,
    draws: int | None = None,
    error: float | None = None,
    batch_tokens: int = 1024,
    recompute: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    layout: Layout | None = None,
    progress: bool | None = None,
) -> Profile:
    """The side-effect profile of a model, made once and used for every task (:class:`austeer.Profile` has the formula).

    One forward pass a text, and one backward pass a draw.

    Example:
        >>> profile = austeer.profile(model, tokenizer, sites=["attention"], draws=48)
        >>> profile.rows["attention"].shape  # draws, layers, AUs
        torch.Size([48, 3, 48])

    Args:
        model: a Transformers decoder with its head, in evaluation mode for the time of the call. Its weights may be
            quantised; gradients flow through the activations.
        tokenizer: the model's own.
        sites: names of sites, see :mod:`austeer.models.sites`; by default attention, ffn and neuron, as far as the
            model has them.
        texts: text that steering should leave as it is, cut to the model's context; by default short encyclopaedic
            paragraphs.
        draws: how many at least, rounded up to as many of each text; by default what ``error`` takes.
        error: the relative standard error that a predicted KL may have, by default 0.1: sqrt(2 / draws), and more
            where texts are of unlike lengths.
        batch_tokens: tokens in a batch, padding included. recompute: keeps the activations of one layer at a time
            (activation checkpointing), which takes another forward pass a draw.
        seed: of the draws.
        checkpoint: a file in which the draws are kept batch by batch. resume: go on from it, if it is there.
        layout: attribute paths of a model whose family is not known.
        progress: a progress bar on standard error; by default if that is a terminal.

    Raises:
        PairsError: no text of two tokens, or too few draws for ``error``. SiteError: a site or family not known.
        CaptureError: a gradient that is not finite, a site that cannot be differentiated, or bidirectional attention;
            :func:`austeer.estimate_kl` needs no gradients.
        SteeringError: the model is steered. FileFormatError: the checkpoint is of another run.
    """
    prepared = prepare_profile(
        model,
        tokenizer,
        sites,
        texts,
        draws=draws,
        error=error,
        batch_tokens=batch_tokens,
        recompute=recompute,
        seed=seed,
        layout=layout,
    )
    return prepared.run(checkpoint, resume, progress)


def cached_profile(
    model: nn.Module,
    tokenizer,
    sites: str | Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    *,
    progress: bool | None = None,
    **options: Any,
) -> Profile:
    """:func:`profile`, made once: kept in a cache by the model, its weights and dtype, the sites, texts and draws.

    What was made, or half made by an interrupted run, lies in ``profiles`` of
    :func:`austeer.utils.cache.cache_folder`. Where that cannot be written, a warning says so.

    Args:
        options: the others of :func:`profile`, but for ``checkpoint`` and ``resume``.
    """
    prepared = prepare_profile(model, tokenizer, sites, texts, **options)
    folder = cache_folder() / "profiles"
    path, checkpoint = (folder / f"{prepared.key}.{ending}" for ending in ("profile", "checkpoint"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (found := _kept(path)) is not None:
            return found
        _kept(checkpoint)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = f"{folder}: cannot be written ({error.strerror}); the profile is not kept"
        warnings.warn(reason, AusteerWarning, stacklevel=2)
        return prepared.run(progress=progress)
    made = prepared.run(checkpoint, True, progress)
    made.save(path)
    checkpoint.unlink(missing_ok=True)
    return made


def _kept(path: Path) -> Profile | None:
    """What lies in the cache; a damaged file is removed."""
    try:
        return Profile.load(path)
    except FileFormatError:
        path.unlink(missing_ok=True)
        return None


@dataclass(frozen=True)
class ProfileRun:
    """A profile that is to be made.

    Attributes:
        empty: it, without draws yet. each: draws a text. batch_tokens: in a batch, with padding.
    """

    gradients: ShiftGradients
    empty: Profile
    each: int
    batch_tokens: int

    @property
    def key(self) -> str:
        """What the profile depends on, as a name: model, weights, dtype, sites, texts, draws."""
        empty = self.empty
        parts = [VERSION, empty.model.to_json(), empty.layers, empty.weights, empty.dtype, empty.sources, self.each]
        text = json.dumps([*parts, [row.tolist() for row in empty.ids]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @torch.inference_mode(False)
    def memory(self) -> ProfileMemory:
        """What :meth:`run` will hold beside the weights; found by a forward pass of the longest text."""
        texts = [row.tolist() for row in self.empty.ids]
        batch = max(
            (found.ids.numel() for found in plain_batches(self.gradients.model, texts, self.batch_tokens)), default=0
        )
        return memory_of(
            self.gradients, self.empty.model, max(texts, key=len), batch, len(texts) * self.each, self.each
        )

    @torch.inference_mode(False)  # what is made under that mode cannot be differentiated
    def run(self, checkpoint: str | Path | None = None, resume: bool = False, progress: bool | None = None) -> Profile:
        """Makes the profile; arguments and errors as of :func:`profile`."""
        texts, each = self.empty.ids, self.each
        made = _earlier(checkpoint, resume, self.empty, each)
        known = set() if made is None else set(made.texts.tolist())
        waiting = [number for number in range(len(texts)) if number not in known]
        batches = plain_batches(self.gradients.model, [texts[n].tolist() for n in waiting], self.batch_tokens)
        with self.gradients.attached(), Progress("profiling", len(texts) * each, "draws", progress) as bar:
            bar.advance(len(known) * each)
            for batch in batches:
                try:
                    part = self._draws([waiting[text] for text in batch.texts.tolist()], batch.ids, bar)
                except torch.OutOfMemoryError as error:
                    raise GradientError(
                        f"profile: {batch.ids.numel()} tokens with their activations do not fit into the memory of "
                        f"{self.gradients.device}; give a smaller batch_tokens, or recompute=True"
                    ) from error
                made = part if made is None else _joined(made, part)
                if checkpoint is not None:
                    made.save(checkpoint)
        assert made is not None
        return made

    def _draws(self, numbers: Sequence[int], ids: Tensor, bar: Progress) -> Profile:
        """The draws of the texts of one batch."""
        gradients, each = self.gradients, self.each
        lengths = torch.tensor([len(self.empty.ids[number]) for number in numbers], device="cpu")
        tokens = (lengths - 1).tolist()
        mask = (torch.arange(ids.shape[1], device="cpu") < lengths[:, None]).long()
        hidden = gradients.hidden_states(ids, mask)
        seeds = [_seed(self.empty.sources[0][1], number) for number in numbers]
        drawn = sampled_tokens(gradients.model, hidden.detach(), tokens, each, seeds)
        rows: dict[str, list[Tensor]] = {site: [] for site in gradients.sites}
        squares: dict[str, Tensor] = {}
        for first in range(0, each, TOGETHER):
            outward = score_gradients(gradients.model, hidden.detach(), tokens, drawn[first : first + TOGETHER])
            for draw, gradient in enumerate(outward, first):
                found = gradients.backward(hidden, gradient, again=draw + 1 < each)
                for site, values in found.items():
                    rows[site].append(values.to(DTYPE))
                    squares[site] = squares.get(site, 0) + values.double().square().sum(0)
                bar.advance(len(numbers))
        return replace(
            self.empty,
            rows={site: torch.stack(found, 1).flatten(0, 1) for site, found in rows.items()},
            diagonal=squares,
            tokens=(lengths - 1).repeat_interleave(each),
            texts=torch.tensor(numbers, device="cpu").repeat_interleave(each),
        )


@torch.inference_mode(False)
def prepare_profile(
    model: nn.Module,
    tokenizer,
    sites: str | Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    *,
    draws: int | None = None,
    error: float | None = None,
    batch_tokens: int = 1024,
    recompute: bool = False,
    seed: int = 0,
    layout: Layout | None = None,
) -> ProfileRun:
    """What :func:`profile` will do, with everything checked that can be before; arguments and errors as of it."""
    chosen = list(neutral_texts() if texts is None else texts)
    context = getattr(text_config(model), "max_position_embeddings", None)
    ids = [row[:context] for row in neutral_ids(tokenizer, chosen)]
    check_vocabulary(vocabulary_size(model), ids)
    each = _draws_a_text(draws, error, [len(row) - 1 for row in ids])
    batch_tokens = check_count("batch_tokens", batch_tokens, 2**40, "tokens in a batch", PairsError)
    found = find_sites(model, available(model, SITES, layout) if sites is None else sites, layout)
    expect_head(model)
    if not is_causal(model, layout):
        raise CaptureError(
            f"{type(model).__name__}: found bidirectional attention, expected a causal model: in one pass each token "
            "sees what follows it"
        )
    if any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules()):
        warnings.warn(
            f"{type(model).__name__}: found a mixture of experts, whose router jumps from expert to expert: the KL of "
            "a shift may be far above what a profile predicts. See what a strength does with austeer evaluate",
            SteeringWarning,
            stacklevel=4,
        )
    layers = list(unwrap(model).get_submodule(layers_path(model, layout)).children()) if recompute else []
    empty = Profile(
        layers={name: tuple(site.layer for site in all_) for name, all_ in found.items()},
        rows={},
        diagonal={},
        tokens=torch.empty(0, dtype=torch.int64, device="cpu"),
        texts=torch.empty(0, dtype=torch.int64, device="cpu"),
        ids=tuple(torch.tensor(row, device="cpu") for row in ids),
        model=fingerprint(model, found),
        weights=weights_of(model),
        dtype=str(floating_dtype(model)).removeprefix("torch."),
        sources=((_name_of(texts), seed),),
    )
    return ProfileRun(ShiftGradients(model, found, layers), empty, each, batch_tokens)


def _draws_a_text(draws: int | None, error: float | None, tokens: Sequence[int]) -> int:
    """How many draws of each text are made: what an error of :attr:`Profile.error` takes, or what is asked for."""
    if error is not None and (isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 < error < 2):
        raise PairsError(f"error: found {error!r}, expected a relative standard error, for example {ERROR}")
    weight = sum(count**2 for count in tokens) / sum(tokens) ** 2  # of a text's draws in the sum, squared
    needed = math.ceil(2 * weight / (ERROR if error is None else error) ** 2 - 1e-9)
    wanted = needed * len(tokens) if draws is None else draws
    each = -(-check_count("draws", wanted, 2**20, "draws", PairsError) // len(tokens))
    if error is not None and each < needed:
        raise PairsError(
            f"draws: found {draws}, expected at least {needed * len(tokens)} for a relative standard error of "
            f"{error:g} on {len(tokens)} texts"
        )
    return each


def _earlier(checkpoint: str | Path | None, resume: bool, settings: Profile, each: int) -> Profile | None:
    """The draws that an interrupted run has kept."""
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    if not resume:
        raise FileFormatError(
            f"{checkpoint}: found the checkpoint of an earlier run; go on from it with resume, or remove it to start "
            "anew"
        )
    made = Profile.load(checkpoint)
    for what in ("model", "layers", "weights", "dtype", "sources"):
        found, expected = getattr(made, what), getattr(settings, what)
        if found != expected:
            raise FileFormatError(f"{checkpoint}: is of another run: found {what} {found!r}, expected {expected!r}")
    if len(made.ids) != len(settings.ids) or not all(map(torch.equal, made.ids, settings.ids)):
        raise FileFormatError(f"{checkpoint}: is of another run, on other texts")
    if set(made.rows) != set(settings.model.widths) or len(made.texts) != len(made.texts.unique()) * each:
        raise FileFormatError(f"{checkpoint}: is of another run: found {made}, expected {each} draws a text")
    return made


def _joined(made: Profile, part: Profile) -> Profile:
    return replace(
        made,
        rows={site: torch.cat([rows, part.rows[site]]) for site, rows in made.rows.items()},
        diagonal={site: found + part.diagonal[site] for site, found in made.diagonal.items()},
        tokens=torch.cat([made.tokens, part.tokens]),
        texts=torch.cat([made.texts, part.texts]),
    )


def _seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:6], "little")


def _name_of(texts: Sequence[str] | None) -> str:
    if texts is None:
        return PACKAGED
    return f"{len(texts)} texts, {hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:12]}"
