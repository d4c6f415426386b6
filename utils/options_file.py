"""A file of options, `--config run.yaml`: what a run was given, and can be given again."""

import difflib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.console import UserError, reason
from utils.files import replacing

CONFIG = "config"  # the one option that all scripts have
LARGEST_CONFIG = 2**20
SECRETS = ("auth", "api_key")  # never written to a file
NOT_GIVEN = ("", "~", "null", "Null", "NULL")  # values that YAML takes for none


def no_such_option(shown: str, name: str, fields: dict, dashes: str) -> str:
    """The error for an unknown option, with the nearest known name."""
    near = difflib.get_close_matches(name, fields, 1, 0.6)
    return f"{shown}: no such option; " + (f"did you mean {dashes}{near[0]}?" if near else "see --help for all options")


def read_options(path: str, fields: dict) -> Iterator[tuple[str, str]]:
    """The options of a YAML file as pairs of name and raw value; one without a value counts as not given.

    Raises UserError if the file cannot be read, is not a mapping of plain values and lists, or names an option that is unknown
    or given twice.
    """
    import yaml

    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_CONFIG + 1)
        if len(text) > LARGEST_CONFIG:
            raise UserError(f"--{CONFIG} {path}: is larger than a megabyte; name a file of options")
        options = list(entries(path, yaml.parse(text, yaml.SafeLoader)))
    except OSError as error:
        raise UserError(f"--{CONFIG} {path}: cannot be read ({error.strerror}); name a YAML file of options") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--{CONFIG} {path}: is not YAML ({reason(error)}); write one option per line, name: value") from None
    if not options:
        raise UserError(f"--{CONFIG} {path}: holds no options; write one per line, name: value")
    known: set[str] = set()
    for name, value in options:
        if name not in fields:
            raise UserError(no_such_option(f"{path}: {name:.80}", name, fields, ""))
        if name in known:
            raise UserError(f"{path}: {name}: is given twice; keep one of them")
        known.add(name)
        if value is not None:
            yield name, repr(value) if isinstance(value, list) else value


def entries(path: str, events: Iterable[Any]) -> Iterator[tuple[str, str | list[str] | None]]:
    """Names and values of a YAML mapping, from the parser's events: texts as they are written, since YAML takes 010 for 8,
    1:30 for 90, and no for false."""
    import yaml

    events = plain_events(path, events)
    opening = list(itertools.islice(events, 3))  # the stream, the document, and what this is
    if not isinstance(opening[-1], yaml.MappingStartEvent):
        return
    for key in events:
        if isinstance(key, yaml.MappingEndEvent):
            break
        if not isinstance(key, yaml.ScalarEvent):
            raise UserError(f"{path}: names an option by a list or a mapping; write one per line, name: value")
        value = next(events)
        if isinstance(value, yaml.ScalarEvent):
            yield key.value, None if value.style is None and value.value in NOT_GIVEN else value.value
            continue
        parts = []
        for part in events if isinstance(value, yaml.SequenceStartEvent) else [value]:
            if isinstance(part, yaml.SequenceEndEvent):
                break
            if not isinstance(part, yaml.ScalarEvent):
                raise UserError(f"{path}: {key.value}: not a plain value or a list of these; see --help")
            parts.append(part.value)
        yield key.value, parts
    if any(isinstance(event, yaml.DocumentStartEvent) for event in events):
        raise ValueError("several documents")


def plain_events(path: str, events: Iterable[Any]) -> Iterator[Any]:
    """The events of a YAML text, as long as none repeats a value or has a tag."""
    import yaml

    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--{CONFIG} {path}: repeats values by *name, a few of which may mean millions; write them out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise ValueError(f"the tag {event.tag}")
        yield event


def write_options(options: dict[str, Any], path: str | Path) -> None:
    """Write the options of a run, by name, as YAML that `--config` reads again; passwords and keys are left out."""
    import yaml

    options = {name: value for name, value in options.items() if name not in SECRETS}
    with replacing(Path(path)) as aside:
        aside.write_text(yaml.safe_dump(options, allow_unicode=True, sort_keys=False), "utf-8")
