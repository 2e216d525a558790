"""Servers that mean harm, or are none: a key stays with its host, and whatever is answered is an error or a verdict."""

import math

import pytest

import austeer
from austeer.verifying import VerifyError, server
from completions import Completions
from hypotheses import faults
from raw_server import RawServer, response

MODELS = {"data": [{"id": "base"}]}
KEY = "sk-secret"
CHUNKED = "Transfer-Encoding: chunked"


def answering(content, **options):
    """A server of one model that answers completions so."""
    return RawServer(lambda path: response(content, **options) if "completions" in path else response(MODELS))


def completion(logprobs):
    return {"choices": [{"logprobs": logprobs}]}


# --- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
@pytest.mark.parametrize("what", ["models", "completions"])
def test_a_key_is_not_taken_to_another_host(plan, monkeypatch, status, what):
    monkeypatch.setenv(server.KEY_VARIABLE, KEY)
    with RawServer(lambda path: response(MODELS)) as other:
        away = response({}, status, [f"Location: {other.url}/{what}"])
        first = RawServer(lambda path: away if what in path else response(MODELS))
        there = rf"{first.url}/{what}: .*redirects to {other.url}/{what}; give that"
        with first, pytest.raises(VerifyError, match=there):
            austeer.verify(plan, url=first.url, lora="kind")
        assert first.requests[0][1]["Authorization"] == f"Bearer {KEY}"
        assert not other.requests


def test_blanks_around_a_key_are_none_of_it(one_lively, plan, monkeypatch):
    monkeypatch.setenv(server.KEY_VARIABLE, f" {KEY}\n")
    with RawServer(lambda path: response({})) as found, pytest.raises(VerifyError, match="no model"):
        austeer.verify(plan, url=found.url)
    assert found.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv(server.KEY_VARIABLE, "\n")
    with RawServer(lambda path: response({})) as found, pytest.raises(VerifyError, match="no model"):
        austeer.verify(plan, url=found.url)
    assert "Authorization" not in found.requests[0][1]


@pytest.mark.parametrize("key", [f"{KEY}\nX-More: 1", f"{KEY}ключ", f"{KEY}ü", f"{KEY}\x7f"])
def test_a_key_that_is_none_is_not_shown(plan, monkeypatch, key):
    monkeypatch.setenv(server.KEY_VARIABLE, key)
    with pytest.raises(VerifyError, match=rf"{server.KEY_VARIABLE}: .*printable ASCII") as found:
        austeer.verify(plan, url="http://127.0.0.1:9/v1")
    assert KEY not in str(found.value)


@pytest.mark.parametrize(
    "url", ["http://me:{}@host/v1", "ftp://me:{}@host/v1", "http://{}@host", "http://host/v1?k={}"]
)
def test_secrets_in_a_url_are_refused_and_not_shown(plan, url):
    with pytest.raises(VerifyError, match=rf"url: found .*user or a query.*{server.KEY_VARIABLE}") as found:
        austeer.verify(plan, url=url.format(KEY))
    assert KEY not in str(found.value)


@pytest.mark.parametrize("url", ["http://localhost:port/v1", "http://local host/v1", "http:///v1"])
def test_urls_that_are_none(plan, url):
    with pytest.raises(VerifyError, match=f"{url}/models: cannot be reached"):
        austeer.verify(plan, url=url)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cannot be reached"),
        (b"\x1b[31mSSH-2.0\r\n\r\n", "cannot be reached"),
        (response(b'{"data": [{', length=500), 'found \'{"data".*expected JSON'),
        (response(b"no", "500 No", length=500), "HTTP 500: no"),
        (response(b"500\r\n{", headers=[CHUNKED]), "cannot be reached .*IncompleteRead"),
        (response(b"500\r\n{", "500 No", headers=[CHUNKED]), "cannot be reached .*IncompleteRead"),
        (response(b"[" * 10**5), r"found '\[\[\[.*expected JSON"),
        (response(b"[" * 10**5, "404 None"), r"HTTP 404: \[\[\["),
        (response(b"9" * 5000), "found '999.*expected JSON"),
        (response({"message": "\x1b]0;title\x07\u202e" + "no " * 999}, "403 No"), "HTTP 403: ]0;title no no"),
        (response(b"\xff\xfe"), "expected JSON"),
    ],
)
def test_what_is_no_answer(plan, raw, message):
    for what in ("models", "completions"):
        bad = RawServer(lambda path, what=what: raw if what in path else response(MODELS))
        with bad, pytest.raises(VerifyError, match=rf"{bad.url}/{what}: .*{message}") as found:
            austeer.verify(plan, url=bad.url, lora="kind")
        assert len(str(found.value)) < 600 and str(found.value).isprintable()


