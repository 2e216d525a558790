"""Shards that belong together, and those that do not."""

import pytest
import torch

from austeer import AusteerError, FileFormatError, PairsError
from austeer.measuring.stored.folder import StoredActivations, fingerprint_of
from austeer.models.sites import Fingerprint, find_sites, fingerprint
from stored_activations import LAYERS, MODEL, SHAPES, random_rows, write_blocks, write_plain

PLAIN = Fingerprint("llama", 4, {}, "by hand", None)


def test_own_shards_say_everything(tmp_path):
    write_blocks(tmp_path, random_rows(9, torch.bfloat16), 4)
    stored = StoredActivations.open(tmp_path)
    assert (stored.model, stored.layers, stored.chat_template) == (MODEL, LAYERS, False)
    assert (len(stored.shards), stored.shapes, stored.columns) == (3, SHAPES, 36)


def test_model_given_by_hand(tmp_path):
    path = write_plain(tmp_path / "a.safetensors", random_rows(6))
    stored = StoredActivations.open(path, model=PLAIN, layers=LAYERS, chat_template=True)
    assert stored.model == Fingerprint("llama", 4, {"attention": 7, "ffn": 5}, "by hand", None)
    assert stored.layers == LAYERS and stored.chat_template
    every = StoredActivations.open(path, model=Fingerprint("llama", 3, {}, "", None))
    assert every.layers == (0, 1, 2) and not every.chat_template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a.safetensors.*model=Fingerprint.*--model"),
        ({"model": PLAIN}, r"3 layers.*\(0, 1, 2, 3\).* 4"),
        ({"model": PLAIN, "layers": [0, 1, 4]}, r"3 layers.*\(0, 1, 4\)"),
        ({"model": PLAIN, "layers": [1, 0, 2]}, "ascending"),
        ({"model": Fingerprint("llama", 3, {"ffn": 6}, "", None)}, "'ffn': 5.*'ffn': 6"),
    ],
)
def test_what_is_given_has_to_fit(tmp_path, options, message):
    path = write_plain(tmp_path / "a.safetensors", random_rows(6))
    with pytest.raises(FileFormatError, match=message):
        StoredActivations.open(path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": Fingerprint("qwen2", 4, {}, "", None)}, "'llama', 4.*'qwen2', 4"),
        ({"layers": [0, 1, 2]}, r"layers.*\(0, 1, 3\).*\(0, 1, 2\)"),
        ({"chat_template": True}, "chat_template.*False.*True"),
    ],
)
def test_what_shards_say_is_not_overruled(tmp_path, options, message):
    write_blocks(tmp_path, random_rows(6), 6)
    with pytest.raises(FileFormatError, match=message):
        StoredActivations.open(tmp_path, **options)
    assert StoredActivations.open(tmp_path, model=PLAIN, layers=LAYERS, chat_template=False).layers == LAYERS


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("model", {"model": Fingerprint("llama", 4, MODEL.widths, "another", None)}),
        ("layers", {"layers": (0, 1, 2)}),
        ("chat_template", {"chat_template": True}),
        ("sites", {"sides": {"ffn": random_rows(6)["ffn"]}}),
        ("dtype", {"sides": random_rows(6, torch.float16)}),
    ],
)
def test_unlike_shards_are_refused(tmp_path, what, changes):
    write_blocks(tmp_path / "a", random_rows(6), 6)
    (path,) = write_blocks(tmp_path / "b", **{"sides": random_rows(6), "block": 6} | changes)
    path.write_bytes(path.read_bytes().replace(b"pairs.jsonl", b"queue.jsonl"))  # so that no pair counts twice
    with pytest.raises(FileFormatError, match=f"b/.*{what}.*a/"):
        StoredActivations.open([tmp_path / "a", path])


def test_no_row(tmp_path):
    path = write_plain(tmp_path / "a.safetensors", random_rows(0))
    with pytest.raises(PairsError, match=r"no row.*1 shards"):
        StoredActivations.open(path, model=PLAIN, layers=LAYERS)


def test_parts_are_every_nth_shard(tmp_path):
    paths = write_blocks(tmp_path, random_rows(10), 2)
    stored = StoredActivations.open(tmp_path)
    parts = [[shard.path for shard in stored.part(i, 3).shards] for i in range(3)]
    assert parts == [[paths[0], paths[3]], [paths[1], paths[4]], [paths[2]]]
    for index, count in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(AusteerError, match=f"part.*{index}.*{count}"):
            stored.part(index, count)


def test_fingerprint_from_a_config_alone(tiny, tmp_path):
    tiny.config.save_pretrained(tmp_path)
    found, own = fingerprint_of(str(tmp_path)), fingerprint(tiny, find_sites(tiny))
    assert (found.model_type, found.layers, found.widths) == (own.model_type, own.layers, own.widths)
    assert found.name == tmp_path.name
