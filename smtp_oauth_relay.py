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

What it touches: it listens on SMTP_PORT (and SMTPS_PORT), reads the two TLS files, writes
its log to standard error, and connects to AZURE_AUTHORITY_HOST, GRAPH_ENDPOINT and the host
that Graph names for the upload of a large message, through HTTPS_PROXY if that is set. Only
if they are set: ACCOUNTS_FILE and the files of secrets that it names, AZURE_TABLES_URL,
SPOOL_DIRECTORY, the token file or the managed identity of the machine (asked directly), and
AZURE_KEY_VAULT_URL. `openssl` may be run to read a key from there, which is for a moment in
a file of mode 0600 if the system has no files in memory. The demo writes to outbox/.

    device --SMTP--> Connection --bytes--> Session       the protocol, without I/O
                         |  Authenticate, Deliver        its events
                       Relay --> Directory               who may log in, and as whom
                         |  \--> Tokens --HTTPS--> Entra ID
                         |  \--> QueueManager            what must wait, on disk
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
    §9   Queued messages            QueuedMessage: its state on the disk; the bounce
    §10  Log                        one line for an event        <- I/O starts here
    §11  HTTP                       HttpPool
    §12  Tokens                     Tokens: one request for all who need the same
    §13  Directory                  accounts in a file, in Azure Tables, in a user name
    §14  Graph                      Graph: sendMail, or a draft; 4 at once for a mailbox
    §15  Queue                      what Microsoft could not take yet, on disk
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
import http.client
import io
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
import urllib.parse
import urllib.request
import uuid
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Generic, NamedTuple, TypeVar, Union, cast

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
#
# Every error that a client hears of is a RelayError, raised where the fact is known and
# with the final text. It is turned into bytes in one place, Reply.__bytes__.

MAX_REPLY_TEXT = 480        # octets; a line has 512 at most, RFC 5321 section 4.5.3.1.5


class Reply(NamedTuple):
    """A reply to a client; lines of `text` are separated by LF.

    `status` is the enhanced status code (RFC 3463), or "" where RFC 2034 wants none.
    """

    code: int
    status: str
    text: str
    close: bool = False     # the connection ends after it

    def __bytes__(self) -> bytes:
        lines = [printable_ascii(f"{self.status} {line}" if self.status else line).encode()
                 for line in self.text.split("\n")]
        return b"".join(b"%d%s%s\r\n" % (self.code, mark, line[:MAX_REPLY_TEXT])
                        for mark, line in zip([*[b"-"] * (len(lines) - 1), b" "], lines))

    def __str__(self) -> str:
        return f"{self.code} {self.status} {self.text}".replace("  ", " ")


def printable_ascii(text: str) -> str:
    """Make a text printable ASCII: what a client or Microsoft said may be in it."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


class RelayError(Exception):
    """Something a client must be told; `.reply` says it.

    `.facts` and `.level` are for the log. Level INFO is a mistake of the client's.
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
#
# The fields of Config are the only list of settings. --help, the README's table and the
# checks are made from it. Defaults are text, so they are parsed like any other value.

GRAPH_REQUEST_LIMIT = 4_194_304     # octets
GRAPH_MESSAGE_LIMIT = 3_145_728     # octets: what base64 leaves of a request
EXCHANGE_LIMIT = 157_286_400        # octets: the most that a mailbox can be set to send
# User and password, host, port.
_PROXY = re.compile(r"(?:http://)?(?:[^/?#\s]*@)?(?:\[[0-9A-Fa-f:.]+\]|[^][/?#@:\s]+)"
                    r"(?::[0-9]{1,5})?/?")


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


def _mask_url(url: str) -> str:
    """Hide what may be a password in a URL."""
    return re.sub(r"(?s)^(\w+://)?(?:.*[?#].*@.*|.*@)|[?#].*", r"\1***", url)


def _mask_all(secret: str) -> str:
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


def settings_of(kind: type) -> dict[str, Setting]:
    """List the settings of a dataclass, in its order."""
    return {one.name: one.metadata["setting"] for one in dataclasses.fields(kind)
            if "setting" in one.metadata}


def _optional(parse: Callable[[str], Any], nothing: Any = "") -> Callable[[str], Any]:
    """Read nothing too."""
    return lambda text: parse(text) if text else nothing


