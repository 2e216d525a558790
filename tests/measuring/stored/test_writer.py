"""The writer of activations: what it leaves behind in any order of events."""

import json

import pytest
import torch
from safetensors.torch import load_file

from austeer import FileFormatError
from austeer.measuring.stored.shards import find_shards, read_shard
from austeer.measuring.stored.writer import ActivationWriter
from austeer.models.sites import Fingerprint
from stored_activations import LAYERS, MODEL, random_rows, write_blocks


def test_rows_and_numbers_are_as_given(tmp_path):
    sides = random_rows(7, torch.float16)
    paths = write_blocks(tmp_path, sides, 4, skip={1, 5})
    loaded = [load_file(path) for path in paths]
    assert [path.name for path in paths] == ["000000000000.safetensors", "000000000004.safetensors",
                                             "000000000008.safetensors"]  # fmt: skip
    assert torch.cat([t["numbers"] for t in loaded]).tolist() == [0, 2, 3, 4, 6, 7, 8]
    for site, pair in sides.items():
        for side, values in zip(("positive", "negative"), pair, strict=True):
            assert torch.cat([t[f"{site}.{side}"] for t in loaded]).equal(values)
    assert json.loads((tmp_path / "activations.json").read_text())["pairs"] == 9


def test_a_buffer_may_have_rows_to_spare(tmp_path):
    writer = ActivationWriter(tmp_path, MODEL, layers=LAYERS)
    buffers = {"ffn": torch.arange(10.0).view(10, 1, 1).expand(10, 3, 5)}
    loaded = load_file(writer.add(buffers, [4, 6, 7], first=4, pairs=4))
    assert loaded["ffn.positive"][:, 0, 0].tolist() == [0, 1, 2]
    assert loaded["ffn.negative"][:, 0, 0].tolist() == [3, 4, 5]


def test_which_half_a_pair_is_in_is_kept(tmp_path):
    writer = ActivationWriter(tmp_path, MODEL, layers=LAYERS)
    path = writer.add({"ffn": torch.ones(10, 3, 5)}, [0, 1, 3, 4, 5], first=0, pairs=6, half=torch.tensor([1, 4]))
    shard = read_shard(path)
    assert [shard.half(*span).tolist() for span in ((0, 5), (1, 4), (2, 4), (4, 5))] == [[1, 4], [0], [], [0]]


def test_folder_in_use_is_refused(tmp_path):
    write_blocks(tmp_path, random_rows(9), 4)
    with pytest.raises(FileFormatError, match=f"{tmp_path}.*3 shards"):
        ActivationWriter(tmp_path, MODEL, layers=LAYERS, source="pairs.jsonl")
    assert (tmp_path / "activations.json").exists(), "a refusal changes nothing"
    other = Fingerprint("qwen2", 4, MODEL.widths, "tiny", None)
    for changes in ({"model": other}, {"layers": (0, 1, 2)}, {"source": "other.jsonl"}, {"chat_template": True}):
        arguments = {"model": MODEL, "layers": LAYERS, "source": "pairs.jsonl"} | changes
        with pytest.raises(FileFormatError, match=f"{tmp_path}.*another run"):
            ActivationWriter(tmp_path, resume=True, **arguments)


def test_folder_is_not_whole_until_it_is_finished(tmp_path):
    write_blocks(tmp_path, random_rows(9), 4)
    ActivationWriter(tmp_path, MODEL, layers=LAYERS, source="pairs.jsonl", resume=True)
    with pytest.raises(FileFormatError, match=f"{tmp_path}.*not finished"):
        find_shards(tmp_path)


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match=f"{tmp_path / 'file'}.*written"):
        ActivationWriter(tmp_path / "file" / "inside", MODEL, layers=LAYERS)
    writer = ActivationWriter(tmp_path / "folder", MODEL, layers=LAYERS)
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("")
    with pytest.raises(FileFormatError, match=r"folder.*written"):
        writer.add({"ffn": torch.ones(8, 3, 5)}, [0], first=0, pairs=1)
    with pytest.raises(FileFormatError, match=r"folder.*written"):
        writer.finish(1)
