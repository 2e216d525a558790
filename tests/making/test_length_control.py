"""The length control: a set that differs in length only, AUs that react to it, and known answers on a real model."""

import random
from statistics import median

import pytest
import torch

import austeer
from austeer import Pairs, PairsError, SelectionError
from austeer.demo.demo import load_data
from austeer.making import check_pairs, control_pairs
from austeer.making.length_control import FILLERS, LEAST, length_control
from austeer.making.side_checks import Sides
from austeer.pairs.pair import Pair
from naive_momentum import numbered_pairs

PHRASES = ("very much so", "without any doubt", "all in all", "after some days", "to be exact", "on that day")


def longer(text, rng):
    return f", {rng.choice(PHRASES)}, {rng.choice(PHRASES)},{text}"


@pytest.fixture(scope="module")
def base():
    return load_data().momentum[:40]


@pytest.mark.parametrize("chat", [False, True])
def test_the_control_differs_in_length_only(demo, base, chat):
    tokenizer, rng = demo[1], random.Random(0)
    pairs = Pairs.of([(p.prompt, longer(p.positive, rng), p.negative) for p in base])
    if chat:
        pairs = pairs.with_chat_template(tokenizer)
    sides = Sides.of(tokenizer, pairs, not chat)
    control = control_pairs(pairs, tokenizer, count=30, seed=1)
    assert len(control) == 30 and control.chat_template == chat
    texts = {(p.prompt, side) for p in pairs for side in (p.positive, p.negative)}
    fillers = set()
    for pair in control:
        assert (pair.prompt, pair.negative) in texts, "the short side is one of the pairs' own"
        blank = pair.negative[: len(pair.negative) - len(pair.negative.lstrip())]
        filler, rest = pair.positive.removeprefix(f"{blank}(").split(") ", 1)
        assert blank + rest == pair.negative and set(filler.split(", ")) <= set(FILLERS)
        fillers.add(filler)
    assert len(fillers) > 15, "no filler is measured by itself"
    found = Sides.of(tokenizer, control, not chat)
    assert all(p[-1] == n[-1] for p, n in zip(found.positive, found.negative))
    wanted = median(sides.differences)
    assert all(wanted <= d <= wanted + 8 for d in found.differences)
    assert list(control_pairs(pairs, tokenizer, count=30, seed=1)) == list(control)
    assert list(control_pairs(pairs, tokenizer, count=30, seed=2)) != list(control)


def test_the_longer_side_is_the_one_that_is_longer_in_the_pairs(demo, base):
    rng = random.Random(0)
    short = Pairs.of([(p.prompt, p.positive, longer(p.negative, rng)) for p in base])
    assert max(Sides.of(demo[1], control_pairs(short, demo[1]), True).differences) < 0
    blank = Pairs((*base[:5], Pair("It is", " ", " bad")))
    assert len(control_pairs(blank, demo[1])) == 5, "nothing is no continuation"
    equal = Sides.of(demo[1], control_pairs(base, demo[1]), True).differences
    assert min(equal) >= LEAST, "of equal length: a filler's length"


def test_a_set_that_is_all_length_is_found_out(demo, base):
    """The same words on both sides, other fillers than the control's: nothing but length and insertion is left."""
    rng = random.Random(1)
    pairs = Pairs.of([(p.prompt, longer(p.positive, rng), p.positive) for p in base])
    momentum = austeer.measure(*demo, pairs, "attention", layers=range(10), progress=False)
    report = check_pairs(pairs, demo[1], demo[0], momentum, k=60, control_count=40, progress=False)
    found, site = report.control, report.control.sites["attention"]
    assert not found.balanced and found.longer_is == "positive" and found.tokens >= 8
    assert site.k == 60 and site.same_sign == len(site.reacting) > 2 * site.expected
    assert site.excess > 0.2
    assert site.depends is None and site.longer == 0, "no pair has the negative side longer"
    top = momentum.select("attention", 60)
    units = {(u.layer, u.index): u.beta for u in top}
    for unit in site.reacting:
        assert units[unit.layer, unit.index] == pytest.approx(unit.beta) and unit.beta * unit.control > 0
    assert report["length"].level == "grave"
    assert report["length alone, attention"].level in ("warning", "grave")


