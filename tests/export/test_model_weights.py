"""Weights one at a time, of a model in memory and of its checkpoint."""

import copy
import json
import re

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import austeer
from austeer.errors import ModelError
from austeer.export.edits import ExportError, edits_of
from austeer.export.model_weights import INDEX, LoadedWeights, StoredWeights, weights_of_model
from austeer.models.demo_model import DEMO_ID
from austeer.models.sites import find_sites
from dense_formula import random_plan
from tiny_models import tiny_model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edited_parameters(network):
    """Names of the weights and biases that plans at every weight site would edit."""
    sites = [site for site in find_sites(network) if site != "layer"]
    for edit in edits_of(network, [(random_plan(network, sites, 30), 1.0)]):
        names = edit.weights
        yield f"{edit.path}.{names.weight}"
        if names.bias and getattr(network.get_submodule(edit.path), names.bias) is not None:
            yield f"{edit.path}.{names.bias}"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_a_checkpoint_has_apart_are_put_in_order(family, tmp_path):
    model = tiny_model(family, **({"num_local_experts": 12} if family == "mixtral" else {}))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    stored = StoredWeights(tmp_path)
    apart = [pieces for pieces in stored.pieces.values() if pieces[0].expert is not None]
    assert apart and any(".experts.0." in key for key in stored.keys)
    for pieces in apart:
        assert [piece.expert for piece in pieces] == list(range(len(pieces)))
    names = list(edited_parameters(model))
    assert (tmp_path / INDEX).is_file() and any(name.endswith("experts.down_proj") for name in names)
    with stored.opened():
        assert all(torch.equal(stored.get(name), model.get_parameter(name)) for name in names)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_model_gives_its_weights(offload, model, tmp_path):
    away = copy.deepcopy(model)
    cpu_offload(away, "cpu") if offload == "cpu" else disk_offload(away, tmp_path, "cpu")
    name = "model.layers.1.mlp.down_proj.weight"
    assert away.get_parameter(name).device.type == "meta"
    assert torch.equal(LoadedWeights(away).get(name), model.get_parameter(name))
    assert away.get_parameter(name).device.type == "meta"


def test_the_model_inside_wrappers_gives_its_weights(model):
    inner = copy.deepcopy(model)
    name = "model.layers.1.mlp.down_proj.weight"
    wrapped = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"], r=2))
    for outer in (wrapped, torch.compile(copy.deepcopy(model))):
        weights = weights_of_model(outer)
        assert torch.equal(weights.get(name), model.get_parameter(name))
        assert not weights.get(name).requires_grad


def test_the_demo_has_its_name(demo):
    weights = weights_of_model("demo")
    name = "model.layers.7.self_attn.o_proj.weight"
    assert weights.name == DEMO_ID == LoadedWeights(demo[0]).name
    assert torch.equal(weights.get(name), demo[0].get_parameter(name))


def test_a_checkpoint_of_the_model_without_its_head(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    stored = StoredWeights(tmp_path)
    assert name.removeprefix("model.") in stored.keys
    assert torch.equal(stored.get(name), model.get_parameter(name))


def test_a_bias_may_be_missing(model):
    weights = LoadedWeights(model)
    assert weights.optional("model.layers.0.mlp.down_proj.bias") is None
    assert weights.optional(None) is None
    assert weights.optional("model.layers.0.mlp.down_proj.weight") is not None


def test_weights_of_a_closed_checkpoint_can_be_read_again(folder, model):
    stored = StoredWeights(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    with stored.opened():
        first = stored.get(name)
    assert torch.equal(first, stored.get(name)) and torch.equal(first, model.get_parameter(name))


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_steered_model_is_refused(model):
    model = copy.deepcopy(model)
    with (
        austeer.steer(model, random_plan(model, "ffn", 3), alpha=2),
        pytest.raises(ExportError, match="steered"),
    ):
        weights_of_model(model)


@pytest.mark.parametrize("live", [True, False])
def test_a_quantised_model_is_refused_with_what_to_do(live, model, folder):
    config = BitsAndBytesConfig(load_in_4bit=True)
    if live:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    else:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | {"quantization_config": config.to_dict()}))
        model = folder
    with pytest.raises(ExportError, match="bitsandbytes"):
        weights_of_model(model)


def change(folder, name, by):
    """A checkpoint of which one tensor is another one, or (None) missing."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = by(tensors[name])
    save_file({key: t for key, t in tensors.items() if t is not None}, folder / "model.safetensors")


def test_integer_weights_are_refused(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    change(folder, name, lambda t: t.to(torch.int8))
    with pytest.raises(ExportError, match=f"{name}.*torch.int8.*torch.float64"):
        StoredWeights(folder).get(name)


def test_a_missing_tensor_is_named(folder):
    name = "model.layers.2.self_attn.o_proj.weight"
    change(folder, name, lambda t: None)
    with pytest.raises(ExportError, match=f"no tensor for {name}"):
        StoredWeights(folder).get(name)


@pytest.mark.parametrize("shape", [(32, 5), (32, 60), (48, 32), (32,)])
def test_a_tensor_of_another_shape_is_refused(shape, folder):
    """Its rows and columns would be those of other AUs, or none."""
    name = "model.layers.1.self_attn.o_proj.weight"
    change(folder, name, lambda t: torch.zeros(shape))
    with pytest.raises(ExportError, match=rf"{name}.*{re.escape(str(list(shape)))}.*\[32, 48\]"):
        StoredWeights(folder).get(name)


def test_a_missing_expert_is_noticed(tmp_path):
    """The experts behind it would each take the place of the one before."""
    tiny_model("mixtral").save_pretrained(tmp_path)
    change(tmp_path, "model.layers.0.block_sparse_moe.experts.1.w2.weight", lambda t: None)
    stored = StoredWeights(tmp_path)
    with pytest.raises(ExportError, match=r" 3 experts.*model\.layers\.0\..* 4"):
        stored.get("model.layers.0.mlp.experts.down_proj")
    assert len(stored.get("model.layers.1.mlp.experts.down_proj")) == 4


@pytest.mark.parametrize("damage", ["truncated", "text", "index", "none"])
def test_damaged_files_are_refused(damage, folder):
    file = folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("not safetensors")
    elif damage == "index":
        (folder / INDEX).write_text('{"weight_map": ["a"]}')
    else:
        file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match=f"{folder}.*{'neither model' if damage == 'none' else ''}.*safetensors"):
        StoredWeights(folder)


def test_two_forms_of_the_weights_are_refused(folder):
    """Transformers would read the one file, and others the files of the index."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ExportError, match=r"model\.safetensors .*model\.safetensors\.index\.json"):
        StoredWeights(folder)


def test_code_that_comes_with_a_model_is_not_run_nor_asked_about(folder):
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "configuration_other.Other", "AutoModelForCausalLM": "modeling_other.Other"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "other", "auto_map": auto}))
    (folder / "configuration_other.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ModelError, match=f"{folder}.*config"):
        StoredWeights(folder)


def test_a_file_that_vanishes_is_named(folder):
    stored = StoredWeights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=rf"{folder}.*model\.layers\.0\.mlp"):
        stored.get("model.layers.0.mlp.down_proj.weight")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"model.*int"):
        weights_of_model(3)
    with pytest.raises(ModelError, match=f"{tmp_path}.*config"):
        weights_of_model(tmp_path)
