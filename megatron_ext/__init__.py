"""megatron_ext: pretraining of text encoders on megatron-core, with any sequence of CLM / MLM / MNTP phases.

The data's way through the house, one room after the other:

    text -> tokens on disk -> sample i -> objective -> batch -> model -> loss -> optimizer -> checkpoint -> HF model
    data/corpus   data/dataset     objective    data/loader  model/          train/            train/checkpoint  hf/

A room imports only from the rooms to its left:

    errors, config | runtime, objective | data, model | train, hf | pretrain_encoder.py and tools/
"""

__version__ = "0.1.0"
