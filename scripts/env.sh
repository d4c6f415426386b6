# shellcheck shell=bash
# Sourced by every script here: folders, shared settings, and the functions that the scripts consist of.
# Variables that are already set take precedence; edit the defaults for the others here.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NAME="$(basename "$0" .sh)"                      # the step, and the name of its output folder
export MODEL_DIR="${MODEL_DIR:-$ROOT/models}"    # base models, LoRA weights to merge, merged models
export DATA_DIR="${DATA_DIR:-$ROOT/datasets}"    # what data/*/prepare.py writes
export OUTPUT_DIR="${OUTPUT_DIR:-$ROOT/output}"  # adapters and answers, one folder per step
export NPROC="${NPROC:-1}"                       # processes (GPUs) that train together
gpus=""                                          # which GPUs, such as 0,1; empty: CUDA_VISIBLE_DEVICES, else all
[ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-$gpus}"
[ ! -x "$ROOT/.venv/bin/python" ] || PATH="$ROOT/.venv/bin:$PATH"
PYTHON="${PYTHON:-python}"
# shellcheck disable=SC2034  # used by setup.sh and offline_bundle.sh
TORCH_FOR_CPU=https://download.pytorch.org/whl/cpu
# TRAIN_OPTIONS and ANSWER_OPTIONS are additional options for all training and answering steps of a chain;
# PLAN=1 prints the commands instead of running them; SKIP_DONE=1 skips a step whose result exists. chain.sh uses both.

# The published hyperparameters of all experiments
# shellcheck disable=SC2034  # used by the scripts
published=(
    --batch_size 256 --micro_batch_size 8 --num_epochs 3 --learning_rate 1e-4 --cutoff_len 512
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --group_by_length --warmup_steps 100
)
# Those of the small demo
# shellcheck disable=SC2034
demo=(
    --prompt_template_name alpaca_short --batch_size 10 --micro_batch_size 10 --val_set_size 0
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05
)
# Those of the demo with the base model's own chat template
# shellcheck disable=SC2034
demo_chat=(
    --prompt_template_name chat --num_epochs 8 --learning_rate 2e-3 --lora_target_modules '[q_proj,v_proj]'
    --train_on_inputs False
)

needs=()   # pairs: a path, and what to do if it is missing
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

# trains_on STEP: training starts from the adapter of an earlier step
trains_on() {
    parent="$OUTPUT_DIR/$1"
    needs+=("$parent/lineage.json" "bash scripts/$1.sh makes it")
}

# adapter STEP…: the adapters to merge or to answer with
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

# merge NAME OPTIONS…: merge base model and LoRA into $MODEL_DIR/NAME
merge() {
    local name="$1"
    shift
    make "$MODEL_DIR/$name" "$PYTHON" "$ROOT/merge_weights.py" --base_model "$model" --lora_model "$lora" \
        --output_dir "$MODEL_DIR/$name" "$@"
}

# train OPTIONS…: train the adapter $OUTPUT_DIR/$NAME in NPROC processes
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

# chat OPTIONS…: open the chat page
chat() {
    make "" "$PYTHON" "$ROOT/generate.py" --base_model "$model" ${lora:+--lora_weights "$lora"} "$@"
}

# make RESULT COMMAND…: run COMMAND, which makes RESULT, if everything it needs exists
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

# missing PATH FIX: end the script with an error; with PLAN only print it
missing() {
    if [ -n "${PLAN:-}" ]; then
        echo "missing: $1; $2"
    else
        echo "$NAME: error: $1 is missing; $2" >&2
        exit 2
    fi
}

# is_there PATH: true if it exists; for a lineage.json also if the folder holds a published adapter, which has none (an
# unfinished run has none either, but it has checkpoints)
is_there() {
    [ -e "$1" ] || {
        [ "${1##*/}" = lineage.json ] && [ -e "${1%/*}/adapter_config.json" ] && ! compgen -G "${1%/*}/checkpoint-*" > /dev/null
    }
}

# answers ADDRESS: true if it responds within ten seconds
answers() {
    python3 - "$1" <<< "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)" 2> /dev/null
}
