"""Last-token activations: equal to those of each text alone, in every family, and nothing left behind."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from austeer import CaptureError, find_sites
from austeer.forward.capture import LastTokens
from austeer.forward.packing import batches
from austeer.models.sites import LAYOUTS
from austeer.models.structure import first_tensor

IDS = [[5, 6, 7], [1000, 2, 2, 31, 9, 4, 77, 12, 8, 300, 41], [9], [17, 3, 3, 3, 3, 3, 21]]


def alone(model, ids, sites):
    """Site name -> [layers, width]: the last token's activations of one unpadded text, through the full model."""
    seen = {name: [] for name in sites}
    handles = []

    def keep(name, x):
        # A copy: Falcon adds to its MLP's output in place. Some blocks make [tokens, width] of their input.
        seen[name].append(x.reshape(-1, x.shape[-1])[-1].clone())

    for name, site in ((name, site) for name, found in sites.items() for site in found):
        module = model.get_submodule(site.path)
        if site.side == "input":
            handle = module.register_forward_pre_hook(lambda m, args, k=name: keep(k, args[0]))
        else:
            handle = module.register_forward_hook(lambda m, args, out, k=name: keep(k, first_tensor(out)))
        handles.append(handle)
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows) for name, rows in seen.items()}


def run(capture, ids, rows=None, share=False):
    """All texts in as few batches as there can be; text i goes into ``rows[i]`` of the buffers."""
    for batch in batches(ids, 10**6, share):
        capture.run(batch if rows is None else replace(batch, texts=torch.tensor(rows)[batch.texts]))


def hooks_of(model):
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


@pytest.mark.parametrize("family", LAYOUTS)
def test_padded_batch_equals_each_text_alone(tiny_of, family):
    model = tiny_of(family)
    sites = find_sites(model)
    capture = LastTokens(model, sites, len(IDS))
    with capture.attached():
        run(capture, IDS)
    for row, ids in enumerate(IDS):
        for name, expected in alone(model, ids, sites).items():
            torch.testing.assert_close(capture.buffers[name][row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_kept_as_the_model_made_them(tiny, dtype):
    tiny.to(dtype)
    sites = find_sites(tiny)
    capture = LastTokens(tiny, sites, 1)
    with capture.attached():
        run(capture, [IDS[1]])
    for name, expected in alone(tiny, IDS[1], sites).items():
        assert capture.buffers[name].dtype == dtype and torch.equal(capture.buffers[name][0], expected)


def test_a_site_wider_than_the_model_is_not_rounded_and_a_mixed_one_is_refused(tiny):
    """A projection in float64 inside a float32 model: its input must be kept as it is."""

    def widen(layer):
        module = layer.self_attn.o_proj.double()
        module.register_forward_pre_hook(lambda m, args: (args[0].double(),))
        module.register_forward_hook(lambda m, args, output: output.float())

    widen(tiny.model.layers[0])
    capture = LastTokens(tiny, find_sites(tiny, ["attention"]), 1)
    with capture.attached(), pytest.raises(CaptureError, match=r"'attention'.*float32.*layer 1.*float64"):
        run(capture, [IDS[0]])
    for layer in tiny.model.layers[1:]:
        widen(layer)
    capture = LastTokens(tiny, find_sites(tiny, ["attention"]), 1)
    with capture.attached():
        run(capture, [IDS[0]])
    assert capture.buffers["attention"].dtype == torch.float64


def test_rows_say_where_texts_go_and_others_stay(tiny):
    capture = LastTokens(tiny, find_sites(tiny, ["ffn"]), 5)
    with capture.attached():
        run(capture, [IDS[0]])
        capture.buffers["ffn"].fill_(-7)
        run(capture, [IDS[0], IDS[3]], [4, 1])
    sites = find_sites(tiny, ["ffn"])
    for row, ids in ((4, IDS[0]), (1, IDS[3])):
        torch.testing.assert_close(capture.buffers["ffn"][row], alone(tiny, ids, sites)["ffn"], rtol=1e-5, atol=1e-6)
    assert (capture.buffers["ffn"][[0, 2, 3]] == -7).all()


def test_head_does_not_run_and_no_cache_is_made(tiny):
    ran, outputs = [], []
    tiny.lm_head.register_forward_hook(lambda *a: ran.append("head"))
    tiny.register_forward_hook(lambda *a: ran.append("model with head"))
    tiny.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    capture = LastTokens(tiny, find_sites(tiny), 1)
    with capture.attached():
        run(capture, [IDS[0]])
    assert ran == []
    assert len(outputs) == 1 and outputs[0].past_key_values is None and outputs[0].hidden_states is None


@pytest.mark.parametrize("fails", [False, True])
def test_other_forward_passes_are_not_read(tiny, fails):
    capture, norm = LastTokens(tiny, find_sites(tiny), 1), tiny.model.layers[1].post_attention_layernorm
    own = tiny.model.layers[0].mlp.register_forward_hook(lambda *a: None)
    hooks = hooks_of(tiny)
    with capture.attached():
        assert len(hooks_of(tiny)) > len(hooks)
        run(capture, [IDS[0]])
        before = {name: t.clone() for name, t in capture.buffers.items()}
        if fails:
            weight, norm.weight = norm.weight, torch.nn.Parameter(torch.ones(3))  # of the wrong width: the model raises
            with pytest.raises(RuntimeError):
                run(capture, [IDS[0]])
            norm.weight = weight
        tiny(torch.tensor([IDS[1]]))
    assert all(torch.equal(before[name], capture.buffers[name]) for name in before)
    with pytest.raises(RuntimeError, match="afterwards") if fails else nullcontext(), capture.attached():
        if fails:
            raise RuntimeError("hooks go also afterwards")
    assert hooks_of(tiny) == hooks
    own.remove()


def test_site_that_does_not_run_is_named(tiny):
    capture = LastTokens(tiny, find_sites(tiny, ["attention", "ffn"]), 1)
    with capture.attached():
        run(capture, [IDS[0]])
        tiny.model.layers[1].forward = lambda hidden, *args, **kwargs: hidden  # a layer that is skipped from now on
        with pytest.raises(CaptureError, match=r"'attention'.*layer 1\b.*\b2 sites"):
            run(capture, [IDS[0]])


def test_a_tensor_that_is_not_one_row_a_token_is_refused(tiny):
    for layer in tiny.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: out.transpose(0, 1))
        layer.register_forward_hook(lambda m, args, out: out[:, : args[0].shape[1]])
    capture = LastTokens(tiny, find_sites(tiny, ["ffn"]), 2)
    with capture.attached(), pytest.raises(CaptureError, match=r"'ffn'.*layer 0.*\(3, 1, 32\).*\[1, 3, width\]"):
        run(capture, [IDS[0]])


def test_a_projection_that_is_called_by_keyword(tiny):
    sites = find_sites(tiny, ["attention"])
    expected = alone(tiny, IDS[0], sites)["attention"]
    for site in sites["attention"]:
        module = tiny.get_submodule(site.path)
        parent = tiny.get_submodule(site.path.rpartition(".")[0])
        parent.o_proj = ByKeyword(module)
    sites = {"attention": [replace(site, path=f"{site.path}.inner") for site in sites["attention"]]}
    capture = LastTokens(tiny, sites, 1)
    with capture.attached():
        run(capture, [IDS[0]])
    assert torch.equal(capture.buffers["attention"][0], expected)


class ByKeyword(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(input=x)
