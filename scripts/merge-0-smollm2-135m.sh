#!/usr/bin/env bash
# Demo: merge the base model and the Chinese LoRA into one model folder, as is done for LLaMA and Chinese-LLaMA.
source "$(dirname "$0")/env.sh"

base smollm2-135m get-smollm2-135m
adapter run-0-smollm2-135m-0
merge chinese-smollm2-135m "$@"
