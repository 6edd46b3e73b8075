"""Damaged edit folders are refused, with the file's name."""

import json
import multiprocessing
import os
import shutil
import string
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contents import (
    FIRST,
    SECOND,
    assert_refused,
    assert_same,
    change_json,
    delta,
    edit_folder,
    edits_with_state,
    evaluation,
    rename_edit,
    rename_module,
    resign,
    rewrite,
    set_ranks,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from goldenedit.storage.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    EDIT_CONFIG,
    EDIT_STATE,
    EDITS,
    EditFolderError,
    is_edit_name,
    write_edit_folder,
)
from goldenedit.storage.reading import listed_files, read_edit_folder

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDIT_CONFIG, EDITS)
SIGNED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS, EDIT_STATE)  # those that edit_config.json has digests of


# ---------------------------------------------------------------------- by accident: nothing is signed anew


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, name)


def test_a_missing_state_is_named(folder_with_state):
    (folder_with_state / EDIT_STATE).unlink()
    assert_refused(folder_with_state, EDIT_STATE)


def test_a_state_of_another_edit_is_named(folder, folder_with_state):
    shutil.copy(folder_with_state / EDIT_STATE, folder)
    assert_refused(folder, EDIT_STATE)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_named(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert_refused(folder, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("target", ["itself", "nothing", "/dev/null", "/"])
def test_a_link_to_what_is_no_file_is_named(folder, name, target):
    (folder / name).unlink()
    (folder / name).symlink_to(name if target == "itself" else target)
    assert_refused(folder, name)


def test_a_link_to_the_same_file_elsewhere_is_fine(folder, tmp_path):
    for name in FILES:  # as the Hub's cache has them
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert_same(read_edit_folder(folder), edit_folder())


def refuse(folder):
    try:
        read_edit_folder(folder)
    except EditFolderError:
        sys.exit(7)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize("name", SIGNED)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(folder_with_state, name):
    (folder_with_state / name).unlink()
    os.mkfifo(folder_with_state / name)
    reader = multiprocessing.get_context("fork").Process(target=refuse, args=(folder_with_state,))
    reader.start()
    reader.join(5)
    reader.kill()
    reader.join()
    assert reader.exitcode == 7


def test_a_missing_card_does_not_matter(folder):
    (folder / CARD).unlink()
    assert_same(read_edit_folder(folder), edit_folder())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
@pytest.mark.parametrize("signed", [False, True])
def test_a_truncated_file_is_named(folder, name, share, signed):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    if signed and name != EDIT_CONFIG:
        resign(folder)
    assert_refused(folder, name)


@pytest.mark.parametrize("name", SIGNED)
def test_files_of_two_edits_of_the_same_shape_are_not_mixed(folder_with_state, tmp_path, name):
    other = edits_with_state(seed=10)
    write_edit_folder(tmp_path / "other", replace(other, base_model=replace(other.base_model, revision="b")), "")
    shutil.copy(tmp_path / "other" / name, folder_with_state / name)
    assert_refused(folder_with_state, name)


def test_no_folder_and_a_file_are_no_edit_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        assert_refused(tmp_path / name)


def test_a_plain_adapter_is_sent_to_peft(folder):
    (folder / EDIT_CONFIG).unlink()
    assert_refused(folder, "PeftModel")


# ---------------------------------------------------------------------- by an author who recomputes the digests


HUGE = 10**400
DEEP = "[" * 100_000 + "]" * 100_000


def test_a_folder_that_is_signed_anew_reads(folder_with_state):
    for name in (ADAPTER_CONFIG, EDITS, EDIT_CONFIG):
        rewrite(folder_with_state, name, lambda content: None)
    rewrite(folder_with_state, ADAPTER_WEIGHTS, lambda tensors: None)
    assert_same(read_edit_folder(folder_with_state), edits_with_state())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [
        *(
            b"not JSON",
            b"\xff\xfe",
            b"NaN",
            b"Infinity",
            b"null",
            b"3",
            b"[]",
            b'"text"',
            b"{}",
            b"[{}]",
            b"[null]",
            b"",
        ),
        *(b"9" * 5000, DEEP.encode(), b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"\0", b"[1e999]"),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_of_something_else_is_an_error(folder, name, content):
    (folder / name).write_bytes(content)
    if name != EDIT_CONFIG:
        resign(folder)
    assert_refused(folder)


@pytest.mark.parametrize(
    "version", [1, 3, 0, -1, None, "1", True, False, [1], {}, 1.5, HUGE], ids=lambda v: repr(v)[:9]
)
def test_another_format_version_is_named(folder, version):
    rewrite(folder, EDIT_CONFIG, lambda content: content.update(format_version=version))
    assert_refused(folder, EDIT_CONFIG, f"version {version!r}")
    with pytest.raises(EditFolderError, match=EDIT_CONFIG):
        listed_files(folder)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "x", "", CARD, EDIT_CONFIG, f"./{EDITS}", "a\\b", EDITS.upper()]
)
def test_a_file_that_is_not_of_the_format_is_neither_listed_nor_looked_for(folder, name):
    change_json(folder / EDIT_CONFIG, lambda content: content["files"].update({name: "0" * 64}))
    assert_refused(folder, EDIT_CONFIG)
    with pytest.raises(EditFolderError, match=EDIT_CONFIG):
        listed_files(folder)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS])
