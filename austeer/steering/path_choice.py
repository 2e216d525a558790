"""Which path a site takes, and why not a cheaper one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from austeer_kernels import launch

from ..errors import SteeringError
from ..models.projection import why_not_the_projection
from ..models.sites import Site
from ..models.structure import input_device
from ..models.tensor_parallel import held
from ..plans.fit import LayerUnits, units_by_layer
from ..plans.plan import Plan
from .columns import Columns
from .dense import Dense
from .fold import Fold, shared_storages, why_not_fold
from .fused import Fused, why_not_fused
from .hook_path import HookPath
from .path import Path
from .routing import Routing
from .tables import StrengthTable, groups_of

PATHS: dict[str, type[Path]] = {"fold": Fold, "fused": Fused, "columns": Columns, "dense": Dense}
MODES = ("auto", *PATHS)


@dataclass(frozen=True)
class Choice:
    """A path for one site.

    Attributes:
        path: its class. module: what it works on.
        reason: why not a cheaper one; empty for the cheapest.
        limit: up to how many tokens the fused kernel is used; beyond, columns.
        parts: the modules whose weights fold scales.
    """

    path: type[Path]
    module: nn.Module
    reason: str
    limit: int = 0
    parts: tuple[nn.Module, ...] = ()


def choose(
    mode: str,
    model: nn.Module,
    site: Site,
    groups: Sequence[Sequence[LayerUnits]],
    storages: Counter,
    at_run_time: str,
    fused: set[nn.Module],
    blocks: dict[tuple[type, type], str | None],
) -> Choice:
    """The path of a site.

    ``auto`` takes fold, which runs nothing, where it is exact and possible; then fused, up to the number of tokens for
    which it was measured to be faster on this device (the kernels' tables); then columns.

    Args:
        groups: the AUs at the site, see ``StrengthTable``; more than one where plans with and without magnitude meet.
        storages: from ``shared_storages``.
        at_run_time: the reason why steering depends on the token, and so cannot be in the weights; or empty.
        fused: the projections that are fused with another site already; this one's is added.
        blocks: what ``why_not_the_projection`` said of a kind of block and projection; this one's is added.

    Raises:
        SteeringError: ``mode`` is not possible at the site.
    """
    module = model.get_submodule(site.path)
    projection = model.get_submodule(site.projection) if site.projection else None
    if mode in ("columns", "dense"):
        return Choice(PATHS[mode], module, "as asked")
    asked = "" if mode == "auto" else "as asked"
    no_fold = at_run_time or why_not_fold(model, site, groups[0][0].operation, storages)
    no_fused = why_not_fused(projection, groups)
    if projection is not None and not (no_fold and no_fused):
        kind = (type(module), type(projection))
        if kind not in blocks:
            blocks[kind] = why_not_the_projection(model, site)
        no_fold, no_fused = no_fold or blocks[kind], no_fused or blocks[kind]
    if mode != "fused" and not no_fold:
        return Choice(Fold, module, asked, parts=tuple(model.get_submodule(path) for path in site.parts))
    if no_fused is None and projection in fused:
        if mode == "fused":
            return Choice(Columns, module, "its projection is fused with another site already")
        no_fused = "fused already"
    limit = launch.MOST_TOKENS
    if no_fused is None and mode == "auto":
        limit = measured_limit(projection, site.side == "input")
        no_fused = None if limit else "not measured to be faster here"
    if mode != "fold" and no_fused is None and projection is not None:
        fused.add(projection)
        reason = f"{asked or f'no fold: {no_fold}'}; fused up to {limit} tokens, then columns"
        return Choice(Fused, projection, reason, limit)
    if mode != "auto":
        raise SteeringError(
            f"mode {mode!r} is not possible at site {site.name!r} of layer {site.layer} ({site.path}): "
            f"{no_fold if mode == 'fold' else no_fused}. Use mode='auto' or 'columns'"
        )
    return Choice(Columns, module, f"no fold: {no_fold}; no fused: {no_fused}")


def measured_limit(projection: nn.Module | None, at_input: bool) -> int:
    """Up to how many tokens the fused kernel is faster on this device; 0 where nobody has measured it."""
    if not isinstance(projection, nn.Linear) or projection.weight.device.type != "cuda":
        return 0
    weight = projection.weight
    return launch.fused_up_to(*weight.shape, weight.dtype, weight.device, at_input=at_input)


def make_path(
    choice: Choice, site: Site, tables: Sequence[StrengthTable], routing: Routing | None, check: bool
) -> Path:
    """The chosen path, not yet attached."""
    if choice.path is Fold:
        return Fold(site, tables[0], choice.parts)
    assert issubclass(choice.path, HookPath)
    if choice.path is Fused:
        return Fused(site, tables, choice.module, routing, check, limit=choice.limit)
    return choice.path(site, tables, choice.module, routing, check)


def plan_paths(
    model: nn.Module,
    plans: Sequence[Plan],
    sites: Mapping[str, list[Site]],
    mode: str,
    at_run_time: str,
    routing: Routing | None,
    check: bool,
) -> tuple[list[Path], list[str]]:
    """A path for each site and layer of the plans that this process holds, and why not a cheaper one.

    Args:
        at_run_time: see ``choose``. check: compare one site of each path with the formula.

    Raises:
        SteeringError: ``mode`` is not possible at a site.
    """
    paths: list[Path] = []
    reasons: list[str] = []
    storages, default = shared_storages(model), input_device(model)
    fused: set[nn.Module] = set()
    blocks: dict[tuple[type, type], str | None] = {}
    for (name, layer), entries in units_by_layer(plans, sites).items():
        site = sites[name][layer]
        mine = held(model, site)
        mine = range(site.width) if mine is None else mine  # it may be an empty one
        groups = groups_of(entries, mine)
        if not groups:
            continue  # other processes have these
        choice = choose(mode, model, site, groups, storages, at_run_time, fused, blocks)
        device = _device_of(choice.module, default)
        # Dense tables take 8 bytes a plan and dimension; columns has them only where they help.
        dense = choice.path is not Columns or (device.type == "cpu" and len(plans) <= 64)
        tables = [StrengthTable(group, len(plans), len(mine), device, dense) for group in groups]
        first = check and not any(type(path) is choice.path for path in paths)
        paths.append(make_path(choice, site, tables, routing, first))
        reasons.append(choice.reason)
    return paths, reasons


def _device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Where a module's activations are expected: with its weights, unless those are offloaded."""
    device = next((p.device for p in module.parameters()), default)
    return default if device.type == "meta" else device
