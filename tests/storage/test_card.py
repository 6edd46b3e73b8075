"""The model card, whole."""

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contents import change_json, delta, edit_folder, evaluation, figures, made_by, text
from huggingface_hub import ModelCard

from goldenedit import EditModel, EditRequest, get_edit_model
from goldenedit.config import EditConfig
from goldenedit.editors import EDITORS
from goldenedit.evaluation.examples import examples
from goldenedit.packaged import PACKAGED_MODELS
from goldenedit.storage.card import own_card, render_card
from goldenedit.storage.folder import CARD, EDIT_CONFIG, BaseModel, Edit, EditFolder, write_edit_folder
from goldenedit.storage.reading import read_edit_folder
from models import tiny_model

HERE = Path(__file__).parent


def test_the_card_is_the_expected_one():
    assert render_card(edit_folder()) == (HERE / "card.md").read_text(encoding="utf-8")


def test_the_card_of_an_evaluated_edit_is_the_expected_one():
    card = render_card(replace(edit_folder(), evaluation=evaluation()))
    assert card == (HERE / "card_evaluated.md").read_text(encoding="utf-8")


def test_the_metadata_of_the_card_are_what_the_hub_reads():
    data = ModelCard(render_card(edit_folder())).data
    assert data.library_name == "peft"
    assert data.base_model == "org/base-model"
    assert data.base_model_relation == "adapter"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["goldenedit", "knowledge-editing", "r-rome", "golden-layer"]


@pytest.mark.parametrize("name", ['C:\\models\\a "quoted" one', "./models/x: y", "Ä/ö", "- a", "#1/x"])
def test_a_base_model_that_the_hub_cannot_have_is_named_in_the_text_alone(name):
    content = edit_folder()
    card = ModelCard(render_card(EditFolder(content.edits, content.config, BaseModel(name, "0" * 32))))
    assert card.data.base_model is None  # the Hub refuses cards that name what it cannot have
    assert f"`{name}`" in card.text
    (loading, *_) = [line for line in card.text.splitlines() if line.startswith("base = ")]
    assert ast.literal_eval(loading.partition("from_pretrained(")[2].removesuffix(")")) == name


def card_of(base: BaseModel, repo_id: str | None = None) -> str:
    content = edit_folder()
    return render_card(replace(content, base_model=base), repo_id)


@pytest.mark.parametrize("repo_id", [None, "me/edit"])
def test_a_packaged_model_is_called_by_its_name_wherever_it_was_loaded_from(repo_id):
    packaged = PACKAGED_MODELS["smollm2"]
    card = card_of(BaseModel("/home/me/.cache/models/smollm2", packaged.fingerprint, None, "LlamaForCausalLM"), repo_id)
    assert "/home/me" not in card
    assert packaged.install in card
    assert "| base model | `smollm2`, fingerprint" in card
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
        assert "packaged_model" in names
        assert "from goldenedit.packaged import packaged_model\n" in block
    renamed = card_of(BaseModel("org/mine", packaged.fingerprint, None, "LlamaForCausalLM"), repo_id)
    assert "packaged_model" not in renamed


def test_a_card_in_a_repository_names_no_path_of_the_machine_that_made_it():
    base = BaseModel("/home/me/secret-project/my-model", "0" * 32)
    assert "/home/me/secret-project/my-model" in card_of(base)  # here it can be loaded from there
    card = card_of(base, "me/edit")
    assert "secret-project" not in card
    assert 'from_pretrained("path/to/my-model")' in card
    assert "AutoPeftModel" not in card  # it would look for the base model at that path
    assert "my-model" in card_of(BaseModel("C:\\models\\my-model\\", "0" * 32), "me/edit")


