"""`python server.py`, its commands, and starts that fail."""

from __future__ import annotations

import runpy
import socket
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner, Result

from models.web.serving import listen, page_url
from tests.support.breakable import SERVER
from tests.support.process import COMMANDS, Child


def run(*arguments: str) -> Result:
    """Run `python server.py` in this process, with the settings of the current directory."""
    return CliRunner().invoke(runpy.run_path(str(SERVER))["main"], arguments)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an empty folder the current directory."""
    monkeypatch.chdir(tmp_path)


def test_users_are_added_listed_and_removed() -> None:
    added = run("users", "add", "zoe")
    assert added.exit_code == 0
    secret = added.output.split()[-1]
    assert len(secret) >= 24
    assert run("users", "add", "ann", "--secret", "ann's own").output == "added ann\n"
    listed = run("users", "list").output
    assert listed.split() == ["ann", "zoe"]
    assert secret not in listed
    assert run("users", "remove", "zoe").exit_code == 0
    assert run("users", "list").output.split() == ["ann"]


@pytest.mark.parametrize(
    "arguments",
    [["add", "a b"], ["remove", "nobody"], ["add", "ann", "--secret", ""]],
    ids=["bad id", "unknown user", "empty secret"],
)
def test_a_user_command_that_fails_prints_one_line_and_exits_with_1(arguments: list[str]) -> None:
    result = run("users", *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert len(result.output.splitlines()) == 1


def test_commands_read_settings_from_a_dot_env_file() -> None:
    Path(".env").write_text("PARLEY_DATA=elsewhere\n")
    run("users", "add", "ann")
    assert Path("elsewhere/parley.db").exists()
    Path(".env").write_text("PARLEY_SLOTS=many\n")
    with pytest.raises(SystemExit, match="PARLEY_SLOTS='many'"):
        run("users", "list")
    Path(".env").write_text("export PARLEY_DATA=third\n", encoding="utf-8-sig")
    run("users", "add", "ann")
    assert Path("third/parley.db").exists()
    Path(".env").write_text("PARLEY_DATA=fourth\n", encoding="utf-16")
    with pytest.raises(SystemExit, match=r"^\.env cannot be read: it is not UTF-8; save it again as UTF-8$"):
        run("users", "list")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "0", "::", "0::0"])
def test_the_printed_url_leads_to_the_listener(host: str) -> None:
    with listen(host, 0) as listener:
        url = urlsplit(page_url(host, *listener.getsockname()[:2]))
        assert ip_address(url.hostname or "").is_loopback
        socket.create_connection((url.hostname, url.port)).close()


def test_a_name_is_printed_as_it_was_given() -> None:
    assert page_url("localhost", "127.0.0.1", 80) == "http://localhost:80/"


def test_the_ipv6_wildcard_answers_ipv4_too() -> None:
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port)) as client:
                accepted, _ = socket.socket.accept(listener)  # outside of an event loop
                accepted.close()
                assert client.recv(1) == b""


@pytest.mark.parametrize("option", ["--port=in use", "--host=no.such.host.invalid", "--port=99999"])
def test_a_bad_address_is_an_error_before_the_model_is_loaded(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(option.replace("in use", str(taken.getsockname()[1])))
    assert result.exit_code != 0
    assert "Error: " in result.output
    assert not list(Path().iterdir())


def test_an_unknown_setting_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PARLEY_SLOTZ", "3")
    run("users", "list")
    assert "PARLEY_SLOTZ is not a setting" in caplog.text


@pytest.mark.slow  # the first test that forks waits until the fork server has imported everything
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "value", "message", "uvicorns_code"),
    [
        ("slots", "many", "PARLEY_SLOTS='many' is not allowed: it must be a whole number from 1 to 1024", 1),
        ("model", "./nowhere", "PARLEY_MODEL=./nowhere: there is no such file or folder", 3),
    ],
    ids=["bad setting", "no model"],
)
def test_a_failed_start_is_told_in_one_line(
    command: str, name: str, value: str, message: str, uvicorns_code: int, tmp_path: Path
) -> None:
    settings = {"data": tmp_path / "data", name: value}
    with Child.running("server", command, **settings) as child:
        assert child.exit_code() == (1 if command == "python server.py" else uvicorns_code)
    assert child.log.text.count(message) == 1
    assert "Traceback" not in child.log.text
