"""Two results side by side: what changed beyond noise is told, what did not is not, and unlike runs are named first."""

import copy
import io
import json

import pytest
from rich.console import Console

import synthetic_results
from bench import changes
from bench.changes import compare

MAIN = "eager, batch 1, ffn, scale, k=100, 30 layers, prompt of 32 tokens"


@pytest.fixture
def before():
    return json.loads(json.dumps(synthetic_results.inference(noise=0.6)))  # no part in it twice


@pytest.fixture
def after(before):
    return copy.deepcopy(before)


def shown(found):
    console = Console(file=io.StringIO(), width=200)
    changes.show(found, console)
    return console.file.getvalue()


def set_ratio(content, variant, percent, half=0.5, case=0, metric="token"):
    row = content["cases"][case]["variants"][variant]
    row[metric]["ratio"] |= {"median": 1 + percent / 100, "low": 1 + (percent - half) / 100}
    row[metric]["ratio"]["high"] = 1 + (percent + half) / 100


def test_a_result_beside_itself_has_no_changes(before, after):
    found = compare(before, after)
    assert not found.notes and not found.events and not found.beyond_noise
    rows = [row for case in before["cases"] for name, row in case["variants"].items() if name != "unsteered again"]
    timed = sum(metric in row for row in rows for metric in ("token", "first_token"))
    assert len(found.timed) == timed > 100
    assert f"0 times changed beyond noise; {timed} did not" in shown(found)


@pytest.mark.parametrize(
    "percent, half, noise, verdict",
    [
        (5.0, 0.5, 0.6, "dearer"),  # from 0.4 +- 0.6 %
        (-4.0, 0.5, 0.6, "cheaper"),
        (1.2, 0.5, 0.6, "within noise"),  # intervals meet
        (5.0, 4.2, 0.6, "within noise"),
        (5.0, 0.5, 5.0, "within noise"),  # of either run
        (5.0, 0.5, 4.5, "dearer"),
    ],
)
@pytest.mark.parametrize("noisy", ["before", "after"])
def test_a_ratio_changes_where_intervals_part_by_more_than_noise(before, after, percent, half, noise, verdict, noisy):
    set_ratio(after, "columns", percent, half)
    {"before": before, "after": after}[noisy]["cases"][0]["noise"]["token"] = noise / 100
    found = compare(before, after)
    (change,) = (c for c in found.timed if (c.case, c.variant, c.metric) == (MAIN, "columns", "token"))
    assert change.verdict == verdict
    assert found.beyond_noise == ([change] if verdict != "within noise" else [])
    assert change.unit == "ratio" and change.before["median"] == pytest.approx(1.004)
    assert change.after["high"] == pytest.approx(1 + (percent + half) / 100)


def test_what_changed_is_shown_before_and_after(before, after):
    set_ratio(after, "columns", 5.0)
    set_ratio(after, "sparse hook", 2.0, metric="first_token")
    found = compare(before, after)
    text, content = shown(found), json.loads(json.dumps(found.to_json()))
    assert content["beyond_noise"] == 2 and len(content["timed"]) == len(found.timed)
    for part in ("+0.4 %", "-0.2 to +1.0", "+5.0 %", "+4.5 to +5.5", "dearer", "+4.6 points", "cheaper", "first token"):
        assert part in text
    assert "2 times changed beyond noise" in text and "fused" not in text


def slower(content, times, variants=None):
    """Everything takes ``times`` as long; the ratios stay."""
    for case in content["cases"]:
        for name, row in case["variants"].items():
            if "token" in row and (variants is None or name in variants):
                for key in ("median", "low", "high"):
                    row["token"]["seconds"][key] *= times


def test_the_unsteered_model_s_seconds_are_compared_on_one_machine(before, after):
    slower(after, 1.5)
    found = compare(before, after)
    assert {(c.variant, c.unit, c.verdict) for c in found.beyond_noise} == {("unsteered", "seconds", "dearer")}
    assert len(found.beyond_noise) == len(before["cases"])
    assert "x 1.50" in shown(found)
    slower(after, 1 / 1.5 * 1.1)
    assert not compare(before, after).beyond_noise, "quartiles meet"


