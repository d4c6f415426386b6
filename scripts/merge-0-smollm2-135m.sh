#!/usr/bin/env bash
# Demo: base and Chinese LoRA become one model folder, as LLaMA and Chinese-LLaMA's LoRA do.
source "$(dirname "$0")/env.sh"

base smollm2-135m get-smollm2-135m
adapter run-0-smollm2-135m-0
merge chinese-smollm2-135m "$@"
