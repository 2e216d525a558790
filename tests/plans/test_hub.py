"""Plans on the Hub: the real client against a server of our own, with no network."""

import re
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from austeer import FileFormatError, Plan, PlanError
from austeer.plans import files as plan_files
from austeer.plans.files import FILE_NAME
from austeer.plans.hub import HubError, split_id
from austeer.plans.repository import contents_of
from local_hub import local_hub
from small_plans import KNOWN, PLAN

ID = "user/kind"


def point_at(monkeypatch, url):
    """The client, and its templates of addresses, as ``HF_ENDPOINT`` would set them at start."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server; the client asks it as the account "user", and caches below this test's folder."""
    for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    monkeypatch.chdir(tmp_path)
    with local_hub() as server:
        point_at(monkeypatch, server.url)
        yield server


@pytest.fixture
def away(hub, monkeypatch):
    """Call it, and the server is not there any more."""

    def leave():
        with local_hub() as gone:
            pass
        point_at(monkeypatch, gone.url)

    return leave


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lfs", [False, True], ids=["regular", "large file storage"])
@pytest.mark.parametrize("plan", [PLAN, KNOWN], ids=["plain", "with evidence"])
def test_pushed_and_loaded(hub, monkeypatch, lfs, plan):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage speaks a protocol of its own
    hub.lfs = lfs
    commit = plan.push_to_hub(ID)
    assert commit.commit_url == f"{hub.url}/{ID}/commit/{commit.oid}"
    assert len(hub.stored) == lfs
    assert Plan.from_pretrained(ID) == plan
    assert set(hub.repositories[ID].commits[commit.oid]) == {".gitattributes", FILE_NAME, "README.md"}
    assert not hub.repositories[ID].private
    card = ModelCard(hub.repositories[ID].commits[commit.oid]["README.md"].decode())
    assert card.data.library_name == "austeer" and "# kind\n" in card.text


def test_branches_tags_and_commits(hub):
    plans = {name: PLAN.top(k) for name, k in (("main", 1), ("wider", 2), ("v1", 3))}
    commits = {}
    commits["v1"] = plans["v1"].push_to_hub(ID).oid
    HfApi().create_tag(ID, tag="v1")
    commits["wider"] = plans["wider"].push_to_hub(ID, revision="wider").oid
    commits["main"] = plans["main"].push_to_hub(ID).oid
    assert Plan.from_pretrained(ID) == plans["main"]
    for name, plan in plans.items():
        for revision in (name, commits[name]):
            assert Plan.from_pretrained(ID, revision=revision) == plan
            assert Plan.from_pretrained(f"{ID}@{revision}") == plan
    plans["v1"].push_to_hub(ID, revision="wider")
    assert Plan.from_pretrained(f"{ID}@wider") == plans["v1"], "a branch moves on"
    assert Plan.from_pretrained(f"{ID}@{commits['wider']}") == plans["wider"]


def test_a_branch_with_a_slash(hub):
    PLAN.push_to_hub(ID, revision="try/out")
    assert Plan.from_pretrained(f"{ID}@try/out") == PLAN
    assert FILE_NAME not in hub.repositories[ID].commits[hub.repositories[ID].refs["main"]]


def test_what_lies_here_comes_first(hub):
    PLAN.push_to_hub(ID)
    PLAN.top(1).save_pretrained(ID)
    hub.requests.clear()
    assert Plan.from_pretrained(ID) == PLAN.top(1)
    assert not hub.requests


def test_pushed_again(hub):
    first = PLAN.push_to_hub(ID, card="My own words.")
    assert hub.repositories[ID].commits[first.oid]["README.md"] == b"My own words."
    second = PLAN.top(2).push_to_hub(ID, commit_message="Fewer AUs")
    assert first.oid != second.oid and Plan.from_pretrained(ID) == PLAN.top(2)


# --- without the Hub -------------------------------------------------------------------------------------------------


def test_from_the_cache_alone(hub, away):
    commit = PLAN.push_to_hub(ID)
    hub.repositories[ID].refs["v1"] = commit.oid
    for source in (ID, f"{ID}@v1"):
        Plan.from_pretrained(source)
    hub.requests.clear()
    assert Plan.from_pretrained(ID, local_files_only=True) == PLAN
    assert not hub.requests
    away()
    for source in (ID, f"{ID}@v1", f"{ID}@{commit.oid}"):
        assert Plan.from_pretrained(source) == PLAN
        assert Plan.from_pretrained(source, local_files_only=True) == PLAN