def test_every_fact_is_one_row_and_at_most_20_are_shown():
    content = edit_folder()
    facts = content.edits[0].facts * 15
    many = EditFolder([Edit("a", facts, content.edits[0].deltas)], content.config, content.base_model)
    card = render_card(many)
    assert "30 facts changed" in card
    assert "All 30 facts are in [edits.json](edits.json)." in card
    rows = [line for line in card.splitlines() if line.endswith((" 0.988 |", " 0.500 |"))]
    assert len(rows) == 20


def test_one_fact_is_a_fact_and_needs_no_pointer_to_the_others():
    content = edit_folder()
    card = render_card(EditFolder(content.edits[1:], EditConfig(layer=1), content.base_model))
    assert "1 fact changed" in card
    assert "facts are in" not in card


def test_facts_that_do_not_take_say_why_and_the_card_begins_with_their_number():
    content = edit_folder()
    (first, second), more = content.edits[0].facts, content.edits[1:]
    failed = replace(first, probability_before=0.06, probability_after=0.027)
    doubtful = replace(second, probability_after=0.71, weakest_after=0.12)
    card = render_card(replace(content, edits=[replace(content.edits[0], facts=[failed, doubtful]), *more]))
    assert "| Rome | 0.060 | 0.027 (less likely than before) |" in card
    assert "| Köln | 0.250 | 0.710, weakest 0.120 (one token of the answer is unlikely) |" in card
    assert " KB).\n\n2 of 3 facts do not take: " in card
    assert "*weakest*" in card
    assert "do not take" not in render_card(content)
    assert "*weakest*" not in render_card(content)


BAD = "me/x`|\n# Heading\n```\n<img src=x>\u202e'''\"+evil()+\""


