import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from lib.faces.images import REDUCTIONS, Photo
from tests.faces.pictures import MAX_PIXELS, ORIENTATION, SMALL, encoded, exif, upright_rgb, with_app1, with_chunk


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_exif_orientation_is_applied(picture_format: str, orientation: int, reduction: int) -> None:
    data = encoded(SMALL, picture_format, exif=exif(orientation))
    photo = Photo(data, max_pixels=MAX_PIXELS)
    wanted = upright_rgb(data)
    assert (photo.height, photo.width) == wanted.shape[:2]
    reduced = cv2.resize(wanted, (-(-photo.width // reduction), -(-photo.height // reduction)), interpolation=3)
    assert np.abs(photo.pixels(reduction)[:, :, ::-1].astype(int) - reduced).mean() < 4


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_is_applied_to_cmyk_too(orientation: int) -> None:
    data = encoded(SMALL.convert("CMYK"), "JPEG", exif=exif(orientation))
    assert np.array_equal(Photo(data, max_pixels=MAX_PIXELS).pixels()[:, :, ::-1], upright_rgb(data))


@pytest.mark.parametrize("picture_format", ["JPEG", "WEBP"])
def test_broken_exif_does_not_cost_the_photo(picture_format: str) -> None:
    data = encoded(SMALL, picture_format, exif=exif(1)).replace(b"MM\0*", b"??\0*")
    assert b"??\0*" in data
    assert Photo(data, max_pixels=MAX_PIXELS).pixels().shape == (60, 80, 3)


# How the pixels of an upright picture are stored under each orientation (EXIF 2.32, section 4.6.4).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1),
    6: lambda up: np.rot90(up, 1),
    7: lambda up: np.rot90(up, 2).swapaxes(0, 1),
    8: lambda up: np.rot90(up, -1),
}


def tiff_block(orientation: int, kind: int, endian: str) -> bytes:
    """Return a TIFF structure of one tag, a short (kind 3) or a long (kind 4) as some phones write it."""
    head = b"II*\0" if endian == "<" else b"MM\0*"
    value = struct.pack(endian + ("H2x" if kind == 3 else "I"), orientation)
    return head + struct.pack(endian + "IHHHI", 8, 1, ORIENTATION, kind, 1) + value + bytes(4)


def xmp(orientation: int, *, as_element: bool = False) -> bytes:
    tag = f'tiff:Orientation="{orientation}"'
    body = f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>" if as_element else f" {tag}/>"
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description{body}</x:xmpmeta>'.encode()


def raw_profile(name: bytes, blob: bytes) -> bytes:
    """Return a text chunk that holds a profile as ImageMagick writes it."""
    text = f"\n{name.decode()}\n{len(blob):8d}\n{blob.hex()}\n".encode()
    return b"Raw profile type " + name + b"\0\0" + zlib.compress(text)


def stored(orientation: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(SMALL))))


CARRIERS: dict[str, Callable[[int], bytes]] = {
    "EXIF of a JPEG": lambda o: with_app1(jpeg(o), b"Exif\0\0" + tiff_block(o, 3, "<")),
    "long EXIF of a JPEG": lambda o: with_app1(jpeg(o), b"Exif\0\0" + tiff_block(o, 4, ">")),
    "XMP of a JPEG": lambda o: with_app1(jpeg(o), b"http://ns.adobe.com/xap/1.0/\0" + xmp(o)),
    "XMP element of a JPEG": lambda o: with_app1(jpeg(o), b"http://ns.adobe.com/xap/1.0/\0" + xmp(o, as_element=True)),
    "XMP of a JPEG with a tail": lambda o: CARRIERS["XMP of a JPEG"](o) + b"tail" * 100,
    "EXIF of a WebP": lambda o: encoded(stored(o), "WEBP", quality=95, exif=exif(o)),
    "XMP of a WebP": lambda o: encoded(stored(o), "WEBP", quality=95, xmp=xmp(o)),
    "EXIF of a PNG": lambda o: with_chunk(encoded(stored(o), "PNG"), b"eXIf", tiff_block(o, 3, "<")),
    "raw EXIF profile of a PNG": lambda o: with_chunk(
        encoded(stored(o), "PNG"), b"zTXt", raw_profile(b"exif", b"Exif\0\0" + tiff_block(o, 3, "<"))
    ),
    "raw APP1 profile of a PNG": lambda o: with_chunk(
        encoded(stored(o), "PNG"), b"zTXt", raw_profile(b"APP1", b"Exif\0\0" + tiff_block(o, 3, "<"))
    ),
    "XMP of a PNG": lambda o: with_chunk(encoded(stored(o), "PNG"), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(o)),
    "EXIF of a PNG with a tail": lambda o: CARRIERS["EXIF of a PNG"](o) + b"camera" * 50,
    "TIFF": lambda o: encoded(stored(o), "TIFF", tiffinfo={ORIENTATION: o}),
    "EXIF of an AVIF": lambda o: encoded(stored(o), "AVIF", quality=95, exif=exif(o)),
}


def jpeg(orientation: int) -> bytes:
    return encoded(stored(orientation), "JPEG", quality=95)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_photo_is_upright_wherever_its_orientation_stands_and_whoever_decodes_it(
    carrier: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CARRIERS[carrier](orientation)
    wanted = np.asarray(SMALL).astype(int)

    def upright() -> np.ndarray:
        photo = Photo(data, max_pixels=MAX_PIXELS)
        assert (photo.width, photo.height) == SMALL.size
        return photo.pixels()[:, :, ::-1]

    assert np.abs(upright() - wanted).mean() < 3
    monkeypatch.setattr("lib.faces.images.decode_with_opencv", lambda *_: None)
    assert np.abs(upright() - wanted).mean() < 3


def test_exif_goes_before_xmp() -> None:
    both = with_app1(CARRIERS["EXIF of a JPEG"](6), b"http://ns.adobe.com/xap/1.0/\0" + xmp(3))
    assert np.abs(Photo(both, max_pixels=MAX_PIXELS).pixels()[:, :, ::-1] - np.asarray(SMALL).astype(int)).mean() < 3
