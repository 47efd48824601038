"""`occult bench`: layers and whole training steps, ours and the peers', measured in one run on one machine."""

import typer

from occult_train.tools.bench.command import layer

app = typer.Typer(
    help="Measure a layer or whole training steps against other implementations.",
    rich_markup_mode=None,
    add_completion=False,
)
app.command("layer")(layer)


@app.callback()
def _bench() -> None:
    """Keeps `bench` a group with whatever number of commands."""
