"""The training stage follows from the form of the records: raw text, questions with answers, or preferences.

Questions with answers can also be learned by rewards, which their form does not tell.
"""

import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from utils.console import UserError, say
from utils.datasets.documents import is_document, is_text_file, read_documents
from utils.datasets.file_formats import read_items
from utils.datasets.items import UnreadableItem, place_of
from utils.datasets.preferences import is_judged, is_pair, read_judged, read_pairs
from utils.datasets.raw_sets import is_half_of_couplets
from utils.datasets.records import read_records
from utils.datasets.sources import data_files

TEXT, INSTRUCTION, PREFERENCE, LABELLED, REWARD = "text", "instruction", "preference", "labelled", "reward"
NAMES = {
    TEXT: "raw text",
    INSTRUCTION: "questions and answers",
    PREFERENCE: "preferences",
    LABELLED: "answers with a label",
}
LOOKED_AT = 1000  # records of a file, to find those of another form
STAGES = {TEXT: (TEXT,), INSTRUCTION: (INSTRUCTION, REWARD), PREFERENCE: (PREFERENCE,), LABELLED: (PREFERENCE, INSTRUCTION)}


READERS: dict[str, Callable[[Path, Collection[str]], Iterator[Any]]] = {  # of a file; `carries`: see read_records
    TEXT: lambda file, carries: read_documents(file),
    INSTRUCTION: lambda file, carries: read_records(file, carries=carries),
    PREFERENCE: lambda file, carries: read_pairs(file),
    LABELLED: lambda file, carries: read_judged(file),
    REWARD: lambda file, carries: read_records(file, need_output=False, carries=carries),
}


def stage_of(data_path: str, asked: str = "", preference_loss: str = "", rewards: bool = False) -> str:
    """The stage that the files of a data path are trained by, by the first item of each that can be read.

    It is a key of READERS: pairs whose `preference_loss` is kto are learned as LABELLED answers. `asked` is the stage that
    the user named; if "", it follows from the records and from whether there are `rewards`.
    Raises UserError if the files are for different stages, or for another than the options say.
    """
    form = form_of(data_path)
    stage = asked or (REWARD if rewards else STAGES[form][0])
    if stage not in STAGES[form]:
        given = f"--stage {asked}" if asked else "--rewards"
        raise UserError(f"{given}: {data_path} holds {NAMES[form]}; give other records, or leave the option out")
    if rewards != (stage == REWARD):
        fix = "give --rewards" if stage == REWARD else f"leave one of them out; rewards are for --stage {REWARD}"
        raise UserError(f"--stage {stage}: {'without' if stage == REWARD else 'with'} --rewards; {fix}")
    if stage != PREFERENCE:
        if preference_loss:
            given = f"--preference_loss {preference_loss}: is for preferences"
            raise UserError(f"{given}, and {data_path} holds {NAMES[form]}; give other records, or leave the option out")
        return stage
    if form == LABELLED and preference_loss not in ("", "kto"):
        raise UserError(
            f"--preference_loss {preference_loss}: compares two answers, and {data_path} holds {NAMES[form]}; "
            "give records with chosen and rejected, or --preference_loss kto"
        )
    return LABELLED if preference_loss == "kto" else form


def form_of(data_path: str) -> str:
    """The form of the records in all files of a data path. Raises UserError if they differ."""
    forms = {file: form_of_file(file) for file in data_files(data_path)}
    first, *others = forms
    for other in others:
        if forms[other] != forms[first]:
            raise UserError(
                f"--data_path {data_path}: {first} holds {NAMES[forms[first]]}, {other} holds {NAMES[forms[other]]}; "
                "train on one kind, then on the other with --resume_from_checkpoint"
            )
    return forms[first]


def form_of_file(file: Path) -> str:
    """The form of the records in one file, by the first that can be read; others among the next ones are announced."""
    if is_text_file(file):
        if is_half_of_couplets(file):
            raise UserError(f"{file}: is one half of couplets; first run python data/couplets/prepare.py --raw FOLDER")
        return TEXT
    places: dict[str, str] = {}
    for number, item in itertools.islice(read_items(file), LOOKED_AT):
        if not isinstance(item, UnreadableItem):
            places.setdefault(form_of_item(item), place_of(file, number))
    form, *others = places or (INSTRUCTION,)
    for other in others:
        if (form, other) not in ((LABELLED, PREFERENCE), (INSTRUCTION, LABELLED)):  # which are read as that, too
            say(
                f"{file}: begins with {NAMES[form]}, and is read as that; it also holds {NAMES[other]} "
                f"(the first: {places[other]}); put each kind into a file of its own"
            )
    return form


def form_of_item(item: Any) -> str:
    """The form of one record."""
    return TEXT if is_document(item) else PREFERENCE if is_pair(item) else LABELLED if is_judged(item) else INSTRUCTION
