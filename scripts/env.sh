# shellcheck shell=bash
# Sourced by every script here: where things are, and the few words that the scripts share.
# What the environment says already, stands; NPROC is the number of processes (GPUs) that train.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NAME="$(basename "$0" .sh)"                      # the step, and the output folder of that name
export ROOT NAME
export MODEL_DIR="${MODEL_DIR:-$ROOT/models}"    # base models, and merged ones
export DATA_DIR="${DATA_DIR:-$ROOT/datasets}"    # what data/*/prepare.py writes
export OUTPUT_DIR="${OUTPUT_DIR:-$ROOT/output}"  # adapters, one folder a step
export NPROC="${NPROC:-1}"
[ ! -x "$ROOT/.venv/bin/python" ] || PATH="$ROOT/.venv/bin:$PATH"

# need PATH "what to do to get it": stop with one line unless it is there
need() {
    [ -e "$1" ] || { echo "$NAME: error: $1 is missing; $2" >&2; exit 2; }
}

# finetune OPTIONS…: one process, or NPROC of them
finetune() {
    if [ "$NPROC" = 1 ]; then
        python "$ROOT/finetune.py" "$@"
    else
        torchrun --nproc_per_node "$NPROC" "$ROOT/finetune.py" "$@"
    fi
}
