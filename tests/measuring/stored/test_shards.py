"""Shards: what is read of them, and every kind of file that is refused before anything is counted."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from austeer import FileFormatError
from austeer.measuring.stored.shards import COMPLETE, find_shards, read_shard
from austeer.pairs.halves import half_rows_without_texts
from stored_activations import LAYERS, MODEL, SHAPES, random_rows, write_blocks, write_plain


def test_shard_of_another_tool(tmp_path):
    sides = random_rows(6, torch.bfloat16)
    shard = read_shard(write_plain(tmp_path / "a.safetensors", sides, labels=torch.zeros(6)))
    assert (shard.rows, shard.dtype, dict(shard.shapes), shard.header) == (6, torch.bfloat16, SHAPES, None)
    assert shard.number(3) is None
    data = shard.path.read_bytes()
    for site, pair in sides.items():
        for side, values in zip(("positive", "negative"), pair, strict=True):
            start = shard.starts[f"{site}.{side}"]
            raw = bytearray(data[start : start + 6 * shard.row_bytes(site)])
            assert torch.frombuffer(raw, dtype=torch.bfloat16).view(values.shape).equal(values)


def test_two_dimensions_are_one_layer(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"ffn.positive": torch.zeros(4, 9), "ffn.negative": torch.ones(4, 9)}, path)
    assert dict(read_shard(path).shapes) == {"ffn": (1, 9)}


def test_halves_of_shards_that_do_not_say(tmp_path):
    """Blocks of 16 rows take turns, and where a reader begins does not matter."""
    shard = read_shard(write_plain(tmp_path / "a.safetensors", random_rows(70), half=torch.ones(70, dtype=torch.uint8)))
    flags = torch.zeros(70, dtype=torch.bool).index_fill_(0, shard.half(0, 70), True).tolist()
    assert [len(list(run)) for _, run in itertools.groupby(flags)] == [16, 16, 16, 16, 6]
    for start, stop in ((0, 1), (15, 17), (33, 70)):
        assert shard.half(start, stop).tolist() == [i - start for i in range(start, stop) if flags[i]]
    names = [f"{n}.safetensors" for n in range(40)]
    assert 5 < sum(bool(len(half_rows_without_texts(name, 0, 16))) for name in names) < 35, "also of one block a file"


@pytest.mark.parametrize("half", [torch.ones(5, dtype=torch.uint8), torch.ones(7), torch.ones(7, 1).byte()])
def test_a_half_of_another_shape_is_no_shard_of_ours(tmp_path, half):
    path = write_blocks(tmp_path, random_rows(7), 7)[0]
    header, _ = header_of(path)
    tensors = load_file(path) | {"half": half}
    save_file(tensors, path, metadata=header["__metadata__"])
    with pytest.raises(FileFormatError, match=f"{path}.*header"):
        read_shard(path)


def test_shard_says_what_it_is_of(tmp_path):
    paths = write_blocks(tmp_path, random_rows(7), 4, skip={2})
    header = read_shard(paths[0]).header
    assert (header.model, header.layers, header.source, header.first, header.pairs, header.cut) == (
        *(MODEL, LAYERS, "pairs.jsonl", 0, 4, 1),
    )
    assert [read_shard(paths[0]).number(row) for row in range(3)] == [0, 1, 3]
    assert [read_shard(paths[1]).number(row) for row in range(4)] == [4, 5, 6, 7]


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


BAD = {
    "rows of the two sides": ({"ffn.positive": ones(4, 3, 5), "ffn.negative": ones(5, 3, 5)}, "4 and 5"),
    "rows of two sites": (
        {f"{s}.{p}": ones(r, 3, 5) for s, r in (("ffn", 4), ("layer", 3)) for p in ("positive", "negative")},
        "3 and 4",
    ),
    "layers of two sites": (
        {f"{s}.{p}": ones(4, n, 5) for s, n in (("ffn", 3), ("layer", 2)) for p in ("positive", "negative")},
        "ffn 3.*layer 2",
    ),
    "widths of the two sides": ({"ffn.positive": ones(4, 3, 5), "ffn.negative": ones(4, 3, 6)}, r"ffn.* 5 .*ffn.* 6\b"),
    "one side": ({"ffn.positive": ones(4, 3, 5)}, "'ffn.positive'.*'ffn.negative'"),
    "unknown site": ({"mlp.positive": ones(4, 5), "mlp.negative": ones(4, 5)}, "'mlp'"),
    "no activations": ({"weight": ones(4, 5)}, "weight"),
    "integers": ({f"ffn.{p}": torch.ones(4, 5).int() for p in ("positive", "negative")}, "I32"),
    "float64": ({f"ffn.{p}": ones(4, 5, dtype=torch.float64) for p in ("positive", "negative")}, "F64"),
    "dtypes of the two sides": ({"ffn.positive": ones(4, 5), "ffn.negative": ones(4, 5).half()}, "F16.*F32"),
    "dtypes of two sites": (
        {f"{s}.{p}": ones(4, 1, 5, dtype=d) for s, d in (("ffn", torch.float32), ("layer", torch.float16))
         for p in ("positive", "negative")},
        "F16.*F32",
    ),
    "one dimension": ({f"ffn.{p}": ones(4) for p in ("positive", "negative")}, r"'ffn.*\[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_do_not_fit_are_refused(tmp_path, name):
    tensors, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(FileFormatError, match=f"{path}.*{message}"):
        read_shard(path)


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("keep", [0, 7, 8, 50, -1, None])
def test_shard_of_another_length_is_named(tmp_path, keep):
    path = write_plain(tmp_path / "a.safetensors", random_rows(6))
    path.write_bytes(path.read_bytes() + b"x" if keep is None else path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"a\.safetensors.*(damaged|cut off)"):
        read_shard(path)


@pytest.mark.parametrize("what", ["text", "list", "offset", "fraction", "shape", "no dtype", "number", "metadata"])
def test_garbled_header_is_no_traceback(tmp_path, what):
    path = write_plain(tmp_path / "a.safetensors", random_rows(6))
    header, data = header_of(path)
    entry = header["ffn.positive"]
    changed = {
        "text": b"\xff" * 40,
        "list": b"[1, 2]",
        "offset": header | {"ffn.positive": entry | {"data_offsets": [-4, 10]}},
        "fraction": header | {"ffn.positive": entry | {"data_offsets": [0.5, entry["data_offsets"][1]]}},
        "shape": header | {"ffn.positive": entry | {"shape": [6, 3, "5"]}},
        "no dtype": header | {"ffn.positive": {name: entry[name] for name in ("shape", "data_offsets")}},
        "number": header | {"ffn.positive": 5},
        "metadata": header | {"__metadata__": 5},
    }
    with_header(path, changed[what], data)
    with pytest.raises(FileFormatError, match=r"a\.safetensors.*damaged"):
        read_shard(path)


def test_shape_that_its_bytes_do_not_hold(tmp_path):
    path = write_plain(tmp_path / "a.safetensors", random_rows(6))
    header, data = header_of(path)
    header["ffn.positive"]["shape"] = header["ffn.negative"]["shape"] = [6, 3, 6]
    with_header(path, header, data)
    with pytest.raises(FileFormatError, match=r"damaged.*'ffn\.(negative|positive)'.*\[6, 3, 6\]"):
        read_shard(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "version '2'.*version 1"),
        ({"format": "austeer-momentum"}, "'austeer-momentum'"),
        ({"header": "{}"}, "damaged header"),
        ({"header": {"layers": [0, 1]}}, "tensors.*header"),
        ({"header": {"layers": []}}, "damaged header.*layers"),
        ({"header": {"layers": [0, 1, 4]}}, "damaged header.*layers"),
        ({"header": {"first": -1}}, "damaged header"),
        ({"header": {"pairs": 3}}, "tensors.*header"),
        ({"header": {"source": 3}}, "damaged header"),
    ],
)
def test_own_header_is_checked(tmp_path, change, message):
    (path,) = write_blocks(tmp_path, random_rows(4), 4)
    header, data = header_of(path)
    metadata = header["__metadata__"]
    if isinstance(change.get("header"), dict):
        change = {"header": json.dumps(json.loads(metadata["header"]) | change["header"])}
    metadata.update(change)
    with_header(path, header, data)
    with pytest.raises(FileFormatError, match=message):
        read_shard(path)


def test_shards_come_in_the_order_of_their_pairs(tmp_path):
    paths = write_blocks(tmp_path / "a", random_rows(10), 3)
    found = find_shards([paths[2], paths[0], paths[3], paths[1]])
    assert [shard.path for shard in found] == paths
    assert [shard.path for shard in find_shards(tmp_path / "a")] == paths


def test_no_shard(tmp_path):
    with pytest.raises(FileFormatError, match=rf"{tmp_path}.*\*\.safetensors"):
        find_shards(tmp_path)
    with pytest.raises(FileFormatError, match="no shard"):
        find_shards([])
    with pytest.raises(FileFormatError, match=r"b\.safetensors.*no such file"):
        find_shards(tmp_path / "b.safetensors")


def test_nothing_counts_twice(tmp_path):
    paths = write_blocks(tmp_path / "a", random_rows(10), 5)
    link = tmp_path / "link.safetensors"
    link.symlink_to(paths[0])
    with pytest.raises(FileFormatError, match=r"twice.*0000\.safetensors"):
        find_shards([paths[0], link])
    with pytest.raises(FileFormatError, match=r"twice.*0000\.safetensors"):
        find_shards([paths[0], paths[0]])
    copied = shutil.copy(paths[0], tmp_path / "copy.safetensors")
    with pytest.raises(FileFormatError, match=r"pairs\.jsonl from 0.* 4.*twice"):
        find_shards([*paths, copied])
    other = write_blocks(tmp_path / "b", random_rows(10), 4)
    with pytest.raises(FileFormatError, match=r"pairs\.jsonl.*twice"):
        find_shards([paths[0], other[1]])


def test_folder_that_is_not_whole(tmp_path):
    paths = write_blocks(tmp_path, random_rows(10), 5)
    (tmp_path / COMPLETE).unlink()
    with pytest.raises(FileFormatError, match=r"10 pairs.*activations\.json"):
        find_shards(tmp_path)
    assert len(find_shards(paths)) == 2
    write_blocks(tmp_path, random_rows(10), 5, resume=True)
    paths[1].unlink()
    with pytest.raises(FileFormatError, match=r"5 pairs.*10"):
        find_shards(tmp_path)
    (tmp_path / COMPLETE).write_text("{")
    with pytest.raises(FileFormatError, match=r"activations\.json.*damaged"):
        find_shards(tmp_path)
