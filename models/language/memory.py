"""Whether a model fits the memory: what it needs, what is free, and what to say about it."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn
from transformers import PreTrainedConfig

from models.engine.architecture import ATTENTION_TYPES
from models.engine.quantized_weight import Format
from models.errors import CacheTooLargeError, ModelError
from models.language.model_files import print_progress

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # what the system gives back when it is needed
LARGE = 1 << 20  # bytes
LOWER = "lower PARLEY_SLOTS or PARLEY_CONTEXT, or set PARLEY_KV_CACHE=float8"

logger = logging.getLogger("parley")


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can be taken: of the memory, and of the swap space, where a model would be too slow to use."""

    memory: int
    swap: int = 0


def free_memory(device: str) -> FreeMemory | None:
    """What is free for a model on a device, or on all devices and the CPU if it is auto; None if that is unknown."""
    try:
        if device == "cpu":
            return _free_on_cpu()
        if device != "auto":
            return FreeMemory(torch.accelerator.get_memory_info(torch.device(device))[0])
        each = [torch.accelerator.get_memory_info(index)[0] for index in range(torch.accelerator.device_count())]
        cpu = _free_on_cpu()
        return FreeMemory(sum(each) + cpu.memory, cpu.swap)
    except (RuntimeError, NotImplementedError, OSError, psutil.Error):  # such as devices that do not tell
        return None


def free_in_cgroup(limit: str, current: str, stat: str) -> int | None:
    """The bytes that a cgroup can still take, by its memory.max, memory.current and memory.stat; None: no limit."""
    if limit.strip() == "max":
        return None
    counts = dict(line.split() for line in stat.splitlines())
    used = int(current) - sum(int(counts.get(name, 0)) for name in RECLAIMABLE)
    return max(0, int(limit) - used)


def cgroups_of(root: Path, membership: str) -> Iterator[Path]:
    """The folders of a process's cgroup and of those around it, by its /proc/self/cgroup; of version 2 only."""
    for line in membership.splitlines():
        if line.startswith("0::/"):
            folder = root / line.removeprefix("0::/")
            while folder != root:
                yield folder
                folder = folder.parent
            yield root


def size_of_weights(model: nn.Module, formats: Mapping[str, Format], dtype: torch.dtype) -> int:
    """The bytes that the weights of a model will take, in these formats by their names, and else in the dtype."""
    return sum(
        round(parameter.numel() * (formats[name].bits / 8 if name in formats else dtype.itemsize))
        for name, parameter in model.named_parameters()
    )


def size_of_cache(config: PreTrainedConfig, slots: int, context: int, dtype: torch.dtype) -> int:
    """The bytes that the keys and values of all slots take at least, by the configuration of a model.

    It is all that they take in most models. What a configuration does not tell, such as recurrent states, counts as 0.
    """
    text: Any = config.get_text_config(decoder=True)
    try:
        types = getattr(text, "layer_types", None)
        layers = sum(kind in ATTENTION_TYPES for kind in types) if types else text.num_hidden_layers
        layers -= len(getattr(text, "cross_attention_layers", None) or ())  # of Mllama, for images: they have no slots
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys, values = (getattr(text, name, None) or size for name in ("qk_head_dim", "v_head_dim"))
        return int(slots * context * layers * heads * (keys + values) * dtype.itemsize)
    except Exception:  # a model without attention, or whose layers have different sizes: then classes raise their own
        return 0


def check_memory(weights: int, free: FreeMemory | None, can_round: bool, cache: int = 0) -> None:
    """Raise ModelError if weights, or these and the cache, fit neither the memory nor the swap space.

    All are bytes. `can_round` is whether PARLEY_QUANTIZE=int4 would make the weights smaller. `cache` is what the cache
    takes from the beginning: on a CPU nothing, since it grows there.
    """
    if free is None or weights + cache <= free.memory + free.swap:
        return
    if weights <= free.memory + free.swap:
        raise CacheTooLargeError(
            f"its weights need {_gigabytes(weights)} and its cache {_gigabytes(cache)}, and {_gigabytes(free.memory)} "
            f"of memory are free: {LOWER}"
        )
    raise ModelError(
        f"its weights need {_gigabytes(weights)}, and {_gigabytes(free.memory)} of memory are free: choose a "
        f"smaller model, or one in fewer bits{', or set PARLEY_QUANTIZE=int4' if can_round else ''}"
    )


def size_of_model(model: nn.Module) -> int:
    """The bytes of all weights and buffers of a model."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class Memory:
    """The bytes of the weights of a model that is loaded, and of its cache when it is full of `tokens`."""

    weights: int
    cache: int
    slots: int
    context: int
    tokens: int

    def line(self, free: FreeMemory | None) -> str:
        """What the model takes, and what is free for its cache beside the weights, if that is known."""
        taken = (
            f"The weights take {_gigabytes(self.weights)}, and {self.slots} slots of {self.context} tokens "
            + ("take up to" if self.tokens >= self.slots * self.context else f"share {self.tokens} tokens in")
            + f" {_gigabytes(self.cache)}"
        )
        if free is None:
            return f"{taken}."
        if self.fits(free):
            return f"{taken}; {_gigabytes(free.memory)} are free."
        return (
            f"{taken}, but only {_gigabytes(free.memory)} are free: if many long conversations run at once, the memory "
            f"runs out; {LOWER}"
        )

    def fits(self, free: FreeMemory | None) -> bool:
        """Whether the cache fits; also if it is unknown what is free."""
        return free is None or self.cache <= free.memory


def tell_memory(memory: Memory, device: torch.device) -> None:
    """Print what a loaded model takes on stderr, or log a warning if its cache may grow too large."""
    free = free_memory("cpu") if device.type == "cpu" else None  # other devices hold the whole cache already
    if memory.fits(free):
        print_progress(memory.line(free))
    else:
        logger.warning(memory.line(free))


def return_freed_memory() -> None:
    """Make glibc return each large tensor's memory when it is freed.

    Otherwise the tensors that weights are made from leave holes: up to the size of the file.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, LARGE)  # M_MMAP_THRESHOLD


def _free_on_cpu() -> FreeMemory:
    limits = []
    with suppress(OSError, ValueError):  # there are none
        for folder in cgroups_of(CGROUPS, OWN_CGROUPS.read_text()):
            with suppress(OSError, ValueError):
                limits.append(
                    free_in_cgroup(*((folder / f"memory.{name}").read_text() for name in ("max", "current", "stat")))
                )
    found = [limit for limit in limits if limit is not None]
    return FreeMemory(min([psutil.virtual_memory().available, *found]), psutil.swap_memory().free)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
