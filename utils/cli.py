"""How a script starts: typed options, typos refused before anything heavy is imported, user errors as one line.

Options are the fields of a dataclass, each made by `option`; they can be written in any of Fire's ways (`--x 1`, `--x=1`,
`--flag`, `--flag False`, `--noflag`, `--x '[a,b]'`). If an option is given twice, the last counts, so that a shell script
can pass "$@" on; an option made with `many=True` collects all. `--config run.yaml` reads options from a file; those on the
command line win.
"""

import atexit
import ctypes
import dataclasses
import errno
import gc
import io
import logging
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from utils.console import UserError, harmless, is_out_of_memory, leave_terminal, reason
from utils.files import check_names
from utils.options_file import CONFIG, no_such_option, read_options

T = TypeVar("T")
FLAG = re.compile(r"--?[A-Za-z]")
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries written in Rust (tokenizers, safetensors) tell an OSError
LESS_MEMORY = "give --load_8bit or --load_4bit, fewer tokens or records at once, or use a machine with more"
PR_SET_PDEATHSIG = 1  # prctl(2)
OTHER_PLACE = "free disk space, fix the permissions, or choose another path, then rerun"
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    many: bool = False,
    heading: str = "",
) -> Any:
    """A field of an options dataclass: its default (none: required), one line of help, its bounds.

    `heading` opens a new group in the help text; `many` lets the option be given several times.
    """
    metadata = {"help": help, "least": least, "most": most, "choices": choices, "many": many, "heading": heading}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def run(main: Callable[[Any], None], options: type, argv: list[str] | None = None) -> None:
    """Parse the command line into `options`, call `main` with them, and exit with 0, or 2 with one line on stderr."""
    open_missing_streams()
    if argv is None:
        read_names_as_utf8()
        argv = sys.argv[1:]
    script = Path(sys.argv[0]).name
    show_any_character()
    module = sys.modules[main.__module__]
    # threads wait without spinning: much faster if other programs use the CPU; must be set before torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns about kernels that nobody asked for
    atexit.register(gc.freeze)  # else Python looks through all objects for garbage once more: a second or two at every end
    end_when_told()
    try:
        if {"--help", "-h"} & set(argv):
            print(help_text(options, module.__doc__ or ""), flush=True)
            return
        main(parse(options, argv))
        return
    except UserError as error:
        problem = str(error)
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed twice, it would print a traceback
        number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
        print(f"{script}: interrupted" + (f" ({number.name})" if number != signal.SIGINT else ""), file=sys.stderr)
        sys.exit(128 + number)
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards what is still to be flushed
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        problem = f"{error.filename or 'output'}: {error.strerror}; {OTHER_PLACE}"
    except Exception as error:
        if is_out_of_memory(error):
            problem = f"out of memory ({reason(error)}); {LESS_MEMORY}"
        else:
            found = OS_ERROR.search(str(error))
            if found is None or int(found[1]) not in NO_PLACE:
                raise
            problem = f"output: {os.strerror(int(found[1]))}; {OTHER_PLACE}"
    fail(script, problem)  # here, since the error and the progress bars it kept open are gone by now


def end_when_told() -> None:
    """Make SIGINT (Ctrl-C), SIGTERM and SIGHUP end the script by a KeyboardInterrupt, so that no partial file or lock is left
    behind. Whichever comes after the first is ignored: it would disturb the cleanup.

    Processes forked by it keep the default action.
    """
    own = os.getpid()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: two

    def end(number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        for one in numbers:
            signal.signal(one, lambda *_: None)  # SIG_IGN would have Python complain about one that has already come
        if signal.Signals(number).name == "SIGHUP":
            leave_terminal()
        raise KeyboardInterrupt(number)

    for number in numbers if threading.current_thread() is threading.main_thread() else ():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # nohup has it ignored
            signal.signal(number, end)


def end_with_parent() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def open_missing_streams() -> None:
    """Give a script that was started with closed standard streams (`>&-`, some services) ones that lead nowhere.

    Otherwise printing fails, and the next file that is opened takes the closed one's number, and with it what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode))  # the lowest free number, which is its own


def show_any_character() -> None:
    """Print characters that a terminal's encoding (GBK, Latin-1, ASCII) lacks as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def read_names_as_utf8() -> None:
    """Restart with file names read as UTF-8, as on all current systems, if the locale has another encoding.

    Output keeps the encoding of the locale, which is the terminal's.
    """
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode or not sys.stdout:
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, sys.orig_argv)


def fail(script: str, text: str) -> typing.NoReturn:
    """End the program with exit status 2 and one line on stderr."""
    line = harmless(" ".join(text.split()))
    print(f"{script}: error: {line}", file=sys.stderr)
    sys.exit(2)


