"""The demonstration, whole, on a tiny random model: what it writes is what it says."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

import austeer
from austeer.cli.demo import show
from austeer.demo import demo as demonstration
from austeer.demo.figures import draw_demo
from austeer.forward.neutral import neutral_texts
from austeer.models.structure import is_steered
from austeer.statistics.intervals import mean_interval
from austeer.tasks import log_odds, side_effects
from bench.published import demo as published
from bench.published import numbers
from bench.published.load import load
from places import ROOT


@pytest.fixture
def done(tiny, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "KS", (5,))
    monkeypatch.setattr(demonstration, "TIMED_K", 5)
    said = []
    return tiny, *demonstration.run(tiny, demo[1], tmp_path, say=said.append), said, tmp_path


def test_the_demo_is_consistent_with_what_it_writes(done, demo):
    tiny, result, momentum, plan, said, out = done
    assert austeer.Plan.from_pretrained(out / "plan") == plan
    assert austeer.Momentum.load(out / "momentum.safetensors").pairs == momentum.pairs == result.pairs["momentum"]
    assert not is_steered(tiny)
    tokenizer, data, chosen = demo[1], demonstration.load_data(), result.chosen

    # the ranking is as stable as the halves of the pairs say
    first, second = momentum.halves()
    tops = [set(half.select("ffn", k=5).keys()) for half in (first, second)]
    assert result.stability["ffn, k=5"] == len(tops[0] & tops[1]) / 5 and len(result.stability) == 2

    # chosen on the selection part, within the limit on the side effect
    assert chosen == result.trials[0] and chosen.effect == max(t.effect for t in result.trials if t.items == 45)
    own = momentum.select(chosen.site, k=chosen.k, operation=chosen.operation)
    assert own == replace(plan, evidence=None)
    assert {(t.site, t.operation, t.k) for t in result.trials} == {
        (site, operation, 5) for site in ("attention", "ffn") for operation in ("scale", "push", "shift")
    }
    assert all(t.kl <= result.max_kl for t in result.trials)
    tuning = data.task(data.tuning)
    with austeer.steer(tiny, plan, chosen.alpha):
        change = log_odds(tiny, tokenizer, data.tuning)
    change -= log_odds(tiny, tokenizer, data.tuning)
    assert chosen.effect == pytest.approx(float(change.mean()), rel=1e-4, abs=1e-6)
    assert (chosen.low, chosen.high) == pytest.approx(mean_interval(change, [i.group for i in tuning]), abs=1e-5)

    # the evidence has every strength that was tried, and what it did to held-out pairs
    evidence = plan.evidence
    assert evidence.alpha == chosen.alpha and evidence.tested[-1].effect == result.held_out[0].effect
    assert [row.alpha for row in evidence.tested[:-1]] == sorted(
        t.alpha for t in result.trials if (t.site, t.operation, t.k) == (chosen.site, chosen.operation, chosen.k)
    )
    timed = result.timings[f"auto, {plan.operation}, k={len(plan)}"]
    assert evidence.overhead[0].percent == 100 * (timed.ratio - 1)

    assert list(result.timings)[:2] == ["unsteered", "unsteered again"] and len(result.timings) == 7
    assert all(timing.seconds > 0 for timing in result.timings.values())
    assert set(map(len, result.generations.values())) == {len(demonstration.PROMPTS)}
    assert any("momentum" in line for line in said) and any("chosen" in line for line in said)

    draw_demo(result, out / "demo.png")
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    _check_held_out(tiny, tokenizer, data, result, momentum)
    _check_published(result, out)


def _check_held_out(tiny, tokenizer, data, result, momentum):
    """The best of each operation beside random AUs: each row is what steering so does to the held-out part."""
    base = log_odds(tiny, tokenizer, data.held_out)
    assert result.unsteered.log_odds == pytest.approx(float(base.mean()), abs=1e-6)
    assert result.unsteered.accuracy == float((base > 0).double().mean())
    ours, drawn = result.held_out[:3], result.held_out[3:]
    assert [row.method for row in result.held_out] == ["momentum"] * 3 + ["random"] * 3
    assert {row.operation for row in ours} == {"scale", "push", "shift"}
    first = ours[0]
    assert (first.operation, first.site, first.k, first.alpha) == (
        *(result.chosen.operation, result.chosen.site, result.chosen.k),
        result.chosen.alpha,
    )
    topics = [item.group for item in data.task(data.held_out)]
    for row in (first, ours[-1]):
        plan = momentum.select(row.site, k=row.k, operation=row.operation)
        with austeer.steer(tiny, plan, row.alpha):
            change = log_odds(tiny, tokenizer, data.held_out) - base
        assert row.effect == pytest.approx(float(change.mean()), rel=1e-4, abs=1e-6)
        assert (row.low, row.high) == pytest.approx(mean_interval(change, topics), rel=1e-3, abs=1e-5)
    # Random AUs stand in the chosen ones' place, as far from the limit as these.
    texts = neutral_texts()[:6]
    for seed, row in enumerate(drawn):
        assert (row.site, row.operation, row.k) == (first.site, first.operation, first.k)
        plan = austeer.baselines.random_plan(momentum, row.site, row.k, seed, row.operation)
        with austeer.steer(tiny, {"a": plan}, {"a": row.alpha / result.chosen.fraction}) as steering:
            ((kl, _),) = side_effects(tiny, tokenizer, texts, steering, ["a"]).mean()
        assert kl <= result.max_kl * 1.001


def _check_published(result, out):
    """The result file gives what the command prints, and numbers by name."""
    folder = out / "results" / "cpu"
    folder.mkdir(parents=True)
    (folder / "demo-2000-01-01.json").write_text(json.dumps(result.to_json()))
    (read,) = load(folder.parent)
    printed = io.StringIO()
    show(result, Console(file=printed, width=1000, highlight=False, color_system=None, soft_wrap=True))
    lines = [line.rstrip() for line in printed.getvalue().strip("\n").splitlines()]
    assert published.printed(read.content).splitlines()[1:-1] == lines
    for name in ("momentum shift, ", "momentum push, ", "momentum scale, ", "random "):
        assert any(line.startswith(name) for line in lines)
    values = numbers.values(load(folder.parent))
    rows = {row.operation: row for row in result.held_out if row.method == "momentum"}
    assert values["cpu.demo.chosen.effect"] == result.held_out[0].effect
    assert values["cpu.demo.shift.over.scale"] == rows["shift"].effect / rows["scale"].effect
    drawn = [row.effect for row in result.held_out if row.method == "random"]
    assert values["cpu.demo.random.effect"] == pytest.approx(sum(drawn) / 3)
    assert (values["cpu.demo.random.low"], values["cpu.demo.random.high"]) == (min(drawn), max(drawn))


def test_parts_of_the_pairs_are_all_of_them_and_disjoint_also_in_topics():
    data = demonstration.load_data()
    parts = [set(part) for part in (data.momentum, data.tuning, data.held_out)]
    assert not parts[0] & parts[1] and not parts[2] & (parts[0] | parts[1])
    assert not set(neutral_texts()) & set(neutral_texts("heldout"))
    rows = (ROOT / "austeer" / "data" / "demo_pairs.jsonl").read_text(encoding="utf-8").count("\n")
    assert sum(map(len, (data.momentum, data.tuning, data.held_out))) == rows

    task = data.task(data.held_out)
    assert len(task) == len(data.held_out) and len({item.group for item in task}) == 11
    assert [item.options for item in task] == [(pair.positive, pair.negative) for pair in data.held_out]
    selection = {item.group for part in (data.momentum, data.tuning) for item in data.task(part)}
    assert not selection & {item.group for item in task}
