#!/usr/bin/env python3
"""Accept mail over SMTP, and send it through Microsoft 365.

Printers, scanners, NAS boxes and old applications that can only say SMTP with a user
name and a password log in here. The relay trades these for an OAuth 2.0 token (client
credentials) and hands each message to Microsoft Graph. It keeps no queue: a device is
told "250" when Microsoft has accepted the message, and at no other time.

    python3 smtp_oauth_relay.py demo      try it, without any account
    python3 smtp_oauth_relay.py           serve, configured by environment variables
    python3 smtp_oauth_relay.py --help    the variables

What it touches: it listens on SMTP_PORT (and SMTPS_PORT), reads the two TLS files, and
connects to AZURE_AUTHORITY_HOST and GRAPH_ENDPOINT, through HTTPS_PROXY if that is set.
It writes nothing but its log, to standard error; only the demo writes files (outbox/).

    device --SMTP--> Connection --bytes--> Session       the protocol, without I/O
                         |  Authenticate, Deliver        its events
                       Relay --> Tokens --HTTPS--> Entra ID
                         |
                       Graph --HTTPS--> Microsoft 365     in worker threads

Contents (search for the number; each section uses only those above it)

    §1   Replies and errors         Reply, RelayError and its kinds
    §2   Configuration              Config, of which every field is a setting
    §3   SMTP grammar               paths, parameters, base64
    §4   SMTP session               Session: bytes in; events and bytes out
    §5   Credentials                what a user name means
    §6   Messages                   who gets it is the envelope, no one else
    §7   Microsoft's answers        which answer is which reply
    §8   Log                        one line for an event        <- I/O starts here
    §9   HTTP                       HttpPool
    §10  Tokens                     Tokens: one request for all who need the same
    §11  Graph                      Graph: sendMail, 4 at once for a mailbox
    §12  TLS                        the relay's own certificate
    §13  Server                     Connection, Server
    §14  Demo                       a stand-in for Microsoft
    §15  Command line               main
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import collections
import contextlib
import dataclasses
import datetime
import email.utils
import enum
import errno
import functools
import hmac
import http.client
import http.server
import ipaddress
import json
import logging
import logging.handlers
import math
import os
import pathlib
import queue
import re
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
import typing
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, Union

try:
    import pwd
    import resource
except ImportError:                     # Windows has neither users nor limits to set
    pwd = resource = None               # type: ignore[assignment]

__version__ = "1.0.0"
USER_AGENT = f"smtp-oauth-relay/{__version__}"

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

GRAPH_MESSAGE_LIMIT = 3_145_728     # octets: 4 MiB of request, of which base64 leaves 3/4
PROXY_VARIABLES = ("https_proxy", "HTTPS_PROXY")


class Setting(NamedTuple):
    """How a setting is read (ValueError says what is accepted) and explained."""

    parse: Callable[[str], Any]
    default: str
    help: str


def setting(parse: Callable[[str], Any], default: str, text: str) -> Any:
    """Declare a field of Config; its variable is the field's name in upper case."""
    return field(default_factory=lambda: parse(default),
                 metadata={"setting": Setting(parse, default, text)})


def _text(text: str) -> str:
    if not text.isprintable() or not text.isascii():
        raise ValueError("printable ASCII text")
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


