"""The pipeline job: runs preprocess, train and evaluate; each continues where it stopped."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lib import cluster, storage
from lib.config import default_data_url
from lib.errors import UserError
from lib.evaluation.evaluate_job import KEPT_FIGURES, EvaluateConfig, evaluate
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.preprocess_job import preprocess
from lib.layout import Layout
from lib.parts import SUCCESS_NAME
from lib.recognition.model import SPEC_NAME
from lib.training.history import MODEL_FOLDER
from lib.training.settings import GROUP_OF, TrainConfig
from lib.training.tracking import about_run, add_evaluation
from lib.training.train_job import train
from lib.tuning.winner import train_defaults

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Run preprocess, train and evaluate. The flags of each job follow its name, such as --train.epochs."""

    PREFIXED: ClassVar[bool] = True
    RENAMED_FLAGS: ClassVar[Mapping[str, str]] = {
        f"--train.{off}{name.replace('_', '-')}": f"--train.{group}.{off}{name.replace('_', '-')}"
        for name, group in GROUP_OF.items()
        for off in ("", "no-")
    }
    """Settings of training had no groups before version 0.2."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    dry_run: bool = False
    """Check what can be checked now and print the plans, then stop."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        for name in ("preprocess", "train", "evaluate"):
            part = getattr(self, name)
            if part.data != default_data_url() or part.dry_run:
                raise UserError(f"--{name}.data and --{name}.dry-run: give --data and --dry-run once, for all three")
        if self.train.faces is not None or self.evaluate.faces is not None:
            raise UserError("--train.faces and --evaluate.faces: give --preprocess.faces, which the others use too")
        if self.evaluate.ijb is not None:
            raise UserError("--evaluate.ijb: run jobs/evaluate.py --ijb on the model once the pipeline has made it")
        if self.evaluate.model:
            raise UserError(
                "--evaluate.model: the pipeline evaluates the model it trains; use jobs/evaluate.py for others"
            )

    def parts(self) -> tuple[PreprocessConfig, TrainConfig, EvaluateConfig]:
        """Return the configurations of the three jobs, each taking up what the one before has made."""
        shared: dict[str, Any] = {"data": Layout(self.data).url, "dry_run": self.dry_run}
        first = dataclasses.replace(self.preprocess, **shared)
        then = dataclasses.replace(self.train, **shared, faces=first.faces_url)
        faces = None if self.evaluate.photos is not None else first.faces_url
        last = dataclasses.replace(self.evaluate, **shared, faces=faces, model=(then.run_url,))
        return first, then, last


def pipeline_defaults(flags: Sequence[str]) -> PipelineConfig:
    """Return what holds where no flag says otherwise: the winner's settings after `--train.from-sweep`."""
    own = [flag.replace("--train.run.from", "--from", 1) for flag in flags]
    return PipelineConfig(train=train_defaults(own))


def pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Run the three jobs and return their results, with the metrics of the report."""
    started = time.monotonic()
    first, then, last = config.parts()
    if config.dry_run:
        return {"job": "pipeline", "dry_run": True, **_plans(first, then, last)}
    with cluster.connected():
        made: dict[str, Any] = {}
        for number, (name, job) in enumerate(
            (
                ("preprocess", lambda: preprocess(first)),
                ("train", lambda: train(then)),
                ("evaluate", lambda: evaluate(last)),
            ),
            start=1,
        ):
            logger.info("%d of 3: %s", number, name)
            made[name] = job()
        about = about_run(then.name, then.run_url, {})
        add_evaluation(then.run.track, about, {name: made["evaluate"][name] for name in KEPT_FIGURES})
    return {
        "job": "pipeline",
        "model": made["train"]["model"],
        "report": made["evaluate"]["report"],
        **{name: made["evaluate"][name] for name in KEPT_FIGURES},
        **made,
        "seconds": round(time.monotonic() - started, 1),
    }


def _plans(first: PreprocessConfig, then: TrainConfig, last: EvaluateConfig) -> dict[str, Any]:
    """Return the plans of the jobs whose input already exists."""
    plans = {"preprocess": preprocess(first)}
    if storage.exists(storage.join(first.faces_url, SUCCESS_NAME)):
        plans["train"] = train(then)
    if storage.exists(storage.join(then.run_url, MODEL_FOLDER, SPEC_NAME)):
        plans["evaluate"] = evaluate(last)
    return plans
