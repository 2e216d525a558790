"""Folders and files that are there whole or not at all: what is refused, replaced, swept."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from austeer.export.edits import ExportError
from austeer.export.output_files import RECORD, check_output, check_replaced, nearest_folder, staged


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_finished(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists() and staging.parent == out.parent and staging.name.startswith(".")
    assert names(out.parent) == ["out"] and (out / "a").read_text() == "1"
    assert out.stat().st_mode & 0o777 == 0o755


def test_a_file_appears_when_it_is_finished(tmp_path):
    out = tmp_path / "out.gguf"
    for text in ("1", "2"):
        with staged(out, file=True) as path:
            path.write_text(text)
        assert names(tmp_path) == ["out.gguf"] and out.read_text() == text


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_failed(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(type(error)), staged(out) as staging:
        (staging / "a").touch()
        raise error
    assert names(tmp_path) == ["out"] and names(out) == ["old"]
    with staged(out) as staging:
        (staging / "new").touch()
        assert names(out) == ["old"]
    assert names(tmp_path) == ["out"] and names(out) == ["new"]


def test_what_was_there_comes_back_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename = type(out).rename

    def refuse(self, target):
        if (self / "new").exists():
            raise OSError(errno.EPERM, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", refuse)
    with pytest.raises(ExportError, match=r"out.*Operation not permitted"), staged(out) as staging:
        (staging / "new").touch()
    assert names(tmp_path) == ["out"] and names(out) == ["old"]


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    (real / "kept").touch()
    out.symlink_to(real)
    with pytest.raises(ExportError, match="out: exists"):
        check_output(out, False, 0)
    with staged(check_output(out, True, 0)) as staging:
        (staging / "new").touch()
    assert names(out) == ["new"] and not out.is_symlink() and names(real) == ["kept"]


def test_what_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"file: exists.*force"):
        check_output(tmp_path / "file", False, 0)
    with pytest.raises(ExportError, match=r"out.*file is no folder"):
        check_output(tmp_path / "file" / "out", False, 0)
    with pytest.raises(ExportError, match=r"out.* 1000000000.0 GB"):
        check_output(tmp_path / "out", False, 10**18)
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for place in (tmp_path / "here", tmp_path / "here" / "below"):
        with pytest.raises(ExportError, match=f"{place}.*working directory"):
            check_output(place, True, 0)
    assert names(tmp_path) == ["file", "here"]
    assert nearest_folder(tmp_path / ("x" * 300) / "out") == tmp_path
    assert nearest_folder(type(tmp_path)("/")) == type(tmp_path)("/")
    long = check_output(tmp_path / ("x" * 300), False, 0)  # what cannot be looked for is not there
    with pytest.raises(ExportError, match=r"xxx.*File name too long"), staged(long):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExportError, match=r"out.*writable"):
        check_output(tmp_path / "out", False, 0)


def test_force_replaces_exports_and_nothing_dearer(tmp_path, monkeypatch):
    out, file = tmp_path / "out", tmp_path / "file"
    check_replaced(out)
    out.mkdir()
    file.write_bytes(b"GGUF of someone")
    (out / "notes.txt").touch()
    check_replaced(out)
    for name, make in (("config.json", "touch"), ("below", "mkdir")):
        getattr(out / name, make)()
        with pytest.raises(ExportError, match=f"out.*'{name}'.*austeer.json"):
            check_replaced(out)
        (out / RECORD).touch()
        check_replaced(out)
        (out / RECORD).unlink()
        (out / name).rename(tmp_path / name)
    for place, kind, found in (
        (out, True, "a folder"),
        (file, False, "a file,"),
        (file, True, "a file .*austeer"),
    ):
        with pytest.raises(ExportError, match=f"{place}.*{found}"):
            check_replaced(place, file=kind)
    file.write_bytes(b"GGUF austeer.version")
    check_replaced(file, file=True)
    (tmp_path / "link").symlink_to(out)  # only the link would go
    (out / "config.json").touch()
    check_replaced(tmp_path / "link")
    for read in (out, out / "config.json", tmp_path / "link"):
        for place in (out, tmp_path):
            with pytest.raises(ExportError, match=f"{place}.*holds the model"):
                check_replaced(place, [file, read])
    monkeypatch.setattr(type(out), "iterdir", lambda self: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    with pytest.raises(ExportError, match=r"out.*Permission denied"):
        check_replaced(out)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_called_that(error, tmp_path):
    with pytest.raises(ExportError, match=r"out.*space"), staged(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from austeer.export import output_files
out = Path(sys.argv[1])
if len(sys.argv) > 2:  # between taking the old one away and putting the new one there
    rename = Path.rename
    def stop(self, target):
        if (self / "half").exists():
            print("there", flush=True)
            time.sleep(60)
        return rename(self, target)
    Path.rename = stop
with output_files.staged(out) as staging:
    (staging / "half").touch()
    if len(sys.argv) == 2:
        print("there", flush=True)
        time.sleep(60)
"""


def killed(out, *more):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), *more], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "there\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_what_a_killed_run_left_is_swept_and_what_runs_is_not(tmp_path):
    out = tmp_path / "out"
    runs = killed(out)
    next(runs)
    with staged(tmp_path / "out"):  # while the other one runs
        assert len(names(tmp_path)) == 2
    assert len(names(tmp_path)) == 2
    runs.close()
    assert names(tmp_path)[0].startswith(".out.austeer-") and (tmp_path / names(tmp_path)[0] / "half").exists()
    (tmp_path / ".out.other").mkdir()  # not ours
    with staged(tmp_path / "another"):
        pass
    assert len(names(tmp_path)) == 4
    with staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.other", "another", "out"]


def test_what_was_to_be_replaced_outlives_a_kill(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    runs = killed(out, "while replacing")
    next(runs)
    runs.close()
    assert not out.exists()
    with pytest.raises(RuntimeError), staged(out):  # another try that fails
        raise RuntimeError
    (old,) = tmp_path.rglob("old")
    assert names(old.parent) == ["old"]
    for _ in range(2):  # swept by the first run that finds a new one in its place
        with staged(out) as staging:
            (staging / "new").touch()
    assert names(tmp_path) == ["out"] and names(out) == ["new"]