def _host_name(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", text):
        raise ValueError("a host name such as relay.example.com")
    return text


def _address(text: str) -> str:
    if text and text.lower() != "localhost":
        try:
            ipaddress.ip_address(text)
        except ValueError:
            raise ValueError("an IP address of this machine, localhost, or nothing for "
                             "all addresses") from None
    return text


def _user(text: str) -> str:
    if text and pwd is None:
        raise ValueError("nothing: this system has no users to become")
    if text:
        try:
            pwd.getpwnam(text)
        except KeyError:
            raise ValueError("the name of a user of this system, or nothing") from None
    return text


def _ciphers(text: str) -> str:
    if text:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(text)
        except (ssl.SSLError, UnicodeError):
            raise ValueError("an OpenSSL cipher list that names a known cipher") from None
    return text


def _tls_source(text: str) -> str:
    if text.lower() == "keyvault":
        raise ValueError("file or off; this version cannot read Azure Key Vault, so "
                         "download the certificate and use TLS_SOURCE=file")
    return _choice("file", "off")(text)


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


def is_loopback(host: str) -> bool:
    """Say whether a host in a URL is this machine, without looking it up."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_count = _whole(1, 1_000_000)


@dataclass(frozen=True)
class Config:
    """The settings. Times are in seconds, sizes in octets."""

    # Server
    listen_address: str = setting(
        _address, "", "Address to listen on. Empty: all, IPv4 and IPv6.")
    smtp_port: int = setting(
        _whole(0, 65535), "8025", "Port for SMTP with STARTTLS. 0 picks a free one.")
    smtps_port: int = setting(
        _whole(0, 65535), "0", "Port for SMTP with TLS from the first octet. 0: none.")
    server_name: str = setting(
        _host_name, "", "Name in the greeting. Empty: this machine's host name.")
    server_greeting: str = setting(
        _text, "Microsoft Graph SMTP OAuth Relay", "Text in the greeting.")
    run_as: str = setting(
        _user, "", "User to become once ports are open and the TLS key is read. "
        "Empty: stay.")
    log_level: str = setting(
        _choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), "INFO",
        "Least level that is logged; DEBUG shows the SMTP dialogue without secrets.")

    # TLS with devices
    tls_source: str = setting(
        _tls_source, "file", "Where the relay's certificate is: file, or off for no TLS.")
    tls_cert_filepath: str = setting(
        str, "certs/cert.pem", "PEM file of the certificate and its intermediates.")
    tls_key_filepath: str = setting(
        str, "certs/key.pem", "PEM file of the certificate's private key.")
    tls_min_version: str = setting(
        _choice("1.0", "1.1", "1.2", "1.3"), "1.2",
        "Oldest TLS version accepted; old printers need 1.0.")
    tls_cipher_suite: str = setting(
        _ciphers, "", "OpenSSL cipher list. Empty: OpenSSL's own.")
    require_tls: bool = setting(
        _boolean, "true", "Whether devices may log in under TLS only.")

    # Signing in and sending
    username_delimiter: str = setting(
        _choice("@", ":", "|"), "@",
        "What stands between tenant and client in a user name.")
    azure_authority_host: str = setting(
        _endpoint, "https://login.microsoftonline.com", "Where tokens come from.")
    graph_endpoint: str = setting(
        _endpoint, "https://graph.microsoft.com", "Microsoft Graph; the token's scope too.")

    # Limits
    max_message_size: int = setting(
        _whole(1000, GRAPH_MESSAGE_LIMIT), "3145000",
        "Largest message; Graph itself takes no more than 3145728.")
    max_recipients: int = setting(
        _count, "500", "Most recipients of one message.")
    max_connections: int = setting(
        _count, "1000", "Most connections at once.")
    max_connections_per_client: int = setting(
        _count, "100", "Most connections at once from one address.")
    client_timeout: float = setting(
        _seconds, "300", "How long a device may take for one command, or for each "
        "64 KiB of a message.")
    upstream_timeout: float = setting(
        _seconds, "60", "How long Microsoft may take for one login or one message, "
        "with all that is tried again.")
    shutdown_timeout: float = setting(
        _seconds, "25", "How long messages in flight may take when the relay is stopped.")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Config:
        """Read the settings; raises ConfigError with all faults, a line each."""
        values, faults = {}, []
        for name, declared in settings().items():
            text = environ.get(name, "").strip()
            try:
                values[name.lower()] = declared.parse(text or declared.default)
            except ValueError as error:
                shown = _masked(text) if declared.parse is _endpoint else text
                faults.append(f"{name}={shown!r}: must be {error}")
        config = cls(**values)      # with defaults for what is faulty, so leave these out
        faults += [text for names, text in config.contradictions()
                   if names <= values.keys()]
        faults += _check_lookup(environ) + config.check_proxy(environ)
        if faults:
            raise ConfigError("\n".join(faults))
        return config

    def contradictions(self) -> Iterator[tuple[set[str], str]]:
        """Find settings that contradict each other: their fields, and the text."""
        if self.tls_source == "off" and self.require_tls:
            yield {"tls_source", "require_tls"}, (
                "TLS_SOURCE=off with REQUIRE_TLS=true: nobody could log in; set "
                "TLS_SOURCE=file and give a certificate, or set REQUIRE_TLS=false "
                "(passwords then cross the network readable)")
        if self.tls_source == "off" and self.smtps_port:
            yield {"tls_source", "smtps_port"}, (
                f"TLS_SOURCE=off with SMTPS_PORT={self.smtps_port}: that port needs TLS; "
                "set TLS_SOURCE=file and give a certificate, or set SMTPS_PORT=0")
        if self.smtp_port and self.smtp_port == self.smtps_port:
            yield {"smtp_port", "smtps_port"}, (
                f"SMTP_PORT={self.smtp_port} and SMTPS_PORT={self.smtps_port}: must be "
                "different ports")

    def check_proxy(self, environ: Mapping[str, str]) -> list[str]:
        """Find proxies that are needed and cannot be used."""
        endpoints = (self.azure_authority_host, self.graph_endpoint)
        if not any(url.startswith("https:") for url in endpoints):
            return []
        values = {name: environ.get(name, "").strip() for name in PROXY_VARIABLES}
        return [f"{name}={_masked(value)!r}: must be http://host:port, or "
                "http://user:password@host:port"
                for name, value in values.items() if not _is_http_proxy(value)]


def _masked(url: str) -> str:
    """Hide what may be a password in a URL."""
    return re.sub(r"(?s)^(\w+://)?.*@|[?#].*", r"\1***", url)


def _is_http_proxy(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        return not url or (parts.scheme == "http" and bool(parts.hostname)
                           and parts.port != 0)
    except ValueError:
        return False


def _check_lookup(environ: Mapping[str, str]) -> list[str]:
    """Refuse the reference's allow-list: to ignore it would let everybody send."""
    value = environ.get("AZURE_TABLES_FORCE_USAGE", "").strip()
    if value.lower() in ("", "false"):
        return []
    return [f"AZURE_TABLES_FORCE_USAGE={value!r}: must be false; this version has no Azure "
            "Tables, so it cannot keep out users that are not in the table"]


def settings() -> dict[str, Setting]:
    """List the settings by variable, in the order of Config."""
    return {one.name.upper(): one.metadata["setting"] for one in dataclasses.fields(Config)}


def settings_help() -> str:
    """Show the settings for --help."""
    lines = []
    for name, declared in settings().items():
        lines += [f"  {name} (default: {declared.default or 'empty'})",
                  f"      {declared.help}"]
    return "\n".join(lines)


def settings_table() -> str:
    """Show the settings as the README's table."""
    rows = [f"| `{name}` | {f'`{one.default}`' if one.default else ''} | {one.help} |"
            for name, one in settings().items()]
    return "\n".join(["| Variable | Default | Meaning |", "| --- | --- | --- |", *rows])


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
# §4  SMTP session
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
    message: bytes = field(default=b"", repr=False)


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


class Session:
    """An SMTP session on the server's side, without I/O.

    RFC 5321, 1870 SIZE, 2034 ENHANCEDSTATUSCODES, 2920 PIPELINING, 3207 STARTTLS,
    4954 AUTH, 6152 8BITMIME, 6531 SMTPUTF8.
    """

    def __init__(self, config: Config, name: str,
                 trace: Callable[[str, object], None] | None = None) -> None:
        self._config = config
        self._name = name
        self.secure = False
        self.logged_in = False
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
        self._content: bytearray | None = None          # None: too large, thrown away
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

    # The caller's answers to events.

    def tls_started(self) -> None:
        """Go on under TLS. What came in the clear is forgotten, RFC 3207 section 4.2."""
        self.secure = True
        self.logged_in = False
        self._phase = Phase.CONNECTED
        self._buffer.clear()
        self._scanned, self._overlong = 0, ""
        self._resume()

    def authenticated(self) -> None:
        """Go on with a client that is who it says."""
        self.logged_in = True
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
        if self._content is not None:
            self._content += part
            if len(self._content) - 2 > self._config.max_message_size:
                self._content = None
        if end >= 0:
            del self._buffer[:3]
            self._end_content()
            return True
        if self._eof:
            self._close("the client hung up within a message")
        return False

    def _unsure_octets(self) -> int:
        """How many octets at the end may be the beginning of the end of the content."""
        return next((length for length in (4, 3, 2, 1)
                     if self._buffer.endswith(_END_OF_DATA[:length])), 0)

    def _end_content(self) -> None:
        content, self._content = self._content, None
        if content is not None:
            message = _with_crlf(bytes(content[2:]))    # less the CRLF of the command
            if len(message) <= self._config.max_message_size:
                self._envelope.message = message
                self._ask(Deliver(self._envelope))
                return
        reply = _too_large(self._config.max_message_size).reply
        self._complain(reply)
        self._resume(reply)

    # Commands, in the order of RFC 5321 section 4.1.1.

    def _ehlo(self, argument: str) -> Reply:
        # The argument is not checked: devices say anything, and it may not matter,
        # RFC 5321 section 4.1.4. The reply has no enhanced status code, RFC 2034.
        self._reset()
        self._phase = Phase.READY
        return Reply(250, "", "\n".join([self._name, *self._extensions()]))

    def _extensions(self) -> Iterator[str]:
        yield f"SIZE {self._config.max_message_size}"
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
        mailbox, parameters = parse_path(argument, "FROM:")
        for name, value in parameters.items():
            if name not in MAIL_PARAMETERS:
                raise ProtocolError("MAIL has no such parameter", 555, "5.5.4")
            MAIL_PARAMETERS[name](self, value)
        self._check_ascii(mailbox, "SMTPUTF8" in parameters)
        self._envelope = Envelope(mailbox)
        self._allow_utf8 = "SMTPUTF8" in parameters
        self._phase = Phase.MAIL
        return Reply(250, "2.1.0", "Sender ok")

    def _mail_size(self, value: str | None) -> None:
        if not _SIZE.fullmatch(value or ""):
            raise ProtocolError("SIZE must be a number of octets")
        if int(value or "") > self._config.max_message_size:
            raise _too_large(self._config.max_message_size)

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
        self._content = bytearray()
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
        if self.logged_in:
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
        verb = verb.upper()
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
        if command.login and not self.logged_in:
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
        self._errors += reply.code >= 500
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
        self._envelope = Envelope("")
        self._allow_utf8 = False
        if self._phase is not Phase.CONNECTED:
            self._phase = Phase.READY


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


def _decode_line(line: bytes) -> str:
    text = line.decode("utf-8", "surrogateescape")
    if _CONTROLS.search(text):
        raise ProtocolError("A command ends in CRLF and holds no control characters",
                            500, "5.5.2")
    return text


def _with_crlf(message: bytes) -> bytes:
    """Make every line end CRLF: a lone CR or LF is text that Exchange would eat."""
    if message.count(b"\r\n") == message.count(b"\r") == message.count(b"\n"):
        return message
    return (message.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            .replace(b"\n", b"\r\n"))


def _too_large(limit: int) -> DeliveryError:
    return DeliveryError(f"The message is too large: {limit} octets are the most",
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
_GREETED = frozenset({Phase.READY, Phase.MAIL, Phase.RCPT})

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
# §5  Credentials
# ---------------------------------------------------------------------------

_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)
_SHORT_UUID = re.compile("([A-Za-z0-9_-]{22})(?:==)?")
_DOMAIN_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]*",
                          re.I | re.A)


@dataclass(frozen=True)
class Application:
    """An Entra ID application and its secret: what a login becomes."""

    tenant: str
    client: str
    secret: str = field(repr=False)


def parse_username(username: str, delimiter: str) -> tuple[str, str]:
    """Read "tenant@client" as the two. Raises AuthError.

    Each is a UUID or the 22 characters of its base64url form; the tenant may also be one
    of its domains. What follows a dot behind the delimiter is ignored, for devices that
    want an e-mail address.
    """
    left, _, right = username.partition(delimiter)
    tenant = decode_uuid(left) or (left.lower() if _DOMAIN_NAME.fullmatch(left) else None)
    client = decode_uuid(right.partition(".")[0])
    if tenant is None or client is None:
        raise AuthError(f"The user name must be TENANT{delimiter}CLIENT: the tenant's ID "
                        "or domain, and the application's ID")
    return tenant, client


