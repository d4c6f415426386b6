"""What --dry_run prints: the data as training would see it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.console import harmless, is_main_process, say, wants_color
from utils.datasets.dataset import lengths_that_keep
from utils.datasets.encoding import IGNORED

BINS, WIDTH = 12, 40
COLORS = {"supervised": "\033[32m{}\033[0m", "end of sequence": "\033[1;31m{}\033[0m", "": "{}"}  # green, bold red
MARKS = {"supervised": "[[{}]]", "end of sequence": "{{{{{}}}}}", "": "{}"}  # in pipes, files and under NO_COLOR


def histogram(lengths: Sequence[int], cutoff_len: int) -> str:
    """Number of records by length in tokens, as bars; a mark shows where the cutoff falls."""
    edges = np.unique(np.linspace(min(lengths), max(lengths) + 1, BINS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    lines = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        mark = " < --cutoff_len" if low <= cutoff_len < high else ""
        lines.append(f"{low:>7} … {high:<7}{'#' * round(WIDTH * count / max(counts)):<{WIDTH}} {count}{mark}")
    return "\n".join(lines)


def example(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """One encoded record as text: supervised parts in green, the end of sequence in red; in brackets if without color."""
    styles = COLORS if wants_color() else MARKS
    pieces: list[tuple[str, list[int]]] = []
    for token, label in zip(record["input_ids"], record["labels"], strict=True):
        part = "" if label == IGNORED else "end of sequence" if token == tokenizer.eos_token_id else "supervised"
        if not pieces or pieces[-1][0] != part:
            pieces.append((part, []))
        pieces[-1][1].append(token)
    return "".join(styles[part].format(harmless(tokenizer.decode(tokens))) for part, tokens in pieces)


def print_report(lengths: Sequence[int], cutoff_len: int, examples: Sequence[dict[str, Any]], tokenizer: Any) -> None:
    """Print the histogram and the examples."""
    say(f"records by length in tokens:\n{histogram(lengths, cutoff_len)}")
    keeps95, keeps99 = lengths_that_keep(np.asarray(lengths))
    say(f"--cutoff_len {keeps95} would keep 95 % uncut, {keeps99} would keep 99 %")
    if is_main_process():
        styles = COLORS if wants_color() else MARKS
        legend = ", ".join(style.format(part) for part, style in styles.items() if part)
        for number, record in enumerate(examples, 1):  # with print, as a notice cannot have colors
            print(f"\nexample {number} ({legend}):")
            print(example(record, tokenizer), flush=True)
