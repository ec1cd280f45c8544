"""Which recipe learns most in ten minutes of two cores? Unseen people are told apart; all recipes get the same time.

The yardstick is the best of pytorch-metric-learning: its own miner and loss on 16 people x 4 photos. All start from the
same ImageNet weights and see the people of `lfw/` in $BENCH_DATA who are not in folds 1 and 2 of its pairs; judged are
those folds' pairs, 6,000 pairs drawn of the same folds' people, and 6,000 of the people of `celeba/`.

The clock of a shared machine would favour whoever ran at a quiet moment. So the seconds of a step are measured first,
all recipes in turns, and give each recipe its number of steps in that time. Prints Markdown rows and, last, a line of
JSON; curves go to `training_recipes.png`. Run it as `python -m bench.training_recipes` (an hour or more a seed).
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.inputs import bench_data, run_job
from lib.errors import UserError
from lib.evaluation.metrics import kfold_accuracy, pair_distances, verification_figures
from lib.evaluation.pair_files import read_pairs
from lib.evaluation.pairs import Pairs, made_pairs
from lib.faces.table import SPLITS
from lib.recognition.initial_weights import initial_model
from lib.recognition.model import EmbeddingModel, ModelSpec, embed, normalized_images
from lib.training.augmentation import Level
from lib.training.cache_building import build_cache
from lib.training.face_cache import FaceCache
from lib.training.freezing import fix_statistics, freeze_stages
from lib.training.loading import BatchLoader, LoadTask, Prefetcher
from lib.training.losses import batch_softmax_loss
from lib.training.schedule import learning_rate
from lib.training.triplets import IdentityBatchSampler, PhotoIndex

IMAGE_SIZE = 112
NUM_THREADS = 2
NUM_HELD_FOLDS = 2
NUM_MADE_PAIRS = 6_000
NUM_POINTS = 6
"""Points of a curve."""
NUM_TIMED_STEPS = 5
NUM_RESAMPLES = 2_000

BatchMean = Callable[[Tensor, Tensor], Tensor]


def library_semihard() -> BatchMean:
    """Return pytorch-metric-learning's semi-hard triplet loss."""
    miner, loss = TripletMarginMiner(margin=0.2, type_of_triplets="semihard"), TripletMarginLoss(margin=0.2)
    return lambda embeddings_ND, labels_N: loss(embeddings_ND, labels_N, miner(embeddings_ND, labels_N))


