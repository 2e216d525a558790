"""Layer by layer gives what the plain order gives, reads each weight once, and leaves the model as it was."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import accelerate.utils.offload
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import austeer.measuring.layerwise.layerwise
from austeer import find_sites
from austeer.forward.shared_prompts import tree_form
from austeer.measuring.layerwise.hidden_states import ScratchError
from austeer.measuring.layerwise.layerwise import Layerwise
from austeer.measuring.layerwise.one_layer import LayerwiseError
from austeer.models.structure import decoder_of
from layer_runs import (
    assert_equal,
    blocks_of,
    counters_of,
    counting_for,
    in_plain_order,
    layer_by_layer,
    snapshot,
    tensors_by_name,
)
from tiny_models import FAMILIES, MULTIMODAL, ids_of_rows, tiny_model

CPU = torch.device("cpu")


def from_disk(model, folder, family="llama", **options):
    """The model saved in several files and loaded again with its weights left there."""
    model.save_pretrained(folder, max_shard_size="30KB")
    auto = AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM
    return auto.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "offload", **options).eval()


@pytest.fixture
def read(monkeypatch):
    """Bytes of every tensor that accelerate reads from a file, by file and name."""
    found = {}

    class Counted:
        def __init__(self, file, **options):
            self.path, self.file = file, safe_open(file, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            found.setdefault((self.path, name), []).append(self.file.get_tensor(name))
            return found[self.path, name][-1]

    monkeypatch.setattr(accelerate.utils.offload, "safe_open", Counted)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_disk(tmp_path, family, read):
    model = tiny_model(family)
    sites = find_sites(model)
    tree, _ = tree_form(model, sites, CPU)
    blocks = blocks_of(share=tree is not None)
    kinds = {batch.sees is None for block in blocks for batch in block.batches}
    assert kinds == ({True} if tree is None else {True, False})  # rows with a mask and rows without
    expected = in_plain_order(model, sites, blocks, tree or "tensor")
    offloaded = from_disk(model, tmp_path, family)
    before = snapshot(offloaded)
    found, runner = layer_by_layer(offloaded, sites, blocks, tree=tree or "tensor")
    assert_equal(found, expected)
    assert snapshot(offloaded) == before

    # Each weight of the decoder is read once: the whole checkpoint without the head and what encodes images.
    decoder = decoder_of(model)
    size = sum({id(p): p.nbytes for p in decoder.parameters()}.values())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert {len(tensors) for tensors in read.values()} == {1}
    assert runner.traffic.read == sum(t.nbytes for tensors in read.values() for t in tensors) == size
    layers = model.get_submodule(sites["layer"][0].path.rpartition(".")[0])
    largest = sorted(sum(p.nbytes for p in layer.parameters()) for layer in layers)[-2:]
    embedding = decoder.get_input_embeddings().weight.nbytes
    around = size - embedding - sum(p.nbytes for p in layers.parameters())
    assert runner.traffic.peak <= around + max(sum(largest), embedding + largest[-1]) and runner.traffic.held == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama4_text", "qwen3_next"])
@pytest.mark.parametrize("way", ["disk", "whole layers on disk", "cpu", "another device"])
def test_wherever_the_weights_are(tmp_path, monkeypatch, family, way):
    model, blocks = tiny_model(family), blocks_of()
    sites = find_sites(model)
    expected = in_plain_order(model, sites, blocks)
    offloaded, device = copy.deepcopy(model), None
    layer = model.get_submodule(sites["layer"][0].path)
    if way == "disk":
        disk_offload(offloaded, tmp_path)
    elif way == "whole layers on disk":
        disk_offload(offloaded, tmp_path, preload_module_classes=[type(layer).__name__])
    elif way == "cpu":
        cpu_offload(offloaded)
    else:
        monkeypatch.setattr(austeer.measuring.layerwise.layerwise, "exact", torch.device)
        device = "cpu:0"  # to torch another device than "cpu": everything is copied there
    before = snapshot(offloaded)
    found, runner = layer_by_layer(offloaded, sites, blocks, device=device)
    assert_equal(found, expected)
    assert snapshot(offloaded) == before
    decoder = decoder_of(model)
    here = {id(t): t.nbytes for t in (*decoder.parameters(), *(decoder.buffers() if device else ()))}
    assert runner.traffic.read == (0 if way == "cpu" else sum(here.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("way", ["disk", "cpu", "resident"])
@pytest.mark.parametrize("memory", ["device", "memory", "file"])
def test_on_a_gpu(tmp_path, monkeypatch, family, way, memory):
    model, blocks, tree = tiny_model(family), blocks_of(share=True), "mapping" if family == "gemma2" else "tensor"
    sites = find_sites(model)
    expected = in_plain_order(copy.deepcopy(model).cuda(), sites, blocks, tree)
    if way == "disk":
        offloaded = from_disk(model, tmp_path, family)
    else:
        offloaded = copy.deepcopy(model)
        if way == "cpu":
            cpu_offload(offloaded, "cuda")
    if memory != "device":
        monkeypatch.setattr(austeer.measuring.layerwise.layerwise, "free_memory", lambda device: 0)
    before = snapshot(offloaded)
    found, _ = layer_by_layer(
        offloaded, sites, blocks, device="cuda", memory=0 if memory == "file" else None, tree=tree
    )
    assert_equal(found, expected)
    assert snapshot(offloaded) == before


def test_bfloat16_from_a_float32_checkpoint(tmp_path, read):
    model, blocks = tiny_model(), blocks_of()
    offloaded = from_disk(model, tmp_path, dtype=torch.bfloat16)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    sites = find_sites(model)
    found, runner = layer_by_layer(offloaded, sites, blocks)
    assert_equal(found, in_plain_order(resident, sites, blocks))
    assert {len(tensors) for tensors in read.values()} == {1}
    assert 2 * runner.traffic.read == sum(t.nbytes for tensors in read.values() for t in tensors)


def test_layers_above_are_neither_loaded_nor_run(tmp_path, read):
    model, blocks = tiny_model(num_hidden_layers=5), blocks_of()
    offloaded = from_disk(model, tmp_path)
    read.clear()
    sites = {name: [found[0], found[2]] for name, found in find_sites(model).items()}
    found, runner = layer_by_layer(offloaded, sites, blocks)
    assert_equal(found, in_plain_order(model, sites, blocks))
    assert list(runner.layers) == [0, 1, 2]
    assert {name.split(".")[2] for _, name in read if ".layers." in name} == {"0", "1", "2"}


def test_real_model_from_disk(demo, tmp_path):
    model, tokenizer = demo
    blocks = blocks_of((4,))
    offloaded = AutoModelForCausalLM.from_pretrained(
        Path(tokenizer.name_or_path), device_map={"": "disk"}, dtype=torch.float32
    )
    sites = find_sites(model, ["attention", "ffn"])
    found, runner = layer_by_layer(offloaded, sites, blocks)
    assert_equal(found, in_plain_order(model, sites, blocks))
    assert runner.traffic.read == sum(p.nbytes for p in model.parameters())  # its head is its embedding
    assert runner.traffic.peak < 0.25 * runner.traffic.read


def test_no_space_is_said_before_anything_is_loaded(tmp_path, monkeypatch, read):
    offloaded = from_disk(tiny_model(), tmp_path / "model")
    read.clear()
    (tmp_path / "file").write_text("")
    with pytest.raises(ScratchError, match=r"file: .*written"):
        layer_by_layer(offloaded, find_sites(offloaded), blocks_of(), memory=0, scratch=tmp_path / "file")
    assert not read


def test_callbacks_in_order():
    model, blocks, calls = tiny_model(), blocks_of(), []
    sites, batches = find_sites(model, ["ffn"]), [batch for block in blocks for batch in block.batches]
    Layerwise(model, sites).run(blocks, counting_for(sites), on_batch=calls.append, on_layer=calls.append)
    assert calls == [*batches, 0, *batches, 1, *batches, 2]


def test_no_texts():
    model = tiny_model()
    assert not layer_by_layer(model, find_sites(model), [])[0]["layer"]["positive"].any()


class Stop(KeyboardInterrupt):
    """Not an Exception, as what an impatient user raises."""


def stop_after(count):
    """A callback that stops at its ``count``-th call."""
    left = [count]

    def call(*_):
        left[0] -= 1
        if not left[0]:
            raise Stop

    return call


@pytest.mark.parametrize(
    ("where", "count"),
    [("on_batch", 1), ("on_batch", 6), ("on_layer", 1), ("on_layer", 3), ("layer", 2), ("reader", 1), ("reader", 13)],
)
def test_model_is_as_it_was_after_an_error(tmp_path, monkeypatch, where, count):
    model, blocks = tiny_model(), blocks_of()
    offloaded = from_disk(model, tmp_path)
    with torch.no_grad():
        expected = offloaded(**ids_of_rows()).logits
    sites = find_sites(offloaded)
    runner, callbacks = Layerwise(offloaded, sites, memory=0, scratch=tmp_path / "scratch"), {}
    stop = stop_after(count)
    if where in ("on_batch", "on_layer"):
        callbacks = {where: stop}
    elif where == "layer":
        hook = offloaded.model.layers[1].mlp.register_forward_pre_hook(lambda *_: stop())
    else:
        loader = accelerate.utils.offload.OffloadedWeightsLoader
        get = loader.__getitem__
        monkeypatch.setattr(loader, "__getitem__", lambda self, key: (stop(), get(self, key))[1])
    before = snapshot(offloaded)
    with pytest.raises(Stop):
        runner.run(blocks, counting_for(sites), **callbacks)
    monkeypatch.undo()
    assert snapshot(offloaded) == before and runner.traffic.held == 0
    assert not list((tmp_path / "scratch").iterdir())
    if where == "layer":
        hook.remove()
    with torch.no_grad():
        assert torch.equal(offloaded(**ids_of_rows()).logits, expected)
    assert_equal(layer_by_layer(offloaded, sites, blocks)[0], in_plain_order(model, sites, blocks))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_goes_on_behind_the_last_complete_layer(tmp_path, stop, read):
    model, blocks = tiny_model("gptj"), blocks_of()  # its layers return tuples, which a resumed run must know
    offloaded = from_disk(model, tmp_path / "model", "gptj")
    sites = find_sites(model)
    options = {"persistent": True, "scratch": tmp_path / "scratch"}
    counting, done = counting_for(sites), []

    def stopping(batch):
        if len(done) == stop - 1:
            raise Stop

    with pytest.raises(Stop):
        Layerwise(offloaded, sites, **options).run(blocks, counting, on_layer=done.append, on_batch=stopping)
    assert done == list(range(stop - 1))
    read.clear()
    # What was counted after the last complete layer is of a layer that runs again: only whole layers are kept.
    kept = {name: {what: t.clone() for what, t in c.items()} for name, c in counters_of(counting).items()}
    again = counting_for(sites)
    for name, tensors in tensors_by_name(again).items():
        for mine, theirs in zip(tensors, kept[name].values()):
            whole = (stop - 1) * theirs.shape[1]
            mine[:whole].copy_(theirs.flatten()[:whole])
    Layerwise(offloaded, sites, **options).run(blocks, again, first_layer=len(done))
    assert_equal(counters_of(again), in_plain_order(model, sites, blocks))
    assert {int(name.split(".")[2]) for _, name in read if ".h." in name} == set(range(len(done), 3))
    assert any("wte" in name for _, name in read) == (stop == 1)
    assert not (tmp_path / "scratch").exists()


def test_other_texts_are_not_gone_on_with(tmp_path):
    model, sites = tiny_model(), find_sites(tiny_model())
    options = {"persistent": True, "scratch": tmp_path}
    with pytest.raises(Stop):
        Layerwise(model, sites, **options).run(blocks_of(), counting_for(sites), on_layer=stop_after(1))
    other_ids = [replace(b, batches=[replace(t, ids=t.ids ^ 1) for t in b.batches]) for b in blocks_of()]
    others = [(model, blocks) for blocks in (other_ids, blocks_of((5, 2)), blocks_of(tokens=20))]
    for other, blocks in (*others, (tiny_model().bfloat16(), blocks_of())):
        with pytest.raises(ScratchError, match="another model"):
            Layerwise(other, sites, **options).run(blocks, counting_for(sites), first_layer=1)
    with pytest.raises(ScratchError, match="after layer 1"):
        Layerwise(model, sites, **options).run(blocks_of(), counting_for(sites), first_layer=2)


def test_persistence_needs_a_folder():
    model = tiny_model()
    with pytest.raises(LayerwiseError, match="scratch"):
        Layerwise(model, {}, persistent=True)
    with pytest.raises(LayerwiseError, match=r"first_layer: .* 1 .*persistent"):
        Layerwise(model, {}).run(blocks_of(), {}, first_layer=1)


KILLED = """
    import os, signal, sys
    sys.path[:0] = {path!r}
    import torch
    from layer_runs import blocks_of, counters_of, counting_for
    from tiny_models import tiny_model
    from austeer import find_sites
    from austeer.measuring.layerwise.layerwise import Layerwise

    folder, batches = sys.argv[1], int(sys.argv[2])
    model = tiny_model(num_hidden_layers=4)
    sites = find_sites(model)
    counting = counting_for(sites)

    def on_batch(_):
        global batches
        batches -= 1
        if not batches:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_layer(layer):
        torch.save((layer + 1, counters_of(counting)), folder + "/new.pt")
        os.replace(folder + "/new.pt", folder + "/counters.pt")

    runner = Layerwise(model, sites, persistent=True, scratch=folder + "/scratch")
    runner.run(blocks_of(), counting, on_batch=on_batch, on_layer=on_layer)
"""


def test_killed_and_gone_on(tmp_path):
    program = textwrap.dedent(KILLED).format(path=sys.path)
    in_layer_2 = 2 * sum(len(block.batches) for block in blocks_of()) + 2
    command = [sys.executable, "-c", program, str(tmp_path), str(in_layer_2)]
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL

    model = tiny_model(num_hidden_layers=4)
    sites, blocks = find_sites(model), blocks_of()
    first, counters = torch.load(tmp_path / "counters.pt")
    counting = counting_for(sites)
    for name, tensors in tensors_by_name(counting).items():
        for mine, theirs in zip(tensors, counters[name].values()):
            mine.copy_(theirs.flatten())
    assert first == 2
    Layerwise(model, sites, persistent=True, scratch=tmp_path / "scratch").run(blocks, counting, first_layer=first)
    assert_equal(counters_of(counting), in_plain_order(model, sites, blocks))
    assert not (tmp_path / "scratch").exists()
