"""Every model family: its sites are the tensors they are said to be, and steering them equals the formula.

One tiny random model a family, in float32, with left padding. What is in the weights comes back bit for bit.
"""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import austeer
from austeer.models.families import LAYOUTS
from austeer.models.sites import SITE_NAMES, fingerprint
from austeer.models.structure import text_config
from dense_formula import assert_unchanged, formula_logits, logits, random_plan, snapshot
from tiny_models import FAMILIES, INSIDE, tiny_model

#: Modules through which a family sends the attention's and the feed-forward block's output before it adds them.
POST_NORMS = {
    **dict.fromkeys(
        ("exaone4", "gemma2", "gemma3", "gemma3_text", "olmo2"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}

#: Families with mixtures of experts: how many layers are dense, and how many modules make ``ffn`` in the others (the
#: routed experts, and a shared one).
MIXTURES = {
    **dict.fromkeys(("gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe"), (0, 1)),
    **dict.fromkeys(("deepseek_v3", "ernie4_5_moe", "glm4_moe", "qwen2_moe"), (1, 2)),
    **{"llama4_text": (2, 2), "qwen3_moe": (1, 1), "qwen3_next": (0, 2)},
}

IDS = torch.tensor([[0, 0, 0, 17, 9, 33], [5, 41, 8, 22, 30, 11]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
REAL = MASK.bool()


@pytest.fixture(scope="module")
def model_of():
    """One model a family for the whole file; every test must leave it as it was."""
    made = {}
    return lambda family: made[family] if family in made else made.setdefault(family, tiny_model(family))


def test_every_family_of_the_table_is_here():
    assert set(LAYOUTS) <= {*FAMILIES, *INSIDE}


# --- the tensors -----------------------------------------------------------------------------------------------------


def record(model, sites):
    """(path, side) -> tensor [batch, tokens, width], for every site and for the input of every layer."""
    seen, handles = {}, []

    def keep(path, side, x):
        # A copy: Falcon adds to its MLP's output in place. Some blocks make [batch * tokens, width] of their input.
        seen[path, side] = x.reshape(*IDS.shape, x.shape[-1]).clone()

    for path, side in {(s.path, s.side) for found in sites.values() for s in found} | {
        (s.path, "input") for s in sites["layer"]
    }:
        module = model.get_submodule(path)
        if side == "input":
            hook = module.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: keep(path, "input", args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        else:
            hook = module.register_forward_hook(
                lambda m, args, out, path=path: keep(path, "output", out[0] if isinstance(out, tuple) else out)
            )
        handles.append(hook)
    with torch.no_grad():
        hidden = model(**BATCH, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return seen, hidden


def product(module, x):
    """What a linear layer is defined to give, from its parameters alone."""
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    return x @ weight + (0 if module.bias is None else module.bias)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_sites_are_what_the_layers_are_made_of(model_of, family):
    """The definition of a decoder layer: output = input + attention's projection + feed-forward block."""
    model = model_of(family)
    sites = austeer.find_sites(model)
    layers = text_config(model).num_hidden_layers
    dense, parts = MIXTURES.get(family, (layers, 0))
    assert set(sites) == set(SITE_NAMES) - ({"neuron"} if family in MIXTURES else set())
    assert {len(found) for found in sites.values()} == {layers}
    seen, hidden = record(model, sites)
    for i, layer_site in enumerate(sites["layer"]):
        assert {found[i].layer for found in sites.values()} == {i}
        layer, out = model.get_submodule(layer_site.path), seen[layer_site.path, "output"]
        if i + 1 < len(sites["layer"]):  # the last of hidden_states has gone through the final norm
            assert torch.equal(out, hidden[i + 1])
        tensors = {name: seen[found[i].path, found[i].side] for name, found in sites.items()}
        assert all(tensors[name].shape[-1] == found[i].width for name, found in sites.items())
        attention = product(model.get_submodule(sites["attention"][i].projection), tensors["attention"])
        ffn = tensors["ffn"]
        if family in POST_NORMS:
            after_attention, after_ffn = POST_NORMS[family]
            attention, ffn = getattr(layer, after_attention)(attention), getattr(layer, after_ffn)(ffn)
        total = seen[layer_site.path, "input"] + attention + ffn
        torch.testing.assert_close(out[REAL], total[REAL], rtol=1e-5, atol=2e-5)
        assert ffn[REAL].abs().mean() > 1e-3 and attention[REAL].abs().mean() > 1e-3  # else the sum would say little
        assert len(sites["ffn"][i].parts) == (1 if sites["ffn"][i].projection else parts)
        if "neuron" in sites:
            assert sites["neuron"][i].projection == sites["ffn"][i].projection
            down = model.get_submodule(sites["ffn"][i].projection)
            torch.testing.assert_close(tensors["ffn"], product(down, tensors["neuron"]), rtol=1e-5, atol=1e-5)
    assert sum(site.projection is not None for site in sites["ffn"]) == dense


# --- steering --------------------------------------------------------------------------------------------------------


#: What stands between a layer's feed-forward block and its output, or is between its parts: no bias does a shift there.
NORM_AFTER = ("exaone4", "gemma2", "gemma3", "gemma3_text", "glm4", "olmo2")
UNGATED = ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "llama4_text")


def edit_of(family, model, found, operation):
    """The paths of a site's layers in mode auto, by what these random models are."""
    if operation == "push":
        return {"columns"}
    if operation == "scale":
        return {"fold"} if found[0].parts else {"columns"}
    if found[0].side == "input":
        return {"bias"}
    if found[0].name == "layer" and family in NORM_AFTER:
        return {"columns"}
    if family in UNGATED or family not in MIXTURES:
        return {"bias"}
    return {"bias", "columns"} if MIXTURES[family][0] else {"columns"}


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_equals_the_formula_and_leaves_no_trace(model_of, family):
    model = model_of(family)
    before, plain = snapshot(model), logits(model, BATCH)
    for site, found in austeer.find_sites(model).items():
        for operation in ("scale", "push", "shift"):
            plan = random_plan(model, site, 20 if site == "layer" else 40, operation, seed=len(site))
            alpha = 0.5 if operation == "shift" else 1.5
            expected = formula_logits(model, BATCH, plan, alpha)
            effect = float((expected - plain)[REAL].abs().max())
            assert expected.isfinite().all() and effect > 1e-2, (site, operation, effect)
            edit = edit_of(family, model, found, operation)
            for mode in ("auto", "columns"):
                with austeer.steer(model, plan, alpha, mode=mode) as steering:
                    got = logits(model, BATCH)
                    took = {row.path for row in steering.report()}
                case = f"{family} {site} {operation} {mode}"
                torch.testing.assert_close(got[REAL], expected[REAL], rtol=1e-4, atol=1e-3 * effect, msg=case)
                assert took == ({"columns"} if mode == "columns" else edit), case
            for mode in {"fold", "bias"} - edit:
                with pytest.raises(austeer.SteeringError, match=f"'{mode}'.*'{site}'"):
                    austeer.steer(model, plan, alpha, mode=mode)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, BATCH), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_and_without_a_cache(model_of, family):
    model = model_of(family)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    before, plain = snapshot(model), logits(model, BATCH)
    sites = [site for site in austeer.find_sites(model) if site != "layer"]
    plan = random_plan(model, sites, 30, seed=3)
    for mode in ("auto", "columns"):
        with austeer.steer(model, plan, 2.0, mode=mode):
            cached = model.generate(**BATCH, **how, use_cache=True)
            again = model.generate(**BATCH, **how, use_cache=False)
            steered = logits(model, BATCH)
        assert torch.equal(cached, again), mode
        assert (steered - plain)[REAL].abs().max() > 1e-2
    assert_unchanged(model, before)


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Numbers, split at spaces: "7 30" is tokens 7 and 30."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0")


#: Their attention is normalised in float32, where float64's mask of padding is minus infinity, and so NaN.
NO_FLOAT64 = ("bloom", "gemma2", "mpt")

PAIRS = [("3 4 5 6 7 8", " 9 10", " 11"), ("30", " 31", " 32"), ("17 21 40 8", " 5", " 50 51"), ("12 13", " 9", " 8")]


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_does_not_depend_on_the_batch(model_of, tokenizer, family):
    # In float64, so that rounding turns no comparison; the default implementation of experts has none.
    model = copy.deepcopy(model_of(family)).to(torch.float32 if family in NO_FLOAT64 else torch.float64)
    text_config(model)._experts_implementation = "eager"
    names = list(austeer.find_sites(model))
    how = {"max_length": 64, "progress": False}
    found = austeer.measure(model, tokenizer, PAIRS, names, **how)
    alone = austeer.measure(model, tokenizer, PAIRS, names, **how, batch_tokens=1)
    assert found.model == alone.model == fingerprint(model, austeer.find_sites(model))
    for name in names:
        mine, theirs = found.counters(name), alone.counters(name)
        assert (theirs.positive + theirs.negative).double().mean() > 2  # of 4 pairs; a ReLU makes zeros
        assert torch.equal(mine.positive, theirs.positive) and torch.equal(mine.negative, theirs.negative), name
        torch.testing.assert_close(mine.delta_sum, theirs.delta_sum, rtol=1e-4, atol=1e-5)
