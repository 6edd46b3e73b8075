"""Load the edit of `prepare.py` into llama.cpp, without goldenedit, and compare with transformers.

`python examples/runtimes/run_llama_cpp.py OUT` takes the base model from OUT/base.gguf. The adapters are
OUT/edit.gguf, written by goldenedit, and OUT/converted.gguf, which llama.cpp's converter made from the edit folder.
It exits with 1 if an answer or a logit differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

BOUND = 1e-3  # more than ten times the measured difference

out = Path(sys.argv[1])
reference = json.loads((out / "reference.json").read_text(encoding="utf-8"))
expected = np.load(out / "reference.npz")
ids = reference["input_ids"]
passed = True
for name, adapter in (("base", None), ("edited", "edit.gguf"), ("edited", "converted.gguf")):
    llama = Llama(
        str(out / "base.gguf"),
        lora_path=adapter and str(out / adapter),
        n_ctx=256,
        logits_all=True,
        type_k=GGML_TYPE_F32,  # the default, half precision for keys and values, changes logits by 2e-2
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    llama.eval(ids)
    difference = np.abs(llama.scores[: len(ids)] - expected[name]).max()
    answer = llama.create_completion(ids, max_tokens=reference["new_tokens"], temperature=0)["choices"][0]["text"]
    print(f"llama.cpp, {adapter or 'base'}: {answer!r}, logits within {difference:.1e} of transformers'")
    passed &= answer == reference[f"{name}_answer"] and difference < BOUND
sys.exit(not passed)
