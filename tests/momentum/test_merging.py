"""Momentum files added up."""

import itertools
import shutil
from dataclasses import replace

import pytest

from austeer import FileFormatError, Momentum, SelectionError
from austeer.measuring.stored.count import momentum_from_activations
from austeer.models.sites import Fingerprint
from austeer.momentum.merging import merge_files
from stored_activations import LAYERS, MODEL, assert_counts, random_rows, write_blocks


@pytest.fixture
def parts(tmp_path):
    """Momentum files of the thirds of 30 rows, and the rows."""
    sides = random_rows(30)
    write_blocks(tmp_path / "shards", sides, 10)
    files = [tmp_path / f"{i}.momentum" for i in range(3)]
    for i, file in enumerate(files):
        momentum_from_activations(tmp_path / "shards", device="cpu", part=(i, 3)).save(file)
    return files, sides


def test_the_whole_from_its_parts_in_any_order(parts):
    files, sides = parts
    for order in itertools.permutations(files):
        momentum = merge_files(order, progress=False)
        assert_counts(momentum, sides)
        assert (momentum.pairs, momentum.cut) == (30, 3)
        halves = [Momentum.load(file) for file in files]
        assert momentum.half_pairs == sum(part.half_pairs for part in halves)
        assert momentum.half["ffn"].positive.equal(sum(part.half["ffn"].positive for part in halves))


def test_a_file_without_halves_gives_a_sum_without(parts, tmp_path):
    files, sides = parts
    momentum = Momentum.load(files[1])
    replace(momentum, half=None, half_pairs=0).save(tmp_path / "old.momentum")
    for order in itertools.permutations([files[0], tmp_path / "old.momentum", files[2]]):
        found = merge_files(order, progress=False)
        assert_counts(found, sides)
        assert (found.half, found.half_pairs) == (None, 0)


def test_nothing_counts_twice(parts, tmp_path):
    files, _ = parts
    copy = shutil.copy(files[0], tmp_path / "copy.momentum")
    for twice in (files[0], copy):
        with pytest.raises(SelectionError, match=rf"merge: {twice} .*0\.momentum.*twice"):
            merge_files([files[0], files[1], twice])
    Momentum.load(files[0]).save(tmp_path / "again.momentum")
    with pytest.raises(SelectionError, match=r"again\.momentum .*0\.momentum.*twice"):
        merge_files([files[0], tmp_path / "again.momentum"])


@pytest.mark.parametrize("files", [[], ["one.momentum"]])
def test_one_file_is_nothing_to_merge(files):
    with pytest.raises(SelectionError, match=rf"merge: .*{len(files)} files.*two"):
        merge_files(files)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("model", {"model": Fingerprint("llama", 4, MODEL.widths, "another", None)}),
        ("layers", {"layers": (LAYERS[0], 2, 3)}),
        ("chat_template", {"chat_template": True}),
        ("sites", {"sides": {"attention": random_rows(5)["attention"]}}),
    ],
)
def test_unlike_momentum_is_refused_and_named(parts, tmp_path, what, changes):
    files, _ = parts
    write_blocks(tmp_path / "other", **{"sides": random_rows(5), "block": 5} | changes)
    odd = tmp_path / "odd.momentum"
    momentum_from_activations(tmp_path / "other", device="cpu").save(odd)
    with pytest.raises(SelectionError, match=rf"odd\.momentum: merge: .*{what}"):
        merge_files([*files, odd])


def test_damaged_file_is_named(parts):
    files, _ = parts
    files[1].write_bytes(files[1].read_bytes()[:-3])
    with pytest.raises(FileFormatError, match=r"1\.momentum: .*austeer-momentum"):
        merge_files(files)