def decode_uuid(text: str) -> str | None:
    """Bring a UUID, or its base64url form, into lower case; None if it is neither."""
    if _UUID.fullmatch(text):
        return text.lower()
    short = _SHORT_UUID.fullmatch(text)
    if short is None:
        return None
    return str(uuid.UUID(bytes=base64.urlsafe_b64decode(short[1] + "==")))


# ---------------------------------------------------------------------------
# §6  Messages
# ---------------------------------------------------------------------------
#
# Graph has no envelope: it mails whoever stands in To, Cc and Bcc. So these are made to
# name the envelope's recipients and nobody else:
#
#     an address field ...                              becomes
#     names only people of the envelope                 what it was, octet for octet (with
#                                                       commas, if it has stray ";")
#     names others too                                  itself without them; they go to
#                                                       X-Original-To, X-Original-Cc
#     cannot be read beyond doubt                       X-Original-To, X-Original-Cc
#     is a Bcc                                          part of the one Bcc, which also
#                                                       gets whom no field names
#
# Whom a field names behind a malformed line, where a reader may have stopped, is in Bcc
# too. "Beyond doubt" is the point: a field that we read in one way and Exchange in another
# would send the mail to somebody else. Everything but those lines stays as it is.

_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:")
_FOLDED_LINE = re.compile(rb"[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*")
_ADDRESS_FIELDS = (b"to", b"cc", b"bcc")
_READ_FIELDS = (*_ADDRESS_FIELDS, b"from")
# A quoted-string or domain-literal that is not closed goes on to the end: each
# alternative takes something wherever it begins, so that no text is read twice.
_TOKEN = re.compile(r"""
      "  (?: [^"\\]  | \\.? )*  (?: "  | \Z )      # quoted-string
    | \[ (?: [^\]\\] | \\.? )*  (?: \] | \Z )      # domain-literal
    | [ \t\r\n]+
    | [^ \t\r\n<>@,;:."\[\]()\\]+                  # atom
    | .""", re.S | re.X)
_IN_COMMENT = re.compile(r"[^()\\]+|\\.|.", re.S)
_NOT_IN_NAME = frozenset('<>@()[]\\"')
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_HEADER_MAILBOX = re.compile(
    rf'(?:{_DOT_STRING}|"(?:[^"\\]|\\.)*")@(?:{_DOMAIN}|\[[^\[\]\\]*\])', re.S)
_HEADER_ROUTE = re.compile(_ROUTE)

MAX_ADDRESSES = 262_144         # octets of address fields; 500 mailboxes have 160,000
MAX_WORDS = 200                 # of one mailbox
MAX_FIELDS = 10_000             # of addresses, in one header


class Field(NamedTuple):
    """A field of addresses with its folded lines, or (name b"") any other lines."""

    name: bytes             # in lower case
    octets: bytes           # with the last CRLF
    is_reached: bool        # by a reader who stops at the first malformed line

    @property
    def value(self) -> str:
        """What stands behind the colon; octets that are no UTF-8 survive encoding."""
        return self.octets.partition(b":")[2].decode("utf-8", "surrogateescape")


class Address(NamedTuple):
    """An address of a field."""

    key: str                # in comparable form
    mailbox: str            # as it stands there
    text: str               # with its name and comments


class AddressList(NamedTuple):
    """The addresses of a field, and whether every reader parts them as we do."""

    addresses: list[Address]
    is_tidy: bool = True


class Doubtful(Exception):
    """An address field that another reader may read otherwise."""


def split_header(message: bytes) -> tuple[list[Field], bytes]:
    """Split a message, whose lines end in CRLF, into its header and the rest.

    A malformed line ends nothing, as a lenient reader would go on behind it; but what
    stands between the last field and the empty line is text. Raises DeliveryError.
    """
    empty_line = message.find(b"\r\n\r\n")
    end = 0 if message.startswith(b"\r\n") else \
        empty_line + 2 if empty_line >= 0 else len(message)
    spans: list[tuple[bytes, int, int, bool]] = []
    header_end, is_reached = 0, True
    alone = int(message[:1] in (b" ", b"\t"))       # Bcc must come behind a folded line
    for line in _FOLDED_LINE.finditer(message, 0, end):
        match = _FIELD.match(line[0])
        is_reached = is_reached and match is not None and match[0] == match[1] + b":"
        name = match[1].lower() if match else b""
        begin = line.start()
        if name not in _READ_FIELDS:
            name = b""
            if spans[alone:] and not spans[-1][0]:      # what nobody reads is kept as one
                _, begin, _, _ = spans.pop()
        spans.append((name, begin, line.end(), is_reached))
        if match:
            header_end = line.end()
        if len(spans) > MAX_FIELDS:
            raise DeliveryError("The header has too many fields of addresses")
    fields = [Field(name, message[begin:min(stop, header_end)], is_reached)
              for name, begin, stop, is_reached in spans if begin < header_end]
    return fields, message[header_end:]


def parse_addresses(value: str) -> AddressList:
    """Read an address list, RFC 5322 section 3.4; ";" counts as ",". Raises Doubtful."""
    if _NO_TEXT.search(value):
        raise Doubtful
    addresses: list[Address] = []
    group_at = -1                       # how many addresses there were before the group
    is_tidy, is_parted = True, True     # is_parted: by a comma from what was before
    for text, words, separator in _elements(value):
        if separator == ":":
            if group_at >= 0 or not _is_name(words):
                raise Doubtful
            group_at = len(addresses)
            continue
        if words:
            mailbox = _read_mailbox(words)
            addresses.append(Address(comparable(mailbox), mailbox, text.strip(" \t\r\n")))
            is_tidy = is_tidy and is_parted
        if separator == ";":
            is_tidy = is_tidy and group_at >= 0
            group_at = -1
        is_parted = separator == ","
    if 0 <= group_at < len(addresses):  # an empty group may lack its end
        raise Doubtful
    return AddressList(addresses, is_tidy)


