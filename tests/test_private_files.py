from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import UntrustedPathError
from models.private_files import check_program, make_private_file, make_private_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
NOBODY = 65534


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def a_file(path: Path) -> Path:
    path.write_text("x")
    return path


def a_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_new_folder_is_closed_to_others(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "some" / "folder")
    assert mode_of(tmp_path / "some" / "folder") == 0o700


def test_a_new_file_is_closed_to_others_and_empty(tmp_path: Path) -> None:
    make_private_file(tmp_path / "file")
    assert (mode_of(tmp_path / "file"), (tmp_path / "file").read_bytes()) == (0o600, b"")


def test_what_is_open_to_others_is_closed_and_keeps_its_content(tmp_path: Path) -> None:
    folder, file = a_folder(tmp_path / "folder"), a_file(tmp_path / "file")
    folder.chmod(0o777)
    file.chmod(0o644)
    make_private_folder(folder)
    make_private_file(file)
    assert (mode_of(folder), mode_of(file), file.read_text()) == (0o700, 0o600, "x")


@as_root
@pytest.mark.parametrize(
    ("make", "use"),
    [
        (a_folder, make_private_folder),
        (a_file, make_private_file),
        (a_folder, check_program),
        (a_file, check_program),
    ],
)
def test_what_belongs_to_another_user_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], use: Callable[[Path], None]
) -> None:
    path = make(tmp_path / "theirs")
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(UntrustedPathError, match="theirs belongs to another user, so it is not safe to use"):
        use(path)


@as_root
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(a_folder(tmp_path / "mine"))
    make_private_folder(link)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(UntrustedPathError, match="link belongs to another user"):
        make_private_folder(link)


def test_a_program_that_only_its_owner_can_write_is_accepted(tmp_path: Path) -> None:
    program = a_folder(tmp_path / "program")
    a_file(program / "code.so").chmod(0o755)
    check_program(program)
    check_program(program / "code.so")


@pytest.mark.parametrize("mode", [0o666, 0o775, 0o602])
def test_a_program_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    program = a_folder(tmp_path / "program")
    a_file(program / "code.so").chmod(mode)
    for path in (program, program / "code.so"):
        with pytest.raises(UntrustedPathError, match=r"code\.so can be written by other users"):
            check_program(path)


@as_root
def test_a_file_of_another_user_inside_of_a_program_is_refused(tmp_path: Path) -> None:
    program = a_folder(tmp_path / "program")
    os.chown(a_file(program / "code.so"), NOBODY, NOBODY)
    with pytest.raises(UntrustedPathError, match=r"code\.so belongs to another user"):
        check_program(program)
