"""The Hub: what is pushed comes back, in one commit and once; what fails leaves nothing half done."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from contents import assert_same, delta, edit_folder
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import run
from goldenedit import EditConfig, EditModel, get_edit_model
from goldenedit.packaged import PACKAGED_MODELS
from goldenedit.storage.atlas import GOLDEN_LAYERS, GoldenLayersError
from goldenedit.storage.card import render_card
from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    EDIT_CONFIG,
    EDIT_FILES,
    EDIT_STATE,
    EDITS,
    BaseModel,
    EditFolder,
    joined_state,
    write_edit_folder,
)
from goldenedit.storage.hub import (
    find_folder,
    is_on_hub,
    is_repo_id,
    make_repo,
    public_name,
    push_folder,
    search_edits,
    terms_of,
)
from goldenedit.storage.reading import read_edit_folder
from hub import TOKEN, Hub, Repository
from models import tiny_model
from tiny_edits import MERKEL, TOWER
from tiny_edits import fast_config as config

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # how huggingface_hub 2.4 calls its client
]

REPO = "tester/edit"


def with_state() -> EditFolder:
    """Return an edit folder whose editor remembers something."""
    content = edit_folder()
    edits = [replace(edit, state={"keys": delta(2, index).A}) for index, edit in enumerate(content.edits)]
    return replace(content, edits=edits)


def push(folder, **options):
    """Push an edit folder as EditModel does."""
    return push_folder(folder, make_repo(REPO), **{"files": EDIT_FILES} | options)


def contents(folder):
    """Return the bytes of the files of a folder by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """An edit folder that was not pushed yet."""
    write_edit_folder(tmp_path / "edit", edit_folder(), "the card")
    return tmp_path / "edit"


@pytest.fixture
def other(tmp_path):
    """Another edit folder, whose editor remembers something."""
    write_edit_folder(tmp_path / "other", with_state(), "the other card")
    return tmp_path / "other"


