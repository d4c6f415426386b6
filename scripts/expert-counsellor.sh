#!/usr/bin/env bash
# A counsellor, trained on texts, dialogues and preferences: its answers show whether it listens, and how it handles danger.
#     bash scripts/expert-counsellor.sh [FOLDER] [--base NAME] [--replay SHARE] [--no-page]
source "$(dirname "$0")/expert.sh"
expert "$@"