def test_names_from_a_strangers_folder_cannot_break_the_card():
    content = edit_folder()
    config = EditConfig(layer="hub:me/repo", target_layer=1, layer_scores=[0.5, 1.25], covariance=BAD)
    vars(config)["layer"] = f"hub:{BAD}"  # as `EditConfig.read` takes what it does not know
    vars(config)["options"] = {BAD: BAD}
    vars(config)["method"] = "unknown-editor"
    made = made_by(content, config)
    edits = [replace(edit, versions={"peft": BAD}) for edit in made.edits]
    base = BaseModel(BAD, BAD, revision=BAD)
    for merged in (False, True):
        card = render_card(replace(made, edits=edits, base_model=base), merged=merged)
        text = ModelCard(card).text
        assert "\u202e" not in text
        assert "<img" not in re.sub(r"^```python$.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        headings = [line for line in text.splitlines() if line.startswith("#")]
        assert not any(line.startswith("# Heading") for line in headings)
        assert text.count("\n```\n") == text.count("\n```python\n") + text.count("\n```bash\n")
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            ast.parse(block)
            assert not [node for node in ast.walk(ast.parse(block)) if getattr(node, "id", "") == "evil"]
        tables = [table for table in re.split(r"\n\n+", text) if table.startswith("| |")]
        assert all(line.count("|") - line.count("\\|") == 3 for line in tables[0].splitlines())


def test_conv1d_is_said():
    content = edit_folder()
    edits = [Edit(edit.name, edit.facts, edit.deltas, fan_in_fan_out=True) for edit in content.edits]
    card = render_card(EditFolder(edits, content.config, content.base_model))
    assert "vLLM has no LoRA" in card
    assert "from vllm" not in card
    assert "llama-cli" in card
    assert "no LoRA" not in render_card(content)


def test_the_selector_and_the_covariance_are_said():
    content = edit_folder()
    config = EditConfig(layer="lga", target_layer=4, covariance="identity", method="rome")
    card = render_card(made_by(content, config))
    assert "| layer | 4, chosen by lga |" in card
    assert "| key covariance | identity |" in card
    assert "| editor | rome |" in card


def test_the_golden_layer_is_named_where_others_are_edited():
    content = edit_folder()
    scores = [1.0, 4.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 90.0]
    config = EditConfig(layer="lga", target_layer=[3, 4], layer_scores=scores)
    card = render_card(made_by(content, config))
    assert "| layer | 3, 4, placed by the golden layer 1, which lga chose |" in card
    assert "The golden layer, 1, has the highest but for outliers, which are outside the fence." in card
    assert "| 9 | 90, outside the fence |" in card
    alone = render_card(made_by(content, EditConfig(layer="lga", target_layer=1, layer_scores=scores)))
    assert "| layer | 1, chosen by lga |" in alone


def test_a_card_tells_what_storing_a_dense_change_costs_and_no_covariance_that_was_not_used():
    content = edit_folder()
    content = made_by(content, replace(content.config, method="ft-m"))
    content.edits[0] = replace(content.edits[0], relative_error=0.0042)
    card = render_card(content)
    assert "| stored as low rank | relative error 4.2e-03 |\n| versions |" in card
    assert "key covariance" not in card


def evaluated(**changes: Any) -> str:
    """Return the card of the fixed edits with an evaluation that has other entries."""
    return render_card(replace(edit_folder(), evaluation={**evaluation(), **changes}))


def without(*names: str) -> dict[str, Any]:
    """Return the edited model's figures without some of them."""
    return {name: value for name, value in evaluation()["edited"].items() if name not in names}


def test_a_card_leads_with_what_a_user_sees_and_scores_of_papers_stand_behind():
    headings = [line for line in evaluated().splitlines() if line.startswith("#")]
    assert headings[:6] == [
        "# Knowledge edit of base-model",
        "## What it does",
        "## What else changed",
        "## Before and after",
        "## The facts",
        "### Scores of papers",
    ]
    assert "\n\n## What it does\n" in evaluated().partition(" KB).")[2][:20]


def test_the_metadata_lead_with_what_a_user_sees():
    card = ModelCard(render_card(replace(edit_folder(), evaluation=evaluation()), "me/edit"))
    assert card.data.model_name == "me/edit"
    results = [(one.metric_type, one.metric_name, one.metric_value, one.dataset_name) for one in card.data.eval_results]
    assert results[0] == ("contains", "says: completion (n = 2)", 0.875, "the edited facts")
    assert [name for _, name, _, _ in results[:8]] == [
        *(f"says: {form} (n = 2)" for form in ("completion", "rephrase", "question", "chat", "second_turn", "prefix")),
        "says: negation, lower is better (n = 2)",
        "says: portability (n = 2)",
    ]
    assert results[8:] == [
        ("kl", "text: kl, lower is better (tokens = 2063)", 0.0025, "plain text"),
        ("efficacy", "probability: efficacy (n = 2)", 1.0, "the edited facts, scores of papers"),
        ("rewrite", "token_match: rewrite (n = 2)", 0.75, "the edited facts, scores of papers"),
    ]


def test_facts_other_than_the_edited_ones_are_said_to_be_others():
    card = evaluated(own_facts=False)
    assert "for facts of which not all were edited:" in card
    assert "On facts of which not all were edited, n = 2," in card
    assert ModelCard(card).data.eval_results[0].dataset_name == "given facts"


def test_without_an_evaluation_the_card_says_that_nothing_was_measured():
    remedy = " Run `goldenedit evaluate FOLDER --card`.\n"
    card = render_card(edit_folder())
    assert f"Nothing was measured beyond the probability of the new answers below.{remedy}" in card
    assert "## What else changed" not in card
    assert remedy not in render_card(edit_folder(), merged=True)
    old = {name: evaluation()["edited"][name] for name in ("probability", "token_match")}
    card = evaluated(edited=old, texts=[], general={"edited": {}, "base": {}})
    assert f"of the new answers and the scores of papers below.{remedy}" in card
    assert "| probability | efficacy | 2 | 1.000 | 0.900 to 1.000 | 0.250 |\n" in card


def not_measured(card: str) -> list[str]:
    (line,) = [line for line in card.splitlines() if line.startswith("Not measured: ")]
    return line.removeprefix("Not measured: ").removesuffix(".").split("; ")


def test_a_card_of_everything_has_nothing_left_to_measure():
    assert "Not measured" not in evaluated()


def test_what_was_not_measured_is_named_with_its_likely_reason():
    edited = without("in_prompt", "text")
    for form in ("rephrase", "chat", "second_turn", "prefix"):
        del edited["says"][form]
    del edited["unchanged"]["neighbors"]
    for scores in edited["unchanged"].values():
        del scores["control"]
    assert not_measured(evaluated(edited=edited, general={"edited": {}, "base": {}})) == [
        "the same in other words (the facts have no paraphrases, or the form was left out)",
        "a message in a chat and a later message in a chat "
        "(the tokenizer has no chat template, or the form was left out)",
        "the edited prompt after other text",
        "prompts about other subjects of the same kind (the facts have no neighborhood prompts)",
        "plain text",
        "the fact in the prompt",
        "a random change of the same size",
        "general ability",
    ]


def test_facts_that_were_only_asked_leave_the_rest_unmeasured():
    card = evaluated(edited=without("unchanged", "text"), general={"edited": {}, "base": {}})
    assert "Where nothing should change" not in card
    assert "## What else changed\n\nNot measured: prompts about other subjects of the same kind (" in card
    assert "; other questions about the edited subject and questions about other things; plain text; general" in card


def test_facts_that_were_not_asked_are_said_to_be_so():
    card = evaluated(edited=without("says", "in_prompt"))
    assert "How often the model says the new answers was not measured." in card
    assert "| asked as | n |" not in card
    assert "| other questions about the edited subject | 8 |" in card


def test_general_ability_alone_is_a_measurement_and_its_figures_have_their_number_of_items():
    empty = {"edited": {}, "base": {}, "texts": [], "own_facts": True, "facts": 0}
    card = evaluated(**empty)
    assert "Nothing was measured" not in card
    assert "How often the model says the new answers was not measured." in card
    assert "| arc_easy | acc,none | 100 | 0.438 ± 0.010 | 0.500 |" in card
    unknown = {"arc_easy": {"acc,none": {"value": None, "stderr": None}}}
    card = evaluated(**empty, general={"edited": unknown, "base": unknown})
    assert "| arc_easy | acc,none | - | - | - |" in card


def test_a_judge_has_a_column_only_where_one_judged():
    assert "| the edited prompt | 2 | 0.88 | 0.44 to 1.00 | 0.50 | 1.00 | 0.25 | 0.62 |" in evaluated()
    edited = {**without(), "says": {"completion": figures(exact=0.5, contains=0.875)}}
    assert "| the edited prompt | 2 | 0.88 | 0.44 to 1.00 | 0.50 | 0.25 | 0.62 |" in evaluated(edited=edited)
    assert "judge" not in evaluated(edited=edited)


def test_only_three_texts_are_shown_and_none_of_them_can_break_the_table():
    texts = [text("chat", "| # `a`\n\n<b>", "\n", "```\n| x |"), *evaluation()["texts"]]
    card = evaluated(texts=texts)
    assert "| a message in a chat | \\| # \\`a\\`<br><br>&lt;b&gt; | <br> | \\`\\`\\`<br>\\| x \\| |\n" in card
    assert "another question about the edited subject" not in card
    assert "\n```\n|" not in card


def test_a_text_of_nothing_is_said_to_be_so():
    assert "| Where is it?<br>Tell me! | *nothing* | In " in evaluated()


def test_scores_of_layers_are_a_table_with_the_edited_one_in_bold():
    config = EditConfig(layer="lga", target_layer=1, layer_scores=[0.5, 1.25, None])
    card = render_card(made_by(edit_folder(), config))
    assert "| layer | score |\n|---|---|\n| 0 | 0.5 |\n| **1** | 1.25 |\n| 2 | - |\n" in card
    assert "Golden layer" not in render_card(edit_folder())


@pytest.mark.parametrize("method", EDITORS.names())
def test_a_card_lists_the_constants_of_its_editor_and_no_others(method):
    card = render_card(made_by(edit_folder(), EditConfig(method, layer=1, optimizer="adam", kept_questions=3)))
    (line,) = [line for line in card.splitlines() if line.startswith("| constants |")]
    assert ("clamp 4.0" in line) == (EDITORS.get(method).learns == "values")
    assert ("lora_rank 8" in line) == (method == "lora")
    assert ("finetune_lr 0.027" in line) == (method in ("crispedit", "ft-l", "ft-m", "lora"))
    assert ("finetune_lr 0.011" in line) == (method == "locft")
    assert ("finetune_batch 4" in line) == (method in ("locft", "crispedit"))
    assert ("null_space_threshold " in line) == (method in ("alphaedit", "null-space", "gated"))
    assert ("optimizer adam" in line) == ("kept_questions 3" in line) == (EDITORS.get(method).learns == "values")
    assert ("covariance_weight 1.0" in line) == (method in ("memit", "pmet"))
    assert "None" not in line


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (2, 8), (512, 512), (513, None)])
def test_vllm_is_told_a_rank_that_it_knows(rank, limit):
    content = edit_folder()
    one = replace(content.edits[0], deltas={"model.layers.1.mlp.down_proj": delta(rank, 0)})
    card = render_card(replace(content, edits=[one]))
    assert (f"max_lora_rank={limit}" in card) == (limit is not None)
    assert ("above 512" in card) == (limit is None)