@pytest.mark.parametrize("how", [{}, {"local_files_only": True}])
def test_neither_in_the_cache_nor_to_be_had(hub, away, how):
    PLAN.push_to_hub(ID)
    away()
    reason = "local_files_only" if how else r"\[Errno"
    with pytest.raises(HubError, match=rf"^user/kind: .*{reason}"):
        Plan.from_pretrained(ID, **how)
    with pytest.raises(HubError, match=rf"^user/kind at v1: .*{reason}"):
        Plan.from_pretrained(ID, revision="v1", **how)


def test_no_branch_is_made_for_a_pull_request(hub):
    PLAN.push_to_hub(ID)
    hub.requests.clear()
    with pytest.raises(HubError, match="user/kind at refs/pr/9"):
        PLAN.push_to_hub(ID, revision="refs/pr/9")
    assert hub.requests and not any("/branch/" in path for _, path in hub.requests)


def test_offline_mode(hub, monkeypatch):
    PLAN.push_to_hub(ID)
    Plan.from_pretrained(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert Plan.from_pretrained(ID) == PLAN
    with pytest.raises(HubError, match=r"user/other: .*offline"):
        Plan.from_pretrained("user/other")
    with pytest.raises(HubError, match=r"user/other: .*offline"):
        PLAN.push_to_hub("user/other")
    assert not hub.requests


def test_another_cache(hub, away, tmp_path):
    PLAN.push_to_hub(ID)
    assert Plan.from_pretrained(ID, cache_dir=tmp_path / "mine") == PLAN
    away()
    assert Plan.from_pretrained(ID, cache_dir=tmp_path / "mine") == PLAN
    with pytest.raises(HubError, match=r"user/kind: .*cache.*\[Errno"):
        Plan.from_pretrained(ID)


def test_a_hub_that_is_broken_and_a_plan_in_the_cache(hub):
    PLAN.push_to_hub(ID)
    Plan.from_pretrained(ID)
    hub.broken = True
    assert Plan.from_pretrained(ID) == PLAN
    with pytest.raises(HubError, match=r"user/kind: .*500"):
        PLAN.push_to_hub(ID)


# --- what cannot be loaded -------------------------------------------------------------------------------------------


def test_no_such_repository_revision_or_plan(hub):
    PLAN.push_to_hub(ID)
    hub.create("user/model").commit("main", {"config.json": b"{}"})
    with pytest.raises(HubError, match=r"^user/other: .*hf auth login"):
        Plan.from_pretrained("user/other")
    with pytest.raises(HubError, match=r"^user/kind at v9: .*revision"):
        Plan.from_pretrained(ID, revision="v9")
    with pytest.raises(HubError, match=rf"^user/model: .*{FILE_NAME}"):
        Plan.from_pretrained("user/model")


@pytest.mark.parametrize("token", ["hf_guest", False], ids=["another account", "nobody"])
def test_private_and_gated(hub, token):
    PLAN.push_to_hub(ID, private=True)
    assert Plan.from_pretrained(ID, token="hf_user") == PLAN and hub.repositories[ID].private
    other = "user/gated"
    hub.create(other, gated=True).commit("main", {FILE_NAME: b""})
    with pytest.raises(HubError, match=r"https://huggingface.co/user/gated.*hf auth login"):
        Plan.from_pretrained(other, token=token)
    hub.repositories[other].private, hub.repositories[other].gated = True, False
    with pytest.raises(HubError, match=r"^user/gated: .*private.*hf auth login"):
        Plan.from_pretrained(other, token=token)


def test_a_token_that_is_none(hub, monkeypatch):
    PLAN.push_to_hub(ID)
    with pytest.raises(HubError, match=r"user/kind: .*401.*hf auth login"):
        Plan.from_pretrained(ID, token="hf_stale")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="token"):
        Plan.from_pretrained(ID, token=True)
    assert Plan.from_pretrained(ID) == PLAN, "a public one needs none"


def test_a_file_of_many_gigabytes_is_not_downloaded(hub):
    PLAN.push_to_hub(ID)
    hub.sizes[FILE_NAME] = 40 * 10**9
    hub.requests.clear()
    with pytest.raises(HubError, match=rf"user/kind: .*40000000000 .*{FILE_NAME}"):
        Plan.from_pretrained(ID)
    assert [method for method, _ in hub.requests] == ["HEAD"]


@pytest.mark.parametrize("source", ["kind", "/nowhere/kind", "a/b/c", "a--b/c", "..", "x" * 5000])
def test_what_is_neither_a_folder_nor_an_id(hub, source):
    hub.requests.clear()
    with pytest.raises(FileFormatError, match=FILE_NAME if source == ".." else "USER/NAME"):
        Plan.from_pretrained(source)
    assert not hub.requests


