"""What a LoRA adapter cannot say is refused before anything is written, and a broken-off export leaves nothing."""

import copy
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from adapters import config_of, tensors_of
from austeer.export import ExportError, ExportWarning, export_lora
from austeer.export import lora as lora_module
from dense_formula import WEIGHT_SITES, keep_layers, random_plan
from tiny_models import tiny_model


def refused(match, plan, model, out, error=ExportError, **options):
    with pytest.raises(error, match=match):
        export_lora(plan, model, out, **options)
    assert not any(out.parent.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    "site, operation, match",
    [
        ("ffn", "shift", r"down_proj.*'ffn' of layer \d.*'shift'.*austeer export checkpoint"),
        ("attention", "shift", r"o_proj.*'shift'.*lora_bias=True"),
        ("layer", "shift", r"down_proj.*'layer' of layer \d.*'shift'.*lora_bias=True"),
        ("layer", "scale", r"'layer' of layer \d.*'scale'"),
    ],
)
def test_what_no_product_of_matrices_does_is_refused(model, out, site, operation, match):
    refused(match, random_plan(model, site, 5, operation), model, out)


def test_a_bias_is_refused(out):
    biased = tiny_model("gpt2")
    match = r"mlp\.c_proj.*'ffn' of layer \d.*bias.*export checkpoint.*lora_bias=True.*--lora-bias"
    refused(match, random_plan(biased, "ffn", 5), biased, out)
    export_lora(random_plan(biased, WEIGHT_SITES[::2], 5), biased, out)  # at inputs a bias stays as it is
    assert config_of(out)["fan_in_fan_out"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_are_refused_with_the_checkpoint_as_the_remedy(family, out):
    mixture = tiny_model(family)
    plan = random_plan(mixture, "ffn", 60)
    refused(r"experts.*'ffn' of layer \d.*austeer export checkpoint", plan, mixture, out)
    refused("bias.*mixtures", plan, mixture, out, experts=True, lora_bias=family != "gpt_oss")
    export_lora(random_plan(mixture, "attention", 60), mixture, out)


def test_dense_layers_of_a_model_with_mixtures_are_named_by_their_parameter(out):
    """PEFT takes a target ``down_proj`` for the experts of such a model, and says nothing."""
    mixture = tiny_model("qwen3_moe")
    plan = keep_layers(random_plan(mixture, "ffn", 30), {0})
    refused("bias.*mixtures", plan, mixture, out, lora_bias=True)
    export_lora(plan, mixture, out)
    config = config_of(out)
    assert config["target_modules"] == [] and config["target_parameters"] == ["model.layers.0.mlp.down_proj.weight"]


def test_another_model_of_the_architecture_is_a_warning(model, out):
    plan = random_plan(model, "ffn", 5)
    named = replace(plan, model=replace(plan.model, name="meta/Llama-9"))
    with pytest.warns(ExportWarning, match=r"meta/Llama-9.*LlamaForCausalLM") as caught:
        export_lora(named, model, out)
    assert caught[0].filename == __file__
    assert out.is_dir()


def test_bad_options_are_refused(model, out):
    plan = random_plan(model, "ffn", 30)
    refused("dtype.*'int8'.*float64, float32", plan, model, out, dtype="int8")
    refused(r"rank.* 3.*\d+ or more", plan, model, out, rank=3)
    refused("rank.* 0.* 1", plan, model, out, rank=0)
    refused("rank.*rank_pattern", plan, model, out, rank=40, rank_pattern=True)


def test_numbers_that_the_dtype_has_not_are_refused(model, out):
    plan = random_plan(model, "ffn", 30)
    refused("torch.float16.*bfloat16", plan, model, out, dtype="float16", alpha=1e7)
    export_lora(plan, model, out, dtype="bfloat16", alpha=1e7)


@pytest.mark.filterwarnings("ignore:the plan was measured on")
def test_a_model_s_folder_is_never_replaced(model, tmp_path):
    folder = tmp_path / "models" / "tiny"
    model.save_pretrained(folder)
    plan = random_plan(model, "ffn", 5)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for source, place in ((folder, folder), (folder, folder.parent), (loaded, folder)):
        with pytest.raises(ExportError, match=f"{place}.*holds the model"):
            export_lora(plan, source, place, force=True)
    model.save_pretrained(tmp_path / "another")
    with pytest.raises(ExportError, match=r"another.*'config\.json'.*austeer\.json"):
        export_lora(plan, folder, tmp_path / "another", force=True)
    assert all((place / "model.safetensors").is_file() for place in (folder, tmp_path / "another"))
    export_lora(plan, folder, folder / "kind")


def test_weights_that_are_no_numbers_are_named(model, out):
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.down_proj.weight.data[:, 3] = float("nan")
    refused(r"layers\.1\.mlp\.down_proj.*NaN", random_plan(model, "ffn", 60), broken, out)


@pytest.mark.parametrize("family, sites", [("llama", WEIGHT_SITES), ("mixtral", ("attention", "ffn"))])
def test_the_space_that_is_asked_for_is_what_it_takes(family, sites, out, monkeypatch):
    asked = []
    check = lora_module.check_output
    monkeypatch.setattr(lora_module, "check_output", lambda *given: asked.append(given[2]) or check(*given))
    model = tiny_model(family)
    export_lora(random_plan(model, sites, 9), model, out, experts=family == "mixtral")
    assert asked == [sum(t.nbytes for t in tensors_of(out).values())]


def test_too_little_space_is_known_beforehand(model, out, monkeypatch):
    usage = lora_module.check_output.__globals__["shutil"].disk_usage
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(path)._replace(free=1000))
    monkeypatch.setattr(lora_module, "tensors_of", None)  # no weight is read
    refused(f"{out}.* MB", random_plan(model, "ffn", 5), model, out)


def test_a_replaced_adapter_stays_if_the_new_one_fails(model, out, monkeypatch):
    plan = random_plan(model, "ffn", 5)
    export_lora(plan, model, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    monkeypatch.setattr(lora_module, "save_file", lambda *a, **o: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(ExportError, match=f"{out}: exists.*force"):
        export_lora(plan, model, out, alpha=9)
    with pytest.raises(ExportError, match="broken"):
        export_lora(plan, model, out, alpha=9, force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_hub_s_own_files_are_never_replaced(model, tmp_path):
    """A snapshot's files are links to others."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    model.save_pretrained(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (blobs / "config.json").rename(blobs / "some-hash")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(blobs / "some-hash")
    with pytest.raises(ExportError, match=f"{blobs}.*holds the model"):
        export_lora(random_plan(model, "ffn", 5), snapshot, blobs, force=True)
    assert (blobs / "model.safetensors").is_file()
