#!/usr/bin/env bash
# Create .venv with the tested versions (constraints.txt) of the toolkit's dependencies. "dev" adds those of its tests;
# "newest" installs the newest versions in the ranges of requirements.txt. Does nothing if they are installed.
# "--offline FILE" installs everything, including the demo base model, from a bundle made by scripts/offline_bundle.sh.
source "$(dirname "$0")/env.sh"

versions=(-c "$ROOT/constraints.txt")
files=(requirements.txt)
bundle=""
while [ $# -gt 0 ]; do
    word="$1" && shift
    case "$word" in
        --offline)
            bundle="${1:-}"
            [ -f "$bundle" ] || { echo "setup: error: --offline ${bundle:-(nothing)}: no such file; name what offline_bundle.sh made" >&2 && exit 2; }
            shift
            ;;
        dev) files+=(requirements-dev.txt) ;;
        newest) versions=(--upgrade --upgrade-strategy eager) ;;
        *) echo "setup: error: $word: unknown; bash scripts/setup.sh [dev] [newest] [--offline FILE]" >&2 && exit 2 ;;
    esac
done

pip_install() {
    "$ROOT/.venv/bin/pip" install --quiet --disable-pip-version-check "${versions[@]}" "$@"
}

install() { # install REQUIREMENTS: unless exactly these versions are already installed
    local done_mark wanted
    done_mark="$ROOT/.venv/.$(basename "$1").installed"
    wanted="$(printf '%s\n' "${versions[*]}" && cat "$1" "$ROOT/constraints.txt")"
    if [ "$wanted" = "$(cat "$done_mark" 2> /dev/null)" ]; then return; fi
    echo "set-up: installing $(basename "$1") into .venv (a few minutes, once)"
    pip_install -r "$1"
    printf '%s\n' "$wanted" > "$done_mark"
}

torch_for_cpu() { # without an NVIDIA GPU, the build of torch without CUDA: from PyTorch's own index, else from pip's
    local index=()
    if answers "$TORCH_FOR_CPU/torch/"; then index=(--extra-index-url "$TORCH_FOR_CPU"); fi
    echo "set-up: no NVIDIA GPU; installing torch for CPUs from ${index[1]:-the package index of pip}"
    pip_install ${index[@]+"${index[@]}"} "$(grep '^torch[>=]' "$ROOT/requirements.txt")"
}

unpack() { # unpack BUNDLE: into a temporary folder, checking every file's hash; pip then uses only this folder
    unpacked="$(mktemp -d)"
    trap 'rm -rf "$unpacked"' EXIT
    if ! tar -xf "$1" -C "$unpacked" --no-same-owner || ! (cd "$unpacked" && sha256sum --check --strict --quiet SHA256SUMS) >&2; then
        echo "setup: error: $1: is cut off or damaged, or was not made by offline_bundle.sh; download it again" >&2
        exit 2
    fi
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$unpacked/wheels" PIP_CONFIG_FILE=/dev/null
    unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL
    local model
    for model in "$unpacked"/models/*/; do
        [ -d "$model" ] && [ ! -e "$MODEL_DIR/$(basename "$model")" ] || continue
        mkdir -p "$MODEL_DIR"
        mv "$model" "$MODEL_DIR/"
        echo "set-up: $MODEL_DIR/$(basename "$model") is there"
    done
}

[ -z "$bundle" ] || unpack "$bundle"
[ -x "$ROOT/.venv/bin/python" ] || python3 -m venv "$ROOT/.venv"
if [ -z "$bundle" ] && ! command -v nvidia-smi > /dev/null && ! "$ROOT/.venv/bin/python" -c "import torch" 2> /dev/null; then
    torch_for_cpu
fi
for file in "${files[@]}"; do
    install "$ROOT/$file"
done
