#!/usr/bin/env bash
# Demo, column 0: the small twin of a Chinese-LLaMA LoRA, with new Chinese tokens whose embeddings are trained whole.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need "$MODEL_DIR/smollm2-135m" "bash scripts/get-smollm2-135m.sh makes it"

tokenizer="$MODEL_DIR/smollm2-135m-chinese-tokenizer"
[ -e "$tokenizer" ] || python "$ROOT/extend_vocab.py" \
    --base_model "$MODEL_DIR/smollm2-135m" \
    --text "$ROOT/data/demo/f0.json" \
    --vocab_size 300 \
    --output_dir "$tokenizer"

finetune \
    --base_model "$MODEL_DIR/smollm2-135m" \
    --tokenizer "$tokenizer" \
    --data_path "$ROOT/data/demo/f0.json" \
    --output_dir "$OUTPUT_DIR/$NAME" \
    --prompt_template_name alpaca_short \
    --batch_size 10 \
    --micro_batch_size 10 \
    --num_epochs 3 \
    --learning_rate 1e-3 \
    --val_set_size 0 \
    --lora_r 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --lora_target_modules '[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]' \
    --modules_to_save '[embed_tokens,lm_head]' \
    "$@"
