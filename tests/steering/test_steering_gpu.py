"""Steering on a GPU: captured decode steps, compiled decode, both precisions, models that move, the choice of path.

Each test also runs on the CPU, where a captured step is the step itself: what a GPU adds is the graph and the kernels.
"""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import austeer
from austeer_kernels import launch
from dense_formula import OPERATION, PATHS, assert_unchanged, formula_at, logits, random_plan, snapshot

PROMPT, LENGTH, STEPS = 6, 24, 5
MODES = PATHS


@pytest.fixture
def model(device):
    """A tiny Llama on the device, with weights large enough that steering shows. Needs no file."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 3
    return model.to(device)


def random_ids(device, rows=3, columns=PROMPT, seed=1):
    return torch.randint(3, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(device)


def _copied(attributes):
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in attributes.items()}


class Decoder:
    """Decodes given tokens with a static cache, one at a time; all that changes between steps is in buffers.

    Args:
        capture: make the step a CUDA graph, and replay it. Nothing on a CPU.
        call: the model, or a compiled form of it; the prompt goes through ``model``.
    """

    @torch.no_grad()
    def __init__(self, model, prompt, capture=False, call=None):
        self.call = model if call is None else call
        self.cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        model(prompt, past_key_values=self.cache, use_cache=True)
        rows, self.length = prompt.shape
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=prompt.device)
        self.position = torch.full_like(self.token, self.length)
        self.mask = torch.zeros(rows, 1, 1, LENGTH, dtype=torch.bool, device=prompt.device)
        self.mask[..., : self.length] = True
        self.graph = None
        if capture and prompt.device.type == "cuda":
            self._capture()

    def _forward(self):
        # A mask of four dimensions is taken as it is: nothing is worked out on the host, which a graph would freeze.
        return self.call(
            input_ids=self.token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits

    def _capture(self):
        before = [(layer, _copied(vars(layer))) for layer in self.cache.layers]
        self.mask[..., self.length] = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.out = self._forward()
        self.mask[..., self.length] = False
        for layer, values in before:  # the steps that warmed up have filled the cache
            for name, value in values.items():
                if torch.is_tensor(value):
                    getattr(layer, name).copy_(value)
                else:
                    setattr(layer, name, value)

    @torch.no_grad()
    def step(self, token):
        """The logits [rows, vocabulary] after one more token a row."""
        self.token.copy_(token)
        self.position.fill_(self.length)
        self.mask[..., self.length] = True
        self.length += 1
        if self.graph is None:
            return self._forward()[:, -1].clone()
        self.graph.replay()
        return self.out[:, -1].clone()


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def differ(a, b):
    assert (a - b).abs().max() > 1e-2


# --- captured decode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_alpha_and_k_change_between_replays(model, device, site, mode):
    plain, plan = copy.deepcopy(model), random_plan(model, site, 40, OPERATION[mode])
    prompt, tokens = random_ids(device), random_ids(device, columns=STEPS, seed=2)
    unsteered = Decoder(plain, prompt)
    with austeer.steer(model, plan, 2.0, mode=mode) as steering:
        captured, eager = Decoder(model, prompt, capture=True), Decoder(model, prompt)
        for i, (alpha, k) in enumerate(((2.0, 40), (-1.0, 40), (3.0, 7), (0.5, 1), (2.0, 40))):
            steering.alpha, steering.k = alpha, k
            got = captured.step(tokens[:, i : i + 1])
            same(got, eager.step(tokens[:, i : i + 1]))
            differ(got, unsteered.step(tokens[:, i : i + 1]))
        assert {row.path for row in steering.report()} == {mode}


@pytest.mark.parametrize("mode", ["fused", "columns", "dense"])
def test_rows_change_between_replays(model, device, mode):
    plain, plans = copy.deepcopy(model), {}
    for seed, (name, operation) in enumerate((("a", "scale"), ("b", "shift"))):
        plans[name] = random_plan(model, ("attention", "ffn"), 40, operation, seed=seed)
    prompt, tokens = random_ids(device), random_ids(device, columns=STEPS, seed=2)
    unsteered = Decoder(plain, prompt)
    choices = (["a", None, "b"], ["b", None, "a"], [None, None, "a"], [None, None, None], ["a", None, "a"])
    with austeer.steer(model, plans, {"a": 2.0, "b": 1.0}, mode=mode) as steering, steering.rows(choices[0]):
        captured, eager = Decoder(model, prompt, capture=True), Decoder(model, prompt)
        for i, rows in enumerate(choices):
            steering.rows(rows)
            got = captured.step(tokens[:, i : i + 1])
            same(got, eager.step(tokens[:, i : i + 1]))
            expected = unsteered.step(tokens[:, i : i + 1])
            same(got[1], expected[1])  # never steered, at no step
            differ(got[[0, 2]], expected[[0, 2]])
        steering.alpha = {"a": -1.0, "b": 0.0}
        same(captured.step(tokens[:, :1]), eager.step(tokens[:, :1]))


@pytest.mark.parametrize("mode", ["fused", "columns"])
@pytest.mark.parametrize(
    ("scope", "steered"),
    [("generation", [0, 1, 2, 3, 4]), ((PROMPT + 1, PROMPT + 3), [1, 2]), ((PROMPT + 3, None), [3, 4])],
    ids=str,
)
def test_scopes_hold_inside_a_graph(model, device, scope, steered, mode):
    """One graph is replayed for steps inside and outside the scope: which they are is worked out on the device."""
    plain, plan = copy.deepcopy(model), random_plan(model, ("attention", "ffn"), 60, "push")
    prompt, tokens = random_ids(device), random_ids(device, columns=STEPS, seed=2)
    unsteered = Decoder(plain, prompt)
    with austeer.steer(model, plan, 2.0, scope=scope, mode=mode):
        captured, eager = Decoder(model, prompt, capture=True), Decoder(model, prompt)
        for i in range(STEPS):
            got, expected = captured.step(tokens[:, i : i + 1]), unsteered.step(tokens[:, i : i + 1])
            same(got, eager.step(tokens[:, i : i + 1]))
            if i < steered[0]:
                same(got, expected)
            else:  # later ones see a cache that was steered
                differ(got, expected)


@torch.no_grad()
def test_a_graph_beside_passes_that_have_the_shift_in_their_biases(model, device):
    """Neither reads what the other needs: the graph was captured without the bias, and none is left there."""
    plain, plan = copy.deepcopy(model), random_plan(model, ("attention", "ffn", "layer"), 60, "shift")
    prompt, tokens = random_ids(device), random_ids(device, columns=STEPS, seed=2)
    with austeer.steer(plain, plan, 2.0, scope="generation", mode="columns"), torch.no_grad():
        reference = Decoder(plain, prompt)
        expected = [reference.step(tokens[:, i : i + 1]) for i in range(STEPS)]
    biases = []
    with austeer.steer(model, plan, 2.0, scope="generation") as steering:
        captured = Decoder(model, prompt, capture=True)
        model.model.norm.register_forward_pre_hook(lambda *_: biases.append(model.model.layers[1].mlp.down_proj.bias))
        cache = model(prompt, use_cache=True).past_key_values
        for i in range(STEPS):
            biases.clear()
            eager = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            assert biases[0] is not None and model.model.layers[1].mlp.down_proj.bias is None
            torch.testing.assert_close(eager[:, -1], expected[i].reshape(eager[:, -1].shape), rtol=1e-3, atol=1e-3)
            same(captured.step(tokens[:, i : i + 1]), expected[i])
        assert {row.path for row in steering.report()} == {"bias"}


def test_the_prompt_length_changes_between_replays(model, device):
    plain, plan = copy.deepcopy(model), random_plan(model, "ffn", 60, "push")
    prompt, tokens = random_ids(device), random_ids(device, columns=STEPS, seed=2)
    unsteered = Decoder(plain, prompt)
    with austeer.steer(model, plan, 2.0, scope="generation") as steering:
        steering.prompt_length = PROMPT
        captured, eager = Decoder(model, prompt, capture=True), Decoder(model, prompt)
        for i, length in enumerate((LENGTH, LENGTH, PROMPT + 3, PROMPT + 3, PROMPT)):
            steering.prompt_length = length
            got, expected = captured.step(tokens[:, i : i + 1]), unsteered.step(tokens[:, i : i + 1])
            same(got, eager.step(tokens[:, i : i + 1]))
            (same if i < 3 else differ)(got, expected)


def test_two_tables_at_one_site_are_captured(model, device):
    """scale and push meet: two launches a site, and rows of both."""
    plans = {"a": random_plan(model, "ffn", 60), "b": random_plan(model, "ffn", 60, "push", seed=1)}
    prompt, tokens = random_ids(device), random_ids(device, columns=3, seed=2)
    with austeer.steer(model, plans, 1.0) as steering, steering.rows(["a", "b", None]):
        captured, eager = Decoder(model, prompt, capture=True), Decoder(model, prompt)
        for i, rows in enumerate((["a", "b", None], ["b", None, "a"], ["b", "b", "b"])):
            steering.rows(rows)
            same(captured.step(tokens[:, i : i + 1]), eager.step(tokens[:, i : i + 1]))


# --- compiled decode -------------------------------------------------------------------------------------------------


COMPILED = [("alpha", "fold"), ("alpha", "columns"), ("rows", "fused"), ("rows", "columns"), ("scope", "fused")]


@pytest.mark.parametrize(
    ("kind", "mode", "device"),
    [*((*case, "cpu") for case in COMPILED[::4]), *(pytest.param(*c, "cuda", marks=pytest.mark.gpu) for c in COMPILED)],
)
def test_compiled_decode_never_compiles_again(model, device, kind, mode):
    """mode="reduce-overhead", so in CUDA graphs, on a GPU; on a CPU without code generation."""
    torch._dynamo.reset()
    a, b = random_plan(model, "ffn", 40), random_plan(model, "ffn", 40, "shift", seed=1)
    prompt, tokens = random_ids(device), random_ids(device, columns=STEPS, seed=2)
    how = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    options = {"scope": "generation"} if kind == "scope" else {}
    with austeer.steer(model, {"a": a, "b": b} if kind == "rows" else a, 2.0, mode=mode, **options) as steering:
        if kind == "rows":
            steering.rows(["a", None, "b"])
        if kind == "scope":
            steering.prompt_length = PROMPT
        eager = Decoder(model, prompt)
        compiled = Decoder(model, prompt, call=torch.compile(model, fullgraph=True, **how))
        expected, got = [], []
        for decoder, into in ((eager, expected), (compiled, got)):
            with torch._dynamo.config.patch(error_on_recompile=True):
                for i, alpha in enumerate((2.0, -1.0, 3.0, 0.5, 2.0)):
                    if kind == "rows":
                        steering.rows([["a", None, "b"], ["b", "a", None], [None] * 3][i % 3])
                    elif kind == "scope":
                        steering.prompt_length = (PROMPT, LENGTH)[i % 2]
                    else:
                        steering.k = (40, 3)[i % 2]
                    steering.alpha = alpha
                    torch.compiler.cudagraph_mark_step_begin()
                    into.append(decoder.step(tokens[:, i : i + 1]))
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
        differ(got[0], got[1])
        if mode != "fold":
            assert all(row.compiled for row in steering.report())


# --- against the formula ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["fused", "columns"])
@pytest.mark.parametrize("site", ["attention", "ffn", "neuron"])
@pytest.mark.parametrize(
    ("columns", "device"),
    [(PROMPT, "cpu"), *(pytest.param(n, "cuda", marks=pytest.mark.gpu) for n in (1, PROMPT, 150))],
)
def test_rows_err_no_more_than_plain_pytorch(model, device, site, mode, dtype, columns):
    """Against float64 on the CPU; plain PyTorch is mode "dense", the public code's arithmetic. One token: decode."""
    model = model.to(dtype)
    exact_model = copy.deepcopy(model).cpu().double()  # the same weights, so that only the arithmetic differs
    plans = {"a": random_plan(model, site, 60), "b": random_plan(model, site, 60, "shift", seed=3)}
    rows, alpha = ["a", None, "b"], {"a": 2.0, "b": 0.5}
    ids = random_ids("cpu", columns=columns)
    exact = []
    for i, name in enumerate(rows):
        with formula_at(exact_model, plans[name or "a"], alpha.get(name, 0.0)):
            exact.append(logits(exact_model, {"input_ids": ids[i : i + 1]}))
    exact = torch.cat(exact)
    errors = {}
    for which in ("dense", mode):
        with austeer.steer(model, plans, alpha, mode=which) as steering, steering.rows(rows):
            found = logits(model, {"input_ids": ids.to(device)}).cpu().double()
            assert {row.path for row in steering.report()} == {which}
        errors[which] = float((found - exact).norm())
    differ(exact[0], logits(exact_model, {"input_ids": ids})[0])
    assert errors[mode] <= 2 * errors["dense"]


