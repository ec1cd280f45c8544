"""The journal of an unfinished forgetting, and the receipt that it becomes."""

import hashlib
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lib import storage
from lib.faces.tombstones import folder_url, key_id, keyed
from lib.forgetting.search import FileHits
from lib.forgetting.tables import TableHits
from lib.forgetting.targets import Targets, of_names

logger = logging.getLogger(__name__)

JOURNALS, RECEIPTS = "pending", "receipts"


class Journal:
    """The progress of a forgetting. It contains names, and is removed after the receipt is written.

    Attributes:
        content: of the file. Its entries have keys, so that work repeated after a kill counts once.
    """

    def __init__(self, data_url: str, name: str, content: dict[str, Any], key: bytes = b"") -> None:
        self.url = storage.join(folder_url(data_url), JOURNALS, f"{name}.json")
        self._data_url = data_url
        self._key = key
        self.content = content

    @property
    def is_begun(self) -> bool:
        """Whether this job or a killed one has begun it."""
        return bool(self.content)

    @property
    def op(self) -> str:
        """The id of this forgetting."""
        return str(self.content["op"])

    @property
    def receipt_name(self) -> str:
        """Name of the receipt's file."""
        return f"{self.content['began'].replace(':', '')}-{self.op}.json"

    @property
    def receipt_url(self) -> str:
        """URL of the receipt."""
        return storage.join(folder_url(self._data_url), RECEIPTS, self.receipt_name)

    def targets(self) -> Targets:
        """Return the targets that a killed job has found; nobody if none has begun."""
        return of_names(self.content.get("photos", ()), self.content.get("identities", ()))

    def begin(self, targets: Targets) -> None:
        """Write the targets, before anything is changed."""
        if not self.content:
            began = datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z"
            self.content = {"op": secrets.token_hex(6), "began": began}
            self.content |= {"tables": {}, "files": {}, "caches": {}, "models": {}, "versions": {}}
            self.content |= {"kept_versions": [], "run_folders": []}
        self.content |= targets.to_json()
        self._write()

    def note_versions(self, hits: Sequence[TableHits], kept: Sequence[str], runs: Sequence[str]) -> None:
        """Add the versions of tables with targets, all existing versions, and the runs."""
        for table in hits:
            self.content["versions"] |= table.runs
        self.content["kept_versions"] = sorted({*self.content["kept_versions"], *kept})
        self.content["run_folders"] = sorted({*self.content["run_folders"], *runs})
        self._write()

    def note_table(self, hits: TableHits, rewritten: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the parts of a table that have a successor, and those that are removed with an older version."""
        entries = self.content["tables"].setdefault(hits.url, {})
        entries.update(rewritten)
        for name, num in hits.rows.items():  # a part that a killed job has rewritten keeps its entry
            entries.setdefault(name, {"rows": num, "removed": True})
        self._write()

    def note_files(self, files: Sequence[FileHits], caches: Mapping[str, int]) -> None:
        """Add the files and copies that are about to be changed or removed."""
        for file in files:
            entry = {"kind": file.kind.what, "entries": file.num, "sha256": file.sha256}
            more = {"removed": True, "made_again_by": file.kind.again} if file.kind.is_removed else {}
            self.content["files"].setdefault(file.url, entry | more)
        self.content["caches"] |= caches
        self._write()

    def note_written(self, url: str, content: bytes) -> None:
        """Add the digest of a file that was just rewritten."""
        self.content["files"][url]["new_sha256"] = hashlib.sha256(content).hexdigest()

    def note_model(self, run_url: str, why: str, files: Sequence[str]) -> None:
        """Add a run whose model was trained on them."""
        self.content["models"][run_url] = {"why": why, "weights": list(files)}

    def counts(self) -> dict[str, int]:
        """Return the numbers of what was done. Rows are those of the versions that readers saw."""
        tables = [part for table in self.content["tables"].values() for part in table.values()]
        files = self.content["files"].values()
        return {
            "identities": len(self.content["identities"]),
            "photos": len(self.content["photos"]),
            "rows": sum(part["rows"] for part in tables if "removed" not in part),
            "parts_rewritten": sum("removed" not in part for part in tables),
            "parts_removed": sum("removed" in part for part in tables),
            "files_rewritten": sum("removed" not in file for file in files),
            "files_removed": sum("removed" in file for file in files),
            "caches_removed": len(self.content["caches"]),
        }

    def finish(self, targets: Targets, left: Sequence[str], *, with_names: bool) -> str:
        """Write the receipt, remove the journal, and return the URL of the receipt."""
        content = self.content
        for url, entry in content["files"].items():
            if "removed" not in entry and "new_sha256" not in entry and storage.exists(url):  # after a kill in between
                self.note_written(url, storage.read_bytes(url))
        who: dict[str, Any] = targets.to_json()
        if not with_names:
            who = {
                field: sorted(keyed(self._key, kind, name) for name in who[field])
                for field, kind in (("photos", "photo"), ("identities", "identity"))
            }
        receipt = {
            "receipt": self.op,
            "began": content["began"],
            "finished": datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z",
            "key_id": key_id(self._key),
            "names": "in full" if with_names else "as keyed hashes",
            **who,
            "counts": self.counts(),
            "models_trained_on_them": _shown(content["models"]),
            "versions_of_tables_that_held_them": content["versions"],
            "tables": _shown(content["tables"]),
            "files": _shown(content["files"]),
            "copies_on_this_node": content["caches"],
            "left_as_they_are": [storage.redacted(url) for url in left],
        }
        storage.write_json(self.receipt_url, receipt)
        storage.remove(self.url)
        return self.receipt_url

    def _write(self) -> None:
        data = (json.dumps(self.content, indent=1) + "\n").encode()
        storage.write_bytes(self.url, data, is_private=True)


def open_journal(data_url: str, key: bytes, given: Targets) -> Journal:
    """Return the journal of the forgetting of these names; that of a killed job, if there is one."""
    names = [f"photo\0{name}" for name in sorted(given.photos)]
    names += [f"identity\0{name}" for name in sorted(given.identities)]
    journal = Journal(data_url, keyed(key, "names", "\0".join(names))[:16], {}, key)
    folder, _, own = journal.url.rpartition("/")
    others = [info.path for info in storage.list_files(folder, suffix=".json") if info.path != own]
    if others:
        logger.warning("%d other forgettings were begun and not finished: run their commands again", len(others))
    if storage.exists(journal.url):
        journal.content = storage.read_json(journal.url, {"op": str, "began": str, "photos": list, "identities": list})
    return journal


def _shown(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {storage.redacted(url): entry for url, entry in entries.items()}
