"""The directory of a checkpoint: filled under a hidden name, renamed when complete, checked before it is read.

Nothing here knows what the files hold, except that state.json says whether the checkpoint ends a stage. `newest` trusts
names, manifests and sizes; `verify` reads every byte. Everything here runs in one process; store.py coordinates the
ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.files import Count, FileName, read_json
from conf.words import first_line, listed

FORMAT_VERSION = 1
STATE, MANIFEST = "state.json", "manifest.json"
# Both begin with a dot and end with a checkpoint's name.
SAVING, REPLACED = ".saving_", ".replaced_"
NAME = re.compile(r"tokens_\d{15}")


class CheckpointError(Exception):
    """A checkpoint that cannot be written, found, trusted or used; the message says which file and what to do."""


@dataclass(frozen=True)
class Entry:
    """A file's entry in the manifest."""

    size: Count
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    format_version: int
    files: dict[FileName, Entry]


@dataclass(frozen=True)
class _StageEnd:
    """The fields of state.json that are read here."""

    stage_end: bool


def directory_name(tokens: int) -> str:
    """Returns the name of the checkpoint at `tokens`."""
    return f"tokens_{tokens:015d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Returns a run's complete checkpoints, oldest first: those with a manifest and every file of it at its recorded
    size."""
    return [path for path in _named(run_dir) if _is_complete(path)]


def newest(run_dir: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None."""
    return next(reversed(checkpoints(run_dir)), None)


def refuse_incomplete(run_dir: Path) -> None:
    """Raises CheckpointError if something was lost from a checkpoint newer than the newest complete one.

    Checkpoints appear only when complete, so this is damage: resuming from an older one would train its tokens again.
    """
    for path in reversed(_named(run_dir)):
        if _is_complete(path):
            return
        verify(path)


def find(source: Path) -> Path:
    """Returns the checkpoint that `source` names: itself, or the newest of a run directory.

    Raises CheckpointError, also if a newer one of that run is damaged: there is no silent fallback to an older one.
    """
    if (source / MANIFEST).exists() or NAME.fullmatch(source.name):
        return source
    refuse_incomplete(source)
    found = newest(source)
    if found is None:
        nothing = "" if source.exists() else ": there is no such directory"
        raise CheckpointError(f"{source} is neither a checkpoint nor a run directory with a complete one{nothing}")
    return found


def _named(run_dir: Path) -> list[Path]:
    """Directories with a checkpoint's name, oldest first; anything else is ignored."""
    folder = run_dir / "checkpoints"
    return sorted(path for path in folder.glob("tokens_*") if NAME.fullmatch(path.name))


# Writing


def begin(run_dir: Path, tokens: int) -> Path:
    """Returns the new, empty, hidden directory that `commit` will make the checkpoint at `tokens`. Raises OSError."""
    temporary = saving_directory(run_dir, tokens)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def saving_directory(run_dir: Path, tokens: int) -> Path:
    """Returns the path `begin` makes."""
    return run_dir / "checkpoints" / (SAVING + directory_name(tokens))


def write_text(path: Path, text: str) -> None:
    """Writes a small UTF-8 file and flushes it to disk."""
    path.write_text(text, encoding="utf-8")
    _flush(path)


def seal(path: Path, mode: int | None = None) -> Entry:
    """Returns a file's manifest entry, having given it `mode` (default: `file_mode()`) and flushed it to disk. Raises
    OSError."""
    path.chmod(file_mode() if mode is None else mode)
    _flush(path)
    return Entry(path.stat().st_size, _digest(path))


def share(path: Path) -> None:
    """Sets a file's mode to what the umask allows: safetensors makes its files readable by the owner only."""
    path.chmod(file_mode())


