"""The batched, replayed optimization against one subject at a time and against plain loops over whole models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from goldenedit.architecture import read_architecture, replay
from goldenedit.architecture.hooks import recording
from goldenedit.editing import values
from goldenedit.editing.rows import subject_rows
from goldenedit.editing.values import AnswerRow, KeptRow, SubjectRows, ValueOptions, optimize_values
from goldenedit.lm import LanguageModel
from goldenedit.lm.tokens import encode
from goldenedit.requests import EditRequest
from models import MLP_WIDTH, WIDTH, tiny_model

REQUESTS = [
    EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("The mother tongue of {} is", "Angela Merkel", "the language of Cambodia"),
    EditRequest("{} is in", "Paris", "London"),
]
SAME_SUBJECT = EditRequest("The Eiffel Tower belongs to the company of", "The Eiffel Tower", "Angela Merkel")
CONTEXTS = ["", "You and I live in a city. ", "Therefore. "]
# Values of tiny models are short: with the defaults the decay would outweigh all else.
OPTIONS = ValueOptions(steps=5, lr=0.5, weight_decay=0.02, clamp=4.0, stop_loss=0.0)
NORMALIZED = replace(OPTIONS, optimizer="normalized", lr=0.3)

models = pytest.mark.parametrize("name", ["llama", "gpt2"])
layer_sets = pytest.mark.parametrize("layers", [[1], [0, 2]], ids=["one layer", "two layers"])


def rows_of(model, tokenizer, *requests: EditRequest, contexts: Sequence[str] = CONTEXTS) -> SubjectRows:
    """Return the rows of one subject, with what it is as the text that must stay the same."""
    subject = requests[0].subject
    essence = encode(tokenizer, f"{subject} is a", None, len(subject))
    return subject_rows(LanguageModel(model, tokenizer), requests, contexts, kept=[KeptRow(essence, 0.25)])


def optimize(model, tokenizer, requests, layers=(1,), options=OPTIONS, **kwargs):
    """Optimize requests, each of which is a subject of its own."""
    subjects = [rows_of(model, tokenizer, request) for request in requests]
    return optimize_values(LanguageModel(model, tokenizer), subjects, list(layers), options, **kwargs)


def vectors(attention: bool) -> tuple[str, ...]:
    return ("mlp", "attention") if attention else ("mlp",)


class Reference:
    """Equation 4 of ROME for one subject: one text at a time, the whole model at every step."""

    def __init__(self, model, subject, layers, options, attention=False, detectors=None, flatness=None):
        architecture = read_architecture(model)
        self.modules = {str(layer): architecture.down_projection(model, layer) for layer in layers}
        if attention:
            self.modules |= {f"attention {layer}": architecture.attention_output(model, layer) for layer in layers}
        self.model, self.subject, self.options = model, subject, options
        self.detectors, self.flatness = detectors, flatness
        self.runs_answers = [True] * len(self.every_answer)
        self.runs_kept = [True] * len(subject.kept)
        with torch.no_grad():
            norms = [[self.run(answer.row)[2].norm(dim=-1) for answer in of_fact] for of_fact in subject.answers]
            self.original = [self.read(kept.row) for kept in subject.kept]
        self.v0_norm = torch.stack([torch.stack(of_fact).mean(0) for of_fact in norms]).mean(0)

    def run(self, row, deltas=None):
        """Run one text with the deltas added; return logits, and keys and values at the subject."""
        ids = torch.tensor([row.input_ids])
        is_behind = torch.arange(ids.shape[1])[:, None] >= row.subject
        is_subject = torch.arange(ids.shape[1])[:, None] == row.subject

        def adding(index):
            def add(module, args, output):
                if self.detectors is None:
                    return output + is_subject * deltas[index]
                return output + is_behind * (args[0] @ self.detectors[index])[..., None] * deltas[index]

            return add

        handles = [
            module.register_forward_hook(adding(index))
            for index, module in enumerate(self.modules.values())
            if deltas is not None
        ]
        with recording(self.modules) as record:
            logits = self.model(input_ids=ids).logits[0]
        for handle in handles:
            handle.remove()
        keys = [record.inputs[name][0, row.subject] for name in self.modules]
        return logits, keys, torch.stack([record.outputs[name][0, row.subject] for name in self.modules])

    def read(self, row, deltas=None):
        """Return the log probabilities at the positions that a row reads."""
        return self.run(row, deltas)[0][list(row.reads)].log_softmax(-1)

    def token_nll(self, answer, deltas=None):
        log_probs = self.read(answer.row, None if deltas is None else answer.strength * deltas)
        return -torch.stack([log_probs[place, token] for place, token in enumerate(answer.row.target_ids)])

    def nll(self, answer, deltas=None):
        """The mean over the new answer's own tokens, and as much for the tokens around it."""
        by_token = self.token_nll(answer, deltas)
        core = torch.tensor([place in answer.core for place in range(len(by_token))])
        around = by_token[~core]
        return by_token[core].mean() + (around.mean() if len(around) else 0.0)

    @property
    def hardest(self):
        """Whether the wordings with the largest losses weigh most."""
        return self.options.optimizer == "normalized"

    def answers(self, deltas=None):
        """The mean over the facts of the means over their wordings, or the smooth maximum with the same weights.

        Its gradient weighs the wordings by the softmax of their losses.
        """
        if self.hardest:
            shares = [1 / len(of_fact) / len(self.subject.answers) for of_fact in self.subject.answers for _ in of_fact]
            run = [
                (share, self.nll(answer, deltas))
                for share, answer, is_run in zip(shares, self.every_answer, self.runs_answers, strict=True)
                if is_run
            ]
            return sum(share * nll.exp() for share, nll in run).log() if run else torch.zeros(())
        by_fact = [torch.stack([self.nll(answer, deltas) for answer in of_fact]) for of_fact in self.subject.answers]
        return torch.stack([of_fact.mean() for of_fact in by_fact]).mean()

    def lacking(self, deltas=None):
        """The least likely token of the new answer, in the wording that lacks most, or its mean over wordings."""
        by_fact = [
            torch.stack([self.weakest(answer, deltas) for answer in of_fact]) for of_fact in self.subject.answers
        ]
        if self.hardest:
            run = torch.cat(by_fact)[torch.tensor(self.runs_answers)]
            return run.max().item() if len(run) else 0.0
        return torch.stack([of_fact.mean() for of_fact in by_fact]).mean().item()

    def weakest(self, answer, deltas):
        return self.token_nll(answer, deltas)[list(answer.core)].max()

    @property
    def every_answer(self):
        return [answer for of_fact in self.subject.answers for answer in of_fact]

    def choose_rows(self, step, weakest, is_whole):
        """Set which rows a step runs: all, or answers that are not easy and every second kept row."""
        count = len(self.subject.kept)
        self.runs_answers = [nll >= 0.5 * self.options.stop_loss for nll in weakest]
        self.runs_kept = [(number + 1) % 2 == step % 2 for number in range(count)]
        if is_whole or not any(self.runs_answers + self.runs_kept):
            self.runs_answers, self.runs_kept = [True] * len(weakest), [True] * count
            return True
        return False

    def loss(self, deltas):
        loss = self.answers(deltas)
        run = sum(kept.weight for kept, is_run in zip(self.subject.kept, self.runs_kept, strict=True) if is_run)
        standing = sum(kept.weight for kept in self.subject.kept) / run if run else 0.0
        for kept, original, is_run in zip(self.subject.kept, self.original, self.runs_kept, strict=True):
            if is_run:
                now = self.read(kept.row, deltas)
                loss = loss + standing * kept.weight * (now.exp() * (now - original)).sum(-1).mean()
        is_published = self.options.optimizer == "adam"
        decay = sum(
            delta.norm() * (norm**-2 if is_published else 0.04 / norm)
            for delta, norm in zip(deltas, self.v0_norm, strict=True)
        )
        return loss + self.options.weight_decay * decay

    def deltas(self):
        delta = torch.zeros(len(self.modules), WIDTH, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.options.lr)
        velocity = torch.zeros_like(delta)
        weakest, is_whole = [torch.inf] * len(self.every_answer), True
        for step in range(self.options.steps * len(self.subject.answers)):
            is_whole = self.choose_rows(step, weakest, is_whole or not self.hardest)
            adam.zero_grad()
            self.loss(delta).backward(inputs=[delta])
            if self.options.optimizer == "adam":
                adam.step()
            with torch.no_grad():
                for number, answer in enumerate(self.every_answer):
                    if self.runs_answers[number]:
                        weakest[number] = self.weakest(answer, delta).item()
                is_whole = (step + 1) % 4 == 0 or self.lacking(delta) < self.options.stop_loss
                if self.options.optimizer == "normalized":
                    velocity = 0.7 * velocity + self.direction(delta.grad)
                    length = self.options.lr * min(max(self.lacking(delta), 0.15), 1.0)
                    delta -= length * self.v0_norm[:, None] * velocity
                limit = self.options.clamp * self.v0_norm
                delta *= (limit / delta.norm(dim=-1)).clamp(max=1.0)[:, None]
        return delta.detach()

    def direction(self, gradient):
        if self.flatness is not None:
            gradient = torch.stack([G @ g for G, g in zip(self.flatness, gradient, strict=True)])
        scaled = self.v0_norm[:, None] * gradient
        return scaled / scaled.norm()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-3 * expected.norm()


