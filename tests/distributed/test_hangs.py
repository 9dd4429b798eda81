"""Ranks and writers that hang, stop or die in silence: who is named, and how soon, with real processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_ext.train.stopping import EXIT_HANG, EXIT_STOPPED
from tests.conftest import Corpus
from tests.distributed.faults import assert_whole, leftovers, published, small_tree
from tests.distributed.ranks import ROOT, ranks, write_entry_point
from tests.distributed.test_training import config_tree

TIMEOUT = 12
"""Seconds; a busy machine may take half of them to get from one mark of a starting run to the next."""

HANGS = """
from megatron_ext.model.encoder import EncoderModel

forward, calls = EncoderModel.forward, []

def hanging(self, *args, **kwargs):
    calls.append(0)
    if RANK == {rank} and len(calls) == 6:
        {hang}
    return forward(self, *args, **kwargs)

EncoderModel.forward = hanging
"""


def test_a_rank_that_sleeps_is_named(corpus: Corpus, tmp_path: Path) -> None:
    script = write_entry_point(tmp_path, HANGS.format(rank=1, hang="time.sleep(600)"))
    tree = config_tree(corpus, tmp_path / "run", {}, training={"timeout_minutes": TIMEOUT / 60})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    store = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:0 --rdzv-id={os.getpid()}".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *store, str(script)]
        + ["--config", str(tmp_path / "config.yaml")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank 1 holds the others up while running step" in errors, errors
    assert f"exitcode  : {EXIT_HANG}" in errors, errors


@pytest.mark.parametrize(
    "stopped, word",
    [(0, "rank 0 does not answer: its process was stopped"), (1, "rank 1 no longer answers: stopped")],
    ids=["rank 0", "rank 1"],
)
def test_a_rank_that_is_stopped_is_named(stopped: int, word: str, corpus: Corpus, tmp_path: Path) -> None:
    tree = config_tree(corpus, tmp_path / "run", {}, training={"timeout_minutes": TIMEOUT / 60})
    hang = HANGS.format(rank=stopped, hang="os.kill(os.getpid(), signal.SIGSTOP)")
    with ranks(tree, tmp_path, 2, hang) as run:
        other = run[1 - stopped]
        assert other.wait() == EXIT_HANG, other.text
        assert psutil.Process(run[stopped].process.pid).status() == psutil.STATUS_STOPPED
    (line,) = [line for line in other.text.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: no progress for {TIMEOUT} s (training.timeout_minutes): ") and word in line


TELLS_TIMEOUTS = """
import torch
from megatron_ext.train.trainer import Trainer

def tell(self):
    groups = torch.distributed.distributed_c10d._world.pg_map
    for group in groups:
        print("seconds", group._get_backend(torch.device("cpu")).options._timeout.total_seconds(), group.group_desc)
    return "FINISHED"

Trainer.run = tell
"""


def test_all_groups_have_the_time_out_of_the_configuration(corpus: Corpus, tmp_path: Path) -> None:
    tree = config_tree(corpus, tmp_path / "run", {"tensor": 2}, training={"timeout_minutes": 0.55})
    with ranks(tree, tmp_path, 2, TELLS_TIMEOUTS) as run:
        assert [rank.wait() for rank in run] == [0, 0], run[0].text
        for rank in run:
            lines = [line.split() for line in rank.text.splitlines() if line.startswith("seconds ")]
            seconds = {name: float(number) for _, number, name in lines}
            seconds.pop("EXPERT_DATA_PARALLEL_GROUP_GLOO", None)  # megatron forgets it; no model here has experts
            assert {"default_pg", "TENSOR_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP_GLOO", "AGREEMENT"} <= set(seconds)
            assert set(seconds.values()) == {33 + 60}


HOLDS_A_WRITER = """
import functools
from pathlib import Path
from megatron.core.dist_checkpointing.strategies import filesystem_async

write_item, held = filesystem_async._write_item, Path({held!r})

@functools.wraps(write_item)  # its signature is asked for
def writing(*args, **kwargs):
    if RANK == 1 and not held.exists():
        held.with_suffix(".new").write_text(str(os.getpid()))
        held.with_suffix(".new").rename(held)
        time.sleep(300)
    return write_item(*args, **kwargs)

filesystem_async._write_item = writing
"""
"""The first process that a writer of rank 1 starts tells its number and stays where it is."""


@pytest.mark.parametrize("fault", ["killed", "slow"])
def test_a_save_fails_soon_when_a_process_of_a_writer_is_killed_or_late(fault: str, corpus: Corpus, tmp_path: Path) -> None:
    steps, interval = 12, 4
    tree = small_tree(corpus, tmp_path / "run", steps, interval, parallel={"tensor": 2})  # both ranks write
    if fault == "slow":
        tree["training"] |= {"timeout_minutes": 0.2}
    held = tmp_path / "held"
    with ranks(tree, tmp_path, 2, HOLDS_A_WRITER.format(held=str(held))) as run:
        run[1].wait_until(held.exists, "the save")
        start = time.monotonic()
        process = psutil.Process(int(held.read_text()))
        if fault == "killed":
            time.sleep(0.5)  # its sibling is at work, too
            process.kill()
        run[0].wait_until(lambda: "training goes on" in run[0].text, "the failed save")
        assert time.monotonic() - start < 30  # a writer that only hangs has `timeout_minutes`: ten, or twelve seconds here
        assert [rank.wait() for rank in run] == [0, 0], run[0].text + run[1].text
        psutil.wait_procs([process], timeout=10)
        assert not process.is_running()
    (line,) = [line for line in run[0].text.splitlines() if line.startswith("warning: ")]
    # Which process of the writer's is the one that was held is up to megatron-core's version.
    killed = ("ended: one of its processes was killed by SIGKILL", "ended: killed by SIGKILL")
    reasons = killed if fault == "killed" else ("took longer than 12 s",)
    start = f"warning: the checkpoint after step {interval} could not be saved (the writer of rank 1 "
    assert line.startswith(tuple(f"{start}{reason})" for reason in reasons))
    assert [path.name for path in published(tmp_path / "run")] == ["step_00000008", "step_00000012"]
    assert leftovers(tmp_path / "run") == []
    for checkpoint in published(tmp_path / "run"):
        assert_whole(checkpoint)


def test_a_log_on_a_full_disk_changes_no_exit_code(corpus: Corpus, tmp_path: Path) -> None:
    tree = small_tree(corpus, tmp_path / "run", 100_000, 0, resume="auto")
    metrics = tmp_path / "run/metrics.jsonl"
    with ranks(tree, tmp_path, 1, error_file="/dev/full") as (rank,):
        rank.wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2, "step 2")
        rank.process.terminate()
        assert rank.wait() == EXIT_STOPPED
    (saved,) = published(tmp_path / "run")
    tree["training"] |= {"stop_at_step": int(saved.name[5:]) + 2, "log_interval": 2}
    with ranks(tree, tmp_path, 1, error_file="/dev/full") as (rank,):  # it has a change of the configuration to tell
        assert rank.wait() == 0
    assert json.loads((published(tmp_path / "run")[-1] / "run.json").read_text())["changes"]