def test_a_path_is_never_an_id(hub, tmp_path):
    PLAN.push_to_hub(ID)
    hub.requests.clear()
    with pytest.raises(FileFormatError, match=r"^user/kind: .*austeer-plan"):
        Plan.from_pretrained(Path(ID))
    PLAN.save_pretrained(tmp_path / "plan")
    with pytest.raises(FileFormatError, match=r"plan: .*revision 'v1'"):
        Plan.from_pretrained(tmp_path / "plan", revision="v1")
    assert not hub.requests


@pytest.mark.parametrize("revision", ["", " ", "a b", "../../main", "a..b", "x" * 300, "a\nb"])
def test_what_is_no_revision(hub, revision):
    hub.requests.clear()
    for call in (partial(Plan.from_pretrained, ID), partial(PLAN.push_to_hub, ID)):
        with pytest.raises(HubError, match=rf"^revision: .*{re.escape(repr(revision[:80]))}"):
            call(revision=revision)
    assert not hub.requests


def test_two_revisions(hub):
    with pytest.raises(HubError, match=r"user/kind.*'v1'.*'v2'"):
        Plan.from_pretrained(f"{ID}@v1", revision="v2")
    PLAN.push_to_hub(ID, revision="v1")
    assert Plan.from_pretrained(f"{ID}@v1", revision="v1") == PLAN


def test_split_id():
    assert split_id("user/kind") == ("user/kind", None) == split_id("user/kind@")
    assert split_id("user/kind@try/out") == ("user/kind", "try/out")
    for text in ("kind", "a/b/c", "user/", "/kind", "user/ki nd", "C:\\kind", "", "@v1", "kind@v1"):
        assert split_id(text) is None


# --- what is not uploaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["kind", "a/b/c", "user/ki nd", "user/kind@v1", "./kind", ""])
def test_what_is_no_repositorys_name(hub, repo_id):
    with pytest.raises(HubError, match=rf"'{repo_id}'.*USER/NAME"):
        PLAN.push_to_hub(repo_id)
    assert not hub.requests


def test_a_plan_that_cannot_be_written_makes_no_repository(hub, monkeypatch):
    monkeypatch.setattr(plan_files, "MOST_UNITS", 2)
    with pytest.raises(PlanError, match="found 3 AUs"):
        PLAN.push_to_hub(ID)
    assert not hub.requests and not hub.repositories


@pytest.mark.parametrize(
    "repo_id, token, found",
    [(ID, False, "401.*hf auth login"), (ID, "hf_stale", "401.*hf auth login"), ("else/kind", None, "403.*write")],
)
def test_not_allowed(hub, repo_id, token, found):
    with pytest.raises(HubError, match=rf"^{repo_id}: .*{found}"):
        PLAN.push_to_hub(repo_id, token=token)
    assert not hub.repositories


def test_what_should_be_private_is_not_shown(hub):
    PLAN.push_to_hub(ID)
    before = dict(hub.repositories[ID].commits)
    with pytest.raises(HubError, match=r"^user/kind: .*public.*--private"):
        KNOWN.push_to_hub(ID, private=True)
    assert hub.repositories[ID].commits == before
    hub.repositories[ID].private = True
    KNOWN.push_to_hub(ID, private=True)
    assert Plan.from_pretrained(ID) == KNOWN


def test_the_card_of_something_else_is_not_replaced(hub):
    files = {"README.md": b"A model.", "config.json": b"{}", "model.safetensors": b""}
    hub.create("user/model").commit("main", files)
    before = dict(hub.repositories["user/model"].commits)
    with pytest.raises(HubError, match=r"^user/model: .*README.md, config.json, model.safetensors"):
        PLAN.push_to_hub("user/model")
    assert hub.repositories["user/model"].commits == before


def test_a_card_that_the_hub_does_not_take(hub):
    with pytest.raises(HubError, match=r'user/kind: .*README.md.*"license"'):
        PLAN.push_to_hub(ID, license="no-such-license")
    assert FILE_NAME not in hub.repositories[ID].commits[hub.repositories[ID].refs["main"]]


def test_an_interrupted_upload_leaves_no_plan(hub, monkeypatch):
    """Plan and card come in one commit: either both are there or neither."""

    def stop(*arguments, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", stop)
    with pytest.raises(KeyboardInterrupt):
        PLAN.push_to_hub(ID)
    with pytest.raises(HubError, match=rf"user/kind: .*{FILE_NAME}"):
        Plan.from_pretrained(ID)


def test_contents_are_what_is_uploaded(hub):
    contents = contents_of(KNOWN, ID, license="apache-2.0")
    assert not hub.requests
    oid = KNOWN.push_to_hub(ID, license="apache-2.0").oid
    uploaded = hub.repositories[ID].commits[oid]
    assert contents == {name: uploaded[name] for name in contents}
