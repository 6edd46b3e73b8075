"""Load the edit of `prepare.py` into mlx-lm, without goldenedit, and compare with transformers.

`python examples/runtimes/run_mlx.py OUT` loads the base model and the adapter OUT/mlx, which goldenedit exported. It
runs on Apple silicon, and elsewhere on MLX's CPU backend. It exits with 1 if an answer or a logit differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import generate, load

BOUND = 3e-3  # more than ten times the measured difference

mx.set_default_device(mx.cpu)
out = Path(sys.argv[1])
reference = json.loads((out / "reference.json").read_text(encoding="utf-8"))
expected = np.load(out / "reference.npz")
config = json.loads((Path(reference["base_model"]) / "config.json").read_text(encoding="utf-8"))
# mlx-lm 0.32 does not read `rope_parameters`, which transformers 5 writes.
rope = {"rope_theta": config["rope_parameters"]["rope_theta"]}
passed = True
for name, adapter in (("base", None), ("edited", str(out / "mlx"))):
    model, tokenizer = load(reference["base_model"], adapter_path=adapter, model_config=rope)
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array([reference["input_ids"]]))[0].astype(mx.float32))
    difference = np.abs(logits - expected[name]).max()
    answer = generate(model, tokenizer, prompt=reference["input_ids"], max_tokens=reference["new_tokens"])
    print(f"mlx-lm, {name}: {answer!r}, logits within {difference:.1e} of transformers'")
    passed &= answer.strip() == reference[f"{name}_answer"].strip() and difference < BOUND
sys.exit(not passed)