@pytest.fixture
def no_waits(monkeypatch):
    """Try again at once where the client would wait."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_no_test_can_reach_the_network(hub):
    assert hub.url == constants.ENDPOINT
    assert HfApi().whoami()["name"] == "tester"
    assert [(logged.path, logged.status) for logged in hub.log] == [("/api/whoami-v2", 200)]


def test_the_hub_of_the_tests_says_what_it_holds(hub, folder, other):
    first = push(folder)
    second = push(other, revision="trial")
    proposed = push(other, create_pr=True)
    api = HfApi()
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    found = {ref.ref: ref.target_commit for ref in [*refs.branches, *refs.pull_requests]}
    assert found == {"refs/heads/main": first.oid, "refs/heads/trial": second.oid, "refs/pr/1": proposed.oid}
    assert api.model_info(REPO, revision="trial").sha == second.oid
    assert set(api.list_repo_files(REPO)) == {*contents(folder), ".gitattributes"}
    (weights,) = api.get_paths_info(REPO, [ADAPTER_WEIGHTS, "none"])
    assert weights.size == weights.lfs.size == (folder / ADAPTER_WEIGHTS).stat().st_size
    assert set(api.parse_safetensors_file_metadata(REPO, ADAPTER_WEIGHTS).tensors) == set(
        load_file(folder / ADAPTER_WEIGHTS)
    )
    with Hub() as elsewhere:
        assert not HfApi(endpoint=elsewhere.url).repo_exists(REPO)
    with pytest.raises(Exception, match="refused"):
        HfApi(endpoint=elsewhere.url).repo_exists(REPO)


# ---------------------------------------------------------------------- up


def test_what_is_pushed_is_what_lies_in_the_repository(hub, folder):
    push(folder)
    assert hub.repositories[REPO].files() == contents(folder)


def test_what_was_pushed_comes_back_byte_by_byte(hub, other):
    push(other)
    found = find_folder(REPO)
    assert contents(found) == {name: data for name, data in contents(other).items() if name != CARD}
    assert_same(read_edit_folder(found), with_state())


def test_a_push_is_one_commit(hub, folder, other):
    first = push(folder, commit_message="One edit")
    second = push(other, commit_message="Another")
    history = hub.repositories[REPO].history()
    assert [commit.message for commit in history] == ["Another", "One edit"]
    assert [commit.oid for commit in history] == [second.oid, first.oid]


def test_an_unchanged_push_uploads_nothing_and_makes_no_commit(hub, folder):
    first = push(folder)
    assert len(hub.uploads()) == 1
    hub.log.clear()
    assert push(folder).oid == first.oid
    assert hub.uploads() == []
    assert not any("/commit/" in logged.path for logged in hub.log)
    assert len(hub.repositories[REPO].history()) == 1


def test_only_what_changed_is_uploaded(hub, folder):
    push(folder)
    hub.log.clear()
    (folder / CARD).write_text("a better card")
    push(folder)
    assert hub.uploads() == []
    assert len(hub.repositories[REPO].history()) == 2
    assert hub.repositories[REPO].files() == contents(folder)


def test_only_the_files_of_the_format_are_uploaded(hub, folder):
    kept = contents(folder)
    (folder / "secrets.txt").write_text("a key")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / CARD).write_text("another card")
    push(folder)
    assert hub.repositories[REPO].files() == kept


def test_state_travels_and_goes_when_the_next_edit_has_none(hub, folder, other, tmp_path):
    (tmp_path / "LICENSE").write_text("mine")
    push_folder(tmp_path, make_repo(REPO), files=["LICENSE"])
    push(other)
    assert hub.repositories[REPO].files()[EDIT_STATE] == (other / EDIT_STATE).read_bytes()
    assert_same(read_edit_folder(find_folder(REPO)), with_state())
    push(folder)
    assert hub.repositories[REPO].files() == {**contents(folder), "LICENSE": b"mine"}
    assert len(hub.repositories[REPO].history()) == 3
    assert read_edit_folder(find_folder(REPO)).edits[0].state == {}


def test_a_branch_is_made_and_used(hub, folder, other):
    push(folder)
    push(other, revision="trial")
    push(other, revision="trial")
    repository = hub.repositories[REPO]
    assert repository.files() == contents(folder)
    assert repository.files("trial") == contents(other)
    assert len(repository.history("trial")) == 2
    assert_same(read_edit_folder(find_folder(REPO, revision="trial")), with_state())
    assert_same(read_edit_folder(find_folder(REPO)), edit_folder())


def test_a_pull_request_leaves_the_branch_alone(hub, folder, other):
    push(folder)
    proposed = push(other, create_pr=True)
    repository = hub.repositories[REPO]
    assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
    assert repository.files() == contents(folder)
    assert repository.files("refs/pr/1") == contents(other)
    assert find_folder(REPO, revision="refs/pr/1").name == proposed.oid
    push(folder, revision="refs/pr/1")
    assert repository.files("refs/pr/1") == contents(folder)
    assert len(repository.history("refs/pr/1")) == 3


def test_a_pull_request_to_a_branch_is_refused_before_anything_is_made(hub, folder):
    make_repo(REPO)
    with pytest.raises(ValueError, match="create_pr"):
        push_folder(folder, REPO, files=EDIT_FILES, revision="trial", create_pr=True)
    assert list(hub.repositories[REPO].refs) == ["refs/heads/main"]


def test_who_may_not_write_proposes(hub, folder):
    hub.repositories["other/edit"] = Repository("other/edit")
    with pytest.raises(HfHubHTTPError, match="403"):
        push_folder(folder, make_repo("other/edit"), files=EDIT_FILES)
    assert make_repo("other/edit") == "other/edit"
    push_folder(folder, "other/edit", files=EDIT_FILES, create_pr=True)
    assert hub.repositories["other/edit"].files() == {}
    assert hub.repositories["other/edit"].files("refs/pr/1") == contents(folder)


def test_a_repository_without_an_owner_is_the_users(hub):
    assert make_repo("edit") == REPO
    assert make_repo("edit") == REPO
    assert list(hub.repositories) == [REPO]
    assert not hub.repositories[REPO].private


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_a_push_without_the_token_is_refused(hub, folder, token):
    with pytest.raises(HfHubHTTPError, match="401"):
        make_repo(REPO, token=token)
    assert hub.repositories == {}
    make_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="401"):
        push_folder(folder, REPO, files=EDIT_FILES, token=token)
    assert hub.repositories[REPO].files() == {}
    push_folder(folder, REPO, files=EDIT_FILES, token=TOKEN)
    assert hub.repositories[REPO].files() == contents(folder)


@pytest.mark.parametrize("at", ["/preupload/", "/objects/batch", "PUT /storage", "/commit/"])
def test_a_refused_push_changes_nothing_in_the_repository(hub, folder, other, at):
    push(folder)
    hub.faults.forbidden = at
    with pytest.raises((HfHubHTTPError, RuntimeError), match=r"403|Error while uploading"):
        push(other)
    assert hub.repositories[REPO].files() == contents(folder)


def test_a_name_can_be_that_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repo_id("org/model")
    assert is_repo_id("gpt2")
    assert not is_on_hub(BaseModel("LlamaForCausalLM", "0" * 32, None, "LlamaForCausalLM"))  # a model without a name
    for name in ("a/b/c", "./model", "/models/llama", "org/a model", ""):
        assert not is_repo_id(name), name
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not is_repo_id("org/model")


# ---------------------------------------------------------------------- down


def test_a_folder_here_is_taken_as_it_is(hub, folder, tmp_path, monkeypatch):
    assert find_folder(folder) == find_folder(str(folder)) == folder
    assert find_folder(tmp_path, subfolder="edit") == folder
    monkeypatch.chdir(tmp_path.parent)
    assert find_folder(f"{tmp_path.name}/edit").resolve() == folder  # though it could be a repository
    assert hub.log == []


@pytest.mark.parametrize("subfolder", ["edits", "edits/tower", "edits/tower/", "./edits", "."])
def test_an_edit_may_lie_in_a_subfolder(hub, tmp_path, subfolder):
    folder = tmp_path / "all" / subfolder
    write_edit_folder(folder, edit_folder(), "the card")
    commit = push_folder(tmp_path / "all", make_repo(REPO)).oid
    for revision in (None, commit):
        found = find_folder(REPO, subfolder=subfolder, revision=revision)
        assert_same(read_edit_folder(found), edit_folder())
    with pytest.raises(EntryNotFoundError):
        find_folder(REPO, subfolder="none")


@pytest.mark.parametrize("subfolder", ["..", "../edit", "edits/../../edit", "/tmp"])
def test_a_subfolder_leads_nowhere_else(hub, folder, subfolder):
    push(folder)
    hub.log.clear()
    for place in (REPO, folder):
        with pytest.raises(ValueError, match="leads out of the edit's folder"):
            find_folder(place, subfolder=subfolder)
    assert hub.log == []


def test_a_commit_stays_what_it_was(hub, folder, other):
    commit = push(folder).oid
    push(other)
    assert_same(read_edit_folder(find_folder(REPO, revision=commit)), edit_folder())
    assert_same(read_edit_folder(find_folder(REPO)), with_state())


def test_what_is_loaded_is_the_newest_push(hub, folder, other):
    for pushed, content in ((folder, edit_folder()), (other, with_state()), (folder, edit_folder())):
        push(pushed)
        assert_same(read_edit_folder(find_folder(REPO)), content)


def test_all_files_are_of_one_commit_whatever_is_pushed_meanwhile(hub, folder, other, monkeypatch):
    push(folder)
    repository = hub.repositories[REPO]
    old = repository.find()
    push(other)
    new = repository.find()
    repository.refs["refs/heads/main"] = old
    answer = hub.answer

    def push_meanwhile(request):
        answered = answer(request)
        if request.method == "GET" and request.path.endswith(EDIT_CONFIG):
            repository.refs["refs/heads/main"] = new
        return answered

    monkeypatch.setattr(hub, "answer", push_meanwhile)
    assert_same(read_edit_folder(find_folder(REPO)), edit_folder())
    assert repository.find() is new


def test_a_private_repository_is_for_who_has_the_token(hub, folder):
    make_repo(REPO, private=True)
    push(folder)
    assert_same(read_edit_folder(find_folder(REPO, token=TOKEN, force_download=True)), edit_folder())


@pytest.mark.parametrize(
    ("token", "error"), [(False, RepositoryNotFoundError), ("hf_wrong", HfHubHTTPError)], ids=["none", "wrong"]
)
def test_a_private_repository_is_not_for_others(hub, folder, token, error):
    make_repo(REPO, private=True)
    push(folder)
    with pytest.raises(error, match="401"):
        find_folder(REPO, token=token)
    assert hub.downloads() == []


def test_a_misspelled_folder_is_named(hub, folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=re.escape(f"Did you mean {str(folder)!r}?")):
        find_folder(f"{folder}s")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(RepositoryNotFoundError, match=re.escape("Did you mean 'edit'?")):
        find_folder("edits")


def test_what_is_not_there_is_called_by_its_kind(hub, folder):
    with pytest.raises(RepositoryNotFoundError, match=f"There is no folder '{REPO}' here. The Hub: 404"):
        find_folder(REPO)
    with pytest.raises(RepositoryNotFoundError, match="401"):
        find_folder(REPO, token=False)
    with pytest.raises(LocalEntryNotFoundError, match=f"There is no folder '{REPO}' here"):
        find_folder(REPO, local_files_only=True)
    push(folder)
    for revision in ("none", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            find_folder(REPO, revision=revision)


@pytest.mark.parametrize("name", [EDIT_CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS, EDIT_STATE])
def test_a_missing_file_is_an_error_that_names_it(hub, other, name):
    push_folder(other, make_repo(REPO), files=[kept for kept in EDIT_FILES if kept != name])
    with pytest.raises(EntryNotFoundError, match=name.replace(".", r"\.")):
        find_folder(REPO)


@pytest.mark.parametrize("name", ["./edits", "/no/such/folder", "a/b/c", "two words", "a//b", "../edit", "edit.git"])
def test_what_can_be_no_repository_is_no_folder(hub, name):
    with pytest.raises(FileNotFoundError, match="is not a local folder"):
        find_folder(name)
    assert hub.log == []


# ---------------------------------------------------------------------- networks fail


@pytest.mark.parametrize(("chunk", "statuses"), [(256, [200, 206]), (constants.DOWNLOAD_CHUNK_SIZE, [200, 200])])
@pytest.mark.parametrize("name", [EDIT_CONFIG, ADAPTER_WEIGHTS])
def test_a_download_goes_on_after_a_cut(hub, folder, monkeypatch, no_waits, name, chunk, statuses):
    push(folder)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)  # what was received of a chunk is lost
    hub.faults.cuts, hub.faults.cut = 1, name
    assert_same(read_edit_folder(find_folder(REPO)), edit_folder())
    assert [logged.status for logged in hub.downloads(name)] == statuses
    assert hub.faults.cuts == 0


@pytest.mark.parametrize("name", [EDIT_CONFIG, ADAPTER_WEIGHTS])
def test_a_download_that_fails_leaves_no_half_a_file(hub, folder, no_waits, name):
    push(folder)
    hub.faults.cuts, hub.faults.cut = math.inf, name
    with pytest.raises(Exception, match="closed connection"):
        find_folder(REPO)
    with pytest.raises(LocalEntryNotFoundError):
        find_folder(REPO, local_files_only=True)
    hub.faults.cuts = 0
    assert_same(read_edit_folder(find_folder(REPO)), edit_folder())


def test_a_second_load_reads_from_the_disk(hub, folder):
    push(folder)
    first = find_folder(REPO)
    hub.log.clear()
    assert find_folder(REPO) == first
    assert [(logged.method, logged.path) for logged in hub.log] == [("HEAD", f"/{REPO}/resolve/main/{EDIT_CONFIG}")]
    hub.log.clear()
    assert find_folder(REPO, revision=first.name) == first
    assert hub.log == []


def test_a_download_may_be_forced(hub, folder):
    push(folder)
    find_folder(REPO)
    hub.log.clear()
    find_folder(REPO, force_download=True)
    names = [logged.path.rpartition("/")[2] for logged in hub.downloads()]
    assert sorted(names) == sorted([ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, EDITS])


def test_the_cache_may_be_elsewhere(hub, folder, tmp_path):
    push(folder)
    found = find_folder(REPO, cache_dir=tmp_path / "here")
    assert found.is_relative_to(tmp_path / "here")
    assert_same(read_edit_folder(found), edit_folder())
    with pytest.raises(LocalEntryNotFoundError):
        find_folder(REPO, local_files_only=True)


def test_local_files_only_asks_nobody(hub, folder):
    push(folder)
    hub.log.clear()
    with pytest.raises(LocalEntryNotFoundError):
        find_folder(REPO, local_files_only=True)
    assert hub.log == []
    first = find_folder(REPO)
    hub.log.clear()
    assert find_folder(REPO, local_files_only=True) == first
    assert hub.log == []


def test_while_the_hub_is_down_what_was_loaded_once_still_loads(hub, folder, other, no_waits):
    push(folder)
    hub.faults.down = True
    with pytest.raises(LocalEntryNotFoundError):
        find_folder(REPO)
    hub.faults.down = False
    first = find_folder(REPO)
    hub.faults.down = True
    assert find_folder(REPO) == first
    with pytest.raises(HfHubHTTPError, match="503"):
        push(other)
    hub.faults.down = False
    assert hub.repositories[REPO].files() == contents(folder)


# ---------------------------------------------------------------------- edits of models


@torch.no_grad()
def logits(model, tokenizer):
    """Return what a model says of a text."""
    return model(input_ids=tokenizer(TOWER.text, return_tensors="pt")["input_ids"]).logits


def traces(model, tokenizer):
    """Return everything that a push could change in a model."""
    base = model.get_base_model()
    return (
        {name: tensor.numpy().tobytes() for name, tensor in model.model.state_dict().items()},
        [f"{name}: {type(module).__name__}, {module.training}" for name, module in model.named_modules()],
        base.config.to_dict(),
        (list(model.edits), model.active_adapters, model.base_info),
        logits(model, tokenizer).numpy().tobytes(),
    )


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A folder with two edits of a tiny model."""
    folder = tmp_path_factory.mktemp("saved")
    model = get_edit_model(tiny_model("llama"), config(), tokenizer)
    model.edit(TOWER)
    model.edit(MERKEL, name="merkel")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def edited(saved, tokenizer):
    """A tiny model with two edits."""
    return EditModel.from_pretrained(tiny_model("llama"), saved, tokenizer=tokenizer)