@pytest.mark.parametrize("key, value", [("device", "Another CPU"), ("threads", 8)])
def test_on_another_machine_seconds_are_not_compared_but_ratios_are(before, after, key, value):
    slower(after, 1.5)
    set_ratio(after, "columns", 5.0)
    after["environment"][key] = value
    found = compare(before, after)
    assert [(c.variant, c.unit) for c in found.beyond_noise] == [("columns", "ratio")]
    assert all(c.unit == "ratio" for c in found.timed)
    assert len(found.notes) == 1 and found.notes[0].endswith(f"-> {value}; times in seconds are not compared")
    assert shown(found).startswith(f"note: {key}: ")


def test_another_model_dtype_setting_or_version_is_said_first(before, after):
    after["model"] |= {"name": "other [bold]", "dtype": "bfloat16"}
    after["environment"]["packages"] = {"torch": "2.14.0", "triton": "3.8"}
    after["settings"]["tokens"] = 16
    after["environment"]["python"] = "3.12.1"
    set_ratio(after, "columns", 5.0)
    found = compare(before, after)
    assert found.notes == [
        "python: none -> 3.12.1",
        "model name: synthetic-135M -> other [bold]",
        "model dtype: float32 -> bfloat16",
        "version of torch: 2.13.0 -> 2.14.0",
        "version of triton: none -> 3.8",
        "setting tokens: 8 -> 16",
    ]
    lines = shown(found).splitlines()
    assert "note: model name: synthetic-135M -> other [bold]" in lines[:6]
    assert all(line.startswith("note: ") for line in lines[:6]) and not lines[6].startswith("note: ")


def test_incomplete_and_noisy_runs_are_said_first(before, after):
    before["complete"] = False
    after["cases"][0]["verdicts_possible"]["token"] = False
    after["cases"][0]["noise"]["token"] = 0.034
    assert compare(before, after).notes == [
        f"the run before is incomplete: it was stopped after {len(before['cases'])} cases",
        f"{MAIN}: the run after is too noisy for verdicts on the time to each token "
        "(two unsteered runs differ by up to 3.4%)",
    ]


def test_cases_and_variants_that_come_and_go(before, after):
    del after["cases"][1], before["cases"][2]
    del after["cases"][0]["variants"]["pyvene"], before["cases"][0]["variants"]["fused"]
    found = compare(before, after)
    assert found.events == [
        f"{MAIN}: pyvene is gone",
        f"{MAIN}: fused is new",
        f"{MAIN.replace('batch 1', 'batch 8')}: gone",
        f"{MAIN.replace('eager', 'compile')}: new",
    ]
    assert not found.beyond_noise


def test_variants_that_are_wrong_or_skipped_now(before, after):
    row = after["cases"][0]["variants"]["columns"]
    row.clear()
    row |= {"status": "wrong", "reason": "logits differ [0, 1]", "ours": True, "peer": False}
    after["cases"][0]["variants"]["repeng"] = copy.deepcopy(after["cases"][0]["variants"]["pyvene"])
    found = compare(before, after)
    assert found.events == [
        f"{MAIN}: columns: measured -> wrong (logits differ [0, 1])",
        f"{MAIN}: repeng: skipped -> measured",
    ]
    assert "wrong (logits differ [0, 1])" in shown(found)
    assert not any((c.case, c.variant) == (MAIN, "columns") for c in found.timed)


def test_counts_have_no_noise(before, after):
    after["cases"][0]["variants"]["columns"] |= {"bytes": 5.5e8, "launches": 120.0, "held_bytes": 4096}
    before["cases"][0]["variants"]["columns"] |= {"launches": 90.0, "held_bytes": None}
    assert compare(before, after).events == [
        f"{MAIN}: columns: launches 90 -> 120",
        f"{MAIN}: columns: bytes moved 540,000,000 -> 550,000,000",
    ]


def test_cases_that_are_alike_are_matched_in_their_order(before, after):
    for content in (before, after):
        content["cases"].append(copy.deepcopy(content["cases"][0]))
    set_ratio(after, "columns", 5.0, case=-1)
    (change,) = compare(before, after).beyond_noise
    assert change.case == f"{MAIN} (2)"
