#!/usr/bin/env bash
# Demo, f1: warm start; the model learns who it is.
source "$(dirname "$0")/env.sh"

base chinese-smollm2-135m merge-0-smollm2-135m
records="$ROOT/data/demo/f1.json"
train "${demo[@]}" --num_epochs 8 --learning_rate 2e-3 --lora_target_modules '[q_proj,v_proj]' --train_on_inputs False "$@"
