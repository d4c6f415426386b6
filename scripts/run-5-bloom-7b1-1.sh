#!/usr/bin/env bash
# Experiment 5, f1: warm start of BLOOM on BELLE's half million; answers only. Its adapter is B7b-5-1.
source "$(dirname "$0")/env.sh"

base bloom-7b1
data belle/Belle_open_source_0.5M.json
train "${published[@]}" --val_set_size 2000 --train_on_inputs False "$@"
