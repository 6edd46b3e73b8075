"""Export edits as an adapter for mlx-lm, which loads it by `mlx_lm.generate --adapter-path FOLDER`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from safetensors.torch import save
from transformers import PretrainedConfig

from goldenedit.storage.atomic import replace_files
from goldenedit.storage.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, EditFolder, fuse

ADAPTERS = "adapters.safetensors"
# mlx-lm's names too. It ignores factors under other names, as those of the text model of a multimodal one.
_PATH = re.compile(r"model\.layers\.(\d+)\.(mlp\.(?:gate|up|down)_proj)")


def export_mlx(content: EditFolder, config: PretrainedConfig, folder: Path) -> None:
    """Write edits as one adapter for mlx-lm.

    mlx-lm multiplies `scale * (x @ lora_a) @ lora_b`, so its factors are those of PEFT, transposed. It adds a pair of
    factors to the named maps of the last `num_layers` layers; those that are not in the file add nothing.

    Args:
        content: The edits; the adapter is their sum.
        config: The config of the base model.
        folder: The folder to write to.

    Raises:
        ValueError: An edited map is not one that mlx-lm has under the same name, or the folder has an adapter for PEFT.
    """
    if (folder / EDIT_CONFIG).exists() or (folder / ADAPTER_WEIGHTS).exists():
        raise ValueError(f"{folder} has an adapter for PEFT, which would be damaged. Give another folder.")
    rank, modules = fuse(content.edits)
    num_layers = config.get_text_config().num_hidden_layers
    tensors, first, keys = {}, math.inf, set()
    for path, delta in modules.items():
        found = _PATH.fullmatch(path)
        if found is None:
            raise ValueError(
                f"Edits of {path} cannot be exported for mlx-lm, whose maps are gate_proj, up_proj and down_proj of "
                "`model.layers.N.mlp`. "
                "Export an edited checkpoint, and convert it by mlx_lm.convert."
            )
        first = min(first, int(found[1]))
        keys.add(found[2])
        tensors[f"{path}.lora_a"] = delta.A.detach().float().cpu().T.contiguous()
        tensors[f"{path}.lora_b"] = delta.B.detach().float().cpu().T.contiguous()
    settings = {
        "fine_tune_type": "lora",
        "num_layers": num_layers - int(first),
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    files = {ADAPTERS: save(tensors), ADAPTER_CONFIG: (json.dumps(settings, indent=1) + "\n").encode()}
    replace_files(folder, files, (ADAPTERS, ADAPTER_CONFIG))
