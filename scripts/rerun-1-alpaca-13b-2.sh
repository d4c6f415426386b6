#!/usr/bin/env bash
# Experiment 1, f2: incremental training on COIG's translated instructions; questions are learned, too.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
data COIG/translated_instructions.json
trains_on run-1-alpaca-13b-1
train "${published[@]}" --lora_target_modules '[q_proj,v_proj]' --val_set_size 500 --train_on_inputs True "$@"