def file_mode() -> int:
    """Returns the mode that the umask allows a new file. Not thread-safe: reading the umask changes it for a moment."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def commit(temporary: Path, files: dict[str, Entry]) -> Path:
    """Returns the finished checkpoint: manifest written, directory flushed and renamed, `latest` pointing to it.

    `files` are the manifest entries. The checkpoint exists from the rename on. Raises OSError.
    """
    root, name = temporary.parent, temporary.name.removeprefix(SAVING)
    final, replaced = root / name, root / (REPLACED + name)
    write_text(temporary / MANIFEST, json.dumps(asdict(Manifest(FORMAT_VERSION, files)), indent=1))
    _flush(temporary)
    if final.exists():  # a run that went back past a damaged checkpoint gets here again
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _flush(root)
    shutil.rmtree(replaced, ignore_errors=True)
    _point_to(final)
    return final


def _point_to(checkpoint: Path) -> None:
    root = checkpoint.parent
    write_text(root / ".latest", checkpoint.name + "\n")
    os.replace(root / ".latest", root / "latest")
    _flush(root)


def discard(temporary: Path) -> None:
    """Removes an unfinished checkpoint."""
    shutil.rmtree(temporary, ignore_errors=True)


def clean_stale(run_dir: Path) -> None:
    """Removes what killed processes left half-written or half-removed, and has `latest` name the newest checkpoint.
    Only for the holder of the run's lock."""
    for path in (run_dir / "checkpoints").glob(f"{REPLACED}tokens_*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():  # killed between the two renames that replace a checkpoint
            path.rename(final)
    for prefix in (SAVING, REPLACED):
        for path in (run_dir / "checkpoints").glob(f"{prefix}tokens_*"):
            shutil.rmtree(path, ignore_errors=True)
    last, pointer = newest(run_dir), run_dir / "checkpoints" / "latest"
    if last is not None and not (pointer.exists() and pointer.read_bytes().strip() == last.name.encode()):
        _point_to(last)


def prune(run_dir: Path, keep: int) -> None:
    """Removes checkpoints except the newest `keep` (at least one) and those at the end of a stage."""
    for path in checkpoints(run_dir)[: -max(keep, 1)]:
        if not _ends_stage(path):
            doomed = path.with_name(SAVING + path.name)  # hidden first: a half-removed one must not look complete
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _ends_stage(checkpoint: Path) -> bool:
    try:
        return read_json(checkpoint / STATE, _StageEnd, error=CheckpointError).stage_end
    except CheckpointError:
        return True  # damaged: left for the user to remove


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Checking


def manifest(checkpoint: Path) -> dict[str, Entry]:
    """Returns file name -> size and checksum. Raises CheckpointError."""
    path = checkpoint / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{checkpoint} is not a checkpoint of this project: it has no {MANIFEST}")
    content = read_json(path, Manifest, error=CheckpointError)
    if content.format_version != FORMAT_VERSION:
        version = f"format version {content.format_version}; this program reads {FORMAT_VERSION}"
        raise CheckpointError(f"{checkpoint} has {version}")
    if STATE not in content.files:
        raise CheckpointError(f"{path} does not name {STATE}")
    return content.files


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = manifest(checkpoint)
        return all((checkpoint / file).stat().st_size == entry.size for file, entry in files.items())
    except (CheckpointError, OSError):
        return False


def damage(checkpoint: Path, file: str, entry: Entry | None) -> str | None:
    """Returns what is wrong with one file, or None: its size, its checksum, or that it cannot be read.

    Without an `entry` the manifest does not know it.
    """
    path = checkpoint / file
    if entry is None:
        return f"{checkpoint / MANIFEST} does not name {file}"
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{path} has {size} bytes instead of {entry.size}"
        return None if _digest(path) == entry.sha256 else f"{path} does not match its SHA-256 checksum"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or first_line(error)})"


def verify(checkpoint: Path, files: Iterable[str] | None = None) -> None:
    """Checks size and checksum of all files, or of some. Raises CheckpointError, as `raise_damage` words it."""
    try:
        entries = manifest(checkpoint)
    except CheckpointError as error:
        if NAME.fullmatch(checkpoint.name) and checkpoint.exists():
            raise_damage(checkpoint, [str(error)], "cannot be read")
        raise
    found = [damage(checkpoint, file, entries.get(file)) for file in (entries if files is None else files)]
    raise_damage(checkpoint, [text for text in found if text])


def raise_damage(checkpoint: Path, found: list[str], what: str = "is damaged") -> None:
    """Raises CheckpointError, if there is damage, with it and the newest good checkpoint before this one."""
    if not found:
        return
    advice = "There is no good one before it"
    for path in reversed(checkpoints(checkpoint.parent.parent)):
        if path.name < checkpoint.name and not any(damage(path, f, entry) for f, entry in manifest(path).items()):
            advice = f"The newest good one before it is {path}: remove {checkpoint} to continue from there"
            break
    raise CheckpointError(f"{checkpoint} {what}: {listed(found, '; ', longest=1000)}. {advice}")