def test_a_set_of_equal_lengths_is_not(demo, base):
    momentum = austeer.measure(*demo, base, "attention", layers=range(10), progress=False)
    report = check_pairs(base, demo[1], demo[0], momentum, k=60, control_count=40, progress=False)
    site = report.control.sites["attention"]
    assert report.control.balanced and abs(site.excess) < 0.2
    assert report["length alone, attention"].level in ("ok", "note")


def test_the_share_by_chance_is_that_of_layer_and_sign(tiny64, demo):
    pairs = numbered_pairs(40)
    momentum = austeer.measure(tiny64, demo[1], pairs, "ffn", progress=False)
    found = length_control(tiny64, demo[1], pairs, momentum, k=10**9, count=40, progress=False).sites["ffn"]
    assert found.k == momentum.sites["ffn"].positive.numel(), "at most all of the site"
    control = austeer.measure(tiny64, demo[1], control_pairs(pairs, demo[1], count=40), "ffn", progress=False)
    counters = control.sites["ffn"]
    reacts = austeer.statistics.discoveries(counters, 0.05)
    assert found.significant == int(reacts.sum()) > 0 and found.share_of_site == pytest.approx(
        float(reacts.double().mean())
    )
    up, wins = counters.positive > counters.negative, momentum.sites["ffn"]
    plan_up = wins.positive >= wins.negative
    assert found.same_sign == int((reacts & (up == plan_up)).sum())
    expected = sum(
        float((reacts[layer] & (up[layer] == sign)).double().mean()) * int((plan_up[layer] == sign).sum())
        for layer in range(2)
        for sign in (True, False)
    )
    assert found.expected == pytest.approx(expected)


def test_signs_that_turn_with_the_length_are_counted(tiny64, demo):
    """An AU of the residual stream that is the token count: its sign is the longer side's."""
    rng = random.Random(3)
    words = ["river", "boats", "green", "quiet", "view", "soup", "bread"]
    pairs = Pairs.of(
        [(f"{i} the {rng.choice(words)}", *(" so" + " and" * n for n in rng.sample(range(1, 6), 2))) for i in range(60)]
    )
    layer = tiny64.model.layers[1]

    def count(module, args, output):
        steps = torch.arange(output.shape[1], dtype=output.dtype)[None, :].expand(output.shape[:2])
        output = output.clone()
        output[..., 5] = steps
        return output

    with_count = layer.mlp.register_forward_hook(count)
    try:
        momentum = austeer.measure(tiny64, demo[1], pairs, "ffn", share_prompts=False, progress=False)
        found = length_control(tiny64, demo[1], pairs, momentum, k=32, progress=False).sites["ffn"]
    finally:
        with_count.remove()
    assert found.longer >= 10 and found.shorter >= 10 and found.turns >= 1 and found.depends >= found.turns


def test_momentum_of_another_kind_is_refused(tiny, tiny64, demo, base):
    momentum = austeer.measure(tiny, demo[1], base[:4], "ffn", progress=False)
    with pytest.raises(SelectionError, match=r"layers 3 .*model has 2"):
        length_control(tiny64, demo[1], base, momentum)
    chat = base.with_chat_template(demo[1])
    with pytest.raises(SelectionError, match=r"momentum.*chat template"):
        length_control(tiny, demo[1], chat, momentum)
    with pytest.raises(SelectionError, match=r"k: .* 0"):
        length_control(tiny, demo[1], base, momentum, k=0)
    with pytest.raises(PairsError, match=r"count: .* 0"):
        control_pairs(base, demo[1], count=0)
