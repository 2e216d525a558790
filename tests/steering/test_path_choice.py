"""Which path a site gets: an edit where possible, the fused kernel only as far as it was measured, and the reason."""

import copy
import json

import pytest
import torch

import austeer
from austeer.steering import columns, fused, routing, run_path
from austeer.steering import path_choice as dispatch
from austeer_kernels import launch
from dense_formula import formula, formula_at, formula_logits, logits, random_plan

CPU = torch.device("cpu")
H100 = ("sm_90", "NVIDIA H100 80GB HBM3", 132)
OUTPUT = launch.form(at_input=False, rows=False)


@pytest.fixture
def limit_of(monkeypatch):
    """Lets every projection have a limit, as a table of a GPU would; a CPU has none."""

    def limit_of(limit):
        monkeypatch.setattr(dispatch, "measured_limit", lambda *_: limit)

    return limit_of


@pytest.fixture
def captured(monkeypatch):
    """As while a CUDA graph is captured, which a CPU has not, of sizes that were run before."""
    monkeypatch.setattr(fused, "capturing", lambda device: True)
    monkeypatch.setattr(fused.Fused, "has_loaded", lambda path, x: True)


def paths_of(steering):
    return {row.path for row in steering.report()}


# --- auto ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "path"), [("scale", "fold"), ("ablate", "fold"), ("shift", "bias")])
@pytest.mark.parametrize("site", ["attention", "ffn", "neuron"])
def test_auto_edits_where_it_can_also_where_fused_was_measured(tiny, tiny_ids, site, operation, path, limit_of):
    limit_of(1000)
    plan = random_plan(tiny, site, 9, operation)
    with austeer.steer(tiny, plan, 2.0) as steering:
        logits(tiny, tiny_ids)
        assert paths_of(steering) == {path} and {row.reason for row in steering.report()} == {""}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"scope": "generation"}, "only some tokens are steered (generation)"),
        ({"scope": (2, 5)}, "only some tokens are steered (tokens 2 to 4)"),
        ({"named": True}, "plans are chosen row by row"),
        ({"named": True, "scope": "prompt"}, "only some tokens are steered (prompt)"),
    ],
)
def test_what_depends_on_the_token_is_never_folded(tiny, arguments, reason):
    """Also where fold would be possible otherwise; the report says why, and mode='fold' is refused with the reason."""
    plan = random_plan(tiny, ("attention", "ffn"), 9)
    arguments = dict(arguments)
    named = arguments.pop("named", False)
    plans = {"one": plan} if named else plan
    report = austeer.steer(tiny, plans, 2.0, **arguments).report()
    assert {row.path for row in report} == {"columns"}
    assert {row.reason.split("; no fused")[0] for row in report} == {f"no fold: {reason}"}
    for mode in ("fold", "bias"):
        with pytest.raises(austeer.SteeringError) as error:
            austeer.steer(tiny, plans, 2.0, mode=mode, **arguments)
        assert f"mode '{mode}' is not possible at site" in str(error.value) and reason in str(error.value)
        assert "Use mode='auto' or 'columns'" in str(error.value)


def test_an_edit_of_the_other_kind_is_refused(tiny):
    for mode, operation, message in (
        ("fold", "shift", "shift changes no weight"),
        ("bias", "scale", "scale is no addition"),
        ("bias", "push", "push is no addition"),
        ("bias", "ablate", "ablate is no addition"),
        ("fused", "ablate", "ablate takes a sum"),
    ):
        with pytest.raises(austeer.SteeringError, match=rf"mode '{mode}'.*{message}"):
            austeer.steer(tiny, random_plan(tiny, "ffn", 9, operation), 1.0, mode=mode)


