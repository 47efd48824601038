"""Hugging Face model folders: read, written, compared. What they mean is in `occult_train.models.families`."""
