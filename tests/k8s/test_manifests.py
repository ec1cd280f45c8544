"""The manifests of k8s/: accepted as they are, refused by the checks when broken, and rendered by kubectl."""

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lib.evaluation.evaluate_job import EvaluateConfig
from lib.faces.preprocess_config import PreprocessConfig
from lib.flags import parsed
from lib.sample.sample_job import SampleConfig
from lib.training.settings import TrainConfig
from tests.job_runner import ROOT, SCRIPTS, environment
from tests.k8s.checks import CLUSTER_WIDE, FOLDER, Document, config_of, load, load_folder, pods, problems
from tests.training.learnable_faces import write_faces

OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir() if path.name != "base")
CONFIGS = {
    "sample.py": SampleConfig,
    "preprocess.py": PreprocessConfig,
    "train.py": TrainConfig,
    "evaluate.py": EvaluateConfig,
}
DOCUMENTS = load_folder()
GONE = object()

JOB, CONFIG, CLAIM, SPACE = "RayJob train", "ConfigMap", "PersistentVolumeClaim", "Namespace"
CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec.template.spec"
RAY = f"{HEAD}.containers.0"
CPU = f"{CLUSTER}.workerGroupSpecs.0"
GPU = f"{CLUSTER}.workerGroupSpecs.1"
SECURITY = "pod-security.kubernetes.io"
SUBMITTER = "spec.submitterPodTemplate.spec"

