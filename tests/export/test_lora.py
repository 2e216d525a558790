"""The files of an exported LoRA adapter, what it takes to write them, and what is refused."""

import copy
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.nn.utils import prune
from transformers import LlamaConfig

import austeer
from adapters import config_of, tensors_of
from austeer.export import export_lora
from austeer.models.skeleton import skeleton
from dense_formula import WEIGHT_SITES, keep_layers, random_plan
from tiny_models import tiny_model

# --- files -----------------------------------------------------------------------------------------------------------


def test_the_files_are_what_engines_read(model, out):
    plan = random_plan(model, ("attention", "ffn"), 20)
    assert export_lora(plan, model, out, alpha=3) == out
    assert {file.name for file in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "austeer.json"}
    config, tensors = config_of(out), tensors_of(out)
    counts = torch.bincount(plan.layer + 3 * torch.tensor([site == "ffn" for site in plan.site]))
    rank = int(counts.max())
    paths = [f"model.layers.{n}.{path}" for n in range(3) for path in ("self_attn.o_proj", "mlp.down_proj")]
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["r"] == config["lora_alpha"] == rank
    assert config["target_modules"] == paths
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["fan_in_fan_out"] or config["use_rslora"])
    # vLLM refuses adapters with these; TGI reads fan_in_fan_out, SGLang target_modules as a list.
    assert config["bias"] == "none" and config["modules_to_save"] is None and "lora_bias" not in config
    assert config["base_model_name_or_path"] == type(model).__name__
    assert set(tensors) == {f"base_model.model.{path}.lora_{m}.weight" for path in paths for m in "AB"}
    for path in paths:
        weight = model.get_parameter(f"{path}.weight")
        down, up = (tensors[f"base_model.model.{path}.lora_{m}.weight"] for m in "AB")
        assert down.shape == (rank, weight.shape[1]) and up.shape == (weight.shape[0], rank)
        assert down.dtype == up.dtype == weight.dtype
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_record_says_what_was_exported(model, out):
    plans = [random_plan(model, "ffn", 4), random_plan(model, "attention", 3, seed=1)]
    export_lora([plans[0], (plans[1], -0.5)], model, out, alpha=3)
    record = json.loads((out / "austeer.json").read_text(encoding="utf-8"))
    assert record["austeer"] == austeer.__version__ and record["kind"] == "lora"
    assert record["model"] == type(model).__name__ and record["revision"] is None
    assert record["rank"] == config_of(out)["r"]
    assert record["layers"] == sorted({*plans[0].layer.tolist(), *plans[1].layer.tolist()})
    assert [(plan["alpha"], plan["k"], plan["sites"]) for plan in record["plans"]] == [
        (3.0, 4, ["ffn"]),
        (-0.5, 3, ["attention"]),
    ]
    assert all(re.fullmatch(r"[0-9a-f]{64}", plan["digest"]) for plan in record["plans"])


