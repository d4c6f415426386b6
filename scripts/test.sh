#!/usr/bin/env bash
# Set up if needed, then lint, types and tests: bash scripts/test.sh [--fast | --all] [words for pytest, such as -k merging]
# --fast leaves out what starts programs or a browser, --all adds what takes long (marked slow).
# VERSIONS=newest takes the newest versions in range (see setup.sh).
case "${1:-}" in
    --fast) tier=(-m "not (slow or page or cli or reliability or demo)") && shift ;;
    --all) tier=() && shift ;;
    *) tier=(-m "not slow") ;;
esac
bash "$(dirname "$0")/setup.sh" dev ${VERSIONS:+"$VERSIONS"} || exit
source "$(dirname "$0")/env.sh"
cd "$ROOT"

if ! command -v chromium > /dev/null && ! command -v google-chrome > /dev/null; then
    if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
        echo "set-up: installing Chromium and a Chinese font for the tests of the page"
        { apt-get update -q && apt-get install -y -q chromium fonts-noto-cjk; } > /dev/null
    else
        echo "no Chromium found: the tests of the page are left out; install chromium to run them"
    fi
fi

# the tests' files in memory where 8 GiB are free there: many wait for a disk longer than they compute
in_memory=/dev/shm
if [ -z "${TMPDIR:-}" ] && [ "$(df --output=avail "$in_memory" 2> /dev/null | tail -n 1)" -gt $((8 << 20)) ] 2> /dev/null; then
    TMPDIR="$(mktemp -d "$in_memory/dreamergpt-tests.XXXXXX")"
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
fi

ruff check .
ruff format --check .
mypy
# two processes, each with whole modules, whose fixtures are shared; a third gains nothing on two cores. If one crashes, the
# run ends: pytest-xdist would start another, and wait forever for what the crashed one had left
python -m pytest -n 2 --dist loadscope --max-worker-restart 0 ${tier[@]+"${tier[@]}"} "$@"
