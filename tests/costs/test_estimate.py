"""Estimates against what they estimate: real tiny models, real measurements, and a 70B model that nobody has."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import austeer
from austeer.costs.estimate import estimate
from austeer.demo.demo import load_data
from austeer.errors import CaptureError, ModelError, PairsError, SiteError
from austeer.forward.capture import LastTokens
from austeer.forward.packing import batches
from austeer.measuring.counting import Counting
from austeer.models.load import load_offloaded
from austeer.models.sites import find_sites
from austeer.models.skeleton import load_config
from austeer.pairs.pairs import Pairs
from austeer.utils.machine import Machine
from tiny_models import tiny_model

#: 1 TFLOP/s and 1 GB/s, so that seconds are easy to compute.
MACHINE = Machine("cpu", free=10**10, host_free=10**10, disk_free=10**12, matmul=1e12, read=1e9)

PAIRS = Pairs.of([(f"Question {i}: is it {'so ' * (i % 5)}?", " Yes", " No, not at all") for i in range(40)])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_everything_that_can_be_exact_is(tiny_of, demo, family, share):
    """Tokens, batches, counters and buffers of a real run; mpt cannot share prompts."""
    model, tokenizer = tiny_of(family), demo[1]
    options = {"layers": [0, 1], "batch_tokens": 200, "block_pairs": 16, "max_length": 12, "share_prompts": share}
    report = austeer.measure(model, tokenizer, PAIRS, ["attention", "neuron"], progress=False, **options).report
    found = estimate(
        model.config, PAIRS, ["attention", "neuron"], tokenizer=tokenizer, machine=MACHINE, dtype="float32", **options
    )
    for name in ("pairs", "texts", "batches", "tokens_texts", "tokens_run", "tokens_padded"):
        assert getattr(found.work, name) == getattr(report, name), name
    assert found.work.sampled == 40 and found.depth == 2
    assert (found.work.tokens_run < found.work.tokens_texts) == (share and family == "llama")
    assert ("cannot share" in " ".join(found.notes)) == (share and family == "mpt")

    sites = {name: found_[:2] for name, found_ in find_sites(model, ["attention", "neuron"]).items()}
    counting = [Counting(2, found_[0].width, "cpu") for found_ in sites.values()]
    assert found.resident.counters == sum(
        t.nbytes for c in counting for t in tree_leaves(vars(c)) if torch.is_tensor(t)
    )
    capture = LastTokens(model, sites, 32)
    with capture.attached():
        capture.run(next(iter(batches([[5, 6]], 100))))
    assert found.resident.buffers == sum(buffer.nbytes for buffer in capture.buffers.values())
    assert found.layerwise is None or found.layerwise.buffers == found.resident.buffers // 2


def test_a_sample_is_scaled_to_all_pairs(tiny_of, demo):
    like = Pairs.of([("The soup was", " good", " bad")] * 64)
    config = tiny_of("llama").config
    options = {"tokenizer": demo[1], "machine": MACHINE, "block_pairs": 8, "share_prompts": False}
    whole = estimate(config, like, **options)
    part = estimate(config, like, sample=20, **options)
    assert (part.work.pairs, part.work.sampled) == (64, 16)
    assert replace(part.work, sampled=64) == whole.work and part.flops == whole.flops


def test_pairs_may_be_a_stream(tmp_path, tiny_of, demo):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in PAIRS))
    config = tiny_of("llama").config
    found = estimate(config, austeer.stream_pairs(file), tokenizer=demo[1], machine=MACHINE)
    assert found.work == estimate(config, PAIRS, tokenizer=demo[1], machine=MACHINE).work
    with pytest.raises(PairsError, match="at least 2"):
        estimate(config, austeer.stream_pairs(file, limit=1), tokenizer=demo[1], machine=MACHINE)


def test_without_a_tokenizer_it_is_said_so(tiny_of, demo):
    alone, asked = (estimate(tiny_of("llama").config, PAIRS, machine=MACHINE, tokenizer=t) for t in (None, demo[1]))
    assert "4 characters" in " ".join(alone.notes) and "characters" not in " ".join(asked.notes)
    assert alone.work.texts == asked.work.texts and alone.work.tokens_texts != asked.work.tokens_texts


def test_a_tokenizer_of_another_model_is_refused(demo):
    with pytest.raises(PairsError, match=r"vocabulary.*64"):
        estimate(tiny_model("llama").config, PAIRS, tokenizer=demo[1], machine=MACHINE)


@pytest.fixture(scope="module")
def saved(tiny_of, demo, tmp_path_factory):
    """A folder with a tiny bfloat16 model and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_of("llama").to(torch.bfloat16).save_pretrained(folder)
    demo[1].save_pretrained(folder)
    return str(folder)


