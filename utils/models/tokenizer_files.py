"""Reads tokenizer files without transformers, whose import takes as long as merging a gigabyte."""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from utils.console import UserError, reason
from utils.files import digest, read_json, sha256
from utils.models.weights import base_folder

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED, TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
FILES = (MODEL, JSON, CONFIG, SPECIAL, ADDED, TEMPLATE, "vocab.json", "merges.txt")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
STAGES = "32000 tokens belong to LLaMA, 49953 to Chinese-LLaMA, 49954 to Chinese-Alpaca"


def too_many_tokens(base: str | Path, rows: int, tokens: int) -> UserError:
    """The error for a tokenizer with more tokens than the base has embedding rows."""
    return UserError(
        f"{base}: has {rows} embedding rows for a tokenizer of {tokens} tokens; {STAGES}: use model and tokenizer of one stage"
    )


def copy_tokenizer(source: str | Path, target: str | Path) -> list[str]:
    """Copy a tokenizer's files exactly as they are; returns their names."""
    names = [name for name in FILES if (Path(source) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return names


def has_tokenizer(folder: str | Path) -> bool:
    """True if a folder has its own tokenizer."""
    return any((Path(folder) / name).is_file() for name in (MODEL, JSON))


def tokenizer_hash(name: str | Path) -> str:
    """A hash of all files of a tokenizer, and of the libraries that read them."""
    folder = base_folder(str(name))
    files = {file: sha256(folder / file) for file in FILES if (folder / file).is_file()}
    return digest([files, *(importlib.metadata.version(library) for library in ("transformers", "sentencepiece"))])


def tokenizer_mark(name: str | Path, tokenizer: Any) -> str:
    """Identifies what a loaded tokenizer's ids depend on: its files, and its class, which the library chooses by
    config.json."""
    return f"{tokenizer_hash(name)} {type(tokenizer).__name__}"


def is_sentencepiece(file: Path) -> bool:
    """True for a SentencePiece model; False if there is no file, or one of another kind (Llama 3 has a word list of that name).

    Raises UserError if such a file is broken.
    """
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        head = opened.read(1)
    if head != b"\x0a":  # field 1 of a ModelProto, its list of pieces
        return False
    try:
        SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{file}: not a complete SentencePiece model ({reason(error)}); download it again") from None
    return True


def read_settings(folder: Path) -> dict[str, Any]:
    """What the files beside a `tokenizer.model` say: special and added tokens, `<s>` and `</s>`, sides, chat template.

    As in transformers, an `added_tokens_decoder` in the configuration decides on added tokens; if there is none,
    `special_tokens_map.json` comes before the configuration, and added tokens are those of `added_tokens.json`, else of
    `tokenizer.json`. Raises UserError if these files do not have their usual form.
    """
    files = {name: read_json(folder / name) for name in (CONFIG, SPECIAL, ADDED, JSON) if (folder / name).is_file()}
    try:
        wanted = joined(files)
    except (AttributeError, TypeError, KeyError, ValueError):
        names = ", ".join(files)
        raise UserError(f"{folder}: the settings of its tokenizer do not have their usual form; copy {names} again") from None
    if (folder / TEMPLATE).is_file():
        wanted["chat_template"] = (folder / TEMPLATE).read_text("utf-8")
    return wanted


def joined(files: dict[str, Any]) -> dict[str, Any]:
    """What `read_settings` returns, from files' contents by name."""
    settings: dict[str, Any] = files.get(CONFIG, {})
    added = {int(index): as_token(token) for index, token in settings.get("added_tokens_decoder", {}).items()}
    if not added:
        settings |= {role: token for role, token in files.get(SPECIAL, {}).items() if token}
        added = {index: as_token(text) for text, index in files.get(ADDED, {}).items()}
    for token in files.get(JSON, {}).get("added_tokens", []) if not added else ():
        added[token["id"]] = as_token(token)
    wanted: dict[str, Any] = {role: as_token(settings[role]) for role in ROLES if settings.get(role)}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    wanted["extra_special_tokens"] = [as_token(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    for key in ("add_bos_token", "add_eos_token", "legacy", "model_max_length", "padding_side", "chat_template"):
        if settings.get(key) is not None:
            wanted[key] = settings[key]
    return wanted | {"added_tokens_decoder": added, "saved_class": settings.get("tokenizer_class") or "LlamaTokenizer"}


def check_numbers(folder: Path, added: dict[int, AddedToken]) -> None:
    """Raises UserError if an added token has the id of an ordinary piece: the files belong to different stages."""
    model = SentencePieceProcessor(model_file=str(folder / MODEL))
    for index, token in added.items():
        if index < len(model) and token.content != model.id_to_piece(index):
            is_free = model.is_control(index) or model.is_unused(index) or model.is_unknown(index) or model.is_byte(index)
            if not is_free:
                raise UserError(
                    f"{folder}: its settings give the number {index} to {token.content}, its {MODEL} of {len(model)} pieces "
                    f"to {model.id_to_piece(index)}; take all tokenizer files from one model"
                )


def as_token(token: str | dict[str, Any]) -> AddedToken:
    """A token as written in the JSON files: a text, or an object with its flags."""
    if isinstance(token, str):
        return AddedToken(token, normalized=False, special=True)
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in flags})


def count_tokens(folder: Path) -> int:
    """The number of tokens of a SentencePiece tokenizer, including those outside its model."""
    settings, model = read_settings(folder), SentencePieceProcessor(model_file=str(folder / MODEL))
    check_numbers(folder, settings["added_tokens_decoder"])
    beside = [*settings["added_tokens_decoder"].values(), *settings["extra_special_tokens"]]
    beside += [settings[role] for role in ROLES if role in settings]
    return len(model) + len(
        {token.content for token in beside if model.id_to_piece(model.piece_to_id(token.content)) != token.content}
    )
