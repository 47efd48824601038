"""The `occult` command whose ranks run `faulty_rank`."""

import functools

from occult_train.launcher import cli, train

if __name__ == "__main__":
    train.launch = functools.partial(train.launch, module="faulty_rank")
    cli.main()
