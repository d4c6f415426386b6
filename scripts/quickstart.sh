#!/usr/bin/env bash
# The whole chain on a small real model: set-up, demo base, merge, warm start, incremental training, answers.
# May be run again at any time: what is done is skipped.
set -euo pipefail
bash "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

step() { # step RESULT SCRIPT "what it does"
    if [ -e "$1" ]; then
        echo "== $3: done already ($1)"
    else
        echo "== $3: bash scripts/$2.sh"
        bash "$ROOT/scripts/$2.sh"
    fi
}

step "$MODEL_DIR/smollm2-135m" get-smollm2-135m "demo base"
step "$OUTPUT_DIR/run-0-smollm2-135m-0/lineage.json" run-0-smollm2-135m-0 "Chinese tokens and LoRA"
step "$MODEL_DIR/chinese-smollm2-135m" merge-0-smollm2-135m "merge"
step "$OUTPUT_DIR/save-generate-0-smollm2-135m/test.json" save-generate-0-smollm2-135m "answers before"
step "$OUTPUT_DIR/run-0-smollm2-135m-1/lineage.json" run-0-smollm2-135m-1 "f1, warm start"
step "$OUTPUT_DIR/run-0-smollm2-135m-1/test.json" save-generate-0-smollm2-135m-1 "answers after f1"
step "$OUTPUT_DIR/rerun-0-smollm2-135m-2/lineage.json" rerun-0-smollm2-135m-2 "f2, incremental training"
step "$OUTPUT_DIR/rerun-0-smollm2-135m-2/test.json" save-generate-0-smollm2-135m-2 "answers after f2"

python "$ROOT/data/demo/compare.py" \
    "base=$OUTPUT_DIR/save-generate-0-smollm2-135m/test.json" \
    "f1=$OUTPUT_DIR/run-0-smollm2-135m-1/test.json" \
    "f2=$OUTPUT_DIR/rerun-0-smollm2-135m-2/test.json"
PYTHONPATH="$ROOT" python -m utils.lineage "$OUTPUT_DIR/rerun-0-smollm2-135m-2"
echo "Talk to it: bash scripts/generate-0-smollm2-135m-2.sh"