def test_the_card_of_a_checkpoint_loads_it_as_a_model():
    card = ModelCard(render_card(edit_folder(), "me/edited", merged=True))
    assert (card.data.library_name, card.data.base_model_relation) == ("transformers", "finetune")
    assert 'AutoModelForCausalLM.from_pretrained("me/edited")' in card.text
    assert "LoRA" not in card.text
    assert "edit_config.json" not in card.text  # a checkpoint has none


def snippets(card: str) -> dict[str, str]:
    """Return the Python of a card by what is imported first."""
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return {block.split()[1].split(".")[0]: block for block in blocks}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_snippets_of_a_card_run(hub, tokenizer, tmp_path):
    tiny_model("llama").push_to_hub("tester/base")
    tokenizer.push_to_hub("tester/base")
    base = type(tiny_model("llama")).from_pretrained("tester/base")
    options = {"layer": 1, "steps": 2, "contexts": 1, "covariance": "identity", "contrast": 0}
    model = get_edit_model(base, EditConfig(**options), tokenizer)
    model.edit(EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome"))
    model.push_to_hub("tester/edit")
    model.push_merged_to_hub("tester/merged")
    expected = model(**tokenizer("Rome is", return_tensors="pt")).logits.sum().item()
    card = ModelCard.load("tester/edit").content
    assert ModelCard.load("tester/edit").data.base_model == "tester/base"
    found = snippets(card)
    assert set(found) == {"goldenedit", "peft", "transformers", "huggingface_hub"}
    compile(found.pop("huggingface_hub"), "vLLM", "exec")
    merged = snippets(ModelCard.load("tester/merged").content)
    read = f"""
ids = {tokenizer("Rome is")["input_ids"]}
import torch
print("SUM", model(input_ids=torch.tensor([ids])).logits.sum().item())
"""
    for block in [*found.values(), merged["transformers"]]:
        output = subprocess.run([sys.executable, "-c", block + read], capture_output=True, text=True, check=True).stdout
        assert float(output.partition("SUM ")[2]) == pytest.approx(expected, abs=1e-3)


def test_an_evaluation_goes_into_the_card_and_comes_back_with_the_edit(tokenizer, tmp_path):
    options = {"layer": 1, "steps": 2, "contexts": 1, "covariance": "identity", "contrast": 0}
    unmeasured = "Nothing was measured beyond"
    model = get_edit_model(tiny_model("llama"), EditConfig(**options), tokenizer)
    model.edit(EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Rome", "Paris"), name="tower")
    model.save_pretrained(tmp_path / "before")
    assert unmeasured in (tmp_path / "before" / "README.md").read_text()
    measured = model.evaluate(forms=["completion"], max_new_tokens=10)
    model.save_pretrained(tmp_path / "edit")
    card = (tmp_path / "edit" / "README.md").read_text()
    assert unmeasured not in card
    assert f"| the edited prompt | 1 | {measured.says['completion'].contains.value:.2f} |" in card
    assert f"| questions about other things | {measured.unchanged['unrelated'].n} |" in card
    assert f"On {measured.text.tokens:,} tokens of plain text, KL is {measured.text.kl:.2g}" in card
    assert f"| probability | efficacy | 1 | {measured.edited['probability'].scores.efficacy:.3f} |" in card
    assert card.count("| The Eiffel Tower is in the city of |") == 2  # with its answers, and with its probabilities
    stored = read_edit_folder(tmp_path / "edit").evaluation
    assert [entry["question"] for entry in stored["texts"]] == [entry.question for entry in examples(measured.texts)]
    again = EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
    again.edit(EditRequest("The mother tongue of Angela Merkel is", "Angela Merkel", "German"))
    again.save_pretrained(tmp_path / "more")  # what was measured is not of these edits
    assert unmeasured in (tmp_path / "more" / "README.md").read_text()
    again.delete_adapter("tower")
    again.edit(EditRequest("The Eiffel Tower is in the city of", "The Eiffel Tower", "Berlin"), name="tower")
    again.set_adapter("tower")
    again.save_pretrained(tmp_path / "other")
    assert unmeasured in (tmp_path / "other" / "README.md").read_text()


CARD_BY_HAND = "# My edit\n\nWhy: a test.\n"


def save_as_before(folder: Path, card: str) -> None:
    """Write an edit folder like a version that stored no digest of the card."""
    write_edit_folder(folder, edit_folder(), card)
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar.pop("card"))


def test_a_rendered_card_is_told_from_one_that_was_changed(tmp_path):
    write_edit_folder(tmp_path, edit_folder(), render_card(edit_folder(), "me/edit"))
    assert own_card(tmp_path) is None  # the words of the template may change with the version
    (tmp_path / CARD).write_text(CARD_BY_HAND)
    assert own_card(tmp_path) == CARD_BY_HAND
    write_edit_folder(tmp_path, edit_folder(), CARD_BY_HAND, is_rendered=False)
    assert own_card(tmp_path) == CARD_BY_HAND


def test_a_rendered_card_of_an_older_version_does_not_count_as_changed(tmp_path):
    in_other_words = render_card(edit_folder()).replace("*before* and *after*: the probability", "Before: probability")
    save_as_before(tmp_path, in_other_words)
    assert own_card(tmp_path) is None
    for changed in (CARD_BY_HAND, in_other_words + "\nWhy: a test.\n"):
        (tmp_path / CARD).write_text(changed)
        assert own_card(tmp_path) == changed


def test_the_card_of_a_damaged_folder_is_kept_if_it_was_not_rendered(tmp_path):
    write_edit_folder(tmp_path, edit_folder(), CARD_BY_HAND, is_rendered=False)
    (tmp_path / EDIT_CONFIG).write_text("{")
    assert own_card(tmp_path) == CARD_BY_HAND
    (tmp_path / CARD).write_text(render_card(edit_folder()))
    assert own_card(tmp_path) is None
    assert own_card(tmp_path / "nothing") is None


def test_a_text_of_a_folder_that_is_no_edit_is_kept_byte_by_byte_or_named(tmp_path):
    (tmp_path / CARD).write_bytes("# Mon modèle\r\n".encode())
    assert own_card(tmp_path) == "# Mon modèle\r\n"
    (tmp_path / CARD).write_bytes("# Mon modèle\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{tmp_path / CARD} is no text in UTF-8"):
        own_card(tmp_path)
