"""austeer push, and the Hub's names in austeer generate, as a user types them."""

import json
import re

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from austeer import Plan, steer
from austeer.cli import app
from austeer.forward.generation import continue_prompts
from austeer.models.sites import Fingerprint
from austeer.plans.card import model_card
from austeer.plans.files import FILE_NAME
from local_hub import local_hub
from small_plans import KNOWN, plan_of


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server of our own, asked as the account "user", and the folder "kind" with a plan here."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    monkeypatch.chdir(tmp_path)
    KNOWN.save_pretrained("kind")
    with local_hub() as server:
        yield server


def ask(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "120"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_push_says_where_it_is_and_what_comes_next(hub):
    text = ask("push", "kind", "user/kind")
    repository = hub.repositories["user/kind"]
    oid = repository.refs["main"]
    assert f"3 AUs, scale\nwrote {hub.url}/user/kind/commit/{oid}\n" in text
    assert f"next: austeer generate user/kind@{oid} --model 'user/model" in text
    assert Plan.from_pretrained(f"user/kind@{oid}") == KNOWN == Plan.from_pretrained("user/kind")
    assert (
        repository.commits[oid]["README.md"].decode() == str(model_card(KNOWN, "user/kind")) and not repository.private
    )


def test_push_as_json_with_all_options(hub):
    data = json.loads(ask("push", "kind", "user/k", "--private", "--revision", "dev", "--license", "mit", "--json"))
    repository = hub.repositories["user/k"]
    assert repository.private and repository.refs["dev"] == data["commit"] != repository.refs["main"]
    files = repository.commits[data["commit"]]
    assert data == {
        "repo": "user/k",
        "files": {name: len(files[name]) for name in (FILE_NAME, "README.md")},
        "card": str(model_card(KNOWN, "user/k", license="mit")),
        "commit": data["commit"],
        "url": f"{hub.url}/user/k/commit/{data['commit']}",
    }


def test_a_card_of_ones_own(hub, tmp_path):
    (tmp_path / "mine.md").write_text("# Mein Plan – ü\n", encoding="utf-8")
    ask("push", "kind", "user/kind", "--card", "mine.md")
    repository = hub.repositories["user/kind"]
    assert repository.commits[repository.refs["main"]]["README.md"].decode() == "# Mein Plan – ü\n"


def test_a_dry_run_shows_the_card_and_asks_nobody(hub):
    assert ask("push", "kind", "user/kind", "--dry-run") == str(model_card(KNOWN, "user/kind")) + "\n"
    data = json.loads(ask("push", "kind", "user/kind", "--dry-run", "--json"))
    assert data["card"] == str(model_card(KNOWN, "user/kind")) and data["commit"] is None and data["files"]
    assert not hub.requests


def test_a_plan_of_the_hub_goes_to_another_name(hub):
    ask("push", "kind", "user/kind")
    ask("push", "user/kind", "user/copy")
    assert Plan.from_pretrained("user/copy") == KNOWN


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("kind", "kind"), "'kind'.*USER/NAME"),
        (("kind", "else/kind"), "else/kind.*403"),
        (("none", "user/kind"), "none: no such file"),
        (("cache", "user/kind"), "cache.*austeer-plan"),
        (("kind", "user/kind", "--card", "none.md"), "none.md"),
        (("kind", "user/kind", "--card", f"kind/{FILE_NAME}"), f"kind/{FILE_NAME}"),
        (("kind", "user/kind", "--card", "mine.md", "--license", "mit"), "license.*'mit'"),
        (("kind", "user/kind", "--revision", "a b"), "revision.*'a b'"),
        (("kind", "user/kind", "--license", "no-such-license"), "README.md"),
    ],
)
def test_bad_input(hub, tmp_path, command_line, arguments, message):
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "mine.md").write_text("# Mine")
    code, out, error = command_line("push", *arguments)
    assert code == 2 and not out and error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert re.search(message, error)
    for repository in hub.repositories.values():
        assert not any(FILE_NAME in files for files in repository.commits.values())


def test_generate_takes_names_of_the_hub(hub, demo, monkeypatch):
    monkeypatch.setattr("austeer.cli.common.load", lambda *options: demo)
    model = Fingerprint("llama", 30, {"attention": 576}, "HuggingFaceTB/SmolLM2-135M-Instruct", None)
    first, second = (
        plan_of([("attention", 12, i) for i in range(9)], "shift", model=model, seed=seed) for seed in (1, 2)
    )
    oid = first.push_to_hub("user/kind").oid
    second.push_to_hub("user/kind")
    prompt = "The weekend trip was"
    options = ("--model", "demo", "--alpha", "40", "--max-new-tokens", "5", "--json")
    text = ask("generate", f"user/kind@{oid}", "user/kind", "--prompt", prompt, *options)
    expected = {"unsteered": continue_prompts(*demo, [prompt], max_new_tokens=5)}
    for name, plan in ((f"kind@{oid}", first), ("kind", second)):
        with steer(demo[0], plan, 40):
            expected[f"{name}, alpha 40"] = continue_prompts(*demo, [prompt], max_new_tokens=5)
    assert json.loads(text)["continuations"] == expected
    assert len({texts[0] for texts in expected.values()}) == 3


def test_pull_puts_a_plan_into_a_folder(hub, tmp_path):
    ask("push", "kind", "user/kind")
    assert f"3 AUs, scale\nwrote sets/kind/{FILE_NAME}\n" in ask("pull", "user/kind", "--out", "sets/kind")
    assert Plan.from_pretrained(tmp_path / "sets" / "kind") == KNOWN
    data = json.loads(ask("pull", "user/kind", "--out", "sets/kind", "--json"))
    assert data == {"repo": "user/kind", "file": f"sets/kind/{FILE_NAME}", "aus": 3, "operation": "scale"}
