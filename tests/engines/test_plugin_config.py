"""The vLLM plugin against vLLM's own classes, without an engine: configurations, model classes, model runner V2."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from austeer.plans.serving import KEY, PROCESSOR, SCHEDULER, VARIABLE
from austeer.steering.markers import Answer
from austeer.vllm.admission import ROW
from austeer.vllm.plugin import ARCHITECTURES
from austeer.vllm.sets import ServingError
from austeer.vllm.slots import RowOf
from austeer.vllm.support import check_engine

pytestmark = pytest.mark.engine
OPTIONS = {"logits_processors": [PROCESSOR], "scheduler_cls": SCHEDULER, "max_model_len": 128}


@pytest.fixture(scope="module")
def configure():
    """vLLM's configuration of the demo model with some options."""
    from vllm import EngineArgs

    from austeer.models.demo_model import demo_model

    return lambda **options: EngineArgs(str(demo_model()), **(OPTIONS | options)).create_engine_config()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheduler_cls": None}, f"--scheduler-cls {SCHEDULER}"),
        ({"logits_processors": None}, f"--logits-processors {PROCESSOR}"),
        ({"enable_lora": True}, "LoRA"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"kv_offloading_size": 1}, "KV connector"),
        ({"enable_prompt_embeds": True}, "prompt-embeds"),
        ({"compilation_config": {"mode": 1}}, "STOCK_TORCH_COMPILE"),
    ],
)
def test_an_engine_that_would_steer_wrongly_is_refused(configure, options, match):
    with pytest.raises(ServingError, match=match):
        check_engine(configure(**options))


def test_an_engine_as_documented_is_not_refused(configure):
    check_engine(configure())


def test_what_is_compiled_is_kept_apart_by_the_steerings_structure(configure):
    config = configure()
    hashes = {config.compute_hash()}
    for structure in ("one", "other"):
        config.additional_config[KEY] = {"structure": structure}
        hashes.add(config.compute_hash())
    assert len(hashes) == 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_has_a_steered_class(name):
    """vLLM's registry asks such a class for all that it asks of its own; its layers return what steering expects."""
    import inspect

    from vllm.model_executor.models.registry import _ModelInfo

    from austeer.vllm import models

    steered = getattr(models, name)
    plain = next(cls for cls in steered.__mro__ if cls.__module__.startswith("vllm."))
    assert plain.__name__ == name and steered is getattr(models, name)
    assert _ModelInfo.from_model_cls(steered) == _ModelInfo.from_model_cls(plain)
    assert set(inspect.signature(plain.forward).parameters) <= set(inspect.signature(steered.forward).parameters)


@dataclass
class NewRequest:
    prompt_len: int
    sampling_params: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(extra_args=None))
    prefill_token_ids: tuple = ()
    mm_features: tuple = ()


@pytest.fixture
def empty_row(tmp_path) -> str:
    """The file of a row without AUs: rows' numbers are what is tested here."""
    from austeer.vllm.tables import Row

    none = torch.empty(0)
    Row(none.int(), none.long(), none, none, none.int(), none).save(tmp_path / "row")
    return str(tmp_path / "row")


@pytest.fixture
def state(configure):
    """The steered model's state in model runner V2, with a model that has nothing but its slots and rows."""
    from vllm.v1.worker.gpu.model_states import init_model_state

    from austeer.models.sites import Fingerprint
    from austeer.vllm.models import Steered
    from austeer.vllm.running import Running
    from austeer.vllm.slots import slots_of
    from austeer.vllm.tables import Structure

    config = configure()
    structure, tokens = Structure(Fingerprint("llama", 1, {}, "a model", None), 2, {}), 64
    running = Running(
        torch.nn.Module(), structure, slots_of(config), range(1), (0, 1), tokens, 100, 8, torch.device("cpu")
    )
    model = SimpleNamespace(
        _steering_slots=slots_of(config),
        steering=lambda device: running,
        get_model_state_cls=Steered.get_model_state_cls,
    )
    return init_model_state(config, model, None, torch.device("cpu")), running.rows.tensor


