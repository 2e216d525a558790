"""`austeer profile` as a user runs it."""

import json

import pytest

from austeer import Profile
from austeer.momentum.profile import FORMAT
from austeer.utils.files import kind_of


@pytest.fixture(scope="module")
def folder(demo, tiny_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    tiny_of("llama").save_pretrained(folder)
    demo[1].save_pretrained(folder)
    return folder


def test_a_profile_of_own_texts(folder, command_line, tmp_path):
    out, texts = tmp_path / "m.profile", tmp_path / "texts.txt"
    texts.write_text("The soup was warm.\nTwo boats left the old mill.\n")
    command = ("profile", "--model", folder, "--out", out, "--neutral", texts, "--draws", 16, "--device", "cpu")
    code, printed, _ = command_line(*command)
    assert code == 0 and "16 draws of 2 texts (2 texts, " in printed and "36%" in printed
    assert printed.startswith("will hold 0.0 GB")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.profile", "texts.txt"]
    made = Profile.load(out)
    assert (
        kind_of(out) == FORMAT
        and list(made.rows) == ["attention", "ffn", "neuron"]
        and made.texts_name.startswith("2 texts, ")
    )
    code, printed, _ = command_line(*command, "--force", "--json", "--sites", "neuron", "--seed", 3)
    found = json.loads(printed)
    assert code == 0 and found["sites"] == ["neuron"] and found["draws"] == 16 and found["error"] == made.error
    assert found["memory"]["rows"] == 16 * 3 * 48 * 2 and found["spread"] > 0
    code, _, error = command_line(*command, "--force", "--error", 0.2, "--recompute")
    assert code == 2 and "found 16, expected at least" in error


def test_what_is_there_is_not_overwritten(folder, command_line, tmp_path):
    out = tmp_path / "m.profile"
    out.write_text("mine")
    code, _, error = command_line("profile", "--model", folder, "--out", out)
    assert code == 2 and "--force" in error and out.read_text() == "mine"
