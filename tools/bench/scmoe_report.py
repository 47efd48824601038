"""The table of the ScMoE study: python -m occult_train.tools.bench.scmoe_report RUNS.csv [RUNS.csv ...].

Held-out loss with its spread over seeds, and the difference to top-2 with the same seed.
"""

import argparse
import statistics
from pathlib import Path

from occult_train.errors import UserError
from occult_train.models.config import ModelConfig
from occult_train.tools.bench.scmoe_study import Row, variants
from occult_train.tools.bench.study import read_rows

BASE = "top-2"


def spread(values: list[float], digits: str = ".4f") -> str:
    """Mean and standard deviation; of one value that alone, of none nothing."""
    if len(values) < 2:
        return "".join(format(value, digits) for value in values)
    return f"{statistics.mean(values):{digits}} ± {statistics.stdev(values):.4f}"


def table(rows: list[Row]) -> str:
    """In Markdown.

    Raises:
        UserError: there are no runs, they are of several studies, or one is there twice.
    """
    studies = {row.study for row in rows}
    if len(studies) != 1:
        raise UserError(f"the runs are of {len(studies)} studies, {', '.join(sorted(studies)) or 'none'}")
    runs = {(row.variant, row.seed): row for row in rows}
    if len(runs) < len(rows):
        raise UserError("a run with the same variant and seed is there twice")
    lines = ["| experts | parameters | of a token | FLOPs a token | loss | less top-2 of the seed | seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for variant in variants(ModelConfig(num_experts=2)):
        its = [row for row in rows if row.variant == variant]
        if not its:
            continue
        size = f"{its[0].params:,} | {its[0].active_params:,} | {its[0].flops_token:,}"
        less = [row.loss - runs[BASE, row.seed].loss for row in its if (BASE, row.seed) in runs]
        losses = f"{spread([row.loss for row in its])} | {'' if variant == BASE else spread(less, '+.4f')}"
        lines.append(f"| {variant} | {size} | {losses} | {len(its)} |")
    first, devices = rows[0], ", ".join(sorted({row.device for row in rows}))
    about = f"{first.steps} steps of {first.tokens // first.steps:,} tokens, {first.tokens / 1e6:.1f} M in all"
    text = f"the text read {first.passes:.2f} times"
    return "\n".join([*lines, "", f"{about}, {text}; {devices}; ±: standard deviation over seeds"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    rows = [row for path in parser.parse_args().runs for row in read_rows(Row, path)]
    print(table(rows))


if __name__ == "__main__":
    main()
