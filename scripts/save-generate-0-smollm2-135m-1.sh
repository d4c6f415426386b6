#!/usr/bin/env bash
# Demo: the adapter of run-0-smollm2-135m-1 answers the held-out questions, in test.json beside it.
source "$(dirname "$0")/env.sh"

base chinese-smollm2-135m merge-0-smollm2-135m
adapter run-0-smollm2-135m-1
answer "$ROOT/data/demo/heldout" --num_beams 1 --max_new_tokens 40 "$@"