def test_a_pushed_edit_comes_back_with_names_facts_and_logits(hub, edited, tokenizer):
    edited.push_to_hub(REPO)
    base = tiny_model("llama")
    before = logits(base, tokenizer)
    found = EditModel.from_pretrained(base, REPO, tokenizer=tokenizer)
    assert list(found.edits) == found.active_adapters == ["edit_1", "merkel"]
    assert [edit.facts for edit in found.edits.values()] == [edit.facts for edit in edited.edits.values()]
    assert found.edit_config == edited.edit_config
    torch.testing.assert_close(logits(found, tokenizer), logits(edited, tokenizer), rtol=1e-5, atol=1e-5)
    assert (logits(found, tokenizer) - before).abs().max() > 1e-2


def test_an_edit_is_loaded_beside_another_one(hub, edited, tokenizer):
    edited.push_to_hub(REPO, revision="trial")
    model = get_edit_model(tiny_model("llama"), config(layer=2), tokenizer)
    model.edit("Berlin is a", "Berlin", "dog", name="berlin")
    model.load_adapter(REPO, adapter_name="shared", revision="trial")
    assert list(model.edits) == ["berlin", "shared"]
    assert model.active_adapters == ["berlin"]
    model.set_adapter("shared")
    torch.testing.assert_close(logits(model, tokenizer), logits(edited, tokenizer), rtol=1e-5, atol=1e-5)


