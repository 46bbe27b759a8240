#!/usr/bin/env python3
r"""Accept mail over SMTP, and send it through Microsoft 365.

Printers, scanners, NAS boxes and old applications that know only SMTP with a user name and
a password log in here. The relay exchanges the password for an OAuth 2.0 token (client
credentials) and sends each message through Microsoft Graph. A client gets "250" when
Microsoft has accepted its message, when the message is on disk in SPOOL_DIRECTORY, or when
it repeats such a message, with the same Message-ID, within DUPLICATE_WINDOW.

    python3 smtp_oauth_relay.py demo      try it without any account
    python3 smtp_oauth_relay.py           serve, configured by environment variables
    python3 smtp_oauth_relay.py explain   show what the relay would do with a message
    python3 smtp_oauth_relay.py spool     show the queue
    python3 smtp_oauth_relay.py --help    list the variables

What it touches: it listens on SMTP_PORT (and SMTPS_PORT), reads the two TLS files, writes
its log to standard error, and connects to AZURE_AUTHORITY_HOST, GRAPH_ENDPOINT and the host
that Graph names for an upload, through HTTPS_PROXY if that is set. Only if configured:
ACCOUNTS_FILE and the files of secrets that it names, AZURE_TABLES_URL, SPOOL_DIRECTORY, and
with TLS_SOURCE=keyvault AZURE_KEY_VAULT_URL. For a table without SAS, for Key Vault and for
an account with `credential` it uses AZURE_CLIENT_SECRET, a token file or the managed
identity of the machine (without a proxy). The command openssl may run to convert a key from
Key Vault, for a moment from a file in memory or of mode 0600. The demo writes to outbox/.

    client --SMTP--> Connection --bytes--> Session        the protocol, without I/O
                       |    |  events: Authenticate, Deliver
           Authenticator    Delivery --------> QueueManager            on disk
                   |            |                 |
                 Tokens <-- GraphClient <---------+
                    |           |
                    +--> HttpPool --HTTPS--> Entra ID, Microsoft Graph

The path of a message. Server accepts the connection, and Accounts derive a ClientPolicy
from the client's address: whether it needs TLS and a login. Connection moves bytes between
the socket and Session, where a row of Command and the Phase decide whether a command is in
order. Each answer is a Reply. For all that needs I/O the session returns an event:
StartTls, Authenticate, Deliver or Close.

Authenticate goes to Authenticator. LoginLimiter counts failures. The Account comes from
AccountsFile, from AccountsTable (by AzureClient) or from the user name TENANT@CLIENT. If it
has a credential, the hash of its password decides. Otherwise the password is the secret of
an Application, which Tokens has Entra ID check by asking for a token, kept in a Cache. If a
message waits for that secret, QueueManager gets it. The result is a Principal.

MAIL, RCPT and DATA fill an Envelope within the MemoryBudget, and Deliver passes it to
Delivery. The Header is a list of Field, and To, Cc and Bcc are each an AddressList of
Address. Their edited text and the body are an EditedMessage. A large message is split into
a list of Part, and becomes a Draft with a list of Attachment. PreparedMessage has both. If
DuplicateGuard knows the message as Accepted, the old reply is repeated. Otherwise
GraphClient waits for a slot of MailboxLimiter. Each GraphOperation becomes an HttpRequest,
which HttpPool sends in a thread until the deadline of the RequestContext. If the
HttpResponse is not a success, a row of GraphFailure says which error it means. If Microsoft
cannot accept the message now, QueueManager stores it with QueueFiles as a QueuedMessage,
and the task of a MailboxQueue retries it. The Outcome goes to the client, and by LogQueue
to the log. Relay holds these parts together; in the demo DemoMicrosoft replaces two.

The path of a setting, such as HEADER_RECIPIENTS: a field of Config declares it as a
Setting, and from_environ() parses it. (A Cloud has the defaults of two other settings, and
conflicts() refuses settings that exclude each other.) as_principal() copies it to
MessageOptions unless the account decides, and edit_recipients() obeys it.

The path of an account: AccountsFile.load() reads the file, and parse_accounts() checks its
keys. A login finds the account by name, match_address() by network. The principal keeps it
until the session ends. A queued message keeps its name, tenant and client, not its secret.

Contents (search for the number; each section uses only those above it)

    §1   Replies and errors         Reply, RelayError and its subclasses
    §2   Configuration              Config: each field is a setting
    §3   SMTP grammar               paths, parameters, base64
    §4   Accounts                   Account, Principal: what a client may do
    §5   SMTP session               Session: bytes in, events and bytes out
    §6   Message headers            To, Cc, Bcc by the envelope; From; little else
    §7   Large messages             a message as a draft with attachments
    §8   Microsoft's responses      which response means which reply
    §9   Queued messages            QueuedMessage: its state on disk; the bounce
    §10  Log                        log_event: one line for an event    <- I/O starts here
    §11  HTTP                       HttpPool: requests in threads, with deadlines
    §12  Tokens                     Tokens: Entra ID and managed identities
    §13  Azure                      AccountsTable
    §14  Authentication             AccountsFile, Authenticator: decides every login
    §15  Graph                      GraphClient: sendMail or a draft
    §16  Queue                      QueueManager: messages that wait, on disk
    §17  Delivery                   Delivery: from the end of DATA to the reply
    §18  TLS                        the relay's own certificate
    §19  Server                     Relay, Connection, Server, serve
    §20  Demo                       an outbox in place of Microsoft
    §21  Explain                    what the relay would do with a message
    §22  Command line               main
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
# An error that the client must learn of is a RelayError. Its reply (code, enhanced status
# code, text) and its level in the log are chosen where it is raised, because only that
# place knows the reason. Nothing reads a code again to decide what to do next.

MAX_REPLY_TEXT = 480        # bytes; RFC 5321 section 4.5.3.1.5 allows 512 for a whole line


class Reply(NamedTuple):
    """A reply to a client; LF separates the lines of `text`.

    `status` is the enhanced status code (RFC 3463), or "" where RFC 2034 allows none.
    """
    code: int
    status: str
    text: str
    close: bool = False     # end the connection after this reply
    cost: int = 1           # counts toward MAX_COST, which ends a session without progress

    def __bytes__(self) -> bytes:
        lines = [printable_ascii(f"{self.status} {line}" if self.status else line).encode()
                 for line in self.text.split("\n")]
        return b"".join(b"%d%s%s\r\n" % (self.code, mark, line[:MAX_REPLY_TEXT])
                        for mark, line in zip([*[b"-"] * (len(lines) - 1), b" "], lines))

    def __str__(self) -> str:
        return f"{self.code} {self.status} {self.text}".replace("  ", " ")


def printable_ascii(text: str) -> str:
    """Replace everything but printable ASCII, because a peer may have chosen the text."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


class RelayError(Exception):
    """An error to report to the client, as `.reply`.

    `.facts` and `.level` are for the log.
    """
    code = 451
    status = "4.3.0"
    cost = 1
    level = logging.INFO

    def __init__(self, text: str, code: int = 0, status: str = "", *,
                 close: bool = False, facts: Mapping[str, object] | None = None,
                 level: int = 0, cost: int | None = None) -> None:
        super().__init__(text)
        self.reply = Reply(code or self.code, status or self.status, text, close,
                           self.cost if cost is None else cost)
        self.facts = dict(facts or {})
        self.level = level or self.level


class ProtocolError(RelayError):
    """The client violated RFC 5321 or an extension of it."""
    code = 501
    status = "5.5.4"
    cost = 10


class AuthError(RelayError):
    """The login is refused, by the relay or by Entra ID."""
    code = 535
    status = "5.7.8"
    cost = 34               # the third failed login ends the session


class TemporaryError(RelayError):
    """The same command may succeed later."""
    level = logging.WARNING


class DeliveryError(RelayError):
    """This message, or a recipient of it, is refused. The queue is not for it."""
    code = 554
    status = "5.6.0"


class ConfigError(Exception):
    """Settings that cannot be used: exit status 2."""


class StartError(Exception):
    """The settings are valid, but the relay cannot start: exit status 1."""


# ---------------------------------------------------------------------------
# §2  Configuration
#
# A field of Config is a setting. Its environment variable is the field name in upper case.
# These fields are the only list of settings: --help and the table of the README come from
# it. A default is text and is parsed like a value from the environment.
#
# This section does no I/O. What only the system knows is checked where the setting is used:
# users (RUN_AS), ciphers (TLS_CIPHER_SUITE), versions (TLS_MIN_VERSION).

GRAPH_REQUEST_LIMIT = 4_194_304     # bytes, the limit of Graph
GRAPH_MESSAGE_LIMIT = 3_145_728     # bytes; base64 makes GRAPH_REQUEST_LIMIT of them
EXCHANGE_LIMIT = 157_286_400        # bytes, the highest limit that a mailbox can have
# A proxy has an optional user and password, a host, and an optional port.
_PROXY = re.compile(r"(?:http://)?(?:[^/?#\s]*@)?(?:\[[0-9A-Fa-f:.]+\]|[^][/?#@:\s]+)"
                    r"(?::[0-9]{1,5})?/?")
_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)
_SHORT_UUID = re.compile("[A-Za-z0-9_-]{22}(?:==)?")
_DOMAIN_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]*",
                          re.I | re.A)


class Cloud(NamedTuple):
    """The URLs of a Microsoft cloud (Microsoft, "National cloud deployments")."""
    authority: str
    graph: str
    vault: str              # the resource of tokens for Key Vault


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
    """Mask the user, query and fragment of a URL, because they can hold secrets."""
    return re.sub(r"(?s)^(\w+://)?(?:.*[?#].*@.*|.*@)|[?#].*", r"\1***", url)


def _mask_all(secret: str) -> str:
    return "***"


class Setting(NamedTuple):
    """How to parse, explain and print a setting."""
    parse: Callable[[str], Any]     # raises ValueError, whose text follows "must be"
    default: str
    help: str
    show: Callable[[str], str] = str


def setting(parse: Callable[[str], Any], default: str, text: str,
            show: Callable[[str], str] = str) -> Any:
    """Declare a field as a setting; one with a `show` is a secret, which the repr omits."""
    return field(default_factory=lambda: parse(default), repr=show is str,
                 metadata={"setting": Setting(parse, default, text, show)})


def settings_of(cls: type) -> dict[str, Setting]:
    """Return the settings of a dataclass by field name, in the order of the fields."""
    return {item.name: item.metadata["setting"] for item in dataclasses.fields(cls)
            if "setting" in item.metadata}


def _optional(parse: Callable[[str], Any], empty: Any = "") -> Callable[[str], Any]:
    """Accept an empty value too, and parse it as `empty`."""
    return lambda text: parse(text) if text else empty


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Accept values separated by commas or white space, and drop repeated values."""
    def parse_all(text: str) -> tuple[Any, ...]:
        values = dict.fromkeys(parse(word) for word in re.split(r"[,\s]+", text) if word)
        if text and not values:
            raise ValueError("values, or empty")
        return tuple(values)
    return parse_all


def _matching(pattern: str, accepted: str) -> Callable[[str], str]:
    """Accept text that matches a pattern; `accepted` is the error text."""
    def parse(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(accepted)
    return parse


def _choice(*accepted: str) -> Callable[[str], str]:
    """Accept some words in any case, and return them as they are spelled here."""
    def parse(text: str) -> str:
        for value in accepted:
            if text.lower() == value.lower():
                return value
        raise ValueError("one of " + " ".join(accepted))
    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    """Accept a decimal number from `low` to `high`."""
    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,12}", text) and low <= int(text) <= high:
            return int(text)
        raise ValueError(f"a whole number from {low} to {high}")
    return parse


_count = _integer(1, 1_000_000)
_port = _integer(0, 65535)
_size = _integer(1000, 10 ** 12 - 1)
_text = _matching("[ -~]*", "printable ASCII text")
_utf8 = _matching("[^\ud800-\udfff]*", "text in UTF-8")
_HOST_NAME = "[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
_host_name = _matching(_HOST_NAME, "a host name such as relay.example.com")
_tls_version = _choice("1.0", "1.1", "1.2", "1.3")
_user = _matching("[ -9;-~]+", "the name of a user of this system, or empty")
_ciphers = _matching("[ -~]+", "an OpenSSL cipher list that names a known cipher")
_vault_name = _matching("[0-9A-Za-z-]{1,127}(/[0-9A-Za-z]{1,64})?",
                        "the name of a certificate: letters, digits and hyphens")


def _boolean(text: str) -> bool:
    """Parse `true` or `false` in any case."""
    return _choice("true", "false")(text) == "true"


def _seconds(text: str) -> float:
    """Parse a duration of at most a day, with at most six decimals."""
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) and 0 < float(text) <= 86400:
        return float(text)
    raise ValueError("a number of seconds above 0, up to 86400")


def _ip_address(text: str) -> str:
    """Check an address to listen on."""
    with contextlib.suppress(ValueError):
        if text.lower() == "localhost" or ipaddress.ip_address(text):
            return text
    raise ValueError("an IP address of this machine, localhost, or empty")


def split_url(url: str, http_if: str = "is_loopback") -> urllib.parse.SplitResult | None:
    """Split the URL of a service that receives secrets; return None if it is unsafe.

    A safe URL is https, or http to an IP address with the property `http_if` of
    ipaddress.IPv4Address. It contains no user and no fragment.
    """
    with contextlib.suppress(ValueError):       # no valid URL, port or IP address
        parts = urllib.parse.urlsplit(url)
        host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
        is_safe = parts.scheme == "https" or (
            parts.scheme == "http" and getattr(ipaddress.ip_address(host or ""), http_if))
        if (is_safe and host and parts.port != 0 and "@" not in parts.netloc
                and re.fullmatch("[!\"$-~]+", url)):
            return parts
    return None


def _endpoint(text: str) -> str:
    """Parse the URL of a Microsoft service; https:// is the default scheme."""
    parts = split_url(text if "://" in text else f"https://{text}")
    url = parts.geturl().rstrip("/") if parts else ""
    if not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?", url):
        raise ValueError("an https:// URL (http:// only for 127.0.0.1 and the like)")
    return url


def _table_url(text: str) -> str:
    """Parse the URL of an Azure table; the optional query is a SAS, which is a secret."""
    url, mark, sas = text.partition("?")
    url = _endpoint(url)
    if (re.fullmatch(r"[^/]+//[^/]+(/[^/]+)?/[A-Za-z][A-Za-z0-9]{2,62}", url)
            and ".table.cosmos." not in url.lower()     # needs tokens for another resource
            and re.fullmatch(r"[!\"$-~]*", sas)):
        return url + mark + sas
    raise ValueError("https://ACCOUNT.table.core.windows.net/TABLE, with or without a SAS "
                     "(a table of Azure Storage, not of Cosmos DB)")


def local_http_url(text: str) -> str:
    """Check the URL of a managed identity, which uses plain http. Raises ValueError."""
    parts = split_url(text, "is_private")
    if parts is None or parts.scheme != "http":
        raise ValueError("an http:// URL of this machine or of its private network")
    return text.rstrip("/") if parts.path == "/" else text


def decode_uuid(text: str) -> str | None:
    """Return a UUID, given in full or in base64url, in lower case; else return None."""
    if _UUID.fullmatch(text):
        return text.lower()
    if _SHORT_UUID.fullmatch(text):
        return str(uuid.UUID(bytes=base64.urlsafe_b64decode(text[:22] + "==")))
    return None


def encode_uuid(text: str) -> str:
    """Shorten a UUID to the 22 characters of its base64url form."""
    return base64.urlsafe_b64encode(uuid.UUID(text).bytes).decode().rstrip("=")


def parse_tenant(text: str) -> str:
    """Parse a tenant: a UUID in either form, or a domain. Raises ValueError."""
    tenant = text.lower() if _DOMAIN_NAME.fullmatch(text) else decode_uuid(text)
    if tenant is None:
        raise ValueError("the ID of a tenant, or one of its domains")
    return tenant


def parse_client(text: str) -> str:
    """Parse a client ID: a UUID in either form. Raises ValueError."""
    if client := decode_uuid(text):
        return client
    raise ValueError("the ID of an application (client)")


@dataclass(frozen=True)
class Config:
    """The settings. Durations are in seconds, sizes in bytes."""
    # Server
    listen_address: str = setting(
        _optional(_ip_address), "", "Address to listen on. Empty: all, IPv4 and IPv6.")
    smtp_port: int = setting(_port, "8025", "Port for SMTP with STARTTLS. 0: a free port.")
    smtps_port: int = setting(_port, "0", "Port for SMTP with implicit TLS. 0: disabled.")
    server_name: str = setting(
        _optional(_host_name), "", "Name in the greeting. Empty: this machine's host name.")
    server_greeting: str = setting(
        _text, "Microsoft Graph SMTP OAuth Relay", "Text in the greeting.")
    run_as: str = setting(
        _optional(_user), "", "User to run as, once the relay has its ports and TLS key.")
    log_level: str = setting(
        _choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), "INFO",
        "Minimum log level. DEBUG shows the SMTP dialogue without secrets.")
    # TLS with devices
    tls_source: str = setting(
        _choice("file", "keyvault", "off"), "file", "Source of the relay's certificate. "
        "`file`: PEM files. `keyvault`: Azure Key Vault. `off`: no TLS.")
    tls_cert_filepath: str = setting(str, "certs/cert.pem", "PEM file: certificate chain.")
    tls_key_filepath: str = setting(str, "certs/key.pem", "PEM file: its private key.")
    tls_min_version: str = setting(
        _tls_version, "1.2", "Minimum TLS version. Old printers need 1.0.")
    tls_cipher_suite: str = setting(_optional(_ciphers), "", "OpenSSL cipher list.")
    require_tls: bool = setting(_boolean, "true", "`true`: logins and messages need TLS.")
    # Logins and endpoints
    username_delimiter: str = setting(
        _choice("@", ":", "|"), "@", "Character between tenant and client in a user name.")
    accounts_file: str = setting(str, "", "INI file of accounts, by name or by network.")
    accounts_required: bool = setting(
        _boolean, "false", "`true`: TENANT@CLIENT can log in only if the Azure table lists "
        "it. A table that is set must be readable at start.")
    allowed_tenants: tuple[str, ...] = setting(
        _list_of(parse_tenant), "", "Tenants that may log in as TENANT@CLIENT, separated "
        "by commas. Write each as the devices do (ID or domain). Empty: all.")
    azure_cloud: str = setting(
        _choice(*CLOUDS), "global", "Microsoft cloud: global, usgov, usgov-dod or china. "
        "Sets the defaults of AZURE_AUTHORITY_HOST and GRAPH_ENDPOINT.")
    azure_authority_host: str = setting(
        _endpoint, CLOUDS["global"].authority, "URL of Entra ID for tokens.", _mask_url)
    graph_endpoint: str = setting(
        _endpoint, CLOUDS["global"].graph, "URL and token scope of Graph.", _mask_url)
    # Azure
    azure_tables_url: str = setting(
        _optional(_table_url), "", "Azure table of accounts. A SAS is optional.", _mask_url)
    azure_tables_partition_key: str = setting(_utf8, "user", "PartitionKey of accounts.")
    azure_tables_force_usage: bool = setting(
        _boolean, "false", "`true`: same as ACCOUNTS_REQUIRED=true.")
    azure_key_vault_url: str = setting(
        _optional(_endpoint), "", "Key Vault that holds the certificate.", _mask_url)
    azure_key_vault_cert_name: str = setting(
        _optional(_vault_name), "", "Name of the certificate in Key Vault.")
    azure_tenant_id: str = setting(_optional(parse_tenant), "", "The relay's own tenant.")
    azure_client_id: str = setting(
        _optional(parse_client), "", "Application or user-assigned identity of the relay.")
    azure_client_secret: str = setting(_utf8, "", "Secret of AZURE_CLIENT_ID.", _mask_all)
    azure_federated_token_file: str = setting(str, "", "Token file that Kubernetes sets.")
    identity_endpoint: str = setting(str, "", "Managed identity. Azure sets it.", _mask_url)
    identity_header: str = setting(_text, "", "Secret for IDENTITY_ENDPOINT.", _mask_all)
    azure_pod_identity_authority_host: str = setting(
        local_http_url, "http://169.254.169.254", "Managed identity of VMs.", _mask_url)
    # Messages
    sender_from: str = setting(
        _choice("envelope", "header"), "envelope",
        "Source of the sending mailbox. `envelope`: MAIL FROM. `header`: first of From.")
    from_mismatch: str = setting(
        _choice("keep", "rewrite"), "keep", "Action if From does not name the sending "
        "mailbox. `keep`: Microsoft decides. `rewrite`: the relay replaces the address.")
    header_recipients: str = setting(
        _choice("strip", "keep"), "strip", "Addresses in To, Cc and Bcc that are not "
        "recipients. `strip`: remove them. `keep`: Microsoft sends the message there too.")
    large_messages: str = setting(
        _choice("upload", "refuse"), "upload", "Messages above 3 MB. `upload`: send them "
        "as drafts, which needs the permission Mail.ReadWrite. `refuse`: refuse them.")
    # Queue
    spool_directory: str = setting(
        str, "", "Queue directory of messages to send later. Empty: devices must retry.")
    spool_lifetime: int = setting(_integer(1, 10 ** 8), "172800", "Time limit for retries.")
    spool_max_bytes: int = setting(_size, "1073741824", "Size limit, with failed messages.")
    duplicate_window: int = setting(
        _integer(0, 86400), "900", "How long a duplicate is accepted but not sent. 0: off.")
    # Limits
    max_message_size: int = setting(
        _integer(1000, EXCHANGE_LIMIT), "36700160", "Largest message. Exchange has 35 MB.")
    max_memory_for_messages: int = setting(
        _size, "268435456", "Maximum total size of the messages in memory.")
    max_recipients: int = setting(_count, "500", "Maximum recipients of a message.")
    max_connections: int = setting(_count, "1000", "Maximum number of connections.")
    max_connections_per_client: int = setting(
        _count, "100", "Maximum number of connections from an IPv4 address or IPv6 /64.")
    client_timeout: float = setting(_seconds, "300", "Time limit for a command or 64 KiB.")
    upstream_timeout: float = setting(
        _seconds, "60", "Time limit for a login or a message at Microsoft, with retries.")
    shutdown_timeout: float = setting(_seconds, "25", "Time for messages at a stop.")

    @property
    def size_limit(self) -> int:
        """The largest message that can be sent, in bytes."""
        limit = GRAPH_MESSAGE_LIMIT if self.large_messages == "refuse" else EXCHANGE_LIMIT
        return min(self.max_message_size, limit)

    @property
    def must_have_account(self) -> bool:
        """Return whether TENANT@CLIENT can log in only if the Azure table lists it."""
        return self.accounts_required or self.azure_tables_force_usage

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The URLs of Microsoft services, without those of managed identities."""
        return tuple(filter(None, (self.azure_authority_host, self.graph_endpoint,
                                   self.azure_tables_url, self.azure_key_vault_url)))

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Config:
        """Read the settings. Raises ConfigError with all invalid values, else conflicts."""
        values, errors = {}, []
        cloud = CLOUDS.get(environ.get("AZURE_CLOUD", "").strip().lower(), CLOUDS["global"])
        defaults = {"AZURE_AUTHORITY_HOST": cloud.authority, "GRAPH_ENDPOINT": cloud.graph}
        for name, item in settings().items():
            text = environ.get(name, "").strip() or defaults.get(name, item.default)
            try:
                values[name.lower()] = item.parse(text)
            except ValueError as error:
                errors.append(f"{name}={item.show(text)!r}: must be {error}")
        config = cls(**values)
        errors = errors or list(config.conflicts(environ))
        if errors:
            raise ConfigError("\n".join(errors))
        return config

    def conflicts(self, environ: Mapping[str, str]) -> Iterator[str]:
        """Yield an error for each pair of settings in conflict and each invalid proxy."""
        if self.tls_source == "off" and self.require_tls:
            yield ("TLS_SOURCE=off with REQUIRE_TLS=true: logins would be impossible. Set "
                   "TLS_SOURCE=file, or REQUIRE_TLS=false (passwords are then unencrypted)")
        if self.tls_source == "off" and self.smtps_port:
            yield (f"TLS_SOURCE=off with SMTPS_PORT={self.smtps_port}: this port needs "
                   "TLS. Set TLS_SOURCE=file, or SMTPS_PORT=0")
        if self.tls_source == "keyvault" and not (self.azure_key_vault_url
                                                  and self.azure_key_vault_cert_name):
            yield ("TLS_SOURCE=keyvault: needs AZURE_KEY_VAULT_URL and "
                   "AZURE_KEY_VAULT_CERT_NAME")
        if self.must_have_account and not (self.accounts_file or self.azure_tables_url):
            yield ("ACCOUNTS_REQUIRED=true (or AZURE_TABLES_FORCE_USAGE=true): logins "
                   "would be impossible. Set ACCOUNTS_FILE or AZURE_TABLES_URL")
        if self.smtp_port and self.smtp_port == self.smtps_port:
            yield f"SMTP_PORT={self.smtp_port} and SMTPS_PORT={self.smtps_port}: same port"
        if self.max_memory_for_messages < self.size_limit:
            yield (f"MAX_MEMORY_FOR_MESSAGES={self.max_memory_for_messages}: must be at "
                   f"least {self.size_limit}. Or lower MAX_MESSAGE_SIZE")
        needs_proxy = any(url.startswith("https:") for url in self.endpoints)
        for name in ("https_proxy", "HTTPS_PROXY") if needs_proxy else ():
            url = environ.get(name, "").strip()
            if url and not _PROXY.fullmatch(url):
                yield f"{name}={_mask_url(url)!r}: must be http://[user:password@]host:port"


def settings() -> dict[str, Setting]:
    """Return the settings by environment variable, in the order of Config."""
    return {name.upper(): item for name, item in settings_of(Config).items()}


def settings_help() -> str:
    """Return the settings as text for --help."""
    return "\n".join(f"  {name} (default: {item.default or 'empty'})\n      {item.help}"
                     for name, item in settings().items())


# ---------------------------------------------------------------------------
# §3  SMTP grammar
#
# RFC 5321 section 4.1.2, with the UTF-8 of RFC 6531 section 3.3. The relay accepts some
# mistakes of devices, as every server does: spaces may follow "FROM:" and "TO:", a path may
# lack its angle brackets, and the argument of EHLO may be anything. Most constants have the
# name of a production in the RFC.

# The classes list forbidden characters, because compiling the allowed ranges of UTF-8 would
# double the start time. _FORBIDDEN: DEL, C1, line separators, bidi, surrogates.
_FORBIDDEN = "\x7f-\xa0\u2028-\u202e\ud800-\udfff"
_ATOM = rf'[^\x00- "(),.:;<>@\[\\\]{_FORBIDDEN}]+'
_DOT_STRING = rf"{_ATOM}(?:\.{_ATOM})*"
_QUOTED_STRING = rf'"(?:[^\x00-\x1f"\\{_FORBIDDEN}]|\\[ -~])*"'
_LET_DIG = rf"[^\x00-/:-@\[-`{{-~{_FORBIDDEN}]"
_LDH = rf"[^\x00-,./:-@\[-`{{-~{_FORBIDDEN}]"
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
    """Parse "FROM:<path> parameters" into the mailbox ("" for "<>") and the parameters.

    A source route is ignored, RFC 5321 section 4.1.1.3. Raises ProtocolError.
    """
    status, party = ("5.1.7", "sender") if keyword == "FROM:" else ("5.1.3", "recipient")
    if argument[:len(keyword)].upper() != keyword:
        raise ProtocolError(f"Syntax: {keyword}<address>")
    match = _PATH.fullmatch(argument, len(keyword))
    if match is None:
        raise ProtocolError(f"Bad {party} address syntax: use {keyword}<address>, with a "
                            "complete address such as user@example.com", 501, status)
    return (match["mailbox"] or match["bare"] or "",
            _parse_parameters(match["parameters"] or ""))


def normalize_mailbox(mailbox: str) -> str:
    """Drop case and needless quotes, to compare mailboxes, RFC 5321 section 4.1.2."""
    local_part, _, domain = mailbox.rpartition("@")
    if local_part.startswith('"'):
        local_part = re.sub(r"\\(.)", r"\1", local_part[1:-1], flags=re.S)
    # bytes.lower() changes ASCII only. str.lower() makes different letters equal, such as
    # the Kelvin sign and "k", which can be different mailboxes.
    data = f"{local_part}@{domain}".encode("utf-8", "surrogateescape")
    return data.lower().decode("utf-8", "surrogateescape")


def _parse_parameters(text: str) -> dict[str, str | None]:
    """Parse the parameters of MAIL or RCPT, RFC 5321 section 4.1.2."""
    words = list(filter(None, text.split(" ")))
    matches = [match for match in map(_PARAMETER.fullmatch, words) if match]
    parameters = {match[1].upper(): match[2] for match in matches}
    if len(matches) < len(words):
        raise ProtocolError("Syntax error in parameters: use KEYWORD or KEYWORD=value")
    if len(parameters) < len(words):
        raise ProtocolError("Syntax error in parameters: a keyword is repeated")
    return parameters


def decode_base64(text: str) -> bytes:
    """Decode base64 strictly, as RFC 4954 section 4 requires. Raises ProtocolError."""
    if not _BASE64.fullmatch(text):
        raise ProtocolError("Invalid base64 data", 501, "5.5.2")
    return base64.b64decode(text)


# ---------------------------------------------------------------------------
# §4  Accounts
#
# An account says what a device may do, and as which application. A device logs in as
#
#     TENANT@CLIENT      an application; the password is the application's secret
#     NAME               an account of ACCOUNTS_FILE
#     NAME@lookup        the same account, or else an entry of the Azure table
#
# or it needs no login, because an account with "authentication = optional" has its network.
# The most specific network that contains its address decides. require_tls and
# tls_min_version are decided separately, each by the most specific network that sets it.

SCRYPT_COST = 2 ** 15               # N of RFC 7914; the tests lower it
MIN_PREFIX_LENGTH = {4: 8, 6: 7}    # of a network without login: 10.0.0.0/8, fc00::/7
SECRET_KEYS = {"client_secret", "client_secret_file", "credential"}
LIST_KEYS = {"allowed_recipients", "allowed_senders", "networks"}
NETWORK_KEYS = ("require_tls", "tls_min_version")       # they replace a setting
KEY_ALIASES = {"login": "authentication"}               # an older name, still accepted
_HASHED = re.compile(r"scrypt\$[A-Za-z0-9_-]{22}\$[A-Za-z0-9_-]{43}")
_mailbox = _matching(_MAILBOX, "an address such as scanner@example.com")

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
IpAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


@dataclass(frozen=True)
class Application:
    """An application or identity of Entra ID, with its credential."""
    tenant: str
    client: str
    secret: str = field(default="", repr=False)
    credential: str = "secret"      # or managed-identity, workload-identity
    relay_holds_secret: bool = False        # if not, only the device knows the secret


def relay_identity(config: Config) -> Application:
    """Return the relay's own identity in Azure, in DefaultAzureCredential's order."""
    tenant, client = config.azure_tenant_id, config.azure_client_id
    secret = config.azure_client_secret
    if tenant and client and (secret or config.azure_federated_token_file):
        credential = "secret" if secret else "workload-identity"
        return Application(tenant, client, secret, credential, relay_holds_secret=True)
    return Application("", client, "", "managed-identity", relay_holds_secret=True)


def _hash(text: str) -> str:
    if not _HASHED.fullmatch(text):
        raise ValueError("what this prints: python3 smtp_oauth_relay.py hash-password "
                         "(a plain password is not accepted)")
    if not has_scrypt():
        raise ValueError("empty, because this Python has no scrypt")
    return text


def _address_or_domain(text: str) -> str:
    """Parse an item of allowed_recipients or allowed_senders. Raises ValueError."""
    if re.fullmatch(_MAILBOX, text) and "*" not in text:
        return normalize_mailbox(text)
    if not re.fullmatch(_DOMAIN, text):
        raise ValueError("domains and addresses, separated by commas")
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
    """The settings for messages of an account, with the changes that its keys make."""
    sender_from: str
    from_mismatch: str
    header_recipients: str
    from_email: str

    def fixed_sender(self, reverse_path: str) -> str:
        """Return the mailbox that sends, or "" if only the From field can tell."""
        return self.from_email or (reverse_path if self.sender_from == "envelope" else "")


@dataclass(frozen=True)
class Account:
    """What a client may do, and as which application; its settings are keys of the file."""
    name: str = ""                  # "" for TENANT@CLIENT
    tenant_id: str = setting(
        _optional(parse_tenant), "", "Tenant of the application: its ID or a domain.")
    client_id: str = setting(
        _optional(parse_client), "", "ID of the application or user-assigned identity.")
    client_secret: str = setting(str, "", "The application's secret.", _mask_all)
    client_secret_file: str = setting(str, "", "File that contains the secret.")
    credential: str = setting(
        _optional(_choice("managed-identity", "workload-identity")), "",
        "`managed-identity` or `workload-identity` instead of a secret.")
    password: str = setting(
        _optional(_hash), "", "The device's password, as printed by `hash-password`. Leave "
        "it empty if the device's password is the application's secret.", _mask_all)
    from_email: str = setting(
        _optional(_mailbox), "", "Send as this mailbox, whatever sender the device names.")
    allowed_recipients: tuple[str, ...] = setting(
        _list_of(_address_or_domain), "", "Permitted domains and addresses. Empty: all.")
    allowed_senders: tuple[str, ...] = setting(
        _list_of(_address_or_domain), "", "Permitted domains and addresses. Empty: all.")
    networks: tuple[Network, ...] = setting(
        _list_of(_network), "", "Networks that the device must be in. Empty: any.")
    authentication: str = setting(
        _choice("required", "optional"), "required",
        "`optional`: clients in `networks` may send without login. Old name: `login`.")
    require_tls: bool | None = setting(
        _optional(_boolean, None), "", "`REQUIRE_TLS` for `networks`.")
    tls_min_version: str = setting(
        _optional(_tls_version), "", "`TLS_MIN_VERSION` for `networks`.")

    @property
    def has_credential(self) -> bool:
        """Return whether the relay has the credential; else it is the device's password."""
        return bool(self.client_secret or self.client_secret_file or self.credential)

    def as_application(self, password: str = "") -> Application:
        """Return the application of a client that gave this password."""
        secret = self.client_secret if self.has_credential else password
        return Application(self.tenant_id, self.client_id, secret,
                           self.credential or "secret", self.has_credential)

    def as_principal(self, config: Config, password: str = "",
                     username: str = "") -> Principal:
        """Return this account with its application and its options for messages."""
        options = MessageOptions(
            config.sender_from, "rewrite" if self.from_email else config.from_mismatch,
            # Graph delivers to every address in To, so "keep" would let any recipient in.
            "strip" if self.allowed_recipients else config.header_recipients,
            self.from_email)
        return Principal(self, self.as_application(password), options, username)

    @property
    def network_settings(self) -> dict[str, Any]:
        """Return the settings that the account changes for its networks."""
        return {name: getattr(self, name) for name in NETWORK_KEYS
                if getattr(self, name) not in (None, "")}

    def allows_address(self, address: IpAddress | None) -> bool:
        """Return whether a client may log in from an address."""
        return not self.networks or any(address in net for net in self.networks if address)

    def check(self, mailbox: str, key: str, **facts: object) -> None:
        """Raise DeliveryError if `key`, such as allowed_senders, excludes a mailbox."""
        allowed, name = getattr(self, key), normalize_mailbox(mailbox)
        if allowed and name not in allowed and name.rpartition("@")[2] not in allowed:
            action = "send as" if key == "allowed_senders" else "send to"
            raise DeliveryError(f"This account may not {action} {mailbox}; see its {key}",
                                550, "5.7.1", cost=0, facts=facts)

    def conflicts(self, config: Config) -> Iterator[str]:
        """Find keys that conflict with each other or with a setting."""
        if self.credential == "workload-identity" and not config.azure_federated_token_file:
            yield "credential: workload-identity needs AZURE_FEDERATED_TOKEN_FILE"
        for name in ("tenant_id", "client_id"):
            if not getattr(self, name) and self.credential != "managed-identity":
                yield f"{name}: must be set, unless credential = managed-identity"
        if sum(bool(getattr(self, name)) for name in SECRET_KEYS) > 1:
            yield "set one of client_secret, client_secret_file, credential"
        if self.password and not self.has_credential:
            yield "password: needs client_secret, client_secret_file or credential"
        if self.authentication == "required" and self.has_credential and not self.password:
            yield ("password: must be set, otherwise anyone could log in; or set "
                   "authentication = optional")
        if self.authentication == "optional":
            if not self.has_credential:
                yield "authentication: optional needs a secret or credential"
            if not self.networks:
                yield "authentication: optional needs networks"
            for network in self.networks:
                if network.prefixlen < MIN_PREFIX_LENGTH[network.version]:
                    yield (f"networks: {network} without login is an open relay, because "
                           "anyone could send as you; name the network of the devices")
        for name in () if self.networks else self.network_settings:
            yield f"{name}: needs networks, because it applies to them only"
        if self.require_tls and config.tls_source == "off":
            yield "require_tls: true needs a certificate; see TLS_SOURCE"


