"""Parameters, operations and activations read off shapes, against those of real tiny models of every family."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from austeer.costs.shapes import batch_bytes, count_parameters, layer_work
from austeer.forward.capture import LastTokens
from austeer.forward.packing import batches
from austeer.models.sites import find_sites
from austeer.models.skeleton import skeleton
from austeer.models.structure import decoder_of
from tiny_models import FAMILIES, tiny_model


def works_of(model):
    sites = find_sites(model, ["layer", "attention"])
    return [layer_work(model, *pair) for pair in zip(sites["layer"], sites["attention"])]


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_has_the_model_s_parameters_and_sites(family):
    model = tiny_model(family)
    without = skeleton(model.config, torch.bfloat16)
    assert {p.device.type for p in without.parameters()} == {"meta"}
    assert find_sites(without) == find_sites(model)
    layers = find_sites(model, ["layer"])["layer"]
    found = count_parameters(without, layers)
    assert found == count_parameters(model, layers)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert sum(found.layers) + found.embedding == sum(p.numel() for p in decoder_of(model).parameters())
    assert model.config.dtype != torch.bfloat16, "the caller's config was changed"


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_run(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")  # the only one whose products torch counts on a CPU
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    rows, length = 3, 11
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder_of(model)(input_ids=torch.randint(3, 60, (rows, length)), use_cache=False)
    works = works_of(skeleton(model.config, torch.float32))
    found = sum(work.flops(rows * length, rows * length**2) for work in works)
    if family == "qwen3_next":  # half of its layers have linear attention, whose recurrence is left out
        assert [work.attention for work in works] == [0, 96, 0, 96]
        assert found < counter.get_total_flops()
    else:
        assert found == counter.get_total_flops()


def test_active_parameters_of_mixtures_by_hand():
    # h 32, q 48, k and v 24, o: 48 x 32; router 4 x 32; 2 of 4 experts of 3 matrices 32 x 48
    attention = 32 * 48 + 2 * 32 * 24 + 48 * 32
    mixtral = works_of(tiny_model("mixtral"))
    assert [work.active for work in mixtral] == [attention + 4 * 32 + 2 * 3 * 32 * 48] * 3
    assert mixtral[0].experts == (2, 4)
    # the first layer is dense; the others have 2 of 4 experts of width 24, and a shared one that always runs
    latent = 32 * 16 + 16 * 4 * 12 + 32 * (8 + 4) + 8 * 4 * (8 + 12) + 48 * 32
    deepseek = works_of(tiny_model("deepseek_v3"))
    assert deepseek[0].active == latent + 3 * 32 * 48 and deepseek[0].experts is None
    assert deepseek[1].active == latent + 4 * 32 + (2 + 1) * 3 * 32 * 24 and deepseek[1].experts == (2, 4)
    # Llama 4 runs all its experts on every token
    assert works_of(tiny_model("llama4_text"))[1].experts == (4, 4)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in the context took at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and id(t.untyped_storage()) not in given | self.known:
                storage = t.untyped_storage()
                self.known.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return out

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(name, torch.float32) for name in FAMILIES if name not in ("falcon", "qwen3_next")]
    + [(name, torch.bfloat16) for name in ("llama", "mixtral")],
    ids=str,
)
def test_activations_within_a_factor_of_2(family, dtype):
    model = tiny_model(family).to(dtype)
    decoder, ids = decoder_of(model), torch.randint(3, 60, (4, 48))
    with torch.no_grad():
        decoder(input_ids=ids, use_cache=False)  # what is made once
        with Peak() as peak:
            decoder(input_ids=ids, use_cache=False)
    assert 0.5 < peak.most / batch_bytes(model, works_of(model), 4, 48, dtype.itemsize) < 2


@pytest.mark.parametrize(("family", "form"), [("llama", "tensor"), ("gemma3_text", "mapping")])
def test_masks_of_shared_prompts_within_a_factor_of_2(family, form):
    model = tiny_model(family)
    prompt = [3 + i % 50 for i in range(80)]
    texts = [[first, *prompt, answer] for first in (5, 6, 7) for answer in (8, 9)]
    [batch] = batches(texts, 10**4)
    assert batch.sees is not None
    rows, length = batch.ids.shape
    capture = LastTokens(model, find_sites(model, ["layer"]), len(texts))
    capture.tree = form
    with capture.attached():
        capture.run(batch)
        with Peak() as peak:
            capture.run(batch)
    with_masks, without = (batch_bytes(model, works_of(model), rows, length, 4, tree) for tree in (True, False))
    assert 0.5 < peak.most / with_masks < 2 and with_masks > 1.3 * without
