"""The analytic cost model against counts of real forward passes, and against sums done by hand."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_leaves

import austeer
from austeer import AusteerError, PlanError, SiteError, SteeringError
from austeer.costs.steering import spread, steering_cost
from austeer.costs.ways import WAYS
from austeer.costs.work import EXECUTIONS, Work
from austeer.models.sites import find_sites
from austeer.plans.table import BY_UNIT, OPERATIONS
from austeer.steering import bias
from austeer.steering.path_choice import plan_paths
from bench.counted_ops import count
from bench.plain_ways import DenseHook, Public, SparseHook
from bench.plans import spread_plan
from bench.steered import twin
from tiny_models import FAMILIES, tiny_model

OURS = ("fold", "bias", "columns", "fused", "dense")
RATES = {"bandwidth": 1e10, "flops": 1e11, "launch": 1e-6, "host_us": 10.0}
SEVERAL = ["llama", "gpt2", "gemma2", "opt", "bloom", "mixtral", "deepseek_v3", "llama4_text"]
WIDE = {"hidden_size": 512, "head_dim": 128, "num_hidden_layers": 2}


def built(family, dtype=torch.float32, **changes):
    """A model whose experts are read as they are needed."""
    model = tiny_model(family, **changes).to(dtype)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def cost_of(model, site="ffn", k=7, **options):
    options = {"device": "cpu", "prompt_tokens": 8, "context": 8, **RATES, **options}
    return steering_cost(model.config, site, k, dtype=model.dtype, **options)


def prefill(model, rows=1, length=8):
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    return count(model, lambda: model(ids, use_cache=True, logits_to_keep=1))


def decode(model, rows=1, length=8):
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
    return count(model, lambda: model(ids[:, -1:], past_key_values=cache, use_cache=True))


def beyond(found, base):
    """What was counted more."""
    return Work(*(getattr(found, n) - getattr(base, n) for n in ("read", "written", "operations", "launches")))


def logical(work):
    return replace(work, padding=0)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in SEVERAL), ("llama", torch.bfloat16)],
)
def test_our_paths_take_exactly_what_is_predicted(family, dtype):
    model, checked = built(family, dtype), 0
    base = prefill(model), decode(model)
    # A path that runs does the same in every family; what is written into weights and biases differs.
    operations = OPERATIONS if family in ("llama", "gpt2") else ("scale", "shift")
    for site, operation in itertools.product(find_sites(model), operations):
        cost = cost_of(model, site, operation=operation)
        plan = replace(spread_plan(model, site, 7), operation=operation)
        for way in OURS:
            try:
                steering = austeer.steer(model, plan, 0.1, mode=way, check=False).attach()
            except SteeringError:
                assert way in cost.refused, (site, operation, way)
                continue
            found = prefill(model)
            assert beyond(found, base[0]) == logical(cost.prefill.extra[way].work), (site, operation, way)
            if operation in ("scale", "ablate") or way == "bias":
                assert beyond(decode(model), base[1]) == logical(cost.decode.extra[way].work), (site, operation, way)
            steering.detach()
            checked += 1
    assert checked >= 6 * len(operations)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_many_tokens_take_the_sparse_form_on_a_cpu(dtype, operation):
    model = built("llama", dtype, **WIDE)
    base = prefill(model, 2, 24)
    # 24,576 values; 2 AUs a layer are fewer than a 64th of the width, 20 more. Ablation has one form.
    for k, launches in ((4, 4), (40, 1)) if operation != "ablate" else ((4, 13), (40, 13)):
        plan = replace(spread_plan(model, "ffn", k), operation=operation)
        with austeer.steer(model, plan, 0.1, mode="columns", check=False):
            found = prefill(model, 2, 24)
        work = cost_of(model, k=k, operation=operation, batch=2, prompt_tokens=24).prefill.extra["columns"].work
        assert beyond(found, base) == logical(work)
        casts = 2 if dtype == torch.bfloat16 and (k == 4 or operation == "ablate") else 0
        push = 2 if operation == "push" else 0  # sign and factor
        assert work.launches == 2 * (launches + casts + push)
        assert (work.padding > 0) == (k == 4 or operation == "ablate")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("mixtral", torch.float32)],
    ids=["llama-float32", "llama-bfloat16", "mixtral-float32"],
)
@pytest.mark.parametrize("site", ["attention", "ffn"])
@pytest.mark.parametrize("operation", BY_UNIT)
def test_others_ways_take_exactly_what_is_predicted(family, dtype, site, operation):
    model = built(family, dtype)
    base = prefill(model), decode(model)
    cost = cost_of(model, site, layers=2, operation=operation)
    for way, kind in (("public", Public), ("dense hook", DenseHook), ("sparse hook", SparseHook)):
        steered = kind(twin(model), spread_plan(model, site, 7, layers=2, operation=operation), 0.1).model
        assert beyond(prefill(steered), base[0]) == logical(cost.prefill.extra[way].work), way
        assert beyond(decode(steered), base[1]) == logical(cost.decode.extra[way].work), way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "site"), [("llama", "attention"), ("gpt2", "ffn"), ("llama", "neuron")])
def test_peft_s_adapter_takes_exactly_what_is_predicted(family, dtype, site):
    model = built(family, dtype)
    base = prefill(model), decode(model)
    cost = cost_of(model, site, layers=2)
    ranks = {found.projection: cost.aus[found.layer] for found in find_sites(model)[site] if found.layer in cost.aus}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, r=1, fan_in_fan_out=family == "gpt2")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
    size = sum(p.nbytes for name, p in adapted.named_parameters() if "lora_" in name)
    for found, one, before in zip((prefill, decode), (cost.prefill, cost.decode), base):
        assert beyond(found(adapted.base_model.model), before) == logical(one.extra["lora"].work)
    assert cost.memory["lora"] == size


def test_lora_needs_one_linear_layer():
    assert "lora" in cost_of(built("mixtral")).refused and "lora" not in cost_of(built("mixtral"), "attention").refused


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_itself(family):
    """Weights, cache and products exactly; launches within a tenth, as experts and masks are run in other forms."""
    model = built(family)
    cost = cost_of(model)
    assert decode(model).weights == cost.decode.unsteered.weights
    ids = torch.randint(3, 60, (2, 8))
    with torch.no_grad():
        caches = model(ids[:1], use_cache=True).past_key_values, model(ids[:, :5], use_cache=True).past_key_values
    for cache, one in zip(caches, (cost, cost_of(model, batch=2, context=5))):
        state = [t for layer in cache.layers for t in vars(layer).values()]
        states = [t for value in state for t in (value if isinstance(value, (list, tuple)) else [value])]
        size = sum(t.nbytes for t in states if isinstance(t, torch.Tensor) and t.dim())
        if family != "qwen3_next":  # keeps its recurrent states in dictionaries
            assert one.decode.unsteered.cache == size
    assert cost.decode.unsteered.launches
    if not any(work in family for work in ("moe", "mixtral", "oss", "deepseek", "qwen3_next", "falcon")):
        assert decode(model).launches == pytest.approx(cost.decode.unsteered.launches, rel=0.1)
    if model._can_set_experts_implementation() and family != "qwen3_next":
        half = model.to(torch.bfloat16)
        half.set_experts_implementation("grouped_mm")
        assert decode(half).launches == pytest.approx(cost_of(half).decode.unsteered.launches, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "deepseek_v3", "mpt"])
def test_products_and_activations_of_the_model_itself(family):
    model = built(family)
    model.set_attn_implementation("eager")
    products = {"mm", "addmm", "bmm", "baddbmm"}

    for run, of in ((prefill, "prefill"), (decode, "decode")):
        calls = [call for call in run(model).calls if call.name.removeprefix("aten::") in products]
        itself = getattr(cost_of(model), of).unsteered
        if of == "prefill" or family != "deepseek_v3":  # makes all keys and values anew from the cached latents
            assert sum(call.operations for call in calls) == itself.operations
        matrices = [call for call in calls if call.weights]
        if family != "deepseek_v3" and (family != "mixtral" or of == "decode"):  # tokens share an expert's product
            assert sum(call.read + call.written - call.weights for call in matrices) == itself.activations


def test_experts_that_are_read_by_hand():
    # 2 of 4 run for a token: 3 tokens together choose 4 (1 - 1 / 2 ** 3) = 3.5 if all are as likely
    def weights(batch):
        return cost_of(built("mixtral"), batch=batch).decode.unsteered.weights

    expert, embedding = 4 * 3 * 32 * 48 * 3, 4 * 32  # three matrices in three layers
    assert weights(3) - weights(1) == 1.5 * expert + 2 * embedding
    assert weights(64) - weights(1) == pytest.approx(2 * expert + 63 * embedding, abs=1)


def kept_by(path, model):
    """Bytes of the tensors that a path keeps, beside the model's own and those on the CPU where alpha and k are set."""
    tables = [{**vars(table), "_host": None, "_order": None} for table in path.tables]
    slot = bias._slots.get(path.module) if path.name == "bias" else None
    edits = [
        {**vars(edit), "index": None, "_change": vars(edit._change)}  # the index is the table's
        for edit in vars(path).get("_edits", ())
    ]
    tensors = [t for t in tree_leaves([tables, vars(path), edits, slot and vars(slot)]) if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32), ("llama4_text", torch.float32)]
)
def test_bytes_kept(family, dtype, operation):
    model = built(family, dtype)
    for site in find_sites(model):
        cost = cost_of(model, site, operation=operation)
        plan = replace(spread_plan(model, site, 7), operation=operation)
        for way in (way for way in OURS if way not in cost.refused):
            kept, (paths, _) = 0, plan_paths(model, [plan], find_sites(model, [site]), way, "", False, None, False)
            for path in paths:
                path.table.fill([(0.1, 7)])
                path.attach()
                kept += kept_by(path, model)
                path.detach()
            assert cost.memory[way] == kept, (site, way)


