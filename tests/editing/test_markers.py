"""The optimization of markers against whole models and slow loops, and what a marker does where an answer is due."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save
from torch.nn import functional

from goldenedit import EditConfig, EditRequest
from goldenedit.architecture.hooks import recording
from goldenedit.architecture.replay import Replayer
from goldenedit.editing import markers
from goldenedit.editing.answering import texts_about
from goldenedit.editing.gated import marker_start, marking, neurons_for
from goldenedit.editing.gates import gates_of, rewriting
from goldenedit.editing.markers import first_marker, optimize_marker
from goldenedit.lm import LanguageModel
from models import tiny_model
from tiny_edits import TOWER
from zoo import zoo_model

CONFIG = EditConfig(layer=[1, 2], covariance_tokens=500, phrasings="none", kept_questions=3)
WAYS = ("packed", "suffix", "layers", "whole")


class Marking:
    """A subject with its neurons, in a random model: what a marker is optimized on."""

    def __init__(self, tokenizer, model=None, config=CONFIG) -> None:
        request = EditRequest(TOWER.prompt, TOWER.subject, "Rome", prompts=("One can find {} in the city of",))
        self.lm = lm = LanguageModel(zoo_model("llama", width=64) if model is None else model, tokenizer)
        self.layers = config.target_layers
        *of_subject, of_answers = neurons_for(lm, config, 1, 1)
        contexts = ["", "Therefore. ", "You and I live in a city. "]
        (subject,) = texts_about(lm, [request], config, contexts).subjects
        ((own,),) = (fact.wordings for fact in subject.facts)
        each = len(own) // 2  # for each prompt, those behind longer contexts come last
        short = [answer for index, answer in enumerate(own) if index % each < len(contexts)]
        self.subject = replace(subject, facts=[replace(subject.facts[0], wordings=[short])])
        self.gates = gates_of(lm, [request], [self.subject.mentions], of_subject, 0)
        self.detectors = [gates.detectors([0]) for gates in self.gates]
        self.reader = lm.model.get_submodule(of_answers.neurons.gate.path)
        self.moments = of_answers.moments

    def optimize(self, lr=0.3, clamp=2.0, kept=None, **options):
        kept = self.subject.kept if kept is None else kept
        with rewriting(self.lm, self.gates, [0]):
            return optimize_marker(
                self.lm,
                self.subject.due,
                kept,
                self.layers,
                self.detectors,
                self.reader,
                self.moments,
                lr,
                clamp,
                **options,
            )

    def run(self, row, marker):
        """Run a whole text, with the marker added as the edit adds it; return logits, and inputs of the reader."""
        ids = torch.tensor([row.input_ids])
        is_behind = torch.arange(ids.shape[1])[:, None] >= row.subject

        def add(module, args, output, index):
            return output + is_behind * (args[0] @ self.detectors[index][0])[..., None] * marker[index]

        inputs = []
        with ExitStack() as stack:
            stack.callback(self.reader.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])).remove)
            for index, layer in enumerate(self.layers):
                down = self.lm.architecture.down_projection(self.lm.model, layer)
                stack.callback(down.register_forward_hook(partial(add, index=index)).remove)
            logits = self.lm.model(input_ids=ids).logits[0]
        return logits, inputs[0]

    def moves(self, marker):
        """Return by how much a marker moves the reader's input where the answer is due, `(n, d)`."""
        nothing = torch.zeros_like(marker)
        return torch.stack(
            [self.run(row, marker)[1][row.last] - self.run(row, nothing)[1][row.last] for row in self.subject.due]
        )

    @property
    def covariance(self):
        mean = self.moments.mean.double()
        covariance = self.moments.second_moment.double() - torch.outer(mean, mean)
        return covariance + 1e-2 * covariance.diagonal().mean() * torch.eye(len(mean))

    def size(self, marker) -> float:
        """Return the squared standard deviations of the mean move, in the direction that tells it best."""
        mean = self.moves(marker).mean(0).double()
        return (mean @ torch.linalg.solve(self.covariance, mean)).item()

    def random_sizes(self, marker, count) -> list[float]:
        """Return the same of random vectors with the lengths of a marker."""
        lengths = marker.norm(dim=1, keepdim=True)
        return [self.size(functional.normalize(torch.randn_like(marker), dim=1) * lengths) for _ in range(count)]

    def changed(self, marker, kept) -> torch.Tensor:
        """Return the weighted KL divergence of texts that must stay the same."""
        nothing = torch.zeros_like(marker)
        terms = []
        for text in kept:
            before, after = (self.run(text.row, of)[0][text.row.reads].log_softmax(-1) for of in (nothing, marker))
            terms.append(text.weight * (after.exp() * (after - before)).sum(-1).mean())
        return sum(terms, marker.new_zeros(()))


@pytest.fixture(scope="module")
def marked(tokenizer):
    return Marking(tokenizer)


@pytest.fixture(scope="module")
def marker(marked):
    return marked.optimize()


