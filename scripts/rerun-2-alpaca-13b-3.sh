#!/usr/bin/env bash
# Experiment 2, f3: incremental training on PsyQA, variant 5. Its adapter is D13b-2-3.
source "$(dirname "$0")/env.sh"

base chinese-alpaca-13b merge-13b-alpaca
data psyQA/psyqa-5.json
trains_on rerun-2-alpaca-13b-2-2
train "${published[@]}" --lora_target_modules '[q_proj,v_proj]' --val_set_size 200 --train_on_inputs True "$@"
