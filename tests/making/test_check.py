"""check_pairs as a whole: what it reads, what it refuses, what a report holds."""

import copy
import json
import re

import pytest

import austeer
from austeer import Pairs, PairsError, stream_pairs
from austeer.demo.demo import load_data
from austeer.making import check_pairs, grave_note
from austeer.making.check import read_unchecked
from austeer.making.findings import LEVELS, worst
from austeer.pairs.pair import Pair

PAIRS = [Pair(f"Question {i} of the day?", f" yes {i}", f" no {i}") for i in range(30)]
TEXT_FINDINGS = [
    "blank sides",
    "equal sides",
    "prompts",
    "contradictions",
    "length",
    "last token",
    "answer words",
    "beginning of text",
    "prompt boundary",
    "context",
]


def test_good_pairs_have_no_grave_artefact(demo):
    pairs = load_data().momentum[:100]
    report = check_pairs(pairs, demo[1])
    assert [finding.name for finding in report.findings] == TEXT_FINDINGS
    assert not report.of("grave") and not report.of("warning")
    assert report.pairs == report.usable == 100 and report.control is None
    assert grave_note(pairs, demo[1]) is None
    for finding in report.findings:
        assert finding.level in LEVELS and finding.verdict and bool(finding.remedy) == (finding.level != "ok")
    assert json.loads(json.dumps(report.to_json()))["length_control"] is None


def test_blank_negatives_as_of_the_papers_own_pairs(demo, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Row {i} has how many?", "positive": f" {i}", "negative": "" if i % 4 else " 7"} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PairsError, match=r"line 2: .*'negative'"):
        austeer.load_pairs(path)
    pairs = read_unchecked(path)
    report = check_pairs(pairs, demo[1])
    assert report.pairs == 40 and report.usable == 10
    assert report["blank sides"].level == "grave" and report["blank sides"].numbers["blank"]["negative"] == 30
    assert "blank sides" in grave_note(pairs, demo[1])
    assert check_pairs(list(pairs), demo[1])["blank sides"] == report["blank sides"]


def test_a_note_of_a_stream_is_one_line(demo, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(vars(p)) + "\n" for p in PAIRS))
    note = grave_note(stream_pairs(path), demo[1])
    assert "answer words" in note and "\n" not in note and "austeer pairs check" in note
    assert grave_note(PAIRS[:1], demo[1]) is None
    assert grave_note(PAIRS, demo[1], limit=1) is None
    path.write_text(path.read_text() + "{}\n")
    assert grave_note(stream_pairs(path), demo[1]) == note, "a row that cannot be read is told elsewhere"
    chat = stream_pairs(path, chat_template=demo[1])
    assert "answer words" in grave_note(chat, demo[1], chat_template=True)


def test_it_takes_what_pairs_are_made_of(demo):
    expected = check_pairs(Pairs.of(PAIRS), demo[1]).findings
    assert check_pairs(PAIRS, demo[1]).findings == check_pairs(map(vars, PAIRS), demo[1]).findings == expected


def test_the_number_of_pairs_against_the_number_of_aus(demo, tiny):
    few = check_pairs(PAIRS[:8], demo[1], config=demo[0].config)
    assert few["number of pairs"].level == "grave"
    needed = few["number of pairs"].numbers["needed"]
    assert 2 ** -(needed - 1) <= 0.05 / (30 * 576) < 2 ** -(needed - 2), "two-sided, of one AU among all"
    enough = check_pairs(PAIRS[:needed], demo[1], config=demo[0].config)
    assert enough["number of pairs"].level == "ok"
    with pytest.raises(KeyError, match=r"'number of pairs'.*blank sides, equal sides"):
        check_pairs(PAIRS, demo[1])["number of pairs"]


def test_the_context_is_the_models_or_the_tokenizers(demo, tiny):
    assert check_pairs(PAIRS, demo[1], config=demo[0].config)["context"].numbers["limit"] == 8192
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.model_max_length = 5
    assert check_pairs(PAIRS, tokenizer)["context"].level == "warning"
    tokenizer.model_max_length = 10**30
    assert check_pairs(PAIRS, tokenizer)["context"].numbers["limit"] is None
    assert check_pairs(PAIRS, tokenizer, max_length=6)["context"].numbers["limit"] == 6


def test_a_model_without_momentum_is_measured(tiny, demo):
    report = check_pairs(PAIRS, demo[1], tiny, k=20, control_count=10, max_length=40, progress=False)
    assert set(report.control.sites) == {"attention", "ffn"} and report.control.pairs == 10
    blank = check_pairs([*PAIRS, Pair("Blank?", " yes", " ")], demo[1], tiny, k=5, control_count=40, progress=False)
    assert blank.control.pairs == 30 and blank["blank sides"].numbers["pairs"] == 1, "it is left out of the control"
    assert {"length alone, attention", "length alone, ffn"} <= {f.name for f in report.findings}
    data = json.loads(json.dumps(report.to_json()))
    assert data["length_control"]["sites"]["ffn"]["k"] == 20
    assert [f["name"] for f in data["findings"]] == [f.name for f in report.findings]


def test_equal_pairs_alone(demo, tiny):
    report = check_pairs([Pair("a", " b", " b")] * 3, demo[1], tiny, progress=False)
    assert report.usable == 0 and report["equal sides"].level == "grave" and report.control is None
    assert "length" not in {f.name for f in report.findings}


def test_what_is_refused(demo, tiny):
    with pytest.raises(PairsError, match=r"memory: .*1 pairs.*2"):
        check_pairs(PAIRS[:1], demo[1])
    with pytest.raises(PairsError, match=r"momentum: .*model"):
        check_pairs(PAIRS, demo[1], momentum=austeer.measure(tiny, demo[1], PAIRS, progress=False))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "positive": "b"}, "line 1: .*'negative'.*missing.*--negative-field"),
        ({"prompt": None, "positive": "b", "negative": "c"}, "line 1: .*'prompt'.*null"),
        ({"prompt": "a", "positive": 3, "negative": "c"}, "line 1: .*'positive'.*int"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path, row, message):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(PairsError, match=message):
        read_unchecked(path)


def test_fields_by_other_names_and_a_limit(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"q": f"q{i}", "positive": "b", "n": ""}) + "\n" for i in range(5)))
    found = read_unchecked(path, {"prompt": "q", "negative": "n"}, limit=3)
    assert list(found) == [Pair(f"q{i}", "b", "") for i in range(3)] and re.search(r"p\.jsonl$", found.source)


def test_the_gravest_level():
    assert worst("note", "grave", "ok") == "grave" and worst("ok") == "ok"
