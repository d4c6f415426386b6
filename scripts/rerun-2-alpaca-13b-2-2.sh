#!/usr/bin/env bash
# Experiment 2, f2, second half: COIG's translated instructions. Its adapter is D13b-2-2-2.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
data COIG/translated_instructions.json
trains_on rerun-2-alpaca-13b-2
train "${published[@]}" --lora_target_modules '[q_proj,v_proj]' --val_set_size 500 --train_on_inputs True "$@"
