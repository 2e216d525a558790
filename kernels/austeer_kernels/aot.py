"""Compiles every shipped kernel configuration for named GPUs, on a machine without one, and reports its resources.

    python -m austeer_kernels.aot [--target sm_90 ...] [--json FILE]

A row a compiled kernel: registers, bytes of stack (spills), shared memory, matrix instructions, widths of the loads
from global memory. Exits with 1 where a kernel spills, wants more shared memory than the target has, lacks the matrix
instructions that its tile allows, or streams activations with loads under 16 bytes.

Each launch setting of the tables is compiled with the compile-time flags in ``_VARIANTS``: every flag in both states,
not every combination. Pointers and sizes are taken as multiples of 16, as in an aligned launch.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import columns, launch, momentum, projection

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Shared memory a program may have. sm_80's is that of its smaller relatives (sm_86, sm_89), which use its code.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

_KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        momentum.momentum_kernel,
        momentum.momentum_finish_kernel,
        columns.steer_columns_kernel,
        projection.steered_linear_kernel,
        projection.steered_finish_kernel,
    )
}

#: Pointers whose type is not the activations' own dtype.
_POINTER_TYPES = {
    "p_positive_count": "*i64",
    "p_negative_count": "*i64",
    "p_first_nonfinite": "*i64",
    "p_delta_sum": "*fp64",
    "p_delta_square_sum": "*fp64",
    "p_positive_part": "*i64",
    "p_negative_part": "*i64",
    "p_first_part": "*i64",
    "p_sum_part": "*fp64",
    "p_square_sum_part": "*fp64",
    "p_index": "*i64",
    "p_gamma": "*fp32",
    "p_shift": "*fp32",
    "p_row_plan": "*i32",
    "p_part": "*fp32",
}
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

# Flags each kernel is compiled with; a name in "without" is an argument that is None.
_SINGLE = {"SPLIT": False}
_SPLIT = {"SPLIT": True, "p_out": "*fp32", "without": ("p_bias",)}
_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "momentum_kernel": [{"ACCUMULATE": True}, {"ACCUMULATE": False}],
    "steer_columns_kernel": [{"MAGNITUDE": False}, {"MAGNITUDE": True, "without": ("p_row_plan",)}],
    "steered_linear_kernel": [
        {**_SPLIT, "PROLOGUE": False, "MAGNITUDE": False},
        {**_SPLIT, "PROLOGUE": True, "MAGNITUDE": True},
        {**_SINGLE, "PROLOGUE": False, "MAGNITUDE": True},
        {**_SINGLE, "PROLOGUE": True, "MAGNITUDE": False, "without": ("p_bias",)},
    ],
    "steered_finish_kernel": [
        {"EPILOGUE": False, "MAGNITUDE": False, "without": ("p_row_plan",)},
        {"EPILOGUE": True, "MAGNITUDE": True, "without": ("p_bias", "p_row_plan")},
        {"EPILOGUE": True, "MAGNITUDE": False},
    ],
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to compile. ``arguments``: a type for what is known at run time, a value for the rest."""

    target: str
    kernel: str
    dtype: str
    setting: str
    variant: str
    arguments: dict[str, Any]
    num_warps: int
    block: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one job."""

    target: str
    kernel: str
    dtype: str
    setting: str
    variant: str
    registers: int
    stack: int
    shared: int
    #: Matrix instructions by name, and how many loads of each width in bytes the code has.
    matrix: dict[str, int]
    loads: dict[int, int]
    problems: list[str]


def _arguments(kernel: str, dtype: str, constants: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    without = variant.get("without", ())
    given = {**constants, **variant}
    arguments: dict[str, Any] = {}
    for parameter in _KERNELS[kernel].params:
        name = parameter.name
        if name in without:
            arguments[name] = None
        elif name in given:
            arguments[name] = given[name]
        elif name.startswith("p_"):
            arguments[name] = _POINTER_TYPES.get(name, "*" + _SHORT[dtype])
        else:
            arguments[name] = parameter.annotation_type or "i32"
    return arguments


def _constants(entry: launch.Entry) -> tuple[str, dict[str, Any]]:
    """The kernel of an entry and the compile-time numbers that its launcher passes."""
    if entry.op == "momentum_update":
        sizes = {"BLOCK_R": entry.block_m, "BLOCK_C": entry.block_n, "NUM_STAGES": entry.num_stages}
        return "momentum_kernel", sizes
    if entry.op == "steer_columns_":
        return "steer_columns_kernel", {"BLOCK_T": entry.block_m, "BLOCK_I": entry.block_n}
    sizes = {"BLOCK_T": entry.block_m, "BLOCK_N": entry.block_n, "BLOCK_K": entry.block_k}
    return "steered_linear_kernel", {**sizes, "NUM_STAGES": entry.num_stages}


def jobs(target: str) -> list[Job]:
    """Everything that is compiled for one target; entries that differ only in their shapes are compiled once."""
    listed: dict[tuple, Job] = {}

    def add(kernel: str, dtype: str, setting: str, constants: dict[str, Any], variant: dict[str, Any], **rest) -> None:
        flags = [f"{name.lower()}={int(value)}" for name, value in variant.items() if isinstance(value, bool)]
        flags += [f"{name.removeprefix('p_')}=0" for name in variant.get("without", ())]
        arguments = _arguments(kernel, dtype, constants, variant)
        job = Job(target, kernel, dtype, setting, " ".join(flags), arguments, **rest)
        listed.setdefault((kernel, dtype, job.num_warps, *arguments.items()), job)

    for table, entry in launch.shipped(target):
        kernel, constants = _constants(entry)
        block = (entry.block_m, entry.block_n, entry.block_k)
        setting = f"{table} {'x'.join(str(b) for b in block if b)} w{entry.num_warps} s{entry.num_stages}"
        for dtype in entry.dtypes:
            variants = _VARIANTS[kernel]
            if entry.op in launch.FORMS:
                variants = [variant for variant in variants if variant["PROLOGUE"] == ("_input" in entry.op)]
            if dtype == "float16":  # the same code as bfloat16 but for the names of its instructions
                variants = variants[-1:]
            for variant in variants:
                if entry.op in launch.FORMS and not entry.op.endswith("_rows"):
                    variant = {**variant, "without": (*variant.get("without", ()), "p_row_plan")}
                add(kernel, dtype, setting, constants, variant, num_warps=entry.num_warps, block=block)
    finish = {"BLOCK_C": momentum.FINISH_BLOCK_C}
    rest = {"num_warps": momentum.FINISH_WARPS, "block": (1, momentum.FINISH_BLOCK_C, 0)}
    add("momentum_finish_kernel", "float32", "fixed", finish, {}, **rest)
    finish = {"BLOCK_T": 1, "BLOCK_N": projection.FINISH_BLOCK_N}
    rest = {"num_warps": projection.FINISH_WARPS, "block": (1, projection.FINISH_BLOCK_N, 0)}
    for dtype in _SHORT:
        for variant in _VARIANTS["steered_finish_kernel"]:
            add("steered_finish_kernel", dtype, "fixed", finish, variant, **rest)
    return list(listed.values())


def gpu_target(name: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton's own description of a target."""
    if re.fullmatch(r"sm_\d+", name):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target: found {name!r}, expected sm_NN (NVIDIA) or gfxNNN (AMD)")