def test_a_file_without_a_digest_is_an_error(folder, name):
    change_json(folder / EDIT_CONFIG, lambda content: content["files"].pop(name))
    assert_refused(folder, EDIT_CONFIG)


@pytest.mark.parametrize("files", [None, 3, [], {}, "text", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, EDITS]], ids=repr)
def test_digests_that_are_none_are_an_error(folder, files):
    change_json(folder / EDIT_CONFIG, lambda content: content.update(files=files))
    assert_refused(folder, EDIT_CONFIG)


@pytest.mark.parametrize("digest", [None, 3, "", "0" * 64, ["x"]], ids=repr)
@pytest.mark.parametrize("name", SIGNED)
def test_another_digest_is_an_error_that_names_the_file(folder_with_state, name, digest):
    change_json(folder_with_state / EDIT_CONFIG, lambda content: content["files"].update({name: digest}))
    assert_refused(folder_with_state, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", "AB")
def test_a_factor_that_is_not_finite_is_named(folder, value, factor):
    name = f"base_model.model.{SECOND}.lora_{factor}.weight"
    rewrite(folder, ADAPTER_WEIGHTS, lambda tensors: tensors[name].__setitem__((0, 0), value))
    assert_refused(folder, ADAPTER_WEIGHTS, SECOND)


INTEGERS = (torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


@pytest.mark.parametrize("dtype", [*INTEGERS, *EIGHT_BITS, torch.complex64], ids=str)
@pytest.mark.parametrize("factor", "AB")
def test_a_factor_of_a_dtype_that_no_edit_has_is_named(folder, dtype, factor):
    name = f"base_model.model.{SECOND}.lora_{factor}.weight"
    rewrite(folder, ADAPTER_WEIGHTS, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert_refused(folder, ADAPTER_WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_factors_of_another_floating_dtype_read(folder, dtype):
    rewrite(
        folder,
        ADAPTER_WEIGHTS,
        lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}),
    )
    assert torch.equal(read_edit_folder(folder).edits[0].deltas[FIRST].A, delta(2, 0).A.to(dtype))


def other_rank(tensors):
    for factor, shape in (("A", (2, 6)), ("B", (4, 2))):
        tensors[f"base_model.model.{FIRST}.lora_{factor}.weight"] = torch.zeros(shape)


@pytest.mark.parametrize(
    "change",
    [
        other_rank,
        lambda tensors: tensors.update({f"base_model.model.{FIRST}.lora_A.weight": torch.zeros(2, 6)}),
        lambda tensors: tensors.update({f"base_model.model.{FIRST}.lora_A.weight": torch.zeros(3)}),
        lambda tensors: tensors.update({f"base_model.model.{FIRST}.lora_A.weight": torch.zeros(3, 0)}),
        lambda tensors: tensors.update({"stray": torch.zeros(1)}),
        lambda tensors: tensors.update({f"base_model.model.{FIRST}.lora_magnitude_vector": torch.zeros(4)}),
        lambda tensors: tensors.pop(f"base_model.model.{FIRST}.lora_B.weight"),
        lambda tensors: tensors.clear(),
    ],
    ids=[
        *("other rank", "factors that do not multiply", "a vector", "an empty matrix", "extra tensor"),
        *("a part of DoRA", "missing tensor", "no tensors"),
    ],
)
def test_factors_that_are_not_those_of_the_config_are_named(folder, change):
    rewrite(folder, ADAPTER_WEIGHTS, change)
    assert_refused(folder, ADAPTER_WEIGHTS)


def test_ranks_without_edits_are_an_error(folder):
    set_ranks(folder, 0, 0, factors=True)
    assert_refused(folder, ADAPTER_WEIGHTS)


def test_a_folder_of_no_edits_is_an_error(folder):
    change_json(folder / EDIT_CONFIG, lambda content: content.update(edits=[]))
    change_json(folder / ADAPTER_CONFIG, lambda lora: lora.update(r=0, lora_alpha=0, target_modules=[]))
    (folder / EDITS).write_text("[]")
    save_file({}, folder / ADAPTER_WEIGHTS)
    resign(folder)
    assert_refused(folder)


@pytest.mark.parametrize("rank", [10**6, 2**31, 2**63, 10**400], ids=lambda rank: f"{len(str(rank))} digits")
def test_a_huge_rank_in_the_configs_alone_is_an_error(folder, rank):
    set_ranks(folder, 2, rank, factors=False)
    assert_refused(folder, ADAPTER_WEIGHTS)


@pytest.mark.parametrize("rank", [64 * 4 - 1, 5000])
def test_a_rank_that_fills_the_memory_is_an_error(folder, rank):
    set_ranks(folder, 2, rank, factors=True)
    assert_refused(folder, ADAPTER_WEIGHTS)


def test_a_rank_above_the_matrix_is_none(folder):
    set_ranks(folder, 2, 64 * 4 - 2, factors=True)
    assert sum(edit.rank for edit in read_edit_folder(folder).edits) == 64 * 4


@pytest.mark.parametrize(
    "change",
    [{"r": 2}, {"lora_alpha": 6}, {"r": None}, {"target_modules": [FIRST]}, {"target_modules": [FIRST, SECOND, "x"]}]
    + [{"target_modules": [[]]}, {"target_modules": "text"}, {"r": HUGE}, {"lora_alpha": HUGE}]
    + [{"target_modules": value} for value in (None, 3)]
    + [{"r": value, "lora_alpha": value} for value in (0, -3, "3", None, 2.5, [3], True, HUGE)],
    ids=lambda change: str(change)[:60],
)
def test_an_adapter_config_of_other_factors_is_an_error(folder, change):
    rewrite(folder, ADAPTER_CONFIG, lambda content: content.update(change))
    assert_refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"use_rslora": True}, {"alpha_pattern": {FIRST: 30}}, {"rank_pattern": {FIRST: 1}}, {"use_dora": True}),
        *({"peft_type": "LOHA"}, {"layers_to_transform": [1]}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}),
        *({"base_model_name_or_path": "somebody/else"}, {"fan_in_fan_out": "yes"}, {"fan_in_fan_out": None}),
        {"unknown": 1},
    ],
    ids=str,
)
def test_an_adapter_config_that_says_more_or_other_than_the_edits_is_named(folder, change):
    rewrite(folder, ADAPTER_CONFIG, lambda content: content.update(change))
    assert_refused(folder, ADAPTER_CONFIG)


