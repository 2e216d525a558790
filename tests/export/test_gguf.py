"""GGUF files for llama.cpp: read back, put onto the weights, and compared with folded weights or the formula."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

import austeer
from austeer.errors import PlanError
from austeer.export.edits import ExportError, ExportWarning
from austeer.export.gguf import export_gguf
from austeer.export.gguf_file import ARCHITECTURES
from austeer.models.demo_model import DEMO_ID
from austeer.models.families import LAYOUTS
from austeer.models.linear import weights_of
from austeer.models.sites import find_sites
from austeer.models.skeleton import load_config, skeleton
from austeer.models.structure import text_config
from dense_formula import formula_logits, logits, random_plan
from tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::austeer.export.edits.ExportWarning")

BATCH = {"input_ids": torch.tensor([[3, 1, 40, 22, 9], [7, 7, 12, 50, 2]])}

#: Where llama.cpp calls each kind of weight so, whatever the family.
NAMES = {"attention": "attn_output", "ffn": "ffn_down", "neuron": "ffn_down"}


def read(file):
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


def added(fields, tensors, name):
    """What llama.cpp adds to a weight, by its own rule for the scale."""
    a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
    assert a.shape[-2] == b.shape[-1]
    return b @ a * (fields["adapter.lora.alpha"] / b.shape[-1])


def of_model(family):
    return text_config(tiny_model(family)).model_type


# --- LoRA adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "family"),
    [*(("scale", f) for f in FAMILIES if of_model(f) in ARCHITECTURES), ("ablate", "llama"), ("ablate", "mixtral")],
)
def test_an_adapter_makes_the_folded_weights(operation, family, tmp_path):
    # llama.cpp's Qwen mixtures have no dense layers among them.
    model = tiny_model(family, **({"mlp_only_layers": []} if family in ("qwen2_moe", "qwen3_moe") else {}))
    model.save_pretrained(tmp_path / "base")
    for site in NAMES.keys() & find_sites(model).keys():
        plan, file = random_plan(model, site, 40, operation), tmp_path / f"{site}.gguf"
        biased = any(
            site == "ffn"
            and getattr(model.get_submodule(part), weights_of(model.get_submodule(part)).bias or "", None) is not None
            for where in find_sites(model)[site]
            for part in where.parts
        )
        if biased or (family == "granitemoe" and site == "ffn"):
            with pytest.raises(ExportError, match=r"'ffn'.*bias|experts.*'granitemoe'.*weight"):
                export_gguf(plan, tmp_path / "base", file, alpha=1.5)
            assert not file.exists()
            continue
        export_gguf(plan, tmp_path / "base", file, alpha=1.5)
        fields, tensors = read(file)
        assert fields["general.architecture"] == ARCHITECTURES[text_config(model).model_type]
        assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
        with austeer.steer(model, plan, 1.5, mode="fold"):
            folded = {name: p.detach().clone() for name, p in model.named_parameters()}
        names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
        for where in find_sites(model)[site]:
            for part in where.parts:
                module = model.get_submodule(part)
                weights = weights_of(module)
                kind = NAMES[site]
                if weights.weight == "down_proj":
                    kind = "ffn_down_exps"
                elif "shared" in part:
                    kind = "ffn_down_shexp"
                name = f"blk.{where.layer}.{kind}.weight"
                change = folded[f"{part}.{weights.weight}"] - getattr(module, weights.weight)
                if not change.any():
                    assert name not in names
                    continue
                names.remove(name)
                found = added(fields, tensors, name)
                found = found.mT if weights.output > weights.input else found
                torch.testing.assert_close(found.float(), change.detach(), rtol=1e-4, atol=1e-5)
        assert not names


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_file(dtype, tmp_path):
    model = tiny_model("llama")
    a, b = random_plan(model, ["attention", "ffn"], 20), random_plan(model, "ffn", 20, seed=1)
    c = random_plan(model, ["attention", "ffn"], 30, "ablate", seed=2)
    file = export_gguf([(a, 2.0), b, c], model, tmp_path / "new" / "a.gguf", alpha=-1, dtype=dtype)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.gguf"]
    fields, tensors = read(file)
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    plans = json.loads(fields["austeer.plans"])
    assert [(p["digest"], p["alpha"]) for p in plans] == [(a.digest, 2.0), (b.digest, -1.0), (c.digest, -1.0)]
    ranks = {t.shape[0] for name, t in tensors.items() if name.endswith("lora_a")}
    assert ranks == {int(fields["adapter.lora.alpha"])}  # one for all: a reader that knows one factor is right, too
    places = Counter((site, layer) for site, layer, _ in {*a.keys(), *b.keys()})
    places += Counter({(unit.site, unit.layer) for unit in c})
    assert ranks == {max(places.values())}  # and no larger than it has to be


def test_a_vision_tower_beside_it(tmp_path):
    model = tiny_model("qwen2_vl")
    _, tensors = read(export_gguf(random_plan(model, "attention", 60), model, tmp_path / "a.gguf"))
    assert {name.rpartition(".")[0] for name in tensors} == {f"blk.{n}.attn_output.weight" for n in range(3)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt"])
def test_a_model_without_its_head(family, tmp_path):
    model = tiny_model(family)
    plan = random_plan(model, "attention", 20)
    _, whole = read(export_gguf(plan, model, tmp_path / "a.gguf"))
    _, bare = read(export_gguf(plan, model.base_model, tmp_path / "b.gguf"))
    assert whole.keys() == bare.keys() and all(torch.equal(whole[name], bare[name]) for name in whole)


# --- control vectors -------------------------------------------------------------------------------------------------


def shifted(model, site, count=40, seed=0):
    """A plan without layer 0, which has no control vector."""
    plan = random_plan(model, site, count, "shift", seed)
    return plan.take((plan.layer > 0).nonzero()[:, 0])


@torch.no_grad()
def with_directions(model, tensors):
    """llama.cpp's rule: direction N is added to the output of layer N, counted from 0."""
    handles = []
    for site in find_sites(model)["layer"]:
        if f"direction.{site.layer}" in tensors:
            vector = tensors[f"direction.{site.layer}"]
            handles.append(
                model.get_submodule(site.path).register_forward_hook(
                    lambda m, args, out, v=vector: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
                )
            )
    found = model(**BATCH).logits
    for handle in handles:
        handle.remove()
    return found


