"""What requests may ask for, by their parameters and over HTTP."""

import asyncio
import json

import pytest

from austeer.plans.dose import Dose
from austeer.plans.serving import ALPHA, KEY, KL, VARIABLE
from austeer.vllm.admission import RequestError, checked, steering_of
from austeer.vllm.catalog import Catalog
from austeer.vllm.http import Refusals
from austeer.vllm.sets import parse
from austeer.vllm.shared import FOLDER, write_structure
from austeer.vllm.tables import structure_of
from made_plans import MODEL, PUSH, SCALE, SHIFT

DOSED = SHIFT.with_dose(Dose((0.1, 0.4)))


@pytest.fixture
def sets(tmp_path) -> str:
    for name, plan in (("shift", DOSED), ("push", PUSH), ("scale", SCALE)):
        plan.save_pretrained(tmp_path / name)
    named = {
        "shift": {"plan": str(tmp_path / "shift"), "max_kl": 1.6},
        "push": {"plan": str(tmp_path / "push"), "alpha": 3, "max_alpha": 5},
        "scale": {"plan": str(tmp_path / "scale"), "alpha": 2},
        "later": {"plan": str(tmp_path / "scale"), "alpha": 2, "scope": "generation"},
        "same": {"plan": str(tmp_path / "push"), "alpha": 1},
        "both": {"plans": [{"plan": str(tmp_path / name), "alpha": 1} for name in ("push", "scale")]},
    }
    return json.dumps({"sets": named})


@pytest.fixture
def catalog(sets) -> Catalog:
    return Catalog(parse(sets))


def test_strengths_are_the_requests_or_the_sets_own(catalog):
    def parts(**extra):
        return steering_of(extra, catalog).parts

    assert steering_of(None, catalog) is steering_of({}, catalog) is steering_of({"other": 1}, None) is None
    assert parts(austeer="push") == ((PUSH, 3.0),)
    assert parts(austeer="push", austeer_alpha=-4) == ((PUSH, -4.0),)
    assert parts(austeer=["push", "scale"]) == ((PUSH, 3.0), (SCALE, 2.0))
    assert parts(austeer=["push", "scale"], austeer_alpha=[1, 0.5]) == ((PUSH, 1.0), (SCALE, 0.5))
    assert parts(austeer="both") == ((PUSH, 1.0), (SCALE, 1.0))
    ((plan, alpha),) = parts(austeer="shift", austeer_kl=0.9)
    assert plan == DOSED and alpha == pytest.approx((0.9 / 0.4) ** 0.5)


def test_digests_tell_apart_what_keys_and_values_depend_on(catalog):
    asked = [
        {KEY: "push"},
        {KEY: "push", ALPHA: 2},
        {KEY: "scale"},
        {KEY: ["push", "scale"]},
        {KEY: "both"},
    ]
    found = [steering_of(extra, catalog) for extra in asked]
    assert len({one.digest for one in found}) == len({one.salt for one in found}) == 5
    scale, later = steering_of({KEY: "scale"}, catalog), steering_of({KEY: "later"}, catalog)
    assert scale.digest == later.digest and scale.salt != later.salt  # one row, another cache
    same = steering_of({KEY: ["scale", "push"], ALPHA: [1, 1]}, catalog)
    assert same.digest == steering_of({KEY: "both"}, catalog).digest  # whatever they are called, in any order


