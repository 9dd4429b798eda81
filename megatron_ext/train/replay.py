"""Delivers the spool of a run that has ended."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.secrets import is_redacted, without_user_info
from megatron_ext.train.folder_lock import FolderLock
from megatron_ext.train.mlflow_delivery import Delivery, reason_of
from megatron_ext.train.mlflow_tracker import ATTEMPTS_TO_FINISH, pause_after
from megatron_ext.train.spool import SPOOL_FILE, Spool

CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class ReplayResult:
    """What a replay came to."""

    server: str
    """Without its credentials."""
    delivered: int
    """Records."""
    refused: int
    """Readings, parameters and tags that the server does not take; set aside with the reason."""
    left: int
    """Records that are still to be delivered."""
    error: str | None
    """Why the rest could not be delivered."""


def replay(output_dir: Path, uri: str | None = None) -> ReplayResult:
    """Deliver what is left in an output folder's spool, with a progress bar.

    A run that ended without a word (SIGKILL, power) gets the status KILLED: nobody else will tell MLflow.

    Args:
        output_dir: the run's folder.
        uri: another server than the run's.

    Raises:
        UserError: there is no spool, the run is still going on, or the server's credentials are not known.
    """
    if not (output_dir / SPOOL_FILE).is_file():
        raise UserError(f"{output_dir / SPOOL_FILE}: there is no such file; the output_dir of a run with tracking.mlflow is wanted")
    lock = FolderLock(output_dir)
    try:
        spool = Spool(output_dir)
        starts = spool.starts()
        if not starts:
            raise UserError(f"{spool.path} holds no run")
        _end_run(spool, starts[-1][0])
        delivery = Delivery(spool, uri or _uri_of(starts[-1][1], os.environ), output_dir)
        error = _deliver_all(delivery)
        spool.close_file()
        return ReplayResult(
            server=delivery.progress.server,
            delivered=delivery.records_delivered,
            refused=delivery.items_refused,
            left=spool.count(delivery.progress.offset),
            error=error,
        )
    finally:
        lock.release()


def _end_run(spool: Spool, last_start: int) -> None:
    records = [record for _, _, record in spool.records(last_start)]
    if all(record["kind"] != "status" for record in records):
        spool.append("status", status="KILLED", time=max(record.get("time", 0) for record in records))


def _uri_of(start: dict[str, Any], environment: Mapping[str, str]) -> str | None:
    uri = start["uri"]
    if uri is None or not is_redacted(uri):
        return uri
    address = without_user_info(uri)
    if not is_redacted(address) and any(environment.get(name) for name in CREDENTIALS):
        return address
    raise UserError(
        f"the run's tracking.uri was {uri}, and its credentials are stored nowhere: set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or give the whole address with --uri"
    )


def _deliver_all(delivery: Delivery) -> str | None:
    """Deliver until nothing is left; returns what is wrong after some failures in a row."""
    from tqdm import tqdm

    failures, is_more = 0, True
    total = delivery.spool.size()
    with tqdm(total=total, initial=delivery.progress.offset, unit="B", unit_scale=True, disable=None) as bar:
        while is_more:
            try:
                is_more = delivery.deliver_next()
                failures = 0
            except Exception as error:  # whatever MLflow raises
                failures += 1
                if failures == ATTEMPTS_TO_FINISH:
                    return reason_of(error)
                time.sleep(pause_after(failures))
            bar.update(delivery.progress.offset - bar.n)
    return None
