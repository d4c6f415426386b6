"""Base models: their files, tokenizers, and loading them."""
