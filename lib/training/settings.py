"""The flags of training, what they may be, and which of them make a run another run."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lib import storage
from lib.cluster import Gpus, check_gpus
from lib.config import absolute_url, default_data_url
from lib.device import Compile, Precision
from lib.errors import UserError
from lib.recognition.weights import INIT_NAMES
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
class TrainConfig:
    """Fit a face embedding to aligned faces by triplet loss."""

    data: str = field(default_factory=default_data_url)
    """Where everything lives: a folder or URL such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    faces: str | None = None
    """The faces table that preprocess made. Default: faces/ below --data."""
    name: str = "default"
    """Name of the run; it lives in runs/NAME/ below --data."""
    from_sweep: str = ""
    """A sweep's folder: the winner's settings take the place of the defaults; flags beside it count more."""
    photos_limit: int = 0
    """Train on whole people, chosen by a hash of their names, of so many photos at most; 0 takes all."""

    backbone: str = "convnext_tiny"
    """Any timm model."""
    init: str = "auto"
    """Where the weights start: a run or model folder, .safetensors or .pth, hub, efficientnet-lite0, none, or auto."""
    embedding_dim: int = 128
    """Length of an embedding."""
    head: str = ""
    """Widths of layers between the pooled features and the embedding, such as 256,128."""
    normalize: bool = True
    """Embeddings of length 1; --no-normalize gives the head's raw vectors, as the original project had them."""
    image_size: int = 0
    """Side of the model's input in pixels; 0 takes that of the faces."""

    batch: BatchKind = "identities"
    """identities: P people x K photos, every triplet of them. triplets: one negative chosen for each pair."""
    loss: BatchLossName = "softmax"
    """Of --batch identities. softmax: each pair against all negatives at once. semihard: --margin, over the triplets
    whose negative is farther than the positive by less. --batch triplets has --margin."""
    temperature: float = 0.1
    """Of --loss softmax: the lower, the more the nearest negatives count."""
    negatives: NegativePolicy = "auto"
    """Where negatives come from. auto: random until the validation loss stops falling, then hard."""
    candidates: int = 2000
    """Random photos of other people of which hard and semihard take the nearest."""
    ceiling: float | None = None
    """Cosine similarity above which a mined negative is taken for a wrong label: skipped, named in suspects.parquet."""
    photos_per_person: int = 4
    """K of --batch identities."""
    confusable_share: float = 0.75
    """--batch identities, hard: share of a batch's people that are near to the others by their stored features."""
    stored_negatives: int = 0
    """--batch identities, hard: this many stored features of other photos join each step as negatives."""
    refresh_fraction: float = 0.1
    """Photos whose stored feature is computed again after an epoch, as a share of all."""

    epochs: int = 30
    """Epochs in all."""
    triplets_per_epoch: int = 0
    """Anchors of an epoch, all workers together; 0 takes as many as there are training photos."""
    batch_size: Literal["auto"] | int = 96
    """Images of one batch of one worker: a third as many triplets, or P x K. auto: as many as the GPU's memory holds,
    1,024 at most; 96 on a CPU."""
    accumulate: int = 1
    """Batches of a worker that make one step: their gradients are averaged, each batch with its own negatives."""
    margin: float = 0.2
    """By how much a negative has to be farther than the positive."""
    squared: bool = False
    """Compare squared distances, as the FaceNet paper does."""
    lr: float = 9e-4
    """Highest learning rate, of AdamW: measured with efficientnet-lite0; others may want another, see jobs/sweep.py."""
    weight_decay: float = 0.01
    """Of weights; not of norms and biases."""
    warmup_share: float = 0.05
    """Share of the training in which the learning rate rises; then it falls to zero by a cosine."""
    clip_norm: float | None = None
    """Norm that gradients are scaled down to. Default: 5 for random weights, which learn sooner so; 100 for pretrained
    ones, which meets only a spike, for the gradients of --loss softmax have norms of 10 to 20."""
    ema: float = 0.99
    """Decay a step of the averaged weights that are validated and kept as the model; 0 keeps the latest weights."""
    batch_norm: BatchNorm = "auto"
    """What BatchNorm goes by: batch (the images of a step), fixed (the statistics that came with the weights), or auto:
    fixed where there are any. Few people a batch make their own statistics a clue that unseen photos lack."""
    frozen_stages: int = 0
    """So many first stages of the backbone, its stem being one, keep their initial weights: a step takes less time."""
    augment: Level = "strong"
    """none, original (flip, rotation, auto contrast), or strong (and crop, light, grey, blur, JPEG)."""

    best_by: Literal["accuracy", "auc", "loss"] = "accuracy"
    """Which validation figure makes an epoch the best; loss is the original project's rule."""
    patience: int = 3
    """Epochs without progress before negatives get harder, or before overfitting is told."""
    stop_after: int = 0
    """End after so many epochs without a better one; 0 never ends early."""
    val_photos: int = 4000
    """Photos of validation people that are looked at after each epoch, at most."""
    val_pairs: int = 20_000
    """Fixed pairs of them; TAR at FAR 1e-3 needs 20,000."""
    val_triplets: int = 5000
    """Fixed triplets of them."""

    workers: tuple[int, ...] = ()
    """N, or MIN MAX to grow and shrink with the cluster. Default: one a GPU, or one a node without GPUs."""
    wait_minutes: float = 0.0
    """How long to wait for a CPU or GPU for each of N (or MIN) workers, on a cluster that grows when it is asked to."""
    gpus: Gpus = "auto"
    """GPUs to train on, a worker each: auto takes all of the cluster, and its CPUs where it has none; 0 takes the
    CPUs."""
    precision: Precision = "auto"
    """bf16 computes the model in bfloat16 where that is safe; auto does so on GPUs that have it."""
    compile: Compile = "auto"
    """Build kernels for the model, which takes a minute and makes steps a quarter shorter; auto does so on GPUs where
    the run is long enough."""
    checkpoint_activations: bool = False
    """Compute activations again instead of keeping them: a step takes a third longer and much less memory."""
    loader_threads: int = 0
    """Threads of a worker that read crops, processes where it has a GPU; 0 takes the worker's CPUs, eight threads or
    sixteen processes at most."""
    cache_dir: str = ""
    """Folder on each node for a copy of the crops. Default: conv-facenet-<user id>/ in the temporary folder."""
    checkpoint_minutes: float = 10.0
    """A checkpoint is written after every epoch, and within an epoch this often."""
    max_failures: int = 5
    """How often workers may fail before the job does; a node that is taken away does not count."""
    deterministic: bool = False
    """One CPU worker, and two runs give the same history to the last digit."""
    seed: int = 0
    """Of every draw."""
    dry_run: bool = False
    """Check the input and print the plan, do nothing."""

    def __post_init__(self) -> None:
        for name, value, allowed, is_right in (
            ("name", self.name, "a name without / and not beginning with a dot", _is_name(self.name)),
            ("photos-limit", self.photos_limit, "1 or more, or 0", self.photos_limit >= 0),
            ("embedding-dim", self.embedding_dim, "1 or more", self.embedding_dim >= 1),
            ("candidates", self.candidates, "1 or more", self.candidates >= 1),
            ("ceiling", self.ceiling, "above 0, at most 1", self.ceiling is None or 0 < self.ceiling <= 1),
            ("photos-per-person", self.photos_per_person, "2 or more", self.photos_per_person >= 2),
            ("confusable-share", self.confusable_share, "0 up to, not with, 1", 0 <= self.confusable_share < 1),
            ("stored-negatives", self.stored_negatives, "0 or more", self.stored_negatives >= 0),
            ("refresh-fraction", self.refresh_fraction, "0 to 1", 0 <= self.refresh_fraction <= 1),
            ("epochs", self.epochs, "1 or more", self.epochs >= 1),
            ("triplets-per-epoch", self.triplets_per_epoch, "1 or more, or 0", self.triplets_per_epoch >= 0),
            ("accumulate", self.accumulate, "1 or more", self.accumulate >= 1),
            ("margin", self.margin, "above 0", self.margin > 0),
            ("temperature", self.temperature, "above 0", self.temperature > 0),
            ("lr", self.lr, "above 0", self.lr > 0),
            ("weight-decay", self.weight_decay, "0 or more", self.weight_decay >= 0),
            ("warmup-share", self.warmup_share, "0 up to, not with, 1", 0 <= self.warmup_share < 1),
            ("clip-norm", self.clip_norm, "above 0", self.clip_norm is None or self.clip_norm > 0),
            ("ema", self.ema, "0 up to, not with, 1", 0 <= self.ema < 1),
            ("frozen-stages", self.frozen_stages, "0 or more", self.frozen_stages >= 0),
            ("patience", self.patience, "1 or more", self.patience >= 1),
            ("stop-after", self.stop_after, "0 or more", self.stop_after >= 0),
            ("val-photos", self.val_photos, "8 or more", self.val_photos >= 8),
            ("val-pairs", self.val_pairs, "20 or more", self.val_pairs >= 20),
            ("val-triplets", self.val_triplets, "1 or more", self.val_triplets >= 1),
            ("workers", self.workers, "N, or MIN MAX with 1 <= MIN <= MAX", _is_range(self.workers)),
            ("wait-minutes", self.wait_minutes, "0 or more", self.wait_minutes >= 0),
            ("checkpoint-minutes", self.checkpoint_minutes, "above 0", self.checkpoint_minutes > 0),
            ("max-failures", self.max_failures, "0 or more", self.max_failures >= 0),
        ):
            if not is_right:
                raise UserError(f"--{name} is {value!r}: {allowed}")
        if self.batch_size != "auto" and self.batch_size < self.smallest_batch:
            raise UserError(
                f"--batch-size {self.batch_size} is too small: two triplets (6 images), or two people "
                f"({2 * self.photos_per_person} images with --photos-per-person {self.photos_per_person}) are needed"
            )
        if self.batch == "identities" and self.negatives in ("semihard", "exact"):
            raise UserError(
                f"--negatives {self.negatives} chooses one negative for each pair, as --batch triplets does; "
                "--batch identities uses every triplet of a batch, and hard fills it with confusable people"
            )
        check_gpus(self.gpus)
        if self.gpus != "auto" and self.gpus and self.workers and self.workers[-1] > self.gpus:
            raise UserError(
                f"--workers {self.workers[-1]} with --gpus {self.gpus}: each worker has a GPU of its own, so ask for "
                "as many, or leave --gpus out"
            )
        if self.deterministic and (self.gpus not in ("auto", 0) or self.workers not in ((), (1,), (1, 1))):
            raise UserError("--deterministic is for one worker on the CPU: leave out --gpus and --workers")
        _ = self.head_widths

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Widths of the head's layers, the embedding's own left out."""
        try:
            return tuple(int(width) for width in self.head.split(",") if width)
        except ValueError:
            raise UserError(f"--head is {self.head!r}: widths such as 256,128") from None

    @property
    def smallest_batch(self) -> int:
        """Images without which a batch has no negative: two triplets, or two people."""
        return 6 if self.batch == "triplets" else 2 * self.photos_per_person

    def with_batch_of(self, num_images: int | None) -> "TrainConfig":
        """Return the settings with a number in the place of `auto`: what fits into memory, None where nobody asked."""
        if num_images is None:
            return replace(self, batch_size=USUAL_BATCH)
        whole = 3 if self.batch == "triplets" else self.photos_per_person
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
        return min(self.batch_size // self.photos_per_person, num_pairable)

    def anchors_per_step(self, num_pairable: int) -> int:
        """Return the anchors of one step of one worker."""
        assert self.batch_size != "auto"
        if self.batch == "triplets":
            return self.batch_size // 3
        return self.people_per_batch(num_pairable) * self.photos_per_person

    def loss_settings(self) -> dict[str, str | float]:
        """Return the settings that the loss goes by."""
        if self.batch == "identities" and self.loss == "softmax":
            return {"loss": self.loss, "temperature": self.temperature}
        loss = "semihard" if self.batch == "identities" else "triplet margin"
        return {"loss": loss, "margin": self.margin}

    @property
    def faces_url(self) -> str:
        """Where the faces are."""
        if self.faces is not None:
            return absolute_url(self.faces, "--faces")
        return storage.join(absolute_url(self.data, "--data"), "faces")

    @property
    def run_url(self) -> str:
        """Where the run goes."""
        return storage.join(absolute_url(self.data, "--data"), "runs", self.name)

    def with_absolute_paths(self) -> "TrainConfig":
        """Return the same settings with absolute paths: workers have other working directories."""
        return replace(
            self,
            data=absolute_url(self.data, "--data"),
            faces=self.faces_url,
            init=self.init if self.init in INIT_NAMES else absolute_url(self.init, "--init"),
            cache_dir=self.cache_dir and absolute_url(self.cache_dir, "--cache-dir"),
        )

    def content(self, faces: dict[str, Any]) -> dict[str, Any]:
        """Return what `config.json` holds: every setting that decides the result, and the faces' own run."""
        decisive = {name: value for name, value in asdict(self).items() if name not in FREE_SETTINGS}
        decisive["init"] = storage.redacted(self.init)
        return {**decisive, "faces_run_id": faces["run_id"], "fingerprint": faces["fingerprint"]}


def _is_name(name: str) -> bool:
    return bool(name) and "/" not in name and "\\" not in name and not name.startswith(".")


def _is_range(workers: tuple[int, ...]) -> bool:
    return len(workers) <= 2 and all(n >= 1 for n in workers) and list(workers) == sorted(workers)
