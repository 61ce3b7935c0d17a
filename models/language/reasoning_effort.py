"""What a reasoning effort is in the arguments of a chat template.

| the template reads | it gets |
|---|---|
| `reasoning_effort` | the effort; or the nearest one of low, medium, high and those that stand in the template's text |
| `enable_thinking` | false for "none", else true |
| `thinking` | the same |

A template that reads several of them gets several, and one that reads none is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils.chat_template_utils import _get_template_variables

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
USUAL = ("low", "medium", "high")
SWITCHES = ("enable_thinking", "thinking")


def effort_arguments(source: str, works: Callable[[Mapping[str, Any]], bool]) -> dict[str, dict[str, Any]]:
    """The arguments of a template for each effort. `works` says whether the template takes some arguments."""
    variables = _get_template_variables(source)
    known = [effort for effort in EFFORTS if effort in USUAL or re.search(rf"(['\"]){effort}\1", source)]
    efforts: dict[str, dict[str, Any]] = {}
    for effort in EFFORTS:
        arguments: dict[str, Any] = {name: effort != "none" for name in SWITCHES if name in variables}
        if "reasoning_effort" in variables:
            nearest = sorted(known, key=lambda other: abs(EFFORTS.index(other) - EFFORTS.index(effort)))
            tried = [{**arguments, "reasoning_effort": value} for value in nearest]
            arguments = next(filter(works, tried), arguments)
        efforts[effort] = arguments
    return efforts
