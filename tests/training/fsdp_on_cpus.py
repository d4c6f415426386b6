"""Runs finetune.py with FSDP on CPU ranks, which accelerate refuses: torchrun … tests/training/fsdp_on_cpus.py OPTIONS…

Prints, as JSON on a line that begins with "rank", what each rank held: bytes of weights on the way and in the end.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import accelerate.state
import torch
from accelerate import DistributedType
from torch.distributed.tensor import DTensor

plain = accelerate.state.PartialState.__init__


def as_on_gpus(self, *args, **kwargs):
    """What a rank with a GPU knows of itself, but for the device."""
    plain(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


accelerate.state.PartialState.__init__ = as_on_gpus

finetune = importlib.import_module("finetune")  # now that accelerate is as it should be
setup, run = (importlib.import_module(f"utils.training.{name}") for name in ("setup", "run"))

loaded = {}
plain_prepare, plain_train = setup.prepare_model, run.train


def held(model):
    """Bytes of the frozen weights that this process holds."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if not p.requires_grad]
    return sum(part.untyped_storage().nbytes() for part in parts)


def prepare_model(*args):
    """Note what is held once the base is loaded."""
    model = plain_prepare(*args)
    loaded["after loading"] = held(model)
    return model


def train(run, checkpoint):
    """Note what is held once training is over, and the type and largest frequency of the rotary embeddings."""
    plain_train(run, checkpoint)
    buffers = {name: buffer for name, buffer in run.model.named_buffers() if name.endswith("inv_freq")}
    buffer = next(iter(buffers.values()))
    types = {str(p.to_local().dtype if isinstance(p, DTensor) else p.dtype) for p in run.model.parameters() if p.requires_grad}
    facts = {"rotary": [str(buffer.dtype), buffer.flatten().tolist()], "trained": sorted(types)}
    print("rank", json.dumps({**loaded, "in the end": held(run.model), **facts, "rank": int(os.environ["RANK"])}), flush=True)


setup.prepare_model, run.train = prepare_model, train
torch.set_num_threads(1)
finetune.main(importlib.import_module("utils.cli").parse(finetune.Options, sys.argv[1:]))
