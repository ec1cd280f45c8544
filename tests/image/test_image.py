"""The container image: linted, built for real, and run as a cluster would run it, by users that have no rights.

`make test-image` runs this, `make test` does not: it takes minutes and 12 GB of disk, and leaves nothing.
"""

import copy
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.image.builder import IMAGE, Builder, builder, require_tools
from tests.job_runner import ROOT, SCRIPTS
from tests.k8s.checks import RAY_VERSION, VERSION, load_folder, pods
from tests.slurm.slurm_cluster import SlurmCluster, photos_by_node, result, why_impossible

pytestmark = [pytest.mark.image, pytest.mark.timeout(1500)]

SOMEBODY = "4321:4321"
TINY = (
    "--backbone test_convnext --init none --image-size 64 --embedding-dim 16 --triplets-per-epoch 120 --val-pairs 400"
)
LIMITS = (
    *("--rm", "--no-healthcheck", "--network", "none", "--read-only", "--tmpfs", "/tmp:mode=1777"),
    *("--cap-drop=ALL", "--security-opt=no-new-privileges", "--memory", "4g", "--pids-limit", "2000"),
)


@pytest.fixture(scope="module")
def oci() -> Iterator[Builder]:
    """Return a builder that has built the image."""
    require_tools()
    with builder() as made:
        made.make_base()
        made.build()
        yield made


@pytest.fixture(scope="module")
def volume(oci: Builder) -> Path:
    """Return a folder that somebody without rights owns, as the volume of the containers."""
    folder = oci.folder / "data"
    folder.mkdir()
    os.chown(folder, *map(int, SOMEBODY.split(":")))
    return folder


def in_container(oci: Builder, volume: Path, *command: str, user: str = SOMEBODY) -> subprocess.CompletedProcess[str]:
    """Run a command in the image with every limit."""
    return oci.run(
        "podman", "run", *LIMITS, "--user", user, "--volume", f"{volume}:/data", IMAGE, *command, timeout_s=600
    )


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def faces(oci: Builder, volume: Path) -> dict[str, object]:
    """Return the counts of the faces that one container draws and another makes."""
    last_line(in_container(oci, volume, "jobs/sample.py", "--identities", "30", "--photos-per-identity", "4"))
    return last_line(in_container(oci, volume, "jobs/preprocess.py"))