def test_bytes_kept_by_hand():
    model = built("llama")  # three layers of a width of 32, 48 at the attention
    scale = cost_of(model, device="cuda", execution="graph").memory
    lists = 7 * 2 * (8 + 8 + 4 + 4)  # index, columns, gamma and shift, of the plan and of none
    assert scale["columns"] == lists + 3 * 4 * 32 and scale["fused"] == lists + 3 * 12 * 32
    assert scale["public"] == 3 * 4 * 32 and scale["sparse hook"] == 7 * 12
    for site, parts in (("ffn", 1), ("attention", 2)):  # at the input side W @ shift for alpha = 1 is kept too
        for device, wide in (("cuda", 4), ("cpu", 8)):
            shift = cost_of(model, site, operation="shift", device=device).memory
            assert shift["bias"] == lists + 3 * 32 * (4 + 4 + parts * wide)


@pytest.mark.parametrize("site", ["attention", "ffn", "layer"])
def test_a_shift_is_a_bias_and_nothing_else_is(site):
    model = built("llama")
    cost = cost_of(model, site, operation="shift", layers=2, device="cuda")
    added = cost.decode.extra["bias"]
    assert (added.work, added.host) == (Work(2 * 4 * 32), 0.0) and 0 <= added.overhead < 0.001
    assert "cannot scale" in cost_of(model, site).refused["bias"]
    assert "bias" in cost_of(built("mixtral"), "ffn", operation="shift").refused
    assert "bias" not in cost_of(built("deepseek_v3"), "ffn", operation="shift").refused, "an ungated shared expert"


