"""The entrypoints of the RayJobs, taken out of the manifests and run on Ray clusters that begin without a worker.

Here the tests stand in for KubeRay's autoscaler: they start a node when Ray says that one is asked for.
"""

import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lib.sample.sample_job import SampleConfig, make_sample
from tests.job_runner import ROOT, SCRIPTS, RayHead, environment, finish, kill_session, ray_head, ray_node
from tests.k8s.checks import Document, config_of, load_folder, pods

DOCUMENTS = load_folder()
# Less of the same: one epoch says as much as ten.
SHORTER = {"--epochs 10": "--epochs 1", "--triplets-per-epoch 2000": "--triplets-per-epoch 120"}


@pytest.fixture(scope="module")
def volume(faces_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the claim would hold: photos, and faces that were made of other ones."""
    folder = tmp_path_factory.mktemp("volume")
    # Four of these people are in the split test, as few as make pairs.
    make_sample(SampleConfig(data=str(folder), identities=16, photos_per_identity=5))
    shutil.copytree(faces_url, folder / "faces")
    return folder


@pytest.fixture(scope="module")
def settings(volume: Path) -> dict[str, str]:
    """Return the ConfigMap as the pods see it, with the volume where it is here."""
    config = {name: value.replace("/data", str(volume)) for name, value in config_of(DOCUMENTS).items()}
    for long, short in SHORTER.items():
        config["TRAIN_FLAGS"] = config["TRAIN_FLAGS"].replace(long, short)
    return {**config, "PREPROCESS_FLAGS": "--overwrite"}


def job(name: str) -> Document:
    (found,) = (each for each in DOCUMENTS if each["kind"] == "RayJob" and each["metadata"]["name"] == name)
    return found


def here(script: str, volume: Path) -> str:
    """Return a script of a pod with the image's and the volume's folders as they are called here."""
    return script.replace("/app", str(ROOT)).replace("/data", str(volume))


def start_init_container(rayjob: Document, settings: dict[str, str], volume: Path) -> subprocess.Popen[str]:
    """Start the one init container of the head."""
    (container,) = dict(pods(rayjob))["head"]["initContainers"]
    return subprocess.Popen(
        [*container["command"], *(here(each, volume) for each in container["args"])],
        env=environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextmanager
def cluster(rayjob: Document, settings: dict[str, str]) -> Iterator[RayHead]:
    """Run the head of a job."""
    num_cpus = int(rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"])
    env = {each["name"]: each["value"] for each in dict(pods(rayjob))["head"]["containers"][0]["env"]}
    with ray_head(num_cpus=num_cpus, dashboard=True, extra={**settings, **env}) as head:
        yield head


def run_job(head: RayHead, rayjob: Document, settings: dict[str, str], volume: Path) -> tuple[str, str]:
    """Submit the entrypoint as KubeRay's submitter does, from a pod without the settings, and give it a worker.

    Returns:
        What `ray status` said was asked for, and the submitter's log.
    """
    entrypoint = here(rayjob["spec"]["entrypoint"], volume)
    # KubeRay puts the entrypoint into its own command as it is, so this shell reads it too.
    command = (
        f"ray job submit --no-wait --submission-id one -- {entrypoint} ; ray job logs --follow one ; ray job status one"
    )
    without_settings = {name: value for name, value in head.environment.items() if name not in settings}
    del without_settings["RAY_ADDRESS"]
    process = subprocess.Popen(
        ["/bin/bash", "-c", command],
        env=environment(without_settings),
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        asked = ""
        deadline = time.monotonic() + 240
        while not asked:
            assert time.monotonic() < deadline, "nothing is asked for"
            assert process.poll() is None, process.communicate()[0]
            asked = demands(head)
        (limits,) = (
            group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            if group["groupName"] == "cpu"
        )
        with ray_node(head, num_cpus=int(limits["cpu"])):
            log, _ = process.communicate(timeout=400)
        return asked, log
    finally:
        kill_session(process.pid)


def demands(head: RayHead) -> str:
    """Return the lines of `ray status` that say what is asked for and not there."""
    done = subprocess.run(
        [SCRIPTS / "ray", "status"],
        env=environment(head.environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return "\n".join(line for line in done.stdout.splitlines() if line.strip().startswith("{"))


@pytest.mark.slow
def test_both_jobs_run_from_photos_to_the_report_and_ask_for_their_workers(
    settings: dict[str, str], volume: Path
) -> None:
    preprocess, train = job("preprocess"), job("train")
    waiting = start_init_container(train, settings, volume)
    try:
        sample = finish(start_init_container(preprocess, settings, volume))
        assert sample.status == 0, sample.errors
        assert sample.result["drawn"] == 0, "there are photos"
        with cluster(preprocess, settings) as head:
            asked, log = run_job(head, preprocess, settings, volume)
        assert "succeeded" in log, log
        assert "CPU" in asked
        waited = finish(waiting, 120)
        assert waited.status == 0, waited.errors
        assert "made otherwise" in waited.errors, "the faces that were there are of other photos"
        assert waited.result["photos"] == len(list((volume / "photos").iterdir()))
    finally:
        kill_session(waiting.pid)
    with cluster(train, settings) as head:
        asked, log = run_job(head, train, settings, volume)
    assert "succeeded" in log, log
    assert "CPU" in asked
    assert "GPU" not in asked, "no GPU is asked for without --gpus"
    run = volume / "runs" / settings["RUN"]
    assert [row["num_workers"] for row in pq.read_table(run / "history.parquet").to_pylist()] == [1]
    assert (run / "report" / "report.html").is_file()


def test_an_entrypoint_reaches_the_job_with_the_settings_of_the_pod_not_of_the_submitter() -> None:
    for name in ("preprocess", "train"):
        entrypoint = job(name)["spec"]["entrypoint"]
        read = subprocess.run(
            ["/bin/bash", "-c", f"printf '%s\\n' {entrypoint}"],
            env={"RUN": "wrong", "TRAIN_FLAGS": "wrong", "PREPROCESS_FLAGS": "wrong", "DATA_URL": "wrong"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert read.stdout.splitlines() == shlex.split(entrypoint)
        assert "wrong" not in read.stdout
