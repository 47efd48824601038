"""occult_train: mixture-of-experts training on DeepSpeed with deduplicated expert-parallel communication."""

__version__ = "0.1.0"
