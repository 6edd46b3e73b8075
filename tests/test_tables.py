"""The tables that the command line prints."""

from __future__ import annotations

import re
from io import StringIO

import pytest
import torch
from rich.console import Console

from goldenedit import EditRequest
from goldenedit.audit import EditAudit, ModuleAudit
from goldenedit.commands.terminal import console
from goldenedit.editors import EDITORS, LowRankDelta
from goldenedit.evaluation.evaluate import Evaluation
from goldenedit.evaluation.report import FormScores, Share, Text, TextScores, UnchangedScores
from goldenedit.evaluation.scores import Measured, ProbabilityScores, TokenMatchScores
from goldenedit.evaluation.seen import Seen
from goldenedit.storage.folder import Edit, EditedFact
from goldenedit.tables import (
    audit_table,
    changes_rows,
    comparison_table,
    described_table,
    evaluation_table,
    facts_table,
    failures,
    general_table,
    options_table,
    printable,
    seen_table,
)


def printed(content: object, width: int = 200) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(content)
    return console.file.getvalue()


@pytest.mark.parametrize("control", ["\x1b]0;title\x07", "\x1b[2J", "\r", "\b", "\u202e", "\u2066", "\x9b"])
def test_control_characters_of_a_fact_do_not_reach_the_terminal(control):
    fact = EditedFact(EditRequest("The Louvre is in", "The Louvre", f"Rome{control}[red]!"), 0.1, 0.9, 1)
    output = printed(facts_table([Edit("edit_1", [fact], {})]))
    assert not set(control) & set("\x1b\x07\r\b\u202e\u2066\x9b") & set(output)
    assert "Rome\ufffd" in output
    assert "[red]!" in output


@pytest.mark.parametrize("text", ["two\nlines", "नक्‍षा", "می‌خواهم", "👩‍👩‍👧", "[bold]Köln[/bold]", "a\\b"])
def test_text_of_every_script_is_printed_verbatim(text):
    assert printed(printable(text)) == f"{text}\n"


@pytest.mark.parametrize(
    ("before", "after", "weakest", "shown"),
    [
        (0.060, 0.027, 0.027, "does not take: less likely than before"),
        (0.010, 0.3, 0.2, "does not take: still unlikely"),
        (0.010, 0.71, 0.12, "does not take: one token of the answer is unlikely"),
        (0.010, 0.71, 0.6, None),
        (0.9, 0.8, 0.8, None),
        (0.010, 0.71, None, None),
    ],
)
def test_a_fact_that_does_not_take_says_why(before, after, weakest, shown):
    fact = EditedFact(EditRequest("The Louvre is in", "The Louvre", "Rome"), before, after, 1, weakest)
    output = printed(facts_table([Edit("edit_1", [fact], {})]))
    assert fact.takes == (shown is None)
    assert (shown or "0.") in output
    assert ("does not take" in output) == (shown is not None)


@pytest.mark.parametrize(("weakest", "shown"), [(0.12, "0.710, weakest 0.120"), (0.71, "0.710 "), (None, "0.710 ")])
def test_the_probability_of_several_tokens_is_shown_with_the_weakest(weakest, shown):
    fact = EditedFact(EditRequest("The Louvre is in", "The Louvre", "Rome"), 0.01, 0.71, 1, weakest)
    output = printed(facts_table([Edit("edit_1", [fact], {})]))
    assert shown in output
    assert output.count("weakest 0") == output.count("weakest: that of") == ("weakest" in shown)


def test_of_many_facts_those_that_do_not_take_are_shown():
    request = EditRequest("The Louvre is in", "The Louvre", "Rome")
    facts = [EditedFact(request, 0.01, 0.2 if place == 2999 else 0.9, 1) for place in range(3000)]
    output = printed(facts_table([Edit("edit_1", facts, {})], most=5))
    assert output.count("The Louvre is in") == 5
    assert output.count("does not take") == 1
    assert "and 2995 more" in output
    assert printed(facts_table([Edit("edit_1", facts[:5], {})], most=5)).count("more") == 0


def test_changes_are_shown_by_layer_in_the_order_of_layers():
    one, two = (LowRankDelta(torch.ones(rank, 4), torch.ones(4, rank)) for rank in (1, 2))
    paths = [f"layers.{layer}.mlp.{name}" for layer in (10, 9) for name in ("down", "up")]
    edit = Edit("edit_1", [], {**dict.fromkeys(paths[:3], one), paths[3]: two})
    assert list(changes_rows([edit])) == [
        ("edit_1", "layers.9.mlp: down, up; rank 1, 2; norm 4.00, 8.00"),
        ("", "layers.10.mlp: down, up; rank 1; norm 4.00, 4.00"),
    ]
    modules = [ModuleAudit(path, 0.1, None) for path in paths]
    output = printed(audit_table([EditAudit("edit_1", modules, [], [], [])]))
    assert output.count("edit_1") == 1
    assert output.index(paths[3]) < output.index(paths[0])


def test_scores_of_the_harness_have_their_number_of_items():
    score = {"value": 0.5, "stderr": 0.05, "n": 100}
    group = {"value": None, "stderr": None, "n": None}
    output = printed(
        general_table({state: {"arc": {"acc": score}, "mmlu": {"acc": group}} for state in ("edited", "base")})
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "acc" in line]
    assert rows == [["arc", "acc", "100", "0.500 ± 0.050", "0.500 ± 0.050"], ["mmlu", "acc", "", "", ""]]


