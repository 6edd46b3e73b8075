"""Push one edit to a Hub, load it in every program that loads adapters, and print each largest logit difference.

The Hub is the local one of the tests: `python examples/hub_roundtrip.py OUT`. vLLM and llama.cpp take part if the
variables VLLM and LLAMA_CPP name environments that have them, and if OUT has the files that `examples/runtimes/run.sh`
writes. hub_roundtrip.txt, beside this file, is the output.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from hub import TOKEN, Hub  # noqa: E402

BASE, EDIT = "tester/SmolLM2-135M-Instruct", "tester/eiffel-in-rome"
COMPARE = """
import json
import sys
import numpy as np
import torch

reference = json.load(open(sys.argv[1] + "/reference.json"))
with torch.no_grad():
    logits = model(input_ids=torch.tensor([reference["input_ids"]])).logits[0].numpy()
difference = np.abs(logits - np.load(sys.argv[1] + "/reference.npz")["edited"]).max()
print(f"largest logit difference {difference:.1e}")
sys.exit(int(difference > 1e-3))
"""
LOADERS = {
    "goldenedit": f"""
from goldenedit import EditModel
from transformers import AutoModelForCausalLM
model = EditModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{BASE}"), "{EDIT}")
""",
    "PEFT": f"""
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{EDIT}")
""",
    "transformers": f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{EDIT}")
""",
}
PUSH_BASE = f"""
from goldenedit.packaged import packaged_model
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(packaged_model("smollm2")).push_to_hub("{BASE}")
AutoTokenizer.from_pretrained(packaged_model("smollm2")).push_to_hub("{BASE}")
"""


def run(title: str, *command: str) -> None:
    """Run a program and print the last lines of its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{title}: {done.stdout}{done.stderr}")
    for line in done.stdout.splitlines()[-3 if title == "llama.cpp" else -2 if title in ("edit", "vLLM") else -1 :]:
        print(f"{title}: {line}", flush=True)


def main(out: str) -> None:
    """Push a base model and an edit, and load them in each program."""
    with Hub() as hub, tempfile.TemporaryDirectory() as cache:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": "1"}
        os.environ |= {**settings, "NO_PROXY": "127.0.0.1"}
        subprocess.run([sys.executable, "-c", PUSH_BASE], check=True, capture_output=True)
        print(f"base: pushed to {BASE}: {sorted(hub.repositories[BASE].files())}")
        run("edit", sys.executable, str(HERE / "runtimes" / "prepare.py"), out, BASE, EDIT)
        sizes = {name: len(data) for name, data in sorted(hub.repositories[EDIT].files().items())}
        print(f"{EDIT} has, in bytes: {sizes}")
        for name, code in LOADERS.items():
            check = "" if name == "goldenedit" else "\nassert 'goldenedit' not in sys.modules"
            run(name, sys.executable, "-c", code + "import sys" + check + COMPARE, out)
        gguf = str(Path(out) / "edit.gguf")
        run("goldenedit export", sys.executable, "-m", "goldenedit", "export", EDIT, "--gguf", gguf)
        for title, variable, script in (
            ("llama.cpp", "LLAMA_CPP", "run_llama_cpp.py"),
            ("vLLM", "VLLM", "run_vllm.py"),
        ):
            if environment := os.environ.get(variable):
                run(title, f"{environment}/bin/python", str(HERE / "runtimes" / script), out)


if __name__ == "__main__":
    main(sys.argv[1])
