"""Models that run here: our own steering, PEFT's adapters, folded checkpoints; and where a replay is found."""

import json
import shutil
from dataclasses import replace

import pytest

import austeer
from austeer.export.output_files import REPLAY
from austeer.verifying import VerifyError
from dense_formula import assert_unchanged, random_plan, snapshot
from hypotheses import ALPHA, faults
from small_plans import PLAN
from small_plans import REPLAY as OTHERS


@pytest.fixture(scope="module")
def scaling(one_lively, demo):
    """A plan that a LoRA adapter can carry, with a replay."""
    plan = random_plan(one_lively, ("attention", "ffn"), 12)
    return austeer.record_replay(one_lively, demo[1], plan, ALPHA, progress=False)


@pytest.fixture(scope="module")
def folder(one_lively, demo, tmp_path_factory):
    """The tiny model, stored with its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    one_lively.save_pretrained(folder)
    demo[1].save_pretrained(folder)
    return folder


def test_our_own_steering(one_lively, demo, plan):
    before = snapshot(one_lively)
    found = austeer.verify(plan, one_lively, demo[1])
    assert_unchanged(one_lively, before)
    assert found.applied and found.differences["applied"] < 1e-3 and found.unsteered < 1e-3
    assert "austeer.steer, float32 on cpu" in found.engine and {"austeer", "torch", "Python"} <= set(found.versions)


@pytest.mark.parametrize("verdict", list(faults())[2:7])
def test_an_adapter_of_something_else(one_lively, scaling, tmp_path, verdict):
    """Exported with the fault in it, and run by PEFT; the model is then as it was."""
    plan, alpha, _ = faults()[verdict](scaling)
    austeer.export_lora(plan, one_lively, tmp_path / "wrong", alpha=alpha, progress=False)
    before = snapshot(one_lively)
    found = austeer.verify(scaling, one_lively, adapter=tmp_path / "wrong")
    assert_unchanged(one_lively, before)
    assert found.verdict == verdict, str(found)
    assert "PEFT" in found.engine and "peft" in found.versions


def broken(folder):
    """What makes an adapter's folder one that PEFT gives up on, by where it does."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    changed = json.loads(config.read_text())
    return {
        "no weights": weights.unlink,
        "cut weights": lambda: weights.write_bytes(weights.read_bytes()[:100]),
        "weights of another rank": lambda: config.write_text(json.dumps({**changed, "r": 64, "rank_pattern": {}})),
        "no such module": lambda: config.write_text(json.dumps({**changed, "target_modules": ["nothing"]})),
        "a module of no weight": lambda: config.write_text(
            json.dumps({**changed, "target_modules": ["o_proj", "input_layernorm"]})
        ),
    }


@pytest.mark.parametrize(
    "fault", ["no weights", "cut weights", "weights of another rank", "no such module", "a module of no weight"]
)
def test_a_model_is_as_it_was_after_an_adapter_that_is_broken(lively, scaling, tmp_path, fault):
    """In training, with some parameters frozen, and none of PEFT's parts is left."""
    out = austeer.export_lora(scaling, lively, tmp_path / "kind", alpha=ALPHA, progress=False)
    broken(out)[fault]()
    lively.train()
    lively.model.layers[1].eval()
    lively.lm_head.requires_grad_(False)
    before = snapshot(lively)
    with pytest.raises(VerifyError, match=rf"adapter: {out} could not be loaded on this model"):
        austeer.verify(scaling, lively, adapter=out)
    assert_unchanged(lively, before)


def test_a_model_in_training_is_as_it_was(lively, scaling, tmp_path):
    out = austeer.export_lora(scaling, lively, tmp_path / "kind", alpha=ALPHA, progress=False)
    lively.train()
    lively.model.layers[1].eval()
    lively.lm_head.requires_grad_(False)
    before = snapshot(lively)
    assert austeer.verify(out, lively).applied
    assert_unchanged(lively, before)


def test_an_adapter_has_the_replay_of_its_plan(one_lively, scaling, tmp_path):
    out = austeer.export_lora(scaling, one_lively, tmp_path / "kind", alpha=ALPHA, progress=False)
    found = austeer.verify(out, one_lively)
    assert found.applied and found.replay == scaling.replay and "PEFT" in found.engine
    (out / REPLAY).write_text("{}")
    with pytest.raises(austeer.PlanError, match=rf"{REPLAY}: damaged"):
        austeer.verify(out, one_lively)
    (out / REPLAY).unlink()
    with pytest.raises(VerifyError, match=rf"kind: found no {REPLAY}.*--replay"):
        austeer.verify(out, one_lively)


def test_an_export_of_something_else_has_no_replay(one_lively, scaling, tmp_path):
    cases = {
        "another strength": (scaling, ALPHA / 2),
        "a part": (scaling.top(9), ALPHA),
        "two plans": ([(scaling, ALPHA), (random_plan(one_lively, "ffn", 3), 1)], None),
        "some tokens": (scaling.with_replay(replace(scaling.replay, scope="prompt")), ALPHA),
        "changed since": (replace(scaling, beta=-scaling.beta), ALPHA),
    }
    for name, (plans, alpha) in cases.items():
        out = austeer.export_lora(plans, one_lively, tmp_path / name, alpha=alpha, progress=False)
        assert not (out / REPLAY).exists(), name


