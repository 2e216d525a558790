"""Chunks: every row once, in order, and whole for as long as it is worked on."""

import time

import pytest
import torch

from austeer.measuring.stored.chunks import BUFFERS, Chunks
from austeer.measuring.stored.shards import find_shards
from stored_activations import SHAPES, random_rows, write_blocks


@pytest.mark.parametrize(("rows", "block"), [(1, 3), (4, 10), (7, 20), (100, 100)])
def test_every_row_once_and_in_order(tmp_path, rows, block):
    sides = random_rows(23, torch.bfloat16)
    write_blocks(tmp_path, sides, block)
    shards = find_shards(tmp_path)
    found = {site: ([], []) for site in sides}
    for chunk in Chunks(shards, rows).read():
        count = chunk.stop - chunk.start
        assert count <= rows
        for site, values in chunk.values(chunk.data):
            assert values.shape == (2 * count, *SHAPES[site])
            found[site][0].append(values[:count].clone())
            found[site][1].append(values[count:].clone())
    for site, pair in sides.items():
        assert all(torch.cat(parts).equal(whole) for parts, whole in zip(found[site], pair, strict=True))


def test_a_chunk_stays_until_the_next_is_asked_for(tmp_path):
    """However far the thread could have read meanwhile."""
    write_blocks(tmp_path, random_rows(40), 13)
    for chunk in Chunks(find_shards(tmp_path), 2).read():
        before = chunk.data.clone()
        time.sleep(0.005)
        assert chunk.data.equal(before)


def test_reading_goes_on_from_any_chunk(tmp_path):
    write_blocks(tmp_path, random_rows(20), 10)
    chunks = Chunks(find_shards(tmp_path), 4)
    places = [(c.shard, c.start, c.stop) for c in chunks.read()]
    assert places == [(0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4), (1, 4, 8), (1, 8, 10)]
    for i, (shard, start, _) in enumerate(places):
        assert [(c.shard, c.start, c.stop) for c in chunks.read(shard, start)] == places[i:]
    assert list(chunks.read(2, 0)) == []


def test_memory_is_that_of_the_buffers(tmp_path):
    write_blocks(tmp_path, random_rows(20), 10)
    chunks = Chunks(find_shards(tmp_path), 4)
    assert chunks.size == 4 * 2 * 36 * 4
    places = {c.data.data_ptr() for c in chunks.read()}
    assert len(places) == BUFFERS
    assert Chunks(find_shards(tmp_path), 1000).size == 10 * 2 * 36 * 4, "no more than the largest shard"
    assert Chunks([], 5).size == 0
