"""Files that other programs read: written aside, renamed into place when whole, locked while in use."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.console import UserError, is_main_process, say


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it becomes `path` only if the block ends without an error.

    What killed processes of this machine left aside is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    here = glob.escape(socket.gethostname())
    for left in path.parent.glob(f".{glob.escape(path.name)}.{here}.*.part"):
        if not is_running(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it becomes `path` (the old one goes) if the block ends without an error.

    What an earlier, killed attempt left aside is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                sync(file)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def is_running(process: int) -> bool:
    """True if this machine has a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def sync(path: Path) -> None:
    """Have the bytes of `path` on the disk, readable as other new files are, before its name says that it is whole."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors leaves its files to their owner alone
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_plain(path: str | Path) -> None:
    """Raises UserError where `path` is a pipe, a device or the like, which may give no end, or nothing ever."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: is not a plain file; save what it gives to a file first")


def read_json(path: str | Path) -> Any:
    """Parse a JSON file (UTF-8, a byte-order mark is allowed).

    Raises UserError where the file is missing, unreadable, not UTF-8 or not JSON; the line and column are named.
    """
    check_plain(path)
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); mend the file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except (RecursionError, ValueError):  # Python reads integers of up to 4300 digits
        raise UserError(f"{path}: nested too deeply, or a number in it too long, to be read; mend the file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as UTF-8 JSON, indent 1, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits. Raises UserError where the file cannot be read."""
    check_plain(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def digest(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def check_folder(folder: str | Path, option: str = "--output_dir") -> None:
    """Raises UserError where `folder`, which `option` names, cannot be one: it is a file, under one, or may not be made."""
    if not str(folder):
        raise UserError(f"{option}: is empty; name a folder")
    path = Path(folder).absolute()
    above = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not above.is_dir():
        raise UserError(f"{above}: is not a folder; give another {option}")
    if not os.access(above, os.W_OK):
        number = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
        raise UserError(f"{above}: cannot be written to ({os.strerror(number)}); give another {option}")


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep `folder` (which need not exist yet) for this process while the block runs.

    The lock is the kernel's, on a file beside the folder, so it ends with the process, however that ends. Of several
    processes that train together only the main one holds it. Folders that are made for it go again where they stay empty.
    Raises UserError, naming the other's host and process id, where another run holds it; also where the file is another
    machine's, since not every shared folder passes the kernel's locks on.
    """
    if not is_main_process():
        yield
        return
    path = Path(folder).absolute()
    new = list(itertools.takewhile(lambda parent: not parent.exists(), path.parents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made ({error.strerror}); choose another place for the output") from None
    name = path.with_name(f".{path.name}.lock")
    with open(name, "a+") as file:
        take(file, folder, name)
        try:
            yield
        finally:
            name.unlink(missing_ok=True)
            for parent in new:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def take(file: IO[str], folder: str | Path, name: Path) -> None:
    """Lock the opened lock file `name` of `folder`, and write into it who has it; raises as `locked` does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (name.exists() and os.path.samestat(os.fstat(file.fileno()), name.stat())):
            raise BlockingIOError  # its holder removed the name between our two calls
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder}: in use by {file.read() or 'another run'}; wait for it, or choose another folder") from None
    file.seek(0)
    before, here = file.read(), socket.gethostname()
    if before and not before.endswith(f" on {here}"):
        raise UserError(f"{folder}: in use by {before}; wait for it, or delete {name} if that run has ended")
    if before:
        say(f"{folder}: {before} ended without giving it back; going on")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {here}")
    file.flush()
