"""The `occult` command. Nothing heavy is imported before a command needs it."""

import importlib
import keyword
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from occult_train.errors import UserError

TOOLS = {
    "demo": "Train a small model on this machine, export it, report.",
    "prepare": "Turn text into a corpus and a tokenizer.",
    "import": "Read a Hugging Face model into a checkpoint.",
    "export": "Write a checkpoint as a Hugging Face model.",
    "generate": "Continue a prompt with a trained model.",
    "profile": "Count how experts are chosen together.",
    "place": "Say which experts should share a device.",
    "simulate": "Expected all-to-all times on a cluster.",
    "report": "Sum up a run.",
    "bench": "Measure layers and training steps against other implementations.",
}
"""Commands that live in `occult_train.tools.<name>` as the function `command`, or groups of commands as `app`. A name
that is a word of Python has an underscore behind it there."""


class LazyGroup(TyperGroup):
    """Commands of this file and of `TOOLS`. A tool is imported when it is run, not when it is listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """`train` first, then the tools."""
        return [*super().list_commands(ctx), *TOOLS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command for the list of commands: its name and help."""
        if cmd_name in TOOLS:
            return TyperCommand(cmd_name, help=TOOLS[cmd_name])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is about to run."""
        if args and args[0] in TOOLS:
            return args[0], _load(args[0]), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, whose number is the exit code. A user's mistake becomes one line and 2, Ctrl-C 130."""
        try:
            code = super().invoke(ctx)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        raise typer.Exit(code if isinstance(code, int) else 0)


def _load(name: str) -> Any:
    """The command of a tool, or an error in one line if the tool is not there."""
    from occult_train.launcher.plan import count_gpus

    if not count_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns at import otherwise
    module = f"occult_train.tools.{name}{'_' if keyword.iskeyword(name) else ''}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"`occult {name}` needs {error.name}, which is not installed") from None
    if hasattr(found, "app"):
        return typer.main.get_command(found.app)
    function = found.command
    single = typer.Typer(rich_markup_mode=None, add_completion=False)
    single.command(name, help=function.__doc__ or TOOLS[name])(function)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    help="Train mixture-of-experts GPTs on DeepSpeed with cheap expert parallelism.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _occult() -> None:
    """Without a callback typer would take the only command of its own for the whole program."""


@app.command()
def train(
    settings: Annotated[list[str], typer.Argument(metavar="CONFIG.yaml|path=value")],
    hostfile: Annotated[str, typer.Option("--hostfile", "-H", help="Hosts, a line each: HOST slots=N.")] = "",
    include: Annotated[str, typer.Option("--include", "-i", help="Use only HOST:SLOT,SLOT@HOST...")] = "",
    exclude: Annotated[str, typer.Option("--exclude", "-e", help="Do not use HOST:SLOT,SLOT@HOST...")] = "",
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each host. Default: all GPUs; on CPU parallel.expert.")
    ] = None,
    num_nodes: Annotated[int | None, typer.Option(min=1, help="Use the first hosts only.")] = None,
    master_addr: Annotated[str, typer.Option(help="Address of the first host.")] = "",
    master_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of rank 0. Default on one host: a free one.")
    ] = None,
    launcher: Annotated[str, typer.Option(help="pdsh, openmpi, mpich, impi, mvapich or slurm.")] = "pdsh",
    force_multi: Annotated[bool, typer.Option("--force-multi", help="Start a single host through ssh too.")] = False,
    no_ssh_check: Annotated[bool, typer.Option("--no-ssh-check", help="Do not try ssh to the hosts first.")] = False,
    restarts: Annotated[
        int, typer.Option(min=0, help="Start again so often after a failure, from the last checkpoint.")
    ] = 0,
    deepspeed_args: Annotated[str, typer.Option(help='Further flags of deepspeed, e.g. "--bind_cores_to_rank".')] = "",
    verbose: Annotated[bool, typer.Option("--verbose", help="Show DeepSpeed's own log.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole configuration only.")] = False,
) -> int:
    """Train on this host, or on those of a hostfile. Files and overrides are merged left to right."""
    from occult_train.config import load, to_yaml

    if print_config:
        print(to_yaml(load(settings)), end="")
        return 0
    from occult_train.launcher.plan import Options
    from occult_train.launcher.train import launch

    options = Options(
        hostfile=hostfile,
        include=include,
        exclude=exclude,
        num_gpus=num_gpus or 0,
        num_nodes=num_nodes or 0,
        master_addr=master_addr,
        master_port=master_port or 0,
        launcher=launcher,
        force_multi=force_multi,
        no_ssh_check=no_ssh_check,
        deepspeed_args=deepspeed_args,
        verbose=verbose,
    )
    return launch(settings, options, restarts)


@app.command()
def doctor(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml|path=value]", help="Of a run that needs memory."),
    ] = None,
    hostfile: Annotated[str, typer.Option("--hostfile", "-H", help="Hosts, a line each. Default: this one.")] = "",
    include: Annotated[str, typer.Option("--include", "-i", help="Look at HOST:SLOT,SLOT@HOST... only.")] = "",
    exclude: Annotated[str, typer.Option("--exclude", "-e", help="Leave out HOST:SLOT,SLOT@HOST...")] = "",
    num_gpus: Annotated[int | None, typer.Option(min=1, help="Ranks on each host. Default: as `occult train`.")] = None,
    num_nodes: Annotated[int | None, typer.Option(min=1, help="Look at the first hosts only.")] = None,
    master_addr: Annotated[str, typer.Option(help="Address of the first host.")] = "",
    master_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of rank 0.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
) -> int:
    """Check this machine, or the hosts of a hostfile: answers, versions, clocks, room, GPUs, links, memory for a run.

    The exit code is 0 if all is well, 1 if something is wrong, 2 if what was typed is.
    """
    from occult_train.launcher.doctor.command import examine
    from occult_train.launcher.plan import Options

    options = Options(
        hostfile=hostfile,
        include=include,
        exclude=exclude,
        num_gpus=num_gpus or 0,
        num_nodes=num_nodes or 0,
        master_addr=master_addr,
        master_port=master_port or 0,
        no_ssh_check=True,
    )
    return examine(settings or [], options, output)


UsageError: Any = typer.BadParameter.__bases__[0]
"""What typer raises for a wrong command line; it gives the class no public name."""


def main() -> None:
    """The console entry point. A wrong command line, too, is one line and exit code 2."""
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False, prog_name="occult")
    except UsageError as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "occult")
        words = error.format_message().rstrip(".?")
        print(f"error: {words}; see `{where} --help`", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
