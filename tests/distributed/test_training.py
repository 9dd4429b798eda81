"""Whole runs with real processes: resumes are exact, layouts agree, phases switch at their edges on every rank."""

import copy
import json
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config_reading import from_dict
from megatron_ext.runtime.launch import run_on_ranks
from tests.conftest import Corpus

EDGE, TOTAL, SAVED = 4, 8, 2
LAYOUTS = {
    "TP2+SP": (2, {"tensor": 2}),
    "PP2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2 distributed optimizer": (2, {"distributed_optimizer": True}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}),
}
# Six optimizer steps in float32 in another summation order; AdamW divides by small second moments, which amplifies rounding.
WEIGHT_TOLERANCE = 2e-4
LOSS_TOLERANCE = 1e-4


def config_tree(corpus: Corpus, output_dir: Path, parallel: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Four steps of CLM, then four of MLM."""
    return {
        "output_dir": str(output_dir),
        "data": {
            "tokenizer": str(corpus.tokenizer),
            "train": [{"prefix": str(corpus.prefix)}],
            "split": [0.9, 0.1, 0.0],
            "sequence_length": 64,
        },
        "model": {"preset": "nano"},
        "phases": [{"objective": "clm", "steps": EDGE}, {"objective": "mlm", "steps": TOTAL - EDGE, "optimizer_state": "reset"}],
        "parallel": parallel,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "decay_steps": 2, "epsilon": 1e-6},
        "training": {"micro_batch_size": 2, "global_batch_size": 16, "log_interval": 1, **changes.pop("training", {})},
        "validation": {"interval": 4, "samples": 16},
        "checkpoint": {"interval": 2},
        "tracking": {"mlflow": False},
        **changes,
    }


def run_training(trees: list[dict[str, Any]]) -> list[list[list[tuple[str, bool]]]]:
    """Run the configurations one after the other in this rank.

    Returns:
        For each run and step the (objective, causal) of every micro-batch as the model got it.
    """
    from megatron_ext.model.encoder import EncoderModel
    from megatron_ext.train.trainer import Trainer, train

    seen: list[list[list[tuple[str, bool]]]] = []
    forward, step = EncoderModel.forward, Trainer.train_step

    def watched_step(self: Any, *args: Any) -> Any:
        seen[-1].append([])
        return step(self, *args)

    def watched_forward(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            seen[-1][-1].append((batch.objective.name, batch.causal))
        return forward(self, batch, *args, **kwargs)

    EncoderModel.forward, Trainer.train_step = watched_forward, watched_step
    for tree in trees:
        seen.append([])
        train(from_dict(tree))
    return seen


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    seen_by_rank: list[list[list[tuple[str, bool]]]]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoints/step_{step:08d}"

    def shard_sums(self, step: int) -> dict[str, str]:
        """SHA-256 of the weights' and moments' files, taken here and not from the run's own records."""
        import hashlib

        files = sorted(self.checkpoint(step).glob("*.distcp"))
        assert files
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        from megatron_ext.hf.checkpoint_reader import CheckpointReader

        reader = CheckpointReader(self.checkpoint(step))
        return {name: reader.read(name) for name in reader.tensors}

    def losses(self) -> dict[tuple[int, str], float]:
        """(step, metric) -> loss."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {(line["step"], name): value for line in lines for name, value in line.items() if "loss" in name}


@pytest.fixture(scope="session")
def one_rank(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A whole run, and the same continued from its checkpoint after step 2."""
    folder = tmp_path_factory.mktemp("one_rank")
    start = folder / f"whole/checkpoints/step_{SAVED:08d}"
    trees = [config_tree(corpus, folder / "whole", {}), config_tree(corpus, folder / "resumed", {}, resume=str(start))]
    results = run_on_ranks(run_training, 1, trees)
    return {name: Run(folder / name, [rank[k] for rank in results]) for k, name in enumerate(("whole", "resumed"))}


@pytest.fixture(scope="session", params=LAYOUTS)
def other_layout(request: pytest.FixtureRequest, corpus: Corpus, one_rank: dict[str, Run], tmp_path_factory: Any) -> dict[str, Run]:
    """At another layout: continued from the one-rank checkpoint; and a whole run there, continued from its own checkpoint."""
    ranks, parallel = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("layout")
    trees = [
        config_tree(corpus, folder / "moved", parallel, resume=str(one_rank["whole"].checkpoint(SAVED))),
        config_tree(corpus, folder / "whole", parallel),
        config_tree(corpus, folder / "resumed", parallel, resume=str(folder / f"whole/checkpoints/step_{SAVED:08d}")),
    ]
    results = run_on_ranks(run_training, ranks, trees)
    return {name: Run(folder / name, [rank[k] for rank in results]) for k, name in enumerate(("moved", "whole", "resumed"))}


def test_resume_is_bitwise_exact_across_a_phase_edge(one_rank: dict[str, Run]) -> None:
    assert one_rank["whole"].shard_sums(TOTAL) == one_rank["resumed"].shard_sums(TOTAL)
    assert one_rank["whole"].shard_sums(EDGE) != one_rank["whole"].shard_sums(TOTAL)
    whole = one_rank["whole"].losses()
    assert all(whole[key] == loss for key, loss in one_rank["resumed"].losses().items())


def test_resume_is_bitwise_exact_at_every_layout(other_layout: dict[str, Run]) -> None:
    assert other_layout["whole"].shard_sums(TOTAL) == other_layout["resumed"].shard_sums(TOTAL)


@pytest.mark.parametrize("name", ["moved", "whole"])
def test_other_layouts_continue_and_train_like_one_rank(one_rank: dict[str, Run], other_layout: dict[str, Run], name: str) -> None:
    _assert_same_training(other_layout[name], one_rank["whole"])


def _assert_same_training(run: Run, reference: Run) -> None:
    """Same weights at the end and same losses on the way, up to rounding."""
    expected, found = reference.weights(TOTAL), run.weights(TOTAL)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        rows = min(len(tensor), len(found[key]))  # the vocabulary is padded further under tensor parallelism
        torch.testing.assert_close(
            found[key][:rows], tensor[:rows], rtol=0, atol=WEIGHT_TOLERANCE, msg=lambda m, k=key: f"{k}: {m}"
        )
    losses, references = run.losses(), reference.losses()
    assert losses
    for key, loss in losses.items():
        assert loss == pytest.approx(references[key], abs=LOSS_TOLERANCE), key


def test_every_rank_switches_objective_at_the_edge(one_rank: dict[str, Run], other_layout: dict[str, Run]) -> None:
    for run, first in (
        (one_rank["whole"], 0),
        (one_rank["resumed"], SAVED),
        (other_layout["whole"], 0),
        (other_layout["moved"], SAVED),
    ):
        for steps in run.seen_by_rank:
            assert len(steps) == TOTAL - first
            for step, batches in enumerate(steps, start=first):
                assert batches
                assert set(batches) == ({("clm", True)} if step < EDGE else {("mlm", False)})


def test_counters_are_exact(one_rank: dict[str, Run], other_layout: dict[str, Run]) -> None:
    records = [json.loads((run.checkpoint(TOTAL) / "run.json").read_text()) for run in (one_rank["whole"], *other_layout.values())]
    for record in records:
        assert record["samples"] == TOTAL * 16
        assert record["tokens"] == TOTAL * 16 * 64
        assert record["predicted_tokens"] == records[0]["predicted_tokens"]
        assert record["flops"] == pytest.approx(records[0]["flops"], rel=1e-12)
    causal = json.loads((one_rank["whole"].checkpoint(EDGE) / "run.json").read_text())["causal"]
    assert (causal, records[0]["causal"]) == (True, False)


def test_checkpoint_of_any_layout_continues_on_one_rank(
    corpus: Corpus, one_rank: dict[str, Run], other_layout: dict[str, Run], tmp_path: Path
) -> None:
    run_on_ranks(run_training, 1, [config_tree(corpus, tmp_path / "back", {}, resume=str(other_layout["whole"].checkpoint(SAVED)))])
    _assert_same_training(Run(tmp_path / "back", []), one_rank["whole"])


def test_bf16_resumes_exactly_and_moves_between_optimizers(corpus: Corpus, tmp_path: Path) -> None:
    distributed = {"distributed_optimizer": True}
    start = {name: str(tmp_path / f"{name}/checkpoints/step_{SAVED:08d}") for name in ("plain", "distributed")}
    trees = [
        config_tree(corpus, tmp_path / "plain", {}, precision={"recipe": "bf16"}),
        config_tree(corpus, tmp_path / "distributed", distributed, precision={"recipe": "bf16"}),
        config_tree(corpus, tmp_path / "plain_resumed", {}, precision={"recipe": "bf16"}, resume=start["plain"]),
        config_tree(corpus, tmp_path / "plain_moved", distributed, precision={"recipe": "bf16"}, resume=start["plain"]),
        config_tree(
            corpus, tmp_path / "distributed_resumed", distributed, precision={"recipe": "bf16"}, resume=start["distributed"]
        ),
        config_tree(corpus, tmp_path / "distributed_moved", {}, precision={"recipe": "bf16"}, resume=start["distributed"]),
    ]
    run_on_ranks(run_training, 2, trees)
    runs = {Path(tree["output_dir"]).name: Run(Path(tree["output_dir"]), []) for tree in trees}
    assert runs["plain"].shard_sums(TOTAL) == runs["plain_resumed"].shard_sums(TOTAL)
    assert runs["distributed"].shard_sums(TOTAL) == runs["distributed_resumed"].shard_sums(TOTAL)
    for moved in ("plain_moved", "distributed_moved"):
        losses, expected = runs[moved].losses(), runs["plain"].losses()
        assert losses == {key: pytest.approx(expected[key], abs=2e-3) for key in losses}  # bf16 keeps 8 bits


def test_context_parallel_run_resumes_exactly_and_trains_like_one_rank(
    corpus: Corpus, one_rank: dict[str, Run], tmp_path: Path
) -> None:
    """Micro-batches of one sample, so that the two ranks share documents; each keeps half of the optimizer's state."""
    parallel = {"context": 2, "distributed_optimizer": True}
    changes: dict[str, Any] = {"training": {"micro_batch_size": 1, "log_batches": True, "recompute": "attention"}}
    start = str(tmp_path / f"whole/checkpoints/step_{SAVED:08d}")
    trees = [
        config_tree(corpus, tmp_path / "whole", parallel, **copy.deepcopy(changes)),
        config_tree(corpus, tmp_path / "resumed", parallel, **copy.deepcopy(changes), resume=start),
    ]
    run_on_ranks(run_training, 2, trees)
    whole, resumed = (Run(Path(tree["output_dir"]), []) for tree in trees)
    assert whole.shard_sums(TOTAL) == resumed.shard_sums(TOTAL)
    _assert_same_training(whole, one_rank["whole"])
    records = [json.loads((run.checkpoint(TOTAL) / "run.json").read_text()) for run in (whole, one_rank["whole"])]
    for counter in ("samples", "tokens", "predicted_tokens", "flops"):
        assert records[0][counter] == pytest.approx(records[1][counter], rel=1e-12), counter
    logs = {path.name: path.read_text().splitlines() for path in (tmp_path / "whole/batches").iterdir()}
    assert {name: len(lines) for name, lines in logs.items()} == {"data_rank_0000.jsonl": TOTAL * 16}, "every sample once"


def test_stop_and_auto_resume_continue_the_same_run(corpus: Corpus, one_rank: dict[str, Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped = config_tree(corpus, folder, {}, training={"stop_at_step": 5})
    run_on_ranks(run_training, 1, [stopped, config_tree(corpus, folder, {}, resume="auto")])
    assert Run(folder, []).shard_sums(TOTAL) == one_rank["whole"].shard_sums(TOTAL)
    leftovers = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step_")]
    assert leftovers == []


def test_checkpoint_of_any_layout_exports_and_verifies(
    other_layout: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for step, architecture in ((EDGE, "LlamaForCausalLM"), (TOTAL, "EuroBertForMaskedLM")):
        checkpoint = tmp_path / f"step_{step}"
        shutil.copytree(other_layout["whole"].checkpoint(step), checkpoint)
        arguments = ["export", str(checkpoint), str(tmp_path / f"hf_{step}"), "--verify"]
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/convert_checkpoint.py", run_name="__main__")
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        assert architecture in printed.out


def refused(capfd: pytest.CaptureFixture, tree: dict[str, Any]) -> str:
    """The error of a run that must not start or go on."""
    with pytest.raises(RuntimeError) as caught:
        run_on_ranks(run_training, 1, [tree])
    capfd.readouterr()
    return next(line for line in str(caught.value).splitlines() if "UserError: " in line or "SharedError: " in line)


def test_a_run_that_diverges_stops_before_it_saves(corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tree = config_tree(corpus, tmp_path / "run", {}, training={"max_skipped_steps": 2})
    tree["optimizer"] = {"learning_rate": 1e30, "warmup_steps": 3}
    assert "training.max_skipped_steps 2" in refused(capfd, tree)
    for checkpoint in (tmp_path / "run/checkpoints").glob("step_*"):
        assert all(torch.isfinite(tensor).all() for tensor in Run(tmp_path / "run", []).weights(int(checkpoint.name[5:])).values())


def test_a_branch_does_not_mix_with_other_checkpoints(
    corpus: Corpus, one_rank: dict[str, Run], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(one_rank["whole"].folder, tmp_path / "run")
    for start in (tmp_path / "run/checkpoints/step_00000004", one_rank["resumed"].checkpoint(TOTAL)):
        assert "choose another output_dir" in refused(capfd, config_tree(corpus, tmp_path / "run", {}, resume=str(start)))
    parent = json.loads((one_rank["resumed"].checkpoint(TOTAL) / "run.json").read_text())["parent"]
    assert parent["checkpoint"] == str(one_rank["whole"].checkpoint(SAVED))


def test_other_data_or_a_damaged_checkpoint_are_refused(
    corpus: Corpus, one_rank: dict[str, Run], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    start = str(one_rank["whole"].checkpoint(EDGE))
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus.prefix}{ending}", f"{tmp_path / 'moved'}{ending}")
    moved = Corpus(corpus.text, corpus.tokenizer, tmp_path / "moved")
    run_on_ranks(run_training, 1, [config_tree(moved, tmp_path / "same", {}, resume=start)])
    assert Run(tmp_path / "same", []).shard_sums(TOTAL) == one_rank["whole"].shard_sums(TOTAL)
    with open(f"{moved.prefix}.bin", "r+b") as file:
        file.write(b"\x21\x00")
    assert "data.train was data set" in refused(capfd, config_tree(moved, tmp_path / "other", {}, resume=start))
    damaged = tmp_path / "damaged"
    shutil.copytree(start, damaged)
    shard = sorted(damaged.glob("*.distcp"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in refused(capfd, config_tree(corpus, tmp_path / "broken", {}, resume=str(damaged)))


def test_a_plan_is_extended_only_with_a_schedule_of_its_own(
    corpus: Corpus, one_rank: dict[str, Run], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    longer = config_tree(corpus, tmp_path / "run", {}, resume=str(one_rank["whole"].checkpoint(TOTAL)))
    longer["phases"].append({"objective": "mlm", "steps": 4})
    assert "rewarm" in refused(capfd, longer)
    longer["phases"][-1] = {"objective": "mlm", "steps": 4, "learning_rate": "rewarm"}
    run_on_ranks(run_training, 1, [longer])
    assert (tmp_path / f"run/checkpoints/step_{TOTAL + 4:08d}/run.json").is_file()
