"""A page to try edits on: `goldenedit playground`, and the same app as a Space.

One process serves several browser tabs with one copy of each model. The edits of a tab are adapters with names of their
own, which are on only while this tab asks, edits or saves. So no tab sees the edits of another one.
"""

from __future__ import annotations

import functools
import secrets
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Event, RLock, Thread
from typing import Any

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('The playground needs Gradio: pip install "goldenedit[playground]"') from error
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from goldenedit.config import EditConfig
from goldenedit.cost import PHASES, announcing
from goldenedit.lm.chat import conversation
from goldenedit.lm.tokens import encode
from goldenedit.loading import load_model
from goldenedit.model import EditModel, get_edit_model
from goldenedit.packaged import PACKAGED_MODELS
from goldenedit.requests import Message
from goldenedit.storage.folder import Edit

_KEPT_MODELS = 2  # in memory, and those with edits; of the others, the one that was used longest ago makes room
_MOST_TOKENS = 60
_FACT = ("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome")
_QUESTIONS = ["Where is the Eiffel Tower?", "Who designed the Eiffel Tower?", "Where is the Louvre?"]
_NONE = "Nothing is edited yet."
_PROGRESS = gr.Progress()


@dataclass
class Tab:
    """What belongs to one browser tab.

    Attributes:
        key: Tells its edits from those of other tabs.
        model: The name of its model.
        edits: The names of its edits, in the order they were made, and whether each is on.
    """

    key: str = ""
    model: str = ""
    edits: dict[str, bool] = field(default_factory=dict)

    @property
    def on(self) -> list[str]:
        """The names of the edits that are on."""
        return [name for name, is_on in self.edits.items() if is_on]


@dataclass
class Served:
    """A model that tabs share, one after another."""

    model: EditModel
    lock: RLock = field(default_factory=RLock)

    @contextmanager
    def of(self, tab: Tab) -> Iterator[EditModel]:
        """Have exactly the active edits of a tab on inside this context, while other tabs wait."""
        with self.lock:
            self.model.set_adapter([name for name in tab.on if name in self.model.edits])
            try:
                yield self.model
            finally:
                self.model.set_adapter([])


class Playground:
    """The models that are served, and what each button does."""

    def __init__(self, config: EditConfig | None = None, models: Sequence[str] | None = None) -> None:
        """Serve models.

        Args:
            config: How edits are made.
            models: The models that may be chosen; None for any, which strangers should not be allowed to load.
        """
        self.config = config or EditConfig(layer="lga")
        self.models = models
        self._served: OrderedDict[str, Served] = OrderedDict()
        self._lock = RLock()

    def served(self, name: str) -> Served:
        """Return a model, loaded and with its golden layer found on first use."""
        with self._lock:
            if name not in self._served:
                base, tokenizer = load_model(name)
                self._served[name] = Served(get_edit_model(base, self.config, tokenizer))
                unused = [other for other in self._served if other != name and not self._served[other].model.edits]
                for other in unused[: max(len(self._served) - _KEPT_MODELS, 0)]:
                    del self._served[other]
            self._served.move_to_end(name)
            return self._served[name]

    def choose(self, name: str, tab: Tab) -> Tab:
        """Load a model for a tab, whose edits of another model are deleted."""
        if not name.strip():
            raise gr.Error("Name a model: one on the Hub, a folder, or a packaged one.")
        if self.models is not None and name.strip() not in self.models:
            raise gr.Error(f"Choose one of {', '.join(self.models)}.")
        self.served(name.strip())
        if tab.model != name.strip():
            self.close(tab)
            return Tab(secrets.token_hex(3), name.strip())
        return tab

    def edit(self, tab: Tab, prompt: str, subject: str, target: str) -> Edit:
        """Make an edit in a tab, and ask the model before and after it."""
        served = self.served(tab.model)
        with served.of(tab) as model:
            name = f"edit_{len(tab.edits) + 1}-{tab.key}"
            edit = model.edit(prompt, subject=subject, target_new=target, name=name, verify=True)
            tab.edits[name] = True
        return edit

    def answers(self, tab: Tab, question: str, in_chat: bool) -> Iterator[tuple[str, str]]:
        """Yield what the base model and the edited model write, while they write it.

        One thread of its own holds the model until both are done, because the steps of a generator may run in
        different threads. It ends early if the generator is closed.

        Raises:
            ValueError: The question is empty or too long, or the chat template refuses it.
        """
        if not question.strip():
            raise ValueError("Ask something: the question is empty.")
        served = self.served(tab.model)
        pieces: Queue[Any] = Queue()
        left = Event()

        def write() -> None:
            try:
                with served.of(tab) as model:
                    tokenizer = model.tokenizer
                    messages: list[Message] = [{"role": "user", "content": question}]
                    text = conversation(tokenizer, messages) if in_chat else question
                    row = encode(tokenizer, text, max_length=_room(model))
                    ids = torch.tensor([row.input_ids[: row.last + 1]], device=model.device)
                    with model.disable_adapter():
                        _write(model, ids, _Streamer(tokenizer, "base", pieces), left)
                    _write(model, ids, _Streamer(tokenizer, "edited", pieces), left)
            except BaseException as error:
                pieces.put(error)
            else:
                pieces.put(None)

        Thread(target=write, daemon=True).start()
        texts = {"base": "", "edited": ""}
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                name, text = piece
                texts[name] += text
                yield texts["base"], texts["edited"]
        finally:
            left.set()

    def switch(self, tab: Tab, on: Sequence[str]) -> None:
        """Switch the edits of a tab."""
        tab.edits = {name: name in on for name in tab.edits}

    def undo(self, tab: Tab) -> None:
        """Delete the last edit of a tab."""
        if not tab.edits:
            raise gr.Error("There is no edit to take back.")
        name = list(tab.edits)[-1]
        served = self.served(tab.model)
        with served.lock:
            if name in served.model.edits:
                served.model.delete_adapter(name)
        del tab.edits[name]

    def saved(self, tab: Tab) -> str:
        """Return an archive of an edit folder with the edits of a tab that are on."""
        if not tab.on:
            raise gr.Error("There is nothing to save: no edit is on.")
        target = Path(tempfile.mkdtemp(prefix="goldenedit-"), "edit")  # which Gradio serves, so it stays
        with tempfile.TemporaryDirectory() as scratch:
            with self.served(tab.model).of(tab) as model:
                model.save_pretrained(scratch)
            return shutil.make_archive(str(target), "zip", scratch)

    def push(self, tab: Tab, repository: str) -> str:
        """Share the edits of a tab that are on, and return where they are."""
        if not tab.on:
            raise gr.Error("There is nothing to share: no edit is on.")
        with self.served(tab.model).of(tab) as model:
            return str(model.push_to_hub(repository.strip()))

    def close_later(self, tab: Tab) -> None:
        """Delete the edits of a tab without waiting for those who use its model."""
        Thread(target=self.close, args=(tab,), daemon=True).start()

    def close(self, tab: Tab) -> None:
        """Delete the edits of a tab that was closed."""
        with self._lock:
            served = self._served.get(tab.model)
        if served is None:
            return
        with served.lock:
            for name in reversed(tab.edits):
                if name in served.model.edits:
                    served.model.delete_adapter(name)


