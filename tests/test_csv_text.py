import csv
import io

import pyarrow as pa
import pytest

from lib.csv_text import csv_bytes, read_csv
from lib.recognition.matches import matches_csv
from lib.training.history import write_history

NAMES = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]
HARMLESS = ["Zoë", "a=b", "", "o'Neil", "é-1"]


def read(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode(), newline="")))


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_a_formula(name, tmp_path):
    assert read(csv_bytes(["name"], [[name]])) == [["name"], ["'" + name]]
    assert read(matches_csv(pa.table({"photo": [name], "distance": [-0.5]})))[1] == ["'" + name, "-0.5"]
    write_history(str(tmp_path), [{"epoch": 1, "run": name, "loss": -0.5}])
    rows = read((tmp_path / "history.csv").read_bytes())
    row = dict(zip(*rows, strict=True))
    assert (row["run"], row["loss"]) == ("'" + name, "-0.5")


@pytest.mark.parametrize("name", HARMLESS)
def test_other_names_stay_as_they_are(name):
    assert read(csv_bytes(["a", "b", "c"], [[name, -1.5, None]]))[1] == [name, "-1.5", ""]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_spreadsheets_write_is_read_whatever_parts_the_fields(delimiter):
    content = delimiter.join(["photo", '"a ""b"""\r\n007', '"x, y; z"\r\n'])
    table = read_csv(b"\xef\xbb\xbf" + content.encode(), text=["photo"])
    assert table.to_pydict() == {"photo": ["007"], 'a "b"': ["x, y; z"]}