PATH_TRICKS = (
    "../x",
    "a/b",
    "",
    "..",
    ".",
    "/etc/passwd",
    "C:\\x",
    "a..b",
    ".a",
    "a.",
    "a\0b",
    "a\u2028b",
    "x\n",
    "a b.c*",
)


@pytest.mark.parametrize("path", [*PATH_TRICKS, f"../{SECOND}", f"{SECOND}/", f"{SECOND}.", ".*down_proj", "mödel"])
def test_a_module_whose_path_is_none_is_named(folder, path):
    rename_module(folder, SECOND, path)
    assert_refused(folder, ADAPTER_CONFIG)


@pytest.mark.parametrize(
    "name", [*PATH_TRICKS, "a:b", "*", "edit 1\n", " ", " a", None, 3, True, ["a"], {"a": 1}], ids=repr
)
def test_an_edit_whose_name_is_none_is_an_error(folder_with_state, name):
    assert not is_edit_name(name)
    rename_edit(folder_with_state, "edit_1", name)
    assert_refused(folder_with_state)


@pytest.mark.parametrize(
    "name", ["edit_1", "my edit", "a-b", "Zürich", "_", "x" * 300, "a.b", "3", "2024 update", "update"]
)
def test_an_edit_has_the_name_that_it_was_given(folder, name):
    assert is_edit_name(name)
    rename_edit(folder, "edit_1", name)
    assert [edit.name for edit in read_edit_folder(folder).edits] == [name, "tower"]


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop(),
        lambda facts: facts[0].update(name="other"),
        lambda facts: facts[0].pop("facts"),
        lambda facts: facts[0]["facts"][0].pop("steps"),
        lambda facts: facts[0]["facts"][1].update(subject="The Louvre"),
        lambda facts: facts[0]["facts"][0].update(probability_after="high"),
        lambda facts: facts[0]["facts"][0].update(probability_before=10**400),
        lambda facts: facts[0]["facts"][0].update(probability_after=1.5),
        lambda facts: facts[0]["facts"][0].update(weakest_after="low"),
        lambda facts: facts[0]["facts"][0].update(weakest_after=-0.5),
        lambda facts: facts[0]["facts"][0].update(paraphrases=3),
        lambda facts: facts[0]["facts"][0].update(locality=[["one"]]),
        lambda facts: facts.append({"name": "stray", "facts": []}),
        lambda facts: facts.append(facts[1]),
        lambda facts: facts.insert(0, {**facts[0], "facts": facts[1]["facts"]}),
        lambda facts: facts.reverse(),
        lambda facts: facts[0].update(facts=[]),
    ],
    ids=[
        *("too few", "other name", "no facts", "no outcome", "subject not in the prompt", "probability", "no float"),
        *("above 1", "weakest", "below 0", "paraphrases"),
        *("locality", "too many", "the same twice", "two of one name", "another order", "no fact"),
    ],
)
def test_edits_that_do_not_match_are_an_error(folder, change):
    rewrite(folder, EDITS, change)
    assert_refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda sidecar: sidecar["edits"][0].update(ranks=[0, 9]),
        lambda sidecar: sidecar["edits"][1].update(ranks=[2, 2**70]),
        lambda sidecar: sidecar["edits"][0].update(ranks=[2, 0]),
        lambda sidecar: sidecar["edits"][0].update(ranks=[0, 1.5]),
        lambda sidecar: sidecar["edits"][0].update(ranks=[0, 1, 2]),
        lambda sidecar: sidecar["edits"][0].update(ranks=None),
        lambda sidecar: sidecar["edits"][0].update(modules=["x"]),
        lambda sidecar: sidecar["edits"][0].update(modules=[]),
        lambda sidecar: sidecar["edits"][0].update(modules=None),
        lambda sidecar: sidecar["config"].update(layr=3),
        lambda sidecar: sidecar["config"].update(layer=1.5),
        lambda sidecar: sidecar["config"].update(layer="lga", target_layer=1.5),
        lambda sidecar: sidecar["config"].update(layer="lga", target_layer=[1, "x"]),
        lambda sidecar: sidecar["config"].update(layer="lga", target_layer=[[1]]),
        lambda sidecar: sidecar["config"].update(layer_scores=3),
        lambda sidecar: sidecar["config"].update(layer_scores=["x"]),
        lambda sidecar: sidecar["config"].update(lr=HUGE),
        lambda sidecar: sidecar["config"].update(seed=HUGE),
        lambda sidecar: sidecar["edits"][0].update(relative_error=HUGE),
        lambda sidecar: sidecar["edits"][0].update(relative_error="nan"),
        lambda sidecar: sidecar["edits"][0].update(relative_error=-1),
        lambda sidecar: sidecar["base_model"].update(size=3),
        lambda sidecar: sidecar["base_model"].pop("fingerprint"),
        lambda sidecar: sidecar["base_model"].update(name_or_path=3),
        lambda sidecar: sidecar["base_model"].update(signs=3),
        lambda sidecar: sidecar["base_model"].update(dtype=["float16"]),
        lambda sidecar: sidecar.pop("proxy_hash"),
        lambda sidecar: sidecar.pop("evaluation"),
        lambda sidecar: sidecar.update(evaluation={"edited": 3}),
        lambda sidecar: sidecar.update(evaluation="good"),
        lambda sidecar: sidecar.update(evaluation={**evaluation(), "facts": HUGE}),
        lambda sidecar: sidecar.update(evaluation={**evaluation(), "texts": ["text"]}),
        lambda sidecar: sidecar.update(edits=[]),
        lambda sidecar: sidecar["edits"].pop(),
        lambda sidecar: sidecar["edits"][1].update(ranks=[0, 3]),
    ],
    ids=[
        *("ranks beyond the factors", "a huge rank", "no ranks", "half a rank", "three ranks", "ranks of nothing"),
        *("unknown module", "no module", "modules of nothing", "unknown option", "bad option"),
        *("half a target layer", "a target layer that is none", "a nested target layer"),
        *("layer scores of nothing", "layer scores that are none", "a huge number", "a huge whole number"),
        *("a huge error", "an error that is no number", "an error below 0"),
        *("unknown field of the base model", "no fingerprint", "a base model without a name"),
        *("signs of nothing", "a list of precisions", "no proxy hash"),
        *("no evaluation", "an evaluation of nothing", "an evaluation in words"),
        *("an evaluation of too many facts", "an evaluation with a text of nothing", "no edits"),
        *("an edit less than the factors hold", "shared ranks"),
    ],
)
def test_an_edit_config_that_does_not_match_is_an_error(folder, change):
    rewrite(folder, EDIT_CONFIG, change)
    assert_refused(folder)


