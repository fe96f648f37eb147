#!/usr/bin/env bash
# Correctness and speed on one CUDA GPU, without network, in under 9 minutes:
#
#     benchmarks/gpu.sh [OPTIONS OF gpu.py]        prints tables, writes $OUT/gpu.json (OUT: . by default)
#
# Uses the python3 of the machine with its own torch (2.10 or newer). Missing packages may lie as wheels in .whl/,
# the vocabulary and HellaSwag in .cache/aymen-gpt (make both with benchmarks/gpu.sh --prepare, where there is a
# network), token shards for the last part in .shards/. All three are ignored by git.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1-}" = --prepare ]; then
    python=${PYTHON:-.venv/bin/python}
    $python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d .whl tiktoken==0.14.0 regex==2026.7.19 tqdm==4.70.1 safetensors==0.8.0 pyarrow==26.0.1
    AYMEN_GPT_CACHE=.cache/aymen-gpt $python -m aymen_gpt setup
    $python fineweb.py --source builtin --out .shards
    exit
fi

out=${OUT:-.}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if compgen -G ".whl/*.whl" >/dev/null; then
    packages=$(mktemp -d)
    for wheel in .whl/*.whl; do  # only what the machine lacks: its own packages fit its torch
        name=$(basename "$wheel" | cut -d- -f1)
        python3 -c "import $name" 2>/dev/null || pip_wheels+=("$wheel")
    done
    [ -z "${pip_wheels-}" ] || python3 -m pip install -q --no-index --no-deps --target "$packages" "${pip_wheels[@]}"
    PYTHONPATH=$PWD:$packages
fi
[ -d .cache/aymen-gpt ] && export AYMEN_GPT_CACHE=$PWD/.cache/aymen-gpt
[ -d .shards ] && set -- --data .shards "$@"
exec python3 benchmarks/gpu.py --json "$out/gpu.json" "$@"