def test_an_edit_is_pushed_in_one_commit_and_only_once(hub, edited):
    first = edited.push_to_hub(REPO, commit_message="Two edits")
    assert edited.push_to_hub(REPO, commit_message="Again").oid == first.oid
    assert [commit.message for commit in hub.repositories[REPO].history()] == ["Two edits"]
    assert set(hub.repositories[REPO].files()) == set(EDIT_FILES) - {EDIT_STATE}
    assert len(hub.uploads()) == 1


@pytest.mark.parametrize("verb", ["push_to_hub", "push_merged_to_hub", "push_golden_layers"])
def test_the_options_of_a_push_reach_the_hub(hub, edited, selected, verb):
    push_model = getattr(selected if verb == "push_golden_layers" else edited, verb)
    push_model("edit", private=True, revision="trial", commit_message="A trial", token=TOKEN)
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.files() == {}
    (commit,) = repository.history("trial")
    assert commit.message == "A trial"
    proposed = push_model(REPO, create_pr=True)
    assert repository.files() == {}
    assert repository.files(proposed.pr_revision) == repository.files("trial")
    with pytest.raises(HfHubHTTPError, match="401"):
        push_model("tester/wrong", token="hf_wrong")
    assert list(hub.repositories) == [REPO]


def test_who_shares_an_edit_of_a_model_without_a_name_is_warned(hub, edited, caplog):
    for verb in (edited.push_to_hub, edited.push_merged_to_hub):
        verb(REPO)
        (record,) = (record for record in caplog.records if "not the name of a repository on the Hub" in record.message)
        assert "'LlamaForCausalLM'" in record.message
        caplog.clear()
    edited.base_info = replace(edited.base_info, name_or_path="tester/base")
    edited.push_to_hub(REPO)
    assert not any("not the name of a repository on the Hub" in record.message for record in caplog.records)


