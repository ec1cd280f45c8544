"""The flags of every job that takes --photos: the format of the photos, and crops that are aligned already."""

from dataclasses import dataclass, replace

from lib.config import absolute_url
from lib.errors import UserError
from lib.faces.aligned import ARCFACE_SIDE, TEMPLATES, AlignedCrops
from lib.faces.alignment import ARCFACE, EYES, Alignment
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.opening import AUTO, check_format, open_source
from lib.faces.sources.photo_list import PhotoList
from lib.faces.sources.source import PhotoColumns, Source


@dataclass(frozen=True, kw_only=True)
class PhotoFlags:
    """How to read --photos: their format, their columns, and whether they are aligned already."""

    photos_format: str = AUTO
    """Format of the photos: folder, rec, tar, arrow, parquet, zip or lst. auto: by the names of the first files."""
    photo_list: str | None = None
    """File that names the photos below --photos, which is then not listed: text with a name or URL a line; .csv, .tsv
    or .parquet with the column --photo-column; or the manifest.json of an S3 Inventory. Text may be packed as .gz."""
    image_column: str = "image"
    """Parquet and Arrow photos: column with the image, binary or a struct with `bytes`."""
    identity_column: str = "identity"
    """Parquet and Arrow photos: column with the identity. Tars: key of a sample's .json."""
    photo_column: str = "photo"
    """Parquet and Arrow photos: column with a unique name. Without it, file and row are the name."""
    aligned: str | None = None
    """The photos are aligned crops already: arcface-112 (as InsightFace's sets), eyes (as preprocess makes them), or
    none (as they are). No face is detected, and a JPEG of the right size is taken byte for byte."""
    verify: bool = False
    """With --aligned: decode every crop, to find those that are damaged."""

    def __post_init__(self) -> None:
        check_format(self.photos_format)
        if self.aligned is not None and self.aligned not in TEMPLATES:
            raise UserError(f"--aligned is {self.aligned!r}: allowed are {', '.join(TEMPLATES)}")
        if self.verify and self.aligned is None:
            raise UserError("--verify is for --aligned: other photos are always decoded")
        if self.photo_list is not None and self.photos_format not in (AUTO, FolderSource.format):
            raise UserError(f"--photo-list names photos that are files: leave --photos-format {self.photos_format} out")

    @property
    def list_url(self) -> str | None:
        """URL of the list that names the photos; None if their folder is listed."""
        return self.photo_list and absolute_url(self.photo_list, "--photo-list")

    def check_used(self, *, has_photos: bool) -> None:
        """Raise UserError if a flag is given and there are no photos that it could be about."""
        given = [name for name in vars(self) if getattr(self, name) != getattr(_DEFAULTS, name)]
        if given and not has_photos:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{flags}: how to read --photos, which is not given: name the photos, or leave it out")

    def source(self, url: str, *, with_identities: bool, identities_required: bool) -> Source:
        """Return the photos at a URL. Without `with_identities`, those of the photos' own files are not read.

        Raises:
            UserError: there is nothing that can be read.
        """
        columns = PhotoColumns(
            image=self.image_column,
            identity=self.identity_column if with_identities else None,
            photo=self.photo_column,
        )
        if self.list_url is not None:
            return PhotoList(url, columns, list_url=self.list_url)
        return open_source(
            url, photos_format=self.photos_format, columns=columns, identities_required=identities_required
        )

    def crops(self, alignment: Alignment) -> AlignedCrops | None:
        """Return how aligned crops become faces of this alignment; None if faces are detected.

        If the crops are said to be aligned otherwise, they keep their own template.
        """
        if self.aligned is None:
            return None
        template = ARCFACE if self.aligned == ARCFACE else EYES
        if alignment.template != template:
            size = ARCFACE_SIDE if self.aligned == ARCFACE else Alignment().image_size
            alignment = replace(alignment, template=template, image_size=size)
        return AlignedCrops(template=self.aligned, alignment=alignment, verify=self.verify)


_DEFAULTS = PhotoFlags()
