"""Blocks of pairs: together everything, each the same in any process and after any interruption, none held longer."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import Pair, Pairs, PairsError
from austeer.forward.tokens import tokenise
from austeer.measuring.blocks import Blocks
from letter_tokens import Letters, letter_pairs

PAIRS = Pairs.of(letter_pairs(23))
SAME = Pair("the soup was", " good", " good")


def blocks(pairs=PAIRS, **options):
    given = {"source": "p.jsonl", "chat_template": False, "vocabulary": 64, "max_length": 100, "block_pairs": 4}
    return Blocks(options.pop("tokenizer", Letters()), pairs, **given | {"batch_tokens": 64, "share": True} | options)


def assert_same(block, other):
    """Whatever a model could see of two blocks, and all that is counted."""
    assert vars(block).keys() == vars(other).keys()
    assert block.half.tolist() == other.half.tolist()
    for name, value in vars(block).items():
        if name not in ("batches", "half"):
            assert value == getattr(other, name), name
    assert len(block.batches) == len(other.batches)
    for mine, theirs in zip(block.batches, other.batches):
        for name, t in vars(mine).items():
            value = getattr(theirs, name)
            assert torch.equal(t, value) if isinstance(t, torch.Tensor) else t == value, name


def texts_of(block):
    """The tokens of each text of a block, read back from its batches."""
    found = {}
    for batch in block.batches:
        length = batch.ids.shape[1]
        for text, end in zip(batch.texts.tolist(), batch.ends.tolist()):
            row, column = divmod(end, length)
            seen = slice(column + 1) if batch.sees is None else batch.sees[row, column]
            found[text] = batch.ids[row, seen].tolist()
    return [found[i] for i in range(2 * block.pairs)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 100), st.booleans(), st.integers(2, 40))
def test_blocks_are_all_pairs_in_order(block_pairs, batch_tokens, share, max_length):
    found = list(blocks(block_pairs=block_pairs, batch_tokens=batch_tokens, share=share, max_length=max_length))
    tokens = tokenise(Letters(), PAIRS, max_length)
    assert [block.number for block in found] == list(range(len(found)))
    assert [block.offset for block in found] == list(range(0, len(PAIRS), block_pairs))
    assert sum(block.size for block in found) == len(PAIRS)
    assert [i for block in found for i in block.numbers] == tokens.number
    assert all(len(block.numbers) == block.pairs for block in found)
    assert [text for block in found for text in texts_of(block)[: block.pairs]] == tokens.positive
    assert [text for block in found for text in texts_of(block)[block.pairs :]] == tokens.negative
    assert sum(block.cut for block in found) == tokens.cut
    assert sum(block.texts_tokens for block in found) == sum(map(len, tokens.positive + tokens.negative))


def test_pairs_without_a_difference_are_counted_and_not_run():
    mixed = [PAIRS[0], SAME, PAIRS[1], SAME, SAME, SAME, SAME, SAME, PAIRS[2]]
    found = list(blocks(mixed))
    assert [(block.size, block.pairs, block.numbers) for block in found] == [(4, 2, [0, 2]), (4, 0, []), (1, 1, [8])]
    assert found[1].batches == [] and found[1].texts_tokens == 0


def test_long_texts_apart():
    # The prompts are of 8 to 36 letters, so most blocks have both.
    lengths = [
        [len(texts_of(block)[text]) for text in batch.texts] for block in blocks(apart=20) for batch in block.batches
    ]
    assert all(max(found) <= 20 or min(found) > 20 for found in lengths)
    assert {max(found) > 20 for found in lengths} == {True, False}


def test_a_rendered_chat_gets_no_special_tokens():
    seen = []

    class Framing(Letters):
        def __call__(self, texts, add_special_tokens=True, **options):
            seen.append(add_special_tokens)
            return super().__call__(texts)

    list(blocks(tokenizer=Framing()))
    list(blocks(tokenizer=Framing(), chat_template=True))
    assert not any(seen[-6:]) and sum(seen) > 6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9))
def test_parts_are_disjoint_and_together_everything(processes, block_pairs):
    whole = list(blocks(block_pairs=block_pairs))
    parts = [list(blocks(block_pairs=block_pairs, part=(i, processes))) for i in range(processes)]
    together = sorted((block for part in parts for block in part), key=lambda block: block.number)
    assert len(together) == len(whole)
    for block, expected in zip(together, whole):
        assert_same(block, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.data())
def test_going_on_gives_the_rest(processes, data):
    part = (data.draw(st.integers(0, processes - 1)), processes)
    whole = list(blocks(part=part))
    if not whole:
        return
    done = data.draw(st.integers(1, len(whole)))
    last = whole[done - 1]
    rest = list(blocks(part=part, first=last.number + 1, known=last.digest))
    assert len(rest) == len(whole) - done
    for block, expected in zip(rest, whole[done:]):
        assert_same(block, expected)


@pytest.mark.parametrize("done", [1, 2, 5, 6])
@pytest.mark.parametrize(
    "change",
    [
        lambda pairs: [pairs[1], pairs[0], *pairs[2:]],
        lambda pairs: [SAME, *pairs],
        lambda pairs: pairs[:3],
        lambda pairs: [
            Pair(pairs[0].prompt + pairs[0].positive[:1], pairs[0].positive[1:], pairs[0].negative),
            *pairs[1:],
        ],
    ],
)
def test_other_pairs_than_before_are_refused(done, change):
    known = list(blocks())[done - 1].digest
    changed = blocks(change(list(PAIRS)), first=done, known=known)
    with pytest.raises(PairsError, match=r"p\.jsonl.*other pairs.*\d"):
        list(changed)


def test_every_iteration_is_the_same():
    again = blocks()
    for block, expected in zip(list(again), list(again), strict=True):
        assert_same(block, expected)
    assert again.read == len(PAIRS)


def test_a_token_outside_the_vocabulary():
    pairs = [Pair("so", " a", " b"), Pair("so", " c", " w")]
    assert len(list(blocks(pairs, vocabulary=63))) == 1
    with pytest.raises(PairsError, match=r"token 61.*vocabulary.* 61"):
        list(blocks(pairs, vocabulary=61))


def test_a_text_without_a_token_is_named_by_its_number_among_all():
    class Empty(Letters):
        def __call__(self, texts, **options):
            return {"input_ids": [[] if text.endswith("stale") else [3] * len(text) for text in texts]}

    with pytest.raises(PairsError, match=r"p\.jsonl.*pair 9.*no token.*'the bread was stale'"):
        list(blocks([*PAIRS[:9], Pair("the bread was", " fresh", " stale")], tokenizer=Empty()))


def test_pairs_are_not_kept():
    live, made = weakref.WeakSet(), []

    def many():
        for i in range(10_000):
            pair = Pair(f"{i}", "b", "c")
            live.add(pair)
            made.append(i)
            yield pair

    most = total = 0
    for block in blocks(many(), block_pairs=1000, share=False):
        assert len(made) == block.offset + 1000, "no pair is read before its block"
        most, total = max(most, len(live)), total + block.size
    assert total == 10_000 and most <= 2 * 1000
