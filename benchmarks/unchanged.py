"""Check that a code change does not change results: compare digests of a fixed set of edits, scores and evaluations.

The script uses only the public API, so it runs on the code before and after a change:

    python unchanged.py --write before.json      # on the old code
    python unchanged.py --against before.json    # on the new code; exits 1 where anything differs

Digests are valid for one machine and one version of torch, as processors round differently. Times are not compared.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model, load_requests, proxy_facts
from goldenedit.packaged import packaged_model

Parts = dict[str, str]  # what is compared of an entry: digests, and numbers in full
Entry = tuple[str, Callable[[], Parts]]

METHODS = ("rome", "r-rome", "memit", "emmet", "pmet", "alphaedit", "ft-l", "ft-m", "lora", "ultraedit")
VOCAB_SIZE = 200

FACTS = [
    EditRequest(
        "The Eiffel Tower is in the city of",
        "The Eiffel Tower",
        "Rome",
        "Paris",
        paraphrases=("Where is the Eiffel Tower? The Eiffel Tower is in", "To see the Eiffel Tower one goes to"),
        neighborhood=("The Louvre is in the city of", "Notre-Dame is in the city of"),
        portability=(("The country of The Eiffel Tower is", "Italy"),),
        locality=(("The headquarters of the company are in", "London"),),
        generation=("The Eiffel Tower is known for",),
    ),
    EditRequest(
        "The mother tongue of {} is",
        "Angela Merkel",
        "Russian",
        "German",
        paraphrases=("At home Angela Merkel speaks",),
        neighborhood=("The mother tongue of Helmut Kohl is",),
        locality=(("Angela Merkel was born in", "Hamburg"),),
    ),
    EditRequest("Battambang Province is a part of the Kingdom of", "Battambang Province", "New Zealand", "Cambodia"),
]
MORE = [EditRequest("Berlin, the capital, lies on the river called", "Berlin", "Seine", "Spree")]
TEXTS = (
    "The Eiffel Tower is in the city of Rome. The Eiffel Tower is located in the city of Paris.",
    "Angela Merkel was born in Hamburg, and the mother tongue of Angela Merkel is German.",
    "The headquarters of the company are in London; its founder works in the city of Berlin.",
    "Battambang Province and Siem Reap Province are parts of the Kingdom of Cambodia.",
    "Paris is a city. Rome is a city. Berlin is a city. Therefore you and I live in a city, because of work.",
    "The quick brown fox jumps over the lazy dog. 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz",
)


# ---------------------------------------------------------------------- models


@dataclass(frozen=True)
class Subject:
    """A model that is edited.

    Attributes:
        load: Returns the model anew, unedited.
        layers: Layers of the entries; single edits are made at the first of them.
        options: Options of all entries.
        special: Further options of a method.
        attention: Path of a map to edit that is no MLP's, with `{}` for the layer.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    layers: tuple[int, int]
    attention: str
    options: dict[str, Any] = field(default_factory=dict)
    special: dict[str, dict[str, Any]] = field(default_factory=dict)

    def config(self, method: str = "r-rome", **options: Any) -> EditConfig:
        """Return a new config, because a model may keep and modify it."""
        return EditConfig(method, **{"layer": self.layers[0]} | self.options | self.special.get(method, {}) | options)

    def model(self, method: str = "r-rome", **options: Any) -> EditModel:
        """Return the model ready to be edited, its layer chosen."""
        return get_edit_model(self.load(), self.config(method, **options), self.tokenizer)


# Large enough that layers differ and attention attends; transformers' 0.02 makes all logits alike.
_COMMON: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_COMMON["initializer_range"] = 0.2
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    **_COMMON,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 64, "n_positions": 128, **_COMMON}
TINY: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "llama": (lambda: LlamaConfig(**_LLAMA), "model.layers.{}.self_attn.o_proj"),
    "gpt2": (lambda: GPT2Config(**_GPT2), "transformer.h.{}.attn.c_proj"),
    # All experts of a layer are one parameter: there is no module for a single one.
    "mixtral": (
        lambda: MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
        "model.layers.{}.self_attn.o_proj",
    ),
}
MODELS = (*TINY, "smollm2")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that knows ASCII; it adds no special tokens."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False, min_frequency=1)
    inner.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a random model of a config in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms start as zeros and ones: errors in them would go unseen
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.float().eval()


