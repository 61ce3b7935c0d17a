from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.errors import SettingsError
from models.settings import Settings

LONG_ID = 40


def short_id(value: Any) -> str:
    return ascii(value).strip("'")[:LONG_ID]


def read(**environment: str) -> Settings:
    """The settings of an environment, whose names are without the prefix."""
    return Settings.read(environment.get)


def test_an_empty_environment_gives_the_defaults() -> None:
    assert read() == Settings()


def test_an_empty_value_counts_as_none() -> None:
    assert read(MODEL="", SLOTS="", USERS="", TEMPERATURE="") == Settings()


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("MODEL", "HuggingFaceTB/SmolLM2-360M-Instruct", "model", "HuggingFaceTB/SmolLM2-360M-Instruct"),
        ("REVISION", "main", "revision", "main"),
        ("TRUST_REMOTE_CODE", "True", "trust_remote_code", True),
        ("DEVICE", "cuda:1", "device", "cuda:1"),
        ("DTYPE", "bfloat16", "dtype", "bfloat16"),
        ("QUANTIZE", "none", "quantize", "none"),
        ("KV_CACHE", "float8", "kv_cache", "float8"),
        ("COMPILE", "FALSE", "compile", False),
        ("CHAT_TEMPLATE", "chat.jinja", "chat_template", Path("chat.jinja")),
        ("CONTEXT", "16", "context", 16),
        ("SLOTS", "1", "slots", 1),
        ("QUEUE", "0", "queue", 0),
        ("RESPONSES_PER_USER", "2", "responses_per_user", 2),
        ("SOCKETS_PER_USER", "3", "sockets_per_user", 3),
        ("USERS", "ann:a:b, bob:广州", "users", {"ann": "a:b", "bob": "广州"}),
        ("DATA", "/var/lib/parley", "data", Path("/var/lib/parley")),
        ("KEY", "k" * 32, "key", "k" * 32),
        ("DATABASE_URL", "postgresql://a:b@host/db", "database_url", "postgresql://a:b@host/db"),
        ("DATABASE_URL", "postgres://host/db?ssl=require", "database_url", "postgres://host/db?ssl=require"),
        ("DATABASE_URL", "postgresql+asyncpg:///db", "database_url", "postgresql+asyncpg:///db"),
        ("DATABASE_URL", "sqlite:///parley.db", "database_url", "sqlite:///parley.db"),
        ("REDIS_URL", "redis://:a@host:6379/0", "redis_url", "redis://:a@host:6379/0"),
        ("REDIS_URL", "rediss://host", "redis_url", "rediss://host"),
        ("REDIS_URL", "unix:///run/redis.sock?db=1", "redis_url", "unix:///run/redis.sock?db=1"),
        ("LINGER", "0", "linger", 0),
        ("LINGER", "86400", "linger", 86_400),
        ("REPLAY_BYTES", "0", "replay_bytes", 0),
        ("REPLAY_BYTES", "1099511627776", "replay_bytes", 2**40),
        (
            "ORIGINS",
            "https://a.example/, http://b.example:8080",
            "origins",
            ("https://a.example", "http://b.example:8080"),
        ),
        ("MODEL_ALIASES", "gpt-4o, org/other:7b", "model_aliases", ("gpt-4o", "org/other:7b")),
        ("MODEL_ALIASES", "*", "model_aliases", ("*",)),
        ("MODEL_ALIASES", "gpt-4o=org/large", "model_aliases", ("gpt-4o=org/large",)),
        ("UPSTREAM", "http://gpu1:8000/v1", "upstream", ("http://gpu1:8000/v1",)),
        ("UPSTREAM", "http://gpu1:8000, https://b/api/", "upstream", ("http://gpu1:8000/v1", "https://b/api")),
        ("UPSTREAM_MODEL", "org/large,small", "upstream_model", ("org/large", "small")),
        ("UPSTREAM", "http://a, http://a/v1", "upstream", ("http://a/v1",)),
        ("UPSTREAM_KEY", "sk-1", "upstream_key", "sk-1"),
        ("UPSTREAM_KEY", "sk-1\n", "upstream_key", "sk-1"),
        ("RATE", "60/minute", "rate", "60/minute"),
        ("RATE", "5 per 10 seconds", "rate", "5 per 10 seconds"),
        ("TOKEN_RATE", "100000/day", "token_rate", "100000/day"),
        ("DRAIN", "0", "drain", 0),
        ("DRAIN", "86400", "drain", 86_400),
        ("HOSTS", "chat.example.com", "hosts", ("chat.example.com",)),
        (
            "HOSTS",
            "*.example.com, localhost,127.0.0.1, [::1]",
            "hosts",
            ("*.example.com", "localhost", "127.0.0.1", "[::1]"),
        ),
        ("PROXIES", "127.0.0.1", "proxies", ("127.0.0.1/32",)),
        ("PROXIES", "unix, 10.0.0.0/8,::1", "proxies", ("unix", "10.0.0.0/8", "::1/128")),
        ("LOG", "json", "log", "json"),
        ("LOG", "text", "log", "text"),
        ("PRESENCE", "0", "presence", False),
        ("TEMPERATURE", "0", "options", {"temperature": 0.0}),
        ("TOP_P", "0.5", "options", {"top_p": 0.5}),
        ("TOP_K", "40", "options", {"top_k": 40}),
        ("REPETITION_PENALTY", "1", "options", {"repetition_penalty": 1.0}),
        ("MAX_OUTPUT_TOKENS", "100", "options", {"max_output_tokens": 100}),
        ("INSTRUCTIONS", "Be brief.", "options", {"instructions": "Be brief."}),
    ],
    ids=short_id,
)
def test_a_variable_sets_only_its_own_field(name: str, value: str, field: str, expected: Any) -> None:
    assert read(**{name: value}) == Settings(**{field: expected})


