"""What the commands share: results that are written whole, and conditions on rows."""

import shlex
import warnings
from pathlib import Path

import pytest

from austeer import AusteerError, ExportWarning, PairsError
from austeer.cli.common import next_line, parse_where, warnings_as_notes, write_json
from austeer.cli.generate import _labels
from austeer.cli.strength import parse_alphas


def test_a_result_is_written_whole(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"effect": float("nan"), "k": 3})
    endless: list = []
    endless.append(endless)
    with pytest.raises(RecursionError):
        write_json(path, {"k": endless})
    assert path.read_text() == '{\n  "effect": null,\n  "k": 3\n}\n' and list(path.parent.iterdir()) == [path]


def test_the_next_command_can_be_given_as_it_stands():
    line = next_line("austeer", "generate", Path("my plans", "it's"), "--alpha", 2.5)
    assert shlex.split(line) == ["next:", "austeer", "generate", "my plans/it's", "--alpha", "2.5"]


def test_strengths():
    assert parse_alphas(None) == [] and parse_alphas(["2,-2", "0.5"]) == [2, -2, 0.5]
    for wrong in ("strong", "2,", "nan", "inf"):
        with pytest.raises(AusteerError, match=f"--alpha.*'{wrong.split(',')[-1]}'"):
            parse_alphas([wrong])
    assert _labels([2.345678901, 4, {"ffn": 1 / 3, "attention": 2.0}]) == [
        *("alpha 2.346", "alpha 4", "alpha ffn 0.3333, attention 2")
    ]
    assert _labels([1.00001, 1]) == ["alpha 1.00001", "alpha 1"], "told apart"


def test_conditions():
    assert parse_where(None) == {}
    assert parse_where(["label=1", "why=a=b"]) == {"label": "1", "why": "a=b"}
    with pytest.raises(PairsError, match=r"--where.*'label'"):
        parse_where(["a=b", "label"])


@pytest.mark.parametrize("wanted", ["error", "ignore", "default"])
def test_warnings_of_the_library_are_notes_whatever_is_asked_of_warnings(capsys, wanted):
    with warnings.catch_warnings():
        warnings.simplefilter(wanted)
        with warnings_as_notes():
            warnings.warn("a thing to know", ExportWarning, stacklevel=2)
    assert capsys.readouterr().err == "note: a thing to know\n"
    with pytest.warns(DeprecationWarning, match="someone else's"), warnings_as_notes():
        warnings.warn("someone else's", DeprecationWarning, stacklevel=2)
