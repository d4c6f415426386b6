#!/usr/bin/env bash
# Demo, f1: warm start; the model learns who it is.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need "$MODEL_DIR/chinese-smollm2-135m" "bash scripts/merge-0-smollm2-135m.sh makes it"

finetune \
    --base_model "$MODEL_DIR/chinese-smollm2-135m" \
    --data_path "$ROOT/data/demo/f1.json" \
    --output_dir "$OUTPUT_DIR/$NAME" \
    --prompt_template_name alpaca_short \
    --batch_size 10 \
    --micro_batch_size 10 \
    --num_epochs 8 \
    --learning_rate 2e-3 \
    --val_set_size 0 \
    --lora_r 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --lora_target_modules '[q_proj,v_proj]' \
    --train_on_inputs False \
    "$@"
