#!/usr/bin/env bash
# The adapter of run-2-alpaca-13b-1 answers the evaluation prompts, in test.json beside it.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
adapter run-2-alpaca-13b-1
answer "$ROOT/test_data" --load_8bit True "$@"
