#!/usr/bin/env bash
# Pack everything for a machine without network into one file: wheels for a given platform, the demo base model and this
# repository, with the hash of each file. There: tar -xf FILE dreamergpt; bash dreamergpt/scripts/setup.sh --offline FILE
source "$(dirname "$0")/env.sh"

usage="bash scripts/offline_bundle.sh FILE.tar [--platform linux-x86_64|linux-aarch64] [--python 3.11] [--torch cpu|cuda] [--dev] [--no-model]"
target="" platform="linux-x86_64" version="3.11" torch="cpu" model="smollm2-135m" files=(requirements.txt)

refuse() {
    echo "offline_bundle: error: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    word="$1" && shift
    case "$word" in
        --platform | --python | --torch)
            [ $# -gt 0 ] || refuse "$word: has no value; $usage"
            case "$word" in --platform) platform="$1" ;; --python) version="$1" ;; --torch) torch="$1" ;; esac
            shift
            ;;
        --dev) files+=(requirements-dev.txt) ;;
        --no-model) model="" ;;
        -*) refuse "$word: no such option; $usage" ;;
        *) [ -z "$target" ] || refuse "$word: only one file can be written; $usage" && target="$word" ;;
    esac
done
[ -n "$target" ] || refuse "no output file given; $usage"
[[ "$platform" =~ ^linux-(x86_64|aarch64)$ ]] || refuse "--platform $platform: not linux-x86_64 or linux-aarch64; choose one"
[[ "$version" =~ ^3\.[0-9]+$ ]] || refuse "--python $version: not a version such as 3.11"
[[ "$torch" =~ ^(cpu|cuda)$ ]] || refuse "--torch $torch: not cpu or cuda; choose one"
[ ! -e "$target" ] || refuse "$target: exists already; name another file, or remove it"
[ -d "$(dirname "$target")" ] && [ -w "$(dirname "$target")" ] || refuse "$(dirname "$target"): is not a folder to write to"
[ -z "$model" ] || [ -f "$MODEL_DIR/$model/config.json" ] ||
    refuse "$MODEL_DIR/$model: is missing; bash scripts/get-smollm2-135m.sh makes it, or give --no-model"
git -C "$ROOT" rev-parse --quiet --verify HEAD > /dev/null || refuse "$ROOT: is not a git repository; clone it with git"

aside="$(mktemp -d "$(dirname "$target")/.offline_bundle.XXXXXX")"
trap 'rm -rf "$aside"' EXIT
machine="${platform#linux-}"
wanted=(--only-binary :all: --implementation cp --python-version "$version")
for tag in manylinux_2_39 manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 \
    manylinux2010 manylinux_2_5 manylinux1 linux; do
    wanted+=(--platform "${tag}_$machine")
done
if [ "$torch" = cpu ] && answers "$TORCH_FOR_CPU/torch/"; then wanted+=(--extra-index-url "$TORCH_FOR_CPU"); fi
requirements=()
for file in "${files[@]}"; do requirements+=(-r "$ROOT/$file"); done
[ "$torch" = cuda ] || grep '^torch==' "$ROOT/constraints.txt" | sed 's/$/+cpu/' > "$aside/torch.txt"
[ "$torch" = cuda ] || requirements+=(-r "$aside/torch.txt")

echo "offline_bundle: downloading wheels for $platform, Python $version, torch for $torch"
"$PYTHON" -m pip download --quiet --disable-pip-version-check --dest "$aside/wheels" -c "$ROOT/constraints.txt" \
    "${wanted[@]}" "${requirements[@]}"
rm -f "$aside/torch.txt"
git -C "$ROOT" archive --prefix dreamergpt/ HEAD | tar -x -C "$aside"
[ -z "$model" ] || { mkdir "$aside/models" && cp -rL "$MODEL_DIR/$model" "$aside/models/"; }
(cd "$aside" && find dreamergpt wheels models -type f -print0 2> /dev/null | sort -z | xargs -0 sha256sum > SHA256SUMS)
tar -cf "$aside/bundle.tar" -C "$aside" --owner 0 --group 0 --sort name SHA256SUMS dreamergpt wheels ${model:+models}
mv "$aside/bundle.tar" "$target"
echo "$target: $(find "$aside/wheels" -name '*.whl' | wc -l) wheels${model:+, the base model $model}, and the repository; $(du -h "$target" | cut -f1)"
sha256sum "$target"
