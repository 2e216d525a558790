"""Continuations: the model's own greedy text, whatever else is in the batch, and repeatable samples."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from austeer import PairsError
from austeer.forward.generation import continue_prompts

PROMPTS = ["The weekend trip was", "Water", "I read the report this morning, all of it, and thought that it was"]


def naive_greedy(model, tokenizer, prompt, tokens, special=True):
    """The likeliest next token, again and again, without a cache; up to the end of the text."""
    ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_batch_of_unlike_prompts_equals_a_naive_loop(demo):
    expected = [naive_greedy(*demo, prompt, 4) for prompt in PROMPTS]
    assert continue_prompts(*demo, PROMPTS, max_new_tokens=4) == expected
    assert not any(text.startswith(prompt) for text, prompt in zip(expected, PROMPTS))


def test_chat_goes_through_the_template(demo):
    model, tokenizer = demo
    message = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    expected = naive_greedy(model, tokenizer, rendered, 3, special=False)
    assert continue_prompts(model, tokenizer, ["Hi"], chat=True, max_new_tokens=3) == [expected]


def test_seed_decides_samples_and_leaves_the_global_state_alone(tiny, demo):
    def sample(seed):
        return continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=8, temperature=1.5, seed=seed)

    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    first = sample(0)
    assert torch.equal(torch.rand(4), expected)
    assert sample(0) == first and sample(1) != first
    assert first != continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=8), "greedy is no sample"


def test_low_temperature_is_greedy(tiny, demo):
    cold = continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=5, temperature=1e-6)
    assert cold == continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=5)


def test_each_row_ends_where_it_is_told_to(tiny, demo):
    told = []

    def stop(text):
        told.append(text)
        return len(text) >= 12

    whole = continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=12)
    found = continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=12, stop=stop)
    for text, cut in zip(whole, found):
        assert text.startswith(cut) and text != cut and len(cut) >= 12
        assert all(len(seen) < 12 for seen in told if cut.startswith(seen) and seen != cut)
    assert continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=12, stop=lambda text: False) == whole


def test_rendered_prompts_get_no_special_tokens(tiny, demo):
    tokenizer = copy.deepcopy(demo[1])
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    expected = continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=5)
    assert continue_prompts(tiny, tokenizer, PROMPTS, max_new_tokens=5, special=False) == expected
    assert continue_prompts(tiny, tokenizer, PROMPTS, max_new_tokens=5) != expected


def test_tokenizer_without_pad_token(tiny, demo):
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.pad_token = None
    expected = continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=5)
    assert continue_prompts(tiny, tokenizer, PROMPTS, max_new_tokens=5) == expected


def test_eos_appended_by_the_tokenizer_does_not_end_the_prompt(tiny, demo):
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    expected = continue_prompts(tiny, demo[1], PROMPTS, max_new_tokens=5)
    assert continue_prompts(tiny, tokenizer, PROMPTS, max_new_tokens=5) == expected


@pytest.mark.parametrize("prompts, found", [([], "no prompt"), (["Hello", ""], "prompt 1.*empty")])
def test_no_or_an_empty_prompt(tiny, demo, prompts, found):
    with pytest.raises(PairsError, match=found):
        continue_prompts(tiny, demo[1], prompts)


def test_chat_without_a_template(tiny, demo):
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.chat_template = None
    with pytest.raises(PairsError, match="no chat template"):
        continue_prompts(tiny, tokenizer, ["Hello"], chat=True)
