from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.errors import ModelError
from models.language.file_version import FileVersion


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"first")
    return tmp_path / "file"


def test_a_file_that_is_as_before_passes(path: Path) -> None:
    version = FileVersion(path)
    with path.open("rb") as file:
        assert file.read() == b"first"
        version.check(file.fileno())
    version.check()


def test_a_file_in_the_place_of_another_is_told(path: Path) -> None:
    version, before = FileVersion(path), path.stat()
    other = path.with_name("other")
    other.write_bytes(b"other")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with path.open("rb") as file:
        other.replace(path)
        version.check(file.fileno())  # the open file is still the first one
    with pytest.raises(ModelError) as raised:
        version.check()
    assert str(raised.value) == f"{path} has changed while it was read: start again"


def test_a_file_whose_bytes_have_changed_is_told(path: Path) -> None:
    version, before = FileVersion(path), path.stat()
    path.write_bytes(b"third")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ModelError, match="has changed while it was read"):
        version.check()
