"""Adapters (LoRA weights): files, settings, and switching between them."""
