"""Trains on the first 1, 2, 3 … records in turn, in one process (or one group of ranks, under torchrun).

python tests/training/trainings_in_turn.py RECORDS.json OUT COUNTS OPTIONS…
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from transformers import LlamaModel

import finetune
from utils.cli import parse
from utils.console import is_main_process

if os.environ.get("LITTLE_MEMORY", "").startswith(f"{os.environ.get('RANK')}:"):  # RANK:TOKENS, more of which do not fit
    most, plain = int(os.environ["LITTLE_MEMORY"].split(":")[1]), LlamaModel.forward

    def forward(self, input_ids, *args, **kwargs):
        """Fails by a real allocation of more than there is."""
        if torch.is_grad_enabled() and input_ids.numel() > most:
            torch.empty(2**50)
        return plain(self, input_ids, *args, **kwargs)

    LlamaModel.forward = forward

records, out, counts, *options = sys.argv[1:]
every = json.loads(Path(records).read_text("utf-8"))
for count in map(int, counts.split(",")):
    data = Path(out) / f"{count}.json"
    if is_main_process():
        data.parent.mkdir(parents=True, exist_ok=True)
        data.with_suffix(".part").write_text(json.dumps(every[:count], ensure_ascii=False), "utf-8")
        data.with_suffix(".part").rename(data)
    while not data.exists():
        pass
    finetune.main(parse(finetune.Options, [*options, f"--data_path={data}", f"--output_dir={Path(out) / str(count)}"]))
