# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a process killed at any moment leaves the old content or the new, never half of it.

One file: written under another name in the same folder, synced, renamed. Several files that belong together
(configuration and weights):

1. all of them are written into a hidden folder `.adapter_new.<host>.<pid>.<random>` and synced;
2. that folder is renamed to `.adapter_pending`: from here on the new content counts;
3. the files are renamed into place, and the empty folder is removed.

A crash before 2 leaves the old files (and a hidden folder that the next save removes). After a crash between 2 and 3
`recover` finishes the renames; every reader of this package calls it first, and one without permission to write reads
the pending files where they are.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

PENDING = ".adapter_pending"
_NEW = ".adapter_new."
_REMOVE = "remove--"  # an empty file called remove--NAME in the pending folder: NAME is no longer valid


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the system can do that."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the folder of `path`; what is written there takes the place of `path` when the block ends
    without error.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{_writer()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a text file in one step (UTF-8)."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _writer() -> str:
    return f"{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def transaction(folder: str | os.PathLike, remove: tuple[str, ...] = ()) -> Iterator[Path]:
    """A hidden folder; the files written there appear in `folder` all together when the block ends without error.

    `remove` names files of `folder` that the new ones make invalid.
    """
    folder = Path(folder)
    recover(folder)
    _clean_up(folder)
    new = folder / (_NEW + _writer())
    new.mkdir()
    try:
        yield new
        for name in remove:
            if (folder / name).exists():
                (new / (_REMOVE + name)).touch()
        for path in new.iterdir():
            sync(path)
        sync(new)
        _commit(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    recover(folder)


def _commit(new: Path, folder: Path) -> None:
    for _ in range(100):
        try:
            os.rename(new, folder / PENDING)
        except OSError:  # another process has a pending save in this folder: finish it first
            if not (folder / PENDING).exists():
                raise
            recover(folder)
        else:
            sync(folder)
            return
    raise RuntimeError(f"{folder / PENDING} is in the way and cannot be finished; is another process saving there?")


def recover(folder: str | os.PathLike) -> None:
    """Finish a save that was cut off after it had become valid. Does nothing (and costs one stat) otherwise."""
    pending = Path(folder, PENDING)
    if not pending.is_dir():
        return
    folder = Path(folder)
    try:
        names = sorted(os.listdir(pending), key=_order)
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process recovers at the same time
                if name.startswith(_REMOVE):
                    (folder / name.removeprefix(_REMOVE)).unlink(missing_ok=True)
                    (pending / name).unlink()
                else:
                    os.replace(pending / name, folder / name)
        sync(folder)
        with contextlib.suppress(FileNotFoundError):
            pending.rmdir()
    except OSError:
        if os.access(folder, os.W_OK):
            raise
        # Read-only: `current` reads the pending files in place.


def _order(name: str) -> tuple[int, str]:
    """Files made invalid go first, the configuration comes last: without one a folder holds no adapter."""
    return (0 if name.startswith(_REMOVE) else 2 if name.endswith(".json") else 1, name)


def current(folder: str | os.PathLike, name: str) -> Path:
    """The valid file `name` of a folder, which is the pending one if a save could not be finished."""
    recover(folder)
    pending = Path(folder, PENDING)
    if pending.is_dir():
        if (pending / name).is_file():
            return pending / name
        if (pending / (_REMOVE + name)).exists():
            return pending / name  # does not exist, as it should be
    return Path(folder, name)


def _clean_up(folder: Path) -> None:
    """Remove what processes of this machine left behind that no longer exist."""
    for path in folder.glob(f".*.{_host()}.*"):
        pid = path.name.partition(f".{_host()}.")[2].partition(".")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # cannot be asked there: signal 0 is Ctrl+C
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:  # or one of another user, which must not be sent signals
        return not isinstance(error, ProcessLookupError)
    return True