def test_a_path_may_begin_with_the_home_folder() -> None:
    assert read(DATA="~/parley").data == Path.home() / "parley"


def test_several_options_are_set_together() -> None:
    assert read(TEMPERATURE="0", TOP_K="40").options == {"temperature": 0.0, "top_k": 40}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("TRUST_REMOTE_CODE", "yes", "true or false"),
        ("MODEL_ALIASES", "two words", "a list of names without spaces"),
        ("MODEL_ALIASES", "a,,b", "a list of names without spaces"),
        ("DEVICE", "gpu", "cuda"),
        ("DEVICE", "cuda:", "cuda:N"),
        ("DTYPE", "float8", "float32, bfloat16 or float16"),
        ("QUANTIZE", "int3", "none"),
        ("KV_CACHE", "int8", "float16 or float8"),
        ("COMPILE", "on", "true or false"),
        ("CONTEXT", "15", "a whole number from 16 to"),
        ("CONTEXT", "4k", "a whole number"),
        ("SLOTS", "0", "a whole number from 1 to"),
        ("SLOTS", "9" * 5000, "a whole number"),
        ("QUEUE", "-1", "a whole number from 0 to"),
        ("RESPONSES_PER_USER", "1.5", "a whole number"),
        ("SOCKETS_PER_USER", "0", "a whole number"),
        ("PROXIES", "localhost", "networks such as 10.0.0.0/8"),
        ("PROXIES", "10.0.0.1/8", "networks such as 10.0.0.0/8"),
        ("PROXIES", "*", "the word unix"),
        ("LINGER", "-1", "a whole number from 0 to 86400"),
        ("LINGER", "86401", "a whole number from 0 to 86400"),
        ("LINGER", "1m", "a whole number"),
        ("REPLAY_BYTES", "-1", "a whole number from 0 to"),
        ("REPLAY_BYTES", "1099511627777", "a whole number from 0 to"),
        ("REPLAY_BYTES", "16M", "a whole number"),
        ("ORIGINS", "chat.example.com", "http"),
        ("ORIGINS", "https://chat.example.com,", "http"),
        ("RATE", "60", "requests per period, such as 60/minute"),
        ("RATE", "0/minute", "60/minute"),
        ("RATE", "-1/minute", "60/minute"),
        ("RATE", "1.5/minute", "60/minute"),
        ("RATE", "60/fortnight", "60/minute"),
        ("RATE", "60/minute and more", "60/minute"),
        ("RATE", "60/minute;600/hour", "60/minute"),
        ("TOKEN_RATE", "many", "tokens per period, such as 100000/day"),
        ("TOKEN_RATE", "0/day", "100000/day"),
        ("DRAIN", "-1", "a whole number from 0 to 86400"),
        ("DRAIN", "86401", "a whole number from 0 to 86400"),
        ("DRAIN", "30s", "a whole number"),
        ("HOSTS", "https://chat.example.com", "host names, such as chat.example.com or *.example.com"),
        ("HOSTS", "chat.example.com:8443", "host names"),
        ("HOSTS", "*", "host names"),
        ("HOSTS", "chat.*.com", "host names"),
        ("HOSTS", "*example.com", "host names"),
        ("HOSTS", "a.example.com,", "host names"),
        ("HOSTS", "a b", "host names"),
        ("HOSTS", "::1", "host names"),
        ("LOG", "JSON", "text or json"),
        ("LOG", "xml", "text or json"),
        ("PRESENCE", "2", "true or false"),
        ("TEMPERATURE", "2.1", "from 0 to 2"),
        ("TEMPERATURE", "nan", "from 0 to 2"),
        ("TOP_P", "0", "above 0"),
        ("TOP_K", "1.5", "a whole number"),
        ("REPETITION_PENALTY", "inf", "2 at most"),
        ("MAX_OUTPUT_TOKENS", "0", "1 or more"),
        ("INSTRUCTIONS", "\udc80", "a string"),
    ],
    ids=short_id,
)
def test_a_bad_value_is_refused_with_what_is_allowed(name: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as raised:
        read(**{name: value})
    assert str(raised.value).startswith(f"PARLEY_{name}={value!r} is not allowed: it must be ")
    assert allowed in str(raised.value)


@pytest.mark.parametrize(
    "users",
    ["ann", "ann:", ":hunter2", "a n n:hunter2", "ann:hunter2,ann:hunter3", "ann:hunter2,bob:hunter2", "ann:hunter2,"],
)
def test_bad_users_are_refused_without_showing_secrets(users: str) -> None:
    with pytest.raises(SettingsError, match=r"^PARLEY_USERS is not allowed: it must be id:secret") as raised:
        read(USERS=users)
    assert "hunter" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "ann:hunter2@host/db",
        "mysql://ann:hunter2@host/db",
        "postgresql:ann:hunter2@host/db",
        " postgresql://ann:hunter2@host/db",
        "https://ann:hunter2@host/db",
        "postgresql+://ann:hunter2@host/db",
        "postgresql://",
        "sqlite:hunter2.db",
    ],
)
def test_a_bad_database_url_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^PARLEY_DATABASE_URL is not allowed: it must be postgresql://") as raised:
        read(DATABASE_URL=url)
    assert "hunter" not in str(raised.value)


