"""dtune fine-tunes Hugging Face language models by any method, from one process to a cluster."""

__version__ = "0.1.0"
