#!/usr/bin/env bash
# Experiment 4, f1: warm start on the first fifth of Firefly; answers only. Its adapter is D7b-4-1.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-7b merge-7b-alpaca
data firefly/firefly-train-0.json
train "${published[@]}" --lora_target_modules '[q_proj,v_proj]' --val_set_size 2000 --train_on_inputs False "$@"
