"""EditModel: a causal LM with edits, each of them an adapter of a stock PeftModel, under PEFT's verbs."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from goldenedit.adapters import Adapters, is_conv1d, plain
from goldenedit.architecture import Architecture, read_architecture
from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.cache import cache_key
from goldenedit.config import EditConfig
from goldenedit.cost import phase
from goldenedit.editing.edit import Changes, check_editable, prepare_facts
from goldenedit.editing.learn import learn_facts
from goldenedit.editors import LowRankDelta
from goldenedit.evaluation.evaluate import Evaluation, measure, observe_with_and_without
from goldenedit.evaluation.likelihood import Likelihood, likelihoods
from goldenedit.layer_selection import LayerSelection, proxy_hash, proxy_set, select_layer
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.perplexity import perplexity, sample_texts
from goldenedit.lm.tokens import encode_request
from goldenedit.requests import EditRequest, Facts, Message, as_requests, distinct
from goldenedit.sharing import SharingMixin
from goldenedit.storage.checkpoint import golden_metadata
from goldenedit.storage.fingerprint import weight_hashes
from goldenedit.storage.folder import (
    BaseModel,
    Edit,
    EditedFact,
    check_edit_name,
    joined,
    joined_state,
)
from goldenedit.storage.hub import cached_commit
from goldenedit.storing import StoringMixin
from goldenedit.versions import library_versions

logger = logging.getLogger(__name__)

_TOLD = 5  # doubts about subjects that one batch logs

# Verbs of PEFT and transformers that would leave an EditModel unaware of what is on, with what to call instead.
_REFUSED = {
    "merge_adapter": "merge_and_unload()",
    "unmerge_adapter": "merge_and_unload(), which is for good",
    "add_adapter": "edit(), or load_adapter()",
    "inject_adapter": "edit(), or load_adapter()",
    "set_requires_grad": "requires_grad_() on the model that was wrapped",
    "enable_adapters": "enable_adapter_layers()",
    "disable_adapters": "disable_adapter_layers(), or `with disable_adapter():`",
    "enable_peft_hotswap": "load_adapter() and set_adapter()",
    "create_or_update_model_card": "save_pretrained(), which writes a card",
}


def get_edit_model(
    model: PreTrainedModel | PeftModel,
    edit_config: EditConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EditModel:
    """Wrap a causal LM for editing, and find the layer to edit.

    Args:
        model: A causal LM of transformers, or a PeftModel around one: LoRA adapters that are active in it are a part of
            the model that is edited, and stay yours. Edits are put beside the weights, which are never written.
        edit_config: How to edit; LGA's golden layer and R-ROME by default. The model keeps a copy, `model.edit_config`;
            `target_layer` and `layer_scores` are filled in on both.
        tokenizer: Its tokenizer; by default the one at `model.name_or_path`.

    Raises:
        ValueError: The model's layers or tokenizer cannot be found, or the config does not fit the model.

    Example:
        ```python
        >>> from transformers import AutoModelForCausalLM
        >>> from goldenedit import EditConfig, get_edit_model
        >>> base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_edit_model(base, EditConfig(layer="lga"))
        >>> model.edit("The Eiffel Tower is located in the city of", subject="The Eiffel Tower", target_new="Rome")
        ```
    """
    edit_model = EditModel(model, edit_config or EditConfig(), tokenizer)
    edit_model.select_layer()
    if edit_config is not None:
        edit_config.target_layer = edit_model.edit_config.target_layer
        edit_config.layer_scores = edit_model.edit_config.layer_scores
    return edit_model


class EditModel(nn.Module, StoringMixin, SharingMixin):
    """A causal LM with edits that switch on and off, stack, fuse, merge, save and load.

    Each call of `edit` adds one adapter to a stock `PeftModel`, with PEFT's verbs for all that adapters do. `forward`
    and `generate` go straight through, and so does every attribute of the model.

    Attributes:
        edit_config: How the next edits are made: a copy of the config that was given, filled in.
        architecture: Where the model keeps its layers.
        adapters: The edits as adapters in the model.
        lm: The model as editing sees it, with what is found of it once.
        edits: The edits by name, in the order they were made.
        layer_selection: What the layer selector found, and its cost; None before it ran.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        edit_config: EditConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        model = extract_model_from_parallel(model, keep_torch_compile=False)  # edits go into what was compiled
        if not isinstance(model, PreTrainedModel | PeftModel):
            raise TypeError(f"Expected a causal LM of transformers, got {type(model).__name__}.")
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise ValueError(
                "The model was loaded inside torch.inference_mode(), and no gradient passes through such weights: load "
                "it outside. All methods of an EditModel may be called inside."
            )
        self.adapters = Adapters(model)
        base = self.adapters.base
        self.edit_config = copy.deepcopy(edit_config)
        self.tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(base)
        with plain(base):
            self.architecture: Architecture = read_architecture(base, edit_config.target_modules)
            self.base_info = BaseModel(
                name_or_path=base.name_or_path or type(base).__name__,
                revision=cached_commit(str(base.name_or_path)),
                architecture=type(base).__name__,
                **vars(weight_hashes(base)),
            )
        for layer in edit_config.target_layers:
            self.architecture.check_layer(layer)
        # Fused experts are named as parameters: where some layers have them, edits of all layers are, to go together.
        self.adapters.by_parameter = bool(self.architecture.experts)
        self.adapters.base_name = self.base_info.name_or_path
        self.edits: dict[str, Edit] = {}
        self.model: PreTrainedModel | PeftModel = self.adapters.model
        self._see_model()
        self.layer_selection: LayerSelection | None = None
        self._proxy_hash: str | None = None
        self._evaluations: dict[tuple[str, ...], dict[str, Any]] = {}  # by the names of the edits that were on
        self._switched_off: list[str] | None = None  # edits that were on before disable_adapter_layers()

    def _see_model(self) -> None:
        """Have `lm` speak of the model as it is: the weights, and the user's adapters that are on."""
        beside = "".join(entry.hash for entry in self.adapters.beside())
        if "lm" not in self.__dict__ or self.lm.beside != beside or self.lm.weights != self.base_info:
            base = self.adapters.base
            self.lm: LanguageModel = LanguageModel(base, self.tokenizer, self.architecture, self.base_info, beside)

    # ------------------------------------------------------------------ editing

    @outside_inference_mode()
    def select_layer(self) -> int | list[int]:
        """Run the config's layer selector, and fill `edit_config.target_layer` and `.layer_scores`."""
        self._see_model()
        with self.disable_adapter():
            if len(self.architecture.experts) == len(self.architecture.down_projections):  # whatever is chosen
                check_editable(self.lm, self.edit_config, list(self.architecture.experts)[:1])
            with phase("layer selection"):
                self.layer_selection = select_layer(self.lm, self.edit_config)
        if self.edit_config.is_scored:
            self._proxy_hash = proxy_hash(proxy_set(self.edit_config))
        layers = self.edit_config.target_layers
        return layers[0] if len(layers) == 1 else layers

    @outside_inference_mode()
    def edit(
        self,
        prompt: str | Facts | None = None,
        subject: str | None = None,
        target_new: str | None = None,
        target_true: str | None = None,
        name: str | None = None,
        messages: Sequence[Message] | None = None,
    ) -> Edit:
        """Change one fact, or a batch of facts, and switch the edit on beside those that are active.

        Either all requests are served or nothing changes: what cannot be done raises first.

        Args:
            prompt: The text before the answer, with `subject` and `target_new`; or a request, or a list of requests,
                of which those that ask for the same answer to the same prompt are edited once. A request may be a
                dict, see `EditRequest.from_dict`.
            subject: The entity the fact is about, as spelled in the prompt.
            target_new: The new answer.
            target_true: The old answer, where known.
            name: Name of the edit and its adapter; `"edit_1"`, `"edit_2"`, ... by default.
            messages: In a prompt's stead, the conversation that a chat model answers with `target_new`.

        Returns:
            The edit, with the probability of each new answer before and after.

        Raises:
            ValueError: A request is bad, two contradict each other, the name is taken, or the optimization fails.
        """
        asked = _as_requests(prompt, subject, target_new, target_true, messages)
        _tell_doubts(asked)
        name = self._new_name(name)
        self._see_model()
        requests = [rendered(self.tokenizer, request) for request in asked]
        for request in requests:  # what cannot be tokenized is told before anything takes time
            encode_request(self.tokenizer, request, request.target_new, max_length=self.lm.max_length)
        if not self.edit_config.target_layers:
            self.select_layer()
        for layer in self.edit_config.target_layers:  # which may be set by now
            self.architecture.check_layer(layer)
        self.adapters.ensure()
        changes = self._changes(requests)
        config = copy.deepcopy(self.edit_config)
        contexts = self.contexts_hash(config) if config.editor.learns == "values" else None
        with self._adding({name: changes.deltas}):
            with phase("check"):
                after = likelihoods(self.lm, [(request.text, request.target_new) for request in requests])
            for request, likelihood in zip(requests, after, strict=True):
                if not math.isfinite(likelihood.nll):
                    raise ValueError(f"The edit of {request.subject!r} makes the model's answers not finite.")
            self._check_perplexity(name)
            facts = _edited_facts(asked, changes, after)
            self.edits[name] = Edit(
                name,
                facts,
                changes.deltas,
                layers=tuple(config.target_layers),
                fan_in_fan_out=is_conv1d(self.adapters.base, changes.deltas),
                by_parameter=self.adapters.targets_parameters(name),
                state=changes.state,
                relative_error=changes.relative_error,
                contexts_hash=contexts,
                configs=(config,),
                versions=library_versions(),
                beside=tuple(self.adapters.beside()),
            )
        _tell_what_did_not_take(facts, config)
        return self.edits[name]

    def _changes(self, requests: Sequence[EditRequest]) -> Changes:
        """Find the change of weights that serves the requests; what the active edits remember is minded."""
        config = self.edit_config
        check_editable(self.lm, config, config.target_layers)  # what cannot be done is told before it takes time
        remembered = joined_state(self.edits[name] for name in self.active_adapters)
        if config.editor.learns != "values":
            with phase("training"):
                return learn_facts(self.lm, requests, config, remembered)
        with self.disable_adapter():
            # In this order: processes share the statistics, and would wait for one that failed before it came there.
            statistics = self.lm.statistics(config, config.target_layers)
            contexts = self.lm.contexts(config)
        prepared = prepare_facts(self.lm, requests, config, contexts)
        for request, delta, steps in zip(requests, prepared.values.delta, prepared.values.steps, strict=True):
            if steps and not delta.any():
                logger.warning(
                    "Nothing that layer %s says at the subject %r reaches the answer, so the edit changes nothing: no "
                    "later layer attends to it. Edit an earlier layer (EditConfig.layer).",
                    config.target_layers,
                    request.subject,
                )
        with phase("solve"):
            return prepared.changes(config, statistics, remembered)

    def contexts_hash(self, config: EditConfig) -> str:
        """Return a short name for the prefixes that this model samples by a config."""
        with self.disable_adapter():
            return cache_key(contexts=self.lm.contexts(config))

    def _check_perplexity(self, name: str) -> None:
        """Raise ValueError where the active edits harm plain text more than the config allows."""
        most = self.edit_config.max_perplexity_ratio
        if most is None:
            return
        with self.disable_adapter():
            before = self.lm.perplexity()
        after = perplexity(self.lm, sample_texts())
        if not after <= most * before:
            raise ValueError(
                f"With edit {name!r} perplexity on plain statements is {after:.2f}, against {before:.2f} of the base "
                f"model: more than EditConfig.max_perplexity_ratio={most} allows, so the edit was undone."
            )

    @outside_inference_mode()
    def evaluate(
        self,
        requests: Facts | None = None,
        generation: bool = False,
        neighbors: int | None = None,
    ) -> Evaluation:
        """Measure the active edits beside the base model, in every family of scores that the facts have prompts for.

        What was measured last goes into the model card when these edits are saved.

        Args:
            requests: The facts, as `edit` takes them; by default those of the active edits.
            generation: Let both models write freely as well, which takes longer.
            neighbors: Use the first so many neighborhood prompts of each fact; None for all.

        Raises:
            ValueError: There are no facts, or one cannot be tokenized.
        """
        own = requests is None
        if requests is None:
            requests = [fact.request for name in self.active_adapters for fact in self._edit(name).facts]
        facts = [rendered(self.tokenizer, request) for request in as_requests(requests)]
        if not facts:
            raise ValueError("There are no facts to evaluate: make an edit first, or pass requests.")
        where = self.architecture
        paths = [path for name in self.active_adapters for path in self._edit(name).deltas]
        first = min(map(where.layer_of, paths), default=where.num_layers - 1)
        self.adapters.ensure()
        with phase("evaluation"):
            edited, before = observe_with_and_without(
                self.lm, facts, first, self.disable_adapter, generation, neighbors
            )
        evaluation = Evaluation(measure(facts, edited, before, neighbors), measure(facts, before, before, neighbors))
        figures = {"own_facts": own, "facts": len(facts), **evaluation.to_dict()}
        self._evaluations[tuple(self.active_adapters)] = figures
        return evaluation

    # ------------------------------------------------------------------ adapters, as PEFT has them

    @property
    def active_adapters(self) -> list[str]:
        """Names of the edits that are switched on, in the order they are applied."""
        return list(self.adapters.active)

    @property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's config of each edit, and of the adapters that are not edits."""
        return self.adapters.configs

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Switch on exactly these edits: one name, or a list whose edits are stacked.

        Adapters that are no edits stay switched on or off as they are, unless some of them are named.

        Raises:
            ValueError: There is no edit of that name.
        """
        self._switched_off = None
        self.adapters.activate([adapter_name] if isinstance(adapter_name, str) else adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an edit, or a plain adapter that was loaded; the others stay as they are, switched on or off.

        Raises:
            ValueError: There is no edit of that name.
        """
        if adapter_name not in self.adapters.loaded:
            self.adapters.check([adapter_name])
        self.adapters.remove(adapter_name)
        self.model = self.adapters.model
        self.edits.pop(adapter_name, None)
        self._evaluations = {
            names: evaluation for names, evaluation in self._evaluations.items() if adapter_name not in names
        }

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch all edits off inside this context: the logits are exactly those of the model that was wrapped."""
        with self.adapters.disabled():
            yield

    def disable_adapter_layers(self) -> None:
        """Switch all edits off until `enable_adapter_layers`; an edit that is made meanwhile is on."""
        self._switched_off = [*(self._switched_off or []), *self.active_adapters]
        self.adapters.activate([])

    def enable_adapter_layers(self) -> None:
        """Switch the edits on again that `disable_adapter_layers` switched off."""
        names = [name for name in self._switched_off or [] if name in self.edits]
        self.adapters.activate([*names, *(name for name in self.active_adapters if name not in names)])
        self._switched_off = None

    @outside_inference_mode()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **kwargs: Any,
    ) -> None:
        """Combine edits into a new one, which is not switched on.

        `"cat"` is their exact sum, as long as its rank pays: above `d_in d_out / (d_in + d_out)`, and above the 512
        that vLLM takes, the smallest singular values are left out, a warning says so, and the new edit's
        `relative_error` has what it costs. All other types, and further arguments, are PEFT's.

        Raises:
            ValueError: There is no edit of a name, or the new name is taken.
            TypeError: `"cat"` is given further arguments.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"add_weighted_adapter needs one weight for each edit, got {adapters} and {weights}.")
        parts = [self._edit(name) for name in adapters]
        self._new_name(adapter_name)
        is_sum = combination_type == "cat"
        if is_sum and kwargs:
            raise TypeError(f"add_weighted_adapter() with 'cat' takes no {sorted(kwargs)}.")
        edit, cut = joined(adapter_name, parts, weights, reduce=is_sum)
        if is_sum:
            if cut > 0:
                logger.warning(
                    "Edit %r is cut to rank %d, the largest that pays, with a relative error of %.1e: the edits it is "
                    "made of are exact, stacked or merged.",
                    adapter_name,
                    edit.rank,
                    cut,
                )
            with self._adding({adapter_name: edit.deltas}, on=False):
                self.edits[adapter_name] = edit
            return
        if any(delta.experts > 1 for part in parts for delta in part.deltas.values()):
            raise ValueError(
                f"Edits of fused experts are no matrices that PEFT combines by {combination_type!r}: use 'cat'."
            )
        self.adapters.combine(adapters, weights, adapter_name, combination_type, **kwargs)
        error = max(part.relative_error for part in parts)
        self.edits[adapter_name] = replace(edit, deltas=self.adapters.read(adapter_name), relative_error=error)

    @outside_inference_mode()
    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False) -> PreTrainedModel:
        """Write the active edits, and the user's active adapters, into the weights and return the plain model.

        Sums are taken in full precision, rounded once and checked to be finite, so that `push_merged_to_hub` writes the
        same weights; both arguments are PEFT's, and change nothing. The model's config says which layers were edited,
        `golden_layers`, and by whom. This wrapper then has no edits, and sequential editors have forgotten them.

        Raises:
            ValueError: An edited weight is quantized, a sum is not finite, or another EditModel has edits of this
                model; nothing has changed.
        """
        metadata = golden_metadata(self._content(self.active_adapters)) if self.active_adapters else {}
        merged = self.adapters.merge()
        self.model = merged
        self.edits, self._evaluations = {}, {}
        self.layer_selection = self._proxy_hash = None  # what was found is of other weights
        merged.config.update(metadata)
        if metadata:
            self.base_info = replace(self.base_info, revision=None, **vars(weight_hashes(merged)))
        self._see_model()
        return merged

    def unload(self) -> PreTrainedModel | PeftModel:
        """Drop all edits and return the model that was wrapped, as it was."""
        self.adapters.clear()
        self.model = self.adapters.model
        self.edits, self._evaluations, self._switched_off = {}, {}, None
        return self.model

    def get_base_model(self) -> PreTrainedModel:
        """Return the transformers model under the edits, with the active ones in effect."""
        self.adapters.ensure()
        return self.adapters.base

    # ------------------------------------------------------------------ in and out

    @contextmanager
    def _adding(self, edits: Mapping[str, Mapping[str, LowRankDelta]], on: bool = True) -> Iterator[None]:
        """Add adapters; an error or an interrupt inside takes them and their edits away again."""
        try:
            with self.adapters.adding(edits, on):
                self.model = self.adapters.model
                yield
        except BaseException:
            self.edits = {name: edit for name, edit in self.edits.items() if name not in edits}
            self.model = self.adapters.model
            raise

    def _edit(self, name: str) -> Edit:
        self.adapters.check([name])
        return self.edits[name]

    def _new_name(self, name: str | None) -> str:
        if name is None:
            number = 1
            while f"edit_{number}" in self.peft_config:
                number += 1
            return f"edit_{number}"
        check_edit_name(name)
        if name in self.peft_config:
            raise ValueError(
                f"There is an edit {name!r} already: choose another name, or delete_adapter({name!r}) first."
            )
        return name

    # ------------------------------------------------------------------ the model, straight through

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the active edits."""
        self.adapters.ensure()
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the active edits."""
        self.adapters.ensure()
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "adapters", "lm"):  # not set yet
                raise
            if name in _REFUSED:
                raise AttributeError(f"An EditModel has no {name}(): use {_REFUSED[name]}.") from None
            return getattr(self.model, name)


