"""What the neurons that give answers learn from: the texts about a subject, and where the neurons respond."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from goldenedit import EditConfig, EditRequest
from goldenedit.editing import answering as module
from goldenedit.editing.answering import AskedSubject, texts_about
from goldenedit.editing.gated import marker_start, marking, neurons_for
from goldenedit.editing.gates import inputs_of
from goldenedit.editing.prepared import prepare_neurons
from goldenedit.editing.wordings import asked, rephrasings_of
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.rephrasing import expanded, properties
from goldenedit.requests import ChatText
from goldenedit.subject_questions import names_like
from models import TRAINING_TEXTS
from tiny_edits import MERKEL, TOWER
from zoo import zoo_model

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ARCHITECT = EditRequest("The architect of The Eiffel Tower is", "The Eiffel Tower", "Angela Merkel")
CHAT = EditRequest(
    None, "The Eiffel Tower", "Rome", messages=[{"role": "user", "content": "Where is The Eiffel Tower?"}]
)
CONTEXTS = ["", "Therefore. "]


def repr_of(request: EditRequest) -> str:
    """Return a short name of a request."""
    return f"{request.shown} {len(request.prompts)}"


def language_model(tokenizer, chat=True, width=64) -> LanguageModel:
    """Return a random model that takes wordings in a later turn of a chat."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE if chat else None
    model = zoo_model("llama", width=width)
    model.config.max_position_embeddings = 512
    return LanguageModel(model, tokenizer)


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "plain"])
def lm(request, tokenizer) -> LanguageModel:
    return language_model(tokenizer, request.param)


@pytest.fixture(scope="module")
def chat(tokenizer) -> LanguageModel:
    return language_model(tokenizer)


def about(lm, *requests, contexts=CONTEXTS, earlier=(), **options) -> AskedSubject:
    """Return the texts about the one subject of requests."""
    (subject,) = texts_about(lm, requests, EditConfig(layer=1, **options), contexts, earlier).subjects
    return subject


def decoded(lm: LanguageModel, tokens: Sequence[int]) -> str:
    return lm.tokenizer.decode(list(tokens))


def read(lm: LanguageModel, text: str) -> str:
    """Return a text as its tokens spell it: the tiny tokenizer does not know all characters."""
    return decoded(lm, lm.tokenizer(text)["input_ids"])


def every_wording(fact) -> list:
    """Return the wordings of a fact of all kinds."""
    return [answer for of_kind in fact.wordings for answer in of_kind]


def prompts(lm: LanguageModel, answers) -> list[str]:
    return [decoded(lm, answer.row.input_ids[: answer.row.reads[0] + 1]) for answer in answers]


def is_chat(lm: LanguageModel, text: str) -> bool:
    return text.startswith(read(lm, "user:"))


def assert_behind_contexts(found: Sequence[str], texts: Sequence[str]) -> None:
    """Check that each text is there behind the contexts, and behind some longer ones."""
    each = len(found) // len(texts)
    for index, text in enumerate(text.format("The Eiffel Tower") for text in texts):
        plain, longer = found[index * each :][: len(CONTEXTS)], found[index * each :][len(CONTEXTS) : each]
        assert plain == [context + text for context in CONTEXTS]
        assert longer
        assert all(prompt.endswith(f". {text}") and len(prompt) > len(plain[-1]) for prompt in longer)


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize("request_", [TOWER, replace(TOWER, prompts=("One finds {} in",)), ARCHITECT], ids=repr_of)
def test_the_first_wording_is_the_bare_prompt_and_the_others_are_ordered_by_kind(request_, lm):
    (fact,) = about(lm, request_).facts
    own, *others = fact.wordings
    assert_behind_contexts(prompts(lm, own), [request_.text, *request_.prompts])
    for of_kind in others[:-1]:  # those of the last begin an answer, in a chat or not
        assert len({is_chat(lm, text) for text in prompts(lm, of_kind)}) == 1
    every = prompts(lm, every_wording(fact))
    assert len(set(every)) == len(every)
    assert any(is_chat(lm, text) for text in every) == bool(lm.tokenizer.chat_template)
    question = asked(lm.tokenizer, request_)[0].text
    assert read(lm, question) in every


def test_without_phrasings_only_the_own_prompts_are_taught(lm):
    (fact,) = about(lm, replace(TOWER, prompts=("One finds {} in",)), phrasings="none").facts
    (own,) = fact.wordings
    assert_behind_contexts(prompts(lm, own), [TOWER.text, "One finds {} in"])