def compile_job(job: Job) -> Row:
    """Compiles one kernel and reads its resources from the machine code."""
    kernel = _KERNELS[job.kernel]
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = job.arguments[parameter.name]
        if isinstance(value, str):
            signature[parameter.name] = value
            if not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=gpu_target(job.target), options={"num_warps": job.num_warps})
    read = _read_nvidia if "ptx" in compiled.asm else _read_amd
    registers, stack, matrix, loads = read(compiled.asm)
    row = Row(
        job.target,
        job.kernel,
        job.dtype,
        job.setting,
        job.variant,
        registers,
        stack,
        compiled.metadata.shared,
        matrix,
        loads,
        problems=[],
    )
    row.problems.extend(problems(job, row))
    return row


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, dict[str, int], dict[int, int]]:
    ptx = asm["ptx"]
    matrix = collections.Counter(re.findall(r"\b(wgmma(?=\.mma_async)|tcgen05(?=\.mma)|mma\.sync)", ptx))
    loads: collections.Counter[int] = collections.Counter()
    for count, bits in re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+)\b", ptx):
        loads[int(count or 1) * int(bits) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (\w+)", ptx):
        loads[int(size, 0)] += 1
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, dict(matrix), dict(loads)


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, dict[str, int], dict[int, int]]:
    text = asm["amdgcn"]
    matrix = {"mfma": len(re.findall(r"\bv_mfma_", text))} if "v_mfma_" in text else {}
    loads: collections.Counter[int] = collections.Counter()
    for words, small in re.findall(r"\b(?:global|buffer)_load_(?:dword(?:x(\d))?\b|([us](?:byte|short)\w*))", text):
        loads[(1 if "byte" in small else 2) if small else 4 * int(words or 1)] += 1
    meta = {name: int(n) for name, n in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s*(\d+)", text)}
    stack = meta["private_segment_fixed_size"] + meta["vgpr_spill_count"] + meta["sgpr_spill_count"]
    return meta["vgpr_count"], stack, matrix, dict(loads)


def _wanted_matrix(job: Job) -> str:
    """The matrix instruction that a tile of 16-bit values can have on its target; "" where none is asked for."""
    if job.kernel != "steered_linear_kernel" or job.dtype == "float32":
        return ""
    if job.target.startswith("gfx"):
        return "mfma"
    generation = int(job.target.removeprefix("sm_"))
    tall = job.block[1]
    if tall >= 64 and job.num_warps >= 4 and 90 <= generation < 120:
        return "wgmma" if generation < 100 else "tcgen05"
    return "mma.sync"


def problems(job: Job, row: Row) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    found = []
    if row.stack:
        found.append(f"{row.stack} bytes of stack or spilled registers, expected none")
    limit = SHARED_LIMIT.get(job.target)
    if limit is not None and row.shared > limit:
        found.append(f"{row.shared} bytes of shared memory, {job.target} has {limit}")
    wanted = _wanted_matrix(job)
    if wanted and wanted not in row.matrix:
        found.append(f"matrix instructions {row.matrix or 'none'}, expected {wanted}")
    # Without the counters' own loads, all that is left is the stream.
    if job.arguments.get("ACCUMULATE") is False and set(row.loads) != {16}:
        found.append(f"loads of {sorted(row.loads)} bytes, expected 16")
    return found


def report(targets: tuple[str, ...] = TARGETS, processes: int = 2) -> list[Row]:
    """Compiles all jobs of the targets, in several processes, and returns their rows in order.

    Raises:
        RuntimeError: TRITON_INTERPRET is set. It turns kernels into Python functions when they are imported.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, expected unset: under the interpreter nothing can be compiled")
    work = [job for target in targets for job in jobs(target)]
    spawn = multiprocessing.get_context("spawn")  # a fork would copy LLVM's threads' locks
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(compile_job, work, chunksize=4))


def _line(row: Row) -> str:
    matrix = " ".join(f"{name} x{count}" for name, count in sorted(row.matrix.items())) or "-"
    loads = " ".join(f"{width}Bx{count}" for width, count in sorted(row.loads.items(), reverse=True))
    failures = "" if not row.problems else "  FAIL: " + "; ".join(row.problems)
    return (
        f"{row.target:<7} {row.kernel:<23} {_SHORT[row.dtype]:<5} {row.setting:<29} {row.variant:<52} "
        f"{row.registers:>4} {row.stack:>6} {row.shared:>7}  {matrix:<13} {loads}{failures}"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m austeer_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", nargs="+", default=list(TARGETS), help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args(argv)
    try:
        for target in options.target:
            gpu_target(target)
        rows = report(tuple(options.target), options.processes)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(
        f"{'target':<7} {'kernel':<23} {'dtype':<5} {'setting':<29} {'variant':<52} "
        f"{'regs':>4} {'stack':>6} {'shared':>7}  {'matrix':<13} loads"
    )
    for row in rows:
        print(_line(row))
    failed = sum(bool(row.problems) for row in rows)
    print(f"{len(rows)} kernels compiled with triton {triton.__version__}, {failed} failed a check")
    if options.json:
        content = {"triton": triton.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
