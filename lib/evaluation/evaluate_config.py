"""The flags of the evaluate job."""

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro

from lib import cluster
from lib.config import default_data_url
from lib.errors import UserError
from lib.evaluation.set_figures import Protocol
from lib.evaluation.verification_sets import is_verification_set, set_name
from lib.faces import table
from lib.faces.face_filter import FaceFilter, face_filter
from lib.faces.photo_flags import PhotoFlags
from lib.recognition.embedder import FlipFlag, chosen_flip
from lib.recognition.onnx_model import OnnxInput


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure how well a model tells people apart."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Model folder, run folder, .onnx file or weights of iResNet. Give it twice to compare two. Default: the only run
    below --data."""
    faces: str | None = None
    """Faces table. Default: faces/ below --data."""
    photos: str | None = None
    """Raw photos instead of a faces table, in any format that preprocess takes. They are aligned as each model needs
    it."""
    identities: str | None = None
    """File of lines "photo-name identity" for --photos. Default: identities.txt beside the photos, else their
    folders."""
    pairs: tuple[str, ...] = ()
    """Pairs to judge: .txt as LFW, CALFW, CPLFW and AgeDB-30 have them, a folder FF or FP of CFP, or .csv or .parquet
    with photo_a, photo_b, same. Several give one table. Or verification sets (lfw.bin cfp_fp.bin), which hold their own
    faces. Default: made from --split."""
    ijb: str | None = None
    """Folder of IJB-B or IJB-C, which holds meta/ and loose_crop/: verification and identification by templates, on its
    own images."""
    protocol: Protocol = "ours"
    """With --pairs and --ijb: ours, with intervals, or insightface, as published figures are made (implies --flip)."""
    flip: FlipFlag = False
    """Add the embedding of the mirror image, even if the model does not. With --keep-threshold the model then does so,
    too."""
    no_flip: FlipFlag = False
    """Leave mirror images out, even if the model adds them."""
    split: str = "test"
    """Without --pairs: split whose photos make the pairs: train, val, test, or all."""
    num_pairs: int = 6_000
    """Without --pairs: number of pairs, in 10 folds that share no person."""
    whole_split: bool = False
    """Without --pairs: embed all photos of the split, not only those in pairs. The original project's protocol,
    identification and the search for suspects then cover all of them."""
    seed: int = 0
    """Seed of the pairs and of the bootstrap."""
    min_quality: float = 0.0
    """Measure on faces of at least this quality, 0 to 1. Pairs with another face are left out."""
    where: str = ""
    """Measure on faces within ranges of the columns eye_distance, sharpness, brightness, contrast, yaw, pitch, roll and
    quality, such as yaw=-30:30,sharpness=50:. A range may leave out one end."""
    tolerance: float | None = None
    """Threshold for the table of the original project. Default: the model's threshold, else the best one."""
    slices: str | None = None
    """CSV file with the columns photo and attribute. Each attribute gets metrics of its own."""
    output: str | None = None
    """Folder for the report. Default: report/ in the model's run, or report/ below --data."""
    at_far: float | None = None
    """Choose the threshold for this share of false accepts, such as 1e-4, instead of for the highest accuracy."""
    keep_threshold: bool = False
    """Replace the threshold of an earlier evaluation in the model. A model without one always gets it."""
    detector_weights: str | None = None
    """With --photos: weights file of the detector, if the model's faces were made with one."""
    split_seed: int = 0
    """With --photos: seed of the split of identities into train, val and test."""
    gpus: cluster.Gpus = "auto"
    """GPUs to embed on. auto: all of the cluster. 0: none."""
    strict: bool = False
    """Stop if the faces were made with other settings than a model's training faces. Without it the job warns."""
    dry_run: bool = False
    """Check models, photos and pairs and print the plan, then stop."""
    reading: Annotated[PhotoFlags, tyro.conf.arg(name="")] = field(default_factory=PhotoFlags)
    onnx: Annotated[OnnxInput, tyro.conf.arg(name="")] = field(default_factory=OnnxInput)

    def __post_init__(self) -> None:
        if len(self.model) > 2:
            raise UserError(f"--model is given {len(self.model)} times: one model, or two side by side")
        if self.faces is not None and self.photos is not None:
            raise UserError("--faces and --photos are both given: choose one")
        self.reading.check_used(has_photos=self.photos is not None)
        self._check_ijb()
        self._check_pairs()
        if self.split not in (*table.SPLITS, "all"):
            raise UserError(f"--split is {self.split!r}: allowed are {', '.join(table.SPLITS)} and all")
        if self.tolerance is not None and not 0 <= self.tolerance < np.inf:
            raise UserError(f"--tolerance is {self.tolerance}: a distance, 0 or more")
        if self.at_far is not None and not 0 < self.at_far < 1:
            raise UserError(f"--at-far is {self.at_far}: a share between 0 and 1, such as 1e-4")
        if self.taken and self.photos is not None:
            raise UserError("--min-quality and --where look at the columns of a faces table: leave --photos out")
        if self.whole_split and self.pairs:
            raise UserError("--whole-split is for pairs that are made of a split: leave it or --pairs out")
        cluster.check_gpus(self.gpus)
        _ = self.chosen_flip
        for flag, value in (("--seed", self.seed), ("--split-seed", self.split_seed)):
            if value < 0:
                raise UserError(f"{flag} is {value}: 0 or more")

    def _check_ijb(self) -> None:
        """Refuse flags that have no meaning with --ijb."""
        if self.ijb is None:
            return
        for flag, given in (
            ("--pairs", bool(self.pairs)),
            ("--faces", self.faces is not None),
            ("--whole-split", self.whole_split),
            *self._of_photos(),
        ):
            if given:
                raise UserError(f"{flag} means nothing for --ijb, which has images and pairs of its own: leave it out")

    def _of_photos(self) -> list[tuple[str, bool]]:
        """Return the flags about the user's own table or photos, and whether each is given."""
        return [
            ("--photos", self.photos is not None),
            ("--slices", self.slices is not None),
            ("--min-quality or --where", bool(self.min_quality or self.where)),
            ("--tolerance", self.tolerance is not None),
            ("--at-far", self.at_far is not None),
            ("--keep-threshold", self.keep_threshold),
        ]

    def _check_pairs(self) -> None:
        """Check --pairs, and refuse flags that have no meaning with them."""
        sets = [is_verification_set(url) for url in self.pairs]
        if any(sets) and not all(sets):
            raise UserError(f"--pairs names {len(sets)} files: lists of pairs only, or verification sets (.bin) only")
        if self.protocol != "ours" and not self.pairs and self.ijb is None:
            raise UserError("--protocol insightface is for --pairs and --ijb: leave it out")
        for flag, given in self._of_photos():
            if given and any(sets):
                raise UserError(f"{flag} means nothing for verification sets (.bin): leave it out")
            if given and self.has_lists and flag not in ("--photos", "--min-quality or --where"):
                raise UserError(f"{flag} is for one list of pairs and --protocol ours: leave it out")
        names = [set_name(url) for url in self.pairs if any(sets)]
        if len(set(names)) < len(names):
            raise UserError(
                f"--pairs names two sets that are called {max(names, key=names.count)!r}: rename one of them"
            )

    @property
    def chosen_flip(self) -> bool | None:
        """Whether to add mirror images. None leaves it to each model."""
        return chosen_flip(self.flip or (self.protocol == "insightface" and not self.no_flip), self.no_flip)

    @property
    def has_sets(self) -> bool:
        """Whether --pairs names verification sets."""
        return bool(self.pairs) and is_verification_set(self.pairs[0])

    @property
    def has_lists(self) -> bool:
        """Whether --pairs names lists that are reported in one table, as verification sets are."""
        return bool(self.pairs) and not self.has_sets and (len(self.pairs) > 1 or self.protocol != "ours")

    @property
    def taken(self) -> FaceFilter:
        """The faces to measure on."""
        return face_filter(self.min_quality, self.where)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose photos are used: all of them when --pairs names the photos."""
        return table.SPLITS if self.pairs or self.split == "all" else (self.split,)
