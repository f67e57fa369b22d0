"""control.transport.tls on files: what is loaded, when it is loaded again, and what becomes of bad files."""

import asyncio
import contextlib
import shutil
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trustme

from control.settings.sections import ListenerTlsSettings, TrunkTlsSettings
from control.sip.address import Address
from control.transport.tls import TlsContexts, TlsError, keep_current

pytestmark = pytest.mark.integration

TRUNK = Address("192.0.2.1", 5061)


def certify(folder: Path, *, of: trustme.CA | None = None) -> ListenerTlsSettings:
    issued = (of or trustme.CA()).issue_cert("127.0.0.1")
    chain, key = folder / "tls.crt", folder / "tls.key"
    chain.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    return ListenerTlsSettings(certificate_path=chain, private_key_path=key)


def contexts(settings: ListenerTlsSettings, *, trunk: TrunkTlsSettings | None = None) -> TlsContexts:
    return TlsContexts("tls", settings, {TRUNK: trunk} if trunk else {})


@contextlib.asynccontextmanager
async def watched(
    these: Sequence[TlsContexts], hangup: asyncio.Event, told: list[str], *, interval_s: float
) -> AsyncIterator[None]:
    work = keep_current(these, hangup, failed=lambda: told.append("failed"), interval_s=interval_s)
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until_other(subject: TlsContexts, before: ssl.SSLContext) -> None:
    async with asyncio.timeout(5):
        while subject.server is before:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("missing", ["certificate_path", "private_key_path", "client_ca_path"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, missing: str) -> None:
    settings = certify(tmp_path).model_copy(update={missing: tmp_path / "nowhere.pem"})
    with pytest.raises(TlsError, match=r"nowhere\.pem.*No such file"):
        contexts(settings)


def test_a_trunk_s_ca_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"nowhere\.pem"):
        contexts(certify(tmp_path), trunk=TrunkTlsSettings(ca_path=tmp_path / "nowhere.pem"))


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    settings, other = certify(tmp_path), certify(tmp_path / "other")
    with pytest.raises(TlsError, match="listener 'tls'"):
        contexts(settings.model_copy(update={"private_key_path": other.private_key_path}))


def test_what_is_spoken_is_tls_1_2_at_least_and_trunks_are_always_checked(tmp_path: Path) -> None:
    subject = contexts(certify(tmp_path))
    peer = subject.towards(TRUNK)
    assert peer.name == "192.0.2.1"
    assert peer.context.check_hostname
    assert peer.context.verify_mode is ssl.CERT_REQUIRED
    assert {subject.server.minimum_version, peer.context.minimum_version} == {ssl.TLSVersion.TLSv1_2}


def test_a_strange_address_is_held_to_itself_and_not_to_what_a_trunk_shows(tmp_path: Path) -> None:
    subject = contexts(certify(tmp_path), trunk=TrunkTlsSettings(server_name="sip.carrier.example"))
    assert subject.towards(TRUNK).name == "sip.carrier.example"
    assert subject.towards(Address(TRUNK.host, 5099)).name == "sip.carrier.example"
    assert subject.towards(Address("192.0.2.9", 5061)).name == "192.0.2.9"


async def test_files_that_changed_are_loaded_by_and_by(tmp_path: Path) -> None:
    subject = contexts(certify(tmp_path))
    before = subject.server
    told: list[str] = []
    async with watched([subject], asyncio.Event(), told, interval_s=0.02):
        await asyncio.sleep(0.1)
        assert subject.server is before
        certify(tmp_path)
        await until_other(subject, before)


async def test_files_are_loaded_on_hangup_without_waiting(tmp_path: Path) -> None:
    subject = contexts(certify(tmp_path))
    before, hangup = subject.server, asyncio.Event()
    async with watched([subject], hangup, [], interval_s=3600):
        hangup.set()
        await until_other(subject, before)
        assert not hangup.is_set()


async def test_files_that_cannot_be_used_leave_the_old_ones_in_use_and_are_told_of_once(tmp_path: Path) -> None:
    settings = certify(tmp_path)
    subject = contexts(settings)
    before = subject.server
    told: list[str] = []
    async with watched([subject], asyncio.Event(), told, interval_s=0.02):
        shutil.copy(settings.certificate_path, tmp_path / "kept")
        settings.certificate_path.write_text("rubbish")
        async with asyncio.timeout(5):
            while not told:
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert told == ["failed"]
        assert subject.server is before
        shutil.copy(tmp_path / "kept", settings.certificate_path)
        await until_other(subject, before)
