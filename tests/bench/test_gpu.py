"""The GPU suite: its parts on a CPU with tiny models, what becomes of failures, of processes that end, and of time."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import time

import pytest
import torch

from austeer.costs.ceilings import Ceilings
from bench import catalogue, command, files, gpu, gpu_parts, gpu_suite, inference, report, shapes
from bench.gpu_suite import DONE, FAILED, PARTIAL, RUNNING, SKIPPED, BrokenDeviceError, Clock, Part, Suite
from bench.lineup import Case
from places import ROOT

CPU = torch.device("cpu")
LLAMA = gpu_parts.cases_of(shapes.LLAMA_8B, "eager", ("ffn",))
#: What the measurements can do without: a machine with a GPU may have none of it.
OPTIONAL = (
    *("greenlet", "peft", "typer", "matplotlib", "pyvene", "nnsight", "repeng", "steering_vectors", "gguf"),
    *("datasets", "pyarrow", "zstandard", "hypothesis", "bitsandbytes", "sklearn", "pytest_benchmark"),
)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, request):
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    report.quiet = False


@pytest.fixture
def suite(tmp_path):
    """A suite of no parts."""
    settings = {"quick": True, "only": [], "ways": [], "budget": 100.0, "dtype": "bfloat16"}
    content = {"kind": "gpu", "schema": 1, "settings": settings, "environment": {"commit": None}, "parts": {}}
    suite = Suite(tmp_path / "cpu" / "gpu-quick.json", content, CPU)
    suite.save()
    return suite


def part_of(run, name="part", least=1.0, most=10.0):
    return Part(name, least, most, run)


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_whole_suite_on_a_cpu(tmp_path, capsys):
    assert gpu.main(["--quick", "--ways", "fold", "--out", str(tmp_path), "--commit", "abc"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    (path,) = (tmp_path / "cpu").glob("gpu-quick-*.json")
    content = json.loads(path.read_text())
    assert (content["kind"], content["schema"], content["complete"]) == ("gpu", 1, True)
    assert content["environment"]["commit"] == "abc" and content["environment"]["packages"]["torch"]
    parts = content["parts"]
    assert list(parts) == [part.name for part in gpu_parts.parts()]
    assert parts.pop("tests")["status"] == SKIPPED
    if importlib.util.find_spec("bench.many_plans") is None:
        assert parts.pop("rows")["status"] == SKIPPED
    assert {entry["status"] for entry in parts.values()} == {DONE}, [entry["reason"] for entry in parts.values()]

    def file_of(part, kind):
        (name,) = parts[part]["files"]
        assert name.startswith(f"{kind}-quick-")
        return json.loads((tmp_path / "cpu" / name).read_text())

    kernels = file_of("kernels", "dispatch")
    assert kernels["complete"] and kernels["environment"]["commit"] == "abc"
    assert parts["ceilings"]["result"]["bandwidth"] > 0
    for part, sites, own in (
        ("graphs-llama", ["ffn", "attention", "ffn"], gpu_parts.GRAPH_WAYS),
        ("eager-gemma", ["ffn", "attention", "layer"], gpu_parts.WAYS),
        ("graphs-mixture", ["ffn", "ffn", "ffn"], gpu_parts.GRAPH_WAYS),
    ):
        found = file_of(part, "inference")
        assert (
            found["complete"] and found["model"]["dtype"] == "bfloat16" and found["model"]["name"].startswith("tiny ")
        )
        places = [(case["operation"], case["site"]) for case in found["cases"]]
        assert places == list(zip(("shift", "scale", "push"), sites))
        for case in found["cases"]:
            assert {"unsteered", "unsteered again", "fold", *own} == set(case["variants"])
            measured = {name for name, row in case["variants"].items() if row["status"] == "measured"}
            assert {"public", "dense hook", "auto"} <= measured and "launches" in case["variants"]["auto"]
            assert {"token", "first_token"} <= set(case["variants"]["auto"])
    counted = parts["counts"]["result"]["ways"]
    assert counted["public"]["launches"] == counted["unsteered"]["launches"] + 2 * 3
    momentum = file_of("momentum", "momentum")
    assert momentum["large"]["sets"] and momentum["kernel"]["of_bandwidth"] > 0 and momentum["complete"]
    for text in ("roofline", "counting kernel", "token, batch 1, %", "found no GPU"):
        assert text in printed


def test_it_runs_where_only_what_it_needs_is_installed(tmp_path):
    """In a process in which no optional package can be imported."""
    command = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); from bench import gpu; sys.exit(gpu.main())"
    arguments = ["--quick", "--json", "--out", str(tmp_path), "--only", "tests", "graphs-llama", "momentum", "counts"]
    arguments += ["--ways", "lora"]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert {name: entry["status"] for name, entry in parts.items() if entry["status"] != DONE} == {"tests": SKIPPED}
    (name,) = parts["graphs-llama"]["files"]
    rows = json.loads((tmp_path / "cpu" / name).read_text())["cases"][0]["variants"]
    assert [name for name, row in rows.items() if row["status"] != "measured"] == ["lora"]
    assert "peft" in rows["lora"]["reason"] and "install" in rows["lora"]["reason"]


@pytest.mark.parametrize(
    "arguments, message",
    [([], "found no GPU, expected one; --quick runs"), (["--quick", "--budget", "0"], "--budget: found 0")],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


def test_what_matters_most_comes_first_and_the_tests_have_their_time():
    found = gpu_parts.parts()
    names = [part.name for part in found]
    assert names.index("graphs-llama") < names.index("eager-llama") < names.index("eager-gemma") < names.index("counts")
    assert names.index("graphs-gemma") < names.index("eager-gemma") and names[-1] == "counts"
    assert next(part for part in found if part.name == "tests").least >= 90
    assert sum(part.least for part in found) < gpu.BUDGET
    assert [part.name for part in gpu_parts.parts(["counts", "tests"])] == ["tests", "counts"]


# --- failures and time -----------------------------------------------------------------------------------------------


def test_a_failing_part_is_recorded_and_the_rest_runs(suite, monkeypatch):
    seen = []

    def fails(suite, entry, clock):
        entry["reason"] = "one case failed before"
        raise ZeroDivisionError("a made-up error\nin two lines")

    def too_large(suite, entry, clock):
        raise shapes.TooLargeError("needs more")

    def writes(suite, entry, clock):
        on_disk = json.loads(suite.path.read_text())["parts"]
        seen.append({name: found["status"] for name, found in on_disk.items()})
        entry["result"] = {"x": 1}

    parts = [part_of(run, name) for name, run in (("a", fails), ("b", too_large), ("c", writes))]
    monkeypatch.setattr(gpu_parts, "parts", lambda only: parts)
    assert gpu.work(suite.path, 100) == 0
    assert seen == [{"a": FAILED, "b": SKIPPED, "c": RUNNING}], "the file is written after each part"
    found = files.read(suite.path, "gpu")["parts"]
    assert found["a"]["reason"].startswith("one case failed before; ZeroDivisionError: a made-up error [")
    assert "bench/test_gpu.py:" in found["a"]["reason"] and str(ROOT) not in found["a"]["reason"]
    assert found["b"]["reason"] == "needs more"
    assert (found["c"]["status"], found["c"]["result"]) == (DONE, {"x": 1})
    seen.clear()
    assert gpu.work(suite.path, 100) == 0 and not seen, "what is there is not measured again"


def test_parts_get_the_time_that_later_ones_do_not_need(suite, monkeypatch):
    given = []
    needs = {"a": (1, 5), "b": (10, 100), "c": (50, 60), "d": (10, 10)}
    parts = [part_of(lambda suite, entry, clock: given.append(clock.left), name, *of) for name, of in needs.items()]
    monkeypatch.setattr(gpu_parts, "parts", lambda only: parts)
    gpu.work(suite.path, 90)  # made-up parts take no time
    assert given == [pytest.approx(seconds, abs=6) for seconds in (5, 30, 60, 10)]
    suite.save()  # without the parts
    gpu.work(suite.path, 55)
    found = files.read(suite.path, "gpu")["parts"]
    assert [name for name, entry in found.items() if entry["status"] == SKIPPED] == ["a", "b", "c"]
    assert re.fullmatch(r"(3\d|4[0-5]) s were left for it, expected at least 50 s", found["c"]["reason"])


def test_after_an_error_that_breaks_the_gpu_another_process_is_asked_for(suite, monkeypatch):
    def broken(device):
        if suite_parts[0] in files.read(suite.path, "gpu")["parts"]:
            raise BrokenDeviceError("the GPU answers no more")

    suite_parts = ["a", "b"]
    monkeypatch.setattr(gpu_parts, "parts", lambda only: [part_of(lambda *_: None, name) for name in suite_parts])
    monkeypatch.setattr(gpu_suite, "check_device", broken)
    assert gpu.work(suite.path, 100) == gpu.BROKEN
    assert list(files.read(suite.path, "gpu")["parts"]) == ["a"]


WORKER = """
import json, os, sys, time
path, how = sys.argv[sys.argv.index("--work") + 1], sys.argv[1]
content = json.load(open(path))
def put(name, status):
    content["parts"][name] = {"status": status, "reason": "", "files": [], "result": None}
    json.dump(content, open(path, "w"))
