"""Edit folders that a model of the format makes, and folders that are damaged twice.

Refused by an error that names the file, or loaded as stock PEFT loads the same folder. `benchmarks/robustness.py` tries
many more of them.
"""

from __future__ import annotations

import copy
import random
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import change_tensors, resign
from mutants import mutate
from peft import PeftModel
from safetensors import SafetensorError
from test_robustness import BAD, DAMAGES, REFUSED, RIGHT, UNNAMED, WRONG, right_folders, verdict
from transformers import PreTrainedModel
from watched import watching

from goldenedit import EditModel, get_edit_model
from goldenedit.storage.card import render_card
from goldenedit.storage.folder import ADAPTER_WEIGHTS, EDIT_FILES, EDITS
from goldenedit.storage.reading import read_edit_folder
from models import tiny_model, tiny_tokenizer
from tiny_edits import MERKEL, TOWER, fast_config, logits

LIKE_PEFT, UNLIKE_PEFT, ONLY_HERE, CRASH, BEYOND = (
    *("loaded as PEFT does", "loaded unlike PEFT", "PEFT does not load it", "crash", "reached beyond the folder"),
)
WRONG_MUTANT = (UNLIKE_PEFT, CRASH, BEYOND, UNNAMED, WRONG)
_KINDS = list(DAMAGES)


def twice_damaged(right: Path, other: Path, folder: Path, number: int, seed: str) -> tuple[str, bool]:
    """Make a copy with two damages; return their kinds, and whether the edit must load all the same."""
    rng = random.Random(f"pair {seed}/{number}")
    shutil.copytree(right, folder)
    kinds, harmless = rng.sample(_KINDS, 2), True
    for kind in kinds:
        try:
            harmless &= DAMAGES[kind](rng, folder, other)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
            harmless = False  # the first one left nothing that the second could change
    return " and ".join(kinds), harmless


def gated_folder(folder: Path) -> tuple[Path, Callable[[], PreTrainedModel]]:
    """Save edits of the default editor, which change three maps of a layer; return their folder and the base model."""
    base = tiny_model("llama")
    model = get_edit_model(copy.deepcopy(base), fast_config(covariance_tokens=300, kept_questions=1), tiny_tokenizer())
    model.edit(TOWER)
    model.edit(MERKEL)
    model.save_pretrained(folder)
    return folder, lambda: copy.deepcopy(base)


def mutant_verdict(folder: Path, is_signed: bool, right: Path, base: Callable[[], PreTrainedModel]) -> tuple[str, str]:
    """Load a mutant and return what came of it, with the message where there is one."""
    model = base()
    with watching(folder) as events, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = EditModel.from_pretrained(model, folder, tokenizer=tiny_tokenizer())
            render_card(read_edit_folder(folder))
            repr(loaded), loaded._repr_html_()
        except ValueError as error:
            message = str(error)
            outcome = REFUSED if any(name in message for name in EDIT_FILES) else UNNAMED
            return (BEYOND, "; ".join(events)) if events else (outcome, message)
        except BaseException as error:  # whatever it is, it is what we look for
            return CRASH, f"{type(error).__name__}: {error}"
    if events:
        return BEYOND, "; ".join(events)
    if not is_signed:
        same = torch.equal(logits(loaded), logits(EditModel.from_pretrained(base(), right, tokenizer=tiny_tokenizer())))
        return (RIGHT if same else WRONG), ""
    return _compared(loaded, folder, base)


def pair_verdict(
    kinds: str, folder: Path, right: Path, base: Callable[[], PreTrainedModel], tokenizer: Any
) -> tuple[str, str]:
    """Return what came of a folder with two damages.

    An author who signs a folder with a file of another edit has made another edit: it must load as stock PEFT loads it.
    """
    outcome, message = verdict(folder, right, base, tokenizer)
    _, anothers, after = kinds.partition("another edit's")
    if outcome == WRONG and anothers and "signed:" in after:
        return mutant_verdict(folder, True, right, base)
    return outcome, message


