#!/usr/bin/env bash
# Demo: the merged base model alone answers the held-out questions, for comparison.
source "$(dirname "$0")/env.sh"

base chinese-smollm2-135m merge-0-smollm2-135m
answer "$ROOT/data/demo/heldout" --prompt_template alpaca_short --num_beams 1 --max_new_tokens 40 "$@"
