"""What a Kubernetes server with KubeRay would say of manifests, and what it would not say but hang on: offline.

Kinds of Kubernetes are checked by its own schemas, RayJobs by KubeRay's, both with unknown fields refused as kubectl
does. The rules after them are those that no schema holds: of names and references, of quantities, of KubeRay's own
validation, and of this project (the same image and Ray everywhere, no pod that asks for more than it may).
"""

import functools
import gzip
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.job_runner import ROOT

# It reads a megabyte of JSON for each document.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

FOLDER = ROOT / "k8s"
CRD = Path(__file__).parent / "crds" / "ray.io_rayjobs.yaml.gz"
KUBERNETES = "1.37"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
RAY_VERSION = re.search(r"^ray\[.*\]==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
RAYJOB_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?")
POD_SECURITY = re.compile("privileged|baseline|restricted")
CONFIG_KEY = re.compile(r"[-._a-zA-Z0-9]+")
ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
SIZES = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
CLUSTER_WIDE = ("Namespace", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
GPU = "nvidia.com/gpu"

Document = dict[str, Any]


class StrictLoader(yaml.CSafeLoader):
    """Refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(None, None, f"a key stands twice in {keys}", node.start_mark)
        return super().construct_mapping(node, deep)


def load(text: str) -> list[Document]:
    """Return the documents of a manifest."""
    return [each for each in yaml.load_all(text, StrictLoader) if each]


def load_folder() -> list[Document]:
    """Return what `kubectl apply -f k8s/` applies, in its order."""
    files = sorted(path for path in FOLDER.iterdir() if path.suffix in (".yaml", ".yml", ".json"))
    return [document for path in files for document in load(path.read_text())]


def problems(documents: list[Document]) -> list[str]:
    """Return all that is wrong with manifests that are applied in this order, one line each."""
    found = []
    for n, document in enumerate(documents):
        name = f"{document.get('kind')} {document.get('metadata', {}).get('name')}"
        wrong = list(_schema(document)) or [*_metadata(document, documents[:n]), *_rules(document, documents)]
        found += [f"{name}: {problem}" for problem in wrong]
    return found


def config_of(documents: list[Document]) -> dict[str, str]:
    """Return the settings of the ConfigMap."""
    (config,) = (each["data"] for each in documents if each["kind"] == "ConfigMap")
    return config


def pods(job: Document) -> Iterator[tuple[str, Document]]:
    """Yield the name of each pod template of a RayJob, and what is under its `spec`."""
    cluster = job["spec"]["rayClusterSpec"]
    yield "submitter", job["spec"]["submitterPodTemplate"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def _schema(document: Document) -> Iterator[str]:
    if document.get("apiVersion", "").startswith("ray.io/"):
        validator = _rayjob_schemas().get((document["apiVersion"], document.get("kind")))
        if validator is None:
            yield f"no kind {document.get('kind')} in {document['apiVersion']}"
            return
        for error in validator.iter_errors(document):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        yield f"no such kind: {error}"


@functools.cache
def _rayjob_schemas() -> dict[tuple[str, str], jsonschema.Draft7Validator]:
    (crd,) = load(gzip.decompress(CRD.read_bytes()).decode())
    group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
    return {
        (f"{group}/{version['name']}", kind): jsonschema.Draft7Validator(_closed(version["schema"]["openAPIV3Schema"]))
        for version in crd["spec"]["versions"]
        if version["served"]
    }


def _closed(schema: Any) -> Any:
    """Return a CRD's schema as JSON Schema in which every object refuses fields that it does not name."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    left_out = ("default", "description", "enum", "properties", "required")
    made = {key: _closed(value) for key, value in schema.items() if key not in left_out}
    if "enum" in schema:
        made["enum"] = schema["enum"]
    properties = schema.get("properties", {})
    if properties:
        made["properties"] = {name: _closed(each) for name, each in properties.items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    if "required" in schema:
        # The server fills in what has a default before it looks.
        made["required"] = [name for name in schema["required"] if "default" not in properties.get(name, {})]
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


def _metadata(document: Document, before: list[Document]) -> Iterator[str]:
    kind, metadata = document["kind"], document["metadata"]
    name = metadata.get("name", "")
    names = {"RayJob": RAYJOB_NAME, "Namespace": LABEL}.get(kind, SUBDOMAIN)
    if "generateName" in metadata:
        yield "kubectl apply needs a name, not generateName"
    elif not names.fullmatch(name):
        yield f"the name {name!r} is not allowed"
    unknown = metadata.keys() - {"name", "namespace", "labels", "annotations"}
    if unknown:
        yield f"metadata has {', '.join(sorted(unknown))}"
    for key, value in (metadata.get("labels") or {}).items():
        allowed = POD_SECURITY if key.startswith("pod-security.kubernetes.io/") else LABEL_VALUE
        if not isinstance(value, str) or not allowed.fullmatch(value):
            yield f"the label {key} is {value!r}"
    made = {each["metadata"]["name"] for each in before if each["kind"] == "Namespace"}
    if kind not in CLUSTER_WIDE and metadata.get("namespace") not in made:
        yield f"the namespace {metadata.get('namespace')!r} is not made before it"


def _rules(document: Document, documents: list[Document]) -> Iterator[str]:
    kind = document["kind"]
    if kind == "RayJob":
        yield from _rayjob(document["spec"])
        for name, pod in pods(document) if "rayClusterSpec" in document["spec"] else ():
            for problem in [*_pod(pod, documents), *_security(pod)]:
                yield f"{name}: {problem}"
    if kind == "Job":
        pod = document["spec"]["template"]["spec"]
        yield from [*_pod(pod, documents), *_security(pod)]
    if kind in ("ConfigMap", "Secret"):
        for key in {**(document.get("data") or {}), **(document.get("stringData") or {})}:
            if not CONFIG_KEY.fullmatch(key):
                yield f"the key {key!r} is not allowed"
    if kind == "PersistentVolumeClaim":
        if "storage" not in document["spec"].get("resources", {}).get("requests", {}):
            yield "it asks for no storage"
        for mode in document["spec"].get("accessModes", []):
            if mode not in ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"):
                yield f"accessModes has {mode!r}"


def _rayjob(spec: Document) -> Iterator[str]:
    if spec.get("submissionMode") not in ("K8sJobMode", "HTTPMode", "SidecarMode"):
        yield "submissionMode: KubeRay would leave it in Initializing for ever"
    if "rayClusterSpec" not in spec:
        yield "rayClusterSpec is missing"
        return
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "activeDeadlineSeconds is not positive"
    if spec.get("preRunningDeadlineSeconds", 1) > spec.get("activeDeadlineSeconds", 2**31):
        yield "preRunningDeadlineSeconds is over activeDeadlineSeconds"
    if not spec.get("shutdownAfterJobFinishes") and (spec.get("ttlSecondsAfterFinished") or spec.get("suspend")):
        yield "ttlSecondsAfterFinished and suspend want shutdownAfterJobFinishes"
    if "deletionStrategy" in spec:
        yield "deletionStrategy excludes shutdownAfterJobFinishes"
    if spec.get("managedBy") not in (None, "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"):
        yield f"managedBy is {spec['managedBy']!r}"
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError:
        yield "runtimeEnvYAML is no YAML"
    cluster = spec["rayClusterSpec"]
    if cluster.get("rayVersion") != RAY_VERSION:
        yield f"rayVersion is {cluster.get('rayVersion')}, requirements.txt has {RAY_VERSION}"
    if "upgradeStrategy" in cluster:
        yield "upgradeStrategy is not for a RayJob"
    if cluster.get("authOptions") != {"mode": "token"}:
        yield "authOptions: anybody in the namespace could run code"
    scales = cluster.get("enableInTreeAutoscaling")
    if scales and "securityContext" not in cluster.get("autoscalerOptions", {}):
        yield "autoscalerOptions needs a securityContext where Pod Security is restricted"
    for group in cluster["workerGroupSpecs"]:
        least, now, most = (group.get(f"{name}eplicas", 0) for name in ("minR", "r", "maxR"))
        if not least <= now <= most:
            yield f"{group['groupName']}: {least} minReplicas, {now} replicas, {most} maxReplicas"
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        if scales and GPU in limits and least:
            yield f"{group['groupName']}: holds a GPU before anything asks for it"
    for name, pod in (("head", cluster["headGroupSpec"]["template"]["spec"]), *_workers(cluster)):
        if scales and pod.get("restartPolicy") != "Never":
            yield f"{name}: restartPolicy has to be Never with autoscaler v2"


def _workers(cluster: Document) -> list[tuple[str, Document]]:
    return [(group["groupName"], group["template"]["spec"]) for group in cluster["workerGroupSpecs"]]


def _pod(pod: Document, documents: list[Document]) -> Iterator[str]:
    there = {(each["kind"], each["metadata"].get("name")) for each in documents}
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and ("PersistentVolumeClaim", claim) not in there:
            yield f"there is no claim {claim!r}"
    if pod.get("serviceAccountName") and ("ServiceAccount", pod["serviceAccountName"]) not in there:
        yield f"there is no ServiceAccount {pod['serviceAccountName']!r}"
    if pod.get("restartPolicy") not in ("OnFailure", "Never"):
        yield f"restartPolicy is {pod.get('restartPolicy')!r}"
    for toleration in pod.get("tolerations", []):
        if toleration.get("operator") not in (None, "Equal", "Exists"):
            yield f"a toleration's operator is {toleration['operator']!r}"
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        for problem in _container(container, volumes, there):
            yield f"{container.get('name')}: {problem}"


def _container(container: Document, volumes: Document, there: set[tuple[str, Any]]) -> Iterator[str]:
    if not LABEL.fullmatch(container.get("name", "")):
        yield "the name is not allowed"
    if container.get("image") != f"conv-facenet:{VERSION}":
        yield f"image is {container.get('image')}, pyproject.toml has {VERSION}"
    if container.get("imagePullPolicy") not in ("Always", "IfNotPresent", "Never"):
        yield f"imagePullPolicy is {container.get('imagePullPolicy')!r}"
    yield from (f"no volume {m['name']!r}" for m in container.get("volumeMounts", []) if m["name"] not in volumes)
    yield from (f"port {p['containerPort']}" for p in container.get("ports", []) if not 0 < p["containerPort"] < 2**16)
    names = [each["name"] for each in container.get("env", [])]
    yield from (f"env {name!r} is not allowed" for name in names if not ENV_NAME.fullmatch(name))
    if len(names) != len(set(names)):
        yield "env has a name twice"
    for source in container.get("envFrom", []):
        reference = source.get("configMapRef", {})
        if reference and ("ConfigMap", reference["name"]) not in there:
            yield f"there is no ConfigMap {reference['name']!r}"
        if not source.get("secretRef", {"optional": True}).get("optional"):
            yield "it does not start without a Secret"
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    if not {"cpu", "memory"} <= limits.keys() or {k: _number(v) for k, v in requests.items()} != {
        k: _number(v) for k, v in limits.items()
    }:
        yield f"requests {requests} are not the limits {limits}"


def _security(pod: Document) -> Iterator[str]:
    """What Pod Security `restricted` asks for, a root that cannot be written, and no token where none is used."""
    context = pod.get("securityContext", {})
    if not context.get("runAsNonRoot") or context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "securityContext: runAsNonRoot and seccompProfile RuntimeDefault are asked for"
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken: every container would get a token"
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{container['name']}: allowPrivilegeEscalation, or capabilities that are not dropped"
        if not own.get("readOnlyRootFilesystem"):
            yield f"{container['name']}: readOnlyRootFilesystem is not set"


def _number(quantity: Any) -> float | str:
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity))
    return float(match[1]) * SIZES[match[2]] if match and match[2] in SIZES else f"{quantity}?"
