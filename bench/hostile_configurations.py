"""Wrong flags and damaged small files for every job's --dry-run: does it end with one line that says why?

A small world (drawn photos, their faces, a trained run, embeddings) is made once by the jobs themselves. Each
configuration follows from seed and number: a base command with one to three odd flags, or with one file damaged.
They run in a child of this process; where one dies or hangs it counts, and a new child goes on behind it.
A fault is a traceback, another exit status than 0, 1 or 2, a refusal of no line or of several, or over 60 seconds.
`--only NUMBER` shows one configuration. Prints one line of JSON last.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench.inputs import ROOT, job_environment, run_job
from lib import storage

HUNG_SECONDS = 60.0
_START_SECONDS = 300.0

_NOT_TRIED = {"--wait-minutes", "--until-done", "--dry-run", "--no-dry-run", "--help"}
"""Flags that wait as they are asked to, and those that would do more than check."""

_SMALL = (
    *("--backbone", "test_resnet", "--image-size", "64", "--epochs", "1"),
    *("--triplets-per-epoch", "32", "--batch-size", "32"),
)

_ODD = (
    *(
        "",
        " ",
        "0",
        "-1",
        "1",
        "2",
        "nan",
        "inf",
        "1e309",
        "0.5",
        "99999999999999999999",
        "None",
        "auto",
        "True",
        "[]",
        "{}",
    ),
    *("a\nb", "é", "\u202e", "x" * 5000, "1,2,3", ",", "--", "-", "~", ".", "..", "/", "*", "%s", "{0}", "\x7f", "'\""),
    *("s3://", "s3://bucket/x", "http://127.0.0.1:9/x", "file:///", "zip://x", "memory://x", "nosuch://x", "://"),
    *("/dev/null", "/dev/zero", "/proc/self/mem", "/nowhere/x", "/etc/passwd", "/etc"),
)
_COMMANDS = (
    ("preprocess.py", ()),
    ("preprocess.py", ("--overwrite",)),
    ("train.py", ("--name", "one", *_SMALL)),
    ("train.py", ("--name", "new", *_SMALL)),
    ("train.py", ("--name", "new", "--init", "{world}/runs/one/model", "--backbone", "test_resnet")),
    ("embed.py", ()),
    ("embed.py", ("--photos", "{world}/photos", "--output", "{world}/embeddings/other")),
    ("evaluate.py", ()),
    ("evaluate.py", ("--pairs", "{world}/pairs.csv", "--photos", "{world}/photos")),
    ("identify.py", ("--photos", "{world}/photos")),
    ("export.py", ()),
    ("compare.py", ()),
    ("sweep.py", ("--name", "new", "--backbones", "test_resnet", "--epochs", "1")),
    ("pipeline.py", ("--train.name", "new", "--train.backbone", "test_resnet")),
    ("sample.py", ("--identities", "80", "--photos-per-identity", "4")),
)
_JSON_VALUES: tuple[Any, ...] = (None, True, 0, -1, 1e308, "x", "", [], {}, [[]], {"a": None}, "nan")


def make_world(folder: Path) -> None:
    """Make everything that jobs read, by the jobs."""
    data = ("--data", str(folder))
    run_job("sample.py", *data, "--identities", "80", "--photos-per-identity", "4")
    run_job("preprocess.py", *data)
    run_job("train.py", *data, "--name", "one", *_SMALL, "--workers", "1")
    run_job("embed.py", *data)
    pairs = [f"{who:05}_000.jpg,{who + 1 - is_same:05}_001.jpg,{is_same}" for who in range(40) for is_same in (1, 0)]
    (folder / "pairs.csv").write_text("\n".join(["photo_a,photo_b,same", *pairs]))
    for script, base in _COMMANDS:
        status, _, errors = run_here(script, *arguments_of(base, folder))
        assert status == 0, f"{script} {base} fails already: {errors}"


def arguments_of(base: tuple[str, ...], world: Path) -> list[str]:
    """Return the arguments of a command before anything odd."""
    return ["--data", str(world), *(each.format(world=world) for each in base), "--dry-run"]


def flags_of(script: str) -> list[str]:
    """Return the flags that a job's help names."""
    status, output, errors = run_here(script, "--help")
    assert status == 0, errors
    return sorted(
        flag
        for flag in set(re.findall(r"--[a-z][a-z.-]+", output))
        if f"--{flag.strip('-').split('.')[-1]}" not in _NOT_TRIED
    )


def run_here(script: str, *arguments: str) -> tuple[int, str, str]:
    """Run a job in this process; return its status, its output and its errors."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, job_environment(), clear=True),
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(logging.getLogger(), "handlers", []),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(ROOT / "jobs" / script), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
    return status, output.getvalue(), errors.getvalue()


def damaged_json(text: str, rng: random.Random) -> bytes:
    """Return JSON of another shape: a value somewhere in it is replaced, or a key is gone or added."""
    try:
        content = json.loads(text)
    except ValueError:
        return b"[1]"
    parent: Any = None
    key: Any = None
    inner = content
    while isinstance(inner, dict | list) and inner and rng.random() < 0.75:
        parent, key = inner, rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        inner = inner[key]
    if parent is None:
        content = rng.choice(_JSON_VALUES)
    elif isinstance(parent, dict) and rng.random() < 0.3:
        del parent[key]
    else:
        parent[key] = rng.choice(_JSON_VALUES)
    return json.dumps(content).encode()


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file of the world; return how."""
    content = path.read_bytes()
    kinds = ["empty", "cut", "flipped", "noise", "gone", "folder", "pipe", "loop", "latin-1", "nul", "twice", "json"]
    kind = rng.choice(kinds)
    if kind in ("gone", "folder", "pipe", "loop"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path.name)
        return kind
    flipped = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    path.write_bytes(
        {
            "empty": lambda: b"",
            "cut": lambda: content[: rng.randrange(len(content) + 1)],
            "flipped": lambda: bytes(flipped),
            "noise": lambda: rng.randbytes(rng.randint(1, 2000)),
            "latin-1": lambda: "é à ñ;1\n".encode("latin-1") + content,
            "nul": lambda: content.replace(b" ", b"\0").replace(b",", b"\0"),
            "twice": lambda: content * 2,
            "json": lambda: damaged_json(content.decode("utf-8", "replace"), rng),
        }[kind]()
    )
    return kind


