"""What the text of a reply must look like: `response_format` of Chat Completions, and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from models.errors import InvalidValueError
from models.output_format import PLAIN_TEXT, OutputFormat
from models.protocols.function_tools import SCHEMA_BYTES
from models.validation import NO_SURROGATE, Text, check_json, parse_object

MAX_TEXTS = 1024  # to choose from

Schema = Annotated[dict[str, Any], Meta(description="a JSON Schema")]
Pattern = Annotated[
    str,
    Meta(min_length=1, max_length=SCHEMA_BYTES, pattern=NO_SURROGATE, description=f"text, at most {SCHEMA_BYTES:,}"),
]
Texts = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=4096, pattern=NO_SURROGATE)]],
    Meta(min_length=1, max_length=MAX_TEXTS, description=f"a list of 1 to {MAX_TEXTS} texts"),
]


class JsonSchema(Struct):
    """A schema with its name; other fields that it has are ignored."""

    name: Text | None = None
    schema: Schema | None = None
    strict: Annotated[bool | None, Meta(description="true or false")] = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """`response_format`. The schema of a "json_object" is llama.cpp's."""

    type: Annotated[Literal["text", "json_object", "json_schema"], Meta(description="text, json_object or json_schema")]
    json_schema: Annotated[JsonSchema | None, Meta(description="an object with a schema")] = None
    schema: Schema | None = None

    def as_format(self) -> OutputFormat:
        """The format in the form of the domain. Raises InvalidValueError."""
        if self.type == "text":
            return PLAIN_TEXT
        schema, at, strict = self.schema, "response_format.schema", None
        if self.type == "json_schema":
            at = "response_format.json_schema"
            if self.json_schema is None:
                raise InvalidValueError(f"{at} is missing", at)
            schema, at, strict = self.json_schema.schema, f"{at}.schema", self.json_schema.strict
        if schema is None:
            return OutputFormat("json_object", None, "response_format")
        return _of_schema(schema, at, strict)


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """`structured_outputs`: one of these."""

    json: Annotated[Schema | str | None, Meta(description="a JSON Schema")] = None
    regex: Pattern | None = None
    choice: Texts | None = None
    grammar: Pattern | None = None
    json_object: Annotated[bool | None, Meta(description="true or false")] = None

    def as_format(self, at: str = "structured_outputs") -> OutputFormat:
        """The format in the form of the domain; the place is for errors. Raises InvalidValueError."""
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False, "")]
        if len(given) > 1:
            told = "only one of json, regex, choice, grammar and json_object"
            raise InvalidValueError(f"{at} must have {told}", at, told)
        match given:
            case ["json"]:
                schema = parse_object(self.json, f"{at}.json") if isinstance(self.json, str) else self.json
                return _of_schema(schema or {}, f"{at}.json")
            case ["regex"]:
                return OutputFormat("regex", self.regex, f"{at}.regex")
            case ["choice"]:
                return OutputFormat("choice", tuple(self.choice or ()), f"{at}.choice")
            case ["grammar"]:
                return OutputFormat("grammar", self.grammar, f"{at}.grammar")
            case ["json_object"]:
                return OutputFormat("json_object", None, f"{at}.json_object")
        return PLAIN_TEXT


def choose_format(format: OutputFormat, structured: StructuredOutputs | None, param: str) -> OutputFormat:
    """The format that an API has in its own parameter `param`, or the one in `structured_outputs`.

    Raises InvalidValueError if both say something.
    """
    other = structured.as_format() if structured else PLAIN_TEXT
    if PLAIN_TEXT not in (format, other):
        raise InvalidValueError(f"{param} and structured_outputs cannot be used together", param)
    return format if other == PLAIN_TEXT else other


def _of_schema(schema: dict[str, Any], at: str, strict: bool | None = None) -> OutputFormat:
    check_json(schema, at, SCHEMA_BYTES)
    return OutputFormat("json_schema", schema, at, strict)
