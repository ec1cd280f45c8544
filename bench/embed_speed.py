"""How much of a model's bare forward the whole path of embed's worker keeps: read, decode, embed, write.

    python -m bench.embed_speed
    python -m bench.embed_speed --device cuda --backbone convnext_tiny --image-size 240 --threads 16

In turns, in one process: the model over tensors that lie on the device, and a worker of jobs/embed.py over the parts of
a faces table, with as many parts in hand as the job gives it. On a GPU both are compiled and compute in bf16 where it
has that. Prints one line of JSON with medians. Faces are those of drawn people, repeated.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bench.inputs import drawn, run_job
from lib import device as devices
from lib import storage
from lib.faces import table
from lib.recognition.blocks import CPU_BLOCK, GPU_BLOCK
from lib.recognition.embed_job import CPU_PARTS, GPU_PARTS
from lib.recognition.embed_worker import Computing, EmbedWorker
from lib.recognition.embedder import COMPILING_PAYS, TorchEmbedder, load_embedder
from lib.recognition.model import EmbeddingModel, ModelSpec, load_model, normalized_images, save_model

Item = dict[str, Any]


def parts_of(folder: Path, num_parts: int, num_faces: int) -> tuple[list[Item], dict[str, Any]]:
    """Return items for a worker, of so many aligned faces each, and the fingerprint of the faces."""
    data = drawn(folder / "data", 24, 5)
    faces = run_job("preprocess.py", "--data", str(data))["faces"]
    success = table.read_success(faces)
    rows = [row for name in success["parts"] for row in storage.read_parquet(f"{faces}/{name}").to_pylist()]
    aligned = itertools.cycle([row for row in rows if row["status"] == table.ALIGNED])
    items = []
    for number in range(num_parts):
        part = pa.Table.from_pylist(list(itertools.islice(aligned, num_faces)), schema=table.SCHEMA)
        url = str(folder / f"part {number}.parquet")
        storage.write_parquet(url, part, compression="zstd")
        items.append({"faces": url, "name": f"split=train/part-{number}.parquet"})
    return items, success["fingerprint"]


def model_of(folder: Path, options: argparse.Namespace, fingerprint: dict[str, Any]) -> str:
    """Return a model folder with random weights."""
    torch.manual_seed(0)
    spec = ModelSpec(
        backbone=options.backbone, image_size=options.image_size, embedding_dim=512, fingerprint=fingerprint
    )
    save_model(EmbeddingModel(spec), str(folder / "model"))
    return str(folder / "model")


def bare_forward(url: str, device: torch.device) -> Callable[[int], None]:
    """Return what runs the model over so many faces that lie on the device already."""
    is_gpu = device.type == "cuda"
    model = load_model(url).to(device).to(memory_format=torch.channels_last)
    size, side = GPU_BLOCK if is_gpu else CPU_BLOCK, model.spec.image_size
    crops_NHWC = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, device=device)
    forward = devices.compiled(model, "auto", device)
    precision = devices.chosen_precision("auto", device)

    def run(num_faces: int) -> None:
        with torch.inference_mode(), devices.autocast(device, precision):
            for start in range(0, num_faces, size):
                # A GPU's last block is a whole one, as the worker's is.
                chosen = crops_NHWC if is_gpu else crops_NHWC[: num_faces - start]
                forward(normalized_images(chosen, model.spec))
        if is_gpu:
            torch.cuda.synchronize(device)

    return run


def worker_of(
    url: str, folder: Path, fingerprint: dict[str, Any], options: argparse.Namespace
) -> Callable[[list[Item]], None]:
    """Return what embeds parts as a worker of the job does."""
    is_gpu = options.device == "cuda"
    embedder = load_embedder(url)
    assert isinstance(embedder, TorchEmbedder)
    about = {"digest": embedder.digest, "embedding_dim": embedder.embedding_dim, "template": embedder.template}
    how = Computing(use_gpu=is_gpu, num_threads=options.threads, num_faces=COMPILING_PAYS)
    worker = EmbedWorker((url, None, False), str(folder / "embeddings"), None, fingerprint, about, how)
    pool = ThreadPoolExecutor(GPU_PARTS if is_gpu else CPU_PARTS)

    def run(items: list[Item]) -> None:
        failures = [done["failure"] for done in pool.map(worker, items) if done["failure"]]
        if failures:
            raise SystemExit(failures[0])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backbone", default="convnext_atto")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--threads", type=int, default=1, help="that decode")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--faces", type=int, default=256, help="of a part")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    device = devices.worker_device(use_gpu=options.device == "cuda")
    times: dict[str, list[float]] = {"bare": [], "worker": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items, fingerprint = parts_of(folder, options.parts, options.faces)
        url = model_of(folder, options, fingerprint)
        worker = worker_of(url, folder, fingerprint, options)  # sets the threads of this process
        bare = bare_forward(url, device)
        bare(2 * CPU_BLOCK)
        worker(items[:1])
        for _ in range(options.rounds):
            began = time.perf_counter()
            for _ in items:
                bare(options.faces)
            between = time.perf_counter()
            worker(items)
            times["bare"].append(between - began)
            times["worker"].append(time.perf_counter() - between)
    ratios = np.array(times["bare"]) / np.array(times["worker"])
    num_faces = options.parts * options.faces
    print(
        json.dumps(
            {
                "bench": "embed_speed",
                "on": devices.device_name(device),
                "bare_faces_per_s": round(num_faces / statistics.median(times["bare"]), 1),
                "worker_faces_per_s": round(num_faces / statistics.median(times["worker"]), 1),
                "worker_to_bare": round(float(np.median(ratios)), 3),
                "ratios": sorted(round(float(ratio), 3) for ratio in ratios),
                **vars(options),
            }
        )
    )


if __name__ == "__main__":
    main()
