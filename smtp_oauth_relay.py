#!/usr/bin/env python3
r"""Accept mail over SMTP, and send it through Microsoft 365.

Printers, scanners, NAS boxes and old applications that can only say SMTP with a user
name and a password log in here. The relay trades these for an OAuth 2.0 token (client
credentials) and hands each message to Microsoft Graph. A device is told "250" when
Microsoft has accepted the message, or when it is safe in SPOOL_DIRECTORY, if that is set.

    python3 smtp_oauth_relay.py demo      try it, without any account
    python3 smtp_oauth_relay.py           serve, configured by environment variables
    python3 smtp_oauth_relay.py explain   see what would become of a message
    python3 smtp_oauth_relay.py spool     see what waits
    python3 smtp_oauth_relay.py --help    the variables

What it touches: it listens on SMTP_PORT (and SMTPS_PORT), reads the two TLS files, and
connects to AZURE_AUTHORITY_HOST and GRAPH_ENDPOINT, and with large messages to the host
that Graph names for the upload, all through HTTPS_PROXY if that is set. Only where they
are set: ACCOUNTS_FILE and the files of secrets that it names, AZURE_TABLES_URL,
AZURE_KEY_VAULT_URL, and the token file or the managed identity of the machine, which is
asked directly. It writes its log, to standard error, and messages that must wait to
SPOOL_DIRECTORY, if that is set; only the demo writes other files (outbox/), and a key from
Key Vault is for a moment in a file of mode 0600 where the system has no file in memory. It
may run `openssl` to read such a key.

    device --SMTP--> Connection --bytes--> Session       the protocol, without I/O
                         |  Authenticate, Deliver        its events
                       Relay --> Directory               who may log in, and as whom
                         |  \--> Tokens --HTTPS--> Entra ID
                         |  \--> Spool                   what must wait, on disk
                         |         |
                       Graph <-----+ --HTTPS--> Microsoft 365     in worker threads

Contents (search for the number; each section uses only those above it)

    §1   Replies and errors         Reply, RelayError and its kinds
    §2   Configuration              Config, of which every field is a setting
    §3   SMTP grammar               paths, parameters, base64
    §4   Accounts                   Account: who a client is, and what it may
    §5   SMTP session               Session: bytes in; events and bytes out
    §6   Messages                   who gets it is the envelope; From; all else stays
    §7   Large messages             a message as a draft with attachments
    §8   Microsoft's answers        which answer is which reply
    §9   Queued messages            Entry: what the spool knows; the notice of a failure
    §10  Log                        one line for an event        <- I/O starts here
    §11  HTTP                       HttpPool
    §12  Tokens                     Tokens: one request for all who need the same
    §13  Directory                  accounts in a file, in Azure Tables, in a user name
    §14  Graph                      Graph: sendMail, or a draft; 4 at once for a mailbox
    §15  Spool                      what Microsoft could not take yet, on disk
    §16  TLS                        the relay's own certificate
    §17  Server                     Connection, Server
    §18  Demo                       an outbox in place of Microsoft
    §19  Explain                    what would become of a message
    §20  Command line               main
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import codecs
import collections
import concurrent.futures
import configparser
import contextlib
import dataclasses
import datetime
import difflib
import email.errors
import email.header
import email.message
import email.utils
import enum
import errno
import functools
import getpass
import hashlib
import hmac
import html
import http.client
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import mimetypes
import os
import pathlib
import queue
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import typing
import urllib.parse
import urllib.request
import uuid
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, Union

try:
    import fcntl
    import pwd
    import resource
except ImportError:                     # Windows has none of them
    fcntl = pwd = resource = None       # type: ignore[assignment]

__version__ = "1.0.0"
USER_AGENT = f"smtp-oauth-relay/{__version__}"

K = TypeVar("K")
T = TypeVar("T")


# ---------------------------------------------------------------------------
# §1  Replies and errors
# ---------------------------------------------------------------------------
#
# Every error that a client hears of is a RelayError, raised where the fact is known and
# with the final text. It is turned into bytes in one place, Reply.__bytes__.

MAX_REPLY_TEXT = 480        # octets; a line has 512 at most, RFC 5321 section 4.5.3.1.5


@dataclass(frozen=True)
class Reply:
    """A reply to a client; lines of `text` are separated by LF.

    `status` is the enhanced status code (RFC 3463), or "" where RFC 2034 wants none.
    After one with `close` the connection ends.
    """

    code: int
    status: str
    text: str
    close: bool = False

    def __bytes__(self) -> bytes:
        lines = self.text.split("\n")
        last = len(lines) - 1
        return b"".join(b"%d%s%s\r\n" % (self.code, b" " if number == last else b"-",
                                         self._line(line))
                        for number, line in enumerate(lines))

    def __str__(self) -> str:
        return f"{self.code} {self.status} {self.text}".replace("  ", " ")

    def _line(self, text: str) -> bytes:
        if self.status:
            text = f"{self.status} {text}"
        return harmless(text).encode("ascii")[:MAX_REPLY_TEXT]


def harmless(text: str) -> str:
    """Make a text printable ASCII: what a client or Microsoft said may be in it."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


class RelayError(Exception):
    """Something a client must be told; `.reply` says it.

    `.facts` and `.level` are for the log. Level INFO is a mistake of the client's.

        RelayError
        +-- ProtocolError     the client broke RFC 5321                      501 5.5.4
        +-- AuthError         the credentials are wrong                      535 5.7.8
        +-- TemporaryError    ours or Microsoft's fault; try again later     451 4.3.0
        +-- DeliveryError     this message will never be accepted            554 5.6.0
    """

    code = 451
    status = "4.3.0"
    level = logging.INFO

    def __init__(self, text: str, code: int = 0, status: str = "", *,
                 close: bool = False, facts: Mapping[str, object] | None = None,
                 level: int = 0) -> None:
        super().__init__(text)
        self.reply = Reply(code or self.code, status or self.status, text, close)
        self.facts = dict(facts or {})
        self.level = level or self.level


class ProtocolError(RelayError):
    """The client broke RFC 5321 or an extension of it."""

    code = 501
    status = "5.5.4"


class AuthError(RelayError):
    """The credentials are wrong; the device must be given others."""

    code = 535
    status = "5.7.8"


class TemporaryError(RelayError):
    """The same thing may succeed later."""

    level = logging.WARNING


class DeliveryError(RelayError):
    """This message will never be accepted as it is."""

    code = 554
    status = "5.6.0"


class ConfigError(Exception):
    """Settings that cannot be used: exit status 2."""


class StartError(Exception):
    """The relay cannot start, although its settings make sense: exit status 1."""


# ---------------------------------------------------------------------------
# §2  Configuration
# ---------------------------------------------------------------------------
#
# The fields of Config are the only list of settings. --help, the README's table and the
# checks are made from it. Defaults are text, so they are parsed like any other value.

GRAPH_REQUEST_LIMIT = 4_194_304     # octets
GRAPH_MESSAGE_LIMIT = 3_145_728     # octets: what base64 leaves of a request
EXCHANGE_LIMIT = 157_286_400        # octets: the most that a mailbox can be set to send
PROXY_VARIABLES = ("https_proxy", "HTTPS_PROXY")


class Cloud(NamedTuple):
    """Where a cloud of Microsoft's is; Microsoft, "National cloud deployments"."""

    authority: str
    graph: str
    vault: str              # what a token for Key Vault is asked for


CLOUDS = {
    "global": Cloud("https://login.microsoftonline.com", "https://graph.microsoft.com",
                    "https://vault.azure.net"),
    "usgov": Cloud("https://login.microsoftonline.us", "https://graph.microsoft.us",
                   "https://vault.usgovcloudapi.net"),
    "usgov-dod": Cloud("https://login.microsoftonline.us", "https://dod-graph.microsoft.us",
                       "https://vault.usgovcloudapi.net"),
    "china": Cloud("https://login.partner.microsoftonline.cn",
                   "https://microsoftgraph.chinacloudapi.cn", "https://vault.azure.cn"),
}


def _masked(url: str) -> str:
    """Hide what may be a password in a URL."""
    return re.sub(r"(?s)^(\w+://)?(?:.*[?#].*@.*|.*@)|[?#].*", r"\1***", url)


def _hidden(secret: str) -> str:
    return "***"


class Setting(NamedTuple):
    """How a setting is read (ValueError says what is accepted), explained and shown."""

    parse: Callable[[str], Any]
    default: str
    help: str
    show: Callable[[str], str] = str


def setting(parse: Callable[[str], Any], default: str, text: str,
            show: Callable[[str], str] = str) -> Any:
    """Declare a field that is a setting; a variable of Config has its name in capitals."""
    return field(default_factory=lambda: parse(default), repr=show is str,
                 metadata={"setting": Setting(parse, default, text, show)})


def declared(kind: type) -> dict[str, Setting]:
    """List the settings of a dataclass, in its order."""
    return {one.name: one.metadata["setting"] for one in dataclasses.fields(kind)
            if "setting" in one.metadata}


def _optional(parse: Callable[[str], Any], nothing: Any = "") -> Callable[[str], Any]:
    """Read nothing too."""
    return lambda text: parse(text) if text else nothing


def _list(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Read values with commas between them."""
    def parse_all(text: str) -> tuple[Any, ...]:
        found = tuple(parse(one) for one in re.split(r"[,\s]+", text) if one)
        if text and not found:
            raise ValueError("values, or empty")
        return tuple(dict.fromkeys(found))
    return parse_all


def _like(pattern: str, accepted: str) -> Callable[[str], str]:
    """Read what matches a pattern."""
    def parse(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(accepted)
    return parse


_text = _like("[ -~]*", "printable ASCII text")
_host_name = _like("[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?",
                   "a host name such as relay.example.com")
_vault_name = _like("[0-9A-Za-z-]{1,127}(/[0-9A-Za-z]{1,64})?",
                    "the name of a certificate: letters, digits and hyphens")


def _utf8(text: str) -> str:
    if text != text.encode(errors="ignore").decode():
        raise ValueError("text in UTF-8")
    return text


def _boolean(text: str) -> bool:
    return _choice("true", "false")(text) == "true"


def _choice(*accepted: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        for value in accepted:
            if text.lower() == value.lower():
                return value
        raise ValueError("one of " + " ".join(accepted))
    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,12}", text) and low <= int(text) <= high:
            return int(text)
        raise ValueError(f"a whole number from {low} to {high}")
    return parse


def _seconds(text: str) -> float:
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) and 0 < float(text) <= 86400:
        return float(text)
    raise ValueError("a number of seconds above 0, up to 86400")


def _address(text: str) -> str:
    if text.lower() != "localhost":
        try:
            ipaddress.ip_address(text)
        except ValueError:
            raise ValueError("an IP address of this machine, localhost, or nothing for "
                             "all addresses") from None
    return text


def _user(text: str) -> str:
    if pwd is None:
        raise ValueError("nothing: this system has no users to become")
    try:
        pwd.getpwnam(text)
    except KeyError:
        raise ValueError("the name of a user of this system, or nothing") from None
    return text


def _tls_version(text: str) -> str:
    version = _choice("1.0", "1.1", "1.2", "1.3")(text)
    if not getattr(ssl, "HAS_TLSv" + version.replace(".", "_").replace("_0", ""), True):
        raise ValueError("a version that the OpenSSL of this Python has")
    return version


def _ciphers(text: str) -> str:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(text)
    except (ssl.SSLError, UnicodeError):
        raise ValueError("an OpenSSL cipher list that names a known cipher") from None
    return text


def _endpoint(text: str) -> str:
    """Read the URL of a Microsoft service; secrets go there, so it must be https."""
    try:
        parts = urllib.parse.urlsplit(text if "://" in text else f"https://{text}")
        port_is_good = parts.port != 0
    except ValueError:
        parts, port_is_good = urllib.parse.urlsplit(""), False
    if not (port_is_good and re.fullmatch(r"[A-Za-z0-9.:-]+", parts.hostname or "")
            and re.fullmatch(r"[A-Za-z0-9._~/-]*", parts.path)
            and not (parts.query or parts.fragment or "@" in parts.netloc)
            and (parts.scheme == "https"
                 or (parts.scheme == "http" and is_loopback(parts.hostname or "")))):
        raise ValueError("an https:// URL (http:// for this machine only, as 127.0.0.1)")
    return parts.geturl().rstrip("/")


def _table_url(text: str) -> str:
    """Read the URL of an Azure table; behind a "?" may stand a SAS, which is a secret."""
    url, mark, sas = text.partition("?")
    with contextlib.suppress(ValueError):
        url = _endpoint(url)
        if (re.fullmatch(r"[^/]+//[^/]+(/[^/]+)?/[A-Za-z][A-Za-z0-9]{2,62}", url)
                and re.fullmatch(r"[!\"$-~]*", sas)):
            return url + mark + sas
    raise ValueError("https://ACCOUNT.table.core.windows.net/TABLE, with a SAS behind it "
                     "or none")


def near_url(text: str) -> str:
    """Read the URL of a managed identity; it is plain http, so it must be near.

    Raises ValueError.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        host = parts.hostname or ""
        if (parts.scheme == "http" and parts.port != 0 and "@" not in parts.netloc
                and re.fullmatch("[!\"$-~]+", text)
                and (is_loopback(host) or ipaddress.ip_address(host).is_private)):
            return text.rstrip("/") if parts.path == "/" else text
    except ValueError:
        pass
    raise ValueError("an http:// URL of this machine, or of an address in its own network")


def is_loopback(host: str) -> bool:
    """Say whether a host in a URL is this machine, without looking it up."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)
_SHORT_UUID = re.compile("([A-Za-z0-9_-]{22})(?:==)?")
_DOMAIN_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]*",
                          re.I | re.A)


def decode_uuid(text: str) -> str | None:
    """Bring a UUID, or its base64url form, into lower case; None if it is neither."""
    if _UUID.fullmatch(text):
        return text.lower()
    short = _SHORT_UUID.fullmatch(text)
    if short is None:
        return None
    return str(uuid.UUID(bytes=base64.urlsafe_b64decode(short[1] + "==")))


def encode_uuid(text: str) -> str:
    """Shorten a UUID to the 22 characters of its base64url form."""
    return base64.urlsafe_b64encode(uuid.UUID(text).bytes).decode().rstrip("=")


def read_tenant(text: str) -> str:
    """Read a tenant: a UUID in either form, or a domain. Raises ValueError."""
    tenant = decode_uuid(text) or (text.lower() if _DOMAIN_NAME.fullmatch(text) else None)
    if tenant is None:
        raise ValueError("the ID of a tenant, or one of its domains")
    return tenant


def read_client(text: str) -> str:
    """Read a client: a UUID in either form. Raises ValueError."""
    client = decode_uuid(text)
    if client is None:
        raise ValueError("the ID of an application (client)")
    return client


_count = _whole(1, 1_000_000)


@dataclass(frozen=True)
class Config:
    """The settings. Times are in seconds, sizes in octets."""

    # Server
    listen_address: str = setting(
        _optional(_address), "", "Address to listen on. Empty: all, IPv4 and IPv6.")
    smtp_port: int = setting(
        _whole(0, 65535), "8025", "Port for SMTP with STARTTLS. 0 picks a free one.")
    smtps_port: int = setting(
        _whole(0, 65535), "0", "Port for SMTP with TLS from the first octet. 0: none.")
    server_name: str = setting(
        _optional(_host_name), "", "Name in the greeting. Empty: this machine's host name.")
    server_greeting: str = setting(
        _text, "Microsoft Graph SMTP OAuth Relay", "Text in the greeting.")
    run_as: str = setting(
        _optional(_user), "", "User to become once ports are open and the TLS key is read. "
        "Empty: stay.")
    log_level: str = setting(
        _choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), "INFO",
        "Least level that is logged; DEBUG shows the SMTP dialogue without secrets.")

    # TLS with devices
    tls_source: str = setting(
        _choice("file", "keyvault", "off"), "file", "Where the relay's certificate is: "
        "file, keyvault (Azure), or off for no TLS.")
    tls_cert_filepath: str = setting(
        str, "certs/cert.pem", "PEM file of the certificate and its intermediates.")
    tls_key_filepath: str = setting(
        str, "certs/key.pem", "PEM file of the certificate's private key.")
    tls_min_version: str = setting(
        _tls_version, "1.2", "Oldest TLS version accepted; old printers need 1.0.")
    tls_cipher_suite: str = setting(
        _optional(_ciphers), "", "OpenSSL cipher list. Empty: OpenSSL's own.")
    require_tls: bool = setting(
        _boolean, "true", "Whether devices may log in under TLS only.")

    # Signing in and sending
    username_delimiter: str = setting(
        _choice("@", ":", "|"), "@",
        "What stands between tenant and client in a user name.")
    accounts_file: str = setting(
        str, "", "INI file of accounts: short names, networks without login, and more.")
    accounts_required: bool = setting(
        _boolean, "false", "Whether TENANT@CLIENT cannot log in, unless it is in the Azure "
        "table.")
    allowed_tenants: tuple[str, ...] = setting(
        _list(read_tenant), "", "Tenants that may log in as TENANT@CLIENT, with commas "
        "between. Empty: all.")
    azure_cloud: str = setting(
        _choice(*CLOUDS), "global", "Microsoft's cloud: global, usgov, usgov-dod or china. "
        "It sets the next two.")
    azure_authority_host: str = setting(
        _endpoint, CLOUDS["global"].authority, "Where tokens come from.", _masked)
    graph_endpoint: str = setting(
        _endpoint, CLOUDS["global"].graph, "Microsoft Graph; the token's scope too.",
        _masked)

    # Azure
    azure_tables_url: str = setting(
        _optional(_table_url), "", "Azure table of accounts, with a SAS or without.",
        _masked)
    azure_tables_partition_key: str = setting(
        _utf8, "user", "PartitionKey of its accounts.")
    azure_tables_force_usage: bool = setting(
        _boolean, "false", "Whether TENANT@CLIENT may log in only if it is in the table.")
    azure_key_vault_url: str = setting(
        _optional(_endpoint), "", "Key Vault of the certificate.", _masked)
    azure_key_vault_cert_name: str = setting(
        _optional(_vault_name), "", "Name of the certificate there.")
    azure_tenant_id: str = setting(
        _optional(read_tenant), "", "Tenant of the relay itself, for Tables and Key Vault.")
    azure_client_id: str = setting(
        _optional(read_client), "", "Application, or user-assigned identity, of the relay.")
    azure_client_secret: str = setting(
        _utf8, "", "Secret of that application.", _hidden)
    azure_federated_token_file: str = setting(
        str, "", "Token of a workload identity. Kubernetes sets it.")
    identity_endpoint: str = setting(
        str, "", "Managed identity. App Service, Container Apps and "
        "Arc set it.", _masked)
    identity_header: str = setting(
        _text, "", "Secret of that endpoint, where it has one. Azure sets it.", _hidden)
    imds_endpoint: str = setting(
        str, "", "Says that the machine is one of Arc, which sets it.")
    azure_pod_identity_authority_host: str = setting(
        near_url, "http://169.254.169.254", "Managed identity of virtual machines.",
        _masked)

    # Messages
    sender_from: str = setting(
        _choice("envelope", "header"), "envelope",
        "Which mailbox sends: envelope, that of MAIL FROM, or header, the first of From.")
    from_mismatch: str = setting(
        _choice("keep", "rewrite", "refuse"), "keep",
        "When From names another mailbox than the one that sends: keep it (Microsoft "
        "decides), rewrite its address, or refuse the message.")
    header_recipients: str = setting(
        _choice("strip", "keep", "refuse"), "strip",
        "When To, Cc or Bcc name somebody who is no recipient: strip the name, keep it "
        "(Microsoft then sends the message there too), or refuse the message.")
    large_messages: str = setting(
        _choice("upload", "refuse"), "upload",
        f"What to do with messages above {GRAPH_MESSAGE_LIMIT} octets: upload their "
        "attachments (this needs the right Mail.ReadWrite), or refuse them.")

    # Spool
    spool_directory: str = setting(
        str, "", "Folder for messages that Microsoft cannot take now; the relay sends them "
        "later. Empty: none, the device is told to try again.")
    spool_lifetime: int = setting(
        _whole(1, 10 ** 8), "172800", "How long it tries, before it gives a message up.")
    spool_max_bytes: int = setting(
        _whole(1000, 10 ** 12 - 1), "1073741824",
        "Most octets of that folder, with those of messages that were given up.")
    duplicate_window: int = setting(
        _whole(0, 86400), "900", "How long an accepted message with Message-ID and Date is "
        "remembered, so that it is not sent again if the device repeats it. 0: not.")

    # Limits
    max_message_size: int = setting(
        _whole(1000, EXCHANGE_LIMIT), "36700160",
        "Largest message; a mailbox sends 35 MB unless it was set to more in Exchange.")
    max_memory_for_messages: int = setting(
        _whole(1000, 10 ** 12 - 1), "268435456",
        "Most octets of all messages in flight together.")
    max_recipients: int = setting(
        _count, "500", "Most recipients of one message.")
    max_connections: int = setting(
        _count, "1000", "Most connections at once.")
    max_connections_per_client: int = setting(
        _count, "100", "Most connections at once from one address, or one /64 of IPv6.")
    client_timeout: float = setting(
        _seconds, "300", "How long a device may take for one command, or for each "
        "64 KiB of a message.")
    upstream_timeout: float = setting(
        _seconds, "60", "How long Microsoft may take for one login or one message, "
        "with all that is tried again.")
    shutdown_timeout: float = setting(
        _seconds, "25", "How long messages in flight may take when the relay is stopped.")

    @property
    def size_limit(self) -> int:
        """The largest message that can be sent, in octets."""
        if self.large_messages == "refuse":
            return min(self.max_message_size, GRAPH_MESSAGE_LIMIT)
        return self.max_message_size

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The URLs that may be asked, but for those of managed identities."""
        return tuple(filter(None, (self.azure_authority_host, self.graph_endpoint,
                                   self.azure_tables_url, self.azure_key_vault_url)))

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Config:
        """Read the settings; raises ConfigError with all faults, a line each."""
        values, faults = {}, []
        cloud = CLOUDS.get(environ.get("AZURE_CLOUD", "").strip().lower(), CLOUDS["global"])
        defaults = {"AZURE_AUTHORITY_HOST": cloud.authority, "GRAPH_ENDPOINT": cloud.graph}
        for name, one in settings().items():
            text = environ.get(name, "").strip()
            try:
                values[name.lower()] = one.parse(text or defaults.get(name, one.default))
            except ValueError as error:
                faults.append(f"{name}={one.show(text)!r}: must be {error}")
        config = cls(**values)      # with defaults for what is faulty
        faults += untainted(config.contradictions(),
                            {name for name in settings() if name.lower() not in values})
        faults += config.check_proxy(environ)
        if faults:
            raise ConfigError("\n".join(faults))
        return config

    def contradictions(self) -> Iterator[str]:
        """Find settings that contradict each other, and name them all."""
        if self.tls_source == "off" and self.require_tls:
            yield ("TLS_SOURCE=off with REQUIRE_TLS=true: nobody could log in; set "
                   "TLS_SOURCE=file and give a certificate, or set REQUIRE_TLS=false "
                   "(passwords then cross the network readable)")
        if self.tls_source == "off" and self.smtps_port:
            yield (f"TLS_SOURCE=off with SMTPS_PORT={self.smtps_port}: that port needs "
                   "TLS; set TLS_SOURCE=file and give a certificate, or set SMTPS_PORT=0")
        if self.tls_source == "keyvault" and not (self.azure_key_vault_url
                                                  and self.azure_key_vault_cert_name):
            yield ("TLS_SOURCE=keyvault: set AZURE_KEY_VAULT_URL and "
                   "AZURE_KEY_VAULT_CERT_NAME too")
        if self.azure_tables_force_usage and not self.azure_tables_url:
            yield "AZURE_TABLES_FORCE_USAGE=true: set AZURE_TABLES_URL too"
        if self.accounts_required and not (self.accounts_file or self.azure_tables_url):
            yield ("ACCOUNTS_REQUIRED=true: nobody could log in; set ACCOUNTS_FILE or "
                   "AZURE_TABLES_URL too")
        if self.smtp_port and self.smtp_port == self.smtps_port:
            yield (f"SMTP_PORT={self.smtp_port} and SMTPS_PORT={self.smtps_port}: must be "
                   "different ports")
        if self.max_memory_for_messages < self.size_limit:
            yield (f"MAX_MEMORY_FOR_MESSAGES={self.max_memory_for_messages}: must hold one "
                   f"message, {self.size_limit} octets; raise it, or lower "
                   "MAX_MESSAGE_SIZE, or set LARGE_MESSAGES=refuse")

    def check_proxy(self, environ: Mapping[str, str]) -> list[str]:
        """Find proxies that are needed and cannot be used."""
        if not any(url.startswith("https:") for url in self.endpoints):
            return []
        values = {name: environ.get(name, "").strip() for name in PROXY_VARIABLES}
        return [f"{name}={_masked(value)!r}: must be http://host:port, or "
                "http://user:password@host:port"
                for name, value in values.items() if not _is_http_proxy(value)]


def _is_http_proxy(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        return not url or (parts.scheme == "http" and bool(parts.hostname)
                           and parts.port != 0)
    except ValueError:
        return False


def untainted(texts: Iterable[str], faulty: set[str]) -> list[str]:
    """Leave out contradictions that name a faulty setting: this was told already, and only
    its default was looked at. So a contradiction names every setting that it looks at.
    """
    return [text for text in texts if faulty.isdisjoint(re.findall(r"\w+", text))]


def settings() -> dict[str, Setting]:
    """List the settings by variable, in the order of Config."""
    return {name.upper(): one for name, one in declared(Config).items()}


def settings_help() -> str:
    """Show the settings for --help."""
    lines = []
    for name, one in settings().items():
        lines += [f"  {name} (default: {one.default or 'empty'})", f"      {one.help}"]
    return "\n".join(lines)


def table_of(what: str, rows: Mapping[str, Setting]) -> str:
    """Show settings as a table of the README's."""
    lines = [f"| `{name}` | {f'`{one.default}`' if one.default else ''} | {one.help} |"
             for name, one in rows.items()]
    return "\n".join([f"| {what} | Default | Meaning |", "| --- | --- | --- |", *lines])


# ---------------------------------------------------------------------------
# §3  SMTP grammar
# ---------------------------------------------------------------------------
#
# RFC 5321 section 4.1.2, with the UTF-8 of RFC 6531 section 3.3. Departures, as devices
# make these mistakes and every server forgives them: white space may follow "FROM:" and
# "TO:", a path may lack its angle brackets, and the argument of EHLO may be anything.

# Classes of what is not allowed, as to compile ranges of all UTF-8 takes the time of a
# start; among it C1 controls, line separators, bidirectional overrides, surrogates.
_NO_UTF8 = "\x7f-\xa0\u2028-\u202e\ud800-\udfff"
_ATOM = rf'[^\x00- "(),.:;<>@\[\\\]{_NO_UTF8}]+'
_DOT_STRING = rf"{_ATOM}(?:\.{_ATOM})*"
_QUOTED_STRING = rf'"(?:[^\x00-\x1f"\\{_NO_UTF8}]|\\[ -~])*"'
_LET_DIG = rf"[^\x00-/:-@\[-`{{-~{_NO_UTF8}]"
_LDH = rf"[^\x00-,./:-@\[-`{{-~{_NO_UTF8}]"
_SUB_DOMAIN = rf"{_LET_DIG}(?:{_LDH}*{_LET_DIG})?"
_DOMAIN = rf"{_SUB_DOMAIN}(?:\.{_SUB_DOMAIN})*"
_LITERAL = r"\[[!-Z^-~]+\]"
_MAILBOX = rf"(?:{_DOT_STRING}|{_QUOTED_STRING})@(?:{_DOMAIN}|{_LITERAL})"
_ROUTE = rf"@{_DOMAIN}(?:,@{_DOMAIN})*:"

_PATH = re.compile(rf" *(?:<(?:{_ROUTE})?(?P<mailbox>{_MAILBOX})>|(?P<null><>)"
                   rf"|(?P<bare>{_MAILBOX}))(?: +(?P<parameters>.*))?")
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-<>-~]+))?")
_BASE64 = re.compile("(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_SIZE = re.compile("[0-9]{1,20}")                       # RFC 1870 section 3


def parse_path(argument: str, keyword: str) -> tuple[str, dict[str, str | None]]:
    """Read "FROM:<path> parameters" as a mailbox, "" for the null one, and parameters.

    The source route is dropped, RFC 5321 section 4.1.1.3. Raises ProtocolError.
    """
    status = "5.1.7" if keyword == "FROM:" else "5.1.3"
    if argument[:len(keyword)].upper() != keyword:
        raise ProtocolError(f"Syntax: {keyword}<address>", 501, "5.5.4")
    match = _PATH.fullmatch(argument, len(keyword))
    if match is None:
        raise ProtocolError(f"Syntax: {keyword}<address>, and the address must be "
                            "complete as in user@example.com", 501, status)
    mailbox = match["mailbox"] or match["bare"] or ""
    if mailbox.endswith("]"):
        _check_literal(mailbox.rpartition("@[")[2][:-1], status)
    return mailbox, _parse_parameters(match["parameters"] or "")


def _check_literal(literal: str, status: str) -> None:
    """Check an address literal, RFC 5321 section 4.1.3."""
    try:
        if literal[:5].upper() == "IPV6:" and "%" not in literal:
            ipaddress.IPv6Address(literal[5:])
        else:
            ipaddress.IPv4Address(literal)
    except ValueError:
        raise ProtocolError("The address literal is not an IP address", 501,
                            status) from None


def comparable(mailbox: str) -> str:
    """Bring a mailbox into the form in which two that are the same are equal.

    Case does not matter; nor do quotes that a local part does not need, RFC 5321
    section 4.1.2.
    """
    local_part, _, domain = mailbox.rpartition("@")
    if local_part.startswith('"'):
        local_part = re.sub(r"\\(.)", r"\1", local_part[1:-1], flags=re.S)
    # Of octets, so of ASCII only: beyond it, lower() makes different letters the same.
    octets = f"{local_part}@{domain}".encode("utf-8", "surrogateescape")
    return octets.lower().decode("utf-8", "surrogateescape")


def _parse_parameters(text: str) -> dict[str, str | None]:
    """Read the parameters of MAIL or RCPT, RFC 5321 section 4.1.2."""
    parameters: dict[str, str | None] = {}
    for word in text.split(" "):
        if not word:
            continue
        match = _PARAMETER.fullmatch(word)
        if match is None:
            raise ProtocolError("A parameter is malformed")
        name = match[1].upper()
        if name in parameters:
            raise ProtocolError("A parameter is given twice")
        parameters[name] = match[2]
    return parameters


def decode_base64(text: str) -> bytes:
    """Decode base64 as RFC 4954 section 4 wants it, strictly. Raises ProtocolError."""
    if not _BASE64.fullmatch(text):
        raise ProtocolError("This is not base64", 501, "5.5.2")
    return base64.b64decode(text)


# ---------------------------------------------------------------------------
# §4  Accounts
# ---------------------------------------------------------------------------
#
# Who a client is. It logs in as
#
#     TENANT@CLIENT      an application; the password is its secret
#     NAME               an account of ACCOUNTS_FILE
#     NAME@lookup        the same, or else an entry of the Azure table
#
# or it comes from a network of an account with "login = optional". Of the networks that
# hold its address the most specific one decides that; and require_tls, tls_min_version
# the most specific one for which they are set.

WIDEST_NETWORK = {4: 8, 6: 7}       # of an open account: 10.0.0.0/8, fc00::/7
SECRET_KEYS = {"client_secret", "client_secret_file", "credential"}
LIST_KEYS = {"allowed_recipients", "allowed_senders", "networks"}
NETWORK_KEYS = ("require_tls", "tls_min_version")       # what settings `networks` replace
_FAULTY = object()                  # in place of a value
_HASHED = re.compile(r"scrypt\$[A-Za-z0-9_-]{22}\$[A-Za-z0-9_-]{43}")

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
IpAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


@dataclass(frozen=True)
class Application:
    """An application or identity of Entra ID, and how it proves who it is."""

    tenant: str
    client: str
    secret: str = field(default="", repr=False)
    credential: str = "secret"      # or managed-identity, workload-identity
    is_ours: bool = False           # no device knows the secret, and none can mend it


def own_application(config: Config) -> Application:
    """Find who the relay is to Azure; in the order of azure-identity's
    DefaultAzureCredential.
    """
    tenant, client = config.azure_tenant_id, config.azure_client_id
    if tenant and client and config.azure_client_secret:
        return Application(tenant, client, config.azure_client_secret, is_ours=True)
    if tenant and client and config.azure_federated_token_file:
        return Application(tenant, client, "", "workload-identity", is_ours=True)
    return Application("", client, "", "managed-identity", is_ours=True)


def _hash(text: str) -> str:
    if not _HASHED.fullmatch(text):
        raise ValueError("what this prints: python3 smtp_oauth_relay.py hash-password "
                         "(a plain password is not accepted)")
    if not has_scrypt():
        raise ValueError("empty, as this Python has no scrypt")
    return text


_mailbox = _like(_MAILBOX, "an address such as scanner@example.com")


def _whom(text: str) -> str:
    """Read a domain, or an address, in comparable form."""
    if re.fullmatch(_MAILBOX, text) and "*" not in text:
        return comparable(text)
    if not re.fullmatch(_DOMAIN, text):
        raise ValueError("domains and addresses, with commas between")
    return comparable(f"@{text}")[1:]


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
        if getattr(network.network_address, "ipv4_mapped", None):
            raise ValueError("write it as IPv4")
        return network
    except ValueError as error:
        raise ValueError(f"networks such as 192.168.7.0/24: {error}") from None


@dataclass(frozen=True)
class Account:
    """What a client may do, and as which application. The fields that are settings are
    the keys of ACCOUNTS_FILE.
    """

    name: str = ""                  # "" for TENANT@CLIENT
    tenant_id: str = setting(
        _optional(read_tenant), "", "Tenant of the application: its ID, or a domain.")
    client_id: str = setting(
        _optional(read_client), "", "The application; or, with `managed-identity`, the "
        "user-assigned identity, and empty for the system-assigned one.")
    client_secret: str = setting(
        str, "", "The application's secret.", _hidden)
    client_secret_file: str = setting(
        str, "", "The file that holds it.")
    credential: str = setting(
        _optional(_choice("managed-identity", "workload-identity")), "",
        "`managed-identity` or `workload-identity` instead of a secret.")
    password: str = setting(
        _optional(_hash), "", "What the device logs in with, as `hash-password` prints it. "
        "Without a secret here it stays empty: the device's password is the secret.",
        _hidden)
    from_email: str = setting(
        _optional(_mailbox), "", "The mailbox that sends, whatever the device says; the "
        "display name is kept.")
    allowed_recipients: tuple[str, ...] = setting(
        _list(_whom), "", "Domains and addresses that may get mail. Empty: all.")
    allowed_senders: tuple[str, ...] = setting(
        _list(_whom), "", "Domains and addresses that may send. Empty: all.")
    networks: tuple[Network, ...] = setting(
        _list(_network), "", "Where the device must be. Empty: anywhere.")
    login: str = setting(
        _choice("required", "optional"), "required",
        "`optional`: whoever comes from `networks` may send without login.")
    require_tls: bool | None = setting(
        _optional(_boolean, None), "", "`REQUIRE_TLS` for `networks`.")
    tls_min_version: str = setting(
        _optional(_tls_version), "", "`TLS_MIN_VERSION` for `networks`.")

    @property
    def has_credential(self) -> bool:
        """Whether the relay can prove who the application is; if not, the device does: its
        password is the secret.
        """
        return bool(self.client_secret or self.client_secret_file or self.credential)

    def as_application(self, password: str = "") -> Application:
        """Find the application of a client that gave this password."""
        secret = self.client_secret if self.has_credential else password
        return Application(self.tenant_id, self.client_id, secret,
                           self.credential or "secret", self.has_credential)

    @property
    def network_settings(self) -> dict[str, Any]:
        """The settings that it changes for its networks."""
        return {name: getattr(self, name) for name in NETWORK_KEYS
                if getattr(self, name) not in (None, "")}

    def holds(self, address: IpAddress | None) -> bool:
        """Say whether a client may be where it is."""
        return not self.networks or (
            address is not None and any(address in one for one in self.networks))

    def check_sender(self, mailbox: str) -> None:
        """Raise DeliveryError if a mailbox may not send."""
        if not _is_among(mailbox, self.allowed_senders):
            raise DeliveryError(f"This account may not send as {mailbox}, see its "
                                "allowed_senders", 550, "5.7.1")

    def check_recipient(self, mailbox: str) -> None:
        """Raise DeliveryError if a mailbox may get no mail."""
        if not _is_among(mailbox, self.allowed_recipients):
            raise DeliveryError(f"This account may not send to {mailbox}, see its "
                                "allowed_recipients", 550, "5.7.1")

    def adapt(self, config: Config) -> Config:
        """Change what is done to its messages."""
        changes: dict[str, Any] = {}
        if self.from_email:
            changes.update(sender_from="envelope", from_mismatch="rewrite")
        if self.allowed_recipients and config.header_recipients == "keep":
            changes.update(header_recipients="strip")   # or who is in To would get it
        return dataclasses.replace(config, **changes) if changes else config

    def contradictions(self, config: Config) -> Iterator[str]:
        """Find keys that contradict each other, and name them all."""
        if self.credential == "workload-identity" and not config.azure_federated_token_file:
            yield "credential: workload-identity needs AZURE_FEDERATED_TOKEN_FILE"
        for name in ("tenant_id", "client_id"):
            if not getattr(self, name) and self.credential != "managed-identity":
                yield f"{name}: must be set, unless credential = managed-identity"
        if sum(bool(getattr(self, name)) for name in SECRET_KEYS) > 1:
            yield "set one of client_secret, client_secret_file, credential"
        if self.password and not self.has_credential:
            yield ("password: needs client_secret, client_secret_file or credential; "
                   "without one the device's password is the application's secret")
        if self.login == "required" and self.has_credential and not self.password:
            yield "password: must be set, as anybody could log in; or login = optional"
        if self.login == "optional":
            if not self.has_credential:
                yield ("login: optional needs client_secret, client_secret_file or "
                       "credential")
            if not self.networks:
                yield "login: optional needs networks"
            for network in self.networks:
                if network.prefixlen < WIDEST_NETWORK[network.version]:
                    yield (f"networks: {network} without login is an open relay: the "
                           "whole Internet could send mail as you; name the network of the "
                           "devices")
        for name in () if self.networks else self.network_settings:
            yield f"{name}: needs networks, for which it is"
        if self.require_tls and config.tls_source == "off":
            yield "require_tls: true needs a certificate, see TLS_SOURCE"


def _is_among(mailbox: str, allowed: tuple[str, ...]) -> bool:
    key = comparable(mailbox)
    return not allowed or key in allowed or key.rpartition("@")[2] in allowed


class Login(NamedTuple):
    """A client that may send: without login, `username` is ""."""

    account: Account
    application: Application
    username: str = ""


class Accounts:
    """The accounts of a file, by user name and by network."""

    def __init__(self, accounts: Iterable[Account] = ()) -> None:
        self._by_name = {one.name.casefold(): one for one in accounts}
        self.by_network: dict[Network, list[Account]] = {}
        for account in self:
            for network in account.networks:
                self.by_network.setdefault(network, []).append(account)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._by_name.values())

    def find(self, name: str) -> Account | None:
        """Find an account by user name."""
        return self._by_name.get(name.casefold())

    def at(self, address: IpAddress | None, config: Config) -> tuple[Login | None, Config]:
        """Find who a client is without login, and the settings for where it is."""
        found = sorted((one for one in self.by_network if address and address in one),
                       key=lambda one: one.prefixlen)
        guest = next((one for one in self.by_network[found[-1]]
                      if one.login == "optional"), None) if found else None
        changes: dict[str, Any] = {}
        for network in found:           # the most specific one is last, and prevails
            for one in self.by_network[network]:
                changes.update(one.network_settings)
        return (Login(guest, guest.as_application()) if guest else None,
                dataclasses.replace(config, **changes) if changes else config)


