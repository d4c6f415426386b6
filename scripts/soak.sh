#!/usr/bin/env bash
# Run the complete reliability tests in rounds with different seeds: bash scripts/soak.sh [HOURS] (default: one round)
# Stops at the first failure and prints the seed that reproduces it. SEED sets the seed of the first round.
source "$(dirname "$0")/env.sh"
cd "$ROOT"

hours="${1:-}"
if [ -n "$hours" ] && ! [[ "$hours" =~ ^[0-9]+([.][0-9]+)?$ ]]; then
    echo "soak: error: $hours: not a number of hours; bash scripts/soak.sh 8, or nothing for one round" >&2
    exit 2
fi
seconds="$(awk "BEGIN {print int(${hours:-0} * 3600)}")"
seed="${SEED:-$(date +%s)}"
rounds=0

while [ "$rounds" = 0 ] || [ "$SECONDS" -lt "$seconds" ]; do
    echo "soak: round $((rounds + 1)), seed $seed"
    RELIABILITY=full RELIABILITY_SEED="$seed" "$PYTHON" -m pytest tests/reliability -x -s || {
        echo "soak: failed in round $((rounds + 1)) after $SECONDS s; to reproduce it: SEED=$seed bash scripts/soak.sh" >&2
        exit 1
    }
    rounds=$((rounds + 1))
    seed=$((seed + 1))
done
echo "soak: $rounds rounds in $SECONDS s, no failure"
