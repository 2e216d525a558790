"""Prompts from files, and the package's own."""

import re

import pytest

from austeer import PairsError
from austeer.making.prompts import read_prompts


def test_lines_of_a_text_each_once(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("One?\n\n  Two? \nOne?\nThree?\n", encoding="utf-8")
    assert read_prompts(path) == ["One?", "Two?", "Three?"]
    assert read_prompts(path, limit=2) == ["One?", "Two?"]


def test_rows_with_a_field(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    assert read_prompts(str(path)) == ["One?", "Two?"]
    (tmp_path / "q.csv").write_text("question,x\nOne?,1\n")
    assert read_prompts(tmp_path / "q.csv", field="question") == ["One?"]
    with pytest.raises(PairsError, match=r"prompts.jsonl.*None.*'question'.*prompt.*--prompt-field"):
        read_prompts(path, field="question")


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("p.txt", b"\n \n", "p.txt: .*prompt"),
        ("p.txt", b"caf\xe9\n", "p.txt, line 1: .*UTF-8"),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1: .*''.*'prompt'"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: .*3.*'prompt'"),
        ("p.jsonl", b"prompt\n", "p.jsonl, line 1: .*JSON"),
        ("p.md", b"x", "'.md'"),
    ],
)
def test_unreadable_prompts(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PairsError, match=found):
        read_prompts(tmp_path / name)
    for missing in ("none.txt", "none.jsonl"):
        with pytest.raises(PairsError, match=f"{missing}: "):
            read_prompts(tmp_path / missing)


def test_the_packages_own_are_short_varied_and_plain():
    prompts = read_prompts()
    assert len(prompts) >= 100
    for prompt in prompts:
        assert prompt.isascii() and prompt[-1] in ".?" and 3 <= len(prompt.split()) <= 16, prompt
    openings = [tuple(prompt.split()[:3]) for prompt in prompts]
    assert max(map(openings.count, openings)) <= 8
    words = [w for p in prompts for w in {w for w in re.findall("[a-z]+", p.lower()) if len(w) > 5} - {"should"}]
    assert max(words.count(w) for w in set(words)) <= 5, "no topic has more than a few"
    assert sum(prompt.endswith("?") for prompt in prompts) < 0.8 * len(prompts)
