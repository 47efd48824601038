"""A module that ranks run in place of `occult_train.train`: each says where it is."""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from occult_train.config import Config
from occult_train.train import main


def run(config: Config) -> int:
    """Leave a note: rank, local rank, host, sum of all ranks, a variable, the last folder of where it works."""
    total = torch.tensor([dist.get_rank()])
    dist.all_reduce(total)
    words = [dist.get_rank(), os.environ["LOCAL_RANK"], socket.gethostname(), total.item()]
    words += [os.environ.get("TOLD", "-"), Path.cwd().name, config.data.tokenizer or "-"]
    print("here is", *words)
    (Path(config.output) / f"note-{dist.get_rank()}").write_text(" ".join(map(str, words)))
    return 0


if __name__ == "__main__":
    sys.exit(main(run=run))
