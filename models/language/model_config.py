"""Reads a model's own configuration: its context, its default options, the tokens that end a reply."""

from __future__ import annotations

from contextlib import suppress

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.errors import InvalidValueError, SettingsError
from models.options import Options
from models.settings import Settings

DEFAULT_CONTEXT = 4096


def context_length(model: PreTrainedModel, settings: Settings) -> int:
    """How many tokens a prompt and its reply may have together. Raises SettingsError."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond it, one long sequence changes the factors of all others
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    if settings.context and settings.context > limit:
        raise SettingsError(f"PARLEY_CONTEXT={settings.context} is not allowed: the model can hold at most {limit}")
    return settings.context or min(limit, DEFAULT_CONTEXT)


def default_options(model: PreTrainedModel, settings: Settings) -> Options:
    """The operator's options, else the model's if they are in bounds, else ours."""
    options = Options()
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        if (value := getattr(model.generation_config, name, None)) is not None:
            with suppress(InvalidValueError):
                options = options.updated({name: value})
    return options.updated(settings.options)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a reply: the model may name one or several, and the tokenizer another."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None)
