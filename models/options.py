"""The options of a reply that a client may set, and the bounds of each one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, structs

from models.errors import UnknownFieldError
from models.validation import NO_SURROGATE, convert

Instructions = Annotated[
    Annotated[str, Meta(max_length=2**15, pattern=NO_SURROGATE)] | None,
    Meta(description=f"a string of at most {2**15:,} characters, or null"),
]
Temperature = Annotated[Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="a number from 0 to 2")]
TopP = Annotated[Annotated[float, Meta(gt=0, le=1)] | None, Meta(description="a number above 0, 1 at most")]
TopK = Annotated[Annotated[int, Meta(ge=0, le=2**31)] | None, Meta(description="a whole number, 0 or more")]
MinP = Annotated[Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="a number from 0 to 1")]
RepetitionPenalty = Annotated[
    Annotated[float, Meta(gt=0, le=2)] | None, Meta(description="a number above 0, 2 at most")
]
Penalty = Annotated[Annotated[float, Meta(ge=-2, le=2)] | None, Meta(description="a number from -2 to 2")]
MaxOutputTokens = Annotated[
    Annotated[int, Meta(ge=1, le=2**31)] | None, Meta(description="a whole number, 1 or more, or null")
]
StopString = Annotated[str, Meta(min_length=1, max_length=256, pattern=NO_SURROGATE)]
Stop = Annotated[
    tuple[StopString, ...], Meta(max_length=8, description="a string of 1 to 256 characters or a list of up to 8")
]
Seed = Annotated[
    Annotated[int, Meta(ge=0, le=2**63 - 1)] | None, Meta(description="a whole number from 0 to 2^63 - 1, or null")
]

LogitBias = Annotated[
    dict[Annotated[str, Meta(pattern=r"\A\d{1,9}\Z")], Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=1024, description="an object of up to 1,024 token ids and numbers from -100 to 100"),
]
ReasoningEffort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
    Meta(description="none, minimal, low, medium, high, xhigh, max, or null"),
]

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a reply.

    `temperature` 0 is greedy; `top_k` 0 is off; `max_output_tokens` None allows as many tokens as the context holds;
    `seed` None means a random seed; `min_p` leaves out tokens whose probability is below this share of the largest one;
    `reasoning_effort` None is the chat template's own. A number that is None is the upstream's own; without upstreams,
    all are set.
    """

    instructions: Instructions = None
    temperature: Temperature = 0.45
    top_p: TopP = 0.9
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.1
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    max_output_tokens: MaxOutputTokens = None
    stop: Stop = ()
    seed: Seed = None
    logit_bias: LogitBias = {}  # added to the logits of tokens, by their ids
    reasoning_effort: ReasoningEffort = None

    def updated(self, changes: Mapping[str, Any], at: str = "") -> Options:
        """These options with `changes`, whose values have the form of JSON.

        `at` is the name of the parameter that holds the changes. Raises InvalidValueError or
        UnknownFieldError, which name the option.
        """
        changes = {**changes}
        if isinstance(stop := changes.get("stop"), str):
            changes["stop"] = [stop]
        try:
            return convert({**structs.asdict(self), **changes}, Options, at)
        except UnknownFieldError as error:
            names = ", ".join(Options.__struct_fields__)
            raise UnknownFieldError(f"{error.param} is not an option: the options are {names}", error.param) from None

    def as_json(self) -> dict[str, Any]:
        """The options in the form of JSON."""
        return {**structs.asdict(self), "stop": list(self.stop)}

    def differences(self, defaults: Options) -> dict[str, Any]:
        """The options that differ from `defaults`, in the form of JSON."""
        usual = defaults.as_json()
        return {name: value for name, value in self.as_json().items() if value != usual[name]}


def check_option(name: str, value: Any) -> Any:
    """The value of one option, checked and converted. Raises InvalidValueError or UnknownFieldError."""
    return getattr(Options().updated({name: value}), name)