def _elements(value: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield what stands between separators: its text, its words, the separator behind.

    White space is the word " "; there are no words if there is nothing else.
    """
    words: list[str] = []
    start, in_angle = 0, False
    for position, token in _tokens(value):
        if token in ",;:" and not in_angle:
            yield value[start:position], words if set(words) != {" "} else [], token
            words, start = [], position + 1
        else:
            in_angle = token == "<" or (in_angle and token != ">")
            words.append(" " if token[0] in " \t\r\n" else token)
    yield value[start:], words if set(words) != {" "} else [], ""


def _tokens(value: str) -> Iterator[tuple[int, str]]:
    """Yield the tokens of an address list, each with its position."""
    position = 0
    while position < len(value):
        if value[position] == "(":
            end = _comment_end(value, position)
        else:
            match = _TOKEN.match(value, position)
            assert match is not None    # the last alternative takes anything
            end = match.end()
        token = value[position:end]
        if token[0] in '"[' and "\r" in token:
            raise Doubtful              # not everybody unfolds before reading
        yield position, token
        position = end


def _comment_end(value: str, start: int) -> int:
    depth = 0
    for match in _IN_COMMENT.finditer(value, start):
        depth += (match[0] == "(") - (match[0] == ")")
        if depth == 0:
            return match.end()
    raise Doubtful


def _is_name(words: list[str]) -> bool:
    """Whether words can be a name, and nobody can read an address in them."""
    return bool(words) and not _NOT_IN_NAME.intersection(
        "".join(word for word in words if word[0] != '"'))


def _read_mailbox(words: list[str]) -> str:
    """Read the words of one element, RFC 5322 sections 3.4 and 4.4. Raises Doubtful.

    Names and comments may hold an address only if it is the same.
    """
    others = [word[1:-1].strip(" ") for word in words if word[0] == "(" and "@" in word]
    words = [" " if word[0] == "(" else word for word in words]
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
    text = "".join(words).strip(" ")
    route = _HEADER_ROUTE.match(text)
    mailbox = text[route.end():] if route else text
    if "=?" in mailbox or not _HEADER_MAILBOX.fullmatch(mailbox):
        raise Doubtful
    if any(comparable(other) != comparable(mailbox) for other in others):
        raise Doubtful
    return mailbox


def name_recipients(message: bytes, recipients: Mapping[str, str]) -> bytes:
    """Make To, Cc and Bcc name these recipients, by comparable form, and nobody else."""
    header, rest = split_header(message)
    size = sum(len(one.octets) for one in header if one.name in _ADDRESS_FIELDS)
    read = [_read_addresses(one, is_sane=size <= MAX_ADDRESSES) for one in header]
    named = {address.key for one, found in zip(header, read) if found and one.is_reached
             for address in found.addresses}
    lines = [_without_others(one, found, recipients) for one, found in zip(header, read)]
    missing = [mailbox for key, mailbox in recipients.items() if key not in named]
    if missing:
        kept = named & recipients.keys()
        hidden = [address.text for one, found in zip(header, read)
                  if found and one.name == b"bcc"
                  for address in found.addresses if address.key in kept]
        lines = _with_bcc(header, lines, hidden + missing)
    elif lines == [one.octets for one in header]:
        return message
    if not rest.startswith(b"\r\n") and (rest or not header):
        lines.append(b"\r\n")
    return b"".join([*lines, rest])


def _with_bcc(header: list[Field], lines: list[bytes], texts: list[str]) -> list[bytes]:
    """Put the one Bcc before all others: a reader may end at a malformed line."""
    lines = [b"" if one.name == b"bcc" else line for one, line in zip(header, lines)]
    is_folded = bool(header) and header[0].octets[:1] in b" \t"
    lines.insert(int(is_folded), _address_field(b"Bcc", texts))
    return lines


def _read_addresses(one: Field, *, is_sane: bool) -> AddressList | None:
    """Read a field's addresses, none if it is another field; None: they are doubtful."""
    if one.name not in _ADDRESS_FIELDS:
        return AddressList([])
    try:
        return parse_addresses(one.value) if is_sane else None
    except Doubtful:
        return None


def _without_others(one: Field, found: AddressList | None,
                    recipients: Mapping[str, str]) -> bytes:
    """Take out of a field whom the envelope does not name, as the table above says."""
    if found is None:
        return b"" if one.name == b"bcc" else b"X-Original-" + one.octets
    kept = [address.text for address in found.addresses if address.key in recipients]
    others = [address.text for address in found.addresses if address.key not in recipients]
    if found.is_tidy and not others:
        return one.octets
    name = one.octets.partition(b":")[0].rstrip()
    lines = _address_field(name, kept) if kept else b""
    if others and one.name != b"bcc":
        lines += _address_field(b"X-Original-" + name, others)
    return lines


def _address_field(name: bytes, texts: list[str]) -> bytes:
    """Write a field; an address a line keeps lines below 998, RFC 5322 section 2.1.1."""
    value = ",\r\n ".join(texts).encode("utf-8", "surrogateescape")
    return name + b": " + value + b"\r\n"


def author(message: bytes) -> str:
    """Find the first mailbox of the From field. Raises DeliveryError if there is none."""
    found = [one.value for one in split_header(message)[0] if one.name == b"from"]
    with contextlib.suppress(Doubtful, IndexError):
        return parse_addresses(found[0][:MAX_ADDRESSES]).addresses[0].mailbox
    raise DeliveryError("MAIL FROM:<> needs a From field with the mailbox to send from",
                        550, "5.1.7")


class Outgoing(NamedTuple):
    """A message as Graph wants it: sent by `mailbox`; `content` is base64."""

    mailbox: str
    size: int               # octets before base64
    content: bytes


def make_outgoing(envelope: Envelope) -> Outgoing:
    """Do all that is done to a message. Raises DeliveryError."""
    mailbox = envelope.reverse_path or author(envelope.message)
    message = name_recipients(envelope.message, envelope.recipients)
    return Outgoing(mailbox, len(message), binascii.b2a_base64(message, newline=False))


# ---------------------------------------------------------------------------
# §7  Microsoft's answers
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


def read_token(response: HttpResponse, secret: str) -> Token:
    """Read Entra's answer. Raises AuthError if it refuses, TemporaryError otherwise."""
    answer = response.json()
    token = answer.get("access_token")
    if response.status == 200 and isinstance(token, str) and re.fullmatch("[!-~]+", token):
        life = _number(answer.get("expires_in")) - EXPIRES_EARLY
        return Token(token, min(max(life, 0.0), MAX_TOKEN_LIFE))
    codes, error, text = _entra_error(answer)
    code = codes[0] if codes else 0
    if response.status != 200 and not error:    # in a 200 there may be half of a token
        text = response.body.decode("utf-8", "replace")
    facts = {"status": response.status, "aadsts": code or None, "error": error or None,
             "said": text.replace(secret, "***") or None}
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
                                                "{mailbox} may not send as"),
    "errorinvaliduser": _NO_MAILBOX,
    "resourcenotfound": _NO_MAILBOX,
    "errornonexistentmailbox": _NO_MAILBOX,
    "mailboxnotenabledforrestapi": _NO_MAILBOX,
    "mailboxnothostedinexchangeonline": _NO_MAILBOX,
    "errorinvalidrecipients": Reply(550, "5.1.3", "Microsoft 365 does not accept a "
                                                    "recipient"),
    "errormessagesizeexceeded": _TOO_LARGE,
    "errorquotaexceeded": _FULL,
}
GRAPH_CODES_OF_ANY_STATUS = frozenset({"errormessagesizeexceeded", "errorquotaexceeded"})
GRAPH_STATUSES: Mapping[int, Reply] = {
    401: Reply(451, "4.7.0", "Microsoft 365 does not accept its own token; try again "
                               "later"),
    403: _NO_RIGHT,
    404: _NO_MAILBOX,
    413: _TOO_LARGE,
    429: _BUSY,
    507: _FULL,
}
_REFUSED = Reply(554, "5.6.0", "Microsoft 365 does not accept the message")
_NOT_SENT = Reply(554, "5.3.0", "Microsoft 365 gave an unknown answer; the message was "
                                  "not accepted")


def graph_error(response: HttpResponse, mailbox: str) -> RelayError:
    """Make the error for an answer of Graph to sendMail that is not 202."""
    status, code = response.status, _graph_code(response)
    reply = GRAPH_STATUSES.get(status, _FAILING if status >= 500 else
                               _REFUSED if status >= 400 else _NOT_SENT)
    if status >= 400 and status not in (401, 429) and (
            status < 500 or code.lower() in GRAPH_CODES_OF_ANY_STATUS):
        reply = GRAPH_CODES.get(code.lower(), reply)
    facts = {"status": status, "graph": code or None,
             "request_id": response.headers.get("request-id")}
    kind = TemporaryError if reply.code < 500 else DeliveryError
    level = logging.ERROR if reply is _NOT_SENT else logging.WARNING
    return kind(reply.text.format(mailbox=mailbox), reply.code, reply.status, facts=facts,
                level=level)


def _graph_code(response: HttpResponse) -> str:
    error = response.json().get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


# ---------------------------------------------------------------------------
# §8  Log
# ---------------------------------------------------------------------------
#
# One line for an event: time, level, the id of the session or the message, the event,
# key=value. What an admin must mend is WARNING or ERROR; a client's mistake is INFO.
# Passwords, secrets, tokens and content are never given to a function of this section.

MAX_LOGGED_TEXT = 1000          # characters of one value
LOG_QUEUE = 10_000              # lines that may wait to be written

log = logging.getLogger("smtp_oauth_relay")


def log_event(level: int, ident: str, event: str, **facts: object) -> None:
    """Log an event; facts that are None are left out."""
    if log.isEnabledFor(level):
        pairs = "".join(f" {name.replace('_', '-')}={escaped(value)}"
                        for name, value in facts.items() if value is not None)
        log.log(level, "%s %s%s", ident, event, pairs)


