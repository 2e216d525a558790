"""fit_probe: the direction and threshold of the definition, and rates that hold on prompts it has not seen."""

import json

import pytest
import torch
from scipy import stats

import austeer
from austeer.models.sites import find_sites
from dense_formula import hook
from places import SHARED_DATA
from searches import NOUNS
from tiny_models import ids_of_rows

STYLE = SHARED_DATA / "style" / "language_french_english.jsonl"


def texts_of(form, count):
    return [form.format(f"{NOUNS[i % len(NOUNS)]} {i}") for i in range(count)]


FORM = "Add 7 and the number {}."
WANTED, OTHERS = texts_of("Is the {} room nice? Tell me", 48), texts_of(FORM, 160)


@pytest.fixture(scope="module")
def fitted(tiny_llama, demo):
    return austeer.fit_probe(tiny_llama[0], demo[1], WANTED, OTHERS, false_positive_rate=0.05)


@torch.no_grad()
def states(model, tokenizer, texts, site, layer):
    """float64 [texts, width] of each text's last token, run by itself."""
    seen = []
    handle = hook(model, find_sites(model, site)[site][layer], lambda x: seen.append(x[0, -1].double()) or x)
    for text in texts:
        model(**tokenizer(text, return_tensors="pt"))
    handle.remove()
    return torch.stack(seen)


def test_the_threshold_is_one_that_the_rate_allows(fitted, tiny_llama, demo):
    """Of 80 unwanted prompts floor(0.05 * 81) = 4 may reach it; that is the rate of the rest, but for chance."""
    scores = states(tiny_llama[0], demo[1], OTHERS, fitted.site, fitted.layer) @ fitted.direction.double()
    reach = scores >= fitted.threshold - 1e-5
    evidence = fitted.evidence
    fresh = states(tiny_llama[0], demo[1], texts_of(FORM, 360)[160:], fitted.site, fitted.layer)
    fired = int((fresh @ fitted.direction.double() > fitted.threshold).sum())
    assert stats.binom.sf(fired - 1, 200, evidence.expected_high) > 0.01  # no more than the interval allows
    assert evidence.calibration == 80 and 4 <= int(reach.sum()) <= 4 + 3 + 40
    assert evidence.false_positives.total == 40 and evidence.true_positives.total == 24
    low, high = stats.beta.ppf([0.025, 0.975], 4, 77)
    assert (evidence.expected_low, evidence.expected_high) == pytest.approx((low, high))
    assert low < 0.05 < high and evidence.auc > 0.9
    torch.testing.assert_close(fitted.direction.norm(), torch.tensor(1.0))


def test_a_rate_that_rounding_makes_one(tiny_llama, demo):
    """All 80 may reach the threshold, and no more than there are."""
    probe = austeer.fit_probe(tiny_llama[0], demo[1], WANTED, OTHERS, layer=0, false_positive_rate=1 - 1e-13)
    assert probe.evidence.expected_low == pytest.approx(stats.beta.ppf(0.025, 80, 1))


def test_which_prompt_is_for_what_does_not_depend_on_order_or_repetition(fitted, tiny_llama, demo):
    again = austeer.fit_probe(
        tiny_llama[0], demo[1], WANTED[::-1], OTHERS[::-1] + OTHERS[:9], false_positive_rate=0.05, batch_tokens=64
    )
    assert again.layer == fitted.layer and again.evidence == fitted.evidence
    torch.testing.assert_close(again.direction, fitted.direction)
    assert again.threshold == pytest.approx(fitted.threshold, abs=1e-4)


@pytest.mark.parametrize("site", ["attention", "ffn", "neuron"])
def test_the_direction_is_the_mean_difference(tiny_llama, demo, site):
    """Of the parts that it was made of: no other half of the texts gives it, and all of them nearly do."""
    probe = austeer.fit_probe(tiny_llama[0], demo[1], WANTED, OTHERS, site=site, layer=1, false_positive_rate=0.05)
    assert (probe.site, probe.layer) == (site, 1) and list(probe.model.widths) == [site]
    wanted, others = (states(tiny_llama[0], demo[1], texts, site, 1).mean(0) for texts in (WANTED, OTHERS))
    whole = (wanted - others) / (wanted - others).norm()
    assert float(whole @ probe.direction.double()) > 0.97