def _comma_separated(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Read values with commas between them."""
    def parse_all(text: str) -> tuple[Any, ...]:
        found = tuple(parse(one) for one in re.split(r"[,\s]+", text) if one)
        if text and not found:
            raise ValueError("values, or empty")
        return tuple(dict.fromkeys(found))
    return parse_all


def _matching(pattern: str, accepted: str) -> Callable[[str], str]:
    """Read what matches a pattern."""
    def parse(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(accepted)
    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,12}", text) and low <= int(text) <= high:
            return int(text)
        raise ValueError(f"a whole number from {low} to {high}")
    return parse


_count = _integer(1, 1_000_000)
_text = _matching("[ -~]*", "printable ASCII text")
_utf8 = _matching("[^\ud800-\udfff]*", "text in UTF-8")
_HOST_NAME = "[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
_host_name = _matching(_HOST_NAME, "a host name such as relay.example.com")
_user = _matching("[ -9;-~]+", "the name of a user of this system, or nothing")
_ciphers = _matching("[ -~]+", "an OpenSSL cipher list that names a known cipher")
_vault_name = _matching("[0-9A-Za-z-]{1,127}(/[0-9A-Za-z]{1,64})?",
                    "the name of a certificate: letters, digits and hyphens")


def _boolean(text: str) -> bool:
    return _choice("true", "false")(text) == "true"


def _choice(*accepted: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        for value in accepted:
            if text.lower() == value.lower():
                return value
        raise ValueError("one of " + " ".join(accepted))
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


def _tls_version(text: str) -> str:
    version = _choice("1.0", "1.1", "1.2", "1.3")(text)
    if not getattr(ssl, "HAS_TLSv" + version.replace(".", "_").replace("_0", ""), True):
        raise ValueError("a version that the OpenSSL of this Python has")
    return version


def split_url(url: str, near: str = "is_loopback") -> urllib.parse.SplitResult | None:
    """Split a URL for secrets; None unless https, or http to an address that is `near`."""
    with contextlib.suppress(ValueError):       # of what is no URL, port or IP address
        parts = urllib.parse.urlsplit(url)
        host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
        if (host and parts.port != 0 and "@" not in parts.netloc
                and re.fullmatch("[!\"$-~]+", url) and (parts.scheme == "https" or (
                    parts.scheme == "http" and getattr(ipaddress.ip_address(host), near)))):
            return parts
    return None


def _endpoint(text: str) -> str:
    """Read the URL of a Microsoft service."""
    parts = split_url(text if "://" in text else f"https://{text}")
    url = parts.geturl().rstrip("/") if parts else ""
    if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?", url):
        raise ValueError("an https:// URL (http:// for this machine only, as 127.0.0.1)")
    return url


def _table_url(text: str) -> str:
    """Read the URL of an Azure table; behind a "?" may stand a SAS, which is a secret."""
    url, mark, sas = text.partition("?")
    with contextlib.suppress(ValueError):
        url = _endpoint(url)
        if (re.fullmatch(r"[^/]+//[^/]+(/[^/]+)?/[A-Za-z][A-Za-z0-9]{2,62}", url)
                and ".table.cosmos." not in url.lower()     # wants other tokens
                and re.fullmatch(r"[!\"$-~]*", sas)):
            return url + mark + sas
    raise ValueError("https://ACCOUNT.table.core.windows.net/TABLE, with or without a SAS "
                     "(a table of Azure Storage, not of Cosmos DB)")


def local_http_url(text: str) -> str:
    """Read the URL of a managed identity; it is plain http. Raises ValueError."""
    parts = split_url(text, "is_private")
    if parts is None or parts.scheme != "http":
        raise ValueError("an http:// URL of this machine, or of an address in its own "
                         "network")
    return text.rstrip("/") if parts.path == "/" else text


_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)
_SHORT_UUID = re.compile("[A-Za-z0-9_-]{22}(?:==)?")
_DOMAIN_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]*",
                          re.I | re.A)


def decode_uuid(text: str) -> str | None:
    """Bring a UUID, or its base64url form, into lower case; None if it is neither."""
    if _UUID.fullmatch(text):
        return text.lower()
    if _SHORT_UUID.fullmatch(text):
        return str(uuid.UUID(bytes=base64.urlsafe_b64decode(text[:22] + "==")))
    return None


def encode_uuid(text: str) -> str:
    """Shorten a UUID to the 22 characters of its base64url form."""
    return base64.urlsafe_b64encode(uuid.UUID(text).bytes).decode().rstrip("=")


def parse_tenant(text: str) -> str:
    """Read a tenant: a UUID in either form, or a domain. Raises ValueError."""
    tenant = decode_uuid(text) or (text.lower() if _DOMAIN_NAME.fullmatch(text) else None)
    if tenant is None:
        raise ValueError("the ID of a tenant, or one of its domains")
    return tenant


def parse_client(text: str) -> str:
    """Read a client: a UUID in either form. Raises ValueError."""
    client = decode_uuid(text)
    if client is None:
        raise ValueError("the ID of an application (client)")
    return client


@dataclass(frozen=True)
class Config:
    """The settings. Times are in seconds, sizes in octets."""

    # Server
    listen_address: str = setting(
        _optional(_address), "", "Address to listen on. Empty: all, IPv4 and IPv6.")
    smtp_port: int = setting(
        _integer(0, 65535), "8025", "Port for SMTP with STARTTLS. 0 picks a free one.")
    smtps_port: int = setting(
        _integer(0, 65535), "0", "Port for SMTP with TLS from the first octet. 0: none.")
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
        _boolean, "false", "If true, TENANT@CLIENT can log in only if the Azure table "
        "lists it, and the relay starts only if it can read the table.")
    allowed_tenants: tuple[str, ...] = setting(
        _comma_separated(parse_tenant), "",
        "Tenants that may log in as TENANT@CLIENT, with "
        "commas between, each as the devices write it (ID or domain). Empty: all.")
    azure_cloud: str = setting(
        _choice(*CLOUDS), "global", "Microsoft's cloud: global, usgov, usgov-dod or china. "
        "It sets the next two.")
    azure_authority_host: str = setting(
        _endpoint, CLOUDS["global"].authority, "Where tokens come from.", _mask_url)
    graph_endpoint: str = setting(
        _endpoint, CLOUDS["global"].graph, "Microsoft Graph; the token's scope too.",
        _mask_url)

    # Azure
    azure_tables_url: str = setting(
        _optional(_table_url), "", "Azure table of accounts, with a SAS or without.",
        _mask_url)
    azure_tables_partition_key: str = setting(
        _utf8, "user", "PartitionKey of its accounts.")
    azure_tables_force_usage: bool = setting(
        _boolean, "false", "Another name of ACCOUNTS_REQUIRED; one of them is enough.")
    azure_key_vault_url: str = setting(
        _optional(_endpoint), "", "Key Vault of the certificate.", _mask_url)
    azure_key_vault_cert_name: str = setting(
        _optional(_vault_name), "", "Name of the certificate there.")
    azure_tenant_id: str = setting(
        _optional(parse_tenant), "",
        "Tenant of the relay itself, for Tables and Key Vault.")
    azure_client_id: str = setting(
        _optional(parse_client), "",
        "Application, or user-assigned identity, of the relay.")
    azure_client_secret: str = setting(_utf8, "", "Secret of that application.", _mask_all)
    azure_federated_token_file: str = setting(
        str, "", "Token of a workload identity. Kubernetes sets it.")
    identity_endpoint: str = setting(
        str, "", "Managed identity. App Service and Container Apps set it.", _mask_url)
    identity_header: str = setting(
        _text, "", "Secret of that endpoint. Azure sets it with IDENTITY_ENDPOINT.",
        _mask_all)
    azure_pod_identity_authority_host: str = setting(
        local_http_url, "http://169.254.169.254", "Managed identity of virtual machines.",
        _mask_url)

    # Messages
    sender_from: str = setting(
        _choice("envelope", "header"), "envelope",
        "Which mailbox sends: envelope, that of MAIL FROM, or header, the first of From.")
    from_mismatch: str = setting(
        _choice("keep", "rewrite"), "keep",
        "When From names another mailbox than the one that sends: keep it (Microsoft "
        "decides), or rewrite its address.")
    header_recipients: str = setting(
        _choice("strip", "keep"), "strip",
        "When To, Cc or Bcc name somebody who is no recipient: strip the name, or keep it "
        "(Microsoft then sends the message there too).")
    large_messages: str = setting(
        _choice("upload", "refuse"), "upload",
        f"What to do with messages above {GRAPH_MESSAGE_LIMIT} octets: upload their "
        "attachments (this needs the right Mail.ReadWrite), or refuse them.")

    # Spool
    spool_directory: str = setting(
        str, "", "Folder for messages that Microsoft cannot take now; the relay sends them "
        "later. Empty: none, the device is told to try again.")
    spool_lifetime: int = setting(
        _integer(1, 10 ** 8), "172800", "How long it tries, before it gives a message up.")
    spool_max_bytes: int = setting(
        _integer(1000, 10 ** 12 - 1), "1073741824",
        "Most octets of that folder, with those of messages that were given up.")
    duplicate_window: int = setting(
        _integer(0, 86400), "900", "How long an accepted message with Message-ID and Date "
        "is remembered, so that it is not sent again if the device repeats it. 0: not.")

    # Limits
    max_message_size: int = setting(
        _integer(1000, EXCHANGE_LIMIT), "36700160",
        "Largest message; a mailbox sends 35 MB unless it was set to more in Exchange.")
    max_memory_for_messages: int = setting(
        _integer(1000, 10 ** 12 - 1), "268435456",
        "Most octets of all messages in flight together.")
    max_recipients: int = setting(_count, "500", "Most recipients of one message.")
    max_connections: int = setting(_count, "1000", "Most connections at once.")
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
        limit = GRAPH_MESSAGE_LIMIT if self.large_messages == "refuse" else EXCHANGE_LIMIT
        return min(self.max_message_size, limit)

    @property
    def must_have_account(self) -> bool:
        """Whether TENANT@CLIENT can log in only if the Azure table lists it."""
        return self.accounts_required or self.azure_tables_force_usage

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The URLs that may be asked, but for those of managed identities."""
        return tuple(filter(None, (self.azure_authority_host, self.graph_endpoint,
                                   self.azure_tables_url, self.azure_key_vault_url)))

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Config:
        """Read the settings. Raises ConfigError: all faulty values, else contradictions."""
        values, errors = {}, []
        cloud = CLOUDS.get(environ.get("AZURE_CLOUD", "").strip().lower(), CLOUDS["global"])
        defaults = {"AZURE_AUTHORITY_HOST": cloud.authority, "GRAPH_ENDPOINT": cloud.graph}
        for name, one in settings().items():
            text = environ.get(name, "").strip()
            try:
                values[name.lower()] = one.parse(text or defaults.get(name, one.default))
            except ValueError as error:
                errors.append(f"{name}={one.show(text)!r}: must be {error}")
        config = cls(**values)
        errors = errors or list(config.conflicts(environ))
        if errors:
            raise ConfigError("\n".join(errors))
        return config

    def conflicts(self, environ: Mapping[str, str]) -> Iterator[str]:
        """Find settings that contradict each other, and proxies that cannot be used."""
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
        if self.must_have_account and not (self.accounts_file or self.azure_tables_url):
            yield ("ACCOUNTS_REQUIRED=true (or AZURE_TABLES_FORCE_USAGE=true): nobody "
                   "could log in; set ACCOUNTS_FILE or AZURE_TABLES_URL too")
        if self.smtp_port and self.smtp_port == self.smtps_port:
            yield (f"SMTP_PORT={self.smtp_port} and SMTPS_PORT={self.smtps_port}: must be "
                   "different ports")
        if self.max_memory_for_messages < self.size_limit:
            yield (f"MAX_MEMORY_FOR_MESSAGES={self.max_memory_for_messages}: must hold one "
                   f"message, {self.size_limit} octets; raise it, or lower "
                   "MAX_MESSAGE_SIZE, or set LARGE_MESSAGES=refuse")
        needs_proxy = any(url.startswith("https:") for url in self.endpoints)
        for name in ("https_proxy", "HTTPS_PROXY") if needs_proxy else ():
            url = environ.get(name, "").strip()
            if url and not _PROXY.fullmatch(url):
                yield (f"{name}={_mask_url(url)!r}: must be http://host:port, or "
                       "http://user:password@host:port")


def settings() -> dict[str, Setting]:
    """List the settings by variable, in the order of Config."""
    return {name.upper(): one for name, one in settings_of(Config).items()}


def settings_help() -> str:
    """Show the settings for --help."""
    return "\n".join(f"  {name} (default: {one.default or 'empty'})\n      {one.help}"
                     for name, one in settings().items())


# ---------------------------------------------------------------------------
# §3  SMTP grammar
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
_LITERAL = r"\[[0-9A-Za-z.:-]+\]"
_MAILBOX = rf"(?:{_DOT_STRING}|{_QUOTED_STRING})@(?:{_DOMAIN}|{_LITERAL})"
_ROUTE = rf"@{_DOMAIN}(?:,@{_DOMAIN})*:"

_PATH = re.compile(rf" *(?:<(?:{_ROUTE})?(?P<mailbox>{_MAILBOX})>|(?P<null><>)"
                   rf"|(?P<bare>{_MAILBOX}))(?: +(?P<parameters>.*))?")
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([!-<>-~]+))?")
_BASE64 = re.compile("(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


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
    return (match["mailbox"] or match["bare"] or "",
            _parse_parameters(match["parameters"] or ""))


def normalize_mailbox(mailbox: str) -> str:
    """Bring a mailbox into the form in which two that are the same are equal.

    Case does not matter, nor do needless quotes, RFC 5321 section 4.1.2.
    """
    local_part, _, domain = mailbox.rpartition("@")
    if local_part.startswith('"'):
        local_part = re.sub(r"\\(.)", r"\1", local_part[1:-1], flags=re.S)
    # Of octets, so of ASCII only: beyond it, lower() makes different letters the same.
    octets = f"{local_part}@{domain}".encode("utf-8", "surrogateescape")
    return octets.lower().decode("utf-8", "surrogateescape")


def _parse_parameters(text: str) -> dict[str, str | None]:
    """Read the parameters of MAIL or RCPT, RFC 5321 section 4.1.2."""
    words = list(filter(None, text.split(" ")))
    matches = [match for match in map(_PARAMETER.fullmatch, words) if match]
    parameters = {match[1].upper(): match[2] for match in matches}
    if len(matches) < len(words):
        raise ProtocolError("A parameter is malformed")
    if len(parameters) < len(words):
        raise ProtocolError("A parameter is given twice")
    return parameters


def decode_base64(text: str) -> bytes:
    """Decode base64 as RFC 4954 section 4 wants it, strictly. Raises ProtocolError."""
    if not _BASE64.fullmatch(text):
        raise ProtocolError("This is not base64", 501, "5.5.2")
    return base64.b64decode(text)


# ---------------------------------------------------------------------------
# §4  Accounts
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

SCRYPT_COST = 2 ** 15               # N of RFC 7914; tests lower it
MIN_PREFIX_LENGTH = {4: 8, 6: 7}       # of an open account: 10.0.0.0/8, fc00::/7
SECRET_KEYS = {"client_secret", "client_secret_file", "credential"}
LIST_KEYS = {"allowed_recipients", "allowed_senders", "networks"}
NETWORK_KEYS = ("require_tls", "tls_min_version")       # what settings `networks` replace
_HASHED = re.compile(r"scrypt\$[A-Za-z0-9_-]{22}\$[A-Za-z0-9_-]{43}")
_mailbox = _matching(_MAILBOX, "an address such as scanner@example.com")

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
IpAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


@dataclass(frozen=True)
class Application:
    """An application or identity of Entra ID, and how it proves who it is."""

    tenant: str
    client: str
    secret: str = field(default="", repr=False)
    credential: str = "secret"      # or managed-identity, workload-identity
    relay_holds_secret: bool = False    # no device knows the secret


def relay_identity(config: Config) -> Application:
    """Find who the relay is to Azure, in the order of DefaultAzureCredential."""
    tenant, client = config.azure_tenant_id, config.azure_client_id
    secret = config.azure_client_secret
    if tenant and client and (secret or config.azure_federated_token_file):
        return Application(tenant, client, secret, "secret" if secret else
                           "workload-identity", relay_holds_secret=True)
    return Application("", client, "", "managed-identity", relay_holds_secret=True)


def _hash(text: str) -> str:
    if not _HASHED.fullmatch(text):
        raise ValueError("what this prints: python3 smtp_oauth_relay.py hash-password "
                         "(a plain password is not accepted)")
    if not has_scrypt():
        raise ValueError("empty, as this Python has no scrypt")
    return text


def _address_or_domain(text: str) -> str:
    """Read a domain, or an address, in comparable form."""
    if re.fullmatch(_MAILBOX, text) and "*" not in text:
        return normalize_mailbox(text)
    if not re.fullmatch(_DOMAIN, text):
        raise ValueError("domains and addresses, with commas between")
    return normalize_mailbox(f"@{text}")[1:]


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
        if getattr(network.network_address, "ipv4_mapped", None):
            raise ValueError("write it as IPv4")
        return network
    except ValueError as error:
        raise ValueError(f"networks such as 192.168.7.0/24: {error}") from None


class MessageOptions(NamedTuple):
    """How messages of an account are edited, made from its keys and the settings."""

    sender_from: str
    from_mismatch: str
    header_recipients: str
    from_email: str

    def sender(self, reverse_path: str, authors: list[str] | None = None) -> str:
        """Return the mailbox that sends, or "" while From decides and is not read yet."""
        if self.from_email or (reverse_path and self.sender_from == "envelope"):
            return self.from_email or reverse_path
        return "" if authors is None else [*authors, reverse_path][0]


@dataclass(frozen=True)
class Account:
    """What a client may do, as which application; its settings are keys of the file."""

    name: str = ""                  # "" for TENANT@CLIENT
    tenant_id: str = setting(
        _optional(parse_tenant), "", "Tenant of the application: its ID, or a domain.")
    client_id: str = setting(
        _optional(parse_client), "", "The application; or, with `managed-identity`, the "
        "user-assigned identity, and empty for the system-assigned one.")
    client_secret: str = setting(str, "", "The application's secret.", _mask_all)
    client_secret_file: str = setting(str, "", "The file that holds it.")
    credential: str = setting(
        _optional(_choice("managed-identity", "workload-identity")), "",
        "`managed-identity` or `workload-identity` instead of a secret.")
    password: str = setting(
        _optional(_hash), "", "What the device logs in with, as `hash-password` prints it. "
        "Without a secret here it stays empty: the device's password is the secret.",
        _mask_all)
    from_email: str = setting(
        _optional(_mailbox), "", "The mailbox that sends, whatever the device says; the "
        "display name is kept.")
    allowed_recipients: tuple[str, ...] = setting(
        _comma_separated(_address_or_domain), "",
        "Domains and addresses that may get mail. Empty: all.")
    allowed_senders: tuple[str, ...] = setting(
        _comma_separated(_address_or_domain), "",
        "Domains and addresses that may send. Empty: all.")
    networks: tuple[Network, ...] = setting(
        _comma_separated(_network), "", "Where the device must be. Empty: anywhere.")
    login: str = setting(
        _choice("required", "optional"), "required",
        "`optional`: whoever comes from `networks` may send without login.")
    require_tls: bool | None = setting(
        _optional(_boolean, None), "", "`REQUIRE_TLS` for `networks`.")
    tls_min_version: str = setting(
        _optional(_tls_version), "", "`TLS_MIN_VERSION` for `networks`.")

    @property
    def has_credential(self) -> bool:
        """Whether the relay has a credential; else the device's password is the secret."""
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

    def allows_address(self, address: IpAddress | None) -> bool:
        """Say whether a client may be where it is."""
        return not self.networks or (
            address is not None and any(address in one for one in self.networks))

    def check(self, mailbox: str, key: str) -> None:
        """Raise DeliveryError if `key`, as allowed_senders, does not allow a mailbox."""
        allowed, name = getattr(self, key), normalize_mailbox(mailbox)
        if allowed and name not in allowed and name.rpartition("@")[2] not in allowed:
            action = "send as" if key == "allowed_senders" else "send to"
            raise DeliveryError(f"This account may not {action} {mailbox}, see its {key}",
                                550, "5.7.1")

    def message_options(self, config: Config) -> MessageOptions:
        """Return the settings for its messages, as its keys change them."""
        return MessageOptions(
            config.sender_from, "rewrite" if self.from_email else config.from_mismatch,
            # With "keep" anybody in To would get the message.
            "strip" if self.allowed_recipients else config.header_recipients,
            self.from_email)

    def conflicts(self, config: Config) -> Iterator[str]:
        """Find keys that contradict each other."""
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
                if network.prefixlen < MIN_PREFIX_LENGTH[network.version]:
                    yield (f"networks: {network} without login is an open relay: anybody "
                           "could send mail as you; name the network of the devices")
        for name in () if self.networks else self.network_settings:
            yield f"{name}: needs networks, for which it is"
        if self.require_tls and config.tls_source == "off":
            yield "require_tls: true needs a certificate, see TLS_SOURCE"


class Principal(NamedTuple):
    """A client that may send: without login, `username` is ""."""

    account: Account
    application: Application
    username: str = ""


ANYBODY = Principal(Account(), Application("", ""))


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

    def at(self, address: IpAddress | None,
           config: Config) -> tuple[Principal | None, Config]:
        """Find who a client is without login, and the settings for where it is."""
        networks = [one for one in self.by_network if address and address in one]
        guest: Account | None = None
        changes: dict[str, Any] = {}
        for network in sorted(networks, key=lambda one: one.prefixlen):
            # The most specific one is the last, and prevails.
            accounts = self.by_network[network]
            guest = next((one for one in accounts if one.login == "optional"), None)
            for account in accounts:
                changes.update(account.network_settings)
        return (Principal(guest, guest.as_application()) if guest else None,
                dataclasses.replace(config, **changes))


def parse_address(text: str) -> IpAddress | None:
    """Read a client's address, without its zone; IPv4 in IPv6 is IPv4."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_accounts(text: str, config: Config) -> tuple[list[Account], list[str]]:
    """Read an accounts file; returns accounts and faulty values, or else contradictions."""
    # DEFAULT is read as a section like others, so that a fault in it is told once.
    parser = configparser.ConfigParser(default_section="", delimiters=("=",),
                                       inline_comment_prefixes=(";", "#"),
                                       interpolation=None)
    parser.SECTCRE = re.compile(r"\[\s*(?P<header>[^\]]*[^\]\s])\s*\]\s*$")
    try:
        parser.read_string(text)
    except configparser.Error as error:
        return [], list(_syntax_errors(error))
    errors: list[str] = []
    sections = {name: _parse_section(name, parser.items(name), errors)
                for name in parser.sections()}
    defaults = sections.pop("DEFAULT", {})
    errors += [f"[{name}]: must be [DEFAULT]" for name in sections
               if name.upper() == "DEFAULT"]
    accounts = [_make_account(name, defaults, values, config)
                for name, values in sections.items()]
    if not sections:
        errors.append("there is no account in it")
    return accounts, errors or list(_account_conflicts(accounts, config))


def _syntax_errors(error: configparser.Error) -> Iterator[str]:
    """Say what is no INI; the error's own text shows the line, and it may be a secret."""
    option = getattr(error, "option", None)
    if option or isinstance(error, configparser.DuplicateSectionError):
        where = f"[{getattr(error, 'section', '')}] {option or ''}".strip()
        yield f"line {getattr(error, 'lineno', '?')}: {where} is there twice"
        return
    for number, _ in getattr(error, "errors", None) or [(getattr(error, "lineno", "?"), 0)]:
        yield f"line {number}: is no [section], key = value or comment that belongs there"


def _parse_section(section: str, pairs: Iterable[tuple[str, str]],
                  errors: list[str]) -> dict[str, Any]:
    """Read the keys of a section, as far as they have no faults."""
    keys = settings_of(Account)
    values: dict[str, Any] = {}
    for key, text in pairs:
        one = keys.get(key)
        if one is None:
            loggable_username = key if re.fullmatch("[a-z_]{1,40}", key) else "***"
            errors.append(f"[{section}] {loggable_username}: is no key")
            continue
        if "\n" in text and ("=" in text or key not in LIST_KEYS):
            errors.append(f"[{section}] {key}: goes on in a line that is indented; do not "
                          "indent keys")
            continue
        try:
            values[key] = one.parse(text or one.default)
        except ValueError as error:
            errors.append(f"[{section}] {key} = {one.show(text)}: must be {error}")
    return values


def _make_account(name: str, defaults: Mapping[str, Any], values: Mapping[str, Any],
                  config: Config) -> Account:
    """Join a section with the defaults; a secret there gives way to any in the section."""
    if SECRET_KEYS & values.keys():
        defaults = {key: defaults[key] for key in defaults.keys() - SECRET_KEYS}
    merged = {**defaults, **values}
    if merged.get("credential") == "workload-identity":
        merged["tenant_id"] = merged.get("tenant_id") or config.azure_tenant_id
        merged["client_id"] = merged.get("client_id") or config.azure_client_id
    return Account(name, **merged)


def _account_conflicts(accounts: list[Account], config: Config) -> Iterator[str]:
    """Find keys that contradict each other, and accounts that cannot be told apart."""
    for account in accounts:
        yield from (f"[{account.name}] {text}" for text in account.conflicts(config))
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


def hash_password(password: str, salt: bytes) -> str:
    """Hash a password with 16 octets of salt: scrypt, RFC 7914, r=8, p=1."""
    digest = hashlib.scrypt(password.encode(), salt=salt, n=SCRYPT_COST, r=8, p=1,
                            maxmem=2 ** 26, dklen=32)
    return "$".join(["scrypt", *(base64.urlsafe_b64encode(octets).decode().rstrip("=")
                                 for octets in (salt, digest))])


def verify_password(password: str, hashed: str) -> bool:
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

    Each is a UUID or its 22 characters in base64url; the tenant may also be a domain. What
    follows a dot after the delimiter is ignored: some devices want an e-mail address.
    """
    tenant, _, client = username.partition(delimiter)
    try:
        return parse_tenant(tenant), parse_client(client.partition(".")[0])
    except ValueError:
        raise AuthError(f"The user name must be TENANT{delimiter}CLIENT: the tenant's ID "
                        "or domain, and the application's ID") from None


# ---------------------------------------------------------------------------
# §5  SMTP session
#
# Session is the protocol and nothing else: no socket, no clock, no task. Its caller
#
#     receive(octets)     gives it what comes from the network, b"" at the end
#     next_event()        asks what to do now; None is: read more
#     output()            takes the replies that are ready
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
MAX_COST = 100                  # of commands since a login or a message was accepted
PROGRESS_BYTES = 65536                # octets of a message that count as one command

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


class StartTls(NamedTuple):
    """Send the output, then do the handshake."""


@dataclass(frozen=True)
class Authenticate:
    """Check a user name and a password."""

    username: str
    password: str = field(repr=False)


class Deliver(NamedTuple):
    """Hand a message on; lines end in CRLF, dot-stuffing is undone."""

    envelope: Envelope


class Close(NamedTuple):
    """Send the output and close; `reason` is for the log."""

    reason: str


Event = Union[StartTls, Authenticate, Deliver, Close]


class MemoryBudget:
    """What is `free` for messages in flight, of MAX_MEMORY_FOR_MESSAGES, in octets."""

    def __init__(self, limit: int) -> None:
        self.free = limit

    def take(self, octets: int) -> None:
        """Take octets, or raise TemporaryError if so many are not free."""
        self.check(octets)
        self.free -= octets

    def check(self, octets: int) -> None:
        """Raise TemporaryError if so many octets are not free."""
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
                 memory: MemoryBudget | None = None,
                 guest: Principal | None = None) -> None:
        """Begin. A guest may send without login."""
        self._config = config
        self._name = name
        self._memory = memory or MemoryBudget(config.max_memory_for_messages)
        self._guest = guest
        self.secure = False
        self.login = guest              # who may send
        self._trace = trace or (lambda mark, text: None)
        self._phase = Phase.CONNECTED
        self._read = self._read_command
        self._event: Event | None = None
        self._buffer = bytearray()      # received, not yet worked on
        self._eof = False
        self._output: list[bytes] = []
        self._commands = 0
        self._octets = 0                # of messages
        self._cost = 0                  # see cost_of
        self._last_refusal: Reply | None = None            # the last that the log knows of
        self._envelope = Envelope("")
        self._allow_utf8 = False
        self._content = bytearray()     # of a message; its octets are taken of _memory
        self._skip = 0               # octets before it that are the command's CRLF
        self._refusal: RelayError | None = None         # the content is thrown away
        self._mechanism = ""
        self._answers: list[bytes] = []                 # of the client to AUTH challenges

    # The caller's side.

    def greet(self) -> None:
        """Say the first word. RFC 5321 section 4.2: the domain comes first."""
        self._send(Reply(220, "", f"{self._name} ESMTP {self._config.server_greeting}"))

    def receive(self, octets: bytes) -> None:
        """Take octets from the client; none if it will send no more."""
        self._buffer += octets
        self._eof = not octets

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
        return self._commands + self._octets // PROGRESS_BYTES

    @property
    def holds_message(self) -> bool:
        """Whether a message is being received, or waits for an answer."""
        return self._read == self._read_content or (
            self._read == self._wait and self._phase is Phase.RCPT)

    def end(self, reply: Reply, reason: str) -> None:
        """Let a reply be the last word, whatever the client was doing."""
        self._send(reply)
        self._close(reason)

    def reset(self) -> None:
        """Forget the message that is on its way in."""
        self._memory.free += len(self._content)
        self._content = bytearray()
        self._envelope = Envelope("")
        self._allow_utf8 = False
        if self._phase is not Phase.CONNECTED:
            self._phase = Phase.READY

    # The caller's answers to events.

    def tls_started(self) -> None:
        """Go on under TLS. What came in the clear is forgotten, RFC 3207 section 4.2."""
        self.secure = True
        self.login = self._guest
        self._phase = Phase.CONNECTED
        self._buffer.clear()
        self._resume()

    def authenticated(self, login: Principal) -> None:
        """Go on with a client that is who it says."""
        self.login = login
        self._cost = 0
        self._resume(Reply(235, "2.7.0", "Authentication succeeded"))

    def delivered(self, text: str) -> None:
        """Go on after a message that was accepted."""
        self._cost = 0
        self._resume(Reply(250, "2.0.0", text))

    def refuse(self, reply: Reply) -> None:
        """Go on after a login or a message that was not accepted."""
        self._resume(reply)

    # Readers: work on a piece of the input; False if there is no whole one.

    def _wait(self) -> bool:
        return False

    def _read_command(self) -> bool:
        if (not self.secure and not self._commands
                and self._buffer.startswith(_CLIENT_HELLO)):
            self._close("the client speaks TLS from the first octet: set it to STARTTLS, "
                        "or to the port that SMTPS_PORT opens")
            return False
        is_auth = self._buffer[:5].upper() == b"AUTH "
        return self._read_line(self._command, MAX_AUTH if is_auth else MAX_COMMAND)

    def _read_auth(self) -> bool:
        return self._read_line(self._auth_response, MAX_AUTH)

    def _read_line(self, handler: Callable[[str], Reply | None], limit: int) -> bool:
        """Obey one line; it ends in CRLF and in nothing else."""
        end = self._buffer.find(b"\r\n")
        if end + 2 > limit or (end < 0 and len(self._buffer) > limit):
            # What follows may be the rest of it, and is no command.
            status = "5.5.6" if limit == MAX_AUTH else "5.5.2"
            self.end(Reply(500, status, "The line is too long"), "a line is too long")
            return False
        if end < 0:
            if self._eof:
                self._close("the client hung up")
            return False
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 2]
        self._commands += 1
        try:
            reply = handler(_decode_line(line))
        except RelayError as error:
            self._read = self._read_command         # an error ends AUTH
            self._log_refusal(error.reply)
            reply = error.reply
        if reply:
            self._answer(reply)
        return True

    def _read_content(self) -> bool:
        """Take what there is of a message; only CRLF . CRLF ends it."""
        end = self._buffer.find(_END_OF_DATA)
        # What may begin the end waits; a CR is among it, so no CRLF is parted.
        unsure = (size for size in (4, 3, 2, 1)
                  if self._buffer.endswith(_END_OF_DATA[:size]))
        cut = end + 2 if end >= 0 else len(self._buffer) - next(unsure, 0)
        # A dot at the start of a line was added by the client, RFC 5321 section 4.5.2.
        part = self._buffer[:cut].replace(b"\r\n.", b"\r\n")
        del self._buffer[:cut]
        self._octets += cut
        if part and not self._refusal:
            self._keep_content(_with_crlf(part[self._skip:]))
            self._skip = 0
        if end >= 0:
            del self._buffer[:3]
            self._end_content()
            return True
        if self._eof:
            self._close("the client hung up within a message")
        return False

    def _keep_content(self, part: bytearray) -> None:
        try:
            if len(self._content) + len(part) > self._config.size_limit:
                raise _above_limit(self._config)
            self._memory.take(len(part))
            self._content += part
        except RelayError as error:
            self._memory.free += len(self._content)
            self._content = bytearray()
            self._refusal = error

    def _end_content(self) -> None:
        if self._refusal:
            self._log_refusal(self._refusal.reply)
            self._resume(self._refusal.reply)
            return
        self._envelope.message = self._content      # no copy: it may be large
        self._ask(Deliver(self._envelope))

    # Commands, in the order of RFC 5321 section 4.1.1.

    def _ehlo(self, argument: str) -> Reply:
        # The argument is not checked: devices say anything, and it may not matter,
        # RFC 5321 section 4.1.4. The reply has no enhanced status code, RFC 2034.
        self._helo(argument)
        log_in = self.secure or not self._config.require_tls
        return Reply(250, "", "\n".join([
            self._name, f"SIZE {self._config.size_limit}", "PIPELINING", "8BITMIME",
            "SMTPUTF8", "ENHANCEDSTATUSCODES", *["STARTTLS"] * self._offers_tls(),
            *["AUTH PLAIN LOGIN"] * log_in, "HELP"]))

    def _helo(self, argument: str) -> Reply:
        self.reset()
        self._phase = Phase.READY
        return Reply(250, "", self._name)

    def _mail(self, argument: str) -> Reply:
        assert self.login is not None       # the table wants a login
        mailbox, parameters = parse_path(argument, "FROM:")
        for name, value in parameters.items():
            if name not in MAIL_PARAMETERS:
                raise ProtocolError("MAIL has no such parameter", 555, "5.5.4")
            if not re.fullmatch(MAIL_PARAMETERS[name], value or "", re.I):
                raise ProtocolError(f"The value of {name} is malformed")
        self._check_ascii(mailbox, "SMTPUTF8" in parameters)
        account = self.login.account
        if mailbox and account.message_options(self._config).sender(mailbox):
            account.check(mailbox, "allowed_senders")   # else after DATA: From decides
        size = int(parameters.get("SIZE") or 0)
        if size > self._config.size_limit:
            raise _above_limit(self._config)
        self._memory.check(size)
        self._envelope = Envelope(mailbox)
        self._allow_utf8 = "SMTPUTF8" in parameters
        self._phase = Phase.MAIL
        return Reply(250, "2.1.0", "Sender ok")

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
        self.login.account.check(mailbox, "allowed_recipients")
        recipients = self._envelope.recipients
        key = normalize_mailbox(mailbox)
        if key not in recipients and len(recipients) >= self._config.max_recipients:
            raise TemporaryError("Too many recipients; send the rest separately", 452,
                                 "4.5.3")
        recipients.setdefault(key, mailbox)
        self._phase = Phase.RCPT
        return Reply(250, "2.1.5", "Recipient ok")

    def _data(self, argument: str) -> Reply:
        # The CRLF of the command may begin the end: an empty message is just a dot.
        self._buffer[:0] = b"\r\n"
        self._skip = 2
        self._refusal = None
        self._read = self._read_content
        return Reply(354, "", "Send the message; end it with a dot on a line of its own")

    def _rset(self, argument: str) -> Reply:
        self.reset()
        return Reply(250, "2.0.0", "Ok")

    def _help(self, argument: str) -> Reply:
        return Reply(214, "2.0.0", "Commands: " + " ".join(COMMANDS))

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
            return self._auth_response("" if initial == "=" else initial)
        return self._challenge()

    def _auth_response(self, text: str) -> Reply | None:
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
        # A client may send its password at the wrong time.
        self._trace("<", "AUTH ***" if verb == "AUTH" else line if verb in COMMANDS else
                    f"*** ({len(line)} characters, no command)")
        if verb in HTTP_VERBS:
            self.end(Reply(421, "4.7.0", "This is SMTP, not HTTP"), "HTTP")
            return None
        if verb not in COMMANDS:
            raise ProtocolError("No such command", 500, "5.5.1")
        command = COMMANDS[verb]
        self._check(command, argument)
        handler = command.handler
        return handler if isinstance(handler, Reply) else handler(self, argument)

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

    def _send(self, reply: Reply) -> None:
        self._trace(">", reply)
        self._output.append(bytes(reply))

    def _log_refusal(self, reply: Reply) -> None:
        """Let the log know of a mistake, but not of one again and again."""
        if reply != self._last_refusal:
            self._last_refusal = reply
            self._trace("!", reply)

    def _answer(self, reply: Reply) -> None:
        """Send a reply. A session that gets nowhere ends."""
        self._send(reply)
        self._cost += cost_of(reply)
        if reply.close:
            self._close(str(reply))
        elif self._cost >= MAX_COST:
            self.end(Reply(421, "4.7.0", "Too many commands or errors without an accepted "
                           "login or message"), "no progress")

    def _ask(self, event: Event) -> None:
        self._event = event
        self._read = self._wait

    def _resume(self, reply: Reply | None = None) -> None:
        self._read = self._read_command
        self.reset()
        if reply:
            self._answer(reply)

    def _close(self, reason: str) -> None:
        self.reset()
        self._ask(Close(reason))


def cost_of(reply: Reply) -> int:
    """Weigh a reply by MAX_COST: the third failed login ends a session, the tenth error,
    the hundredth command. What leads to a message is free, refused recipients too.
    """
    if reply.code in (220, 334, 354, 452, 550) or reply.status == "2.1.5":
        return 0
    if reply.code == 535:
        return 34
    return 10 if 500 <= reply.code < 550 or reply.code in (553, 555) else 1


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


class Command(NamedTuple):
    """A row of the table of commands; `argument` None is: as the client likes."""

    handler: Callable[[Session, str], Reply | None] | Reply
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
    "VRFY":     Command(Reply(252, "2.5.0", "Send some mail; Microsoft 365 knows who is "
                                            "there"), argument=True),
    "EXPN":     Command(Reply(502, "5.5.1", "EXPN is not available")),
    "HELP":     Command(Session._help),
    "NOOP":     Command(Reply(250, "2.0.0", "Ok")),
    "QUIT":     Command(Session._quit, argument=False),
}

MAIL_PARAMETERS: Mapping[str, str] = {      # the pattern of its value
    "SIZE":     "[0-9]{1,20}",              # RFC 1870 section 3
    "BODY":     "7BIT|8BITMIME",
    "SMTPUTF8": "",
    "AUTH":     ".+",                       # nobody's word is trusted, RFC 4954 section 5
}

AUTH_CHALLENGES: Mapping[str, tuple[bytes, ...]] = {
    "PLAIN": (b"",),
    "LOGIN": (b"Username:", b"Password:"),      # devices compare them letter by letter
}


# ---------------------------------------------------------------------------
# §6  Messages
#
# Graph has no envelope: it mails whoever stands in To, Cc and Bcc. So these are made to
# name the envelope's recipients and nobody else (HEADER_RECIPIENTS=strip):
#
#     an address field ...            becomes
#     names only the envelope's       what it was, octet for octet; stray ";" are commas
#     names others too                itself without them: they go to X-Original-To, -Cc
#     is ambiguous                    X-Original-To, -Cc as a whole
#     is a Bcc                        part of the one Bcc, for whom no field names
#
# If the header has a malformed line, all recipients are in Bcc too, because a strict reader
# may stop there. Ambiguous is any field that is not in the forms which all programs read
# alike: if we read it in one way and Exchange in another, the mail would reach a stranger.
#
# And Graph wants From to name the mailbox in its URL. One that is missing or empty is
# added; of one that names another, or more, or nobody, FROM_MISMATCH makes
#
#     keep        nothing else: Microsoft decides
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
    rb"from|to|cc|bcc|subject|date|sender|reply-to|message-id|received|return-path"
    rb"|delivered-to|mime-version|importance|priority|(?:content|resent|list|x)-.*", re.I)
_FOLDED_LINE = re.compile(rb"[^\r\n]+\r\n(?:[ \t][^\r\n]*\r\n)*")
# The line before each message in an mbox file, RFC 4155 appendix A.
_MBOX_LINE = re.compile(rb"From [^\r\n]*\r\n(?=(?:%b):)" % _KNOWN_FIELD.pattern, re.I)
_ADDRESS_FIELDS = (b"to", b"cc", b"bcc")
_WHITESPACE = " \t\r\n"
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_QUOTED = r'"(?:[^"\\\r\n]|\\[^\r\n])*"'
_QUOTED_TEXT = re.compile(f"{_QUOTED}?")    # the closing quote may be missing
# The forms of an address that every reader reads alike: [name] <mailbox> or mailbox, each
# with a comment or without. A name without quotes may be an address, see _read_field.
_ADDRESS = re.compile(
    rf"(?P<before>(?:(?P<alias>{_MAILBOX})[ \t]*"
    rf'|(?:{_QUOTED}|[^"(),:;<>@\[\]\\])*)<[ \t]*)?'
    rf"(?P<mailbox>{_MAILBOX})"
    r"(?P<after>(?(before)[ \t]*>)(?:[ \t\r\n]*\([^()@\\\r\n]*\))?)"
    r"[ \t\r\n]*(?P<end>[,;]|\Z)[, \t\r\n]*")
_GROUP = re.compile(r"[\w .-]*\w:(?:(.*);)?", re.S | re.A)
# What is no address list, as a name and what stands in "<>"; a comment may be the name.
_ENCODED_WORD = r"=\?[^?\s]{1,75}\?[bq]\?[^?]*\?="
_LOOSE_FROM = re.compile(r"(?P<name>[^<>]*)<(?P<mailbox>[^<>]*)>[^<>]*"
                           r"|[^()<>]*\((?P<comment>[^()<>]*)\)\s*|(?P<alone>[^<>]*)")
# Top-level domains that lead nowhere from outside, RFC 6761, RFC 6762 and RFC 8375.
_LOCAL_DOMAINS = frozenset({"arpa", "corp", "example", "home", "internal", "invalid", "lan",
                            "local", "localdomain", "localhost", "test"})

BASE64_CHUNK = 58_368         # octets, a multiple of 3: no piece but the last is padded
MAX_HEADER = 1_048_576          # octets
MAX_ADDRESSES = 262_144         # octets of one field; 500 mailboxes have 160,000
MAX_HEADER_LINES = 10_000


@dataclass
class Field:
    """A field of a header with its folded lines, or (name b"") a malformed line."""

    name: bytes             # in lower case
    raw: bytes              # as it came, with the last CRLF
    replacement: bytes      # as it goes out

    @property
    def label(self) -> bytes:
        """The name as it is written."""
        return self.raw.partition(b":")[0].rstrip()

    @property
    def value(self) -> str:
        """What stands behind the colon; octets that are no UTF-8 survive encoding."""
        return self.raw.partition(b":")[2].decode("utf-8", "surrogateescape")


class Address(NamedTuple):
    """An address of a field, as it is written there."""

    key: str                # in comparable form; "" if the mailbox of a From is unreadable
    mailbox: str
    before: str             # name and "<"
    after: str              # ">" and comment

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.before}{self.mailbox}{self.after}"


class AddressList(NamedTuple):
    """The addresses of a field; none if another reader may read it otherwise."""

    addresses: list[Address]
    is_canonical: bool = True       # separated by commas
    is_ambiguous: bool = False


@dataclass
class Header:
    """The header of a message, or of a part of one."""

    fields: list[Field]
    end: int                # where the rest begins: with an empty line, or with text
    is_malformed: bool      # has a line that is no field, or white space before a colon
    top: list[bytes] = field(default_factory=list)  # new; a reader may end further down

    def find(self, *names: bytes) -> list[Field]:
        """The fields of some names."""
        return [one for one in self.fields if one.name in names]

    def __bytes__(self) -> bytes:
        """It as edited."""
        lines = [one.replacement for one in self.fields]
        # A new first field must come after a folded first line.
        first = int(bool(lines) and lines[0][:1] in (b" ", b"\t"))
        return b"".join([*lines[:first], *self.top, *lines[first:]])


def split_header(message: bytes | bytearray, begin: int = 0,
                 end: int | None = None) -> Header:
    """Split the header of a message, or of a part from `begin` to `end`, into its fields.

    Lines end in CRLF. A malformed line does not end the header, because a lenient reader
    would go on after it; but text between the last field and the empty line is not part
    of it. Raises DeliveryError.
    """
    limit = len(message) if end is None else end
    most = min(limit, begin + MAX_HEADER)
    position = header_end = begin
    is_header = False
    while line := _FOLDED_LINE.match(message, position, most):
        match = _FIELD.match(message, position, most)
        position = line.end()
        if match:
            header_end = position
            is_header = is_header or bool(_KNOWN_FIELD.fullmatch(match[1]))
    header_end = header_end if is_header else begin
    is_cut = most < limit and not message.startswith(b"\r\n", position)
    if header_end == position and is_cut:
        raise DeliveryError("The header is too large", 552, "5.3.4")
    if message.count(b"\n", begin, header_end) > MAX_HEADER_LINES:
        raise DeliveryError("The header has too many lines", 552, "5.3.4")
    fields, is_malformed = [], False
    for line in _FOLDED_LINE.finditer(message, begin, header_end):
        match = _FIELD.match(line[0])
        is_malformed = is_malformed or not match or match[0] != match[1] + b":"
        fields.append(Field(match[1].lower() if match else b"", line[0], line[0]))
    return Header(fields, header_end, is_malformed)


def _parse_addresses(field: Field) -> AddressList:
    """Read an address list, RFC 5322 section 3.4; ";" counts as ",".

    A field in any other form than those of _ADDRESS, in one group or none, is ambiguous.
    That is safe: such a field is renamed, and its recipients are in Bcc.
    """
    value = field.value.strip(_WHITESPACE)
    ambiguous = AddressList([], is_ambiguous=True)
    if len(field.raw) > MAX_ADDRESSES or _NOT_TEXT.search(value):
        return ambiguous
    group = _GROUP.fullmatch(value)
    value = (group[1] or "" if group else value).lstrip("," + _WHITESPACE)
    addresses, is_canonical, position = [], True, 0
    while position < len(value):
        match = _ADDRESS.match(value, position)
        if match is None or "=?" in match["mailbox"]:
            return ambiguous
        key, alias = normalize_mailbox(match["mailbox"]), match["alias"]
        if alias and normalize_mailbox(alias) != key:
            return ambiguous
        before = "<" if alias else match["before"] or ""
        addresses.append(Address(key, match["mailbox"], before, match["after"]))
        is_canonical = is_canonical and match["end"] != ";"
        position = match.end()
    return AddressList(addresses, is_canonical)


def _address_field(name: bytes, texts: list[str]) -> bytes:
    """Write a field; an address a line keeps lines below 998, RFC 5322 section 2.1.1."""
    value = ",\r\n ".join(texts).encode("utf-8", "surrogateescape")
    return name + b": " + value + b"\r\n"


def edit_recipients(header: Header, recipients: Mapping[str, str], policy: str) -> None:
    """Make To, Cc and Bcc name just these recipients; `policy` is HEADER_RECIPIENTS."""
    for one in header.find(b"resent-bcc"):      # hidden recipients, RFC 5322 section 3.6.6
        one.replacement = b""
    read = [(one, _parse_addresses(one)) for one in header.find(*_ADDRESS_FIELDS)]
    keeps = policy == "keep"
    named = {address.key for _, found in read if found.is_canonical or not keeps
             for address in found.addresses if not header.is_malformed}
    if not keeps:
        for one, found in read:
            one.replacement = _strip_unlisted(one, found, recipients)
    missing = [mailbox for key, mailbox in recipients.items() if key not in named]
    if not missing:
        return
    hidden = []                         # there may be one Bcc only, RFC 5322 section 3.6
    for one, found in read:
        if one.name == b"bcc" and not found.is_ambiguous:
            one.replacement = b""
            hidden += [address.text for address in found.addresses
                       if (address.key in named if address.key in recipients else keeps)]
    header.top.append(_address_field(b"Bcc", hidden + missing))


def _strip_unlisted(one: Field, found: AddressList, recipients: Mapping[str, str]) -> bytes:
    """Take out of a field whom the envelope does not name, as the table above says."""
    if found.is_ambiguous:
        return b"" if one.name == b"bcc" else b"X-Original-" + one.raw
    kept = [address.text for address in found.addresses if address.key in recipients]
    others = [address.text for address in found.addresses if address.key not in recipients]
    if found.is_canonical and not others:
        return one.raw
    lines = _address_field(one.label, kept) if kept else b""
    if others and one.name != b"bcc":
        lines += _address_field(b"X-Original-" + one.label, others)
    return lines


Authors = list[tuple[Field, list[Address]]]


def _parse_from(field: Field) -> list[Address]:
    """Read a From field, also in forms that are no address list: it mails nobody."""
    found = _parse_addresses(field)
    if not found.is_ambiguous:
        return found.addresses
    value = field.value.replace("\r\n", "") if len(field.raw) <= MAX_ADDRESSES else "<"
    match = _LOOSE_FROM.fullmatch(value)
    mailbox = (match["mailbox"] or "").strip() if match else ""
    name = match["name"] or match["comment"] or match["alone"] or "" if match else ""
    name = re.sub(f"[{_WHITESPACE}]+", " ", _NOT_TEXT.sub("", name)).strip()
    if not re.fullmatch(_QUOTED, name):
        name = _quote_name(name)
    if not re.fullmatch(_MAILBOX, mailbox):
        mailbox = ""
    return [Address(mailbox and normalize_mailbox(mailbox), mailbox,
                    f"{name} <".lstrip(), ">")]


def edit_from(header: Header, authors: Authors, mailbox: str, policy: str,
                login: str) -> None:
    """Make From agree with the mailbox that sends if `policy`, FROM_MISMATCH, wants it."""
    if not any(found for _, found in authors):
        for one, _ in authors:          # there are empty ones at most
            one.replacement = b""
        header.top.append(_address_field(b"From", [mailbox]))
        return
    key = normalize_mailbox(mailbox)
    agrees = all(author.key == key for _, found in authors for author in found)
    if policy == "rewrite" and not agrees:
        _rewrite_from(header, authors, mailbox, login)
        return
    for one, found in authors:
        names = _QUOTED_TEXT.sub("", one.value.replace("\r\n", ""))
        if names.count("@") > len(found) and all(author.key for author in found):
            one.replacement = _address_field(one.label, [author.text for author in found])


def _rewrite_from(header: Header, authors: Authors, mailbox: str, login: str) -> None:
    """Put a mailbox into From; whom it named gets the answers, if mail reaches him."""
    (first, found), *others = authors
    author = found[0]._replace(mailbox=mailbox).text if found else mailbox
    first.replacement = _address_field(first.label, [author])
    old = {author.key: author.mailbox for _, found in authors for author in found
           if _is_deliverable(author.mailbox, login)}
    if old.keys() - {normalize_mailbox(mailbox)} and not header.find(b"reply-to"):
        first.replacement += _address_field(b"Reply-To", list(old.values()))
    if len(found) != 1 or not found[0].key:
        first.replacement += b"X-Original-" + first.raw
    for one, _ in others:
        one.replacement = b"X-Original-" + one.raw


def _is_deliverable(mailbox: str, login: str) -> bool:
    """Whether mail to a mailbox may arrive: not to the login of a device, or @printer."""
    domain = mailbox.rpartition("@")[2].lower()
    top = domain.rpartition(".")[2]
    return ("." in domain and not domain.endswith("]") and not top.isdigit()
            and top not in _LOCAL_DOMAINS and mailbox.lower() != login.lower())


def _quote_name(name: str) -> str:
    """Write a name as quoted-strings; not its encoded words, RFC 2047 section 5."""
    words = re.split(rf"((?:(?<= )|^){_ENCODED_WORD}(?=[ ,;:]|$))", name, flags=re.I)
    return " ".join(word if number % 2 else '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'
                    for number, word in enumerate(map(str.strip, words)) if word)


@dataclass(frozen=True)
class EditedMessage:
    """A message as it is to go out, sent by `mailbox`."""

    mailbox: str
    original_header: bytes = field(repr=False)      # as it came
    header: bytes = field(repr=False)       # as it goes
    body: memoryview = field(repr=False)    # with the empty line, if `header` lacks it

    @property
    def size(self) -> int:
        """Octets."""
        return len(self.header) + len(self.body)

    def as_base64(self) -> Iterator[bytes]:
        """Encode the message in pieces, as sendMail wants it."""
        begin = BASE64_CHUNK - len(self.header) % 3
        yield base64.b64encode(self.header + bytes(self.body[:begin]))
        for start in range(begin, len(self.body), BASE64_CHUNK):
            yield base64.b64encode(self.body[start:start + BASE64_CHUNK])


def edit_message(envelope: Envelope, options: MessageOptions,
                 login: str) -> EditedMessage:
    """Edit the header of a message. Raises DeliveryError."""
    message = envelope.message
    mbox_line = _MBOX_LINE.match(message)
    header = split_header(message, mbox_line.end() if mbox_line else 0)
    authors = [(one, _parse_from(one)) for one in header.find(b"from")]
    named = [author.mailbox for _, found in authors for author in found if author.mailbox]
    mailbox = options.sender(envelope.reverse_path, named)
    if not mailbox:
        raise DeliveryError("MAIL FROM:<> needs a From field with the mailbox to send "
                            "from", 550, "5.1.7")
    edit_from(header, authors, mailbox, options.from_mismatch, login)
    edit_recipients(header, envelope.recipients, options.header_recipients)
    octets, body = bytes(header), memoryview(message)[header.end:]
    if len(octets) > MAX_HEADER:
        raise DeliveryError("The header is too large", 552, "5.3.4")
    if bytes(body[:2]) != b"\r\n" and (body or not header.fields):
        octets += b"\r\n"
    return EditedMessage(mailbox, bytes(message[:header.end]), octets, body)


# ---------------------------------------------------------------------------
# §7  Large messages
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
# Text in an unknown charset or encoding is decoded as what it most likely is.
#
# Parts are found by their boundaries, and decoded piece by piece while they are sent: the
# email package needs four times the size of the message more, and a second for 35 MB.

LARGE_ATTACHMENT = 3_130_000    # octets; from here on by upload session (whose least is
                                # 2,097,152), below in one request, with its JSON
UPLOAD_PIECE = 3_932_160        # octets, before decoding; Graph wants less than 4 MB
MAX_PARTS = 250                 # of a message, Exchange's own limit
MAX_DEPTH = 10                  # of parts within parts
MAX_VALUE = 4096                # characters of a field of a part that are read, and
MAX_PARAMETERS = 100            # of its parameters: the standard library is slow with more
MAX_ENCODED_WORDS = 500         # in one field: the standard library is slow with more
MAX_X_FIELDS = 5                # of a draft, Graph's own limit
MAX_FILE_NAME = 255             # characters

_NOT_BASE64 = bytes(set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                          b"abcdefghijklmnopqrstuvwxyz0123456789+/="))
_PART_FIELDS = frozenset({b"content-type", b"content-disposition", b"content-id",
                          b"content-transfer-encoding"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MEDIA_TYPE = re.compile(r"\s*([\w.+-]{1,127})\s*/\s*([\w.+-]{1,127})", re.A)
_META_CHARSET = re.compile(rb"<meta[^>]{1,200}charset=[\"']?([\w-]{1,40})", re.I)
_ENCODED_WORDS = re.compile(rf"{_ENCODED_WORD}(?:\s*{_ENCODED_WORD})*", re.I)
_X_FIELD = re.compile(rb"x-(?!ms-exchange-)[a-z0-9-]+")

UNSUPPORTED_TYPES: Mapping[str, str] = {
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
SUPPORTED_AS_FILE = frozenset({"application/pkcs7-mime", "application/x-pkcs7-mime",
                           "text/calendar"})
IMPORTANCE: Mapping[str, str] = {
    "high": "high", "urgent": "high", "1": "high", "2": "high", "normal": "normal",
    "low": "low", "non-urgent": "low", "4": "low", "5": "low"}
# The charset to decode with in place of one with this name in Python: mail programs mean
# more by some names, and the last two take quadratic time.
CHARSETS: Mapping[str, str] = {
    "ascii": "utf-8", "iso8859-1": "cp1252", "gb2312": "gb18030", "shift-jis": "cp932",
    "euc-kr": "cp949", "punycode": "utf-8", "idna": "utf-8"}
# As "replace" does, but in Python: other threads run during the seconds that 8 MB of faults
# take in some codecs.
codecs.register_error("relay.replace",
                      lambda error: ("\ufffd", error.end))  # type: ignore[attr-defined]


class NotConvertible(DeliveryError):
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
    encoding: str

    @property
    def is_text_alternative(self) -> bool:
        """Whether it is text for the eye, in whatever form."""
        return (self.media_type.startswith("text/")
                and not self.is_attachment and not self.file_name)

    @property
    def is_text(self) -> bool:
        """Whether it may be the body of a draft."""
        return self.media_type in ("text/plain", "text/html") and self.is_text_alternative

    def iter_decoded(self) -> Iterator[bytes]:
        """Decode it piece by piece, each below 4 MB. Raises Unsayable."""
        if self.encoding == "base64":
            return _decode_base64(self._slices())
        if self.encoding == "quoted-printable":
            return map(binascii.a2b_qp, self._slices())
        if self.encoding in ("7bit", "8bit", "binary") or self.is_text_alternative:
            return self._slices()
        raise NotConvertible("has a part in an unknown encoding")

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
            raise NotConvertible("has an attachment that goes on behind its end")
        is_ended = is_ended or bool(padding)
        text = rest + text
        cut = len(text) if is_ended else len(text) // 4 * 4
        if cut % 4 == 1:
            raise NotConvertible("has an attachment that is cut off")
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
        octets = base64.b64encode(b"".join(self.part.iter_decoded())).decode()
        return json.dumps({"@odata.type": "#microsoft.graph.fileAttachment",
                           **self.properties(), "contentBytes": octets}).encode()


class Draft(NamedTuple):
    """A message as JSON, and what is attached to it."""

    content: bytes
    attachments: list[Attachment]


class PreparedMessage(NamedTuple):
    """A message for Graph: one request, or a draft if it is too large for one."""

    edited: EditedMessage
    draft: Draft | None = None


def prepare_message(envelope: Envelope, config: Config,
                    login: Principal = ANYBODY) -> PreparedMessage:
    """Do all to a message of a device with that login. Raises DeliveryError."""
    options = login.account.message_options(config)
    edited = edit_message(envelope, options, login.username)
    if edited.size <= GRAPH_MESSAGE_LIMIT:
        return PreparedMessage(edited)
    if config.large_messages == "refuse":
        raise DeliveryError(
            f"The message has {edited.size} octets with the fields that the relay adds: "
            f"{GRAPH_MESSAGE_LIMIT} are the most, as LARGE_MESSAGES=refuse", 552, "5.3.4")
    return PreparedMessage(edited, make_draft(envelope.message, edited))


def make_draft(message: bytes | bytearray, edited: EditedMessage) -> Draft:
    """Take a prepared message apart. Raises DeliveryError."""
    fields = split_header(edited.header).fields
    leaves = _leaf_parts(_parse_part(fields, message, len(edited.original_header),
                                     len(message)), itertools.count())
    text = _body_part(leaves)
    files = [one for one in leaves if one is not text]
    body = _decode_body(text) if text else ""
    is_html = text is not None and text.media_type == "text/html"
    html = body.lower() if is_html else ""
    # Separately: a text with one emoji has four bytes for each character until encoded.
    content, properties = (
        json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        for value in (body, _draft_properties(fields, edited.mailbox)))
    content = b'{"body": {"contentType": "%b", "content": %b}, %b' % (
        b"HTML" if is_html else b"Text", content, properties[1:])
    if len(content) > GRAPH_REQUEST_LIMIT:
        raise NotConvertible("has a text that is too large by itself")
    # An object of our own, as that of the module reads files of the system.
    types = mimetypes.MimeTypes()
    attachments = []
    for number, part in enumerate(files, 1):
        suffix = types.guess_extension(part.media_type) or ".bin"
        # To the end of the reference; of one without quotes that is a space or a ")".
        reference = rf"cid:{re.escape(part.content_id.lower())}(?:[\"'<>&\s)]|$)"
        is_shown = part.content_id and re.search(reference, html)
        attachments.append(Attachment(
            part.file_name or f"ATT{number:05}{suffix}", part,  # as Exchange names it
            part.content_id if is_shown else "", sum(map(len, part.iter_decoded()))))
    return Draft(content, attachments)


def _parse_part(fields: list[Field], message: bytes | bytearray, begin: int,
               end: int) -> Part:
    """Read what the fields of a part say, RFC 2045, 2183, 2231."""
    if message.startswith(b"\r\n", begin, end):       # the empty line behind them
        begin += 2
    header = email.message.Message()
    for one in fields:
        if one.name in _PART_FIELDS:
            parameters = _unfold(one)[:MAX_VALUE].split(";")[:MAX_PARAMETERS]
            header[one.name.decode()] = ";".join(parameters)
    disposition = _first_word(header.get("content-disposition", ""))
    encoding = _first_word(header.get("content-transfer-encoding", "") or "7bit")
    of_type = _parameters(header, "content-type")
    name = (_parameters(header, "content-disposition").get("filename")
            or of_type.get("name", ""))
    file_name = _decode_header_text(name, "_").encode("utf-8", "replace").decode()
    match = _MEDIA_TYPE.match(header.get("content-type", "") or "text/plain")
    unknown = "application/octet-stream" if encoding == "base64" else "text/plain"
    return Part(message, begin, end,
                f"{match[1]}/{match[2]}".lower() if match else unknown, of_type,
                disposition == "attachment", file_name[-MAX_FILE_NAME:],
                header.get("content-id", "").strip(" \t<>"), encoding)


def _first_word(value: str) -> str:
    """The first word of a value, in lower case."""
    return str(re.findall(r"\W*([\w.-]*)", value, re.A)[0]).lower()


def _parameters(header: email.message.Message, name: str) -> dict[str, str]:
    """Read the parameters of a field; those of RFC 2231 come last, and win."""
    parameters = {}
    # RFC 2231 that is nonsense makes the standard library raise.
    with contextlib.suppress(ValueError, TypeError, LookupError):
        for key, value in header.get_params([], name):
            if isinstance(value, tuple):    # charset, language, octets
                value = decode_text(value[2].encode("latin-1", "replace"), value[0] or "")
            parameters[key] = value     # the standard library has it in lower case
    return parameters


def _leaf_parts(part: Part, counter: Iterator[int], depth: int = 0) -> list[Part]:
    """Find the text and the files of a part by the table above. Raises Unsayable."""
    _check_supported(part, depth)
    if next(counter) > MAX_PARTS or depth > MAX_DEPTH:
        raise NotConvertible("has too many parts")
    if not part.media_type.startswith("multipart/"):
        is_empty = (part.end - part.begin < 1000
                    and not part.message[part.begin:part.end].strip())
        return [] if is_empty and part.is_text else [part]
    found: list[list[Part]] = []
    for begin, end in _split_parts(part):
        # The CRLF of the next delimiter may be that of the last field.
        header = split_header(part.message, begin, min(end + 2, part.end))
        child = _parse_part(header.fields, part.message, min(header.end, end), end)
        found.append(_leaf_parts(child, counter, depth + 1))
    if not found:
        raise NotConvertible("has parts that cannot be told apart")
    leaves = [leaf for one in found for leaf in one]
    texts = [text for text in map(_body_part, found) if text]
    if part.media_type == "multipart/alternative" and texts:
        best = ([one for one in texts if one.media_type == "text/html"] or texts)[-1]
        forms = texts + [one[0] for one in found
                         if len(one) == 1 and one[0].is_text_alternative]
        leaves = [best] + [leaf for leaf in leaves if leaf not in forms]
    return leaves


def _check_supported(part: Part, depth: int) -> None:
    is_file = depth > 0 and part.is_attachment and part.media_type in SUPPORTED_AS_FILE
    if part.media_type in UNSUPPORTED_TYPES and (
            not is_file or "method" in part.parameters):
        raise NotConvertible(UNSUPPORTED_TYPES[part.media_type])
    if depth == 0 and part.file_name.lower().endswith((".p7m", ".p7z")):
        raise NotConvertible("is signed or encrypted")       # RFC 8551 section 3.9


def _body_part(leaves: list[Part]) -> Part | None:
    """The text is the first that may be one."""
    return next((one for one in leaves if one.is_text), None)


def _split_parts(part: Part) -> Iterator[tuple[int, int]]:
    """Find where the parts of a part begin and end, RFC 2046 section 5.1.1."""
    boundary = part.parameters.get("boundary", "").encode("utf-8", "replace")
    if not boundary:
        return
    # The CRLF after a delimiter may be the one before the next.
    delimiter = re.compile(rb"\r\n--%b(--)?[ \t]*(?=\r\n|\Z)" % re.escape(boundary))
    begin = part.end + 1                # nothing began yet
    for match in delimiter.finditer(part.message, max(0, part.begin - 2), part.end):
        if begin <= part.end:
            yield begin, match.start()
        if match[1]:
            return
        begin = match.end() + 2
    if begin <= part.end:               # the last delimiter is missing
        yield begin, part.end


def _decode_body(part: Part) -> str:
    """Read the text of a draft. Raises Unsayable."""
    charset = part.parameters.get("charset", "").strip()
    octets = bytearray()
    for piece in part.iter_decoded():
        octets += piece
        if len(octets) > 2 * GRAPH_REQUEST_LIMIT:       # UTF-16 has two for a character
            raise NotConvertible("has a text that is too large by itself")
    if not charset and part.media_type == "text/html":
        match = _META_CHARSET.search(octets, 0, 1024)
        charset = match[1].decode() if match else ""
    return decode_text(octets, charset)


def decode_text(octets: bytes | bytearray, charset: str = "") -> str:
    """Decode text; what is wrong or not said is what it most likely is."""
    codec = "utf-8"
    with contextlib.suppress(LookupError, ValueError):
        b" ".decode(charset[:40], "replace")            # not all codecs are of text
        codec = codecs.lookup(charset[:40]).name.replace("_", "-")
    codec = CHARSETS.get(codec, codec)
    # ISO-2022-JP with a fault is ASCII, and so UTF-8, but it is not what it says.
    for name in (codec,) if codec.startswith("iso2022") else (codec, "utf-8"):
        with contextlib.suppress(ValueError):
            return octets.decode(name)
    text = octets.decode(codec, "relay.replace")
    if codec == "utf-8" and not re.search("[^\x00-\x7f\ufffd]", text):
        return octets.decode("cp1252", "relay.replace")       # nothing of UTF-8 was in it
    return text


def _unfold(one: Field) -> str:
    """The value of a field on one line, RFC 5322 section 2.2.3."""
    return decode_text(one.raw.partition(b":")[2].replace(b"\r\n", b"")).strip()


def _decode_header_text(text: str, control: str = " ") -> str:
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
        if one.name in (*_ADDRESS_FIELDS, b"from", b"reply-to"):
            mails = one.name in _ADDRESS_FIELDS
            people.setdefault(one.name, []).extend(
                _recipient_json(address)
                for address in (_parse_addresses(one).addresses if mails
                                else _parse_from(one)) if address.key)
        else:
            first.setdefault(one.name, one)
    values = {name: _decode_header_text(_unfold(one)) for name, one in first.items()}
    authors = people.get(b"from") or [{"emailAddress": {"address": mailbox}}]
    importance = (IMPORTANCE.get(_first_word(values.get(name, ""))) for name in (
        b"importance", b"x-priority", b"priority", b"x-msmail-priority"))
    properties = {
        "subject": values.get(b"subject"), "from": authors[0],
        "toRecipients": people.get(b"to"), "ccRecipients": people.get(b"cc"),
        "bccRecipients": people.get(b"bcc"), "replyTo": people.get(b"reply-to"),
        "importance": next(filter(None, importance), None),
        "internetMessageId": values.get(b"message-id"),
        "internetMessageHeaders": [
            {"name": first[name].label.decode(), "value": value}
            for name, value in values.items() if value and _X_FIELD.fullmatch(name)
        ][:MAX_X_FIELDS]}
    return {name: value for name, value in properties.items() if value}


def _recipient_json(address: Address) -> dict[str, Any]:
    """Write an address as Graph wants it; a comment may be the name."""
    name = (address.before.rstrip("<" + _WHITESPACE)
            or address.after.strip(">()" + _WHITESPACE))
    name = _QUOTED_TEXT.sub(lambda match: email.utils.unquote(match[0]), name)
    name = _decode_header_text(decode_text(
        " ".join(name.split()).encode("utf-8", "surrogateescape")))
    mailbox = address.mailbox.encode("utf-8", "replace").decode()
    return {"emailAddress": {"address": mailbox, **({"name": name} if name else {})}}


# ---------------------------------------------------------------------------
# §8  Microsoft's answers
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
        """Seconds to wait after `now`, Unix time, or None; RFC 9110 section 10.2.3."""
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


def parse_token(response: HttpResponse, secret: str, now: float) -> tuple[str, float]:
    """Return a token and its seconds from `now`. Raises AuthError and TemporaryError."""
    answer = response.json()
    token = answer.get("access_token")
    if response.status == 200 and isinstance(token, str) and re.fullmatch("[!-~]+", token):
        life = (_number(answer.get("expires_in"))       # App Service has only the other
                or _number(answer.get("expires_on")) - now) - EXPIRES_EARLY
        return token, min(max(life, 0.0), MAX_TOKEN_LIFE)
    error, text = (value if isinstance(value, str) else ""
                   for value in (answer.get("error"), answer.get("error_description")))
    match = re.match("AADSTS([0-9]{1,9})", text)
    code = int(match[1]) if match else 0
    if response.status >= 400 and not error:    # in others there may be half of a token
        text = response.body.decode("utf-8", "replace")
    for form in filter(None, (secret, urllib.parse.quote_plus(secret))):
        text = text.replace(form, "***")
    facts = {"status": response.status, "aadsts": code or None, "error": error or None,
             "said": text or None}
    if (400 <= response.status < 500 and response.status != 429 and error
            and error not in TRANSIENT_ENTRA_ERRORS and code not in TRANSIENT_AADSTS):
        remedy = AADSTS_REMEDIES.get(code, "Entra refuses this application; see the log")
        raise AuthError(f"AADSTS{code}: {remedy}" if code else f"{error}: {remedy}",
                        facts=facts, level=logging.WARNING)
    raise TemporaryError("Microsoft gives no token now; try again later", 451, "4.7.0",
                         facts=facts)


def parse_tenant_id(token: str) -> str:
    """Return a token's tenant (tid) or "": for keys only, as no format is promised."""
    try:
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        return decode_uuid(claims["tid"]) or ""
    except (LookupError, TypeError, ValueError, RecursionError):
        return ""


def _number(value: object) -> float:
    """Read a number that may be text; garbage is 0."""
    try:
        number = float(value)           # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0


# {mailbox} is filled in.
_ACCESS_DENIED = Reply(
    550, "5.7.1", "The application may not send as {mailbox}: it needs the right Mail.Send "
    "for this mailbox (a new right takes up to 2 hours)")
_MAILBOX_NOT_FOUND = Reply(550, "5.1.8",
                           "Microsoft 365 has no mailbox {mailbox} to send from")
_UPLOAD_DENIED = Reply(
    552, "5.3.4", "The message is larger than 3 MB, and to send such as {mailbox} the "
    "application needs the right Mail.ReadWrite too (a new right takes up to 2 hours)")
_TOO_LARGE = Reply(552, "5.3.4", "Microsoft 365 says that the message is too large")
_MAILBOX_FULL = Reply(452, "4.2.2", "The mailbox {mailbox} is full")
_SERVICE_ERROR = Reply(451, "4.3.0", "Microsoft 365 has a problem; try again later")
_THROTTLED = Reply(451, "4.4.5", "Microsoft 365 wants mail to come more slowly; try again "
                              "later")

# Graph's code decides first, in answers 400 to 499 but 401 and 429, and two codes in
# those above too; then the status.
GRAPH_CODES: Mapping[str, Reply] = {
    "erroraccessdenied": _ACCESS_DENIED,
    "errorsendasdenied": Reply(
        550, "5.7.60", "The From field names a mailbox that {mailbox} may not send as; "
        "make both the same in the device, or set FROM_MISMATCH=rewrite"),
    "errorinvaliduser": _MAILBOX_NOT_FOUND,
    "resourcenotfound": _MAILBOX_NOT_FOUND,
    "errornonexistentmailbox": _MAILBOX_NOT_FOUND,
    "mailboxnotenabledforrestapi": _MAILBOX_NOT_FOUND,
    "mailboxnothostedinexchangeonline": _MAILBOX_NOT_FOUND,
    "errorinvalidrecipients": Reply(550, "5.1.3", "Microsoft 365 does not accept a "
                                                    "recipient"),
    "errormessagesizeexceeded": _TOO_LARGE,
    "errorquotaexceeded": _MAILBOX_FULL,
    "erroritemnotfound": _SERVICE_ERROR,      # the draft is gone
}
GRAPH_CODES_OF_ANY_STATUS = frozenset({"errormessagesizeexceeded", "errorquotaexceeded"})
GRAPH_STATUSES: Mapping[int, Reply] = {
    401: Reply(451, "4.7.0", "Microsoft 365 does not accept its own token; try again "
                               "later"),
    403: _ACCESS_DENIED,
    404: _MAILBOX_NOT_FOUND,
    408: _SERVICE_ERROR,         # the request came too slowly, RFC 9110 section 15.5.9
    413: _TOO_LARGE,
    429: _THROTTLED,
    507: _MAILBOX_FULL,
}
_MESSAGE_REFUSED = Reply(554, "5.6.0", "Microsoft 365 does not accept the message")
_UNKNOWN_ANSWER = Reply(554, "5.3.0", "Microsoft 365 gave an unknown answer; the message "
                                      "was not accepted")


class GraphOperation(enum.Enum):
    """What Graph is asked to do, and the statuses that mean success."""

    SEND = "send a message", 202
    CREATE = "make a draft", 200, 201
    ATTACH = "change the draft", 200, 201, 204
    UPLOAD = "take a piece of a file", 200, 201, 202        # this needs no token
    SEND_DRAFT = "send the draft", 202
    DELETE = "delete the draft", 200, 204, 404


NEEDS_READ_WRITE = frozenset({GraphOperation.CREATE, GraphOperation.ATTACH,
                              GraphOperation.DELETE})       # Mail.ReadWrite


class AccessDenied(DeliveryError):
    """The application has no access to the mailbox; an administrator can grant it."""


def graph_error(response: HttpResponse, mailbox: str,
                operation: GraphOperation = GraphOperation.SEND) -> RelayError:
    """Make the error for an answer of Graph that is not the one for success."""
    reply, code = _find_reply(response), _graph_code(response)
    if operation in NEEDS_READ_WRITE and reply is _ACCESS_DENIED:
        reply = _UPLOAD_DENIED
    if (operation not in (GraphOperation.SEND, GraphOperation.CREATE)
            and reply is _MAILBOX_NOT_FOUND):
        reply = _SERVICE_ERROR                # it had one a moment ago
    if operation is GraphOperation.UPLOAD and reply not in (_TOO_LARGE, _MAILBOX_FULL,
                                                            _THROTTLED):
        reply = _SERVICE_ERROR                # it is between Graph and Exchange
    facts = {"status": response.status, "graph": code or None,
             "request_id": response.headers.get("request-id")}
    kind = (AccessDenied if reply in (_ACCESS_DENIED, _MAILBOX_NOT_FOUND, _UPLOAD_DENIED)
            else TemporaryError if reply.code < 500 else DeliveryError)
    level = logging.ERROR if reply is _UNKNOWN_ANSWER else logging.WARNING
    return kind(reply.text.format(mailbox=mailbox), reply.code, reply.status, facts=facts,
                level=level)


def _find_reply(response: HttpResponse) -> Reply:
    status, code = response.status, _graph_code(response).lower()
    reply = GRAPH_STATUSES.get(status, _SERVICE_ERROR if status >= 500 else
                               _MESSAGE_REFUSED if status >= 400 else _UNKNOWN_ANSWER)
    if status >= 400 and status not in (401, 429) and (
            status < 500 or code in GRAPH_CODES_OF_ANY_STATUS):
        reply = GRAPH_CODES.get(code, reply)
    return reply


def parse_draft_id(response: HttpResponse) -> str:
    """Read the id of a new draft, or ""."""
    ident = response.json().get("id")
    return ident if isinstance(ident, str) and re.fullmatch("[!-~]{1,2000}", ident) else ""


def parse_upload_url(response: HttpResponse) -> str:
    """Read the URL of a new upload session, which holds a secret; "" if it is not safe."""
    url = str(response.json().get("uploadUrl"))
    return url if split_url(url) else ""


def parse_next_range(response: HttpResponse) -> int | None:
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
_TABLE_UNAVAILABLE = "The relay cannot ask its table of accounts now; try again later"


def parse_entity(response: HttpResponse) -> dict[str, Any] | None:
    """Read the first entity in an answer of Azure Tables. Raises TemporaryError."""
    answer, code = response.json(), response.headers.get("x-ms-error-code", "")
    if response.status == 404 and code == "ResourceNotFound":
        return None
    remedy = TABLE_REMEDIES.get(code)
    found = answer.get("value", [answer])       # a query has a list, a key has not
    if (response.status == 200 and answer and isinstance(found, list)
            and all(isinstance(one, dict) for one in found)):
        if found or "x-ms-continuation-nextpartitionkey" not in response.headers:
            return found[0] if found else None
        remedy = "the table is too large for a search; log in as NAME@lookup"
    raise TemporaryError(_TABLE_UNAVAILABLE, facts={
        "status": response.status, "table": code or None, "remedy": remedy},
        level=logging.ERROR)


def parse_table_account(entity: Mapping[str, Any], name: str) -> Account:
    """Read an entity of the table of accounts. Raises TemporaryError."""
    values, keys = {}, settings_of(Account)
    for key in ("tenant_id", "client_id", "from_email"):
        text = str(entity.get(key) or "").strip()
        try:
            values[key] = keys[key].parse(text)
            if not text and key != "from_email":
                raise ValueError("set")
        except ValueError as error:
            raise TemporaryError(_TABLE_UNAVAILABLE, level=logging.ERROR, facts={
                "account": name, "problem": f"{key} must be {error}"}) from None
    return Account(name, **values)


def _graph_code(response: HttpResponse) -> str:
    error = response.json().get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


# ---------------------------------------------------------------------------
# §9  Queued messages
#
# The queue has two files for each message: ID.eml, the message exactly as it goes out, and
# ID.json, a QueuedMessage. Neither holds a secret: the name of an account, or tenant and
# client, lead to it.


@dataclass(eq=False)
class QueuedMessage:
    """The state of a queued message. Times are Unix times."""

    id: str
    account: str                # section of ACCOUNTS_FILE, or ""
    tenant: str
    client: str
    mailbox: str                # that sends the message
    reverse_path: str           # that receives the bounce; "" for no bounce
    recipients: list[str]
    header_size: int            # bytes
    size: int                   # bytes, header and body
    is_bounce: bool
    queued_at: float            # SPOOL_LIFETIME begins
    attempts: int = 0
    next_attempt_at: float = 0.0        # for `spool list` only
    reason: str = ""            # why it is still here
    bounce_sent: bool = False
    is_sent: bool = False       # but the files could not be removed

    @property
    def key(self) -> tuple[str, str, str]:
        """Return the key of the mailbox queue and of Graph's limits."""
        return self.tenant, self.client, self.mailbox.lower()

    @property
    def login(self) -> str:
        """Return the user name whose login brings the secret, for messages to people."""
        return self.account or f"{self.tenant}@{self.client}"


_TYPES = list(map(type, vars(QueuedMessage("", "", "", "", "", "", [], 0, 0, False, 0.0)
                             ).values()))


def parse_queued_message(text: bytes) -> QueuedMessage:
    """Parse the content of ID.json. Raises ValueError if it is damaged."""
    try:
        message = QueuedMessage(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise ValueError("it is damaged") from None
    if list(map(type, vars(message).values())) != _TYPES:
        raise ValueError("it is damaged")
    return message


def as_stored(content: bytes, message: QueuedMessage) -> PreparedMessage:
    """Prepare a message that was edited before it was queued. Raises DeliveryError."""
    if len(content) != message.size:
        raise DeliveryError("The file of the message is damaged")
    header = content[:message.header_size]
    edited = EditedMessage(message.mailbox, header, header,
                        memoryview(content)[message.header_size:])
    is_large = edited.size > GRAPH_MESSAGE_LIMIT
    return PreparedMessage(edited, make_draft(content, edited) if is_large else None)


def make_bounce(message: QueuedMessage, header: bytes, reporter: str, bounce_id: str,
                now: float) -> bytes:
    """Write the notice to the sender of a message that failed; RFC 3834 section 3."""
    subject = split_header(header).find(b"subject")
    lines = [
        f"From: Mail relay <{message.mailbox}>", f"To: <{message.reverse_path}>",
        "Subject: Undelivered mail", f"Date: {email.utils.formatdate(now)}",
        f"Message-ID: <{bounce_id}@{reporter}>", "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0", "Content-Type: text/plain; charset=utf-8",
        "Content-Transfer-Encoding: 8bit", "",
        f"The SMTP relay at {reporter} could not deliver this message and has stopped "
        "trying:", "",
        *(f"Subject:    {_decode_header_text(_unfold(field))[:200]}"
          for field in subject[:1]),
        *(f"Recipient:  {recipient}" for recipient in message.recipients),
        f"Received:   {email.utils.formatdate(message.queued_at)}",
        f"Attempts:   {message.attempts}",
        f"Reason:     {printable_ascii(message.reason)[:900]}",
        f"ID:         {message.id}", "",
        "The relay keeps the message. Its administrator can send it again.", ""]
    return "\r\n".join(lines).encode(errors="replace")


# ---------------------------------------------------------------------------
# §10  Log
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
        log.log(level, "%s %s%s", ident, event, format_fields(facts))


def format_fields(facts: Mapping[str, object]) -> str:
    """Write facts behind something; those that are None are left out."""
    return "".join(f" {name.replace('_', '-')}={quote_value(value)}"
                   for name, value in facts.items() if value is not None)


def quote_value(value: object) -> str:
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
#
# http.client in worker threads. Opening a connection and using it are two calls, because a
# DNS look-up can hang for longer than a client waits, and must not hold a message. The
# thread that uses a connection keeps the deadline (time.monotonic) itself: before each send
# and each receive it sets the socket's time-out to the time left.

MAX_ANSWER = 65536              # octets of a body that are read
KEEPALIVE_TIMEOUT = 60.0        # seconds an idle connection is kept: firewalls forget it
MAX_IDLE_CONNECTIONS = 100          # for one host
ACCEPTED_BODY_TIMEOUT = 1.0               # seconds for the end of a 202 without a body
GRACE = 2.0                     # seconds past a deadline for a slow machine
THREAD_IDLE_TIMEOUT = 10.0              # seconds until an idle thread ends
Body = Union[bytes, Callable[[], Union[bytes, Iterator[bytes]]]]


class UpstreamUnavailable(TemporaryError):
    """Microsoft was not reached, or did not answer in time, or answered nonsense."""

    status = "4.4.1"

    def __init__(self, what: object) -> None:
        super().__init__("No answer from Microsoft; try again later",
                         facts={"problem": what})


class RequestNotSent(ConnectionError):
    """A connection ended before the request went out whole: nothing can have happened."""


@dataclass(frozen=True)
class HttpRequest:
    """A request; `body` may be a function that its thread calls, for each attempt."""

    method: str
    url: str = field(repr=False)        # may hold a secret
    headers: Mapping[str, str] = field(repr=False)
    body: Body = field(default=b"", repr=False)
    max_bytes: int = MAX_ANSWER         # octets of the answer that are read


def time_left(deadline: float) -> float:
    """Return the seconds until a deadline. Raises TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("time is up")
    return left


class _Reader(io.RawIOBase):
    """A socket as a file for HTTPResponse that is read until a deadline."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self.deadline = sock, deadline
        self.is_lenient = False         # True: a failure is the end of the file

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            self._sock.settimeout(time_left(self.deadline))
            return self._sock.recv_into(buffer)
        except OSError:
            if not self.is_lenient:
                raise
            return 0


def _set_deadline(connection: http.client.HTTPConnection, deadline: float) -> None:
    connection.timeout = time_left(deadline)        # of connect(), and of the handshake
    connection.response_class = lambda sock, **options: (       # type: ignore[assignment]
        http.client.HTTPResponse(cast(Any, _Reader(sock, deadline)), **options))


def connect(url: str, context: ssl.SSLContext | None,
            deadline: float) -> http.client.HTTPConnection:
    """Open a connection to the host of a URL, by HTTPS_PROXY and NO_PROXY.

    Plain http is for this machine only and takes no proxy: it holds secrets.
    """
    scheme, host, *_ = urllib.parse.urlsplit(url)
    if scheme == "http":
        connection, proxy = http.client.HTTPConnection(host), ""
    else:
        connection = http.client.HTTPSConnection(host, context=context)
        proxy = urllib.request.getproxies().get("https", "").strip()
    if proxy and not urllib.request.proxy_bypass(f"{connection.host}:{connection.port}"):
        via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        user, _, password = via.netloc.rpartition("@")[0].partition(":")
        credentials = urllib.parse.unquote(f"{user}:{password}").encode()
        connection.set_tunnel(connection.host, connection.port, {
            "Proxy-Authorization": f"Basic {base64.b64encode(credentials).decode()}"}
            if user else None)
        connection.host, connection.port = via.hostname or "", via.port or 80
    _set_deadline(connection, deadline)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(connection.close)
        connection.connect()
        time_left(deadline)             # after it no caller waits for the connection
        on_failure.pop_all()
    return connection


async def wait_until_done(deadline: float, future: asyncio.Future[Any]) -> bool:
    """Wait for a future, but not longer than until `deadline`; say whether it is done."""
    await asyncio.wait({future}, timeout=max(0.0, deadline - time.monotonic()))
    return future.done()


async def result_before(deadline: float, future: asyncio.Future[T]) -> T:
    """Wait for what nobody else waits for. Raises TimeoutError when time is up."""
    try:
        if not await wait_until_done(deadline, future):
            raise TimeoutError("time is up")
        return future.result()
    finally:
        future.cancel()                 # or asyncio would tell of an error nobody asked for
        del future                      # see _work


_calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
_idle = threading.Semaphore(0)          # counts the threads that wait for a call


def run_in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run a blocking call in an idle thread, or in a new one.

    The threads are daemons, and not limited in number: a call that hangs in the operating
    system (a DNS look-up) must neither keep the process from ending nor delay other calls.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    try:
        if not _idle.acquire(blocking=False):
            threading.Thread(target=_work, name="relay-call", daemon=True).start()
        _calls.put((call, loop, future))
    except RuntimeError as error:                   # the system has no more threads
        future.set_exception(TemporaryError(f"The relay is too busy: {error}"))
    return future


def _work() -> None:
    while True:
        try:
            call, loop, future = _calls.get(timeout=THREAD_IDLE_TIMEOUT)
        except queue.Empty:
            if _idle.acquire(blocking=False):
                return
            continue                                # a call for it is on the way
        try:
            settle = functools.partial(future.set_result, call())
        except BaseException as error:      # noqa: BLE001 - the future raises it
            settle = functools.partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):     # the loop has ended meanwhile
            loop.call_soon_threadsafe(_settle, future, settle)
        # The traceback of an error refers to this frame. If the frame refers to the error,
        # only the garbage collector frees both, with secrets and messages of megabytes. So
        # frames drop such references: here, and wherever a future can have failed.
        del call, loop, future, settle
        _idle.release()


def _settle(future: asyncio.Future[Any], settle: Callable[[], None]) -> None:
    if not future.done():
        settle()


def exchange(connection: http.client.HTTPConnection, request: HttpRequest,
             deadline: float) -> HttpResponse:
    """Send a request and read the response; close a connection that is of no more use.

    Raises NotSent if the server cannot have seen all of the request.
    """
    sock = connection.sock
    # With "Connection: close" http.client closes its socket before the response is read.
    with sock.makefile("rb", 0), contextlib.ExitStack() as on_failure:
        on_failure.callback(connection.close)
        response = _ask(connection, request, deadline)
        reader, body = cast(_Reader, response.fp.raw), b""
        reader.is_lenient = True        # the status counts, whatever becomes of the body
        if response.status == 202:
            reader.deadline = min(deadline, time.monotonic() + ACCEPTED_BODY_TIMEOUT)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            body = response.read(request.max_bytes)
            if response.isclosed() and not response.length:
                on_failure.pop_all()    # nothing of it is left on the connection
    headers = {name.lower(): value for name, value in response.getheaders()}
    return HttpResponse(response.status, headers, body)


def _ask(connection: http.client.HTTPConnection, request: HttpRequest,
         deadline: float) -> http.client.HTTPResponse:
    body, sock = request.body() if callable(request.body) else request.body, connection.sock
    if not isinstance(body, bytes):     # each piece has but the time that is left
        body = (sock.settimeout(time_left(deadline)) or piece for piece in body)
    sock.settimeout(time_left(deadline))
    _set_deadline(connection, deadline)
    problem = ""
    try:
        connection.request(request.method, request.url[len(_base(request.url)):],
                           body or None, request.headers)
    except OSError as error:
        problem = str(error) or type(error).__name__
    try:                                # an error such as 413 may come before the end
        response = connection.getresponse()
        while response.status < 200:    # 103 and the like: another one follows
            response.headers = None     # type: ignore[assignment]
            response.begin()
        return response
    except (OSError, http.client.HTTPException, ValueError):
        if not problem:
            raise
    raise RequestNotSent(problem)


class HttpPool:
    """Sends requests, and keeps connections for the next ones."""

    def __init__(self, urls: Iterable[str]) -> None:
        """Get ready to send to the hosts of these URLs."""
        # Reading the system's certificates takes a while: not where nobody asks for them.
        self._context = (ssl.create_default_context()
                         if any(url.startswith("https:") for url in urls) else None)
        self._kept: dict[str, list[tuple[http.client.HTTPConnection, asyncio.TimerHandle]]
                         ] = collections.defaultdict(list)

    async def send(self, request: HttpRequest, deadline: float) -> HttpResponse:
        """Send a request; again only if a kept connection ended first. Raises NoAnswer."""
        base = _base(request.url)
        try:
            kept = self._take(base)
            if kept:
                with contextlib.suppress(RequestNotSent):
                    return await self._exchange(kept, request, deadline)
            connection = await result_before(deadline, run_in_thread(
                functools.partial(connect, base, self._context, deadline)))
            return await self._exchange(connection, request, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UpstreamUnavailable(str(error) or type(error).__name__) from None

    async def send_with_retries(
            self, request: HttpRequest, deadline: float, pauses: Iterable[float],
            *passing: int, timeout: float = math.inf) -> HttpResponse:
        """Send a request; retry after each pause on 429, 5xx and the statuses `passing`."""
        for pause in (*pauses, math.inf):
            response = await self.send(request, min(deadline, time.monotonic() + timeout))
            if ((response.status < 500 and response.status not in (429, *passing))
                    or time.monotonic() + pause >= deadline):
                break
            await asyncio.sleep(pause)
        return response

    async def _exchange(self, connection: http.client.HTTPConnection,
                        request: HttpRequest, deadline: float) -> HttpResponse:
        sock = connection.sock          # the connection may let go of it
        future = run_in_thread(functools.partial(exchange, connection, request, deadline))
        try:
            if not await wait_until_done(deadline + GRACE, future):
                raise TimeoutError("time is up")
            response = future.result()
        except asyncio.CancelledError:
            if (request.method != "POST" or not future.done() or future.exception()
                    or future.result().status != 202):
                raise
            response = future.result()  # it came too late: the message is sent
        finally:
            if future.done():
                self._give_back(_base(request.url), connection)
            else:                       # make the thread end soon
                with contextlib.suppress(OSError):
                    # Not sock.shutdown(): of a TLS socket that drops the encryption first,
                    # and the thread could then write in the clear.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            future.cancel()             # or asyncio would tell of an error nobody asked for
            del future                  # see _work
        return response

    def _take(self, base: str) -> http.client.HTTPConnection | None:
        while self._kept[base]:
            connection, timer = self._kept[base].pop()
            timer.cancel()
            if connection.sock:             # not closed by the timer
                connection.sock.settimeout(0)
                try:
                    connection.sock.recv(1)     # the end, or what nobody asked for
                except (BlockingIOError, ssl.SSLWantReadError):
                    return connection
                except OSError:
                    pass
                connection.close()
        return None

    def _give_back(self, base: str, connection: http.client.HTTPConnection) -> None:
        kept = self._kept[base]
        if connection.sock is None or len(kept) >= MAX_IDLE_CONNECTIONS:
            connection.close()
        else:
            kept.append((connection, asyncio.get_running_loop().call_later(
                KEEPALIVE_TIMEOUT, connection.close)))

    def close(self) -> None:
        """Close the connections that are kept."""
        for base in list(self._kept):
            while connection := self._take(base):
                connection.close()


def _base(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


# ---------------------------------------------------------------------------
# §12  Tokens
#
# A secret or the token of a workload identity is traded at Entra ID; a managed identity
# is asked for at an address near by, never through a proxy. Microsoft, "How to use
# managed identities for Azure resources", "... App Service".

NEGATIVE_CACHE_TTL = 30.0       # seconds: a device with a wrong password tries and tries
MIN_TIME_LEFT = 0.1                # of UPSTREAM_TIMEOUT must be left for a try to be of use
MAX_CACHED = 1000               # of anything
IDENTITY_TIMEOUT = 10.0         # seconds for an answer of a managed identity
IDENTITY_RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)        # before it is asked again
Key = tuple[str, str, str, str, bytes]  # tenant, client, credential, resource, keyed hash


class Cache(Generic[K, T]):
    """Values that expire. Of more than `most` the oldest goes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic,
                 most: int = MAX_CACHED) -> None:
        self._clock, self._most = clock, most
        self._values: dict[K, tuple[T, float]] = {}     # and when it expires

    def get(self, key: K) -> T | None:
        """Return the value, or None if there is none or it has expired."""
        value, expires_at = self._values.get(key, (None, 0.0))
        return value if self._clock() < expires_at else None

    def put(self, key: K, value: T, seconds: float) -> None:
        """Keep a value for so many seconds."""
        self._values.pop(key, None)
        self._values[key] = value, self._clock() + seconds
        if len(self._values) > self._most:
            del self._values[next(iter(self._values))]


def read_secret(path: str) -> str:
    """Read a secret from a file. Raises ValueError, which says what is wrong."""
    try:
        octets = pathlib.Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if not re.fullmatch(b"[!-~]([ -~]*[!-~])?", octets):
        raise ValueError("must hold one line of printable ASCII")
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
        self._answers: Cache[Key, str | AuthError] = Cache(clock)
        self._tenants: Cache[str, str] = Cache(clock)       # ID by domain
        self._fetches: dict[Key, asyncio.Task[str]] = {}        # under way

    async def get(self, application: Application, deadline: float,
                  resource: str = "") -> str:
        """Return a token, by default for Graph. Raises AuthError and TemporaryError."""
        try:
            return await self._get(application, deadline,
                                   resource or self._config.graph_endpoint)
        except AuthError as error:
            if not application.relay_holds_secret:
                raise
            raise TemporaryError(
                f"The relay's own credential is refused ({error.reply.text})", 451, "4.7.0",
                facts=error.facts, level=logging.ERROR) from None

    async def _get(self, application: Application, deadline: float, resource: str) -> str:
        key = self._key(application, resource)
        answer = self._answers.get(key)
        if isinstance(answer, AuthError):
            raise _without_traceback(answer)
        if answer:
            return answer
        fetch = self._fetches.get(key)      # it has the deadline of who came first
        if not fetch:
            fetch = asyncio.ensure_future(self._fetch(key, application, deadline))
            self._fetches[key] = fetch
            fetch.add_done_callback(functools.partial(self._on_fetched, key))
        try:
            if not await wait_until_done(deadline + GRACE, fetch):
                raise UpstreamUnavailable("time is up")
            return fetch.result()
        finally:
            del fetch                   # see _work

    def forget(self, application: Application, token: str, resource: str = "") -> None:
        """Drop a token that is not accepted, unless there is another already."""
        key = self._key(application, resource or self._config.graph_endpoint)
        if self._answers.get(key) == token:
            self._answers.put(key, token, 0.0)

    def resolve(self, tenant: str) -> str:
        """Replace a domain of a tenant with the tenant's ID, if a token has named it."""
        return self._tenants.get(tenant) or tenant

    async def _fetch(self, key: Key, application: Application, deadline: float) -> str:
        resource, secret = key[3], application.secret
        if application.credential == "managed-identity":
            response = await self._request_identity_token(application.client, resource,
                                                          deadline)
            secret = self._config.identity_header
        else:
            if application.credential == "workload-identity":
                secret = await _read_secret_in_thread(
                    self._config.azure_federated_token_file, deadline)
            response = await self._pool.send(
                self._request(application, secret, resource), deadline)
        try:
            token, life = parse_token(response, secret, time.time())
        except AuthError as error:
            self._answers.put(key, _without_traceback(error), NEGATIVE_CACHE_TTL)
            raise
        tenant = parse_tenant_id(token)
        if tenant and "." in application.tenant:        # Entra gave it for this domain
            self._tenants.put(application.tenant, tenant, MAX_TOKEN_LIFE)
            key = self._key(application, resource)
        self._answers.put(key, token, life)
        return token

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

    async def _request_identity_token(self, client: str, resource: str,
                            deadline: float) -> HttpResponse:
        """Ask for a token of a managed identity. Retry while it is not ready."""
        request = self._identity_request(client, resource)
        try:
            return await self._pool.send_with_retries(
                request, deadline, IDENTITY_RETRY_DELAYS, 404, 410,
                timeout=IDENTITY_TIMEOUT)
        except UpstreamUnavailable as error:
            error.facts["identity"] = request.url.partition("?")[0]
            raise

    def _identity_request(self, client: str, resource: str) -> HttpRequest:
        config, version, headers = self._config, "2018-02-01", {"Metadata": "true"}
        url = f"{config.azure_pod_identity_authority_host}/metadata/identity/oauth2/token"
        if config.identity_endpoint and config.identity_header:     # App Service
            try:
                url, version = local_http_url(config.identity_endpoint), "2019-08-01"
            except ValueError as error:
                raise TemporaryError(
                    "The relay has no identity that it can ask for",
                    facts={"problem": f"IDENTITY_ENDPOINT must be {error}"}) from None
            headers = {"X-IDENTITY-HEADER": config.identity_header}
        query = {"api-version": version, "resource": resource,
                 **({"client_id": client} if client else {})}
        mark = "&" if "?" in url else "?"
        return HttpRequest("GET", f"{url}{mark}{urllib.parse.urlencode(query)}",
                           {**headers, "User-Agent": USER_AGENT})

    def _on_fetched(self, key: Key, fetch: asyncio.Task[str]) -> None:
        del self._fetches[key]
        if not fetch.cancelled():
            fetch.exception()           # it is known, even if nobody waits any more

    def _key(self, application: Application, resource: str) -> Key:
        digest = hmac.digest(self._hash_key, application.secret.encode(), "sha256")
        return (self.resolve(application.tenant), application.client,
                application.credential, resource, digest)


async def _read_secret_in_thread(path: str, deadline: float) -> str:
    """Read a secret in a thread. Raises TemporaryError."""
    try:
        return await result_before(deadline, run_in_thread(
            functools.partial(read_secret, path)))
    except (TimeoutError, ValueError) as error:
        problem = str(error)
    raise TemporaryError("The relay's own credential cannot be read", facts={
        "problem": f"{path}: {problem}"}, level=logging.ERROR)


def _without_traceback(error: AuthError) -> AuthError:
    """Copy an error without its traceback, which holds the frames, and these the secret."""
    return AuthError(error.reply.text, facts=error.facts, level=error.level)


# ---------------------------------------------------------------------------
# §13  Directory
#
# Where accounts are found: in ACCOUNTS_FILE, in the Azure table, or in a user name itself.

ACCOUNTS_POLL_INTERVAL = 3.0                # seconds between two polls of ACCOUNTS_FILE
MAX_FAILURES = 10               # of logins from one address, in
FAILURE_WINDOW = 600.0           # seconds
FAILURE_DELAY = 0.5             # seconds for each failure before a refusal
MAX_FAILURE_DELAY = 5.0
TABLE_CACHE_TTL = 60.0              # seconds that an answer of the table is remembered
AZURE_RETRY_DELAYS = (1.0, 3.0)       # seconds before Azure is asked again
STORAGE = "https://storage.azure.com"
DUMMY_HASH = f"scrypt${'A' * 22}${'A' * 43}"       # a hash that no password has
_NO_ROW_KEY = re.compile(r"[/\\#?\x00-\x1f\x7f-\x9f]")


class AccountsFile:
    """ACCOUNTS_FILE, and the files of secrets that it names."""

    def __init__(self, config: Config) -> None:
        self.accounts = Accounts()
        self._config = config
        # By path, _look() at the last load and at the last poll.
        self._loaded: dict[str, tuple[int, ...] | None] = {}
        self._seen: dict[str, tuple[int, ...] | None] = {}
        self._wake: asyncio.Event | None = None     # to read it at once

    def load(self) -> None:
        """Read it. Raises ConfigError with all faults; the old accounts stay then."""
        path = self._config.accounts_file
        looks = {path: _look(path)}     # taken before the file is read
        self._loaded = {path: None}         # if this fails, the next poll tries it again
        try:
            text = pathlib.Path(path).read_text("utf-8-sig")
        except (OSError, UnicodeError) as error:    # which may hold the text
            problem = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"ACCOUNTS_FILE={path!r}: cannot be read: "
                              f"{problem}") from None
        accounts, errors = parse_accounts(text, self._config)
        found = {"": ""}
        for account in accounts:
            name = account.client_secret_file
            if name not in found:
                looks[name], found[name] = _look(name), ""
                try:
                    found[name] = read_secret(name)
                except ValueError as error:
                    errors.append(f"[{account.name}] client_secret_file = {name}: {error}")
        if errors:
            raise ConfigError("\n".join(f"{path}: {fault}" for fault in errors))
        self.accounts = Accounts(
            dataclasses.replace(account, client_secret=account.client_secret
                                or found[account.client_secret_file])
            for account in accounts)
        self._loaded = looks
        has_secrets = any(account.client_secret or account.password
                          for account in self.accounts)
        for path, look in looks.items() if has_secrets and os.name == "posix" else ():
            if look and look[-1] & 0o004:
                log_event(logging.WARNING, "-", "accounts", file=path, problem="all users "
                          "of this machine can read these secrets; chmod o-r")

    def check_access(self) -> None:
        """Warn if it could be read as root, and cannot be read again."""
        for path in self._loaded:
            if not os.access(path, os.R_OK):
                log_event(logging.WARNING, "-", "accounts", file=path, problem="a change "
                          "cannot be read; give the file to the user RUN_AS")

    def ask(self) -> None:
        """Have it read at once."""
        if self._wake:
            self._wake.set()

    async def watch(self) -> None:
        """Read it when it has changed, and has then not changed for a moment."""
        self._wake, logged = asyncio.Event(), ""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), ACCOUNTS_POLL_INTERVAL)
            is_asked = self._wake.is_set()
            self._wake.clear()
            try:
                # In a thread, and without a deadline: if the disk hangs, only this waits.
                if await run_in_thread(functools.partial(self._poll, is_asked)):
                    log_event(logging.INFO, "-", "accounts",
                              loaded=len(list(self.accounts)))
                    logged = ""
                continue
            except (ConfigError, RelayError) as error:
                problem = str(error)
            except Exception as error:          # noqa: BLE001 - else it never looks again
                problem = type(error).__name__
            for line in problem.splitlines() if problem != logged else ():
                log_event(logging.ERROR, "-", "accounts", problem=line,
                          remedy="fix it; the accounts from before stay in force")
            logged = problem

    def _poll(self, is_asked: bool) -> bool:
        """Load the files if asked, or if two polls saw the same change; say whether."""
        look = {path: _look(path) for path in self._loaded}
        is_settled, self._seen = look == self._seen, look
        if not is_asked and (look == self._loaded or not is_settled):
            return False
        self.load()
        return True


