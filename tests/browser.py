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
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        assert not os.environ.get("BROWSER_REQUIRED"), "the page must be looked at, but there is no chromium"
        pytest.skip("no chromium to look at the page with: apt-get install chromium")
    (folder / "a page é.html").write_bytes(page)
    picture = folder / "screen.png"
    subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *(f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{height}"),
            *(f"--screenshot={picture}", (folder / "a page é.html").as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return cv2.cvtColor(cv2.imread(str(picture)), cv2.COLOR_BGR2RGB).astype(int)
