"""Ctrl-C and termination put off: real signals to real processes, and nothing left behind."""

import signal
import subprocess
import sys
import threading

import pytest

from austeer.utils.interrupt import SIGNALS, Interruption, MeasurementInterrupted

PROGRAM = """
import signal, sys
from austeer.utils.interrupt import Interruption
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have been started without
signal.signal(signal.SIGTERM, signal.SIG_DFL)
def wait():
    print("ready", flush=True)
    sys.stdin.readline()
with Interruption() as interruption:
    wait()
print("first", interruption.asked, flush=True)
try:
    with Interruption() as interruption:
        print("ready", flush=True)
        for _ in iter(lambda: interruption.asked, True):
            pass
        wait()
except KeyboardInterrupt:
    print("second", interruption.asked, flush=True)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_only_asks_the_second_interrupts_and_afterwards_it_does_what_it_did(number):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def expect(line):
        assert process.stdout.readline() == f"{line}\n"

    def interrupt(line=""):
        expect("ready")
        process.send_signal(number)
        process.stdin.write(line)  # ends the waiting where the signal came a moment before it, or raised nothing
        process.stdin.flush()

    interrupt("\n")
    expect("first True")
    interrupt()
    interrupt("\n")
    expect("second True")
    interrupt()
    out, err = process.communicate(timeout=60)
    assert out == ""
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in err and process.returncode != 0
    else:
        assert (err, process.returncode) == ("", -signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture
def own_handlers():
    """Handlers of whoever calls, which must come back."""
    before = handlers()
    mine = [lambda number, frame: None for _ in SIGNALS]
    for number, handler in zip(SIGNALS, mine):
        signal.signal(number, handler)
    yield mine
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_handlers_are_restored(own_handlers, error):
    try:
        with Interruption() as interruption:
            assert not set(handlers()) & set(own_handlers) and not interruption.asked
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert handlers() == own_handlers


def test_one_within_another(own_handlers):
    with Interruption() as outer:
        with Interruption() as inner:
            signal.raise_signal(signal.SIGINT)
            assert inner.asked and not outer.asked
        signal.raise_signal(signal.SIGTERM)
        assert outer.asked
    assert handlers() == own_handlers


def test_not_active_nothing_is_changed(own_handlers):
    with Interruption(active=False) as interruption:
        assert handlers() == own_handlers
        signal.raise_signal(signal.SIGINT)
    assert not interruption.asked


def test_in_a_thread_nothing_is_changed(own_handlers):
    found = []

    def work():
        with Interruption() as interruption:
            found.append((handlers() == own_handlers, interruption.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(True, False)]


def test_it_is_an_interruption_to_whoever_catches_one():
    with pytest.raises(KeyboardInterrupt, match="go on"):
        raise MeasurementInterrupted("go on with resume")
    assert not issubclass(MeasurementInterrupted, Exception), "nothing that catches errors may swallow it"
