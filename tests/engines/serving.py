"""A ``vllm serve`` of its own, for tests."""

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
from mixes import TOKENS

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
