"""Steering sets by name: named ones, and those of a folder that changes."""

import json
import shutil

import pytest

from austeer.errors import AusteerError
from austeer.vllm.catalog import Catalog
from austeer.vllm.sets import ServingError, parse
from made_plans import PUSH, SCALE, SHIFT


def named(**sets) -> Catalog:
    return Catalog(parse(json.dumps({"sets": sets})))


def test_plans_are_read_and_cut(tmp_path):
    SHIFT.save_pretrained(tmp_path / "plan")
    whole = {"plan": str(tmp_path / "plan"), "alpha": 2}
    found = named(one=whole | {"k": 1}, two=whole)
    assert found.names() == ["one", "two"]
    assert found["one"].plans == (SHIFT.top(1),) and found["two"].plans == (SHIFT,) and found["two"].alphas == (2.0,)


@pytest.mark.parametrize(
    ("change", "match"), [({"plan": "/nothing/here"}, "/nothing/here"), ({"k": 3}, "k.*3"), ({"max_kl": 1}, "dose")]
)
def test_a_plan_that_cannot_be_had_is_named_with_its_set(tmp_path, change, match):
    SHIFT.save_pretrained(tmp_path / "plan")
    found = named(kind={"plan": str(tmp_path / "plan"), "alpha": 2} | change)
    with pytest.raises(AusteerError, match=f"'kind'.*{match}"):
        found["kind"]


def test_a_folder_has_plans_files_and_sets(tmp_path):
    SHIFT.save_pretrained(tmp_path / "folder")
    shutil.copy(SCALE.save_pretrained(tmp_path / ".hidden"), tmp_path / "file.safetensors")
    text = {"plans": [{"plan": "folder", "alpha": 2, "k": 1}, {"plan": "file.safetensors", "alpha": 3}]}
    (tmp_path / "both.json").write_text(json.dumps(text | {"scope": "generation"}))
    (tmp_path / "empty").mkdir()
    found = Catalog(parse(json.dumps({"sets": str(tmp_path), "max_alpha": 5})))
    assert found.names() == ["both", "file", "folder"]
    assert found["folder"].plans == (SHIFT,) and found["folder"].alphas == (None,) and found["folder"].limits.alpha == 5
    assert found["file"].plans == (SCALE,)
    both = found["both"]
    assert (both.plans, both.alphas, str(both.spec.scope)) == ((SHIFT.top(1), SCALE), (2.0, 3.0), "generation")


def test_what_changes_in_a_folder_is_seen(tmp_path):
    found = Catalog(parse(str(tmp_path)))
    with pytest.raises(ServingError, match=r"'kind'.*none"):
        found["kind"]
    SHIFT.save_pretrained(tmp_path / "kind")
    assert found["kind"].plans == (SHIFT,) and found["kind"] is found["kind"]
    PUSH.save_pretrained(tmp_path / "kind")
    assert found["kind"].plans == (PUSH,)
    (tmp_path / "set.json").write_text('{"plan": "kind", "alpha": 1}')
    assert found["set"].plans == (PUSH,)
    SHIFT.save_pretrained(tmp_path / "kind")  # the set's own file stays as it is
    assert found["set"].plans == (SHIFT,)
    (tmp_path / "set.json").write_text('{"plan": "kind", "alpha": 2}')
    assert found["set"].alphas == (2.0,)
    shutil.rmtree(tmp_path / "kind")
    for name in ("kind", "set"):
        with pytest.raises(ServingError, match="'kind'"):
            found[name]


def test_a_set_may_come_before_its_plan(tmp_path):
    (tmp_path / "set.json").write_text('{"plan": ".plans/kind", "alpha": 2}')
    found = Catalog(parse(str(tmp_path)))
    with pytest.raises(ServingError, match=r"\.plans/kind"):
        found["set"]
    SHIFT.save_pretrained(tmp_path / ".plans" / "kind")
    assert found["set"].plans == (SHIFT,) and found.names() == ["set"]


def test_a_folder_that_is_gone_is_named(tmp_path):
    (tmp_path / "sets").mkdir()
    found = Catalog(parse(str(tmp_path / "sets")))
    (tmp_path / "sets").rmdir()
    with pytest.raises(ServingError, match=r"'kind'.*sets"):
        found["kind"]


def test_a_half_written_file_is_refused_until_it_is_whole(tmp_path):
    whole = SHIFT.save_pretrained(tmp_path / ".made").read_bytes()
    found, file = Catalog(parse(str(tmp_path))), tmp_path / "kind.safetensors"
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(AusteerError, match=r"kind\.safetensors"):
            found["kind"]
    file.write_bytes(whole)
    assert found["kind"].plans == (SHIFT,)
    (tmp_path / "set.json").write_text('{"plan": "ki')
    with pytest.raises(ServingError, match=r"set\.json.*JSON"):
        found["set"]
    (tmp_path / "set.json").write_text('{"plan": "kind.safetensors"}')
    assert found["set"].plans == (SHIFT,)


def test_two_plans_of_one_name_are_refused(tmp_path):
    file = SHIFT.save_pretrained(tmp_path / "kind")
    shutil.copy(file, tmp_path / "kind.safetensors")
    with pytest.raises(ServingError, match=r"'kind'.*kind.safetensors.*remove one"):
        Catalog(parse(str(tmp_path)))["kind"]
    (tmp_path / "kind.safetensors").unlink()
    assert Catalog(parse(str(tmp_path)))["kind"].plans == (SHIFT,)


@pytest.mark.parametrize("name", ["", "..", "../kind", "a/b", ".hidden", "a\0b", "x" * 300, 3, None, True, ["kind"]])
def test_what_is_no_name_leads_nowhere(tmp_path, name):
    folder = tmp_path / "sets"
    for place in (tmp_path / "kind", folder / ".hidden", folder / "a" / "b"):
        SHIFT.save_pretrained(place)
    with pytest.raises(ServingError, match="steering set"):
        Catalog(parse(str(folder)))[name]


def test_a_hub_id_in_a_folder_is_to_be_fetched(tmp_path):
    (tmp_path / "set.json").write_text('{"plan": "user/kind"}')
    with pytest.raises(ServingError, match=r"'user/kind'.*austeer pull user/kind"):
        Catalog(parse(str(tmp_path)))["set"]
