"""Where the answer is in a text: the automaton finds what a search for the markers finds, and bad markers are named."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from austeer import Answer, SteeringError
from austeer.steering.markers import Automaton
from letter_answers import answer_of, letters_in_answer, tokens_of

MARKER = st.text("abc", min_size=1, max_size=3)
MARKERS = st.fixed_dictionaries(
    {
        "start": st.lists(MARKER, max_size=2),
        "pauses": st.lists(st.tuples(MARKER, MARKER), max_size=2),
        "turn": st.lists(MARKER, max_size=1),
    }
)


@settings(max_examples=400, deadline=None)
@given(MARKERS, st.text("abcd", max_size=24))
def test_tokens_in_the_answer(markers, text):
    try:
        answer = answer_of(**markers)
    except SteeringError as error:
        assert "two markers" in str(error)
        assume(False)
    automaton = Automaton(answer)
    assert automaton.read(tokens_of(text)) == letters_in_answer(text, **markers)
    assert len(automaton.on) == len(automaton.next[0]) and automaton.on[0] is not bool(answer.start)


@pytest.mark.parametrize(
    ("markers", "text", "expected"),
    [
        ({}, "abc", "111"),
        ({"start": ["ab"]}, "aababb", "001111"),
        ({"start": ["aab"]}, "aaab", "0001"),
        ({"pauses": [("x", "y")]}, "axbyc", "10011"),
        ({"pauses": [("x", "x")]}, "axbxc", "10011"),
        ({"pauses": [("xx", "xx")]}, "xxxxa", "10011"),
        ({"start": ["e"], "pauses": [("t", "e")]}, "tabeatbea", "000110011"),
        ({"start": ["e"], "turn": ["q"]}, "aebqae", "011001"),
        ({"pauses": [("x", "y")], "turn": ["q"]}, "xaqb", "0011"),
        ({"start": ["b", "ab"]}, "ab", "01"),
        ({"start": ["d"]}, "abc", "000"),
    ],
)
def test_by_hand(markers, text, expected):
    found = Automaton(answer_of(**markers)).read(tokens_of(text))
    assert "".join("01"[inside] for inside in found) == expected


def test_a_text_may_be_read_in_pieces():
    automaton, text = Automaton(answer_of(["ab"], [("cc", "d")])), tokens_of("aabccabdcab")
    state = 0
    for number, token in enumerate(text):
        state = automaton.step(state, token)
        assert automaton.read(text[number + 1 :], state) == automaton.read(text)[number + 1 :]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"start": 5}, "start.*5"),
        ({"start": (5,)}, "start.*5"),
        ({"start": ((),)}, r"start.*\(\)"),
        ({"start": ("ab",)}, "start.*ab"),
        ({"start": ((True,),)}, "start.*True"),
        ({"turn": ((-1,),)}, "turn.*-1"),
        ({"pauses": ((((1,),),),)}, "pauses.*1"),
        ({"pauses": (((), ((1,),)),)}, "pauses.*without"),
        ({"pauses": 3}, "pauses.*3"),
        ({"pauses": ((((1,),), ((2,),)), (((1,),), ((3,),)))}, r"\[1\].*two markers"),
        ({"start": ((1, 2),), "turn": ((1, 2),)}, r"\[1, 2\].*two markers"),
        ({"start": (tuple(range(2000)),)}, "states.*1024"),
    ],
)
def test_what_is_no_answer(arguments, named):
    with pytest.raises(SteeringError, match=f"answer.*{named}"):
        Automaton(Answer(**arguments))