first = not content["parts"]
if how == "import" or how == "broken" and "b" in content["parts"]:
    sys.exit(1)
if first:
    put("a", "running")
    if how == "abort":
        os.abort()
    if how == "hang":
        time.sleep(60)
    put("a", "done")
    if how == "broken":
        sys.exit(3)
put("b", "done")
"""


@pytest.mark.parametrize(
    "how, statuses, reason, stopped",
    [
        ("abort", {"a": FAILED, "b": DONE}, "its process ended with signal 6 (Aborted)", None),
        ("hang", {"a": FAILED}, "stopped, since it was still running 1 s after the time was up", None),
        ("broken", {"a": DONE, "b": DONE}, "", None),
        ("import", {}, "", "the measuring process did not begin: it ended with status 1"),
    ],
)
def test_a_process_that_ends_costs_its_part_alone(suite, monkeypatch, how, statuses, reason, stopped):
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    gpu.supervise(suite.path, time.perf_counter() + (20 if how != "hang" else 0), [sys.executable, "-c", WORKER, how])
    content = files.read(suite.path, "gpu")
    assert {name: entry["status"] for name, entry in content["parts"].items()} == statuses
    assert content.get("stopped") == stopped
    if statuses:
        assert content["parts"]["a"]["reason"] == reason


def test_a_process_for_the_rest_is_started_with_the_options_that_it_needs(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "device", lambda: CPU)
    monkeypatch.setattr(
        gpu.files, "about", lambda device, commit: {"commit": commit, "device": "a GPU", "packages": {}}
    )
    monkeypatch.setattr(gpu, "supervise", lambda path, end, started: called.append((path, end, started)))
    begin = time.perf_counter()
    assert gpu.main(["--out", str(tmp_path), "--budget", "77", "--only", "tests", "--json"]) == 0
    ((path, end, started),) = called
    assert started == [sys.executable, "-m", "bench.gpu", "--json"] and end - begin == pytest.approx(77, abs=1)
    assert path.name.startswith("gpu-2") and files.read(path, "gpu")["settings"]["only"] == ["tests"]


# --- tests as a part -------------------------------------------------------------------------------------------------


def test_results_of_tests_are_counted_and_those_that_fail_named(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_good(x): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip(reason='no')\ndef test_skipped(): pass\n"
    )
    entry = gpu_parts.run_tests(["-c", "/dev/null", str(tmp_path)], 60)
    assert entry["status"] == FAILED and entry["reason"].startswith(
        "pytest ended with status 1 and 5 tests, 2 failed: "
    )
    assert entry["result"]["counts"] == {"passed": 2, "failed": 1, "error": 1, "skipped": 1}
    assert [name.split("::")[1] for name in entry["result"]["failing"]] == ["test_bad", "test_error"]
    assert any("assert 1 == 2" in line for line in entry["result"]["end"])
    good = gpu_parts.run_tests(["-c", "/dev/null", str(tmp_path), "-k", "good"], 60)
    assert good == {"result": {"counts": {"passed": 2}, "failing": [], "end": []}}
    none = gpu_parts.run_tests(["-c", "/dev/null", str(tmp_path), "-k", "nothing"], 60)
    assert none["status"] == FAILED and none["reason"] == "pytest ended with status 5 and 0 tests, 0 failed"


def test_results_of_several_processes_are_counted_too(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_good(x): pass\ndef test_bad(): assert 0\n"
    )
    entry = gpu_parts.run_tests(["-c", "/dev/null", "-n", "2", str(tmp_path)], 120)
    assert entry["result"]["counts"] == {"passed": 2, "failed": 1}
    assert [name.split("::")[1] for name in entry["result"]["failing"]] == ["test_bad"]


def test_tests_that_take_too_long_are_stopped_and_what_ran_is_counted(tmp_path):
    (tmp_path / "test_slow.py").write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\n")
    begin = time.perf_counter()
    entry = gpu_parts.run_tests(["-c", "/dev/null", str(tmp_path)], 10)
    assert time.perf_counter() - begin < 45
    assert entry["status"] == PARTIAL and entry["reason"] == "stopped after 10 s and 1 tests, 0 failed"
    assert entry["result"]["counts"] == {"passed": 1}


# --- models ----------------------------------------------------------------------------------------------------------


def test_cases_of_a_gpu_have_every_site_and_operation():
    graphs = gpu_parts.planned("graph", ("ffn", "attention"), False)
    assert {(case.execution, case.batch, case.k, case.prompt_tokens) for case in graphs} == {("graph", 1, 100, 32)}
    assert [(case.operation, case.site) for case in graphs[:3]] == [
        ("shift", "ffn"),
        ("shift", "attention"),
        ("scale", "ffn"),
    ]
    eager = gpu_parts.planned("eager", ("ffn", "attention"), False)
    assert [case.prompt_tokens for case in eager] == [512, 4096, 512, 512, 512, 512, 512]
    for cases in (graphs, eager):
        assert {(case.operation, case.site) for case in cases} == {
            (operation, site) for operation in ("scale", "push", "shift") for site in ("ffn", "attention")
        }


def made_up(case, k_that_fails=None):
    if case.k == k_that_fails:
        raise torch.OutOfMemoryError("made up")
    return dataclasses.asdict(case) | {"variants": {}}


def measure_with(suite, monkeypatch, measure, clock):
    """The entry and file of a model whose cases are made up, as on a GPU."""
    monkeypatch.setattr(gpu_parts, "planned", lambda *_: eager_cases())
    monkeypatch.setattr(inference, "measure", lambda model, limits, job, tell: measure(job.case))
    monkeypatch.setattr(inference, "ceilings", lambda *_: Ceilings(1.0, 1.0, 0.0, "made up"))
    monkeypatch.setattr(inference.files, "about", lambda *_: {})
    entry = {"status": RUNNING, "reason": "", "files": [], "result": None}
    LLAMA(suite, entry, clock)
    found = json.loads((suite.path.parent / entry["files"][0]).read_text()) if entry["files"] else None
    return entry, found


def eager_cases():
    return inference.sweep(Case(k=4), k=(1, 2, 4, 8), site=("ffn", "layer"))[0]


def test_a_case_that_fails_costs_itself_alone(suite, monkeypatch):
    entry, found = measure_with(suite, monkeypatch, lambda case: made_up(case, k_that_fails=2), Clock(100))
    assert entry["status"] == PARTIAL, entry["reason"]
    assert entry["reason"].startswith(f"{Case(k=2)}: OutOfMemoryError: made up [")
    assert [(case["k"], case["site"]) for case in found["cases"]] == [(4, "ffn"), (1, "ffn"), (8, "ffn"), (4, "layer")]
    assert found["series"] == {"main": [0, 1, 2, 3]} and not found["complete"]
    entry, found = measure_with(suite, monkeypatch, lambda case: 1 / 0, Clock(100))
    assert entry["status"] == FAILED and found is None and entry["reason"].count("ZeroDivisionError") == 5


def test_cases_for_which_no_time_is_left_are_left_out(suite, monkeypatch):
    clock = Clock(100)

    def measure(case):
        time.sleep(0.2)
        if case.k == 1:
            clock.end = time.perf_counter() + 0.1
        return made_up(case)

    entry, found = measure_with(suite, monkeypatch, measure, clock)
    assert [case["k"] for case in found["cases"]] == [4, 1]
    assert not found["complete"] and found["series"] == {"main": [0, 1]}
    assert entry["status"] == PARTIAL and entry["reason"] == "3 of 5 cases left out, since its time was up"


def test_a_model_that_does_not_fit_is_skipped_and_named(suite, monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 1000)
    gpu_suite.run_part(suite, part_of(LLAMA, "graphs-llama"), 100)
    entry = files.read(suite.path, "gpu")["parts"]["graphs-llama"]
    assert entry["status"] == SKIPPED and "tiny Llama-3.1-8B: needs 0.0 GB" in entry["reason"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Gemma2-9B", "Qwen3-30B-A3B"])
def test_decoding_steps_are_captured_on_a_gpu(name, tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    model = shapes.build(shapes.tiny(shapes.SHAPES[name]), device)
    case = Case("graph", k=10)
    job = inference.Job(case, catalogue.chosen(["public", "columns", "auto"]), gpu_parts.QUICK_EFFORT)
    (content,) = inference.run(model, name, [job], {"main": [case]})
    rows = content["cases"][0]["variants"]
    assert {row["status"] for row in rows.values()} == {"measured"}, rows
