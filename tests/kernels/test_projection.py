"""The steered projection: in Triton's interpreter, and with ``-m gpu`` on a GPU through the registered op."""

import pytest
import torch

import austeer_kernels
from austeer_kernels import launch, projection, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
#: Small blocks, so that every case meets several of them and their edges.
BLOCK_M, BLOCK_N, BLOCK_K = 16, 64, 32


@pytest.fixture(params=[1, 3], ids=["K whole", "K split"])
def splits(request, monkeypatch):
    """Forces small blocks, and over how many programs K is split."""
    settings = launch.Settings(BLOCK_M, BLOCK_N, BLOCK_K, num_warps=4, num_stages=2, splits=request.param)
    monkeypatch.setattr(launch, "settings", lambda *_: settings)
    return request.param


def project(x, weight, bias, gamma, shift, prologue, magnitude=False, row_plan=None):
    """The registered op on a GPU; the launcher itself on a CPU, where the op is the definition."""
    if x.device.type == "cuda":
        return austeer_kernels.steered_linear(
            x, weight, bias, gamma, shift, prologue=prologue, magnitude=magnitude, row_plan=row_plan
        )
    return projection.steered_linear(x, weight, bias, gamma, shift, prologue, magnitude, row_plan)


def case(tokens, n, k, plans, dtype, device, prologue, bias=True):
    """Random operands; gamma and shift are zero but for some columns, as a plan's are."""
    width = k if prologue else n
    x, weight = torch.randn(tokens, k).to(dtype).to(device), torch.randn(n, k).to(dtype).to(device)
    chosen = torch.rand(width, device=device) < 0.3
    gamma, shift = (torch.randn(plans, width, device=device) * chosen for _ in range(2))
    row_plan = torch.randint(-1, plans, (tokens,), dtype=torch.int32).to(device) if plans > 1 else None
    return x, weight, torch.randn(n).to(dtype).to(device) if bias else None, gamma, shift, row_plan


