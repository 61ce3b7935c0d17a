from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, PreTrainedModel

from models.engine.model_runner import ModelRunner
from models.engine.quantized_weight import Format
from models.errors import CacheTooLargeError, ModelError
from models.language.memory import (
    FreeMemory,
    Memory,
    cgroups_of,
    check_memory,
    free_in_cgroup,
    free_memory,
    size_of_cache,
    size_of_model,
    size_of_weights,
    tell_memory,
)
from tests.engine.architectures import EQUAL, small_model, written
from tests.support.tiny import tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_model

GB = 10**9
CPU = torch.device("cpu")


# What is free


def test_the_cpu_has_memory_free() -> None:
    free = free_memory("cpu")
    assert free is not None
    assert free.memory > 10**6


def test_a_device_that_does_not_tell_is_unknown() -> None:
    assert free_memory("cuda:99") is None


def test_a_cgroup_without_a_limit_is_none() -> None:
    assert free_in_cgroup("max\n", "5000\n", "anon 1\n") is None


def test_what_a_cgroup_can_give_back_counts_as_free() -> None:
    stat = "anon 900\nfile 400\ninactive_file 100\nactive_file 50\nslab_reclaimable 7\nshmem 250\n"
    assert free_in_cgroup("2000\n", "1500\n", stat) == 2000 - 1500 + 157


def test_a_cgroup_over_its_limit_has_nothing_free() -> None:
    assert free_in_cgroup("1000\n", "1500\n", "anon 1500\n") == 0


def test_the_cgroups_around_that_of_a_process_count_too() -> None:
    root = Path("/sys/fs/cgroup")
    text = "3:memory:/old\n0::/system.slice/parley.service\n"
    assert list(cgroups_of(root, text)) == [root / "system.slice/parley.service", root / "system.slice", root]
    assert list(cgroups_of(root, "0::/\n")) == [root]
    assert list(cgroups_of(root, "3:memory:/old\n")) == []


# What weights need


def test_weights_take_their_formats_bits_and_other_parameters_the_dtype() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 32, bias=False), "b": nn.Linear(64, 32, bias=False)})
    assert size_of_weights(model, {"a.weight": Format.Q8_0}, torch.bfloat16) == 2048 * 8.5 / 8 + 2048 * 2
    assert size_of_weights(model, {"a.weight": Format.Q4_1}, torch.float32) == 2048 * 5 / 8 + 2048 * 4


def test_tied_weights_count_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 32, bias=False), "b": nn.Linear(64, 32, bias=False)})
    model["b"].weight = model["a"].weight
    assert size_of_weights(model, {}, torch.float32) == 2048 * 4


def test_a_loaded_model_takes_its_parameters_and_buffers() -> None:
    model = nn.Linear(10, 10)
    model.register_buffer("more", torch.zeros(5))
    assert size_of_model(model) == (100 + 10 + 5) * 4


def test_weights_that_fit_are_accepted() -> None:
    check_memory(5 * GB, FreeMemory(5 * GB), can_round=True)
    check_memory(5 * GB, FreeMemory(3 * GB, swap=2 * GB), can_round=True)


def test_nothing_is_refused_if_it_is_unknown_what_is_free() -> None:
    check_memory(10**18, None, can_round=True)


