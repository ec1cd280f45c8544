"""The documentation is true: its links lead somewhere, its commands parse, its flags and error lines are the code's."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from lib.flags import parsed

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("slurm/*.md"), *ROOT.glob("k8s/*.md")])
OF_OTHER_PROGRAMS = {
    *("--shm-size", "--working-dir", "--head", "--job-name"),  # docker, ray, sbatch
    *(
        "--nodes",
        "--gres",
        "--signal",
        "--no-kill",
        "--mem-per-cpu",
        "--cpus-per-task",
        "--mail-type",
        "--time",
    ),  # sbatch
}

_spec = importlib.util.spec_from_file_location("flags", ROOT / "docs" / "flags.py")
flags = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(flags)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(page: Path) -> list[str]:
    """Return the lines of code blocks, continued ones joined, and the code in the text."""
    text = re.sub(r" \\\n\s*", " ", page.read_text())
    return [*re.findall(r"^ {4}(.+)$", text, re.MULTILINE), *re.findall(r"`([^`\n]+)`", text)]


def commands() -> list[tuple[str, str, str]]:
    """Return (page, job, arguments) of every command that the pages show."""
    found = []
    for page in PAGES:
        for line in code_of(page):
            match = re.search(r"(?:jobs/(\w+)\.py|slurm/(preprocess|train|embed|evaluate)\.sh)((?: .*)?)$", line)
            if match and "…" not in match[3] and page.name != "CHANGELOG.md":
                found.append((name_of(page), match[1] or match[2], match[3]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize(("page", "job", "arguments"), commands())
def test_commands_parse(page, job, arguments, monkeypatch):
    monkeypatch.setenv("DATA_URL", "/data")
    words = shlex.split(re.split(r" (?:&&|\|\||[|;&>]) ", arguments)[0], comments=True)
    if words == ["--help"]:
        return
    if job == "identify" and "--photos" not in words:
        words += ["--photos", "/new"]  # a command named in passing
    parsed(flags.config_of(job), words)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what is gone, too
    named = {target for page in pages for line in code_of(page) for target in re.findall(r"^make ([a-z-]+)", line)}
    assert {"demo", "test", "check", "docs"} <= named
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_flags_named_in_the_text_exist():
    known = set(re.findall(r"`(--[a-z0-9-]+)`", flags.page())) | OF_OTHER_PROGRAMS
    known |= {flag.replace("--", "--no-", 1) for flag in known} | {"--help"}
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        named = {
            flag
            for code in re.findall(r"`(--[^`\n]+)`", page.read_text())
            for flag in re.findall(r"--[a-z-]+(?![a-z.-])", code)
        }
        assert named - known == set(), page


def test_files_named_in_the_text_exist():
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            text = page.read_text()
            named = re.findall(
                r"(?<![\w/$])((?:lib|jobs|bench|tests|docs|slurm|k8s)/[\w/.-]*\w\.(?:py|sh|md|yaml|png))", text
            )
            assert [name for name in named if not (ROOT / name).exists() and name != "slurm/site.sh"] == [], page


def test_the_flag_reference_is_that_of_the_code(monkeypatch):
    monkeypatch.delenv("DATA_URL", raising=False)
    assert flags.PAGE.read_text() == flags.page(), "docs/flags.md is stale: run `make docs`"


def test_every_job_is_in_the_flag_reference():
    assert set(flags.JOBS) == {path.stem for path in (ROOT / "jobs").glob("*.py")}


def test_every_line_of_troubleshooting_is_one_of_the_code():
    nodes = [node for path in (ROOT / "lib").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    said = "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    pieces = [piece for row in rows for line in re.findall(r"`([^`]+)`", row) for piece in line.split("…")]
    assert len(pieces) > 60
    for piece in pieces:
        assert piece.strip(" .:") in said
