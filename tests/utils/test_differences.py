"""Where settings differ: the entry itself, however deep it lies."""

from austeer.utils.differences import first_difference


def test_the_entry_that_differs_is_named():
    expected = {"a": 1, "data": {"name": "x", "seed": 3, "parts": {"n": 2}}}
    assert first_difference(expected, expected) is None
    assert first_difference(expected | {"more": 1}, expected) is None
    found = {"a": 1, "data": {"name": "x", "seed": 0, "parts": {"n": 9}}}
    assert first_difference(found, expected) == "data.seed 0, expected 3"
    assert first_difference({"a": 1, "data": {"name": "x", "seed": 3, "parts": 7}}, expected).startswith("data.parts 7")
    assert first_difference({}, {"a": 1}) == "a None, expected 1"