def test_an_answer_without_end_is_not_read_to_it(plan, monkeypatch):
    monkeypatch.setattr(server, "LARGEST_ANSWER", 1000)
    bad = answering({"much": "x" * 1000})
    with bad, pytest.raises(VerifyError, match=r"completions: .*more than 1000 bytes"):
        austeer.verify(plan, url=bad.url)


@pytest.mark.parametrize(
    "logprobs",
    [
        {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [{}]},
        {"tokens": ["a"], "token_logprobs": [-math.inf], "top_logprobs": [{"a": -math.inf}]},
        {"content": [{"token": "a", "logprob": None}]},
        {"tokens": [], "token_logprobs": []},
    ],
)
def test_answers_of_nothing_cannot_be_told(plan, logprobs):
    with answering(completion(logprobs)) as found:
        assert austeer.verify(plan, url=found.url, lora="kind").verdict == "cannot tell"


def test_a_step_of_nothing_ends_an_answer(one_lively, demo, plan):
    """What comes before it is compared as ever."""
    with Completions(one_lively, demo[1], lambda body: faults()["applied"](plan)) as found:
        told = found.told

        def cut(steps):
            logprobs = told(steps)
            logprobs["token_logprobs"][4] = -math.inf
            logprobs["top_logprobs"][4] = None
            return logprobs

        found.told = cut
        assert (verdict := austeer.verify(plan, url=found.url)).applied, str(verdict)
        assert verdict.agreeing == 4 * len(plan.replay.prompts)


@pytest.mark.parametrize(
    "logprobs",
    [
        {"tokens": ["a"], "token_logprobs": [10**400]},
        {"tokens": ["a"], "token_logprobs": ["\x1b[2J"]},
        {"tokens": [["a"]], "token_logprobs": [-1]},
        {"tokens": ["token_id:" + "\x1b[2J" * 99], "token_logprobs": [-1]},
        {"content": 7},
        [7],
        7,
    ],
)
def test_answers_of_another_form(plan, logprobs):
    bad = answering(completion(logprobs))
    with bad, pytest.raises(VerifyError, match=r"an answer without choices and logprobs") as found:
        austeer.verify(plan, url=bad.url, lora="kind")
    assert len(str(found.value)) < 300 and str(found.value).isprintable()


def test_nothing_that_a_terminal_obeys_is_shown(one_lively, demo, plan):
    """In what a server calls itself, its model and its version."""
    evil = "\x1b[2J\x1b]0;title\x07\u202e"
    with Completions(one_lively, demo[1], lambda body: None) as found:
        complete = found.complete
        found.complete = lambda body: (200, {**complete({**body, "model": "base"})[1], "system_fingerprint": evil * 9})
        front = {"/v1/models": {"data": [{"id": f"base{evil}"}]}, "/version": {"version": f"0.32{evil}" + "9" * 999}}
        with RawServer(lambda path: response(front[path], headers=[f"Server: tiny{evil[:-1]}"])) as other:
            found.http.RequestHandlerClass.do_GET = forwarded(other)
            verdict = austeer.verify(plan, url=found.url)
    assert "vLLM 0.32 [2J" in verdict.engine and "model base [2J" in verdict.engine
    assert verdict.engine.isprintable() and len(verdict.engine) < 300
    assert all(line.isprintable() for line in str(verdict).splitlines())


def forwarded(other):
    """Answers what ``other`` does."""
    from urllib.request import urlopen

    def do_get(self):
        with urlopen(other.url.removesuffix("/v1") + self.path) as answer:
            self.wfile.write(response(answer.read(), headers=[f"Server: {answer.headers['Server']}"]))

    return do_get


def test_a_count_of_tokens_that_is_none(plan):
    bad = answering({**completion({}), "usage": {"prompt_tokens": "\x1b[2J" * 99}})
    with bad, pytest.raises(VerifyError, match=r"found '\\x1b.* tokens in the prompt") as found:
        austeer.verify(plan, url=bad.url)
    assert str(found.value).isprintable()


# --- a second try ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["not applied", "half strength"])
def test_a_server_that_knows_no_word_for_fresh_prompts(one_lively, demo, plan, verdict):
    """What was found stands, and it is said what is not known."""
    with Completions(
        one_lively, demo[1], lambda b: faults()[verdict](plan) if b["model"] == "kind" else None
    ) as strict:
        complete = strict.complete
        refused = (422, {"detail": "cache_salt: extra inputs are not permitted"})
        strict.complete = lambda body: refused if "cache_salt" in body else complete(body)
        found = austeer.verify(plan, url=strict.url, lora="kind")
        assert "cache_salt" in strict.bodies[-1]
    assert found.verdict == verdict and not found.applied and "stale prompt cache is not ruled out" in found.reason
