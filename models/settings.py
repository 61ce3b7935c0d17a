"""The settings of the server: environment variables and `.env`, read once into one frozen object."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import limits

from models.errors import InvalidValueError, SettingsError
from models.options import Options, check_option
from models.validation import describe_allowed

Lookup = Callable[[str], str | None]  # returns the value of a setting, by its name without the prefix

PREFIX = "PARLEY_"
EMBEDDED = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Settings:
    """The settings of the server; the table in README.md explains each one."""

    model: str | None = None
    upstream: tuple[str, ...] = ()
    upstream_key: str | None = field(default=None, repr=False)
    upstream_model: tuple[str, ...] = ()
    model_aliases: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "auto"
    kv_cache: str = "auto"
    compile: bool = True
    chat_template: Path | None = None
    context: int | None = None
    slots: int = 32
    queue: int = 256
    responses_per_user: int = 4
    rate: str | None = None
    token_rate: str | None = None
    sockets_per_user: int = 256
    conversations_per_user: int = 10_000
    bytes_per_user: int = 2**30
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    data: Path = Path("data")
    key: str | None = field(default=None, repr=False)
    database_url: str | None = field(default=None, repr=False)
    redis_url: str | None = field(default=None, repr=False)
    peer_address: str | None = None
    linger: int = 60
    replay_bytes: int = 2**24
    drain: int = 30
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    log: str = "text"
    presence: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)  # the operator's default options

    @property
    def model_name(self) -> str:
        """The name of the model on the page and in the protocols."""
        return EMBEDDED if self.model is None else Path(self.model).name.removesuffix(".gguf") or self.model

    def aliases_of(self, model: str, default: str) -> tuple[str, ...]:
        """The other names of a model; one that is for no model by name is the default one's."""
        pairs = [alias.partition("=") for alias in self.model_aliases]
        return tuple(alias for alias, _, named in pairs if (named or default) == model)

    def without_secrets(self) -> dict[str, Any]:
        """All settings except the secret ones, ready for JSON."""
        values = asdict(self)
        shown = {name: value for name, value in values.items() if name not in SECRET}
        return {name: str(value) if isinstance(value, Path) else value for name, value in shown.items()}

    @classmethod
    def unknown(cls, variables: Iterable[str]) -> list[str]:
        """The variables that have the prefix of a setting, but are not settings."""
        known = {f"{PREFIX}{name.upper()}" for name in [*RULES, *OPTION_PARSERS]}
        return sorted(name for name in {*variables} - known if name.startswith(PREFIX))

    @classmethod
    def read(cls, lookup: Lookup) -> Settings:
        """The settings of an environment; an empty value counts as unset. Raises SettingsError."""
        values = {name: _read(lookup, name, *rule) for name, rule in RULES.items()}
        options = {
            name: _read(lookup, variable, describe_allowed(Options, name), partial(_option, name, parse))
            for variable, (name, parse) in OPTION_PARSERS.items()
        }
        if values["peer_address"] and not (values["database_url"] or "").startswith("postgres"):
            raise SettingsError(f"{PREFIX}PEER_ADDRESS needs a PostgreSQL database in {PREFIX}DATABASE_URL")
        if values["upstream"] and values["model"]:
            raise SettingsError(f"{PREFIX}UPSTREAM is in place of {PREFIX}MODEL: set only one of them")
        return cls(
            options={name: value for name, value in options.items() if value is not None},
            **{name: value for name, value in values.items() if value is not None},
        )


def _read(lookup: Lookup, name: str, allowed: str, convert: Callable[[str], Any]) -> Any:
    value = lookup(name.upper())
    if not value:
        return None
    try:
        return convert(value)
    except (ValueError, InvalidValueError):
        shown = "" if name in HIDDEN else f"={value!r}"
        raise SettingsError(f"{PREFIX}{name.upper()}{shown} is not allowed: it must be {allowed}") from None


def _option(name: str, parse: Callable[[str], Any], value: str) -> Any:
    return check_option(name, parse(value))


def _choice(pattern: str) -> Callable[[str], str]:
    def convert(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(value)
        return value

    return convert


def _path(value: str) -> Path:
    return Path(value).expanduser()


def _switch(value: str) -> bool:
    return _choice("true|1|false|0")(value.lower()) in ("true", "1")


def _integer(low: int, high: int) -> tuple[str, Callable[[str], int]]:
    def convert(value: str) -> int:
        if not low <= int(value) <= high:
            raise ValueError(value)
        return int(value)

    return f"a whole number from {low} to {high}", convert


def _users(value: str) -> dict[str, str]:
    pairs = [pair.strip().partition(":") for pair in value.split(",")]
    users = {user: secret for user, _, secret in pairs}
    if not all(re.fullmatch(USER_ID, user) and secret for user, secret in users.items()) or len(users) < len(pairs):
        raise ValueError("a user has no id or no secret, or is listed twice")
    if len(set(users.values())) < len(users):
        raise ValueError("two users have the same secret")
    return users


def _key(value: str) -> str:
    if len(value) < 32:
        raise ValueError("the key is too short")
    return value


def _database_url(value: str) -> str:
    return _choice(r"(postgres(ql)?(\+asyncpg)?|sqlite(\+aiosqlite)?)://.+")(value)


def _redis_url(value: str) -> str:
    return _choice(r"(rediss?|unix)://.+")(value)


def _address(value: str) -> str:
    host, _, port = _choice(r"([\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}")(value).rpartition(":")
    if not 0 < int(port) < 2**16:
        raise ValueError(port)
    return f"{host}:{int(port)}"


def _origins(value: str) -> tuple[str, ...]:
    return tuple(_choice("https?://[^/?#]+")(origin.strip().rstrip("/")) for origin in value.split(","))


def _names(value: str) -> tuple[str, ...]:
    return tuple(_choice(r"[^\s,]{1,256}")(name.strip()) for name in value.split(","))


def _hosts(value: str) -> tuple[str, ...]:
    return tuple(_choice(r"(\*\.)?[\w.-]+|\[[\da-fA-F:]+\]")(host.strip()) for host in value.split(","))


def _urls(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_url(url.strip().rstrip("/")) for url in value.split(",")))


