"""How an EditModel is evaluated: beside its base model, and beside a random change of the same size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from goldenedit.adapters import Adapters
from goldenedit.architecture import Architecture
from goldenedit.architecture.hooks import outside_inference_mode
from goldenedit.cost import phase
from goldenedit.editing.calls import latest_facts
from goldenedit.editors import LowRankDelta
from goldenedit.evaluation.evaluate import Evaluation, measure, observe_with_and_without
from goldenedit.evaluation.examples import examples
from goldenedit.evaluation.forms import FORMS, check_forms
from goldenedit.evaluation.harm import Compared, State, compare
from goldenedit.evaluation.harness import HarnessScores, harness_comparison
from goldenedit.evaluation.judges import Judge
from goldenedit.evaluation.seen import Measurement, SeenOptions, ask, baseline, seen, texts_of
from goldenedit.evaluation.verification import Said, Verification, said_in_chat, with_question
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.decoding import greedy
from goldenedit.requests import EditRequest, Facts, as_requests
from goldenedit.storage.folder import Edit
from goldenedit.threads import alone

_VERIFIED_NEIGHBORS = 5
_CONTROL = "_control"  # name of the adapter with a random change, unless an edit has it


class MeasuringMixin:
    """Evaluation for `EditModel`."""

    adapters: Adapters
    architecture: Architecture
    edits: dict[str, Edit]
    lm: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    _evaluations: dict[tuple[str, ...], dict[str, Any]]

    if TYPE_CHECKING:

        @property
        def active_adapters(self) -> list[str]:  # noqa: D102
            ...

        def disable_adapter(self) -> AbstractContextManager[None]: ...  # noqa: D102

        def _edit(self, name: str) -> Edit: ...

        def _see_model(self) -> None: ...

        def _without(self, name: str) -> AbstractContextManager[None]: ...

    @alone
    @outside_inference_mode()
    def evaluate(
        self,
        requests: Facts | None = None,
        forms: Sequence[str] = tuple(FORMS),
        unchanged: bool = True,
        *,
        in_prompt: bool = True,
        control: bool = True,
        judge: Judge | None = None,
        neighbors: int | None = None,
        max_new_tokens: int = 50,
        generation: bool = False,
    ) -> Evaluation:
        """Measure the active edits beside the base model: what a user sees, and the scores of papers.

        The latest figures go into the model card when these edits are saved.

        Args:
            requests: The facts, as `edit` takes them; by default the facts of the active edits, without those that a
                later edit gives a new answer.
            forms: The forms in which facts are asked, see `goldenedit.evaluation.forms.FORMS`. Forms that a fact has no
                text for are left out.
            unchanged: Also compare other prompts and plain text with the base model.
            in_prompt: Also ask the base model with the fact in its prompt.
            control: Also compare a random change of the same rank and norm at the same place.
            judge: Also let a judge decide on each answer: a callable `(question, answer, text) -> bool`. It is called
                once for the same three texts.
            neighbors: Use the first so many neighborhood prompts of each fact; None for all.
            max_new_tokens: Largest number of tokens of an answer, which ends with its first sentence.
            generation: Also measure the `generation` family: whether texts begin with the answer.

        Raises:
            ValueError: There are no facts, one cannot be tokenized, or there is no such form.

        Example:
            ```python
            >>> evaluation = model.evaluate(forms=["completion", "rephrase"])
            >>> evaluation.says["completion"].contains.value
            1.0
            ```
        """
        latest = latest_facts(map(self._edit, self.active_adapters))
        edited_facts = {prompt: fact.request for prompt, fact in latest.items()}
        facts = list(edited_facts.values()) if requests is None else as_requests(requests)
        if not facts:
            raise ValueError("There are no facts to evaluate: make an edit first, or pass requests.")
        options = SeenOptions(
            forms=check_forms(forms),
            unchanged=unchanged,
            in_prompt=in_prompt,
            neighbors=neighbors,
            max_new_tokens=max_new_tokens,
            judge=None if judge is None else cache(judge),
        )
        self._see_model()
        self.adapters.ensure()
        prompts = [rendered(self.tokenizer, request) for request in facts]
        with phase("evaluation: likelihoods"):
            edited, before = observe_with_and_without(
                self.lm, prompts, self._first_edited_layer(), self.disable_adapter, generation, neighbors
            )
        # It takes longest, so it runs once all facts are known to be such that the model can be asked for them.
        measured = self._measurement(facts, options, control)
        evaluation = Evaluation(
            measure(prompts, edited, before, neighbors),
            measure(prompts, before, before, neighbors),
            seen([measured]),
            seen([measured], edited=False),
            tuple(texts_of(measured)),
        )
        is_edited = (_answers_as(edited_facts.get(fact.prompt_key), fact) for fact in facts)
        about = {"own_facts": all(is_edited), "facts": len(facts)}
        texts = [asdict(text) for text in examples(evaluation.texts)]
        active = tuple(self._edits_in_effect())
        earlier = self._evaluations.get(active, {})
        general = {"general": earlier["general"]} if "general" in earlier else {}
        self._evaluations[active] = {**about, **evaluation.to_dict(), "texts": texts, **general}
        return evaluation

    @alone
    @outside_inference_mode()
    def evaluate_general(
        self,
        tasks: Sequence[str],
        include_path: str | Path | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> dict[str, HarnessScores]:
        """Run tasks of lm-evaluation-harness with the active edits and without them.

        The latest figures go into the model card when these edits are saved.

        Args:
            tasks: Names of tasks, or task files in YAML.
            include_path: A folder with further task files.
            limit: Use the first so many items of each task.
            batch_size: How many items go through the model at once.

        Returns:
            `{"edited": ..., "base": ...}`, each with `value` and `stderr` by task and metric.

        Raises:
            ModuleNotFoundError: lm-evaluation-harness is not installed.
            ValueError: There is no such task.
        """
        general = harness_comparison(self, tasks, include_path, limit, batch_size)  # type: ignore[arg-type]
        empty: dict[str, Any] = {"own_facts": True, "facts": 0, "edited": {}, "base": {}, "texts": []}
        self._evaluations.setdefault(tuple(self._edits_in_effect()), empty)["general"] = general
        return general

    def _edits_in_effect(self) -> list[str]:
        """Return the names of the active edits; none inside `disable_adapter()`."""
        return [] if self.adapters.is_disabled else self.active_adapters

    @alone
    @outside_inference_mode()
    def said_in_chat(self, requests: Facts) -> list[Said]:
        """Ask the model for each fact once in its chat template, with the active edits: one short text for each.

        Facts that a chat cannot ask for are left out: all of them if the tokenizer has no chat template.

        Args:
            requests: The facts, as `edit` takes them.
        """
        self._see_model()
        return said_in_chat(self.lm, as_requests(requests))

    def _verified(self, name: str, facts: Sequence[EditRequest]) -> Verification:
        """Ask the model with a new edit and without it: the edit's facts in every form, and other prompts."""
        options = SeenOptions(in_prompt=False, neighbors=_VERIFIED_NEIGHBORS, texts=0)
        with phase("verification"), self._without(name):
            # Other edits may be on, so the answers of the base model that were kept are not those before this edit.
            asked = [with_question(fact) for fact in facts]
            base = baseline(self.lm, self.tokenizer, asked, options, partial(greedy, self.lm))
        with phase("verification"):
            state = {"edited": nullcontext}
            first = self._first_edited_layer()
            compared = compare(self.lm, base.rows, first, partial(self._without, name), state)["edited"]
            written, others = ask(self.lm, base, compared)
        return Verification(tuple(texts_of(Measurement(base, written, others, compared))))

    def _measurement(self, facts: Sequence[EditRequest], options: SeenOptions, control: bool) -> Measurement:
        """Ask the base model and the edited one, and compare them."""
        with phase("evaluation: base model"), self.disable_adapter():
            base = baseline(self.lm, self.tokenizer, facts, options)
        compared: dict[str, list[Compared]] = {"edited": [], "control": []}
        if base.rows:
            deltas = self._control_deltas() if control else {}
            with phase("evaluation: comparison"), self._with_control(deltas) as only_control:
                states = {"edited": nullcontext} | ({"control": only_control} if deltas else {})
                compared |= compare(self.lm, base.rows, self._first_edited_layer(), self.disable_adapter, states)
        with phase("evaluation: answers"):
            written, others = ask(self.lm, base, compared["edited"])
        return Measurement(base, written, others, compared["edited"], compared["control"])

    def _first_edited_layer(self) -> int:
        paths = [path for name in self.active_adapters for path in self._edit(name).deltas]
        return min(map(self.architecture.layer_of, paths), default=self.architecture.num_layers - 1)

    def _control_deltas(self) -> dict[str, LowRankDelta]:
        """Return a random change with rank and norm of the active edits' changes, for each down projection.

        Of an edit that gates its change, a random gate would be open everywhere.
        """
        generator = torch.Generator().manual_seed(0)
        deltas: dict[str, LowRankDelta] = {}
        for name in self._edits_in_effect():
            for path, delta in self._edit(name).deltas.items():
                deltas[path] = deltas[path].beside(delta) if path in deltas else delta
        down = {path: delta for path, delta in deltas.items() if path in self.architecture.down_projections.values()}
        return {path: random_like(delta, generator) for path, delta in (down or deltas).items()}

    @contextmanager
    def _with_control(self, deltas: Mapping[str, LowRankDelta]) -> Iterator[State]:
        """Add a random change, not switched on. The yielded function switches it on instead of the edits."""
        name = _CONTROL
        while name in self.adapters.configs:
            name = f"_{name}"

        @contextmanager
        def only_control() -> Iterator[None]:
            active = list(self.adapters.active)
            try:
                self.adapters.activate([name])
                yield
            finally:
                self.adapters.activate(active)

        if not deltas:
            yield only_control
            return
        try:
            with self.adapters.adding({name: deltas}, on=False):
                pass
            yield only_control
        finally:
            self.adapters.remove(name)


def _answers_as(edited: EditRequest | None, fact: EditRequest) -> bool:
    return edited is not None and edited.target_new.strip() == fact.target_new.strip()


def random_like(delta: LowRankDelta, generator: torch.Generator) -> LowRankDelta:
    """Return random factors with the shapes of a delta, scaled to its norm."""
    A, B = (torch.randn(factor.shape, generator=generator) for factor in (delta.A, delta.B))
    drawn = LowRankDelta(A, B, delta.experts)
    return LowRankDelta(A, B * (delta.norm / max(drawn.norm, 1e-30)), delta.experts)
