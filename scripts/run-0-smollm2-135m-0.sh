#!/usr/bin/env bash
# Demo, f0: a small counterpart of the Chinese-LLaMA LoRA: new Chinese tokens, with fully trained embeddings.
source "$(dirname "$0")/env.sh"

base smollm2-135m get-smollm2-135m
records="$ROOT/data/demo/f0.json"
tokenizer="$MODEL_DIR/smollm2-135m-chinese-tokenizer"

SKIP_DONE=1 make "$tokenizer" "$PYTHON" "$ROOT/extend_vocab.py" --base_model "$model" --text "$records" --vocab_size 60 \
    --output_dir "$tokenizer"
train "${demo[@]}" --tokenizer "$tokenizer" --num_epochs 3 --learning_rate 5e-4 \
    --lora_target_modules '[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]' \
    --modules_to_save '[embed_tokens,lm_head]' "$@"
