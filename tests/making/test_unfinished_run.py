"""What an unfinished run has written: whole batches, of these settings, or nothing."""

import pytest

from austeer import FileFormatError, PairsError
from austeer.making.unfinished_run import Partial, partial_path

SETTINGS = {"seed": 1, "positive": "Answer kindly.", "temperature": None}
BATCHES = [{"batch": i, "rows": [[f"p{i}", "ä", "b"]], "dropped": {}} for i in range(3)]


@pytest.fixture
def out(tmp_path):
    partial = Partial(tmp_path / "sub" / "pairs.jsonl", SETTINGS)
    assert partial.open(resume=True) == []
    for batch in BATCHES:
        partial.add(batch)
    return tmp_path / "sub" / "pairs.jsonl"


def test_batches_come_back(out):
    partial = Partial(out, SETTINGS)
    assert partial.open(resume=True) == BATCHES
    partial.remove()
    assert not partial_path(out).exists()


def test_a_line_that_was_being_written_does_not_count(out):
    path = partial_path(out)
    whole = path.read_bytes()
    end = whole.rfind(b"\n", 0, -1) + 1
    for cut in range(end, len(whole)):
        path.write_bytes(whole[:cut])
        partial = Partial(out, SETTINGS)
        assert partial.open(resume=True) == BATCHES[:2]
        partial.add(BATCHES[2])
        assert path.read_bytes() == whole


def test_a_run_that_stopped_before_its_first_batch_begins_anew(out):
    path = partial_path(out)
    head = path.read_bytes().splitlines(keepends=True)[0]
    for cut in (0, 10, len(head)):
        path.write_bytes(head[:cut])
        assert Partial(out, SETTINGS).open(resume=True) == []
        assert path.read_bytes() == head
    assert Partial(out, SETTINGS | {"seed": 2}).open(resume=False) == [] and path.read_bytes() != head


def test_other_settings_and_damage_are_refused(out):
    with pytest.raises(PairsError, match=r"pairs.jsonl.partial: .*--resume"):
        Partial(out, SETTINGS).open(resume=False)
    with pytest.raises(FileFormatError, match=r"pairs.jsonl.partial: .*seed 1.* 2"):
        Partial(out, SETTINGS | {"seed": 2}).open(resume=True)
    path = partial_path(out)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for content in (
        b"\xff",
        b"\xff\n",
        lines[1],
        whole.replace(b'"batch": 1', b'"batch": 2'),
        b"".join([lines[0], lines[2]]),
        whole.replace(b'"version": 1', b'"version": 9'),
        b"".join([lines[0], b"[]\n"]),
    ):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"pairs.jsonl.partial: damaged.*--force"):
            Partial(out, SETTINGS).open(resume=True)
        assert path.read_bytes() == content
