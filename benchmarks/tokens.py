"""Encoding 1,000 records: our tokenizer and transformers' own on the same folder, alternately.

    python -m benchmarks.tokens --tokenizer models/chinese-alpaca-7b --repeats 20

The folder must contain a tokenizer.model. Our ids must equal SentencePiece's; the number of records for which the library
gives other ids is printed beside the times. The records are those of data/demo and test_data, repeated up to 1,000.
"""

import dataclasses
import itertools
from pathlib import Path

from benchmarks.common import ROOT, interleave, report, timed
from utils.cli import option, run

COUNT = 1000


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    tokenizer: str = option(help="folder with a tokenizer.model")
    repeats: int = option(20, "runs of each recipe", least=1)


def main(options: Options) -> None:
    """Encode the records with both tokenizers, with and without offsets, and compare the ids."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    from utils.models.tokenizer import load_tokenizer

    texts = records()
    ours, library = load_tokenizer(options.tokenizer), AutoTokenizer.from_pretrained(options.tokenizer)
    expected = SentencePieceProcessor(model_file=str(Path(options.tokenizer) / "tokenizer.model")).encode(texts)
    if ours(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] != expected:
        raise SystemExit("our ids are not SentencePiece's")
    theirs = library(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    medians = interleave(
        {
            "ours, ids": lambda: timed(lambda: ours(texts)),
            "library, ids": lambda: timed(lambda: library(texts)),
            "ours, ids and offsets": lambda: timed(lambda: ours(texts, return_offsets_mapping=True)),
            "library, ids and offsets": lambda: timed(lambda: library(texts, return_offsets_mapping=True)),
        },
        options.repeats,
    )
    ratios = {
        kind: medians[f"ours, {kind}"]["seconds"] / medians[f"library, {kind}"]["seconds"]
        for kind in ("ids", "ids and offsets")
    }
    facts = {
        "characters": sum(map(len, texts)),
        "other_ids_in_library": sum(a != b for a, b in zip(expected, theirs, strict=True)),
    }
    report(medians, ratios, ("sentencepiece", "transformers", "tokenizers"), **facts)


def records() -> list[str]:
    """1,000 texts of instructions and answers."""
    from utils.models.vocabulary import read_texts

    files = sorted([*ROOT.glob("data/demo/f*.json"), *ROOT.glob("test_data/*.json")])
    texts = [text for file in files for text in read_texts(file)]
    return list(itertools.islice(itertools.cycle(texts), COUNT))


if __name__ == "__main__":
    run(main, Options)
