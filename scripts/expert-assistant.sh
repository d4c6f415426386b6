#!/usr/bin/env bash
# A private assistant, trained on notes, questions and preferences: its answers show what it knows and what it does not.
#     bash scripts/expert-assistant.sh [FOLDER] [--base NAME] [--replay SHARE] [--no-page]
source "$(dirname "$0")/expert.sh"
expert "$@"