def selective_detectors(model, subject: SubjectRows, layers: Sequence[int]) -> list[torch.Tensor]:
    """Return detectors, by layer `(d_in,)`, that respond to a subject's key with 1 and to what is before it with 0."""
    architecture = read_architecture(model)
    modules = {str(layer): architecture.down_projection(model, layer) for layer in layers}
    before = {name: [] for name in modules}
    own = {name: [] for name in modules}
    for row in subject.rows:
        with recording(modules) as record, torch.no_grad():
            model(input_ids=torch.tensor([row.input_ids]))
        for name in modules:
            keys = record.inputs[name].view(-1, MLP_WIDTH).double()
            before[name] += keys[: row.subject]
            own[name].append(keys[row.subject])
    found = []
    for name in modules:
        basis = torch.linalg.qr(torch.stack(before[name]).T).Q if before[name] else torch.zeros(MLP_WIDTH, 1).double()
        key = own[name][0] - basis @ (basis.T @ own[name][0])
        found.append((key / (key @ own[name][0])).float())
    return found


@models
@layer_sets
@pytest.mark.parametrize(
    ("options", "attention"),
    [
        (OPTIONS, False),
        (replace(OPTIONS, clamp=0.3), False),
        (OPTIONS, True),
        (NORMALIZED, False),
        (replace(NORMALIZED, clamp=0.3), False),
    ],
    ids=["adam", "adam clamped", "adam with attention", "normalized", "normalized clamped"],
)
def test_deltas_equal_those_of_a_plain_optimization(name, layers, options, attention, tokenizer):
    model = tiny_model(name)
    values = optimize(model, tokenizer, REQUESTS, layers, replace(options, vectors=vectors(attention)))
    assert [[keys.shape for keys in of_layer] for of_layer in values.keys] == [[(3, MLP_WIDTH)] * 3] * len(layers)
    for index, request in enumerate(REQUESTS[:2]):
        reference = Reference(model, rows_of(model, tokenizer, request), layers, options, attention=attention)
        assert_close(values.delta[index], reference.deltas()[: len(layers)])
        with torch.no_grad():
            bare = (-reference.nll(reference.subject.answers[0][0])).exp().item()
        assert values.target_probability[index] == pytest.approx([bare], rel=1e-3)