@pytest.mark.parametrize("mode", ["fused", "columns"])
def test_results_repeat_bit_for_bit(model, device, mode):
    model, ids = model.to(torch.bfloat16), {"input_ids": random_ids(device, columns=150)}
    with austeer.steer(model, random_plan(model, ("attention", "ffn"), 60, "push"), 2.0, mode=mode):
        first = logits(model, ids)
        assert all(torch.equal(logits(model, ids), first) for _ in range(5))


# --- a model that moves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["one plan", "rows", "scope"])
def test_a_model_that_moves_while_it_is_steered(model, device, kind, mode):
    if mode in ("fold", "bias") and kind != "one plan":
        pytest.skip("one plan at all positions")
    before, plain = snapshot(model), copy.deepcopy(model).cpu()
    a, b = random_plan(model, ("attention", "ffn"), 40, OPERATION[mode]), random_plan(model, "ffn", 40, seed=1)
    ids, options = random_ids("cpu"), {"scope": (2, 5)} if kind == "scope" else {}
    with austeer.steer(model, {"a": a, "b": b} if kind == "rows" else a, 1.0, mode=mode, **options) as steering:
        if kind == "rows":
            steering.rows(["a", None, "b"])
        for i, place in enumerate((device, "cpu", device, "cpu", device)):
            model.to(place)
            steering.alpha = (1.0, 2.0, -1.0)[i % 3]
            got = logits(model, {"input_ids": ids.to(place)}).cpu()
            with austeer.steer(
                plain, {"a": a, "b": b} if kind == "rows" else a, steering.alpha, mode="dense", **options
            ) as on_cpu:
                if kind == "rows":
                    on_cpu.rows(["a", None, "b"])
                same(got, logits(plain, {"input_ids": ids}))
            differ(got, logits(plain, {"input_ids": ids}))
    assert_unchanged(model, before)


