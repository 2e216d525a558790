"""Damaged plan files: bits, ranges, headers and columns altered at random; an error or the plan, never another plan."""

import json
import os
import random
import shutil
import struct

import numpy as np
import pytest

from austeer import AusteerError, FileFormatError, Plan
from austeer.plans.dose_table import dose_rows
from austeer.plans.files import FILE_NAME, FORMAT
from small_plans import DOSED, KNOWN, PLAN, VERSION_1, outside, parts_of, sealed


def damaged(content, random):
    """A file's bytes, hurt as storage, transfers and editors do."""
    new = bytearray(content)
    place, length = random.randrange(len(new)), random.choice([1, 2, 8, 40, 200])
    noise, kind = random.randbytes(length), random.randrange(9)
    if kind < 3:
        for _ in range(random.choice([1, 1, 5])):
            new[random.randrange(len(new))] ^= 1 << random.randrange(8)
        return bytes(new)
    first, last, put = [
        *((place, None, b""), (0, place, b""), (place, place + length, b"")),  # cut, at either end or inside
        *((place, place + length, noise), (place, place + length, bytes(length))),  # overwritten
        *((place, place, noise),),  # more of it
    ][kind - 3]
    new[first:last] = put
    return bytes(new)


@pytest.mark.parametrize("plan", [KNOWN, DOSED, None], ids=["with evidence", "with a dose", "version 1"])
def test_any_damage_gives_an_error_or_the_plan(tmp_path, plan):
    path = tmp_path / FILE_NAME
    plan.save_pretrained(tmp_path) if plan else shutil.copy(VERSION_1, path)
    plan, content = Plan.from_pretrained(path), path.read_bytes()
    generator, refused = random.Random(5), 0
    for number in range(2000):
        path.write_bytes(damaged(content, generator))
        try:
            assert Plan.from_pretrained(path) == plan, f"case {number}"
        except AusteerError as error:
            assert str(error)
            refused += 1
    assert refused > 1800, "padding and the writer's version may change without harm, little else"


NASTY = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, -1e-320),
    *("", "x", "scale", "ffn", "../../etc/passwd", "a\0b", "line\nline", "\ud800", "\u202e", "x" * 5000, "{}", "1"),
    *([], [[]], {}, [0] * 1000, {"ffn": 1}, {"attention": 10**9, "ffn": 2}, ["ffn", "attention"], [None]),
]


def edited(text, random):
    """A header's JSON with one thing changed."""
    header = json.loads(text)
    kind = random.choice(["value", "value", "value", "value", "delete", "add", "text"])
    if kind == "text":  # what json.dumps would not write
        place = random.choice([i for i, letter in enumerate(text) if letter in '{[,:"'])
        bomb = random.choice(
            ["NaN", "-Infinity", "1e999", "[" * 10**5, '{"a":' * 10**5, "9" * 5000, "\\ud800", '"pairs": 3,']
        )
        return text[: place + 1] + bomb + text[place + 1 :]
    places = list(places_in(header))
    holder, name = random.choice(places)
    if kind == "value":
        holder[name] = random.choice(NASTY)
    elif kind == "delete":
        del holder[name]
    elif isinstance(holder, dict):
        holder[random.choice(["more", "__class__", "", "site", "layer", name + " "])] = random.choice(NASTY)
    else:
        holder.insert(0, random.choice(NASTY))
    return json.dumps(header)


def places_in(value):
    for name in value if isinstance(value, dict) else range(len(value)):
        yield value, name
        if isinstance(value[name], (dict, list)):
            yield from places_in(value[name])


def altered(columns, random):
    """A plan's columns with one of them changed."""
    columns = dict(columns)
    name = random.choice(sorted(columns))
    dtype, shape, content = columns[name]
    kind = random.choice(["values", "values", "values", "dtype", "shape", "length", "drop", "rename", "more", "order"])
    if kind == "values":
        numbers = np.frombuffer(content, {"U8": "u1", "I32": "<i4", "F32": "<f4", "F64": "<f8"}[dtype]).copy()
        nasty = {
            "U8": [0, 1, 2, 255],
            "I32": [0, 1, 5, -1, 8, 9, 2**31 - 1, -(2**31)],
            "F32": [float("nan"), float("inf"), float("-inf"), -0.0, 1.0, -1.0, 1.0000001, 3e38, 1e-45],
            "F64": [float("nan"), float("inf"), -0.0, -1.0, 1e308, 1e-320],
        }
        numbers[random.randrange(len(numbers))] = random.choice(nasty[dtype])
        columns[name] = dtype, shape, numbers.tobytes()
    elif kind == "dtype":
        sizes = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
        new = random.choice(sorted(sizes))
        count = len(content) // sizes[new]
        columns[name] = new, [count], content[: count * sizes[new]]
    elif kind == "shape":
        columns[name] = dtype, random.choice([[1, *shape], [*shape, 1], [1, 1, *shape]]), content
    elif kind == "length":
        one = len(content) // shape[0]
        count = random.choice([0, 1, shape[0] - 1])
        columns[name] = dtype, [count], content[: count * one]
    elif kind == "drop":
        del columns[name]
    elif kind == "rename":
        columns[random.choice(["", "Site", "weight", "operation", "../beta"])] = columns.pop(name)
    elif kind == "more":
        columns["extra"] = columns[name]
    else:
        columns = dict(random.sample(sorted(columns.items()), len(columns)))
    return columns


