"""The arguments that a client may give to the chat template, such as `enable_thinking`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_ARGUMENTS = 16
WORDS = r"\A[\w .,:/+-]{0,128}\Z"  # text in them: no control token of any model

TemplateArguments = Annotated[
    dict[
        Annotated[str, Meta(pattern=r"\A[a-zA-Z_]\w{0,63}\Z")],
        bool | int | float | Annotated[str, Meta(pattern=WORDS)] | None,
    ],
    Meta(
        max_length=MAX_ARGUMENTS,
        description=f"an object of up to {MAX_ARGUMENTS} names, with true, false, null, numbers or plain words",
    ),
]
