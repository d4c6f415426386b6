"""Losses and gradients of preferences and rewards are trl's: figures that trl_figures.py had trl compute, kept in its file."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from trl_figures import FILE, options_for, summary

from benchmarks import trl_losses


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("like-trl") / "base")


@pytest.mark.parametrize("name", trl_losses.LOSSES)
def test_the_loss_and_its_gradients_are_those_of_trl(base, name):
    figures = json.loads(FILE.read_text("utf-8"))[name]
    model = trl_losses.lora_model(options_for(base), trained=True)
    start = trl_losses.move(model)
    model.train()
    loss = trl_losses.our_loss(name, model, start, {key: torch.tensor(value) for key, value in figures["inputs"].items()})
    assert loss.item() == pytest.approx(figures["loss"], rel=1e-4)
    found = summary(trl_losses.gradients_of(model, loss))
    largest = max(norm for norm, _ in figures["gradients"])
    for one, other in zip(found, figures["gradients"], strict=True):
        assert one == pytest.approx(other, abs=1e-4 * largest)
