"""Every way of running a model with every way of steering it: as the definition says, or refused; then as it was."""

import contextlib
import copy
import random
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import austeer
from austeer.steering.path_choice import MODES
from dense_formula import (
    OPERATIONS,
    POSSIBLE,
    SITES,
    WEIGHT_SITES,
    assert_unchanged,
    formula_at,
    random_plan,
    snapshot,
)
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows() | {"use_cache": False}
FAMILIES = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen2_moe": {"experts_implementation": "eager"},
    "gemma2": {"attention_dropout": 0.0},
}
GRADIENTS = {  # whether the model is in training, and whether it computes layers anew in a re-entrant way
    "evaluation": (False, None),
    "training": (True, None),
    "checkpointing": (True, False),
    "re-entrant checkpointing": (True, True),
}
MODEL_RUNS = ("inference_mode", "no_grad", *GRADIENTS)
THREADS = ("this", "another", "entered in another", "two")


@dataclass(frozen=True)
class Case:
    """Attributes: autograd: one of MODEL_RUNS. copied: whether what runs is a copy that was made inside the block."""

    family: str
    operation: str
    sites: tuple[str, ...]
    mode: str
    autograd: str
    autocast: bool = False
    copied: bool = False
    live: bool = False
    around: bool = False
    thread: str = "this"

    def model(self, dtype=torch.float32):
        model = tiny_model(self.family, **FAMILIES[self.family]).to(dtype)
        training, reentrant = GRADIENTS.get(self.autograd, (False, None))
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model.train(training)

    def contexts(self, autocast=True):
        stack = contextlib.ExitStack()
        if self.autograd not in GRADIENTS:
            stack.enter_context(getattr(torch, self.autograd)())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=autocast and self.autocast))
        return stack


def results(case, model, run=None, autocast=True):
    """Logits, and gradients where there are any, in float64."""
    with case.contexts(autocast):
        logits = (model if run is None else run)(**IDS).logits
    found = {}
    if case.autograd in GRADIENTS and case.thread != "two" and not case.copied:  # a copy's weights are steered ones
        logits.double().square().mean().backward()
        found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return found | {"logits": logits.detach().double()}


def in_a_thread(function):
    """What ``function`` returns or raises, in a thread of its own."""
    outcome = []

    def call():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call)
    thread.start()
    return thread, outcome


def joined(thread, outcome):
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def steered_results(case, model, plan, run=None):
    """What comes of steering ``model``, from each thread; and the names of gradients that it warned of."""
    steering = austeer.steer(model, plan, 0.2 if case.live else 0.7, mode=case.mode)
    with warnings.catch_warnings(record=True) as told, contextlib.ExitStack() as stack:
        warnings.simplefilter("always", austeer.SteeringWarning)
        if case.around and case.thread == "this":  # the block is inside autocast, inference mode ...
            stack.enter_context(case.contexts())
        if case.thread == "entered in another":
            joined(*in_a_thread(steering.attach))
            stack.callback(lambda: joined(*in_a_thread(steering.detach)))
        else:
            stack.enter_context(steering)
        if case.live:
            results(case, model, run)
            steering.alpha = 0.7
        runs = copy.deepcopy(model) if case.copied else model
        if case.copied:
            steering.alpha = -3.0  # is not the copy's business
        threads = [
            in_a_thread(lambda: results(case, runs, run)) for _ in range({"another": 1, "two": 2}.get(case.thread, 0))
        ]
        found = [joined(*thread) for thread in threads] or [results(case, runs, run)]
    lacking = {str(w.message).partition(":")[0] for w in told if "its gradient lacks" in str(w.message)}
    return found, lacking


def state(model):
    """The names and identities of all that a module has, and the values of its weights."""
    parts = {name: [(key, id(value)) for key, value in vars(m).items()] for name, m in model.named_modules()}
    insides = {
        name: [
            (key, id(value)) for kind in (m._parameters, m._buffers, m._forward_hooks) for key, value in kind.items()
        ]
        for name, m in model.named_modules()
    }
    return parts, insides, list(model.state_dict()), [bool(p._backward_hooks) for p in model.parameters()]


def distance(a, b, names):
    return sum(float((a[name] - b[name]).square().sum()) for name in names) ** 0.5


def check(case, model=None, run=None):
    """Whether it was right; False: it was refused. Anything else is a failure."""
    model = case.model() if model is None else model
    plan = random_plan(model, case.sites, 25, case.operation)
    before, tensors = state(model), snapshot(model)
    try:
        found, lacking = steered_results(case, model, plan, run)
    except austeer.SteeringError as error:
        reason = str(error)
        assert "not possible" in reason or (case.mode == "fused" and case.autocast and "autocast" in reason), reason
        found, lacking = [], set()
    assert state(model) == before
    assert_unchanged(model, tensors)
    exact, same = case.model(torch.float64), case.model()
    with formula_at(exact, plan, 0.7), formula_at(same, plan, 0.7):
        expected, own = results(case, exact, autocast=False), results(case, same)
    for got in found:
        assert got.keys() == expected.keys()
        for names in ({"logits"}, got.keys() - lacking - {"logits"}):
            error, rounding = distance(got, expected, names), distance(own, expected, names)
            size = distance(expected, dict.fromkeys(names, 0), names)
            least = 1e-5 if not case.autocast else 1e-2 if "logits" in names else 0.2  # the sign of an x may be another
            assert error <= 3 * rounding + least * size, (case, error, rounding, size)
    return bool(found)


#: The operations, sites and ways of autograd that a mode is for; what it is not for is refused, see test_path_choice.
SAMPLED = {mode: (POSSIBLE.get(mode, OPERATIONS), SITES, MODEL_RUNS) for mode in MODES} | {
    "fold": (POSSIBLE["fold"], WEIGHT_SITES, MODEL_RUNS[:3]),
    "bias": (POSSIBLE["bias"], SITES, MODEL_RUNS[:3]),
    "fused": (POSSIBLE["fused"], ("attention", "neuron"), MODEL_RUNS),
}


def sampled(mode, count):
    """Cases of a mode, the same ones each time."""
    operations, sites, runs = SAMPLED[mode]
    draw = random.Random(f"{mode} {count}")
    yes = (False, True)
    for _ in range(count):
        family = draw.choice(list(FAMILIES))
        there = [site for site in sites if (family, site) != ("qwen2_moe", "neuron")]
        chosen = tuple(draw.sample(there, draw.randint(1, len(there))))
        around = (draw.choice(runs), draw.choice(yes), draw.choice(yes), draw.choice(yes), draw.choice(yes))
        yield Case(family, draw.choice(operations), chosen, mode, *around, draw.choice(THREADS))


@pytest.mark.parametrize("mode", MODES)
def test_right_or_refused_and_then_as_it_was(mode):
    assert sum(check(case) for case in sampled(mode, 25)) > 5


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """One process that talks to itself."""
    meeting = tmp_path_factory.mktemp("gloo") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("autograd", GRADIENTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_data_parallel(group, operation, autograd):
    case = Case("llama", operation, SITES, "auto", autograd)
    model = case.model()
    run = DistributedDataParallel(model, find_unused_parameters=autograd == "evaluation")
    assert check(case, model, run)


@pytest.mark.parametrize("autograd", ["evaluation", "training"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled(operation, autograd):
    torch._dynamo.reset()
    case = Case("llama", operation, ("attention", "ffn"), "auto", autograd, live=True)
    model = case.model()
    assert check(case, model, torch.compile(model, backend="aot_eager"))
