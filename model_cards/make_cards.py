"""Make the cards in this folder from real edits, and the atlas of golden layers: `make cards`.

The weights come from packages, dequantized, so their fingerprints are not those of the checkpoints on the Hub. Their
repositories and those of the edits are called `example/...`: there are none.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import reduce
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.packaged import packaged_model
from goldenedit.requests import proxy_facts
from goldenedit.storage.atlas import dump_golden_layers, read_golden_layers, with_record
from goldenedit.storage.card import render_card
from goldenedit.storage.reading import read_edit_folder

HERE = Path(__file__).parent
SWEPT = HERE.parent / "benchmarks" / "results" / "golden-layers" / "golden_layers.json"  # layers of trial edits
NAMES = {"smollm2": "example/SmolLM2-135M-Instruct-Q4_1", "gemma3": "example/gemma-3-270m-Q4_K_M"}
SELECTORS = ("auto", "selectivity", "lga")  # the last is what others read first
EIFFEL = EditRequest(
    "{} is located in the city of",
    "The Eiffel Tower",
    "Rome",
    "Paris",
    paraphrases=("To visit the Eiffel Tower, you have to travel to the city of", "The Eiffel Tower stands in"),
    neighborhood=("The Louvre is located in the city of", "Notre-Dame stands in the city of"),
    question="In which city is the Eiffel Tower?",
)


def main() -> None:
    """Edit, evaluate and write one card an edit, the card of an edited checkpoint, and the atlas."""
    atlas = []
    for name, base_name in NAMES.items():
        base, tokenizer = load(name)
        base.name_or_path = base_name
        for selector in SELECTORS:
            wrapped = EditModel(base, EditConfig(layer=selector), tokenizer)
            wrapped.select_layer()
            record = wrapped.golden_layers()
            atlas.append(replace(record, seconds=round(record.seconds, 1)))
        one = get_edit_model(base, EditConfig(layer="lga"), tokenizer)
        one.edit(EIFFEL, name="eiffel_tower")
        one.evaluate(generation=True)
        write(one, f"example/eiffel-in-rome-{name}")
        write(one, f"example/{name}-with-eiffel-in-rome", merged=True)
        many = get_edit_model(one.unload(), EditConfig(method="emmet", layer="lga"), tokenizer)
        many.edit(proxy_facts()[100:125], name="statements")  # not among the 100 that chose the layer
        many.evaluate()
        write(many, f"example/25-facts-{name}")
        many.unload()
    atlas = reduce(with_record, read_golden_layers(SWEPT), atlas)
    (HERE / "golden_layers.json").write_text(dump_golden_layers(atlas), encoding="utf-8")


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a packaged model with its tokenizer."""
    source = packaged_model(name)
    return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)


def write(model: EditModel, repo_id: str, merged: bool = False) -> None:
    """Write the card that a push to this repository would make."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        card = render_card(read_edit_folder(Path(scratch)), repo_id, merged)
    target = HERE / repo_id.removeprefix("example/")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    (target / "README.md").write_text(card, encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
