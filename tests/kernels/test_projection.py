"""The steered projection: in Triton's interpreter, and with ``-m gpu`` on a GPU through the registered op."""

import pytest
import torch

import austeer_kernels
from austeer_kernels import launch, projection, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
#: (form, block_m, block_n, block_k, splits), small so that every form meets several tiles and their edges.
FORMS = {
    "decode": ("decode", 16, 64, 32, 1),
    "decode, K split": ("decode", 16, 64, 32, 3),
    "prefill": ("prefill", 32, 32, 32, 1),
}


def settings_of(name: str) -> launch.Settings:
    form, m, n, k, splits = FORMS[name]
    return launch.Settings(form, m, n, k, 4, 2, splits)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Forces one form of the kernel."""
    monkeypatch.setattr(launch, "settings", lambda *_: settings_of(request.param))
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("plans", [1, 3])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 63, 65), (1, 1, 1), (65, 65, 63), (17, 130, 100)])
def test_matches_the_definition(seed, device, form, assert_errs_no_more, dtype, prologue, plans, tokens, n, k):
    *operands, row_plan = case(tokens, n, k, plans, dtype, device, prologue)
    check(assert_errs_no_more, operands, prologue, False, row_plan)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("plans", [1, 2])
def test_magnitude_and_bias(seed, device, form, assert_errs_no_more, prologue, bias, plans):
    *operands, row_plan = case(18, 70, 40, plans, torch.bfloat16, device, prologue, bias)
    check(assert_errs_no_more, operands, prologue, True, row_plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize(("tokens", "plans"), [(1, 1), (3, 2), (33, 1), (200, 1), (200, 3)])
def test_shipped_settings(seed, device, assert_errs_no_more, dtype, prologue, tokens, plans):
    *operands, row_plan = case(tokens, 65, 300, plans, dtype, device, prologue)
    check(assert_errs_no_more, operands, prologue, False, row_plan)


@pytest.mark.parametrize("prologue", [False, True])
def test_tokens_without_a_plan_are_unsteered(seed, device, form, prologue):
    x, weight, bias, gamma, shift, row_plan = case(40, 65, 50, 3, torch.bfloat16, device, prologue)
    row_plan[:16] = -1  # a whole tile of the decode form
    got = project(x, weight, bias, gamma, shift, prologue, False, row_plan)
    zero = torch.zeros_like(gamma)
    unsteered = project(x, weight, bias, zero, zero, prologue, False, row_plan)
    assert torch.equal(got[row_plan < 0], unsteered[row_plan < 0])
    assert not torch.equal(got, unsteered)


@pytest.mark.parametrize(("tokens", "n", "k"), [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_empty_sides(seed, device, form, assert_errs_no_more, tokens, n, k):
    for prologue in (False, True):
        *operands, _ = case(tokens, n, k, 1, torch.float32, device, prologue)
        check(assert_errs_no_more, operands, prologue)


def test_rows_may_be_strided(seed, device, form, assert_errs_no_more):
    x, weight = torch.randn(40, 120).to(device)[::2, 3:68], torch.randn(130, 80).to(device)[::2, 9:74]
    gamma, shift = torch.randn(1, 65, device=device), torch.randn(1, 65, device=device)
    for prologue in (False, True):
        check(assert_errs_no_more, (x, weight, None, gamma, shift), prologue)


def test_steered_input_is_rounded_to_its_dtype(device, form):
    # 1 + 2^-10 is no bfloat16: rounded, both inputs are 1 and cancel; kept in float32, 0.25 would remain.
    x = torch.ones(1, 2, device=device, dtype=torch.bfloat16)
    weight = torch.tensor([[256.0, -256.0]], device=device, dtype=torch.bfloat16)
    shift, zero = torch.tensor([[2.0**-10, 0.0]], device=device), torch.zeros(1, 2, device=device)
    assert project(x, weight, None, zero, shift, True).item() == 0.0
    assert project(x, weight, None, zero, 2.0**3 * shift, True).item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(seed, device, form, dtype):
    *operands, _ = case(32, 96, 64, 1, dtype, device, False)
    got = project(*operands, False)
    once = exact_linear(*operands, False, False, None).to(dtype)
    assert (got != once).double().mean().item() <= 0.02, "a second rounding on the way"


@pytest.mark.parametrize("prologue", [False, True])
def test_repeats_bit_for_bit(seed, device, form, prologue):
    x, weight, bias, gamma, shift, row_plan = case(20, 65, 130, 2, torch.float16, device, prologue)
    first = project(x, weight, bias, gamma, shift, prologue, False, row_plan)
    assert torch.equal(first, project(x, weight, bias, gamma, shift, prologue, False, row_plan))


def test_k_is_split_only_in_the_decode_form(device):
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    few = launch.settings("steered_linear", 1, 64, 4096, torch.bfloat16, place)
    many = launch.settings("steered_linear", 4096, 64, 4096, torch.bfloat16, place)
    assert (few.form, many.form, many.splits) == ("decode", "prefill", 1) and few.splits > 1


@pytest.mark.gpu
@pytest.mark.parametrize("prologue", [False, True])
def test_in_a_cuda_graph(seed, form, assert_errs_no_more, prologue):
    x, weight, bias, gamma, shift, row_plan = case(20, 256, 192, 3, torch.bfloat16, "cuda", prologue)
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
    plain = reference.steered_linear(x, weight, bias, gamma, shift, prologue, False, row_plan)
    assert_errs_no_more(got, plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_models_shape(seed, assert_errs_no_more, dtype, tokens):
    for prologue in (False, True):
        *operands, _ = case(tokens, 4096, 4096, 1, dtype, "cuda", prologue)
        check(assert_errs_no_more, operands, prologue)
