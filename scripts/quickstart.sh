#!/usr/bin/env bash
# The whole chain on a small real model: set-up, demo base, merge, warm start, incremental training, answers.
# May be run again at any time: what is done is skipped.
bash "$(dirname "$0")/setup.sh" || exit # first, because env.sh looks for .venv
source "$(dirname "$0")/env.sh"

bash "$ROOT/scripts/chain.sh" demo
"$PYTHON" "$ROOT/data/demo/compare.py" \
    "base=$OUTPUT_DIR/save-generate-0-smollm2-135m/test.json" \
    "f1=$OUTPUT_DIR/run-0-smollm2-135m-1/test.json" \
    "f2=$OUTPUT_DIR/rerun-0-smollm2-135m-2/test.json"
echo "Talk to it: bash scripts/generate-0-smollm2-135m-2.sh"
