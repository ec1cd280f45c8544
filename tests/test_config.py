import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lib.config import absolute_url, default_data_url, in_submitted_job, run_job
from lib.errors import JobError, UserError
from tests.job_runner import environment


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of a job."""

    photos: str = "photos"
    """Where the photos are."""
    image_size: int = 240
    """Side of a crop."""
    dry_run: bool = False
    """Only look."""

    def __post_init__(self) -> None:
        if self.image_size < 16:
            raise UserError(f"--image-size is {self.image_size}: allowed is 16 or more")


Job = Callable[[Config], Mapping[str, Any]]


def run(monkeypatch: pytest.MonkeyPatch, job: Job, *flags: str) -> Any:
    """Return the exit status of a job run with flags."""
    monkeypatch.setattr(sys, "argv", ["jobs/job.py", *flags])
    with pytest.raises(SystemExit) as ended:
        run_job(Config, job, description="What the job does.")
    return ended.value.code


def fails_with(error: BaseException) -> Job:
    def job(_: Config) -> Mapping[str, Any]:
        raise error

    return job


def test_the_result_is_the_only_line_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(config: Config) -> Mapping[str, Any]:
        return {"photos": config.photos, "image_size": config.image_size, "dry_run": config.dry_run}

    status = run(monkeypatch, job, "--photos", "mes photos\nd'été", "--image-size", "112", "--dry-run")
    output = capsys.readouterr().out
    assert status == 0
    assert output.count("\n") == 1
    assert json.loads(output) == {"photos": "mes photos\nd'été", "image_size": 112, "dry_run": True}


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--photos is wrong: put it right"), 2, "error: --photos is wrong: put it right\n"),
        (JobError("the disk is full"), 1, "failed: the disk is full\n"),
        (KeyboardInterrupt(), 1, "interrupted: the same command goes on from here\n"),
    ],
)
def test_expected_ends_are_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    assert run(monkeypatch, fails_with(error)) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_is_asked_to_stop_says_that_it_goes_on_and_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def job(_: Config) -> Mapping[str, Any]:
        try:
            os.kill(os.getpid(), number)
        except Exception:  # noqa: BLE001 - as a library would that takes everything for its own error
            return {}
        return {}

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        assert run(monkeypatch, job) == 75
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err.endswith("the same command goes on from here\n")


def test_our_own_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, fails_with(ZeroDivisionError("a bug"))) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" in captured.err
    assert "ZeroDivisionError: a bug" in captured.err


def test_a_value_that_the_config_refuses_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, fails_with(AssertionError("never reached")), "--image-size", "3") == 2
    captured = capsys.readouterr()
    assert "--image-size is 3: allowed is 16 or more" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("flags", [["--fotos", "x"], ["--image-size", "large"], ["stray"], ["--photos"]])
def test_flags_that_cannot_be_parsed_are_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert run(monkeypatch, fails_with(AssertionError("never reached")), *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert flags[0].lstrip("-") in captured.err
    assert "Traceback" not in captured.err


def test_defaults_that_follow_from_a_flag_give_way_to_other_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def defaults(flags: Sequence[str]) -> Config:
        return Config(photos="from the flags", image_size=112) if "--dry-run" in flags else Config()

    for flags, expected in (
        (["--dry-run"], ("from the flags", 112)),
        (["--dry-run", "--image-size", "240"], ("from the flags", 240)),
        ([], ("photos", 240)),
    ):
        monkeypatch.setattr(sys, "argv", ["jobs/job.py", *flags])
        with pytest.raises(SystemExit) as ended:
            run_job(
                Config,
                lambda config: {"photos": config.photos, "image_size": config.image_size},
                description="",
                defaults=defaults,
            )
        assert ended.value.code == 0
        assert tuple(json.loads(capsys.readouterr().out).values()) == expected


def test_help_tells_what_the_job_and_each_flag_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, fails_with(AssertionError("never reached")), "--help") == 0
    output = capsys.readouterr().out
    for words in ("What the job does.", "--photos", "Where the photos are.", "--image-size", "240"):
        assert words in output


def test_data_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_URL", "s3://bucket/folder")
    assert default_data_url() == "s3://bucket/folder"
    monkeypatch.setenv("DATA_URL", "")
    assert default_data_url() == "./data"
    monkeypatch.delenv("DATA_URL")
    assert default_data_url() == "./data"


@pytest.mark.parametrize("url", ["s3://bucket/a b", "gs://bucket", "file:///data/photos", "memory://x"])
def test_a_url_with_a_scheme_stays_as_it_is(url: str) -> None:
    assert absolute_url(url, "--data") == url


def test_a_local_path_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute_url("./mes données", "--data") == str(tmp_path / "mes données")
    assert absolute_url("a/../b/", "--data") == str(tmp_path / "b")
    assert absolute_url("~/photos", "--data") == str(tmp_path / "home" / "photos")
    assert absolute_url("/data//x", "--data") == "/data/x"


def test_a_submitted_job_refuses_what_would_vanish_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unpacked = tmp_path / "_ray_pkg_0123456789abcdef"
    unpacked.mkdir()
    monkeypatch.chdir(unpacked)
    assert in_submitted_job()
    for path in ("./data", "data", "../data"):
        with pytest.raises(
            UserError, match=r"--faces is the relative path .* set DATA_URL .* absolute path or to a URL"
        ):
            absolute_url(path, "--faces")
    assert absolute_url("/data", "--faces") == "/data"
    assert absolute_url("s3://bucket/data", "--faces") == "s3://bucket/data"
    monkeypatch.chdir(tmp_path)
    assert not in_submitted_job()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 1)])
def test_a_signal_that_comes_within_a_destructor_is_not_lost(number: int, status: int) -> None:
    code = f"""
import dataclasses, os, time
from lib.config import run_job

class Dying:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0)

@dataclasses.dataclass
class Config:
    pass

def job(config):
    Dying()
    print("still there")
    time.sleep(60)

run_job(Config, job, description="")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--verbose"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "still there" in done.stderr, "the exception was ignored"
    assert done.returncode == status
