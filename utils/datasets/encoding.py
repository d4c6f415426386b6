"""Records as input ids and labels: one encoding of the whole text, a mask by character offsets, an end of sequence."""

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.console import UserError
from utils.datasets.bounded_jinja import TooMuch
from utils.datasets.chat_templates import IGNORED, ChatPrompter, Sequence, shown
from utils.datasets.records import Record
from utils.datasets.templates import Prompter

OVERLAP = 8  # a piece begins with the last 1/8 of the one before, which it reads but does not learn again


@dataclasses.dataclass
class EncodedRecord:
    """One record: `input_ids` and `labels` of one length (at most the cutoff), and `full_length` before the cut.

    `answer_tokens` counts those of learned answers and their ends of sequence, after the cut. `raw_answers` counts the
    answers learned as the record has them, since the chat template writes them differently. `refused` says why the
    template cannot render the record, which then has no tokens.
    """

    input_ids: list[int]
    labels: list[int]
    full_length: int
    answer_tokens: int
    raw_answers: int = 0
    refused: str = ""


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: `<s>` for LLaMA, nothing for BLOOM."""
    return [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]


def encode_prompt(record: Record, prompter: Prompter | ChatPrompter, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a prompt: the record's history with its ends of sequence, and the open question.

    Raises UserError if the record has tool calls and the template does not support them.
    """
    if record.get("messages") and "calls" not in prompter.carries:
        raise UserError(
            f"{shown(record['instruction'])}: tools are called in this dialogue, which the template {prompter.name} does not "
            "support; remove it, or ask a model whose chat template does"
        )
    if isinstance(prompter, ChatPrompter):
        return prompter.encode_prompt(record)
    *earlier, last = prompter.turns(record)
    texts = [turn.prompt + turn.answer for turn in earlier] + [last.prompt]
    ids = opening_ids(tokenizer)
    for index, segment in enumerate(plain(texts, tokenizer)["input_ids"]):
        ids += segment + ([tokenizer.eos_token_id] if index < len(earlier) else [])
    return ids


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a plain text, with what the tokenizer puts before every text."""
    return opening_ids(tokenizer) + plain([text], tokenizer)["input_ids"][0]


def encode(
    records: Iterable[Record],
    prompter: Prompter | ChatPrompter,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    train_on_inputs: bool,
) -> list[EncodedRecord]:
    """Encode records in one call to the tokenizer, or one by one with its chat template (see ChatPrompter.encode).

    Each turn's question and answer are encoded together, so the ids are those of the whole text; a token that
    straddles their boundary is supervised, as is the end of sequence after each answer. An answer that the record's
    `learn` excludes is not supervised, even with `train_on_inputs`. A record longer than `cutoff_len` is truncated, and
    then has no end of sequence to learn.
    """
    if isinstance(prompter, ChatPrompter):
        return [cut(sequence, cutoff_len) for record in records for sequence in prompter.encode(record, train_on_inputs)]
    records = list(records)
    dialogues = [prompter.turns(record) for record in records]
    turns = [turn for dialogue in dialogues for turn in dialogue]
    encoded = plain([turn.prompt + turn.answer for turn in turns], tokenizer, offsets=not tokenizer.is_fast)
    opening = opening_ids(tokenizer)
    results, position = [], 0
    for record, dialogue in zip(records, dialogues, strict=True):
        ids, answer_tokens = list(opening), 0
        labels = list(opening) if train_on_inputs else [IGNORED] * len(opening)
        for turn, learn in zip(dialogue, record.get("learn") or [True] * len(dialogue), strict=True):
            new = encoded["input_ids"][position] + [tokenizer.eos_token_id]
            prompt = prompt_tokens(encoded, position, len(turn.prompt))
            labels += new[:prompt] if train_on_inputs else [IGNORED] * prompt
            labels += new[prompt:] if learn else [IGNORED] * (len(new) - prompt)
            if learn:
                answer_tokens += max(0, min(len(new), cutoff_len - len(ids)) - prompt)
            ids += new
            position += 1
        results.append(EncodedRecord(ids[:cutoff_len], labels[:cutoff_len], len(ids), answer_tokens))
    return results


def encode_last_answers(
    records: list[Record], prompter: Prompter | ChatPrompter, tokenizer: PreTrainedTokenizerBase, cutoff_len: int
) -> list[EncodedRecord]:
    """Encode records of which only the last answer is learned, so that two answers to one question can be compared."""
    if isinstance(prompter, ChatPrompter):
        alone = [record | {"learn": [False] * len(record.get("history") or []) + [True]} for record in records]
        return [encode([record], prompter, tokenizer, cutoff_len, train_on_inputs=False)[-1] for record in alone]
    encoded = encode(records, prompter, tokenizer, cutoff_len, train_on_inputs=False)
    for record, one in zip(records, encoded, strict=True):
        if record.get("history"):
            before = len(encode_prompt(record, prompter, tokenizer)) - 1  # a token that straddles the boundary is the answer's
            one.labels = [IGNORED] * min(before, len(one.labels)) + one.labels[before:]
            one.answer_tokens = len(one.labels) - one.labels.count(IGNORED)
    return encoded


def cut(sequence: Sequence, cutoff_len: int) -> EncodedRecord:
    """A sequence truncated to `cutoff_len` tokens."""
    ids, labels, answer_tokens, raw = sequence
    if len(ids) > cutoff_len:
        answer_tokens = min(answer_tokens, len(labels[:cutoff_len]) - labels[:cutoff_len].count(IGNORED))
    return EncodedRecord(ids[:cutoff_len], labels[:cutoff_len], len(ids), answer_tokens, raw)


def where_rendered(encode_them: Callable[[list[Any]], list[EncodedRecord]], records: list[Any]) -> list[EncodedRecord]:
    """Encode records together or, if a chat template refuses one, one by one, so that each refused record says why."""
    try:
        return encode_them(records)
    except TooMuch:
        raise
    except UserError as error:
        if len(records) == 1:
            return [EncodedRecord([], [], 0, 0, refused=str(error))]
    return [one for record in records for one in where_rendered(encode_them, [record])]


def encode_documents(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, cutoff_len: int) -> list[EncodedRecord]:
    """Documents as ids and labels, each with its end of sequence; every token is learned exactly once.

    A document longer than `cutoff_len` is cut into pieces of that length. A piece begins with the last
    `cutoff_len // OVERLAP` tokens of the one before, without labels, so that no sentence is learned without its
    context. Documents never see each other: each piece is its own sequence.
    """
    opening, pieces = opening_ids(tokenizer), []
    for ids in plain(list(texts), tokenizer)["input_ids"]:
        ids = opening + ids + [tokenizer.eos_token_id]
        overlap = cutoff_len // OVERLAP
        for start in range(0, max(1, len(ids) - overlap), cutoff_len - overlap):
            piece = ids[start : start + cutoff_len]
            known = overlap if start else 0
            labels = [IGNORED] * known + piece[known:]
            pieces.append(EncodedRecord(piece, labels, len(piece), len(piece) - known))
    return pieces


def prompt_tokens(encoded: Any, position: int, boundary: int) -> int:
    """How many tokens of a text end at or before the character `boundary`.

    A token without width (a byte, say) counts as ending after its start.
    """
    if encoded.is_fast:  # looking up one token takes much less time than the offsets of all
        first = encoded.char_to_token(position, boundary)
        if first is not None:
            return first
        offsets = encoded.encodings[position].offsets
    else:
        offsets = encoded["offset_mapping"][position]
    return bisect.bisect_right(offsets, boundary, key=lambda offset: max(offset[1], offset[0] + 1))


def plain(texts: list[str], tokenizer: PreTrainedTokenizerBase, offsets: bool = False) -> Any:
    """Encode texts literally: what looks like a control token in a record stays characters."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )
