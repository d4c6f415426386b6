#!/usr/bin/env bash
# Merge LLaMA-13B and the Chinese-LLaMA LoRA into the model chinese-llama-13b.
source "$(dirname "$0")/env.sh"

base llama-13b
lora chinese-llama-lora-13b
merge chinese-llama-13b "$@"
