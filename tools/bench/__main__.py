"""`torchrun -m occult_train.tools.bench layer ...`: `occult bench` on ranks that are there already."""

import sys

from occult_train.distributed import prepare_environment
from occult_train.launcher import cli

if __name__ == "__main__":
    prepare_environment()
    sys.argv.insert(1, "bench")
    cli.main()
