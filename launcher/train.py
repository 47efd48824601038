"""`occult train`: check everything that can be checked here, then start the ranks through DeepSpeed's launcher."""

import os
import shlex
import sys
from pathlib import Path

from occult_train.config import load
from occult_train.deepspeed_options import check_deepspeed
from occult_train.jobfiles import JobFiles, new_launch
from occult_train.launcher import faults, hostfile, plan
from occult_train.launcher.job import Job, say

MODULE = "occult_train.train"


def launch(settings: list[str], options: plan.Options, module: str = MODULE) -> int:
    """Train, and return the job's exit code.

    Args:
        settings: YAML files and `path=value` overrides.
        options: where to start how many ranks.
        module: what each rank runs; it takes the arguments of `occult_train.train`.

    Raises:
        UserError: the settings, the options or the hostfile are wrong. Nothing has been started.
    """
    config = load(settings)
    check_deepspeed(config)
    made = plan.make(config, options)
    files = JobFiles(config.output, new_launch())
    command = _command(settings, options, made, files, module)
    files.create()
    say(made.announcement)
    others = [host for host in made.slots if made.multi_host and not hostfile.is_this_machine(host)]
    job = Job(command, _environment(made), files, made.multi_host, others)
    code = job.run()
    if code and not job.ended and (words := faults.explain(code, files)):
        say(words)
    return code


def _command(settings: list[str], options: plan.Options, made: plan.Plan, files: JobFiles, module: str) -> list[str]:
    """The whole `deepspeed` command. On other hosts a shell reads the settings again."""
    words = [*settings, f"--job={files.launch}", *(["--verbose"] if options.verbose else [])]
    if made.multi_host and options.launcher.lower() == "pdsh":
        words = [word if " " in word else shlex.quote(word) for word in words]
    return [*plan.deepspeed_command(), *made.flags, "--module", module, *words]


def _environment(made: plan.Plan) -> dict[str, str]:
    """This environment, without what DeepSpeed would only remark on."""
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    if not made.multi_host:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # the plan has chosen among them
        if not made.gpus:
            environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment
