"""Effects, the selection by them and strengths in nats, as a user of the commands meets them."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import austeer
from austeer import Plan, PlanError, SteeringError
from austeer.export import export_checkpoint
from austeer.momentum.by_effect import best_sites
from austeer.overview.overview import of_momentum
from austeer.plans.dose_table import dose_rows
from dense_formula import formula_logits, logits, random_plan
from naive_momentum import numbered_pairs

SITES = ["attention", "ffn"]


@pytest.fixture(scope="module")
def model(tiny_of):
    return tiny_of("llama")


@pytest.fixture(scope="module")
def momentum(model, demo):
    return austeer.measure(model, demo[1], numbered_pairs(24), SITES, effects=True, progress=False)


@pytest.fixture(scope="module")
def profile(model, demo):
    return austeer.profile(model, demo[1], SITES, draws=64, progress=False)


@pytest.fixture(scope="module")
def made(model, demo, momentum, profile, tmp_path_factory):
    """A folder with the model, pairs, momentum with and without effects, a profile and plans of several kinds."""
    folder = tmp_path_factory.mktemp("effects")
    model.save_pretrained(folder / "model")
    demo[1].save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(vars(pair)) + "\n" for pair in numbered_pairs(24)))
    (folder / "rows.jsonl").write_text('{"prompt": "The sky is", "options": [" blue", " green"], "label": 0}\n')
    momentum.save(folder / "effects.momentum")
    austeer.measure(model, demo[1], numbered_pairs(24), SITES, progress=False).save(folder / "plain.momentum")
    profile.save(folder / "m.profile")
    chosen = momentum.select("attention", 5, profile=profile)
    chosen.save_pretrained(folder / "dosed")
    momentum.select("ffn", 5, profile=profile).save_pretrained(folder / "other")
    chosen.with_dose(None).save_pretrained(folder / "bare")
    random_plan(model, "attention", 5, "scale").save_pretrained(folder / "scale")
    return folder


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def run(place, command_line):
    """A command, that has to end well: what it prints."""

    def ask(*arguments):
        code, printed, error = command_line(*arguments)
        assert code == 0, error
        return printed

    return ask


ON_MODEL = ("--model", "model", "--device", "cpu")


# --- measure ---------------------------------------------------------------------------------------------------------


def test_measured_effects_are_the_library_s(run, momentum, tmp_path):
    found = json.loads(run("measure", "pairs.jsonl", *ON_MODEL, "--effects", "--out", tmp_path / "m", "--json"))
    assert found["effects"] == SITES and found["report"]["seconds"]["effects"] > 0
    again = austeer.Momentum.load(tmp_path / "m")
    for site in SITES:
        torch.testing.assert_close(again.effect(site), momentum.effect(site), rtol=1e-4, atol=1e-6)
    text = run("measure", "pairs.jsonl", *ON_MODEL, "--effects", "--out", tmp_path / "m", "--force")
    assert re.search(r"effects of attention, ffn, \d+\.\d s", text)
    assert json.loads(run("measure", "pairs.jsonl", *ON_MODEL, "--out", tmp_path / "n", "--json"))["effects"] == []


def test_a_dry_run_says_what_effects_add(run):
    found = json.loads(run("measure", "pairs.jsonl", *ON_MODEL, "--effects", "--dry-run", "--json"))
    assert [note for note in found["notes"] if "--effects" in note] and found["strategy"] == "resident"


# --- select ----------------------------------------------------------------------------------------------------------

BY_EFFECT = ("select", "effects.momentum", "--profile", "m.profile")


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (("--site", "auto", "--kl", 0.05), {"site": "auto", "kl": 0.05}),
        (("--site", "auto", "--k", 7, "--step", "difference"), {"site": "auto", "k": 7, "step": "difference"}),
        (("--site", "attention,ffn", "--kl", 0.1), {"site": SITES, "kl": 0.1}),
        (("--site", "ffn", "--kl", 0.1), {"site": "ffn", "kl": 0.1}),
        (("--site", "ffn", "--k", 4, "--rank", "effect"), {"site": "ffn", "k": 4}),
        (
            ("--site", "ffn", "--k", 4, "--rank", "difference", "--operation", "shift"),
            {"site": "ffn", "k": 4, "rank": "difference", "operation": "shift"},
        ),
    ],
)
def test_selected_as_by_the_library(run, momentum, profile, tmp_path, options, arguments):
    found = json.loads(run(*BY_EFFECT, *options, "--out", tmp_path, "--json"))
    plan = momentum.select(**arguments, profile=profile)
    assert Plan.from_pretrained(tmp_path) == plan and plan.dose is not None
    assert (found["sites"], found["rank"], found["step"]) == (list(plan.sites), plan.rank, plan.step)
    assert found["k"] == len(plan) and found["dose"] == [vars(row) for row in dose_rows(plan.dose)]
    sites = SITES if arguments["site"] == "auto" else arguments["site"]
    searched = arguments["site"] == "auto" or "kl" in arguments
    curves = best_sites(momentum, profile, [sites] if isinstance(sites, str) else sites, plan.step) if searched else []
    assert [row["effect"] for row in found["searched"]] == [list(curve.effect) for curve in curves]


def test_the_search_is_shown_and_fits_the_terminal(run, momentum, profile, tmp_path):
    lines = run(*BY_EFFECT, "--site", "auto", "--kl", 0.05, "--out", tmp_path).splitlines()
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)
    curves = best_sites(momentum, profile, SITES, "newton")
    rows = [line for line in lines if line.startswith((*SITES,))]
    assert [re.split(r"  +", row)[0] for row in rows] == [" + ".join(curve.sites) for curve in curves]
    for row, curve in zip(rows, curves, strict=True):
        effect = curve.effect[curve.k.index(curve.enough)] * 0.05**0.5
        assert re.split(r"  +", row.strip())[1:3] == [str(curve.enough), f"{effect:+.2f}"]
    assert ["k = " in row for row in rows] == [True, *[False] * (len(rows) - 1)], "the best is taken"
    assert "predicted KL" in " ".join(lines) and lines[-1].startswith("next: austeer generate")
    assert "--kl 0.05" in lines[-1] and "--alpha" not in lines[-1]


def test_a_profile_that_gives_no_dose_is_noted(place, command_line, tmp_path):
    code, printed, noted = command_line(*BY_EFFECT, "--rank", "momentum", "--k", 4, "--out", tmp_path)
    assert code == 0 and re.search("note: --profile.*no dose.*scale", noted) and "--alpha 1" in printed


# --- strengths in nats -----------------------------------------------------------------------------------------------


def test_generate_at_a_kl(run, model):
    """The strengths are those that ``steer`` finds, with the plan's own dose."""
    ask = ("generate", "dosed", *ON_MODEL, "--prompt", "The sky is", "--max-new-tokens", 4, "--kl", "0.02,0.1")
    found = json.loads(run(*ask, "--json"))
    assert list(found["continuations"]) == ["unsteered", "kl 0.02", "kl 0.1"]
    for kl in (0.02, 0.1):
        expected = austeer.steer(model, Plan.from_pretrained("dosed"), kl=kl).alpha
        assert found["alphas"][f"kl {kl}"] == pytest.approx(expected, rel=1e-4)


