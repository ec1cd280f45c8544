"""Tables made of parts, in versions: their job may be killed at any moment, and they can be read at any moment.

The name of a part's file holds a digest of what the part is made of. So a file that is there is done, whoever wrote it,
and a part of other content is another file beside the first. `_plan.json` is written first: it says which version is
being made, and with which settings. `_SUCCESS` is written last: it names the files of the version that readers see.
Only then are the files of older versions removed, except those of the newest, whose names `_versions/` keeps.
"""

import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib import storage
from lib.errors import JobError, UserError

logger = logging.getLogger(__name__)

PLAN_NAME = "_plan.json"
SUCCESS_NAME = "_SUCCESS"
VERSIONS_FOLDER = "_versions"
MANIFEST_FOLDER = "_manifest"
"""Where the list of what an unfinished version is made of lies."""
PART_PREFIX = "split="
"""What the folders begin with that hold the files of the parts."""

KEEP_VERSIONS = 2
"""The version before stays by default: a job that began to read it can finish."""

_DIGEST_CHARACTERS = 12
_NAME = re.compile(
    rf"split=(?P<split>[^/]+)/part-(?P<key>.+)-[0-9a-f]{{{_DIGEST_CHARACTERS}}}(?P<again>\.v\d+)?\.parquet"
)

Plan = Mapping[str, Any]

SUCCESS_ENTRIES = {"run_id": str, "fingerprint": dict, "counts": dict}
"""What `_SUCCESS` holds, with their types. Tables made before there were versions lack `version`, the number of this
one, and `content`, the digest of its files' names; the oldest lack `parts`, the size of each file in bytes."""


def part_name(split: str, key: str, digest: str) -> str:
    """Return the path of the file that a part becomes in a split. `digest` says what it is made of, in hexadecimals."""
    return f"split={split}/part-{key}-{digest[:_DIGEST_CHARACTERS]}.parquet"


def part_key(name: str) -> str | None:
    """Return the key of the part that a file holds, None for a file of a table without versions."""
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
    """What the folder of a table holds before a job works on it.

    Attributes:
        plan: of the version begun last.
        success: of the version that readers see.
        present: the sizes in bytes of the files that are there, by their paths.
    """

    url: str
    plan: Plan | None = None
    success: dict[str, Any] | None = None
    present: dict[str, int] = field(default_factory=dict)

    @property
    def is_old(self) -> bool:
        """Whether the table was begun before there were versions: the names of its files say nothing of the content."""
        return self.plan is not None and "content" not in self.plan

    def current(self, names: Sequence[str]) -> list[str]:
        """Return the names with those in place of them that the finished version has for the same content."""
        made_again = {name: name for name in self.success["parts"]} if self.success else {}
        made_again = {_without_again(name): name for name in made_again}
        return [made_again.get(name, name) for name in names]

    def missing(self, names: Sequence[str]) -> set[str]:
        """Return the files of these that are not there, or not as they were written."""
        sizes = self.success["parts"] if self.success else {}
        return {name for name in names if self.present.get(name) != sizes.get(name, self.present.get(name, -1))}

    def is_finished(self, names: Sequence[str]) -> bool:
        """Return whether the version that readers see has these files and no other, and all are there."""
        return self.success is not None and self.success["parts"].keys() == set(names) and not self.missing(names)


