"""Which steering stands in which row, and the prefix cache's keys."""

import hashlib
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.vllm.catalog import Catalog
from austeer.vllm.rows import Rows
from austeer.vllm.scheduler import salted
from austeer.vllm.sets import ServingError, parse
from austeer.vllm.tables import Row, Structure
from made_plans import MODEL, SHIFT

STRUCTURE = Structure(MODEL, 4, {("attention", 1, "linear"): 2, ("layer", 2, "linear"): 2})


def row():
    return STRUCTURE.row([(SHIFT, 2.0)])


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), max_size=40))
@settings(deadline=None, max_examples=50)
def test_no_row_with_users_is_given_to_another(tmp_path_factory, steps):
    """Requests (True) come and (False) go, each with a digest."""
    rows, users, of = Rows(3, tmp_path_factory.mktemp("rows")), Counter(), {}
    for come, digest in steps:
        if come:
            found = rows.take(digest, row)
            if found is None:
                assert len([d for d, count in users.items() if count]) == 3 and not users[digest]
                continue
            assert 0 <= found < 3 and all(of[d] != found for d, count in users.items() if count and d != digest)
            assert not users[digest] or of[digest] == found
            assert rows.file(digest).exists()
            users[digest] += 1
            of[digest] = found
        elif users[digest]:
            rows.give_back(digest)
            users[digest] -= 1


def test_what_was_left_last_stays_longest(tmp_path):
    rows = Rows(2, tmp_path)
    first = {digest: rows.take(digest, row) for digest in "ab"}
    assert rows.take("c", row) is None
    rows.give_back("b")
    rows.give_back("a")
    assert rows.take("a", pytest.fail) == first["a"]  # it stands there
    assert rows.take("c", row) == first["b"] and rows.file("b").exists()  # a worker may be a step behind


def test_files_of_rows_that_went_long_ago_go_too(tmp_path, monkeypatch):
    monkeypatch.setattr("austeer.vllm.rows.KEPT", 2)
    rows = Rows(1, tmp_path)
    for digest in "abacdea":
        rows.take(digest, row)
        rows.give_back(digest)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "d", "e"}


def test_a_row_that_cannot_be_made_is_free_again(tmp_path):
    rows = Rows(1, tmp_path)

    def fail():
        raise ServingError("there is no room for it")

    for _ in range(3):
        with pytest.raises(ServingError, match="no room"):
            rows.take("a", fail)
    assert rows.take("b", row) == 0
    gone = Rows(1, tmp_path / "gone")
    for _ in range(2):
        with pytest.raises(ServingError, match="cannot be written"):
            gone.take("a", row)


def test_a_rows_file_holds_it(tmp_path):
    made = STRUCTURE.row([(SHIFT, 2.0)])
    made.save(tmp_path / "row")
    found = Row.load(tmp_path / "row")
    assert [(place, [t.tolist() for t in units]) for place, units in found.by_place()] == [
        (0, [[3], [0.0], [1.0]]),
        (1, [[0], [0.0], [-4.0]]),
    ]


def blocks(tokens: list[int], size: int, salt: str = "", start: int = 0, stop: int = 10**9, step: int = 1):
    """The hashes of the full blocks of a request whose tokens come ``step`` at a time, as vLLM makes them."""

    def hasher(request):
        done, found = len(request.block_hashes), []
        parent = request.block_hashes[-1] if done else b""
        for end in range((done + 1) * size, len(request.tokens) + 1, size):
            parent = hashlib.sha256(parent + repr(request.tokens[end - size : end]).encode()).digest()
            found.append(parent)
        return found

    request = SimpleNamespace(tokens=[], block_hashes=[])
    ours = salted(hasher, salt, start, stop, size) if salt else hasher
    for begin in range(0, len(tokens), step):
        request.tokens += tokens[begin : begin + step]
        request.block_hashes += ours(request)
    return request.block_hashes


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 23, 24, 40])
def test_blocks_before_the_first_steered_token_are_shared_and_no_others(start):
    tokens, size = list(range(37)), 8
    plain, one, other = (blocks(tokens, size, salt, start) for salt in ("", "one", "other"))
    for number, found in enumerate(zip(plain, one, other)):
        shared = (number + 1) * size <= start
        assert len(set(found)) == (1 if shared else 3), number
    for step in (5, 8, 37):  # as a chat's second turn has the first one's tokens: however many come at once
        assert one == blocks(tokens, size, "one", start, step=step)


def test_blocks_are_those_of_what_is_steered_up_to_their_end():
    """Of a scope that ends with the prompt, a longer prompt with the same tokens is another one from its end on."""
    tokens, size = list(range(40)), 8
    short, long = (blocks(tokens, size, "one", 0, stop) for stop in (10, 30))
    assert [a == b for a, b in zip(short, long)] == [True, False, False, False, False]
    early, late = (blocks(tokens, size, "one", start) for start in (10, 12))
    assert [a == b for a, b in zip(early, late)] == [True, False, False, False, False]


def test_a_folder_of_the_catalog_needs_no_plan(tmp_path):
    assert Catalog(parse(str(tmp_path))).names() == []
