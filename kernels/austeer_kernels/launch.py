"""Block shapes, warps, stages and splits for every launch, from JSON tables: no autotuner at run time.

A table (``tables/*.json``) names the architectures (``sm_90``, ``gfx942``) and device names it is for, as shell
patterns, and lists entries: an operation, dtypes, the shape [M, N, K] it was chosen for, and the settings. A launch
takes the entry nearest to its own shape, by ratio; for a projection N and K come before M. The table that names the
device most closely wins; what it has no entry for comes from the next, at last from ``default.json``.

====================  ===========  ================  ===========  =========
operation             M (block_m)  N (block_n)       K (block_k)  splits of
====================  ===========  ================  ===========  =========
``momentum_update``   pairs        columns           not used     the pairs
``steer_columns_``    tokens       selected columns  not used     not used
``steered_linear_*``  tokens       out               in           ``in``
====================  ===========  ================  ===========  =========

``steered_linear`` has four forms, each with entries of its own (:func:`form`): steered at the ``output`` or at the
``input``, with one plan or, behind ``_rows``, a plan a token. At the input every block of outputs steers x again, and a
plan a token gathers tiles of strengths, so the settings that are fast for one form are slow for another.

"fused" lists, for each form and shape that was measured on the named devices, up to how many tokens it is worth while:
in a CUDA graph no slower than the fastest other way to the same result, which is the library's product and
``steer_columns_`` after it (at the input before it). 0: never. The plain, unsteered product is not the measure: where a
form is slower than that and still faster than product and columns, it is the better choice. ``python -m
bench.dispatch`` measures and writes both lists.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLES = Path(__file__).parent / "tables"

#: Up to so many tokens the kernel of ``steered_linear`` runs; its blocks of tokens each read all weights. Beyond it
#: PyTorch's product and the sparse kernel run, on every device.
MOST_TOKENS = 64

#: All that tables have entries for.
FORMS = tuple(f"steered_linear_{side}{rows}" for rows in ("", "_rows") for side in ("output", "input"))
OPERATIONS = ("momentum_update", "steer_columns_", *FORMS)


def form(at_input: bool, rows: bool) -> str:
    """The form of ``steered_linear``: steered at its input instead of its output, and with a plan a token."""
    return FORMS[2 * rows + at_input]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a table. Every entry is right for every shape; the shape only says where it should be fast."""

    op: str
    dtypes: tuple[str, ...]
    m: int
    n: int
    block_m: int
    block_n: int
    num_warps: int
    k: int = 0
    block_k: int = 0
    num_stages: int = 1
    #: Split until the grid has this many programs a multiprocessor ...
    programs_per_processor: float = 0.0
    #: ... but not further than this, and never below one tile a split.
    max_splits: int = 1

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise TypeError(f"op: found {self.op!r}, expected one of {', '.join(OPERATIONS)}")

    def distance(self, m: int, n: int, k: int) -> tuple[float, float]:
        """How far a shape is from the entry's: of a projection (in N and K, in M), else (in all, 0)."""
        if self.op in FORMS:
            return _ratio(n, self.n) + _ratio(k, self.k), _ratio(m, self.m)
        return _ratio(m, self.m) + _ratio(n, self.n), 0.0

    def splits(self, m: int, n: int, k: int, processors: int) -> int:
        """How many programs share the sum (over rows, or over K) of one output tile."""
        tiles = math.ceil(n / self.block_n)
        if self.op == "momentum_update":
            length = math.ceil(m / self.block_m)
        else:
            tiles *= math.ceil(m / self.block_m)
            length = math.ceil(k / self.block_k) if self.block_k else 1
        wanted = round(self.programs_per_processor * processors / max(tiles, 1))
        most = max(1, min(wanted, self.max_splits, length))
        # Equal shares may need fewer splits than asked for: 9 tiles over 8 splits are 2 tiles for each of 5.
        return math.ceil(length / math.ceil(length / most)) if length else 1


@dataclasses.dataclass(frozen=True)
class Limit:
    """Up to ``m`` tokens a form of ``steered_linear`` was no slower than the library's product and the sparse kernel.

    Only a measurement on the named devices may write one.
    """

    op: str
    dtypes: tuple[str, ...]
    n: int
    k: int
    m: int

    def __post_init__(self) -> None:
        if self.op not in FORMS:
            raise TypeError(f"op: found {self.op!r}, expected one of {', '.join(FORMS)}")


@dataclasses.dataclass(frozen=True)
class Table:
    """One file of ``tables/``."""

    file: str
    source: str
    architectures: tuple[str, ...]
    devices: tuple[str, ...]
    entries: tuple[Entry, ...]
    fused: tuple[Limit, ...] = ()

    def fits(self, architecture: str, device: str) -> bool:
        """Whether the table is for this device."""
        return any(fnmatch.fnmatchcase(architecture, p) for p in self.architectures) and any(
            fnmatch.fnmatchcase(device, p) for p in self.devices
        )


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a launcher needs: an entry, and the number of splits for one shape on one device."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int


def _ratio(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1) / max(b, 1)))