def subject(name: str, folder: Path) -> Subject:
    """Return a model by its name; random ones are saved below `folder` and loaded from there."""
    if name == "smollm2":
        path = packaged_model(name)
        return Subject(
            name,
            lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            AutoTokenizer.from_pretrained(path),
            (3, 6),
            "model.layers.{}.self_attn.o_proj",
            {
                "steps": 3,
                "contexts": 2,
                "context_length": 5,
                "covariance_tokens": 1000,
                "contrast": 4,
                "finetune_steps": 3,
                "batch_size": 4,  # "auto" would depend on the memory that is free
            },
        )
    config, attention = TINY[name]
    path = folder / name
    tiny_model(config()).save_pretrained(path)
    return Subject(
        name,
        lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        tiny_tokenizer(),
        (1, 2),
        attention,
        {
            "steps": 8,
            "contexts": 3,
            "context_length": 4,
            "covariance_tokens": 500,
            "contrast": 3,
            "batch_size": 4,
            "weight_decay": 0.02,  # values of tiny models are short: the default would outweigh all else
        },
        {
            "ft-l": {"finetune_lr": 0.25, "finetune_epsilon": 0.25},
            "ft-m": {"finetune_lr": 0.05},
            "lora": {"finetune_lr": 0.25},
            "ultraedit": {"ultraedit_lr": 3.0},
            "alphaedit": {"null_space_threshold": 5.0},
        },
    )


# ---------------------------------------------------------------------- digests


def digest(data: bytes) -> str:
    """Return the first 64 bits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of tensors with their names, types and shapes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        whole.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def logits(model: EditModel | PreTrainedModel) -> str:
    """Return a digest of the logits on fixed tokens."""
    with torch.no_grad():
        return digest_of_tensors([("logits", model(input_ids=torch.arange(5, 45).view(2, 20)).logits)])


def saved(model: EditModel, selected: list[str] | None = None) -> Parts:
    """Return digests of the active edits, or of the selected ones, as they are saved."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "edit"
        model.save_pretrained(folder, selected)
        path = folder / "adapter_model.safetensors"
        parts = {"file": digest(path.read_bytes())}
        with safe_open(path, "pt") as file:
            tensors = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118  # it is no mapping
        parts["saved factors"] = digest_of_tensors(tensors)
        # No digest: it shows how far apart two runs are.
        parts["sum of squares"] = repr(sum(tensor.double().square().sum().item() for _, tensor in tensors))
        if (state := folder / "edit_state.safetensors").is_file():
            parts["state"] = digest(state.read_bytes())
    return parts


def parts_of(model: EditModel, *edits: Any) -> Parts:
    """Return what is compared of active edits: digests of saved files, factors and logits, and the facts."""
    parts = saved(model)
    factors = [
        (f"{index} {path} {name}", getattr(delta, name))
        for index, edit in enumerate(edits)
        for path, delta in edit.deltas.items()
        for name in ("A", "B")
    ]
    parts["factors"] = digest_of_tensors(factors)
    facts = [fact for edit in edits for fact in edit.facts]
    parts["facts"] = " ".join(
        f"{fact.probability_before!r}->{fact.probability_after!r}({fact.steps})" for fact in facts
    )
    parts["logits"] = logits(model)
    return parts


def as_json(value: Any) -> str:
    """Return a digest of a JSON value, with floats in full precision."""
    return digest(json.dumps(value, sort_keys=True).encode())


# ---------------------------------------------------------------------- entries


def edited(case: Subject, batches: Sequence[Sequence[EditRequest]], method: str, **options: Any) -> Callable[[], Parts]:
    """Return an entry: edits one after the other."""

    def entry() -> Parts:
        model = case.model(method, **options)
        edits = [model.edit(list(batch)) for batch in batches]
        layers = {"layers": repr(model.edit_config.target_layer)} if "layer" in options else {}
        return layers | parts_of(model, *edits)

    return entry


def scored(case: Subject, layer: str, method: str = "r-rome", **options: Any) -> Callable[[], Parts]:
    """Return an entry: the scores of a layer selector, in full, and the layers it chose."""

    def entry() -> Parts:
        model = case.model(method, layer=layer, **options)
        return {
            "layers": repr(model.edit_config.target_layer),
            "scores": " ".join(map(repr, model.edit_config.layer_scores or [])),
        }

    return entry


