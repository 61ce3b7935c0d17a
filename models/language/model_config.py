"""Reads a model's own configuration: its context, its default options, the tokens that end a reply."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from models.engine.long_rope import can_be_long, short_context
from models.errors import InvalidValueError, ModelError, SettingsError
from models.language.chat_template import ChatTemplate
from models.options import Options
from models.settings import Settings

DEFAULT_CONTEXT = 4096
OPTIONS = ("temperature", "top_p", "top_k", "repetition_penalty")  # that a model has good values for
END_OF_TURN = {  # special tokens that end a turn, or the text
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|endoftext|>",
    "<|return|>",
    "<|call|>",
}
HARMONY = {"<|return|>", "<|call|>"}  # the format of gpt-oss, where <|end|> stands between reasoning and answer


def context_length(model: PreTrainedModel, settings: Settings) -> int:
    """How many tokens a prompt and its reply may have together. Raises SettingsError."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    default = min(limit, DEFAULT_CONTEXT)
    if short := short_context(model):
        default = min(default, short)
        limit = limit if can_be_long(model) else min(limit, short)
    if settings.context and settings.context > limit:
        raise SettingsError(f"PARLEY_CONTEXT={settings.context} is not allowed: the model can hold at most {limit}")
    return settings.context or default


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What Parley reads of the default options beside a model, and its end tokens; None if there are none.

    Raises ModelError if the file is damaged or names no tokens as ends.
    """
    path = folder / GENERATION_CONFIG_NAME
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        ends = stored.get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path.name} is damaged: download it again") from error
    if not all(end is None or type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise ModelError(f"eos_token_id in {path.name} is no token id and no list of some: {ends}")
    config = GenerationConfig(eos_token_id=ends)  # type: ignore[no-untyped-call]
    for name in OPTIONS:
        setattr(config, name, stored.get(name))
    return config


def default_options(model: PreTrainedModel, settings: Settings) -> Options:
    """The operator's options, else the model's if they are in bounds, else ours."""
    options = Options()
    for name in OPTIONS:
        if (value := getattr(model.generation_config, name, None)) is not None:
            with suppress(InvalidValueError):
                options = options.updated({name: value})
    return options.updated(settings.options)


def stop_token_ids(template: ChatTemplate, model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a reply.

    The model may name one or several, and the tokenizer another. The chat template writes one after a reply, and some
    names mean the end of a turn in every model that has them.
    """
    tokenizer = template.tokenizer
    named = getattr(model.generation_config, "eos_token_id", None)
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = {template.reply_end, *(special[name] for name in END_OF_TURN & special.keys())}
    if special.keys() >= HARMONY:
        known -= {special.get("<|end|>")}
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, *known]
    return frozenset(token_id for token_id in ids if token_id is not None)
