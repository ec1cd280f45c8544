"""Warps faces out of the photos of a batch, on the device.

Shape suffixes: F faces, S side of a crop, 3 colours (RGB).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lib.faces.batch_photos import BatchPhoto, shrunk


@dataclass(frozen=True)
class Cut:
    """A face to be warped from a photo at 1/`reduction` of its size; `matrix_23` maps the photo to the crop."""

    source: BatchPhoto
    matrix_23: np.ndarray
    reduction: int


def warped(cuts: Sequence[Cut], size: int, device: torch.device) -> Tensor:
    """Return the faces, each by one bilinear warp, uint8 [F, 3, S, S]; black outside of the photo."""
    warped_F3SS = torch.zeros((len(cuts), 3, size, size), dtype=torch.uint8, device=device)
    if not cuts:
        return warped_F3SS
    windows, to_windows_F23 = [], np.empty((len(cuts), 2, 3), np.float32)
    for number, cut in enumerate(cuts):
        window, to_windows_F23[number] = _window(cut, size)
        windows.append(window)
    grids_FSS2 = _grids(torch.from_numpy(to_windows_F23).to(device), size)
    for number, window in enumerate(windows):
        if window is not None:
            face_13SS = functional.grid_sample(
                window[None].float(), grids_FSS2[number : number + 1], padding_mode="zeros", align_corners=False
            )
            warped_F3SS[number] = face_13SS[0].round_().to(torch.uint8)
    return warped_F3SS


def _window(cut: Cut, size: int) -> tuple[Tensor | None, np.ndarray]:
    """Return the part of the reduced photo that a crop shows, [3, h, w], and the matrix [2, 3] from the crop to it.

    The matrix maps to the coordinates of `grid_sample`: -1 and 1 are the edges of the window. The window is None if the
    crop shows nothing of the photo.
    """
    photo = cut.source.photo
    assert photo is not None
    reduction = max(cut.reduction, photo.finest)
    # The point x of the photo is at (x + 0.5) / n - 0.5 in the reduced photo.
    to_photo = np.array([[reduction, 0, (reduction - 1) / 2], [0, reduction, (reduction - 1) / 2], [0, 0, 1.0]])
    to_reduced_23 = cv2.invertAffineTransform(cut.matrix_23 @ to_photo)
    corners_42 = np.array([[x, y] for x in (0, size - 1) for y in (0, size - 1)]) @ to_reduced_23[:, :2].T
    corners_42 = corners_42 + to_reduced_23[:, 2]
    assert cut.source.pixels is not None
    step = reduction // photo.finest
    height, width = (-(-side // step) for side in cut.source.pixels.shape[1:])
    x0, y0 = np.maximum(np.floor(corners_42.min(axis=0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(corners_42.max(axis=0)).astype(int) + 2, [width, height])
    if x1 <= x0 or y1 <= y0:
        return None, to_reduced_23
    window = cut.source.pixels[:, y0 * step : y1 * step, x0 * step : x1 * step]
    if step > 1:
        window = shrunk(window, step)
    scale_2 = 2 / np.array([x1 - x0, y1 - y0])
    to_window_23 = to_reduced_23 - np.array([[0, 0, x0 - 0.5], [0, 0, y0 - 0.5]])
    return window, to_window_23 * scale_2[:, None] - np.array([[0, 0, 1.0], [0, 0, 1.0]])


def _grids(to_windows_F23: Tensor, size: int) -> Tensor:
    """Return the position of each pixel of each crop in its window [F, S, S, 2]."""
    places = torch.arange(size, device=to_windows_F23.device, dtype=torch.float32)
    y_SS, x_SS = torch.meshgrid(places, places, indexing="ij")
    points_P3 = torch.stack([x_SS, y_SS, torch.ones_like(x_SS)], dim=-1).reshape(-1, 3)
    # Not a matrix product: TF32 would round the positions.
    grids = (points_P3[None, :, None, :] * to_windows_F23[:, None]).sum(dim=-1)
    return grids.reshape(len(to_windows_F23), size, size, 2)
