"""Activation momentum: mergeable counters, and ``measure``: pairs -> Momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from austeer_kernels import NO_PAIR, momentum_counters, momentum_update

from . import files
from .capture import LastTokens, batches, evaluating
from .errors import CaptureError, FileFormatError, PairsError, SelectionError, SiteError, SteeringError
from .pairs import Pair, Pairs, tokenise
from .progress import Progress
from .sites import Fingerprint, Layout, find_sites, fingerprint, text_config
from .steering import is_steered

if TYPE_CHECKING:
    from .plan import Plan

FORMAT, VERSION = "austeer-momentum", 1


@dataclass(eq=False)
class Counters:
    """The counters of one site; all [layers, width].

    Attributes:
        positive, negative: int64, in how many pairs the AU was larger on the positive (negative) text.
        delta_sum, delta_square_sum: float64, sums of m and m * m, where m = positive - negative activation.
    """

    positive: Tensor
    negative: Tensor
    delta_sum: Tensor
    delta_square_sum: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(a + b for a, b in zip(self.tensors().values(), other.tensors().values())))


@dataclass(frozen=True, eq=False)
class Momentum:
    """Activation momentum of every AU at one or more sites (paper: r_pos and r_neg, before the division).

    Attributes:
        sites: site name -> ``Counters``.
        pairs: the number of pairs counted.
        model: what it was measured on.
        chat_template: whether the prompts went through a chat template.
        cut: texts that were cut on the left to fit the model.
        identical: pairs whose two texts have the same tokens (they add to ``pairs`` only).
    """

    sites: Mapping[str, Counters]
    pairs: int
    model: Fingerprint
    chat_template: bool = False
    cut: int = 0
    identical: int = 0
    sources: tuple[str, ...] = field(default=())

    def counters(self, site: str) -> Counters:
        """Raises SelectionError if ``site`` was not measured."""
        if site not in self.sites:
            raise SelectionError(
                f"site {site!r} was not measured; found {', '.join(self.sites)}. Measure it: sites=[{site!r}]"
            )
        return self.sites[site]

    def select(
        self,
        site: str,
        k: int | None = None,
        *,
        max_fdr: float | None = None,
        ties: str = "effect",
        operation: str = "scale",
    ) -> Plan:
        """The plan of the most consistent AUs of ``site``; see :func:`austeer.selection.select`."""
        from .selection import select

        return select(self, site, k, max_fdr=max_fdr, ties=ties, operation=operation)

    def merge(self, other: Momentum) -> Momentum:
        """The momentum of both sets of pairs; counts do not depend on the order.

        Raises:
            SelectionError: the two are of different models, sites or prompt forms.
        """
        if set(self.sites) != set(other.sites):
            raise SelectionError(f"merge: found sites {sorted(other.sites)}, expected {sorted(self.sites)}")
        for what in ("model", "chat_template"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise SelectionError(f"merge: found {what} {theirs}, expected {mine}; only like momentum adds up")
        return replace(
            self,
            sites={name: self.sites[name] + other.sites[name] for name in self.sites},
            pairs=self.pairs + other.pairs,
            cut=self.cut + other.cut,
            identical=self.identical + other.identical,
            sources=tuple(sorted({*self.sources, *other.sources})),
        )

    def save(self, path: str | Path) -> Path:
        """Writes a ``.safetensors`` file (counters, and a JSON header with the rest)."""
        header: dict[str, Any] = {
            name: value for name, value in vars(self).items() if name not in ("sites", "model", "sources")
        }
        header |= {"model": self.model.to_json(), "sites": list(self.sites), "sources": list(self.sources)}
        tensors = {f"{site}.{name}": t for site, c in self.sites.items() for name, t in c.tensors().items()}
        files.write(Path(path), FORMAT, VERSION, header, tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Momentum:
        """Raises FileFormatError if the file is missing, truncated, foreign or inconsistent."""
        header, tensors = files.read(Path(path), FORMAT, VERSION)
        try:
            model = Fingerprint.from_json(header.pop("model"))
            sites = {}
            for site in header.pop("sites"):
                counters = Counters(**{name: tensors[f"{site}.{name}"] for name in Counters.__dataclass_fields__})
                _check_counters(counters, (model.layers, model.widths[site]), header["pairs"])
                sites[site] = counters
            return cls(sites=sites, model=model, sources=tuple(header.pop("sources")), **header)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: inconsistent content ({error}); measure again") from error


def _check_counters(counters: Counters, shape: tuple[int, int], pairs: int) -> None:
    for name, t in counters.tensors().items():
        expected = torch.int64 if name in ("positive", "negative") else torch.float64
        if tuple(t.shape) != shape or t.dtype != expected:
            raise ValueError(f"{name} is {t.dtype} {list(t.shape)}, expected {expected} {list(shape)}")
    both = counters.positive + counters.negative
    if not isinstance(pairs, int) or both.max() > pairs or min(counters.positive.min(), counters.negative.min()) < 0:
        raise ValueError(f"counts do not fit {pairs} pairs")


def measure(
    model: nn.Module,
    tokenizer,
    pairs: Pairs | Iterable[Pair | Mapping[str, str] | Sequence[str]],
    sites: str | Sequence[str] = ("attention", "ffn"),
    *,
    batch_tokens: int | None = None,
    buffer_pairs: int = 256,
    max_length: int | None = None,
    layout: Layout | None = None,
    progress: bool | None = None,
) -> Momentum:
    """Counts activation momentum over contrastive pairs (paper, section on activation momentum).

    Every text runs once through the model without its head; the activations of its last token at each site are kept
    for ``buffer_pairs`` pairs at a time and counted by one kernel call a site. Values are compared as the model made
    them. Texts of like length share a batch, padded on the left under the attention mask.

    Args:
        model: a Transformers decoder, in evaluation mode for the time of the call.
        tokenizer: the model's own. One without a pad token is fine.
        pairs: from :func:`load_pairs`, or (prompt, positive, negative) tuples.
        sites: names of sites, see :mod:`austeer.sites`.
        batch_tokens: tokens in a batch, padding included (1,024 on a CPU, 16,384 elsewhere).
        buffer_pairs: pairs whose activations are held at a time.
        max_length: longer texts are cut on the left to so many tokens; the model's context by default.
        layout: attribute paths of a model whose family is not known.
        progress: a progress bar on standard error; by default if that is a terminal.

    Raises:
        PairsError, SiteError: unusable pairs; a site or family that is not known.
        CaptureError: an activation is NaN or infinite (site, layer and pair are named), or a site was not reached.
        SteeringError: the model is steered now.
    """
    if is_steered(model):
        raise SteeringError("the model is steered: its activations are not its own. Leave the steering context first")
    pairs = Pairs.of(pairs)
    if not pairs:
        raise PairsError(f"{pairs.source}: found no pairs, expected at least one")
    found = find_sites(model, sites, layout)
    if not found:
        raise SiteError("sites: found none, expected at least one name, for example sites=['attention']")
    limit = _max_length(model, max_length)
    tokens = tokenise(tokenizer, pairs, limit)
    count = len(tokens.number)
    buffer_pairs = max(1, min(buffer_pairs, count))
    capture = LastTokens(model, found, 2 * buffer_pairs)
    batch_tokens = batch_tokens or (1024 if capture.device.type == "cpu" else 16384)
    counting = {name: _Counting(len(s), s[0].width, capture.device) for name, s in found.items()}

    with evaluating(model), capture.attached(), Progress("measuring", 2 * count, "texts", progress) as bar:
        for start in range(0, count, buffer_pairs):
            stop = min(start + buffer_pairs, count)
            texts = tokens.positive[start:stop] + tokens.negative[start:stop]  # row r and row r + n are a pair
            for batch in batches([len(t) for t in texts], batch_tokens):
                capture.run([texts[i] for i in batch], batch)
                bar.advance(len(batch))
            for name, site in counting.items():
                site.add(capture.buffers[name], stop - start, start)
                site.check(name, pairs, tokens.number)

    return Momentum(
        sites={name: site.counters() for name, site in counting.items()},
        pairs=len(pairs),
        model=fingerprint(model, found),
        chat_template=pairs.chat_template,
        cut=tokens.cut,
        identical=tokens.identical,
        sources=(pairs.source,),
    )


class _Counting:
    """Running counters of one site on the model's device, flat over layers and width."""

    def __init__(self, layers: int, width: int, device: torch.device):
        self.shape = (layers, width)
        *self.totals, self.first_nonfinite = momentum_counters(layers * width, device)

    def add(self, buffer: Tensor, pairs: int, offset: int) -> None:
        rows = buffer.flatten(1)  # [texts, layers * width]
        positive, negative, delta_sum, delta_square_sum = self.totals
        momentum_update(
            rows[:pairs],
            rows[pairs : 2 * pairs],
            positive,
            negative,
            delta_sum,
            delta_square_sum,
            self.first_nonfinite,
            offset,
        )

    def check(self, site: str, pairs: Pairs, number: list[int]) -> None:
        row, column = (int(v) for v in self.first_nonfinite.min(0))
        if row != NO_PAIR:
            pair = number[row]
            layer, au = divmod(column, self.shape[1])
            raise CaptureError(
                f"site {site!r}, layer {layer}, AU {au}: found NaN or infinity on pair {pair} of {pairs.source} "
                f"({pairs[pair].prompt!r:.60}); expected finite activations. Load the model in bfloat16 or float32, "
                "or leave the pair out"
            )

    def counters(self) -> Counters:
        return Counters(*(t.view(self.shape).cpu() for t in self.totals))


def _max_length(model: nn.Module, max_length: int | None) -> int:
    context = getattr(text_config(model), "max_position_embeddings", None)
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise PairsError(f"max_length: found {max_length!r}, expected an integer of at least 1")
    limit = min((n for n in (max_length, context) if n is not None), default=None)
    if limit is None:
        raise PairsError("the model's config names no context length; give max_length")
    return limit
