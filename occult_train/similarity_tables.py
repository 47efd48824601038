"""Where the similarity tables of a pruned model come from: the checkpoint that is continued, or a file."""

from pathlib import Path

from occult_train.beginning import Beginning
from occult_train.checkpoint.store import Checkpoint
from occult_train.config import Config
from occult_train.errors import ConfigError, StatisticsError
from occult_train.inference import checkpoint_config
from occult_train.moe.similarity import FILE_NAME, SimilarityTables
from occult_train.moe.statistics import RoutingStatistics


def find_tables(config: Config, start: Beginning) -> SimilarityTables:
    """Tables for `config`, whose pruning is by similarity.

    A checkpoint's own are used where moe.prune.similarity is the setting that it was made with, or empty; the file may
    have changed or gone since.

    Raises:
        ConfigError: there are none.
        StatisticsError: they are damaged, or of another model.
    """
    setting = config.moe.prune.similarity
    if isinstance(start, Checkpoint) and (kept := start.folder / FILE_NAME).exists():
        made_with = checkpoint_config(start).moe.prune.similarity
        if setting in ("", made_with):
            return _checked(SimilarityTables.load(kept), config, str(kept))
    if not setting:
        raise ConfigError(
            "moe.prune.policy=similarity needs moe.prune.similarity, which is empty; name what "
            "`occult profile --similarity` wrote"
        )
    try:
        tables = SimilarityTables.of(RoutingStatistics.load(Path(setting)), setting)
    except StatisticsError as error:
        raise StatisticsError(f"moe.prune.similarity={setting}: {error}") from None
    return _checked(tables, config, setting)


def _checked(tables: SimilarityTables, config: Config, name: str) -> SimilarityTables:
    tables.check_model(config.model.moe_layers, config.model.num_experts, name)
    return tables
