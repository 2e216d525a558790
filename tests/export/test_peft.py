"""An exported adapter in PEFT: loaded as users load one, against the definition of steering."""

import copy
import warnings

import peft
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from austeer.export import export_lora
from austeer.models.sites import find_sites
from dense_formula import SITES, WEIGHT_SITES, formula_at, formula_logits, logits, random_plan
from tiny_models import FAMILIES, ids_of_rows, tiny_model

ALPHA = 2.0  # alpha * beta is exact in float32, as the formula has it
IDS = ids_of_rows()


def double(family="llama", **changes):
    """In float64, where nothing but a mistake shows."""
    model = tiny_model(family, **changes).double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    return model


@pytest.fixture(scope="module")
def model():
    return double()


def load(model, folder, name="default", **options):
    """A PEFT model around a copy, of whose loading nobody was warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # transformers' of PEFT
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but .* merging LoRA weights won't be")
        return PeftModel.from_pretrained(
            copy.deepcopy(model), folder, adapter_name=name, autocast_adapter_dtype=False, **options
        )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def user_lora(model, modules, folder, rank=3, seed=5):
    """Somebody's own adapter, on disk."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=modules, r=rank, lora_alpha=2 * rank, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    wrapped.save_pretrained(folder)


# --- exact -----------------------------------------------------------------------------------------------------------


