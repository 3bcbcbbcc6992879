"""A run that gets a signal: it finishes its update, saves, says how to go on, and goes on exactly."""

import os
import signal
import subprocess
import sys

import pytest
from accelerate import PartialState

from green_swin_hf.stop_signals import StopSignals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted_and_handlers_are_put_back(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.agreed(PartialState())
        os.kill(os.getpid(), number)
        assert signals.agreed(PartialState())
        assert signals.received == name
    assert signal.getsignal(number) == before


@pytest.fixture
def _ctrl_c_interrupts():
    """Also where pytest is a shell's background job, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_a_second_ctrl_c_interrupts():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_queue_may_repeat_its_signal():
    with StopSignals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"


def test_outside_the_main_thread_nothing_is_changed():
    code = """
import signal, threading
from green_swin_hf.stop_signals import StopSignals
before = signal.getsignal(signal.SIGTERM)
def use():
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) == before
        print("used")
thread = threading.Thread(target=use)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "used\n", done.stderr
