"""Extending a vocabulary: new pieces in a SentencePiece model, or new tokens added to a byte-level BPE; their embeddings."""

import collections
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AddedToken, PreTrainedTokenizerBase

from utils.console import UserError, reason, say
from utils.files import check_plain, read_json
from utils.models.tokenizer import SPACE, SentencePieceTokenizer
from utils.models.tokenizer_files import MODEL, copy_tokenizer

if TYPE_CHECKING:  # it takes seconds to import, and merging does not need it
    from transformers import PreTrainedModel

BYTE_ALPHABET_ENDS = 0x143  # byte-level BPE writes bytes as characters up to this one; a token of these would be read as bytes
# LLaMA's settings, so that pieces of both models match (it already has bytes and digits)
LIKE_LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.9999,
    "max_sentence_length": 2**20,
    "hard_vocab_limit": False,
    "minloglevel": 2,
}


def read_pieces(file: Path) -> list[str]:
    """The ordinary pieces of a SentencePiece model, in order. Raises UserError if the file is not one."""
    proto = read_proto(file)
    ordinary = (proto.SentencePiece.NORMAL, proto.SentencePiece.USER_DEFINED)
    return [piece.piece for piece in proto.pieces if piece.type in ordinary]


def read_proto(file: Path) -> Any:
    """A SentencePiece model as its protocol buffer. Raises UserError if the file is not one."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    check_plain(file)
    try:
        proto = ModelProto.FromString(file.read_bytes())
    except DecodeError:
        proto = None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    if not proto or not proto.pieces:
        raise UserError(f"{file}: is not a SentencePiece model; give one that spm_train wrote, or a --text to train on")
    return proto


def train_pieces(file: Path, most: int) -> list[str]:
    """At most `most` pieces learned from a text file, or from the texts in a JSON or JSON Lines file, as LLaMA's were.

    Pieces that the text itself uses only once are left out, and the most frequent come first.
    Raises UserError if the text is too small to learn from.
    """
    import sentencepiece

    texts = read_texts(file)
    characters = len(set("".join(texts)))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=characters + most, **LIKE_LLAMA
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{file}: nothing can be learned from it ({reason(error)}); give a larger text") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    uses = collections.Counter(itertools.chain.from_iterable(processor.encode(texts)))
    useful = [
        processor.id_to_piece(index) for index in range(len(processor)) if uses[index] > 1 and not processor.is_unknown(index)
    ]
    say(f"{file}: {min(most, len(useful))} pieces learned from {sum(map(len, texts))} characters")
    return useful[:most]


def read_texts(file: Path) -> list[str]:
    """The lines of a text file, or all texts in the values of a JSON (Lines) file. Raises UserError if it is neither."""
    check_plain(file)
    try:
        if file.suffix == ".json":
            return list(texts_in(read_json(file)))
        lines = file.read_text("utf-8-sig").splitlines()
        return list(texts_in([json.loads(line) for line in lines if line.strip()] if file.suffix == ".jsonl" else lines))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as text ({error}); give a UTF-8 text, or JSON") from None


def texts_in(value: Any) -> Iterator[str]:
    """All texts in lists and in the values of dictionaries, however deep."""
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def extend(source: Path, tokenizer: PreTrainedTokenizerBase, pieces: list[str], target: Path) -> int:
    """Write the tokenizer of the folder `source`, extended by those of `pieces` that are new; returns how many these are.

    Raises UserError if there is nothing new, or the tokenizer cannot be extended.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        count = extend_sentencepiece(source, tokenizer, pieces, target)
    else:
        count = extend_bytes(tokenizer, pieces, target)
    if not count:
        raise UserError(f"{source}: already has all of these {len(pieces)} pieces; give another model or text")
    return count


def extend_sentencepiece(source: Path, tokenizer: SentencePieceTokenizer, pieces: list[str], target: Path) -> int:
    """Extend as Chinese-LLaMA did: new pieces, in order, with score 0, after the model's own.

    https://github.com/ymcui/Chinese-LLaMA-Alpaca, scripts/merge_tokenizer.
    """
    proto = read_proto(source / MODEL)
    beyond = [token for token, index in tokenizer.get_added_vocab().items() if index >= len(proto.pieces)]
    if beyond:
        raise UserError(
            f"{source}: has tokens after the pieces of its {MODEL} ({', '.join(beyond[:3])}), whose ids new pieces "
            "would take; extend the tokenizer without them, and add them afterwards"
        )
    known = {piece.piece for piece in proto.pieces}
    new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
    for piece in new:
        proto.pieces.add(piece=piece, score=0)
    copy_tokenizer(source, target)
    (target / "tokenizer.json").unlink(missing_ok=True)  # it would hold the old vocabulary
    (target / MODEL).write_bytes(proto.SerializeToString())
    return len(new)


def extend_bytes(tokenizer: PreTrainedTokenizerBase, pieces: list[str], target: Path) -> int:
    """Add whole tokens to a byte-level BPE, which has no scores to rank new merges by.

    Such a token matches wherever its text occurs, even inside words; so only pieces without Latin letters, digits, spaces
    and control characters are added, and only those for which the tokenizer needs several tokens.
    """
    texts = [piece.replace(SPACE, "") for piece in pieces]
    texts = [text for text in dict.fromkeys(texts) if text and min(map(ord, text)) > BYTE_ALPHABET_ENDS]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    new = [text for text, ids in zip(texts, encoded, strict=True) if len(ids) > 1]
    say(
        f"{len(pieces) - len(new)} of {len(pieces)} pieces left out: with Latin letters, digits or spaces, or already one token"
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in new])
    tokenizer.save_pretrained(target)
    return len(new)


def check_extends(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Raises UserError if a tokenizer is not an extension of another, `old`."""
    both = (one.convert_ids_to_tokens(range(len(old))) for one in (old, new))
    for index, (before, after) in enumerate(zip(*both, strict=True)):
        if before != after:
            raise UserError(
                f"{new.name_or_path}: token {index} is {after!r}, in {old.name_or_path} {before!r}; "
                "not an extension, so give one made from that tokenizer"
            )


def pieces_of_new_tokens(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """For each token id that `new`, an extension of `old`, has in addition: the ids that `old` gives to the token's text."""
    check_extends(old, new)
    return {index: ids_inside_text(old, text_of(new, index)) for index in range(len(old), len(new))}


def text_of(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """The text of one token."""
    token = tokenizer.convert_ids_to_tokens(index)
    if index in tokenizer.added_tokens_decoder:
        return token
    return token.replace(SPACE, " ") if isinstance(tokenizer, SentencePieceTokenizer) else tokenizer.decode([index])


def ids_inside_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text inside another, so without the space that SentencePiece puts before a text."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.continuing_model.encode(text)
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@torch.no_grad()
def grow_embeddings(model: "PreTrainedModel", old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Give `model` rows for the tokens that `new` has and `old` has not, each the mean of the rows it replaces.

    Input and output embeddings grow alike, tied or not, and reproducibly.
    """
    pieces = pieces_of_new_tokens(old, new)
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(max(rows, len(new)), mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(layer.weight): layer.weight for layer in layers if layer is not None}.values():
        for index, replaced in pieces.items():
            weight[index] = weight[replaced].float().mean(0)