def test_longer_contexts_are_left_out_where_the_model_has_no_room_for_them(tokenizer):
    lm = language_model(tokenizer)
    lm.model.config.max_position_embeddings = 64
    request = replace(TOWER, prompt=f"In the year of this story, as in all others, {TOWER.text}")
    (fact,) = about(lm, request, phrasings="none").facts
    found = prompts(lm, fact.wordings[0])
    assert found[: len(CONTEXTS)] == [context + request.text for context in CONTEXTS]
    assert len(found) < len(CONTEXTS) + 5
    assert all(len(answer.row.input_ids) <= 64 for answer in every_wording(fact))


@pytest.mark.parametrize("request_", [TOWER, CHAT, replace(CHAT, prompts=("In which city is {}?",))], ids=repr_of)
def test_what_is_taught_begins_with_the_new_answer_and_ends_the_turn_of_a_chat(request_, chat):
    (fact,) = about(chat, request_).facts
    assert len(every_wording(fact)) > 2
    for answer, prompt in zip(every_wording(fact), prompts(chat, every_wording(fact)), strict=True):
        target = [answer.row.input_ids[place] for place in answer.row.target]
        assert answer.core.start == 0
        assert decoded(chat, target[: len(answer.core)]).strip() == "Rome"
        rest = decoded(chat, target[len(answer.core) :])
        is_question = prompt.startswith((read(chat, "Q:"), read(chat, "user:")))
        is_begun = is_question and not prompt.rstrip().endswith((read(chat, "A:"), read(chat, "assistant:")))
        assert rest == ("." if is_begun else "") + ("<eos>" if is_chat(chat, prompt) else "")


def test_a_conversation_is_taught_as_it_is_and_in_a_later_turn(chat):
    own, other = about(chat, CHAT, contexts=[""]).facts[0].wordings
    (bare,), (later,) = prompts(chat, own), prompts(chat, other)
    assert bare == read(chat, rendered(chat.tokenizer, CHAT).text).rstrip()
    assert later.endswith(bare)
    assert len(later) > len(bare)


@pytest.mark.parametrize("request_", [TOWER, MERKEL, ARCHITECT, CHAT], ids=repr_of)
def test_neighbors_are_the_same_prompts_and_do_not_name_the_subject(request_, chat):
    (fact,) = about(chat, request_).facts
    name = request_.subject.removeprefix("The ")
    assert len(fact.neighbors) == len(fact.wordings)
    every = [text.rstrip() for text in prompts(chat, every_wording(fact))]
    wordings = {text.replace(f"The {name}", name).replace(f"the {name}", name) for text in every}
    others = [read(chat, other) for other in names_like("any", request_.subject, 1_000)]
    neighbors = [decoded(chat, tokens) for of_kind in fact.neighbors for tokens in of_kind]
    assert min(map(len, fact.neighbors)) >= 10  # of every kind
    for text in neighbors:
        assert name.casefold() not in text.casefold()
        assert any(other in text and text.replace(other, name).rstrip() in wordings for other in others), text


def other_prompts(lm: LanguageModel, subject: AskedSubject) -> list[str]:
    return [decoded(lm, row.input_ids[: row.subject + 1]) for row in subject.others]


def other_texts(lm: LanguageModel, *facts: EditRequest, **options) -> list[str]:
    return other_prompts(lm, about(lm, *facts, **options))


# Each asks for a property whose packaged texts share no word with it, or only some of them.
HIDDEN = [
    "{} hails from the town of",
    "{}, situated at",
    "The mother tongue of {} is",
    "{} is in the city of",
    "Who gave birth to {}?",
    "Who heads {}?",
]


@pytest.mark.parametrize("prompt", HIDDEN)
def test_other_prompts_do_not_ask_for_an_edited_property_in_other_words(prompt, lm):
    fact = EditRequest(prompt, "Angela Merkel", "Rome")
    found = rephrasings_of(fact)
    texts = [read(lm, text) for text in ((*found.questions, *found.statements) if found else ())]
    others = other_texts(lm, fact)
    assert len(others) > 60
    for other in others:
        assert "Angela Merkel" in other
        assert not any(text in other for text in texts), other


def test_no_packaged_wording_of_a_property_has_its_property_among_the_others(chat):
    for entry in properties()[::25]:  # of all kinds
        text = expanded(entry.patterns[-1])[-1]
        new = {"time": "1900", "language": "French"}.get(entry.answer, "Rome")
        fact = EditRequest(text, "Angela Merkel", new)
        found = rephrasings_of(fact)
        if found is None:  # the pattern belongs to more than one property
            continue
        others = other_texts(chat, fact, phrasings="none", kept_questions=0, contexts=[""])
        for asking in (found.questions[:1], found.statements[:1]):
            assert not any(read(chat, wording) in other for wording in asking for other in others), (text, asking)


