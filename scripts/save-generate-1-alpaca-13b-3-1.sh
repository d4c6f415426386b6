#!/usr/bin/env bash
# The adapter of rerun-1-alpaca-13b-3-1 answers the evaluation prompts, in test.json beside it.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
adapter rerun-1-alpaca-13b-3-1
answer "$ROOT/test_data" --load_8bit True "$@"
