"""Scopes: names and ranges, and the columns that they stand for."""

import re

import pytest
import torch

from austeer import SteeringError
from austeer.steering.markers import Answer
from austeer.steering.scope import END, SCOPES, Scope, parse_scope


def test_names_and_ranges():
    assert [parse_scope(name) for name in SCOPES] == [Scope(name) for name in SCOPES]
    assert parse_scope((2, 5)) == parse_scope([2, 5]) == Scope("range", 2, 5)
    assert parse_scope((2, None)) == Scope("range", 2, END)
    answer = Answer(start=((3,),), text="from 'a' on")
    assert parse_scope(answer) == Scope("answer", answer=answer) and str(parse_scope(answer)) == "answer, from 'a' on"
    assert parse_scope(answer).interval(7, 0, 0) == (7, END)
    assert [str(parse_scope(s)) for s in ("prompt", (2, 5), (2, None))] == [
        "prompt",
        "tokens 2 to 4",
        "tokens 2 to the end",
    ]


@pytest.mark.parametrize(
    "wrong", ["prompts", "", None, 3, (1,), (1, 2, 3), (3, 3), (5, 2), (-1, 4), (0.0, 4), (True, 4), (0, END + 1), "ab"]
)
def test_what_is_no_scope(wrong):
    with pytest.raises(SteeringError, match=f"scope.*{re.escape(repr(wrong))}.*prompt"):
        parse_scope(wrong)


def test_intervals_of_rows_without_padding_are_integers():
    found = {name: Scope(name).interval(7, 0, 0) for name in SCOPES}
    last = {"last_prompt_token": (6, 7), "from_last_prompt_token": (6, END)}
    assert found == {"all": (0, END), "prompt": (0, 7), "generation": (7, END), **last}
    assert Scope("range", 2, 5).interval(7, 0, 0) == (2, 5)


def test_padding_moves_ranges_and_the_last_token():
    before, after = torch.tensor([0, 3]), torch.tensor([2, 0])
    assert [t.tolist() for t in Scope("range", 2, 5).interval(7, before, after)] == [[2, 5], [5, 8]]
    assert [t.tolist() for t in Scope("last_prompt_token").interval(7, before, after)] == [[4, 6], [5, 7]]
    first, stop = Scope("from_last_prompt_token").interval(7, before, after)
    assert (first.tolist(), stop) == ([4, 6], END)
    assert int(Scope("range", 2, END).interval(7, before, after)[1].max()) > 2**40  # adding padding does not overflow