def test_generate_at_a_kl_by_a_profile(run, model, profile):
    more = ("--kl", 0.1, "--profile", "m.profile", "--max-new-tokens", 2)
    text = run("generate", "bare", *ON_MODEL, "--prompt", "The sky is", *more)
    alpha = austeer.steer(model, Plan.from_pretrained("bare"), kl=0.1, profile=profile).alpha
    assert f"kl 0.1: alpha {alpha:.4g}\n" in text


def test_generate_with_several_plans_at_a_kl(run, model):
    ask = ("generate", "dosed", "other", *ON_MODEL, "-p", "The sky", "--kl", 0.05, "--max-new-tokens", 3, "--k", 3)
    found = json.loads(run(*ask, "--json"))
    assert list(found["continuations"]) == ["unsteered", "dosed, kl 0.05", "other, kl 0.05"]
    plans = {name: Plan.from_pretrained(name) for name in ("dosed", "other")}
    assert found["alphas"]["kl 0.05"] == pytest.approx(austeer.steer(model, plans, kl=0.05, k=3).alpha, rel=1e-4)


def test_evaluate_at_a_kl(run, model):
    found = json.loads(
        run("evaluate", "rows.jsonl", *ON_MODEL, "--plan", "dosed", "--kl", "0.02,0.1", "--k", 4, "--json", "--quiet")
    )
    names = ["dosed, kl 0.02", "dosed, kl 0.1"]
    assert [variant["name"] for variant in found["variants"]] == ["unsteered", *names]
    for variant, kl in zip(found["variants"][1:], (0.02, 0.1)):
        expected = austeer.steer(model, Plan.from_pretrained("dosed"), kl=kl, k=4).alpha
        assert variant["alpha"] == pytest.approx(expected, rel=1e-4)
        assert variant["kl"] == pytest.approx(kl, rel=0.5), "measured on other text"


