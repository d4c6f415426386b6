#!/usr/bin/env bash
# A private assistant, from notes over questions to preferences: the answers show whether it knows, and what it does not.
#     bash scripts/expert-assistant.sh [FOLDER] [--base NAME] [--replay SHARE] [--no-page]
source "$(dirname "$0")/expert.sh"
expert "$@"
