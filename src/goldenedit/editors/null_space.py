"""Null-space insertion: detectors that respond to a subject in all its wordings and hardly to other text.

A rank-one change `v d^T` adds `(d . k) v` at a token with key `k`. To second order, its harm to other text is
`(v^T G v) (d^T C d)` with the second moments `C` of keys and `G` of output gradients. `G` is the concern of the value
optimization; this is the part of the detector `d`. As in AlphaEdit (arXiv 2410.02355), it lies in
the null space of `C`, on which `P` projects. In it, it is the ridge regression that responds with 1 to the
subject's key in each of its n wordings:

    d = argmin  sum_i (d . k_i - 1)^2 + ridge ||d||^2   over  d = P x

With N subjects, each detector responds with 0 to the keys of the other subjects. A ridge shortens `d` and the response:
values that are optimized under the change make up for that.

Differences to AlphaEdit: every wording counts and not their mean alone, and earlier edits are not remembered. The key
of a subject at the very start of a text can be far from all others: it has a share of its own in `d`, without which the
edit misses the bare prompt.
"""

from __future__ import annotations

import torch

from goldenedit.editors.alphaedit import AlphaEditOptions, in_null_space
from goldenedit.editors.delta import LowRankDelta
from goldenedit.editors.problem import Problem
from goldenedit.editors.record import editor


@editor(
    "null-space",
    paper="this library; null space of arXiv 2410.02355",
    options=AlphaEditOptions,
    reads=("covariance",),
    inserts_batches=True,
    published="memit",
    pattern="ladder",
)
def null_space_insertion(problem: Problem) -> LowRankDelta:
    """Return `Delta = R D` with `D^T = K (K^T K + ridge I)^-1 T`.

    `K`, `(d_in, M)`, holds the keys of all wordings of all subjects, projected on the null space. `T`, `(M, N)`, is 1
    where a key is the subject's, else 0. So the system has the size of the wordings, whatever the width of the keys.

    Raises:
        ValueError: No eigenvalue is below the threshold.
    """
    keys = [fact.mean[:, None] if fact.every is None else fact.every for fact in problem.facts]
    K = torch.cat(keys, 1).double()
    owners = torch.cat([torch.full((of.shape[1],), index) for index, of in enumerate(keys)])
    if not problem.text_statistics.is_identity:
        K = in_null_space(K, problem.text_statistics, problem.options.null_space_threshold)
    gram = K.T @ K
    gram.diagonal().add_(problem.options.null_space_ridge)
    targets = torch.zeros(len(owners), len(keys), dtype=K.dtype, device=K.device)
    targets[torch.arange(len(owners)), owners] = 1.0
    D = K @ torch.linalg.solve(gram, targets)
    return LowRankDelta(D.T.float().cpu(), problem.fact_residuals.float())