def test_a_cpu_has_no_measured_limit(tiny):
    for rows, at_input in ((False, False), (True, True)):
        assert dispatch.measured_limit(tiny.model.layers[0].mlp.down_proj, at_input, rows) == 0
        assert dispatch.measured_limit(None, at_input, rows) == 0
    with launch.preferring(fused=[launch.Limit(OUTPUT, ("float32",), 32, 64, 99)]):
        report = austeer.steer(tiny, random_plan(tiny, "ffn", 9, "push"), 1.0).report()
    assert {(row.path, row.reason) for row in report} == {
        ("columns", "no fold: push is not linear; no fused: not measured to be faster here")
    }


# --- the limit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How many tokens went through the fused kernel at each call."""
    tokens, kernel = [], fused.steered_linear_op

    def counting(x, *rest):
        tokens.append(x.shape[0])
        return kernel(x, *rest)

    monkeypatch.setattr(fused, "steered_linear_op", counting)
    return tokens


def test_auto_uses_the_fused_kernel_only_under_capture(tiny, tiny_ids, limit_of, counted):
    """Elsewhere its launch costs more host time than the whole layer."""
    limit_of(1000)
    plain, plan = copy.deepcopy(tiny), random_plan(tiny, "ffn", 60, "push")
    with austeer.steer(tiny, plan, 1.5) as steering:
        torch.testing.assert_close(logits(tiny, tiny_ids), formula_logits(plain, tiny_ids, plan, 1.5))
        assert paths_of(steering) == {"fused"} and not counted
        reason = "no fold: push is not linear; fused under CUDA graphs up to 1000 tokens, else columns"
        assert {row.reason for row in steering.report()} == {reason}


@pytest.mark.parametrize("named", [False, True])
def test_a_capture_takes_only_kernels_that_were_loaded(tiny, monkeypatch, limit_of, counted, named):
    """A driver refuses to load code during a capture; what was not run before is steered by PyTorch's operations."""
    limit_of(1000)
    on, sparse, took = [False], columns.sparse, []
    for module in (fused, columns, run_path):
        monkeypatch.setattr(module, "capturing", lambda device: on[0])
    for module in (fused, columns):
        monkeypatch.setattr(module, "capturable", lambda device: True)
    monkeypatch.setattr(columns, "sparse", lambda x, *rest: took.append(len(x)) or sparse(x, *rest))
    plan, plain = random_plan(tiny, ("ffn", "layer"), 60, "push"), copy.deepcopy(tiny)
    ids = [{"input_ids": torch.full((rows, 1), 7)} for rows in (3, 5)]
    expected = [formula_logits(plain, each, plan, 1.5) for each in ids]
    with austeer.steer(tiny, {"a": plan} if named else plan, 1.5, check=False) as steering:
        if named:
            steering.rows("a")
        for _ in range(3):
            torch.testing.assert_close(logits(tiny, ids[0]), expected[0])
        assert (counted, took) == ([3] * 3, [3] * 6), "once each: ffn's product and columns, layer's columns"
        on[0] = True
        torch.testing.assert_close(logits(tiny, ids[0]), expected[0])
        assert (counted, took) == ([3] * 6, [3] * 9)
        torch.testing.assert_close(logits(tiny, ids[1]), expected[1])
        assert (counted, took) == ([3] * 6, [3] * 9)


def test_a_pass_that_a_bias_steers_loads_the_kernels_of_a_capture(tiny, monkeypatch, limit_of, counted):
    """A pass that is captured never has the bias, as its replays may be in scope or not."""
    limit_of(1000)
    on, sparse, took = [False], columns.sparse, []
    for module in (fused, columns, run_path, routing):
        monkeypatch.setattr(module, "capturing", lambda device: on[0])
    for module in (fused, columns):
        monkeypatch.setattr(module, "capturable", lambda device: True)
    monkeypatch.setattr(columns, "sparse", lambda x, *rest: took.append(len(x)) or sparse(x, *rest))
    plan, plain, ids = random_plan(tiny, ("ffn", "layer"), 60, "shift"), copy.deepcopy(tiny), torch.full((3, 1), 7)
    expected = formula_logits(plain, {"input_ids": ids}, plan, 1.5)
    with austeer.steer(tiny, plan, 1.5, scope="prompt") as steering:
        assert paths_of(steering) == {"bias"}
        for row in steering.report():
            assert ("fused under CUDA graphs up to 1000 tokens" in row.reason) == (row.site == "ffn")
        for _ in range(2):
            torch.testing.assert_close(logits(tiny, {"input_ids": ids}), expected)
            assert (counted, took) == ([3] * 3, [3] * 6), "once each: ffn's product and columns, layer's columns"
        on[0] = True
        torch.testing.assert_close(logits(tiny, {"input_ids": ids}), expected)
        assert (counted, took) == ([3] * 6, [3] * 9)


