"""What a causal LM must show to be called supported: each property measured, on a tiny random model of its class."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldenedit import EditConfig, EditModel, EditRequest
from goldenedit.architecture import Architecture, read_architecture
from goldenedit.architecture.experts import expert_matrices, fused_parameter, is_fused
from goldenedit.architecture.hooks import recording
from goldenedit.editing.prepared import prepare_facts
from goldenedit.editing.values import Values
from goldenedit.layer_selection import lga_scores
from goldenedit.lm.tokens import encode
from zoo import TARGET_MODULES, zoo_model

FACTS = [
    EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    EditRequest("The mother tongue of {} is", "Angela Merkel", "the language of Cambodia", "German"),
]
HALF = (torch.bfloat16, torch.float16)
ROUNDINGS = 4  # of sum, adapter and wanted value, each to half precision
OUTCOMES = ("works", "works with a setting", "cannot")
TOLERANCE = 1e-3  # of the largest value compared: float32 through random layers, whose weights are large


@dataclass
class Conformance:
    """What was measured on one class; errors are relative to the largest value compared.

    Attributes:
        layers: Decoder layers.
        editable: Those with a down projection that was found.
        modules: Its path, with `{}` for the layer.
        lga: Largest difference of LGA's scores from those of plain weight gradients.
        replay: How the model is run again from the edited layer on: `packed`, `suffix`, `layers` or `whole`.
        target: Difference of `W' k` from `v*` at the subject's last token.
        written: Difference of the edited logits from those with the change in the weights.
        loaded: Difference of the logits after stock PEFT loaded the saved edit.
        disabled: Difference of the logits with the edit switched off from those before.
        changed: Difference that the edit makes.
        half: By dtype, the largest difference of `W' k` from `v*` of an edit in half precision, in roundings of the
            largest value.
    """

    layers: int = 0
    editable: int = 0
    modules: str = ""
    lga: float = float("nan")
    replay: str = ""
    target: float = float("nan")
    written: float = float("nan")
    loaded: float = float("nan")
    disabled: float = float("nan")
    changed: float = float("nan")
    half: dict[str, float] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Return the names of the properties that do not hold."""
        errors = [name for name in ("lga", "target", "written", "loaded") if not getattr(self, name) <= TOLERANCE]
        if self.disabled != 0:
            errors.append("disabled")
        if not self.changed > 10 * TOLERANCE:
            errors.append("changed")
        return errors + [dtype for dtype, roundings in self.half.items() if not roundings <= ROUNDINGS]


def conform(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target_modules: str | None = None
) -> Conformance:
    """Measure all properties on one model, of an edit of a layer in the middle: the last reaches no later token.

    Args:
        target_modules: The maps to edit where they cannot be found, as `EditConfig` has it.
    """
    found = Conformance()
    config = _config(model, target_modules)
    edited = EditModel(model, config, tokenizer)
    architecture = edited.architecture
    found.layers, found.editable = architecture.num_layers, len(architecture.down_projections)
    found.modules = module_pattern(architecture)
    found.lga = _difference(lga_scores(edited.lm, FACTS), gradient_scores(model, architecture, tokenizer, FACTS))
    ids = torch.tensor([encode(tokenizer, FACTS[0].text).input_ids])
    before = _logits(model, ids)
    original = copy.deepcopy(model)
    values = _values(edited, config)
    found.replay = values.replay
    edit = edited.edit(FACTS[0])

    after = _logits(edited, ids)
    found.changed = _difference(after, before)
    with edited.disable_adapter():
        found.disabled = (_logits(edited, ids) - before).abs().max().item()
    found.target = _target_error(edited, values.delta[0, 0], ids)
    with tempfile.TemporaryDirectory() as folder:
        edited.save_pretrained(folder)
        found.loaded = _difference(_logits(PeftModel.from_pretrained(copy.deepcopy(original), folder), ids), after)
    with torch.no_grad():
        for path, delta in edit.deltas.items():
            if delta.experts > 1:
                weight, change = expert_matrices(original, path), delta.dense().unflatten(1, (delta.experts, -1))
                weight += change.transpose(0, 1)
            else:
                weight, module = original.get_submodule(path).weight, original.get_submodule(path)
                weight += delta.dense().T if type(module).__name__ == "Conv1D" else delta.dense()
    found.written = _difference(_logits(original, ids), after)
    return found


