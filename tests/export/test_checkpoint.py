"""Folded checkpoints: their logits in every family, what is written, linked and refused."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import austeer
from austeer.export.checkpoint import export_checkpoint
from austeer.export.edits import ExportWarning
from austeer.export.model_weights import INDEX
from austeer.models.sites import find_sites, layers_path
from dense_formula import assert_unchanged, logits, random_plan, snapshot
from tiny_checkpoints import BATCH, assert_steered, expected, folding_sites, loaded, record, saved, tensors_of
from tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::austeer.export.edits.ExportWarning")


# --- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "family"),
    [*(("scale", family) for family in FAMILIES), *(("ablate", family) for family in ("llama", "gpt2", "mixtral"))],
)
def test_scale_and_ablate_at_all_sites_at_once(operation, family, tmp_path):
    model = tiny_model(family)
    names = enumerate(folding_sites(model))
    pairs = [(random_plan(model, name, 40, operation, seed=i), 0.5 + i) for i, name in names]
    out = export_checkpoint(pairs, saved(model, tmp_path / "base"), tmp_path / "out")
    assert_steered(model, logits(loaded(out, model), BATCH), expected(model, *pairs))


@pytest.mark.parametrize("operation", ["scale", "shift"])
def test_both_sides_of_one_projection_are_rounded_once(operation, tmp_path):
    model = tiny_model("starcoder2", residual_dropout=0.0).bfloat16()
    pairs = [(random_plan(model, "neuron", 60, operation), 1.5), (random_plan(model, "ffn", 60, "scale", seed=1), 2.0)]
    out = export_checkpoint(pairs, saved(model, tmp_path / "base"), tmp_path / "out")
    got = load_file(out / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        weight, bias = layer.mlp.c_proj.weight.double(), layer.mlp.c_proj.bias.double()
        eta, shift, gamma = torch.zeros(48).double(), torch.zeros(48).double(), torch.zeros(32).double()
        for into, (plan, alpha), values in (
            (shift if operation == "shift" else eta, pairs[0], "delta" if operation == "shift" else "beta"),
            (gamma, pairs[1], "beta"),
        ):
            rows = plan.layer == number
            into[plan.index[rows].long()] = (torch.tensor(alpha) * getattr(plan, values)[rows]).double()
        wanted = (1 + gamma[:, None]) * weight * (1 + eta)
        wanted_bias = (1 + gamma) * (bias + weight @ shift)
        path = f"model.layers.{number}.mlp.c_proj"
        assert torch.equal(got[f"{path}.weight"], wanted.bfloat16())
        torch.testing.assert_close(got[f"{path}.bias"], wanted_bias.bfloat16(), rtol=2**-8, atol=1e-12)


# --- dtypes, shards, sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("operation", ["scale", "ablate", "shift"])
@torch.no_grad()
def test_names_dtypes_and_all_other_tensors_stay(dtype, sharded, operation, tmp_path):
    model = tiny_model("llama").to(dtype)
    base = saved(model, tmp_path / "base", max_shard_size="20KB" if sharded else "5GB")
    plan = random_plan(model, ["attention", "ffn"], 12, operation)
    plan = plan.take((plan.layer < 2).nonzero()[:, 0])
    out = export_checkpoint(plan, base, tmp_path / "out", alpha=1.5)
    files = sorted(file.name for file in base.glob("*.safetensors"))
    assert (len(files) > 3) == sharded
    before, after = tensors_of(base), tensors_of(out)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    added = after.keys() - before.keys()
    edited = {site.projection for name in plan.sites for site in find_sites(model)[name] if site.layer < 2}
    if operation != "shift":
        assert changed <= {f"{path}.weight" for path in edited} and changed and not added
    else:
        assert not changed and len(added) == 3 * 7  # q, k, v, o, gate, up, down of every layer
        assert {k for k in added if after[k].any()} <= {f"{path}.bias" for path in edited}
    assert {t.dtype for t in after.values()} == {dtype}
    steered = copy.deepcopy(model)  # folded by the library itself
    if operation != "shift":
        with austeer.steer(steered, plan, 1.5, mode="fold"):
            folded = steered.state_dict()
            for key in changed:
                least = 0 if operation == "scale" else 1e-7  # what a sum leaves may be small beside what rounds in it
                torch.testing.assert_close(after[key], folded[key], rtol=2 * torch.finfo(dtype).eps, atol=least)
    for name in files:
        one, other = base / name, out / name
        touched = any(before_key in load_file(one) for before_key in changed) or (added and not sharded)
        assert (one.stat().st_ino == other.stat().st_ino) == (not touched), name
    if sharded:
        index, old = (json.loads((folder / INDEX).read_text()) for folder in (out, base))
        assert index["weight_map"].keys() == after.keys()
        assert all(key in load_file(out / file) for key, file in index["weight_map"].items())
        more = sum(after[key].nbytes for key in added)
        assert index["metadata"]["total_size"] == old["metadata"]["total_size"] + more
        more //= dtype.itemsize
        assert index["metadata"]["total_parameters"] == old["metadata"]["total_parameters"] + more
    assert loaded(out, model, dtype).dtype == dtype


@pytest.mark.parametrize("link", [False, True])
def test_files_that_cannot_or_should_not_be_linked_are_copied(link, tmp_path, monkeypatch):
    model = tiny_model("llama")
    base = saved(model, tmp_path / "base", max_shard_size="20KB")

    def refuse(self, target):
        raise OSError(18, "Invalid cross-device link")

    if link:
        monkeypatch.setattr(type(tmp_path), "hardlink_to", refuse)
    plan = random_plan(model, "ffn", 1)
    out = export_checkpoint(plan, base, tmp_path / "out", link=link)
    assert_steered(model, logits(loaded(out, model), BATCH), expected(model, (plan, 1.0)))
    assert {file.stat().st_nlink for file in (*base.glob("*.safetensors"), *out.iterdir())} == {1}


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    model = tiny_model("llama")
    blobs, snapshot_ = tmp_path / "blobs", tmp_path / "snapshots" / ("0123456789" * 4)
    saved(model, blobs, max_shard_size="20KB")
    snapshot_.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot_ / file.name).symlink_to(file)
    plan = random_plan(model, "attention", 2)
    out = export_checkpoint(plan, snapshot_, tmp_path / "out")
    assert not any(file.is_symlink() for file in out.iterdir())
    assert any(file.stat().st_ino == (blobs / file.name).stat().st_ino for file in out.glob("*.safetensors"))
    assert record(out)["revision"] == "0123456789" * 4
    assert_steered(model, logits(loaded(out, model), BATCH), expected(model, (plan, 1.0)))


def test_sums_of_plans_with_their_own_alphas(tmp_path):
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    a, b = random_plan(model, "ffn", 50), random_plan(model, "ffn", 50, seed=1)
    c = random_plan(model, "attention", 30, "shift", seed=2)
    assert set(a.keys()) & set(b.keys())
    beta = {}
    for plan, alpha in ((a, 2.0), (b, -1.0)):
        for key, value in zip(plan.keys(), plan.beta.tolist()):
            beta[key] = beta.get(key, 0) + alpha * value / 4
    layer, index = (torch.tensor([key[i] for key in beta], dtype=torch.int32) for i in (1, 2))
    both = replace(
        a, site=("ffn",) * len(beta), layer=layer, index=index, beta=torch.tensor([*beta.values()]), delta=layer.float()
    )
    out = export_checkpoint([(a, 2.0), (b, -1.0), c], saved(model, tmp_path / "base"), tmp_path / "out", alpha=0.6)
    assert_steered(model, logits(loaded(out, model), BATCH), expected(model, (both, 4.0), (c, 0.6)))
    assert [(p["alpha"], p["digest"]) for p in record(out)["plans"]] == [
        (2.0, a.digest),
        (-1.0, b.digest),
        (0.6, c.digest),
    ]
    scales = a + c.with_operation("scale")
    out = export_checkpoint(scales, tmp_path / "base", tmp_path / "each", alpha={"ffn": 2.0, "attention": 0.6})
    wanted = expected(model, (a, 2.0), (c.with_operation("scale"), 0.6))
    assert_steered(model, logits(loaded(out, model), BATCH), wanted)


# --- what goes along -------------------------------------------------------------------------------------------------


def test_what_goes_along_and_what_does_not(tmp_path):
    model = tiny_model("llama")
    base = saved(model, tmp_path / "base")
    along = [
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "x.tiktoken"),
        *("chat_template.jinja", "modeling_x.py", "LICENSE", "NOTICE"),
    ]
    left = [
        *("README.md", "adapter_config.json", "params.json", "other.index.json"),
        *("consolidated.safetensors", "pytorch_model.bin", "a.gguf"),
    ]
    for name in along + left:
        (base / name).write_text(f'{{"{name}": 1}}')
    templates = "additional_chat_templates"
    (base / templates).mkdir()
    (base / templates / "rag.jinja").write_text("1")
    (base / "original").mkdir()
    plan = random_plan(model, "ffn", 10)
    out = export_checkpoint(plan, base, tmp_path / "out")
    own = ["config.json", "generation_config.json", "model.safetensors", "austeer.json"]
    assert sorted(file.name for file in out.iterdir()) == sorted([*along, *own, templates])
    along.append(f"{templates}/rag.jinja")
    for name in [*along, "config.json", "generation_config.json"]:
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_the_record(tmp_path):
    model = tiny_model("llama")
    base = saved(model, tmp_path / "base", max_shard_size="20KB")
    plan = random_plan(model, "attention", 1, "scale")
    out = export_checkpoint(plan, base, tmp_path / "out", alpha=3)
    found = record(out)
    assert found["austeer"] == austeer.__version__ and found["kind"] == "checkpoint"
    assert found["model"] == str(base) and found["revision"] is None
    (one,) = found["plans"]
    assert (one["alpha"], one["digest"], one["operation"]) == (3.0, plan.digest, "scale")
    (name,) = found["rewritten"]
    with safe_open(out / name, framework="pt") as file:
        assert file.metadata()["format"] == "pt" and json.loads(file.metadata()["austeer"]) == found


def test_metadata_that_was_there_stays(tmp_path):
    model = tiny_model("llama")
    base = saved(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", {"format": "pt", "maker": "someone"})
    out = export_checkpoint(random_plan(model, "ffn", 10), base, tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata().keys() == {"format", "maker", "austeer"} and file.metadata()["maker"] == "someone"


def test_a_folded_checkpoint_is_folded_again(tmp_path):
    model = tiny_model("llama")
    a, b, c = (
        random_plan(model, name, 20, op) for name, op in (("attention", "shift"), ("ffn", "shift"), ("ffn", "scale"))
    )
    base = saved(model, tmp_path / "base", max_shard_size="20KB")
    once = export_checkpoint(a, base, tmp_path / "once")
    twice = export_checkpoint(b, once, tmp_path / "twice")
    third = export_checkpoint(c, twice, tmp_path / "third", alpha=0.5)
    assert_steered(model, logits(loaded(third, model), BATCH), expected(model, (a, 1.0), (b, 1.0), (c, 0.5)))
    assert record(third)["base"]["base"]["plans"][0]["digest"] == a.digest and "base" not in record(once)
    assert {"model-biases.safetensors", "model-biases-2.safetensors"} <= {file.name for file in third.iterdir()}
    assert AutoConfig.from_pretrained(third).mlp_bias and AutoConfig.from_pretrained(third).attention_bias


# --- models in memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_a_model_in_memory(family, offloaded, tmp_path):
    model = tiny_model(family)
    plan = random_plan(model, ["attention", "ffn"], 30)
    wanted, given = expected(model, (plan, 1.5)), copy.deepcopy(model)
    if offloaded:
        where = {}
        for path, module in model.named_modules():
            if path.startswith(f"{layers_path(model)}."):
                where.setdefault(".".join(path.split(".")[: layers_path(model).count(".") + 2]), "disk")
            elif not any(module.children()) and any(True for _ in module.parameters()):
                where[path] = "cpu"
        folder = saved(model, tmp_path / "base")
        given = AutoModelForCausalLM.from_pretrained(
            folder, device_map=where, offload_folder=tmp_path / "offloaded", dtype=torch.float32
        )
        assert any(p.device.type == "meta" for p in given.parameters())
    before, there = snapshot(given), sorted(file.name for file in tmp_path.iterdir())
    out = export_checkpoint(plan, given, tmp_path / "out", alpha=1.5)
    assert_steered(model, logits(loaded(out, model), BATCH), wanted)
    assert sorted(file.name for file in tmp_path.iterdir()) == [*there, "out"] and not (out / ".source").exists()
    assert record(out)["model"] == (given.config._name_or_path or type(given).__name__)
    if not offloaded:
        assert_unchanged(given, before)


@pytest.mark.filterwarnings("default::austeer.export.edits.ExportWarning")
def test_a_plan_of_another_model_is_warned_of(tmp_path, recwarn):
    model = tiny_model("llama")
    base = saved(model, tmp_path / "tiny")
    model.config._name_or_path = "someone/tiny"
    plan = random_plan(model, "ffn", 5)
    for name, warns in (("tiny", False), ("other", True)):
        for given, called in ((base, str(base)), (model, "someone/tiny")):
            recwarn.clear()
            export_checkpoint(replace(plan, model=replace(plan.model, name=name)), given, tmp_path / "out", force=True)
            found = [str(w.message) for w in recwarn if w.category is ExportWarning]
            assert [bool(re.search(f"other.*{called}", text)) for text in found] == [True] * warns