@models
@layer_sets
def test_with_flatness_the_gradient_is_multiplied_by_it(name, layers, tokenizer):
    model, subject = tiny_model(name), rows_of(tiny_model(name), tokenizer, REQUESTS[1])
    roots = torch.randn(len(layers), WIDTH, WIDTH)
    flatness = roots @ roots.mT / WIDTH + 0.1 * torch.eye(WIDTH)
    lm = LanguageModel(model, tokenizer)
    plain, flat = (optimize_values(lm, [subject], layers, NORMALIZED, flatness=given) for given in (None, flatness))
    assert_close(flat.delta[0], Reference(model, subject, layers, NORMALIZED, flatness=flatness).deltas())
    assert not torch.allclose(flat.delta, plain.delta, rtol=0.1)


@models
@layer_sets
@pytest.mark.parametrize("options", [OPTIONS, NORMALIZED], ids=["adam", "normalized"])
def test_with_detectors_the_loss_is_that_under_the_finished_change(name, layers, options, tokenizer):
    model = tiny_model(name)
    subjects = [rows_of(model, tokenizer, request) for request in REQUESTS]
    detectors = [0.2 * torch.randn(len(subjects), MLP_WIDTH) for _ in layers]
    values = optimize_values(LanguageModel(model, tokenizer), subjects, layers, options, 8, detectors)
    for index, subject in enumerate(subjects):
        own = [of_layer[index] for of_layer in detectors]
        reference = Reference(model, subject, layers, options, detectors=own)
        assert_close(values.delta[index], reference.deltas())