def test_a_short_key_is_refused_without_showing_it() -> None:
    with pytest.raises(
        SettingsError, match=r"^PARLEY_KEY is not allowed: it must be a secret of 32 characters or more$"
    ):
        read(KEY="k" * 31)


@pytest.mark.parametrize(
    "url", ["hunter2", ":hunter2@host", "http://:hunter2@host", "memcached://hunter2", "redis:hunter2", "redis://"]
)
def test_a_bad_redis_url_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^PARLEY_REDIS_URL is not allowed: it must be redis://") as raised:
        read(REDIS_URL=url)
    assert "hunter" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("10.0.0.1:7778", "10.0.0.1:7778"),
        ("one.hosts.internal:07778", "one.hosts.internal:7778"),
        ("[fd00::1]:65535", "[fd00::1]:65535"),
    ],
)
def test_a_peer_address_is_a_host_and_a_port(value: str, address: str) -> None:
    assert read(PEER_ADDRESS=value, DATABASE_URL="postgresql:///parley").peer_address == address


@pytest.mark.parametrize("url", ["", "sqlite:///parley.db"])
def test_a_peer_address_needs_postgresql(url: str) -> None:
    with pytest.raises(
        SettingsError, match=r"^PARLEY_PEER_ADDRESS needs a PostgreSQL database in PARLEY_DATABASE_URL$"
    ):
        read(PEER_ADDRESS="10.0.0.1:7778", DATABASE_URL=url)