# What is broken: in which document, where, by what value, and what is said of it.
BROKEN: list[tuple[str, str, Any, str]] = [
    (JOB, "apiVersion", "ray.io/v2", "no kind RayJob in ray.io/v2"),
    (JOB, "spec.shutdownAfterJobFinish", True, "shutdownAfterJobFinish"),
    (JOB, "spec.entrypont", "x", "entrypont"),
    (JOB, "spec.backoffLimit", "1", "backoffLimit: '1' is not of type"),
    (JOB, "spec.backoffLimit", -1, "backoffLimit is negative"),
    (JOB, "spec.activeDeadlineSeconds", 0, "activeDeadlineSeconds is not positive"),
    (JOB, "spec.activeDeadlineSeconds", 60, "preRunningDeadlineSeconds is over"),
    (JOB, "spec.preRunningDeadlineSeconds", 0, "preRunningDeadlineSeconds: 0 is less"),
    (JOB, "spec.submissionMode", "SSHMode", "submissionMode"),
    (JOB, "spec.shutdownAfterJobFinishes", False, "want shutdownAfterJobFinishes"),
    (JOB, "spec.deletionStrategy", {"deletionRules": []}, "deletionStrategy"),
    (JOB, "spec.managedBy", "me", "managedBy"),
    (JOB, "spec.runtimeEnvYAML", "env_vars: {A: [", "runtimeEnvYAML is no YAML"),
    (JOB, CLUSTER, GONE, "rayClusterSpec is missing"),
    (JOB, f"{CLUSTER}.upgradeStrategy", {"type": "Recreate"}, "upgradeStrategy"),
    (JOB, f"{CLUSTER}.rayVersion", "2.59.0", "rayVersion is 2.59.0"),
    (JOB, f"{CLUSTER}.authOptions", {"mode": "disabled"}, "authOptions"),
    (JOB, f"{CLUSTER}.autoscalerOptions.version", "v3", "'v3' is not one of"),
    (JOB, f"{CLUSTER}.autoscalerOptions.securityContext", GONE, "needs a securityContext"),
    (JOB, f"{CLUSTER}.headGroupSpec.template", GONE, "'template' is a required"),
    (JOB, f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus", 0, "num-cpus: 0 is not of type"),
    (JOB, f"{CPU}.groupName", GONE, "'groupName' is a required"),
    (JOB, f"{CPU}.minReplicas", 9, "9 minReplicas"),
    (JOB, f"{GPU}.minReplicas", 1, "1 minReplicas, 0 replicas"),
    (JOB, GPU, lambda group: group.update(minReplicas=1, replicas=1), "holds a GPU before"),
    (JOB, f"{RAY}.resources.limits.cpu", "two", "limits.cpu"),
    (JOB, f"{RAY}.resources.limits.memory", "8GiB", "limits.memory"),
    (JOB, f"{RAY}.resources.requests.memory", "64Gi", "are not the limits"),
    (JOB, f"{RAY}.resources.limits", GONE, "are not the limits"),
    (JOB, f"{HEAD}.volumes.1", GONE, "no volume 'data'"),
    (JOB, f"{HEAD}.volumes.1.persistentVolumeClaim.claimName", "dat", "no claim 'dat'"),
    (JOB, f"{HEAD}.serviceAccountName", "me", "no ServiceAccount 'me'"),
    (JOB, f"{HEAD}.automountServiceAccountToken", GONE, "automountServiceAccountToken"),
    (JOB, f"{HEAD}.securityContext.runAsNonRoot", False, "runAsNonRoot"),
    (JOB, f"{HEAD}.initContainers.0.securityContext", GONE, "capabilities that are not dropped"),
    (JOB, f"{RAY}.securityContext.readOnlyRootFilesystem", False, "readOnlyRootFilesystem"),
    (JOB, f"{RAY}.env.1.name", "RAY_JOB_STOP_WAIT_TIME_S", "env has a name twice"),
    (JOB, f"{RAY}.env.0.value", 1, "1 is not of type 'string'"),
    (JOB, f"{RAY}.env.0.name", "A B", "env 'A B'"),
    (JOB, f"{RAY}.envFrom.0.configMapRef.name", "facenet", "no ConfigMap 'facenet'"),
    (JOB, f"{RAY}.envFrom.1.secretRef.optional", GONE, "does not start without a Secret"),
    (JOB, f"{RAY}.ports.0.containerPort", 99999, "port 99999"),
    (JOB, f"{RAY}.imagePullPolicy", "Sometimes", "imagePullPolicy is 'Sometimes'"),
    (JOB, f"{RAY}.image", "conv-facenet:latest", "image is conv-facenet:latest"),
    (JOB, f"{SUBMITTER}.containers.0.image", "conv-facenet:0.0.9", "image is conv-facenet:0.0.9"),
    (JOB, f"{RAY}.name", "RayHead", "the name is not allowed"),
    (JOB, f"{HEAD}.restartPolicy", "Maybe", "restartPolicy is 'Maybe'"),
    (JOB, f"{HEAD}.restartPolicy", "Always", "has to be Never with autoscaler v2"),
    (JOB, f"{HEAD}.hostNetwrk", True, "hostNetwrk"),
    (JOB, f"{GPU}.template.spec.tolerations.0.operator", "Exist", "operator is 'Exist'"),
    (JOB, "metadata.name", "t" * 48, "is not allowed"),
    (JOB, "metadata.name", "Train", "is not allowed"),
    (JOB, "metadata.name", "1train", "is not allowed"),
    (JOB, "metadata", lambda metadata: metadata.update(generateName=metadata.pop("name") + "-"), "generateName"),
    (JOB, "metadata.labels.x", "a b/c", "the label x"),
    (JOB, "metadata.labels.x", 1, "labels.x: 1 is not of type"),
    (JOB, "metadata.label", {"a": "b"}, "metadata has label"),
    (JOB, "metadata.namespace", "nosuch", "the namespace 'nosuch' is not made before it"),
    (CONFIG, "data.RUN", 3, "data.RUN: 3 is not of type"),
    (CONFIG, "metadata.name", "job_config", "is not allowed"),
    (CONFIG, "data.A B", "x", "the key 'A B'"),
    (CLAIM, "spec.resources", GONE, "asks for no storage"),
    (CLAIM, "spec.accessModes.0", "ReadWriteAll", "accessModes has"),
    (CLAIM, "spec.storageClass", "nfs", "storageClass"),
    (SPACE, "metadata.name", "Faces", "is not allowed"),
    (
        SPACE,
        "metadata.labels",
        lambda labels: labels.update({"pod-security.kubernetes.io/enforce": "strict"}),
        "strict",
    ),
    ("NetworkPolicy", "spec.podSelecter", {}, "podSelecter"),
    ("ValidatingAdmissionPolicy", "spec.validations.0.expresion", "false", "expresion"),
]


def broken(kind_and_name: str, where: str, value: Any) -> list[Document]:
    """Return the documents with one place of one of them changed, removed, or given to a function to change."""
    documents = copy.deepcopy(DOCUMENTS)
    kind, _, name = kind_and_name.partition(" ")
    (place,) = (each for each in documents if each["kind"] == kind and name in ("", each["metadata"]["name"]))
    *way, last = [int(step) if step.isdecimal() else step for step in where.split(".")]
    for step in way:
        place = place[step]
    if value is GONE:
        del place[last]
    elif isinstance(value, Callable):
        value(place[last])
    else:
        place[last] = value
    return documents


def kubectl(*arguments: str) -> str:
    """Run kubectl without a server."""
    done = subprocess.run([SCRIPTS / "kubectl", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(overlay: str) -> list[Document]:
    """Return what README tells to apply of an overlay."""
    folder = str(FOLDER / "overlays" / overlay)
    return load(kubectl("kustomize", "--load-restrictor", "LoadRestrictionsNone", folder))


def commands(documents: list[Document]) -> list[tuple[str, list[str]]]:
    """Return each job that the pods run, with its arguments as the shells make them of the ConfigMap."""
    settings = config_of(documents)
    scripts = []
    for job in (each for each in documents if each["kind"] == "RayJob"):
        shell, option, script = shlex.split(job["spec"]["entrypoint"])
        assert (shell, option) == ("bash", "-c")
        scripts.append(script)
        for _, pod in pods(job):
            scripts += [each["args"][0] for each in pod.get("initContainers", [])]
    found = []
    for script in scripts:
        # A shell that says what it would run instead of `python`; every program it could start is out of its reach.
        spoken = 'python() { printf "%s\\0" "$@"; echo; }; exec() { "$@"; }; ' + script
        environment = {**settings, "PATH": "/nowhere"}
        done = subprocess.run(["/bin/bash", "-c", spoken], env=environment, capture_output=True, text=True, check=True)
        lines = [line.split("\0")[:-1] for line in done.stdout.splitlines()]
        found += [(path.removeprefix("/app/jobs/"), arguments) for path, *arguments in lines]
    return found


def test_the_manifests_are_accepted_as_they_are() -> None:
    assert problems(DOCUMENTS) == []
    assert DOCUMENTS[0]["kind"] == "Namespace"
    assert {each["metadata"]["namespace"] for each in DOCUMENTS if each["kind"] not in CLUSTER_WIDE} == {"conv-facenet"}


@pytest.mark.parametrize(
    ("kind", "where", "value", "said"), BROKEN, ids=[f"{said} ({where.split('.')[-1]})" for _, where, _, said in BROKEN]
)
def test_a_manifest_that_is_broken_is_refused(kind: str, where: str, value: Any, said: str) -> None:
    found = problems(broken(kind, where, value))
    assert any(said in problem for problem in found), found


def test_a_namespace_that_is_made_after_what_lies_in_it_is_refused() -> None:
    assert any("is not made before it" in problem for problem in problems([*DOCUMENTS[1:], DOCUMENTS[0]]))


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(Exception, match="stands twice"):
        load("a: 1\nb: 2\na: 3\n")


def test_kubectl_reads_the_folder_as_the_checks_do_and_nothing_of_the_overlays() -> None:
    assert "--recursive=false" in kubectl("apply", "--help")
    # With --local it reads, changes and prints, and asks no server.
    printed = kubectl("annotate", "--local", "--recursive=false", "-f", str(FOLDER), "seen=yes", "-o", "json")
    decoder, read, rest = json.JSONDecoder(), [], printed.lstrip()
    while rest:
        document, end = decoder.raw_decode(rest)
        read.append(document)
        rest = rest[end:].lstrip()
    for document in read:
        assert document["metadata"].pop("annotations") == {"seen": "yes"}
    assert read == DOCUMENTS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_rendered_by_kubectl_and_accepted(overlay: str) -> None:
    rendered = render(overlay)
    # kubectl applies what it reads in this order too, which puts the namespace first.
    assert problems(rendered) == []
    assert sum(each["kind"] == "RayJob" for each in rendered) == 2
    assert commands(rendered) != commands(DOCUMENTS)


def test_overlays_leave_out_what_their_clusters_do_not_have() -> None:
    def groups(overlay: str) -> list[list[str]]:
        jobs = [each for each in render(overlay) if each["kind"] == "RayJob"]
        return [[name for name, _ in pods(job)][2:] for job in jobs]

    assert groups("gpu") == [["cpu", "gpu"], ["cpu", "gpu"]]
    assert groups("cpu") == [["cpu"], ["cpu"]]
    assert groups("kueue") == [["cpu"], ["gpu"]]
    assert "/data" not in " ".join(config_of(render("s3")).values())
    assert not any("persistentVolumeClaim" in str(each) for each in render("s3"))
    queues = [each["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") for each in render("kueue")]
    assert queues.count("conv-facenet") == 2


@pytest.mark.parametrize("overlay", ["", *OVERLAYS])
def test_the_jobs_take_the_arguments_that_the_pods_give_them(overlay: str) -> None:
    found = commands(render(overlay) if overlay else DOCUMENTS)
    assert {script for script, _ in found} >= {"preprocess.py", "train.py", "evaluate.py"}
    for script, arguments in found:
        parsed(CONFIGS[script], arguments)
    (waiting,) = (arguments for script, arguments in found if "--until-done" in arguments)
    assert ("preprocess.py", [each for each in waiting if each != "--until-done"]) in found, (
        "it waits for another table"
    )


def test_drawn_people_go_to_the_volume_alone() -> None:
    assert "sample.py" in dict(commands(DOCUMENTS))
    elsewhere = broken(CONFIG, "data.DATA_URL", "s3://mine/faces")
    assert "sample.py" not in dict(commands(elsewhere))
    assert ("evaluate.py", ["--model", "s3://mine/faces/runs/sample"]) in commands(elsewhere)


def test_train_holds_no_gpu_while_it_waits() -> None:
    (train,) = (each for each in DOCUMENTS if each["metadata"]["name"] == "train")
    templates = dict(pods(train))
    assert "nvidia.com/gpu" not in str(templates["head"])
    assert "--until-done" in templates["head"]["initContainers"][0]["args"][0]
    assert "nvidia.com/gpu" in str(templates["gpu"])


def test_one_container_alone_gets_a_token_of_kubernetes() -> None:
    for job in (each for each in DOCUMENTS if each["kind"] == "RayJob"):
        mounted = [
            container["name"]
            for _, pod in pods(job)
            for container in [*pod["containers"], *pod.get("initContainers", [])]
            if "serviceaccount" in str(container.get("volumeMounts"))
        ]
        assert mounted == []
        assert "serviceaccount" in str(job["spec"]["rayClusterSpec"]["autoscalerOptions"]["volumeMounts"])


FORGET = (FOLDER / "jobs" / "forget.yaml").read_text()


def test_the_job_that_forgets_is_accepted_beside_the_others_on_a_volume_and_with_a_bucket() -> None:
    assert problems([*DOCUMENTS, *load(FORGET)]) == []
    (command,) = re.findall(r"sed '(s#persistent[^']*)' k8s/jobs/forget.yaml", (FOLDER / "README.md").read_text())
    done = subprocess.run(["sed", command], input=FORGET, capture_output=True, text=True, check=True)
    assert "persistentVolumeClaim" not in done.stdout
    assert problems([*render("s3"), *load(done.stdout)]) == []
    for broken in (("claimName: data", "claimName: dat"), ("drop: [ALL]", "drop: []"), ("limits: {cpu", "limit: {cpu")):
        assert problems([*DOCUMENTS, *load(FORGET.replace(*broken))]), broken


def test_the_job_that_forgets_takes_the_names_of_its_secret_as_they_are(tmp_path: Path) -> None:
    write_faces(tmp_path / "the data" / "faces")
    secret = tmp_path / "a secret"
    secret.mkdir()
    (secret / "identities").write_text("person 1\nperson 2\n")
    (secret / "photos").write_text("person 3/“0”.jpg\n")
    (container,) = load(FORGET)[0]["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    settings = {"DATA_URL": str(tmp_path / "the data"), "PATH": f"{SCRIPTS}:/usr/bin:/bin"}
    for flags, rows in (("--dry-run --no-names", 17), ("", 17)):
        done = subprocess.run(
            [*container["command"], script.replace("/app", shlex.quote(str(ROOT))).replace("/forget", str(secret), 2)],
            env=environment({**settings, "FORGET_FLAGS": flags}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert (result["job"], result["rows"]) == ("forget", rows)
    assert "person 1/" not in "".join(
        str(table.to_pydict()["photo"]) for table in map(pq.read_table, (tmp_path / "the data").rglob("*.parquet"))
    )