def test_other_prompts_do_not_ask_for_any_of_several_facts(lm, monkeypatch):
    monkeypatch.setattr(module, "_OTHER_PROPERTIES", len(properties()))
    facts = [TOWER, replace(ARCHITECT, target_new="Rome")]
    texts = [read(lm, text) for fact in facts for text in rephrasings_of(fact).questions]
    together = other_texts(lm, *facts)
    assert not any(text in other for text in texts for other in together)
    alone = other_texts(lm, TOWER)
    assert any("architect" in other for other in alone)
    assert not any("architect" in other for other in together)


def test_texts_that_measure_an_edit_are_not_taught(chat):
    unmeasured = about(chat, TOWER)
    found = rephrasings_of(TOWER)
    measured = {
        "question": found.questions[0],
        "paraphrases": (found.statements[0], found.questions[1]),
        "generation": (found.statements[1],),
        "locality": ((found.statements[2], "Paris"),),
    }
    texts = [read(chat, text) for text in (*found.questions[:2], *found.statements[:3])]
    (fact,) = about(chat, replace(TOWER, **measured)).facts
    before, after = (prompts(chat, every_wording(of)) for of in (unmeasured.facts[0], fact))
    for text in texts:
        assert any(text in prompt for prompt in before)
        assert not any(text in prompt for prompt in after)
    assert len(after) > 10


@torch.no_grad()
def test_answers_to_what_asks_for_no_property_are_read_from_where_they_are_due(lm):
    others = about(lm, TOWER).others
    answered = [row for row in others if row.kept]
    assert 0 < len(answered) < len(others) / 2
    for row in answered:
        assert row.kept == tuple(range(row.subject, len(row.input_ids) - 1))
        prompt, said = row.input_ids[: row.subject + 1], row.input_ids[row.subject + 1 :]
        (written,) = lm.answers([ChatText(decoded(lm, prompt))], len(said), None)
        assert tuple(written.tokens) == said
    assert all(row.subject == len(row.input_ids) - 1 for row in others if not row.kept)


def test_what_follows_an_answer_is_what_the_model_writes_behind_it(lm):
    (fact,) = about(lm, TOWER).facts
    assert fact.following
    begun = {answer.row.input_ids[: answer.row.target[answer.core[-1]] + 1] for answer in every_wording(fact)}
    for kept in fact.following:
        row = kept.row
        assert row.input_ids[: row.subject + 1] in begun
        logits = lm.model(input_ids=torch.tensor([row.input_ids])).logits[0]
        assert row.reads == list(range(row.subject, len(row.input_ids) - 1))
        assert logits[row.reads].argmax(-1).tolist() == list(row.input_ids[row.subject + 1 :])


def test_a_marker_is_optimized_where_some_wordings_of_each_fact_are_due(lm):
    subject = about(lm, TOWER, ARCHITECT)
    mentioned = subject.mentions
    for of_fact, fact in zip(mentioned.answers, subject.facts, strict=True):
        assert of_fact[0] is fact.wordings[0][0]
        assert len({id(answer) for answer in of_fact}) == len(of_fact) == 7
        counts = [sum(answer in of_kind for answer in of_fact) for of_kind in fact.wordings]
        assert sum(counts) == 7
        assert min(counts) >= 1  # of every kind
    answers = [answer for of_fact in mentioned.answers for answer in of_fact]
    for row, answer in zip(subject.due, answers, strict=True):
        assert row.input_ids == answer.row.input_ids[: answer.row.target[0]]
        assert row.reads == [len(row.input_ids) - 1]
        assert row.subject == answer.row.subject


def test_a_marker_of_many_facts_is_optimized_on_all_kinds_of_wordings(chat):
    facts = [replace(TOWER, prompt=text) for text in ("{} is in", "{} was built by", "{} is made of", "{} opened in")]
    subject = about(chat, *facts, ARCHITECT)
    chosen = prompts(chat, [answer for of_fact in subject.mentions.answers for answer in of_fact])
    assert any(text.count(read(chat, "user:")) > 1 for text in chosen)  # in a later turn
    assert any(text.count(read(chat, "user:")) == 1 for text in chosen)
    assert any(read(chat, "Q:") in text for text in chosen)
    assert sum(not is_chat(chat, text) for text in chosen) > len(facts)