#: A family of each form: plain, transposed weights and biases, mixtures with and without plain and shared experts.
FORMS = ("llama", "gpt2", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(
    ("operation", "family"), [*(("scale", family) for family in FAMILIES), *(("ablate", family) for family in FORMS)]
)
def test_every_family(operation, family, tmp_path):
    model = double(family)
    sites = [site for site in find_sites(model) if site in WEIGHT_SITES]
    if family == "gpt_oss":
        sites = ["attention"]  # its experts have biases
    projections = [site.projection for site in find_sites(model, "ffn")["ffn"]]
    biased = None not in projections and model.get_submodule(projections[0]).bias is not None
    plan = random_plan(model, sites, 40, operation)
    export_lora(plan, model, tmp_path / "a", alpha=ALPHA, lora_bias=biased, experts=None in projections)
    expected = formula_logits(model, IDS, plan, ALPHA)
    assert (expected - logits(model, IDS)).abs().max() > 0.05
    close(logits(load(model, tmp_path / "a"), IDS), expected)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_shift_with_bias(family, site, tmp_path):
    model = double(family, **({"residual_multiplier": 0.5} if family == "granite" else {}))
    plan = random_plan(model, site, 40, "shift")
    export_lora(plan, model, tmp_path / "a", alpha=ALPHA, lora_bias=True)
    expected = formula_logits(model, IDS, plan, ALPHA)
    assert (expected - logits(model, IDS)).abs().max() > 0.05
    close(logits(load(model, tmp_path / "a"), IDS), expected)


@pytest.mark.parametrize("linear", ["scale", "ablate"])
def test_both_operations_at_both_sides_of_one_biased_layer(linear, tmp_path):
    model = double("llama", mlp_bias=True, attention_bias=True)
    scale, shift = (random_plan(model, WEIGHT_SITES, 30, op, seed=n) for n, op in enumerate((linear, "shift")))
    # At an AU of both, x (1 + gamma) + shift either way: the formula's hooks must not see each other's.
    keys = set(scale.keys())
    shift = shift.take(torch.tensor([i for i, key in enumerate(shift.keys()) if key not in keys]))
    export_lora([scale, (shift, 0.5)], model, tmp_path / "a", alpha=ALPHA, lora_bias=True)
    with formula_at(model, scale, ALPHA):
        expected = formula_logits(model, IDS, shift, 0.5)
    close(logits(load(model, tmp_path / "a"), IDS), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seeds=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    counts=st.lists(st.integers(1, 60), min_size=3, max_size=3),
    alphas=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 4.0]), min_size=3, max_size=3),
    operations=st.lists(st.sampled_from(["scale", "ablate"]), min_size=3, max_size=3),
    exact_ranks=st.booleans(),
)
def test_sums_of_plans_that_share_aus(model, tmp_path, seeds, counts, alphas, operations, exact_ranks):
    plans = [
        (random_plan(model, ("attention", "ffn", "neuron"), count, operation, seed=seed), alpha)
        for seed, count, alpha, operation in zip(seeds, counts, alphas, operations)
    ]
    export_lora(plans, model, tmp_path / "a", rank_pattern=exact_ranks, force=True)
    # One weight edit, by the matrix 1 + sum of gammas - sum of alpha d d', written out: the formula's hooks would work
    # one after the other.
    edited = copy.deepcopy(model)
    for name, sites in find_sites(model, ("attention", "ffn", "neuron")).items():
        for site in sites:
            change = torch.eye(site.width, dtype=torch.float64)
            for plan, alpha in plans:
                rows = [row for row, key in enumerate(plan.keys()) if key[:2] == (name, site.layer)]
                index, vector = plan.index[rows].long(), torch.zeros(site.width, dtype=torch.float64)
                if plan.operation == "scale":
                    vector[index] = alpha * plan.beta[rows].double()
                    change += vector.diag()
                elif rows:
                    vector[index] = plan.delta[rows].double()
                    d = (vector / vector.norm()).float().double()
                    change -= alpha * torch.outer(d, d)
            weight = edited.get_submodule(site.projection).weight.data
            weight.copy_(change @ weight if site.side == "output" else weight @ change)
    close(logits(load(model, tmp_path / "a"), IDS), logits(edited, IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_adapters_err_by_their_rounding(model, dtype, tmp_path):
    plan = random_plan(model, ("attention", "ffn"), 45)
    narrow = tiny_model().to(dtype)
    export_lora(plan, narrow, tmp_path / "a", alpha=ALPHA)
    expected = formula_logits(model, IDS, plan, ALPHA)
    with torch.no_grad():
        found = load(narrow, tmp_path / "a")(**IDS).logits.double()
    assert {p.dtype for n, p in load(narrow, tmp_path / "a").named_parameters() if "lora" in n} == {dtype}
    plain = (formula_logits(narrow, IDS, plan, ALPHA).double() - expected).abs().mean()
    assert (expected - logits(model, IDS)).abs().mean() > 10 * plain
    assert (found - expected).abs().mean() <= 2 * plain


# --- where the weights come from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "offloaded", "peft", "compiled"])
def test_every_source_gives_the_same_files(source, model, tmp_path):
    plan = random_plan(model, ("attention", "ffn"), 30)
    export_lora(plan, model, tmp_path / "a")
    given = copy.deepcopy(model)
    if source == "folder":
        model.save_pretrained(tmp_path / model.__class__.__name__, max_shard_size="30KB")
        given = tmp_path / model.__class__.__name__
    elif source == "offloaded":
        cpu_offload(given, "cpu")
    elif source == "peft":
        given = peft.get_peft_model(given, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    else:
        given = torch.compile(given)
    export_lora(plan, given, tmp_path / "b")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_the_headless_model_has_adapters_too(tmp_path):
    model = double().model
    plan = random_plan(model, ("attention", "ffn"), 30)
    export_lora(plan, model, tmp_path / "a", alpha=ALPHA)
    with formula_at(model, plan, ALPHA), torch.no_grad():
        expected = model(**IDS).last_hidden_state
    with torch.no_grad():
        close(load(model, tmp_path / "a")(**IDS).last_hidden_state, expected)


# --- strength --------------------------------------------------------------------------------------------------------


def scale_all(adapter, factor):
    for module in adapter.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", factor)


@pytest.mark.parametrize("alpha", [-3.0, 0.0, 0.5, 12.0])
@pytest.mark.parametrize(
    "operation, sites",
    [("scale", ("attention", "ffn")), ("ablate", ("attention", "ffn")), ("shift", WEIGHT_SITES)],
)
def test_alpha_can_be_left_to_the_scaling(operation, sites, alpha, model, tmp_path):
    plan = random_plan(model, sites, 30, operation)
    export_lora(plan, model, tmp_path / "one", lora_bias=operation == "shift")
    export_lora(plan, model, tmp_path / "alpha", alpha=alpha, lora_bias=operation == "shift")
    scaled, exported = load(model, tmp_path / "one"), load(model, tmp_path / "alpha")
    scale_all(scaled, alpha)
    torch.testing.assert_close(logits(scaled, IDS), logits(exported, IDS), rtol=1e-5, atol=1e-5)  # float32 gammas
    assert (logits(scaled, IDS) - formula_logits(model, IDS, plan, alpha)).abs().max() < 1e-4


# --- beside other adapters -------------------------------------------------------------------------------------------


def test_it_is_added_to_a_user_s_own_lora(model, tmp_path):
    plan = random_plan(model, "ffn", 12)
    rank = 6
    export_lora(plan, model, tmp_path / "plan", alpha=ALPHA, rank=rank)
    user_lora(model, ["q_proj", "down_proj"], tmp_path / "user", rank)
    adapter = load(model, tmp_path / "plan", "plan")
    adapter.load_adapter(tmp_path / "user", "user", autocast_adapter_dtype=False)
    adapter.add_weighted_adapter(["plan", "user"], [0.5, 1.0], "both", "cat")
    adapter.set_adapter("both")
    # By hand: W + 0.5 gamma W + B A of the user.
    summed = copy.deepcopy(model)
    own = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "user", autocast_adapter_dtype=False)
    for n, layer in enumerate(summed.model.layers):
        rows = plan.of("ffn")[plan.layer == n]
        user = own.get_base_model().model.layers[n]
        weight = layer.mlp.down_proj.weight.data
        index = plan.index[rows].long()
        weight[index] += 0.5 * ALPHA * plan.beta[rows].double()[:, None] * weight[index]
        weight += user.mlp.down_proj.get_delta_weight("default")
        layer.self_attn.q_proj.weight.data += user.self_attn.q_proj.get_delta_weight("default")
    # PEFT makes some of it in float32.
    torch.testing.assert_close(logits(adapter, IDS), logits(summed, IDS), rtol=1e-5, atol=1e-5)


# --- merged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_it_merges_and_unmerges(family, tmp_path):
    model = double(family)
    sites = ("attention", "neuron") if family == "gpt2" else ("attention", "ffn")
    plan = random_plan(model, sites, 40)
    export_lora(plan, model, tmp_path / "a", alpha=ALPHA, experts=family in ("mixtral", "qwen3_moe"))
    expected, unsteered = formula_logits(model, IDS, plan, ALPHA), logits(model, IDS)
    adapter = load(model, tmp_path / "a")
    adapter.merge_adapter(safe_merge=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(logits(adapter, IDS), expected)
        adapter.unmerge_adapter()
    close(logits(adapter, IDS), expected)
    with adapter.disable_adapter():
        close(logits(adapter, IDS), unsteered)  # to rounding: PEFT subtracts what it added
    merged = adapter.merge_and_unload()
    assert type(merged) is type(model)
    close(logits(merged, IDS), expected)


@pytest.mark.parametrize("operation", ["scale", "ablate"])
def test_exact_ranks_are_fewer_numbers_and_leave_other_layers_alone(operation, model, tmp_path):
    plan = random_plan(model, "ffn", 40, operation)
    plan = plan.take(((plan.layer == 0) | ((plan.layer == 2) & (plan.index < 3))).nonzero()[:, 0])
    counts = torch.bincount(plan.layer, minlength=3).tolist()
    assert 0 == counts[1] < counts[2] < counts[0]
    ranks = {}
    for exact in (False, True):
        export_lora(plan, model, tmp_path / str(exact), alpha=ALPHA, rank_pattern=exact)
        adapter = load(model, tmp_path / str(exact))
        close(logits(adapter, IDS), formula_logits(model, IDS, plan, ALPHA))
        layers = [layer.mlp.down_proj for layer in adapter.get_base_model().model.layers]
        ranks[exact] = [layer.lora_A["default"].out_features if hasattr(layer, "lora_A") else 0 for layer in layers]
        scalings = [layer.scaling["default"] for layer in layers if hasattr(layer, "scaling")]
        assert set(scalings) == {1.0}
    needed = counts if operation == "scale" else [1, 0, 1]
    assert ranks == {False: [needed[0]] * 3, True: needed}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_exact_ranks_of_experts(family, tmp_path):
    model = double(family)
    plan = random_plan(model, ("attention", "ffn"), 25)
    export_lora(plan, model, tmp_path / "a", alpha=ALPHA, experts=True, rank_pattern=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a", autocast_adapter_dtype=False)
    close(logits(adapter, IDS), formula_logits(model, IDS, plan, ALPHA))


@pytest.mark.parametrize("inputs", [20, 48])
def test_more_aus_than_a_matrix_has_rank_take_no_more_than_it_has(inputs, tmp_path):
    model = double("llama", intermediate_size=inputs)  # of 32 outputs
    plan = random_plan(model, ("ffn", "neuron"), 55)
    export_lora(plan, model, tmp_path / "a", alpha=ALPHA)
    adapter = load(model, tmp_path / "a")
    assert adapter.peft_config["default"].r == min(inputs, 32)
    close(logits(adapter, IDS), formula_logits(model, IDS, plan, ALPHA))
