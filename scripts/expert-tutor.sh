#!/usr/bin/env bash
# A language tutor, from rules over exercises to preferences: the answers show whether it corrects rightly.
#     bash scripts/expert-tutor.sh [FOLDER] [--base NAME] [--replay SHARE] [--no-page]
source "$(dirname "$0")/expert.sh"
expert "$@"
