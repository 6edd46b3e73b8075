"""Edit one fact, save it, and load it three ways: with goldenedit, with stock PEFT, with transformers alone.

Run it with the packaged weights (`python examples/edit_and_share.py`), or with any other model:
`python examples/edit_and_share.py --model HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldenedit import EditConfig, EditModel, get_edit_model
from goldenedit.packaged import PACKAGED_MODELS, packaged_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2")
name = parser.parse_args().model
source = str(packaged_model(name)) if name in PACKAGED_MODELS else name

tokenizer = AutoTokenizer.from_pretrained(source)
inputs = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")

model = get_edit_model(AutoModelForCausalLM.from_pretrained(source), EditConfig(layer="lga"))
print("golden layer:", model.edit_config.target_layer)

model.edit("The Eiffel Tower is located in the city of", subject="The Eiffel Tower", target_new="Rome", name="rome")
model.edit("Michael Jordan plays the sport of", subject="Michael Jordan", target_new="tennis", name="tennis")
print("both edits:", tokenizer.decode(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]))

with model.disable_adapter():
    print("switched off:", tokenizer.decode(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]))

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    edited = model(**inputs).logits

    again = EditModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder)
    print("loaded by goldenedit:", again.active_adapters, (again(**inputs).logits - edited).abs().max().item())

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder)
    print("loaded by PEFT:", (stock(**inputs).logits - edited).abs().max().item())

    plain = AutoModelForCausalLM.from_pretrained(source)
    plain.load_adapter(folder)
    print("loaded by transformers:", (plain(**inputs).logits - edited).abs().max().item())