def softmax() -> BatchMean:
    """Return the softmax over the batch's negatives."""
    return lambda embeddings_ND, labels_N: batch_softmax_loss(embeddings_ND, labels_N, temperature=0.1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an arm trains."""

    loss: Callable[[], BatchMean]
    people: int = 16
    photos: int = 4
    lr: float = 3e-4
    cosine: bool = False
    """Warm-up over 5 % and a fall to zero, rather than a constant rate."""
    ema: float = 0.0
    level: Level = "original"
    fixed_statistics: bool = False
    """BatchNorm goes by the statistics that came with the weights."""
    frozen_stages: int = 0


AVERAGED: dict[str, Any] = {"cosine": True, "ema": 0.99, "level": "strong"}
SOFTMAX: dict[str, Any] = {"loss": softmax, "people": 24, "lr": 9e-4, **AVERAGED}
RECIPES = {
    "pytorch-metric-learning, semi-hard": Recipe(loss=library_semihard),
    "the same, fixed statistics": Recipe(loss=library_semihard, fixed_statistics=True),
    "softmax, averaged, cosine, strong": Recipe(**SOFTMAX),
    "the same softmax, fixed statistics": Recipe(**SOFTMAX, fixed_statistics=True),
    "the same softmax, fixed statistics, three frozen stages": Recipe(
        **SOFTMAX, fixed_statistics=True, frozen_stages=3
    ),
}


class Data(NamedTuple):
    """Who is trained on and who is judged."""

    cache: FaceCache
    photos: PhotoIndex
    """Of the people who are not held out."""
    judged: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], Pairs]]
    """Name of a set of pairs -> crops, the person of each, and the pairs."""


def read_data(real: Path, scratch: Path) -> Data:
    """Align the faces, and part the people of LFW."""
    caches = {}
    for name in ("lfw", "celeba"):
        run_job("preprocess.py", "--data", str(real / name), "--faces", str(scratch / name))
        caches[name] = FaceCache(build_cache(str(scratch / name), SPLITS, str(scratch / "cache" / name)))
    lfw = caches["lfw"]
    pairs = read_pairs(str(real / "lfw" / "pairs.txt"), lfw.photos.to_pylist())
    kept_P = pairs.fold_P < NUM_HELD_FOLDS
    a_P, b_P = pairs.a_P[kept_P], pairs.b_P[kept_P]
    is_held_N = np.isin(lfw.labels_N, lfw.labels_N[np.concatenate([a_P, b_P])])
    held_rows = np.flatnonzero(is_held_N)
    place_N = np.cumsum(is_held_N) - 1
    folds = Pairs(a_P=place_N[a_P], b_P=place_N[b_P], same_P=pairs.same_P[kept_P], fold_P=pairs.fold_P[kept_P])
    held_crops, _ = lfw.decode(held_rows, size=IMAGE_SIZE)
    held_labels = lfw.labels_N[held_rows]
    celeba = caches["celeba"]
    celeba_crops, _ = celeba.decode(np.arange(len(celeba)), size=IMAGE_SIZE)
    return Data(
        cache=lfw,
        photos=PhotoIndex(lfw.labels_N, excluded_rows=held_rows.tolist()),
        judged={
            "LFW folds 1-2": (held_crops, held_labels, folds),
            "LFW people of folds 1-2": (held_crops, held_labels, drawn_pairs(lfw, held_rows)),
            "CelebA": (celeba_crops, celeba.labels_N, drawn_pairs(celeba, np.arange(len(celeba)))),
        },
    )


def drawn_pairs(cache: FaceCache, rows: npt.NDArray[np.integer]) -> Pairs:
    """Return pairs of these rows, as places among them."""
    photos = [cache.photos[row].as_py() for row in rows.tolist()]
    return made_pairs(
        photos, [cache.identities[label] for label in cache.labels_N[rows]], num_pairs=NUM_MADE_PAIRS, seed=0
    )


class Arm:
    """A model in training by a recipe."""

    def __init__(self, recipe: Recipe, data: Data, seed: int) -> None:
        torch.manual_seed(seed)
        spec = ModelSpec(backbone="tf_efficientnet_lite0", image_size=IMAGE_SIZE)
        self.model = initial_model(spec, "efficientnet-lite0").to(memory_format=torch.channels_last)
        freeze_stages(self.model, recipe.frozen_stages)
        self.averaged = AveragedModel(self.model, use_buffers=True) if recipe.ema else None
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=recipe.lr, weight_decay=0.01)
        self._recipe, self._data, self._seed = recipe, data, seed
        self._loss = recipe.loss()
        self._loader = BatchLoader(cache=data.cache, size=IMAGE_SIZE, level=recipe.level, seed=seed, epoch=0)
        self._num_steps = 0

    def batches(self, num_steps: int) -> Iterator[LoadTask]:
        """Yield the photos of each step."""
        recipe = self._recipe
        sampler = IdentityBatchSampler(
            index=self._data.photos, num_people=recipe.people, num_photos=recipe.photos, seed=self._seed
        )
        for step, rows in enumerate(sampler.batches(0, num_steps)):
            yield LoadTask(rows=rows, first_draw=step * rows.size)

    def load(self, task: LoadTask) -> tuple[Tensor, Tensor]:
        """Return images and labels."""
        batch = self._loader(task)
        labels = np.where(batch.failed, -1, self._data.cache.labels_N[batch.rows.ravel()]).astype(np.int64)
        return normalized_images(torch.from_numpy(batch.images), self.model.spec), torch.from_numpy(labels)

    def step(self, images_NCHW: Tensor, labels_N: Tensor, progress: float) -> None:
        """Make a step at `progress`, 0 to 1."""
        recipe = self._recipe
        if recipe.cosine:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(recipe.lr, progress, 0.05)
        self.model.train()
        if recipe.fixed_statistics:
            fix_statistics(self.model)
        loss = self._loss(self.model(images_NCHW), labels_N)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._num_steps += 1
        if self.averaged is not None:
            # The average forgets its first weights soon, as in lib/training/loop.py.
            decay = min(recipe.ema, self._num_steps / (9 + self._num_steps))
            self.averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
            self.averaged.update_parameters(self.model)

    @property
    def judged_model(self) -> EmbeddingModel:
        """The model that is used in the end."""
        return self.model if self.averaged is None else self.averaged.module  # type: ignore[return-value]


def step_seconds(recipes: dict[str, Recipe], data: Data) -> dict[str, float]:
    """Return the median seconds of a step, loading included, of each recipe, all taking turns."""
    arms = {name: Arm(recipe, data, seed=0) for name, recipe in recipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for turn in range(NUM_TIMED_STEPS + 1):
        for name, arm in arms.items():
            began = time.perf_counter()
            # Loading has a thread of its own in training, yet on as many cores as this.
            for task in arm.batches(1):
                arm.step(*arm.load(task), progress=0.5)
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


class Result(NamedTuple):
    """What a seed of an arm came to."""

    figures: dict[str, dict[str, Any]]
    right: dict[str, npt.NDArray[np.bool_]]
    """Whether each pair was judged rightly."""
    curve: list[tuple[float, dict[str, float]]]
    """Share of the time, and the accuracies."""


def judge(model: EmbeddingModel, data: Data) -> tuple[dict[str, dict[str, Any]], dict[str, npt.NDArray[np.bool_]]]:
    """Return the figures of each set of pairs, and which pairs were judged rightly."""
    figures, right, embedded = {}, {}, {}
    for name, (crops, _, pairs) in data.judged.items():
        if id(crops) not in embedded:
            embedded[id(crops)] = embed(model, crops)
        distances_P = pair_distances(embedded[id(crops)], pairs.a_P, pairs.b_P)
        figures[name] = verification_figures(distances_P, pairs)
        right[name] = kfold_accuracy(distances_P, pairs.same_P, pairs.fold_P).right_P
    return figures, right


def train(recipe: Recipe, data: Data, num_steps: int, seed: int) -> Result:
    """Train and judge; the time for judging is nobody's."""
    arm = Arm(recipe, data, seed)
    marks = {math.ceil(num_steps * (point + 1) / NUM_POINTS) for point in range(NUM_POINTS)}
    curve = []
    with Prefetcher(arm.load, arm.batches(num_steps), num_threads=1, num_ahead=3) as batches:
        for step, (images_NCHW, labels_N) in enumerate(batches, start=1):
            arm.step(images_NCHW, labels_N, (step - 1) / num_steps)
            if step in marks:
                figures, right = judge(arm.judged_model, data)
                curve.append((step / num_steps, {name: figure["accuracy"] for name, figure in figures.items()}))
    return Result(figures, right, curve)


def standard_error(values_P: npt.NDArray[np.floating], labels_N: npt.NDArray[np.integer], pairs: Pairs) -> float:
    """Return the standard error of the mean of a figure of each pair under another draw of people.

    People are drawn, not pairs, as in `lib.evaluation.metrics.bootstrap_intervals`.
    """
    person_2P = np.unique(labels_N[np.stack([pairs.a_P, pairs.b_P])], return_inverse=True)[1].reshape(2, -1)
    num_people = person_2P.max() + 1
    rng = np.random.default_rng(0)
    means = []
    for _ in range(NUM_RESAMPLES):
        times_I = np.bincount(rng.integers(num_people, size=num_people), minlength=num_people)
        weights_P = times_I[person_2P[0]] * np.where(pairs.same_P, 1, times_I[person_2P[1]])
        means.append((weights_P @ values_P) / weights_P.sum())
    return float(np.std(means))


def row(name: str, results: list[Result], yardstick: list[Result], data: Data) -> str:
    """Return an arm's Markdown row: each accuracy, the AUC, and how far it is ahead of the yardstick."""
    cells = [name, str(len(results))]
    for judged, (_, labels_N, pairs) in data.judged.items():
        right_P, base_P = (np.mean([r.right[judged] for r in group], axis=0) for group in (results, yardstick))
        auc = np.mean([result.figures[judged]["auc"] for result in results])
        cells.append(
            f"{100 * right_P.mean():.1f} ± {100 * standard_error(right_P, labels_N, pairs):.1f} ({100 * auc:.1f})"
        )
        difference_P = right_P - base_P
        cells.append(
            f"{100 * difference_P.mean():+.1f} ± {100 * standard_error(difference_P, labels_N, pairs):.1f}"
            if results is not yardstick
            else ""
        )
    return "| " + " | ".join(cells) + " |"


def draw_curves(results: dict[str, list[Result]], minutes: float, path: Path) -> None:
    """Draw accuracy over time, a panel for each set of pairs, the mean of the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    sets = list(next(iter(results.values()))[0].figures)
    figure, panels = pyplot.subplots(1, len(sets), figsize=(5 * len(sets), 4.5), layout="constrained")
    for judged, panel in zip(sets, panels, strict=True):
        for name, seeds in results.items():
            shares = [share for share, _ in seeds[0].curve]
            means = np.mean([[point[judged] for _, point in seed.curve] for seed in seeds], axis=0)
            panel.plot(minutes * np.array(shares), 100 * means, marker="o", markersize=3, label=name)
        panel.set(title=judged, xlabel="minutes", ylabel="accuracy, %")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train all arms and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for each arm and seed")
    parser.add_argument("--yardstick-steps", type=int, help="its steps in that time, for a machine that is busy now")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="train recipes with this in their names")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each arm")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the curves")
    flags = parser.parse_args()
    real = bench_data()
    if real is None:
        raise UserError("BENCH_DATA names no folder of real photos (celeba/ and lfw/): drawn people are too easy")
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        data = read_data(real, Path(scratch))
        yardstick, *others = RECIPES
        others = [name for name in others if not flags.only or any(part in name for part in flags.only)]
        recipes = {name: RECIPES[name] for name in (yardstick, *others)}
        seconds = step_seconds(recipes, data)
        time_s = 60 * flags.minutes
        if flags.yardstick_steps:
            time_s = flags.yardstick_steps * seconds[yardstick]
        results: dict[str, list[Result]] = {name: [] for name in recipes}
        for seed in range(flags.seeds):
            for name, recipe in recipes.items():
                num_steps = max(1, round(time_s / seconds[name]))
                results[name].append(train(recipe, data, num_steps, seed))
                accuracies = {judged: round(f["accuracy"], 4) for judged, f in results[name][-1].figures.items()}
                print(f"seed {seed}, {name}: {num_steps} steps, {accuracies}", flush=True)
    print("| recipe | seeds | " + " | ".join(f"{judged}, % (AUC) | ahead by" for judged in data.judged) + " |")
    print("| --- " * (2 + 2 * len(data.judged)) + "|")
    for name, seeds in results.items():
        print(row(name, seeds, results[yardstick], data))
    draw_curves(results, flags.minutes, flags.out / "training_recipes.png")
    print(
        json.dumps(
            {
                "bench": "training_recipes",
                "step_s": {name: round(value, 3) for name, value in seconds.items()},
                "recipes": {
                    name: {
                        **{key: value for key, value in dataclasses.asdict(RECIPES[name]).items() if key != "loss"},
                        "accuracy": [{k: round(f["accuracy"], 4) for k, f in seed.figures.items()} for seed in seeds],
                    }
                    for name, seeds in results.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
