from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with an empty folder of photos."""
    folder = tmp_path / "fotos d'été"
    (folder / "photos").mkdir(parents=True)
    return folder