def settle(url: str, plan: Plan, *, flag: str, overwrite: bool) -> Found:
    """Return what a folder holds, once a table of this plan may be made in it. Nothing is removed or written.

    The plan is what decides the content besides the input: a table of other settings needs `overwrite`.

    Raises:
        UserError: the folder holds a table of other settings, or files of someone else. `flag` names the folder.
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
    """Return what the folder of a table holds."""
    plan_url = storage.join(url, PLAN_NAME)
    plan = storage.read_json(plan_url, {"fingerprint": dict}) if storage.exists(plan_url) else None
    return Found(url, plan, _success(url), present_files(url))


def earlier_plan(
    url: str, plan_name: str, plan: Plan, *, defaults: Plan | None = None, begun: str | None = None
) -> tuple[Plan | None, str]:
    """Return the plan of the output in a folder, None where none has begun, and what keeps ours from going on there.

    `defaults` are for `differences`. Files in the folder `begun` may be there before the plan is.
    """
    plan_url = storage.join(url, plan_name)
    if storage.exists(plan_url):
        earlier = storage.read_json(plan_url, {"fingerprint": dict})
        different = "; ".join(differences(plan, earlier, defaults))
        return earlier, f"was made with other settings ({different})" if different else ""
    first = next(iter(storage.list_files(url)), None)
    if first is None or (begun is not None and first.path.startswith(f"{begun}/")):
        return None, ""
    return None, f"holds files but no {plan_name}, such as {first.path}"


def is_same_old_table(found: Found, old_plan: Callable[[], Plan]) -> bool:
    """Return whether a table without versions is finished and whole, and was made of what `old_plan` says."""
    if found.plan is None or not found.is_old or found.success is None or found.missing(list(found.success["parts"])):
        return False
    return all(found.plan.get(name) == value for name, value in old_plan().items())


def begin(found: Found, plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    """Write the plan of the version that has these files, unless it is there, and return it with its run_id.

    A version that was begun goes on under its run_id; so does a finished one that lost files.
    """
    content = digest_of(sorted(names))
    earlier, success = found.plan or {}, found.success or {}
    if earlier.get("content") == content and not differences(plan, earlier):
        return dict(earlier)
    if success.get("content") == content:
        about = {"run_id": success["run_id"], "version": success["version"]}
    else:
        about = {"run_id": uuid.uuid4().hex[:12], "version": next_version(found)}
    begun = {**about, "content": content, **plan}
    storage.write_json(storage.join(found.url, PLAN_NAME), begun)
    return begun


def next_version(found: Found) -> int:
    """Return the number of the version after the finished one."""
    return int((found.success or {}).get("version", 0)) + 1


def made_again(name: str, version: int) -> str:
    """Return the name of a file that is made again of the same content for this version."""
    return f"{_without_again(name).removesuffix('.parquet')}.v{version}.parquet"


def check_ours(url: str, begun: Plan) -> None:
    """Raise JobError where another job has begun another version since `begin` returned."""
    now = read_plan(url)
    if now["run_id"] != begun["run_id"]:
        raise JobError(
            f"{storage.redacted(url)}: another job began version {now.get('version')} of this table while this one "
            "ran: wait until it has ended, and run the same command again"
        )


def finish_version(
    url: str, begun: Plan, names: Sequence[str], about: Plan, *, keep_versions: int = KEEP_VERSIONS
) -> None:
    """Make the version of these files the one that readers see, then remove what no kept version needs.

    Raises:
        JobError: another job began another version meanwhile, or files are gone.
    """
    check_ours(url, begun)
    present = present_files(url)
    if gone := [name for name in names if name not in present]:
        raise JobError(f"{len(gone)} new parts of {storage.redacted(url)} are gone, such as {gone[0]}: run it again")
    earlier = _success(url)
    if earlier is not None and earlier["run_id"] != begun["run_id"]:
        storage.write_json(_version_url(url, earlier), earlier)
    entries = {name: begun[name] for name in ("run_id", "version", "content")}
    success = {**entries, **about, "parts": {name: present[name] for name in names}}
    storage.write_json(storage.join(url, SUCCESS_NAME), success)
    remove_unused(url, success, present, keep_versions=keep_versions)
    storage.remove_tree(storage.join(url, MANIFEST_FOLDER))


def remove_unused(url: str, success: Plan, present: Iterable[str], *, keep_versions: int) -> None:
    """Remove the parts that neither the finished version nor one of the newest before it has, and their lists."""
    kept, used = keep_versions - 1, set(success["parts"])
    for number, name in sorted(_kept_versions(url), reverse=True):
        version_url = storage.join(url, VERSIONS_FOLDER, name)
        if kept > 0 and number < success["version"]:
            used |= storage.read_json(version_url, SUCCESS_ENTRIES)["parts"].keys()
            kept -= 1
        else:
            storage.remove(version_url)
    unused = [name for name in present if name.startswith(PART_PREFIX) and name not in used]
    if unused:
        logger.info("removing %d files of older versions of %s", len(unused), storage.redacted(url))
    for name in unused:
        storage.remove(storage.join(url, name))


def present_files(url: str) -> dict[str, int]:
    """Return the sizes in bytes of the Parquet files that are there, by their paths below `url`."""
    return {info.path: info.num_bytes for info in storage.list_files(url, suffix=".parquet")}


def read_success(url: str, *, what: str, job: str, run_id: str | None = None) -> dict[str, Any]:
    """Return what a finished table says of itself, its `parts` among it, once all of them are there.

    With `run_id`, it is the version of that id, where it is still kept, and else the present one.

    Raises:
        UserError: there is none, it is not finished, or parts of it are gone. `what` and `job` name it and its maker.
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
    """Return the run_id of the finished version, None where there is none."""
    success = _success(url)
    return None if success is None else success["run_id"]


