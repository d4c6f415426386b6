"""Records as input ids and labels: one encoding of the whole text, a mask by character offsets, an end of sequence."""

import bisect
import dataclasses
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.prompter import Prompter

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclasses.dataclass
class Encoded:
    """One record: `input_ids` and `labels` of one length (at most the cutoff), and `full_length` before the cut.

    `answer_tokens` are those that belong to answers and their ends of sequence, after the cut.
    """

    input_ids: list[int]
    labels: list[int]
    full_length: int
    answer_tokens: int


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: `<s>` for LLaMA, nothing for BLOOM."""
    return [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]


def encode_prompt(record: dict[str, Any], prompter: Prompter, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a model is asked with: the record's history with its ends of sequence, and the open question."""
    *earlier, last = prompter.turns(record)
    texts = [turn.prompt + turn.answer for turn in earlier] + [last.prompt]
    ids = opening_ids(tokenizer)
    for index, segment in enumerate(plain(texts, tokenizer)["input_ids"]):
        ids += segment + ([tokenizer.eos_token_id] if index < len(earlier) else [])
    return ids


def encode(
    records: Iterable[dict[str, Any]],
    prompter: Prompter,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    train_on_inputs: bool,
) -> list[Encoded]:
    """Encode records in one call to the tokenizer.

    Each turn's question and answer are encoded together, so the ids are those of the whole text; a token that
    straddles their boundary is supervised, as is the end of sequence after each answer. What is longer than
    `cutoff_len` is cut at its end, and then has no end of sequence to learn.
    """
    dialogues = [prompter.turns(record) for record in records]
    turns = [turn for dialogue in dialogues for turn in dialogue]
    encoded = plain([turn.prompt + turn.answer for turn in turns], tokenizer, offsets=not tokenizer.is_fast)
    opening = opening_ids(tokenizer)
    results, position = [], 0
    for dialogue in dialogues:
        ids, labels, answer_tokens = list(opening), [IGNORED] * len(opening), 0
        for turn in dialogue:
            new = encoded["input_ids"][position] + [tokenizer.eos_token_id]
            prompt = prompt_tokens(encoded, position, len(turn.prompt))
            answer_tokens += max(0, min(len(new), cutoff_len - len(ids)) - prompt)
            ids += new
            labels += [IGNORED] * prompt + new[prompt:]
            position += 1
        full_length, ids = len(ids), ids[:cutoff_len]
        results.append(Encoded(ids, ids if train_on_inputs else labels[:cutoff_len], full_length, answer_tokens))
    return results


def prompt_tokens(encoded: Any, position: int, boundary: int) -> int:
    """How many tokens of a text end at or before the character `boundary`.

    One without width (a byte, say) ends after its start.
    """
    if encoded.is_fast:  # and can be asked for one token, in much less time than for the offsets of all
        first = encoded.char_to_token(position, boundary)
        if first is not None:
            return first
        offsets = encoded.encodings[position].offsets
    else:
        offsets = encoded["offset_mapping"][position]
    return bisect.bisect_right(offsets, boundary, key=lambda offset: max(offset[1], offset[0] + 1))


def plain(texts: list[str], tokenizer: PreTrainedTokenizerBase, offsets: bool = False) -> Any:
    """Encode texts as text: what looks like a control token in a record stays characters."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )
