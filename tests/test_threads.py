"""Threads that run a model and one that changes it do not meet."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from goldenedit import EditModel
from goldenedit.threads import ModelLock
from models import tiny_model
from tiny_edits import MERKEL, TOWER, fast_config, logits


def test_many_run_at_once_and_one_changes_alone():
    lock, inside, most, torn = ModelLock(), [], [], []

    def run(kind):
        for _ in range(20):
            with lock.running() if kind == "runs" else lock.changing():
                inside.append(kind)
                most.append(inside.count("runs"))
                if "changes" in inside and len(inside) > 1:
                    torn.append(list(inside))
                time.sleep(1e-4)
                inside.remove(kind)

    with ThreadPoolExecutor(8) as pool:
        for result in [pool.submit(run, kind) for kind in ["runs"] * 6 + ["changes"] * 2]:
            result.result(timeout=60)
    assert max(most) > 1
    assert torn == []


def test_a_thread_holds_the_lock_more_than_once():
    lock = ModelLock()
    with lock.changing(), lock.running(), lock.changing(), lock.running():
        pass
    with lock.running(), lock.running():
        pass
    with lock.changing():
        pass


def test_a_thread_that_would_wait_for_itself_is_refused():
    lock = ModelLock()
    with lock.running(), pytest.raises(RuntimeError, match="cannot be changed while it runs"), lock.changing():
        pass
    with lock.changing():
        pass


def test_an_error_inside_frees_the_lock():
    lock = ModelLock()
    for context in (lock.running, lock.changing):
        with pytest.raises(ZeroDivisionError), context():
            _ = 1 / 0
    done = threading.Thread(target=lambda: lock.changing().__enter__())
    done.start()
    done.join(timeout=10)
    assert not done.is_alive()


def test_a_copy_has_a_lock_of_its_own():
    lock = ModelLock()
    with lock.changing():
        for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            assert other is not lock
            done = threading.Thread(target=lambda held=other: held.changing().__enter__())
            done.start()
            done.join(timeout=10)
            assert not done.is_alive()


def test_readers_see_the_model_before_or_behind_an_edit_and_nothing_between(tokenizer):
    model = EditModel(tiny_model("llama"), fast_config(layer=1), tokenizer)
    model.edit(TOWER, name="first")
    states, seen, stop = [logits(model)], [], threading.Event()

    def read():
        while not stop.is_set():
            seen.append(logits(model))

    def same(one, other):
        return torch.equal(one, other)

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            model.edit(MERKEL, name="second")
            states.append(logits(model))
            model.set_adapter("second")
            states.append(logits(model))
            model.set_adapter(["first", "second"])
            model.delete_adapter("second")
            states.append(logits(model))
        finally:
            stop.set()
        for reader in readers:
            reader.result(timeout=60)
    assert seen
    assert all(any(same(one, state) for state in states) for one in seen)


def test_what_is_shared_is_the_model_before_or_after_an_edit(tokenizer, hub):
    model = EditModel(tiny_model("llama"), fast_config(layer=1), tokenizer)
    model.edit(TOWER)
    with ThreadPoolExecutor(2) as pool:
        pushed = pool.submit(model.push_to_hub, "tester/edit")
        model.edit(MERKEL)
        assert pushed.result(timeout=60)


def test_several_threads_edit_one_model_one_after_another(tokenizer):
    model = EditModel(tiny_model("llama"), fast_config(layer=1), tokenizer)
    with ThreadPoolExecutor(4) as pool:
        edits = list(pool.map(model.edit, [TOWER, MERKEL, TOWER, MERKEL]))
    assert sorted(edit.name for edit in edits) == ["edit_1", "edit_2", "edit_3", "edit_4"]
    assert len(model.active_adapters) == 4
