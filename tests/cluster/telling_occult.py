"""The `occult` command whose ranks run `telling_rank`."""

import functools

from occult_train.launcher import cli, train

if __name__ == "__main__":
    train.launch = functools.partial(train.launch, module="telling_rank")
    cli.main()