def _compared(loaded: EditModel, folder: Path, base: Callable[[], PreTrainedModel]) -> tuple[str, str]:
    """Compare a loaded model with what stock PEFT makes of its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = logits(PeftModel.from_pretrained(base(), folder))
        except Exception as error:
            return ONLY_HERE, f"{type(error).__name__}: {error}"
    ours = logits(loaded)
    largest = theirs.nan_to_num(0, 0, 0).abs().max().item()  # factors may be so large that logits overflow
    near = torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * largest, equal_nan=True)
    return (LIKE_PEFT, "") if near else (UNLIKE_PEFT, str((ours - theirs).abs().max()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of the same shape."""
    return right_folders(tiny_model("llama"), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> Any:
    """A folder of the default editor, and its base model."""
    return gated_folder(tmp_path_factory.mktemp("gated") / "edit")


@pytest.mark.parametrize("number", range(40))
def test_a_folder_that_is_damaged_twice_is_refused_by_name_or_loads_right(plain, tokenizer, tmp_path, number):
    kinds, harmless = twice_damaged(*plain, tmp_path / "edit", number, "test")
    outcome, message = pair_verdict(kinds, tmp_path / "edit", plain[0], lambda: tiny_model("llama"), tokenizer)
    assert outcome not in (*BAD, *WRONG_MUTANT), f"{kinds}: {message}"
    assert outcome == RIGHT or not harmless, f"{kinds}: {message}"


def test_a_file_of_another_edit_that_is_signed_is_another_edit_and_unsigned_is_refused(plain, tokenizer, tmp_path):
    base = partial(tiny_model, "llama")
    folder = tmp_path / "edit"
    shutil.copytree(plain[0], folder)
    shutil.copy(plain[1] / EDITS, folder / EDITS)
    kinds = "swapped with another edit's"
    assert pair_verdict(kinds, folder, plain[0], base, tokenizer)[0] == REFUSED
    resign(folder)
    assert pair_verdict(kinds, folder, plain[0], base, tokenizer)[0] == WRONG
    assert pair_verdict(f"{kinds} and signed: truncated", folder, plain[0], base, tokenizer) == (LIKE_PEFT, "")


def test_factors_so_large_that_logits_overflow_load_as_stock_peft_loads_them(plain, tmp_path):
    folder = tmp_path / "edit"
    shutil.copytree(plain[0], folder)
    change_tensors(folder / ADAPTER_WEIGHTS, lambda tensors: [value.mul_(1e30) for value in tensors.values()])
    resign(folder)
    loaded = EditModel.from_pretrained(tiny_model("llama"), folder, tokenizer=tiny_tokenizer())
    assert not logits(loaded).isfinite().all()
    assert mutant_verdict(folder, True, plain[0], lambda: tiny_model("llama")) == (LIKE_PEFT, "")


@pytest.mark.parametrize("which", ["plain", "gated"])
def test_a_mutant_is_refused_by_name_or_loads_as_stock_peft_loads_it(which, plain, gated, tmp_path):
    right, base = gated if which == "gated" else (plain[0], lambda: tiny_model("llama"))
    found = set()
    for number in range(60):
        folder = tmp_path / str(number)
        shutil.copytree(right, folder)
        is_signed = mutate(random.Random(f"test/{number}"), folder)
        outcome, message = mutant_verdict(folder, is_signed, right, base)
        assert outcome not in WRONG_MUTANT, f"{number}: {outcome}: {message}"
        found.add(outcome)
    assert {REFUSED, LIKE_PEFT} <= found


def test_a_right_folder_loads_as_stock_peft_loads_it(gated):
    right, base = gated
    assert mutant_verdict(right, True, right, base) == (LIKE_PEFT, "")
    assert mutant_verdict(right, False, right, base) == (RIGHT, "")


def test_what_reaches_beyond_a_folder_is_seen(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "beside").touch()
    (tmp_path / "folder" / "code.py").write_text("x = 1")
    with watching(tmp_path / "folder") as events:
        (tmp_path / "folder" / "inside").write_text("fine")
        assert events == []
        (tmp_path / "beside").read_text()
        exec(compile("x = 1", tmp_path / "folder" / "code.py", "exec"))
        (tmp_path / "beside").rename(tmp_path / "moved")
    assert [event.split()[0] for event in events] == ["open", "compile", "exec", "os.rename"]
