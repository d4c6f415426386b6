"""The prompter that a template's name stands for: a file in templates/, or the tokenizer's own chat template."""

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from utils.console import UserError
from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.templates import CHAT, Prompter

CONTROL = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>")


def make_prompter(
    template: str, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], thinking: bool | None = None
) -> Prompter | ChatPrompter:
    """The template of that name for a tokenizer.

    Raises UserError if its texts contain control tokens, which would be encoded as plain characters.
    """
    if template == CHAT:
        return ChatPrompter(tokenizer, ends, thinking)
    prompter = Prompter(template)
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    literals = [literal for parts in prompter.parts.values() for literal, _ in parts]
    for literal in literals:
        found = next(iter([*CONTROL.findall(literal), *sorted(token for token in special if token in literal)]), None)
        if found:
            raise UserError(
                f"{prompter.path}: {found} is a control token, but a template's text is encoded as characters; "
                f"use the tokenizer's own chat template (--prompt_template_name {CHAT})"
            )
    return prompter
