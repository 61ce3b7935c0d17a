from __future__ import annotations

import torch
from torch import Tensor

from models.engine.graphs import Graphs


def test_without_cuda_a_step_stays_as_it_is() -> None:
    def step() -> Tensor:
        raise AssertionError("a step that is not captured is not run either")

    graphs = Graphs(torch.device("cpu"))
    assert graphs.capture(step) is step


class PretendedGraphs(Graphs):
    """Thinks that it is on a GPU, where there is none."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda"))


def test_nothing_is_captured_while_another_thread_uses_the_device() -> None:
    graphs = PretendedGraphs()
    with graphs.no_capture():
        assert graphs.capture(lambda: torch.zeros(1)) is None
    assert graphs.works


def test_after_a_capture_that_fails_steps_stay_as_they_are() -> None:
    def step() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = PretendedGraphs()
    assert [graphs.capture(step) for _ in range(2)] == [step, step]
    assert not graphs.works