class Principal(NamedTuple):
    """A client that may send: its account, application and options for messages."""
    account: Account
    application: Application
    options: MessageOptions
    username: str = ""      # "" for a client that did not log in

    def check_reverse_path(self, mailbox: str) -> None:
        """Check MAIL FROM, unless From decides: see sender(). Raises DeliveryError."""
        if mailbox and self.options.fixed_sender(mailbox):
            self.account.check(mailbox, "allowed_senders")

    def sender(self, reverse_path: str, from_mailboxes: list[str]) -> str:
        """Decide which mailbox sends a message. Raises DeliveryError."""
        mailbox = self.options.fixed_sender(reverse_path)
        if not mailbox:
            mailbox = [*from_mailboxes, reverse_path][0]
            if not mailbox:
                raise DeliveryError("MAIL FROM:<> needs a From field with the mailbox to "
                                    "send from", 550, "5.1.7", cost=0)
            self.account.check(mailbox, "allowed_senders", sender=mailbox)
        return mailbox


class ClientPolicy(NamedTuple):
    """The rules for a client, chosen by its address."""
    anonymous: Principal | None     # the principal without login; None: login is required
    require_tls: bool
    tls_min_version: str


class Accounts:
    """The accounts of a file, by user name and by network."""

    def __init__(self, accounts: Iterable[Account] = ()) -> None:
        self._by_name = {account.name.casefold(): account for account in accounts}
        self.by_network: dict[Network, list[Account]] = {}
        for account in self:
            for network in account.networks:
                self.by_network.setdefault(network, []).append(account)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._by_name.values())

    def find(self, name: str) -> Account | None:
        """Return the account with a user name; case does not matter."""
        return self._by_name.get(name.casefold())

    def match_address(self, address: IpAddress | None, config: Config) -> ClientPolicy:
        """Return the policy for a client by its address."""
        anonymous: Account | None = None
        values = {name: getattr(config, name) for name in NETWORK_KEYS}
        networks = [net for net in self.by_network if address and address in net]
        for network in sorted(networks, key=lambda network: network.prefixlen):
            # The most specific network comes last, so that it overrides the others.
            accounts = self.by_network[network]
            anonymous = next((account for account in accounts
                              if account.authentication == "optional"), None)
            for account in accounts:
                values.update(account.network_settings)
        return ClientPolicy(anonymous.as_principal(config) if anonymous else None, **values)


def parse_ip_address(text: str) -> IpAddress | None:
    """Parse a client's IP address without its zone; IPv4 in IPv6 becomes IPv4."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_accounts(text: str, config: Config) -> tuple[list[Account], list[str]]:
    """Parse an accounts file; return accounts and errors, or conflicts if no errors."""
    # DEFAULT is parsed like the other sections, so that its errors are reported once.
    parser = configparser.RawConfigParser(default_section="", delimiters=("=",),
                                          inline_comment_prefixes=(";", "#"))
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
    accounts = [_make_account(*item, defaults, config) for item in sections.items()]
    if not sections:
        errors.append("the file contains no account")
    return accounts, errors or list(_account_conflicts(accounts, config))


def _syntax_errors(error: configparser.Error) -> Iterator[str]:
    """Report invalid lines by number, because the error's own text may show a secret."""
    option = re.sub("(?s).*[^a-z_].*", "***", getattr(error, "option", None) or "")
    if option or isinstance(error, configparser.DuplicateSectionError):
        where = f"[{getattr(error, 'section', '')}] {option}".strip()
        yield f"line {getattr(error, 'lineno', '?')}: {where} appears twice"
        return
    for number, _ in getattr(error, "errors", None) or [(getattr(error, "lineno", "?"), 0)]:
        yield f"line {number}: must be [section], key = value or a comment"


def _parse_section(section: str, pairs: Iterable[tuple[str, str]],
                   errors: list[str]) -> dict[str, Any]:
    """Parse the valid keys of a section, and append the errors of the others."""
    keys = settings_of(Account)
    values: dict[str, Any] = {}
    for name, text in pairs:
        key, where = KEY_ALIASES.get(name, name), f"[{section}] {name}"
        if key not in keys:
            shown = name if re.fullmatch("[a-z_]{1,40}", name) else "***"
            errors.append(f"[{section}] {shown}: unknown key")
        elif key in values:
            errors.append(f"[{section}] {key}: appears twice, also under its old name")
        elif "\n" in text and ("=" in text or key not in LIST_KEYS):
            errors.append(f"{where}: continues on an indented line; do not indent keys")
        else:
            try:
                values[key] = keys[key].parse(text or keys[key].default)
            except ValueError as error:
                errors.append(f"{where} = {keys[key].show(text)}: must be {error}")
    return values


def _make_account(name: str, values: Mapping[str, Any], defaults: Mapping[str, Any],
                  config: Config) -> Account:
    """Merge a section with the defaults; any secret in it replaces all default secrets."""
    if SECRET_KEYS & values.keys():
        defaults = {key: defaults[key] for key in defaults.keys() - SECRET_KEYS}
    merged = {**defaults, **values}
    if merged.get("credential") == "workload-identity":
        merged["tenant_id"] = merged.get("tenant_id") or config.azure_tenant_id
        merged["client_id"] = merged.get("client_id") or config.azure_client_id
    return Account(name, **merged)


def _account_conflicts(accounts: list[Account], config: Config) -> Iterator[str]:
    """Find conflicts within an account and between accounts."""
    for account in accounts:
        yield from (f"[{account.name}] {text}" for text in account.conflicts(config))
    names = collections.Counter(account.name.casefold() for account in accounts)
    yield from (f"[{account.name}] appears twice; case does not matter"
                for account in accounts if names[account.name.casefold()] > 1)
    for network, sharing in Accounts(accounts).by_network.items():
        sections = " and ".join(f"[{account.name}]" for account in sharing)
        if sum(account.authentication == "optional" for account in sharing) > 1:
            yield f"{sections} networks: both claim {network} without login"
        for name in NETWORK_KEYS:
            values = {account.network_settings.get(name) for account in sharing}
            if len(values - {None}) > 1:
                yield f"{sections} {name}: must be the same, because both have {network}"


@functools.lru_cache
def has_scrypt() -> bool:
    """Return whether hashlib has scrypt: LibreSSL lacks it, and FIPS mode forbids it."""
    try:
        return bool(hash_password("", bytes(16)))
    except (AttributeError, ValueError):
        return False


def hash_password(password: str, salt: bytes) -> str:
    """Hash a password with a salt of 16 bytes: scrypt, RFC 7914, r=8, p=1."""
    digest = hashlib.scrypt(password.encode(), salt=salt, n=SCRYPT_COST, r=8, p=1,
                            maxmem=2 ** 26, dklen=32)
    return "$".join(["scrypt", *(base64.urlsafe_b64encode(part).decode().rstrip("=")
                                 for part in (salt, digest))])


def verify_password(password: str, hashed: str) -> bool:
    """Compare a password with a hash in constant time."""
    if not has_scrypt():
        return False                    # without scrypt no account has a hash
    salt = base64.urlsafe_b64decode(hashed.split("$")[1] + "==")
    return hmac.compare_digest(hash_password(password, salt), hashed)


def lookup_name(username: str, delimiter: str) -> str | None:
    """Return NAME of NAME@lookup, or of NAME@lookup.local for devices that want a dot."""
    match = re.fullmatch(rf"(.+){re.escape(delimiter)}lookup(?:\..*)?", username,
                         re.I | re.S)
    return match[1] if match else None