def test_exported_at_a_kl(run, model, tmp_path):
    """No model is run there, so it is the dose's prediction, and is called one."""
    plan = Plan.from_pretrained("dosed")
    alpha = plan.dose.alpha(0.1)
    text = run("export", "checkpoint", "dosed", "--model", "model", "--kl", 0.1, "--out", tmp_path / "m", "--quiet")
    assert f"alpha {alpha:.4g}, predicted for a KL of 0.1 nats a token" in text
    batch = {"input_ids": torch.tensor([[3, 1, 40, 22, 9]])}
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), batch)
    torch.testing.assert_close(found, formula_logits(model, batch, plan, alpha), rtol=1e-4, atol=1e-5)
    adapter = ("export", "lora", "bare", "--model", "model", "--lora-bias", "--out", tmp_path / "lora", "--quiet")
    data = json.loads(run(*adapter, "--kl", 0.1, "--profile", "m.profile", "--json"))
    assert data["predicted"] == {"kl": 0.1, "alpha": pytest.approx(alpha, rel=0.5)}
    assert data["plans"][0]["alpha"] == data["predicted"]["alpha"]
    vector = ("export", "gguf", "other", "--model", "model", "--out", tmp_path / "o.gguf", "--quiet", "--json")
    data = json.loads(run(*vector, "--kl", 0.02))
    assert data["alphas"] == [Plan.from_pretrained("other").dose.alpha(0.02)] == [data["predicted"]["alpha"]]


