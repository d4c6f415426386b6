#!/usr/bin/env bash
# Merge LLaMA-13B and the Chinese-Alpaca LoRA into the model chinese-alpaca-13b.
source "$(dirname "$0")/env.sh"

base llama-13b
lora chinese-alpaca-lora-13b
merge chinese-alpaca-13b "$@"
