"""Signals while the server starts; tests/system/test_shutdown.py has those of a server that runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from models.ops.shutdown import SIGNALS, interruptible


@pytest.fixture
def noted() -> Iterator[list[int]]:
    """The signals that the handlers of a server have noted; these handlers do nothing else."""
    noted = list[int]()

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    yield noted
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_long_step_although_a_server_only_notes_it(number: signal.Signals, noted: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    assert noted == []


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGINT", "SIGTERM"])
def test_after_the_step_the_server_notes_signals_again(number: signal.Signals, noted: list[int]) -> None:
    with interruptible():
        pass
    signal.raise_signal(number)
    assert noted == [number]


def test_in_another_thread_the_handlers_stay(noted: list[int]) -> None:
    seen = list[bool]()

    def step() -> None:
        before = [signal.getsignal(number) for number in SIGNALS]
        with interruptible():
            seen.append([signal.getsignal(number) for number in SIGNALS] == before)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert seen == [True]