def test_the_dockerfile_passes_its_linter() -> None:
    done = subprocess.run([SCRIPTS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_says_what_it_is_and_holds_no_more_than_it_needs(oci: Builder) -> None:
    (inspected,) = json.loads(oci.must("podman", "image", "inspect", IMAGE))
    config = inspected["Config"]
    assert config["User"] == "1000:1000"
    assert config["Labels"]["org.opencontainers.image.version"] == VERSION
    assert "DATA_URL=/data" in config["Env"]
    # Nothing of this machine's pip came in.
    looks = "type bash python ray && ! type gcc cc make 2>/dev/null; ls -A /root /var/lib/apt/lists; cat /etc/pip.conf"
    said = oci.must("podman", "run", "--rm", "--network", "none", "--user", "0", IMAGE, "bash", "-c", looks)
    assert "/usr/local/bin/ray" in said
    assert "index" not in said
    assert ".cache" not in said
    assert "triton" not in oci.must("podman", "run", "--rm", "--network", "none", IMAGE, "pip", "list")
    files = oci.must("podman", "run", "--rm", "--network", "none", IMAGE, "find", "/app", "-type", "f").split()
    kinds = {Path(name).relative_to("/app").parts[0] for name in files}
    assert kinds == {"LICENSE", "README.md", "jobs", "lib"}
    size = int(inspected["Size"])
    print(f"size: {size / 1e9:.2f} GB")
    assert size < 8e9


def test_nothing_depends_on_the_environment_the_folder_or_a_shell_that_is_no_login_shell(oci: Builder) -> None:
    # As Apptainer and Charliecloud start a container, and as KubeRay may: without ENV, USER, WORKDIR and ENTRYPOINT.
    bare = "cd /; env -i bash -lc 'python /app/jobs/train.py --help && ray --version'"
    done = oci.run(
        *("podman", "run", *LIMITS, "--user", SOMEBODY, "--workdir", "/", IMAGE, "bash", "-c", bare), timeout_s=300
    )
    assert done.returncode == 0, done.stderr
    assert "--wait-minutes" in done.stdout
    assert RAY_VERSION in done.stdout


def test_photos_become_faces_with_a_card_for_a_user_without_rights_on_a_root_that_cannot_be_written(
    faces: dict[str, object], volume: Path
) -> None:
    assert faces["photos"] == 30 * 4
    assert (volume / "faces" / "_SUCCESS").is_file()
    assert (volume / "faces" / "card.json").is_file()
    assert str((volume / "faces" / "card.json").stat().st_uid) == SOMEBODY.split(":")[0]


def test_a_mistake_is_told_in_one_line_with_exit_status_2(oci: Builder, volume: Path, faces: dict[str, object]) -> None:
    good = in_container(oci, volume, "jobs/train.py", "--dry-run")
    assert last_line(good)["dry_run"] is True
    for command in (("jobs/train.py", "--epochs", "0"), ("jobs/preprocess.py", "--data", "/data/nowhere")):
        bad = in_container(oci, volume, *command)
        assert bad.returncode == 2, bad.stderr
        assert "Traceback" not in bad.stderr
    denied = in_container(oci, volume, "jobs/preprocess.py", "--faces", "/app/faces")
    assert denied.returncode == 2, denied.stderr


def test_training_that_is_terminated_saves_leaves_with_75_and_goes_on(
    oci: Builder, volume: Path, faces: dict[str, object]
) -> None:
    run = ["jobs/train.py", "--name", "stopped", *TINY.split(), "--epochs"]
    command = ("podman", "run", *LIMITS, "--user", SOMEBODY, "--volume", f"{volume}:/data", "--name", "training", IMAGE)
    history = volume / "runs" / "stopped" / "history.parquet"
    training = oci.start(*command, *run, "500")
    deadline = time.monotonic() + 300
    while not history.exists():
        assert time.monotonic() < deadline, "it never trained"
        assert training.poll() is None, training.communicate()[0]
        time.sleep(0.5)
    oci.must("podman", "kill", "--signal", "TERM", "training")
    said, _ = training.communicate(timeout=120)
    assert training.returncode == 75, said
    done = pq.read_table(history).num_rows
    assert 1 <= done < 500
    # It is not begun anew: other settings than those it was begun with are refused, whatever is left to do.
    refused = in_container(oci, volume, *run, "1")
    assert refused.returncode == 2, refused.stderr


def test_the_head_of_the_train_job_runs_as_a_pod_from_waiting_to_the_report(
    oci: Builder, volume: Path, faces: dict[str, object]
) -> None:
    documents = load_folder()
    (job,) = (each for each in documents if each["kind"] == "RayJob" and each["metadata"]["name"] == "train")
    head = copy.deepcopy(dict(pods(job))["head"])
    # What a kubelet gives and podman does not: volumes are folders here, shared memory and tokens are left out.
    temporary = oci.folder / "pod"
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o777)
    folders = {"data": volume, "tmp": temporary}
    head["volumes"] = [{"name": name, "hostPath": {"path": str(path)}} for name, path in folders.items()]
    (config,) = (copy.deepcopy(each) for each in documents if each["kind"] == "ConfigMap")
    config["data"] |= {"TRAIN_FLAGS": f"{TINY} --epochs 1 --workers 1", "RUN": "pod"}
    token = "0" * 64
    for container in [*head["containers"], *head["initContainers"]]:
        container["image"] = IMAGE
        container["imagePullPolicy"] = "Never"
        container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] in folders]
        container["envFrom"] = [each for each in container["envFrom"] if "configMapRef" in each]
        container["securityContext"] |= {"runAsUser": 4321, "runAsGroup": 4321}
    (ray,) = head["containers"]
    del ray["ports"]  # of a network of its own; here it is the host's
    ray["env"] += [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "value": token}]
    # As KubeRay starts it, but that no workers will come: the head computes.
    ray["command"] = ["/bin/bash", "-c", "--"]
    start = "ray start --head --block --num-cpus=2 --port=26379 --dashboard-port=28265 --ray-client-server-port=28367"
    ray["args"] = [f"ulimit -n 4096; {start} --dashboard-agent-listen-port=28366"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "train-head"}, "spec": head}
    manifest = oci.folder / "pod.yaml"
    manifest.write_text("---\n".join(yaml.safe_dump(each) for each in (config, pod)))
    oci.must("podman", "play", "kube", "--network", "host", str(manifest), timeout_s=400)
    try:
        entrypoint = job["spec"]["entrypoint"]
        submitted = (
            "until ray job list >/dev/null 2>&1; do sleep 2; done; "
            f"ray job submit --no-wait --submission-id one -- {entrypoint} ; "
            "ray job logs --follow one ; ray job status one"
        )
        environment = (
            "RAY_AUTH_MODE=token",
            f"RAY_AUTH_TOKEN={token}",
            "RAY_API_SERVER_ADDRESS=http://127.0.0.1:28265",
        )
        flags = [part for each in environment for part in ("--env", each)]
        log = oci.must(*("podman", "exec", *flags, "train-head-ray-head", "/bin/bash", "-c", submitted), timeout_s=600)
    finally:
        oci.run("podman", "pod", "rm", "--force", "train-head")
    assert "succeeded" in log, log
    assert (volume / "runs" / "pod" / "report" / "report.html").is_file()


def test_two_slurm_nodes_run_the_image_as_a_folder_in_charliecloud(
    oci: Builder, volume: Path, faces: dict[str, object], request: pytest.FixtureRequest
) -> None:
    """With nothing of the project's own environment: the image's Python, Ray and detector do the work."""
    if problem := why_impossible():
        assert not os.environ.get("CI"), problem
        pytest.skip(problem)
    oci.must("buildah", "from", "--pull-never", "--name", "unpacked", IMAGE)
    request.addfinalizer(lambda: oci.run("buildah", "rm", "unpacked"))
    data = oci.folder / "photos of Slurm"  # of the user who submits: a container has no rights on those of others
    data.mkdir()
    shutil.copytree(volume / "photos", data / "photos")
    shutil.copy(volume / "identities.txt", data)
    image = {"CONTAINER": oci.must("buildah", "mount", "unpacked").strip(), "DATA_URL": str(data)}
    cluster = SlurmCluster(num_hosts=2)
    request.addfinalizer(cluster.close)
    (cluster.project / ".venv").unlink()
    small = ("--cpus-per-task=1", "--mem-per-cpu=2G")
    job = cluster.submit(*small, "slurm/preprocess.sh", extra=image)
    made = result(cluster, job)
    assert {name: made[name] for name in ("photos", "aligned")} == {name: faces[name] for name in ("photos", "aligned")}
    assert sum(photos_by_node(cluster, job).values()) == faces["photos"]


def test_nothing_is_left_of_a_builder() -> None:
    require_tools()
    with builder() as made:
        folder = made.folder
        made.must("podman", "images")
    assert not folder.exists()
    assert shutil.which("buildah")