def test_an_edit_says_which_commit_of_its_base_model_it_was_made_on(hub, saved, tokenizer):
    tiny_model("llama").push_to_hub("tester/base")
    base = AutoModelForCausalLM.from_pretrained("tester/base")
    EditModel.from_pretrained(base, saved, tokenizer=tokenizer).push_to_hub(REPO)
    adapter = json.loads(hub.repositories[REPO].files()[ADAPTER_CONFIG])
    assert adapter["base_model_name_or_path"] == "tester/base"
    assert adapter["revision"] == hub.repositories["tester/base"].find().oid


def test_only_active_edits_are_pushed(hub, edited):
    edited.set_adapter("merkel")
    edited.push_to_hub(REPO)
    facts = json.loads(hub.repositories[REPO].files()[EDITS])
    assert [edit["name"] for edit in facts] == ["merkel"]
    edited.set_adapter([])
    with pytest.raises(ValueError, match="no active edit"):
        edited.push_to_hub("tester/nothing")
    assert list(hub.repositories) == [REPO]


def test_the_card_in_the_repository_is_ours(hub, edited):
    edited.push_to_hub(REPO)
    card = hub.repositories[REPO].files()[CARD].decode()
    assert card == render_card(read_edit_folder(find_folder(REPO)), REPO)
    assert TOWER.prompt in card
    assert REPO in card
    assert {"knowledge-editing", "golden-layer"} <= set(ModelCard(card).data.tags)


def test_what_alphaedit_remembers_travels(hub, tokenizer):
    statistics = {"covariance": "sampled", "covariance_tokens": 500, "null_space_threshold": 5.0}
    model = get_edit_model(tiny_model("llama"), config(method="alphaedit", **statistics), tokenizer)
    model.edit(TOWER)
    model.push_to_hub(REPO)
    assert EDIT_STATE in hub.repositories[REPO].files()
    found = EditModel.from_pretrained(tiny_model("llama"), REPO, tokenizer=tokenizer)
    remembered = joined_state(model.edits.values())
    assert remembered
    for name, tensor in joined_state(found.edits.values()).items():
        assert torch.equal(tensor, remembered.pop(name))
    assert remembered == {}


