"""Load models by the names that the command line and benchmarks accept: packaged models, models on the Hub, folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenedit.registry import meant

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from goldenedit.storage.folder import BaseModel


def load_model(
    name: str, revision: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer by the name of a packaged model, a name on the Hub, or a folder.

    Raises:
        OSError: There is no such model, or the Hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, pinned = model_source(name), {} if revision is None else {"revision": revision}
    with _telling_where(name):
        model = AutoModelForCausalLM.from_pretrained(source, **pinned, **options)
        return model, AutoTokenizer.from_pretrained(source, **pinned)


def load_config(name: str) -> PretrainedConfig:
    """Load the config of a model alone, by the name of a packaged model, a name on the Hub, or a folder."""
    from transformers import AutoConfig

    with _telling_where(name):
        return AutoConfig.from_pretrained(model_source(name))


def base_of(base_model: BaseModel, model: str | None = None) -> tuple[str, str | None]:
    """Return the name and revision of the base model for edits: the recorded one, or `model` if it is not None.

    A packaged model that was loaded from the cache of another machine has its own name.
    """
    from goldenedit.packaged import packaged_name
    from goldenedit.storage.hub import is_on_hub

    if model is None and not Path(base_model.name_or_path).exists():
        model = packaged_name(base_model.fingerprint) if not is_on_hub(base_model) else None
    return (base_model.name_or_path, base_model.revision) if model is None else (model, None)


def load_together(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a model in each process of `accelerate launch` or torchrun.

    Returns:
        The model, its tokenizer, and whether this is the first process, which prints and writes. The other processes
        show no progress bars from then on.
    """
    from transformers.utils.logging import disable_progress_bar

    from goldenedit.parallel import join_processes

    processes, device = join_processes()
    if not processes.is_first:
        disable_progress_bar()
    with processes.together():
        model, tokenizer = load_model(name)
        if device is not None:
            model.to(device)  # type: ignore[arg-type]
    return model, tokenizer, processes.is_first


@contextmanager
def _telling_where(name: str) -> Iterator[None]:
    """Say in an error of the Hub that there is no packaged model and no folder of this name either."""
    from goldenedit.packaged import PACKAGED_MODELS

    try:
        yield
    except OSError as error:
        if name in PACKAGED_MODELS or Path(name).exists():
            raise
        packaged = ", ".join(sorted(PACKAGED_MODELS))
        raise OSError(
            f"There is no folder {name!r} and no packaged model of this name ({packaged})."
            f"{meant(name, PACKAGED_MODELS)} The Hub: {error}"
        ) from error


def model_source(name: str) -> str:
    """Return the folder of a packaged model; other names are returned unchanged."""
    from goldenedit.packaged import PACKAGED_MODELS, packaged_model

    return str(packaged_model(name)) if name in PACKAGED_MODELS and not Path(name).exists() else name
