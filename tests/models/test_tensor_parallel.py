"""A model split over two processes (Transformers' tensor parallelism) is steered as the model in one piece is.

The two processes are real ones and talk over gloo on the CPU.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

import austeer
from austeer.forward.capture import LastTokens
from austeer.models.sites import Site, find_sites
from austeer.models.tensor_parallel import held
from dense_formula import OPERATIONS, SITES, formula_at, formula_logits, logits, random_plan
from forking import errors_to, may_start_from, start

may_start_from(__name__)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # No gate saturates, so a wrong slice of the neuron site shows.
    "initializer_range": 0.2,
}
#: Name -> family and changes: rows cut by the model; cut by the layer itself; one of either; in unequal parts; biases.
MODELS = {
    "llama": ("llama", {}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
}
if Version(transformers.__version__) >= Version("5.23"):  # 5.17 itself cannot train such a model
    MODELS["uneven"] = ("llama", {"intermediate_size": 63})
COUNT = 40
#: Sites of which each process has a part of the AUs.
SPLIT = dict.fromkeys(("llama", "bias", "uneven"), ("attention", "neuron")) | {"phi3": (), "olmo2": ("neuron",)}


def ids():
    return {"input_ids": torch.arange(3, 17).view(2, 7)}


def gradients(model):
    """The gradients of two weights of every layer, and of the last norm, whole."""
    model.zero_grad()
    model(**ids()).logits.square().mean().backward()
    parts = [p for layer in model.model.layers for p in (layer.mlp.down_proj, layer.self_attn.o_proj)]
    found = [part.weight.grad for part in (*parts, model.model.norm)]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def mixed_rows(model):
    """Text of two rows with plans of their own, at the generated tokens only."""
    plans = {name: random_plan(model, SITES, COUNT, seed=seed) for seed, name in enumerate("ab")}
    with austeer.steer(model, plans, 0.5, scope=(5, None)) as steering, steering.rows(["b", "a"]):
        return model.generate(**ids(), max_new_tokens=6, do_sample=False)


def refusal(model, plan, mode="auto"):
    """Why a plan is not steered with; None if it is."""
    try:
        austeer.steer(model, plan, mode=mode)
    except austeer.SteeringError as error:
        return str(error)
    return None


def work(folder: Path, rank: int) -> None:
    """What each process does; writes all that it saw, and decides nothing."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    errors_to(folder / f"{rank}.errors")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    found = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=DistributedConfig(tp_plan="auto")
        ).eval()
        seen = found[name] = {"plain": logits(model, ids())}
        for site in SITES:
            for operation in OPERATIONS:
                plan = random_plan(model, site, COUNT, operation)
                if operation == "ablate" and site in SPLIT[name]:
                    seen[site, operation] = refusal(model, plan)
                    continue
                with austeer.steer(model, plan, 1.5) as steering:
                    first = logits(model, ids())
                    steering.alpha, steering.k = -2.0, 9
                    second = logits(model, ids())
                    report = steering.report()
                seen[site, operation] = {
                    "logits": (first, second),
                    "paths": sorted({row.path for row in report}),
                    "reasons": sorted({row.reason for row in report}),
                    "units": [(row.layer, unit.index) for row in report for unit in row.units],
                    "after": logits(model, ids()),
                }
        plan = random_plan(model, "neuron", 1)  # only one process has work
        with austeer.steer(model, plan, 50.0, scope="prompt"):
            seen["one unit"] = logits(model, ids())
        plan = random_plan(model, SITES, COUNT)
        with austeer.steer(model, plan, 0.5):
            seen["text"] = model.generate(**ids(), max_new_tokens=6, do_sample=False)
        with austeer.steer(model, plan, 0.5, mode="columns"):
            seen["gradients"] = gradients(model)
        seen["rows"] = mixed_rows(model)
        try:
            LastTokens(model, find_sites(model, ["ffn", "attention"]), 2)
        except austeer.CaptureError as error:
            seen["measure"] = str(error)
        for mode in ("fold", "fused"):
            seen[mode] = refusal(model, random_plan(model, "neuron", COUNT), mode)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the saved models, and each model in one piece."""
    folder, models = tmp_path_factory.mktemp("tensor_parallel"), {}
    for name, (family, changes) in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | changes))).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter)  # they begin as zero, which would hide one that is added twice
        model.save_pretrained(folder / name)
        models[name] = model
    return folder, models


@pytest.fixture(scope="module")
def ranks(whole):
    """What each of the two processes saw."""
    folder, _ = whole
    processes = [start(work, folder, rank) for rank in range(2)]
    for rank, process in enumerate(processes):
        process.join(300)
        assert process.exitcode == 0, (folder / f"{rank}.errors").read_text()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MODELS)
def test_every_process_gives_the_logits_of_the_model_in_one_piece(whole, ranks, name, site, operation):
    model = whole[1][name]
    if operation == "ablate" and site in SPLIT[name]:  # its sum would be over AUs that another process has
        assert all(re.search(f"'{site}'.*tensor parallelism.*'layer'", rank[name][site, operation]) for rank in ranks)
        return
    plan = random_plan(model, site, COUNT, operation)
    expected = formula_logits(model, ids(), plan, 1.5), formula_logits(model, ids(), plan.top(9), -2.0)
    plain = logits(model, ids())
    assert (expected[0] - plain).abs().max() > 1e-3
    for rank in ranks:
        seen = rank[name][site, operation]
        torch.testing.assert_close(rank[name]["plain"], plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen["logits"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(seen["after"], rank[name]["plain"])


@pytest.mark.parametrize("name", MODELS)
def test_generation_and_gradients_are_those_of_the_model_in_one_piece(whole, ranks, name):
    model = whole[1][name]
    plan = random_plan(model, SITES, COUNT)
    with austeer.steer(model, plan, 0.5):
        text = model.generate(**ids(), max_new_tokens=6, do_sample=False)
    with formula_at(model, plan, 0.5):
        expected = gradients(model)
    for rank in ranks:
        assert torch.equal(rank[name]["text"], text)
        assert torch.equal(rank[name]["rows"], mixed_rows(model))
        torch.testing.assert_close(rank[name]["gradients"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_a_unit_of_the_plan_follows_the_others(whole, ranks, name):
    model = whole[1][name]
    expected = formula_logits(model, ids(), random_plan(model, "neuron", 1), 50.0)
    assert (expected - logits(model, ids())).abs().max() > 1e-3
    for rank in ranks:
        torch.testing.assert_close(rank[name]["one unit"], expected, rtol=1e-4, atol=1e-5)


def test_each_process_steers_the_units_it_holds(whole, ranks):
    def counts(name, site):
        return [len(rank[name][site, "scale"]["units"]) for rank in ranks]

    for name, model in whole[1].items():
        for site in SITES:
            plan = random_plan(model, site, COUNT)
            reported = {unit for rank in ranks for unit in rank[name][site, "scale"]["units"]}
            assert reported == set(zip(plan.layer.tolist(), plan.index.tolist()))
    for name in {"llama", "uneven", "bias"} & set(MODELS):
        for site in ("attention", "neuron"):
            assert sum(counts(name, site)) == COUNT and min(counts(name, site)) > 0
    assert counts("phi3", "attention") == counts("phi3", "neuron") == [COUNT, COUNT]  # these layers cut for themselves
    assert counts("olmo2", "attention") == [COUNT, COUNT] and sum(counts("olmo2", "neuron")) == COUNT
    assert all(counts(name, site) == [COUNT, COUNT] for name in MODELS for site in ("ffn", "layer"))


@pytest.mark.parametrize("name", MODELS)
def test_a_weight_that_is_split_is_neither_folded_nor_fused(ranks, name):
    for rank in ranks:
        for site in SITES:
            seen = rank[name][site, "scale"]
            assert seen["paths"] == ["columns"]
            assert site == "layer" or all("DTensor" in reason for reason in seen["reasons"])
        for mode in ("fold", "fused"):
            assert re.search(f"'{mode}'.*'neuron'.*DTensor", rank[name][mode])


def test_measuring_wants_the_model_in_one_piece(ranks):
    for rank in ranks:
        for name in {"llama", "bias", "uneven"} & set(MODELS):
            assert "slice" in rank[name]["measure"]
        assert "measure" not in rank["phi3"]  # its sites are whole


def split_site(width, placements, sizes, coordinate, style=None):
    """A model of one row-wise layer as a process at ``coordinate`` of a mesh of ``sizes`` has it."""
    mesh = SimpleNamespace(size=lambda i: sizes[i], get_local_rank=lambda i: coordinate[i])
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].down = torch.nn.Identity()
    model.layers[0].down.weight = SimpleNamespace(ndim=2, placements=placements, device_mesh=mesh)
    model.tp_plan = {} if style is None else {"layers.*.down": style}
    return model, Site("neuron", 0, "layers.0.down", "input", width, "layers.0.down")


@pytest.mark.parametrize("width", [1, 7, 8, 63, 64])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_slices_are_those_of_torch_chunk(width, parts):
    rowwise, gathered = SimpleNamespace(dim=1), SimpleNamespace(dim=0)
    chunks = [chunk.tolist() for chunk in torch.arange(width).chunk(parts)] + [[]] * parts
    for rank in range(parts):
        for placements, sizes, coordinate in (
            ((rowwise,), (parts,), (rank,)),
            ((gathered, rowwise), (2, parts), (1, rank)),
        ):
            found = held(*split_site(width, placements, sizes, coordinate))
            assert list(found) == chunks[rank]


def test_what_is_whole_is_not_cut():
    rowwise, replicated = SimpleNamespace(dim=1), SimpleNamespace()
    assert held(*split_site(8, (SimpleNamespace(dim=0),), (2,), (1,))) is None
    assert held(*split_site(8, (replicated,), (2,), (1,))) is None
    assert held(*split_site(8, (rowwise,), (2,), (1,), "rowwise_split_input")) is None
    assert held(*split_site(8, (rowwise,), (2,), (1,), "rowwise")) == range(4, 8)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    assert all(held(model, site) is None for sites in find_sites(model).values() for site in sites)


def test_interleaved_slices_are_refused():
    model, site = split_site(8, (SimpleNamespace(dim=1, split_factor=2),), (2,), (0,))
    with pytest.raises(austeer.SteeringError, match=r"layers\.0\.down.*contiguous"):
        held(model, site)
