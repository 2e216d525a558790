"""Loading models by name: the demo's from its cache, others from folders, and one message where that fails."""

import json

import pytest
import torch

from austeer.errors import AusteerError
from austeer.models import DEMO_NAME, ModelError, demo_model, load_model


@pytest.fixture
def saved(tiny, demo, tmp_path):
    """A folder with a tiny model and its tokenizer."""
    tiny.save_pretrained(tmp_path / "tiny")
    demo[1].save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_demo_model_is_what_it_says(demo):
    model, tokenizer = demo
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training and model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.config._name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert tokenizer.decode(tokenizer("The soup was good")["input_ids"]) == "The soup was good"
    # It knows English: the weights are the real ones, in their places.
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_cached_demo_model_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("AUSTEER_CACHE", str(tmp_path))
    folder = tmp_path / DEMO_NAME
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert demo_model() == folder and [path.name for path in folder.iterdir()] == ["config.json"]


def test_cache_may_be_named_two_ways(tmp_path, monkeypatch):
    monkeypatch.delenv("AUSTEER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "austeer" / DEMO_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert demo_model() == folder


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_folder_and_dtype(saved, tiny, dtype):
    model, tokenizer = load_model(str(saved), dtype, "cpu")
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert model.dtype == wanted and not model.training and tokenizer("a")["input_ids"]
    for name, t in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], t.to(wanted)), name


def test_unknown_dtype(saved):
    with pytest.raises(ModelError, match="dtype: found 'int8', expected auto, float32, bfloat16 or float16"):
        load_model(str(saved), "int8", "cpu")


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
    with pytest.raises(ModelError, match=r"could not be loaded on cpu: .*Expected a folder with config") as caught:
        load_model(str(saved), "auto", "cpu")
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_empty_folder(tmp_path):
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(tmp_path), "auto", "cpu")


def test_unknown_device(saved):
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(saved), "auto", "abacus")


def test_model_errors_are_austeers():
    assert issubclass(ModelError, AusteerError)
