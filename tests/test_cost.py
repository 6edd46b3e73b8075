"""What a computation costs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from goldenedit import EditConfig, EditModel, cost
from goldenedit.cost import Cost, _formulas, announcing, measuring, phase, product_speed, profiling, showing_phases
from models import VOCAB_SIZE, tiny_model


def test_products_count_two_operations_a_multiplication():
    with measuring() as cost, torch.no_grad():
        nn.Linear(3, 5, bias=False)(torch.ones(7, 3))
        torch.ones(2, 4, 3) @ torch.ones(2, 3, 6)
        assert cost().flops == 2 * 7 * 3 * 5 + 2 * 2 * 4 * 3 * 6
    assert cost().flops == 2 * 7 * 3 * 5 + 2 * 2 * 4 * 3 * 6


def test_a_backward_by_grad_counts_once_more_for_what_is_asked():
    x = torch.ones(7, 3, requires_grad=True)
    linear = nn.Linear(3, 5, bias=False).requires_grad_(False)
    with measuring() as cost:
        torch.autograd.grad(linear(x).sum(), x)
    assert cost().flops == 2 * (2 * 7 * 3 * 5)


def test_attention_counts_its_two_products_and_five_backward():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with measuring() as cost:
        output = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        forward = cost().flops
        torch.autograd.grad(output.sum(), q)
    assert forward == 2 * (2 * 2 * 5 * 5 * 8)
    assert cost().flops == forward + 5 * (2 * 2 * 5 * 5 * 8)


def test_keys_may_have_fewer_heads_than_queries():
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8)
    formula = _formulas()[torch.ops.aten._scaled_dot_product_flash_attention]
    assert formula(query, key, key, out_val=None) == 2 * (2 * 4 * 5 * 7 * 8)


@torch.no_grad()
def test_a_forward_costs_about_two_operations_a_weight_and_token():
    model = tiny_model("llama")
    ids = torch.randint(VOCAB_SIZE, (2, 9))
    with measuring() as cost:
        model(input_ids=ids)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert cost().flops == pytest.approx(2 * weights * ids.numel(), rel=0.2)


def test_seconds_stop_with_the_context_and_costs_add_up():
    with measuring() as cost:
        pass
    first = cost()
    torch.ones(300, 300) @ torch.ones(300, 300)
    assert cost() == first
    assert first + Cost(1.0, 5) == Cost(first.seconds + 1.0, 5)
    assert first.seconds >= 0


def test_factorisations_and_solves_count_by_the_textbook():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix @ matrix.T + torch.eye(6)
    for run, flops in (
        (lambda: torch.linalg.cholesky(matrix), 6**3 // 3),
        (lambda: torch.cholesky_solve(torch.ones(6, 2).double(), matrix), 2 * 6 * 6 * 2),
        (lambda: torch.linalg.solve(matrix, torch.ones(6, 2).double()), 2 * 6**3 // 3 + 2 * 6 * 6 * 2),
        (lambda: torch.linalg.solve_triangular(matrix, torch.ones(6, 2).double(), upper=True), 6 * 6 * 2),
        (lambda: torch.linalg.eigh(matrix), 9 * 6**3),
    ):
        with measuring() as cost:
            run()
        assert cost().flops == flops


@pytest.mark.parametrize("name", ["aten._linalg_eigh", "aten._scaled_dot_product_flash_attention_for_cpu"])
def test_an_operator_that_torch_does_not_have_is_not_counted(name, monkeypatch):
    monkeypatch.setitem(cost._FORMULAS, f"{name}_renamed", cost._FORMULAS[name])
    monkeypatch.delitem(cost._FORMULAS, name)
    formulas = cost._formulas.__wrapped__()
    assert torch.ops.aten.linalg_cholesky_ex in formulas
    assert torch.ops.aten.mm in formulas


def test_a_formula_that_does_not_fit_an_operator_does_no_harm(monkeypatch):
    def refuse(*_: object, **__: object) -> int:
        raise TypeError("one argument too many")

    monkeypatch.setattr(cost, "_formulas", lambda: {torch.ops.aten.mm: refuse})
    with measuring() as spent:
        product = torch.ones(2, 3) @ torch.ones(3, 4)
    assert torch.equal(product, torch.full((2, 4), 3.0))
    assert spent().flops == 0


def test_where_nothing_can_be_counted_a_selection_costs_no_forwards(tokenizer, monkeypatch):
    monkeypatch.setattr(cost, "_counter_class", lambda: cost._NoCounter)
    edited = EditModel(tiny_model("llama"), EditConfig(layer="lga"), tokenizer)
    edited.select_layer()
    assert edited.layer_selection.cost.flops == edited.layer_selection.forward_equivalents == 0
    assert edited.layer_selection.cost.seconds > 0


def test_phases_are_counted_where_somebody_asks_and_once():
    def work():
        with phase("outer"):
            torch.ones(2, 3) @ torch.ones(3, 4)
            with phase("inner"):
                torch.ones(2, 3) @ torch.ones(3, 4)

    work()
    with profiling() as phases:
        work()
        work()
        with phase("other"):
            pass
    work()
    assert {name: cost.flops for name, cost in phases.items()} == {"outer": 4 * 48, "other": 0}


@pytest.mark.parametrize(
    "asks",
    [
        {"phrasings": "none", "kept_questions": 0},
        pytest.param(
            {"phrasings": "auto", "kept_questions": 2},
        ),
    ],
    ids=["prompts alone", "with questions"],
)
def test_the_phases_of_an_edit_are_all_of_it(asks, tokenizer):
    config = EditConfig(
        method="r-rome",
        layer="lga",
        layer_pattern="golden",
        contexts=2,
        contrast=4,
        covariance_tokens=200,
        optimizer="normalized",
        flat_directions=True,
        **asks,
    )
    edited = EditModel(tiny_model("llama"), config, tokenizer)
    with profiling() as phases, measuring() as cost:
        edited.edit("Angela Merkel was born in", "Angela Merkel", "Paris")
    expected = [
        "layer selection",
        "key statistics",
        "output gradients",
        "contexts",
        "values",
        "contrast keys",
        "solve",
        "check",
    ]
    assert [name for name in phases if name in expected] == expected
    # The values are optimized under the solved change, so that little is left to solve.
    assert all(phases[name].flops for name in expected if name != "solve")
    assert sum(one.flops for one in phases.values()) == pytest.approx(cost().flops, rel=0.01)


def test_each_phase_that_begins_is_announced():
    told: list[str] = []
    with announcing(told.append), phase("one"), phase("two"):
        pass
    with phase("three"):
        pass
    assert told == ["one", "two"]


def test_a_phase_is_shown_in_its_words_on_a_terminal_unless_it_is_announced(capsys, monkeypatch):
    with showing_phases(), phase("gates"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with showing_phases(), phase("gates"), phase("unknown"):
        pass
    assert "Teaching when to answer ..." in capsys.readouterr().err
    with announcing(lambda phase: None), showing_phases(), phase("gates"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_speed_of_a_product_needs_no_memory_for_the_widest_of_maps(dtype):
    assert product_speed(1 << 30, 1, dtype) > 0
