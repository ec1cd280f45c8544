import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[1]
FOLDERS = ("lib", "jobs", "bench", "tests", "slurm", "k8s", "docs")
NEEDED = {
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
} | {"pyproject.toml", "requirements.txt", "Makefile", "README.md"}
LEFTOVERS = {
    ".venv/bin/python",
    "data/photos/a.jpg",
    "data/faces/split=train/part-000000.parquet",
    "runs/first/config.json",
    "logs/train-1.out",
    "slurm/site.sh",
    "lib/__pycache__/config.cpython-311.pyc",
    ".pytest_cache/README.md",
    ".hypothesis/examples/1",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the project's file names, what running it leaves behind, and its .gitignore."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in NEEDED | LEFTOVERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    shutil.copy(ROOT / ".gitignore", folder / ".gitignore")
    return folder


def ignored(folder: Path, names: set[str]) -> set[str]:
    """Return the names that git ignores; where there is no git, its rules are worked out."""
    if shutil.which("git") is None:
        return set(GitIgnoreSpec.from_lines((folder / ".gitignore").read_text().splitlines()).match_files(names))
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    command = ["git", "-c", "core.excludesFile=/dev/null", "-C", str(folder), "check-ignore", "--stdin", "-z"]
    found = subprocess.run(command, input="\0".join(names), capture_output=True, text=True, check=False)
    assert found.returncode in (0, 1), found.stderr
    return set(found.stdout.split("\0")) - {""}


def test_git_ignores_what_runs_leave_behind_and_none_of_the_code(checkout: Path) -> None:
    assert "lib/config.py" in NEEDED
    assert ignored(checkout, NEEDED | LEFTOVERS) == LEFTOVERS


def test_ray_uploads_all_of_the_code_and_nothing_that_runs_leave_behind(checkout: Path, tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True)
    uploaded = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert uploaded >= NEEDED
    assert uploaded.isdisjoint(LEFTOVERS)
