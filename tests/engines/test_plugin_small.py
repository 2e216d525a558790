"""The vLLM plugin on a small random model: compiled, when requests are put off, split over processes, and over HTTP."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from austeer.plans.serving import KEY, VARIABLE
from mixes import PROMPTS
from plugin_sets import ENGINE, Mix, asks, named, random_mixes, written_by_us
from serving import Server
from small_models import small_model

pytestmark = pytest.mark.engine
TOKENS = 40


@pytest.fixture(scope="module")
def small(demo, tmp_path_factory):
    """A small Llama and its folder."""
    return small_model("llama", demo[1], tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def mixes(small):
    return random_mixes(small[0])


@pytest.fixture(scope="module")
def expected(small, demo, mixes):
    return written_by_us(small[0], demo[1], mixes, TOKENS)


def check(engine, expected) -> None:
    asked = [(name, number) for number in range(len(PROMPTS)) for name in expected]
    prompts = [PROMPTS[number] for _, number in asked]
    for (name, number), output in zip(
        asked, engine.generate(prompts, [asks(name, TOKENS) for name, _ in asked]), strict=True
    ):
        assert output.outputs[0].token_ids == expected[name][number], (name, number)


@pytest.mark.parametrize("way", ["compiled", "tensor parallel"])
def test_the_tokens_are_those_of_our_own_steering(small, mixes, expected, tmp_path, monkeypatch, way):
    from vllm import LLM

    options = {"compiled": {}, "tensor parallel": {"tensor_parallel_size": 2, "enforce_eager": True}}[way]
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))  # nothing was compiled before
    if way == "tensor parallel":
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            pytest.skip("vLLM binds each process to a core of its own")
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    # Lists of 32 places: those of a vector's length are compiled otherwise than shorter ones.
    with named(mixes, tmp_path, units=32, probes=[["layer", 1]]):
        engine = LLM(
            str(small[1]),
            max_model_len=128,
            max_num_batched_tokens=48,
            max_num_seqs=8,
            block_size=32,
            num_gpu_blocks_override=9,  # for four requests of this length: others are put off, and begin anew
            disable_log_stats=False,
            **ENGINE,
            **options,
        )
        try:
            check(engine, expected)
            put_off = next(metric for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
            assert put_off.value > 0
        finally:
            engine.llm_engine.engine_core.shutdown()


def test_another_architecture(demo, tmp_path):
    """Gemma 2 has a norm between the MLP and the residual, and multiplies by 1 + weight in each."""
    from vllm import LLM

    model, folder = small_model("gemma2", demo[1], tmp_path / "model")
    mixes = random_mixes(model)
    expected = written_by_us(model, demo[1], mixes, TOKENS)
    with named(mixes, tmp_path):
        engine = LLM(str(folder), max_model_len=128, max_num_seqs=8, enforce_eager=True, **ENGINE)
        try:
            check(engine, expected)
        finally:
            engine.llm_engine.engine_core.shutdown()


def test_the_server_takes_a_set_by_name_and_refuses_others(small, demo, mixes, expected, tmp_path):
    options = ["--served-model-name", "small", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    with named(mixes, tmp_path):
        serve = ["serve", str(small[1]), "--sets", os.environ[VARIABLE], "--print", *options]
        shown = subprocess.run([sys.executable, "-m", "austeer", *serve], capture_output=True, text=True, check=True)
        variable, *command = shlex.split(shown.stdout)
        assert variable == f"{VARIABLE}={os.environ[VARIABLE]}" and command[:2] == ["vllm", "serve"]
        server = Server(command[2:], tmp_path / "log")
    body = {"model": "small", "temperature": 0, "min_tokens": TOKENS, "max_tokens": TOKENS, "return_token_ids": True}
    try:
        server.wait()
        for number, prompt in enumerate(PROMPTS):
            for name in (None, *mixes):
                extra = {} if name is None else {"vllm_xargs": {KEY: name}}
                answer = server.ask("/v1/completions", body | {"prompt": prompt} | extra)
                assert answer["choices"][0]["token_ids"] == expected[name][number], (name, number)
        wrong = body | {"prompt": PROMPTS[0], "vllm_xargs": {KEY: "kind"}}
        status, message = server.refusal("/v1/completions", wrong)
        assert status == 400 and "found the steering set 'kind'" in message and "'shift attention'" in message, message
        status, message = server.refusal("/v1/completions", wrong | {"stream": True})
        assert status == 400 and "'kind'" in message, message
        beams = body | {"prompt": PROMPTS[0], "use_beam_search": True, "vllm_xargs": {KEY: "push layer"}}
        status, message = server.refusal("/v1/completions", beams)
        assert status == 400 and "beam search" in message, message
        chat = {"model": "small", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        status, message = server.refusal("/v1/chat/completions", chat | {"vllm_xargs": {KEY: "kind"}})
        assert status == 400 and "'kind'" in message, message
        assert server.ask("/v1/chat/completions", chat | {"vllm_xargs": {KEY: "push layer"}})["choices"]
    except BaseException:
        print(server.end_of_log())
        raise
    finally:
        server.stop()


def test_a_plan_of_another_model_stops_the_start(small, tmp_path, capfd):
    """Before weights are loaded, in vLLM's log: it tells the caller no more than that its engine has not started."""
    from vllm import LLM

    (plan, alpha), *_ = random_mixes(small[0])["push neuron"].parts
    other = replace(plan, model=replace(plan.model, widths=plan.model.widths | {"neuron": 512}))
    with named({"kind": Mix([(other, alpha)])}, tmp_path), pytest.raises(RuntimeError, match="initialization failed"):
        LLM(str(small[1]), max_model_len=128, enforce_eager=True, **ENGINE)
    found = "".join(capfd.readouterr())
    assert "set 'kind'" in found and "'neuron': 512" in found and "'neuron': 256" in found
    assert "Loading weights took" not in found
