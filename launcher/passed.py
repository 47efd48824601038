"""`--deepspeed-args`: flags that `occult train` hands on to DeepSpeed's launcher, checked before that sees them.

The launcher answers a wrong flag with its whole usage, and takes a stray word for the program to start.
"""

import argparse
import shlex
import shutil
from typing import NoReturn

from occult_train.errors import UserError

SWITCHES = ("--no_ssh", "--save_pid", "--bind_cores_to_rank", "--quiet", "-q")
WITH_VALUE = (
    *("--node_rank", "--launcher_args", "--enable_each_rank_log", "--bind_core_list", "--ssh_port", "--venv_script"),
    "--log_level",
)
OWN = (
    *("--hostfile", "-H", "--include", "-i", "--exclude", "-e", "--num_nodes", "--num_gpus", "--num_accelerators"),
    *("--master_addr", "--master_port", "--launcher", "--force_multi", "--no_ssh_check"),
    *("--module", "--no_python", "--no_local_rank"),
)
"""Flags of `deepspeed` that are options of `occult train`, or set by it."""
UNUSABLE = ("--autotuning",)
"""It reads a DeepSpeed config file, which training here has not."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise in place of the usage text."""
        raise UserError(f"--deepspeed-args: {message}")


def flags(text: str) -> list[str]:
    """The flags in a text, quoted as in a shell.

    Raises:
        UserError: one is not known, is set by `occult train` itself, lacks its value or what it needs on this machine.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--deepspeed-args={text}: {error}") from None
    for word in words:
        if word.split("=")[0] in OWN:
            raise UserError(f"--deepspeed-args: {word.split('=')[0]} is an option of `occult train`, or set by it")
    parser = _Parser(prog="deepspeed", add_help=False, allow_abbrev=False)
    for flag in SWITCHES:
        parser.add_argument(flag, action="store_true")
    for flag in WITH_VALUE:
        parser.add_argument(flag)
    known = parser.parse_args(words)
    if known.bind_cores_to_rank and shutil.which("numactl") is None:
        raise UserError("--deepspeed-args: --bind_cores_to_rank needs numactl, which is not on PATH")
    return words
