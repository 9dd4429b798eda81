"""A run on a CPU begins without torch's compiler, whose import takes as long as torch's own."""

import gc
import subprocess
import sys

import pytest

from megatron_ext.runtime.megatron_versions import installed_version
from megatron_ext.runtime.quick_start import without_garbage_collection
from tests.distributed.ranks import ROOT

STARTS = """
import sys
from megatron_ext.runtime.compiler import leave_out_compiler
leave_out_compiler()
import megatron_ext.train.trainer
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train
import torch
ones = torch.ones(2, 3)
assert torch.equal(bias_dropout_add_fused_train((ones, None), ones, 0.0), 2 * ones)
print([name for name in ("torch._inductor", "torch._dynamo") if name in sys.modules])
"""


@pytest.mark.skipif(installed_version() > (0, 16), reason="newer megatron-cores import torch's compiler in other ways, too")
def test_the_trainer_is_imported_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", STARTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_garbage_is_collected_again_whatever_happens() -> None:
    with pytest.raises(ImportError), without_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
