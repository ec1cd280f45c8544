"""The launchers without Slurm: what they ask it for, and that the command they end in is one the job understands."""

import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from lib import storage
from lib.recognition.embedder import load_embedder
from lib.recognition.embeddings_table import schema
from tests.job_runner import ROOT, environment, run_here

JOBS = ["preprocess", "train", "embed", "identify", "evaluate"]


def bash(*command: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    without_slurm = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", *command],
        cwd=cwd,
        env={**without_slurm, **environment(extra)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("job", JOBS)
def test_a_launcher_asks_slurm_for_what_the_others_ask_for(job: str) -> None:
    """Two nodes with one Ray each, one log, and notice before the end, after which the job is queued again."""
    script = (ROOT / "slurm" / f"{job}.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", script, re.MULTILINE))
    resources = {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "4"}
    log = {"job-name": job, "output": "logs/%x-%j.out", "open-mode": "append"}
    assert asked == resources | log | {"requeue": "", "no-kill": "", "signal": "B:USR1@120"}
    assert script.startswith("#!/bin/bash\n")
    assert len(re.findall("^#SBATCH", script, re.MULTILINE)) == len(asked)


@pytest.fixture(scope="module")
def gallery_url(model_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return embeddings of one person by the model."""
    url = str(tmp_path_factory.mktemp("a gallery"))
    model = {"digest": load_embedder(model_url).digest, "embedding_dim": 16, "template": "eyes"}
    row = {"photo": "a", "identity": "A", "status": "aligned", "embedding": [0.0] * 16}
    rows = pa.Table.from_pylist([row], schema=schema(16, "{}", json.dumps(model)))
    storage.write_parquet(f"{url}/split=test/part-000000.parquet", rows)
    storage.write_json(f"{url}/_SUCCESS", {"run_id": "1", "fingerprint": {}, "counts": {}})
    return url


@pytest.mark.parametrize("job", JOBS)
def test_the_command_of_a_launcher_is_one_the_job_understands(
    job: str, sample_data: Path, faces_url: str, model_url: str, gallery_url: str, tmp_path: Path
) -> None:
    flags = {
        "preprocess": ["--data", str(sample_data)],
        "train": ["--data", str(tmp_path), "--faces", faces_url, "--backbone", "test_convnext", "--name", "a 'b'"],
        "embed": ["--model", model_url, "--faces", faces_url, "--output", str(tmp_path / 'a "b"')],
        "identify": ["--model", model_url, "--gallery", gallery_url, "--photos", str(sample_data / "photos")],
        # The test split of so few people is too small to make pairs of.
        "evaluate": ["--model", model_url, "--faces", faces_url, "--split", "train", "--output", str(tmp_path / "c d")],
    }
    launcher = (ROOT / "slurm" / f"{job}.sh").read_text()
    assert launcher.count("exec slurm/ray-cluster.sh ") == 1
    printed = launcher.replace("exec slurm/ray-cluster.sh ", "printf '%s\\n' ")
    told = bash("-c", printed, f"{job}.sh", *flags[job], "--dry-run", SLURM_JOB_NUM_NODES="2")
    script, *arguments = told.stdout.splitlines()
    done = run_here(Path(script).name, *arguments)
    assert done.status == 0, done.errors
    assert (done.result["job"], done.result["dry_run"]) == (job, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", JOBS)
def test_a_launcher_leaves_the_choice_of_gpus_to_the_job(job: str) -> None:
    echoed = (ROOT / "slurm" / f"{job}.sh").read_text().replace("exec slurm/ray-cluster.sh ", "echo ")
    done = bash("-c", echoed, f"{job}.sh", "--name", "a  b", SLURM_JOB_NUM_NODES="3", SLURM_GPUS_ON_NODE="2")
    assert done.stdout == f"jobs/{job}.py --name a  b\n"


# They stand for Slurm's programs: what is asked of them is written down, and the command of a step runs here.
SRUN = """#!/bin/bash
[ "$1" = --help ] && exit
node=; while [[ $1 == --* ]]; do [[ $1 != --nodelist=* ]] || node=${1#*=}; shift; done
printf '%s:%s\\n' "$node" "$*" >> "$ASKED"
[ "$node" != "${FAILS_ON:-}" ] || { kill -USR1 $PPID; exec sleep 20; }
"""
SCONTROL = """#!/bin/bash
[ "$1" != requeue ] || { echo "$*" >> "$ASKED"; exit; }
printf 'node1\\nnode2\\nnode3\\n'
"""


@pytest.mark.parametrize("fails_on", ["", "node2"])
def test_forget_runs_on_one_node_after_the_other_and_goes_on_after_the_time_limit(
    tmp_path: Path, fails_on: str
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-3]", "ASKED": str(tmp_path / "asked")}
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "FAILS_ON": fails_on}
    done = bash("slurm/forget.sh", "--identities", "Ada  Quill", "it's", **slurm, **path)
    asked = (tmp_path / "asked").read_text().splitlines()
    command = "python jobs/forget.py --identities Ada  Quill it's"
    if fails_on:
        assert asked == [f"node1:{command}", f"node2:{command}", "requeue 7"]
        assert done.returncode == 75
    else:
        assert asked == [f"{node}:{command}" for node in ("node1", "node2", "node3")]
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("launcher", "job"), [("ray-cluster", "train"), ("forget", "forget")])
def test_outside_of_slurm_the_next_step_is_told(launcher: str, job: str) -> None:
    done = bash(f"slurm/{launcher}.sh", "jobs/train.py")
    assert done.returncode == 2
    assert f"sbatch slurm/{job}.sh" in done.stderr


def test_a_container_that_cannot_be_is_refused_with_what_can() -> None:
    done = bash("slurm/ray-cluster.sh", "jobs/train.py", SLURM_JOB_ID="1", SLURMD_NODENAME="n", CONTAINER="/no/image")
    assert done.returncode == 2
    assert "error: CONTAINER is '/no/image': an Apptainer image (*.sif)" in done.stderr


def test_the_example_of_site_settings_changes_nothing_until_it_is_edited() -> None:
    before, after = (bash("-c", f"{source}; set").stdout for source in ("true", ". slurm/site.example.sh"))
    unlike = {line for line in {*before.splitlines()} ^ {*after.splitlines()} if not line.startswith(("BASH", "_="))}
    assert unlike == set()


def test_jobs_whose_ids_differ_by_4000_take_other_ports_on_one_node() -> None:
    functions = re.search(
        r"^choose_ports\(\).*?^in_use\(\)[^\n]*", (ROOT / "slurm/ray-cluster.sh").read_text(), re.S | re.M
    )
    assert functions
    chosen = f"{functions[0]}\nhead_ip=127.0.0.1\nchoose_ports\necho $port"
    first = int(bash("-c", chosen, SLURM_JOB_ID="7").stdout)
    with socket.socket() as taken:  # the dashboard of the first job
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", first + 2))
        taken.listen()
        assert int(bash("-c", chosen, SLURM_JOB_ID="4007").stdout) == first + 3
    assert 20000 <= first < 32000 - 3


def test_every_node_may_open_as_many_files_as_the_site_allows() -> None:
    asked = "ulimit -Sn 256; . slurm/environment.sh; echo $(ulimit -n) $(ulimit -Hn)"
    soft, hard = bash("-c", asked, SLURM_JOB_ID="7").stdout.split()
    assert soft == "65536" if hard == "unlimited" else int(soft) == min(65536, int(hard))
