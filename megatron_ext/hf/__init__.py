"""Trained checkpoints as native Hugging Face models: read, rename, verify, describe. Needs no megatron."""
