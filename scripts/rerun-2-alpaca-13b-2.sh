#!/usr/bin/env bash
# Experiment 2, f2: incremental training on COIG's value alignment, part 1; questions are learned, too.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
data COIG/human_value_alignment_instructions_part1.json
trains_on run-2-alpaca-13b-1
train "${published[@]}" --lora_target_modules '[q_proj,v_proj]' --val_set_size 200 --train_on_inputs True "$@"
