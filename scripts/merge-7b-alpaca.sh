#!/usr/bin/env bash
# LLaMA-7b and the LoRA of Chinese-Alpaca become the model chinese-alpaca-7b.
source "$(dirname "$0")/env.sh"

base llama-7b
lora chinese-alpaca-lora-7b
merge chinese-alpaca-7b "$@"
