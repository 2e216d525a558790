"""Stored activations as a whole: shards that belong together, of one model, its sites and layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import AusteerError, FileFormatError, PairsError
from ...models.sites import Fingerprint, find_sites, fingerprint
from ...models.skeleton import load_config, skeleton
from ...pairs.chat import ChatForm
from .shards import Shard, find_shards


@dataclass(frozen=True)
class StoredActivations:
    """Shards that belong together. Nothing but their headers has been read.

    Attributes:
        shards: in the order in which they are counted.
        model, layers, chat_template: as in :class:`austeer.momentum.momentum.Momentum`, the same for all.
    """

    shards: tuple[Shard, ...]
    model: Fingerprint
    layers: tuple[int, ...]
    chat_template: ChatForm

    @classmethod
    def open(
        cls,
        paths: str | Path | Iterable[str | Path],
        *,
        model: Fingerprint | None = None,
        layers: Sequence[int] | None = None,
        chat_template: ChatForm | None = None,
    ) -> StoredActivations:
        """Finds shards and checks that they fit together; arguments as of :func:`austeer.momentum_from_activations`.

        Raises:
            FileFormatError: see :func:`austeer.measuring.stored.shards.find_shards`; shards of different models,
                sites, layers or dtypes, or that say otherwise than the arguments; or no model given where shards do
                not say.
            PairsError: no row in any of them.
        """
        shards = find_shards(paths)
        told = [_told(shard, model, layers, chat_template) for shard in shards]
        for shard, description in zip(shards, told):
            for what, found in description.items():
                if found != told[0][what]:
                    raise FileFormatError(
                        f"{shard.path}: found {what} {found}, and in {shards[0].path} {told[0][what]}; only like "
                        "activations add up. Count them apart"
                    )
        if not sum(shard.rows for shard in shards):
            raise PairsError(f"{shards[0].path}: found no row in {len(shards)} shards, expected at least one pair")
        first = told[0]
        return cls(tuple(shards), first["model"], first["layers"], first["chat_template"])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Site -> layers and width."""
        return dict(self.shards[0].shapes)

    @property
    def columns(self) -> int:
        """AUs of all sites and layers."""
        return sum(layers * width for layers, width in self.shapes.values())

    def part(self, index: int, count: int) -> StoredActivations:
        """Every ``count``-th shard from ``index`` on: the share of one process among several. It may be empty."""
        if not 0 <= index < count:
            raise AusteerError(f"part: found {(index, count)}, expected (i, n) with i from 0 to n - 1")
        return replace(self, shards=self.shards[index::count])


def _told(
    shard: Shard, model: Fingerprint | None, layers: Sequence[int] | None, chat_template: ChatForm | None
) -> dict[str, Any]:
    """What a shard says of itself, or else the arguments; both where both do."""
    header, count = shard.header, next(iter(shard.shapes.values()))[0]
    widths = {site: width for site, (_, width) in shard.shapes.items()}
    if header is None and model is None:
        raise FileFormatError(
            f"{shard.path}: does not say which model it is of; give model=Fingerprint(model_type, layers, {{}}, name, "
            "None) (on the command line --model, or --model-type, --model-layers and --name)"
        )
    if model is not None:
        known = {site: model.widths.get(site, width) for site, width in widths.items()}
        given = (model.model_type, model.layers, known)
        found = (header.model.model_type, header.model.layers, widths) if header else (*given[:2], widths)
        if given != found:
            raise FileFormatError(f"{shard.path}: found a model {found}, expected {given} as given")
    if header is not None:
        for what, wanted in (("layers", None if layers is None else tuple(layers)), ("chat_template", chat_template)):
            if wanted is not None and wanted != getattr(header, what):
                raise FileFormatError(f"{shard.path}: found {what} {getattr(header, what)}, expected {wanted} as given")
        told = {"model": header.model, "layers": header.layers, "chat_template": header.chat_template}
    else:
        assert model is not None
        own = tuple(range(model.layers)) if layers is None else tuple(layers)
        if len(own) != count or any(not 0 <= n < model.layers for n in own) or list(own) != sorted(set(own)):
            raise FileFormatError(
                f"{shard.path}: holds {count} layers, found layers {own} of a model of {model.layers}; expected the "
                "ascending numbers of those it holds: give layers=... (--layers 0-11,15)"
            )
        told = {"model": replace(model, widths=widths), "layers": own, "chat_template": chat_template or False}
    return {**told, "sites": dict(shard.shapes), "dtype": shard.dtype}


def fingerprint_of(name: str) -> Fingerprint:
    """The fingerprint of a model with all its sites, from its config alone.

    Args:
        name: a folder or Hub id, or "demo".

    Raises:
        ModelError, SiteError: its config cannot be read, or is of no model whose sites are known.
    """
    model = skeleton(load_config(name), torch.float32)
    return fingerprint(model, find_sites(model))
