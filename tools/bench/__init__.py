"""`occult bench`: layers and whole training steps, ours and the peers', measured in one run on one machine."""

import typer

from occult_train.tools.bench.layer_command import layer
from occult_train.tools.bench.step_command import step

app = typer.Typer(
    help="Measure a layer or whole training steps against other implementations.",
    rich_markup_mode=None,
    add_completion=False,
)
app.command("layer")(layer)
app.command("step")(step)
