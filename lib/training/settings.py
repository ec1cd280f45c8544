"""The flags of training, what they may be, and which of them make a run another run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Self

from lib import storage
from lib.cluster import Compile, Gpus, Precision, check_gpus
from lib.config import absolute_url, default_data_url
from lib.errors import UserError
from lib.flags import check_values
from lib.layout import Layout
from lib.recognition.spec import INIT_NAMES
from lib.training.augmentation import Level

BatchKind = Literal["triplets", "identities"]
BatchLossName = Literal["softmax", "semihard"]
BatchNorm = Literal["auto", "batch", "fixed"]
NegativePolicy = Literal["random", "hard", "semihard", "exact", "auto"]

FREE_SETTINGS = (
    *("data", "faces", "name", "workers", "gpus", "cache_dir", "loader_threads"),
    *("compile", "checkpoint_activations"),
    *("checkpoint_minutes", "max_failures", "wait_minutes", "dry_run", "from_sweep"),
)
"""What may differ when a run goes on: where it computes and reads, but not what it computes."""


USUAL_BATCH, LARGEST_BATCH = 96, 1024
"""Images of a batch that `--batch-size auto` takes on a CPU, and that it takes on a GPU at most."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model."""

    embedding_dim: int = 128
    """Length of an embedding."""
    head: str = ""
    """Widths of the layers between backbone and embedding, such as 256,128."""
    normalize: bool = True
    """Scale embeddings to length 1. With --no-normalize they are the raw output, as in the original project."""
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
    positive."""
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

    def __post_init__(self) -> None:
        check_values(
            ("photos-per-person", self.photos_per_person, "2 or more", self.photos_per_person >= 2),
            ("triplets-per-epoch", self.triplets_per_epoch, "1 or more, or 0", self.triplets_per_epoch >= 0),
            ("accumulate", self.accumulate, "1 or more", self.accumulate >= 1),
            ("photos-limit", self.photos_limit, "1 or more, or 0", self.photos_limit >= 0),
        )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss."""

    loss: BatchLossName = "softmax"
    """Loss of --batch identities. softmax: each positive against all negatives. semihard: triplets whose negative is
    farther than the positive, but by less than --margin."""
    temperature: float = 0.1
    """Temperature of --loss softmax. A lower value puts more weight on the nearest negatives."""
    margin: float = 0.2
    """Distance by which a negative has to be farther than the positive."""
    squared: bool = False
    """Use squared distances in the loss, as the FaceNet paper does."""

    def __post_init__(self) -> None:
        check_values(
            ("temperature", self.temperature, "above 0", self.temperature > 0),
            ("margin", self.margin, "above 0", self.margin > 0),
        )


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
    val_pairs: int = 20_000
    """Number of validation pairs. TAR at FAR 1e-3 needs 20,000."""
    val_triplets: int = 5000
    """Number of validation triplets."""

    def __post_init__(self) -> None:
        check_values(
            ("patience", self.patience, "1 or more", self.patience >= 1),
            ("stop-after", self.stop_after, "0 or more", self.stop_after >= 0),
            ("val-photos", self.val_photos, "8 or more", self.val_photos >= 8),
            ("val-pairs", self.val_pairs, "20 or more", self.val_pairs >= 20),
            ("val-triplets", self.val_triplets, "1 or more", self.val_triplets >= 1),
        )


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
    cache_dir: str = ""
    """Folder on each node for its copy of the crops. Default: conv-facenet-<user id>/ in the temporary folder."""
    from_sweep: str = ""
    """Folder of a sweep. Its winner's settings become the defaults; flags you give still win."""

    def __post_init__(self) -> None:
        check_values(
            ("wait-minutes", self.wait_minutes, "0 or more", self.wait_minutes >= 0),
            ("checkpoint-minutes", self.checkpoint_minutes, "above 0", self.checkpoint_minutes > 0),
            ("max-failures", self.max_failures, "0 or more", self.max_failures >= 0),
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a face embedding on aligned faces."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    faces: str | None = None
    """Faces table to train on. Default: faces/ below --data."""
    name: str = "default"
    """Name of the run. Its folder is runs/NAME/ below --data."""
    backbone: str = "convnext_tiny"
    """Any backbone of timm."""
    init: str = "auto"
    """Initial weights: a run or model folder, a .safetensors or .pth file, hub, efficientnet-lite0, none, or auto."""
    epochs: int = 30
    """Number of epochs."""
    batch_size: Literal["auto"] | int = 96
    """Images per batch and worker; three make a triplet. auto: as many as fit into the GPU's memory, at most 1,024; 96
    on a CPU."""
    lr: float | None = None
    """Peak learning rate of AdamW. Default: 1e-4 for pretrained backbones without BatchNorm, such as ConvNeXt and ViT;
    9e-4 for all others."""
    workers: tuple[int, ...] = ()
    """N, or MIN MAX to grow and shrink with the cluster. Default: one per GPU, or one per node without GPUs."""
    gpus: Gpus = "auto"
    """GPUs to train on, one worker each. auto: all of the cluster, or its CPUs if it has none. 0: the CPUs."""
    dry_run: bool = False
    """Check the input and print the plan, then stop."""

    model: ModelSettings = ModelSettings()
    sampling: SamplingSettings = SamplingSettings()
    objective: LossSettings = LossSettings()
    mining: MiningSettings = MiningSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validation: ValidationSettings = ValidationSettings()
    run: RunSettings = RunSettings()

    def __post_init__(self) -> None:
        check_values(
            ("name", self.name, "a name without / and not beginning with a dot", _is_name(self.name)),
            ("epochs", self.epochs, "1 or more", self.epochs >= 1),
            ("lr", self.lr, "above 0", self.lr is None or self.lr > 0),
            ("workers", self.workers, "N, or MIN MAX with 1 <= MIN <= MAX", _is_range(self.workers)),
        )
        if self.batch_size != "auto" and self.batch_size < self.smallest_batch:
            raise UserError(
                f"--batch-size {self.batch_size} is too small: two triplets (6 images), or two people "
                f"({self.smallest_batch} images with --photos-per-person {self.sampling.photos_per_person}) are needed"
            )
        if self.sampling.batch == "identities" and self.mining.negatives in ("semihard", "exact"):
            raise UserError(
                f"--negatives {self.mining.negatives} chooses one negative for each pair, as --batch triplets does; "
                "--batch identities uses every triplet of a batch, and hard fills it with confusable people"
            )
        check_gpus(self.gpus)
        if self.gpus != "auto" and self.gpus and self.workers and self.workers[-1] > self.gpus:
            raise UserError(
                f"--workers {self.workers[-1]} with --gpus {self.gpus}: each worker has a GPU of its own, so ask for "
                "as many, or leave --gpus out"
            )
        if self.run.deterministic and (self.gpus not in ("auto", 0) or self.workers not in ((), (1,), (1, 1))):
            raise UserError("--deterministic is for one worker on the CPU: leave out --gpus and --workers")

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Return the settings with these values, by the names of their flags; the rest have their defaults."""
        return cls().replaced(**settings)

    def replaced(self, **settings: Any) -> Self:
        """Return the settings with other values, by the names of their flags."""
        own = {name: value for name, value in settings.items() if name not in GROUP_OF}
        grouped: dict[str, dict[str, Any]] = {}
        for name in settings.keys() & GROUP_OF.keys():
            grouped.setdefault(GROUP_OF[name], {})[name] = settings[name]
        return replace(
            self, **own, **{group: replace(getattr(self, group), **values) for group, values in grouped.items()}
        )

    def flat(self) -> dict[str, Any]:
        """Return all values by the names of their flags, as `config.json` holds them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for group in dict.fromkeys(GROUP_OF.values()):
            values |= asdict(values.pop(group))
        return values

    @property
    def smallest_batch(self) -> int:
        """Images without which a batch has no negative: two triplets, or two people."""
        return 6 if self.sampling.batch == "triplets" else 2 * self.sampling.photos_per_person

    def with_batch_of(self, num_images: int | None) -> "TrainConfig":
        """Return the settings with a number in the place of `auto`: what fits into memory, None where nobody asked."""
        if num_images is None:
            return replace(self, batch_size=USUAL_BATCH)
        whole = 3 if self.sampling.batch == "triplets" else self.sampling.photos_per_person
        num_images = min(num_images, LARGEST_BATCH) // whole * whole
        if num_images < self.smallest_batch:
            raise UserError(
                "the GPU's memory holds no batch of this model: take --checkpoint-activations, a smaller --backbone or "
                "a smaller --image-size"
            )
        return replace(self, batch_size=num_images)

    def people_per_batch(self, num_pairable: int) -> int:
        """Return P of `--batch identities`, where so many people have two photos or more."""
        assert self.batch_size != "auto"
        return min(self.batch_size // self.sampling.photos_per_person, num_pairable)

    def anchors_per_step(self, num_pairable: int) -> int:
        """Return the anchors of one step of one worker."""
        assert self.batch_size != "auto"
        if self.sampling.batch == "triplets":
            return self.batch_size // 3
        return self.people_per_batch(num_pairable) * self.sampling.photos_per_person

    def loss_settings(self) -> dict[str, str | float]:
        """Return the settings that the loss goes by."""
        if self.sampling.batch == "identities" and self.objective.loss == "softmax":
            return {"loss": self.objective.loss, "temperature": self.objective.temperature}
        loss = "semihard" if self.sampling.batch == "identities" else "triplet margin"
        return {"loss": loss, "margin": self.objective.margin}

    @property
    def faces_url(self) -> str:
        """Where the faces are."""
        return Layout(self.data).faces(self.faces)

    @property
    def run_url(self) -> str:
        """Where the run goes."""
        return storage.join(Layout(self.data).runs(), self.name)

    def with_absolute_paths(self) -> "TrainConfig":
        """Return the same settings with absolute paths: workers have other working directories."""
        return self.replaced(
            data=Layout(self.data).url,
            faces=self.faces_url,
            init=self.init if self.init in INIT_NAMES else absolute_url(self.init, "--init"),
            cache_dir=self.run.cache_dir and absolute_url(self.run.cache_dir, "--cache-dir"),
        )

    def content(self, faces: dict[str, Any]) -> dict[str, Any]:
        """Return what `config.json` holds: every setting that decides the result, and the faces' own run."""
        decisive = {name: value for name, value in self.flat().items() if name not in FREE_SETTINGS}
        decisive["init"] = storage.redacted(self.init)
        return {**decisive, "faces_run_id": faces["run_id"], "fingerprint": faces["fingerprint"]}


GROUP_OF: Mapping[str, str] = {
    setting.name: group.name
    for group in fields(TrainConfig)
    if is_dataclass(group.default)
    for setting in fields(group.default)
}
"""The group of each setting that is in one."""


def _is_name(name: str) -> bool:
    return bool(name) and "/" not in name and "\\" not in name and not name.startswith(".")


def _is_range(workers: tuple[int, ...]) -> bool:
    return len(workers) <= 2 and all(n >= 1 for n in workers) and list(workers) == sorted(workers)