def parse_username(username: str, delimiter: str) -> tuple[str, str]:
    """Split "tenant@client" into tenant and client, in all their forms. Raises AuthError.

    Text after a dot in the client is ignored: some devices require an e-mail address.
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
#     receive(data)       passes bytes from the network, b"" at the end of the stream
#     next_event()        asks what to do next; None means: read more
#     output()            takes the replies that are ready
#
# and answers each event but Close: StartTls by tls_started(), Authenticate by
# authenticated() or refuse(), Deliver by delivered() or refuse(). Until then further input
# waits. next_event() processes all input up to an event, so that the replies to pipelined
# commands leave together (RFC 2920 section 3.2).
#
#     CONNECTED --EHLO--> READY --MAIL--> MAIL --RCPT--> RCPT --DATA--> (content)
#         ^                 ^---------------RSET, EHLO, end of content------'
#         '---- STARTTLS: what was said before does not count any more
#
# Phase says which commands are in order, and COMMANDS has a row for each of them. The next
# input goes to the current reader (`_read`): a command, a response to AUTH, or content.

MAX_COMMAND = 2048              # bytes with CRLF; RFC 5321 section 4.5.3.1.4 wants 512
MAX_AUTH = 12288                # bytes with CRLF, RFC 4954 section 4
MAX_COST = 100                  # sum of Reply.cost since the last accepted login or message
PROGRESS_BYTES = 65536          # bytes of a message that count as progress of the client

_END_OF_DATA = b"\r\n.\r\n"
_CLIENT_HELLO = b"\x16\x03"     # a TLS record: handshake, version 3.x
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
HTTP_VERBS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST",
                        "PUT", "TRACE"})


class Phase(enum.Enum):
    """The phase of a session; replies to commands out of order quote the value."""
    CONNECTED = "before EHLO"
    READY = "between messages"
    MAIL = "after MAIL"
    RCPT = "after RCPT"


@dataclass
class Envelope:
    """The SMTP envelope of a message, with the message itself (RFC 5321 section 2.3.1)."""
    reverse_path: str
    recipients: dict[str, str] = field(default_factory=dict)    # by normalized mailbox
    message: bytes | bytearray = field(default=b"", repr=False)
    allow_utf8: bool = False    # MAIL had the parameter SMTPUTF8


class StartTls(NamedTuple):
    """Send the output, then do the handshake."""


@dataclass(frozen=True)
class Authenticate:
    """Check a user name and a password."""
    username: str
    password: str = field(repr=False)


class Deliver(NamedTuple):
    """Deliver a message; its lines end in CRLF, and dot-stuffing is undone."""
    envelope: Envelope


class Close(NamedTuple):
    """Send the output and close the connection; `reason` is for the log."""
    reason: str


Event = Union[StartTls, Authenticate, Deliver, Close]


class MemoryBudget:
    """The memory for all messages in flight, in bytes; `free` is what is left of it."""

    def __init__(self, limit: int) -> None:
        self.free = limit

    def reserve(self, size: int) -> None:
        """Reserve bytes. Raises TemporaryError if there are too few."""
        self.check(size)
        self.free -= size

    def release(self, size: int) -> None:
        """Return reserved bytes."""
        self.free += size

    def check(self, size: int) -> None:
        """Raise TemporaryError if fewer bytes are free."""
        if size > self.free:
            # RFC 5321's text for 452.
            raise TemporaryError("Insufficient system storage; try again later", 452,
                                 "4.3.1", cost=0)


class Session:
    """An SMTP server's side of a session, without I/O.

    RFC 5321, 1870 SIZE, 2034 ENHANCEDSTATUSCODES, 2920 PIPELINING, 3207 STARTTLS,
    4954 AUTH, 6152 8BITMIME, 6531 SMTPUTF8.
    """

    def __init__(self, config: Config, name: str, policy: ClientPolicy | None = None,
                 memory: MemoryBudget | None = None,
                 on_line: Callable[[str, object], None] = lambda mark, line: None,
                 on_refusal: Callable[[RelayError], None] = lambda error: None) -> None:
        # `on_line` gets each command ("<") and reply (">") for the debug log.
        # `on_refusal` gets each error of the client that is not the same as the last error.
        self._config = config
        self._name = name               # of the server
        self._policy = policy or Accounts().match_address(None, config)
        self._memory = memory or MemoryBudget(config.max_memory_for_messages)
        self._on_line = on_line
        self._on_refusal = on_refusal
        self.secure = False
        self.principal = self._policy.anonymous         # None until a login is accepted
        self.holds_message = False      # content arrives, or waits for its delivery
        self._phase = Phase.CONNECTED
        self._read: Callable[[], bool] | None = self._read_command     # None: wait
        self._event: Event | None = None
        self._buffer = bytearray()      # received and not yet processed
        self._eof = False
        self._output: list[bytes] = []
        self._commands = 0
        self._content_bytes = 0         # of all messages
        self._cost = 0                  # toward MAX_COST
        self._last_refusal: Reply | None = None
        self._envelope = Envelope("")
        self._content = bytearray()     # of a message; its size is reserved in _memory
        self._skip = 0                  # bytes before it: the CRLF that _data() inserted
        self._refusal: RelayError | None = None         # if set, content is discarded
        self._mechanism = ""
        self._responses: list[bytes] = []               # to AUTH challenges

    def greet(self) -> None:
        """Send the greeting. RFC 5321 section 4.2: the domain comes first."""
        self._send(Reply(220, "", f"{self._name} ESMTP {self._config.server_greeting}"))

    def receive(self, data: bytes) -> None:
        """Append bytes from the client; b"" means that the client will send no more."""
        self._buffer += data
        self._eof = not data

    def next_event(self) -> Event | None:
        """Process the input; return what the caller must do, or None to read more."""
        while self._event is None and self._read and self._read():
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
        """Return a number that grows with each command and each 64 KiB of a message."""
        return self._commands + self._content_bytes // PROGRESS_BYTES

    def end(self, reply: Reply, reason: str) -> None:
        """Send a final reply and close; `reason` is for the log."""
        self._send(reply)
        self._close(reason)

    def reset(self) -> None:
        """Discard the current message, if any."""
        self._memory.release(len(self._content))
        self._content = bytearray()
        self._envelope = Envelope("")
        self.holds_message = False
        if self._phase is not Phase.CONNECTED:
            self._phase = Phase.READY

    def tls_started(self) -> None:
        """Continue under TLS. RFC 3207 section 4.2: forget all that came in the clear."""
        self.secure = True
        self.principal = self._policy.anonymous
        self._phase = Phase.CONNECTED
        self._buffer.clear()
        self._resume()

    def authenticated(self, principal: Principal) -> None:
        """Continue after an accepted login."""
        self.principal = principal
        self._cost = 0
        self._resume(Reply(235, "2.7.0", "Authentication successful"))

    def delivered(self, text: str) -> None:
        """Continue after an accepted message; `text` is that of the reply."""
        self._cost = 0
        self._resume(Reply(250, "2.0.0", text))

    def refuse(self, reply: Reply) -> None:
        """Continue after a refused login or message."""
        self._resume(reply)

    # Readers: process one unit of the input; return False if it is incomplete.

    def _read_command(self) -> bool:
        if self._buffer.startswith(_CLIENT_HELLO) and not (self.secure or self._commands):
            self._close("the client starts with TLS: set it to STARTTLS, or to the port of "
                        "SMTPS_PORT")
            return False
        is_auth = self._buffer[:5].upper() == b"AUTH "
        return self._read_line(self._command, MAX_AUTH if is_auth else MAX_COMMAND)

    def _read_line(self, handler: Callable[[str], Reply | None], limit: int) -> bool:
        """Pass a line to a handler; only CRLF ends a line, RFC 5321 section 2.3.8."""
        end = self._buffer.find(b"\r\n")
        if end + 2 > limit or (end < 0 and len(self._buffer) > limit):
            # The next bytes may be the rest of the line, so they cannot be a command.
            status = "5.5.6" if limit == MAX_AUTH else "5.5.2"
            self.end(Reply(500, status, "Line too long"), "a line is too long")
            return False
        if end < 0:
            if self._eof:
                self._close("the client closed the connection")
            return False
        line = self._buffer[:end].decode("utf-8", "surrogateescape")
        del self._buffer[:end + 2]
        self._commands += 1
        try:
            if _CONTROLS.search(line):
                raise ProtocolError("A command must end in CRLF and contain no control "
                                    "characters", 500, "5.5.2")
            reply = handler(line)
        except RelayError as error:
            self._read = self._read_command         # an error ends the AUTH exchange
            reply = self._log_refusal(error)
        if reply:
            self._reply(reply)
        return True

    def _read_content(self) -> bool:
        """Process the content that has arrived; only CRLF . CRLF ends it."""
        end = self._buffer.find(_END_OF_DATA)
        # A suffix that may begin the end mark stays in the buffer, a lone CR too. So no
        # CRLF is split between two parts, and _with_crlf() sees whole line ends.
        partial = (n for n in (4, 3, 2, 1) if self._buffer.endswith(_END_OF_DATA[:n]))
        cut = end + 2 if end >= 0 else len(self._buffer) - next(partial, 0)
        # The client doubles a dot at the start of a line, RFC 5321 section 4.5.2.
        part = self._buffer[:cut].replace(b"\r\n.", b"\r\n")
        del self._buffer[:cut]
        self._content_bytes += cut
        if part and not self._refusal:
            self._store_content(_with_crlf(part[self._skip:]))
            self._skip = 0
        if end < 0:
            if self._eof:
                self._close("the client closed the connection within a message")
            return False
        del self._buffer[:3]
        if self._refusal:
            self._resume(self._log_refusal(self._refusal))
        else:
            self._envelope.message = self._content      # no copy, because it may be large
            self._emit(Deliver(self._envelope))
        return True

    def _store_content(self, part: bytearray) -> None:
        """Append a part of the content, or decide to refuse the message."""
        try:
            self._check_size(len(self._content) + len(part))
            self._memory.reserve(len(part))
            self._content += part
        except RelayError as error:
            self._memory.release(len(self._content))
            self._content = bytearray()
            self._refusal = error

    def _check_size(self, size: int) -> None:
        config, limit = self._config, self._config.size_limit
        if size > limit:
            cause = "" if limit == config.max_message_size else " (LARGE_MESSAGES=refuse)"
            raise DeliveryError("Message size exceeds fixed maximum message size: the "
                                f"limit is {limit} bytes{cause}", 552, "5.3.4")

    # Commands, in the order of RFC 5321 section 4.1.1.

    def _ehlo(self, argument: str) -> Reply:
        # Devices send any argument, and RFC 5321 section 4.1.4 forbids refusing
        # it. RFC 2034 wants no enhanced status code in this reply.
        self._helo(argument)
        return Reply(250, "", "\n".join([
            self._name, f"SIZE {self._config.size_limit}", "PIPELINING", "8BITMIME",
            "SMTPUTF8", "ENHANCEDSTATUSCODES", *["STARTTLS"] * self._offers_tls(),
            *["AUTH PLAIN LOGIN"] * (self.secure or not self._policy.require_tls), "HELP"]))

    def _helo(self, argument: str) -> Reply:
        self.reset()
        self._phase = Phase.READY
        return Reply(250, "", self._name)

    def _mail(self, argument: str) -> Reply:
        assert self.principal is not None       # COMMANDS requires a login
        mailbox, parameters = parse_path(argument, "FROM:")
        for name, value in parameters.items():
            if name not in MAIL_PARAMETERS:
                raise ProtocolError("Unsupported parameter of MAIL", 555, "5.5.4")
            if not re.fullmatch(MAIL_PARAMETERS[name], value or "", re.I):
                raise ProtocolError(f"Invalid value of {name}")
        self._envelope = Envelope(mailbox, allow_utf8="SMTPUTF8" in parameters)
        self._check_ascii(mailbox)
        self.principal.check_reverse_path(mailbox)
        size = int(parameters.get("SIZE") or 0)
        self._check_size(size)
        self._memory.check(size)
        self._phase = Phase.MAIL
        return Reply(250, "2.1.0", "Sender ok")

    def _check_ascii(self, mailbox: str) -> None:
        if not self._envelope.allow_utf8 and not mailbox.isascii():
            raise ProtocolError("This address requires MAIL with SMTPUTF8", 553, "5.6.7")

    def _rcpt(self, argument: str) -> Reply:
        assert self.principal is not None       # MAIL requires a login
        mailbox, parameters = parse_path(argument, "TO:")
        if parameters:
            raise ProtocolError("RCPT has no parameters here", 555, "5.5.4")
        if not mailbox:
            raise ProtocolError("A recipient must have an address", 501, "5.1.3")
        self._check_ascii(mailbox)
        self.principal.account.check(mailbox, "allowed_recipients")
        recipients = self._envelope.recipients
        key = normalize_mailbox(mailbox)
        if key not in recipients and len(recipients) >= self._config.max_recipients:
            raise DeliveryError("Too many recipients; send the rest in another message",
                                452, "4.5.3", cost=0)
        recipients.setdefault(key, mailbox)
        self._phase = Phase.RCPT
        return Reply(250, "2.1.5", "Recipient ok", cost=0)

    def _data(self, argument: str) -> Reply:
        # The CRLF of this command can begin the end mark: an empty message is only a dot.
        self._buffer[:0] = b"\r\n"
        self._skip = 2      # _read_content() drops these two bytes again
        self._refusal = None
        self.holds_message = True
        self._read = self._read_content
        return Reply(354, "", "Start mail input; end with <CRLF>.<CRLF>", cost=0)

    def _rset(self, argument: str) -> Reply:
        self.reset()
        return Reply(250, "2.0.0", "Ok")

    def _help(self, argument: str) -> Reply:
        return Reply(214, "2.0.0", "Commands: " + " ".join(COMMANDS))

    def _quit(self, argument: str) -> None:
        self.end(Reply(221, "2.0.0", "Bye"), "quit")

    def _starttls(self, argument: str) -> Reply:
        if self.secure:
            raise ProtocolError("TLS already active", 503, "5.5.1")
        if not self._offers_tls():
            raise ProtocolError("Command not implemented: no TLS here", 502, "5.5.1")
        self._emit(StartTls())
        return Reply(220, "2.0.0", "Ready to start TLS", cost=0)

    def _auth(self, argument: str) -> Reply | None:
        if self.principal and self.principal.username:
            raise ProtocolError("Already authenticated", 503, "5.5.1")
        self._mechanism, _, initial = argument.partition(" ")
        self._mechanism = self._mechanism.upper()
        if self._mechanism not in AUTH_CHALLENGES:
            raise ProtocolError("Unrecognized authentication type; use PLAIN or LOGIN", 504,
                                "5.5.4")
        self._responses = []
        self._read = functools.partial(self._read_line, self._auth_response, MAX_AUTH)
        if initial:     # "=" is an empty response, RFC 4954 section 4
            return self._auth_response("" if initial == "=" else initial)
        return self._challenge()

    def _auth_response(self, text: str) -> Reply | None:
        if text == "*":
            raise ProtocolError("Authentication cancelled", 501, "5.7.0")
        self._responses.append(decode_base64(text))
        if len(self._responses) < len(AUTH_CHALLENGES[self._mechanism]):
            return self._challenge()
        self._emit(self._credentials())
        return None

    def _challenge(self) -> Reply:
        challenge = AUTH_CHALLENGES[self._mechanism][len(self._responses)]
        return Reply(334, "", base64.b64encode(challenge).decode(), cost=0)

    def _credentials(self) -> Authenticate:
        """Parse the responses: PLAIN (RFC 4616 section 2), or LOGIN (an Internet-Draft)."""
        responses, self._responses = self._responses, []
        authorization = b""
        if self._mechanism == "PLAIN":
            if responses[0].count(b"\0") != 2:
                raise ProtocolError("PLAIN needs three parts", 501, "5.5.2")
            authorization, *responses = responses[0].split(b"\0")
        if authorization not in (b"", responses[0]):
            raise ProtocolError("Acting for another user is not supported", 501, "5.7.0")
        # The next error must not refer to the suppressed one, which has the password.
        with contextlib.suppress(UnicodeDecodeError):
            return Authenticate(responses[0].decode(), responses[1].decode())
        raise ProtocolError("User name and password must be UTF-8", 501, "5.5.2")

    def _command(self, line: str) -> Reply | None:
        """Execute a command, if the columns of COMMANDS allow it now."""
        verb, _, argument = line.rstrip(" \t").partition(" ")
        verb = verb.upper() if verb.isascii() else verb     # U+017F would become an S
        # A line that is no command may be a password that came at the wrong time.
        self._on_line("<", "AUTH ***" if verb == "AUTH" else line if verb in COMMANDS else
                      f"*** ({len(line)} characters, no command)")
        if verb in HTTP_VERBS:
            self.end(Reply(421, "4.7.0", "This is SMTP, not HTTP"), "HTTP")
            return None
        if verb not in COMMANDS:
            raise ProtocolError("Command not recognized", 500, "5.5.1")
        command = COMMANDS[verb]
        if command.secure and self._policy.require_tls and not self.secure:
            # The first sentence is RFC 3207's own text.
            raise ProtocolError("Must issue a STARTTLS command first", 530, "5.7.0")
        if command.login and not self.principal:
            raise ProtocolError("Authentication required", 530, "5.7.0")
        if self._phase not in command.phases:
            raise ProtocolError("Bad sequence of commands: not allowed "
                                f"{self._phase.value}", 503, "5.5.1")
        if command.argument not in (None, bool(argument)):
            need = "required" if command.argument else "not allowed"
            raise ProtocolError(f"Syntax error: an argument is {need}")
        handler = command.handler
        return handler if isinstance(handler, Reply) else handler(self, argument)

    def _offers_tls(self) -> bool:
        return not self.secure and self._config.tls_source != "off"

    def _send(self, reply: Reply) -> None:
        self._on_line(">", reply)
        self._output.append(bytes(reply))

    def _log_refusal(self, error: RelayError) -> Reply:
        """Report an error, unless it is the same as the last one; return its reply."""
        if error.reply != self._last_refusal:
            self._last_refusal = error.reply
            self._on_refusal(error)
        return error.reply

    def _reply(self, reply: Reply) -> None:
        """Send a reply. End a session that makes no progress."""
        self._send(reply)
        self._cost += reply.cost
        if reply.close:
            self._close(str(reply))
        elif self._cost >= MAX_COST:
            self.end(Reply(421, "4.7.0", "Too many commands or errors without an accepted "
                           "login or message"), "no progress")

    def _emit(self, event: Event) -> None:
        """Pass an event to the caller, and wait for the answer."""
        self._event = event
        self._read = None

    def _resume(self, reply: Reply | None = None) -> None:
        """Read the next command."""
        self._read = self._read_command
        self.reset()
        if reply:
            self._reply(reply)

    def _close(self, reason: str) -> None:
        self.reset()
        self._emit(Close(reason))


def _with_crlf(part: bytearray) -> bytearray:
    """End each line with CRLF; Exchange would drop a lone CR or LF from the text."""
    if part.count(b"\r\n") == part.count(b"\r") == part.count(b"\n"):
        return part
    return part.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")


class Command(NamedTuple):
    """A row of COMMANDS; `argument`: True required, False forbidden, None optional."""
    handler: Callable[[Session, str], Reply | None] | Reply
    phases: tuple[Phase, ...] = tuple(Phase)
    argument: bool | None = None
    secure: bool = False        # only under TLS, if the policy requires it
    login: bool = False         # only after a login, or for an anonymous client


COMMANDS: Mapping[str, Command] = {
    "EHLO":     Command(Session._ehlo, argument=True),
    "HELO":     Command(Session._helo, argument=True),
    "STARTTLS": Command(Session._starttls, (Phase.READY,), argument=False),
    "AUTH":     Command(Session._auth, (Phase.READY,), argument=True, secure=True),
    "MAIL":     Command(Session._mail, (Phase.READY,), argument=True, secure=True,
                        login=True),
    "RCPT":     Command(Session._rcpt, (Phase.MAIL, Phase.RCPT), argument=True),
    "DATA":     Command(Session._data, (Phase.RCPT,), argument=False),
    "RSET":     Command(Session._rset, argument=False),
    "VRFY":     Command(Reply(252, "2.5.0", "Cannot VRFY user, but will accept message and "
                                            "attempt delivery"), argument=True),
    "EXPN":     Command(Reply(502, "5.5.1", "Command not implemented", cost=10)),
    "HELP":     Command(Session._help),
    "NOOP":     Command(Reply(250, "2.0.0", "Ok")),
    "QUIT":     Command(Session._quit, argument=False)}

MAIL_PARAMETERS: Mapping[str, str] = {      # a pattern for the value
    "SIZE":     "[0-9]{1,20}",              # RFC 1870 section 3
    "BODY":     "7BIT|8BITMIME",
    "SMTPUTF8": "",
    "AUTH":     ".+"}                       # ignored, RFC 4954 section 5

AUTH_CHALLENGES: Mapping[str, tuple[bytes, ...]] = {
    "PLAIN": (b"",),
    "LOGIN": (b"Username:", b"Password:")}      # devices compare them letter by letter


# ---------------------------------------------------------------------------
# §6  Message headers
#
# Graph has no envelope: it delivers to the addresses in To, Cc and Bcc. With
# HEADER_RECIPIENTS=strip the relay makes these name the recipients of the envelope, and
# nobody else. With "keep" it only adds the missing recipients.
#
#     an address field that              becomes
#     names recipients only              itself, byte for byte; ";" becomes ","
#     names other addresses too          itself without them: they go to X-Original-To, -Cc
#     is ambiguous                       X-Original-To or -Cc as a whole
#     is a Bcc                           part of a single Bcc, if there is a recipient
#                                        that no field names: Bcc gets it
#
# A field is ambiguous if it is not in a form that all programs read alike. If the relay and
# Exchange read it differently, the message could reach a stranger. If the header has a
# malformed line, Bcc gets all recipients, because a strict reader may stop there.
#
# Graph sends from the mailbox in the request's URL, and refuses another mailbox in From
# without the permission Send As. The relay adds a missing or empty From. If From names
# another mailbox, several or none, FROM_MISMATCH decides:
#
#     keep        From stays, and Microsoft decides.
#     rewrite     From gets the mailbox and keeps the display name. The old address may go
#                 to Reply-To. A From of several addresses or none is X-Original-From too.
#
# A display name with a bare "@" is quoted, because Exchange takes it for an address.
# Resent-Bcc and an mbox line before the header are removed, a missing empty line is added.
# All else stays byte for byte. The body is never copied, because it can have 150 MB.

# A URL at the start of a line is text: no name of an address field begins like that.
_FIELD = re.compile(rb"((?!https?://|ftp://)[!-9;-~]+)[ \t]*:", re.I)
# Text can look like fields ("Time: 12:00"), so a header must have one of these.
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
_QUOTED_TEXT = re.compile(f"{_QUOTED}?")    # the closing quote can be missing
# The forms of an address that all programs read alike: [name] <mailbox> or mailbox, each
# with or without a comment. `alias` is a name that is itself an address, without quotes.
_ADDRESS = re.compile(
    rf"(?P<before>(?:(?P<alias>{_MAILBOX})[ \t]*"
    rf'|(?:{_QUOTED}|[^"(),:;<>@\[\]\\])*)<[ \t]*)?'
    rf"(?P<mailbox>{_MAILBOX})"
    r"(?P<after>(?(before)[ \t]*>)(?:[ \t\r\n]*\([^()@\\\r\n]*\))?)"
    r"[ \t\r\n]*(?P<end>[,;]|\Z)[, \t\r\n]*")
_GROUP = re.compile(r"[\w .-]*\w:(?:(.*);)?", re.S | re.A)
_ENCODED_WORD = r"=\?[^?\s]{1,75}\?[bq]\?[^?]*\?="
# A From field that is not an address list: name <mailbox>, text (name), or a name alone.
_LOOSE_FROM = re.compile(r"(?P<name>[^<>]*)<(?P<mailbox>[^<>]*)>[^<>]*"
                         r"|[^()<>]*\((?P<comment>[^()<>]*)\)\s*|(?P<alone>[^<>]*)")
# Top-level domains not on the Internet: RFC 6761, RFC 6762, RFC 8375, usual local names.
_LOCAL_DOMAINS = frozenset({"arpa", "corp", "example", "home", "internal", "invalid", "lan",
                            "local", "localdomain", "localhost", "test"})

BASE64_CHUNK = 58_368           # bytes, a multiple of 3: only the last chunk has padding
MAX_HEADER = 1_048_576          # bytes
MAX_ADDRESSES = 262_144         # bytes of a field; 500 mailboxes need 160,000
MAX_HEADER_LINES = 10_000


@dataclass
class Field:
    """A header field with its folded lines. A malformed line has the name b""."""
    name: bytes             # in lower case
    raw: bytes              # as received, with the last CRLF
    replacement: bytes      # as sent

    @property
    def label(self) -> bytes:
        """The name as the client wrote it."""
        return self.raw.partition(b":")[0].rstrip()

    @property
    def value(self) -> str:
        """The text after the colon; bytes that are not UTF-8 become surrogates."""
        return self.raw.partition(b":")[2].decode("utf-8", "surrogateescape")


class Address(NamedTuple):
    """An address of a field as the client wrote it: `before`, `mailbox`, `after`."""
    key: str                # the normalized mailbox; "" if that of a From is unreadable
    mailbox: str
    before: str             # display name and "<"
    after: str              # ">" and comment

    def __str__(self) -> str:
        return f"{self.before}{self.mailbox}{self.after}"


class AddressList(NamedTuple):
    """The addresses of a field; empty if the field is ambiguous."""
    addresses: list[Address]
    is_canonical: bool = True       # separated by commas
    is_ambiguous: bool = False      # other programs can read it differently


@dataclass
class Header:
    """The header of a message or of a body part."""
    fields: list[Field]
    end: int                # offset of the rest: an empty line, or else text
    is_malformed: bool      # a line is not a field, or has white space before the colon
    # New fields come first, because a strict reader may stop at a malformed line.
    top: list[bytes] = field(default_factory=list)

    def find(self, *names: bytes) -> list[Field]:
        """Return the fields with one of the names, in their order."""
        return [item for item in self.fields if item.name in names]

    def __bytes__(self) -> bytes:
        lines = [item.replacement for item in self.fields]
        # At the very top a new field would take in a first line that begins with a space.
        first = int(bool(lines) and lines[0][:1] in (b" ", b"\t"))
        return b"".join([*lines[:first], *self.top, *lines[first:]])


def split_header(message: bytes | bytearray, begin: int = 0,
                 end: int | None = None) -> Header:
    """Split the header of a message, or of a part of it, into fields. Raises DeliveryError.

    Lines end in CRLF. A malformed line does not end the header, because a lenient reader
    would go on after it. Lines between the last field and the empty line are text.
    """
    end = len(message) if end is None else end
    limit = min(end, begin + MAX_HEADER)
    position = header_end = begin
    is_header = False
    while line := _FOLDED_LINE.match(message, position, limit):
        match = _FIELD.match(message, position, limit)
        position = line.end()
        if match:
            header_end = position
            is_header = is_header or bool(_KNOWN_FIELD.fullmatch(match[1]))
    header_end = header_end if is_header else begin
    if header_end == position and limit < end and not message.startswith(b"\r\n", position):
        raise DeliveryError("Header size exceeds fixed maximum size (1 MB)", 552, "5.3.4")
    if message.count(b"\n", begin, header_end) > MAX_HEADER_LINES:
        raise DeliveryError("The header has too many lines", 552, "5.3.4")
    fields, is_malformed = [], False
    for line in _FOLDED_LINE.finditer(message, begin, header_end):
        match = _FIELD.match(line[0])
        is_malformed = is_malformed or not match or match[0] != match[1] + b":"
        fields.append(Field(match[1].lower() if match else b"", line[0], line[0]))
    return Header(fields, header_end, is_malformed)


def _parse_addresses(field: Field) -> AddressList:
    """Parse an address list, RFC 5322 section 3.4; ";" counts as ",".

    A field is ambiguous unless it is a list in the forms of _ADDRESS, or a single group of
    them. Its addresses do not count as named, so the recipients are in Bcc.
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
        # A reader may take an unquoted name for the address, so both must be the same.
        if alias and normalize_mailbox(alias) != key:
            return ambiguous
        before = "<" if alias else match["before"] or ""
        addresses.append(Address(key, match["mailbox"], before, match["after"]))
        is_canonical = is_canonical and match["end"] != ";"
        position = match.end()
    return AddressList(addresses, is_canonical)


def _address_field(name: bytes, addresses: Iterable[Address | str]) -> bytes:
    """Write each address on a line, below 998 characters, RFC 5322 section 2.1.1."""
    value = ",\r\n ".join(map(str, addresses)).encode("utf-8", "surrogateescape")
    return name + b": " + value + b"\r\n"


def edit_recipients(header: Header, recipients: Mapping[str, str],
                    header_recipients: str) -> None:
    """Make To, Cc and Bcc name the envelope's recipients, as HEADER_RECIPIENTS says."""
    # Resent-Bcc names hidden recipients, RFC 5322 section 3.6.6.
    for header_field in header.find(b"resent-bcc"):
        header_field.replacement = b""
    lists = [(field, _parse_addresses(field)) for field in header.find(*_ADDRESS_FIELDS)]
    keeps_others = header_recipients == "keep"
    # With "keep" a field with ";" is not rewritten, and some programs do not split there.
    named = {address.key for _, parsed in lists if parsed.is_canonical or not keeps_others
             for address in parsed.addresses if not header.is_malformed}
    if not keeps_others:
        for header_field, parsed in lists:
            header_field.replacement = _strip_unlisted(header_field, parsed, recipients)
    missing = [mailbox for key, mailbox in recipients.items() if key not in named]
    if not missing:
        return
    hidden: list[Address] = []          # RFC 5322 section 3.6 allows a single Bcc
    for header_field, parsed in lists:
        if header_field.name == b"bcc" and not parsed.is_ambiguous:
            header_field.replacement = b""
            hidden += [address for address in parsed.addresses if (
                address.key in named if address.key in recipients else keeps_others)]
    header.top.append(_address_field(b"Bcc", [*hidden, *missing]))


def _strip_unlisted(field: Field, parsed: AddressList,
                    recipients: Mapping[str, str]) -> bytes:
    """Return a field without the addresses that are not recipients (table above)."""
    if parsed.is_ambiguous:
        return b"" if field.name == b"bcc" else b"X-Original-" + field.raw
    kept = [address for address in parsed.addresses if address.key in recipients]
    others = [address for address in parsed.addresses if address.key not in recipients]
    if parsed.is_canonical and not others:
        return field.raw
    lines = _address_field(field.label, kept) if kept else b""
    if others and field.name != b"bcc":
        lines += _address_field(b"X-Original-" + field.label, others)
    return lines


def _parse_from(field: Field) -> list[Address]:
    """Parse From or Reply-To in any form, which is safe: Graph does not deliver there."""
    parsed = _parse_addresses(field)
    if not parsed.is_ambiguous:
        return parsed.addresses
    is_small = len(field.raw) <= MAX_ADDRESSES
    match = _LOOSE_FROM.fullmatch(field.value.replace("\r\n", "")) if is_small else None
    mailbox = (match["mailbox"] or "").strip() if match else ""
    name = match["name"] or match["comment"] or match["alone"] or "" if match else ""
    name = re.sub(f"[{_WHITESPACE}]+", " ", _NOT_TEXT.sub("", name)).strip()
    name = name if re.fullmatch(_QUOTED, name) else _quote_name(name)
    key = normalize_mailbox(mailbox) if re.fullmatch(_MAILBOX, mailbox) else ""
    return [Address(key, mailbox if key else "", f"{name} <".lstrip(), ">")]


def edit_from(header: Header, fields: list[tuple[Field, list[Address]]], mailbox: str,
              principal: Principal) -> None:
    """Make From agree with the sending mailbox, as FROM_MISMATCH says."""
    if not any(authors for _, authors in fields):
        for header_field, _ in fields:
            header_field.replacement = b""
        header.top.append(_address_field(b"From", [mailbox]))
        return
    key = normalize_mailbox(mailbox)
    agrees = all(author.key == key for _, authors in fields for author in authors)
    if principal.options.from_mismatch == "rewrite" and not agrees:
        _rewrite_from(header, fields, mailbox, principal.username)
        return
    for header_field, authors in fields:
        names = _QUOTED_TEXT.sub("", header_field.value.replace("\r\n", ""))
        if names.count("@") > len(authors) and all(author.key for author in authors):
            # _parse_from has put the name in quotes.
            header_field.replacement = _address_field(header_field.label, authors)


def _rewrite_from(header: Header, fields: list[tuple[Field, list[Address]]], mailbox: str,
                  login: str) -> None:
    """Replace the From address; move the old one to Reply-To if it looks deliverable."""
    (first, authors), *others = fields
    author = authors[0]._replace(mailbox=mailbox) if authors else mailbox
    first.replacement = _address_field(first.label, [author])
    old = {author.key: author.mailbox for _, listed in fields for author in listed
           if _is_deliverable(author.mailbox, login)}
    if old.keys() - {normalize_mailbox(mailbox)} and not header.find(b"reply-to"):
        first.replacement += _address_field(b"Reply-To", list(old.values()))
    if len(authors) != 1 or not authors[0].key:
        first.replacement += b"X-Original-" + first.raw
    for header_field, _ in others:
        header_field.replacement = b"X-Original-" + header_field.raw


def _is_deliverable(mailbox: str, login: str) -> bool:
    """Return whether a reply can arrive: not at a device's login or at @printer."""
    domain = mailbox.rpartition("@")[2].lower()
    top = domain.rpartition(".")[2]
    return ("." in domain and not domain.endswith("]") and not top.isdigit()
            and top not in _LOCAL_DOMAINS and mailbox.lower() != login.lower())


def _quote_name(name: str) -> str:
    """Quote a display name, but not its encoded words, which RFC 2047 section 5 forbids."""
    words = re.split(rf"((?:(?<= )|^){_ENCODED_WORD}(?=[ ,;:]|$))", name, flags=re.I)
    return " ".join(word if number % 2 else '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'
                    for number, word in enumerate(map(str.strip, words)) if word)


@dataclass(frozen=True)
class EditedMessage:
    """A message to be sent by `mailbox`, with its new header."""
    mailbox: str
    original_header: bytes = field(repr=False)      # as received
    header: bytes = field(repr=False)               # as sent
    body: memoryview = field(repr=False)    # with the empty line if `header` lacks it

    @property
    def size(self) -> int:
        """The size in bytes."""
        return len(self.header) + len(self.body)

    def as_base64(self) -> Iterator[bytes]:
        """Encode the message for sendMail, chunk by chunk."""
        begin = BASE64_CHUNK - len(self.header) % 3
        yield base64.b64encode(self.header + bytes(self.body[:begin]))
        for start in range(begin, len(self.body), BASE64_CHUNK):
            yield base64.b64encode(self.body[start:start + BASE64_CHUNK])


def edit_message(envelope: Envelope, principal: Principal) -> EditedMessage:
    """Edit the header of a message. Raises DeliveryError."""
    message = envelope.message
    mbox_line = _MBOX_LINE.match(message)
    header = split_header(message, mbox_line.end() if mbox_line else 0)
    fields = [(field, _parse_from(field)) for field in header.find(b"from")]
    named = [item.mailbox for _, authors in fields for item in authors if item.mailbox]
    mailbox = principal.sender(envelope.reverse_path, named)
    edit_from(header, fields, mailbox, principal)
    edit_recipients(header, envelope.recipients, principal.options.header_recipients)
    edited, body = bytes(header), memoryview(message)[header.end:]
    if len(edited) > MAX_HEADER:
        raise DeliveryError("Header size exceeds fixed maximum size (1 MB)", 552, "5.3.4")
    if bytes(body[:2]) != b"\r\n" and (body or not header.fields):
        edited += b"\r\n"
    return EditedMessage(mailbox, bytes(message[:header.end]), edited, body)


# ---------------------------------------------------------------------------
# §7  Large messages
#
# A message that is too large for one request is sent as a draft: its text as JSON, its
# attachments in further requests (Microsoft, "Attach large files to Outlook messages or
# events"). A draft cannot hold the structure of MIME. The relay therefore refuses a message
# that would lose its meaning.
#
#     a body part that is                            becomes
#     the first text/plain or text/html              the body of the draft
#     another form of that text in multipart/        nothing, because Exchange generates it;
#     alternative                                    text/html is preferred as the body
#     anything else, including further text          an attachment; it is inline if the body
#                                                    refers to its Content-ID
#     signed, encrypted, an invitation ...           552 5.3.4
#
# Text in an unknown charset or encoding is decoded with the most likely one. Parts are
# decoded in chunks while they are sent, because the email package would need four times the
# size of the message as extra memory, and a second of processor time for 35 MB.

LARGE_ATTACHMENT = 3_130_000    # bytes; smaller files fit into one request with their JSON,
                                # and an upload session needs at least 2,097,152
UPLOAD_CHUNK = 3_932_160        # bytes before decoding; the limit of Graph is 4 MB
MAX_PARTS = 250                 # in a message, the limit of Exchange
MAX_DEPTH = 10                  # levels of parts within parts
MAX_VALUE = 4096                # characters of a field of a part; the standard library is
MAX_PARAMETERS = 100            # slow with more characters or parameters, so ignore them
MAX_ENCODED_WORDS = 500         # in a field; more stay encoded, for the same reason
MAX_X_FIELDS = 5                # in a draft, the limit of Graph
MAX_FILE_NAME = 255             # characters

_NOT_BASE64 = re.sub(b"[A-Za-z0-9+/=]", b"", bytes(range(256)))
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MEDIA_TYPE = re.compile(r"\s*([\w.+-]{1,127})\s*/\s*([\w.+-]{1,127})", re.A)
_META_CHARSET = re.compile(rb"<meta[^>]{1,200}charset=[\"']?([\w-]{1,40})", re.I)
_ENCODED_WORDS = re.compile(rf"{_ENCODED_WORD}(?:\s*{_ENCODED_WORD})*", re.I)
_X_FIELD = re.compile(rb"x-(?!ms-exchange-)[a-z0-9-]+")

# Media type of a part that a draft cannot hold -> the reason, for NotConvertible.
UNSUPPORTED_TYPES: Mapping[str, str] = {
    "multipart/signed": "is signed", "multipart/encrypted": "is encrypted",
    "multipart/report": "is a report", "application/pgp-encrypted": "is encrypted",
    "multipart/digest": "is a digest", "text/calendar": "is a calendar invitation",
    "application/pkcs7-mime": "is signed or encrypted",
    "application/x-pkcs7-mime": "is signed or encrypted",
    "application/ms-tnef": "is in Outlook's own format",
    "message/partial": "is a part of another message",
    "message/external-body": "has an attachment that is stored elsewhere"}
# These types are supported as an attachment: a signed invoice, a date to save.
SUPPORTED_AS_FILE = ("application/pkcs7-mime", "application/x-pkcs7-mime", "text/calendar")
IMPORTANCE = {"high": "high", "urgent": "high", "1": "high", "2": "high",
              "normal": "normal", "low": "low", "non-urgent": "low", "4": "low", "5": "low"}
# Codec name in Python -> the codec to use. Mail programs use the first five names for more
# than their standard defines. The last two codecs need quadratic time.
CHARSETS = {"ascii": "utf-8", "iso8859-1": "cp1252", "gb2312": "gb18030",
            "shift-jis": "cp932", "euc-kr": "cp949", "punycode": "utf-8", "idna": "utf-8"}
