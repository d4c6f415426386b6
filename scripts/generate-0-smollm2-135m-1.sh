#!/usr/bin/env bash
# Demo: the chat page with the adapter of f1.
source "$(dirname "$0")/env.sh"

base chinese-smollm2-135m merge-0-smollm2-135m
adapter run-0-smollm2-135m-1
chat "$@"
