#!/usr/bin/env bash
# LLaMA-7b and the LoRA of Chinese-LLaMA become the model chinese-llama-7b.
source "$(dirname "$0")/env.sh"

base llama-7b
lora chinese-llama-lora-7b
merge chinese-llama-7b "$@"
