"""requirements.lock: all that requirements.txt brings, with hashes, except torch and what only CUDA needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OPTIONAL = {"setuptools", "sniffio"}  # imported only where they are installed
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


def test_the_short_list_for_upstreams_is_complete() -> None:
    """What a server in front of others imports is on the list of README.md, or needed by what is on it."""
    (line,) = re.findall(r"pip install -c requirements.txt (.*)", (ROOT / "README.md").read_text(encoding="utf-8"))
    listed = {canonicalize_name(name) for name in line.split()}
    assert listed <= {*PINS}
    installed: set[str] = {*listed}
    while more := {needed for name in installed for needed in needs(name)} - installed:
        installed |= more
    probe = (
        "import sys, aiosqlite, server, models.hub.program, models.upstream.upstream_chat\n"
        "import uvicorn.protocols.http.h11_impl, uvicorn.protocols.websockets.websockets_sansio_impl\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    environment = os.environ | {"PARLEY_UPSTREAM": "http://127.0.0.1:9/v1"}
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = packages_distributions()
    used = {canonicalize_name(name) for module in done.stdout.split() for name in packages.get(module, ())}
    assert "starlette" in used
    assert used - OPTIONAL <= installed


def test_the_lock_names_no_package_index() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "tests/bench/README.md"])
def test_a_document_names_the_same_torch(document: str) -> None:
    versions = re.findall(r"\btorch(==[\w.]+)", (ROOT / document).read_text(encoding="utf-8"))
    assert set(versions) == {str(PINS["torch"].specifier)}
