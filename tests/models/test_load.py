"""Loading models by name: the demo's from its cache, others from folders, and one message where that fails."""

import gc
import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from austeer import SiteError, find_sites
from austeer.errors import ModelError
from austeer.models import load as models
from austeer.models.demo_model import DEMO_NAME, demo_model
from austeer.models.load import fits, load_model, load_offloaded
from layer_runs import assert_equal, blocks_of, in_plain_order, layer_by_layer
from tiny_models import ids_of_rows, tiny_model


@pytest.fixture
def saved_of(demo, tmp_path):
    """Saves a model with a tokenizer, and gives the folder."""

    def save(model, **options):
        model.save_pretrained(tmp_path / "model", **options)
        demo[1].save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def saved(tiny, saved_of):
    return saved_of(tiny)


def assert_runs_as(model, offloaded):
    sites, blocks = find_sites(model), blocks_of()
    found, runner = layer_by_layer(offloaded, sites, blocks)
    assert_equal(found, in_plain_order(model, sites, blocks))
    return runner


def test_demo_model_is_what_it_says(demo):
    model, tokenizer = demo
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training and model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.config.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert tokenizer.decode(tokenizer("The soup was good")["input_ids"]) == "The soup was good"
    # It knows English: the weights are the real ones, in their places.
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("variable, below", [("AUSTEER_CACHE", ""), ("XDG_CACHE_HOME", "austeer")])
def test_cached_demo_model_is_not_made_again(tmp_path, monkeypatch, variable, below):
    monkeypatch.delenv("AUSTEER_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = tmp_path / below / DEMO_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert demo_model() == folder and [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_folder_and_dtype(saved, tiny, dtype):
    model, tokenizer = load_model(str(saved), dtype, "cpu")
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert model.dtype == wanted and not model.training and tokenizer("a")["input_ids"]
    for name, t in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], t.to(wanted)), name


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def unknown_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))


@pytest.mark.parametrize("damage", [damage_config, damage_weights, remove_weights, unknown_family])
def test_damaged_folder_gives_one_message(saved, damage):
    damage(saved)
    with pytest.raises(ModelError, match=rf"'{saved}'.*cpu: .*config.json") as caught:
        load_model(str(saved), "auto", "cpu")
    assert "\n" not in str(caught.value)


def test_unknown_device(saved):
    with pytest.raises(ModelError, match=rf"'{saved}'.*abacus"):
        load_model(str(saved), "auto", "abacus")


def test_offloaded_demo_model_is_the_demo_model(demo):
    model, tokenizer = load_offloaded("demo", "float32", "cpu")
    assert model.config.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct" and not model.training
    # All but the last norm lies on disk; the head is the embedding, and still is after a forward pass.
    assert [name for name, p in model.named_parameters() if p.device.type != "meta"] == ["model.norm.weight"]
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, demo[0](**ids).logits)
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=2)[0][-2:]) == " Paris."


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_offloaded_in_another_dtype(saved, dtype):
    resident, offloaded = load_model(str(saved), dtype, "cpu")[0], load_offloaded(str(saved), dtype, "cpu")[0]
    assert offloaded.dtype == resident.dtype
    assert_runs_as(resident, offloaded)


def test_nothing_is_copied_where_nothing_is_converted(saved, tmp_path):
    model, _ = load_offloaded(str(saved), "auto", "cpu", tmp_path / "offload")
    assert list((tmp_path / "offload").iterdir()) == [] and set(model.hf_device_map.values()) == {"cpu", "disk"}


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt", "deepseek_v3"])
def test_only_small_modules_are_in_memory(saved_of, tmp_path, family):
    model = tiny_model(family)
    offloaded, _ = load_offloaded(str(saved_of(model)), "auto", "cpu", tmp_path / "offload")
    layers = find_sites(offloaded, ["layer"])["layer"][0].path.rpartition(".")[0]
    held = {name for name, p in offloaded.named_parameters() if p.device.type != "meta"}
    assert held and not any(name.startswith(f"{layers}.") for name in held)
    assert not any("lm_head" in name or "embed_tokens" in name or "wte" in name for name in held)
    assert_runs_as(model, offloaded)


def test_experts_are_converted_once(saved_of, tmp_path):
    model = tiny_model("qwen3_moe")
    folder = saved_of(model, max_shard_size="30KB")
    offloaded, _ = load_offloaded(str(folder), "auto", "cpu", tmp_path / "offload")
    experts = {name: p for name, p in model.named_parameters() if ".experts." in name}
    written = {path.name.removesuffix(".safetensors") for path in (tmp_path / "offload").iterdir()}
    assert written == experts.keys()  # in the format of the model's code; the checkpoint has one tensor an expert
    for name, p in experts.items():
        with safe_open(tmp_path / "offload" / f"{name}.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor(name), p)
    runner = assert_runs_as(model, offloaded)
    small = sum(p.nbytes for p in model.model.norm.parameters())  # in memory already
    assert runner.traffic.read == sum(p.nbytes for p in model.model.parameters()) - small


def folders():
    return set(Path(tempfile.gettempdir()).glob("austeer-offload-*"))


def test_temporary_folder_goes_with_the_model(saved_of):
    saved = saved_of(tiny_model("mixtral"))
    gc.collect()
    before = folders()
    model, _ = load_offloaded(str(saved), "auto", "cpu")
    (folder,) = folders() - before
    assert list(folder.iterdir())
    with torch.no_grad():
        model(**ids_of_rows())
    del model
    gc.collect()
    assert folders() == before


@pytest.mark.parametrize("damage", [damage_config, damage_weights, remove_weights, unknown_family])
def test_damaged_folder_is_not_offloaded(saved, damage):
    damage(saved)
    before = folders()
    with pytest.raises(ModelError, match=rf"'{saved}'.*config.json") as caught:
        load_offloaded(str(saved), "auto", "cpu")
    assert "\n" not in str(caught.value) and folders() == before


def test_models_without_known_layers_are_not_offloaded(saved_of):
    folder = saved_of(AutoConfig.for_model("mamba", num_hidden_layers=2, hidden_size=32))
    before = folders()
    with pytest.raises(SiteError, match="mamba"):
        load_offloaded(str(folder), "auto", "cpu")
    assert folders() == before


def test_fits(saved, tiny, monkeypatch):
    size = sum(p.nbytes for p in tiny.parameters()) + sum(b.nbytes for b in tiny.buffers())
    asked = []

    def free(device):
        asked.append(str(device))
        return room

    monkeypatch.setattr(models, "free_memory", free)
    room = int(size / models.WEIGHTS) + 8
    assert fits(str(saved), "auto", "cpu") and fits(str(saved), "bfloat16", "cpu") and fits(str(saved), "auto", "auto")
    room = int(size / models.WEIGHTS) - 8
    assert not fits(str(saved), "auto", "cpu") and fits(str(saved), "bfloat16", "cpu")
    assert set(asked) == {"cpu"} if not torch.cuda.is_available() else {"cpu", "cuda:0"} <= set(asked)
    with pytest.raises(ModelError, match=r"dtype: .*'int8'"):
        fits(str(saved), "int8", "cpu")
