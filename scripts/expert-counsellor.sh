#!/usr/bin/env bash
# A counsellor, from texts over dialogues to preferences: the answers show whether it listens, and what it says in danger.
#     bash scripts/expert-counsellor.sh [FOLDER] [--base NAME] [--replay SHARE] [--no-page]
source "$(dirname "$0")/expert.sh"
expert "$@"
