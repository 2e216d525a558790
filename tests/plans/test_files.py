"""A plan's file: what is written comes back, older versions still load, and no damage loads as something else."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from austeer import AtomicUnit, Counters, FileFormatError, Momentum, Plan, PlanError
from austeer.models.sites import Fingerprint
from austeer.plans import files as plan_files
from austeer.plans.files import FILE_NAME, FORMAT, VERSION
from austeer.plans.table import OPERATIONS, TIES
from austeer.utils import files
from small_plans import (
    COLUMNS,
    DOSE,
    DOSED,
    EVIDENCE,
    KNOWN,
    MODEL,
    PLAN,
    REPLAY,
    VERSION_1,
    claiming,
    keys_of,
    parts_of,
    plan_of,
    sealed,
)

CHAT_FORMS = st.sampled_from([False, True, {"system": "Be brief.", "tools": []}])

# --- round trips -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(keys_of(), st.sampled_from(OPERATIONS), CHAT_FORMS, st.sampled_from(TIES), st.booleans())
def test_file_gives_back_the_plan(tmp_path_factory, keys, operation, chat, ties, known):
    plan = plan_of(keys, operation, chat_template=chat, ties=ties)
    if known:
        plan = plan.with_evidence(EVIDENCE)
    folder = tmp_path_factory.mktemp("plan")
    path = plan.save_pretrained(folder / "new" / "folder")
    assert path == folder / "new" / "folder" / FILE_NAME
    for source in (path, path.parent, str(path.parent)):
        loaded = Plan.from_pretrained(source)
        assert loaded == plan
        assert loaded.model == plan.model and loaded.evidence == plan.evidence
        for name in ("layer", "index", "beta", "delta"):
            assert torch.equal(getattr(loaded, name), getattr(plan, name))


@pytest.mark.parametrize("dose", [DOSE, replace(DOSE, effect=(), ids=(), measured=())])
def test_file_gives_back_the_dose(tmp_path, dose):
    plan = DOSED.with_dose(dose)
    loaded = Plan.from_pretrained(plan.save_pretrained(tmp_path))
    assert loaded == plan and (loaded.rank, loaded.step, loaded.dose) == ("effect", "newton", dose)
    metadata, columns = parts_of((tmp_path / FILE_NAME).read_bytes())
    assert {*columns} - {*COLUMNS} == ({"dose_kl", "dose_effect"} if dose.effect else {"dose_kl"})
    assert len(json.loads(metadata["header"])["dose"]["measured"]) == len(dose.measured)


@pytest.mark.parametrize(
    "replay", [REPLAY, replace(REPLAY, alpha={"attention": 2.0, "ffn": 0.5}), replace(REPLAY, scope=(1, None))]
)
def test_file_gives_back_the_replay(tmp_path, replay):
    loaded = Plan.from_pretrained(PLAN.with_replay(replay).save_pretrained(tmp_path))
    assert loaded.replay == replay and loaded == PLAN.with_replay(replay) != PLAN
    assert isinstance(loaded.replay.answers["applied"][0][0][0][0], int)


def test_a_file_of_version_3_has_no_replay(tmp_path):
    metadata, columns = parts_of(KNOWN.save_pretrained(tmp_path).read_bytes())
    header = json.loads(metadata["header"])
    for found in (header, {**header, "replay": REPLAY.to_json()}):
        (tmp_path / FILE_NAME).write_bytes(sealed(json.dumps(found), columns, version="3"))
        with pytest.raises(FileFormatError, match="'replay' in version 3"):
            Plan.from_pretrained(tmp_path)
    del header["replay"]
    (tmp_path / FILE_NAME).write_bytes(sealed(json.dumps(header), columns, version="3"))
    assert Plan.from_pretrained(tmp_path) == KNOWN


def test_the_same_plan_is_the_same_file(tmp_path):
    assert len({KNOWN.save_pretrained(tmp_path / str(i)).read_bytes() for i in range(9)}) == 1


def test_header_is_plain_json(tmp_path):
    metadata = parts_of(KNOWN.save_pretrained(tmp_path).read_bytes())[0]
    assert metadata["format"] == "austeer-plan" and metadata["version"] == str(VERSION)
    header = json.loads(metadata["header"])
    assert header["model"]["name"] == MODEL.name
    assert header["evidence"]["tested"][1]["alpha"] == 4.0


@pytest.mark.parametrize(
    "plan, found",
    [
        (replace(PLAN, model=replace(MODEL, name="two\nlines")), r"model: name: .*'two\\nlines'"),
        (replace(PLAN, model=replace(MODEL, name="")), "model: name: .*''"),
        (replace(PLAN, model=replace(MODEL, revision="x" * 301)), "model: revision: .*301"),
        (replace(PLAN, model=replace(MODEL, layers=2**31)), "model: .*sizes"),
        (replace(PLAN, model=replace(MODEL, layers=True), layer=PLAN.layer * 0), "model: .*sizes"),
        (
            replace(PLAN, model=replace(MODEL, widths={**MODEL.widths, **{f"s{i}": 1 for i in range(63)}})),
            "model: .*65 sites.*64",
        ),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, plan, found):
    with pytest.raises(PlanError, match=found):
        plan.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_header_without_end_is_not_written(tmp_path):
    rows = tuple(replace(EVIDENCE.tested[0], alpha=i, data="ü" * 300) for i in range(500))
    with pytest.raises(PlanError, match=r"header.*\d+ bytes.*\d+.*evidence"):
        PLAN.with_evidence(replace(EVIDENCE, tested=rows, alpha=None)).save_pretrained(tmp_path)


def test_a_header_that_a_replay_makes_too_long_names_it(tmp_path):
    """The evidence alone fits."""
    rows = tuple(replace(EVIDENCE.tested[0], alpha=i, data="ü" * 276) for i in range(490))
    plan = PLAN.with_evidence(replace(EVIDENCE, tested=rows, alpha=None))
    plan.save_pretrained(tmp_path)
    large = replace(REPLAY, texts=dict.fromkeys(range(900), "x" * 40))
    with pytest.raises(PlanError, match=r"header.*\d+ bytes.*shorten the evidence \(\d+ bytes\) or the replay \(\d+\)"):
        plan.with_replay(large).save_pretrained(tmp_path)


# --- what is not there -----------------------------------------------------------------------------------------------


def test_missing_plan(tmp_path):
    with pytest.raises(FileFormatError, match=rf"{FILE_NAME}: .*austeer-plan.*nothing"):
        Plan.from_pretrained(tmp_path)
    for name in "fedcbag":
        (tmp_path / name).touch()
    with pytest.raises(FileFormatError, match=r" a, b, c, d, e \.\.\."):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match=r"new: .*austeer-plan"):
        Plan.from_pretrained(tmp_path / "new")
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(FileFormatError, match=rf"{FILE_NAME}: .*austeer-plan"):
        Plan.from_pretrained(tmp_path)


def test_a_models_weights_are_no_plan(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / FILE_NAME, metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match=r"'pt'.*'austeer-plan'"):
        Plan.from_pretrained(tmp_path)


def test_a_momentum_file_is_called_one(tmp_path):
    counters = {name: torch.zeros(4, 9) for name in Counters.__dataclass_fields__}
    Momentum({"ffn": Counters(**counters)}, 3, MODEL).save(tmp_path / "kind.momentum")
    with pytest.raises(FileFormatError, match=r"kind.momentum: .*momentum file.*plan.*austeer select"):
        Plan.from_pretrained(tmp_path / "kind.momentum")


# --- versions --------------------------------------------------------------------------------------------------------


def test_a_file_of_version_1_still_loads(tmp_path):
    assert parts_of(VERSION_1.read_bytes())[0]["version"] == "1", "written by the code of that time"
    plan = Plan.from_pretrained(VERSION_1)
    assert list(plan) == [
        AtomicUnit("attention", 12, 575, 1.0, 0.125),
        AtomicUnit("ffn", 0, 0, -0.984375, -3.5),
        AtomicUnit("attention", 29, 31, 0.5, float(np.float32(1e-8))),
        AtomicUnit("ffn", 7, 102, -0.25, 2.0),
    ]
    assert plan.model == Fingerprint(
        "llama",
        30,
        {"attention": 576, "ffn": 576},
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    )
    assert (plan.operation, plan.pairs, plan.ties, plan.chat_template) == ("shift", 64, "public", True)
    assert plan.evidence is None
    again = plan.save_pretrained(tmp_path)
    assert parts_of(again.read_bytes())[0]["version"] == str(VERSION) and Plan.from_pretrained(again) == plan


def test_every_older_version_has_a_migration():
    assert sorted(plan_files.MIGRATIONS) == list(range(1, VERSION))


@pytest.mark.parametrize(
    "field, found",
    [("colour", r"\['chat_template', 'colour'"), ("evidence", "'evidence'"), ("rank", "'rank' in version 2")],
)
def test_a_file_of_version_1_has_no_later_fields(tmp_path, field, found):
    metadata, columns = parts_of(VERSION_1.read_bytes())
    header = {**json.loads(metadata["header"]), field: EVIDENCE.to_json()}
    (tmp_path / FILE_NAME).write_bytes(sealed(json.dumps(header), columns, version="1"))
    with pytest.raises(FileFormatError, match=rf"{FILE_NAME}: inconsistent.*{found}"):
        Plan.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "version, writer, found",
    [
        ("5", "9.1", "version '5'.*4.*austeer 9.1, pip install --upgrade austeer"),
        ("5", "9.1; rm -rf /", r"version '5'.*4.*\(pip install --upgrade austeer\)"),
        ("0", "0.0", "version '0'.*4; use the austeer that wrote it,"),
        ("٢", "0.1", "version '٢'.*4; use the austeer that wrote it,"),
        ("9" * 5000, "0.1", "version '9{40}'.*4; use the austeer that wrote it,"),
    ],
)
def test_other_versions(tmp_path, version, writer, found):
    metadata, columns = parts_of(PLAN.save_pretrained(tmp_path).read_bytes())
    (tmp_path / FILE_NAME).write_bytes(sealed(metadata["header"], columns, version=version, austeer=writer))
    with pytest.raises(FileFormatError, match=found):
        Plan.from_pretrained(tmp_path)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [10**12, 2**63, 2**64])
def test_more_aus_than_the_file_has_bytes(tmp_path, units):
    (tmp_path / FILE_NAME).write_bytes(claiming(units)[0] + b"\0" * 100)
    with pytest.raises(FileFormatError, match=rf"{FILE_NAME}: .*austeer-plan"):
        Plan.from_pretrained(tmp_path)


def test_a_file_of_many_gigabytes_is_not_read(tmp_path):
    begin, size = claiming(10**10)
    with (tmp_path / FILE_NAME).open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + size)  # sparse: it takes no room
    with pytest.raises(FileFormatError, match=r"1700\d+ bytes.*\d+"):
        Plan.from_pretrained(tmp_path)


def test_more_aus_than_a_plan_may_have(tmp_path, monkeypatch):
    begin, size = claiming(plan_files.MOST_UNITS + 1)
    with (tmp_path / FILE_NAME).open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + size)
    with pytest.raises(FileFormatError, match=r"8388609 AUs.*1 to 8388608"):
        Plan.from_pretrained(tmp_path)
    PLAN.save_pretrained(tmp_path)
    monkeypatch.setattr(plan_files, "MOST_UNITS", 3)
    assert Plan.from_pretrained(tmp_path) == PLAN
    monkeypatch.setattr(plan_files, "MOST_UNITS", 2)
    with pytest.raises(FileFormatError, match=r"3 AUs.*1 to 2"):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"3 AUs.*1 to 2.*plan.top\(k\)"):
        PLAN.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("claimed", [2**20 + 1, 10**8, 2**63, 2**64 - 1])
def test_a_header_that_claims_too_much(tmp_path, claimed):
    (tmp_path / FILE_NAME).write_bytes(struct.pack("<Q", claimed) + b"{" * (2**20 + 100))
    with pytest.raises(FileFormatError, match=rf"{FILE_NAME}: .*header.*{claimed} bytes.*1048576"):
        Plan.from_pretrained(tmp_path)


# --- well-formed files that hold no plan -----------------------------------------------------------------------------


def header_with(**changes):
    header = {
        "operation": "scale",
        "model": MODEL.to_json(),
        "pairs": 17,
        "ties": "effect",
        "chat_template": False,
        "evidence": None,
        "rank": "momentum",
        "step": "difference",
        "dose": None,
        "replay": None,
        "sites": ["attention", "ffn"],
    }
    return {name: value for name, value in {**header, **changes}.items() if value is not ...}


def shift_with(**changes):
    return header_with(operation="shift", **changes)


def replay_with(**changes):
    return header_with(replay={**REPLAY.to_json(), **changes})


def evidence_with(**changes):
    return header_with(evidence={**EVIDENCE.to_json(), **changes})


@pytest.mark.parametrize(
    "header, tensors, error",
    [
        (header_with(operation="add"), {}, PlanError),
        (header_with(ties=...), {}, FileFormatError),
        (header_with(sites=["ffn"]), {}, FileFormatError),
        (header_with(sites=["ffn"] * 2), {}, FileFormatError),
        (header_with(sites=[f"s{i}" for i in range(65)]), {}, FileFormatError),
        (header_with(sites=["attention", 5]), {}, PlanError),
        (header_with(extra=1), {}, FileFormatError),
        (header_with(model={**MODEL.to_json(), "widths": [6, 9]}), {}, FileFormatError),
        (header_with(model={**MODEL.to_json(), "layers": True}), {}, PlanError),
        (header_with(model={**MODEL.to_json(), "name": "a\n# b"}), {}, PlanError),
        (header_with(model={**MODEL.to_json(), "revision": []}), {}, PlanError),
        (header_with(model={**MODEL.to_json(), "more": 1}), {}, FileFormatError),
        (header_with(evidence=...), {}, FileFormatError),
        (header_with(rank="beauty"), {}, PlanError),
        (header_with(step=...), {}, FileFormatError),
        (header_with(dose=DOSE.to_json()), {}, FileFormatError),
        (header_with(), {"dose_kl": torch.ones(3).double()}, FileFormatError),
        (header_with(dose=DOSE.to_json()), {"dose_kl": torch.ones(3).double()}, PlanError),
        (shift_with(dose={**DOSE.to_json(), "more": 1}), {"dose_kl": torch.ones(3).double()}, FileFormatError),
        (shift_with(dose=DOSE.to_json()), {"dose_kl": -torch.ones(3).double()}, PlanError),
        (shift_with(dose=DOSE.to_json()), {"dose_kl": torch.ones(3)}, FileFormatError),
        (shift_with(dose=DOSE.to_json()), {"dose_kl": torch.ones(2).double()}, FileFormatError),
        (header_with(replay=...), {}, FileFormatError),
        (header_with(replay=[REPLAY.to_json()]), {}, FileFormatError),
        (replay_with(more=1), {}, FileFormatError),
        (replay_with(layers=[0, 3]), {}, FileFormatError),
        (replay_with(texts={"x": "."}), {}, FileFormatError),
        (replay_with(prompts=[{"text": "The soup was"}]), {}, FileFormatError),
        (replay_with(answers={"applied": [[[[8, -0.25, 1]]]], "not applied": [[[[8, -0.25]]]]}), {}, FileFormatError),
        (replay_with(answers={"applied": [[[[8, -0.25]]]]}), {}, PlanError),
        (replay_with(digest="two\nlines"), {}, PlanError),
        (evidence_with(tested=None), {}, FileFormatError),
        (evidence_with(more=1), {}, FileFormatError),
        ({}, {}, FileFormatError),
        (header_with(), {"site": torch.tensor([0, 1, 7], dtype=torch.uint8)}, FileFormatError),
        (header_with(), {"site": torch.tensor([[0], [1], [1]], dtype=torch.uint8)}, FileFormatError),
        (header_with(), {"layer": torch.tensor([1.0, 2, 3])}, FileFormatError),
        (header_with(), {"index": torch.tensor([3]).int()}, FileFormatError),
        (header_with(), {"delta": None}, FileFormatError),
        (header_with(), dict.fromkeys(COLUMNS), FileFormatError),
    ],
)
def test_well_formed_files_that_hold_no_plan(tmp_path, header, tensors, error):
    # Written by our own writer, checksum and all, so that only the content is wrong.
    columns = {"site": torch.tensor([1, 0, 1], dtype=torch.uint8)}
    columns |= {name: getattr(PLAN, name) for name in ("layer", "index", "beta", "delta")} | tensors
    columns = {name: t for name, t in columns.items() if t is not None}
    files.write(tmp_path / FILE_NAME, FORMAT, VERSION, header, columns)
    with pytest.raises(error) as caught:
        Plan.from_pretrained(tmp_path)
    assert str(tmp_path / FILE_NAME) in str(caught.value) and len(str(caught.value)) < 1000


def test_the_unchanged_header_is_a_plan(tmp_path):
    """So each case above fails for its change alone."""
    columns = {"site": torch.tensor([1, 0, 1], dtype=torch.uint8)}
    columns |= {name: getattr(PLAN, name) for name in ("layer", "index", "beta", "delta")}
    shift = replace(PLAN, operation="shift", dose=replace(DOSE, effect=()))
    for header, plan, more in (
        (header_with(), PLAN, {}),
        (evidence_with(), KNOWN, {}),
        (replay_with(), PLAN.with_replay(REPLAY), {}),
        (shift_with(dose=DOSE.to_json()), shift, {"dose_kl": torch.tensor(DOSE.kl, dtype=torch.float64)}),
    ):
        files.write(tmp_path / FILE_NAME, FORMAT, VERSION, header, columns | more)
        assert Plan.from_pretrained(tmp_path) == plan