def test_model_runner_v2_has_each_tokens_row_before_its_forward_pass(state, empty_row):
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    state, rows = state
    for slot, (row, prompt, start) in enumerate([(0, 3, 0), (None, 4, 0), (1, 5, 5), (0, 2, 0)]):
        extra = None if row is None else {ROW: RowOf(row, f"of {row}", empty_row, start, 1000)}
        state.add_request(slot, NewRequest(prompt, SimpleNamespace(extra_args=extra)))
    batch = InputBatch.make_dummy(3, 9, InputBuffers(8, 16, torch.device("cpu")))
    batch.idx_mapping_np = np.array([2, 1, 0])
    batch.query_start_loc_np = np.array([0, 4, 5, 9, 9, 9])  # vLLM's has the length of its buffers
    batch.num_computed_tokens_np = np.array([3, 7, 0])
    batch.num_tokens_after_padding = 12
    assert state.prepare_inputs(batch, None) == {}
    assert rows[:14].tolist() == [-1, -1, 1, 1, -1, 0, 0, 0, 0, *[-1] * 5]
    state.remove_request("of slot 0")
    state.add_request(0, NewRequest(1))
    state.prepare_inputs(batch, None)
    assert rows[:14].tolist() == [-1, -1, 1, 1, *[-1] * 10]


def test_model_runner_v2_reads_what_was_generated_just_now(state, empty_row):
    """A request that begins with a prompt of three tokens, another that was put off and has written two."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    state, rows = state
    answer = Answer(start=((7, 8),), pauses=(((((9,),), ((10,),)),)))
    for slot, prompt, known in ((0, 3, (1, 7, 2)), (1, 1, (1, 7, 8))):
        steering = RowOf(slot, f"of {slot}", empty_row, prompt, 1000, prompt, answer)
        request = NewRequest(prompt, SimpleNamespace(extra_args={ROW: steering}), known)
        state.add_request(slot, request)

    def run(tokens, lengths, first):
        batch = InputBatch.make_dummy(2, sum(lengths), InputBuffers(8, 16, torch.device("cpu")))
        batch.idx_mapping_np = np.array([0, 1])
        batch.query_start_loc_np = np.array([0, *np.cumsum(lengths)])
        batch.num_computed_tokens_np, batch.num_tokens_after_padding = np.array(first), sum(lengths)
        batch.input_ids = torch.tensor(tokens)
        state.prepare_inputs(batch, None)
        return rows[: sum(lengths)].tolist()

    assert run([1, 7, 2, 1, 7, 8], [3, 3], [0, 0]) == [-1, -1, -1, -1, -1, 1]
    assert run([7, 9], [1, 1], [3, 3]) == [-1, -1]
    assert run([8, 4], [1, 1], [4, 4]) == [0, -1]
    assert run([5, 10], [1, 1], [5, 5]) == [0, 1]


def test_the_logits_processor_is_one_for_both_model_runners(state):
    """Each loads the class by its name; V2 makes it with other arguments and calls other methods."""
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _cached_load_v2_logitsprocs

    (one,), (other,) = _load_logitsprocs_by_fqcns([PROCESSOR]), _cached_load_v2_logitsprocs((PROCESSOR,))
    assert one is other and not one.__abstractmethods__
    processor, logits = object.__new__(one), torch.randn(2, 5)
    assert processor.apply(logits) is logits and processor.apply(logits, None) is logits
    assert processor.is_argmax_invariant() and not processor.add_request(0, SimpleNamespace(extra_args=None))


def test_a_model_that_is_not_steered_stops_the_start(configure, monkeypatch):
    """As where VLLM_PLUGINS leaves the plugin out, so that vLLM's own class runs the model."""
    from vllm import ModelRegistry

    from austeer.vllm.models import structure_of_engine
    from austeer.vllm.requests import Requests

    # An engine that ran in this process before may have registered ours; afterwards that is back.
    monkeypatch.setitem(ModelRegistry.models, "LlamaForCausalLM", ModelRegistry.models["LlamaForCausalLM"])
    ModelRegistry.register_model("LlamaForCausalLM", "vllm.model_executor.models.llama:LlamaForCausalLM")
    with pytest.raises(ServingError, match=r"LlamaForCausalLM.*vllm\."):
        Requests(configure(), None)
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ServingError, match=VARIABLE):
        structure_of_engine(configure())


def test_the_scheduler_is_vllms_own_with_what_it_needs():
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from austeer.vllm.scheduler import check_scheduler

    check_scheduler(Scheduler, Request)

    class Other:
        def __init__(self):
            pass

    for scheduler, request in ((Other, Request), (Scheduler, Other)):
        with pytest.raises(ServingError, match="use vLLM"):
            check_scheduler(scheduler, request)
