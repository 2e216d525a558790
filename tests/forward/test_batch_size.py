"""The size of a batch: within free memory, no larger than helps, and known for every family."""

import pytest
import torch
from transformers import AutoConfig

import austeer
from austeer import CaptureError
from austeer.forward import batch_size as memory
from austeer.forward.batch_size import LARGEST, automatic_batch_tokens, bytes_a_token
from austeer.forward.capture import LastTokens
from letter_tokens import Letters, letter_pairs
from tiny_models import FAMILIES, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    def set_free(size):
        monkeypatch.setattr(memory, "free_memory", lambda device: size)

    return set_free


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_known_for_every_family(family):
    model = tiny_model(family)
    found = bytes_a_token(model)
    # At least the residual stream and two tensors of the MLP's width, in float32; and not absurdly much.
    assert isinstance(found, int) and 4 * (32 + 2 * 48) <= found <= 100 * 4 * (32 + 2 * 48)
    assert bytes_a_token(model.bfloat16()) * 2 == found


def test_a_size_for_each_layer():
    # Gemma 3n's MLPs are not all of one width.
    model = torch.nn.Linear(1, 1)
    model.config = AutoConfig.for_model("gemma3n_text", hidden_size=32, intermediate_size=[48, 96], num_hidden_layers=2)
    assert bytes_a_token(model) == 4 * (8 * 32 + 3 * 96)


def test_more_experts_hold_more():
    few, many = (bytes_a_token(tiny_model("mixtral", num_experts_per_tok=k)) for k in (1, 3))
    assert few < many


def test_a_batch_fits_into_free_memory(free):
    model = tiny_model("llama")
    for tokens in (100, 500, 900):
        free(int(tokens * bytes_a_token(model) / memory.SHARE) + 1)
        assert automatic_batch_tokens(model, CPU) == tokens


def test_no_batch_is_larger_than_helps_or_too_small_to_run(free):
    model = tiny_model("llama")
    free(10**15)
    assert automatic_batch_tokens(model, CPU) == LARGEST["cpu"]
    assert automatic_batch_tokens(model, torch.device("cuda:0")) == LARGEST["cuda"]
    assert automatic_batch_tokens(model, torch.device("xpu")) == LARGEST["cuda"]
    free(0)
    assert automatic_batch_tokens(model, CPU) == 64


def limited(monkeypatch, tokens):
    """A device that has no room for more tokens at once; what was run on it."""
    run, ran = LastTokens.run, []

    def run_or_fail(self, batch):
        run(self, batch)  # rows are written, perhaps not all of them
        if batch.ids.numel() > tokens:
            next(iter(self.buffers.values()))[batch.texts] = float("nan")
            raise torch.cuda.OutOfMemoryError
        ran.append(batch)

    monkeypatch.setattr(LastTokens, "run", run_or_fail)
    return ran


@pytest.mark.parametrize("share", [True, False])
def test_a_batch_that_does_not_fit_is_run_in_pieces(monkeypatch, share):
    model = tiny_model("llama").double()
    pairs = [(f"the soup was {'abcdefgh'[i % 8] * 9}{'klmnopq'[i % 7]}", " good", " bad") for i in range(60)]
    expected = austeer.measure(model, Letters(), pairs, ["ffn"], share_prompts=share).counters("ffn")
    ran = limited(monkeypatch, 220)
    found = austeer.measure(model, Letters(), pairs, ["ffn"], share_prompts=share)
    assert found.report.shared_prompts == share
    assert len(ran) > 4 and max(batch.ids.numel() for batch in ran) <= 220
    assert any(batch.sees is not None for batch in ran[2:]) == share, "a tree falls into smaller trees"
    for what in ("positive", "negative"):
        assert torch.equal(getattr(found.counters("ffn"), what), getattr(expected, what))


def test_a_text_that_does_not_fit_by_itself(monkeypatch):
    limited(monkeypatch, 220)
    long = ("a view of the river and its boats " * 7, " good", " bad")
    with pytest.raises(CaptureError, match=r"242 tokens.*cpu.*max_length"):
        austeer.measure(tiny_model("llama", max_position_embeddings=512), Letters(), [*letter_pairs(3), long], ["ffn"])