@models
@pytest.mark.parametrize("detects", [False, True], ids=["at the subject", "with detectors"])
def test_a_wording_may_have_to_be_answered_at_a_part_of_the_value(name, detects, tokenizer):
    model, plain = tiny_model(name), rows_of(tiny_model(name), tokenizer, REQUESTS[0])
    ((*answers,),) = plain.answers
    strengths = [0.5, 1.0, 1.5]
    subject = replace(plain, answers=[[replace(a, strength=s) for a, s in zip(answers, strengths, strict=True)]])
    detectors = [0.2 * torch.randn(1, MLP_WIDTH)] if detects else None
    lm = LanguageModel(model, tokenizer)
    found, other = (optimize_values(lm, [of], [1], NORMALIZED, 8, detectors).delta[0] for of in (subject, plain))
    own = [detectors[0][0]] if detects else None
    assert_close(found, Reference(model, subject, [1], NORMALIZED, detectors=own).deltas())
    assert not torch.allclose(found, other, rtol=0.05)


@models
@layer_sets
def test_with_detectors_the_logits_are_those_of_the_finished_edit(name, layers, tokenizer):
    model = tiny_model(name)
    architecture = read_architecture(model)
    subject = rows_of(model, tokenizer, *REQUESTS[:1])
    detectors = selective_detectors(model, subject, layers)  # what comes before the subject is not run again
    lm = LanguageModel(model, tokenizer)
    values = optimize_values(lm, [subject], layers, NORMALIZED, detectors=[found[None] for found in detectors])
    reference = Reference(model, subject, layers, NORMALIZED, detectors=detectors)
    with torch.no_grad():
        expected = [reference.read(row, values.delta[0]) for row in subject.rows]
        before = [reference.read(row) for row in subject.rows]
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                A, B = detectors[index][None], values.delta[0, index][:, None]
                stack.enter_context(architecture.adding_delta(model, layer, A, B))
            found = [reference.read(row) for row in subject.rows]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.cat(found), torch.cat(before), atol=1e-2)


@models
@pytest.mark.parametrize("options", [OPTIONS, NORMALIZED], ids=["adam", "normalized"])
def test_facts_of_one_subject_share_a_delta_whose_loss_is_that_of_all_of_them(name, options, tokenizer):
    model = tiny_model(name)
    subject = rows_of(model, tokenizer, REQUESTS[0], SAME_SUBJECT)
    assert [len(of_fact) for of_fact in subject.answers] == [len(CONTEXTS)] * 2
    values = optimize_values(LanguageModel(model, tokenizer), [subject], [1], options)
    reference = Reference(model, subject, [1], options)
    assert values.delta.shape == (1, 1, WIDTH)
    assert_close(values.delta[0], reference.deltas())
    with torch.no_grad():
        bare = [(-reference.nll(of_fact[0])).exp().item() for of_fact in subject.answers]
        before, after = reference.lacking(), reference.lacking(values.delta[0])
    assert values.target_probability[0] == pytest.approx(bare, rel=1e-3)
    assert after < before


def test_a_fact_weighs_as_much_as_another_whatever_the_number_of_its_wordings(tokenizer):
    model = tiny_model("llama")
    both = rows_of(model, tokenizer, REQUESTS[0], SAME_SUBJECT)
    (first, second) = both.answers
    fewer = replace(both, answers=[first[:1], second])
    twice = replace(both, answers=[[first[0], first[0]], second])
    lm = LanguageModel(model, tokenizer)
    one, other = (optimize_values(lm, [subject], [1], OPTIONS) for subject in (fewer, twice))
    assert_close(one.delta, other.delta)


