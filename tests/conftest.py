"""Loaded before any test: without a GPU, kernels run in the interpreter of Triton, which it settles when imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
