"""Who was forgotten, as keyed hashes: preprocess and embed leave these photos and people out, and nobody can read them.

The folder `forgotten/` below the data URL holds a random key and a file of hashes for each forgetting. A hash is
HMAC-SHA256 (RFC 2104) of "photo" or "identity", a zero byte and the name. Without the key a list of names cannot be
tried against the hashes.
"""

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa

from lib import storage
from lib.errors import UserError
from lib.faces.manifest import Manifest
from lib.storage_errors import MissingFileError

logger = logging.getLogger(__name__)

FOLDER = "forgotten"
KEY_NAME = "key"
TOMBSTONES_FOLDER = "tombstones"

KEY_BYTES = 32


@dataclass(frozen=True)
class Tombstones:
    """Hashes of photos and identities that were forgotten, and the key that they were made with."""

    key: bytes
    photos: frozenset[str] = frozenset()
    identities: frozenset[str] = frozenset()

    @property
    def digest(self) -> str:
        """A digest of who was forgotten."""
        return hashlib.sha256("".join([*sorted(self.photos), ".", *sorted(self.identities)]).encode()).hexdigest()

    def holds_photo(self, name: str) -> bool:
        """Return whether a photo was forgotten."""
        return bool(self.photos) and keyed(self.key, "photo", name) in self.photos

    def holds_identity(self, name: str | None) -> bool:
        """Return whether an identity was forgotten; None is nobody."""
        return name is not None and bool(self.identities) and keyed(self.key, "identity", name) in self.identities


def keyed(key: bytes, kind: str, name: str) -> str:
    """Return the hash of a name, in hexadecimals. `kind` is photo or identity."""
    return hmac.digest(key, f"{kind}\0{name}".encode("utf-8", "surrogateescape"), "sha256").hex()


def without_forgotten(manifest: Manifest, tombstones: Tombstones | None) -> tuple[Manifest, int]:
    """Return the photos but for those that were forgotten, and how many those are.

    Raises:
        UserError: no photo is left.
    """
    if tombstones is None:
        return manifest, 0
    database, num_before = manifest.database, len(manifest)
    holds: dict[str, Callable[[str], bool]] = {"photo": tombstones.holds_photo, "identity": tombstones.holds_identity}
    for column, is_out in holds.items():
        database.run(f"create table forgotten_{column} (name varchar)")
        for batch in database.batches(f"select distinct {column} from photos where {column} is not null"):
            names = [name for name in batch.column(0).to_pylist() if is_out(name)]
            database.append(f"forgotten_{column}", pa.table({"name": pa.array(names, pa.string())}))
    kept = manifest.only(
        "photo not in (from forgotten_photo) and (identity is null or identity not in (from forgotten_identity))"
    )
    num = num_before - len(kept)
    if num:
        logger.info("%d photos are left out: they, or the people in them, were forgotten", num)
    if not len(kept):
        raise UserError(f"all {num} photos, or the people in them, were forgotten: nothing is left to do")
    return kept, num


def folder_url(data_url: str) -> str:
    """Return the folder of what is known of forgettings."""
    return storage.join(data_url, FOLDER)


def read_tombstones(data_url: str) -> Tombstones | None:
    """Return who was forgotten below a data URL, None where nobody was.

    Raises:
        UserError: the key is gone, or is not the one that the hashes were made with.
    """
    data_url = os.path.expanduser(data_url) if storage.is_local(data_url) else data_url  # noqa: PTH111 - as in lib.config
    folder = storage.join(folder_url(data_url), TOMBSTONES_FOLDER)
    names = [info.path for info in storage.list_files(folder, suffix=".json")]
    if not names:
        return None
    key = read_key(data_url) or b""
    photos: set[str] = set()
    identities: set[str] = set()
    for name in names:
        url = storage.join(folder, name)
        content = storage.read_json(url, {"key_id": str, "photos": list, "identities": list})
        if content["key_id"] != key_id(key):
            found = "is another one" if key else "is not there"
            raise UserError(
                f"{storage.redacted(url)} says who was forgotten, and the key that it was made with {found} "
                f"({storage.redacted(_key_url(data_url))}): put that key back, or remove the file to let them in again"
            )
        photos.update(map(str, content["photos"]))
        identities.update(map(str, content["identities"]))
    return Tombstones(key, frozenset(photos), frozenset(identities))


def write_tombstones(data_url: str, key: bytes, name: str, photos: Iterable[str], identities: Iterable[str]) -> None:
    """Write the hashes of the names of one forgetting; written again, they are the same file."""
    content = {
        "key_id": key_id(key),
        "photos": sorted(keyed(key, "photo", photo) for photo in photos),
        "identities": sorted(keyed(key, "identity", identity) for identity in identities),
    }
    storage.write_json(storage.join(folder_url(data_url), TOMBSTONES_FOLDER, f"{name}.json"), content)


def read_key(data_url: str) -> bytes | None:
    """Return the key, None where there is none.

    Raises:
        UserError: the file holds something else.
    """
    try:
        text = storage.read_bytes(_key_url(data_url))
    except MissingFileError:
        return None
    try:
        key = bytes.fromhex(text.decode().strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(
            f"{storage.redacted(_key_url(data_url))} is no key of {2 * KEY_BYTES} hexadecimal digits: "
            "put the right one back"
        )
    return key


def make_key(data_url: str) -> bytes:
    """Return the key, made where there is none; on a disk its file is its user's alone."""
    key = read_key(data_url)
    if key is None:
        storage.write_bytes(_key_url(data_url), f"{secrets.token_hex(KEY_BYTES)}\n".encode(), is_private=True)
        key = read_key(data_url)  # another job may have made one at the same moment: the last one counts
        assert key is not None
    return key


def key_id(key: bytes) -> str:
    """Return what tells one key from another, and does not give it away."""
    return hashlib.sha256(b"key\0" + key).hexdigest()[:16]


def _key_url(data_url: str) -> str:
    return storage.join(folder_url(data_url), KEY_NAME)