# --- the choice of path ----------------------------------------------------------------------------------------------


def test_auto_takes_the_fused_kernel_only_where_a_table_says_so(model, device):
    plan = random_plan(model, ("attention", "ffn"), 60, "push")
    ids, one = {"input_ids": random_ids(device)}, {"input_ids": random_ids(device, columns=1)}
    with austeer.steer(model, plan, 2.0) as steering:
        expected = logits(model, ids), logits(model, one)
        assert {row.path for row in steering.report()} == {"columns"}
    # Three rows of one token are below the limit, the prompt is above.
    limits = [launch.Limit(form, ("float32",), 64, width, 4) for form in launch.FORMS for width in (64, 96)]
    with launch.preferring(fused=limits):
        with austeer.steer(model, plan, 2.0) as steering:
            same(logits(model, ids), expected[0])
            same(logits(model, one), expected[1])
            taken = {row.site: row.path for row in steering.report()}
        with austeer.steer(model, random_plan(model, "attention", 9)) as steering:
            logits(model, one)
            assert {row.path for row in steering.report()} == {"fold"}, "which runs nothing"
    assert set(taken.values()) == ({"fused"} if device == "cuda" else {"columns"})


def test_a_limit_holds_inside_a_graph(model, device):
    """Batch and steps are as they were captured, so the choice is made once; rows still change."""
    plans = {"a": random_plan(model, "ffn", 60), "b": random_plan(model, "ffn", 60, "shift", seed=1)}
    prompt, tokens = random_ids(device), random_ids(device, columns=3, seed=2)
    limits = [launch.Limit(form, ("float32",), 64, 96, 4) for form in launch.FORMS]
    with launch.preferring(fused=limits), austeer.steer(model, plans, 1.0) as steering:
        steering.rows(["a", None, "b"])
        captured, eager = Decoder(model, prompt, capture=True), Decoder(model, prompt)
        for i, rows in enumerate((["a", None, "b"], ["b", "a", None], [None, None, "a"])):
            steering.rows(rows)
            same(captured.step(tokens[:, i : i + 1]), eager.step(tokens[:, i : i + 1]))
        if device == "cuda":
            assert {row.path for row in steering.report()} == {"fused"}
