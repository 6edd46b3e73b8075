"""`import goldenedit` is light, and says what it has."""

import os
import subprocess
import sys
from importlib import resources

import pytest

import goldenedit


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = (
        "import sys, goldenedit; goldenedit.__version__; dir(goldenedit); "
        "print(*{'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == ""


def test_the_command_line_starts_without_torch():
    code = "import sys, goldenedit.cli; print(*{'torch', 'transformers', 'peft'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == ""


# Each of these is private, and may have another name in the next version of its library.
WITHOUT_PRIVATE_NAMES = """
import logging, sys
import torch, transformers, peft, accelerate.hooks, torch.utils.flop_counter, torch.utils._python_dispatch
import torch._dynamo

missing = {
    "_linear_pointwise", "_unsafe_view", "_linalg_solve_ex", "_linalg_eigh", "linalg_cholesky_ex",
    *(f"_scaled_dot_product_{name}{way}" for way in ("", "_backward") for name in
      ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")),
}
namespace = type(torch.ops.aten)
find = namespace.__getattr__

def refuse(self, name):
    if name in missing:
        raise AttributeError(name)
    return find(self, name)

namespace.__getattr__ = refuse
for operators in (torch.ops.aten, torch.ops.mkldnn):
    for name in missing & set(vars(operators)):
        delattr(operators, name)
del torch.utils.flop_counter.flop_registry
del torch.utils._python_dispatch.TorchDispatchMode

import goldenedit.model
from goldenedit import EditConfig, get_edit_model
from goldenedit.cost import measuring
from models import tiny_model, tiny_tokenizer

with measuring() as cost:
    torch.linalg.eigh(torch.eye(3))
assert cost().flops == 0 and cost().seconds > 0
config = EditConfig(layer="lga", contexts=2, covariance_tokens=200)
model = get_edit_model(tiny_model("llama"), config, tiny_tokenizer())
edit = model.edit("Angela Merkel was born in", "Angela Merkel", "Paris")
assert edit.facts[0].probability_after > edit.facts[0].probability_before
print("edited")
"""


def test_an_edit_needs_no_private_name_of_torch(tmp_path):
    environment = {**os.environ, "GOLDENEDIT_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITHOUT_PRIVATE_NAMES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "edited\n", done.stderr


def test_type_checkers_are_told_that_the_package_has_types():
    assert (resources.files("goldenedit") / "py.typed").is_file()


def test_every_public_name_is_there():
    scope: dict[str, object] = {}
    exec("from goldenedit import *", scope)
    assert set(goldenedit.__all__) <= set(scope)
    assert set(goldenedit.__all__) <= set(dir(goldenedit))
    assert len(set(goldenedit.__all__)) == len(goldenedit.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'goldenedit' has no attribute 'magic'"):
        _ = goldenedit.magic


def test_old_names_work_for_one_more_version_with_a_warning():
    sys.modules.pop("goldenedit.chat", None)
    with pytest.warns(FutureWarning, match=r"goldenedit\.lm\.chat"):
        from goldenedit.chat import rendered
    assert callable(rendered)
    with pytest.warns(FutureWarning, match="EDITORS"):
        from goldenedit.config import METHODS
    assert {"rome", "ft-m"} <= set(METHODS)
    with pytest.warns(FutureWarning, match="SELECTORS"):
        from goldenedit.config import SCORED_SELECTORS
    assert "lga" in SCORED_SELECTORS
    assert "random" not in SCORED_SELECTORS
