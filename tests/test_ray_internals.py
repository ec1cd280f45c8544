"""Names that Ray keeps private: which modules use them, and whether the installed Ray still has each of them."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lib.ray_internals import lean_start

LIB = Path(__file__).parents[1] / "lib"

ALLOWED = {"ray_internals.py", "training/ray_train.py"}


def private_names() -> Iterator[tuple[str, str, str]]:
    """Yield each file of `lib`, and the module and name of Ray that it uses, where one of these begins with `_`."""
    for path in sorted(LIB.rglob("*.py")):
        modules = {}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        file = path.relative_to(LIB).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
                for alias in node.names:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    if "._" in f"{node.module}.{alias.name}":
                        yield file, str(node.module), alias.name
        for node in ast.walk(tree):
            chain = ast.unparse(node) if isinstance(node, ast.Attribute) and node.attr.startswith("_") else ""
            start, _, rest = chain.partition(".")
            if chain.startswith("ray._"):
                yield file, *chain.rsplit(".", 1)
            elif start in modules and rest == node.attr:
                yield file, modules[start], node.attr


@pytest.mark.parametrize(("file", "module", "name"), sorted(set(private_names())))
def test_the_installed_ray_has_each_private_name(file: str, module: str, name: str) -> None:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in [*parts[end:], name]:
            if not hasattr(found, part):
                try:
                    importlib.import_module(f"{module}.{name}")
                except ImportError:
                    pytest.fail(f"Ray {ray.__version__} has no {module}.{name}, which lib/{file} uses")
                return
            found = getattr(found, part)
        return
    pytest.fail(f"Ray {ray.__version__} has no {module}, which lib/{file} uses")


def test_no_other_module_uses_private_names() -> None:
    assert {file for file, _, _ in private_names()} <= ALLOWED


def test_what_a_lean_start_replaces_is_there_and_comes_back() -> None:
    from ray._private import ray_constants
    from ray._private.node import Node

    before = Node.start_api_server, ray_constants.ENABLE_RAY_CLUSTER
    with lean_start():
        assert Node.start_api_server is not before[0]
    assert (Node.start_api_server, ray_constants.ENABLE_RAY_CLUSTER) == before
