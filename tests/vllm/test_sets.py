"""What AUSTEER_SETS may say."""

import json

import pytest

from austeer.plans.serving import VARIABLE
from austeer.vllm.sets import Limits, ServingError, parse


def test_a_set_is_a_plan_or_several_with_their_strengths_and_a_scope():
    sets = parse(
        json.dumps(
            {
                "sets": {
                    "kind": {"plan": "a", "alpha": 8, "max_alpha": 9, "max_kl": 0.5},
                    "brief": {"plan": "b", "k": 3, "scope": "generation"},
                    "both": {"plans": [{"plan": "a", "alpha": 1}, {"plan": "b", "alpha": 2}], "scope": [0, 4]},
                },
                "max_alpha": 3,
                "slots": 7,
            }
        )
    )
    found = sets.named
    assert list(found) == ["kind", "brief", "both"] and sets.declared.slots == 7 and sets.folder is None
    assert (
        found["kind"].parts[0].alpha == 8.0 and found["kind"].parts[0].k is None and str(found["kind"].scope) == "all"
    )
    assert found["kind"].limits == Limits(9.0, 0.5) and found["brief"].limits == Limits(3.0, None)
    part = found["brief"].parts[0]
    assert (part.alpha, part.k, str(found["brief"].scope)) == (None, 3, "generation")
    assert [part.plan for part in found["both"].parts] == ["a", "b"] and found["both"].scope.stop == 4


def test_the_variable_may_name_a_file_or_a_folder(tmp_path):
    file = tmp_path / "sets.json"
    file.write_text('{"sets": {"kind": {"plan": "a", "alpha": 8}}}')
    assert parse(str(file)) == parse(file.read_text())
    assert parse(str(tmp_path)).folder == tmp_path
    content = {"sets": str(tmp_path), "sites": ["neuron"], "layers": [1, 3], "operations": ["push"], "units": 4}
    sets = parse(json.dumps(content | {"scope": "generation", "max_alpha": 2}))
    declared = sets.declared
    assert (sets.folder, str(sets.scope), sets.limits.alpha) == (tmp_path, "generation", 2.0)
    assert (declared.sites, declared.layers, declared.operations, declared.units) == (("neuron",), (1, 3), ("push",), 4)


def of(text: str) -> str:
    return f'{{"sets": {{"a": {text}}}}}'


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("no/such/file.json", "no/such/file.json"),
        ("x" * 5000, "xxx"),
        ("{", "JSON"),
        ("{}", "sets"),
        ('{"kind": {"plan": "a", "alpha": 8}}', '"sets"'),
        ('{"sets": {}}', "name"),
        ('{"sets": "no/such/folder"}', "no/such/folder"),
        ('{"sets": {"": {"plan": "a", "alpha": 1}}}', "name"),
        ('{"sets": {"a": {"plan": "p"}}, "slot": 3}', "'slot'"),
        ('{"sets": {"a": {"plan": "p"}}, "slots": 0}', "slots.*0"),
        ('{"sets": {"a": {"plan": "p"}}, "units": true}', "units.*True"),
        ('{"sets": {"a": {"plan": "p"}}, "sites": ["mlp"]}', "sites.*mlp"),
        ('{"sets": {"a": {"plan": "p"}}, "operations": "push"}', "operations.*'push'"),
        ('{"sets": {"a": {"plan": "p"}}, "layers": [3, 3]}', r"layers.*\[3, 3\]"),
        (of('"plans/kind"'), "'a'.*'plans/kind'"),
        (of('{"alpha": 1}'), "'a'.*'alpha',.*'plan'"),
        (of('{"plan": "p", "operation": "push"}'), "'a'.*'operation'"),
        (of('{"plan": 3, "alpha": 1}'), "plan.*3"),
        (of('{"plan": "p", "alpha": "8"}'), "alpha.*'8'"),
        (of('{"plan": "p", "alpha": true}'), "alpha.*True"),
        (of('{"plan": "p", "alpha": NaN}'), "alpha.*nan"),
        (of('{"plan": "p", "alpha": 1, "k": 0}'), "k.*0"),
        (of('{"plan": "p", "alpha": 1, "scope": "nowhere"}'), "scope.*'nowhere'.*prompt"),
        (of('{"plan": "p", "max_alpha": -1}'), "max_alpha.*-1"),
        (of('{"plan": "p", "alpha": 3, "max_alpha": 2}'), "alpha.*3.*2"),
        (of('{"plans": []}'), r"plans.*\[\]"),
        (of('{"plans": [{"plan": "p", "alpha": 1}, {"plan": "q", "alpha": 1}], "max_kl": 1}'), "max_kl.*several"),
        ("[" * 100000, "\\[\\[\\["),
        ("{" + "[" * 100000, "JSON"),
        (of('{"plans": [{"plan": "p"}, {"plan": "q", "alpha": 1}]}'), "'p'.*alpha"),
        (of('{"plans": [{"plan": "p", "alpha": 1}], "alpha": 3}'), "'alpha'.*'plans'"),
    ],
)
def test_a_wrong_configuration_is_named(value, match):
    with pytest.raises(ServingError, match=f"{VARIABLE}.*{match}"):
        parse(value)