def read_plan(url: str) -> dict[str, Any]:
    """Return the plan of the version that was begun last."""
    return storage.read_json(storage.join(url, PLAN_NAME), {"run_id": str, "fingerprint": dict})


def _success(url: str) -> dict[str, Any] | None:
    """Return the content of `_SUCCESS`, None where there is none. The oldest say nothing of their parts."""
    success_url = storage.join(url, SUCCESS_NAME)
    if not storage.exists(success_url):
        return None
    success = storage.read_json(success_url, SUCCESS_ENTRIES)
    if "parts" not in success:
        success["parts"] = {name: size for name, size in present_files(url).items() if part_key(name) is None}
    if not isinstance(success["parts"], dict) or not isinstance(success.get("version", 0), int):
        raise UserError(f"{storage.redacted(success_url)} names no parts: remove it and run the job that made it again")
    return success


def _kept_versions(url: str) -> list[tuple[int, str]]:
    """Return number and file name of each version before the finished one that is kept."""
    listed = storage.list_files(storage.join(url, VERSIONS_FOLDER), suffix=".json")
    return [(int(info.path.removesuffix(".json")), info.path) for info in listed if info.path[:-5].isdigit()]


def kept_successes(url: str) -> Iterable[dict[str, Any]]:
    """Yield what the versions before the finished one that are kept say of themselves."""
    for _, name in _kept_versions(url):
        yield storage.read_json(storage.join(url, VERSIONS_FOLDER, name), SUCCESS_ENTRIES)


def _version_url(url: str, success: Plan) -> str:
    return storage.join(url, VERSIONS_FOLDER, f"{success.get('version', 0):06d}.json")


def _without_again(name: str) -> str:
    return re.sub(r"\.v\d+\.parquet$", ".parquet", name)


def differences(ours: Plan, theirs: Plan, defaults: Plan | None = None) -> list[str]:
    """Return each setting in which two plans differ, those of their fingerprints too, with both values.

    A setting that `theirs` does not know is newer than it. It had its default then, or where there are no `defaults`
    the present value.
    """
    newer = [name for name in ours if name not in theirs]
    if newer:
        theirs = {**theirs, **{name: (ours if defaults is None else defaults).get(name) for name in newer}}
        told = ", ".join(f"{name} {theirs[name]}" for name in newer)
        logger.info("settings that are newer than what is there are taken to have been: %s", told)
    flat_ours = {**ours, **ours["fingerprint"], "fingerprint": None, "id": None}
    flat_theirs = {**theirs, **theirs.get("fingerprint", {}), "fingerprint": None, "id": None, "run_id": None}
    names = sorted(name for name in flat_ours if flat_ours[name] != flat_theirs.get(name))
    return [f"{name}: {flat_theirs.get(name)} there, {flat_ours[name]} now" for name in names]