def escaped(value: object) -> str:
    """Make a value one word, or a quoted one with everything odd escaped."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)[:MAX_LOGGED_TEXT]
    if re.fullmatch(r"[!#-&(-<>-\[\]-~]+", text):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


class LogQueue(logging.handlers.QueueHandler):
    """Hands lines to a thread, as the loop must not wait for a full pipe.

    When too many lines wait, more are dropped, and counted.
    """

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a line; the first one that fits again tells how many did not."""
        if self.dropped:
            record.msg = f"{record.msg} (lines lost before this one: {self.dropped})"
        try:
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1


@contextlib.contextmanager
def logging_to_stderr(level: str) -> Iterator[None]:
    """Write the log to standard error, from a thread of its own."""
    stream = logging.StreamHandler()
    stream.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
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
        # stop() waits for the last line, and so for whoever reads the pipe.
        stopper = threading.Thread(target=listener.stop, daemon=True)
        stopper.start()
        stopper.join(2)
        if stopper.is_alive():
            os._exit(0)         # nobody reads it, and Python itself would wait for ever


# ---------------------------------------------------------------------------
# §9  HTTP
# ---------------------------------------------------------------------------
#
# http.client in worker threads, one call each; the event loop only waits, and never
# longer than the call's deadline (time.monotonic). http.client's own time-outs are for
# one socket operation, so at the deadline the loop shuts the socket under the thread.

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


class NotSent(Exception):
    """A connection ended before the request went out whole: nothing can have happened."""


