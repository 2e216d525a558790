"""Counts of one decoding step: each form adds exactly the operations that it is written in."""

import pytest
import torch

from bench import counted_ops as counts
from bench.catalogue import OURS
from bench.counted_ops import CountedOps
from bench.plain_ways import WAYS as PLAIN
from bench.plans import spread_plan
from bench.steered import twin
from tiny_models import ids_of_rows, tiny_model

WAYS = {way.name: way.make for way in (*PLAIN, *OURS)}
LAYERS, WIDTH = 3, 32


def of(name, model=None, layers=None, rows=2):
    model = model or tiny_model()
    steered = WAYS[name](twin(model), spread_plan(model, "ffn", 30, layers), 4.0)
    found = counts.of_step(steered, ids_of_rows(rows)["input_ids"])
    steered.close()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 2])
def test_each_form_adds_its_own_operations(family, rows):
    model = tiny_model(family)
    plain = of("unsteered", model, rows=rows)
    assert plain == of("unsteered again", model, rows=rows)
    bytes_of_row = 4 * WIDTH
    expected = {
        # (launches, bytes, operations) a layer
        "dense hook": (1, (2 * rows + 1) * bytes_of_row, rows * WIDTH),
        "public": (3, (2 * rows + 1 + 3 * rows + 2 * rows) * bytes_of_row, 2 * rows * WIDTH),
        "fold": (0, 0, 0),
    }
    for name, added in expected.items():
        found = of(name, model, rows=rows)
        keys = ("launches", "bytes", "operations")
        assert tuple(found[key] - plain[key] for key in keys) == tuple(LAYERS * one for one in added), name
    assert of("sparse hook", model, rows=rows)["launches"] >= plain["launches"] + 3 * LAYERS


def test_only_the_public_form_pays_for_layers_without_aus():
    plain = of("unsteered")["launches"]
    assert [of(name, layers=1)["launches"] - plain for name in ("dense hook", "public", "fold")] == [1, 9, 0]
    assert of("columns", layers=1)["launches"] - plain == (of("columns", layers=3)["launches"] - plain) / 3 > 0


def test_a_step_reads_every_weight_once():
    model = tiny_model(hidden_size=128, intermediate_size=256)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed" not in name)
    found = of("unsteered", model)
    assert weights < found["bytes"] < 1.5 * weights
    products = 2 * 2 * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert products < found["operations"] < 1.2 * products


def test_nothing_is_left_changed_and_what_a_cpu_does_not_tell_is_none():
    model = tiny_model()
    before = [p.clone() for p in model.parameters()]
    found = of("fold", model)
    assert all(map(torch.equal, model.parameters(), before))
    assert found.keys() == counts.UNKNOWN.keys() and set(counts.UNKNOWN.values()) == {None}
    assert found["device_seconds"] is found["host_seconds"] is None


def test_the_step_is_the_first_after_the_prompt_and_its_way_is_active():
    model, ids, seen = tiny_model(), ids_of_rows()["input_ids"], []
    before = [p.clone() for p in model.parameters()]
    fold = WAYS["fold"](twin(model), spread_plan(model, "ffn", 30), 4.0)
    fold.model.register_forward_pre_hook(lambda *_: seen.append(all(map(torch.equal, model.parameters(), before))))
    found = counts.of_step(fold, ids)
    assert len(seen) >= 3 and not any(seen), "folded at every pass"
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with CountedOps(model) as counted:
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert found["bytes"] == counted.read + counted.written and found["launches"] == counted.launches