class _Streamer(TextStreamer):
    """Puts the text that a model writes into a queue, with the name of the model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, pieces: Queue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.name, self.pieces = name, pieces

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.put((self.name, text))


class _Left(StoppingCriteria):
    """Ends an answer that nobody reads any more."""

    def __init__(self, left: Event) -> None:
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)


def _write(model: EditModel, ids: Tensor, streamer: _Streamer, left: Event) -> None:
    """Let a model write after a text."""
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_MOST_TOKENS,
        do_sample=False,
        pad_token_id=model.tokenizer.eos_token_id,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([_Left(left)]),
    )


def _room(model: EditModel) -> int | None:
    """Return how long a question may be; None if there is no limit."""
    longest = model.lm.max_length
    return None if longest is None else longest - _MOST_TOKENS


def _told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show the errors of a handler as messages on the page."""

    @functools.wraps(handler)  # Gradio reads the signature
    def run(*values: Any, **options: Any) -> Any:
        try:
            return handler(*values, **options)
        except (ValueError, OSError, KeyError) as error:
            raise gr.Error(str(error), duration=None) from error

    return run


def _telling(progress: Any) -> Callable[[str], None]:
    """Return a function that shows which phase of an edit begins, and how many of the phases are over."""
    phases, over = list(PHASES), 0

    def tell(phase: str) -> None:
        nonlocal over
        if phase in PHASES:
            over = max(over, phases.index(phase))
            progress(over / len(phases), desc=PHASES[phase])

    return tell


