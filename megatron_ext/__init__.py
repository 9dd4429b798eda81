"""megatron_ext: pretraining of text encoders on megatron-core, with any sequence of CLM / MLM / MNTP phases.

The data's way through the house, one room after the other:

    text -> tokens on disk -> sample i -> objective -> batch -> model -> loss -> optimizer -> checkpoint -> HF model
    data/corpus   data/dataset     objective    data/loader  model/          train/            train/checkpoint  hf/

A room imports only from the rooms to its left:

    errors, config | runtime, objective | data, model | train, hf | doctor | pretrain_encoder.py and tools/
"""

import logging
import warnings

# megatron-core says at every start that Transformer Engine and Apex are missing, which `runtime/backend.py` chooses and
# reports, which logger it takes, that one process alone has been told no rank, and that it calls deprecated functions of its own
# and of torch, which is not the user's to mend. torch says that it finds a CUDA compiler and no GPU.
for _message in (
    r".*(Transformer Engine and Apex are|Apex is) not installed",
    "Could not determine rank",
    "absl.logging is not installed",
    "full scope is deprecated",
    "`load_state_dict` is",
):
    warnings.filterwarnings("ignore", message=_message, module=r"megatron\.core")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

__version__ = "0.1.0"
