#!/usr/bin/env bash
# The complete chain on a small real model: set-up, demo base model, merge, warm start, incremental training, answers.
# Can be rerun at any time: finished steps are skipped.
bash "$(dirname "$0")/setup.sh" || exit # before env.sh, which looks for .venv
source "$(dirname "$0")/env.sh"

bash "$ROOT/scripts/chain.sh" demo
"$PYTHON" "$ROOT/data/demo/compare.py" \
    "base=$OUTPUT_DIR/save-generate-0-smollm2-135m/test.json" \
    "f1=$OUTPUT_DIR/run-0-smollm2-135m-1/test.json" \
    "f2=$OUTPUT_DIR/rerun-0-smollm2-135m-2/test.json"
echo "Chat with it: bash scripts/generate-0-smollm2-135m-2.sh"
