"""Signals as exceptions at places where nothing is half done."""

import os
import signal
import threading

import pytest

from moeprune.interrupts import Interrupted, interruptible


def send(signum: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_at_once(signum):
    with pytest.raises(Interrupted) as caught, interruptible():
        send(signum)
        pytest.fail("went on")
    assert caught.value.status == 128 + signum
    assert str(caught.value) == f"stopped by {signum.name}."


def test_a_held_signal_is_raised_at_the_end_of_the_block():
    done = []
    with pytest.raises(Interrupted), interruptible() as signals:
        with signals.held():
            send()
            done.append("half")
            done.append("whole")
        done.append("after")
    assert done == ["half", "whole"]


def test_a_second_signal_does_not_disturb_saving():
    saved = []
    with pytest.raises(Interrupted), interruptible():
        try:
            send()
        except Interrupted:
            send()
            send(signal.SIGINT)
            saved.append(True)
            raise
    assert saved


def test_without_a_signal_nothing_happens():
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as signals, signals.held():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_exception_handler_takes_it_for_a_failure():
    assert not issubclass(Interrupted, Exception)


def test_another_thread_than_the_main_one_has_no_handlers():
    failures = []

    def work() -> None:
        try:
            with interruptible() as signals, signals.held():
                pass
        except ValueError as error:  # signal only works in main thread
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