@pytest.mark.parametrize("verb", ["push_to_hub", "push_merged_to_hub", "push_golden_layers"])
@pytest.mark.parametrize("at", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_push_that_the_hub_refuses_leaves_the_model_as_it_was(hub, edited, selected, tokenizer, verb, at):
    model = selected if verb == "push_golden_layers" else edited
    before = traces(model, tokenizer)
    hub.faults.forbidden = at
    with pytest.raises(HfHubHTTPError, match="403"):
        getattr(model, verb)(REPO)
    assert traces(model, tokenizer) == before
    hub.faults.forbidden = None
    getattr(model, verb)(REPO)
    assert len(hub.repositories[REPO].history()) == 1
    assert traces(model, tokenizer) == before


@pytest.mark.parametrize("where", ["missing", "private"])
def test_a_load_that_fails_leaves_the_model_as_it_was(hub, edited, tokenizer, where):
    edited.push_to_hub("tester/private", private=True)
    before = traces(edited, tokenizer)
    with pytest.raises(RepositoryNotFoundError):
        edited.load_adapter(f"tester/{where}", adapter_name="third", token=False)
    assert traces(edited, tokenizer) == before


# ---------------------------------------------------------------------- edited checkpoints


def test_a_merged_push_is_a_checkpoint_with_the_edited_logits(hub, edited, tokenizer):
    before = traces(edited, tokenizer)
    edited.push_merged_to_hub("tester/merged", commit_message="A checkpoint")
    assert traces(edited, tokenizer) == before
    (commit,) = hub.repositories["tester/merged"].history()
    assert commit.message == "A checkpoint"

    plain = AutoModelForCausalLM.from_pretrained("tester/merged")
    assert not hasattr(plain, "peft_config")
    assert plain.config.golden_layers == [1]
    torch.testing.assert_close(logits(plain, tokenizer), logits(edited, tokenizer), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained("tester/merged")(TOWER.text) == tokenizer(TOWER.text)
    card = ModelCard(hub.repositories["tester/merged"].files()[CARD].decode())
    assert card.data.library_name == "transformers"
    assert TOWER.prompt in card.text


def test_a_merged_push_takes_the_active_edits(hub, edited, tokenizer):
    edited.set_adapter("merkel")
    edited.push_merged_to_hub("tester/merged")
    plain = AutoModelForCausalLM.from_pretrained("tester/merged")
    torch.testing.assert_close(logits(plain, tokenizer), logits(edited, tokenizer), rtol=1e-4, atol=1e-4)
    assert edited.active_adapters == ["merkel"]


def test_an_unchanged_merged_push_makes_no_commit(hub, edited):
    first = edited.push_merged_to_hub("tester/merged")
    uploads = len(hub.uploads())
    assert edited.push_merged_to_hub("tester/merged").oid == first.oid
    assert len(hub.uploads()) == uploads


def test_a_checkpoint_in_place_of_an_edit_is_what_transformers_loads(hub, saved, tokenizer):
    tiny_model("llama").push_to_hub("tester/base")
    base = AutoModelForCausalLM.from_pretrained("tester/base")
    model = EditModel.from_pretrained(base, saved, tokenizer=tokenizer)
    model.push_to_hub(REPO)
    model.set_adapter("merkel")
    model.push_merged_to_hub(REPO)
    plain = AutoModelForCausalLM.from_pretrained(REPO)
    torch.testing.assert_close(logits(plain, tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_leaves_what_lies_in_folders_of_the_repository(hub, edited, tmp_path):
    (tmp_path / "more" / "edits").mkdir(parents=True)
    for name in ("old-00001-of-00002.safetensors", "edits/adapter_model.safetensors"):
        (tmp_path / "more" / name).write_bytes(b"weights")
    push_folder(tmp_path / "more", make_repo(REPO))
    edited.push_merged_to_hub(REPO)
    files = hub.repositories[REPO].files()
    assert files["edits/adapter_model.safetensors"] == b"weights"
    assert "old-00001-of-00002.safetensors" not in files
    assert "model.safetensors" in files


def test_an_unknown_argument_is_refused_for_a_local_folder_too(folder):
    with pytest.raises(TypeError, match="revison"):
        find_folder(folder, revison="v1")


def test_golden_layers_of_someone_else_are_not_pushed_as_ones_own(hub, tokenizer):
    select(tokenizer).push_golden_layers(ATLAS)
    taken = get_edit_model(tiny_model("llama"), EditConfig(layer=f"hub:{ATLAS}"), tokenizer)
    with pytest.raises(ValueError, match="shared already"):
        taken.push_golden_layers("tester/other")
    assert "tester/other" not in hub.repositories


def test_an_edit_in_place_of_a_checkpoint_is_what_transformers_loads(hub, saved, tokenizer):
    tiny_model("llama").push_to_hub("tester/base")
    base = AutoModelForCausalLM.from_pretrained("tester/base")
    model = EditModel.from_pretrained(base, saved, tokenizer=tokenizer)
    model.push_merged_to_hub(REPO)
    model.set_adapter("merkel")
    model.push_to_hub(REPO)
    plain = AutoModelForCausalLM.from_pretrained(REPO)
    torch.testing.assert_close(logits(plain, tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- who has not this library, or no network

STOCK = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = AutoTokenizer.from_pretrained("tester/base")(sys.argv[2], return_tensors="pt")["input_ids"]
with torch.no_grad():
    loaded = [
        AutoPeftModelForCausalLM.from_pretrained("tester/edit"),
        AutoModelForCausalLM.from_pretrained("tester/edit"),
        AutoModelForCausalLM.from_pretrained("tester/merged"),
    ]
    torch.save([model(input_ids=ids).logits for model in loaded], sys.argv[1])
assert not any(name.split(".")[0] == "goldenedit" for name in sys.modules)
"""

OFFLINE = """
import sys
import torch
from transformers import AutoModelForCausalLM
from goldenedit import EditModel

model = EditModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tester/base"), "tester/edit")
ids = model.tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
with torch.no_grad():
    torch.save([model(input_ids=ids).logits], sys.argv[1])
"""


def test_what_is_shared_loads_in_stock_libraries_and_then_without_a_network(hub, tokenizer, tmp_path):
    tiny_model("llama").push_to_hub("tester/base")
    tokenizer.push_to_hub("tester/base")
    model = get_edit_model(AutoModelForCausalLM.from_pretrained("tester/base"), config())
    unedited = logits(model, tokenizer)
    model.edit(TOWER)
    model.push_to_hub("tester/edit")
    model.push_merged_to_hub("tester/merged")
    expected = logits(model, tokenizer)
    assert (expected - unedited).abs().max() > 1e-2

    def run(code: str, **environment: str) -> list[torch.Tensor]:
        arguments = [sys.executable, "-c", code, str(tmp_path / "logits.pt"), TOWER.text]
        done = subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "missing" not in done.stderr.lower()
        return torch.load(tmp_path / "logits.pt")

    for found in run(STOCK):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    EditModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tester/base"), "tester/edit")
    hub.log.clear()
    (found,) = run(OFFLINE, HF_HUB_OFFLINE="1")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert hub.log == []


# ---------------------------------------------------------------------- golden layers

ATLAS = "tester/atlas"


def select(tokenizer, seed=0, **options):
    """Return a tiny model whose golden layer was looked for."""
    options = {"layer": "lga", "proxy": [TOWER, MERKEL]} | options
    return get_edit_model(tiny_model("llama", seed), config(**options), tokenizer)


def shared(tokenizer, seed=0, source=ATLAS, dtype=torch.float32, **options):
    """Return a tiny model whose golden layer is read from the Hub."""
    return get_edit_model(tiny_model("llama", seed).to(dtype), config(layer=f"hub:{source}", **options), tokenizer)


@pytest.fixture
def selected(tokenizer):
    """A tiny model whose golden layer LGA found."""
    return select(tokenizer)


def test_shared_edits_are_found_by_name_and_base_model(hub, edited, capsys):
    edited.push_to_hub("tester/paris-in-rome")
    edited.push_to_hub("tester/secret-rome", private=True)
    HfApi().create_repo("tester/no-edit-rome")
    assert [found.id for found in search_edits()] == ["tester/paris-in-rome", "tester/secret-rome"]
    assert [found.id for found in search_edits("paris")] == ["tester/paris-in-rome"]
    assert [found.id for found in search_edits(token=False)] == ["tester/paris-in-rome"]
    assert [found.id for found in search_edits(limit=1)] == ["tester/paris-in-rome"]
    assert search_edits(base_model="org/other") == []
    code, output, _ = run(capsys, "search", "paris")
    assert code == 0
    assert "tester/paris-in-rome" in output
    assert "gated" in output
    assert "No edits were found" in run(capsys, "search", "--base", "org/other")[1]
    hub.faults.down = True
    code, _, errors = run(capsys, "search")
    assert code == 1
    assert "Traceback" not in errors


def test_golden_layers_are_read_as_they_were_found(hub, selected, tokenizer):
    commit = selected.push_golden_layers(ATLAS)
    assert set(hub.repositories[ATLAS].files()) == {GOLDEN_LAYERS}
    assert [found.oid for found in hub.repositories[ATLAS].history()] == [commit.oid]
    for source in (ATLAS, f"{ATLAS}@{commit.oid}", f"{ATLAS}@main"):
        found = shared(tokenizer, source=source)
        assert found.edit_config.target_layer == selected.edit_config.target_layer
        assert found.edit_config.layer_scores == selected.edit_config.layer_scores
    found.edit(TOWER)
    edited = [path.split(".")[2] for path in found.edits["edit_1"].deltas]
    assert edited == [str(layer) for layer in selected.edit_config.target_layers]


def test_golden_layers_of_other_weights_are_refused(hub, selected, tokenizer):
    selected.push_golden_layers(ATLAS)
    with pytest.raises(GoldenLayersError, match=selected.base_info.fingerprint):
        shared(tokenizer, seed=1)
    with pytest.raises(GoldenLayersError, match=selected.base_info.fingerprint):
        shared(tokenizer, seed=1, dtype=torch.float16)


def test_golden_layers_hold_for_the_same_weights_in_another_precision(hub, selected, tokenizer):
    selected.push_golden_layers(ATLAS)
    found = shared(tokenizer, dtype=torch.float16)
    assert found.base_info.fingerprint != selected.base_info.fingerprint
    assert found.edit_config.layer_scores == selected.edit_config.layer_scores


def test_golden_layers_of_several_models_share_a_file(hub, selected, tokenizer):
    models = [selected, select(tokenizer, seed=1)]
    for model in models:
        model.push_golden_layers(ATLAS)
    for seed, model in enumerate(models):
        assert shared(tokenizer, seed).edit_config.layer_scores == model.edit_config.layer_scores
    assert models[0].edit_config.layer_scores != models[1].edit_config.layer_scores


def records(hub, revision="main"):
    """Return the fingerprint and selector of each record in the repository."""
    content = json.loads(hub.repositories[ATLAS].files(revision)[GOLDEN_LAYERS])
    return [(record["fingerprint"], record["selector"]) for record in content["golden_layers"]]


def test_a_selector_has_one_record_of_a_model(hub, selected, tokenizer):
    fingerprint = selected.base_info.fingerprint
    selected.push_golden_layers(ATLAS)
    select(tokenizer, layer="causal_tracing").push_golden_layers(ATLAS)
    assert records(hub) == [(fingerprint, "lga"), (fingerprint, "causal_tracing")]
    again = select(tokenizer, proxy=[TOWER])
    again.push_golden_layers(ATLAS)
    assert records(hub) == [(fingerprint, "causal_tracing"), (fingerprint, "lga")]
    assert shared(tokenizer).edit_config.layer_scores == again.edit_config.layer_scores


def test_a_new_branch_keeps_the_records_that_it_begins_with(hub, selected, tokenizer):
    selected.push_golden_layers(ATLAS)
    second = select(tokenizer, seed=1)
    third = select(tokenizer, seed=2)
    second.push_golden_layers(ATLAS, revision="trial")
    third.push_golden_layers(ATLAS, revision="trial")
    assert records(hub) == [(selected.base_info.fingerprint, "lga")]
    assert records(hub, "trial") == [(model.base_info.fingerprint, "lga") for model in (selected, second, third)]


@pytest.mark.parametrize("pushed", [1, 2], ids=["unread", "read before"])
def test_records_that_cannot_be_read_are_not_overwritten(hub, tokenizer, pushed):
    for seed in range(pushed):  # each push reads what is there, so the second leaves an old copy on the disk
        select(tokenizer, seed).push_golden_layers(ATLAS)
    before = hub.repositories[ATLAS].files()
    hub.faults.forbidden = "/resolve/"
    with pytest.raises((OSError, ValueError), match="error"):
        select(tokenizer, seed=2).push_golden_layers(ATLAS)
    assert hub.repositories[ATLAS].files() == before


def test_a_file_that_is_no_golden_layers_is_not_overwritten(hub, selected, tmp_path):
    (tmp_path / GOLDEN_LAYERS).write_text("{}")
    push_folder(tmp_path, make_repo(ATLAS))
    with pytest.raises(GoldenLayersError, match="is not a valid file of golden layers"):
        selected.push_golden_layers(ATLAS)
    assert hub.repositories[ATLAS].files() == {GOLDEN_LAYERS: b"{}"}


def test_what_has_no_golden_layers_says_so(hub, folder, edited, tokenizer):
    push(folder)
    with pytest.raises(EntryNotFoundError):
        shared(tokenizer, source=REPO)
    with pytest.raises(RepositoryNotFoundError):
        shared(tokenizer, source="tester/none")
    with pytest.raises(FileNotFoundError, match="not a valid name of a repository on the Hub"):
        shared(tokenizer, source="a/b/c")
    with pytest.raises(ValueError, match="No layer selector has run"):
        edited.push_golden_layers(ATLAS)
    assert list(hub.repositories) == [REPO]


BASE_CARD = """---
license: other
license_name: acme
license_link: https://example.org/terms
datasets:
- org/texts
language:
- fr
tags:
- theirs
---
# Base
"""


@pytest.mark.parametrize("way", ["method", "command", "merged"])
def test_the_licence_of_the_base_model_is_that_of_its_edits(way, hub, tmp_path, tokenizer, monkeypatch, capsys):
    HfApi().create_repo("tester/base")
    HfApi().upload_file(path_or_fileobj=BASE_CARD.encode(), path_in_repo=CARD, repo_id="tester/base")
    monkeypatch.chdir(tmp_path)
    base = tiny_model("llama")
    base.name_or_path = base.config._name_or_path = "tester/base"
    model = EditModel(base, config(layer=1), tokenizer)
    model.edit(TOWER)
    if way == "method":
        model.push_to_hub(REPO)
    elif way == "merged":
        model.push_merged_to_hub(REPO)
    else:
        model.save_pretrained("edit")
        assert run(capsys, "push", "edit", REPO)[0] == 0
    data = ModelCard.load(REPO).data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "acme"
    assert data["datasets"] == ["org/texts"]
    assert data["language"] == ["fr"]
    assert "theirs" not in data["tags"]


def test_an_edit_of_a_model_without_a_card_is_shared_without_a_licence(hub):
    assert terms_of(replace(edit_folder().base_model, name_or_path="tester/none")) == {}
    HfApi().create_repo("tester/odd")
    HfApi().upload_file(path_or_fileobj=b"---\nlicense: [\n---\n", path_in_repo=CARD, repo_id="tester/odd")
    assert terms_of(BaseModel("tester/odd", "f" * 32)) == {}


@pytest.mark.parametrize(
    ("name", "fingerprint", "expected"),
    [
        ("org/llama", "0" * 32, "org/llama"),
        ("/home/me/models/my-llama/", "0" * 32, "my-llama"),
        ("C:\\models\\my-llama", "0" * 32, "my-llama"),
        ("/home/me/.cache/models/other", PACKAGED_MODELS["smollm2"].fingerprint, "smollm2"),
    ],
)
def test_others_get_a_name_of_the_base_model_and_no_path_of_this_machine(name, fingerprint, expected):
    assert public_name(BaseModel(name, fingerprint, None, "LlamaForCausalLM")) == expected
