"""Work ahead: the same items, no further than asked, errors where they belong, and no thread left."""

import queue
import threading
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import austeer
from austeer.utils.background import ahead
from letter_tokens import Letters, letter_pairs
from tiny_models import tiny_model


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "austeer-ahead"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert threads() == []
    yield
    assert threads() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([None, 0, False, "", "x", 3])), st.integers(0, 5))
def test_items_in_order(items, depth):
    assert list(ahead(iter(items), depth)) == items


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_further_ahead_than_asked(depth):
    made = []

    def work():
        for i in range(50):
            made.append(i)
            yield i

    with closing(ahead(work(), depth)) as items:
        for i in items:
            deadline = time.monotonic() + 0.01
            while time.monotonic() < deadline and len(made) <= i + depth + 1:
                time.sleep(0.001)  # as much as it likes
            assert len(made) <= i + 1 + depth + 1, "those ready, and the one for which there is no room yet"
    assert made == list(range(50))


def test_it_is_done_ahead():
    ready = queue.Queue()

    def work():
        yield 0
        ready.put("made")
        yield 1

    with closing(ahead(work())) as items:
        assert next(items) == 0
        assert ready.get(timeout=10) == "made", "before it is asked for"
        assert list(items) == [1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, austeer.PairsError])
def test_an_error_is_raised_where_it_is_reached(error):
    def work():
        yield from range(3)
        raise error("here")

    items, found = ahead(work(), 10), []
    with pytest.raises(error, match="here"):
        for item in items:
            found.append(item)
    assert found == [0, 1, 2]
    assert list(items) == []


def test_closing_ends_the_thread():
    ended = threading.Event()

    def work():
        try:
            yield from range(10**9)
        finally:
            ended.set()

    items = ahead(work())
    assert next(items) == 0 and len(threads()) == 1
    items.close()
    assert threads() == [] and list(items) == []
    assert ended.wait(10), "what it reads from is closed, too"


def test_nothing_starts_before_the_first_item():
    made = []
    items = ahead(made.append(i) for i in range(3))
    assert made == [] and threads() == []
    items.close()
    assert made == []


# --- in a measurement ------------------------------------------------------------------------------------------------


class Failing(Letters):
    """Finds no token in the fifth block."""

    calls = 0

    def __call__(self, texts, **options):
        self.calls += 1
        return super().__call__(texts) if self.calls < 5 else {"input_ids": [[] for _ in texts]}


@pytest.mark.parametrize("tokenizer, weight", [(Failing(), 1.0), (Letters(), float("nan"))])
def test_a_failed_measurement_leaves_no_thread(tokenizer, weight):
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data *= weight
    try:
        austeer.measure(model, tokenizer, letter_pairs(40), block_pairs=2)
    except austeer.AusteerError:
        assert threads() == [], "while the traceback is still held"
    else:
        pytest.fail("nothing was raised")
