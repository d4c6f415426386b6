#!/usr/bin/env bash
# Demo: the merged base alone answers the held-back questions, for comparison.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need "$MODEL_DIR/chinese-smollm2-135m" "bash scripts/merge-0-smollm2-135m.sh makes it"

python "$ROOT/generate.py" \
    --base_model "$MODEL_DIR/chinese-smollm2-135m" \
    --prompt_template alpaca_short \
    --is_ui False \
    --test_input_path "$ROOT/data/demo/heldout" \
    --output_path "$OUTPUT_DIR/$NAME/test.json" \
    --num_beams 1 \
    --max_new_tokens 40 \
    "$@"
