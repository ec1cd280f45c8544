"""Writes flags.md, the reference of all flags, from the configuration classes of the jobs: `make docs`."""

import ast
import dataclasses
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from lib.flags import groups_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "flags.md"
INTRODUCTION = """\
# Flags

`make docs` writes this page from the code. `jobs/train.py --help`, and so on, show the same text in the terminal.

Every job takes `--verbose`, too: it shows the lines of Ray and other libraries.

A flag that is on or off has a twin that turns it off again: `--dry-run` and `--no-dry-run`.
"""


JOBS = (
    "sample",
    "preprocess",
    "train",
    "evaluate",
    "embed",
    "identify",
    "curate",
    "export",
    "forget",
    "sweep",
    "compare",
    "pipeline",
)


def config_of(job: str) -> type:
    """Return the configuration class that `jobs/JOB.py` hands to `run_job`."""
    script = ast.parse((ROOT / "jobs" / f"{job}.py").read_text())
    calls = [node for node in ast.walk(script) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "run_job"]
    name = ast.unparse(call.args[0])
    imports = [node for node in ast.walk(script) if isinstance(node, ast.ImportFrom)]
    (module,) = [each.module for each in imports if name in {alias.name for alias in each.names}]
    return getattr(importlib.import_module(str(module)), name)


def page() -> str:
    """Return the text of flags.md."""
    sections = {config_of(job): job for job in JOBS}
    return "\n".join(
        [INTRODUCTION, *(part for job in JOBS for part in _section(config_of(job), f"## {job}", sections))]
    )


def _section(config: type, heading: str, sections: dict[type, str]) -> Iterator[str]:
    """Yield a heading, the table of a class, and what it holds; classes that have a section already are linked to."""
    job = heading.lstrip("# ")
    is_prefixed = getattr(config, "PREFIXED", False)
    sections[config] = job
    rows, nested = [], []
    for field, hint, documentation in _fields(config):
        kind = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            nested.append((field.name, kind, f"--{field.name}." if is_prefixed else ""))
        else:
            rows.append(f"| {_flag(field, hint)} | {_values(kind)} | {_default(field)} | {_cell(documentation)} |\n")
    yield f"{heading}\n\n{_cell(inspect.getdoc(config) or '')}\n"
    if rows:
        yield "| flag | value | default | what it does |\n| --- | --- | --- | --- |\n" + "".join(rows)
    for name, kind, prefix in nested:
        if kind in sections:
            after = f", each after `{prefix}`: `{prefix}data` and so on" if prefix else ""
            groups = groups_of(kind)
            if prefix and groups:
                after += f"; the groups of flags add their names, as in `{prefix}{groups[0]}.`"
            yield f"And the flags of [{sections[kind]}](#{sections[kind].replace(' ', '-')}){after}.\n"
        else:
            yield from _section(kind, f"### {job} {name}", sections)


def _fields(config: type) -> Iterator[tuple[dataclasses.Field[Any], Any, str]]:
    """Yield each field of a dataclass with its type and the docstring that stands under it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef)
    documentation = {
        ast.unparse(above.target): inspect.cleandoc(str(below.value.value))
        for above, below in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        if tyro.conf.Suppress in getattr(hints[field.name], "__metadata__", ()):
            continue
        yield field, hints[field.name], documentation.get(field.name, "")


def _flag(field: dataclasses.Field[Any], hint: Any) -> str:
    if any(mark is tyro.conf.Positional for mark in getattr(hint, "__metadata__", ())):
        return f"`{field.name.upper()}…`"
    return f"`--{field.name.replace('_', '-')}`"


def _values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_args(kind):
        parts = [_values(part) for part in get_args(kind) if part not in (NoneType, Ellipsis)]
        return (" or " if get_origin(kind) in (Union, UnionType) else " ").join(dict.fromkeys(filter(None, parts)))
    return {bool: "", int: "integer", float: "number", str: "text"}.get(kind, "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value in ("", ()):
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _cell(documentation: str) -> str:
    return " ".join(documentation.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    os.environ.pop("DATA_URL", None)  # it would stand in the page as the default
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