def test_others_may_read_the_files(model, out):
    export_lora(random_plan(model, "ffn", 3), model, out)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}
    (out.parent / "plain").write_text("")
    assert modes == {stat.S_IMODE((out.parent / "plain").stat().st_mode)}


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16, "float16", None])
def test_dtype(model, dtype, out):
    narrow = copy.deepcopy(model).bfloat16()
    export_lora(random_plan(model, WEIGHT_SITES, 9), narrow, out, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.bfloat16
    assert {t.dtype for t in tensors_of(out).values()} == {wanted}


# --- which layers, which rank ----------------------------------------------------------------------------------------


def test_layers_without_aus_are_there_as_zeros(model, out):
    """TGI drops a kind of layer of which one is missing; SGLang and TGI know one rank."""
    export_lora(keep_layers(random_plan(model, "ffn", 30), {1}), model, out)
    tensors = tensors_of(out)
    assert len(tensors) == 6 and len(config_of(out)["target_modules"]) == 3
    assert {int(key.split(".")[4]) for key, t in tensors.items() if t.any()} == {1}
    assert all("mlp.down_proj" in key for key in tensors), "kinds of layers that no plan steers are left alone"


def test_layers_of_another_kind_are_left_out(out):
    mixture = tiny_model("qwen3_next")  # full attention in every second layer
    plan = random_plan(mixture, "attention", 40)
    linear = keep_layers(plan, {0})
    export_lora(linear, mixture, out)
    found = [path.split(".", 3)[2:] for path in config_of(out)["target_modules"]]
    assert found == [["0", "linear_attn.out_proj"], ["2", "linear_attn.out_proj"]]
    export_lora(keep_layers(plan, {0, 1}), mixture, out, force=True)
    assert [path.split(".")[3] for path in config_of(out)["target_modules"]] == ["linear_attn", "self_attn"] * 2


def test_only_the_language_model_of_a_multimodal_one_is_named(out):
    model = tiny_model("gemma3")
    export_lora(random_plan(model, ("attention", "ffn"), 9), model, out)
    assert all(path.startswith("model.language_model.layers.") for path in config_of(out)["target_modules"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_rank_is_the_smallest_that_is_exact(model, out, data):
    count = data.draw(st.integers(1, 60))
    plan = random_plan(model, ("ffn", "neuron"), count, seed=data.draw(st.integers(0, 99)))
    plan = plan.take(torch.randperm(len(plan))[: data.draw(st.integers(1, len(plan)))])
    model = copy.deepcopy(model).double()
    export_lora(plan, model, out, alpha=2.0, force=True)
    config, tensors = config_of(out), tensors_of(out)
    ranks = []
    for layer in range(3):
        path = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        change = tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
        ranks.append(int(torch.linalg.matrix_rank(change)))
    assert config["r"] == max(1, *ranks)


def test_a_larger_rank_is_padded(model, out, tmp_path):
    plan = random_plan(model, ("ffn", "neuron"), 15)
    export_lora(plan, model, out)
    export_lora(plan, model, tmp_path / "padded", rank=17)
    least = config_of(out)["r"]
    assert least < 17 and config_of(tmp_path / "padded")["r"] == config_of(tmp_path / "padded")["lora_alpha"] == 17
    padded = tensors_of(tmp_path / "padded")
    for key, tensor in tensors_of(out).items():
        dim = 0 if "lora_A" in key else 1
        assert torch.equal(padded[key].narrow(dim, 0, least), tensor)
        assert not padded[key].narrow(dim, least, 17 - least).any()


def test_alpha_0_is_an_adapter_that_does_nothing(model, out):
    export_lora(random_plan(model, "ffn", 9), model, out, alpha=0)
    assert config_of(out)["r"] == 1 and not any(t.any() for t in tensors_of(out).values())


def test_the_model_is_left_as_it_is(model, out):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    export_lora(random_plan(model, WEIGHT_SITES, 30), model, out, alpha=5)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_only_experts_with_aus_are_written(out):
    mixture = tiny_model("mixtral")
    export_lora(keep_layers(random_plan(mixture, "ffn", 60), {1}), mixture, out, experts=True)
    assert config_of(out)["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    assert len(tensors_of(out)) == 2


# --- memory ----------------------------------------------------------------------------------------------------------

_MEASURED = """
import sys, threading, time
import torch
from austeer import Plan
from austeer.export import export_lora
from austeer.export.model_weights import StoredWeights

def kilobytes(what):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(what)).split()[1])

plan, model, out = sys.argv[1:]
plan = Plan.from_pretrained(plan)
StoredWeights(model)  # all that is imported takes its memory
before, peak, done = {w: kilobytes(w) for w in ("RssAnon", "VmRSS")}, {"RssAnon": 0, "VmRSS": 0}, threading.Event()

def watch():
    while not done.wait(0.001):
        for what in peak:
            peak[what] = max(peak[what], kilobytes(what))

watcher = threading.Thread(target=watch)
watcher.start()
export_lora(plan, model, out, alpha=2.0, progress=False)
done.set()
watcher.join()
print(*(1024 * (peak[what] - before[what]) for what in ("RssAnon", "VmRSS")))
"""


def write_large(folder, config):
    """A checkpoint of one file a layer; its layers are alike, so that writing is all that takes time."""
    from safetensors.torch import save_file

    network = skeleton(config, torch.bfloat16)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    values, size, files = {}, 0, {}
    for name, p in network.named_parameters():
        layer = re.search(r"layers\.(\d+)", name)
        files.setdefault(f"model-{int(layer[1]) if layer else config.num_hidden_layers:05d}.safetensors", {})[name] = p
    for file, parameters in files.items():
        for name, p in parameters.items():
            kind = re.sub(r"\d+", "#", name)
            if kind not in values:
                values[kind] = torch.randn(p.shape, generator=generator).bfloat16()
        save_file({name: values[re.sub(r"\d+", "#", name)] for name in parameters}, folder / file)
        size += (folder / file).stat().st_size
    places = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return network, size, values


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_large_checkpoint_takes_little_memory(tmp_path):
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=1000,
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    (tmp_path / "large").mkdir()
    network, size, values = write_large(tmp_path / "large", config)
    assert size > 5e8
    plan = random_plan(network, ("attention", "ffn"), 300)
    plan.save_pretrained(tmp_path / "plan")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *(str(tmp_path / name) for name in ("plan", "large", "adapter"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    taken, resident = map(int, done.stdout.split())
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert taken < 5e7 + 2 * adapter, f"{taken / 1e6:.0f} MB for an adapter of {adapter / 1e6:.0f} MB"
    assert resident < 0.2 * size, "files that were read are let go of"
    tensors = tensors_of(tmp_path / "adapter")
    for layer in (0, 2, 4):
        rows = plan.of("ffn")[plan.layer[plan.of("ffn")] == layer]
        rows = rows[plan.index[rows].argsort()]
        weight = values["model.layers.#.mlp.down_proj.weight"][plan.index[rows].long()]
        exact = ((2 * plan.beta[rows]).double()[:, None] * weight.double()).bfloat16()
        found = tensors[f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_A.weight"]
        assert torch.equal(found[: len(rows)], exact) and not found[len(rows) :].any()


def test_a_pruned_layer_without_aus_does_not_matter(tmp_path):
    """The adapter has every layer of a kind; what is not edited need not be editable."""
    model = tiny_model("llama")
    plan = random_plan(model, "attention", 20)
    prune.random_unstructured(model.model.layers[0].self_attn.o_proj, "weight", amount=0.5)
    rest = plan.take((plan.layer > 0).nonzero().flatten())
    assert tensors_of(export_lora(rest, model, tmp_path / "adapter"))
