"""Photos in tar and zip files: the samples of WebDataset and img2dataset, or plain archives of photos.

The members of a WebDataset sample share their path up to the first dot of the name: `7/000012.jpg` is described by
`7/000012.cls` (its class), `7/000012.json` or `7/000012.txt`. An archive without such members is a folder of photos.
"""

import bz2
import gzip
import json
import logging
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import pyarrow as pa

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.identities import identity_or_nobody
from lib.faces.images import MAX_PHOTO_BYTES
from lib.faces.photo_names import junk, stored_name
from lib.faces.sources.source import ContainerSource, Photo, Row, Shard, is_photo, scan_batch, suffix_of
from lib.ranged_files import RangedFile

logger = logging.getLogger(__name__)

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    struct.error,
    NotImplementedError,
)
"""Errors of readers for damaged archives. Errors of the storage are `UserError` or `JobError`."""

LABELS = (".cls", ".json", ".txt")
"""Suffixes of the labels of a sample, most reliable first."""

IDENTITY_KEYS = ("identity", "label", "class", "class_id", "person", "person_id", "cls")
"""Keys of the identity in a sample's .json, if it lacks the one of `--identity-column`."""

_MAX_LABEL_BYTES = 2**20
_MAX_NAME = 200
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_STORED, _DEFLATED = 0, 8
_PIECE = 2**16


class Member(NamedTuple):
    """A file in an archive: its place there is that of the header before its bytes, in `file`."""

    name: str
    place: int
    num_bytes: int
    file: Any


class TarSource(ContainerSource):
    """Tars, plain or compressed. The `row` of a photo is the place of its header. A compressed one is read in order."""

    format = "tar"
    what = "tar files"
    suffixes = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
    companions = (".json", ".parquet", ".idx")
    has_folders = True

    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Yield the photos of a tar; if it is cut off, those before the cut."""
        yield from _scan(self, shard, self._members(shard.name))

    def _members(self, name: str) -> Iterator[Member]:
        """Yield the complete members: each waits until the next one, or the end, was found."""
        shown = storage.redacted(self.file_url(name))
        kept = None
        with _opened(self.file_url(name)) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
                    while (info := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # else all of them stay in memory
                        if kept is not None:
                            yield kept
                        place = info.offset_data - tarfile.BLOCKSIZE
                        name = info.name.removeprefix("./")
                        kept = Member(name, place, info.size, file) if info.isfile() else None
                    if kept is not None:
                        yield kept
                    # `next` also ends without an error at a damaged header.
                    file.seek(archive.offset)
                    end = file.read(tarfile.BLOCKSIZE)
                    if end.strip(b"\0") or not end:
                        raise EOFError("it has no end mark")
            except _BROKEN as error:
                if isinstance(error, UserError):
                    raise
                if kept is None:
                    raise UserError(
                        f"{shown} is no whole tar file ({error or 'it ends too early'}): copy it again, or unpack it "
                        "and name the folder"
                    ) from error
                self.passed_over["archives cut off"] += 1
                logger.warning("%s is cut off or damaged (%s): what follows is lost", shown, error or "its end is gone")

    def read_file(self, name: str, rows: Iterable[Row]) -> Iterator[Photo]:
        """Yield the photos of rows, with one block of the file in memory."""
        with _opened(self.file_url(name)) as file:
            yield from _photos(file, rows, _tar_bytes)


class ZipSource(ContainerSource):
    """Zip files. The `row` of a photo is the place of its local header."""

    format = "zip"
    what = "zip files"
    suffixes = (".zip",)
    has_folders = True

    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Yield the photos of one zip file."""
        yield from _scan(self, shard, self._members(shard.name))

    def _members(self, name: str) -> Iterator[Member]:
        file = RangedFile(self.file_url(name))
        try:
            with zipfile.ZipFile(file) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        except _BROKEN as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{storage.redacted(file.url)} is no whole zip file ({error}): copy it again, or unpack it and name "
                "the folder"
            ) from error
        for info in infos:
            if info.flag_bits & 1:
                self.passed_over["encrypted files"] += 1
            elif not info.is_dir():
                yield Member(info.filename, info.header_offset, info.file_size, file)

    def read_file(self, name: str, rows: Iterable[Row]) -> Iterator[Photo]:
        """Yield the photos of rows, with one block of the file in memory."""
        yield from _photos(RangedFile(self.file_url(name)), rows, _zip_bytes)


def _opened(url: str) -> IO[bytes]:
    """Open a tar, and decompress it if its name says so."""
    file = RangedFile(url)
    opener = next((each for suffix, each in _OPENERS.items() if url.lower().endswith(suffix)), None)
    opened: Any = opener(file) if opener else file
    return opened


def _photos(file: Any, rows: Iterable[Row], read: Callable[[Any, int, int], bytes]) -> Iterator[Photo]:
    for row in rows:
        try:
            data: bytes | str = read(file, row["row"], MAX_PHOTO_BYTES + 1)
        except _BROKEN as error:
            if isinstance(error, UserError):
                raise
            data = table.CORRUPT
        yield row, data


