"""Hidden states between two layers: the same from any place, space reserved first, and whole after a kill."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.measuring.layerwise import hidden_states as scratch
from austeer.measuring.layerwise.hidden_states import HiddenStates, ScratchError
from austeer.utils.machine import free_memory

CPU = torch.device("cpu")
SHAPES = [(2, 3), (1, 7), (4, 1)]
HEADER = "hidden-states.json"


def filled(states, shapes=SHAPES, width=4, dtype=torch.float32, base=0):
    """Writes something else into every batch; returns what was written."""
    written = []
    for i, (rows, length) in enumerate(shapes):
        hidden = torch.full((rows, length, width), base + i, dtype=dtype)
        states.write(i, hidden)
        written.append(hidden)
    return written


def held(states, count=3):
    return [states.read(i, slice(None), CPU) for i in range(count)]


def states_of(shapes=SHAPES, width=4, **options):
    return HiddenStates(shapes, width, torch.float32, **{"device": CPU} | options)


def persistent(folder, digest="pairs", resume=False):
    return states_of(folder=folder, persistent=True, digest=digest, resume=resume)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 17),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([None, 0]),
)
def test_what_is_written_is_read(shapes, width, dtype, memory):
    states = HiddenStates(shapes, width, dtype, device=CPU, memory=memory)
    assert states.place == ("memory" if memory is None else "file")
    written = filled(states, shapes, width, dtype)
    for i, expected in enumerate(written):
        found = states.read(i, slice(None), CPU)
        assert torch.equal(found, expected) and found.dtype == dtype
        found.zero_()  # a copy: a layer may work in place
        assert torch.equal(states.read(i, slice(None), CPU), expected)
    states.close()


def test_wrong_form_is_refused():
    states = states_of()
    with pytest.raises(ScratchError, match=r"\[2, 3, 5\].*\[2, 3, 4\]"):
        states.write(0, torch.zeros(2, 3, 5))
    with pytest.raises(ScratchError, match=r"float16.*float32.*strategy='resident'"):
        states.write(0, torch.zeros(2, 3, 4, dtype=torch.float16))


def test_place_by_size(tmp_path, monkeypatch):
    size = 17 * 4 * 4
    assert states_of(memory=size).place == "memory"
    assert states_of(memory=size - 1, folder=tmp_path).place == "file"
    monkeypatch.setattr(scratch, "free_memory", lambda device: 2 * size)
    assert states_of().place == "memory"
    monkeypatch.setattr(scratch, "free_memory", lambda device: 2 * size - 2)
    assert states_of().place == "file"
    assert states_of(room=10**6).place == "file"  # room is a device's
    meta = torch.device("meta")  # any device but the CPU
    assert states_of(device=meta, room=size).place == "device"
    assert states_of(device=meta, room=size - 1).place == "file"


def test_temporary_file_has_no_name(tmp_path):
    states = states_of(memory=0, folder=tmp_path / "new")
    filled(states)
    assert list((tmp_path / "new").iterdir()) == []  # so nothing stays behind, whatever becomes of the process
    assert [float(h.mean()) for h in held(states)] == [0, 1, 2]


@pytest.mark.parametrize("lasting", [False, True])
def test_disk_too_small(tmp_path, lasting):
    with pytest.raises(ScratchError, match=rf"{tmp_path}.*\d GB.*\d GB"):
        states_of([(1 << 20, 1 << 20)], 256, memory=0, folder=tmp_path, persistent=lasting)
    assert not tmp_path.exists() if lasting else not list(tmp_path.iterdir())


@pytest.mark.parametrize("lasting", [False, True])
def test_folder_that_cannot_be(tmp_path, lasting):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ScratchError, match=r"taken.*written"):
        states_of(memory=0, folder=tmp_path / "taken", persistent=lasting)


def test_a_file_that_cannot_be_opened_leaves_no_other_behind(tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    (folder / "hidden-states-1.bin").symlink_to("hidden-states-1.bin")
    with pytest.raises(ScratchError, match=r"states.*written"):
        persistent(folder)
    assert not folder.exists()


def test_input_stays_whole_until_the_output_is(tmp_path):
    states = persistent(tmp_path)
    assert states.size == 2 * 17 * 4 * 4 and states.place == "file"
    states.begin(-1)
    embedded = filled(states, base=10)
    states.complete(-1)
    states.begin(0)
    assert all(map(torch.equal, held(states), embedded))
    filled(states, base=20)
    assert all(map(torch.equal, held(states), embedded))  # still what layer 0 reads
    states.close()

    again = persistent(tmp_path, resume=True)  # killed in layer 0
    with pytest.raises(ScratchError, match=r"layer -1.*layer 0"):
        again.begin(1)
    again.begin(0)
    assert all(map(torch.equal, held(again), embedded))
    first = filled(again, base=20)
    again.forms.append(2)
    again.complete(0)
    again.close()

    late = persistent(tmp_path, resume=True)  # killed when layer 0 was complete, before or after that was noted
    late.begin(0)
    assert all(map(torch.equal, held(late), embedded)) and late.forms == [2]
    filled(late, base=20)
    late.complete(0)
    late.begin(1)
    assert all(map(torch.equal, held(late), first))
    (tmp_path / "not ours").write_text("")
    late.delete()
    assert [path.name for path in tmp_path.iterdir()] == ["not ours"]


def test_what_is_written_over_is_not_there(tmp_path):
    states = persistent(tmp_path)
    for layer in (-1, 0, 1):
        states.begin(layer)
        filled(states)
        states.complete(layer)
    states.begin(2)  # over what layer 0 left; killed here
    states.close()
    again = persistent(tmp_path, resume=True)
    with pytest.raises(ScratchError, match=r"layer 1.*layer 0"):
        again.begin(1)  # by someone whose counters of layer 1 were lost
    again.begin(2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8))
def test_killed_anywhere(tmp_path_factory, stops):
    """A run of four layers that is stopped at some step of a layer again and again ends as one that is not."""
    folder = tmp_path_factory.mktemp("states")

    def attempt(first, resume, stop):
        states = persistent(folder, resume=resume)
        done = first
        for layer in range(first, 4):
            states.begin(layer)
            for i in range(len(SHAPES)):
                if stop == 0 and i == 1:
                    states.close()
                    return done
                before = states.read(i, slice(None), CPU) if layer >= 0 else torch.zeros(*SHAPES[i], 4)
                states.write(i, 3 * before + layer + 2)
            if stop != 1:
                states.complete(layer)
            if stop in (1, 2, 3):  # 2: complete, but the caller did not come to note it
                states.close()
                return done + (stop == 3)
            done = layer + 1
        states.begin(4)  # which reads what layer 3 left
        results.append([float(hidden.mean()) for hidden in held(states)])
        states.delete()
        return None

    results: list = []
    place = -1
    for stop in stops:
        place = attempt(place, place > -1, stop)
        if place is None:
            break
    if place is not None:
        attempt(place, place > -1, None)
    value = 0.0
    for layer in range(-1, 4):
        value = 3 * value + layer + 2
    assert results == [[value] * 3]


def test_foreign_states_are_refused(tmp_path):
    with pytest.raises(ScratchError, match=f"{tmp_path}.*no hidden states"):
        persistent(tmp_path, resume=True)
    states = persistent(tmp_path)
    states.begin(-1)
    states.complete(-1)
    states.close()
    with pytest.raises(ScratchError, match="other pairs"):
        persistent(tmp_path, digest="others", resume=True)
    header = (tmp_path / HEADER).read_text()
    for text, message in (("{", "damaged"), ("[]", "another format"), (json.dumps({"format": "x"}), "another format")):
        (tmp_path / HEADER).write_text(text)
        with pytest.raises(ScratchError, match=message):
            persistent(tmp_path, resume=True)
    (tmp_path / HEADER).write_text(header)
    persistent(tmp_path, resume=True).close()
    os.truncate(tmp_path / "hidden-states-1.bin", 16)
    with pytest.raises(ScratchError, match=r"hidden-states-1.bin.*16.*272"):
        persistent(tmp_path, resume=True)
    (tmp_path / "hidden-states-1.bin").unlink()
    with pytest.raises(ScratchError, match=r"hidden-states-1.bin.*None"):
        persistent(tmp_path, resume=True)


def test_folder_in_use(tmp_path):
    states = persistent(tmp_path)
    states.begin(-1)
    before = filled(states, base=5)
    with pytest.raises(ScratchError, match=f"{tmp_path}.*another run"):
        persistent(tmp_path)
    states.complete(-1)
    states.begin(0)
    assert all(map(torch.equal, held(states), before))  # untouched by the other
    states.close()
    persistent(tmp_path, resume=True).close()  # and free again


def test_anew_forgets_what_was_there(tmp_path):
    states = persistent(tmp_path)
    states.begin(-1)
    states.complete(-1)
    states.close()
    persistent(tmp_path, digest="others").close()
    with pytest.raises(ScratchError, match="no hidden states"):
        persistent(tmp_path, resume=True)


def test_free_memory(tmp_path, monkeypatch):
    limits, read = "/sys/fs/cgroup/memory.", Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p: read(tmp_path / p.name if str(p).startswith(limits) else p))
    machine = free_memory(CPU)
    assert 2**20 < machine < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert free_memory(CPU) == 400  # of the container; what it caches of files is free
    (tmp_path / "memory.current").write_text("5000\n")
    assert free_memory(CPU) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 2**20
