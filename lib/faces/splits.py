"""Train, val and test: by a hash of the identity, by folders or by a list. People of test sets stay out of training."""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lib import storage
from lib.errors import UserError

SHARES = (70.0, 5.0, 25.0)
"""Shares of the identities in train, val and test, in percent."""

FOLDER_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
"""What folders and lists call the splits, in lower case."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which split a photo belongs to.

    Attributes:
        shares: of the identities in train, val and test, in percent.
        level: of the folder whose name is the split, 1 for the topmost; None where folders do not decide.
        listed: the splits of identities, or of photos.
        excluded: identities that are in test, whatever else says.
    """

    seed: int = 0
    shares: tuple[float, float, float] = SHARES
    level: int | None = None
    listed: Mapping[str, str] | None = None
    excluded: Collection[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if any(share < 0 for share in self.shares) or abs(sum(self.shares) - 100) > 1e-6:
            shown = " ".join(f"{share:g}" for share in self.shares)
            raise UserError(f"--split-shares is {shown}: three numbers of at least 0 that add up to 100")

    @property
    def by_identity(self) -> bool:
        """Whether the identity alone decides, of a photo that has one."""
        return self.level is None and self.listed is None

    def of(self, photo: str | None, identity: str | None) -> str:
        """Return `train`, `val` or `test`. The photo is needed unless it has an identity and that decides.

        Raises:
            UserError: a folder or a list does not say it.
        """
        if identity is not None and identity in self.excluded:
            return "test"
        if self.level is not None:
            assert photo is not None
            folders = photo.split("/")[:-1]
            name = folders[self.level - 1] if len(folders) >= self.level else ""
            if name.lower() not in FOLDER_NAMES:
                raise UserError(
                    f"--split-from {self.level}: the folder {name!r} of {photo} is no split; allowed are "
                    f"{', '.join(FOLDER_NAMES)}"
                )
            return FOLDER_NAMES[name.lower()]
        if self.listed is not None:
            split = self.listed.get(photo or "") or (None if identity is None else self.listed.get(identity))
            if split is None:
                raise UserError(f"--split-from names neither {photo} nor its identity {identity!r}: add one of them")
            return split
        # Who stands for nobody is split by the name of the photo.
        return split_of(identity if identity is not None else f"photo:{photo}", self.seed, self.shares)


def split_of(identity: str, seed: int, shares: tuple[float, float, float] = SHARES) -> str:
    """Return `train`, `val` or `test`, the same whatever other identities, photos or workers there are."""
    digest = hashlib.blake2b(f"{seed}\0{identity}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < shares[0] / 100:
        return "train"
    return "val" if place < (shares[0] + shares[1]) / 100 else "test"


def listed_splits(url: str) -> dict[str, str]:
    """Return identity or photo -> split of a file with lines "name split"; commas and tabs separate too.

    Raises:
        UserError: a line that is none.
    """
    listed: dict[str, str] = {}
    for number, line in _lines(url):
        found = re.fullmatch(r"(.+)[\s,;]+([^\s,;]+)", line)
        if found is None or found[2].lower() not in FOLDER_NAMES:
            raise UserError(
                f'{storage.redacted(url)}: line {number} is not "identity split" with one of {", ".join(FOLDER_NAMES)}'
            )
        listed[found[1].strip()] = FOLDER_NAMES[found[2].lower()]
    return listed


def names_in(url: str) -> set[str]:
    """Return what may be a person or a photo in a list of people, of photos or of pairs, in any field of its lines.

    Raises:
        UserError: it is not text, as the .bin files of test sets, which hold no names.
    """
    found: set[str] = set()
    for _, line in _lines(url):
        for text in [line, *re.split(r"[\t,;]", line), *line.split()]:
            name = text.strip().strip('"')
            above = name.rpartition("/")[0]
            found.update((name, above, above.rpartition("/")[2]))
    return found - {""}


def _lines(url: str) -> list[tuple[int, str]]:
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{storage.redacted(url)} is no text: name a list of people, photos or pairs (a .bin file names nobody)"
        ) from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
