from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {f"models.{path.stem}": path for path in sorted((ROOT / "models").glob("*.py")) if path.stem != "__init__"}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it, with dots and without knowing which names are modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_models_know_no_starlette() -> None:
    probe = f"import sys, {', '.join(MODULES)}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    process = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = process.stdout.split()
    assert "models" in loaded
    assert not {"starlette", "uvicorn", "server"} & set(loaded)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_models_does_not_import_what_is_above_it(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not {"server", "starlette", "tests"} & roots


def test_models_import_each_other_in_no_circle() -> None:
    graph = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    assert any(graph.values())
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)  # raises CycleError, which names the circle
