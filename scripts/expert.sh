# shellcheck shell=bash
# Sourced by expert-*.sh: turns a folder of texts, questions and answers into an expert, with one command.
#     bash scripts/expert-NAME.sh [FOLDER] [--base NAME] [--replay SHARE] [--no-page]
# Finished steps are skipped. --base names another base model in $MODEL_DIR, such as a 7B. With --replay the third step
# trains on more*.json and replays that share of the dialogues, instead of training on preferences.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export SKIP_DONE=1

# files PATTERN…: the files of the folder that match, separated by commas
files() {
    local pattern found=()
    for pattern in "$@"; do
        for file in "$folder"/$pattern; do
            [ ! -f "$file" ] || found+=("$file")
        done
    done
    local IFS=,
    echo "${found[*]}"
}

# step NAME DATA OPTIONS…: train on DATA, if there is any, from the previous step's adapter, and answer the held-out questions
step() {
    NAME="$expert-$1"
    records="$2"
    [ -n "$records" ] || return 0
    shift 2
    train "${settings[@]}" "$@"
    parent="$OUTPUT_DIR/$NAME"
    lora="$parent"
    answer "$folder/heldout.json" --num_beams 1 --max_new_tokens 96
}

# clean NAME FILES: write the cleaned records of FILES to $out/NAME.json
clean() {
    make "$out/$1.json" "$PYTHON" "$ROOT/data/clean.py" --data_path "$2" --output_path "$out/$1.json" \
        --against "$folder/heldout.json"
}

expert() {
    expert="$NAME"
    folder="$ROOT/data/experts/${NAME#expert-}"
    local name=chinese-smollm2-135m page=1 replay=""
    while [ $# -gt 0 ]; do
        case "$1" in
            --base) name="${2:?--base: name a folder in $MODEL_DIR}" && shift ;;
            --replay) replay="${2:?--replay: give a share of the new records, such as 0.5}" && shift ;;
            --no-page) page="" ;;
            -*) echo "$NAME: error: $1: unknown; bash scripts/$NAME.sh [FOLDER] [--base NAME] [--replay SHARE] [--no-page]" >&2 && exit 2 ;;
            *) folder="$1" ;;
        esac
        shift
    done
    [ -d "$folder" ] || { echo "$NAME: error: $folder is not there; name the folder of your texts and records" >&2 && exit 2; }
    if [ "$name" = chinese-smollm2-135m ]; then
        base "$name" merge-0-smollm2-135m
        settings=("${demo[@]}" --learning_rate 2e-3 --cutoff_len 128)
    else
        base "$name"
        # not those of the experiments: with few records, the whole training is shorter than their warm-up of 100 steps
        settings=(--batch_size 32 --micro_batch_size 8 --val_set_size 0 --learning_rate 1e-4 --cutoff_len 512 --group_by_length)
    fi
    local out="$OUTPUT_DIR/$expert-clean" dialogues texts more
    dialogues="$(files 'dialogues*.json' 'dialogues*.jsonl')"
    texts="$(files '*.txt' '*.md')"
    [ -n "$dialogues" ] || { echo "$NAME: error: $folder holds no dialogues*.json; see data/experts/README.md" >&2 && exit 2; }
    more="$(files 'more*.json' 'more*.jsonl')"
    [ -z "$replay" ] || [ -n "$more" ] || { echo "$NAME: error: $folder holds no more*.json to learn with --replay; add it" >&2 && exit 2; }
    [ -n "${PLAN:-}" ] || mkdir -p "$out"

    clean dialogues "$dialogues"
    step 1 "$texts" --num_epochs 3
    step 2 "$out/dialogues.json" --num_epochs 10 --train_on_inputs False
    if [ -n "$replay" ]; then
        clean more "$more"
        step 3 "$out/more.json" --num_epochs 10 --train_on_inputs False --replay "$replay"
    else
        step 3 "$(files 'preferences*.json' 'preferences*.jsonl')" --num_epochs 4 --learning_rate 5e-4 --preference_sft 0.5
    fi
    make "$OUTPUT_DIR/$expert-measured/chain.md" "$PYTHON" "$ROOT/judge.py" --chain "$parent" \
        --test_input_path "$folder/heldout.json" --output_dir "$OUTPUT_DIR/$expert-measured"
    [ -z "$page" ] || SKIP_DONE="" chat "$@"
}
