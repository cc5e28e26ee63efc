"""Megatron-core trainer for Molmo2-style vision-language models."""

__version__ = "0.1.0"
