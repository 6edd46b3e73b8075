"""EditModel: a causal LM with edits, each of them an adapter of a stock PeftModel, under PEFT's verbs."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from inspect import Parameter, Signature
from typing import Any, Self

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from goldenedit import html
from goldenedit.adapters import REFUSED_VERBS, Adapters, is_conv1d, plain
from goldenedit.architecture import Architecture, read_architecture
from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.cache import cache_key
from goldenedit.config import EditConfig
from goldenedit.cost import phase, showing_phases
from goldenedit.editing.batch import changes_of_batch, check_harm
from goldenedit.editing.calls import (
    RECHECKED,
    check_facts,
    facts_to_keep,
    facts_to_recheck,
    requests_of_call,
    warn_of_doubtful_subjects,
    warn_of_failed_facts,
    warn_of_lost_facts,
    without_marker,
)
from goldenedit.editing.failures import check_tokens, explained
from goldenedit.editing.prepared import check_editable
from goldenedit.editors import LowRankDelta
from goldenedit.layer_selection import LayerSelection, proxy_hash, proxy_set, select_layer
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.tokenizer import tokenizer_of
from goldenedit.measuring import MeasuringMixin
from goldenedit.requests import Facts, Message
from goldenedit.sequences import SequencesMixin
from goldenedit.sharing import SharingMixin
from goldenedit.storage.checkpoint import golden_metadata
from goldenedit.storage.fingerprint import weight_hashes
from goldenedit.storage.folder import BaseModel, Edit, joined, joined_state
from goldenedit.storage.hub import cached_commit
from goldenedit.storing import StoringMixin
from goldenedit.threads import ModelLock, alone
from goldenedit.versions import library_versions
from goldenedit.wrapping import check_arguments, check_editable_model

logger = logging.getLogger(__name__)

# A Trainer keeps those columns of a dataset that `forward` names.
_COLUMNS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels")
_FORWARD = Signature(
    [
        Parameter("self", Parameter.POSITIONAL_OR_KEYWORD),
        Parameter("args", Parameter.VAR_POSITIONAL),
        *(Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in _COLUMNS),
        Parameter("kwargs", Parameter.VAR_KEYWORD),
    ]
)


def get_edit_model(
    model: PreTrainedModel | PeftModel,
    edit_config: EditConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EditModel:
    """Wrap a causal LM for editing, and find the layer to edit.

    Args:
        model: A causal LM of transformers, or a PeftModel around one: LoRA adapters that are active in it are a part of
            the model that is edited, and stay yours. Edits are put beside the weights, which are never written.
        edit_config: How to edit; gated insertion above LGA's golden layer by default. The model keeps a
            copy, `model.edit_config`; `target_layer` and `layer_scores` are filled in on both.
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


