from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import UntrustedPathError
from models.private_files import check_owners, check_program, make_private_file, make_private_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
NOBODY = 65534
ROOT = Path(__file__).parent.parent


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


def test_what_is_open_to_others_is_closed_with_a_warning_and_keeps_its_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, file = a_folder(tmp_path / "folder"), a_file(tmp_path / "file")
    folder.chmod(0o777)
    file.chmod(0o644)
    for _ in range(2):
        make_private_folder(folder)
        make_private_file(file)
        assert (mode_of(folder), mode_of(file), file.read_text()) == (0o700, 0o600, "x")
    closed = "was open to other users and is closed to them now"
    assert caplog.messages == [f"{folder} {closed}", f"{file} {closed}"]


def test_a_file_that_even_its_owner_cannot_write_stays_so(tmp_path: Path) -> None:
    file = a_file(tmp_path / "file")
    file.chmod(0o440)
    make_private_file(file)
    assert mode_of(file) == 0o400


def test_a_folder_in_place_of_a_file_can_still_be_entered(tmp_path: Path) -> None:
    make_private_file(a_folder(tmp_path / "folder"))
    assert mode_of(tmp_path / "folder") == 0o700


@as_root
@pytest.mark.parametrize(
    ("make", "use"),
    [
        (a_folder, make_private_folder),
        (a_folder, check_owners),
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


@as_root
def test_a_file_is_not_made_where_the_link_of_another_user_leads(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises((UntrustedPathError, FileNotFoundError)):
        make_private_file(link)
    assert not (tmp_path / "target").exists()


AS_NOBODY = """
import os, sys
from pathlib import Path
from models.errors import UntrustedPathError
from models import private_files

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    getattr(private_files, sys.argv[1])(Path(sys.argv[2]))
    print("accepted")
except UntrustedPathError:
    print("refused")
"""


@as_root
@pytest.mark.parametrize(
    ("function", "mode", "answer"),
    [
        ("make_private_folder", 0o755, "accepted"),
        ("make_private_folder", 0o775, "refused"),
        ("make_private_folder", 0o757, "refused"),
        ("make_private_file", 0o644, "refused"),
    ],
)
def test_what_the_administrator_made_for_all_is_safe_if_nobody_else_can_write_or_it_is_no_secret(
    function: str, mode: int, answer: str
) -> None:
    with tempfile.TemporaryDirectory() as temporary:  # pytest's folder is closed to others
        os.chmod(temporary, 0o755)
        path = Path(temporary) / "made"
        make = {"make_private_folder": a_folder, "make_private_file": a_file}[function]
        make(path).chmod(mode)
        command = [sys.executable, "-c", AS_NOBODY, function, str(path)]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == f"{answer}\n"


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


def test_a_folder_for_all_users_is_refused_and_stays_open(tmp_path: Path) -> None:
    shared = a_folder(tmp_path / "shared")
    shared.chmod(0o1777)
    with pytest.raises(UntrustedPathError, match="is a folder for all users"):
        make_private_folder(shared)
    assert shared.stat().st_mode & 0o7777 == 0o1777