class _Handlers:
    """What the buttons of the page call, with the values of its parts."""

    def __init__(self, playground: Playground) -> None:
        self.play = playground

    @_told
    def choose(self, name: str, tab: Tab, progress: Any = _PROGRESS) -> Any:
        progress(0, desc="Loading the model, and finding its golden layer")
        tab = self.play.choose(name, tab)
        model = self.play.served(tab.model).model
        can_chat = bool(model.tokenizer.chat_template)
        shown = "" if model.layer_selection is None else model.layer_selection._repr_html_()
        chat = gr.Checkbox(value=can_chat, interactive=can_chat)
        return tab, shown, self.listed(tab), chat, gr.Button(interactive=True), "" if tab.edits else _NONE

    @_told
    def edit(self, tab: Tab, prompt: str, subject: str, target: str, progress: Any = _PROGRESS) -> Any:
        progress(0, desc="Editing")
        with announcing(_telling(progress)):
            made = self.play.edit(tab, prompt, subject, target)
        return tab, made._repr_html_(), self.listed(tab)

    def ask(self, tab: Tab, question: str, in_chat: bool) -> Iterator[tuple[str, str]]:
        if not tab.model:
            raise gr.Error("Load a model first.")
        try:
            yield from self.play.answers(tab, question, in_chat)
        except (ValueError, RuntimeError) as error:
            raise gr.Error(str(error), duration=None) from error

    def switch(self, tab: Tab, on: list[str]) -> Tab:
        self.play.switch(tab, on)
        return tab

    @_told
    def undo(self, tab: Tab) -> Any:
        self.play.undo(tab)
        return tab, "" if tab.edits else _NONE, self.listed(tab)

    @_told
    def save(self, tab: Tab) -> str:
        return self.play.saved(tab)

    @_told
    def push(self, tab: Tab, repository: str) -> str:
        return self.play.push(tab, repository)

    def listed(self, tab: Tab) -> Any:
        """Return the boxes by which the edits of a tab are switched."""
        edits = self.play.served(tab.model).model.edits
        facts = {name: edits[name].facts[0] for name in tab.edits}
        labels = {
            name: f"{fact.request.subject}: {fact.request.target_new} ({fact.outcome})" for name, fact in facts.items()
        }
        return gr.CheckboxGroup(choices=[(label, name) for name, label in labels.items()], value=tab.on)


def build(model: str = "smollm2", playground: Playground | None = None, public: bool = False) -> gr.Blocks:
    """Return the page, which begins with a model.

    Args:
        model: The model.
        playground: What is behind the page.
        public: Whether strangers see it. Then only the packaged models and this one can be chosen, and nothing is
            pushed with the token of this machine.
    """
    names = list(dict.fromkeys([model, *PACKAGED_MODELS]))
    play = playground or Playground(models=names if public else None)
    on = _Handlers(play)
    with gr.Blocks(title="goldenedit playground", analytics_enabled=False) as page:
        tab = gr.State(Tab(), delete_callback=play.close_later)
        gr.Markdown("# goldenedit playground\nChange one fact in a language model, and see what else moves.")
        with gr.Row():
            with gr.Column():
                name = gr.Dropdown(names, value=model, allow_custom_value=not public, label="Model")
                load = gr.Button("Load", elem_id="load")
                with gr.Accordion("Layer scores", open=False):
                    scores = gr.HTML()
                prompt = gr.Textbox(_FACT[0], label="Prompt, which the answer completes", elem_id="prompt")
                subject = gr.Textbox(_FACT[1], label="Subject, as the prompt spells it", elem_id="subject")
                target = gr.Textbox(_FACT[2], label="New answer", elem_id="target")
                edit = gr.Button("Edit", variant="primary", interactive=False, elem_id="edit")
                edits = gr.CheckboxGroup([], label="Edits that are on", elem_id="edits")
                undo = gr.Button("Undo the last edit", elem_id="undo")
            with gr.Column():
                question = gr.Textbox(_QUESTIONS[0], label="Ask both models", elem_id="question")
                in_chat = gr.Checkbox(True, label="As a message in a chat")
                gr.Examples(_QUESTIONS, question)
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                base = gr.Textbox(label="Base model", lines=4, interactive=False, elem_id="base")
                edited = gr.Textbox(label="Edited model", lines=4, interactive=False, elem_id="edited")
                with gr.Accordion("What the last edit changed", open=True):
                    moved = gr.HTML(_NONE, elem_id="moved")
                with gr.Accordion("Save or share the edits that are on", open=False):
                    save = gr.Button("Make a download", elem_id="save")
                    archive = gr.File(label="Edit folder", interactive=False, elem_id="archive", height=100)
                    if not public:
                        repository = gr.Textbox(label="Repository on the Hub, as organization/name")
                        push = gr.Button("Push", elem_id="push")
                        push.click(on.push, [tab, repository], [gr.Markdown()])
        load.click(on.choose, [name, tab], [tab, scores, edits, in_chat, edit, moved], show_progress_on=[moved])
        edit.click(on.edit, [tab, prompt, subject, target], [tab, moved, edits], show_progress_on=[moved])
        gr.on([ask.click, question.submit], on.ask, [tab, question, in_chat], [base, edited])
        edits.input(on.switch, [tab, edits], [tab])
        undo.click(on.undo, [tab], [tab, moved, edits])
        save.click(on.save, [tab], [archive])
    return page


def theme() -> gr.Theme:
    """Return the look of the page, whose fonts are the system's: nothing is fetched from elsewhere."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
