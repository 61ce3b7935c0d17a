"""Says in a line why a model cannot be loaded, in Parley's own terms."""

from __future__ import annotations

import re

import transformers

from models.errors import one_line

REASONS = (  # what an error of transformers, safetensors or torch says, and what that means; the first one counts
    (
        r"has model type `(?P<type>.+?)`",
        "transformers {version} does not know its model type {type}: update Parley, or choose another model",
    ),
    (r"Unrecognized model in ", "config.json has no model_type: the folder may hold no model of transformers"),
    (
        r"Unrecognized configuration class <class '.*?(?P<type>\w+?)(Config)?'>",
        "{type} is not a causal language model: choose a model that generates text",
    ),
    (
        r"trust_remote_code",
        "it brings code of its own: read its .py files, and if you trust them, set PARLEY_TRUST_REMOTE_CODE=true",
    ),
    (
        r"not found in your environment: (?P<packages>.+?)\. Run",
        "its own code needs packages that are not installed: pip install {packages}",
    ),
    (
        r"quantiz",
        "its weights are quantized in a format that Parley does not read: choose another version of the model",
    ),
    (r"no file named .*(safetensors|pytorch_model)", "it has no weights: model.safetensors is missing"),
    (
        r"^SafetensorError: (?P<reason>.*)|Unable to load weights from",
        "a file of its weights is cut or damaged ({reason}): download it again",
    ),
    (
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer",
        "it has no tokenizer that can be read: tokenizer.json is missing, and Parley reads no other format",
    ),
    (
        r"ignore_mismatched_sizes|automatic conversion of the weights",
        "the shapes of its weights differ from those in config.json: download it again",
    ),
    (r"[Vv]alidation error.*?Error: (?P<reason>.*)", "config.json is wrong: {reason}"),
    (r"not a valid JSON file", "config.json is damaged: download it again"),
    (
        r"^KeyError: (?P<key>.*)",
        "config.json or a file of the tokenizer has an unknown value, or lacks one: {key}",
    ),
    (
        r"^MemoryError|not enough memory|out of memory",
        "there is not enough memory: choose a smaller model, or one in fewer bits",
    ),
)


def why_not_loaded(error: BaseException) -> str:
    """The reason of an error that loading a model raised, and what to do, in one line."""
    text = one_line(error, limit=10_000)
    for pattern, reason in REASONS:
        if match := re.search(pattern, text):
            found = {name: value or "unreadable" for name, value in match.groupdict().items()}
            return one_line(reason.format(version=transformers.__version__, **found))
    return one_line(text)
