"""The layout that models/README.md describes: which package may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ROOT / "models"

GROUND = {
    "chat_request",
    "env_file",
    "errors",
    "messages",
    "model_info",
    "options",
    "output_format",
    "output_item",
    "private_files",
    "scratch",
    "settings",
    "tools",
    "validation",
}
FLOORS = [  # a package imports only from floors below its own
    {"server"},
    {"web"},
    {"hosts", "protocols"},
    {"hub"},
    {"generation", "upstream"},
    {"language", "users"},
    {"engine", "ops", "shared", "store"},
    GROUND,
]
ASK_FOR_REPLIES = {"models.generation.interface", "models.generation.events"}  # all that protocols and web may know


def name_of(path: Path) -> str:
    """The name of a module, with dots."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in [ROOT / "server.py", *sorted(PACKAGES.rglob("*.py"))]}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def floor_of(module: str) -> int:
    """The number of a module's floor; 0 is the top."""
    room = module.removeprefix("models.").partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(module: str) -> str:
    """The package of a module, or the module itself on the ground."""
    return module.removeprefix("models.").partition(".")[0]


def loaded_by(*modules: str) -> set[str]:
    """The modules in a new process that imports some modules."""
    probe = f"import sys, {', '.join(modules)}\nprint(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(process.stdout.split())


def modules_in(package: str) -> list[str]:
    return [module for module in MODULES if module.startswith(f"models.{package}.")]


@pytest.mark.parametrize("module", [module for module in MODULES if module != "models"])
def test_a_module_imports_only_from_floors_below(module: str) -> None:
    for imported in imports(MODULES[module]):
        if imported == "server" or imported.startswith("models."):
            same_room = room_of(imported) == room_of(module) or {room_of(imported), room_of(module)} <= GROUND
            assert same_room or floor_of(imported) > floor_of(module), f"{module} imports {imported}"
        assert not imported.startswith("tests"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", [*modules_in("protocols"), *modules_in("web")])
def test_protocols_and_web_know_only_the_interface_of_generation(module: str) -> None:
    for imported in imports(MODULES[module]):
        if imported.startswith("models.generation"):
            assert imported in ASK_FOR_REPLIES
        assert not imported.startswith(("models.language", "models.engine"))


def test_modules_import_each_other_without_a_cycle() -> None:
    graph = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    assert any(graph.values())
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) not in ("server", "web")])
def test_only_web_and_the_server_import_starlette(module: str) -> None:
    assert not {"starlette", "uvicorn"} & {name.partition(".")[0] for name in imports(MODULES[module])}


def test_web_protocols_users_and_store_load_no_torch() -> None:
    modules = [module for package in ("web", "protocols", "users", "store") for module in modules_in(package)]
    loaded = loaded_by(*modules)
    assert {"starlette", "models.web.chat_socket"} <= loaded
    assert not {"torch", "transformers", "models.language", "models.engine"} & loaded


def test_a_worker_loads_no_torch() -> None:
    loaded = loaded_by(*modules_in("hub"))
    assert "models.hub.worker" in loaded
    assert not {"torch", "transformers", "models.engine"} & loaded


def test_the_server_imports_torch_only_to_open_the_model() -> None:
    assert not {"torch", "transformers", "models.engine"} & loaded_by("server")


def test_upstreams_need_no_torch() -> None:
    loaded = loaded_by("server", *modules_in("upstream"))
    assert "models.upstream.upstream_chat" in loaded
    assert not {"torch", "transformers", "models.engine"} & loaded


def test_the_server_imports_redis_only_to_open_it() -> None:
    loaded = loaded_by("server")
    assert "models.shared.shared_state" in loaded
    assert not {"redis", "models.shared.redis_state"} & loaded


def test_the_interface_of_generation_knows_nothing_of_language_models() -> None:
    loaded = loaded_by(*ASK_FOR_REPLIES)
    assert "models.generation.interface" in loaded
    assert not {"torch", "models.language", "models.engine"} & loaded


@pytest.mark.parametrize("module", modules_in("engine"))
def test_only_the_async_engine_knows_asyncio(module: str) -> None:
    assert ("asyncio" in imports(MODULES[module])) == (module == "models.engine.async_engine")


@pytest.mark.parametrize(
    "package", sorted(path.parent for path in PACKAGES.rglob("__init__.py")), ids=lambda path: path.name
)
def test_a_package_says_in_five_lines_what_it_is_for(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring.splitlines()) <= 5


def test_the_server_module_stays_short() -> None:
    assert len((ROOT / "server.py").read_text(encoding="utf-8").splitlines()) <= 350
