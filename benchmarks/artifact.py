"""The size of a saved edit, and how close the logits are to the edited model for every way to load it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import load, parser, record
from safetensors.torch import load_file

from goldenedit import EditConfig
from goldenedit.storage.folder import folder_size

PROMPT = "The Eiffel Tower is located in the city of"
STOCK = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

way, base, folder, prompt, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
if way == "peft":
    model = PeftModel.from_pretrained(model, folder)
else:
    model.load_adapter(folder)
with torch.no_grad():
    logits = model(**AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt")).logits
assert "goldenedit" not in sys.modules
save_file({"logits": logits.contiguous()}, target)
"""


def main() -> None:
    """Make one edit, save it, and load it with stock PEFT and transformers in separate processes."""
    arguments = parser(__doc__).parse_args()
    model = load(arguments.model, EditConfig())
    inputs = model.tokenizer(PROMPT, return_tensors="pt")

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    base = logits()
    fact = model.edit(PROMPT, subject="The Eiffel Tower", target_new="Rome").facts[0]
    edited = logits()
    with model.disable_adapter():
        rows = [{"way": "edit switched off, against the base", "largest logit difference": _largest(logits(), base)}]
    with tempfile.TemporaryDirectory() as scratch:
        folder, target = Path(scratch) / "edit", Path(scratch) / "logits.safetensors"
        model.save_pretrained(folder)
        size = folder_size(folder)
        for way in ("peft", "transformers"):
            command = [sys.executable, "-c", STOCK, way, model.base_info.name_or_path, str(folder), PROMPT, str(target)]
            subprocess.run(command, check=True)
            difference = _largest(load_file(target)["logits"], edited)
            rows.append({"way": f"stock {way} in a fresh process", "largest logit difference": difference})
    model.merge_and_unload()
    rows.append({"way": "merged into the weights", "largest logit difference": _largest(logits(), edited)})
    rows.append(
        {
            "model": arguments.model,
            "layer": model.edit_config.target_layer,
            "probability before": fact.probability_before,
            "probability after": fact.probability_after,
            "bytes of the folder": size,
            "largest logit": edited.abs().max().item(),
        }
    )
    print(*rows, sep="\n")
    record(f"artifact-{arguments.model}", rows)


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


if __name__ == "__main__":
    main()
