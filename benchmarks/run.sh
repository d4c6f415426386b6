#!/usr/bin/env bash
# Run all benchmarks (or those named: bash benchmarks/run.sh data) and write benchmarks/RESULTS.md. This takes long.
# Uses the model $MODEL_DIR/smollm2-135m, and the first tokenizer.model found in $MODEL_DIR for the tokenizer benchmark.
source "$(dirname "$0")/../scripts/env.sh"
export PYTHONPATH="$ROOT:${PYTHONPATH:-}"

if [ $# = 0 ]; then
    for file in "$ROOT"/benchmarks/*.py; do
        case "$(basename "$file" .py)" in common | results | trl_losses) ;; *) set -- "$@" "$(basename "$file" .py)" ;; esac
    done
fi

logs="$(mktemp -d)"
measured=()
trap 'rm -rf "$logs"' EXIT
for name in "$@"; do
    command=(-m "benchmarks.$name")
    if [ "$name" = preferences ] && ! "$PYTHON" -c "import trl" 2> /dev/null; then
        echo "== $name: skipped, trl is not installed (pip install trl in an environment of its own)"
        continue
    fi
    help="$("$PYTHON" "${command[@]}" --help)"
    case "$help" in
        *--base_model*'(required)'*)
            base smollm2-135m get-smollm2-135m
            is_there "$model" || missing "$model" "bash scripts/get-smollm2-135m.sh makes it"
            command+=(--base_model "$model")
            ;;
        *--tokenizer*'(required)'*)
            tokenizer="$(compgen -G "$MODEL_DIR/*/tokenizer.model" | head -n 1 || true)"
            [ -n "$tokenizer" ] || { echo "== $name: skipped, no model in $MODEL_DIR has a tokenizer.model"; continue; }
            command+=(--tokenizer "$(dirname "$tokenizer")")
            ;;
    esac
    echo "== python ${command[*]}"
    "$PYTHON" "${command[@]}" | tee "$logs/$name"
    measured+=("$name")
done
[ ${#measured[@]} != 0 ] || { echo "run: error: nothing was measured" >&2; exit 2; }
"$PYTHON" "$ROOT/benchmarks/results.py" "$logs" "${measured[@]}" > "$logs/.page"
mv "$logs/.page" "$ROOT/benchmarks/RESULTS.md"
echo "wrote benchmarks/RESULTS.md"