def read_address(text: str) -> IpAddress | None:
    """Read a client's address, without its zone; IPv4 in IPv6 is IPv4."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_accounts(text: str, config: Config) -> tuple[list[Account], list[str]]:
    """Read an accounts file; returns its accounts, and all faults."""
    # DEFAULT is read as a section like others, so that a fault in it is told once.
    parser = configparser.ConfigParser(default_section="", delimiters=("=",),
                                       inline_comment_prefixes=(";", "#"),
                                       interpolation=None)
    parser.SECTCRE = re.compile(r"\[\s*(?P<header>[^\]]*[^\]\s])\s*\]\s*$")
    try:
        parser.read_string(text)
    except configparser.Error as error:
        return [], list(_syntax_faults(error))
    faults: list[str] = []
    sections = {name: _read_section(name, parser.items(name), faults)
                for name in parser.sections()}
    defaults = sections.pop("DEFAULT", {})
    faults += [f"[{name}]: must be [DEFAULT]" for name in sections
               if name.upper() == "DEFAULT"]
    accounts = [_make_account(name, defaults, values, config, faults)
                for name, values in sections.items()]
    if not sections:
        faults.append("there is no account in it")
    return accounts, faults + list(_conflicts(accounts))


def _syntax_faults(error: configparser.Error) -> Iterator[str]:
    """Say what is no INI; the error's own text shows the line, and it may be a secret."""
    option = getattr(error, "option", None)
    if option or isinstance(error, configparser.DuplicateSectionError):
        where = f"[{getattr(error, 'section', '')}] {option or ''}".strip()
        yield f"line {getattr(error, 'lineno', '?')}: {where} is there twice"
        return
    for number, _ in getattr(error, "errors", None) or [(getattr(error, "lineno", "?"), 0)]:
        yield f"line {number}: is no [section], key = value or comment that belongs there"


def _read_section(section: str, pairs: Iterable[tuple[str, str]],
                  faults: list[str]) -> dict[str, Any]:
    """Read the keys of a section; what is wrong is _FAULTY."""
    keys = declared(Account)
    values: dict[str, Any] = {}
    for key, text in pairs:
        one = keys.get(key)
        if one is None:
            near = difflib.get_close_matches(key[:100], keys, 1)
            shown = key if re.fullmatch("[a-z_]{1,40}", key) else "***"
            faults.append(f"[{section}] {shown}: is no key"
                          + (f"; is it {near[0]}?" if near else ""))
            continue
        values[key] = _FAULTY
        if "\n" in text and ("=" in text or key not in LIST_KEYS):
            faults.append(f"[{section}] {key}: goes on in a line that is indented; do not "
                          "indent keys")
            continue
        try:
            values[key] = one.parse(text or one.default)
        except ValueError as error:
            faults.append(f"[{section}] {key} = {one.show(text)}: must be {error}")
    return values


def _make_account(name: str, defaults: Mapping[str, Any], values: Mapping[str, Any],
                  config: Config, faults: list[str]) -> Account:
    """Join a section with the defaults; a secret there gives way to any in the section."""
    if SECRET_KEYS & values.keys():
        defaults = {key: defaults[key] for key in defaults.keys() - SECRET_KEYS}
    merged = {**defaults, **values}
    if merged.get("credential") == "workload-identity":
        merged["tenant_id"] = merged.get("tenant_id") or config.azure_tenant_id
        merged["client_id"] = merged.get("client_id") or config.azure_client_id
    good = {key: value for key, value in merged.items() if value is not _FAULTY}
    account = Account(name, **good)
    faults += [f"[{name}] {text}" for text in untainted(account.contradictions(config),
                                                        merged.keys() - good.keys())]
    return account


def _conflicts(accounts: list[Account]) -> Iterator[str]:
    """Find accounts that cannot be told apart."""
    names = collections.Counter(one.name.casefold() for one in accounts)
    yield from (f"[{one.name}] is there twice; case does not matter" for one in accounts
                if names[one.name.casefold()] > 1)
    for network, sharing in Accounts(accounts).by_network.items():
        who = " and ".join(f"[{one.name}]" for one in sharing)
        if sum(one.login == "optional" for one in sharing) > 1:
            yield f"{who} networks: both claim {network} without login"
        for name in NETWORK_KEYS:
            if len({one.network_settings.get(name) for one in sharing} - {None}) > 1:
                yield f"{who} {name}: must be the same, as both have {network}"


@functools.lru_cache
def has_scrypt() -> bool:
    """Say whether there is scrypt: LibreSSL has none, and FIPS forbids it."""
    try:
        return bool(hash_password("", bytes(16)))
    except (AttributeError, ValueError):
        return False


SCRYPT_COST = 2 ** 15       # N of RFC 7914; tests lower it


def hash_password(password: str, salt: bytes) -> str:
    """Hash a password with 16 octets of salt: scrypt, RFC 7914, r=8, p=1."""
    digest = hashlib.scrypt(password.encode(), salt=salt, n=SCRYPT_COST, r=8, p=1,
                            maxmem=2 ** 26, dklen=32)
    return "$".join(["scrypt", *(base64.urlsafe_b64encode(octets).decode().rstrip("=")
                                 for octets in (salt, digest))])


def is_password(password: str, hashed: str) -> bool:
    """Compare a password with a hash, in constant time."""
    if not has_scrypt():
        return False                    # then no account has a hash
    salt = base64.urlsafe_b64decode(hashed.split("$")[1] + "==")
    return hmac.compare_digest(hash_password(password, salt), hashed)


def lookup_name(username: str, delimiter: str) -> str | None:
    """Find NAME in NAME@lookup, or in NAME@lookup.local for who wants a dot; or None."""
    match = re.fullmatch(rf"(.+){re.escape(delimiter)}lookup(?:\..*)?", username,
                         re.I | re.S)
    return match[1] if match else None


def parse_username(username: str, delimiter: str) -> tuple[str, str]:
    """Read "tenant@client" as the two. Raises AuthError.

    Each is a UUID or the 22 characters of its base64url form; the tenant may also be one
    of its domains. What follows a dot behind the delimiter is ignored, for devices that
    want an e-mail address.
    """
    tenant, _, client = username.partition(delimiter)
    try:
        return read_tenant(tenant), read_client(client.partition(".")[0])
    except ValueError:
        raise AuthError(f"The user name must be TENANT{delimiter}CLIENT: the tenant's ID "
                        "or domain, and the application's ID") from None


# ---------------------------------------------------------------------------
# §5  SMTP session
# ---------------------------------------------------------------------------
#
# Session is the protocol and nothing else: no socket, no clock, no task. Its caller
#
#     receive(octets), receive_eof()    gives it what comes from the network
#     next_event()                      asks what to do now; None is: read more
#     output()                          takes the replies that are ready
#
# and answers each event but Close: StartTls by tls_started(), Authenticate by
# authenticated() or refuse(), Deliver by delivered() or refuse(). Until the answer the
# session works on nothing else, so that pipelined commands wait, and replies to a group
# of them leave together (RFC 2920 section 3.2).
#
#     CONNECTED --EHLO--> READY --MAIL--> MAIL --RCPT--> RCPT --DATA--> (content)
#         ^                 ^---------------RSET, EHLO, end of content------'
#         '---- TLS started: everything said before is forgotten

MAX_COMMAND = 2048              # octets with CRLF; RFC 5321 section 4.5.3.1.4 wants 512
MAX_AUTH = 12288                # octets with CRLF, RFC 4954 section 4
TOO_LONG = {MAX_COMMAND: "5.5.2", MAX_AUTH: "5.5.6"}    # the enhanced status code
MAX_ERRORS = 10                 # in a row
MAX_FAILED_LOGINS = 3           # in a session
PROGRESS = 65536                # octets of a message that count as one command

_END_OF_DATA = b"\r\n.\r\n"
_CLIENT_HELLO = b"\x16\x03"     # a TLS record: handshake, version 3.x
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
HTTP_VERBS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST",
                        "PUT", "TRACE"})


class Phase(enum.Enum):
    """Which commands are in order."""

    CONNECTED = "before EHLO"
    READY = "between messages"
    MAIL = "after MAIL"
    RCPT = "after RCPT"


@dataclass
class Envelope:
    """A message on its way in, and whom it is from and for (RFC 5321 section 2.3.1)."""

    reverse_path: str
    recipients: dict[str, str] = field(default_factory=dict)    # by comparable form
    message: bytes | bytearray = field(default=b"", repr=False)


@dataclass(frozen=True)
class StartTls:
    """Send the output, then do the handshake."""


@dataclass(frozen=True)
class Authenticate:
    """Check a user name and a password."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Deliver:
    """Hand a message on; lines end in CRLF, dot-stuffing is undone."""

    envelope: Envelope


@dataclass(frozen=True)
class Close:
    """Send the output and close; `reason` is for the log."""

    reason: str


Event = Union[StartTls, Authenticate, Deliver, Close]


class Memory:
    """Counts the octets of all messages in flight, MAX_MEMORY_FOR_MESSAGES."""

    def __init__(self, limit: int) -> None:
        self.free = limit

    def take(self, octets: int) -> None:
        """Count octets in. Raises TemporaryError if they are too many."""
        self.check(octets)
        self.free -= octets

    def give_back(self, octets: int) -> None:
        """Count octets out."""
        self.free += octets

    def check(self, octets: int) -> None:
        """Raise TemporaryError if so many octets cannot be taken now."""
        if octets > self.free:
            raise TemporaryError("Too much mail at once for the relay's memory; try again "
                                 "later", 452, "4.3.1")


class Session:
    """An SMTP session on the server's side, without I/O.

    RFC 5321, 1870 SIZE, 2034 ENHANCEDSTATUSCODES, 2920 PIPELINING, 3207 STARTTLS,
    4954 AUTH, 6152 8BITMIME, 6531 SMTPUTF8.
    """

    def __init__(self, config: Config, name: str,
                 trace: Callable[[str, object], None] | None = None,
                 memory: Memory | None = None,
                 guest: Login | None = None) -> None:
        """Begin. A guest may send without login."""
        self._config = config
        self._name = name
        self._memory = memory or Memory(config.max_memory_for_messages)
        self._guest = guest
        self.secure = False
        self.login = guest              # who may send
        self._trace = trace or (lambda mark, text: None)
        self._phase = Phase.CONNECTED
        self._read = self._read_command
        self._event: Event | None = None
        self._buffer = bytearray()      # received, not yet worked on
        self._scanned = 0               # octets of it known to hold no end of line
        self._overlong = ""             # status if the line at its start lost octets
        self._eof = False
        self._output: list[bytes] = []
        self._commands = 0
        self._octets = 0                # of messages
        self._errors = 0                # in a row
        self._complaint: Reply | None = None            # the last that the log knows of
        self._failed_logins = 0
        self._envelope = Envelope("")
        self._allow_utf8 = False
        self._content = bytearray()     # of a message; its octets are taken of _memory
        self._foreign = 0               # octets before it that are the command's CRLF
        self._refusal: RelayError | None = None         # the content is thrown away
        self._mechanism = ""
        self._answers: list[bytes] = []                 # of the client to AUTH challenges

    # The caller's side.

    def greet(self) -> None:
        """Say the first word. RFC 5321 section 4.2: the domain comes first."""
        self._send(Reply(220, "", f"{self._name} ESMTP {self._config.server_greeting}"))

    def receive(self, octets: bytes) -> None:
        """Take octets from the client."""
        self._buffer += octets

    def receive_eof(self) -> None:
        """Take notice that the client will send no more."""
        self._eof = True

    def next_event(self) -> Event | None:
        """Work on what was received; return what to do now, or None: read more."""
        while self._event is None and self._read():
            pass
        event, self._event = self._event, None
        return event

    def output(self) -> bytes:
        """Take the replies that are ready."""
        replies = b"".join(self._output)
        self._output.clear()
        return replies

    @property
    def progress(self) -> int:
        """A number that grows with each command and each 64 KiB of a message."""
        return self._commands + self._octets // PROGRESS

    @property
    def is_in_content(self) -> bool:
        """Whether a message is being received."""
        return self._read == self._read_content

    @property
    def holds_message(self) -> bool:
        """Whether a message is being received, or waits for an answer."""
        is_waiting = self._phase is Phase.RCPT and self._read == self._wait
        return self.is_in_content or is_waiting

    def end(self, reply: Reply, reason: str) -> None:
        """Let a reply be the last word, whatever the client was doing."""
        self._send(reply)
        self._close(reason)

    def abandon(self) -> None:
        """Let go of a message; the connection is gone."""
        self._reset()

    # The caller's answers to events.

    def tls_started(self) -> None:
        """Go on under TLS. What came in the clear is forgotten, RFC 3207 section 4.2."""
        self.secure = True
        self.login = self._guest
        self._phase = Phase.CONNECTED
        self._buffer.clear()
        self._scanned, self._overlong = 0, ""
        self._resume()

    def authenticated(self, login: Login) -> None:
        """Go on with a client that is who it says."""
        self.login = login
        self._resume(Reply(235, "2.7.0", "Authentication succeeded"))

    def delivered(self, text: str) -> None:
        """Go on after a message that was accepted."""
        self._resume(Reply(250, "2.0.0", text))

    def refuse(self, reply: Reply) -> None:
        """Go on after a login or a message that was not accepted."""
        self._failed_logins += reply.code == 535
        self._resume(reply)
        if self._failed_logins >= MAX_FAILED_LOGINS and self._event is None:
            self.end(Reply(421, "4.7.0", "Too many failed logins"), "failed logins")

    # Readers: work on a piece of the input; False if there is no whole one.

    def _wait(self) -> bool:
        return False

    def _read_command(self) -> bool:
        if self._is_client_hello():
            self._close("the client speaks TLS from the first octet: set it to STARTTLS, "
                        "or to the port that SMTPS_PORT opens")
            return False
        is_auth = not self._overlong and bytes(self._buffer[:5]).upper() == b"AUTH "
        return self._read_line(self._command, MAX_AUTH if is_auth else MAX_COMMAND)

    def _read_auth(self) -> bool:
        return self._read_line(self._auth_answer, MAX_AUTH)

    def _read_line(self, obey: Callable[[str], Reply | None], limit: int) -> bool:
        """Obey one line; it ends in CRLF and in nothing else."""
        end = self._buffer.find(b"\r\n", self._scanned)
        if end < 0:
            self._miss_end_of_line(limit)
            return False
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 2]
        overlong, self._overlong = self._overlong, ""
        if end + 2 > limit:
            overlong = overlong or TOO_LONG[limit]
        self._scanned = 0
        self._commands += 1
        try:
            if overlong:
                raise ProtocolError("The line is too long", 500, overlong)
            reply = obey(_decode_line(line))
        except RelayError as error:
            if self._read == self._read_auth:       # it ends the exchange
                self._read = self._read_command
            self._complain(error.reply)
            reply = error.reply
        if reply:
            self._answer(reply)
        return True

    def _miss_end_of_line(self, limit: int) -> None:
        self._scanned = max(0, len(self._buffer) - 1)       # the last may be a CR
        if len(self._buffer) > limit:
            self._overlong = self._overlong or TOO_LONG[limit]
            del self._buffer[:-1]
            self._scanned = 0
        if self._eof:
            self._close("the client hung up")

    def _is_client_hello(self) -> bool:
        return (not self.secure and not self._commands and not self._overlong
                and self._buffer.startswith(_CLIENT_HELLO))

    def _read_content(self) -> bool:
        """Take what there is of a message; only CRLF . CRLF ends it."""
        end = self._buffer.find(_END_OF_DATA)
        cut = end + 2 if end >= 0 else len(self._buffer) - self._unsure_octets()
        # A dot at the start of a line was added by the client, RFC 5321 section 4.5.2.
        part = self._buffer[:cut].replace(b"\r\n.", b"\r\n")
        del self._buffer[:cut]
        self._octets += cut
        if part and not self._refusal:
            self._keep_content(_with_crlf(part[self._foreign:]))
            self._foreign = 0
        if end >= 0:
            del self._buffer[:3]
            self._end_content()
            return True
        if self._eof:
            self._close("the client hung up within a message")
        return False

    def _unsure_octets(self) -> int:
        """How many octets at the end may be the beginning of the end of the content.

        A CR is among them, so no CRLF is ever parted.
        """
        return next((length for length in (4, 3, 2, 1)
                     if self._buffer.endswith(_END_OF_DATA[:length])), 0)

    def _keep_content(self, part: bytearray) -> None:
        try:
            if len(self._content) + len(part) > self._config.size_limit:
                raise _above_limit(self._config)
            self._memory.take(len(part))
            self._content += part
        except RelayError as error:
            self._drop_content()
            self._refusal = error

    def _drop_content(self) -> None:
        self._memory.give_back(len(self._content))
        self._content = bytearray()

    def _end_content(self) -> None:
        if self._refusal:
            self._complain(self._refusal.reply)
            self._resume(self._refusal.reply)
            return
        self._envelope.message = self._content      # no copy: it may be large
        self._ask(Deliver(self._envelope))

    # Commands, in the order of RFC 5321 section 4.1.1.

    def _ehlo(self, argument: str) -> Reply:
        # The argument is not checked: devices say anything, and it may not matter,
        # RFC 5321 section 4.1.4. The reply has no enhanced status code, RFC 2034.
        self._reset()
        self._phase = Phase.READY
        return Reply(250, "", "\n".join([self._name, *self._extensions()]))

    def _extensions(self) -> Iterator[str]:
        yield f"SIZE {self._config.size_limit}"
        yield from ("PIPELINING", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES")
        if self._offers_tls():
            yield "STARTTLS"
        if self._may_log_in():
            yield "AUTH PLAIN LOGIN"
        yield "HELP"

    def _helo(self, argument: str) -> Reply:
        self._reset()
        self._phase = Phase.READY
        return Reply(250, "", self._name)

    def _mail(self, argument: str) -> Reply:
        assert self.login is not None       # the table wants a login
        mailbox, parameters = parse_path(argument, "FROM:")
        for name, value in parameters.items():
            if name not in MAIL_PARAMETERS:
                raise ProtocolError("MAIL has no such parameter", 555, "5.5.4")
            MAIL_PARAMETERS[name](self, value)
        self._check_ascii(mailbox, "SMTPUTF8" in parameters)
        if mailbox:                         # else From says who sends
            self.login.account.check_sender(mailbox)
        size = int(parameters.get("SIZE") or 0)
        if size > self._config.size_limit:
            raise _above_limit(self._config)
        self._memory.check(size)
        self._envelope = Envelope(mailbox)
        self._allow_utf8 = "SMTPUTF8" in parameters
        self._phase = Phase.MAIL
        return Reply(250, "2.1.0", "Sender ok")

    def _mail_size(self, value: str | None) -> None:
        if not _SIZE.fullmatch(value or ""):
            raise ProtocolError("SIZE must be a number of octets")

    def _mail_body(self, value: str | None) -> None:
        if (value or "").upper() not in ("7BIT", "8BITMIME"):
            raise ProtocolError("BODY must be 7BIT or 8BITMIME")

    def _mail_smtputf8(self, value: str | None) -> None:
        if value is not None:
            raise ProtocolError("SMTPUTF8 has no value")

    def _mail_auth(self, value: str | None) -> None:
        # RFC 4954 section 5: to be accepted by who offers AUTH; we trust nobody's word.
        if value is None:
            raise ProtocolError("AUTH must be an address or <>")

    def _check_ascii(self, mailbox: str, allow_utf8: bool) -> None:
        if not allow_utf8 and not mailbox.isascii():
            raise ProtocolError("This address needs MAIL with SMTPUTF8", 553, "5.6.7")

    def _rcpt(self, argument: str) -> Reply:
        mailbox, parameters = parse_path(argument, "TO:")
        if parameters:
            raise ProtocolError("RCPT has no parameters here", 555, "5.5.4")
        if not mailbox:
            raise ProtocolError("A recipient must have an address", 501, "5.1.3")
        self._check_ascii(mailbox, self._allow_utf8)
        assert self.login is not None       # MAIL wants a login
        self.login.account.check_recipient(mailbox)
        recipients = self._envelope.recipients
        key = comparable(mailbox)
        if key not in recipients and len(recipients) >= self._config.max_recipients:
            raise TemporaryError("Too many recipients; send the rest separately", 452,
                                 "4.5.3")
        recipients.setdefault(key, mailbox)
        self._phase = Phase.RCPT
        return Reply(250, "2.1.5", "Recipient ok")

    def _data(self, argument: str) -> Reply:
        # The CRLF of the command may begin the end: an empty message is just a dot.
        self._buffer[:0] = b"\r\n"
        self._foreign = 2
        self._refusal = None
        self._read = self._read_content
        return Reply(354, "", "Send the message; end it with a dot on a line of its own")

    def _rset(self, argument: str) -> Reply:
        self._reset()
        return Reply(250, "2.0.0", "Ok")

    def _vrfy(self, argument: str) -> Reply:
        return Reply(252, "2.5.0", "Send some mail; Microsoft 365 knows who is there")

    def _expn(self, argument: str) -> Reply:
        raise ProtocolError("EXPN is not available", 502, "5.5.1")

    def _help(self, argument: str) -> Reply:
        return Reply(214, "2.0.0", "Commands: " + " ".join(COMMANDS))

    def _noop(self, argument: str) -> Reply:
        return Reply(250, "2.0.0", "Ok")

    def _quit(self, argument: str) -> None:
        self.end(Reply(221, "2.0.0", "Bye"), "quit")

    def _starttls(self, argument: str) -> Reply:
        if self.secure:
            raise ProtocolError("TLS is on already", 503, "5.5.1")
        if not self._offers_tls():
            raise ProtocolError("This relay has no TLS", 502, "5.5.1")
        self._ask(StartTls())
        return Reply(220, "2.0.0", "Ready to start TLS")

    def _auth(self, argument: str) -> Reply | None:
        if self.login and self.login.username:
            raise ProtocolError("Already logged in", 503, "5.5.1")
        self._mechanism, _, initial = argument.partition(" ")
        self._mechanism = self._mechanism.upper()
        if self._mechanism not in AUTH_CHALLENGES:
            raise ProtocolError("Use AUTH PLAIN or AUTH LOGIN", 504, "5.5.4")
        self._answers = []
        self._read = self._read_auth
        if initial:     # "=" is an empty one, RFC 4954 section 4
            return self._auth_answer("" if initial == "=" else initial)
        return self._challenge()

    def _auth_answer(self, text: str) -> Reply | None:
        if text == "*":
            raise ProtocolError("Login cancelled", 501, "5.7.0")
        self._answers.append(decode_base64(text))
        if len(self._answers) < len(AUTH_CHALLENGES[self._mechanism]):
            return self._challenge()
        self._ask(self._credentials())
        return None

    def _challenge(self) -> Reply:
        challenge = AUTH_CHALLENGES[self._mechanism][len(self._answers)]
        return Reply(334, "", base64.b64encode(challenge).decode())

    def _credentials(self) -> Authenticate:
        """Read the client's answers, RFC 4616 section 2 and the LOGIN of the drafts."""
        answers, self._answers = self._answers, []
        authorize = b""
        if self._mechanism == "PLAIN":
            if answers[0].count(b"\0") != 2:
                raise ProtocolError("PLAIN has three parts", 501, "5.5.2")
            authorize, *answers = answers[0].split(b"\0")
        if authorize not in (b"", answers[0]):
            raise ProtocolError("Nobody may act for another user", 501, "5.7.0")
        try:
            return Authenticate(answers[0].decode(), answers[1].decode())
        except UnicodeDecodeError:
            pass                        # not raised from: it would carry the password
        raise ProtocolError("User name and password must be UTF-8", 501, "5.5.2")

    # Plumbing.

    def _command(self, line: str) -> Reply | None:
        verb, _, argument = line.rstrip(" \t").partition(" ")
        verb = verb.upper() if verb.isascii() else verb     # U+017F would become an S
        self._trace("<", _traced(verb, line))
        if verb in HTTP_VERBS:
            self.end(Reply(421, "4.7.0", "This is SMTP, not HTTP"), "HTTP")
            return None
        if verb not in COMMANDS:
            raise ProtocolError("No such command", 500, "5.5.1")
        command = COMMANDS[verb]
        self._check(command, argument)
        return command.obey(self, argument)

    def _check(self, command: Command, argument: str) -> None:
        """Refuse a command that is out of order; the only place that does."""
        if command.secure and self._config.require_tls and not self.secure:
            raise ProtocolError("Say STARTTLS first", 530, "5.7.0")
        if command.login and not self.login:
            raise ProtocolError("Log in first", 530, "5.7.0")
        if self._phase not in command.phases:
            raise ProtocolError(f"Not {self._phase.value}", 503, "5.5.1")
        if command.argument is not None and command.argument != bool(argument):
            raise ProtocolError("An argument is needed" if command.argument
                                else "No argument is allowed")

    def _offers_tls(self) -> bool:
        return not self.secure and self._config.tls_source != "off"

    def _may_log_in(self) -> bool:
        return self.secure or not self._config.require_tls

    def _send(self, reply: Reply) -> None:
        self._trace(">", reply)
        self._output.append(bytes(reply))

    def _complain(self, reply: Reply) -> None:
        """Let the log know of a mistake, but not of one again and again."""
        if reply != self._complaint:
            self._complaint = reply
            self._trace("!", reply)

    def _answer(self, reply: Reply) -> None:
        """Send the reply to a command; too many errors in a row end the session."""
        self._send(reply)
        if reply.close:
            self._close(str(reply))
            return
        if reply.code < 300:
            self._errors = 0
        # Of many recipients many may be refused.
        self._errors += reply.code >= 500 and reply.code != 550
        if self._errors >= MAX_ERRORS:
            self.end(Reply(421, "4.7.0", "Too many errors"), "too many errors")

    def _ask(self, event: Event) -> None:
        self._event = event
        self._read = self._wait

    def _resume(self, reply: Reply | None = None) -> None:
        self._read = self._read_command
        self._reset()
        if reply:
            self._answer(reply)

    def _close(self, reason: str) -> None:
        self._reset()
        self._ask(Close(reason))

    def _reset(self) -> None:
        self._drop_content()
        self._envelope = Envelope("")
        self._allow_utf8 = False
        if self._phase is not Phase.CONNECTED:
            self._phase = Phase.READY


