"""How well something simple tells the side: known answers, chance, and no answer from the pair that is asked."""

import random

import pytest

from austeer.making.side_prediction import sign_test, told_by, told_by_longer

N = 400
PROMPTS = [f"prompt {i}" for i in range(N)]


def test_what_tells_the_side_always_and_never():
    always = told_by(["a"] * N, ["b"] * N, PROMPTS)
    assert always.share == 1 and always.p < 1e-9 and always.level == "grave"
    same = told_by(["a"] * N, ["a"] * N, PROMPTS)
    assert same.share == 0.5 and same.level == "ok"
    unseen = told_by(range(N), range(N, 2 * N), PROMPTS)
    assert unseen.share == 0.5, "a value that was not counted tells nothing"


@pytest.mark.parametrize("seed", range(5))
def test_balanced_answers_tell_nothing_in_either_direction(seed):
    order = ["yes", "no"] * (N // 2)
    random.Random(seed).shuffle(order)
    other = ["no" if a == "yes" else "yes" for a in order]
    told = told_by(order, other, PROMPTS)
    assert 0.35 < told.share < 0.6 and told.level == "ok", "leaving one out would make this 0"


def test_a_share_of_seven_in_ten_is_found():
    positive = ["yes" if i % 10 < 7 else "no" for i in range(N)]
    negative = ["no" if a == "yes" else "yes" for a in positive]
    told = told_by(positive, negative, PROMPTS)
    assert told.share == pytest.approx(0.7) and told.level == "warning"


def test_pairs_of_one_prompt_do_not_tell_each_other():
    positive = [f"word {i // 4}" for i in range(N)]  # each word with one prompt only
    told = told_by(positive, ["other"] * N, [f"prompt {i // 4}" for i in range(N)])
    assert told.share == 1, "the other side's word is known"
    told = told_by(positive, [f"no {w}" for w in positive], [f"prompt {i // 4}" for i in range(N)])
    assert told.share == 0.5


def test_longer_sides():
    told = told_by_longer(90, 10, 100)
    assert told.share == 0.9 and told.level == "grave" and told.p == sign_test(10, 90)
    assert told_by_longer(0, 30, 100).share == 0.65
    assert told_by_longer(0, 0, 100).share == 0.5 and told_by_longer(0, 0, 100).p == 1
    assert told_by_longer(3, 0, 3).level == "ok", "three pairs show nothing"


def test_the_sign_test_is_exact():
    assert sign_test(5, 0) == sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(4, 1) == pytest.approx(2 * 6 / 32)
    assert sign_test(0, 0) == 1
