"""What every rank runs: `python -m occult_train.train CONFIG.yaml ... path=value ...`.

Start it through `occult train`, `deepspeed --module occult_train.train`, torchrun, mpirun, or alone as one rank.
"""

import argparse
import faulthandler
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from occult_train import distributed, faults
from occult_train.config import Config, load
from occult_train.errors import UserError
from occult_train.jobfiles import JobFiles, RankProcess, new_launch
from occult_train.pulse import Limits, Pulse

Run = Callable[[Config], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise in place of argparse's usage text, which every rank would print."""
        raise UserError(message)


def main(argv: Sequence[str] | None = None, run: Run | None = None) -> int:
    """Set up this rank, train, and return the exit code. A failure is reported and ends the process.

    Args:
        argv: arguments as typed; None takes the command line's.
        run: what to run once torch.distributed stands; None takes the trainer.
    """
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    stop = faults.StopSignal()
    stop.install()
    try:
        code = _run(_parse(argv), run)
    except Exception as error:
        faults.fail(error, first_on_host=distributed.first_number(distributed.LOCAL_RANK_VARIABLES, 0) == 0)
    stop.uninstall()
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="occult_train.train", description="Train one rank's share.", allow_abbrev=False)
    parser.add_argument("settings", nargs="*", help="YAML files and path=value overrides, later ones win")
    parser.add_argument("--local_rank", "--local-rank", help="given by launchers; the environment is what counts")
    parser.add_argument("--job", default="", help="name of the launch, given by `occult train`")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's own log")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.settings:
        raise UserError("no config given; name a .yaml file or settings like train.steps=100")
    return arguments


def _run(arguments: argparse.Namespace, run: Run | None) -> int:
    faults.set_rank(distributed.first_number(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"), 0))
    distributed.prepare_environment()
    config = load(arguments.settings)
    files = JobFiles(config.output, arguments.job or new_launch())
    if arguments.job:
        files.create()
        faults.join(files)
    world = distributed.initialize()
    faults.set_rank(world.rank)
    distributed.set_deepspeed_log(arguments.verbose)
    process = RankProcess.of_this_process(world.rank)
    pulse = _pulse(config, world)
    files = _meet(process, files, world, pulse)
    config.validate_ranks(world.size)
    code = (run or _trainer())(config)
    _part(pulse)
    files.leave(process, well=code == 0)
    distributed.shutdown()
    return code


def _pulse(config: Config, world: distributed.World) -> Pulse | None:
    """This rank's signs of life, if there are others to heed them."""
    if world.size == 1:
        return None
    limits = Limits(config.parallel.lost_after, config.parallel.stuck_after)
    return Pulse(world.rank, limits, faults.step, faults.end)


def _part(pulse: Pulse | None) -> None:
    """Wait until all ranks are through, after which silence means nothing."""
    import torch

    if pulse is not None:
        torch.distributed.barrier()
        pulse.close()


def _meet(process: RankProcess, files: JobFiles, world: distributed.World, pulse: Pulse | None) -> JobFiles:
    """Agree on rank 0's launch with all ranks, learn their processes, and from now on end when one of them fails."""
    import torch

    everyone: list[tuple[RankProcess, str]] = [(process, files.launch)] * world.size
    torch.distributed.all_gather_object(everyone, (process, files.launch))
    files = JobFiles(files.output, everyone[0][1])
    files.create()
    peers = [peer for peer, _ in everyone]
    faults.join(files, process, peers, pulse)
    if pulse is not None:
        pulse.watch(peers)
    return files


def _trainer() -> Run:
    from occult_train import trainer

    return trainer.run


if __name__ == "__main__":
    sys.exit(main())
