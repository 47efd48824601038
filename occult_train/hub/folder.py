"""A Hugging Face model's folder: what its config.json says in our terms. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occult_train.errors import ConfigError
from occult_train.models.config import MOST_LAYERS, ModelConfig
from occult_train.models.families import Family, family_named
from occult_train.models.families.rules import Unfit


@dataclass(frozen=True)
class HubConfig:
    """A config.json, understood."""

    folder: Path
    family: Family
    raw: dict[str, Any]
    model: ModelConfig
    fields: dict[str, Any]
    """Those of the model that config.json decides."""
    aux_loss: str
    aux_loss_coef: float

    def settings(self) -> dict[str, Any]:
        """Our settings that follow from it: the model, and the family's own balancing loss (none has a z-loss)."""
        moe = {"balance": "aux_loss", "aux_loss": self.aux_loss, "aux_loss_coef": self.aux_loss_coef}
        return {"model": dict(self.fields), "moe": {**moe, "z_loss_coef": 0.0}}

    def remarks(self) -> list[str]:
        """What of config.json has no effect here, one line each."""
        unknown = self.family.unknown(self.raw)
        return [f"{self.folder}/config.json: {key}={self.raw[key]} is not known and not used" for key in unknown]


def read_config(folder: Path) -> HubConfig:
    """Read a folder's config.json.

    Raises:
        ConfigError: missing, damaged, of a family that we do not have, or with what we cannot compute.
    """
    raw = _read_json(folder)
    if isinstance(layers := raw.get("num_hidden_layers"), int) and layers > MOST_LAYERS:
        raise ConfigError(f"{folder}/config.json has num_hidden_layers={layers}; {MOST_LAYERS} are the most")
    family = family_named(raw)
    if isinstance(family, str):
        raise ConfigError(f"{folder}/config.json: {family}")
    try:
        fields = family.read_config(raw)
        kind, coefficient = family.read_aux(raw)
        model = ModelConfig(**fields)
        model.validate()
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{folder}/config.json ({family.model_type}) is damaged: {error!r}") from None
    except Unfit as error:
        raise ConfigError(f"{folder}/config.json ({family.model_type}) has {error}, which is not supported") from None
    except ConfigError as error:
        raise ConfigError(f"{folder}/config.json ({family.model_type}): {error}") from None
    if not model.vocab_size:
        raise ConfigError(f"{folder}/config.json ({family.model_type}) has vocab_size=0")
    return HubConfig(folder, family, raw, model, fields, kind, coefficient)


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; models of the hub are downloaded first (hf download --local-dir)")
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a Hugging Face model: it has no config.json") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is damaged: it holds no object")
    return raw
