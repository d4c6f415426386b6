#!/usr/bin/env bash
# Make .venv with what the toolkit needs; "setup.sh dev" adds what its tests need. Does nothing where that is done.
source "$(dirname "$0")/env.sh"

install() { # install REQUIREMENTS: unless these very lines are installed already
    local done_mark
    done_mark="$ROOT/.venv/.$(basename "$1").installed"
    if cmp -s "$1" "$done_mark"; then return; fi
    echo "set-up: installing $(basename "$1") into .venv (a few minutes, once)"
    "$ROOT/.venv/bin/pip" install --quiet --disable-pip-version-check -r "$1"
    cp "$1" "$done_mark"
}

[ -x "$ROOT/.venv/bin/python" ] || python3 -m venv "$ROOT/.venv"
if ! command -v nvidia-smi > /dev/null && ! "$ROOT/.venv/bin/python" -c "import torch" 2> /dev/null; then
    # this exact version first, so that a machine without a GPU uses the CPU build it may hold
    "$ROOT/.venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
fi
install "$ROOT/requirements.txt"
if [ "${1:-}" = dev ]; then
    install "$ROOT/requirements-dev.txt"
fi
