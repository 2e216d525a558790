"""``austeer export checkpoint`` and ``austeer export gguf``: what they write and print."""

import json
import re

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from austeer.cli import app
from dense_formula import formula_at, formula_logits, logits, random_plan
from tiny_models import tiny_model

BATCH = {"input_ids": torch.tensor([[3, 1, 40, 22, 9]])}


def run(*arguments):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def base(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def plan(base, sites, operation="shift", count=20):
    """Of layer 1 alone, and measured on this very model by its name."""
    model = AutoModelForCausalLM.from_pretrained(base)
    found = random_plan(model, sites, count, operation)
    return found.take((found.layer == 1).nonzero()[:, 0])


def test_a_checkpoint(base, tmp_path):
    one, other = plan(base, "attention"), plan(base, "ffn", "scale")
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    out = tmp_path / "my model"
    result = run(
        *("checkpoint", tmp_path / "one", tmp_path / "other", "-m", base, "-a", 2, "-a", -1, "--out", out, "--quiet")
    )
    lines = result.stdout.splitlines()
    assert "linked" in lines[0] and "attention_bias" in lines[0]
    assert lines[1:] == [f"wrote {out}", f"next: vllm serve '{out}'"]
    assert not result.stderr
    model, found = tiny_model("llama"), AutoModelForCausalLM.from_pretrained(out)
    with_one = formula_logits(model, BATCH, one, 2.0)
    assert (with_one - logits(model, BATCH)).abs().max() > 0.1
    with formula_at(model, one, 2.0), formula_at(model, other, -1.0):
        torch.testing.assert_close(logits(found, BATCH), logits(model, BATCH), rtol=1e-4, atol=1e-5)


def test_biases_that_vllm_s_own_code_leaves_out(command_line, tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "base")
    random_plan(model, "attention", 5, "shift").save_pretrained(tmp_path / "plan")
    out = tmp_path / "out"
    code, printed, noted = command_line(
        "export", "checkpoint", tmp_path / "plan", "-m", tmp_path / "base", "--out", out, "--quiet"
    )
    assert code == 0 and re.search("note: .*--model-impl transformers", " ".join(noted.split()))
    assert printed.splitlines()[-1] == f"next: vllm serve {out} --model-impl transformers"


def test_a_checkpoint_as_json(base, tmp_path):
    plan(base, "ffn", "scale").save_pretrained(tmp_path / "plan")
    for copy in ([], ["--copy"]):
        out = tmp_path / f"out{len(copy)}"
        result = run("checkpoint", tmp_path / "plan", "--model", base, "--out", out, "--json", *copy)
        found = json.loads(result.stdout)
        assert found["folder"] == str(out) and found["model"] == str(base) and found["sharded"] is True
        assert found["files"] == len(list(base.glob("*.safetensors"))) and len(found["rewritten"]) == 1
        assert found["linked"] == (0 if copy else found["files"] - 1)
        written = found["rewritten"] if not copy else [file.name for file in base.glob("*.safetensors")]
        assert found["bytes"] == sum((out / name).stat().st_size for name in written)
        assert found["plans"][0]["alpha"] == 1.0 and found["settings"] == []


def test_a_folded_checkpoint_folded_again_is_noted(base, tmp_path):
    plan(base, "ffn", "scale").save_pretrained(tmp_path / "plan")
    run("checkpoint", tmp_path / "plan", "--model", base, "--out", tmp_path / "once" / "base")
    result = run("checkpoint", tmp_path / "plan", "--model", tmp_path / "once" / "base", "--out", tmp_path / "twice")
    assert "already" in result.stderr


def test_gguf(base, tmp_path):
    plan(base, "attention", "scale").save_pretrained(tmp_path / "scale")
    plan(base, "layer").save_pretrained(tmp_path / "shift")
    for name, kind, option in (("scale", "LoRA adapter", "--lora"), ("shift", "control vector", "--control-vector")):
        out = tmp_path / f"{name}.gguf"
        result = run("gguf", tmp_path / name, "--model", base, "--alpha", 3, "--out", out, "--quiet")
        assert result.stdout.splitlines() == [
            f"{kind}, {out.stat().st_size / 1e6:.1f} MB",
            f"wrote {out}",
            f"next: llama-server -m MODEL.gguf {option} {out}",
        ]
        assert gguf.GGUFReader(out).tensors
        result = run("gguf", tmp_path / name, "--model", base, "-a", 3, "--out", out, "--force", "--json")
        found = json.loads(result.stdout)
        assert found == {
            "file": str(out),
            "kind": "lora" if name == "scale" else "controlvector",
            "bytes": out.stat().st_size,
            "alphas": [3.0],
            "predicted": None,
        }
    run(
        "gguf", tmp_path / "scale", "-m", base, "-o", out, "--force", "--dtype", "float16", "--architecture", "mistral3"
    )
    reader = gguf.GGUFReader(out)
    assert {t.tensor_type.name for t in reader.tensors} == {"F16"}
    assert reader.fields["general.architecture"].contents() == "mistral3"


@pytest.mark.parametrize("command, out", [("checkpoint", "out"), ("gguf", "out.gguf"), ("lora", "out")])
def test_errors_are_one_message_and_exit_code_2(command, out, base, tmp_path, monkeypatch, command_line, capsys):
    plan(base, "ffn", "scale").with_operation("push").save_pretrained(tmp_path / "push")
    plan(base, "ffn", "scale").save_pretrained(tmp_path / "plan")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()  # what loading the model printed
    for arguments, message in (
        (["push", "--model", base, "--out", out], "push"),
        (["plan", "--model", base, "--out", "there"], "there: exists"),
        (["plan", "--model", tmp_path / "nowhere", "--out", out], "nowhere"),
        (["missing", "--model", base, "--out", out], "missing"),
        (["plan", "--model", base, "--out", out, "-a", "1", "-a", "2"], "--alpha.* 2 .* 1 plan"),
    ):
        monkeypatch.chdir(tmp_path)
        code, _, error = command_line("export", command, *arguments)
        assert code == 2 and error.startswith("error: ") and re.search(message, error) and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before