@pytest.mark.parametrize(
    ("family", "operation", "path"),
    [
        ("llama", "scale", "fold"),
        ("llama", "shift", "bias"),
        ("llama", "push", "columns"),
        ("llama", "ablate", "fold"),
        ("mixtral", "shift", "columns"),
    ],
)
def test_what_auto_takes(family, operation, path):
    cost = cost_of(built(family), operation=operation)
    assert cost.auto == path and f"auto takes {path}" in cost.conclusion()


def test_launches_on_a_gpu():
    cost = cost_of(built("llama"), k=7, layers=2, device="cuda")
    found = {way: extra.work.launches for way, extra in cost.prefill.extra.items()}
    assert found == {
        "fold": 0,
        "columns": 2,
        "fused": found["fused"],
        "dense": 2 * 3,
        "public": 3 * 3,
        "dense hook": 2,
        "sparse hook": 2 * 3,
        "lora": 2 * 4,
    }
    assert found["fused"] in (0, 2)
    half = steering_cost(built("llama").config, k=7, layers=2, device="cuda", **RATES)
    assert half.decode.extra["dense"].work.launches == 2 * 4, "the strengths are converted to bfloat16"


@pytest.mark.parametrize(
    ("device", "execution"), [("cpu", "eager"), ("cpu", "compile"), *(("cuda", e) for e in EXECUTIONS)]
)
def test_seconds_and_overhead_by_hand(device, execution):
    """Device and host both slow."""
    slow = {"bandwidth": 1e8, "flops": 1e12, "launch": 1e-5, "host_us": 50.0}
    cost = cost_of(built("llama"), k=3, device=device, execution=execution, **slow)
    eager, both = execution == "eager", (device, execution) == ("cpu", "eager")
    longer = set()
    for one in (cost.decode, cost.prefill):
        itself = one.unsteered
        floor = itself.bytes / 1e8 + (0 if both else itself.launches * 1e-5)
        host = itself.launches * 50e-6 if eager else 0
        assert (one.device, one.host) == (pytest.approx(floor), pytest.approx(host))
        together = floor + host if both else max(floor, host)
        assert one.seconds == pytest.approx(together)
        longer.add(host > floor)
        for way, extra in one.extra.items():
            more = extra.work.moved / 1e8 + (0 if both else extra.work.launches * 1e-5)
            assert extra.device == pytest.approx(more)
            assert (extra.host > 0) == (eager and way != "fold")
            with_it = floor + more + host + extra.host if both else max(floor + more, host + extra.host)
            assert extra.overhead == pytest.approx(with_it / together - 1)
    assert longer == {eager}
    far = cost_of(built("llama"), k=3, bandwidth=1e15, flops=1e3, launch=0, host_us=0)
    assert far.decode.seconds == far.decode.unsteered.operations / 1e3
    assert far.decode.extra["lora"].device == far.decode.extra["lora"].work.operations / 1e3


