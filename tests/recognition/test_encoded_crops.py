"""Encoded crops to embeddings: order, and pictures that cannot be read."""

import cv2
import numpy as np
import pytest

from lib.recognition.embedder import load_embedder
from lib.recognition.encoded_crops import BATCH_SIZE, decoded_square, embed_images


def encoded(pixels_HWC: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, np.ascontiguousarray(pixels_HWC[:, :, ::-1]))[1].tobytes()


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2 * BATCH_SIZE + 5, 112, 112, 3), np.uint8)


def test_embeddings_are_those_of_the_pixels_in_order(model_url: str, crops: np.ndarray) -> None:
    embedder = load_embedder(model_url)
    images = [encoded(crop) for crop in crops]
    images[3], images[-1] = b"no picture", b""
    vectors_ND, failed_N = embed_images(embedder, images)
    assert np.flatnonzero(failed_N).tolist() == [3, len(images) - 1]
    assert not vectors_ND[failed_N].any()
    np.testing.assert_allclose(vectors_ND[~failed_N], embedder.embed(crops[~failed_N]), atol=1e-5)


def test_only_square_pictures_are_read(crops: np.ndarray) -> None:
    crop = crops[0]
    assert np.array_equal(decoded_square(encoded(crop)), crop)  # type: ignore[arg-type]
    jpeg = encoded(cv2.GaussianBlur(crop, (0, 0), 9), ".jpg")
    found = decoded_square(jpeg)
    assert found is not None
    assert np.abs(found.astype(int) - cv2.GaussianBlur(crop, (0, 0), 9)).mean() < 4
    larger = decoded_square(encoded(cv2.resize(crop, (224, 224))))
    assert larger is not None
    assert larger.shape == (112, 112, 3)
    assert decoded_square(encoded(crop[:100])) is None
    assert decoded_square(jpeg[: len(jpeg) // 2]) is None
