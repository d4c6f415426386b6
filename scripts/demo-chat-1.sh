#!/usr/bin/env bash
# Demo with the base model's own chat template (ChatML), f1: the model learns who it is, and answers.
source "$(dirname "$0")/env.sh"

base smollm2-135m get-smollm2-135m
records="$ROOT/data/demo/f1.json"
train "${demo[@]}" "${demo_chat[@]}" "$@"
adapter "$NAME"
answer "$ROOT/data/demo/heldout" --num_beams 1 --max_new_tokens 40
