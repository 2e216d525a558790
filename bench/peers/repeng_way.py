"""Steering through repeng: ``ControlModel`` wraps the planned decoder layers, an operator of ours does the scaling.

repeng adds a vector to what a decoder layer returns, and takes another operator in the addition's place; x + gamma * x
is one. It controls the outputs of decoder layers and nothing else, so ``layer`` is the one site it has. It computes the
norm of the hidden states and a mask of the padding at every call, whether or not they are needed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from austeer import Plan

from ..plain_ways import dense, strengths
from ..steered import Steered, UnavailableError, Way
from .packages import COMMAND, missing

PIP = "--no-deps repeng"  # it asks for NumPy 1


class Repeng(Steered):
    """``repeng.ControlModel`` with the operator x + gamma * x at each layer that has AUs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        control = _control()
        super().__init__(model)
        if plan.sites != ("layer",):
            raise UnavailableError(
                f"repeng: found the site {', '.join(plan.sites)}, expected layer; it controls what decoder layers "
                "return and nothing inside them"
            )
        gammas = {
            site.layer: dense(site, index, gamma, model.dtype)  # type: ignore[arg-type]
            for site, index, gamma in strengths(model, plan, alpha)
            if len(index)
        }
        try:
            self.repeng = control.ControlModel(model, list(gammas))
        except (AttributeError, ValueError) as error:
            raise UnavailableError(f"repeng finds no decoder layers in {type(model).__name__}: {error}") from error
        self.repeng.set_raw_control(gammas, operator=lambda x, gamma: x.addcmul_(x, gamma))

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        return self.repeng.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    def logits(self, ids: Tensor) -> Tensor:
        # It wants a position of its own for every row.
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.repeng(input_ids=ids, position_ids=positions, use_cache=False).logits

    def close(self) -> None:
        self.repeng.unwrap()


def _control() -> ModuleType:
    """repeng's control module by itself.

    The package as a whole cannot be imported with NumPy 2: its class for trained vectors, which is not needed here,
    names a type in its annotations that NumPy 2 has not. Steering is in a file that does not use NumPy.
    """
    spec = importlib.util.find_spec("repeng")
    if spec is None or not spec.submodule_search_locations:
        raise missing("repeng", PIP)
    control = importlib.util.spec_from_file_location(
        "repeng_control", Path(spec.submodule_search_locations[0]) / "control.py"
    )
    assert control is not None and control.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(control)
    try:
        control.loader.exec_module(module)
    except Exception as error:  # other people's package may fail in any way
        raise UnavailableError(
            f"repeng cannot be imported here: {type(error).__name__}: {error}; "
            f"install the version that was measured: {COMMAND} {PIP}"
        ) from error
    return module


WAY = Way("repeng", Repeng, peer=True, module=False)