def test_a_layer_is_chosen_where_the_prompts_come_apart(tiny_llama, demo):
    """Every layer writes noise, but for one dimension of layer 1, which holds what tells the prompts apart."""
    model, tell, at = tiny_llama[0], demo[1](" nice", add_special_tokens=False)["input_ids"][0], {}

    def noise(x):
        generator = torch.Generator().manual_seed(int(x.double().abs().sum() * 1e6) % 2**31)
        return torch.randn(x.shape, generator=generator)

    def telling(x):
        return noise(x).index_copy(
            2, torch.tensor([0]), (at["ids"] == tell).any(1).float()[:, None, None] * 40 + x[..., :1]
        )

    sites = find_sites(model, "layer")["layer"]
    handles = [hook(model, site, telling if site.layer == 1 else noise) for site in sites]
    note = lambda module, args, kwargs: at.update(ids=kwargs["input_ids"])  # noqa: E731
    handles.append(model.model.register_forward_pre_hook(note, with_kwargs=True))
    try:
        probe = austeer.fit_probe(model, demo[1], texts_of("{} is nice", 40), OTHERS, false_positive_rate=0.05)
    finally:
        for handle in handles:
            handle.remove()
    assert probe.layer == 1 and float(probe.direction[0]) > 0.9 and probe.evidence.auc == 1.0


def test_what_cannot_be_fitted_is_refused(tiny_llama, demo):
    model, tokenizer = tiny_llama[0], demo[1]
    for wanted, others, named in (
        (WANTED[:7], OTHERS, "positive.*7"),
        (WANTED, OTHERS[:3], "negative.*3"),
        (WANTED, OTHERS + WANTED[:1], "positive.*among negative"),
        ("text", OTHERS, "positive.*'text'"),
        (WANTED, [*OTHERS, 3], "negative.*list of texts"),
        (WANTED, [*OTHERS, ""], "0 tokens"),
        (WANTED, [*OTHERS, "word " * 600], "tokens.*512"),
    ):
        with pytest.raises(austeer.PairsError, match=named):
            austeer.fit_probe(model, tokenizer, wanted, others, false_positive_rate=0.05)
    for rate in (0, 1, -0.1, True, "x", float("nan")):
        with pytest.raises(austeer.SelectionError, match=f"false_positive_rate.*{rate!r}"):
            austeer.fit_probe(model, tokenizer, WANTED, OTHERS, false_positive_rate=rate)
    with pytest.raises(austeer.SelectionError, match=r"0\.01.*80 negative.*at least 99 \(of 198\).*0\.0123"):
        austeer.fit_probe(model, tokenizer, WANTED, OTHERS)
    with pytest.raises(austeer.SiteError, match="layer 9"):
        austeer.fit_probe(model, tokenizer, WANTED, OTHERS, layer=9, false_positive_rate=0.05)
    plan = austeer.measure(model, tokenizer, austeer.Pairs.of([("a", " b", " c")] * 2)).select("ffn", k=2)
    with (
        pytest.warns(austeer.SteeringWarning),
        austeer.steer(model, plan, 0.0, scope="prompt"),
        pytest.raises(austeer.SteeringError, match="steered"),
    ):
        austeer.fit_probe(model, tokenizer, WANTED, OTHERS, false_positive_rate=0.05)
    assert model(**ids_of_rows()).logits.isfinite().all()


@pytest.mark.skipif(not STYLE.exists(), reason="needs ../shared/data")
def test_only_french_prompts_are_steered(demo, demo_momentum):
    """SmolLM2: the rate holds on fresh prompts, and what it does not fire on is written as without steering."""
    model, tokenizer = demo
    rows = [json.loads(line) for line in STYLE.read_text(encoding="utf-8").splitlines()]
    french, english = ([" ".join(row[side].split()[:12]) for row in rows] for side in ("positive", "negative"))
    probe = austeer.fit_probe(model, tokenizer, french[:60], english[:160], false_positive_rate=0.05)
    assert probe.evidence.true_positives.hits >= 25 and probe.evidence.false_positives.low <= 0.05
    fresh = {"wanted": french[300:340], "others": english[340:440]}
    fired = {
        name: (states(model, tokenizer, texts, probe.site, probe.layer) @ probe.direction.double()) > probe.threshold
        for name, texts in fresh.items()
    }
    assert int(fired["wanted"].sum()) >= 36
    assert stats.binomtest(int(fired["others"].sum()), 100, probe.evidence.expected_high).pvalue > 0.01 or (
        int(fired["others"].sum()) < 100 * probe.evidence.expected_high
    )
    plan = demo_momentum.select("attention", k=10, operation="shift")
    texts = [fresh["wanted"][0], fresh["others"][0], fresh["wanted"][1], fresh["others"][1]]
    tokenizer.padding_side, before = "left", tokenizer.padding_side
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    tokenizer.padding_side = before
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    plain = model.generate(**batch, **greedy)
    with austeer.steer(model, plan, 30.0, scope="generation"):
        steered = model.generate(**batch, **greedy)
    with austeer.steer(model, plan, 30.0, scope="generation", when=probe) as steering:
        found = model.generate(**batch, **greedy)
        assert (steering.report().when.decided, steering.report().when.fired) == (4, 2)
    for number in range(4):
        assert torch.equal(found[number], (steered if number % 2 == 0 else plain)[number])
        assert not torch.equal(steered[number], plain[number])
