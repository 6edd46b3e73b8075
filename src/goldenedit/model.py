"""EditModel: a causal LM with edits, each of them an adapter of a stock PeftModel, under PEFT's verbs."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from goldenedit import adapters as peft_adapters
from goldenedit.architecture import Architecture, read_architecture
from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.cache import cache_key
from goldenedit.chat import rendered
from goldenedit.config import SCORED_SELECTORS, TRAINED, EditConfig
from goldenedit.cost import phase
from goldenedit.editing.base_facts import BaseFacts
from goldenedit.editing.delta import LowRankDelta
from goldenedit.editing.edit import Changes, check_method, prepare_facts, train_facts
from goldenedit.editing.rows import context_length, encode_request
from goldenedit.evaluation.evaluate import Evaluation, measure, observe_with_and_without
from goldenedit.evaluation.likelihood import likelihoods
from goldenedit.evaluation.perplexity import perplexity, sample_texts
from goldenedit.layer_selection import LayerSelection, proxy_hash, proxy_set, select_layer
from goldenedit.requests import EditRequest, Facts, Message, as_requests, distinct
from goldenedit.sharing import SharingMixin, library_versions
from goldenedit.storage.card import render_card
from goldenedit.storage.checkpoint import golden_metadata
from goldenedit.storage.fingerprint import fingerprint
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    EDIT_CONFIG,
    BaseModel,
    Edit,
    EditedFact,
    EditFolder,
    adapter_key,
    check_edit_name,
    joined,
    joined_state,
    write_edit_folder,
)
from goldenedit.storage.hub import DownloadOptions, cached_commit, find_folder, is_on_hub
from goldenedit.storage.reading import read_edit_folder

logger = logging.getLogger(__name__)

_TOLD = 5  # doubts about subjects that one batch logs


def get_edit_model(
    model: PreTrainedModel,
    edit_config: EditConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EditModel:
    """Wrap a causal LM for editing, and find the layer to edit.

    Args:
        model: A causal LM of transformers. Edits are put beside its weights, which are never written.
        edit_config: How to edit; LGA's golden layer and R-ROME by default. The model keeps this object, and fills
            `target_layer` and `layer_scores` in.
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
    return edit_model


