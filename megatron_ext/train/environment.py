"""What all ranks must have alike before the first step: checked once, in two small exchanges between the hosts.

A node with an older image, another copy of the data or a folder of its own in the place of the shared one does not stop a run: it
makes another model of it, or stops it hours later. Here one line names the rank and the host that differ.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_ext.config import RunConfig
from megatron_ext.errors import SharedError, UserError, warn
from megatron_ext.model.flops import count_parameters
from megatron_ext.runtime.capabilities import installed_version
from megatron_ext.train.agreement import Agreement
from megatron_ext.train.preflight import RunSetup
from megatron_ext.tree import flatten

DISTRIBUTIONS = ("megatron-core", "transformer-engine", "numpy", "tokenizers")
"""Distributions besides torch whose version decides on the numbers, or on what is sent between ranks."""
VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", "NCCL_PROTO")
"""Environment variables that must be alike; so must all that begin with `NVTE_`, which choose Transformer Engine's kernels."""
CONFIGURATION = "the configuration"
SHOWN = 3
"""Differences that the line tells of."""
BYTES_PER_PARAMETER = 12
"""Of a checkpoint, at least: float32 weights and two moments."""
SECONDS_TO_SEE = 10.0
"""How long a node may take to see a file of another: network file systems remember for a while what was not there."""
SECONDS_OF_SKEW = 5.0
"""Clocks may differ by this much. torchrun counts a node as dead whose heartbeat is 15 s old by another node's clock."""


@dataclass(frozen=True)
class Surroundings:
    """What one rank says of itself."""

    host: str
    problem: str = ""
    """Why it cannot start, in one line."""
    facts: dict[str, str] = field(default_factory=dict)
    """What must be alike on all ranks, by name."""
    token: str = ""
    """Name of the file that rank 0 has put in `output_dir`."""


def prepare_together(config: RunConfig, agreement: Agreement, prepare: Callable[[], RunSetup]) -> RunSetup:
    """Check the configuration on every rank, and that all ranks have the same around them; all ranks call it together.

    Args:
        config: of the run.
        agreement: exchanges between all ranks.
        prepare: what checks the configuration against this machine.

    Returns:
        What `prepare` returned.

    Raises:
        SharedError: on all ranks; the line names the rank and host whose own it is.
    """
    setup, problem = None, ""
    try:
        setup = prepare()
    except UserError as error:
        problem = str(error)
    with _token(config, setup) as (token, token_problem):
        own = Surroundings(socket.gethostname(), problem or token_problem, _facts(config, setup), token)
        ranks: list[Surroundings] = agreement.gather(own)
        _refuse(problems(ranks))
        if setup is None:
            raise AssertionError("a rank without a setup has a problem")
        if len({rank.facts[CONFIGURATION] for rank in ranks}) > 1:
            _refuse(_different_fields(config, ranks, agreement))
        _refuse(differences([rank.facts for rank in ranks], [rank.host for rank in ranks]))
        _see_each_other(config, ranks, agreement)
    return setup


def problems(ranks: list[Surroundings]) -> str:
    """Why the run cannot start: what all ranks say alike, or whose problem it is. Empty if nobody has one."""
    said = [rank.problem for rank in ranks]
    if not any(said):
        return ""
    if len(set(said)) == 1:
        return said[0]
    first = next(number for number, problem in enumerate(said) if problem)
    hosts = sorted({rank.host for rank in ranks if rank.problem} - {ranks[first].host})
    others = f" (and on {', '.join(hosts[:SHOWN])}{' ...' if len(hosts) > SHOWN else ''})" if hosts else ""
    return f"rank {first} on {ranks[first].host}{others}: {said[first]}"


def differences(facts: list[dict[str, str]], hosts: list[str]) -> str:
    """The facts that are not alike, with rank and host; what most ranks have (in doubt rank 0) is taken as right.

    Args:
        facts: by rank, then by name.
        hosts: by rank.

    Returns:
        One line; empty if all are alike.
    """
    names = dict.fromkeys(name for rank in facts for name in rank)
    lines = []
    for name in names:
        values = [rank.get(name, "absent") for rank in facts]
        usual = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            other = values.index(usual)
            lines.append(
                f"{name} is {values[odd[0]]:.100} on rank {odd[0]} ({hosts[odd[0]]}){more}, "
                f"and {usual:.100} on rank {other} ({hosts[other]})"
            )
    if not lines:
        return ""
    hidden = f"; and {len(lines) - SHOWN} more differences" if len(lines) > SHOWN else ""
    return f"the ranks are not alike: {'; '.join(lines[:SHOWN])}{hidden}"


