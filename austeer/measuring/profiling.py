"""profile(): a model and neutral text -> its side-effect profile."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CaptureError, FileFormatError, PairsError, SteeringWarning, check_count
from ..forward.causality import is_causal, plain_batches
from ..forward.gradients import ShiftGradients
from ..forward.logits import LOGIT_ROWS, log_probabilities
from ..forward.neutral import neutral_ids, neutral_texts
from ..forward.tokens import check_vocabulary
from ..models.sites import Layout, find_sites, fingerprint
from ..models.structure import floating_dtype, text_config, vocabulary_size
from ..models.weights import signature
from ..momentum.profile import DTYPE, Profile
from ..utils.progress import Progress

#: Draws by default: a predicted KL has a relative standard error of 0.1, and a strength of 0.05.
DRAWS = 200


@torch.inference_mode(False)  # what is made under that mode cannot be differentiated
def profile(
    model: nn.Module,
    tokenizer,
    sites: str | Sequence[str] = ("attention", "ffn"),
    texts: Sequence[str] | None = None,
    *,
    draws: int = DRAWS,
    batch_tokens: int = 1024,
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
        sites: names of sites, see :mod:`austeer.models.sites`.
        texts: text that steering should leave as it is, cut to the model's context; by default short encyclopaedic
            paragraphs.
        draws: how many at least, rounded up to as many of each text. A predicted KL has a relative standard error of
            sqrt(2 / draws) where texts are alike in length.
        batch_tokens: tokens in a batch, padding included. seed: of the draws.
        checkpoint: a file in which the draws are kept batch by batch. resume: go on from it, if it is there.
        layout: attribute paths of a model whose family is not known.
        progress: a progress bar on standard error; by default if that is a terminal.

    Raises:
        PairsError: no text of two tokens, or too few draws. SiteError: a site or family that is not known.
        CaptureError: a gradient that is not finite, a site that cannot be differentiated, or bidirectional attention.
        SteeringError: the model is steered. FileFormatError: the checkpoint is of another run.
    """
    chosen = list(neutral_texts() if texts is None else texts)
    context = getattr(text_config(model), "max_position_embeddings", None)
    ids = [row[:context] for row in neutral_ids(tokenizer, chosen)]
    check_vocabulary(vocabulary_size(model), ids)
    draws = check_count("draws", draws, 2**20, "draws", PairsError)
    batch_tokens = check_count("batch_tokens", batch_tokens, 2**40, "tokens in a batch", PairsError)
    each = -(-draws // len(ids))
    found = find_sites(model, sites, layout)
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
            stacklevel=2,
        )
    gradients = ShiftGradients(model, found)
    settings = Profile(
        layers={name: tuple(site.layer for site in all_) for name, all_ in found.items()},
        rows={},
        diagonal={},
        tokens=torch.empty(0, dtype=torch.int64, device="cpu"),
        texts=torch.empty(0, dtype=torch.int64, device="cpu"),
        ids=tuple(torch.tensor(row, device="cpu") for row in ids),
        model=fingerprint(model, found),
        weights=signature(model),
        dtype=str(floating_dtype(model)).removeprefix("torch."),
        sources=((_name_of(texts), seed),),
    )
    made = _earlier(checkpoint, resume, settings, each)
    known = set() if made is None else set(made.texts.tolist())
    waiting = [number for number in range(len(ids)) if number not in known]
    with gradients.attached(), Progress("profiling", len(ids) * each, "draws", progress) as bar:
        bar.advance(len(known) * each)
        for batch in plain_batches(model, [ids[number] for number in waiting], batch_tokens):
            numbers = [waiting[text] for text in batch.texts.tolist()]
            part = _draws(gradients, [ids[n] for n in numbers], numbers, batch.ids, each, settings, bar)
            made = part if made is None else _joined(made, part)
            if checkpoint is not None:
                made.save(checkpoint)
    assert made is not None
    return made


def _draws(
    gradients: ShiftGradients,
    texts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    ids: Tensor,
    each: int,
    settings: Profile,
    bar: Progress,
) -> Profile:
    """``each`` draws of the texts of one batch."""
    lengths = torch.tensor([len(text) for text in texts], device="cpu")
    mask = (torch.arange(ids.shape[1], device="cpu") < lengths[:, None]).long()
    hidden = gradients.hidden_states(ids, mask)
    seeds = [_seed(settings.sources[0][1], number) for number in numbers]
    outward = sampled_gradients(gradients.model, hidden.detach(), (lengths - 1).tolist(), each, seeds)
    rows: dict[str, list[Tensor]] = {site: [] for site in gradients.sites}
    squares: dict[str, Tensor] = {}
    for draw in range(each):
        found = gradients.backward(hidden, outward[draw], again=draw + 1 < each)
        for site, values in found.items():
            rows[site].append(values.to(DTYPE))
            squares[site] = squares.get(site, 0) + values.double().square().sum(0)
        bar.advance(len(texts))
    return replace(
        settings,
        rows={site: torch.stack(found, 1).flatten(0, 1) for site, found in rows.items()},
        diagonal=squares,
        tokens=(lengths - 1).repeat_interleave(each),
        texts=torch.tensor(numbers, device="cpu").repeat_interleave(each),
    )


def sampled_gradients(
    model: nn.Module, hidden: Tensor, tokens: Sequence[int], draws: int, seeds: Sequence[int]
) -> Tensor:
    """d log p(y) / d hidden of next tokens y that the model draws itself: [draws, rows, length, width].

    Args:
        hidden: last hidden states [rows, length, width]. tokens: how many of each row's first positions count.
        seeds: one a row, so that its draws do not depend on its batch.
    """
    found = hidden.new_zeros(draws, *hidden.shape)
    for row, (count, seed) in enumerate(zip(tokens, seeds)):
        generator = torch.Generator(hidden.device).manual_seed(seed)
        for start in range(0, count, LOGIT_ROWS):
            stop = min(start + LOGIT_ROWS, count)
            with torch.inference_mode(False), torch.enable_grad():
                leaf = hidden[row, start:stop].detach().requires_grad_()
                log_p = log_probabilities(model, leaf)
                chosen = torch.multinomial(log_p.detach().exp(), draws, replacement=True, generator=generator)
                for draw in range(draws):
                    total = log_p.gather(-1, chosen[:, draw : draw + 1]).sum()
                    (found[draw, row, start:stop],) = torch.autograd.grad(total, leaf, retain_graph=draw + 1 < draws)
    return found


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
        return "packaged neutral text"
    return f"{len(texts)} texts, {hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:12]}"
