"""Export edits as a GGUF adapter, which llama.cpp loads together with the base model's GGUF file."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from goldenedit import platforms
from goldenedit.files import naming, write_atomically
from goldenedit.storage.folder import EditFolder, fuse

# llama.cpp's architecture name for each `model_type` of transformers. It lists only models whose MLPs llama.cpp stores
# unchanged: gates, ups and down projections as they are; fused gates and ups (GLM, Phi-3) as one `ffn_up`, gates first;
# weights of Conv1D (GPT-2) in the orientation of Linear, as deltas are. llama.cpp scales the maps of Falcon-H1, for
# example, and splits the fused ones of GraniteMoe, and an adapter of the wrong scale would still load.
ARCHITECTURES = {
    "bloom": "bloom",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm": "chatglm",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}


def export_gguf(content: EditFolder, config: PretrainedConfig, path: Path) -> None:
    """Write edits as one GGUF adapter, for `llama-cli --lora` or `Llama(lora_path=...)`.

    Edits of MLPs can be exported: of gates, ups and down projections. The factors are float32, independently of the
    precision of the base model's GGUF file. GPT-2 is supported too, although llama.cpp's own converter transposes its
    factors wrongly.

    Args:
        content: The edits; the adapter is their sum.
        config: The config of the base model.
        path: The file to write, replaced in one step.

    Raises:
        ValueError: llama.cpp does not support the model, or does not store an edited module unchanged, or `path` is a
            folder.
        ModuleNotFoundError: The package gguf is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Writing a GGUF adapter needs the package gguf: pip install "goldenedit[gguf]"'
        ) from error
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give the file to write, such as {path / 'edit.gguf'}.")
    if config.model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"Edits of a {config.model_type!r} model cannot be exported to GGUF. Supported model types: {supported}."
        )
    name = ARCHITECTURES[config.model_type]
    architecture = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name), None)
    if architecture is None:
        raise ValueError(f"The installed version of gguf does not support {name!r} models: pip install --upgrade gguf")
    num_layers = config.get_text_config().num_hidden_layers
    names = gguf.get_tensor_name_map(architecture, num_layers)
    rank, modules = fuse(content.edits)
    mlp = (gguf.MODEL_TENSOR.FFN_GATE, gguf.MODEL_TENSOR.FFN_UP, gguf.MODEL_TENSOR.FFN_DOWN)
    tensors = {}
    for module, delta in sorted(modules.items()):
        kind, tensor = names.get_type_and_name(module.replace("language_model.", "")) or (None, "")
        if kind not in mlp:  # llama.cpp permutes, splits or merges others
            raise ValueError(
                f"llama.cpp does not know {module} as a gate, up or down projection of a {config.model_type!r} model "
                f"with {num_layers} layers. Only edits of these projections can be exported to GGUF."
            )
        for factor, values in (("a", delta.A), ("b", delta.B)):
            tensors[f"{tensor}.weight.lora_{factor}"] = values.detach().float().cpu().contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        staged = Path(scratch, "adapter.gguf")
        writer = gguf.GGUFWriter(staged, name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # one for all modules: all have the same rank
        for tensor, array in tensors.items():
            writer.add_tensor(tensor, array)
        with naming(path):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        _check_written(staged, path, tensors)
        platforms.HERE.patiently(staged.replace, path)


def _check_written(staged: Path, path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Raise OSError unless a file holds all tensors. NumPy, which writes them, does not report that a disk is full."""
    import gguf

    with suppress(ValueError, IndexError):  # the file ends too early
        written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(staged).tensors}
        if written.keys() == tensors.keys() and all(np.array_equal(written[key], tensors[key]) for key in tensors):
            return
    raise OSError(errno.EIO, "The file could not be written as a whole. Is the disk full?", str(path))


def write_modelfile(adapter: Path, base: str) -> Path:
    """Write a Modelfile for `ollama create NAME -f Modelfile` beside a GGUF adapter, and return its path.

    Args:
        adapter: The adapter.
        base: The base model in Ollama, such as `smollm2:135m`, or a GGUF file of it.

    Raises:
        ValueError: The name has a line break, or the folder has another Modelfile.
    """
    if any(character in base + adapter.name for character in "\r\n"):
        raise ValueError(f"{base!r} cannot be the name of a model: it has a line break.")
    path = adapter.parent / "Modelfile"
    text = f"FROM {base}\nADAPTER ./{adapter.name}\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} exists already. Move it, or write the adapter into another folder.")
    write_atomically(path, text.encode())
    return path
