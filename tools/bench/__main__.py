"""`torchrun -m occult_train.tools.bench layer ...`: on ranks that are there already."""

from occult_train.distributed import prepare_environment
from occult_train.tools.bench import app

if __name__ == "__main__":
    prepare_environment()
    app()
