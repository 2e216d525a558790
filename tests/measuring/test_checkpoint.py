"""Checkpoints: what was saved comes back, damage and other runs are told, and an old file survives a failed write."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import Counters, FileFormatError
from austeer.measuring.checkpoint import FORMAT, VERSION, Checkpoint, State, remove, written
from austeer.utils import files

SETTINGS = {
    "model": {"model_type": "llama", "layers": 2, "widths": {"ffn": 3}, "name": "n", "revision": None},
    "sites": ["ffn"],
    "layers": [0, 1],
    "max_length": 512,
    "share_prompts": True,
}


def state_of(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)

    def counters():
        counts = [torch.randint(0, 9, (2, 3), generator=generator) for _ in range(2)]
        return Counters(*counts, *(torch.randn(2, 3, dtype=torch.float64, generator=generator) for _ in range(2)))

    found = {"block": 3, "digest": "ab" * 32, "pairs": 384, "half_pairs": 190, "cut": 2, "identical": 1}
    found |= {"sites": {"ffn": counters()}, "half": {"ffn": counters()}, "extra": {"tree": "tensor"}}
    return State(**(found | changes))


def assert_same(state, other):
    plain = [{k: v for k, v in vars(s).items() if k not in ("sites", "half")} for s in (state, other)]
    assert plain[0] == plain[1]
    for mine, theirs in ((state.sites, other.sites), (state.half, other.half)):
        assert mine.keys() == theirs.keys()
        for name, counters in theirs.items():
            for what, t in counters.tensors().items():
                assert torch.equal(mine[name].tensors()[what], t) and mine[name].tensors()[what].dtype == t.dtype


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 99), st.integers(0, 2**40), st.text(max_size=20), st.none() | st.sampled_from(["tensor", "mapping"])
)
def test_what_was_saved_comes_back(tmp_path_factory, seed, number, name, tree):
    settings_ = SETTINGS | {"pairs": name}
    path = tmp_path_factory.mktemp("checkpoints") / "new folder" / "c"
    state = state_of(seed, block=number, pairs=number * 128, extra={"tree": tree, "batch_tokens": number})
    Checkpoint(path, settings_).save(state)
    assert_same(Checkpoint(path, settings_).load(), state)


@pytest.mark.parametrize(
    "name, value, found",
    [
        ("model", SETTINGS["model"] | {"layers": 3}, "model.layers 2, expected 3"),
        ("share_prompts", False, "share_prompts True, expected False"),
        ("something_new", 1, "something_new None, expected 1"),
    ],
)
def test_each_other_setting_is_named(tmp_path, name, value, found):
    Checkpoint(tmp_path / "c", SETTINGS).save(state_of())
    other = Checkpoint(tmp_path / "c", SETTINGS | {name: value})
    with pytest.raises(FileFormatError, match=f"c: .*found {found}"):
        other.load()


def test_another_number_of_processes_is_another_run(tmp_path):
    Checkpoint(tmp_path / "c", SETTINGS, (1, 3)).save(state_of())
    (tmp_path / "c.1-of-3").rename(tmp_path / "c.1-of-2")
    with pytest.raises(FileFormatError, match=r"processes 3.* 2"):
        Checkpoint(tmp_path / "c", SETTINGS, (1, 2)).load()
    (tmp_path / "c.1-of-2").rename(tmp_path / "c.2-of-3")
    with pytest.raises(FileFormatError, match=r"process 1.* 2"):
        Checkpoint(tmp_path / "c", SETTINGS, (2, 3)).load()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_anywhere_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("checkpoints") / "c"
    checkpoint = Checkpoint(path, SETTINGS)
    checkpoint.save(state_of())
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = checkpoint.load()
    except FileFormatError as error:
        assert str(path) in str(error)
    else:  # a blank between two entries of the header, say
        assert_same(found, state_of())


@pytest.mark.parametrize("change", ["settings", "sites", "block", "extra", "half_pairs", "tensor", "half tensor"])
def test_something_is_missing(tmp_path, change):
    checkpoint = Checkpoint(tmp_path / "c", SETTINGS)
    checkpoint.save(state_of())
    header, tensors = files.read(tmp_path / "c", FORMAT, VERSION)
    if change.endswith("tensor"):
        del tensors["half.ffn.positive" if "half" in change else "ffn.delta_sum"]
    else:
        del header[change]
    files.write(tmp_path / "c", FORMAT, VERSION, header, tensors)
    with pytest.raises(FileFormatError, match=r"c: .*(settings|content)"):
        checkpoint.load()


def test_a_folder_in_its_place(tmp_path):
    for path in (tmp_path, "", "/"):
        with pytest.raises(FileFormatError, match=f"checkpoint.*folder '{path}'"):
            Checkpoint(path, SETTINGS)


def test_checkpoints_of_a_name(tmp_path):
    path = tmp_path / "c.x"
    assert written(path) == written(tmp_path / "no folder" / "c") == []
    files_ = [Checkpoint(path, SETTINGS, part) for part in ((0, 1), (0, 2), (1, 2), (10, 11))]
    for checkpoint in files_:
        checkpoint.save(state_of())
    Checkpoint(tmp_path / "c.xy", SETTINGS).save(state_of())
    Checkpoint(tmp_path / "cax", SETTINGS).save(state_of())
    (tmp_path / "c.x.2-of-3").write_text("somebody's own")
    (tmp_path / "c.x.1-of-3").mkdir()
    assert {found.name for found in written(path)} == {"c.x", "c.x.0-of-2", "c.x.1-of-2", "c.x.10-of-11"}
    assert {found.name for found in files_[1].others()} == {"c.x", "c.x.10-of-11"}, "of its own run are no others"
    assert {found.name for found in files_[0].others()} == {"c.x.0-of-2", "c.x.1-of-2", "c.x.10-of-11"}


def test_removing_takes_what_belongs_to_it_and_nothing_else(tmp_path):
    for part in ((0, 2), (1, 2)):
        Checkpoint(tmp_path / "c", SETTINGS, part).save(state_of())
    Checkpoint(tmp_path / "cc", SETTINGS).save(state_of())
    (tmp_path / "c.1-of-3").write_text("somebody's own")
    (tmp_path / "c.0-of-2.hidden").mkdir()
    (tmp_path / "c.0-of-2.hidden" / "hidden-states.json").write_text("{}")
    (tmp_path / "c.1-of-2.hidden").mkdir()
    (tmp_path / "c.1-of-2.hidden" / "notes").write_text("somebody's own")
    remove(tmp_path / "c")
    remove(tmp_path / "c")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "c.1-of-2.hidden",
        "c.1-of-2.hidden/notes",
        "c.1-of-3",
        "cc",
    ]
