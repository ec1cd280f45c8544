"""`jobs/pipeline.py` as users run it, on faces that are there already, and killed between its parts."""

from dataclasses import replace
from pathlib import Path

import pytest

from lib.config import default_data_url
from lib.errors import UserError
from lib.evaluation.evaluate_job import EvaluateConfig
from lib.faces.preprocess_config import PreprocessConfig
from lib.flags import parsed
from lib.pipeline_job import PipelineConfig, pipeline_defaults
from lib.recognition.model import load_model
from lib.training.settings import TrainConfig
from tests.job_runner import RayHead, kill_session, run_here, run_job, start_job, wait_until

TINY = ["--train.backbone", "test_convnext", "--train.init", "none", "--train.model.embedding-dim", "16"]
TINY += [
    "--train.model.image-size",
    "64",
    "--train.epochs",
    "2",
    "--train.name",
    "a run é",
    "--evaluate.num-pairs",
    "200",
]
TINY += ["--evaluate.split", "all"]  # the drawn people are few


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_ends_with_the_figures_of_the_report_after_a_kill_too(
    head: RayHead, sample_data: Path, faces_url: str, tmp_path: Path, killed: bool
) -> None:
    flags = ["--data", str(tmp_path), "--preprocess.photos", str(sample_data / "photos"), *TINY]
    flags += ["--preprocess.identities", str(sample_data / "identities.txt"), "--preprocess.faces", faces_url]
    flags += ["--train.run.cache-dir", str(tmp_path / "the cache")]
    run = tmp_path / "runs" / "a run é"
    if killed:
        with start_job("pipeline.py", *flags, extra=head.environment) as job:
            try:
                wait_until(lambda: (run / "history.parquet").exists(), job, 200)
            finally:
                kill_session(job.pid)
    done = run_job("pipeline.py", *flags, extra=head.environment)
    assert done.status == 0, done.errors
    assert len(done.output.splitlines()) == 1
    result = done.result
    assert result["preprocess"]["photos_processed"] == 0
    assert result["train"]["epochs"] == 2
    assert result["model"] == str(run / "model")
    assert result["report"] == str(run / "report" / "report.html")
    assert Path(result["report"]).exists()
    assert result["accuracy"] == result["evaluate"]["accuracy"] > 0
    assert load_model(result["model"]).spec.metrics["accuracy"] == result["accuracy"]
    planned = run_here("pipeline.py", *flags, "--dry-run").result
    assert planned["preprocess"]["dry_run"]
    assert planned["evaluate"]["dry_run"]


def test_each_part_takes_up_what_the_one_before_has_made() -> None:
    config = PipelineConfig(data="/data", preprocess=PreprocessConfig(faces="/else/faces"), train=TrainConfig(name="b"))
    first, then, last = config.parts()
    assert first.photos_url == "/data/photos"
    assert then.faces_url == last.faces == "/else/faces"
    assert last.model == (then.run_url,) == ("/data/runs/b",)
    raw = PipelineConfig(data="/data", evaluate=EvaluateConfig(photos="/lfw", pairs=("/pairs.txt",)))
    assert raw.parts()[2].faces is None


@pytest.mark.parametrize("part", ["preprocess", "train", "evaluate"])
def test_what_holds_for_all_parts_is_said_once(part: str) -> None:
    kinds = {"preprocess": PreprocessConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
    for wrong in ({"data": default_data_url() + "/other"}, {"dry_run": True}):
        with pytest.raises(UserError, match=rf"--{part}.data and --{part}.dry-run"):
            PipelineConfig(**{part: kinds[part](**wrong)})


def test_a_sweep_is_looked_for_under_the_flag_of_the_training(tmp_path: Path) -> None:
    for flags in (["--train.run.from-sweep", str(tmp_path)], [f"--train.run.from-sweep={tmp_path}"]):
        with pytest.raises(UserError, match="holds no sweep"):
            pipeline_defaults(flags)
    defaults = pipeline_defaults(["--train.epochs", "3"])
    assert defaults.train.given == ("epochs",)
    assert replace(defaults, train=replace(defaults.train, given=())) == PipelineConfig()


@pytest.mark.parametrize("flag", ["--train.weight-decay", "--train.weight_decay", "--train.optimizer.weight-decay"])
def test_settings_of_training_are_found_with_and_without_their_group(flag: str) -> None:
    for words in ([flag, "0.5"], [f"{flag}=0.5"]):
        assert parsed(PipelineConfig, words).train.optimizer.weight_decay == 0.5
    assert not parsed(PipelineConfig, ["--train.no-normalize"]).train.model.normalize
