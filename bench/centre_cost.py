"""What do class centres cost a worker: seconds and memory of a step, beside the step of the backbone?

A worker's share of the identities is built in this process, as one of so many workers has it; the embeddings are those
of all workers. What workers send each other (one number an image) is left out. Times are processor seconds of one
thread, which other programs on the machine change little. Prints Markdown rows and a line of JSON. Run it as
`python -m bench.centre_cost`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch.nn.functional import normalize

from lib.training.centre_store import CentreStore
from lib.training.flag_groups import LossSettings

NUM_STEPS = 5
SCALED_BATCH = 4
"""Images of the timed step of the backbone; its seconds grow with their number."""


def median_s(act: Callable[[int], None]) -> float:
    """Return the median processor seconds of a call, the first left out."""
    seconds = []
    for step in range(NUM_STEPS + 1):
        began = time.process_time()
        act(step)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds[1:])


def centres_s(num_identities: int, dim: int, rate: float, num_images: int) -> float:
    """Return the seconds of a step of the loss over centres, its gradient and update included."""
    store = CentreStore(
        LossSettings(loss="arcface", sample_rate=rate),
        num_identities=num_identities,
        dim=dim,
        device=torch.device("cpu"),
        seed=0,
    )
    embeddings_ND = normalize(torch.randn(num_images, dim), dim=1).requires_grad_()
    labels_N = torch.randint(num_identities, (num_images,))
    return median_s(lambda step: store.loss(embeddings_ND, labels_N, step=step, lr=1e-3).backward())


def backbone_s(name: str, image_size: int, num_images: int) -> float:
    """Return the seconds of forward and backward of a batch, from those of a few images."""
    model = timm.create_model(name, pretrained=False, num_classes=0).to(memory_format=torch.channels_last)
    images = torch.randn(SCALED_BATCH, 3, image_size, image_size).to(memory_format=torch.channels_last)
    return median_s(lambda _: model(images).square().mean().backward()) * num_images / SCALED_BATCH


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identities", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1])
    parser.add_argument("--batch-size", type=int, default=96, help="images of a worker")
    parser.add_argument("--backbone", default="convnext_tiny")
    parser.add_argument("--image-size", type=int, default=112)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    step_s = backbone_s(flags.backbone, flags.image_size, flags.batch_size)
    rows = []
    print(f"a step of {flags.backbone}, {flags.batch_size} images of {flags.image_size} pixels: {step_s:.2f} s")
    print(
        "| identities | workers | sample rate | seconds a step | of the backbone's |\n| --- | --- | --- | --- | --- |"
    )
    for num_workers in flags.workers:
        for rate in flags.rates:
            seconds = centres_s(flags.identities // num_workers, 128, rate, flags.batch_size * num_workers)
            print(f"| {flags.identities} | {num_workers} | {rate} | {seconds:.3f} | {100 * seconds / step_s:.1f} % |")
            rows.append({"workers": num_workers, "rate": rate, "seconds": round(seconds, 4)})
    print(json.dumps({"bench": "centre_cost", **vars(flags), "backbone_s": round(step_s, 3), "centres": rows}))


if __name__ == "__main__":
    main()
