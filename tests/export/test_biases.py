"""`shift` in a folded checkpoint: biases that a model has, or that a setting of its config gives it."""

import json
from dataclasses import replace

import pytest
import torch

import austeer
from austeer.export.biases import READ_BY_VLLM, new_biases
from austeer.export.checkpoint import export_checkpoint
from austeer.export.edits import ExportError, ExportWarning, edits_of
from austeer.models.sites import find_sites
from austeer.models.structure import text_config
from dense_formula import logits, random_plan
from tiny_checkpoints import BATCH, assert_steered, expected, loaded, record, saved
from tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::austeer.export.edits.ExportWarning")


#: Where `shift` finds a bias: the projection's own, or one that a setting gives it.
ATTENTION, MLP = ["attention"], ["ffn", "layer", "neuron"]
OWN = {"gpt_oss": ATTENTION, "gptj": MLP}
OWN |= dict.fromkeys(("starcoder2", "phi", "gpt_neox", "gpt2", "opt", "bloom"), ATTENTION + MLP)
SETTINGS = {
    **{f: {"attention": ["attention_bias"]} for f in ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gemma3")},
    **{f: {"attention": ["attention_bias"]} for f in ("olmo", "olmo2", "olmoe", "phimoe", "granitemoe", "deepseek_v3")},
    **{f: {"attention": ["attention_bias"]} for f in ("qwen3", "qwen3_moe", "qwen3_vl", "llama4_text")},
    **{
        f: {"attention": ["attention_bias"], **{name: ["mlp_bias"] for name in MLP}}
        for f in ("llama", "granite", "nemotron", "smollm3", "llava")
    },
    "ernie4_5_moe": {name: ["use_bias"] for name in ("attention", "ffn", "layer")},  # of mixtures: shared experts'
    "falcon": {name: ["bias"] for name in ATTENTION + MLP},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_shift_becomes_biases_where_there_are_any(family, tmp_path):
    model = tiny_model(family, **({"residual_multiplier": 0.5} if family == "granite" else {}))
    base = saved(model, tmp_path / "base")
    can = {name: [] for name in OWN.get(family, ())} | SETTINGS.get(family, {})
    for name in find_sites(model):
        plan, out = random_plan(model, name, 40, "shift"), tmp_path / name
        if name not in can:
            with pytest.raises(ExportError, match=rf"{name}.*'shift'"):
                export_checkpoint(plan, base, out)
            assert not out.exists()
            continue
        export_checkpoint(plan, base, out, alpha=0.7)
        assert record(out).get("biases", {}).get("settings", []) == can[name]
        got = loaded(out, model)
        assert all(getattr(text_config(got), setting) is True for setting in can[name])
        assert_steered(model, logits(got, BATCH), expected(model, (plan, 0.7)))
        before = {key for key, _ in model.named_parameters()}
        new = {key: p for key, p in got.named_parameters() if key not in before}
        assert bool(new) == bool(can[name])
        assert all(key.endswith(".bias") for key in new)


def test_settings_are_written_into_the_config_and_nothing_else(tmp_path):
    for family, where in (("llama", lambda raw: raw), ("llava", lambda raw: raw["text_config"])):
        model = tiny_model(family)
        base = saved(model, tmp_path / family)
        out = export_checkpoint(random_plan(model, "ffn", 10, "shift"), base, tmp_path / f"{family}-out")
        raw, new = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
        assert where(new)["mlp_bias"] is True
        where(raw)["mlp_bias"] = True
        assert new == raw


@pytest.mark.parametrize("family", ["gpt2", "granite"])
def test_biases_are_those_of_steering_at_run_time(family, tmp_path):
    options = {} if family == "gpt2" else {"mlp_bias": True, "attention_bias": True, "residual_multiplier": 0.5}
    model = tiny_model(family, **options)
    base = saved(model, tmp_path / "base")
    for name in find_sites(model):
        plan = random_plan(model, name, 40, "shift")
        got = loaded(export_checkpoint(plan, base, tmp_path / name, alpha=0.5), model).state_dict()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with austeer.steer(model, plan, 0.5, mode="bias"):  # alpha * delta is exact in float32
            steered = model.state_dict()
            assert steered.keys() == got.keys()
            assert all(torch.equal(value, got[key]) for key, value in steered.items())
            assert not all(torch.equal(value, before[key]) for key, value in steered.items())


@pytest.mark.parametrize("family", ["gpt2", "granite"])
def test_all_sites_and_operations_that_meet_in_one_projection(family, tmp_path):
    """For the formula's hooks to add up, no AU is both scaled and shifted at "ffn", and inputs are left alone."""
    model = tiny_model(family, **({} if family == "gpt2" else {"residual_multiplier": 0.5}))
    scale, shift, layer = (
        random_plan(model, name, 40, operation, seed=seed)
        for seed, (name, operation) in enumerate((("ffn", "scale"), ("ffn", "shift"), ("layer", "shift")))
    )
    scaled = set(scale.keys())
    shift = shift.take(torch.tensor([i for i, key in enumerate(shift.keys()) if key not in scaled]))
    pairs = [(layer, 0.6), (scale, 2.0), (shift, -1.5)]
    out = export_checkpoint(pairs, saved(model, tmp_path / "base"), tmp_path / "out")
    assert_steered(model, logits(loaded(out, model), BATCH), expected(model, *pairs))


@pytest.mark.parametrize("family, site", [("deepseek_v3", "ffn"), ("mistral", "layer"), ("glm4_moe", "layer")])
def test_the_remedy_where_no_setting_gives_a_bias(family, site, tmp_path):
    model = tiny_model(family)
    with pytest.raises(ExportError, match=rf"'{site}' of layer \d.*config of '{family}'") as caught:
        export_checkpoint(random_plan(model, site, 40, "shift"), model, tmp_path / "out")
    assert ("with_operation('scale')" in str(caught.value)) == (site != "layer")
    assert "austeer.steer" in str(caught.value)


@pytest.mark.parametrize("site", ["ffn", "layer"])
def test_a_model_in_memory_gets_biases(site, tmp_path):
    model = tiny_model("llama")
    plan = random_plan(model, site, 30, "shift")
    out = export_checkpoint(plan, model, tmp_path / "out")
    assert_steered(model, logits(loaded(out, model), BATCH), expected(model, (plan, 1.0)))
    assert model.config.mlp_bias is False


# --- engines that do not read new biases -----------------------------------------------------------------------------


@pytest.mark.parametrize("family, warns", [("llama", False), ("qwen3", True)])
@pytest.mark.filterwarnings("default::austeer.export.edits.ExportWarning")
def test_families_whose_biases_vllm_leaves_out(family, warns, tmp_path, recwarn):
    model = tiny_model(family)
    base = saved(model, tmp_path / family)
    plan = random_plan(model, "attention", 5, "shift")
    plan = replace(plan, model=replace(plan.model, name=family))
    for number, given in enumerate((base, model)):
        model.config._name_or_path = family
        recwarn.clear()
        export_checkpoint(plan, given, tmp_path / f"out{number}")
        found = [str(w.message) for w in recwarn if w.category is ExportWarning]
        assert ["--model-impl transformers" in w for w in found] == [True] * warns
        recwarn.clear()
        export_checkpoint(plan.with_operation("scale"), given, tmp_path / f"scaled{number}")
        assert not [w for w in recwarn if w.category is ExportWarning]


def test_the_families_that_vllm_reads_have_such_settings():
    assert set(READ_BY_VLLM) <= SETTINGS.keys()


def with_a_norm(mlp):
    mlp.norm = torch.nn.LayerNorm(32, elementwise_affine=False)


def with_fewer_parameters(mlp):
    del mlp.down_proj.scale


def with_another_parameter(mlp):
    mlp.down_proj.other = torch.nn.Parameter(torch.ones(32))


def with_a_bias_that_is_no_linear_layer_s(mlp):
    mlp.act_fn.bias = torch.nn.Parameter(torch.ones(32))


@pytest.mark.parametrize(
    "change", [with_a_norm, with_fewer_parameters, with_another_parameter, with_a_bias_that_is_no_linear_layer_s]
)
def test_a_setting_that_changes_more_than_biases_is_not_taken(change, monkeypatch):
    model = tiny_model("llama")
    edits = edits_of(model, [(random_plan(model, "ffn", 5, "shift"), 1.0)])
    assert new_biases(model, model.config, edits).settings == ("mlp_bias",)
    from transformers.models.llama import modeling_llama

    init = modeling_llama.LlamaMLP.__init__

    def changed(self, config):
        init(self, config)
        self.down_proj.scale = torch.nn.Parameter(torch.ones(32))
        if config.mlp_bias:
            change(self)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", changed)
    model = tiny_model("llama")
    with pytest.raises(ExportError, match="config of 'llama'"):
        new_biases(model, model.config, edits)