@pytest.fixture
def ask(saved, demo):
    """Estimates for the saved model, without reading its tokenizer each time."""
    return partial(estimate, saved, PAIRS, tokenizer=demo[1])


def test_bytes_are_those_of_a_run_layer_by_layer(saved):
    found = estimate(saved, PAIRS, ["attention"], layers=[1], machine=MACHINE, batch_tokens=200)
    model, tokenizer = load_offloaded(saved, device="cpu")
    report = austeer.measure(
        *(model, tokenizer, PAIRS, ["attention"]), layers=[1], strategy="layerwise", batch_tokens=200, progress=False
    ).report
    norm = 2 * model.config.hidden_size  # the decoder's last one is there all the time
    assert found.layerwise.read - norm == report.weights_read
    assert found.layerwise.weights >= report.weights_held
    assert found.layerwise.hidden == report.tokens_padded * model.config.hidden_size * 2
    assert found.dtype == "bfloat16" and found.resident.weights == 2 * sum(p.numel() for p in model.parameters())


def test_a_folder_needs_no_weights(saved, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(saved) / name).read_bytes())
    alone, whole = (estimate(str(folder), PAIRS, device="cpu") for folder in (tmp_path, saved))
    assert alone.work == whole.work and alone.parameters == whole.parameters
    assert alone.machine.read is None and alone.resident.seconds is None and alone.layerwise.seconds is None
    assert whole.machine.read > 0 and whole.machine.matmul > 0 and whole.resident.seconds > whole.resident.compute
    assert "at least" in "\n".join(alone.lines()) and "at least" not in "\n".join(whole.lines())


def test_seconds_follow_from_the_rates(ask):
    found = ask(machine=MACHINE)
    # 3 layers of q 48, k and v 24, o, and an MLP of 48; queries and outputs of width 48
    matrices = 32 * 48 + 2 * 32 * 24 + 48 * 32 + 3 * 32 * 48
    assert found.active == 3 * matrices
    assert found.flops == 2 * 3 * (matrices * found.work.tokens_padded + 2 * 48 * found.work.squares)
    need = found.resident
    assert (need.compute, need.disk) == (found.flops / 1e12, need.read / 1e9)
    assert need.seconds == need.compute + need.disk
    slow = ask(machine=replace(MACHINE, matmul=1e6), checkpoint="momentum.checkpoint")
    need, hidden = slow.layerwise, slow.work.tokens_padded * 32 * 2
    assert (need.place, need.hidden, need.moved) == ("file", 2 * hidden, 2 * 3 * hidden)
    assert need.disk == (need.read + need.moved) / 1e9 and need.seconds == need.compute == slow.flops / 1e6


def test_a_dtype_changes_what_is_held_not_what_is_read(ask):
    one, other = (ask(dtype=dtype, machine=MACHINE) for dtype in ("auto", "float32"))
    assert other.resident.weights == 2 * one.resident.weights and other.resident.read == one.resident.read
    assert "bfloat16 and converted to float32" in " ".join(other.notes)


def test_what_fits_is_chosen(ask):
    roomy = ask(machine=MACHINE)
    assert roomy.strategy == "resident" and roomy.resident.fits and "10 GB" in roomy.why
    tight = replace(MACHINE, free=roomy.layerwise.memory + 10**6, host_free=roomy.layerwise.memory + 10**6)
    assert tight.free < roomy.resident.memory
    options = {"machine": tight, "batch_tokens": roomy.batch_tokens}
    found = ask(**options)
    assert (found.resident.fits, found.layerwise.fits, found.strategy) == (False, True, "layerwise")
    assert "does not fit" in found.why
    found = ask(strategy="resident", **options)
    assert found.strategy == "resident" and "as asked" in found.why
    nothing = ask(machine=replace(MACHINE, free=10**4, host_free=10**4))
    assert nothing.strategy == "layerwise" and "nor does" in nothing.why and nothing.layerwise.place == "file"
    full = replace(tight, disk_free=10)
    found = ask(machine=full, batch_tokens=roomy.batch_tokens, checkpoint="x")
    assert not found.layerwise.fits