REFUSED = [
    ({KEY: "nobody"}, "'nobody'.*'both'"),
    ({KEY: 3}, "3"),
    ({KEY: []}, r"\[\]"),
    ({KEY: ["push", "push"]}, "different"),
    ({KEY: ["scale", "later"]}, "'later': generation"),
    ({KEY: "shift"}, f"'shift'.*{ALPHA}.*{KL}"),
    ({KEY: "push", ALPHA: True}, f"{ALPHA}.*True"),
    ({KEY: "push", ALPHA: "3"}, f"{ALPHA}.*'3'"),
    ({KEY: "push", ALPHA: float("inf")}, f"{ALPHA}.*inf"),
    ({KEY: "push", ALPHA: 1e39}, f"{ALPHA}.*1e\\+39"),
    ({KEY: "push", ALPHA: [1, 2]}, rf"{ALPHA}.*\[1, 2\]"),
    ({KEY: ["push", "scale"], ALPHA: 1}, f"{ALPHA}.*list of 2"),
    ({KEY: "push", ALPHA: 5.5}, f"{ALPHA}.*5.5.*5"),
    ({KEY: "push", ALPHA: -5.5}, f"{ALPHA}.*-5.5.*5"),
    ({KEY: "shift", KL: 1.7}, f"{KL}.*1.7.*1.6"),
    ({KEY: "shift", ALPHA: 2.1}, f"{KL}.*1.764.*1.6"),
    ({KEY: "shift", KL: 0}, "kl.*0"),
    ({KEY: "shift", KL: 0.1, ALPHA: 1}, f"{ALPHA}.*{KL}"),
    ({KEY: "push", KL: 0.1}, f"{KL}.*dose"),
    ({KEY: ["shift", "push"], KL: [0.1, 0.1]}, f"{KL}.*2 sets"),
    ({KEY: "both", ALPHA: 2}, "'both'.*2 plans"),
    ({KEY: ["push", "same"], ALPHA: [5, 5]}, "one plan twice"),
    ({KEY: ["shift", "push"], ALPHA: [0.1, 1]}, "'shift'.*max_kl"),
    ({KEY: "push", ALPHA: 10**400}, f"{ALPHA}.*1000"),
    ({KEY: "x" * 300}, "'xxx"),
    ({ALPHA: 1}, f"{ALPHA}.*without"),
    ({KEY: "push", "austeer_row": 1}, "'austeer_row'"),
    ({"austeer_aplha": 1}, "'austeer_aplha'"),
]


@pytest.mark.parametrize(("extra", "match"), REFUSED)
def test_what_cannot_be_had_is_refused(catalog, extra, match):
    with pytest.raises(RequestError, match=match):
        steering_of(extra, catalog)


def test_steering_without_sets_is_refused():
    with pytest.raises(RequestError, match="no steering sets"):
        steering_of({KEY: "push"}, None)


@pytest.fixture
def started(sets, catalog, monkeypatch, tmp_path):
    """As in the front end of an engine that was started with these sets, but for one of them."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(FOLDER, str(tmp_path / "shared"))
    monkeypatch.setenv(VARIABLE, sets)
    structure = structure_of(catalog, MODEL, 4)
    room = {place: count for place, count in structure.room.items() if place[0] != "layer"}
    write_structure(type(structure)(MODEL, 4, room))


def test_the_front_end_knows_what_the_engine_was_started_for(started):
    checked({KEY: "push"})
    checked(None)
    with pytest.raises(RequestError, match=r"'layer'.*layer 2.*declare"):
        checked({KEY: "shift", KL: 0.1})


def run(body: bytes, pieces: int = 1, method: str = "POST") -> tuple[list[dict], bytes | None]:
    """What a client is sent, and the body that reached the server behind the middleware; None for none."""
    sent, reached = [], []

    async def app(scope, receive, send):
        whole, more = b"", True
        while more:
            message = await receive()
            whole, more = whole + message.get("body", b""), message.get("more_body", False)
        reached.append(whole)

    size = max(1, -(-len(body) // pieces))
    parts = [body[i : i + size] for i in range(0, max(len(body), 1), size)]
    messages = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(Refusals(app)({"type": "http", "method": method, "path": "/v1/completions"}, receive, send))
    return sent, reached[0] if reached else None


def asked(**fields) -> bytes:
    return json.dumps({"model": "m", "prompt": "a", **fields}).encode()


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    "body",
    [
        asked(),
        asked(vllm_xargs={KEY: "push", ALPHA: 2}),
        asked(vllm_xargs={"other": True}),
        asked(prompt="austeer"),
        b"austeer {",
        b"[]",
        b"",
    ],
)
def test_other_requests_pass_the_middleware_as_they_are(started, body, pieces):
    assert run(body, pieces) == ([], body)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (asked(vllm_xargs={KEY: "nobody"}), "nobody"),
        (asked(vllm_xargs={KEY: "nobody"}, stream=True), "nobody"),
        (asked(vllm_xargs={KEY: "push", ALPHA: True}), "True"),
        (asked(vllm_xargs={KEY: "push"}, use_beam_search=True), "beam search"),
        (asked(vllm_xargs={KEY: "push"}, use_beam_search=True).replace(b"austeer", b"\\u0061usteer"), "beam search"),
        (asked(vllm_xargs={KEY: "nobody"}).decode().encode("utf-16"), "nobody"),
        (asked(austeer="push"), "vllm_xargs"),
    ],
)
def test_the_middleware_refuses_with_a_400(started, body, match):
    sent, reached = run(body, 2)
    assert reached is None and sent[0]["status"] == 400
    error = json.loads(sent[1]["body"])["error"]
    assert match in error["message"] and error["code"] == 400
