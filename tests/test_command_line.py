from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from server import main

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_users_are_added_listed_and_removed_and_a_made_up_secret_shows_once() -> None:
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


@pytest.mark.parametrize("arguments", [["add", "a b"], ["remove", "nobody"], ["add", "ann", "--secret", ""]])
def test_a_user_command_that_cannot_be_done_says_why_and_exits_1(arguments: list[str]) -> None:
    result = run("users", *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert len(result.output.splitlines()) == 1


def test_a_setting_in_a_dot_env_file_counts_and_a_bad_one_stops_the_command() -> None:
    Path(".env").write_text("PARLEY_DATA=elsewhere\n")
    run("users", "add", "ann")
    assert Path("elsewhere/parley.db").exists()
    Path(".env").write_text("PARLEY_SLOTS=many\n")
    assert "PARLEY_SLOTS='many'" in run("users", "list").output


@pytest.mark.parametrize("option", ["--port=in use", "--host=no.such.host.invalid", "--port=99999"])
def test_an_address_that_cannot_be_had_is_said_before_the_model_is_loaded(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(option.replace("in use", str(taken.getsockname()[1])))
    assert result.exit_code != 0
    assert "Error: " in result.output
    assert not list(Path().iterdir())


def test_a_variable_that_is_no_setting_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARLEY_SLOTZ", "3")
    run("users", "list")
    assert "PARLEY_SLOTZ is no setting" in caplog.text


@pytest.mark.parametrize("command", [["server.py", "--port", "0"], ["-m", "uvicorn", "server:app", "--port", "0"]])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PARLEY_SLOTS", "many", "PARLEY_SLOTS='many' is not allowed: it must be a whole number from 1 to 1024"),
        ("PARLEY_MODEL", "./nowhere", "PARLEY_MODEL=./nowhere: there is no such file or folder"),
    ],
)
def test_a_start_that_fails_says_why_in_a_line(
    command: list[str], name: str, value: str, said: str, tmp_path: Path
) -> None:
    environment = os.environ | {name: value, "PARLEY_DATA": str(tmp_path / "data")}
    process = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == (1 if command[0] == "server.py" else 3)  # 3 is uvicorn's own
    assert said in process.stderr
    assert "Traceback" not in process.stderr
