"""The tokenizer of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

from models.errors import ModelError, one_line

IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a file. Raises ModelError."""
    described = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in metadata
    }
    tokens = described.get("tokens", ())
    special = {
        name: tokens[token_id]
        for name, key in IDS.items()
        if (token_id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None and token_id < len(tokens)
    }
    try:
        backend, _ = convert_gguf_tokenizer(metadata["general.architecture"], described)
    except Exception as error:
        raise ModelError(f"the tokenizer of {path} cannot be read: {one_line(error)}") from error
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, chat_template=metadata.get("tokenizer.chat_template"), **special
    )


def stop_token_ids(metadata: Mapping[str, Any]) -> set[int]:
    """The tokens that end a reply."""
    ids = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return {token_id for token_id in ids if token_id is not None}