class EditModel(nn.Module, SharingMixin):
    """A causal LM with edits that switch on and off, stack, fuse, merge, save and load.

    Each call of `edit` adds one adapter to a stock `PeftModel`, with PEFT's verbs for all that adapters do. `forward`
    and `generate` go straight through, and so does every attribute of the model.

    Attributes:
        edit_config: The filled config.
        architecture: Where the model keeps its layers.
        edits: The edits by name, in the order they were made.
        layer_selection: What the layer selector found, and its cost; None before it ran.
        base_facts: What is known of the base model, found when it was first needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        edit_config: EditConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        model = extract_model_from_parallel(model, keep_torch_compile=False)  # edits go into what was compiled
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"Expected a causal LM of transformers, got {type(model).__name__}.")
        if peft_adapters.carries_adapters(model):
            raise ValueError(
                "The model already carries PEFT adapters: take them off (unload() of their wrapper), or write them "
                "into the weights first (merge_and_unload())."
            )
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise ValueError(
                "The model was loaded inside torch.inference_mode(), and no gradient passes through such weights: load "
                "it outside. All methods of an EditModel may be called inside."
            )
        self.edit_config = edit_config
        self.tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(model)
        self.architecture: Architecture = read_architecture(model, edit_config.target_modules)
        for layer in edit_config.target_layers:
            self.architecture.check_layer(layer)
        self.base_info = BaseModel(
            name_or_path=model.name_or_path or type(model).__name__,
            fingerprint=fingerprint(model),
            revision=cached_commit(str(model.name_or_path)),
            architecture=type(model).__name__,
        )
        self.edits: dict[str, Edit] = {}
        self.model: PreTrainedModel | PeftModel = model
        self.base_facts = BaseFacts(self.architecture, self.tokenizer, self.base_info.fingerprint)
        self.layer_selection: LayerSelection | None = None
        self._proxy_hash: str | None = None
        self._evaluations: dict[tuple[str, ...], dict[str, Any]] = {}  # by the names of the edits that were on
        self._loaded: tuple[list[str], dict[str, str]] | None = None  # edits of a folder, and what versions made them

    # ------------------------------------------------------------------ editing

    @outside_inference_mode()
    def select_layer(self) -> int | list[int]:
        """Run the config's layer selector, and fill `edit_config.target_layer` and `.layer_scores`."""
        with self.disable_adapter():
            base = self.get_base_model()
            if len(self.architecture.experts) == len(self.architecture.down_projections):  # whatever is chosen
                check_method(base, self.architecture, self.edit_config, list(self.architecture.experts)[:1])
            with phase("layer selection"):
                selection = select_layer(base, self.architecture, self.tokenizer, self.edit_config, self.base_facts)
        self.layer_selection = selection
        if self.edit_config.layer in SCORED_SELECTORS:
            self._proxy_hash = proxy_hash(proxy_set(self.edit_config))
        assert self.edit_config.target_layer is not None
        return self.edit_config.target_layer

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
            ValueError: A request is bad, two contradict each other, the name is taken, or the optimisation fails.
        """
        asked = _as_requests(prompt, subject, target_new, target_true, messages)
        _tell_doubts(asked)
        name = self._new_name(name)
        base = self.get_base_model()
        requests = [rendered(self.tokenizer, request) for request in asked]
        for request in requests:  # what cannot be tokenised is told before anything takes time
            encode_request(self.tokenizer, request, request.target_new, max_length=context_length(base.config))
        if not self.edit_config.target_layers:
            self.select_layer()
        made = self._changes(requests)
        active, config = self.active_adapters, copy.copy(self.edit_config)
        contexts = None if config.method in TRAINED else self.contexts_hash(config)
        try:
            self.model = self._with_adapter(name, made.deltas)
            self.set_adapter([*active, name])
            with phase("check"):
                after = likelihoods(base, self.tokenizer, [(request.text, request.target_new) for request in requests])
            for request, found in zip(requests, after, strict=True):
                if not math.isfinite(found.nll):
                    raise ValueError(f"The edit of {request.subject!r} makes the model's answers not finite.")
            self._check_perplexity(name)
        except BaseException:  # an interrupt too leaves the model as it was
            self.model = peft_adapters.remove(self.model, name)
            raise
        facts = [
            EditedFact(request, before, math.exp(-found.nll), steps)
            for request, before, found, steps in zip(asked, made.probability_before, after, made.steps, strict=True)
        ]
        how = peft_adapters.is_conv1d(self.model, made.deltas), peft_adapters.targets_parameters(self.model, name)
        self.edits[name] = Edit(name, facts, made.deltas, *how, made.state, made.relative_error, contexts, config)
        return self.edits[name]

    def _changes(self, requests: Sequence[EditRequest]) -> Changes:
        """Find the change of weights that serves the requests; what the active edits remember is minded."""
        base, config = self.get_base_model(), self.edit_config
        # What cannot be done is told before anything takes time.
        check_method(base, self.architecture, config, config.target_layers)
        remembered = joined_state(self.edits[name] for name in self.active_adapters)
        if config.method == "pmet":
            for layer in config.target_layers:
                self.architecture.attention_output(base, layer)
        if config.method in TRAINED:
            with phase("training"):
                return train_facts(base, self.architecture, self.tokenizer, requests, config, remembered)
        with self.disable_adapter():
            contexts = self.base_facts.contexts(base, config)
            statistics = self.base_facts.statistics(base, config)
        prepared = prepare_facts(base, self.architecture, self.tokenizer, requests, config, contexts)
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
            return cache_key(contexts=self.base_facts.contexts(self.get_base_model(), config))

    def _check_perplexity(self, name: str) -> None:
        """Raise ValueError where the active edits harm plain text more than the config allows."""
        most = self.edit_config.max_perplexity_ratio
        if most is None:
            return
        base = self.get_base_model()
        with self.disable_adapter():
            before = self.base_facts.perplexity(base)
        after = perplexity(base, self.tokenizer, sample_texts())
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
            neighbors: Use the first so many neighbourhood prompts of each fact; None for all.

        Raises:
            ValueError: There are no facts, or one cannot be tokenised.
        """
        own = requests is None
        if requests is None:
            requests = [fact.request for name in self.active_adapters for fact in self._edit(name).facts]
        facts = [rendered(self.tokenizer, request) for request in as_requests(requests)]
        if not facts:
            raise ValueError("There are no facts to evaluate: make an edit first, or pass requests.")
        base, where = self.get_base_model(), self.architecture
        paths = [path for name in self.active_adapters for path in self._edit(name).deltas]
        first = min(map(where.layer_of, paths), default=where.num_layers - 1)
        with phase("evaluation"):
            edited, before = observe_with_and_without(
                base, where, self.tokenizer, facts, first, self.disable_adapter, generation, neighbors
            )
        found = Evaluation(measure(facts, edited, before, neighbors), measure(facts, before, before, neighbors))
        self._evaluations[tuple(self.active_adapters)] = {"own_facts": own, "facts": len(facts), **found.to_dict()}
        return found

    # ------------------------------------------------------------------ adapters, as PEFT has them

    @property
    def active_adapters(self) -> list[str]:
        """Names of the edits that are switched on, in the order they are applied."""
        return peft_adapters.active(self.model)

    @property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's config of each adapter."""
        return peft_adapters.configs(self.model)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Switch on exactly these edits: one name, or a list whose edits are stacked.

        Raises:
            ValueError: There is no edit of that name.
        """
        peft_adapters.activate(self.model, [adapter_name] if isinstance(adapter_name, str) else adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an edit; the others stay as they are, switched on or off.

        Raises:
            ValueError: There is no edit of that name.
        """
        peft_adapters.check_names(self.model, [adapter_name])
        self.model = peft_adapters.remove(self.model, adapter_name)
        del self.edits[adapter_name]
        self._loaded = None
        self._evaluations = {names: found for names, found in self._evaluations.items() if adapter_name not in names}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch all edits off inside this context: the logits are exactly the base model's."""
        with peft_adapters.disabled(self.model):
            yield

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
        assert isinstance(self.model, PeftModel)
        active = self.active_adapters
        if combination_type == "cat":
            if kwargs:
                raise TypeError(f"add_weighted_adapter() with 'cat' takes no {sorted(kwargs)}.")
            made, cut = joined(adapter_name, parts, weights, reduce=True)
            if cut > 0:
                logger.warning(
                    "Edit %r is cut to rank %d, the largest that pays, with a relative error of %.1e: the edits it is "
                    "made of are exact, stacked or merged.",
                    adapter_name,
                    made.rank,
                    cut,
                )
            try:
                self.model = self._with_adapter(adapter_name, made.deltas)
            except BaseException:
                self.model = peft_adapters.remove(self.model, adapter_name)
                raise
        elif any(delta.experts > 1 for part in parts for delta in part.deltas.values()):
            raise ValueError(
                f"Edits of fused experts are no matrices that PEFT combines by {combination_type!r}: use 'cat'."
            )
        else:
            keys = [adapter_key(name) for name in (*adapters, adapter_name)]
            self.model.base_model.add_weighted_adapter(
                keys[:-1], list(weights), keys[-1], combination_type=combination_type, **kwargs
            )
            facts = [fact for part in parts for fact in part.facts]
            error = max(part.relative_error for part in parts)
            deltas = peft_adapters.read(self.model, adapter_name)
            how = parts[0].fan_in_fan_out, parts[0].by_parameter
            made = Edit(adapter_name, facts, deltas, *how, joined_state(parts), error)
        self.set_adapter(active)
        self.edits[adapter_name] = made

    @outside_inference_mode()
    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False) -> PreTrainedModel:
        """Write the active edits into the weights and return the plain model.

        Its config says which layers were edited, `golden_layers`, and by whom. This wrapper then has no edits, and
        sequential editors have forgotten them.

        Raises:
            ValueError: An edited weight is quantised; nothing has changed.
        """
        peft_adapters.check_mergeable(self.model)
        if isinstance(self.model, PeftModel):
            active = self.active_adapters
            metadata = golden_metadata(self._content(active)) if active else {}
            self.model = self.model.merge_and_unload(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=[adapter_key(name) for name in active]
            )
            self.edits, self._evaluations = {}, {}
            self.layer_selection = self._proxy_hash = None  # what was found is of other weights
            self.model.config.update(metadata)
            self.base_info = BaseModel(
                self.base_info.name_or_path, fingerprint(self.model), None, self.base_info.architecture
            )
            self.base_facts = BaseFacts(self.architecture, self.tokenizer, self.base_info.fingerprint)
        return self.model

    def unload(self) -> PreTrainedModel:
        """Drop all edits and return the plain base model."""
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()
            self.edits, self._evaluations = {}, {}
        return self.model

    def get_base_model(self) -> PreTrainedModel:
        """Return the transformers model under the edits, with the active ones in effect."""
        return peft_adapters.base_of(self.model)

    # ------------------------------------------------------------------ saving and loading

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], selected_adapters: list[str] | None = None
    ) -> None:
        """Save the active edits as one LoRA adapter with a sidecar and a model card, in one step.

        An edit that was in the folder is replaced whole or, on an error, kept whole, and so are other files.

        Args:
            save_directory: The folder.
            selected_adapters: Names of the edits to save; those that are switched on by default.

        Raises:
            ValueError: There is nothing to save.
        """
        content = self._content(self.active_adapters if selected_adapters is None else selected_adapters)
        names = [edit.name for edit in content.edits]
        if selected_adapters is None and (left_out := [name for name in self.edits if name not in names]):
            logger.warning("Saving the active edits; %s are switched off and not saved.", left_out)
        rank, pays = sum(edit.rank for edit in content.edits), min(edit.paying_rank for edit in content.edits)
        if rank > pays:
            logger.warning(
                "The saved edits have rank %d together. Above %d their factors outgrow the matrices they change, or "
                "what vLLM loads: share an edited checkpoint (push_merged_to_hub()), or fuse them by "
                "add_weighted_adapter(), which leaves the smallest singular values out.",
                rank,
                pays,
            )
        write_edit_folder(Path(save_directory), content, render_card(content))

    def _content(self, names: Sequence[str]) -> EditFolder:
        """Return what is saved of some edits."""
        if not names:
            raise ValueError("There is no active edit to save: call edit() first, or set_adapter().")
        edits = [self._edit(name) for name in names]
        evaluation = self._evaluations.get(tuple(names))
        loaded = self._loaded if self._loaded is not None and set(names) <= set(self._loaded[0]) else None
        versions = library_versions() if loaded is None else loaded[1]
        return EditFolder(edits, self.edit_config, self.base_info, versions, self._proxy_hash, evaluation)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | os.PathLike[str],
        adapter_name: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ignore_fingerprint: bool = False,
        **download: Unpack[DownloadOptions],
    ) -> EditModel:
        """Put saved edits on their base model and switch them on.

        Args:
            model: The base model.
            model_id: The edit folder, or its repository on the Hub.
            adapter_name: Name for what is loaded, as one edit; by default each edit has its own name back.
            tokenizer: The model's tokenizer; by default the one at `model.name_or_path`.
            ignore_fingerprint: Load the edits on a model with other weights than they were made on.
            **download: For the Hub, as transformers has them: `revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only`, `force_download`.

        Raises:
            ValueError: The folder is no edit folder, is damaged, or was made on another base model.
            FileNotFoundError: There is no such folder, and no repository can be called so.
            huggingface_hub.errors.HfHubHTTPError: The Hub has no such repository, revision or file, or refuses.
        """
        folder = find_folder(os.fspath(model_id), **download)
        content = read_edit_folder(folder)
        try:
            edit_model = cls(model, content.config, tokenizer)
        except ValueError as error:
            raise ValueError(f"{folder / EDIT_CONFIG} does not fit this model: {error}") from error
        edit_model._proxy_hash = content.proxy_hash
        if content.base_model.fingerprint == edit_model.base_info.fingerprint and not is_on_hub(edit_model.base_info):
            edit_model.base_info = content.base_model  # the same weights, by the name that others find them by
        edit_model._load(content, folder, adapter_name, ignore_fingerprint)
        edit_model._loaded = list(edit_model.edits), content.versions
        edit_model.set_adapter(list(edit_model.edits))
        return edit_model

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str | None = None,
        ignore_fingerprint: bool = False,
        **download: Unpack[DownloadOptions],
    ) -> None:
        """Load the edits of another folder beside those that are there; `set_adapter` switches them on.

        Raises:
            ValueError: As in `from_pretrained`, or a name is taken.
        """
        folder = find_folder(os.fspath(model_id), **download)
        active = self.active_adapters
        self._load(read_edit_folder(folder), folder, adapter_name, ignore_fingerprint)
        if self.active_adapters != active:
            self.set_adapter(active)

    @outside_inference_mode()
    def _load(self, content: EditFolder, folder: Path, adapter_name: str | None, ignore_fingerprint: bool) -> None:
        made_on = content.base_model
        if made_on.fingerprint != self.base_info.fingerprint and not ignore_fingerprint:
            raise ValueError(
                f"The edits of {folder / EDIT_CONFIG} were made on {made_on.name_or_path} (fingerprint "
                f"{made_on.fingerprint}), but this model is {self.base_info.name_or_path} (fingerprint "
                f"{self.base_info.fingerprint}). Load that model, or pass ignore_fingerprint=True to use the edits all "
                "the same."
            )
        edits = content.edits
        if adapter_name is not None:
            edits = [joined(adapter_name, edits)[0]]
        for edit in edits:
            self._new_name(edit.name)
            for path, delta in edit.deltas.items():
                try:
                    peft_adapters.check_fits(self.model, path, delta)
                except ValueError as error:
                    raise ValueError(f"{folder / ADAPTER_CONFIG} does not fit this model: {error}") from error
        added: list[str] = []
        try:
            for edit in edits:
                added.append(edit.name)
                self.model = self._with_adapter(edit.name, edit.deltas)
        except BaseException:
            for name in added:
                self.model = peft_adapters.remove(self.model, name)
            raise
        self.edits |= {edit.name: edit for edit in edits}
        if content.evaluation is not None and made_on.fingerprint == self.base_info.fingerprint:
            self._evaluations[tuple(edit.name for edit in edits)] = content.evaluation

    def _with_adapter(self, name: str, deltas: Mapping[str, LowRankDelta]) -> PeftModel:
        # Fused experts are named as parameters: where some layers have them, edits of all layers are, to go together.
        by_parameter = bool(self.architecture.experts)
        return peft_adapters.add(self.model, name, deltas, self.base_info.name_or_path, by_parameter)

    def _edit(self, name: str) -> Edit:
        peft_adapters.check_names(self.model, [name])
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
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the active edits."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet
                raise
            return getattr(self.model, name)


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