def test_the_new_answer_weighs_as_much_as_what_the_model_says_around_it(tokenizer):
    model = tiny_model("llama")
    subject = rows_of(model, tokenizer, REQUESTS[1], contexts=[""])
    answer = AnswerRow(subject.answers[0][0].row, range(2, 5))
    assert sum(answer.weights[2:5]) == pytest.approx(1.0)
    assert sum(answer.weights) == pytest.approx(2.0)
    subject = replace(subject, answers=[[answer]])
    values = optimize_values(LanguageModel(model, tokenizer), [subject], [1], OPTIONS)
    assert_close(values.delta[0], Reference(model, subject, [1], OPTIONS).deltas())


def test_a_kept_text_counts_by_its_weight(tokenizer):
    model = tiny_model("llama")
    plain = rows_of(model, tokenizer, REQUESTS[0])
    (essence,) = plain.kept
    other = encode(tokenizer, "The Eiffel Tower is a quick brown fox", None, len("The Eiffel Tower"))
    other = replace(other, kept=tuple(range(other.last - 3, other.last + 1)))
    moved = {}
    for weight in (0.0, 1.0, 1e3):
        subject = replace(plain, kept=[essence, KeptRow(other, weight)])
        values = optimize_values(LanguageModel(model, tokenizer), [subject], [1], OPTIONS)
        reference = Reference(model, subject, [1], OPTIONS)
        assert_close(values.delta[0], reference.deltas())
        with torch.no_grad():
            now, before = reference.read(other, values.delta[0]), reference.read(other)
        moved[weight] = (before.exp() * (before - now)).sum(-1).mean().item()
    assert moved[0.0] > moved[1.0] > moved[1e3]
    nothing = replace(plain, kept=[essence, KeptRow(other, 0.0)])
    values, without = (
        optimize_values(LanguageModel(model, tokenizer), [rows], [1], OPTIONS) for rows in (nothing, plain)
    )
    assert_close(values.delta, without.delta)


@models
@layer_sets
@pytest.mark.parametrize("options", [OPTIONS, NORMALIZED], ids=["adam", "normalized"])
def test_requests_together_equal_each_alone(name, layers, options, tokenizer):
    model = tiny_model(name)
    together = optimize(model, tokenizer, REQUESTS, layers, options)
    by_two = optimize(model, tokenizer, REQUESTS, layers, options, batch_size=2)
    assert together.delta.shape == (3, len(layers), WIDTH)
    assert {tensor.dtype for tensor in (together.delta, *together.keys[0])} == {torch.float32}
    for index, request in enumerate(REQUESTS):
        alone = optimize(model, tokenizer, [request], layers, options)
        for many in (together, by_two):
            assert_close(many.delta[index], alone.delta[0])
            for keys, own in zip(many.keys, alone.keys, strict=True):
                assert_close(keys[index], own[0])
            assert many.steps[index] == alone.steps[0]


def test_subjects_of_several_facts_together_equal_each_alone(tokenizer):
    model = tiny_model("llama")
    lm = LanguageModel(model, tokenizer)
    subjects = [
        rows_of(model, tokenizer, REQUESTS[0], SAME_SUBJECT),
        rows_of(model, tokenizer, REQUESTS[1], contexts=[""]),
        rows_of(model, tokenizer, REQUESTS[2]),
    ]
    detectors = 0.2 * torch.randn(3, MLP_WIDTH)
    together = optimize_values(lm, subjects, [1], NORMALIZED, 8, [detectors])
    for index, subject in enumerate(subjects):
        alone = optimize_values(lm, [subject], [1], NORMALIZED, 8, [detectors[[index]]])
        assert_close(together.delta[index], alone.delta[0])
        assert together.target_probability[index] == pytest.approx(alone.target_probability[0], rel=1e-3)
        assert_close(together.keys[0][index], alone.keys[0][0])


@models
def test_a_finished_request_stops_and_the_others_go_on(name, tokenizer):
    model = tiny_model(name)
    references = [Reference(model, rows_of(model, tokenizer, request), [1], OPTIONS) for request in REQUESTS]
    with torch.no_grad():
        lacking = sorted(reference.lacking() for reference in references)
    options = replace(OPTIONS, steps=12, stop_loss=(lacking[0] + lacking[1]) / 2)
    together = optimize(model, tokenizer, REQUESTS, options=options)
    assert min(together.steps) == 0 < max(together.steps)
    for index, request in enumerate(REQUESTS):
        alone = optimize(model, tokenizer, [request], options=options)
        assert alone.steps == [together.steps[index]]
        assert_close(together.delta[index], alone.delta[0])


