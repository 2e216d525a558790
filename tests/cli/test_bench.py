"""`austeer bench` as a user runs it: a whole small run, its lists, a trace, a comparison, and what is refused."""

import json

import pytest
from transformers import LlamaForCausalLM

from bench import files
from bench.cli import FULL, app, expand, full_lists

QUICK = ("--seconds", "0", "--tokens", "2", "--variants", "public,columns,fold", "--quiet")


@pytest.fixture(scope="module")
def folder(demo, tiny_of, tmp_path_factory):
    """A small model on disk, with more than 100 AUs in 3 layers."""
    folder = tmp_path_factory.mktemp("bench") / "model"
    tiny_of("llama", hidden_size=48).save_pretrained(folder)
    demo[1].save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bench(monkeypatch, command_line):
    monkeypatch.setattr("austeer.cli.app", app)
    return command_line


def test_a_run_measures_what_its_lists_ask_for_and_shows_it(bench, folder, tmp_path):
    code, out, err = bench("--model", folder, "--k", "20,3", "--layers", "1", "--out", tmp_path, *QUICK)
    assert code == 0, err
    (path,) = (tmp_path / "cpu").glob("inference-*.json")
    content = json.loads(path.read_text())
    assert [(case["k"], case["layers"]) for case in content["cases"]] == [(20, 1), (3, 1)]
    assert content["complete"] and content["series"] == {"main": [0], "k": [0, 1]}
    assert set(content["cases"][0]["variants"]) == {"unsteered", "unsteered again", "public", "columns", "fold"}
    assert f"wrote {path}" in out.replace("\n", "") and "unsteered again" in out and "noise" in out

    code, out, err = bench("--compare", path, path)
    assert code == 0 and "0 times changed beyond noise" in out, (out, err)
    code, out, _ = bench("--compare", path, path, "--json")
    assert code == 0 and json.loads(out)["beyond_noise"] == 0
    code, out, _ = bench("--model", folder, "--k", "all", "--json", "--out", tmp_path, *QUICK)
    assert code == 0 and json.loads(out)["cases"][0]["k"] == 3 * 48


def test_a_trace_is_written_and_nothing_timed(bench, folder, tmp_path):
    code, out, err = bench("--model", folder, "--k", 20, "--trace", tmp_path / "t.json.gz", *QUICK)
    assert code == 0, err
    assert (tmp_path / "t.json.gz").stat().st_size > 1000 and "columns" in out
    assert not list(tmp_path.glob("cpu/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variants", "magic"), "variants: found 'magic', expected of: unsteered, unsteered again, public"),
        (("--k", "many"), "--k: found 'many', expected numbers from 1 on"),
        (("--k", ","), "--k: found none, expected at least one value"),
        (("--site", ""), "--site: found none"),
        (("--k", "1000"), "k: found 1000, expected an integer from 1 to 144"),
        (("--layers", "4"), "layers: found 4, expected an integer from 1 to 3"),
        (("--batch", "0"), "--batch: found '0'"),
        (("--execution", "graph"), "found a CPU, expected a GPU"),
        (("--execution", "lazy"), "execution: found 'lazy', expected eager, compile, graph"),
        (("--prompt-tokens", "4000"), "expected at most 512 together"),
        (("--full", "--k", "3"), "--full: found --k beside it, expected one of the two"),
        (("--trace", "trace.txt"), "expected one that ends in .json or .json.gz"),
        (("--compare", "a.json", "b.json"), "a.json"),
    ],
)
def test_bad_input_is_refused_with_one_message(bench, folder, tmp_path, arguments, message):
    code, out, err = bench("--model", folder, "--out", tmp_path, "--quiet", *arguments)
    assert code == 2 and message in " ".join(err.split()) and not out, err
    assert not list(tmp_path.rglob("*.json"))


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(bench, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = bench("--out", tmp_path / "file" / "results")
    assert code == 2 and "--out:" in err and "give another folder" in err


def test_full_is_cut_to_what_a_model_has(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    texts = full_lists(model)
    assert (texts["layers"], texts["k"], texts["execution"]) == ("1,3", "100,1,10,all", FULL["execution"])
    cases, series = expand(model, texts)
    assert series["k"][0] == series["layers"][-1] == cases[0] and {case.k for case in cases} == {1, 10, 100, 144}


def test_report_says_what_has_drifted(bench, tmp_path):
    options = ("--results", files.ROOT / "bench/results", "--docs", tmp_path, "--readme", files.ROOT / "README.md")
    code, out, _ = bench("report", "--check", *options)
    assert code == 1 and "efficiency.md: is missing" in out and not list(tmp_path.iterdir())
