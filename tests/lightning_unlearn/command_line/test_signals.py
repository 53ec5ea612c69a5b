"""A signal that comes where an exception gets lost is not lost with it."""

from __future__ import annotations

import signal
import sys

import pytest

from lightning_unlearn.command_line import cli
from lightning_unlearn.command_line.signals import SIGNALS, Stop, stoppable


class Finalised:
    """A signal comes while Python takes it away: what its handler raises there goes nowhere."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_got_lost_ends_a_command_as_any_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda command, arguments: Finalised() and None)
    assert cli.main(["report"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "lightning-unlearn: stopped.\n"


@pytest.mark.parametrize(("what", "number"), [("start", signal.SIGINT), ("finish", signal.SIGTERM)])
def test_a_signal_that_comes_while_signals_are_taken_or_given_back_shows_no_trace(
    what: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda command, arguments: None)
    does = getattr(Stop, what)

    def disturbed(self: Stop) -> None:
        signal.raise_signal(number)
        does(self)

    monkeypatch.setattr(Stop, what, disturbed)
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)  # given back, as the handlers are below
    before = {one: signal.getsignal(one) for one in SIGNALS}
    try:
        assert cli.main(["report"]) == 128 + number
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert capsys.readouterr().err == "lightning-unlearn: stopped.\n"


def test_other_exceptions_that_get_lost_are_shown_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty:
        def __del__(self) -> None:
            raise ArithmeticError

    shown = []
    monkeypatch.setattr("sys.unraisablehook", lambda lost: shown.append(lost.exc_type))
    with stoppable(program=False) as stop:
        Faulty()
        Finalised()
    Faulty()
    assert shown == [ArithmeticError, ArithmeticError]
    assert stop.signal == signal.SIGTERM
