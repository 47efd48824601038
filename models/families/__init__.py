"""The Hugging Face model families that we read and write. A new one is one file like those here, and a line below."""

from typing import Any

from occult_train.errors import ConfigError
from occult_train.models.config import ModelConfig
from occult_train.models.families.deepseek import DEEPSEEK
from occult_train.models.families.family import Family
from occult_train.models.families.mixtral import MIXTRAL
from occult_train.models.families.occult import OCCULT
from occult_train.models.families.olmoe import OLMOE
from occult_train.models.families.qwen2_moe import QWEN2_MOE
from occult_train.models.families.qwen3_moe import QWEN3_MOE

FAMILIES = (OLMOE, MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK)
"""Those of others; a model of theirs is exported as one of theirs."""


def family_of(model: ModelConfig, before: str = "") -> Family:
    """The family that holds this model exactly.

    Args:
        before: model_type of the family that the model came from, which is tried first.

    Raises:
        ConfigError: none does; says for each why not.
    """
    reasons = []
    for family in sorted(FAMILIES, key=lambda family: family.model_type != before):
        reason = family.refuse(model)
        if reason is None:
            return family
        reasons.append(f"{family.architecture} cannot hold {reason}")
    raise ConfigError("no Hugging Face family holds this model: " + "; ".join(reasons))


def family_named(hub: dict[str, Any]) -> Family | str:
    """The family of a config.json, or why it is none of ours."""
    found = {family.model_type: family for family in (*FAMILIES, OCCULT)}.get(str(hub.get("model_type")))
    known = ", ".join(family.model_type for family in (*FAMILIES, OCCULT))
    if found is None:
        return f"model_type={hub.get('model_type')} is not one of {known}"
    architectures = hub.get("architectures") or [found.architecture]
    if found.architecture not in architectures:
        return f"model_type={found.model_type} has the architecture {found.architecture}, not {architectures}"
    return found
