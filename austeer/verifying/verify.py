"""verify(): whether a server or a model does what was recorded of a plan."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..forward.tokens import check_vocabulary, encode
from ..models.structure import floating_dtype, input_device, is_steered, vocabulary_size
from ..plans.plan import Plan
from ..plans.replay import Replay
from ..plans.serving import ALPHA, KEY
from ..steering.steer import steer
from ..utils.environment import versions_of
from .comparison import Written, of_answer
from .server import Server, VerifyError, printable
from .sources import Source, source_of
from .verdict import CACHE_UNKNOWN, CANNOT_TELL, SOMETHING_ELSE, STALE, STALE_REASON, verdict_on
from .verification import Verification
from .writing import written

_LOCAL = ("torch", "transformers")


def verify(
    plan: Plan | str | Path,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    adapter: str | Path | None = None,
    url: str | None = None,
    base: str | None = None,
    lora: str | None = None,
    steering_set: str | None = None,
    body: Mapping[str, Any] | None = None,
) -> Verification:
    """Whether a server, or a model here, does what a plan's replay says that the plan does.

    The replay's prompts are continued greedily, without the plan and with it, and the log-probabilities compared with
    those of the replay: of the plan, of no plan, and of common faults (another layer, sign, strength, other tokens).

    Example:
        >>> plan = austeer.record_replay(model, tokenizer, plan, alpha=8)
        >>> found = austeer.verify(plan, model)
        >>> found.verdict, found.applied
        ('applied', True)

    ``print(found)`` shows a report. Of a server: ``austeer.verify("adapters/kind", url="http://localhost:8000/v1",
    lora="kind")``.

    Args:
        plan: a plan with a replay, its folder or Hub id; or what was exported of one that has a replay: an adapter's
            folder, a folded checkpoint's, or a file for llama.cpp.
        model: a model to run here: plain for a plan, which ``steer`` puts on it, and for an adapter, which PEFT does;
            or the folded checkpoint.
        tokenizer: the model's, to see whether it is the one of the replay.
        adapter: with ``model``, the folder of the adapter that PEFT is to run in place of ``steer``; by default
            ``plan``, if it is one.
        url: instead of ``model``, an OpenAI-compatible server: http://HOST:PORT/v1. With none of the three that follow
            all requests are alike: of a server whose every request is steered.
        base: the name of the server's own model; by default the first that it lists.
        lora: what the server calls the adapter, which is then the requests' model.
        steering_set: what austeer's plugin in vLLM calls the plan.
        body: what else the steered requests have, such as ``{"lora": [{"id": 0, "scale": 1}]}``.

    Raises:
        VerifyError: no replay, or one of another plan; no server, or one that refuses or gives no log-probabilities;
            arguments that do not go together.
        PlanError: a damaged replay, or a plan for another model. PairsError: another tokenizer.
        SteeringError: the model is steered now.
    """
    source = source_of(plan)
    if (model is None) == (url is None):
        found = "neither" if model is None else "both"
        raise VerifyError(f"found {found} of model and url, expected one of them: what is to be verified")
    if url is None:
        if not isinstance(model, nn.Module):
            raise VerifyError(f"model: found {type(model).__name__}, expected a Transformers model that is loaded")
        if {base, lora, steering_set, body} != {None}:
            raise VerifyError("base, lora, steering_set and body: found one beside a model, expected url with them")
        return _of_model(source, model, tokenizer, Path(adapter) if adapter is not None else source.adapter)
    if adapter is not None or tokenizer is not None:
        raise VerifyError("adapter, tokenizer: found one beside url, expected a model with them")
    return _of_server(source.replay, Server(url, base), _request(source.replay, lora, steering_set, body))


def _request(
    replay: Replay, lora: str | None, steering_set: str | None, body: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a steered request has that an unsteered one has not."""
    request: dict[str, Any] = {} if lora is None else {"model": lora}
    if steering_set is not None:
        # The set may declare another strength than the replay's; of one for each site it has to be the set's own.
        strength = {} if isinstance(replay.alpha, dict) else {ALPHA: replay.alpha}
        request["vllm_xargs"] = {KEY: steering_set, **strength}
    return request | dict(body or {})


