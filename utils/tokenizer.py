"""The entry point for other programs: `utils.tokenizer.load_tokenizer(folder)` gives the ids that a model was trained with."""

from utils.models.tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]
