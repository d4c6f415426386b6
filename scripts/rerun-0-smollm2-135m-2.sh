#!/usr/bin/env bash
# Demo, f2: incremental training from the adapter of f1; the model learns verses, and still knows who it is.
source "$(dirname "$0")/env.sh"

base chinese-smollm2-135m merge-0-smollm2-135m
records="$ROOT/data/demo/f2.json"
trains_on run-0-smollm2-135m-1
train "${demo[@]}" --num_epochs 8 --learning_rate 2e-3 --lora_target_modules '[q_proj,v_proj]' --train_on_inputs False "$@"