def reference(marked, lr, clamp, kept, others=None, start=None):
    """Return the marker of plain loops: one text at a time, the whole model at every step."""
    down = [marked.lm.architecture.down_projection(marked.lm.model, layer) for layer in marked.layers]
    norms = []
    for row in marked.subject.due:
        with torch.no_grad(), recording({str(index): site for index, site in enumerate(down)}) as record:
            marked.lm.model(input_ids=torch.tensor([row.input_ids]))
        norms.append([record.outputs[str(index)][0, row.subject].norm() for index in range(len(down))])
    length = torch.tensor(norms).mean(0)
    noise = torch.randn(len(down), 64, generator=torch.Generator().manual_seed(0))
    marker = (
        0.02 * length[:, None] * functional.normalize(noise, dim=1) if start is None else 0.5 * length[:, None] * start
    )
    steps, fixing, late = (20, (5, 9), 14) if start is None else (10, (0, 4), 5)
    velocity, direction = torch.zeros_like(marker), None
    if others is not None:  # those that are open already belong to the subject
        before = torch.stack([marked.run(row, torch.zeros_like(marker))[1][row.last] for row in marked.subject.due])
        others = others[(before @ others.T).mean(0) <= 0].detach()
        assert 0 < len(others) < 4
    inverse = torch.linalg.inv(marked.covariance).float()
    for step in range(steps):
        marker.requires_grad_()
        moves = marked.moves(marker)
        mean = moves.mean(0)
        if step in fixing:
            direction = (inverse @ mean / (mean @ inverse @ mean).sqrt()).detach()
        if direction is None:
            loss = torch.log1p(4.0 / (mean @ inverse @ mean + 1e-6))
        else:
            loss = 0.5 * functional.softplus(5.0 - moves @ direction).mean()
        loss = loss + 10.0 * marked.changed(marker, kept)
        if others is not None:
            inputs = torch.stack([marked.run(row, marker)[1][row.last] for row in marked.subject.due])
            loss = loss + 10.0 * ((inputs @ others.T + 0.3).relu() ** 2).mean(0).sum()
        (gradient,) = torch.autograd.grad(loss, marker)
        scaled = gradient * length[:, None]
        velocity = 0.7 * velocity + scaled / scaled.norm()
        moved = marker.detach() - (lr if step < late else 0.3 * lr) * length[:, None] * velocity
        marker = moved * (clamp * length / moved.norm(dim=1)).clamp(max=1.0)[:, None]
    return marker


@pytest.mark.parametrize(
    ("kept", "neurons", "starts"),
    [(0, 0, False), (1, 0, False), (None, 0, False), (1, 4, False), (1, 4, True)],
    ids=["nothing kept", "one text kept", "several texts kept", "neurons of others", "from another marker"],
)
def test_a_marker_is_that_of_plain_loops_over_the_whole_model(kept, neurons, starts, marked, marker):
    texts = marked.subject.kept[:kept]
    others = 0.05 * torch.randn(neurons, 64, generator=torch.Generator().manual_seed(1)) if neurons else None
    with rewriting(marked.lm, marked.gates, [0]):
        start = functional.normalize(marker, dim=1) if starts else None
        expected = reference(marked, 0.05, 2.0, texts, others, start)
    found = marked.optimize(0.05, 2.0, texts, others=others, start=start)
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_a_marker_moves_the_reader_by_more_standard_deviations_than_random_vectors_of_its_length(marked, marker):
    with torch.no_grad(), rewriting(marked.lm, marked.gates, [0]):
        assert marked.size(marker) > 2 * max(marked.random_sizes(marker, 20))


def test_it_moves_every_wording_the_same_way(marked, marker):
    with torch.no_grad(), rewriting(marked.lm, marked.gates, [0]):
        moves = marked.moves(marker).double()
    direction = torch.linalg.solve(marked.covariance, moves.mean(0))
    along = moves @ (direction / (direction @ marked.covariance @ direction).sqrt())
    assert len(along) == 6
    assert (along > 1).all()


def test_it_is_seen_in_the_model_with_the_change_that_inserts_it(marked, marker):
    """What the optimization adds, weights add too, but at tokens before the subject."""
    for row in marked.subject.due:
        with torch.no_grad(), rewriting(marked.lm, marked.gates, [0]):
            _, expected = marked.run(row, marker)
            _, before = marked.run(row, torch.zeros_like(marker))
        change = marking(marked.lm, marked.gates, [0], marker[None])
        with (
            torch.no_grad(),
            marked.lm.architecture.adding_deltas(marked.lm.model, change),
            recording({"reader": marked.reader}) as record,
        ):
            marked.lm.model(input_ids=torch.tensor([row.input_ids]))
        move = expected[row.last] - before[row.last]
        difference = record.inputs["reader"][0, row.last] - expected[row.last]
        assert difference.norm() < 0.5 * move.norm()


def test_texts_that_are_kept_change_less_than_without_keeping_them(marked, marker):
    free = marked.optimize(kept=[])
    with torch.no_grad(), rewriting(marked.lm, marked.gates, [0]):
        kept, unkept = (marked.changed(of, marked.subject.kept).item() for of in (marker, free))
    assert kept < 0.5 * unkept


