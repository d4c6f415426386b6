#!/usr/bin/env bash
# LLaMA-13b and the LoRA of Chinese-Alpaca become the model chinese-alpaca-13b.
source "$(dirname "$0")/env.sh"

base llama-13b
lora chinese-alpaca-lora-13b
merge chinese-alpaca-13b "$@"
