"""Seconds and memory of `jobs/evaluate.py --ijb` on a set as large as IJB-C, but for the embedding itself.

    python -m bench.ijb --images 469375

The set is made up: its images are empty files, and random vectors around a centre for each subject are written in place
of embeddings, part by part, where the workers would write them. All else is the job: it reads and checks the files,
averages templates, and measures 15.6 million pairs and 19,593 probes in two galleries. It runs in a process of its own,
whose peak of memory is printed. `--protocol ours` adds intervals by resampling. Prints one line of JSON last.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.csv

from lib import storage
from lib.evaluation import ijb_embedding
from lib.evaluation.evaluate_job import EvaluateConfig, evaluate
from lib.evaluation.ijb_embedding import PART_IMAGES
from lib.evaluation.set_figures import Protocol
from lib.part_workers import Processed
from lib.recognition import embeddings_table
from lib.recognition.model import EmbeddingModel, save_model
from lib.recognition.spec import ModelSpec

NUM_SUBJECTS, NUM_TEMPLATES, NUM_SAME, NUM_PAIRS = 3_531, 23_124, 19_557, 15_658_489
"""Of IJB-C."""
DIM, NOISE = 512, 0.3


def make(folder: Path, num_images: int) -> None:
    """Write a set of so many images and as many templates and pairs as IJB-C has, smaller in proportion."""
    share = num_images / 469_375
    num_subjects, num_templates = max(20, int(NUM_SUBJECTS * share)), max(120, int(NUM_TEMPLATES * share))
    rng = np.random.default_rng(0)
    subject_T = np.arange(num_templates) % num_subjects
    template_N = np.concatenate([np.arange(num_templates), rng.integers(num_templates, size=num_images)])[:num_images]
    images = np.char.add(np.arange(1, num_images + 1).astype(str), ".jpg")
    (folder / "loose_crop").mkdir(parents=True)
    (folder / "meta").mkdir()
    for image in images:
        (folder / "loose_crop" / image).touch()
    meta = folder / "meta" / "ijbc"
    write(f"{meta}_face_tid_mid.txt", [images, template_N, rng.integers(num_images // 3 + 1, size=num_images)])
    points_NX = rng.uniform(0, 200, (num_images, 10)).round(3)
    write(f"{meta}_name_5pts_score.txt", [images, *points_NX.T, rng.uniform(0.5, 1, num_images).round(3)])
    num_same, num_pairs = max(500, int(NUM_SAME * share)), max(20_000, int(NUM_PAIRS * share))
    a_P, b_P = rng.integers(num_templates, size=(2, num_pairs))
    a_P[:num_same] = rng.integers(num_templates - num_subjects, size=num_same)
    b_P[:num_same] = a_P[:num_same] + num_subjects
    write(f"{meta}_template_pair_label.txt", [a_P, b_P, (subject_T[a_P] == subject_T[b_P]).astype(np.int8)])
    half = num_subjects // 2
    for name, templates in (
        ("gallery_G1", np.arange(half)),
        ("gallery_G2", np.arange(half, num_subjects)),
        ("probe_mixed", np.arange(num_subjects, num_templates)),
    ):
        write(f"{meta}_1N_{name}.csv", [templates, subject_T[templates]], header="TEMPLATE_ID,SUBJECT_ID\n")
    np.save(folder / "subjects.npy", subject_T[template_N])
    save_model(
        EmbeddingModel(ModelSpec(backbone="test_convnext", image_size=64, embedding_dim=DIM)), str(folder / "model")
    )


def write(path: str, columns: list[np.ndarray], *, header: str = "") -> None:
    """Write columns as text, after a header if there is one."""
    table = pa.table({str(n): column for n, column in enumerate(columns)})
    options = pa.csv.WriteOptions(include_header=False, delimiter="," if header else " ", quoting_style="none")
    with Path(path).open("wb") as file:
        file.write(header.encode())
        pa.csv.write_csv(table, file, options)


def peak_mb() -> int:
    """Return the peak of this process's memory. That of `getrusage` would be the parent's, where it was larger."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1000


def measure(folder: str, protocol: Protocol) -> dict[str, Any]:
    """Run the job in this process; return seconds and the peak of memory."""
    before = peak_mb()
    subject_N = np.load(f"{folder}/subjects.npy")
    centre_ID = np.random.default_rng(1).standard_normal((int(subject_N.max()) + 1, DIM)).astype(np.float32)
    centre_ID /= np.linalg.norm(centre_ID, axis=1, keepdims=True)
    embedding_s = 0.0

    def random_parts(items: list[dict[str, Any]], _: type, arguments: tuple[Any, ...], **__: Any) -> Processed:
        nonlocal embedding_s
        started = time.monotonic()
        planned, (_, output, _, fingerprint, model, _) = arguments[1:]
        schema = embeddings_table.schema(DIM, json.dumps(fingerprint), json.dumps(model))
        for item in items:
            with storage.open_parquet(planned) as file:
                rows = file.read_row_group(item["part"])
            rng = np.random.default_rng(item["part"])
            first = item["part"] * PART_IMAGES
            vectors_ND = centre_ID[subject_N[first : first + len(rows)]]
            vectors_ND = vectors_ND + NOISE * rng.standard_normal(vectors_ND.shape, np.float32)
            vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
            columns: dict[str, Any] = {name: pa.nulls(len(rows), schema.field(name).type) for name in schema.names}
            columns |= {"photo": rows["photo"], "status": pa.repeat(pa.scalar("aligned"), len(rows))}
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), DIM)
            part = pa.Table.from_arrays(list(columns.values()), schema=schema)
            storage.write_parquet(storage.join(output, item["name"]), part, compression="zstd")
        embedding_s = time.monotonic() - started
        return Processed(len(subject_N), 0, embedding_s)

    started = time.monotonic()
    config = EvaluateConfig(
        model=(f"{folder}/model",),
        ijb=folder,
        output=f"{folder}/out",
        protocol=protocol,
        gpus=0,
    )
    with (
        mock.patch.object(ijb_embedding, "run_parts", random_parts),
        mock.patch.object(ijb_embedding.cluster, "connected", nullcontext),
        mock.patch.object(ijb_embedding, "chosen_gpus", return_value=0),
    ):
        result = evaluate(config)
    return {
        "protocol": protocol,
        "s": round(time.monotonic() - started - embedding_s, 1),
        "s_of_random_vectors": round(embedding_s, 1),
        "mb": peak_mb(),
        "mb_at_start": before,
        "tar_at_far": result["tar_at_far"],
        "identification": result["identification"],
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=46_937)
    parser.add_argument("--protocols", nargs="+", default=["insightface", "ours"])
    given = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory(prefix="ijb ") as scratch:
        folder = Path(scratch) / "set"
        started = time.monotonic()
        make(folder, given.images)
        print(f"made in {time.monotonic() - started:.0f} s", flush=True)
        for protocol in given.protocols:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                figures.append(pool.apply(measure, (str(folder), protocol)))
            print(figures[-1], flush=True)
    print(json.dumps({"bench": "ijb", "images": given.images, "figures": figures}))


if __name__ == "__main__":
    main()
