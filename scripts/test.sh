#!/usr/bin/env bash
# Set up if needed, then lint, types and tests. Further words go to pytest: bash scripts/test.sh -k merging
bash "$(dirname "$0")/setup.sh" dev || exit
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

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
