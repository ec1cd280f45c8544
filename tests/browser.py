"""Looks at pages as a reader does: in a real browser without a network."""

import os
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

WIDTH = 1150


def screenshot(page: bytes, folder: Path, *, height: int) -> np.ndarray:
    """Return the RGB pixels [height, WIDTH, 3] of a page as Chromium shows it; skips where there is none."""
    picture = folder / "screen.png"
    _browse(page, folder, f"--screenshot={picture}", f"--window-size={WIDTH},{height}")
    return cv2.cvtColor(cv2.imread(str(picture)), cv2.COLOR_BGR2RGB).astype(int)


def document(page: bytes, folder: Path) -> str:
    """Return the HTML of a page after its scripts have run in Chromium; skips where there is none."""
    return _browse(page, folder, "--dump-dom").decode()


def _browse(page: bytes, folder: Path, *flags: str) -> bytes:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        assert not os.environ.get("BROWSER_REQUIRED"), "the page must be looked at, but there is no chromium"
        pytest.skip("no chromium to look at the page with: apt-get install chromium")
    (folder / "a page é.html").write_bytes(page)
    return subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *(f"--user-data-dir={folder / 'profile'}", *flags, (folder / "a page é.html").as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    ).stdout
