"""What the benchmarks count and compare; how fast anything is, no test says."""

import numpy as np
import pytest

from benchmarks import parallel, sequences
from benchmarks.alternating import Contender, Ratio
from benchmarks.contenders import SHAPES, make_batch, step_flops
from benchmarks.documents import TOKENS, make_rows


def test_ratios_are_those_of_neighbours() -> None:
    assert Ratio.of([1.0, 2.0, 4.0], [2.0, 2.0, 16.0]) == Ratio(2.0, 1.0, 4.0)


@pytest.mark.parametrize("objective, attended, predicted", [("mlm", 512, 0.4), ("clm", 256, 511 / 512)])
def test_useful_work_is_the_written_formula(objective: str, attended: int, predicted: float) -> None:
    blocks = 12 * (4 * 768**2 + 3 * 768 * 3072)
    per_token = 6 * blocks + 12 * 12 * 768 * attended + 6 * predicted * 768 * 128_256
    assert step_flops(SHAPES["210m"], objective) == pytest.approx(per_token * 4 * 512)


def test_a_batch_hides_what_is_to_be_said() -> None:
    shape = SHAPES["tiny"]
    batch = make_batch(shape, "mlm")
    hidden = batch.labels >= 0
    assert (hidden.sum(axis=1) == round(0.4 * shape.sequence_length)).all()
    assert (batch.tokens[hidden] == 4).all() and (batch.tokens[~hidden] >= 5).all()
    causal = make_batch(shape, "clm")
    np.testing.assert_array_equal(causal.tokens, causal.labels)
    np.testing.assert_array_equal(causal.tokens[~hidden], batch.tokens[~hidden])


def test_a_contender_that_fails_is_no_figure() -> None:
    contender = Contender("benchmarks.contenders", "nobody")
    with pytest.raises(RuntimeError, match="ended with code 2"):
        contender.ready()


@pytest.mark.parametrize("name", ["megatron_ext", "transformers", "trainer", "megatron_core"])
def test_contenders_do_the_same_work(name: str) -> None:
    """All start near the loss of a uniform guess, and learn the batch that they see again."""
    contender = Contender("benchmarks.contenders", name, "--shape", "smoke", "--objective", "mlm", threads=1)
    contender.ready()
    losses = [contender.step()["loss"] for _ in range(3)]
    contender.end()
    assert losses[0] == pytest.approx(np.log(SHAPES["smoke"].vocab_size), rel=0.03)
    assert losses[0] > losses[1] > losses[2]


def test_two_ranks_and_one_make_the_same_step() -> None:
    result = parallel.measure("smoke", "DP2", 2, 1)
    assert len(result["losses"]) == 3 and result["efficiency"]["median"] > 0


def test_packed_and_padded_documents_are_the_same_documents() -> None:
    rows = make_rows(512, 1000)
    assert sum(len(row.tokens) for row in rows) == TOKENS and all(row.lengths.sum() == 512 for row in rows)
    assert sequences.step_flops(512, "across") > sequences.step_flops(512, "packed")
    losses = []
    for kind in ("packed", "padded"):
        contender = Contender("benchmarks.documents", kind, "--sequence-length", "512", threads=1)
        contender.ready()
        losses.append(contender.step()["loss"])
        contender.end()
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
