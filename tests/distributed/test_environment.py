"""Ranks that have not the same around them are refused before the first step, with one line that names rank and host."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config_reading import from_dict
from megatron_ext.errors import UserError
from megatron_ext.runtime.launch import run_on_ranks
from megatron_ext.train.environment import Surroundings, differences, problems
from tests.conftest import Corpus
from tests.distributed.faults import small_tree
from tests.distributed.ranks import ranks

RANKS = 3
RUNS_TO_TIME = 5
SECONDS_A_CHECK = 0.05


def check_cases(tree: dict[str, Any], folders: list[str], cases: list[str]) -> dict[str, str]:
    """By case, what the check says on this rank; each rank stands in a folder of its own, as on a node with its own disk."""
    import torch

    from megatron_ext.train import environment

    rank = torch.distributed.get_rank()
    os.chdir(folders[rank])
    environment.SECONDS_TO_SEE = 0.3
    socket.gethostname = lambda: f"node{rank}"
    return {case: _check(from_dict(tree), CASES[case], rank) for case in cases}


def _check(config: Any, change: Callable[[Any, int, pytest.MonkeyPatch], None], rank: int) -> str:
    from megatron_ext.train.agreement import Agreement
    from megatron_ext.train.environment import prepare_together
    from megatron_ext.train.trainer import _prepare, group_timeout

    agreement = Agreement(group_timeout(config))
    with pytest.MonkeyPatch.context() as patch:
        change(config, rank, patch)
        try:
            prepare_together(config, agreement, lambda: _prepare(config))
        except UserError as error:
            return str(error)
    return ""


def _alike(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    """All ranks have the same."""


def _another_torch(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    import torch

    if rank == 1:
        patch.setattr(torch, "__version__", "2.0.0+old")


def _another_seed(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    if rank == 2:
        config.training.seed = 7


def _another_kernel(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    if rank == 0:
        patch.setenv("NVTE_DEBUG", "0")


def _another_code(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    from megatron_ext.train import environment

    if rank == 1:
        patch.setattr(environment, "code_fingerprint", lambda: "0" * 64)


def _own_data(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    config.data.train[0].prefix = "data"


def _no_data(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    config.data.train[0].prefix = "present"


def _own_output_dir(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    config.output_dir = "own_run"


def _full_disk(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    if rank == 0:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))


def _no_folder(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    config.output_dir = f"{config.data.tokenizer}/run"


def _wrong_everywhere(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    config.training.global_batch_size = 5


def _wrong_clock(config: Any, rank: int, patch: pytest.MonkeyPatch) -> None:
    now = time.time
    if rank == 2:
        patch.setattr(time, "time", lambda: now() + 90)


CASES: dict[str, Callable[[Any, int, pytest.MonkeyPatch], None]] = {
    function.__name__: function
    for function in (
        _alike,
        _another_torch,
        _another_seed,
        _another_kernel,
        _another_code,
        _own_data,
        _no_data,
        _own_output_dir,
        _full_disk,
        _no_folder,
        _wrong_everywhere,
        _wrong_clock,
    )
}
EXPECTED = {
    "_another_torch": ["torch is 2.0.0+old on rank 1 (node1), and", "on rank 0 (node0)"],
    "_another_seed": ["training.seed is 7 on rank 2 (node2), and 0 on rank 0 (node0)"],
    "_another_kernel": ["variable NVTE_DEBUG is 0 on rank 0 (node0), and absent on rank 1 (node1)"],
    "_another_code": ["the code of megatron_ext is 000000000000 on rank 1 (node1)"],
    "_own_data": ["data set data is ", "on rank 2 (node2)"],
    "_no_data": ["rank 1 on node1: data set present: there is no file present.bin"],
    "_own_output_dir": ["rank 1 on node1 does not see what rank 0 on node0 writes into output_dir own_run"],
    "_full_disk": ["output_dir", "has 0.00 GB free"],
    "_no_folder": ["cannot be written"],
    "_wrong_everywhere": ["training.global_batch_size 5 is not a multiple"],
}


def test_ranks_that_are_not_alike_are_refused(corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folders = [tmp_path / f"disk{rank}" for rank in range(RANKS)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        for ending in (".bin", ".idx", ".json"):
            source = Path(f"{corpus.prefix}{ending}")
            if source.is_file():
                shutil.copy(source, folder / f"data{ending}")
                if rank != 1:
                    shutil.copy(source, folder / f"present{ending}")
    with open(folders[2] / "data.bin", "r+b") as file:
        file.write(b"\1\0\2\0\1\0\2\0")
    tree = small_tree(corpus, tmp_path / "run", steps=4, interval=0)
    tree["training"] |= {"global_batch_size": 6}
    said = run_on_ranks(check_cases, RANKS, tree, [str(folder) for folder in folders], list(CASES))
    assert said[0] == said[1] == said[2]  # all stop, and with the same word
    assert [case for case, line in said[0].items() if not line] == ["_alike", "_wrong_clock"], said[0]
    for case, words in EXPECTED.items():
        assert [word for word in words if word not in said[0][case]] == [], said[0][case]
    assert said[0]["_wrong_everywhere"].startswith("training.global_batch_size")  # everybody's problem is nobody's own
    assert "the clock of node2 (rank 2) is 90 s ahead of that of rank 0 (node0)" in capfd.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []
    assert not (folders[0] / "own_run").exists()


def time_check(tree: dict[str, Any]) -> float:
    """Seconds that the check itself takes at best, with the configuration already looked at."""
    from megatron_ext.train.agreement import Agreement
    from megatron_ext.train.environment import prepare_together
    from megatron_ext.train.trainer import _prepare, group_timeout

    config = from_dict(tree)
    setup, agreement = _prepare(config), Agreement(group_timeout(config))
    seconds = []
    for _ in range(RUNS_TO_TIME):
        begin = time.perf_counter()
        prepare_together(config, agreement, lambda: setup)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def test_the_check_takes_no_time(corpus: Corpus, tmp_path: Path) -> None:
    seconds = run_on_ranks(time_check, 2, small_tree(corpus, tmp_path / "run", steps=4, interval=0))
    assert max(seconds) < SECONDS_A_CHECK


def test_the_whole_run_prints_one_line_and_ends_with_2(corpus: Corpus, tmp_path: Path) -> None:
    tree = small_tree(corpus, tmp_path / "run", steps=4, interval=0)
    other = "from megatron_ext import errors\nerrors.SECONDS_FOR_FIRST_RANK = 1.0\nif RANK == 1:\n    os.environ['NVTE_X'] = '1'"
    with ranks(tree, tmp_path, 2, other) as started:
        assert [rank.wait() for rank in started] == [2, 2]
    text = "".join(rank.text for rank in started)
    (line,) = [line for line in text.splitlines() if line]
    assert line.startswith("error: the ranks are not alike: the environment variable NVTE_X is 1 on rank 1 (")


def test_the_majority_is_right_and_differences_are_counted() -> None:
    facts = [{"torch": version, "NCCL": "2"} for version in ("1", "2", "2", "2")]
    assert differences(facts, ["a", "b", "b", "c"]) == "the ranks are not alike: torch is 1 on rank 0 (a), and 2 on rank 1 (b)"
    facts = [{f"fact {number}": str(rank < 2) for number in range(5)} for rank in range(6)]
    line = differences(facts, list("aabbcc"))
    assert "fact 0 is True on rank 0 (a) and 1 more, and False on rank 2 (b)" in line
    assert line.endswith("and 2 more differences")
    assert differences([{}, {}], ["a", "b"]) == ""


def test_whose_problem_it_is() -> None:
    assert problems([Surroundings("a"), Surroundings("b")]) == ""
    assert problems([Surroundings("a", "no file"), Surroundings("b", "no file")]) == "no file"
    some = [Surroundings("a"), Surroundings("b", "no file"), Surroundings("c", "no file")]
    assert problems(some) == "rank 1 on b (and on c): no file"
