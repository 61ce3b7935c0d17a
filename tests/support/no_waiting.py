"""Finds operators that would make the host wait for a GPU, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
# Those that read the device, and the one that makes a tensor of the value in `tensor[indices] = value`.
WAITING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.equal, ATEN.scalar_tensor}


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, an operator that would wait for a GPU fails."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