def test_a_folded_checkpoint(one_lively, demo, folder, scaling, tmp_path):
    out = austeer.export_checkpoint(scaling, folder, tmp_path / "folded", alpha=ALPHA, progress=False)
    loaded = type(one_lively).from_pretrained(out)
    loaded.generation_config.eos_token_id = None
    found = austeer.verify(out, loaded, demo[1])
    assert found.applied and found.unsteered is None and "folded checkpoint" in found.engine
    assert austeer.verify(out, one_lively).verdict == "not applied"
    again = austeer.export_checkpoint(scaling, out, tmp_path / "twice", alpha=ALPHA, progress=False)
    assert not (again / REPLAY).exists(), "of a model that had been folded already nothing is known"


def test_a_file_for_llama_cpp(one_lively, folder, scaling, tmp_path):
    pytest.importorskip("gguf")
    out = austeer.export_gguf(scaling, folder, tmp_path / "kind.gguf", alpha=ALPHA, progress=False)
    from austeer.verifying.sources import source_of

    source = source_of(out)
    assert source.replay == scaling.replay and source.gguf
    with pytest.raises(VerifyError, match=r"kind.gguf: .*llama-server"):
        austeer.verify(out, one_lively)
    plain = austeer.export_gguf(scaling, folder, tmp_path / "plain.gguf", alpha=1, progress=False)
    with pytest.raises(VerifyError, match=r"plain.gguf: found no replay"):
        source_of(plain)
    (tmp_path / "cut.gguf").write_bytes(out.read_bytes()[:300])
    with pytest.raises(austeer.PlanError, match=r"cut.gguf: damaged"):
        source_of(tmp_path / "cut.gguf")


def test_a_plans_own_file(one_lively, plan, tmp_path):
    plan.save_pretrained(tmp_path / "kind")
    assert austeer.verify(tmp_path / "kind", one_lively).applied
    assert (tmp_path / "kind" / "austeer_plan.safetensors").stat().st_size < 50_000
    plan.with_replay(None).save_pretrained(tmp_path / "kind")
    with pytest.raises(VerifyError, match=r"kind: found no replay.*austeer verify PLAN --model MODEL --record"):
        austeer.verify(tmp_path / "kind", one_lively)
    with pytest.raises(austeer.FileFormatError, match="nothing: no such file"):
        austeer.verify(tmp_path / "nothing", one_lively)


def test_a_plan_that_was_changed_since(one_lively, plan):
    changed = replace(plan, delta=plan.delta * 2)
    with pytest.raises(VerifyError, match=rf"{plan.digest[:16]}.*{changed.digest[:16]}.*changed since"):
        austeer.verify(changed, one_lively)
    with pytest.raises(VerifyError, match="changed since"):
        austeer.verify(PLAN.with_replay(replace(OTHERS, digest="0" * 64)), one_lively)


def test_a_plan_that_does_too_little(one_lively, demo):
    plan = austeer.record_replay(one_lively, demo[1], random_plan(one_lively, "ffn", 3), 1e-6, progress=False)
    found = austeer.verify(plan, one_lively)
    assert found.verdict == "cannot tell" and "moves no log-probability" in found.reason and not found.applied


def test_other_models_and_tokenizers(one_lively, tiny_of, demo, plan):
    with pytest.raises(austeer.PlanError, match="made for"):
        austeer.verify(plan, tiny_of("gpt2"))
    with pytest.raises(austeer.PairsError, match="vocabulary has 64"):
        austeer.verify(plan, tiny_of("llama", vocab_size=64))
    with pytest.raises(VerifyError, match="model: found str"):
        austeer.verify(plan, "models/tiny")
    other = lambda texts, **options: {"input_ids": [[5, 6] for _ in texts]}  # noqa: E731
    with pytest.raises(VerifyError, match=r"tokenizer: .*\[5, 6\].*expected \["):
        austeer.verify(plan, one_lively, other)
    with austeer.steer(one_lively, plan), pytest.raises(VerifyError, match="steered now"):
        austeer.verify(plan, one_lively)
    with pytest.raises(VerifyError, match=r"adapter: nowhere could not be loaded"):
        austeer.verify(plan, one_lively, adapter="nowhere")


def test_smollm2(demo, demo_momentum, tmp_path):
    """A measured plan on a real model, and one step of each kind of fault in an adapter that PEFT runs."""
    plan = demo_momentum.select("attention", k=32)
    plan = austeer.record_replay(
        *demo, plan, 6.0, prompts=["Sandstone is a sedimentary rock", "My train"], progress=False
    )
    assert len(json.dumps(plan.replay.to_json())) < 20_000
    right = austeer.export_lora(plan, demo[0], tmp_path / "right", alpha=6.0, progress=False)
    found = austeer.verify(right, *demo)
    assert found.applied and found.agreeing == 12, str(found)
    config = json.loads((right / "adapter_config.json").read_text())
    for verdict, factor in (("sign flipped", -1), ("half strength", 0.5), ("double strength", 2), ("not applied", 0)):
        wrong = shutil.copytree(right, tmp_path / verdict)
        changed = config | {"lora_alpha": config["lora_alpha"] * factor}
        (wrong / "adapter_config.json").write_text(json.dumps(changed))
        assert austeer.verify(plan, *demo, adapter=wrong).verdict == verdict
