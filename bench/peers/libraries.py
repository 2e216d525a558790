"""Other libraries' ways to steer, each in the form that its own documents recommend. None is imported before use.

pyvene copies what its interventions return back into the original, and puts hooks on and takes them off at every call;
without ``intervene_on_prompt`` and with its default locations it would leave positions out. An edit of nnsight is
written once and replayed in every trace, at every step of a generation. repeng and steering-vectors add a vector to
what a module returns, and take another operator in the addition's place.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from austeer import Plan
from austeer.export import export_lora
from austeer.models.sites import Site, find_sites
from austeer.models.structure import first_tensor

from ..plain_ways import strengths
from ..steered import Steered, UnavailableError, Way

COMMAND = "pip install -c constraints.txt"
#: What the other libraries need at run time and this one does not.
EXTRA = "'.[peers]'"
#: What installs each: the arguments of ``COMMAND``, in the checkout. Some ask for more than they need here.
PIP = {
    "peft": "peft",
    "pyvene": "--no-deps pyvene",
    "nnsight": "--no-deps nnsight",
    "repeng": "--no-deps repeng",
    "steering_vectors": "--no-deps steering-vectors",
}
#: What steering-vectors calls the module whose output is a site.
LAYER_TYPES = {"ffn": "mlp", "layer": "decoder_block"}


def needed(module: str) -> ModuleType:
    """The library, imported.

    Raises:
        UnavailableError: it is not installed, or does not work with the versions that are here.
    """
    try:
        return _repeng() if module == "repeng" else importlib.import_module(module)
    except ModuleNotFoundError as error:
        pip = PIP[module] if error.name == module else EXTRA
        raise UnavailableError(f"{module}: found no module {error.name!r}; install it with: {COMMAND} {pip}") from error
    except Exception as error:  # other people's package may fail in any way
        raise UnavailableError(
            f"{module} cannot be imported here: {type(error).__name__}: {error}; "
            f"install the versions that were measured: {COMMAND} {PIP[module]}"
        ) from error


def _repeng() -> ModuleType:
    """repeng's control module by itself.

    The package as a whole cannot be imported with NumPy 2: its class for trained vectors, which is not needed here,
    names a type in its annotations that NumPy 2 has not. Steering is in a file that does not use NumPy.
    """
    spec = importlib.util.find_spec("repeng")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("repeng", name="repeng")
    control = importlib.util.spec_from_file_location(
        "repeng_control", Path(spec.submodule_search_locations[0]) / "control.py"
    )
    assert control is not None and control.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(control)
    control.loader.exec_module(module)
    return module


@contextmanager
def gradient_flags_kept(model: nn.Module) -> Iterator[None]:
    """Sets ``requires_grad`` as it was, on parameters that other models share."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def gammas(model: nn.Module, plan: Plan, alpha: float) -> list[tuple[Site, Tensor]]:
    """The planned layers' sites, with gamma [width] in float64.

    Raises:
        UnavailableError: the plan has another operation than "scale", the only one that is written out here.
    """
    if plan.operation != "scale":
        raise UnavailableError(
            f"found the operation {plan.operation!r}, expected 'scale': other libraries are compared in the paper's"
        )
    return [(one.site, one.dense(torch.float64)) for one in strengths(model, plan, alpha) if len(one.index)]


class Peft(Steered):
    """``peft.PeftModel`` with a LoRA on the projection of each layer that has AUs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        peft = needed("peft")
        biased = [self._scales_bias(model, site) for site, _ in gammas(model, plan, alpha)]
        with TemporaryDirectory(prefix="austeer-") as folder, gradient_flags_kept(model):
            adapter = export_lora(
                *(plan, model, Path(folder) / "adapter"),
                alpha=alpha,
                rank_pattern=True,
                lora_bias=any(biased),
                progress=False,
            )
            # In another dtype than the model's the adapter would cast at every call.
            super().__init__(peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval())

    @staticmethod
    def _scales_bias(model: nn.Module, site: Site) -> bool:
        """Whether a bias is scaled with the tensor that the one linear layer makes or reads."""
        module = model.get_submodule(site.projection or site.path)
        if site.projection is None or type(module) is not nn.Linear:
            raise UnavailableError(
                f"peft: found {type(module).__name__} at {site.name} of layer {site.layer}, expected a torch.nn.Linear "
                "that alone makes or reads the tensor; a LoRA says nothing else exactly"
            )
        return site.side == "output" and module.bias is not None


class Pyvene(Steered):
    """``pyvene.IntervenableModel`` with an intervention of its own at each layer that has AUs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        pyvene = needed("pyvene")
        super().__init__(model)

        class Scale(pyvene.ConstantSourceIntervention):  # type: ignore[name-defined]
            """Multiplies what it is given, a copy, by a vector [width]."""

            def __init__(self, factor: Tensor):
                super().__init__(keep_last_dim=True)
                self.register_buffer("factor", factor)

            def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Any = None) -> Tensor:
                return base.mul_(self.factor)

        interventions = [
            {"component": f"{site.path}.{site.side}", "intervention": Scale((1 + gamma).to(model.dtype))}  # type: ignore[arg-type]
            for site, gamma in gammas(model, plan, alpha)
        ]
        with gradient_flags_kept(model):
            self.pyvene = pyvene.IntervenableModel(interventions, model=model)

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        base = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self.pyvene.generate(base, unit_locations=None, intervene_on_prompt=True, **options)[1]

    def logits(self, ids: Tensor) -> Tensor:
        return self.pyvene({"input_ids": ids}, unit_locations=None, use_cache=False)[1].logits


