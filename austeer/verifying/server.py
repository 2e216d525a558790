"""An OpenAI-compatible server: what it writes after a replay's prompts, and what it says of itself."""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from ..errors import AusteerError, one_line
from ..plans.replay import Replay
from .comparison import Token, Written
from .writing import LIKELIEST, TOKENS

#: Seconds that one answer may take: a server may be loading an adapter.
TIMEOUT = 120
#: Sent as a bearer token, if it is set.
KEY_VARIABLE = "AUSTEER_API_KEY"
#: How vLLM names tokens by their ids, if it is asked to.
_ID = "token_id:"


class VerifyError(AusteerError):
    """A plan that cannot be verified: no replay, no server, no log-probabilities, or something else than was asked."""


class Server:
    """A server at a URL such as http://localhost:8000/v1.

    Raises:
        VerifyError: it cannot be reached, or refuses, with its own words.
    """

    def __init__(self, url: str, model: str | None = None):
        if not url.startswith(("http://", "https://")):
            raise VerifyError(f"url: found {url!r}, expected http://HOST:PORT/v1")
        self.url = url.rstrip("/")
        self._plain: bool | None = None  # whether it takes texts alone, and knows OpenAI's options alone
        self._says: dict[str, str] = {}
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        """The server's own model: vLLM lists adapters with their parent."""
        rows = self._ask("/models").get("data")
        found = [row for row in rows if isinstance(row, dict) and "id" in row] if isinstance(rows, list) else []
        if not found:
            raise VerifyError(f"{self.url}/models: found no model, expected at least one; give its name (--base)")
        return str(next((row for row in found if not row.get("parent")), found[0])["id"])

    def written(self, replay: Replay, body: Mapping[str, Any], cached: bool = True) -> list[Written]:
        """What is written after each prompt.

        Args:
            body: what the request has beside prompt and greedy decoding.
            cached: whether what the server keeps of earlier prompts may be used, as it is of itself.

        Raises:
            VerifyError: as above; or there are no log-probabilities; or the prompt has another number of tokens.
        """
        # llama.cpp's word for it; and vLLM's, for which these requests' prompts are unlike all others then.
        fresh = {} if cached or self._plain else {"cache_prompt": False, "cache_salt": secrets.token_hex(16)}
        tokens = _Tokens(replay.texts)
        found = []
        for prompt in replay.prompts:
            answer = self._complete(prompt.text, list(prompt.ids), {"model": self.model, **fresh, **body})
            usage = answer.get("usage")
            counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
            if counted is not None and counted != len(prompt.ids):
                raise VerifyError(
                    f"{self.url}: found {counted} tokens in the prompt {prompt.text!r}, expected {len(prompt.ids)}; "
                    "the server has another tokenizer, or begins texts in another way"
                )
            found.append(self._read(answer, tokens))
        return found

    def engine(self) -> str:
        """What runs there, as far as it says so."""
        version = self._says.get("server", "").strip()
        root = self.url.removesuffix("/v1")
        try:
            stated = self._open(urllib.request.Request(f"{root}/version", headers=_headers()))
            if isinstance(stated.get("version"), str):
                version = f"vLLM {stated['version']}"
        except VerifyError:
            pass  # no vLLM
        mark = self._says.get("fingerprint")
        return " ".join(filter(None, [version or "a server", mark and f"({mark})", "at", self.url]))

    def _complete(self, text: str, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """Token ids are what the model itself reads; a server that takes texts alone gets the text."""
        common = {"max_tokens": TOKENS, "temperature": 0, "logprobs": LIKELIEST}
        if self._plain:
            return self._ask("/completions", {"prompt": text, **common, **body})
        more = {"return_tokens_as_token_ids": True, "repetition_penalty": 1.0}
        try:
            answer = self._ask("/completions", {"prompt": ids, **common, **more, **body})
        except _RefusedError as error:
            if self._plain is not None:
                raise
            try:
                answer = self._ask("/completions", {"prompt": text, **common, **body})
            except VerifyError:
                raise error from None
            self._plain = True
            return answer
        self._plain = False
        return answer

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        return self._open(urllib.request.Request(self.url + path, data, _headers()))

    def _open(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                text = answer.read().decode("utf-8", "replace")
                self._says.setdefault("server", answer.headers.get("Server") or "")
        except urllib.error.HTTPError as error:
            with error:
                message = _message(error.read().decode("utf-8", "replace"))
            kind = _RefusedError if error.code in (400, 422) else VerifyError
            raise kind(f"{request.full_url}: the server answered HTTP {error.code}: {message}") from error
        except (OSError, ValueError) as error:  # the last: a URL that is none
            reason = one_line(getattr(error, "reason", None) or error)
            raise VerifyError(
                f"{request.full_url}: cannot be reached ({reason}); expected a running server, as http://HOST:PORT/v1"
            ) from error
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise VerifyError(
                f"{request.full_url}: found {text[:60]!r}, expected JSON; is the URL that of the API (/v1)?"
            )
        mark = found.get("system_fingerprint")
        if isinstance(mark, str) and mark.isprintable():
            self._says["fingerprint"] = mark[:60]
        return found

    def _read(self, answer: dict[str, Any], tokens: _Tokens) -> Written:
        try:
            logprobs = answer["choices"][0]["logprobs"]
            rows = tokens.steps(logprobs) if logprobs else []
            steps = list(takewhile(lambda step: None not in step[1], rows))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise VerifyError(f"{self.url}: found an answer without choices and logprobs ({error!r})") from error
        if not logprobs:
            raise VerifyError(
                f"{self.url}: found no log-probabilities in the answer, expected those of the {LIKELIEST} likeliest "
                "tokens (logprobs); this server does not give them, or has to be started with an option for it"
            )
        return Written(*(tuple(part) for part in zip(*steps))) if steps else Written((), ())


class _RefusedError(VerifyError):
    """A request that the server does not take."""


class _Tokens:
    """What a server says of tokens, in OpenAI's form or llama.cpp's: by ids where it gives them, else by their texts.

    Args:
        texts: of the tokens of the replay.
    """

    def __init__(self, texts: Mapping[int, str]):
        self._ids = {text: token for token, text in texts.items()}
        self._unclear = {text for text, count in Counter(texts.values()).items() if count > 1}

    def steps(self, logprobs: dict[str, Any]) -> Iterator[tuple[Token, dict[Token, float]]]:
        """Each token with log p of the likeliest; None among these where a text may be one token or another."""
        if "content" in logprobs:
            for row in logprobs["content"]:
                token = self._token(row["token"], row.get("id"))
                top = {
                    self._token(one["token"], one.get("id")): one["logprob"] for one in row.get("top_logprobs") or ()
                }
                yield token, _numbers({**top, token: row["logprob"]})
            return
        tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
        for text, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops):
            token = self._token(text)
            yield token, _numbers({**{self._token(one): lp for one, lp in (top or {}).items()}, token: value})

    def _token(self, text: str, number: object = None) -> Any:
        if isinstance(number, int):
            return number
        if text.startswith(_ID):
            return int(text[len(_ID) :])
        text = f" {text[1:]}" if text[:1] in ("▁", "Ġ") else text
        return None if text in self._unclear or "\ufffd" in text else self._ids.get(text, text)


def _numbers(values: dict[Any, Any]) -> dict[Token, float]:
    """Without tokens that cannot be, which are null, -inf or a very small number."""
    return {token: float(value) for token, value in values.items() if value is not None and value > -1e4}


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _message(text: str) -> str:
    """What an error of a server says."""
    try:
        found = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:300] or "nothing"
    inner = found.get("error", found) if isinstance(found, dict) else found
    said = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    return " ".join(str(said or text).split())[:300]
