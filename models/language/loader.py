"""Loads the tokenizer and the model that the settings name."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models.engine import quantization
from models.engine.native import build
from models.errors import KernelsUnavailableError, ModelError, one_line
from models.language.adapter import Adapter
from models.language.chat_template import read_chat_template
from models.language.load_errors import why_not_loaded
from models.language.model_files import find_model, model_label, print_progress
from models.language.packed.loading import is_packed, load_packed
from models.settings import Settings

logger = logging.getLogger("parley")


def load(settings: Settings, cache: Path | None = None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model that the settings name, on their devices, quantized, ready for inference.

    `cache` is the folder of converted models, by default the user's cache. Slow steps are announced on stderr.
    Raises ModelError.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="kernels") as pool:
        _check_device(settings.device)
        # Compiling takes ten seconds, only the first time. Meanwhile the model loads.
        compiling = pool.submit(_build_kernels, user_cache_path("parley")) if _on_cpu(settings) else None
        tokenizer, model = _load(settings, cache or user_cache_path("parley"))
        _quantize(model, settings, compiling)
    return tokenizer, model


def _load(settings: Settings, cache: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    dtype = _dtype(settings)
    folder = Path(find_model(settings, dtype, cache))
    adapter = Adapter.of(folder)
    base = adapter.find_base() if adapter else folder
    code = settings.trust_remote_code
    try:
        if adapter:
            tokenizer = adapter.load_tokenizer(base, trust_remote_code=code)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
        read_chat_template(tokenizer, settings)
        load = load_packed if is_packed(base) else AutoModelForCausalLM.from_pretrained
        loaded: Any = load(
            base, dtype=dtype, device_map=settings.device, output_loading_info=True, trust_remote_code=code
        )
        model, loading = loaded
    except ModelError:
        raise
    except Exception as error:  # transformers and safetensors raise many types of errors
        advice = f"; delete {folder} to convert the model again" if folder.parent == cache else ""
        raise ModelError(f"{model_label(settings)} cannot be loaded: {why_not_loaded(error)}{advice}") from error
    if missing := loading["missing_keys"]:
        raise ModelError(
            f"{model_label(settings)} is incomplete: {len(missing)} weights are missing, first {min(missing)}"
        )
    if adapter:
        adapter.merge(model)
    return tokenizer, model.eval()


def _build_kernels(cache: Path) -> Path:
    if not build.library_path(cache).is_file():
        print_progress("Compiling for this processor, only once ...")
    return build.build_library(cache)


def _quantize(model: PreTrainedModel, settings: Settings, compiling: Future[Path] | None) -> None:
    """Load the kernels. Quantize the linears to int8 if the settings say so, or are auto and int8 is faster here."""
    if compiling is None:
        if settings.quantize == "int8":
            raise ModelError("PARLEY_QUANTIZE=int8 is for a CPU: use auto or none, or PARLEY_DEVICE=cpu")
        return
    try:
        build.load_kernels(compiling.result())
    except (KernelsUnavailableError, OSError) as error:
        if settings.quantize == "int8":
            raise ModelError(f"PARLEY_QUANTIZE=int8 is not possible: {one_line(error)}") from error
        logger.warning("replies will be several times slower than possible: %s", one_line(error))
        return
    auto = settings.quantize == "auto" and settings.dtype == "auto" and quantization.int8_is_faster()
    if auto or settings.quantize == "int8":
        quantization.quantize(model, lambda: model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False))


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu"):
        return
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != kind or int(index or 0) >= torch.accelerator.device_count():
        raise ModelError(
            f"PARLEY_DEVICE={device}: this machine or this build of torch has no such device; use cpu or auto"
        )


def _dtype(settings: Settings) -> torch.dtype:
    """The settings' dtype; auto is float32 on a CPU, which is fastest there, and bfloat16 on an accelerator."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    return torch.float32 if _on_cpu(settings) else torch.bfloat16


def _on_cpu(settings: Settings) -> bool:
    return settings.device == "cpu" or (settings.device == "auto" and not torch.accelerator.is_available())
