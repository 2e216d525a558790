"""Plans: what is a valid one, prefixes, sums, files and every kind of damage to them."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from austeer import AtomicUnit, FileFormatError, Plan, PlanError, files
from austeer.plan import FILE_NAME, OPERATIONS
from austeer.sites import Fingerprint

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


def keys_of(sites=("attention", "ffn"), max_size=20):
    one = st.one_of([st.tuples(st.just(s), st.integers(0, 3), st.integers(0, MODEL.widths[s] - 1)) for s in sites])
    return st.lists(one, min_size=1, max_size=max_size, unique=True)


PLAN = plan_of([("ffn", 3, 8), ("attention", 0, 5), ("ffn", 0, 0)])


# --- validity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"operation": "add"}, "operation: found 'add', expected one of scale, push, shift"),
        ({"site": ()}, "needs at least one AU; found none"),
        ({"site": ("ffn", "ffn")}, r"layer: found torch.int32 \[3\], expected torch.int32 \[2\]"),
        ({"layer": PLAN.layer.long()}, r"layer: found torch.int64 \[3\], expected torch.int32 \[3\]"),
        ({"layer": [3, 0, 0]}, r"layer: found list, expected torch.int32 \[3\]"),
        ({"beta": PLAN.beta.double()}, "beta: found torch.float64"),
        ({"beta": torch.tensor([0.1, float("nan"), 0])}, "beta: found NaN or infinity"),
        ({"delta": torch.tensor([0.1, float("inf"), 0])}, "delta: found NaN or infinity"),
        ({"delta": PLAN.delta[:, None]}, r"delta: found torch.float32 \[3, 1\]"),
        ({"beta": torch.tensor([0.1, -1.5, 0])}, "beta: found 1.5, expected -1 to 1"),
        ({"site": ("ffn", "layer", "ffn")}, r"site 'layer' has no width in the plan's model; found \['attention', 'ff"),
        ({"layer": torch.tensor([4, 0, 0]).int()}, "layer: found 0 to 4 at site 'ffn', expected 0 to 3"),
        ({"layer": torch.tensor([0, -1, 0]).int()}, "layer: found -1 to -1 at site 'attention', expected 0 to 3"),
        ({"index": torch.tensor([0, 6, 0]).int()}, "index: found 6 to 6 at site 'attention', expected 0 to 5"),
        ({"layer": torch.zeros(3).int(), "index": torch.zeros(3).int()}, "found the same AU twice"),
    ],
)
def test_what_is_no_plan(change, message):
    with pytest.raises(PlanError, match=message):
        replace(PLAN, **change)


def test_rows_in_order():
    assert len(PLAN) == 3 and PLAN.keys() == [("ffn", 3, 8), ("attention", 0, 5), ("ffn", 0, 0)]
    assert list(PLAN)[1] == AtomicUnit("attention", 0, 5, float(PLAN.beta[1]), float(PLAN.delta[1]))
    assert PLAN.sites == ("attention", "ffn"), "in the order of SITE_NAMES"
    assert PLAN.of("ffn").tolist() == [0, 2] and PLAN.of("layer").tolist() == []


def test_equality_is_by_value():
    assert plan_of(PLAN.keys()) == PLAN
    for change in ({"operation": "push"}, {"pairs": 18}, {"ties": "public"}, {"chat_template": True}):
        assert replace(PLAN, **change) != PLAN
    assert replace(PLAN, beta=-PLAN.beta) != PLAN and PLAN != "plan"
    assert PLAN.take(torch.tensor([1, 0, 2])) != PLAN, "the order is part of a plan"


# --- parts and sums --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(keys_of(), st.data())
def test_top_is_a_prefix(keys, data):
    plan = plan_of(keys)
    k = data.draw(st.integers(1, len(plan)))
    top = plan.top(k)
    assert list(top) == list(plan)[:k] and top.top(k) == top
    assert (top.operation, top.model, top.pairs) == (plan.operation, plan.model, plan.pairs)


@pytest.mark.parametrize("k", [0, -1, 4, True, 2.0, "2", None])
def test_k_out_of_range(k):
    with pytest.raises(PlanError, match=r"expected an integer from 1 to 3 \(the plan's AUs\)"):
        PLAN.top(k)


def test_operation_changes_nothing_else():
    pushed = PLAN.with_operation("push")
    assert list(pushed) == list(PLAN) and pushed.operation == "push" and PLAN.operation == "scale"
    with pytest.raises(PlanError, match="operation: found 'add'"):
        PLAN.with_operation("add")


@settings(max_examples=60, deadline=None)
@given(keys_of(("attention",)), keys_of(("ffn",)))
def test_sum_alternates_by_rank(first, second):
    a, b = plan_of(first, seed=1), plan_of(second, seed=2)
    both = list(a + b)
    assert [unit for unit in both if unit.site == "attention"] == list(a)
    assert [unit for unit in both if unit.site == "ffn"] == list(b)
    shared = min(len(a), len(b))
    assert both[: 2 * shared] == [unit for pair in zip(a, b) for unit in pair]
    assert sorted((b + a).keys()) == sorted((a + b).keys())


def test_sum_of_one_site_interleaves_too():
    a, b = plan_of([("ffn", 0, 0), ("ffn", 0, 1)]), plan_of([("ffn", 2, 0)])
    assert (a + b).keys() == [("ffn", 0, 0), ("ffn", 2, 0), ("ffn", 0, 1)]


def test_sum_knows_the_widths_of_both():
    parts = [plan_of([(site, 0, 0)], model=replace(MODEL, widths={site: MODEL.widths[site]})) for site in MODEL.widths]
    assert (parts[0] + parts[1]).model == MODEL
    assert (parts[0] + replace(parts[1], pairs=3)).pairs == 3


@pytest.mark.parametrize(
    "other, message",
    [
        (plan_of([("ffn", 1, 1)], "push"), "operation: found 'push' and 'scale', expected the same in both"),
        (plan_of([("ffn", 1, 1)], chat_template=True), "chat_template: found True and False"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, layers=5)), "plans of one model add up"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, model_type="qwen2")), "plans of one model add up"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, widths={"ffn": 8})), "plans of one model add up"),
        (plan_of([("ffn", 3, 8)]), "found the same AU twice"),
    ],
)
def test_plans_that_do_not_add_up(other, message):
    with pytest.raises(PlanError, match=message):
        PLAN + other


# --- files -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(keys_of(), st.sampled_from(OPERATIONS), st.booleans(), st.sampled_from(["effect", "public"]))
def test_file_gives_back_the_plan(tmp_path_factory, keys, operation, chat, ties):
    plan = plan_of(keys, operation, chat_template=chat, ties=ties)
    folder = tmp_path_factory.mktemp("plan")
    path = plan.save_pretrained(folder / "new" / "folder")
    assert path == folder / "new" / "folder" / FILE_NAME
    for source in (path, path.parent, str(path.parent)):
        loaded = Plan.from_pretrained(source)
        assert loaded == plan
        assert loaded.model == plan.model
        for name in ("layer", "index", "beta", "delta"):
            assert torch.equal(getattr(loaded, name), getattr(plan, name))


def test_columns_that_share_memory_are_saved(tmp_path):
    plan = replace(PLAN, beta=PLAN.beta, delta=PLAN.beta)
    assert Plan.from_pretrained(plan.save_pretrained(tmp_path)) == plan


def test_saving_again_overwrites(tmp_path):
    PLAN.save_pretrained(tmp_path)
    PLAN.top(1).save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == PLAN.top(1)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_missing_plan(tmp_path):
    with pytest.raises(FileFormatError, match=rf"{FILE_NAME}: no such file; expected an austeer-plan file"):
        Plan.from_pretrained(tmp_path)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_damage_gives_an_error_or_the_plan(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    path = PLAN.save_pretrained(folder)
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["cut", "flip", "flip", "overwrite", "insert", "foreign", "swap"])):
        case "cut":
            content = content[: data.draw(st.integers(0, len(content)))]
        case "flip":
            for _ in range(data.draw(st.integers(1, 3))):
                content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "overwrite":
            place, new = data.draw(st.integers(0, len(content))), data.draw(st.binary(max_size=40))
            content[place : place + len(new)] = new
        case "insert":
            place = data.draw(st.integers(0, len(content)))
            content[place:place] = data.draw(st.binary(max_size=9))
        case "foreign":
            content = data.draw(st.binary(max_size=200))
        case "swap":  # two bytes change places, as a sum would not notice
            i, j = (data.draw(st.integers(0, len(content) - 1)) for _ in range(2))
            content[i], content[j] = content[j], content[i]
    path.write_bytes(content)
    try:
        loaded = Plan.from_pretrained(folder)
    except (FileFormatError, PlanError) as error:
        assert str(error)
    else:
        assert loaded == PLAN


def test_every_single_bit_is_guarded(tmp_path):
    path = PLAN.save_pretrained(tmp_path)
    content = path.read_bytes()
    survived = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert Plan.from_pretrained(path) == PLAN
            survived += 1
        except (FileFormatError, PlanError):
            pass
    assert survived < 0.05 * len(content), "bits of padding or white space may flip without harm, others may not"


def header_with(**changes):
    return {**PLAN._header(), "sites": ["attention", "ffn"], **changes}


@pytest.mark.parametrize(
    "header, tensors, error",
    [
        (header_with(operation="add"), {}, PlanError),
        (header_with(operation=["scale"]), {}, PlanError),
        (header_with(sites=["ffn"]), {}, FileFormatError),
        (header_with(sites=None), {}, FileFormatError),
        (header_with(sites=["attention", 5]), {}, PlanError),
        (header_with(extra=1), {}, FileFormatError),
        (header_with(model=None), {}, FileFormatError),
        (header_with(model={**MODEL.to_json(), "widths": [6, 9]}), {}, FileFormatError),
        (header_with(model={**MODEL.to_json(), "layers": -4}), {}, FileFormatError),
        (header_with(model={**MODEL.to_json(), "layers": 1}), {}, PlanError),
        ({}, {}, FileFormatError),
        ([], {}, FileFormatError),
        (header_with(), {"site": torch.tensor([0, 1, 7], dtype=torch.uint8)}, FileFormatError),
        (header_with(), {"site": torch.tensor([[0], [1], [1]], dtype=torch.uint8)}, FileFormatError),
        (header_with(), {"beta": torch.tensor([2.0, 0, 0])}, PlanError),
        (header_with(), {"beta": torch.tensor([0.5, float("nan"), 0])}, PlanError),
        (header_with(), {"layer": torch.tensor([1, 2, 99]).int()}, PlanError),
        (header_with(), {"layer": torch.tensor([1.0, 2, 3])}, PlanError),
        (header_with(), {"index": torch.tensor(3).int()}, PlanError),
        (header_with(), {"operation": torch.zeros(3)}, FileFormatError),
        (header_with(), {"delta": None}, FileFormatError),
    ],
)
def test_well_formed_files_that_hold_no_plan(tmp_path, header, tensors, error):
    # Written by our own writer, checksum and all, so that only the content is wrong.
    columns = {"site": torch.tensor([1, 0, 1], dtype=torch.uint8)}
    columns |= {name: getattr(PLAN, name) for name in ("layer", "index", "beta", "delta")} | tensors
    columns = {name: t for name, t in columns.items() if t is not None}
    files.write(tmp_path / FILE_NAME, "austeer-plan", 1, header, columns)
    with pytest.raises(error):
        Plan.from_pretrained(tmp_path)


def test_a_models_weights_are_no_plan(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / FILE_NAME, metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match=r"found a file of format 'pt', expected 'austeer-plan'"):
        Plan.from_pretrained(tmp_path)


def test_header_is_plain_json(tmp_path):
    content = PLAN.save_pretrained(tmp_path).read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    assert metadata["format"] == "austeer-plan" and metadata["version"] == "1"
    assert json.loads(metadata["header"])["model"]["name"] == MODEL.name