def test_it_does_not_open_the_neurons_of_other_subjects(marked, marker):
    """A neuron that opens where one marker is present stays closed where another is optimized beside it."""
    leak = marked.subject.due[-1]
    with torch.no_grad(), rewriting(marked.lm, marked.gates, [0]):
        mean = marked.moves(marker).mean(0).double()
        before = torch.stack([marked.run(row, 0 * marker)[1][row.last] for row in marked.subject.due]).double()
    row = torch.linalg.solve(marked.covariance + before.T @ before, mean)
    row = (row / (mean @ row)).float()[None]  # responds with 1 to the first marker, and hardly without it
    beside = marked.optimize(others=row, leaks=[leak])

    def opening(of):
        with torch.no_grad(), rewriting(marked.lm, marked.gates, [0]):
            inputs = torch.stack([marked.run(text, of)[1][text.last] for text in marked.subject.due])
        return (inputs @ row.T).clamp(min=0).mean().item()

    assert opening(marker) > 0.5
    assert opening(beside) < 0.1


def test_a_marker_is_no_longer_than_the_clamp_allows(marked):
    short = marked.optimize(clamp=0.1)
    with torch.no_grad(), rewriting(marked.lm, marked.gates, [0]):
        lengths = []
        for layer in marked.layers:
            down = marked.lm.architecture.down_projection(marked.lm.model, layer)
            of_rows = []
            for row in marked.subject.due:
                with recording({"down": down}) as record:
                    marked.lm.model(input_ids=torch.tensor([row.input_ids]))
                of_rows.append(record.outputs["down"][0, row.subject].norm())
            lengths.append(torch.stack(of_rows).mean())
    assert (short.norm(dim=1) <= 0.1 * torch.stack(lengths) * (1 + 1e-4)).all()


def test_a_marker_is_the_same_twice_and_another_from_another_start(marked, marker):
    assert marker.shape == (2, 64)
    assert marker.dtype == torch.float32
    assert torch.equal(marked.optimize(), marker)
    start = functional.normalize(torch.randn_like(marker), dim=1)
    assert not torch.allclose(marked.optimize(start=start), marker)


def test_the_first_marker_is_from_the_start_whose_loss_is_least(marked, monkeypatch):
    losses = {}  # of each start, after the steps that are taken from all of them

    class Told(markers._Descent):
        def until(self, step):
            super().until(step)
            losses.setdefault(self, self.value)
            return self

    monkeypatch.setattr(markers, "_Descent", Told)
    subject = marked.subject
    with rewriting(marked.lm, marked.gates, [0]):
        marker = first_marker(
            marked.lm,
            subject.due,
            subject.kept,
            marked.layers,
            marked.detectors,
            marked.reader,
            marked.moments,
            lr=0.3,
            clamp=2.0,
        )
    assert len(losses) == 4
    (best,) = (descent for descent in losses if descent.step == 20)
    assert losses[best] == min(losses.values())
    torch.testing.assert_close(marker, functional.normalize(best.marker.detach(), dim=1))


def test_what_markers_start_from_is_found_once_and_read_from_the_cache(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDENEDIT_CACHE", str(tmp_path))
    lm = LanguageModel(zoo_model("llama", width=64), tokenizer)
    start = marker_start(lm, CONFIG)
    assert start.shape == (2, 64)
    torch.testing.assert_close(start.norm(dim=1), torch.ones(2))
    (path,) = (tmp_path / "markers").iterdir()
    path.write_bytes(save({"marker": 2 * start}))
    assert torch.equal(marker_start(lm, CONFIG), 2 * start)
    path.write_bytes(b"damaged")
    assert torch.equal(marker_start(lm, CONFIG), start)
    other = replace(CONFIG, lr=2 * CONFIG.lr)
    assert not torch.allclose(marker_start(lm, other), start)


def test_nothing_is_written_to_the_model(tokenizer):
    marked = Marking(tokenizer)
    model = marked.lm.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    marked.optimize()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_replay_gives_the_same_marker(way, marked, marker, monkeypatch):
    used = []

    class Slow(Replayer):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            while self.way != way:
                self._ways.pop(0)

        def __call__(self, captured):
            used.append(self.way)
            return super().__call__(captured)

    monkeypatch.setattr(markers, "Replayer", Slow)
    found = marked.optimize(0.05)
    monkeypatch.undo()
    expected = marked.optimize(0.05)
    assert set(used) == {way}
    assert (found - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("name", ["gptj", "gemma3", "gpt2"])
def test_models_that_are_replayed_otherwise_have_markers_too(name, tokenizer):
    """GPT-J does not attend by torch's function; what Gemma's window forgot is not in its cache; GPT-2 has no ups."""
    config = EditConfig(layer=0, covariance_tokens=300, phrasings="none", kept_questions=2)
    marked = Marking(tokenizer, tiny_model(name), config)
    marker = marked.optimize()
    with torch.no_grad(), rewriting(marked.lm, marked.gates, [0]):
        assert marked.size(marker) > max(marked.random_sizes(marker, 5))


def test_an_optimization_that_is_not_finite_says_what_to_do(marked):
    with pytest.raises(ValueError, match=r"marker is not finite.* or lower EditConfig\.lr"):
        marked.optimize(float("inf"))