def test_a_kernel_is_loaded_for_each_dtype(tiny, monkeypatch):
    for module in (fused, columns):
        monkeypatch.setattr(module, "capturable", lambda device: True)
    took, sparse = [], columns.sparse
    monkeypatch.setattr(columns, "sparse", lambda x, *rest: took.append(x.dtype) or sparse(x, *rest))
    plan, ids = random_plan(tiny, "ffn", 60, "push"), {"input_ids": torch.tensor([[7]])}
    with austeer.steer(tiny, plan, 1.5, mode="columns"):
        for _ in range(2):
            logits(tiny, ids)
            with torch.autocast("cpu", torch.bfloat16):
                logits(tiny, ids)
    assert took == [torch.float32] * 3 + [torch.bfloat16] * 3


@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_a_projection_is_called_by_its_argument_s_name(tiny, site):
    plan = random_plan(tiny, site, 60)
    layer = tiny.model.layers[0]
    projection = layer.self_attn.o_proj if site == "attention" else layer.mlp.down_proj
    x = torch.randn(1, 3, projection.in_features)
    with torch.no_grad(), austeer.steer(tiny, plan, 1.5, mode="fused"):
        assert torch.equal(projection(input=x), projection(x))
        logits(tiny, {"input_ids": torch.tensor([[3, 4]])})


@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_auto_uses_the_fused_kernel_exactly_up_to_the_limit(tiny, site, limit_of, captured, counted):
    limit_of(6)
    plain, plan = copy.deepcopy(tiny), random_plan(tiny, site, 60, "push")
    assert set(plan.layer.tolist()) == {0, 1, 2}
    ids = torch.randint(3, 999, (3, 4), generator=torch.Generator().manual_seed(2))
    with austeer.steer(tiny, plan, 1.5, check=False) as steering:
        for rows, columns in ((1, 1), (2, 3), (3, 2), (1, 4), (1, 7), (3, 3), (3, 4)):
            some = {"input_ids": ids[:rows].repeat(1, 2)[:, :columns]}
            counted.clear()
            got = logits(tiny, some)
            assert counted == ([rows * columns] * 3 if rows * columns <= 6 else []), (rows, columns)
            torch.testing.assert_close(got, formula_logits(plain, some, plan, 1.5))
        assert paths_of(steering) == {"fused"}
        assert {row.reason.split(":")[0] for row in steering.report()} == {"no fold"}
        assert {row.calls for row in steering.report()} == {7}


