#!/usr/bin/env bash
# The adapter of run-5-bloom-7b1-1 answers the evaluation prompts, in test.json beside it.
source "$(dirname "$0")/env.sh"

base bloom-7b1
adapter run-5-bloom-7b1-1
answer "$ROOT/test_data" --load_8bit True "$@"
