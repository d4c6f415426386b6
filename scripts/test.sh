#!/usr/bin/env bash
# Set up if needed, then lint, type-check and test: bash scripts/test.sh [--fast | --all] [pytest arguments, such as -k merging]
# --fast skips tests that start programs or a browser, --all adds the slow and the long ones.
# VERSIONS=newest tests with the newest versions in range (see setup.sh).
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
        echo "no Chromium found: the tests of the page are skipped; install chromium to run them"
    fi
fi

# keep the tests' files in memory if 8 GiB are free there: many tests spend more time waiting for a disk than computing
in_memory=/dev/shm
if [ -z "${TMPDIR:-}" ] && [ "$(df --output=avail "$in_memory" 2> /dev/null | tail -n 1)" -gt $((8 << 20)) ] 2> /dev/null; then
    TMPDIR="$(mktemp -d "$in_memory/dreamergpt-tests.XXXXXX")"
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
fi

ruff check .
ruff format --check .
mypy
# two processes, with whole modules each, since fixtures are shared; a third gains nothing on two cores. If one crashes, the
# run ends: pytest-xdist would start another and wait forever for the crashed one's remaining tests
python -m pytest -n 2 --dist loadscope --max-worker-restart 0 ${tier[@]+"${tier[@]}"} "$@"
