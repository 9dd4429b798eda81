"""Plain torchrun on two nodes: a node is killed in mid-run and started again, and the run ends as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.runtime.launch import run_on_ranks
from tests.conftest import Corpus
from tests.distributed.faults import Job, assert_whole, finished, published, shard_sums, small_tree
from tests.distributed.nodes import free_port, two_nodes
from tests.distributed.test_training import run_training

STEPS, INTERVAL = 120, 20


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


def kill_in_mid_run(dying: Job, staying: Job) -> None:
    """SIGKILL to a node's torchrun and its rank, once there is a checkpoint; the run stands still from then on."""
    rank = dying.wait_until(dying.workers, "its rank")[0]
    dying.wait_until(lambda: published(dying.output_dir), "a checkpoint")
    rank.suspend()
    dying.kill_workers()
    assert staying.last_step() < STEPS


def test_a_node_that_is_killed_and_started_again(corpus: Corpus, undisturbed: dict[str, str], tmp_path: Path) -> None:
    tree, port = tree_of(corpus, tmp_path / "run"), free_port()
    with two_nodes() as (first, second), first.start(tree, tmp_path, port) as staying:
        with second.start(tree, tmp_path, port) as dying:
            kill_in_mid_run(dying, staying)
        with second.start(tree, tmp_path, port) as back:
            finished(back)
        assert staying.wait() == 0, staying.text[-3000:]
    assert shard_sums(last_checkpoint(tmp_path / "run")) == undisturbed
    assert_whole(last_checkpoint(tmp_path / "run"))