@dataclass(frozen=True)
class HttpRequest:
    """A POST to a URL."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


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

    def connect(self, context: ssl.SSLContext,
                timeout: float) -> http.client.HTTPConnection:
        """Make a connection, not yet open."""
        if self.scheme == "http":
            plain = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
            plain.response_class = _Response
            return plain
        if not self.proxy:
            secure = http.client.HTTPSConnection(self.host, self.port, timeout=timeout,
                                                 context=context)
        else:
            proxy = urllib.parse.urlsplit(self.proxy)
            secure = http.client.HTTPSConnection(proxy.hostname or "", proxy.port or 80,
                                                 timeout=timeout, context=context)
            secure.set_tunnel(self.host, self.port, headers=_proxy_headers(proxy))
        secure.response_class = _Response
        return secure


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

    def work() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as caught:     # noqa: BLE001 - for who awaits the future
            error = caught
        with contextlib.suppress(RuntimeError):         # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)
        error = None            # its traceback has this frame, and with it the secret

    try:
        threading.Thread(target=work, name="relay-call", daemon=True).start()
    except RuntimeError as error:                       # the system has no more threads
        settle(None, TemporaryError(f"The relay is too busy: {error}"))
    return future


class HttpExchange:
    """One request and its answer, in a worker thread; the loop may cut it off."""

    def __init__(self, origin: Origin, request: HttpRequest, context: ssl.SSLContext,
                 kept: http.client.HTTPConnection | None, deadline: float) -> None:
        self.origin = origin
        self.connection = kept
        self.is_connected = kept is not None
        self._request = request
        self._context = context
        self._deadline = deadline
        self._sock: socket.socket | None = None     # the connection may let go of it
        self._is_cut_off = False

    # In the loop.

    def cut_off(self) -> None:
        """Make the thread end soon: shut its socket."""
        self._is_cut_off = True         # first, see _check
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
        try:
            return self._exchange(self.connection)
        except NotSent as error:
            raise error.__cause__ or error from None

    def _exchange(self, connection: http.client.HTTPConnection) -> HttpResponse:
        url = urllib.parse.urlsplit(self._request.url)
        self._check(connection)
        try:
            connection.request("POST", url.path, self._request.body,
                               dict(self._request.headers))
        except OSError as error:
            return self._early_answer(connection, error)
        self._check(connection)
        return self._answer(connection)

    def _early_answer(self, connection: http.client.HTTPConnection,
                      error: OSError) -> HttpResponse:
        """Read why a request was not taken whole, such as 413."""
        try:
            return self._answer(connection)
        except (OSError, http.client.HTTPException, ValueError):
            raise NotSent from error

    def _answer(self, connection: http.client.HTTPConnection) -> HttpResponse:
        response = connection.getresponse()
        if self._is_cut_off and response.status != 202:
            raise TimeoutError("time is up")    # the header may have lost its end
        headers = {name.lower(): value for name, value in response.getheaders()}
        most = MAX_ANSWER
        if response.status == 202:
            assert self._sock is not None
            self._sock.settimeout(REST_OF_202)
            most = 1                    # enough to see that there is nothing
        body = b""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            while len(body) < most and not response.isclosed():
                part = response.read(most - len(body))
                if not part:
                    break
                body += part
        if not response.isclosed():
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
        """Get ready to send to these URLs."""
        self._origins = {url: find_origin(url) for url in urls}
        secure = any(origin.scheme == "https" for origin in self._origins.values())
        # Reading the system's certificates takes a while: not where nobody asks for them.
        self._context = (ssl.create_default_context() if secure
                         else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        self._kept: dict[Origin, list[tuple[http.client.HTTPConnection, float]]] = {}
        self._closer: asyncio.TimerHandle | None = None

    async def post(self, base: str, request: HttpRequest, deadline: float) -> HttpResponse:
        """Send a request to one of the URLs given before. Raises NoAnswer.

        A refused connection is tried three times; nothing else is, as it may have been
        received.
        """
        for pause in (*REFUSED_PAUSES, None):
            try:
                return await self._exchange(self._origins[base], request, deadline)
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
        loop = asyncio.get_running_loop()
        timer = loop.call_later(deadline - time.monotonic(), _cut_off, exchange, future)
        try:
            response = await future
        finally:
            timer.cancel()
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
        for kept in self._kept.values():
            while kept and kept[0][1] < time.monotonic():
                kept.pop(0)[0].close()
        self._closer = None
        if any(self._kept.values()):
            self._closer = asyncio.get_running_loop().call_later(KEEP, self._close_old)


def _cut_off(exchange: HttpExchange,
             future: asyncio.Future[HttpResponse]) -> None:
    """End an exchange at its deadline.

    A thread with a connection soon says how it ended, perhaps with a 202; one that has
    none yet may hang in a look-up, and will send nothing when it comes back.
    """
    def give_up() -> None:
        if not future.done():
            future.set_exception(TimeoutError("time is up"))

    exchange.cut_off()
    asyncio.get_running_loop().call_later(GRACE if exchange.is_connected else 0, give_up)


# ---------------------------------------------------------------------------
# §10  Tokens
# ---------------------------------------------------------------------------

REFUSALS_LAST = 30.0            # seconds: a device with a wrong password tries and tries
MAX_CACHED = 1000               # tokens, and refusals

Key = tuple[str, str, bytes]     # tenant, client, keyed hash of the secret


class Tokens:
    """Fetches access tokens; one request serves all who need the same.

    A key holds a keyed hash of the secret, so a wrong secret never meets the token of
    another, and no secret stays here.
    """

    def __init__(self, config: Config, pool: HttpPool,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._pool = pool
        self._clock = clock             # for what is kept; deadlines are time.monotonic()
        self._hash_key = secrets.token_bytes(32)
        self._tokens: dict[Key, tuple[str, float]] = {}             # and its end
        self._refusals: dict[Key, tuple[AuthError, float]] = {}     # and its end
        self._fetches: dict[Key, asyncio.Task[str]] = {}

    async def get(self, application: Application, deadline: float) -> str:
        """Return a token that lasts a while. Raises AuthError and TemporaryError."""
        key, now = self._key(application), self._clock()
        token, ends_at = self._tokens.get(key, ("", now))
        if now < ends_at:
            return token
        refusal, ends_at = self._refusals.get(key, (None, now))
        if refusal and now < ends_at:
            raise _fresh(refusal)
        self._refusals.pop(key, None)
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = asyncio.ensure_future(self._fetch(key, application, deadline))
            self._fetches[key] = fetch
            fetch.add_done_callback(functools.partial(self._fetched, key))
        await asyncio.wait({fetch}, timeout=max(0.0, deadline + GRACE - time.monotonic()))
        if not fetch.done():
            raise NoAnswer("time is up")
        return fetch.result()

    def forget(self, application: Application, token: str) -> None:
        """Drop a token that Graph does not accept, unless there is another already."""
        key = self._key(application)
        if self._tokens.get(key, ("", 0))[0] == token:
            del self._tokens[key]

    async def _fetch(self, key: Key, application: Application, deadline: float) -> str:
        base = self._config.azure_authority_host
        tenant = urllib.parse.quote(application.tenant, safe="")
        form = {"client_id": application.client, "client_secret": application.secret,
                "scope": f"{self._config.graph_endpoint}/.default",
                "grant_type": "client_credentials"}
        response = await self._pool.post(base, HttpRequest(
            f"{base}/{tenant}/oauth2/v2.0/token",
            {"Content-Type": "application/x-www-form-urlencoded",
             "Accept": "application/json", "User-Agent": USER_AGENT},
            urllib.parse.urlencode(form).encode()), deadline)
        try:
            token = read_token(response, application.secret)
        except AuthError as error:
            _remember(self._refusals, key, _fresh(error), self._clock() + REFUSALS_LAST)
            raise
        _remember(self._tokens, key, token.value, self._clock() + token.life)
        return token.value

    def _fetched(self, key: Key, fetch: asyncio.Task[str]) -> None:
        del self._fetches[key]
        if not fetch.cancelled():
            fetch.exception()           # it is known, even if nobody waits any more

    def _key(self, application: Application) -> Key:
        digest = hmac.digest(self._hash_key, application.secret.encode(), "sha256")
        return application.tenant, application.client, digest


def _fresh(error: AuthError) -> AuthError:
    """Copy an error without its traceback, which holds the frames, and these the secret."""
    return AuthError(error.reply.text, facts=error.facts, level=error.level)


def _remember(cache: dict[Key, tuple[T, float]], key: Key, value: T,
              ends_at: float) -> None:
    """Put a value into a cache; the one that was put there first makes room."""
    cache.pop(key, None)
    cache[key] = value, ends_at
    if len(cache) > MAX_CACHED:
        del cache[next(iter(cache))]


# ---------------------------------------------------------------------------
# §11  Graph
# ---------------------------------------------------------------------------
#
# What is tried again within UPSTREAM_TIMEOUT, as it cannot send a message twice:
#
#     401                                 once, with a new token
#     429, 503 with Retry-After           after that time
#     connection refused, or a kept one   §9
#     closed before all was written
#
# Anything else goes to the client as it stands: after a time-out or a 504 the message may
# be on its way already.

REQUESTS_AT_ONCE = 4            # for an application and a mailbox, Graph's own limit
LEAST_PAUSE = 0.5               # seconds before anything is tried again
LEAST_TIME = 0.1                # of UPSTREAM_TIMEOUT must be left for a turn to be of use


class Turns:
    """Lets so many at once do something with the same key; the others wait in line."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._busy: collections.Counter[object] = collections.Counter()
        self._waiting: dict[object, collections.deque[asyncio.Future[None]]] = {}

    @contextlib.asynccontextmanager
    async def turn(self, key: object, deadline: float) -> AsyncIterator[None]:
        """Wait for a turn, and have it. Raises TemporaryError if none comes in time."""
        await self._wait(key, deadline)
        try:
            yield
        finally:
            self._pass_on(key)

    async def _wait(self, key: object, deadline: float) -> None:
        if self._busy[key] < self._limit:
            self._busy[key] += 1
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(key, collections.deque()).append(future)
        timer = loop.call_later(deadline - time.monotonic(), _end_wait, future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                self._pass_on(key)      # the turn came at the same moment
            raise
        finally:
            timer.cancel()

    def _pass_on(self, key: object) -> None:
        line = self._waiting.get(key, collections.deque())
        while line:
            future = line.popleft()
            if not future.done():
                future.set_result(None)
                return
        self._waiting.pop(key, None)
        self._busy[key] -= 1
        if not self._busy[key]:
            del self._busy[key]


def _end_wait(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(TemporaryError(
            "Too many messages for this mailbox at once; try again later", 451, "4.4.5"))


class Graph:
    """Sends messages with sendMail; Microsoft Graph v1.0, "user: sendMail"."""

    def __init__(self, config: Config, pool: HttpPool, tokens: Tokens) -> None:
        self._config = config
        self._pool = pool
        self._tokens = tokens
        self._turns = Turns(REQUESTS_AT_ONCE)

    async def send(self, application: Application, message: Outgoing,
                   ident: str, deadline: float) -> HttpResponse:
        """Send a message; returns the 202. Raises RelayError for anything else."""
        key = application.tenant, application.client, message.mailbox.lower()
        # A request that is soon cut off may have been obeyed, and nobody would know.
        latest = deadline - LEAST_TIME * self._config.upstream_timeout
        async with self._turns.turn(key, latest):
            return await self._send(application, message, ident, deadline)

    async def _send(self, application: Application, message: Outgoing,
                    ident: str, deadline: float) -> HttpResponse:
        renewed = False
        while True:
            token = await self._token(application, deadline)
            response = await self._post(token, message, ident, deadline)
            if response.status == 202:
                return response
            if response.status == 401 and not renewed:
                renewed = True
                self._tokens.forget(application, token)
                continue
            pause = (response.retry_after(time.time())
                     if response.status in (429, 503) else None)
            if pause is None or time.monotonic() + max(pause, LEAST_PAUSE) >= deadline:
                raise graph_error(response, message.mailbox)
            await asyncio.sleep(max(pause, LEAST_PAUSE))

    async def _post(self, token: str, message: Outgoing, ident: str,
                    deadline: float) -> HttpResponse:
        base = self._config.graph_endpoint
        mailbox = urllib.parse.quote(message.mailbox, safe="")
        return await self._pool.post(base, HttpRequest(
            f"{base}/v1.0/users/{mailbox}/sendMail",
            {"Authorization": f"Bearer {token}", "Content-Type": "text/plain",
             "Accept": "application/json", "User-Agent": USER_AGENT,
             "client-request-id": ident}, message.content), deadline)

    async def _token(self, application: Application, deadline: float) -> str:
        """Get the token again; the device logged in long ago."""
        try:
            return await self._tokens.get(application, deadline)
        except AuthError as error:
            raise TemporaryError("Microsoft no longer accepts this login; log in again",
                                 421, "4.7.0", close=True,
                                 facts=error.facts | {"entra": error.reply.text}) from None
        except TemporaryError as error:
            raise TemporaryError("Microsoft does not renew the login now; try again later",
                                 451, "4.7.0", facts=error.facts) from None


# ---------------------------------------------------------------------------
# §12  TLS
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

_CERTIFICATE_EXPIRED = 10       # X509_V_ERR_CERT_HAS_EXPIRED
_PARTIAL_CHAIN = 0x80000        # X509_V_FLAG_PARTIAL_CHAIN; ssl names it from 3.10 on


def describe_failure(error: OSError) -> str:
    """Say in words why a connection failed."""
    known = TLS_PROBLEMS.get(getattr(error, "reason", None) or "")
    return known or str(error) or type(error).__name__


def make_tls_context(config: Config) -> ssl.SSLContext:
    """Read the relay's certificate and key. Raises StartError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    ciphers = config.tls_cipher_suite
    if config.tls_min_version in ("1.0", "1.1") and "@SECLEVEL" not in ciphers:
        # OpenSSL 3 has these versions at level 0 only: their handshake uses SHA-1.
        ciphers = f"{ciphers or 'DEFAULT'}:@SECLEVEL=0"
    if ciphers:
        context.set_ciphers(ciphers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)     # so is the device
        context.minimum_version = TLS_VERSIONS[config.tls_min_version]
    _load_certificate(context, config.tls_cert_filepath, config.tls_key_filepath)
    if _is_expired(context, config.tls_cert_filepath):
        log_event(logging.WARNING, "-", "tls", problem="the certificate has expired; "
                  "devices may refuse it", file=config.tls_cert_filepath)
    return context


def _load_certificate(context: ssl.SSLContext, cert_path: str, key_path: str) -> None:
    for name, path in (("TLS_CERT_FILEPATH", cert_path), ("TLS_KEY_FILEPATH", key_path)):
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            raise StartError(f"{name}={path!r}: cannot be read: {error.strerror}") from None

    def ask_password() -> str:
        raise StartError(f"TLS_KEY_FILEPATH={key_path!r}: the key is encrypted; give it "
                         "without a passphrase")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert_path)
    except ssl.SSLError as error:
        raise StartError(f"TLS_CERT_FILEPATH={cert_path!r}: holds no PEM certificate that "
                         f"can be used: {error.reason or error}") from None
    try:
        context.load_cert_chain(cert_path, key_path, ask_password)
    except ssl.SSLError as error:
        problem = ("does not belong to the certificate"
                   if error.reason == "KEY_VALUES_MISMATCH"
                   else f"holds no PEM key that can be used: {error.reason or error}")
        raise StartError(f"TLS_KEY_FILEPATH={key_path!r}: {problem}") from None


def _is_expired(context: ssl.SSLContext, cert_path: str) -> bool:
    """Rehearse a handshake with a client that trusts this very certificate.

    The ssl module reads a certificate's dates in no other public way.
    """
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= _PARTIAL_CHAIN
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        trusting.load_verify_locations(cert_path)
        sides = (trusting.wrap_bio(back, there), context.wrap_bio(there, back, True))
        for side in sides * 3:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLError as error:
        return getattr(error, "verify_code", 0) == _CERTIFICATE_EXPIRED
    return False


# ---------------------------------------------------------------------------
# §13  Server
# ---------------------------------------------------------------------------

READ_COMMANDS = 4096            # octets worked on before others have their turn
READ_CONTENT = 16384            # octets; commands may stand behind the message
HANDSHAKE_TIMEOUT = 30.0        # seconds
LINGER = 1                      # second for the last reply to leave, and a close_notify
BACKLOG = 1000                  # connections that wait to be accepted

# Handled always: as PID 1 of a container the relay has no default action. Not with the
# loop's add_signal_handler(), which Windows lacks.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_TIMED_OUT = Reply(421, "4.4.2", "Waited too long for you; goodbye")
_STOPPING = Reply(421, "4.3.2", "The relay is being stopped; try again later")
_BROKEN = Reply(421, "4.3.0", "The relay has a problem; try again later")


class Relay:
    """What a login and a message mean: the sections above, joined."""

    def __init__(self, config: Config) -> None:
        pool = HttpPool([config.azure_authority_host, config.graph_endpoint])
        self.config = config
        self._pool = pool
        self._tokens = Tokens(config, pool)
        self._graph = Graph(config, pool, self._tokens)

    def close(self) -> None:
        """Close what is open to Microsoft."""
        self._pool.close()

    async def log_in(self, login: Authenticate, ident: str) -> Application:
        """Check a login with Entra. Raises AuthError and TemporaryError."""
        user = f"*** ({len(login.username)} characters)"    # malformed, it may be a secret
        try:
            tenant, client = parse_username(login.username, self.config.username_delimiter)
            user = login.username
            if not login.password:
                raise AuthError("The password is empty; it must be the client secret")
            application = Application(tenant, client, login.password)
            await self._tokens.get(application, self._deadline())
        except RelayError as error:
            result = "refused"
            if isinstance(error, TemporaryError):
                result = "tempfail"
                error = TemporaryError("Microsoft cannot check the password now; it may be "
                                       "right", 454, "4.7.0", facts=error.facts)
            log_event(error.level, ident, "auth", user=user, result=result,
                      reply=error.reply, **error.facts)
            raise error from None
        log_event(logging.INFO, ident, "auth", user=user, result="ok")
        return application

    async def deliver(self, application: Application, envelope: Envelope,
                      session: str) -> str:
        """Send a message; returns its id. Raises RelayError."""
        ident, started, deadline = str(uuid.uuid4()), time.monotonic(), self._deadline()
        facts: dict[str, object] = {
            "session": session, "sender": envelope.reverse_path,
            "recipients": len(envelope.recipients), "size": len(envelope.message)}
        try:
            # In a thread: a client may send a header of a million lines.
            message = await in_thread(functools.partial(make_outgoing, envelope))
            facts.update(sender=message.mailbox, size=message.size)
            response = await self._graph.send(application, message, ident, deadline)
        except asyncio.CancelledError:
            log_event(logging.WARNING, ident, "cut", **facts,
                      problem="the relay stops; it may have been sent")
            raise
        except RelayError as error:
            error.reply = dataclasses.replace(error.reply,
                                              text=f"{error.reply.text}, id {ident}")
            log_event(error.level, ident, "refused", **facts, reply=error.reply,
                      seconds=time.monotonic() - started, **error.facts)
            raise
        facts["request_id"] = response.headers.get("request-id")
        log_event(logging.INFO, ident, "sent", **facts, seconds=time.monotonic() - started)
        return ident

    def _deadline(self) -> float:
        return time.monotonic() + self.config.upstream_timeout


class Connection:
    """A client's connection: the shell around a Session."""

    def __init__(self, relay: Relay, context: ssl.SSLContext | None, name: str,
                 reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ident = secrets.token_hex(4)
        self.task: asyncio.Task[None] | None = None
        self.is_running = False
        self.is_stopping = False
        self._relay = relay
        self._context = context
        self._reader = reader
        self._writer = writer
        self._plain_writer = writer     # asyncio closes its transport when it is collected
        self._session = Session(relay.config, name, trace=self._trace)
        self._application: Application | None = None
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
                self._application = await self._relay.log_in(event, self.ident)
                self._session.authenticated()
            else:
                assert self._application is not None    # MAIL needs a login
                ident = await self._relay.deliver(self._application, event.envelope,
                                                  self.ident)
                self._session.delivered(f"Accepted by Microsoft 365, id {ident}")
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
        if self._writer.transport.is_closing():
            return                      # there is nobody who could hear a last word
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), LINGER)
        self._writer.transport.abort()

    def _trace(self, mark: str, what: object) -> None:
        if mark == "!":
            log_event(logging.INFO, self.ident, "refused", reply=what)
        elif log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s %s", self.ident, mark, escaped(what))


class Server:
    """Accepts connections, within the limits."""

    def __init__(self, relay: Relay, context: ssl.SSLContext | None) -> None:
        self._relay = relay
        self._context = context
        self._name = relay.config.server_name or _own_name()
        self._connections: set[Connection] = set()
        self._clients: collections.Counter[str] = collections.Counter()

    async def run(self, sockets: Iterable[tuple[socket.socket, bool]],
                  stop: asyncio.Event) -> None:
        """Serve until `stop` on bound sockets, each with whether it is for implicit TLS."""
        servers = []
        for sock, implicit_tls in sockets:
            accept = functools.partial(self._accept, implicit_tls)
            servers.append(await asyncio.start_server(accept, sock=sock, backlog=BACKLOG))
            log_event(logging.INFO, "-", "listening", address=sock.getsockname()[0],
                      port=sock.getsockname()[1], tls="implicit" if implicit_tls else
                      "starttls" if self._context else "off")
        await stop.wait()
        log_event(logging.INFO, "-", "stopping", connections=len(self._connections))
        for server in servers:
            server.close()
        await self._drain()

    async def _drain(self) -> None:
        """Let messages in flight end, then cut what is left."""
        for connection in list(self._connections):
            connection.stop()
        tasks = {one.task for one in self._connections if one.task}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._relay.config.shutdown_timeout)
            for task in late:
                task.cancel()
            if late:
                log_event(logging.WARNING, "-", "cut", connections=len(late))
                await asyncio.wait(late, timeout=GRACE)

    def _accept(self, implicit_tls: bool, reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        client = peer[0] if peer else "unknown"
        problem = self._find_problem(client)
        if problem:
            if not implicit_tls:
                writer.write(bytes(Reply(421, "4.7.0", f"{problem}; try again later")))
            writer.close()
            log_event(logging.WARNING, "-", "turned-away", client=client, reason=problem)
            return
        connection = Connection(self._relay, self._context, self._name, reader, writer)
        self._connections.add(connection)
        self._clients[client] += 1
        log_event(logging.INFO, connection.ident, "connected", client=client,
                  port=writer.get_extra_info("sockname")[1])
        connection.task = asyncio.ensure_future(connection.run(implicit_tls=implicit_tls))
        connection.task.add_done_callback(functools.partial(self._left, connection, client))

    def _find_problem(self, client: str) -> str:
        config = self._relay.config
        if len(self._connections) >= config.max_connections:
            return "Too many connections"
        if self._clients[client] >= config.max_connections_per_client:
            return "Too many connections from your address"
        return ""

    def _left(self, connection: Connection, client: str, task: asyncio.Task[None]) -> None:
        self._connections.discard(connection)
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]


