"""The detector for batches of pictures, as tensor code: float16 on a GPU, float32 on a CPU.

The faces of a picture depend on that picture only: its canvas follows from its own size, and each canvas size runs in
batches of one fixed size.

Shape suffixes: B pictures of a batch, A anchors, N anchors over the floor, F faces, 3 colours (RGB).
"""

import itertools
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from lib.faces import detection
from lib.faces.detection import CLOSE_UP_SIDE, Detections
from lib.faces.retinaface import load_network

BATCH_SIZES = {"cuda": 16, "cpu": 2}
"""Pictures in a batch of the network. Fixed, because the last digits of the results depend on it."""

_CANVAS_STEP = 320
"""Sides of a canvas are multiples of this. Almost all photos then need one of four sizes, so batches are full."""

_VOTING_FACES = 256
"""Faces whose votes are counted at once, to bound the memory for a crowd."""


class BatchDetector:
    """RetinaFace with MobileNet-0.25 for batches of pictures on one device; several threads may call it."""

    def __init__(self, weights: bytes, device: torch.device, *, is_torch: bool = False) -> None:
        """Load the network. `weights` is the content of an .onnx file, or of a .pth file if `is_torch`.

        Raises:
            UserError: the weights belong to another network.
        """
        self.device = device
        self._batch_size = BATCH_SIZES[device.type]
        network = load_network(weights, is_torch=is_torch)
        first = network.stages[0][0]  # type: ignore[index]
        first.weight.copy_(first.weight.flip(1))  # it was trained on BGR
        self._dtype = torch.float16 if device.type == "cuda" else torch.float32
        self._network = network.to(device, self._dtype).to(memory_format=torch.channels_last)
        self._mean_311 = torch.tensor(detection.MEAN_BGR[::-1], device=device).view(3, 1, 1)
        self._pool: Any = None
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}
        self._lock = threading.Lock()

    @property
    def arithmetic(self) -> str:
        """The arithmetic of the network."""
        return str(self._dtype).removeprefix("torch.")

    def detect(self, pictures: Sequence[Tensor]) -> list[Detections]:
        """Return the faces of each picture (uint8 RGB [3, H, W] on the device, any sizes)."""
        by_canvas: dict[tuple[int, int], list[int]] = {}
        for index, picture in enumerate(pictures):
            by_canvas.setdefault(_canvas_size(*picture.shape[1:]), []).append(index)
        chunks = [
            (canvas, indices[start : start + self._batch_size])
            for canvas, indices in by_canvas.items()
            for start in range(0, len(indices), self._batch_size)
        ]
        if not chunks:
            return []
        with self._lock, torch.inference_mode():
            found = [self._candidates(canvas, indices, pictures) for canvas, indices in chunks]
            return _faces([torch.cat(parts) for parts in zip(*found, strict=True)], len(pictures))

    def _candidates(
        self, canvas: tuple[int, int], indices: list[int], pictures: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return picture [N], score [N], box [N, 4] and landmarks [N, 10] of all anchors over the floor."""
        height, width = canvas
        canvas_B3HW = torch.zeros((self._batch_size, 3, height, width), dtype=torch.uint8, device=self.device)
        for place, index in enumerate(indices):
            picture = pictures[index]
            canvas_B3HW[place, :, : picture.shape[1], : picture.shape[2]] = picture
        offsets_BA4, probabilities_BA2, points_BA10 = self._run(canvas_B3HW)
        scores_BA = probabilities_BA2[: len(indices), :, 1]
        places_N, kept_N = (scores_BA > detection.SCORE_FLOOR).nonzero(as_tuple=True)
        anchors_N4 = _anchors(height, width, self.device)[kept_N]
        boxes_N4, points_N10 = _decoded(anchors_N4, offsets_BA4[places_N, kept_N], points_BA10[places_N, kept_N])
        pictures_N = torch.tensor(indices, device=self.device)[places_N]
        return pictures_N, scores_BA[places_N, kept_N], boxes_N4, points_N10

    def _run(self, canvas_B3HW: Tensor) -> tuple[Tensor, ...]:
        if self.device.type != "cuda":
            return self._forward(canvas_B3HW)
        size = (canvas_B3HW.shape[2], canvas_B3HW.shape[3])
        if size not in self._graphs:
            self._graphs[size] = self._captured(canvas_B3HW)
        graph, given, outputs = self._graphs[size]
        given.copy_(canvas_B3HW)
        graph.replay()
        return outputs

    def _captured(self, canvas_B3HW: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]:
        """Record the forward pass of a canvas as a CUDA graph: replaying it is one launch instead of two hundred."""
        given = canvas_B3HW.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # All graphs share one memory pool, because they never run at the same time.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._forward(given)
        return graph, given, outputs

    def _forward(self, canvas_B3HW: Tensor) -> tuple[Tensor, ...]:
        pictures = (canvas_B3HW.float() - self._mean_311).to(self._dtype, memory_format=torch.channels_last)
        return tuple(output.float() for output in self._network(pictures))


def _canvas_size(height: int, width: int) -> tuple[int, int]:
    if max(height, width) <= CLOSE_UP_SIDE:
        return CLOSE_UP_SIDE, CLOSE_UP_SIDE
    return -(-height // _CANVAS_STEP) * _CANVAS_STEP, -(-width // _CANVAS_STEP) * _CANVAS_STEP


@lru_cache(maxsize=128)
def _anchors(height: int, width: int, device: torch.device) -> Tensor:
    return torch.from_numpy(detection._anchors(height, width)).to(device)


def _decoded(anchors_N4: Tensor, offsets_N4: Tensor, points_N10: Tensor) -> tuple[Tensor, Tensor]:
    """Return boxes [N, 4] and landmarks [N, 10] in pixels: offsets from anchors as in SSD (Liu et al. 2016, eq. 2)."""
    centres_N2, sides_N1 = anchors_N4[:, :2], anchors_N4[:, 2:3]
    box_centres_N2 = centres_N2 + detection._VARIANCE_CENTRE * sides_N1 * offsets_N4[:, :2]
    half_sizes_N2 = sides_N1 * (detection._VARIANCE_SIZE * offsets_N4[:, 2:]).exp() / 2
    points_N52 = centres_N2[:, None] + detection._VARIANCE_CENTRE * sides_N1[:, None] * points_N10.view(-1, 5, 2)
    return torch.cat([box_centres_N2 - half_sizes_N2, box_centres_N2 + half_sizes_N2], dim=1), points_N52.flatten(1)


def _faces(candidates: Sequence[Tensor], num_pictures: int) -> list[Detections]:
    """Return the faces of each picture: suppression and voting as in `lib.faces.detection`, for all at once."""
    pictures_N, scores_N, boxes_N4, points_N10 = candidates
    # Boxes of different pictures are moved far apart. In float64 this does not change how boxes of a picture overlap.
    far_N1 = pictures_N[:, None].double() * 1e5
    kept_F = torchvision.ops.nms(boxes_N4.double() + far_N1, scores_N.double(), detection._NMS_OVERLAP)
    # In float64 the rounded sums do not depend on the order of the terms.
    rows_N14 = torch.cat([boxes_N4, points_N10], dim=1).double()
    voted = [_votes(kept, pictures_N, scores_N, boxes_N4) @ rows_N14 for kept in kept_F.split(_VOTING_FACES)]
    faces_F14 = ((torch.cat(voted) if voted else rows_N14[:0]) - 0.5).float()  # the network counts from pixel edges
    pictures_F, scores_F = pictures_N[kept_F].cpu().numpy(), scores_N[kept_F].cpu().numpy()
    values_F14 = faces_F14.cpu().numpy()
    order_F = np.argsort(pictures_F, kind="stable")  # the faces of a picture stay sorted by score
    ends = np.searchsorted(pictures_F[order_F], np.arange(num_pictures + 1))
    return [
        Detections(values_F14[own, :4], scores_F[own], values_F14[own, 4:].reshape(-1, 5, 2))
        for own in (order_F[first:last] for first, last in itertools.pairwise(ends))
    ]


def _votes(kept_F: Tensor, pictures_N: Tensor, scores_N: Tensor, boxes_N4: Tensor) -> Tensor:
    """Return the weight of each candidate in each face [F, N] (box voting, Gidaris & Komodakis 2015, section 5)."""
    overlaps_FN = torchvision.ops.box_iou(boxes_N4[kept_F], boxes_N4)
    same_FN = pictures_N[kept_F][:, None] == pictures_N
    votes_FN = ((overlaps_FN >= detection._VOTE_OVERLAP) & same_FN) * scores_N.double()
    return votes_FN / votes_FN.sum(dim=1, keepdim=True).clamp(min=1e-9)
