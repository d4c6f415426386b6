"""Tokenizers: ids exactly as those a model was trained on.

If a folder has a `tokenizer.model`, ids come from SentencePiece itself. transformers' conversion of such a file (merges
ranked by piece id) gives other ids for the pieces that Chinese vocabularies add, all with score 0, and for runs of spaces.
Other folders keep their own `tokenizer.json`.
"""

import functools
import itertools
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from utils.console import UserError, reason, say, say_once
from utils.files import read_json, replacing_folder, write_json
from utils.models.architecture import check_labels
from utils.models.tokenizer_files import CONFIG, JSON, MODEL, check_numbers, copy_tokenizer, is_sentencepiece, read_settings
from utils.models.weights import base_folder

SPACE = "▁"  # how SentencePiece writes a space
SAMPLES = (  # typical questions and answers: runs of spaces, rare characters, two languages in one line
    "世界的影响力正在改变，我们应该怎样面对未来的挑战？",
    "你好！很高兴认识你。请用一句话介绍一下你自己吧。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "下面是一个描述任务的指令，请写出恰当完成该请求的回答。",
    "二〇二三年，中国的国内生产总值（GDP）增长了5.2%。",
    "我爱吃苹果🍎和香蕉🍌，你呢？😀",
    "使用 Python 的 list.append() 方法可以在列表末尾添加元素。",
    "他说：“學而時習之，不亦說乎？”龘靐齉",
    "The artist creates a painting that captures the beauty of the sunset over the mountains.",
    "Give three tips for staying healthy, and explain why each of them matters to you.",
    "def main():\n    for i in range(10):\n        if i % 2 == 0:\n            print(i)\n",
    "| a    | b        |\n|------|----------|\n| 1    |    2.50  |",
    "#include <stdio.h>\n\nint main(void)\n{\n\treturn 0;\n}\n",
    "1. first   2. second      3. third",
    "Translate to English: 今天天气很好，我们去公园散步。",
    "https://example.com/index.html?q=中文&lang=zh",
)


PUT_IT = "put it into tokenizer_config.json"


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a model on the Hugging Face hub; it always has a padding token.

    Raises UserError if there is none, or its files are broken.
    """
    tokenizer = read_tokenizer(base_folder(str(name)))
    if tokenizer.pad_token is None:
        ends = tokenizer.convert_ids_to_tokens(end_tokens(name, tokenizer))
        tokenizer.pad_token = next(filter(None, (tokenizer.unk_token, *ends)), None)
        if tokenizer.pad_token is None:
            raise UserError(f"{name}: the tokenizer names no eos_token to end answers with; {PUT_IT}")
        say(f"{name}: the tokenizer names no padding token; {tokenizer.pad_token} ({tokenizer.pad_token_id}) is used")
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder as its files describe it, with a padding token or without; raises as above."""
    settings = read_settings(folder) if is_sentencepiece(folder / MODEL) else None
    config = folder / "config.json"
    if config.is_file():
        check_labels(config, read_json(config))  # which the library reads, too
    if settings:
        check_numbers(folder, settings["added_tokens_decoder"])
    elif not any((folder / file).is_file() for file in (JSON, "vocab.json")):
        raise UserError(f"{folder}: holds neither {MODEL} (of SentencePiece) nor {JSON}; put the model's tokenizer there")
    try:
        if settings:
            tokenizer = SentencePieceTokenizer(vocab_file=str(folder / MODEL), name_or_path=str(folder), **settings)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the libraries check nothing, and may fail in any way on unexpected files
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({reason(error)}); download it again") from None
    if not isinstance(tokenizer.model_max_length, (int, float)):
        longest = f"model_max_length is {tokenizer.model_max_length!r:.80}, not a number"
        raise UserError(f"{folder}: its tokenizer cannot be used ({longest}); fix tokenizer_config.json")
    if tokenizer.eos_token != tokenizer.unk_token and tokenizer.eos_token_id == tokenizer.unk_token_id:
        tokenizer.eos_token = None  # a name, or "", that is no token, and would mean the unknown one
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")  # an editor's mark would begin each prompt
    return tokenizer


