"""Models in the shapes of published ones: their sizes, the published numbers of parameters, and the look at memory."""

import pytest
import torch

from austeer import find_sites
from austeer.models.sites import fingerprint
from bench import shapes

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_has_as_many_parameters_as_the_published_model(name):
    """What is published beside the checkpoints; a wrong width, depth, head or tie would change it."""
    published = {
        "Llama-3.1-8B": 8030261248,
        "Qwen3-8B": 8190735360,
        "Gemma2-9B": 9241705984,
        "Qwen3-30B-A3B": 30532122624,
        "Qwen2.5-32B": 32763876352,
    }
    assert shapes.SHAPES[name].parameters == shapes.count(shapes.SHAPES[name]) == published[name]


def test_settings_that_no_size_shows_reach_the_config():
    llama, gemma, moe = (shape.config() for shape in (shapes.LLAMA_8B, shapes.GEMMA2_9B, shapes.QWEN3_30B_A3B))
    assert llama.rope_parameters["rope_type"] == "llama3" and llama.rope_parameters["rope_theta"] == 5e5
    assert llama.rope_parameters["factor"] == 8
    assert (gemma.sliding_window, gemma.attn_logit_softcapping, gemma.query_pre_attn_scalar) == (4096, 50, 256)
    assert gemma.layer_types == ["sliding_attention", "full_attention"] * 21
    assert (moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size) == (128, 8, 768)
    assert shapes.QWEN3_8B.config().rope_parameters["rope_theta"] == 1e6
    for shape in shapes.SHAPES.values():
        known = {**shape.config().to_dict(), **shape.config().attribute_map}
        assert set(shape.values) <= set(known), f"{shape.name}: settings that its config class does not have"


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_tiny_shape_keeps_the_architecture(name):
    shape = shapes.tiny(shapes.SHAPES[name])
    model = shapes.build(shape, CPU, torch.float32)
    assert model.config.model_type == shapes.SHAPES[name].model_type and not model.training
    assert shape.parameters == sum(p.numel() for p in model.parameters()) < 2e5
    sites = find_sites(model, ["attention", "ffn", "layer"])
    assert fingerprint(model, sites).layers == 2
    again = shapes.build(shape, CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_weights_are_made_in_the_dtype_that_is_asked_for():
    model = shapes.build(shapes.tiny(shapes.LLAMA_8B), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 24 * 10**9)
    monkeypatch.setattr(shapes.AutoModelForCausalLM, "from_config", lambda *a, **k: pytest.fail("made"))
    with pytest.raises(
        shapes.TooLargeError,
        match=r"Qwen2.5-32B: needs 72.0 GB \(32.76e9 weights in bfloat16, and 6.4 GB beside them\), found 24.0 GB free",
    ):
        shapes.build(shapes.QWEN25_32B, CPU)
