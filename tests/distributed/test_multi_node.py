"""Plain torchrun on two nodes: a node is killed in mid-run and started again, and the run ends as if nothing had happened."""

import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

from megatron_ext.runtime.launch import run_on_ranks
from tests.conftest import Corpus
from tests.distributed.faults import ROOT, Job, assert_whole, finished, published, shard_sums, small_tree
from tests.distributed.nodes import free_port, two_nodes
from tests.distributed.test_interruptions import batch_log
from tests.distributed.test_training import WEIGHT_TOLERANCE, Run, run_training

STEPS, INTERVAL = 90, 30


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sums of the last checkpoint of the same run on two ranks, without torchrun and without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_on_ranks(run_training, 2, [tree_of(corpus, folder / "run")])
    return shard_sums(last_checkpoint(folder / "run"))


def tree_of(corpus: Corpus, output_dir: Path, **changes: Any) -> dict[str, Any]:
    return small_tree(corpus, output_dir, steps=STEPS, interval=INTERVAL, resume="auto", **changes)


def last_checkpoint(output_dir: Path) -> Path:
    return output_dir / f"checkpoints/step_{STEPS:08d}"


def test_the_documents_commands_are_torchrun_s() -> None:
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

    source = inspect.getsource(dynamic_rendezvous) + inspect.getsource(c10d_rendezvous_backend)
    pages = ((ROOT / name).read_text() for name in ("README.md", "docs/multi_node.md"))
    text = "\n".join(block for page in pages for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL))
    commands = [line for line in text.replace("\\\n", "").splitlines() if line.startswith("torchrun --nnodes")]
    assert len(commands) == 3
    for command in commands:
        told = get_args_parser().parse_args(shlex.split(command)[1:])
        assert (told.rdzv_backend, told.training_script, told.max_restarts) == ("c10d", "pretrain_encoder.py", 3)
        options = [option.split("=")[0] for option in told.rdzv_conf.split(",") if option]
        assert [name for name in options if f'"{name.removesuffix("_timeout")}"' not in source] == []


def kill_in_mid_run(dying: Job, staying: Job) -> None:
    """SIGKILL to a node's torchrun and its rank, once there is a checkpoint; the run stands still from then on."""
    dying.wait_until(dying.last_step, "the first step")
    (rank,) = dying.workers()
    dying.wait_until(lambda: published(dying.output_dir), "a checkpoint")
    rank.suspend()
    dying.kill_workers()
    assert staying.last_step() < STEPS


@pytest.mark.slow
def test_a_node_that_is_killed_and_started_again(corpus: Corpus, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """It has rank 0, and so the store of the ranks and the lock of the folder, but not the rendezvous."""
    tree, port = tree_of(corpus, tmp_path / "run"), free_port()
    with two_nodes() as (first, second), first.start(tree, tmp_path, port) as staying:
        with second.start(tree, tmp_path, port) as dying:
            kill_in_mid_run(dying, staying)
            assert "step 1/" in dying.text
        with second.start(tree, tmp_path, port) as back:
            finished(back)
        assert staying.wait() == 0, staying.text[-3000:]
    assert shard_sums(last_checkpoint(tmp_path / "run")) == undisturbed
    assert_whole(last_checkpoint(tmp_path / "run"))


@pytest.mark.slow
def test_the_node_that_keeps_the_rendezvous_is_killed(corpus: Corpus, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """The other torchrun ends by itself; the same commands on both go on."""
    tree, port = tree_of(corpus, tmp_path / "run"), free_port()
    with two_nodes() as (first, second):
        with second.start(tree, tmp_path, port) as left_alone, first.start(tree, tmp_path, port) as dying:
            kill_in_mid_run(dying, left_alone)
            assert left_alone.wait() != 0
            left_alone.wait_until_gone()
        with first.start(tree, tmp_path, port) as one, second.start(tree, tmp_path, port) as other:
            finished(one)
            finished(other)
    assert shard_sums(last_checkpoint(tmp_path / "run")) == undisturbed


@pytest.mark.slow
def test_one_node_goes_on_alone(corpus: Corpus, tmp_path: Path) -> None:
    """With `--nnodes 1:2`: the same samples and masks, the same global batch, the same model up to rounding."""
    logged = {"training": {"micro_batch_size": 2, "global_batch_size": 4, "log_interval": 1, "log_batches": True}}
    tree, port = tree_of(corpus, tmp_path / "run", **logged), free_port()
    with two_nodes() as (first, second), first.start(tree, tmp_path, port, nodes="1:2") as staying:
        with second.start(tree, tmp_path, port, nodes="1:2") as dying:
            dying.wait_until(dying.last_step, "the first step")
            assert int(dying.workers()[0].environ()["WORLD_SIZE"]) == 2
            kill_in_mid_run(dying, staying)
        assert staying.wait() == 0, staying.text[-3000:]
    alone = tree_of(corpus, tmp_path / "alone", **logged)
    run_on_ranks(run_training, 1, [alone])
    assert batch_log(tmp_path / "run") == batch_log(tmp_path / "alone")
    assert json.loads((last_checkpoint(tmp_path / "run") / "run.json").read_text())["parallel"]["data"] == 1
    expected, found = Run(tmp_path / "alone", []), Run(tmp_path / "run", [])
    for key, tensor in expected.weights(STEPS).items():
        torch.testing.assert_close(found.weights(STEPS)[key], tensor, rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.mark.slow
def test_a_node_whose_network_is_gone_without_a_word(corpus: Corpus, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Nothing closes a connection: the watchdog finds out, and the node that is plugged in again goes on with the other."""
    tree, port = tree_of(corpus, tmp_path / "run"), free_port()
    tree["training"]["timeout_minutes"] = 0.5
    with two_nodes() as (first, second):
        if not first.is_apart:
            pytest.skip("this machine makes no network namespaces")
        with first.start(tree, tmp_path, port) as staying, second.start(tree, tmp_path, port) as cut_off:
            cut_off.wait_until(lambda: published(cut_off.output_dir), "a checkpoint")
            second.unplug()
            staying.wait_until(lambda: "no progress for 30 s" in staying.text, "the watchdog's word")
            assert "longer answer" in staying.text or "does not answer" in staying.text
            cut_off.kill_all()
            second.plug_in()
            with second.start(tree, tmp_path, port) as back:
                finished(back)
            assert staying.wait() == 0, staying.text[-3000:]
    assert shard_sums(last_checkpoint(tmp_path / "run")) == undisturbed