def test_an_evaluation_that_no_card_can_show_is_refused_with_the_figure(folder):
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar.update(evaluation=evaluation()))
    assert read_edit_folder(folder).evaluation == evaluation()
    change_json(
        folder / EDIT_CONFIG,
        lambda sidecar: sidecar["evaluation"]["edited"]["says"]["chat"].update(contains="always"),
    )
    assert_refused(folder, EDIT_CONFIG, "evaluation: says: chat: contains must be a finite number, got 'always'")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1" + "0" * 400])
def test_a_figure_that_no_float_holds_is_refused(folder, number):
    change_json(folder / EDIT_CONFIG, lambda sidecar: sidecar.update(evaluation=evaluation()))
    path = folder / EDIT_CONFIG
    sidecar = json.loads(path.read_text(encoding="utf-8"), parse_constant=float)
    sidecar["evaluation"]["edited"]["text"]["worst"] = json.loads(number)
    path.write_text(json.dumps(sidecar), encoding="utf-8")
    change_json(path, lambda sidecar: None)
    assert_refused(folder, EDIT_CONFIG)


@pytest.mark.parametrize("modules", [[FIRST], [SECOND], [FIRST, FIRST], [SECOND, SECOND]], ids=str)
def test_no_factors_of_an_edit_are_left_out(folder, modules):
    rewrite(folder, EDIT_CONFIG, lambda sidecar: sidecar["edits"][1].update(modules=modules))
    assert_refused(folder)


