"""ssmtrain: a training framework for hybrid SSM/transformer language models."""

__version__ = "0.1.0"
