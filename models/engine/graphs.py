"""Steps as CUDA graphs: the host launches all kernels of a step at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from models.errors import one_line

Step = Callable[[], Tensor]  # reads tensors that stay where they are, and returns one that stays too

logger = logging.getLogger("parley")


class Graphs:
    """Captures steps as CUDA graphs. On other devices, and after a capture that fails, steps stay as they are.

    All graphs share one pool of memory, since one runs at a time. A pool lives as long as any of its graphs: so there
    is an empty one, which is never dropped.
    """

    def __init__(self, device: torch.device) -> None:
        self.works = device.type == "cuda"
        self._device = device
        self._empty: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None  # for steps that will be captured
        self._capturing = Lock()

    def no_capture(self) -> Lock:
        """Within this context nothing is captured. Entering it waits for a capture that runs."""
        return self._capturing

    def forget(self) -> None:
        """Give the memory of all graphs back, once none of them is used any more."""
        self._empty = None

    def warm_up(self, step: Step) -> Tensor:
        """Run a step that will be captured: what it does only at first is not captured then."""
        if not self.works:
            return step()
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # as torch's documentation advises
            output = step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return output

    def capture(self, step: Step) -> Step | None:
        """The same step as a graph, after its warm-up. None if nothing can be captured now.

        Raises OutOfMemoryError, after which another try may succeed.
        """
        if not self.works:
            return step
        if not self._capturing.acquire(blocking=False):
            return None
        try:
            if not self._empty:
                self._empty, _ = _captured(lambda: torch.zeros(1, device=self._device))
            graph, output = _captured(step, self._empty)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            logger.warning("replies stay slower than possible, since steps cannot be captured: %s", one_line(error))
            self.works = False
            return step
        finally:
            self._capturing.release()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def _captured(step: Step, other: torch.cuda.CUDAGraph | None = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A step as a graph, in the memory pool of another one if that is given, and the tensor that it writes."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=other.pool() if other else None):
            output = step()
    finally:
        torch.cuda.set_stream(stream)  # which a capture that fails does not do
    return graph, output
