"""The encoded records that a run trains on and is validated with; and the template that goes with them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.console import UserError, say
from utils.datasets.sources import data_files
from utils.datasets.stages import LABELLED, TEXT
from utils.training.checks import check_tokens, check_window

if TYPE_CHECKING:
    from utils.datasets.dataset import EncodedDataset
    from utils.training.start import RunStart

Options = Any  # finetune.Options; modules import no scripts


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Run the block on each machine's first rank before the others, which then find its results."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        with PartialState().local_main_process_first():
            yield
    else:
        yield


def prepare_data(
    options: Options, origin: "RunStart", parent: dict[str, Any] | None, stage: str
) -> tuple[Any, "EncodedDataset", "EncodedDataset | None", dict[str, Any]]:
    """The tokenizer, the encoded records for training and validation, and what the lineage records about them."""
    from utils.datasets import dataset, encoders
    from utils.datasets.encoding import OVERLAP
    from utils.datasets.prompters import make_prompter
    from utils.files import sha256
    from utils.models.tokenizer import end_tokens
    from utils.models.tokenizer_files import tokenizer_mark
    from utils.training import replay

    earlier = replay.files_to_replay(parent, stage) if options.replay else {}
    folder = tokenizer_folder(options, origin)
    tokenizer = checked_tokenizer(options, origin, folder)
    ends = end_tokens(options.base_model, tokenizer)
    prompter = make_prompter(options.prompt_template_name, tokenizer, ends, options.enable_thinking)
    hashes = {str(file): sha256(file) for file in data_files(options.data_path)}
    how = (tokenizer_mark(folder, tokenizer), options.cutoff_len, options.train_on_inputs, options.max_new_tokens)
    encoder = encoders.make_encoder(stage, prompter, tokenizer, *how)
    if stage == TEXT:
        overlap = options.cutoff_len // OVERLAP
        say(f"raw text: each token is learned once; pieces of one document overlap by {overlap} tokens")
    with first_rank_first():
        table, asked = dataset.encode_all(encoder, options.data_path, hashes, options.seed, keep=not options.dry_run)
    numbers = dataset.usable(table, asked, options.cutoff_len)
    train_numbers, val_numbers = dataset.split(numbers, options.val_set_size, options.seed)
    facts: dict[str, Any] = {
        "path": options.data_path,
        "stage": stage,
        "files": hashes,
        "template": {"name": prompter.name, "texts": prompter.texts},
        "records": len(asked),
        "dropped": len(asked) - len(numbers),
    }
    if earlier:
        table, train_numbers, facts["replay"] = replay.with_replay(
            table, train_numbers, options.replay, encoder, earlier, options.seed
        )
    rows = dataset.JudgedDataset if stage == LABELLED else dataset.EncodedDataset
    train = rows(table, train_numbers, options.cutoff_len)
    validation = rows(table, val_numbers, options.cutoff_len) if len(val_numbers) else None
    facts |= sizes(train, validation)
    if stage == LABELLED:
        facts["good"] = tell_labels(train, options.desirable_weight, options.undesirable_weight)
    return tokenizer, train, validation, facts


def sizes(train: "EncodedDataset", validation: "EncodedDataset | None") -> dict[str, int]:
    """How many records and tokens there are, which is printed, too."""
    found = {
        "train": len(train),
        "validation": len(validation or ()),
        "tokens": sum(train.lengths),
        "supervised": sum(train.supervised),
    }
    say(
        f"{found['train']} records to train on, {found['validation']} to validate with; an epoch has {found['tokens']} tokens, "
        f"{found['supervised']} of them supervised"
    )
    return found


def checked_tokenizer(options: Options, origin: "RunStart", folder: str) -> Any:
    """The tokenizer in `folder`. Raises UserError if base model and tokenizer cannot be trained with these options."""
    from utils.models import quantized
    from utils.models.architecture import read_architecture
    from utils.models.tokenizer import PUT_IT, load_tokenizer
    from utils.models.weights import base_folder

    config = read_architecture(base_folder(options.base_model))  # before the tokenizer, whose library also reads this file
    quantized.check(base_folder(options.base_model), config, training=True)
    check_window(options, config)
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer names no eos_token to end answers with; {PUT_IT}")
    check_tokens(options, origin, tokenizer)
    return tokenizer


def tell_labels(train: "EncodedDataset", good_weight: float, bad_weight: float) -> int:
    """Print how many answers are good and bad, and weights that would balance them; returns the number of good ones.

    They balance if the ratio of weight times number, good to bad, is 1 to 4/3 (Ethayarajh et al. 2024, eq. 9).
    """
    from utils.datasets.dataset import column

    good = int(column(train.table, "good")[train.numbers].sum())
    bad = len(train) - good
    say(f"{good} answers labelled good (--desirable_weight {good_weight:g}), {bad} bad (--undesirable_weight {bad_weight:g})")
    if good and bad and not 0.99 <= good * good_weight / (bad * bad_weight) <= 1.34:
        balance = f"--desirable_weight {bad / good:.2g}" if good < bad else f"--undesirable_weight {good / bad:.2g}"
        say(f"good and bad do not weigh the same; {balance} would balance them")
    return good


def write_template(options: Options, data: dict[str, Any], tokenizer: Any) -> None:
    """Write the template used in training into the output folder, in the form that other programs read; after raw text,
    which has none, the tokenizer's own."""
    from utils.datasets.jinja_export import write_chat_template
    from utils.datasets.templates import CHAT

    template = data["template"]
    if data["stage"] == TEXT:
        if not tokenizer.chat_template:
            return
        template = {"name": CHAT, "texts": {"chat_template": tokenizer.get_chat_template()}}
    write_chat_template(**template, tokenizer=tokenizer, folder=Path(options.output_dir))


def tokenizer_folder(options: Options, origin: "RunStart") -> str:
    """The tokenizer's folder: the one given, else the one saved with the adapter to continue from, else the base's."""
    from utils.models.tokenizer_files import has_tokenizer

    beside = origin.checkpoint or origin.parent
    return options.tokenizer or (str(beside) if beside and has_tokenizer(beside) else options.base_model)