# Like "replace", but written in Python: some codecs need seconds for 8 MB of errors, and
# the interpreter can switch to other threads meanwhile.
codecs.register_error("relay.replace",
                      lambda error: ("\ufffd", error.end))  # type: ignore[attr-defined]


class NotConvertible(DeliveryError):
    """A message that no draft holds without loss; `why` is a clause such as "is signed"."""

    def __init__(self, why: str) -> None:
        super().__init__("Message size exceeds fixed limit: a message above 3 MB cannot be "
                         f"sent in parts if it {why}", 552, "5.3.4")


@dataclass(frozen=True)
class Part:
    """A body part of a message: the bytes from `begin` to `end`, without its header."""
    message: bytes | bytearray = field(repr=False)
    begin: int
    end: int
    media_type: str             # in lower case
    parameters: Mapping[str, str]           # of Content-Type
    is_attachment: bool         # Content-Disposition says so
    file_name: str
    content_id: str
    encoding: str

    @property
    def is_displayed_text(self) -> bool:
        """Return whether the part is text to be displayed, in any format."""
        return (self.media_type.startswith("text/")
                and not self.is_attachment and not self.file_name)

    @property
    def is_text(self) -> bool:
        """Return whether the part can be the body of a draft."""
        return self.media_type in ("text/plain", "text/html") and self.is_displayed_text

    def iter_decoded(self) -> Iterator[bytes]:
        """Decode the part in chunks below 4 MB. Raises NotConvertible."""
        if self.encoding == "base64":
            return _decode_mime_base64(self._chunks())
        if self.encoding == "quoted-printable":
            return map(binascii.a2b_qp, self._chunks())
        if self.encoding in ("7bit", "8bit", "binary") or self.is_displayed_text:
            return self._chunks()
        raise NotConvertible("has a part in an unknown encoding")

    def _chunks(self) -> Iterator[bytes]:
        """Yield the encoded part in chunks that do not end within an encoded character."""
        begin, data = self.begin, memoryview(self.message)
        while begin < self.end:
            end = min(begin + UPLOAD_CHUNK, self.end)
            if end < self.end:
                line_end = self.message.rfind(b"\n", begin, end)
                equals = self.message.rfind(b"=", end - 2, end)
                end = line_end + 1 if line_end >= 0 else equals if equals >= 0 else end
            yield bytes(data[begin:end])
            begin = end


def _decode_mime_base64(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decode base64 in chunks. Raises NotConvertible."""
    # Bytes outside the alphabet are ignored, RFC 2045 section 6.8. Data after the padding
    # is an error, because programs differ in what they make of it.
    rest, is_ended = b"", False
    for chunk in itertools.chain(chunks, [b"="]):       # the padding can be missing
        data, padding, after = chunk.translate(None, _NOT_BASE64).partition(b"=")
        if (is_ended and data) or after.strip(b"="):
            raise NotConvertible("has an attachment with data after its end")
        is_ended = is_ended or bool(padding)
        data = rest + data
        cut = len(data) if is_ended else len(data) // 4 * 4
        if cut % 4 == 1:
            raise NotConvertible("has an attachment that is truncated")
        yield binascii.a2b_base64(data[:cut] + b"=" * (-cut % 4))
        rest = data[cut:]


class Attachment(NamedTuple):
    """A file of a draft. `content_id` is "" unless the body of the draft refers to it."""
    name: str
    part: Part
    content_id: str
    size: int               # bytes

    @property
    def is_large(self) -> bool:
        """Return whether the file needs an upload session."""
        return self.size >= LARGE_ATTACHMENT

    def properties(self) -> dict[str, Any]:
        """Return the properties that Graph needs, without the content."""
        inline = {"isInline": True, "contentId": self.content_id} if self.content_id else {}
        return {"name": self.name, "contentType": self.part.media_type, **inline}

    def as_json(self) -> bytes:
        """Encode a small file as a fileAttachment of Graph."""
        content = base64.b64encode(b"".join(self.part.iter_decoded())).decode()
        return json.dumps({"@odata.type": "#microsoft.graph.fileAttachment",
                           **self.properties(), "contentBytes": content}).encode()


class Draft(NamedTuple):
    """A message resource of Graph as JSON, and its attachments."""
    content: bytes
    attachments: list[Attachment]


class PreparedMessage(NamedTuple):
    """A message for Graph: a single request, or a draft if it is too large for that."""
    edited: EditedMessage
    draft: Draft | None = None


def prepare_message(envelope: Envelope, principal: Principal,
                    config: Config) -> PreparedMessage:
    """Edit and convert the message of a client for Graph. Raises DeliveryError."""
    edited = edit_message(envelope, principal)
    if edited.size <= GRAPH_MESSAGE_LIMIT:
        return PreparedMessage(edited)
    if config.large_messages == "refuse":
        raise DeliveryError(
            f"Message size exceeds fixed limit: {edited.size} bytes with added fields, the "
            f"limit is {GRAPH_MESSAGE_LIMIT} (LARGE_MESSAGES=refuse)", 552, "5.3.4")
    return PreparedMessage(edited, make_draft(envelope.message, edited))


def make_draft(message: bytes | bytearray, edited: EditedMessage) -> Draft:
    """Convert a message with an edited header to a draft. Raises DeliveryError."""
    header = split_header(edited.header)
    part = _parse_part(header, message, len(edited.original_header), len(message))
    leaves = _leaf_parts(part, itertools.count())
    text = _body_part(leaves)
    body = _decode_body(text) if text else ""
    is_html = text is not None and text.media_type == "text/html"
    html = body.lower() if is_html else ""
    # Encode the two separately: a str that holds an emoji has four bytes per character.
    content, properties = (
        json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        for value in (body, _draft_properties(header, edited.mailbox)))
    if any(len(field.raw) > MAX_ADDRESSES for field in header.find(*_ADDRESS_FIELDS)):
        raise NotConvertible("has too many recipients")     # or they would be lost here
    content = b'{"body": {"contentType": "%b", "content": %b}, %b' % (
        b"HTML" if is_html else b"Text", content, properties[1:])
    if len(content) > GRAPH_REQUEST_LIMIT:
        raise NotConvertible("has a text that is too large by itself")
    # A new object does not use the types in files of the system, which differ.
    types = mimetypes.MimeTypes()
    attachments = []
    for number, part in enumerate((leaf for leaf in leaves if leaf is not text), 1):
        suffix = types.guess_extension(part.media_type) or ".bin"
        # A URL without quotes ends at a space or a ")".
        reference = rf"cid:{re.escape(part.content_id.lower())}(?:[\"'<>&\s)]|$)"
        content_id = part.content_id if re.search(reference, html) else ""
        name = part.file_name or f"ATT{number:05}{suffix}"      # as Exchange names it
        size = sum(map(len, part.iter_decoded()))
        attachments.append(Attachment(name, part, content_id, size))
    return Draft(content, attachments)


def _parse_part(header: Header, message: bytes | bytearray, begin: int, end: int) -> Part:
    """Parse the header of the part between `begin` and `end`, RFC 2045, 2183 and 2231."""
    if message.startswith(b"\r\n", begin, end):
        begin += 2      # the empty line after the header
    fields = email.message.Message()
    for header_field in header.find(b"content-type", b"content-disposition", b"content-id",
                                    b"content-transfer-encoding"):
        values = _unfold(header_field)[:MAX_VALUE].split(";")[:MAX_PARAMETERS]
        fields[header_field.name.decode()] = ";".join(values)
    encoding = _first_word(fields.get("content-transfer-encoding", "") or "7bit")
    parameters = _parameters(fields, "content-type")
    name = (_parameters(fields, "content-disposition").get("filename")
            or parameters.get("name", ""))
    name = _decode_header_text(name, "_")[-MAX_FILE_NAME:].encode(errors="replace").decode()
    match = _MEDIA_TYPE.match(fields.get("content-type", "") or "text/plain")
    unknown = "application/octet-stream" if encoding == "base64" else "text/plain"
    media_type = f"{match[1]}/{match[2]}".lower() if match else unknown
    return Part(message, begin, end, media_type, parameters,
                _first_word(fields.get("content-disposition", "")) == "attachment", name,
                fields.get("content-id", "").strip(" \t<>"), encoding)


def _first_word(value: str) -> str:
    """Return the first word of a value, in lower case."""
    return str(re.findall(r"\W*([\w.-]*)", value, re.A)[0]).lower()


def _parameters(fields: email.message.Message, name: str) -> dict[str, str]:
    """Parse the parameters of a field; those of RFC 2231 come last and take precedence."""
    parameters = {}
    # The standard library raises these for malformed RFC 2231.
    with contextlib.suppress(ValueError, TypeError, LookupError):
        for key, value in fields.get_params([], name):
            if isinstance(value, tuple):    # charset, language, bytes as latin-1
                value = decode_text(value[2].encode("latin-1", "replace"), value[0] or "")
            parameters[key] = value     # get_params() returns the key in lower case
    return parameters


def _leaf_parts(part: Part, counter: Iterator[int], depth: int = 0) -> list[Part]:
    """List text and files of a part. `counter` counts parts. Raises NotConvertible."""
    _check_supported(part, depth)
    if next(counter) > MAX_PARTS or depth > MAX_DEPTH:
        raise NotConvertible("has too many parts")
    if not part.media_type.startswith("multipart/"):
        is_empty = (part.end - part.begin < 1000
                    and not part.message[part.begin:part.end].strip())
        return [] if is_empty and part.is_text else [part]
    children: list[list[Part]] = []         # the leaves of each child
    for begin, end in _split_parts(part):
        # The last field can share its CRLF with the next delimiter.
        header = split_header(part.message, begin, min(end + 2, part.end))
        child = _parse_part(header, part.message, min(header.end, end), end)
        children.append(_leaf_parts(child, counter, depth + 1))
    if not children:
        raise NotConvertible("has parts that cannot be told apart")
    leaves = list(itertools.chain(*children))
    texts = [text for text in map(_body_part, children) if text]
    if part.media_type == "multipart/alternative" and texts:
        best = ([text for text in texts if text.media_type == "text/html"] or texts)[-1]
        others = texts + [child[0] for child in children
                          if len(child) == 1 and child[0].is_displayed_text]
        leaves = [best] + [leaf for leaf in leaves if leaf not in others]
    return leaves


def _check_supported(part: Part, depth: int) -> None:
    """Raise NotConvertible for a part whose type a draft cannot hold."""
    is_file = (depth > 0 and part.is_attachment and "method" not in part.parameters
               and part.media_type in SUPPORTED_AS_FILE)
    if part.media_type in UNSUPPORTED_TYPES and not is_file:
        raise NotConvertible(UNSUPPORTED_TYPES[part.media_type])
    if depth == 0 and part.file_name.lower().endswith((".p7m", ".p7z")):
        raise NotConvertible("is signed or encrypted")       # RFC 8551 section 3.9


def _body_part(leaves: list[Part]) -> Part | None:
    """Return the first part that can be the body of a draft."""
    return next((part for part in leaves if part.is_text), None)


def _split_parts(part: Part) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of each part of a multipart, RFC 2046 section 5.1.1."""
    boundary = part.parameters.get("boundary", "").encode("utf-8", "replace")
    if not boundary:
        return
    # The lookahead leaves the CRLF, because it can also begin the next delimiter.
    delimiter = re.compile(rb"\r\n--%b(--)?[ \t]*(?=\r\n|\Z)" % re.escape(boundary))
    begin = part.end + 1                # before the first delimiter there is no part
    for match in delimiter.finditer(part.message, max(0, part.begin - 2), part.end):
        if begin <= part.end:
            yield begin, match.start()
        if match[1]:
            return
        begin = match.end() + 2
    if begin <= part.end:               # the last delimiter is missing
        yield begin, part.end


def _decode_body(part: Part) -> str:
    """Decode the text of a draft. Raises NotConvertible."""
    charset = part.parameters.get("charset", "").strip()
    data = bytearray()
    for chunk in part.iter_decoded():
        data += chunk
        if len(data) > 2 * GRAPH_REQUEST_LIMIT:     # UTF-16 has two bytes for a character
            raise NotConvertible("has a text that is too large by itself")
    if not charset and part.media_type == "text/html":
        match = _META_CHARSET.search(data, 0, 1024)
        charset = match[1].decode() if match else ""
    return decode_text(data, charset)


def decode_text(data: bytes | bytearray, charset: str = "") -> str:
    """Decode text; guess if the charset is missing, unknown or wrong."""
    codec = "utf-8"
    with contextlib.suppress(LookupError, ValueError):
        b" ".decode(charset[:40], "replace")        # fails for a codec that is not for text
        codec = codecs.lookup(charset[:40]).name.replace("_", "-")
    codec = CHARSETS.get(codec, codec)
    # Malformed ISO-2022-JP is ASCII and therefore valid UTF-8, but it would be unreadable.
    for name in (codec,) if codec.startswith("iso2022") else (codec, "utf-8"):
        with contextlib.suppress(ValueError):
            return data.decode(name)
    text = data.decode(codec, "relay.replace")
    if codec == "utf-8" and not re.search("[^\x00-\x7f\ufffd]", text):
        return data.decode("cp1252", "relay.replace")       # no character was valid UTF-8
    return text


def _unfold(field: Field) -> str:
    """Return the value of a field on one line, RFC 5322 section 2.2.3."""
    return decode_text(field.raw.partition(b":")[2].replace(b"\r\n", b"")).strip()


def _decode_header_text(text: str, control: str = " ") -> str:
    """Decode the encoded words of a value, RFC 2047, and replace control characters."""
    if text.count("=?") <= MAX_ENCODED_WORDS:
        text = _ENCODED_WORDS.sub(_decode_words, text)
    return _CONTROL.sub(control, text.strip()).strip()


def _decode_words(match: re.Match[str]) -> str:
    """Decode a sequence of encoded words, because a character can span two of them."""
    with contextlib.suppress(ValueError, TypeError, email.errors.MessageError):
        return "".join(decode_text(data, charset or "")
                       for data, charset in email.header.decode_header(match[0]))
    return match[0]


def _draft_properties(header: Header, mailbox: str) -> dict[str, Any]:
    """Return the header as properties of a Graph message; other fields are lost."""
    # Addresses of repeated fields are joined; of other repeated fields the first counts.
    def people(name: bytes) -> list[dict[str, Any]]:
        delivers = name in _ADDRESS_FIELDS      # so Graph must read it as the relay does
        return [_recipient_json(address) for field in header.find(name) for address in (
            _parse_addresses(field).addresses if delivers else _parse_from(field))
            if address.key]

    first: dict[bytes, Field] = {}
    for header_field in header.fields:
        first.setdefault(header_field.name, header_field)
    values = {name: _decode_header_text(_unfold(field)) for name, field in first.items()}
    importance = (IMPORTANCE.get(_first_word(values.get(name, ""))) for name in (
        b"importance", b"x-priority", b"priority", b"x-msmail-priority"))
    properties = {
        "subject": values.get(b"subject"),
        "from": [*people(b"from"), {"emailAddress": {"address": mailbox}}][0],
        "toRecipients": people(b"to"), "ccRecipients": people(b"cc"),
        "bccRecipients": people(b"bcc"), "replyTo": people(b"reply-to"),
        "importance": next(filter(None, importance), None),
        "internetMessageId": values.get(b"message-id"),
        "internetMessageHeaders": [
            {"name": first[name].label.decode(), "value": value}
            for name, value in values.items() if value and _X_FIELD.fullmatch(name)
        ][:MAX_X_FIELDS]}
    return {name: value for name, value in properties.items() if value}


def _recipient_json(address: Address) -> dict[str, Any]:
    """Return an address as a recipient resource of Graph; a comment can be the name."""
    name = address.before.rstrip("< \t\r\n") or address.after.strip(">() \t\r\n")
    name = _QUOTED_TEXT.sub(lambda match: email.utils.unquote(match[0]), name)
    name = _decode_header_text(decode_text(
        " ".join(name.split()).encode("utf-8", "surrogateescape")))
    mailbox = address.mailbox.encode("utf-8", "replace").decode()
    return {"emailAddress": {"address": mailbox, **({"name": name} if name else {})}}


# ---------------------------------------------------------------------------
# §8  Microsoft's responses
#
# HTTP requests and responses as data, and the tables that decide what a response means:
#
#     Entra ID, managed identity   parse_token    the token, or the reply to the client
#     Microsoft Graph              graph_error    the reply to the client
#     Azure Tables                 parse_entity   the entity of an account
#
# Responses are untrusted: every parser here has a defined result for malformed input.
# A reply uses the wording of an RFC or of Exchange, if there is one, then names a remedy.

MAX_RESPONSE_BODY = 65_536      # bytes, so that a response cannot fill the memory
EXPIRY_MARGIN = 300             # seconds, as in Microsoft's own libraries
MAX_TOKEN_LIFETIME = 86_400     # seconds

# The body of a request, or a function that returns it, as a whole or in chunks.
Body = Union[bytes, Callable[[], Union[bytes, Iterator[bytes]]]]


@dataclass(frozen=True)
class HttpRequest:
    """An HTTP request. If `body` is a function, each attempt calls it in its thread."""
    method: str
    url: str = field(repr=False)            # can hold a secret
    headers: Mapping[str, str] = field(repr=False)
    body: Body = field(default=b"", repr=False)
    max_bytes: int = MAX_RESPONSE_BODY      # of the response's body; the rest is not read


@dataclass(frozen=True)
class HttpResponse:
    """An HTTP response. Header names are in lower case; the body can be truncated."""
    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object; anything else becomes an empty dict."""
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(self.body), dict):
                return value
        return {}

    def retry_after(self, now: float) -> float | None:
        """Return the seconds to wait from `now` (Unix time), or None; RFC 9110 10.2.3."""
        text = self.headers.get("retry-after", "").strip()
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            return float(text)
        with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
            date = email.utils.parsedate_to_datetime(text)
            if date.tzinfo is None:     # the zone "-0000", which means UTC
                date = date.replace(tzinfo=datetime.timezone.utc)
            return max(0.0, date.timestamp() - now)
        return None


def _string(values: object, name: str) -> str:
    """Return the string of that name in a JSON object, or ""."""
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, str) else ""


def _number(value: object) -> float:
    """Return a number, which can be given as text; anything else becomes 0."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(number := float(value)):       # type: ignore[arg-type]
            return number
    return 0.0


# Errors of Entra ID that say nothing about the credential, by error and by AADSTS number.
TRANSIENT_ENTRA_ERRORS = {"temporarily_unavailable", "server_error"}
TRANSIENT_AADSTS = {50033, 50196, 90006, 90012, 90024, 90033, 90041, 90055, 90090, 90091}

# AADSTS number -> error and remedy; the reply puts the number before them. Microsoft,
# "Microsoft Entra authentication and authorization error codes".
AADSTS_REMEDIES: Mapping[int, str] = {
    7000215: "invalid client secret; enter the secret's value, not its ID",
    7000222: "the client secret has expired; create a new one in Entra, App registrations",
    7000216: "the client secret is missing; enter it as the password",
    7000218: "the client secret is missing; enter it as the password",
    700016: "application not found in the tenant; check the client ID in the user name",
    90002: "tenant not found; check the tenant ID in the user name, and the cloud",
    900023: "tenant not found; check the tenant ID in the user name",
    7000112: "the application is disabled; enable it in Entra, Enterprise applications",
    53003: "blocked by Conditional Access; allow the relay's IP address in the policy",
    70011: "invalid scope; check GRAPH_ENDPOINT",
    500011: "Graph not found in the tenant; check GRAPH_ENDPOINT",
    90038: "the tenant is in another national cloud; check AZURE_AUTHORITY_HOST"}


def parse_token(response: HttpResponse, secret: str, now: float) -> tuple[str, float]:
    """Return the access token, and the seconds from `now` (Unix time) until its renewal.

    Removes `secret` from the text that is logged. Raises AuthError if the credential is
    refused, and TemporaryError for every other response.
    """
    data = response.json()
    token = data.get("access_token")
    if response.status == 200 and isinstance(token, str) and re.fullmatch("[!-~]+", token):
        # App Service sends expires_on only, a Unix time.
        lifetime = _number(data.get("expires_in")) or _number(data.get("expires_on")) - now
        return token, min(max(lifetime - EXPIRY_MARGIN, 0.0), MAX_TOKEN_LIFETIME)
    error, text = _string(data, "error"), _string(data, "error_description")
    match = re.match("AADSTS([0-9]{1,9})", text)
    code = int(match[1]) if match else 0
    if response.status >= 400 and not error:    # below 400 the body can hold half a token
        text = response.body.decode("utf-8", "replace")
    for form in filter(None, (secret, urllib.parse.quote_plus(secret))):
        text = text.replace(form, "***")
    facts = {"status": response.status, "aadsts": code or None, "error": error or None,
             "said": text or None}
    if (400 <= response.status < 500 and response.status != 429 and error
            and error not in TRANSIENT_ENTRA_ERRORS and code not in TRANSIENT_AADSTS):
        remedy = AADSTS_REMEDIES.get(code, "Entra ID refused the application; see the log")
        raise AuthError(f"AADSTS{code}: {remedy}" if code else f"{error}: {remedy}",
                        facts=facts, level=logging.WARNING)
    raise TemporaryError("Microsoft Entra ID did not issue a token; try again later", 451,
                         "4.7.0", facts=facts)


def parse_tenant_id(token: str) -> str:
    """Return a token's tenant ID, or "". Use it as a key only: no format is guaranteed."""
    with contextlib.suppress(LookupError, TypeError, ValueError, RecursionError):
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        return decode_uuid(claims["tid"]) or ""
    return ""


class AccessDenied(DeliveryError):
    """No access, or no such mailbox: final for a client, but the queue retries it."""


class GraphFailure(NamedTuple):
    """An error to raise; {mailbox} in the text becomes the mailbox that sends."""
    error: type[RelayError]
    code: int
    status: str
    text: str
    cost: int = 1


_ACCESS_DENIED = GraphFailure(
    AccessDenied, 550, "5.7.1", "Client does not have permissions to send as this sender; "
    "grant the application the permission Mail.Send for {mailbox} (takes up to 2 hours)", 0)
_MAILBOX_NOT_FOUND = GraphFailure(
    AccessDenied, 550, "5.1.8", "Sender address rejected: Microsoft 365 has no mailbox "
    "{mailbox}; check the sender address", 0)
_UPLOAD_DENIED = GraphFailure(
    AccessDenied, 552, "5.3.4", "Message size exceeds 3 MB; grant the application the "
    "permission Mail.ReadWrite for {mailbox} (takes up to 2 hours)")
_TOO_LARGE = GraphFailure(DeliveryError, 552, "5.3.4",
                          "Message too big for Microsoft 365; make it smaller")
_MAILBOX_FULL = GraphFailure(TemporaryError, 452, "4.2.2",
                             "Mailbox full; delete messages from {mailbox}", 0)
_SERVICE_ERROR = GraphFailure(TemporaryError, 451, "4.3.0",
                              "Temporary error of Microsoft 365; try again later")
_THROTTLED = GraphFailure(TemporaryError, 451, "4.4.5",
                          "Microsoft 365 is throttling requests; try again later")
_MESSAGE_REFUSED = GraphFailure(DeliveryError, 554, "5.6.0",
                                "Invalid message content; see graph= in the log")
_UNKNOWN_RESPONSE = GraphFailure(DeliveryError, 554, "5.3.0",
                                 "Unknown response from Microsoft 365; see the log")

# Graph's error code decides for the statuses 400 to 499 except 401 and 429. _TOO_LARGE and
# _MAILBOX_FULL decide for 500 and above, too. Otherwise the status decides.
GRAPH_CODES: Mapping[str, GraphFailure] = {
    "erroraccessdenied": _ACCESS_DENIED,
    "errorsendasdenied": GraphFailure(
        DeliveryError, 550, "5.7.60", "Client does not have permissions to send as this "
        "sender; set the From address to {mailbox} in the device, or set "
        "FROM_MISMATCH=rewrite", 0),
    **dict.fromkeys(("errorinvaliduser", "resourcenotfound", "errornonexistentmailbox",
                     "mailboxnotenabledforrestapi", "mailboxnothostedinexchangeonline"),
                    _MAILBOX_NOT_FOUND),
    "errorinvalidrecipients": GraphFailure(
        DeliveryError, 550, "5.1.3", "Bad recipient address for Microsoft 365", 0),
    "errormessagesizeexceeded": _TOO_LARGE, "errorquotaexceeded": _MAILBOX_FULL,
    "erroritemnotfound": _SERVICE_ERROR}    # the draft has disappeared
GRAPH_STATUSES: Mapping[int, GraphFailure] = {
    401: GraphFailure(TemporaryError, 451, "4.7.0",
                      "Microsoft 365 did not accept the token; try again later"),
    403: _ACCESS_DENIED, 404: _MAILBOX_NOT_FOUND,
    408: _SERVICE_ERROR,        # the request arrived too slowly, RFC 9110 section 15.5.9
    413: _TOO_LARGE, 429: _THROTTLED, 507: _MAILBOX_FULL}


class GraphOperation(enum.Enum):
    """An operation of Graph: its description and the statuses that mean success."""

    # The descriptions make the values differ; an Enum makes aliases of equal values.
    SEND = "send a message", 202
    CREATE = "create a draft", 200, 201
    ATTACH = "change the draft", 200, 201, 204
    UPLOAD = "upload a chunk", 200, 201, 202    # without a token: the URL is authorized
    SEND_DRAFT = "send the draft", 202
    DELETE = "delete the draft", 200, 204, 404


def graph_error(response: HttpResponse, mailbox: str,
                operation: GraphOperation = GraphOperation.SEND) -> RelayError:
    """Return the error for a response whose status is not a success of `operation`."""
    status, code = response.status, _string(response.json().get("error"), "code")
    failure = GRAPH_STATUSES.get(status, _SERVICE_ERROR if status >= 500 else
                                 _MESSAGE_REFUSED if status >= 400 else _UNKNOWN_RESPONSE)
    by_code = GRAPH_CODES.get(code.lower(), failure)
    if (400 <= status < 500 and status not in (401, 429)) or (
            status >= 500 and by_code in (_TOO_LARGE, _MAILBOX_FULL)):
        failure = by_code
    if failure is _ACCESS_DENIED and operation in (
            GraphOperation.CREATE, GraphOperation.ATTACH, GraphOperation.DELETE):
        failure = _UPLOAD_DENIED        # Mail.Send is not enough for these
    # Later operations concern a draft, so the mailbox existed a moment ago.
    if failure is _MAILBOX_NOT_FOUND and operation not in (GraphOperation.SEND,
                                                           GraphOperation.CREATE):
        failure = _SERVICE_ERROR
    # Graph itself has authorized the upload, so other errors are not the application's.
    if operation is GraphOperation.UPLOAD and failure not in (_TOO_LARGE, _MAILBOX_FULL,
                                                              _THROTTLED):
        failure = _SERVICE_ERROR
    return failure.error(
        failure.text.format(mailbox=mailbox), failure.code, failure.status,
        cost=failure.cost, level=logging.ERROR if failure is _UNKNOWN_RESPONSE else
        logging.WARNING, facts={"status": status, "graph": code or None,
                                "request_id": response.headers.get("request-id")})


def parse_draft_id(response: HttpResponse) -> str:
    """Return the ID of a new draft, or ""."""
    draft_id = _string(response.json(), "id")
    return draft_id if re.fullmatch("[!-~]{1,2000}", draft_id) else ""


def parse_upload_url(response: HttpResponse) -> str:
    """Return the confidential URL of a new upload session, or "" if it is not safe."""
    url = str(response.json().get("uploadUrl"))
    return url if split_url(url) else ""


def parse_next_range(response: HttpResponse) -> int | None:
    """Return the offset of the next chunk: NextExpectedRanges ["5"] or ["5-"], any case."""
    for name, value in response.json().items():
        if name.lower() == "nextexpectedranges" and isinstance(value, list) and value:
            match = re.match("[0-9]{1,18}", str(value[0]))
            return int(match[0]) if match else None
    return None


# x-ms-error-code -> remedy, which is logged. Microsoft, "Table service error codes".
TABLE_REMEDIES: Mapping[str, str] = {
    "TableNotFound": "the table does not exist; check AZURE_TABLES_URL",
    "AuthorizationPermissionMismatch": "give the relay's identity the role Storage Table "
                                       "Data Reader (takes minutes), or the SAS sp=r",
    "AuthorizationFailure": "blocked by the storage account's firewall, or by the SAS",
    "AuthenticationFailed": "the SAS has expired, or the identity is of another tenant"}
_TABLE_UNAVAILABLE = "Temporary lookup failure in the table of accounts; try again later"


def parse_entity(response: HttpResponse) -> dict[str, Any] | None:
    """Return the first entity, or None if the table has none. Raises TemporaryError."""
    data, code = response.json(), response.headers.get("x-ms-error-code", "")
    if response.status == 404 and code == "ResourceNotFound":
        return None
    remedy = TABLE_REMEDIES.get(code)
    # The response to a query holds a list; the response to a key is the entity itself.
    entities = data.get("value", [data])
    if (response.status == 200 and data and isinstance(entities, list)
            and all(isinstance(entity, dict) for entity in entities)):
        if entities or "x-ms-continuation-nextpartitionkey" not in response.headers:
            return entities[0] if entities else None
        remedy = "the table is too large for a search; log in as NAME@lookup"
    raise TemporaryError(_TABLE_UNAVAILABLE, level=logging.ERROR, facts={
        "status": response.status, "table": code or None, "remedy": remedy})


def parse_table_account(entity: Mapping[str, Any], name: str) -> Account:
    """Return the account in an entity. Raises TemporaryError if a value is not valid."""
    values, settings = {}, settings_of(Account)
    for key in ("tenant_id", "client_id", "from_email"):
        text = str(entity.get(key) or "").strip()
        try:
            values[key] = settings[key].parse(text)
            if not text and key != "from_email":
                raise ValueError("set")
        except ValueError as error:
            raise TemporaryError(_TABLE_UNAVAILABLE, level=logging.ERROR, facts={
                "account": name, "problem": f"{key} must be {error}"}) from None
    return Account(name, **values)


# ---------------------------------------------------------------------------
# §9  Queued messages
#
# The queue directory holds two files for each message:
#
#     ID.eml      the message as edited; a large message is made a draft at each attempt
#     ID.json     its state, a QueuedMessage
#
# Neither file holds a secret. To send the message, the relay finds its secret by the name
# of the account or by the tenant and client.


@dataclass(eq=False)
class QueuedMessage:
    """The state of a queued message. Times are Unix times."""
    id: str
    account: str                # section of ACCOUNTS_FILE, or ""
    tenant: str
    client: str
    mailbox: str                # the sender's mailbox
    reverse_path: str           # where a bounce goes; "" for no bounce
    recipients: list[str]
    header_size: int            # bytes
    size: int                   # bytes, header and body
    is_bounce: bool
    queued_at: float            # SPOOL_LIFETIME begins
    attempts: int = 0
    next_attempt_at: float = 0.0        # for `spool list` only
    reason: str = ""            # for the last deferral or the failure
    bounce_sent: bool = False
    is_sent: bool = False       # but its files could not be removed

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of the mailbox queue."""
        return self.tenant, self.client, self.mailbox.lower()

    @property
    def login(self) -> str:
        """The user name whose login provides the secret, for texts that people read."""
        return self.account or f"{self.tenant}@{self.client}"


_TYPES = list(map(type, vars(QueuedMessage("", "", "", "", "", "", [], 0, 0, False, 0.0)
                             ).values()))


def parse_queued_message(text: bytes) -> QueuedMessage:
    """Return the message whose state is the content of ID.json. Raises ValueError."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        message = QueuedMessage(**json.loads(text))
        if list(map(type, vars(message).values())) == _TYPES:
            return message
    raise ValueError("it is damaged")


def as_stored(content: bytes, message: QueuedMessage) -> PreparedMessage:
    """Prepare the content of ID.eml, which is already edited. Raises DeliveryError."""
    if len(content) != message.size:
        raise DeliveryError("The file of the queued message is damaged")
    header, body = content[:message.header_size], memoryview(content)[message.header_size:]
    edited = EditedMessage(message.mailbox, header, header, body)
    is_large = edited.size > GRAPH_MESSAGE_LIMIT
    return PreparedMessage(edited, make_draft(content, edited) if is_large else None)


def make_bounce(message: QueuedMessage, header: bytes, reporter: str, bounce_id: str,
                now: float) -> bytes:
    """Return the bounce (RFC 3834 section 3) of the host `reporter`; `now` is Unix time."""
    lines = [
        f"From: Mail relay <{message.mailbox}>", f"To: <{message.reverse_path}>",
        "Subject: Undelivered mail", f"Date: {email.utils.formatdate(now)}",
        f"Message-ID: <{bounce_id}@{reporter}>", "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0", "Content-Type: text/plain; charset=utf-8",
        "Content-Transfer-Encoding: 8bit", "",
        f"The SMTP relay at {reporter} could not deliver this message and has stopped "
        "trying:", "",
        *(f"Subject:    {_decode_header_text(_unfold(subject))[:200]}"
          for subject in split_header(header).find(b"subject")[:1]),
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
# One line is one event: time, level, log ID, event, facts. Exceptions: the SMTP dialogue at
# level DEBUG, and the traceback of an internal error.
#
#     2026-11-23T19:45:48+0100 INFO ffe02d31 disconnected reason=quit
#
# INFO: normal events, and mistakes of clients. WARNING: Microsoft or a limit refuses
# something, or will soon. ERROR: messages or the relay itself are affected.
# Never pass passwords, secrets, tokens or the content of messages to this section.

MAX_LOGGED_TEXT = 1000          # characters of one value
LOG_QUEUE = 10_000              # lines that can wait while standard error is blocked

log = logging.getLogger("smtp_oauth_relay")

# Load these now: a lazy import could fail after RUN_AS, or without a free file descriptor.
for _codec in ("unicode_escape", "idna"):
    codecs.lookup(_codec)


def log_event(level: int, log_id: str, event: str, **facts: object) -> None:
    """Log an event of the message or SMTP session `log_id`, or of the relay ("-")."""
    if log.isEnabledFor(level):
        log.log(level, "%s %s%s", log_id, event, format_fields(facts))


def format_fields(facts: Mapping[str, object]) -> str:
    """Return the facts as " key=value" each, without those whose value is None."""
    return "".join(f" {name.replace('_', '-')}={quote_value(value)}"
                   for name, value in facts.items() if value is not None)


def quote_value(value: object) -> str:
    """Return a value as one word of printable ASCII, or quoted with all else escaped."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)[:MAX_LOGGED_TEXT]
    if re.fullmatch(r"[!#-&(-<>-\[\]-~]+", text):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


class LogQueue(logging.handlers.QueueHandler):
    """A handler that drops lines while the queue is full, and counts them."""
    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a line. The first line after a gap reports how many were dropped."""
        if self.dropped:
            record.msg = f"{record.msg} (lines lost before this one: {self.dropped})"
        try:
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1


@contextlib.contextmanager
def logging_to_stderr(level: str) -> Iterator[None]:
    """Write the log to standard error in a thread, because a full pipe would block it."""
    stream = logging.StreamHandler()
    stream.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s",
                                          "%Y-%m-%dT%H:%M:%S%z"))
    lines: queue.Queue[Any] = queue.Queue(LOG_QUEUE)
    listener = logging.handlers.QueueListener(lines, stream)
    handler = LogQueue(lines)
    logging.root.addHandler(handler)
    logging.getLogger("asyncio").setLevel("ERROR")      # its warnings are clients' mistakes
    log.setLevel(level)
    listener.start()
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        with (done := lines.all_tasks_done):
            if not done.wait_for(lambda: not lines.unfinished_tasks, 2):
                error = sys.exc_info()[1]   # listener.stop() and Python's exit would hang
                os._exit(2 if isinstance(error, ConfigError) else
                         0 if error is None or isinstance(error, SystemExit) else 1)
        listener.stop()