def _of_server(replay: Replay, server: Server, request: dict[str, Any]) -> Verification:
    def once(cached: bool) -> Verification:
        unsteered = server.written(replay, {}, cached) if request else None
        steered = server.written(replay, request, cached)
        asked = (
            ", ".join(f"{key} {_shown(value)}" for key, value in request.items())
            or f"model {printable(server.model, 60)}"
        )
        return verdict_on(replay, steered, unsteered, f"{server.engine()}; {asked}", _versions())

    found = once(cached=True)
    if found.applied or not request:
        return found
    try:
        fresh = once(cached=False)
    except VerifyError:  # a server that knows its own options alone, or that has gone
        return replace(found, reason="; ".join(filter(None, [found.reason, CACHE_UNKNOWN])))
    if fresh.applied:
        return replace(found, verdict=STALE, reason=STALE_REASON)
    return fresh if found.verdict in (CANNOT_TELL, SOMETHING_ELSE) else found


def _of_model(source: Source, model: nn.Module, tokenizer: Any, adapter: Path | None) -> Verification:
    if is_steered(model):
        raise VerifyError("model: found one that is steered now, expected a plain one; verify outside the with block")
    source.expect_local()
    ids = _ids(source.replay, model, tokenizer)
    device = f"{floating_dtype(model)}".removeprefix("torch.") + f" on {input_device(model)}"
    if source.folded and adapter is None:
        steered = _numbers(model, ids)
        return verdict_on(
            source.replay, steered, None, f"Transformers, folded checkpoint, {device}", _versions(*_LOCAL)
        )
    unsteered = _numbers(model, ids)
    with _steered(source, model) if adapter is None else _peft(model, adapter) as runs:
        steered = _numbers(runs, ids)
    way = "austeer.steer" if adapter is None else f"PEFT, adapter {adapter}"
    more = ("peft",) if adapter is not None else ()
    versions = _versions(*_LOCAL, *more)
    return verdict_on(source.replay, steered, unsteered, f"Transformers, {way}, {device}", versions)


@contextmanager
def _steered(source: Source, model: nn.Module) -> Iterator[nn.Module]:
    replay = source.replay
    assert source.plan is not None  # all else has an adapter, or is folded
    with steer(model, source.plan, replay.alpha, scope=replay.scope):
        yield model


@contextmanager
def _peft(model: nn.Module, adapter: Path) -> Iterator[nn.Module]:
    """The model with an adapter; afterwards as it was, also where PEFT gives up half-way."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise VerifyError("adapter: PEFT is not installed, which runs it here: pip install 'austeer[peft]'") from error
    with _left_as_it_was(model):
        try:
            wrapped = PeftModel.from_pretrained(model, adapter).eval()
        except Exception as error:  # PEFT's, safetensors' or the hub's, of a file of someone else's: there are many
            raise VerifyError(
                f"adapter: {adapter} could not be loaded on this model ({printable(error)}); export it anew"
            ) from error
        yield wrapped


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has the attributes, parts and hooks that it had, and each parameter its ``requires_grad``.

    PEFT's own ``unload`` is there only once an adapter is loaded, and leaves a model that is frozen.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    # Parts, hooks and buffers are in dictionaries, which stay the same objects: only what is in them changes.
    before += [(value, dict(value)) for _, held in before for value in held.values() if isinstance(value, dict)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for held, content in before:
            held.clear()
            held.update(content)
        for parameter, needed in trained:
            parameter.requires_grad = needed


def _ids(replay: Replay, model: nn.Module, tokenizer: Any) -> list[tuple[int, ...]]:
    """The prompts' token ids; raises where the tokenizer makes others, or the model has fewer."""
    ids = [prompt.ids for prompt in replay.prompts]
    check_vocabulary(vocabulary_size(model), ids)
    if tokenizer is not None:
        for prompt, found in zip(replay.prompts, encode(tokenizer, [prompt.text for prompt in replay.prompts])):
            if tuple(found) != prompt.ids:
                raise VerifyError(
                    f"tokenizer: found the tokens {found[:12]} for {prompt.text!r}, expected {list(prompt.ids[:12])}; "
                    "it is not the one that the replay was recorded with"
                )
    return ids


def _numbers(model: nn.Module, ids: list[tuple[int, ...]]) -> list[Written]:
    found = written(model, ids)
    if found is None:
        raise VerifyError("model: found log-probabilities that are no numbers, expected finite ones")
    return [of_answer(answer) for answer in found]


def _versions(*more: str) -> dict[str, str]:
    found = versions_of(("austeer", *more))
    return {**{name: version for name, version in found.items() if version}, "Python": platform.python_version()}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
