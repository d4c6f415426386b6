"""Answering: decoding, caches, batches of prompts."""
