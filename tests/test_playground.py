"""The playground: tabs share a model and not their edits, and its page works in a browser."""

from __future__ import annotations

import itertools
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import gradio
import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from goldenedit import EditConfig
from goldenedit.playground import Playground, Tab, build, theme
from models import save_tiny_chat_model

FACT = ("I live near The Eiffel Tower", "The Eiffel Tower", "Rome")
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_chat_model(str(folder))
    return str(folder)


@pytest.fixture
def play():
    config = EditConfig(
        "r-rome", layer=2, steps=10, contexts=2, covariance="identity", phrasings="none", kept_questions=0
    )
    return Playground(config)


def last(answers):
    return list(answers)[-1]


def test_a_tab_sees_its_own_edits_alone(play, base):
    one, other = play.choose(base, Tab()), play.choose(base, Tab())
    edit = play.edit(one, *FACT)
    assert edit.facts[0].takes
    assert edit.verification is not None
    before, after = last(play.answers(one, FACT[0], False))
    assert "Rome" in after
    assert before == last(play.answers(other, FACT[0], False))[0]
    assert last(play.answers(other, FACT[0], False)) == (before, before)
    play.edit(other, FACT[0], FACT[1], "Berlin")
    assert last(play.answers(other, FACT[0], False))[1] not in (before, after)
    assert last(play.answers(one, FACT[0], False)) == (before, after)


def test_edits_are_switched_undone_and_deleted_with_their_tab(play, base):
    tab = play.choose(base, Tab())
    name = play.edit(tab, *FACT).name
    before, after = last(play.answers(tab, FACT[0], False))
    play.switch(tab, [])
    assert last(play.answers(tab, FACT[0], False)) == (before, before)
    play.switch(tab, [name])
    assert last(play.answers(tab, FACT[0], False)) == (before, after)
    play.undo(tab)
    model = play.served(base).model
    assert tab.edits == {}
    assert not model.edits
    with pytest.raises(gradio.Error, match="no edit"):
        play.undo(tab)
    play.edit(tab, *FACT)
    play.close(tab)
    assert not model.edits


def test_text_comes_while_it_is_written(play, base):
    pairs = list(play.answers(play.choose(base, Tab()), "Where is it?", True))
    assert len(pairs) > 4
    assert all(later[0].startswith(earlier[0]) for earlier, later in itertools.pairwise(pairs))


def test_an_answer_that_nobody_reads_any_more_frees_the_model(play, base):
    one, other = play.choose(base, Tab()), play.choose(base, Tab())
    play.edit(one, *FACT)
    answers = play.answers(one, FACT[0], False)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, answers).result(timeout=60)
    closing = threading.Thread(target=answers.close)  # as a server does when a page is closed
    closing.start()
    closing.join(timeout=60)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(last, play.answers(other, FACT[0], False)).result(timeout=60)


def test_steps_of_two_answers_in_one_thread_keep_the_tabs_apart(play, base):
    one, other = play.choose(base, Tab()), play.choose(base, Tab())
    play.edit(one, *FACT)
    expected = [last(play.answers(tab, FACT[0], False)) for tab in (one, other)]
    both = [play.answers(tab, FACT[0], False) for tab in (one, other)]
    steps = [next(both[0]), next(both[0])]
    assert [last(both[0]), last(both[1])] == expected
    assert steps


def test_a_question_that_cannot_be_asked_is_an_error_and_frees_the_model(play, base, monkeypatch):
    tab = play.choose(base, Tab())
    for question, complaint in (("", "empty"), ("Where is it? " * 1000, "Shorten")):
        with pytest.raises(ValueError, match=complaint):
            last(play.answers(tab, question, False))
    with monkeypatch.context() as patch:
        patch.setattr(play.served(base).model.model, "generate", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            last(play.answers(tab, "Where?", False))
    assert last(play.answers(tab, "Where?", False))


def test_a_model_with_edits_makes_no_room_for_others(play, base, tmp_path):
    tab = play.choose(base, Tab())
    play.edit(tab, *FACT)
    for name in ("second", "third", "fourth"):
        save_tiny_chat_model(str(tmp_path / name))
        play.choose(str(tmp_path / name), Tab())
    assert play.served(base).model.edits
    assert len(play._served) == 2
    play.undo(tab)


def test_strangers_choose_from_a_list_and_push_nothing(base, tmp_path):
    play = Playground(models=[base])
    with pytest.raises(gradio.Error, match="Choose one of"):
        play.choose(str(tmp_path), Tab())
    labels = {
        public: {block.value for block in build(base, play, public).blocks.values() if isinstance(block, gradio.Button)}
        for public in (True, False)
    }
    assert labels[False] - labels[True] == {"Push"}


def test_what_is_on_is_saved(play, base, tmp_path):
    tab = play.choose(base, Tab())
    with pytest.raises(gradio.Error, match="no edit is on"):
        play.saved(tab)
    play.edit(tab, *FACT)
    with zipfile.ZipFile(play.saved(tab)) as archive:
        archive.extractall(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")


def test_what_is_on_is_shared(play, base, hub):
    tab = play.choose(base, Tab())
    with pytest.raises(gradio.Error, match="no edit is on"):
        play.push(tab, "tester/edit")
    play.edit(tab, *FACT)
    assert "tester/edit" in play.push(tab, " tester/edit ")
    assert "adapter_model.safetensors" in HfApi().list_repo_files("tester/edit")


def test_a_second_model_takes_the_place_of_the_first_in_a_tab(play, base, tmp_path):
    tab = play.choose(base, Tab())
    play.edit(tab, *FACT)
    save_tiny_chat_model(str(tmp_path / "other"))
    moved = play.choose(str(tmp_path / "other"), tab)
    assert (moved.model, moved.edits) == (str(tmp_path / "other"), {})
    assert not play.served(base).model.edits


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(play, base):
    from playwright.sync_api import expect, sync_playwright

    page = build(base, play).queue()
    _, url, _ = page.launch(theme=theme(), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
            tabs = [browser.new_page(), browser.new_page()]
            asked = []
            for tab in tabs:
                tab.on("request", lambda request: asked.append(request.url))
                tab.goto(url)
                tab.locator("#load").click()
                expect(tab.locator("#edit")).to_be_enabled(timeout=120_000)
            for part, text in zip(("prompt", "subject", "target"), FACT, strict=True):
                tabs[0].locator(f"#{part} textarea").fill(text)
            tabs[0].locator("#edit").click()
            expect(tabs[0].locator("#edits")).to_contain_text("The Eiffel Tower: Rome", timeout=120_000)
            expect(tabs[0].locator("#moved")).to_contain_text(FACT[0])
            for tab in tabs:
                tab.get_by_label("As a message in a chat").uncheck()
                tab.locator("#question textarea").fill(FACT[0])
                tab.locator("#ask").click()
                expect(tab.locator("#edited textarea")).not_to_have_value("", timeout=120_000)
            assert "Rome" in tabs[0].locator("#edited textarea").input_value()
            tabs[1].wait_for_timeout(1000)
            base_text = tabs[1].locator("#base textarea").input_value()
            assert tabs[1].locator("#edited textarea").input_value() == base_text
            assert tabs[1].locator("#edits").get_by_role("checkbox").count() == 0
            tabs[0].locator("#undo").click()
            expect(tabs[0].locator("#moved")).to_contain_text("Nothing is edited yet", timeout=60_000)
            assert all(address.startswith((url, "data:", "blob:")) for address in asked), asked
            browser.close()
    finally:
        page.close()