def parse(options: type[T], argv: list[str]) -> T:
    """Turn `argv` into an instance of the dataclass `options`.

    Raises UserError for an unknown option (the nearest name is suggested), a wrong type, a value out of
    bounds, or a required option that is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    kinds = typing.get_type_hints(options)
    given = list(_pairs(argv, fields, kinds))
    values: dict[str, Any] = {}
    for config in [raw for name, raw in given if name == CONFIG]:
        for name, raw in read_options(config, fields):
            try:
                values[name] = _convert(name, raw, kinds[name], fields[name].metadata)
            except UserError as error:
                raise UserError(f"{config}: {error}") from None
    from_line: dict[str, Any] = {}
    for name, raw in given:
        check_names(raw)
        if name == CONFIG:
            continue
        value = _convert(name, raw, kinds[name], fields[name].metadata)
        from_line[name] = from_line.get(name, []) + value if fields[name].metadata["many"] else value
    values |= from_line
    missing = [f"--{name}" for name, field in fields.items() if _is_required(field) and not values.get(name)]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing; give {'it' if len(missing) == 1 else 'them'}, or see --help")
    return options(**values)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _pairs(argv: list[str], fields: dict, kinds: dict) -> typing.Iterator[tuple[str, str]]:
    """Split a command line, as Fire does, into pairs of option name and raw value."""
    index = 0
    while index < len(argv):
        token = argv[index]
        index += 1
        if not FLAG.match(token):
            raise UserError(f"{token}: unexpected; options are written --name value")
        name, equals, raw = token.lstrip("-").partition("=")
        name = name.replace("-", "_")
        negated = name not in fields and name.removeprefix("no").lstrip("_") in fields
        if negated and not equals and kinds[name.removeprefix("no").lstrip("_")] in (bool, bool | None):
            yield name.removeprefix("no").lstrip("_"), "False"
            continue
        if name not in fields and name != CONFIG:
            raise UserError(no_such_option(f"--{name}", name, fields, "--"))
        stands_alone = name != CONFIG and bool in (kinds[name], *typing.get_args(kinds[name]))
        if not equals:
            if index < len(argv) and not FLAG.match(argv[index]):
                raw = argv[index]
                index += 1
            elif stands_alone:
                raw = "True"
            else:
                raise UserError(f"--{name}: has no value; write --{name} VALUE")
        yield name, raw


def _convert(name: str, raw: str, kind: Any, bounds: typing.Mapping[str, Any]) -> Any:
    """Read `raw` as the type `kind` (a plain type, list[str], or a union of these, tried in order)."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and raw == "None":
        return None
    for candidate in kinds:
        value = _read_as(candidate, raw)
        if value is not None:
            break
    else:
        names = " or ".join(TYPE_NAMES[k] for k in kinds if k is not type(None))
        raw = raw if len(raw) <= 80 else f"{raw[:80]}…"
        raise UserError(f"--{name} {raw}: not {names}; see --help")
    least, most, choices = bounds["least"], bounds["most"], bounds["choices"]
    for one in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
        if choices and one not in choices:
            raise UserError(f"--{name} {one}: not one of {', '.join(filter(None, choices))}; choose one of these")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if least is not None and value < least:
            raise UserError(f"--{name} {raw}: too small; give at least {least}")
        if most is not None and value > most:
            raise UserError(f"--{name} {raw}: too large; give at most {most}")
    return value


def _read_as(kind: Any, raw: str) -> Any:
    """`raw` as one plain type, or None if it is not of that type."""
    if kind is str:
        return raw
    if kind is bool:
        return True if raw.lower() in TRUE else False if raw.lower() in FALSE else None
    if kind == list[str]:
        from fire.parser import DefaultParseValue  # here, because it takes a tenth of a second

        if "," in raw and os.path.exists(raw):  # in a name
            return [raw]
        parts = list(filter(None, map(str.strip, raw.split(","))))
        try:
            value = DefaultParseValue(raw) if raw.startswith(("[", "(")) else parts
        except (ValueError, RecursionError, MemoryError):  # what Python's own parser raises
            return None
        if raw.startswith("[") and raw.endswith("]") and isinstance(value, str):  # names with dots, and patterns
            value = list(filter(None, map(str.strip, raw[1:-1].split(","))))
        elif raw.startswith("(") and not isinstance(value, (list, tuple)):
            value = parts
        return [str(item) for item in value] if isinstance(value, (list, tuple)) else None
    if kind in (int, float):
        try:
            value = kind(raw)
        except ValueError:
            return None
        return value if math.isfinite(value) else None
    return None


TYPE_NAMES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list[str]: "a list such as '[a,b]'",
}
PLACEHOLDERS = {str: "TEXT", bool: "true|false", int: "N", float: "X", list[str]: "'[A,B]'"}


def describe(options: type) -> list[tuple[str, str, str, str, str]]:
    """One row per option: heading (or ""), name, kind of value, default as written, help."""
    rows = []
    kinds = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind = kinds[field.name]
        plain = [k for k in (typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)) if k is not type(None)]
        choices = field.metadata["choices"]
        several = list[str] in plain and choices
        value = f"'[{','.join(choices)}]'" if several else "|".join(choices) or "|".join(PLACEHOLDERS[k] for k in plain)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if isinstance(default, list):
            default = f"[{','.join(default)}]" if default else ""
        shown = "required" if _is_required(field) else "" if default is None or default == "" else str(default)
        rows.append((field.metadata["heading"], f"--{field.name}", value, shown, field.metadata["help"]))
    return rows


def help_text(options: type, docstring: str) -> str:
    """The script's docstring and its options, a line or two each, as wide as the terminal but at most 100 columns."""
    width = max(60, min(100, shutil.get_terminal_size().columns))
    lines = [docstring.strip()]
    config = ("Options", f"--{CONFIG}", "FILE.yaml", "", "read options from a file; those on the command line win")
    for heading, name, value, default, help in (config, *describe(options)):
        if heading:
            lines.append(f"\n{heading}:")
        suffix = f" ({default})" if default == "required" else f" [{default}]" if default else ""
        head, lines_of_help = f"  {name} {value}", textwrap.wrap(f"{help}{suffix}", width - 30)
        if len(head) <= 28:
            head = f"{head:<30}{lines_of_help.pop(0)}"
        lines += [*textwrap.wrap(head, width, subsequent_indent="      "), *(f"{'':30}{line}" for line in lines_of_help)]
    return "\n".join(lines)
