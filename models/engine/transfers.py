"""Numbers on their way between the host and a device, without that the host waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def use_device(device: torch.device) -> None:
    """Make a GPU the one of this thread: streams, events and kernels of Triton are of that one, whatever they get."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_device(numbers: list[int] | list[float], device: torch.device) -> Tensor:
    """A tensor of some numbers on a device, int64 or float32, (numbers,). The host does not wait for a GPU."""
    tensor = torch.tensor(numbers)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # a copy from other memory would wait


class ToHost:
    """A tensor on its way to the host. The copy begins at once; `tolist` waits for it alone.

    What the device computes after it goes on meanwhile.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def tolist(self) -> Any:
        """The numbers, once they are there."""
        if self._done:
            self._done.synchronize()
        return self._tensor.tolist()
