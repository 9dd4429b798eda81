"""The grid's worker processes: every task comes back once, also when several workers are free at the same moment."""

import time
from pathlib import Path

from megatron_ext.evaluation.pool import run_all


def leave_mark(task: tuple[str, int]) -> int:
    """What a worker does: the first task ends at once, those beside it when the first has been heard of."""
    folder, number = Path(task[0]), task[1]
    while number in (1, 2) and not (folder / "heard").exists():
        time.sleep(0.01)
    (folder / str(number)).touch()
    return number


def test_fewer_tasks_are_left_than_workers_are_free(tmp_path: Path) -> None:
    """Three workers, five tasks: while the first worker takes the fourth task, the two others end, and one task is left."""
    found = []
    for done in run_all(leave_mark, [(str(tmp_path), number) for number in range(5)], 3):
        found.append((done.task[1], done.result, done.error))
        (tmp_path / "heard").touch()
        while not all((tmp_path / str(number)).exists() for number in range(3)):
            time.sleep(0.01)
    assert sorted(found) == [(number, number, None) for number in range(5)]
