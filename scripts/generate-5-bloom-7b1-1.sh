#!/usr/bin/env bash
# The chat page with the adapter of run-5-bloom-7b1-1.
source "$(dirname "$0")/env.sh"

base bloom-7b1
adapter run-5-bloom-7b1-1
chat --load_8bit True "$@"