def _look(path: str) -> tuple[int, ...] | None:
    """Return what changes when a file does, or None if there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


class AzureClient:
    """Asks services of Azure as the relay itself."""

    def __init__(self, config: Config, pool: HttpPool, tokens: Tokens) -> None:
        self._application = relay_identity(config)
        self._pool = pool
        self._tokens = tokens

    async def get(self, url: str, resource: str, headers: Mapping[str, str],
                  deadline: float) -> HttpResponse:
        """Get an answer, with a token for `resource` if given. Raises TemporaryError."""
        headers = {**headers, "User-Agent": USER_AGENT}
        for _ in ("first", "renewed"):
            token = ""
            if resource:
                token = await self._tokens.get(self._application, deadline, resource)
                headers["Authorization"] = f"Bearer {token}"
            response = await self._pool.send_with_retries(
                HttpRequest("GET", url, headers), deadline, AZURE_RETRY_DELAYS)
            is_stale = (response.status == 401 or response.headers.get("x-ms-error-code")
                        == "AuthenticationFailed")      # of Tables, with 403
            if not (is_stale and token):
                break
            self._tokens.forget(self._application, token, resource)
        return response


class AccountsTable:
    """The Azure table of accounts; Microsoft, "Query Entities (REST API)"."""

    def __init__(self, config: Config, azure: AzureClient,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._azure = azure
        self._partition = config.azure_tables_partition_key
        self._url, _, self._sas = config.azure_tables_url.partition("?")
        self._found: Cache[tuple[str, ...], tuple[Account | None]] = Cache(clock)

    async def find(self, name: str, deadline: float) -> Account | None:
        """Find the account of NAME@lookup. Raises TemporaryError."""
        if _NO_ROW_KEY.search(name) or len(name.encode("utf-16-le")) > 1024:
            return None                 # Azure has no such RowKey
        partition, row = (urllib.parse.quote(key.replace("'", "''"), safe="")
                          for key in (self._partition, name))
        return await self._find(name, f"(PartitionKey='{partition}',RowKey='{row}')", {},
                                deadline)

    async def find_application(self, tenant: str, client: str,
                               deadline: float) -> Account | None:
        """Find an account of an application. Raises TemporaryError."""
        return await self._find("", "()", _filter(
            PartitionKey=[self._partition], tenant_id=_forms(tenant),
            client_id=_forms(client)), deadline)

    async def check(self, deadline: float) -> None:
        """Raise TemporaryError if the table cannot be read."""
        await self._query("()", _filter(PartitionKey=[self._partition]), deadline)

    async def _find(self, name: str, where: str, query: Mapping[str, str],
                    deadline: float) -> Account | None:
        key = (where, *query.values())
        known = self._found.get(key)
        if not known:
            entity = await self._query(where, query, deadline)
            known = (None if entity is None else parse_table_account(entity, name),)
            self._found.put(key, known, TABLE_CACHE_TTL)
        return known[0]

    async def _query(self, where: str, query: Mapping[str, str],
                     deadline: float) -> dict[str, Any] | None:
        text = urllib.parse.urlencode(
            {**query, "$select": "tenant_id,client_id,from_email"}, safe="$",
            quote_via=urllib.parse.quote)
        return parse_entity(await self._azure.get(
            f"{self._url}{where}?{text}{self._sas and '&'}{self._sas}",
            "" if self._sas else STORAGE,
            {"Accept": "application/json;odata=nometadata",
             "DataServiceVersion": "3.0;NetFx", "x-ms-version": "2020-12-06",
             "x-ms-date": email.utils.formatdate(usegmt=True)}, deadline))


def _filter(**columns: Iterable[str]) -> dict[str, str]:
    """Make a query for one entity that has one of the given values in each column."""
    conditions = []
    for name, values in columns.items():
        quoted = ("'" + value.replace("'", "''") + "'" for value in values)
        conditions.append("(" + " or ".join(f"{name} eq {value}" for value in quoted) + ")")
    return {"$filter": " and ".join(conditions), "$top": "1"}


def _forms(value: str) -> Iterable[str]:
    """List the forms in which an ID may be in the table."""
    short = [encode_uuid(value)] if decode_uuid(value) else []
    return dict.fromkeys([value, value.upper(), *short])


class TooManyFailures(TemporaryError):
    """Too many logins from one address have failed; no more passwords are checked."""


class LoginLimiter:
    """Counts refused logins, by a client's address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: Cache[object, list[float]] = Cache(clock)

    def check(self, address: IpAddress | None) -> None:
        """Raise TooManyFailures for an address that failed too often."""
        if len(self._recent(address)) >= MAX_FAILURES:
            raise TooManyFailures("Too many failed logins from your address; try again "
                                  "later", 421, "4.7.0", close=True)

    def add(self, address: IpAddress | None) -> float:
        """Count a failure; returns the seconds to wait before it is told."""
        times = [*self._recent(address), self._clock()]
        self._times.put(client_prefix(address), times, FAILURE_WINDOW)
        return min(len(times) * FAILURE_DELAY, MAX_FAILURE_DELAY)

    def _recent(self, address: IpAddress | None) -> list[float]:
        times = self._times.get(client_prefix(address)) or []
        return [one for one in times if self._clock() < one + FAILURE_WINDOW]


