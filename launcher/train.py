"""`occult train`: check everything that can be checked here, then start the ranks through DeepSpeed's launcher."""

import itertools
import os
import shlex
import sys
from pathlib import Path

from occult_train.config import Config, load
from occult_train.deepspeed_options import check_deepspeed
from occult_train.errors import UserError
from occult_train.jobfiles import JobFiles, new_launch
from occult_train.launcher import faults, hostfile, plan
from occult_train.launcher.job import Job, say

MODULE = "occult_train.train"


def launch(settings: list[str], options: plan.Options, restarts: int = 0, module: str = MODULE) -> int:
    """Train, and return the job's exit code.

    Args:
        settings: YAML files and `path=value` overrides.
        options: where to start how many ranks.
        restarts: how often to start again if the job fails, from its last complete checkpoint and on the hosts that
            are left.
        module: what each rank runs; it takes the arguments of `occult_train.train`.

    Raises:
        UserError: the settings, the options or the hostfile are wrong. Nothing has been started.
    """
    config = load(settings)
    check_deepspeed(config)
    made = plan.make(config, options)
    for number in itertools.count(1):
        code, may_pass = _launch_once(config, settings, options, made, module)
        if not may_pass or number > restarts:
            return code
        try:
            made, options = _plan_again(config, options, made)
        except UserError as error:
            say(f"occult: not started again: {error}")
            return code
        if config.checkpoint.resume == "none":
            settings = [*settings, "checkpoint.resume=auto"]
        say(f"occult: starting again from the last complete checkpoint ({number} of {restarts})")
    raise AssertionError("the loop has no other end")


def _launch_once(
    config: Config, settings: list[str], options: plan.Options, made: plan.Plan, module: str
) -> tuple[int, bool]:
    """One job to its end: its exit code, and whether it failed of something that may not come again."""
    files = JobFiles(config.output, new_launch())
    typed = command(settings, options, made, files, module)
    files.create()
    if made.hostfile:
        files.hostfile.write_text(made.hostfile)
    say(made.announcement)
    others = [host for host in made.slots if made.multi_host and not hostfile.is_this_machine(host)]
    job = Job(typed, environment(made), files, made.multi_host, others)
    code = job.run()
    if not code or job.ended:
        return code, False
    if words := faults.explain(code, files):
        say(words)
    failure = files.failure()
    return code, code != 2 if failure is None else failure.may_pass


def _plan_again(config: Config, options: plan.Options, made: plan.Plan) -> tuple[plan.Plan, plan.Options]:
    """The plan on the hosts that are left.

    Raises:
        UserError: none are, or the config cannot run on as many ranks.
    """
    gone = plan.unreachable(list(made.slots)) if made.multi_host and not options.no_ssh_check else []
    if gone:
        left = {host: slots for host, slots in made.slots.items() if host not in gone}
        if not left:
            raise UserError(f"no host of {', '.join(made.slots)} answers")
        say(f"occult: without {', '.join(gone)}, which cannot be reached")
        options = plan.only(options, left)
    return plan.make(config, options), options


def command(settings: list[str], options: plan.Options, made: plan.Plan, files: JobFiles, module: str) -> list[str]:
    """The whole `deepspeed` command. On other hosts a shell reads the settings again."""
    words = [*settings, f"--job={files.launch}", *(["--verbose"] if options.verbose else [])]
    if made.multi_host and options.launcher.lower() == "pdsh":
        words = [word if " " in word else shlex.quote(word) for word in words]
    hosts = [f"--hostfile={files.hostfile}"] if made.hostfile else []
    return [*plan.deepspeed_command(), *hosts, *made.flags, "--module", module, *words]


def environment(made: plan.Plan) -> dict[str, str]:
    """This environment, without what DeepSpeed would only remark on."""
    variables = dict(os.environ)
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    if not made.multi_host:
        variables.pop("CUDA_VISIBLE_DEVICES", None)  # the plan has chosen among them
        if not made.gpus:
            variables.setdefault("DS_ACCELERATOR", "cpu")
    return variables
