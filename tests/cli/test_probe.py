"""``austeer probe`` writes what fit_probe makes, and ``austeer generate --when`` goes by it."""

import json
import re

import pytest

import austeer
from austeer.utils.files import kind_of
from searches import NOUNS

WANTED = [f"Is the {noun} room number {i} nice?" for i, noun in enumerate(NOUNS * 2)][:30]
OTHERS = [f"Add 7 and {i}, and then {noun}." for i, noun in enumerate(NOUNS * 6)][:100]


@pytest.fixture(scope="module")
def files(tmp_path_factory, demo_momentum):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "wanted.txt").write_text("\n".join(WANTED), encoding="utf-8")
    (folder / "others.jsonl").write_text("\n".join(json.dumps({"ask": text}) for text in OTHERS), encoding="utf-8")
    (folder / "wanted.jsonl").write_text("\n".join(json.dumps({"ask": text}) for text in WANTED), encoding="utf-8")
    demo_momentum.select("attention", k=10, operation="shift").save_pretrained(folder / "plan")
    return folder


def test_a_probe_is_fitted_and_used(files, command_line, demo):
    out = files / "p.probe"
    common = ("--model", "demo", "--device", "cpu")
    made = ("--positive", files / "wanted.jsonl", "--negative", files / "others.jsonl", "--prompt-field", "ask")
    code, text, error = command_line("probe", *common, *made, "--rate", 0.05, "--out", out, "--json", "--quiet")
    assert code == 0, error
    found, probe = json.loads(text), austeer.Probe.load(out)
    assert kind_of(out) == "austeer-probe" and (found["site"], found["layer"]) == (probe.site, probe.layer)
    assert (found["positive"], found["negative"], found["calibration"]) == (len(WANTED), len(OTHERS), len(OTHERS) // 2)
    own = austeer.fit_probe(*demo, WANTED, OTHERS, false_positive_rate=0.05)
    assert own.evidence == probe.evidence and own.threshold == pytest.approx(probe.threshold, abs=1e-3)

    asked = ("--prompt", "Is the blue room nice?", "--prompt", "Add 7 and 12, and then tea.", "--max-new-tokens", 8)
    code, text, error = command_line(
        "generate", files / "plan", *common, "--alpha", 30, "--when", out, *asked, "--json"
    )
    assert code == 0, error
    written = json.loads(text)
    first, second = zip(*written["continuations"].values())
    assert first[0] != first[1] and second[0] == second[1]
    assert (written["when"]["decided"], written["when"]["fired"]) == (2, 1)
    code, text, _ = command_line("generate", files / "plan", *common, "--alpha", 30, "--when", out, *asked)
    assert code == 0 and "fired for 1 of 2 rows" in text
    # Each prompt counts once, whatever it is written with.
    austeer.Plan.from_pretrained(files / "plan").save_pretrained(files / "other")
    for plans in ([files / "plan"], [files / "plan", files / "other"]):
        code, text, _ = command_line(
            "generate", *plans, *common, "--alpha", "20,30", "--when", out, *asked, "--json", "--report"
        )
        again = json.loads(text)["when"]
        assert code == 0 and (again["decided"], again["fired"], len(again["scores"])) == (2, 1, 2)
        assert again["scores"] == pytest.approx(written["when"]["scores"], abs=1e-3)


def test_what_is_printed(files, command_line):
    out = files / "printed.probe"
    made = ("--positive", files / "wanted.jsonl", "--negative", files / "others.jsonl", "--prompt-field", "ask")
    code, text, _ = command_line(
        "probe", "--model", "demo", "--device", "cpu", *made, "--rate", 0.1, "--layer", 9, "--out", out, "--quiet"
    )
    assert code == 0 and "layer of layer 9" in text and "at most 10.00% false positives" in text and str(out) in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("probe", "--positive", "{wanted}", "--negative", "{wanted}", "--out", "{new}"), "positive.*among negative"),
        (("probe", "--positive", "{wanted}", "--negative", "{new}", "--out", "{new}"), "new"),
        (("probe", "--positive", "{wanted}", "--negative", "{others}", "--out", "{wanted}"), "wanted.txt.*exists"),
        (("generate", "{plan}", "--prompt", "x", "--when", "{wanted}"), "wanted.txt"),
        (("generate", "{plan}", "--prompt", "x", "--when", "{new}"), "new.*no such file"),
    ],
)
def test_one_message_for_bad_input(files, command_line, arguments, named):
    places = {"wanted": files / "wanted.txt", "others": files / "others.jsonl", "new": files / "new"}
    given = [argument.format(plan=files / "plan", **places) for argument in arguments]
    code, _, error = command_line(*given, "--model", "demo", "--device", "cpu")
    assert code == 2 and error.count("error:") == 1
    assert re.search(named, " ".join(error.split()))
