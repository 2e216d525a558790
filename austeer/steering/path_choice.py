"""Which path a site takes, and why not a cheaper one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from austeer_kernels import launch

from ..errors import SteeringError
from ..models.linear import bias_owner, sizes
from ..models.projection import why_not_the_projection
from ..models.sites import Site, site_at
from ..models.structure import input_device
from ..models.tensor_parallel import held
from ..plans.fit import LayerUnits, units_by_layer
from ..plans.plan import Plan
from .bias import Bias, bias_like, why_not_bias
from .columns import Columns
from .dense import Dense
from .editable import choosers, why_not_between
from .fold import Fold, why_not_fold
from .fused import Fused, why_not_fused
from .path import Path
from .routing import Routing
from .sharing import Sharing
from .switch import why_not_switched
from .tables import StrengthTable, Table, groups_of, table_of

PATHS: dict[str, type[Path]] = {"fold": Fold, "bias": Bias, "fused": Fused, "columns": Columns, "dense": Dense}
MODES = ("auto", *PATHS)

#: The reason of a bias beside a path that runs.
SWITCHED = "switched from pass to pass"


@dataclass(frozen=True)
class Choice:
    """A path for one site.

    Attributes:
        path: its class. module: what it works on.
        reason: why not a cheaper one; empty for the cheapest.
        limit: up to how many tokens the fused kernel is used; beyond, columns.
        parts: the modules whose weights fold scales.
        owner: the module whose bias is switched on and off; None for none.
    """

    path: type[Path]
    module: nn.Module
    reason: str
    limit: int = 0
    parts: tuple[nn.Module, ...] = ()
    owner: nn.Module | None = None


def choose(
    mode: str,
    model: nn.Module,
    site: Site,
    groups: Sequence[Sequence[LayerUnits]],
    sharing: Sharing,
    at_run_time: str,
    switched: bool,
    fused: set[nn.Module],
    blocks: dict[tuple[type, type, bool], str | None],
) -> Choice:
    """The path of a site.

    ``auto`` takes what runs nothing where it is exact and possible: fold for scale and ablate, bias for shift, which
    is switched on and off where only some tokens are steered, beside a path that runs. Otherwise fused under CUDA
    graphs, up to the number of tokens for which it was measured to be faster on this device (the kernels' tables), and
    columns.

    Args:
        groups: the AUs at the site, see ``groups_of``; more than one where plans of several forms meet.
        sharing: of the model.
        at_run_time: the reason why steering depends on the token, and so cannot be in the weights; or empty.
        switched: whether all the same forward passes are likely of which every token is steered, or none.
        fused: the projections that are fused with another site already; this one's is added.
        blocks: what ``why_not_the_projection`` said of a kind of block and projection; this one's is added.

    Raises:
        SteeringError: ``mode`` is not possible at the site.
    """
    for wrapper, name in choosers(model, site.path):
        if type(wrapper).__module__.startswith("peft."):
            raise SteeringError(
                f"site {site.name!r} of layer {site.layer} ({site.path}): found a {type(wrapper).__name__}, which runs "
                f"another {name} with its adapter on than with it off, expected one; steer another site, or merge the "
                "adapter (merge_and_unload)"
            )
    module = model.get_submodule(site.path)
    projection = model.get_submodule(site.projection) if site.projection else None
    if mode in ("columns", "dense"):
        return Choice(PATHS[mode], module, "as asked")
    asked = "" if mode == "auto" else "as asked"
    operation = groups[0][0].operation
    edit = mode if mode in ("fold", "bias") else "bias" if operation == "shift" else "fold"
    why_not_edit = why_not_bias if edit == "bias" else why_not_fold
    switched = switched and edit == "bias" and operation == "shift"
    no_edit = ("" if switched else at_run_time) or why_not_edit(model, site, operation, sharing)
    no_fused = why_not_fused(projection, groups)
    if projection is not None and no_fused is None:
        no_fused = why_not_between(model, site, str(site.projection))
    if projection is not None and not (no_edit and no_fused):
        kind = (type(module), type(projection), any(part.training for part in module.modules()))
        if kind not in blocks:
            blocks[kind] = why_not_the_projection(model, site)
        no_edit, no_fused = no_edit or blocks[kind], no_fused or blocks[kind]
    if mode != "fused" and not no_edit and not switched:
        return _edited(PATHS[edit], model, site, asked)
    owner = None
    if mode != "fused" and not no_edit:
        no_edit = why_not_switched(_owner(model, site))
        owner = None if no_edit else _owner(model, site)
    if no_fused is None and projection in fused:
        if mode == "fused":
            return Choice(Columns, module, "its projection is fused with another site already")
        no_fused = "fused already"
    limit = launch.MOST_TOKENS
    if no_fused is None and mode == "auto":
        limit = measured_limit(projection, site.side == "input", bool(at_run_time))
        no_fused = None if limit else "not measured to be faster here"
    if mode in ("auto", "fused") and no_fused is None and projection is not None:
        fused.add(projection)
        where = asked or (SWITCHED if owner else f"no {edit}: {no_edit}")
        when = "" if asked else "under CUDA graphs "
        reason = f"{where}; fused {when}up to {limit} tokens, else columns"
        return Choice(Fused, projection, reason, limit, owner=owner)
    if owner is not None:
        return Choice(Columns, module, f"{SWITCHED}; else columns", owner=owner)
    if mode != "auto":
        raise SteeringError(
            f"mode {mode!r} is not possible at site {site.name!r} of layer {site.layer} ({site.path}): "
            f"{no_fused if mode == 'fused' else no_edit}. Use mode='auto' or 'columns'"
        )
    return Choice(Columns, module, f"no {edit}: {no_edit}; no fused: {no_fused}")


def _edited(path: type[Path], model: nn.Module, site: Site, asked: str) -> Choice:
    """The choice of a path that runs nothing."""
    if path is Bias:
        return Choice(Bias, _owner(model, site), asked)
    parts = tuple(model.get_submodule(part) for part in site.parts)
    return Choice(Fold, model.get_submodule(site.path), asked, parts=parts)


def _owner(model: nn.Module, site: Site) -> nn.Module:
    """The module whose bias shifts a site."""
    owner = bias_owner(model.get_submodule(str(site.bias)), site.side)
    assert isinstance(owner, nn.Module)  # why_not_bias refuses all else
    return owner


def measured_limit(projection: nn.Module | None, at_input: bool, rows: bool) -> int:
    """Up to how many tokens the fused kernel is faster on this device; 0 where nobody has measured it.

    Args:
        rows: whether each token has a row of the strength tables.
    """
    if not isinstance(projection, nn.Linear) or projection.weight.device.type != "cuda":
        return 0
    weight = projection.weight
    return launch.fused_up_to(*weight.shape, weight.dtype, weight.device, at_input=at_input, rows=rows)


def make_path(
    choice: Choice,
    model: nn.Module,
    site: Site,
    tables: Sequence[Table],
    routing: Routing | None,
    check: bool,
    always: bool,
) -> Path:
    """The chosen path, not yet attached.

    Args:
        always: run the fused kernel outside captured graphs, too.
    """
    if choice.path is Fold:
        return Fold(site, tables[0], choice.parts)
    if choice.path is Bias:
        return _bias(model, site, tables[0], choice.module)
    edit = None if choice.owner is None else _bias(model, site, tables[0], choice.owner)
    if choice.path is Fused:
        return Fused(site, tables, choice.module, routing, check, edit=edit, limit=choice.limit, always=always)
    if choice.path is Columns:
        return Columns(site, tables, choice.module, routing, check, edit=edit)
    return Dense(site, tables, choice.module, routing, check)


def _bias(model: nn.Module, site: Site, table: Table, module: nn.Module) -> Bias:
    found = sizes(module)
    assert found is not None and isinstance(table, StrengthTable)  # a linear layer, and a shift
    return Bias(site, table, module, bias_like(model, module, found[1]))


def plan_paths(
    model: nn.Module,
    plans: Sequence[Plan],
    sites: Mapping[str, list[Site]],
    mode: str,
    at_run_time: str,
    switched: bool,
    routing: Routing | None,
    check: bool,
) -> tuple[list[Path], list[str]]:
    """A path for each site and layer of the plans that this process holds, and why not a cheaper one.

    Args:
        at_run_time, switched: see ``choose``. check: compare one site of each path with the formula.

    Raises:
        SteeringError: ``mode`` is not possible at a site.
    """
    paths: list[Path] = []
    reasons: list[str] = []
    sharing, default = Sharing(model), input_device(model)
    fused: set[nn.Module] = set()
    blocks: dict[tuple[type, type, bool], str | None] = {}
    for (name, layer), entries in units_by_layer(plans, sites).items():
        site = site_at(sites[name], layer)
        mine = held(model, site)
        mine = range(site.width) if mine is None else mine  # it may be an empty one
        if len(mine) < site.width:
            _expect_whole(site, entries)
        groups = groups_of(entries, mine)
        if not groups:
            continue  # other processes have these
        choice = choose(mode, model, site, groups, sharing, at_run_time, switched, fused, blocks)
        device = _device_of(choice.module, default)
        forms, dense = issubclass(choice.path, Columns), choice.path in (Fused, Dense)  # some bytes a dimension each
        tables = [table_of(group, len(plans), len(mine), device, forms, dense) for group in groups]
        first = check and not any(type(path) is choice.path for path in paths)
        paths.append(make_path(choice, model, site, tables, routing, first, mode == "fused"))
        reasons.append(choice.reason)
    return paths, reasons


def _expect_whole(site: Site, entries: Sequence[LayerUnits]) -> None:
    """Raises SteeringError where a direction's sum would be over AUs that other processes have."""
    if any(entry.operation == "ablate" for entry in entries):
        raise SteeringError(
            f"site {site.name!r} of layer {site.layer} ({site.path}): found AUs that are split over processes (tensor "
            "parallelism), and 'ablate', which takes a sum over all of them; expected a site that each process has as "
            "a whole: ablate at 'ffn' or 'layer', fold it into a checkpoint (austeer export checkpoint), or load the "
            "model in one piece"
        )


def _device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Where a module's activations are expected: with its weights, unless those are offloaded."""
    device = next((p.device for p in module.parameters()), default)
    return default if device.type == "meta" else device
