"""What the documents tell a reader to type works, and every example configuration loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ext.config_reading import from_dict, load_config
from megatron_ext.objective import PhasePlan
from tests.conftest import write_text

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# The quickstart's own length is the demo's business; here it is the commands that count.
SHORTER = (
    " --model.preset nano --validation.interval 0 --optimizer.warmup_steps 1 --optimizer.decay_steps 1 --training.stop_at_step"
)


def blocks(text: str, language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder that looks like a clone after `make demo`, with a reader's own texts in my/texts."""
    for name in ("tools", "examples", "pretrain_encoder.py", "megatron_ext"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my/texts").mkdir(parents=True)
    for number in range(2):
        write_text(tmp_path / f"my/texts/{number}.jsonl", documents=1000, seed=number, vocabulary=3000)
    demo = tmp_path / "build/demo"
    demo.mkdir(parents=True)
    shell("python tools/train_tokenizer.py my/texts --output-prefix build/demo/tokenizer --vocab-size 1024", tmp_path)
    for name in ("boolq_passages", "shakespeare"):
        shell(
            f"python tools/preprocess_data.py my/texts --tokenizer build/demo/tokenizer.model --output-prefix build/demo/{name}",
            tmp_path,
        )
    (tmp_path / "my/plan.yaml").write_text(blocks(README, "yaml")[0])
    return tmp_path


def shell(command: str, folder: Path) -> str:
    """Run a command as a reader would, with the environment's programs first; returns what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.timeout(1800)
def test_the_commands_of_the_readme_run(workshop: Path) -> None:
    commands = [line for block in blocks(README, "bash") for line in block.replace("\\\n", "").strip().splitlines()]
    assert len(commands) >= 7
    stop_at = iter((2, 4))
    for command in commands:
        if "biphasic.yaml" in command and command.startswith("torchrun"):
            command += f"{SHORTER} {next(stop_at)}"
        shell(command, workshop)
    assert (workshop / "my/loss.png").stat().st_size > 10_000
    assert (workshop / "my/model/model.safetensors").is_file()
    assert sorted(path.name for path in (workshop / "build/biphasic/checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


def test_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(README, "sh")), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
    assert "make test" in (ROOT / ".ci/run").read_text()


RUNS = [path for path in sorted((ROOT / "examples").rglob("*.yaml")) if not path.name.endswith(("study.yaml", "grid.yaml"))]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_example_configurations_load(path: Path) -> None:
    config, _ = load_config(["--config", str(path)])
    assert PhasePlan.from_config(config).total_steps > 0


def test_plans_of_the_objectives_page_load() -> None:
    plans = blocks((ROOT / "docs/objectives.md").read_text(), "yaml")
    assert plans
    for plan in plans:
        tree = {"output_dir": "out", "data": {"tokenizer": "t", "train": [{"prefix": "p"}]}, **yaml.safe_load(plan)}
        assert PhasePlan.from_config(from_dict(tree)).total_steps > 0


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
