"""Ahead-of-time compilation of every shipped configuration, in a process of its own without the interpreter."""

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from austeer_kernels import aot

KERNELS = Path(aot.__file__).parent.parent
KERNEL_NAMES = {
    "momentum_kernel",
    "momentum_finish_kernel",
    "steer_columns_kernel",
    "steered_linear_kernel",
    "steered_finish_kernel",
}
DTYPES = {"float16", "bfloat16", "float32"}
ROW = aot.Row("sm_90", "steered_linear_kernel", "bfloat16", "s", "v", 64, 0, 1024, {"wgmma": 8}, {16: 8}, [])


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[aot.Row]:
    """All kernels for all targets."""
    file = tmp_path_factory.mktemp("aot") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "austeer_kernels.aot", "--json", str(file), "--processes", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    found = []
    for row in json.loads(file.read_text())["rows"]:  # JSON has no integer keys
        found.append(aot.Row(**{**row, "loads": {int(width): count for width, count in row["loads"].items()}}))
    assert f"{len(found)} kernels compiled" in done.stdout
    return found


def test_every_kernel_compiles_for_every_target_and_dtype(rows):
    found = collections.defaultdict(set)
    for row in rows:
        found[row.target, row.kernel].add(row.dtype)
    assert set(found) == {(target, kernel) for target in aot.TARGETS for kernel in KERNEL_NAMES}
    for (_, kernel), dtypes in found.items():
        # The partial sums of the momentum have one type, whatever the activations'.
        assert dtypes == ({"float32"} if kernel == "momentum_finish_kernel" else DTYPES), kernel


def test_nothing_spills_and_shared_memory_fits(rows):
    assert not [row for row in rows if row.stack or row.problems]
    assert all(0 < row.registers <= (512 if row.target.startswith("gfx") else 255) for row in rows)
    assert all(row.shared <= aot.SHARED_LIMIT[row.target] for row in rows)


@pytest.mark.parametrize(
    ("target", "instruction"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_projections_of_16_bit_values_use_matrix_instructions(rows, target, instruction):
    products = [r for r in rows if r.kernel == "steered_linear_kernel"]
    # Tiles of 32 outputs, the best for some shapes, are too narrow for wgmma.
    products = [r for r in products if r.target == target and r.dtype != "float32" and "x32x" not in r.setting]
    assert products and all(row.matrix.get(instruction, 0) > 0 for row in products)


def test_the_stream_is_read_in_16_bytes(rows):
    streams = [row for row in rows if row.kernel == "momentum_kernel" and "accumulate=0" in row.variant]
    assert {(r.target, r.dtype) for r in streams} >= {(t, d) for t in aot.TARGETS for d in ("bfloat16", "float32")}
    assert all(set(row.loads) == {16} for row in streams)


def test_every_flag_is_compiled_in_both_states(rows):
    for kernel in KERNEL_NAMES:
        flags = {flag for row in rows if row.kernel == kernel for flag in row.variant.split()}
        names = {flag[:-2] for flag in flags} - {"row_plan", "bias"}  # these two are shown only where they are absent
        assert all({f"{name}=0", f"{name}=1"} <= flags for name in names), (kernel, flags)


def job(**changes) -> aot.Job:
    given = {"target": "sm_90", "kernel": "steered_linear_kernel", "dtype": "bfloat16", "setting": "", "variant": ""}
    return aot.Job(**{**given, "arguments": {}, "num_warps": 4, "block": (16, 64, 64), **changes})


@pytest.mark.parametrize(
    ("of", "found", "expected"),
    [
        ({}, {}, []),
        ({}, {"stack": 8}, ["8 bytes of stack"]),
        ({}, {"shared": 300_000}, ["300000 bytes of shared memory, sm_90 has 232448"]),
        ({}, {"matrix": {"mma.sync": 4}}, ["'mma.sync': 4.*expected wgmma"]),
        ({"block": (16, 32, 64)}, {"matrix": {"mma.sync": 4}}, []),  # 32 rows are too few for wgmma
        ({"dtype": "float32"}, {"matrix": {}}, []),
        ({"arguments": {"ACCUMULATE": False}}, {"loads": {8: 2}}, [r"loads of \[8\] bytes, expected 16"]),
        ({}, {"stack": 4, "shared": 300_000}, ["4 bytes of stack", "300000 bytes"]),
    ],
)
def test_checks_name_what_is_wrong(of, found, expected):
    problems = aot.problems(job(**of), dataclasses.replace(ROW, **found))
    assert len(problems) == len(expected) and all(map(re.search, expected, problems))


def test_a_failed_check_is_exit_status_1(monkeypatch, capsys):
    failed = dataclasses.replace(ROW, problems=["8 bytes of stack"])
    monkeypatch.setattr(aot, "report", lambda *_: [ROW, failed])
    assert aot.main([]) == 1
    assert "FAIL: 8 bytes of stack" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "interpret", "message"),
    [("sm90", False, "target: found 'sm90'"), ("sm_90", True, "TRITON_INTERPRET is set")],
)
def test_what_cannot_be_is_refused(capsys, monkeypatch, target, interpret, message):
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", interpret)
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--target", target])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
