"""vLLM's scheduler with steering: each request gets its row of the tables, and its own place in the prefix cache.

What a request asks for is looked up once, here, where every client passes and where all processes of the engine hear
the same. Keys and values of a token depend on the steering of it and of those before it. So the blocks of a request
from its first steered token on have the steering in their hashes, and those before are shared with all.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import AusteerError
from ..plans.serving import KEY
from ..steering.answer_scope import answer_scope
from ..steering.scope import Scope, parse_scope
from .admission import ROW, RequestError, Steering, steering_of
from .catalog import catalog, entries
from .models import structure_of_engine
from .rows import Rows
from .sets import AnswerText, ServingError
from .shared import own_folder, write_structure
from .slots import RowOf, judgements
from .support import TESTED, check_engine

_logger = logging.getLogger("vllm.austeer")


class SteeringScheduler:
    """Mixed into vLLM's scheduler class."""

    requests: dict[str, Any]
    hash_block_size: int
    vllm_config: Any

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any):
        check_engine(vllm_config)
        super().__init__(*args, vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self._steering_catalog = catalog()
        self._structure = structure_of_engine(vllm_config)
        write_structure(self._structure)
        self._rows = Rows(self._structure.slots, own_folder())
        # What each request in the engine holds: the digest of its row and the place of its probe's decision.
        self._held: dict[str, tuple[str, int | None]] = {}
        self._judgements = list(range(judgements(vllm_config)))[::-1]
        self._waiting_for_a_row: deque[tuple[Any, Steering]] = deque()
        self._passed = 0  # how many requests have passed those that wait
        self._refused: list[Any] = []
        self._answers: dict[AnswerText, Scope] = {}
        for entry in entries(self._steering_catalog).values() if self._steering_catalog else ():
            self._scope_of(entry.spec.scope)  # so that a marker that cannot be is refused now

    def add_request(self, request: Any) -> None:
        params = request.sampling_params
        if params is None:
            return super().add_request(request)  # type: ignore[misc]
        if request.request_id in self.requests:
            return self._go_on(request)
        try:
            steering = steering_of(params.extra_args, self._steering_catalog)
            if steering is not None and request.resumable:
                raise RequestError(f"{KEY}: found it in a session of streamed input, which is not steered")
        except Exception as error:
            return self._refuse(request, error)
        if steering is None:
            return super().add_request(request)  # type: ignore[misc]
        # Who needs a row that is there passes those that wait for one, but not for ever.
        waiting = bool(self._waiting_for_a_row)
        if (waiting and self._passed >= self._structure.slots) or not self._enter(request, steering):
            self._waiting_for_a_row.append((request, steering))
        elif waiting:
            self._passed += 1

    def _go_on(self, request: Any) -> None:
        """A piece of a session of streamed input, whose parameters may be new."""
        if any(isinstance(key, str) and key.startswith(KEY) for key in request.sampling_params.extra_args or {}):
            from vllm.v1.request import RequestStatus

            super().finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)  # type: ignore[misc]
            return self._refuse(request, RequestError(f"{KEY}: found it in a session of streamed input"))
        return super().add_request(request)  # type: ignore[misc]

    def _refuse(self, request: Any, error: Exception) -> None:
        """Nothing may be raised, which would end the engine. The front end refuses what it can see."""
        unforeseen = not isinstance(error, AusteerError)
        _logger.error("austeer: request %s is refused: %s", request.request_id, error, exc_info=unforeseen)
        self._refused.append(request)

    def _enter(self, request: Any, steering: Steering) -> bool:
        """Lets a request in, or refuses it; False if it has to wait."""
        try:
            if not self._admit(request, steering):
                return False
        except Exception as error:
            self._release(request)
            self._refuse(request, error)
        else:
            super().add_request(request)  # type: ignore[misc]
        return True

    def _admit(self, request: Any, steering: Steering) -> bool:
        """Gives a request its row, and a place for its probe's decision; False if there is none."""
        scope, prompt = self._scope_of(steering.scope), request.num_prompt_tokens
        if steering.probe is not None and not self._judgements:
            return False
        row = self._rows.take(steering.digest, lambda: self._structure.row(steering.parts, steering.probe))
        if row is None:
            return False
        judgement = None if steering.probe is None else self._judgements.pop()
        self._held[request.request_id] = steering.digest, judgement
        start, stop = map(int, scope.interval(prompt, 0, 0))
        file = str(self._rows.file(steering.digest))
        row_of = RowOf(row, steering.digest, file, start, stop, prompt, scope.answer, judgement)
        # A request may share its parameters with others of one call.
        request.sampling_params = copy.copy(request.sampling_params)
        request.sampling_params.extra_args = {**request.sampling_params.extra_args, ROW: row_of}
        if request._block_hasher is not None:
            # What a probe decides is no part of a hash: what is generated after it is shared with nobody.
            salt = steering.salt if judgement is None else uuid.uuid4().hex
            request._block_hasher = salted(request._block_hasher, salt, start, stop, self.hash_block_size)
            request.block_hashes.clear()
            request.update_block_hashes()
        return True

    def _release(self, request: Any) -> None:
        """Takes back what a request holds, if anything."""
        held = self._held.pop(request.request_id, None)
        if held is not None:
            digest, judgement = held
            self._rows.give_back(digest)
            if judgement is not None:
                self._judgements.append(judgement)

    def _scope_of(self, scope: Scope | AnswerText) -> Scope:
        """The scope with an answer's markers as tokens.

        Raises:
            SteeringError: the tokenizer makes none of one.
        """
        if isinstance(scope, Scope):
            return scope
        if scope not in self._answers:
            answer = answer_scope(tokenizer_of(self.vllm_config.model_config), scope.start, scope.pauses)
            self._answers[scope] = parse_scope(answer)
        return self._answers[scope]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        held = request.request_id in self._held
        self._release(request)
        if held and self._waiting_for_a_row:
            first = self._waiting_for_a_row[0]
            still = [pair for pair in self._waiting_for_a_row if not self._enter(*pair)]
            self._waiting_for_a_row = deque(still)
            if not still or still[0] is not first:
                self._passed = 0
        return freed

    def has_requests(self) -> bool:
        return bool(self._refused) or super().has_requests()  # type: ignore[misc]

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        for request in self._refused:
            _end_with_an_error(request, outputs)
        self._refused = []
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> Any:
        ids = {request_ids} if isinstance(request_ids, str) else None if request_ids is None else set(request_ids)

        def stays(request: Any) -> bool:
            return ids is not None and request.request_id not in ids

        dropped = [request for request, _ in self._waiting_for_a_row if not stays(request)]
        dropped += [request for request in self._refused if not stays(request)]
        self._waiting_for_a_row = deque(pair for pair in self._waiting_for_a_row if stays(pair[0]))
        self._refused = [request for request in self._refused if stays(request)]
        for request in dropped:  # they are no requests of vLLM's yet, and their clients are to hear of it
            request.status = finished_status
        return [*(super().finish_requests(ids, finished_status) or ()), *dropped]  # type: ignore[misc]

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()  # type: ignore[misc]
        return running, waiting + len(self._waiting_for_a_row)


