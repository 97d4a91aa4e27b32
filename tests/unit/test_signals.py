"""The first signal is heard at the next check, the second at once, and handlers are put back."""

import os
import signal

import pytest

from verl.trainer.signals import Interrupted, StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_noted_and_the_second_interrupts(number, code, capfd):
    former = signal.getsignal(number)
    with StopSignals() as signals:
        signals.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as first:
            signals.check()
        with pytest.raises(Interrupted) as second:
            os.kill(os.getpid(), number)
    assert second.value.at_once and not first.value.at_once
    assert first.value.exit_code == second.value.exit_code == code
    assert signal.getsignal(number) is former
    assert "signal again to exit without saving" in capfd.readouterr().err


def test_an_interruption_is_not_an_exception_that_code_may_swallow():
    assert not issubclass(Interrupted, Exception)
