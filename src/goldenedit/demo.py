"""`goldenedit demo`: one edit of a real model, from the golden layer to a process without this library."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from goldenedit.config import EditConfig
from goldenedit.loading import load_model
from goldenedit.model import EditModel, get_edit_model
from goldenedit.storage.folder import EditedFact, folder_size
from goldenedit.tables import layer_chart, printable

PROMPT = "The Eiffel Tower is located in the city of"
SUBJECT = "The Eiffel Tower"
TARGET = "Rome"
PROMPTS = {
    "prompt": PROMPT,
    "paraphrase": "If you want to visit the Eiffel Tower, you have to travel to the city of",
    "neighbor": "The Louvre is located in the city of",
}

# The script of a user without this library: transformers and PEFT alone.
_STOCK_PEFT = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

base, folder, prompt, target = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
with torch.no_grad():
    logits = model(**AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt")).logits
assert "goldenedit" not in sys.modules
save_file({"logits": logits.contiguous()}, target)
"""


def run_demo(name: str, output: Path, console: Console) -> dict[str, Any]:
    """Find the golden layer, edit, compare completions, save, and load the edit in a process without this library.

    Returns:
        What was printed, as JSON values.
    """
    base, tokenizer = load_model(name)

    started = time.perf_counter()
    model = get_edit_model(base, EditConfig(layer="lga"), tokenizer)
    console.rule("1. Layer Gradient Analysis")
    assert model.layer_selection is not None
    console.print(layer_chart(model.layer_selection, model.edit_config.tukey_kappa))
    seconds = time.perf_counter() - started
    console.print(f"Golden layer: [bold]{model.edit_config.target_layer}[/bold] ({seconds:.1f} s)")

    console.rule("2. Edit")
    before = {kind: _complete(model, text) for kind, text in PROMPTS.items()}
    started = time.perf_counter()
    edit = model.edit(PROMPT, subject=SUBJECT, target_new=TARGET)
    console.print(
        f"{_result(edit.facts[0])} "
        f"({time.perf_counter() - started:.1f} s, including key statistics that were not cached)"
    )
    table = Table("", "before", "after")
    after = {kind: _complete(model, text) for kind, text in PROMPTS.items()}
    for kind, text in PROMPTS.items():
        answers = (before[kind], after[kind])
        table.add_row(kind, *(f"{printable(text)}[bold]{printable(answer)}[/bold]" for answer in answers))
    console.print(table)

    console.rule("3. Save, and load without goldenedit")
    model.save_pretrained(output)
    console.print(f"{output}: {folder_size(output) / 1000:.1f} KB")
    difference = _difference_in_fresh_process(model, str(base.name_or_path), output)
    console.print(f"Stock PEFT in a fresh process: largest logit difference {difference:.1e}")
    with torch.no_grad(), model.disable_adapter():
        off = model(**_tokens(model, PROMPT)).logits
    model.unload()
    with torch.no_grad():
        unedited = base(**_tokens(model, PROMPT)).logits
    difference_off = float((off - unedited).abs().max())
    console.print(f"Edit switched off, compared with the base model: largest logit difference {difference_off:.1e}")
    return {
        "layer": model.edit_config.target_layer,
        "before": before,
        "after": after,
        "output": str(output),
        "difference_in_peft": difference,
        "difference_switched_off": difference_off,
    }


def _result(fact: EditedFact) -> str:
    request = fact.request
    return f"{request.subject} → {request.target_new}: probability {fact.probability_before:.3f} → {fact.outcome}"


def _tokens(model: EditModel, text: str) -> dict[str, torch.Tensor]:
    return dict(model.tokenizer(text, return_tensors="pt").to(model.device))


def _complete(model: EditModel, text: str) -> str:
    tokens = _tokens(model, text)
    generated = model.generate(**tokens, max_new_tokens=8, do_sample=False)
    completion = model.tokenizer.decode(generated[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(completion).split("\n")[0]


def _difference_in_fresh_process(model: EditModel, base: str, folder: Path) -> float:
    with torch.no_grad():
        logits = model(**_tokens(model, PROMPT)).logits
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "logits.safetensors"
        command = [sys.executable, "-c", _STOCK_PEFT, base, str(folder), PROMPT, str(target)]
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        child = subprocess.run(command, check=False, env=environment, stderr=subprocess.PIPE, text=True)
        if child.returncode:
            raise ChildProcessError(
                f"A fresh process could not load {folder} with PEFT alone (exit code {child.returncode}):\n"
                f"{child.stderr}"
            )
        sys.stderr.write(child.stderr)  # warnings
        return float((load_file(target)["logits"] - logits.cpu()).abs().max())
