#!/usr/bin/env bash
# A second model family for the demo: Gemma 3 270M, under Google's terms; downloaded only after you accept them.
# bash scripts/get-gemma3-270m.sh [--hub google/gemma-3-270m | --url https://…/gemma-3-270m.tar.gz]
source "$(dirname "$0")/env.sh"

fail() {
    echo "$NAME: error: $1" >&2
    exit 2
}

way=--hub
from=google/gemma-3-270m
if [ $# -gt 0 ]; then
    [ $# = 2 ] || fail "give --hub NAME, or --url ADDRESS of an archive with the model folder; not: $*"
    way="$1" from="$2"
fi
case "$way $from" in
    "--hub "*/*) ;;
    "--url "*://*) ;;
    *) fail "$way $from: unknown; give --hub OWNER/NAME, or --url ADDRESS of an archive with the model folder" ;;
esac

base="$MODEL_DIR/gemma3-270m"
aside="$MODEL_DIR/.gemma3-270m.part"

ask() {
    cat << TERMS
Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms
By using, copying, modifying or distributing Gemma, or a model derived from it, you agree to these terms and to the
Gemma Prohibited Use Policy: https://ai.google.dev/gemma/prohibited_use_policy
If you distribute Gemma, or a model tuned or merged from it, you must include these terms and state what was changed.
Read both pages first. This script downloads $from into $base.
TERMS
    local reply=""
    read -r -p "Do you accept these terms? Type yes to continue: " reply || true
    [ "$reply" = yes ] || fail "the terms were not accepted; nothing was downloaded"
}

fetch() {
    ask
    rm -rf "$aside" && mkdir -p "$aside"
    trap 'rm -rf "$aside"' EXIT
    "$PYTHON" - "$way" "$from" "$aside" << 'PYTHON' || exit 2
import shutil
import sys
import urllib.request
from pathlib import Path

way, source, aside = sys.argv[1], sys.argv[2], Path(sys.argv[3])
try:
    if way == "--hub":
        from huggingface_hub import snapshot_download

        snapshot_download(source, local_dir=aside / "model", allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"])
    else:
        archive = aside / (source.rstrip("/").rpartition("/")[2] or "archive")
        with urllib.request.urlopen(source, timeout=60) as response, archive.open("wb") as file:
            shutil.copyfileobj(response, file)
        shutil.unpack_archive(archive, aside / "unpacked", **({} if archive.suffix == ".zip" else {"filter": "data"}))
        found = [path.parent for path in (aside / "unpacked").rglob("config.json")]
        if len(found) != 1:
            raise ValueError(f"holds {len(found)} model folders, not one")
        found[0].rename(aside / "model")
    if '"gemma3' not in (aside / "model" / "config.json").read_text("utf-8"):
        raise ValueError("its config.json is not that of a Gemma 3 model")
except Exception as error:
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    fix = "accept the terms on the model's page and log in first" if way == "--hub" else "give the address of such an archive"
    print(f"get-gemma3-270m: error: {source}: {cause}; {fix}", file=sys.stderr)
    sys.exit(2)
PYTHON
    rm -rf "$aside/model/.cache"
    mv "$aside/model" "$base"
    echo "$base: ready; train it as scripts/run-0-smollm2-135m-1.sh does, with --base_model $base"
}

SKIP_DONE=1 make "$base" fetch
