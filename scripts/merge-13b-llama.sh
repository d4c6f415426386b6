#!/usr/bin/env bash
# LLaMA-13b and the LoRA of Chinese-LLaMA become the model chinese-llama-13b.
source "$(dirname "$0")/env.sh"

base llama-13b
lora chinese-llama-lora-13b
merge chinese-llama-13b "$@"
