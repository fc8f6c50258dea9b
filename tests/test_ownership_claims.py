"""Claims of ownership: an honest one is accepted, and those made up afterwards are refused."""

import shutil
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from test_ownership import KEY, OTHER, run_with

from divqat.ownership import ClaimRefused, commit, derive_key, verify_claim

SECRET, BEACON, CLAIM = "17" * 32, "beacon of the day after", "model 1"
OPENSSL = shutil.which("openssl")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(OPENSSL is None, reason="needs openssl"),
]
EXTENSIONS = """
[req]
distinguished_name = name
[name]
[tsa]
extendedKeyUsage = critical,timeStamping
[tsa_config]
default_policy = 1.2.3.4
digests = sha256
signer_digest = sha256
serial = serial
ess_cert_id_alg = sha256
"""


def openssl(folder, *words):
    subprocess.run([OPENSSL, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A folder with the key and the certificate of a timestamp authority."""
    folder = tmp_path_factory.mktemp("authority")
    (folder / "tsa.cnf").write_text(EXTENSIONS)
    (folder / "serial").write_text("01\n")
    certify(folder, "tsa.pem", "key.pem")
    return folder


def certify(folder, certificate, key):
    openssl(
        folder,
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "30"),
        *("-config", "tsa.cnf", "-extensions", "tsa", "-keyout", key, "-out", certificate),
    )


def stamp(authority, folder):
    openssl(
        authority,
        *("ts", "-reply", "-config", "tsa.cnf", "-section", "tsa_config"),
        *("-signer", "tsa.pem", "-inkey", "key.pem"),
        *("-queryfile", folder / "commitment.tsq", "-out", folder / "commitment.tsr"),
    )


@pytest.fixture(scope="module")
def splits():
    return run_with(None).splits()


@pytest.fixture(scope="module")
def committed(authority, splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("committed")
    commit(SECRET, run_with(None).config, splits, folder)
    stamp(authority, folder)
    return folder


def judge(run, splits, folder, authority, **changes):
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    facts = dict(secret=SECRET, beacon=BEACON, published=tomorrow, claim=CLAIM)
    certificate = authority / "tsa.pem"
    return verify_claim(run, splits, folder, authority=certificate, **{**facts, **changes})


def honest():
    return run_with(derive_key(SECRET, BEACON, CLAIM))


def test_an_honest_claim_is_accepted(splits, committed, authority):
    time = judge(honest(), splits, committed, authority)
    assert abs(time - datetime.now(timezone.utc)) < timedelta(days=1)
    text = (committed / "commitment.json").read_text()
    assert SECRET not in text and "digits" not in text


def test_each_claim_has_its_own_key():
    keys = {derive_key(SECRET, b, c) for b in ("a", "b") for c in ("1", "2", "")}
    keys |= {derive_key(OTHER, "a", "1"), derive_key(SECRET, "a1", "")}
    assert len(keys) == 8 and all(len(key) == 64 for key in keys)


def test_a_key_that_was_ground_is_refused(splits, committed, authority):
    """Among many keys one accuses an innocent model; it does not follow from the beacon."""
    with pytest.raises(ClaimRefused, match="key of the run does not follow"):
        judge(run_with(KEY), splits, committed, authority)
    with pytest.raises(ClaimRefused, match="key of the run does not follow"):
        judge(run_with(None), splits, committed, authority)
    with pytest.raises(ClaimRefused, match="secret is not the one"):  # nor can the secret be ground
        key = derive_key(OTHER, BEACON, CLAIM)
        judge(run_with(key), splits, committed, authority, secret=OTHER)
    with pytest.raises(ClaimRefused, match="key of the run does not follow"):  # nor the claim
        judge(honest(), splits, committed, authority, claim="model 2")


def test_a_decoy_that_was_fitted_to_an_innocent_model_is_refused(splits, committed, authority):
    """What the decoy depends on besides the key is committed to; the decoy itself is recomputed."""
    key = derive_key(SECRET, BEACON, CLAIM)
    with pytest.raises(ClaimRefused, match="settings is not the one"):
        judge(run_with(key, seed=1), splits, committed, authority)
    for name in ("images", "labels"):  # both have an influence on the basis
        values = getattr(splits.train, name).clone()
        values.view(-1)[0] ^= 1
        changed = replace(splits, train=replace(splits.train, **{name: values}))
        with pytest.raises(ClaimRefused, match="training set is not the one"):
            judge(honest(), changed, committed, authority)


def test_a_late_commitment_is_refused(splits, committed, authority):
    yesterday = datetime.now(timezone.utc) - timedelta(days=1)
    with pytest.raises(ClaimRefused, match="not before the beacon"):
        judge(honest(), splits, committed, authority, published=yesterday)
    with pytest.raises(ValueError, match="published: wanted a time with a time zone"):
        judge(honest(), splits, committed, authority, published=datetime(2030, 1, 1))


def test_a_timestamp_of_another_file_or_authority_is_refused(
    splits, committed, authority, tmp_path
):
    commit(OTHER, run_with(None).config, splits, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no commitment.tsr"):
        judge(honest(), splits, tmp_path, authority)
    shutil.copy(committed / "commitment.tsr", tmp_path)
    with pytest.raises(ClaimRefused, match="timestamp is not valid"):
        judge(honest(), splits, tmp_path, authority, secret=OTHER)
    shutil.copy(authority / "tsa.cnf", tmp_path)
    certify(tmp_path, "tsa.pem", "key.pem")  # of the same name, with another key
    with pytest.raises(ClaimRefused, match="timestamp is not valid"):
        judge(honest(), splits, committed, tmp_path)