def _tar_bytes(file: IO[bytes], place: int, limit: int) -> bytes:
    """Return the first bytes of the member whose header is at a place."""
    file.seek(place)
    size = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").size
    data = file.read(min(size, limit))
    if len(data) < min(size, limit):
        raise EOFError
    return data


def _zip_bytes(file: RangedFile, place: int, limit: int) -> bytes:
    """Return the first bytes of the member whose local header is at a place."""
    magic, _, _, method, _, _, _, packed, size, len_name, len_extra = _LOCAL_HEADER.unpack(
        file.at(place, _LOCAL_HEADER.size)
    )
    if magic != b"PK\3\4":
        raise ValueError
    place += _LOCAL_HEADER.size + len_name + len_extra
    if method == _STORED:
        data = file.at(place, min(size, limit))
        if len(data) < min(size, limit):
            raise EOFError
        return data
    if method != _DEFLATED:
        raise ValueError
    # The header of a member that was written in one go does not say its sizes: its own end does.
    inflate, chunks, left = zlib.decompressobj(-zlib.MAX_WBITS), [], limit
    step = packed or _PIECE
    while left > 0 and not inflate.eof:
        piece = inflate.unconsumed_tail or file.at(place, min(step, _PIECE))
        if not inflate.unconsumed_tail:
            place += len(piece)
        if not piece:
            raise EOFError
        chunks.append(inflate.decompress(piece, left))
        left -= len(chunks[-1])
    return b"".join(chunks)


def _scan(source: ContainerSource, shard: Shard, members: Iterator[Member]) -> Iterator[pa.RecordBatch]:
    """Yield the photos of the samples of an archive."""
    names, identities, places, sizes = [], [], [], []
    seen: set[str] = set()
    odd = ""
    num_unlabelled = num_labelled = num_odd = 0
    is_tar = isinstance(source, TarSource)
    for photos, labels in _samples(source, members, _tar_bytes if is_tar else _zip_bytes):
        text = _label(source, labels)
        if not photos:
            source.passed_over["samples without a picture"] += 1
            continue
        num_labelled += text is not None
        num_unlabelled += text is None
        if text is not None and ".cls" in labels and not text.lstrip("-").isdigit():
            odd, num_odd = odd or text, num_odd + 1
        for member in photos:
            name = f"{source.stem(shard.name)}/{stored_name(member.name)}"
            name = f"{name}#{member.place}" if name in seen else name
            seen.add(name)
            names.append(name)
            identities.append(identity_or_nobody(text))
            places.append(member.place)
            sizes.append(member.num_bytes)
    shown = storage.redacted(source.file_url(shard.name))
    if num_labelled and num_unlabelled:
        logger.warning("%s: %d samples have no label", shown, num_unlabelled)
    if num_odd:
        logger.warning("%s: %d classes are no numbers, such as %r: they are taken as names", shown, num_odd, odd)
    if names:
        yield scan_batch(shard, names, identities, places, sizes)


def _samples(
    source: ContainerSource, members: Iterator[Member], read: Callable[[Any, int, int], bytes]
) -> Iterator[tuple[list[Member], dict[str, bytes]]]:
    """Yield the photos and the labels, by suffix, of members that follow each other and share their key."""
    photos: list[Member] = []
    labels: dict[str, bytes] = {}
    current = None
    for member in members:
        if kind := junk(member.name):
            source.passed_over[kind] += 1
            continue
        folder, _, base = member.name.rpartition("/")
        key = (folder, base.partition(".")[0])
        if key != current:
            if photos or labels:
                yield photos, labels
            photos, labels, current = [], {}, key
        suffix = suffix_of(member.name)
        if is_photo(member.name):
            photos.append(member)
        elif suffix in LABELS and member.num_bytes <= _MAX_LABEL_BYTES:
            try:
                labels[suffix] = read(member.file, member.place, _MAX_LABEL_BYTES)
            except _BROKEN as error:
                if isinstance(error, UserError):
                    raise
                source.passed_over["labels that cannot be read"] += 1
        else:
            source.passed_over[suffix or "no suffix"] += 1
    if photos or labels:
        yield photos, labels


def _label(source: ContainerSource, labels: Mapping[str, bytes]) -> str | None:
    """Return the identity of a sample by its most reliable label; None if no label has one."""
    if source.columns.identity is None:
        return None
    for suffix in LABELS:
        if suffix not in labels:
            continue
        text = labels[suffix].decode("utf-8", "replace").strip()
        if suffix == ".json":
            try:
                about = json.loads(text)
            except (ValueError, RecursionError):
                source.passed_over["labels that are no JSON"] += 1
                continue
            keys = (source.columns.identity, *IDENTITY_KEYS)
            found = next((about[key] for key in keys if key in about), None) if isinstance(about, dict) else about
            text = str(found) if isinstance(found, str | int | float) else ""
        if text:
            return text.splitlines()[0][:_MAX_NAME]
    return None
