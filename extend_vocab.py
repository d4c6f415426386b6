"""Extend a tokenizer by the pieces of another language, as Chinese-LLaMA did; finetune.py then trains their embeddings.

    python extend_vocab.py --base_model models/llama-7b --sp_model chinese_sp.model --output_dir models/chinese-tokenizer

    python finetune.py --base_model models/llama-7b --tokenizer models/chinese-tokenizer \\
        --modules_to_save '[embed_tokens,lm_head]' …

Where the base has a tokenizer.model, new pieces are added to it with score 0; if it has a byte-level BPE, they are
added as tokens. The base's own tokens keep their numbers.
"""

import dataclasses
from pathlib import Path

from utils.cli import option, run
from utils.console import UserError, say
from utils.files import check_folder


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this script."""

    base_model: str = option(help="base model (or its tokenizer): a folder, or a name on the Hugging Face hub")
    output_dir: str = option(help="folder for the extended tokenizer")
    sp_model: str = option("", "SentencePiece model with the new pieces")
    text: str = option("", "instead of a model: a text to learn pieces from (.txt, or the texts in .json or .jsonl)")
    vocab_size: int = option(20000, "maximum number of pieces to learn from the text", least=1)
    overwrite: bool = option(False, "replace the output folder")


def main(options: Options) -> None:
    """Read the tokenizer and the new pieces, and write the extended tokenizer."""
    check_together(options)
    from utils.files import locked, replacing_folder
    from utils.models import vocabulary
    from utils.models.tokenizer import read_tokenizer
    from utils.models.weights import base_folder

    base = base_folder(options.base_model)
    with locked(options.output_dir):
        if options.sp_model:
            pieces = vocabulary.read_pieces(Path(options.sp_model))
        else:
            pieces = vocabulary.train_pieces(Path(options.text), options.vocab_size)
        tokenizer = read_tokenizer(base)
        before = len(tokenizer)
        with replacing_folder(options.output_dir) as folder:
            count = vocabulary.extend(base, tokenizer, pieces, folder)
    say(f"{options.output_dir}: {before} tokens and {count} new ones, {before + count} in all")


def check_together(options: Options) -> None:
    """Raises UserError if the options contradict each other, or the output exists."""
    if bool(options.sp_model) == bool(options.text):
        raise UserError(
            "--sp_model and --text: give one of them, either a model with the new pieces or a text to learn them from"
        )
    check_folder(options.output_dir)
    output = Path(options.output_dir)
    if output.resolve() == Path(options.base_model).resolve():
        raise UserError(f"--output_dir {output}: is the base model's folder; choose another one")
    if output.exists() and not (options.overwrite and (output / "tokenizer_config.json").is_file()):
        fix = (
            "holds no tokenizer; choose another folder" if options.overwrite else "exists; choose another, or give --overwrite"
        )
        raise UserError(f"--output_dir {output}: {fix}")


if __name__ == "__main__":
    run(main, Options)