def configuration(world: Path, seed: int, number: int, flags: dict[str, list[str]]) -> tuple[str, list[str], str]:
    """Damage the world, or choose odd flags; return the job, its arguments and what was done."""
    rng = random.Random(f"{seed} {number}")
    script, base = rng.choice(_COMMANDS)
    arguments = arguments_of(base, world)
    if rng.random() < 0.5:
        files = sorted(p for p in world.rglob("*") if p.is_file() and "photos" not in p.relative_to(world).parts[:1])
        path = rng.choice(files)
        return script, arguments, f"{damage(path, rng)} {path.relative_to(world)}"
    odd = []
    for flag in rng.sample(flags[script], rng.randint(1, 3)):
        inside = [str(path) for path in sorted(world.rglob("*"))]
        odd += [
            flag,
            *([] if rng.random() < 0.1 else [rng.choice(inside) if rng.random() < 0.25 else rng.choice(_ODD)]),
        ]
    return script, arguments + odd, " ".join(odd)


def fault_of(status: int, output: str, errors: str) -> str | None:
    """Return what is wrong with how a job ended."""
    if "Traceback" in errors + output:
        return "traceback"
    if status not in (0, 1, 2):
        return f"status {status}"
    said = [line for line in errors.splitlines() if re.match(r"(error|failed): ", line)]
    if status == 0:
        return "done, and complains" if said else None
    after = errors.splitlines()[errors.splitlines().index(said[0]) :] if said else []
    return None if len(said) == len(after) == 1 else f"{len(after)} lines"


def work(first: int, last: int, seed: int, world: Path) -> None:
    """Run the configurations from `first` on; print a line of JSON before and after each."""
    real = sys.stdout
    storage.RETRY_SECONDS = storage.CHECK_RETRY_SECONDS = 0.0
    flags = {script: flags_of(script) for script, _ in _COMMANDS}
    for number in range(first, last):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / "w"
            shutil.copytree(world, copy)
            script, arguments, what = configuration(copy, seed, number, flags)
            told: dict[str, Any] = {"number": number, "job": script, "what": what[:300]}
            print(json.dumps(told), file=real, flush=True)
            status, output, errors = run_here(script, *arguments)
            told |= {"status": status, "fault": fault_of(status, output, errors), "errors": errors[-2000:]}
            print(json.dumps(told), file=real, flush=True)


def results(number_of: int, seed: int, world: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """Yield how each configuration ended, one that died or hung too."""
    while first < number_of:
        command = [sys.executable, "-m", "bench.hostile_configurations", "--configurations", str(number_of)]
        command += ["--seed", str(seed), "--world", str(world), "--worker-from", str(first)]
        begun: dict[str, Any] = {}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=job_environment(), text=True
        ) as process:
            assert process.stdout is not None
            killer = threading.Timer(_START_SECONDS, process.kill)
            killer.start()
            for line in process.stdout:
                killer.cancel()
                killer = threading.Timer(HUNG_SECONDS, process.kill)
                killer.start()
                begun = json.loads(line)
                if "status" in begun:
                    first = begun["number"] + 1
                    yield begun
            killer.cancel()
            fault = "hang" if process.wait() == -signal.SIGKILL else f"died with {process.returncode}"
        if first < number_of:
            assert begun.get("number") == first, "the process ended before it ran a job"
            yield {**begun, "status": None, "fault": fault, "errors": ""}
            first += 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--world", type=Path, help="made there where it is missing, and kept")
    parser.add_argument("--worker-from", type=int)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    if given.worker_from is not None:
        work(given.worker_from, given.configurations, given.seed, given.world)
        return
    with tempfile.TemporaryDirectory() as scratch:
        world = (given.world or Path(scratch) / "world").resolve()
        if not (world / "embeddings").is_dir():
            make_world(world)
        if given.only is not None:
            print(json.dumps(next(results(given.only + 1, given.seed, world, given.only)), indent=1))
            return
        statuses, faults = Counter[str](), []
        for result in results(given.configurations, given.seed, world):
            statuses[str(result["status"])] += 1
            if result["fault"]:
                faults.append(result)
                print(json.dumps(result), file=sys.stderr, flush=True)
    kinds = Counter(fault["fault"] for fault in faults)
    figures = {"configurations": given.configurations, "seed": given.seed, "statuses": dict(statuses)}
    print(json.dumps({"bench": "hostile_configurations", **figures, "faults": dict(kinds)}))


if __name__ == "__main__":
    main()
