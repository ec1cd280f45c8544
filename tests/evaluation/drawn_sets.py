"""Verification sets of people who do not exist: each is a pattern of colours, and each image of one is noisy."""

import pickle
from pathlib import Path

import cv2
import numpy as np


def drawn_image(rng: np.random.Generator, person: int, *, noise: float, side: int = 112) -> bytes:
    """Return an image of a person as JPEG."""
    pattern = np.random.default_rng(person).integers(0, 256, (6, 6, 3)).astype(np.float32)
    pixels = cv2.resize(pattern, (side, side), interpolation=cv2.INTER_CUBIC) + rng.normal(0, noise, (side, side, 3))
    return cv2.imencode(".jpg", np.clip(pixels, 0, 255).astype(np.uint8))[1].tobytes()


def drawn_set(num_pairs: int, *, noise: float = 40.0, seed: int = 0) -> tuple[list[bytes], list[bool]]:
    """Return the images and booleans of a set; different pairs show people of two groups of 20."""
    rng = np.random.default_rng(seed)
    images: list[bytes] = []
    same = [bool(n % 2) for n in range(num_pairs)]
    for is_same in same:
        first = int(rng.integers(20))
        second = first if is_same else 20 + int(rng.integers(20))
        images += [drawn_image(rng, person, noise=noise) for person in (first, second)]
    return images, same


def write_set(path: Path, content: object, protocol: int = 4) -> str:
    """Write a set as a Python program does, and return its path."""
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


def python_2_pickle(images: list[bytes], same: list[bool]) -> bytes:
    """Return what Python 2 writes of byte strings with its highest protocol: the opcodes are written by hand."""

    def string(data: bytes) -> bytes:
        if len(data) < 256:
            return b"U" + bytes([len(data)]) + data
        return b"T" + len(data).to_bytes(4, "little") + data

    written = b"".join(string(image) + b"q" + bytes([n % 250]) for n, image in enumerate(images))
    booleans = b"".join(b"\x88" if each else b"\x89" for each in same)
    return b"\x80\x02]q\x01(" + written + b"e]q\x02(" + booleans + b"e\x86q\x03."
