#!/usr/bin/env bash
# The chat page with the adapter of rerun-2-alpaca-13b-2-2.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
adapter rerun-2-alpaca-13b-2-2
chat --load_8bit True "$@"
