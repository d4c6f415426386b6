#!/usr/bin/env bash
# The chat page with the adapter of run-2-alpaca-13b-1.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
adapter run-2-alpaca-13b-1
chat --load_8bit True "$@"