# ---------------------------------------------------------------------------
# §11  HTTP
#
# HttpPool sends each request with http.client in a worker thread:
#
#     HttpPool.send --> connect             in a thread, if no idle connection is usable
#                  \--> send_and_receive    in a thread: one request and its response
#
# These are two calls, because a DNS lookup that hangs must not keep a message in memory.
# Deadlines are times of time.monotonic(). The thread sets the socket's timeout to the time
# left before each send and receive. GRACE later the event loop shuts the socket down.

KEEPALIVE_TIMEOUT = 60.0        # seconds; firewalls forget connections that are idle longer
MAX_IDLE_CONNECTIONS = 100      # for each host
ACCEPTED_BODY_TIMEOUT = 1.0     # seconds for the body of a 202, which Graph leaves empty
GRACE = 2.0                     # seconds after a deadline, for a thread on a slow machine
THREAD_IDLE_TIMEOUT = 10.0      # seconds until an idle thread ends

IdleConnection = tuple[http.client.HTTPConnection, asyncio.TimerHandle]


class UpstreamUnavailable(TemporaryError):
    """Microsoft was not reached, did not respond in time or sent a malformed response."""
    status = "4.4.1"

    def __init__(self, problem: object) -> None:
        super().__init__("Microsoft 365 did not respond; try again later",
                         facts={"problem": problem})


class RequestNotSent(ConnectionError):
    """The connection ended before the whole request was sent, so it can be sent again."""


def time_left(deadline: float) -> float:
    """Return the seconds until a deadline. Raises TimeoutError if it has passed."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    return left


class _DeadlineReader(io.RawIOBase):
    """A file that reads from a socket until a deadline, in place of socket.makefile()."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self.deadline = sock, deadline
        self.is_lenient = False         # True: an error is the end of the file

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return the file that HTTPResponse reads from."""
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
    """Let a connection open, and read its next response, until a deadline."""
    connection.timeout = time_left(deadline)        # of connect() and the TLS handshake
    connection.response_class = lambda sock, **options: (       # type: ignore[assignment]
        http.client.HTTPResponse(cast(Any, _DeadlineReader(sock, deadline)), **options))


def connect(url: str, context: ssl.SSLContext | None,
            deadline: float) -> http.client.HTTPConnection:
    """Open a connection to a URL's host. Raises OSError, HTTPException and ValueError."""
    scheme, host, *_ = urllib.parse.urlsplit(url)
    # Plain http is for the relay's own network and its requests hold secrets: no proxy.
    if scheme == "http":
        connection, proxy = http.client.HTTPConnection(host), ""
    else:
        connection = http.client.HTTPSConnection(host, context=context)
        proxy = urllib.request.getproxies().get("https", "").strip()    # HTTPS_PROXY
    if proxy and not urllib.request.proxy_bypass(f"{connection.host}:{connection.port}"):
        via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        login = urllib.parse.unquote(f"{via.username}:{via.password or ''}").encode()
        connection.set_tunnel(connection.host, connection.port, {
            "Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"}
            if via.username else None)
        connection.host, connection.port = via.hostname or "", via.port or 80
    _set_deadline(connection, deadline)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(connection.close)
        connection.connect()
        time_left(deadline)     # after the deadline no caller takes the connection
        on_failure.pop_all()
    return connection


async def wait_until_done(deadline: float, future: asyncio.Future[Any]) -> bool:
    """Wait for a future until a deadline. Return whether it is done."""
    await asyncio.wait({future}, timeout=max(0.0, deadline - time.monotonic()))
    return future.done()


async def result_before(deadline: float, future: asyncio.Future[T]) -> T:
    """Return a future's result. At the deadline cancel it, and raise TimeoutError."""
    try:
        if not await wait_until_done(deadline, future):
            raise TimeoutError("timed out")
        return future.result()
    finally:
        future.cancel()         # or asyncio logs a later exception as never retrieved
        # The traceback of an error refers to this frame, and the future to the error. Break
        # the cycle, so that secrets and message bodies are freed immediately.
        del future


_calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
_idle_threads = threading.Semaphore(0)      # one permit for each thread without a call


def run_in_thread(call: Callable[..., T], *args: object) -> asyncio.Future[T]:
    """Run a blocking call in an idle thread, or in a new one.

    The threads are daemons without a limit: a call that hangs, in a DNS lookup for example,
    must neither keep the process from ending nor delay other calls.
    """
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    try:
        if not _idle_threads.acquire(blocking=False):
            threading.Thread(target=_thread_main, name="relay-call", daemon=True).start()
        _calls.put((call, args, future))
    except RuntimeError as error:       # the system has no more threads
        future.set_exception(TemporaryError(f"Insufficient system resources: {error}"))
    return future


def _thread_main() -> None:
    """Run calls, until no call arrives for THREAD_IDLE_TIMEOUT."""
    while True:
        try:
            call, args, future = _calls.get(timeout=THREAD_IDLE_TIMEOUT)
        except queue.Empty:
            if _idle_threads.acquire(blocking=False):
                return
            continue            # run_in_thread() has taken the permit and adds a call
        try:
            set_outcome = functools.partial(future.set_result, call(*args))
        except BaseException as error:      # noqa: BLE001 - the future raises it
            set_outcome = functools.partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):     # the loop is closed
            future.get_loop().call_soon_threadsafe(_unless_done, future, set_outcome)
        del call, args, future, set_outcome   # frees secrets; see result_before()
        _idle_threads.release()


def _unless_done(future: asyncio.Future[Any], set_outcome: Callable[[], None]) -> None:
    """Set the outcome of a future, unless its waiter has cancelled it."""
    if not future.done():
        set_outcome()


def send_and_receive(connection: http.client.HTTPConnection, request: HttpRequest,
                     deadline: float) -> HttpResponse:
    """Send a request and return its response. Close a connection that cannot be reused.

    Raises RequestNotSent, OSError, HTTPException and ValueError.
    """
    # This file keeps the socket open until the body is read: after the header field
    # "Connection: close" http.client closes the socket itself too early.
    with connection.sock.makefile("rb", 0), contextlib.ExitStack() as on_failure:
        on_failure.callback(connection.close)
        response = _get_response(connection, request, deadline)
        reader, body = cast(_DeadlineReader, response.fp.raw), b""
        reader.is_lenient = True        # the status counts, even if the body is truncated
        if response.status == 202:
            reader.deadline = min(deadline, time.monotonic() + ACCEPTED_BODY_TIMEOUT)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            body = response.read(request.max_bytes)
            if response.isclosed() and not response.length:
                on_failure.pop_all()    # the whole body is read: reuse the connection
    headers = {name.lower(): value for name, value in response.getheaders()}
    return HttpResponse(response.status, headers, body)


def _get_response(connection: http.client.HTTPConnection, request: HttpRequest,
                  deadline: float) -> http.client.HTTPResponse:
    """Send a request and return the response whose body is still to be read."""
    body, sock = request.body() if callable(request.body) else request.body, connection.sock
    if not isinstance(body, bytes):
        # Before each chunk set the timeout to the time left. settimeout() returns None.
        body = (sock.settimeout(time_left(deadline)) or chunk for chunk in body)
    sock.settimeout(time_left(deadline))
    _set_deadline(connection, deadline)
    problem = ""
    try:
        connection.request(request.method, request.url[len(_origin(request.url)):],
                           body or None, request.headers)
    except OSError as error:
        problem = str(error) or type(error).__name__
    # A server can refuse a request, with 413 for example, before it has received it all.
    try:
        response = connection.getresponse()
        while response.status < 200:    # 103 Early Hints: the final response follows
            response.headers = None     # type: ignore[assignment]
            response.begin()
        return response
    except (OSError, http.client.HTTPException, ValueError):
        if not problem:
            raise
    raise RequestNotSent(problem)


class HttpPool:
    """Sends requests, and keeps their connections for later requests."""

    def __init__(self, urls: Iterable[str]) -> None:
        # Loading the system's certificates takes time: skip it if all URLs are plain http.
        self._context = (ssl.create_default_context()
                         if any(url.startswith("https:") for url in urls) else None)
        self._idle: dict[str, list[IdleConnection]] = collections.defaultdict(list)

    async def send(self, request: HttpRequest, deadline: float) -> HttpResponse:
        """Send a request and return its response. Raises UpstreamUnavailable."""
        try:
            if idle := self._take_idle(_origin(request.url)):
                with contextlib.suppress(RequestNotSent):       # then open a connection
                    return await self._send_in_thread(idle, request, deadline)
            connection = await result_before(deadline, run_in_thread(
                connect, _origin(request.url), self._context, deadline))
            return await self._send_in_thread(connection, request, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UpstreamUnavailable(str(error) or type(error).__name__) from None

    async def send_with_retries(
            self, request: HttpRequest, deadline: float, delays: Iterable[float],
            *retry_statuses: int, timeout: float = math.inf) -> HttpResponse:
        """Send a request. Retry after each delay on 429, 5xx and `retry_statuses`.

        `timeout` limits each attempt, and is not retried. Raises UpstreamUnavailable.
        """
        for delay in (*delays, math.inf):
            response = await self.send(request, min(deadline, time.monotonic() + timeout))
            if ((response.status < 500 and response.status not in (429, *retry_statuses))
                    or time.monotonic() + delay >= deadline):
                break
            await asyncio.sleep(delay)
        return response

    async def _send_in_thread(self, connection: http.client.HTTPConnection,
                              request: HttpRequest, deadline: float) -> HttpResponse:
        """Run send_and_receive() in a thread, and keep the connection if it is open."""
        sock = connection.sock          # the thread can set connection.sock to None
        future = run_in_thread(send_and_receive, connection, request, deadline)
        try:
            return await result_before(deadline + GRACE, future)
        except asyncio.CancelledError:
            # A 202 can arrive together with the cancellation: the message is sent.
            if (request.method != "POST" or future.cancelled() or future.exception()
                    or future.result().status != 202):
                raise
            return future.result()
        finally:
            if not future.cancelled():
                self._keep_idle(_origin(request.url), connection)
            else:
                # Make the thread end soon. SSLSocket.shutdown() would remove the encryption
                # first, and the thread could then send plain text.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            del future          # breaks the cycle of error, traceback and this frame

    def _take_idle(self, origin: str) -> http.client.HTTPConnection | None:
        """Return an idle connection that is still usable, or None."""
        while self._idle[origin]:
            connection, timer = self._idle[origin].pop()
            timer.cancel()
            if connection.sock:         # the timer has not closed it
                connection.sock.settimeout(0)
                try:
                    connection.sock.recv(1)     # the end of the connection, or stray data
                except (BlockingIOError, ssl.SSLWantReadError):
                    return connection
                except OSError:
                    pass
                connection.close()
        return None

    def _keep_idle(self, origin: str, connection: http.client.HTTPConnection) -> None:
        """Keep an open connection for KEEPALIVE_TIMEOUT."""
        if connection.sock is None or len(self._idle[origin]) >= MAX_IDLE_CONNECTIONS:
            connection.close()
        else:
            self._idle[origin].append((connection, asyncio.get_running_loop().call_later(
                KEEPALIVE_TIMEOUT, connection.close)))

    def close(self) -> None:
        """Close the idle connections."""
        for origin in self._idle:
            while connection := self._take_idle(origin):
                connection.close()


def _origin(url: str) -> str:
    """Return scheme, host and port of a URL, without a slash at the end."""
    return "/".join(url.split("/", 3)[:3])


# ---------------------------------------------------------------------------
# §12  Tokens
#
# Tokens gets access tokens and caches them. The credential of an Application decides which
# request it makes:
#
#     secret              to Entra ID, with the client secret
#     workload-identity   to Entra ID, with the token of Kubernetes in a file
#     managed-identity    to IMDS (virtual machines) or App Service; local, without a proxy
#
# Microsoft, "How to use managed identities for Azure resources", "... App Service".

NEGATIVE_CACHE_TTL = 30.0       # seconds; a device with a wrong password keeps retrying
MAX_CACHED = 1000               # entries of a cache
IDENTITY_TIMEOUT = 10.0         # seconds for one attempt at a managed identity
IDENTITY_RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)      # seconds
Key = tuple[str, str, str, str, bytes]  # tenant, client, credential, resource, keyed hash


class Cache(Generic[K, T]):
    """Values that expire. When there are more than `limit`, the oldest is dropped."""

    def __init__(self, clock: Callable[[], float] = time.monotonic,
                 limit: int = MAX_CACHED) -> None:
        self._clock, self._limit = clock, limit
        self._values: dict[K, tuple[T, float]] = {}     # with the time when each expires

    def get(self, key: K) -> T | None:
        """Return the value, or None if it is missing or has expired."""
        value, expires_at = self._values.get(key, (None, 0.0))
        return value if self._clock() < expires_at else None

    def put(self, key: K, value: T, seconds: float) -> None:
        """Keep a value for `seconds`, in place of an earlier value of the key."""
        self._values.pop(key, None)
        self._values[key] = value, self._clock() + seconds
        if len(self._values) > self._limit:
            del self._values[next(iter(self._values))]


def read_secret(path: str) -> str:
    """Return the secret in a file. Raises ValueError, whose text follows the path."""
    try:
        content = pathlib.Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if not re.fullmatch(b"[!-~]([ -~]*[!-~])?", content):
        raise ValueError("must hold one line of printable ASCII")
    return content.decode()


