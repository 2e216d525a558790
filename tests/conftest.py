"""Shared fixtures. Triton's interpreter is chosen here, before anything imports triton."""

import contextlib
import copy
import importlib
import os
import re
import sys
import zlib

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Runs kernels in Triton's interpreter, on the CPU, unless this run is for a GPU (``-m gpu``)."""
    if config.option.markexpr != "gpu" or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.pop("COLUMNS", None)  # a width of the terminal outside is none of a test's


#: What some test modules import, and a machine on which only ``-m gpu`` runs may lack.
OPTIONAL = ("datasets", "gguf", "hypothesis", "markdown_it", "peft", "pyarrow", "zstandard")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """A module that imports an optional package which is not installed is skipped, and the package named."""
    report = yield
    missing = re.search(rf"No module named '({'|'.join(OPTIONAL)})\b", str(report.longrepr or ""))
    if report.failed and missing:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"{missing[1]} is not installed")
    return report


@pytest.fixture(scope="session", autouse=True)
def console_of_any_width():
    """Makes the commands' console before a test sets COLUMNS: rich keeps the width that it finds then, for good."""
    with contextlib.suppress(ImportError):  # an engine's environment has no command line
        importlib.import_module("austeer.cli.common")


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Runs ``austeer`` in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        from austeer.cli import main

        monkeypatch.setattr(sys, "argv", ["austeer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
            sys.exit(0)
        return stop.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test runs: each test is one for the interpreter and one for a GPU."""
    return request.param


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch with a number of this test's own, and prints it (pytest shows it when the test fails)."""
    number = zlib.crc32(request.node.nodeid.encode())
    print(f"seed {number}")
    torch.manual_seed(number)
    return number


@pytest.fixture(scope="module")
def poisoned_empty():
    """torch.empty full of NaN (or large integers): what a kernel leaves unwritten shows in its result."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        t = plain(*args, **kwargs)
        return t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max // 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


@pytest.fixture(scope="session")
def assert_errs_no_more():
    """Checks a result against float64: its largest error is at most twice that of plain PyTorch, plus one rounding."""

    def check(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
        assert found.dtype == plain.dtype and found.shape == exact.shape
        if not exact.numel():
            return
        assert found.isfinite().all(), "the result has entries that were never written, or overflowed"
        scale = exact.abs().max().item()
        floor = torch.finfo(found.dtype).eps / 2 * scale
        allowed = 2 * (plain.double() - exact).abs().max().item() + floor
        error = (found.double() - exact).abs().max().item()
        assert error <= allowed, f"errs by {error:.3g}, allowed {allowed:.3g} (values up to {scale:.3g})"

    return check


@pytest.fixture(scope="session")
def demo():
    """(model, tokenizer): SmolLM2-135M-Instruct in float32, converted once into the user's cache; needs no network."""
    from austeer.models.load import load_model

    return load_model("demo", "float32", "cpu")


@pytest.fixture(scope="session")
def tiny_llama(demo):
    """(model, state): a random Llama of 3 layers that reads the demo's token ids, and torch's generator behind it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(demo[1]),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=demo[1].bos_token_id,
        eos_token_id=demo[1].eos_token_id,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), torch.get_rng_state()


@pytest.fixture
def tiny(tiny_llama):
    """The random Llama, new for each test (so a test may break it); what a test draws does not depend on others."""
    torch.set_rng_state(tiny_llama[1])
    return copy.deepcopy(tiny_llama[0])


@pytest.fixture(scope="session")
def tiny_of(demo):
    """Builds a tiny random model of a family (see tiny_models.py) that reads the demo's token ids."""
    from tiny_models import tiny_model

    def build(family, **changes):
        sizes = {"vocab_size": len(demo[1]), "max_position_embeddings": 512}
        return tiny_model(family, **(sizes | changes))

    return build


@pytest.fixture(scope="session")
def tiny64(demo):
    """A random model whose rounding, in float64, is too small to turn a comparison; one for all examples."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(demo[1]), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="session")
def demo_momentum(demo):
    """Momentum of the demo's first 64 pairs at the sites attention and ffn."""
    import austeer
    from austeer.demo.demo import load_data

    return austeer.measure(*demo, load_data().momentum[:64], ["attention", "ffn"])


@pytest.fixture(scope="session")
def measured(demo):
    """Momentum of a few real pairs at every site."""
    import austeer
    from austeer.demo.demo import load_data
    from austeer.models.sites import SITE_NAMES

    return austeer.measure(*demo, load_data().tuning[:24], SITE_NAMES, progress=False)


@pytest.fixture(scope="session")
def ids(demo):
    """Two prompts of unlike length, padded on the left."""
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.padding_side = "left"
    texts = ["The weekend trip was", "Compared with the inn across the road, this one felt"]
    return tokenizer(texts, return_tensors="pt", padding=True)


@pytest.fixture
def tiny_ids(tiny):
    """Two rows of token ids for the tiny model."""
    return {"input_ids": torch.randint(0, tiny.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(3))}


def enlivened(model):
    """The model, made so that steering it changes what it writes and it never stops by itself."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        for p in model.parameters():
            p *= 3
    return model


@pytest.fixture
def lively(tiny):
    """The tiny model, enlivened."""
    return enlivened(tiny)


@pytest.fixture(scope="module")
def one_lively(tiny_llama):
    """The tiny model, enlivened; one for all tests of a module, which leave it as it is."""
    return enlivened(copy.deepcopy(tiny_llama[0]))


@pytest.fixture
def padded(lively):
    """Three rows, of which the second has four and the third two tokens of padding on the left."""
    ids = torch.randint(3, lively.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :2] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
