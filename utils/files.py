"""Files that other programs read: written aside, renamed into place when complete, locked while in use."""

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from utils.console import UserError, is_main_process, say, say_once

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEAST_ROOM = 2**20  # bytes that a disk must have left for anything to be begun
WRITTEN = {".json", ".jsonl", ".csv", ".yaml", ".safetensors", ".jinja", ".png", ".md", ".html", ".made", ".journal"}
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of network disks without locks


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it becomes `path` only if the block ends without an error.

    Leftovers of killed processes on this machine are removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    here = glob.escape(socket.gethostname())
    for left in path.parent.glob(f".{glob.escape(path.name)}.{here}.*.part"):
        if not psutil.pid_exists(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    finally:
        with undisturbed():
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C, SIGTERM and SIGHUP while the block cleans up: a second one would leave a partial file."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives it
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it replaces `path` if the block ends without an error.

    Leftovers of an earlier, killed attempt are removed first.
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
        with undisturbed():
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush `path` to disk, with the usual permissions of new files, before its name says that it is complete."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors makes files readable only by their owner
    with open(path, "rb+" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


def check_plain(path: str | Path) -> None:
    """Raises UserError if `path` is a pipe, a device or the like, which may never end, or never give anything."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: is not a regular file; save its output to a file first")


def read_json(path: str | Path) -> Any:
    """Parse a JSON file (UTF-8, a byte-order mark is allowed).

    Raises UserError if the file is missing, unreadable, not UTF-8 or not JSON; the line and column are named.
    """
    check_plain(path)
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); fix the file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except (RecursionError, ValueError):  # Python reads integers of up to 4300 digits
        raise UserError(f"{path}: nested too deeply, or a number in it too long, to be read; fix the file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as UTF-8 JSON, indent 1, completely or not at all."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits. Raises UserError if the file cannot be read."""
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
    """Raises UserError if `folder`, which `option` names, cannot be one (it is a file, below one, or cannot be created), or
    if its disk is full."""
    if not str(folder):
        raise UserError(f"{option}: is empty; name a folder")
    if option == "--output_dir" and not Path(folder).absolute().name:
        raise UserError(f"{option} {folder}: is the disk's top folder; name one in it")
    path = Path(folder).absolute()
    above = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not above.is_dir():
        raise UserError(f"{above}: is not a folder; give another {option}")
    if not os.access(above, os.W_OK):
        is_read_only = hasattr(os, "statvfs") and os.statvfs(above).f_flag & os.ST_RDONLY
        number = errno.EROFS if is_read_only else errno.EACCES
        raise UserError(f"{above}: cannot be written to ({os.strerror(number)}); give another {option}")
    check_room(above, LEAST_ROOM, option)


def check_room(folder: str | Path, needed: int, option: str = "--output_dir") -> None:
    """Raises UserError if the disk of `folder`, which `option` names, has less than `needed` bytes left."""
    path = Path(folder).absolute()
    room = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists()))
    if room.total and room.free < needed:  # some network disks tell nothing
        most = f"{needed / 1e6:,.0f} MB are needed and {room.free / 1e6:,.0f} MB are free"
        raise UserError(f"{option} {folder}: {most}; make room, or choose another disk")


def check_free(paths: Iterable[Path], option: str = "--output_dir") -> None:
    """Raises UserError if one of the paths, where results may go, is a folder whose name ends like a result's."""
    for path in paths:
        if path.suffix in WRITTEN and path.is_dir():
            raise UserError(f"{path}: is a folder with the name of a file; move it, or give another {option}")


def check_names(*paths: str) -> None:
    """Raises UserError if a path is not UTF-8, as from archives made on Chinese Windows: no JSON file could hold it."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: the name is not UTF-8; rename the file or folder") from None


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Lock `folder` (which need not exist yet) for this process while the block runs.

    The lock is the kernel's, on a file beside the folder, so it is released with the process, however that ends. Of several
    processes that train together only the main one holds it. Folders created for it are removed if they stay empty.
    Raises UserError, naming the other's host and process id, where another run holds it; also where the file is another
    machine's, since not every shared folder passes the kernel's locks on.
    """
    if not is_main_process():
        yield
        return
    path = Path(folder).absolute()
    new = list(itertools.takewhile(lambda parent: not parent.exists(), path.parents))
    name = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(name, "a+")
    except OSError as error:
        where = path if path.parent.is_dir() else path.parent
        raise UserError(f"{where}: cannot be made ({error.strerror}); choose another place for the output") from None
    with file:
        take(file, folder, name)
        try:
            yield
        finally:
            with undisturbed():
                name.unlink(missing_ok=True)
                for parent in new:
                    with contextlib.suppress(OSError):
                        parent.rmdir()


def lock(file: IO[str], folder: str | Path) -> bool:
    """Take the kernel's lock on an open file; False if locks are unsupported. Raises BlockingIOError if it is taken."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    say_once(f"{Path(folder).absolute().parent}: has no file locks; do not start two runs with one output folder at once")
    return False


def take(file: IO[str], folder: str | Path, name: Path) -> None:
    """Lock the opened lock file `name` of `folder`, and write into it who has it; raises as `locked` does.

    Where the system or the disk has no locks, which is printed, the process that the file names counts as long as it runs.
    """
    has_locks = False
    try:
        has_locks = lock(file, folder)
        if not (name.exists() and os.path.samestat(os.fstat(file.fileno()), name.stat())):
            raise BlockingIOError  # its holder removed the file between our two calls
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder}: in use by {file.read() or 'another run'}; wait for it, or choose another folder") from None
    file.seek(0)
    before, here = file.read(), socket.gethostname()
    process = before.split()[1] if before.endswith(f" on {here}") else ""
    if not has_locks and process.isdigit() and int(process) != os.getpid() and psutil.pid_exists(int(process)):
        raise UserError(f"{folder}: in use by {before}; wait for it, or choose another folder")
    if before and not before.endswith(f" on {here}"):
        raise UserError(f"{folder}: in use by {before}; wait for it, or delete {name} if that run has ended")
    if before:
        say(f"{folder}: removed a stale lock left by {before}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {here}")
    file.flush()
