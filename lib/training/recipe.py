"""`--recipe`: the losses of a run, in stages of whole epochs, chosen by its faces table and initial weights.

A stage depends on the epoch alone. At its end the workers load the checkpoint just written, as after a kill.
"""

from dataclasses import dataclass, replace
from typing import Any

from lib import storage
from lib.recognition.iresnet_names import LAYERS
from lib.recognition.spec import INIT_NAMES, NONE, WEIGHTS_SUFFIXES
from lib.training.checkpoints import Progress
from lib.training.settings import Recipe, Stage, TrainConfig

MANY_PEOPLE, MANY_PHOTOS = 1_000, 10.0
"""With so many identities, and photos of each on average, centres are learnt first. Class-centre losses are published
on larger sets, such as CASIA-WebFace (Yi et al. 2014: 10,575 people, 47 photos each). Not measured here."""

ALL_CENTRES = 100_000
"""Up to so many identities each step compares with all centres; above it with a tenth of them (An et al. 2022)."""

FROZEN_STAGES, FROZEN_SHARE = 3, 0.2
"""Frozen stages of the backbone while the head learns, and the share of the epochs for that."""
CENTRES_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class TableCounts:
    """Numbers of training photos and people."""

    photos: int
    people: int

    @property
    def each(self) -> float:
        """Photos a person."""
        return self.photos / max(self.people, 1)


def with_recipe(config: TrainConfig, counts: TableCounts) -> TrainConfig:
    """Return the settings with the stages of their recipe. Flags of the user hold in every stage."""
    name, why = str(config.recipe), "asked for"
    if name == "none":
        return config
    if name == "auto":
        name, why = _chosen(config, counts)
    stages = _fine_tuning(config.epochs) if name == "fine-tune" else _centres(config.epochs, counts)
    stages = tuple(
        replace(stage, settings={key: value for key, value in stage.settings.items() if key not in config.given})
        for stage in stages
    )
    merged = tuple(
        stage for place, stage in enumerate(stages) if not place or stage.settings != stages[place - 1].settings
    )
    return replace(config, staged=Recipe(name=name, reason=f"{name}: {why}; {_told(merged)}", stages=merged))


def _chosen(config: TrainConfig, counts: TableCounts) -> tuple[str, str]:
    table = f"{counts.people:,} people with {counts.each:.1f} photos each"
    is_of_faces = not config.init.endswith(WEIGHTS_SUFFIXES) or config.backbone in LAYERS
    if config.init not in INIT_NAMES and is_of_faces:
        return "fine-tune", f"{storage.redacted(config.init)} knows faces"
    if counts.people >= MANY_PEOPLE and counts.each >= MANY_PHOTOS:
        return "centers", f"{table} are many"
    weights = "no weights" if config.init == NONE else "pretrained weights where there are any"
    return "fine-tune", f"{table} are few ({MANY_PEOPLE:,} and {MANY_PHOTOS:.0f} are many), {weights}"


def _fine_tuning(epochs: int) -> tuple[Stage, ...]:
    first = round(FROZEN_SHARE * epochs)
    settings: dict[str, Any] = {"loss": "softmax", "batch": "identities"}
    after = Stage(first_epoch=first + 1, settings={**settings, "frozen_stages": 0})
    return (Stage(first_epoch=1, settings={**settings, "frozen_stages": FROZEN_STAGES}), after) if first else (after,)


def _centres(epochs: int, counts: TableCounts) -> tuple[Stage, ...]:
    first = max(1, round(CENTRES_SHARE * epochs))
    settings = {"loss": "arcface", "batch": "photos", "sample_rate": 1.0 if counts.people <= ALL_CENTRES else 0.1}
    stage = Stage(first_epoch=1, settings=settings)
    after = {"loss": "softmax", "batch": "identities", "sample_rate": 1.0}
    return (stage, Stage(first_epoch=first + 1, settings=after)) if first < epochs else (stage,)


def _told(stages: tuple[Stage, ...]) -> str:
    parts = []
    for stage in stages:
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in stage.settings.items())
        parts.append(f"from epoch {stage.first_epoch} {settings or 'the given flags'}")
    return "; ".join(parts)


def stage_of(config: TrainConfig, epoch: int) -> int:
    """Return the number of the stage that an epoch belongs to, from 0."""
    if config.staged is None:
        return 0
    return max(place for place, stage in enumerate(config.staged.stages) if stage.first_epoch <= epoch or not place)


def of_stage(config: TrainConfig, progress: Progress) -> TrainConfig:
    """Return the settings of the present stage of a run; without pretrained weights nothing is frozen."""
    if config.staged is None:
        return config
    settings = dict(config.staged.stages[stage_of(config, progress.epoch)].settings)
    if not progress.may_freeze:
        settings.pop("frozen_stages", None)
    return config.replaced(**settings)


def all_settings(config: TrainConfig) -> list[TrainConfig]:
    """Return the settings of every stage.

    Raises:
        UserError: flags of the user do not fit the settings of the recipe.
    """
    if config.staged is None:
        return [config]
    return [config.replaced(**stage.settings) for stage in config.staged.stages]
