#!/usr/bin/env bash
# Demo with the base model's own chat template, f2: verses, too; then merged, and checked with plain transformers.
source "$(dirname "$0")/env.sh"

base smollm2-135m get-smollm2-135m
records="$ROOT/data/demo/f2.json"
trains_on demo-chat-1
train "${demo[@]}" "${demo_chat[@]}" "$@"
adapter "$NAME"
answer "$ROOT/data/demo/heldout" --num_beams 1 --max_new_tokens 40
merge demo-chat-smollm2-135m
needs+=("$MODEL_DIR/demo-chat-smollm2-135m" "")
make "" "$PYTHON" "$ROOT/data/demo/ask_plain.py" "$MODEL_DIR/demo-chat-smollm2-135m" "$OUTPUT_DIR/$NAME/test.json"
make "" "$PYTHON" "$ROOT/data/demo/compare.py" "f1=$OUTPUT_DIR/demo-chat-1/test.json" "f2=$OUTPUT_DIR/$NAME/test.json"
