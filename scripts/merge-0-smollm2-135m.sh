#!/usr/bin/env bash
# Demo: base and Chinese LoRA become one model folder, as LLaMA and Chinese-LLaMA's LoRA do.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need "$MODEL_DIR/smollm2-135m" "bash scripts/get-smollm2-135m.sh makes it"
need "$OUTPUT_DIR/run-0-smollm2-135m-0/lineage.json" "bash scripts/run-0-smollm2-135m-0.sh makes it"

python "$ROOT/merge_weights.py" \
    --base_model "$MODEL_DIR/smollm2-135m" \
    --lora_model "$OUTPUT_DIR/run-0-smollm2-135m-0" \
    --output_dir "$MODEL_DIR/chinese-smollm2-135m" \
    "$@"
