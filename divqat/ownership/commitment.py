"""A claim that cannot be made up afterwards: a commitment before the key exists."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from divqat._util.files import read_json, write_atomic, write_json
from divqat.data import ImageSet, LabeledImages, Splits
from divqat.nn.decoy import parse_key
from divqat.train import Run, TrainConfig
from divqat.train.folder import MAY_DIFFER

COMMITMENT, QUERY, REPLY = "commitment.json", "commitment.tsq", "commitment.tsr"


class ClaimRefused(ValueError):
    """A claim does not follow from a commitment of before its beacon."""


def derive_key(secret: str, beacon: str, claim: str) -> str:
    """K = HMAC-SHA256(secret, beacon, claim), 64 hexadecimal digits for ``decoy_key``.

    Revealing the key of one claim reveals neither the secret nor the key of another.

    Args:
        secret: 64 hexadecimal digits.
        beacon: a public random value of a day after the commitment.
        claim: names one released model.

    Raises:
        ValueError: ``secret`` is not as above.
    """
    return _keyed(secret, "key", beacon, claim)


def commit(secret: str, config: TrainConfig, splits: Splits, folder: str | Path) -> Path:
    """Write ``commitment.json``, which reveals nothing, and ``commitment.tsq``, an RFC 3161 query
    for its timestamp. Send that to an authority, and keep its reply as ``commitment.tsr``.

    It binds the secret, the code of this package, the settings of the training without its key, and
    the training images with their labels: all that the decoy depends on besides the key.

    Raises:
        ValueError: ``secret`` is not 64 hexadecimal digits, or the training set is streamed.
        FileNotFoundError, RuntimeError: there is no ``openssl``, or it failed.
    """
    folder = Path(folder)
    path = write_json(folder / COMMITMENT, _content(secret, config, splits))
    query = ("ts", "-query", "-data", path, "-sha256", "-cert", "-out")
    write_atomic(folder / QUERY, lambda file: _openssl(*query, file))
    return path


def verify_claim(
    run: Run,
    splits: Splits,
    folder: str | Path,
    *,
    secret: str,
    beacon: str,
    published: datetime,
    claim: str,
    authority: str | Path,
) -> datetime:
    """Check, as a judge, that a run's key follows from a commitment of before its beacon.

    Args:
        run: the run of the claim.
        splits: its data.
        folder: with ``commitment.json`` and ``commitment.tsr``.
        secret: what was committed to.
        beacon, published: the public random value, and when it was published, with time zone; the
            judge looks both up.
        claim: the name of the released model, as in :func:`derive_key`.
        authority: a PEM file with the certificates of a timestamp authority that the judge trusts.

    Returns:
        The time of the commitment.

    Raises:
        ClaimRefused: the timestamp is not of this authority or this file, or not before the beacon;
            secret, code, settings or data are not those committed to; or the run has
            another key.
        ValueError: ``secret`` is no key, or ``published`` has no time zone.
        FileNotFoundError: there is no ``openssl``, or no such file.
    """
    folder = Path(folder)
    if published.tzinfo is None:
        raise ValueError(f"published: wanted a time with a time zone, got {published}")
    time = _timestamp(folder, Path(authority))
    if time >= published:
        raise ClaimRefused(f"the commitment is of {time}, not before the beacon of {published}")
    stored, wanted = read_json(folder / COMMITMENT), _content(secret, run.config, splits)
    for name, value in wanted.items():
        if stored[name] != value:
            raise ClaimRefused(f"the {name} is not the one that was committed to")
    if run.config.decoy_key is None or not hmac.compare_digest(
        run.config.decoy_key.lower(), derive_key(secret, beacon, claim)
    ):
        raise ClaimRefused("the key of the run does not follow from secret, beacon and claim")
    return time


def _content(secret: str, config: TrainConfig, splits: Splits) -> dict[str, Any]:
    left_out = {*MAY_DIFFER, "decoy_key"}
    settings = {k: v for k, v in config.to_dict().items() if k not in left_out}
    text = json.dumps(settings, sort_keys=True)
    return {
        "code": _digest_of_code(),
        "secret": hashlib.sha256(parse_key(secret)).hexdigest(),
        # Keyed, as settings could be guessed.
        "settings": _keyed(secret, "settings", text),
        "training set": _keyed(secret, "training set", _digest_of_data(splits.train)),
    }


def _digest_of_code() -> str:
    """Of all Python files of the package."""
    package, sha = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sha.update(f"{path.relative_to(package).as_posix()}\n{path.stat().st_size}\n".encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _digest_of_data(data: LabeledImages) -> str:
    if not isinstance(data, ImageSet):
        raise ValueError(f"splits: wanted a training set in memory, got {type(data).__name__}")
    sha = hashlib.sha256(repr((len(data), data.image_shape)).encode())
    for values in (data.images, data.labels):
        sha.update(values.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _keyed(secret: str, *words: str) -> str:
    text = json.dumps(["divqat", *words]).encode()
    return hmac.new(parse_key(secret), text, hashlib.sha256).hexdigest()


def _timestamp(folder: Path, authority: Path) -> datetime:
    """The time in ``commitment.tsr``, after its signature was checked."""
    for file in (folder / COMMITMENT, folder / REPLY, authority):
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} at {file.parent}")
    try:
        _openssl(
            *("ts", "-verify", "-data", folder / COMMITMENT, "-in", folder / REPLY),
            *("-CAfile", authority),
        )
    except RuntimeError as error:
        raise ClaimRefused(f"the timestamp is not valid: {error}") from None
    lines = _openssl("ts", "-reply", "-in", folder / REPLY, "-text").splitlines()
    (text,) = (line.partition(": ")[2] for line in lines if line.startswith("Time stamp: "))
    # Fractions of a second, which an authority may add, do not matter here.
    month, day, clock, year, zone = text.split()
    assert zone == "GMT"
    time = f"{month} {day} {clock.partition('.')[0]} {year}"
    return datetime.strptime(time, "%b %d %H:%M:%S %Y").replace(tzinfo=timezone.utc)


def _openssl(*arguments: str | Path) -> str:
    program = shutil.which("openssl")
    if program is None:
        raise FileNotFoundError("openssl: wanted the program on PATH, for timestamps; got none")
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise RuntimeError(f"openssl {arguments[0]} failed: {reason[-1] if reason else 'no text'}")
    return done.stdout
