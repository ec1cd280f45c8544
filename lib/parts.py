"""Tables made of parts, in versions. Their job may be killed at any moment, and they can be read at any moment.

The name of a part's file contains a digest of the part's input. So a file that exists is complete, whoever wrote it,
and a part with other input is another file. `_plan.json` is written first, with the number and the settings of the
version being made. `_SUCCESS` is written last, with the names of the files that readers see. Then the files of older
versions are removed, except those of the newest ones, whose names `_versions/` keeps.
"""

import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib import storage
from lib.errors import JobError, UserError
from lib.plans import FORMAT, TABLE_FORMAT, Plan, check_format, differences, earlier_plan

logger = logging.getLogger(__name__)

PLAN_NAME, SUCCESS_NAME = "_plan.json", "_SUCCESS"
VERSIONS_FOLDER = "_versions"
MANIFEST_FOLDER = "_manifest"
"""Folder with the list of the input of an unfinished version."""
PART_PREFIX = "split="
"""Beginning of the names of the folders with the parts' files."""

_REWRITTEN = re.compile(r"\.[0-9a-f]{8}\.parquet$")
"""The name of a file that jobs/forget.py makes from one without a key."""

KEEP_VERSIONS = 2
"""By default the version before is kept, so that a job that reads it can finish."""

_DIGEST_CHARACTERS = 12
_NAME = re.compile(
    rf"split=(?P<split>[^/]+)/part-(?P<key>.+)-[0-9a-f]{{{_DIGEST_CHARACTERS}}}(?P<again>\.v\d+)?\.parquet"
)

SUCCESS_ENTRIES = {"run_id": str, "fingerprint": dict, "counts": dict}
"""The entries of `_SUCCESS`, with their types. Tables from before there were versions lack `version`, its number, and
`content`, the digest of its files' names. The oldest also lack `parts`, the size of each file in bytes."""


def part_name(split: str, key: str, digest: str) -> str:
    """Return the path of a part's file. `digest` is the hexadecimal digest of the part's input."""
    return f"split={split}/part-{key}-{digest[:_DIGEST_CHARACTERS]}.parquet"


def part_key(name: str) -> str | None:
    """Return the key of the part in a file; None for a file of a table without versions."""
    match = _NAME.fullmatch(name)
    return match["key"] if match else None


def split_in(name: str) -> str:
    """Return the split of a part's file."""
    return name.split("/")[0].removeprefix(PART_PREFIX)


def digest_of(texts: Iterable[str]) -> str:
    """Return a digest of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class Found:
    """The state of a table's folder before a job works on it.

    Attributes:
        plan: of the version begun last.
        success: of the version that readers see.
        present: sizes in bytes of the existing files, by their paths.
    """

    url: str
    plan: Plan | None = None
    success: dict[str, Any] | None = None
    present: dict[str, int] = field(default_factory=dict)

    @property
    def is_old(self) -> bool:
        """Whether the table is from before there were versions: the names of its files do not depend on the input."""
        return self.plan is not None and "content" not in self.plan

    def current(self, names: Sequence[str]) -> list[str]:
        """Return the names, each replaced by the name that the finished version has for the same content."""
        made_again = {name: name for name in self.success["parts"]} if self.success else {}
        made_again = {_without_again(name): name for name in made_again}
        return [made_again.get(name, name) for name in names]

    def missing(self, names: Sequence[str]) -> set[str]:
        """Return which of these files do not exist, or do not have the size that was written."""
        sizes = self.success["parts"] if self.success else {}
        return {name for name in names if self.present.get(name) != sizes.get(name, self.present.get(name, -1))}

    def is_finished(self, names: Sequence[str]) -> bool:
        """Return whether the version that readers see has exactly these files, and all of them exist."""
        return self.success is not None and self.success["parts"].keys() == set(names) and not self.missing(names)


def settle(url: str, plan: Plan, *, flag: str, overwrite: bool) -> Found:
    """Return the state of a folder if a table with this plan may be made there. Nothing is removed or written.

    The plan holds everything that decides the content besides the input. A table with other settings needs `overwrite`.

    Raises:
        UserError: the folder has a table with other settings, or files of someone else. `flag` names the folder.
    """
    earlier, problem = earlier_plan(url, PLAN_NAME, plan)
    if earlier is not None and earlier.get("job") != plan.get("job"):
        raise UserError(
            f"{url} holds what another job made, which is never overwritten: choose another folder by {flag}"
        )
    if problem and earlier is None:
        raise UserError(f"{url} {problem}: --overwrite replaces what this job made only; choose another folder")
    if problem and not overwrite:
        raise UserError(
            f"{url} {problem}: choose another folder by {flag}, go back to those settings, or replace it with "
            "--overwrite"
        )
    return found_at(url) if earlier is not None else Found(url)


def found_at(url: str) -> Found:
    """Return the state of a table's folder."""
    plan_url = storage.join(url, PLAN_NAME)
    plan = storage.read_json(plan_url, {"fingerprint": dict}) if storage.exists(plan_url) else None
    check_format(plan or {}, plan_url)
    return Found(url, plan, _success(url), present_files(url))