@pytest.mark.parametrize(
    "address", ["10.0.0.1", ":7778", "7778", "host:0", "host:65536", "host:port", "fd00::1:7778", "http://host:7778"]
)
def test_a_peer_address_without_a_host_or_a_port_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=r"it must be a host and a port, such as 10\.0\.0\.1:7778$"):
        read(PEER_ADDRESS=address)


@pytest.mark.parametrize(
    "secret",
    [
        pytest.param({"USERS": "ann:hunter2"}, id="users"),
        pytest.param({"KEY": 8 * "hunter2 "}, id="key"),
        pytest.param({"DATABASE_URL": "postgresql://ann:hunter2@host/db"}, id="database-url"),
        pytest.param({"REDIS_URL": "redis://:hunter2@host"}, id="redis-url"),
    ],
)
@pytest.mark.parametrize(
    "show",
    [repr, str, pytest.param(lambda settings: json.dumps(settings.without_secrets()), id="json")],
)
def test_settings_are_shown_without_secrets(show: Callable[[Settings], str], secret: dict[str, str]) -> None:
    assert "hunter2" not in show(read(**secret))


def test_every_setting_without_secrets_can_be_written_as_json() -> None:
    settings = read(DATA="/data", CHAT_TEMPLATE="a.jinja", ORIGINS="http://a")
    shown = json.loads(json.dumps(settings.without_secrets()))
    secret = {"users", "key", "upstream_key", "database_url", "redis_url"}
    assert shown.keys() == {field.name for field in dataclasses.fields(Settings)} - secret
    assert (shown["data"], shown["chat_template"], shown["origins"]) == ("/data", "a.jinja", ["http://a"])


@pytest.mark.parametrize(
    "url",
    [
        "gpu1:8000",
        "ftp://gpu1",
        "http://",
        "http://ann:secret@gpu1",
        "http://a?b",
        "http://a,",
        "http://a:b",
        "http://[::1",
        "http://a:0",
        "http://a\x01b",
    ],
)
def test_a_url_of_an_upstream_that_cannot_be_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(SettingsError, match="PARLEY_UPSTREAM is not allowed"):
        read(UPSTREAM=url)


@pytest.mark.parametrize("key", ["sk 1", "sk-\x00", "schlüssel"])
def test_a_key_that_no_header_can_have_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(SettingsError, match="PARLEY_UPSTREAM_KEY is not allowed"):
        read(UPSTREAM_KEY=key)


def test_an_upstream_is_in_place_of_a_model() -> None:
    with pytest.raises(SettingsError, match="PARLEY_UPSTREAM is in place of PARLEY_MODEL"):
        read(UPSTREAM="http://gpu1:8000/v1", MODEL="org/model")


def test_other_names_are_those_of_the_default_model_unless_they_name_another() -> None:
    settings = read(MODEL_ALIASES="a,b=large,*")
    assert settings.aliases_of("small", "small") == ("a", "*")
    assert settings.aliases_of("large", "small") == ("b",)


def test_the_reasoning_is_the_default_effort() -> None:
    assert read(REASONING="none").options == {"reasoning_effort": "none"}
    with pytest.raises(SettingsError, match="PARLEY_REASONING='hard' is not allowed: it must be none, minimal, low"):
        read(REASONING="hard")


def test_unknown_variables_with_the_prefix_are_named() -> None:
    known = ["PARLEY_MODEL", "PARLEY_USERS", "PARLEY_TEMPERATURE", "PARLEY_DATABASE_URL"]
    unknown = ["PARLEY_SLOT", "PARLEY_", "PARLEY_model"]
    others = ["PATH", "MODEL", "parley_slot", "XPARLEY_SLOTS"]
    assert Settings.unknown([*known, *unknown, *others, *unknown]) == sorted(unknown)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("", "SmolLM2-135M-Instruct"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/models/mine/", "mine"),
        ("models/Mine.Q4_1.gguf", "Mine.Q4_1"),
        ("/", "/"),
    ],
    ids=["embedded", "hub", "folder", "gguf", "root"],
)
def test_the_model_has_the_last_part_of_its_path_as_name(model: str, name: str) -> None:
    assert read(MODEL=model).model_name == name


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().slots = 1  # type: ignore[misc]
