#!/usr/bin/env bash
# Merge LLaMA-7B and the Chinese-LLaMA LoRA into the model chinese-llama-7b.
source "$(dirname "$0")/env.sh"

base llama-7b
lora chinese-llama-lora-7b
merge chinese-llama-7b "$@"
