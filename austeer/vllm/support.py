"""What an engine must not be started with: each of these would steer wrongly, or share what differs by request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..plans.serving import PROCESSOR, SCHEDULER, VARIABLE
from .sets import ServingError

#: The version that the plugin is tested with.
TESTED = "0.32"


def check_engine(config: Any) -> None:
    """Checks the configuration of an engine.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        ServingError: with what was found and the option that remedies it.
    """
    try:
        problems = [what for wrong, what in _findings(config) if wrong]
    except AttributeError as error:
        raise ServingError(f"found a vLLM whose configuration is not known ({error}); use vLLM {TESTED}") from error
    if problems:
        raise ServingError(f"{VARIABLE} is set, and the engine was started with {'; also with '.join(problems)}")


def _findings(config: Any) -> Iterator[tuple[bool, str]]:
    """Whether each is so, and its words."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    yield (
        _name_of(config.scheduler_config.scheduler_cls).replace(":", ".") != SCHEDULER,
        f"another scheduler than {SCHEDULER}, which gives requests their steering (use --scheduler-cls {SCHEDULER}, or "
        f"scheduler_cls={SCHEDULER!r})",
    )
    yield config.kv_transfer_config is not None, "a KV connector, which shares keys and values likewise"
    yield (
        PROCESSOR not in map(_name_of, model.logits_processors or ()),
        f"no {PROCESSOR} among its logits processors, which refuses unknown sets (use --logits-processors {PROCESSOR}, "
        f"or logits_processors=[{PROCESSOR!r}])",
    )
    yield config.lora_config is not None, "LoRA, beside which this plugin is not tested"
    yield config.speculative_config is not None, "speculative decoding, with which this plugin is not tested"
    yield model.runner_type != "generate", f"a runner that does not generate ({model.runner_type})"
    yield parallel.use_ubatching, "dual batch overlap, which splits a batch"
    yield parallel.prefill_context_parallel_size > 1, "context parallelism of prompts, which splits a batch"
    yield cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill, which leaves tokens out in some layers"
    yield not isinstance(config.additional_config, dict), "an additional_config that is no dictionary"
    if config.use_v2_model_runner:
        return
    from vllm.platforms import current_platform

    mode = config.compilation_config.mode
    yield (
        not current_platform.is_cpu(),
        "model runner V1, which is steered on CPUs only (use VLLM_USE_V2_MODEL_RUNNER=1)",
    )
    yield model.enable_prompt_embeds, "--enable-prompt-embeds, which needs model runner V2"
    yield mode is not None and mode.name == "STOCK_TORCH_COMPILE", "the compilation mode STOCK_TORCH_COMPILE"


def _name_of(found: Any) -> str:
    """As the options name a class or a function: "module:name"."""
    return str(found) if found is None or isinstance(found, str) else f"{found.__module__}:{found.__qualname__}"