def _config(model: PreTrainedModel, target_modules: str | None) -> EditConfig:
    layers = read_architecture(model, target_modules).down_projections
    return EditConfig(
        "r-rome",  # with an anchor, so that the key of the bare prompt is mapped to its value exactly
        layer=list(layers)[(len(layers) - 1) // 2],
        target_modules=target_modules,
        contexts=3,
        context_length=4,
        steps=4,
        clamp=20.0,
        stop_loss=1e-6,
        covariance_tokens=100,
        phrasings="none",
        kept_questions=0,
        optimizer="adam",
        lr=0.5,
        flat_directions=False,
    )


def _values(edited: EditModel, config: EditConfig) -> Values:
    """Return the values that an edit of the first fact inserts."""
    statistics = edited.lm.statistics(config, config.target_layers)
    return prepare_facts(edited.lm, FACTS[:1], config, edited.lm.contexts(config), True, statistics).values


def half_precision(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, target_modules: str | None = None
) -> float:
    """Return by how many roundings of the largest value an edit in half precision misses its value.

    Infinity where it does not switch off exactly, NaN where something is not finite.
    """
    model = copy.deepcopy(model).to(dtype)
    config = _config(model, target_modules)
    edited = EditModel(model, config, tokenizer)
    ids = torch.tensor([encode(tokenizer, FACTS[0].text).input_ids])
    before = _logits(model, ids)
    values = _values(edited, config)
    edited.edit(FACTS[0])
    with edited.disable_adapter():
        if not torch.equal(_logits(edited, ids), before):
            return float("inf")
    after, plain = _at_subject(edited, ids)
    missed = (after.float() - plain.float() - values.delta[0, 0]).abs().max()
    largest = torch.stack([after, plain]).float().abs().max()
    finite = _logits(edited, ids).isfinite() == before.isfinite()  # some mask logits by infinity
    return (missed / (torch.finfo(dtype).eps * largest)).item() if finite.all() else float("nan")


@dataclass
class Verdict:
    """What became of one class.

    Attributes:
        model_type: Its name in transformers' mapping.
        outcome: `works`, `works with a setting`, or `cannot`.
        reason: The setting, or why it cannot.
        found: What was measured, where it came so far.
    """

    model_type: str
    outcome: str
    reason: str = ""
    found: Conformance = field(default_factory=Conformance)


def examine(model_type: str, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """Measure one class of the causal LM mapping."""
    setting = TARGET_MODULES.get(model_type)
    try:
        torch.manual_seed(0)
        found = conform(zoo_model(model_type), tokenizer, setting)
    except Exception as error:  # whatever a class raises is its reason
        return Verdict(model_type, "cannot", " ".join(str(error).split()).split(". ")[0])
    for dtype in HALF:
        torch.manual_seed(0)
        model = zoo_model(model_type).to(dtype)
        try:
            _logits(model, torch.arange(3, 11)[None])
        except RuntimeError:  # the class itself does not run in it on this processor: nothing to measure
            continue
        name = str(dtype).removeprefix("torch.")
        try:
            found.half[name] = half_precision(model, tokenizer, dtype, setting)
        except Exception as error:
            found.half[name] = float("nan")
            return Verdict(model_type, "cannot", f"{name}: {' '.join(str(error).split())}", found)
    if failures := found.failures():
        return Verdict(model_type, "cannot", f"does not hold: {', '.join(failures)}", found)
    if setting is not None:
        return Verdict(model_type, "works with a setting", f"target_modules={setting!r}", found)
    return Verdict(model_type, "works", found=found)


def module_pattern(architecture: Architecture) -> str:
    """Return the paths of the down projections, with `{}` for the layer and `|` between different ones."""
    paths = {
        path.replace(f"{architecture.layers}.{index}.", f"{architecture.layers}.{{}}.", 1): None
        for index, path in architecture.down_projections.items()
    }
    return " | ".join(paths)


def gradient_scores(
    model: nn.Module, architecture: Architecture, tokenizer: PreTrainedTokenizerBase, facts: list[EditRequest]
) -> Tensor:
    """LGA as defined: one backward a text through all weights of the MLPs, one dot product a layer."""
    layers = [index for index, paths in architecture.mlp_linears.items() for _ in paths]
    weights = [
        fused_parameter(model, path) if is_fused(model, path) else model.get_submodule(path).weight
        for paths in architecture.mlp_linears.values()
        for path in paths
    ]
    scores = torch.full((architecture.num_layers,), torch.nan, dtype=torch.float64)
    scores[layers] = 0.0
    for fact in facts:
        dots = [
            (old.double() * new.double()).sum()
            for old, new in zip(
                _gradients(model, weights, tokenizer, fact.text, str(fact.target_true)),
                _gradients(model, weights, tokenizer, fact.text, fact.target_new),
                strict=True,
            )
        ]
        for layer, dot in zip(layers, dots, strict=True):
            scores[layer] += dot
    return scores


def _gradients(
    model: nn.Module, weights: list[Tensor], tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[Tensor, ...]:
    ids = torch.tensor([encode(tokenizer, prompt, answer).input_ids])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    return torch.autograd.grad(loss, weights)


def _target_error(edited: EditModel, wanted: Tensor, ids: Tensor) -> float:
    """Return by how much the edited map misses the value that was found, at the subject of the bare prompt."""
    after, plain = _at_subject(edited, ids)
    return _difference(after - plain, wanted)


def _at_subject(edited: EditModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the edited map says at the subject of the bare prompt, with the edit and without."""
    (layer,) = edited.edit_config.target_layers
    subject = encode(edited.tokenizer, FACTS[0].text, None, FACTS[0].subject_end).subject
    outputs = []
    for _ in range(2):
        with recording({"map": edited.architecture.down_projection(edited.get_base_model(), layer)}) as record:
            _logits(edited, ids)
        outputs.append(record.outputs["map"].view(len(ids[0]), -1)[subject])
        edited.set_adapter([])
    edited.set_adapter("edit_1")
    return outputs[0], outputs[1]


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value expected; NaN must be where it is expected."""
    if not torch.equal(found.isnan(), expected.isnan()):
        return float("nan")
    return ((found - expected).nan_to_num().abs().max() / expected.nan_to_num().abs().max()).item()
