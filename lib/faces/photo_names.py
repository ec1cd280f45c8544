"""Names of photos: their spelling in a table, safe names, and files that are no photos."""

import re

_ESCAPED = re.compile(r"\\x(5c|[89a-f][0-9a-f])")

JUNK_FOLDERS = (
    *("@eadir", "@recycle", "#recycle", "#snapshot", "@recently-snapshot", "@snapshot"),  # network storage boxes
    *("$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx"),  # operating systems
)
"""Folders of copies that devices and systems make, in lower case: the same face again, under another name."""


def stored_name(name: str) -> str:
    r"""Return the name as in a table: bytes that are not UTF-8 become `\xe9`, and text that looks so is escaped."""
    if name.isascii() and "\\x" not in name:
        return name  # as nearly all are
    escaped = _ESCAPED.sub(lambda match: "\\x5c" + match[0][1:], name)
    return escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def name_on_disk(name: str) -> str:
    """Return the name on the disk, from one made by `stored_name`."""

    def byte(match: re.Match[str]) -> str:
        return "\\" if match[1] == "5c" else chr(0xDC00 + int(match[1], 16))

    return _ESCAPED.sub(byte, name)


def safe_name(name: str) -> bool:
    """Return whether a name stays below its folder."""
    return bool(name) and not name.startswith(("/", "\\")) and ".." not in name.replace("\\", "/").split("/")


def junk(name: str) -> str | None:
    """Return why a file is passed over: the name of a junk folder, or `hidden`; None for other files."""
    for part in name.split("/"):
        if part.startswith("."):
            return "hidden"
        if part.lower() in JUNK_FOLDERS:
            return part
    return None
