"""`slurm/forget.sh` on a real Slurm cluster: outputs change once, and every node of the job loses its own copies."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pytest

from tests.slurm.slurm_cluster import SlurmCluster, why_impossible
from tests.training.learnable_faces import write_faces

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

WHERE = ("--cpus-per-task=1", "--mem-per-cpu=1G", "--nodes=2", "--nodelist=node1,node2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if problem := why_impossible():
        assert not os.environ.get("CI"), problem
        pytest.skip(problem)
    with ExitStack() as stack:
        cluster = SlurmCluster(num_hosts=2)
        stack.callback(cluster.close)
        yield cluster


def copies(cluster: SlurmCluster, host: str) -> list[str]:
    """Return the names of the copies of crops on a host."""
    folder = Path(f"/proc/{cluster.host_pids(host)[-1]}/root/tmp/conv-facenet-{os.geteuid()}")
    return sorted(path.name for path in folder.glob("*.arrow"))


def test_all_nodes_lose_their_copies_and_the_outputs_change_once(cluster: SlurmCluster) -> None:
    data = cluster.folder / "the data é"
    write_faces(data / "faces")
    for name, identity in (("faces-01.arrow", "person 1"), ("faces-02.arrow", "person 2")):
        table = pa.table({"photo": [f"{identity}/“0”.jpg"], "identity": [identity], "crop": [b"jpeg"]})
        with pa.OSFile(str(cluster.folder / name), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    folder = f"/tmp/conv-facenet-{os.geteuid()}"
    copy = f"srun --ntasks-per-node=1 sh -c 'mkdir -m 700 {folder}; cp \"{cluster.folder}\"/faces-*.arrow {folder}'"
    assert cluster.wait(cluster.submit(*WHERE, "--output=/dev/null", "--wrap", copy))["JobState"] == "COMPLETED"
    assert copies(cluster, "node1") == copies(cluster, "node2") == ["faces-01.arrow", "faces-02.arrow"]
    job = cluster.submit(*WHERE, "slurm/forget.sh", "--data", str(data), "--identities", "person 1")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), cluster.log(job)
    results = [json.loads(line) for line in cluster.log(job).splitlines() if line.startswith("{")]
    assert [(each["rows"], each["caches_removed"]) for each in results] == [(8, 1), (0, 1)]
    assert copies(cluster, "node1") == copies(cluster, "node2") == ["faces-02.arrow"]
    wrong = cluster.submit(*WHERE, "slurm/forget.sh", "--data", str(data), "--identities", "nobody here")
    assert cluster.wait(wrong)["ExitCode"] == "2:0"
    assert cluster.log(wrong).count("'nobody here' is nowhere") == 1  # the second node is not asked
