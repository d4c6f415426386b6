#!/usr/bin/env bash
# Demo: the chat page with the adapters of f1 and f2 side by side.
source "$(dirname "$0")/env.sh"

base chinese-smollm2-135m merge-0-smollm2-135m
adapter run-0-smollm2-135m-1 rerun-0-smollm2-135m-2
chat "$@"