def _decode_line(line: bytes) -> str:
    text = line.decode("utf-8", "surrogateescape")
    if _CONTROLS.search(text):
        raise ProtocolError("A command ends in CRLF and holds no control characters",
                            500, "5.5.2")
    return text


def _with_crlf(part: bytearray) -> bytearray:
    """Make every line end CRLF: a lone CR or LF is text that Exchange would eat."""
    if part.count(b"\r\n") == part.count(b"\r") == part.count(b"\n"):
        return part
    return part.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")


def _above_limit(config: Config) -> DeliveryError:
    limit = config.size_limit
    more = "" if limit == config.max_message_size else ", as LARGE_MESSAGES=refuse"
    return DeliveryError(f"The message is too large: {limit} octets are the most{more}",
                         552, "5.3.4")


def _traced(verb: str, line: str) -> str:
    """Show a command in the log; a client may send its password at the wrong time."""
    if verb == "AUTH":
        return "AUTH ***"
    return line if verb in COMMANDS else f"*** ({len(line)} characters, no command)"


class Command(NamedTuple):
    """A row of the table of commands; `argument` None is: as the client likes."""

    obey: Callable[[Session, str], Reply | None]
    phases: frozenset[Phase] = frozenset(Phase)
    argument: bool | None = None
    secure: bool = False        # only under TLS, while REQUIRE_TLS is true
    login: bool = False


_READY = frozenset({Phase.READY})

COMMANDS: Mapping[str, Command] = {
    "EHLO":     Command(Session._ehlo, argument=True),
    "HELO":     Command(Session._helo, argument=True),
    "STARTTLS": Command(Session._starttls, _READY, argument=False),
    "AUTH":     Command(Session._auth, _READY, argument=True, secure=True),
    "MAIL":     Command(Session._mail, _READY, argument=True, secure=True, login=True),
    "RCPT":     Command(Session._rcpt, frozenset({Phase.MAIL, Phase.RCPT}), argument=True),
    "DATA":     Command(Session._data, frozenset({Phase.RCPT}), argument=False),
    "RSET":     Command(Session._rset, argument=False),
    "VRFY":     Command(Session._vrfy, argument=True),
    "EXPN":     Command(Session._expn),
    "HELP":     Command(Session._help),
    "NOOP":     Command(Session._noop),
    "QUIT":     Command(Session._quit, argument=False),
}

MAIL_PARAMETERS: Mapping[str, Callable[[Session, str | None], None]] = {
    "SIZE":     Session._mail_size,
    "BODY":     Session._mail_body,
    "SMTPUTF8": Session._mail_smtputf8,
    "AUTH":     Session._mail_auth,
}

AUTH_CHALLENGES: Mapping[str, tuple[bytes, ...]] = {
    "PLAIN": (b"",),
    "LOGIN": (b"Username:", b"Password:"),      # devices compare them letter by letter
}


# ---------------------------------------------------------------------------
# §6  Messages
# ---------------------------------------------------------------------------
#
# Graph has no envelope: it mails whoever stands in To, Cc and Bcc. So these are made to
# name the envelope's recipients and nobody else (HEADER_RECIPIENTS=strip):
#
#     an address field ...            becomes
#     names only the envelope's       what it was, octet for octet; stray ";" are commas
#     names others too                itself without them: they go to X-Original-To, -Cc
#     cannot be read beyond doubt     X-Original-To, -Cc as a whole
#     is a Bcc                        part of the one Bcc, for whom no field names
#
# Whom a field names behind a malformed line, where a reader may have stopped, is in Bcc
# too. "Beyond doubt" is the point: a field that we read in one way and Exchange in another
# would send the mail to somebody else.
#
# And Graph wants From to name the mailbox in its URL. One that is missing or empty is
# added; of one that names another, or more, or nobody, FROM_MISMATCH makes
#
#     keep        nothing else: Microsoft decides
#     refuse      550 5.7.1
#     rewrite     the mailbox, with the old name; the old address goes to Reply-To, and
#                 what named several or nobody to X-Original-From too
#
# A name with a bare "@" is put into quotes, as Exchange takes it for an address.
#
# Everything else stays as it is, octet for octet. The body is never copied: a message may
# have 150 MB.

# A URL at the start of a line is text; no address field begins so.
_FIELD = re.compile(rb"((?!https?://|ftp://)[!-9;-~]+)[ \t]*:", re.I)
# Text may look like fields ("Time: 12:00"): a header has at least one of these.
_KNOWN_FIELD = re.compile(
    rb"from|to|cc|bcc|subject|date|sender|reply-to|message-id|in-reply-to|references"
    rb"|received|return-path|delivered-to|envelope-to|mime-version|importance|priority"
    rb"|sensitivity|user-agent|auto-submitted|disposition-notification-to|errors-to"
    rb"|(?:content|resent|list|thread|dkim|arc|authentication|x)-.*", re.I)
_FOLDED_LINE = re.compile(rb"[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*")
# The line that mbox files have before a message, RFC 4155 appendix A: known by its date, or
# by the field behind it and what stands in it, an address, a year or just one word.
_MBOX_LINE = re.compile(
    rb"From (?=[^\r\n]*(?:@|[0-9]{4})|[^ \r\n]+ *\r\n)[^\r\n]{1,500}\r\n(?=(?:%b):)"
    rb"|From [^ \r\n]{1,500} +(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) +[A-Z][a-z]{2} +[0-9]{1,2} +"
    rb"[0-9]{2}:[0-9]{2}[^\r\n]{0,100}\r\n"
    % _KNOWN_FIELD.pattern.replace(b".*", rb"[!-9;-~]+"), re.I)
_ADDRESS_FIELDS = (b"to", b"cc", b"bcc")
_EDITED_FIELDS = frozenset({*_ADDRESS_FIELDS, b"from", b"reply-to"})
# A quoted-string or domain-literal that is not closed goes on to the end: each
# alternative takes something wherever it begins, so that no text is read twice.
_TOKEN = re.compile(r"""
      "  (?: [^"\\]  | \\.? )*  (?: "  | \Z )      # quoted-string
    | \[ (?: [^\]\\] | \\.? )*  (?: \] | \Z )      # domain-literal
    | [ \t\r\n]+
    | [^ \t\r\n<>@,;:."\[\]()\\]+                  # atom
    | .""", re.S | re.X)
_WHITE = " \t\r\n"
_IN_COMMENT = re.compile(r"[^()\\]+|\\.|.", re.S)
_NOT_IN_NAME = frozenset('<>@()[]\\"')
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_HEADER_MAILBOX = re.compile(
    rf'(?:{_DOT_STRING}|"(?:[^"\\\ud800-\udfff]|\\[^\ud800-\udfff])*")'
    rf"@(?:{_DOMAIN}|\[[^\[\]\\\ud800-\udfff]*\])")
_HEADER_ROUTE = re.compile(rf"\A{_ROUTE}")
# What is no address list, as a name and what stands in "<>"; a comment may be the name.
_ENCODED_WORD = r"=\?[^?\s]{1,75}\?[bq]\?[^?]*\?="
_LOOSE_AUTHOR = re.compile(r"(?P<name>[^<>]*)<(?P<mailbox>[^<>]*)>[^<>]*"
                           r"|[^()<>]*\((?P<comment>[^()<>]*)\)\s*|(?P<alone>[^<>]*)")
# Top-level domains that lead nowhere from outside, RFC 6761, RFC 6762 and RFC 8375.
_LOCAL_DOMAINS = frozenset({"arpa", "corp", "example", "home", "internal", "invalid", "lan",
                            "local", "localdomain", "localhost", "test"})

MAX_HEADER = 1_048_576          # octets
MAX_ADDRESSES = 262_144         # octets of address fields; 500 mailboxes have 160,000
MAX_WORDS = 200                 # of one mailbox
MAX_FIELDS = 10_000             # that are read, in one header
MAX_NAMED = 300                 # characters of addresses in a reply


@dataclass
class Field:
    """A field of addresses with its folded lines, or (name b"") any other lines."""

    name: bytes             # in lower case
    octets: bytes           # as it came, with the last CRLF
    is_reached: bool        # by a reader who stops at the first malformed line
    edited: bytes           # as it goes out

    @property
    def label(self) -> bytes:
        """The name as it is written."""
        return self.octets.partition(b":")[0].rstrip()

    @property
    def value(self) -> str:
        """What stands behind the colon; octets that are no UTF-8 survive encoding."""
        return self.octets.partition(b":")[2].decode("utf-8", "surrogateescape")


class Address(NamedTuple):
    """An address of a field."""

    key: str                # in comparable form
    mailbox: str            # as it stands there
    text: str               # with its name and comments
    tokens: list[str]       # of it, and of the white space around


class AddressList(NamedTuple):
    """The addresses of a field; none if it cannot be read beyond doubt."""

    addresses: list[Address]
    is_tidy: bool = True        # every reader parts them as we do
    is_doubtful: bool = False


class Doubtful(Exception):
    """An address field that another reader may read otherwise."""


@dataclass
class Header:
    """The header of a message, or of a part of one."""

    fields: list[Field]
    end: int                # where the rest begins: with an empty line, or with text
    top: list[bytes] = field(default_factory=list)  # new; a reader may end further down

    def find(self, *names: bytes) -> list[Field]:
        """The fields of some names."""
        return [one for one in self.fields if one.name in names]

    def __bytes__(self) -> bytes:
        """It as edited."""
        lines = [one.edited for one in self.fields]
        first = int(bool(lines) and lines[0][:1] in (b" ", b"\t"))
        return b"".join([*lines[:first], *self.top, *lines[first:]])


def split_header(message: bytes | bytearray, begin: int = 0, end: int | None = None,
                 is_read: Callable[[bytes], bool] = _EDITED_FIELDS.__contains__, *,
                 is_part: bool = False) -> Header:
    """Find the header of a message, or of a part from `begin` to `end`; lines end in CRLF.

    A malformed line ends nothing, as a lenient reader would go on behind it; but what
    stands between the last field and the empty line is text. In a part any field will do,
    RFC 2046 section 5.1. Raises DeliveryError.
    """
    limit = len(message) if end is None else end
    header = Header([], _header_end(message, begin, limit, is_part=is_part))
    # Of each field, or of neighbours that are not read: name, start, stop, is_reached.
    spans: list[tuple[bytes, int, int, bool]] = []
    is_reached = True
    # A new first field must come behind a folded first line, so that is kept alone.
    alone = int(message[begin:begin + 1] in (b" ", b"\t"))
    for line in _FOLDED_LINE.finditer(message, begin, header.end):
        match = _FIELD.match(line[0])
        is_reached = is_reached and match is not None and match[0] == match[1] + b":"
        name, start = match[1].lower() if match else b"", line.start()
        if not is_read(name):
            name = b""
            if spans[alone:] and not spans[-1][0]:
                _, start, _, _ = spans.pop()
        spans.append((name, start, line.end(), is_reached))
        if len(spans) > MAX_FIELDS:
            raise DeliveryError("The header has too many fields", 552, "5.3.4")
    for name, start, stop, is_reached in spans:
        octets = bytes(message[start:stop])
        header.fields.append(Field(name, octets, is_reached, octets))
    return header


def _header_end(message: bytes | bytearray, begin: int, limit: int, *,
                is_part: bool) -> int:
    """Find the end of the last field; `begin` if all is text. Raises DeliveryError."""
    if message.startswith(b"\r\n", begin):
        return begin
    most = min(limit, begin + MAX_HEADER)
    # To the last CRLF: a line without one would be tried from each of its octets.
    stop = message.find(b"\r\n\r\n", begin, most)
    stop = max(begin, (stop if stop >= 0 else message.rfind(b"\r\n", begin, most)) + 2)
    end, is_header = begin, False
    for line in _FOLDED_LINE.finditer(message, begin, stop):
        match = _FIELD.match(line[0])
        if match:
            end = line.end()
            is_header = (is_header or bool(_KNOWN_FIELD.fullmatch(match[1]))
                         or (is_part and line.start() == begin))
    end = end if is_header else begin
    if end == stop and most < limit and not message.startswith(b"\r\n", stop):
        raise DeliveryError("The header is too large", 552, "5.3.4")
    return end


def parse_addresses(value: str, *, any_name: bool = False) -> AddressList:
    """Read an address list, RFC 5322 section 3.4; ";" counts as ",". Raises Doubtful.

    With `any_name` a name may look like another address, as in fields that mail nobody.
    """
    if _NO_TEXT.search(value):
        raise Doubtful
    addresses: list[Address] = []
    group_at = -1                       # how many addresses there were before the group
    is_tidy, is_parted = True, True     # is_parted: by a comma from what was before
    for tokens, separator in _elements(value):
        text = "".join(tokens).strip(_WHITE)
        if separator == ":":
            if group_at >= 0 or not text or not _is_name(tokens):
                raise Doubtful
            group_at = len(addresses)
            continue
        if text:
            mailbox = _read_mailbox(tokens, any_name=any_name)
            addresses.append(Address(comparable(mailbox), mailbox, text, tokens))
            is_tidy = is_tidy and is_parted
        if separator == ";":
            is_tidy = is_tidy and group_at >= 0
            group_at = -1
        is_parted = separator == ","
    if 0 <= group_at < len(addresses):  # an empty group may lack its end
        raise Doubtful
    return AddressList(addresses, is_tidy)


def _elements(value: str) -> Iterator[tuple[list[str], str]]:
    """Yield the tokens between separators, and the separator behind them."""
    tokens: list[str] = []
    start = end = depth = 0             # of the token; of comments within comments
    in_angle = False
    while end < len(value):
        match = (_IN_COMMENT if depth else _TOKEN).match(value, end)
        assert match is not None        # the last alternative takes anything
        end = match.end()
        depth += (match[0] == "(") - (match[0] == ")" and depth > 0)
        if depth:
            continue
        token, start = value[start:end], end
        if token[0] in '"[' and "\r" in token:
            raise Doubtful              # not everybody unfolds before reading
        if token in ",;:" and not in_angle:
            yield tokens, token
            tokens = []
        else:
            in_angle = token == "<" or (in_angle and token != ">")
            tokens.append(token)
    if depth:
        raise Doubtful
    yield tokens, ""


def _is_name(words: list[str]) -> bool:
    """Whether words can be a name, and nobody can read an address in them."""
    return not _NOT_IN_NAME.intersection(
        "".join(word for word in words if word[0] != '"'))


def _read_mailbox(tokens: list[str], *, any_name: bool) -> str:
    """Read the tokens of one element, RFC 5322 sections 3.4 and 4.4. Raises Doubtful.

    Names and comments may hold an address only if it is the same.
    """
    others = [one[1:-1].strip(" ") for one in tokens if one[0] == "(" and "@" in one]
    words = [" " if one[0] in "(" + _WHITE else one for one in tokens]
    while words and words[-1] == " ":
        words.pop()
    if "<" in words:
        opening = words.index("<")
        name, words = words[:opening], words[opening + 1:]
        if not words or words.pop() != ">":
            raise Doubtful
        if name and not _is_name(name):
            others.append("".join(name).strip(" "))
    if len(words) > MAX_WORDS:
        raise Doubtful
    mailbox = _HEADER_ROUTE.sub("", "".join(words).strip(" "))
    if "=?" in mailbox or not _HEADER_MAILBOX.fullmatch(mailbox):
        raise Doubtful
    if not any_name and any(comparable(other) != comparable(mailbox) for other in others):
        raise Doubtful
    return mailbox


def _read_field(one: Field, *, is_sane: bool = True,
                any_name: bool = False) -> AddressList:
    with contextlib.suppress(Doubtful):
        if is_sane and len(one.octets) <= MAX_ADDRESSES:
            return parse_addresses(one.value, any_name=any_name)
    return AddressList([], is_doubtful=True)


def _address_field(name: bytes, texts: list[str]) -> bytes:
    """Write a field; an address a line keeps lines below 998, RFC 5322 section 2.1.1."""
    value = ",\r\n ".join(texts).encode("utf-8", "surrogateescape")
    return name + b": " + value + b"\r\n"


def edit_recipients(header: Header, recipients: Mapping[str, str], policy: str) -> None:
    """Make To, Cc and Bcc name these recipients, by comparable form, and nobody else.

    `policy` is HEADER_RECIPIENTS. Raises DeliveryError for "refuse".
    """
    fields = header.find(*_ADDRESS_FIELDS)
    is_sane = sum(len(one.octets) for one in fields) <= MAX_ADDRESSES
    read = [(one, _read_field(one, is_sane=is_sane)) for one in fields]
    if policy == "refuse":
        _refuse_others(read, recipients)
    keeps = policy == "keep"
    named = {address.key for one, found in read
             if one.is_reached and (found.is_tidy or not keeps)
             for address in found.addresses}
    if not keeps:
        for one, found in read:
            one.edited = _without_others(one, found, recipients)
    missing = [mailbox for key, mailbox in recipients.items() if key not in named]
    if not missing:
        return
    hidden = []                         # there may be one Bcc only, RFC 5322 section 3.6
    for one, found in read:
        if one.name == b"bcc" and not found.is_doubtful:
            one.edited = b""
            hidden += [address.text for address in found.addresses
                       if (address.key in named if address.key in recipients else keeps)]
    header.top.append(_address_field(b"Bcc", hidden + missing))


def _refuse_others(read: list[tuple[Field, AddressList]],
                   recipients: Mapping[str, str]) -> None:
    others = [address.mailbox for _, found in read for address in found.addresses
              if address.key not in recipients]
    others += [f"what stands in {one.label.decode()}"
               for one, found in read if found.is_doubtful]
    if others:
        names = ", ".join(others)
        names = names if len(names) <= MAX_NAMED else names[:MAX_NAMED] + " ..."
        raise DeliveryError(f"The header names whom RCPT does not: {names}", 550, "5.1.3")


def _without_others(one: Field, found: AddressList,
                    recipients: Mapping[str, str]) -> bytes:
    """Take out of a field whom the envelope does not name, as the table above says."""
    if found.is_doubtful:
        return b"" if one.name == b"bcc" else b"X-Original-" + one.octets
    kept = [address.text for address in found.addresses if address.key in recipients]
    others = [address.text for address in found.addresses if address.key not in recipients]
    if found.is_tidy and not others:
        return one.octets
    lines = _address_field(one.label, kept) if kept else b""
    if others and one.name != b"bcc":
        lines += _address_field(b"X-Original-" + one.label, others)
    return lines


Authors = list[tuple[Field, list[Address]]]


def _read_from(one: Field, *, is_sane: bool = True) -> list[Address]:
    """Read a From field; it mails nobody, so what is no address list is no danger.

    The key of an author whose address cannot be read is "".
    """
    is_sane = is_sane and len(one.octets) <= MAX_ADDRESSES
    value = one.value.replace("\r\n", "") if is_sane else "<"
    with contextlib.suppress(Doubtful):
        return parse_addresses(value, any_name=True).addresses
    match = _LOOSE_AUTHOR.fullmatch(value)
    mailbox = (match["mailbox"] or "").strip() if match else ""
    name = match["name"] or match["comment"] or match["alone"] or "" if match else ""
    name = re.sub(f"[{_WHITE}]+", " ", _NO_TEXT.sub("", name)).strip()
    words = [name] if re.fullmatch(r'"(?:[^"\\]|\\.)*"', name) else _quoted(name)
    if not _HEADER_MAILBOX.fullmatch(mailbox):
        mailbox = ""
    tokens = [one for word in words for one in (word, " ")] + ["<", mailbox, ">"]
    key = comparable(mailbox) if mailbox else ""
    return [Address(key, mailbox, "".join(tokens), tokens)]


def edit_author(header: Header, authors: Authors, mailbox: str, policy: str,
                login: str) -> None:
    """Make From agree with the mailbox that sends, as far as `policy` has it.

    `policy` is FROM_MISMATCH. Raises DeliveryError for "refuse".
    """
    if not any(found for _, found in authors):
        for one, _ in authors:          # there are empty ones at most
            one.edited = b""
        header.top.append(_address_field(b"From", [mailbox]))
        return
    key = comparable(mailbox)
    agrees = all(author.key == key for _, found in authors for author in found)
    if policy == "refuse" and not agrees:
        raise DeliveryError(f"From must name the sender {mailbox}, and nobody else: make "
                            "both the same in the device, or set FROM_MISMATCH=rewrite",
                            550, "5.7.1")
    if policy == "rewrite" and not agrees:
        _rewrite_author(header, authors, mailbox, login)
        return
    for one, found in authors:
        texts = [_author_text(author, author.mailbox) for author in found if author.key]
        # What is no address list got its quotes when it was read.
        if texts and (texts != [author.text for author in found]
                      or ("@" in texts[0].rpartition("<")[0] and len(texts) == 1
                          and _read_field(one, any_name=True).is_doubtful)):
            one.edited = _address_field(one.label, texts)


def _rewrite_author(header: Header, authors: Authors, mailbox: str, login: str) -> None:
    """Put a mailbox into From; whom it named gets the answers, if mail reaches him."""
    (first, found), *others = authors
    text = _author_text(found[0], mailbox) if found else mailbox
    first.edited = _address_field(first.label, [text])
    old = {author.key: author.mailbox for _, found in authors for author in found
           if _is_answered(author.mailbox, login)}
    if old.keys() - {comparable(mailbox)} and not header.find(b"reply-to"):
        first.edited += _address_field(b"Reply-To", list(old.values()))
    if len(found) != 1 or not found[0].key:
        first.edited += b"X-Original-" + first.octets
    for one, _ in others:
        one.edited = b"X-Original-" + one.octets


def _is_answered(mailbox: str, login: str) -> bool:
    """Whether mail to a mailbox may arrive: not to the login of a device, or @printer."""
    domain = mailbox.rpartition("@")[2].lower()
    top = domain.rpartition(".")[2]
    return ("." in domain and not domain.endswith("]") and not top.isdigit()
            and top not in _LOCAL_DOMAINS and mailbox.lower() != login.lower())


def _author_text(author: Address, mailbox: str) -> str:
    """Write an author with a mailbox; his name stays, in quotes if it needs them."""
    tokens, is_same = author.tokens, comparable(mailbox) == author.key
    if "<" not in tokens:
        comments = [one for one in tokens if one[0] == "("]
        return author.text if is_same else " ".join([mailbox, *comments])
    opening = tokens.index("<")
    words = [one for one in tokens[:opening] if one[0] != "("]
    name, rest = "".join(tokens[:opening]), tokens[tokens.index(">", opening) + 1:]
    is_bare = any("@" in one for one in words if one[0] != '"')
    if is_bare or not (is_same or _is_name(words)):
        name = re.sub(f"[{_WHITE}]+", " ", name).strip(" ")
        # A name that is the address itself says nothing.
        is_address = comparable(name) in (author.key, comparable(mailbox))
        name = "" if is_address else " ".join([*_quoted(name), ""])
    elif is_same:
        return author.text
    return "".join([name, f"<{mailbox}>", *rest]).strip(_WHITE)


def _quoted(name: str) -> list[str]:
    """Write a name as quoted-strings; not its encoded words, RFC 2047 section 5."""
    words = re.split(rf"((?:(?<= )|^){_ENCODED_WORD}(?=[ ,;:]|$))", name, flags=re.I)
    return [word if number % 2 else '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'
            for number, word in enumerate(map(str.strip, words)) if word]


ENCODE_AT_ONCE = 58_368         # octets, a multiple of 3


class Base64:
    """Octets in base64, made anew whenever they are sent; never all at once."""

    def __init__(self, first: bytes, rest: memoryview) -> None:
        self._first, self._rest = first, rest

    def __len__(self) -> int:
        return (len(self._first) + len(self._rest) + 2) // 3 * 4

    def __iter__(self) -> Iterator[bytes]:
        # A small message at once; of a large one so much that the rest is in threes.
        borrowed = max(ENCODE_AT_ONCE - len(self._first), -len(self._first) % 3)
        yield base64.b64encode(self._first + bytes(self._rest[:borrowed]))
        for start in range(borrowed, len(self._rest), ENCODE_AT_ONCE):
            yield base64.b64encode(self._rest[start:start + ENCODE_AT_ONCE])


@dataclass(frozen=True)
class Prepared:
    """A message as it is to go out, sent by `mailbox`."""

    mailbox: str
    before: bytes = field(repr=False)       # its header as it came
    header: bytes = field(repr=False)       # as it goes
    body: memoryview = field(repr=False)    # with the empty line, if `header` lacks it

    @property
    def size(self) -> int:
        """Octets."""
        return len(self.header) + len(self.body)

    @property
    def encoded(self) -> Base64:
        """The message in base64, as sendMail wants it."""
        return Base64(self.header, self.body)


def prepare(envelope: Envelope, config: Config, login: str) -> Prepared:
    """Edit the header of a message. Raises DeliveryError."""
    message = envelope.message
    mbox_line = _MBOX_LINE.match(message)
    header = split_header(message, mbox_line.end() if mbox_line else 0)
    fields = header.find(b"from")
    is_sane = sum(len(one.octets) for one in fields) <= MAX_ADDRESSES
    authors = [(one, _read_from(one, is_sane=is_sane)) for one in fields]
    named = [author.mailbox for _, found in authors for author in found if author.mailbox]
    mailbox = envelope.reverse_path
    if named and (config.sender_from == "header" or not mailbox):
        mailbox = named[0]
    if not mailbox:
        raise DeliveryError("MAIL FROM:<> needs a From field with the mailbox to send "
                            "from", 550, "5.1.7")
    edit_author(header, authors, mailbox, config.from_mismatch, login)
    edit_recipients(header, envelope.recipients, config.header_recipients)
    octets, body = bytes(header), memoryview(message)[header.end:]
    if len(octets) > MAX_HEADER:
        raise DeliveryError("The header is too large", 552, "5.3.4")
    if bytes(body[:2]) != b"\r\n" and (body or not header.fields):
        octets += b"\r\n"
    return Prepared(mailbox, bytes(message[:header.end]), octets, body)


# ---------------------------------------------------------------------------
# §7  Large messages
# ---------------------------------------------------------------------------
#
# What is too large for one request goes as a draft: its text as JSON, its attachments one
# by one (Microsoft, "Attach large files to Outlook messages or events"). That has no place
# for the structure of MIME, so a message that means something by it is refused.
#
#     part                                           becomes
#     the first text/plain or text/html              the body
#     the other forms of it in multipart/            nothing: Exchange makes them anew
#     alternative; the best is text/html
#     anything else, further texts too               an attachment; inline if the body
#                                                    names its Content-ID
#     signed, encrypted, an invitation ...           552 5.3.4
#
# Parts are found by their boundaries, and decoded piece by piece while they are sent: the
# email package would need ten times the size of the message.

LARGE_ATTACHMENT = 3_130_000    # octets; from here on by upload session (whose least is
                                # 2,097,152), below in one request, with its JSON
UPLOAD_PIECE = 3_932_160        # octets, before decoding; Graph wants less than 4 MB
MAX_PARTS = 250                 # of a message, Exchange's own limit
MAX_DEPTH = 10                  # of parts within parts
MAX_VALUE = 8192                # octets of one field of a part
MAX_PARAMETERS = 100            # in it
MAX_BOUNDARY = 200              # octets; RFC 2046 has 70
MAX_ENCODED_WORDS = 500         # in one field: the standard library is slow with more
MAX_X_FIELDS = 5                # of a draft, Graph's own limit
MAX_FILE_NAME = 255             # characters
MAX_CONTENT_ID = 500            # characters
MAX_CIDS = 1000                 # references to images in one text
FIND_AT_ONCE = 1_048_576        # octets; meanwhile no other thread runs