def tokenizer_of(config: Any) -> Any:
    """The tokenizer of a vLLM ``ModelConfig``.

    Raises:
        ServingError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            config.tokenizer, revision=config.tokenizer_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ServingError(f"scope answer: found no tokenizer at {config.tokenizer!r} ({error})") from error


def _end_with_an_error(request: Any, outputs: dict[int, Any]) -> None:
    """Tells the client of a request that was never run that it has ended."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    found = outputs.setdefault(request.client_index, EngineCoreOutputs())
    found.outputs.append(EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR))
    found.finished_requests = {*(found.finished_requests or ()), request.request_id}


def salted(hasher: Callable[[Any], list], salt: str, start: int, stop: int, size: int) -> Callable[[Any], list]:
    """A request's function that makes the hashes of its new full blocks, with the steering in them.

    A block's hash has what is steered up to its end: so blocks before the first steered token are everybody's, and
    others are shared where the same plans, as strong, steered the same tokens.

    Args:
        start, stop: the positions that are steered, half open. size: tokens of a block.
    """
    plain: list = []  # vLLM's own, of which each is made of the one before

    def with_salt(request: Any) -> list:
        plain.extend(hasher(_WithHashes(request, plain)))
        new = []
        for number in range(len(request.block_hashes), len(plain)):
            found, end = plain[number], (number + 1) * size
            if end > start:
                text = f"{salt} {start} {min(stop, end)}".encode()
                found = hashlib.sha256(found + text).digest()[: len(found)]
            new.append(found)
        return new

    return with_salt


class _WithHashes:
    """A request with other block hashes, to be read."""

    def __init__(self, request: Any, block_hashes: list):
        self._request, self.block_hashes = request, block_hashes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def check_scheduler(scheduler: type, request: type) -> None:
    """Raises ServingError where vLLM's classes are not as this module knows them, which could steer wrongly."""
    methods = ["add_request", "finish_requests", "_free_request", "get_request_counts", "has_requests"]
    methods += ["update_from_output"]
    missing = [f"Scheduler.{name}" for name in methods if not hasattr(scheduler, name)]
    made = [*scheduler.__init__.__code__.co_names, *request.__init__.__code__.co_names]  # type: ignore[misc]
    names = ("hash_block_size", "requests", "_block_hasher", "block_hashes", "num_prompt_tokens", "client_index")
    missing += [name for name in (*names, "resumable", "sampling_params") if name not in made]
    missing += ["Request.update_block_hashes"] if not hasattr(request, "update_block_hashes") else []
    if missing:
        raise ServingError(f"found a vLLM whose scheduler has no {', '.join(missing)}; use vLLM {TESTED}")


def steering_scheduler(*args: Any, vllm_config: Any, **kwargs: Any) -> Any:
    """For ``--scheduler-cls``: vLLM's scheduler for its configuration, with steering."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    check_scheduler(Scheduler, Request)
    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return type(f"Steering{base.__name__}", (SteeringScheduler, base), {})(*args, vllm_config=vllm_config, **kwargs)
