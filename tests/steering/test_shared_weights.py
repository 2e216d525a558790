"""Weights that other models, modules, processes or files share: no edit in place, or the second to come is refused."""

import copy
import mmap
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import austeer
from austeer.steering import sharing
from austeer.steering.sharing import Memory, extents_of
from dense_formula import OPERATION, formula_logits, logits, random_plan
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows()
EDITS = ("fold", "bias")


def biased():
    return tiny_model("llama", mlp_bias=True, attention_bias=True)


def plan_for(model, operation="scale", seed=0, sites=("attention", "ffn")):
    return random_plan(model, sites, 25, operation, seed)


def rows(steering):
    return {row.path for row in steering.report()}, {row.reason for row in steering.report()}


def steers(model, plan, alpha=2.0):
    """The paths that are taken, with which the formula holds."""
    expected = formula_logits(copy.deepcopy(model), IDS, plan, alpha)
    with austeer.steer(model, plan, alpha) as steering:
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
        return rows(steering)


# --- another model of this process -----------------------------------------------------------------------------------


def assigned(model):
    other = biased()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def twin(model):
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def views(model):
    """Parts of larger tensors, in parameters of their own."""
    other = biased()
    for p, q in zip(model.parameters(), other.parameters()):
        whole = torch.cat([p.detach().flatten(), torch.zeros(7)])
        with torch.no_grad():
            q.set_(nn.Parameter(whole[: p.numel()].view(p.shape)))
        p.data = whole.as_strided(p.shape, p.stride())
    return other


def shallow(model):
    """copy.copy of every module: the dictionaries of parameters are the same ones."""

    def copied(module):
        other = copy.copy(module)
        other._modules = {name: copied(child) for name, child in module._modules.items()}
        return other

    return copied(model)


def through_numpy(model):
    """Storages of their own around the same memory."""
    other = biased()
    for p, q in zip(model.parameters(), other.parameters()):
        q.data = torch.from_numpy(p.detach().numpy())
    return other


WAYS = (assigned, twin, views, shallow, through_numpy)


@pytest.mark.parametrize("mode", EDITS)
@pytest.mark.parametrize("share", WAYS)
def test_a_model_whose_weights_are_edited_already_is_not_steered(share, mode):
    model = biased()
    other, plan = share(model), plan_for(model, OPERATION[mode])
    before = [p.clone() for p in other.parameters()]
    with austeer.steer(model, plan, 2.0, mode=mode):
        edited = [p.clone() for p in other.parameters()]
        assert not all(map(torch.equal, edited, before))
        for second in ("auto", "columns", "dense"):
            with pytest.raises(austeer.SteeringError, match=r"layers\.\d.*another steered model shares"):
                austeer.steer(other, plan_for(other, "push"), 1.0, mode=second).attach()
        with pytest.raises(austeer.SteeringError, match=r"shared with another model|another steered model shares"):
            austeer.steer(other, plan, 1.0, mode=mode).attach()
        assert all(map(torch.equal, other.parameters(), edited)) and not austeer.is_steered(other)
    assert all(map(torch.equal, other.parameters(), before))
    assert steers(other, plan)[0] == {mode}


@pytest.mark.parametrize("mode", EDITS)
@pytest.mark.parametrize("share", WAYS)
def test_a_model_beside_one_that_is_steered_at_run_time_runs_too(share, mode):
    model = biased()
    other, first, plan = share(model), plan_for(model, "push"), plan_for(model, OPERATION[mode], 1)
    expected = [formula_logits(biased(), IDS, *pair) for pair in ((first, 0.5), (plan, 2.0))]
    with austeer.steer(model, first, 0.5), austeer.steer(other, plan, 2.0) as steering:
        torch.testing.assert_close([logits(model, IDS), logits(other, IDS)], expected, rtol=1e-4, atol=1e-4)
        paths, reasons = rows(steering)
        assert paths == {"columns"} and all("another model that is steered" in reason for reason in reasons)
        with pytest.raises(austeer.SteeringError, match=f"'{mode}'.*another model that is steered"):
            austeer.steer(twin(other), plan, mode=mode)
    assert steers(other, plan)[0] == {mode}


