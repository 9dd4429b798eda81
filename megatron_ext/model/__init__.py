"""The encoder on megatron-core: presets, layers, attention, head, and what they cost."""