@pytest.mark.parametrize("options", [OPTIONS, NORMALIZED], ids=["adam", "normalized"])
def test_what_an_answer_lacks_is_its_least_likely_token(options, tokenizer):
    """A mean over tokens would call a name finished that is broken in its middle."""
    model = tiny_model("llama")
    subject = rows_of(model, tokenizer, REQUESTS[1])
    reference = Reference(model, subject, [1], options)
    with torch.no_grad():
        worst, mean = reference.lacking(), reference.answers().item()
    assert mean < worst - 0.1
    lm = LanguageModel(model, tokenizer)
    (within, beyond) = (
        optimize_values(lm, [subject], [1], replace(options, steps=1, stop_loss=stop_loss))
        for stop_loss in (worst - 0.01, worst + 0.01)
    )
    assert (within.steps, beyond.steps) == ([1], [0])


def test_a_subject_is_finished_once_each_of_its_facts_is_in_each_wording(tokenizer):
    model = tiny_model("llama")
    subject = rows_of(model, tokenizer, REQUESTS[0], SAME_SUBJECT)
    alone = [replace(subject, answers=[[answer]]) for of_fact in subject.answers for answer in of_fact]
    with torch.no_grad():
        *_, second, most = sorted(Reference(model, rows, [1], NORMALIZED).lacking() for rows in alone)
    lm = LanguageModel(model, tokenizer)
    (within, beyond) = (
        optimize_values(lm, [subject], [1], replace(NORMALIZED, steps=1, stop_loss=stop_loss)).steps
        for stop_loss in ((second + most) / 2, most + 0.01)
    )
    assert within[0] > 0
    assert beyond == [0]


@models
@layer_sets
@pytest.mark.parametrize("attention", [False, True])
def test_keys_are_those_of_each_context_with_the_deltas_in_place(name, layers, attention, tokenizer):
    """Those of the MLPs alone: what the attention was given is not stored, so keys must not see it."""
    model = tiny_model(name)
    values = optimize(model, tokenizer, REQUESTS, layers, replace(OPTIONS, vectors=vectors(attention)))
    for index, request in enumerate(REQUESTS):
        reference = Reference(model, rows_of(model, tokenizer, request), layers, OPTIONS)
        (answers,) = reference.subject.answers
        with torch.no_grad():
            keys = [torch.stack(reference.run(answer.row, values.delta[index])[1]) for answer in answers]
        assert_close(torch.stack([of_layer[index] for of_layer in values.keys]), torch.stack(keys, 1))


def test_of_the_values_that_give_the_answers_that_which_changes_the_kept_texts_least_is_taken(tokenizer, monkeypatch):
    model = tiny_model("llama")
    subject = rows_of(model, tokenizer, REQUESTS[0])
    subject = replace(subject, kept=[replace(subject.kept[0], weight=200.0)])
    reference = Reference(model, subject, [1], NORMALIZED)
    with torch.no_grad():
        options = replace(NORMALIZED, stop_loss=0.9 * reference.lacking(), steps=60, lr=0.5, weight_decay=0.0)

    def found() -> tuple[float, float]:
        delta = optimize_values(LanguageModel(model, tokenizer), [subject], [1], options).delta[0]
        with torch.no_grad():
            return reference.lacking(delta), (reference.loss(delta) - reference.answers(delta)).item()

    lacking, kept = found()
    monkeypatch.setattr(values, "_POLISH", 0)
    at_first, kept_at_first = found()
    assert max(lacking, at_first) < options.stop_loss
    assert kept < 0.9 * kept_at_first


