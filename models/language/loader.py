"""Loads the tokenizer and the model that the settings name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from models.engine import quantization
from models.engine.joined_linears import join_linears
from models.engine.kv_cache import DTYPES
from models.engine.native import build
from models.engine.quantization import QuantizedLinear
from models.engine.quantized_weight import Format
from models.engine.recurrent_layer import has_recurrent_layers
from models.engine.runner import uses_blocks
from models.engine.subprocesses import Subprocesses
from models.errors import KernelsUnavailableError, ModelError, one_line
from models.language.adapter import Adapter
from models.language.chat_template import read_chat_template
from models.language.gguf.gguf_file import GGUFFile
from models.language.load_errors import why_not_loaded
from models.language.memory import return_freed_memory, size_of_cache
from models.language.model_config import context_length
from models.language.model_files import find_model, model_label, print_progress
from models.language.weights import load_folder, load_gguf, no_cache
from models.settings import PREFIX, Settings

FORMATS = {"auto": Format.Q8_0, "int8": Format.Q8_0, "int4": Format.Q4_1}  # by the setting, of weights that are rounded

logger = logging.getLogger("parley")


def load(settings: Settings, cache: Path | None = None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model that the settings name, on their devices, quantized, ready for inference.

    `cache` is the folder of the embedded model, by default the user's cache. Slow steps are announced on stderr.
    Raises ModelError.
    """
    _check_device(settings.device)
    if not sys.stderr.isatty():  # transformers' bar would be a line without an end in the log
        disable_progress_bar()  # type: ignore[no-untyped-call]
    return_freed_memory()
    with ThreadPoolExecutor(1, thread_name_prefix="kernels") as pool, ExitStack() as stack:
        compilers = Subprocesses()
        stack.callback(compilers.stop)  # at an error or a signal: the pool waits for its thread
        # Compiling takes ten seconds, only the first time. Meanwhile the files are found, and the tokenizer is read.
        compiling = pool.submit(_build_kernels, user_cache_path("parley"), compilers) if _on_cpu(settings) else None
        path = find_model(settings, cache or user_cache_path("parley"))
        try:
            return _load_tokenizer_and_model(path, settings, compiling)
        except Exception as error:  # transformers and safetensors raise many types of errors
            reason = str(error) if isinstance(error, ModelError) else why_not_loaded(error)
            raise ModelError(_with_the_setting(reason, settings, path)) from error


def _load_tokenizer_and_model(
    path: Path, settings: Settings, compiling: Future[Path] | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model in a GGUF file or a folder; `compiling` are the kernels, None for an accelerator."""
    fill: Callable[..., PreTrainedModel]
    if path.is_file():
        file = GGUFFile(path)
        tokenizer, fill = file.tokenizer(), partial(load_gguf, file)
    else:
        code, adapter = settings.trust_remote_code, Adapter.of(path)
        base = adapter.find_base() if adapter else path
        if adapter:
            tokenizer = adapter.load_tokenizer(base, trust_remote_code=code)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=code)
        fill = partial(load_folder, base, adapter, code)
    read_chat_template(tokenizer, settings)
    format = _format(settings, compiling)
    cache = no_cache if _on_cpu(settings) else partial(cache_on_accelerator, settings)
    model = fill(format=format, dtype=_dtype(settings), device=device_map(settings), size_of_cache=cache)
    if format is not None or uses_blocks(model):
        kind = nn.Linear if format is None else QuantizedLinear
        ids = torch.tensor([[1, 2, 3]], device=model.device)
        join_linears(model, lambda: model(input_ids=ids, use_cache=False), kind)
    return tokenizer, model


def _with_the_setting(reason: str, settings: Settings, path: Path) -> str:
    """Why a model cannot be loaded, after what names it, unless the reason names that or another setting itself."""
    label = model_label(settings)
    if reason.startswith((PREFIX, label)):
        return reason
    for said in (f"{path} cannot be loaded: ", f"{path}: "):
        reason = reason.removeprefix(said)
    if reason.startswith(f"{path} "):
        reason = f"it{reason.removeprefix(str(path))}"
    return f"{label} cannot be loaded: {reason}"


def _build_kernels(cache: Path, compilers: Subprocesses) -> Path:
    if not build.library_path(cache).is_file():
        build.find_compiler()
        print_progress("Compiling for this processor, only once ...")
    return build.build_library(cache, subprocesses=compilers)


def _format(settings: Settings, compiling: Future[Path] | None) -> Format | None:
    """What weights are rounded to; None quantizes none. Loads the kernels. Raises ModelError."""
    wanted = settings.quantize in ("int8", "int4")
    if compiling is None:
        if wanted:
            raise ModelError(
                f"PARLEY_QUANTIZE={settings.quantize} is for a CPU: use auto or none, or PARLEY_DEVICE=cpu"
            )
        return None
    try:
        build.load_kernels(compiling.result())
    except (KernelsUnavailableError, OSError) as error:
        if wanted:
            raise ModelError(f"PARLEY_QUANTIZE={settings.quantize} is not possible: {one_line(error)}") from error
        logger.warning("replies will be several times slower than possible: %s", one_line(error))
        return None
    auto = settings.quantize == "auto" and settings.dtype == "auto" and quantization.is_faster()
    return FORMATS[settings.quantize] if auto or wanted else None


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu"):
        return
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != kind or int(index or 0) >= torch.accelerator.device_count():
        raise ModelError(
            f"PARLEY_DEVICE={device}: this machine or this build of torch has no such device; use cpu or auto"
        )


def device_map(settings: Settings) -> str:
    """Where transformers puts the weights: a device, or auto for all accelerators."""
    # Without one, auto would leave on the disk what does not fit the memory in the dtype, though it is quantized.
    return "cpu" if _on_cpu(settings) else settings.device


def cache_on_accelerator(settings: Settings, model: PreTrainedModel) -> int:
    """The bytes that a model's cache takes at least, all at once. Raises SettingsError.

    A cache in blocks takes what is free. It needs room for one sequence.
    """
    dtype = DTYPES.get(settings.kv_cache, _dtype(settings))
    # What `uses_blocks` will find, before there is a device that it could look at.
    one_gpu = settings.device.startswith("cuda") or torch.cuda.device_count() == 1
    slots = 1 if one_gpu and not has_recurrent_layers(model) else settings.slots
    return size_of_cache(model.config, slots, context_length(model, settings), dtype)


def _dtype(settings: Settings) -> torch.dtype:
    """The settings' dtype; auto is float32 on a CPU, which is fastest there, and bfloat16 on an accelerator."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    return torch.float32 if _on_cpu(settings) else torch.bfloat16


def _on_cpu(settings: Settings) -> bool:
    return settings.device == "cpu" or (settings.device == "auto" and not torch.accelerator.is_available())
