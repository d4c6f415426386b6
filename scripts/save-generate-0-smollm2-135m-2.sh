#!/usr/bin/env bash
# Demo: the adapter of f2 answers the held-back questions into test.json beside it.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need "$OUTPUT_DIR/rerun-0-smollm2-135m-2/lineage.json" "bash scripts/rerun-0-smollm2-135m-2.sh makes it"

python "$ROOT/generate.py" \
    --base_model "$MODEL_DIR/chinese-smollm2-135m" \
    --lora_weights "$OUTPUT_DIR/rerun-0-smollm2-135m-2" \
    --is_ui False \
    --test_input_path "$ROOT/data/demo/heldout" \
    --num_beams 1 \
    --max_new_tokens 40 \
    "$@"