_NOT_BASE64 = bytes(set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                          b"abcdefghijklmnopqrstuvwxyz0123456789+/="))
_PART_FIELDS = frozenset({b"content-type", b"content-disposition", b"content-id",
                          b"content-location", b"content-transfer-encoding"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MEDIA_TYPE = re.compile(r"\s*([\w.+-]{1,127})\s*/\s*([\w.+-]{1,127})", re.A)
_WORD = re.compile(r"\s*([\w.-]*)", re.A)
_CHARSET = re.compile(r"[\w.-]{1,40}", re.A)
_META_CHARSET = re.compile(rb"<meta[^>]{1,200}charset=[\"']?([\w-]{1,40})", re.I)
_ENCODED_WORDS = re.compile(rf"{_ENCODED_WORD}(?:\s*{_ENCODED_WORD})*", re.I)
_X_FIELD = re.compile(rb"x-(?!ms-exchange-)[a-z0-9-]+")

UNSAYABLE: Mapping[str, str] = {
    "multipart/signed": "is signed",
    "multipart/encrypted": "is encrypted",
    "application/pgp-encrypted": "is encrypted",
    "application/pkcs7-mime": "is signed or encrypted",
    "application/x-pkcs7-mime": "is signed or encrypted",
    "application/ms-tnef": "is in Outlook's own format",
    "multipart/report": "is a report",
    "multipart/digest": "is a digest",
    "text/calendar": "is a calendar invitation",
    "message/partial": "is a part of another",
    "message/external-body": "has an attachment that lies elsewhere",
}
# Unless they say that they are a file: a signed invoice, a date to save.
SAYABLE_FILES = frozenset({"application/pkcs7-mime", "application/x-pkcs7-mime",
                           "text/calendar"})
IMPORTANCE: Mapping[str, str] = {
    "high": "high", "urgent": "high", "1": "high", "2": "high", "normal": "normal",
    "low": "low", "non-urgent": "low", "4": "low", "5": "low"}
# What is meant by the name of a charset, where Python knows less by it than mail programs.
CHARSETS: Mapping[str, str] = {
    "ascii": "utf-8", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030",
    "shift-jis": "cp932", "x-sjis": "cp932", "euc-kr": "cp949", "big5": "cp950",
    "tis-620": "cp874", "windows-874": "cp874", "iso-8859-8-i": "iso8859-8",
    "cp-1251": "cp1251",
    # These are no charsets, or take their time.
    "punycode": "", "idna": "", "unicode-escape": "", "raw-unicode-escape": "",
    "undefined": ""}


# As "replace" does, but in Python: other threads run meanwhile.
codecs.register_error("relay.replace",
                      lambda error: ("\ufffd", error.end))  # type: ignore[attr-defined]


class Unsayable(DeliveryError):
    """A message that a draft cannot hold without loss; `why` follows "it"."""

    def __init__(self, why: str) -> None:
        super().__init__(f"The message is larger than 3 MB and {why}, so it cannot be sent "
                         "in parts; it must be smaller", 552, "5.3.4")


@dataclass(frozen=True)
class Part:
    """A part of a message, which stands in its octets from `begin` to `end`."""

    message: bytes | bytearray = field(repr=False)
    begin: int
    end: int
    media_type: str             # in lower case
    parameters: Mapping[str, str]           # of it
    is_attachment: bool         # says that it is one
    file_name: str
    content_id: str
    location: str
    encoding: str

    @property
    def is_form(self) -> bool:
        """Whether it is text for the eye, in whatever form."""
        return (self.media_type.startswith("text/")
                and not self.is_attachment and not self.file_name)

    @property
    def is_text(self) -> bool:
        """Whether it may be the body of a draft."""
        return self.media_type in ("text/plain", "text/html") and self.is_form

    def pieces(self) -> Iterator[bytes]:
        """Decode it piece by piece, each below 4 MB. Raises Unsayable."""
        if self.encoding == "base64":
            return _decode_base64(self._slices())
        if self.encoding == "quoted-printable":
            return map(binascii.a2b_qp, self._slices())
        if self.encoding in ("7bit", "8bit", "binary"):
            return self._slices()
        raise Unsayable("has a part in an unknown encoding")

    def _slices(self) -> Iterator[bytes]:
        """Yield it in slices, none of which ends within an encoded character."""
        begin, octets = self.begin, memoryview(self.message)
        while begin < self.end:
            end = min(begin + UPLOAD_PIECE, self.end)
            if end < self.end:
                line_end = self.message.rfind(b"\n", begin, end)
                equals = self.message.rfind(b"=", end - 2, end)
                end = line_end + 1 if line_end >= 0 else equals if equals >= 0 else end
            yield bytes(octets[begin:end])
            begin = end


def _decode_base64(slices: Iterator[bytes]) -> Iterator[bytes]:
    """Decode base64; octets outside its alphabet do not count, RFC 2045 section 6.8."""
    rest, is_ended = b"", False
    for one in itertools.chain(slices, [b"="]):     # the padding may be missing
        text, padding, behind = one.translate(None, _NOT_BASE64).partition(b"=")
        if (is_ended and text) or behind.strip(b"="):
            raise Unsayable("has an attachment that goes on behind its end")
        is_ended = is_ended or bool(padding)
        text = rest + text
        cut = len(text) if is_ended else len(text) // 4 * 4
        if cut % 4 == 1:
            raise Unsayable("has an attachment that is cut off")
        yield binascii.a2b_base64(text[:cut] + b"=" * (-cut % 4))
        rest = text[cut:]


class Attachment(NamedTuple):
    """A file of a draft; `content_id` is "" unless the body shows it."""

    name: str
    part: Part
    content_id: str
    size: int               # octets

    @property
    def is_large(self) -> bool:
        """Whether it needs an upload session."""
        return self.size >= LARGE_ATTACHMENT

    def properties(self) -> dict[str, Any]:
        """Describe it as Graph wants it."""
        inline = {"isInline": True, "contentId": self.content_id} if self.content_id else {}
        return {"name": self.name, "contentType": self.part.media_type, **inline}

    def as_json(self) -> bytes:
        """Write a small one as a fileAttachment."""
        octets = base64.b64encode(b"".join(self.part.pieces())).decode()
        return json.dumps({"@odata.type": "#microsoft.graph.fileAttachment",
                           **self.properties(), "contentBytes": octets}).encode()


class Draft(NamedTuple):
    """A message as JSON, and what is attached to it."""

    content: bytes
    attachments: list[Attachment]


class Outgoing(NamedTuple):
    """A message for Graph: one request, or a draft if it is too large for one."""

    prepared: Prepared
    draft: Draft | None = None


def make_outgoing(envelope: Envelope, config: Config, login: str = "") -> Outgoing:
    """Do all to a message of a device with that login. Raises DeliveryError."""
    prepared = prepare(envelope, config, login)
    if prepared.size <= GRAPH_MESSAGE_LIMIT:
        return Outgoing(prepared)
    if config.large_messages == "refuse":
        raise DeliveryError(
            f"The message has {prepared.size} octets with the fields that the relay adds: "
            f"{GRAPH_MESSAGE_LIMIT} are the most, as LARGE_MESSAGES=refuse", 552, "5.3.4")
    return Outgoing(prepared, make_draft(envelope.message, prepared))


def make_draft(message: bytes | bytearray, prepared: Prepared) -> Draft:
    """Take a prepared message apart. Raises DeliveryError."""
    fields = split_header(prepared.header, is_read=bool).fields
    leaves = _leaves(_read_part(fields, message, len(prepared.before), len(message)),
                     itertools.count())
    text = _text_of(leaves)
    files = [one for one in leaves if one is not text]
    body = _read_text(text)
    is_html = text is not None and text.media_type == "text/html"
    shown = _shown_images(body, files) if is_html else []
    content = _as_json(_draft_properties(fields, prepared.mailbox),
                       "HTML" if is_html else "Text", body)
    if len(content) > GRAPH_REQUEST_LIMIT:
        raise Unsayable("has a text that is too large by itself")
    # An object of our own, as that of the module reads files of the system.
    types = mimetypes.MimeTypes()
    attachments = []
    for number, part in enumerate(files, 1):
        suffix = types.guess_extension(part.media_type) or ".bin"
        attachments.append(Attachment(
            part.file_name or f"ATT{number:05}{suffix}", part,  # as Exchange names it
            part.content_id if part in shown else "", sum(map(len, part.pieces()))))
    return Draft(content, attachments)


def _as_json(properties: dict[str, Any], kind: str, body: str) -> bytes:
    """Write a draft, its text slice by slice: with one emoji 4 MB of it take 16."""
    head = json.dumps({"body": {"contentType": kind, "content": ""}})[:-3]
    slices = (json.dumps(body[begin:begin + 65536], ensure_ascii=False)[1:-1]
              for begin in range(0, len(body), 65536))
    tail = json.dumps(properties, ensure_ascii=False)
    return b"".join(one.encode("utf-8", "replace") for one in itertools.chain(
        [head], slices, ['"},' + tail[1:]]))


def _read_part(fields: list[Field], message: bytes | bytearray, begin: int,
               end: int) -> Part:
    """Read what the fields of a part say, RFC 2045, 2183, 2231. Raises Unsayable."""
    if message.startswith(b"\r\n", begin, end):       # the empty line behind them
        begin += 2
    header = email.message.Message()
    for one in fields:
        if one.name in _PART_FIELDS:
            if len(one.octets) > MAX_VALUE or one.octets.count(b";") > MAX_PARAMETERS:
                raise Unsayable("has a part with a field that is too long")
            header[one.name.decode()] = _unfolded(one)
    disposition = _WORD.match(header.get("content-disposition", ""))
    encoding = _WORD.match(header.get("content-transfer-encoding", "") or "7bit")
    assert disposition and encoding     # they match anything
    parameters = _parameters(header, "content-type")
    name = (_parameters(header, "content-disposition").get("filename")
            or parameters.get("name", ""))
    file_name = _one_line(name, "_").encode("utf-8", "replace").decode()
    value = header.get("content-type", "") or "text/plain"
    match = _MEDIA_TYPE.match(value)
    if match:
        media_type = f"{match[1]}/{match[2]}".lower()
    elif re.search("multipart|message", value, re.I):
        raise Unsayable("has a part of an unknown type")
    else:                               # it is text, RFC 2045 section 5.2, if it can be
        is_binary = name or encoding[1].lower() == "base64"
        media_type = "application/octet-stream" if is_binary else "text/plain"
    return Part(message, begin, end, media_type, parameters,
                disposition[1].lower() == "attachment", file_name[-MAX_FILE_NAME:],
                header.get("content-id", "").strip(" \t<>")[:MAX_CONTENT_ID],
                header.get("content-location", "").strip(), encoding[1].lower())


def _parameters(header: email.message.Message, name: str) -> dict[str, str]:
    """Read the parameters of a field; those of RFC 2231 come last, and win."""
    try:
        pairs = header.get_params([], name)
    except (ValueError, TypeError, LookupError):        # RFC 2231 that is nonsense
        pairs = []
    parameters = {}
    for key, value in pairs:
        if isinstance(value, tuple):    # charset, language, octets
            value = decode_text(value[2].encode("latin-1", "replace"), value[0] or "")
        parameters[key] = value         # the standard library has it in lower case
    return parameters


def _leaves(part: Part, counter: Iterator[int], depth: int = 0) -> list[Part]:
    """Find the text and the files of a part by the table above. Raises Unsayable."""
    _check_sayable(part, depth)
    if next(counter) > MAX_PARTS or depth > MAX_DEPTH:
        raise Unsayable("has too many parts")
    if not part.media_type.startswith("multipart/"):
        is_empty = (part.end - part.begin < 1000
                    and not part.message[part.begin:part.end].strip())
        return [] if is_empty and part.is_text else [part]
    found: list[list[Part]] = []
    for begin, end in _split_parts(part):
        # The CRLF of the next delimiter may be that of the last field.
        header = split_header(part.message, begin, min(end + 2, part.end),
                              _PART_FIELDS.__contains__, is_part=True)
        child = _read_part(header.fields, part.message, min(header.end, end), end)
        leaves = _leaves(child, counter, depth + 1)
        start = part.parameters.get("start", "").strip("<>")
        found.insert(0 if start and start == child.content_id else len(found), leaves)
    if not found:
        raise Unsayable("has parts that cannot be told apart")
    leaves = [leaf for one in found for leaf in one]
    texts = [text for text in map(_text_of, found) if text]
    if part.media_type == "multipart/alternative" and texts:
        best = ([one for one in texts if one.media_type == "text/html"] or texts)[-1]
        forms = texts + [one[0] for one in found if len(one) == 1 and one[0].is_form]
        leaves = [best] + [leaf for leaf in leaves if leaf not in forms]
    return leaves


def _check_sayable(part: Part, depth: int) -> None:
    is_file = depth > 0 and part.is_attachment and part.media_type in SAYABLE_FILES
    if part.media_type in UNSAYABLE and (not is_file or "method" in part.parameters):
        raise Unsayable(UNSAYABLE[part.media_type])
    if depth == 0 and part.file_name.lower().endswith((".p7m", ".p7z")):
        raise Unsayable("is signed or encrypted")       # RFC 8551 section 3.9


def _text_of(leaves: list[Part]) -> Part | None:
    """The text is the first that may be one."""
    return next((one for one in leaves if one.is_text), None)


def _split_parts(part: Part) -> Iterator[tuple[int, int]]:
    """Find where the parts of a part begin and end, RFC 2046 section 5.1.1."""
    boundary = part.parameters.get("boundary", "").encode("utf-8", "replace")
    if not 0 < len(boundary) <= MAX_BOUNDARY:
        return
    # The CRLF behind a delimiter may be that before the next.
    delimiter = re.compile(rb"\r\n--" + re.escape(boundary)
                           + rb"(--)?[ \t]{0,999}(?=\r\n|\Z)")
    begin = part.end + 1                # nothing began yet
    for start in range(max(0, part.begin - 2), part.end, FIND_AT_ONCE):
        stop = start + FIND_AT_ONCE     # of those that begin there, but end a bit later
        most = min(stop + 2048, part.end)
        for match in delimiter.finditer(part.message, start, most):
            if match.start() >= stop:
                break
            if begin <= part.end:
                yield begin, match.start()
            if match[1]:
                return
            begin = match.end() + 2
    if begin <= part.end:               # the last delimiter is missing
        yield begin, part.end


def _read_text(part: Part | None) -> str:
    """Read the text of a draft. Raises Unsayable."""
    if part is None:
        return ""
    charset = part.parameters.get("charset", "").strip()
    most = GRAPH_REQUEST_LIMIT * (2 if "16" in charset else 1)
    octets = bytearray()
    for piece in part.pieces():
        octets += piece
        if len(octets) > most:
            raise Unsayable("has a text that is too large by itself")
    if not charset and part.media_type == "text/html":
        match = _META_CHARSET.search(octets, 0, 1024)
        charset = match[1].decode() if match else ""
    if charset and not _codec(charset) and not octets.isascii():
        raise Unsayable("has a text in an unknown charset")
    return decode_text(octets, charset)


def _shown_images(text: str, files: list[Part]) -> list[Part]:
    """Find the files that an HTML text shows by their Content-ID. Raises Unsayable."""
    # In octets, as a text with one emoji takes 4 for each character.
    low = text.encode("utf-8", "replace").lower()
    for part in files:
        location = part.location.encode("utf-8", "replace").lower()
        if location and not part.content_id and location in low:
            raise Unsayable("has images that are shown by Content-Location")
    places = [place[:MAX_CONTENT_ID + 10].decode("utf-8", "replace")
              for place in low.split(b"cid:", MAX_CIDS)[1:MAX_CIDS]]
    places += [change(place) for place in places if set(place) & {"&", "%"}
               for change in (html.unescape, urllib.parse.unquote)]
    return [part for part in files if part.content_id and any(
        place.lower().startswith(part.content_id.lower())
        and not re.match(r"[\w.@$+-]", place[len(part.content_id):]) for place in places)]


def _codec(charset: str) -> str:
    """Find what Python calls a charset, or ""."""
    name = CHARSETS.get(charset.lower().replace("_", "-"), charset)
    if _CHARSET.fullmatch(name):
        with contextlib.suppress(LookupError, ValueError):
            b" ".decode(name, "replace")        # not all codecs are of text
            found = codecs.lookup(name).name.replace("_", "-")
            return CHARSETS.get(found, found)   # names have many spellings
    return ""


def decode_text(octets: bytes | bytearray, charset: str = "") -> str:
    """Decode text; what is wrong or not said is what it most likely is."""
    codec = _codec(charset) or "utf-8"
    # ISO-2022-JP with a fault is ASCII, and so UTF-8, but it is not what it says.
    for name in (codec,) if codec.startswith(("iso2022", "hz")) else (codec, "utf-8"):
        with contextlib.suppress(ValueError):
            return octets.decode(name)
    text = octets.decode(codec, "relay.replace")
    if codec == "utf-8" and not re.search("[^\x00-\x7f\ufffd]", text):
        return octets.decode("cp1252", "relay.replace")     # nothing of UTF-8 was in it
    return text


def _unfolded(one: Field) -> str:
    """The value of a field on one line, RFC 5322 section 2.2.3."""
    return decode_text(one.octets.partition(b":")[2].replace(b"\r\n", b"")).strip()


def _one_line(text: str, control: str = " ") -> str:
    """Decode the encoded words of a value, RFC 2047; its control characters go."""
    if text.count("=?") <= MAX_ENCODED_WORDS:
        text = _ENCODED_WORDS.sub(_decode_words, text)
    return _CONTROL.sub(control, text.strip()).strip()


def _decode_words(match: re.Match[str]) -> str:
    """Decode a run of words; a character may begin in one and end in the next."""
    try:
        return "".join(decode_text(octets, charset or "")
                       for octets, charset in email.header.decode_header(match[0]))
    except (ValueError, TypeError, email.errors.MessageError):
        return match[0]


def _draft_properties(fields: list[Field], mailbox: str) -> dict[str, Any]:
    """Write the header as Graph wants it, but for what has no place there."""
    first: dict[bytes, Field] = {}
    people: dict[bytes, list[dict[str, Any]]] = {}
    for one in fields:
        if one.name in _ADDRESS_FIELDS:
            people.setdefault(one.name, []).extend(
                map(_person, _read_field(one).addresses))
        elif one.name in _EDITED_FIELDS:        # they mail nobody
            people.setdefault(one.name, []).extend(
                _person(author) for author in _read_from(one) if author.key)
        else:
            first.setdefault(one.name, one)
    values = {name: _one_line(_unfolded(one)) for name, one in first.items()}
    authors = people.get(b"from") or [{"emailAddress": {"address": mailbox}}]
    properties = {
        "subject": values.get(b"subject"), "from": authors[0],
        "toRecipients": people.get(b"to"), "ccRecipients": people.get(b"cc"),
        "bccRecipients": people.get(b"bcc"), "replyTo": people.get(b"reply-to"),
        "importance": _importance(values), "internetMessageId": values.get(b"message-id"),
        "internetMessageHeaders": [
            {"name": first[name].label.decode(), "value": value}
            for name, value in values.items() if value and _X_FIELD.fullmatch(name)
        ][:MAX_X_FIELDS]}
    return {name: value for name, value in properties.items() if value}


def _importance(values: Mapping[bytes, str]) -> str | None:
    for name in (b"importance", b"x-priority", b"priority", b"x-msmail-priority"):
        match = _WORD.match(values.get(name, ""))
        if match and match[1].lower() in IMPORTANCE:
            return IMPORTANCE[match[1].lower()]
    return None


def _person(address: Address) -> dict[str, Any]:
    """Write an address as Graph wants it; a comment may be the name."""
    tokens = address.tokens
    if "<" in tokens:
        name = "".join(email.utils.unquote(one) if one[0] == '"' else one
                       for one in tokens[:tokens.index("<")] if one[0] != "(")
    else:
        name = next((one[1:-1] for one in tokens if one[0] == "("), "")
    name = _one_line(decode_text(" ".join(name.split()).encode("utf-8", "surrogateescape")))
    mailbox = address.mailbox.encode("utf-8", "replace").decode()
    return {"emailAddress": {"address": mailbox, **({"name": name} if name else {})}}


# ---------------------------------------------------------------------------
# §8  Microsoft's answers
# ---------------------------------------------------------------------------
#
# Anything may come: every reading here has a defined outcome for garbage.

TRANSIENT_ENTRA_ERRORS = frozenset({"temporarily_unavailable", "server_error"})
TRANSIENT_AADSTS = frozenset({50033, 50196, 90006, 90012, 90024, 90033, 90041, 90055,
                              90090, 90091})

# AADSTS number -> what to do. Microsoft, "Microsoft Entra authentication and
# authorization error codes".
AADSTS_REMEDIES: Mapping[int, str] = {
    7000215: "wrong client secret; enter the secret's value, not its ID",
    7000222: "the client secret has expired; make a new one in Entra, App registrations",
    7000216: "no client secret arrived; enter it as the password",
    7000218: "no client secret arrived; enter it as the password",
    700016: "no such application in this tenant; check the client ID in the user name",
    90002: "no such tenant; check the tenant ID in the user name, and the cloud",
    900023: "no such tenant; check the tenant ID in the user name",
    7000112: "the application is disabled; enable it in Entra, Enterprise applications",
    53003: "a Conditional Access policy blocks this; allow the relay's IP address there",
    70011: "the scope is refused; check GRAPH_ENDPOINT",
    500011: "Graph is unknown in this tenant; check GRAPH_ENDPOINT",
    90038: "this tenant is in another national cloud; check AZURE_AUTHORITY_HOST",
}

EXPIRES_EARLY = 300             # seconds, as Microsoft's own libraries have it
MAX_TOKEN_LIFE = 86400          # seconds


@dataclass(frozen=True)
class HttpResponse:
    """An answer; header names are in lower case, the body may be cut off."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> dict[str, Any]:
        """Read the body as a JSON object; what is none is an empty one."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def retry_after(self, now: float) -> float | None:
        """Seconds to wait, or None; a fraction, a whole number or a date (RFC 9110
        section 10.2.3, and Graph's fractions). `now` is Unix time.
        """
        text = self.headers.get("retry-after", "").strip()
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            return float(text)
        try:
            date = email.utils.parsedate_to_datetime(text)
            if date.tzinfo is None:
                date = date.replace(tzinfo=datetime.timezone.utc)
            return max(0.0, date.timestamp() - now)
        except (TypeError, ValueError, IndexError, OverflowError):
            return None


@dataclass(frozen=True)
class Token:
    """An access token; `life` is for how many seconds it may be used."""

    value: str = field(repr=False)
    life: float


def read_token(response: HttpResponse, secret: str, now: float) -> Token:
    """Read Entra's answer, or that of a managed identity; `now` is Unix time.

    Raises AuthError if it refuses, TemporaryError otherwise.
    """
    answer = response.json()
    token = answer.get("access_token")
    if response.status == 200 and isinstance(token, str) and re.fullmatch("[!-~]+", token):
        life = (_number(answer.get("expires_in"))       # App Service has only the other
                or _number(answer.get("expires_on")) - now) - EXPIRES_EARLY
        return Token(token, min(max(life, 0.0), MAX_TOKEN_LIFE))
    codes, error, text = _entra_error(answer)
    code = codes[0] if codes else 0
    if response.status >= 400 and not error:    # in others there may be half of a token
        text = response.body.decode("utf-8", "replace")
    for form in filter(None, (secret, urllib.parse.quote_plus(secret))):
        text = text.replace(form, "***")
    facts = {"status": response.status, "aadsts": code or None, "error": error or None,
             "said": text or None}
    if (400 <= response.status < 500 and response.status != 429 and error
            and error not in TRANSIENT_ENTRA_ERRORS
            and TRANSIENT_AADSTS.isdisjoint(codes)):
        remedy = AADSTS_REMEDIES.get(code, "Entra refuses this application; see the log")
        raise AuthError(f"AADSTS{code}: {remedy}" if code else f"{error}: {remedy}",
                        facts=facts, level=logging.WARNING)
    raise TemporaryError("Microsoft gives no token now; try again later", facts=facts)


def _number(value: object) -> float:
    """Read a number that may be text; garbage is 0."""
    try:
        number = float(value)           # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _entra_error(answer: Mapping[str, Any]) -> tuple[list[int], str, str]:
    """Find AADSTS numbers, error and text in Entra's answer; empty if missing."""
    error, text = answer.get("error"), answer.get("error_description")
    error = error if isinstance(error, str) else ""
    text = text if isinstance(text, str) else ""
    codes = answer.get("error_codes")
    found = [code for code in codes if type(code) is int and 0 < code < 10 ** 9] \
        if isinstance(codes, list) else []
    match = re.match("AADSTS([0-9]{1,9})", text)
    return found or [int(match[1])] if match else found, error, text


# {mailbox} is filled in.
_NO_RIGHT = Reply(550, "5.7.1", "The application may not send as {mailbox}: it needs the "
                                  "right Mail.Send for this mailbox (a new right takes up "
                                  "to 2 hours)")
_NO_MAILBOX = Reply(550, "5.1.8", "Microsoft 365 has no mailbox {mailbox} to send from")
_NO_UPLOAD_RIGHT = Reply(552, "5.3.4", "The message is larger than 3 MB, and to send such "
                                       "as {mailbox} the application needs the right "
                                       "Mail.ReadWrite too (a new right takes up to 2 "
                                       "hours)")
_TOO_LARGE = Reply(552, "5.3.4", "Microsoft 365 says that the message is too large")
_FULL = Reply(452, "4.2.2", "The mailbox {mailbox} is full")
_FAILING = Reply(451, "4.3.0", "Microsoft 365 has a problem; try again later")
_BUSY = Reply(451, "4.4.5", "Microsoft 365 wants mail to come more slowly; try again "
                              "later")

# Graph's code decides first, in answers 400 to 499 but 401 and 429, and two codes in
# those above too; then the status.
GRAPH_CODES: Mapping[str, Reply] = {
    "erroraccessdenied": _NO_RIGHT,
    "errorsendasdenied": Reply(550, "5.7.60", "The From field names a mailbox that "
                                              "{mailbox} may not send as; make both the "
                                              "same in the device, or set "
                                              "FROM_MISMATCH=rewrite"),
    "errorinvaliduser": _NO_MAILBOX,
    "resourcenotfound": _NO_MAILBOX,
    "errornonexistentmailbox": _NO_MAILBOX,
    "mailboxnotenabledforrestapi": _NO_MAILBOX,
    "mailboxnothostedinexchangeonline": _NO_MAILBOX,
    "errorinvalidrecipients": Reply(550, "5.1.3", "Microsoft 365 does not accept a "
                                                    "recipient"),
    "errormessagesizeexceeded": _TOO_LARGE,
    "errorquotaexceeded": _FULL,
    "erroritemnotfound": _FAILING,      # the draft is gone
}
GRAPH_CODES_OF_ANY_STATUS = frozenset({"errormessagesizeexceeded", "errorquotaexceeded"})
GRAPH_STATUSES: Mapping[int, Reply] = {
    401: Reply(451, "4.7.0", "Microsoft 365 does not accept its own token; try again "
                               "later"),
    403: _NO_RIGHT,
    404: _NO_MAILBOX,
    408: _FAILING,         # the request came too slowly, RFC 9110 section 15.5.9
    413: _TOO_LARGE,
    429: _BUSY,
    507: _FULL,
}
_REFUSED = Reply(554, "5.6.0", "Microsoft 365 does not accept the message")
_NOT_SENT = Reply(554, "5.3.0", "Microsoft 365 gave an unknown answer; the message was "
                                  "not accepted")


class Step(enum.Enum):
    """What Graph is asked to do."""

    SEND = "send a message"
    CREATE = "make a draft"             # this needs Mail.ReadWrite
    ATTACH = "change the draft"         # so does this
    UPLOAD = "take a piece of a file"   # this needs no token
    SEND_DRAFT = "send the draft"
    DELETE = "delete the draft"         # this needs Mail.ReadWrite too


SUCCESS: Mapping[Step, tuple[int, ...]] = {
    Step.SEND: (202,), Step.CREATE: (200, 201), Step.ATTACH: (200, 201, 204),
    Step.UPLOAD: (200, 201, 202), Step.SEND_DRAFT: (202,),
    Step.DELETE: (200, 204, 404)}


def graph_error(response: HttpResponse, mailbox: str, step: Step = Step.SEND) -> RelayError:
    """Make the error for an answer of Graph that is not the one for success."""
    reply, code = _find_reply(response), _graph_code(response)
    if step in (Step.CREATE, Step.ATTACH, Step.DELETE) and reply is _NO_RIGHT:
        reply = _NO_UPLOAD_RIGHT
    if step not in (Step.SEND, Step.CREATE) and reply is _NO_MAILBOX:
        reply = _FAILING                # it had one a moment ago
    if step is Step.UPLOAD and reply not in (_TOO_LARGE, _FULL, _BUSY):
        reply = _FAILING                # it is between Graph and Exchange
    facts = {"status": response.status, "graph": code or None,
             "request_id": response.headers.get("request-id")}
    kind = TemporaryError if reply.code < 500 else DeliveryError
    level = logging.ERROR if reply is _NOT_SENT else logging.WARNING
    return kind(reply.text.format(mailbox=mailbox), reply.code, reply.status, facts=facts,
                level=level)


def _find_reply(response: HttpResponse) -> Reply:
    status, code = response.status, _graph_code(response).lower()
    reply = GRAPH_STATUSES.get(status, _FAILING if status >= 500 else
                               _REFUSED if status >= 400 else _NOT_SENT)
    if status >= 400 and status not in (401, 429) and (
            status < 500 or code in GRAPH_CODES_OF_ANY_STATUS):
        reply = GRAPH_CODES.get(code, reply)
    return reply


def read_id(response: HttpResponse) -> str:
    """Read the id of a new draft, or ""."""
    ident = response.json().get("id")
    return ident if isinstance(ident, str) and re.fullmatch("[!-~]{1,2000}", ident) else ""


def read_upload_url(response: HttpResponse, *, allow_http: bool) -> str:
    """Read the URL of a new upload session, or "" if nothing may be sent there.

    It holds a secret; plain http is for this machine only, as in _endpoint.
    """
    url = response.json().get("uploadUrl")
    if not isinstance(url, str) or not re.fullmatch("[!-~]+", url):
        return ""
    try:
        parts = urllib.parse.urlsplit(url)
        host, is_good = parts.hostname or "", parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        return ""
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and allow_http
                                          and is_loopback(host))
    return url if host and is_good and is_safe else ""


def next_range(response: HttpResponse) -> int | None:
    """Read where the next piece begins: NextExpectedRanges ["5"] or ["5-"], in any case."""
    for name, value in response.json().items():
        if name.lower() == "nextexpectedranges" and isinstance(value, list) and value:
            match = re.match("[0-9]{1,18}", str(value[0]))
            return int(match[0]) if match else None
    return None


# x-ms-error-code -> what to do; Microsoft, "Table service error codes".
TABLE_REMEDIES: Mapping[str, str] = {
    "TableNotFound": "there is no such table; check AZURE_TABLES_URL",
    "AuthorizationPermissionMismatch": "give the relay's identity the role Storage Table "
                                       "Data Reader (it takes minutes), or the SAS sp=r",
    "AuthorizationFailure": "the storage account's firewall or the SAS does not allow this",
    "AuthenticationFailed": "the SAS has expired, or the identity is of another tenant",
}
_NO_TABLE = "The relay cannot ask its table of accounts now; try again later"


def read_entity(response: HttpResponse) -> dict[str, Any] | None:
    """Read the first entity of an answer of Azure Tables; None: there is none.

    Raises TemporaryError.
    """
    answer, code = response.json(), response.headers.get("x-ms-error-code", "")
    if response.status == 404 and code == "ResourceNotFound":
        return None
    found = answer.get("value", [answer])       # a query has a list, a key has not
    if (response.status == 200 and answer and isinstance(found, list)
            and all(isinstance(one, dict) for one in found)):
        return found[0] if found else None
    raise TemporaryError(_NO_TABLE, facts={
        "status": response.status, "table": code or None,
        "remedy": TABLE_REMEDIES.get(code)}, level=logging.ERROR)


def read_account(entity: Mapping[str, Any], name: str) -> Account:
    """Read an entity of the table of accounts. Raises TemporaryError."""
    values, keys = {}, declared(Account)
    for key in ("tenant_id", "client_id", "from_email"):
        text = str(entity.get(key) or "").strip()
        try:
            values[key] = keys[key].parse(text)
            if not text and key != "from_email":
                raise ValueError("set")
        except ValueError as error:
            raise TemporaryError(_NO_TABLE, level=logging.ERROR, facts={
                "account": name, "problem": f"{key} must be {error}"}) from None
    return Account(name, **values)


def _graph_code(response: HttpResponse) -> str:
    error = response.json().get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


# ---------------------------------------------------------------------------
# §9  Queued messages
# ---------------------------------------------------------------------------
#
# A message of the spool is one file: a line of JSON, an Entry, that says what it is; its
# octets as they are to go out; and a line of JSON for each thing that happened to it. Of
# these the last whole one counts, so that nothing is written twice. No secret is there: the
# name of an account, or tenant and client, lead to it.

FIRST_PAUSE = 60.0              # seconds before a mailbox is tried again; doubled up to
LAST_PAUSE = 1800.0
MAX_NOTICE_HEADER = 65536       # octets of a header that a notice repeats


@dataclass(eq=False)
class Entry:
    """A message of the spool. Times are Unix times."""

    ident: str
    account: str                # of ACCOUNTS_FILE, or ""
    tenant: str
    client: str
    mailbox: str                # that sends
    reverse_path: str           # that a notice goes to
    recipients: list[str]
    header_size: int            # octets
    size: int                   # octets of all
    digest: str                 # SHA-256 of all
    is_notice: bool
    queued_at: float            # this and what follows may change
    tries: int = 0
    next_at: float = 0.0
    reason: str = ""            # why it is still here
    is_told: bool = False       # its sender, that it was given up
    asked_at: float = 0.0       # when `spool retry` was said

    @property
    def key(self) -> tuple[str, str, str]:
        """Whose limits it is under, and with whom it waits."""
        return self.tenant, self.client, self.mailbox.lower()

    @property
    def first_line(self) -> bytes:
        """What stands before the message."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @property
    def last_line(self) -> bytes:
        """What stands behind it; one that was cut off before does no harm."""
        state = {name: getattr(self, name) for name in _ENTRY_STATE}
        return b"\n" + json.dumps(state).encode() + b"\n"


_ENTRY_STATE = ("queued_at", "tries", "next_at", "reason", "is_told", "asked_at")
_ENTRY = Entry("", "", "", "", "", "", [], 0, 0, "", False, 0.0)


def read_entry(first_line: bytes, last_lines: bytes) -> Entry:
    """Read what stands before and behind a message. Raises ValueError."""
    names = [one.name for one in dataclasses.fields(Entry)]
    entry = Entry(**_read_values(first_line, names))
    states = []
    for line in last_lines.split(b"\n"):
        with contextlib.suppress(ValueError):
            states.append(_read_values(line, _ENTRY_STATE))
    if not states:
        return entry
    # `spool retry` may have been said while the relay wrote of something else.
    asked_at = max(one["asked_at"] for one in states)
    return dataclasses.replace(entry, **{**states[-1], "asked_at": asked_at})


def _read_values(line: bytes, names: Iterable[str]) -> dict[str, Any]:
    try:
        values = json.loads(line)
        found = {name: values[name] for name in names}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it is damaged") from None
    for name, value in found.items():
        kind = type(getattr(_ENTRY, name))
        if (type(value) is not kind
                or (kind in (int, float) and not 0 <= value < 2 ** 33)   # NaN; 2242
                or (kind is list and any(type(one) is not str for one in value))):
            raise ValueError("it is damaged")
    return found


def as_stored(message: bytes, entry: Entry) -> Outgoing:
    """Make ready what was made ready before it was stored. Raises DeliveryError."""
    header = message[:entry.header_size]
    prepared = Prepared(entry.mailbox, header, header,
                        memoryview(message)[entry.header_size:])
    if prepared.size <= GRAPH_MESSAGE_LIMIT:
        return Outgoing(prepared)
    return Outgoing(prepared, make_draft(message, prepared))


def pause_after(failures: int, chance: float) -> float:
    """Seconds to wait after so many failures; `chance` is from 0 to 1."""
    pause = min(FIRST_PAUSE * 2.0 ** min(failures - 1, 20), LAST_PAUSE)
    return pause * (0.8 + 0.4 * chance)


def make_notice(entry: Entry, header: bytes, reporter: str, ident: str,
                now: float) -> bytes:
    """Write to who sent a message that it was given up; RFC 3464, RFC 3834 section 3."""
    subject = split_header(header, is_read=b"subject".__eq__).find(b"subject")
    named = f"Subject:     {_one_line(_unfolded(subject[0]))[:200]}\n" if subject else ""
    recipients = "\n             ".join(entry.recipients)
    arrived, ended = (email.utils.formatdate(one) for one in (entry.queued_at, now))
    status = re.search(r"\b[45]\.\d{1,3}\.\d{1,3}\b", entry.reason)
    text = (f"This is the SMTP relay at {reporter}. A message could not be delivered, and "
            f"is not tried any more.\n\n{named}Recipients:  {recipients}\n"
            f"Arrived:     {arrived}\nTries:       {entry.tries}\n"
            f"Reason:      {entry.reason}\nID:          {entry.ident}\n\nIt is kept by the "
            "relay; its administrator can send it again.\n")
    report = "".join(
        f"\nFinal-Recipient: {_typed_address(one)}\nAction: failed\n"
        f"Status: 5{status[0][1:] if status else '.0.0'}\n"
        f"Diagnostic-Code: smtp; {harmless(entry.reason)[:900]}\n"
        f"Last-Attempt-Date: {ended}\n"
        for one in entry.recipients)
    report = f"Reporting-MTA: dns; {reporter}\nArrival-Date: {arrived}\n{report}"
    mark = f"=_{ident}"
    head = (f"From: Mail relay <{entry.mailbox}>\nTo: <{entry.reverse_path}>\n"
            f"Subject: Undelivered mail\nDate: {ended}\nMessage-ID: <{ident}@{reporter}>\n"
            "Auto-Submitted: auto-replied\nMIME-Version: 1.0\n"
            "Content-Type: multipart/report; report-type=delivery-status;\n"
            f' boundary="{mark}"\n')
    parts = [("text/plain; charset=utf-8", text.encode(errors="replace")),
             ("message/delivery-status", report.encode()),
             ("text/rfc822-headers", header)]
    return head.encode().replace(b"\n", b"\r\n") + b"".join(
        f"\r\n--{mark}\r\nContent-Type: {kind}\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
        .encode() + octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        for kind, octets in parts) + f"\r\n--{mark}--\r\n".encode()


def _typed_address(mailbox: str) -> str:
    """Name a recipient in a report; RFC 6533 section 3 for one beyond ASCII."""
    if mailbox.isascii():
        return f"rfc822; {mailbox}"
    return "utf-8; " + "".join(c if "!" <= c <= "~" and c not in "\\+=" else
                               f"\\x{{{ord(c):X}}}" for c in mailbox)


# ---------------------------------------------------------------------------
# §10  Log
# ---------------------------------------------------------------------------
#
# One line for an event: time, level, the id of the session or the message, the event,
# key=value. What an admin must mend is WARNING or ERROR; a client's mistake is INFO.
# Passwords, secrets, tokens and content are never given to a function of this section.

MAX_LOGGED_TEXT = 1000          # characters of one value
LOG_QUEUE = 10_000              # lines that may wait to be written

log = logging.getLogger("smtp_oauth_relay")

for _needed in ("unicode_escape", "idna"):      # Python would load them when it may be
    codecs.lookup(_needed)                      # too late: after RUN_AS, or out of files


def log_event(level: int, ident: str, event: str, **facts: object) -> None:
    """Log an event with its facts."""
    if log.isEnabledFor(level):
        log.log(level, "%s %s%s", ident, event, in_words(facts))


def in_words(facts: Mapping[str, object]) -> str:
    """Write facts behind something; those that are None are left out."""
    return "".join(f" {name.replace('_', '-')}={escaped(value)}"
                   for name, value in facts.items() if value is not None)


def escaped(value: object) -> str:
    """Make a value one word, or a quoted one with everything odd escaped."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)[:MAX_LOGGED_TEXT]
    if re.fullmatch(r"[!#-&(-<>-\[\]-~]+", text):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


class LogQueue(logging.handlers.QueueHandler):
    """Drops lines while the queue is full, and counts them."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a line; the first one that fits again reports how many were dropped."""
        if self.dropped:
            record.msg = f"{record.msg} (lines lost before this one: {self.dropped})"
        try:
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1


@contextlib.contextmanager
def logging_to_stderr(level: str) -> Iterator[None]:
    """Write the log to standard error from a thread, because a full pipe blocks it."""
    stream = logging.StreamHandler()
    stream.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s",
                                          "%Y-%m-%dT%H:%M:%S%z"))
    lines: queue.Queue[Any] = queue.Queue(LOG_QUEUE)
    listener = logging.handlers.QueueListener(lines, stream)
    handler = LogQueue(lines)
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("asyncio").setLevel("ERROR")      # it warns of clients' mistakes
    log.setLevel(level)
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(handler)
        with (done := lines.all_tasks_done):
            is_written = done.wait_for(lambda: not lines.unfinished_tasks, 2)
        if not is_written:              # nobody reads, and Python would wait at its exit
            error = sys.exc_info()[1]
            os._exit(2 if isinstance(error, ConfigError) else
                     0 if error is None or isinstance(error, SystemExit) else 1)
        listener.stop()


