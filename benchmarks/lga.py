"""The cost of LGA in plain forwards over the same tokens, and a comparison with weight gradients by autograd."""

from __future__ import annotations

import copy

import torch
from common import load, parser, record, timed
from references import weight_gradient_scores

from goldenedit import EditConfig, proxy_facts
from goldenedit.layer_selection import golden_layer, lga_scores
from goldenedit.lm.tokens import encode, pad, padding_id


def main() -> None:
    """Time LGA against plain forwards, and compare its scores with the reference."""
    options = parser(__doc__)
    options.add_argument("--facts", type=int, default=100)
    options.add_argument("--reference-facts", type=int, default=10)
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    model = load(arguments.model, EditConfig(layer=0))
    lm, tokenizer, where = model.lm, model.tokenizer, model.architecture
    base = model.get_base_model().requires_grad_(False)
    facts = proxy_facts()[: arguments.facts]

    pairs = [[encode(tokenizer, fact.text, answer) for answer in (fact.target_true, fact.target_new)] for fact in facts]
    pairs.sort(key=lambda pair: len(pair[0].input_ids))
    groups = [pairs[start : start + arguments.batch_size] for start in range(0, len(pairs), arguments.batch_size)]
    batches = [pad([row for pair in group for row in pair], padding_id(tokenizer), "cpu") for group in groups]

    def forwards() -> None:
        with torch.no_grad():
            for batch in batches:
                base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    rows = []
    for loss in ("sequence", "answer"):
        plain, analysis = [], []
        for _ in range(arguments.repeats):
            with timed() as seconds:
                forwards()
            plain.append(seconds())
            with timed() as seconds:
                scores = lga_scores(lm, facts, loss, arguments.batch_size)
            analysis.append(seconds())
        few = facts[: arguments.reference_facts]
        with timed() as seconds:
            plain_scores = weight_gradient_scores(base, tokenizer, where.mlp_linears, where.num_layers, few, loss)
        reference_seconds = seconds() / len(few)
        double = copy.deepcopy(base).double()
        exact = weight_gradient_scores(double, tokenizer, where.mlp_linears, where.num_layers, few, loss)
        found = lga_scores(lm, few, loss, arguments.batch_size)
        ratios = sorted(one / other for one, other in zip(analysis, plain, strict=True))
        rows.append(
            {
                "model": arguments.model,
                "loss": loss,
                "facts": len(facts),
                "golden layer": golden_layer(scores),
                "without the filter": golden_layer(scores, float("inf")),
                "seconds": round(sorted(analysis)[len(analysis) // 2], 2),
                "plain forwards": round(ratios[len(ratios) // 2], 2),
                "times faster than weight gradients": round(
                    reference_seconds * len(facts) / sorted(analysis)[len(analysis) // 2], 1
                ),
                "largest relative error": float(((found - exact) / exact).abs().max()),
                "that of the reference in float32": float(((plain_scores - exact) / exact).abs().max()),
                "scores": [round(score, 2) for score in scores.tolist()],
            }
        )
        print(rows[-1], flush=True)
    record(f"lga-{arguments.model}", rows)


if __name__ == "__main__":
    main()