def test_an_answer_is_optimized_from_where_it_is_due_on(lm):
    subject = about(lm, TOWER, ARCHITECT)
    for rows, fact in zip(subject.taught, subject.facts, strict=True):
        (answers,) = rows.answers
        ids = [answer.row.input_ids for answer in every_wording(fact)]
        assert answers[0].row.input_ids == ids[0]  # the bare prompt
        assert len({answer.row.input_ids for answer in answers} & set(ids)) == len(answers) == min(24, len(ids))
        assert all(answer.row.subject == answer.row.reads[0] for answer in answers)
        assert answers[0].strength == 1.0
        assert min(answer.strength for answer in answers) < 1 < max(answer.strength for answer in answers)
        assert rows.kept == fact.following
        assert rows.name == "'The Eiffel Tower' -> 'Rome', 'Angela Merkel'"


def test_facts_belong_to_their_subjects_or_each_stands_alone(lm):
    requests = [TOWER, MERKEL, ARCHITECT]
    config = EditConfig(layer=1, phrasings="none", kept_questions=0)
    joint = texts_about(lm, requests, config, [""])
    assert joint.groups == [[0, 2], [1]]
    assert [len(subject.facts) for subject in joint.subjects] == [2, 1]
    alone = texts_about(lm, requests, config, [""], joint=False)
    assert alone.groups == [[0], [1], [2]]
    found = [prompts(lm, every_wording(subject.facts[0])) for subject in alone.subjects]
    assert found == [[request.text] for request in requests]


def test_earlier_facts_about_the_subject_are_kept_and_not_taught_again(lm):
    subject = about(lm, ARCHITECT, earlier=[TOWER, MERKEL])
    plain = about(lm, ARCHITECT)
    assert [prompts(lm, every_wording(fact)) for fact in subject.facts] == [
        prompts(lm, every_wording(fact)) for fact in plain.facts
    ]
    texts = [(decoded(lm, kept.row.input_ids), kept.row) for kept in subject.kept]
    told = [row for text, row in texts if text.startswith(f"{TOWER.text} Rome")]
    assert [decoded(lm, [row.input_ids[place + 1] for place in row.reads]).strip() for row in told] == ["Rome"]
    assert not any("Merkel is" in text for text, _ in texts)  # of another subject
    others = other_prompts(lm, subject)
    assert TOWER.text in others
    assert TOWER.text not in other_prompts(lm, plain)


def test_what_asks_for_facts_about_other_subjects_is_asked_of_this_one_too(lm):
    subject = about(lm, ARCHITECT, earlier=[TOWER, MERKEL])
    texts = [decoded(lm, row.input_ids) for row in subject.leaks]
    name = "The Eiffel Tower"
    assert MERKEL.text.replace(MERKEL.subject, name) in texts
    assert len(texts) == 1 + len(asked(lm.tokenizer, MERKEL))
    for text, row in zip(texts, subject.leaks, strict=True):
        assert MERKEL.subject not in text
        assert decoded(lm, row.input_ids[: row.subject + 1]).endswith(name)
        assert row.reads == [len(row.input_ids) - 1]
    assert subject.beside == [MERKEL.subject]
    plain = about(lm, ARCHITECT, earlier=[TOWER])
    assert not plain.leaks
    assert not plain.beside


def test_facts_about_other_subjects_that_cannot_be_asked_refuse_no_edit(lm):
    unread = EditRequest(None, "Ada Lovelace", "Rome", messages=[{"role": "user", "content": "Where is Ada Lovelace?"}])
    long = replace(MERKEL, prompt="Angela Merkel is " + "in the city " * 200)
    subject = about(lm, TOWER, earlier=[unread, long, MERKEL])
    assert any("native" in text or "tongue" in text for text in (decoded(lm, row.input_ids) for row in subject.leaks))
    assert all(len(row.input_ids) <= 512 for row in subject.leaks)


def test_of_many_facts_about_other_subjects_some_are_asked(lm):
    earlier = [replace(MERKEL, prompt=text) for text in ("{} is in", "{} was built by", "{} is made of", "{} likes")]
    earlier += [replace(fact, subject=name) for fact in earlier for name in ("Ada Lovelace", "Marie Curie", "Li Bai")]
    subject = about(lm, TOWER, earlier=earlier)
    assert len(subject.leaks) == 12
    texts = [decoded(lm, row.input_ids) for row in subject.leaks]
    assert any(read(lm, "Q:") in text for text in texts)  # in several forms
    assert not all(read(lm, "Q:") in text or is_chat(lm, text) for text in texts)
    assert set(subject.beside) == {"Angela Merkel", "Ada Lovelace", "Marie Curie", "Li Bai"}


def test_a_request_that_is_too_long_is_refused_before_any_answer_is_asked_for(chat):
    with pytest.raises(ValueError, match="but the model takes 512"):
        about(chat, replace(TOWER, prompt="The Eiffel Tower is " + "in the city " * 200))


