"""Layer selectors: functions from a model and facts to a score per layer, one file per selector.

A selector is one function with a decorator (see `selector`). `EditConfig(layer=...)` finds it by its name, in this
folder and in installed packages with an entry point in the group `goldenedit.layer_selectors`. `docs/extending.md` adds
a selector, step by step.
"""

from goldenedit.editing.keys import subject_keys
from goldenedit.layer_scores import SELECTORS, LayerSelection, Selector, golden_layer, selector, tukey_filter
from goldenedit.layer_selection.brute_force import SweepOptions, sweep
from goldenedit.layer_selection.causal_tracing import causal_tracing_scores
from goldenedit.layer_selection.cells import CellStore, Outcome, edit_score
from goldenedit.layer_selection.key_response import key_response_scores
from goldenedit.layer_selection.lga import lga_scores
from goldenedit.layer_selection.proxies import proxy_hash, proxy_set
from goldenedit.layer_selection.published import PUBLISHED_LAYERS, published_layers
from goldenedit.layer_selection.select import choose, find_layers, select_layer
from goldenedit.layer_selection.selectivity import selectivity_scores

__all__ = [
    "PUBLISHED_LAYERS",
    "SELECTORS",
    "CellStore",
    "LayerSelection",
    "Outcome",
    "Selector",
    "SweepOptions",
    "causal_tracing_scores",
    "choose",
    "edit_score",
    "find_layers",
    "golden_layer",
    "key_response_scores",
    "lga_scores",
    "proxy_hash",
    "proxy_set",
    "published_layers",
    "select_layer",
    "selectivity_scores",
    "selector",
    "subject_keys",
    "sweep",
    "tukey_filter",
]
