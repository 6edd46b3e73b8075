"""Load the edit of `prepare.py` into vLLM, without goldenedit, and compare with transformers.

`python examples/runtimes/run_vllm.py OUT` exits with 1 if an answer or a log-probability differs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is a share of all memory
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

BOUND = 1e-3  # more than ten times the measured difference


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def main(out: Path) -> bool:
    """Return whether the base model and the edit reproduce the results of `prepare.py`."""
    reference = json.loads((out / "reference.json").read_text(encoding="utf-8"))
    expected = np.load(out / "reference.npz")
    llm = LLM(
        reference["base_model"],
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,  # 1, 8, 16, 32, 64, 128, 256, 320 or 512: at least the `r` of adapter_config.json
        max_logprobs=-1,
    )
    prompt = TokensPrompt(prompt_token_ids=reference["input_ids"])
    greedy = SamplingParams(temperature=0, max_tokens=reference["new_tokens"], logprobs=-1)  # -1: of all tokens
    passed = True
    for name, adapter in (("base", None), ("edited", LoRARequest("edit", 1, str(out / "edit")))):
        answer = llm.generate(prompt, greedy, lora_request=adapter, use_tqdm=False)[0].outputs[0]
        reference_logprobs = log_softmax(expected[name][-1])
        logprobs = {token: entry.logprob for token, entry in answer.logprobs[0].items()}
        difference = max(abs(logprob - reference_logprobs[token]) for token, logprob in logprobs.items())
        print(f"vLLM, {name}: {answer.text!r}, log-probabilities within {difference:.1e} of transformers'")
        passed &= answer.text == reference[f"{name}_answer"] and difference < BOUND
    return passed


if __name__ == "__main__":  # vLLM spawns its worker, which imports this file again
    sys.exit(not main(Path(sys.argv[1])))