def _own_name() -> str:
    """This machine's name, without asking DNS."""
    name = socket.gethostname()
    try:
        return _host_name(name) or "localhost"
    except ValueError:
        return "localhost"


def bind(config: Config) -> list[tuple[socket.socket, bool]]:
    """Open the ports; each with whether it is for implicit TLS. Raises StartError."""
    sockets = [(sock, False) for sock in _bind_port(config, "SMTP_PORT", config.smtp_port)]
    if config.smtps_port:
        sockets += [(sock, True)
                    for sock in _bind_port(config, "SMTPS_PORT", config.smtps_port)]
    return sockets


def _bind_port(config: Config, setting_name: str, port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(config.listen_address or None, port,
                                   type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            if sockets:                 # port 0: the one that the first got
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_bind_socket(family, kind, protocol, address))
            except OSError as error:
                # A machine without IPv6 still names it.
                if family != socket.AF_INET6 or error.errno in (errno.EADDRINUSE,
                                                                errno.EACCES):
                    raise
    except OSError as error:
        raise StartError(f"{setting_name}={port}, LISTEN_ADDRESS={config.listen_address}: "
                         f"cannot listen: {error.strerror or error}") from None
    if not sockets:
        raise StartError(f"LISTEN_ADDRESS={config.listen_address}: not an address of this "
                         "machine")
    return sockets


def _bind_socket(family: int, kind: int, protocol: int,
                 address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":          # elsewhere it would let two programs share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


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


def allow_open_files(config: Config) -> None:
    """Raise the soft limit of open files: a connection needs one, and one to Microsoft."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * config.max_connections + 100
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def run(config: Config, announce: Callable[[int], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `announce` is told the port. Raises StartError."""
    allow_open_files(config)
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)
    context = make_tls_context(config) if config.tls_source == "file" else None
    relay = Relay(config)
    sockets = bind(config)
    become(config.run_as)
    if announce:
        announce(sockets[0][0].getsockname()[1])
    asyncio.run(_run(relay, context, sockets))


def _leave(number: int, frame: object) -> None:
    """End before there is anything to end."""
    raise SystemExit(0)


async def _run(relay: Relay, context: ssl.SSLContext | None,
               sockets: list[tuple[socket.socket, bool]]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_loop_error)
    stop = asyncio.Event()

    def request_stop(number: int, frame: object) -> None:
        with contextlib.suppress(RuntimeError):         # the loop has ended already
            loop.call_soon_threadsafe(stop.set)

    for number in STOP_SIGNALS:
        signal.signal(number, request_stop)
    try:
        await Server(relay, context).run(sockets, stop)
    finally:
        relay.close()
    log_event(logging.INFO, "-", "stopped")


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what asyncio has to say, such as that there are no more file descriptors."""
    log_event(logging.ERROR, "-", "asyncio", problem=context.get("message"),
              error=context.get("exception"))


# ---------------------------------------------------------------------------
# §14  Demo
# ---------------------------------------------------------------------------

_TOKEN_PATH = re.compile("/[^/]+/oauth2/v2.0/token")
_SEND_PATH = re.compile("/v1.0/users/([^/]+)/sendMail")
DEMO_USER = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


class StandIn(http.server.BaseHTTPRequestHandler):
    """Plays Entra ID and Graph for the demo: any login is right, any message is kept."""

    protocol_version = "HTTP/1.1"
    timeout = 60                        # seconds
    outbox = pathlib.Path("outbox")

    def do_POST(self) -> None:
        """Answer a request for a token or for sendMail."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,8}", length):
            self.close_connection = True
            self._answer(411, {"error": {"code": "LengthRequired"}})
            return
        body = self.rfile.read(int(length))
        sending = _SEND_PATH.fullmatch(self.path)
        if _TOKEN_PATH.fullmatch(self.path):
            self._answer(200, {"token_type": "Bearer", "expires_in": 3599,
                               "access_token": secrets.token_urlsafe()})
        elif sending:
            self._send_mail(urllib.parse.unquote(sending[1]), body)
        else:
            self._answer(404, {"error": {"code": "ResourceNotFound"}})

    def _send_mail(self, mailbox: str, body: bytes) -> None:
        try:
            message = base64.b64decode(body, validate=True)
        except binascii.Error:
            self._answer(400, {"error": {"code": "ErrorMimeContentInvalidBase64String"}})
            return
        ident = decode_uuid(self.headers.get("client-request-id", "")) or str(uuid.uuid4())
        path = self.outbox / f"{time.strftime('%Y%m%d-%H%M%S')}-{ident}.eml"
        try:
            path.write_bytes(message)
        except OSError as error:
            print(f"{path} cannot be written: {error.strerror}", flush=True)
            self._answer(507, {"error": {"code": "ErrorQuotaExceeded"}})
            return
        print(f"{path}: {len(message)} octets from {escaped(mailbox)}", flush=True)
        self._answer(202)

    def _answer(self, status: int, answer: dict[str, Any] | None = None) -> None:
        body = json.dumps(answer).encode() if answer else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; the relay's log has it."""