@pytest.mark.parametrize(
    ("can_round", "advice"),
    [
        (True, "choose a smaller model, or one in fewer bits, or set PARLEY_QUANTIZE=int4"),
        (False, "choose a smaller model, or one in fewer bits"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_both_numbers_and_advice(can_round: bool, advice: str) -> None:
    with pytest.raises(ModelError) as raised:
        check_memory(int(30.12 * GB), FreeMemory(int(20.3 * GB), swap=GB), can_round)
    assert str(raised.value) == f"its weights need 30.1 GB, and 20.3 GB of memory are free: {advice}"


def test_a_cache_that_does_not_fit_beside_the_weights_is_refused_with_the_settings_to_lower() -> None:
    check_memory(6 * GB, FreeMemory(8 * GB), can_round=True, cache=2 * GB)
    with pytest.raises(CacheTooLargeError) as raised:
        check_memory(6 * GB, FreeMemory(8 * GB), can_round=True, cache=4 * GB)
    assert str(raised.value) == (
        "its weights need 6.0 GB and its cache 4.0 GB, and 8.0 GB of memory are free: lower PARLEY_SLOTS or "
        "PARLEY_CONTEXT, or set PARLEY_KV_CACHE=float8"
    )


def real_size_of_cache(model: PreTrainedModel, slots: int, context: int, dtype: torch.dtype) -> float:
    """What the slots take, without the one for padding."""
    return ModelRunner(model, slots, context, cache_dtype=dtype).cache.size * slots / (slots + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(tiny_llama, id="llama"),
        pytest.param(tiny_gemma2, id="windows"),
        pytest.param(tiny_gpt_oss, id="experts"),
        pytest.param(lambda: tiny_model(GPT2Config(n_embd=64, n_layer=2, n_head=2)), id="no-key-heads"),
    ],
)
def test_the_cache_takes_what_the_configuration_says(make: Callable[[], PreTrainedModel], dtype: torch.dtype) -> None:
    model = make()
    assert size_of_cache(model.config, 3, 64, dtype) == real_size_of_cache(model, 3, 64, dtype)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, verdict in written().items() if verdict == EQUAL])
def test_the_cache_of_no_model_takes_less_than_the_configuration_says(name: str) -> None:
    model = small_model(name)
    expected = size_of_cache(model.config, 3, 64, torch.float32)
    assert expected <= real_size_of_cache(model, 3, 64, torch.float32)


# What the cache may take

MEMORY = Memory(weights=GB // 10, cache=int(1.44 * GB), slots=32, context=4096, tokens=32 * 4096)


def test_a_cache_that_fits_is_told_with_what_is_free() -> None:
    assert MEMORY.fits(FreeMemory(20 * GB))
    assert MEMORY.line(FreeMemory(int(20.3 * GB))) == (
        "The weights take 0.1 GB, and 32 slots of 4096 tokens take up to 1.4 GB; 20.3 GB are free."
    )


def test_a_cache_that_slots_share_is_told_with_the_tokens_that_it_has_room_for() -> None:
    assert replace(MEMORY, tokens=50_000).line(None) == (
        "The weights take 0.1 GB, and 32 slots of 4096 tokens share 50000 tokens in 1.4 GB."
    )


def test_a_cache_that_may_grow_too_large_is_told_with_the_settings_to_lower() -> None:
    free = FreeMemory(GB, swap=10 * GB)
    assert not MEMORY.fits(free)
    assert MEMORY.line(free).endswith(
        "but only 1.0 GB are free: if many long conversations run at once, the memory runs out; lower PARLEY_SLOTS or "
        "PARLEY_CONTEXT, or set PARLEY_KV_CACHE=float8"
    )


def test_where_it_is_unknown_what_is_free_only_the_model_is_told() -> None:
    assert MEMORY.fits(None)
    assert MEMORY.line(None) == "The weights take 0.1 GB, and 32 slots of 4096 tokens take up to 1.4 GB."


def test_a_cache_that_fits_is_printed(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    tell_memory(Memory(1, 1, 1, 1, 1), CPU)
    assert "The weights take 0.0 GB" in capsys.readouterr().err
    assert not caplog.records


def test_a_cache_that_may_grow_too_large_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "parley"):
        tell_memory(Memory(1, 10**18, 32, 4096, 32 * 4096), CPU)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "lower PARLEY_SLOTS" in record.message


def test_a_device_that_holds_the_whole_cache_already_is_never_short(caplog: pytest.LogCaptureFixture) -> None:
    tell_memory(Memory(1, 10**18, 32, 4096, 32 * 4096), torch.device("cuda"))
    assert not caplog.records
