from __future__ import annotations

from pathlib import Path

import pytest

from models.env_file import read_env_file
from models.errors import SettingsError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".env"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("PARLEY_SLOTS=3\n", {"PARLEY_SLOTS": "3"}),
        ("PARLEY_SLOTS=3", {"PARLEY_SLOTS": "3"}),
        ("  PARLEY_SLOTS = 3 \r\n", {"PARLEY_SLOTS": "3"}),
        ("export PARLEY_SLOTS=3\n", {"PARLEY_SLOTS": "3"}),
        ("\ufeffPARLEY_SLOTS=3\nPARLEY_LOG=json", {"PARLEY_SLOTS": "3", "PARLEY_LOG": "json"}),
        ("\ufeffexport  PARLEY_SLOTS=3", {"PARLEY_SLOTS": "3"}),
        ("# a comment\n\n   # another one=1\nA=1", {"A": "1"}),
        ("A=1=2#3", {"A": "1=2#3"}),
        ("A=", {"A": ""}),
        ("A=\"a 'b' \\\\\"\nB='b'\nC=\"c", {"A": "a 'b' \\\\", "B": "b", "C": '"c'}),
        ("A=1\nA=2", {"A": "2"}),
        ("exported=1", {"exported": "1"}),
        ("A=x\u2028é", {"A": "x\u2028é"}),
        ("", {}),
    ],
)
def test_lines_are_names_with_values(file: Path, text: str, values: dict[str, str]) -> None:
    file.write_bytes(text.encode())
    assert read_env_file(file) == values


def test_no_file_has_no_values(file: Path) -> None:
    assert read_env_file(file) == {}


def test_a_folder_is_ignored_with_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.mkdir()
    assert read_env_file(file) == {}
    assert f"{file} is a folder" in caplog.text


def test_a_line_that_is_no_setting_is_named_and_ignored(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("A=1\nPARLEY_SLOTS 3\nPARLEY-LOG=secret\nB=2\n")
    assert read_env_file(file) == {"A": "1", "B": "2"}
    assert caplog.messages == [f"{file}, line {number} has no effect: it is not NAME=value" for number in (2, 3)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_a_file_in_another_encoding_is_an_error_of_one_line(file: Path, encoding: str) -> None:
    file.write_text("PARLEY_USERS=ann:né\n", encoding=encoding)
    with pytest.raises(SettingsError, match="it is not UTF-8; save it again as UTF-8") as raised:
        read_env_file(file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("target", ["/proc/self/mem", "nowhere"])
def test_a_file_that_cannot_be_read_is_an_error(file: Path, target: str) -> None:
    file.symlink_to(target)
    with pytest.raises(SettingsError, match=r"cannot be read: (OS|FileNotFound)Error"):
        read_env_file(file)