def evaluation(*texts: Text, form: str = "completion") -> Evaluation:
    """Return an evaluation of eight facts."""
    share, half = Share(0.75, 8), Share(0.5, 2)
    edited = Seen(
        says={form: FormScores(exact=half, contains=share)},
        in_prompt={form: FormScores(exact=half, contains=Share(1.0, 8))},
        unchanged={"subject": UnchangedScores(share, 32, 0.01, control=half, keyword=half, says_new=share)},
        text=TextScores(kl=0.002, agreement=0.97, tokens=100, worst=0.01, control=0.001),
    )
    base = Seen(says={form: FormScores(exact=half, contains=Share(0.25, 8))})
    return Evaluation({}, {}, edited, base, texts)


def rows(content: object) -> dict[str, list[str]]:
    """Return the cells of the rows of a table without lines, by their labels."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed(content).splitlines()]
    return {label: cells for label, *cells in lines}


def test_each_figure_stands_beside_its_own_number_of_facts_or_prompts():
    table = rows(seen_table(evaluation()))
    assert table["the edited prompt"] == ["0.75", "0.41-0.93", "0.25", "1.00", "8"]
    assert table["other questions about the edited subject"] == ["0.75", "0.41-0.93", "1.00", "0.50", "32"]
    assert table["keeps the key word"] == ["0.50", "0.09-0.91", "2"]  # the base model's answer has one for two facts
    assert table["says the new answer"] == ["0.75", "0.41-0.93", "8"]
    assert table["KL"] == ["0.002", "0", "0.001", "100"]


def test_no_row_of_an_evaluation_needs_the_docs():
    """Names of forms, kinds and scores are those of the API; people read words, and the terms that stay are told."""
    assert not {"completion", "subject", "unrelated", "exact"} & rows(seen_table(evaluation())).keys()
    output = " ".join(printed(seen_table(evaluation())).split())
    told = output[output.index("Shares from") :]
    assert all(f"{term}: " in told for term in ("95%", "base", "told", "random", "KL"))
    families = {
        "probability": Measured(
            ProbabilityScores(1.0, 1.0, 0.5, 0.8, 1.0, 2),
            dict.fromkeys(("efficacy", "paraphrase", "neighborhood", "score", "paraphrase_accuracy"), (0.0, 1.0)),
        ),
        "token_match": Measured(
            TokenMatchScores(1.0, 1.0, 1.0, 1.0, 2),
            dict.fromkeys(("rewrite", "rephrase", "portability", "locality"), (0.0, 1.0)),
        ),
    }
    output = printed(evaluation_table(Evaluation(families, families)))
    names = {name for measured in families.values() for name in measured.intervals} | set(families)
    assert all(f"{name.replace('_', ' ')}: " in output for name in names)


def test_paths_of_modules_are_not_cut():
    path = "model.language_model.layers.12.mlp.down_proj"
    with console.capture() as captured:
        console.print(audit_table([EditAudit("edit_1", [ModuleAudit(path, 0.1, 0.0)], [], [], [])]), width=80)
    cells = [line.split("│")[2].strip() for line in captured.get().splitlines() if line.count("│") == 5]
    assert path in "".join(cells)


def test_editors_are_described_and_each_option_is_named_once_and_whole():
    editors = [EDITORS.get(name) for name in ("memit", "pmet", "gated")]
    assert "gated (default)" in printed(described_table("editor", editors, "gated"))
    assert "MEMIT: the least-squares update" in printed(described_table("editor", editors, "gated"))
    options = printed(options_table(editors), width=80)
    for name in ("covariance_weight", "null_space_threshold"):
        assert options.count(name) == 1


def test_a_table_without_failures_has_no_column_for_them():
    taken, missed = (EditedFact(EditRequest("A is in", "A", "Rome"), 0.1, after, 1) for after in (0.9, 0.05))
    assert "takes" not in printed(facts_table([Edit("edit_1", [taken], {})]))
    both = printed(facts_table([Edit("edit_1", [taken, missed], {})]))
    assert "takes" in both
    assert "yes" in both


def test_a_negation_is_said_to_be_an_error_where_there_is_one():
    assert "saying the new answer is an error" in " ".join(printed(seen_table(evaluation(form="negation"))).split())
    assert "is an error" not in printed(seen_table(evaluation()))
    assert "(an error)" in printed(comparison_table(["a"], [evaluation(form="negation")]))


def test_edits_are_compared_beside_a_random_change():
    output = printed(comparison_table(["a", "[b]"], [evaluation(), evaluation()]))
    assert "[b]" in output
    assert output.count("0.75 (0.41 to 0.93), random 0.50") == 2
    assert output.count("0.002, random 0.001") == 2


def test_facts_that_are_not_said_are_named_once_by_their_prompts():
    def text(fact: int, kind: str, holds: bool) -> Text:
        return Text(fact, kind, f"{kind} {fact}", "", "Oslo", None, ("Rome",), holds)

    texts = [text(0, "completion", True), text(0, "chat", False), text(0, "negation", False), text(1, "chat", False)]
    assert list(failures(evaluation(*texts))) == [
        "The edited model does not say 1 of 2 facts:",
        "  'chat 1': expected 'Rome', got 'Oslo'",
        "It does not say 1 of the others where they are asked in another form:",
        "  chat: 'chat 0': expected 'Rome', got 'Oslo'",
    ]
    assert list(failures(evaluation(texts[0]))) == []
    message = Text(0, "chat", "completion 0", "", "Oslo", None, ("Rome",), False)
    assert list(failures(evaluation(texts[0], message)))[-1].startswith("Facts without a question are asked")
    many = list(failures(evaluation(*(text(fact, "completion", False) for fact in range(3000)))))
    assert len(many) == 7
    assert many[-1] == "  and 2995 more"


def test_words_between_colons_are_no_emoji():
    with console.capture() as captured:
        console.print(printable("Note :smile: it :warning:"))
    assert captured.get() == "Note :smile: it :warning:\n"
