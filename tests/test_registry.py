"""Registries: the names of what is built in, and of what installed packages declare."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from goldenedit import EditConfig, EditRequest, get_edit_model
from goldenedit.editors import EDITORS, Editor, editor
from goldenedit.layer_selection import SELECTORS, selector
from goldenedit.registry import Registry, UnknownNameError
from models import tiny_model
from plugins import install, restore_registries

EDITOR = """
from goldenedit.editors import LowRankDelta, editor

@editor("mine")
def mine(problem):
    keys = problem.keys
    return LowRankDelta((keys / keys.square().sum(0)).T, problem.residuals)
"""
SELECTOR = """
import torch
from goldenedit.layer_selection import selector

@selector("mine", needs_facts=False)
def mine(lm, facts, config):
    return torch.arange(lm.architecture.num_layers, dtype=torch.float64)
"""
FACT = EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome")


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    restore_registries(monkeypatch)


def test_the_built_in_parts_have_their_names():
    values = ["alphaedit", "emmet", "memit", "gated", "null-space", "pmet", "r-rome", "rome"]
    trained = ["crispedit", "ft-l", "ft-m", "locft", "lora"]
    selectors = ["auto", "causal_tracing", "key_response", "lga", "published", "random", "selectivity", "sweep"]
    assert sorted(EDITORS.names()) == sorted([*values, *trained, "ultraedit"])
    assert sorted(SELECTORS.names()) == selectors
    for registry in (EDITORS, SELECTORS):
        assert all(registry.get(name).name == name for name in registry.names())
        assert all(name in registry for name in registry.names())


@pytest.mark.parametrize(
    ("registry", "group"), [(EDITORS, "goldenedit.editors"), (SELECTORS, "goldenedit.layer_selectors")]
)
def test_an_unknown_name_is_told_with_those_that_there_are_and_where_others_are_declared(registry, group):
    assert "nobody" not in registry
    with pytest.raises(UnknownNameError, match=f"Unknown {registry.kind} 'nobody'") as raised:
        registry.get("nobody")
    assert f"(entry point '{group}')" in str(raised.value)
    assert all(repr(name) in str(raised.value) for name in registry.names())


def test_a_name_that_is_taken_is_refused_with_both_places():
    with pytest.raises(
        ValueError, match=r"editor 'rome' already exists in goldenedit\.editors\.rome\.rome.*test_registry"
    ):
        editor("rome")(lambda problem: None)
    with pytest.raises(
        ValueError, match=r"layer selector 'lga' already exists in goldenedit\.layer_selection\.lga\.lga"
    ):
        selector("lga")(lambda lm, facts, config: None)


def test_a_module_that_is_run_anew_may_register_its_functions_again():
    record = EDITORS.get("rome")
    again = Editor("rome", record.function, paper="another")
    EDITORS.add(again)
    assert EDITORS.get("rome") is again


@pytest.mark.parametrize(
    "name", ["", "Mine", "my own", "hub:mine", "a/b", "a,b", " mine", "mine\n", "_mine", "édit", "a+b"]
)
def test_names_that_configs_and_cards_could_not_tell_are_refused(name):
    with pytest.raises(ValueError, match=r"cannot name an editor\. Use lowercase letters"):
        editor(name)(lambda problem: None)


# ---------------------------------------------------------------------- other packages


def test_a_package_is_found_by_its_entry_point_and_imported_when_it_is_asked_for(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "package_of_mine", EDITOR, {EDITORS.group: {"mine": "package_of_mine"}})
    assert "mine" in EDITORS
    assert EDITORS.names()[-1] == "mine"
    assert "mine" not in SELECTORS
    assert "package_of_mine" not in sys.modules
    assert EDITORS.get("mine").function is sys.modules["package_of_mine"].mine


def test_an_entry_point_may_name_the_function_itself(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "selector_of_mine", SELECTOR, {SELECTORS.group: {"mine": "selector_of_mine:mine"}})
    assert SELECTORS.get("mine").function is sys.modules["selector_of_mine"].mine


def test_parts_of_other_packages_edit_and_select(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    install(tmp_path / "one", monkeypatch, "editor_that_edits", EDITOR, {EDITORS.group: {"mine": "editor_that_edits"}})
    install(
        tmp_path / "two", monkeypatch, "selector_of_last", SELECTOR, {SELECTORS.group: {"mine": "selector_of_last"}}
    )
    config = EditConfig("mine", layer="mine", contexts=2, steps=2, covariance="identity")
    model = get_edit_model(tiny_model("llama"), config, tokenizer)
    assert model.edit_config.layer_scores == [0.0, 1.0, 2.0]
    assert model.edit_config.target_layer == 2
    (delta,) = model.edit(FACT).deltas.values()
    assert delta.rank == 1
    assert torch.isfinite(delta.dense()).all()


def test_a_built_in_part_is_not_replaced_by_a_package(tmp_path, monkeypatch):
    built_in = EDITORS.get("rome")
    install(tmp_path, monkeypatch, "package_of_romans", EDITOR, {EDITORS.group: {"rome": "package_of_romans"}})
    assert EDITORS.get("rome") is built_in
    assert EDITORS.names().count("rome") == 1
    assert "package_of_romans" not in sys.modules


def test_a_package_that_cannot_be_imported_is_told_by_name(tmp_path, monkeypatch):
    source = "raise RuntimeError('no luck today')"
    install(tmp_path, monkeypatch, "package_that_fails", source, {EDITORS.group: {"mine": "package_that_fails"}})
    message = r"editor 'mine' of package_that_fails cannot be loaded \(RuntimeError: no luck today\)"
    with pytest.raises(ValueError, match=message):
        EDITORS.get("mine")
    with pytest.raises(ValueError, match=message):
        EditConfig("mine", layer=1)


@pytest.mark.parametrize("source", ["", EDITOR.replace('"mine"', '"yours"')], ids=["nothing", "another name"])
def test_a_package_that_does_not_add_what_it_declares_is_told_what_to_do(source, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "package_of_less", source, {EDITORS.group: {"mine": "package_of_less"}})
    with pytest.raises(ValueError, match=r"package_of_less declares the editor 'mine'.*decorator must have the same "):
        EDITORS.get("mine")


def test_a_broken_package_breaks_no_other(tmp_path, monkeypatch, caplog):
    for name, source in (("package_that_fails", "raise RuntimeError('no luck')"), ("package_that_works", EDITOR)):
        (tmp_path / name).mkdir()
        group = {EDITORS.group: {"mine" if source == EDITOR else "broken": name}}
        install(tmp_path / name, monkeypatch, name, source, group)
    assert EDITORS.get("mine").name == "mine"
    assert "mine" in [editor.name for editor in EDITORS.available()]
    assert "The editor 'broken' of package_that_fails cannot be loaded" in caplog.text
    assert EDITORS.find("broken") is None


def test_two_packages_with_one_name_are_told_and_not_chosen_between(tmp_path, monkeypatch):
    for name in ("package_one", "package_two"):
        (tmp_path / name).mkdir()
        install(tmp_path / name, monkeypatch, name, EDITOR, {EDITORS.group: {"mine": name}})
    with pytest.raises(ValueError, match=r"Two packages declare an editor 'mine': package_(one|two) and package_"):
        EDITORS.get("mine")


# ---------------------------------------------------------------------- a registry of its own


@dataclass(frozen=True)
class Part:
    """What a registry of a test holds."""

    name: str
    function: Any = None


def test_modules_of_the_package_are_imported_when_a_name_is_asked_for(tmp_path, monkeypatch):
    package = tmp_path / "package_of_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "b_part.py").write_text("import builtins; builtins.parts_of_a_test.add(builtins.part_of_a_test('b'))")
    (package / "a_part.py").write_text("import builtins; builtins.parts_of_a_test.add(builtins.part_of_a_test('a'))")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[Part] = Registry("part", "package_of_parts", "no.group.of.this.name")
    monkeypatch.setattr("builtins.parts_of_a_test", registry, raising=False)
    monkeypatch.setattr("builtins.part_of_a_test", Part, raising=False)
    assert "package_of_parts" not in sys.modules
    assert registry.names() == ["a", "b"]
    for name in ("package_of_parts", "package_of_parts.a_part", "package_of_parts.b_part"):
        monkeypatch.delitem(sys.modules, name)
