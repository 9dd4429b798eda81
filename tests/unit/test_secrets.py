"""What is taken out of texts, and the places where a run shows or stores its configuration."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ext.config import DataConfig, DataSource, PhaseConfig, RunConfig, TrackingConfig
from megatron_ext.config_reading import from_dict, load_config
from megatron_ext.errors import UserError
from megatron_ext.secrets import has_user_info, is_redacted, redact, without_user_info
from megatron_ext.train.show import print_config

URI = "http://alice:s3cr3t-hunter2@127.0.0.1:5000/mlflow"


@pytest.mark.parametrize(
    "text, expected",
    [
        (URI, "http://***@127.0.0.1:5000/mlflow"),
        ("http://alice:p@ss:w@host:1/x", "http://***@host:1/x"),
        ("https://only-a-token@host", "https://***@host"),
        (
            "postgresql+psycopg2://u:pw@db/mlflow?sslpassword=abc&mode=x",
            "postgresql+psycopg2://***@db/mlflow?sslpassword=***&mode=x",
        ),
        ("https://h/a?api_key=abc&X-Amz-Signature=0f3#part", "https://h/a?api_key=***&X-Amz-Signature=***#part"),
        ('API request to "http://a:b@h/x" failed, mail c@d.e', 'API request to "http://***@h/x" failed, mail c@d.e'),
        ("no: http://host/path@x and mail a@b.c", "no: http://host/path@x and mail a@b.c"),
        ("sqlite:////data/x@y/mlflow.db", "sqlite:////data/x@y/mlflow.db"),
    ],
)
def test_addresses(text: str, expected: str) -> None:
    assert redact(text, {}) == expected
    assert redact(expected, {}) == expected


def test_values_of_the_environment() -> None:
    environment = {
        "HF_TOKEN": "hf_abcdef",
        "MLFLOW_TRACKING_PASSWORD": "pass/word+1",
        "AWS_SECRET_ACCESS_KEY": "hf_abcdef-and-more",
        "WANDB_API_KEY": "0123456789",
        "github_token": "ghp_lower",
        "SHORT_TOKEN": "abcde",
        "TOKENIZERS_PARALLELISM": "false-ish",
        "MAX_TOKENS": "100000",
        "HF_TOKEN_PATH": "/home/x/token",
        "PATH": "/usr/bin",
    }
    text = "hf_abcdef hf_abcdef-and-more pass/word+1 pass%2Fword%2B1 0123456789 ghp_lower"
    assert redact(text, environment) == "*** *** *** *** *** ***"
    kept = "abcde false-ish 100000 /home/x/token /usr/bin"
    assert redact(kept, environment) == kept


def test_trees_keep_their_shape() -> None:
    tree = {"a": [URI, 1, None, 2.5], "b": {"c": ("x", URI)}, URI: True}
    hidden = "http://***@127.0.0.1:5000/mlflow"
    assert redact(tree, {}) == {"a": [hidden, 1, None, 2.5], "b": {"c": ("x", hidden)}, URI: True}
    assert tree["a"][0] == URI


def test_parts_of_an_address() -> None:
    assert has_user_info(URI) and not has_user_info("http://host/a@b")
    assert is_redacted(redact(URI)) and not is_redacted(URI)
    assert without_user_info(URI) == without_user_info(redact(URI)) == "http://127.0.0.1:5000/mlflow"


def config_with(uri: str) -> RunConfig:
    return RunConfig(
        output_dir="run",
        data=DataConfig(tokenizer="t", train=[DataSource(prefix="p")]),
        phases=[PhaseConfig(objective="mlm", steps=3)],
        tracking=TrackingConfig(uri=uri),
    )


def test_a_shown_configuration_has_no_secrets_and_is_not_run_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_config(config_with(URI))
    shown = capsys.readouterr().out
    assert "hunter2" not in shown and "alice" not in shown
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    with pytest.raises(UserError, match=r"tracking\.uri is http://\*\*\*@127.0.0.1:5000/mlflow: .*MLFLOW_TRACKING_PASSWORD"):
        load_config(["--config", str(path)])
    assert load_config(["--config", str(path), "--tracking.uri", URI])[0] == config_with(URI)


def test_a_stored_configuration_is_read_back() -> None:
    """A resume rebuilds the configuration that run.json holds."""
    config = config_with(URI)
    stored = config.public_dict()
    assert stored == {**config.as_dict(), "tracking": {**config.as_dict()["tracking"], "uri": redact(URI)}}
    assert from_dict(yaml.safe_load(yaml.safe_dump(stored))).phases == config.phases


@pytest.mark.parametrize("kind, code", [("UserError", 2), ("RuntimeError", 1)])
def test_an_entry_point_that_fails_tells_no_secrets(kind: str, code: int) -> None:
    script = (
        "from megatron_ext.errors import UserError, run_command\n"
        "def main():\n"
        "    try:\n"
        f"        raise OSError('first: {URI}')\n"
        "    except OSError as error:\n"
        f"        raise {kind}('then: t0ken-4711') from error\n"
        "run_command(main)\n"
    )
    environment = {"MY_TOKEN": "t0ken-4711", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == code
    assert "then: ***" in run.stderr
    assert not [secret for secret in ("alice", "hunter2", "t0ken") if secret in run.stdout + run.stderr]
    assert ("Traceback" in run.stderr) == (code == 1)