def reweighted(family):
    """A model in which what could stand between an MLP's output and its layer's does something."""
    model = tiny_model(family)
    for config in (model.config, text_config(model)):
        if hasattr(config, "residual_multiplier"):
            return tiny_model(family, residual_multiplier=0.5)
    return model


#: Families with a norm behind the MLP.
NORMED = ("exaone4", "gemma2", "gemma3_text", "glm4", "olmo2")


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_a_shift_is_a_control_vector(family, tmp_path):
    model = reweighted(family)
    for site in ("layer", "ffn") if family in ("llama", "gpt2") else ("ffn",):
        plan = shifted(model, site)
        file = tmp_path / f"{site}.gguf"
        if site == "ffn" and family in NORMED:
            with pytest.raises(ExportError, match=r"'ffn'.*MLP"):
                export_gguf(plan, model, file)
            moved = replace(plan, site=("layer",) * len(plan), model=replace(plan.model, widths={"layer": 32}))
            one, other = (formula_logits(model, BATCH, p, 1.0) for p in (plan, moved))
            assert (one - other).abs().max() > 0.02  # refused with reason
            continue
        export_gguf(plan, model, file, alpha=1.5)
        fields, tensors = read(file)
        assert fields["general.architecture"] == "controlvector"
        wanted = formula_logits(model, BATCH, plan, 1.5)
        effect = (wanted - logits(model, BATCH)).abs().max()
        assert effect > 0.02
        assert (with_directions(model, tensors) - wanted).abs().max() < 1e-5 * max(1, effect)