def exact_linear(x, weight, bias, gamma, shift, prologue, magnitude, row_plan):
    """The definition in float64; the steered input is rounded to x's dtype, as the definition says."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    if prologue:
        identity = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        h = reference.steered_linear(wide[0], identity, None, gamma, shift, True, magnitude, row_plan)
        return torch.nn.functional.linear(h.to(x.dtype).double(), wide[1], wide[2])
    return reference.steered_linear(*wide, gamma, shift, False, magnitude, row_plan)


def check(assert_errs_no_more, operands, prologue, magnitude=False, row_plan=None):
    exact = exact_linear(*operands, prologue, magnitude, row_plan)
    plain = reference.steered_linear(*operands, prologue, magnitude, row_plan)
    assert_errs_no_more(project(*operands, prologue, magnitude, row_plan), plain, exact)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 63, 65), (1, 1, 1), (63, 65, 63), (17, 130, 100)])
def test_matches_the_definition(seed, device, splits, assert_errs_no_more, prologue, plans, tokens, n, k):
    *operands, row_plan = case(tokens, n, k, plans, torch.bfloat16, device, prologue)
    check(assert_errs_no_more, operands, prologue, False, row_plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", [False, True])
def test_every_dtype(seed, device, splits, assert_errs_no_more, dtype, prologue):
    *operands, row_plan = case(33, 65, 97, 3, dtype, device, prologue)
    check(assert_errs_no_more, operands, prologue, False, row_plan)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("plans", [1, 2])
def test_magnitude_and_bias(seed, device, splits, assert_errs_no_more, prologue, bias, plans):
    *operands, row_plan = case(18, 70, 40, plans, torch.bfloat16, device, prologue, bias)
    check(assert_errs_no_more, operands, prologue, True, row_plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "plans", "prologue"), [(1, 1, False), (3, 2, True), (33, 1, True), (64, 1, False), (64, 3, True)]
)
def test_shipped_settings(seed, device, assert_errs_no_more, dtype, tokens, plans, prologue):
    *operands, row_plan = case(tokens, 65, 300, plans, dtype, device, prologue)
    check(assert_errs_no_more, operands, prologue, False, row_plan)


@pytest.mark.parametrize("prologue", [False, True])
def test_tokens_without_a_plan_are_unsteered(seed, device, splits, prologue):
    x, weight, bias, gamma, shift, row_plan = case(20, 65, 50, 3, torch.bfloat16, device, prologue)
    row_plan[:BLOCK_M] = -1
    got = project(x, weight, bias, gamma, shift, prologue, False, row_plan)
    zero = torch.zeros_like(gamma)
    unsteered = project(x, weight, bias, zero, zero, prologue, False, row_plan)
    assert torch.equal(got[row_plan < 0], unsteered[row_plan < 0])
    assert not torch.equal(got, unsteered)


# --- many tokens: the product and the sparse kernel -------------------------------------------------------------------


def product_and_columns(x, weight, bias, gamma, shift, prologue, magnitude, row_plan):
    """The same in plain PyTorch, with its roundings: the definition of each, one after the other."""
    every = torch.arange(gamma.shape[1], device=x.device).expand(gamma.shape)
    y = x.clone() if prologue else torch.nn.functional.linear(x, weight, bias)
    reference.steer_columns_(y, every, gamma, shift, magnitude, row_plan)
    return torch.nn.functional.linear(y, weight, bias) if prologue else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize(
    ("tokens", "n", "k", "plans", "magnitude", "bias"),
    [
        (65, 63, 65, 1, True, True),
        (65, 1, 1, 1, False, False),
        (130, 65, 63, 3, False, True),
        (70, 3, 9, 2, True, False),
    ],
)
def test_more_tokens_than_the_kernel_takes(
    seed, device, assert_errs_no_more, dtype, prologue, tokens, n, k, plans, magnitude, bias
):
    *operands, row_plan = case(tokens, n, k, plans, dtype, device, prologue, bias)
    before = operands[0].clone()
    got = project(*operands, prologue, magnitude, row_plan)
    exact = exact_linear(*operands, prologue, magnitude, row_plan)
    assert_errs_no_more(got, product_and_columns(*operands, prologue, magnitude, row_plan), exact)
    assert torch.equal(operands[0], before), "the input was steered in place"


@pytest.mark.parametrize(("tokens", "kernels"), [(64, ["steered_linear_output"]), (65, ["steer_columns_"])])
def test_the_kernel_takes_as_many_tokens_as_it_says(seed, device, monkeypatch, tokens, kernels):
    asked, settings = [], launch.settings

    def asking(op, *rest):
        asked.append(op)
        return settings(op, *rest)

    monkeypatch.setattr(launch, "settings", asking)
    *operands, _ = case(tokens, 5, 4, 1, torch.float32, device, False)
    project(*operands, False)
    assert asked == kernels and (tokens <= launch.MOST_TOKENS) == (kernels == ["steered_linear_output"])


@pytest.mark.parametrize("prologue", [False, True])
def test_many_tokens_without_a_plan_are_unsteered(seed, device, prologue):
    x, weight, bias, gamma, shift, row_plan = case(70, 9, 7, 3, torch.bfloat16, device, prologue)
    got = project(x, weight, bias, gamma, shift, prologue, False, row_plan)
    left = row_plan < 0
    assert left.any() and torch.equal(got[left], torch.nn.functional.linear(x, weight, bias)[left])


def test_many_tokens_under_autocast_and_with_gradients_keep_their_dtype(seed, device):
    """As the kernel does for few: it computes on what it is given, and is not differentiated."""
    for prologue in (False, True):
        *operands, _ = case(70, 9, 7, 1, torch.float32, device, prologue)
        expected = project(*operands, prologue)
        with torch.autocast(device, torch.bfloat16):
            got = project(*operands, prologue)
        assert got.dtype == torch.float32 and torch.equal(got, expected)
        operands[1].requires_grad_()
        assert not project(*operands, prologue).requires_grad


# --- edges, roundings, order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "n", "k"), [(0, 5, 4), (3, 0, 4), (3, 5, 0), (70, 0, 4), (70, 5, 0)])
def test_empty_sides(seed, device, splits, assert_errs_no_more, tokens, n, k):
    for prologue in (False, True):
        *operands, _ = case(tokens, n, k, 1, torch.float32, device, prologue)
        check(assert_errs_no_more, operands, prologue)


@pytest.mark.parametrize("tokens", [20, 70])
def test_rows_may_be_strided(seed, device, splits, assert_errs_no_more, tokens):
    x, weight = torch.randn(2 * tokens, 120).to(device)[::2, 3:68], torch.randn(130, 80).to(device)[::2, 9:74]
    gamma, shift = torch.randn(1, 65, device=device), torch.randn(1, 65, device=device)
    for prologue in (False, True):
        check(assert_errs_no_more, (x, weight, None, gamma, shift), prologue)


def test_steered_input_is_rounded_to_its_dtype(device, splits):
    # 1 + 2^-10 is no bfloat16: rounded, both inputs are 1 and cancel; kept in float32, 0.25 would remain.
    x = torch.ones(1, 2, device=device, dtype=torch.bfloat16)
    weight = torch.tensor([[256.0, -256.0]], device=device, dtype=torch.bfloat16)
    shift, zero = torch.tensor([[2.0**-10, 0.0]], device=device), torch.zeros(1, 2, device=device)
    assert project(x, weight, None, zero, shift, True).item() == 0.0
    assert project(x, weight, None, zero, 2.0**3 * shift, True).item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(seed, device, splits, dtype):
    *operands, _ = case(32, 96, 64, 1, dtype, device, False)
    got = project(*operands, False)
    once = exact_linear(*operands, False, False, None).to(dtype)
    assert (got != once).double().mean().item() <= 0.02, "a second rounding on the way"


@pytest.mark.parametrize("prologue", [False, True])
def test_float32_is_summed_in_two_levels(seed, device, prologue):
    """Against the error of sums of BLOCK_K products alone; a running sum of those, or of all, errs more."""
    k = 14336
    x, weight, bias, gamma, shift, _ = case(16, 64, k, 1, torch.float32, device, prologue)
    unsteered = x, weight, bias, torch.zeros_like(gamma), torch.zeros_like(shift), prologue
    entry = launch.Entry(launch.form(prologue, False), ("float32",), 16, 64, 16, 64, 4, k=k, block_k=BLOCK_K)
    with launch.preferring([entry]):
        found = project(*unsteered)
    error = (found.double() - exact_linear(*unsteered, False, None)).square().mean().sqrt().item()
    assert error <= (k * BLOCK_K / 2) ** 0.5 * 2**-24, "the analysis beside the kernel"


@pytest.mark.gpu
@pytest.mark.parametrize("prologue", [False, True])
def test_repeats_bit_for_bit(seed, splits, prologue):
    x, weight, bias, gamma, shift, row_plan = case(20, 650, 1300, 2, torch.float16, "cuda", prologue)
    first = project(x, weight, bias, gamma, shift, prologue, False, row_plan)
    assert torch.equal(first, project(x, weight, bias, gamma, shift, prologue, False, row_plan))


@pytest.mark.gpu
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("tokens", [20, 70])
def test_in_a_cuda_graph(seed, splits, assert_errs_no_more, tokens, prologue):
    x, weight, bias, gamma, shift, row_plan = case(tokens, 256, 192, 3, torch.bfloat16, "cuda", prologue)
    project(x, weight, bias, gamma, shift, prologue, False, row_plan)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = project(x, weight, bias, gamma, shift, prologue, False, row_plan)
    # New values in the same tensors: no new capture.
    for t in (x, gamma, shift):
        t.normal_()
    row_plan.random_(-1, 3)
    graph.replay()
    exact = exact_linear(x, weight, bias, gamma, shift, prologue, False, row_plan)
    plain = product_and_columns(x, weight, bias, gamma, shift, prologue, False, row_plan)
    assert_errs_no_more(got, plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_models_shape(seed, assert_errs_no_more, dtype, tokens):
    for prologue in (False, True):
        *operands, _ = case(tokens, 4096, 4096, 1, dtype, "cuda", prologue)
        exact = exact_linear(*operands, prologue, False, None)
        plain = product_and_columns(*operands, prologue, False, None)
        assert_errs_no_more(project(*operands, prologue), plain, exact)
