#!/usr/bin/env bash
# Experiment 1, f1: warm start on COIG's value alignment, part 1; answers only.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
data COIG/human_value_alignment_instructions_part1.json
train "${published[@]}" --lora_target_modules '[q_proj,v_proj]' --val_set_size 200 --train_on_inputs False "$@"
