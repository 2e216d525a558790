"""How a profile is made: as many draws as an error takes, in how much memory, once; and of models of every dtype."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from austeer import CaptureError, PairsError, estimate_kl, profile
from austeer.errors import AusteerWarning
from austeer.measuring.profiling import ProfileRun, cached_profile, prepare_profile
from dense_formula import shift_plan
from letter_tokens import Letters
from tiny_models import tiny_model

TEXTS = ["the soup was warm", "a view of the river and its boats", "tea", "two roads meet by the old mill", "bread"]
QUIET = {"progress": False}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUSTEER_CACHE", str(tmp_path))
    return tmp_path / "profiles"


@pytest.mark.parametrize("error", [0.5, 0.2])
def test_as_many_draws_as_the_error_takes(error):
    model = tiny_model()
    made = profile(model, Letters(), ["ffn"], TEXTS, error=error, **QUIET)
    assert made.error <= error
    fewer = len(made.tokens) - len(TEXTS)
    assert profile(model, Letters(), ["ffn"], TEXTS, draws=fewer, **QUIET).error > error
    with pytest.raises(PairsError, match=rf"found {fewer}, expected at least {len(made.tokens)} "):
        profile(model, Letters(), ["ffn"], TEXTS, draws=fewer, error=error)


def test_the_default_error_and_errors_that_are_none():
    assert prepare_profile(tiny_model(), Letters(), ["ffn"], ["tea"]).each == 200
    for error in (0, -0.1, 2, math.nan, True, "0.1"):
        with pytest.raises(PairsError, match="error"):
            profile(tiny_model(), Letters(), ["ffn"], TEXTS, error=error)


def test_the_spread_of_the_halves_is_the_error_where_texts_are_alike():
    """On one text in two tokenizations that differ by nothing, only the draws differ."""
    model = tiny_model()
    once = profile(model, Letters(), ["attention", "ffn"], TEXTS[1:2], draws=200, **QUIET)
    twice = once.merge(profile(model, Letters(), ["attention", "ffn"], TEXTS[1:2], draws=200, seed=1, **QUIET))
    split = replace(twice, texts=torch.arange(400) // 200, ids=twice.ids * 2)
    assert split.error == pytest.approx(math.sqrt(2 / 400))
    assert split.spread == pytest.approx(split.error, rel=0.4)
    other = replace(split, tokens=split.tokens * torch.where(split.texts == 0, 1, 3))  # a third of the KL a token
    assert other.spread == pytest.approx(0.5, abs=0.1)


def test_recomputed_activations_give_the_same_profile():
    model = tiny_model()
    expected = profile(model, Letters(), ["attention", "layer"], TEXTS, draws=10, **QUIET)
    found = profile(model, Letters(), ["attention", "layer"], TEXTS, draws=10, recompute=True, **QUIET)
    assert all(torch.equal(found.rows[site], rows) for site, rows in expected.rows.items())


def test_memory_is_told_beforehand():
    model = tiny_model()
    options = {"draws": 100, "batch_tokens": 66}
    run = prepare_profile(model, Letters(), ["ffn"], TEXTS, **options)
    found = run.memory()
    assert found.rows == sum(rows.nbytes for rows in run.run(**QUIET).rows.values())
    assert found.batch == 66  # texts of 33 and 31 letters
    assert found.gradients == 20 * found.batch * 32 * 4
    kept = []
    with run.gradients.attached(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run.gradients.hidden_states(torch.randint(3, 30, (2, 33)), torch.ones(2, 33, dtype=torch.int64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    exact = sum(size for pointer, size in storages.items() if pointer not in weights)
    assert found.activations == pytest.approx(exact, rel=0.1)
    less = prepare_profile(model, Letters(), ["ffn"], TEXTS, recompute=True, **options).memory()
    assert less.activations < 0.6 * found.activations and less.rows == found.rows


def test_made_once_and_found_again(cache, monkeypatch):
    model, made = tiny_model(), []
    run = ProfileRun.run
    monkeypatch.setattr(ProfileRun, "run", lambda self, *args, **options: made.append(1) or run(self, *args, **options))
    options = {"draws": 10, "progress": False}
    first = cached_profile(model, Letters(), ["ffn"], TEXTS, **options)
    again = cached_profile(tiny_model(), Letters(), ["ffn"], TEXTS, **options, batch_tokens=32, recompute=True)
    assert len(made) == 1 and torch.equal(first.rows["ffn"], again.rows["ffn"])
    assert len(list(cache.iterdir())) == 1
    tuned = tiny_model()
    with torch.no_grad():
        tuned.lm_head.weight.mul_(2)
    others = [(model, ["layer"], TEXTS, {}), (model, ["ffn"], TEXTS[1:], {}), (tuned, ["ffn"], TEXTS, {})]
    others += [(tiny_model().bfloat16(), ["ffn"], TEXTS, {}), *((model, ["ffn"], TEXTS, o) for o in ({"seed": 1},))]
    for number, (other, sites, texts, changed) in enumerate(others):
        cached_profile(other, Letters(), sites, texts, **options | changed)
        assert len(made) == number + 2
    next(cache.iterdir()).write_bytes(b"damaged")
    for other, sites, texts, changed in [(model, ["ffn"], TEXTS, {}), *others]:
        cached_profile(other, Letters(), sites, texts, **options | changed)
    assert len(made) == len(others) + 2


def test_an_interrupted_run_is_kept_in_the_cache(cache, monkeypatch):
    model = tiny_model()
    options = {"draws": 10, "batch_tokens": 1, "progress": False}
    draw, drawn = ProfileRun._draws, []

    def interrupted(self, numbers, *others):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.extend(numbers)
        return draw(self, numbers, *others)

    monkeypatch.setattr(ProfileRun, "_draws", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_profile(model, Letters(), ["ffn"], TEXTS, **options)
    assert [path.suffix for path in cache.iterdir()] == [".checkpoint"]
    monkeypatch.setattr(
        ProfileRun, "_draws", lambda self, numbers, *more: drawn.extend(numbers) or draw(self, numbers, *more)
    )
    found = cached_profile(model, Letters(), ["ffn"], TEXTS, **options)
    assert sorted(drawn) == list(range(len(TEXTS)))
    assert torch.equal(found.rows["ffn"], profile(model, Letters(), ["ffn"], TEXTS, **options).rows["ffn"])
    assert [path.suffix for path in cache.iterdir()] == [".profile"]


def test_a_cache_that_cannot_be_written_is_told(cache):
    cache.write_text("a file where the folder would be")
    with pytest.warns(AusteerWarning, match="cannot be written"):
        found = cached_profile(tiny_model(), Letters(), ["ffn"], TEXTS, draws=5, **QUIET)
    assert len(found.tokens) == 5


def quantised(folder, **options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()


def test_weights_of_8_bits(tmp_path):
    """Gradients flow through the activations: the profile predicts what the quantised model does."""
    model = quantised(tmp_path, load_in_8bit=True)
    made = profile(model, Letters(), ["attention", "ffn"], TEXTS[:2], draws=100, **QUIET)
    plans = [shift_plan(model, (site,), 12, seed=3) for site in ("attention", "ffn")]
    expected = estimate_kl(model, Letters(), plans, TEXTS[:2])
    assert [made.kl(plan) for plan in plans] == pytest.approx(expected, rel=4 * made.error)
    made.check_weights(model)


def test_a_gradient_beyond_float16_is_refused():
    model = tiny_model()
    with torch.no_grad():  # a norm of small numbers: what it divides by, its gradient is multiplied by
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.down_proj.weight.mul_(1e-4)
        model.model.embed_tokens.weight.mul_(1e-4)
        model.model.norm.weight.mul_(100)
    profile(model, Letters(), ["layer"], TEXTS, draws=5, **QUIET)
    with pytest.raises(CaptureError, match="load the model in bfloat16"):
        profile(model.half(), Letters(), ["layer"], TEXTS, draws=5, **QUIET)