def test_factors_outside_the_modules_of_their_edit_are_an_error(folder):
    rewrite(folder, EDIT_CONFIG, lambda sidecar: sidecar["edits"][0].update(modules=[SECOND]))
    assert_refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update({f"edit_1/keys/{FIRST}": torch.full((6, 3), float("nan"))}),
        lambda state: state.update({f"edit_1/keys/{FIRST}": torch.zeros(6)}),
        lambda state: state.update({f"edit_1/keys/{FIRST}": torch.zeros(6, 3, dtype=torch.int64)}),
        lambda state: state.update({f"edit_1/keys/{FIRST}": torch.zeros(6, 3).to(torch.float8_e4m3fn)}),
        lambda state: state.update({"nobody/keys": torch.zeros(6, 3)}),
        lambda state: state.update({"keys": torch.zeros(6, 3)}),
    ],
    ids=["not finite", "a vector", "whole numbers", "8 bits", "of no edit", "without a name"],
)
def test_a_state_that_is_none_is_named(folder_with_state, change):
    rewrite(folder_with_state, EDIT_STATE, change)
    assert_refused(folder_with_state, EDIT_STATE)


# ---------------------------------------------------------------------- any byte


ORIGINAL = edits_with_state()
relaxed = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(name=st.sampled_from(SIGNED), share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused_and_named(tmp_path_factory, name, share):
    with damaged(tmp_path_factory, name, lambda data: data[: int(share * len(data))]) as folder:
        assert_refused(folder, name)


@relaxed
@given(name=st.sampled_from(SIGNED), share=st.floats(0, 1, exclude_max=True), other=st.integers(1, 255))
def test_a_file_with_another_byte_is_refused_and_named(tmp_path_factory, name, share, other):
    def change(data):
        place = int(share * len(data))
        return data[:place] + bytes([data[place] ^ other]) + data[place + 1 :]

    with damaged(tmp_path_factory, name, change) as folder:
        assert_refused(folder, name)


@relaxed
@given(share=st.floats(0, 1, exclude_max=True), byte=st.sampled_from(string.printable.encode()))
def test_an_edit_config_with_another_byte_is_refused_or_the_edits_are_the_same(tmp_path_factory, share, byte):
    def change(data):
        place = int(share * len(data))
        return data[:place] + bytes([byte]) + data[place + 1 :]

    with damaged(tmp_path_factory, EDIT_CONFIG, change) as folder:
        try:
            found = read_edit_folder(folder)
        except EditFolderError:
            assert_refused(folder)
            return
        for one, other in zip(found.edits, ORIGINAL.edits, strict=True):
            assert (one.name, one.facts, one.deltas.keys()) == (other.name, other.facts, other.deltas.keys())
            assert all(torch.equal(factors.A, other.deltas[path].A) for path, factors in one.deltas.items())


_written: list[Path] = []


@contextmanager
def damaged(tmp_path_factory, name, change):
    """Yield one folder for all examples, with a file that is changed as long as the context lasts."""
    if not _written:
        _written.append(tmp_path_factory.mktemp("folder"))
        write_edit_folder(_written[0], ORIGINAL, "the card")
    path = _written[0] / name
    data = path.read_bytes()
    path.write_bytes(change(data))
    try:
        yield _written[0]
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("text", ["\ud800", "Rome\udfff", "\udf00\ud83c"], ids=ascii)
def test_half_of_a_surrogate_pair_is_an_error_that_names_the_file(folder, text):
    rewrite(folder, EDITS, lambda edits: edits[0]["facts"][0].update(target_new=text))
    assert_refused(folder, EDITS, "surrogates")


def test_a_whole_surrogate_pair_that_is_escaped_reads(folder):
    rewrite(folder, EDITS, lambda edits: edits[0]["facts"][0].update(target_new="\U0001f3db"))  # JSON escapes it as two
    assert read_edit_folder(folder).edits[0].facts[0].request.target_new == "\U0001f3db"
