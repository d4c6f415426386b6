#!/usr/bin/env bash
# Run a complete chain, from the base model to the last test.json: bash scripts/chain.sh D13b-2-3
# Finished steps are skipped; --plan prints what would run.
source "$(dirname "$0")/env.sh"

usage() {
    echo "chain: error: ${1:-no chain}: unknown; bash scripts/chain.sh" \
        "demo|D13b-1-3-1|D13b-2-2-2|D13b-2-3|D7b-4-1|B7b-5-1 [--plan]" >&2
    exit 2
}

# the merging and training steps in order; each adapter's answers follow it automatically
case "${1:-}" in
    demo)
        steps=(get-smollm2-135m run-0-smollm2-135m-0 merge-0-smollm2-135m save-generate-0-smollm2-135m
            run-0-smollm2-135m-1 rerun-0-smollm2-135m-2)
        ;;
    D13b-1-3-1) steps=(merge-13b-alpaca run-1-alpaca-13b-1 rerun-1-alpaca-13b-2 rerun-1-alpaca-13b-3-1) ;;
    D13b-2-2-2) steps=(merge-13b-alpaca run-2-alpaca-13b-1 rerun-2-alpaca-13b-2 rerun-2-alpaca-13b-2-2) ;;
    D13b-2-3)
        steps=(merge-13b-alpaca run-2-alpaca-13b-1 rerun-2-alpaca-13b-2 rerun-2-alpaca-13b-2-2 rerun-2-alpaca-13b-3)
        ;;
    D7b-4-1) steps=(merge-7b-alpaca run-4-alpaca-7b-1) ;;
    B7b-5-1) steps=(run-5-bloom-7b1-1) ;;
    *) usage "${1:-}" ;;
esac

scripts=()
for step in "${steps[@]}"; do
    answers="save-generate-${step#*run-}"
    scripts+=("$step")
    [ ! -e "$ROOT/scripts/$answers.sh" ] || scripts+=("$answers")
done

export SKIP_DONE=1
each() {
    local script
    for script in "${scripts[@]}"; do
        echo "== $script: $(sed -n '2s/^# //p' "$ROOT/scripts/$script.sh")"
        bash "$ROOT/scripts/$script.sh"
    done
}

# what would run, and what is missing and not made by a step of the chain
plan="$(PLAN=1 each | grep -v '^missing: .*; bash scripts/')"
case "${2:-}" in
    --plan) echo "$plan" && exit ;;
    "") ;;
    *) usage "$2" ;;
esac
if grep '^missing: ' <<< "$plan" | sort -u | sed 's/^/chain: error: /' >&2; then
    exit 2
fi

each
echo
PYTHONPATH="$ROOT" "$PYTHON" -m utils.lineage "$OUTPUT_DIR/${steps[${#steps[@]} - 1]}"
