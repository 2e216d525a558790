"""tune() and compare(): nothing is chosen by the test part, the same search goes on, and what comes out steers."""

import json
from contextlib import nullcontext

import pytest
import torch

import austeer
from austeer import Momentum, Profile, profile
from austeer.errors import FileFormatError, GradientError, SelectionError, TaskError
from austeer.pairs.pairs import Pairs
from austeer.tasks import Item, Task
from austeer.tuning import compare, tune
from austeer.tuning import scorer as scoring
from austeer.tuning.compare import parse_methods
from austeer.tuning.data import Parts, digest_of, split
from austeer.tuning.schedule import Costs
from searches import NEUTRAL, NOUNS, material_of, words

FEW = {"ks": (1, 4), "max_kl": 0.05, "neutral": NEUTRAL, "rank": "momentum"}


def task_of(count: int = 48) -> Task:
    """Three items of each group: what stays together."""
    adjectives = ["old", "new", "tall"]
    items = [
        Item(f"The {adjectives[i % 3]} {NOUNS[i // 3 % 16]} was", (" good", " bad"), i % 2, group=NOUNS[i // 3 % 16])
        for i in range(count)
    ]
    return Task("words", "choice", tuple(items), "words.jsonl")


@pytest.fixture(scope="module")
def loaded(one_lively, demo):
    return one_lively, demo[1]


@pytest.fixture(scope="module")
def tuned(loaded, tmp_path_factory):
    """What the search of all the defaults finds, and the folder that it keeps its record in."""
    folder = tmp_path_factory.mktemp("tuned")
    return tune(*loaded, split(task_of()), folder=folder, **FEW), folder


def test_a_users_neutral_texts_are_for_choosing_and_for_the_report_in_turns(tuned):
    found = tuned[0].settings["neutral"]
    assert found == {"tune": digest_of(NEUTRAL[::2]), "test": digest_of(NEUTRAL[1::2])}
    assert found["tune"] != found["test"]


def test_the_evidence_has_the_side_effect_of_what_was_tried_at_the_limit(tuned):
    *tried, held_out = tuned[0].plan.evidence.tested
    chosen = tuned[0].chosen
    at_limit = [t.kl for t in tuned[0].trials if t.fraction == 1 and t.alpha == chosen.alpha]
    assert held_out.side_effect is not None and tried[-1].side_effect in at_limit


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_share_no_group_and_say_what_they_are():
    parts = split(task_of(), seed=3)
    pairs = {p.prompt for p in parts.measure}
    groups = [{i.group for i in part} for part in (parts.tune, parts.test)]
    groups.append({item.group for item in task_of() if item.prompt in pairs})
    assert sum(map(len, groups)) == len(set.union(*groups)) == 16
    assert [len(parts.measure), len(parts.tune), len(parts.test)] == [24, 12, 12]
    said = parts.to_json()
    assert said["seed"] == 3 and said["measure"]["pairs"] == 24 and said["test"]["digest"] == parts.test.digest()
    other = split(task_of(), seed=4)
    assert other.to_json()["test"]["digest"] != said["test"]["digest"]


def test_with_a_momentum_all_of_the_data_is_tuned_and_tested_on():
    parts = split(task_of(), measured=True)
    assert parts.measure is None and len(parts.tune) + len(parts.test) == 48
    assert split(parts, measured=True) is parts
    few = split(task_of(), most=(10, 6, 4))
    assert [len(few.measure), len(few.tune), len(few.test)] == [10, 6, 4]


def test_parts_that_cannot_be_are_refused():
    with pytest.raises(TaskError, match=r"\d+ groups.*'book'"):
        Parts(None, task_of(), task_of())
    with pytest.raises(TaskError, match="without pairs"):
        split(split(task_of(), measured=True))
    with pytest.raises(TaskError, match=r"too few.*'tune'"):
        split(Task("t", "choice", words().items[:3]))


# --- tune ------------------------------------------------------------------------------------------------------------


def test_the_plan_that_comes_out_has_the_effect_that_is_said(loaded, tuned):
    model, tokenizer = loaded
    result, parts = tuned[0], split(task_of())
    best = result.held_out[0]
    assert (best.site, best.operation, best.k) == (result.chosen.site, result.chosen.operation, result.chosen.k)
    scores = []
    for context in (nullcontext(), austeer.steer(model, result.plan, result.alpha)):
        with context:
            scores.append(austeer.tasks.option_scores(model, tokenizer, parts.test).margins(parts.test)[0])
    assert float((scores[1] - scores[0]).mean()) == pytest.approx(best.effect, abs=1e-4)
    assert best.accuracy == float((scores[1] > 0).double().mean())
    assert result.unsteered.accuracy == float((scores[0] > 0).double().mean())
    # its evidence holds every strength of it that was tried, and the recommended one
    evidence = result.plan.evidence
    assert evidence.alpha == result.alpha and evidence.tested[-1].side_effect == best.kl
    assert {t.operation for t in result.held_out} == {"scale", "push", "shift"}
    assert json.loads(json.dumps(result.to_json()))["settings"]["data"]["test"]["items"] == 12


def test_nothing_is_chosen_by_the_test_part(loaded, tuned):
    """Other labels in the test part change the figures and nothing else."""
    parts = split(task_of())
    turned = Task("words", "choice", tuple(Item(i.prompt, i.options, 1 - i.label, group=i.group) for i in parts.test))
    results = [tuned[0], tune(*loaded, Parts(parts.measure, parts.tune, turned), **FEW)]
    assert results[0].chosen == results[1].chosen and results[0].trials == results[1].trials
    assert results[0].plan.keys() == results[1].plan.keys() and results[0].alpha == results[1].alpha
    assert results[0].held_out[0].effect == pytest.approx(-results[1].held_out[0].effect, abs=1e-5)


def cost(monkeypatch, token):
    """So many seconds for a token of an item; everything else takes no time."""
    monkeypatch.setattr(scoring.Scorer, "costs", Costs(0.0, 0.0, token))


@pytest.mark.parametrize("rank, budget", [("momentum", 100), ("effect", 400)])  # effects take three passes more
def test_a_budget_measures_as_many_pairs_as_it_allows(loaded, tmp_path, monkeypatch, rank, budget):
    task = task_of(96)
    pairs = split(task).measure
    length = sum(len(loaded[1](p.prompt + p.positive)["input_ids"]) for p in pairs) / len(pairs)
    cost(monkeypatch, 30 / (2 * length * 30.5))  # 30 s of 100, for 30 pairs
    options = FEW | {"sites": ("ffn",), "operations": ("shift",), "budget": budget, "rank": rank}
    results = [tune(*loaded, task, **options, folder=tmp_path)]
    cost(monkeypatch, 1e-9)  # goes on with as many, whatever the machine does by then
    results.append(tune(*loaded, task, **options, folder=tmp_path))
    for result in results:
        assert result.settings["data"]["measure"]["pairs"] == 30 < len(pairs)
        assert result.settings["data"]["tune"]["items"] == 24
    momentum = austeer.Momentum.load(tmp_path / "momentum.safetensors")
    assert momentum.pairs == 30 and results[0].chosen == results[1].chosen
    everything = tune(*loaded, task, **options)
    assert everything.settings["data"]["measure"] == split(task, most=(400, 200, 400)).to_json()["measure"]


def test_a_budget_too_small_to_measure_is_refused_before_it_is_spent(loaded, tmp_path, monkeypatch):
    cost(monkeypatch, 1.0)
    monkeypatch.setattr("austeer.tuning.preparation.measure", None)
    with pytest.raises(TaskError, match=r"budget.*60 s.*20 pairs"):
        tune(*loaded, task_of(), **FEW, budget=60, folder=tmp_path)


def test_a_mix_of_two_sites_is_tried_with_a_strength_each(loaded):
    result = tune(*loaded, task_of(), operations=("shift",), **FEW)
    mixed = [t for t in result.trials if t.site == "attention+ffn"]
    alone = [t for t in result.trials if t.site != "attention+ffn"]
    assert {t.site for t in alone} == {"attention", "ffn"}
    sites = ("attention", "ffn")
    best = {site: max((t for t in alone if t.site == site), key=lambda t: (t.items, t.effect)) for site in sites}
    if all(t.effect > 0 for t in best.values()):
        (mix,) = mixed
        assert set(mix.alpha) == {"attention", "ffn"} and mix.k == sum(t.k for t in best.values())
        ratio = mix.alpha["attention"] / mix.alpha["ffn"]
        assert ratio == pytest.approx(best["attention"].alpha / best["ffn"].alpha)
        assert mix.kl <= FEW["max_kl"]
    else:
        assert not mixed
    without = tune(*loaded, task_of(), operations=("shift",), mix=False, **FEW)
    assert not [t for t in without.trials if t.site == "attention+ffn"]


def test_the_same_command_goes_on_and_another_is_refused(loaded, tuned, monkeypatch):
    first, folder = tuned
    monkeypatch.setattr(scoring, "option_scores", None)  # nothing may be run any more
    monkeypatch.setattr(scoring, "side_effects", None)
    again = tune(*loaded, split(task_of()), folder=folder, **FEW)
    assert again.chosen == first.chosen and again.held_out == first.held_out and again.plan == first.plan
    with pytest.raises(FileFormatError, match=r"max_kl 0\.05.*0\.06"):
        tune(*loaded, split(task_of()), folder=folder, **(FEW | {"max_kl": 0.06}))
    with pytest.raises(FileFormatError, match=r"another search.*data"):
        tune(*loaded, task_of(45), folder=folder, **FEW)
    with pytest.raises(FileFormatError, match=r"another search.*neutral"):
        tune(*loaded, split(task_of()), folder=folder, **(FEW | {"neutral": NEUTRAL[:2]}))


def test_pairs_and_a_momentum_of_other_pairs(loaded):
    model, tokenizer = loaded
    momentum = material_of(model, tokenizer).momentum
    pairs = Pairs.of([(f"They say the {noun} is", " good", " bad") for noun in NOUNS])
    result = tune(model, tokenizer, pairs, momentum=momentum, sites=("ffn",), operations=("ablate",), **FEW)
    assert result.plan.operation == result.chosen.operation == "ablate"
    assert "measure" not in result.settings["data"] and result.plan.sites == ("ffn",)
    assert result.plan.pairs == momentum.pairs
    with pytest.raises(SelectionError, match=r"'layer'.*ffn"):
        tune(model, tokenizer, pairs, momentum=momentum, sites=("layer",), **FEW)


def test_more_aus_than_a_small_model_has(loaded):
    result = tune(*loaded, task_of(), sites=("ffn",), operations=("shift",), **(FEW | {"ks": (5000,)}))
    assert result.plan.model.layers * result.plan.model.widths["ffn"] == len(result.plan)


def test_a_setting_that_derails_is_not_chosen_and_is_marked(loaded, tuned, monkeypatch):
    first = tuned[0]
    worse = (first.writing.settings[0].name, first.alpha)
    monkeypatch.setattr(
        "austeer.tuning.writing.derailment", lambda found, _: "repeats" if (found.name, found.alpha) == worse else ""
    )
    result = tune(*loaded, split(task_of()), **FEW)
    assert [(w.name, w.alpha) for w in result.writing.set_aside] == [worse]
    assert (result.writing.settings[0].name, result.alpha) != worse and result.writing.settings[0].alpha == result.alpha
    assert result.trials[0] == first.chosen and result.chosen == result.trials[1]
    assert [row.derailed for row in result.held_out] == [w.derailed for w in result.writing.settings]
    assert json.loads(json.dumps(result.to_json()))["writing"]["set_aside"][0]["derailed"] == "repeats"


# --- compare ---------------------------------------------------------------------------------------------------------


def test_every_method_is_brought_to_the_same_limit_and_reported(loaded, tmp_path):
    before = {name: t.clone() for name, t in loaded[0].state_dict().items()}
    options = {"ks": (4,), "max_kl": 0.05, "neutral": NEUTRAL, "layers": (0, 2), "folder": tmp_path}
    methods = ("momentum", "random:shift", "all:scale", "difference:scale", "caa", "ablation", "sadi")
    result = compare(*loaded, task_of(), methods=methods, **options)
    rows = {(row.method, row.operation): row for row in result.held_out}
    assert set(rows) == {
        *(("momentum", operation) for operation in ("scale", "push", "shift")),
        *(("random", "shift"), ("all", "scale"), ("difference", "scale"), ("caa", "shift"), ("sadi", "scale")),
        ("ablation", "ablate"),
    }
    assert all(trial.kl <= 0.05 for trial in result.trials)
    for row in (rows["caa", "shift"], rows["ablation", "ablate"]):
        assert (row.layers, row.k) == (1, 32)
    assert rows["all", "scale"].k == rows["all", "scale"].layers * 32
    assert set(result.cost) == {"unsteered", "unsteered again", *(row.name for row in result.held_out)}
    assert result.cost["unsteered"].ratio == 1
    first, *others = result.held_out
    assert first.behind is None
    for row in others:
        assert row.behind[0] == pytest.approx(first.effect - row.effect, abs=1e-9)
        assert row.behind[1] <= row.behind[0] <= row.behind[2]
    assert json.loads(json.dumps(result.to_json()))["held_out"][0]["method"] == first.method
    again = compare(*loaded, task_of(), methods=methods, **options)
    assert again.held_out == result.held_out and again.cost == result.cost
    assert not austeer.is_steered(loaded[0])
    assert all(torch.equal(t, before[name]) for name, t in loaded[0].state_dict().items())


def test_methods_by_gradients_are_given_effects_and_a_profile(loaded, tmp_path, cache):
    options = {"ks": (4,), "max_kl": 0.05, "neutral": NEUTRAL, "layers": (1,), "sites": ("ffn",), "timed": False}
    methods = ("effect", "newton", "trained")
    result = compare(*loaded, task_of(), methods=methods, folder=tmp_path, **options)
    assert {row.method for row in result.held_out} == {*methods}
    assert all(0 < trial.kl <= 0.05 for trial in result.trials)
    (profile,), momentum = (cache / "profiles").iterdir(), Momentum.load(tmp_path / "momentum.safetensors")
    assert set(momentum.sites) == set(Profile.load(profile).rows) == {"ffn", "layer"} and momentum.effects is not None
    assert Profile.load(profile).sources[0][0].startswith("2 texts")  # those that strengths are chosen on
    before = profile.stat().st_mtime_ns
    assert compare(*loaded, task_of(), methods=methods, folder=tmp_path, **options).held_out == result.held_out
    assert profile.stat().st_mtime_ns == before


def test_tune_by_effect_tries_what_is_predicted_to_work(loaded, tmp_path, cache, monkeypatch):
    """Its settings start at the strength that the profile predicts, and the plan has its dose."""
    options = {"ks": (2, 4), "max_kl": 0.05, "neutral": NEUTRAL, "folder": tmp_path}
    monkeypatch.setattr("austeer.tuning.promising.MOST", 3)
    result = tune(*loaded, task_of(), sites=("attention", "ffn"), **options)
    assert {(t.method, t.operation) for t in result.trials} == {("effect", "shift")}
    assert {t.detail for t in result.trials} <= {"newton", "newton, sites together"}
    assert len({(t.site, t.k, t.detail) for t in result.trials}) == 3, "of six, counting both sites together"
    assert result.plan.rank == "effect" and len(result.plan) == result.chosen.k
    assert not result.plan.dose.measured, "the limit is on other text than that of the dose"
    other = profile(*loaded, ["attention"], NEUTRAL, draws=8, progress=False)
    with pytest.raises(SelectionError, match=r"profile: found one of attention, expected one of ffn, too"):
        tune(*loaded, task_of(), sites=("attention", "ffn"), profile=other, ks=(2,), neutral=NEUTRAL)
    with pytest.raises(TaskError, match=r"operations: found scale by effect, expected 'shift' alone.*rank='momentum'"):
        tune(*loaded, task_of(), operations=["scale"], rank="effect")
    with pytest.raises(TaskError, match=r"profile: .*rank 'momentum'"):
        tune(*loaded, task_of(), rank="momentum", profile=other)
    with pytest.raises(TaskError, match=r"rank: found 'best', expected 'momentum' or 'effect'"):
        tune(*loaded, task_of(), **{**options, "rank": "best"})


def test_what_knows_no_effects_is_searched_by_momentum(loaded):
    """Other operations than shift, and momentum without effects; with them, at sites that it has."""
    model, tokenizer = loaded
    options = {"ks": (2,), "max_kl": 0.05, "neutral": NEUTRAL}
    result = tune(*loaded, task_of(), operations=("push",), sites=("ffn",), **options)
    assert {(t.method, t.operation) for t in result.trials} == {("momentum", "push")}
    pairs, others = (
        Pairs.of([(f"They {verb} the {noun} is", " good", " bad") for noun in NOUNS]) for verb in ("say", "think")
    )
    methods = []
    for effects in (False, True):
        momentum = austeer.measure(model, tokenizer, others, ["ffn"], effects=effects, progress=False)
        result = tune(model, tokenizer, pairs, momentum=momentum, sites=None if effects else ["ffn"], **options)
        methods.append({(t.method, t.site) for t in result.trials})
    assert methods == [{("momentum", "ffn")}, {("effect", "ffn")}]
    elsewhere = austeer.measure(model, tokenizer, others, ["layer"], effects=True, progress=False)
    with pytest.raises(SelectionError, match=r"momentum: found one of layer, expected one of attention, neuron"):
        tune(model, tokenizer, pairs, momentum=elsewhere, **options)
    for empty in ("sites", "operations"):
        with pytest.raises(TaskError, match=f"{empty}: found none"):
            tune(model, tokenizer, pairs, **options, **{empty: ()})


def test_a_model_without_a_backward_pass_is_told_what_to_do(loaded, monkeypatch):
    def broken(*args, **options):
        raise NotImplementedError("none here")

    monkeypatch.setattr(torch.autograd, "backward", broken)
    with pytest.raises(GradientError, match=r"no backward pass in this model \(none here\).*rank='momentum'"):
        tune(*loaded, task_of(), ks=(2,), neutral=NEUTRAL)
    with pytest.raises(GradientError, match=r"no backward pass.*other methods than effect, newton and trained"):
        compare(*loaded, task_of(), methods=["momentum", "newton"], ks=(2,), neutral=NEUTRAL)


def test_parse_methods():
    assert parse_methods(["momentum", "caa"]) == {
        "momentum": ("scale", "push", "shift"),
        "caa": ("scale", "push", "shift"),
    }
    assert parse_methods(["random:shift", "random:scale"]) == {"random": ("shift", "scale")}
    for wrong in ("repeng", "random:turn", ""):
        with pytest.raises(TaskError, match=f"{wrong}.*METHOD:OPERATION.*momentum, random"):
            parse_methods([wrong])
    with pytest.raises(TaskError, match=r"methods.*none"):
        parse_methods([])
