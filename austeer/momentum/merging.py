"""Momentum files made elsewhere, added up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import SelectionError
from ..utils.progress import Progress
from .momentum import Momentum


def merge_files(paths: Sequence[str | Path], progress: bool | None = None) -> Momentum:
    """The momentum of all pairs of some momentum files; counts do not depend on their order.

    Args:
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Raises:
        SelectionError: fewer than two files; one given twice, also as a copy; or files of different models, sites,
            layers or prompt forms.
        FileFormatError: a file is missing or damaged.
    """
    if len(paths) < 2:
        raise SelectionError(f"merge: found {len(paths)} files, expected at least two momentum files")
    total: Momentum | None = None
    seen: dict[str, str | Path] = {}
    with Progress("merging", len(paths), "files", progress) as bar:
        for path in paths:
            momentum = Momentum.load(path)
            digest = _digest(momentum)
            if digest in seen:
                raise SelectionError(
                    f"merge: {path} holds the same counters as {seen[digest]}; its pairs would count twice"
                )
            seen[digest] = path
            try:
                total = momentum if total is None else total.merge(momentum)
            except SelectionError as error:
                raise SelectionError(f"{path}: {error}") from error
            bar.advance()
    assert total is not None
    return total


def _digest(momentum: Momentum) -> str:
    """Of what was counted: two sets of pairs do not agree in every sum."""
    digest = hashlib.sha256(str(momentum.pairs).encode())
    for site, counters in sorted(momentum.sites.items()):
        digest.update(site.encode())
        for tensor in counters.tensors().values():
            digest.update(tensor.numpy().data)
    return digest.hexdigest()
