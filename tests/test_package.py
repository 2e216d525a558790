"""The package as it is installed: both packages and their data, and no need of Triton or a GPU to import it."""

import re
import shutil
import subprocess
import sys
import zipfile

import austeer
from places import ROOT


def test_it_imports_and_steers_tensors_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError, as where it is not installed
import austeer, austeer_kernels, torch
y = torch.ones(2, 4)
austeer_kernels.steer_columns_(y, torch.tensor([[1]]), torch.full((1, 1), 2.0), torch.zeros(1, 1))
print(y.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}" + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[1.0, 3.0, 1.0, 1.0], [1.0, 3.0, 1.0, 1.0]]"


def test_a_wheel_holds_both_packages_and_their_data(tmp_path):
    source = tmp_path / "source"  # a copy: building leaves folders behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("austeer-*.whl")
    assert f"-{austeer.__version__}-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in ((ROOT, "austeer"), (ROOT / "kernels", "austeer_kernels")):
        for path in (folder / package).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".json", ".jsonl"):
                assert path.relative_to(folder).as_posix() in names
    assert {"austeer/py.typed", "austeer_kernels/py.typed"} <= names
    assert not any(name.startswith(("tests", "bench", "kernels")) for name in names)


def test_every_requirement_is_pinned():
    pinned = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-") for name in pinned}
    lines = re.findall(r"['\"]([a-z][A-Za-z0-9_-]+)>=", (ROOT / "setup.py").read_text())
    assert {name.lower().replace("_", "-") for name in lines} <= pinned
