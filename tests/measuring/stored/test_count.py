"""Momentum from stored activations: the same however they are cut, read, split and interrupted."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import austeer
from austeer import AusteerError, CaptureError, FileFormatError, Momentum
from austeer.measuring.stored import count as activations
from austeer.measuring.stored.chunks import Chunks
from austeer.measuring.stored.count import ActivationCount, CountReport, momentum_from_activations
from austeer.measuring.stored.folder import StoredActivations
from austeer.models.sites import Fingerprint
from austeer.pairs.halves import half_rows_without_texts
from austeer.utils.interrupt import MeasurementInterrupted
from naive_momentum import numbered_pairs
from stored_activations import (
    LAYERS,
    MODEL,
    assert_counts,
    assert_same,
    random_rows,
    write_blocks,
    write_plain,
)

PLAIN = Fingerprint("llama", 4, {}, "by hand", None)
ROW = 2 * 36 * 4  # bytes of a pair of random_rows, in float32


@pytest.fixture
def often(monkeypatch):
    """Checkpoints after every chunk."""
    monkeypatch.setattr(activations, "_EVERY_BYTES", 0)
    monkeypatch.setattr(activations, "_EVERY_CHECKPOINTS", 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_counts_equal_numpys(tmp_path, dtype):
    """Also past a shard without rows (the third)."""
    sides = random_rows(47, dtype)
    write_blocks(tmp_path, sides, 8, skip={3, 4, *range(16, 24)})
    momentum = momentum_from_activations(tmp_path, device="cpu", chunk_bytes=5 * ROW)
    assert_counts(momentum, sides)
    assert (momentum.pairs, momentum.identical, momentum.cut) == (57, 10, 8)
    assert (momentum.model, momentum.layers, momentum.sources) == (MODEL, LAYERS, ("pairs.jsonl",))


def test_arrays_of_another_tool(tmp_path):
    sides = random_rows(20, torch.bfloat16)
    paths = [write_plain(tmp_path / f"{n}.safetensors", sides, slice(n, n + 10)) for n in (0, 10)]
    momentum = momentum_from_activations(paths, model=PLAIN, layers=LAYERS, device="cpu")
    assert_counts(momentum, sides)
    assert (momentum.pairs, momentum.identical, momentum.sources) == (20, 0, (str(tmp_path),))
    momentum.save(tmp_path / "kind.momentum")
    assert_same(austeer.Momentum.load(tmp_path / "kind.momentum"), momentum)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    block=st.integers(1, 40),
    chunk=st.integers(1, 50 * ROW),
    parts=st.integers(1, 3),
    number=st.integers(0, 2**31),
)
def test_counts_do_not_depend_on_shards_chunks_and_parts(tmp_path_factory, rows, block, chunk, parts, number):
    folder = tmp_path_factory.mktemp("shards")
    sides = random_rows(rows, torch.float16, seed=number)
    write_blocks(folder, sides, block)
    options = {"device": "cpu", "chunk_bytes": chunk}
    found = [momentum_from_activations(folder, part=(i, parts), **options) for i in range(parts)]
    total = found[0]
    for other in found[1:]:
        total = total.merge(other)
    assert_counts(total, sides)
    assert total.pairs == rows
    # The file and the place in it say which half a row is in, and nothing else.
    spans = [(f"{start:012d}.safetensors", start, min(block, rows - start)) for start in range(0, rows, block)]
    inside = [start + int(i) for name, start, count in spans for i in half_rows_without_texts(name, 0, count)]
    assert total.half_pairs == len(inside)
    half = Momentum(total.half, max(len(inside), 1), total.model, layers=total.layers)
    assert_counts(half, {site: tuple(t[inside] for t in pair) for site, pair in sides.items()})


def test_stored_while_measuring_gives_what_was_measured(tiny, demo, tmp_path):
    pairs = [*numbered_pairs(21), ("same", " text", " text"), *numbered_pairs(5)]
    measured = austeer.measure(tiny, demo[1], pairs, block_pairs=8, max_length=5, save_activations=tmp_path)
    assert measured.cut and measured.identical == 1 and 0 < measured.half_pairs < 26
    assert_same(momentum_from_activations(tmp_path, device="cpu"), measured)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_counts_what_a_cpu_does(tmp_path, dtype):
    sides = random_rows(5000, dtype, {"attention": (3, 700), "ffn": (3, 500)})
    model = Fingerprint("llama", 4, {"attention": 700, "ffn": 500}, "tiny", None)
    write_blocks(tmp_path, sides, 1000, model=model)
    for chunk in (100 * 2 * 3600 * dtype.itemsize, None):
        assert_counts(momentum_from_activations(tmp_path, device="cuda", chunk_bytes=chunk), sides)


def test_first_nonfinite_row_is_named(tmp_path):
    sides = random_rows(20)
    sides["ffn"][1][13, 2, 4], sides["attention"][0][12, 1, 6] = torch.inf, torch.nan
    sides["ffn"][0][19, 0, 0] = torch.nan
    paths = write_blocks(tmp_path, sides, 8, skip={1})
    for chunk in (3 * ROW, None):
        with pytest.raises(CaptureError, match=rf"{paths[1]}.*row 5.*pair 13.*'attention'.*layer 1.*AU 6"):
            momentum_from_activations(tmp_path, device="cpu", chunk_bytes=chunk)
    sides["attention"][0][12, 1, 6] = 0
    plain = write_plain(tmp_path / "plain.safetensors", sides)
    with pytest.raises(CaptureError, match=r"plain\.safetensors.*row 13.*'ffn'.*layer 3.*AU 4"):
        momentum_from_activations(plain, model=PLAIN, layers=LAYERS, device="cpu")


def test_nan_is_found_before_the_end(tmp_path, often):
    """And the checkpoint holds what came before: with the row mended, the run goes on from there."""
    sides = random_rows(40)
    sides["ffn"][0][20, 0, 0] = torch.nan
    write_blocks(tmp_path / "a", sides, 40)
    options = {"device": "cpu", "chunk_bytes": 4 * ROW, "checkpoint": tmp_path / "c"}
    count = ActivationCount(StoredActivations.open(tmp_path / "a"), **options)
    with pytest.raises(CaptureError, match=r"row 20.*pair 20"):
        count.run()
    assert count.report.rows == 24
    sides["ffn"][0][20, 0, 0] = 1
    write_blocks(tmp_path / "a", sides, 40, resume=True)
    assert_counts(momentum_from_activations(tmp_path / "a", resume=True, **options), sides)


def test_shard_cut_off_while_it_is_read(tmp_path):
    """It is named, what was counted is kept, and the result after mending is that of a run without trouble."""
    sides = random_rows(40)
    paths = write_blocks(tmp_path / "a", sides, 10)
    data = paths[2].read_bytes()
    options = {"device": "cpu", "chunk_bytes": 4 * ROW}
    plain = momentum_from_activations(tmp_path / "a", **options)
    stored = StoredActivations.open(tmp_path / "a")
    paths[2].write_bytes(data[:-700])
    with pytest.raises(FileFormatError, match=rf"{paths[2]}: cut off(?!.*resume)"):
        ActivationCount(stored, **options).run()
    with pytest.raises(FileFormatError, match=rf"{paths[2]}: cut off.*{tmp_path / 'c'}.*resume"):
        ActivationCount(stored, checkpoint=tmp_path / "c", **options).run()
    paths[2].unlink()
    with pytest.raises(FileFormatError, match=rf"{paths[2]}.*No such file"):
        ActivationCount(stored, **options).run()
    paths[2].write_bytes(data)
    resumed = ActivationCount(stored, checkpoint=tmp_path / "c", resume=True, **options)
    assert resumed.report.resumed in (20, 24, 28)
    assert_same(resumed.run(), plain)
    assert resumed.report.resumed + resumed.report.rows == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu0"}, "device.*'tpu0'"),
        ({"device": "meta"}, "device.*'meta'"),
        ({"chunk_bytes": 0}, "chunk_bytes.* 0"),
        ({"part": (2, 2)}, r"part.*\(2, 2\)"),
        ({"resume": True}, "resume.*checkpoint"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    write_blocks(tmp_path, random_rows(4), 4)
    with pytest.raises(AusteerError, match=message):
        momentum_from_activations(tmp_path, **options)


@settings(max_examples=20, deadline=None)
@given(number=st.integers(0, 2**31), stops=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_interrupted_runs_add_up_bit_for_bit(tmp_path_factory, number, stops):
    folder = tmp_path_factory.mktemp("shards")
    write_blocks(folder / "a", random_rows(50, seed=number), 17)
    options = {"device": "cpu", "chunk_bytes": 4 * ROW, "checkpoint": folder / "c"}
    stored, read = StoredActivations.open(folder / "a"), Chunks.read
    with pytest.MonkeyPatch.context() as patch:
        for stop in stops:
            count = ActivationCount(stored, resume=True, **options)

            def interrupted(*arguments, stop=stop):
                for number, chunk in enumerate(read(*arguments), 1):
                    if number == stop:
                        os.kill(os.getpid(), signal.SIGINT)
                    yield chunk

            patch.setattr(Chunks, "read", interrupted)
            try:
                count.run()
            except MeasurementInterrupted as error:
                assert f" {count.report.resumed + count.report.rows} of 50 pairs" in str(error)
    resumed = momentum_from_activations(folder / "a", resume=True, **options)
    assert_same(resumed, momentum_from_activations(folder / "a", device="cpu", chunk_bytes=4 * ROW))


PROGRAM = """
import sys
from pathlib import Path
from austeer.measuring.stored import count as activations
activations._EVERY_BYTES = activations._EVERY_CHECKPOINTS = 0
folder = Path(sys.argv[1])
options = {"device": "cpu", "chunk_bytes": 200_000, "checkpoint": folder / "c", "resume": True}
activations.momentum_from_activations(folder / "a", **options)
"""


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def test_killed_at_any_moment(tmp_path):
    shapes = {"attention": (3, 700), "ffn": (3, 500)}
    model = Fingerprint("llama", 4, {"attention": 700, "ffn": 500}, "tiny", None)
    write_blocks(tmp_path / "a", random_rows(2000, shapes=shapes), 700, model=model)
    killed = 0
    for delay in (0.0, 0.07):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment())
        before = written(tmp_path / "c")
        while process.poll() is None and written(tmp_path / "c") == before:
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed, "the run was over before it could be killed"
    options = {"device": "cpu", "chunk_bytes": 200_000}
    resumed = momentum_from_activations(tmp_path / "a", checkpoint=tmp_path / "c", resume=True, **options)
    assert_same(resumed, momentum_from_activations(tmp_path / "a", **options))


def written(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def test_checkpoint_of_another_run(tmp_path, often):
    sides = random_rows(40)
    paths = write_blocks(tmp_path / "a", sides, 10)
    options = {"device": "cpu", "chunk_bytes": 4 * ROW, "checkpoint": tmp_path / "c"}
    stored = StoredActivations.open(tmp_path / "a")
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[:-700])
    with pytest.raises(FileFormatError):
        ActivationCount(stored, **options).run()
    paths[2].write_bytes(data)
    with pytest.raises(FileFormatError, match=r"c: .*resume"):
        ActivationCount(stored, **options)
    with pytest.raises(FileFormatError, match=r"chunk_rows 4.* 5"):
        ActivationCount(stored, **{**options, "chunk_bytes": 5 * ROW}, resume=True)
    other = StoredActivations.open(paths[1:])
    with pytest.raises(FileFormatError, match="other shards"):
        ActivationCount(other, **options, resume=True)
    fewer = StoredActivations.open(paths[:3])  # those that were not reached may be left out
    rows = {site: tuple(t[:30] for t in pair) for site, pair in sides.items()}
    assert_counts(ActivationCount(fewer, **options, resume=True).run(), rows)


def test_parts_have_checkpoints_of_their_own(tmp_path, often):
    sides = random_rows(40)
    write_blocks(tmp_path / "a", sides, 10)
    options = {"device": "cpu", "checkpoint": tmp_path / "c"}
    found = [momentum_from_activations(tmp_path / "a", part=(i, 2), **options) for i in range(2)]
    assert_counts(found[0].merge(found[1]), sides)
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["c.0-of-2", "c.1-of-2"]


def test_checkpoint_that_cannot_be_written_stops_nothing(tmp_path, often):
    sides = random_rows(40)
    write_blocks(tmp_path / "a", sides, 20)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=rf"{tmp_path / 'file' / 'c'}"):
        momentum = momentum_from_activations(tmp_path / "a", device="cpu", checkpoint=tmp_path / "file" / "c")
    assert_counts(momentum, sides)


MEMORY = """
import resource, sys
from austeer.measuring.stored.count import momentum_from_activations
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
momentum_from_activations(sys.argv[1] + "/small", device="cpu", chunk_bytes=4_000_000)
before = peak()
assert momentum_from_activations(sys.argv[1] + "/large", device="cpu", chunk_bytes=4_000_000).pairs == 4000
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_shards(tmp_path):
    """160 MB in one shard and in many, 4 MB at a time: what three chunks and the counters take, and no more."""
    model = Fingerprint("llama", 2, {"ffn": 5000}, "tiny", None)
    for name, rows, block in (("small", 400, 400), ("large", 4000, 2000)):
        sides = {"ffn": tuple(torch.ones(2, rows, 2, 5000, dtype=torch.bfloat16))}
        write_blocks(tmp_path / name, sides, block, model=model, layers=(0, 1))
    grown = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], env=environment(), capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) < 8e6