class NNsight(Steered):
    """``nnsight.NNsight`` around the model, edited in place at each layer that has AUs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        nnsight = needed("nnsight")
        super().__init__(model)
        # The loop over all steps ends, as nnsight documents, by asking for one that does not come.
        warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step the run did not make")
        self.nnsight = lens = nnsight.NNsight(model)
        planned = [
            (lens.get(site.path), site.side, (1 + gamma).to(model.dtype))  # type: ignore[arg-type]
            for site, gamma in gammas(model, plan, alpha)
        ]
        with lens.edit(inplace=True) as tracer:
            for _ in tracer.iter[:]:
                for module, side, factor in planned:
                    first_tensor(getattr(module, side)).mul_(factor)

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        mask = torch.ones_like(ids)
        return self.nnsight.trace(fn="generate", trace=False, input_ids=ids, attention_mask=mask, **options)

    def logits(self, ids: Tensor) -> Tensor:
        return self.nnsight.trace(trace=False, input_ids=ids, use_cache=False).logits

    def close(self) -> None:
        self.nnsight.clear_edits()


class Repeng(Steered):
    """``repeng.ControlModel`` with the operator x + gamma * x at each layer that has AUs.

    It computes the norm of the hidden states and a mask of the padding at every call, whether or not they are needed.
    """

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        control = needed("repeng")
        super().__init__(model)
        if plan.sites != ("layer",):
            raise UnavailableError(
                f"repeng: found the site {', '.join(plan.sites)}, expected layer; it controls what decoder layers "
                "return and nothing inside them"
            )
        strength = {site.layer: gamma.to(model.dtype) for site, gamma in gammas(model, plan, alpha)}  # type: ignore[arg-type]
        try:
            self.repeng = control.ControlModel(model, list(strength))
        except (AttributeError, ValueError) as error:
            raise UnavailableError(f"repeng finds no decoder layers in {type(model).__name__}: {error}") from error
        self.repeng.set_raw_control(strength, operator=lambda x, gamma: x.addcmul_(x, gamma))

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        return self.repeng.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    def logits(self, ids: Tensor) -> Tensor:
        # It wants a position of its own for every row.
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.repeng(input_ids=ids, position_ids=positions, use_cache=False).logits

    def close(self) -> None:
        self.repeng.unwrap()


class SteeringVectors(Steered):
    """``steering_vectors.SteeringVector``, put on with ``patch_activations``.

    It makes a mask of the positions on the CPU at every call.
    """

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        library = needed("steering_vectors")
        super().__init__(model)
        site = plan.sites[0]
        if plan.sites != (site,) or site not in LAYER_TYPES:
            raise UnavailableError(
                f"steering-vectors: found the site {', '.join(plan.sites)}, expected {' or '.join(LAYER_TYPES)}; it "
                "changes modules' outputs, and no input"
            )
        kind = LAYER_TYPES[site]
        strength = {one.layer: gamma.to(model.dtype) for one, gamma in gammas(model, plan, alpha)}  # type: ignore[arg-type]
        paths = dict(enumerate(one.path for one in find_sites(model, [site])[site]))
        self.handle = library.SteeringVector(layer_activations=strength, layer_type=kind).patch_activations(
            model,
            layer_config={kind: lambda _, layer: paths.get(layer, "")},
            operator=lambda x, gamma: x * gamma,
        )

    def close(self) -> None:
        self.handle.remove()


WAYS = (
    Way("lora", Peft, peer=True),
    Way("pyvene", Pyvene, peer=True, module=False),
    Way("nnsight", NNsight, peer=True, module=False),
    Way("repeng", Repeng, peer=True, module=False),
    Way("steering-vectors", SteeringVectors, peer=True, module=False),
)
