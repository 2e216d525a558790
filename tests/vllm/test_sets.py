"""The vLLM plugin's configuration: steering sets by name, their tables, and what an engine must not be started with."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import austeer.vllm
from austeer.errors import AusteerError
from austeer.models.sites import Fingerprint
from austeer.plans.plan import Plan
from austeer.plans.serving import PROCESSOR, VARIABLE
from austeer.vllm import register
from austeer.vllm.plugin import ARCHITECTURES
from austeer.vllm.sets import ServingError, load, parse, tables
from austeer.vllm.support import check_engine

WIDTHS = {"attention": 8, "ffn": 6, "layer": 6}


def plan(operation, *units):
    """A plan of (site, layer, index, beta, delta)."""
    site, *columns = zip(*units)
    layer, index, beta, delta = map(torch.tensor, columns)
    fingerprint = Fingerprint("llama", 3, WIDTHS, "a model", None)
    return Plan(tuple(site), layer.int(), index.int(), beta.float(), delta.float(), operation, fingerprint, pairs=4)


SHIFT = plan("shift", ("attention", 1, 3, 1.0, 0.5), ("layer", 2, 0, -1.0, -2.0))
PUSH = plan("push", ("attention", 1, 3, 0.5, 9.0), ("attention", 1, 4, -1.0, 9.0))
SCALE = plan("scale", ("attention", 0, 7, 0.25, 9.0))


def test_a_set_is_a_plan_or_several_with_their_strengths_and_a_scope():
    sets = parse(
        json.dumps(
            {
                "kind": {"plan": "a", "alpha": 8},
                "brief": {"plan": "b", "alpha": -0.5, "k": 3, "scope": "generation"},
                "both": {"plans": [{"plan": "a", "alpha": 1}, {"plan": "b", "alpha": 2}], "scope": [0, 4]},
            }
        )
    )
    assert list(sets) == ["kind", "brief", "both"]
    assert sets["kind"].parts[0].alpha == 8.0 and sets["kind"].parts[0].k is None and str(sets["kind"].scope) == "all"
    assert sets["brief"].parts[0].k == 3 and str(sets["brief"].scope) == "generation"
    assert [part.plan for part in sets["both"].parts] == ["a", "b"] and sets["both"].scope.stop == 4


def test_the_variable_may_name_a_file(tmp_path):
    file = tmp_path / "sets.json"
    file.write_text('{"kind": {"plan": "a", "alpha": 8}}')
    assert parse(str(file)) == parse(file.read_text())


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("no/such/file.json", "no/such/file.json"),
        ("{", "JSON"),
        ("{}", "name"),
        ('{"": {"plan": "a", "alpha": 1}}', "name"),
        ('{"a": "plans/kind"}', "'a'.*'plans/kind'"),
        ('{"a": {"plan": "p"}}', "'a'.*'plan',.*'plan', 'alpha'"),
        ('{"a": {"plan": "p", "alpha": 1, "operation": "push"}}', "'a'.*'operation'"),
        ('{"a": {"plan": 3, "alpha": 1}}', "plan.*3"),
        ('{"a": {"plan": "p", "alpha": "8"}}', "alpha.*'8'"),
        ('{"a": {"plan": "p", "alpha": true}}', "alpha.*True"),
        ('{"a": {"plan": "p", "alpha": NaN}}', "alpha.*nan"),
        ('{"a": {"plan": "p", "alpha": 1, "k": 0}}', "k.*0"),
        ('{"a": {"plan": "p", "alpha": 1, "scope": "answer"}}', "scope.*'answer'.*prompt"),
        ('{"a": {"plans": []}}', r"plans.*\[\]"),
        ('{"a": {"plans": [{"plan": "p", "alpha": 1}], "alpha": 3}}', "'alpha'.*'plans'"),
    ],
)
def test_a_wrong_configuration_is_named(value, match):
    with pytest.raises(ServingError, match=f"{VARIABLE}.*{match}"):
        parse(value)


def test_plans_are_read_and_cut(tmp_path):
    SHIFT.save_pretrained(tmp_path / "plan")
    whole = {"plan": str(tmp_path / "plan"), "alpha": 2}
    loaded = load(parse(json.dumps({"one": whole | {"k": 1}, "two": whole})))
    assert loaded == {"one": [(SHIFT.top(1), 2.0)], "two": [(SHIFT, 2.0)]}


@pytest.mark.parametrize(("change", "match"), [({"plan": "/nothing/here"}, "/nothing/here"), ({"k": 3}, "k.*3")])
def test_a_plan_that_cannot_be_had_is_named_with_its_set(tmp_path, change, match):
    SHIFT.save_pretrained(tmp_path / "plan")
    entry = {"plan": str(tmp_path / "plan"), "alpha": 2} | change
    with pytest.raises(AusteerError, match=f"'kind'.*{match}"):
        load(parse(json.dumps({"kind": entry})))


def test_the_tables_have_a_list_for_each_set():
    found = tables([[(SHIFT, 2.0)], [(PUSH, 3.0), (SCALE, 4.0)]])
    assert list(found) == [("attention", 0), ("attention", 1), ("layer", 2)]
    push, shift = found["attention", 1]  # only what some set has there
    assert push.magnitude and push.index.tolist() == [[-1, -1], [3, 4]] and push.gamma[1].tolist() == [1.5, -3.0]
    assert not shift.magnitude and shift.index.tolist() == [[3], [-1]] and shift.shift[0].tolist() == [1.0]
    (scale,), (shift,) = found["attention", 0], found["layer", 2]
    assert scale.index.tolist() == [[-1], [7]] and scale.gamma[1].tolist() == [1.0]
    assert shift.index.tolist() == [[0], [-1]] and shift.shift[0].tolist() == [-4.0]


def test_the_tables_grow_with_the_longest_list():
    plans = [
        plan("shift", *(("attention", 1, index, 1.0, 1.0) for index in chosen)) for chosen in ([3], [5, 1], [0, 7])
    ]
    (lists,) = tables([[(p, 1.0)] for p in plans])["attention", 1]
    assert lists.index.tolist() == [[3, -1], [1, 5], [0, 7]]


def test_plans_that_meet_at_an_au_add_up():
    push, shift = tables([[(PUSH, 3.0), (PUSH, -1.0), (SHIFT, 1.0)]])["attention", 1]
    assert push.gamma.tolist() == [[1.0, -2.0]] and shift.shift.tolist() == [[0.5]]


def test_push_where_a_scale_takes_all_away_is_refused():
    scale = plan("scale", ("attention", 1, 4, 0.25, 9.0))
    for alpha in (4.0, -3.7):
        tables([[(scale, alpha), (PUSH, 1.0)]])
    for alpha, found in ((-4.0, "-1"), (-3.9, r"-0\.975")):
        with pytest.raises(ServingError, match=rf"number 2: found push and a scale of {found} at AU 4"):
            tables([[(SHIFT, 1.0)], [(scale, alpha), (PUSH, 1.0)]])


def test_nothing_is_registered_without_sets(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would raise
    register()


def test_the_architectures_are_registered_by_name(monkeypatch):
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setenv(VARIABLE, '{"kind": {"plan": "a", "alpha": 8}}')
    register()
    assert registered == {name: f"austeer.vllm.models:{name}" for name in ARCHITECTURES}
    monkeypatch.setenv(VARIABLE, '{"kind": {"plan": "a"}}')
    registered.clear()
    with pytest.raises(ServingError, match="'kind'"):
        register()
    assert not registered


def test_an_unknown_architecture_is_no_attribute():
    from austeer.vllm import models

    assert models.Steered.steered_by == austeer.plans.serving.KEY
    with pytest.raises(AttributeError, match="Unknown"):
        _ = models.UnknownForCausalLM


def engine(**changes):
    """A configuration that can be steered, like vLLM's, but for ``changes`` ("section.name" -> value)."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(logits_processors=[PROCESSOR], runner_type="generate", enable_prompt_embeds=False),
        cache_config=SimpleNamespace(enable_prefix_caching=False, kv_sharing_fast_prefill=False),
        parallel_config=SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
        compilation_config=SimpleNamespace(mode=None),
        kv_transfer_config=None,
        lora_config=None,
        speculative_config=None,
        additional_config={},
        use_v2_model_runner=True,
    )
    for path, value in changes.items():
        *sections, name = path.split("__")
        setattr(getattr(config, sections[0]) if sections else config, name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cache_config__enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv-sharing"),
        ({"model_config__logits_processors": None}, f"--logits-processors {PROCESSOR}"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": object()}, "speculative"),
        ({"parallel_config__use_ubatching": True}, "batch overlap"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"additional_config": "something"}, "additional_config"),
    ],
)
def test_an_engine_that_would_steer_wrongly_is_refused(changes, match):
    check_engine(engine())
    with pytest.raises(ServingError, match=match):
        check_engine(engine(**changes))


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ServingError, match=r"prefix caching.*also with.*--logits-processors"):
        check_engine(engine(cache_config__enable_prefix_caching=True, model_config__logits_processors=[]))


@pytest.mark.parametrize(
    ("cpu", "changes", "match"),
    [
        (False, {}, "VLLM_USE_V2_MODEL_RUNNER=1"),
        (True, {"model_config__enable_prompt_embeds": True}, "prompt-embeds"),
        (True, {"compilation_config__mode": SimpleNamespace(name="STOCK_TORCH_COMPILE")}, "STOCK_TORCH_COMPILE"),
    ],
)
def test_model_runner_v1_is_for_cpus(monkeypatch, cpu, changes, match):
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: cpu))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=platforms))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    if cpu:
        check_engine(engine(use_v2_model_runner=False))
    with pytest.raises(ServingError, match=match):
        check_engine(engine(use_v2_model_runner=False, **changes))


def test_a_configuration_of_another_vllm_is_named():
    config = engine()
    del config.cache_config.kv_sharing_fast_prefill
    with pytest.raises(ServingError, match=r"kv_sharing_fast_prefill.*use vLLM"):
        check_engine(config)
