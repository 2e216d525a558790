"""``austeer cost`` as a user runs it."""

import json
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from austeer import AusteerError, SiteError
from austeer.cli.cost import cost
from austeer.costs.steering import steering_cost
from austeer.errors import ModelError
from tiny_models import tiny_model

app = typer.Typer()
app.command()(cost)

LIMITS = ("--bandwidth", "1e10", "--flops", "1e11", "--launch", "1e-6", "--host-us", "10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config and nothing else."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").config.save_pretrained(path)
    return path


def run(*arguments):
    """What the command prints; errors come as they are."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.output


def test_json_is_the_library_s(folder):
    options = ("--k", 7, "--site", "attention", "--layers", 2, "--batch", 3, "--prompt-tokens", 11, "--context", 9)
    found = json.loads(run(folder, *options, "--dtype", "float16", "--device", "cpu", *LIMITS, "--json"))
    rates = {"bandwidth": 1e10, "flops": 1e11, "launch": 1e-6}
    expected = steering_cost(
        str(folder),
        "attention",
        7,
        layers=2,
        batch=3,
        prompt_tokens=11,
        context=9,
        dtype=torch.float16,
        device="cpu",
        host_us=10,
        **rates,
    )
    assert found == {"config": str(folder), **json.loads(json.dumps(expected.to_json()))}
    assert found["ceilings"] == {**rates, "source": "as given"}
    assert found["host"] == {"launch": pytest.approx(1e-5), "source": "as given"}
    assert found["decode"]["extra"]["public"]["host"] > 0 == found["decode"]["extra"]["fold"]["host"]
    file = json.loads(run(folder / "config.json", *options, "--dtype", "float16", "--device", "cpu", *LIMITS, "--json"))
    assert {**file, "config": str(folder)} == found


def test_table_has_every_way_and_a_conclusion(folder):
    text = run(folder, "--k", 7, "--device", "cpu", *LIMITS)
    decoded, prompt = text.split("The prompt: 1 x 512 tokens, 0 in the cache")
    assert "One decoded token a row: 1 x 1 tokens, 511 in the cache" in decoded
    for part in (decoded, prompt):
        for way in ("unsteered", "fold", "columns", "fused", "dense", "public", "dense hook", "sparse hook", "lora"):
            assert re.search(rf"^{way} +\+?\d", part, re.MULTILINE), (way, part)
    # three layers, no bias: a multiply, an add and a copy in each, of 32 values and a vector, 2 bytes each
    [public] = [line for line in decoded.splitlines() if line.startswith("public")]
    assert public.split()[1:3] == ["+1.5", "k"] and " +9 " in public and "…" not in text
    assert "host:   10.0 us a launch, as given" in text and "both, one after the other" in text
    assert re.search("7 AUs in 3 of 3 layers.*auto takes fold and adds nothing; columns", text)
    lines = text.splitlines()
    tables = [line for line in lines if line.endswith((" overhead    kept", "kept")) or re.search(r" %", line)]
    assert max(map(len, tables[:-1])) <= 80


def test_what_is_not_possible_is_said(folder):
    text = run(folder, "--k", 7, "--device", "cpu", "--site", "layer", *LIMITS)
    assert re.search(r"fold +not possible: no linear layer makes this tensor", text)
    assert "auto takes columns and adds" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_here_and_one_ceiling_given(folder):
    text = run(folder, "--k", 7, "--device", "cuda", "--launch", "3e-6")
    assert re.search("3.0 TB/s, 798.0 T operations/s, 3.0 us a launch\n.*H100 SXM.*launch as given", text)
    assert re.search("host: .*34.3 us a launch, an H200's", text) and "the longer of the two" in text
    graph = run(folder, "--k", 7, "--device", "cuda", "--execution", "graph")
    assert "graph: a pass takes the device's time" in graph and "host: " not in graph.split("Beyond")[0]


def test_this_machine_is_measured(folder):
    content = json.loads(run(folder, "--k", 7, "--device", "cpu", "--json"))
    assert content["host"]["source"] == "measured on this machine" and 1e-7 < content["host"]["launch"] < 1e-2
    found = content["ceilings"]
    assert found["source"] == "measured on this cpu"
    assert 1e8 < found["bandwidth"] < 1e13 and 1e7 < found["flops"] < 1e15 and 1e-8 < found["launch"] < 1e-3


def test_the_demo_model(demo):
    found = json.loads(run("demo", "--dtype", "auto", "--device", "cpu", *LIMITS, "--json"))
    assert found["dtype"] == "float32" and found["layers"] == 30 and found["k"] == 100
    # all weights but the norms' few are in matrices; the head is the embedding, and one row of that is read besides
    weights = sum(p.numel() for p in demo[0].parameters()) + 576
    assert found["decode"]["unsteered"]["weights"] == 4 * weights


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("{}", "--k", 7, "--layers", 9), SiteError, "layers.* 9.* 3"),
        (("{}", "--device", "tpu"), AusteerError, "device.*'tpu'"),
        (("{}/none",), ModelError, "none.*config"),
        (("{}", "--k", 7, "--bandwidth", "0", "--device", "cpu"), AusteerError, "bandwidth.* 0"),
    ],
)
def test_bad_input(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        run(*(str(argument).format(folder) for argument in arguments))
