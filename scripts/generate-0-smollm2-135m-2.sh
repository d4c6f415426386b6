#!/usr/bin/env bash
# Demo: the chat page, with the adapters of f1 and f2 side by side.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need "$OUTPUT_DIR/rerun-0-smollm2-135m-2/lineage.json" "bash scripts/rerun-0-smollm2-135m-2.sh makes it"

python "$ROOT/generate.py" \
    --base_model "$MODEL_DIR/chinese-smollm2-135m" \
    --lora_weights "$OUTPUT_DIR/run-0-smollm2-135m-1,$OUTPUT_DIR/rerun-0-smollm2-135m-2" \
    "$@"