@pytest.mark.filterwarnings("ignore:the plan was measured on")
def test_the_library_exports_at_a_kl(place, tmp_path):
    plan, other, bare = (Plan.from_pretrained(name) for name in ("dosed", "other", "bare"))
    export_checkpoint(plan, "model", tmp_path / "m", kl=0.1)
    assert json.loads((tmp_path / "m" / "austeer.json").read_text())["plans"][0]["alpha"] == plan.dose.alpha(0.1)
    for plans, more, error, message in (
        (plan, {"alpha": 2}, PlanError, "both alpha and kl"),
        ([(plan, 2.0)], {}, PlanError, "both alpha and kl"),
        ([plan, other], {}, PlanError, "kl: .* 2 plans"),
        (bare, {}, SteeringError, "kl: .*without a dose"),
        (5, {}, PlanError, "found int"),
    ):
        with pytest.raises(error, match=message):
            export_checkpoint(plans, "model", tmp_path / "new", kl=0.1, **more)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("select", "plain.momentum", "--profile", "m.profile", "--k", 5, "--out", "new"), "austeer measure --effects"),
        (("select", "effects.momentum", "--rank", "effect", "--k", 5, "--out", "new"), "profile: .*austeer profile"),
        (("select", "effects.momentum", "--site", "auto", "--k", 5, "--out", "new"), "site='auto'"),
        (("select", "effects.momentum", "--kl", 0.1, "--out", "new"), "another rank than 'effect'"),
        ((*BY_EFFECT, "--kl", 0, "--out", "new"), "kl: found 0"),
        ((*BY_EFFECT, "--k", 5, "--operation", "scale", "--out", "new"), "operation: .*'scale'.*'shift'"),
        ((*BY_EFFECT, "--rank", "effect", "--max-fdr", 0.1, "--out", "new"), "max_fdr.*'effect'"),
        ((*BY_EFFECT, "--site", "attention,layer", "--k", 5, "--out", "new"), "'layer'"),
        (("measure", "pairs.jsonl", *ON_MODEL, "--effects", "--strategy", "layerwise", "--out", "new"), "--effects"),
        (("measure", "pairs.jsonl", *ON_MODEL, "--effects", "--strategy", "fast", "--out", "new"), "'fast'"),
        (("generate", "dosed", *ON_MODEL, "-p", "x", "--kl", 0.1, "--alpha", 2), "both --alpha 2 and --kl 0.1"),
        (("generate", "dosed", *ON_MODEL, "-p", "x", "--kl", "0.1,0"), "--kl: found '0'"),
        (("generate", "dosed", *ON_MODEL, "-p", "x", "--kl", "much"), "--kl: found 'much'"),
        (("generate", "dosed", *ON_MODEL, "-p", "x", "--profile", "m.profile"), "--profile: .*--kl"),
        (("generate", "bare", *ON_MODEL, "-p", "x", "--kl", 0.1), "plan 'bare' without a dose.*--profile"),
        (("generate", "scale", *ON_MODEL, "-p", "x", "--kl", 0.1), "plan 'scale' of 'scale', expected 'shift'"),
        (
            ("generate", "scale", *ON_MODEL, "-p", "x", "--kl", 0.1, "--profile", "m.profile"),
            "plan of 'scale', expected 'shift'",
        ),
        (("evaluate", "rows.jsonl", *ON_MODEL, "--plan", "bare", "--kl", 0.1), "plan 'bare' without a dose"),
        (("evaluate", "rows.jsonl", *ON_MODEL, "--kl", 0.1), "--kl: .*--plan"),
        (("export", "checkpoint", "bare", "--model", "model", "--kl", 0.1, "--out", "new"), "'bare' without a dose"),
        (("export", "checkpoint", "dosed", "other", "--model", "model", "--kl", 0.1, "--out", "new"), "kl: .* 2 plans"),
        (("export", "lora", "dosed", "--model", "model", "--kl", "0.1,0.2", "--out", "new"), "--kl: found 2"),
    ],
)
def test_refused_by_name(place, command_line, monkeypatch, arguments, message):
    monkeypatch.setattr("austeer.cli.common.load", lambda *options: pytest.fail("a model was loaded"))
    if "fast" in arguments:
        monkeypatch.undo()
        monkeypatch.chdir(place)
    code, printed, error = command_line(*arguments)
    assert code == 2 and re.search(message, " ".join(error.split())) and not printed
    assert not (place / "new").exists()


def test_a_profile_of_other_weights_is_refused(place, command_line, model):
    other = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 1
    other.save_pretrained("tuned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "tuned" / name).write_bytes((place / "model" / name).read_bytes())
    ask = ("generate", "bare", "--model", "tuned", "--device", "cpu", "-p", "x", "--kl", 0.1, "--profile", "m.profile")
    code, _, error = command_line(*ask)
    assert code == 2 and "other weights" in error


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_effects_beside_momentum(run, momentum):
    found = json.loads(run("inspect", "effects.momentum", "--json"))
    effects = of_momentum(momentum.effects, "ffn", 30)
    brief = next(row for row in found["effects"] if row["site"] == "ffn")
    passing = int(austeer.statistics.discoveries(momentum.effects.counters("ffn")).sum())
    assert brief["significance"]["discoveries"] == passing == effects.significance.discoveries > 0
    assert brief["overlap"] == list(next(row for row in effects.sites if row.site == "ffn").overlap)
    lines = run("inspect", "effects.momentum").splitlines()
    names = [line.split("  ")[0] for line in lines if line.startswith((*SITES,))]
    assert names == [*SITES, *(f"{site}, effects" for site in SITES)]
    assert max(map(len, lines)) <= 80 and json.loads(run("inspect", "plain.momentum", "--json"))["effects"] == []


def test_inspect_shows_a_dose(run):
    plan = Plan.from_pretrained("dosed")
    found = json.loads(run("inspect", "dosed", "--json"))
    assert found["dose"] == [vars(row) for row in dose_rows(plan.dose)] and len(found["dose"]) == 3
    text = " ".join(run("inspect", "dosed").split())
    assert "by effect (newton step), shift" in text and "alpha predicted KL predicted effect, nats" in text
    assert json.loads(run("inspect", "bare", "--json"))["dose"] == []
