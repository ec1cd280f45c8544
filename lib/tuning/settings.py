"""The flags of a sweep, and its trials: the same flags give the same trials in the same order."""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from lib import storage
from lib.errors import UserError
from lib.flags import check_values
from lib.layout import Layout
from lib.training.flag_groups import NegativePolicy
from lib.training.schedule import USUAL_LR
from lib.training.settings import TrainConfig

ORIGINAL_LIMIT = 25_000
"""Number of photos in the experiments of the original project."""

Words = tuple[str, ...]


def _yes_or_no(word: str) -> bool:
    if word not in ("yes", "no"):
        raise ValueError(word)
    return word == "yes"


def _policy(word: str) -> str:
    allowed = get_args(NegativePolicy)
    if word not in allowed:
        raise UserError(f"--policies has {word!r}: allowed are {', '.join(allowed)}")
    return word


SWEPT: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "backbone": ("backbones", str),
    "head": ("heads", str),
    "normalize": ("normalizations", _yes_or_no),
    "lr": ("lrs", float),
    "margin": ("margins", float),
    "negatives": ("policies", _policy),
    "candidates": ("candidate-counts", int),
}
"""The swept settings, each with the flag that lists its values and the function that reads one."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Train every combination of settings, stop the weak ones early, and compare the results.

    Several values are separated by commas. The results are in sweeps/NAME/ below --data. All flags of jobs/train.py
    work here too and apply to every trial.
    """

    backbones: Words = ()
    """Backbones of timm, such as convnext_tiny,efficientnet_b1. Default: --backbone."""
    heads: Words = ()
    """Layer widths up to the embedding, one word per head: 128 256,128. Default: --head and --embedding-dim."""
    normalizations: Words = ()
    """yes, no, or both: whether embeddings are scaled to length 1. Default: --normalize."""
    lrs: Words = ()
    """Peak learning rates. Default: --lr."""
    margins: Words = ()
    """Margins. Default: --margin."""
    policies: Words = ()
    """Ways to choose negatives. Default: --negatives."""
    candidate_counts: Words = ()
    """Numbers of candidates, for --batch triplets. Default: --candidates."""
    max_trials: int = 0
    """Train at most this many combinations, drawn by --seed; 0 trains all."""
    at_once: int = 0
    """Trials that run side by side; 0 means one per GPU, or one per 4 CPUs. More than the GPUs share them."""
    min_epochs: int = 0
    """Epochs that every trial gets before it can be stopped; 0 means an eighth of --epochs."""
    keep_one_in: int = 3
    """At the end of each stage, one in this many trials continues. The next stage is this many times as long."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig.of(epochs=10, photos_limit=ORIGINAL_LIMIT))

    def __post_init__(self) -> None:
        check_values(
            ("max-trials", self.max_trials, "1 or more, or 0", self.max_trials >= 0),
            ("at-once", self.at_once, "1 or more, or 0", self.at_once >= 0),
            ("min-epochs", self.min_epochs, f"0 to --epochs {self.train.epochs}", self.is_in_budget),
            ("keep-one-in", self.keep_one_in, "2 or more", self.keep_one_in >= 2),
            ("workers", self.train.workers, "1: a trial has one worker, and trials run side by side", self.is_single),
            ("recipe", self.train.recipe, "none: a sweep compares settings", self.train.recipe == "none"),
            ("from-sweep", self.train.run.from_sweep, "for jobs/train.py alone", not self.train.run.from_sweep),
        )

    @property
    def is_single(self) -> bool:
        """Whether each trial has one worker."""
        return self.train.workers in ((), (1,), (1, 1))

    @property
    def is_in_budget(self) -> bool:
        """Whether the first stage ends within a trial."""
        return 0 <= self.min_epochs <= self.train.epochs

    @property
    def first_stage(self) -> int:
        """Epochs that every trial gets."""
        return self.min_epochs or max(1, self.train.epochs // 8)

    @property
    def url(self) -> str:
        """Where the sweep lies."""
        return storage.join(Layout(self.train.data).sweeps(), self.train.name)

    def swept(self) -> dict[str, list[Any]]:
        """Return the values of each setting of a trial, by the names of `TrainConfig`.

        Raises:
            UserError: a value that cannot be read, or a setting given both for all trials and to be swept.
        """
        base, standard = self.train.flat(), TrainConfig().flat()
        swept: dict[str, list[Any]] = {}
        for name, (flag, read) in SWEPT.items():
            words: Words = getattr(self, flag.replace("-", "_"))
            given = words if flag == "heads" else [part for word in words for part in word.split(",")]
            if given and base[name] != standard[name]:
                raise UserError(f"--{flag} and --{name} are both given: name all values by --{flag}")
            try:
                values = [read(word.strip()) for word in given if word.strip()] or [base[name]]
            except ValueError:
                raise UserError(f"--{flag} is {','.join(given)}: values such as {standard[name] or USUAL_LR}") from None
            swept[name] = list(dict.fromkeys(values))
        if self.heads and base["embedding_dim"] != standard["embedding_dim"]:
            raise UserError("--heads and --embedding-dim are both given: the last width of a head is the embedding's")
        if len(swept["candidates"]) > 1 and base["batch"] != "triplets":
            raise UserError("--candidate-counts needs --batch triplets: add that, or leave --candidate-counts out")
        if len(swept["margin"]) > 1 and base["batch"] != "triplets" and "semihard" not in base["loss"]:
            raise UserError("--margins needs --loss semihard or --batch triplets: add one of them, or leave it out")
        return swept


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run of a sweep."""

    name: str
    config: TrainConfig
    settings: Mapping[str, Any]
    """The settings in which it differs from other trials, by flag name."""


def plan_trials(config: SweepConfig) -> list[Trial]:
    """Return the trials; the same flags give the same trials in the same order.

    Raises:
        UserError: invalid settings.
    """
    swept = config.swept()
    combinations = []
    for values in itertools.product(*swept.values()):
        settings = dict(zip(swept, values, strict=True))
        if settings["negatives"] in ("random", "exact"):
            settings["candidates"] = swept["candidates"][0]  # has no effect here
        if settings not in combinations:
            combinations.append(settings)
    if 0 < config.max_trials < len(combinations):
        rng = np.random.default_rng(config.train.run.seed)
        drawn = rng.choice(len(combinations), config.max_trials, replace=False)
        combinations = [combinations[n] for n in sorted(drawn)]
    varied = [name for name, values in swept.items() if len(values) > 1]
    trials = []
    for n, settings in enumerate(combinations, start=1):
        told = {name: settings[name] for name in varied}
        last_width = str(settings["head"]).rpartition(",")[2]
        dim = int(last_width) if config.heads and last_width.isdecimal() else config.train.model.embedding_dim
        trials.append(
            Trial(
                name=_trial_name(n, told),
                settings=told,
                config=config.train.replaced(
                    **{**settings, "embedding_dim": dim},
                    data=config.url,
                    faces=config.train.faces_url,
                    name=_trial_name(n, told),
                    workers=(1,),
                ),
            )
        )
    return trials


def _trial_name(number: int, settings: dict[str, Any]) -> str:
    labels = {"lr": "lr", "margin": "margin", "candidates": "of", "head": "head"}
    words = [f"{labels.get(name, '')}{value}" for name, value in settings.items() if name != "normalize"]
    if "normalize" in settings:
        words.append("normalized" if settings["normalize"] else "raw")
    return re.sub(r"[^\w.,-]+", "_", "-".join([f"{number:03d}", *words]))[:100]
