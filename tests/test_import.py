"""`import goldenedit` is light, and says what it has."""

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
