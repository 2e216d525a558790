"""What the commands share: results that are written whole, and conditions on rows."""

import pytest

from austeer import PairsError
from austeer.cli.common import parse_where, write_json


def test_a_result_is_written_whole(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"effect": float("nan"), "k": 3})
    endless: list = []
    endless.append(endless)
    with pytest.raises(RecursionError):
        write_json(path, {"k": endless})
    assert path.read_text() == '{\n  "effect": null,\n  "k": 3\n}\n' and list(path.parent.iterdir()) == [path]


def test_conditions():
    assert parse_where(None) == {}
    assert parse_where(["label=1", "why=a=b"]) == {"label": "1", "why": "a=b"}
    with pytest.raises(PairsError, match=r"--where.*'label'"):
        parse_where(["a=b", "label"])
