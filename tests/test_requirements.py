"""requirements.lock: all that requirements.txt brings, with hashes, except torch and what only CUDA needs."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CUDA = re.compile(r"torch|triton|(nvidia|cuda)-.*")


def lines(name: str) -> list[str]:
    """The logical lines of a requirements file, without comments."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return text.replace("\\\n", " ").splitlines()


def read(line: str) -> tuple[str, Requirement]:
    """The normal name of a package, and what a line says of it."""
    requirement = Requirement(line.partition("--hash")[0])
    return canonicalize_name(requirement.name), requirement


PINS = dict(read(line) for line in lines("requirements.txt"))
LOCK = lines("requirements.lock")
LOCKED = [read(line) for line in LOCK]
NAMES = {name for name, _ in LOCKED}


def needs(name: str) -> set[str]:
    """The packages that an installed package needs here; none if it is not installed, as on other platforms."""
    try:
        found = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return set()
    extras = {"", *(PINS[name].extras if name in PINS else ())}
    return {
        canonicalize_name(one.name)
        for one in found
        if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras)
    }


def test_the_files_are_read() -> None:
    assert "torch" in PINS
    assert len(LOCKED) > len(PINS)
    assert "sympy" in needs("torch")
    assert "h11" in needs("uvicorn")


@pytest.mark.parametrize("name", sorted({*PINS} - {"torch"}))
def test_a_pin_is_in_the_lock_with_its_version(name: str) -> None:
    assert [locked.specifier for other, locked in LOCKED if other == name] == [PINS[name].specifier]


@pytest.mark.parametrize("line", LOCK, ids=[name for name, _ in LOCKED])
def test_an_entry_of_the_lock_is_one_version_with_hashes(line: str) -> None:
    entry, *hashes = line.split(" --hash=")
    assert re.fullmatch(r"==[\w.!+]+", str(read(entry)[1].specifier))
    assert hashes
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", one) for one in hashes)


@pytest.mark.parametrize("name", sorted({"torch", *NAMES}))
def test_the_lock_has_what_a_package_needs(name: str) -> None:
    assert {needed for needed in needs(name) if not CUDA.fullmatch(needed)} <= NAMES


def test_the_lock_fits_each_build_of_torch() -> None:
    assert [name for name in NAMES if CUDA.fullmatch(name)] == []


def test_the_lock_names_no_package_index() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "tests/bench/README.md"])
def test_a_document_names_the_same_torch(document: str) -> None:
    versions = re.findall(r"\btorch(==[\w.]+)", (ROOT / document).read_text(encoding="utf-8"))
    assert set(versions) == {str(PINS["torch"].specifier)}
