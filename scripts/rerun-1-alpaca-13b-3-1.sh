#!/usr/bin/env bash
# Experiment 1, f3: incremental training on PsyQA, variant 5. Its adapter is D13b-1-3-1.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
data psyQA/psyqa-5.json
trains_on rerun-1-alpaca-13b-2
train "${published[@]}" --lora_target_modules '[q_proj,v_proj]' --val_set_size 200 --train_on_inputs True "$@"