def assert_sound(plan, folder):
    """What a plan promises, checked apart from its own checks."""
    assert plan.operation in ("scale", "push", "shift") and plan.ties in ("effect", "public")
    assert type(plan.pairs) is int and plan.pairs >= 0 and isinstance(plan.chat_template, (bool, dict))
    assert len(plan) == len(plan.site) > 0 and len(set(plan.keys())) == len(plan)
    for unit in plan:
        assert 0 <= unit.layer < plan.model.layers < 2**31
        assert 0 <= unit.index < plan.model.widths[unit.site] < 2**31
        assert -1 <= unit.beta <= 1 and abs(unit.delta) < float("inf")
    for text in (plan.model.name, plan.model.model_type, *plan.model.widths, plan.model.revision or "none"):
        assert isinstance(text, str) and 0 < len(text) <= 300 and text.isprintable()
    assert Plan.from_pretrained(plan.save_pretrained(folder / "again")) == plan
    if plan.evidence is not None:
        json.dumps(plan.evidence.to_json(), allow_nan=False)
    if plan.dose is not None:
        json.dumps(plan.dose.to_json(), allow_nan=False)
        assert plan.operation == "shift" and len(plan.dose.kl) == len(plan) and plan.dose.texts.isprintable()
        assert min(plan.dose.kl) >= 0 and plan.dose.kl_of(0.5) >= 0 and isinstance(dose_rows(plan.dose), list)


@pytest.mark.parametrize("plan", [KNOWN, DOSED], ids=["with evidence", "with a dose"])
def test_altered_content_with_a_right_checksum(tmp_path, plan):
    """Whoever alters a file on purpose also mends its checksum: what then loads keeps all that a plan promises."""
    metadata, columns = parts_of(plan.save_pretrained(tmp_path).read_bytes())
    path, generator = tmp_path / FILE_NAME, random.Random(7)
    loaded = refused = 0
    for _ in range(1500):
        header, parts = metadata["header"], columns
        for _ in range(generator.choice([1, 1, 2])):
            if generator.random() < 0.6:
                try:
                    header = edited(header, generator)
                except (ValueError, RecursionError):  # no JSON any more, after a first edit
                    break
            else:
                parts = altered(columns, generator)
        path.write_bytes(sealed(header, parts))
        try:
            plan = Plan.from_pretrained(path)
        except AusteerError as error:
            assert str(error)
            refused += 1
        else:
            assert_sound(plan, tmp_path)
            loaded += 1
    assert loaded > 35 and refused > 900, "both happen"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        outside({})[:8] + b"\xff" * 200,
        struct.pack("<Q", 2 * 10**5) + b"[" * 10**5 + b"]" * 10**5,
        struct.pack("<Q", 6 * 10**5) + b'{"a":' * 10**5 + b"1" * 10**5,
        outside({}, {"format": FORMAT, "version": "2", "header": "[" * 10**5 + "]" * 10**5}),
        outside({}, {"format": FORMAT, "version": "2", "header": "9" * 5000}),
        outside({}, {"format": FORMAT, "version": "2", "header": '{"pairs": NaN}'}),
        outside({}, {"format": FORMAT, "version": "2"}),
        outside({}, {"format": FORMAT, "version": 2, "header": "{}"}),
        outside({"beta": 5}),
        outside({"beta": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}),
        outside({"beta": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}) + b"\0" * 6,
    ],
)
def test_what_is_no_file_of_ours(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(FileFormatError):
        Plan.from_pretrained(tmp_path)


def test_a_name_that_stands_twice(tmp_path):
    """One reader takes the first, another the second; here neither loads."""
    content = PLAN.save_pretrained(tmp_path).read_bytes()
    metadata, columns = parts_of(content)
    size = int.from_bytes(content[:8], "little")
    outer = content[8 : 8 + size].decode().rstrip()
    beta = json.loads(outer)["beta"]
    twice = outer[:-1] + f',"beta":{json.dumps(beta)}}}'
    inner = metadata["header"].replace('"pairs": 17', '"pairs": 3, "pairs": 17')
    assert twice != outer and inner != metadata["header"]
    for new in (struct.pack("<Q", len(twice)) + twice.encode() + content[8 + size :], sealed(inner, columns)):
        (tmp_path / FILE_NAME).write_bytes(new)
        with pytest.raises(FileFormatError, match=rf"{FILE_NAME}: .*twice"):
            Plan.from_pretrained(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="named pipes are POSIX's")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(FileFormatError, match=f"{FILE_NAME}: no such file"):
        Plan.from_pretrained(tmp_path)
