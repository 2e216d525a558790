"""A probe's file holds what was fitted, and nothing else passes for one."""

import json
from dataclasses import replace

import pytest
import torch

from austeer import FileFormatError, PlanError, Probe
from austeer.models.sites import Fingerprint
from austeer.plans.probe import ProbeEvidence, Rate
from austeer.utils import files

RATES = {"false_positives": Rate(1, 40, 0.0, 0.13), "true_positives": Rate(38, 40, 0.83, 0.99)}


@pytest.fixture
def probe():
    return Probe(
        "layer",
        2,
        torch.tensor([0.6, 0.0, -0.8]),
        1.5,
        Fingerprint("llama", 4, {"layer": 3}, "tiny", None),
        {"system": "Be brief."},
        ProbeEvidence(0.02, 99, 0.001, 0.05, auc=0.97, **RATES),
    )


def test_a_file_gives_back_the_probe(probe, tmp_path):
    found = Probe.load(probe.save(tmp_path / "a" / "p.probe"))
    for name in ("site", "layer", "threshold", "model", "chat_template", "evidence"):
        assert getattr(found, name) == getattr(probe, name)
    assert torch.equal(found.direction, probe.direction)
    assert (tmp_path / "a" / "p.probe").read_bytes() == found.save(tmp_path / "again").read_bytes()
    bare = replace(probe, evidence=None, chat_template=False)
    assert Probe.load(bare.save(tmp_path / "bare")).evidence is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"site": "head"}, "head"),
        ({"site": "ffn"}, "ffn"),
        ({"layer": 4}, "layer 4.*0 to 3"),
        ({"layer": True}, "True"),
        ({"direction": torch.ones(2)}, r"\[2\].*3"),
        ({"direction": torch.ones(3).double()}, "float32"),
        ({"direction": torch.tensor([1.0, torch.nan, 0.0])}, "finite"),
        ({"threshold": float("nan")}, "nan"),
        ({"threshold": 1e39}, "1e\\+39"),
        ({"chat_template": {}}, "chat_template"),
    ],
)
def test_what_is_no_probe(probe, change, named):
    with pytest.raises(PlanError, match=named):
        replace(probe, **change)


def test_what_are_no_rates():
    for arguments in ((3, 2, 0.0, 1.0), (1, 0, 0.0, 1.0), (1, 2, 0.5, 0.2), (1.0, 2, 0.0, 1.0), (1, 2, None, 1.0)):
        with pytest.raises(PlanError, match="rate"):
            Rate(*arguments)
    for change in ({"auc": 1.5}, {"asked": "x"}, {"calibration": 0}):
        with pytest.raises(PlanError, match="evidence"):
            ProbeEvidence(
                **({"asked": 0.1, "calibration": 9, "expected_low": 0, "expected_high": 1, "auc": 1} | RATES | change)
            )


def test_files_of_others_are_refused(probe, tmp_path):
    path = probe.save(tmp_path / "p")
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    files.write(tmp_path / "kind", "austeer-other", 1, {}, {"direction": probe.direction})
    files.write(tmp_path / "newer", "austeer-probe", 2, {}, {"direction": probe.direction})
    files.write(tmp_path / "tensors", "austeer-probe", 1, {}, {"direction": probe.direction.double()})
    files.write(tmp_path / "fields", "austeer-probe", 1, {"site": "layer"}, {"direction": probe.direction})
    named = {
        "damaged": "checksum",
        "kind": "austeer-other",
        "newer": "version",
        "tensors": "direction",
        "fields": "evidence",
    }
    for name, message in {**named, "missing": "no such file"}.items():
        with pytest.raises(FileFormatError, match=f"{name}.*{message}"):
            Probe.load(tmp_path / name)
    header = json.loads(json.dumps({"site": "layer", "layer": 9, "threshold": 0.0, "chat_template": False}))
    model = Fingerprint("llama", 4, {"layer": 3}, "tiny", None).to_json()
    files.write(
        tmp_path / "layer",
        "austeer-probe",
        1,
        header | {"model": model, "evidence": None},
        {"direction": probe.direction},
    )
    with pytest.raises(PlanError, match=r"layer: .*layer 9"):
        Probe.load(tmp_path / "layer")
