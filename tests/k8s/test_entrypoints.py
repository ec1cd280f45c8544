"""The entrypoints of the RayJobs, taken out of the manifests and run on Ray clusters that grow from nothing."""

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.job_runner import ROOT, SCRIPTS, RayHead, environment, finish, kill_session, ray_head, wait_until
from tests.k8s.checks import Document, config_of, load_folder, pods

pytestmark = pytest.mark.timeout(600)

DOCUMENTS = load_folder()
# Less of the same: one epoch says as much as ten.
SHORTER = {"--epochs 10": "--epochs 1", "--triplets-per-epoch 2000": "--triplets-per-epoch 120"}


@pytest.fixture(scope="module")
def volume(sample_data: Path, faces_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the claim would hold: photos, of which one is newer than the faces that were made of the others."""
    folder = tmp_path_factory.mktemp("volume")
    for path in sample_data.rglob("*"):
        target = folder / path.relative_to(sample_data)
        if path.is_file() and "runs" not in path.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    photo = next((folder / "photos").glob("*.jpg"))
    os.link(photo, folder / "photos" / "newer.jpg")
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
    """Run the RayCluster of a job: its head, with the groups that its autoscaler may grow."""
    kinds = {}
    for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources: dict[str, Any] = {"CPU": int(limits["cpu"]), "object_store_memory": 200 * 2**20}
        if "nvidia.com/gpu" in limits:
            resources["GPU"] = int(limits["nvidia.com/gpu"])
        kinds[group["groupName"]] = {"resources": resources, "max_workers": min(2, group["maxReplicas"])}
    num_cpus = int(rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"])
    env = {each["name"]: each["value"] for each in dict(pods(rayjob))["head"]["containers"][0]["env"]}
    with ray_head(num_cpus=num_cpus, dashboard=True, extra={**settings, **env}, grows_by=kinds) as head:
        yield head


def submit(head: RayHead, rayjob: Document, settings: dict[str, str], volume: Path) -> str:
    """Submit the entrypoint as KubeRay's submitter does, from a pod without the settings; return its log."""
    entrypoint = here(rayjob["spec"]["entrypoint"], volume)
    # KubeRay puts the entrypoint into its own command as it is, so this shell reads it too.
    command = f"ray job submit --no-wait --submission-id one -- {entrypoint} ; ray job logs --follow one ; ray job status one"
    without_settings = {name: value for name, value in head.environment.items() if name not in settings}
    del without_settings["RAY_ADDRESS"]
    done = subprocess.run(
        ["/bin/bash", "-c", command],
        env=environment(without_settings),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return done.stdout + done.stderr


def test_both_jobs_run_from_photos_to_the_report_on_clusters_that_grow_from_nothing(
    settings: dict[str, str], volume: Path
) -> None:
    preprocess, train = job("preprocess"), job("train")
    waiting = start_init_container(train, settings, volume)
    try:
        sample = finish(start_init_container(preprocess, settings, volume))
        assert sample.status == 0, sample.errors
        assert sample.result["drawn"] == 0, "there are photos"
        with cluster(preprocess, settings) as head:
            assert waiting.poll() is None, "it waits, for the faces there are of other photos"
            log = submit(head, preprocess, settings, volume)
            assert "succeeded" in log, log
        waited = finish(waiting, 120)
        assert waited.status == 0, waited.errors
        assert "made otherwise" in waited.errors
        assert waited.result["photos"] == len(list((volume / "photos").iterdir()))
    finally:
        kill_session(waiting.pid)
    with cluster(train, settings) as head:
        log = submit(head, train, settings, volume)
        nodes = subprocess.run(
            [SCRIPTS / "ray", "status"],
            env=environment(head.environment),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    assert "succeeded" in log, log
    run = volume / "runs" / settings["RUN"]
    assert [row["num_workers"] for row in pq.read_table(run / "history.parquet").to_pylist()] == [1]
    assert (run / "report" / "report.html").is_file()
    assert "cpu" in nodes
    assert "gpu" not in nodes.split("Recent failures")[0], "no GPU is asked for without --use-gpu"


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
