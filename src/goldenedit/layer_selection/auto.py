"""`layer="auto"`: the selector with the smallest regret against brute force, see benchmarks/README.md."""

from goldenedit.layer_scores import selector
from goldenedit.layer_selection.key_response import key_response_scores

selector("auto", scores_of="key_response", depends_on=("edit", "covariance"))(key_response_scores)