class Tokens:
    """A cache of access tokens, in which requests for the same token share one fetch.

    A key has only a keyed hash of the client secret. A wrong secret finds no token.
    """

    def __init__(self, config: Config, pool: HttpPool,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._pool = config, pool
        self._hash_key = secrets.token_bytes(32)
        self._results: Cache[Key, str | AuthError] = Cache(clock)
        self._tenants: Cache[str, str] = Cache(clock)       # tenant ID by domain
        self._fetches: dict[Key, asyncio.Task[str]] = {}    # in progress

    async def get(self, application: Application, deadline: float,
                  resource: str = "") -> str:
        """Return a token, by default for Graph. Raises AuthError and TemporaryError."""
        try:
            return await self._get(application, deadline, resource)
        except AuthError as error:
            if not application.relay_holds_secret:      # the client's credential
                raise
            raise TemporaryError(
                f"The relay's own credential was refused: {error.reply.text}", 451, "4.7.0",
                facts=error.facts, level=logging.ERROR) from None

    async def _get(self, application: Application, deadline: float, resource: str) -> str:
        """Return a token from the cache or from a fetch, which other callers can share."""
        key = self._key(application, resource)
        result = self._results.get(key)
        if isinstance(result, AuthError):
            raise _without_traceback(result)
        if result:
            return result
        if not (fetch := self._fetches.get(key)):   # it has its first caller's deadline
            fetch = asyncio.ensure_future(self._fetch(key, application, deadline))
            self._fetches[key] = fetch
            fetch.add_done_callback(functools.partial(self._on_fetched, key))
        try:
            if not await wait_until_done(deadline + GRACE, fetch):
                raise UpstreamUnavailable("timed out")
            return fetch.result()
        finally:
            del fetch           # breaks the cycle of error, traceback and this frame

    def forget(self, application: Application, token: str, resource: str = "") -> None:
        """Drop a token that was not accepted, unless it is already replaced."""
        key = self._key(application, resource)
        if self._results.get(key) == token:
            self._results.put(key, token, 0.0)

    def resolve(self, tenant: str) -> str:
        """Return the ID of a tenant given by domain, once a token has named it."""
        return self._tenants.get(tenant) or tenant

    async def _fetch(self, key: Key, application: Application, deadline: float) -> str:
        """Request a token and cache it. Cache an AuthError for NEGATIVE_CACHE_TTL."""
        resource, secret = key[3], application.secret
        if application.credential == "managed-identity":
            secret = self._config.identity_header
            response = await self._identity_response(application.client, resource, deadline)
        else:
            if application.credential == "workload-identity":
                secret = await self._read_federated_token(deadline)
            response = await self._entra_response(application, secret, resource, deadline)
        try:
            token, lifetime = parse_token(response, secret, time.time())
        except AuthError as error:
            self._results.put(key, _without_traceback(error), NEGATIVE_CACHE_TTL)
            raise
        if "." in application.tenant and (tenant := parse_tenant_id(token)):    # a domain
            self._tenants.put(application.tenant, tenant, MAX_TOKEN_LIFETIME)
        self._results.put(self._key(application, resource), token, lifetime)
        return token

    async def _read_federated_token(self, deadline: float) -> str:
        """Return the token of Kubernetes; its disk can hang. Raises TemporaryError."""
        path = self._config.azure_federated_token_file
        try:
            return await result_before(deadline, run_in_thread(read_secret, path))
        except (TimeoutError, ValueError) as error:
            problem = str(error)
        raise TemporaryError("The relay's own credential cannot be read; see the log",
                             facts={"problem": f"{path}: {problem}"}, level=logging.ERROR)

    async def _entra_response(self, application: Application, secret: str, resource: str,
                              deadline: float) -> HttpResponse:
        """Request a token of Entra ID; RFC 6749 section 4.4.2, RFC 7523 section 2.2."""
        tenant = urllib.parse.quote(application.tenant, safe="")
        credential = {"client_secret": secret}
        if application.credential == "workload-identity":
            credential = {"client_assertion": secret, "client_assertion_type":
                          "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}
        form = {"client_id": application.client, **credential,
                "scope": f"{resource}/.default", "grant_type": "client_credentials"}
        return await self._pool.send(HttpRequest(
            "POST", f"{self._config.azure_authority_host}/{tenant}/oauth2/v2.0/token",
            {"Content-Type": "application/x-www-form-urlencoded",
             "Accept": "application/json", "User-Agent": USER_AGENT},
            urllib.parse.urlencode(form).encode()), deadline)

    async def _identity_response(self, client: str, resource: str,
                                 deadline: float) -> HttpResponse:
        """Request a token of a managed identity. Raises TemporaryError."""
        config, version, headers = self._config, "2018-02-01", {"Metadata": "true"}
        url = f"{config.azure_pod_identity_authority_host}/metadata/identity/oauth2/token"
        if config.identity_endpoint and config.identity_header:     # set by App Service
            try:
                url, version = local_http_url(config.identity_endpoint), "2019-08-01"
            except ValueError as error:
                raise TemporaryError(
                    "The relay's managed identity is not available; see the log",
                    facts={"problem": f"IDENTITY_ENDPOINT must be {error}"}) from None
            headers = {"X-IDENTITY-HEADER": config.identity_header}
        query = {"api-version": version, "resource": resource,
                 **({"client_id": client} if client else {})}
        mark = "&" if "?" in url else "?"
        request = HttpRequest("GET", f"{url}{mark}{urllib.parse.urlencode(query)}",
                              {**headers, "User-Agent": USER_AGENT})
        try:                    # IMDS sends 404 and 410 while it is updated
            return await self._pool.send_with_retries(
                request, deadline, IDENTITY_RETRY_DELAYS, 404, 410,
                timeout=IDENTITY_TIMEOUT)
        except UpstreamUnavailable as error:
            error.facts["identity"] = url.partition("?")[0]
            raise

    def _on_fetched(self, key: Key, fetch: asyncio.Task[str]) -> None:
        """Remove a fetch that is done."""
        del self._fetches[key]
        if not fetch.cancelled():
            fetch.exception()   # or asyncio logs it as never retrieved if nobody waits

    def _key(self, application: Application, resource: str) -> Key:
        """Return the cache key of an application's token for a resource."""
        digest = hmac.digest(self._hash_key, application.secret.encode(), "sha256")
        return (self.resolve(application.tenant), application.client,
                application.credential, resource or self._config.graph_endpoint, digest)


def _without_traceback(error: AuthError) -> AuthError:
    """Return a copy of an error without its traceback, whose frames hold the secret."""
    return AuthError(error.reply.text, facts=error.facts, level=error.level)


# ---------------------------------------------------------------------------
# §13  Azure
#
# Azure services that the relay calls for itself, with relay_identity() or a SAS: the table
# of accounts here, and Key Vault in the section about TLS.

AZURE_RETRY_DELAYS = (1.0, 3.0)     # seconds before each retry
TABLE_CACHE_TTL = 60.0          # seconds; a change in the table takes effect after it
_NO_ROW_KEY = re.compile(r"[/\\#?\x00-\x1f\x7f-\x9f]")      # characters that Azure forbids


class AzureClient:
    """Sends requests to Azure services as the relay itself."""

    def __init__(self, config: Config, pool: HttpPool, tokens: Tokens) -> None:
        self._application = relay_identity(config)
        self._pool, self._tokens = pool, tokens

    async def get(self, url: str, resource: str, headers: Mapping[str, str],
                  deadline: float) -> HttpResponse:
        """Send a GET request, with a token if `resource` is set. Raises TemporaryError."""
        headers = {**headers, "User-Agent": USER_AGENT}
        for _ in ("first token", "new token"):
            if resource:
                token = await self._tokens.get(self._application, deadline, resource)
                headers["Authorization"] = f"Bearer {token}"
            response = await self._pool.send_with_retries(
                HttpRequest("GET", url, headers), deadline, AZURE_RETRY_DELAYS)
            code = response.headers.get("x-ms-error-code")
            # For a token that has expired, Tables sends 403 with this code.
            if not resource or (response.status != 401 and code != "AuthenticationFailed"):
                break
            self._tokens.forget(self._application, token, resource)
        return response


class AccountsTable:
    """The accounts in an Azure table; Microsoft, "Query Entities (REST API)"."""

    def __init__(self, config: Config, azure: AzureClient,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._azure, self._partition = azure, config.azure_tables_partition_key
        self._url, _, self._sas = config.azure_tables_url.partition("?")
        # A tuple of one, because the cache cannot store None for "no such account".
        self._cache: Cache[tuple[str, ...], tuple[Account | None]] = Cache(clock)

    async def find(self, name: str, deadline: float) -> Account | None:
        """Return the account of NAME@lookup. Raises TemporaryError."""
        if _NO_ROW_KEY.search(name) or len(name.encode("utf-16-le")) > 1024:
            return None                 # Azure allows no such RowKey
        partition, row = (urllib.parse.quote(key.replace("'", "''"), safe="")
                          for key in (self._partition, name))
        return await self._find(name, f"(PartitionKey='{partition}',RowKey='{row}')", {},
                                deadline)

    async def find_application(self, tenant: str, client: str,
                               deadline: float) -> Account | None:
        """Return an account with this application. Raises TemporaryError."""
        query = self._filter(tenant_id=_spellings(tenant), client_id=_spellings(client))
        return await self._find("", "()", query, deadline)

    async def check(self, deadline: float) -> None:
        """Raise TemporaryError if the table cannot be read."""
        await self._query("()", self._filter(), deadline)

    async def _find(self, name: str, path: str, query: Mapping[str, str],
                    deadline: float) -> Account | None:
        key = (path, *query.values())
        if not (cached := self._cache.get(key)):
            entity = await self._query(path, query, deadline)
            cached = (None if entity is None else parse_table_account(entity, name),)
            self._cache.put(key, cached, TABLE_CACHE_TTL)
        return cached[0]

    async def _query(self, path: str, query: Mapping[str, str],
                     deadline: float) -> dict[str, Any] | None:
        query = {**query, "$select": "tenant_id,client_id,from_email"}
        text = urllib.parse.urlencode(query, safe="$", quote_via=urllib.parse.quote)
        return parse_entity(await self._azure.get(
            f"{self._url}{path}?{text}{self._sas and '&'}{self._sas}",
            "" if self._sas else "https://storage.azure.com",
            {"Accept": "application/json;odata=nometadata",
             "DataServiceVersion": "3.0;NetFx", "x-ms-version": "2020-12-06",
             "x-ms-date": email.utils.formatdate(usegmt=True)}, deadline))

    def _filter(self, **columns: Iterable[str]) -> dict[str, str]:
        """Make a query for one entity whose columns have one of the given values each."""
        conditions = []
        for name, values in {"PartitionKey": [self._partition], **columns}.items():
            terms = (f"{name} eq '" + value.replace("'", "''") + "'" for value in values)
            conditions.append("(" + " or ".join(terms) + ")")
        return {"$filter": " and ".join(conditions), "$top": "1"}


def _spellings(value: str) -> Iterable[str]:
    """List the forms that a tenant or client can have in the table."""
    short = [encode_uuid(value)] if decode_uuid(value) else []
    return dict.fromkeys([value, value.upper(), *short])


# ---------------------------------------------------------------------------
# §14  Authentication
#
# Authenticator.log_in() decides every login. It finds the account in ACCOUNTS_FILE, in the
# Azure table or in the user name itself, and checks the password. If the device's password
# is the application's secret, Entra ID checks it by issuing a token. A login that cannot be
# checked gets 454 or 421. After 535 a device might not use a right password again.

ACCOUNTS_POLL_INTERVAL = 3.0    # seconds between two checks of ACCOUNTS_FILE for changes
MAX_FAILURES = 10               # failed logins from an address, in FAILURE_WINDOW
FAILURE_WINDOW = 600.0          # seconds
FAILURE_DELAY = 0.5             # seconds before a refusal, for each failure until now
MAX_FAILURE_DELAY = 5.0
DUMMY_HASH = f"scrypt${'A' * 22}${'A' * 43}"    # no password has this hash


def has_tls_version(version: str) -> bool:
    """Return whether the OpenSSL of this Python has a TLS version; True for ""."""
    # The names are HAS_TLSv1, HAS_TLSv1_1 and so on.
    return getattr(ssl, "HAS_TLSv" + version.replace(".0", "").replace(".", "_"), True)


class AccountsFile:
    """ACCOUNTS_FILE, with the files of secrets that it names."""

    def __init__(self, config: Config) -> None:
        self.accounts = Accounts()
        self._config = config
        # The state of each file by path, at the last load and at the last poll.
        self._loaded: dict[str, tuple[int, ...] | None] = {}
        self._polled: dict[str, tuple[int, ...] | None] = {}
        self._reload: asyncio.Event | None = None

    def load(self) -> None:
        """Read the files. Raises ConfigError with all errors; the old accounts stay."""
        path = self._config.accounts_file
        states = {path: _file_state(path)}      # from before the file is read
        self._loaded = {path: None}         # if this load fails, the next poll tries again
        try:
            text = pathlib.Path(path).read_text("utf-8-sig")
        except (OSError, UnicodeError) as error:    # UnicodeError quotes the file's text
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"ACCOUNTS_FILE={path!r}: cannot be read: {reason}") from None
        accounts, errors = parse_accounts(text, self._config)
        secrets_by_path = {"": ""}
        for account in accounts:
            if not has_tls_version(version := account.tls_min_version):
                errors.append(f"[{account.name}] tls_min_version = {version}: must be a "
                              "version that the OpenSSL of this Python has")
            name = account.client_secret_file
            if name not in secrets_by_path:
                states[name], secrets_by_path[name] = _file_state(name), ""
                try:
                    secrets_by_path[name] = read_secret(name)
                except ValueError as error:
                    errors.append(f"[{account.name}] client_secret_file = {name}: {error}")
        if errors:
            raise ConfigError("\n".join(f"{path}: {error}" for error in errors))
        self.accounts = Accounts(
            dataclasses.replace(account, client_secret=account.client_secret
                                or secrets_by_path[account.client_secret_file])
            for account in accounts)
        self._loaded = states
        if any(account.client_secret or account.password for account in self.accounts):
            self._warn_of_exposed_files()

    def _warn_of_exposed_files(self) -> None:
        for path, state in self._loaded.items() if os.name == "posix" else ():
            if state and state[-1] & 0o004:
                log_event(logging.WARNING, "-", "secrets-exposed", file=path, problem="all "
                          "users of this machine can read it; chmod o-r")

    def check_access(self) -> None:
        """Warn if root could read the files, and the user RUN_AS cannot."""
        for path in self._loaded:
            if not os.access(path, os.R_OK):
                log_event(logging.WARNING, "-", "reload-blocked", file=path, problem="the "
                          "user RUN_AS cannot read it; make this user its owner")

    def request_reload(self) -> None:
        """Make watch() read the files at once."""
        if self._reload:
            self._reload.set()

    async def watch(self) -> None:
        """Read the files again whenever they have changed; run until cancelled."""
        self._reload, logged = asyncio.Event(), ""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._reload.wait(), ACCOUNTS_POLL_INTERVAL)
            is_requested = self._reload.is_set()
            self._reload.clear()
            try:
                # Without a deadline: if the disk hangs, only this task waits.
                if await run_in_thread(self._poll, is_requested):
                    log_event(logging.INFO, "-", "accounts-loaded",
                              accounts=len(list(self.accounts)))
                    logged = ""
                continue
            except (ConfigError, RelayError) as error:
                problem = str(error)
            except Exception as error:          # noqa: BLE001 - go on watching
                problem = type(error).__name__
            for line in problem.splitlines() if problem != logged else ():
                log_event(logging.ERROR, "-", "accounts-refused", problem=line,
                          remedy="fix it; until then the old accounts stay in force")
            logged = problem

    def _poll(self, is_requested: bool) -> bool:
        """Load the files if requested or changed. Return whether they were loaded."""
        states = {path: _file_state(path) for path in self._loaded}
        # A file that changes between two polls may be half written.
        is_settled, self._polled = states == self._polled, states
        if not is_requested and (states == self._loaded or not is_settled):
            return False
        self.load()
        return True


def _file_state(path: str) -> tuple[int, ...] | None:
    """Return values that change when a file does, its mode last; None if it is missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode


class TooManyFailures(TemporaryError):
    """Too many logins from an address have failed; no more passwords are checked."""


class LoginLimiter:
    """Counts failed logins by the client's address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: Cache[bytes, list[float]] = Cache(clock)

    def check(self, address: IpAddress | None) -> None:
        """Raise TooManyFailures if too many logins from an address have failed."""
        if len(self._recent(address)) >= MAX_FAILURES:
            raise TooManyFailures("Too many failed logins from your address; try again "
                                  "later", 421, "4.7.0", close=True)

    def add(self, address: IpAddress | None) -> float:
        """Count a failure; return the seconds to wait before the client is told."""
        times = [*self._recent(address), self._clock()]
        self._times.put(client_prefix(address), times, FAILURE_WINDOW)
        return min(len(times) * FAILURE_DELAY, MAX_FAILURE_DELAY)

    def _recent(self, address: IpAddress | None) -> list[float]:
        times = self._times.get(client_prefix(address)) or []
        return [seconds for seconds in times if self._clock() < seconds + FAILURE_WINDOW]


def client_prefix(address: IpAddress | None) -> bytes:
    """Return an IPv4 address, or the /64 of an IPv6 address: a customer has a whole /64."""
    return address.packed[:8] if address else b""


class Authenticator:
    """Decides logins: finds the account, checks the password, and limits failures."""

    def __init__(self, config: Config, accounts_file: AccountsFile,
                 table: AccountsTable | None, tokens: Tokens,
                 on_login: Callable[[Application], None] | None) -> None:
        self._config, self._tokens = config, tokens
        self._accounts_file, self._table = accounts_file, table
        self._on_login = on_login       # of the queue; None if there is no queue
        self._limiter = LoginLimiter()
        self._scrypt = threading.Semaphore(2)       # checks at once: each takes 32 MiB

    def policy(self, address: IpAddress | None) -> ClientPolicy:
        """Return the policy for a client by its address."""
        return self._accounts_file.accounts.match_address(address, self._config)

    async def log_in(self, request: Authenticate, address: IpAddress | None,
                     session_id: str) -> Principal:
        """Check a login. Raises AuthError, after a delay, and TemporaryError."""
        user = self._loggable_username(request.username)
        try:
            principal = await self._check(request, address)
        except RelayError as error:
            delay, result, facts = 0.0, "tempfail", dict(error.facts)
            if isinstance(error, AuthError):
                delay, result = self._limiter.add(address), "refused"
                if self.policy(address).anonymous:
                    facts["remedy"] = "no login is needed from here; switch it off"
            elif not isinstance(error, TooManyFailures):
                error = TemporaryError("Temporary authentication failure, the password may "
                                       f"be right: {error.reply.text}", 454, "4.7.0",
                                       level=error.level)
            log_event(error.level, session_id, "auth", user=user, client=address,
                      result=result, reply=error.reply, **facts)
            await asyncio.sleep(delay)
            raise error from None
        log_event(logging.INFO, session_id, "auth", user=user, result="ok",
                  account=principal.account.name or None)
        return principal

    async def _check(self, request: Authenticate, address: IpAddress | None) -> Principal:
        deadline = time.monotonic() + self._config.upstream_timeout
        self._limiter.check(address)
        try:
            principal = await self._find_principal(request, address, deadline)
            # If the relay holds the secret, the password was checked above. With a queue
            # the client need not wait for Microsoft then.
            if not (self._on_login and principal.application.relay_holds_secret):
                await self._tokens.get(principal.application, deadline)
        except AuthError:
            # Of many guesses at once, none may show by its reply that it was right.
            self._limiter.check(address)
            raise
        self._limiter.check(address)
        if self._on_login:
            self._on_login(principal.application)
        return principal

    async def _find_principal(self, request: Authenticate, address: IpAddress | None,
                              deadline: float) -> Principal:
        """Check all but a secret of Entra ID. Raises AuthError and TemporaryError."""
        username, password = request.username, request.password
        name = lookup_name(username, self._config.username_delimiter)
        accounts = self._accounts_file.accounts
        account = (accounts.find(username) or (accounts.find(name) if name else None)
                   or await self._find_elsewhere(username, name, deadline))
        problem = ""
        if account is None:
            problem = "there is no such account"
        elif not account.allows_address(address):
            problem = "not from its networks"
        elif not account.has_credential:        # Entra ID will check the password
            if password:
                return account.as_principal(self._config, password, username)
            if not account.name:
                raise AuthError("The password is empty; it must be the client secret")
            problem = "the password is empty"
        # From here each login costs one scrypt, so that its time does not show which exist.
        hashed = account.password if account else ""
        is_right = await self._verify(password, hashed or DUMMY_HASH, address, deadline)
        if account is None or problem or not is_right:
            problem = problem or ("wrong password" if hashed else "it has no password")
            raise AuthError("Authentication credentials invalid; the relay's log says why",
                            facts={"account": account and account.name, "problem": problem})
        return account.as_principal(self._config, username=username)

    async def _find_elsewhere(self, username: str, name: str | None,
                              deadline: float) -> Account | None:
        """Find an account that is not in ACCOUNTS_FILE: in the table or the user name."""
        config, table = self._config, self._table
        if name is not None:
            return await table.find(name, deadline) if table else None
        try:
            tenant, client = parse_username(username, config.username_delimiter)
        except AuthError:
            if config.accounts_file:
                return None             # the same time and text as for a wrong password
            raise
        if config.allowed_tenants and tenant not in config.allowed_tenants:
            raise AuthError("This tenant may not log in here; see ALLOWED_TENANTS")
        if not config.must_have_account:
            return Account("", tenant, client)
        account = await table.find_application(tenant, client, deadline) if table else None
        if account is None:
            raise AuthError("Only accounts that the relay knows may log in")
        return account

    async def _verify(self, password: str, hashed: str, address: IpAddress | None,
                      deadline: float) -> bool:
        def verify() -> bool:
            with self._scrypt:
                time_left(deadline)                 # the client may no longer wait
                self._limiter.check(address)        # other logins may have failed meanwhile
                return verify_password(password, hashed)

        try:
            return await result_before(deadline, run_in_thread(verify))
        except TimeoutError:
            raise TemporaryError("Too many logins at once; try again later") from None

    def _loggable_username(self, username: str) -> str:
        """Mask a user name that is not valid, because it may be a password."""
        with contextlib.suppress(AuthError):
            delimiter = self._config.username_delimiter
            if (self._accounts_file.accounts.find(username)
                    or lookup_name(username, delimiter)
                    or parse_username(username, delimiter)):
                return username
        return f"*** ({len(username)} characters)"


# ---------------------------------------------------------------------------
# §15  Graph
#
# GraphClient sends a message in one request (sendMail), or as a draft to which it attaches
# the files. By itself it retries only what cannot send a message twice:
#
#     401, except for an upload           once, with a new token
#     429, 503 with Retry-After           after that time, for all messages of the mailbox
#     404 for a new draft                 a few times: not all servers know it at once
#     a reused connection that broke      if the request did not go out (by HttpPool)
#
# Any other error ends the attempt. After a timeout or a 504 Microsoft may have sent the
# message, and the retry by the client or the queue sends it again: twice is better than
# never. A large message holds one slot of its mailbox for all of its requests. If a request
# after the creation of the draft fails, the draft is deleted, or the log has `draft-left`.

REQUESTS_AT_ONCE = 4            # for an application and a mailbox; Graph's own limit
MIN_TIME_LEFT = 0.1             # part of UPSTREAM_TIMEOUT that is kept for the response
MIN_RETRY_DELAY = 0.5           # seconds
MAX_RETRY_DELAY = 86400.0       # seconds; a longer Retry-After is an error of the server
DEFAULT_RETRY_DELAY = 5.0       # seconds after a 429 without Retry-After
DRAFT_RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)       # seconds, if a new draft is not found
DISCARD_TIMEOUT = 5.0           # seconds to delete a draft, on top of UPSTREAM_TIMEOUT
MailboxKey = tuple[str, str, str]       # tenant, client, mailbox: Graph's limits are for it


class MailboxLimiter:
    """Limits the messages sent from a mailbox at once: clients first, in their order.

    The queue sends the messages of a mailbox one by one, so it holds one slot only.
    """

    def __init__(self) -> None:
        self.in_use = 0
        self._live: collections.deque[asyncio.Future[None]] = collections.deque()
        self._queued: collections.deque[asyncio.Future[None]] = collections.deque()

    @contextlib.asynccontextmanager
    async def slot(self, deadline: float, *, is_live: bool) -> AsyncIterator[None]:
        """Hold a slot. Raises TemporaryError if none is free before the deadline."""
        waiting = self._live if is_live else self._queued
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(slot)
        self._grant_slots()
        try:
            if not (slot.done() or await wait_until_done(deadline, slot)):
                raise TemporaryError("Too many messages for this mailbox at once; try "
                                     "again later", 451, "4.4.5")
            yield
        finally:
            if slot.done():
                self.in_use -= 1
                self._grant_slots()
            else:
                waiting.remove(slot)

    def _grant_slots(self) -> None:
        while self.in_use < REQUESTS_AT_ONCE and (self._live or self._queued):
            (self._live or self._queued).popleft().set_result(None)
            self.in_use += 1


@dataclass(frozen=True)
class RequestContext:
    """The facts that all requests for a message share."""
    application: Application
    mailbox: str
    message_id: str
    deadline: float         # for a response, time.monotonic()
    send_before: float      # for a request, so that there is time for the response
    key: MailboxKey         # of the limits


