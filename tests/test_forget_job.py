"""`jobs/forget.py` over outputs of real jobs: no byte of a person stays, also after kills, and nobody comes back."""

import base64
import io
import json
import logging
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage
from lib.curation.curate_job import CurateConfig, curate
from lib.evaluation.evaluate_job import EvaluateConfig, evaluate
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.preprocess_job import preprocess
from lib.faces.table import read_success
from lib.faces.tombstones import read_tombstones
from lib.forgetting import forget_job
from lib.forgetting.forget_job import ForgetConfig, forget
from lib.recognition.embed_job import EmbedConfig, embed_job
from lib.recognition.embedder import load_embedder
from lib.recognition.identify_job import IdentifyConfig, identify
from lib.recognition.model import keep_threshold
from lib.training.cache_building import build_cache
from lib.training.face_cache import FaceCache
from lib.training.suspects import SuspectLog
from lib.training.usage import usage_table
from tests.job_runner import RayHead, finish, kill_session, run_here, start_job, wait_until

pytestmark = pytest.mark.timeout(600)

PEOPLE = ("Ada Quill", "Ben Fjord é", "Cleo O'Marsh", "Dora Vale", "Emil Stone", "Fay Brook")
GONE = "Cleo O'Marsh"
TABLES = ("faces", "embeddings", "matches", "curation", "runs")


@pytest.fixture(scope="module")
def made(connected_head: RayHead, sample_data: Path, model_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the outputs of every job; names and identities can be told from all other bytes."""
    data = tmp_path_factory.mktemp("forget") / "data é"
    listed = dict(line.rsplit(maxsplit=1) for line in (sample_data / "identities.txt").read_text().splitlines())
    numbers = sorted(set(listed.values()), key=int)
    for name, number in listed.items():
        if numbers.index(number) < len(PEOPLE):
            person = PEOPLE[numbers.index(number)]
            (data / "photos" / person).mkdir(parents=True, exist_ok=True)
            shutil.copy(sample_data / "photos" / name, data / "photos" / person / f"shot-{Path(name).name}")
    late = data / "photos" / PEOPLE[0] / "late.jpg"
    first = min((data / "photos" / PEOPLE[0]).iterdir())
    preprocess(PreprocessConfig(data=str(data), gpus=0))
    shutil.copy(first, late)
    preprocess(PreprocessConfig(data=str(data), gpus=0))  # the version before stays, with the person in it
    run = data / "runs" / "first"
    shutil.copytree(model_url, run / "model")
    cache = FaceCache(build_cache(str(data / "faces"), ["train"], str(data / "cache")))
    write_run(run, cache, read_success(str(data / "faces"))["run_id"])
    embed_job(EmbedConfig(data=str(data), gpus=0))
    evaluate(EvaluateConfig(data=str(data), split="all", num_pairs=200, gpus=0))
    probes = data / "photos" / GONE
    identify(IdentifyConfig(data=str(data), photos=str(probes), gpus=0))
    curate(CurateConfig(data=str(data), gpus=0, threshold=0.05, embeddings=str(data / "embeddings" / "first")))
    rows = "".join(f"{path.relative_to(data / 'photos')},{path.parent.name}\n" for path in probes.parent.rglob("*.jpg"))
    (data / "identities.csv").write_text(f"photo,identity\n{rows}")
    return data


def write_run(run: Path, cache: FaceCache, faces_run_id: str) -> None:
    """Write what a training leaves that names photos."""
    run.joinpath("config.json").write_text(
        json.dumps({"faces_run_id": faces_run_id, "fingerprint": {}, "init": "none"})
    )
    pq.write_table(usage_table(cache.photos, np.ones((3, len(cache)), np.int32)), run / "usage.parquet")
    rows = np.arange(len(cache) - 1)
    suspects = SuspectLog()
    suspects.add(rows, rows + 1, np.linspace(0.1, 0.9, len(rows)))
    pq.write_table(suspects.table(cache.photos, cache.identities, cache.labels_N), run / "suspects.parquet")


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder whose photos are those of the first."""
    folder = tmp_path / "data é"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("photos"))
    (folder / "photos").symlink_to(made / "photos")
    return folder