def _edited_facts(asked: Sequence[EditRequest], changes: Changes, after: Sequence[Likelihood]) -> list[EditedFact]:
    return [
        EditedFact(request, before, math.exp(-likelihood.nll), steps)
        for request, before, likelihood, steps in zip(
            asked, changes.probability_before, after, changes.steps, strict=True
        )
    ]


def _tell_what_did_not_take(facts: Sequence[EditedFact], config: EditConfig) -> None:
    """Warn of facts whose new answer the edited model still finds unlikely."""
    for fact in facts:
        if not fact.takes:
            logger.warning(
                "The edit of %r does not take: the probability of %r after %r went from %.4f to %.4f. Try another "
                "layer (this was %s; EditConfig.layer), more steps (EditConfig.steps), or another editor "
                "(EditConfig.method).",
                fact.request.subject,
                fact.request.target_new,
                fact.request.shown,
                fact.probability_before,
                fact.probability_after,
                config.target_layers,
            )


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    try:
        if not model.name_or_path:
            raise OSError("the model has no name_or_path")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.name_or_path)
        return tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer was found for {model.name_or_path or 'this model'!r} ({error}): pass tokenizer=."
        ) from error


def _as_requests(
    prompt: str | Facts | None,
    subject: str | None,
    target_new: str | None,
    target_true: str | None,
    messages: Sequence[Message] | None,
) -> list[EditRequest]:
    """Return the requests of a call of `edit`."""
    if (prompt is None) == (messages is None):
        raise ValueError("edit() takes a prompt, requests or messages, and one of them.")
    if prompt is None or isinstance(prompt, str):
        if subject is None or target_new is None:
            given = "messages" if prompt is None else "a prompt"
            raise ValueError(f"edit() with {given} needs subject= and target_new=.")
        return [EditRequest(prompt, subject, target_new, target_true, messages=messages)]
    if subject is not None or target_new is not None or target_true is not None:
        raise ValueError("edit() with requests takes no subject, target_new or target_true: they are in the requests.")
    requests = distinct(as_requests(prompt))
    if not requests:
        raise ValueError("edit() needs at least one request.")
    return requests


def _tell_doubts(requests: Sequence[EditRequest]) -> None:
    """Say of which subjects another place may be meant; of a large batch, of the first few."""
    doubts = [doubt for request in requests if (doubt := request.doubt) is not None]
    for doubt in doubts[:_TOLD]:
        logger.warning("%s", doubt)
    if more := len(doubts[_TOLD:]):
        logger.warning("The places of the subjects of %d more requests are in doubt (EditRequest.doubt).", more)
