"""An OpenAI-compatible server: what it writes after a replay's prompts, and what it says of itself."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from ..errors import AusteerError
from ..plans.replay import Replay
from ..utils.one_line import one_line
from .comparison import Token, Written
from .writing import LIKELIEST, TOKENS

#: Seconds that one answer may take: a server may be loading an adapter.
TIMEOUT = 120
#: Bytes of an answer: that of the longest lists of models is a tenth of it.
LARGEST_ANSWER = 2**24
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
        if "@" in url or "?" in url:  # what stands there may be a secret, and a URL is shown
            raise VerifyError(
                f"url: found one with a user or a query, expected http://HOST:PORT/v1; a key goes into {KEY_VARIABLE}"
            )
        if not re.match("https?://", url):
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
                    f"{self.url}: found {counted!r:.40} tokens in the prompt {prompt.text!r}, expected "
                    f"{len(prompt.ids)}; the server has another tokenizer, or begins texts in another way"
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
        mark = printable(self._says.get("fingerprint", ""), 60)
        return " ".join(filter(None, [printable(version, 60) or "a server", mark and f"({mark})", "at", self.url]))

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
            text = self._text(request)
        except (OSError, ValueError, http.client.HTTPException) as error:  # the last two: also a URL that is none
            reason = printable(getattr(error, "reason", None) or error).rstrip(". ") or type(error).__name__
            raise VerifyError(
                f"{request.full_url}: cannot be reached ({reason}); expected a running server, as http://HOST:PORT/v1"
            ) from error
        found = _json(text)
        if not isinstance(found, dict):
            raise VerifyError(
                f"{request.full_url}: found {text[:60]!r}, expected JSON; is the URL that of the API (/v1)?"
            )
        mark = found.get("system_fingerprint")
        if isinstance(mark, str):
            self._says["fingerprint"] = mark
        return found

    def _text(self, request: urllib.request.Request) -> str:
        """An answer's text; raises VerifyError where the server refuses, and what urllib does where there is none."""
        try:
            with _OPENER.open(request, timeout=TIMEOUT) as answer:
                self._says.setdefault("server", answer.headers.get("Server") or "")
                data = answer.read(LARGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            with error:
                message = _message(error.read(LARGEST_ANSWER).decode("utf-8", "replace"))
            kind = _RefusedError if error.code in (400, 422) else VerifyError
            raise kind(f"{request.full_url}: the server answered HTTP {error.code}: {message}") from error
        if len(data) > LARGEST_ANSWER:
            raise VerifyError(
                f"{request.full_url}: found an answer of more than {LARGEST_ANSWER} bytes, expected a short one; is "
                "the URL that of the API (/v1)?"
            )
        return data.decode("utf-8", "replace")

    def _read(self, answer: dict[str, Any], tokens: _Tokens) -> Written:
        try:
            logprobs = answer["choices"][0]["logprobs"]
            rows = tokens.steps(logprobs) if logprobs else []
            steps = list(takewhile(lambda step: step[1] and None not in step[1], rows))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise VerifyError(f"{self.url}: found an answer without choices and logprobs ({error!r:.100})") from error
        if not logprobs:
            raise VerifyError(
                f"{self.url}: found no log-probabilities in the answer, expected those of the {LIKELIEST} likeliest "
                "tokens (logprobs); this server does not give them, or has to be started with an option for it"
            )
        return Written(*(tuple(part) for part in zip(*steps))) if steps else Written((), ())


class _RefusedError(VerifyError):
    """A request that the server does not take."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: urllib would take the key along, to whatever host the server names."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()
        raise VerifyError(
            f"{req.full_url}: the server redirects to {printable(newurl)}; give that URL if it is the server's own"
        )


_OPENER = urllib.request.build_opener(_NoRedirect)


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
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise VerifyError(
            f"{KEY_VARIABLE}: found characters that no header can have, expected printable ASCII; set it anew"
        )
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _message(text: str) -> str:
    """What an error of a server says."""
    found = _json(text)
    inner = found.get("error", found) if isinstance(found, dict) else found
    said = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    return printable(said or text) or "nothing"


def _json(text: str) -> Any:
    """What a server's text says; None where it is no JSON. Servers write infinities, which strict JSON has not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def printable(words: object, longest: int = 300) -> str:
    """A server's words as they may be shown: one line, not long, and nothing that a terminal obeys."""
    return one_line(str(words)[: 4 * longest])[:longest]
