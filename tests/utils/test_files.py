"""Files: written whole or not at all, read back bit for bit, and refused with a reason."""

import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from austeer import FileFormatError
from austeer.utils import files

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
HEADER = {"name": "ü – 🧀", "numbers": [1, 2.5, -3], "nothing": None, "deep": {"yes": True}}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (), (0, 4), (1, 1, 1)]
    return {f"t{i}": (torch.randn(shapes[i % 5], generator=generator) * 9).to(dtype) for i, dtype in enumerate(DTYPES)}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), json_values), st.integers(0, 99))
def test_round_trip(tmp_path_factory, header, seed):
    path, tensors = tmp_path_factory.mktemp("files") / "new" / "a.safetensors", random_tensors(seed)
    files.write(path, "kind", 1, header, tensors)
    found, back = files.read(path, "kind", 1)
    assert found == header
    assert_same(back, tensors)


def test_views_transposes_and_shared_memory(tmp_path):
    x = torch.arange(24.0).view(4, 6)
    tensors = {"whole": x, "again": x, "row": x[1], "column": x[:, 2], "transposed": x.T, "strided": x[::2, 1::3]}
    files.write(tmp_path / "a", "kind", 1, {}, tensors)
    assert_same(files.read(tmp_path / "a", "kind", 1)[1], tensors)
    assert torch.equal(x, torch.arange(24.0).view(4, 6))


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write(path, "kind", 1, HEADER, random_tensors(1))
    before = path.read_bytes()
    for header, tensors in (({"x": float("nan")}, {}), ({"x": object()}, {}), ({}, {"t": torch.zeros(2).to_sparse()})):
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
            files.write(path, "kind", 1, header, tensors)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error, raised",
    [(KeyboardInterrupt("stopped"), KeyboardInterrupt), (SafetensorError("I/O error: No space left"), FileFormatError)],
)
def test_a_broken_off_write_leaves_nothing(tmp_path, monkeypatch, error, raised):
    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(raised, match=r"stopped|a: .*No space left"):
        files.write(tmp_path / "a", "kind", 1, {}, random_tensors(1))
    assert not list(tmp_path.iterdir())


def test_write_onto_a_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileFormatError, match=f"{tmp_path / 'a'}: .*written"):
        files.write(tmp_path / "a", "kind", 1, {}, random_tensors(1))
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_mode_follows_the_umask(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        files.write(tmp_path / "a", "kind", 1, {}, {})
        assert os.umask(umask) == umask, "asking for the umask must not change it"
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def write_raw(path, metadata, tensors=None):
    save_file(tensors or {"t": torch.zeros(1)}, path, metadata=metadata)


GOOD = {"format": "kind", "version": "1", "header": "{}"}


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "format None.*'kind'"),
        ({**GOOD, "format": "other"}, "format 'other'.*'kind'"),
        ({**GOOD, "version": "2"}, "version '2'.*1"),
        ({"format": "kind", "header": "{}"}, "version None"),
        ({"format": "kind", "version": "1"}, "damaged.*kind"),
        ({**GOOD, "header": "{"}, "damaged.*kind"),
        (GOOD, "checksum"),
        ({**GOOD, "checksum": "0" * 64}, "checksum"),
    ],
)
def test_foreign_and_altered_files(tmp_path, metadata, message):
    write_raw(tmp_path / "a", metadata)
    with pytest.raises(FileFormatError, match=f"{tmp_path / 'a'}: .*{message}"):
        files.read(tmp_path / "a", "kind", 1)


def test_header_must_be_an_object(tmp_path):
    files.write(tmp_path / "a", "kind", 1, [1, 2], {})
    with pytest.raises(FileFormatError, match=r"a: .*header"):
        files.read(tmp_path / "a", "kind", 1)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"{}", b"\xff" * 64, (10**9).to_bytes(8, "little") * 3])
def test_what_is_not_safetensors(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"a: .*damaged.*kind"):
        files.read(tmp_path / "a", "kind", 1)


@pytest.mark.parametrize("name", ["missing", "."])
def test_no_file(tmp_path, name):
    with pytest.raises(FileFormatError, match=f"{tmp_path / name}: no such file.*austeer-plan"):
        files.read(tmp_path / name, "austeer-plan", 1)


def test_every_cut_is_noticed(tmp_path):
    path = tmp_path / "a"
    files.write(path, "kind", 1, HEADER, random_tensors(2))
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(FileFormatError):
            files.read(path, "kind", 1)


def test_two_tensors_that_change_places_are_noticed(tmp_path):
    path = tmp_path / "a"
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    files.write(path, "kind", 1, {}, {"a": a, "b": b})
    content = path.read_bytes()
    one, two = (t.numpy().tobytes() for t in (a, b))
    assert content.endswith(one + two)
    path.write_bytes(content[: -len(one + two)] + two + one)
    with pytest.raises(FileFormatError, match="checksum"):
        files.read(path, "kind", 1)
