"""The playground as a Space."""

from goldenedit.playground import build, theme

build("HuggingFaceTB/SmolLM2-135M-Instruct", public=True).queue().launch(theme=theme())
