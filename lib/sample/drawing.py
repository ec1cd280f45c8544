"""Colours, smooth lines, and a pen that draws on a head turned in space.

Face coordinates: the origin is between the eyes, x to the right and y down as seen in the picture; the unit is a
typical distance between the eyes. Shape suffixes: N points, K control points, 2 coordinates (x y), H rows, W columns.
"""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

Colour = tuple[float, float, float]
"""Blue, green, red, 0 to 255."""


def colour(rgb_hex: str) -> Colour:
    """Return the colour written as six hexadecimal digits, red first."""
    red, green, blue = bytes.fromhex(rgb_hex)
    return float(blue), float(green), float(red)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return the colour `share` of the way from the first to the second."""
    blue, green, red = ((1 - share) * a + share * b for a, b in zip(first, second, strict=True))
    return blue, green, red


BLACK, WHITE = colour("000000"), colour("ffffff")

_SURFACE_DEPTH = 0.85
_CAMERA_DISTANCE = 7.0
_SHIFT = 4


class Pen:
    """Draws face coordinates onto a picture, antialiased, and marks drawn pixels in `mask`.

    A point has a depth towards the camera, by default that of a rounded face, so that turning the head by `yaw` moves
    the nose more than the eyes and narrows the far cheek.
    """

    def __init__(
        self,
        picture: np.ndarray,
        mask: np.ndarray,
        eyes_2: np.ndarray,
        size: float,
        roll: float,
        yaw: float,
        pitch: float,
    ) -> None:
        self.picture, self.mask, self.size = picture, mask, size
        self.yaw, self._pitch, self._eyes_2 = yaw, pitch, eyes_2
        self._rotation = size * np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])

    def turned(self, points_N2: np.ndarray, lift: float = 0.0, flat: bool = False) -> np.ndarray:
        """Return the points after the head has turned, still in face coordinates."""
        x_N, y_N = points_N2[:, 0], points_N2[:, 1]
        # Of the outline only the chin moves, because it is in front of the neck.
        rounded_N = 0.4 * np.clip(y_N / 1.8, 0, 1) if flat else _SURFACE_DEPTH * (1 - (x_N / 1.4) ** 2)
        depth_N = rounded_N + lift
        sine, cosine = np.sin(self.yaw), np.cos(self.yaw)
        nearness_N = _CAMERA_DISTANCE / (_CAMERA_DISTANCE + _SURFACE_DEPTH - depth_N * cosine + x_N * sine)
        turned_x_N = x_N * cosine + depth_N * sine
        return np.column_stack([turned_x_N * nearness_N, y_N * nearness_N + self._pitch * depth_N])

    def placed(self, points: np.ndarray, lift: float = 0.0, flat: bool = False) -> np.ndarray:
        """Return the points in pixels of the picture."""
        return self.to_pixels(self.turned(points, lift, flat))

    def to_pixels(self, turned_N2: np.ndarray) -> np.ndarray:
        """Return the points of the turned head in pixels of the picture."""
        return turned_N2 @ self._rotation + self._eyes_2

    def fill(self, points: np.ndarray, ink: Colour, *, lift: float = 0.0, flat: bool = False) -> None:
        """Fill a polygon."""
        self.fill_pixels(self.placed(points, lift, flat), ink)

    def fill_pixels(self, pixels_N2: np.ndarray, ink: Colour) -> None:
        """Fill a polygon given in pixels."""
        corners = [np.rint(pixels_N2 * 2**_SHIFT).astype(np.int32)]
        cv2.fillPoly(self.picture, corners, ink, cv2.LINE_AA, _SHIFT)
        cv2.fillPoly(self.mask, corners, 255, cv2.LINE_8, _SHIFT)

    def stroke(self, points: np.ndarray, width: float, ink: Colour, *, lift: float = 0.0, flat: bool = False) -> None:
        """Draw a line. One thinner than a pixel gets a width of one; one thinner than a third is left out."""
        self.stroke_pixels(self.placed(points, lift, flat), width, ink)

    def stroke_pixels(self, pixels_N2: np.ndarray, width: float, ink: Colour) -> None:
        """Draw a line given in pixels, with its width in face units."""
        thickness = width * self.size
        if thickness < 0.33:
            return
        corners = [np.rint(pixels_N2 * 2**_SHIFT).astype(np.int32)]
        cv2.polylines(self.picture, corners, False, ink, max(1, round(thickness)), cv2.LINE_AA, _SHIFT)

    def shade(self, blobs: Sequence[tuple[float, float, float, float, Colour]], outline_N2: np.ndarray) -> None:
        """Multiply soft ellipses into the inside of the outline.

        Each is (x, y, x radius, y radius, change): a change of (0.1, 0, -0.2) makes its centre 10 % bluer and takes
        20 % of the red.
        """
        x_1W, y_H1 = _shade_grid()
        light_HW3 = np.ones((y_H1.size, x_1W.size, 3), np.float32)
        centres = self.turned(np.array([blob[:2] for blob in blobs], np.float64))
        for (x, y), (_, _, radius_x, radius_y, change) in zip(centres, blobs, strict=True):
            across = np.exp(-(((x_1W - x) / radius_x) ** 2))
            down = np.exp(-(((y_H1 - y) / radius_y) ** 2))
            light_HW3 += (down * across)[..., None] * np.array(change, np.float32)
        corners = np.rint(self.placed(outline_N2, flat=True)).astype(np.int32)
        x, y, width, height = cv2.boundingRect(corners)
        x, y, right, bottom = max(x, 0), max(y, 0), x + width, y + height
        part = self.picture[y:bottom, x:right]
        if not part.size:
            return
        inside = np.zeros(part.shape[:2], np.uint8)
        cv2.fillPoly(inside, [corners], 255, cv2.LINE_8, 0, (-x, -y))
        grid_to_face = np.array([[_SHADE_STEP, 0, x_1W[0, 0]], [0, _SHADE_STEP, y_H1[0, 0]]])
        matrix = self._rotation.T @ grid_to_face
        matrix[:, 2] += self._eyes_2 - (x, y)
        light = cv2.convertScaleAbs(light_HW3, alpha=128)
        light = cv2.warpAffine(light, matrix, part.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        cv2.copyTo(cv2.multiply(part, light, scale=1 / 128), inside, part)


_SHADE_STEP = 0.08


@lru_cache(maxsize=1)
def _shade_grid() -> tuple[np.ndarray, np.ndarray]:
    x_W = np.arange(-1.6, 1.6, _SHADE_STEP, dtype=np.float32)
    y_H = np.arange(-2.0, 2.3, _SHADE_STEP, dtype=np.float32)
    return x_W[None, :], y_H[:, None]


@lru_cache(maxsize=8)
def _spline_weights(steps: int) -> np.ndarray:
    t = np.arange(steps) / steps
    return 0.5 * np.column_stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3]
    )


def curve(points: Sequence[Sequence[float]] | np.ndarray, *, closed: bool = False, steps: int = 6) -> np.ndarray:
    """Return a smooth line [N, 2] through the points (Catmull and Rom 1974, uniform)."""
    knots_K2 = np.asarray(points, np.float64)
    if closed:
        padded = np.concatenate([knots_K2[-1:], knots_K2, knots_K2[:2]])
    else:
        padded = np.concatenate([2 * knots_K2[:1] - knots_K2[1:2], knots_K2, 2 * knots_K2[-1:] - knots_K2[-2:-1]])
    windows = np.stack([padded[i : len(padded) - 3 + i] for i in range(4)])
    line_N2 = np.einsum("sw,wkc->ksc", _spline_weights(steps), windows).reshape(-1, 2)
    return line_N2 if closed else np.concatenate([line_N2, knots_K2[-1:]])


def mirrored(half_K2: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the points followed by their mirror images in reverse order; points on the axis appear once."""
    half = np.asarray(half_K2, np.float64)
    return np.concatenate([half, (half * (-1, 1))[::-1][half[::-1, 0] != 0]])


def ellipse(x: float, y: float, radius_x: float, radius_y: float, steps: int = 20) -> np.ndarray:
    """Return an ellipse as a polygon [steps, 2]."""
    angle = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    return np.column_stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)])
