"""austeer serve, as a user types it; the engines' tests start what it prints."""

import shlex

import pytest

from austeer.plans.serving import MIDDLEWARE, PROCESSOR, SCHEDULER, VARIABLE


def test_the_command_that_it_is(command_line, tmp_path):
    folder = tmp_path / "my sets"
    folder.mkdir()
    code, shown, _ = command_line(
        "serve", "user/model", "--sets", folder, "--print", "--port", "8001", "--dtype=float32"
    )
    variable, *command = shlex.split(shown)
    assert code == 0 and variable == f"{VARIABLE}={folder}"
    ours = ["--logits-processors", PROCESSOR, "--scheduler-cls", SCHEDULER, "--middleware", MIDDLEWARE]
    assert command == ["vllm", "serve", "user/model", *ours, "--port", "8001", "--dtype=float32"]


@pytest.mark.parametrize(("sets", "match"), [("no/such/folder", "no/such/folder"), ('{"kind": {}}', '"sets"')])
def test_sets_that_cannot_be_read_are_refused_before_anything_starts(command_line, sets, match):
    code, _, error = command_line("serve", "user/model", "--sets", sets)
    assert code == 2 and VARIABLE in error and match in error


def test_without_vllm_it_says_so(command_line, tmp_path):
    code, _, error = command_line("serve", "user/model", "--sets", tmp_path)
    assert code == 2 and "pip install vllm" in error
