"""Files of JSON lines: what is whole is read, and what was cut off is neither read nor kept."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.utils import journal

ENTRIES = st.lists(
    st.dictionaries(st.text(), st.floats(allow_nan=False) | st.text() | st.lists(st.integers())), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(ENTRIES, st.data())
def test_cut_off_anywhere_the_whole_lines_are_read_and_go_on(tmp_path_factory, entries, data):
    path = tmp_path_factory.mktemp("journal") / "entries.jsonl"
    for entry in entries:
        journal.append(path, entry)
    assert journal.read(path) == (entries, path.stat().st_size)
    raw = path.read_bytes()
    assert raw == b"".join(map(journal.line, entries))
    at = data.draw(st.integers(0, len(raw)))
    path.write_bytes(raw[:at])
    found, length = journal.read(path)
    assert found == entries[: raw[:at].count(b"\n")] and path.read_bytes() == raw[:at]
    journal.cut(path, length)
    journal.append(path, "next")
    assert journal.read(path)[0] == [*found, "next"]


@pytest.mark.parametrize("damaged", [b"{\n", b'"\xff"\n'])
def test_a_whole_line_that_is_no_json_is_told(tmp_path, damaged):
    path = tmp_path / "entries.jsonl"
    path.write_bytes(json.dumps(1).encode() + b"\n" + damaged)
    with pytest.raises(ValueError):
        journal.read(path)