def _url(url: str) -> str:
    parts = urlsplit(_choice(r"https?://[^/?#@\s]+(/[^?#@\s]*)?")(url))
    if parts.port == 0 or not url.isprintable():  # `port` raises ValueError too
        raise ValueError(url)
    return url if url.count("/") > 2 else f"{url}/v1"


def _header(value: str) -> str:
    return _choice(r"[!-~]+")(value.strip())  # a secret that is a file often has a newline at its end


def _proxies(value: str) -> tuple[str, ...]:
    proxies = [proxy.strip() for proxy in value.split(",")]
    return tuple(proxy if proxy == "unix" else str(ipaddress.ip_network(proxy)) for proxy in proxies)


def _rate(value: str) -> str:
    (limit,) = limits.parse_many(value)
    if not limit.amount:
        raise ValueError("the amount is 0")
    return value


SECRET = ("users", "key", "upstream_key", "database_url", "redis_url")  # settings that contain secrets
HIDDEN = (*SECRET, "upstream")  # values that are not shown when they are wrong: the URL may have a password

USER_ID = r"[\w.@-]{1,64}"

RULES: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "model": ("a Hub id, a folder or a .gguf file", str),
    "upstream": ("a list of URLs, such as http://gpu1:8000/v1, with commas between them and no passwords", _urls),
    "upstream_key": ("a key of ASCII characters without spaces", _header),
    "upstream_model": ("a list of names without spaces, with commas between them", _names),
    "model_aliases": (
        "a list of names without spaces, or of name=model, with commas between them, or * for every name",
        _names,
    ),
    "revision": ("a branch, tag or commit", str),
    "trust_remote_code": ("true or false", _switch),
    "device": ("auto, cpu, cuda, cuda:N, mps or xpu", _choice(r"auto|cpu|(cuda|xpu)(:\d+)?|mps")),
    "dtype": ("auto, float32, bfloat16 or float16", _choice("auto|float32|bfloat16|float16")),
    "quantize": ("auto, none, int8 or int4", _choice("auto|none|int8|int4")),
    "kv_cache": (
        "auto, float32, bfloat16, float16 or float8",
        _choice("auto|float32|bfloat16|float16|float8"),
    ),
    "compile": ("true or false", _switch),
    "chat_template": ("the path of a Jinja file", _path),
    "context": _integer(16, 2**24),
    "slots": _integer(1, 1024),
    "queue": _integer(0, 1_000_000),
    "responses_per_user": _integer(1, 1_000_000),
    "rate": ("requests per period, such as 60/minute", _rate),
    "token_rate": ("tokens per period, such as 100000/day", _rate),
    "sockets_per_user": _integer(1, 1_000_000),
    "conversations_per_user": _integer(1, 1_000_000),
    "bytes_per_user": _integer(1, 2**50),
    "users": ("id:secret,id:secret, each id and each secret once, ids of letters, digits and . _ @ -", _users),
    "data": ("a folder", _path),
    "key": ("a secret of 32 characters or more", _key),
    "database_url": ("postgresql://user:password@host/database, or sqlite:///path", _database_url),
    "redis_url": ("redis://:password@host:6379/0, rediss:// for TLS, or unix:///path", _redis_url),
    "peer_address": ("a host and a port, such as 10.0.0.1:7778", _address),
    "linger": _integer(0, 86_400),
    "replay_bytes": _integer(0, 2**40),
    "drain": _integer(0, 86_400),
    "origins": ("a list of origins, such as https://chat.example.com, with commas between them", _origins),
    "hosts": ("a list of host names, such as chat.example.com or *.example.com, with commas between them", _hosts),
    "proxies": (
        "a list of addresses, networks such as 10.0.0.0/8, or the word unix, with commas between them",
        _proxies,
    ),
    "log": ("text or json", _choice("text|json")),
    "presence": ("true or false", _switch),
}

# For a setting, its option and how that is read from text; `Options` has its bounds.
OPTION_PARSERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "instructions": ("instructions", str),
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "repetition_penalty": ("repetition_penalty", float),
    "max_output_tokens": ("max_output_tokens", int),
    "reasoning": ("reasoning_effort", str),
}
