"""Imports run down from room to room, and never in a circle (docs/architecture.md). Files and functions are short."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

from tests.job_runner import ROOT

ROOMS = ("", "faces", "recognition", "evaluation", "curation", "training", "tuning", "forgetting", "pipeline")
"""From the ground floor up. `sample` stands beside `faces`, and imports the ground floor alone."""


MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 50
"""Of `lib`. A longer file or function is split where its subject changes, or shortened."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in (ROOT / "lib").rglob("*.py")}


def room_of(module: str) -> str:
    parts = module.split(".")
    if module == "lib.pipeline_job":
        return "pipeline"
    return parts[1] if len(parts) > 2 or f"{module}.__init__" in MODULES or (ROOT / "lib" / parts[-1]).is_dir() else ""


@functools.cache
def nodes_of(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(MODULES[module].read_text())))


@functools.cache
def imported_by(module: str) -> set[str]:
    """Return the modules of lib that a module imports, at its head or later."""
    found = set()
    for node in nodes_of(module):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in MODULES and name != "lib"}
    return found - {name.rpartition(".")[0] for name in found} - {module}


def test_no_room_imports_from_above() -> None:
    for module in MODULES.keys() - {"lib"}:
        for imported in imported_by(module):
            upper, lower = room_of(module), room_of(imported)
            if "sample" in (upper, lower):
                assert (upper, lower) in (("sample", "sample"), ("sample", "")), f"{module} imports {imported}"
            else:
                assert ROOMS.index(lower) <= ROOMS.index(upper), f"{module} imports {imported}"


def test_no_imports_run_in_a_circle() -> None:
    graph = {module: imported_by(module) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_no_file_is_long() -> None:
    num_lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: num for module, num in num_lines.items() if num > MAX_FILE_LINES} == {}


def test_no_function_is_long() -> None:
    num_lines = {
        f"{module}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in MODULES
        for node in nodes_of(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {function: num for function, num in num_lines.items() if num > MAX_FUNCTION_LINES} == {}