@pytest.mark.parametrize("limit", [1, 18, 26, 27, 1000])
@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_rows_of_plans_are_right_on_both_sides_of_the_limit(lively, padded, site, limit, limit_of, captured, counted):
    """27 tokens: three rows of nine, one with its own plan, one with none and one with another."""
    limit_of(limit)
    plans = {"a": random_plan(lively, site, 40), "b": random_plan(lively, site, 40, "shift", seed=3)}
    alpha = {"a": 2.0, "b": -1.0}
    expected = []
    for i, name in enumerate(("a", None, "b")):
        alone = {key: value[i : i + 1] for key, value in padded.items()}
        with formula_at(lively, plans[name or "a"], alpha.get(name, 0.0)):
            expected.append(logits(lively, alone))
    with austeer.steer(lively, plans, alpha) as steering, steering.rows(["a", None, "b"]):
        got = logits(lively, padded)
        assert paths_of(steering) == {"fused"}
        assert {row.tokens for row in steering.report()} == {18}
    assert bool(counted) == (limit >= 27)
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(got[real], torch.cat(expected)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_a_scope_with_a_limit_is_right_in_prefill_and_decode(lively, padded, site, limit_of, captured, counted):
    """The prompt of 27 tokens is above the limit, and each decoded step of 3 below it."""
    limit_of(5)
    plan = random_plan(lively, site, 60, "push")
    for scope in ("generation", "prompt", (7, 11)):
        counted.clear()
        options = {"max_new_tokens": 5, "do_sample": False}
        with austeer.steer(lively, plan, 3.0, scope=scope, mode="columns"):
            expected = lively.generate(**padded, **options)
        with austeer.steer(lively, plan, 3.0, scope=scope) as steering:
            assert torch.equal(lively.generate(**padded, **options), expected)
            assert paths_of(steering) == {"fused"}
        assert set(counted) == (set() if scope == "prompt" else {3})


def test_sites_that_the_fused_kernel_cannot_take_get_columns_beside_it(tiny, tiny_ids, limit_of, captured):
    """The layer's output is no projection; ffn and neuron share one, and only one of them can be inside it."""
    limit_of(1000)
    plain = copy.deepcopy(tiny)
    plans = [random_plan(tiny, site, 60, "push", seed=i) for i, site in enumerate(("ffn", "neuron", "layer"))]
    handles = [handle for plan in plans for handle in formula(plain, plan, 0.5)]
    expected = logits(plain, tiny_ids)
    for handle in handles:
        handle.remove()
    with austeer.steer(tiny, plans[0] + plans[1] + plans[2], 0.5) as steering:
        torch.testing.assert_close(logits(tiny, tiny_ids), expected)
        taken = {row.site: row.path for row in steering.report()}
    assert sorted((taken["ffn"], taken["neuron"])) == ["columns", "fused"] and taken["layer"] == "columns"


def test_plans_with_and_without_magnitude_at_one_site_get_columns(tiny, tiny_ids, limit_of):
    limit_of(1000)
    plain = copy.deepcopy(tiny)
    a, b = random_plan(tiny, "ffn", 60), random_plan(tiny, "ffn", 60, "push", seed=1)
    with austeer.steer(tiny, {"a": a, "b": b}, {"a": 1.0, "b": 2.0}) as steering, steering.rows(["b", "a"]):
        got = logits(tiny, tiny_ids)
        assert paths_of(steering) == {"columns"}
    expected = [
        formula_logits(plain, {"input_ids": tiny_ids["input_ids"][i : i + 1]}, plan, alpha)
        for i, (plan, alpha) in enumerate(((b, 2.0), (a, 1.0)))
    ]
    torch.testing.assert_close(got, torch.cat(expected))
    with pytest.raises(austeer.SteeringError, match=r"mode 'fused'.*plans with and without magnitude \(push\) meet"):
        austeer.steer(tiny, {"a": a, "b": b}, 1.0, mode="fused")


@pytest.mark.parametrize("site", ["attention", "neuron"])
def test_fused_as_asked_has_the_limit_of_the_kernel(tiny, site, limit_of, counted):
    limit_of(1)
    plain, plan = copy.deepcopy(tiny), random_plan(tiny, site, 60, "push")
    ids = torch.randint(3, 999, (5, 13), generator=torch.Generator().manual_seed(2))
    with austeer.steer(tiny, plan, 1.5, mode="fused", check=False) as steering:
        for rows in (4, 5):
            some = {"input_ids": ids[:rows]}
            torch.testing.assert_close(logits(tiny, some), formula_logits(plain, some, plan, 1.5))
        assert {(row.path, row.reason, row.calls) for row in steering.report()} == {
            ("fused", "as asked; fused up to 64 tokens, else columns", 2)
        }
    assert counted == [52] * 3, "65 tokens are one too many"


# --- the tables' limits ----------------------------------------------------------------------------------------------


@pytest.fixture
def measured_on_h100(tmp_path, monkeypatch):
    """Tables in a folder of their own, and a device that says it is an H100."""
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    monkeypatch.setattr(launch, "device_profile", lambda device: H100 if device.type == "cuda" else ("x", "cpu", 4))
    content = {
        "source": "test",
        "architectures": ["sm_90"],
        "devices": ["NVIDIA H100 80GB HBM3"],
        "entries": [],
        "fused": [
            {"op": OUTPUT, "dtypes": ["bfloat16", "float16"], "n": 4096, "k": 14336, "m": 16},
            {"op": OUTPUT, "dtypes": ["bfloat16"], "n": 4096, "k": 4096, "m": 4},
            {"op": OUTPUT, "dtypes": ["bfloat16"], "n": 128, "k": 128, "m": 512},
        ],
    }

    def write(**changes):
        (tmp_path / "h100.json").write_text(json.dumps({**content, **changes}))
        launch.forget()

    write()
    yield write
    monkeypatch.undo()
    launch.forget()


CUDA = torch.device("cuda", 0)


def test_the_nearest_measured_shape_decides(measured_on_h100):
    def limit(n, k, dtype=torch.bfloat16, device=CUDA):
        return launch.fused_up_to(n, k, dtype, device)

    assert limit(4096, 14336) == limit(4096, 12288) == limit(5120, 14336) == 16
    assert limit(4096, 4096) == limit(4608, 4608) == limit(3584, 3584) == 4
    assert limit(4096, 14336, torch.float16) == 16
    assert limit(4096, 4096, torch.float16) == 0, "too far from the only shape measured in float16"
    assert limit(4096, 14336, torch.float32) == 0, "never measured in float32"
    assert limit(14336, 4096) == limit(576, 1536) == limit(8192, 28672) == 0, "no shape near it was measured"
    assert limit(128, 128) == launch.MOST_TOKENS, "the kernel takes no more"
    assert limit(4096, 14336, device=CPU) == 0


def test_another_device_is_another_matter(measured_on_h100, monkeypatch):
    for other in (("sm_90", "NVIDIA H200", 132), ("sm_80", "NVIDIA A100-SXM4-80GB", 108)):
        monkeypatch.setattr(launch, "device_profile", lambda device, other=other: other)
        launch.forget()
        assert launch.fused_up_to(4096, 14336, torch.bfloat16, CUDA) == 0


def test_a_malformed_limit_is_named(measured_on_h100):
    measured_on_h100(fused=[{"op": OUTPUT, "dtypes": ["bfloat16"], "n": 4096, "k": 4096}])  # no m
    with pytest.raises(ValueError, match=r"h100\.json: entry .*4096.* does not fit"):
        launch.fused_up_to(4096, 4096, torch.bfloat16, CUDA)


def test_preferred_limits_and_entries_are_taken_back():
    entry = launch.Entry(OUTPUT, ("float32",), 1, 64, 32, 128, 8, k=64, block_k=32)
    before = launch.settings(OUTPUT, 1, 64, 64, torch.float32, CPU)
    with pytest.raises(KeyError), launch.preferring([entry], [launch.Limit(OUTPUT, ("float32",), 64, 64, 7)]):
        inside = launch.settings(OUTPUT, 1, 64, 64, torch.float32, CPU)
        assert (inside.block_m, inside.block_n, inside.block_k, inside.num_warps) == (32, 128, 32, 8)
        assert launch.settings("steer_columns_", 1, 64, 0, torch.float32, CPU).block_m == 1
        assert launch.fused_up_to(64, 64, torch.float32, CPU) == 7
        with launch.preferring(fused=[launch.Limit(OUTPUT, ("float32",), 64, 64, 9)]):
            assert launch.fused_up_to(64, 64, torch.float32, CPU) == 9
        raise KeyError
    assert launch.settings(OUTPUT, 1, 64, 64, torch.float32, CPU) == before
    assert launch.fused_up_to(64, 64, torch.float32, CPU) == 0
