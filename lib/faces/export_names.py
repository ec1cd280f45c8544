"""File names for people and photos of any name: they stay in their folder, and no two become one."""

import hashlib

from lib.faces.photo_names import JUNK_FOLDERS, name_on_disk
from lib.faces.splits import FOLDER_NAMES

MAX_BYTES = 200
"""Of a name; file systems allow 255."""

_ESCAPED = frozenset('/\\%~:*?"<>|') | {chr(code) for code in (*range(32), 127)}
"""Characters that lead out of a folder, that some disks refuse, and the two that mark what was changed."""


def file_name(name: str) -> str:
    """Return a name of one file or folder: characters that may not stand there as %2F; different names stay different.

    What no reader of a folder would take for a person or a photo is changed too: hidden names, those of the system's
    junk folders, and those of splits. A long name is cut and ends in a hash.
    """
    text = name_on_disk(name)
    is_special = not text or text[0] in "._ " or text.lower() in (*JUNK_FOLDERS, *FOLDER_NAMES)
    made = "".join(
        _escaped(each) if _must_change(each) or (is_special and place == 0) else each for place, each in enumerate(text)
    )
    if made.endswith((".", " ")):
        made = made[:-1] + _escaped(made[-1])
    encoded = made.encode()
    if len(encoded) > MAX_BYTES:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        made = f"{encoded[: MAX_BYTES - 17].decode('utf-8', 'ignore')}~{digest}"
    return made or "~"


def _must_change(character: str) -> bool:
    return character in _ESCAPED or "\udc80" <= character <= "\udcff"  # a byte that is no UTF-8


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def photo_file(photo: str, identity: str, *, has_folders: bool) -> str:
    """Return the name of a photo's JPEG in the folder of its person.

    A photo that lies in the folder of its person keeps its name there. Any other has its whole path, after a mark where
    photos lie in folders (`has_folders`), so that it is never that of another one. A name that does not say JPEG gets a
    suffix.
    """
    own = photo.removeprefix(f"{identity}/")
    is_elsewhere = has_folders and (own == photo or "/" in own)
    name = f"~{file_name(photo)}" if is_elsewhere else file_name(own)
    return name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}~.jpg"
