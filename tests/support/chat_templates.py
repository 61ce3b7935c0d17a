# ruff: noqa: RUF001
"""Chat templates in the shapes of those that real models have, and tokenizers with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


# Qwen3: reasoning after the last question only; thinking is switched off by an empty thought in the prompt.
QWEN = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\nCall with <tool_call>.<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'system' and loop.first %}"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

# Qwen3-Coder: arguments are listed one by one.
QWEN_CODER = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}<function>{{ tool.function.name }}: "
    "{{ tool.function.description }}{% for name, field in tool.function.parameters.properties | items %}\n"
    "<parameter>{{ name }}: {{ field | tojson }}</parameter>{% endfor %}</function>{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n<function={{ call.function.name }}>\n"
    "{% for name, value in call.function.arguments | items %}<parameter={{ name }}>\n{{ value }}\n</parameter>\n"
    "{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Llama 3.1: one call in a message, and no text beside it.
LLAMA_TOOLS = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{% for tool in tools %}"
    "{{ tool | tojson(indent=4) }}\n\n{% endfor %}<|eot_id|>{% endif %}{% for m in messages %}"
    "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('only one') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# Mistral: ids of nine characters, no text beside calls, roles alternate around them.
MISTRAL_TOOLS = (
    "{{ bos_token }}{% set ns = namespace(turn=0, last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{% if (m.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% set ns.turn = ns.turn + 1 %}{% endif %}{% if m.role == 'user' %}"
    "{% if loop.index0 == ns.last and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS]{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% else %}{{ raise_exception('unknown role') }}{% endif %}"
    "{% endfor %}"
)

# gpt-oss: one call in a message, reasoning or text beside it but not both, an effort in the system message.
GPT_OSS = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>"
    "{% if tools %}<|start|>developer<|message|>namespace functions {% for tool in tools %}\n"
    "// {{ tool.function.description }}\ntype {{ tool.function.name }} = ({{ tool.function.parameters | tojson }});"
    "{% endfor %}<|end|>{% endif %}{% set ns = namespace(name='') %}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.content and m.thinking %}{{ raise_exception('both content and thinking') }}{% endif %}"
    "{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}"
    "<|end|>{% endif %}{% set ns.name = m.tool_calls[0].function.name %}<|start|>assistant to=functions.{{ ns.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# Gemma 4: no quotes around keys, strings between tokens, results in the turn of the call.
GEMMA_TOOLS = (
    '{% macro written(value) %}{% if value is string %}<|"|>{{ value }}<|"|>{% elif value is mapping %}'
    "{{ '{' }}{% for key, inner in value | items %}{{ key }}:{{ written(inner) }}{% if not loop.last %},{% endif %}"
    "{% endfor %}{{ '}' }}{% else %}{{ value | tojson }}{% endif %}{% endmacro %}{{ bos_token }}"
    "{% if tools %}<|turn>system\n{% for tool in tools %}<|tool>declaration:{{ tool.function.name }}"
    "{{ written(tool.function) }}<tool|>{% endfor %}<turn|>\n{% endif %}{% for m in messages %}"
    "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<|tool_call>call:{{ call.function.name }}{{ written(call.function.arguments) }}<tool_call|>{% endfor %}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
    "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)

# GLM: arguments in tags, reasoning after the last question only.
GLM = (
    "[gMASK]{% if tools %}<|system|>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n<tool_response>\n"
    "{{ m.content }}\n</tool_response>{% else %}<|{{ m.role }}|>\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}\n<tool_call>{{ call.function.name }}"
    "{% for name, value in call.function.arguments | items %}\n<arg_key>{{ name }}</arg_key>\n"
    "<arg_value>{{ value if value is string else value | tojson }}</arg_value>{% endfor %}\n</tool_call>{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}\n<think></think>{% endif %}{% endif %}"
)

# DeepSeek: arguments as text; the prompt opens or closes the reasoning.
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = true %}{% endif %}{{ bos_token }}{% for tool in tools or [] %}"
    "{{ tool.function.name }}: {{ tool.function.description }}\n{{ tool.function.parameters | tojson }}\n{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
    "<｜tool▁call▁begin｜>{{ call.function.name + '<｜tool▁sep｜>' + call.function.arguments }}"
    "<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% endif %}</s>{% elif m.role == 'tool' %}"
    "<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>\n' if thinking else '</think>' }}{% endif %}"
)

# SmolLM3: tools come in a variable of its own.
SMOLLM = (
    "<|im_start|>system\n{% for tool in xml_tools or [] %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}"
)


class Family(NamedTuple):
    """A chat template with tools, the special tokens of its models, and their added tokens that are not special."""

    template: str
    special: Sequence[str] = ()
    added: Sequence[str] = ()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_with(self.template, self.special, self.added)


CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
QWEN_TOKENS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
HARMONY_TOKENS = ["<|start|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|end|>", "<|constrain|>"]
GEMMA_TOKENS = ["<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"]
DEEPSEEK_TOKENS = ["<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<think>", "</think>"]
FAMILIES = {
    "qwen": Family(QWEN, CHATML_TOKENS, QWEN_TOKENS),
    "qwen-coder": Family(QWEN_CODER, CHATML_TOKENS, QWEN_TOKENS[:2]),
    "llama": Family(LLAMA_TOOLS, ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"]),
    "mistral": Family(MISTRAL_TOOLS, ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[THINK]", "[/THINK]"]),
    "gpt-oss": Family(GPT_OSS, HARMONY_TOKENS),
    "gemma": Family(GEMMA_TOOLS, GEMMA_TOKENS),
    "glm": Family(GLM, ["[gMASK]", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], QWEN_TOKENS),
    "deepseek": Family(DEEPSEEK, ["<｜User｜>", "<｜Assistant｜>"], DEEPSEEK_TOKENS),
    "smollm": Family(SMOLLM, CHATML_TOKENS, QWEN_TOKENS),
}


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
