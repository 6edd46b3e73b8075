"""The playground as a Space."""

from goldenedit.playground import build, theme

build("HuggingFaceTB/SmolLM2-135M-Instruct").queue().launch(theme=theme())
