"""Weights that come and go: read once from wherever accelerate keeps them, two parts at a time, and no trace left."""

import copy
import json
import threading

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from austeer.errors import AusteerError
from austeer.models.hooks import hooks_on
from austeer.models.weights import LayerWeights, Traffic, WeightsError, exact, in_turn
from layer_runs import snapshot
from tiny_models import ids_of_rows, tiny_model

CPU = torch.device("cpu")


def from_folder(model, folder, **options):
    model.save_pretrained(folder, max_shard_size="30KB")
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "o", **options)


def by_accelerate(model, folder):
    return disk_offload(copy.deepcopy(model), folder)


def by_accelerate_whole_layers(model, folder):
    return disk_offload(copy.deepcopy(model), folder, preload_module_classes=["LlamaDecoderLayer"])


def in_memory(model, folder):
    return cpu_offload(copy.deepcopy(model))


PLACES = [from_folder, by_accelerate, by_accelerate_whole_layers, in_memory]


def part_of(model, root, traffic=None, device=None):
    paths = {module: path for path, module in model.named_modules()}
    modules = {paths[module]: module for module in model.get_submodule(root).modules()}
    return LayerWeights(modules, device, traffic or Traffic())


@pytest.mark.parametrize("place", PLACES)
def test_weights_come_and_go(tmp_path, place):
    model = tiny_model()
    offloaded, traffic = place(model, tmp_path), Traffic()
    expected = offloaded(**ids_of_rows()).logits
    before = snapshot(offloaded.model.layers[1])
    part = part_of(offloaded, "model.layers.1", traffic)
    layer = model.model.layers[1]
    size = sum(p.nbytes for p in layer.parameters())
    with part.here():
        for name, p in offloaded.model.layers[1].named_parameters():
            assert torch.equal(p, layer.get_parameter(name)) and isinstance(p, nn.Parameter), name
        assert {p.device.type for p in offloaded.model.layers[0].parameters()} == {"meta"}
        assert traffic.held == (0 if place is in_memory else size) == part.size
        assert torch.equal(offloaded(**ids_of_rows()).logits, expected)  # accelerate's hooks rest, and spoil nothing
        assert {p.device.type for p in offloaded.model.layers[1].parameters()} == {"cpu"}
    assert snapshot(offloaded.model.layers[1]) == before
    assert traffic.held == 0 and traffic.read == traffic.peak == (0 if place is in_memory else size)
    assert torch.equal(offloaded(**ids_of_rows()).logits, expected)


def test_what_is_in_memory_is_not_copied():
    model = tiny_model()
    there = model.model.layers[0].mlp.down_proj.weight.data_ptr()
    offloaded = cpu_offload(model)
    with part_of(offloaded, "model.layers.0").here():
        assert offloaded.model.layers[0].mlp.down_proj.weight.data_ptr() == there


def test_resident_weights_on_another_device():
    model, traffic, other = tiny_model("deepseek_v3"), Traffic(), torch.device("cpu:0")
    before = snapshot(model)
    tensors = [*model.model.parameters(), *model.model.buffers()]
    part = part_of(model, "model", traffic, other)
    with part.here():
        now = [*model.model.parameters(), *model.model.buffers()]
        assert all(map(torch.equal, now, tensors))
        assert not {t.data_ptr() for t in now} & {t.data_ptr() for t in tensors}  # over there
    assert snapshot(model) == before and traffic.read == sum(t.nbytes for t in tensors) == part.size


def test_accelerates_device_is_changed_for_the_time(tmp_path):
    offloaded, other = from_folder(tiny_model(), tmp_path), torch.device("cpu:0")
    before = snapshot(offloaded)

    def devices():
        return {h.execution_device for m in offloaded.model.modules() for h in hooks_on(m)}

    assert devices() == {"cpu"}
    with part_of(offloaded, "model", device=other).here():
        assert devices() == {other}
        offloaded.model(**ids_of_rows())
    assert snapshot(offloaded) == before


@pytest.mark.parametrize("place", [from_folder, in_memory])
def test_dtype_is_the_models(tmp_path, place):
    model = tiny_model()
    offloaded = place(model, tmp_path, dtype=torch.bfloat16) if place is from_folder else place(model, tmp_path)
    for p in offloaded.parameters():
        p.data = p.data.to(torch.bfloat16)
    with part_of(offloaded, "model.layers.0").here():
        found = offloaded.model.layers[0].mlp.up_proj.weight
        assert found.dtype == torch.bfloat16 and torch.equal(found, model.model.layers[0].mlp.up_proj.weight.bfloat16())