@models
@layer_sets
@pytest.mark.parametrize("detects", [False, True], ids=["at the subject", "with detectors"])
def test_every_way_of_replay_gives_the_same_deltas(name, layers, detects, tokenizer, monkeypatch):
    model = tiny_model(name)
    detectors = [0.2 * torch.randn(len(REQUESTS), MLP_WIDTH) for _ in layers] if detects else None
    packed = optimize(model, tokenizer, REQUESTS, layers, detectors=detectors)
    assert packed.replay == "packed"
    with monkeypatch.context() as patch:
        patch.setattr(replay, "may_pack", lambda _: False)
        by_suffix = optimize(model, tokenizer, REQUESTS, layers, detectors=detectors)
    assert by_suffix.replay == "suffix"
    handle = model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    by_layers = optimize(model, tokenizer, REQUESTS, layers, detectors=detectors)
    handle.remove()
    assert by_layers.replay == "layers"
    for other in (by_suffix, packed):
        assert_close(by_layers.delta, other.delta)
        for keys, expected in zip(by_layers.keys, other.keys, strict=True):
            for of_subject, of_other in zip(keys, expected, strict=True):
                assert_close(of_subject, of_other)


def test_facts_thought_to_be_packed_are_grouped_anew_once_they_are_not(tokenizer, monkeypatch):
    model = tiny_model("gptj")  # does not attend by torch's function
    expected = optimize(model, tokenizer, REQUESTS, [1])
    asked: list[tuple[int, bool]] = []

    def groups(lengths, rows, most, device, padded):
        asked.append((len(lengths), padded))
        return [slice(index, index + 1) for index in range(len(lengths))]

    monkeypatch.setattr(values, "may_pack", lambda _: True)
    monkeypatch.setattr(values, "groups_by_length", groups)
    found = optimize(model, tokenizer, REQUESTS, [1])
    assert asked == [(len(REQUESTS), False), (len(REQUESTS) - 1, True)]
    assert found.replay == "suffix"
    assert_close(found.delta, expected.delta)
    assert found.steps == expected.steps


@models
@pytest.mark.parametrize("options", [replace(OPTIONS, lr=3.0), replace(NORMALIZED, lr=3.0)], ids=["adam", "normalized"])
@pytest.mark.parametrize("clamp", [0.1, 0.5])
def test_no_delta_is_longer_than_its_clamp(name, options, clamp, tokenizer):
    model = tiny_model(name)
    values = optimize(model, tokenizer, REQUESTS, [0, 2], replace(options, clamp=clamp))
    for delta, request in zip(values.delta, REQUESTS, strict=True):
        reference = Reference(model, rows_of(model, tokenizer, request), [0, 2], OPTIONS)
        assert (delta.norm(dim=-1) <= clamp * reference.v0_norm * (1 + 1e-4)).all()


@models
@pytest.mark.parametrize("options", [OPTIONS, NORMALIZED], ids=["adam", "normalized"])
def test_the_new_answer_becomes_likelier(name, options, tokenizer):
    model = tiny_model(name)
    values = optimize(model, tokenizer, REQUESTS, options=replace(options, steps=12))
    for index, request in enumerate(REQUESTS):
        reference = Reference(model, rows_of(model, tokenizer, request), [1], OPTIONS)
        with torch.no_grad():
            before, after = (reference.answers(deltas).item() for deltas in (None, values.delta[index]))
        assert after < before - 0.1


def test_a_request_whose_loss_is_low_from_the_start_is_not_moved(tokenizer):
    values = optimize(tiny_model("llama"), tokenizer, REQUESTS, options=replace(OPTIONS, stop_loss=1e6))
    assert values.steps == [0, 0, 0]
    assert not values.delta.any()


@pytest.mark.parametrize("detects", [False, True], ids=["at the subject", "with detectors"])
def test_weights_modes_and_hooks_are_as_before(detects, tokenizer):
    model = tiny_model("gpt2").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimize(model, tokenizer, REQUESTS, detectors=[torch.ones(3, MLP_WIDTH)] if detects else None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules()
    )


def test_frozen_weights_give_the_same_deltas(tokenizer):
    model = tiny_model("llama")
    trainable = optimize(model, tokenizer, REQUESTS)
    assert_close(optimize(model.requires_grad_(False), tokenizer, REQUESTS).delta, trainable.delta)


@models
def test_weights_that_are_not_finite_raise_with_the_subject_s_name(name, tokenizer, caplog):
    model = tiny_model(name)
    read_architecture(model).down_projection(model, 2).weight.data[0, 0] = torch.nan
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ValueError, match=r"'Paris' -> 'London' is not finite at step 0\. Load the model in"),
    ):
        optimize(model, tokenizer, REQUESTS)