# ---------------------------------------------------------------------------
# §11  HTTP
# ---------------------------------------------------------------------------
#
# http.client in worker threads, one call each; the event loop only waits, and never
# longer than the call's deadline (time.monotonic) and GRACE. http.client's own time-outs
# are for one socket operation, so at the deadline the loop shuts the socket under the
# thread.

MAX_ANSWER = 65536              # octets of a body that are read
KEEP = 60.0                     # seconds an idle connection is kept: firewalls forget them
KEPT_CONNECTIONS = 100          # for one host
REFUSED_PAUSES = (0.2, 1.0)     # seconds before another try when a connection is refused
GRACE = 2.0                     # seconds for a thread to end after its socket was shut
REST_OF_202 = 1.0               # seconds for the end of a 202 without a body


class NoAnswer(TemporaryError):
    """Microsoft was not reached, or did not answer in time, or answered nonsense."""

    status = "4.4.1"

    def __init__(self, what: object) -> None:
        super().__init__("No answer from Microsoft; try again later",
                         facts={"problem": what})


class NotSent(ConnectionError):
    """A connection ended before the request went out whole: nothing can have happened."""


@dataclass(frozen=True)
class HttpRequest:
    """A request; the URL may hold a secret. `most` octets of the answer are read."""

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | Base64 = field(default=b"", repr=False)
    most: int = MAX_ANSWER


class _Response(http.client.HTTPResponse):
    """A response of which a 202 counts as soon as its status line is there."""

    def begin(self) -> None:
        """Read status line and header; a broken header behind a 202 is no header."""
        try:
            super().begin()
            while self.status < 200:    # 103 and the like: another one follows
                self.headers = None     # type: ignore[assignment]
                super().begin()
        except (OSError, http.client.HTTPException, ValueError):
            if self.status != 202:
                raise
            self.headers = self.msg = http.client.HTTPMessage()
            self.length, self.chunked, self.will_close = 0, False, True


class Origin(NamedTuple):
    """Where connections go; `proxy` is a URL, or "" for none."""

    scheme: str
    host: str
    port: int
    proxy: str

    def connect(self, context: ssl.SSLContext | None,
                timeout: float) -> http.client.HTTPConnection:
        """Make a connection, not yet open. Without a context there is one of its own."""
        if self.scheme == "http":
            connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        elif not self.proxy:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=timeout,
                                                     context=context)
        else:
            proxy = urllib.parse.urlsplit(self.proxy)
            connection = http.client.HTTPSConnection(
                proxy.hostname or "", proxy.port or 80, timeout=timeout, context=context)
            connection.set_tunnel(self.host, self.port, headers=_proxy_headers(proxy))
        connection.response_class = _Response
        return connection


def _proxy_headers(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user = urllib.parse.unquote(proxy.username)
    password = urllib.parse.unquote(proxy.password or "")
    credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Proxy-Authorization": f"Basic {credentials}"}


def find_origin(url: str) -> Origin:
    """Find where a URL leads, by HTTPS_PROXY and NO_PROXY.

    Plain http is for this machine only and takes no proxy: it holds secrets.
    """
    parts = urllib.parse.urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    proxy = ""
    if secure and not urllib.request.proxy_bypass(f"{host}:{port}"):
        proxy = urllib.request.getproxies().get("https", "").strip()
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    return Origin(parts.scheme, host, port, proxy)


async def done_by(deadline: float, future: asyncio.Future[Any]) -> bool:
    """Wait for a future, but not longer than until `deadline`; say whether it is done."""
    await asyncio.wait({future}, timeout=max(0.0, deadline - time.monotonic()))
    return future.done()


async def in_time(deadline: float, future: asyncio.Future[T]) -> T:
    """Wait for what nobody else waits for. Raises TimeoutError when time is up."""
    try:
        if not await done_by(deadline, future):
            raise TimeoutError("time is up")
        return future.result()
    finally:
        future.cancel()                 # or asyncio would tell of an error nobody asked for
        del future                      # see _work


def in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run a blocking call in a thread of its own; the future is its outcome.

    The thread is a daemon: one that hangs in the operating system (a DNS look-up) must
    neither keep the process from ending nor take a place that others wait for.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(typing.cast(T, result))
        else:
            future.set_exception(error)

    try:
        threading.Thread(target=_work, args=(call, loop, settle), name="relay-call",
                         daemon=True).start()
    except RuntimeError as error:                       # the system has no more threads
        settle(None, TemporaryError(f"The relay is too busy: {error}"))
    return future


def _work(call: Callable[[], T], loop: asyncio.AbstractEventLoop,
          settle: Callable[[T | None, BaseException | None], None]) -> None:
    result, error = None, None
    try:
        result = call()
    except BaseException as caught:     # noqa: BLE001 - for who awaits the future
        error = caught
    with contextlib.suppress(RuntimeError):             # the loop has ended meanwhile
        loop.call_soon_threadsafe(settle, result, error)
    # The traceback of the error has this frame, and what it holds would be held with it,
    # in a ring that only the garbage collector breaks: secrets, and messages of megabytes.
    # So here, and wherever an error comes from a future, the frame lets go of that.
    del call, loop, settle, result, error


async def worked_out(deadline: float, call: Callable[[], T]) -> T:
    """Do something in a thread. Raises NoAnswer if time is up."""
    try:
        return await in_time(deadline, in_thread(call))
    except TimeoutError as error:
        raise NoAnswer(error) from None


class HttpExchange:
    """One request and its answer, in a worker thread; the loop may cut it off."""

    def __init__(self, origin: Origin, request: HttpRequest,
                 context: ssl.SSLContext | None,
                 kept: http.client.HTTPConnection | None, deadline: float) -> None:
        self.origin = origin
        self.connection = kept
        self.is_connected = kept is not None
        self._request: HttpRequest | None = request
        self._context = context
        self._deadline = deadline
        self._sock: socket.socket | None = None     # the connection may let go of it
        self._is_cut_off = False

    # In the loop.

    def cut_off(self) -> None:
        """Make the thread end soon: shut its socket."""
        self._is_cut_off = True         # first, see _check
        if not self.is_connected:       # a look-up may hang for long: not with a message
            self._request = None
        sock = self._sock or (self.connection.sock if self.connection else None)
        if sock is not None:
            with contextlib.suppress(OSError):
                # Not sock.shutdown(): of a TLS socket that drops the encryption first,
                # and the thread could then write in the clear.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    # In the thread.

    def run(self) -> HttpResponse:
        """Send the request, on a new connection if the kept one turns out closed."""
        is_done = False
        try:
            response = self._run()
            is_done = not self._is_cut_off
            return response
        finally:
            if self.connection is not None and not is_done:
                self.connection.close()

    def _run(self) -> HttpResponse:
        if self.connection is not None:
            with contextlib.suppress(NotSent):
                if _is_quiet(self.connection.sock):
                    return self._exchange(self.connection)
            self.connection.close()
            self.is_connected = False
        self.connection = self.origin.connect(self._context, self._time_left())
        self.connection.connect()
        self.is_connected = True
        return self._exchange(self.connection)

    def _exchange(self, connection: http.client.HTTPConnection) -> HttpResponse:
        self._check(connection)
        request = self._request
        assert request is not None      # or _check had known
        url = urllib.parse.urlsplit(request.url)
        target = f"{url.path}?{url.query}" if url.query else url.path
        try:
            length = {} if request.method == "GET" else {
                "Content-Length": str(len(request.body))}
            connection.request(request.method, target, request.body or None,
                               {**request.headers, **length})
        except OSError as error:
            return self._early_answer(connection, request.most, error)
        self._check(connection)
        return self._answer(connection, request.most)

    def _early_answer(self, connection: http.client.HTTPConnection, most: int,
                      error: OSError) -> HttpResponse:
        """Read why a request was not taken whole, such as 413."""
        try:
            return self._answer(connection, most)
        except (OSError, http.client.HTTPException, ValueError):
            # Not from the error: that would close a ring, see _work.
            raise NotSent(str(error) or type(error).__name__) from None

    def _answer(self, connection: http.client.HTTPConnection, most: int) -> HttpResponse:
        response = connection.getresponse()
        if self._is_cut_off and response.status != 202:
            raise TimeoutError("time is up")    # the header may have lost its end
        headers = {name.lower(): value for name, value in response.getheaders()}
        if response.status == 202:
            assert self._sock is not None
            self._sock.settimeout(REST_OF_202)
            most = 1                    # enough to see that there is nothing
        body, is_whole = b"", False
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            while len(body) < most and not response.isclosed():
                part = response.read(most - len(body))
                if not part:
                    break
                body += part
            is_whole = response.isclosed()      # which it is after some errors too
        if not is_whole:
            connection.close()
        return HttpResponse(response.status, headers, body)

    def _check(self, connection: http.client.HTTPConnection) -> None:
        """Set the time-out to what is left. Raises TimeoutError if that is nothing."""
        left = self._time_left()
        if self._is_cut_off:            # cut_off() may have come before there was a socket
            raise TimeoutError("time is up")
        self._sock = connection.sock
        self._sock.settimeout(left)

    def _time_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("time is up")
        return left


def _is_quiet(sock: socket.socket | None) -> bool:
    """Whether a kept connection is open still, and nothing waits to be read from it."""
    if sock is None:
        return False
    try:
        sock.settimeout(0)
        sock.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        pass
    return False


class HttpPool:
    """Sends requests, and keeps connections for the next ones."""

    def __init__(self, urls: Iterable[str]) -> None:
        """Get ready to send to the hosts of these URLs."""
        self._origins = {_base(url): find_origin(url) for url in urls}
        secure = any(origin.scheme == "https" for origin in self._origins.values())
        # Reading the system's certificates takes a while: not where nobody asks for them.
        self._context = ssl.create_default_context() if secure else None
        self._kept: dict[Origin, list[tuple[http.client.HTTPConnection, float]]] = {}
        self._closer: asyncio.TimerHandle | None = None

    async def send(self, request: HttpRequest, deadline: float) -> HttpResponse:
        """Send a request. Raises NoAnswer.

        A refused connection is tried three times; nothing else is, as it may have been
        received.
        """
        origin = self._origins.get(_base(request.url))
        if origin is None:              # in a thread: some systems look names up for this
            origin = await worked_out(deadline, lambda: find_origin(request.url))
        for pause in (*REFUSED_PAUSES, None):
            try:
                return await self._exchange(origin, request, deadline)
            except ConnectionRefusedError as error:
                if pause is None or time.monotonic() + pause >= deadline:
                    raise NoAnswer(error) from None
                await asyncio.sleep(pause)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise NoAnswer(str(error) or type(error).__name__) from None
        raise AssertionError("the last pause is None")

    async def _exchange(self, origin: Origin, request: HttpRequest,
                        deadline: float) -> HttpResponse:
        exchange = HttpExchange(origin, request, self._context, self._take(origin),
                                deadline)
        future = in_thread(exchange.run)
        try:
            if not await done_by(deadline, future):
                exchange.cut_off()
                # A thread with a connection soon says how it ended, perhaps with a 202;
                # one that has none yet may hang in a look-up, and will send nothing.
                await asyncio.wait({future}, timeout=GRACE if exchange.is_connected else 0)
            if not future.done():
                raise TimeoutError("time is up")
            response = future.result()
        except asyncio.CancelledError:
            if request.method != "POST" or not _is_accepted(future):
                exchange.cut_off()
                raise
            response = future.result()  # it came too late: the message is sent
        finally:
            future.cancel()             # or asyncio would tell of an error nobody asked for
            del future                  # see _work
        if exchange.connection is not None:
            self._give_back(origin, exchange.connection)
        return response

    def _take(self, origin: Origin) -> http.client.HTTPConnection | None:
        kept = self._kept.get(origin)
        if not kept or kept[-1][1] < time.monotonic():
            return None
        return kept.pop()[0]

    def _give_back(self, origin: Origin, connection: http.client.HTTPConnection) -> None:
        kept = self._kept.setdefault(origin, [])
        if connection.sock is None or len(kept) >= KEPT_CONNECTIONS:
            connection.close()
            return
        kept.append((connection, time.monotonic() + KEEP))
        if self._closer is None:
            self._close_old()

    def close(self) -> None:
        """Close the connections that are kept."""
        for kept in self._kept.values():
            while kept:
                kept.pop()[0].close()

    def _close_old(self) -> None:
        """Close what has been idle for long, and look again as long as there is more."""
        for origin, kept in list(self._kept.items()):
            while kept and kept[0][1] < time.monotonic():
                kept.pop(0)[0].close()
            if not kept:
                del self._kept[origin]
        self._closer = None
        if self._kept:
            self._closer = asyncio.get_running_loop().call_later(KEEP, self._close_old)


def _is_accepted(future: asyncio.Future[HttpResponse]) -> bool:
    """Whether a request has ended in a 202, which nobody may have seen yet."""
    return future.done() and not future.exception() and future.result().status == 202


def _base(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


# ---------------------------------------------------------------------------
# §12  Tokens
# ---------------------------------------------------------------------------
#
# A secret or the token of a workload identity is traded at Entra ID; a managed identity
# is asked for at an address near by, never through a proxy. Microsoft, "How to use
# managed identities for Azure resources", "... App Service", "... Azure Arc".

REFUSALS_LAST = 30.0            # seconds: a device with a wrong password tries and tries
LEAST_TIME = 0.1                # of UPSTREAM_TIMEOUT must be left for a try to be of use
MAX_CACHED = 1000               # of anything
MAX_SECRET = 65536              # octets of a file
IDENTITY_TIMEOUT = 10.0         # seconds for an answer of a managed identity
IDENTITY_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)        # before it is asked again
ARC_ENDPOINT = "http://localhost:40342/metadata/identity/oauth2/token"
ARC_AGENTS = ("/opt/azcmagent/bin/himds", os.path.expandvars(
    r"%ProgramFiles%\AzureConnectedMachineAgent\himds.exe"))
ARC_KEYS = pathlib.Path(os.path.expandvars(
    r"%ProgramData%\AzureConnectedMachineAgent\Tokens" if os.name == "nt" else
    "/var/opt/azcmagent/tokens"))

Key = tuple[str, str, str, str, bytes]  # tenant, client, credential, resource, keyed hash


class Cache(Generic[K, T]):
    """Values that expire. Of more than MAX_CACHED the oldest goes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values: dict[K, tuple[T, float]] = {}     # and when it expires

    def get(self, key: K) -> T | None:
        """Return the value, or None if there is none or it has expired."""
        value, expires_at = self._values.get(key, (None, 0.0))
        return value if self._clock() < expires_at else None

    def put(self, key: K, value: T, seconds: float) -> None:
        """Keep a value for so many seconds."""
        self._values.pop(key, None)
        self._values[key] = value, self._clock() + seconds
        if len(self._values) > MAX_CACHED:
            del self._values[next(iter(self._values))]

    def pop(self, key: K) -> T | None:
        """Return the value as get() does, and remove it."""
        value = self.get(key)
        self._values.pop(key, None)
        return value


def read_secret(path: str | pathlib.Path) -> str:
    """Read a secret from a file. Raises OSError; ValueError says what it must be."""
    with open(path, "rb") as file:
        octets = file.read(MAX_SECRET + 1).strip()
    if len(octets) > MAX_SECRET or not re.fullmatch(b"[!-~]([ -~]*[!-~])?", octets):
        raise ValueError("one line of printable ASCII")
    return octets.decode()


class Tokens:
    """Fetches access tokens; one request serves all who need the same.

    A key holds a keyed hash of the secret, so a wrong secret never meets the token of
    another, and no secret stays here.
    """

    def __init__(self, config: Config, pool: HttpPool,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._pool = pool
        self._hash_key = secrets.token_bytes(32)
        self._tokens: Cache[Key, str] = Cache(clock)
        self._refusals: Cache[Key, AuthError] = Cache(clock)
        self._fetches: dict[Key, tuple[asyncio.Task[str], float]] = {}   # and its deadline
        self._is_arc = bool((config.identity_endpoint and config.imds_endpoint)
                            or any(map(os.path.exists, ARC_AGENTS)))

    async def get(self, application: Application, deadline: float,
                  resource: str = "") -> str:
        """Return a token that lasts a while; for Graph, or for another resource.

        Raises AuthError and TemporaryError: this if our own credential is refused.
        """
        try:
            return await self._get(application, deadline,
                                   resource or self._config.graph_endpoint)
        except AuthError as error:
            if not application.is_ours:
                raise
            raise TemporaryError(
                f"The relay's own credential is refused ({error.reply.text})", 451, "4.7.0",
                facts=error.facts, level=logging.ERROR) from None

    async def _get(self, application: Application, deadline: float, resource: str) -> str:
        key = self._key(application, resource)
        token = self._tokens.get(key)
        if token:
            return token
        refusal = self._refusals.get(key)
        if refusal:
            raise _fresh(refusal)
        latest = deadline - LEAST_TIME * self._config.upstream_timeout
        while True:
            if key not in self._fetches:
                fetch = asyncio.ensure_future(self._fetch(key, application, deadline))
                self._fetches[key] = fetch, deadline
                fetch.add_done_callback(functools.partial(self._fetched, key))
            fetch, ends_at = self._fetches[key]
            if not await done_by(deadline + GRACE, fetch):
                raise NoAnswer("time is up")
            try:
                return fetch.result()
            except NoAnswer:            # in the time of who came first; there may be more
                if not ends_at <= time.monotonic() < latest:
                    raise
            finally:
                del fetch               # see _work

    def forget(self, application: Application, token: str, resource: str = "") -> None:
        """Drop a token that is not accepted, unless there is another already."""
        key = self._key(application, resource or self._config.graph_endpoint)
        if self._tokens.get(key) == token:
            self._tokens.pop(key)

    async def _fetch(self, key: Key, application: Application, deadline: float) -> str:
        resource, secret = key[3], application.secret
        if application.credential == "managed-identity":
            response, secret = await self._ask_identity(application.client, resource,
                                                        deadline)
        else:
            if application.credential == "workload-identity":
                secret = await _in_file(self._config.azure_federated_token_file, deadline)
            response = await self._pool.send(
                self._request(application, secret, resource), deadline)
        try:
            token = read_token(response, secret, time.time())
        except AuthError as error:
            self._refusals.put(key, _fresh(error), REFUSALS_LAST)
            raise
        self._tokens.put(key, token.value, token.life)
        return token.value

    def _request(self, application: Application, secret: str, resource: str) -> HttpRequest:
        base = self._config.azure_authority_host
        tenant = urllib.parse.quote(application.tenant, safe="")
        proof = {"client_secret": secret}
        if application.credential == "workload-identity":
            proof = {"client_assertion": secret, "client_assertion_type":
                     "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}
        form = {"client_id": application.client, **proof, "scope": f"{resource}/.default",
                "grant_type": "client_credentials"}
        return HttpRequest(
            "POST", f"{base}/{tenant}/oauth2/v2.0/token",
            {"Content-Type": "application/x-www-form-urlencoded",
             "Accept": "application/json", "User-Agent": USER_AGENT},
            urllib.parse.urlencode(form).encode())

    async def _ask_identity(self, client: str, resource: str,
                            deadline: float) -> tuple[HttpResponse, str]:
        """Ask for a managed identity, again while it is not ready; returns the answer, and
        the secret that it may repeat.
        """
        request = self._identity_request(client, resource)
        is_service, key = "Metadata" not in request.headers, self._config.identity_header
        for pause in (*IDENTITY_PAUSES, None):
            soon = min(deadline, time.monotonic() + IDENTITY_TIMEOUT)
            try:
                response = await self._pool.send(request, soon)
                if response.status == 401 and self._is_arc and not is_service:
                    key = await _in_file(_arc_key(response), soon)
                    response = await self._pool.send(dataclasses.replace(
                        request, headers={**request.headers,
                                          "Authorization": f"Basic {key}"}), soon)
            except NoAnswer as error:
                error.facts["identity"] = request.url.partition("?")[0]
                raise
            if ((response.status not in (404, 410, 429) and response.status < 500)
                    or pause is None or time.monotonic() + pause >= deadline):
                return response, key
            await asyncio.sleep(pause)
        raise AssertionError("the last pause is None")

    def _identity_request(self, client: str, resource: str) -> HttpRequest:
        config, headers = self._config, {"Metadata": "true"}
        try:
            endpoint = near_url(config.identity_endpoint or ARC_ENDPOINT)
        except ValueError as error:
            raise TemporaryError("The relay has no identity that it can ask for", facts={
                "problem": f"IDENTITY_ENDPOINT must be {error}"}) from None
        if config.identity_endpoint and config.identity_header:     # App Service
            url, version = endpoint, "2019-08-01"
            headers = {"X-IDENTITY-HEADER": config.identity_header}
        elif self._is_arc:
            url, version = endpoint, "2020-06-01"
            if client:
                raise TemporaryError("Azure Arc has no user-assigned identity", facts={
                    "problem": "leave client_id, or AZURE_CLIENT_ID, empty on Azure Arc"})
        else:
            url, version = (f"{config.azure_pod_identity_authority_host}"
                            "/metadata/identity/oauth2/token", "2018-02-01")
        query = {"api-version": version, "resource": resource}
        if client:
            query["client_id"] = client
        mark = "&" if "?" in url else "?"
        return HttpRequest("GET", f"{url}{mark}{urllib.parse.urlencode(query)}",
                           {**headers, "User-Agent": USER_AGENT})

    def _fetched(self, key: Key, fetch: asyncio.Task[str]) -> None:
        del self._fetches[key]
        if not fetch.cancelled():
            fetch.exception()           # it is known, even if nobody waits any more

    def _key(self, application: Application, resource: str) -> Key:
        digest = hmac.digest(self._hash_key, application.secret.encode(), "sha256")
        return (application.tenant, application.client, application.credential, resource,
                digest)


async def _in_file(path: str | pathlib.Path, deadline: float) -> str:
    """Read a secret in a thread. Raises TemporaryError."""
    try:
        return await in_time(deadline, in_thread(functools.partial(read_secret, path)))
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    raise TemporaryError("The relay's own credential cannot be read", facts={
        "problem": f"{path}: {problem}"}, level=logging.ERROR)


def _arc_key(response: HttpResponse) -> pathlib.Path:
    """Find the file that only who may have Arc's identity can read."""
    challenge = response.headers.get("www-authenticate", "")
    path = pathlib.Path(challenge.partition("realm=")[2].strip())
    if path.parent != ARC_KEYS or path.suffix != ".key":
        raise NoAnswer("a challenge that names no key of Azure Arc")
    return path


def _fresh(error: AuthError) -> AuthError:
    """Copy an error without its traceback, which holds the frames, and these the secret."""
    return AuthError(error.reply.text, facts=error.facts, level=error.level)


# ---------------------------------------------------------------------------
# §13  Directory
# ---------------------------------------------------------------------------
#
# Where accounts are found: in ACCOUNTS_FILE, in the Azure table, or in a user name itself.

READ_AGAIN = 3.0                # seconds between two looks at ACCOUNTS_FILE
MAX_LOOKS = 3                   # that see it change until it is read all the same
MAX_ACCOUNTS = 4_194_304        # octets of ACCOUNTS_FILE
MAX_FAILURES = 10               # of logins from one address, in
FAILURES_LAST = 600.0           # seconds
FAILURE_PAUSE = 0.5             # seconds for each failure before a refusal
MAX_FAILURE_PAUSE = 5.0
TABLE_LASTS = 60.0              # seconds that an answer of the table is remembered
AZURE_PAUSES = (1.0, 3.0)       # seconds before Azure is asked again
MAX_PAGES = 20                  # of an answer of the table
STORAGE = "https://storage.azure.com"
_NOBODY = f"scrypt${'A' * 22}${'A' * 43}"       # a hash that no password has
_NO_ROW_KEY = re.compile(r"[/\\#?\x00-\x1f\x7f-\x9f]")


class AccountsFile:
    """ACCOUNTS_FILE, and the files of secrets that it names."""

    def __init__(self, config: Config) -> None:
        self.accounts = Accounts()
        self._config = config
        self._when_read: dict[str, object] = {}     # what _look saw, by path
        self._last_look: dict[str, object] = {}
        self._changed_looks = 0                     # in a row
        self._problem = ""                          # that was told
        self._wake: asyncio.Event | None = None     # to read it at once

    def load(self) -> None:
        """Read it. Raises ConfigError with all faults; the old accounts stay then."""
        path = self._config.accounts_file
        self._when_read = {path: _look(path)}       # before it is read
        try:
            with open(path, "rb") as file:
                octets = file.read(MAX_ACCOUNTS + 1)
            text = octets.decode("utf-8-sig")
        except (OSError, UnicodeError) as error:    # which may hold the text
            self._when_read[path] = None            # so that it is tried again
            problem = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"ACCOUNTS_FILE={path!r}: cannot be read: "
                              f"{problem}") from None
        if len(octets) > MAX_ACCOUNTS:
            raise ConfigError(f"ACCOUNTS_FILE={path!r}: is larger than {MAX_ACCOUNTS} "
                              "octets")
        accounts, faults = parse_accounts(text, self._config)
        users = {one.client_secret_file: one.name for one in reversed(accounts)}
        found = {file: self._read_secret(file, name, faults)
                 for file, name in users.items() if file}
        if faults:
            raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
        self.accounts = Accounts(dataclasses.replace(
            one, client_secret=found.get(one.client_secret_file, one.client_secret))
            for one in accounts)
        if any(one.client_secret or one.password for one in self.accounts):
            self._check_modes()

    def _read_secret(self, path: str, name: str, faults: list[str]) -> str:
        self._when_read[path] = _look(path)
        try:
            return read_secret(path)
        except OSError as error:
            self._when_read[path] = None
            problem = f"cannot be read: {error.strerror}"
        except ValueError as error:
            problem = f"must hold {error}"
        faults.append(f"[{name}] client_secret_file = {path}: {problem}")
        return ""

    def _check_modes(self) -> None:
        for path in self._when_read if os.name == "posix" else ():
            with contextlib.suppress(OSError):
                if os.stat(path).st_mode & 0o004:
                    log_event(logging.WARNING, "-", "accounts", file=path, problem="all "
                              "users of this machine can read these secrets; chmod o-r")

    def check_access(self) -> None:
        """Warn if it could be read as root, and cannot be read again."""
        for path in self._when_read:
            if not os.access(path, os.R_OK):
                log_event(logging.WARNING, "-", "accounts", file=path, problem="a change "
                          "cannot be read; give the file to the user RUN_AS")

    def ask(self) -> None:
        """Have it read at once."""
        if self._wake:
            self._wake.set()

    async def watch(self) -> None:
        """Read it when it has changed, and has then not changed for a moment."""
        self._wake = asyncio.Event()
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), READ_AGAIN)
            is_asked, problem = self._wake.is_set(), ""
            self._wake.clear()
            try:
                # In a thread, and without a deadline: if the disk hangs, only this waits.
                if await in_thread(functools.partial(self._look_again, is_asked)):
                    log_event(logging.INFO, "-", "accounts",
                              loaded=len(list(self.accounts)))
            except (ConfigError, RelayError) as error:
                problem = str(error)
            except Exception as error:          # noqa: BLE001 - else it never looks again
                problem = type(error).__name__
            if problem != self._problem:
                self._problem = problem
                for line in problem.splitlines():
                    log_event(logging.ERROR, "-", "accounts", problem=line,
                              remedy="mend it; the accounts from before stay in force")

    def _look_again(self, is_asked: bool) -> bool:
        """Read it if that is due; returns whether it was."""
        look = {path: _look(path) for path in self._when_read}
        self._changed_looks = self._changed_looks + 1 if look != self._when_read else 0
        is_at_rest, self._last_look = look == self._last_look, look
        if not is_asked and (not self._changed_looks or (
                not is_at_rest and self._changed_looks < MAX_LOOKS)):
            return False
        self._changed_looks = 0
        self.load()
        return True