def test_a_sum_of_plans_as_a_control_vector(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path / "base")  # no weights are needed
    a, b = shifted(model, "layer"), shifted(model, "ffn", seed=1)
    file = export_gguf([(a, 2.0), (b, -1.0)], tmp_path / "base", tmp_path / "a.gguf")
    fields, tensors = read(file)  # the names that llama.cpp and repeng look for
    assert fields["controlvector.model_hint"] == "llama" and fields["controlvector.layer_count"] == 2
    assert tensors.keys() == {"direction.1", "direction.2"}
    for layer in (1, 2):
        wanted = torch.zeros(32, dtype=torch.float64)
        for plan, alpha in ((a, 2.0), (b, -1.0)):
            rows = plan.layer == layer
            wanted[plan.index[rows].long()] += alpha * plan.delta[rows].double()
        torch.testing.assert_close(tensors[f"direction.{layer}"], wanted.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("error::austeer.export.edits.ExportWarning")
def test_the_demo_model_has_its_own_name(tmp_path):
    plan = shifted(skeleton(load_config("demo"), torch.float32), "layer")
    fields, _ = read(export_gguf(plan, "demo", tmp_path / "a.gguf"))
    assert fields["austeer.model"] == DEMO_ID


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path, monkeypatch):
    model = tiny_model("llama")
    scale, shift = random_plan(model, "ffn", 5), shifted(model, "ffn")
    for plans, options, message in (
        ([scale, shift], {}, "'scale'.*'shift'"),
        (random_plan(model, "ffn", 5, "push"), {}, "'push'"),
        (random_plan(model, "layer", 5), {}, "site 'layer'"),
        (shifted(model, "attention"), {}, "site 'attention'.*control vector"),
        (shifted(model, "neuron"), {}, "site 'neuron'.*control vector"),
        (random_plan(model, "layer", 60, "shift"), {}, "layer 0"),
        (scale, {"dtype": "bfloat16"}, "dtype.*'bfloat16'.*float32.*float16"),
        (scale, {"alpha": 1e6, "dtype": "float16"}, "torch.float16"),
        (shift, {"alpha": 1e39}, r"alpha.*1e\+39"),
        (scale, {"architecture": "nonesuch"}, "'nonesuch'.*gguf"),
        (scale, {"architecture": "mamba"}, "'mamba'.*weight"),
    ):
        with pytest.raises((ExportError, PlanError), match=message):
            export_gguf(plans, model, tmp_path / "a.gguf", **options)
    other = tiny_model("opt")
    with pytest.raises(ExportError, match="'opt'"):
        export_gguf(random_plan(other, "attention", 5), other, tmp_path / "a.gguf")
    other = tiny_model("opt", do_layer_norm_before=False)  # as OPT-350m: a norm behind the residual
    with pytest.raises(ExportError, match=r"'ffn'.*'opt'.*MLP"):
        export_gguf(shifted(other, "ffn"), other, tmp_path / "a.gguf")
    with pytest.raises(PlanError, match=r"qwen2.*llama"):
        export_gguf(shifted(tiny_model("qwen2"), "layer"), model, tmp_path / "a.gguf")
    assert not any(tmp_path.iterdir())
    export_gguf(scale, model, tmp_path / "a.gguf")
    before = (tmp_path / "a.gguf").read_bytes()
    with pytest.raises(ExportError, match=r"a.gguf: exists"):
        export_gguf(shift, model, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == before
    export_gguf(shift, model, tmp_path / "a.gguf", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    for plan in (scale, shift):
        with pytest.raises(ExportError, match=f"{tmp_path}.*folder"):
            export_gguf(plan, model, tmp_path, force=True)
        with pytest.raises(ExportError, match=r"model.gguf.*austeer"):
            export_gguf(plan, model, tmp_path / "model.gguf", force=True)
        export_gguf(plan, model, tmp_path / "a.gguf", force=True)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
        for plan in (scale, shift):
            with pytest.raises(ExportError, match=r"b.gguf.* MB"):
                export_gguf(plan, model, tmp_path / "b.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"austeer\[gguf\]"):
        export_gguf(scale, model, tmp_path / "b.gguf")


@pytest.mark.parametrize("operation", ["scale", "shift"])
@pytest.mark.filterwarnings("default::austeer.export.edits.ExportWarning")
def test_a_plan_of_another_model_is_warned_of(operation, tmp_path, recwarn):
    model = tiny_model("llama")
    model.config._name_or_path = "someone/tiny"
    plan = shifted(model, "ffn").with_operation(operation)
    for number, (name, warns) in enumerate((("tiny", False), ("other", True))):
        recwarn.clear()
        export_gguf(replace(plan, model=replace(plan.model, name=name)), model, tmp_path / f"{number}.gguf")
        found = [str(w.message) for w in recwarn if w.category is ExportWarning]
        assert [bool(re.search("other.*someone/tiny", text)) for text in found] == [True] * warns


def test_another_name_of_the_architecture(tmp_path):
    model = tiny_model("mistral")
    fields, tensors = read(export_gguf(random_plan(model, "ffn", 9), model, tmp_path / "a", architecture="mistral3"))
    assert fields["general.architecture"] == "mistral3" and all("ffn_down.weight" in name for name in tensors)