def is_same_old_table(found: Found, old_plan: Callable[[], Plan]) -> bool:
    """Return whether a table without versions is finished and complete, and was made with `old_plan`."""
    if found.plan is None or not found.is_old or found.success is None or found.missing(list(found.success["parts"])):
        return False
    return all(found.plan.get(name) == value for name, value in old_plan().items())


def begin(found: Found, plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    """Write the plan of the version with these files, unless it exists, and return it with its run_id.

    A version that was begun keeps its run_id; so does a finished version that lost files.
    """
    content = digest_of(sorted(names))
    earlier, success = found.plan or {}, found.success or {}
    if earlier.get("content") == content and not differences(plan, earlier):
        return dict(earlier)
    if success.get("content") == content:
        about = {"run_id": success["run_id"], "version": success["version"]}
    else:
        about = {"run_id": uuid.uuid4().hex[:12], "version": next_version(found)}
    begun = {**about, FORMAT: TABLE_FORMAT, "content": content, **plan}
    storage.write_json(storage.join(found.url, PLAN_NAME), begun)
    return begun


def next_version(found: Found) -> int:
    """Return the number of the version after the finished one."""
    return int((found.success or {}).get("version", 0)) + 1


def made_again(name: str, version: int) -> str:
    """Return the name of a file that this version makes again with the same content."""
    return f"{_without_again(name).removesuffix('.parquet')}.v{version}.parquet"


def check_ours(url: str, begun: Plan) -> None:
    """Raise JobError if another job has begun another version since `begin` returned."""
    now = read_plan(url)
    if now["run_id"] != begun["run_id"]:
        raise JobError(
            f"{storage.redacted(url)}: another job began version {now.get('version')} of this table while this one "
            "ran: wait until it has ended, and run the same command again"
        )


def finish_version(
    url: str, begun: Plan, names: Sequence[str], about: Plan, *, keep_versions: int = KEEP_VERSIONS
) -> None:
    """Let readers see the version with these files, then remove what no kept version needs.

    Raises:
        JobError: another job began another version meanwhile, or files are gone.
    """
    check_ours(url, begun)
    present = present_files(url)
    if gone := [name for name in names if name not in present]:
        raise JobError(f"{len(gone)} new parts of {storage.redacted(url)} are gone, such as {gone[0]}: run it again")
    earlier = _success(url)
    if earlier is not None and earlier["run_id"] != begun["run_id"]:
        storage.write_json(storage.join(url, VERSIONS_FOLDER, f"{earlier.get('version', 0):06d}.json"), earlier)
    entries = {name: begun[name] for name in ("run_id", "version", "content")}
    success = {**entries, FORMAT: TABLE_FORMAT, **about, "parts": {name: present[name] for name in names}}
    storage.write_json(storage.join(url, SUCCESS_NAME), success)
    remove_unused(url, success, present, keep_versions=keep_versions)
    storage.remove_tree(storage.join(url, MANIFEST_FOLDER))


def remove_unused(
    url: str, success: Plan, present: Iterable[str], *, keep_versions: int | None, unwanted: Collection[str] = ()
) -> None:
    """Remove the parts that are neither in the finished version nor in a kept one, and the lists of older versions.

    A version with an unwanted part is not kept. With `keep_versions` None, all others are.
    """
    used, kept = set(success["parts"]), 1
    for number, name in sorted(_kept_versions(url), reverse=True):
        version_url = storage.join(url, VERSIONS_FOLDER, name)
        names = storage.read_json(version_url, SUCCESS_ENTRIES)["parts"].keys()
        is_wanted = number < success.get("version", 0) and names.isdisjoint(unwanted)
        if is_wanted and (keep_versions is None or kept < keep_versions):
            used |= names
            kept += 1
        else:
            storage.remove(version_url)
    unused = [name for name in present if name.startswith(PART_PREFIX) and name not in used]
    if unused:
        logger.info("removing %d files of older versions of %s", len(unused), storage.redacted(url))
    for name in unused:
        storage.remove(storage.join(url, name))


def present_files(url: str) -> dict[str, int]:
    """Return the sizes in bytes of the Parquet files below `url`, by their paths."""
    return {info.path: info.num_bytes for info in storage.list_files(url, suffix=".parquet")}


def read_success(url: str, *, what: str, job: str, run_id: str | None = None) -> dict[str, Any]:
    """Return the content of `_SUCCESS` of a finished table, with `parts`, after checking that all parts exist.

    With `run_id` it is the version with that id, if it is still kept, or else the present one.

    Raises:
        UserError: there is no table, it is not finished, it has another format, or parts of it are gone. `what` and
            `job` name the table and the job that makes it.
    """
    shown = storage.redacted(url)
    success = _success(url)
    if success is None:
        raise UserError(f"no finished {what} at {shown} (no {SUCCESS_NAME}): run {job} first")
    if run_id is not None and success["run_id"] != run_id:
        success = next((kept for kept in kept_successes(url) if kept["run_id"] == run_id), success)
    present = present_files(url)
    lost = [name for name, num_bytes in success["parts"].items() if present.get(name) != num_bytes]
    if lost:
        raise UserError(
            f"{len(lost)} of the {len(success['parts'])} parts of {shown} are gone or not as they were written, such "
            f"as {lost[0]}: run {job} again with the settings of that table, and it makes them again"
        )
    return success


def finished_run_id(url: str) -> str | None:
    """Return the run_id of the finished version; None if there is none."""
    success = _success(url)
    return None if success is None else success["run_id"]


def read_plan(url: str) -> dict[str, Any]:
    """Return the plan of the version that was begun last."""
    plan = storage.read_json(storage.join(url, PLAN_NAME), {"run_id": str, "fingerprint": dict})
    check_format(plan, url)
    return plan


def _success(url: str) -> dict[str, Any] | None:
    """Return the content of `_SUCCESS`; None if there is none. The oldest do not name their parts."""
    success_url = storage.join(url, SUCCESS_NAME)
    if not storage.exists(success_url):
        return None
    success = storage.read_json(success_url, SUCCESS_ENTRIES)
    check_format(success, success_url)
    if "parts" not in success:
        sizes = present_files(url).items()
        success["parts"] = {name: size for name, size in sizes if not part_key(name) and not _REWRITTEN.search(name)}
    if not isinstance(success["parts"], dict) or not isinstance(success.get("version", 0), int):
        raise UserError(f"{storage.redacted(success_url)} names no parts: remove it and run the job that made it again")
    return success


def _kept_versions(url: str) -> list[tuple[int, str]]:
    """Return number and file name of each kept version before the finished one."""
    listed = storage.list_files(storage.join(url, VERSIONS_FOLDER), suffix=".json")
    return [(int(info.path.removesuffix(".json")), info.path) for info in listed if info.path[:-5].isdigit()]


def kept_successes(url: str) -> Iterable[dict[str, Any]]:
    """Yield the content of `_SUCCESS` of each kept version before the finished one."""
    for _, name in _kept_versions(url):
        yield storage.read_json(storage.join(url, VERSIONS_FOLDER, name), SUCCESS_ENTRIES)


def _without_again(name: str) -> str:
    return re.sub(r"\.v\d+\.parquet$", ".parquet", name)
