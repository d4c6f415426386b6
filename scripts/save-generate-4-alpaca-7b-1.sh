#!/usr/bin/env bash
# The adapter of run-4-alpaca-7b-1 answers the evaluation prompts, in test.json beside it.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-7b merge-7b-alpaca
adapter run-4-alpaca-7b-1
answer "$ROOT/test_data" --load_8bit True "$@"
