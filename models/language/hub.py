"""Models of the Hugging Face Hub: asks the Hub whether a model is there, and downloads it into the Hub's own cache.

transformers asks for one file after another, each with retries: without a network that takes a minute. Here the Hub is
asked once, with a limit of time. What transformers then reads is a folder.
"""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from models.errors import ModelError, one_line

SECONDS = 10.0  # for an answer of the Hub
TRIES = 2
SMALL_FILES = re.compile(  # configuration, tokenizer, chat templates, code, an adapter
    r"adapter_model\.safetensors|[^/]+\.(json|jinja|model|txt|tiktoken|bpe|spm|vocab)"
    r"|additional_chat_templates/[^/]+\.jinja|.+\.py"
)
WEIGHTS = (  # the first of these that a model has is used
    re.compile(r"model-\d+-of-\d+\.safetensors"),
    re.compile(r"model\.safetensors"),
    re.compile(r"(?!adapter_model)[^/]+\.safetensors"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
)
TOO_MANY_REQUESTS = 429


def fetch_model(
    name: str,
    revision: str | None = None,
    *,
    api: HfApi | None = None,
    cache: Path | None = None,
    seconds: float = SECONDS,
) -> Path:
    """The folder in the Hub's cache with a model of the Hub. Downloads what is missing.

    If the Hub gives no answer in `seconds`, what an earlier start has downloaded is used. `cache` is by default the
    Hub's own one, which HF_HOME moves; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count too. Raises ModelError.
    """
    api = api or HfApi()
    try:
        wanted = _wanted(_list_files(api, name, revision, seconds))
        folder = api.snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=list(map(escape, wanted))
        )
    except _NoAnswerError as error:
        if cached := _cached_folder(name, revision, cache):
            return cached
        raise ModelError(
            f"the Hub ({api.endpoint}) cannot be reached ({error}), and the model was not downloaded before: check the "
            "network, or set PARLEY_MODEL to a folder"
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"its owners want you to ask for it: accept the terms on {api.endpoint}/{name}, then set HF_TOKEN to a "
            "token of your account"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"there is no such file or folder here, and no such model on the Hub ({api.endpoint}): check the name; for "
            "a private model, set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"the model has no branch, tag or commit {revision} (PARLEY_REVISION): see {api.endpoint}/{name}/tree/main"
        ) from error
    except ModelError:
        raise
    except Exception as error:  # of the Hub's client, of its HTTP client, and of the disk
        raise ModelError(f"the download failed: {one_line(error, 200)}; start again to continue it") from error
    return Path(folder)


class _NoAnswerError(Exception):
    """The Hub cannot be reached, or is broken at the moment."""


def _list_files(api: HfApi, name: str, revision: str | None, seconds: float) -> list[str]:
    """The names of the model's files. Raises _NoAnswerError, or the Hub's own errors if it answers."""
    failures: list[Exception] = []
    while len(failures) < TRIES:
        try:
            info = api.model_info(name, revision=revision, timeout=seconds)
            return [file.rfilename for file in info.siblings or ()]
        except Exception as error:  # the HTTP client has many types of errors
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            answered = status is not None and status < 500 and status != TOO_MANY_REQUESTS
            if answered or isinstance(error, HFValidationError):
                raise
            if isinstance(error, OfflineModeIsEnabled):
                raise _NoAnswerError("HF_HUB_OFFLINE is set") from error
            failures.append(error)
    raise _NoAnswerError(one_line(failures[-1], 100)) from failures[-1]


def _wanted(files: list[str]) -> list[str]:
    """The files that are needed: the weights in one format only, and what is small. Raises ModelError."""
    wanted = [name for name in files if SMALL_FILES.fullmatch(name)]
    matches = ([name for name in files if pattern.fullmatch(name)] for pattern in WEIGHTS)
    if weights := next(filter(None, matches), []):
        return [*wanted, *weights]
    if "adapter_model.safetensors" in wanted:
        return wanted
    if any(name.endswith(".gguf") for name in files):
        raise ModelError("it holds GGUF files only: download one of them, and set PARLEY_MODEL to the file")
    raise ModelError("it holds no weights, such as model.safetensors")


def _cached_folder(name: str, revision: str | None, cache: Path | None) -> Path | None:
    """The folder of a model that was downloaded before."""
    for file in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None
