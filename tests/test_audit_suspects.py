"""Names that a change is about though it does not list them."""

import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from audited import FAST
from goldenedit import EditConfig, EditModel, EditRequest, get_edit_model
from goldenedit.audit_suspects import LIMIT, read_names, shares, suspects
from goldenedit.editors import KeyStatistics
from models import TINY_CONFIGS, tiny_model

TOWER = EditRequest("The text is about The Eiffel Tower in", "The Eiffel Tower", "Rome")
MERKEL = EditRequest("Yesterday I heard about Angela Merkel from", "Angela Merkel", "Cambodia")
PROVINCE = EditRequest("Battambang Province is in", "Battambang Province", "Paris")
TEXT = EditConfig(covariance_tokens=1200)
OTHERS = ["Golden Bridge", "Marie Curie", "Jane Austen", "Steve Jobs", "Lake Victoria", "Siem Reap"]


def wide_model():
    """Return a random model with wide keys, in which a name is mostly what its last word is, whatever is before it."""
    config = LlamaConfig(**TINY_CONFIGS["llama"]().to_dict() | {"hidden_size": 128, "intermediate_size": 1024})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
    return model


def edited(tokenizer, method: str) -> EditModel:
    options = FAST | {"method": method, "covariance_tokens": 1200, "phrasings": "none"}
    model = get_edit_model(wide_model(), EditConfig(**options), tokenizer)
    model.edit([TOWER, MERKEL, PROVINCE], name="batch")
    return model


@pytest.mark.parametrize("method", ["memit", "alphaedit", "gated"])
def test_a_hidden_subject_of_a_batch_is_named_and_neither_a_listed_one_nor_another_name(method, tokenizer):
    model = edited(tokenizer, method)
    edit = model.edits["batch"]
    model.edits["batch"] = replace(edit, facts=edit.facts[:1])
    names = ["the Eiffel tower", "Angela Merkel", "Battambang Province", *OTHERS]
    found = suspects(model, names, TEXT)
    assert [suspect.name for suspect in found] == names
    assert [suspect.name for suspect in found if suspect.is_listed] == ["the Eiffel tower"]
    assert [suspect.name for suspect in found if suspect.is_suspected] == ["Angela Merkel", "Battambang Province"]
    assert all(suspect.is_suspected == (suspect.score > LIMIT) for suspect in found if not suspect.is_listed)


def test_a_plain_adapter_is_about_the_subject_of_its_row_and_about_no_other_name(tokenizer, tmp_path):
    model = edited(tokenizer, "memit")
    (path,) = model.edits["batch"].deltas
    delta = model.edits["batch"].deltas[path]
    peft = get_peft_model(wide_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"]))
    layer = peft.base_model.model.get_submodule(path)
    layer.lora_A["default"].weight.data[2] = delta.A[1] * layer.lora_A["default"].weight.norm() / delta.A.norm()
    for module in peft.modules():  # as if it were trained
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
    peft.save_pretrained(tmp_path / "adapter")
    loaded = EditModel(wide_model(), EditConfig(), tokenizer)
    loaded.load_adapter(tmp_path / "adapter", "stranger")
    loaded.set_adapter("stranger")
    names = ["Battambang Province", "Angela Merkel", *OTHERS]
    assert [suspect.name for suspect in suspects(loaded, names, TEXT) if suspect.is_suspected] == ["Angela Merkel"]


def test_rows_that_do_nothing_and_another_basis_of_the_rows_change_nothing_of_the_span():
    generator = torch.Generator().manual_seed(0)
    rows, inputs = (torch.randn(count, 12, generator=generator) for count in (3, 5))
    keys = torch.randn(40, 12, generator=generator)
    statistics = KeyStatistics(keys.T @ keys / 40, ridge=0.1)
    within, along = shares(inputs, rows, statistics)
    mixed, _ = shares(inputs, torch.randn(3, 3, generator=generator) @ rows, statistics)
    torch.testing.assert_close(within, mixed)
    assert bool((along <= within).all())
    C = statistics.times(torch.eye(12))
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ values.sqrt().diag() @ vectors.T
    whitened = inputs.double() @ root.inverse()
    basis = torch.linalg.qr((rows.double() @ root).T)[0]
    slow = (whitened @ basis).square().sum(1) / whitened.square().sum(1)
    torch.testing.assert_close(within, slow)


def test_an_input_along_a_row_has_a_share_of_one():
    keys = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    statistics = KeyStatistics(keys.T @ keys / 40, ridge=0.1)
    rows = statistics.solve(keys[:2].T).T
    within, along = shares(keys[:3], rows, statistics)
    assert within[:2].tolist() == pytest.approx([1, 1])
    assert along[:2].tolist() == pytest.approx([1, 1])
    assert within[2] < 0.9


def test_statistics_that_hold_keys_multiply_as_their_moment_does():
    keys = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    held, dense = KeyStatistics.of(keys, 0.1), KeyStatistics(keys.T @ keys, 0.1)
    for statistics in (held, dense, KeyStatistics(None)):
        torch.testing.assert_close(statistics.solve(statistics.times(keys.T)), keys.T.double())
    torch.testing.assert_close(held.times(keys.T), dense.times(keys.T), atol=1e-5, rtol=1e-5)


def test_a_change_of_no_mlp_or_no_change_at_all_is_refused(tokenizer, tmp_path):
    model = EditModel(tiny_model("llama"), EditConfig(), tokenizer)
    with pytest.raises(ValueError, match="nothing is changed"):
        suspects(model, ["Angela Merkel"])
    with pytest.raises(ValueError, match="no names"):
        suspects(model, [])
    peft = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "attention")
    model.set_adapter("attention")
    with pytest.raises(ValueError, match=r"none of these is one: .*q_proj"):
        suspects(model, ["Angela Merkel"])


def test_a_file_of_names_has_one_on_each_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffAngela Merkel\r\n\n The Eiffel Tower \nAngela Merkel\n".encode())
    assert read_names(path) == ["Angela Merkel", "The Eiffel Tower"]


@pytest.mark.parametrize("content", [b"", b" \n\n", b"Bj\xf6rk\n"])
def test_a_file_without_names_is_named(content, tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_names(path)
    with pytest.raises(OSError, match="missing"):
        read_names(tmp_path / "missing.txt")
