"""Faces that were exported are no table of ours: forgetting leaves them, and says so."""

import json
from pathlib import Path

import pytest

from lib.forgetting.forget_job import ForgetConfig, forget
from lib.forgetting.search import places
from tests.training.learnable_faces import write_faces


def test_an_export_below_the_data_is_left_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_faces(tmp_path / "faces")
    export = tmp_path / "tars é"
    export.mkdir()
    (export / "_export.json").write_text(json.dumps({"job": "export", "fingerprint": {}}))
    (export / "_EXPORTED").write_text("{}")
    (export / "000000.tar").write_bytes(b"faces")
    found = places(str(tmp_path), [])
    assert (found.exports, found.tables) == ([str(export)], [str(tmp_path / "faces")])
    result = forget(ForgetConfig(data=str(tmp_path), identities=("person 1",)))
    assert result["rows"] == 8
    assert f"{export} was exported, perhaps with them: remove it, and export again" in caplog.text
    assert (export / "000000.tar").read_bytes() == b"faces"
