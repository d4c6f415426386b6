#!/usr/bin/env bash
# The chat page with the adapter of run-4-alpaca-7b-1.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-7b merge-7b-alpaca
adapter run-4-alpaca-7b-1
chat --load_8bit True "$@"
