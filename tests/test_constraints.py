"""Installs are reproducible: what is installed is what constraints.txt says, and it holds every requirement."""

import re
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path

from tests.job_runner import ROOT


def pins(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return dict(normal(line).split("==") for line in lines if "==" in line)


def normal(requirement: str) -> str:
    return re.sub(r"\[.*?\]", "", requirement).lower().replace("_", "-")


CONSTRAINTS = pins(ROOT / "constraints.txt")


def test_every_installed_package_has_its_version() -> None:
    # Not all of sys.path: Ray brings packages of its own, which pip does not know.
    found = metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {normal(each.name): each.version.partition("+")[0] for each in found}
    of_the_environment = {"pip", "setuptools", "wheel"}
    assert {name: installed[name] for name in installed.keys() - of_the_environment} == {
        name: CONSTRAINTS[name] for name in installed.keys() - of_the_environment
    }


def test_every_requirement_is_held() -> None:
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-track.txt"):
        assert pins(ROOT / name).items() <= CONSTRAINTS.items()


def test_make_takes_torch_from_the_index_that_is_named() -> None:
    command = ["make", "--dry-run", "--always-make", "demo", "TORCH_INDEX=https://example.org/whl/cpu"]
    planned = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    install = next(line for line in planned.replace("\\\n", " ").splitlines() if "-r requirements.txt" in line)
    assert "--constraint constraints.txt" in install
    assert "--extra-index-url https://example.org/whl/cpu" in install
