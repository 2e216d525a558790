"""Timing: how calls are captured and sampled, how rounds are interleaved, and that a wrong result gets no time."""

import contextlib
from collections import Counter

import pytest
import torch

from bench import graphs

CPU = torch.device("cpu")


def test_a_spread_is_the_median_and_the_quartiles():
    assert graphs.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == graphs.Spread(3.0, 2.0, 4.0, 5)
    assert graphs.ratios([2.0, 6.0, 4.0], [1.0, 3.0, 2.0]) == graphs.Spread(2.0, 2.0, 2.0, 3)


def test_copies_exceed_the_cache_three_times():
    for nbytes in (1, 1000, 1 << 16, 1 << 22):
        copies = graphs.copies_of(nbytes, CPU)
        assert copies == 256 or copies * nbytes > 3 * graphs.l2_bytes(CPU)
        assert 2 <= copies <= 256


def test_each_copy_is_called_equally_often():
    calls = Counter()
    replay = graphs.Replay([lambda i=i: calls.update([i]) or i for i in range(3)], CPU, 1e-9)
    assert calls == Counter(range(3)) and replay.result == 2
    assert replay.count % 3 == 0 and replay.count <= graphs.MOST_CALLS
    assert replay.sample() > 0
    assert set(calls.values()) == {1 + replay.count // 3}
    assert replay.run() == 2
    slow = graphs.Replay([lambda: None] * 3, CPU, 10.0)
    assert slow.count == 3


def test_every_variant_is_sampled_once_a_round_in_changing_order():
    order = []

    class Fake:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def sample(self):
            order.append(self.name)
            return self.seconds

    seconds = graphs.interleaved({name: Fake(name, i) for i, name in enumerate("abc")}, 6)
    assert seconds == {"a": [0] * 6, "b": [1] * 6, "c": [2] * 6}
    rounds = {tuple(order[i : i + 3]) for i in range(0, 18, 3)}
    assert len(rounds) > 1 and all(sorted(r) == list("abc") for r in rounds)


def test_a_wrong_result_gets_no_time():
    exact = torch.randn(64, 64, dtype=torch.float64)
    plain = exact.bfloat16()
    error, own = graphs.check("right", plain.clone(), plain, exact)
    assert error == own > 0
    for wrong in (plain * 1.02, plain.clone().fill_(float("nan")), torch.where(plain > 3, torch.nan, plain)):
        with pytest.raises(graphs.WrongResultError, match=r"errs by .* gets no time"):
            graphs.check("wrong", wrong, plain, exact)
    with pytest.raises(graphs.WrongResultError, match=r"gives \[64, 1\]"):
        graphs.check("wrong", plain[:, :1], plain, exact)
    graphs.check("exact", exact.float().double(), exact, exact.float().double())  # nothing errs


def test_capture_on_a_gpu_warms_every_copy_and_times_the_second_replay(monkeypatch):
    """The GPU's branch with a stand-in for torch.cuda; what it does on a real one is for -m gpu."""
    happened = []

    @contextlib.contextmanager
    def within(name):
        happened.append(f"begin {name}")
        yield
        happened.append(f"end {name}")

    class Stream:
        def wait_stream(self, other):
            happened.append("wait")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("synchronize")

        def elapsed_time(self, end):
            return 6.0  # ms

    class Graph:
        def replay(self):
            happened.append("replay")

    monkeypatch.setattr(graphs, "capture_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within("warm-up"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: within("capture"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("synchronize"))
    calls = [lambda i=i: happened.append(i) or i for i in range(2)]
    replay = graphs.Replay(calls, torch.device("cuda", 0), 0.25e-3)
    once = [0, 1]
    passes = replay.count // 2
    assert passes == 3  # 1.5 ms of calls that take 0.25
    warmed = ["wait", "begin warm-up", *once, "end warm-up", "wait"]
    assert happened == [*warmed, "begin capture", *once * 3, "end capture"]
    happened.clear()
    assert replay.sample() == pytest.approx(6.0e-3 / 6)
    assert happened == ["replay", "record", "replay", "record", "synchronize"]
    assert replay.run() == 1 and happened[-2:] == ["replay", "synchronize"]


@pytest.mark.gpu
def test_a_graph_on_a_gpu_gives_what_its_calls_give():
    device = torch.device("cuda", torch.cuda.current_device())
    xs = [torch.randn(64, 64, device=device) for _ in range(3)]
    replay = graphs.Replay([lambda x=x: x @ x for x in xs], device, 1e-5)
    torch.testing.assert_close(replay.run(), xs[-1] @ xs[-1])
    xs[-1].fill_(1.0)
    torch.testing.assert_close(replay.run(), torch.full_like(xs[-1], 64.0))
    assert 1e-7 < replay.sample() < 1e-3
