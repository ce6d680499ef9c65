"""What a signal does before the first step and after the last, and whose exit code it decides."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from ssmtrain.config import launched
from ssmtrain.train.signals import STOPPING, Signals


class Ended(BaseException):
    """In the place of os._exit."""


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Signals]:
    def end(code: int) -> None:
        raise Ended(code)

    for name in launched.NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "_exit", end)
    before = {number: signal.getsignal(number) for number in STOPPING}
    one = Signals()
    one.install()
    yield one
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("rank", "code"), [("0", 75), ("1", 0)])
def test_before_the_first_step_rank_0_speaks_for_the_run(
    rank: str, code: int, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Were it 75 on all ranks, a rank 0 that fails would have its job requeued, since srun ends the others.
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(Ended) as end:
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.args == (code,)


def test_nothing_disturbs_the_end_of_a_process_that_has_saved(signals: Signals) -> None:
    signals.ignore()
    for number in STOPPING:
        os.kill(os.getpid(), number)
    assert signals.asked is None
    signals.restore()
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in STOPPING)