def test_files_are_read_to_the_cpu(tmp_path):
    offloaded = from_folder(tiny_model(), tmp_path)
    loader = next(hooks_on(offloaded.model.layers[0].mlp.up_proj)).weights_map.dataset
    loader.device = torch.device("meta")  # accelerate reads to where the model runs
    with part_of(offloaded, "model.layers.0").here():
        assert {p.device for p in offloaded.model.layers[0].parameters()} == {CPU}
    assert loader.device == torch.device("meta")


def test_tied_weights_are_loaded_once(tmp_path):
    model = tiny_model()
    layer = model.model.layers[0]
    layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    other, traffic = torch.device("cpu:0"), Traffic()
    with part_of(model, "model.layers.0", traffic, other).here():
        assert layer.mlp.up_proj.weight.data_ptr() == layer.mlp.gate_proj.weight.data_ptr()
    assert traffic.read == sum({id(p): p.nbytes for p in layer.parameters()}.values())
    assert layer.mlp.up_proj.weight is layer.mlp.gate_proj.weight


def test_two_parts_at_most(tmp_path):
    offloaded, traffic = from_folder(tiny_model(num_hidden_layers=6), tmp_path), Traffic()
    before = snapshot(offloaded)
    parts = [part_of(offloaded, f"model.layers.{i}", traffic) for i in range(6)]
    size = parts[0].size
    for i, _ in enumerate(in_turn(parts)):
        here = [j for j in range(6) if offloaded.model.layers[j].mlp.up_proj.weight.device.type == "cpu"]
        assert here == [i] and traffic.held <= 2 * size
    assert (traffic.read, traffic.held) == (6 * size, 0) and size <= traffic.peak <= 2 * size
    assert snapshot(offloaded) == before and traffic.waited > 0


def test_next_part_is_read_by_another_thread(tmp_path):
    offloaded, threads = from_folder(tiny_model(), tmp_path), []
    parts = [part_of(offloaded, f"model.layers.{i}") for i in range(3)]
    for part in parts:
        fetch = part.fetch
        part.fetch = lambda fetch=fetch: (threads.append(threading.current_thread()), fetch())
    for number, _ in enumerate(in_turn(parts)):
        while len(threads) < min(number + 2, 3):  # it begins without being asked for
            pass
    assert len(set(threads)) == 1 and threads[0] is not threading.main_thread() and not threads[0].is_alive()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_after_an_error(tmp_path, error):
    offloaded, traffic = from_folder(tiny_model(), tmp_path), Traffic()
    before = snapshot(offloaded)
    turn = in_turn([part_of(offloaded, f"model.layers.{i}", traffic) for i in range(3)])
    next(turn)
    with pytest.raises(error):
        turn.throw(error())
    assert snapshot(offloaded) == before and traffic.held == 0


def test_missing_file(tmp_path):
    offloaded = from_folder(tiny_model(), tmp_path)
    before = snapshot(offloaded)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(WeightsError, match=r"model\.layers\.0\..*read"):
        next(in_turn([part_of(offloaded, "model.layers.0")]))
    assert snapshot(offloaded) == before and issubclass(WeightsError, AusteerError)


def test_error_in_the_thread_comes_with_its_part(tmp_path):
    offloaded = from_folder(tiny_model(), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first = {file for name, file in index.items() if ".layers.0." in name}
    cut = next(file for name, file in index.items() if ".layers.1." in name and file not in first)
    data = (tmp_path / cut).read_bytes()
    (tmp_path / cut).write_bytes(data[: len(data) // 2])  # the disk loses half of a shard
    before = snapshot(offloaded)
    turn = in_turn([part_of(offloaded, f"model.layers.{i}") for i in (0, 1)])
    next(turn)
    with pytest.raises(WeightsError, match=r"model\.layers\.1\..*SafetensorError"):
        next(turn)
    assert snapshot(offloaded) == before


def test_weights_of_another_model(tmp_path):
    offloaded = from_folder(tiny_model(), tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_file({name: t[:1].clone() for name, t in load_file(path).items()}, path)
    with pytest.raises(WeightsError, match=r"weights \[1.*\].*\[.*\]"):
        next(in_turn([part_of(offloaded, "model.layers.2")]))


def test_meta_without_a_hook():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(WeightsError, match=r"0\.weight.*meta.*device_map"):
        part_of(model, "0")


def test_quantised_parameter():
    class Int8Params(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = Int8Params(torch.zeros(2, 2))
    with pytest.raises(WeightsError, match=r"0\.weight.*Int8Params.*strategy='resident'"):
        part_of(model, "0", device=torch.device("cpu:0"))
    part_of(model, "0")  # stays where it is


def test_exact():
    assert exact("cpu") == exact("cpu:0") == CPU and exact("cuda:1") == torch.device("cuda", 1)