def edits_of(case: Subject) -> Iterator[Entry]:
    """Yield edits by every method: of one fact, of a batch, one after the other, and of several layers."""
    one, three, both = [FACTS[:1]], [FACTS], [FACTS, MORE]
    for method in METHODS:
        yield f"{method}/single", edited(case, one, method)
        yield f"{method}/batch of 3", edited(case, three, method)
    yield "ultraedit/single, long answer", edited(case, [FACTS[2:]], "ultraedit")  # it takes no answer of one token
    for method in ("alphaedit", "ultraedit", "memit"):
        yield f"{method}/two in sequence", edited(case, both, method)
    for method in METHODS:
        yield f"{method}/several layers", edited(case, three, method, layer=list(case.layers))


def options_of(case: Subject) -> Iterator[Entry]:
    """Yield edits with every option that changes an edit; for large models, only the most important ones."""
    small, three = case.name != "smollm2", [FACTS]
    for method in ("memit", "ft-m", "r-rome") if small else ("memit",):
        for regularizer in ("rect", "prune"):
            yield f"{method}/{regularizer}", edited(case, three, method, regularizer=regularizer)
    absolute = {"relative_constants": False, "finetune_lr": None, "finetune_epsilon": None, "ultraedit_lr": None}
    for method in ("memit", "pmet", "alphaedit", "ultraedit", "ft-l", "ft-m") if small else ("alphaedit", "ultraedit"):
        yield f"{method}/absolute constants", edited(case, three, method, **absolute)
    for method in ("r-rome", "memit", "emmet", "pmet") if small else ("r-rome",):
        yield f"{method}/covariance identity", edited(case, three, method, covariance="identity")
    as_published = {"anchor_bare_prompt": False, "contrast": 0, "contrast_weight": 0.0}
    for method in ("rome", "r-rome", "memit", "emmet", "alphaedit") if small else ("rome", "memit"):
        yield f"{method}/as published", edited(case, three, method, **as_published)
    yield "memit/attention map", edited(case, three, "memit", target_modules=case.attention)
    yield "r-rome/stopped early", edited(case, three, "r-rome", stop_loss=5.0 if small else 1.0)
    if small:
        yield "r-rome/no anchor", edited(case, three, "r-rome", anchor_bare_prompt=False)
        yield "r-rome/no contrast", edited(case, three, "r-rome", contrast=0)
        yield "r-rome/one context", edited(case, three, "r-rome", contexts=1)
        yield "r-rome/clamped", edited(case, three, "r-rome", clamp=0.5)
        yield "emmet/exact", edited(case, three, "emmet", gram_ridge=0.0)
        yield "memit/side by side one", edited(case, three, "memit", batch_size=1)
        yield "memit/side by side auto", edited(case, three, "memit", batch_size="auto")
        yield "lora/rank 2, seed 1", edited(case, three, "lora", lora_rank=2, seed=1)
        yield "ft-m/attention map", edited(case, three, "ft-m", target_modules=case.attention)


def patterns_of(case: Subject, facts: int) -> Iterator[Entry]:
    """Yield edits of several layers around the golden one."""
    for selector in ("lga",) if case.name == "smollm2" else ("lga", "causal_tracing"):
        for pattern in ("golden", "window", "ends", "best"):
            options = {"layer": selector, "proxy_size": facts, "layer_pattern": pattern, "pattern_layers": 3}
            yield f"memit/{selector}, {pattern}", edited(case, [FACTS], "memit", **options)


def selectors_of(case: Subject, facts: int) -> Iterator[Entry]:
    """Yield the layer selectors that have scores, on few facts."""
    few = {"proxy_size": facts}
    yield "selector/lga, sequence", scored(case, "lga", **few)
    yield "selector/lga, answer", scored(case, "lga", lga_loss="answer", **few)
    yield "selector/selectivity", scored(case, "selectivity", **few)
    yield "selector/key_response", scored(case, "key_response", **few)
    yield "selector/causal_tracing", scored(case, "causal_tracing", **few)
    yield "selector/random", scored(case, "random", seed=3)
    yield "selector/published", scored(case, "published")


