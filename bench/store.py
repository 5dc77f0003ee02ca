"""The store: one immutable, checksummed record per run, written whole or not at all. Tables are derived from it.

results/runs/<run_id>/record.json    facts and scores; beside it config.yaml and history.csv
results/runs/<run_id>.2/...          a second attempt; the newest attempt counts
results/runs/.locks/<cell_id>        held by the process that is working on a cell
results/quarantine/                  damaged records, set aside
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import UserError

SCHEMA = 1
HISTORY = (  # columns of history.csv
    *("step", "train_loss", "auxiliary_loss", "valid_loss", "valid_metric"),
    *("learning_rate", "seconds"),
)
FOLDER = re.compile(r"(?P<run_id>[0-9a-f]{20})(?:\.(?P<attempt>[2-9]|[1-9][0-9]+))?")


class StoreError(UserError):
    """The results folder cannot be written: full, read-only, or not a folder."""


class DamagedRecord(ValueError):
    """A record that is not what was written."""


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """20 hexadecimal digits that identify a value."""
    return hashlib.blake2b(canonical(value).encode(), digest_size=10).hexdigest()


def checksum(record: Mapping[str, Any]) -> str:
    """Checksum of a record's body, all but the checksum itself."""
    body = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def finite(value: Any) -> Any:
    """The value with every NaN and infinity as None: JSON has no words for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def as_csv(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """Rows as CSV text with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class Store:
    """A results folder."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def lock_path(self, cell_id: str) -> Path:
        return self.runs / ".locks" / cell_id

    def prepare(self) -> None:
        """Make the folders and prove that they can be written.

        Raises:
            StoreError: they cannot.
        """
        try:
            (self.runs / ".locks").mkdir(parents=True, exist_ok=True)
            probe = self.runs / f".probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.runs}: {error.strerror or error}; choose another folder with results=FOLDER"
            ) from error
        self._sweep_temporaries()

    def _sweep_temporaries(self) -> None:
        """Remove what a killed process left half-written ten minutes ago or earlier; a write takes milliseconds."""
        for path in [*self.runs.glob(".new-*"), *self.runs.glob(".probe-*")]:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 600:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write(self, record: dict[str, Any], files: Mapping[str, str]) -> Path:
        """Write a record and the files beside it, all or nothing: temporary folder -> fsync -> rename.

        The attempt number is the first free one. Each name in `files` enters the record with its sha256.

        Raises:
            StoreError: no space, no permission; nothing is left behind.
        """
        run_id = record["run_id"]
        temporary = self.runs / f".new-{uuid.uuid4().hex}"
        try:
            temporary.mkdir(parents=True)
            for name, text in files.items():
                _write_synced(temporary / name, text)
            hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
            attempt = 1 + max(self._attempts(run_id), default=0)
            while True:
                body = finite({**record, "schema": SCHEMA, "attempt": attempt, "files": hashes})
                body["checksum"] = checksum(body)
                _write_synced(
                    temporary / "record.json", json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"
                )
                _sync_folder(temporary)
                target = self.runs / (run_id if attempt == 1 else f"{run_id}.{attempt}")
                try:
                    temporary.rename(target)  # fails when somebody was faster: a record is never replaced
                    break
                except OSError:
                    if not target.exists():
                        raise
                    attempt += 1
            _sync_folder(self.runs)
            return target
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise StoreError(
                f"cannot write the record of run {run_id} under {self.runs}: {error.strerror or error}"
            ) from error

    def attempts(self, run_id: str) -> list[Path]:
        """Folders of a run, oldest attempt first."""
        found = self._attempts(run_id)
        return [found[attempt] for attempt in sorted(found)]

    def _attempts(self, run_id: str) -> dict[int, Path]:
        found = {1: self.runs / run_id} if (self.runs / run_id).exists() else {}
        for path in self.runs.glob(f"{run_id}.*"):
            match = FOLDER.fullmatch(path.name)
            if match and match["attempt"]:
                found[int(match["attempt"])] = path
        return found

    def latest(self, run_id: str, warnings: list[str] | None = None) -> dict[str, Any] | None:
        """The newest readable record of a run, or None; a damaged one is set aside with a warning line."""
        return self._newest(self.attempts(run_id), warnings)

    def _newest(self, folders: list[Path], warnings: list[str] | None) -> dict[str, Any] | None:
        for folder in reversed(folders):
            try:
                return read_record(folder)
            except DamagedRecord as error:
                warning = self.set_aside(folder, str(error))
                if warnings is not None:
                    warnings.append(warning)
        return None

    def set_aside(self, folder: Path, why: str) -> str:
        """Move a damaged folder to quarantine/ and say so in one line."""
        target = self.root / "quarantine" / f"{folder.name}-{uuid.uuid4().hex[:8]}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
        except OSError as error:
            return f"damaged record {folder.name} ({why}) cannot be moved: {error.strerror or error}"
        return f"damaged record {folder.name} ({why}) was moved to {target}; the same command runs it again"

    def read_all(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The newest record of every run, ordered by run id, and a warning line for each damaged one."""
        warnings: list[str] = []
        attempts: dict[str, list[tuple[int, Path]]] = {}  # from one listing: a search per run is quadratic
        for path in _children(self.runs):
            if match := FOLDER.fullmatch(path.name):
                attempts.setdefault(match["run_id"], []).append((int(match["attempt"] or 1), path))
        newest = ([path for _, path in sorted(found)] for _, found in sorted(attempts.items()))
        records = [self._newest(folders, warnings) for folders in newest]
        return [record for record in records if record is not None], warnings


def read_record(folder: Path) -> dict[str, Any]:
    """Read and verify one record and the files beside it.

    Raises:
        DamagedRecord: with the reason; StoreError: a healthy record may be there, but this process cannot read it;
        UserError: written by a newer version of this program.
    """
    try:
        record = json.loads(_read(folder / "record.json"))
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"unreadable: {type(error).__name__}") from error
    if not isinstance(record, dict) or record.get("checksum") != _checksum_of_data(record):
        raise DamagedRecord("checksum does not match")
    if record.get("schema") != SCHEMA:
        raise UserError(f"{folder} has schema {record.get('schema')}, this program reads {SCHEMA}; update the program")
    match = FOLDER.fullmatch(folder.name)
    if match is None or match["run_id"] != record["run_id"]:
        raise DamagedRecord("its name is not its run id")
    for name, expected in record["files"].items():
        if hashlib.sha256(_read(folder / name)).hexdigest() != expected:
            raise DamagedRecord(f"{name} was changed")
    return record


def read_history(folder: Path) -> list[dict[str, float]]:
    """The loss history beside a record."""
    text = (folder / "history.csv").read_text(encoding="utf-8")
    return [{k: float(v) if v else math.nan for k, v in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedRecord(f"{path.name} is missing") from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error


def _checksum_of_data(record: Mapping[str, Any]) -> str:
    try:
        return checksum(record)
    except (TypeError, ValueError):  # infinities, which are never written
        return "none"


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error.strerror or error}") from error


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
