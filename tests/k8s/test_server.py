"""`kubectl apply -f k8s/` against a real API server, where TEST_ASSET_KUBE_APISERVER and TEST_ASSET_ETCD name one."""

import gzip
import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.job_runner import SCRIPTS, free_ports
from tests.k8s.checks import CRD, FOLDER, load_folder

Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """Start etcd and an API server with KubeRay's RayJob, and return kubectl as its administrator."""
    binaries = [os.environ.get(f"TEST_ASSET_{name}") for name in ("KUBE_APISERVER", "ETCD")]
    if not all(binaries):
        pytest.skip("no API server here: TEST_ASSET_KUBE_APISERVER and TEST_ASSET_ETCD name its binaries")
    apiserver, etcd = map(str, binaries)
    folder = tmp_path_factory.mktemp("kube")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(pem)
    token = secrets.token_hex(16)
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    etcd_port, peer_port, port = free_ports(3)
    etcd_url, peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
    commands = [
        [
            *(etcd, f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={etcd_url}"),
            *(f"--advertise-client-urls={etcd_url}", f"--listen-peer-urls={peer_url}"),
            *(f"--initial-advertise-peer-urls={peer_url}", f"--initial-cluster=default={peer_url}"),
        ],
        [
            *(
                apiserver,
                f"--etcd-servers={etcd_url}",
                f"--secure-port={port}",
                f"--cert-dir={folder / 'certificates'}",
            ),
            *("--bind-address=127.0.0.1", "--service-cluster-ip-range=10.0.0.0/24", "--authorization-mode=RBAC"),
            *("--service-account-issuer=https://kubernetes.default.svc", f"--token-auth-file={folder / 'tokens.csv'}"),
            f"--service-account-key-file={folder / 'key.pem'}",
            f"--service-account-signing-key-file={folder / 'key.pem'}",
        ],
    ]
    server = ["--server", f"https://127.0.0.1:{port}", "--token", token, "--insecure-skip-tls-verify=true"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPTS / "kubectl", *server, *arguments], capture_output=True, text=True, check=False, timeout=120
        )

    with ExitStack() as stack:
        log = stack.enter_context((folder / "log.txt").open("wb"))
        for command in commands:
            process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
            stack.callback(process.terminate)
        wait_for(lambda: run("get", "--raw", "/readyz").returncode == 0, folder / "log.txt")
        crd = folder / "crd.yaml"
        crd.write_bytes(gzip.decompress(CRD.read_bytes()))
        made = run("create", "-f", str(crd))
        assert made.returncode == 0, made.stderr
        wait_for(lambda: run("get", "rayjobs", "-A").returncode == 0, folder / "log.txt")
        yield run


def wait_for(is_so: Callable[[], bool], log: Path, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


def versions(kubectl: Kubectl) -> dict[tuple[str, str], Any]:
    """Return the resource version of everything that the folder makes."""
    got = kubectl("get", "-f", str(FOLDER), "-o", "json", "--ignore-not-found")
    assert got.returncode == 0, got.stderr
    found = json.loads(got.stdout)["items"] if got.stdout.strip() else []
    return {(each["kind"], each["metadata"]["name"]): each["metadata"]["resourceVersion"] for each in found}


def test_the_folder_is_applied_applied_again_without_a_change_and_deleted_but_for_the_data(kubectl: Kubectl) -> None:
    applied = kubectl("apply", "-f", str(FOLDER))
    assert applied.returncode == 0, applied.stderr
    assert "Warning" not in applied.stderr
    before = versions(kubectl)
    assert set(before) == {(each["kind"], each["metadata"]["name"]) for each in load_folder()}

    again = kubectl("apply", "-f", str(FOLDER))
    assert again.returncode == 0, again.stderr
    assert all(line.endswith("unchanged") for line in again.stdout.splitlines()), again.stdout
    assert versions(kubectl) == before

    # A policy is in force a moment after it was made.
    trial = ("delete", "namespace", "conv-facenet", "--dry-run=server")
    wait_for(lambda: "holds your data" in kubectl(*trial).stderr, Path(os.devnull))
    deleted = kubectl("delete", "-f", str(FOLDER), "--wait=false")
    assert deleted.returncode == 1, "it says that something was kept"
    assert set(versions(kubectl)) == {("Namespace", "conv-facenet"), ("PersistentVolumeClaim", "data")}
    for kind, name in (("namespace", "conv-facenet"), ("persistentvolumeclaim", "data")):
        left = json.loads(kubectl("-n", "conv-facenet", "get", kind, name, "-o", "json").stdout)
        assert "deletionTimestamp" not in left["metadata"]