def test_needs_are_those_of_the_run(tmp_path):
    write_blocks(tmp_path, random_rows(100, torch.bfloat16), 40)
    count = ActivationCount(StoredActivations.open(tmp_path), device="cpu", chunk_bytes=10 * ROW)
    needs = count.needs()
    assert (needs.shards, needs.rows, needs.columns, needs.bytes) == (3, 100, 36, 100 * ROW // 2)
    assert (needs.counters, needs.chunks, needs.device_chunks, needs.result) == (36 * 80, 35 * ROW, 0, 36 * 64)
    assert needs.count_rate > 0 and needs.read_rate > 0
    assert needs.seconds == pytest.approx(needs.bytes / min(needs.count_rate, needs.read_rate))
    assert needs.lines()[0] == "100 rows x 36 AUs in 3 shards: 0.00 GB, read once"
    counts, saved = count.run(), tmp_path / "kind.momentum"
    assert_counts(counts, random_rows(100, torch.bfloat16))  # the trial leaves no trace in the counters
    counts.save(saved)
    assert needs.result <= saved.stat().st_size <= needs.result + 4096
    assert count.report.bytes == needs.bytes


def test_report_says_where_the_time_went(tmp_path):
    write_blocks(tmp_path, random_rows(100), 40)
    count = ActivationCount(StoredActivations.open(tmp_path), device="cpu")
    count.run()
    report = count.report
    assert (report.rows, report.resumed, report.bytes) == (100, 0, 100 * ROW)
    assert 0 < report.seconds_count + report.seconds_wait <= report.seconds
    assert report.line().startswith("100 rows, 0.00 GB in ")
    assert report.to_json()["bytes_per_second"] == pytest.approx(report.bytes / report.seconds)
    assert CountReport().bytes_per_second == 0.0
