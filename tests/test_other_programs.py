"""EditModels in the hands of transformers, PEFT, accelerate, torch and lm-evaluation-harness."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from goldenedit import EditModel, EditRequest, get_edit_model
from models import tiny_model
from tiny_edits import MERKEL, TOWER, assert_near, differ, fast_config, logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BERLIN = EditRequest(TOWER.prompt, TOWER.subject, "Berlin", "Paris")


@pytest.fixture
def edited(tokenizer) -> EditModel:
    return _edited(tokenizer, TOWER)


def _edited(tokenizer, *facts: EditRequest, base=None) -> EditModel:
    model = get_edit_model(tiny_model("llama") if base is None else base, fast_config(lr=2.0), tokenizer)
    for fact in facts:
        model.edit(fact)
    return model


@pytest.fixture
def saved(tokenizer, tmp_path) -> tuple[Path, Path]:
    """Return a saved base model and the folder of an edit of it."""
    base, edit = tmp_path / "base", tmp_path / "edit"
    tiny_model("llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    _edited(tokenizer, TOWER).save_pretrained(edit)
    return base, edit


def _written(model, tokenizer, **options) -> str:
    """Return what a model writes after the prompt of the edit."""
    prompt = tokenizer(TOWER.text, return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False} | options
    with torch.no_grad():
        return tokenizer.decode(model.generate(**prompt, **options)[0][prompt.input_ids.shape[1] :])


def _texts(tokenizer) -> Dataset:
    texts = [{"text": text, **tokenizer(text)} for text in ("The Louvre is in Paris.", "Berlin is a city.")]
    return Dataset.from_list(texts)


def _trainer(model, tokenizer, folder: Path, **options) -> Trainer:
    settings = {"max_steps": 2, "learning_rate": 0.05, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    texts = _texts(tokenizer)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = TrainingArguments(str(folder), **settings | options)
    return Trainer(model, arguments, collator, train_dataset=texts, eval_dataset=texts)


def test_a_trainer_measures_the_edited_model(edited, tokenizer, tmp_path):
    measured = _trainer(edited, tokenizer, tmp_path).evaluate()["eval_loss"]
    with edited.disable_adapter():
        unedited = _trainer(edited, tokenizer, tmp_path).evaluate()["eval_loss"]
    assert measured == pytest.approx(_trainer(edited.model, tokenizer, tmp_path).evaluate()["eval_loss"])
    assert measured != unedited


def test_a_trainer_trains_a_lora_beside_edits_and_saves_both(tokenizer, tmp_path):
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    model = _edited(tokenizer, TOWER, base=lora)
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    _trainer(model.model, tokenizer, tmp_path).train()
    changed = {name for name, weight in model.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "q_proj.lora_" in name}
    checkpoint = tmp_path / "checkpoint-2"
    loaded = PeftModel.from_pretrained(tiny_model("llama"), checkpoint, adapter_name="default")
    loaded.load_adapter(checkpoint / "edit_1", "edit_1")
    loaded.base_model.set_adapter(["default", "edit_1"])
    assert_near(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("trained", ["all weights", "a LoRA beside an edit"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])  # the second has tied weights
def test_a_training_that_goes_on_from_a_checkpoint_ends_as_one_that_was_not_interrupted(
    name, trained, tokenizer, tmp_path
):
    def model() -> EditModel:
        if trained == "all weights":
            return _edited(tokenizer, base=tiny_model(name))
        torch.manual_seed(0)
        lora = get_peft_model(tiny_model(name), LoraConfig(target_modules=["q_proj"]))
        return _edited(tokenizer, TOWER, base=lora)

    whole, resumed = model(), model()
    before = logits(whole)
    _trainer(whole, tokenizer, tmp_path, save_steps=1).train()
    _trainer(resumed, tokenizer, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert differ(logits(whole.eval()), before)
    assert_near(logits(resumed.eval()), logits(whole))


def test_of_a_model_with_nothing_to_train_its_training_mode_says_so(edited, caplog):
    caplog.clear()
    edited.eval()
    assert caplog.messages == []
    edited.train()
    assert ["LoRA" in message for message in caplog.messages] == [True]


def test_a_state_dict_names_a_tied_weight_once_and_loads_with_both_names(tokenizer):
    model, other = (_edited(tokenizer, base=tiny_model("gemma3", seed)) for seed in (0, 1))
    state = model.state_dict()
    assert len({weight.data_ptr() for weight in state.values()}) == len(state)
    torch.nn.ModuleList([other]).load_state_dict({f"0.{name}": weight for name, weight in state.items()})
    assert torch.equal(logits(other), logits(model))
    assert other.lm_head.weight is other.get_input_embeddings().weight
    other.load_state_dict({**state, "model.lm_head.weight": model.lm_head.weight})


def test_weights_that_were_trained_are_the_base_of_the_next_edit(tokenizer, tmp_path):
    model = _edited(tokenizer)
    untrained = model.base_info.fingerprint
    _trainer(model, tokenizer, tmp_path / "trainer", save_strategy="no").train()
    trained = {name: weight.clone() for name, weight in model.get_base_model().state_dict().items()}
    model.eval().edit(TOWER)
    model.save_pretrained(tmp_path / "edit")
    assert model.base_info.fingerprint != untrained
    with pytest.raises(ValueError, match="were made on"):
        EditModel.from_pretrained(tiny_model("llama"), tmp_path / "edit", tokenizer=tokenizer)
    base = tiny_model("llama")
    base.load_state_dict(trained)
    assert_near(logits(EditModel.from_pretrained(base, tmp_path / "edit", tokenizer=tokenizer)), logits(model))


@pytest.mark.parametrize("change", ["load", "resize"])
def test_weights_that_were_replaced_are_hashed_again(change, tokenizer):
    model = _edited(tokenizer)
    before, base = model.base_info, model.get_base_model()
    assert model.base_info is before
    if change == "load":
        model.load_state_dict({f"model.{name}": weight for name, weight in tiny_model("llama", 1).state_dict().items()})
    else:
        base.resize_token_embeddings(202)
    assert model.base_info.fingerprint != before.fingerprint


def test_a_state_dict_of_other_edits_is_refused_by_their_names(edited, tokenizer):
    model = _edited(tokenizer)
    before = logits(model)
    with pytest.raises(RuntimeError, match=r"edits \[\].*save_pretrained") as error:
        model.load_state_dict(edited.state_dict())
    assert len(str(error.value)) < 500
    assert torch.equal(logits(model), before)
    other = _edited(tokenizer, TOWER)
    other.load_state_dict(edited.state_dict())
    assert torch.equal(logits(other), logits(edited))


def test_a_pipeline_gives_the_edited_answer_and_logs_nothing(edited, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            asked = pipeline("text-generation", model=edited, tokenizer=tokenizer)
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []
    [answer] = asked(TOWER.text, max_new_tokens=6, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == _written(edited, tokenizer)
    with edited.disable_adapter():
        assert answer["generated_text"] != _written(edited, tokenizer)


def test_generation_with_a_draft_a_lookup_and_a_streamer_is_that_of_the_edited_model(edited, tokenizer):
    plain = _written(edited, tokenizer)
    assert _written(edited, tokenizer, assistant_model=tiny_model("llama")) == plain
    assert _written(edited, tokenizer, prompt_lookup_num_tokens=3) == plain
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    writes = threading.Thread(target=_written, args=(edited, tokenizer), kwargs={"streamer": streamer})
    writes.start()
    assert "".join(streamer) == plain
    writes.join()


@pytest.mark.parametrize("order", ["compiled first", "edited first", "base compiled"])
def test_compiled_models_see_edits(order, tokenizer):
    expected = _edited(tokenizer, TOWER)
    if order == "base compiled":
        compiled = torch.compile(tiny_model("llama"), backend="eager")
        logits(compiled)
        model = _edited(tokenizer, base=compiled)
    else:
        model = _edited(tokenizer, *([TOWER] if order == "edited first" else []))
        compiled = torch.compile(model, backend="eager")
        logits(compiled)
    if order != "edited first":
        model.edit(TOWER)
    assert_near(logits(compiled), logits(expected))
    with model.disable_adapter():
        assert_near(logits(compiled), logits(tiny_model("llama")))


def test_accelerate_leaves_an_edit_model_that_can_be_edited(edited):
    prepared = Accelerator(cpu=True).prepare(edited)
    before = logits(prepared)
    prepared.edit(MERKEL)
    assert differ(logits(prepared), before)


def test_the_harness_scores_the_edited_model(edited, tokenizer):
    harness = HFLM(pretrained=edited, tokenizer=tokenizer, batch_size=1, device="cpu")
    ask = Instance("loglikelihood", {}, (TOWER.text, " Rome"), 0)
    [(score, _)] = harness.loglikelihood([ask], disable_tqdm=True)
    with edited.disable_adapter():
        [(unedited, _)] = harness.loglikelihood([ask], disable_tqdm=True)
    prompt, whole = (tokenizer(text)["input_ids"] for text in (TOWER.text, f"{TOWER.text} Rome"))
    with torch.no_grad():
        scores = edited(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    answer = range(len(prompt), len(whole))
    assert score == pytest.approx(sum(scores[place - 1, whole[place]].item() for place in answer), abs=1e-4)
    assert abs(score - unedited) > 0.1


def test_peft_swaps_one_edit_for_another(saved, tokenizer, tmp_path):
    base, first = saved
    other = _edited(tokenizer, BERLIN)
    other.save_pretrained(tmp_path / "other")
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first)
    hotswap_adapter(served, str(tmp_path / "other"), "default")
    assert_near(logits(served), logits(other))


def test_transformers_loads_an_edit_by_itself(saved, edited):
    base, edit = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(edit))
    assert_near(logits(model), logits(edited))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_edit_model_changes_its_precision_and_is_edited_on(dtype, edited):
    before = logits(edited)
    assert edited.to(dtype) is edited
    assert {weight.dtype for weight in edited.parameters()} == {dtype}
    assert_near(logits(edited), before, 0.1)
    before = logits(edited)
    edited.edit(MERKEL)
    assert differ(logits(edited), before)


def test_an_edit_with_gradient_checkpointing_in_training_mode_is_the_same(tokenizer):
    base = tiny_model("llama")
    base.activation_checkpointing_enable()
    checkpointed, plain = _edited(tokenizer, TOWER, base=base.train()), _edited(tokenizer, TOWER)
    assert checkpointed.training
    for path, delta in plain.edits["edit_1"].deltas.items():
        other = checkpointed.edits["edit_1"].deltas[path]
        assert_near(other.B @ other.A, delta.B @ delta.A)


def test_torch_saves_an_edit_model_whole(edited):
    file = io.BytesIO()
    torch.save(edited, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded), logits(edited))
    loaded.edit(MERKEL)
    assert list(edited.edits) == ["edit_1"]
