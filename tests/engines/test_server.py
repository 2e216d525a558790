"""vLLM's OpenAI-compatible server, started as a user would: plans are asked by name, and come and go at run time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import vllm_command
from austeer.export import export_lora
from mixes import PROMPTS, TOKENS

pytestmark = pytest.mark.engine
READY, ANSWER, STOP = 300, 120, 60  # seconds, at most


class Server:
    """A running ``vllm serve``: asks it over HTTP, and shows its log when something goes wrong."""

    def __init__(self, arguments: list[str], log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [sys.executable, vllm_command.__file__, "serve", *arguments, "--port", str(self.port)]
        environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + READY
        while True:
            try:
                return self.ask("/health")
            except OSError:
                assert self.process.poll() is None, f"the server ended by itself:\n{self.end_of_log()}"
                assert time.monotonic() < deadline, f"no answer within {READY} s:\n{self.end_of_log()}"
                time.sleep(0.5)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to a GET, or with a body to a POST: JSON, or text where it is none.

        Raises:
            urllib.error.HTTPError: the server refused.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def refusal(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and message of a request that the server has to refuse."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.ask(path, body)
        with caught.value as error:
            return error.code, error.read().decode()

    def complete(self, model: str, prompt: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        return self.ask("/v1/completions", body)["choices"][0]["text"]

    def models(self) -> set[str]:
        return {model["id"] for model in self.ask("/v1/models")["data"]}

    def end_of_log(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]

    def stop(self) -> int:
        """Ends it as Ctrl-C does, all its processes by force if need be; the exit status."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(adapters, tmp_path_factory: pytest.TempPathFactory):
    """Serves the demo model as "base" and the attention plan as "kind"."""
    from austeer.models import demo_model

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
