"""Flags become a configuration. tyro reads them; a refusal is one line."""

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_type_hints

import tyro
from tyro import _errors as refusals

from lib.errors import UserError

logger = logging.getLogger(__name__)

Config = TypeVar("Config")


def parsed(
    config_type: type[Config],
    flags: Sequence[str],
    *,
    description: str | None = None,
    defaults: Callable[[Sequence[str]], Config] | None = None,
) -> Config:
    """Return the configuration that these flags give.

    Nested dataclasses are the sections of `--help`; flags do not repeat their names, unless the configuration has
    `PREFIXED`. `RENAMED_FLAGS` maps old flags to new ones; an old one works, with a warning.

    Raises:
        UserError: a flag or a value that is not allowed.
    """
    flags = _renamed(flags, getattr(config_type, "RENAMED_FLAGS", {}))
    options: dict[str, Any] = {} if defaults is None else {"default": defaults(flags)}
    if not _is_prefixed(config_type):
        options["config"] = (tyro.conf.OmitArgPrefixes,)
    with _one_line_refusals(config_type):
        return tyro.cli(config_type, args=flags, description=description, **options)


def _is_prefixed(config_type: type) -> bool:
    return bool(getattr(config_type, "PREFIXED", False))


def _renamed(flags: Sequence[str], new_names: Mapping[str, str]) -> list[str]:
    made = []
    for flag in flags:
        name, mark, value = flag.partition("=")
        new = new_names.get(name.replace("_", "-"))
        if new is not None:
            logger.warning("%s is called %s now", name, new)
        made.append(flag if new is None else f"{new}{mark}{value}")
    return made


def check_values(*checks: tuple[str, Any, str, bool]) -> None:
    """Refuse the first wrong value. A check holds the flag's name, its value, what is allowed, and whether it is right.

    Raises:
        UserError: a value is not allowed.
    """
    for name, value, allowed, is_right in checks:
        if not is_right:
            raise UserError(f"--{name} is {value!r}: {allowed}")


@contextlib.contextmanager
def _one_line_refusals(config_type: type) -> Iterator[None]:
    """Raise UserError, which becomes one line, instead of the box that tyro draws."""
    flags = [f"--{name.replace('_', '-')}" for name in _flag_names(config_type)]

    def refuse(event: refusals.ParseErrorEvent) -> None:
        raise UserError(f"{_refusal(event, flags)}: run {event.prog} --help for the flags and their values")

    with refusals.on_parse_error(refuse):
        yield


def groups_of(config_type: type) -> list[str]:
    """Return the nested configurations whose names stand in flags where prefixes do; `arg(name="")` has no name."""
    hints = get_type_hints(config_type, include_extras=True)
    nameless = {
        name for name, hint in hints.items() if any(getattr(mark, "name", None) == "" for mark in _marks_of(hint))
    }
    return [name for name, kind in get_type_hints(config_type).items() if is_dataclass(kind) and name not in nameless]


def _marks_of(hint: Any) -> Sequence[Any]:
    return getattr(hint, "__metadata__", ())


def _flag_names(config_type: type, prefix: str = "", *, is_prefixed: bool | None = None) -> Iterator[str]:
    is_prefixed = _is_prefixed(config_type) if is_prefixed is None else is_prefixed
    kinds = get_type_hints(config_type)
    groups = groups_of(config_type)
    for name, kind in kinds.items():
        if is_dataclass(kind) and isinstance(kind, type):
            within = f"{prefix}{name}." if name in groups else prefix
            yield from _flag_names(kind, within if is_prefixed else "", is_prefixed=is_prefixed)
        else:
            yield prefix + name


def _refusal(event: refusals.ParseErrorEvent, flags: Sequence[str]) -> str:
    if isinstance(event, refusals.UnrecognizedArgs):
        token = event.tokens[0]
        meant = difflib.get_close_matches(token.partition("=")[0], flags, 1, 0.75) if token.startswith("--") else ()
        return f"{token!r} is not understood" + "".join(f", is {flag} meant?" for flag in meant)
    if isinstance(event, refusals.InvalidChoice):
        return f"{event.argument.display_name()} is {event.value!r}: allowed is {', '.join(event.choices)}"
    if isinstance(event, refusals.BadValue):
        return f"{event.argument.display_name()} has no value"
    if isinstance(event, refusals.MissingArgs):
        return f"{event.missing_arguments[0].arg.display_name()} is missing"
    if isinstance(event, refusals.InstantiationFailure):
        argument = event.argument
        name = f"{argument.display_name()} takes {argument.lowered.metavar}: " if argument else ""
        return name + " ".join(str(event.message).split())
    return type(event).__name__