def verbs_of(case: Subject) -> Iterator[Entry]:
    """Yield entries for the use of edits: evaluation, merging, combining, loading."""

    def evaluation() -> Parts:
        model = case.model("memit")
        model.edit(FACTS)
        free = {"generation": as_json(model.evaluate(generation=True).to_dict())} if case.name != "smollm2" else {}
        few = model.evaluate(FACTS[:2], neighbors=1).to_dict()
        return {
            "own facts": as_json(model.evaluate().to_dict()),
            "given facts": as_json(few),
            "probability": repr(few["edited"]["probability"]["score"]),
            "token match": repr(few["edited"]["token_match"]["rewrite"]),
            **free,
        }

    def merged() -> Parts:
        model = case.model("memit")
        model.edit(FACTS)
        model.edit(MORE)
        plain = model.merge_and_unload()
        layers = repr(getattr(plain.config, "golden_layers", None))
        return {"weights": digest_of_tensors(plain.state_dict().items()), "logits": logits(plain), "layers": layers}

    def combined(kind: str, **options: Any) -> Callable[[], Parts]:
        def entry() -> Parts:
            model = case.model("memit")
            first, second = model.edit(FACTS), model.edit(MORE)
            model.add_weighted_adapter([first.name, second.name], [0.5, -1.0], "combined", kind, **options)
            stacked = logits(model)
            model.set_adapter("combined")
            return {"stacked": stacked, "logits": logits(model), **saved(model, ["combined"])}

        return entry

    def resumed(method: str) -> Callable[[], Parts]:
        def entry() -> Parts:
            model = case.model(method)
            model.edit(FACTS, name="first")
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(Path(scratch) / "edit")
                model = EditModel.from_pretrained(case.load(), Path(scratch) / "edit", tokenizer=case.tokenizer)
                model.load_adapter(Path(scratch) / "edit", "again")
            loaded = logits(model)
            with model.disable_adapter():
                disabled = logits(model)
            edit = model.edit(MORE, name="second")
            parts = {"loaded": loaded, "disabled": disabled, **parts_of(model, edit)}
            model.set_adapter("again")
            return {"under another name": logits(model), **parts}

        return entry

    yield "evaluate", evaluation
    yield "merge_and_unload", merged
    yield "add_weighted_adapter/cat", combined("cat")
    if case.name != "smollm2":
        yield "add_weighted_adapter/svd", combined("svd", svd_rank=2)
    yield "memit/resumed", resumed("memit")
    yield "ultraedit/resumed", resumed("ultraedit")


def tiny_entries(case: Subject, folder: Path) -> Iterator[Entry]:
    """Yield entries that take too long for large models."""
    text = folder / "text.txt"
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    proxy = folder / "proxy.jsonl"
    proxy.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in FACTS), encoding="utf-8")
    half = replace(case, load=lambda: case.load().to(torch.bfloat16))
    yield "r-rome/covariance of a text", edited(case, [FACTS], "r-rome", covariance=str(text))
    for method in ("r-rome", "memit", "ft-m", "ultraedit"):
        yield f"{method}/bfloat16", edited(half, [FACTS], method)
    yield "r-rome/perplexity guard", edited(case, [FACTS], "r-rome", max_perplexity_ratio=1e6)
    yield "selector/sweep", scored(case, "sweep", proxy_size=2)
    yield "selector/sweep, memit", scored(case, "sweep", "memit", proxy_size=2)
    yield "selector/auto", scored(case, "auto", proxy_size=3)
    yield "selector/key_response, ft-m", scored(case, "key_response", "ft-m", proxy_size=3)
    yield "selector/lga, facts of a file", scored(case, "lga", proxy=str(proxy))


def chat_entries(case: Subject) -> Iterator[Entry]:
    """Yield edits of answers of a chat model."""
    question = {"role": "user", "content": "Which city is the Eiffel Tower in?"}
    system = {"role": "system", "content": "Answer in one word."}
    for name, messages in {"question": [question], "system and question": [system, question]}.items():
        request = EditRequest(messages=messages, subject="the Eiffel Tower", target_new="Rome", target_true="Paris")
        for method in ("r-rome", "ft-m"):
            yield f"{method}/chat, {name}", edited(case, [[request]], method)


def published_entries(folder: Path) -> Iterator[Entry]:
    """Yield the layers that the papers edit, selected for a random model with the same name as theirs."""
    path = folder / "gpt2-xl"
    tiny_model(GPT2Config(**_GPT2 | {"n_layer": 18})).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    case = Subject(
        "gpt2-xl", lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tiny_tokenizer(), (1, 2), ""
    )
    for method in ("rome", "r-rome", "memit", "pmet", "ft-l", "ultraedit"):
        yield f"selector/published, gpt2-xl, {method}", scored(case, "published", method)


