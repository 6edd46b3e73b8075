"""Export edits as an adapter for mlx-lm, which loads it by `mlx_lm.generate --adapter-path FOLDER`."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors.torch import save
from transformers import PretrainedConfig

from goldenedit.storage.atomic import replace_files
from goldenedit.storage.folder import EditFolder, fuse

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = "adapters.safetensors"
_MLP = ("gate_proj", "up_proj", "down_proj")  # mlx-lm's names too, of linear maps without fused or transposed weights


def export_mlx(content: EditFolder, config: PretrainedConfig, folder: Path) -> None:
    """Write edits as one adapter for mlx-lm.

    mlx-lm multiplies `scale * (x @ lora_a) @ lora_b`, so its factors are those of PEFT, transposed. It adds a pair of
    factors to the named maps of the last `num_layers` layers; those that are not in the file add nothing.

    Args:
        content: The edits; the adapter is their sum.
        config: The config of the base model.
        folder: The folder to write to.

    Raises:
        ValueError: An edited map is not one that mlx-lm has under the same name.
    """
    rank, modules = fuse(content.edits)
    num_layers = config.get_text_config().num_hidden_layers
    tensors, first, keys = {}, math.inf, set()
    for path, delta in modules.items():
        parent, _, name = path.rpartition(".")
        parts = parent.split(".")
        if name not in _MLP or parts[-3::2] != ["layers", "mlp"] or not parts[-2].isdecimal():
            raise ValueError(
                f"Edits of {path} cannot be exported for mlx-lm, whose maps are {', '.join(_MLP)} of `layers.N.mlp`. "
                "Export an edited checkpoint, and convert it by mlx_lm.convert."
            )
        first = min(first, int(parts[-2]))
        keys.add(f"mlp.{name}")
        tensors[f"{path}.lora_a"] = delta.A.detach().float().cpu().T.contiguous()
        tensors[f"{path}.lora_b"] = delta.B.detach().float().cpu().T.contiguous()
    settings = {
        "fine_tune_type": "lora",
        "num_layers": num_layers - int(first),
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    files = {ADAPTERS: save(tensors), ADAPTER_CONFIG: (json.dumps(settings, indent=1) + "\n").encode()}
    replace_files(folder, files, (ADAPTERS, ADAPTER_CONFIG))
