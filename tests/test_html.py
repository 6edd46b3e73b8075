"""What notebooks and `print` show of models, edits, selections and evaluations."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

import goldenedit
from goldenedit import EditConfig, EditModel, EditRequest
from goldenedit.html import Bar, table
from goldenedit.layer_scores import LayerSelection
from models import tiny_model, tiny_tokenizer
from tiny_edits import TOWER, fast_config

MARKUP = "<script>alert(1)</script>"


class Table(HTMLParser):
    """Collects the texts of cells, and fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags = [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def edited():
    config = fast_config(layer="lga", proxy_size=3)
    model = EditModel(tiny_model("llama"), config, tiny_tokenizer())
    model.select_layer()
    model.edit(TOWER, name="tower")
    model.edit(EditRequest("Berlin is a", "Berlin", MARKUP), name="markup")
    model.set_adapter("tower")
    return model


def test_texts_are_escaped_and_bars_are_drawn():
    shown = Table(table(("a", MARKUP), [(MARKUP, Bar(0.5)), ("b", Bar(7))], MARKUP, bold=[1]))
    assert "script" not in shown.tags
    assert shown.texts.count(MARKUP) == 3


def test_a_model_shows_its_edits(edited):
    text = repr(edited)
    assert "LlamaForCausalLM" in text
    assert "on  Edit('tower', 1 fact" in text
    assert "off Edit('markup', 1 fact" in text
    assert "Linear(" not in text
    assert {"tower", "markup", "on", "off"} <= set(Table(edited._repr_html_()).texts)
    assert "no edits" in repr(EditModel(tiny_model("llama"), EditConfig(layer=1), edited.tokenizer))


def test_an_edit_shows_its_facts(edited):
    texts = Table(edited.edits["markup"]._repr_html_()).texts
    assert MARKUP in texts
    assert "Berlin is a" in texts


def test_a_selection_shows_each_layer(edited):
    shown = Table(edited.layer_selection._repr_html_())
    assert {str(layer) for layer in range(edited.architecture.num_layers)} <= set(shown.texts)
    assert str(edited.layer_selection).startswith(f"Layer {edited.layer_selection.layers[0]}, chosen by lga")
    above = replace(edited.layer_selection, layers=[1, 2])
    assert str(above).startswith("Layers 1, 2, chosen by lga, whose golden layer is 0")


def test_a_golden_layer_is_told_by_the_fence_that_chose_it():
    scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0]
    wide = LayerSelection("lga", scores, [7])
    assert str(wide) == "Layer 7, chosen by lga"
    assert (wide.golden(), wide.golden(100.0)) == (6, 7)
    assert wide._repr_html_().count("outside the fence") == 1
    nothing = LayerSelection("lga", [None, None], [0, 1])
    assert nothing.golden() is None
    assert str(nothing) == "Layers 0, 1, chosen by lga"
    assert "table" in nothing._repr_html_()


def test_an_evaluation_shows_what_a_user_sees(edited):
    evaluation = edited.evaluate([TOWER], forms=["completion"])
    texts = Table(evaluation._repr_html_()).texts
    assert "completion" in texts
    assert f"{evaluation.text.agreement:.3f}" in texts
    verified = edited.edit(EditRequest("Rome is a", "Rome", "city"), name="verified", verify=True)
    assert "Rome is a" in Table(verified._repr_html_()).texts
    edited.delete_adapter("verified")


def test_an_attribute_that_does_not_exist_names_both_classes(edited):
    with pytest.raises(AttributeError, match="Neither EditModel nor its LlamaForCausalLM has an attribute 'foo'"):
        edited.foo  # noqa: B018


def test_the_package_lists_its_public_names_and_a_config_its_options():
    assert [name for name in dir(goldenedit) if not name.startswith("__")] == sorted(goldenedit.__all__)
    assert "kept_questions: Number of other questions about the subject" in EditConfig.__doc__
