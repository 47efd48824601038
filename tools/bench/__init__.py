"""`occult bench`: layers, pairs of blocks, training steps and generation, ours and the peers', measured in one run on
one machine."""

import typer

from occult_train.tools.bench.generate_command import generate
from occult_train.tools.bench.layer_command import layer
from occult_train.tools.bench.offload_command import offload
from occult_train.tools.bench.pair_command import pair
from occult_train.tools.bench.step_command import step

app = typer.Typer(
    help="Measure a layer, a pair of blocks, whole training steps or generation against other implementations.",
    rich_markup_mode=None,
    add_completion=False,
)
app.command("layer")(layer)
app.command("pair")(pair)
app.command("step")(step)
app.command("generate")(generate)
app.command("offload")(offload)
