"""What an engine must not be started with, and what the plugin registers."""

import sys
from types import SimpleNamespace

import pytest

import austeer.vllm
from austeer.plans.serving import PROCESSOR, SCHEDULER, VARIABLE
from austeer.vllm import register
from austeer.vllm.plugin import ARCHITECTURES
from austeer.vllm.sets import ServingError
from austeer.vllm.support import check_engine


def test_nothing_is_registered_without_sets(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would raise
    register()


def test_the_architectures_are_registered_by_name(monkeypatch):
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setenv(VARIABLE, '{"sets": {"kind": {"plan": "a", "alpha": 8}}}')
    register()
    assert registered == {name: f"austeer.vllm.models:{name}" for name in ARCHITECTURES}
    monkeypatch.setenv(VARIABLE, '{"sets": {"kind": {"alpha": 8}}}')
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
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULER),
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
        ({"scheduler_config__scheduler_cls": None}, f"--scheduler-cls {SCHEDULER}"),
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
    with pytest.raises(ServingError, match=r"scheduler.*also with.*--logits-processors"):
        check_engine(engine(scheduler_config__scheduler_cls="other", model_config__logits_processors=[]))


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