def test_biases_that_steering_brings_along_are_no_one_elses():
    model = tiny_model()
    other, first, plan = twin(model), plan_for(model, "shift"), plan_for(model, "shift", 1)
    expected = [formula_logits(tiny_model(), IDS, one, 2.0) for one in (first, plan)]
    with austeer.steer(model, first, 2.0, mode="bias"), austeer.steer(other, plan, 2.0, mode="bias"):
        torch.testing.assert_close([logits(model, IDS), logits(other, IDS)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["fold", "bias", "columns"])
def test_a_module_of_a_steered_model_is_not_steered_for_another_one(mode):
    """Also where the plan of the first is for other layers."""
    model, other = biased(), biased()
    other.model.layers[2].mlp = model.model.layers[2].mlp
    plan = plan_for(model, OPERATION[mode], sites=["ffn"])
    first, last = (plan.take((plan.layer == layer).nonzero().flatten()) for layer in (0, 2))
    with austeer.steer(model, first, 2.0, mode="columns"):
        logits(model, IDS)
        for second in (mode, "auto"):
            with pytest.raises(austeer.SteeringError, match=r"layers\.2.*another"):
                austeer.steer(other, last, 2.0, mode=second).attach()
    assert steers(other, last)[0]


def test_views_of_one_storage_that_do_not_overlap_are_no_one_elses():
    model = biased()
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.data = part.view(p.shape)
    assert steers(model, plan_for(model))[0] == {"fold"}


def test_overlapping_counts_every_extent():
    t = torch.arange(40.0)
    parts = [t, t[:10], t[5:15], t[20:30:5], t[::2], t[:0], t[12:].view(4, 7)[:, 3:5]]
    memory = Memory(extents_of(parts))
    for start, stop in ((0, 5), (0, 40), (11, 12), (18, 21), (26, 28), (39, 40), (3, 3)):
        touched = set(range(start, stop))
        expected = sum(
            bool(touched & set(range(int(part.min()), int(part.max()) + 1))) for part in parts if part.numel()
        )
        assert memory.overlapping(t[start:stop]) == expected, (start, stop)


# --- another process, a file -----------------------------------------------------------------------------------------


def shared(model, folder):
    return model.share_memory()


def mapped(options):
    def load(model, folder):
        torch.save(model.state_dict(), folder / "model.pt")
        with torch.serialization.set_default_mmap_options(options):
            model.load_state_dict(torch.load(folder / "model.pt", mmap=True), assign=True)
        return model

    return load


def memmap(mode):
    def load(model, folder):
        for number, p in enumerate(model.parameters()):
            path = folder / f"{number}.bin"
            path.write_bytes(p.detach().numpy().tobytes())
            p.data = torch.from_numpy(np.memmap(path, np.float32, mode, shape=tuple(p.shape)))
        return model

    return load


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("operation", ["scale", "shift"])
@pytest.mark.parametrize(
    "share, edited",
    [
        (shared, False),
        (mapped(mmap.MAP_SHARED), False),
        (mapped(mmap.MAP_PRIVATE), True),
        (memmap("r"), False),  # a write would end the process
        (memmap("r+"), False),
        (memmap("c"), True),
    ],
)
def test_memory_that_others_see_is_not_edited(share, edited, operation, tmp_path):
    model = share(biased(), tmp_path)
    plan, mode = plan_for(model, operation), "bias" if operation == "shift" else "fold"
    if edited:
        assert steers(model, plan)[0] == {mode}
        return
    seen = [(p, p.clone()) for p in model.parameters()]
    paths, reasons = steers(model, plan)
    assert paths == {"columns"} and all("other processes or a file" in reason for reason in reasons)
    assert all(torch.equal(p, value) for p, value in seen)
    with pytest.raises(austeer.SteeringError, match=f"'{mode}'.*other processes or a file"):
        austeer.steer(model, plan, mode=mode)
    without = share(tiny_model(), tmp_path)  # in whose memory nothing is written
    assert steers(without, plan_for(without, "shift"))[0] == {"bias"}


def test_shared_memory_where_the_system_does_not_list_it(monkeypatch):
    monkeypatch.setattr(sharing, "sys", SimpleNamespace(platform="darwin"))
    model = biased()
    assert steers(model, plan_for(model))[0] == {"fold"}
    model.share_memory()
    assert steers(model, plan_for(model))[0] == {"columns"}


@pytest.mark.gpu
def test_what_was_sent_to_another_process_on_a_gpu():
    """Small tensors lie in one allocation, of which PyTorch remembers the last that was sent."""
    model = biased().cuda()
    plan, ids = plan_for(model), {name: t.cuda() for name, t in IDS.items()}
    with austeer.steer(model, plan, 2.0, mode="fold"):
        logits(model, ids)
    sent = [ForkingPickler.dumps(p) for p in model.parameters()]
    paths, reasons = rows(austeer.steer(model, plan))
    assert sent and paths == {"columns"} and all("other processes" in reason for reason in reasons)
