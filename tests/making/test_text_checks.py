"""Artefacts that texts alone show: blank sides, prompts that come again, contradictions."""

import random

import pytest

from austeer.making.text_checks import (
    check_blank,
    check_contradictions,
    check_identical,
    check_prompts,
    near_duplicates,
)
from austeer.pairs.pair import Pair

WORDS = [f"{a}{b}" for a in ("ba", "ko", "li", "mu", "re", "sto") for b in ("den", "fur", "gel", "hop", "nix")]


def varied(count, length=8):
    rng = random.Random(count)
    return [" ".join(rng.sample(WORDS, length)) for _ in range(count)]


def test_blank_sides_are_counted_by_side():
    pairs = [Pair(f"q{i}", " 5", "" if i < 6 else "\n - " if i < 8 else " 6") for i in range(20)]
    found = check_blank(pairs)
    assert found.level == "grave" and "8 of 20 (40 %)" in found.verdict and "refuses" in found.remedy
    assert found.numbers["blank"] == {"positive": 0, "negative": 6}
    assert found.numbers["without_words"] == {"positive": 0, "negative": 2}
    assert check_blank(pairs[8:]).level == "ok"
    assert check_blank(pairs[7:] * 9 + pairs[8:] * 9).level == "warning"
    assert "refuses" not in check_blank(pairs[6:]).remedy


@pytest.mark.parametrize("identical, level", [(0, "ok"), (1, "note"), (10, "warning"), (60, "grave")])
def test_identical_sides(identical, level):
    assert check_identical(identical, 100).level == level


def test_pairs_and_prompts_that_come_again():
    prompts = varied(40)
    once = [Pair(prompt, " a", " b") for prompt in prompts]
    fine = check_prompts(once)
    assert fine.level == "ok" and fine.numbers["distinct"] == 40 and fine.numbers["nearly_the_same"] == 0
    again = check_prompts(once + once[:5])
    assert again.level == "warning" and again.numbers["repeated_pairs"] == 5
    few = check_prompts([Pair(prompts[i % 10], f" a{i}", " b") for i in range(40)])
    assert few.level == "warning" and few.numbers["distinct"] == 10 and few.numbers["most_pairs_of_one"] == 4
    assert few.numbers["repeated_pairs"] == 0


def test_variants_of_one_prompt_are_found_and_templates_are_not():
    prompts = varied(20, 10)
    numbers = [f"{prompt} {n}" for n, prompt in enumerate(prompts)]
    assert near_duplicates(numbers) == (0, 20)
    variants = numbers + [f"{prompt.title()}, {n + 50}?" for n, prompt in enumerate(prompts[:8])]
    assert near_duplicates(variants) == (16, 28)
    template = [
        f"Is the following something that you would ever say to anyone: {p.split()[0]} {i}"
        for i, p in enumerate(varied(30))
    ]
    assert near_duplicates(template) == (0, 30), "what all prompts have in common is their template"
    assert near_duplicates(["a"]) == (0, 1)
    found = check_prompts([Pair(p, " a", " b") for p in variants])
    assert found.level == "warning" and found.numbers["nearly_the_same"] == 16


def test_near_duplicates_agree_with_the_definition():
    rng = random.Random(0)
    prompts = [" ".join(rng.sample(WORDS[:14], rng.randrange(3, 6))) for _ in range(600)]
    sets = [set(p.split()) for p in prompts]
    frequent = {w for w in WORDS if 2 * sum(w in s for s in sets) > len(sets)}
    sets = [s - frequent for s in sets]
    asked = [i for i, s in enumerate(sets) if len(s) >= 3]
    expected = sum(any(len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j]) for j in asked if j != i) for i in asked)
    assert near_duplicates(prompts) == (expected, 600) and expected > 100


def test_many_prompts_are_drawn_from(monkeypatch):
    monkeypatch.setattr("austeer.making.text_checks.COMPARED", 50)
    assert near_duplicates([f"{p} {i}" for i, p in enumerate(varied(200))]) == (0, 50)


def test_contradictions():
    pairs = [Pair(f"q{i}", " yes", " no") for i in range(50)]
    assert check_contradictions(pairs).level == "ok"
    some = check_contradictions([*pairs, Pair("q1", " no", " maybe")])
    assert some.level == "warning" and some.numbers["pairs"] == 1
    assert check_contradictions([*pairs, *(Pair(f"q{i}", " no", " yes") for i in range(10))]).level == "grave"
    assert check_contradictions([Pair("q", " yes", " yes")] * 2).level == "ok", "equal sides are another matter"
