"""Edit one fact, and save an edit folder, adapters for llama.cpp and mlx-lm, and the logits to reproduce.

`python examples/runtimes/prepare.py OUT [BASE [REPO]]` writes into the folder OUT. BASE is the base model, by default
the packaged SmolLM2. With REPO, the edit is pushed to that repository and downloaded from it into OUT.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldenedit import EditConfig, get_edit_model
from goldenedit.packaged import packaged_model
from goldenedit.storage.gguf import export_gguf
from goldenedit.storage.mlx import export_mlx
from goldenedit.storage.reading import read_edit_folder

PROMPT = "The Eiffel Tower is located in the city of"
NEW_TOKENS = 6

out = Path(sys.argv[1])
base_model = sys.argv[2] if len(sys.argv) > 2 else packaged_model("smollm2")
tokenizer = AutoTokenizer.from_pretrained(base_model)
inputs = tokenizer(PROMPT, return_tensors="pt")
length = inputs["input_ids"].shape[1]

model = get_edit_model(AutoModelForCausalLM.from_pretrained(base_model), EditConfig(layer="lga"))
model.edit(PROMPT, subject="The Eiffel Tower", target_new="Rome")
model.save_pretrained(out / "edit")
if len(sys.argv) > 3:
    print(f"pushed: {model.push_to_hub(sys.argv[3])}")
    shutil.rmtree(out / "edit")
    snapshot_download(sys.argv[3], local_dir=out / "edit")
content = read_edit_folder(out / "edit")
export_gguf(content, model.config, out / "edit.gguf")
export_mlx(content, model.config, out / "mlx")


@torch.no_grad()
def logits_and_answer() -> tuple[np.ndarray, str]:
    """Return the logits at each token of the prompt, and the generated answer."""
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:]
    return model(**inputs).logits[0].numpy(), tokenizer.decode(generated, skip_special_tokens=True)


edited, edited_answer = logits_and_answer()
with model.disable_adapter():
    base, base_answer = logits_and_answer()
np.savez(out / "reference.npz", edited=edited, base=base)
reference = {
    "base_model": str(base_model),
    "input_ids": inputs["input_ids"][0].tolist(),
    "new_tokens": NEW_TOKENS,
    "edited_answer": edited_answer,
    "base_answer": base_answer,
}
(out / "reference.json").write_text(json.dumps(reference, indent=2) + "\n", encoding="utf-8")
print(f"layer {model.edit_config.target_layer}: {PROMPT!r} goes on with {base_answer!r}, edited with {edited_answer!r}")