def test_hidden_states_are_where_there_is_room(ask):
    gpu = replace(MACHINE, device="cuda:0")
    assert ask(machine=gpu).layerwise.place == "device"
    size = ask(machine=gpu).layerwise.hidden
    small = replace(gpu, free=2 * size)
    assert ask(machine=small, batch_tokens=500).layerwise.place == "memory"
    assert ask(machine=replace(small, host_free=size), batch_tokens=500).layerwise.place == "file"


def test_of_a_quantised_checkpoint_little_is_known(saved, ask):
    config = load_config(saved)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    found = estimate(config, PAIRS, machine=MACHINE)
    assert found.resident.weights is found.resident.memory is found.resident.fits is found.resident.seconds is None
    assert found.layerwise is None and found.strategy == "resident" and "quantised" in " ".join(found.notes)
    assert found.parameters == ask(machine=MACHINE).parameters
    assert "not known" in "\n".join(found.lines()) and json.loads(json.dumps(found.to_json()))["layerwise"] is None
    with pytest.raises(CaptureError, match="quantised"):
        estimate(config, PAIRS, strategy="layerwise", machine=MACHINE)


def test_a_config_without_a_dtype_is_said_so():
    config = tiny_model("llama").config
    config.dtype = None
    found = estimate(config, PAIRS, machine=MACHINE)
    assert found.dtype == "float32" and "names no dtype" in " ".join(found.notes)


def test_report_for_people_and_machines(tiny_of, demo):
    found = estimate(tiny_of("mixtral").config, PAIRS, tokenizer=demo[1], machine=MACHINE)
    text = "\n".join(found.lines())
    assert "2 of 4 experts" in text and "1 TFLOP/s" in text and "converted" in text
    data = json.loads(json.dumps(found.to_json()))
    assert data["resident"]["memory"] == found.resident.memory and data["work"]["tokens_run"] == found.work.tokens_run
    assert data["parameters"]["total"] == found.parameters.total and data["machine"]["device"] == "cpu"


LARGE = """
import resource, sys
from transformers import AutoConfig
import austeer
from austeer.costs.estimate import estimate
from austeer.utils.machine import Machine
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
llama = AutoConfig.for_model(
    "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, dtype="bfloat16",
)
machine = Machine("cpu", free=10**11, host_free=10**11, disk_free=10**13, matmul=1e14, read=2e9)
found = [estimate(c, [("p", "a", "b")] * 300, machine=machine) for c in (llama, AutoConfig.for_model("deepseek_v3"))]
print([(f.parameters.total, f.strategy, f.layerwise.read, f.resident.counters) for f in found])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_70b_model_in_3_gb():
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    [llama, deepseek] = eval(run.stdout)
    total, matrices = 70_553_706_496, 128256 * 8192
    assert llama == (total, "layerwise", 2 * (total - matrices), 80 * 80 * 2 * 8192)
    assert deepseek[0] == 671_026_404_352 and deepseek[1] == "layerwise"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "fast"}, CaptureError, "strategy.*'fast'.*resident, layerwise"),
        ({"dtype": "int8"}, ModelError, "dtype.*'int8'.*float32"),
        ({"sites": []}, SiteError, "sites.*none"),
        ({"sites": ["head"]}, SiteError, "site.*'head'"),
        ({"layers": [3]}, SiteError, "layers.* 3.* 0 to 2"),
        ({"block_pairs": 0}, PairsError, "block_pairs.* 0"),
        ({"batch_tokens": -1}, PairsError, "batch_tokens.*-1"),
        ({"max_length": 0}, PairsError, "max_length.* 0"),
    ],
)
def test_what_measure_would_refuse(options, error, message):
    with pytest.raises(error, match=message):
        estimate(tiny_model("llama").config, PAIRS, machine=MACHINE, **options)


def test_no_config(tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}.*config"):
        estimate(str(tmp_path), PAIRS, machine=MACHINE)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": []}')
    with pytest.raises((ModelError, SiteError), match="T5"):
        estimate(str(tmp_path), PAIRS, machine=MACHINE)


def test_the_demo(demo):
    found = estimate("demo", load_data().momentum[:8], device="cpu", sample=8)
    assert found.parameters.total == sum(p.numel() for p in demo[0].parameters())
    assert found.resident.weights == 4 * found.parameters.total and not found.notes
