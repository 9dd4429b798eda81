"""Frequencies of the rotary position embedding (Su et al., arXiv 2104.09864), plain or stretched to longer texts."""

import math

import torch
from torch import Tensor

from megatron_ext.model.presets import EncoderConfig


def rotary_frequencies(encoder: EncoderConfig) -> Tensor:
    """Angle per position of each pair of features, [d / 2] in float32.

    `linear` divides all of them by the factor (Chen et al., arXiv 2306.15595). `llama3` (arXiv 2407.21783) leaves those alone that
    turn more than `rotary_high_frequency_factor` times in the length that the model was first trained with, divides those by the
    factor that turn less than `rotary_low_frequency_factor` times, and passes linearly from one to the other in between.
    """
    exponents = torch.arange(0, encoder.head_dim, 2, dtype=torch.float32) / encoder.head_dim
    frequencies = 1.0 / (encoder.rotary_base**exponents)
    if encoder.rotary_scaling == "none":
        return frequencies
    stretched = frequencies / encoder.rotary_factor
    if encoder.rotary_scaling == "linear":
        return stretched
    turns = encoder.rotary_original_length * frequencies / (2 * math.pi)
    low, high = encoder.rotary_low_frequency_factor, encoder.rotary_high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * stretched + kept * frequencies
