"""vLLM's OpenAI-compatible server, started as a user would: plans are asked by name, and come and go at run time."""

from __future__ import annotations

from dataclasses import replace

import pytest

import austeer
from austeer.export import export_lora
from mixes import PROMPTS
from serving import Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(adapters, tmp_path_factory: pytest.TempPathFactory):
    """Serves the demo model as "base" and the attention plan as "kind"."""
    from austeer.models.demo_model import demo_model

    arguments = [str(demo_model()), "--served-model-name", "base", "--dtype", "float32", "--max-model-len", "128"]
    lora = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "16"]
    lora += ["--lora-target-modules", "o_proj", "down_proj", "--lora-modules", f"kind={adapters['attention']}"]
    found = Server([*arguments, *lora], tmp_path_factory.mktemp("server") / "log")
    try:
        found.wait()
        yield found
    except BaseException:
        print(found.end_of_log())
        raise
    finally:
        status = found.stop()
    assert status == 0, f"exit status {status}:\n{found.end_of_log()}"


@pytest.fixture(scope="module")
def texts(demo, written) -> dict[str, list[str]]:
    """What our own steering writes, as text, for each mix."""
    return {name: [demo[1].decode(tokens) for tokens in rows] for name, rows in written.items()}


def test_a_plan_is_a_model_by_name(server, texts):
    assert server.models() == {"base", "kind"}
    for number, prompt in enumerate(PROMPTS):
        assert server.complete("kind", prompt) == texts["attention"][number]
        assert server.complete("base", prompt) == texts["base"][number]


def test_a_plan_comes_and_goes_at_run_time(server, adapters, texts):
    server.ask("/v1/load_lora_adapter", {"lora_name": "brief", "lora_path": str(adapters["ffn"])})
    assert server.models() == {"base", "kind", "brief"}
    for number, prompt in enumerate(PROMPTS):
        assert server.complete("brief", prompt) == texts["ffn"][number]
        assert server.complete("kind", prompt) == texts["attention"][number]
    server.ask("/v1/unload_lora_adapter", {"lora_name": "brief"})
    assert server.models() == {"base", "kind"}
    status, message = server.refusal("/v1/completions", {"model": "brief", "prompt": PROMPTS[0], "max_tokens": 1})
    assert status == 404 and "brief" in message


def test_an_adapter_of_a_higher_rank_than_the_server_was_started_for_is_refused(
    server, demo, momentum, tmp_path, texts
):
    plan = momentum.select(site="ffn", k=100)
    rank = int(plan.layer.bincount().max())
    assert rank > 16
    folder = export_lora(plan, demo[0], tmp_path / "wide")
    status, message = server.refusal("/v1/load_lora_adapter", {"lora_name": "wide", "lora_path": str(folder)})
    assert status >= 400 and f"LoRA rank {rank} is greater than max_lora_rank 16" in message, (status, message)
    assert server.models() == {"base", "kind"} and server.complete("kind", PROMPTS[0]) == texts["attention"][0]


def test_a_plan_proves_itself(server, demo, mixes, tmp_path):
    """The server runs what was recorded; and adapters with a fault, each of which is named."""
    ((plan, alpha),) = mixes["attention"]
    plan = austeer.record_replay(*demo, plan, alpha, progress=False)
    url = f"http://127.0.0.1:{server.port}/v1"
    found = austeer.verify(plan, url=url, lora="kind")
    print(found)
    assert found.applied and found.engine.startswith("vLLM 0.") and found.agreeing == plan.replay.tokens
    assert found.unsteered < 1e-3
    higher = replace(plan, layer=plan.layer + 1, replay=None)
    wrong = {"half strength": (plan, alpha / 2), "applied elsewhere (layers + 1)": (higher, alpha)}
    for verdict, (other, strength) in wrong.items():
        folder = export_lora(other, demo[0], tmp_path / verdict, alpha=strength)
        server.ask("/v1/load_lora_adapter", {"lora_name": "wrong", "lora_path": str(folder)})
        try:
            assert austeer.verify(plan, url=url, lora="wrong").verdict == verdict
        finally:
            server.ask("/v1/unload_lora_adapter", {"lora_name": "wrong"})
    assert austeer.verify(plan, url=url, lora="base").verdict == "not applied"
    with pytest.raises(austeer.VerifyError, match=r"HTTP 404.*`?brief"):
        austeer.verify(plan, url=url, lora="brief")