def _look(path: str) -> object:
    """See whether a file is still the same."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        return str(error)
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


class Azure:
    """Asks services of Azure as the relay itself."""

    def __init__(self, config: Config, pool: HttpPool, tokens: Tokens) -> None:
        self._application = own_application(config)
        self._pool = pool
        self._tokens = tokens

    async def get(self, url: str, resource: str, headers: Mapping[str, str],
                  deadline: float) -> HttpResponse:
        """Get what is there, with a token for a resource unless that is "".

        Raises TemporaryError.
        """
        renewed, pauses = False, iter(AZURE_PAUSES)
        headers = {**headers, "User-Agent": USER_AGENT}
        while True:
            token = ""
            if resource:
                token = await self._tokens.get(self._application, deadline, resource)
                headers["Authorization"] = f"Bearer {token}"
            response = await self._pool.send(HttpRequest("GET", url, headers), deadline)
            is_stale = (response.status == 401 or response.headers.get("x-ms-error-code")
                        == "AuthenticationFailed")      # of Tables, with 403
            if is_stale and token and not renewed:
                renewed = True
                self._tokens.forget(self._application, token, resource)
                continue
            is_passing = response.status in (429, 500, 502, 503, 504)
            pause = next(pauses, None) if is_passing else None
            if pause is None or time.monotonic() + pause >= deadline:
                return response
            await asyncio.sleep(pause)


class Table:
    """The Azure table of accounts; Microsoft, "Query Entities (REST API)"."""

    def __init__(self, config: Config, azure: Azure,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._azure = azure
        self._partition = config.azure_tables_partition_key
        self._url, _, self._sas = config.azure_tables_url.partition("?")
        host = urllib.parse.urlsplit(self._url).hostname or ""
        cosmos = host.partition(".table.")[2]
        self._resource = ("" if self._sas else f"https://{cosmos}"
                          if cosmos.startswith("cosmos.") else STORAGE)
        self._found: Cache[tuple[str, ...], tuple[Account | None]] = Cache(clock)

    async def find(self, name: str, deadline: float) -> Account | None:
        """Find the account of NAME@lookup. Raises TemporaryError."""
        if _NO_ROW_KEY.search(name) or len(name.encode("utf-16-le")) > 1024:
            return None                 # Azure has no such RowKey
        where = f"(PartitionKey={_literal(self._partition)},RowKey={_literal(name)})"
        return await self._find((name,), where, {}, deadline)

    async def find_application(self, tenant: str, client: str,
                               deadline: float) -> Account | None:
        """Find an account of an application. Raises TemporaryError."""
        return await self._find((tenant, client), "()", self._filter(
            tenant_id=tenant, client_id=client), deadline)

    async def check(self, deadline: float) -> None:
        """Raise TemporaryError if the table cannot be read."""
        await self._query("()", self._filter(), deadline)

    def _filter(self, **columns: str) -> dict[str, str]:
        def matches(name: str, *values: str) -> str:
            return "(" + " or ".join(f"{name} eq {urllib.parse.unquote(_literal(value))}"
                                     for value in dict.fromkeys(values)) + ")"

        conditions = [matches("PartitionKey", self._partition)]
        for name, value in columns.items():     # who filled the table wrote it so or so
            short = [encode_uuid(value)] if decode_uuid(value) else []
            conditions.append(matches(name, value, value.upper(), *short))
        return {"$filter": " and ".join(conditions), "$top": "1"}

    async def _find(self, key: tuple[str, ...], where: str, query: dict[str, str],
                    deadline: float) -> Account | None:
        known = self._found.get(key)
        if known:
            return known[0]
        entity = await self._query(where, query, deadline)
        account = None if entity is None else read_account(
            entity, key[0] if len(key) == 1 else "")
        self._found.put(key, (account,), TABLE_LASTS)
        return account

    async def _query(self, where: str, query: dict[str, str],
                     deadline: float) -> dict[str, Any] | None:
        """Ask for an entity; an answer may be empty, and say where to ask on."""
        query = {**query, "$select": "tenant_id,client_id,from_email"}
        for _ in range(MAX_PAGES):
            text = urllib.parse.urlencode(query, safe="$", quote_via=urllib.parse.quote)
            response = await self._azure.get(
                f"{self._url}{where}?{text}{self._sas and '&'}{self._sas}", self._resource,
                {"Accept": "application/json;odata=nometadata",
                 "DataServiceVersion": "3.0;NetFx", "x-ms-version": "2020-12-06",
                 "x-ms-date": email.utils.formatdate(usegmt=True)}, deadline)
            entity = read_entity(response)
            following = {name: response.headers.get(f"x-ms-continuation-{name.lower()}", "")
                         for name in ("NextPartitionKey", "NextRowKey")}
            if entity is not None or not following["NextPartitionKey"]:
                return entity
            query.update({name: value for name, value in following.items() if value})
        raise NoAnswer("a table without an end")


def _literal(value: str) -> str:
    """Quote a key for a path: whatever is in it is data."""
    return "'" + urllib.parse.quote(value.replace("'", "''"), safe="") + "'"


class Failures:
    """Counts refused logins, by a client's address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: Cache[object, list[float]] = Cache(clock)

    def check(self, address: IpAddress | None) -> None:
        """Raise TemporaryError for an address that failed too often."""
        if self.is_blocked(address):
            raise TemporaryError("Too many failed logins from your address; try again "
                                 "later", 421, "4.7.0", close=True)

    def is_blocked(self, address: IpAddress | None) -> bool:
        """Say whether an address failed too often."""
        return len(self._recent(address)) >= MAX_FAILURES

    def add(self, address: IpAddress | None) -> float:
        """Count a failure; returns the seconds to wait before it is told."""
        times = [*self._recent(address), self._clock()]
        self._times.put(_site(address), times, FAILURES_LAST)
        return min(len(times) * FAILURE_PAUSE, MAX_FAILURE_PAUSE)

    def _recent(self, address: IpAddress | None) -> list[float]:
        times = self._times.get(_site(address)) or []
        return [one for one in times if self._clock() < one + FAILURES_LAST]


def _site(address: IpAddress | None) -> object:
    """Whoever has an IPv6 address has all of its /64."""
    if isinstance(address, ipaddress.IPv6Address):
        return ipaddress.ip_network((address, 64), strict=False)
    return address


class Directory:
    """Finds out who logs in."""

    def __init__(self, config: Config, azure: Azure) -> None:
        self.file = AccountsFile(config)
        self.table = Table(config, azure) if config.azure_tables_url else None
        self.failures = Failures()
        self._config = config
        # Two at once, as each takes 32 MiB.
        self._scrypt = concurrent.futures.ThreadPoolExecutor(2, "relay-scrypt")

    def close(self) -> None:
        """Check no more passwords."""
        self._scrypt.shutdown(wait=False, cancel_futures=True)

    def shown(self, username: str) -> str:
        """Show a user name for the log; what is none may be a password."""
        is_name = self.file.accounts.find(username) or self._lookup_name(username)
        if not is_name:
            try:
                parse_username(username, self._config.username_delimiter)
            except AuthError:
                return f"*** ({len(username)} characters)"
        return username

    async def find(self, login: Authenticate, address: IpAddress | None,
                   deadline: float) -> Login:
        """Check a login, but for what Entra must say. Raises AuthError, TemporaryError."""
        name = self._lookup_name(login.username)
        account = (self.file.accounts.find(login.username)
                   or (self.file.accounts.find(name) if name else None)
                   or await self._find_elsewhere(login.username, name, deadline))
        problem = ""
        if account is None:
            problem = "there is no such account"
        elif not account.holds(address):
            problem = "not from its networks"
        elif not account.has_credential:        # Entra will judge the password
            if login.password:
                return Login(account, account.as_application(login.password),
                             login.username)
            if not account.name:
                raise AuthError("The password is empty; it must be the client secret")
            problem = "the password is empty"
        # Every way from here costs one scrypt: nobody learns which names there are.
        hashed = account.password if account else ""
        is_right = await self._is_password(login.password, hashed or _NOBODY, address,
                                           deadline)
        if account is None or problem or not is_right:
            raise AuthError(
                "Wrong user name or password, or not from here; the relay's log says which",
                facts={"account": account.name if account else None, "problem":
                       problem or ("wrong password" if hashed else "it has no password")})
        return Login(account, account.as_application(), login.username)

    def _lookup_name(self, username: str) -> str | None:
        return lookup_name(username, self._config.username_delimiter)

    async def _find_elsewhere(self, username: str, name: str | None,
                              deadline: float) -> Account | None:
        config = self._config
        if name is not None:
            return await self.table.find(name, deadline) if self.table else None
        try:
            tenant, client = parse_username(username, config.username_delimiter)
        except AuthError:
            if config.accounts_file:
                return None             # as slow as a wrong password, and as silent
            raise
        if config.allowed_tenants and tenant not in config.allowed_tenants:
            raise AuthError("This tenant may not log in here, see ALLOWED_TENANTS")
        if not (config.accounts_required or config.azure_tables_force_usage):
            return Account("", tenant, client)
        account = (await self.table.find_application(tenant, client, deadline)
                   if self.table else None)
        if account is None:
            raise AuthError("Only accounts that the relay knows may log in")
        return account

    async def _is_password(self, password: str, hashed: str, address: IpAddress | None,
                           deadline: float) -> bool:
        def check() -> bool:            # others may have failed while this one waited
            return not self.failures.is_blocked(address) and is_password(password, hashed)

        try:
            call = asyncio.get_running_loop().run_in_executor(self._scrypt, check)
        except RuntimeError as error:                   # the system has no more threads
            raise TemporaryError(f"The relay is too busy: {error}") from None
        try:
            return await in_time(deadline, call)
        except TimeoutError:
            raise TemporaryError("Too many logins at once; try again later") from None
        finally:
            del call                    # see _work


# ---------------------------------------------------------------------------
# §14  Graph
# ---------------------------------------------------------------------------
#
# What is tried again within UPSTREAM_TIMEOUT, as it cannot send a message twice:
#
#     401, but of an upload                once, with a new token
#     429, 503 with Retry-After           after that time, in which the mailbox rests
#     404 for a draft that is new         a few times: not all servers know it at once
#     connection refused, or a kept one   §11
#     closed before all was written
#
# Anything else is the answer to the client, or a case for the spool: after a time-out or
# a 504 the message may be on its way already. A large message takes one slot for all of its
# requests, and its draft is deleted if any of them fails.

REQUESTS_AT_ONCE = 4            # for an application and a mailbox, Graph's own limit
LEAST_PAUSE = 0.5               # seconds before anything is tried again
MOST_PAUSE = 86400.0            # seconds; what is longer is garbage
THROTTLED_PAUSE = 5.0           # seconds after a 429 that does not say for how long
DRAFT_DELAYS = (0.5, 1.0, 2.0, 4.0)     # seconds between attempts if a draft is not found
DISCARD_TIMEOUT = 5.0           # seconds to delete a draft, on top of UPSTREAM_TIMEOUT


MailboxKey = tuple[str, str, str]       # tenant, client, mailbox: Graph limits these


class MailboxLimiter:
    """Limits how many messages are sent from a mailbox at once: first come, first served.

    A message from the queue gets a slot when no client waits for one. The queue sends the
    messages of a mailbox one by one, so it never holds more than one slot.
    """

    def __init__(self) -> None:
        self.in_use = 0
        self._live: collections.deque[asyncio.Future[None]] = collections.deque()
        self._queued: collections.deque[asyncio.Future[None]] = collections.deque()

    @contextlib.asynccontextmanager
    async def slot(self, deadline: float, *, is_live: bool) -> AsyncIterator[None]:
        """Hold a slot. Raises TemporaryError if none is free in time."""
        if self.in_use < REQUESTS_AT_ONCE:
            self.in_use += 1
        else:
            await self._wait(self._live if is_live else self._queued, deadline)
        try:
            yield
        finally:
            self._release()

    async def _wait(self, waiting: collections.deque[asyncio.Future[None]],
                    deadline: float) -> None:
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(slot)
        try:
            if not await done_by(deadline, slot):
                raise TemporaryError("Too many messages for this mailbox at once; try "
                                     "again later", 451, "4.4.5")
        except BaseException:
            if slot.done():             # it came at the moment of a cancellation
                self._release()
            else:
                waiting.remove(slot)
            raise

    def _release(self) -> None:
        """Pass a slot on to the next message."""
        waiting = self._live or self._queued
        if waiting:
            waiting.popleft().set_result(None)
        else:
            self.in_use -= 1


@dataclass(frozen=True)
class Errand:
    """On whose behalf Graph is asked, and until when (time.monotonic)."""

    application: Application
    mailbox: str
    ident: str
    deadline: float
    latest: float           # to begin a request, as it must have time to be answered

    @property
    def key(self) -> MailboxKey:
        """Whose limits it is under."""
        return self.application.tenant, self.application.client, self.mailbox.lower()


class Graph:
    """Sends messages; Microsoft Graph v1.0, "user: sendMail", "message: send"."""

    def __init__(self, config: Config, pool: HttpPool, tokens: Tokens) -> None:
        self._config = config
        self._pool = pool
        self._tokens = tokens
        # A limiter is needed as long as a message holds or waits for one of its slots.
        self._limiters: weakref.WeakValueDictionary[MailboxKey, MailboxLimiter] = (
            weakref.WeakValueDictionary())
        self._resume_at: Cache[MailboxKey, float] = Cache()     # time.monotonic()

    async def send(self, application: Application, message: Outgoing, ident: str,
                   deadline: float, *, is_live: bool = False) -> HttpResponse:
        """Send a message; returns the 202. Raises RelayError for anything else.

        `is_live`: a client waits for it. Messages from the queue come after these.
        """
        mailbox = message.prepared.mailbox
        # A request that is soon cut off may have been obeyed, and nobody would know.
        latest = deadline - LEAST_TIME * self._config.upstream_timeout
        errand = Errand(application, mailbox, ident, deadline, latest)
        limiter = self._limiters.setdefault(errand.key, MailboxLimiter())
        async with limiter.slot(latest, is_live=is_live):
            if message.draft:
                return await self._send_draft(errand, message.draft)
            return await self._ask(errand, Step.SEND, self._request(
                errand, "sendMail", message.prepared.encoded))

    def held_for(self, key: MailboxKey) -> float:
        """Return for how many seconds Microsoft wants no request for a mailbox."""
        return max(0.0, (self._resume_at.get(key) or 0.0) - time.monotonic())

    # Large messages.

    async def _send_draft(self, errand: Errand, draft: Draft) -> HttpResponse:
        """Make a draft, attach the files, send it; if anything fails, delete it."""
        # The answer repeats the text, perhaps with an escape for each character.
        create = self._request(errand, "messages", draft.content,
                               most=MAX_ANSWER + 6 * len(draft.content))
        ident = read_id(await self._ask(errand, Step.CREATE, create))
        if not ident:
            raise NoAnswer("a draft without an id")
        path = f"messages/{urllib.parse.quote(ident, safe='')}"
        try:
            for attachment in draft.attachments:
                await self._attach(errand, f"{path}/attachments", attachment)
            return await self._ask(errand, Step.SEND_DRAFT,
                                   self._request(errand, f"{path}/send"))
        except BaseException:
            await self._discard(errand, path)
            raise

    async def _attach(self, errand: Errand, path: str, attachment: Attachment) -> None:
        if not attachment.is_large:
            content = await worked_out(errand.deadline, attachment.as_json)
            await self._ask(errand, Step.ATTACH, self._request(errand, path, content))
            return
        item = {"attachmentType": "file", "size": attachment.size,
                **attachment.properties()}
        response = await self._ask(errand, Step.ATTACH, self._request(
            errand, f"{path}/createUploadSession",
            json.dumps({"AttachmentItem": item}).encode()))
        url = read_upload_url(
            response, allow_http=self._config.graph_endpoint.startswith("http:"))
        if not url:
            raise NoAnswer("an upload session without a URL that can be used")
        await self._upload(errand, url, attachment)

    async def _upload(self, errand: Errand, url: str, attachment: Attachment) -> None:
        """Send a file in pieces, to the host that Graph named, and without the token."""
        pieces, begin = filter(None, attachment.part.pieces()), 0
        while begin < attachment.size:
            piece = await worked_out(errand.deadline, functools.partial(next, pieces, b""))
            end = begin + len(piece)
            response = await self._ask(errand, Step.UPLOAD, HttpRequest("PUT", url, {
                "Content-Type": "application/octet-stream", "User-Agent": USER_AGENT,
                "Content-Range": f"bytes {begin}-{end - 1}/{attachment.size}"}, piece))
            if next_range(response) not in (None, end):
                raise NoAnswer("a piece of an upload was lost")
            begin = end

    async def _discard(self, errand: Errand, path: str) -> None:
        """Delete a draft that is not sent; if that fails it stays, and the log says so."""
        deadline = time.monotonic() + DISCARD_TIMEOUT
        errand = dataclasses.replace(errand, deadline=deadline, latest=deadline)
        facts: dict[str, object] = {"problem": "the relay stops"}
        try:
            await self._ask(errand, Step.DELETE,
                            self._request(errand, path, method="DELETE"))
            facts = {}
        except RelayError as error:
            facts = {"reply": error.reply, **error.facts}
        finally:
            if facts:
                log_event(logging.WARNING, errand.ident, "draft-left",
                          mailbox=errand.mailbox, **facts)

    # Requests.

    def _request(self, errand: Errand, path: str, body: bytes | Base64 = b"", *,
                 method: str = "POST", most: int = MAX_ANSWER) -> HttpRequest:
        mailbox = urllib.parse.quote(errand.mailbox, safe="")
        kind = "text/plain" if isinstance(body, Base64) else "application/json"
        return HttpRequest(
            method, f"{self._config.graph_endpoint}/v1.0/users/{mailbox}/{path}",
            {**({"Content-Type": kind} if body else {}), "Accept": "application/json",
             "User-Agent": USER_AGENT, "client-request-id": errand.ident}, body, most)

    async def _ask(self, errand: Errand, step: Step, request: HttpRequest) -> HttpResponse:
        """Send a request until it succeeds. Raises RelayError."""
        renewed, delays = False, iter(DRAFT_DELAYS)
        while True:
            if step is not Step.DELETE:         # a draft must not stay for a pause
                await self._wait_until_resumed(errand)
            token, headers = "", request.headers
            if step is not Step.UPLOAD:
                token = await self._token(errand.application, errand.deadline)
                headers = {**headers, "Authorization": f"Bearer {token}"}
            if time.monotonic() >= errand.latest:
                raise NoAnswer("no time is left")
            response = await self._pool.send(dataclasses.replace(request, headers=headers),
                                             errand.deadline)
            if response.status in SUCCESS[step]:
                return response
            if response.status == 401 and token and not renewed:
                renewed = True
                self._tokens.forget(errand.application, token)
                continue
            pause = _pause(response)
            if pause > self.held_for(errand.key):
                self._resume_at.put(errand.key, time.monotonic() + pause, pause)
            if response.status == 404 and step in (Step.ATTACH, Step.SEND_DRAFT):
                pause = next(delays, 0.0)
            if not pause or time.monotonic() + pause >= errand.latest:
                raise graph_error(response, errand.mailbox, step)
            await asyncio.sleep(pause)

    async def _wait_until_resumed(self, errand: Errand) -> None:
        """Wait while Microsoft throttles a mailbox. Raises TemporaryError at once if that
        is too long.
        """
        while self.held_for(errand.key):
            if time.monotonic() + self.held_for(errand.key) >= errand.latest:
                raise TemporaryError(_BUSY.text, _BUSY.code, _BUSY.status)
            await asyncio.sleep(self.held_for(errand.key))

    async def _token(self, application: Application, deadline: float) -> str:
        """Get the token again; the device logged in long ago."""
        try:
            return await self._tokens.get(application, deadline)
        except AuthError as error:
            raise TemporaryError("Microsoft no longer accepts this login; log in again",
                                 421, "4.7.0", close=True,
                                 facts=error.facts | {"entra": error.reply.text}) from None
        except TemporaryError as error:
            text = (error.reply.text if application.is_ours else
                    "Microsoft does not renew the login now; try again later")
            raise TemporaryError(text, 451, "4.7.0", facts=error.facts,
                                 level=error.level) from None


def _pause(response: HttpResponse) -> float:
    """Seconds for which Microsoft wants no request; 0 is none, or it does not say."""
    if response.status not in (429, 503):
        return 0.0
    pause = response.retry_after(time.time())
    if pause is None or pause > MOST_PAUSE:
        return THROTTLED_PAUSE if response.status == 429 else 0.0
    return max(pause, LEAST_PAUSE)


# ---------------------------------------------------------------------------
# §15  Spool
# ---------------------------------------------------------------------------
#
#     lock                      held by the relay that works with the spool; the command
#                               line touches it, and the relay looks again
#     queue/ID, failed/ID       what waits, and what was given up
#     queue/ID.part             is being written; after a crash it goes to failed/
#
# A client is told of a message when its file is on the disk under its name, and the file
# goes when Microsoft has accepted the message. So after a crash a message is there, or was
# sent, or both: at least once. A mailbox is sent to one by one, oldest first. If one fails,
# another is tried at once: if that goes out, the first is at fault and rests alone, so that
# it holds up nobody; else the mailbox rests.

SPARE_DISK = 67_108_864         # octets of the disk that stay free
DISK_TIMEOUT = 10.0             # seconds for the disk to take a message
MEMORY_PAUSE = 0.5              # seconds until there may be memory
SENDERS = 20                    # messages of the spool on their way at once
LOOK_AGAIN = 2.0                # seconds until a command is noticed
IDLE = 30.0                     # seconds until a change of ACCOUNTS_FILE is noticed
MAX_FIRST_LINE = 16_777_216     # octets


