"""lm-eval on steered models: its own numbers on a local task are those of our scores."""

import json
import sys

import pytest
import torch

from austeer import steer
from austeer.errors import TaskError
from austeer.models.structure import is_steered
from austeer.tasks import Item, Task, option_scores
from austeer.tasks.lm_eval import check_tasks, lm_evaluate, steered_lm
from dense_formula import random_plan

ITEMS = (
    Item("The sky is", (" blue", " green and wet"), 0),
    Item("Grass in the spring is", (" blue", " green"), 1),
    Item("Snow is", (" black as the night", " white"), 1),
    Item("Coal is", (" black", " white"), 0),
)


def test_without_the_package(monkeypatch, tiny, demo):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskError, match=r"lm-eval.*austeer\[lm-eval\]"):
        check_tasks(["boolq"])
    with pytest.raises(TaskError, match=r"austeer\[lm-eval\]"), steered_lm(tiny, demo[1]):
        pass
    with pytest.raises(TaskError, match=r"austeer\[lm-eval\]"):
        lm_evaluate(tiny, demo[1], ["boolq"])


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    """The package, with its caches in a folder of the test's."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'austeer[lm-eval]'")


@pytest.fixture
def local(tmp_path):
    """A folder with a task of lm-eval's in YAML, whose data is a local file."""
    rows = [{"prompt": i.prompt, "options": list(i.options), "label": i.label} for i in ITEMS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(
        f"""
task: austeer_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    )
    (folder / "elsewhere.yaml").write_text(
        "task: austeer_elsewhere\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'no such file.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: x\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n"
    )
    return folder


def log_probs(lm_eval, lm, folder):
    """lm-eval's own log-probability of each option."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=["austeer_colours"], task_manager=manager, bootstrap_iters=0)
    samples = sorted(found["samples"]["austeer_colours"], key=lambda sample: sample["doc_id"])
    return torch.tensor([[float(option[0]) for option in sample["filtered_resps"]] for sample in samples])


def test_scores_are_those_of_option_scores(lm_eval, local, lively, demo):
    task = Task("colours", "continuation", ITEMS)
    plan = random_plan(lively, "attention", 20, "shift")
    with steered_lm(lively, demo[1]) as lm:
        plain = log_probs(lm_eval, lm, local)
    with steered_lm(lively, demo[1], plan, 3.0, k=12) as lm:
        assert is_steered(lively)
        steered = log_probs(lm_eval, lm, local)
    assert not is_steered(lively)
    with steer(lively, {"a": plan}, 3.0, k=12) as steering:
        own = option_scores(lively, demo[1], task, steering, [None, "a"]).log_prob.float()
    torch.testing.assert_close(plain, own[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(steered, own[1], rtol=1e-5, atol=1e-4)
    assert (plain - steered).abs().min() > 1e-2


def test_metrics_of_every_variant(lm_eval, local, lively, demo):
    task = Task("colours", "continuation", ITEMS)
    plan = random_plan(lively, "attention", 20, "shift")
    given = {"a": (plan, 30.0), "b": (plan, -30.0, 5)}
    found = lm_evaluate(lively, demo[1], ["austeer_colours"], given, include_path=local)
    with steer(lively, {"a": plan, "b": plan}, {"a": 30.0, "b": -30.0}, k={"a": 20, "b": 5}) as steering:
        scores = option_scores(lively, demo[1], task, steering, [None, "a", "b"])
    accuracy = scores.correct(task).double().mean(-1).tolist()
    assert {name: metrics["austeer_colours"]["acc"] for name, metrics in found.items()} == {
        "unsteered": accuracy[0],
        "a": accuracy[1],
        "b": accuracy[2],
    }
    assert len(set(accuracy)) > 1, "the plans change something"
    few = lm_evaluate(lively, demo[1], ["austeer_colours"], limit=1, include_path=local)
    assert few["unsteered"]["austeer_colours"]["acc"] == float(scores.correct(task)[0, 0])


def test_tasks_that_are_none(lm_eval, local, lively, demo):
    assert check_tasks(["austeer_colours"], local) == ["austeer_colours"]
    with pytest.raises(TaskError, match=r"lm-eval.*'austeer_nothing'"):
        check_tasks(["austeer_colours", "austeer_nothing"], local)
    with pytest.raises(TaskError, match=r"lm-eval.*none"):
        check_tasks([])
    with pytest.raises(TaskError, match="nowhere"):
        check_tasks(["austeer_colours"], local / "nowhere")


def test_data_that_cannot_be_loaded(lm_eval, local, lively, demo):
    with pytest.raises(TaskError, match=r"austeer_elsewhere.*loaded"):
        lm_evaluate(lively, demo[1], ["austeer_elsewhere"], include_path=local)


def test_command(lm_eval, local, lively, demo, tmp_path, monkeypatch, capsys):
    from austeer.cli import main

    lively.save_pretrained(tmp_path / "model")
    demo[1].save_pretrained(tmp_path / "model")
    plan = random_plan(lively, "attention", 20, "shift")
    plan.save_pretrained(tmp_path / "plan")
    arguments = ["--lm-eval", "austeer_colours", "--lm-eval-path", str(local), "--plan", str(tmp_path / "plan")]
    common = ["--alpha", "30", "--model", str(tmp_path / "model"), "--device", "cpu", "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["austeer", "evaluate", *arguments, *common])
    with pytest.raises(SystemExit) as stop:
        main()
        sys.exit(0)
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "austeer_colours" in out and "unsteered" in out and "acc" in out
    found = json.loads((tmp_path / "r.json").read_text())["lm_eval"]
    assert found == lm_evaluate(lively, demo[1], ["austeer_colours"], {"plan": (plan, 30.0)}, include_path=local)