def end_tokens(base_model: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of sequence first, then those named in the base's files.

    Among the latter, those that the tokenizer does not know as control tokens are left out, as are `<s>` and `<unk>`:
    published configurations have such ids from other models.
    """
    folder, found = base_folder(str(base_model)), [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        for part in (settings, settings.get("text_config") if isinstance(settings, dict) else None):
            named = part.get("eos_token_id") if isinstance(part, dict) else None
            found += named if isinstance(named, list) else [named]
    known, others = tokenizer.added_tokens_decoder, (tokenizer.bos_token_id, tokenizer.unk_token_id)
    wanted = [token for token in found if isinstance(token, int) and (token in known and token not in others)]
    first = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*first, *wanted]))


def tell_ends(home: str | Path, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> None:
    """Print how answers end if the tokenizer of the folder `home` does not say so: with `ends`, or not by themselves."""
    names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends)))
    if tokenizer.eos_token_id is None and names:
        say_once(f"{home}: the tokenizer names no eos_token; answers end with {names}, from config.json or the chat template")
    elif tokenizer.eos_token_id is None:
        say_once(
            f"{home}: neither tokenizer nor config.json names a token to end answers with; they go on to --max_new_tokens, "
            "or to a text given as --stop"
        )


def save_whole(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files into a folder that holds other things; none gets its name before all are complete.

    Its chat template is left out, since the training template is written afterwards.
    """
    aside, template = folder / ".tokenizer", tokenizer.chat_template
    tokenizer.chat_template = None
    try:
        with replacing_folder(aside) as part:
            tokenizer.save_pretrained(part)
    finally:
        tokenizer.chat_template = template
    for path in sorted(aside.iterdir()):
        shutil.rmtree(folder / path.name, ignore_errors=True)  # a folder of further chat templates
        os.replace(path, folder / path.name)
    aside.rmdir()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str | Path, target: str | Path) -> None:
    """Put the tokenizer of `source` into `target`: its files unchanged, or rewritten if transformers needs that.

    Prints if transformers, without this module, gives other ids than those the model was trained with.
    """
    if not (Path(source) / CONFIG).is_file():
        tokenizer.save_pretrained(target)
    else:
        copy_tokenizer(source, target)
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            different = count_differences(tokenizer, target)
        except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
            say(f"{source}: transformers alone cannot use these tokenizer settings; they are rewritten")
            tokenizer.save_pretrained(target)
            different = count_differences(tokenizer, target)
        if different:
            say(
                f"{different} of {len(SAMPLES)} sample texts get other ids from a plain AutoTokenizer than from SentencePiece, "
                "with which the model was trained; the right ones: utils.models.tokenizer.load_tokenizer(folder)"
            )


