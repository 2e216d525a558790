"""Counting tokens: blocks drawn from all pairs, and a stand-in for the tokenizer. Real runs: test_estimate.py."""

from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.costs.workload import workload
from austeer.pairs.pairs import Pairs


class Told:
    """A tokenizer of one token a letter that remembers the numbers with which the pairs below begin."""

    bos_token_id = eos_token_id = eos_token = None

    def __init__(self):
        self.numbers = []

    def __call__(self, texts, **options):
        self.numbers += [int(text[:-1]) for text in texts if text.endswith("a") and len(text) > 1]
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def drawn(pairs, size, blocks):
    """How many pairs there are, as the workload says, and the numbers of those of them that are tokenised."""
    tokenizer, all_ = Told(), Pairs.of([(str(i), "a", "b") for i in range(pairs)])
    options = {"vocabulary": 128, "max_length": 100, "block_pairs": size, "batch_tokens": 100, "share": False}
    found = workload(tokenizer, all_, sample=size * blocks, **options)
    assert found.sampled == len(tokenizer.numbers)
    return found.pairs, tokenizer.numbers


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 6))
def test_whole_blocks_are_drawn(pairs, size, count):
    total, numbers = drawn(pairs, size, count)
    assert total == pairs and numbers == sorted(set(numbers))
    blocks = {number // size for number in numbers}
    assert len(blocks) == min(count, -(-pairs // size))
    assert len(numbers) == sum(min(size, pairs - block * size) for block in blocks)


def test_every_block_is_as_likely_as_another():
    total, numbers = drawn(3000, 3, 200)
    assert total == 3000 and len(numbers) == 600
    for third in range(3):
        assert 140 < sum(third * 1000 <= number < (third + 1) * 1000 for number in numbers) < 260


def test_characters_in_place_of_a_tokenizer():
    pairs = Pairs.of([("12345678", "9", "abcde"), ("12345678", "9", "9")])  # 3 and 4 tokens; the second is no pair
    options = {"vocabulary": 2, "max_length": 100, "block_pairs": 2, "batch_tokens": 100, "sample": 2}
    shared, apart = (workload(None, pairs, share=share, **options) for share in (True, False))
    assert shared.texts == 2 and shared.tokens_texts == apart.tokens_texts == apart.tokens_run == 7
    assert shared.tokens_run == 5 and shared.shapes == {(1, 5, True)}
    assert shared.squares == 25 and apart.squares == 2 * 16 and apart.tokens_padded == 8
    assert shared.packed == 5 * 8 + 5 * 8 + 25 and apart.packed == 8 * 8
