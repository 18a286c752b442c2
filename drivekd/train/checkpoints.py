"""Checkpoints that are whole or absent.

A checkpoint is written under `<run>/incomplete/`, listed in a manifest with sizes and checksums,
synced to the disk, and only then renamed to `<run>/checkpoint-N`; older ones are moved back under
`incomplete/` before they are deleted. Whatever stops a run, each `checkpoint-N` is complete, and
what `incomplete/` holds is finished or thrown away at the next start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

from drivekd.errors import CheckpointError

MANIFEST = "drivekd_manifest.json"
STAGING = "incomplete"
_REPLACED = "replaced-"
_DELETED = "deleted-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 22  # bytes


def seal(folder: Path) -> None:
    """Write the manifest of a staged checkpoint and sync everything to the disk."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.name == MANIFEST:
            continue
        files[file.relative_to(folder).as_posix()] = {
            "bytes": file.stat().st_size,
            "crc32": _checksum(file),
        }
        _sync(file)
    manifest = folder / MANIFEST
    # Under another name first: a manifest that exists is whole.
    draft = folder / (MANIFEST + ".draft")
    draft.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _sync(draft)
    os.replace(draft, manifest)
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(directory)


def publish(staged: Path, final: Path) -> None:
    """Move a finished folder out of the staging folder, in the place of an older one if any."""
    replaced = staged.parent / (_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(staged, final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _remove_if_empty(staged.parent)


def finish_interrupted(run: Path) -> None:
    """Finish or throw away what an interrupted run left in its staging folder."""
    staging = run / STAGING
    if not staging.is_dir():
        return
    for staged in sorted(staging.iterdir()):
        if (
            _CHECKPOINT.fullmatch(staged.name)
            and (staged / MANIFEST).exists()
            and _is_whole(staged)
        ):
            publish(staged, run / staged.name)
    if not staging.is_dir():
        return
    for staged in sorted(staging.iterdir()):
        final = run / staged.name.removeprefix(_REPLACED)
        if staged.name.startswith(_REPLACED) and not final.exists():
            os.rename(staged, final)
    shutil.rmtree(staging)


def rotate(run: Path, *, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest one nor the best one."""
    if not limit or limit < 0:
        return
    kept = {newest.name} | ({Path(best).name} if best else set())
    others = [folder for folder in _by_step(run) if folder.name not in kept]
    surplus = len(others) + len(kept) - max(limit, len(kept))
    for folder in others[: max(0, surplus)]:
        # A folder half deleted must not look like a checkpoint.
        (run / STAGING).mkdir(exist_ok=True)
        doomed = run / STAGING / (_DELETED + folder.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    _remove_if_empty(run / STAGING)


def replace_file(draft: Path, final: Path) -> None:
    """Move a finished file to its place, where it is whole or absent whatever happens."""
    _sync(draft)
    os.replace(draft, final)
    _sync(final.parent)


def find(resume: str | bool | None, run: Path) -> str | None:
    """The checkpoint to go on from.

    Args:
        resume: A path; "last" or True (the newest of `run`, which must exist); "auto" (the newest,
            if there is one); None or False for a fresh run.
        run: The run's folder.

    Returns:
        Its path, checked; None for a fresh run.

    Raises:
        CheckpointError: The newest checkpoint is damaged. Older ones are not taken in its place,
            since that would silently repeat training: the message says how to ask for one.
        ValueError: `resume` is "last" and there is none.
    """
    if resume is None or resume is False:
        return None
    if resume not in (True, "last", "auto"):
        return str(resume)
    found = _by_step(run)
    if not found:
        if resume == "auto":
            return None
        raise ValueError(f"resume_from_checkpoint is 'last' but {run} has no checkpoint")
    newest = found[-1]
    try:
        if not (newest / MANIFEST).exists():
            raise CheckpointError(
                f"{newest} has no {MANIFEST}: its copy is incomplete, or another program wrote it"
            )
        check(newest)
    except CheckpointError as error:
        older = "start afresh"
        if len(found) > 1:
            older = f"give resume_from_checkpoint={found[-2]} (in a recipe under training)"
        raise CheckpointError(
            f"{error}. To go on without it, delete or move it, or {older}; to use it as it is, "
            "give its path and delete its manifest, if any"
        ) from error
    return str(newest)


def check(folder: Path) -> None:
    """Compare a checkpoint with its manifest; one without a manifest passes.

    Raises:
        CheckpointError: A file is missing, has another size, or other contents.
    """
    file = folder / MANIFEST
    if not file.exists():
        return
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} cannot be read") from error
    for name, wanted in listed:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise CheckpointError(
                f"{folder} is damaged: {name} has {size:,} bytes, wanted {wanted['bytes']:,}"
            )
        if _checksum(path) != wanted["crc32"]:
            raise CheckpointError(f"{folder} is damaged: the contents of {name} have changed")


def newest_complete(run: Path) -> Path | None:
    """The newest checkpoint with a manifest, for messages; not checked."""
    complete = [folder for folder in _by_step(run) if (folder / MANIFEST).exists()]
    return complete[-1] if complete else None


def _by_step(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first."""
    if not run.is_dir():
        return []
    steps = {
        int(match[1]): path
        for path in run.iterdir()
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]


def _is_whole(folder: Path) -> bool:
    try:
        check(folder)
    except CheckpointError:
        return False
    return True


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
