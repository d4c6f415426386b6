#!/usr/bin/env bash
# Merge LLaMA-7B and the Chinese-Alpaca LoRA into the model chinese-alpaca-7b.
source "$(dirname "$0")/env.sh"

base llama-7b
lora chinese-alpaca-lora-7b
merge chinese-alpaca-7b "$@"
