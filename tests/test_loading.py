"""Models by name: packaged, in a folder, or on the Hub."""

from __future__ import annotations

import pytest

from goldenedit.loading import load_config, load_model
from models import tiny_model


@pytest.mark.parametrize("load", [load_model, load_config])
def test_a_name_of_nothing_is_told_as_that_with_the_model_that_may_be_meant(hub, load):
    with pytest.raises(OSError, match=r"no folder 'smolm2' and no packaged model .*Did you mean 'smollm2'\?"):
        load("smolm2")


def test_a_folder_that_cannot_be_loaded_is_not_said_to_be_missing(tmp_path):
    with pytest.raises((OSError, ValueError), match=r"config\.json") as error:
        load_config(str(tmp_path))
    assert "packaged" not in str(error.value)


def test_a_model_in_a_folder_is_loaded_with_its_tokenizer(tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_model(str(tmp_path))
    assert len(loaded) == len(tokenizer)
    assert model.config.model_type == "llama"