class Store:
    """The files of the spool. Its methods wait for the disk, and raise OSError."""

    def __init__(self, path: str) -> None:
        self._path = pathlib.Path(path)
        self.queue, self.failed = self._path / "queue", self._path / "failed"
        self._lock = self._path / "lock"
        self._locked = -1               # its descriptor

    def open(self) -> None:
        """Take it for this process. Raises StartError."""
        try:
            self._path.mkdir(0o700, exist_ok=True)
            problem = self._find_problem()
            if problem:
                raise StartError(f"SPOOL_DIRECTORY={str(self._path)!r}: {problem}")
            for folder in (self.queue, self.failed):
                folder.mkdir(0o700, exist_ok=True)
                probe = folder / "probe.part"
                probe.unlink(missing_ok=True)
                _write(probe, [b"x"])
                probe.unlink()
            _sync(self._path)
        except OSError as error:
            raise StartError(f"SPOOL_DIRECTORY={str(self._path)!r}: cannot be used: "
                             f"{error.strerror}") from None

    def _find_problem(self) -> str:
        if fcntl is None:
            return "this system has no locks of the kind that it needs"
        found = self._path.stat()
        if found.st_uid != os.geteuid():
            return "belongs to another user; give it to the one who runs the relay (chown)"
        if found.st_mode & 0o022:
            return "others can write there; chmod go-w"
        self._locked = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "another relay works with it"
        return ""

    def close(self) -> None:
        """Let go of it."""
        if self._locked >= 0:
            os.close(self._locked)
            self._locked = -1

    def set_aside(self) -> None:
        """Put what is damaged with what was given up."""
        for path in self.queue.iterdir():
            if not self.read(path):
                log_event(logging.ERROR, path.name, "set-aside", problem="it is not whole; "
                          "its client was not told 250" if path.suffix == ".part" else
                          "it is damaged", file=self.failed / path.name)
                path.rename(self.failed / path.name)

    def read(self, path: pathlib.Path) -> Entry | None:
        """Read what is said of a message; None if it is damaged, or not there."""
        try:
            with open(path, "rb") as file:
                first_line = file.readline(MAX_FIRST_LINE)
                begin = len(first_line) + read_entry(first_line, b"").size
                file.seek(begin)
                entry = read_entry(first_line, file.read())
                is_whole = os.fstat(file.fileno()).st_size >= begin
        except (ValueError, FileNotFoundError, IsADirectoryError):
            return None
        return entry if is_whole and entry.ident == path.name else None

    def survey(self) -> tuple[dict[str, Entry], int]:
        """See what waits, and how many octets of other files there are."""
        entries = map(self.read, self.queue.iterdir())
        found = {entry.ident: entry for entry in entries if entry}
        octets = 0
        with contextlib.suppress(FileNotFoundError):        # somebody may have tidied up
            for path in self.failed.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    octets += path.stat().st_size
        return found, octets

    def header(self, entry: Entry) -> bytes:
        """Read the header of a message, or what a notice repeats of it."""
        with open(self.queue / entry.ident, "rb") as file:
            file.readline(MAX_FIRST_LINE)
            return file.read(min(entry.header_size, MAX_NOTICE_HEADER))

    def message(self, entry: Entry) -> bytes:
        """Read a message. Raises ValueError if it is damaged."""
        with open(self.queue / entry.ident, "rb") as file:
            file.readline(MAX_FIRST_LINE)
            octets = file.read(entry.size)
        if hashlib.sha256(octets).hexdigest() != entry.digest:
            raise ValueError("it is damaged")
        return octets

    def add(self, entry: Entry, parts: list[bytes | memoryview], reserved: int,
            outcome: threading.Lock) -> None:
        """Store a message, so that a crash does not take it; with the octets of all that
        is being stored `reserved`, so much is left free. Who takes `outcome` says whether
        it is stored: this, or its client was told otherwise.
        """
        free = os.statvfs(self.queue)
        if free.f_bavail * free.f_frsize - reserved < SPARE_DISK:
            raise OSError(errno.ENOSPC, f"less than {SPARE_DISK} octets would be free")
        digest = hashlib.sha256()
        for octets in parts:
            digest.update(octets)
        entry.digest = digest.hexdigest()
        path, part = self.queue / entry.ident, self.queue / f"{entry.ident}.part"
        try:
            _write(part, [entry.first_line, *parts])
            part.rename(path)
            _sync(self.queue)
            if not outcome.acquire(blocking=False):
                raise TimeoutError("time is up")
        except OSError:
            for one in (part, path):
                with contextlib.suppress(OSError):
                    one.unlink()
            raise

    def note(self, entry: Entry) -> None:
        """Write down what is new about it."""
        self._append(self.queue / entry.ident, entry)

    def remove(self, entry: Entry) -> None:
        """Remove a message that was sent."""
        (self.queue / entry.ident).unlink(missing_ok=True)
        _sync(self.queue)

    def fail(self, entry: Entry) -> None:
        """Put a message with those that were given up."""
        with contextlib.suppress(OSError):      # a full disk; if it is gone _move says so
            self.note(entry)
        self._move(entry.ident, self.queue, self.failed)

    def _move(self, name: str, source: pathlib.Path, target: pathlib.Path) -> None:
        target.mkdir(0o700, exist_ok=True)      # somebody may have tidied up
        (source / name).rename(target / name)
        _sync(target)
        _sync(source)

    def _append(self, path: pathlib.Path, entry: Entry) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.write(descriptor, entry.last_line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # For the command line, which may work beside a relay.

    def names(self) -> Iterator[tuple[pathlib.Path, Entry | None]]:
        """All that is there, the oldest first; what is damaged comes last."""
        paths = list(self.queue.iterdir())
        if self.failed.exists():        # or somebody has tidied up
            paths += self.failed.iterdir()
        found = [(path, entry) for path, entry in zip(paths, map(self.read, paths))
                 if entry or path.parent == self.failed
                 or (path.suffix != ".part" and path.exists())]     # not sent just now
        yield from sorted(found, key=lambda one: one[1].queued_at if one[1] else math.inf)

    def retry(self, path: pathlib.Path, entry: Entry) -> None:
        """Have a message sent at once; one that was given up begins anew."""
        if path.parent == self.failed:
            entry.queued_at, entry.is_told = time.time(), False
        entry.asked_at, entry.next_at = time.time(), 0.0
        self._append(path, entry)
        if path.parent == self.failed:
            self._move(path.name, self.failed, self.queue)

    def drop(self, path: pathlib.Path) -> None:
        """Delete a message."""
        path.unlink()
        _sync(path.parent)

    def touch(self) -> None:
        """Have the relay look again."""
        if self._lock.exists():
            os.utime(self._lock)

    def touched(self) -> int:
        """When it was told to look."""
        return self._lock.stat().st_mtime_ns


def _write(path: pathlib.Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a new file that only its owner can read, down to the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        for octets in parts:
            file.write(octets)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: pathlib.Path) -> None:
    """Write the names in a folder down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Backlog:
    """What waits for one mailbox, oldest first."""

    def __init__(self, key: tuple[str, str, str]) -> None:
        self.key = key
        self.entries: list[Entry] = []
        self.failures = 0               # in a row
        self.resume_at = 0.0            # time.monotonic()
        self.suspect: Entry | None = None       # failed, and another one is to fail too
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.is_sending = False

    def rest(self, seconds: float) -> None:
        """Try nothing for a while."""
        self.resume_at = time.monotonic() + seconds
        self.suspect = None

    async def sleep(self, seconds: float) -> None:
        """Wait until something is new, or for a while."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.wake.wait(), seconds)


def _is_due(entry: Entry, now: float) -> bool:
    """Whether its pause is over; one that is too long is from before the clock was set."""
    return not now < entry.next_at <= now + 2.0 * LAST_PAUSE


class Spool:
    """Keeps messages that Microsoft could not take, and sends them when it can."""

    def __init__(self, config: Config, graph: Graph, accounts: AccountsFile, memory: Memory,
                 name: str) -> None:
        """Get ready; `name` is that of this machine."""
        self._config = config
        self._graph = graph
        self._accounts = accounts
        self._memory = memory
        self._name = name
        self._store = Store(config.spool_directory)
        self._kept = 0                  # octets of what was given up,
        self._writing = 0               # and of what is being written
        self._idents: dict[str, int] = {}       # of what is in `queue`, or will be; octets
        self._sent: set[str] = set()    # that could not be removed then
        self._backlogs: dict[tuple[str, str, str], Backlog] = {}
        # Secrets that devices gave, by tenant and client, while anything waits for them.
        self._waiting: collections.Counter[tuple[str, str]] = collections.Counter()
        self._applications: dict[tuple[str, str], Application] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._written = threading.Event()       # what took too long; it holds a message
        self._written.set()

    async def start(self) -> None:
        """Take the folder, and begin to send what is there. Raises StartError."""
        self._store.open()              # nobody is served yet, so the loop may wait here
        self._senders, self._writers = (asyncio.Semaphore(SENDERS) for _ in range(2))
        try:
            self._store.set_aside()
            found, self._kept = self._store.survey()
            touched = self._store.touched()
        except OSError as error:
            raise StartError(f"SPOOL_DIRECTORY: {error.filename!r} cannot be read: "
                             f"{error.strerror}") from None
        for entry in sorted(found.values(), key=lambda one: one.queued_at):
            entry.next_at = 0.0         # a restart may have mended it
            self._admit(entry)
        if found:
            log_event(logging.INFO, "-", "spool", waiting=len(found))
        self._watcher = asyncio.ensure_future(self._watch(touched))

    def stop(self) -> set[asyncio.Task[None]]:
        """Begin nothing more; returns what is under way."""
        self._is_stopping = True
        if self._watcher:
            self._watcher.cancel()
        under_way = set()
        for backlog in self._backlogs.values():
            if backlog.task and backlog.is_sending:
                under_way.add(backlog.task)
            elif backlog.task:
                backlog.task.cancel()
        return under_way

    def close(self) -> None:
        """Let go of the folder."""
        self._store.close()

    def logged_in(self, application: Application) -> None:
        """Take the secret that a device gave, if anything waits for it."""
        key = application.tenant, application.client
        if self._waiting[key] and not application.is_ours:
            is_missing = key not in self._applications
            self._applications[key] = application
            for backlog in self._backlogs.values():
                if backlog.key[:2] == key and is_missing:       # no pause is for this one
                    backlog.resume_at = 0.0
                    for entry in backlog.entries:
                        entry.next_at = 0.0
                    backlog.wake.set()

    async def put(self, entry: Entry, parts: list[bytes | memoryview],
                  application: Application | None = None) -> None:
        """Store a message; it is safe when this returns. Raises TemporaryError."""
        pause = 0.0
        if application and entry.key not in self._backlogs:     # it has just failed
            pause = self._graph.held_for(entry.key) or self._pause(1)
            entry.next_at = time.time() + pause
        octets, is_stored = len(entry.first_line) + entry.size, False
        self._writing += octets
        self._idents[entry.ident] = octets
        try:
            if self._octets > self._config.spool_max_bytes and not entry.is_notice:
                raise OSError(errno.EDQUOT, "more than SPOOL_MAX_BYTES")
            await self._write(entry, parts)
            self._idents[entry.ident], is_stored = len(entry.first_line) + entry.size, True
        except OSError as error:
            raise TemporaryError("The message cannot be queued now; try again later", 452,
                                 "4.3.1", level=logging.ERROR, facts={
                                     "spool": error.strerror or str(error)}) from None
        finally:
            self._writing -= octets
            if not is_stored:
                del self._idents[entry.ident]
        backlog = self._admit(entry)
        if application and not application.is_ours:
            self._applications.setdefault((entry.tenant, entry.client), application)
        if pause and len(backlog.entries) == 1:
            backlog.failures = 1
            backlog.rest(pause)

    @property
    def _octets(self) -> int:
        """How many there are, but for what was noted about what waits."""
        return self._kept + sum(self._idents.values())

    async def _write(self, entry: Entry, parts: list[bytes | memoryview]) -> None:
        """Store a message. Raises OSError."""
        if not self._written.is_set():  # more threads that hang would hold more messages
            raise OSError(errno.EBUSY, "the disk does not answer")
        outcome, written = threading.Lock(), threading.Event()

        def add(reserved: int) -> None:
            try:
                self._store.add(entry, parts, reserved, outcome)
            finally:
                written.set()
        try:
            await in_time(time.monotonic() + DISK_TIMEOUT,
                          in_thread(functools.partial(add, self._writing)))
        except (OSError, asyncio.CancelledError) as error:
            if not outcome.acquire(blocking=False):
                return                  # it was stored at that very moment
            if isinstance(error, TimeoutError):
                self._written = written
            raise

    def _admit(self, entry: Entry) -> Backlog:
        backlog = self._backlogs.setdefault(entry.key, Backlog(entry.key))
        backlog.entries.append(entry)
        if len(backlog.entries) > 1 and backlog.entries[-2].queued_at > entry.queued_at:
            backlog.entries.sort(key=lambda one: one.queued_at)
        self._idents.setdefault(entry.ident, len(entry.first_line) + entry.size)
        self._waiting[entry.tenant, entry.client] += 1
        if backlog.task is None and not self._is_stopping:
            backlog.task = asyncio.ensure_future(self._work(backlog))
        backlog.wake.set()
        return backlog

    def _leave(self, backlog: Backlog, entry: Entry) -> None:
        """Forget a message, and the secret that nothing else waits for."""
        if entry.ident not in self._idents:
            return
        backlog.entries.remove(entry)
        del self._idents[entry.ident]
        self._sent.discard(entry.ident)
        if backlog.suspect is entry:
            backlog.suspect = None
        key = entry.tenant, entry.client
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
            self._applications.pop(key, None)

    # One task for a mailbox.

    async def _work(self, backlog: Backlog) -> None:
        """Send to a mailbox as long as anything waits for it."""
        while backlog.entries and not self._is_stopping:
            backlog.wake.clear()
            entry = None
            try:
                entry = self._next(backlog)
                if entry:
                    await self._try(backlog, entry)
                else:
                    await self._note_who_is_missing(backlog)
                    await backlog.sleep(self._idle(backlog))
            except Exception:           # or nothing would be sent any more
                log.error("%s broken", backlog.key[2], exc_info=True)
                if entry:
                    entry.next_at = time.time() + LAST_PAUSE
                await asyncio.sleep(FIRST_PAUSE)
        if not backlog.entries:
            del self._backlogs[backlog.key]

    def _next(self, backlog: Backlog) -> Entry | None:
        """Choose what to try now."""
        first, now = backlog.entries[0], time.time()
        if self._is_expired(first) and _is_due(first, now) and not self._application(first):
            return first
        if time.monotonic() < backlog.resume_at:
            return None
        ready = [one for one in backlog.entries
                 if _is_due(one, now) and self._application(one)]
        others = [one for one in ready if one is not backlog.suspect]
        if backlog.suspect and others:
            return min(others, key=lambda one: one.tries)
        return ready[0] if ready else None

    def _idle(self, backlog: Backlog) -> float:
        """Seconds until there may be something to try."""
        due = min((one.next_at for one in backlog.entries if self._application(one)),
                  default=math.inf)
        due_in = max(due - time.time(), backlog.resume_at - time.monotonic())
        return min(max(due_in, 0.0), IDLE)

    def _is_expired(self, entry: Entry) -> bool:
        return time.time() >= entry.queued_at + self._config.spool_lifetime

    def _too_old(self, reason: str) -> str:
        return (f"It could not be sent for {self._config.spool_lifetime} seconds; at last: "
                f"{reason}")

    def _application(self, entry: Entry) -> Application | None:
        """Find as whom to send, if that can be proved now."""
        accounts, key = self._accounts.accounts, (entry.tenant, entry.client)
        account = accounts.find(entry.account) if entry.account else None
        if not (account and account.has_credential):
            if key in self._applications:
                return self._applications[key]
            account = next((one for one in accounts if one.has_credential
                            and (one.tenant_id, one.client_id) == key), None)
        return account.as_application() if account else None

    async def _try(self, backlog: Backlog, entry: Entry) -> None:
        application = self._application(entry)
        try:
            if entry.ident in self._sent:
                await self._forget(backlog, entry)
            elif not application:
                await self._give_up(backlog, entry, self._too_old(entry.reason))
            else:
                async with self._senders:
                    backlog.is_sending = True
                    await self._send(backlog, entry, application)
        except FileNotFoundError:
            self._drop(backlog, entry)
        except DeliveryError as error:
            entry.tries += 1
            await self._give_up(backlog, entry, str(error.reply))
        except ValueError as error:
            await self._give_up(backlog, entry, str(error))
        except TemporaryError as error:
            if error.reply.code == 421 and application is self._application(entry):
                del self._applications[entry.tenant, entry.client]      # it is refused
            await self._put_off(backlog, entry, str(error.reply), error.facts)
        except OSError as error:
            await self._put_off(backlog, entry, error.strerror or str(error), {})
        finally:
            backlog.is_sending = False

    async def _send(self, backlog: Backlog, entry: Entry, application: Application) -> None:
        config = self._config           # what clients send comes first
        spare = min(config.max_memory_for_messages // 2,
                    config.max_memory_for_messages - config.size_limit)
        for _ in range(int(config.upstream_timeout / MEMORY_PAUSE)):
            if self._memory.free >= entry.size + spare or self._is_stopping:
                break
            await asyncio.sleep(MEMORY_PAUSE)
        self._memory.check(entry.size + spare)
        deadline = time.monotonic() + config.upstream_timeout
        self._memory.take(entry.size)
        try:
            message = await in_time(deadline, in_thread(lambda: as_stored(
                self._store.message(entry), entry)))
            response = await self._graph.send(application, message, entry.ident, deadline)
        finally:
            self._memory.give_back(entry.size)
        backlog.failures = 0
        if backlog.suspect and backlog.suspect is not entry:
            backlog.suspect.next_at = time.time() + self._pause(backlog.suspect.tries)
        backlog.suspect = None
        log_event(logging.INFO, entry.ident, "sent", sender=entry.mailbox,
                  recipients=len(entry.recipients), size=entry.size, tries=entry.tries + 1,
                  request_id=response.headers.get("request-id"),
                  queued=time.time() - entry.queued_at)
        await self._forget(backlog, entry)

    async def _forget(self, backlog: Backlog, entry: Entry) -> None:
        """Remove what was sent; if that fails it is not sent again all the same."""
        self._sent.add(entry.ident)
        await self._on_disk(self._store.remove, entry)
        self._leave(backlog, entry)

    async def _put_off(self, backlog: Backlog, entry: Entry, reason: str,
                       facts: Mapping[str, object]) -> None:
        """Try it later, and find out whether it or the mailbox is at fault."""
        entry.tries += 1
        if self._is_expired(entry):
            await self._give_up(backlog, entry, self._too_old(reason))
            return
        entry.reason = reason
        held = self._graph.held_for(entry.key)
        others = [one for one in backlog.entries if one is not entry
                  and _is_due(one, time.time()) and self._application(one)]
        if held or backlog.suspect or not others:
            backlog.failures += not held
            backlog.rest(held or self._pause(backlog.failures))
            # Not for longer by this clock, as it may be set: resume_at is by the other.
            rest = backlog.resume_at - time.monotonic()
            entry.next_at = time.time() + min(rest, LAST_PAUSE)
        else:
            backlog.suspect = entry
        log_event(logging.WARNING, entry.ident, "delayed", sender=entry.mailbox,
                  tries=entry.tries, reply=reason, **facts,
                  again=max(0.0, entry.next_at - time.time()))
        with contextlib.suppress(OSError):      # it is for `spool list` only
            await self._on_disk(self._store.note, entry)

    async def _give_up(self, backlog: Backlog, entry: Entry, reason: str) -> None:
        before, entry.reason = entry.reason, reason
        try:
            if entry.reverse_path and not entry.is_notice and not entry.is_told:
                await self._tell(entry)
                entry.is_told = True
            await self._on_disk(self._store.fail, entry)
        except FileNotFoundError:
            self._drop(backlog, entry)
            return
        except (OSError, TemporaryError) as error:
            log_event(logging.ERROR, entry.ident, "spool", problem=error)
            entry.reason, entry.next_at = before, time.time() + FIRST_PAUSE
            return
        self._kept += self._idents.get(entry.ident, 0)
        self._leave(backlog, entry)
        log_event(logging.ERROR, entry.ident, "failed", sender=entry.mailbox,
                  recipients=len(entry.recipients), size=entry.size, tries=entry.tries,
                  reply=reason, remedy="see `spool show`, mend it, then `spool retry`")

    async def _tell(self, entry: Entry) -> None:
        """Queue a notice to who sent a message. Raises OSError and TemporaryError."""
        ident, now = str(uuid.uuid4()), time.time()
        header = await self._on_disk(self._store.header, entry)
        octets = make_notice(entry, header, self._name, ident, now)
        await self.put(dataclasses.replace(
            entry, ident=ident, reverse_path="", recipients=[entry.reverse_path],
            header_size=octets.index(b"\r\n\r\n") + 2, size=len(octets), is_notice=True,
            queued_at=now, tries=0, next_at=0.0, reason=""), [octets])

    async def _note_who_is_missing(self, backlog: Backlog) -> None:
        for entry in list(backlog.entries):
            who = entry.account or f"{entry.tenant}@{entry.client}"
            missing = f"waits until {who} logs in"
            if not self._application(entry) and not entry.reason.startswith(missing):
                entry.reason = f"{missing}; {entry.reason}".rstrip("; ")
                log_event(logging.WARNING, entry.ident, "delayed", sender=entry.mailbox,
                          problem=entry.reason)
                with contextlib.suppress(OSError):
                    await self._on_disk(self._store.note, entry)

    def _drop(self, backlog: Backlog, entry: Entry) -> None:
        """Somebody has deleted it."""
        log_event(logging.INFO, entry.ident, "dropped", sender=entry.mailbox)
        self._leave(backlog, entry)

    def _pause(self, failures: int) -> float:
        return pause_after(failures, secrets.randbelow(1000) / 1000)

    async def _on_disk(self, do: Callable[[Entry], T], entry: Entry) -> T:
        async with self._writers:
            return await in_time(time.monotonic() + DISK_TIMEOUT,
                                 in_thread(functools.partial(do, entry)))

    # The command line.

    async def _watch(self, touched: int) -> None:
        """Look again when the command line has done something."""
        problem = ""
        while True:
            await asyncio.sleep(LOOK_AGAIN)
            try:
                # Without a deadline: if the disk hangs, only this waits.
                found = await in_thread(self._store.touched)
                if found != touched:
                    await self._look_again()
                touched = found
                problem = ""
            except Exception as error:          # noqa: BLE001 - else it never looks again
                if str(error) != problem:
                    log_event(logging.ERROR, "-", "spool", problem=error)
                problem = str(error)

    async def _look_again(self) -> None:
        before = {one.ident for backlog in self._backlogs.values()
                  for one in backlog.entries}
        found, self._kept = await in_thread(self._store.survey)
        for backlog in list(self._backlogs.values()):
            for entry in list(backlog.entries):
                if entry.ident not in found:
                    if entry.ident in before:
                        self._drop(backlog, entry)
                elif found[entry.ident].asked_at > entry.asked_at:
                    entry.asked_at = found[entry.ident].asked_at
                    entry.next_at = backlog.resume_at = 0.0
            backlog.wake.set()
        for ident in found.keys() - self._idents.keys() - before:
            self._admit(found[ident])


# ---------------------------------------------------------------------------
# §16  TLS
# ---------------------------------------------------------------------------

TLS_VERSIONS: Mapping[str, ssl.TLSVersion] = {
    "1.0": ssl.TLSVersion.TLSv1, "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# OpenSSL's name of a failure -> what it means for who looks after the device.
TLS_PROBLEMS: Mapping[str, str] = {
    "UNSUPPORTED_PROTOCOL": "the client's TLS is older than TLS_MIN_VERSION",
    "VERSION_TOO_LOW": "the client's TLS is older than TLS_MIN_VERSION",
    "NO_SHARED_CIPHER": "the client has no cipher that TLS_CIPHER_SUITE allows",
    "HTTP_REQUEST": "the client speaks HTTP",
    "WRONG_VERSION_NUMBER": "the client does not speak TLS here; on SMTPS_PORT it must be "
                            "set to TLS, not to STARTTLS or none",
    "TLSV1_ALERT_UNKNOWN_CA": "the client does not trust the relay's certificate; import "
                              "it there",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the client does not accept the relay's "
                                       "certificate; import it there",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the client does not accept the relay's certificate; "
                                   "import it there",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the relay's certificate has expired",
}

VAULT_REMEDIES: Mapping[int, str] = {
    401: "the relay's identity is of another tenant than the vault",
    403: "give the relay's identity the role Key Vault Secrets User, and let it through "
         "the vault's firewall",
    404: "there is no such certificate",
}

COMMAND_SECONDS = 10.0          # for one run of the openssl command
# X509_V_FLAG_PARTIAL_CHAIN, which ssl names from 3.10 on, and X509_V_FLAG_NO_CHECK_TIME
_ANY_CERTIFICATE = 0x80000 | 0x200000

# asyncio gives each TLS connection a receive buffer of 256 KiB from Python 3.11 on. A TLS
# record has at most 16 KiB, and most connections are idle.
_protocol: Any = getattr(getattr(asyncio, "sslproto", None), "SSLProtocol", None)
if hasattr(_protocol, "max_size"):
    _protocol.max_size = 16384


def describe_failure(error: OSError) -> str:
    """Say in words why a connection failed."""
    known = TLS_PROBLEMS.get(getattr(error, "reason", None) or "")
    return known or str(error) or type(error).__name__


def make_tls_contexts(config: Config) -> dict[str, ssl.SSLContext]:
    """Read the relay's certificate and key; returns a context for each TLS_MIN_VERSION
    that a network may have, as the key cannot be read again after RUN_AS.

    Raises StartError.
    """
    if config.tls_source == "off":
        return {}
    if config.tls_source == "file":
        return _make_contexts(config, config.tls_cert_filepath, config.tls_key_filepath,
                              f"TLS_CERT_FILEPATH={config.tls_cert_filepath!r}",
                              f"TLS_KEY_FILEPATH={config.tls_key_filepath!r}")
    name = f"AZURE_KEY_VAULT_CERT_NAME={config.azure_key_vault_cert_name!r}"
    pem = asyncio.run(fetch_certificate(config, name))
    with _private_file(pem) as path:
        return _make_contexts(config, path, path, name, name)


def _make_contexts(config: Config, cert_path: str, key_path: str, cert_name: str,
                   key_name: str) -> dict[str, ssl.SSLContext]:
    for name, path in ((cert_name, cert_path), (key_name, key_path)):
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            raise StartError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert_path)
    except ssl.SSLError as error:
        raise StartError(f"{cert_name}: holds no PEM certificate that can be used: "
                         f"{error.reason or error}") from None
    contexts = {config.tls_min_version: _make_context(config, config.tls_min_version)}
    for version in TLS_VERSIONS:        # but what this OpenSSL does not have
        with contextlib.suppress(ssl.SSLError, ValueError):
            contexts.setdefault(version, _make_context(config, version))
    for context in contexts.values():
        _load_certificate(context, cert_path, key_path, key_name)
    if certificate_dates(contexts[config.tls_min_version], cert_path)[1] < time.time():
        log_event(logging.WARNING, "-", "tls", problem="the certificate has expired; "
                  "devices may refuse it", certificate=cert_name)
    return contexts


def _make_context(config: Config, least: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    ciphers = config.tls_cipher_suite
    if {least, config.tls_min_version} & {"1.0", "1.1"} and "@SECLEVEL" not in ciphers:
        # OpenSSL 3 has these versions at level 0 only: their handshake uses SHA-1. And
        # who needs them may have a certificate that is as old.
        ciphers = f"{ciphers or 'DEFAULT'}:@SECLEVEL=0"
    if ciphers:
        context.set_ciphers(ciphers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)     # so is the device
        context.minimum_version = TLS_VERSIONS[least]
    return context


def _load_certificate(context: ssl.SSLContext, cert_path: str, key_path: str,
                      key_name: str) -> None:
    def ask_password() -> str:
        raise StartError(f"{key_name}: the key is encrypted; give it without a passphrase")

    try:
        context.load_cert_chain(cert_path, key_path, ask_password)
    except ssl.SSLError as error:
        problem = ("does not belong to the certificate"
                   if error.reason == "KEY_VALUES_MISMATCH"
                   else f"holds no PEM key that can be used: {error.reason or error}")
        raise StartError(f"{key_name}: {problem}") from None


def certificate_dates(context: ssl.SSLContext, cert_path: str) -> tuple[float, float]:
    """Return when the validity of a server's certificate begins and ends, in Unix time;
    (0, inf) if no client accepts the certificate.

    The ssl module reads a certificate's dates in no other public way than by a handshake.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= _ANY_CERTIFICATE
    client.set_ciphers("ALL:@SECLEVEL=0")       # for a key that is as old as a printer
    client.load_verify_locations(cert_path)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (client.wrap_bio(back, there), context.wrap_bio(there, back, True))
    try:
        for side in sides * 3:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        found: Any = sides[0].getpeercert()
        return (ssl.cert_time_to_seconds(found["notBefore"]),
                ssl.cert_time_to_seconds(found["notAfter"]))
    except (ssl.SSLError, ValueError):
        return 0.0, math.inf


def pfx_to_pem(pfx: bytes) -> bytes:
    """Convert a PKCS#12 file without a password to PEM: key, certificate, chain.

    The ssl module cannot read PKCS#12, so this runs the openssl command. Nothing is
    written to the disk. Raises ValueError.
    """
    for legacy in ["-legacy"], []:      # OpenSSL 3 needs it for RC2; 1.1 does not know it
        command = ["openssl", "pkcs12", "-nodes", "-passin", "pass:", *legacy]
        try:
            parts = [subprocess.run([*command, *options], input=pfx,        # noqa: S603
                                    capture_output=True, timeout=COMMAND_SECONDS)
                     for options in (["-nocerts"], ["-nokeys", "-clcerts"],
                                     ["-nokeys", "-cacerts"])]
        except OSError as error:
            raise ValueError(f"the openssl command: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise ValueError("the openssl command: timed out") from None
        failed = [part for part in parts if part.returncode]
        if not failed:
            if b" KEY-----" not in parts[0].stdout or b" CERT" not in parts[1].stdout:
                raise ValueError("no private key with its certificate in it")
            return b"".join(part.stdout for part in parts)
    reason = failed[0].stderr.decode(errors="replace").partition("\n")[0].strip()
    raise ValueError(f"the openssl command: {reason[:120]}")


async def fetch_certificate(config: Config, name: str) -> bytes:
    """Get the certificate and its key from Key Vault, as PEM. Raises StartError.

    Microsoft, "Get Secret (Key Vault REST API)"; "About Azure Key Vault certificates".
    """
    pool = HttpPool(config.endpoints)
    try:
        response = await Azure(config, pool, Tokens(config, pool)).get(
            f"{config.azure_key_vault_url}/secrets/{config.azure_key_vault_cert_name}"
            "?api-version=7.4", CLOUDS[config.azure_cloud].vault,
            {"Accept": "application/json"}, time.monotonic() + config.upstream_timeout)
    except TemporaryError as error:
        raise StartError(f"{name}: {harmless(str(error))}"
                         f"{in_words(error.facts)}") from None
    finally:
        pool.close()
    value = response.json().get("value")
    if response.status != 200 or not isinstance(value, str):
        remedy = VAULT_REMEDIES.get(response.status, "try again later")
        # The code, and the one within, such as ForbiddenByRbac.
        codes = re.findall(rb'"code"\s*:\s*"([A-Za-z]{1,60})"', response.body)[:5]
        raise StartError(f"{name}: Key Vault answers {response.status} "
                         f"{b'/'.join(codes).decode()}: {remedy}")
    try:
        if "-----BEGIN" in value:       # the content type PEM
            return value.encode()
        return pfx_to_pem(base64.b64decode("".join(value.split()), validate=True))
    except ValueError as error:
        raise StartError(f"{name}: cannot be turned into PEM ({error}); in Key Vault set "
                         "the content type in the certificate's issuance policy to PEM, "
                         "and issue a new version") from None


@contextlib.contextmanager
def _private_file(octets: bytes) -> Iterator[str]:
    """Hold octets in a file of mode 0600: in memory, or where that fails on disk."""
    file: Any
    try:
        file = open(os.memfd_create("relay"), "wb")     # noqa: SIM115
        path = f"/proc/self/fd/{file.fileno()}"
        os.stat(path)
    except (AttributeError, OSError):   # other systems, old kernels, no /proc
        file = tempfile.NamedTemporaryFile()            # noqa: SIM115
        path = file.name
    with file:
        file.write(octets)
        file.flush()
        yield path


# ---------------------------------------------------------------------------
# §17  Server
# ---------------------------------------------------------------------------

READ_COMMANDS = 4096            # octets worked on before others have their turn
READ_CONTENT = 16384            # octets; commands may stand behind the message
HANDSHAKE_TIMEOUT = 30.0        # seconds
LINGER = 1                      # second for the last reply to leave, and a close_notify
BACKLOG = 1000                  # connections that wait to be accepted
SPARE_FILES = 100               # that no client gets, so that Microsoft can be reached

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# The fields of RFC 5322 that identify a message, if they are not empty.
_IDENTITY = re.compile(rb"^(Message-ID|Date)[ \t]*:(?:(?:\r\n)?[ \t])*[^\s]", re.I | re.M)

_TIMED_OUT = Reply(421, "4.4.2", "Waited too long for you; goodbye")
_STOPPING = Reply(421, "4.3.2", "The relay is being stopped; try again later")
_BROKEN = Reply(421, "4.3.0", "The relay has a problem; try again later")


def _own_name() -> str:
    """This machine's name, without asking DNS."""
    with contextlib.suppress(ValueError):
        return _host_name(socket.gethostname())
    return "localhost"


class DuplicateGuard:
    """Remembers accepted messages, so that a retransmission is not sent again.

    Only a message with a Message-ID and a Date field can be recognized (RFC 5322 section
    3.6.4). Without them two equal messages may both be meant: a device repeats an alarm.
    """

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember messages for `window` seconds; 0 disables the guard."""
        self._window = window
        self._under_way: dict[bytes, asyncio.Future[None]] = {}
        self._accepted: Cache[bytes, tuple[str, str]] = Cache(clock)    # id and reply

    def digest(self, login: Login, envelope: Envelope, header: bytes) -> bytes:
        """Hash account, envelope and content; return b"" for an unrecognizable message."""
        if not self._window or len({match[1].lower()
                                    for match in _IDENTITY.finditer(header)}) < 2:
            return b""
        digest = hashlib.sha256(repr((
            login.account.name, login.application.tenant, login.application.client,
            envelope.reverse_path, sorted(envelope.recipients))).encode())
        digest.update(envelope.message)
        return digest.digest()

    @contextlib.asynccontextmanager
    async def claim(self, digest: bytes,
                    deadline: float) -> AsyncIterator[tuple[str, str] | None]:
        """Wait until no other client sends the same message, then yield the id and the
        reply with which it was accepted before, or None. Raises TemporaryError.
        """
        while digest in self._under_way:
            if not await done_by(deadline, self._under_way[digest]):
                raise TemporaryError("The same message is on its way; try again later", 451,
                                     "4.4.5")
        if not digest:
            yield None
            return
        self._under_way[digest] = asyncio.get_running_loop().create_future()
        try:
            yield self._accepted.get(digest)
        finally:
            self._under_way.pop(digest).set_result(None)

    def accepted(self, digest: bytes, ident: str, reply: str) -> None:
        """Remember that a message was accepted."""
        if digest:
            self._accepted.put(digest, (ident, reply), self._window)


class Relay:
    """What a login and a message mean: the sections above, joined."""

    def __init__(self, config: Config, microsoft: Any = None) -> None:
        """Join them. `microsoft` takes the place of Tokens and of Graph.

        Raises ConfigError if ACCOUNTS_FILE cannot be used.
        """
        pool = HttpPool(config.endpoints)
        self.config = config
        self._pool = pool
        self._tokens = microsoft or Tokens(config, pool)
        self._graph = microsoft or Graph(config, pool, self._tokens)
        self.directory = Directory(config, Azure(config, pool, self._tokens))
        self.memory = Memory(config.max_memory_for_messages)
        self.name = config.server_name or _own_name()
        self._duplicates = DuplicateGuard(config.duplicate_window)
        self.spool = Spool(config, self._graph, self.directory.file, self.memory,
                           self.name) if config.spool_directory else None
        self._watcher: asyncio.Task[None] | None = None
        if config.accounts_file:
            self.directory.file.load()

    async def start(self) -> None:
        """Begin to watch ACCOUNTS_FILE, and to send what is in the spool. Raises StartError
        if the spool cannot be used, or a table that is needed cannot be read.
        """
        if self.config.azure_tables_force_usage and self.directory.table:
            try:
                await self.directory.table.check(self._deadline())
            except TemporaryError as error:
                raise StartError("AZURE_TABLES_FORCE_USAGE=true, and the table cannot be "
                                 f"read: {harmless(str(error))}"
                                 f"{in_words(error.facts)}") from None
        if self.config.accounts_file:
            self._watcher = asyncio.ensure_future(self.directory.file.watch())
        if self.spool:                  # the last, as what it begins must not be cut off
            await self.spool.start()

    def close(self) -> None:
        """Close what is open to Microsoft, and end what is under way."""
        if self._watcher:
            self._watcher.cancel()
        self.directory.close()
        self._pool.close()
        if self.spool:
            self.spool.close()

    async def log_in(self, request: Authenticate, address: IpAddress | None,
                     ident: str) -> Login:
        """Check a login. Raises AuthError, after a pause, and TemporaryError."""
        user, failures = self.directory.shown(request.username), self.directory.failures
        try:
            login = await self._check_login(request, address)
        except RelayError as error:
            pause, result, facts = 0.0, "tempfail", dict(error.facts)
            if isinstance(error, AuthError):
                pause, result = failures.add(address), "refused"
                if self.directory.file.accounts.at(address, self.config)[0]:
                    facts["remedy"] = "from here no login is needed: switch it off there"
            elif error.reply.code != 421:
                error = TemporaryError("The password cannot be checked now, it may be "
                                       f"right: {error.reply.text}", 454, "4.7.0",
                                       level=error.level)
            log_event(error.level, ident, "auth", user=user, client=address, result=result,
                      reply=error.reply, **facts)
            await asyncio.sleep(pause)
            raise error from None
        log_event(logging.INFO, ident, "auth", user=user, result="ok",
                  account=login.account.name or None)
        return login

    async def _check_login(self, request: Authenticate,
                           address: IpAddress | None) -> Login:
        failures, deadline = self.directory.failures, self._deadline()
        failures.check(address)
        try:
            login = await self.directory.find(request, address, deadline)
            # With a spool who has given the right password need not wait for Microsoft.
            if not (self.spool and login.application.is_ours):
                await self._tokens.get(login.application, deadline)
        except AuthError:
            failures.check(address)     # who guesses at once must not see by the replies
            raise                       # which guess was right
        failures.check(address)
        if self.spool:
            self.spool.logged_in(login.application)
        return login

    async def deliver(self, login: Login, envelope: Envelope, session: str) -> str:
        """Send a message, or queue it; returns the text of the reply. Raises RelayError."""
        ident, started, deadline = str(uuid.uuid4()), time.monotonic(), self._deadline()
        account = login.account
        facts: dict[str, object] = {
            "session": session, "account": account.name or None,
            "sender": envelope.reverse_path, "recipients": len(envelope.recipients),
            "size": len(envelope.message)}
        try:
            message, digest = await self._prepare(login, envelope, deadline)
            facts.update(sender=message.prepared.mailbox, size=message.prepared.size)
            if not account.from_email:          # From may have said who sends
                account.check_sender(message.prepared.mailbox)
            if message.draft:
                facts["attachments"] = len(message.draft.attachments)
            async with self._duplicates.claim(digest, deadline) as first:
                if first:
                    level, event = logging.INFO, "repeated"
                    facts["first"], text = first
                else:
                    level, event, text = await self._send(login, envelope, message, ident,
                                                          deadline, facts)
                    self._duplicates.accepted(digest, ident, text)
        except asyncio.CancelledError:
            log_event(logging.WARNING, ident, "cut", **{
                **facts, "problem": "the relay stops; it may have been sent"})
            raise
        except RelayError as error:
            error.reply = dataclasses.replace(error.reply,
                                              text=f"{error.reply.text}, id {ident}")
            log_event(error.level, ident, "refused",
                      **{**facts, **error.facts, "reply": error.reply},
                      seconds=time.monotonic() - started)
            raise
        log_event(level, ident, event, **facts, seconds=time.monotonic() - started)
        return text

    async def _prepare(self, login: Login, envelope: Envelope,
                       deadline: float) -> tuple[Outgoing, bytes]:
        """Edit a message; in a thread, as it may have 150 MB, and a million lines."""
        config = login.account.adapt(self.config)
        envelope = dataclasses.replace(envelope, reverse_path=login.account.from_email
                                       or envelope.reverse_path)

        def edit() -> tuple[Outgoing, bytes]:
            message = make_outgoing(envelope, config, login.username)
            return message, self._duplicates.digest(login, envelope,
                                                    message.prepared.before)
        try:
            return await in_time(deadline, in_thread(edit))
        except TimeoutError:
            raise TemporaryError("The message takes too long to read; try again later"
                                 ) from None

    async def _send(self, login: Login, envelope: Envelope, message: Outgoing, ident: str,
                    deadline: float, facts: dict[str, object]) -> tuple[int, str, str]:
        """Send a message, or queue it if Microsoft does not take it now. Returns the level
        and event to log, and the text of the reply. Raises RelayError.
        """
        application = login.application
        try:
            response = await self._graph.send(application, message, ident, deadline,
                                              is_live=True)
        except asyncio.CancelledError:
            if not self.spool:
                raise
            reason = "the relay stops"
        except TemporaryError as error:
            if not self.spool or error.reply.close:     # the device must log in again
                raise
            facts.update(error.facts, reply=error.reply)
            reason = str(error.reply)
        else:
            facts["request_id"] = response.headers.get("request-id")
            if self.spool:
                self.spool.logged_in(application)
            return logging.INFO, "sent", f"Accepted by Microsoft 365, id {ident}"
        prepared = message.prepared
        await self.spool.put(Entry(
            ident, login.account.name, application.tenant, application.client,
            prepared.mailbox, envelope.reverse_path and (
                login.account.from_email or envelope.reverse_path),
            list(envelope.recipients.values()), len(prepared.header), prepared.size, "",
            False, time.time(), 1, 0.0, reason), [prepared.header, prepared.body],
            application)
        return logging.WARNING, "queued", f"Queued, id {ident}"

    def _deadline(self) -> float:
        return time.monotonic() + self.config.upstream_timeout


class Connection:
    """A client's connection: the shell around a Session."""

    def __init__(self, relay: Relay, contexts: Mapping[str, ssl.SSLContext], name: str,
                 address: IpAddress | None, reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter) -> None:
        self.ident = secrets.token_hex(4)
        self.task: asyncio.Task[None] | None = None
        self.is_running = False
        self.is_stopping = False
        self._relay = relay
        self._address = address
        self.guest, config = relay.directory.file.accounts.at(address, relay.config)
        self._context = contexts.get(config.tls_min_version)
        self._reader = reader
        self._writer = writer
        self._plain_writer = writer     # asyncio closes its transport when it is collected
        self._session = Session(config, name, self._trace, relay.memory, self.guest)
        self._timeout = relay.config.client_timeout
        self._progress = 0
        self._deadline = 0.0            # for the command under way
        self._is_timed_out = False

    async def run(self, *, implicit_tls: bool) -> None:
        """Serve the client until one of us leaves."""
        self.is_running = True
        reason = "the relay stops"
        try:
            if implicit_tls:            # nothing may be awaited before, see _start_tls
                await self._start_tls()
            self._session.greet()
            reason = await self._converse()
        except OSError as error:
            reason = describe_failure(error)
        except asyncio.CancelledError:
            self._writer.write(bytes(_STOPPING))
        except Exception:
            log.error("%s broken", self.ident, exc_info=True)
            reason = "a defect of the relay"
            self._writer.write(bytes(_BROKEN))
        self._session.abandon()
        self.is_running = False         # what follows ends soon, and is not to be cut off
        log_event(logging.INFO, self.ident, "disconnected", reason=reason)
        await self._hang_up()

    def stop(self) -> None:
        """Leave as soon as no message is lost by it."""
        self.is_stopping = True
        # A task that has not begun would not begin, and so not close the connection.
        if self.task and self.is_running and not self._session.holds_message:
            self.task.cancel()

    async def _converse(self) -> str:
        """Do what the session asks for; returns the reason of its end."""
        self._renew_deadline()
        while True:
            if self.is_stopping and not self._session.holds_message:
                self._session.end(_STOPPING, "the relay stops")
            event = self._session.next_event()
            if isinstance(event, StartTls):
                # What comes behind the 220 is for the handshake.
                self._writer.transport.pause_reading()      # type: ignore[attr-defined]
            await self._flush()
            if isinstance(event, Close):
                return event.reason
            if event is None:
                await self._read()
            else:
                await self._answer(event)

    async def _answer(self, event: StartTls | Authenticate | Deliver) -> None:
        try:
            if isinstance(event, StartTls):
                await self._start_tls()
            elif isinstance(event, Authenticate):
                self._session.authenticated(await self._relay.log_in(
                    event, self._address, self.ident))
            else:
                assert self._session.login is not None      # MAIL needs a login
                self._session.delivered(await self._relay.deliver(
                    self._session.login, event.envelope, self.ident))
        except RelayError as error:
            self._session.refuse(error.reply)
        self._renew_deadline()

    async def _read(self) -> None:
        """Give the session what the client sends, unless it takes too long."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, self._deadline - time.monotonic()), self._time_out)
        size = READ_CONTENT if self._session.is_in_content else READ_COMMANDS
        try:
            await asyncio.sleep(0)      # what came already would be read without a pause
            octets = await self._reader.read(size)
        except asyncio.CancelledError:
            if not self._is_timed_out:
                raise
            self._session.end(_TIMED_OUT, "timed out")
            return
        finally:
            timer.cancel()
        if octets:
            self._session.receive(octets)
        else:
            self._session.receive_eof()

    def _time_out(self) -> None:
        """End the wait in _read."""
        assert self.task is not None
        self._is_timed_out = True
        self.task.cancel()

    def _renew_deadline(self) -> None:
        self._deadline = time.monotonic() + self._timeout

    async def _flush(self) -> None:
        """Send what the session says; a client that does not read is cut off."""
        if self._session.progress != self._progress:
            self._progress = self._session.progress
            self._renew_deadline()
        replies = self._session.output()
        if not replies:
            return
        self._writer.write(replies)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._timeout, self._writer.transport.abort)
        try:
            await self._writer.drain()
        finally:
            timer.cancel()

    async def _start_tls(self) -> None:
        """Do the handshake. Raises OSError.

        StreamWriter.start_tls() would keep the reader, and with it what came in the clear
        (CVE-2011-0411). This is safe: the new reader has seen nothing. asyncio reads
        nothing for the old one between pause_reading(), or the start of the task that
        serves a new connection, and the first await in here.
        """
        assert self._context is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            transport = await loop.start_tls(
                self._writer.transport, protocol, self._context, server_side=True,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT)
        except BaseException:
            self._writer.transport.abort()      # nobody tells its protocol of the end
            raise
        assert transport is not None
        protocol.connection_made(transport)
        self._reader = reader
        self._writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        self._session.tls_started()
        log_event(logging.INFO, self.ident, "tls",
                  version=self._writer.get_extra_info("ssl_object").version(),
                  cipher=self._writer.get_extra_info("cipher")[0])

    async def _hang_up(self) -> None:
        # Python 3.9 knows only below TLS that a connection is gone.
        if not (self._plain_writer.transport.is_closing()
                or self._writer.transport.is_closing()):
            self._writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._writer.wait_closed(), LINGER)
        # Not that of TLS: once it is closing it does nothing more, and waits for ever until
        # a client takes what is left. Nor one that is at its end: asyncio fails there.
        if self._plain_writer.get_extra_info("socket").fileno() >= 0:
            self._plain_writer.transport.abort()

    def _trace(self, mark: str, what: object) -> None:
        if mark == "!":
            # MAX_MEMORY_FOR_MESSAGES is too small for what comes; all else is the client's.
            is_ours = isinstance(what, Reply) and what.status == "4.3.1"
            log_event(logging.WARNING if is_ours else logging.INFO, self.ident, "refused",
                      reply=what)
        elif log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s %s", self.ident, mark, escaped(what))


class Server:
    """Accepts connections, within the limits."""

    def __init__(self, relay: Relay, contexts: Mapping[str, ssl.SSLContext]) -> None:
        """Get ready; `contexts` are by TLS_MIN_VERSION, and none for no TLS."""
        self._relay = relay
        self._contexts = contexts
        self._connections: set[Connection] = set()
        self._clients: collections.Counter[object] = collections.Counter()     # by site
        self._is_stopping = False
        # A connection needs a file, and may need a second one to reach Microsoft.
        limit = raise_open_files(2 * relay.config.max_connections + 2 * SPARE_FILES)
        self._client_files = limit - min(SPARE_FILES, limit / 2)

    async def run(self, sockets: Iterable[tuple[socket.socket, bool]],
                  stop: asyncio.Event) -> None:
        """Serve until `stop` on bound sockets, each with whether it is for implicit TLS."""
        servers = []
        for sock, implicit_tls in sockets:
            accept = functools.partial(self._accept, implicit_tls)
            # With a backlog of 1: when there are no more file descriptors, asyncio tries
            # as often as that each second, and logs each.
            servers.append(await asyncio.start_server(accept, sock=sock, backlog=1))
            sock.listen(BACKLOG)
            log_event(logging.INFO, "-", "listening", address=sock.getsockname()[0],
                      port=sock.getsockname()[1], tls="implicit" if implicit_tls else
                      "starttls" if self._contexts else "off")
        await stop.wait()
        self._is_stopping = True
        log_event(logging.INFO, "-", "stopping", connections=len(self._connections))
        for server in servers:
            server.close()
        await self._drain()

    async def _drain(self) -> None:
        """Let messages in flight end, then cut what is left."""
        for connection in list(self._connections):
            connection.stop()
        tasks = {one.task for one in self._connections if one.task}
        if self._relay.spool:
            tasks |= self._relay.spool.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._relay.config.shutdown_timeout)
            for task in late:
                task.cancel()
            if late:
                log_event(logging.WARNING, "-", "cut", connections=len(late))
                # What is left is queued, which may take the disk as long as ever.
                await asyncio.wait(late, timeout=GRACE + (
                    DISCARD_TIMEOUT + DISK_TIMEOUT if self._relay.spool else 0.0))

    def _accept(self, implicit_tls: bool, reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):      # a reply that waits for an ACK takes 40 ms
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = writer.get_extra_info("peername")
        address = read_address(peer[0]) if peer else None
        client, site = str(address or "unknown"), _site(address)
        problem = self._find_problem(site, sock.fileno())
        if problem:
            if not implicit_tls:
                writer.write(bytes(Reply(421, "4.7.0", f"{problem}; try again later")))
            writer.close()
            log_event(logging.WARNING, "-", "turned-away", client=client, reason=problem)
            return
        connection = Connection(self._relay, self._contexts, self._relay.name, address,
                                reader, writer)
        connection.is_stopping = self._is_stopping      # asyncio had accepted it already
        self._connections.add(connection)
        self._clients[site] += 1
        guest = connection.guest
        log_event(logging.INFO, connection.ident, "connected", client=client,
                  port=writer.get_extra_info("sockname")[1],
                  account=guest.account.name if guest else None)
        connection.task = asyncio.ensure_future(connection.run(implicit_tls=implicit_tls))
        connection.task.add_done_callback(functools.partial(self._left, connection, site))

    def _find_problem(self, site: object, file: int) -> str:
        config = self._relay.config
        if file >= self._client_files:
            return "Too many connections for the limit of open files"
        if len(self._connections) >= config.max_connections:
            return "Too many connections"
        if self._clients[site] >= config.max_connections_per_client:
            return "Too many connections from your address"
        return ""

    def _left(self, connection: Connection, site: object, task: asyncio.Task[None]) -> None:
        self._connections.discard(connection)
        self._clients[site] -= 1
        if not self._clients[site]:
            del self._clients[site]


def bind(config: Config) -> list[tuple[socket.socket, bool]]:
    """Open the ports; each with whether it is for implicit TLS. Raises StartError."""
    sockets = [(_listen(config, "SMTP_PORT", config.smtp_port), False)]
    if config.smtps_port:
        sockets.append((_listen(config, "SMTPS_PORT", config.smtps_port), True))
    return sockets


def _listen(config: Config, setting_name: str, port: int) -> socket.socket:
    is_dual = not config.listen_address and socket.has_dualstack_ipv6()
    host = "::" if is_dual else config.listen_address or "0.0.0.0"
    if host.lower() == "localhost":     # its first address may be ::1 alone
        host = "127.0.0.1"
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG,
                                    dualstack_ipv6=is_dual)
    except OSError as error:
        problem = (error.strerror or str(error)).partition(" (while")[0]
        raise StartError(f"{setting_name}={port}, LISTEN_ADDRESS={config.listen_address}: "
                         f"cannot listen: {problem}") from None


def become(user: str) -> None:
    """Give up root's rights, its groups too. Raises StartError."""
    if not user:
        return
    if os.geteuid() != 0:
        log_event(logging.INFO, "-", "stays", run_as=user,
                  reason="only root can become another user")
        return
    entry = pwd.getpwnam(user)
    try:
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except OSError as error:
        raise StartError(f"RUN_AS={user}: cannot become this user: {error.strerror}; start "
                         "as another user, with RUN_AS empty") from None


def raise_open_files(wanted: int) -> float:
    """Raise the soft limit of open files to `wanted`, or as far as the system allows.
    Returns the limit.
    """
    if resource is None:
        return math.inf
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:              # RLIM_INFINITY is -1, or very large
        limit = min(wanted, hard) if hard >= 0 else wanted
        with contextlib.suppress(OSError, ValueError):      # macOS and sandboxes have more
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))       # limits
            soft = limit
    return soft if soft >= 0 else math.inf


