#!/usr/bin/env bash
# Run all benchmarks here (or those named: bash benchmarks/run.sh data), and write benchmarks/RESULTS.md. It takes long;
# $MODEL_DIR/smollm2-135m is the model where one is needed (bash scripts/get-smollm2-135m.sh makes it).
source "$(dirname "$0")/../scripts/env.sh"
cd "$ROOT"

if [ $# = 0 ]; then
    for file in benchmarks/*.py; do
        case "$(basename "$file" .py)" in common | results) ;; *) set -- "$@" "$(basename "$file" .py)" ;; esac
    done
fi

logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
for name in "$@"; do
    command=(-m "benchmarks.$name")
    if "$PYTHON" "${command[@]}" --help | grep -q -- '--base_model .*(required)'; then
        base smollm2-135m get-smollm2-135m
        is_there "$model" || missing "$model" "bash scripts/get-smollm2-135m.sh makes it"
        command+=(--base_model "$model")
    fi
    echo "== python ${command[*]}"
    "$PYTHON" "${command[@]}" | tee "$logs/$name"
done
"$PYTHON" benchmarks/results.py "$logs" "$@" > "$logs/.table"
mv "$logs/.table" benchmarks/RESULTS.md
echo "benchmarks/RESULTS.md is written"
