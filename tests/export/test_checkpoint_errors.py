"""Folded checkpoints: what is refused before anything is written, and what an interruption leaves."""

import copy
import json
import resource
import signal
import subprocess
import sys

import peft
import pytest
import torch
from accelerate import disk_offload
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from austeer.export.checkpoint import export_checkpoint
from austeer.export.edits import ExportError
from austeer.export.model_weights import INDEX
from dense_formula import logits, random_plan
from tiny_checkpoints import BATCH, assert_steered, expected, loaded, saved
from tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::austeer.export.edits.ExportWarning")


# --- what is refused before anything is written ----------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    return saved(tiny_model("llama"), tmp_path / "base")


def untouched(tmp_path):
    return [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_value_that_the_dtype_has_not(tmp_path):
    model = tiny_model("llama").half()
    base = saved(model, tmp_path / "base")
    with pytest.raises(ExportError, match=r"layers.\d.mlp.down_proj.*torch.float16"):
        export_checkpoint(random_plan(model, "ffn", 5), base, tmp_path / "out", alpha=1e7)
    assert untouched(tmp_path)


def test_an_output_that_is_there(base, tmp_path):
    model = tiny_model("llama")
    plan, out = random_plan(model, "ffn", 5), tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ExportError, match=f"{out}: exists"):
        export_checkpoint(plan, base, out)
    assert [file.name for file in out.iterdir()] == ["mine"]
    export_checkpoint(plan, base, out, force=True)
    assert not (out / "mine").exists() and (out / "model.safetensors").exists()
    again = export_checkpoint(plan, out, tmp_path / "again")
    before = sorted(tmp_path.rglob("*"))
    loaded_ = AutoModelForCausalLM.from_pretrained(out)
    for source, place in (
        *((base, place) for place in (base, tmp_path, base / ".." / "base", base / "config.json")),
        *((out, out / "model.safetensors"), (out, out), (loaded_, out)),
    ):
        with pytest.raises(ExportError, match="holds the model"):
            export_checkpoint(plan, source, place, force=True)
    with pytest.raises(ExportError, match=rf"{base}.*'config\.json'.*austeer\.json"):
        export_checkpoint(plan, out, base, force=True)
    assert sorted(tmp_path.rglob("*")) == before and (base / "model.safetensors").is_file()
    export_checkpoint(plan, base, again, force=True)


def test_the_hub_s_cache_is_not_replaced(tmp_path):
    model, folder = tiny_model("llama"), tmp_path / "snapshots" / "main"
    blobs = saved(model, tmp_path / "blobs")
    folder.mkdir(parents=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    (blobs / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ExportError, match=f"{blobs}.*model"):
        export_checkpoint(random_plan(model, "ffn", 5), folder, blobs, force=True)
    assert (blobs / "model.safetensors").is_file()


@pytest.mark.parametrize("relative", [False, True])
def test_an_index_that_names_files_elsewhere(relative, tmp_path):
    model = tiny_model("llama")
    base = saved(model, tmp_path / "base", max_shard_size="20KB")
    index = json.loads((base / INDEX).read_text())
    first = min(index["weight_map"].values())
    (base / first).rename(tmp_path / "elsewhere.safetensors")
    name = "../elsewhere.safetensors" if relative else str(tmp_path / "elsewhere.safetensors")
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"index.json.*elsewhere.safetensors'"):
        export_checkpoint(random_plan(model, "ffn", 5), base, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_no_space(base, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 50_000}))
    plan = random_plan(tiny_model("llama"), "ffn", 5)
    with pytest.raises(ExportError, match=r"out.* 0.1 MB.* 0.1 MB"):
        export_checkpoint(plan, base, tmp_path / "out")
    with pytest.raises(ExportError, match=r"out.* 0.3 MB"):  # saved first, then folded
        export_checkpoint(plan, tiny_model("llama"), tmp_path / "out")
    assert untouched(tmp_path)
    shards = saved(tiny_model("llama"), tmp_path / "shards", max_shard_size="20KB")
    export_checkpoint(plan.top(1), shards, tmp_path / "out")  # what is linked needs none
    with pytest.raises(ExportError, match=r"copied.* MB"):
        export_checkpoint(plan.top(1), shards, tmp_path / "copied", link=False)


def test_tensors_of_another_dtype(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors = {k: v.to(torch.float8_e4m3fn) if "down_proj" in k else v for k, v in tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"down_proj.weight.*F8_E4M3"):
        export_checkpoint(random_plan(tiny_model("llama"), "ffn", 5), base, tmp_path / "out")
    plan = random_plan(tiny_model("llama"), "attention", 5)  # what is not edited is copied as it is
    out = export_checkpoint(plan, base, tmp_path / "out")
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(v.view(torch.uint8), after[k].view(torch.uint8)) for k, v in tensors.items() if "mlp" in k)


def test_a_base_that_lacks_a_tensor(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if "down_proj" not in k}
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"base.*anew"):
        export_checkpoint(random_plan(tiny_model("llama"), "ffn", 5), base, tmp_path / "out")
    assert untouched(tmp_path)


# --- interrupted -----------------------------------------------------------------------------------------------------

WRITE = """
import sys, time
import torch
from austeer import Plan
from austeer.export import checkpoint
plain = checkpoint.TensorEntry
def slow(shape, dtype, make):
    def wait():
        print("writing", flush=True)
        time.sleep(60)
    return plain(shape, dtype, wait)
checkpoint.TensorEntry = slow
checkpoint.export_checkpoint(Plan.from_pretrained(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


def test_a_killed_export_leaves_nothing_that_loads(base, tmp_path):
    model = tiny_model("llama")
    plan, out = random_plan(model, "ffn", 5), tmp_path / "out"
    command = [sys.executable, "-c", WRITE, *map(str, (plan.save_pretrained(tmp_path / "plan"), base, out))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not out.exists()
    (left,) = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises((OSError, ValueError, SafetensorError)):
        AutoModelForCausalLM.from_pretrained(left)
    export_checkpoint(plan, base, out)
    assert not left.exists()
    assert_steered(model, logits(loaded(out, model), BATCH), expected(model, (plan, 1.0)))


def test_a_disk_that_fills_up(base, tmp_path):
    assert (base / "model.safetensors").stat().st_size > 60_000
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        with pytest.raises(ExportError, match=r"out.*File too large"):
            export_checkpoint(random_plan(tiny_model("llama"), "ffn", 5), base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert untouched(tmp_path)


def test_models_in_memory_that_are_refused(tmp_path):
    model = tiny_model("llama")
    plan = random_plan(model, "ffn", 5)
    elsewhere = copy.deepcopy(model)
    disk_offload(elsewhere, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    with pytest.raises(ExportError, match=r"device_map.*Hub id"):
        export_checkpoint(plan, elsewhere, tmp_path / "out")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ExportError, match=r"PEFT.*merge_and_unload"):
        export_checkpoint(plan, wrapped, tmp_path / "out")
    adapted = tiny_model("llama")
    adapted.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))  # saved, it would be the adapter alone
    with pytest.raises(ExportError, match="PEFT adapters"):
        export_checkpoint(plan, adapted, tmp_path / "out")
    unsaved = tiny_model("llama")
    unsaved.generation_config.temperature = 0.5  # which only sampling reads
    with pytest.raises(ExportError, match=r"GenerationConfig.*temperature"):
        export_checkpoint(plan, unsaved, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["offloaded"]
