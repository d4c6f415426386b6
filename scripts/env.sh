# shellcheck shell=bash
# Sourced by every script here: where things are, and the functions that the scripts are written with.
# Variables that are already set are kept; the defaults for the others are here, and may be edited.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NAME="$(basename "$0" .sh)"                      # the step, and the output folder of that name
export MODEL_DIR="${MODEL_DIR:-$ROOT/models}"    # base models, LoRA weights to merge, merged models
export DATA_DIR="${DATA_DIR:-$ROOT/datasets}"    # what data/*/prepare.py writes
export OUTPUT_DIR="${OUTPUT_DIR:-$ROOT/output}"  # adapters and answers, one folder a step
export NPROC="${NPROC:-1}"                       # processes (GPUs) that train together
gpus=""                                          # which GPUs, such as 0,1; empty: CUDA_VISIBLE_DEVICES, else all
[ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-$gpus}"
[ ! -x "$ROOT/.venv/bin/python" ] || PATH="$ROOT/.venv/bin:$PATH"
PYTHON="${PYTHON:-python}"
# shellcheck disable=SC2034  # used by setup.sh and offline_bundle.sh
TORCH_FOR_CPU=https://download.pytorch.org/whl/cpu
# TRAIN_OPTIONS and ANSWER_OPTIONS are further options for all training and answering steps, for whole chains;
# PLAN=1 prints what a script would run; SKIP_DONE=1 skips a step whose result exists. chain.sh uses both.

# The published hyperparameters of all experiments
# shellcheck disable=SC2034  # used by the scripts
published=(
    --batch_size 256 --micro_batch_size 8 --num_epochs 3 --learning_rate 1e-4 --cutoff_len 512
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --group_by_length --warmup_steps 100
)
# and those of the small demo
# shellcheck disable=SC2034
demo=(
    --prompt_template_name alpaca_short --batch_size 10 --micro_batch_size 10 --val_set_size 0
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05
)
# and those of the demo on the base model's own chat template
# shellcheck disable=SC2034
demo_chat=(
    --prompt_template_name chat --num_epochs 8 --learning_rate 2e-3 --lora_target_modules '[q_proj,v_proj]'
    --train_on_inputs False
)

needs=()   # pairs: a path, and what to do where it is missing
model=""
records=""
parent=""
lora=""

# base NAME [SCRIPT]: the base model is $MODEL_DIR/NAME, and SCRIPT makes it
base() {
    model="$MODEL_DIR/$1"
    needs+=("$model" "${2:+bash scripts/$2.sh makes it}")
}

# data FILE: the records are $DATA_DIR/FILE
data() {
    records="$DATA_DIR/$1"
    needs+=("$records" "python data/${1%%/*}/prepare.py --raw … makes it, see data/${1%%/*}/README.md")
}

# trains_on STEP: the adapter of an earlier step is where training starts
trains_on() {
    parent="$OUTPUT_DIR/$1"
    needs+=("$parent/lineage.json" "bash scripts/$1.sh makes it")
}

# adapter STEP…: adapters that answer
adapter() {
    local step
    for step in "$@"; do
        lora="${lora:+$lora,}$OUTPUT_DIR/$step"
        needs+=("$OUTPUT_DIR/$step/lineage.json" "bash scripts/$step.sh makes it")
    done
}

# lora NAME: published LoRA weights, $MODEL_DIR/NAME
lora() {
    lora="$MODEL_DIR/$1"
    needs+=("$lora" "")
}

# merge NAME OPTIONS…: base and LoRA become $MODEL_DIR/NAME
merge() {
    local name="$1"
    shift
    make "$MODEL_DIR/$name" "$PYTHON" "$ROOT/merge_weights.py" --base_model "$model" --lora_model "$lora" \
        --output_dir "$MODEL_DIR/$name" "$@"
}

# train OPTIONS…: one process, or NPROC of them, train the adapter $OUTPUT_DIR/$NAME
train() {
    local launch=("$PYTHON") more=()
    [ "$NPROC" = 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
    read -ra more <<< "${TRAIN_OPTIONS:-}"
    make "$OUTPUT_DIR/$NAME/lineage.json" "${launch[@]}" "$ROOT/finetune.py" --base_model "$model" --data_path "$records" \
        --output_dir "$OUTPUT_DIR/$NAME" ${parent:+--resume_from_checkpoint "$parent"} "$@" ${more[@]+"${more[@]}"}
}

# answer PROMPTS OPTIONS…: answer a file or folder of prompts into test.json, beside the adapter or in $OUTPUT_DIR/$NAME
answer() {
    local prompts="$1" result="${lora:-$OUTPUT_DIR/$NAME}/test.json" more=()
    local place=(--output_path "$result")
    [ -z "$lora" ] || place=(--lora_weights "$lora")
    shift
    read -ra more <<< "${ANSWER_OPTIONS:-}"
    make "$result" "$PYTHON" "$ROOT/generate.py" --base_model "$model" "${place[@]}" --is_ui False \
        --test_input_path "$prompts" "$@" ${more[@]+"${more[@]}"}
}

# chat OPTIONS…: the page in the browser
chat() {
    make "" "$PYTHON" "$ROOT/generate.py" --base_model "$model" ${lora:+--lora_weights "$lora"} "$@"
}

# make RESULT COMMAND…: run what makes RESULT, once everything that it needs exists
make() {
    local result="$1" index
    shift
    if [ -n "${SKIP_DONE:-}" ] && is_there "$result"; then
        echo "done already: $result"
        return
    fi
    for ((index = 0; index < ${#needs[@]}; index += 2)); do
        is_there "${needs[index]}" || missing "${needs[index]}" "${needs[index + 1]:-put it there, README.md says where it comes from}"
    done
    if [ -n "${PLAN:-}" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# missing PATH FIX: ends the script with an error; a plan only prints it
missing() {
    if [ -n "${PLAN:-}" ]; then
        echo "missing: $1; $2"
    else
        echo "$NAME: error: $1 is missing; $2" >&2
        exit 2
    fi
}

# is_there PATH: a published adapter has no lineage.json; unlike an unfinished run it has no checkpoints
is_there() {
    [ -e "$1" ] || {
        [ "${1##*/}" = lineage.json ] && [ -e "${1%/*}/adapter_config.json" ] && ! compgen -G "${1%/*}/checkpoint-*" > /dev/null
    }
}

# answers ADDRESS: within ten seconds
answers() {
    python3 - "$1" <<< "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)" 2> /dev/null
}