def handle_signals(stop: Callable[[], object], reload: Callable[[], object]) -> None:
    """Call `stop` at SIGTERM or SIGINT, and `reload` at SIGHUP. A second SIGTERM or SIGINT
    ends the process at once.

    All three are always handled: the relay as PID 1 of a container has no default action,
    and SIGHUP would end it elsewhere. Windows lacks the loop's add_signal_handler().
    """
    def handle(number: int, frame: object) -> None:
        if number in STOP_SIGNALS:
            for each in STOP_SIGNALS:
                signal.signal(each, lambda number, _: os._exit(128 + number))
        with contextlib.suppress(RuntimeError):         # the loop has ended already
            (stop if number in STOP_SIGNALS else reload)()

    for number in (*STOP_SIGNALS, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, handle)


def run(config: Config, announce: Callable[[int], None] | None = None,
        microsoft: Any = None) -> None:
    """Serve until SIGTERM or SIGINT; `announce` gets the port. Raises StartError."""
    handle_signals(lambda: sys.exit(0), lambda: None)   # nothing has begun yet
    contexts = make_tls_contexts(config)
    relay = Relay(config, microsoft)
    sockets = bind(config)
    become(config.run_as)
    relay.directory.file.check_access()
    if announce:
        announce(sockets[0][0].getsockname()[1])
    asyncio.run(_run(relay, contexts, sockets))


async def _run(relay: Relay, contexts: Mapping[str, ssl.SSLContext],
               sockets: list[tuple[socket.socket, bool]]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_loop_error)
    stop = asyncio.Event()

    try:
        await relay.start()
        soon, file = loop.call_soon_threadsafe, relay.directory.file
        handle_signals(lambda: soon(stop.set), lambda: soon(file.ask))
        await Server(relay, contexts).run(sockets, stop)
    finally:
        relay.close()
    log_event(logging.INFO, "-", "stopped")


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what asyncio has to say, such as that there are no more file descriptors."""
    log_event(logging.ERROR, "-", "asyncio", problem=context.get("message"),
              error=context.get("exception"))


# ---------------------------------------------------------------------------
# §18  Demo
# ---------------------------------------------------------------------------

DEMO_USER = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


class Outbox:
    """Takes the place of Microsoft: accepts every login, and stores messages as files."""

    folder = pathlib.Path("outbox")

    async def get(self, application: Application, deadline: float) -> str:
        """Return a token, as Tokens does."""
        return "token"

    async def send(self, application: Application, message: Outgoing, ident: str,
                   deadline: float, *, is_live: bool) -> HttpResponse:
        """Store a message, large ones too. Raises DeliveryError."""
        path = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{ident}.eml"
        prepared = message.prepared
        try:
            path.write_bytes(prepared.header + prepared.body)
        except OSError as error:
            raise DeliveryError(f"{path} cannot be written: {error.strerror}", 452,
                                "4.3.1") from None
        print(f"{path}: {prepared.size} octets from {escaped(prepared.mailbox)}",
              flush=True)
        return HttpResponse(202, {}, b"")


def demo(environ: Mapping[str, str]) -> None:
    """Run with an outbox in place of Microsoft. Raises ConfigError, StartError."""
    try:
        Outbox.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StartError("the folder outbox cannot be made here: "
                         f"{error.strerror}") from None
    config = Config.from_environ({
        **environ, "TLS_SOURCE": "off", "REQUIRE_TLS": "false", "SMTPS_PORT": "0",
        "RUN_AS": "", "SPOOL_DIRECTORY": "",
        "LISTEN_ADDRESS": environ.get("LISTEN_ADDRESS", "").strip() or "127.0.0.1"})
    with logging_to_stderr(config.log_level):
        run(config, functools.partial(_print_demo, config), Outbox())


def _print_demo(config: Config, port: int) -> None:
    user = config.username_delimiter.join(DEMO_USER)
    address = config.listen_address
    host = "127.0.0.1" if address in ("localhost", "0.0.0.0", "::") else address
    in_url = f"[{host}]" if ":" in host else host
    credentials = f"{urllib.parse.quote(user, safe='')}:demo"
    print(f"""\
The relay listens on {address} port {port}, without TLS, in front of a stand-in for
Microsoft. For a printer, start it with LISTEN_ADDRESS=0.0.0.0. With any password, log in as
{user}
Each message is saved in {Outbox.folder}/. Send a first one from another terminal:

  printf 'Subject: Hello\\n\\nIt works.\\n' | curl \\
    smtp://{credentials}@{in_url}:{port} \\
    --mail-from scanner@example.com --mail-rcpt you@example.com --upload-file -

or, without curl:

  python3 -c "import smtplib; s = smtplib.SMTP('{host}', {port}); \\
  s.login('{user}', 'demo'); \\
  s.sendmail('scanner@example.com', 'you@example.com', 'Subject: Hello\\n\\nIt works.')"

Stop with Ctrl-C.
""", flush=True)


# ---------------------------------------------------------------------------
# §19  Explain
# ---------------------------------------------------------------------------
#
# What would become of a message, told without any network by the code that would do it.

def explain(config: Config, message: bytes, sender: str, recipients: Iterable[str]) -> bool:
    """Print what the relay would do; returns whether it would send the message."""
    try:
        envelope = _receive(config, message, sender, recipients)
        outgoing = make_outgoing(envelope, config)
    except RelayError as error:
        print(f"Refused: {error.reply}")
        return False
    prepared = outgoing.prepared
    print(f"Sent by:  {visible(prepared.mailbox)}\nSent to:")
    for one in split_header(prepared.header).find(*_ADDRESS_FIELDS):
        for address in _read_field(one).addresses:
            more = "" if address.key in envelope.recipients else ", though no recipient"
            print(f"  {visible(address.mailbox)}  ({one.label.decode()}{more})")
    edits = list(_edits(prepared.before, prepared.header))
    print("\n".join(["Edits:", *edits] if edits else ["Edits:    none"]))
    if outgoing.draft is None:
        print(f"Path:     sendMail, {prepared.size} octets")
        return True
    print(f"Path:     a draft, as {prepared.size} octets are more than "
          f"{GRAPH_MESSAGE_LIMIT}; attachments: {len(outgoing.draft.attachments)}")
    for attachment in outgoing.draft.attachments:
        print(f"  {visible(attachment.name)}  ({attachment.part.media_type}, "
              f"{attachment.size} octets, "
              f"{'by upload session' if attachment.is_large else 'in one request'}"
              f"{', within the text' if attachment.content_id else ''})")
    return True


def _receive(config: Config, message: bytes, sender: str,
             recipients: Iterable[str]) -> Envelope:
    """Say to a Session what a device would. Raises RelayError with its first refusal."""
    session = Session(config, "explain", _raise_refusal)
    session.tls_started()
    session.authenticated(Login(Account(), Application("", ""), "explain"))
    utf8 = "" if "".join([sender, *recipients]).isascii() else " SMTPUTF8"
    lines = ["EHLO explain", f"MAIL FROM:<{sender}> SIZE={len(message)}{utf8}",
             *(f"RCPT TO:<{one}>" for one in recipients), "DATA", ""]
    session.receive("\r\n".join(lines).encode("utf-8", "surrogateescape"))
    if message:                         # its last line may end as in any text file
        message = message.removesuffix(b"\n").removesuffix(b"\r") + b"\r\n"
    session.receive(b"." * message.startswith(b".") + message.replace(b"\r\n.", b"\r\n.."))
    session.receive(b".\r\n")
    event = session.next_event()
    assert isinstance(event, Deliver)   # anything else has raised
    return event.envelope


def _raise_refusal(mark: str, what: object) -> None:
    if mark == "!" and isinstance(what, Reply):
        raise RelayError(what.text, what.code, what.status)


def _edits(before: bytes, after: bytes) -> Iterator[str]:
    """Compare two headers by their lines."""
    old, new = before.split(b"\r\n"), after.split(b"\r\n")
    lines = difflib.SequenceMatcher(None, old, new, autojunk=len(old) > 2000)  # it is slow
    for kind, *at in lines.get_opcodes():
        if kind != "equal":
            yield from (f"  - {visible(decode_text(line))}" for line in old[at[0]:at[1]])
            yield from (f"  + {visible(decode_text(line))}" for line in new[at[2]:at[3]])


def visible(text: str) -> str:
    """Make a text one line that shows all there is in it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------
# §20  Command line
# ---------------------------------------------------------------------------

def serve(environ: Mapping[str, str]) -> None:
    """Run the relay. Raises ConfigError, StartError."""
    config = Config.from_environ(environ)
    with logging_to_stderr(config.log_level):
        run(config)


def run_explain(environ: Mapping[str, str], arguments: argparse.Namespace) -> int:
    """Print what would become of a file. Raises ConfigError."""
    addresses = [arguments.sender, *arguments.recipients]
    if not all(one.isprintable() for one in addresses):
        raise ConfigError("an address holds control characters")
    try:
        message = pathlib.Path(arguments.file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{arguments.file}: cannot be read: {error.strerror}") from None
    sys.stdout.reconfigure(errors="backslashreplace")   # type: ignore[union-attr]
    config = Config.from_environ(environ)
    return 0 if explain(config, message, arguments.sender, arguments.recipients) else 1


def print_hash() -> None:
    """Ask for a password, or read it from a pipe; print its hash. Raises ConfigError."""
    if sys.stdin.isatty():
        password = getpass.getpass()
        if getpass.getpass("Again: ") != password:
            raise ConfigError("the two are not the same")
    else:
        password = sys.stdin.buffer.readline().decode(errors="replace").rstrip("\r\n")
    if not password.isprintable() or not password or "\ufffd" in password:
        raise ConfigError("a password must be printable text in UTF-8, and not empty")
    if not has_scrypt():
        raise ConfigError("this Python has no scrypt; use another one")
    print(hash_password(password, secrets.token_bytes(16)))


def print_user_name(environ: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Print the short user name of an application. Raises ConfigError."""
    try:
        tenant, client = read_tenant(arguments.tenant), read_client(arguments.client)
    except ValueError as error:
        raise ConfigError(f"needed is {error}") from None
    short = encode_uuid(tenant) if decode_uuid(tenant) else tenant
    print(short + Config.from_environ(environ).username_delimiter + encode_uuid(client))


def print_accounts(environ: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Print the accounts as they are understood, or what an address gets."""
    config = Config.from_environ(environ)
    if not config.accounts_file:
        raise ConfigError("ACCOUNTS_FILE is not set")
    file = AccountsFile(config)
    file.load()
    if arguments.match is None:
        print("\n\n".join(map(describe_account, file.accounts)))
        return
    address = read_address(arguments.match)
    if address is None:
        raise ConfigError(f"{arguments.match!r} is no IP address")
    guest, config = file.accounts.at(address, config)
    print(f"{address}\n"
          f"without login:    {f'as [{guest.account.name}]' if guest else 'no'}\n"
          f"require_tls:      {str(config.require_tls).lower()}\n"
          f"tls_min_version:  {config.tls_min_version}\n"
          "may log in as:    "
          + (" ".join(f"[{one.name}]" for one in file.accounts
                      if (one.password or not one.has_credential) and one.holds(address))
             or "none"))


def describe_account(account: Account) -> str:
    """Show an account as a section of ACCOUNTS_FILE, without its secrets."""
    lines = [f"[{account.name}]"]
    for key, one in declared(Account).items():
        value = getattr(account, key)
        text = (", ".join(map(str, value)) if isinstance(value, tuple) else
                str(value).lower() if isinstance(value, bool) else str(value or ""))
        if text and not (key == "client_secret" and account.client_secret_file):
            lines.append(f"{key} = {one.show(text)}")
    return "\n".join(lines)


def run_spool(environ: Mapping[str, str], arguments: argparse.Namespace) -> int:
    """Show what is in the spool, or change it. Raises ConfigError, StartError."""
    config, action = Config.from_environ(environ), arguments.action
    if not config.spool_directory:
        raise ConfigError("SPOOL_DIRECTORY is not set")
    if action in ("show", "drop") and not arguments.ident:
        raise ConfigError(f"spool {action} needs the ID of a message, see `spool list`")
    store = Store(config.spool_directory)
    try:
        found = [(path, entry) for path, entry in store.names()
                 if arguments.ident in (None, path.name)]
        if not found:
            print("There is no such message." if arguments.ident else "The spool is empty.")
        for path, entry in found:
            if action == "drop":
                store.drop(path)
            elif action == "show":
                print_entry(store, path, entry)
            elif action == "list":
                print(describe_entry(path, entry))
            elif entry and (arguments.ident or path.parent == store.queue):
                with contextlib.suppress(FileNotFoundError):        # it was sent just now
                    store.retry(path, entry)
                    print(f"{path.name} is tried again")
        if action in ("retry", "drop"):
            store.touch()
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None
    return int(not found and arguments.ident is not None)


def describe_entry(path: pathlib.Path, entry: Entry | None) -> str:
    """Show on one line what is in a file of the spool."""
    def at(seconds: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

    if entry is None:
        return f"damaged {path.name}{in_words({'file': path})}"
    is_waiting = path.parent.name == "queue"
    return ("waiting " if is_waiting else "failed  ") + entry.ident + in_words({
        "queued": at(entry.queued_at), "size": entry.size,
        "account": entry.account or None, "sender": entry.mailbox,
        "recipients": ",".join(entry.recipients), "notice": entry.is_notice or None,
        "tries": entry.tries, "reason": entry.reason or None, "again": at(entry.next_at)
        if is_waiting and entry.next_at > time.time() else None})


def print_entry(store: Store, path: pathlib.Path, entry: Entry | None) -> None:
    """Print all there is of a message."""
    print(describe_entry(path, entry))
    if entry:
        message = path.read_bytes().partition(b"\n")[2][:entry.size]
        for line in decode_text(message).splitlines():
            print(visible(line))


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="smtp_oauth_relay.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Accept mail over SMTP, and send it through Microsoft 365.",
        epilog="environment variables (times in seconds, sizes in octets):\n"
               f"{settings_help()}\n\nHTTPS_PROXY, NO_PROXY and SSL_CERT_FILE work as in "
               "other programs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(run=lambda environ, arguments: serve(environ))
    commands = parser.add_subparsers(metavar="command")
    commands.add_parser("serve", help="run the relay; this is the default")
    trying = commands.add_parser("demo", help="try the relay without an account, in front "
                                              "of a stand-in for Microsoft")
    trying.set_defaults(run=lambda environ, arguments: demo(environ))
    explaining = commands.add_parser(
        "explain", help="show what would become of a message, without any network",
        description="Show what would become of a message, without any network. Exit "
                    "status: 0: it would be sent, 1: refused, 2: it cannot be told.")
    explaining.add_argument("file", metavar="FILE.eml")
    explaining.add_argument("--from", dest="sender", metavar="ADDRESS", required=True,
                            help="the sender, as in MAIL FROM; may be empty")
    explaining.add_argument("--to", dest="recipients", metavar="ADDRESS", required=True,
                            action="append", help="a recipient, as in RCPT TO; repeatable")
    explaining.set_defaults(run=run_explain)
    _add_account_commands(commands)
    spooling = commands.add_parser(
        "spool", help="show, retry or drop messages that wait in SPOOL_DIRECTORY",
        description="Show messages that wait in SPOOL_DIRECTORY or were given up, try them "
                    "again at once (without ID: all that wait), or delete one. A running "
                    "relay follows within seconds.")
    spooling.add_argument("action", nargs="?", default="list",
                          choices=("list", "show", "retry", "drop"))
    spooling.add_argument("ident", nargs="?", metavar="ID")
    spooling.set_defaults(run=run_spool)
    return parser


def _add_account_commands(commands: Any) -> None:
    encoding = commands.add_parser("encode", help="print the short user name of an "
                                                  "application")
    encoding.add_argument("tenant", metavar="TENANT", help="its ID, or a domain")
    encoding.add_argument("client", metavar="CLIENT", help="the application's ID")
    encoding.set_defaults(run=print_user_name)
    hashing = commands.add_parser("hash-password", help="print the hash of a password for "
                                                        "ACCOUNTS_FILE")
    hashing.set_defaults(run=lambda environ, arguments: print_hash())
    listing = commands.add_parser("accounts", help="show ACCOUNTS_FILE as it is understood")
    listing.add_argument("--match", metavar="ADDRESS",
                         help="show what a client with this IP address may do")
    listing.set_defaults(run=print_accounts)


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(os.environ, arguments) or 0
    except ConfigError as error:
        print(f"smtp_oauth_relay: what was given cannot be used:\n{error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"smtp_oauth_relay: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