@pytest.fixture(scope="module")
def needles(made: Path) -> list[bytes]:
    """Return bytes that only the person has: the name in all forms, names of photos, and of the crops."""
    rows = [row for path in (made / "faces").rglob("*.parquet") for row in pq.ParquetFile(path).read().to_pylist()]
    mine = [row for row in rows if row["identity"] == GONE]
    crops = [row["crop"] for row in mine if row["crop"]]
    assert len(crops) >= 5
    names = [GONE, GONE.replace("'", "&#39;"), *(Path(row["photo"]).name for row in mine)]
    middle = [crop[len(crop) // 2 : len(crop) // 2 + 40] for crop in crops]
    return [*(name.encode() for name in names), *middle, *(base64.b64encode(crop)[800:900] for crop in crops)]


def files_with(data: Path, needles: Sequence[bytes], outside: Sequence[str] = ("photos", "forgotten")) -> set[str]:
    """Return the files below a folder that hold one of these bytes, raw or in a column of Parquet or Arrow."""
    found = set()
    for path in data.rglob("*"):
        name = str(path.relative_to(data))
        if path.is_file() and name.split("/")[0] not in outside:
            content = [path.read_bytes(), *cells(path)]
            if any(needle in each for each in content for needle in needles):
                found.add(name)
    return found


def cells(path: Path) -> Iterator[bytes]:
    """Yield the content of each column of a Parquet file, decompressed."""
    if path.suffix == ".parquet":
        for column in pq.ParquetFile(path).read().columns:
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, pa.schema([("column", column.type)])) as writer:
                writer.write_table(pa.table({"column": column}))
            yield sink.getvalue()


def config(data: Path, **more: object) -> ForgetConfig:
    values = {"data": str(data), "identities": (GONE,), "cache_dir": str(data / "cache"), **more}
    return ForgetConfig(**values)  # type: ignore[arg-type]


def the_receipt(data: Path) -> dict:
    (path,) = (data / "forgotten" / "receipts").iterdir()
    return json.loads(path.read_text())


def test_no_byte_of_a_person_stays_and_everybody_else_does(
    made: Path, data: Path, needles: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lib")
    before = files_with(data, needles)
    assert {name.split("/")[0] for name in before} >= {*TABLES, "cache", "identities.csv"}
    assert any(name.endswith("curation.html") for name in before)
    assert any(name.endswith("report.html") for name in before)
    others = rows_of_others(data)
    done = forget(config(data))
    assert files_with(data, needles) == set()
    assert rows_of_others(data) == others
    assert not list((data / "faces" / "_versions").glob("*"))
    receipt = the_receipt(data)
    num = len(list((data / "photos" / GONE).iterdir()))
    assert (done["photos"], len(receipt["photos"]), receipt["identities"]) == (num, num, [GONE])
    assert receipt["counts"]["rows"] == done["rows"] == rows_by_table(receipt)
    assert done["rows"] >= 4 * num
    assert done["models"] == [str(data / "runs" / "first")]
    assert (data / "runs" / "first" / "FORGOTTEN.json").exists()
    model = data / "runs" / "first" / "model"
    assert "Forgotten" in (model / "README.md").read_text()
    digest = load_embedder(str(model)).digest
    assert digest == load_embedder(str(made / "runs" / "first" / "model")).digest  # galleries stay those of the model
    keep_threshold(str(model), 0.2, {})  # writes the card anew
    assert "forgotten later" in (model / "README.md").read_text()
    assert "model/model.safetensors" in receipt["models_trained_on_them"][done["models"][0]]["weights"]
    assert f"{num} photos are gone" in caplog.text
    assert "remove them yourself" in caplog.text
    assert stat.S_IMODE((data / "forgotten" / "key").stat().st_mode) == 0o600
    assert list((data / "photos" / GONE).iterdir())


def rows_of_others(data: Path) -> dict[str, int]:
    """Return the rows of everybody else in each table, by readers."""
    counted = {}
    for name in ("faces", "embeddings/first", "runs/first/report/embeddings/first"):
        success = json.loads((data / name / "_SUCCESS").read_text())
        tables = [pq.ParquetFile(data / name / part).read(["photo", "identity"]) for part in success["parts"]]
        rows = pa.concat_tables(tables).to_pylist() if tables else []
        counted[name] = len([row for row in rows if GONE not in (row["identity"], row["photo"].split("/")[0])])
    return counted


def rows_by_table(receipt: dict) -> int:
    parts = [part for table in receipt["tables"].values() for part in table.values()]
    return sum(part["rows"] for part in parts if "removed" not in part)


def test_a_later_preprocess_leaves_them_out_at_no_cost_for_the_others(
    connected_head: RayHead, data: Path, needles: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lib")
    forget(config(data))
    (data / "identities.csv").unlink()
    num = len(list((data / "photos" / GONE).iterdir()))
    made = preprocess(PreprocessConfig(data=str(data), gpus=0))
    assert files_with(data, needles) == set()
    assert made["photos_copied"] > 0
    assert made["photos_processed"] == 0  # no face was detected again
    assert f"{num} photos are left out" in caplog.text
    card = json.loads((data / "faces" / "card.json").read_text())
    assert (card["forgotten"], card["counts"]["photos"]) == (num, made["photos"])
    photos = EmbedConfig(data=str(data), photos=str(data / "photos"), output=str(data / "again"), gpus=0)
    assert embed_job(photos)["rows"] == made["photos"]
    assert files_with(data, needles) == set()
    assert forget(config(data))["receipt"] is None
    assert "forgotten before" in caplog.text


class Killed(BaseException):
    """Stands for a kill: no handler takes it for an error."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch):
    """Return what makes the process stop before its n-th change of a file; it says how many changes there were."""

    def arm(num: int | None) -> list[int]:
        done = [0]
        for name in ("write_bytes", "remove"):
            real = getattr(storage, name)

            def counted(url: str, *arguments: object, real=real, **more: object) -> None:
                if done[0] == num:
                    raise Killed
                done[0] += 1
                real(url, *arguments, **more)

            monkeypatch.setattr(storage, name, counted)
        return done

    return arm


SHARES = [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98]


@pytest.mark.parametrize(
    "share", [pytest.param(each, marks=[] if each in (0.1, 0.5, 0.9) else pytest.mark.slow) for each in SHARES]
)
def test_killed_before_any_change_the_same_command_goes_on(
    made: Path,
    data: Path,
    needles: list[bytes],
    tmp_path: Path,
    killed_after,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(data, whole, symlinks=True)
    with monkeypatch.context():
        num = killed_after(None)
        forget(config(whole))
    monkeypatch.undo()
    killed_after(int(share * num[0]))
    with pytest.raises(Killed):
        forget(config(data))
    monkeypatch.undo()
    forget(config(data))
    assert files_with(data, needles) == set()
    assert rows_of_others(data) == rows_of_others(whole)
    assert the_receipt(data)["counts"] == the_receipt(whole)["counts"]
    assert list(the_receipt(data)["models_trained_on_them"]) == [str(data / "runs" / "first")]
    card, other = (json.loads((folder / "faces" / "card.json").read_text()) for folder in (data, whole))
    assert (card["forgotten"], card["counts"]) == (other["forgotten"], other["counts"])
    assert not list((data / "forgotten" / "pending").iterdir())


@pytest.mark.slow
def test_kill_9_and_the_same_command(data: Path, needles: list[bytes]) -> None:
    flags = ("--data", str(data), "--identities", GONE, "--cache-dir", str(data / "cache"))
    with start_job("forget.py", *flags) as job:
        wait_until(lambda: any((data / "forgotten").glob("tombstones/*")), job)
        kill_session(job.pid)
        finish(job, 60)
    done = run_here("forget.py", *flags)
    assert done.status == 0, done.errors
    assert files_with(data, needles) == set()
    assert the_receipt(data)["identities"] == [GONE]


def test_photos_are_forgotten_by_name_and_receipts_hold_no_names_if_asked(data: Path) -> None:
    person = data / "photos" / "Dora Vale"
    name = f"Dora Vale/{min(person.iterdir()).name}"
    (data / "names.txt").write_text(f"{name}\n\n")
    done = forget(config(data, identities=(), photos_from=str(data / "names.txt"), names=False))
    assert done["photos"] == 1
    receipt = the_receipt(data)
    assert name not in json.dumps(receipt)
    assert read_tombstones(str(data)).photos == frozenset(receipt["photos"])  # type: ignore[union-attr]
    assert receipt["left_as_they_are"] == [str(data / "names.txt")]
    (data / "names.txt").unlink()
    assert files_with(data, [Path(name).name.encode()]) == set()
    assert files_with(data, [b"Dora Vale"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nobody is named"),
        (["--identities", "Nobody Here"], "'Nobody Here' is nowhere below"),
        (["--photos", "a.jpg", "b.jpg"], "'a.jpg' and 1 more are nowhere below"),
        (["--also", "no such", "--photos", "a.jpg"], "--also"),
    ],
)
def test_who_is_not_there_is_told_in_one_line_and_nothing_changes(data: Path, flags: list[str], message: str) -> None:
    before = sorted(data.rglob("*"))
    for extra in ([], ["--dry-run"]):
        done = run_here("forget.py", "--data", str(data), *flags, *extra)
        assert (done.status, len(done.last_error.splitlines())) == (2, 1)
        assert message in done.last_error
    assert [path for path in sorted(data.rglob("*")) if "forgotten" not in path.parts] == before


def test_a_dry_run_says_what_would_change_and_changes_nothing(data: Path, needles: list[bytes]) -> None:
    before, paths = files_with(data, needles), sorted(data.rglob("*"))
    done = run_here("forget.py", "--data", str(data), "--identities", GONE, "--dry-run")
    assert done.status == 0
    assert done.result["dry_run"] is True
    assert "rows would go from" in done.errors
    assert "would be removed" in done.errors
    assert (files_with(data, needles), sorted(data.rglob("*"))) == (before, paths)


def test_tombstones_of_another_key_are_refused_in_one_line(data: Path) -> None:
    forget(config(data))
    (data / "forgotten" / "key").write_text("00" * 32)
    for script in ("preprocess.py", "forget.py"):
        flags = ["--identities", GONE] if script == "forget.py" else []
        done = run_here(script, "--data", str(data), *flags)
        assert done.status == 2
        assert "is another one" in done.last_error
        assert "put that key back" in done.last_error


def test_a_job_that_keeps_writing_them_ends_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forget_job, "_take_out", lambda *_: 1)
    with pytest.raises(forget_job.JobError, match="another job keeps writing"):
        forget(config(data))


@pytest.mark.slow
def test_it_works_in_a_bucket(made: Path, s3_bucket: str, needles: list[bytes], tmp_path: Path) -> None:
    url = f"{s3_bucket}/my data"
    for path in made.rglob("*"):
        name = str(path.relative_to(made))
        if path.is_file() and name.split("/")[0] not in ("photos", "cache"):
            storage.write_bytes(f"{url}/{name}", path.read_bytes())
    done = forget(ForgetConfig(data=url, identities=(GONE,)))
    assert done["models"] == [f"{url}/runs/first"]
    for info in storage.list_files(url, skip_prefixes=()):
        (tmp_path / info.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / info.path).write_bytes(storage.read_bytes(f"{url}/{info.path}"))
    assert files_with(tmp_path, needles) == set()
    assert json.loads((tmp_path / "faces" / "_SUCCESS").read_text())["version"] == 3
