"""The configuration of a run: its flags, which of them go together, and which decide its result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Self, get_type_hints

import tyro

from lib import storage
from lib.cluster import Gpus, check_gpus
from lib.config import absolute_url, default_data_url
from lib.errors import UserError
from lib.flags import check_values
from lib.layout import Layout
from lib.recognition.spec import INIT_NAMES
from lib.training.flag_groups import (
    LossSettings,
    MiningSettings,
    ModelSettings,
    NegativePolicy,
    OptimizerSettings,
    RunSettings,
    SamplingSettings,
    ValidationSettings,
)
from lib.training.triplets import PhotoIndex

HIDDEN = ("given", "staged")
"""Fields that are not flags."""

FREE_SETTINGS = (
    *("data", "faces", "name", "workers", "gpus", "cache_dir", "loader_threads"),
    *("compile", "checkpoint_activations"),
    *("checkpoint_minutes", "max_failures", "wait_minutes", "dry_run", "from_sweep", "track"),
)
"""Settings that may differ when a run is resumed: where it computes and reads, but not what it computes."""


USUAL_BATCH, LARGEST_BATCH = 96, 1024
"""Images of a batch with `--batch-size auto`: on a CPU, and at most on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Epochs of a recipe with settings of their own."""

    first_epoch: int
    settings: Mapping[str, Any]
    """By the names of their flags."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The stages of `--recipe`."""

    name: str
    reason: str
    """What is done, and why, in one line."""
    stages: tuple[Stage, ...]


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
    recipe: Literal["none", "auto", "fine-tune", "centers"] = "none"
    """Stages of the training; flags that you give hold in all of them. fine-tune: the head learns first, then all
    weights, by the softmax of a batch. centers: arcface first, then the softmax. auto: by the number of people and
    photos and the initial weights. none: one stage, of the flags alone."""
    dry_run: bool = False
    """Check the input and print the plan, then stop."""
    given: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = ()
    """Names of the flags of the user, which a recipe does not change."""
    staged: tyro.conf.Suppress[tyro.conf.Fixed[Recipe | None]] = None
    """The stages of the recipe, once the faces are known."""

    model: ModelSettings = field(default_factory=ModelSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    objective: LossSettings = field(default_factory=LossSettings)
    mining: MiningSettings = field(default_factory=MiningSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    run: RunSettings = field(default_factory=RunSettings)

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
        self._check_loss()
        if self.sampling.batch == "identities" and self.mining.negatives in ("semihard", "exact"):
            raise UserError(
                f"--negatives {self.mining.negatives} chooses one negative for each pair, as --batch triplets does; "
                "--batch identities uses every triplet of a batch, and hard fills it with confusable people"
            )
        if self.run.cache_size and self.mining.negatives == "exact":
            raise UserError(
                "--negatives exact finds the nearest of all photos, and a node with --cache-size holds some: take hard"
            )
        check_gpus(self.gpus)
        if self.gpus != "auto" and self.gpus and self.workers and self.workers[-1] > self.gpus:
            raise UserError(
                f"--workers {self.workers[-1]} with --gpus {self.gpus}: each worker has a GPU of its own, so ask for "
                "as many, or leave --gpus out"
            )
        if self.run.deterministic and (self.gpus not in ("auto", 0) or self.workers not in ((), (1,), (1, 1))):
            raise UserError("--deterministic is for one worker on the CPU: leave out --gpus and --workers")

    def _check_loss(self) -> None:
        """Refuse a loss that the batch cannot have."""
        loss, batch, terms = self.objective.loss, self.sampling.batch, self.objective.terms
        if terms.batch is not None and terms.batch.name == "triplet" and batch != "triplets":
            raise UserError(f"--loss {loss}: triplet is the loss of --batch triplets: add that, or take softmax")
        if batch == "photos" and (terms.centre is None or terms.batch is not None):
            raise UserError(
                f"--batch photos with --loss {loss}: photos in random order hold hardly a pair of one person: take a "
                "loss over centres alone, such as arcface, or --batch identities"
            )
        if batch == "photos" and self.mining.negatives not in ("auto", "random"):
            raise UserError(f"--negatives {self.mining.negatives}: --batch photos has no negatives to choose")
        if terms.centre is None and (self.objective.sub_centers, self.objective.sample_rate) != (1, 1.0):
            raise UserError(f"--sub-centers and --sample-rate are for losses over centres, and --loss is {loss}")

    @property
    def negatives(self) -> NegativePolicy:
        """How negatives are chosen: `--negatives`, or random if the batch has none."""
        return "random" if self.sampling.batch == "photos" else self.mining.negatives

    @property
    def needs_pairs(self) -> bool:
        """Whether the loss needs identities of two photos."""
        return self.objective.terms.batch is not None

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Return the settings with these values, by the names of their flags; the rest have their defaults."""
        return cls().replaced(**settings)

    def replaced(self, **settings: Any) -> Self:
        """Return the settings with some other values, by the names of their flags."""
        own = {name: value for name, value in settings.items() if name not in GROUP_OF}
        grouped: dict[str, dict[str, Any]] = {}
        for name in settings.keys() & GROUP_OF.keys():
            grouped.setdefault(GROUP_OF[name], {})[name] = settings[name]
        return replace(
            self, **own, **{group: replace(getattr(self, group), **values) for group, values in grouped.items()}
        )

    def flat(self) -> dict[str, Any]:
        """Return all values by the names of their flags, as in `config.json`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in HIDDEN}
        for group in dict.fromkeys(GROUP_OF.values()):
            values |= asdict(values.pop(group))
        return values

    @property
    def smallest_batch(self) -> int:
        """Smallest batch with a negative, in images: two triplets, or two people."""
        if self.sampling.batch == "photos":
            return 2
        return 6 if self.sampling.batch == "triplets" else 2 * self.sampling.photos_per_person

    def with_batch_of(self, num_images: int | None) -> "TrainConfig":
        """Return the settings with a number instead of `auto`: what fits into memory, None if there is no GPU."""
        if num_images is None:
            return replace(self, batch_size=USUAL_BATCH)
        whole = {"triplets": 3, "photos": 1}.get(self.sampling.batch, self.sampling.photos_per_person)
        num_images = min(num_images, LARGEST_BATCH) // whole * whole
        if num_images < self.smallest_batch:
            raise UserError(
                "the GPU's memory holds no batch of this model: take --checkpoint-activations, a smaller --backbone or "
                "a smaller --image-size"
            )
        return replace(self, batch_size=num_images)

    @property
    def photos_of_singles(self) -> int:
        """Number of single photos that take the place of one person in a batch; 0 leaves them out."""
        return self.sampling.photos_per_person if self.objective.terms.centre is not None else 0

    def fills_batches_with_confusable_people(self, negatives: str) -> bool:
        """Return whether people whom the model confuses fill a part of each batch, with these negatives."""
        is_hard = negatives == "hard" and self.sampling.batch == "identities"
        return is_hard and bool(self.mining.confusable_share)

    def people_per_batch(self, index: PhotoIndex) -> int:
        """Return P of `--batch identities`."""
        assert self.batch_size != "auto"
        return min(self.batch_size // self.sampling.photos_per_person, index.num_places(self.photos_of_singles))

    def anchors_per_step(self, index: PhotoIndex) -> int:
        """Return the anchors of one step of one worker."""
        assert self.batch_size != "auto"
        if self.sampling.batch == "triplets":
            return self.batch_size // 3
        if self.sampling.batch == "photos":
            return min(self.batch_size, int(index.usable_N.sum()))
        return self.people_per_batch(index) * self.sampling.photos_per_person

    def loss_settings(self) -> dict[str, str | float]:
        """Return the settings of the loss."""
        objective, terms = self.objective, self.objective.terms
        settings: dict[str, str | float] = {"loss": objective.loss}
        if self.sampling.batch == "triplets" and terms.batch is not None:
            settings["loss"] = "triplet margin" if terms.centre is None else f"{terms.centre.name} and triplet margin"
        if terms.batch is not None:
            is_softmax = terms.batch.name == "softmax" and self.sampling.batch != "triplets"
            settings |= {"temperature": objective.temperature} if is_softmax else {"margin": objective.margin}
        if terms.centre is not None:
            settings |= {"center margin": objective.margin_of_centres, "scale": objective.scale}
            settings |= {"sub-centers": objective.sub_centers, "sample rate": objective.sample_rate}
        return settings

    @property
    def faces_url(self) -> str:
        """URL of the faces table."""
        return Layout(self.data).faces(self.faces)

    @property
    def run_url(self) -> str:
        """URL of the run's folder."""
        return storage.join(Layout(self.data).runs(), self.name)

    def with_absolute_paths(self) -> "TrainConfig":
        """Return the same settings with absolute paths: workers have other working directories."""
        return self.replaced(
            data=Layout(self.data).url,
            faces=self.faces_url,
            init=self.init if self.init in INIT_NAMES else absolute_url(self.init, "--init"),
            cache_dir=self.run.cache_dir and absolute_url(self.run.cache_dir, "--cache-dir"),
            val_faces=self.validation.val_faces and absolute_url(self.validation.val_faces, "--val-faces"),
            val_pairs=self._absolute_pairs(),
        )

    def _absolute_pairs(self) -> int | tuple[str, ...]:
        files = self.validation.pair_files
        if not files:
            return self.validation.num_pairs
        return (str(self.validation.num_pairs), *(absolute_url(url, "--val-pairs") for url in files))

    def content(self, faces: dict[str, Any]) -> dict[str, Any]:
        """Return the content of `config.json`: all settings that decide the result, and the version of the faces."""
        decisive = {name: value for name, value in self.flat().items() if name not in FREE_SETTINGS}
        decisive["init"] = storage.redacted(self.init)
        decisive["val_faces"] = self.validation.val_faces and storage.redacted(self.validation.val_faces)
        if self.validation.pair_files:
            decisive["val_pairs"] = [self.validation.num_pairs, *map(storage.redacted, self.validation.pair_files)]
        if self.staged is not None:
            decisive["recipe_reason"] = self.staged.reason
            decisive["stages"] = [asdict(stage) for stage in self.staged.stages]
        return {**decisive, "faces_run_id": faces["run_id"], "fingerprint": faces["fingerprint"]}


GROUP_OF: Mapping[str, str] = {
    setting.name: group
    for group, kind in get_type_hints(TrainConfig).items()
    if is_dataclass(kind)
    for setting in fields(kind)
}
"""The group of each setting that is in one."""


def _is_name(name: str) -> bool:
    return bool(name) and "/" not in name and "\\" not in name and not name.startswith(".")


def _is_range(workers: tuple[int, ...]) -> bool:
    return len(workers) <= 2 and all(n >= 1 for n in workers) and list(workers) == sorted(workers)
