"""URLs that name many files: `{000..123}` and `{a,b}` as shells and WebDataset write them, and `*`, `?`, `[...]`."""

import fnmatch
import itertools
import re

from lib.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000


def split_pattern(url: str) -> tuple[str, tuple[str, ...]]:
    """Return the folder of a URL with a pattern, and the patterns below it without braces; none for a plain URL."""
    names = url.split("/")
    first = next((n for n, name in enumerate(names) if _is_pattern(name)), None)
    if first is None:
        return url, ()
    return "/".join(names[:first]) or ".", tuple(expanded("/".join(names[first:])))


def expanded(pattern: str) -> list[str]:
    """Return the patterns that the braces expand to.

    Raises:
        UserError: they are more than a million.
    """
    pieces = _BRACES.split(pattern)
    choices = [[piece] if n % 2 == 0 else _choices(piece) for n, piece in enumerate(pieces)]
    num = 1
    for each in choices:
        num *= len(each)
    if num > _MOST:
        raise UserError(f"--photos {pattern} names {num} files: at most {_MOST} are allowed; name their folder")
    return ["".join(each) for each in itertools.product(*choices)]


def matches(path: str, patterns: frozenset[str]) -> str | None:
    """Return the first pattern that matches a path; None if none does."""
    if path in patterns:
        return path
    return next((each for each in patterns if _has_wildcard(each) and fnmatch.fnmatchcase(path, each)), None)


def _choices(inside: str) -> list[str]:
    if found := _RANGE.fullmatch(inside):
        first, last = int(found[1]), int(found[2])
        step = 1 if first <= last else -1
        if abs(last - first) >= _MOST:
            raise UserError(f"--photos names {abs(last - first) + 1} files: at most {_MOST} are allowed")
        return [str(n).zfill(len(found[1])) for n in range(first, last + step, step)]
    return inside.split(",") if "," in inside else ["{" + inside + "}"]


def _is_pattern(name: str) -> bool:
    return _has_wildcard(name) or any("," in inside or _RANGE.fullmatch(inside) for inside in _BRACES.findall(name))


def _has_wildcard(pattern: str) -> bool:
    return any(letter in pattern for letter in "*?[")