class EditModel(nn.Module, MeasuringMixin, SequencesMixin, StoringMixin, SharingMixin):
    """A causal LM with edits that switch on and off, stack, fuse, merge, save and load.

    Each call of `edit` adds one adapter to a stock `PeftModel`. The methods for adapters have PEFT's names. `forward`,
    `generate` and all other attributes are those of the model.

    Attributes:
        edit_config: How the next edits are made: a copy of the config passed in, with the layer filled in.
        architecture: Where the model keeps its layers.
        adapters: The edits as adapters in the model.
        lm: The model with its tokenizer, and everything that is computed about it once.
        edits: The edits by name, in the order they were made.
        layer_selection: Result and cost of the layer selector; None before it ran.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        edit_config: EditConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.threads = ModelLock()
        if isinstance(model, EditModel):
            raise TypeError("The model is an EditModel already. Call its edit(), or wrap what its unload() returns.")
        check_arguments(model, edit_config, tokenizer)
        # Edits go into what was compiled.
        model = check_editable_model(extract_model_from_parallel(model, keep_torch_compile=False))
        self.adapters = Adapters(model)
        base = self.adapters.base
        self.edit_config = copy.deepcopy(edit_config)
        self.tokenizer = tokenizer if tokenizer is not None else tokenizer_of(base)
        with plain(base), explained(base):
            check_tokens(self.tokenizer, base)
            self.architecture: Architecture = read_architecture(base, edit_config.target_modules)
            for layer in edit_config.target_layers:
                self.architecture.check_layer(layer)
            self.base_info = BaseModel(
                name_or_path=base.name_or_path or type(base).__name__,
                revision=cached_commit(str(base.name_or_path)),
                architecture=type(base).__name__,
                **vars(weight_hashes(base)),
            )
        # PEFT names fused experts as parameters. If some layers have them, edits of all layers are named so, to stack.
        self.adapters.by_parameter = bool(self.architecture.experts)
        self.adapters.base_name = self.base_info.name_or_path
        self.edits: dict[str, Edit] = {}
        self.model: PreTrainedModel | PeftModel = self.adapters.model
        self._see_model()
        self.layer_selection: LayerSelection | None = None
        self._proxy_hash: str | None = None
        self._evaluations: dict[tuple[str, ...], dict[str, Any]] = {}  # by the names of the active edits
        self._switched_off: list[str] | None = None  # edits that disable_adapter_layers() switched off

    def __repr__(self) -> str:
        """Return the base model, the layer and the edits. `print(model.model)` shows the modules."""
        layers = self.edit_config.layers_in_words
        lines = [
            f"EditModel of {type(self.adapters.base).__name__} {self._base_info.name_or_path!r}: "
            f"{self.architecture.num_layers} layers, editor {self.edit_config.method!r}, "
            + (f"layer {layers}" if layers else "no layer chosen yet")
        ]
        on = self.active_adapters
        lines += [f"  {'on ' if name in on else 'off'} {edit!r}" for name, edit in self.edits.items()]
        return "\n".join(lines if self.edits else [*lines, "  no edits"])

    def _repr_html_(self) -> str:
        """Return the edits as a table, for notebooks."""
        on = self.active_adapters
        rows = [
            (name, "on" if name in on else "off", len(edit.facts), ", ".join(map(str, edit.layers)), edit.rank)
            for name, edit in self.edits.items()
        ]
        return html.table(("edit", "", "facts", "layers", "rank"), rows, repr(self).partition("\n")[0])

    @property
    def base_info(self) -> BaseModel:
        """The base model, hashed again once its weights may have changed: by a merge, by training, or by loading."""
        if self._hashed_at != self.adapters.weights_state:
            with plain(self.adapters.base):
                hashes = weight_hashes(self.adapters.base)
            info = self._base_info
            if hashes.fingerprint != info.fingerprint:
                self.layer_selection = self._proxy_hash = None  # they belong to the old weights
                info = replace(info, revision=None, **vars(hashes))
            self.base_info = info
        return self._base_info

    @base_info.setter
    def base_info(self, info: BaseModel) -> None:
        self._base_info, self._hashed_at = info, self.adapters.weights_state

    def _see_model(self) -> None:
        """Replace `lm` if the weights, the tokenizer or the user's active adapters have changed."""
        beside = "".join(entry.hash for entry in self.adapters.beside())
        lm = self.__dict__.get("lm")
        is_current = lm is not None and lm.beside == beside and lm.weights == self.base_info
        if not is_current or not self.lm.tokenizes_with(self.tokenizer):
            base = self.adapters.base
            self.lm: LanguageModel = LanguageModel(base, self.tokenizer, self.architecture, self.base_info, beside)

    # ------------------------------------------------------------------ editing

    @alone
    @outside_inference_mode()
    def select_layer(self) -> int | list[int]:
        """Run the config's layer selector, and fill `edit_config.target_layer` and `.layer_scores`."""
        self._see_model()
        with self.disable_adapter():
            if len(self.architecture.experts) == len(self.architecture.down_projections):  # any layer is one of these
                check_editable(self.lm, self.edit_config, list(self.architecture.experts)[:1])
            with phase("layer selection"), explained(self.adapters.base):
                self.layer_selection = select_layer(self.lm, self.edit_config)
        if self.edit_config.is_scored:
            self._proxy_hash = proxy_hash(proxy_set(self.edit_config))
        layers = self.edit_config.target_layers
        return layers[0] if len(layers) == 1 else layers

    @alone
    @outside_inference_mode()
    @showing_phases()
    def edit(
        self,
        prompt: str | Sequence[str] | Facts | None = None,
        subject: str | None = None,
        target_new: str | None = None,
        target_true: str | None = None,
        name: str | None = None,
        messages: Sequence[Message] | None = None,
        verify: bool = False,
        into: str | None = None,
    ) -> Edit:
        """Change one fact, or a batch of facts, and switch the new edit on beside the active ones.

        Either all requests are served, or an error is raised and nothing changes. Warnings name the facts whose new
        answer stays unlikely, and facts of other active edits that this edit loses.

        Args:
            prompt: The text before the answer, with `subject` and `target_new`; a list of texts teaches one fact in
                several wordings. Or a request or a list of requests, as `EditRequest` or as dicts (see
                `EditRequest.from_dict`); equal requests are edited once.
            subject: The entity the fact is about, as spelled in the prompt.
            target_new: The new answer.
            target_true: The old answer, where known.
            name: Name of the edit and its adapter; `"edit_1"`, `"edit_2"`, ... by default.
            messages: Instead of a prompt, the conversation that a chat model answers with `target_new`.
            verify: Ask the model afterward: the facts in every form they have a text for, and other questions. The
                texts before and after are in `verification` of the edit, and the log says what holds and what moved.
                All facts of other active edits are asked again, instead of a draw.
            into: Name of an active edit that takes the new facts up, instead of a `name`. Its adapter becomes the sum,
                whose rank is at most that of the matrix, so thousands of edits cost no more than one. They are
                switched and deleted together. If there is no such edit, this one gets the name.

        Returns:
            The edit, with the probability of each new answer before and after. With `into` it has the facts of before
            as well.

        Raises:
            ValueError: A request is invalid, two requests contradict each other, the name is taken, the edit to take
                them up is not active, or the optimization fails.
        """
        asked = requests_of_call(prompt, subject, target_new, target_true, messages)
        warn_of_doubtful_subjects(asked)
        if into is not None and name is not None:
            raise ValueError("edit() takes name= for an edit of its own, or into= to add to one, not both.")
        grows = into is not None and into in self.edits
        if grows and into not in self.active_adapters:
            raise ValueError(f"Edit {into!r} is switched off. Switch it on (set_adapter) to edit into it.")
        name = self._new_name(None if grows else into or name)
        self._see_model()
        # A request that cannot be tokenized raises before anything takes time.
        texts = [rendered(self.tokenizer, request) for request in asked]
        check_tokens(self.tokenizer, self.adapters.base, texts, self.lm.max_length)
        if not self.edit_config.target_layers:
            self.select_layer()
        for layer in self.edit_config.target_layers:  # the config may have been changed since the model was wrapped
            self.architecture.check_layer(layer)
        self.adapters.ensure()
        config = copy.deepcopy(self.edit_config)
        active = [self.edits[name] for name in self.active_adapters]
        remembered = joined_state(active)
        carried = [edit.deltas for edit in self.edits.values()]
        earlier = facts_to_keep(active, asked, with_failed=config.editor.learns == "training")
        with explained(self.adapters.base, self.lm, texts, config.target_layers):
            changes = changes_of_batch(
                self.lm,
                asked,
                config,
                remembered,
                self.disable_adapter,
                earlier,
                carried,
                [edit.deltas for edit in active],
            )
        config.covariance_tokens = self.lm.text_tokens(config)  # of this model, so that the edit can be made again
        contexts = self.contexts_hash(config) if config.editor.learns == "values" else None
        with self._adding({name: changes.deltas}):
            with phase("check"):
                others = facts_to_recheck(active, asked, most=None if verify else RECHECKED)
                facts, lost = check_facts(self.lm, asked, changes, others, partial(self._without, name))
            check_harm(self.lm, name, config, self.disable_adapter)
            self.edits[name] = Edit(
                name,
                facts,
                changes.deltas,
                layers=tuple(sorted(set(map(self.architecture.layer_of, changes.deltas)))),
                fan_in_fan_out=is_conv1d(self.adapters.base, changes.deltas),
                by_parameter=self.adapters.targets_parameters(name),
                state=changes.state,
                relative_error=changes.relative_error,
                contexts_hash=contexts,
                configs=(config,),
                versions=library_versions(),
                beside=tuple(self.adapters.beside()),
                lost=lost,
            )
            if verify:
                verification = self._verified(name, asked)
                self.edits[name] = replace(self.edits[name], verification=verification)
                level = logging.INFO if verification.holds else logging.WARNING
                logger.log(level, "Edit %r %s.", name, verification.summary)
            if into is not None and grows:
                self._fuse(into, name)
                name = into
        warn_of_failed_facts(facts, config)
        warn_of_lost_facts(lost)
        return self.edits[name]

    def _fuse(self, into: str, part: str) -> None:
        """Make an edit a part of another one. Both are active."""
        newest = self.edits[part]
        whole, _ = joined(into, [self.edits[into], newest])
        deltas = {path: delta.compact() for path, delta in whole.deltas.items()}
        self.adapters.fuse(into, part, deltas)
        self.model = self.adapters.model
        self.edits[into] = replace(whole, deltas=deltas, lost=newest.lost, verification=newest.verification)
        del self.edits[part]
        self._evaluations = {names: found for names, found in self._evaluations.items() if into not in names}

    def _warn_of_missing_markers(self, edits: Sequence[Edit]) -> None:
        """Log a warning that names those of some edits which need another one that is not among them."""
        if names := without_marker(edits, self.architecture.down_projections):
            logger.warning(
                "The edits %s were made on top of an earlier edit about the same subject, which is not with them now. "
                "Without it their facts may not hold. Keep both, or make these facts again in one call.",
                names,
            )

    def contexts_hash(self, config: EditConfig) -> str:
        """Return a hash of the prefixes that this model samples under a config."""
        with self.disable_adapter():
            return cache_key(contexts=self.lm.contexts(config))

    # ------------------------------------------------------------------ adapters, as PEFT has them

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active edits, in the order they are applied."""
        return list(self.adapters.active)

    @property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's config of each edit, and of each adapter that is not an edit."""
        return self.adapters.configs

    @alone
    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Switch on exactly these edits: one name, or a list of edits to stack.

        This also switches the plain adapters that `load_adapter` added. Your own adapters stay as they are, unless some
        of them are named.

        Raises:
            ValueError: There is no edit of that name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._switched_off = None
        self.adapters.select(names)
        self._warn_of_missing_markers([self.edits[name] for name in names if name in self.edits])

    @alone
    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an edit, or a plain adapter that was loaded. The others stay switched on or off as they are.

        Raises:
            ValueError: There is no edit of that name.
        """
        if adapter_name not in self.adapters.loaded:
            self.adapters.check([adapter_name])
        self.adapters.remove(adapter_name)
        self.model = self.adapters.model
        self.edits.pop(adapter_name, None)
        self._warn_of_missing_markers(list(self.edits.values()))
        self._evaluations = {
            names: evaluation for names, evaluation in self._evaluations.items() if adapter_name not in names
        }

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch all edits off inside this context. The logits are exactly those of the model that was wrapped.

        They are off for all threads that run the model.
        """
        with ExitStack() as stack:
            with self.threads.changing():
                stack.enter_context(self.adapters.disabled())
            try:
                yield
            finally:
                with self.threads.changing():
                    stack.close()

    @alone
    def disable_adapter_layers(self) -> None:
        """Switch all edits off until `enable_adapter_layers`. A new edit is on."""
        self._switched_off = [*(self._switched_off or []), *self.active_adapters]
        self.adapters.activate([])

    @alone
    def enable_adapter_layers(self) -> None:
        """Switch on again the edits that `disable_adapter_layers` switched off."""
        names = [name for name in self._switched_off or [] if name in self.edits]
        self.adapters.activate([*names, *(name for name in self.active_adapters if name not in names)])
        self._switched_off = None

    @alone
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

        `"cat"` is their exact sum as long as its rank pays. Above `d_in d_out / (d_in + d_out)`, and above vLLM's limit
        of 512, the smallest singular values are dropped: a warning says so, and `relative_error` of the new edit is
        the error. All other types, and further arguments, are PEFT's.

        Raises:
            ValueError: There is no edit of a name, or the new name is taken.
            TypeError: `"cat"` takes no further arguments.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"add_weighted_adapter needs one weight for each edit, got {adapters} and {weights}.")
        parts = [self._edit(name) for name in adapters]
        self._new_name(adapter_name)
        is_sum = combination_type == "cat"
        if is_sum and kwargs:
            raise TypeError(f"add_weighted_adapter() with 'cat' takes no {sorted(kwargs)}.")
        down = set(self.architecture.down_projections.values())
        if any(weight != 1 and not part.deltas.keys() <= down for weight, part in zip(weights, parts, strict=True)):
            logger.warning(
                "Edit %r weighs edits that rewrite neurons: a weight scales what they respond to and their values, "
                "so half of the weight is about an eighth of the effect. Give such edits the weight 1.",
                adapter_name,
            )
        edit, cut = joined(adapter_name, parts, weights, reduce=is_sum)
        if is_sum:
            if cut > 0:
                logger.warning(
                    "Edit %r is cut to rank %d, the largest that pays, with a relative error of %.1e. Stack or merge "
                    "the edits it was combined from to keep them exact.",
                    adapter_name,
                    edit.rank,
                    cut,
                )
            with self._adding({adapter_name: edit.deltas}, on=False):
                self.edits[adapter_name] = edit
            return
        if any(delta.experts > 1 for part in parts for delta in part.deltas.values()):
            raise ValueError(f"PEFT cannot combine edits of fused experts by {combination_type!r}: use 'cat'.")
        self.adapters.combine(adapters, weights, adapter_name, combination_type, **kwargs)
        error = max(part.relative_error for part in parts)
        self.edits[adapter_name] = replace(edit, deltas=self.adapters.read(adapter_name), relative_error=error)

    @alone
    @outside_inference_mode()
    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False) -> PreTrainedModel:
        """Write the active edits, and the user's active adapters, into the weights and return the plain model.

        Sums are computed in float32, checked to be finite and rounded once; `push_merged_to_hub` writes the same
        weights. The config of the model records the edited layers (`golden_layers`) and how they were edited. This
        wrapper then has no edits, and sequential editors have forgotten theirs.

        Args:
            progressbar: Accepted for PEFT's sake, and ignored.
            safe_merge: Accepted for PEFT's sake: every merge is safe.

        Raises:
            ValueError: An edited weight is quantized, a sum is not finite, or another EditModel has edits of this
                model; nothing has changed.
        """
        metadata = golden_metadata(self._content(self.active_adapters)) if self.active_adapters else {}
        merged = self.adapters.merge()
        self.model = merged
        self.edits, self._evaluations = {}, {}
        merged.config.update(metadata)
        self._see_model()
        return merged

    @alone
    def unload(self) -> PreTrainedModel | PeftModel:
        """Drop all edits and return the model that was wrapped, as it was."""
        self.adapters.clear()
        self.model = self.adapters.model
        self.edits, self._evaluations, self._switched_off = {}, {}, None
        return self.model

    @property
    def base_facts(self) -> LanguageModel:
        """The old name of `lm`, until the next version."""
        warnings.warn("EditModel.base_facts is now EditModel.lm.", FutureWarning, stacklevel=2)
        return self.lm

    def get_base_model(self) -> PreTrainedModel:
        """Return the transformers model under the edits, with the active ones in effect."""
        self.adapters.ensure()
        return self.adapters.base

    # ------------------------------------------------------------------ in and out

    @contextmanager
    def _adding(self, edits: Mapping[str, Mapping[str, LowRankDelta]], on: bool = True) -> Iterator[None]:
        """Add adapters. An error or an interrupt inside this context removes them and their edits again."""
        try:
            with self.adapters.adding(edits, on):
                self.model = self.adapters.model
                yield
        except BaseException:
            self.edits = {name: edit for name, edit in self.edits.items() if name not in edits}
            self.model = self.adapters.model
            raise

    def _without(self, name: str) -> AbstractContextManager[None]:
        """Switch one edit off inside this context."""
        return self._only([other for other in self.adapters.active if other != name])

    @contextmanager
    def _only(self, names: Sequence[str]) -> Iterator[None]:
        """Have exactly these edits active inside this context."""
        active = self.adapters.active
        self.adapters.activate(names)
        try:
            yield
        finally:
            self.adapters.activate(active)

    # ------------------------------------------------------------------ the model, straight through

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the active edits."""
        if is_compiling():  # locks cannot be traced
            self.adapters.ensure()
            return self.model(*args, **kwargs)
        with self.threads.running():
            self.adapters.ensure()
            return self.model(*args, **kwargs)

    forward.__signature__ = _FORWARD  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, as for any module; edits and the weights under them stay as they are."""
        if mode and not any(weight.requires_grad for weight in self.parameters()):
            logger.warning(
                "There is nothing to train: edits, and the weights under them, are frozen. Train before editing, or "
                "wrap a PeftModel with a LoRA adapter of yours and train that."
            )
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights of the model and of its edits, each of them once.

        A tied weight has its first name alone, because safetensors, with which a Trainer writes checkpoints, refuses
        two names of one tensor.
        """
        state = super().state_dict(*args, **kwargs)
        for name in self._tied_names():
            state.pop(kwargs.get("prefix", "") + name, None)
        return state

    def _tied_names(self) -> dict[str, str]:
        """Return the other names of tied weights, with the first name of each."""
        first = {id(weight): name for name, weight in self.named_parameters()}
        return {
            name: first[id(weight)]
            for name, weight in self.named_parameters(remove_duplicate=False)
            if name != first[id(weight)]
        }

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, first in self._tied_names().items():
            if prefix + first in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + first])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by the names that they have in this model with these edits.

        Raises:
            RuntimeError: Weights are missing or left over: they are of a model with other edits.
        """
        if strict and (names := (state_dict.keys() ^ self.state_dict().keys()) - self._tied_names().keys()):
            raise RuntimeError(
                f"The state dict is not of this model with the edits {list(self.edits)}: {len(names)} names differ, "
                f"such as {min(names)!r}. Save edits with save_pretrained(), and load them with "
                "EditModel.from_pretrained() or load_adapter()."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the active edits."""
        with self.threads.running():
            self.adapters.ensure()
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "adapters", "lm"):  # not set yet
                raise
            if name in REFUSED_VERBS:
                raise AttributeError(f"An EditModel has no {name}(): use {REFUSED_VERBS[name]}.") from None
        try:
            return getattr(self.model, name)
        except AttributeError as error:
            kind = type(self.adapters.base).__name__
            raise AttributeError(f"Neither {type(self).__name__} nor its {kind} has an attribute {name!r}.") from error


# A pipeline for text generation knows classes by their names, and logs an error of thousands of characters otherwise.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["edit_model"] = EditModel.__name__