class GraphClient:
    """Sends messages; Microsoft Graph v1.0, "user: sendMail", "message: send"."""

    def __init__(self, config: Config, pool: HttpPool, tokens: Tokens) -> None:
        self._config, self._pool, self._tokens = config, pool, tokens
        # A limiter lives as long as a message holds or waits for one of its slots.
        self._limiters: weakref.WeakValueDictionary[MailboxKey, MailboxLimiter] = (
            weakref.WeakValueDictionary())
        self._resume_at: Cache[MailboxKey, float] = Cache()     # time.monotonic()

    async def send(self, application: Application, message: PreparedMessage,
                   message_id: str, deadline: float, is_live: bool = False) -> HttpResponse:
        """Send a message, first if a client waits for it (`is_live`). Raises RelayError."""
        edited = message.edited
        # A request that is cut off at the deadline may have sent the message. Therefore no
        # request starts in the last part of the time.
        send_before = deadline - MIN_TIME_LEFT * self._config.upstream_timeout
        key = self._key((application.tenant, application.client, edited.mailbox.lower()))
        context = RequestContext(application, edited.mailbox, message_id, deadline,
                                 send_before, key)
        limiter = self._limiters.setdefault(key, MailboxLimiter())
        async with limiter.slot(send_before, is_live=is_live):
            try:
                if message.draft:
                    return await self._send_draft(context, message.draft)
                return await self._call(
                    context, GraphOperation.SEND, "sendMail", edited.as_base64, headers={
                        "Content-Type": "text/plain",
                        "Content-Length": str((edited.size + 2) // 3 * 4)})
            except TimeoutError as error:       # of result_before() in _attach()
                raise UpstreamUnavailable(error) from None

    def throttled_for(self, key: MailboxKey) -> float:
        """Return for how many seconds Microsoft wants no requests for a mailbox."""
        return max(0.0, (self._resume_at.get(self._key(key)) or 0.0) - time.monotonic())

    def _key(self, key: MailboxKey) -> MailboxKey:
        return self._tokens.resolve(key[0]), key[1], key[2]

    async def _send_draft(self, context: RequestContext, draft: Draft) -> HttpResponse:
        """Create a draft, attach the files and send it; delete it if anything fails."""
        # The response repeats the text, and may escape each character with six bytes.
        draft_id = parse_draft_id(await self._call(
            context, GraphOperation.CREATE, "messages", draft.content,
            MAX_RESPONSE_BODY + 6 * len(draft.content)))
        if not draft_id:
            raise UpstreamUnavailable("a draft without an ID")
        path = f"messages/{urllib.parse.quote(draft_id, safe='')}"
        try:
            for attachment in draft.attachments:
                await self._attach(context, f"{path}/attachments", attachment)
            return await self._call(context, GraphOperation.SEND_DRAFT, f"{path}/send")
        except BaseException:
            await self._discard(context, path)
            raise

    async def _attach(self, context: RequestContext, path: str, file: Attachment) -> None:
        """Attach a file: a small file in one request, a large file in chunks."""
        if not file.is_large:
            await self._call(context, GraphOperation.ATTACH, path, file.as_json)
            return
        item = {"attachmentType": "file", "size": file.size, **file.properties()}
        url = parse_upload_url(await self._call(
            context, GraphOperation.ATTACH, f"{path}/createUploadSession",
            json.dumps({"AttachmentItem": item}).encode()))
        if url[:5] != self._config.graph_endpoint[:5]:      # only tests use http:
            raise UpstreamUnavailable("an upload session without a usable URL")
        chunks, begin = filter(None, file.part.iter_decoded()), 0
        while begin < file.size:
            chunk = await result_before(context.deadline, run_in_thread(next, chunks, b""))
            end = begin + len(chunk)
            headers = {"Content-Type": "application/octet-stream", "User-Agent": USER_AGENT,
                       "Content-Range": f"bytes {begin}-{end - 1}/{file.size}"}
            response = await self._perform(context, GraphOperation.UPLOAD,
                                           HttpRequest("PUT", url, headers, chunk))
            if parse_next_range(response) not in (None, end):
                raise UpstreamUnavailable("a chunk of an upload was lost")
            begin = end

    async def _discard(self, context: RequestContext, path: str) -> None:
        """Delete a draft that was not sent, or log that it is left in the mailbox."""
        deadline = time.monotonic() + DISCARD_TIMEOUT
        context = dataclasses.replace(context, deadline=deadline, send_before=deadline)
        try:
            await self._call(context, GraphOperation.DELETE, path)
        except RelayError as error:
            log_event(logging.WARNING, context.message_id, "draft-left",
                      mailbox=context.mailbox, reply=error.reply, **error.facts)
        except BaseException:
            log_event(logging.WARNING, context.message_id, "draft-left",
                      mailbox=context.mailbox, problem="the relay stops")
            raise

    async def _call(self, context: RequestContext, operation: GraphOperation, path: str,
                    body: Body = b"", max_bytes: int = MAX_RESPONSE_BODY, *,
                    headers: Any = ()) -> HttpResponse:
        """Send a request for something in the mailbox. Raises RelayError."""
        mailbox = urllib.parse.quote(context.mailbox, safe="")
        return await self._perform(context, operation, HttpRequest(
            "DELETE" if operation is GraphOperation.DELETE else "POST",
            f"{self._config.graph_endpoint}/v1.0/users/{mailbox}/{path}",
            {**({"Content-Type": "application/json"} if body else {}),
             "Accept": "application/json", "User-Agent": USER_AGENT,
             "client-request-id": context.message_id, **dict(headers)}, body, max_bytes))

    async def _perform(self, context: RequestContext, operation: GraphOperation,
                       request: HttpRequest) -> HttpResponse:
        """Send a request, and retry as the table above says. Raises RelayError."""
        token, has_new_token, draft_delays = "", False, iter(DRAFT_RETRY_DELAYS)
        while True:
            throttled = self.throttled_for(context.key)
            # Deleting starts at once, or the draft would be left in the mailbox.
            if throttled and operation is not GraphOperation.DELETE:
                if time.monotonic() + throttled >= context.send_before:
                    raise TemporaryError(_THROTTLED.text, status=_THROTTLED.status)
                await asyncio.sleep(throttled)
                continue
            if operation is not GraphOperation.UPLOAD:      # its URL holds a secret instead
                token = await self._tokens.get(context.application, context.deadline)
                request = dataclasses.replace(request, headers={
                    **request.headers, "Authorization": f"Bearer {token}"})
            if time.monotonic() >= context.send_before:
                raise UpstreamUnavailable("no time is left")
            response = await self._pool.send(request, context.deadline)
            if response.status in operation.value:
                return response
            if response.status == 401 and token and not has_new_token:
                has_new_token = True
                self._tokens.forget(context.application, token)
                continue
            delay = _throttle_delay(response)
            if delay > self.throttled_for(context.key):
                self._resume_at.put(self._key(context.key), time.monotonic() + delay, delay)
            if response.status == 404 and operation in (GraphOperation.ATTACH,
                                                        GraphOperation.SEND_DRAFT):
                delay = next(draft_delays, 0.0)
            if not delay or time.monotonic() + delay >= context.send_before:
                raise graph_error(response, context.mailbox, operation)
            await asyncio.sleep(delay)


def _throttle_delay(response: HttpResponse) -> float:
    """Return for how many seconds Microsoft wants no request; 0.0 if it does not say."""
    if response.status not in (429, 503):
        return 0.0
    delay = response.retry_after(time.time())
    if delay is None or delay > MAX_RETRY_DELAY:
        return DEFAULT_RETRY_DELAY if response.status == 429 else 0.0
    return max(delay, MIN_RETRY_DELAY)


# ---------------------------------------------------------------------------
# §16  Queue
#
# Messages that Microsoft cannot accept now, in SPOOL_DIRECTORY:
#
#     lock                      locked by the relay that uses the directory; the command
#                               line appends the IDs of messages that it has changed
#     queue/ID.eml, ID.json     a waiting message, and its state
#     queue/ID.tmp              a state that is being written
#     failed/ID.eml, ID.json    a message that failed
#
# A message is queued while its ID.json is in queue/: add() writes it last, remove() removes
# it first. The client gets 250 when both files are on the disk. They are removed when
# Microsoft has accepted the message. After a crash it is queued, sent, both or failed.
#
# Each mailbox has a queue and a task of its own, which sends one message at a time: the
# message with the fewest attempts, then the oldest. So a message that always fails does not
# block the others. After a failure the task waits (backoff) before the next attempt.

MIN_BACKOFF = 60.0              # seconds after a first failure; each further one doubles it
MAX_BACKOFF = 1800.0            # seconds, the limit of the doubling
MIN_FREE_DISK = 67_108_864      # bytes of the disk that stay free
DISK_TIMEOUT = 10.0             # seconds for one operation of the disk
RECOUNT_INTERVAL = 5.0          # seconds until a full directory is measured again
MAX_CONCURRENT_DELIVERIES = 20  # messages of the queue that are sent at once
QUEUE_POLL_INTERVAL = 2.0       # seconds until a change by the command line is noticed
MAX_SLEEP = 30.0                # seconds until a change of ACCOUNTS_FILE is noticed


class QueueFiles:
    """The files of the queue. The methods wait for the disk, and raise OSError."""

    def __init__(self, config: Config) -> None:
        self._path = pathlib.Path(config.spool_directory)
        self._max_bytes = config.spool_max_bytes
        self.queue, self.failed = self._path / "queue", self._path / "failed"
        self._lock: IO[str] | None = None
        self._deadlines: set[float] = set()     # of messages that are being written
        self._changed_ids: list[str] = []       # as reported by the command line
        self._size_lock = threading.Lock()
        self._size, self._count_at = math.inf, -math.inf    # counting each time is slow

    def open(self) -> list[QueuedMessage]:
        """Lock the directory and return the waiting messages. Raises StartError."""
        try:
            self._path.mkdir(0o700, exist_ok=True)
            status = self._path.stat()
            if fcntl is None:
                problem = "this system has no file locks"
            elif status.st_uid != os.geteuid():
                problem = "belongs to another user; make the relay's user its owner (chown)"
            elif status.st_mode & 0o022:
                problem = "other users can write to it; chmod go-w"
            else:
                self._lock = open(self._path / "lock", "a+",    # noqa: SIM115
                                  opener=functools.partial(os.open, mode=0o600))
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.queue.mkdir(0o700, exist_ok=True)
                self.failed.mkdir(0o700, exist_ok=True)
                _sync(self._path)
                return self._load()
        except BlockingIOError:
            problem = "another relay is using it"
        except OSError as error:
            problem = f"cannot be used: {error.strerror}: {error.filename}"
        raise StartError(f"SPOOL_DIRECTORY={str(self._path)!r}: {problem}")

    def close(self) -> None:
        """Unlock the directory."""
        if self._lock:
            self._lock.close()

    def _load(self) -> list[QueuedMessage]:
        """Read the waiting messages, and clean up after a crash."""
        messages = []
        for path, message in self.read_all(self.queue):
            if message and path.with_suffix(".eml").exists():
                messages.append(message)
                continue
            log_event(logging.ERROR, path.stem, "quarantined", file=self.failed / path.name,
                      problem="it has no .eml" if message else "it is damaged")
            for source in (path.with_suffix(".eml"), path):
                with contextlib.suppress(FileNotFoundError):
                    _move(source, self.failed)
        failed = {path.name for path in self.failed.iterdir()}
        for path in self.queue.iterdir():
            is_orphan = path.suffix == ".eml" and not path.with_suffix(".json").exists()
            if is_orphan and f"{path.stem}.json" in failed and path.name not in failed:
                _move(path, self.failed)        # `spool retry` ran meanwhile
            elif is_orphan or path.suffix == ".tmp":
                log_event(logging.WARNING, path.stem, "removed", file=path,
                          problem="the relay ended while it wrote or deleted the message")
                path.unlink()
        return messages

    def read_all(self, directory: pathlib.Path
                 ) -> Iterator[tuple[pathlib.Path, QueuedMessage | None]]:
        """Read the states of all messages in a directory; None for a damaged state."""
        for path in directory.glob("*.json"):
            try:
                message = parse_queued_message(path.read_bytes())
                # A state with the ID of another message is a copy, so it is damaged.
                yield path, message if message.id == path.stem else None
            except FileNotFoundError:
                pass                    # the message was sent meanwhile
            except (ValueError, IsADirectoryError):
                yield path, None

    def path(self, message: QueuedMessage) -> pathlib.Path:
        """Return the path of a waiting message's state."""
        return self.queue / f"{message.id}.json"

    def content(self, message: QueuedMessage, limit: int = -1) -> bytes:
        """Read a message, or its first `limit` bytes."""
        with open(self.path(message).with_suffix(".eml"), "rb") as file:
            return file.read(limit)

    def add(self, message: QueuedMessage, parts: list[bytes | memoryview],
            deadline: float, is_cancelled: Callable[[], bool]) -> None:
        """Store a message safely. If it is late or cancelled (no 250), leave nothing."""
        if min(self._deadlines, default=deadline) < time.monotonic():
            # An earlier write hangs. Waiting messages would fill the memory.
            raise OSError(errno.EBUSY, "the disk does not respond")
        self._deadlines.add(deadline)
        try:
            self._check_space(message)
            _write(self.path(message).with_suffix(".eml"), parts)
            self.save(self.path(message), message)
            if time.monotonic() > deadline or is_cancelled():
                raise TimeoutError("the disk is too slow")
        except OSError:
            with contextlib.suppress(OSError):
                self.remove(self.path(message))
            raise
        finally:
            self._deadlines.discard(deadline)

    def _check_space(self, message: QueuedMessage) -> None:
        """Reserve space for a message. Raises OSError if the disk or directory is full."""
        disk = os.statvfs(self.queue)
        if disk.f_bavail * disk.f_frsize - message.size < MIN_FREE_DISK:
            raise OSError(errno.ENOSPC, f"less than {MIN_FREE_DISK} bytes would be free")
        with self._size_lock:
            is_full = self._size + message.size > self._max_bytes
            if is_full and time.monotonic() >= self._count_at:
                self._size, self._count_at = 0, time.monotonic() + RECOUNT_INTERVAL
                for path in self._path.glob("*/*"):
                    with contextlib.suppress(FileNotFoundError):    # it was sent meanwhile
                        self._size += path.stat().st_size
            if self._size + message.size > self._max_bytes and not message.is_bounce:
                raise OSError(errno.EDQUOT, "more than SPOOL_MAX_BYTES")
            self._size += message.size + len(json.dumps(vars(message)))

    def save(self, path: pathlib.Path, message: QueuedMessage) -> None:
        """Write a message's state. Raises FileNotFoundError if the message was deleted."""
        path.with_suffix(".eml").stat()
        new = path.with_suffix(".tmp")
        _write(new, [json.dumps(vars(message)).encode()])
        new.rename(path)
        _sync(path.parent)

    def remove(self, path: pathlib.Path) -> None:
        """Remove a message by the path of its state."""
        for suffix in (".tmp", ".json", ".eml"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        _sync(path.parent)

    # Both files move one by one. Between the two moves queue/ has a .json without .eml. If
    # the relay crashes there, _load() moves the .json to failed/.

    def fail(self, message: QueuedMessage) -> None:
        """Move a message to failed/."""
        # On a full disk keep the old state. If the state is gone, _move() raises.
        with contextlib.suppress(OSError):
            self.save(self.path(message), message)
        self.failed.mkdir(0o700, exist_ok=True)     # an admin may have removed it
        for suffix in (".eml", ".json"):
            _move(self.queue / f"{message.id}{suffix}", self.failed)

    def retry(self, message: QueuedMessage) -> None:
        """Move a message from failed/ to queue/, as a new message."""
        message.queued_at, message.attempts = time.time(), 0
        self.save(self.failed / f"{message.id}.json", message)
        for suffix in (".json", ".eml"):
            _move(self.failed / f"{message.id}{suffix}", self.queue)

    def notify(self, message_id: str) -> None:
        """Tell the running relay that the command line has changed a message."""
        path = self._path / "lock"
        if path.exists():
            with open(path, "a") as file:
                file.write(f"{message_id}\n")

    def changes(self) -> dict[str, QueuedMessage | None]:
        """Return the messages that the command line has changed; None if not in queue/."""
        self._changed_ids += self._lock.read().split() if self._lock else []
        states = dict(self.read_all(self.queue)) if self._changed_ids else {}
        # Only now, because read_all() may fail: then the next call repeats it.
        changed, self._changed_ids = self._changed_ids, []
        return {name: states.get(self.queue / f"{name}.json") for name in changed}


def _write(path: pathlib.Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file that only its owner can read, and wait until it is on the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        if os.geteuid() == 0:           # `spool retry` by root; the relay runs as RUN_AS
            os.fchown(file.fileno(), path.parent.stat().st_uid, -1)
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: pathlib.Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(path: pathlib.Path, directory: pathlib.Path) -> None:
    path.rename(directory / path.name)
    _sync(directory)
    _sync(path.parent)


@dataclass(eq=False)
class MailboxQueue:
    """The messages of a mailbox, and the task that sends them."""
    resume_at: float            # of the next attempt, time.monotonic()
    failures: int               # in a row
    messages: dict[str, QueuedMessage] = field(default_factory=dict)    # by ID
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    is_sending: bool = False
    is_without_secret: bool = False     # and the log says so
    task: asyncio.Task[None] = field(init=False)

    def resume(self) -> None:
        """End the delay."""
        self.resume_at = 0.0
        self.wake.set()


def backoff(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row, 20 % more or less."""
    delay = min(MIN_BACKOFF * 2.0 ** min(failures - 1, 20), MAX_BACKOFF)
    return delay * (0.8 + secrets.randbelow(401) / 1000)


class QueueManager:
    """Stores messages that Microsoft could not accept, and sends them later."""

    def __init__(self, config: Config, graph: GraphClient, accounts_file: AccountsFile,
                 memory: MemoryBudget, name: str) -> None:
        self._config, self._graph, self._accounts_file = config, graph, accounts_file
        self._memory, self._name, self._files = memory, name, QueueFiles(config)
        self._mailboxes: dict[MailboxKey, MailboxQueue] = {}
        # Secrets that devices gave, by tenant and client, as long as a message needs them.
        self._applications: dict[tuple[str, str], Application] = {}
        self._is_stopping = False

    async def start(self) -> None:
        """Lock the directory, and start to send the messages in it. Raises StartError."""
        messages = self._files.open()   # the loop may wait, because it serves nobody yet
        self._deliveries = asyncio.Semaphore(MAX_CONCURRENT_DELIVERIES)
        for message in messages:
            self._admit(message)
        if messages:
            log_event(logging.INFO, "-", "queue-loaded", waiting=len(messages))
        self._watcher = asyncio.ensure_future(self._watch())

    def stop(self) -> set[asyncio.Task[None]]:
        """Start no more attempts; return the tasks of attempts in progress."""
        self._is_stopping = True
        self._watcher.cancel()
        for mailbox in self._mailboxes.values():
            if not mailbox.is_sending:
                mailbox.task.cancel()
        return {mailbox.task for mailbox in self._mailboxes.values() if mailbox.is_sending}

    def close(self) -> None:
        """Unlock the directory."""
        self._files.close()

    def remember_secret(self, application: Application) -> None:
        """Keep the secret that a device gave, if a waiting message needs it."""
        key = application.tenant, application.client
        queues = [mailbox for other, mailbox in self._mailboxes.items() if other[:2] == key]
        if application.relay_holds_secret or not queues:
            return
        if key not in self._applications:       # the delays were due to another secret
            for mailbox in queues:
                mailbox.resume()
        self._applications[key] = application

    async def put(self, message: QueuedMessage, parts: list[bytes | memoryview],
                  application: Application | None = None) -> None:
        """Store a message; when this returns, it is safe. Raises TemporaryError.

        `application` has just failed to send the message, so its mailbox waits first.
        """
        delay = 0.0
        if application and message.key not in self._mailboxes:
            delay = self._graph.throttled_for(message.key) or backoff(1)
            message.next_attempt_at = time.time() + delay
        deadline = time.monotonic() + DISK_TIMEOUT      # add() keeps it, unless it hangs
        # Not future.cancelled: the call would hold its future, hence the message.
        cancelled = threading.Event()
        try:
            await result_before(deadline + GRACE, run_in_thread(
                self._files.add, message, parts, deadline, cancelled.is_set))
        except OSError as error:
            raise TemporaryError(
                "Insufficient system storage, cannot queue the message; try again later",
                452, "4.3.1", level=logging.ERROR, cost=0, facts={
                    "queue": error.strerror or str(error)}) from None
        finally:
            cancelled.set()
        # A second bounce replaces the first; _admit() alone would keep the first.
        self._admit(message, delay).messages[message.id] = message
        if application and not application.relay_holds_secret:
            self._applications.setdefault(message.key[:2], application)

    def _admit(self, message: QueuedMessage, delay: float = 0.0) -> MailboxQueue:
        """Add a stored message to its mailbox's queue; a new queue waits first."""
        mailbox = self._mailboxes.get(message.key)
        if not mailbox:
            mailbox = MailboxQueue(time.monotonic() + delay, int(delay > 0))
            self._mailboxes[message.key] = mailbox
            mailbox.task = asyncio.ensure_future(self._run_mailbox(message.key, mailbox))
        mailbox.messages.setdefault(message.id, message)
        mailbox.wake.set()
        return mailbox

    async def _run_mailbox(self, key: MailboxKey, mailbox: MailboxQueue) -> None:
        """Send the messages of a mailbox until there are no more."""
        while mailbox.messages and not self._is_stopping:
            mailbox.wake.clear()
            delay = max(0.0, mailbox.resume_at - time.monotonic())
            try:
                message = None if delay else self._next_message(mailbox)
                if message:
                    await self._attempt(mailbox, message)
                else:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(mailbox.wake.wait(),
                                               min(delay or MAX_SLEEP, MAX_SLEEP))
            except Exception:           # so that the next message is sent
                log.error("- internal-error mailbox=%s", quote_value(key[2]), exc_info=True)
                mailbox.resume_at = time.monotonic() + MIN_BACKOFF
        if not mailbox.messages:
            del self._mailboxes[key]
            if all(other[:2] != key[:2] for other in self._mailboxes):
                self._applications.pop(key[:2], None)

    def _next_message(self, mailbox: MailboxQueue) -> QueuedMessage | None:
        """Choose the message to send now; None if the secret of all is unknown."""
        ready = [message for message in mailbox.messages.values()
                 if self._find_application(message) or self._is_expired(message)]
        if not ready and not mailbox.is_without_secret:
            message = next(iter(mailbox.messages.values()))
            log_event(logging.WARNING, message.id, "deferred", sender=message.mailbox,
                      waiting=len(mailbox.messages),
                      problem=f"the secret is unknown until {message.login} logs in")
        mailbox.is_without_secret = not ready
        return min(ready, key=lambda item: (item.attempts, item.queued_at), default=None)

    def _is_expired(self, message: QueuedMessage) -> bool:
        return time.time() >= message.queued_at + self._config.spool_lifetime

    def _find_application(self, message: QueuedMessage) -> Application | None:
        """Return the application that sends a message, if its secret is known now."""
        accounts, key = self._accounts_file.accounts, message.key[:2]
        account = accounts.find(message.account) if message.account else None
        if not (account and account.has_credential):
            if key in self._applications:
                return self._applications[key]
            account = next((account for account in accounts if account.has_credential
                            and (account.tenant_id, account.client_id) == key), None)
        return account.as_application() if account else None

    async def _attempt(self, mailbox: MailboxQueue, message: QueuedMessage) -> None:
        """Send a message, or decide what its failure means."""
        application = self._find_application(message)
        message.attempts += 1
        try:
            if not application:         # chosen only because it has expired, so this fails
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
        except (TemporaryError, AccessDenied, AuthError) as error:
            # An admin can still grant the permission, or renew the secret.
            if (isinstance(error, AuthError)
                    and application is self._find_application(message)):
                self._applications.pop(message.key[:2], None)
            await self._defer(mailbox, message, str(error.reply), error.facts)
        except OSError as error:
            await self._defer(mailbox, message, error.strerror or str(error), {})
        except DeliveryError as error:
            await self._fail(mailbox, message, str(error.reply))
        finally:
            mailbox.is_sending = False

    async def _send(self, mailbox: MailboxQueue, message: QueuedMessage,
                    application: Application) -> None:
        total = self._config.max_memory_for_messages
        # Keep half of all free for clients, or what the largest message leaves of it.
        self._memory.check(message.size + min(total // 2, total - self._config.size_limit))
        deadline = time.monotonic() + self._config.upstream_timeout
        self._memory.reserve(message.size)
        try:
            prepared = await result_before(deadline, run_in_thread(lambda: as_stored(
                self._files.content(message), message)))
            response = await self._graph.send(application, prepared, message.id, deadline)
        finally:
            self._memory.release(message.size)
        message.is_sent, mailbox.failures = True, 0
        log_event(logging.INFO, message.id, "sent", sender=message.mailbox,
                  recipients=len(message.recipients), size=message.size,
                  attempts=message.attempts, request_id=response.headers.get("request-id"),
                  queued_seconds=time.time() - message.queued_at)

    async def _defer(self, mailbox: MailboxQueue, message: QueuedMessage, reason: str,
                     facts: Mapping[str, object]) -> None:
        """Wait before the next attempt; an expired message fails instead."""
        if self._is_expired(message) and not message.is_sent:
            await self._fail(mailbox, message, "Message expired: it could not be sent for "
                             f"{self._config.spool_lifetime} seconds; last error: {reason}")
            return
        throttled = self._graph.throttled_for(message.key)
        mailbox.failures += not throttled
        delay = throttled or backoff(mailbox.failures)
        mailbox.resume_at = time.monotonic() + delay
        message.reason, message.next_attempt_at = reason, time.time() + delay
        log_event(logging.WARNING, message.id, "deferred", sender=message.mailbox,
                  attempts=message.attempts, reply=reason, **facts, delay_seconds=delay)
        with contextlib.suppress(OSError):      # the next attempt saves the state
            await self._on_disk(self._files.save, self._files.path(message), message)

    async def _fail(self, mailbox: MailboxQueue, message: QueuedMessage, text: str) -> None:
        """End the attempts: send a bounce, and move the message to failed/."""
        # On disk the flag is off, so that a failure after `spool retry` is bounced again.
        failed = dataclasses.replace(message, reason=text, bounce_sent=False)
        try:
            if message.reverse_path and not message.bounce_sent:
                await self._send_bounce(failed)
                message.bounce_sent = True
            await self._on_disk(self._files.fail, failed)
        except FileNotFoundError:
            self._drop(mailbox, message)
        except (OSError, TemporaryError) as error:
            log_event(logging.ERROR, message.id, "queue-failed", problem=error)
            mailbox.resume_at = time.monotonic() + MIN_BACKOFF
        else:
            mailbox.messages.pop(message.id, None)
            log_event(logging.ERROR, message.id, "failed", sender=message.mailbox,
                      recipients=len(message.recipients), size=message.size,
                      attempts=message.attempts, reply=text,
                      remedy="see `spool show`, fix the cause, then `spool retry`")

    async def _send_bounce(self, message: QueuedMessage) -> None:
        """Queue a bounce to the sender of a message. Raises OSError and TemporaryError."""
        # The ID depends on the message only, so a second bounce overwrites the first.
        bounce_id, now = str(uuid.uuid5(uuid.NAMESPACE_OID, message.id)), time.time()
        header = await self._on_disk(self._files.content, message, message.header_size)
        content = make_bounce(message, header, self._name, bounce_id, now)
        await self.put(dataclasses.replace(
            message, id=bounce_id, reverse_path="", recipients=[message.reverse_path],
            header_size=content.index(b"\r\n\r\n") + 2, size=len(content), is_bounce=True,
            queued_at=now, attempts=0, next_attempt_at=0.0, reason=""), [content])

    def _drop(self, mailbox: MailboxQueue, message: QueuedMessage) -> None:
        """Forget a message whose files were deleted."""
        log_event(logging.INFO, message.id, "dropped", sender=message.mailbox)
        mailbox.messages.pop(message.id, None)

    async def _on_disk(self, call: Callable[..., T], *arguments: object) -> T:
        return await result_before(time.monotonic() + DISK_TIMEOUT,
                                   run_in_thread(call, *arguments))

    async def _watch(self) -> None:
        """Apply the changes that the command line makes; run until cancelled."""
        while True:
            await asyncio.sleep(QUEUE_POLL_INTERVAL)
            try:
                # Without a deadline: if the disk hangs, only this task waits.
                for name, message in (await run_in_thread(self._files.changes)).items():
                    self._apply_change(name, message)
            except Exception as error:      # noqa: BLE001 - go on watching
                log_event(logging.ERROR, "-", "queue-failed", problem=error)
                await asyncio.sleep(MIN_BACKOFF)

    def _apply_change(self, message_id: str, message: QueuedMessage | None) -> None:
        """Retry a changed message at once; None means that it was deleted."""
        if message:
            mailbox = self._admit(message)
            mailbox.messages[message_id].attempts = 0       # so that it is the next
            mailbox.resume()
            return
        for mailbox in self._mailboxes.values():
            if message_id in mailbox.messages:
                self._drop(mailbox, mailbox.messages[message_id])


# ---------------------------------------------------------------------------
# §17  Delivery
#
# Delivery.deliver() takes a message from the end of DATA to its reply:
#
#     prepare     edit the header: sender and recipients; make a draft if it is large
#     claim       if the same message was accepted before, repeat that reply
#     send        Graph; 250 when Microsoft has accepted the message
#     queue       if Microsoft cannot accept it now; 250 when it is on the disk
#
# The message gets one ID here: it is in the log and in the reply (of a duplicate: the first
# ID), it is Graph's client-request-id and the name of the files in the queue.

SMALL_MESSAGE = 65_536          # bytes; a message up to this is edited without a thread,
SMALL_HEADER = 2048             # if the header ends within this; hostile headers took 9 ms
MAX_REMEMBERED = 50_000         # accepted messages; some 20 MB
Accepted = tuple[str, str]      # the ID of an accepted message, and the text of its reply
# The fields of RFC 5322 that identify a message, if they are not empty.
_IDENTITY = re.compile(rb"^(Message-ID|Date)[ \t]*:(?:(?:\r\n)?[ \t])*[^\s]", re.I | re.M)


class DuplicateGuard:
    """Remembers accepted messages, so that a retransmission is not sent again.

    Only a message with a Message-ID and a Date field can be recognized (RFC 5322 section
    3.6.4). Without them two equal messages may both be meant: a device repeats an alarm.
    """

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember messages for `window` seconds; 0 disables the guard."""
        self._window = window
        self._in_progress: dict[bytes, asyncio.Future[None]] = {}
        self._accepted: Cache[bytes, Accepted] = Cache(clock, MAX_REMEMBERED)

    def digest(self, principal: Principal, envelope: Envelope, header: bytes) -> bytes:
        """Hash account, envelope and content; return b"" for an unrecognizable message."""
        if not self._window or len(set(map(bytes.lower, _IDENTITY.findall(header)))) < 2:
            return b""
        digest = hashlib.sha256(repr((
            principal.account.name, principal.application.tenant,
            principal.application.client, envelope.reverse_path,
            sorted(envelope.recipients))).encode())
        digest.update(envelope.message)
        return digest.digest()

    @contextlib.asynccontextmanager
    async def claim(self, digest: bytes, deadline: float) -> AsyncIterator[Accepted | None]:
        """Wait while the same message is in progress; yield it if it was accepted."""
        while digest in self._in_progress:
            if not await wait_until_done(deadline, self._in_progress[digest]):
                raise TemporaryError("The same message is in progress; try again later",
                                     451, "4.4.5")
        if not digest:
            yield None
            return
        self._in_progress[digest] = asyncio.get_running_loop().create_future()
        try:
            yield self._accepted.get(digest)
        finally:
            self._in_progress.pop(digest).set_result(None)

    def remember(self, digest: bytes, message_id: str, text: str) -> None:
        """Remember that a message was accepted with this reply."""
        if digest:
            self._accepted.put(digest, (message_id, text), self._window)


class Outcome(NamedTuple):
    """What became of a message that was accepted; `facts` are for the log."""
    event: str
    text: str               # of the reply
    facts: Mapping[str, object]
    level: int = logging.INFO


class Delivery:
    """Delivers the messages of clients to Microsoft 365, or to the queue."""

    def __init__(self, config: Config, graph: GraphClient,
                 queue_manager: QueueManager | None) -> None:
        self._config, self._graph, self._queue = config, graph, queue_manager
        self._duplicates = DuplicateGuard(config.duplicate_window)

    async def deliver(self, principal: Principal, envelope: Envelope, session: str) -> str:
        """Send or queue a message; return the text of the reply. Raises RelayError."""
        message_id, started = str(uuid.uuid4()), time.monotonic()
        deadline = started + self._config.upstream_timeout
        facts: dict[str, object] = {
            "session": session, "account": principal.account.name or None,
            "sender": envelope.reverse_path, "recipients": len(envelope.recipients),
            "size": len(envelope.message)}
        try:
            message, digest = await self._prepare(principal, envelope, deadline)
            facts.update(sender=message.edited.mailbox, size=message.edited.size,
                         attachments=message.draft and len(message.draft.attachments))
            async with self._duplicates.claim(digest, deadline) as accepted:
                if accepted:
                    outcome = Outcome("repeated", accepted[1], {"first": accepted[0]})
                else:
                    outcome = await self._send(principal, envelope, message, message_id,
                                               deadline)
                    self._duplicates.remember(digest, message_id, outcome.text)
        except asyncio.CancelledError:
            log_event(logging.WARNING, message_id, "aborted", **facts,
                      problem="the relay stops; the message may have been sent")
            raise
        except RelayError as error:
            reply = error.reply         # not changed: others may have the same token error
            log_event(error.level, message_id, "refused", **{
                **facts, **error.facts, "reply": reply}, seconds=time.monotonic() - started)
            raise RelayError(f"{reply.text}, id {message_id}", reply.code, reply.status,
                             close=reply.close, cost=reply.cost) from None
        log_event(outcome.level, message_id, outcome.event, **{**facts, **outcome.facts},
                  seconds=time.monotonic() - started)
        return outcome.text

    async def _prepare(self, principal: Principal, envelope: Envelope,
                       deadline: float) -> tuple[PreparedMessage, bytes]:
        """Prepare a message and hash it, in a thread if it is large."""
        def prepare() -> tuple[PreparedMessage, bytes]:
            message = prepare_message(envelope, principal, self._config)
            return message, self._duplicates.digest(principal, envelope,
                                                    message.edited.original_header)
        if (len(envelope.message) < SMALL_MESSAGE
                and envelope.message.find(b"\r\n\r\n", 0, SMALL_HEADER) >= 0):
            return prepare()
        try:
            return await result_before(deadline, run_in_thread(prepare))
        except TimeoutError:
            raise TemporaryError("Processing takes too long; try again later") from None

    async def _send(self, principal: Principal, envelope: Envelope,
                    message: PreparedMessage, message_id: str, deadline: float) -> Outcome:
        """Send a message through Graph, or queue it for a temporary error."""
        application, facts = principal.application, {}
        try:
            response = await self._graph.send(application, message, message_id, deadline,
                                              is_live=True)
        except asyncio.CancelledError:
            if not self._queue:
                raise
            reason = "the relay stops"
        except AuthError as error:      # the secret has changed since the login
            raise TemporaryError("Microsoft no longer accepts this login; log in again",
                                 421, "4.7.0", close=True,
                                 facts={**error.facts, "entra": error.reply.text}) from None
        except TemporaryError as error:
            if not self._queue:
                raise
            reason, facts = str(error.reply), {**error.facts, "reply": error.reply}
        else:
            if self._queue:
                self._queue.remember_secret(application)
            return Outcome("sent", f"Accepted by Microsoft 365, id {message_id}",
                           {"request_id": response.headers.get("request-id")})
        edited, account, sender = message.edited, principal.account, envelope.reverse_path
        # A bounce goes to from_email, because the device's own sender may not exist.
        sender = sender and (account.from_email or sender)
        queued = QueuedMessage(
            message_id, account.name, application.tenant, application.client,
            edited.mailbox, sender, list(envelope.recipients.values()),
            len(edited.header), edited.size, False, time.time(), 1, 0.0, reason)
        try:
            await self._queue.put(queued, [edited.header, edited.body], application)
        except TemporaryError as error:
            error.facts.update(facts, reply=error.reply)
            raise
        return Outcome("queued", f"Queued, id {message_id}", facts, logging.WARNING)


# ---------------------------------------------------------------------------
# §18  TLS
#
# The relay's own certificate comes from two PEM files or from Key Vault. It is read once at
# start, because the user of RUN_AS may be unable to read the key: a renewed certificate
# needs a restart. An account can set `tls_min_version` for its networks at any time, so
# there is an SSLContext for each TLS version, and the server picks one for a connection.

OPENSSL_TIMEOUT = 10.0          # seconds for one run of the openssl command
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
    **dict.fromkeys(("TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
                     "SSLV3_ALERT_BAD_CERTIFICATE"), "the client does not trust the "
                    "relay's certificate; import it on the device"),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the relay's certificate has expired"}

# HTTP status of Key Vault -> what the administrator can do.
VAULT_REMEDIES: Mapping[int, str] = {
    401: "the relay's identity belongs to another tenant than the vault",
    403: "give the relay's identity the role Key Vault Secrets User, and allow the relay "
         "in the vault's firewall",
    404: "there is no such certificate"}

# Since Python 3.11 asyncio has a 256 KiB buffer for each TLS connection; a record has 16.
_protocol: Any = getattr(getattr(asyncio, "sslproto", None), "SSLProtocol", None)
if hasattr(_protocol, "max_size"):
    _protocol.max_size = 16384


def make_tls_contexts(config: Config) -> dict[str, ssl.SSLContext]:
    """Load the certificate; return contexts by minimum version; {} if TLS_SOURCE=off.

    A version that OpenSSL lacks is left out. Raises ConfigError, StartError.
    """
    if config.tls_source == "off":
        return {}
    if not has_tls_version(config.tls_min_version):
        raise ConfigError(f"TLS_MIN_VERSION={config.tls_min_version!r}: must be a version "
                          "that the OpenSSL of this Python has")
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
        with contextlib.suppress(ssl.SSLError, ValueError):     # a version OpenSSL lacks
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
        # OpenSSL 3 has these versions only at security level 0: their handshake uses SHA-1.
        # If TLS_MIN_VERSION is one of them, all contexts must accept a certificate as old.
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
    """Return start and end of a server certificate's validity in Unix time, or (0, inf).

    The ssl module shows a certificate only after a handshake, so this does one in memory.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # X509_V_FLAG_PARTIAL_CHAIN: the root may be missing; NO_CHECK_TIME: it may be expired.
    client.verify_flags |= 0x80000 | 0x200000
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
    """Convert PKCS#12 to PEM without writing the key to disk. Raises ValueError."""
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
    with contextlib.closing(HttpPool(config.endpoints)) as pool:
        try:
            response = await AzureClient(config, pool, Tokens(config, pool)).get(
                f"{config.azure_key_vault_url}/secrets/{config.azure_key_vault_cert_name}"
                "?api-version=7.4", CLOUDS[config.azure_cloud].vault,
                {"Accept": "application/json"}, time.monotonic() + config.upstream_timeout)
        except TemporaryError as error:
            raise StartError(f"{name}: {printable_ascii(str(error))}"
                             f"{format_fields(error.facts)}") from None
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
    """Provide data as a private file for ssl, in memory or else on disk."""
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
# §19  Server
#
# Relay is the place where the parts above are put together. Server accepts connections
# within the limits. Connection is the shell of a Session: it moves bytes, keeps time, does
# the TLS handshake, and passes logins to the Authenticator and messages to the Delivery.
# serve() starts and stops it all.

READ_SIZE = 16384               # bytes; a TLS record has no more
HANDSHAKE_TIMEOUT = 30.0        # seconds
NO_PROGRESS_TIMEOUT = 3600.0    # seconds between messages, without an accepted login
LINGER = 1                      # second for the last reply, and for the end of TLS
BACKLOG = 1000                  # connections that wait to be accepted
SPARE_FILES = 100               # file descriptors kept for connections to Microsoft
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
Sockets = list[tuple[socket.socket, bool]]      # True marks a socket for implicit TLS
_STOPPING = Reply(421, "4.3.2", "The relay is shutting down; try again later")


class Relay:
    """The parts of a relay, put together."""

    def __init__(self, config: Config, microsoft: Any = None) -> None:
        """Create the parts; `microsoft` is a DemoMicrosoft or None. Raises ConfigError."""
        self.config = config
        host = socket.gethostname()     # does not ask the DNS
        self.name = config.server_name or (
            host if re.fullmatch(_HOST_NAME, host) else "localhost")
        self.memory = MemoryBudget(config.max_memory_for_messages)
        self.accounts_file = AccountsFile(config)
        if config.accounts_file:
            self.accounts_file.load()
        self._pool = HttpPool(config.endpoints)
        self._tokens = microsoft or Tokens(config, self._pool)
        self._table = AccountsTable(config, AzureClient(
            config, self._pool, self._tokens)) if config.azure_tables_url else None
        self._graph = microsoft or GraphClient(config, self._pool, self._tokens)
        self.queue = QueueManager(config, self._graph, self.accounts_file, self.memory,
                                  self.name) if config.spool_directory else None
        self.authenticator = Authenticator(
            config, self.accounts_file, self._table, self._tokens,
            self.queue.remember_secret if self.queue else None)
        self.delivery = Delivery(config, self._graph, self.queue)
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Check the table, watch ACCOUNTS_FILE, send queued messages. Raises StartError."""
        if self.config.must_have_account and self._table:
            try:
                await self._table.check(time.monotonic() + self.config.upstream_timeout)
            except TemporaryError as error:
                raise StartError("ACCOUNTS_REQUIRED=true, and the table cannot be read: "
                                 f"{printable_ascii(str(error))}"
                                 f"{format_fields(error.facts)}") from None
        if self.config.accounts_file:
            self._watcher = asyncio.ensure_future(self.accounts_file.watch())
        if self.queue:      # comes last, because a failed start would cut off its messages
            await self.queue.start()

    def close(self) -> None:
        """Close the connections to Microsoft, and release the queue."""
        if self._watcher:
            self._watcher.cancel()
        self._pool.close()
        if self.queue:
            self.queue.close()


class Connection:
    """A client's connection: the shell of a Session."""

    def __init__(self, relay: Relay, contexts: Mapping[str, ssl.SSLContext],
                 address: IpAddress | None, reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter, *, implicit_tls: bool) -> None:
        """Start to serve the client, in `task`."""
        self.session_id = secrets.token_hex(4)
        self.client_prefix = client_prefix(address)
        self.is_running = self.is_stopping = False
        self.policy = relay.authenticator.policy(address)
        self._loop = asyncio.get_running_loop()
        self._relay, self._contexts, self._address = relay, contexts, address
        # asyncio closes the transport of a writer that is collected, so keep the first.
        self._reader, self._writer, self._plain_writer = reader, writer, writer
        self._session = Session(relay.config, relay.name, self.policy, relay.memory,
                                self._log_line, self._log_refusal)
        self._progress = -1             # Session.progress when the deadline was set
        self._deadline = 0.0            # for the current command
        self._accepted_at = time.monotonic()        # the last login, message or STARTTLS
        self.task = asyncio.ensure_future(self._run(implicit_tls))

    async def _run(self, implicit_tls: bool) -> None:
        """Serve the client until either side closes the connection."""
        self.is_running = True
        reason = "the relay stops"
        try:
            if implicit_tls:            # there must be no await before, see _start_tls()
                await self._start_tls()
            self._session.greet()
            reason = await self._serve()
        except OSError as error:
            reason = (TLS_PROBLEMS.get(getattr(error, "reason", None) or "")
                      or str(error) or type(error).__name__)
        except asyncio.CancelledError:
            self._writer.write(bytes(_STOPPING))
        except Exception:
            log.error("%s internal-error", self.session_id, exc_info=True)
            reason = "internal error"
            self._writer.write(bytes(Reply(421, "4.3.0", "Internal error, try again")))
        self._session.reset()
        self.is_running = False         # closing takes LINGER at most; do not cancel it
        log_event(logging.INFO, self.session_id, "disconnected", reason=reason)
        await self._close()

    def stop(self) -> None:
        """End the connection as soon as this loses no message."""
        self.is_stopping = True
        # A task that has not started yet must start, because it closes the connection.
        if self.is_running and not self._session.holds_message:
            self.task.cancel()

    async def _serve(self) -> str:
        """Do what the session asks for; return why it ended."""
        while True:
            if self._session.holds_message:
                pass                    # the client must get the reply to its message
            elif self.is_stopping:
                self._session.end(_STOPPING, "the relay stops")
            elif time.monotonic() > self._accepted_at + NO_PROGRESS_TIMEOUT:
                self._session.end(Reply(421, "4.7.0", "Too long without an accepted login "
                                                      "or message"), "no progress")
            event = self._session.next_event()
            if isinstance(event, StartTls):
                # The bytes that follow the 220 are for the handshake.
                self._writer.transport.pause_reading()      # type: ignore[attr-defined]
            if replies := self._session.output():
                await self._send(replies)
            if isinstance(event, Close):
                return event.reason
            await (self._read() if event is None else self._handle(event))

    async def _handle(self, event: StartTls | Authenticate | Deliver) -> None:
        """Do what an event asks for, and pass the result to the session."""
        try:
            if isinstance(event, StartTls):
                await self._start_tls()
            elif isinstance(event, Authenticate):
                self._session.authenticated(await self._relay.authenticator.log_in(
                    event, self._address, self.session_id))
            else:
                assert self._session.principal is not None      # MAIL requires a login
                self._session.delivered(await self._relay.delivery.deliver(
                    self._session.principal, event.envelope, self.session_id))
            self._accepted_at = time.monotonic()
        except RelayError as error:
            self._session.refuse(error.reply)
        self._progress = -1             # that time does not count against the client

    async def _send(self, replies: bytes) -> None:
        """Send replies; abort the connection if the client does not read them."""
        self._writer.write(replies)
        # Not wait_for(), which can lose the cancellation that stop() requests.
        timer = self._loop.call_later(self._relay.config.client_timeout,
                                      self._writer.transport.abort)
        try:
            await self._writer.drain()
        finally:
            timer.cancel()

    async def _read(self) -> None:
        """Pass input to the session. End it if the client makes no progress in time."""
        if self._progress != self._session.progress:
            self._progress = self._session.progress
            self._deadline = time.monotonic() + self._relay.config.client_timeout
        # Not wait_for(), which would create a task for each read.
        timer = self._loop.call_later(self._deadline - time.monotonic(), self._time_out)
        try:
            self._session.receive(await self._reader.read(READ_SIZE))
        finally:
            timer.cancel()

    def _time_out(self) -> None:
        """End the session, and wake _read()."""
        self._session.end(Reply(421, "4.4.2", "Error: timeout exceeded"), "timed out")
        self._writer.transport.pause_reading()      # type: ignore[attr-defined]
        self._reader.feed_eof()                     # a reader accepts no data after EOF

    async def _start_tls(self) -> None:
        """Do the handshake. Raises OSError.

        StreamWriter.start_tls() would keep what came in the clear (CVE-2011-0411). Here the
        new reader has seen nothing, and asyncio reads nothing for the old reader between
        pause_reading(), or the start of a new connection's task, and the first await.
        """
        context = self._contexts[self.policy.tls_min_version]
        reader = asyncio.StreamReader(loop=self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        try:
            transport = await self._loop.start_tls(
                self._writer.transport, protocol, context, server_side=True,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT)
        except BaseException:
            self._writer.transport.abort()      # its protocol does not learn of the end
            raise
        assert transport is not None
        protocol.connection_made(transport)
        self._reader = reader
        self._writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        self._session.tls_started()
        log_event(logging.INFO, self.session_id, "tls",
                  version=self._writer.get_extra_info("ssl_object").version(),
                  cipher=self._writer.get_extra_info("cipher")[0])

    async def _close(self) -> None:
        """Close the connection. Wait up to LINGER for the client to get the last reply."""
        # In Python 3.9 only the transport below TLS knows that the connection is closed.
        if not (self._plain_writer.transport.is_closing()
                or self._writer.transport.is_closing()):
            self._writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._writer.wait_closed(), LINGER)
        # The transport of TLS would wait without end for a client that does not read, so
        # abort the transport below it. asyncio fails if the socket is already closed.
        if self._plain_writer.get_extra_info("socket").fileno() >= 0:
            self._plain_writer.transport.abort()

    def _log_line(self, mark: str, line: object) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s %s", self.session_id, mark, quote_value(line))

    def _log_refusal(self, error: RelayError) -> None:
        log_event(error.level, self.session_id, "refused", reply=error.reply)


class Server:
    """Accepts connections within the limits."""

    def __init__(self, relay: Relay, contexts: Mapping[str, ssl.SSLContext]) -> None:
        """Create it; `contexts` are by TLS_MIN_VERSION, and empty without TLS."""
        self._relay, self._contexts = relay, contexts
        self._connections: set[Connection] = set()
        self._is_stopping = False
        # A connection needs a file descriptor, and perhaps a second to reach Microsoft.
        limit = raise_open_files(2 * relay.config.max_connections + 2 * SPARE_FILES)
        self._client_files = limit - min(SPARE_FILES, limit / 2)

    async def run(self, sockets: Sockets, stop: asyncio.Event) -> None:
        """Serve on bound sockets until `stop`, then let messages in flight finish."""
        servers = []
        for sock, implicit_tls in sockets:
            accept = functools.partial(self._accept, implicit_tls)
            # asyncio accepts as many connections at once as its own backlog says, and logs
            # each failure. If no file descriptor is left, 1 keeps that to one line.
            servers.append(await asyncio.start_server(accept, sock=sock, backlog=1))
            sock.listen(BACKLOG)
            tls = "implicit" if implicit_tls else "starttls" if self._contexts else "off"
            address, port, *_ = sock.getsockname()
            log_event(logging.INFO, "-", "listening", address=address, port=port, tls=tls)
        await stop.wait()
        self._is_stopping = True
        log_event(logging.INFO, "-", "stopping", connections=len(self._connections))
        with contextlib.suppress(NotImplementedError):      # on Windows
            for sock, _ in sockets:
                asyncio.get_running_loop().remove_reader(sock)
        # Some turns of the loop, to start connections that asyncio has already accepted.
        for _ in range(3):
            await asyncio.sleep(0)
        for server in servers:
            server.close()
        await self._drain()

    async def _drain(self) -> None:
        """Let messages in flight finish, then abort the rest."""
        for connection in list(self._connections):
            connection.stop()
        tasks = {connection.task for connection in self._connections}
        if self._relay.queue:
            tasks |= self._relay.queue.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._relay.config.shutdown_timeout)
            for task in late:
                task.cancel()
            if late:
                log_event(logging.WARNING, "-", "aborted", connections=len(late))
                # Their messages are queued now, which may take the full DISK_TIMEOUT.
                await asyncio.wait(late, timeout=GRACE + (
                    DISCARD_TIMEOUT + DISK_TIMEOUT if self._relay.queue else 0.0))

    def _accept(self, implicit_tls: bool, reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter) -> None:
        """Start to serve a new connection, or refuse it if it exceeds a limit."""
        sock = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):      # without it some replies take 40 ms more
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = writer.get_extra_info("peername")
        address = parse_ip_address(peer[0]) if peer else None
        client = address or "unknown"
        if problem := self._limit_reached(client_prefix(address), sock.fileno()):
            if not implicit_tls:
                writer.write(bytes(Reply(421, "4.7.0", f"{problem}; try again later")))
            writer.close()
            log_event(logging.WARNING, "-", "connection-refused", client=client,
                      reason=problem)
            return
        connection = Connection(self._relay, self._contexts, address, reader, writer,
                                implicit_tls=implicit_tls)
        connection.is_stopping = self._is_stopping      # if asyncio accepted it before
        self._connections.add(connection)
        connection.task.add_done_callback(lambda _: self._connections.discard(connection))
        anonymous = connection.policy.anonymous
        log_event(logging.INFO, connection.session_id, "connected", client=client,
                  port=writer.get_extra_info("sockname")[1],
                  account=anonymous.account.name if anonymous else None)

    def _limit_reached(self, prefix: bytes, descriptor: int) -> str:
        """Return the limit that a new connection exceeds, as a sentence, or ""."""
        if descriptor >= self._client_files:    # the system gives the lowest free number
            return "Too many connections for the limit of open files"
        if len(self._connections) >= self._relay.config.max_connections:
            return "Too many connections"
        prefixes = [connection.client_prefix for connection in self._connections]
        if prefixes.count(prefix) >= self._relay.config.max_connections_per_client:
            return "Too many connections from your address"
        return ""


def open_listeners(config: Config) -> Sockets:
    """Open the ports. Raises StartError."""
    sockets = [(_listen(config, "SMTP_PORT", config.smtp_port), False)]
    if config.smtps_port:
        sockets.append((_listen(config, "SMTPS_PORT", config.smtps_port), True))
    return sockets


def _listen(config: Config, setting_name: str, port: int) -> socket.socket:
    is_dual = not config.listen_address and socket.has_dualstack_ipv6()
    host = "::" if is_dual else config.listen_address or "0.0.0.0"
    if host.lower() == "localhost":     # it may resolve to ::1 only
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
    """Become a user, with this user's groups only. Raises ConfigError and StartError."""
    if not user:
        return
    try:
        entry = pwd.getpwnam(user)
        if os.geteuid() == 0:
            os.initgroups(user, entry.pw_gid)
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
        else:
            log_event(logging.INFO, "-", "run-as-ignored", run_as=user, reason="not root")
    except (AttributeError, KeyError):      # AttributeError: this system has no users
        raise ConfigError(f"RUN_AS={user!r}: must be the name of a user of this system, or "
                          "empty") from None
    except OSError as error:
        raise StartError(f"RUN_AS={user}: cannot become this user: {error.strerror}; start "
                         "as another user, with RUN_AS empty") from None


def raise_open_files(wanted: int) -> float:
    """Raise the soft limit of open files to `wanted` if possible; return the limit."""
    if resource is None:
        return math.inf
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:              # RLIM_INFINITY is -1 or very large
        limit = min(wanted, hard) if hard >= 0 else wanted
        # macOS and sandboxes can refuse a limit below the hard limit.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            soft = limit
    return soft if soft >= 0 else math.inf


def handle_signals(stop: Callable[[], object], reload: Callable[[], object]) -> None:
    """Call `stop` at SIGTERM or SIGINT, `reload` at SIGHUP; a second stop ends at once.

    All three need a handler: PID 1 of a container has no default action, and elsewhere
    SIGHUP would end the relay. Windows lacks the loop's add_signal_handler().
    """
    def handle(number: int, frame: object) -> None:
        if number in STOP_SIGNALS:
            for each in STOP_SIGNALS:
                signal.signal(each, lambda number, _: os._exit(128 + number))
        with contextlib.suppress(RuntimeError):         # the loop may have ended
            (stop if number in STOP_SIGNALS else reload)()

    for number in (*STOP_SIGNALS, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, handle)


def serve(environ: Mapping[str, str], arguments: argparse.Namespace,
          microsoft: Any = None) -> None:
    """Run the relay until a signal. Raises ConfigError, StartError."""
    config = Config.from_environ(environ)
    with logging_to_stderr(config.log_level):
        handle_signals(lambda: sys.exit(0), lambda: None)   # nothing has started yet
        contexts = make_tls_contexts(config)
        relay = Relay(config, microsoft)
        sockets = open_listeners(config)
        drop_privileges(config.run_as)
        relay.accounts_file.check_access()
        if microsoft:
            microsoft.print_instructions(config, sockets[0][0].getsockname()[1])
        asyncio.run(_run(relay, Server(relay, contexts), sockets))


async def _run(relay: Relay, server: Server, sockets: Sockets) -> None:
    loop = asyncio.get_running_loop()
    # Called for errors outside of tasks, such as accept() without free file descriptors.
    loop.set_exception_handler(lambda _, context: log_event(
        logging.ERROR, "-", "internal-error", problem=context.get("message"),
        error=context.get("exception")))
    stop = asyncio.Event()
    try:
        await relay.start()
        soon, accounts_file = loop.call_soon_threadsafe, relay.accounts_file
        with contextlib.suppress(NotImplementedError):      # on Windows
            # With it any signal wakes the loop, even just before the loop sleeps.
            loop.add_signal_handler(signal.SIGTERM, stop.set)
        handle_signals(lambda: soon(stop.set), lambda: soon(accounts_file.request_reload))
        await server.run(sockets, stop)
    finally:
        relay.close()
    log_event(logging.INFO, "-", "stopped")


# ---------------------------------------------------------------------------
# §20  Demo
#
# The demo runs the real server with DemoMicrosoft in place of Tokens and GraphClient and
# without TLS, RUN_AS, queue, table. It listens on 127.0.0.1 unless LISTEN_ADDRESS is set.

OUTBOX = pathlib.Path("outbox")


class DemoMicrosoft:
    """Replaces Tokens.get() and GraphClient.send(): saves messages as files."""

    async def get(self, application: Application, deadline: float) -> str:
        """Accept a login: return a token, as Tokens.get() does."""
        return "token"

    async def send(self, application: Application, message: PreparedMessage,
                   message_id: str, deadline: float, *, is_live: bool) -> HttpResponse:
        """Save a message of any size, after its edits. Raises DeliveryError."""
        path = OUTBOX / f"{time.strftime('%Y%m%d-%H%M%S')}-{message_id}.eml"
        edited = message.edited
        try:
            await result_before(deadline, run_in_thread(lambda: path.write_bytes(
                edited.header + edited.body)))
        except OSError as error:
            raise DeliveryError(f"{path}: {error.strerror}", 452, "4.3.1",
                                cost=0) from None
        print(f"{path}: {edited.size} bytes from {quote_value(edited.mailbox)}", flush=True)
        return HttpResponse(202, {}, b"")

    def print_instructions(self, config: Config, port: int) -> None:
        """Print how to log in, and commands that send a first message."""
        ids = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
        user, address = config.username_delimiter.join(ids), config.listen_address
        host = "127.0.0.1" if address in ("localhost", "0.0.0.0", "::") else address
        in_url = f"[{host}]" if ":" in host else host
        print(f"""\
The relay listens on {address} port {port}, without TLS, and saves messages in outbox/.
For a printer, start it with LISTEN_ADDRESS=0.0.0.0. Log in with any password and user name
{user}
Send a first message from another terminal:

  printf 'Subject: Hello\\n\\nIt works.\\n' | curl \\
    smtp://{urllib.parse.quote(user, safe='')}:demo@{in_url}:{port} \\
    --mail-from scanner@example.com --mail-rcpt you@example.com --upload-file -

or, without curl:

  python3 -c "import smtplib; s = smtplib.SMTP('{host}', {port}); \\
  s.login('{user}', 'demo'); \\
  s.sendmail('scanner@example.com', 'you@example.com', 'Subject: Hello\\n\\nIt works.')"

Stop with Ctrl-C.\n""", flush=True)


def demo(environ: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Run the relay with an outbox instead of Microsoft. Raises ConfigError, StartError."""
    values = {**environ, "TLS_SOURCE": "off", "SMTPS_PORT": "0", "REQUIRE_TLS": "false",
              "RUN_AS": "", "SPOOL_DIRECTORY": "", "AZURE_TABLES_URL": "",
              "LISTEN_ADDRESS": environ.get("LISTEN_ADDRESS", "").strip() or "127.0.0.1"}
    Config.from_environ(values)         # its errors come before the directory is created
    try:
        OUTBOX.mkdir(exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot create the directory outbox: {error.strerror}") from None
    serve(values, arguments, DemoMicrosoft())


# ---------------------------------------------------------------------------
# §21  Explain
#
# The command `explain` prints what the relay would do with a message, without any network:
#
#   file --> Session --> Envelope --> prepare_message() --> printed, or the first refusal
#
# Session and prepare_message() are the code of the server. _receive() plays a client that
# has logged in under TLS as TENANT@CLIENT, so settings of accounts do not apply.

def explain(environ: Mapping[str, str], arguments: argparse.Namespace) -> int:
    """Print what the relay would do with the message in a file. Raises ConfigError."""
    if not "".join([arguments.sender, *arguments.recipients]).isprintable():
        raise ConfigError("an address contains control characters")
    try:
        message = pathlib.Path(arguments.file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{arguments.file}: cannot be read: {error.strerror}") from None
    # The terminal may be unable to show all characters of a header.
    sys.stdout.reconfigure(errors="backslashreplace")   # type: ignore[union-attr]
    config = Config.from_environ(environ)
    try:
        envelope = _receive(config, message, arguments.sender, arguments.recipients)
        edited, draft = prepare_message(envelope, Account().as_principal(config), config)
    except RelayError as error:
        print(f"Refused: {error.reply}")
        return 1
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
    return 0


def _receive(config: Config, data: bytes, sender: str, recipients: list[str]) -> Envelope:
    """Pass the message through a Session. Raises RelayError with the first refusal."""
    def fail(error: RelayError) -> None:
        raise error

    session = Session(config, "explain", on_refusal=fail)
    session.tls_started()
    session.authenticated(Account().as_principal(config, username="explain"))
    utf8 = "" if "".join([sender, *recipients]).isascii() else " SMTPUTF8"
    lines = ["EHLO explain", f"MAIL FROM:<{sender}> SIZE={len(data)}{utf8}",
             *(f"RCPT TO:<{recipient}>" for recipient in recipients), "DATA", ""]
    session.receive("\r\n".join(lines).encode("utf-8", "surrogateescape"))
    if data:        # the last line of a file can end with LF or without any line end
        data = data.removesuffix(b"\n").removesuffix(b"\r") + b"\r\n"
    session.receive(b"." * data.startswith(b".") + data.replace(b"\r\n.", b"\r\n.."))
    session.receive(b".\r\n")
    event = session.next_event()
    if not isinstance(event, Deliver):  # but Close, for which fail() is not called
        raise ConfigError("an address is too long")
    return event.envelope


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
# §22  Command line
#
# A function for each command; serve(), demo() and explain() are above. It gets the
# environment and the parsed arguments, prints its result, and returns the exit status:
#
#   0, None   success
#   1         StartError: a port, the network, the TLS files or the queue cannot be used
#   1         `explain`: the relay would refuse the message; `spool`: there is no such ID
#   2         ConfigError: a setting, an argument or ACCOUNTS_FILE is wrong
#
# main() turns the two errors into a line on standard error and their status.

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
    if not (address := parse_ip_address(arguments.match)):
        raise ConfigError(f"{arguments.match!r} is not an IP address")
    policy = file.accounts.match_address(address, config)
    anonymous = f"as [{policy.anonymous.account.name}]" if policy.anonymous else "no"
    names = [f"[{account.name}]" for account in file.accounts
             if (account.password or not account.has_credential)
             and account.allows_address(address)]
    print(f"{address}\n"
          f"without login:    {anonymous}\n"
          f"require_tls:      {str(policy.require_tls).lower()}\n"
          f"tls_min_version:  {policy.tls_min_version}\n"
          f"may log in as:    {' '.join(names) or 'none'}")


def describe_account(account: Account) -> str:
    """Return an account as a section of ACCOUNTS_FILE, without its secrets."""
    lines = [f"[{account.name}]"]
    for key, item in settings_of(Account).items():
        value = getattr(account, key)
        text = (", ".join(map(str, value)) if isinstance(value, tuple) else
                str(value).lower() if isinstance(value, bool) else str(value or ""))
        if text and not (key == "client_secret" and account.client_secret_file):
            lines.append(f"{key} = {item.show(text)}")
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
        os.listdir(files.queue)     # glob() in read_all() hides an error of the directory
        messages = [item for directory in (files.queue, files.failed)
                    for item in files.read_all(directory) if wanted in (None, item[0].stem)]
        messages.sort(key=lambda item: item[1].queued_at if item[1] else math.inf)
        if not messages:
            print("There is no such message." if wanted else "The queue is empty.")
        for path, message in messages:
            if action == "drop":
                files.remove(path)
                files.notify(path.stem)
            elif action in ("list", "show"):
                print(describe_message(path, message))
                if action == "show":
                    text = decode_text(path.with_suffix(".eml").read_bytes())
                    print(*map(escape_unprintable, text.splitlines()), sep="\n")
            elif message and (wanted or path.parent == files.queue):
                # Without an ID, `retry` leaves the failed messages where they are.
                if path.parent == files.failed:
                    files.retry(message)
                files.notify(message.id)
                print(f"{message.id} will be retried now. If the relay does not know its "
                      f"secret, it waits until {message.login} logs in")
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
    commands = parser.add_subparsers(metavar="command")

    def add(name: str, run: Callable[..., object], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text,
                                      description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    add("serve", serve, "run the relay (default)")
    add("demo", demo, "try the relay without an account; it saves messages to outbox/")
    command = add("explain", explain, "show what the relay would do with a message, "
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
    return parser


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
