"""Groups of training flags: the docstring under a field is the help of its flag."""

from dataclasses import dataclass
from typing import Literal

from lib.cluster import Compile, Precision
from lib.errors import UserError
from lib.faces.face_filter import FaceFilter, face_filter
from lib.flags import check_values
from lib.training.augmentation import Level
from lib.training.loss_terms import CENTRE_MARGINS, LossTerms, loss_terms

BatchKind = Literal["triplets", "identities", "photos"]
FeaturePrecision = Literal["float32", "float16"]
BatchNorm = Literal["auto", "batch", "fixed"]
NegativePolicy = Literal["random", "hard", "semihard", "exact", "auto"]

DRAWN_PAIRS = 20_000


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model."""

    embedding_dim: int = 128
    """Length of an embedding."""
    head: str = ""
    """Widths of the layers between backbone and embedding, such as 256,128."""
    normalize: bool = True
    """Scale embeddings to length 1. With --no-normalize they are the raw output, as in the original project."""
    flip: bool = False
    """The finished model adds the embedding of the mirror image to that of a face and scales the sum to length 1: a
    little better, at twice the time. Validation and the threshold go by it, the steps of training do not."""
    image_size: int = 0
    """Side of the model's input, in pixels; 0 uses the size of the crops."""
    batch_norm: BatchNorm = "auto"
    """Statistics of BatchNorm. batch: those of each batch. fixed: those of the initial weights. auto: fixed if the
    initial weights have any."""
    frozen_stages: int = 0
    """Number of first stages of the backbone that keep their initial weights. The stem counts as one."""
    checkpoint_activations: bool = False
    """Recompute activations instead of keeping them. A step takes a third longer and much less memory."""

    def __post_init__(self) -> None:
        check_values(
            ("embedding-dim", self.embedding_dim, "1 or more", self.embedding_dim >= 1),
            ("flip", self.flip, "its vectors have length 1: leave out --no-normalize", self.normalize or not self.flip),
            ("frozen-stages", self.frozen_stages, "0 or more", self.frozen_stages >= 0),
        )
        _ = self.head_widths

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Widths of the head's layers, the embedding's own left out."""
        try:
            return tuple(int(width) for width in self.head.split(",") if width)
        except ValueError:
            raise UserError(f"--head is {self.head!r}: widths such as 256,128") from None


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What a batch and an epoch are made of."""

    batch: BatchKind = "identities"
    """identities: P people with K photos each, every triplet of them. triplets: one negative for each anchor and
    positive. photos: photos in random order, each once an epoch, for a --loss over centres alone."""
    photos_per_person: int = 4
    """Photos of each person in a batch: the K of --batch identities."""
    triplets_per_epoch: int = 0
    """Anchors per epoch, over all workers; 0 means one for each training photo."""
    accumulate: int = 1
    """Batches per step and worker. Their gradients are averaged; each batch keeps its own negatives."""
    augment: Level = "strong"
    """none; original: flip, rotation, auto contrast; strong: also crop, light, grey, blur, JPEG."""
    photos_limit: int = 0
    """Train on at most this many photos, of whole people chosen by a hash; 0 uses all."""
    min_quality: float = 0.0
    """Train on faces of at least this quality, 0 to 1. Validation keeps all faces, so that its figures compare."""
    where: str = ""
    """Train on faces within ranges of the columns eye_distance, sharpness, brightness, contrast, yaw, pitch, roll and
    quality, such as yaw=-30:30,sharpness=50: with one end or both."""

    def __post_init__(self) -> None:
        _ = self.faces
        check_values(
            ("photos-per-person", self.photos_per_person, "2 or more", self.photos_per_person >= 2),
            ("triplets-per-epoch", self.triplets_per_epoch, "1 or more, or 0", self.triplets_per_epoch >= 0),
            ("accumulate", self.accumulate, "1 or more", self.accumulate >= 1),
            ("photos-limit", self.photos_limit, "1 or more, or 0", self.photos_limit >= 0),
        )

    @property
    def faces(self) -> FaceFilter:
        """Which faces are trained on."""
        return face_filter(self.min_quality, self.where)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss."""

    loss: str = "softmax"
    """softmax: each positive of the batch against all its negatives. semihard: triplets whose negative is farther than
    the positive, but by less than --margin. triplet: the triplets of --batch triplets. arcface, cosface, adaface: each
    photo against a learnt centre of every identity. A sum, such as arcface+0.5*softmax, has one of each kind."""
    temperature: float = 0.1
    """Temperature of softmax. A lower value puts more weight on the nearest negatives."""
    margin: float = 0.2
    """Distance by which a negative has to be farther than the positive, for semihard and triplet."""
    squared: bool = False
    """Use squared distances in semihard and triplet, as the FaceNet paper does."""
    center_margin: float | None = None
    """Margin of the loss over centres. Default: 0.5 for arcface, 0.35 for cosface, 0.4 for adaface."""
    scale: float = 64.0
    """Scale of the cosines in the loss over centres."""
    sub_centers: int = 1
    """Centres of each identity. With 3, photos with a wrong label gather at a centre of their own."""
    sample_rate: float = 1.0
    """Share of the centres that a step compares with; those of the photos in the batch are always among them."""
    center_lr: float | None = None
    """Peak learning rate of the centres. Default: 10 times that of the model."""

    def __post_init__(self) -> None:
        margin = self.center_margin
        check_values(
            ("temperature", self.temperature, "above 0", self.temperature > 0),
            ("margin", self.margin, "above 0", self.margin > 0),
            ("center-margin", margin, "0 up to, not with, 1.5", margin is None or 0 <= margin < 1.5),
            ("scale", self.scale, "1 to 1000", 1 <= self.scale <= 1000),
            ("sub-centers", self.sub_centers, "1 or more", self.sub_centers >= 1),
            ("sample-rate", self.sample_rate, "above 0, at most 1", 0 < self.sample_rate <= 1),
            ("center-lr", self.center_lr, "above 0", self.center_lr is None or self.center_lr > 0),
        )
        _ = self.terms

    @property
    def terms(self) -> LossTerms:
        """The losses of the sum."""
        return loss_terms(self.loss)

    @property
    def margin_of_centres(self) -> float:
        """The margin of the loss over centres: what the user said, or that of its paper."""
        if self.center_margin is not None or self.terms.centre is None:
            return self.center_margin or 0.0
        return CENTRE_MARGINS[self.terms.centre.name]


@dataclass(frozen=True, kw_only=True)
class MiningSettings:
    """How negatives are found."""

    negatives: NegativePolicy = "auto"
    """How negatives are chosen. auto: random until the validation loss stops falling, then hard."""
    candidates: int = 2000
    """Number of random photos of other people from which hard and semihard take the nearest."""
    ceiling: float | None = None
    """Highest cosine similarity of a mined negative. A more similar one counts as a wrong label: it is skipped and
    listed in suspects.parquet. Default: no limit."""
    confusable_share: float = 0.75
    """For --batch identities with hard negatives: share of the people in a batch whom the model confuses."""
    stored_negatives: int = 0
    """For --batch identities with hard negatives: number of stored features that join each step as negatives."""
    refresh_fraction: float = 0.1
    """Share of the stored features that is computed again after each epoch."""
    feature_precision: FeaturePrecision = "float32"
    """Numbers of the stored features. float16 takes half the memory, and finds 99.9 % of the same nearest photos."""

    def __post_init__(self) -> None:
        check_values(
            ("candidates", self.candidates, "1 or more", self.candidates >= 1),
            ("ceiling", self.ceiling, "above 0, at most 1", self.ceiling is None or 0 < self.ceiling <= 1),
            ("confusable-share", self.confusable_share, "0 up to, not with, 1", 0 <= self.confusable_share < 1),
            ("stored-negatives", self.stored_negatives, "0 or more", self.stored_negatives >= 0),
            ("refresh-fraction", self.refresh_fraction, "0 to 1", 0 <= self.refresh_fraction <= 1),
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the weights move."""

    weight_decay: float = 0.01
    """Weight decay of AdamW. Norms and biases have none."""
    warmup_share: float = 0.05
    """Share of the training in which the learning rate rises. After that it falls to zero along a cosine."""
    clip_norm: float | None = None
    """Largest norm of the gradients; larger ones are scaled down. Default: 5 for random weights, 100 for pretrained
    ones."""
    ema: float = 0.99
    """Decay per step of the averaged weights, which become the model; 0 uses the latest weights."""

    def __post_init__(self) -> None:
        check_values(
            ("weight-decay", self.weight_decay, "0 or more", self.weight_decay >= 0),
            ("warmup-share", self.warmup_share, "0 up to, not with, 1", 0 <= self.warmup_share < 1),
            ("clip-norm", self.clip_norm, "above 0", self.clip_norm is None or self.clip_norm > 0),
            ("ema", self.ema, "0 up to, not with, 1", 0 <= self.ema < 1),
        )


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """How an epoch is judged, and when training ends."""

    best_by: Literal["accuracy", "auc", "loss"] = "accuracy"
    """Validation metric that chooses the best epoch. The original project used loss."""
    patience: int = 3
    """Epochs without progress before the negatives get harder, or before the log warns of overfitting."""
    stop_after: int = 0
    """Stop after this many epochs without a better one; 0 never stops early."""
    val_photos: int = 4000
    """Largest number of validation photos after each epoch."""
    val_pairs: int | tuple[str, ...] = DRAWN_PAIRS
    """Number of pairs drawn from validation people; TAR at FAR 1e-3 needs 20,000. And files of pairs, each of which
    gets an accuracy in every epoch: .txt in LFW's format, .csv or .parquet with photo_a, photo_b, same, or a .bin of
    InsightFace."""
    val_faces: str | None = None
    """Faces table of validation: its photos are in the files of --val-pairs, and without a file, or where --faces has
    no split val, its people are the validation people. Default: the splits val and test of --faces."""
    val_triplets: int = 5000
    """Number of validation triplets."""

    def __post_init__(self) -> None:
        check_values(
            ("patience", self.patience, "1 or more", self.patience >= 1),
            ("stop-after", self.stop_after, "0 or more", self.stop_after >= 0),
            ("val-photos", self.val_photos, "8 or more", self.val_photos >= 8),
            ("val-pairs", self.val_pairs, "a number, 20 or more, one or more files, or both", self._are_pairs()),
            ("val-triplets", self.val_triplets, "1 or more", self.val_triplets >= 1),
        )

    def _are_pairs(self) -> bool:
        given = (str(self.val_pairs),) if isinstance(self.val_pairs, int) else self.val_pairs
        numbers = [word for word in given if _is_number(word)]
        return bool(given) and all(given) and len(numbers) <= 1 and all(int(number) >= 20 for number in numbers)

    @property
    def num_pairs(self) -> int:
        """Pairs to draw from the validation people."""
        if isinstance(self.val_pairs, int):
            return self.val_pairs
        return next((int(word) for word in self.val_pairs if _is_number(word)), DRAWN_PAIRS)

    @property
    def pair_files(self) -> tuple[str, ...]:
        """URLs of the files of pairs."""
        given = () if isinstance(self.val_pairs, int) else self.val_pairs
        return tuple(word for word in given if not _is_number(word))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How and where the run computes."""

    precision: Precision = "auto"
    """auto: bf16 on GPUs that have it, else fp32."""
    compile: Compile = "auto"
    """Compile the model: a minute at the start, then steps take a quarter less time. auto: on GPUs, for runs that are
    long enough."""
    deterministic: bool = False
    """Two runs give the same history to the last digit. Needs one worker on the CPU."""
    seed: int = 0
    """Seed of every random choice."""
    wait_minutes: float = 0.0
    """Minutes to wait for the CPU or GPU of each worker, on a cluster that adds nodes on demand."""
    checkpoint_minutes: float = 10.0
    """Longest time between two checkpoints, in minutes. Each epoch ends with one too."""
    max_failures: int = 5
    """Worker failures that a job survives. Nodes that are taken away do not count."""
    loader_threads: int = 0
    """Threads per worker that read crops; processes on a GPU. 0: the worker's CPUs, at most 8 threads or 16
    processes."""
    track: tuple[str, ...] = ()
    """Services that get settings and figures beside TensorBoard: mlflow:URI (a server or a folder), wandb,
    wandb:PROJECT."""
    cache_dir: str = ""
    """Folder on each node for its copy of the crops. Default: conv-facenet-<user id>/ in $NODE_SCRATCH, else in the
    temporary folder (in /tmp in a Slurm job)."""
    cache_size: float = 0.0
    """Largest copy of the training crops on a node, in GB. If they are more, a node holds other people in each epoch,
    and an epoch trains on the people that the nodes hold. 0: all crops on each node."""
    from_sweep: str = ""
    """Folder of a sweep. Its winner's settings become the defaults; flags you give still win."""

    def __post_init__(self) -> None:
        check_values(
            ("wait-minutes", self.wait_minutes, "0 or more", self.wait_minutes >= 0),
            ("checkpoint-minutes", self.checkpoint_minutes, "above 0", self.checkpoint_minutes > 0),
            ("cache-size", self.cache_size, "above 0, or 0", self.cache_size >= 0),
            ("max-failures", self.max_failures, "0 or more", self.max_failures >= 0),
        )


def _is_number(word: str) -> bool:
    return word.lstrip("-").isdigit()
