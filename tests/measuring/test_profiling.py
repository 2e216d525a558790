"""The side-effect profile: it predicts the KL of small shifts, and is the same however it is made."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import disk_offload

from austeer import FileFormatError, PairsError, Profile, SelectionError, SteeringError, SteeringWarning, profile, steer
from austeer.measuring.sampled import sampled_tokens, score_gradients
from austeer.models.structure import decoder_of
from austeer.tasks import side_effects
from dense_formula import random_plan, shift_plan
from letter_tokens import Letters
from tiny_models import tiny_model

SITES = ("attention", "ffn", "layer", "neuron")
TEXTS = ["the soup was warm", "a view of the river and its boats", "tea", "two roads meet by the old mill", "bread"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def made(model):
    return profile(model, Letters(), SITES, TEXTS, draws=2000, progress=False)


def measured_kl(model, plan, alpha):
    """KL(unsteered || steered), nats a token; of both signs of alpha, so that cubic terms cancel."""
    found = []
    for sign in (1, -1):
        with steer(model, {"p": plan}, alpha=sign * alpha) as steering:
            found.append(side_effects(model, Letters(), TEXTS, steering, ["p"]).mean()[0][0])
    return sum(found) / 2


@pytest.mark.parametrize("site", SITES)
def test_a_prediction_is_the_kl_of_a_small_shift(model, made, site):
    plan = shift_plan(model, (site,), 12, seed=3)
    alpha = made.alpha(plan, 2e-3)
    assert measured_kl(model, plan, alpha) == pytest.approx(2e-3, rel=5 * made.error + 0.05)


def test_sites_act_together_and_each_au_has_its_own_strength(model, made):
    plan = shift_plan(model, ("attention", "ffn"), 12, seed=5)
    scale = math.sqrt(2e-3 / made.kl(plan, {"attention": 0.3, "ffn": 1.0}))
    by_site = {"attention": 0.3 * scale, "ffn": scale}
    found = []
    for sign in (1, -1):
        alpha = {"p": {site: sign * value for site, value in by_site.items()}}
        with steer(model, {"p": plan}, alpha=alpha) as steering:
            found.append(side_effects(model, Letters(), TEXTS, steering, ["p"]).mean()[0][0])
    assert sum(found) / 2 == pytest.approx(2e-3, rel=5 * made.error + 0.05)


def test_the_diagonal_is_that_of_the_rows(made):
    for site in SITES:
        expected = made.rows[site].double().square().sum(0) / made.tokens.sum()
        torch.testing.assert_close(made.fisher(site), expected, rtol=0.01, atol=1e-12)  # rows are rounded


def test_draws_do_not_depend_on_the_batch_or_on_other_texts(model):
    together = profile(model, Letters(), ["ffn"], TEXTS, draws=10, progress=False)
    alone = profile(model, Letters(), ["ffn"], TEXTS, draws=10, batch_tokens=1, progress=False)
    for text in range(len(TEXTS)):
        one, other = (p.rows["ffn"][p.texts == text].float() for p in (together, alone))
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3)
    assert together.tokens.sum() == alone.tokens.sum() == 2 * sum(len(text) - 1 for text in TEXTS)


def test_scores_have_no_mean(model):
    """The mean of d log p(y) over y from p is zero: what makes products of tokens cancel."""
    hidden = decoder_of(model)(input_ids=torch.tensor([[5, 9, 20, 7]])).last_hidden_state.detach()
    drawn = sampled_tokens(model, hidden, [3], 4000, [1])
    found = score_gradients(model, hidden, [3], drawn)[:, 0]
    assert (found[:, 3] == 0).all()  # the last token predicts nothing
    found = found[:, :3]
    error = found.std(0) / math.sqrt(len(found))
    assert (found.mean(0).abs() < 6 * error).all()


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch):
    kept, whole = tmp_path / "kept", profile(model, Letters(), ["ffn"], TEXTS, draws=10, batch_tokens=1, progress=False)
    save, saved = Profile.save, []

    def save_twice(self, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(self, path))

    monkeypatch.setattr(Profile, "save", save_twice)
    options = {"draws": 10, "batch_tokens": 1, "checkpoint": kept, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        profile(model, Letters(), ["ffn"], TEXTS, **options)
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match="resume"):
        profile(model, Letters(), ["ffn"], TEXTS, **options)
    with pytest.raises(FileFormatError, match="sources"):
        profile(model, Letters(), ["ffn"], TEXTS, **options, seed=1, resume=True)
    with pytest.raises(FileFormatError, match="draws"):
        profile(model, Letters(), ["ffn"], TEXTS, **options | {"draws": 15}, resume=True)
    found = profile(model, Letters(), ["ffn"], TEXTS, **options, resume=True)
    assert torch.equal(found.texts, whole.texts)
    assert torch.equal(found.rows["ffn"], whole.rows["ffn"])
    torch.testing.assert_close(found.diagonal["ffn"], whole.diagonal["ffn"])


def test_files_and_merging(model, made, tmp_path):
    other = profile(model, Letters(), SITES, TEXTS, draws=10, seed=1, progress=False)
    both = made.merge(other)
    assert len(both.tokens) == 2010 and both.fisher("ffn").shape == (3, 32)
    loaded = Profile.load(both.save(tmp_path / "both.profile"))
    plan = shift_plan(model, SITES, 20)
    assert torch.equal(loaded.root(plan), both.root(plan)) and loaded.sources == both.sources
    first, second = loaded.halves()
    assert len(first.tokens) + len(second.tokens) == 2010
    assert not {*first.texts.tolist()} & {*second.texts.tolist()}
    expected = Letters()(TEXTS)["input_ids"]
    assert [row.tolist() for row in made.ids] == [row.tolist() for row in loaded.ids] == expected
    for again in (made, other):
        with pytest.raises(SelectionError, match="twice"):
            both.merge(again)
    with pytest.raises(SelectionError, match="model"):
        made.merge(profile(model, Letters(), ["ffn"], TEXTS, draws=5, seed=1, progress=False))


def test_merging_numbers_each_text_once(model):
    first, second = (
        profile(model, Letters(), ["ffn"], texts, draws=6, progress=False) for texts in (TEXTS[:3], TEXTS[2:])
    )
    both = first.merge(second)
    assert [row.tolist() for row in both.ids] == Letters()(TEXTS)["input_ids"]
    assert both.texts.bincount().tolist() == [2, 2, 4, 2, 2]
    assert all(len(both.ids[text]) - 1 == count for text, count in zip(both.texts.tolist(), both.tokens.tolist()))
    again = both.merge(profile(model, Letters(), ["ffn"], TEXTS[2:], draws=3, seed=1, progress=False))
    assert len(again.ids) == len(TEXTS) and again.texts.bincount().tolist() == [2, 2, 5, 3, 3]


def test_a_file_whose_texts_are_not_those_of_its_draws_is_refused(made, tmp_path):
    for ids in (made.ids[:-1], (made.ids[0][1:], *made.ids[1:]), tuple(row.int() for row in made.ids)):
        path = replace(made, ids=ids).save(tmp_path / "wrong.profile")
        with pytest.raises(FileFormatError, match="inconsistent"):
            Profile.load(path)


def test_what_does_not_fit_is_refused(model, made):
    with pytest.raises(SelectionError, match="shift"):
        made.root(random_plan(model, SITES, 20, "scale"))
    with pytest.raises(SelectionError, match="'neuron' has no profile"):
        profile(model, Letters(), ["ffn"], TEXTS, draws=5, progress=False).root(shift_plan(model, ("neuron",)))
    with pytest.raises(SelectionError, match="layers"):
        made.root(shift_plan(tiny_model(num_hidden_layers=2), ("ffn",)))
    for kl in (0, -1, math.nan, True, "0.1"):
        with pytest.raises(SelectionError, match="kl"):
            made.alpha(shift_plan(model, ("ffn",)), kl)
    with pytest.raises(SelectionError, match="sites"):
        made.kl(shift_plan(model, ("ffn",)), {"layer": 1.0})
    with pytest.raises(PairsError, match="two tokens"):
        profile(model, Letters(), ["ffn"], ["a"])
    with pytest.raises(PairsError, match="draws"):
        profile(model, Letters(), ["ffn"], TEXTS, draws=0)
    with steer(model, shift_plan(model, ("ffn",))), pytest.raises(SteeringError):
        profile(model, Letters(), ["ffn"], TEXTS, draws=1)
    with pytest.raises(SelectionError, match="one text"):
        profile(model, Letters(), ["ffn"], TEXTS[:1], draws=2, progress=False).halves()


@pytest.mark.parametrize("change", [{}, {"revision": "b" * 40}, {"name": "hub/other", "revision": None}])
def test_another_model_or_revision_is_refused(model, made, change):
    plan = shift_plan(model, ("ffn",))
    of = replace(made.model, name="hub/one", revision="a" * 40 if change.get("revision", "") else None)
    here, there = replace(made, model=of), replace(plan, model=replace(of, **change))
    if not change:
        assert here.kl(there) == made.kl(plan)
    else:
        with pytest.raises(SelectionError, match="expected one of hub/o"):
            here.kl(there)
    # What is not known of both is no reason: a local folder has any name and no revision.
    assert here.kl(replace(plan, model=replace(of, name="folder", revision=None))) == made.kl(plan)


def test_other_weights_are_refused(model, made, tmp_path):
    made.check_weights(model)
    made.check_weights(tiny_model().bfloat16())  # rounded, not other
    tuned = tiny_model()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    with pytest.raises(SelectionError, match="other weights"):
        made.check_weights(tuned)
    disk_offload(tuned, tmp_path, torch.device("cpu"))
    made.check_weights(tuned)  # cannot be compared
    profile(tuned, Letters(), SITES[:1], TEXTS, draws=5, progress=False).check_weights(model)


def test_a_hybrid_has_the_site_in_some_layers(tmp_path):
    hybrid = tiny_model("jamba")
    found = profile(hybrid, Letters(), ["attention"], TEXTS, draws=400, progress=False)
    found = Profile.load(found.save(tmp_path / "hybrid.profile"))
    layers = found.layers["attention"]
    assert found.rows["attention"].shape[1] == len(layers) < hybrid.config.num_hidden_layers
    plan = shift_plan(hybrid, ("attention",), 8)
    assert {*plan.layer.tolist()} <= {*layers}
    assert measured_kl(hybrid, plan, found.alpha(plan, 2e-3)) == pytest.approx(2e-3, rel=5 * found.error + 0.05)


def test_the_error_is_that_of_unlike_lengths(model):
    texts = ["a view of the river and its boats, and of the mill beside it where two roads meet", *("tea", "sea") * 20]
    plan, found = shift_plan(model, ("ffn",), 12, seed=3), []
    for seed in range(24):
        found.append(profile(model, Letters(), ["ffn"], texts, draws=41, seed=seed, progress=False))
    values = torch.tensor([one.kl(plan) for one in found])
    assert float(values.std() / values.mean()) == pytest.approx(found[0].error, rel=0.5)
    assert found[0].error > 1.5 * math.sqrt(2 / 41)


def test_texts_are_cut_to_the_context(model):
    short = tiny_model("gpt2", max_position_embeddings=16)
    assert profile(short, Letters(), ["ffn"], ["a view of the river and its boats"], draws=1).tokens.tolist() == [15]


def test_a_mixture_of_experts_is_warned_of():
    with pytest.warns(SteeringWarning, match="experts"):
        profile(tiny_model("mixtral"), Letters(), ["attention"], TEXTS[:1], draws=1)
