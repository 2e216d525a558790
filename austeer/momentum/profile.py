"""The side-effect profile of a model: what shifts of its AUs do to text that should stay as it is.

For a small shift s the next token's KL divergence from the unsteered model is, in nats a token,

    KL(s) = s' F s / 2,    F = E[g g'],    g = d log p(y | context) / d s

with y drawn from the model itself: F is the Fisher information, the curvature of the divergence at s = 0. A draw has
one y for every token of a text, and its row is the sum of their g: as these are independent given the text, and their
means are zero, the products of different tokens cancel on average. So with rows r and their tokens n

    F = sum(r r') / sum(n),    KL(s) = sum((r . s)^2) / (2 sum(n))

which needs no matrix. It belongs to the model alone, not to a task.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, SelectionError
from ..forward.neutral import PACKAGED
from ..models.sites import Fingerprint, ascending
from ..models.structure import floating_dtype, is_offloaded, name_of, unwrap
from ..models.weights import signature
from ..plans.dose import Dose, line_of, positive_kl, some_ids
from ..plans.plan import Plan
from ..utils import files

FORMAT, VERSION = "austeer-profile", 2

#: Of ``rows``: any sample of this size errs by more than its rounding, and its range is float32's.
DTYPE = torch.bfloat16

#: Random plans a site of which the halves' predictions are compared.
PLANS = 100


#: What the signature of weights begins with that were elsewhere: then it is of other ones than it would be here.
OFFLOADED = "offloaded "


def weights_of(model: nn.Module) -> str:
    """What tells the weights of models of one architecture apart (:func:`austeer.models.weights.signature`)."""
    return (OFFLOADED if is_offloaded(model) else "") + signature(unwrap(model))


@dataclass(frozen=True, eq=False)
class Profile:
    """The gradients of sampled log-probabilities on neutral text, by shifts of every AU.

    Attributes:
        layers: site name -> the layers that have it, in a hybrid not all.
        rows: site name -> bfloat16 [draws, layers, width], the sum over a text's tokens of d log p(y) / d s.
        diagonal: site name -> float64 [layers, width], the diagonal of F times the number of all tokens.
        tokens: int64 [draws], how many tokens each row sums over. texts: int64 [draws], the text of each draw.
        ids: the token ids of each text, int64 [length]: what the KL of a steering can be measured on later.
        model: what it was made on. weights: :func:`weights_of` it.
        dtype: what the model computed in. sources: the names of the texts and the seeds of their draws.
    """

    layers: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, Tensor]
    diagonal: Mapping[str, Tensor]
    tokens: Tensor
    texts: Tensor
    ids: tuple[Tensor, ...]
    model: Fingerprint
    weights: str
    dtype: str
    sources: tuple[tuple[str, int], ...]

    def __repr__(self) -> str:
        texts = len(self.texts.unique())
        return f"Profile({self.model.name}: {', '.join(self.rows)}; {len(self.tokens)} draws of {texts} texts)"

    @property
    def texts_name(self) -> str:
        """What the texts are called."""
        return " and ".join(dict.fromkeys(name for name, _ in self.sources))

    @property
    def error(self) -> float:
        """The relative standard error of a predicted KL, as squares of normal sums have it: of n draws sqrt(2 / n).

        A long text's draws count for more, so it is larger where texts are of unlike lengths.
        """
        weight = self.tokens.double() / self.tokens.sum()
        return math.sqrt(2 * float(weight.square().sum()))

    @property
    def spread(self) -> float:
        """What :attr:`error` is where it is measured: by how far the two halves of the texts differ in their KL.

        The root mean square of (a - b) / (a + b), a and b what they predict for random plans of ten AUs of one site
        each. It has the unlikeness of texts in it, and long tails.

        Raises:
            SelectionError: all draws are of one text.
        """
        generator, first, found = torch.Generator("cpu").manual_seed(0), self._first_half(), []
        for site, rows in self.rows.items():
            chosen = torch.randint(rows[0].numel(), (PLANS, 10), generator=generator, device="cpu")
            shift = torch.randn(chosen.shape, generator=generator, device="cpu", dtype=torch.float64)
            # An AU is shifted by what would cost as much for each alone, so that no single one decides.
            shift /= self.diagonal[site].flatten()[chosen].clamp(min=1e-300).sqrt()
            kl = (rows.flatten(1)[:, chosen].double() * shift).sum(-1).square()
            one, other = (kl[half].sum(0) / self.tokens[half].sum() for half in (first, ~first))
            found.append((one - other) / (one + other).clamp(min=1e-300))
        return float(torch.cat(found).square().mean().sqrt())

    def fisher(self, site: str) -> Tensor:
        """The diagonal of F of a site, nats a token and squared unit of the AU: float64 [layers, width]."""
        return self._of(self.diagonal, site) / self.tokens.sum()

    def scaled(self, site: str, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows of which KL(s) = sum((rows . s)^2), and the diagonal of that: float32 [draws, layers, width], float64.

        Args:
            layers: those that are wanted.

        Raises:
            SelectionError: a site or layer without a profile.
        """
        rows, chosen = self._of(self.rows, site), self._rows_of(site, layers)
        tokens = 2 * int(self.tokens.sum())
        return rows[:, chosen].float() / math.sqrt(tokens), self.diagonal[site][chosen] / tokens

    def root(self, plan: Plan) -> Tensor:
        """What predicts the KL of a plan of shifts: float64 [draws, k]; KL = sum over draws of (root @ alpha)^2.

        Args:
            plan: of "shift"; its AU i is shifted by alpha[i] * delta[i].

        Raises:
            SelectionError: another model, a site without a profile, or another operation.
        """
        self.check(plan.model)
        if plan.operation != "shift":
            raise SelectionError(
                f"profile: found a plan of {plan.operation!r}, expected 'shift': what {plan.operation} adds depends on "
                "the activation"
            )
        found = torch.empty(len(self.tokens), len(plan), dtype=torch.float64, device="cpu")
        for site in plan.sites:
            places = plan.of(site)
            rows, row = self._of(self.rows, site), self._rows_of(site, plan.layer[places].tolist())
            found[:, places] = rows[:, row, plan.index[places].long()].double()
        return found * plan.delta.double() / math.sqrt(2 * int(self.tokens.sum()))

    def kl(self, plan: Plan, alpha: float | Mapping[str, float] = 1.0) -> float:
        """The predicted KL(unsteered || steered), nats a token: right for small shifts, too low beyond them.

        Example:
            >>> plan = momentum.select("attention", k=10, operation="shift")
            >>> profile.kl(plan, alpha=2) == 4 * profile.kl(plan)
            True

        Args:
            plan: of "shift". alpha: its strength, or one for each of its sites by name.

        Raises:
            SelectionError: as :meth:`root`, or other sites than the plan's.
        """
        strengths = alpha if isinstance(alpha, Mapping) else dict.fromkeys(plan.sites, alpha)
        if set(strengths) != set(plan.sites):
            raise SelectionError(f"alpha: found sites {sorted(strengths)}, expected {list(plan.sites)}")
        each = torch.tensor([float(strengths[site]) for site in plan.site], dtype=torch.float64, device="cpu")
        return float((self.root(plan) @ each).square().sum())

    def dose(self, plan: Plan, effect: Sequence[float] = ()) -> Dose:
        """What the strengths of a plan do: the predicted KL of its first 1, 2, ... AUs.

        Args:
            plan: of "shift". effect: of each AU at alpha = 1, nats, where it is known.

        Raises:
            SelectionError: as :meth:`root`.
        """
        kl = self.root(plan).cumsum(1).square().sum(0)
        packaged = self.texts_name == PACKAGED  # a user's own text does not travel with a plan
        return Dose(
            kl=tuple(kl.tolist()),
            effect=tuple(itertools.accumulate(effect)),
            error=self.error,
            texts=line_of(self.texts_name),
            ids=some_ids(self.ids) if packaged else (),
        )

    def alpha(self, plan: Plan, kl: float) -> float:
        """The strength at which the predicted KL of a plan is ``kl`` nats a token.

        Example:
            >>> plan = momentum.select("attention", k=10, operation="shift")
            >>> alpha = profile.alpha(plan, kl=0.02)
            >>> round(profile.kl(plan, alpha), 6)
            0.02

        Args:
            plan: of "shift". kl: nats a token.

        Raises:
            SelectionError: ``kl`` is not positive, or the plan does nothing to the texts of the profile.
        """
        kl = positive_kl(kl, SelectionError)
        one = self.kl(plan)
        if not one > 0:
            raise SelectionError(
                f"kl: found a plan that changes nothing on the texts of the profile ({self.texts_name})"
            )
        return math.sqrt(kl / one)

    def halves(self) -> tuple[Profile, Profile]:
        """The profiles of every other text's draws, without a diagonal of their own.

        Raises:
            SelectionError: all draws are of one text.
        """
        first = self._first_half()
        return self._part(first), self._part(~first)

    def splits(self, count: int) -> list[tuple[Profile, Profile]]:
        """The profile without every ``count``-th text and that of those, ``count`` times; fewer where texts are fewer.

        Raises:
            SelectionError: all draws are of one text.
        """
        numbers = self.texts.unique()
        if len(numbers) < 2:
            raise SelectionError("profile: found draws of one text alone, expected several texts")
        parts = [torch.isin(self.texts, numbers[i::count]) for i in range(min(count, len(numbers)))]
        return [(self._part(~part), self._part(part)) for part in parts]

    def _first_half(self) -> Tensor:
        """bool [draws], those of every other text."""
        first = torch.isin(self.texts, self.texts.unique()[::2])
        if first.all():
            raise SelectionError("halves: found draws of one text alone, expected several texts")
        return first

    def _part(self, chosen: Tensor) -> Profile:
        rows = {site: found[chosen] for site, found in self.rows.items()}
        return replace(
            self,
            rows=rows,
            diagonal={site: found.double().square().sum(0) for site, found in rows.items()},
            tokens=self.tokens[chosen],
            texts=self.texts[chosen],
        )

    def merge(self, other: Profile) -> Profile:
        """The profile of both's draws, of other texts or other seeds.

        Raises:
            SelectionError: the two are of different models, weights, dtypes or sites, or hold the same draws.
        """
        for what in ("model", "layers", "weights", "dtype"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise SelectionError(f"merge: found {what} {theirs}, expected {mine}; only like profiles add up")
        if both := {*self.sources} & {*other.sources}:
            raise SelectionError("merge: found the same texts and seed twice ({}, {})".format(*min(both)))
        number = {tuple(row.tolist()): text for text, row in enumerate(self.ids)}
        ids, texts = [*self.ids], []
        for row in other.ids:
            texts.append(number.setdefault(tuple(row.tolist()), len(ids)))
            if texts[-1] == len(ids):
                ids.append(row)
        return replace(
            self,
            rows={site: torch.cat([rows, other.rows[site]]) for site, rows in self.rows.items()},
            diagonal={site: found + other.diagonal[site] for site, found in self.diagonal.items()},
            tokens=torch.cat([self.tokens, other.tokens]),
            texts=torch.cat([self.texts, torch.tensor(texts, device="cpu")[other.texts]]),
            ids=tuple(ids),
            sources=tuple(sorted({*self.sources, *other.sources})),
        )

    def check(self, model: Fingerprint) -> None:
        """Raises SelectionError unless it is of this model: its architecture, and what is known of its origin.

        Revisions are compared where both are known, and otherwise names where both are the Hub's: a local folder may
        hold a model under any name. See :meth:`check_weights` for a model that is loaded.
        """
        mine = self.model
        unlike = (mine.model_type, mine.layers) != (model.model_type, model.layers) or any(
            model.widths.get(site, width) != width for site, width in mine.widths.items()
        )
        if mine.revision and model.revision:
            unlike |= mine.revision != model.revision
        elif "/" in mine.name and "/" in model.name:
            unlike |= mine.name != model.name
        if unlike:
            raise SelectionError(
                f"profile: found one of {_described(mine)}, expected one of {_described(model)}; make it: austeer "
                "profile --model ..."
            )

    def check_weights(self, model: nn.Module) -> None:
        """Raises SelectionError where a loaded model is known to have other weights, say after fine-tuning.

        They are compared where both are of one dtype and neither offloaded, as few would be at hand then.

        Args:
            model: unsteered: steering may be an edit of weights.
        """
        dtype = str(floating_dtype(model)).removeprefix("torch.")
        found = weights_of(model)
        known = self.dtype == dtype and OFFLOADED not in self.weights and OFFLOADED not in found
        if known and self.weights != found:
            raise SelectionError(
                f"profile: found one of {_described(self.model)}, and this {name_of(model)} has other weights; make "
                "it: austeer profile --model ..."
            )

    def _of(self, table: Mapping[str, Tensor], site: str) -> Tensor:
        if site not in table:
            raise SelectionError(
                f"site {site!r} has no profile; found {', '.join(table)}. Make it with sites=[{site!r}]"
            )
        return table[site]

    def _rows_of(self, site: str, layers: Sequence[int]) -> Tensor:
        """Where layers are in a site's tables: int64 [layers]."""
        row_of = {layer: row for row, layer in enumerate(self.layers[site])}
        if missing := sorted({*layers} - {*row_of}):
            raise SelectionError(f"profile: found no {site!r} in layers {missing}, expected those that are wanted")
        return torch.tensor([row_of[layer] for layer in layers], device="cpu")

    def save(self, path: str | Path) -> Path:
        """Writes a ``.safetensors`` file (rows, diagonals, texts; a JSON header with the rest)."""
        header: dict[str, Any] = {name: getattr(self, name) for name in ("weights", "dtype", "sources")}
        header |= {"model": self.model.to_json(), "layers": {site: list(self.layers[site]) for site in self.rows}}
        lengths = torch.tensor([len(row) for row in self.ids], device="cpu")
        tensors = {"tokens": self.tokens, "texts": self.texts, "ids": torch.cat(self.ids), "lengths": lengths}
        for site in self.rows:
            tensors |= {f"{site}.rows": self.rows[site], f"{site}.diagonal": self.diagonal[site]}
        files.write(Path(path), FORMAT, VERSION, header, tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Raises FileFormatError if the file is missing, truncated, foreign or inconsistent."""
        header, tensors = files.read(Path(path), FORMAT, VERSION)
        try:
            model = Fingerprint.from_json(header.pop("model"))
            layers = {site: ascending(found, model.layers) for site, found in header.pop("layers").items()}
            profile = cls(
                sources=tuple((str(name), int(seed)) for name, seed in header.pop("sources")),
                layers=layers,
                rows={site: tensors[f"{site}.rows"] for site in layers},
                diagonal={site: tensors[f"{site}.diagonal"] for site in layers},
                tokens=tensors["tokens"],
                texts=tensors["texts"],
                ids=tensors["ids"].split(tensors["lengths"].tolist()),
                model=model,
                **header,
            )
            profile._check_shapes()
            return profile
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: inconsistent content ({error}); make it anew: austeer profile") from error

    def _check_shapes(self) -> None:
        """Raises ValueError unless every tensor is what it should be."""
        draws = len(self.tokens)
        if not self.rows or not draws or int(self.tokens.min()) < 1:
            raise ValueError(f"{len(self.rows)} sites, {draws} draws")
        expected: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
            "tokens": (self.tokens, (draws,), torch.int64),
            "texts": (self.texts, (draws,), torch.int64),
        }
        for site, rows in self.rows.items():
            size: tuple[int, ...] = (len(self.layers[site]), self.model.widths[site])
            expected[f"{site}.rows"] = (rows, (draws, *size), DTYPE)
            expected[f"{site}.diagonal"] = (self.diagonal[site], size, torch.float64)
        for name, (t, shape, dtype) in expected.items():
            if tuple(t.shape) != shape or t.dtype != dtype:
                raise ValueError(f"{name} is {t.dtype} {list(t.shape)}, expected {dtype} {list(shape)}")
            if not t.isfinite().all():
                raise ValueError(f"{name} is not finite")
        if any(row.dtype != torch.int64 or row.ndim != 1 for row in self.ids):
            raise ValueError("ids are not int64")
        length = torch.tensor([len(row) for row in self.ids], device="cpu")
        if int(self.texts.min()) < 0 or not torch.equal(length[self.texts] - 1, self.tokens):
            raise ValueError("the lengths of the texts are not those of the draws")


def _described(model: Fingerprint) -> str:
    revision = f", revision {model.revision[:12]}" if model.revision else ""
    return f"{model.name} ({model.model_type}, {model.layers} layers{revision})"