# ---------------------------------------------------------------------- gates


class Answering:
    """Gates of three facts about two subjects, in a model that is wide enough to tell them from other text."""

    def __init__(self, tokenizer) -> None:
        self.lm = lm = language_model(tokenizer, chat=False, width=512)
        requests = [TOWER, ARCHITECT, MERKEL]
        config = EditConfig(layer=1, covariance_tokens=6_000, steps=1)
        spare = neurons_for(lm, config, 2, 3)
        texts = texts_about(lm, requests, config, CONTEXTS)
        self.subjects = texts.subjects
        gated = prepare_neurons(lm, requests, config, texts, spare, marker_start(lm, config)).gated
        self.marked = marking(lm, gated.gates, [0, 1], gated.markers)
        self.gates = gated.answering
        self.facts = [fact for subject in self.subjects for fact in subject.facts]

    def marking(self):
        return self.lm.architecture.adding_deltas(self.lm.model, self.marked)

    def responses(self, fact: int, rows, marked=True) -> list[torch.Tensor]:
        """Return what the neuron of a fact responds at all tokens, by row."""
        site = self.lm.model.get_submodule(self.gates.spare.neurons.gate.path)
        with self.marking() if marked else nullcontext():
            (x,) = inputs_of(self.lm, [list(row) for row in rows], [site])
        products = (x @ self.gates.gates[fact]).clamp(min=0) * (x @ self.gates.ups[fact])
        return list(products.split([len(row) for row in rows]))

    def due(self, fact: int, neuron: int, marked=True) -> list[torch.Tensor]:
        """Return by wording what a neuron responds where a fact's answer is due."""
        answers = every_wording(self.facts[fact])
        found = self.responses(neuron, [answer.row.input_ids for answer in answers], marked)
        places = [[answer.row.reads[place] for place in answer.core] for answer in answers]
        return [response[of_row] for response, of_row in zip(found, places, strict=True)]


@pytest.fixture(scope="module")
def answering(tokenizer):
    return Answering(tokenizer)


def closed(responses: Sequence[torch.Tensor]) -> float:
    """Return the share of responses that are next to none."""
    return (torch.cat(list(responses)).abs() < 0.1).float().mean().item()


def test_the_neuron_of_a_fact_responds_where_its_answer_is_due(answering):
    assert len(answering.gates.gates) == len(answering.facts) == 3
    for fact in range(3):
        responses = torch.cat(answering.due(fact, fact))
        assert responses.mean() > 0.5
        assert (responses > 0.3).float().mean() > 0.75


def test_it_is_closed_at_nearly_all_tokens_of_other_prompts_neighbors_and_plain_text(answering):
    texts = [answering.lm.tokenizer(text)["input_ids"] for text in TRAINING_TEXTS]
    for index, fact in enumerate(answering.facts):
        prompts = [row.input_ids[: row.subject + 1] for row in answering.subjects[index // 2].others]
        others = answering.responses(index, prompts)
        neighbors = answering.responses(index, [tokens for of_kind in fact.neighbors for tokens in of_kind])
        assert closed(others) > 0.85
        assert closed([response[-1:] for response in others]) > 0.85  # where another answer is due
        assert closed(neighbors) > 0.85
        assert closed([response[-1:] for response in neighbors]) > 0.85
        assert closed(answering.responses(index, texts)) > 0.8


def test_it_responds_less_where_the_marker_is_absent(answering):
    for fact in range(3):  # attention of a random model hardly sees a marker, so it is not closed everywhere
        marked, unmarked = (torch.cat(answering.due(fact, fact, of)) for of in (True, False))
        assert unmarked.mean() < 0.9 * marked.mean()


def test_it_is_closed_where_the_fact_is_asked_for_of_another_subject_with_a_marker(answering):
    for fact in range(3):
        texts = prompts(answering.lm, every_wording(answering.facts[fact]))
        names = [TOWER.subject.removeprefix("The "), MERKEL.subject]
        own, other = names if fact < 2 else names[::-1]
        renamed = [text.replace(f"The {own}", own).replace(own, other) for text in texts]
        rows = [answering.lm.tokenizer(text)["input_ids"] for text in renamed]
        assert closed([response[-1:] for response in answering.responses(fact, rows)]) > 0.75


def test_the_neurons_of_two_facts_about_one_subject_do_not_open_for_each_other(answering):
    assert [len(subject.facts) for subject in answering.subjects] == [2, 1]
    for one, other in ((0, 1), (1, 0)):
        assert closed(answering.due(one, other)) > 0.75