def demo(environ: Mapping[str, str]) -> None:
    """Run in front of a stand-in for Microsoft. Raises ConfigError, StartError."""
    try:
        StandIn.outbox.mkdir(exist_ok=True)
    except OSError as error:
        raise StartError("the folder outbox cannot be made here: "
                         f"{error.strerror}") from None
    stand_in = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    url = f"http://127.0.0.1:{stand_in.server_address[1]}"
    config = Config.from_environ({
        **environ, "AZURE_AUTHORITY_HOST": url, "GRAPH_ENDPOINT": url, "TLS_SOURCE": "off",
        "REQUIRE_TLS": "false", "SMTPS_PORT": "0", "RUN_AS": "",
        "LISTEN_ADDRESS": environ.get("LISTEN_ADDRESS", "").strip() or "127.0.0.1"})
    threading.Thread(target=stand_in.serve_forever, daemon=True).start()
    with logging_to_stderr(config.log_level):
        run(config, functools.partial(_print_demo, config))


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
Each message is saved in {StandIn.outbox}/. Send a first one from another terminal:

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
# §15  Command line
# ---------------------------------------------------------------------------

def serve(environ: Mapping[str, str]) -> None:
    """Run the relay. Raises ConfigError, StartError."""
    config = Config.from_environ(environ)
    with logging_to_stderr(config.log_level):
        if environ.get("AZURE_TABLES_URL", "").strip():
            log_event(logging.WARNING, "-", "settings", problem="this version has no Azure "
                      "Tables: AZURE_TABLES_URL is ignored, and names such as scan@lookup "
                      "cannot log in")
        run(config)


SUBCOMMANDS: Mapping[str, Callable[[Mapping[str, str]], None]] = {
    "serve": serve,
    "demo": demo,
}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="smtp_oauth_relay.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Accept mail over SMTP, and send it through Microsoft 365.",
        epilog="environment variables (times in seconds, sizes in octets):\n"
               f"{settings_help()}\n\nHTTPS_PROXY, NO_PROXY and SSL_CERT_FILE work as in "
               "other programs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", nargs="?", choices=list(SUBCOMMANDS), default="serve",
                        help="serve (the default), or demo: try the relay without an "
                        "account, in front of a stand-in for Microsoft")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        SUBCOMMANDS[arguments.command](os.environ)
    except ConfigError as error:
        print(f"smtp_oauth_relay: settings that cannot be used:\n{error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"smtp_oauth_relay: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