def count_differences(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> int:
    """For how many of `SAMPLES` transformers' own AutoTokenizer of `folder` gives other ids."""
    plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ours, theirs = (words(list(SAMPLES), add_special_tokens=False)["input_ids"] for words in (tokenizer, plain))
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


class Segment(NamedTuple):
    """A part of the text number `row` in a batch, starting at character `start`: an added token's id, or None for plain
    text."""

    row: int
    start: int
    text: str
    token: int | None


TokensAndOffsets = tuple[list[int], list[tuple[int, int]]]  # the ids of a text, and the offsets of their tokens


def run(model: SentencePieceProcessor, texts: list[str], with_offsets: bool) -> list[TokensAndOffsets]:
    """Texts encoded by SentencePiece, which uses threads for a batch."""
    if not with_offsets:
        return [(ids, []) for ids in model.encode(texts)]
    return [(row["ids"], row["offsets"]) for row in model.encode(texts, return_type="offset_mapping")]


class SentencePieceTokenizer(SentencePieceBackend):
    """A transformers tokenizer whose ids are SentencePiece's own, in batches, with character offsets.

    `add_bos_token`, `add_eos_token` and `legacy` mean what they mean for LLaMA's tokenizer: with `legacy` (the default) the
    text after an added token is encoded like a separate text, without it like a continuation.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        *,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool = True,
        saved_class: str = "LlamaTokenizer",
        **settings: Any,
    ):
        super().__init__(legacy=True, **settings)  # what the base class does without `legacy` is not SentencePiece's
        self.legacy = legacy
        self.saved_class = saved_class
        for role in ("bos", "eos", "unk", "pad"):
            index = getattr(self.sp_model, f"{role}_id")()
            if self._special_tokens_map[f"{role}_token"] is None and index >= 0:
                setattr(self, f"{role}_token", self.sp_model.id_to_piece(index))
        self.add_tokens(self.all_special_tokens, special_tokens=True)
        self.add_bos_token = add_bos_token and self._special_tokens_map["bos_token"] is not None
        self.add_eos_token = add_eos_token and self._special_tokens_map["eos_token"] is not None
        patterns = {(False, False): "none", (True, False): "bos", (False, True): "eos", (True, True): "bos_eos"}
        self.special_tokens_pattern = patterns[self.add_bos_token, self.add_eos_token]

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        """Called whenever tokens were added: builds one pattern that finds them all in a text, longest first."""
        patterns = []
        for token in sorted(self._added_tokens_decoder.values(), key=lambda token: -len(token.content)):
            pattern = f"({re.escape(token.content)})"
            if token.single_word:
                pattern = f"(?<![^ ]){pattern}(?![^ ])"
            patterns.append((r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else ""))
        self._added_pattern = re.compile("|".join(patterns) or "(?!)")

    @functools.cached_property
    def continuing_model(self) -> SentencePieceProcessor:
        """SentencePiece for the continuation of a text: without the space that it puts before a text."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        proto = ModelProto.FromString(self.sp_model.serialized_model_proto())
        proto.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=proto.SerializeToString())

    def _cut(self, row: int, text: str) -> list[Segment]:
        """Cut a text at its added tokens."""
        segments, end = [], 0
        for match in self._added_pattern.finditer(text):
            if match.start() > end:
                segments.append(Segment(row, end, text[end : match.start()], None))
            group = match.lastindex or 0
            segments.append(Segment(row, match.start(group), match[group], self._added_tokens_encoder[match[group]]))
            end = match.end()
        if end < len(text):
            segments.append(Segment(row, end, text[end:], None))
        return segments

    def encode_texts(self, texts: list[str], split_special_tokens: bool, with_offsets: bool) -> list[TokensAndOffsets]:
        """For each text its ids and, if asked for, each token's start and end in characters.

        The texts of added tokens become these tokens, unless `split_special_tokens`. A token that stands for no
        character of its own (the space put before a text, all but the last byte of a character) has an empty range.
        """
        if split_special_tokens or not any(map(self._added_pattern.search, texts)):
            return run(self.sp_model, texts, with_offsets)
        segments = [segment for row, text in enumerate(texts) for segment in self._cut(row, text)]
        plain = [s for s in segments if s.token is None]
        fresh = [s for s in plain if self.legacy or s.start == 0]
        going_on = [s for s in plain if not (self.legacy or s.start == 0)]
        encoded = dict(zip(fresh, run(self.sp_model, [s.text for s in fresh], with_offsets), strict=True))
        if going_on:
            encoded |= zip(going_on, run(self.continuing_model, [s.text for s in going_on], with_offsets), strict=True)
        rows: list[TokensAndOffsets] = [([], []) for _ in texts]
        for s in segments:
            ids, offsets = ([s.token], [(0, len(s.text))]) if s.token is not None else encoded[s]
            rows[s.row][0].extend(ids)
            rows[s.row][1].extend((s.start + begin, s.start + end) for begin, end in offsets)
        return rows

    def tokenize(self, text: str, **options: Any) -> list[str]:  # type: ignore[override]
        """The pieces of a text."""
        split = bool(options.get("split_special_tokens", self.split_special_tokens))
        return self.convert_ids_to_tokens(self.encode_texts([text], split, False)[0][0])

    def _encode_plus(  # type: ignore[override]
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        return_offsets_mapping: bool = False,
        split_special_tokens: bool = False,
        **options: Any,
    ) -> BatchEncoding:
        texts = [text] if isinstance(text, str) else list(text)
        rarer = (
            "is_split_into_words", "return_overflowing_tokens", "return_special_tokens_mask", "return_length",
            "sanitize_control_tokens",
        )  # fmt: skip
        if text_pair is not None or any(options.get(name) for name in rarer) or not all(isinstance(t, str) for t in texts):
            if return_offsets_mapping:
                raise NotImplementedError("offsets are given for texts alone, without pairs and other extras")
            settings = {"truncation_strategy": truncation_strategy, "split_special_tokens": split_special_tokens}
            return super()._encode_plus(
                text, text_pair, add_special_tokens, padding_strategy, max_length=max_length, **settings, **options
            )
        rows = self.encode_texts(texts, split_special_tokens, return_offsets_mapping)
        batch: dict[str, list] = {"input_ids": [ids for ids, _ in rows], "offset_mapping": [offsets for _, offsets in rows]}
        if truncation_strategy is not TruncationStrategy.DO_NOT_TRUNCATE and max_length is not None:
            room = max_length - (self.num_special_tokens_to_add() if add_special_tokens else 0)
            kept = slice(0, room) if self.truncation_side == "right" else slice(-room, None)
            batch = {key: [row[kept] for row in values] for key, values in batch.items()}
        if add_special_tokens:
            batch = self._between_special_tokens(batch)
        offsets = batch.pop("offset_mapping")
        if options.get("return_attention_mask") is not False:
            batch["attention_mask"] = [[1] * len(ids) for ids in batch["input_ids"]]
        if padding_strategy is not PaddingStrategy.DO_NOT_PAD:
            wanted = {name: options.get(name) for name in ("pad_to_multiple_of", "padding_side")}
            batch = dict(self.pad(batch, padding=padding_strategy.value, max_length=max_length, **wanted))
        if return_offsets_mapping:
            batch["offset_mapping"] = offsets
        if isinstance(text, str) and options.get("return_tensors") is None:
            batch = {key: values[0] for key, values in batch.items()}
        return BatchEncoding(batch, tensor_type=options.get("return_tensors"))

    def _between_special_tokens(self, batch: dict[str, list]) -> dict[str, list]:
        """Ids and offsets with the tokens that begin and end each text, which stand for none of its characters."""
        first, last = [(0, 0)] * self.add_bos_token, [(0, 0)] * self.add_eos_token
        return {
            "input_ids": [self.build_inputs_with_special_tokens(ids) for ids in batch["input_ids"]],
            "offset_mapping": [first + row + last for row in batch["offset_mapping"]],
        }

    def _decode(  # type: ignore[override]
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        size = self.vocab_size  # a model may have more rows than the tokenizer has pieces; the rest have no text
        text = ""
        for is_added, run in itertools.groupby(ids, self._added_tokens_decoder.__contains__):
            if is_added:
                text += "".join(self._added_tokens_decoder[index].content for index in run if index not in skipped)
            else:
                model = self.sp_model if self.legacy or not text else self.continuing_model
                text += model.decode([index for index in run if index < size])
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces; bytes that form a character are joined."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> tuple[str, ...]:  # type: ignore[override]
        """Write the tokenizer's files, under their original transformers class name."""
        written = super().save_pretrained(save_directory, *args, **options)
        path = Path(save_directory) / CONFIG
        config = read_json(path)
        config.pop("backend", None)
        switches = {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        known = self.saved_class if hasattr(transformers, self.saved_class) else "LlamaTokenizer"
        write_json(path, config | switches | {"tokenizer_class": known})
        return written
