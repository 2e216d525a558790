"""Packing: no text is lost, each sees itself alone, and what texts share is there once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.forward.packing import ENOUGH, FILL, batches

# Few different tokens, so that texts share beginnings, are beginnings of each other, and repeat.
TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=14)
LIMITS = st.integers(1, 200)


def read_back(batch):
    """What each text of a batch looks like to a decoder: number -> (its tokens, their positions)."""
    rows, length = batch.ids.shape
    found = {}
    for text, end in zip(batch.texts.tolist(), batch.ends.tolist()):
        row, column = divmod(end, length)
        assert 0 <= row < rows
        seen = range(column + 1) if batch.sees is None else batch.sees[row, column].nonzero().flatten().tolist()
        positions = seen if batch.positions is None else batch.positions[row, seen].tolist()
        found[text] = (batch.ids[row, list(seen)].tolist(), list(positions))
    assert len(found) == len(batch.texts)
    return found


def row_lengths(batch):
    """Tokens of each row without padding: up to the last end."""
    length = batch.ids.shape[1]
    lengths = [0] * len(batch.ids)
    for end in batch.ends.tolist():
        lengths[end // length] = max(lengths[end // length], end % length + 1)
    return lengths


@settings(max_examples=150, deadline=None)
@given(TEXTS, LIMITS, st.booleans())
def test_every_text_once_spelt_in_order(texts, tokens, share):
    found = {}
    for batch in batches(texts, tokens, share):
        part = read_back(batch)
        assert not found.keys() & part.keys()
        found |= part
    assert found == {i: (ids, list(range(len(ids)))) for i, ids in enumerate(texts)}


@settings(max_examples=150, deadline=None)
@given(TEXTS, LIMITS)
def test_a_token_sees_its_ancestors_and_itself(texts, tokens):
    for batch in batches(texts, tokens):
        if batch.sees is None:
            assert batch.positions is None
            continue
        length = batch.ids.shape[1]
        for row, used in enumerate(row_lengths(batch)):
            sees, positions = batch.sees[row], batch.positions[row]
            assert not sees.triu(1).any(), "nothing that comes later"
            # One token of each depth up to its own, so a window counted in positions is one counted in tokens.
            for token in range(used):
                *ancestors, last = sees[token].nonzero().flatten().tolist()
                assert last == token
                assert positions[[*ancestors, token]].tolist() == list(range(len(ancestors) + 1))
                if ancestors:
                    assert sees[ancestors[-1]].nonzero().flatten().tolist() == ancestors, "those of its parent"
            rest = torch.arange(used, length)
            assert torch.equal(sees[rest], torch.eye(length, dtype=torch.bool)[rest]), "padding sees itself"
            assert not sees[:used, used:].any(), "and nobody sees padding"
            assert not batch.ids[row, used:].any() and not positions[used:].any()


@settings(max_examples=150, deadline=None)
@given(TEXTS, LIMITS, st.booleans())
def test_limit_is_kept_or_there_is_one_row_of_a_longer_text(texts, tokens, share):
    for batch in batches(texts, tokens, share):
        assert batch.tokens == sum(row_lengths(batch)) <= batch.ids.numel()
        assert batch.ids.shape[1] == max(row_lengths(batch)), "no column of padding alone"
        if batch.ids.numel() > tokens:
            assert len(batch.ids) == 1
            assert batch.ids.shape[1] <= 1.5 * max(len(texts[i]) for i in batch.texts)


@settings(max_examples=150, deadline=None)
@given(TEXTS, LIMITS)
def test_without_sharing_a_row_is_a_text(texts, tokens):
    for batch in batches(texts, tokens, share=False):
        assert batch.positions is None and batch.sees is None and len(batch.ids) == len(batch.texts)
        assert [texts[i] for i in batch.texts] == [ids for ids, _ in read_back(batch).values()]


@settings(max_examples=150, deadline=None)
@given(TEXTS, LIMITS)
def test_sharing_never_runs_more_tokens(texts, tokens):
    shared, plain = (sum(batch.tokens for batch in batches(texts, tokens, share)) for share in (True, False))
    assert shared <= plain == sum(map(len, texts))
    tree = {tuple(ids[: i + 1]) for ids in texts for i in range(len(ids))}
    assert shared >= len(tree), "a token for each different beginning is the least"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(16, 300))
def test_padding_is_bounded(lengths, tokens):
    for batch in batches([[1] * n for n in lengths], tokens, share=False):
        if batch.ids.numel() > ENOUGH * tokens:
            assert all(n >= FILL * batch.ids.shape[1] for n in row_lengths(batch)[1:]), "only like lengths meet"


def test_longest_rows_come_first():
    texts = [[i] * n for i, n in enumerate([3, 40, 5, 9, 41, 2])]  # no two begin alike
    found = [length for batch in batches(texts, 60) for length in row_lengths(batch)]
    assert found == [41, 40, 9, 5, 3, 2]


def words(seed, count):
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_pairs_that_share_a_prompt_are_one_row():
    prompt = words(0, 50)
    texts = [[*prompt, n, *words(n, 2)] for n in range(20)]
    (batch,) = batches(texts, 1000)
    assert batch.tokens == 50 + 20 * 3 and len(batch.ids) == 1
    assert batch.ids[0, :50].tolist() == prompt


def test_a_tree_within_a_tree():
    # The docstring's own example, and a third text that parts from both earlier.
    (batch,) = batches([[1, 2, 3], [1, 2, 4, 5], [1, 9]], 1000)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3, 1]]
    expected = ["100000", "110000", "111000", "110100", "110110", "100001"]
    assert ["".join(map(str, row)) for row in batch.sees[0].int().tolist()] == expected
    assert dict(zip(batch.texts.tolist(), batch.ends.tolist())) == {0: 2, 1: 4, 2: 5}


def test_a_beginning_of_another_text_and_a_duplicate_cost_nothing():
    whole = words(0, 20)
    (batch,) = batches([whole, whole[:7], whole, whole[:1]], 1000)
    assert batch.tokens == 20 and len(batch.ids) == 1
    assert dict(zip(batch.texts.tolist(), batch.ends.tolist())) == {0: 19, 2: 19, 1: 6, 3: 0}


def test_a_few_shared_tokens_are_not_worth_a_mask():
    # Two long texts that have no more than their first token in common: attention over both in one row costs more.
    texts = [[1, *words(0, 600)], [1, *words(1, 600)]]
    assert [batch.sees for batch in batches(texts, 4096)] == [None]
    assert len(next(iter(batches(texts, 4096))).ids) == 2


def test_a_long_prompt_of_many_pairs_makes_rows_within_the_limit():
    prompt = words(0, 300)
    texts = [[*prompt, n, *words(n, 9)] for n in range(100)]
    found = list(batches(texts, 512))
    assert max(batch.ids.numel() for batch in found) <= 512
    assert sum(batch.tokens for batch in found) == 100 * 10 + len(found) * 300 and len(found) == 5


def test_rows_that_need_no_mask_are_apart():
    prompt = words(0, 10)
    texts = [prompt + words(1, 2), prompt + words(2, 2), words(3, 12), words(4, 11)]
    masked, plain = batches(texts, 1000)
    assert masked.sees is not None and sorted(masked.texts.tolist()) == [0, 1]
    assert plain.sees is None and sorted(plain.texts.tolist()) == [2, 3]


@settings(max_examples=100, deadline=None)
@given(TEXTS, LIMITS, st.booleans(), st.integers(1, 12))
def test_long_texts_apart(texts, tokens, share, apart):
    found = {}
    for batch in batches(texts, tokens, share, apart):
        lengths = [len(texts[i]) for i in batch.texts]
        assert max(lengths) <= apart or min(lengths) > apart
        found |= read_back(batch)
    assert found == {i: (ids, list(range(len(ids)))) for i, ids in enumerate(texts)}


def pieces(batch):
    """A batch halved as often as that goes."""
    halves = batch.halves()
    return [batch] if halves is None else [part for half in halves for part in pieces(half)]


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.booleans())
def test_halves_lose_nothing(texts, share):
    for batch in batches(texts, 10**6, share):
        halves = batch.halves()
        if halves is not None and len(batch.ids) > 1:
            assert sum(half.tokens for half in halves) == batch.tokens
            assert [len(half.ids) for half in halves] == [len(batch.ids) // 2, -(-len(batch.ids) // 2)]
        found = {}
        for part in pieces(batch):
            assert len(part.ids) == 1 and part.sees is None, "down to what needs no mask"
            assert part.tokens == sum(row_lengths(part)) <= part.ids.numel()
            assert not found.keys() & read_back(part).keys()
            found |= read_back(part)
        assert found == read_back(batch)