def test_json_is_whole():
    cost = cost_of(built("mixtral"), layers=2)
    found = json.loads(json.dumps(cost.to_json()))
    assert found["aus"] == {"0": 4, "2": 3} and found["layers"] == 3
    assert set(found["decode"]["extra"]) | set(found["refused"]) == set(WAYS)
    assert found["decode"]["unsteered"]["bytes"] == cost.decode.unsteered.bytes
    assert found["prefill"]["tokens"] == 8 and found["decode"]["past"] == 7
    assert found["decode"]["extra"]["dense"]["overhead_percent"] == 100 * cost.decode.extra["dense"].overhead


def test_aus_are_spread_as_the_benchmark_s_are():
    model = tiny_model("llama", num_hidden_layers=11)
    for k, touched in ((1, 1), (7, 7), (20, 11), (20, 3), (352, 11), (12, 10)):
        aus = spread(k, touched, 11)
        layers = spread_plan(model, "ffn", k, touched).layer
        assert aus == {layer: int((layers == layer).sum()) for layer in layers.unique().tolist()}
        assert len(aus) == touched and sum(aus.values()) == k and max(aus.values()) - min(aus.values()) <= 1


def test_a_model_that_cannot_be_followed_without_values(monkeypatch):
    plain = built("llama")
    known = cost_of(plain)
    model = type(plain)
    forward = model.forward

    def looks(self, input_ids, **options):
        assert input_ids.sum().item() >= 0
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", looks)
    cost = cost_of(plain)
    assert cost.decode.unsteered.launches is None and "cannot be followed" in cost.notes[0] and not known.notes
    assert cost.decode.unsteered.cache == known.decode.unsteered.cache
    assert cost.decode.extra["dense"].work == known.decode.extra["dense"].work
    json.dumps(cost.to_json())


def test_notes():
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": "fp8"}
    [note] = steering_cost(config, k=3, device="cpu", **RATES).notes
    assert "quantised" in note
    assert any("all 4 experts run" in note for note in cost_of(built("llama4_text")).notes)
    assert any("linear attention" in note for note in cost_of(built("qwen3_next")).notes)
    assert any("latents" in note for note in cost_of(built("deepseek_v3")).notes)


@pytest.mark.parametrize(
    ("options", "error", "found"),
    [
        ({"site": "heads"}, SiteError, "'heads'.*attention"),
        ({"k": 97}, PlanError, "k: .*97.*1 to 96.*'ffn'"),
        ({"k": 0}, PlanError, "k: .* 0,.*1 to 96"),
        ({"layers": 4}, SiteError, "layers: .*4.*1 to 3"),
        ({"layers": 1, "k": 33}, PlanError, "k: .*33 AUs for 1 layers.*1 to 32"),
        ({"batch": 0}, SteeringError, "batch: .* 0"),
        ({"prompt_tokens": 1.5}, SteeringError, "prompt_tokens: .*1.5"),
        ({"context": True}, SteeringError, "context: .*True"),
        ({"operation": "add"}, SteeringError, "operation: .*'add'.*scale, push, shift"),
        ({"dtype": torch.float64}, SteeringError, "dtype: .*float64.*float16"),
        ({"dtype": "int8"}, AusteerError, "dtype: .*'int8'"),
        ({"device": "tpu"}, SteeringError, "device: .*'tpu'.*cuda"),
        ({"execution": "graph"}, SteeringError, "execution: .*'graph' on cpu.*eager, compile"),
        ({"execution": "fast", "device": "cuda"}, SteeringError, "execution: .*'fast'.*eager, graph, compile"),
        ({"host_us": -1.0}, AusteerError, "host_us: .*-1.0"),
        ({"host_us": float("inf")}, AusteerError, "host_us: .*inf"),
        ({"bandwidth": 0}, AusteerError, "bandwidth: .* 0,"),
        ({"flops": float("nan")}, AusteerError, "flops: .*nan"),
        ({"launch": -1.0}, AusteerError, "launch: .*-1.0"),
    ],
)
def test_bad_input(options, error, found):
    with pytest.raises(error, match=found):
        steering_cost(**{"model": tiny_model("llama").config, "k": 3, "device": "cpu", **RATES, **options})


def test_no_site_neuron_in_a_mixture():
    with pytest.raises(SiteError, match=r"neuron.*experts"):
        cost_of(built("mixtral"), "neuron")
