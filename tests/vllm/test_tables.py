"""The AUs of a row of the steering tables, and what an engine is made for."""

import json
from dataclasses import replace

import pytest
import torch

from austeer.errors import PlanError
from austeer.vllm.catalog import Catalog
from austeer.vllm.sets import ServingError, parse
from austeer.vllm.tables import Structure, lists_of, structure_of
from made_plans import MODEL, PUSH, SCALE, SHIFT, plan


def values(lists):
    return {place: [t.tolist() for t in units] for place, units in lists.items()}


def test_a_row_has_its_aus_by_place():
    assert values(lists_of([(SHIFT, 2.0)])) == {
        ("attention", 1, "linear"): [[3], [0.0], [1.0]],
        ("layer", 2, "linear"): [[0], [0.0], [-4.0]],
    }
    found = values(lists_of([(PUSH, 3.0), (SCALE, 4.0)]))
    assert found == {
        ("attention", 0, "linear"): [[7], [1.0], [0.0]],
        ("attention", 1, "push"): [[3, 4], [1.5, -3.0], [0.0, 0.0]],
    }


def test_plans_that_meet_at_an_au_add_up():
    found = values(lists_of([(PUSH, 3.0), (PUSH, -1.0), (SHIFT, 1.0)]))
    assert found["attention", 1, "push"][1] == [1.0, -2.0] and found["attention", 1, "linear"][2] == [0.5]


def test_push_where_a_scale_takes_all_away_is_refused():
    scale = plan("scale", ("attention", 1, 4, 0.25, 9.0))
    for alpha in (4.0, -3.7):
        lists_of([(scale, alpha), (PUSH, 1.0)])
    for alpha, found in ((-4.0, "-1"), (-3.9, r"-0\.975")):
        with pytest.raises(ServingError, match=rf"push and a scale of {found} at AU 4"):
            lists_of([(scale, alpha), (PUSH, 1.0)])


@pytest.fixture
def made(tmp_path):
    """``made(**changes)``: the structure for two named sets."""
    for name, one in (("shift", SHIFT), ("push", PUSH)):
        one.save_pretrained(tmp_path / name)
    sets = {name: {"plan": str(tmp_path / name), "alpha": 1} for name in ("shift", "push")}

    def structure(model=MODEL, sets=sets, **changes):
        return structure_of(Catalog(parse(json.dumps({"sets": sets} | changes))), model, 5)

    return structure


def test_named_sets_need_room_for_their_own(made):
    found = made()
    assert found.slots == 5 and dict(found.room) == {
        ("attention", 1, "push"): 2,
        ("attention", 1, "linear"): 1,
        ("layer", 2, "linear"): 1,
    }
    assert Structure.from_json(json.loads(json.dumps(found.to_json()))) == found
    more = made(units=4, layers=[1, 2], slots=9)
    assert more.slots == 9 and more.room["attention", 1, "push"] == 4 and more.room["layer", 2, "linear"] == 1
    assert {layer for _, layer, _ in more.room} == {1, 2}


def test_a_folder_has_room_for_what_is_declared(made, tmp_path):
    folder = str(tmp_path / "sets")
    (tmp_path / "sets").mkdir()
    found = made(sets=folder)
    assert {(site, kind) for site, _, kind in found.room} == {(site, "linear") for site in MODEL.widths}
    assert {layer for _, layer, _ in found.room} == {0, 1, 2} and found.room["ffn", 0, "linear"] == 6
    found = made(sets=folder, sites=["layer"], layers=[0, 2], operations=["push", "shift"], units=3)
    assert dict(found.room) == {("layer", layer, kind): 3 for layer in (0, 1) for kind in ("push", "linear")}
    for change, match in (({"sites": ["neuron"]}, "'neuron'.*attention"), ({"layers": [1, 4]}, "layers.*0 to 2")):
        with pytest.raises(ServingError, match=match):
            made(sets=folder, **change)


def test_the_digest_tells_structures_apart(made):
    others = [made(), made(slots=6), made(units=2), made(sites=["ffn"]), made(layers=[0, 1]), made(operations=["push"])]
    assert len({found.digest for found in others}) == len(others) and made().digest == made().digest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "qwen2"}, "qwen2, 3 layers.*llama, 3 layers|llama, 3 layers.*qwen2, 3 layers"),
        ({"layers": 4}, "4 layers"),
        ({"widths": MODEL.widths | {"layer": 12}}, "'layer': 12"),
    ],
)
def test_a_plan_for_another_model_is_refused(made, change, match):
    with pytest.raises(PlanError, match=f"'shift'.*({match})"):
        made(model=replace(MODEL, **change))
    with pytest.raises(PlanError, match=match):
        made().row([(replace(SHIFT, model=replace(MODEL, **change)), 1.0)])


@pytest.mark.parametrize(
    ("one", "match"),
    [
        (plan("shift", ("ffn", 0, 1, 1.0, 1.0)), "'ffn' of layer 0.*declare"),
        (plan("push", ("layer", 2, 1, 1.0, 1.0)), "push at site 'layer'.*declare"),
        (plan("scale", *(("attention", 1, i, 1.0, 1.0) for i in range(3))), 'found 3 AUs.*most 1.*"units": 3'),
    ],
)
def test_what_there_is_no_room_for_is_refused(made, one, match):
    with pytest.raises(ServingError, match=match):
        made().row([(one, 1.0)])


def test_a_strength_that_no_float32_can_be_is_refused(made):
    with pytest.raises(ServingError, match=r"alpha.*smaller"):
        made().row([(SHIFT, 2.9e38)])


def test_a_row_counts_its_places_as_the_structure_does(made):
    found = made().row([(SHIFT, 2.0), (PUSH, 1.0)])
    places = made().places
    assert {places[number] for number, _ in found.by_place()} == set(made().room)
    assert torch.equal(found.place, found.place.sort().values)


def test_a_direction_is_one_list_of_length_one():
    ablate = plan("ablate", ("ffn", 1, 4, 1.0, 3.0), ("ffn", 1, 2, 1.0, 4.0))
    index, direction, strength = lists_of([(ablate, 0.5)])["ffn", 1, "direction"]
    assert index.tolist() == [2, 4] and direction.tolist() == pytest.approx([0.8, 0.6])
    assert strength.tolist() == [0.5, 0.5]
    with pytest.raises(ServingError, match="2 plans of 'ablate' at site 'ffn' of layer 1"):
        lists_of([(ablate, 0.5), (ablate, 1.0)])