def _row(file: Path, kind: type, row: dict[str, Any]) -> Any:
    try:
        if not isinstance(row["dtypes"], list):
            raise TypeError(f"dtypes: found {row['dtypes']!r}, expected a list of names")
        return kind(**{**row, "dtypes": tuple(row["dtypes"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file}: entry {row} does not fit: {error}") from error


#: See ``preferring``.
_preferred: list[Table] = []


@functools.cache
def tables() -> tuple[Table, ...]:
    """All tables: that of one device, those that others use too, those for any device; ``default.json`` last."""
    found: list[Table] = []
    for file in sorted(TABLES.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = tuple(_row(file, Entry, row) for row in content["entries"])
        fused = tuple(_row(file, Limit, row) for row in content.get("fused", ()))
        architectures, devices = tuple(content["architectures"]), tuple(content["devices"])
        found.append(Table(file.stem, content["source"], architectures, devices, entries, fused))
    found.sort(key=lambda t: (t.file == "default", t.devices == ("*",), len(t.devices), t.file))
    return (*_preferred, *found)


def forget() -> None:
    """Reads the tables anew at the next launch."""
    for cached in (tables, settings, fused_up_to):
        cached.cache_clear()


@contextlib.contextmanager
def preferring(entries: Sequence[Entry] = (), fused: Sequence[Limit] = ()) -> Iterator[None]:
    """Puts entries and limits before all tables, on every device: to measure or test what no table has.

    A captured CUDA graph keeps the settings that it was captured with.
    """
    table = Table("preferred", "under measurement", ("*",), ("*",), tuple(entries), tuple(fused))
    _preferred.insert(0, table)
    forget()
    try:
        yield
    finally:
        _preferred.remove(table)
        forget()


def shipped(architecture: str) -> list[tuple[str, Entry]]:
    """Every (table name, entry) that some device of this architecture can be given. Used by aot.py."""
    listed: list[tuple[str, Entry]] = []
    covered: set[tuple[str, str]] = set()
    for table in tables():
        if not any(fnmatch.fnmatchcase(architecture, p) for p in table.architectures):
            continue
        own: set[tuple[str, str]] = set()
        for entry in table.entries:
            left = tuple(d for d in entry.dtypes if (entry.op, d) not in covered)
            if left:
                listed.append((table.file, dataclasses.replace(entry, dtypes=left)))
            if entry.m >= MOST_TOKENS or entry.op not in FORMS:
                own.update((entry.op, d) for d in entry.dtypes)
        if table.devices == ("*",):  # later tables are never asked for what this one has
            covered |= own
    return listed


@functools.cache
def device_profile(device: torch.device) -> tuple[str, str, int]:
    """(architecture, name, multiprocessors) of a device. A CPU runs Triton's interpreter, as a small made-up GPU."""
    if device.type != "cuda":
        return "interpreter", device.type, 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return architecture, properties.name, properties.multi_processor_count


def names_of(device: torch.device) -> tuple[str, str]:
    """(architecture, name) of a device, as the patterns of a table are matched with."""
    return device_profile(device)[:2]


def entries_for(op: str, m: int, dtype: torch.dtype, architecture: str, name: str) -> tuple[Entry, ...]:
    """The entries that a device chooses from for M: those of the first table that is for it and has any.

    A projection of more tokens than a table knows goes to the next: small tiles of tokens would read the weight again
    and again.
    """
    short = str(dtype).removeprefix("torch.")
    entries: tuple[Entry, ...] = ()
    for table in tables():
        if table.fits(architecture, name):
            entries = tuple(e for e in table.entries if e.op == op and short in e.dtypes) or entries
            if entries and (op not in FORMS or m <= max(e.m for e in entries)):
                break
    if not entries:
        raise ValueError(f"no table in {TABLES} has an entry for {op} in {dtype} on {name} ({architecture})")
    return entries


def nearest(op: str, m: int, n: int, k: int, dtype: torch.dtype, architecture: str, name: str) -> Entry:
    """The entry whose settings a launch gets on a device."""
    return min(entries_for(op, m, dtype, architecture, name), key=lambda e: e.distance(m, n, k))


@functools.lru_cache(maxsize=65536)
def settings(op: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Settings:
    """The settings of one launch. A repeated call is one look-up in a cache."""
    architecture, name, processors = device_profile(device)
    entry = nearest(op, m, n, k, dtype, architecture, name)
    return Settings(
        block_m=entry.block_m,
        block_n=entry.block_n,
        block_k=entry.block_k,
        num_warps=entry.num_warps,
        num_stages=entry.num_stages,
        splits=entry.splits(m, n, k, processors),
    )


#: How far, as a factor of N and K together, a shape may be from one that was measured for its limit to be believed.
_NEAR = 1.5


@functools.cache
def fused_up_to(
    n: int, k: int, dtype: torch.dtype, device: torch.device, at_input: bool = False, rows: bool = False
) -> int:
    """Up to how many tokens a form of ``steered_linear`` is worth while for a weight [n, k]; 0 where not measured.

    Args:
        at_input, rows: which form, see :func:`form`.
    """
    return limit_for(form(at_input, rows), n, k, dtype, *names_of(device))


def limit_for(op: str, n: int, k: int, dtype: torch.dtype, architecture: str, name: str) -> int:
    """The same of a device by name, here or not.

    Only measured tables (bench/dispatch.py writes them) have limits; the nearest measured shape decides. Never more
    than MOST_TOKENS.
    """
    short = str(dtype).removeprefix("torch.")
    for table in tables():
        limits = [limit for limit in table.fused if limit.op == op and short in limit.dtypes]
        if limits and table.fits(architecture, name):
            near = min(limits, key=lambda limit: _ratio(n, limit.n) + _ratio(k, limit.k))
            return min(near.m, MOST_TOKENS) if _ratio(n, near.n) + _ratio(k, near.k) <= math.log2(_NEAR) else 0
    return 0


def elsewhere(t: Tensor) -> bool:
    """Whether a tensor is on another GPU than the current one, on which Triton launches, wherever its tensors are."""
    index = t.get_device()  # -1 on a CPU
    return index >= 0 and index != torch.cuda.current_device()