def _refuse(line: str) -> None:
    if line:
        raise SharedError(line)


def _facts(config: RunConfig, setup: RunSetup | None) -> dict[str, str]:
    """What must be alike; of a rank without a setup what can be said without it."""
    public = json.dumps(config.public_dict(), sort_keys=True, default=str)
    facts = {
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__,
        **{name: installed_version(name) or "absent" for name in DISTRIBUTIONS},
        "the code of megatron_ext": code_fingerprint()[:12],
        CONFIGURATION: hashlib.sha256(public.encode()).hexdigest()[:12],
        "ranks on its node": os.environ.get("LOCAL_WORLD_SIZE", "1"),
    }
    set_here = [name for name in os.environ if name in VARIABLES or name.startswith("NVTE_")]
    facts |= {f"the environment variable {name}": os.environ[name] for name in sorted(set_here)}
    if setup is None:
        return facts
    facts |= {"what it runs on": setup.backend.name, **_gpu_facts(setup)}
    facts |= {f"data set {record['prefix']}": record["fingerprint"][:12] for record in setup.data_record}
    return facts | {"the tokenizer": setup.tokenizer.fingerprint[:12]}


def _gpu_facts(setup: RunSetup) -> dict[str, str]:
    if setup.backend.device.type != "cuda":
        return {}
    gpu = torch.cuda.get_device_properties(setup.backend.device)
    return {
        "its GPU": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}",
        "CUDA": str(torch.version.cuda),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


@functools.cache
def code_fingerprint() -> str:
    """SHA-256 over the names and contents of this package's modules."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _different_fields(config: RunConfig, ranks: list[Surroundings], agreement: Agreement) -> str:
    """Which fields of the configuration are not alike. The whole of it is sent only now that something is wrong with it."""
    fields = {name: str(value) for name, value in flatten(config.public_dict()).items()}
    found: list[dict[str, str]] = agreement.gather(fields)
    return differences(found, [rank.host for rank in ranks])


@contextlib.contextmanager
def _token(config: RunConfig, setup: RunSetup | None) -> Iterator[tuple[str, str]]:
    """Rank 0 puts an empty file into `output_dir` as long as the context lasts; its name, and why it could not."""
    if torch.distributed.get_rank() > 0 or setup is None:
        yield "", ""
        return
    folder, token = Path(config.output_dir), f".seen_by_all-{uuid.uuid4().hex}"
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    except OSError as error:
        yield "", f"output_dir {folder} cannot be written ({error.strerror})"
        return
    try:
        yield token, _lack_of_space(folder, setup)
    finally:
        with contextlib.suppress(OSError):
            (folder / token).unlink()
            if is_new and sys.exc_info()[0]:
                folder.rmdir()


def _lack_of_space(folder: Path, setup: RunSetup) -> str:
    needed = BYTES_PER_PARAMETER * count_parameters(setup.encoder, setup.vocab_size).total
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ""
    return f"output_dir {folder} has {free / 1e9:.2f} GB free: a checkpoint of this model takes at least {needed / 1e9:.2f} GB"


def _see_each_other(config: RunConfig, ranks: list[Surroundings], agreement: Agreement) -> None:
    """Every rank must see rank 0's file; clocks that differ are only warned of."""
    now = time.time()  # of all ranks at the same moment, for the exchange before has just ended on all
    is_seen = _sees(Path(config.output_dir), ranks[0].token)
    seen: list[tuple[bool, float]] = agreement.gather((is_seen, now))
    blind = [rank for rank, (is_seen, _) in enumerate(seen) if not is_seen]
    if blind:
        _refuse(
            f"rank {blind[0]} on {ranks[blind[0]].host} does not see what rank 0 on {ranks[0].host} writes into output_dir "
            f"{config.output_dir}: it must be on a file system that all nodes share"
        )
    skews = [clock - seen[0][1] for _, clock in seen]
    worst = max(range(len(skews)), key=lambda rank: abs(skews[rank]))
    if abs(skews[worst]) > SECONDS_OF_SKEW and torch.distributed.get_rank() == 0:
        direction = "ahead of" if skews[worst] > 0 else "behind"
        warn(
            f"the clock of {ranks[worst].host} (rank {worst}) is {abs(skews[worst]):.0f} s {direction} that of rank 0 "
            f"({ranks[0].host}): torchrun takes nodes for dead by their clocks"
        )


def _sees(folder: Path, token: str) -> bool:
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not (folder / token).exists():
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes a network file system ask its server again
        time.sleep(0.05)
    return True