def client_prefix(address: IpAddress | None) -> bytes:
    """Whoever has an IPv6 address has all of its /64; an IPv4 address has 4 octets."""
    return address.packed[:8] if address else b""


class Authenticator:
    """Finds out who logs in."""

    def __init__(self, config: Config, azure: AzureClient) -> None:
        self.file = AccountsFile(config)
        self.table = AccountsTable(config, azure) if config.azure_tables_url else None
        self.failures = LoginLimiter()
        self._config = config
        self._scrypt = threading.Semaphore(2)       # at once, as each takes 32 MiB

    def loggable_username(self, username: str) -> str:
        """Show a user name for the log; what is none may be a password."""
        with contextlib.suppress(AuthError):
            delimiter = self._config.username_delimiter
            if (self.file.accounts.find(username) or lookup_name(username, delimiter)
                    or parse_username(username, delimiter)):
                return username
        return f"*** ({len(username)} characters)"

    async def find(self, login: Authenticate, address: IpAddress | None,
                   deadline: float) -> Principal:
        """Check a login, but for what Entra must say. Raises AuthError, TemporaryError."""
        name = lookup_name(login.username, self._config.username_delimiter)
        account = (self.file.accounts.find(login.username)
                   or (self.file.accounts.find(name) if name else None)
                   or await self._find_elsewhere(login.username, name, deadline))
        problem = ""
        if account is None:
            problem = "there is no such account"
        elif not account.allows_address(address):
            problem = "not from its networks"
        elif not account.has_credential:        # Entra will judge the password
            if login.password:
                return Principal(account, account.as_application(login.password),
                             login.username)
            if not account.name:
                raise AuthError("The password is empty; it must be the client secret")
            problem = "the password is empty"
        # Every way from here costs one scrypt: nobody learns which names there are.
        hashed = account.password if account else ""
        is_right = await self._is_password(login.password, hashed or DUMMY_HASH, address,
                                           deadline)
        if account is None or problem or not is_right:
            raise AuthError(
                "Wrong user name or password, or not from here; the relay's log says which",
                facts={"account": account.name if account else None, "problem":
                       problem or ("wrong password" if hashed else "it has no password")})
        return Principal(account, account.as_application(), login.username)

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
        if not config.must_have_account:
            return Account("", tenant, client)
        account = (await self.table.find_application(tenant, client, deadline)
                   if self.table else None)
        if account is None:
            raise AuthError("Only accounts that the relay knows may log in")
        return account

    async def _is_password(self, password: str, hashed: str, address: IpAddress | None,
                           deadline: float) -> bool:
        def check() -> bool:
            with self._scrypt:
                time_left(deadline)                 # nobody waits any more?
                self.failures.check(address)        # others may have failed meanwhile
                return verify_password(password, hashed)

        try:
            return await result_before(deadline, run_in_thread(check))
        except TimeoutError:
            raise TemporaryError("Too many logins at once; try again later") from None