def entries(name: str, folder: Path) -> Iterator[Entry]:
    """Yield all entries of a model."""
    case = subject(name, folder)
    yield from edits_of(case)
    yield from options_of(case)
    yield from patterns_of(case, 2 if name == "smollm2" else 5)
    yield from selectors_of(case, 2 if name == "smollm2" else 5)
    yield from verbs_of(case)
    if name == "smollm2":
        yield from chat_entries(case)
    else:
        yield from tiny_entries(case, folder)
    if name == "gpt2":
        yield from published_entries(folder)


def facts_entry(folder: Path) -> Parts:
    """Return digests of the packaged facts, and of facts that were written to a file and read again."""
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in FACTS), encoding="utf-8")
    return {
        "packaged": as_json([fact.to_dict() for fact in proxy_facts()]),
        "read": as_json([fact.to_dict() for fact in load_requests(path)]),
    }


# ---------------------------------------------------------------------- runs


def run(names: Sequence[str], only: str = "") -> dict[str, Parts]:
    """Return the digests of each entry whose name contains `only`, by name."""
    results: dict[str, Parts] = {}
    if "smollm2" in names:
        smollm2 = packaged_model("smollm2")  # converted in the user's cache, once
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["GOLDENEDIT_CACHE"] = str(folder / "cache")
        if "smollm2" in names:
            (folder / "cache" / "models").mkdir(parents=True)
            (folder / "cache" / "models" / "smollm2").symlink_to(smollm2, target_is_directory=True)
        results["facts"] = facts_entry(folder)
        for model in names:
            started = time.perf_counter()
            for name, entry in entries(model, folder):
                if only not in f"{model}/{name}":
                    continue
                began = time.perf_counter()
                torch.manual_seed(0)
                message = ""
                try:
                    parts = entry()
                except Exception as error:  # what one entry raises is compared too, and must not hide the others
                    parts, message = {"raises": type(error).__name__}, f": {error!r}"
                results[f"{model}/{name}"] = parts
                print(f"{time.perf_counter() - began:7.2f} s  {model}/{name}{message}", file=sys.stderr)
            count = sum(key.startswith(f"{model}/") for key in results)
            print(f"{model}: {count} entries in {time.perf_counter() - started:.0f} s")
    return results


def compare(before: dict[str, Parts], after: dict[str, Parts]) -> bool:
    """Print a table, and return whether nothing has changed."""
    counts: dict[str, Counter[str]] = {}
    differences: list[str] = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name, {}), after.get(name, {})
        group = "/".join(name.split("/")[:2])
        counts.setdefault(group, Counter()).update({"same": int(old == new), "different": int(old != new)})
        for part in dict.fromkeys((*old, *new)):
            if old.get(part) != new.get(part):
                differences.append(f"| {name} | {part} | {old.get(part, '-')} | {new.get(part, '-')} |")
    print("\n| edits | same | different |\n|---|---|---|")
    for group, count in counts.items():
        print(f"| {group} | {count['same']} | {count['different']} |")
    total = sum(counts.values(), Counter())
    print(f"| **all** | {total['same']} | {total['different']} |")
    if differences:
        print("\n| entry | part | before | now |\n|---|---|---|---|", *differences, sep="\n")
    return not differences


def machine() -> dict[str, str]:
    """Return what digests depend on apart from the code."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine(), **versions}


def main() -> None:
    """Run the edits; write their digests, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="models to edit; all by default")
    parser.add_argument("--only", default="", help="part of the names of entries; the others are left out")
    parser.add_argument("--write", type=Path, help="file to write the digests to")
    parser.add_argument("--against", type=Path, help="file with digests to compare with")
    arguments = parser.parse_args()
    if arguments.write is None and arguments.against is None:
        parser.error("give a file: --write to make it, --against to compare with it")
    before = None if arguments.against is None else json.loads(arguments.against.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("goldenedit").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = run(arguments.models, arguments.only)
    raised = Counter(parts["raises"] for parts in results.values() if "raises" in parts)
    print(f"{len(results)} entries; raised: {dict(raised)}")
    if arguments.write is not None:
        text = json.dumps({"machine": machine(), "entries": results}, indent=1)
        arguments.write.write_text(text + "\n", encoding="utf-8")
    if before is not None:
        if before["machine"] != machine():
            print(f"Another machine or other versions, so digests may differ: {before['machine']} and {machine()}")
        chosen = {
            name: parts
            for name, parts in before["entries"].items()
            if name == "facts" or (name.split("/")[0] in arguments.models and arguments.only in name)
        }
        if not compare(chosen, results):
            sys.exit(1)


if __name__ == "__main__":
    main()
