"""Families of models, as tiny random ones of transformers' own classes: the table of docs/families.md, and points of it."""

import families
import pytest
from transformers import (
    BertConfig,
    BloomConfig,
    Gemma3Config,
    GPTNeoXConfig,
    GPTNeoXJapaneseConfig,
    LlamaConfig,
    RwkvConfig,
)

from utils.console import UserError
from utils.models.architecture import read_architecture, window_of


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "llama4_text", "gemma3"])
def test_states_chunks_and_towers(name, tmp_path):
    """A recurrence and a convolution in the library's own cache, attention by chunks, a model that sees, too."""
    assert families.check(name, tmp_path) == dict.fromkeys(("training", "answering", "merging"), "")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RwkvConfig(), "rwkv keeps a state in place of a cache, and cannot answer here"),
        (BertConfig(), "bert reads texts in both directions"),
    ],
)
def test_families_that_cannot_work_are_refused_before_anything_is_loaded(config, words, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        read_architecture(tmp_path)


@pytest.mark.parametrize("config", [GPTNeoXConfig(), GPTNeoXJapaneseConfig()])
def test_a_causal_family_whose_is_decoder_nothing_reads_is_not_taken_for_an_encoder(config, tmp_path):
    """GPT-NeoX, Pythia and their like."""
    config.save_pretrained(tmp_path)
    assert read_architecture(tmp_path).model_type == config.model_type


def test_the_window_of_a_model_that_sees_is_that_of_its_language_part():
    assert window_of(Gemma3Config(text_config={"max_position_embeddings": 77})) == 77
    assert window_of(LlamaConfig(max_position_embeddings=78)) == 78 and window_of(BloomConfig()) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(families.table()))
def test_each_family_does_what_the_table_says(name, tmp_path):
    """Losses and gradients as plain transformers and peft, answers as `generate`, merged as peft, or refused as written."""
    found = families.check(name, tmp_path)
    assert {step: families.sentence(text) for step, text in found.items()} == families.table()[name]