# ---------------------------------------------------------------------------
# §14  Graph
#
# What is tried again within UPSTREAM_TIMEOUT, as it cannot send a message twice:
#
#     401, but of an upload                once, with a new token
#     429, 503 with Retry-After           after that time, in which the mailbox rests
#     404 for a draft that is new         a few times: not all servers know it at once
#     a kept connection that was closed   §11
#
# Anything else is the answer to the client, or a case for the spool: after a time-out or
# a 504 the message may be on its way already. A large message takes one slot for all of its
# requests, and its draft is deleted if any of them fails.

REQUESTS_AT_ONCE = 4            # for an application and a mailbox, Graph's own limit
MIN_RETRY_DELAY = 0.5               # seconds before anything is tried again
MAX_RETRY_DELAY = 86400.0            # seconds; what is longer is garbage
DEFAULT_RETRY_DELAY = 5.0           # seconds after a 429 that does not say for how long
DRAFT_RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)       # seconds, if a new draft is not found
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
        waiting = self._live if is_live else self._queued
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(slot)
        self._admit()
        try:
            if not (slot.done() or await wait_until_done(deadline, slot)):
                raise TemporaryError("Too many messages for this mailbox at once; try "
                                     "again later", 451, "4.4.5")
            yield
        finally:
            if slot.done():
                self.in_use -= 1
                self._admit()
            else:
                waiting.remove(slot)

    def _admit(self) -> None:
        while self.in_use < REQUESTS_AT_ONCE and (self._live or self._queued):
            (self._live or self._queued).popleft().set_result(None)
            self.in_use += 1


