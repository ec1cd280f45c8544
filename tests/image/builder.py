"""Builds the image without a daemon and without a registry: buildah and podman on a storage of their own.

The base is a stand-in, made by mmdebstrap of the same Debian and Python and called by the official image's name, for
registries are not for tests. Everything lies in one temporary folder, which is removed whatever happens.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.job_runner import ROOT

PACKAGES = ("buildah", "podman", "runc", "catatonit", "mmdebstrap")
BASE = "docker.io/library/python:3.11-slim-bookworm"
IMAGE = "localhost/conv-facenet:test"
# One after the other, so that the builder holds one large layer at a time in all of its copies.
TARGETS = ("pins", "weights", "cuda", "nvidia", "torch", "large", "environment")
BUILD_LIMIT_S = 1200


def require_tools() -> None:
    """Install what builds and runs, where root may; elsewhere skip, and fail where a skip would hide something."""
    missing = [name for name in PACKAGES if not shutil.which(name)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        problem = f"the image cannot be built here: {', '.join(missing)} are not installed, and root alone may do it"
        assert not os.environ.get("CI"), problem
        pytest.skip(problem)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *PACKAGES]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


class Builder:
    """buildah and podman on the storage in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        limit = subprocess.run(["bash", "-c", "ulimit -Hn"], capture_output=True, text=True, check=True).stdout.strip()
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/root"\nrunroot = "{folder}/run"\n'
        )
        (folder / "containers.conf").write_text(
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
            f'[containers]\nnetns = "host"\ndefault_ulimits = ["nofile={limit}:{limit}", "nproc={limit}:{limit}"]\n'
        )
        (folder / "tmp").mkdir()
        self._environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "TMPDIR": str(folder / "tmp"),
        }

    def run(self, *command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command on this storage; it may fail."""
        return subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command on this storage."""
        return subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def must(self, *command: str, timeout_s: float = 300) -> str:
        """Run a command that has to work, and return what it says."""
        done = self.run(*command, timeout_s=timeout_s)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def make_base(self) -> None:
        """Make the stand-in for the official image: Debian 12 with its Python 3.11, and pip in /usr/local."""
        archive = self.folder / "base.tar"
        keep_out = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*/LC_MESSAGES/*.mo")
        sources = [str(path) for path in (Path("/etc/apt/sources.list.d/debian.sources"),) if path.exists()]
        self.must(
            *("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,python3-venv,ca-certificates"),
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in keep_out),
            '--customize-hook=chroot "$1" python3 -m venv /usr/local',
            '--customize-hook=touch "$1"/etc/pip.conf',
            *("bookworm", str(archive), *sources),
        )
        path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        changes = [f"--change=ENV {path}", "--change=ENV LANG=C.UTF-8", '--change=CMD ["python3"]']
        self.must("podman", "import", "--quiet", *changes, str(archive), BASE)
        archive.unlink()

    def build(self) -> None:
        """Build the image from the checkout, stage by stage."""
        command = ["buildah", "bud", "--layers", "--format", "docker", "--isolation", "chroot", "--pull-never"]
        command += ["--network", "host", *self._pip_configuration()]
        for target in TARGETS:
            self.must(*command, "--target", target, str(ROOT), timeout_s=BUILD_LIMIT_S)
        self.must(*command, "--tag", IMAGE, str(ROOT), timeout_s=BUILD_LIMIT_S)

    def _pip_configuration(self) -> list[str]:
        """Return the mounts that give the build's pip this machine's configuration, for the RUN steps alone."""
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        ).stdout
        lines = [f"{name} = {value}" for name, value in re.findall(r"^global\.([a-z-]+)='(.*)'$", listed, re.MULTILINE)]
        (self.folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        named = {path.removesuffix("/simple") for path in re.findall(r"(?:file://)?(/[\w./-]+)", "\n".join(lines))}
        mounts = [f"{path}:{path}:ro" for path in sorted(named) if Path(path).exists()]
        return [part for mount in (f"{self.folder}/pip.conf:/etc/pip.conf:ro", *mounts) for part in ("--volume", mount)]


@contextmanager
def builder() -> Iterator[Builder]:
    """Give a builder whose storage is gone afterwards."""
    # Not in /tmp, which the hosts of the Slurm cluster have for themselves.
    folder = Path(tempfile.mkdtemp(prefix="oci-", dir=os.environ.get("IMAGE_TEST_FOLDER", "/var/tmp")))
    made = Builder(folder)
    try:
        yield made
    finally:
        made.run("podman", "pod", "rm", "--all", "--force")
        made.run("podman", "rm", "--all", "--force")
        made.run("podman", "volume", "rm", "--all", "--force")
        # Storage that is still mounted could not be removed.
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if str(folder) in line:
                subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
        shutil.rmtree(folder)
