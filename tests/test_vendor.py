"""The libraries of the page are those that vendor/README.md names, unchanged, and have their licences."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

VENDOR = Path(__file__).parents[1] / "templates" / "static" / "vendor"
README = (VENDOR / "README.md").read_text(encoding="utf-8")
SUMS = dict(line.split("  ")[::-1] for line in (VENDOR / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
FILES = sorted(path.relative_to(VENDOR).as_posix() for path in VENDOR.rglob("*") if path.is_file())
LISTED = sorted({*FILES} - {"README.md", "SHA256SUMS"})
LICENCES = [name for name in LISTED if name.endswith("LICENSE")]
ROWS = re.findall(r"^\| (`.+?) \|", README, flags=re.MULTILINE)
SCRIPTS = [name for name in LISTED if name.endswith(".js")]


def test_every_file_has_a_hash() -> None:
    assert sorted(SUMS) == LISTED


@pytest.mark.parametrize("name", LISTED)
def test_a_file_is_the_one_that_was_checked(name: str) -> None:
    assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == SUMS[name]


@pytest.mark.parametrize("name", [name for name in LISTED if name not in LICENCES])
def test_a_file_has_a_row_in_the_table_and_a_licence(name: str) -> None:
    row = next(row for row in ROWS if f"`{name}`" in row)
    first = re.findall(r"`([^`]+)`", row)[0]  # the file that the licence is named after
    assert f"{first.split('.')[0]}.LICENSE" in LICENCES


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_only_files_that_are_here(name: str) -> None:
    text = (VENDOR / name).read_text(encoding="utf-8")
    imports = re.findall(r"^(?:import|export)\b[^;'\"]*\bfrom\s*['\"]([^'\"]+)['\"]", text, flags=re.MULTILINE)
    assert all((VENDOR / name).parent.joinpath(imported).is_file() for imported in imports)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("highlighter_worker.js", "text/javascript; charset=utf-8"),
        *((f"vendor/{name}", "text/javascript; charset=utf-8") for name in SCRIPTS),
        ("vendor/temml.css", "text/css; charset=utf-8"),
        ("vendor/Temml.woff2", "font/woff2"),
    ],
)
def test_browsers_get_a_file_with_its_media_type_and_check_it_each_time(
    client: TestClient, name: str, kind: str
) -> None:
    response = client.get(f"/static/{name}")
    assert (response.headers["content-type"], response.headers["cache-control"]) == (kind, "no-cache")
    assert client.get(f"/static/{name}", headers={"If-None-Match": response.headers["etag"]}).status_code == 304
