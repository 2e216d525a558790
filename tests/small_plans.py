"""Plans of a few AUs for a model that is not there, evidence of one, and plan files that are built by hand."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import strategies as st

from austeer import Plan
from austeer.models.sites import Fingerprint
from austeer.plans import files as plan_files
from austeer.plans.dose import Dose, Point
from austeer.plans.evidence import Evidence, Outcome, Overhead
from austeer.plans.files import FORMAT, VERSION
from austeer.plans.replay import Prompt, Replay

MODEL = Fingerprint("llama", 4, {"attention": 6, "ffn": 9}, "user/model – ü", "abc123")


def plan_of(keys, operation="scale", model=MODEL, seed=0, **rest):
    generator = torch.Generator().manual_seed(seed)
    return Plan(
        site=tuple(site for site, _, _ in keys),
        layer=torch.tensor([layer for _, layer, _ in keys], dtype=torch.int32),
        index=torch.tensor([index for _, _, index in keys], dtype=torch.int32),
        beta=torch.rand(len(keys), generator=generator) * 2 - 1,
        delta=torch.randn(len(keys), generator=generator),
        operation=operation,
        model=model,
        pairs=17,
        **rest,
    )


def keys_of(sites=("attention", "ffn")):
    one = st.one_of([st.tuples(st.just(s), st.integers(0, 3), st.integers(0, MODEL.widths[s] - 1)) for s in sites])
    return st.lists(one, min_size=1, max_size=20, unique=True)


PLAN = plan_of([("ffn", 3, 8), ("attention", 0, 5), ("ffn", 0, 0)])

EVIDENCE = Evidence(
    effect="mean change of log-odds, nats",
    side_effect="rise of the cross-entropy, nats a token",
    tested=(Outcome(2, "9 pairs", 0.5, side_effect=0.01), Outcome(4, "9 pairs", 0.9, 0.6, 1.2, 1.0, 0.04)),
    alpha=4,
    overhead=(Overhead(0.4, "Xeon, 2 cores", "fold", "float32, batch 1", -1.2, 2.1),),
)
KNOWN = PLAN.with_evidence(EVIDENCE)

#: Of three AUs; at alpha = 1 all of them have a KL of 0.1 and an effect of 0.6 nats.
DOSE = Dose((0.04, 0.05, 0.1), (0.5, 0.7, 0.6), 0.1, "neutral text", ((1, 2, 3), (4, 5)), (Point(3, 0.5, 0.03),))
DOSED = replace(PLAN, operation="shift", rank="effect", step="newton", dose=DOSE)

#: Of PLAN at alpha 2: one prompt, of which two tokens were written with it and one without.
REPLAY = Replay(
    digest=PLAN.digest,
    operation="scale",
    k=3,
    layers={"attention": (0,), "ffn": (0, 3)},
    alpha=2,
    scope="all",
    dtype="float32",
    prompts=(Prompt("The soup was", (5, 6, 7)),),
    answers={
        "not applied": ((((8, -0.25), (9, -1.5)),),),
        "applied": ((((9, -0.5), (8, -1.0)), ((3, -0.125), (8, -2.0))),),
        "sign flipped": ((((8, -0.0625), (9, -3.0)),),),
    },
    texts={3: ".", 8: " good", 9: " hot"},
)


# --- plan files, built by hand ---

VERSION_1 = Path(__file__).parent / "data" / "plan_version_1.safetensors"
COLUMNS = tuple(sorted(plan_files.COLUMNS))

TORCH_NAMES = {"U8": "uint8", "I8": "int8", "I32": "int32", "I64": "int64", "F32": "float32", "F64": "float64"}
TORCH_NAMES |= {"F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn"}


def outside(tensors, metadata=None):
    """The beginning of a safetensors file: its header as it is given, with its length before it."""
    text = json.dumps(
        {"__metadata__": metadata or {"format": FORMAT, "version": str(VERSION), "header": "{}"}, **tensors}
    )
    return struct.pack("<Q", len(text)) + text.encode()


def claiming(units):
    """The beginning of a file of so many AUs, and the size of what should follow."""
    tensors, place = {}, 0
    for name in COLUMNS:
        size = units * (1 if name == "site" else 4)
        dtype = plan_files.COLUMNS[name]
        tensors[name] = {"dtype": dtype, "shape": [units], "data_offsets": [place, place + size]}
        place += size
    return outside(tensors), place


def parts_of(content):
    """(metadata, columns) of a file's bytes: name -> (dtype, shape, bytes)."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.pop("__metadata__")
    columns = {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}
    return metadata, columns


def sealed(header, columns, **metadata):
    """A file with a right checksum, built by hand from the format's description."""
    digest = hashlib.sha256(header.encode())
    for name, (dtype, shape, content) in sorted(columns.items()):
        digest.update(f"{name} torch.{TORCH_NAMES[dtype]} {shape}".encode() + content)
    metadata = {"format": FORMAT, "version": str(VERSION), "header": header, **metadata}
    tensors, place, data = {}, 0, b""
    for name, (dtype, shape, content) in columns.items():
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(content)]}
        place, data = place + len(content), data + content
    return outside(tensors, {**metadata, "checksum": digest.hexdigest()}) + data
