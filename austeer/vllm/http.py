"""An ASGI middleware for ``--middleware``: real HTTP 400s, also for streams, and for what vLLM leaves out on its way.

vLLM turns ``true`` into 1, and does not pass ``vllm_xargs`` on in a beam search; a stream that is refused later has
begun with a 200. So the body is looked at as it comes, and refused as vLLM's own errors are.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from ..plans.serving import KEY
from .admission import RequestError, checked
from .sets import short

#: Bytes of which JSON without our key in plain letters may still spell it: escapes, or two bytes a letter.
ESCAPES = frozenset(b"\\\0")

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Refusals:
    """Refuses requests that ask for steering that they cannot have; all others pass as they are."""

    def __init__(self, app: Callable):
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Callable) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        try:
            check_body(body)
        except RequestError as error:
            return await _refuse(send, error)

        async def again() -> dict[str, Any]:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)


def check_body(body: bytes) -> None:
    """Raises RequestError where a request's JSON asks for steering that it cannot have."""
    if KEY.encode() not in body and not set(body) & ESCAPES:
        return
    try:
        content = json.loads(body)
    except ValueError:
        return  # the server says so in its own words
    if not isinstance(content, dict):
        return
    if outside := [key for key in content if key.startswith(KEY)]:
        raise RequestError(f"found {outside[0]!r} beside the request's own fields, expected it in 'vllm_xargs'")
    extra = content.get("vllm_xargs")
    if not isinstance(extra, dict) or not any(key.startswith(KEY) for key in extra):
        return
    checked(extra)
    if content.get("use_beam_search"):
        raise RequestError(f"found {short(extra)} in a beam search, which is not steered; expected another sampling")


async def _refuse(send: Callable, error: RequestError) -> None:
    found = {"message": str(error), "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    body = json.dumps({"error": found}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
