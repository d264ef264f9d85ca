"""Export of a finished run as a model that Hugging Face's ``transformers`` loads."""
