#!/usr/bin/env bash
# A language tutor, trained on rules, exercises and preferences: its answers show whether its corrections are right.
#     bash scripts/expert-tutor.sh [FOLDER] [--base NAME] [--replay SHARE] [--no-page]
source "$(dirname "$0")/expert.sh"
expert "$@"