@dataclass(frozen=True)
class RequestContext:
    """On whose behalf Graph is asked, and until when (time.monotonic)."""

    application: Application
    mailbox: str
    message_id: str
    deadline: float
    send_before: float      # to begin a request, as it must have time to be answered
    key: MailboxKey         # whose limits it is under


class GraphClient:
    """Sends messages; Microsoft Graph v1.0, "user: sendMail", "message: send"."""

    def __init__(self, config: Config, pool: HttpPool, tokens: Tokens) -> None:
        self._config = config
        self._pool = pool
        self._tokens = tokens
        # A limiter is needed as long as a message holds or waits for one of its slots.
        self._limiters: weakref.WeakValueDictionary[MailboxKey, MailboxLimiter] = (
            weakref.WeakValueDictionary())
        self._resume_at: Cache[MailboxKey, float] = Cache()     # time.monotonic()

    async def send(self, application: Application, message: PreparedMessage, ident: str,
                   deadline: float, *, is_live: bool = False) -> HttpResponse:
        """Send a message, `is_live` ones first; returns the 202. Raises RelayError."""
        mailbox = message.edited.mailbox
        # A request that is soon cut off may have been obeyed, and nobody would know.
        latest = deadline - MIN_TIME_LEFT * self._config.upstream_timeout
        context = RequestContext(application, mailbox, ident, deadline, latest, self._key((
            application.tenant, application.client, mailbox.lower())))
        limiter = self._limiters.setdefault(context.key, MailboxLimiter())
        async with limiter.slot(latest, is_live=is_live):
            try:
                if message.draft:
                    return await self._send_draft(context, message.draft)
                return await self._ask(context, GraphOperation.SEND, self._request(
                    context, "sendMail", message.edited.as_base64, headers={
                        "Content-Type": "text/plain",
                        "Content-Length": str((message.edited.size + 2) // 3 * 4)}))
            except TimeoutError as error:       # of a thread that decodes a file
                raise UpstreamUnavailable(error) from None

    def throttled_for(self, key: MailboxKey) -> float:
        """Return for how many seconds Microsoft wants no request for a mailbox."""
        return max(0.0, (self._resume_at.get(self._key(key)) or 0.0) - time.monotonic())

    def _key(self, key: MailboxKey) -> MailboxKey:
        return self._tokens.resolve(key[0]), key[1], key[2]

    # Large messages.

    async def _send_draft(self, context: RequestContext, draft: Draft) -> HttpResponse:
        """Make a draft, attach the files, send it; if anything fails, delete it."""
        # The answer repeats the text, perhaps with an escape for each character.
        create = self._request(context, "messages", draft.content,
                               max_bytes=MAX_ANSWER + 6 * len(draft.content))
        ident = parse_draft_id(await self._ask(context, GraphOperation.CREATE, create))
        if not ident:
            raise UpstreamUnavailable("a draft without an id")
        path = f"messages/{urllib.parse.quote(ident, safe='')}"
        try:
            for attachment in draft.attachments:
                await self._attach(context, f"{path}/attachments", attachment)
            return await self._ask(context, GraphOperation.SEND_DRAFT,
                                   self._request(context, f"{path}/send"))
        except BaseException:
            await self._discard(context, path)
            raise

    async def _attach(self, context: RequestContext, path: str,
                      attachment: Attachment) -> None:
        if not attachment.is_large:
            await self._ask(context, GraphOperation.ATTACH,
                            self._request(context, path, attachment.as_json))
            return
        item = {"attachmentType": "file", "size": attachment.size,
                **attachment.properties()}
        response = await self._ask(context, GraphOperation.ATTACH, self._request(
            context, f"{path}/createUploadSession",
            json.dumps({"AttachmentItem": item}).encode()))
        url = parse_upload_url(response)
        if url[:5] != self._config.graph_endpoint[:5]:      # http: is for tests alone
            raise UpstreamUnavailable("an upload session without a URL that can be used")
        await self._upload(context, url, attachment)

    async def _upload(self, context: RequestContext, url: str,
                      attachment: Attachment) -> None:
        """Send a file in pieces, to the host that Graph named, and without the token."""
        pieces, begin = filter(None, attachment.part.iter_decoded()), 0
        while begin < attachment.size:
            piece = await result_before(context.deadline, run_in_thread(
                functools.partial(next, pieces, b"")))
            end = begin + len(piece)
            response = await self._ask(context, GraphOperation.UPLOAD, HttpRequest(
                "PUT", url, {
                    "Content-Type": "application/octet-stream", "User-Agent": USER_AGENT,
                    "Content-Range": f"bytes {begin}-{end - 1}/{attachment.size}"}, piece))
            if parse_next_range(response) not in (None, end):
                raise UpstreamUnavailable("a piece of an upload was lost")
            begin = end

    async def _discard(self, context: RequestContext, path: str) -> None:
        """Delete a draft that is not sent; if that fails it stays, and the log says so."""
        deadline = time.monotonic() + DISCARD_TIMEOUT
        context = dataclasses.replace(context, deadline=deadline, send_before=deadline)
        facts: dict[str, object] = {"problem": "the relay stops"}
        try:
            await self._ask(context, GraphOperation.DELETE,
                            self._request(context, path, method="DELETE"))
            facts = {}
        except RelayError as error:
            facts = {"reply": error.reply, **error.facts}
        finally:
            if facts:
                log_event(logging.WARNING, context.message_id, "draft-left",
                          mailbox=context.mailbox, **facts)

    # Requests.

    def _request(self, context: RequestContext, path: str, body: Body = b"", *,
                 method: str = "POST", headers: Any = (),
                 max_bytes: int = MAX_ANSWER) -> HttpRequest:
        mailbox = urllib.parse.quote(context.mailbox, safe="")
        return HttpRequest(
            method, f"{self._config.graph_endpoint}/v1.0/users/{mailbox}/{path}",
            {**({"Content-Type": "application/json"} if body else {}),
             "Accept": "application/json", "User-Agent": USER_AGENT,
             "client-request-id": context.message_id, **dict(headers)}, body, max_bytes)

    async def _ask(self, context: RequestContext, operation: GraphOperation,
                   request: HttpRequest) -> HttpResponse:
        """Send a request until it succeeds. Raises RelayError."""
        renewed, delays = False, iter(DRAFT_RETRY_DELAYS)
        while True:
            held = self.throttled_for(context.key)
            if held and operation is not GraphOperation.DELETE:     # a draft must not stay
                if time.monotonic() + held >= context.send_before:
                    raise TemporaryError(_THROTTLED.text, _THROTTLED.code,
                                         _THROTTLED.status)
                await asyncio.sleep(held)
                continue
            token, headers = "", request.headers
            if operation is not GraphOperation.UPLOAD:
                token = await self._tokens.get(context.application, context.deadline)
                headers = {**headers, "Authorization": f"Bearer {token}"}
            if time.monotonic() >= context.send_before:
                raise UpstreamUnavailable("no time is left")
            response = await self._pool.send(dataclasses.replace(request, headers=headers),
                                             context.deadline)
            if response.status in operation.value:
                return response
            if response.status == 401 and token and not renewed:
                renewed = True
                self._tokens.forget(context.application, token)
                continue
            pause = _pause(response)
            if pause > self.throttled_for(context.key):
                self._resume_at.put(self._key(context.key), time.monotonic() + pause, pause)
            if response.status == 404 and operation in (GraphOperation.ATTACH,
                                                        GraphOperation.SEND_DRAFT):
                pause = next(delays, 0.0)
            if not pause or time.monotonic() + pause >= context.send_before:
                raise graph_error(response, context.mailbox, operation)
            await asyncio.sleep(pause)


def _pause(response: HttpResponse) -> float:
    """Seconds for which Microsoft wants no request; 0 is none, or it does not say."""
    if response.status not in (429, 503):
        return 0.0
    pause = response.retry_after(time.time())
    if pause is None or pause > MAX_RETRY_DELAY:
        return DEFAULT_RETRY_DELAY if response.status == 429 else 0.0
    return max(pause, MIN_RETRY_DELAY)


# ---------------------------------------------------------------------------
# §15  Queue
#
#     lock                      locked by the relay that uses the folder; the command line
#                               appends the IDs of messages that it has changed
#     queue/ID.eml, ID.json     a message that waits, and its state
#     queue/ID.tmp              a state that is being written
#     failed/ID.eml, ID.json    a message that failed
#
# A message counts when its ID.json is in queue/: the .json is written last and removed
# first. Its client gets 250 when both files are on the disk; they go when Microsoft has
# accepted the message. So after a crash a message is there, or was sent, or both: at least
# once. A mailbox is sent to one message at a time, the least tried first, then the oldest,
# so that a message that always fails holds up no other. After a failure the mailbox rests.

MIN_BACKOFF = 60.0              # seconds before a mailbox is tried again; doubled up to
MAX_BACKOFF = 1800.0
MIN_FREE_DISK = 67_108_864      # bytes of the disk that stay free
DISK_TIMEOUT = 10.0             # seconds for one action of the disk
RECOUNT_INTERVAL = 5.0               # seconds until a full folder is counted again
MAX_CONCURRENT_DELIVERIES = 20  # messages of the queue on their way at once
QUEUE_POLL_INTERVAL = 2.0       # seconds until a command is noticed
MAX_SLEEP = 30.0                # seconds until a change of ACCOUNTS_FILE is noticed


class QueueFiles:
    """The files of the queue. The methods wait for the disk, and raise OSError."""

    def __init__(self, config: Config) -> None:
        self._path = pathlib.Path(config.spool_directory)
        self._max_bytes = config.spool_max_bytes
        self.queue, self.failed = self._path / "queue", self._path / "failed"
        self._lock: IO[str] | None = None
        self._deadlines: set[float] = set()     # of messages that are being written
        self._names: list[str] = []             # that the command line has reported
        self._counting = threading.Lock()       # a thread for each message would be slow
        self._used, self._count_at = math.inf, -math.inf

    def open(self) -> list[QueuedMessage]:
        """Take the folder for this process; returns what waits. Raises StartError."""
        try:
            self._path.mkdir(0o700, exist_ok=True)
            found = self._path.stat()
            if fcntl is None:
                problem = "this system has no file locks"
            elif found.st_uid != os.geteuid():
                problem = "belongs to another user; give it to the relay's user (chown)"
            elif found.st_mode & 0o022:
                problem = "others can write there; chmod go-w"
            else:
                self._lock = open(self._path / "lock", "a+",    # noqa: SIM115
                                  opener=functools.partial(os.open, mode=0o600))
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.queue.mkdir(0o700, exist_ok=True)
                self.failed.mkdir(0o700, exist_ok=True)
                _sync(self._path)
                return self._load()
        except BlockingIOError:
            problem = "another relay works with it"
        except OSError as error:
            problem = f"cannot be used: {error.strerror}: {error.filename}"
        raise StartError(f"SPOOL_DIRECTORY={str(self._path)!r}: {problem}")

    def close(self) -> None:
        """Release the folder."""
        if self._lock:
            self._lock.close()

    def _load(self) -> list[QueuedMessage]:
        """Read what waits, and tidy up what a crash has left."""
        messages = []
        for path, message in self.read_all(self.queue):
            if message and path.with_suffix(".eml").exists():
                messages.append(message)
                continue
            log_event(logging.ERROR, path.stem, "set-aside", file=self.failed / path.name,
                      problem="it has no .eml" if message else "it is damaged")
            for source in (path.with_suffix(".eml"), path):
                with contextlib.suppress(FileNotFoundError):
                    _move(source, self.failed)
        failed = {path.name for path in self.failed.iterdir()}
        for path in self.queue.iterdir():
            is_orphan = path.suffix == ".eml" and not path.with_suffix(".json").exists()
            if is_orphan and f"{path.stem}.json" in failed and path.name not in failed:
                _move(path, self.failed)        # `spool retry` while a relay started
            elif is_orphan or path.suffix == ".tmp":
                log_event(logging.WARNING, path.stem, "removed", file=path,
                          problem="the relay ended while it wrote or deleted it")
                path.unlink()
        return messages

    def read_all(self, folder: pathlib.Path
                 ) -> Iterator[tuple[pathlib.Path, QueuedMessage | None]]:
        """Read the states of all messages in a folder; None: it is damaged."""
        for path in folder.glob("*.json"):
            try:
                message = parse_queued_message(path.read_bytes())
                yield path, message if message.id == path.stem else None        # a copy
            except FileNotFoundError:
                pass                    # it was sent just now
            except (ValueError, IsADirectoryError):
                yield path, None

    def path(self, message: QueuedMessage) -> pathlib.Path:
        """Return where the state of a message is while it waits."""
        return self.queue / f"{message.id}.json"

    def content(self, message: QueuedMessage, limit: int = -1) -> bytes:
        """Read a message, or its first bytes."""
        with open(self.path(message).with_suffix(".eml"), "rb") as file:
            return file.read(limit)

    def add(self, message: QueuedMessage, parts: list[bytes | memoryview],
            deadline: float, is_given_up: Callable[[], bool]) -> None:
        """Store a message, so that a crash does not lose it, but not after the deadline."""
        if min(self._deadlines, default=deadline) < time.monotonic():
            raise OSError(errno.EBUSY, "the disk does not answer")  # or memory fills up
        self._deadlines.add(deadline)
        try:
            self._check_space(message)
            _write(self.path(message).with_suffix(".eml"), parts)
            self.note(self.path(message), message)
            if time.monotonic() > deadline or is_given_up():    # its client knows of it
                raise TimeoutError("time is up")
        except OSError:
            with contextlib.suppress(OSError):
                self.remove(self.path(message))
            raise
        finally:
            self._deadlines.discard(deadline)

    def _check_space(self, message: QueuedMessage) -> None:
        disk = os.statvfs(self.queue)
        if disk.f_bavail * disk.f_frsize - message.size < MIN_FREE_DISK:
            raise OSError(errno.ENOSPC, f"less than {MIN_FREE_DISK} bytes would be free")
        with self._counting:
            is_full = self._used + message.size > self._max_bytes
            if is_full and time.monotonic() >= self._count_at:
                self._used, self._count_at = 0, time.monotonic() + RECOUNT_INTERVAL
                for path in self._path.glob("*/*"):
                    with contextlib.suppress(FileNotFoundError):    # it was sent just now
                        self._used += path.stat().st_size
            if self._used + message.size > self._max_bytes and not message.is_bounce:
                raise OSError(errno.EDQUOT, "more than SPOOL_MAX_BYTES")
            self._used += message.size + len(json.dumps(vars(message)))

    def note(self, path: pathlib.Path, message: QueuedMessage) -> None:
        """Write down the state of a message. Raises FileNotFoundError if it was deleted."""
        path.with_suffix(".eml").stat()
        new = path.with_suffix(".tmp")
        _write(new, [json.dumps(vars(message)).encode()])
        new.rename(path)
        _sync(path.parent)

    def remove(self, path: pathlib.Path) -> None:
        """Remove a message."""
        for suffix in (".tmp", ".json", ".eml"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        _sync(path.parent)

    # Between two moves queue/ has a .json without .eml, which _load() moves to failed/. So
    # a crash loses nothing.

    def fail(self, message: QueuedMessage) -> None:
        """Move a message to failed/."""
        with contextlib.suppress(OSError):      # a full disk; if it is gone _move() says so
            self.note(self.path(message), message)
        self.failed.mkdir(0o700, exist_ok=True)     # somebody may have tidied up
        for suffix in (".eml", ".json"):
            _move(self.queue / f"{message.id}{suffix}", self.failed)

    def retry(self, message: QueuedMessage) -> None:
        """Move a message from failed/ to queue/, as if it had come just now."""
        message.queued_at, message.attempts = time.time(), 0
        self.note(self.failed / f"{message.id}.json", message)
        for suffix in (".json", ".eml"):
            _move(self.failed / f"{message.id}{suffix}", self.queue)

    # The command line works beside the relay.

    def report(self, name: str) -> None:
        """Have the relay look at a message again."""
        path = self._path / "lock"
        if path.exists():
            with open(path, "a") as file:
                file.write(f"{name}\n")

    def changes(self) -> dict[str, QueuedMessage | None]:
        """Return what the command line has changed, by ID; None: it is not in queue/."""
        self._names += self._lock.read().split() if self._lock else []  # since last time
        found = dict(self.read_all(self.queue)) if self._names else {}
        names, self._names = self._names, []        # not before they could be read
        return {name: found.get(self.queue / f"{name}.json") for name in names}


def _write(path: pathlib.Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file that only its owner can read, down to the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        if os.geteuid() == 0:           # `spool retry` by root, for a relay that is not
            os.fchown(file.fileno(), path.parent.stat().st_uid, -1)
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: pathlib.Path) -> None:
    """Write the names in a folder down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(path: pathlib.Path, folder: pathlib.Path) -> None:
    path.rename(folder / path.name)
    _sync(folder)
    _sync(path.parent)


class MailboxQueue:
    """The messages of one mailbox, and the task that sends them."""

    task: asyncio.Task[None]

    def __init__(self, pause: float) -> None:
        self.messages: dict[str, QueuedMessage] = {}        # by ID
        self.failures = int(pause > 0)          # in a row
        self.resume_at = time.monotonic() + pause
        self.wake = asyncio.Event()
        self.is_sending = False
        self.is_without_secret = False          # and the log says so

    def resume(self) -> None:
        """End the pause."""
        self.resume_at = 0.0
        self.wake.set()


def backoff(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row, 20 % more or less."""
    pause = min(MIN_BACKOFF * 2.0 ** min(failures - 1, 20), MAX_BACKOFF)
    return pause * (0.8 + secrets.randbelow(401) / 1000)


class QueueManager:
    """Stores messages that Microsoft could not take, and sends them when it can."""

    def __init__(self, config: Config, graph: GraphClient, accounts: AccountsFile,
                 memory: MemoryBudget, name: str) -> None:
        """Get ready; `name` is that of this machine."""
        self._config = config
        self._graph = graph
        self._accounts = accounts
        self._memory = memory
        self._name = name
        self._files = QueueFiles(config)
        self._mailboxes: dict[tuple[str, str, str], MailboxQueue] = {}
        # Secrets that devices gave, by tenant and client, while any message needs them.
        self._applications: dict[tuple[str, str], Application] = {}
        self._is_stopping = False

    async def start(self) -> None:
        """Take the folder, and begin to send what is there. Raises StartError."""
        messages = self._files.open()   # nobody is served yet, so the loop may wait here
        self._deliveries = asyncio.Semaphore(MAX_CONCURRENT_DELIVERIES)
        for message in messages:
            self._admit(message)
        if messages:
            log_event(logging.INFO, "-", "spool", waiting=len(messages))
        self._watcher = asyncio.ensure_future(self._watch())

    def stop(self) -> set[asyncio.Task[None]]:
        """Begin nothing more; returns what is under way."""
        self._is_stopping = True
        self._watcher.cancel()
        for mailbox in self._mailboxes.values():
            if not mailbox.is_sending:
                mailbox.task.cancel()
        return {one.task for one in self._mailboxes.values() if one.is_sending}

    def close(self) -> None:
        """Release the folder."""
        self._files.close()

    def remember_secret(self, application: Application) -> None:
        """Take the secret that a device gave, if a message needs it."""
        key = application.tenant, application.client
        mailboxes = [mailbox for other, mailbox in self._mailboxes.items()
                     if other[:2] == key]
        if application.relay_holds_secret or not mailboxes:
            return
        if key not in self._applications:       # the pauses were for another secret
            for mailbox in mailboxes:
                mailbox.resume()
        self._applications[key] = application

    async def put(self, message: QueuedMessage, parts: list[bytes | memoryview],
                  application: Application | None = None) -> None:
        """Store a message; it is safe when this returns. Raises TemporaryError."""
        pause = 0.0
        if application and message.key not in self._mailboxes:      # it has just failed
            pause = self._graph.throttled_for(message.key) or backoff(1)
            message.next_attempt_at = time.time() + pause
        deadline = time.monotonic() + DISK_TIMEOUT      # add() keeps it, unless it hangs
        given_up = threading.Event()    # not the future, which would hold itself and parts
        try:
            await result_before(deadline + GRACE, run_in_thread(functools.partial(
                self._files.add, message, parts, deadline, given_up.is_set)))
        except OSError as error:
            raise TemporaryError("The message cannot be queued now; try again later", 452,
                                 "4.3.1", level=logging.ERROR, facts={
                                     "spool": error.strerror or str(error)}) from None
        finally:
            given_up.set()
        self._admit(message, pause).messages[message.id] = message
        if application and not application.relay_holds_secret:
            self._applications.setdefault(message.key[:2], application)

    def _admit(self, message: QueuedMessage, pause: float = 0.0) -> MailboxQueue:
        """Have a stored message sent; if it is the first of its mailbox, after a pause."""
        mailbox = self._mailboxes.get(message.key)
        if not mailbox:
            mailbox = self._mailboxes[message.key] = MailboxQueue(pause)
            mailbox.task = asyncio.ensure_future(self._work(message.key, mailbox))
        mailbox.messages.setdefault(message.id, message)
        mailbox.wake.set()
        return mailbox

    # One task for a mailbox.

    async def _work(self, key: tuple[str, str, str], mailbox: MailboxQueue) -> None:
        """Send the messages of a mailbox until there are no more."""
        while mailbox.messages and not self._is_stopping:
            mailbox.wake.clear()
            pause = mailbox.resume_at - time.monotonic()
            try:
                message = self._next(mailbox) if pause <= 0 else None
                if message:
                    await self._try(mailbox, message)
                else:
                    await asyncio.wait_for(mailbox.wake.wait(), min(pause, MAX_SLEEP)
                                           if pause > 0 else MAX_SLEEP)
            except asyncio.TimeoutError:
                pass
            except Exception:           # or nothing would be sent any more
                log.error("%s broken", key[2], exc_info=True)
                mailbox.resume_at = time.monotonic() + MIN_BACKOFF
        if not mailbox.messages:
            del self._mailboxes[key]
            if all(other[:2] != key[:2] for other in self._mailboxes):
                self._applications.pop(key[:2], None)

    def _next(self, mailbox: MailboxQueue) -> QueuedMessage | None:
        """Choose the message to try now."""
        ready = [one for one in mailbox.messages.values()
                 if self._application(one) or self._is_expired(one)]
        if not ready and not mailbox.is_without_secret:
            message = next(iter(mailbox.messages.values()))
            log_event(logging.WARNING, message.id, "delayed", sender=message.mailbox,
                      waiting=len(mailbox.messages),
                      problem=f"waits until {message.login} logs in")
        mailbox.is_without_secret = not ready
        return min(ready, key=lambda one: (one.attempts, one.queued_at), default=None)

    def _is_expired(self, message: QueuedMessage) -> bool:
        return time.time() >= message.queued_at + self._config.spool_lifetime

    def _application(self, message: QueuedMessage) -> Application | None:
        """Find the application that sends a message, if its secret is known now."""
        accounts, key = self._accounts.accounts, message.key[:2]
        account = accounts.find(message.account) if message.account else None
        if not (account and account.has_credential):
            if key in self._applications:
                return self._applications[key]
            account = next((one for one in accounts if one.has_credential
                            and (one.tenant_id, one.client_id) == key), None)
        return account.as_application() if account else None

    async def _try(self, mailbox: MailboxQueue, message: QueuedMessage) -> None:
        application = self._application(message)
        message.attempts += 1
        try:
            if not application:         # it is too old
                await self._defer(mailbox, message, message.reason, {})
                return
            async with self._deliveries:
                mailbox.is_sending = True
                if not message.is_sent:
                    await self._send(mailbox, message, application)
                await self._on_disk(self._files.remove, self._files.path(message))
            mailbox.messages.pop(message.id, None)
        except FileNotFoundError:
            self._drop(mailbox, message)
        except (TemporaryError, AccessDenied, AuthError) as error:  # it may be granted yet
            if isinstance(error, AuthError) and application is self._application(message):
                self._applications.pop(message.key[:2], None)   # wait for the next login
            await self._defer(mailbox, message, str(error.reply), error.facts)
        except OSError as error:
            await self._defer(mailbox, message, error.strerror or str(error), {})
        except DeliveryError as error:
            await self._fail(mailbox, message, str(error.reply))
        finally:
            mailbox.is_sending = False

    async def _send(self, mailbox: MailboxQueue, message: QueuedMessage,
                    application: Application) -> None:
        config = self._config           # enough memory is left for what clients send
        self._memory.check(message.size + min(
            config.max_memory_for_messages // 2,
            config.max_memory_for_messages - config.size_limit))
        deadline = time.monotonic() + config.upstream_timeout
        self._memory.take(message.size)
        try:
            outgoing = await result_before(deadline, run_in_thread(lambda: as_stored(
                self._files.content(message), message)))
            response = await self._graph.send(application, outgoing, message.id, deadline)
        finally:
            self._memory.free += message.size
        message.is_sent, mailbox.failures = True, 0
        log_event(logging.INFO, message.id, "sent", sender=message.mailbox,
                  recipients=len(message.recipients), size=message.size,
                  tries=message.attempts, request_id=response.headers.get("request-id"),
                  queued=time.time() - message.queued_at)

    async def _defer(self, mailbox: MailboxQueue, message: QueuedMessage, reason: str,
                     facts: Mapping[str, object]) -> None:
        """Try a message again after a pause, unless it is too old."""
        if self._is_expired(message) and not message.is_sent:
            await self._fail(mailbox, message, f"It could not be sent for "
                             f"{self._config.spool_lifetime} seconds; at last: {reason}")
            return
        held = self._graph.throttled_for(message.key)
        mailbox.failures += not held
        pause = held or backoff(mailbox.failures)
        mailbox.resume_at = time.monotonic() + pause
        message.reason, message.next_attempt_at = reason, time.time() + pause
        log_event(logging.WARNING, message.id, "delayed", sender=message.mailbox,
                  tries=message.attempts, reply=reason, **facts, again=pause)
        with contextlib.suppress(OSError):      # the next one writes it
            await self._on_disk(self._files.note, self._files.path(message), message)

    async def _fail(self, mailbox: MailboxQueue, message: QueuedMessage,
                    reason: str) -> None:
        """Give a message up: send a bounce, and move it to failed/."""
        failed = dataclasses.replace(message, reason=reason, bounce_sent=False)
        try:
            if message.reverse_path and not message.bounce_sent:
                await self._send_bounce(failed)
                message.bounce_sent = True
            await self._on_disk(self._files.fail, failed)
        except FileNotFoundError:
            self._drop(mailbox, message)
            return
        except (OSError, TemporaryError) as error:
            log_event(logging.ERROR, message.id, "spool", problem=error)
            mailbox.resume_at = time.monotonic() + MIN_BACKOFF
            return
        mailbox.messages.pop(message.id, None)
        log_event(logging.ERROR, message.id, "failed", sender=message.mailbox,
                  recipients=len(message.recipients), size=message.size,
                  tries=message.attempts, reply=reason,
                  remedy="see `spool show`, mend it, then `spool retry`")

    async def _send_bounce(self, message: QueuedMessage) -> None:
        """Queue a notice to the sender of a message. Raises OSError and TemporaryError."""
        # The ID is always the same, so that a second one takes the place of the first.
        bounce_id, now = str(uuid.uuid5(uuid.NAMESPACE_OID, message.id)), time.time()
        header = await self._on_disk(self._files.content, message, message.header_size)
        content = make_bounce(message, header, self._name, bounce_id, now)
        await self.put(dataclasses.replace(
            message, id=bounce_id, reverse_path="", recipients=[message.reverse_path],
            header_size=content.index(b"\r\n\r\n") + 2, size=len(content), is_bounce=True,
            queued_at=now, attempts=0, next_attempt_at=0.0, reason=""), [content])

    def _drop(self, mailbox: MailboxQueue, message: QueuedMessage) -> None:
        """Forget a message that somebody has deleted."""
        log_event(logging.INFO, message.id, "dropped", sender=message.mailbox)
        mailbox.messages.pop(message.id, None)

    async def _on_disk(self, call: Callable[..., T], *arguments: object) -> T:
        return await result_before(time.monotonic() + DISK_TIMEOUT,
                             run_in_thread(functools.partial(call, *arguments)))

    # The command line.

    async def _watch(self) -> None:
        """Look again at messages that the command line has changed."""
        while True:
            await asyncio.sleep(QUEUE_POLL_INTERVAL)
            try:
                # Without a deadline: if the disk hangs, only this waits.
                for name, found in (await run_in_thread(self._files.changes)).items():
                    self._apply_change(name, found)
            except Exception as error:      # noqa: BLE001 - or it would never look again
                log_event(logging.ERROR, "-", "spool", problem=error)
                await asyncio.sleep(MIN_BACKOFF)

    def _apply_change(self, name: str, found: QueuedMessage | None) -> None:
        if found:
            mailbox = self._admit(found)
            mailbox.messages[name].attempts = 0     # so that it is the first one
            mailbox.resume()
            return
        for mailbox in self._mailboxes.values():
            if name in mailbox.messages:
                self._drop(mailbox, mailbox.messages[name])


# ---------------------------------------------------------------------------
# §16  TLS
#
# The certificate that the relay shows to devices, from two PEM files (TLS_SOURCE=file) or
# from Azure Key Vault (TLS_SOURCE=keyvault). The relay reads it once, at start, because the
# user of RUN_AS may be unable to read the key. A renewed certificate needs a restart.
#
# An account can set `tls_min_version` for its networks, and ACCOUNTS_FILE can change while
# the relay runs. Therefore there is an SSLContext for each TLS version from the start, and
# the server picks one for each connection.

TLS_VERSIONS: Mapping[str, ssl.TLSVersion] = {
    "1.0": ssl.TLSVersion.TLSv1, "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# OpenSSL's reason for a failed handshake -> the explanation in the log.
TLS_PROBLEMS: Mapping[str, str] = {
    **dict.fromkeys(("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW"),
                    "the client's TLS version is older than TLS_MIN_VERSION"),
    "NO_SHARED_CIPHER": "the client supports no cipher that TLS_CIPHER_SUITE allows",
    "HTTP_REQUEST": "the client sent an HTTP request",
    "WRONG_VERSION_NUMBER": "the client did not start TLS; for SMTPS_PORT set the device "
                            "to SSL/TLS, not to STARTTLS or no encryption",
    **dict.fromkeys(
        ("TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
         "SSLV3_ALERT_BAD_CERTIFICATE"),
        "the client does not trust the relay's certificate; import it on the device"),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the relay's certificate has expired",
}

# HTTP status of Key Vault -> what the administrator can do.
VAULT_REMEDIES: Mapping[int, str] = {
    401: "the relay's identity belongs to another tenant than the vault",
    403: "give the relay's identity the role Key Vault Secrets User, and allow the relay "
         "in the vault's firewall",
    404: "there is no such certificate",
}

OPENSSL_TIMEOUT = 10.0          # seconds for one run of the openssl command

# X509_V_FLAG_PARTIAL_CHAIN (ssl names it only from Python 3.10 on) accepts a certificate
# without its root, X509_V_FLAG_NO_CHECK_TIME an expired one.
_ANY_CERTIFICATE = 0x80000 | 0x200000

# From Python 3.11 on asyncio gives each TLS connection a receive buffer of 256 KiB. A TLS
# record has at most 16 KiB, and most connections are idle.
_protocol: Any = getattr(getattr(asyncio, "sslproto", None), "SSLProtocol", None)
if hasattr(_protocol, "max_size"):
    _protocol.max_size = 16384


def make_tls_contexts(config: Config) -> dict[str, ssl.SSLContext]:
    """Load the relay's certificate; return contexts by their minimum version.

    A version that OpenSSL lacks is left out. If TLS_SOURCE=off, the dict is empty. Raises
    ConfigError, StartError.
    """
    if config.tls_source == "off":
        return {}
    if config.tls_source == "file":
        return _load_contexts(config, config.tls_cert_filepath, config.tls_key_filepath,
                              f"TLS_CERT_FILEPATH={config.tls_cert_filepath!r}",
                              f"TLS_KEY_FILEPATH={config.tls_key_filepath!r}")
    name = f"AZURE_KEY_VAULT_CERT_NAME={config.azure_key_vault_cert_name!r}"
    with _private_file(asyncio.run(fetch_certificate(config, name))) as path:
        return _load_contexts(config, path, path, name, name)


def _load_contexts(config: Config, cert_path: str, key_path: str, cert_name: str,
                   key_name: str) -> dict[str, ssl.SSLContext]:
    """Load a certificate and its key; the names are for error messages."""
    def ask_passphrase() -> str:
        raise StartError(f"{key_name}: the key is encrypted; remove its passphrase")

    with _pem_errors(cert_name, "certificate"):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert_path)
    contexts = {config.tls_min_version: _make_context(config, config.tls_min_version)}
    for version in TLS_VERSIONS:
        with contextlib.suppress(ssl.SSLError, ValueError):     # OpenSSL lacks this version
            contexts.setdefault(version, _make_context(config, version))
    for context in contexts.values():
        with _pem_errors(key_name, "key"):
            context.load_cert_chain(cert_path, key_path, ask_passphrase)
    if certificate_dates(contexts[config.tls_min_version], cert_path)[1] < time.time():
        log_event(logging.WARNING, "-", "certificate-expired", certificate=cert_name,
                  problem="the certificate has expired; devices may refuse it")
    return contexts


def _make_context(config: Config, version: str) -> ssl.SSLContext:
    """Make a context without a certificate. Raises ConfigError for TLS_CIPHER_SUITE."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    ciphers = config.tls_cipher_suite
    if {version, config.tls_min_version} & {"1.0", "1.1"} and "@SECLEVEL" not in ciphers:
        # OpenSSL 3 has these versions only at security level 0, because their handshake
        # uses SHA-1. If TLS_MIN_VERSION is one of them, the certificate can be as old, and
        # the contexts of the newer versions must load it too.
        ciphers = f"{ciphers or 'DEFAULT'}:@SECLEVEL=0"
    if ciphers:
        try:
            context.set_ciphers(ciphers)
        except ssl.SSLError:
            raise ConfigError(f"TLS_CIPHER_SUITE={config.tls_cipher_suite!r}: must be an "
                              "OpenSSL cipher list that names a known cipher") from None
    with warnings.catch_warnings():     # Python deprecates TLS 1.0 and 1.1
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = TLS_VERSIONS[version]
    return context


@contextlib.contextmanager
def _pem_errors(name: str, content: str) -> Iterator[None]:
    """Turn errors of reading a PEM file into StartError."""
    try:
        yield
    except ssl.SSLError as error:
        problem = ("does not match the certificate" if error.reason == "KEY_VALUES_MISMATCH"
                   else f"contains no usable PEM {content}: {error.reason or error}")
        raise StartError(f"{name}: {problem}") from None
    except OSError as error:
        raise StartError(f"{name}: cannot be read: {error.strerror}") from None


def certificate_dates(context: ssl.SSLContext, cert_path: str) -> tuple[float, float]:
    """Return the start and the end of a server certificate's validity, in Unix time.

    The ssl module shows a certificate only after a handshake, so this does one in memory.
    Returns (0, inf) if the handshake fails.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= _ANY_CERTIFICATE
    client.load_verify_locations(cert_path)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client.set_ciphers("ALL:@SECLEVEL=0")       # accept an old, weak certificate
        sides = (client.wrap_bio(to_client, to_server),
                 context.wrap_bio(to_server, to_client, True))
        for side in sides * 3:          # a side has at most three turns in a handshake
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        certificate: Any = sides[0].getpeercert()
        return (ssl.cert_time_to_seconds(certificate["notBefore"]),
                ssl.cert_time_to_seconds(certificate["notAfter"]))
    except (ssl.SSLError, ValueError):
        return 0.0, math.inf


def pfx_to_pem(pfx: bytes) -> bytes:
    """Convert a PKCS#12 file without a password to PEM: key, certificate, chain.

    The ssl module cannot read PKCS#12, so the openssl command converts it, through pipes:
    the key is not written to disk. Raises ValueError.
    """
    for legacy in ["-legacy"], []:      # OpenSSL 3 needs it for RC2; 1.1 does not know it
        command = ["openssl", "pkcs12", "-nodes", "-passin", "pass:", *legacy]
        try:
            results = [subprocess.run([*command, *options.split()], input=pfx,  # noqa: S603
                                      capture_output=True, timeout=OPENSSL_TIMEOUT)
                       for options in ("-nocerts", "-nokeys -clcerts", "-nokeys -cacerts")]
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = getattr(error, "strerror", "timed out")
            raise ValueError(f"the openssl command: {problem}") from None
        failed = [result for result in results if result.returncode]
        if not failed:
            if not results[0].stdout or not results[1].stdout:
                raise ValueError("it has no private key with its certificate")
            return b"".join(result.stdout for result in results)
    reason = failed[0].stderr.decode(errors="replace").partition("\n")[0].strip()[:120]
    raise ValueError(f"the openssl command: {reason or 'cannot read it'}")


async def fetch_certificate(config: Config, name: str) -> bytes:
    """Return the certificate and its key from Key Vault as PEM. Raises StartError.

    The vault's secret with the name of the certificate holds both. Microsoft, "Get Secret
    (Key Vault REST API)" and "About Azure Key Vault certificates".
    """
    pool = HttpPool(config.endpoints)
    try:
        response = await AzureClient(config, pool, Tokens(config, pool)).get(
            f"{config.azure_key_vault_url}/secrets/{config.azure_key_vault_cert_name}"
            "?api-version=7.4", CLOUDS[config.azure_cloud].vault,
            {"Accept": "application/json"}, time.monotonic() + config.upstream_timeout)
    except TemporaryError as error:
        raise StartError(f"{name}: {printable_ascii(str(error))}"
                         f"{format_fields(error.facts)}") from None
    finally:
        pool.close()
    value = response.json().get("value")
    if response.status != 200 or not isinstance(value, str):
        remedy = VAULT_REMEDIES.get(response.status, "try again later")
        # The error's code and its inner code, such as Forbidden and ForbiddenByRbac.
        codes = re.findall(rb'"code"\s*:\s*"([A-Za-z]{1,60})"', response.body)[:5]
        raise StartError(f"{name}: Key Vault returned {response.status} "
                         f"{b'/'.join(codes).decode()}: {remedy}")
    try:
        if "-----BEGIN" in value:       # the certificate has the content type PEM
            return value.encode()
        return pfx_to_pem(base64.b64decode("".join(value.split()), validate=True))
    except ValueError as error:
        raise StartError(f"{name}: cannot be converted to PEM ({error}); in Key Vault set "
                         "the content type in the certificate's issuance policy to PEM, "
                         "and issue a new version") from None


@contextlib.contextmanager
def _private_file(data: bytes) -> Iterator[str]:
    """Provide data as a file of mode 0600, in memory or else on disk, for ssl."""
    file: Any
    try:
        file = open(os.memfd_create("relay"), "wb")     # noqa: SIM115
        path = f"/proc/self/fd/{file.fileno()}"
        os.stat(path)
    except (AttributeError, OSError):   # not Linux; an old kernel, or no /proc
        file = tempfile.NamedTemporaryFile()            # noqa: SIM115
        path = file.name
    with file:
        file.write(data)
        file.flush()
        yield path


# ---------------------------------------------------------------------------
# §17  Server

READ_SIZE = 16384               # octets; a TLS record has no more
SMALL_MESSAGE = 65_536          # octets; it is edited without a thread
SMALL_HEADER = 2048             # octets; hostile headers of this size took up to 9 ms
HANDSHAKE_TIMEOUT = 30.0        # seconds
NO_PROGRESS_TIMEOUT = 3600.0    # seconds without a login or a message that was accepted
LINGER = 1                      # second for the last reply to leave, and a close_notify
BACKLOG = 1000                  # connections that wait to be accepted
SPARE_FILES = 100               # that no client gets, so that Microsoft can be reached
MAX_REMEMBERED = 50_000         # accepted messages; some 20 MB
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The fields of RFC 5322 that identify a message, if they are not empty.
_IDENTITY = re.compile(rb"^(Message-ID|Date)[ \t]*:(?:(?:\r\n)?[ \t])*[^\s]", re.I | re.M)

_STOPPING = Reply(421, "4.3.2", "The relay is being stopped; try again later")


class DuplicateGuard:
    """Remembers accepted messages, so that a retransmission is not sent again.

    Only a message with a Message-ID and a Date field can be recognized (RFC 5322 section
    3.6.4). Without them two equal messages may both be meant: a device repeats an alarm.
    """

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember messages for `window` seconds; 0 disables the guard."""
        self._window = window
        self._under_way: dict[bytes, asyncio.Future[None]] = {}
        self._accepted: Cache[bytes, tuple[str, str]] = Cache(clock, MAX_REMEMBERED)

    def digest(self, login: Principal, envelope: Envelope, header: bytes) -> bytes:
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
        """Wait for others with this message; yield id and reply if accepted, or None."""
        while digest in self._under_way:
            if not await wait_until_done(deadline, self._under_way[digest]):
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
        """Join them; `microsoft` replaces Tokens and Graph. Raises ConfigError."""
        pool = HttpPool(config.endpoints)
        self.config = config
        self._pool = pool
        self._tokens = microsoft or Tokens(config, pool)
        self._graph = microsoft or GraphClient(config, pool, self._tokens)
        self.directory = Authenticator(config, AzureClient(config, pool, self._tokens))
        self.memory = MemoryBudget(config.max_memory_for_messages)
        host = socket.gethostname()     # this asks no DNS
        self.name = config.server_name or (
            host if re.fullmatch(_HOST_NAME, host) else "localhost")
        self._duplicates = DuplicateGuard(config.duplicate_window)
        self.spool = QueueManager(config, self._graph, self.directory.file, self.memory,
                                  self.name) if config.spool_directory else None
        self._watcher: asyncio.Task[None] | None = None
        if config.accounts_file:
            self.directory.file.load()

    async def start(self) -> None:
        """Begin to watch ACCOUNTS_FILE, and to send what is queued. Raises StartError."""
        if self.config.must_have_account and self.directory.table:
            try:
                await self.directory.table.check(self._deadline())
            except TemporaryError as error:
                raise StartError("ACCOUNTS_REQUIRED=true, and the table cannot be read: "
                                 f"{printable_ascii(str(error))}"
                                 f"{format_fields(error.facts)}") from None
        if self.config.accounts_file:
            self._watcher = asyncio.ensure_future(self.directory.file.watch())
        if self.spool:                  # the last, as what it begins must not be cut off
            await self.spool.start()

    def close(self) -> None:
        """Close what is open to Microsoft, and end what is under way."""
        if self._watcher:
            self._watcher.cancel()
        self._pool.close()
        if self.spool:
            self.spool.close()

    async def log_in(self, request: Authenticate, address: IpAddress | None,
                     ident: str) -> Principal:
        """Check a login. Raises AuthError, after a pause, and TemporaryError."""
        user = self.directory.loggable_username(request.username)
        failures = self.directory.failures
        try:
            login = await self._check_login(request, address)
        except RelayError as error:
            pause, result, facts = 0.0, "tempfail", dict(error.facts)
            if isinstance(error, AuthError):
                pause, result = failures.add(address), "refused"
                if self.directory.file.accounts.at(address, self.config)[0]:
                    facts["remedy"] = "from here no login is needed: switch it off there"
            elif not isinstance(error, TooManyFailures):
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
                           address: IpAddress | None) -> Principal:
        failures, deadline = self.directory.failures, self._deadline()
        failures.check(address)
        try:
            login = await self.directory.find(request, address, deadline)
            # With a spool who has given the right password need not wait for Microsoft.
            if not (self.spool and login.application.relay_holds_secret):
                await self._tokens.get(login.application, deadline)
        except AuthError:
            failures.check(address)     # who guesses at once must not see by the replies
            raise                       # which guess was right
        failures.check(address)
        if self.spool:
            self.spool.remember_secret(login.application)
        return login

    async def deliver(self, login: Principal, envelope: Envelope, session: str) -> str:
        """Send a message, or queue it; returns the text of the reply. Raises RelayError."""
        ident, started, deadline = str(uuid.uuid4()), time.monotonic(), self._deadline()
        account = login.account
        facts: dict[str, object] = {
            "session": session, "account": account.name or None,
            "sender": envelope.reverse_path, "recipients": len(envelope.recipients),
            "size": len(envelope.message)}
        try:
            message, digest = await self._prepare(login, envelope, deadline)
            facts.update(sender=message.edited.mailbox, size=message.edited.size)
            if not account.message_options(self.config).sender(envelope.reverse_path):
                account.check(message.edited.mailbox, "allowed_senders")
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
            reply = error.reply         # of a token, others may have the same error
            log_event(error.level, ident, "refused", **{**facts, **error.facts,
                      "reply": reply}, seconds=time.monotonic() - started)
            raise RelayError(f"{reply.text}, id {ident}", reply.code, reply.status,
                             close=reply.close) from None
        log_event(level, ident, event, **facts, seconds=time.monotonic() - started)
        return text

    async def _prepare(self, login: Principal, envelope: Envelope,
                       deadline: float) -> tuple[PreparedMessage, bytes]:
        """Edit a message. Use a thread if it is large: 150 MB, or a million lines."""
        def edit() -> tuple[PreparedMessage, bytes]:
            message = prepare_message(envelope, self.config, login)
            return message, self._duplicates.digest(login, envelope,
                                                    message.edited.original_header)
        if (len(envelope.message) < SMALL_MESSAGE
                and envelope.message.find(b"\r\n\r\n", 0, SMALL_HEADER) >= 0):
            return edit()
        try:
            return await result_before(deadline, run_in_thread(edit))
        except TimeoutError:
            raise TemporaryError("The message takes too long to read; try again later"
                                 ) from None

    async def _send(self, login: Principal, envelope: Envelope, message: PreparedMessage,
                    ident: str, deadline: float,
                    facts: dict[str, object]) -> tuple[int, str, str]:
        """Send or queue a message; returns level and event to log, and the reply's text."""
        application = login.application
        try:
            response = await self._graph.send(application, message, ident, deadline,
                                              is_live=True)
        except asyncio.CancelledError:
            if not self.spool:
                raise
            reason = "the relay stops"
        except AuthError as error:              # the secret has changed since the login
            raise TemporaryError("Microsoft no longer accepts this login; log in again",
                                 421, "4.7.0", close=True,
                                 facts=error.facts | {"entra": error.reply.text}) from None
        except TemporaryError as error:
            if not self.spool:
                raise
            facts.update(error.facts, reply=error.reply)
            reason = str(error.reply)
        else:
            facts["request_id"] = response.headers.get("request-id")
            if self.spool:
                self.spool.remember_secret(application)
            return logging.INFO, "sent", f"Accepted by Microsoft 365, id {ident}"
        edited = message.edited
        await self.spool.put(QueuedMessage(
            ident, login.account.name, application.tenant, application.client,
            edited.mailbox, envelope.reverse_path and (
                login.account.from_email or envelope.reverse_path),
            list(envelope.recipients.values()), len(edited.header), edited.size, False,
            time.time(), 1, 0.0, reason), [edited.header, edited.body], application)
        return logging.WARNING, "queued", f"Queued, id {ident}"

    def _deadline(self) -> float:
        return time.monotonic() + self.config.upstream_timeout


class Connection:
    """A client's connection: the shell around a Session."""

    def __init__(self, relay: Relay, contexts: Mapping[str, ssl.SSLContext],
                 address: IpAddress | None, reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter, *, implicit_tls: bool) -> None:
        """Begin to serve the client, in `task`."""
        self.ident = secrets.token_hex(4)
        self.site = client_prefix(address)
        self.is_running = False
        self.is_stopping = False
        self._relay = relay
        self._address = address
        self.guest, config = relay.directory.file.accounts.at(address, relay.config)
        self._context = contexts.get(config.tls_min_version)
        self._reader = reader
        self._writer = writer
        self._plain_writer = writer     # asyncio closes its transport when it is collected
        self._session = Session(config, relay.name, self._trace, relay.memory, self.guest)
        self._timeout = relay.config.client_timeout
        self._progress = -1             # of the session, when this began:
        self._deadline = 0.0            # for the command under way
        self._accepted_at = time.monotonic()        # the last login or message
        self.task = asyncio.ensure_future(self._run(implicit_tls))

    async def _run(self, implicit_tls: bool) -> None:
        """Serve the client until one of us leaves."""
        self.is_running = True
        reason = "the relay stops"
        try:
            if implicit_tls:            # nothing may be awaited before, see _start_tls
                await self._start_tls()
            self._session.greet()
            reason = await self._serve()
        except OSError as error:
            reason = (TLS_PROBLEMS.get(getattr(error, "reason", None) or "")
                      or str(error) or type(error).__name__)
        except asyncio.CancelledError:
            self._writer.write(bytes(_STOPPING))
        except Exception:
            log.error("%s broken", self.ident, exc_info=True)
            reason = "a defect of the relay"
            self._writer.write(bytes(Reply(421, "4.3.0", "The relay has a problem; try "
                                                         "again later")))
        self._session.reset()
        self.is_running = False         # what follows ends soon, and is not to be cut off
        log_event(logging.INFO, self.ident, "disconnected", reason=reason)
        await self._close_writer()

    def stop(self) -> None:
        """Leave as soon as no message is lost by it."""
        self.is_stopping = True
        # A task that has not begun would not begin, and so not close the connection.
        if self.is_running and not self._session.holds_message:
            self.task.cancel()

    async def _serve(self) -> str:
        """Do what the session asks for; returns the reason of its end."""
        while True:
            if self._session.holds_message:
                pass                    # the client must hear what becomes of it
            elif self.is_stopping:
                self._session.end(_STOPPING, "the relay stops")
            elif time.monotonic() > self._accepted_at + NO_PROGRESS_TIMEOUT:
                self._session.end(Reply(421, "4.7.0", "Too long without an accepted login "
                                                      "or message"), "no progress")
            event = self._session.next_event()
            if isinstance(event, StartTls):
                # What comes behind the 220 is for the handshake.
                self._writer.transport.pause_reading()      # type: ignore[attr-defined]
            if replies := self._session.output():
                await self._send(replies)
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
        else:
            self._accepted_at = time.monotonic()
        self._progress = -1             # the client was not waited for

    async def _send(self, replies: bytes) -> None:
        """Send replies; a client that does not read is cut off."""
        self._writer.write(replies)
        # wait_for() could lose the cancellation by which stop() ends a connection.
        timer = asyncio.get_running_loop().call_later(
            self._timeout, self._writer.transport.abort)
        try:
            await self._writer.drain()
        finally:
            timer.cancel()

    async def _read(self) -> None:
        """Give the session what the client sends, unless it takes too long."""
        if self._progress != self._session.progress:
            self._progress = self._session.progress
            self._deadline = time.monotonic() + self._timeout
        # wait_for() would make a task for each read.
        timer = asyncio.get_running_loop().call_later(
            self._deadline - time.monotonic(), self._time_out)
        try:
            self._session.receive(await self._reader.read(READ_SIZE))
        finally:
            timer.cancel()

    def _time_out(self) -> None:
        self._session.end(Reply(421, "4.4.2", "Waited too long for you; goodbye"),
                          "timed out")
        self._writer.transport.pause_reading()      # type: ignore[attr-defined]
        self._reader.feed_eof()                     # after it, data would be a fault

    async def _start_tls(self) -> None:
        """Do the handshake. Raises OSError.

        StreamWriter.start_tls() would keep what came in the clear (CVE-2011-0411). Here the
        new reader has seen nothing, and asyncio reads nothing for the old one between
        pause_reading(), or the start of a new connection's task, and the first await.
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

    async def _close_writer(self) -> None:
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
            log.debug("%s %s %s", self.ident, mark, quote_value(what))


class Server:
    """Accepts connections, within the limits."""

    def __init__(self, relay: Relay, contexts: Mapping[str, ssl.SSLContext]) -> None:
        """Get ready; `contexts` are by TLS_MIN_VERSION, and none for no TLS."""
        self._relay = relay
        self._contexts = contexts
        self._connections: set[Connection] = set()
        self._is_stopping = False
        # A connection needs a file, and may need a second one to reach Microsoft.
        limit = raise_open_files(2 * relay.config.max_connections + 2 * SPARE_FILES)
        self._client_files = limit - min(SPARE_FILES, limit / 2)

    async def run(self, sockets: list[tuple[socket.socket, bool]],
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
        with contextlib.suppress(NotImplementedError):      # of Windows
            for sock, _ in sockets:
                asyncio.get_running_loop().remove_reader(sock)
        for _ in range(3):              # turns that asyncio needs to begin a connection
            await asyncio.sleep(0)      # which it has accepted; after close() it fails
        for server in servers:
            server.close()
        await self._drain()

    async def _drain(self) -> None:
        """Let messages in flight end, then cut what is left."""
        for connection in list(self._connections):
            connection.stop()
        tasks = {connection.task for connection in self._connections}
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
        address = parse_address(peer[0]) if peer else None
        client = str(address or "unknown")
        problem = self._find_problem(client_prefix(address), sock.fileno())
        if problem:
            if not implicit_tls:
                writer.write(bytes(Reply(421, "4.7.0", f"{problem}; try again later")))
            writer.close()
            log_event(logging.WARNING, "-", "turned-away", client=client, reason=problem)
            return
        connection = Connection(self._relay, self._contexts, address, reader, writer,
                                implicit_tls=implicit_tls)
        connection.is_stopping = self._is_stopping      # asyncio had accepted it already
        self._connections.add(connection)
        connection.task.add_done_callback(
            lambda task: self._connections.discard(connection))
        guest = connection.guest
        log_event(logging.INFO, connection.ident, "connected", client=client,
                  port=writer.get_extra_info("sockname")[1],
                  account=guest.account.name if guest else None)

    def _find_problem(self, site: bytes, file: int) -> str:
        config = self._relay.config
        if file >= self._client_files:
            return "Too many connections for the limit of open files"
        if len(self._connections) >= config.max_connections:
            return "Too many connections"
        most = config.max_connections_per_client
        if len(self._connections) >= most <= sum(
                connection.site == site for connection in self._connections):
            return "Too many connections from your address"
        return ""


def open_listeners(config: Config) -> list[tuple[socket.socket, bool]]:
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


def drop_privileges(user: str) -> None:
    """Give up root's rights, its groups too. Raises ConfigError, StartError."""
    if not user:
        return
    try:
        entry = pwd.getpwnam(user)
    except (AttributeError, KeyError):      # AttributeError: this system has no users
        raise ConfigError(f"RUN_AS={user!r}: must be the name of a user of this system, or "
                          "nothing") from None
    if os.geteuid() != 0:
        log_event(logging.INFO, "-", "stays", run_as=user,
                  reason="only root can become another user")
        return
    try:
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except OSError as error:
        raise StartError(f"RUN_AS={user}: cannot become this user: {error.strerror}; start "
                         "as another user, with RUN_AS empty") from None


def raise_open_files(wanted: int) -> float:
    """Raise the soft limit of open files to `wanted` if possible; returns the limit."""
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
    """Call `stop` at SIGTERM or SIGINT, `reload` at SIGHUP; a second stop ends at once.

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


def run(config: Config, on_listening: Callable[[int], None] | None = None,
        microsoft: Any = None) -> None:
    """Serve until a signal; `announce` gets the port. Raises ConfigError, StartError."""
    handle_signals(lambda: sys.exit(0), lambda: None)   # nothing has begun yet
    contexts = make_tls_contexts(config)
    relay = Relay(config, microsoft)
    sockets = open_listeners(config)
    drop_privileges(config.run_as)
    relay.directory.file.check_access()
    if on_listening:
        on_listening(sockets[0][0].getsockname()[1])
    asyncio.run(_run(relay, contexts, sockets))


async def _run(relay: Relay, contexts: Mapping[str, ssl.SSLContext],
               sockets: list[tuple[socket.socket, bool]]) -> None:
    loop = asyncio.get_running_loop()
    # Such as that there are no more file descriptors.
    loop.set_exception_handler(lambda _, context: log_event(
        logging.ERROR, "-", "asyncio", problem=context.get("message"),
        error=context.get("exception")))
    stop = asyncio.Event()
    try:
        await relay.start()
        soon, file = loop.call_soon_threadsafe, relay.directory.file
        with contextlib.suppress(NotImplementedError):      # of Windows
            # This has any signal wake the loop, also one that comes just before it sleeps.
            loop.add_signal_handler(signal.SIGTERM, stop.set)
        handle_signals(lambda: soon(stop.set), lambda: soon(file.ask))
        await Server(relay, contexts).run(sockets, stop)
    finally:
        relay.close()
    log_event(logging.INFO, "-", "stopped")


# ---------------------------------------------------------------------------
# §18  Demo
#
# The demo runs the real server, but with DemoMicrosoft in place of Tokens and GraphClient:
# everything up to the HTTP request can be tried without an account at Microsoft. It turns
# TLS, RUN_AS and the queue off. It listens on 127.0.0.1 unless LISTEN_ADDRESS is set.

DEMO_USER = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


class DemoMicrosoft:
    """A replacement for Tokens and GraphClient that saves messages as files."""

    folder = pathlib.Path("outbox")

    async def get(self, application: Application, deadline: float) -> str:
        """Accept a login: return a token, as Tokens.get() does."""
        return "token"

    async def send(self, application: Application, message: PreparedMessage,
                   message_id: str, deadline: float, *, is_live: bool) -> HttpResponse:
        """Save a message of any size as it would be sent. Raises DeliveryError."""
        path = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{message_id}.eml"
        edited = message.edited
        try:
            await result_before(deadline, run_in_thread(lambda: path.write_bytes(
                edited.header + edited.body)))
        except OSError as error:
            raise DeliveryError(f"{path}: {error.strerror}", 452, "4.3.1") from None
        print(f"{path}: {edited.size} bytes from {quote_value(edited.mailbox)}", flush=True)
        return HttpResponse(202, {}, b"")


def demo(environ: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Run the relay with an outbox instead of Microsoft. Raises ConfigError, StartError."""
    try:
        DemoMicrosoft.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot create the folder outbox: {error.strerror}") from None
    config = Config.from_environ({
        **environ, "TLS_SOURCE": "off", "REQUIRE_TLS": "false", "SMTPS_PORT": "0",
        "RUN_AS": "", "SPOOL_DIRECTORY": "",
        "LISTEN_ADDRESS": environ.get("LISTEN_ADDRESS", "").strip() or "127.0.0.1"})
    with logging_to_stderr(config.log_level):
        run(config, functools.partial(_print_instructions, config), DemoMicrosoft())


def _print_instructions(config: Config, port: int) -> None:
    """Print how to log in, and commands that send a first message."""
    user = config.username_delimiter.join(DEMO_USER)
    address = config.listen_address
    host = "127.0.0.1" if address in ("localhost", "0.0.0.0", "::") else address
    in_url = f"[{host}]" if ":" in host else host
    credentials = f"{urllib.parse.quote(user, safe='')}:demo"
    print(f"""\
The relay listens on {address} port {port}, without TLS, and saves messages in outbox/.
For a printer, start it with LISTEN_ADDRESS=0.0.0.0. Log in with any password and user name
{user}
Send a first message from another terminal:

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
#
# The command `explain` prints what the relay would do with a message, without any network:
#
#   file --> Session --> Envelope --> prepare_message() --> printed, or the first refusal
#
# All of it is code that the server uses, too. _receive() plays a client that has logged in
# under TLS as TENANT@CLIENT, so settings of accounts do not apply.

def explain(config: Config, message: bytes, sender: str, recipients: Iterable[str]) -> bool:
    """Print what the relay would do; return whether it would send the message."""
    try:
        envelope = _receive(config, message, sender, recipients)
        edited, draft = prepare_message(envelope, config)
    except RelayError as error:
        print(f"Refused: {error.reply}")
        return False
    print(f"Sent by:  {escape_unprintable(edited.mailbox)}\nSent to:")
    for header_field in split_header(edited.header).find(*_ADDRESS_FIELDS):
        label = header_field.label.decode()
        for address in _parse_addresses(header_field).addresses:
            note = "" if address.key in envelope.recipients else ", not a recipient in SMTP"
            print(f"  {escape_unprintable(address.mailbox)}  ({label}{note})")
    edits = list(_edits(edited.original_header, edited.header))
    print("\n".join(["Edits:", *edits] if edits else ["Edits:    none"]))
    path = f"draft (over {GRAPH_MESSAGE_LIMIT} bytes)" if draft else "sendMail"
    print(f"Path:     {path}, {edited.size} bytes")
    for attachment in draft.attachments if draft else ():
        upload = "by upload session" if attachment.is_large else "in one request"
        inline = ", inline" if attachment.content_id else ""
        print(f"  {escape_unprintable(attachment.name)}  ({attachment.part.media_type}, "
              f"{attachment.size} bytes, {upload}{inline})")
    return True


def _receive(config: Config, message: bytes, sender: str,
             recipients: Iterable[str]) -> Envelope:
    """Pass a message through a Session. Raises RelayError with the first refusal."""
    session = Session(config, "explain", _raise_refusal)
    session.tls_started()
    session.authenticated(Principal(Account(), Application("", ""), "explain"))
    utf8 = "" if "".join([sender, *recipients]).isascii() else " SMTPUTF8"
    lines = ["EHLO explain", f"MAIL FROM:<{sender}> SIZE={len(message)}{utf8}",
             *(f"RCPT TO:<{recipient}>" for recipient in recipients), "DATA", ""]
    session.receive("\r\n".join(lines).encode("utf-8", "surrogateescape"))
    if message:     # the last line of a file can end with LF or without any line end
        message = message.removesuffix(b"\n").removesuffix(b"\r") + b"\r\n"
    session.receive(b"." * message.startswith(b".") + message.replace(b"\r\n.", b"\r\n.."))
    session.receive(b".\r\n")
    event = session.next_event()
    assert isinstance(event, Deliver)   # _raise_refusal() has raised for any other outcome
    return event.envelope


def _raise_refusal(mark: str, reply: object) -> None:
    """Raise the refusal that a Session reports to its trace, with the mark "!"."""
    if mark == "!" and isinstance(reply, Reply):
        raise RelayError(reply.text, reply.code, reply.status)


def _edits(before: bytes, after: bytes) -> Iterator[str]:
    """Compare two headers; yield the lines that were removed (-) and added (+)."""
    old, new = before.split(b"\r\n"), after.split(b"\r\n")
    # autojunk makes the comparison of many lines fast, but the result less exact.
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=len(old) > 2000)
    for tag, *ends in matcher.get_opcodes():
        if tag != "equal":
            lines = [b"  - " + line for line in old[ends[0]:ends[1]]]
            lines += [b"  + " + line for line in new[ends[2]:ends[3]]]
            yield from (escape_unprintable(decode_text(line)) for line in lines)


def escape_unprintable(text: str) -> str:
    """Return a text as one line, with a Python escape for each unprintable character."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------
# §20  Command line
#
# A function for each command. It gets the environment and the parsed arguments, prints its
# result, and returns the exit status:
#
#   0, None   success
#   1         StartError: a file, a port or the network cannot be used
#   1         `explain`: the relay would refuse the message; `spool`: there is no such ID
#   2         ConfigError: a setting, an argument or ACCOUNTS_FILE is wrong
#
# main() turns the two errors into a line on standard error and their status.

def serve(environ: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Run the relay. Raises ConfigError, StartError."""
    config = Config.from_environ(environ)
    with logging_to_stderr(config.log_level):
        run(config)


def run_explain(environ: Mapping[str, str], arguments: argparse.Namespace) -> int:
    """Explain the message in a file. Raises ConfigError."""
    if not "".join([arguments.sender, *arguments.recipients]).isprintable():
        raise ConfigError("an address contains control characters")
    try:
        message = pathlib.Path(arguments.file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{arguments.file}: cannot be read: {error.strerror}") from None
    # The terminal may be unable to show all characters of a header.
    sys.stdout.reconfigure(errors="backslashreplace")   # type: ignore[union-attr]
    config = Config.from_environ(environ)
    return 0 if explain(config, message, arguments.sender, arguments.recipients) else 1


def print_hash(environ: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Print the hash of a password, from a prompt or a pipe. Raises ConfigError."""
    if sys.stdin.isatty():
        password = getpass.getpass()
        if getpass.getpass("Again: ") != password:
            raise ConfigError("the passwords are not the same")
    else:
        password = sys.stdin.buffer.readline().decode(errors="replace").rstrip("\r\n")
    if not password.isprintable() or not password or "\ufffd" in password:
        raise ConfigError("a password must be printable text in UTF-8, and not empty")
    if not has_scrypt():
        raise ConfigError("this Python has no scrypt; use another Python")
    print(hash_password(password, secrets.token_bytes(16)))


def print_user_name(environ: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Print the short user name of an application. Raises ConfigError."""
    try:
        tenant, client = parse_tenant(arguments.tenant), parse_client(arguments.client)
    except ValueError as error:
        raise ConfigError(f"an argument must be {error}") from None
    short = encode_uuid(tenant) if decode_uuid(tenant) else tenant
    print(short + Config.from_environ(environ).username_delimiter + encode_uuid(client))


def print_accounts(environ: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Print the accounts, or what applies to an IP address. Raises ConfigError."""
    config = Config.from_environ(environ)
    if not config.accounts_file:
        raise ConfigError("ACCOUNTS_FILE is not set")
    file = AccountsFile(config)
    file.load()
    if arguments.match is None:
        print("\n\n".join(map(describe_account, file.accounts)))
        return
    address = parse_address(arguments.match)
    if address is None:
        raise ConfigError(f"{arguments.match!r} is not an IP address")
    anonymous, config = file.accounts.at(address, config)
    names = [f"[{account.name}]" for account in file.accounts
             if (account.password or not account.has_credential)
             and account.allows_address(address)]
    print(f"{address}\n"
          f"without login:    {f'as [{anonymous.account.name}]' if anonymous else 'no'}\n"
          f"require_tls:      {str(config.require_tls).lower()}\n"
          f"tls_min_version:  {config.tls_min_version}\n"
          f"may log in as:    {' '.join(names) or 'none'}")


def describe_account(account: Account) -> str:
    """Return an account as a section of ACCOUNTS_FILE, without its secrets."""
    lines = [f"[{account.name}]"]
    for key, setting in settings_of(Account).items():
        value = getattr(account, key)
        text = (", ".join(map(str, value)) if isinstance(value, tuple) else
                str(value).lower() if isinstance(value, bool) else str(value or ""))
        if text and not (key == "client_secret" and account.client_secret_file):
            lines.append(f"{key} = {setting.show(text)}")
    return "\n".join(lines)


def run_spool(environ: Mapping[str, str], arguments: argparse.Namespace) -> int:
    """List, show, retry or drop messages of the queue. Raises ConfigError, StartError."""
    config, action, wanted = Config.from_environ(environ), arguments.action, arguments.id
    if not config.spool_directory:
        raise ConfigError("SPOOL_DIRECTORY is not set")
    if action in ("show", "drop") and not wanted:
        raise ConfigError(f"spool {action} needs the ID of a message, see `spool list`")
    files = QueueFiles(config)
    try:
        os.listdir(files.queue)     # glob() in read_all() hides an error of the folder
        messages = [(path, message) for folder in (files.queue, files.failed)
                    for path, message in files.read_all(folder)
                    if wanted in (None, path.stem)]
        messages.sort(key=lambda item: item[1].queued_at if item[1] else math.inf)
        if not messages:
            print("There is no such message." if wanted else "The queue is empty.")
        for path, message in messages:
            if action == "drop":
                files.remove(path)
                files.report(path.stem)
            elif action in ("list", "show"):
                print(describe_message(path, message))
                if action == "show":
                    text = decode_text(path.with_suffix(".eml").read_bytes())
                    print(*map(escape_unprintable, text.splitlines()), sep="\n")
            elif message and (wanted or path.parent == files.queue):
                # Without an ID, `retry` leaves the failed messages where they are.
                if path.parent == files.failed:
                    files.retry(message)
                files.report(message.id)
                print(f"{message.id} will be retried; if the relay lacks its secret, when "
                      f"{message.login} logs in")
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None
    return int(not messages and wanted is not None)


def describe_message(path: pathlib.Path, message: QueuedMessage | None) -> str:
    """Return a line about a message in queue/ or failed/; `message` None: it is damaged."""
    if message is None:
        return f"damaged {path.stem}{format_fields({'file': path})}"
    is_waiting = path.parent.name == "queue"
    has_delay = is_waiting and message.next_attempt_at > time.time()
    return ("waiting " if is_waiting else "failed  ") + message.id + format_fields({
        "queued": _utc(message.queued_at), "size": message.size,
        "account": message.account or None, "sender": message.mailbox,
        "recipients": ",".join(message.recipients), "bounce": message.is_bounce or None,
        "attempts": message.attempts, "reason": message.reason or None,
        "next_attempt": _utc(message.next_attempt_at) if has_delay else None})


def _utc(seconds: float) -> str:
    """Format a Unix time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; its result has the function of the command as `run`."""
    parser = argparse.ArgumentParser(
        prog="smtp_oauth_relay.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Accept mail over SMTP and send it through Microsoft 365.",
        epilog=f"environment variables (units: seconds and bytes):\n{settings_help()}\n\n"
               "HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE work as in other programs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(run=serve)
    _add_commands(parser.add_subparsers(metavar="command"))
    return parser


def _add_commands(commands: Any) -> None:
    """Add the commands; `commands` is what add_subparsers() returns."""
    def add(name: str, run: Callable[..., object], text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    add("serve", serve, "run the relay (default)")
    add("demo", demo, "try the relay without an account; it saves messages to outbox/")
    command = add("explain", run_explain, "show what the relay would do with a message, "
                  "without any network; exit status 0: send, 1: refuse, 2: error")
    command.add_argument("file", metavar="FILE.eml")
    command.add_argument("--from", dest="sender", metavar="ADDRESS", required=True,
                         help="the sender in MAIL FROM; can be empty")
    command.add_argument("--to", dest="recipients", metavar="ADDRESS", required=True,
                         action="append", help="a recipient in RCPT TO; repeatable")
    command = add("encode", print_user_name, "print the short user name of an application")
    command.add_argument("tenant", metavar="TENANT", help="tenant ID or domain")
    command.add_argument("client", metavar="CLIENT", help="application (client) ID")
    add("hash-password", print_hash, "print the hash of a password for ACCOUNTS_FILE")
    command = add("accounts", print_accounts, "show ACCOUNTS_FILE as the relay reads it")
    command.add_argument("--match", metavar="ADDRESS",
                         help="show what applies to a device with this IP address")
    command = add("spool", run_spool, "list, show, retry or drop queued and failed "
                  "messages; retry without ID: all queued messages")
    command.add_argument("action", nargs="?", default="list",
                         choices=("list", "show", "retry", "drop"))
    command.add_argument("id", nargs="?", metavar="ID")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(os.environ, arguments) or 0
    except ConfigError as error:
        print(f"smtp_oauth_relay: invalid configuration:\n{error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"smtp_oauth_relay: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
