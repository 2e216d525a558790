"""``austeer export lora`` as a user runs it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from adapters import config_of, tensors_of
from austeer import AusteerError, PlanError
from austeer.cli.export import app
from austeer.export import export_lora
from austeer.plans.serving import vllm_rank
from dense_formula import formula_logits, logits, random_plan
from tiny_models import ids_of_rows, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """A folder with the model and two plans for it."""
    folder = tmp_path_factory.mktemp("export")
    model.save_pretrained(folder / "tiny")
    for seed, name in enumerate(("kind", "brief")):
        plan = random_plan(model, ("attention", "ffn"), 12, seed=seed)
        replace(plan, model=replace(plan.model, name="me/tiny")).save_pretrained(folder / name)
    return folder


def run(*arguments):
    """The command in this process; what it prints. Errors come as they are."""
    done = CliRunner().invoke(app, ["lora", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_it_writes_what_the_library_does(model, place, tmp_path):
    out = tmp_path / "kind"
    text = run(place / "kind", "--model", place / "tiny", "--alpha", 2, "--out", out, "--quiet")
    plan = random_plan(model, ("attention", "ffn"), 12)
    ids = ids_of_rows()
    found = logits(PeftModel.from_pretrained(tiny_model(), out), ids)
    expected = formula_logits(model, ids, plan, 2.0)
    assert (expected - logits(model, ids)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rank = config_of(out)["r"]
    lines = text.splitlines()
    assert re.fullmatch(rf"rank {rank}, 6 modules, AUs in 3 layers, 0\.0 MB", lines[0])
    assert lines[1] == f"wrote {out}"
    assert lines[2] == f"next: vllm serve {place / 'tiny'} --enable-lora --lora-modules kind={out}"


def test_ablation_is_of_rank_1_where_scaling_takes_one_an_au(model, place, tmp_path):
    random_plan(model, ("attention", "ffn"), 40, "ablate").save_pretrained(tmp_path / "plan")
    out = tmp_path / "calm"
    text = run(tmp_path / "plan", "--model", place / "tiny", "--out", out, "--rank-pattern", "--quiet")
    assert text.splitlines()[0].startswith("rank 1, 6 modules, AUs in 3 layers")
    assert config_of(out)["rank_pattern"] == {}
    data = json.loads(
        run(tmp_path / "plan", place / "kind", "--model", place / "tiny", "--out", tmp_path / "b", "--json")
    )
    assert (
        data["rank"]
        == 1 + json.loads(run(place / "kind", "--model", place / "tiny", "--out", out, "--force", "--json"))["rank"]
    )


def test_plans_have_one_alpha_or_one_each(model, place, tmp_path):
    plans = [random_plan(model, ("attention", "ffn"), 12, seed=seed) for seed in range(2)]
    for name, alphas, pairs in (("one", (3,), (3, 3)), ("each", (3, -0.5), (3, -0.5)), ("none", (), (1, 1))):
        options = [text for alpha in alphas for text in ("--alpha", alpha)]
        run(place / "kind", place / "brief", "--model", place / "tiny", *options, "--out", tmp_path / name, "--quiet")
        export_lora(list(zip(plans, pairs)), model, tmp_path / "expected", force=True)
        expected, found = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / name)
        assert expected.keys() == found.keys() and all(torch.equal(t, found[key]) for key, t in expected.items())
    with pytest.raises(PlanError, match=r"--alpha.* 3 .* 2 plans"):
        run(place / "kind", place / "brief", *("-a", 1, "-a", 2, "-a", 3), "-m", place / "tiny", "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_json(place, tmp_path):
    out = tmp_path / "kind"
    data = json.loads(run(place / "kind", "-m", place / "tiny", "-o", out, "--rank", 40, "--json"))
    assert data["folder"] == str(out) and data["rank"] == 40 and data["vllm_max_lora_rank"] == 64
    assert data["modules"] == 6 and data["layers"] == [0, 1, 2]
    assert data["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert data["plans"][0]["alpha"] == 1.0 and data["plans"][0]["k"] == 24


def test_options(place, tmp_path):
    out = tmp_path / "a b"
    text = run(place / "kind", "-m", place / "tiny", "-o", out, "--rank", 17, "--dtype", "bfloat16", "--quiet")
    assert "--enable-lora --max-lora-rank 32 --lora-modules 'a b=" in text
    assert {t.dtype for t in tensors_of(out).values()} == {torch.bfloat16}
    with pytest.raises(AusteerError, match=r"a b: exists.*--force"):
        run(place / "kind", "-m", place / "tiny", "-o", out)
    text = run(place / "kind", "-m", place / "tiny", "-o", out, "--force", "--rank-pattern", "--lora-bias", "--quiet")
    config = config_of(out)
    assert config["rank_pattern"] and config["lora_bias"]
    assert "next: peft.PeftModel.from_pretrained(model" in text
    text = run(place / "kind", "-m", place / "tiny", "-o", out, "--force", "--rank", 16, "--quiet")
    assert "--enable-lora --lora-modules" in text, "vLLM's own default is enough"
    text = run(place / "kind", "-m", place / "tiny", "-o", out, "--force", "--rank", 513, "--quiet")
    assert re.search("next: austeer export checkpoint.* 512.*PEFT", text)


def test_experts(tmp_path):
    mixture = tiny_model("mixtral")
    mixture.save_pretrained(tmp_path / "MixtralForCausalLM")
    random_plan(mixture, "ffn", 9).save_pretrained(tmp_path / "plan")
    arguments = (tmp_path / "plan", "-m", tmp_path / "MixtralForCausalLM", "-o", tmp_path / "out", "--quiet")
    with pytest.raises(AusteerError, match=r"austeer export checkpoint.*--experts"):
        run(*arguments)
    assert "next: peft.PeftModel" in run(*arguments, "--experts")


def test_ranks_of_vllm():
    assert [vllm_rank(rank) for rank in (1, 8, 9, 100, 257, 512, 513)] == [8, 8, 16, 128, 320, 512, None]


def test_another_model_is_noted(model, place, tmp_path):
    """In a process of its own: standard error, a progress bar nowhere near standard output."""
    random_plan(model, "ffn", 5).save_pretrained(tmp_path / "unnamed")
    arguments = (tmp_path / "unnamed", "-m", place / "tiny", "-o", tmp_path / "a", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "austeer", "export", "lora", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"]
    assert re.match(r"note: .*LlamaForCausalLM.*tiny", done.stderr)
