#!/usr/bin/env bash
# For a machine with an NVIDIA GPU, takes at most 15 minutes: bash scripts/gpu_check.sh [REPORT.md]
# Installs the tested versions with CUDA into .venv-gpu; runs the tests that need a GPU, the demo in 8 bit, bfloat16 and 4 bit,
# a step of a model with 7B shapes, and a run on two GPUs if there are two; writes a report to paste into an issue.
source "$(dirname "$0")/env.sh"
REPORT="${1:-gpu-report.md}"
VENV="${GPU_VENV:-$ROOT/.venv-gpu}"
DEMO="${DEMO:-$MODEL_DIR/smollm2-135m}"
LIMIT=300 # seconds per part
failed=0

if ! nvidia-smi > /dev/null 2>&1; then
    echo "gpu_check: error: nvidia-smi finds no NVIDIA GPU; run this on a machine that has one" >&2
    exit 2
fi

install() {
    [ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" \
        -r "$ROOT/requirements.txt" -r "$ROOT/requirements-dev.txt"
}

# part NAME COMMAND…: run it; the report gets pass or fail, the seconds, and output lines with figures or a run's summary
part() {
    local name="$1" out began=$SECONDS result=pass
    shift
    out="$(mktemp)"
    echo "gpu_check: $name"
    timeout "$LIMIT" "$@" > "$out" 2>&1 || result=FAIL
    [ "$result" = pass ] || failed=1
    printf '| %s | %s | %s |\n' "$name" "$result" "$((SECONDS - began))" >> "$REPORT"
    { grep -aE "^figure: | steps in .* of memory$|^[0-9]+ (passed|failed|skipped)" "$out" || true; } | sed "s/^/$name: /" >> "$REPORT.figures"
    [ "$result" = pass ] || { echo "--- $name" && tail -n 30 "$out"; } >> "$REPORT.figures"
    rm "$out"
}

# demo_run NAME OPTIONS…: the demo's first training
demo_run() {
    local name="$1"
    shift
    part "demo, $name" "$VENV/bin/python" finetune.py --base_model "$DEMO" --data_path data/demo/f1.json \
        --output_dir "$work/$name" --num_epochs 4 --learning_rate 2e-3 "${demo[@]}" "$@"
}

cd "$ROOT"
work="$(mktemp -d)"
trap 'rm -rf "$work" "$REPORT.figures"' EXIT
[ -n "${GPU_VENV:-}" ] || install
[ -d "$DEMO" ] || bash scripts/get-smollm2-135m.sh || echo "gpu_check: the demo model could not be downloaded" >&2
{
    echo "### GPU check, $(date -u +%F), $(git rev-parse --short HEAD 2> /dev/null || echo 'no commit')"
    echo
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | sed 's/^/- GPU, driver, memory: /'
    "$VENV/bin/python" -c "import torch; print('- torch', torch.__version__, 'CUDA', torch.version.cuda)" || true
    printf '\n| part | result | seconds |\n|---|---|---|\n'
} > "$REPORT"
: > "$REPORT.figures"

part "tests on the GPU" env CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" "$VENV/bin/python" -m pytest -q -s -m "slow or not slow" tests/training/test_cuda.py
demo_run 8bit --load_8bit
demo_run bfloat16 --load_8bit False
demo_run 4bit --load_4bit
if [ "$(nvidia-smi -L | wc -l)" -ge 2 ]; then
    part "two GPUs" "$VENV/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 finetune.py \
        --base_model "$DEMO" --data_path data/demo/f1.json --output_dir "$work/two" --num_epochs 4 "${demo[@]}" --micro_batch_size 5
fi
# shellcheck disable=SC2016  # a Markdown fence
printf '\n```text\n%s\n```\n' "$(cat "$REPORT.figures")" >> "$REPORT"
echo "gpu_check: wrote $REPORT; please paste it into an issue"
exit "$failed"
