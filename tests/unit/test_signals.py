"""The first signal is heard at the next check, the second ends the process, and handlers are put back."""

import os
import signal
import subprocess
import sys

import pytest

from verl.trainer.signals import Interrupted, StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_raised_by_the_next_check(number, code, capfd):
    former = signal.getsignal(number)
    with StopSignals() as signals:
        signals.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as first:
            signals.check()
    assert first.value.exit_code == code
    assert signal.getsignal(number) is former
    assert "signal again to exit without saving" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_ends_the_process_from_within_any_code(number, code):
    """Native code that finds an exception of a handler fails in its own way; sorting stands for Ray here."""
    script = f"""
import os
from verl.trainer.signals import StopSignals
def key(x):
    os.kill(os.getpid(), {int(number)})
    return x
with StopSignals():
    try:
        sorted([2, 1], key=key)
    finally:
        print("cleaned up")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "stopped without saving" in done.stderr
    assert "cleaned up" not in done.stdout and "Traceback" not in done.stderr


def test_an_interruption_is_not_an_exception_that_code_may_swallow():
    assert not issubclass(Interrupted, Exception)
