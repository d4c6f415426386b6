"""Runs a Python program without network, with no files but Python's libraries, and with limits on resources.

    python -I utils/evaluation/sandbox.py FOLDER SECONDS MEGABYTES < program.py

The first line of standard input is a word that is printed if the program reaches its end. This is a separate program that
imports nothing from this project. Linux takes its rights away first: it sees no network and no other processes (namespaces),
only a small disk of its own in memory and Python's libraries (mounted read-only), runs as nobody, and has limits (setrlimit).
FOLDER is an empty folder where that disk is mounted, invisible from outside. Exit status 97 means that the machine does not
allow this; then nothing was run.
"""

import ctypes
import os
import signal
import struct
import sys

REFUSED = 97
NEW_MOUNTS, NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000
READ_ONLY, NO_SUID, NO_DEV, REMOUNT, BIND, MOVE, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 8192, 16384, 1 << 18
DIE_WITH_PARENT, DUMPABLE, NO_NEW_PRIVILEGES, CAPABILITIES_3 = 1, 4, 38, 0x20080522
NOBODY = 65534
FILE_BYTES, DISK_BYTES, DISK_FILES, OPEN_FILES, PROCESSES = 1 << 24, 1 << 26, 1024, 64, 16
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def main() -> None:
    """Drop all privileges, then run the program."""
    if libc is None:
        print("namespaces: this is not Linux", file=sys.stderr)
        sys.exit(REFUSED)
    import resource  # here, since this module is also imported where it does not exist

    folder, seconds, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    word, _, program = sys.stdin.read().partition("\n")
    was_root, was = os.geteuid() == 0, (os.geteuid(), os.getegid())
    check("namespaces", libc.unshare(NEW_MOUNTS | NEW_PID | NEW_NET | NEW_IPC | (0 if was_root else NEW_USER)))
    if not was_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{was[0]} {was[0]} 1"), ("gid_map", f"{was[1]} {was[1]} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    first = os.fork()  # the first process of its namespace: all others in it end with it
    if first:
        pass_on(first)
    os.setsid()  # leaves the process group, so that the program cannot signal it
    change_root(folder)
    become_nobody(was_root)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    libc.prctl(DUMPABLE, 0, 0, 0, 0)  # so that the program cannot attach to this process
    second = os.fork()
    if second:
        pass_on(second, ran=True)
    limits = {"CPU": seconds, "AS": megabytes << 20, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0, "NPROC": PROCESSES}
    for name, bound in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    print(f"\n{word}", flush=True)


def pass_on(child: int, ran: bool = False) -> None:
    """Wait for a child, and end with its status; once the program `ran`, REFUSED becomes 1."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF
    os._exit(1 if ran and status == REFUSED else status)


def change_root(folder: str) -> None:
    """Show this process and its children only a small disk in memory, with Python's libraries read-only in it."""
    mount(None, "/", PRIVATE | RECURSIVE)
    mount("tmpfs", folder, NO_SUID | NO_DEV, "tmpfs", f"size={DISK_BYTES},nr_inodes={DISK_FILES},mode=755")
    top, folder = folder, f"{folder}/inside"  # a root below the disk's: there the kernel allows no further user namespaces
    wanted = {os.path.realpath(path) for path in (*sys.path, *LIBRARIES) if os.path.isdir(path)}
    for path in sorted(wanted):
        if not any(path.startswith(f"{other}/") for other in wanted):
            os.makedirs(folder + path)
            mount(path, folder + path, BIND | RECURSIVE)
            mount(None, folder + path, BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEV)
    for path in LIBRARIES:
        if os.path.islink(path):
            os.symlink(os.path.realpath(path), folder + path)
    os.makedirs(f"{folder}/tmp", exist_ok=True)  # it exists if Python's libraries are in it
    os.chmod(f"{folder}/tmp", 0o777)
    os.chdir(top)
    mount(".", "/", MOVE)
    os.chroot("inside")
    os.chdir("/tmp")


def mount(what: "str | None", where: str, flags: int, kind: "str | None" = None, settings: "str | None" = None) -> None:
    """Mount something; ends this program if that is not allowed."""
    texts = [None if text is None else text.encode() for text in (what, where, kind, settings)]
    assert libc is not None
    check("mounting", libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def become_nobody(was_root: bool) -> None:
    """Drop all privileges of this process, for good."""
    if was_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    assert libc is not None
    header, nothing = struct.pack("=Ii", CAPABILITIES_3, 0), bytes(24)
    check("capabilities", libc.capset(header, nothing))
    check("privileges", libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def check(what: str, result: int) -> None:
    """End if the machine refused `what`."""
    if result:
        print(f"{what}: {os.strerror(ctypes.get_errno())}", file=sys.stderr, flush=True)
        os._exit(REFUSED)


if __name__ == "__main__":
    main()
