"""Methods of PEFT and transformers that an EditModel does not have."""

# Called on the model underneath, they would change which adapters are active without the EditModel's knowledge.
REFUSED_VERBS = {
    "merge_adapter": "merge_and_unload()",
    "unmerge_adapter": "merge_and_unload(), which is for good",
    "add_adapter": "edit(), or load_adapter()",
    "inject_adapter": "edit(), or load_adapter()",
    "set_requires_grad": "requires_grad_() on the model that was wrapped",
    "enable_adapters": "enable_adapter_layers()",
    "disable_adapters": "disable_adapter_layers(), or `with disable_adapter():`",
    "enable_peft_hotswap": "load_adapter() and set_adapter()",
    "create_or_update_model_card": "save_pretrained(), which writes a card",
}
