"""Chat templates in the shapes of those that real models have, and tokenizers with them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tests.support.tiny import tiny_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# No system message, roles alternate, replies are trimmed and called model.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# No system message, roles alternate, a reply ends with </s>.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + '</s>' }}{% endif %}{% endfor %}"
)

# The system message stands in the last question.
LATE_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST]{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ message.content }}[/INST]{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
)

# Content comes in parts; text that is no part is dropped.
PARTS_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Questions come in parts, replies as plain text.
MIXED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content + '</s>' }}"
    "{% else %}[{{ message.role }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/]{% endif %}"
    "{% endfor %}"
)

# A system prompt with the date comes always, and the first system message in it. A later one is dropped.
LLAMA = (
    "{{ bos_token }}{% set ns = namespace(system='', rest=messages) %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.system = messages[0]['content'] | trim %}{% set ns.rest = messages[1:] %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{{ ns.system }}<|eot_id|>{% for message in ns.rest %}{% if message.role != 'system' %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# System messages anywhere, control tokens built from pieces, no token after a reply but that of the next message.
BUILT = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# The last reply ends with <|return|>, those before with <|end|>.
HARMONY = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{{ message.content }}{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def tokenizer_with(
    template: str, special: Sequence[str] = (), added: Sequence[str] = (), eos: str = "</s>"
) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with a template, special tokens, and added tokens that are not special."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": eos})
    tokenizer.add_tokens([*added])
    tokenizer.chat_template = template
    return tokenizer
