#!/usr/bin/env python3
"""Tests of smtp_oauth_relay.py:  python3 test_relay.py

They need only Python. The protocol is tested with bytes, received whole and in pieces.
Everything else is tested through real sockets, with smtplib as the client and with
FakeMicrosoft, which simulates Entra ID and Graph.

Helpers come first, then the tests in the order of the program's sections:

    §1 to §4    ReplyTests SecretTests SettingTests PathTests AccountTests UsernameTests
    §5          SessionTests
    §6, §7      RecipientTests CorpusTests FidelityTests DraftTests MemoryTests
    §8 to §10   EntraAnswerTests GraphAnswerTests QueuedMessageTests LogTests
    §11         ThreadTests HttpsTests HangTests SlowWorkTests LookUpTests
    §12 to §14  LoginTests CacheTests IdentityTests AccountLoginTests FailureTests
                ReloadTests TableTests
    §15         SendTests LargeMessageTests DraftFaultTests SlowUploadTests LimiterTests
    §16         SpoolTests FailedTests FullSpoolTests SlowDiskTests SpoolAccountTests
                SpoolStartTests SpoolCommandTests KillTests
    §18         VaultTests OldTlsTests NetworkTlsTests
    §17, §19    DuplicateTests ConnectionTests SlowReaderTests ConnectionLimitTests
                LimitTests ShutdownTests OverloadTests ResetTests ServeTests
    §20 to §22  DemoTests ExplainTests CommandLineTests AccountCommandTests
    the whole   FuzzTests

The long-running tests (fuzz, soak, kill) and the code that runs the tests come last.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import collections
import concurrent.futures
import contextlib
import dataclasses
import email
import email.policy
import email.utils
import errno
import functools
import gc
import io
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import py_compile
import queue
import quopri
import random
import re
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
import urllib.parse
import urllib.request
import warnings
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Callable, NamedTuple

import smtp_oauth_relay as relay

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = HERE / "smtp_oauth_relay.py"
PATIENCE = 20.0         # seconds until a test that waits for an event fails
HANGING = 6 * PATIENCE  # seconds that a simulated hang lasts, unless the test ends it
# For tests in which Microsoft responds in time, even on a machine that stalls for seconds.
# The value is below PATIENCE so that a test still gets the reply to a request that hangs.
UNHURRIED = {"UPSTREAM_TIMEOUT": "15"}

TENANT = "11111111-1111-4111-8111-111111111111"
CLIENT = "22222222-2222-4222-8222-222222222222"
USER = f"{TENANT}@{CLIENT}"
SENDER = "scanner@example.com"

REAL_COST, relay.SCRYPT_COST = relay.SCRYPT_COST, 2 ** 4    # cheap from the first hash on

PDF = ("Content-Type: application/pdf; name=scan.pdf\nContent-Transfer-Encoding: base64\n"
       "Content-Disposition: attachment; filename=scan.pdf\n\nJVBERi0x\n")
PLAIN = "Content-Type: text/plain; charset=utf-8\n\nHello\n"

FROM = f"From: {SENDER}\n"
NAMED = f"From: Scan <{SENDER}>\nTo: a@x.y\n"


def crlf(text: bytes | str) -> bytes:
    """Return a message written in this file with the line ends of SMTP, CRLF."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def multipart(subtype: str, *parts: str, header: str = "") -> str:
    """Return a multipart; its boundary depends on the length of the parts."""
    boundary = f"b{len(''.join(parts))}"
    return (f"{header}Content-Type: multipart/{subtype}; boundary=\"{boundary}\"\n\n"
            + "".join(f"--{boundary}\n{part}\n" for part in parts) + f"--{boundary}--\n")


class Case(NamedTuple):
    """A message of the corpus: as a client sends it, and as Graph receives it."""

    name: str
    sent: bytes | str
    wanted: bytes | str     # "": unchanged; "550 5.7.1" and the like: the refusal
    to: str = "a@x.y"
    sender: str = SENDER
    mailbox: str = SENDER       # the sending mailbox


# The key is a setting. Each message passes a real socket and is compared byte for byte.
CORPUS: dict[str, tuple[Case, ...]] = {
    "": (
        # Correct messages stay as they are.
        *(Case(name, NAMED.encode() + crlf(rest), "") for name, rest in (
            ("folded and odd white space", "Subject:  odd \t x\n  y\nX:\n\nT\n"),
            ("MIME", multipart("mixed", PLAIN, PDF, header="MIME-Version: 1.0\n")),
            ("encrypted", multipart("encrypted", "Content-Type: application/pgp-encrypted\n"
                                    "\nVersion: 1\n", PDF)),
            ("quoted-printable", "Content-Transfer-Encoding: quoted-printable\n\n=\n=\na =3D \t\n"),
            ("a message in a message", "Content-Type: message/rfc822\n\nTo: o@x.y\n\nText\n"),
            ("broken MIME", "Content-Type: multipart/mixed; boundary=\n\n--\n"),
            ("8 bit", b"Subject: \xfc\xff\n\n\xfc\xff\x80\n"),
            ("controls", b"X: \0\n\n\0\0\x1a\x04\x7f\x1b[1m\n"),
            ("long lines", f"X: {'x' * 100_000}\n\n{'x' * 100_000}\n"),
            ("dots", "\n.\n..\n...\n.x\nx.\n"), ("no body", "\n"),
            ("no empty line after the header", "Subject: s\n"),
            ("a body that looks like a header", "\nTo: o@x.y\nBcc: p@x.y\n\nx\n"))),
        # The value of From, and the new value; "": it stays as it is.
        *(Case(f"From {old}", f"From:{old}\nTo: a@x.y\n\nText\n",
               f"From:{new or old}\nTo: a@x.y\n\nText\n")
          for old, new in (
              ("", f" {SENDER}"), (" ", f" {SENDER}"), (f" J\udcf6rg <{SENDER}>", ""),
              (SENDER.upper(), ""), (" o@x.y", ""), (" Scanner", ""), (f" D, J <{SENDER}>", ""),
              (f" {SENDER}\nFrom: {SENDER}", ""), (f" =?utf-8?Q?=C3=BC?= <{SENDER}>", ""),
              (f" \"scan@office\" <{SENDER}>", ""), (f" [Scan] <{SENDER}>", ""),
              (f" (Scan) {SENDER}", ""), (" =?utf-8?q?x?= @ home", ""),
              # Display names with an unquoted "@".
              (f" {SENDER} <{SENDER}>", f" <{SENDER}>"),
              *((f" {old} <{SENDER}>", f" {new} <{SENDER}>") for old, new in (
                  ("scan@office", '"scan@office"'),
                  ("a@b\u3000c  \n d", '"a@b\u3000c d"'),
                  ("=?utf-8?q?=C3=BC?= @ home", '=?utf-8?q?=C3=BC?= "@ home"'),
                  ("=?a@b =?utf-8?q?x?=y", '"=?a@b =?utf-8?q?x?=y"'),
                  ("scan @ office, floor 2", '"scan @ office, floor 2"'),
                  ("=?utf-8?q?J=C3=BC?= Scan: x@y", '=?utf-8?q?J=C3=BC?= "Scan: x@y"'),
                  ("=?utf-8?q?J=C3=BC?=, x@y\n\tz", '=?utf-8?q?J=C3=BC?= ", x@y z"'),
                  ("[a@b] \"Q\"", '"[a@b] \\"Q\\""'))))),
        Case("no From", "To: a@x.y\nSubject: \udcff\n\n", FROM + "To: a@x.y\nSubject: \udcff\n\n"),
        Case("null reverse-path", "From: Me <me@x.y>\nTo: a@x.y\n\n", "", sender="",
             mailbox="me@x.y"),
        Case("null reverse-path and no From", "To: a@x.y\n\n", "550 5.1.7", sender=""),
        # Without a header an empty line precedes the text.
        *(Case(f"text {text[:20]!r}", text, FROM.encode() + crlf("Bcc: a@x.y\n" + "\n" * more)
               + crlf(text))
          for more, text in (
              (1, ""), (0, "\n"), (0, "\nHello\n"), (0, "Subject: s\n"), (1, "H\n\nTo: o@x.y\n"),
              (1, "\udcfc\0\n.\n"), (1, "From today on we are closed.\n"),
              (1, "UPS on battery\nTime: 12:00\nLoad: 40 %\n"), (1, "Hello\n" * 300_000),
              (1, "Alarm: zone 3\nTime: 12:00\n"), (1, "  Alarm\nTime: 12:00\n"))),
        *(Case("text right after the header", NAMED + text, f"{NAMED}\n{text}")
          for text in ("Hello\n\nText\n", "Hello\nhttp://a/b\nBye\n", "HTTPS://a/b\n",
                       "ftp://a/b\n")),
        Case("a header that is too large", NAMED + "X-A: b\n" * 200_000 + "\nText\n", "552 5.3.4"),
        *(Case("an mbox line", f"From {rest}\n{NAMED}\nText\n", NAMED + "\nText\n") for rest in (
            "scan@x.y Thu Nov 24 18:22:48 2026", "scan at x.y  Thu Nov 24 2026", "MAILER-DAEMON")),
        # Recipients, as Graph reads them.
        Case("several", NAMED.replace("a@x.y", "A\n\t<a@x.y>; G <o@x.y>") + "Cc: T: b@x.y;\n\n",
             f"Bcc: \u00fc@x.y\n{NAMED}".replace("a@x.y", "A\n\t<a@x.y>")
             + "X-Original-To: G <o@x.y>\nCc: T: b@x.y;\n\n", "a@x.y b@x.y \u00fc@x.y"),
        Case("two Bcc", NAMED + "Bcc: b@x.y\nBCC: c@x.y\n\n",
             "Bcc: b@x.y,\n c@x.y,\n d@x.y\n" + NAMED + "\n", "a@x.y b@x.y c@x.y d@x.y"),
    ),
    "SENDER_FROM=header": (
        Case("a comma in the name", "From: Doe, John <Me@x.y>\nTo: a@x.y\n\n", "",
             mailbox="Me@x.y"),
        Case("a mailbox that is not UTF-8", "From: \"m\udcfc\"@x.y\nTo: a@x.y\n\n", ""),
        Case("From names the mailbox", "From: Me <Me@x.y>, n@x.y\nTo: a@x.y\n\n", "",
             mailbox="Me@x.y"),
        Case("no From", "To: a@x.y\n\n", FROM + "To: a@x.y\n\n"),
        Case("a From without an address", "From: Scanner\nTo: a@x.y\n\n", ""),
        Case("no From and no reverse-path", "Subject: s\n\n", "550 5.1.7", sender=""),
    ),
    "FROM_MISMATCH=rewrite": (
        Case("matching", NAMED + "\n", ""),
        *(Case(f"rewrite {old}", f"From: {old}\nTo: a@x.y\n\n",
               f"From: {new}\nReply-To: o@real.com\nTo: a@x.y\n\n")
          for old, new in (
              ('"Scan, 2" <o@real.com>', f'"Scan, 2" <{SENDER}>'), ("o@real.com", SENDER),
              ("o@real.com <o@real.com>", f"<{SENDER}>"),
              ("J\udcf6rg\n (x)\n <o@real.com>", f'"J\udcf6rg (x)" <{SENDER}>'),
              ("scan@office <o@real.com>", f'"scan@office" <{SENDER}>'),
              ("o@real.com (Scan)", f"{SENDER} (Scan)"))),
        Case("an existing Reply-To stays", "From: S <o@real.com>\nReply-To: r@x.y\nTo: a@x.y\n\n",
             f"From: S <{SENDER}>\nReply-To: r@x.y\nTo: a@x.y\n\n"),
        *(Case(f"no Reply-To for {old}", f"From: S <{old}>\nTo: a@x.y\n\n",
               f"From: S <{SENDER}>\nTo: a@x.y\n\n")
          for old in ("scan@printer.local", "scan@printer", "scan@[192.168.1.7]", "root@localhost",
                      "scan@x.lan", "scan@192.168.1.7", "scan@PRINTER.LOCAL", USER,
                      *(f"scan@x.{top}" for top in ("arpa", "corp", "example", "home", "internal",
                                                    "invalid", "localhost", "test")))),
        Case("no Reply-To but the sender", f"From: A <{SENDER}>, B <scan@printer>\nTo: a@x.y\n\n",
             f"From: A <{SENDER}>\nX-Original-From: A <{SENDER}>, B <scan@printer>\n"
             "To: a@x.y\n\n"),
        Case("several", f"From: A <o@real.com>, B <{SENDER}>\nFrom: p@real.com\nTo: a@x.y\n\n",
             f"From: A <{SENDER}>\nReply-To: o@real.com,\n {SENDER},\n p@real.com\n"
             "X-Original-From: A "
             f"<o@real.com>, B <{SENDER}>\nX-Original-From: p@real.com\nTo: a@x.y\n\n"),
        # A value that is not an address list may still contain a name and an address.
        *(Case(f"not an address list: {old}", f"From: {old}\nTo: a@x.y\n\n",
               f"From: {new}<{SENDER}>\n{more}To: a@x.y\n\n")
          for old, new, more in (
              ("Scanner", '"Scanner" ', "X-Original-From: Scanner\n"),
              ("root (Cron Daemon)", '"Cron Daemon" ',
               "X-Original-From: root (Cron Daemon)\n"),
              ("Cron Daemon <root>", '"Cron Daemon" ',
               "X-Original-From: Cron Daemon <root>\n"),
              ("Doe, John <o@real.com>", '"Doe, John" ', "Reply-To: o@real.com\n"),
              ("=?utf-8?q?J=C3=BC?= Doe, X <o@real.com>", '=?utf-8?q?J=C3=BC?= "Doe, X" ',
               "Reply-To: o@real.com\n"),
              ("Doe, X\n\t=?utf-8?q?J=C3=BC?= <o@real.com>", '"Doe, X" =?utf-8?q?J=C3=BC?= ',
               "Reply-To: o@real.com\n"),
              ("RE: \"x\" \\ <o@real.com> ", '"RE: \\"x\\" \\\\" ', "Reply-To: o@real.com\n"),
              ('"Cron, 1" <root>', '"Cron, 1" ', 'X-Original-From: "Cron, 1" <root>\n'),
              ("\"a\n b\" <o@real.com>", '"a b" ', "Reply-To: o@real.com\n"),
              ("J\0oe <o@real.com>", '"Joe" ', "Reply-To: o@real.com\n"),
              ("Joe) <o@real.com>", '"Joe)" ', "Reply-To: o@real.com\n"),
              ("[a@b] Joe <o@real.com>", '"[a@b] Joe" ', "Reply-To: o@real.com\n"),
              (f"{SENDER} <o@real.com>", f'"{SENDER}" ', "Reply-To: o@real.com\n"),
              ('"Joe <o@real.com>', '"\\"Joe" ', "Reply-To: o@real.com\n"),
              ("A <o@real.com> <p@real.com>", "",
               "X-Original-From: A <o@real.com> <p@real.com>\n"),
              ("\"m\udcfcller\"@real.com", '"\\"m\udcfcller\\"@real.com" ',
               "X-Original-From: \"m\udcfcller\"@real.com\n"))),
    ),
    "HEADER_RECIPIENTS=keep": (
        Case("matching", NAMED + "\n", ""),
        Case("others, kept", FROM + "To: o@x.y; p@x.y\nCc: a@x.y\nBcc: q@x.y\n\n", ""),
        Case("others, also in Bcc", FROM + "To: o@x.y\nBcc: Q <q@x.y>, a@x.y\nBcc: (\n\n",
             "Bcc: Q <q@x.y>,\n a@x.y,\n b@x.y\n" + FROM + "To: o@x.y\nBcc: (\n\n",
             "a@x.y b@x.y"),
        Case("others, after a semicolon", FROM + "To: o@x.y; a@x.y\n\n",
             "Bcc: a@x.y\n" + FROM + "To: o@x.y; a@x.y\n\n"),
    ),
}


def pem(label: str, text: str) -> str:
    """Return base64 text as PEM with lines of 64 characters."""
    lines = re.findall(".{1,64}", text.replace("\n", ""))
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])


VAULT_PEM = pem("PRIVATE KEY", """\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgRx82+Y+HP0f4oWZKyHlUgGe7oiJFRipIxCt90g4Kd/Oh
RANCAATPhc0+fYTuKVwM3aKtqm/bW0PBAj5KKZAHcH6EbVaJ/VKOHklxBOS+cLMI7h4DA+WYAuExGPHDohDYn9on42V+
""") + pem("CERTIFICATE", """\
MIIBxzCCAW2gAwIBAgIUJbbZVGlmIic+tukfXF0jBsZrqLAwCgYIKoZIzj0EAwIwHDEaMBgGA1UEAwwRVGVzdCBJbnRl
cm1lZGlhdGUwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMMCWxvY2FsaG9zdDBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABM+FzT59hO4pXAzdoq2qb9tbQ8ECPkopkAdwfoRtVon9Uo4eSXEE5L5wswjuHgMD
5ZgC4TEY8cOiENif2ifjZX6jgZIwgY8wGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAwGA1UdEwEB/wQCMAAwDgYD
VR0PAQH/BAQDAgeAMBMGA1UdJQQMMAoGCCsGAQUFBwMBMB0GA1UdDgQWBBRPG6L6ba1sOVW1oawXKYLaC4usIjAfBgNV
HSMEGDAWgBTq0SBNKotFyL0JtWYNEjMkhPHl6jAKBggqhkjOPQQDAgNIADBFAiEAz+9klAk4UeZeb2Wko2iTOj4Udma1
5qaLSBzR/SKhISgCIHfVJlIzt0Dz9kgZG3R0jk9/+3TfeWv4gZqJyvjEk7De
""") + pem("CERTIFICATE", """\
MIIBmTCCAUCgAwIBAgIUcNXE9nykeeB0YbOx8/Mlbh9KykUwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJVGVzdCBSb290
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAcMRowGAYDVQQDDBFUZXN0IEludGVybWVkaWF0ZTBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABMsUoVPGuSW4sD3MDUsPLU1Pj2SnLRPwt5YtaVd/D//71jlDBgLpCmuDFdKmeuKO
FbGmyCAqVsBHsxUYsMmgVIyjZjBkMBIGA1UdEwEB/wQIMAYBAf8CAQAwDgYDVR0PAQH/BAQDAgEGMB0GA1UdDgQWBBTq
0SBNKotFyL0JtWYNEjMkhPHl6jAfBgNVHSMEGDAWgBRhRm8ZVHbzlDwI7eeMO7FEOJyZNDAKBggqhkjOPQQDAgNHADBE
AiB3eB6YpAnW76zX6QGon/Jg8mZ4tluac46Mq5AVWjg1agIgELlNOmmtqsIWejMK53rP8aLwOyLb+HfEgRUx8+lJiXk=
""")

FILES: Files

PASSWORD = "ten-lettrs"                                 # of a device
HASH = relay.hash_password(PASSWORD, b"sixteen bytes...")
APPLICATION = f"tenant_id = {TENANT}\nclient_id = {CLIENT}\n"

EXAMPLE = f"""\
[DEFAULT]
tenant_id = {TENANT}
client_id = {CLIENT}
client_secret = s3cr~t._-            ; or client_secret_file, or neither

[scan2]                              ; the user name that the device types
password = {HASH}
from_email = scanner@example.com     # sends as this mailbox
allowed_recipients = example.com,
    boss@partner.example
allowed_senders = example.com
networks = 192.168.7.0/24, fd00:7::/64
login = optional
require_tls = false
tls_min_version = 1.0

[direct@example.com]
client_secret =
"""

SHORT_TENANT = base64.urlsafe_b64encode(bytes.fromhex(TENANT.replace("-", ""))).decode()[:22]
SHORT_CLIENT = base64.urlsafe_b64encode(bytes.fromhex(CLIENT.replace("-", ""))).decode()[:22]


def plain(user: str = USER, password: str = "secret", authorize: str = "") -> bytes:
    """Return the client's base64 response of AUTH PLAIN, RFC 4616."""
    return base64.b64encode(f"{authorize}\0{user}\0{password}".encode())


LOGIN = b"AUTH PLAIN " + plain() + b"\r\n"
MAIL = b"MAIL FROM:<a@b.c>\r\n"
RCPT = b"RCPT TO:<d@e.f>\r\n"

HTML = "Content-Type: text/html\n\n<p>Hello <img src=\"cid:logo@x.y\"></p>\n"
IMAGE = ("Content-Type: image/png\nContent-ID: <Logo@x.y>\nContent-Transfer-Encoding: base64\n"
         "\niVBORw==\n")


class Request(NamedTuple):
    """A request that the fake received."""

    kind: str               # a key of KINDS, or "other"
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int         # number of its connection

    def part(self, number: int) -> str:
        """Return a segment of the path: 3 is the mailbox, 5 the draft."""
        return urllib.parse.unquote(self.path.split("/")[number])

    @property
    def form(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.body.decode()))


# An action responds to a request on a socket. It returns whether the connection stays open.
Action = Callable[[socket.socket, Request], bool]

ACCOUNTS = f"""\
[DEFAULT]
{APPLICATION}
[scan2]
password = {HASH}
client_secret = secret of the relay
from_email = scanner@example.com
allowed_recipients = x.y

[Own.Secret]
allowed_senders = example.com

[guest]
client_secret = secret of the relay
networks = 127.0.0.2, 127.0.2.0/24
login = optional

[inside]
client_secret = secret of the relay
password = {HASH}
networks = 127.0.0.3

[secret.inside]
networks = 127.0.0.3

[cloud]
credential = managed-identity
client_id =
password = {HASH}
"""
needs_loopbacks = unittest.skipUnless(sys.platform == "linux", "needs 127.0.0.2")
needs_openssl = unittest.skipUnless(shutil.which("openssl"), "needs the openssl command")

ODD_NAMES = ("o'brien", "a.b", "100%", "%27", "\u00dcn\u00efc\u00f6de \u2603", "a b", "''", "a@b",
             "' or 'a' eq 'a'", "x)", "a,RowKey='b", "&$top=5", "+", "x" * 512)


def scan(size: int, mime: str = "application/pdf", name: str = "scan.pdf") -> tuple[str, bytes]:
    """Return a part with an attachment of `size` bytes, and these bytes."""
    data = random.Random(size).getrandbits(8 * size).to_bytes(size, "little") if size else b""
    return (f"Content-Type: {mime}; name={name}\nContent-Disposition: attachment; "
            f"filename={name}\nContent-Transfer-Encoding: base64\n\n"
            + base64.encodebytes(data).decode()), data


SCAN, SCAN_OCTETS = scan(3_200_000)     # two chunks
LARGE = crlf(multipart("mixed", PLAIN, SCAN, header=NAMED + "Subject: s\n"))

# The program with short delays. It kills itself at the Nth of the points before and after
# each change that it makes to the disk.
KILLED = """
import os, pathlib, signal, sys
import smtp_oauth_relay as relay
relay.MIN_BACKOFF, relay.MAX_BACKOFF, relay.MAX_SLEEP = 0.02, 0.1, 0.1
relay.MIN_RETRY_DELAY, relay.DEFAULT_RETRY_DELAY = 0.1, 0.3
left = int(sys.argv[1])

def count(call):
    def counting(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **options)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return counting

if left:
    os.fsync, os.open = count(os.fsync), count(os.open)
    pathlib.Path.rename = count(pathlib.Path.rename)
    pathlib.Path.unlink = count(pathlib.Path.unlink)
sys.exit(relay.main([]))
"""

SHORT = 2.0             # seconds of UPSTREAM_TIMEOUT where a test waits for its end
SIMPLE = b"To: a@x.y\r\nSubject: s\r\n\r\nText\r\n"
BULKY = b"To: a@x.y\r\n\r\n" + b"x" * 2_990_000 + b"\r\n"        # still one request
TWO_FILES = crlf(multipart("mixed", PLAIN, PDF, SCAN, header=NAMED))
LOOK_UP_USER = "app1@lookup"        # listed in the table
# Where the fake can stop responding: the bytes that it sends, and the bytes that it then
# repeats one at a time, each within any socket timeout. Class Between adds to these cases.
STOPS = {
    "half of the request": (b"", b""), "before the headers": (b"", b""),
    "in the status line": (b"HTTP/1.", b""),
    "in the headers": (b"HTTP/1.1 STATUS No\r\nContent-Le", b""),
    "before the body": (b"HTTP/1.1 STATUS No\r\nContent-Length: 99\r\n\r\n", b""),
    "in the body": (b'HTTP/1.1 STATUS No\r\nContent-Length: 99\r\n\r\n{"id": "x', b""),
    "trickling the status line": (b"HTTP/1.1", b" "),
    "trickling the headers": (b"HTTP/1.1 STATUS No\r\n", b"X-Slow: x\r\n"),
    "trickling the body": (b"HTTP/1.1 STATUS No\r\nContent-Length: 9999\r\n\r\n", b"1"),
    "trickling after the body": (b"HTTP/1.1 STATUS No\r\nConnection: close\r\n\r\n"
                                 b'{"error": {"code": "ErrorQuotaExceeded"}}', b" "),
    "trickling a chunked body": (
        b"HTTP/1.1 STATUS No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")}
STOPPED_KINDS = {       # the message that waits (None: a login), and the status that is sent
    "token": (None, 200), "imds": (None, 200), "table": (None, 200), "send": (BULKY, 403),
    "draft": (TWO_FILES, 201), "attach": (TWO_FILES, 201), "open": (TWO_FILES, 201),
    "put": (TWO_FILES, 200), "send-draft": (TWO_FILES, 403)}

# The reply to MAIL where it is allowed, and the mailbox. Only an anonymous client gets 550.
MAIL_ARGUMENTS = {
    "FROM:<a@b.c>": (250, "a@b.c"), "from:<a@b.c>": (250, "a@b.c"),
    "FROM: a@b.c": (250, "a@b.c"), "FROM:<>": (250, ""), "FROM:<@r.s:a@b.c>": (250, "a@b.c"),
    "FROM:<a@b.c> SIZE=100 BODY=8BITMIME": (250, "a@b.c"),
    "FROM:<a@b.c> SMTPUTF8 AUTH=<>": (250, "a@b.c"), "FROM:<z@b.c>": (550, "z@b.c"),
    "FROM:<\u00fc@b.c>": (553, ""), "FROM:<a b@c>": (501, ""), "FROM:<a@b.c": (501, ""),
    "TO:<a@b.c>": (501, ""), "FROM:<a@b.c> SIZE=x": (501, ""), "FROM:<a@b.c>SIZE=1": (501, ""),
    "FROM:<a@b.c> SIZE=1 SIZE=1": (501, ""), "FROM:<a@b.c> RET=HDRS": (555, ""),
    "FROM:<a@b.c> SIZE=36700161": (552, "")}
# The same for RCPT; the last value is equal for two spellings of one mailbox.
RCPT_ARGUMENTS = {
    "TO:<d@e.f>": (250, "d@e.f", "d@e.f"), "to: <d@e.f>": (250, "d@e.f", "d@e.f"),
    "TO:<D@E.f>": (250, "D@E.f", "d@e.f"), 'TO:<"d"@e.f>': (250, '"d"@e.f', "d@e.f"),
    "TO:<x@ok.example>": (250, "x@ok.example", "x@ok.example"),
    'TO:<"x y"@ok.example>': (250, '"x y"@ok.example', "x y@ok.example"),
    "TO:<g@e.f>": (550, "g@e.f", "g@e.f"), "TO:<h@[192.0.2.1]>": (550, "h@[192.0.2.1]",
                                                               "h@[192.0.2.1]"),
    "TO:<\u00fc@ok.example>": (553, "\u00fc@ok.example", "\u00fc@ok.example"),
    "TO:<>": (501, "", ""), "TO:<d>": (501, "", ""), "FROM:<d@e.f>": (501, "", ""),
    "TO:<d@[]>": (501, "", ""), "TO:<d@e.f> NOTIFY=NEVER": (555, "", "")}

MOST_RECIPIENTS = 3

HALF = b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\nRetry-After: 0\r\n"


def split_octets(data: bytes) -> list[bytes]:
    """Return the bytes one by one, as a slow client sends them."""
    return [bytes([byte]) for byte in data]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An action that sends a response."""

    status: int
    data: bytes

    def __call__(self, sock: socket.socket, request: Request) -> bool:
        sock.sendall(self.data)
        return True


def say(status: int, body: Any = b"", **headers: str) -> Answer:
    """Respond with a status, a body (JSON unless bytes) and headers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Some Reason", f"Content-Length: {len(data)}",
             "request-id: graph-request-1",
             *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return Answer(status, "\r\n".join([*lines, "", ""]).encode() + data)


def graph_says(status: int, code: str, **headers: str) -> Answer:
    """Respond with an error in the format of Graph."""
    return say(status, {"error": {"code": code, "message": "Some message."}}, **headers)


def utter(data: bytes, *, reset: bool = False) -> Action:
    """Send these bytes as they are, and close."""
    def action(sock: socket.socket, request: Request) -> bool:
        sock.sendall(data)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return False
    return action


def trickle(head: bytes, tail: bytes) -> Action:
    """Send `head`, then `tail` endlessly, a byte at a time, each within any timeout."""
    def action(sock: socket.socket, request: Request) -> bool:
        sock.sendall(head)
        timer = threading.Event()
        with contextlib.suppress(OSError):
            for byte in itertools.cycle(split_octets(tail)):
                sock.sendall(byte)
                timer.wait(0.02)
        return False
    return action


def reset(sock: Any) -> None:
    """Close at once: the other side gets a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()        # with TLS, without a close_notify


ANSWERS: dict[str, Action] = {          # failures; some also with the prefix "taken"
    "429": say(429), "429 soon": say(429, Retry_After="0.3"), "429 now": say(429, Retry_After="0"),
    "429 past": say(429, Retry_After="Mon, 01 Jan 2024 00:00:00 GMT"),
    "429 never": say(429, Retry_After="Mon, 01 Jan 2124 00:00:00 GMT"),
    "429 garbage": say(429, Retry_After="soon"), "503 soon": say(503, Retry_After="0.2"),
    "503": say(503), "500": say(500), "502": say(502, b"<html>Bad gateway</html>"),
    "504": graph_says(504, "Timeout"), "close": utter(b""), "reset": utter(b"", reset=True),
    "half status": utter(b"HTTP/1.1 50"), "half header": utter(HALF), "200": say(200),
    "half header, reset": utter(HALF, reset=True), "half body": utter(HALF + b"\r\n{\"er"),
    "garbage": utter(b"\0\xff\r\n\r\n"), "302": say(302, Location="http://127.0.0.1:9/"),
    "400": graph_says(400, "ErrorInvalidRecipients"), "403": graph_says(403, "ErrorAccessDenied"),
    "507": graph_says(507, "ErrorQuotaExceeded"), "trickle": trickle(
        b"HTTP/1.1 500 No\r\n", b"X-Slow: x\r\n"), "trickle status": trickle(b"HTTP/1.1", b" "),
    "long 202": utter(b"HTTP/1.1 202 Accepted\r\nX-Long: " + b"x" * 70_000),
    "trickled 202": trickle(b"HTTP/1.1 202 Accepted\r\n", b"X-Slow: x\r\n")}
TAKEN = ("500", "502", "504", "503", "close", "reset", "half status", "half header, reset", "200",
         "garbage", "trickle", "trickle status", "hang", "302", "long 202", "trickled 202")
# Microsoft accepts the message with 202, then fails: the message counts as sent.
SAID_202 = {name: utter(b"HTTP/1.1 202 Accepted\r\n" + rest) for name, rest in (
    ("202 close", b""), ("202 half", b"Content-Length: 5\r\n\r\nx"), ("202 header", b"Content-Le"))}
GOOD = ("slow", "expire", "then close", *SAID_202)
# TAKEN counts twice because a retry of each of these would send a duplicate.
SEND_FAULTS = (*ANSWERS, "hang", *GOOD, *(f"taken {name}" for name in TAKEN * 2))

# Failures of the token endpoint; {secret} is a part of the request that it might repeat.
TOKEN_ANSWERS = {
    "429": (429, "Too many requests"), "503": (503, "{secret}"), "html": (200, "<html>{secret}"),
    "400": (400, "{{ {secret}"), "500": (500, '{{"error": "server_error"}}'),
    "200": (200, '{{"access_token": 5, "expires_in": "x"}}'),
    "refused": (400, '{{"error": "invalid_request", "error_description": "AADSTS1: {secret}"}}')}

# All passwords begin with this word so that a test can find them in the log. That works in
# base64 too, because the word begins at a multiple of three bytes, after USER and two NULs.
SECRET = "hidden-word"

IS_LINUX = sys.platform == "linux"      # there each visitor has its own address

# The longest classes start first. Classes in APART are split into their tests.
APART = ("OverloadTests", "FuzzTests")

LISTS = ("failures", "errors", "skipped", "collectedDurations")      # of a test result

# ---------------------------------------------------------------------------
# Helpers

CA_CERT = pem("CERTIFICATE", """\
MIIBizCCATGgAwIBAgIUepMSlR3LL23PUrYmc8sDe2sTZzcwCgYIKoZIzj0EAwIwEjEQMA4GA1UEAwwHVGVzdCBDQTAg
Fw0yNjExMjMxOTUxMzNaGA8yMTI2MTAzMDE5NTEzM1owEjEQMA4GA1UEAwwHVGVzdCBDQTBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABF479oT+23Lg4eERdQ4ZwOTNL80BTSqyHeL4XhKowrZciWJyiGATrcW9XqBWKMlr8PS2lO2rcXjHqhVL
2V9mUkKjYzBhMB0GA1UdDgQWBBRwRkNz9XZyf4AnIsPsCwVlGA+wbjAfBgNVHSMEGDAWgBRwRkNz9XZyf4AnIsPsCwVl
GA+wbjAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwICBDAKBggqhkjOPQQDAgNIADBFAiEA13k1ovjUqIAzz1gb
WYUzFL11edi8sz/WlYj0ez+lLxsCIDC0JHHTZKP9LNelhi/dFZLJmseijZ7FUxq/k/MuPCbp
""")

SERVER_CERT = pem("CERTIFICATE", """\
MIIBkDCCATagAwIBAgIBATAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMCAXDTI2MTEyMzE5NTEzM1oYDzIx
MjYxMDMwMTk1MTMzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQqkPPocq5v
wWcFMdhumWpYbsQg0MlS/yHXIAmGLEmWAw0RxjVyFOEiqGANUyJDhPOy49CK/1O7i2wM5Efn3xFco3kwdzAaBgNVHREE
EzARgglsb2NhbGhvc3SHBH8AAAEwDAYDVR0TAQH/BAIwADALBgNVHQ8EBAMCB4AwHwYDVR0jBBgwFoAUcEZDc/V2cn+A
JyLD7AsFZRgPsG4wHQYDVR0OBBYEFKwE795TWtvmBxcEBnotneitf9ORMAoGCCqGSM49BAMCA0gAMEUCIQCXx+ALZO7t
EWSmdrNWoRjzftzgb3EOphyZfIOo1HZFTAIgT06wminEx1qnHaP28kqWZvE61BCAx4Lc4l1TSRcOQoA=
""")

EXPIRED_CERT = pem("CERTIFICATE", """\
MIIBjzCCATSgAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMB4XDTIwMDEwMTAwMDAwMFoXDTIw
MDEzMTAwMDAwMFowFDESMBAGA1UEAwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEKpDz6HKub8Fn
BTHYbplqWG7EINDJUv8h1yAJhixJlgMNEcY1chThIqhgDVMiQ4TzsuPQiv9Tu4tsDORH598RXKN5MHcwGgYDVR0RBBMw
EYIJbG9jYWxob3N0hwR/AAABMAwGA1UdEwEB/wQCMAAwCwYDVR0PBAQDAgeAMB8GA1UdIwQYMBaAFHBGQ3P1dnJ/gCci
w+wLBWUYD7BuMB0GA1UdDgQWBBSsBO/eU1rb5gcXBAZ6LZ3orX/TkTAKBggqhkjOPQQDAgNJADBGAiEA0O+YmP79Vhm0
16OS5Z0viLfNMEPFMKkb6w0Urt7XP5cCIQC5RHqRmIXtgrd/lyXt0Or0zgXJjcmoPoC5VQnBn6JwoQ==
""")

SERVER_KEY = pem("PRIVATE KEY", """\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXeCohDPY3Sc2Ns4Mqlzh7PQ5BJnOIAALt/2H3IrCkOah
RANCAAQqkPPocq5vwWcFMdhumWpYbsQg0MlS/yHXIAmGLEmWAw0RxjVyFOEiqGANUyJDhPOy49CK/1O7i2wM5Efn3xFc
""")

ENCRYPTED_KEY = pem("ENCRYPTED PRIVATE KEY", """\
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAiSPxydPHotLAICCAAwDAYIKoZIhvcNAgkFADAdBglghkgB
ZQMEASoEEBEnR4g7T+b1xlGGRwXv+ZsEgZAkvU1lnyIag3k9ApwwTPKdLMuURetSmH2M4BBCaM9rGuz7KdPge4vgSURW
04+sYtLxA7028WCSLmQiwOoBgQD4tGM4dw1EuVLX+AvtJMx+Xc1274BfEykWxQBEkd8tcJIyyyMvoFcZ2Vo0TjDAzvQj
cZDSPt0fiv+gTf5XedNA1ldayrnrkMHK89PN+jX2Cd0=
""")


class Files:
    """A temporary directory with the certificates and keys."""

    def __init__(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="relay-test-"))
        for name, text in (("ca.pem", CA_CERT), ("cert.pem", SERVER_CERT),
                           ("expired.pem", EXPIRED_CERT), ("key.pem", SERVER_KEY),
                           ("other.pem", VAULT_PEM), ("encrypted.pem", ENCRYPTED_KEY)):
            self.write(name, text)

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


def free_port() -> int:
    """Return a port without a listener, below 32768, where the ports of clients begin."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def setUpModule() -> None:
    """Create the files and silence the log; tests that read it add a handler."""
    global FILES
    FILES = Files()
    relay.log.addHandler(logging.NullHandler())
    relay.log.setLevel("DEBUG")         # so that its formatting is tested too
    relay.log.propagate = False
    # Shorten the delays that are meant for people and attackers; FailureTests uses the real one.
    relay.FAILURE_DELAY, relay.ACCOUNTS_POLL_INTERVAL = 0.0, 0.05


def tearDownModule() -> None:
    """Remove the files."""
    shutil.rmtree(FILES.folder)


@functools.lru_cache(None)
def make_config(**values: str) -> relay.Config:
    """Return settings for tests, without TLS by default."""
    return relay.Config.from_environ({"TLS_SOURCE": "off", "REQUIRE_TLS": "false",
                                      "LISTEN_ADDRESS": "127.0.0.1", **values})


def tls_config(**values: str) -> relay.Config:
    """Return settings for tests, with TLS."""
    return make_config(**{"TLS_SOURCE": "file", "REQUIRE_TLS": "true",
                          "TLS_CERT_FILEPATH": FILES["cert.pem"],
                          "TLS_KEY_FILEPATH": FILES["key.pem"], **values})


def parse(text: str, **settings: str) -> list[relay.Account]:
    """Parse accounts; an error in them fails the test."""
    accounts, errors = relay.parse_accounts(text, make_config(**settings))
    if errors:
        raise AssertionError(errors)
    return accounts


TEST_PRINCIPAL = relay.Account().as_principal(relay.Config(), username="test")


def policy_of(account: relay.Account, config: relay.Config) -> relay.ClientPolicy:
    """Return a policy under which a client needs no login to send as an account."""
    return relay.Accounts().match_address(None, config)._replace(
        anonymous=account.as_principal(config))


def accept(session: relay.Session, event: relay.Event) -> None:
    """Answer an event with success."""
    if isinstance(event, relay.StartTls):
        session.tls_started()
    elif isinstance(event, relay.Authenticate):
        session.authenticated(TEST_PRINCIPAL)
    elif isinstance(event, relay.Deliver):
        session.delivered("id 1")


class Dialogue:
    """A session that a test feeds with bytes; it keeps the replies and events."""

    def __init__(self, config: relay.Config, *, secure: bool = False,
                 answer: Callable[[relay.Session, relay.Event], None] = accept,
                 **options: Any) -> None:
        self.log: list[tuple[str, object]] = []
        self.session = relay.Session(
            config, "relay.test", on_line=lambda mark, line: self.log.append((mark, line)),
            on_refusal=lambda error: self.log.append(("!", error.reply)), **options)
        if secure:
            self.session.tls_started()
        self.answer = answer
        self.events: list[relay.Event] = []
        self.said = b""

    def feed(self, *pieces: bytes) -> bytes:
        """Feed the session and return its replies."""
        before = len(self.said)
        for piece in filter(None, pieces):
            self.session.receive(piece)
            self.work()
        return self.said[before:]

    def work(self) -> None:
        """Run the session until it needs more input."""
        while not self.closed:
            event = self.session.next_event()
            self.said += self.session.output()
            if event is None:
                return
            # Copy the envelope because the session resets it later.
            self.events.append(relay.Deliver(dataclasses.replace(event.envelope))
                               if isinstance(event, relay.Deliver) else event)
            self.answer(self.session, event)
            self.said += self.session.output()

    @property
    def closed(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], relay.Close)

    @property
    def messages(self) -> list[bytes]:
        return [bytes(event.envelope.message) for event in self.events
                if isinstance(event, relay.Deliver)]


def codes(replies: bytes) -> list[int]:
    """Return the codes of replies. Raises ValueError for a malformed reply."""
    result = []
    for line in replies.splitlines(keepends=True):
        match = re.fullmatch(rb"([2-5]\d\d)([ -])([ -~]*)\r\n", line)
        if match is None:
            raise ValueError(f"malformed reply {line!r}")
        if match[2] == b" ":
            result.append(int(match[1]))
    return result


class SessionCase(unittest.TestCase):
    """Sessions that get the input whole and byte by byte, with the same outcome."""

    def start(self, prelude: bytes = b"", *, secure: bool = False,
              answer: Callable[[relay.Session, relay.Event], None] = accept,
              **settings: str) -> Dialogue:
        dialogue = Dialogue(tls_config(**settings), secure=secure, answer=answer)
        dialogue.feed(prelude)
        return dialogue

    def converse(self, data: bytes, prelude: bytes = b"EHLO x\r\n" + LOGIN, *,
                 secure: bool = True,
                 answer: Callable[[relay.Session, relay.Event], None] = accept,
                 **settings: str) -> Dialogue:
        """Feed data after a prelude, whole and byte by byte; `said` has the replies to it."""
        outcomes = []
        for pieces in ([data], split_octets(data)):
            dialogue = self.start(prelude, secure=secure, answer=answer, **settings)
            dialogue.events, dialogue.said = [], b""
            dialogue.feed(*pieces)
            outcomes.append(dialogue)
        whole, slow = outcomes
        self.assertEqual(whole.said, slow.said, "whole and bytewise input differ")
        self.assertEqual(whole.events, slow.events)
        return whole

    def assertSays(self, data: bytes, *wanted: int, **options: Any) -> Dialogue:
        dialogue = self.converse(data, **options)
        self.assertEqual(codes(dialogue.said), list(wanted), dialogue.said)
        return dialogue


def named_by(message: bytes) -> collections.Counter[str]:
    """Count the addresses in To, Cc and Bcc, as the standard library reads them."""
    header = email.message_from_bytes(message)
    values = [str(value) for name in ("to", "cc", "bcc") for value in header.get_all(name, [])]
    lenient = {"strict": False} if getattr(email.utils, "supports_strict_parsing", 0) else {}
    return collections.Counter(
        address.lower() for _, address in email.utils.getaddresses(values, **lenient) if address)


def edit(message: bytes, *recipients: str, sender: str = SENDER, login: str = "",
         **settings: str) -> bytes:
    """Return a message as edited for these recipients."""
    envelope = relay.Envelope(sender, {relay.normalize_mailbox(to): to for to in recipients},
                              bytearray(message))
    outcome = relay.edit_message(
        envelope, relay.Account().as_principal(make_config(**settings), username=login))
    return outcome.header + bytes(outcome.body)


def deliver_to(header: str, *recipients: str, body: str = "\r\nText\r\n", **settings: str) -> str:
    """Return a message as edited for these recipients, without the From that was added."""
    message = (header + body).encode("utf-8", "surrogateescape")
    outcome = edit(message, *recipients, **settings)
    return outcome.decode("utf-8", "surrogateescape").replace(f"From: {SENDER}\r\n", "", 1)


def check_time(play: Callable[..., object], size: int, *arguments: Any) -> None:
    """Check that four times the size takes less than ten times the time, not sixteen."""
    times = []
    for length in (size, 4 * size):
        begun = time.process_time()
        with contextlib.suppress(relay.DeliveryError):
            play(length, *arguments)
        times.append(time.process_time() - begun)
    assert times[1] < 10 * times[0] + 0.5, times


def draft_of(message: bytes, *recipients: str, **settings: str) -> relay.Draft:
    """Return a message as a draft, even if it is small."""
    recipients = recipients or ("a@x.y",)
    envelope = relay.Envelope(SENDER, {relay.normalize_mailbox(to): to for to in recipients},
                              bytearray(crlf(message)))
    return relay.make_draft(envelope.message,
                            relay.edit_message(envelope, relay.Account().as_principal(
                                make_config(**settings))))


def content_of(attachment: relay.Attachment) -> bytes:
    """Return the decoded bytes of an attachment."""
    data = b"".join(attachment.part.iter_decoded())
    assert len(data) == attachment.size
    return data


def response(status: int, body: Any = b"", **headers: str) -> relay.HttpResponse:
    """Return an HTTP response; a body other than bytes is encoded as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return relay.HttpResponse(status, {name.replace("_", "-"): value
                                       for name, value in headers.items()}, data)


def aadsts(code: int, error: str, text: str = "Something is wrong.") -> dict[str, Any]:
    """Return the body of an Entra error in the documented format."""
    return {"error": error, "error_codes": [code], "timestamp": "2026-01-09 02:02:12Z",
            "error_description": f"AADSTS{code}: {text} Trace ID: 0000aaaa-11bb-cccc-dd22-"
            "eeeeee333333 Correlation ID: aaaa0000-bb11-2222-33cc-444444dddddd Timestamp: "
            "2026-01-09 02:02:12Z",
            "trace_id": "0000aaaa-11bb-cccc-dd22-eeeeee333333",
            "error_uri": f"https://login.microsoftonline.com/error?code={code}"}


class KeptLog(logging.Handler):
    """A log handler that keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += logging.Formatter().formatException(record.exc_info)
        self.lines.append((record.levelname, text))

    def find(self, word: str) -> list[tuple[str, str]]:
        return [line for line in self.lines if word in line[1].split()]


@contextlib.contextmanager
def kept_log() -> Iterator[KeptLog]:
    """Keep the lines that are logged in a `with` block."""
    handler = KeptLog()
    relay.log.addHandler(handler)
    try:
        yield handler
    finally:
        relay.log.removeHandler(handler)


@contextlib.contextmanager
def after(event: str, action: Callable[[], None]) -> Iterator[None]:
    """Run an action in the pass of the event loop after the one that logs the event."""
    def emit(record: logging.LogRecord) -> None:
        if f" {event} " in record.getMessage():
            asyncio.get_running_loop().call_soon(action)
    handler = logging.Handler()
    handler.emit = emit                 # type: ignore[method-assign]
    relay.log.addHandler(handler)
    try:
        yield
    finally:
        relay.log.removeHandler(handler)


class Delivered(NamedTuple):
    """A message that the fake has accepted."""

    mailbox: str
    message: bytes
    recipients: list[str]   # those in To, Cc and Bcc


@dataclasses.dataclass
class FakeDraft:
    """A draft in the fake; it may be sent or deleted."""

    mailbox: str
    properties: dict[str, Any]
    files: list[tuple[dict[str, Any], bytearray]] = dataclasses.field(default_factory=list)
    sent: bool = False
    deleted: bool = False

    @property
    def recipients(self) -> list[str]:
        return sorted(entry["emailAddress"]["address"].lower()
                      for name in ("toRecipients", "ccRecipients", "bccRecipients")
                      for entry in self.properties.get(name, []))


class BeforeBody(functools.partial[bool]):
    """An action that runs before the body of the request is read."""


KINDS = {                   # requests to Entra, Azure and Graph, by method and path
    "token": "POST /[^/]+/oauth2/v2.0/token", "send": "POST .*/users/[^/]+/sendMail",
    "draft": "POST .*/users/[^/]+/messages", "attach": "POST .*/messages/[^/]+/attachments",
    "open": "POST .*/messages/[^/]+/attachments/createUploadSession",
    "put": r"PUT /upload/[0-9]+\?authtoken=a%2Fb", "send-draft": "POST .*/messages/[^/]+/send",
    "delete": "DELETE .*/messages/[^/]+",
    "imds": r"GET /metadata/identity/oauth2/token\?.*", "app-service": r"GET /msi/token\?.*",
    "table": "GET /account/users.*", "vault": "GET /secrets/.*"}
GRAPH = ("send", "draft", "attach", "open", "send-draft", "delete")


class FakeMicrosoft:
    """Simulates Entra ID and Graph on a loopback port; its responses can be scripted."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._lock = threading.RLock()
        self._script: dict[str, collections.deque[Action]] = collections.defaultdict(
            collections.deque)
        self._tokens: dict[str, str] = {}       # and their resources
        self._numbers = itertools.count()
        self.entities: dict[str, dict[str, str]] = {}
        self.secret: dict[str, Any] = {}
        self.least_upload = 2_097_152
        self._uploads: list[tuple[FakeDraft, dict[str, Any], bytearray]] = []
        self._busy: collections.Counter[str] = collections.Counter()
        self._sockets: set[socket.socket] = set()
        self.closed: set[int] = set()           # numbers of connections
        self.release = threading.Event()        # ends the actions that hang
        self.reset()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        port = self._listener.getsockname()[1]
        self.url = f"https://localhost:{port}" if context else f"http://127.0.0.1:{port}"
        # Uploads go to another host, with a path and a query of its own.
        self.upload_url = (f"https://127.0.0.1:{port}" if context else
                           f"http://localhost:{port}") + "/upload/{}?authtoken=a%2Fb"
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        self._script.clear()
        self.requests: list[Request] = []
        self.delivered: list[Delivered] = []
        self.complaints: list[str] = []
        self._drafts: dict[str, FakeDraft] = {}
        self.most_busy = 0
        self.release.set()
        self.release = threading.Event()
        self.arrived = threading.Semaphore(0)   # counts requests that hang

    def close(self) -> None:
        self.release.set()
        self._listener.close()
        self.drop_connections()

    def drop_connections(self, how: int = socket.SHUT_RDWR) -> None:
        """Close the open connections, as front ends do with idle connections."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):      # its thread may be about to close it
                sock.shutdown(how)

    def will(self, kind: str, *actions: Action) -> None:
        """Script the next responses to requests of this kind."""
        self._script[kind].extend(actions)

    def asked(self, kind: str) -> list[Request]:
        return [request for request in self.requests if request.kind == kind]

    @property
    def drafts(self) -> dict[str, FakeDraft]:
        return {key: draft for key, draft in list(self._drafts.items()) if not draft.deleted}

    @property
    def sent_drafts(self) -> list[FakeDraft]:
        return [draft for draft in self.drafts.values() if draft.sent]

    @property
    def deleted(self) -> list[str]:
        return [key for key, draft in list(self._drafts.items()) if draft.deleted]

    # Actions.

    def accept(self, sock: socket.socket, request: Request) -> bool:
        """Respond as Microsoft does when nothing fails."""
        return self.answer(request)(sock, request)

    def hang(self, sock: socket.socket, request: Request) -> bool:
        """Send nothing until `release` is set, then close."""
        self.arrived.release()
        self.release.wait(HANGING)
        return False

    def say_and_hang(self, data: bytes) -> Action:
        return lambda sock, request: utter(data)(sock, request) or self.hang(sock, request)

    def hang_then(self, action: Action) -> Action:
        return lambda sock, request: self.hang(sock, request) or action(sock, request)

    def expire(self, sock: socket.socket, request: Request) -> bool:
        self._tokens.pop(request.headers["authorization"].partition(" ")[2], None)
        return graph_says(401, "InvalidAuthenticationToken")(sock, request)

    # Each connection has its own thread.

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count():
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._context:
                sock = self._context.wrap_socket(sock, server_side=True)
            self._sockets.add(sock)
            with sock.makefile("rb") as stream:
                while self._serve_one(sock, stream, number):
                    pass
        self._sockets.discard(sock)
        sock.close()
        self.closed.add(number)

    def _serve_one(self, sock: socket.socket, stream: Any, number: int) -> bool:
        line = stream.readline().decode()
        if not line:
            return False
        headers = {name.lower(): value.strip() for name, _, value in (
            header.decode().partition(":") for header in iter(stream.readline, b"\r\n"))}
        target, path = line.rpartition(" ")[0], line.split()[1]
        kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, target)),
                    "other")
        with self._lock:
            script = self._script[kind]
            action = script.popleft() if script else self.accept
        body = b"" if isinstance(action, BeforeBody) else stream.read(
            int(headers.get("content-length", 0)))
        request = Request(kind, path, headers, body, number)
        limit_key = path.lower() + headers.get("authorization", "")
        with self._lock:
            self.requests.append(request)
            self._busy[limit_key] += 1
            if kind in ("send", "draft"):
                self.most_busy = max(self.most_busy, self._busy[limit_key])
        try:
            return action(sock, request)
        finally:
            with self._lock:
                self._busy[limit_key] -= 1

    # Responses. Complaints are about requests that the relay must not send, even if accepted.

    def answer(self, request: Request) -> Answer:
        with self._lock:
            refusal = self._refuse(request) if request.kind in GRAPH else None
            return refusal or getattr(self, "_do_" + request.kind.replace("-", "_"))(request)

    def complain_unless(self, is_right: bool, complaint: str) -> None:
        if not is_right:
            self.complaints.append(complaint)

    def _do_other(self, request: Request) -> Answer:
        return graph_says(404, "ResourceNotFound")

    def _do_token(self, request: Request) -> Answer:
        form = urllib.parse.parse_qs(request.body.decode(), strict_parsing=True)
        resource, _, default = form["scope"][0].rpartition("/")
        self.complain_unless(
            form["grant_type"] == ["client_credentials"] and default == ".default"
            and request.headers["content-type"] == "application/x-www-form-urlencoded"
            and set(form) - {"grant_type", "scope", "client_id"} in (
                {"client_secret"}, {"client_assertion", "client_assertion_type"}),
            f"bad token request {form}")
        return say(200, {"token_type": "Bearer", "expires_in": 3599, "ext_expires_in": 3599,
                         "access_token": self.make_token(resource)},
                   content_type="application/json")

    def make_token(self, resource: str) -> str:
        token = f"token-{next(self._numbers)}"
        self._tokens[token] = resource
        return token

    def _is_for(self, request: Request, *resources: str) -> bool:
        """Return whether a request has a token for one of these resources."""
        bearer, _, token = request.headers.get("authorization", "").partition(" ")
        return bearer == "Bearer" and self._tokens.get(token) in resources

    # Managed identities: IMDS and App Service.

    def _do_imds(self, request: Request) -> Answer:
        if request.headers.get("metadata") != "true":
            return say(400, {"error": "bad_request_102", "error_description":
                             "Required metadata header not specified"})
        return self._identity_token(request, "2018-02-01", expires_in="3599")

    def _do_app_service(self, request: Request) -> Answer:
        if request.headers.get("x-identity-header") != "header":
            return say(401)
        return self._identity_token(request, "2019-08-01")

    def _identity_token(self, request: Request, version: str, **more: str) -> Answer:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
        self.complain_unless(
            query["api-version"] == [version] and set(query) <= {
                "api-version", "resource", "client_id", "x"},
            f"bad identity request {request.path}")
        resource, = query["resource"]
        return say(200, {"access_token": self.make_token(resource), "resource": resource,
                         "expires_on": str(int(time.time()) + 3599), "token_type": "Bearer",
                         **more})

    # Azure Tables and Key Vault.

    def _do_table(self, request: Request) -> Answer:
        if "sig=" not in request.path and not self._is_for(request, "https://storage.azure.com"):
            return say(401, b"<?xml?>", x_ms_error_code="InvalidAuthenticationInfo")
        path, _, query = request.path.partition("?")
        literal = "'((?:[^']|'')*)'"
        match = re.fullmatch(rf"/account/users\(PartitionKey={literal},RowKey={literal}\)",
                             urllib.parse.unquote(path))
        if match:
            partition, row_key = (text.replace("''", "'") for text in match.groups())
            entity = self.entities.get(row_key) if partition == "user" else None
            return say(200, entity) if entity is not None else say(
                404, {"odata.error": {"code": "ResourceNotFound"}},
                x_ms_error_code="ResourceNotFound")
        term = rf"\w+ eq {literal}"
        groups = dict(urllib.parse.parse_qsl(query)).get("$filter", "").split(" and ")
        if path != "/account/users()" or not all(
                re.fullmatch(rf"\({term}( or {term})*\)", group) for group in groups):
            return say(400, {}, x_ms_error_code="InvalidInput")
        wanted = [{(name, value.replace("''", "'")) for name, value in
                   re.findall(rf"(\w+) eq {literal}", group)} for group in groups]
        matches = [row for row in self.entities.values() if all(
            any({"PartitionKey": "user", **row}.get(name) == value for name, value in group)
            for group in wanted)]
        return say(200, {"value": matches[:1]})

    def _do_vault(self, request: Request) -> Answer:
        clouds = ("azure.net", "azure.cn", "usgovcloudapi.net")
        if not self._is_for(request, *(f"https://vault.{domain}" for domain in clouds)):
            return say(401)
        return say(200, self.secret)

    # Graph: messages and drafts.

    def _refuse(self, request: Request) -> Answer | None:
        """Return the error that Graph would send, or None."""
        if not self._is_for(request, self.url):
            return graph_says(401, "InvalidAuthenticationToken")
        if len(request.body) > 4_194_304:
            return say(413)
        wanted = ("text/plain" if request.kind == "send" else
                  "application/json" if request.body else None)
        media_type = request.headers.get("content-type")
        self.complain_unless(media_type == wanted, f"{request.kind} with {media_type}")
        if request.kind not in ("send", "draft") and (
                request.part(5) not in self._drafts or self._drafts[request.part(5)].deleted):
            return graph_says(404, "ErrorItemNotFound")
        return None

    def _do_send(self, request: Request) -> Answer:
        try:
            message = base64.b64decode(request.body, validate=True)
        except ValueError:
            return graph_says(400, "ErrorMimeContentInvalidBase64String")
        self.complain_unless(not re.search(rb"(?<!\r)\n|\r(?!\n)", message),
                             "a bare CR or LF, at which Exchange loses text")
        recipients = sorted(named_by(message))
        if not recipients:
            return graph_says(400, "ErrorInvalidRecipients")
        self.delivered.append(Delivered(request.part(3), message, recipients))
        return say(202, client_request_id=request.headers["client-request-id"])

    def _do_draft(self, request: Request) -> Answer:
        properties = json.loads(request.body)
        headers = properties.get("internetMessageHeaders", [])
        if len(headers) > 5 or not all(field["name"].lower().startswith("x-") and field["value"]
                                       for field in headers):
            return graph_says(400, "InvalidInternetMessageHeader")
        draft_id = f"AAMk{next(self._numbers)}/+="
        self._drafts[draft_id] = FakeDraft(request.part(3), properties)
        # The response repeats the text, and the id follows it.
        body = {"@odata.etag": "W/\"x\"", **properties, "id": draft_id, "isDraft": True}
        return say(201, json.dumps(body).replace("<", "\\u003c").encode())     # as .NET escapes

    def _do_attach(self, request: Request) -> Answer:
        properties = json.loads(request.body)
        self.complain_unless(properties.pop("@odata.type") == "#microsoft.graph.fileAttachment",
                             "not a fileAttachment")
        data = bytearray(base64.b64decode(properties.pop("contentBytes"), validate=True))
        self._drafts[request.part(5)].files.append((properties, data))
        return say(201, {"id": "x"})

    def _do_open(self, request: Request) -> Answer:
        item = json.loads(request.body)["AttachmentItem"]
        if item.pop("attachmentType") != "file" or item["size"] < self.least_upload:
            return graph_says(400, "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize")
        draft, data = self._drafts[request.part(5)], bytearray()
        draft.files.append((item, data))
        self._uploads.append((draft, item, data))
        return say(201, {"uploadUrl": self.upload_url.format(len(self._uploads) - 1),
                         "nextExpectedRanges": ["0-"]})

    def _do_put(self, request: Request) -> Answer:
        self.complain_unless("authorization" not in request.headers,
                             "the token went to the upload host")
        draft, item, data = self._uploads[int(re.findall(r"[0-9]+", request.path)[0])]
        if draft.deleted:
            return say(404)
        begin, last, total = map(int, re.fullmatch(
            "bytes ([0-9]+)-([0-9]+)/([0-9]+)", request.headers["content-range"]).groups())
        if (begin != len(data) or last - begin + 1 != len(request.body)
                or total != item["size"] or len(request.body) >= 4_000_000):
            self.complaints.append(f"a chunk out of order: {request.headers['content-range']}")
            return say(416)
        data += request.body
        if len(data) == total:
            return say(201, location="https://outlook.office.com/x")
        return say(200, {"NextExpectedRanges": [str(len(data))]})

    def _do_send_draft(self, request: Request) -> Answer:
        if request.headers.get("content-length") != "0":
            return say(411)
        draft = self._drafts[request.part(5)]
        for item, data in draft.files:
            self.complain_unless(item.pop("size", len(data)) == len(data),
                                 "sent with an incomplete file")
        draft.sent = True
        return say(202)

    def _do_delete(self, request: Request) -> Answer:
        self._drafts[request.part(5)].deleted = True
        return say(204)


class Running:
    """A relay on loopback ports, in a thread with its own event loop."""

    def __init__(self, config: relay.Config) -> None:
        self._config = config
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if not self._started.wait(PATIENCE):
            raise AssertionError("the relay did not start")

    def _run(self) -> None:
        self._contexts = relay.make_tls_contexts(self._config)
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        sockets = relay.open_listeners(self._config)
        self.port = sockets[0][0].getsockname()[1]
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.loop_errors: list[dict[str, Any]] = []
        self._loop.set_exception_handler(lambda loop, context: self.loop_errors.append(context))
        self.relay = joined = relay.Relay(self._config)
        await joined.start()
        self.server = relay.Server(joined, self._contexts)
        self._loop.call_soon(self._started.set)
        await self.server.run(sockets, self._stop)
        joined.close()

    def ask(self, question: Callable[[], Any]) -> Any:
        """Call `question` in the thread of the loop and return its result."""
        async def answer() -> Any:
            return question()
        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(PATIENCE)

    def forget_failures(self) -> None:
        """Reset the counts of failed logins."""
        self.ask(self.relay.authenticator._limiter._times._values.clear)

    def begin_stop(self) -> None:
        """Do what SIGTERM does."""
        with contextlib.suppress(RuntimeError):         # the loop has ended
            self._loop.call_soon_threadsafe(self._stop.set)

    def wait(self) -> None:
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise AssertionError("the relay does not stop")

    def waiting(self) -> int:
        """Return how many messages wait for a slot of their mailbox."""
        waiting: int = self.ask(lambda: sum(len(limiter._live) + len(limiter._queued) for limiter
                                            in self.relay._graph._limiters.values()))
        return waiting

    def stop(self) -> None:
        self.begin_stop()
        self.wait()


class Client(smtplib.SMTP):
    """A client that is independent of the relay: smtplib, with the replies as text."""

    def __init__(self, port: int, **options: Any) -> None:
        super().__init__("127.0.0.1", port, timeout=PATIENCE, local_hostname="test", **options)

    def say(self, line: str) -> str:
        """Send a command; return the code and text of the reply."""
        code, text = self.docmd(line)
        return f"{code} {text.decode()}"

    def log_in(self, user: str = USER, password: str = "secret") -> str:
        return self.say(f"AUTH PLAIN {plain(user, password).decode()}")

    def post(self, message: bytes = SIMPLE, sender: str = SENDER,
             recipients: tuple[str, ...] = ("a@x.y",)) -> str:
        """Send a message; return the last reply: to its end, or to the refused command."""
        for line in (f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{to}>" for to in recipients)):
            reply = self.say(line)
            if not reply.startswith("250"):
                return reply
        code, text = self.data(message)
        return f"{code} {text.decode()}"

    def post_octets(self, message: bytes, sender: str, recipients: Iterable[str]) -> str:
        """Send a message without changing its line ends; return the last reply."""
        utf8 = "" if "".join([sender, *recipients]).isascii() else " SMTPUTF8"
        self.command_encoding = "utf-8"
        for line in (f"MAIL FROM:<{sender}>{utf8}", *(f"RCPT TO:<{to}>" for to in recipients),
                     "DATA"):
            reply = self.say(line)
            if reply[0] not in "23":
                return reply
        self.sock.sendall(stuffed(message) + b".\r\n")
        code, text = self.getreply()
        return f"{code} {text.decode()}"

    def next_reply(self) -> str:
        """Read the next reply; return "" at the end of the connection."""
        try:
            code, text = self.getreply()
        except (smtplib.SMTPServerDisconnected, OSError):
            return ""
        return f"{code} {text.decode()}"


def trusting() -> ssl.SSLContext:
    """Return the TLS context of a client that trusts the CA of the tests."""
    return ssl.create_default_context(cafile=FILES["ca.pem"])


class RelayCase(unittest.TestCase):
    """A relay without TLS. Each test has a password of its own, because tokens are cached."""

    settings: dict[str, str] = {}
    fake: FakeMicrosoft
    running: Running

    @classmethod
    def setUpClass(cls) -> None:
        cls.fake = FakeMicrosoft()
        cls.running = Running(cls.config(**{"UPSTREAM_TIMEOUT": "3", "CLIENT_TIMEOUT": "20",
                                          **cls.settings}))

    @classmethod
    def config(cls, **settings: str) -> relay.Config:
        return make_config(**{"SMTP_PORT": "0", "AZURE_AUTHORITY_HOST": cls.fake.url,
                              "GRAPH_ENDPOINT": cls.fake.url, "SERVER_NAME": "relay.test",
                              **settings})

    @classmethod
    def tearDownClass(cls) -> None:
        """Stop both; no error and no connection may remain."""
        cls.fake.reset()
        cls.running.stop()
        cls.fake.close()
        assert not cls.running.loop_errors, cls.running.loop_errors
        assert not cls.running.server._connections, "connections remain"

    def setUp(self) -> None:
        """Reset the fake, and wait until the clients of other tests are gone."""
        self.fake.reset()
        wait_for(lambda: not self.running.ask(lambda: len(self.running.server._connections)))
        self.running.forget_failures()
        self.open_lines()
        self.password = f"secret of {self.id()}"
        self.addCleanup(setattr, relay, "MAX_COST", relay.MAX_COST)
        relay.MAX_COST = 10 ** 9        # tests fill buffers with many commands
        self.addCleanup(lambda: self.assertEqual(self.fake.complaints, []))

    def open_lines(self) -> None:
        """End the throttling of mailboxes."""
        self.running.ask(self.running.relay._graph._resume_at._values.clear)

    def connect(self, running: Running | None = None) -> Client:
        return self.come_from("127.0.0.1", running)

    def come_from(self, address: str, running: Running | None = None) -> Client:
        """Connect from an address of this machine, and send EHLO."""
        client = Client((running or self.running).port, source_address=(address, 0))
        self.addCleanup(client.close)
        client.ehlo()
        return client

    def another(self, **settings: str) -> Running:
        running = Running(self.config(**{**self.settings, **settings}))
        self.addCleanup(running.stop)
        return running

    def log_in(self, user: str = USER, password: str | None = None,
               running: Running | None = None) -> str:
        (running or self.running).forget_failures()
        return self.connect(running).log_in(user, self.password if password is None else password)

    def logged_in(self, user: str = USER, password: str | None = None,
                  running: Running | None = None) -> Client:
        client = self.connect(running)
        self.assertReply(client.log_in(user, self.password if password is None else password),
                         "235 2.7.0")
        return client

    def begun(self, running: Running | None = None) -> Client:
        client = self.logged_in(running=running)
        for line in (f"MAIL FROM:<{SENDER}>", "RCPT TO:<a@x.y>", "DATA"):
            client.docmd(line)
        return client

    def assertReply(self, reply: str, wanted: str) -> str:
        self.assertTrue(reply.startswith(wanted + " "), f"{reply!r} is not {wanted}")
        return reply


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def hashed_passwords() -> Any:
    """Count the password hashes in a `with` block."""
    return unittest.mock.patch.object(relay.hashlib, "scrypt", wraps=relay.hashlib.scrypt)


def wait_for(condition: Callable[[], Any], patience: float = PATIENCE) -> None:
    """Poll until the condition is true, for events that no socket reports."""
    delay, end = 0.002, time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the condition never became true")
        time.sleep(delay)
        delay = min(1.2 * delay, 0.05)


def stuffed(message: bytes) -> bytes:
    """Return a message with stuffed dots, as a client sends it."""
    return (b"\r\n" + message).replace(b"\r\n.", b"\r\n..")[2:]


class AccountCase(RelayCase):
    """A relay with accounts."""

    settings = UNHURRIED
    accounts = ACCOUNTS

    @classmethod
    def config(cls, **settings: str) -> relay.Config:
        if "ACCOUNTS_FILE" not in settings:
            settings["ACCOUNTS_FILE"] = FILES.write(f"{cls.__name__}.ini", cls.accounts)
        return super().config(AZURE_POD_IDENTITY_AUTHORITY_HOST=cls.fake.url, **settings)

    def log_in(self, user: str = USER, password: str | None = PASSWORD,
               running: Running | None = None) -> str:
        return super().log_in(user, password, running)

    def logged_in_as(self, user: str, password: str = PASSWORD,
                     running: Running | None = None) -> Client:
        return self.logged_in(user, password, running)

    def with_accounts(self, accounts: str, **settings: str) -> Running:
        return self.another(ACCOUNTS_FILE=FILES.write(f"{self.id()}.ini", accounts), **settings)


def at_environ(**variables: str) -> Any:
    """Set environment variables in a `with` block."""
    return unittest.mock.patch.dict(os.environ, variables)


def as_exchange_decodes(text: bytes) -> bytes:
    """Decode quoted-printable as Exchange does: only "=" CRLF is a soft line break."""
    return re.sub(rb"=(\r\n|..)", lambda match: (
        b"" if match[1] == b"\r\n" else bytes([int(match[1], 16)])
        if re.fullmatch(b"[0-9A-Fa-f]{2}", match[1]) else b"="), text, flags=re.S)


@contextlib.contextmanager
def alone(**settings: str) -> Iterator[tuple[FakeMicrosoft, Client]]:
    """Yield a fake and a client, both of a relay of their own."""
    with contextlib.ExitStack() as stack:
        fake = FakeMicrosoft()
        stack.callback(fake.close)
        running = Running(make_config(SMTP_PORT="0", AZURE_AUTHORITY_HOST=fake.url,
                                      GRAPH_ENDPOINT=fake.url, **settings))
        stack.callback(running.stop)
        client = Client(running.port)
        stack.callback(client.close)
        client.ehlo()
        yield fake, client
        fake.release.set()


def at_once(play: Callable[..., Any], cases: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Run cases that mostly wait, each in a thread; return their results."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        futures = {name: pool.submit(play, *arguments) for name, arguments in cases.items()}
        return {name: future.result() for name, future in futures.items()}


def clean_environ(values: dict[str, str]) -> dict[str, str]:
    """Return the environment without settings, in which Python finds the program."""
    names = {*relay.settings(), "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return {**clean, "PYTHONPATH": str(HERE), **values}


@contextlib.contextmanager
def start_python(*arguments: str, folder: str = "", groups: tuple[int, ...] = (),
                 **environ: str) -> Iterator[
        subprocess.Popen[str]]:
    """Run Python in an environment without settings; kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=folder or str(HERE), env=clean_environ(environ),
        **({"extra_groups": groups} if groups else {}))     # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process: subprocess.Popen[str], word: str) -> str:
    """Read the log until a line contains the word; return all lines read."""
    text = ""
    for line in process.stderr or ():
        text += line
        if word in line:
            return text
    raise AssertionError(f"{word} is not in {text}")


def start_program(*arguments: str, **options: Any) -> Any:
    """Run the program."""
    return start_python("-m", "smtp_oauth_relay", *arguments, **options)


def call_main(*arguments: str, stdin: str = "", **environ: str) -> tuple[int, str, str]:
    """Run the program in this process; return its exit status, output and errors."""
    handlers = {number: signal.getsignal(number) for number in (
        signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT))}
    texts = [io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="")
             for data in (stdin.encode(), b"", b"")]
    with unittest.mock.patch.dict(os.environ, clean_environ(environ), clear=True), \
            unittest.mock.patch.multiple(sys, stdin=texts[0], stdout=texts[1], stderr=texts[2]), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)        # as Python does by default
        try:
            status: Any = relay.main(list(arguments))
        except SystemExit as error:         # from argparse
            status = error.code
        finally:
            relay.log.setLevel("DEBUG")
            for number, handler in handlers.items():
                signal.signal(number, handler)
    for text in texts:
        text.flush()
    out, err = (text.buffer.getvalue().decode() for text in texts[1:])
    return status or 0, out, err


class ProgramCase(unittest.TestCase):
    """Runs the program to its end."""

    def outcome(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        status, out, err = call_main(*arguments, **environ)
        self.assertNotIn("Traceback", err)
        return status, out, err


def make_message(**values: Any) -> relay.QueuedMessage:
    """Return a typical queued message."""
    return relay.QueuedMessage(**{
        "id": "8d6f", "account": "", "tenant": TENANT, "client": CLIENT,
        "mailbox": "scanner@example.com", "reverse_path": "boss@example.com",
        "recipients": ["a@x.y"], "header_size": 11, "size": 15, "is_bounce": False,
        "queued_at": 1_700_000_000.0, **values})


@unittest.skipUnless(relay.fcntl, "needs file locks")
class SpoolCase(RelayCase):
    """Relays with a queue and short retry delays."""

    pauses = {"MIN_BACKOFF": 0.05, "MAX_BACKOFF": 0.2, "QUEUE_POLL_INTERVAL": 0.05,
              "MAX_SLEEP": 0.1}

    def setUp(self) -> None:
        super().setUp()
        for name, value in self.pauses.items():
            self.let(name, value)
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=FILES.folder))
        self.queue, self.failed = self.folder / "queue", self.folder / "failed"

    def let(self, name: str, value: float) -> None:
        """Change a constant of the relay until the end of the test."""
        self.addCleanup(setattr, relay, name, getattr(relay, name))
        setattr(relay, name, value)

    def rest_long(self) -> None:
        """Make the retry delays that begin from now on too long for a test."""
        self.let("MIN_BACKOFF", 3600.0)
        self.let("MAX_BACKOFF", 3600.0)

    def settings_of(self, **settings: str) -> dict[str, str]:
        return {"UPSTREAM_TIMEOUT": "10", "SPOOL_DIRECTORY": str(self.folder), **settings}

    def start(self, **settings: str) -> Running:
        running = Running(self.config(**self.settings_of(**settings)))
        self.addCleanup(running.stop)
        return running

    def log_in_to(self, running: Running) -> Client:
        client = self.connect(running)
        self.assertReply(client.log_in(password=self.password), "235 2.7.0")
        return client

    def idents(self) -> dict[bytes, str]:
        """Return the IDs of queued messages by the first character of the subject."""
        return {path.read_bytes().partition(b"Subject: ")[2][:1]: path.stem
                for path in self.queue.glob("*.eml")}

    def waiting(self) -> list[str]:
        return sorted(path.stem for path in self.queue.glob("*.json"))

    def only(self, folder: str = "queue") -> tuple[pathlib.Path, Any]:
        """Return the only message of a directory: the path of its state, and the state."""
        path, = (self.folder / folder).glob("*.json")
        return path, relay.parse_queued_message(path.read_bytes())

    def be_down(self, action: Action | None = None, times: int = 1000) -> None:
        """Let Microsoft accept no message."""
        self.fake.will("send", *[action or say(503)] * times)

    def be_up(self, *actions: Action) -> None:
        """Let Microsoft accept messages again, after these actions."""
        with self.fake._lock:               # no request comes between
            self.fake._script.clear()
            self.fake.will("send", *actions)

    def subjects(self) -> list[bytes]:
        return [re.search(rb"(?m)^Subject: (.*)\r$", text)[1] for _, text, _ in self.fake.delivered]

    def age(self, path: pathlib.Path) -> None:
        """End the queue lifetime of a message, while no relay runs."""
        path.write_text(json.dumps({**json.loads(path.read_text()),
                                    "queued_at": time.time() - 172_801}))

    def post(self, client: Client, subject: str = "s", **options: Any) -> str:
        return client.post(f"To: a@x.y\r\nSubject: {subject}\r\n\r\nText\r\n".encode(), **options)

    def enqueue(self, client: Client, *subjects: str, **options: Any) -> None:
        for subject in subjects or ("s",):
            self.assertIn("Queued", self.post(client, subject, **options))

    def wait_until_empty(self) -> None:
        wait_for(lambda: not list(self.queue.iterdir()))


class TlsCase(RelayCase):
    """A relay with TLS on both kinds of port."""

    @classmethod
    def config(cls, **settings: str) -> relay.Config:
        port = free_port()
        return super().config(**{
            "TLS_SOURCE": "file", "REQUIRE_TLS": "true", "SMTPS_PORT": str(port),
            "TLS_CERT_FILEPATH": FILES["cert.pem"], "TLS_KEY_FILEPATH": FILES["key.pem"],
            **settings})

    def raw(self, *, smtps: bool = False) -> socket.socket:
        port = self.running._config.smtps_port if smtps else self.running.port
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.addCleanup(sock.close)
        return sock

    def read(self, sock: socket.socket) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while part := sock.recv(65536):
                data += part
        return data

    def deaf(self, *, smtps: bool = False) -> socket.socket:
        """Connect with small buffers, so that no megabytes of unread replies fit into them."""
        sock = socket.socket()
        self.addCleanup(sock.close)
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        sock.connect(("127.0.0.1", self.running._config.smtps_port if smtps else self.running.port))
        return sock

    def half_way(self, data: bytes, *, smtps: bool = False) -> socket.socket:
        """Begin a handshake with these bytes, after STARTTLS on the SMTP port."""
        sock = self.raw(smtps=smtps)
        if not smtps:
            sock.sendall(b"EHLO x\r\nSTARTTLS\r\n")
            self.read_until(sock, b"Ready")
        sock.sendall(data)
        return sock

    def read_until(self, sock: socket.socket, end: bytes) -> bytes:
        data = b""
        while end not in data:
            part = sock.recv(65536)
            self.assertTrue(part, f"{data!r} ended before {end!r}")
            data += part
        return data


class Watched:
    """A relay as a process, with its log and its use of resources."""

    def __init__(self, process: subprocess.Popen[str], upstream: str) -> None:
        self.process = process
        self._upstream = int(upstream.rpartition(":")[2])
        self.log: list[str] = []
        self.events: collections.Counter[str] = collections.Counter()      # of the log
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(lambda: self.events["listening"] == 2, 3 * PATIENCE)
        self.port, self.smtps_port = map(int, re.findall(r" port=(\d+)", "".join(self.log)))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self.events[line.split()[3]] += 1

    def lines(self, words: str) -> int:
        """Return how many log lines have these words; lines come later than replies."""
        return sum(words in line for line in self.log)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def left(self) -> int:
        """Return its number of descriptors and threads, without connections to Microsoft."""
        links = []
        for path in pathlib.Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):        # closed meanwhile
                links.append(os.readlink(path))
        table = pathlib.Path(f"/proc/{self.process.pid}/net/tcp").read_text().splitlines()
        upstream = {f"socket:[{line.split()[9]}]" for line in table
                    if line.split()[2].endswith(f":{self._upstream:04X}")}
        return (sum(link not in upstream for link in links)
                + len(os.listdir(f"/proc/{self.process.pid}/task")))

    def memory(self, name: str = "RSS") -> int:
        """Return its memory in bytes: now (RSS), or the peak since forget_peak() (HWM)."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"Vm{name}:\s+(\d+) kB", status)[0]) * 1024

    def forget_peak(self) -> None:
        """Reset the peak (HWM), proc_pid_clear_refs(5)."""
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def processor(self) -> float:
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def allow_descriptors(self, number: int) -> None:
        _, hard = relay.resource.prlimit(self.process.pid, relay.resource.RLIMIT_NOFILE)
        relay.resource.prlimit(self.process.pid, relay.resource.RLIMIT_NOFILE, (number, hard))

    def stop(self) -> str:
        """Stop it with SIGTERM; return its log and exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return f"{''.join(self.log)}exit {status}"


def client_hello() -> bytes:
    """Return the first bytes of a TLS handshake."""
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        trusting().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    return out.read()


def last_octets(sock: Any) -> bytes:
    """Read to the end, or to a reset; return the last 1,000 bytes."""
    data = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := sock.recv(65536):
            data = (data + part)[-1000:]
    return data


class Waiting:
    """A client that sends data and waits for the reply in a thread."""

    def __init__(self, client: Client, data: bytes) -> None:
        self.reply, self.seconds = "", 0.0
        self._client, self._begun = client, time.monotonic()
        assert client.sock is not None
        client.sock.settimeout(HANGING)     # other cases may reach their stops one by one
        client.sock.sendall(data)
        self._thread = threading.Thread(target=self._read_reply, daemon=True)
        self._thread.start()

    def _read_reply(self) -> None:
        self.reply = self._client.next_reply()
        self.seconds = time.monotonic() - self._begun

    @property
    def is_waiting(self) -> bool:
        return self._thread.is_alive()

    def hear(self) -> str:
        self._thread.join(2 * PATIENCE)
        return self.reply


def login_line(user: str = USER, password: str = "secret") -> bytes:
    """Return the command line of a login."""
    return b"AUTH PLAIN %b\r\n" % plain(user, password)


NUMBERS = itertools.count()


def begin_message(client: Client, message: bytes, sender: str = SENDER) -> Waiting:
    """Send a unique message, and do not wait for the reply to its end."""
    for line in (f"MAIL FROM:<{sender}>", "RCPT TO:<a@x.y>", "DATA"):
        client.docmd(line)
    return Waiting(client, message + b"%d\r\n.\r\n" % next(NUMBERS))


def calls_under_way() -> int:
    """Return how many threads of relays run a blocking call; idle threads do not count."""
    calls = [thread for thread in threading.enumerate() if thread.name == "relay-call"]
    return len(calls) - relay._idle_threads._value


def cut_when_done(running: Running, release: threading.Event) -> None:
    """Let the calls under way end, and then cancel the connections that wait for them. Run in
    the loop: both happen in one pass, as at the end of SHUTDOWN_TIMEOUT.
    """
    release.set()
    wait_for(lambda: not calls_under_way())
    for connection in running.server._connections:
        connection.task.cancel()


def stop_at(fake: FakeMicrosoft, client: Client, kind: str, where: str, *,
            password: str = "secret", sender: str = SENDER) -> Waiting:
    """Let the fake stop at `where`; return the waiting client once the request is there."""
    message, status = STOPPED_KINDS[kind]
    if message is not None:
        assert client.log_in(password=password).startswith("235"), kind
    head, tail = STOPS[where]
    head, count = head.replace(b"STATUS", b"%d" % status), len(fake.asked(kind))
    action = trickle(head, tail) if tail else fake.say_and_hang(head)
    fake.will(kind, BeforeBody(action) if where == "half of the request" else action)
    if message is None:
        user = USER if kind == "token" else LOOK_UP_USER
        waiting = Waiting(client, login_line(user, password))
    else:
        waiting = begin_message(client, message, sender)
    wait_for(lambda: len(fake.asked(kind)) > count)
    return waiting


class HangCase(RelayCase):
    """Waits end in time, and no blocking call remains."""

    def tearDown(self) -> None:
        self.doCleanups()
        wait_for(lambda: not calls_under_way())

    def beside(self, *by_name: str, **settings: str) -> tuple[FakeMicrosoft, Running]:
        """Return a fake and a relay for it; for settings `by_name` it must look up a host name."""
        fake = FakeMicrosoft()
        fake.entities["app1"] = {"tenant_id": TENANT, "client_id": CLIENT}
        self.addCleanup(lambda: self.assertEqual(fake.complaints, []))
        self.addCleanup(fake.close)             # ends the actions that hang in it
        running = Running(make_config(**{
            "SMTP_PORT": "0", "AZURE_AUTHORITY_HOST": fake.url, "GRAPH_ENDPOINT": fake.url,
            "AZURE_TABLES_URL": f"{fake.url}/account/users", "SERVER_NAME": "relay.test",
            "AZURE_POD_IDENTITY_AUTHORITY_HOST": fake.url, "UPSTREAM_TIMEOUT": str(SHORT),
            **dict.fromkeys(by_name, fake.url.replace("127.0.0.1", "localhost")), **settings}))
        self.addCleanup(running.stop)
        return fake, running

    def served(self, running: Running, password: str, sender: str = "other@example.com",
               message: bytes = SIMPLE) -> None:
        client = self.connect(running)
        self.assertEqual(client.log_in(password=password)[:9], "235 2.7.0")
        self.assertEqual(client.post_octets(message, sender, ["a@x.y"])[:9], "250 2.0.0")

    def assertTimely(self, waiting: Waiting, wanted: str, least: float = SHORT) -> None:
        """Check the reply, and that it came in time but not before `least` seconds.

        Simulated hangs last longer than PATIENCE, so any time below it is in time.
        """
        reply = waiting.hear()
        self.assertEqual(reply[:len(wanted)], wanted, reply)
        self.assertGreaterEqual(waiting.seconds, least)
        self.assertLess(waiting.seconds, PATIENCE)


class Stuck:
    """Replaces a function of the library; calls for which `should` is true hang."""

    def __init__(self, module: Any, name: str, should: Callable[..., bool]) -> None:
        self._module, self._name, self._should = module, name, should
        self._real = getattr(module, name)
        self.is_on = True
        self.arrived, self.released = threading.Semaphore(0), threading.Event()

    def __enter__(self) -> Stuck:
        setattr(self._module, self._name, self)
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        setattr(self._module, self._name, self._real)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.is_on and self._should(*arguments):
            self.arrived.release()
            self.released.wait(HANGING)
        return self._real(*arguments, **options)

    def wait(self, number: int) -> None:
        for _ in range(number):
            if not self.arrived.acquire(timeout=PATIENCE):
                raise AssertionError("too few calls hang")


class Between:
    """A listener or proxy between the relay and Microsoft that works ("") or fails: "full"
    (connect() hangs), "silent" (it accepts no connection), "half" (responses stop after some
    bytes), "trickle" (they come byte by byte). As a proxy it requires a user and a password.
    """

    def __init__(self, case: unittest.TestCase, mode: str, target: int = 0) -> None:
        self.asked: list[tuple[str, str]] = []      # of the proxy: target and credentials
        self._mode, self._target = mode, target
        self._closing = threading.Event()
        self._socks = [socket.create_server(("127.0.0.1", 0), backlog=0 if mode == "full" else 100)]
        self.port = self._socks[0].getsockname()[1]
        case.addCleanup(self._close)
        if mode == "full":
            self._socks.append(socket.create_connection(("127.0.0.1", self.port), PATIENCE))
        elif mode != "silent":
            threading.Thread(target=self._accept, daemon=True).start()

    def _close(self) -> None:
        self._closing.set()
        for sock in self._socks:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._socks[0].accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            address = ("127.0.0.1", self._target)
            if not self._target:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += sock.recv(1)
                host, _, port = head.split()[1].decode().rpartition(":")
                address = (host, int(port))
                match = re.search(rb"(?i)Proxy-Authorization: (.*)\r\n", head)
                self.asked.append((f"{host}:{port}", match[1].decode() if match else ""))
                if not match:
                    sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                    return
                slow = b"X-Slow: x\r\n" * 100 * (self._mode == "trickle")
                self._send(sock, b"HTTP/1.1 200 Established\r\n" + slow + b"\r\n", 20)
            with socket.create_connection(address, PATIENCE) as upstream:
                threading.Thread(target=self._forward, args=(sock, upstream), daemon=True).start()
                while data := upstream.recv(65536):
                    self._send(sock, data, 100)

    def _send(self, sock: socket.socket, data: bytes, limit: int) -> None:
        for part in split_octets(data) if self._mode == "trickle" else [data]:
            sock.sendall(part[:limit] if self._mode == "half" else part)
            self._closing.wait({"trickle": 0.05, "half": PATIENCE}.get(self._mode, 0.0))

    @staticmethod
    def _forward(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def stuck_look_ups() -> Stuck:
    """Let the look-ups of localhost hang."""
    return Stuck(socket, "getaddrinfo", lambda host, *_: host == "localhost")


# ---------------------------------------------------------------------------
# Tests, in the order of the program

class ReplyTests(unittest.TestCase):
    """Replies have the format of RFC 5321 section 4.2 and RFC 2034."""

    def test_replies_are_printable_and_shorter_than_512_bytes(self) -> None:
        for reply, data in (
                ((250, "2.0.0", "one\ntwo"), b"250-2.0.0 one\r\n250 2.0.0 two\r\n"),
                ((334, "", ""), b"334 \r\n"),                       # no status code, RFC 2034
                ((550, "5.1.8", "no\r250 x\x1b[1m\x00\xe9"), b"550 5.1.8 no?250 x?[1m??\r\n")):
            self.assertEqual(bytes(relay.Reply(*reply)), data)
        self.assertLess(len(bytes(relay.Reply(550, "5.1.8", "x" * 5000))), 512)


class SecretTests(unittest.TestCase):
    """Classes that hold a secret do not show it."""

    def test_repr_hides_secrets(self) -> None:
        for value in (relay.Application(TENANT, CLIENT, "hidden"),
                      relay.Authenticate(USER, "hidden"),
                      relay.Envelope("a@b.c", {}, b"hidden"),
                      relay.HttpResponse(200, {}, b"hidden"),
                      relay.HttpRequest("POST", "https://x/hidden", {"A": "hidden"}, b"hidden")):
            with self.subTest(type(value).__name__):
                self.assertNotIn("hidden", repr(value))
                self.assertNotIn("hidden", str(value))


class SettingTests(unittest.TestCase):
    """Settings are read from variables; all errors are reported together, with a remedy."""

    def assertErrors(self, environ: dict[str, str], *names: str) -> str:
        with self.assertRaises(relay.ConfigError) as caught:
            relay.Config.from_environ(environ)
        lines = str(caught.exception).splitlines()
        self.assertEqual([re.match("[A-Za-z_]+", line)[0] for line in lines], list(names))
        return str(caught.exception)

    def test_valid_values_are_parsed_and_invalid_values_reported(self) -> None:
        sas = "sv=2020-12-06&ss=t&srt=o&sp=r&sig=a%2Fb%3D"
        for name, good, bad in (
                ("LOG_LEVEL", {" debug ": "DEBUG", "": "INFO"}, "LOUD"),
                ("SERVER_GREETING", {" ": "Microsoft Graph SMTP OAuth Relay"}, "a\tb gr\xfc\xdf"),
                ("USERNAME_DELIMITER", {" | ": "|", "": "@"}, "# @@"),
                ("TLS_SOURCE", {}, "none"), ("REQUIRE_TLS", {"True\n": True}, "yes"),
                ("SMTP_PORT", {" 2525 ": 2525, "": 8025}, "x -1 65536 \u0663"),
                ("SMTPS_PORT", {"": 0}, "70000"),
                ("SERVER_NAME", {"a.b": "a.b"}, "a_b -a " + "x" * 254),
                ("LISTEN_ADDRESS", {"::1": "::1", "localhost": "localhost"}, "printer 1.2.3.4.5"),
                ("TLS_MIN_VERSION", {"1.3": "1.3"}, "1.4 3"), ("TLS_CIPHER_SUITE", {}, "\xfc"),
                ("AZURE_AUTHORITY_HOST", {},
                 "http://login.microsoftonline.com ftp://x https:// https://u:p@x https://x:99999 "
                 "https://x:0 https://x/?q https://[x"),
                ("GRAPH_ENDPOINT", {
                    "https://graph.microsoft.us/": "https://graph.microsoft.us",
                    "graph.microsoft.us": "https://graph.microsoft.us",
                    "http://127.0.0.1:8080": "http://127.0.0.1:8080",
                    "http://localhost:1/graph/": "http://localhost:1/graph",
                    "http://[::1]:80": "http://[::1]:80"},
                 "http://10.0.0.1 http://localhost.evil.example https://user:hidden@x "
                 "user:hidden@x.y https://u:p@hidden/x@y.z https://x.y/?sig=hidden "
                 "https://x.y/#hidden https://[hidden@ https://user:hidden\n@x.y"),
                ("MAX_MESSAGE_SIZE", {"1000": 1000, "157286400": 157_286_400},
                 "10M 0 999 157286401"),
                ("MAX_RECIPIENTS", {"1": 1, "": 500}, "0"),
                ("MAX_MEMORY_FOR_MESSAGES", {}, "1G 999"),
                ("SENDER_FROM", {}, "mime"), ("FROM_MISMATCH", {}, "refuse"),
                ("HEADER_RECIPIENTS", {}, "refuse"), ("LARGE_MESSAGES", {}, "true"),
                ("MAX_CONNECTIONS", {}, "-5"), ("MAX_CONNECTIONS_PER_CLIENT", {}, "1.5"),
                ("CLIENT_TIMEOUT", {"0.5": 0.5, "86400": 86400.0}, "0 forever 86400.1"),
                ("UPSTREAM_TIMEOUT", {}, "nan"), ("SHUTDOWN_TIMEOUT", {}, "1e9"),
                ("RUN_AS", {"a b": "a b"}, "a:b"),
                ("AZURE_TABLES_URL", {url: url for url in (
                    "https://x.table.core.windows.net/users", "http://127.0.0.1:1/account/users",
                    f"https://x.table.core.windows.net/users?{sas}", f"https://x/{'a' * 63}")},
                 "https://x.table.core.windows.net https://x/a/b/users https://x/us "
                 "https://x/1users http://x.table.core.windows.net/users https://x/users?a\tb "
                 "https://x/users?a#b https://u:p@x/users "
                 "https://x?sig=hidden https://x/us?sv=1&sig=ab@hidden "
                 f"https://x.table.cosmos.azure.com/users https://x/{'a' * 64}"),
                ("AZURE_KEY_VAULT_URL", {"http://localhost:8": "http://localhost:8"},
                 "http://v.vault.azure.net https://v?x https://u:hidden@x"),
                ("IDENTITY_HEADER", {}, "hidden\n\x01"),
                ("HTTPS_PROXY", {}, "socks5://user:hidden@x"),
                ("https_proxy", {}, "https://u:hidden@x"),
                ("AZURE_KEY_VAULT_CERT_NAME", {"relay/0123456789abcdef": "relay/0123456789abcdef"},
                 "a_b ../x x?y a/b/c"),
                ("AZURE_POD_IDENTITY_AUTHORITY_HOST", {
                    "http://127.0.0.1:2579": "http://127.0.0.1:2579",
                    "http://169.254.131.5:8081/msi/": "http://169.254.131.5:8081/msi/",
                    "http://localhost:4/token?x=y": "http://localhost:4/token?x=y",
                    "http://[fd00::1]/": "http://[fd00::1]"},
                 "https://x http://example.com/msi http://8.8.8.8/ x http://u:p@127.0.0.1/ "
                 "http://127.0.0.1:0/ http://127.0.0.1/a\tb http://127.0.0.1/#x"),
                ("IDENTITY_ENDPOINT", {"https://x:2377/metadata": "https://x:2377/metadata"}, ""),
                ("AZURE_CLIENT_SECRET", {"x": "x"}, "\udcff"),
                ("AZURE_TABLES_PARTITION_KEY", {"a'b \u00fc": "a'b \u00fc"}, "\udcff"),
                ("ALLOWED_TENANTS", {f"{TENANT}, x.com": (TENANT, "x.com")}, "contoso ,"),
                ("AZURE_TENANT_ID", {"Contoso.com": "contoso.com"}, "x"),
                ("AZURE_CLIENT_ID", {CLIENT: CLIENT}, "x contoso.com")):
            for text, value in good.items():
                with self.subTest(name, good=text):
                    config = relay.Config.from_environ({name: text})
                    self.assertEqual(getattr(config, name.lower()), value)
            for text in bad.split(" ") if bad else ():
                with self.subTest(name, bad=text):
                    shown = self.assertErrors({name: text}, name)
                    self.assertIn(": must be ", shown)
                    self.assertNotRegex(shown, "u:p|hidden")

    def test_a_user_or_cipher_unknown_to_the_system_is_reported_when_used(self) -> None:
        for wanted, use in (
                ("RUN_AS='nobody-here': must be the name of a user",
                 lambda: relay.drop_privileges("nobody-here")),
                ("TLS_CIPHER_SUITE='NONSENSE': must be an OpenSSL cipher list",
                 lambda: relay.make_tls_contexts(tls_config(TLS_CIPHER_SUITE="NONSENSE")))):
            with self.subTest(wanted), self.assertRaisesRegex(relay.ConfigError, f"^{wanted}"):
                use()

    def test_the_repr_of_the_settings_hides_secrets(self) -> None:
        hidden = "https://x.table.core.windows.net/users?sig=hidden"
        self.assertNotIn("hidden", repr(relay.Config.from_environ({
            "AZURE_TABLES_URL": hidden, "AZURE_CLIENT_SECRET": "hidden",
            "IDENTITY_HEADER": "hidden", "IDENTITY_ENDPOINT": "http://localhost/?hidden"})))

    def test_conflicting_settings_are_reported(self) -> None:
        """Conflicts are reported once all values are valid; the message names the remedies."""
        table, key_vault = "https://x.table.core.windows.net/users", {"TLS_SOURCE": "keyvault"}
        local = {"GRAPH_ENDPOINT": "http://127.0.0.1", "AZURE_AUTHORITY_HOST": "http://127.0.0.1",
                 "HTTPS_PROXY": "socks5://x"}
        for environ, *wanted in (
                ({"TLS_SOURCE": "off"}, "TLS_SOURCE=off with REQUIRE_TLS=true.*=file.*TLS=false"),
                ({"TLS_SOURCE": "off", "SMTPS_PORT": "465"}, "TLS_SOURCE=off with REQUIRE_TLS",
                 "TLS_SOURCE=off with SMTPS_PORT=465.*TLS_SOURCE=file.*SMTPS_PORT=0"),
                ({"TLS_SOURCE": "off", "LOG_LEVEL": "x"}, "LOG_LEVEL='x'"),
                ({"SMTP_PORT": "abc", "LOG_LEVEL": "LOUD", "CLIENT_TIMEOUT": "-1"},
                 "SMTP_PORT='abc': must be a whole number from 0 to 65535", "LOG_LEVEL='LOUD'",
                 "CLIENT_TIMEOUT='-1'"),
                ({"SMTP_PORT": "465", "SMTPS_PORT": "465"}, "SMTP_PORT=465 and SMTPS_PORT=465"),
                ({"MAX_MEMORY_FOR_MESSAGES": "36700159"}, "MAX_MEMORY_FOR_MESSAGES=36700159"),
                ({"MAX_MESSAGE_SIZE": "1001", "MAX_MEMORY_FOR_MESSAGES": "1000"}, "MAX_MEMORY_"),
                ({"MAX_MESSAGE_SIZE": "1000", "MAX_MEMORY_FOR_MESSAGES": "1000"},),
                ({"MAX_MEMORY_FOR_MESSAGES": "3145728", "LARGE_MESSAGES": "refuse"},),
                ({"ACCOUNTS_REQUIRED": "true"}, "ACCOUNTS_REQUIRED.*ACCOUNTS_FILE"),
                ({"AZURE_TABLES_FORCE_USAGE": "True"}, "ACCOUNTS_REQUIRED"),
                ({"AZURE_TABLES_FORCE_USAGE": "true", "AZURE_TABLES_URL": table},),
                ({"ACCOUNTS_REQUIRED": "true", "ACCOUNTS_FILE": "x"},),
                ({**key_vault, "AZURE_KEY_VAULT_URL": "https://x.y"}, ".*_VAULT_CERT_NAME"),
                ({**key_vault, "AZURE_KEY_VAULT_CERT_NAME": "x"}, ".*AZURE_KEY_VAULT_URL"),
                ({**local},), ({"HTTPS_PROXY": "http://u:p@[::1]:8080/", "https_proxy": "x:1"},),
                ({**local, "AZURE_KEY_VAULT_URL": "https://x"}, r"HTTPS_PROXY='socks5://x'"),
                ({**local, "AZURE_TABLES_URL": table}, "HTTPS_PROXY=.*: must be http://.*host")):
            with self.subTest(environ):
                try:
                    relay.Config.from_environ(environ)
                    lines = []
                except relay.ConfigError as error:
                    lines = str(error).splitlines()
                self.assertEqual(len(lines), len(wanted), lines)
                for line, pattern in zip(lines, wanted):
                    self.assertRegex(line, f"^{pattern}")

    def test_azure_cloud_selects_the_endpoints(self) -> None:
        for environ, login, graph in (
                *((default, "login.microsoftonline.com", "graph.microsoft.com")
                  for default in ({}, {"AZURE_CLOUD": "Global"})),
                ({"AZURE_CLOUD": "usgov"}, "login.microsoftonline.us", "graph.microsoft.us"),
                ({"AZURE_CLOUD": "usgov-dod"}, "login.microsoftonline.us",
                 "dod-graph.microsoft.us"),
                *(({"AZURE_CLOUD": " CHINA ", "AZURE_AUTHORITY_HOST": text}, login,
                   "microsoftgraph.chinacloudapi.cn") for text, login in (
                       ("", "login.partner.microsoftonline.cn"),
                       ("login.chinacloudapi.cn", "login.chinacloudapi.cn")))):
            config = relay.Config.from_environ(environ)
            self.assertEqual((config.azure_authority_host, config.graph_endpoint),
                             (f"https://{login}", f"https://{graph}"))
        self.assertErrors({"AZURE_CLOUD": "germany"}, "AZURE_CLOUD")

    def test_the_help_explains_every_setting(self) -> None:
        for name, setting in relay.settings().items():
            with self.subTest(name):
                begin = "`true`: " if setting.default in ("true", "false") else "[A-Z]"
                self.assertRegex(setting.help, rf"^{begin}.*\.$")
                self.assertIn(f"  {name} (default: {setting.default or 'empty'})\n"
                              f"      {setting.help}", relay.settings_help())


class PathTests(unittest.TestCase):
    """Paths and parameters, RFC 5321 section 4.1.2."""

    def test_valid_paths_are_parsed(self) -> None:
        for text, mailbox, parameters in (
                *((f"FROM:<{mailbox}>", mailbox, {}) for mailbox in (
                    "", "a@b.c", "a@b", '"a b\\"@"@c.d', '"\\ "@c', "a@[127.0.0.1]", "a@[IPv6:::1]",
                    "\u00fc@\u00fc.de")),
                ("from:<A.b+c@D.e>", "A.b+c@D.e", {}),
                ("FROM:<@x.y,@z:a@b.c>", "a@b.c", {}),                  # source route
                ("FROM:<a@b.c> SIZE=12 BODY=8BITMIME", "a@b.c",
                 {"SIZE": "12", "BODY": "8BITMIME"}),
                ("FROM:<a@b.c> smtputf8", "a@b.c", {"SMTPUTF8": None}),
                ("FROM:<> AUTH=<>", "", {"AUTH": "<>"}),                # RFC 4954
                ("FROM: <a@b.c>", "a@b.c", {}),                         # devices do this
                ("FROM:a@b.c SIZE=1", "a@b.c", {"SIZE": "1"})):         # and this
            with self.subTest(text):
                self.assertEqual(relay.parse_path(text, "FROM:"), (mailbox, parameters))

    def test_malformed_paths_are_refused_with_501(self) -> None:
        for text in ("", "FROM", "FROM:", "FROM <a@b.c>", "TO:<a@b.c>", "FROM:<a@b.c",
                     "FROM:a@b.c>", "FROM:<a>", "FROM:<@>", "FROM:<a@>", "FROM:<@b.c>",
                     "FROM:<a b@c.d>", "FROM:<a@b c>", "FROM:<a..b@c.d>", "FROM:<.a@b.c>",
                     "FROM:<a.@b.c>", "FROM:<a@b..c>", "FROM:<a@-b.c>", "FROM:<a@b-.c>",
                     "FROM:<a@b_c.d>", "FROM:<a@b.c.>", "FROM:<a@b@c>", 'FROM:<"a@b.c>',
                     'FROM:<a"b"@c.d>', "FROM:<a,b@c.d>", "FROM:<(x)a@b.c>",
                     "FROM:<boss@t.com/sendMail?x=>", "FROM:<guest#EXT#@t@x>",
                     "FROM:<a\u0085@b.c>", "FROM:<a@b\u2028.c>", "FROM:<a@[]>",
                     "FROM:<a@[1.2.3.4>", "FROM:<a@[x]y]>", "FROM:<a@b.c>SIZE=1",
                     "FROM:<a@b.c> SIZE=1 SIZE=1", "FROM:<a@b.c> size=1 SIZE=2",
                     "FROM:<a@b.c> SIZE=", "FROM:<a@b.c> =1", "FROM:<a@b.c> A==B",
                     "FROM:<a@b.c> \u00fc=1", "FROM:<a\udcff@b.c>"):
            with self.subTest(text), self.assertRaises(relay.ProtocolError) as caught:
                relay.parse_path(text, "FROM:")
            self.assertEqual(caught.exception.reply.code, 501, text)

    def test_malformed_base64_is_refused(self) -> None:
        for text, data in (("", b""), ("QQ==", b"A"), ("QUI=", b"AB"), ("QUJD", b"ABC"),
                           ("+/+/", b"\xfb\xff\xbf")):
            self.assertEqual(relay.decode_base64(text), data)
        for text in ("Q", "QQ", "QQ=", "QQ===", "=", "==", "QQ==QQ==", "Q Q=", "QQ==\n",
                     "Q-__", "*", "\u00fcQQQ"):
            with self.subTest(text), self.assertRaises(relay.ProtocolError):
                relay.decode_base64(text)


# The lines of a section [a], separated by "; ", the error, and the values of VALUE in both.
FILE_ERRORS = """
tenant_id = x -> tenant_id = x: must be the ID of a tenant
client_id = x -> client_id = x: must be the ID of an application
{app}client_id = contoso.com -> line 4: [a] client_id appears twice
{app}hidd3n = x; hidd3n = y -> line 5: [a] *** appears twice
{own}password = VALUE -> password = ***: must be what this prints: \
python3 smtp_oauth_relay.py -> hidden | scrypt$x$y
{app}from_email = scanner -> from_email = scanner: must be an address such as
{app}allowed_recipients = a@b@c -> allowed_recipients = a@b@c: must be domains
{app}allowed_senders = VALUE -> allowed_senders = VALUE: must be domains and -> * | *@x.y
{app}networks = VALUE -> networks = VALUE: must be networks such as -> \
10.0.0.1/8 | printer | ::ffff:192.168.7.0/120
{app}networks = , -> networks = ,: must be values, or empty
{app}login = no -> login = no: must be one of required optional
{app}{net}require_tls = maybe -> require_tls = maybe: must be one of true false
{app}{net}tls_min_version = 1.4 -> tls_min_version = 1.4: must be one of
{app}credential = password -> credential = password: must be one of
{app}colour = red -> colour: unknown key
{app}VALUE -> ***: unknown key -> client_secret: hidden= | [b] networks = 10.0.0.0/8
{app}networks = 10.0.0.0/8;   client_secret = hidden -> networks: continues on an indented line
{app}client_secret = x;   hidden -> client_secret: continues on an indented line
{app}client_secret = x;  networks = 10.0.0.0/8 -> client_secret: continues on an
 -> tenant_id: must be set
tenant_id = {tenant} -> client_id: must be set
{own}client_secret_file = /x; {pw} -> set one of client_secret, client_secret_file, credential
{app}{pw} -> password: needs client_secret
VALUE -> password: must be set, otherwise anyone could log in -> \
{own} | {app}client_secret_file = /x | credential = managed-identity
{app}{net}login = optional -> authentication: optional needs a secret
{own}authentication = optional -> authentication: optional needs networks
{net}login = optional; authentication = optional -> authentication: appears twice
{own}login = optional; networks = VALUE -> networks: VALUE without login is an open relay \
-> 0.0.0.0/0 | ::/0 | 10.0.0.0/7 | fc00::/6
{app}require_tls = false -> require_tls: needs networks
{app}tls_min_version = 1.0 -> tls_min_version: needs networks
{app}{net}require_tls = true -> require_tls: true needs a certificate
credential = workload-identity -> credential: workload-identity needs AZURE_FEDERATED_TOKEN_FILE
VALUE -> line 2: must be [section], key = value or a comment -> hidden words | [ | = hidden
{app}[ ] -> line 4: must be [section]
{app}[a] -> line 4: [a] appears twice
{app}[A]; {app} -> [A] appears twice; case does not matter
{app}[default]; {app} -> [default]: must be [DEFAULT]
"""


class AccountTests(unittest.TestCase):
    """Accounts files, and the accounts in them."""

    def test_the_example_is_parsed(self) -> None:
        scan, direct = parse(EXAMPLE)
        self.assertEqual(
            (scan.name, scan.tenant_id, scan.client_id, scan.from_email, scan.password,
             scan.client_secret, scan.allowed_recipients, [*map(str, scan.networks)],
             scan.authentication, scan.require_tls, scan.tls_min_version),
            ("scan2", TENANT, CLIENT, "scanner@example.com", HASH, "s3cr~t._-",
             ("example.com", "boss@partner.example"), ["192.168.7.0/24", "fd00:7::/64"],
             "optional", False, "1.0"))
        self.assertNotRegex(repr(scan), "s3cr|scrypt")
        # The relay holds a secret only if it is in the file. An empty key cancels that of DEFAULT.
        for account, secret, is_held in ((scan, "s3cr~t._-", True), (direct, "typed", False)):
            self.assertEqual(account.as_application("typed"), relay.Application(
                TENANT, CLIENT, secret, relay_holds_secret=is_held))

    def test_the_credential_of_a_section_replaces_that_of_default(self) -> None:
        env = {"AZURE_FEDERATED_TOKEN_FILE": "/t", "AZURE_TENANT_ID": CLIENT,
               "AZURE_CLIENT_ID": TENANT}
        default = f"[DEFAULT]\n{APPLICATION}client_secret = s\n"
        for text, tenant, client, secret, credential in (
                (f"{default}[a]\nclient_secret_file = /x", TENANT, CLIENT, "", "secret"),
                (f"{default}[a]\nclient_secret = %~%(x)s:", TENANT, CLIENT, "%~%(x)s:", "secret"),
                (f"{default}[a]\ncredential = Managed-Identity", TENANT, CLIENT, "",
                 "managed-identity"),
                ("[a]\ncredential = Managed-Identity", "", "", "", "managed-identity"),
                # The section takes precedence over the settings.
                ("[a]\ncredential = workload-identity", CLIENT, TENANT, "", "workload-identity"),
                (f"[a]\n{APPLICATION}credential = workload-identity", TENANT, CLIENT, "",
                 "workload-identity")):
            with self.subTest(text):
                account, = parse(f"{text}\npassword = {HASH}\n", **env)
                self.assertEqual(account.as_application("typed"),
                                 relay.Application(tenant, client, secret, credential, True))

    def test_each_error_names_section_and_key(self) -> None:
        parts = {"app": APPLICATION, "own": f"{APPLICATION}client_secret = hidden\n",
                 "net": "networks = 10.0.0.0/8\n", "pw": f"password = {HASH}", "tenant": TENANT}
        for row in FILE_ERRORS.strip("\n").splitlines():
            lines, message, *values = row.split(" -> ")
            for value in "".join(values).split(" | "):
                with self.subTest(lines, value=value):
                    text = lines.replace("VALUE", value).format(**parts).replace("; ", "\n")
                    _, errors = relay.parse_accounts(f"[a]\n{text}\n", make_config())
                    wanted = message.replace("VALUE", value)
                    self.assertIn(wanted, [error.removeprefix("[a] ")[:len(wanted)]
                                           for error in errors])
                    self.assertNotIn("hidden", "".join(errors))

    def test_all_invalid_values_are_reported_or_else_all_conflicts(self) -> None:
        for text, wanted in (
                ("", ["the file contains no account"]),
                ("[DEFAULT]\n", ["the file contains no account"]),
                ("hidden = x\n", ["line 1"]),
                ("[DEFAULT]\ntenant_id = x\n[a]\n[b]\n", ["[DEFAULT] tenant_id = x"]),
                ("[a]\ntenant_id = x\ncolour = red\n[b]\nlogin = x\n",
                 ["[a] tenant_id = x", "[a] colour", "[b] login = x"]),
                ("[a]\n[b]\n", ["[a] tenant_id", "[a] client_id", "[b] tenant_id",
                                "[b] client_id"])):
            _, errors = relay.parse_accounts(text, make_config())
            self.assertEqual([error.partition(":")[0] for error in errors], wanted)

    def test_indistinguishable_accounts_are_reported(self) -> None:
        def errors(first: str, second: str) -> list[str]:
            return relay.parse_accounts(
                f"[DEFAULT]\n{APPLICATION}client_secret = s\npassword = {HASH}\n"
                f"[a]\n{first}\n[b]\n{second}\n", make_config())[1]
        net, open_ = "networks = 10.0.0.0/8\n", "networks = 10.0.0.0/8\nlogin = optional"
        for first, second, *wanted in (
                (open_, open_, "[a] and [b] networks: both claim 10.0.0.0/8 without login"),
                (open_, net), (open_, "networks = 10.1.0.0/16\nlogin=optional"),
                (f"{net}require_tls = false", net),
                ("networks = 10.0.0.0/8, 10.0.0.0/8\nlogin = optional", ""),
                (f"{net}tls_min_version = 1.0", f"{net}tls_min_version = 1.2",
                 "[a] and [b] tls_min_version: must be the same, because both have 10.0.0.0/8")):
            self.assertEqual(errors(first, second), wanted)

    def test_the_most_specific_network_selects_the_account(self) -> None:
        accounts = relay.Accounts(parse(f"""\
[DEFAULT]
{APPLICATION}client_secret = s
password = {HASH}
[office]
networks = 10.0.0.0/8, fd00::/8
login = optional
[erp]
networks = 10.1.2.3
[old]
networks = 10.1.0.0/16
login = optional
require_tls = false
tls_min_version = 1.0
[new]
networks = 10.1.0.0/16
[ newer ]
networks = 10.1.9.0/24
require_tls = true
""", TLS_SOURCE="file", REQUIRE_TLS="true"))
        for address, name, require_tls, tls in (
                ("10.2.0.1", "office", True, "1.2"), ("10.1.0.1", "old", False, "1.0"),
                ("10.1.2.3", None, False, "1.0"), ("10.1.9.1", None, True, "1.0"),
                ("192.168.1.1", None, True, "1.2"),
                ("fd00::1", "office", True, "1.2"), ("fe80::1%eth0", None, True, "1.2"),
                ("::ffff:10.1.0.1", "old", False, "1.0"), ("unknown", None, True, "1.2")):
            with self.subTest(address):
                policy = accounts.match_address(relay.parse_ip_address(address), tls_config())
                principal = policy.anonymous
                self.assertEqual(principal and principal.account.name, name)
                self.assertEqual(policy[1:], (require_tls, tls))
                if principal:
                    self.assertEqual(principal.application.secret, "s")

    def test_allowed_recipients_match_domains_and_whole_addresses(self) -> None:
        account = relay.Account("a", allowed_recipients=relay.settings_of(relay.Account)[
            "allowed_recipients"].parse("Example.com, boss@Partner.example \"ab\"@x.y"))
        for mailbox in ("a@example.com", "A@EXAMPLE.COM", "BOSS@partner.example", "AB@x.y",
                        '"a@b"@example.com'):
            account.check(mailbox, "allowed_recipients")
        for mailbox in ("a@sub.example.com", "a@example.com.evil.example", "a@xexample.com",
                        "other@partner.example", '"a@example.com"@evil.example',
                        "example.com@evil.example"):
            with self.subTest(mailbox), self.assertRaises(relay.DeliveryError) as caught:
                account.check(mailbox, "allowed_recipients")
            self.assertTrue(str(caught.exception.reply).startswith("550 5.7.1 "))
        relay.Account("a").check("anybody@x.y", "allowed_senders")

    def test_networks_limit_the_address_of_the_device(self) -> None:
        account = relay.Account("a", networks=relay.settings_of(relay.Account)["networks"].parse(
            "10.0.0.0/8, 192.0.2.1, fd00::/8"))
        for address, allowed in (("10.1.2.3", True), ("192.0.2.1", True), ("fd00::1", True),
                                 ("192.0.2.2", False), ("::1", False), ("unknown", False)):
            parsed = relay.parse_ip_address(address)
            self.assertEqual(account.allows_address(parsed), allowed, address)
            self.assertTrue(relay.Account().allows_address(parsed))
        for text, wanted in (("fe80::1%eth0", "fe80::1"), ("::ffff:10.0.0.1", "10.0.0.1")):
            self.assertEqual(str(relay.parse_ip_address(text)), wanted)

    def test_only_the_right_password_is_accepted(self) -> None:
        self.assertRegex(HASH, r"^scrypt\$[\w-]{22}\$[\w-]{43}$")
        self.assertTrue(relay.verify_password(PASSWORD, HASH))
        for wrong in ("", PASSWORD[:-1], PASSWORD + " ", PASSWORD.upper()):
            self.assertFalse(relay.verify_password(wrong, HASH))
        self.assertFalse(relay.verify_password("", relay.DUMMY_HASH))
        # RFC 7914 section 12 has no vector for these parameters. OpenSSL computed this hash.
        with unittest.mock.patch.object(relay, "SCRYPT_COST", REAL_COST):
            self.assertEqual(
                relay.hash_password("\u00fc", bytes(range(16))),
                "scrypt$AAECAwQFBgcICQoLDA0ODw$AP8dJQet8qsK2VB-snAjmLJ5a-0Oj5eB9CtaFcakSOs")

    def test_lookup_usernames_name_a_row_of_the_table(self) -> None:
        for username, name in (("scan2@lookup", "scan2"), ("a.b@lookup", "a.b"),
                               ("a@b.c@LookUp.local", "a@b.c"), ("@lookup", None),
                               ("scan2", None), ("scan2@lookups", None), (USER, None),
                               ("a\nb@lookup.c\nd", "a\nb")):
            self.assertEqual(relay.lookup_name(username, "@"), name, username)
        self.assertEqual(relay.lookup_name("a|lookup", "|"), "a")

    def test_the_relay_identity_depends_on_the_settings(self) -> None:
        for tenant, client, secret, file, *wanted in (
                (TENANT, CLIENT, "s", "/t", TENANT, CLIENT, "s", "secret"),
                (TENANT, CLIENT, "", "/t", TENANT, CLIENT, "", "workload-identity"),
                *((tenant, client, secret, file, "", client, "", "managed-identity")
                  for tenant, client, secret, file in (
                      (TENANT, CLIENT, "", ""), ("", CLIENT, "s", ""),
                      ("", CLIENT, "", "/t"), (TENANT, "", "s", "/t")))):
            config = make_config(AZURE_TENANT_ID=tenant, AZURE_CLIENT_ID=client,
                                 AZURE_CLIENT_SECRET=secret, AZURE_FEDERATED_TOKEN_FILE=file)
            self.assertEqual(dataclasses.astuple(relay.relay_identity(config)), (*wanted, True))


class UsernameTests(unittest.TestCase):
    """User names of the form TENANT@CLIENT."""

    def test_usernames_name_tenant_and_client(self) -> None:
        for name in (USER, USER.upper(), f"{SHORT_TENANT}@{SHORT_CLIENT}",
                     f"{TENANT}@{SHORT_CLIENT}", f"{SHORT_TENANT}==@{CLIENT}", f"{TENANT}:{CLIENT}",
                     f"{TENANT}|{CLIENT}", f"{USER}.local", f"{USER}.example.com", f"{USER}.a@b"):
            delimiter = next(character for character in "@:|" if character in name)
            self.assertEqual(relay.parse_username(name, delimiter), (TENANT, CLIENT))
        self.assertEqual(relay.parse_username(f"Contoso.com@{CLIENT[:-1]}B.local", "@"),
                         ("contoso.com", f"{CLIENT[:-1]}b"))

    def test_malformed_usernames_are_refused_with_535(self) -> None:
        for name in ("", "scan", "@", TENANT, f"{TENANT}:{CLIENT}", f"{TENANT}@contoso.com",
                     f"{TENANT}@{SHORT_CLIENT[:-1]}", f"{USER}x", f"{USER}\n", "id@lookup",
                     *(f"{tenant}@{CLIENT}" for tenant in (
                         "", "contoso", "a..b", "-a.b", "../x.y", "a.b/c", "a.\u212abc",
                         f"{TENANT} ", f"{TENANT}@", f"{SHORT_TENANT}=")), f"{TENANT}@"):
            with self.subTest(name), self.assertRaises(relay.AuthError) as caught:
                relay.parse_username(name, "@")
            self.assertRegex(str(caught.exception.reply), "535 5.7.8 .*TENANT@CLIENT")


STATES: dict[str, tuple[bytes, bool]] = {
    "cold": (b"", False),
    "plain": (b"EHLO x\r\n", False),
    "tls": (b"EHLO x\r\n", True),
    "login": (b"EHLO x\r\n" + LOGIN, True),
    "mail": (b"EHLO x\r\n" + LOGIN + MAIL, True),
    "rcpt": (b"EHLO x\r\n" + LOGIN + MAIL + RCPT, True),
}

# The reply to each command in each state, with TLS available and REQUIRE_TLS=true.
MATRIX = """
                                         cold   plain  tls    login  mail   rcpt
    EHLO x, HELO x, RSET, NOOP, NOOP x   250    250    250    250    250    250
    EHLO, HELO, RSET x, VRFY, QUIT x     501    501    501    501    501    501
    STARTTLS                             503    220    503    503    503    503
    STARTTLS now                         503    501    501    501    503    503
    AUTH PLAIN {plain}                   530    530    235    503    503    503
    AUTH LOGIN                           530    530    334    503    503    503
    AUTH                                 530    530    501    501    503    503
    AUTH CRAM-MD5                        530    530    504    503    503    503
    MAIL FROM:<a@b.c>                    530    530    530    250    503    503
    MAIL                                 530    530    530    501    503    503
    RCPT TO:<d@e.f>                      503    503    503    503    250    250
    RCPT TO:<d@e.f> A=B                  503    503    503    503    555    555
    RCPT                                 503    503    503    503    501    501
    DATA                                 503    503    503    503    503    354
    DATA now                             503    503    503    503    503    501
    VRFY someone                         252    252    252    252    252    252
    EXPN list                            502    502    502    502    502    502
    HELP, HELP MAIL                      214    214    214    214    214    214
    QUIT                                 221    221    221    221    221    221
    BDAT 5, ETRN x, {empty}              500    500    500    500    500    500
"""


class SessionTests(SessionCase):
    """Replies and events of a session. FuzzTests compares many more sessions with Model."""

    def test_every_command_in_every_state_gets_the_right_code(self) -> None:
        states, *rows = [re.split(r"  +", line.strip()) for line in MATRIX.strip("\n").splitlines()]
        for commands, *wanted in rows:
            commands = commands.format(plain=plain().decode(), empty="").split(", ")
            for command, (state, code) in itertools.product(commands, zip(states, wanted)):
                with self.subTest(command, state=state):
                    prelude, secure = STATES[state]
                    sent = command.encode() + b"\r\n"
                    for variant in (sent, sent.lower() if "PLAIN" not in command
                                    else sent, sent.replace(b"\r\n", b" \r\n")):
                        self.assertSays(variant, int(code), prelude=prelude, secure=secure)

    def test_the_greeting_begins_with_the_server_name(self) -> None:
        session = relay.Session(make_config(SERVER_GREETING="Hello there"), "relay.test")
        session.greet()
        self.assertEqual(session.output(), b"220 relay.test ESMTP Hello there\r\n")

    def test_pipelined_commands_are_answered_together_in_order(self) -> None:
        dialogue = self.start(STATES["login"][0], secure=True)
        dialogue.session.receive(MAIL + RCPT + b"RCPT TO:<x>\r\nDATA\r\n")
        self.assertIsNone(dialogue.session.next_event())
        self.assertEqual(codes(dialogue.session.output()), [250, 250, 501, 354])

    def test_a_tls_client_hello_on_the_smtp_port_is_recognized(self) -> None:
        dialogue = self.assertSays(b"\x16\x03\x01\x02\x00\x01\r\n", prelude=b"", secure=False)
        self.assertTrue(dialogue.closed)
        self.assertIn("SMTPS_PORT", dialogue.events[-1].reason)
        self.assertSays(b"NOOP\r\n\x16\x03\x01\r\n", 250, 500, prelude=b"", secure=False)
        self.assertIn("STARTTLS", dialogue.events[-1].reason)

    def test_a_session_without_progress_is_closed_with_421(self) -> None:
        """Only commands since the last accepted login or message count."""
        message = MAIL + b"".join(b"RCPT TO:<u%d@b.c>\r\n" % number for number in range(150)
                                  ) + b"DATA\r\n.\r\n"
        cases: Any = (
                (b"NOOP\r\n" * 100_000, *[250] * 99, 421),
                (b"NOPE\r\n" * 11, *[500] * 10, 421),
                (b"MAIL FROM:<a@b.c> FOO=1\r\n" * 11, *[555] * 10, 421),
                (b"NOPE\r\nNOOP\r\n" * 6 + b"NOPE\r\n" * 9, *[500, 250] * 6, *[500] * 4, 421),
                (message * 2, *([250] * 101 + [452] * 50 + [354, 250]) * 2),
                ((b"NOOP\r\n" * 90 + message) * 2,
                 *([250] * 191 + [452] * 50 + [354, 250]) * 2))
        for data, *wanted in cases:
            with self.subTest(data[:30]):
                dialogue = self.start(b"EHLO x\r\n" + LOGIN, secure=True, MAX_RECIPIENTS="100")
                replies = dialogue.feed(data)
                self.assertEqual(codes(replies), wanted)
                self.assertEqual(dialogue.closed, wanted[-1] == 421)
                # The log has each reply, but a repeated mistake only once.
                logged = [(mark, reply.code) for mark, reply in dialogue.log if mark != "<"]
                self.assertEqual([code for mark, code in logged if mark == ">"],
                                 [250, 235, *wanted])
                self.assertLessEqual(logged.count(("!", 500)), 1)
                self.assertEqual(("!", 500) in logged, 500 in wanted)
        self.assertSays(b"NOOP\r\n" * 98 + b"STARTTLS\r\n", *[250] * 98, 220,
                        prelude=b"EHLO x\r\n", secure=False)

    def test_mail_parameters_are_checked(self) -> None:
        for reply, *rows in (
                ("250 2.1.0", "SIZE=1000", "size=36700160", "SIZE=0", "BODY=7BIT", "SMTPUTF8",
                 "BODY=8bitmime", "AUTH=a@b.c", "SIZE=1 BODY=8BITMIME SMTPUTF8 AUTH=+3C+3E"),
                ("501 5.5.4", "SIZE=999999999999999999999", "SIZE=-1", "SIZE=1_0", "SIZE=\u0661",
                 "SIZE", "SIZE=1 SIZE=1", "BODY=BINARYMIME", "BODY", "SMTPUTF8=1", "AUTH"),
                ("552 5.3.4", "SIZE=36700161", "SIZE=99999999999999999999"),
                ("555 5.5.4", "RET=HDRS")):
            for parameters in rows:
                with self.subTest(parameters):
                    command = f"MAIL FROM:<a@b.c> {parameters}\r\n".encode()
                    self.assertTrue(self.converse(command).said.startswith(reply.encode()))

    def test_only_crlf_dot_crlf_ends_a_message(self) -> None:
        """SMTP smuggling: CVE-2023-51764, CVE-2024-27305 and similar."""
        for end in (b"\n.\n", b"\n.\r\n", b"\r.\r\n", b"\r\n.\n", b"\r\n.\r", b"\r.\r",
                    b"\n.\r", b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\r\n.\n", b"\r\n.\n\r\n",
                    b"\r\n.\r\r\n", b"\r\n .\r\n", b"\r\n. \r\n", b"\r\n.\r\n"[:4]):
            with self.subTest(end):
                dialogue = self.assertSays(
                    b"DATA\r\na" + end + b"MAIL FROM:<evil@b.c>\r\n.\r\n", 354, 250,
                    prelude=STATES["rcpt"][0])
                self.assertIn(b"evil", dialogue.messages[0])

    def test_the_message_size_limit_is_exact(self) -> None:
        for size, code in ((5000, 250), (5001, 552)):
            for content in (b"x" * (size - 2) + b"\r\n", b"..\r\n" + b"x" * (size - 5) + b"\r\n",
                            b"\n" + b"x" * (size - 4) + b"\r\n"):
                with self.subTest(size, content=content[:5]):
                    self.assertSays(b"DATA\r\n" + content + b".\r\n", 354, code,
                                    prelude=STATES["rcpt"][0], MAX_MESSAGE_SIZE="5000")

    def test_the_advertised_size_is_the_limit_of_mail(self) -> None:
        for size, large, limit in (
                ("", "", 36_700_160), ("157286400", "", 157_286_400), ("5000", "", 5000),
                ("", "refuse", 3_145_728), ("5000", "refuse", 5000)):
            with self.subTest(size, large=large):
                dialogue = self.start(b"EHLO x\r\n" + LOGIN, secure=True,
                                      MAX_MESSAGE_SIZE=size, LARGE_MESSAGES=large)
                self.assertIn(b"250-SIZE %d\r\n" % limit, dialogue.said)
                replies = dialogue.feed(b"MAIL FROM:<a@b.c> SIZE=%d\r\nRSET\r\n" % limit
                                        + b"MAIL FROM:<a@b.c> SIZE=%d\r\n" % (limit + 1))
                self.assertEqual(codes(replies), [250, 250, 552])
                self.assertEqual(b"LARGE_MESSAGES=refuse" in replies, limit == 3_145_728)

    def test_messages_over_the_memory_budget_get_452_and_others_continue(self) -> None:
        memory = relay.MemoryBudget(10_000)

        def begin() -> Dialogue:
            dialogue = Dialogue(tls_config(), secure=True, memory=memory)
            dialogue.feed(b"EHLO x\r\n" + LOGIN + MAIL + RCPT + b"DATA\r\n")
            return dialogue
        line = b"x" * 998 + b"\r\n"
        first, second = begin(), begin()
        first.feed(line * 6)
        self.assertEqual(memory.free, 4002)             # the last CRLF may begin the terminator
        # Too large a SIZE is refused at MAIL; too much content, at its end.
        third = Dialogue(tls_config(), secure=True, memory=memory)
        replies = third.feed(b"EHLO x\r\n" + LOGIN + b"MAIL FROM:<a@b.c> SIZE=4003\r\n"
                             + b"MAIL FROM:<a@b.c> SIZE=4002\r\n")
        self.assertEqual(codes(replies)[-2:], [452, 250])
        self.assertIn(b"452 4.3.1 ", replies)
        second.feed(line * 5)
        self.assertEqual(memory.free, 4002)             # its content is discarded
        progress = second.session.progress
        second.feed(line * 100)
        self.assertEqual(second.session.progress, progress + 1)     # 64 KiB
        self.assertIn(b"452 4.3.1 ", second.feed(b".\r\n"))
        first.feed(b"y" * 3998 + b"\r\n")
        self.assertEqual(memory.free, 2)
        self.assertEqual(codes(first.feed(b".\r\n")), [250])
        self.assertEqual(len(first.messages[0]), 10_000)
        self.assertEqual(memory.free, 10_000)
        self.assertEqual(codes(second.feed(MAIL + RCPT + b"DATA\r\n" + line + b".\r\n")),
                         [250, 250, 354, 250])

    def test_memory_is_reserved_until_the_reply_to_the_message(self) -> None:
        memory = relay.MemoryBudget(100)
        dialogue = Dialogue(tls_config(), secure=True, memory=memory,
                            answer=lambda session, event: accept(session, event)
                            if not isinstance(event, relay.Deliver) else None)
        dialogue.feed(b"EHLO x\r\n" + LOGIN + MAIL + RCPT + b"DATA\r\nabc\r\n.\r\n")
        self.assertEqual(memory.free, 95)
        dialogue.session.delivered("id 1")
        self.assertEqual(memory.free, 100)

    def test_commands_pipelined_after_starttls_are_discarded(self) -> None:
        dialogue = self.start(b"EHLO x\r\n", answer=lambda session, event: None)
        dialogue.feed(b"STARTTLS\r\nEHLO injected\r\nNOOP\r\n")
        self.assertEqual(dialogue.events, [relay.StartTls()])
        self.assertTrue(dialogue.said.endswith(b"220 2.0.0 Ready to start TLS\r\n"))
        dialogue.session.receive(b"NOOP\r\n")
        dialogue.session.tls_started()
        self.assertIsNone(dialogue.session.next_event())
        self.assertEqual(dialogue.session.output(), b"")
        self.assertEqual(codes(dialogue.feed(b"MAIL FROM:<a@b.c>\r\nEHLO real\r\n")), [530, 250])

    def test_the_log_never_shows_credentials(self) -> None:
        prelude = STATES["tls"][0]
        secret = base64.b64encode(b"\0user\0hidden")
        word = base64.b64encode(b"hidden")
        for data in (b"AUTH PLAIN " + secret, b"AUTH PLAIN\r\n" + secret,
                     b"AUTH LOGIN\r\n" + word + b"\r\n" + word, b"AUTH LOGIN " + word,
                     b"auth\tPLAIN " + secret, word, b"AUTHPLAIN " + secret,
                     b"AUTH CRAM-MD5\r\n" + word):
            with self.subTest(data[:20]):
                dialogue = self.start(prelude, secure=True)
                dialogue.feed(data + b"\r\n")
                shown = repr(dialogue.log)
                for hidden in ("hidden", secret.decode(), word.decode()):
                    self.assertNotIn(hidden, shown)

    def test_allowed_senders_and_recipients_are_enforced(self) -> None:
        policy = policy_of(relay.Account("scan2", allowed_senders=("a.b",),
                                         allowed_recipients=("d.e", "boss@f.g")), tls_config())
        dialogue = Dialogue(tls_config(), secure=True, policy=policy)
        replies = dialogue.feed(b"EHLO x\r\nMAIL FROM:<x@b.c>\r\nMAIL FROM:<x@A.B>\r\n"
                                b"RCPT TO:<x@y.z>\r\nRCPT TO:<x@d.e>\r\nRCPT TO:<Boss@f.g>\r\n"
                                + b"RCPT TO:<other@f.g>\r\n" * 150 + b"DATA\r\nText\r\n.\r\n")
        self.assertEqual(codes(replies)[1:], [550, 250, 550, 250, 250, *[550] * 150, 354, 250])
        self.assertIn(b"550 5.7.1 This account may not send as x@b.c", replies)
        self.assertIn(b"550 5.7.1 This account may not send to other@f.g", replies)
        self.assertEqual(list(dialogue.events[0].envelope.recipients.values()),
                         ["x@d.e", "Boss@f.g"])


class RecipientTests(unittest.TestCase):
    """Only the recipients of the envelope receive a message."""

    def test_address_fields_name_only_envelope_recipients(self) -> None:
        for header, recipients, wanted in (
                # A message that names the envelope stays as it is.
                *((header, "a@x.y b@X.y", header) for header in (
                    "To: a@x.y, b@x.y\n", "To: a@x.y\nCc: b@x.y\n", "TO:A@X.Y,\n\tB@x.Y\n",
                    "To: a@x.y\nBcc: b@x.y\n", 'To: Ann <a@x.y>, "B, the second" <b@x.y>\n',
                    "To: a@x.y (Ann, the first), B\n\t<b@x.y>(Bob)\n",
                    "To: Team: a@x.y, Bob <b@x.y>;\n", "To: a@x.y,, b@x.y,\n",
                    "To: undisclosed-recipients:;\nBcc: a@x.y, b@x.y\n",
                    "To: undisclosed-recipients:\nBcc: a@x.y, b@x.y\n",
                    "To: =?utf-8?Q?M=C3=BCller?= <a@x.y>, =?utf-8?B?w7w=?= <b@x.y>\n",
                    "To: M\udcfcller <a@x.y>, b@x.y\n", "To: \"a\"@x.y, b@x.y\n",
                    "To: a@x.y <a@x.y>, \"b@x.y\" <b@x.y>\n", "To: a@x.y\nTo: b@x.y\n",
                    "To: a@x.y, b@x.y, a@x.y\nCc: b@x.y\n", 'To: "a; b" < a@x.y >, b@x.y\n',
                    "Subject: x\n To: c@x.y\nTo: a@x.y, b@x.y\n")),
                # Recipients that no field names are added to one Bcc.
                ("To: a@x.y\n", "a@x.y h@x.y", "Bcc: h@x.y\nTo: a@x.y\n"),
                ("Subject: x\n", "a@x.y b@x.y", "Bcc: a@x.y,\n b@x.y\nSubject: x\n"),
                ("To: a@x.y\nBcc: \"B\" <b@x.y>\nX: y\nBcc: c@x.y\n", "a@x.y b@x.y c@x.y h@x.y",
                 "Bcc: \"B\" <b@x.y>,\n c@x.y,\n h@x.y\nTo: a@x.y\nX: y\n"),
                # Addresses that the envelope does not name are removed, and stay readable.
                ("To: a@x.y, Other One <o@x.y>\n", "a@x.y",
                 "To: a@x.y\nX-Original-To: Other One <o@x.y>\n"),
                ("Cc: o@x.y\nSubject: x\nTo: a@x.y\n", "a@x.y",
                 "X-Original-Cc: o@x.y\nSubject: x\nTo: a@x.y\n"),
                ("To: o@x.y\n", "a@x.y", "Bcc: a@x.y\nX-Original-To: o@x.y\n"),
                ("To: a@x.y\nBcc: o@x.y\n", "a@x.y", "To: a@x.y\n"),
                ("To: a@x.y\nBcc: o@x.y, b@x.y\n", "a@x.y b@x.y", "To: a@x.y\nBcc: b@x.y\n"),
                ("To: Team: a@x.y, o@x.y;\n", "a@x.y", "To: a@x.y\nX-Original-To: o@x.y\n"),
                ("to: \"O, P\" <o@x.y>,\n  Ann\n <a@x.y>(x)\n", "a@x.y",
                 "to: Ann\n <a@x.y>(x)\nX-Original-to: \"O, P\" <o@x.y>\n"),
                # An ambiguous field names no recipient.
                *((f"To: {value}\n", "a@x.y", f"Bcc: a@x.y\nX-Original-To: {value}\n")
                  for value in (
                      "a@x.y b@x.y", "o@x.y <a@x.y>", "a@x.y (o@x.y)", "\"a@x.y", "<a@x.y",
                      "a@x.y\0", "[o@x.y] <a@x.y>", "[o@x.y]g:;", "a@x.y\u00a0", "g: a@x.y",
                      ":a@x.y;", "\"o@x.y\"] <a@x.y>", "\"Q\n <o@x.y>, q\" <a@x.y>",
                      "a@x.\n y", "a @x.y", "(Ann)", "(Ann) a@x.y", "a@x.y (a\n b)",
                      "a@x.y (A (n))", "Ann (x) <a@x.y>", "<@r.x,@s.y:a@x.y>", "G: a@x.y;, a@x.y",
                      "a@x.y, G: a@x.y;", ";", "G: a@x.y; H:;", "Gr\u00fcn: a@x.y;",
                      "A\\ <a@x.y>")),
                ("Bcc: a@x.y (\nCc: <a@x.y\n", "a@x.y", "Bcc: a@x.y\nX-Original-Cc: <a@x.y\n"),
                (" x\nTo: o@x.y\n", "a@x.y", " x\nBcc: a@x.y\nX-Original-To: o@x.y\n"),
                (" x\noops\nTo: a@x.y\n", "a@x.y", " x\nBcc: a@x.y\noops\nTo: a@x.y\n"),
                (" x\nX-A: y\n", "a@x.y", " x\nBcc: a@x.y\nX-A: y\n"),
                (" x\nFoo: y\n", "a@x.y", "Bcc: a@x.y\n\n x\nFoo: y\n"),
                ("To: \u212a@x.y\n", "k@x.y", "Bcc: k@x.y\nX-Original-To: \u212a@x.y\n"),
                ("To: =?utf-8?q?a?=@x.y\n", "=?utf-8?q?a?=@x.y",
                 "Bcc: =?utf-8?q?a?=@x.y\nX-Original-To: =?utf-8?q?a?=@x.y\n"),
                # Semicolons, as people type them; not every parser accepts them as separators.
                ("To: a@x.y; B <b@x.y>;\n", "a@x.y b@x.y", "To: a@x.y,\n B <b@x.y>\n"),
                ("To: Team: a@x.y; b@x.y;\n", "a@x.y b@x.y", "To: a@x.y,\n b@x.y\n"),
                # With a malformed line Bcc has all recipients; Resent-Bcc is always removed.
                ("To: a@x.y\nno field\nCc: b@x.y\n", "a@x.y b@x.y",
                 "Bcc: a@x.y,\n b@x.y\nTo: a@x.y\nno field\nCc: b@x.y\n"),
                ("To: a@x.y\nRESENT-BCC: h@x.y,\n o@x.y\nResent-To: r@x.y\n", "a@x.y",
                 "To: a@x.y\nResent-To: r@x.y\n"),
                ("To : a@x.y\n", "a@x.y", "Bcc: a@x.y\nTo : a@x.y\n"),
                ("To : o@x.y\n", "a@x.y", "Bcc: a@x.y\nX-Original-To: o@x.y\n"),
                ("no field\nBcc: a@x.y, o@x.y\n", "a@x.y", "Bcc: a@x.y\nno field\n"),
                ("To: a@x.y\nSubject: s\nno field\n", "a@x.y",
                 "To: a@x.y\nSubject: s\n\nno field\n"),
                # Field names that show that a malformed first line belongs to a header.
                *((f"oops\n{name}: x\n", "a@x.y", f"Bcc: a@x.y\n{more}oops\n{name}: x\n")
                  for more, names in (
                      ("", "Subject DATE Sender Message-ID Received Return-Path MIME-Version "
                           "Importance Priority Content-Type Resent-Date List-Id X-Mailer"),
                      ("\n", "Topic Subjects Importances Xa")) for name in names.split()),
                # Quoted local parts.
                ("To: \"a b\"@x.y\n", "\"a b\"@x.y", "To: \"a b\"@x.y\n"),
                ("To: \"a\\ b\"@x.y\n", "\"A b\"@x.y c@x.y", "Bcc: c@x.y\nTo: \"a\\ b\"@x.y\n"),
                ("Subject: x\n", "\u00fc@x.y", "Bcc: \u00fc@x.y\nSubject: x\n"),
                # A malformed line does not end the header; lines after the last field are text.
                ("oops\nTo: o@x.y\n", "a@x.y", "Bcc: a@x.y\noops\nX-Original-To: o@x.y\n"),
                ("To: o@x.y\nHello there\n", "a@x.y",
                 "Bcc: a@x.y\nX-Original-To: o@x.y\n\nHello there\n")):
            with self.subTest(header):
                outcome = deliver_to(header.replace("\n", "\r\n"),
                                     *re.findall(r'(?:"[^"]*"|[^ "])+', recipients))
                self.assertEqual(outcome.replace("\r\n", "\n"), wanted + "\nText\n")

    def test_random_headers_name_only_envelope_recipients(self) -> None:
        """Every parser finds exactly the envelope in To, Cc and Bcc; the rest stays."""
        people = ["a@x.y", "b@x.y", "\"q r\"@x.y", "A@X.Y", "o@x.y", "p@x.y"]
        forms = ["{}", "{}", "<{}>", "Ann <{}>", "\"N, m\" <{}>", "{} (c)", "{} <{}>",
                 "Ann\r\n <{}>", "N. M. < {} > (x y)", "=?utf-8?Q?o=40x=2Ey=2C?= <{}>",
                 "\"{}\" <{}>", "\udcff\u00fc <{}>", "\"a\\\"b\" <{}>", "G: {}, {};"]
        noise = [*people, *",;:<>()\"\\@[]. \0\udcff", "\r\n ", "<@r.x:",
                 "=?utf-8?Q?a=40b?=", "undisclosed-recipients:;"]
        edited = (b"to", b"cc", b"bcc")
        chance = random.Random(1123)
        for number in range(4000):
            header = ""
            for _ in range(chance.randrange(5)):
                words = chance.choice([", ", ";", ",\r\n ", ",,"]).join(
                    chance.choices(forms, k=chance.randrange(4)))
                for _ in range(chance.randrange(3)):
                    at = chance.randrange(len(words) + 1)
                    words = words[:at] + chance.choice(noise) + words[at:]
                words = re.sub("{}", lambda _: chance.choice(people), words)
                name = chance.choice(["To", "Cc", "Bcc", "BCC", "to ", "From", "Subject", "X-To"])
                header += chance.choice([f"{name}: {words}\r\n"] * 9 + ["junk\r\n"])
            envelope = chance.sample(people[:3], chance.randrange(1, 4))
            policy = chance.choice(["keep", "rewrite"])
            with self.subTest(number, header=header, envelope=envelope, policy=policy):
                sent = header.encode("utf-8", "surrogateescape") + b"\r\nTo: o@x.y\r\n"
                arrived = edit(sent, *envelope, FROM_MISMATCH=policy)
                self.assertTrue(arrived.endswith(b"\r\n\r\nTo: o@x.y\r\n"))
                wanted = {relay.normalize_mailbox(address) for address in envelope}
                result = relay.split_header(arrived)
                self.assertEqual({address.key for field in result.find(*edited)
                                  for address in relay._parse_addresses(field).addresses}, wanted)
                self.assertTrue(result.find(b"from"))
                for field in relay.split_header(sent).fields:
                    if field.name not in (*edited, b"from"):
                        self.assertIn(field.raw, arrived)
                # Two other parsers, which stop at malformed lines.
                self.assertEqual(set(map(relay.normalize_mailbox, named_by(arrived))), wanted)
                with contextlib.suppress(AttributeError, TypeError):    # bugs of Python's parser
                    parsed = email.message_from_bytes(arrived, policy=email.policy.default)
                    self.assertEqual({relay.normalize_mailbox(address.addr_spec)
                                      for name in ("to", "cc", "bcc")
                                      for value in parsed.get_all(name, [])
                                      for address in value.addresses}, wanted)

    def test_the_time_for_a_header_is_not_quadratic(self) -> None:
        def play(size: int, opening: str, shape: str) -> None:
            deliver_to(f"{opening}{shape * (size // len(shape))}\r\n", "a@x.y",
                       FROM_MISMATCH="rewrite")
        for shape in ("a@x.y, ", "(", "((a))", "\"", "[", "<", "a ", "\\", "\r\n ", ":;",
                      "x\r\n", "T: x\r\n", "G:a@x.y;", "\\\"", "\\[", "<@a", "@a,", ".", "@",
                      "a.", "\" \"", "To: a@x.y\r\n"):
            for opening in ("To: ", "To: <", "To: \"", "To: [", "To: (", "From: ", "From "):
                with self.subTest(opening + shape):
                    check_time(play, 4000, opening, shape)

    def test_a_header_of_more_than_10000_lines_is_refused(self) -> None:
        for line in ("To: a@x.y\r\n", "X-Y: y\r\n", " \r\n"):
            header = "To: a@x.y\r\n" + line * 9999
            self.assertEqual(deliver_to(header, "a@x.y"), f"{header}\r\nText\r\n")
            with self.assertRaisesRegex(relay.DeliveryError, "too many lines"):
                deliver_to(header + line, "a@x.y")

    def test_a_list_of_too_many_addresses_is_ambiguous(self) -> None:
        many = ",".join(f"u{number}@x.y" for number in range(40_000))
        self.assertEqual(deliver_to(f"To: {many}\r\n", "u1@x.y"),
                         f"Bcc: u1@x.y\r\nX-Original-To: {many}\r\n\r\nText\r\n")
        # In From such a list stays, but is not evaluated.
        header = f"From: {', '.join([SENDER] * 14_000)}\r\nTo: a@x.y\r\n\r\n".encode()
        self.assertEqual(edit(header, "a@x.y"), header)


class CorpusTests(unittest.TestCase):
    """Messages arrive byte for byte as they were sent, except for the documented edits."""

    def test_messages_arrive_unchanged_except_for_the_edits(self) -> None:
        for setting, cases in CORPUS.items():
            name, _, value = setting.partition("=")
            with alone(**({name: value} if name else {})) as (fake, client):
                client.log_in()
                for case in cases:
                    with self.subTest(setting, case=case.name):
                        self.check(fake, client, case)
                self.assertEqual(fake.complaints, [])

    def check(self, fake: FakeMicrosoft, client: Client, case: Case) -> None:
        """Send a message and compare it with the message that arrives."""
        fake.delivered.clear()
        recipients = re.findall(r'(?:"[^"]*"|[^ "])+', case.to)
        reply = client.post_octets(crlf(case.sent), case.sender, recipients)
        if isinstance(case.wanted, str) and case.wanted[:1] in ("4", "5"):
            self.assertTrue(reply.startswith(case.wanted + " "), reply)
            self.assertEqual(fake.delivered, [])
            return
        self.assertTrue(reply.startswith("250 2.0.0 "), reply)
        delivered, = fake.delivered
        self.assertEqual(delivered.message, crlf(case.wanted or case.sent))
        self.assertEqual(delivered.mailbox, case.mailbox)
        if re.fullmatch("[ -!#-~]+", case.to) and not case.name.startswith("others,"):
            # The standard library reads the same recipients, if it can read the header.
            self.assertEqual(set(delivered.recipients), set(recipients))


class FidelityTests(RelayCase):
    """Edits keep what Exchange and signatures require."""

    def test_soft_line_breaks_with_a_bare_lf_are_repaired(self) -> None:
        """Exchange knows soft line breaks with CRLF only, and loses text at others."""
        text = "The cen\u00fcter of a very long line. " * 20
        encoded = quopri.encodestring(text.encode())
        self.assertNotIn(b"\r", encoded)                # Python writes bare LF
        damaged = NAMED.encode() + b"Content-Transfer-Encoding: quoted-printable\n\n" + encoded
        self.assertNotEqual(as_exchange_decodes(encoded), text.encode())
        self.assertReply(self.logged_in().post_octets(damaged + b"\r\n", SENDER, ["a@x.y"]),
                         "250 2.0.0")
        body = self.fake.delivered[0].message.partition(b"\r\n\r\n")[2]
        self.assertEqual(as_exchange_decodes(body), text.encode() + b"\r\n")

    def test_reply_to_never_names_the_login_of_a_device(self) -> None:
        login = f"{USER}.Printers.com"
        with alone(FROM_MISMATCH="rewrite") as (fake, client):
            self.assertReply(client.log_in(login), "235 2.7.0")
            message = crlf(f"From: S <{login.lower()}>\nTo: a@x.y\n\n")
            self.assertReply(client.post_octets(message, SENDER, ["a@x.y"]), "250 2.0.0")
            self.assertEqual(fake.delivered[0].message, crlf(f"From: S <{SENDER}>\nTo: a@x.y\n\n"))

    @unittest.skipUnless(shutil.which("openssl"), "needs the openssl command")
    def test_signatures_stay_valid(self) -> None:
        def openssl(*arguments: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(["openssl", *arguments], input=data, timeout=PATIENCE,
                                  capture_output=True)
        text = crlf(multipart("mixed", "Content-Type: text/plain; charset=iso-8859-1\n"
                              "Content-Transfer-Encoding: 8bit\n\n\udcfc trailing \t\n.\n", PDF))
        for command in ("smime", "cms"):
            with self.subTest(command):
                signed = openssl(command, "-sign", "-signer", FILES["cert.pem"], "-inkey",
                                 FILES["key.pem"], data=text).stdout
                self.assertIn(b"multipart/signed", signed)
                for head in (b"To: o@x.y, a@x.y\r\nCc: p@x.y\r\n", b"From: o@x.y <a@b>\r\n", b""):
                    self.fake.reset()
                    client = self.logged_in()
                    self.assertReply(client.post_octets(head + crlf(signed), SENDER,
                                                        ["a@x.y", "h@x.y"]), "250 2.0.0")
                    delivered = self.fake.delivered[0].message
                    self.assertNotIn(b"\r\nTo: o@x.y", delivered)
                    check = openssl(command, "-verify", "-CAfile", FILES["ca.pem"], "-purpose",
                                    "any", data=delivered)
                    self.assertEqual((check.returncode, check.stdout), (0, text), check.stderr)
                    broken = delivered.replace(b"trailing", b"Trailing")
                    self.assertNotEqual(openssl(command, "-verify", "-CAfile", FILES["ca.pem"],
                                                "-purpose", "any", data=broken).returncode, 0)


class DraftTests(unittest.TestCase):
    """A message becomes a draft without loss, or it is refused."""

    def test_mime_parts_become_a_body_and_attachments(self) -> None:
        def shape(draft: relay.Draft) -> tuple[Any, ...]:
            body = json.loads(draft.content)["body"]
            return (body["contentType"], body["content"].strip(),
                    *(f"{file.name} {file.part.media_type} {content_of(file)!r} {file.content_id}"
                      for file in draft.attachments))
        pdf, logo = "scan.pdf application/pdf b'%PDF-1' ", "b'\\x89PNG' Logo@x.y"
        html = '<p>Hello <img src="cid:logo@x.y"></p>'
        for message, wanted in (
                ("\nHello\n", ("Text", "Hello")),
                ("", ("Text", "")),
                (HTML, ("HTML", html)),
                (PDF, ("Text", "", pdf)),
                (multipart("mixed", PLAIN, PDF), ("Text", "Hello", pdf)),
                (multipart("mixed", PDF, PLAIN), ("Text", "Hello", pdf)),
                (multipart("mixed", "\nno header\n", PDF), ("Text", "no header", pdf)),
                (multipart("alternative", PLAIN, HTML), ("HTML", html)),
                (multipart("alternative", HTML, PLAIN), ("HTML", html)),
                (multipart("related", HTML, IMAGE.replace("<Logo@x.y>", "< Logo@x.y >")),
                 ("HTML", html, f"ATT00001.png image/png {logo}")),
                (multipart("alternative", PLAIN, PLAIN.replace("Hello", "Better")),
                 ("Text", "Better")),
                (multipart("mixed", multipart("alternative", PLAIN, multipart(
                    "related", HTML, IMAGE)), PDF),
                 ("HTML", html, f"ATT00001.png image/png {logo}", pdf)),
                (multipart("alternative", PLAIN, "Content-Type: text/x-amp-html\n\nx\n", HTML,
                           "Content-Type: text/csv; name=a.csv\n\nx\n"),
                 ("HTML", html, "a.csv text/csv b'x\\r\\n' ")),
                # An image that the text does not reference is not inline, which would hide it.
                (multipart("mixed", PLAIN, IMAGE),
                 ("Text", "Hello", "ATT00001.png image/png b'\\x89PNG' ")),
                # Apple Mail: text, file, text. All of it arrives.
                (multipart("alternative", PLAIN, multipart("mixed", HTML, PDF, HTML)),
                 ("HTML", html, pdf, f"ATT00002.html text/html {crlf(html + chr(10))!r} ")),
                (multipart("mixed", PLAIN, HTML),
                 ("Text", "Hello", f"ATT00001.html text/html {crlf(html + chr(10))!r} ")),
                # Text with the disposition or the name of a file is an attachment.
                (multipart("mixed", "Content-Disposition: attachment\n\nlog\n", PLAIN),
                 ("Text", "Hello", "ATT00001.txt text/plain b'log\\r\\n' ")),
                (multipart("mixed", "Content-Type: text/plain; name=a.txt\n\nlog\n"),
                 ("Text", "", "a.txt text/plain b'log\\r\\n' ")),
                # A forwarded message stays whole.
                (multipart("mixed", PLAIN, "Content-Type: message/rfc822\n\n" + PLAIN),
                 ("Text", "Hello", "ATT00001.eml message/rfc822 b'Content-Type: text/plain; "
                                   "charset=utf-8\\r\\n\\r\\nHello\\r\\n' ")),
                # A malformed media type is text.
                ("Content-Type: text\n\nHello\n", ("Text", "Hello")),
                ("Content-Type: text / HTML\n\nHello\n", ("HTML", "Hello")),
                ("Content-Type: multipart\n\nHello\n", ("Text", "Hello")),
                # A signed file is an attachment. Blank text is left out.
                *((multipart("mixed", "\n" + " \n" * 300, HTML, f"Content-Type: {mime}\n"
                             "Content-Disposition: attachment; filename=a.xml.p7m\n\nx\n"),
                   ("HTML", html, f"a.xml.p7m {mime} b'x\\r\\n' "))
                  for mime in ("application/pkcs7-mime", "application/x-pkcs7-mime")),
                # An invitation with the disposition of a file is an attachment.
                (multipart("mixed", PLAIN, "Content-Type: text/calendar\nContent-Disposition: "
                           "attachment; filename=a.ics\n\nBEGIN\n"),
                 ("Text", "Hello", "a.ics text/calendar b'BEGIN\\r\\n' ")),
                # Unknown multiparts count as mixed, RFC 2046 section 5.1.3.
                (multipart("x-odd", PLAIN, PDF), ("Text", "Hello", pdf)),
                ("Content-Type: nonsense\nContent-Transfer-Encoding: base64\n\nJVBERi0x\n",
                 ("Text", "", "ATT00001.bin application/octet-stream b'%PDF-1' ")),
                ("CONTENT-TYPE: TEXT/HTML; CHARSET=\"UTF-8\"\n\n<b>\n", ("HTML", "<b>"))):
            with self.subTest(message):
                self.assertEqual(shape(draft_of(message.encode())), wanted)

    def test_parts_are_split_at_boundaries(self) -> None:
        """RFC 2046 section 5.1.1, and how malformed multiparts are read."""
        head = b"Content-Type: multipart/mixed; boundary=\"b c\"\n\n"
        for body, wanted in (
                (b"--b c\n\none\n--b c\n\ntwo\n--b c--\n", [b"one", b"two"]),
                (b"preamble\n--b c\n\none\n--b c--\nepilogue\n--b c\n\nno\n", [b"one"]),
                (b"--b c \t\n\none\n--b c--  \n", [b"one"]),
                # A delimiter must be alone on its line.
                (b"--b c\n\none --b c\n --b c\n--b cd\n--b c-\n--b c--\n",
                 [b"one --b c\r\n --b c\r\n--b cd\r\n--b c-"]),
                # The last delimiter is missing.
                (b"--b c\n\none\n--b c\n\ntwo\n", [b"one", b"two\r\n"]),
                (b"--b c\n\none\n--b c", [b"one"]),
                # The CRLF before a delimiter belongs to it; blank parts are left out.
                (b"--b c\n\none\n\n--b c\n--b c\n\n\n--b c--", [b"one\r\n"]),
                # A header without an empty line after it, and text without a header.
                (b"--b c\nX-A: y\n--b c\n\none\n--b c--", [b"one"]),
                (b"--b c\njust text\n--b c--", [b"just text"]),
                (b"--b c\nX-A: y\nhalf", [b"half"]), (b"--b c\n", [b""]),
                # The delimiters of an inner multipart count only within it.
                (b"--b c\nContent-Type: multipart/mixed; boundary=i\n\n--i\n\none\n--b c\n\n"
                 b"--i\ntwo\n--b c--", [b"one", b"--i\r\ntwo"]),
                (b"--b c\nContent-Type: multipart/mixed; boundary=i\n\n--i\nX-A: y\n--b c--",
                 [b"X-A: y"]),
                (b"--b c\nContent-Type: multipart/mixed; boundary=\"b cd\"\n\n--b cd\n\none\n"
                 b"--b cd--\n--b c--\n", [b"one"])):
            with self.subTest(body):
                draft = draft_of(head + body)
                texts = [json.loads(draft.content)["body"]["content"].encode(),
                         *map(content_of, draft.attachments)]
                self.assertEqual(texts, wanted)

    def test_attachment_names_are_decoded(self) -> None:
        for parameters, wanted in (
                *((f"filename={value}", wanted) for value, wanted in (
                    ("\"a b.pdf\"", "a b.pdf"), ("\"\u00fc.pdf\"", "\u00fc.pdf"),
                    ("x" * 300 + ".pdf", "x" * 251 + ".pdf"),
                    ("\"C:\\\\scan\\\\a.pdf\"", "C:\\scan\\a.pdf"),
                    ("\"x_.pdf\"; filename*=utf-8''x%e2%82%ac.pdf", "x\u20ac.pdf"),
                    ('""\nContent-Type: x/y; name=a.b', "a.b"), ('"\udcfc.pdf"', "\u00fc.pdf"),
                    # RFC 2047 does not allow encoded words here, but they are common.
                    ("\"=?utf-8?B?w7wucGRm?=\"", "\u00fc.pdf"),
                    ("=?utf-8?B?w7w=?=.tif", "\u00fc.tif"), ('"=?utf-8?q?_a.pdf_?="', "a.pdf"),
                    ("\"\u20ac =?utf-8?Q?=C3?= =?utf-8?Q?=BC?= C:\\users\"",
                     "\u20ac \u00fc C:\\users"))),
                ("filename*=UTF-8''%c3%bc%20b.pdf", "\u00fc b.pdf"),
                ("\n filename*0*=iso-8859-1'de'%fc;\n filename*1=b.pdf", "\u00fcb.pdf"),
                ("x=y\nContent-Type: x/y; name=\"=?iso-8859-1?Q?=FC=2Epdf?=\"", "\u00fc.pdf"),
                ("filename*=utf-8''a%0d%0ab%00.pdf", "a__b_.pdf"),
                ("x=y", "ATT00001.txt"), ("filename*=no-such-charset''%ff", "\u00ff"),
                # Malformed parameters: any name is right.
                *((nonsense, None) for nonsense in (
                    "filename*=utf-7''+2AA-.pdf", "x\nContent-Type: x/y; name*=utf-8''x; name*0=y",
                    "filename*" + "9" * 4000 + "*=x", "filename*=a%00b''%ff",
                    "filename==?x?b?=?="))):
            with self.subTest(parameters):
                message = multipart("mixed", PLAIN, "Content-Disposition: attachment; "
                                                    f"{parameters}\n\nx\n")
                attachment, = draft_of(message.encode("utf-8", "surrogateescape")).attachments
                self.assertIn(wanted, (attachment.name, None))
                json.loads(attachment.as_json())

    def test_images_that_the_text_references_are_inline(self) -> None:
        for text, content_id, wanted in (
                ("<img src='cid:a'>", "a", True), ("<img src=CID:A>", "a", True),
                ("'cid:a b.png'", "a b.png", True), ("'cid:logo(1).png'", "logo(1).png", True),
                ("url(&quot;cid:a&quot;)", "a", True), ("url(cid:a)", "a", True),
                ("<img src=cid:a alt=b>", "a", True), ("'cid:B\u00dcRO@x'", "b\u00dcro@x", True),
                ("cid:ab", "a", False), ("cid:a@x.y", "a", False), ("cid:b", "a", False),
                ("cid:ab cid:a", "a", True), ("the cid: a", "a", False), ("cid:", "", False)):
            with self.subTest(text, content_id=content_id):
                message = multipart("related", f"Content-Type: text/html\n\n{text}\n",
                                    f"Content-Type: image/png\nContent-ID: <{content_id}>\n\nx\n")
                attachment, = draft_of(message.encode()).attachments
                self.assertEqual(attachment.content_id, content_id * wanted)
                self.assertEqual("isInline" in attachment.properties(), wanted)

    def test_encoded_words_inject_no_line_breaks(self) -> None:
        """Exchange might read the text after an encoded line break as a header field."""
        evil = "=?utf-8?q?a=0D=0ABcc:_evil=40x.y=00?="
        draft = draft_of(f"From: {evil} <{SENDER}>\nSubject: {evil}\nX-A: {evil}\nMessage-ID: "
                         f"<\0{evil}>\nTo: {evil} <o@x.y>\nReply-To: {evil} <r@x.y>\n\n"
                         .encode())
        text = draft.content.decode()
        for escape in ("\\n", "\\r", "\\u0000"):
            self.assertNotIn(escape, text.replace('"content": ""', ""))
        self.assertIn("a  Bcc: evil@x.y", text)

    def test_a_header_that_grows_over_1_mib_is_refused(self) -> None:
        head = f"From: {SENDER}\r\nTo: b@x.y\r\nX-A: "
        for size, *recipients in ((1_048_576, "b@x.y"), (1_048_564, "b@x.y", "c@x.y")):
            header = head + "x" * (size - len(head) - 2)
            draft_of(f"{header}\r\n\r\n".encode(), *recipients)
            with self.assertRaises(relay.DeliveryError):
                draft_of(f"{header}x\r\n\r\n".encode(), *recipients)
        with self.assertRaises(relay.DeliveryError):    # perhaps a header field
            draft_of(multipart("mixed", PLAIN, "x" * 1_048_577).encode())

    def test_a_message_that_the_edits_make_too_large_is_refused(self) -> None:
        config = make_config(LARGE_MESSAGES="refuse")
        message = bytearray(crlf(NAMED + "\n").ljust(3_145_728, b"x"))
        envelope = relay.Envelope(SENDER, {"a@x.y": "a@x.y"}, message)
        self.assertIsNone(relay.prepare_message(envelope, TEST_PRINCIPAL, config).draft)
        envelope.recipients["b@x.y"] = "b@x.y"
        with self.assertRaisesRegex(relay.DeliveryError, "LARGE_MESSAGES=refuse") as caught:
            relay.prepare_message(envelope, TEST_PRINCIPAL, config)
        self.assertTrue(str(caught.exception.reply).startswith("552 5.3.4 "))

    def test_a_draft_with_more_recipients_than_can_be_read_is_refused(self) -> None:
        recipients = [f"{'x' * 300}{number}@x.y" for number in range(900)]
        with self.assertRaisesRegex(relay.NotConvertible, "has too many recipients"):
            draft_of(b"Subject: s\n\nText", *recipients)
        self.assertIn(b"x899@x.y", draft_of(b"Subject: s\n\nText",
                                            *recipients[:700], recipients[-1]).content)

    def test_transfer_encodings_are_decoded_or_refused(self) -> None:
        for encoding, text, wanted in (
                ("base64", b"QUJD\r\nRA==", b"ABCD"), ("BASE64", b"QUJD\r\nRA=", b"ABCD"),
                ("base64", b"QUJDRA", b"ABCD"), ("base64", b"Q U-J*D\r\n\r\nRA==\r\n..", b"ABCD"),
                ("base64", b"", b""), ("base64 (x)", b"QQ==", b"A"), ("", b"=41", b"=41"),
                ("quoted-printable", b"=41b=\r\nc\r\n=C3=BC", b"Abc\r\n\xc3\xbc"),
                ("Quoted-Printable", b"=4 =zz", b"=4 =zz"), ("8bit", b"\xfc\0", b"\xfc\0"),
                ("7bit", b"=41", b"=41"), ("binary", b"x", b"x"),
                # Encodings that parsers read differently are refused.
                ("base64", b"QQ==QQ==", None), ("base64", b"QQ=\r\n=QQ==", None),
                ("base64", b"QQ==" + b"\n" * 4_100_000 + b"QQ==", None),     # in three slices
                ("base64", b"QUJDR", None), ("x-uuencode", b"begin 644", None)):
            with self.subTest(encoding, text=text):
                message = (b"Content-Disposition: attachment\nContent-Transfer-Encoding: "
                           + encoding.encode() + b"\n\n" + text)
                if wanted is None:
                    with self.assertRaises(relay.NotConvertible):
                        draft_of(message)
                else:
                    attachment, = draft_of(message).attachments
                    self.assertEqual(content_of(attachment), wanted)

    def test_decoded_chunks_are_below_4_mb_and_split_no_byte(self) -> None:
        chance = random.Random(7)
        scan = bytes(chance.getrandbits(8) for _ in range(100_000)) * 80
        one_line = base64.b64encode(scan)
        for encoding, text in (
                ("base64", base64.encodebytes(scan)), ("base64", one_line),
                ("base64", one_line[:5] + b"\n" * 4_000_000 + one_line[5:]),
                ("quoted-printable", (b"=%02X" * 26 % tuple(range(26)) + b"=\n") * 100_000),
                *(("quoted-printable", b"a" * more + b"=41" * 1_400_000) for more in (0, 1, 2)),
                ("8bit", b"x" * 8_000_001), ("binary", b"line\n" * 1_500_000)):
            with self.subTest(encoding, text=text[:20]):
                message = (f"Content-Type: x/y\nContent-Transfer-Encoding: {encoding}\n\n"
                           .encode() + text)
                attachment, = draft_of(message).attachments
                chunks = list(attachment.part.iter_decoded())
                self.assertLess(max(map(len, chunks)), 4_000_000)
                self.assertGreater(len(chunks), 1)
                text = text.replace(b"\n", b"\r\n")
                wanted = (scan if encoding == "base64" else text if "bi" in encoding
                          else quopri.decodestring(text))
                self.assertEqual(b"".join(chunks), wanted)
                self.assertEqual(attachment.size, len(wanted))

    def test_header_fields_become_properties(self) -> None:
        draft = draft_of(
            b"From: =?utf-8?Q?J=C3=B6rg?= <scanner@example.com>\nSubject: =?utf-8?B?w7w=?=\n"
            b" =?utf-8?B?w7w=?= scan\nTo: \"A, \\\"B\" <a@x.y>, b@x.y (Bob), o@x.y\n"
            b"Cc: Team: c@x.y;\n"
            b"Reply-To: =?utf-8?Q?=C3=BC?= <r@x.y>, s@x.y\nMessage-ID: <id@x.y>\nX-One: 1\n"
            b"Importance: High\nX-Two: =?utf-8?Q?=C3=BC?=\nX-Empty:\nx-three: 3\n folded\n"
            b"X-Ms-Exchange-Organization: no\nX-One: again\nX-4: 4\nX-5: 5\nX-6: 6\n\nText\n"
, "a@x.y", "b@x.y", "c@x.y", "h@x.y")
        self.assertEqual(json.loads(draft.content), {
            "subject": "\u00fc\u00fc scan",
            "from": {"emailAddress": {"address": SENDER, "name": "J\u00f6rg"}},
            "toRecipients": [{"emailAddress": {"address": "a@x.y", "name": "A, \"B"}},
                             {"emailAddress": {"address": "b@x.y", "name": "Bob"}}],
            "ccRecipients": [{"emailAddress": {"address": "c@x.y"}}],
            "bccRecipients": [{"emailAddress": {"address": "h@x.y"}}],
            "replyTo": [{"emailAddress": {"address": "r@x.y", "name": "\u00fc"}},
                        {"emailAddress": {"address": "s@x.y"}}],
            "importance": "high", "internetMessageId": "<id@x.y>",
            "internetMessageHeaders": [
                {"name": "X-Original-To", "value": "o@x.y"}, {"name": "X-One", "value": "1"},
                {"name": "X-Two", "value": "\u00fc"}, {"name": "x-three", "value": "3 folded"},
                {"name": "X-4", "value": "4"}],
            "body": {"contentType": "Text", "content": "Text\r\n"}})
        self.assertEqual(draft.attachments, [])
        # Missing fields are left out.
        self.assertEqual(set(json.loads(draft_of(b"\nText\n").content)),
                         {"from", "bccRecipients", "body"})
        for field, wanted in (
                ("X-Priority: 1\nImportance: low", "low"), ("X-Priority: 1 (Highest)", "high"),
                ("X-Priority: 2 (High)", "high"), ("Importance: normal", "normal"),
                ("X-Priority: 4", "low"), ("X-Priority: 5 (Lowest)", "low"),
                ("X-Priority: 3", None), ("Priority: urgent", "high"),
                ("Priority: non-urgent", "low"), ("Importance: odd", None),
                ("X-MSMail-Priority: High", "high")):
            content = json.loads(draft_of(f"{field}\n\n".encode()).content)
            self.assertEqual(content.get("importance"), wanted, field)
        content = json.loads(draft_of(b"Subject: =?utf-8?q?_s=0D?=\nTo: A <a@x.y> (x)\nReply-To: "
                                      + b"a@b.c," * 50_000 + b"\n\n").content)
        self.assertNotIn("replyTo", content)
        self.assertEqual((content["subject"], content["toRecipients"]), (
            "s", [{"emailAddress": {"address": "a@x.y", "name": "A"}}]))
        # Too many encoded words stay undecoded because decoding is slow.
        for count, wanted in ((500, "x" * 500), (501, ("=?utf-8?q?x?= " * 501).strip())):
            draft = draft_of(b"Subject: " + b"=?utf-8?q?x?= " * count + b"\n\n")
            self.assertEqual(json.loads(draft.content)["subject"], wanted)
        draft_of(b"Subject: =?utf-7?q?+2AA-?=\n\n")      # decodes to a surrogate

    def test_body_text_is_decoded_from_its_charset(self) -> None:
        for head, text, wanted in (
                ("", "\u00fc".encode(), "\u00fc"), ("", b"\xfc \x80", "\u00fc \u20ac"),
                # An unknown encoding.
                ("\nContent-Transfer-Encoding: 8 bit", b"=41", "=41"),
                ("\nContent-Transfer-Encoding: x-uuencode", b"x", "x"),
                ("\nContent-Transfer-Encoding: \"base64\"", b"QQ==", "A"),
                *((f"; charset={charset}", text, wanted) for charset, text, wanted in (
                    # Most of these are unknown; the last two would take quadratic time.
                    *((charset, b"\xfc", "\u00fc") for charset in (
                        "iso-8859-1", "us-ascii", "utf8", '"a\0b"', "no-such", "undefined",
                        "unicode:escape", "hex", "x" * 9000, "punycode", "idna")),
                    *((charset, b"\x80", "\u20ac") for charset in ("latin-1", "L1")),
                    *((charset, b"plain", "plain") for charset in ("utf-16", "utf-32")),
                    *((charset, b"x", "x") for charset in ("no-such", "zlib")),
                    ("iso-8859-1", "\u0141".encode(), "\u0141"),
                    ("utf-16", "\u00fc".encode("utf-16"), "\u00fc"),
                    ("utf-16", "\u00fc".encode("utf-16") + b"x", "\u00fc\ufffd"),
                    # Text labeled as UTF-8 that is not UTF-8, or has an error.
                    *(("utf-8", text, "\u00fc\ufffd")
                      for text in (b"\xfc\x81", b"\xc3\xbc\xff")),
                    ("iso-8859-1", b"\x80 \x93x\x94", "\u20ac \u201cx\u201d"),
                    ("gb2312", "\u6731\u9555\u57fa".encode("gbk"), "\u6731\u9555\u57fa"),
                    ("Shift_JIS", "\u2460".encode("cp932"), "\u2460"),
                    ("koi8-r", b"\xf0\xd2", "\u041f\u0440"),
                    ("utf-7", b"1+1=2, +49", "1+1=2, +49"),
                    # A character unknown to Python; the rest must not become escapes.
                    ("iso-2022-jp", b"\x1b$B%F%9%H-!\x1b(B", "\u30c6\u30b9\u30c8\ufffd")))):
            with self.subTest(head, text=text):
                message = f"Content-Type: text/plain{head}\n\n".encode() + text
                self.assertEqual(json.loads(draft_of(message).content)["body"]["content"], wanted)
        # The header field overrides <meta>. After 1,024 bytes <meta> is ignored.
        meta, cyrillic = b"<meta charset=windows-1251>", "\u041f"
        for head, text, wanted in (
                ("html", meta + b"\xcf", cyrillic), ("html", b" " * 1024 + meta + b"\xfc", "\xfc"),
                ("html", b"<META content='text/html; charset=\"Windows-1251\"'>\xcf", cyrillic),
                ("html; charset=utf-8", meta + b"\xc3\xbc", "\u00fc"),
                *((f"plain; charset={charset}", ("x" * size).encode(charset), "x" * size)
                  for charset, size in (("utf-16", 2_200_000), ("utf-32", 1_000_000)))):
            draft = draft_of(f"Content-Type: text/{head}\n\n".encode() + text)
            content = json.loads(draft.content)["body"]["content"]
            self.assertEqual(content.rpartition(">")[2].strip(), wanted)

    def test_messages_that_a_draft_cannot_hold_are_refused_with_the_reason(self) -> None:
        deepest = PLAIN
        for _ in range(10):
            deepest = multipart("mixed", deepest)
        deep = multipart("mixed", deepest)
        for message, word in (
                (multipart("signed", PLAIN, PDF), "is signed"),
                (multipart("mixed", multipart("signed", PLAIN, PDF), PLAIN), "is signed"),
                (multipart("encrypted", PLAIN, PDF), "is encrypted"),
                *((f"Content-Type: {rest}\n\nx", "encrypted") for rest in (
                    "application/pkcs7-mime; name=smime.p7m",
                    "Application/X-PKCS7-MIME\nContent-Disposition: attachment",
                    "application/octet-stream; name=smime.P7Z")),
                (multipart("alternative", PLAIN, "Content-Type: text/calendar\n\nBEGIN"),
                 "calendar invitation"),
                (multipart("report", PLAIN, PDF), "report"), (multipart("digest", PLAIN), "digest"),
                (multipart("mixed", PLAIN, "Content-Type: text/calendar; method=REQUEST\nContent-"
                           "Disposition: attachment; filename=a.ics\n\nBEGIN"), "invitation"),
                (multipart("mixed", PLAIN, "Content-Type: text/calendar; name=a.ics\n\nBEGIN"),
                 "invitation"),
                (multipart("mixed", "Content-Type: application/pgp-encrypted\n\nx", PDF),
                 "encrypted"),
                ("Content-Type: message/partial; id=x\n\nx", "a part of another"),
                ("Content-Type: application/ms-tnef\n\nx", "Outlook"),
                ("Content-Type: multipart/mixed\n\n--b\n\nx", "told apart"),
                ("Content-Type: multipart/mixed; boundary=c\n\n--b\n\nx", "told apart"),
                *(("Content-Type: multipart/mixed; boundary=b\n\n" + body, "") for body in (
                    "--b\n" * 500_000, "--b x\n" * 500_000, "--" * 1_000_000,
                    "--b" + " " * 3_000_000)),
                (deep, "too many parts"), (multipart("mixed", *[PLAIN] * 251), "too many parts"),
                *((message, "text that is too large") for message in (
                    *("\n" + text for text in (
                        "x" * 4_194_304, "\u00fc" * 2_097_152, "x" * 12_582_913)),
                    "Content-Type: text/plain; charset=utf-7\n\n" + "+AGE-" * 1_700_000,
                    "Subject: x\n\n" + "\n" * 1_048_576))):
            with self.subTest(message[:70]), self.assertRaisesRegex(relay.NotConvertible,
                                                                    word) as caught:
                draft_of(message.encode())
        self.assertTrue(str(caught.exception.reply).startswith("552 5.3.4 "))
        room = 4_194_304 - len(draft_of(b"\n").content)
        with self.assertRaises(relay.NotConvertible):
            draft_of(b"\nx" + b"x" * room)
        # Messages exactly at the limits are accepted.
        for message in (multipart("mixed", *[PLAIN] * 250), deepest, "\n" + "x" * room):
            draft_of(message.encode())

    def test_from_and_reply_to_keep_their_display_names(self) -> None:
        for field, name in (("M\u00fcller, Hans <o@x.y>", "M\u00fcller, Hans"),
                            ("Doe, =?utf-8?q?J=C3=BC?= <o@x.y>", "Doe, J\u00fc"),
                            ("\"Long\n name\" <o@x.y>", "Long name"), ("o@x.y (Me)", "Me"),
                            ("a@x.y <o@x.y>", "a@x.y"), ("S (x) @office <o@x.y>", "S (x) @office")):
            draft = draft_of(f"From: {field}\nReply-To: {field}\n\n".encode())
            content = json.loads(draft.content)
            person = {"emailAddress": {"address": "o@x.y", "name": name}}
            self.assertEqual((content["from"], content["replyTo"]), (person, [person]))
        draft = draft_of(b"From: Scanner\nReply-To: Scanner\n\n")
        self.assertEqual(json.loads(draft.content)["from"], {"emailAddress": {"address": SENDER}})
        self.assertNotIn("replyTo", json.loads(draft.content))

    def test_the_time_for_a_draft_is_not_quadratic(self) -> None:
        outer = multipart("mixed", PLAIN, PDF)
        for make in (lambda size: outer.replace("Hello", "--i\n" + "x" * size).replace(
                         "text/plain", "multipart/mixed; boundary=i"),
                     lambda size: outer.replace("Content-Type", "X-A: " + "x" * size
                                                + "\nContent-Type"),
                     lambda size: f"Content-Type: text/plain; a=\"{';' * size}\n\n",
                     lambda size: "Content-Type: text/plain; charset=_punycode\n\n" + "x" * size,
                     lambda size: f"Subject: {'=?a?q?' * size}\nX-A: {'=?b?q?' * 400}?=\n\n",
                     lambda size: f"Subject: =?punycode?q?{'x' * size}?=\nX-A: =?utf-8?b?x?=\n\n",
                     lambda size: f"Reply-To: {'(' * size}, {'a@b.c,' * size}\n\n",
                     lambda size: f"From: {'=?a?q?b?= ' * (size // 10)}@ <{SENDER}>\n\n",
                     lambda size: "\n" + "x" * size):
            with self.subTest(make(10)):
                check_time(lambda size, make: draft_of(make(size).encode()), 20_000, make)

    def test_random_mime_is_converted_or_refused(self) -> None:
        """Each draft has valid JSON and only the recipient of the envelope."""
        lines = ["Content-Type: multipart/mixed; boundary=b\n", "Content-Type: text/html\n",
                 "Content-Type: multipart/alternative; boundary=c\n", "--b\n", "--b--\n",
                 "--c\n", "--c--\n", "\n", "\n", "text\n", "Content-Type: x/y; name=a\n",
                 "Content-Transfer-Encoding: base64\n", "QUJD\n", "Content-Type: text/plain\n",
                 "Content-Transfer-Encoding: quoted-printable\n", "=41=\n", "junk\n", " f\n",
                 "Content-Disposition: attachment; filename*0*=\n", "Content-ID: <x>\n",
                 "To: o@x.y\n", "From: \udcff <\n", "=?utf-8?q?=FF?=\n"]
        chance = random.Random(33)
        drafts = 0
        for number in range(3000):
            text = "".join(chance.choices(lines, k=chance.randrange(25)))
            message = text.encode("utf-8", "surrogateescape")
            with self.subTest(number, message=message):
                try:
                    draft = draft_of(message)
                except relay.NotConvertible:
                    continue
                drafts += 1
                content = json.loads(draft.content)
                self.assertEqual(content["bccRecipients"], [{"emailAddress": {"address": "a@x.y"}}])
                self.assertNotIn("toRecipients", content)
                for attachment in draft.attachments:
                    content_of(attachment)
                    json.loads(attachment.as_json())
        self.assertGreater(drafts, 700)


@unittest.skipUnless(pathlib.Path("/proc/self/status").exists(), "needs /proc")
class MemoryTests(unittest.TestCase):
    """A large message takes memory of at most 2.5 times its size, and frees it again."""

    def test_messages_of_25_and_35_mb_stay_within_the_memory_limit(self) -> None:
        fake = FakeMicrosoft()
        self.addCleanup(fake.close)
        text = "Content-Type: text/html; charset=utf-8\n\n\U0001f600" + "x" * 4_100_000 + "\n"
        for size, body in ((25, PLAIN), (35, text)):
            # base64 makes this `size` megabytes.
            file, data = scan(size * 756_000 - len(body) * 3 // 4)
            message = crlf(multipart("mixed", body, file, header=NAMED))
            port = free_port()
            # As in the Dockerfile; otherwise glibc keeps up to half of a message for reuse.
            with start_program(SMTP_PORT=str(port), AZURE_AUTHORITY_HOST=fake.url,
                               GRAPH_ENDPOINT=fake.url, TLS_SOURCE="off",
                               REQUIRE_TLS="false", LISTEN_ADDRESS="127.0.0.1",
                               MALLOC_MMAP_THRESHOLD_="1048576") as process:
                wait_for_line(process, "listening")
                with Client(port) as client:
                    client.ehlo()
                    client.log_in()
                    self.assertTrue(client.post().startswith("250"))
                    before = figures(process.pid)
                    client.sock.settimeout(5 * PATIENCE)        # 35 MB may take long
                    reply = client.post_octets(message, SENDER, ["a@x.y"])
                    self.assertTrue(reply.startswith("250 2.0.0 "), reply)
                    cost = (figures(process.pid)["most kB"] - before["most kB"]) * 1024
                    if platform.libc_ver()[0] == "glibc":
                        limit = before["kB"] + len(message) / 4096
                        wait_for(lambda: figures(process.pid)["kB"] < limit)    # noqa: B023
            self.assertTrue(fake.sent_drafts[-1].files[0][1] == data)
            self.assertGreater(len(message), size * 990_000)
            self.assertGreater(cost, len(message) * 0.9)        # the measurement works
            self.assertLess(cost, 2.5 * len(message))


class EntraAnswerTests(unittest.TestCase):
    """Token responses of Entra ID are read correctly; LoginTests has the errors."""

    def test_a_token_response_gives_the_token_and_its_lifetime(self) -> None:
        lifetimes: tuple[tuple[Any, float], ...] = (
            (3599, 3299), ("3599", 3299), (300, 0), (301, 1), (0, 0), (-5, 0), (None, 0),
            ("soon", 0), ([], 0), ("nan", 0), ("inf", 0), (10 ** 400, 0), (1e9, 86400))
        # App Service gives expires_on, IMDS gives both; both write numbers as strings.
        for expires_in, expires_on, lifetime in (
                *((expires_in, None, lifetime) for expires_in, lifetime in lifetimes),
                (None, "1600", 300), ("600", "9", 300)):
            with self.subTest(expires_in, expires_on=expires_on):
                self.assertEqual(relay.parse_token(response(200, {
                    "token_type": "Bearer", "access_token": "eyJ", "expires_in": expires_in,
                    "expires_on": expires_on}), "s", 1000.0), ("eyJ", lifetime))

    def test_the_secret_is_removed_from_the_text_of_an_error(self) -> None:
        with self.assertRaises(relay.AuthError) as caught:
            relay.parse_token(response(401, aadsts(7000215, "invalid_client",
                                                  "no hid den&, no hid+den%26!")), "hid den&", 0)
        self.assertNotIn("hid", repr(caught.exception.facts))


class GraphAnswerTests(unittest.TestCase):
    """Errors of Graph, and the replies they become; SendTests sends the whole TABLE."""

    TABLE = [(int(error[:3]), error[4:], wanted) for wanted, errors in {
        "550 5.7.1": "403 ErrorAccessDenied, 403 erroraccessdenied, 403 SomethingNew, 403",
        "550 5.7.60": "403 ErrorSendAsDenied",
        "550 5.1.8": "404 ErrorInvalidUser, 404 ResourceNotFound, 404 ErrorNonExistentMailbox, "
                     "404 MailboxNotEnabledForRESTAPI, 404 SomethingNew, 404, "
                     "400 MailboxNotHostedInExchangeOnline",
        "550 5.1.3": "400 ErrorInvalidRecipients",
        "552 5.3.4": "413, 413 RequestEntityTooLarge, 400 ErrorMessageSizeExceeded, "
                     "503 ErrorMessageSizeExceeded",
        "452 4.2.2": "403 ErrorQuotaExceeded, 507, 500 ErrorQuotaExceeded",
        "451 4.4.5": "429 ApplicationThrottled, 429 ErrorAccessDenied",
        "451 4.3.0": "500 ErrorInternalServerError, 500 ErrorAccessDenied, 502, "
                     "503 ErrorServerBusy, 504 UnknownError, 509, 599, 408, 408 RequestTimeout",
        "554 5.6.0": "400 ErrorMimeContentInvalidBase64String, 400, 405, 411, 415, 409 Odd",
        "554 5.3.0": "200, 201, 204, 302, 200 ErrorAccessDenied",
    }.items() for error in errors.split(", ")]

    def test_an_unreadable_error_body_leaves_the_status_to_decide(self) -> None:
        for body in (b"", b"null", b"5", b"[]", b'{"error": 5}', b'{"error": {"code": []}}',
                     b'{"error": {}}', b"\xff", b"[" * 100_000, b'{"error": {"code": "Err'):
            with self.subTest(body[:20]):
                self.assertEqual(relay.graph_error(response(403, body), SENDER).reply.status,
                                 "5.7.1")

    def test_retry_after_is_a_number_or_a_date_and_anything_else_is_ignored(self) -> None:
        now = 1_800_000_000.0
        for text, seconds in (
                ("0", 0), ("7", 7), (" 7 ", 7), ("2.128", 2.128),
                *((text, None) for text in (
                    "", "-1", "soon", "nan", "inf", "1e3", "\u0663", "9" * 20,
                    "Tue, 32 Foo 2026 10:00:00 GMT", "Mon, 01 Jan 99999 00:00:00 GMT")),
                *((email.utils.formatdate(now + seconds, usegmt=usegmt), max(0, seconds))
                  for seconds, usegmt in ((9, True), (-9, True), (9, False)))):
            with self.subTest(text):
                self.assertEqual(response(429, retry_after=text).retry_after(now), seconds)


class QueuedMessageTests(unittest.TestCase):
    """The state file of a queued message, its bounce, and its line in `spool list`."""

    def test_a_state_file_is_read_completely_or_refused(self) -> None:
        state = vars(make_message(recipients=["a@x.y", "\u00fc@x.y"], reason="a\nb\u00fc"))
        self.assertEqual(vars(relay.parse_queued_message(json.dumps(state).encode())), state)
        without = {name: state[name] for name in state if name != "mailbox"}
        for text in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, *(
                json.dumps(values).encode() for values in (without, *(
                    {**state, **change} for change in (
                        {"size": "15"}, {"size": True}, {"attempts": 1.0}, {"is_bounce": 0},
                        {"junk": 1}, {"recipients": "a@x.y"}, {"queued_at": None}))))):
            with self.subTest(text[-30:]), self.assertRaises(ValueError):
                relay.parse_queued_message(text)

    def test_the_backoff_doubles_up_to_its_maximum_and_varies_by_a_fifth(self) -> None:
        with patient_for(MIN_BACKOFF=60.0, MAX_BACKOFF=1800.0):
            for failures, wanted in ((1, 60), (2, 120), (3, 240), (6, 1800), (10_000, 1800)):
                delays = [relay.backoff(failures) / wanted for _ in range(200)]
                self.assertTrue(0.8 <= min(delays) < 0.9 and 1.1 < max(delays) <= 1.201, delays)

    def test_a_bounce_is_valid_whatever_the_message_contains(self) -> None:
        header = b"Subject: =?utf-8?Q?Sc=C3=A4n?=\r\n of today\r\nTo: a@x.y\r\n"
        message = make_message(recipients=["a@x.y", "\u00fc@x.y"], attempts=4,
                               reason="550 5.1.8 no mailbox \u2713")
        content = relay.make_bounce(message, header, "relay.test", "0a1b", 1_700_000_100.0)
        self.assertNotRegex(content, rb"(?<!\r)\n|\r(?!\n)")
        bounce: Any = email.message_from_bytes(content)
        self.assertEqual(
            [bounce[name] for name in ("From", "To", "Auto-Submitted", "Message-ID", "Date")],
            ["Mail relay <scanner@example.com>", "<boss@example.com>", "auto-replied",
             "<0a1b@relay.test>", "Tue, 14 Nov 2023 22:15:00 -0000"])
        self.assertEqual((bounce.get_content_type(), bounce.defects), ("text/plain", []))
        text = bounce.get_payload(decode=True).decode()
        for part in ("Subject:    Sc\u00e4n of today\r\nRecipient:  a@x.y\r\nRecipient:  "
                     "\u00fc@x.y\r\nReceived:   Tue, 14 Nov 2023 22:13:20 -0000\r\n",
                     "Attempts:   4\r\nReason:     550 5.1.8 no mailbox ?\r\nID:         8d6f"):
            self.assertIn(part, text)
        # The subject cannot be decoded; there are as many and as long lines as possible.
        message.recipients = [f"{chr(0x20ac) * 60}-{number}@example.com" for number in range(500)]
        message.reason *= 200
        header = b"Subject: =?utf-7?Q?+2AA-?=" + b"\r\n s" * 600 + b"\r\n"
        content = relay.make_bounce(message, header, "relay.test", "0a1b", 0.0)
        self.assertLessEqual(max(map(len, content.split(b"\r\n"))), 998)
        self.assertIn(b"Subject:    ? s s s", content)
        self.assertEqual(content.count(b"Recipient:"), 500)
        content = relay.make_bounce(make_message(), b"", "relay.test", "0a1b", 0.0)
        self.assertEqual(content.count(b"Subject:"), 1)

    def test_the_list_shows_only_the_facts_that_apply(self) -> None:
        for folder, values, word, is_there in (
                ("queue", {"account": "scanner8"}, "account=scanner8", True),
                ("queue", {}, "account", False), ("queue", {}, "bounce", False),
                ("queue", {"is_bounce": True}, "bounce=", True),
                ("queue", {"next_attempt_at": 4e9}, "next-attempt=2096-10-02T07:06:40Z", True),
                ("queue", {"next_attempt_at": 5.0}, "next-attempt", False),
                ("failed", {"next_attempt_at": 4e9}, "next-attempt", False)):
            line = relay.describe_message(pathlib.Path(folder, "8d6f.json"), make_message(**values))
            self.assertEqual(word in line, is_there, line)


class LogTests(unittest.TestCase):
    """Each event is one line, whatever its values contain."""

    def test_values_that_could_break_a_line_are_escaped_and_long_ones_cut(self) -> None:
        for value, wanted in (("plain@x.y", "plain@x.y"), ("a b", '"a b"'), ("", '""'),
                              ("a\r\nERROR b", '"a\\r\\nERROR b"'), ('a"b', '"a\\"b"'),
                              ("\x1b[1m", '"\\x1b[1m"'), ("\u202e\u00fc", '"\\u202e\\xfc"'),
                              ("\udcff", '"\\udcff"'), ("a=b", '"a=b"'), (5, "5"),
                              (0.12345, "0.123"), ("a\\b", '"a\\\\b"')):
            with self.subTest(value):
                self.assertEqual(relay.quote_value(value), wanted)
        self.assertLess(len(relay.quote_value("x" * 100_000)), 1100)

    def test_fields_follow_the_id_and_fields_without_a_value_are_omitted(self) -> None:
        with kept_log() as kept:
            relay.log_event(logging.INFO, "id", "sent", request_id="r", size=5, other=None)
        self.assertEqual(kept.lines, [("INFO", "id sent request-id=r size=5")])

    def test_a_full_stderr_pipe_blocks_nothing_and_the_exit_status_is_right(self) -> None:
        code = ("import smtp_oauth_relay as r, logging, sys\n"
                "r.LOG_QUEUE = 1000\n"
                "with r.logging_to_stderr('INFO'):\n"
                "    for n in range(3000): r.log_event(logging.INFO, 'id', 'x' * 50)\n"
                "    print('done', flush=True)\n    {}\n")
        with contextlib.ExitStack() as stack:
            for process, status in [(stack.enter_context(start_python("-c", code.format(end))),
                                     status) for end, status in (
                    ("", 0), ("sys.exit(0)", 0), ("1 / 0", 1), ("raise r.StartError", 1),
                    ("raise r.ConfigError", 2))]:
                with self.subTest(process.args):
                    self.assertEqual(process.stdout.readline(), "done\n")
                    self.assertEqual(process.wait(PATIENCE), status)

    def test_lines_are_complete_with_a_time_zone_and_lost_lines_are_counted(self) -> None:
        lines: queue.Queue[Any] = queue.Queue(2)
        handler = relay.LogQueue(lines)
        for number in range(4):
            handler.handle(logging.LogRecord("", 20, "", 1, "line %d", (number,), None))
        self.assertEqual(lines.get().getMessage(), "line 0")
        handler.handle(logging.LogRecord("", 20, "", 1, "100 %", None, None))
        self.assertEqual([lines.get().getMessage() for _ in range(2)],
                         ["line 1", "100 % (lines lost before this one: 2)"])
        self.addCleanup(setattr, relay.log, "propagate", relay.log.propagate)
        relay.log.propagate = True
        with contextlib.redirect_stderr(io.StringIO()) as err, relay.logging_to_stderr("INFO"):
            try:
                raise OSError("why")
            except OSError:
                relay.log.error("%s internal-error", "id", exc_info=True)
            relay.log_event(logging.INFO, "id", "last")
        relay.log.setLevel("DEBUG")
        when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"
        self.assertRegex(err.getvalue(), rf"\A{when} ERROR id internal-error\nTraceback (?s:.*)\n"
                                         rf"OSError: why\n{when} INFO id last\n\Z")
        self.assertEqual(err.getvalue().count("Traceback"), 1)


class ThreadTests(HangCase):
    """A call runs in an idle thread, or in a new one if no thread is idle."""

    def test_idle_threads_are_reused_and_end_after_a_timeout(self) -> None:
        gate, seen = threading.Event(), set()

        def call(number: int) -> int:
            seen.add(threading.get_ident())
            gate.wait(PATIENCE)
            return number

        async def play(numbers: range) -> bool:
            return await asyncio.gather(*[relay.run_in_thread(functools.partial(call, number))
                                          for number in numbers]) == [*numbers]
        with unittest.mock.patch.object(relay, "THREAD_IDLE_TIMEOUT", 0.2), \
                concurrent.futures.ThreadPoolExecutor(4) as loops:
            first = loops.submit(asyncio.run, play(range(50)))
            wait_for(lambda: len(seen) == 50)           # no call waits for another
            gate.set()
            rounds = [loops.submit(asyncio.run, play(range(10))) for _ in range(300)]
            self.assertTrue(all(result.result() for result in (first, *rounds)))
            self.assertLess(len(seen), 300)             # of 3,050 calls, 40 at once
            # The system reuses the number of a thread that has ended, so the name counts too.
            wait_for(lambda: not any(thread.name == "relay-call" and thread.ident in seen
                                     for thread in threading.enumerate()))


class HttpsTests(HangCase):
    """HTTPS to Microsoft: verified certificates, kept connections, and proxies."""

    @classmethod
    def setUpClass(cls) -> None:
        """Trust the CA of the tests with SSL_CERT_FILE, as an administrator does."""
        clean = {name: value for name, value in os.environ.items()
                 if name != "SSL_CERT_DIR" and "proxy" not in name.lower()}
        change = unittest.mock.patch.dict(
            os.environ, {**clean, "SSL_CERT_FILE": FILES["ca.pem"]}, clear=True)
        change.start()
        cls.addClassCleanup(change.stop)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(FILES["cert.pem"], FILES["key.pem"])
        cls.fake = FakeMicrosoft(context)
        cls.running = Running(cls.config(UPSTREAM_TIMEOUT="10"))

    def with_environ(self, variables: dict[str, str], **settings: str) -> Client:
        """Start a relay with these environment variables and connect to it."""
        change = unittest.mock.patch.dict(os.environ, variables)
        change.start()
        self.addCleanup(change.stop)
        running = Running(self.config(**{"UPSTREAM_TIMEOUT": "10", **settings}))
        self.addCleanup(running.stop)
        return self.connect(running)

    def test_messages_and_uploads_go_over_https_and_plain_http_is_refused(self) -> None:
        client = self.logged_in()
        for _ in range(3):
            self.assertReply(client.post(), "250 2.0.0")
        self.assertEqual(len({request.connection for request in self.fake.requests}), 1)
        # An upload goes to the host in the URL that Graph returns.
        self.assertReply(client.post_octets(LARGE, SENDER, ["a@x.y"]), "250 2.0.0")
        self.assertTrue(self.fake.sent_drafts[0].files[0][1] == SCAN_OCTETS)
        self.assertEqual({request.headers["host"].partition(":")[0]
                          for request in self.fake.asked("put")}, {"127.0.0.1"})
        # A plain http URL is refused if Graph is at an https URL, even for this machine.
        url = self.fake.url.replace("https:", "http:")
        self.fake.will("open", say(201, {"uploadUrl": f"{url}/upload/0?authtoken=a%2Fb"}))
        self.assertReply(client.post_octets(LARGE, SENDER, ["a@x.y"]), "451 4.4.1")
        self.assertEqual(len(self.fake.deleted), 1)

    def test_an_unreachable_service_defers_the_login_and_the_log_has_the_cause(self) -> None:
        proxy = Between(self, "")
        for variables, authority, problem in (
                ({"SSL_CERT_FILE": FILES["expired.pem"]}, self.fake.url,
                 "CERTIFICATE_VERIFY_FAILED"),
                ({}, f"http://127.0.0.1:{free_port()}", "refused"),
                ({"HTTPS_PROXY": f"127.0.0.1:{proxy.port}"},    # with a URL without a port
                 "https://login.microsoftonline.com", "407")):
            with self.subTest(problem), kept_log() as kept:
                client = self.with_environ(variables, AZURE_AUTHORITY_HOST=authority)
                self.assertReply(client.log_in(), "454 4.7.0")
                self.assertIn(problem, kept.find("auth")[0][1])
        self.assertEqual(self.fake.requests, [])
        self.assertEqual(proxy.asked, [("login.microsoftonline.com:443", "")])

    def test_a_url_without_a_port_has_the_default_port_of_its_scheme(self) -> None:
        requested = []

        def look_up(host: str, port: int, *_: Any) -> None:
            requested.append((host, port))
            raise socket.gaierror("unknown")
        for url, proxy, wanted in (
                ("https://graph.microsoft.com/v1.0", "", ("graph.microsoft.com", 443)),
                ("https://[2001:db8::1]/", "", ("2001:db8::1", 443)),
                ("http://near/x?y", "http://proxy", ("near", 80)),
                ("https://graph.microsoft.com", "http://proxy", ("proxy", 80))):
            with self.subTest(url, proxy=proxy), self.assertRaises(relay.UpstreamUnavailable), \
                    unittest.mock.patch.dict(os.environ, HTTPS_PROXY=proxy), \
                    unittest.mock.patch.object(socket, "getaddrinfo", look_up):
                asyncio.run(relay.HttpPool([url]).send(relay.HttpRequest("GET", url, {}),
                                                       time.monotonic() + PATIENCE))
            self.assertEqual(requested.pop(), wanted)

    def test_a_login_is_deferred_if_no_thread_can_be_started(self) -> None:
        start, client = threading.Thread.start, self.connect()

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "relay-call":
                raise RuntimeError("can't start new thread")
            start(thread)
        with unittest.mock.patch.object(threading.Thread, "start", refuse), \
                unittest.mock.patch.object(relay, "_idle_threads", threading.Semaphore(0)):
            self.assertReply(client.log_in(password=self.password), "454 4.7.0")
        self.assertReply(client.log_in(password=self.password), "235 2.7.0")

    def test_a_proxy_is_used_with_its_credentials_unless_no_proxy_excludes_the_host(self) -> None:
        proxy = Between(self, "")
        for name, user, wanted in (("HTTPS_PROXY", "me:p%40ss", b"me:p@ss"),
                                   ("https_proxy", "me", b"me:")):
            with self.subTest(name):
                client = self.with_environ({
                    "HTTPS_PROXY": "", name: f"http://{user}@127.0.0.1:{proxy.port}"})
                self.assertReply(client.log_in(), "235 2.7.0")
                self.assertReply(client.post(), "250 2.0.0")
                self.assertEqual(proxy.asked.pop(), (
                    self.fake.url.partition("//")[2],
                    f"Basic {base64.b64encode(wanted).decode()}"))
                self.assertEqual(proxy.asked, [])       # the connection was reused
        # A host in NO_PROXY is reached directly.
        dead = "http://127.0.0.1:9"
        client = self.with_environ({"HTTPS_PROXY": dead,
                                    "NO_PROXY": self.fake.url.partition("//")[2]})
        self.assertReply(client.log_in(), "235 2.7.0")
        # A plain http URL of this machine is reached directly.
        with alone() as (fake, _):
            client = self.with_environ({"http_proxy": dead, "https_proxy": dead, "NO_PROXY": ""},
                                       AZURE_AUTHORITY_HOST=fake.url)
            self.assertReply(client.log_in(), "235 2.7.0")

    def test_a_connect_a_handshake_or_a_proxy_that_hangs_ends_at_the_deadline(self) -> None:
        port, begun = int(self.fake.url.rpartition(":")[2]), {}

        def begin(request: str, way: str, **settings: str) -> None:
            client = self.connect(self.another(UPSTREAM_TIMEOUT=str(SHORT), **settings))
            if request == "send":
                self.assertReply(client.log_in(password=self.password), "235 2.7.0")
            begun[request, way] = (Waiting(client, login_line()) if request == "token" else
                                   begin_message(client, SIMPLE))
        for way in ("half", "trickle"):
            proxy = Between(self, way)
            with unittest.mock.patch.dict(
                    os.environ, HTTPS_PROXY=f"http://a:b@127.0.0.1:{proxy.port}"):
                begin("token", f"proxy, {way}")
                wait_for(functools.partial(getattr, proxy, "asked"))
        # A full backlog makes connect() hang on Linux; other systems refuse the connection.
        for way in ("full",) * (sys.platform == "linux") + ("silent", "half", "trickle"):
            for request, name in (("token", "AZURE_AUTHORITY_HOST"), ("send", "GRAPH_ENDPOINT")):
                begin(request, way, **{name: f"https://localhost:{Between(self, way, port).port}"})
        for (request, way), waiting in begun.items():
            with self.subTest(request, way=way):
                self.assertTimely(waiting, "454 4.7.0" if request == "token" else "451 4.4.1")
        self.assertEqual(self.fake.asked("send"), [])
        wait_for(lambda: not calls_under_way())     # although every Between still hangs


@unittest.mock.patch.object(relay, "GRACE", HANGING)    # so only the thread enforces the deadline
class HangTests(HangCase):
    """Microsoft stops responding, at any point of an exchange."""

    # Token and send requests are tested with every stop, the other requests with some.
    cases = [(request, where) for request in STOPPED_KINDS for where in STOPS
             if where in ("before the headers", "in the body") or request in ("token", "send")
             or (request, where) in (("put", "half of the request"), ("imds", "in the headers"))]

    def test_a_waiting_client_gets_the_right_reply_at_the_deadline(self) -> None:
        """The stops are reached one after another, because all at once might be late."""
        plays = {}
        # Requests for files come first: they have more time, and need it to reach their stop.
        for request, where in sorted(self.cases, key=lambda case: -self.time_of(case[0])):
            fake, running = self.beside(UPSTREAM_TIMEOUT=str(self.time_of(request)))
            plays[request, where] = fake, running, stop_at(
                fake, self.connect(running), request, where)
        for (request, where), (fake, running, waiting) in plays.items():
            with self.subTest(request, where=where):
                wanted = "454 4.7.0" if STOPPED_KINDS[request][0] is None else "451 4.4.1"
                if request.startswith("send") and "body" in where:      # the status is known
                    wanted = "452 4.2.2" if "after" in where else "550 5.7.1"
                self.assertTimely(waiting, wanted, self.time_of(request))
                # A request that may have been obeyed is not retried; nothing is sent later.
                self.assertEqual(len(fake.asked(request)), 1)
                self.assertEqual((fake.delivered, fake.drafts), ([], {}))
                self.assertEqual(len(fake.deleted), int(
                    request in ("attach", "open", "put", "send-draft")))
                self.served(running, "secret")      # on another connection

    @staticmethod
    def time_of(request: str) -> float:
        """Return the UPSTREAM_TIMEOUT for a stop."""
        return 2 * SHORT if STOPPED_KINDS[request][0] == TWO_FILES else SHORT

    def test_other_clients_are_served_meanwhile_and_the_relay_can_stop(self) -> None:
        """All stops hang at once, until the other clients have been served."""
        fake, running = self.beside(UPSTREAM_TIMEOUT="3600", SHUTDOWN_TIMEOUT="0.1")
        waiting = {f"{request} {where}": stop_at(
            fake, self.connect(running), request, where, password=f"{request} {where}",
            sender=f"{number}@example.com") for number, (request, where) in enumerate(self.cases)
            if request != "imds"}           # every look-up in the table needs its token
        for number in range(relay.REQUESTS_AT_ONCE):
            waiting[f"slot {number}"] = stop_at(
                fake, self.connect(running), "send", "before the headers",
                password=f"slot {number}", sender="slot@example.com")
        before = len(fake.asked("send"))
        waiting["fifth"] = begin_message(
            self.logged_in(running=running), SIMPLE, "slot@example.com")
        self.served(running, "secret")
        self.served(running, "another", "1@example.com", TWO_FILES)
        self.assertEqual(self.connect(running).log_in(LOOK_UP_USER)[:9], "235 2.7.0")
        self.assertEqual(len(fake.asked("send")), before + 1)
        self.assertEqual([name for name, client in waiting.items() if not client.is_waiting], [])
        begun = time.monotonic()
        running.stop()
        self.assertLess(time.monotonic() - begun, PATIENCE)
        self.assertEqual({name: client.hear()[:9] for name, client in waiting.items()},
                         dict.fromkeys(waiting, "421 4.3.2"))
        # A cancelled task closes its connection to Microsoft, so its call ends.
        wait_for(lambda: not calls_under_way())
        self.assertTrue(+fake._busy, "the calls ended only because the fake had ended")

    @unittest.mock.patch.object(relay, "DISCARD_TIMEOUT", HANGING)
    def test_a_client_that_waits_for_a_slot_gets_its_reply_in_time(self) -> None:
        fake, running = self.beside()
        clients = [self.logged_in(running=running) for _ in range(relay.REQUESTS_AT_ONCE + 1)]
        # Deleting the drafts hangs too, so the slots stay in use until the release.
        fake.will("attach", *[fake.hang] * relay.REQUESTS_AT_ONCE)
        fake.will("delete", *[fake.hang] * relay.REQUESTS_AT_ONCE)
        waiting = []
        for client in clients[:-1]:
            waiting.append(begin_message(client, TWO_FILES))
            wait_for(lambda: len(fake.asked("attach")) == len(waiting))
        fifth = begin_message(clients[-1], SIMPLE)
        self.served(running, "secret")
        # It is deferred a little earlier, because a slot at the last moment is of no use.
        self.assertTimely(fifth, "451 4.4.5", SHORT * (1 - relay.MIN_TIME_LEFT))
        self.assertTrue(all(client.is_waiting for client in waiting))
        fake.release.set()
        for blocked in waiting:
            self.assertEqual(blocked.hear()[:9], "451 4.4.1")
        self.assertEqual([message.mailbox for message in fake.delivered], ["other@example.com"])
        self.assertEqual(len(fake.asked("send")), 1)
        self.served(running, "secret", SENDER)      # the slots are free again


MEDIUM = crlf(multipart("mixed", PLAIN, scan(2_500_000)[0], header=NAMED))      # no upload session


class SlowWorkTests(HangCase):
    """The machine is too slow to process a message before the deadline."""

    def test_a_client_gets_its_reply_in_time_while_its_message_is_processed(self) -> None:
        """The slow step is parsing, then adding an attachment, then uploading a chunk."""
        fake, running = self.beside()
        clients = [self.logged_in(running=running) for _ in range(3)]
        in_thread = lambda *_: threading.current_thread().name == "relay-call"  # noqa: E731
        with Stuck(binascii, "a2b_base64", in_thread) as work:
            work.is_on = False
            def begin(sock: socket.socket, request: Request) -> bool:
                work.is_on = True
                return fake.accept(sock, request)
            fake.will("draft", begin, begin)
            waiting = []
            for client, message in zip(clients, (MEDIUM, TWO_FILES, LARGE)):
                work.is_on = message == MEDIUM
                waiting.append(begin_message(client, message, f"{len(message)}@example.com"))
                self.assertTrue(work.arrived.acquire(timeout=PATIENCE))
            for blocked, wanted in zip(waiting, ("451 4.3.0", "451 4.4.1", "451 4.4.1")):
                self.assertTimely(blocked, wanted)
            self.assertEqual(len(fake.deleted), 2)
            wait_for(lambda: calls_under_way() == 3)   # the calls that delete have ended
        self.assertEqual([fake.asked(step) for step in ("send", "attach", "put")], [[], [], []])


class LookUpTests(HangCase):
    """The look-up of the address of a Microsoft host hangs."""

    MANY = 60           # more than the threads of any default pool

    def test_many_hanging_look_ups_do_not_affect_other_clients(self) -> None:
        fake, running = self.beside("AZURE_AUTHORITY_HOST")
        self.served(running, "known")
        clients = [self.connect(running) for _ in range(self.MANY)]
        fake.drop_connections()
        with stuck_look_ups() as look_ups:
            waiting = [Waiting(client, login_line(password=f"secret {number}"))
                       for number, client in enumerate(clients)]
            look_ups.wait(self.MANY)
            self.served(running, "known")           # all look-ups still hang
            for blocked in waiting:
                self.assertTimely(blocked, "454 4.7.0")
            self.served(running, "known")
            wait_for(lambda: calls_under_way() == self.MANY)
            before = len(fake.requests)
        wait_for(lambda: not calls_under_way())
        self.assertEqual(len(fake.requests), before)    # nothing was sent later
        self.assertEqual(clients[0].log_in()[:9], "235 2.7.0")

    def test_a_message_is_freed_although_its_look_up_hangs(self) -> None:
        """Only the thread stays. The message is freed without a garbage collection."""
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        fake, running = self.beside("GRAPH_ENDPOINT")
        clients = [self.logged_in(running=running) for _ in range(2)]
        with stuck_look_ups() as look_ups:
            waiting = [begin_message(client, message, f"{len(message)}@example.com")
                       for client, message in zip(clients, (BULKY, TWO_FILES))]
            look_ups.wait(2)
            for blocked in waiting:
                self.assertTimely(blocked, "451 4.4.1")
            held = (relay.HttpRequest, relay.EditedMessage, relay.Draft, relay.Attachment)
            wait_for(lambda: not any(isinstance(item, held) for item in gc.get_objects()))
            wait_for(lambda: calls_under_way() == 2)
        wait_for(lambda: not calls_under_way())
        self.assertEqual((fake.asked("send"), fake.asked("draft")), ([], []))

    def test_the_program_stops_while_look_ups_hang(self) -> None:
        code = ("import socket, threading, smtp_oauth_relay as relay\n"
                "look_up = socket.getaddrinfo\n"
                "def hang(host, *rest, **options):\n"
                "    if host == 'localhost':\n"
                "        print('hangs', flush=True)\n"
                "        threading.Event().wait()\n"
                "    return look_up(host, *rest, **options)\n"
                "socket.getaddrinfo = hang\n"
                "relay.main([])\n")
        with start_python("-c", code, TLS_SOURCE="off", REQUIRE_TLS="false", SMTP_PORT="0",
                          LISTEN_ADDRESS="127.0.0.1", SHUTDOWN_TIMEOUT="0.3",
                          AZURE_AUTHORITY_HOST="http://localhost:9") as process:
            port = int(wait_for_line(process, "listening").rpartition("port=")[2].split()[0])
            client = Client(port)
            self.addCleanup(client.close)
            client.ehlo()
            waiting = Waiting(client, login_line())
            self.assertEqual(process.stdout.readline(), "hangs\n")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)
            log = wait_for_line(process, "stopped") + process.stderr.read()
            self.assertNotIn("Traceback", log)
            self.assertReply(waiting.hear(), "421 4.3.2")


# The AADSTS number, the HTTP status, the error, and words of the remedy.
REFUSALS = (
    (7000215, 401, "invalid_client", "value, not its ID"),
    (7000222, 401, "invalid_client", "expired"),
    (7000216, 401, "invalid_client", "password"), (7000218, 400, "invalid_client", "password"),
    (700016, 400, "unauthorized_client", "client ID"),
    (90002, 400, "invalid_request", "tenant ID"), (90002, 400, "invalid_tenant", "tenant ID"),
    (900023, 400, "invalid_request", "tenant ID"),
    (7000112, 400, "unauthorized_client", "disabled"),
    (53003, 400, "invalid_grant", "Conditional Access"),
    (70011, 400, "invalid_scope", "GRAPH_ENDPOINT"),
    (500011, 400, "invalid_resource", "GRAPH_ENDPOINT"),
    (90038, 400, "invalid_request", "AZURE_AUTHORITY_HOST"),
    (1234567, 400, "something_new", "see the log"),
    *((code, 400, "something_new", "something_new: ") for code in (-3, 10 ** 4000)),
)
# Responses that say nothing about the secret.
TRANSIENT = (
    response(429, b"Too Many Requests", retry_after="60"),
    response(429, aadsts(90055, "temporarily_unavailable")),
    response(429, aadsts(7000215, "invalid_client")),
    response(503, aadsts(90033, "temporarily_unavailable")),
    response(500, b"<html>Internal Server Error</html>"),
    response(502), response(504, aadsts(7000215, "invalid_client")),
    response(400, aadsts(50196, "invalid_grant")), response(400, aadsts(90055, "x")),
    response(400, aadsts(1, "server_error")), response(401, b""), response(401, b"<html>"),
    *(response(400, body) for body in list[Any]((
        b'{"error":"invalid_cl', {"error": {"code": "x"}}, {"error": None}, []))),
    response(403, b"null"), response(200, b""), response(200, {}),
    *(response(200, {"access_token": token}) for token in ("", None, 5, "a b", "a\r\nX: y")),
    response(200, b'{"access_token": "abc'), response(200, b"[" * 100_000),
    response(200, b"\xff\xfe"), response(201, {"access_token": "abc"}),
    response(302, b"", location="https://elsewhere.example"),
)


class LoginTests(RelayCase):
    """A login as TENANT@CLIENT requests a token from Entra ID."""

    settings = UNHURRIED

    def test_a_login_requests_a_token_with_the_credentials_of_the_device(self) -> None:
        self.password = "s&c=r+t~% \u00fc"
        for user in (USER, f"Contoso.com@{SHORT_CLIENT}.local"):
            self.assertReply(self.log_in(user), "235 2.7.0")
        client = self.connect()
        client.user, client.password = USER, "of smtplib"
        self.assertEqual(client.auth("LOGIN", client.auth_login)[0], 235)
        for request, tenant in zip(self.fake.asked("token"), (TENANT, "contoso.com")):
            self.assertEqual(request.path, f"/{tenant}/oauth2/v2.0/token")
            self.assertEqual(request.form["client_secret"], self.password)
            self.assertEqual(request.form["client_id"], CLIENT)

    def test_a_domain_is_resolved_to_the_tenant_id_in_its_token(self) -> None:
        """If a token has no valid tenant ID, the domain stays as it is."""
        def jwt(claims: Any) -> str:
            payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode()
            return f"e30.{payload.rstrip('=')}.signature"
        good = jwt({"tid": TENANT.upper()})
        for tenant, token, wanted, requests in (
                ("one.example", good, TENANT, 1), (TENANT, "", TENANT, 0),
                ("one.example", "", TENANT, 0), (CLIENT, good, CLIENT, 1),    # an ID stays
                *((f"d{number}.example", token, f"d{number}.example", 1)
                  for number, token in enumerate((
                      "opaque", "a.b.c", f"a.{'W1tb' * 10_000}.c", jwt({}), jwt([]),
                      jwt({"tid": 5}), jwt({"tid": "x"}), jwt("tid"))))):
            with self.subTest(tenant, token=token[:40]):
                self.fake.reset()
                self.fake.will("token", say(200, {"access_token": token, "expires_in": 3599}))
                self.assertReply(self.log_in(f"{tenant}@{CLIENT}"), "235 2.7.0")
                self.assertEqual(self.running.relay._tokens.resolve(tenant), wanted)
                self.assertEqual(len(self.fake.asked("token")), requests)

    def test_a_malformed_login_is_refused_without_a_request(self) -> None:
        for user, password, has_hint in (("scanner", "x", True), ("", "x", True),
                                         (f"{TENANT}@lookup", "x", False), (USER, "", False)):
            reply = self.assertReply(self.log_in(user, password), "535 5.7.8")
            self.assertEqual("TENANT@CLIENT" in reply, has_hint)
        self.assertEqual(self.fake.requests, [])

    def test_each_refusal_of_entra_is_replied_to_with_its_number_and_a_remedy(self) -> None:
        for number, (code, status, error, word) in enumerate(REFUSALS):
            with self.subTest(word), kept_log() as kept:
                is_odd = not 0 < code < 10 ** 9
                body = aadsts(code, error)
                if is_odd:
                    body["error_description"] = "odd"
                self.fake.will("token", say(status, body))
                reply = self.assertReply(self.log_in(password=f"{self.password} {number}"),
                                         "535 5.7.8")
                self.assertIn(word, reply)
                self.assertEqual(reply.startswith(f"535 5.7.8 AADSTS{code}: "), not is_odd)
                self.assertEqual(f" aadsts={code} " in kept.find("auth")[0][1], not is_odd)

    def test_each_temporary_failure_of_entra_defers_the_login(self) -> None:
        """The response is broken, or says nothing about the secret."""
        for received in (b"", b"HTTP/1.1", b"nonsense\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n",
                         b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{\"acc",
                       b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                       b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
                       b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
                       b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"[" * 100_000,
                       b"\x16\x03\x01\0\0", *TRANSIENT):
            with self.subTest(str(received)[:60]), kept_log() as kept:
                self.fake.will("token", utter(received) if isinstance(received, bytes) else say(
                    received.status, received.body, **received.headers))
                self.assertReply(self.log_in(), "454 4.7.0")
                line = kept.find("auth")[0][1]
                self.assertIn("result=tempfail", line)
                self.assertEqual('said="Too Many Requests"' in line, received is TRANSIENT[0])
                if received in TRANSIENT and received.status == 200:
                    self.assertNotIn("said=", line)

    def test_no_secret_stays_in_memory_after_a_failed_login(self) -> None:
        """It is freed without a garbage collection, and the cached refusal does not hold it."""
        client = self.connect()
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        self.fake.will("token", say(503), utter(b""), say(401, aadsts(7000215, "invalid_client")))
        for wanted in ("454 4.7.0", "454 4.7.0", "535 5.7.8", "535 5.7.8"):
            self.assertReply(client.log_in(password=self.password), wanted)
            wait_for(lambda: not [item for item in gc.get_objects() if isinstance(
                item, relay.Application) and item.secret == self.password])
        self.assertEqual(len(self.fake.asked("token")), 3)

    def test_simultaneous_logins_with_the_same_secret_share_one_request(self) -> None:
        self.fake.will("token", self.fake.hang_then(self.fake.accept))
        clients = [self.connect() for _ in range(5)]
        with kept_log() as kept:
            for client in clients:
                client.putcmd(f"AUTH PLAIN {plain(USER, self.password).decode()}")
            self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
            self.fake.release.set()
            for client in clients:
                self.assertEqual(client.getreply()[0], 235)
        self.assertReply(self.log_in(), "235 2.7.0")
        self.assertEqual(len(self.fake.asked("token")), 1)
        self.assertEqual(len(kept.find("result=ok")), 5)

    def test_a_token_is_never_used_for_another_secret_tenant_or_application(self) -> None:
        self.assertReply(self.log_in(), "235 2.7.0")
        self.fake.will("token", say(401, aadsts(7000215, "invalid_client")))
        self.assertReply(self.log_in(password=self.password + "x"), "535 5.7.8")
        self.assertReply(self.log_in(f"{CLIENT}@{CLIENT}"), "235 2.7.0")
        self.assertReply(self.log_in(f"{TENANT}@{TENANT}"), "235 2.7.0")
        self.assertEqual(len(self.fake.asked("token")), 4)
        self.fake.will("token", say(503))           # a temporary failure is not cached
        self.assertReply(self.log_in(password="other"), "454 4.7.0")
        self.assertReply(self.log_in(password="other"), "235 2.7.0")

    def test_the_log_of_a_login_has_its_result_and_no_secret(self) -> None:
        with kept_log() as kept:
            self.fake.will("token", say(401, aadsts(7000222, "invalid_client", "It expired.")))
            self.log_in()
            self.log_in(password=self.password + "2")
            self.log_in("my secret\r\n", "x")
        refused, fine, malformed = kept.find("auth")
        for word in ("result=refused", "aadsts=7000222", f"user={USER}", "It expired.",
                     "535 5.7.8"):
            self.assertIn(word, refused[1])
        self.assertEqual(fine[1][8:], f" auth user={USER} result=ok")
        self.assertEqual([level for level, _ in kept.find("auth")], ["WARNING", "INFO", "INFO"])
        self.assertNotIn("secret", malformed[1])
        for hidden in (self.password, plain(USER, self.password).decode(), "token-"):
            self.assertNotIn(hidden, repr(kept.lines))


class CacheTests(RelayCase):
    """The cache of tokens and refusals: its keys, TTLs and size."""

    def tokens(self) -> tuple[relay.Tokens, Clock]:
        clock = Clock()
        pool = relay.HttpPool([self.fake.url])
        self.addCleanup(pool.close)
        return relay.Tokens(self.config(), pool, clock), clock

    def get(self, tokens: relay.Tokens, secret: str, resource: str = "") -> str:
        return asyncio.run(tokens.get(relay.Application(TENANT, CLIENT, secret),
                                      time.monotonic() + PATIENCE, resource))

    def test_a_token_expires_five_minutes_early_and_a_refusal_after_30_seconds(self) -> None:
        tokens, clock = self.tokens()
        first = self.get(tokens, "s")
        for step, is_kept in ((3599 - 300 - 1.0, True), (1.0, False)):
            clock.now += step
            self.assertEqual(self.get(tokens, "s") == first, is_kept)
        self.fake.will("token", say(401, aadsts(7000215, "invalid_client")))
        for step in (0.0, 29.9):
            clock.now += step
            with self.assertRaises(relay.AuthError):
                self.get(tokens, "t")
        clock.now += 0.1
        self.assertTrue(self.get(tokens, "t"))
        self.assertEqual(len(self.fake.asked("token")), 4)

    def test_only_the_token_that_was_refused_is_dropped(self) -> None:
        (tokens, _), vault = self.tokens(), "https://vault.azure.net"
        token, other = self.get(tokens, "s"), self.get(tokens, "s", vault)
        self.assertNotEqual(token, other)
        for refused, resource, left in (("another", "", {token, other}), (token, vault, {
                token, other}), (other, vault, {token}), (token, "", set())):
            tokens.forget(relay.Application(TENANT, CLIENT, "s"), refused, resource)
            current = {self.get(tokens, "s"), self.get(tokens, "s", vault)}
            self.assertEqual(current & {token, other}, left)

    def test_a_cache_key_depends_on_the_cache_and_on_the_kind_of_credential(self) -> None:
        (tokens, _), (others, _) = self.tokens(), self.tokens()
        application = relay.Application(TENANT, CLIENT, "s")
        keys = {tokens._key(application, "r"), others._key(application, "r"), tokens._key(
            dataclasses.replace(application, credential="managed-identity"), "r")}
        self.assertEqual(len(keys), 3)

    def test_an_expired_entry_is_gone_and_a_full_cache_drops_the_oldest(self) -> None:
        clock = Clock()
        cache: relay.Cache[int, str] = relay.Cache(clock)
        cache.put(1, "a", 10.0)
        self.assertEqual((cache.get(1), cache.get(2)), ("a", None))
        clock.now += 10.0
        self.assertIsNone(cache.get(1))
        for number in (*range(relay.MAX_CACHED + 10), 10, 2000):    # a replaced entry is new
            cache.put(number, str(number), 10.0)
        self.assertEqual([cache.get(number) for number in (9, 10, 11, 12, 2000)],
                         [None, "10", None, "12", "2000"])


class IdentityTests(RelayCase):
    """The identity of the relay itself at Azure; here it requests tokens for Graph."""

    def ask(self, resource: Any = "", timeout: Any = PATIENCE, **settings: str) -> str:
        """Return a token for `resource`, requested with the identity of the relay."""
        config = self.config(**{"AZURE_POD_IDENTITY_AUTHORITY_HOST": self.fake.url, **settings})
        with contextlib.closing(relay.HttpPool(config.endpoints)) as pool:
            return asyncio.run(relay.Tokens(config, pool).get(
                relay.relay_identity(config), time.monotonic() + timeout, resource))

    def failure(self, **settings: Any) -> str:
        """Return the log fields of a request that fails."""
        with self.assertRaises(relay.TemporaryError) as caught:
            self.ask(**settings)
        return relay.format_fields(caught.exception.facts)

    def form(self) -> dict[str, str]:
        """Return the form of the last token request."""
        return self.fake.asked("token")[-1].form

    def test_a_client_secret_takes_precedence_over_other_identities(self) -> None:
        self.ask(AZURE_TENANT_ID=TENANT, AZURE_CLIENT_ID=CLIENT, AZURE_CLIENT_SECRET="s&",
                 AZURE_FEDERATED_TOKEN_FILE="/t", IDENTITY_ENDPOINT=f"{self.fake.url}/msi/token",
                 IDENTITY_HEADER="header", resource="https://vault.azure.net")
        self.assertEqual(self.form(), {"client_id": CLIENT, "client_secret": "s&",
                                       "scope": "https://vault.azure.net/.default",
                                       "grant_type": "client_credentials"})

    def test_a_workload_identity_sends_what_its_token_file_holds_now(self) -> None:
        path = FILES.write("federated", "eyJ.assertion.1\n")
        settings = {"AZURE_TENANT_ID": TENANT, "AZURE_CLIENT_ID": CLIENT,
                    "AZURE_FEDERATED_TOKEN_FILE": path,
                    "IDENTITY_ENDPOINT": f"{self.fake.url}/msi/token", "IDENTITY_HEADER": "h"}
        self.ask(**settings)
        self.assertEqual(self.form(), {
            "client_id": CLIENT, "client_assertion": "eyJ.assertion.1",
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "scope": f"{self.fake.url}/.default", "grant_type": "client_credentials"})
        FILES.write("federated", "eyJ.assertion.2")         # as Kubernetes renews it
        self.ask(**settings)
        self.assertEqual(self.form()["client_assertion"], "eyJ.assertion.2")
        self.fake.will("token", say(401, aadsts(700024, "invalid_client", "eyJ.assertion.2!")))
        self.assertNotIn("assertion", self.failure(**settings))
        for text in ("", "two\nlines", "\x80"):
            FILES.write("federated", text)
            self.assertIn(f"{path}: must hold one line of", self.failure(**settings))
        settings["AZURE_FEDERATED_TOKEN_FILE"] = path = FILES["fifo"]
        self.assertIn("No such file", self.failure(**settings))
        os.mkfifo(path)                         # reading hangs, as on a network file system
        self.addCleanup(os.close, os.open(path, os.O_RDWR))
        self.assertIn(f"{path}: timed out", self.failure(timeout=0.2, **settings))

    def test_the_identity_of_app_service_comes_from_identity_endpoint(self) -> None:
        settings = {"IDENTITY_ENDPOINT": f"{self.fake.url}/msi/token", "IDENTITY_HEADER": "header"}
        self.ask(resource="https://storage.azure.com", **settings)
        self.ask(AZURE_CLIENT_ID=CLIENT, **settings)
        first, second = self.fake.asked("app-service")
        self.assertEqual(first.path, "/msi/token?api-version=2019-08-01&resource="
                                     "https%3A%2F%2Fstorage.azure.com")
        self.assertTrue(second.path.endswith(f"&client_id={CLIENT}"))
        self.assertNotIn("metadata", first.headers)
        for status in (400, 401):
            self.fake.will("app-service", say(status, {"error": "x", "error_description":
                                                       "bad header%20: header"}))
            self.assertIn('said="bad ***%20: ***"', self.failure(**settings))
        settings["IDENTITY_ENDPOINT"] += "?x=y"
        self.ask(**settings)
        self.assertIn("/msi/token?x=y&api-version=", self.fake.asked("app-service")[-1].path)
        settings["IDENTITY_ENDPOINT"] = "https://10.0.0.1:2377/metadata"
        self.assertIn("IDENTITY_ENDPOINT must be an http:// URL", self.failure(**settings))

    def test_a_virtual_machine_gets_its_identity_from_the_metadata_endpoint(self) -> None:
        for half in ({"IDENTITY_HEADER": "header"}, {"IDENTITY_ENDPOINT": "http://127.0.0.1:1"}):
            self.ask(AZURE_CLIENT_ID=CLIENT, **half)        # App Service sets both
            request = self.fake.asked("imds").pop()
            self.assertEqual(
                request.path, "/metadata/identity/oauth2/token?api-version=2018-02-01"
                f"&resource={urllib.parse.quote(self.fake.url, safe='')}&client_id={CLIENT}")
            self.assertNotIn("content-length", request.headers)
        self.assertEqual([request.kind for request in self.fake.requests], ["imds"] * 2)

    @unittest.mock.patch.object(relay, "IDENTITY_TIMEOUT", relay.IDENTITY_TIMEOUT)
    @unittest.mock.patch.object(relay, "IDENTITY_RETRY_DELAYS", (0.0,) * 5)
    def test_the_metadata_endpoint_is_retried_while_there_is_time(self) -> None:
        self.fake.will("imds", say(404), say(410), say(429), say(500, b"<html>"))
        self.ask()
        self.assertEqual(len(self.fake.asked("imds")), 5)
        relay.IDENTITY_RETRY_DELAYS = (PATIENCE,) * 5     # there is no time for a retry
        self.fake.will("imds", say(404))
        self.assertIn("status=404", self.failure(timeout=PATIENCE - 0.1))
        for status in (400, 401):
            self.fake.will("imds", say(status, {"error": "invalid_request", "error_description":
                                                "Identity not found"}))
            self.assertIn("Identity not found", self.failure())
        for garbage in (b"[]", b"{\"access_token\": 5}", b"\xff", b""):
            self.fake.will("imds", say(200, garbage))
            self.failure()
        begun = time.monotonic()
        for timeout, relay.IDENTITY_TIMEOUT in ((0.2, PATIENCE), (PATIENCE, 0.2)):
            self.fake.will("imds", self.fake.hang)
            self.assertIn(f"identity={self.fake.url}/metadata/identity/oauth2/token",
                          self.failure(timeout=timeout))
        self.assertLess(time.monotonic() - begun, PATIENCE / 2)

    def test_identity_requests_never_go_through_a_proxy(self) -> None:
        """Nothing listens at the proxy, so a request through it would fail."""
        with at_environ(HTTP_PROXY="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1",
                        HTTPS_PROXY="http://127.0.0.1:1", NO_PROXY=""):
            self.ask()
            self.ask(IDENTITY_ENDPOINT=f"{self.fake.url}/msi/token", IDENTITY_HEADER="header")


class AccountLoginTests(AccountCase):
    """Accounts of ACCOUNTS_FILE: their logins, networks, senders and recipients."""

    def test_a_short_name_and_its_password_stand_for_the_secret_of_the_relay(self) -> None:
        running = self.another()
        for name in ("scan2", "SCAN2", "scan2@lookup", "Scan2@lookup.local"):
            with self.subTest(name):
                self.assertReply(self.logged_in_as(name, running=running).post(), "250 2.0.0")
        request, = self.fake.asked("token")
        self.assertEqual(request.form["client_secret"], "secret of the relay")
        self.assertEqual(request.path, f"/{TENANT}/oauth2/v2.0/token")
        self.assertEqual({sent.mailbox for sent in self.fake.delivered}, {"scanner@example.com"})

    def test_the_password_of_a_device_can_be_the_client_secret(self) -> None:
        client = self.logged_in_as("own.secret", self.password)
        self.assertEqual(self.fake.asked("token")[0].form["client_secret"], self.password)
        self.assertReply(client.post(sender="a@b.c"), "550 5.7.1")
        self.assertReply(client.post(), "250 2.0.0")

    def test_the_reason_for_a_refused_login_is_only_in_the_log(self) -> None:
        """Each login hashes one password, so the time does not reveal which accounts exist."""
        replies = set()
        for user, password, problem in (
                ("scan2", "wrong", "wrong password"), ("scan2", "", "wrong password"),
                ("nobody", PASSWORD, "there is no such account"),
                ("nobody@lookup", PASSWORD, "there is no such account"),
                ("guest", PASSWORD, "not from its networks"), ("guest", "", "not from"),
                ("inside", PASSWORD, "not from its networks"),
                ("inside", "wrong", "not from its networks"),
                ("secret.inside", "x", "not from its networks"),
                ("own.secret", "", "the password is empty")):
            with self.subTest(user, password=password), kept_log() as kept, \
                    hashed_passwords() as scrypt:
                replies.add(self.assertReply(self.log_in(user, password), "535 5.7.8"))
                (_, line), = kept.find("auth")
                self.assertIn(problem, line)
                self.assertNotIn("wrong ", line.replace("wrong password", ""))
                self.assertNotIn("nobody ", line)
                self.assertEqual("user=nobody@lookup " in line, user == "nobody@lookup")
                self.assertEqual(scrypt.call_count, 1)
        self.assertEqual(len(replies), 1)
        self.assertEqual(self.fake.requests, [])

    @needs_loopbacks
    def test_an_account_is_used_from_its_networks_only(self) -> None:
        self.assertReply(self.come_from("127.0.0.3").log_in("inside", PASSWORD), "235 2.7.0")
        self.assertReply(self.come_from("127.0.0.4").log_in("inside", PASSWORD), "535 5.7.8")
        with kept_log() as kept:
            self.assertReply(self.come_from("127.0.0.2").post(), "250 2.0.0")
            wait_for(lambda: kept.find("sent"))
        for event in ("connected", "sent"):
            self.assertIn("account=guest", kept.find(event)[0][1])
        for address, reply in (("127.0.2.77", "250 2.0.0"), ("127.0.0.4", "530 5.7.0"),
                               ("127.0.0.1", "530 5.7.0")):
            self.assertReply(self.come_from(address).post(), reply)
        self.assertEqual(len(self.fake.delivered), 2)

    def test_an_account_sends_as_its_mailbox_and_keeps_the_display_name(self) -> None:
        by_header = self.another(SENDER_FROM="header")
        for running, sender in ((self.running, "printer@localhost.localdomain"),
                                (self.running, ""), (self.running, "scanner@example.com"),
                                (by_header, "other@x.y")):
            with self.subTest(sender):
                message = b"From: Scan Room <%s>\r\nTo: a@x.y\r\n\r\nText\r\n" % (
                    sender or "printer@x.y").encode()
                client = self.logged_in_as("scan2", running=running)
                self.assertReply(client.post(message, sender=sender), "250 2.0.0")
                delivered = self.fake.delivered[-1]
                self.assertEqual(delivered.mailbox, "scanner@example.com")
                self.assertIn(b"From: Scan Room <scanner@example.com>\r\n", delivered.message)
        for running in (self.another(), by_header):     # the device does not know the mailbox
            self.fake.will("draft", graph_says(403, "ErrorAccessDenied"))
            reply = self.logged_in_as("scan2", running=running).post_octets(
                LARGE, "other@x.y", ["a@x.y"])
            self.assertIn("for scanner@example.com", self.assertReply(reply, "552 5.3.4"))

    def test_allowed_recipients_apply_to_the_header_too_if_it_is_kept(self) -> None:
        running = self.another(HEADER_RECIPIENTS="keep")
        for user, recipients, reply in (("scan2", ["a@x.y"], "550 5.7.1"),
                                        (USER, ["a@x.y", "o@evil.example"], "250 2.0.0")):
            client = self.logged_in_as(user, running=running)
            self.assertReply(client.post(recipients=("o@evil.example",), sender="any@b.c"), reply)
            client.say("RSET")
            self.assertReply(client.post(b"To: a@x.y, o@evil.example\r\n\r\nText\r\n"), "250 2.0.0")
            self.assertEqual(sorted(self.fake.delivered[-1].recipients), recipients)

    def test_allowed_senders_apply_to_from_if_it_decides_the_sender(self) -> None:
        """From decides if the reverse-path is null, or with SENDER_FROM=header."""
        by_header = self.another(SENDER_FROM="header")
        for running, sender in ((self.running, ""), (by_header, "root@printer.local")):
            client = self.logged_in_as("own.secret", self.password, running)
            for name, reply, event in (("boss@b.c", "550 5.7.1", "refused"),
                                       ("a@example.com", "250 2.0.0", "sent")):
                message = f"From: {name}\r\nTo: a@x.y\r\n\r\nText\r\n".encode()
                with kept_log() as kept:
                    self.assertReply(client.post(message, sender=sender), reply)
                self.assertIn(f" sender={name} ", kept.find(event)[0][1])
        self.assertEqual(len(self.fake.delivered), 2)

    def test_only_the_allowed_accounts_and_tenants_can_log_in(self) -> None:
        for running, wanted in (
                (self.another(ACCOUNTS_REQUIRED="true"),
                 {USER: "535 5.7.8", "scan2": "235 2.7.0"}),
                (self.with_accounts(f"[{USER}]\n{APPLICATION}", ACCOUNTS_REQUIRED="true"),
                 {USER: "235 2.7.0"}),
                (self.another(ALLOWED_TENANTS=f"contoso.com, {TENANT}"),
                 {USER: "235 2.7.0", f"Contoso.com@{CLIENT}": "235 2.7.0", "scan2": "235 2.7.0",
                  f"{CLIENT}@{CLIENT}": "535 5.7.8 This tenant may not log in here; see ALLOWED"})):
            for user, reply in wanted.items():
                with self.subTest(user), kept_log() as kept:
                    received = self.log_in(user, running=running)
                    self.assertTrue(received.startswith(reply), received)
                    self.assertEqual("Only accounts that the relay knows" in str(kept.lines),
                                     reply == "535 5.7.8")

    @needs_loopbacks
    def test_an_expired_secret_of_the_relay_defers_logins_and_messages(self) -> None:
        running = self.another()
        self.fake.will("token", *[say(401, aadsts(7000222, "invalid_client"))] * 2)
        with kept_log() as kept:
            reply = self.log_in("scan2", running=running)
        self.assertIn("AADSTS7000222", self.assertReply(reply, "454 4.7.0"))
        self.assertEqual(kept.find("auth")[0][0], "ERROR")
        self.assertNotIn("secret of the relay", str(kept.lines))
        client = self.come_from("127.0.0.2", running)           # without login
        self.assertIn("AADSTS7000222", self.assertReply(client.post(), "451 4.7.0"))
        self.assertReply(client.say("NOOP"), "250 2.0.0")       # the session goes on

    def test_an_account_can_use_a_managed_identity_or_a_workload_identity(self) -> None:
        self.assertReply(self.logged_in_as("cloud").post(), "250 2.0.0")
        request, = self.fake.asked("imds")
        self.assertNotIn("client_id", request.path)
        running = self.with_accounts(ACCOUNTS.replace("client_id =\n", f"client_id = {TENANT}\n"))
        self.assertReply(self.log_in("cloud", running=running), "235 2.7.0")
        self.assertTrue(self.fake.asked("imds")[-1].path.endswith(f"&client_id={TENANT}"))
        self.assertEqual(self.fake.asked("token"), [])
        running = self.with_accounts(
            f"[a]\n{APPLICATION}credential = workload-identity\npassword = {HASH}\n",
            AZURE_FEDERATED_TOKEN_FILE=FILES.write("assertion", "eyJ.of.account"))
        self.assertReply(self.logged_in_as("a", running=running).post(), "250 2.0.0")
        form = self.fake.asked("token")[0].form
        self.assertEqual((form["client_id"], form["client_assertion"]), (CLIENT, "eyJ.of.account"))

    def test_without_scrypt_an_account_with_a_password_is_an_error_and_others_work(self) -> None:
        self.addCleanup(relay.has_scrypt.cache_clear)
        relay.has_scrypt.cache_clear()
        with hashed_passwords() as scrypt:
            scrypt.side_effect = ValueError("disabled for FIPS")
            _, faults = relay.parse_accounts(ACCOUNTS, make_config())
            self.assertIn("[scan2] password = ***: must be empty, because this Python has no "
                          "scrypt", faults)
            running = self.with_accounts(f"[a]\n{APPLICATION}")
            self.assertReply(self.log_in("none", "x", running), "535 5.7.8")
            self.assertReply(self.log_in("a", self.password, running), "235 2.7.0")

    @needs_loopbacks
    def test_a_needless_login_that_is_refused_has_a_remedy_in_the_log(self) -> None:
        with kept_log() as kept:
            client = self.come_from("127.0.0.2")
            self.assertReply(client.log_in("printer", "x"), "535 5.7.8")
            self.assertReply(client.post(), "250 2.0.0")
            self.fake.will("token", say(503))
            self.assertReply(self.come_from("127.0.0.2").log_in(USER, "x"), "454 4.7.0")
        line, temporary = kept.find("auth")
        self.assertIn("client=127.0.0.2", line[1])
        self.assertIn("no login is needed from here", line[1])
        self.assertNotIn("remedy", temporary[1])

    @needs_loopbacks
    def test_the_restrictions_of_an_account_apply_without_login(self) -> None:
        client = self.connect(self.with_accounts(
            f"[a]\n{APPLICATION}client_secret = s\nlogin = optional\nnetworks = 127.0.0.0/8\n"
            "from_email = scanner@b.c\nallowed_senders = example.com\nallowed_recipients = x.y\n"))
        self.assertReply(client.post(sender="a@b.c"), "550 5.7.1")
        self.assertReply(client.post(recipients=("a@b.c",)), "550 5.7.1")
        client.say("RSET")
        self.assertReply(client.post(), "250 2.0.0")
        self.assertEqual(self.fake.delivered[0].mailbox, "scanner@b.c")

    @needs_loopbacks
    def test_clients_refused_by_one_shared_response_have_a_remedy_of_their_own(self) -> None:
        self.fake.will("token", self.fake.hang_then(say(401, aadsts(7000215, "invalid_client"))))
        clients = [self.connect(), self.come_from("127.0.0.2")]
        with kept_log() as kept:
            for client in clients:
                client.putcmd(f"AUTH PLAIN {plain(USER, self.password).decode()}")
            self.fake.arrived.acquire()
            table = self.running.relay._tokens
            wait_for(lambda: self.running.ask(lambda: len(table._fetches)) == 1)
            self.fake.release.set()
            for client in clients:
                self.assertReply(client.next_reply(), "535 5.7.8")
        for _, text in kept.find("auth"):
            self.assertEqual("no login is needed" in text, "client=127.0.0.2" in text)

    def test_two_passwords_are_hashed_at_a_time_and_other_logins_wait(self) -> None:
        """The event loop is not blocked, and a login that gives up hashes nothing."""
        running = self.another(UPSTREAM_TIMEOUT="1.5")
        places = running.relay.authenticator._scrypt
        with hashed_passwords() as scrypt:
            for number, wanted in enumerate(("235 2.7.0", "235 2.7.0", "454 4.7.0")):
                if number:
                    places.acquire()
                reply = self.assertReply(self.log_in("scan2", running=running), wanted)
            self.assertIn("Too many logins at once", reply)
            places.release()
            self.assertReply(self.log_in("scan2", running=running), "235 2.7.0")
            self.assertEqual(scrypt.call_count, 3)


class FailureTests(AccountCase):
    """Failed logins are delayed, then their address is blocked for a while."""

    @unittest.mock.patch.object(relay, "FAILURE_DELAY", 0.5)
    def test_delays_grow_with_each_failure_until_the_address_is_blocked(self) -> None:
        clock = Clock()
        failures = relay.LoginLimiter(clock)
        guesser, other = map(relay.parse_ip_address, ("192.0.2.1", "192.0.2.2"))
        delays = []
        for _ in range(10):
            failures.check(guesser)
            delays.append(failures.add(guesser))
            clock.now += 1
        self.assertEqual(delays, [0.5 * number for number in range(1, 11)])
        with self.assertRaises(relay.TooManyFailures) as caught:
            failures.check(guesser)
        self.assertTrue(caught.exception.reply.close)
        failures.check(other)
        clock.now += 600 - 10 + 0.5         # the first failure is forgotten
        failures.check(guesser)
        self.assertEqual(failures.add(guesser), 5.0)
        clock.now += 10_000
        self.assertEqual(failures.add(guesser), 0.5)
        for number in range(10):            # a host with IPv6 has a /64 of addresses
            failures.add(relay.parse_ip_address(f"2001:db8::{number}"))
        failures.check(relay.parse_ip_address("2001:db8:0:1::1"))
        with self.assertRaises(relay.TooManyFailures):
            failures.check(relay.parse_ip_address("2001:db8::1:2:3:4"))

    @needs_loopbacks
    def test_simultaneous_guesses_above_the_limit_reveal_nothing(self) -> None:
        """Ten guesses are checked; the correct one after them gets the reply of the wrong ones."""
        clients = [self.come_from("127.0.0.8") for _ in range(40)]
        lines = [f"AUTH PLAIN {plain('scan2', password).decode()}\r\n".encode()
                 for password in ["wrong"] * 39 + [PASSWORD]]
        self.running.ask(lambda: None)      # otherwise epoll may report the last connection first
        for client, line in zip(clients, lines):
            client.sock.sendall(line)
        replies = [client.next_reply() for client in clients]
        self.assertLessEqual(sum(reply.startswith("535") for reply in replies), 12)
        self.assertReply(replies[-1], "421 4.7.0")
        self.assertGreater(replies.count(replies[-1]), 25)

    @needs_loopbacks
    def test_a_correct_secret_is_refused_after_too_many_wrong_ones(self) -> None:
        failures, address = self.running.relay.authenticator._limiter, "127.0.0.10"
        self.fake.will("token", self.fake.hang_then(self.fake.accept))
        client = self.come_from(address)
        client.putcmd(f"AUTH PLAIN {plain(USER, self.password).decode()}")
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        for _ in range(10):
            self.running.ask(functools.partial(failures.add, relay.parse_ip_address(address)))
        self.fake.release.set()
        self.assertReply(client.next_reply(), "421 4.7.0")

    @needs_loopbacks
    def test_a_blocked_address_is_disconnected_and_others_are_not_affected(self) -> None:
        begun = time.monotonic()
        with unittest.mock.patch.object(relay, "FAILURE_DELAY", 0.5):
            self.assertReply(self.log_in("scan2", "wrong"), "535 5.7.8")
        self.assertGreater(time.monotonic() - begun, 0.5)
        for _ in range(10):
            self.assertReply(self.come_from("127.0.0.9").log_in("scan2", "wrong"), "535 5.7.8")
        for user in ("scan2", USER):
            client = self.come_from("127.0.0.9")
            self.assertReply(client.log_in(user, PASSWORD), "421 4.7.0")
            self.assertEqual(client.next_reply(), "")           # the relay closes the connection
        self.assertEqual(self.fake.requests, [])
        self.assertReply(self.log_in("scan2", PASSWORD), "235 2.7.0")


ACCOUNTS_POLL_INTERVAL = relay.ACCOUNTS_POLL_INTERVAL       # before setUpModule shortens it


class ReloadTests(AccountCase):
    """ACCOUNTS_FILE can change while the relay runs."""

    def setUp(self) -> None:
        """Start a relay that has a file of its own."""
        super().setUp()
        self.path = FILES.write(f"{self.id()}.ini", ACCOUNTS)
        self.running = self.another(ACCOUNTS_FILE=self.path)

    def write(self, text: str, name: str = "") -> None:
        """Replace a file atomically."""
        path = pathlib.Path(name or self.path)
        path.with_suffix(".new").write_text(text)
        os.replace(path.with_suffix(".new"), path)

    def loaded(self) -> relay.AccountsFile:
        """Load the file as a relay does, but without polling it."""
        file = relay.AccountsFile(self.config(ACCOUNTS_FILE=self.path))
        file.load()
        return file

    def test_a_change_takes_effect_and_sessions_keep_their_account(self) -> None:
        client = self.logged_in_as("scan2")
        with kept_log() as kept:
            self.write(ACCOUNTS.replace("[scan2]", "[scan3]").replace("x.y", "z.z"))
            wait_for(lambda: kept.find("accounts=6"))
        self.assertReply(self.log_in("scan2"), "535 5.7.8")
        self.assertReply(self.log_in("scan3"), "235 2.7.0")
        self.assertReply(client.post(), "250 2.0.0")

    def test_an_invalid_version_is_reported_once_and_the_old_one_stays(self) -> None:
        with kept_log() as kept:
            for number in (1, 2):               # once after each change
                self.write(ACCOUNTS.replace("from_email", "form_email") + "[b]\nx = y\n")
                wait_for(lambda: str(kept.lines).count("x: unknown key") == number)     # noqa: B023
                self.write(ACCOUNTS.replace("[scan2]", f"[scan{number + 2}]"))
                wait_for(lambda: len(kept.find("accounts=6")) == number)      # noqa: B023
                levels = [level for level, text in kept.find("accounts-refused")
                          if "[scan2] form_email: unknown key" in text]
                self.assertEqual(levels, ["ERROR"] * number)
        self.assertReply(self.log_in("scan4"), "235 2.7.0")

    def test_an_unreadable_version_is_reported_once_and_the_old_one_stays(self) -> None:
        with kept_log() as kept:
            os.unlink(self.path)
            wait_for(lambda: "No such file" in str(kept.lines))
            watched = self.running.relay.accounts_file
            for _ in range(2):              # at the second request the first poll has ended
                self.running.ask(watched.request_reload)
                wait_for(lambda: not watched._reload.is_set())
            self.assertEqual(str(kept.lines).count("No such file"), 1)
            for data, problem in ((b"[\xff]", "UTF-8"), (b"", "contains no account")):
                pathlib.Path(self.path).write_bytes(data)
                wait_for(lambda: problem in str(kept.lines))    # noqa: B023
        self.assertReply(self.log_in("scan2"), "235 2.7.0")

    def test_a_client_secret_file_is_read_again_after_a_change(self) -> None:
        secret = FILES.write("graph-secret", "first~secret\n")
        with kept_log() as kept:
            self.write(ACCOUNTS.replace("client_secret = secret of the relay",
                                        f"client_secret_file = {secret}"))
            wait_for(lambda: kept.find("accounts=6"))
            self.assertReply(self.log_in("scan2"), "235 2.7.0")
            self.write("second~secret\n", secret)
            wait_for(lambda: len(kept.find("accounts=6")) == 2)
            os.unlink(secret)
            wait_for(lambda: "client_secret_file" in str(kept.lines))
        self.assertReply(self.log_in("scan2"), "235 2.7.0")
        self.assertEqual([login.form["client_secret"] for login in self.fake.asked("token")],
                         ["first~secret", "second~secret"])

    def test_an_unusable_client_secret_file_is_an_error_at_each_load(self) -> None:
        secret = FILES.write("faulty-secret", "")
        for name, data, word in (
                (secret, b"", "one line"), (secret, b"a\nb", "one line"),
                (secret, b"\xff", "one line"), (FILES["none"], b"", "No such file"),
                (FILES.folder, b"", "Is a directory"),
                ("a\0b", b"", "client_secret_file = a\0b: ")):
            self.write(f"[a]\n{APPLICATION}client_secret_file = {name}\npassword = {HASH}\n")
            pathlib.Path(secret).write_bytes(data)
            file = relay.AccountsFile(self.config(ACCOUNTS_FILE=self.path))
            for load in (file.load, lambda: file._poll(False)):     # noqa: B023
                with self.subTest(word), self.assertRaises(relay.ConfigError) as caught:
                    load()
                    file._poll(False)       # a first poll only notices the change
                self.assertIn(word, str(caught.exception))

    def test_a_new_time_size_or_inode_makes_the_relay_read_the_file(self) -> None:
        """The second poll that sees the same state reads the file, once."""
        path, file = pathlib.Path(self.path), self.loaded()
        self.assertLess(2.5 * ACCOUNTS_POLL_INTERVAL, 10)       # seconds; the README promises it
        for change, is_same_time in (
                (lambda: os.utime(path, (1, 1)), False),
                (lambda: os.utime(path, (2 ** 32, 2 ** 32)), False),
                (lambda: path.write_text(ACCOUNTS + "#"), True),
                (lambda: self.write(path.read_text()), True)):
            before = os.stat(path).st_mtime_ns
            change()
            if is_same_time:
                os.utime(path, ns=(before, before))
            self.assertEqual([file._poll(False) for _ in range(4)], [False, True, False, False])
        for text in (ACCOUNTS[:300], f"{ACCOUNTS}[new]\n"):     # half a file is not read
            self.write(text)
            self.assertFalse(file._poll(False))
        self.assertTrue(file._poll(False))
        self.assertEqual(len(list(file.accounts)), 7)
        self.write(ACCOUNTS)
        self.assertTrue(file._poll(True))           # SIGHUP reads it at once

    def test_a_temporary_error_is_retried_at_the_next_poll(self) -> None:
        file = self.loaded()
        self.write(f"{ACCOUNTS}[new]\n")
        file._poll(False)
        limit = relay.resource.getrlimit(relay.resource.RLIMIT_NOFILE)
        relay.resource.setrlimit(relay.resource.RLIMIT_NOFILE, (0, limit[1]))
        try:
            with self.assertRaisesRegex(relay.ConfigError, "Too many open files"):
                file._poll(False)
        finally:
            relay.resource.setrlimit(relay.resource.RLIMIT_NOFILE, limit)
        self.assertEqual([file._poll(False) for _ in range(2)], [True, False])
        self.assertEqual(len(list(file.accounts)), 7)

    def test_no_error_ends_the_polling(self) -> None:
        """The next change is loaded, whatever the error was."""
        watched = self.running.relay.accounts_file
        for error in (MemoryError("hidden"), relay.TemporaryError("x"), ValueError("hidden")):
            with kept_log() as kept, unittest.mock.patch.object(watched, "load", side_effect=error):
                self.running.ask(watched.request_reload)
                wait_for(lambda: "ERROR" in dict(kept.find("accounts-refused")))
            self.assertNotIn("hidden", str(kept.lines))
        with kept_log() as kept:
            self.write(f"{ACCOUNTS}[new]\n")
            wait_for(lambda: kept.find("accounts=7"))


@unittest.mock.patch.object(relay, "AZURE_RETRY_DELAYS", (0.0, 0.0))
class TableTests(RelayCase):
    """Accounts in an Azure table; Microsoft, "Query Entities"."""

    settings = UNHURRIED

    @classmethod
    def config(cls, **settings: str) -> relay.Config:
        """Return settings with a table that is read with a managed identity."""
        return super().config(**{
            "AZURE_TABLES_URL": f"{cls.fake.url}/account/users",
            "AZURE_POD_IDENTITY_AUTHORITY_HOST": cls.fake.url, **settings})

    def setUp(self) -> None:
        """Fill the table and start a relay whose cache is empty."""
        super().setUp()
        entry = {"tenant_id": TENANT, "client_id": CLIENT}
        self.fake.entities = dict.fromkeys(ODD_NAMES, entry)
        self.fake.entities["app1"] = {**entry, "from_email": "app1@example.com"}
        self.running = self.another()

    def test_an_account_of_the_table_logs_in_and_sends_as_its_mailbox(self) -> None:
        with kept_log() as kept:
            client = self.logged_in("app1@lookup")
        self.assertIn(" account=app1", kept.find("auth")[0][1])
        self.assertReply(client.post(b"From: X <other@b.c>\r\nTo: a@x.y\r\n\r\nText\r\n",
                                     sender="printer@x.y"), "250 2.0.0")
        delivered, = self.fake.delivered
        self.assertEqual(delivered.mailbox, "app1@example.com")
        self.assertIn(b"From: X <app1@example.com>\r\n", delivered.message)
        request, = self.fake.asked("table")
        self.assertEqual(request.path, "/account/users(PartitionKey='user',RowKey='app1')"
                                       "?$select=tenant_id%2Cclient_id%2Cfrom_email")
        self.assertEqual(request.headers["x-ms-version"], "2020-12-06")
        self.assertRegex(request.headers["x-ms-date"], r"^\w{3}, \d\d \w{3} \d{4} .* GMT$")
        self.assertEqual(request.headers["accept"], "application/json;odata=nometadata")
        self.assertIn("resource=https%3A%2F%2Fstorage.azure.com", self.fake.asked("imds")[0].path)

    def test_an_odd_name_is_escaped_in_the_request_or_refused_without_one(self) -> None:
        for names, reply, requests in (
                (ODD_NAMES, "235 2.7.0", 1), (("none", "' or 'a' eq 'a", "APP1"), "535 5.7.8", 1),
                (("a/b", "a\\b", "a#b", "a?b", "x" * 513, "\u0085"), "535 5.7.8", 0)):
            for name in names:
                with self.subTest(name):
                    before = len(self.fake.asked("table"))
                    self.assertReply(self.log_in(f"{name}@lookup"), reply)
                    self.assertEqual(len(self.fake.asked("table")) - before, requests)

    def test_accounts_and_missing_accounts_are_cached_for_a_minute(self) -> None:
        self.running.relay._table._cache._clock = clock = Clock()
        for delay, requests in ((0, 2), (0, 2), (59, 2), (2, 4)):
            clock.now += delay
            self.assertReply(self.log_in("app1@lookup"), "235 2.7.0")
            self.assertReply(self.log_in("none@lookup"), "535 5.7.8")
            self.assertEqual(len(self.fake.asked("table")), requests)

    def test_a_table_that_cannot_be_read_defers_the_login(self) -> None:
        xml = b"<?xml version=\"1.0\"?><Error><Code>AuthenticationFailed</Code></Error>"
        entry = {"tenant_id": TENANT, "client_id": CLIENT}
        for number, (word, *actions) in enumerate((
                ("AZURE_TABLES_URL", say(404, {"odata.error": {"code": "TableNotFound"}},
                                         x_ms_error_code="TableNotFound")),
                ("status=404", say(404, b"<html>")),
                ("status=403", say(403, {}, x_ms_error_code="ResourceNotFound")),
                ("Storage Table Data Reader",
                 say(403, {}, x_ms_error_code="AuthorizationPermissionMismatch")),
                ("status=403", *[say(403, xml, x_ms_error_code="AuthenticationFailed")] * 2),
                ("status=401", *[say(401, xml)] * 2),
                ("status=503", *[say(503)] * 3), ("status=429", *[say(429)] * 3),
                ("status=200", say(200, b"<html>")), ("status=200", say(200, {"value": 5})),
                ("status=200", say(200, {"value": [5]})), ("status=200", say(200, {})),
                ("log in as NAME@lookup",
                 say(200, {"value": []}, x_ms_continuation_NextPartitionKey="1")),
                ("problem=", utter(b"")),
                ("tenant_id must", say(200, {**entry, "tenant_id": "x"})),
                ("client_id must be set", say(200, {"tenant_id": TENANT})),
                ("from_email must be an address", say(200, {**entry, "from_email": "x"})))):
            with self.subTest(number, word=word), kept_log() as kept:
                self.fake.will("table", *actions)      # type: ignore[arg-type]
                self.assertReply(self.log_in(f"{number}@lookup"), "454 4.7.0")
                self.assertIn(word, kept.find("auth")[0][1])
                self.assertNotEqual(kept.find("auth")[0][0], "INFO")

    def test_temporary_errors_of_the_table_are_retried_while_there_is_time(self) -> None:
        self.fake.will("table", say(503), say(500), say(401))
        self.assertReply(self.log_in("app1@lookup"), "235 2.7.0")
        self.assertEqual(len(self.fake.asked("imds")), 2)       # with a new token
        for name, status in zip(ODD_NAMES, (429, 500, 502, 503, 504)):
            self.fake.will("table", say(status))
            self.assertReply(self.log_in(f"{name}@lookup"), "235 2.7.0")
        relay.AZURE_RETRY_DELAYS = (PATIENCE, PATIENCE)       # there is no time for a retry
        self.fake.will("table", say(503))
        with kept_log() as kept:
            self.assertReply(self.log_in("late@lookup"), "454 4.7.0")
        self.assertIn("status=503", kept.find("auth")[0][1])

    def test_neither_the_secret_nor_the_sas_is_logged(self) -> None:
        sas = "sv=2020-12-06&sp=r&sig=hid%2Fden%3D"
        own = self.another(AZURE_TENANT_ID=TENANT, AZURE_CLIENT_ID=CLIENT,
                           AZURE_CLIENT_SECRET="hidden")
        by_sas = self.another(AZURE_TABLES_URL=f"{self.fake.url}/account/users?{sas}")
        self.fake.will("token", say(401, aadsts(7000215, "invalid_client")))
        self.fake.will("table", self.fake.accept,
                       say(403, {}, x_ms_error_code="AuthenticationFailed"),
                       utter(b"garbage\r\n\r\n"))
        with kept_log() as kept:
            reply = self.assertReply(self.log_in("app1@lookup", running=own), "454 4.7.0")
            for name, wanted in (("app1", "235 2.7.0"), ("2", "454 4.7.0"), ("3", "454 4.7.0")):
                self.assertReply(self.log_in(f"{name}@lookup", running=by_sas), wanted)
        self.assertIn("own credential was refused", reply)
        self.assertNotIn("hid", str(kept.lines))
        request = self.fake.asked("table")[0]
        self.assertTrue(request.path.endswith(f"&{sas}"))
        self.assertNotIn("authorization", request.headers)      # a SAS needs no identity
        self.assertEqual(self.fake.asked("imds"), [])

    def test_the_table_can_be_the_list_of_the_applications_that_can_log_in(self) -> None:
        # If the table is not required, a login as TENANT@CLIENT does not query it.
        self.assertReply(self.log_in(f"{CLIENT}@{CLIENT}"), "235 2.7.0")
        self.assertEqual(self.fake.asked("table"), [])
        self.fake.entities = {"x": self.fake.entities["app1"]}
        for setting in ("AZURE_TABLES_FORCE_USAGE", "ACCOUNTS_REQUIRED"):
            with self.subTest(setting), kept_log() as kept:
                own = self.another(**{setting: "true"})
                self.fake.reset()
                client = self.logged_in(running=own)
                self.assertNotIn("account=", str(kept.lines))       # the account has no name
                self.assertReply(client.post(), "250 2.0.0")
                self.assertEqual(self.fake.delivered[0].mailbox, "app1@example.com")
                for user in (f"{CLIENT}@{CLIENT}", f"o'brien.example@{CLIENT}"):
                    self.assertReply(self.log_in(user, running=own), "535 5.7.8")
        path = urllib.parse.unquote(self.fake.asked("table")[0].path)
        self.assertTrue(path.startswith(
            f"/account/users()?$filter=(PartitionKey eq 'user') and (tenant_id eq '{TENANT}' or "
            f"tenant_id eq '{SHORT_TENANT}') and (client_id eq '{CLIENT}' or "
            f"client_id eq '{SHORT_CLIENT}')&$top=1&$select="), path)
        own = self.another(ACCOUNTS_REQUIRED="true", ALLOWED_TENANTS="contoso.com",
                           AZURE_TABLES_PARTITION_KEY="o'p q")
        self.fake.reset()
        for user in (USER, f"contoso.com@{CLIENT}", "app1@lookup"):
            self.assertReply(self.log_in(user, running=own), "535 5.7.8")
        by_filter, by_key = (urllib.parse.unquote(query.path) for query in self.fake.asked("table"))
        self.assertIn("(PartitionKey='o''p q',RowKey='app1')", by_key)
        self.assertIn("(PartitionKey eq 'o''p q') and ", by_filter)

    def test_the_file_takes_precedence_over_the_table(self) -> None:
        path = FILES.write("first.ini", f"[App1]\n{APPLICATION}from_email = file@example.com\n")
        own = self.another(ACCOUNTS_FILE=path)
        self.assertReply(self.logged_in("app1@lookup", running=own).post(), "250 2.0.0")
        self.assertEqual(self.fake.delivered[0].mailbox, "file@example.com")
        self.assertEqual(self.fake.asked("table"), [])
        self.assertReply(self.log_in("a.b@lookup", running=own), "235 2.7.0")

    def test_ids_in_the_table_can_have_every_form_that_a_login_accepts(self) -> None:
        tenant = "aaaaaaaa-1111-4111-8111-111111111111"
        own = self.another(ACCOUNTS_REQUIRED="true")
        for form, user in ((tenant, ""), (tenant.upper(), ""), (relay.encode_uuid(tenant), ""),
                           (f" {tenant}\n", "x@lookup")):
            client = CLIENT[:-1] + str(len(self.fake.asked("table")))
            self.fake.entities = {"x": {"tenant_id": form, "client_id": client}}
            self.assertReply(self.log_in(user or f"{tenant}@{client}", running=own), "235 2.7.0")

    def test_the_table_and_entra_share_the_deadline_of_a_login(self) -> None:
        own = self.another(AZURE_TABLES_URL=f"{self.fake.url}/account/users?sig=x")
        pool = own.relay._pool
        with unittest.mock.patch.object(pool, "send", wraps=pool.send) as send:
            self.assertReply(self.log_in("app1@lookup", running=own), "235 2.7.0")
        self.assertEqual([request.kind for request in self.fake.requests], ["table", "token"])
        first, second = send.call_args_list
        self.assertEqual(first.args[1], second.args[1])

    def test_the_relay_does_not_start_if_a_required_table_cannot_be_read(self) -> None:
        async def start() -> None:
            own = relay.Relay(self.config(AZURE_TABLES_FORCE_USAGE="true"))
            try:
                await own.start()
            finally:
                own.close()
        self.fake.will("table", say(403, {}, x_ms_error_code="AuthorizationPermissionMismatch"))
        with self.assertRaisesRegex(relay.StartError, "ACCOUNTS_REQUIRED=true, and the table "
                                    "cannot be read: .*Storage Table Data Reader"):
            asyncio.run(start())
        asyncio.run(start())
        self.assertIn("PartitionKey%20eq%20%27user%27%29&$top=1", self.fake.asked("table")[-1].path)


class SendTests(RelayCase):
    """The relay replies 250 if Graph responds 202, and only then."""

    settings = UNHURRIED

    def test_a_message_is_sent_unchanged_and_logged_with_the_id_of_its_reply(self) -> None:
        message = (b"From: Scan <scanner@example.com>\r\nTo: a@x.y\r\nSubject:  odd \t x\r\n"
                   b"\r\n.dot\r\n..\r\nna\xefve\0\r\n" + b"x" * 5000 + b"\r\n")
        with kept_log() as kept:
            reply = self.assertReply(self.logged_in().post(message), "250 2.0.0")
        request, = self.fake.asked("send")
        delivered, = self.fake.delivered
        self.assertEqual(delivered, Delivered(SENDER, message, ["a@x.y"]))
        self.assertEqual(request.path, "/v1.0/users/scanner%40example.com/sendMail")
        self.assertNotIn(b"\n", request.body)
        message_id = request.headers["client-request-id"]
        self.assertEqual(reply, f"250 2.0.0 Accepted by Microsoft 365, id {message_id}")
        (level, line), = kept.find("sent")
        self.assertEqual(level, "INFO")
        self.assertRegex(line, rf"^{message_id} sent session=[0-9a-f]{{8}} sender={SENDER} "
                               rf"recipients=1 size={len(message)} "
                               r"request-id=graph-request-1 seconds=\d+\.\d{3}$")

    def test_a_message_is_sent_from_the_mailbox_of_its_sender(self) -> None:
        """With the null reverse-path the address in From counts. URLs are percent-encoded."""
        client, head = self.logged_in(), b"From: Me <me@x.y>\r\nTo: a@x.y\r\n\r\n"
        for sender, path in (("a/b?c#d@x.y", "a%2Fb%3Fc%23d%40x.y"),
                             ("g#EXT#@x.y", "g%23EXT%23%40x.y"), ("", "me%40x.y"),
                             ('"a b"@x.y', "%22a%20b%22%40x.y"), ("$a@x.y", "%24a%40x.y")):
            with self.subTest(sender):
                self.assertReply(client.post(head, sender=sender), "250 2.0.0")
                self.assertEqual(self.fake.asked("send")[-1].path, f"/v1.0/users/{path}/sendMail")
        self.assertReply(client.post(sender=""), "550 5.1.7")
        self.assertEqual(len(self.fake.asked("send")), 5)

    @unittest.mock.patch.object(relay, "DEFAULT_RETRY_DELAY", 99.0)
    def test_each_error_of_graph_has_its_reply_and_its_line_in_the_log(self) -> None:
        client = self.logged_in()
        for status, code, wanted in GraphAnswerTests.TABLE:
            with self.subTest(f"{status} {code}"), kept_log() as kept:
                self.fake.will("send", graph_says(status, code) if code else
                               say(status, b"" if status == 204 else b"<html>oops"))
                self.open_lines()
                reply = self.assertReply(client.post(), wanted)
                message_id = self.fake.asked("send")[-1].headers["client-request-id"]
                self.assertTrue(reply.endswith(f", id {message_id}"))
                self.assertEqual(SENDER in reply, wanted in ("550 5.7.1", "550 5.1.8", "452 4.2.2",
                                                             "550 5.7.60"))
                (level, line), = kept.find("refused")
                self.assertEqual(level, "ERROR" if wanted == "554 5.3.0" else "WARNING")
                for word in (f'reply="{wanted} ', "request-id=graph-request-1", "recipients=1",
                             f"sender={SENDER}", "size=", "seconds=", "session=",
                             f"graph={code}" * bool(code)):
                    self.assertIn(word, line)
        self.assertEqual(self.fake.delivered, [])
        self.assertReply(client.post(), "250 2.0.0")

    def test_a_status_counts_even_if_the_rest_of_the_response_is_broken(self) -> None:
        """A response that breaks off before its header is complete counts only if it is a 202."""
        client, head = self.logged_in(), b"HTTP/1.1 403 No\r\n"
        cases = [(data, "451 4.4.1") for data in (
            b"", b"HTTP/1.1", b"nonsense\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 103 Early\r\n\r\n", head + b"X: " + b"y" * 70_000,
            head + b"X: y\r\n" * 200 + b"\r\n")]
        cases += [(b"HTTP/1.1 %d No\r\n%b" % (status, rest), wanted)
                  for status, wanted in ((413, "552 5.3.4"), (403, "550 5.7.1"), (500, "451 4.3.0"))
                  for rest in (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                               b"Content-Length: 50\r\n\r\n{", b"Connection: close\r\n\r\n<html>")]
        cases += [(data, "250 2.0.0") for data in (
            b"HTTP/1.1 202 Accepted\r\n", b"HTTP/1.1 202\r\n",
            b"HTTP/1.1 202 Accepted\r\nContent-Length: 50\r\n\r\nabc",
            b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 202 Accepted\r\nContent-Length: -5\r\n\r\n",
            b"HTTP/1.1 202 Accepted\r\n\x00\xff broken\r\n\r\n",
            b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\nHTTP/1.1 202 Accepted\r\n",
            b"HTTP/1.1 202 Accepted\r\nRetry-After: 9\r\n\r\n")]
        for data, wanted in cases:
            for reset in (False, True):
                with self.subTest(data[:60], reset=reset):
                    before = len(self.fake.asked("send"))
                    self.fake.will("send", utter(data, reset=reset))
                    reply = client.post()
                    # A reset can discard the status line before it is read.
                    if not reset or not reply.startswith("451 4.4.1"):
                        self.assertReply(reply, wanted)
                    self.assertEqual(len(self.fake.asked("send")), before + 1)
                    # Otherwise the next message might be sent on this closing connection.
                    number = self.fake.asked("send")[-1].connection
                    wait_for(lambda: number in self.fake.closed)    # noqa: B023

    def test_a_connection_is_not_reused_after_a_broken_body(self) -> None:
        """The rest could be read as the response to another message."""
        client = self.logged_in()
        for chunks in (b"zz\r\n", b"11170\r\n" + b"x" * 70_000 + b"\r\n0\r\n\r\n"):
            def broken(sock: socket.socket, _: Request, chunks: bytes = chunks) -> bool:
                sock.sendall(b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
                return True
            self.fake.will("send", broken)
            self.assertReply(client.post(), "550 5.7.1")
            self.assertReply(client.post(), "250 2.0.0")
            first, second = (request.connection for request in self.fake.asked("send")[-2:])
            self.assertNotEqual(first, second)

    def test_a_202_counts_at_once_although_its_body_hangs(self) -> None:
        client = self.logged_in()
        for header in (b"Content-Length: 9999\r\n", b"Connection: close\r\n",
                       b"Transfer-Encoding: chunked\r\nConnection: close\r\n"):
            head = b"HTTP/1.1 202 Accepted\r\n" + header + b"\r\n"
            for action in (trickle(head, b"1\r\nx\r\n"), self.fake.say_and_hang(head)):
                with self.subTest(header):
                    self.fake.will("send", action)
                    begun = time.monotonic()
                    self.assertReply(client.post(), "250 2.0.0")
                    self.assertLess(time.monotonic() - begun, PATIENCE / 2)
                    self.fake.reset()

    @unittest.mock.patch.object(relay, "DEFAULT_RETRY_DELAY", relay.DEFAULT_RETRY_DELAY)
    def test_only_a_request_that_cannot_have_sent_the_message_is_retried(self) -> None:
        date = email.utils.formatdate(time.time() + 1, usegmt=True)
        unauthorized = graph_says(401, "ErrorAccessDenied")     # with 401 the code does not matter
        self.assertEqual(relay.DEFAULT_RETRY_DELAY, 5)
        # The delay without Retry-After, the responses, the reply, send and token requests.
        for delay, actions, wanted, sends, tokens in (
                (99, (self.fake.expire,), "250 2.0.0", 2, 2),
                (99, (unauthorized,) * 5, "451 4.7.0", 2, 2),
                (99, (graph_says(429, "X", retry_after="0"),), "250 2.0.0", 2, 1),
                (99, (graph_says(429, "X", retry_after=date),), "250 2.0.0", 2, 1),
                (99, (say(503, retry_after="0.2"),), "250 2.0.0", 2, 1),
                (0.2, (graph_says(429, "X"),), "250 2.0.0", 2, 1),
                (0.2, (graph_says(429, "X", retry_after="soon"),), "250 2.0.0", 2, 1),
                (99, (graph_says(429, "X"),), "451 4.4.5", 1, 1),
                (99, (graph_says(429, "X", retry_after="99"),), "451 4.4.5", 1, 1),
                (0.2, (say(503),), "451 4.3.0", 1, 1),
                (99, (say(503, retry_after="99"),), "451 4.3.0", 1, 1),
                (99, (say(500, retry_after="0"),), "451 4.3.0", 1, 1),
                (99, (say(504, retry_after="0"),), "451 4.3.0", 1, 1),
                (99, (utter(b""),), "451 4.4.1", 1, 1)):
            with self.subTest(wanted=wanted, sends=sends):
                self.fake.reset()
                self.open_lines()
                self.password += "."
                relay.DEFAULT_RETRY_DELAY = delay
                self.fake.will("send", *actions)
                begun = time.monotonic()
                self.assertReply(self.logged_in().post(), wanted)
                self.assertLess(time.monotonic() - begun, PATIENCE / 2)
                if (sends, tokens) == (2, 1):
                    self.assertGreaterEqual(time.monotonic() - begun, 0.2)
                self.assertEqual([len(self.fake.asked(name)) for name in ("send", "token")],
                                 [sends, tokens])
                self.assertEqual(len(self.fake.delivered), wanted == "250 2.0.0")

    def test_a_session_renews_its_token_and_ends_when_a_renewal_is_refused(self) -> None:
        self.fake.will("token", say(200, {"access_token": "short", "expires_in": 300}))
        client = self.logged_in()
        self.assertReply(client.post(), "250 2.0.0")
        self.assertEqual(len(self.fake.asked("token")), 2)
        refused = say(401, aadsts(7000222, "invalid_client"))
        for action, wanted in ((say(503), "451 4.7.0"), (refused, "421 4.7.0")):
            self.assertReply(client.post(), "250 2.0.0")
            self.fake.will("send", self.fake.expire)
            self.fake.will("token", action)
            self.assertReply(client.post(), wanted)
        self.assertEqual(client.next_reply(), "")
        self.assertIn("AADSTS7000222", self.assertReply(
            self.connect().log_in(password=self.password), "535 5.7.8"))

    def test_a_429_defers_all_messages_of_its_mailbox_and_no_others(self) -> None:
        """Waiting and later messages are deferred at once, without a request for each."""
        clients, go = [self.begun() for _ in range(7)], threading.Event()

        def throttle(sock: socket.socket, request: Request) -> bool:
            self.fake.arrived.release()
            go.wait(PATIENCE)
            return graph_says(429, "X", retry_after="99")(sock, request)
        self.fake.will("send", throttle, *[self.fake.hang_then(self.fake.accept)] * 3)
        for number, client in enumerate(clients):
            client.send(f"{number}\r\n.\r\n".encode())
        for _ in range(4):
            self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        wait_for(lambda: self.running.waiting() == 3)
        go.set()
        wait_for(lambda: not self.running.waiting())
        self.fake.release.set()
        self.assertEqual(sorted(client.getreply()[0] for client in clients), [250] * 3 + [451] * 4)
        for _ in range(3):
            self.assertReply(self.logged_in().post(), "451 4.4.5")
        self.assertEqual(len(self.fake.asked("send")), 4)
        self.assertReply(self.logged_in().post(sender="other@example.com"), "250 2.0.0")

    def test_a_burst_above_the_rate_limit_is_sent_after_waiting(self) -> None:
        """Microsoft accepts 8 messages, then none for half a second from the next request on."""
        opens_at, taken, refused = 0.0, itertools.count(1), []

        def limit(sock: socket.socket, request: Request) -> bool:
            nonlocal opens_at
            with self.fake._lock:
                is_open = time.monotonic() >= opens_at
                if is_open and next(taken) % 8 == 0:
                    opens_at = math.inf
                elif opens_at == math.inf:
                    opens_at = time.monotonic() + 0.5
            if is_open:
                return self.fake.accept(sock, request)
            refused.append(request)
            return graph_says(429, "ApplicationThrottled", retry_after="0.5")(sock, request)

        def send(number: int) -> list[str]:
            client = self.logged_in()
            return [client.post(f"Subject: {number}.{k}\r\n\r\n".encode()) for k in range(5)]
        self.fake.will("send", *[limit] * 1000)
        replies = at_once(send, {str(number): (number,) for number in range(8)})
        for reply in itertools.chain.from_iterable(replies.values()):
            self.assertReply(reply, "250 2.0.0")
        self.assertEqual(len({delivered.message for delivered in self.fake.delivered}), 40)
        self.assertEqual(len(self.fake.delivered), 40)
        # Each time only requests under way are refused; the others wait until it is over.
        self.assertLessEqual(len(refused), 4 * 5)
        self.assertGreater(len(refused), 0)

    @unittest.mock.patch.object(relay, "DEFAULT_RETRY_DELAY", 99.0)
    def test_the_longest_retry_after_counts_up_to_half_an_hour(self) -> None:
        """It also defers messages that already wait."""
        for longest in ("99", "999999999"):
            self.open_lines()
            self.fake.reset()
            clients = [self.begun() for _ in range(3)]
            for client, seconds in zip(clients, ("1", longest, "0")):
                self.fake.will("send", self.fake.hang_then(
                    graph_says(429, "X", retry_after=seconds)))
                client.send(seconds.encode() + b"\r\n.\r\n")
                self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
            self.fake.release.set()
            for client in clients:
                self.assertReply(client.next_reply(), "451 4.4.5")
            self.assertReply(self.logged_in().post(), "451 4.4.5")
            self.assertEqual(len(self.fake.asked("send")), 3)
            self.assertLessEqual(self.running.ask(lambda: self.running.relay._graph.throttled_for(
                (TENANT, CLIENT, SENDER))), 1800)

    def test_an_idle_connection_is_closed_after_the_keepalive_timeout(self) -> None:
        with unittest.mock.patch.object(relay, "KEEPALIVE_TIMEOUT", 0.1):
            client = self.logged_in()
            wait_for(lambda: self.fake.requests[0].connection in self.fake.closed)
        self.assertReply(client.post(), "250 2.0.0")

    def test_a_request_that_is_cut_off_while_written_is_sent_again(self) -> None:
        """A reused connection is replaced once; the message cannot have been sent yet."""
        client = self.logged_in()
        for times, wanted in ((2, "451 4.4.1"), (1, "250 2.0.0")):
            # This leaves an idle connection whose send buffer is still smaller than 4 MB.
            self.assertReply(client.post(), "250 2.0.0")
            self.fake.requests.clear()
            self.fake.will("send", *[BeforeBody(utter(b"", reset=True))] * times)
            self.assertReply(client.post(BULKY + b"%d" % times), wanted)
            self.assertEqual(len(self.fake.asked("send")), 2)

    def test_clients_that_wait_for_one_token_get_replies_with_their_own_ids(self) -> None:
        clients = [self.logged_in() for _ in range(2)]
        self.running.ask(self.running.relay._tokens._results._values.clear)
        self.fake.will("token", self.fake.hang_then(say(503)))
        waiting = [begin_message(client, SIMPLE) for client in clients]
        free = self.running._config.max_memory_for_messages - 2 * len(SIMPLE)
        wait_for(lambda: self.running.ask(lambda: self.running.relay.memory.free <= free))
        self.fake.release.set()
        for client in waiting:
            reply = self.assertReply(client.hear(), "451 4.7.0")
            self.assertEqual(len(re.findall(", id [0-9a-f-]{36}", reply)), 1)

    def test_a_response_before_the_end_of_the_request_counts(self) -> None:
        """There is no second request, although the connection was a reused one."""
        client = self.logged_in()
        for status, wanted in ((413, "552 5.3.4"), (202, "250 2.0.0")):
            with self.subTest(status):
                self.assertReply(client.post(), "250 2.0.0")        # leaves an idle connection
                before = len(self.fake.asked("send"))
                self.fake.will("send", BeforeBody(utter(
                    b"HTTP/1.1 %d Early\r\nContent-Length: 0\r\n\r\n" % status)))
                reply = client.post(BULKY)
                if reply.startswith("451 4.4.1"):
                    self.skipTest("the kernel discarded the response because of the reset")
                self.assertReply(reply, wanted)
                self.assertEqual(len(self.fake.asked("send")), before + 1)

    def test_a_mailbox_sends_four_messages_at_a_time_and_others_wait(self) -> None:
        self.fake.will("send", *[self.fake.hang_then(self.fake.accept)] * 4)
        messages = [begin_message(self.logged_in(), b"", sender)
                    for sender in (SENDER, SENDER.title()) * 5]     # the same mailbox
        for _ in range(4):
            self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        # Waiting messages hold no thread.
        wait_for(lambda: calls_under_way() == 4)
        # Another mailbox does not wait.
        self.assertReply(self.logged_in().post(sender="other@example.com"), "250 2.0.0")
        another = self.connect()        # nor does another application
        another.log_in(f"{TENANT}@{TENANT}", self.password)
        self.assertReply(another.post(), "250 2.0.0")
        self.assertEqual(len(self.fake.asked("send")), 6)
        self.fake.release.set()
        for message in messages:
            self.assertReply(message.hear(), "250 2.0.0")
        self.assertEqual(self.fake.most_busy, 4)

    def test_an_idle_connection_is_checked_before_it_is_reused(self) -> None:
        """The server has closed it, or shut down its side, or sent an unexpected response."""
        def speak() -> None:
            for sock in list(self.fake._sockets):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(b"HTTP/1.1 408 Time-out\r\n\r\n")
        client = self.logged_in()
        half_close = functools.partial(self.fake.drop_connections, socket.SHUT_WR)
        for change in (self.fake.drop_connections, half_close, speak):
            self.assertReply(client.post(), "250 2.0.0")
            change()
            self.assertReply(client.post(), "250 2.0.0")
            first, second = self.fake.asked("send")[-2:]
            self.assertNotEqual(first.connection, second.connection)

    def test_a_slow_error_body_is_read(self) -> None:
        body = json.dumps({"error": {"code": "ErrorQuotaExceeded"}}).encode()

        def slow(sock: socket.socket, request: Request) -> bool:
            sock.sendall(b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n" % len(body))
            time.sleep(relay.ACCEPTED_BODY_TIMEOUT + 0.2)
            sock.sendall(body)
            return True
        self.fake.will("send", slow)
        self.assertReply(self.logged_in().post(), "452 4.2.2")

    def test_a_message_goes_to_the_recipients_of_the_envelope_and_nobody_else(self) -> None:
        client = self.logged_in()
        for header, recipients in (
                ("To: a@x.y, b@x.y", ("a@x.y", "b@x.y")),
                ("To: Ann <a@x.y>", ("a@x.y", "hidden@x.y")),
                ("To: a@x.y", ("hidden@x.y",)), ("Subject: x", ("a@x.y",)),
                ("To: a@x.y\r\nBcc: h@x.y", ("a@x.y", "h@x.y")),
                ("To: a@x.y, other@x.y\r\nCc: more@x.y", ("a@x.y",)),
                ("To: =?utf-8?B?w7w=?= <a@x.y>\r\n ,\r\n o@x.y", ("A@X.Y",)),
                ("To: \xfc\xff <a@x.y>, o@x.y", ("a@x.y",))):
            with self.subTest(header):
                self.assertReply(client.post(header.encode("latin-1") + b"\r\n\r\nText\r\n",
                                             recipients=recipients), "250 2.0.0")
                self.assertEqual(self.fake.delivered[-1].recipients,
                                 sorted(address.lower() for address in recipients))

    def test_a_refused_message_does_not_affect_the_next_one(self) -> None:
        client = self.logged_in()
        self.fake.will("send", graph_says(404, "ErrorInvalidUser"))
        self.assertReply(client.post(b"\r\nfirst\r\n", "b@x.y", ("b@x.y",)), "550 5.1.8")
        self.assertReply(client.post(b"\r\nsecond\r\n"), "250 2.0.0")
        self.assertEqual(self.fake.delivered, [Delivered(
            SENDER, b"From: scanner@example.com\r\nBcc: a@x.y\r\n\r\nsecond\r\n",
            ["a@x.y"])])


class LargeMessageTests(RelayCase):
    """A message too large for one request is sent as a draft, completely or not at all."""

    settings = {"UPSTREAM_TIMEOUT": "30"}

    def post(self, client: Client, message: bytes = LARGE, *recipients: str) -> str:
        return client.post_octets(message, SENDER, recipients or ("a@x.y",))

    def test_a_large_message_becomes_a_draft_with_all_its_parts(self) -> None:
        small, small_data = scan(100_000, "image/tiff", "=?utf-8?B?w7w=?=.tif")
        image, image_data = scan(3_130_000, "image/png", "logo.png")
        message = crlf(multipart(
            "mixed", multipart("related", HTML, f"Content-ID: <logo@x.y>\n{image}"), small, SCAN,
            header=NAMED + "Subject: =?utf-8?B?w7w=?=\nX-Scanner: 7\nReply-To: r@x.y\n"))
        with kept_log() as kept:
            reply = self.assertReply(self.post(self.logged_in(), message, "a@x.y", "h@x.y"),
                                     "250 2.0.0")
        draft, = self.fake.sent_drafts
        self.assertEqual((draft.mailbox, draft.recipients), (SENDER, ["a@x.y", "h@x.y"]))
        self.assertEqual(draft.properties["subject"], "\u00fc")
        self.assertEqual(draft.properties["body"]["contentType"], "HTML")
        self.assertEqual([item for item, _ in draft.files], [
            {"name": "logo.png", "contentType": "image/png", "isInline": True,
             "contentId": "logo@x.y"},
            {"name": "\u00fc.tif", "contentType": "image/tiff"},
            {"name": "scan.pdf", "contentType": "application/pdf"}])
        self.assertTrue([data for _, data in draft.files] == [image_data, small_data, SCAN_OCTETS])
        self.assertEqual([request.kind for request in self.fake.requests],
                         ["token", "draft", "open", "put", "put", "attach", "open", "put",
                          "put", "send-draft"])
        self.assertEqual(self.fake.deleted, [])
        self.assertEqual({request.headers["user-agent"] for request in self.fake.requests},
                         {relay.USER_AGENT})
        # All requests have the same id. The upload has none, because it goes to another host.
        message_id = reply.rpartition(" ")[2]
        for request in self.fake.requests[1:]:
            self.assertEqual(request.headers.get("client-request-id"),
                             message_id if request.kind != "put" else None)
        (_, line), = kept.find("sent")
        self.assertTrue(line.startswith(f"{message_id} sent "))
        self.assertIn(f" size={len(message) + len('Bcc: h@x.y') + 2} attachments=3 ", line)

    def test_the_limits_of_one_request_and_of_an_upload_session_are_exact(self) -> None:
        client, head = self.logged_in(), crlf(NAMED + "Content-Type: text/plain\n\n")
        for size, *kinds in ((3_145_728, "send"), (3_145_729, "draft", "send-draft"),
                             (3_129_999, "draft", "attach", "send-draft"),
                             (3_130_000, "draft", "open", "put", "put", "send-draft")):
            self.fake.reset()
            file, data = scan(size, name="\u20ac" * 250)
            is_file = len(kinds) > 2
            self.assertReply(self.post(client, crlf(multipart(
                "mixed", file, header=NAMED)) if is_file else
                head + b"x" * (size - len(head) - 2) + b"\r\n"), "250 2.0.0")
            self.assertEqual([request.kind for request in self.fake.requests
                              if request.kind != "token"], kinds)
            if is_file:
                self.assertTrue(self.fake.sent_drafts[0].files[0][1] == data)
            elif kinds == ["send"]:
                self.assertEqual(len(self.fake.requests[-1].body), 4_194_304)

    def test_line_breaks_in_base64_do_not_become_empty_chunks(self) -> None:
        head, _, text = SCAN.partition("\n\n")
        message = crlf(multipart("mixed", f"{head}\n\n" + "\n" * 2_000_000 + text, header=NAMED))
        self.assertReply(self.post(self.logged_in(), message), "250 2.0.0")
        self.assertTrue(self.fake.sent_drafts[0].files[0][1] == SCAN_OCTETS)
        self.assertEqual(len(self.fake.asked("put")), 2)

    def test_a_response_that_repeats_a_long_text_is_read(self) -> None:
        for text in ("<\u00fc>" * 900_000, "<" * 3_200_000):
            self.fake.reset()
            message = crlf(NAMED + "Content-Type: text/html\n\n" + text + "\n")
            self.assertReply(self.post(self.logged_in(), message), "250 2.0.0")
            self.assertTrue(self.fake.sent_drafts[0].properties["body"]["content"] == text + "\r\n")

    def test_a_message_that_a_draft_cannot_hold_is_refused_without_a_request(self) -> None:
        client = self.logged_in()
        message = crlf(multipart("signed", PLAIN, SCAN, header=NAMED))
        self.assertIn("is signed", self.assertReply(self.post(client, message), "552 5.3.4"))
        self.assertEqual([request.kind for request in self.fake.requests], ["token"])
        self.assertReply(client.post(), "250 2.0.0")

    def test_the_memory_of_a_disconnected_client_is_released(self) -> None:
        client, memory = self.begun(), self.running.server._relay.memory
        client.send(b"x" * 1000 + b"\r\nx")
        wait_for(lambda: memory.free < 268_435_456)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        wait_for(lambda: memory.free == 268_435_456)

    def test_too_little_memory_is_logged_as_a_warning_and_a_client_error_as_info(self) -> None:
        client, memory = self.logged_in(), self.running.server._relay.memory
        self.running.ask(lambda: memory.reserve(268_435_456))
        self.addCleanup(self.running.ask, lambda: memory.reserve(-268_435_456))
        with kept_log() as kept:
            self.assertReply(client.say(f"MAIL FROM:<{SENDER}> SIZE=1"), "452 4.3.1")
            self.assertReply(client.say("MAIL FROM:<a>"), "501 5.1.7")
        self.assertEqual([level for level, _ in kept.find("refused")], ["WARNING", "INFO"])

    def test_a_message_is_deferred_if_a_delay_leaves_too_little_time(self) -> None:
        """A tenth of UPSTREAM_TIMEOUT must be left, or the request might be cut off."""
        client = self.logged_in()
        self.fake.will("send", graph_says(429, "X", retry_after="28.5"))
        begun = time.monotonic()
        for _ in range(2):
            self.assertReply(client.post(), "451 4.4.5")
        self.assertLess(time.monotonic() - begun, PATIENCE)
        self.assertEqual(len(self.fake.asked("send")), 1)


NOT_FOUND = graph_says(404, "ErrorItemNotFound")
SOON = graph_says(429, "X", retry_after="0")


@unittest.mock.patch.multiple(
    relay, GRAPH_MESSAGE_LIMIT=31_457, LARGE_ATTACHMENT=31_300, UPLOAD_CHUNK=39_322,
    MIN_RETRY_DELAY=0.01, DRAFT_RETRY_DELAYS=(0.01, 0.02))
class DraftFaultTests(RelayCase):
    """Each step of a large message can fail: reply, requests, deletion and log."""

    settings = {"UPSTREAM_TIMEOUT": "30"}
    UPLOADED = scan(32_000)[0]          # two chunks
    MESSAGE = crlf(multipart("mixed", PLAIN, PDF, UPLOADED, header=NAMED))
    # In the response to "open" these are not valid upload URLs.
    BAD_URLS = ("http://outlook.office.com/x", "ftp://127.0.0.1/x", "//127.0.0.1/x", "", 5, None,
                "http://u:p@127.0.0.1/upload/0", "http://127.0.0.1:0/x", "http://127.0.0.1:99999/x",
                "http://127.0.0.1/a b", "http://127.0.0.1/\r\nX: y", "https://", "http://[::1",
                "https://\u00fc", "http://x/?authtoken=a%2Fb")
    # The steps, the responses to them, the reply, and the number of requests of the step.
    TABLE: tuple[tuple[str, tuple[Action, ...], str, int], ...] = (
        ("draft attach open put send-draft", (graph_says(403, "ErrorQuotaExceeded"),),
         "452 4.2.2", 1),
        ("draft attach open put send-draft", (say(413),),
         "552 5.3.4 Message too big for Microsoft", 1),
        ("draft attach open put send-draft", (say(500),), "451 4.3.0", 1),
        ("draft attach open put send-draft", (utter(b""),), "451 4.4.1", 1),
        ("draft attach open put send-draft", (say(429, retry_after="99"),), "451 4.4.5", 1),
        ("draft attach open send-draft", (graph_says(400, "BadRequest"),), "554 5.6.0", 1),
        ("draft attach open send-draft", (say(302),), "554 5.3.0", 1),
        ("send-draft", (say(200),), "554 5.3.0", 1),
        ("draft", (graph_says(404, "ErrorInvalidUser"),), "550 5.1.8", 1),
        # The upload goes to Exchange without a token, so its statuses say nothing about access.
        ("put", (graph_says(400, "BadRequest"),), "451 4.3.0", 1),
        ("put", (say(302),), "451 4.3.0", 1), ("put", (say(401),), "451 4.3.0", 1),
        ("put", (say(404),), "451 4.3.0", 1),
        # A missing permission is not remembered.
        ("draft attach open", (graph_says(403, "ErrorAccessDenied"),),
         "552 5.3.4 Message size exceeds 3 MB; grant the application the permission "
         "Mail.ReadWrite for scanner@example.com", 1),
        ("send-draft", (graph_says(403, "ErrorAccessDenied"),), "550 5.7.1", 1),
        # Not all servers have the new draft yet; the mailbox existed a moment ago.
        ("attach open send-draft", (NOT_FOUND, NOT_FOUND), "250 2.0.0", 3),
        ("attach open send-draft", (NOT_FOUND,) * 5, "451 4.3.0", 3),
        ("attach open send-draft", (graph_says(404, "ErrorInvalidUser"),) * 5, "451 4.3.0", 3),
        # A retry is harmless.
        ("draft attach open put send-draft", (SOON,), "250 2.0.0", 2),
        ("draft attach open put send-draft", (say(503, retry_after="0.1"),), "250 2.0.0", 2),
        # Invalid bodies.
        *(("draft", (say(201, body),), "451 4.4.1", 1) for body in (
            b"", {"id": 5}, {"id": ""}, b"[" * 1000, {"id": "\ud800"}, {"id": "a b"})),
        *(("open", (say(201, body),), "451 4.4.1", 1) for body in (
            b"{", [], *({"uploadUrl": url} for url in (*BAD_URLS, "https://localhost/a")))),
        *(("put", (say(200, body),), "451 4.4.1", 1) for body in (
            {"NextExpectedRanges": ["5"]}, {"nextExpectedRanges": ["0-"]})))

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.fake.least_upload = 20_971

    def post(self, client: Client) -> str:
        self.open_lines()
        return client.post_octets(self.MESSAGE, SENDER, ["a@x.y"])

    def test_each_failure_of_a_step_has_its_reply_and_no_secret_is_logged(self) -> None:
        client = self.logged_in()
        with kept_log() as all_kept:
            for steps, actions, wanted, requests in self.TABLE:
                for step in steps.split():
                    with self.subTest(step, wanted=wanted), kept_log() as kept:
                        self.fake.reset()
                        self.fake.will(step, *actions)
                        self.assertTrue(self.post(client).startswith(f"{wanted} "), wanted)
                        is_sent = wanted == "250 2.0.0"
                        asked = self.fake.asked(step)
                        self.assertEqual(len(asked), requests + (is_sent and step == "put"))
                        self.assertEqual(len(self.fake.deleted), not is_sent and step != "draft")
                        self.assertEqual([draft.sent for draft in self.fake.drafts.values()],
                                         [True] * is_sent)
                        self.assertEqual(self.fake.asked("other"), [])
                        self.assertEqual(len(kept.find("sent")), is_sent)
                        self.assertEqual([f' reply="{wanted}' in line for _, line in
                                          kept.find("refused")], [True] * (not is_sent))
        shown = repr(all_kept.lines)
        for hidden in ("draft-left", "authtoken", "a%2Fb", self.password, "token-", "Hello",
                       "JVBER"):
            self.assertNotIn(hidden, shown)

    def test_other_statuses_of_success_are_accepted(self) -> None:
        self.fake.will("draft", say(200, {"id": "x"}))
        self.fake.will("attach", say(200, {"id": "x"}))
        self.fake.will("open", say(200, {"uploadUrl": self.fake.upload_url.format(0)}))
        self.fake.will("put", say(202), say(202))
        self.fake.will("send-draft", say(202))
        self.assertReply(self.post(self.logged_in()), "250 2.0.0")

    def test_each_step_renews_an_expired_token(self) -> None:
        for step in ("draft", "attach", "open", "send-draft", "delete"):
            with self.subTest(step):
                client = self.logged_in()
                self.fake.reset()
                self.fake.will(step, self.fake.expire)
                self.fake.will("put", *[say(500)] * (step == "delete"))
                self.assertReply(self.post(client), "451" if step == "delete" else "250")
                self.assertEqual([len(self.fake.asked(name)) for name in (step, "token")], [2, 1])

    def test_the_draft_of_a_failed_message_is_deleted_or_the_log_says_why_not(self) -> None:
        client = self.logged_in()
        # The responses, the number of requests and of drafts left, and the log.
        for actions, requests, left, logged in (
                ((), 1, 0, ""), ((NOT_FOUND,), 1, 1, ""),      # it was sent after all
                ((SOON, SOON), 3, 0, ""),
                ((say(500),), 1, 1, 'reply="451 4.3.0'), ((utter(b""),), 1, 1, 'reply="451 4.4.1'),
                ((graph_says(403, "ErrorAccessDenied"),), 1, 1, "Mail.ReadWrite")):
            with self.subTest(requests=requests, logged=logged), kept_log() as kept:
                self.fake.reset()
                self.fake.will("put", say(500))
                self.fake.will("delete", *actions)
                self.assertReply(self.post(client), "451 4.3.0")
                self.assertEqual(len(self.fake.asked("delete")), requests)
                self.assertEqual(len(self.fake.drafts), left)
                self.assertEqual([(level, logged in line) for level, line in
                                  kept.find("draft-left")], [("WARNING", True)] * bool(logged))

    def test_no_message_stays_in_memory_after_its_reply(self) -> None:
        """It is freed without a garbage collection, which might not run for a long time."""
        client, large = self.logged_in(), self.MESSAGE
        signed = large.replace(b"multipart/mixed", b"multipart/signed")

        def held() -> list[object]:
            return [item for item in gc.get_objects() if isinstance(item, relay.HttpRequest)
                    or (isinstance(item, relay.Envelope) and item.message)]
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        for name, step, action, message, wanted in (
                ("refused", "", None, signed, "552"), ("junk", "draft", utter(b"x"), large, "451"),
                ("error", "put", say(500), large, "451"),
                ("reset", "put", utter(b""), large, "451"),
                ("early reset", "put", BeforeBody(utter(b"", reset=True)), large, "451"),
                ("reset", "send", utter(b""), b"\r\n", "451"),
                ("error", "send", say(500), b"\r\n", "451"),
                ("renewal", "send", self.fake.expire, b"\r\n", "451"),
                ("sent", "", None, large, "250")):
            with self.subTest(name, step=step):
                self.fake.will(step, *([action] if action else []))
                self.fake.will("token", *([say(503)] if name == "renewal" else []))
                self.assertEqual(client.post_octets(message, SENDER, ["a@x.y"])[:3], wanted)
                wait_for(lambda: not held())            # the reply is sent a moment before
        self.assertEqual(self.running.ask(lambda: self.running.server._relay.memory.free),
                         268_435_456)

    def test_only_valid_upload_urls_and_ranges_are_accepted(self) -> None:
        for url, is_good in (("https://outlook.office.com/a?b=c", True), ("https:///a", False),
                             ("http://127.0.0.1/a", True), ("http://10.0.0.1/a", False)):
            session = response(201, {"uploadUrl": url})
            self.assertEqual(relay.parse_upload_url(session), url * is_good)
        for ranges, wanted in ((["7"], 7), (["7-"], 7), (["7-9"], 7), ([7], 7), ([], None),
                               (["x"], None), ("7", None)):
            for name in ("NextExpectedRanges", "nextExpectedRanges"):
                self.assertEqual(relay.parse_next_range(response(200, {name: ranges})), wanted)
        self.assertIsNone(relay.parse_next_range(response(201)))


class SlowUploadTests(RelayCase):
    """UPSTREAM_TIMEOUT includes the upload of a file."""

    def test_a_draft_is_not_sent_shortly_before_the_deadline(self) -> None:
        """If the request were cut off, it would be unknown whether the message was sent."""
        config = self.config(UPSTREAM_TIMEOUT="86400")      # a tenth of it must be left
        pool = relay.HttpPool([self.fake.url])
        graph = relay.GraphClient(config, pool, relay.Tokens(config, pool))
        envelope = relay.Envelope(SENDER, {"a@x.y": "a@x.y"}, bytearray(LARGE))
        draft = relay.prepare_message(envelope, TEST_PRINCIPAL, config).draft
        now = time.monotonic()
        context = relay.RequestContext(
            relay.Application(TENANT, CLIENT, self.password), SENDER, "id",
            now + 2 * PATIENCE, now + PATIENCE, ("", "", ""))

        def take_long(sock: socket.socket, request: Request) -> bool:
            object.__setattr__(context, "send_before", now)
            return self.fake.accept(sock, request)
        self.fake.will("put", take_long)
        with self.assertRaises(relay.UpstreamUnavailable):
            assert draft is not None
            asyncio.run(graph._send_draft(context, draft))
        self.assertEqual((self.fake.drafts, self.fake.asked("send-draft")), ({}, []))
        self.assertEqual(len(self.fake.deleted), 1)
        pool.close()


class LimiterTests(unittest.TestCase):
    """A mailbox always has REQUESTS_AT_ONCE slots, whatever is cancelled."""

    @contextlib.asynccontextmanager
    async def full(self) -> AsyncIterator[relay.MailboxLimiter]:
        """Provide a limiter with all slots in use."""
        limiter = relay.MailboxLimiter()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(relay.REQUESTS_AT_ONCE):
                await stack.enter_async_context(limiter.slot(0.0, is_live=True))
            yield limiter

    def test_clients_get_slots_in_order_of_arrival_and_the_queue_gets_them_last(self) -> None:
        async def work(limiter: relay.MailboxLimiter, name: str, order: list[str]) -> None:
            async with limiter.slot(time.monotonic() + PATIENCE, is_live=name != "q"):
                order.append(name)

        async def play(cancelled: set[int]) -> str:
            order: list[str] = []
            async with self.full() as limiter:
                tasks = [asyncio.ensure_future(work(limiter, name, order)) for name in "1q23456"]
                await asyncio.sleep(0)
            # The first four have a slot, but have not run since.
            for number in cancelled:
                tasks[number].cancel()
            _, late = await asyncio.wait(tasks, timeout=PATIENCE / 2)
            self.assertEqual((late, limiter.in_use), (set(), 0))
            return "".join(order)
        for cancelled, order in ((set[int](), "123456q"), ({0}, "23456q"), ({0, 2, 3, 4}, "56q"),
                                 ({1}, "123456"), ({6}, "12345q")):
            with self.subTest(cancelled):
                self.assertEqual(asyncio.run(play(cancelled)), order)

    def test_a_message_that_gets_no_slot_does_not_stay_in_memory(self) -> None:
        """It is freed without a garbage collection."""
        async def wait(limiter: relay.MailboxLimiter, message: relay.Envelope) -> None:
            async with limiter.slot(time.monotonic() + 0.02, is_live=True):
                self.fail(f"a fifth slot, {message}")

        async def play() -> bool:
            message = relay.Envelope("")
            held = weakref.ref(message)
            async with self.full() as limiter:
                with self.assertRaises(relay.TemporaryError) as caught:
                    await wait(limiter, message)
                self.assertEqual(str(caught.exception.reply)[:9], "451 4.4.5")
                del message, caught
            await asyncio.sleep(0)              # the current step still refers to the future
            return held() is not None
        gc.disable()
        self.addCleanup(gc.enable)
        self.assertFalse(asyncio.run(play()))

    def test_no_slot_is_lost_by_cancellations_and_timeouts(self) -> None:
        async def play() -> int:
            limiter, busy, peak = relay.MailboxLimiter(), 0, 0
            chance = random.Random(7)

            async def worker() -> None:
                nonlocal busy, peak
                with contextlib.suppress(relay.TemporaryError, asyncio.CancelledError):
                    async with limiter.slot(time.monotonic() + chance.random() / 50,
                                            is_live=chance.random() < 0.8):
                        busy += 1
                        peak = max(peak, busy)
                        try:
                            await asyncio.sleep(chance.random() / 200)
                        finally:
                            busy -= 1

            for _ in range(30):
                tasks = [asyncio.ensure_future(worker()) for _ in range(40)]
                await asyncio.sleep(chance.random() / 100)
                for task in chance.sample(tasks, 12):
                    task.cancel()
                await asyncio.wait(tasks)
            self.assertEqual((busy, limiter.in_use), (0, 0))
            return peak
        self.assertEqual(asyncio.run(play()), relay.REQUESTS_AT_ONCE)


class SpoolTests(SpoolCase):
    """A message that Microsoft cannot accept now is on disk before its client gets 250."""

    def test_a_message_is_queued_and_sent_later(self) -> None:
        client = self.log_in_to(self.start())
        self.be_down()
        with kept_log() as kept:
            reply = self.assertReply(self.post(client), "250 2.0.0")
            message_id = re.fullmatch("250 2.0.0 Queued, id ([0-9a-f-]{36})", reply)[1]
            path, message = self.only()
            self.assertEqual((path.stem, message.recipients), (message_id, ["a@x.y"]))
            for file in self.queue.iterdir():
                self.assertEqual(file.stat().st_mode & 0o777, 0o600)
                for hidden in (self.password.encode(), plain(USER, self.password), b"token-"):
                    self.assertNotIn(hidden, file.read_bytes())
            stored = path.with_suffix(".eml").read_bytes()
            wait_for(lambda: self.only()[1].attempts > 3)
            self.assertRegex(self.only()[1].reason, "^451 4.3.0 ")
            self.be_up()
            self.wait_until_empty()
        sent, = self.fake.delivered
        self.assertEqual((sent.recipients, sent.message), (["a@x.y"], stored))  # RFC 5322 on disk
        self.assertEqual({request.headers["client-request-id"]
                          for request in self.fake.asked("send")}, {message_id})
        (level, line), = kept.find("queued")
        self.assertEqual((level, line.split()[0]), ("WARNING", message_id))
        self.assertIn('reply="451 4.3.0', line)
        self.assertRegex(kept.find("sent")[0][1], rf"^{message_id} sent sender={SENDER} "
                         rf"recipients=1 size=\d+ attempts={len(self.fake.asked('send'))} "
                         r"request-id=graph-request-1 queued-seconds=\d")
        self.assertEqual(kept.find("deferred")[0][0], "WARNING")
        first, second = re.findall(r"delay-seconds=([0-9.]+)", str(kept.find("deferred")))[:2]
        self.assertTrue(float(first) > 0.07 and float(second) > 0.13, (first, second))

    def test_a_queued_message_is_sent_exactly_like_an_immediate_one(self) -> None:
        client = self.log_in_to(self.start())
        message = b"Subject: s\r\nTo: a@x.y, other@x.y\r\n\r\nT\xc3\xa9xt\r\n..\r\n"
        big = crlf(multipart("mixed", PDF, SCAN, header=NAMED))
        for name, content in (("small", message), ("no header", b"Time: 12:00\r\nText\r\n"),
                             ("big", big)):
            with self.subTest(name):
                self.fake.reset()
                self.assertReply(client.post_octets(content, SENDER, ["a@x.y"]), "250 2.0.0")
                self.be_down(times=1)
                self.fake.will("draft", say(503))
                self.assertIn("Queued", client.post_octets(content + b"\r\n", SENDER, ["a@x.y"]))
                self.wait_until_empty()
                if name == "big":
                    first, second = self.fake.sent_drafts
                    self.assertEqual((first.properties, first.files),
                                     (second.properties, second.files))
                else:
                    once, again = (sent.message for sent in self.fake.delivered)
                    self.assertEqual(once + b"\r\n", again)

    def test_temporary_failures_are_queued_and_permanent_ones_are_refused(self) -> None:
        client = self.log_in_to(self.start(UPSTREAM_TIMEOUT="3"))
        self.rest_long()
        cases: tuple[tuple[Action, str], ...] = (
                (say(500), "Queued"), (say(502), "Queued"), (say(504), "Queued"),
                (say(503, retry_after="99"), "Queued"), (say(429, retry_after="99"), "Queued"),
                (graph_says(403, "ErrorQuotaExceeded"), "Queued"), (utter(b""), "Queued"),
                (BeforeBody(utter(b"", reset=True)), "Queued"), (self.fake.hang, "Queued"),
                (utter(b"HTTP/1.1 junk"), "Queued"), (graph_says(403, "ErrorAccessDenied"), "550"),
                (say(404), "550"), (say(400), "554"), (say(413), "552"), (say(200), "554"))
        for number, (action, wanted) in enumerate(cases):
            with self.subTest(number=number):
                sender = f"s{number}@example.com"
                self.fake.will("send", action)
                self.assertIn(wanted, self.post(client, sender=sender))
                self.assertEqual(len(self.waiting()), min(number + 1, 10))
        self.fake.will("send", self.fake.expire)
        self.fake.will("token", say(503))
        self.enqueue(client, sender="s98@example.com")
        self.fake.will("send", self.fake.expire)            # renewing the token is refused
        self.fake.will("token", say(401, aadsts(7000222, "invalid_client")))
        self.assertReply(self.post(client, sender="s99@example.com"), "421 4.7.0")
        self.assertEqual(len(self.waiting()), 11)

    def test_each_change_is_synced_to_disk_in_a_safe_order(self) -> None:
        """Power may fail between any two steps; files and directories are synced in this order."""
        files = relay.QueueFiles(self.config(**self.settings_of()))
        self.assertEqual(files.open(), [])
        self.addCleanup(files.close)
        message, path = make_message(), self.queue / "8d6f.json"
        calls: list[str] = []
        names = {self.queue.stat().st_ino: "queue", self.failed.stat().st_ino: "failed"}
        fsync, rename, unlink = os.fsync, pathlib.Path.rename, pathlib.Path.unlink

        def note(what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            calls.append(what)
            return call(*arguments, **options)
        patches: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (os, "fsync", lambda fd: note(names.get(os.fstat(fd).st_ino, "file"), fsync, fd)),
            (pathlib.Path, "rename", lambda source, target: note(
                f"{source.suffix} to {target.parent.name}/{target.suffix}", rename, source,
                target)),
            (pathlib.Path, "unlink", lambda source, **options: note(
                f"no {source.suffix}", unlink, source, **options)))
        state = ["file", ".tmp to queue/.json", "queue"]
        steps: tuple[tuple[Callable[[], None], list[str]], ...] = (
            (lambda: files.add(message, [b"x" * 15], math.inf, bool), ["file", *state]),
            (lambda: files.save(path, message), state),
            (lambda: files.fail(message), [
                *state, ".eml to failed/.eml", "failed", "queue", ".json to failed/.json",
                "failed", "queue"]),
            (lambda: files.retry(message), [
                "file", ".tmp to failed/.json", "failed", ".json to queue/.json", "queue",
                "failed", ".eml to queue/.eml", "queue", "failed"]),
            (lambda: files.remove(path), ["no .tmp", "no .json", "no .eml", "queue"]))
        with contextlib.ExitStack() as stack:
            for owner, name, call in patches:
                stack.enter_context(unittest.mock.patch.object(owner, name, call))
            for step, wanted in steps:
                step()
                self.assertEqual(calls, wanted)
                calls.clear()
        with self.assertRaises(FileNotFoundError):      # it was deleted meanwhile
            files.save(path, message)
        self.assertEqual(list(self.folder.glob("*/*")), [])

    def test_messages_with_the_fewest_attempts_go_first_then_the_oldest(self) -> None:
        """Two old messages that always fail therefore do not delay the others."""
        def choose(sock: socket.socket, request: Request) -> bool:
            is_bad = b"bad" in base64.b64decode(request.body)
            action = say(500) if is_bad or not is_up.is_set() else self.fake.accept
            return action(sock, request)

        is_up = threading.Event()
        running = self.start()
        client = self.log_in_to(running)
        self.be_down(choose)
        self.enqueue(client, "bad 1", "bad 2", "1", "2", "3")
        wait_for(lambda: len(self.fake.asked("send")) > 12)
        is_up.set()
        wait_for(lambda: len(self.waiting()) == 2)
        self.assertEqual(sorted(self.subjects()), [b"1", b"2", b"3"])
        self.be_up()
        self.wait_until_empty()
        running.stop()
        self.fake.reset()
        self.fake.most_busy = 0
        running = self.start()
        client = self.log_in_to(running)
        self.rest_long()
        self.be_down(times=3)
        self.enqueue(client, *"123")
        relay.QueueFiles(running.relay.config).notify(self.idents()[b"2"])     # spool retry
        self.wait_until_empty()
        self.assertEqual((self.subjects(), self.fake.most_busy), ([b"2", b"1", b"3"], 1))

    def test_retry_after_delays_the_whole_mailbox(self) -> None:
        times = []

        def note(action: Action) -> Action:
            def noting(sock: socket.socket, request: Request) -> bool:
                times.append(time.monotonic())
                return action(sock, request)
            return noting
        client = self.log_in_to(self.start(UPSTREAM_TIMEOUT="2"))
        self.fake.will("send", say(503), note(say(429, retry_after="4")), note(self.fake.accept))
        with kept_log() as kept:
            self.enqueue(client, "1")
            wait_for(lambda: kept.find("deferred"))
            self.enqueue(client, "2")               # immediately, without a request to Graph
        self.wait_until_empty()
        self.assertGreaterEqual(times[1] - times[0], 4)
        self.assertRegex(kept.find("deferred")[0][1], r"delay-seconds=[1-4]\.")
        self.assertEqual(len(self.fake.asked("send")), 4)

    def test_new_messages_go_before_queued_ones_and_at_most_four_at_once(self) -> None:
        running = self.start(UPSTREAM_TIMEOUT="60")
        client = self.log_in_to(running)
        self.rest_long()
        self.be_down(times=1)
        self.enqueue(client, "queued")
        may_end = threading.Semaphore(0)

        def accept(sock: socket.socket, request: Request) -> bool:
            may_end.acquire(timeout=PATIENCE)
            return self.fake.accept(sock, request)

        def wait_for_requests(begun: int, waiting: int) -> None:
            wait_for(lambda: len(self.fake.asked("send")) == begun)
            wait_for(lambda: running.waiting() == waiting)
        self.be_up(*[accept] * 7)
        messages = []
        for number in range(6):
            if number == 4:                     # the queued message waits before the last two
                wait_for_requests(5, 0)
                call_main("spool", "retry", **self.settings_of())
                wait_for_requests(5, 1)
            messages.append(begin_message(self.log_in_to(running), b"Subject: %d\r\n\r\n" % number))
            if number >= 4:
                wait_for_requests(5, number - 2)
        for waiting in (3, 2, 1, 0):            # a request ends and the next one begins
            wait_for_requests(8 - waiting, waiting)
            may_end.release()
        may_end.release(3)
        for message in messages:
            self.assertReply(message.hear(), "250 2.0.0")
        wait_for(lambda: not self.waiting())
        self.assertEqual([re.search(rb"Subject: (\w+)", base64.b64decode(request.body))[1]
                          for request in self.fake.asked("send")[5:]], [b"4", b"5", b"queued"])
        self.assertEqual(self.fake.most_busy, 4)

    def test_after_a_restart_a_message_waits_until_its_application_logs_in(self) -> None:
        running = self.start()
        self.be_down()
        self.enqueue(self.log_in_to(running))
        running.stop()
        self.be_up()
        asked = len(self.fake.asked("send"))
        with kept_log() as kept:
            running = self.start()
            wait_for(lambda: kept.find("deferred"))
            another = self.connect(running)             # another application's secret is not used
            another.log_in(f"{TENANT}@{TENANT}", self.password)
            self.assertReply(self.post(another, "other"), "250 2.0.0")
            self.assertEqual(len(self.fake.asked("send")), asked + 1)
            self.log_in_to(running)
            self.wait_until_empty()
        self.assertIn(f"the secret is unknown until {USER} logs in", kept.find("deferred")[0][1])
        self.assertEqual(len(kept.find("deferred")), 1)
        self.assertEqual(self.subjects(), [b"other", b"s"])
        wait_for(lambda: not running.ask(lambda: running.relay.queue._applications))

    def test_a_refused_secret_is_forgotten_until_the_next_login(self) -> None:
        running = self.start()
        client = self.log_in_to(running)

        def expire(sock: socket.socket, request: Request) -> bool:
            self.rest_long()                    # only a new secret can end the next delay
            return self.fake.expire(sock, request)
        self.fake.will("send", say(503), expire)
        self.fake.will("token", say(401, aadsts(7000222, "invalid_client")))
        self.enqueue(client)
        wait_for(lambda: "AADSTS7000222" in self.only()[1].reason)
        self.assertEqual(self.connect(running).log_in(password="the new one")[:3], "235")
        self.wait_until_empty()
        self.assertEqual(len(self.fake.delivered), 1)

    def test_a_message_in_progress_is_queued_when_the_relay_stops(self) -> None:
        """Writing to a slow disk may take longer than SHUTDOWN_TIMEOUT and GRACE."""
        self.let("GRACE", 0.05)
        real = os.fsync

        def fsync(descriptor: int) -> None:
            threading.Event().wait(0.1)
            real(descriptor)
        running = self.start(SHUTDOWN_TIMEOUT="0.1", UPSTREAM_TIMEOUT="60")
        client = self.begun(running)
        self.fake.will("send", self.fake.hang)
        client.send(b"one\r\n.\r\n")
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        with unittest.mock.patch.object(os, "fsync", fsync):
            running.stop()
        self.assertIn("Queued", self.assertReply(client.next_reply(), "250 2.0.0"))
        self.assertReply(client.next_reply(), "421 4.3.2")
        self.assertEqual(len(self.waiting()), 1)

    def test_an_attempt_in_progress_ends_before_the_relay_stops(self) -> None:
        running = self.start(UPSTREAM_TIMEOUT="30")
        client = self.log_in_to(running)
        self.be_down(times=1)
        self.fake.will("send", self.fake.hang_then(self.fake.accept))
        self.enqueue(client)
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        client.close()                          # so that nothing else is in progress
        running.begin_stop()
        wait_for(lambda: running.ask(lambda: running.relay.queue._is_stopping))
        self.fake.release.set()
        running.wait()
        self.assertEqual((len(self.fake.delivered), self.waiting()), (1, []))

    def test_a_sent_message_whose_files_cannot_be_removed_is_not_sent_again(self) -> None:
        real = pathlib.Path.unlink
        refused = threading.Semaphore(0)

        def unlink(path: pathlib.Path, *arguments: Any, **options: Any) -> None:
            if path.parent == self.queue:
                refused.release()
                raise OSError(errno.EROFS, "Read-only file system")
            real(path, *arguments, **options)
        client = self.log_in_to(self.start())
        self.be_down(times=1)
        with unittest.mock.patch.object(pathlib.Path, "unlink", unlink):
            self.enqueue(client)
            for _ in range(3):
                self.assertTrue(refused.acquire(timeout=PATIENCE))
        self.wait_until_empty()
        self.assertEqual(len(self.fake.delivered), 1)

    def test_a_queued_message_waits_while_memory_is_short(self) -> None:
        """Half of the memory is reserved for clients, or less if MAX_MESSAGE_SIZE needs more."""
        for spare, size in ((5_000_000, "1000000"), (1_000_000, "9000000")):
            with self.subTest(size), kept_log() as kept:
                running = self.start(UPSTREAM_TIMEOUT="3", MAX_MEMORY_FOR_MESSAGES="10000000",
                                     MAX_MESSAGE_SIZE=size)
                memory = running.relay.memory
                client = self.log_in_to(running)
                self.be_down()
                self.enqueue(client)
                left = spare + self.only()[1].size - 1      # one byte less than the message needs
                running.ask(lambda: memory.reserve(10_000_000 - left))     # noqa: B023
                wait_for(lambda: running.ask(lambda: memory.free) == left)      # noqa: B023
                self.be_up()
                asked = len(self.fake.asked("send"))
                wait_for(lambda: "452 4.3.1" in str(kept.lines))
                self.assertEqual(len(self.fake.asked("send")), asked)
                running.ask(lambda: memory.reserve(-1))        # noqa: B023
                self.wait_until_empty()
                self.assertEqual(running.ask(lambda: memory.free), left + 1)    # noqa: B023
                running.stop()

    def test_setting_the_clock_neither_delays_nor_fails_a_message(self) -> None:
        """Delays do not depend on it, and a message that seems too old gets another attempt."""
        client = self.log_in_to(self.start())
        real = time.time
        for change in (10_000, -10 ** 8):
            self.be_down(times=1)
            with unittest.mock.patch.object(time, "time", lambda: real() + change):  # noqa: B023
                self.enqueue(client, f"{change}")
            self.wait_until_empty()
        self.assertEqual((len(self.fake.delivered), list(self.failed.iterdir())), (2, []))


class FailedTests(SpoolCase):
    """A failed message is kept, and its sender gets a bounce."""

    def test_a_failed_message_is_moved_after_a_restart_and_bounced_once(self) -> None:
        running = self.start()
        self.be_down()
        self.rest_long()
        self.enqueue(self.log_in_to(running))
        running.stop()
        path, _ = self.only()
        self.age(path)
        rename = pathlib.Path.rename

        def fail(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
            if target.parent == self.failed:
                raise OSError(errno.EIO, "no")
            return rename(source, target)
        with unittest.mock.patch.object(pathlib.Path, "rename", fail), kept_log() as kept:
            running = self.start()
            wait_for(lambda: any(level == "ERROR" for level, _ in kept.lines))
            running.stop()
        self.start()
        wait_for(lambda: not path.exists())
        self.assertTrue(self.only()[1].is_bounce)

    def test_a_second_bounce_replaces_the_first(self) -> None:
        running, sizes = self.start(), []
        self.rest_long()
        spool = running.relay.queue
        for size in (11, 12):
            message = make_message(size=size, queued_at=time.time())
            asyncio.run_coroutine_threadsafe(
                spool.put(message, [b"x" * size]), running._loop).result(PATIENCE)
            sizes += [message.size for mailbox in spool._mailboxes.values()
                      for message in mailbox.messages.values()]
        self.assertEqual(sizes, [11, 12])

    def test_a_message_whose_files_were_deleted_is_dropped_without_an_error(self) -> None:
        running = self.start()
        self.be_down()
        self.enqueue(self.log_in_to(running))
        running.stop()
        with kept_log() as kept:
            self.start(SPOOL_LIFETIME="1")          # the message waits for its secret
            for path in self.queue.iterdir():
                path.unlink()
            wait_for(lambda: kept.find("dropped"))
        self.assertEqual([level for level, _ in kept.lines if level == "ERROR"], [])

    def test_a_state_file_that_cannot_be_read_now_is_neither_dropped_nor_moved(self) -> None:
        running = self.start()
        self.be_down()
        self.enqueue(self.log_in_to(running))
        path, files = self.only()[0], relay.QueueFiles(running._config)

        def fail(path: pathlib.Path) -> bytes:
            raise OSError(errno.EMFILE, "Too many open files")
        with kept_log() as kept, unittest.mock.patch.object(pathlib.Path, "read_bytes", fail):
            files.notify(path.stem)
            wait_for(lambda: any("queue-failed" in line for _, line in kept.lines))
            running.stop()
            with self.assertRaises(relay.StartError), contextlib.closing(files):
                files.open()
        self.assertEqual((self.waiting(), kept.find("dropped")), ([path.stem], []))

    def test_a_permanent_failure_is_bounced_and_a_missing_permission_is_retried(self) -> None:
        self.let("RECOUNT_INTERVAL", 0.0)
        running = self.start(SPOOL_MAX_BYTES="1000")        # the limit does not apply to a bounce
        client = self.log_in_to(running)
        permission, mailbox = graph_says(403, "ErrorAccessDenied"), say(404)
        # Sender, responses after a 503; delivered subjects, number of failed messages, reply.
        cases: tuple[tuple[str, list[Action], list[bytes], int, str], ...] = (
            (SENDER, [say(400)], [b"Undelivered mail"], 1, "554 5.6.0"),
            (SENDER, [say(400), say(503), say(503)], [b"Undelivered mail"], 1, "554 5.6.0"),
            (SENDER, [say(400), say(400)], [], 2, "554 5.6.0"),         # no bounce of a bounce
            ("", [say(400)], [], 1, "554 5.6.0"),
            (SENDER, [permission] * 2, [b"s"], 0, "550 5.7.1"),         # may be granted later
            (SENDER, [mailbox, mailbox], [b"s"], 0, "550 5.1.8"))
        for number, (sender, actions, delivered, failed, reply) in enumerate(cases):
            with self.subTest(number=number), kept_log() as kept:
                self.fake.reset()
                shutil.rmtree(self.failed, ignore_errors=True)      # as an administrator might
                self.fake.will("send", say(503), *actions)
                self.assertIn("Queued", client.post(
                    b"From: Boss@example.com\r\nSubject: s\r\n\r\nText\r\n", sender=sender))
                self.wait_until_empty()
                wait_for(lambda: len(kept.find("failed")) == failed)    # noqa: B023
                self.assertEqual((self.subjects(), len(list(self.failed.glob("*.json")))),
                                 (delivered, failed))
                self.assertEqual({level for level, _ in kept.find("failed")},
                                 {"ERROR"} if failed else set())
                self.assertIn(f'reply="{reply}', str(kept.find("failed") or kept.find("deferred")))
        self.fake.reset()
        shutil.rmtree(self.failed, ignore_errors=True)
        self.fake.will("send", say(503), say(400))
        self.enqueue(client, sender="Boss@example.com", recipients=("a@x.y", "b@x.y"))
        wait_for(lambda: self.fake.delivered)
        self.wait_until_empty()
        path, message = self.only("failed")
        self.assertEqual(self.failed.stat().st_mode & 0o777, 0o700)
        self.assertIn("554 5.6.0", message.reason)
        self.assertIn(b"\r\n\r\nText\r\n", path.with_suffix(".eml").read_bytes())
        bounce, = self.fake.delivered
        self.assertEqual((bounce.mailbox, bounce.recipients),
                         ("Boss@example.com", ["boss@example.com"]))
        for part in (path.stem.encode(), b"\r\nSubject:    s\r\n", b"Auto-Submitted: auto-replied"):
            self.assertIn(part, bounce.message)
        self.assertNotIn(b"Text", bounce.message)           # only the header is returned

    def test_a_message_older_than_spool_lifetime_fails(self) -> None:
        def accept_bounce(sock: socket.socket, request: Request) -> bool:
            is_bounce = b"auto-replied" in base64.b64decode(request.body)
            return (self.fake.accept if is_bounce else say(404))(sock, request)
        client = self.log_in_to(self.start(SPOOL_LIFETIME="1"))
        self.let("MIN_BACKOFF", 0.4)
        self.let("MAX_BACKOFF", 0.4)
        self.fake.will("send", say(503), *[accept_bounce] * 1000)
        with kept_log() as kept:
            self.enqueue(client)
            wait_for(lambda: kept.find("failed"))
            self.wait_until_empty()
        self.assertRegex(kept.find("failed")[0][1], "reply=.*1 seconds; last error: 550 5.1.8")
        self.assertIn(b"last error: 550 5.1.8", self.fake.delivered[-1].message)

    def refuse_bad(self, sock: socket.socket, request: Request) -> bool:
        """Action: refuse messages with the subject "bad" permanently, but not their bounces."""
        message = base64.b64decode(request.body)
        is_bad = b"Subject: bad" in message and b"auto-replied" not in message
        return (say(400) if is_bad else self.fake.accept)(sock, request)

    def test_a_failed_message_waits_while_its_bounce_cannot_be_stored(self) -> None:
        client = self.log_in_to(self.start())
        self.be_down()
        self.enqueue(client, "bad")
        with kept_log() as kept:
            with patient_for(MIN_FREE_DISK=10 ** 18):
                self.be_up(*[self.refuse_bad] * 1000)
                wait_for(lambda: kept.find("queue-failed"))
                self.assertEqual((len(self.waiting()), list(self.failed.iterdir())), (1, []))
            self.wait_until_empty()
        self.assertIn("cannot queue the message", kept.find("queue-failed")[0][1])
        self.assertEqual(self.subjects(), [b"Undelivered mail"])

    def test_a_failed_message_that_cannot_be_moved_does_not_delay_others(self) -> None:
        real, refused = pathlib.Path.rename, threading.Semaphore(0)

        def rename(source: pathlib.Path, target: Any) -> Any:
            if pathlib.Path(target).parent == self.failed:
                refused.release()
                raise OSError(errno.EACCES, "Permission denied")
            return real(source, target)
        client = self.log_in_to(self.start())
        self.be_down()
        self.enqueue(client, "bad", "good")
        with unittest.mock.patch.object(pathlib.Path, "rename", rename):
            self.be_up(*[self.refuse_bad] * 1000)
            for _ in range(3):
                self.assertTrue(refused.acquire(timeout=PATIENCE))
            wait_for(lambda: b"good" in self.subjects())
        self.wait_until_empty()
        self.assertEqual(sorted(self.subjects()), [b"Undelivered mail", b"good"])

    def test_a_too_old_message_whose_secret_is_unknown_fails(self) -> None:
        running = self.start()
        self.be_down()
        self.assertIn("Queued", self.log_in_to(running).post(b"From: me@x.y\r\n\r\n", sender=""))
        running.stop()
        self.age(self.only()[0])
        self.start()
        self.wait_until_empty()
        self.assertRegex(self.only("failed")[1].reason, "^Message expired: .* 451 4.3.0")


class FullSpoolTests(SpoolCase):
    """A queue that cannot store a message answers 452 and leaves no files."""

    def assertTakesNothing(self, client: Client, word: str) -> None:
        before = {path.stem for path in self.queue.glob("*")}
        with kept_log() as kept:
            self.assertReply(self.post(client, "refused"), "452 4.3.1")
        self.assertEqual({path.stem for path in self.queue.glob("*")}, before)
        level, line = kept.find("refused")[0]
        self.assertEqual(level, "ERROR")
        for part in (word, "status=503", "452 4.3.1"):      # and why it was to be queued
            self.assertIn(part, line)

    def test_a_full_queue_directory_refuses_with_452(self) -> None:
        self.let("RECOUNT_INTERVAL", 0.0)
        client = self.log_in_to(self.start(SPOOL_MAX_BYTES="1000"))
        self.be_down()
        self.enqueue(client, "big" * 300)
        self.assertTakesNothing(client, "SPOOL_MAX_BYTES")
        self.be_up()
        self.wait_until_empty()
        (self.failed / "x").write_bytes(b"x" * 1400)        # failed messages count
        self.be_down()
        self.assertTakesNothing(client, "SPOOL_MAX_BYTES")
        (self.failed / "x").unlink()
        self.enqueue(client)

    def test_the_directory_is_not_measured_for_each_message(self) -> None:
        """That would be slow with many queued messages."""
        running = self.start()
        client = self.log_in_to(running)
        self.be_down()
        self.rest_long()
        with unittest.mock.patch.object(pathlib.Path, "glob", autospec=True,
                                        side_effect=pathlib.Path.glob) as glob:
            self.enqueue(client, *"abc")
        self.assertEqual(glob.call_count, 1)
        self.assertGreaterEqual(running.relay.queue._files._size, sum(      # with the states
            path.stat().st_size for path in self.queue.iterdir()))

    def test_a_message_that_cannot_be_stored_is_freed_from_memory(self) -> None:
        spool = self.start(SPOOL_MAX_BYTES="1000").relay.queue

        class Content(bytearray):        # weak references need a class
            pass

        async def put() -> Any:
            content = Content(5000)
            with self.assertRaises(relay.TemporaryError):
                await spool.put(make_message(size=5000), [memoryview(content)])
            return weakref.ref(content)
        gc.disable()
        self.addCleanup(gc.enable)
        held = asyncio.run(put())
        wait_for(lambda: held() is None, 2)

    def test_a_message_aborted_while_it_is_stored_is_removed(self) -> None:
        """Its client gets 421 and will send it again."""
        running, release, hung = self.start(SHUTDOWN_TIMEOUT="0.1"), threading.Event(), []

        def hang(descriptor: int) -> None:
            hung.append(descriptor)
            release.wait(PATIENCE)
        client = self.log_in_to(running)
        self.be_down()
        with unittest.mock.patch.object(os, "fsync", hang):
            waiting = begin_message(client, SIMPLE)
            wait_for(lambda: hung)
            running.begin_stop()
            self.assertReply(waiting.hear(), "421 4.3.2")
            release.set()
            wait_for(lambda: not calls_under_way())
        self.assertEqual(list(self.queue.iterdir()), [])

    def test_a_full_or_missing_or_failing_disk_refuses_with_452(self) -> None:
        self.assertEqual(relay.MIN_FREE_DISK, 64 * 1024 * 1024)
        client = self.log_in_to(self.start())
        self.be_down()
        for number in (errno.EIO, errno.ENOSPC):
            for name in ("file", "queue"):          # where fsync() fails

                def fail(descriptor: int) -> None:
                    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
                    if is_folder == (name == "queue"):      # noqa: B023
                        raise OSError(number, os.strerror(number))      # noqa: B023
                with self.subTest(name, number=number), \
                        unittest.mock.patch.object(os, "fsync", fail):
                    self.assertTakesNothing(client, os.strerror(number))
        with patient_for(MIN_FREE_DISK=10 ** 18):
            self.assertTakesNothing(client, "free")
        self.queue.rename(self.folder / "elsewhere")
        self.assertTakesNothing(client, "No such file")
        (self.folder / "elsewhere").rename(self.queue)
        self.enqueue(client)

    def test_a_hanging_disk_refuses_with_452_and_stores_nothing_later(self) -> None:
        client = self.log_in_to(self.start())
        self.be_down()
        release, hung = threading.Event(), []

        def hang(descriptor: int) -> None:
            hung.append(descriptor)
            release.wait(PATIENCE)
        with unittest.mock.patch.object(os, "fsync", hang):
            with patient_for(DISK_TIMEOUT=0.2, GRACE=0.05), kept_log() as kept:
                self.assertReply(self.post(client, "refused"), "452 4.3.1")
            self.assertIn("timed out", kept.find("refused")[0][1])
            with patient_for(DISK_TIMEOUT=3600.0):      # the next message does not wait for it
                self.assertTakesNothing(client, "the disk does not respond")
            self.assertEqual(len(hung), 1)
            release.set()                           # the late write must be removed
            wait_for(lambda: not calls_under_way())
        self.assertEqual((list(self.queue.iterdir()), self.fake.delivered), ([], []))
        self.enqueue(client)


@unittest.skipUnless(hasattr(os, "mkfifo"), "needs a file that hangs")
class SlowDiskTests(HangCase):
    """Reading a file hangs, as on a lost network disk; here the file is a named pipe."""

    def pipe(self, name: str) -> str:
        """Make a named pipe: opening it for reading blocks until it is opened for writing."""
        path = FILES[name]
        os.mkfifo(path)

        def is_read() -> bool:
            with contextlib.suppress(OSError):      # end a read in progress
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return not calls_under_way()

        def release() -> None:
            # Keep it open for writing: a reader that opens it later would block forever.
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
            wait_for(is_read)
            os.unlink(path)
        self.addCleanup(release)
        return path

    def test_a_login_times_out_while_the_workload_identity_token_hangs(self) -> None:
        _, running = self.beside(AZURE_TENANT_ID=TENANT, AZURE_CLIENT_ID=CLIENT,
                                 AZURE_FEDERATED_TOKEN_FILE=self.pipe("token"))
        client = self.connect(running)
        with kept_log() as kept:
            waiting = Waiting(client, login_line(LOOK_UP_USER))
            self.served(running, "secret")
            self.assertTimely(waiting, "454 4.7.0")
        self.assertIn(f"{FILES['token']}: timed out",
                      "".join(text for _, text in kept.find("result=tempfail")))

    def test_the_previous_accounts_serve_while_the_accounts_file_hangs(self) -> None:
        """The relay can still be stopped."""
        path = FILES.write("slow.ini", f"[a]\n{APPLICATION}\n")
        _, running = self.beside(ACCOUNTS_FILE=path)
        os.unlink(path)
        self.pipe("slow.ini")
        wait_for(calls_under_way)
        running.ask(running.relay.accounts_file.request_reload)
        self.served(running, "secret")
        running.stop()


class SpoolAccountTests(SpoolCase, AccountCase):
    """Queued messages of accounts in ACCOUNTS_FILE are sent without a new login."""

    def settings_of(self, **settings: str) -> dict[str, str]:
        return super().settings_of(ACCOUNTS_FILE=FILES.write("spool.ini", f"""
[scanner8]
tenant_id = {TENANT}
client_id = {CLIENT}
client_secret = of the file
password = {relay.hash_password("tenletters", b"0" * 16)}
from_email = scan@example.com
"""), **settings)

    def log_in_to(self, running: Running) -> Client:
        return self.logged_in("scanner8", "tenletters", running)

    def test_a_tenant_given_as_a_domain_has_one_queue_and_one_set_of_duplicates(self) -> None:
        """Learning the tenant's ID changes neither its queue nor the detection of duplicates."""
        running = self.another(**SpoolCase.settings_of(self, ACCOUNTS_FILE=FILES.write(
            "domain.ini", "[scanner8]\ntenant_id = one.example\nclient_secret = s\n"
            f"client_id = {CLIENT}\npassword = {HASH}\n")))
        claims = base64.urlsafe_b64encode(json.dumps({"tid": TENANT}).encode()).decode()
        token = f"e30.{claims.rstrip('=')}.x"
        self.fake._tokens[token] = self.fake.url
        self.fake.will("token", *[say(200, {"access_token": token, "expires_in": 3599})] * 2)
        message = b"Message-ID: <1@x.y>\r\nDate: Sat, 28 Nov 2026 03:00:00 +0000\r\n" + SIMPLE
        for _ in range(2):
            client = self.logged_in_as("scanner8", running=running)
            self.assertReply(client.post(message), "250 2.0.0")
        self.assertEqual(len(self.fake.delivered), 1)
        self.fake.will("send", say(429, retry_after="1000"))
        running.ask(running.relay._tokens._tenants._values.clear)   # as after a start
        self.enqueue(client)
        mailbox, = running.relay.queue._mailboxes.values()
        self.assertGreater(mailbox.resume_at, time.monotonic() + 900)
        self.assertEqual(self.only()[1].tenant, "one.example")

    def test_after_a_restart_messages_are_sent_without_a_login(self) -> None:
        """The oldest go first, and a message that is too old gets another attempt."""
        for is_old in (False, True):
            running = self.start()
            client = self.log_in_to(running)
            self.be_down()
            self.rest_long()                    # a restart ends the delay
            self.enqueue(client, *"12345")
            running.stop()
            for path in self.queue.glob("*.json"):
                self.assertIn('"account": "scanner8"', path.read_text())
                self.assertNotIn("of the file", path.read_text())
                if is_old:
                    self.age(path)
            self.be_up()
            running = self.start()
            self.wait_until_empty()
            running.stop()
            if not is_old:
                self.assertEqual(self.subjects(), [b"1", b"2", b"3", b"4", b"5"])
        self.assertEqual({sent.mailbox for sent in self.fake.delivered}, {"scan@example.com"})
        self.assertEqual(len(self.fake.delivered), 10)
        self.assertEqual(list(self.failed.iterdir()), [])

    def test_a_client_logs_in_and_sends_while_microsoft_is_down(self) -> None:
        running = self.start()
        self.fake.will("token", *[say(503)] * 1000)
        self.enqueue(self.log_in_to(running))
        other = self.connect(running)               # only Microsoft can verify this login
        self.assertReply(other.log_in(password=self.password), "454 4.7.0")
        self.assertReply(self.connect(running).log_in("scanner8", "wrong"), "535 5.7.8")
        self.be_up()
        self.wait_until_empty()

    def test_from_email_gets_the_bounces_unless_the_reverse_path_is_empty(self) -> None:
        client = self.log_in_to(self.start())
        for sender, wanted in (("", ""), (SENDER, "scan@example.com")):
            self.be_down(times=1)
            self.enqueue(client, sender=sender)
            self.assertEqual(self.only()[1].reverse_path, wanted)
            self.wait_until_empty()

    def test_a_message_waits_while_its_account_is_missing_from_the_file(self) -> None:
        """The queue holds no copy of its secret."""
        running = self.start()
        client = self.log_in_to(running)
        self.be_down()
        with kept_log() as kept:
            self.enqueue(client)
            self.log_in_to(running)
            text = pathlib.Path(FILES["spool.ini"]).read_text()
            renamed = text.replace("[scanner8]", "[scanner9]")
            FILES.write("spool.ini", renamed.replace(CLIENT, TENANT))   # another application
            wait_for(lambda: "the secret is unknown until scanner8 logs in" in str(kept.lines))
        FILES.write("spool.ini", renamed)       # the same application under another name
        self.be_up()
        self.wait_until_empty()


class SpoolStartTests(SpoolCase):
    """An unusable queue directory ends the start with a reason; remains of a crash do not."""

    def assertEnds(self, word: str, **settings: str) -> None:
        environ = {"SMTP_PORT": "0", "LISTEN_ADDRESS": "127.0.0.1", "TLS_SOURCE": "off",
                   "REQUIRE_TLS": "false", **self.settings_of(**settings)}
        if "RUN_AS" in settings:        # this process must not change its user
            with start_program(**environ) as process:
                _, err = process.communicate(timeout=PATIENCE)
            status = process.returncode
        else:
            status, _, err = call_main(**environ)
        self.assertEqual(status, 1, err)
        self.assertIn("SPOOL_DIRECTORY", err)
        self.assertIn(word, err)
        self.assertNotIn("Traceback", err)

    def test_an_unusable_directory_ends_the_start_and_a_missing_one_is_made(self) -> None:
        self.assertEnds("Not a directory", SPOOL_DIRECTORY=FILES["key.pem"] + "/x")
        self.assertEnds("cannot be used", SPOOL_DIRECTORY=FILES["key.pem"])
        self.assertEnds("No such file", SPOOL_DIRECTORY=str(self.folder / "a" / "b"))
        self.folder.chmod(0o733)
        self.assertEnds("chmod")
        self.folder.chmod(0o700)
        running = self.start()
        self.assertEnds("another relay is using it")
        running.stop()
        error = OSError(errno.EROFS, "Read-only file system")       # root ignores modes
        with unittest.mock.patch.object(os, "open", side_effect=error):
            with self.assertRaisesRegex(relay.StartError, "SPOOL_DIRECTORY=.*Read-only file"):
                relay.QueueFiles(self.config(**self.settings_of())).open()
        made = self.folder / "made"             # a missing directory is made
        self.start(SPOOL_DIRECTORY=str(made)).stop()
        self.assertEqual(made.stat().st_mode & 0o777, 0o700)

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_a_directory_of_another_user_is_refused(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp())      # every user can reach this place
        self.addCleanup(shutil.rmtree, self.folder)
        self.folder.chmod(0o755)
        os.chown(self.folder, 65534, 65534)
        self.assertEnds("belongs to another user")
        files = relay.QueueFiles(self.config(**self.settings_of()))
        for folder in (files.queue, files.failed):      # `spool retry` by root
            folder.mkdir(0o700)
            os.chown(folder, 65534, 65534)
        (files.failed / "8d6f.eml").write_bytes(b"")
        (files.failed / "8d6f.json").write_bytes(b"")
        files.retry(make_message())
        self.assertEqual((files.queue / "8d6f.json").stat().st_uid, 65534)
        os.chown(self.folder, 0, 0)
        self.assertEnds("belongs to another user", RUN_AS="nobody")

    def test_files_left_by_a_crash_are_sent_or_removed_or_set_aside(self) -> None:
        running = self.start()
        self.be_down()
        self.enqueue(self.log_in_to(running))
        running.stop()
        self.be_up()
        path, message = self.only()
        eml = path.with_suffix(".eml").read_bytes()
        state = path.read_bytes().replace(message.id.encode(), b"ID")
        for left in self.queue.iterdir():
            left.unlink()
        # Files; where they are in the end, event of the log, subjects sent. The first case occurs
        # before a .json is written and after it was removed.
        cases: tuple[tuple[dict[str, bytes], str, str, list[bytes]], ...] = (
            ({"queue/ID.eml": eml}, "", "removed", []),
            ({"queue/ID.eml": eml[:9], "queue/ID.tmp": b"{"}, "", "removed", []),
            ({"queue/ID.eml": eml, "queue/ID.json": state, "queue/ID.tmp": b"{"}, "", "removed",
             [b"s"]),
            # while the message was moved to failed/, or from there
            ({"queue/ID.json": state, "failed/ID.eml": eml}, "failed", "quarantined", []),
            ({"queue/ID.eml": eml, "failed/ID.json": state}, "failed", "listening", []),
            ({"queue/ID.eml": b"x", "failed/ID.json": state, "failed/ID.eml": eml}, "failed",
             "removed", []),
            # damaged state, or the state of another message
            ({"queue/ID.json": b"\0" * 99, "queue/ID.eml": eml}, "failed", "quarantined", []),
            ({"queue/ID.json": b"", "queue/ID.eml": eml}, "failed", "quarantined", []),
            ({"queue/ID.json": state.replace(b"ID", b"other"), "queue/ID.eml": eml}, "failed",
             "quarantined", []),
            ({"queue/ID.json": state, "queue/ID.eml": eml[:-9]}, "failed", "failed",
             [b"Undelivered mail"]))
        for number, (files, wanted, event, subjects) in enumerate(cases):
            with self.subTest(number=number), kept_log() as kept:
                for name, content in files.items():
                    (self.folder / name).write_bytes(content)
                self.fake.reset()
                running = self.start()
                self.log_in_to(running)
                self.wait_until_empty()
                running.stop()
                self.assertEqual({str(left.relative_to(self.folder))
                                  for left in self.folder.glob("*/*")},
                                 {f"failed/ID{suffix}" for suffix in (".eml", ".json") if wanted})
                self.assertEqual((len(kept.find(event)) > 0, self.subjects()), (True, subjects))
                for left in self.failed.iterdir():
                    left.unlink()
        (self.queue / "folder.json").mkdir()
        (self.queue / "junk").touch()
        self.start().stop()
        self.assertEqual(sorted(str(left.relative_to(self.folder)) for left in
                                self.folder.glob("*/*")), ["failed/folder.json", "queue/junk"])


class SpoolCommandTests(SpoolCase, ProgramCase):
    """The spool command shows and changes the queue, also while the relay runs."""

    def spool(self, *arguments: str, wanted: int = 0) -> str:
        status, out, err = self.outcome("spool", *arguments, **self.settings_of())
        self.assertEqual(status, wanted, err)
        return out

    def test_list_and_show_print_the_queued_messages(self) -> None:
        running = self.start()
        self.assertEqual(self.spool(), "The queue is empty.\n")
        client = self.log_in_to(running)
        self.be_down()
        self.enqueue(client, "\x1b[31mred", recipients=("a@x.y", "B@X.y"))
        message_id, = self.waiting()
        (self.queue / "6f.eml").write_bytes(b"{")          # a message being written
        wait_for(lambda: self.only()[1].attempts > 1)
        self.assertRegex(self.spool(), rf"(?m)^waiting {message_id} queued=20\d\d-\d\d-\d\dT"
                         rf"[0-9:]+Z size=\d+ sender={SENDER} recipients=a@x.y,B@X.y attempts=\d+ "
                         r'reason="451 4.3.0 .*"( next-attempt=\S+)?$')
        self.assertEqual(self.spool().count("\n"), 1)
        shown = self.spool("show", message_id)
        self.assertIn("\nSubject: \\x1b[31mred\n", shown)
        self.assertTrue(shown.endswith("\nText\n"), shown)
        self.assertIn("no such", self.spool("show", "../lock", wanted=1))

    def test_retry_and_drop_work_while_the_relay_runs(self) -> None:
        running = self.start()
        client = self.log_in_to(running)
        self.rest_long()
        self.be_down(times=3)
        for subject in "123":
            self.enqueue(client, subject, sender=f"s{subject}@example.com")
        idents = self.idents()
        self.assertEqual(self.spool("retry", idents[b"2"]), f"{idents[b'2']} will be retried now. "
                         f"If the relay does not know its secret, it waits until {USER} logs in\n")
        wait_for(lambda: len(self.waiting()) == 2)
        self.assertEqual(self.subjects(), [b"2"])
        with kept_log() as kept:
            self.log_in_to(running)                             # this does not end a delay
            self.assertEqual(self.spool("drop", idents[b"1"]), "")
            wait_for(lambda: kept.find("dropped"))
        self.assertEqual(kept.find("dropped")[0][1].split()[0], idents[b"1"])
        self.assertEqual(len(self.fake.asked("send")), 4)       # the other one is still delayed
        self.spool("retry")
        self.wait_until_empty()
        self.assertEqual(self.subjects(), [b"2", b"3"])
        self.assertEqual(self.spool("drop", wanted=2), "")
        self.be_down(times=1)
        self.enqueue(client)
        for path in self.queue.iterdir():       # as an administrator might with rm
            path.unlink()
        with kept_log() as kept:
            for mailbox in list(running.relay.queue._mailboxes.values()):
                running.ask(mailbox.resume)
            wait_for(lambda: kept.find("dropped"))

    def test_a_failed_message_can_be_retried_and_is_bounced_again(self) -> None:
        running = self.start()
        client = self.log_in_to(running)
        self.fake.will("send", say(503), say(400))
        self.enqueue(client, sender=SENDER)
        wait_for(lambda: self.fake.delivered)                   # the bounce
        self.wait_until_empty()
        wait_for(lambda: not running.ask(lambda: running.relay.queue._applications))
        path, _ = self.only("failed")
        self.assertRegex(self.spool(), rf"^failed  {path.stem} .*reason=.554 5.6.0")
        self.assertEqual(self.spool("retry"), "")               # only waiting messages
        self.age(path)
        with kept_log() as kept:
            self.spool("retry", path.stem)
            wait_for(lambda: kept.find("deferred"))              # the secret was forgotten
        self.assertFalse(self.only()[1].bounce_sent)            # it starts over
        self.fake.will("send", say(400))                        # and its sender gets a bounce again
        self.log_in_to(running)
        wait_for(lambda: len(self.fake.delivered) == 2)
        self.wait_until_empty()
        self.assertEqual(self.only("failed")[1].attempts, 1)

    def test_the_commands_work_without_a_running_relay(self) -> None:
        running = self.start()
        client = self.log_in_to(running)
        self.be_down()
        self.enqueue(client, "1")
        running.stop()
        message_id, = self.waiting()
        files = relay.QueueFiles(running.relay.config)
        with unittest.mock.patch.object(pathlib.Path, "read_bytes", side_effect=FileNotFoundError):
            self.assertEqual(list(files.read_all(self.queue)), [])      # sent meanwhile
        (self.failed / "junk.json").write_bytes(b"junk")
        self.assertRegex(self.spool("list"), "^waiting .*\ndamaged junk file=.*\n$")
        self.spool("retry", message_id)
        self.assertEqual(self.spool("retry", "junk"), "")
        self.assertEqual(self.spool("show", wanted=2), "")
        self.spool("drop", "junk")
        shutil.rmtree(self.failed)              # as an administrator might
        self.spool("drop", message_id)
        self.assertEqual(self.spool(), "The queue is empty.\n")
        for folder, wanted, word in (("", 2, "SPOOL_DIRECTORY is not set"),
                                     (str(self.folder / "none"), 1, "No such file")):
            status, _, err = self.outcome("spool", SPOOL_DIRECTORY=folder)
            self.assertEqual(status, wanted)
            self.assertIn(word, err)


@unittest.skipUnless(relay.fcntl, "needs locks of files")
class KillTests(unittest.TestCase):
    """kill -9 at any moment loses nothing:  python3 test_relay.py kill --times N --seed S"""

    def test_kill_9_at_random_moments_loses_no_accepted_message(self) -> None:
        kills = Kills(seed="1")
        summary = kills.run(6)
        self.assertGreater(len(kills.accepted), 20, summary)


# The root of VAULT_PEM, which has an intermediate's and a server's certificate. The tests give
# these as PEM and as PKCS#12, also in the old format of Key Vault (RC2-40, 3DES, SHA-1 MAC).

ROOT_CERT = pem("CERTIFICATE", """\
MIIBbjCCARSgAwIBAgIUaMxfz+TTbLIAV8hd7TmMrMl5Ho0wCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJVGVzdCBSb290
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAlUZXN0IFJvb3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAAT2SUGu3iEh3PY4z43RUd4EC5tHW4XvoeqB3+2HEKXqZKztVykluC3qfCd3OcrcvV7XGZXahuCe
Ud316MW9ZdrKo0IwQDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQUYUZvGVR285Q8CO3n
jDuxRDicmTQwCgYIKoZIzj0EAwIDSAAwRQIhALbg73Qrm112dJNMlzpMmoxX2zI5UpLpb/m82hgTf8nNAiBa7y0jeLo4
bDros0TcJ1njqy1uJSwy/n569B180lmaZA==
""")


class VaultTests(RelayCase):
    """A certificate from Azure Key Vault."""

    def vault(self, **settings: str) -> dict[str, str]:
        return {"TLS_SOURCE": "keyvault", "AZURE_KEY_VAULT_URL": self.fake.url,
                "AZURE_KEY_VAULT_CERT_NAME": "relay", "REQUIRE_TLS": "true",
                "AZURE_POD_IDENTITY_AUTHORITY_HOST": self.fake.url, **settings}

    def give(self, value: str, content_type: str = "application/x-pkcs12") -> None:
        """Store a secret in the vault."""
        self.fake.secret = {"value": value, "contentType": content_type,
                            "attributes": {"enabled": True},
                            "id": f"{self.fake.url}/secrets/relay/1"}

    def test_the_key_file_is_private_and_removed_after_use(self) -> None:
        """It is in memory, or on disk if memfd_create() or /proc is missing."""
        folder = tempfile.mkdtemp(dir=FILES.folder)
        refuse = unittest.mock.Mock(side_effect=OSError(errno.ENOSYS, "as on an old kernel"))
        for create, number in ((getattr(os, "memfd_create", refuse), int(not IS_LINUX)),
                               (refuse, 1), (lambda name: 10 ** 6, 1)):
            with unittest.mock.patch.object(os, "memfd_create", create, create=True), \
                    unittest.mock.patch.object(tempfile, "tempdir", folder), \
                    self.assertRaises(relay.StartError), relay._private_file(b"key") as path:
                self.assertEqual(pathlib.Path(path).read_bytes(), b"key")
                self.assertEqual(len(os.listdir(folder)), number)
                if number and os.name == "posix":
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
                raise relay.StartError("while the file exists")
            self.assertFalse(os.path.exists(path))
            self.assertEqual(os.listdir(folder), [])

    def export(self, pem: str, *options: str) -> bytes:
        """Make PKCS#12 with AES, unless the options choose old algorithms."""
        return subprocess.run(
            ["openssl", "pkcs12", "-export", "-passout", "pass:", "-keypbe", "AES-256-CBC",
             "-certpbe", "AES-256-CBC", "-macalg", "sha256", *options],
            input=pem.encode(), check=True, capture_output=True).stdout

    def old_pfx(self) -> bytes:
        """Make PKCS#12 with RC2, which OpenSSL 3 does only with -legacy."""
        options = subprocess.run(["openssl", "pkcs12", "-help"], capture_output=True).stderr
        return self.export(VAULT_PEM, "-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-RC2-40",
                           "-macalg", "sha1", *["-legacy"] * (b"-legacy" in options))

    @needs_openssl
    def test_pkcs12_and_pem_certificates_are_served_with_their_chain(self) -> None:
        """The client trusts only the root, so the relay must send the intermediate certificate."""
        old, new = base64.encodebytes(self.old_pfx()).decode(), self.export(VAULT_PEM)
        for value, content_type in (
                (old.replace("\n", ""), "application/x-pkcs12"), (old, "application/x-pkcs12"),
                (base64.b64encode(new).decode(), "application/x-pkcs12"),
                (VAULT_PEM, "application/x-pem-file"), (VAULT_PEM, "")):
            with self.subTest(value[:20], content_type=content_type):
                self.give(value, content_type)
                with Client(self.another(**self.vault()).port) as client:
                    client._host = "localhost"
                    client.starttls(context=ssl.create_default_context(cadata=ROOT_CERT))
                    client.ehlo()
                    self.assertReply(client.log_in(USER, self.password), "235 2.7.0")
        request = self.fake.asked("vault")[0]
        self.assertEqual(request.path, "/secrets/relay?api-version=7.4")
        self.assertIn("resource=https%3A%2F%2Fvault.azure.net", self.fake.asked("imds")[0].path)

    @needs_openssl
    def test_pkcs12_becomes_pem_in_order_or_the_error_names_the_problem(self) -> None:
        def blocks(pem: str) -> list[str]:
            return [re.sub(r"\s", "", block) for block in
                    re.findall("-----BEGIN.*?-----END [A-Z ]+-----", pem, re.S)]
        good = self.export(VAULT_PEM)
        for pfx in (self.old_pfx(), good):
            self.assertEqual(blocks(relay.pfx_to_pem(pfx).decode()), blocks(VAULT_PEM))
        for pfx, word in ((b"", "openssl"), (b"garbage", "openssl"), (good[:-1], "openssl"),
                          (good[:600] + b"\0" * 500, "openssl"),
                          (self.export(ROOT_CERT, "-nokeys"), "no private key")):
            with self.subTest(pfx[:10]), self.assertRaisesRegex(ValueError, word):
                relay.pfx_to_pem(pfx)

    @unittest.skipUnless(os.name == "posix", "needs a script as a command")
    @unittest.mock.patch.object(relay, "OPENSSL_TIMEOUT", 0.1)
    def test_a_missing_or_hanging_openssl_command_is_reported(self) -> None:
        folder = tempfile.mkdtemp(dir=FILES.folder)
        self.give("AAAA")
        for script, word in (("", "No such file"), ("#!/bin/sh\nexec /bin/sleep 60", "timed out")):
            if script:
                command = pathlib.Path(folder) / "openssl"
                command.write_text(script)
                command.chmod(0o700)
            with self.subTest(word), at_environ(PATH=folder), self.assertRaisesRegex(
                    relay.StartError, f"openssl.*{word}.* to PEM, "):
                relay.make_tls_contexts(self.config(**self.vault()))

    @unittest.mock.patch.object(relay, "AZURE_RETRY_DELAYS", (0.0, 0.0))
    def test_each_failure_names_its_cause_and_no_secret(self) -> None:
        forbidden = {"error": {"code": "Forbidden", "message": "hidden", "innererror":
                               {"code": "ForbiddenByRbac"}}}
        pem = {"value": "-----BEGIN hidden", "contentType": "application/x-pem-file"}
        to_pem = "set the content type in the certificate's issuance policy to PEM"
        for word, *actions in (
                ("403 Forbidden/ForbiddenByRbac: give the relay's identity the role Key Vault "
                 "Secrets User", say(403, forbidden)),
                ("404 SecretNotFound: there is no such certificate",
                 say(404, {"error": {"code": "SecretNotFound"}})),
                ("401 : the relay's identity belongs to another tenant", *[say(401)] * 2),
                ("429 : try again later", *[say(429)] * 3),
                ("Key Vault returned 200", say(200, b"garbage")),
                ("Key Vault returned 404", say(404, pem)),
                ("Key Vault returned 200", say(200, {"value": 5})),
                *((to_pem, say(200, {"value": value, "contentType": "application/x-pkcs12"}))
                  for value in ("hid den", "aGlkZGVu")),
                ("contains no usable PEM certificate", say(200, pem)),
                ("contains no usable PEM key", say(200, {**pem, "value": ROOT_CERT})),
                ("cannot be converted to PEM", say(200, {"value": "-----BEGIN\ud800"})),
                ("Microsoft 365 did not respond", utter(b""))):
            with self.subTest(word):
                self.fake.will("vault", *actions)      # type: ignore[arg-type]
                with self.assertRaises(relay.StartError) as caught:
                    relay.make_tls_contexts(self.config(**self.vault()))
                self.assertIn(word, str(caught.exception))
                self.assertIn("AZURE_KEY_VAULT_CERT_NAME='relay'", str(caught.exception))
                self.assertNotIn("hid", str(caught.exception))

    def test_the_token_scope_matches_the_cloud(self) -> None:
        self.give(VAULT_PEM, "application/x-pem-file")
        for cloud, scope in (("china", "vault.azure.cn"), ("usgov", "vault.usgovcloudapi.net"),
                             ("usgov-dod", "vault.usgovcloudapi.net")):
            relay.make_tls_contexts(self.config(**self.vault(AZURE_CLOUD=cloud)))
            self.assertTrue(self.fake.asked("imds")[-1].path.endswith(f"%2F%2F{scope}"))


class OldTlsTests(TlsCase):
    """TLS 1.0 and 1.1 work for old printers, and are off by default."""

    @staticmethod
    def old_client(version: str) -> ssl.SSLContext:
        context = trusting()
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = relay.TLS_VERSIONS[version]
        return context

    def test_versions_below_tls_min_version_are_refused(self) -> None:
        versions = list(relay.TLS_VERSIONS)
        self.assertEqual(versions, ["1.0", "1.1", "1.2", "1.3"])
        for minimum in versions:
            running = self.another(TLS_MIN_VERSION=minimum)
            for version in versions:
                with self.subTest(minimum, version=version), kept_log() as kept, \
                        Client(running.port) as client:
                    if version >= minimum:
                        client.starttls(context=self.old_client(version))
                        self.assertEqual(client.sock.version(), "TLSv" + version.replace(".0", ""))
                    else:
                        with self.assertRaises(OSError):
                            client.starttls(context=self.old_client(version))
                        wait_for(functools.partial(kept.find, "disconnected"))
                        self.assertIn("TLS_MIN_VERSION", kept.find("disconnected")[0][1])

    @needs_openssl
    def test_tls_1_0_works_with_an_rsa_1024_sha_1_certificate(self) -> None:
        cert, key = FILES["old-cert.pem"], FILES["old-key.pem"]
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:1024", "-nodes", "-sha1",
                        "-subj", "/CN=localhost", "-days", "9", "-keyout", key, "-out", cert],
                       check=True, capture_output=True)
        running = self.another(TLS_MIN_VERSION="1.0", TLS_CERT_FILEPATH=cert, TLS_KEY_FILEPATH=key)
        begin, end = relay.certificate_dates(running._contexts["1.0"], cert)
        self.assertEqual((end - begin) / 86400, 9)
        context = self.old_client("1.0")
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with Client(running.port) as client:
            client.starttls(context=context)

    def test_tls_cipher_suite_selects_the_cipher(self) -> None:
        name = "ECDHE-ECDSA-AES128-GCM-SHA256"
        with Client(self.another(TLS_CIPHER_SUITE=name).port) as client:
            client.starttls(context=self.old_client("1.2"))
            self.assertEqual(client.sock.cipher()[0], name)


@needs_loopbacks
class NetworkTlsTests(TlsCase):
    """Exceptions for an old printer apply to its network only."""

    @classmethod
    def config(cls, **settings: str) -> relay.Config:
        accounts = f"""\
[DEFAULT]
{APPLICATION}
client_secret = s
[old]
networks = 127.0.0.2
tls_min_version = 1.0
login = optional
[plain]
networks = 127.0.0.3
require_tls = false
password = {HASH}
[strict]
networks = 127.0.0.4
tls_min_version = 1.3
login = optional
"""
        return super().config(ACCOUNTS_FILE=FILES.write("networks.ini", accounts), **settings)

    def test_certificate_dates_are_read_if_it_has_expired_or_the_root_is_missing(self) -> None:
        chain = FILES.write("chain.pem", VAULT_PEM)
        for cert, key, years in ((FILES["expired.pem"], FILES["key.pem"], (2020, 2020)),
                                 (FILES["cert.pem"], FILES["key.pem"], (2026, 2126)),
                                 (chain, chain, (2020, 2120))):
            for context in relay.make_tls_contexts(tls_config(
                    TLS_CERT_FILEPATH=cert, TLS_KEY_FILEPATH=key)).values():
                dates = relay.certificate_dates(context, cert)
                self.assertEqual(tuple(time.gmtime(date).tm_year for date in dates), years)

    def test_a_tls_version_that_openssl_lacks_is_an_error(self) -> None:
        text = f"[a]\n{APPLICATION}login = required\nnetworks = 10.0.0.1\ntls_min_version = 1.0"
        accounts = relay.AccountsFile(make_config(ACCOUNTS_FILE=FILES.write("old.ini", text)))
        for name, version in (("HAS_TLSv1", "1.0"), ("HAS_TLSv1_1", "1.1")):
            with unittest.mock.patch.object(ssl, name, False):
                with (contextlib.nullcontext() if version == "1.1" else self.assertRaisesRegex(
                        relay.ConfigError, r"^\S*: \[a\] tls_min_version = 1.0: must .*Open.*$")):
                    accounts.load()
                with self.assertRaisesRegex(relay.ConfigError,
                                            f"^TLS_MIN_VERSION='{version}': must .*OpenSSL"):
                    relay.make_tls_contexts(tls_config(TLS_MIN_VERSION=version))

    def test_weak_ciphers_are_enabled_for_old_tls_only(self) -> None:
        def names(context: ssl.SSLContext) -> set[str]:
            return {cipher["name"] for cipher in context.get_ciphers()}
        contexts = relay.make_tls_contexts(tls_config())
        normal = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.assertEqual(names(contexts["1.2"]), names(normal))
        if hasattr(normal, "security_level"):
            self.assertEqual([contexts[version].security_level for version in ("1.2", "1.3")],
                             [normal.security_level] * 2)
            own = relay.make_tls_contexts(tls_config(TLS_CIPHER_SUITE="DEFAULT:@SECLEVEL=2"))
            self.assertEqual({context.security_level for context in own.values()}, {2})
        for context in contexts.values():       # no cipher without authentication
            self.assertNotIn("Au=None", str(context.get_ciphers()))
            self.assertTrue(context.options & ssl.OP_NO_RENEGOTIATION)

    def test_old_tls_is_accepted_from_its_network_only(self) -> None:
        for address, minimum in (("127.0.0.2", "1.0"), ("127.0.0.1", "1.2"), ("127.0.0.3", "1.2"),
                                 ("127.0.0.4", "1.3")):
            for version in relay.TLS_VERSIONS:
                with self.subTest(address, version=version):
                    client, is_allowed = self.come_from(address), version >= minimum
                    with contextlib.nullcontext() if is_allowed else self.assertRaises(OSError):
                        client.starttls(context=OldTlsTests.old_client(version))
                    if is_allowed and address == "127.0.0.2":
                        client.ehlo()
                        self.assertReply(client.post(), "250 2.0.0")    # without login

    def test_implicit_tls_follows_the_network_too(self) -> None:
        for address, wanted in (("127.0.0.2", b"220 "), ("127.0.0.1", b"")):
            sock = socket.create_connection(("127.0.0.1", self.running._config.smtps_port),
                                            PATIENCE, (address, 0))
            self.addCleanup(sock.close)
            received = b""
            with contextlib.suppress(OSError), OldTlsTests.old_client("1.0").wrap_socket(
                    sock, server_hostname="localhost") as tls:
                received = self.read_until(tls, b"\r\n")
            self.assertEqual(received[:4], wanted)

    def test_plaintext_is_accepted_from_its_network_only(self) -> None:
        client = self.come_from("127.0.0.3")
        self.assertReply(client.log_in("plain", PASSWORD), "235 2.7.0")
        self.assertReply(client.post(), "250 2.0.0")
        for address in ("127.0.0.1", "127.0.0.2"):
            self.assertReply(self.come_from(address).log_in("plain", PASSWORD), "530 5.7.0")
        self.assertReply(self.come_from("127.0.0.2").post(), "530 5.7.0")


IDENTIFIED = (b"Message-ID: <1@x.y>\r\nDate: Sat, 28 Nov 2026 03:00:00 +0000\r\n"
              b"Subject: s\r\n\r\nText\r\n")


class DuplicateTests(RelayCase):
    """A message with Message-ID and Date is sent once, however often a client sends it."""

    settings = {"UPSTREAM_TIMEOUT": str(PATIENCE)}

    def setUp(self) -> None:
        super().setUp()
        self.forget()

    def forget(self) -> None:
        """Start a case: forget the messages sent so far."""
        self.fake.reset()
        self.running.ask(self.running.relay.delivery._duplicates._accepted._values.clear)

    def sends(self, content: bytes = IDENTIFIED, running: Running | None = None) -> Client:
        """Send the content of a message without waiting for the reply."""
        client = self.begun(running)
        client.send(content + b".\r\n")
        return client

    def test_more_than_max_cached_messages_are_remembered(self) -> None:
        async def claim() -> object:
            guard = relay.DuplicateGuard(900.0)
            for number in range(relay.MAX_CACHED + 1):
                guard.remember(b"%d" % number, "id", "reply")
            async with guard.claim(b"0", math.inf) as first:
                return first
        self.assertEqual(asyncio.run(claim()), ("id", "reply"))

    def test_a_repeated_message_gets_the_first_reply_and_is_not_sent(self) -> None:
        for is_acknowledged in (True, False):
            with self.subTest(is_acknowledged=is_acknowledged), kept_log() as kept:
                self.forget()
                self.fake.will("send", self.fake.hang_then(self.fake.accept))
                client = self.sends()
                self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
                if not is_acknowledged:
                    client.close()
                self.fake.release.set()
                if is_acknowledged:
                    self.assertReply(client.next_reply(), "250 2.0.0")
                for _ in range(2):
                    reply = self.sends().next_reply()
                    message_id = self.fake.asked("send")[0].headers["client-request-id"]
                    self.assertEqual(reply, f"250 2.0.0 Accepted by Microsoft 365, id {message_id}")
                    self.assertIn(f"first={message_id} ", kept.find("repeated")[-1][1])
                self.assertEqual(len(self.fake.delivered), 1)

    def test_login_envelope_content_message_id_and_date_identify_a_message(self) -> None:
        head, text = IDENTIFIED.split(b"Subject")
        id_field, date_field, _ = head.split(b"\r\n")
        changes: dict[str, Any]
        for is_duplicate, message, changes in (
                (True, IDENTIFIED, {}),
                (True, IDENTIFIED, {"recipients": ("b@x.y", "A@X.Y")}),
                (False, IDENTIFIED, {"recipients": ("a@x.y",)}),
                (False, IDENTIFIED, {"sender": "other@example.com"}),
                (False, IDENTIFIED, {"message": IDENTIFIED + b".\r\n"}),
                (False, IDENTIFIED, {"user": f"{TENANT}@{TENANT}"}),
                # Field names in any case and order; a value folded after the colon.
                (True, b"date:x\r\nMESSAGE-ID :\r\n\t <a@b>\r\n\r\n", {}),
                # Both missing, Date twice, one missing, empty, in the body, in a longer name.
                (False, b"Subject" + text, {}),
                (False, date_field + b"\r\n" + date_field + b"\r\nSubject" + text, {}),
                (False, id_field + b"\r\nSubject" + text, {}),
                (False, id_field + b"\r\nDate: \r\n \r\nSubject" + text, {}),
                (False, id_field + b"\r\nSubject" + text + date_field + b"\r\n", {}),
                (False, id_field + b"\r\nX-" + date_field + b"\r\nResent-" + date_field
                 + b"\r\n\r\n", {})):
            with self.subTest(f"{message!r} and {changes}"):
                self.forget()
                for changed in ({}, changes):
                    values: dict[str, Any] = {"user": USER, "message": message, "sender": SENDER,
                                              "recipients": ("a@x.y", "b@x.y"), **changed}
                    client = self.logged_in(values.pop("user"))
                    self.assertReply(client.post(**values), "250 2.0.0")
                self.assertEqual(len(self.fake.delivered), 1 if is_duplicate else 2)

    def test_a_duplicate_waits_for_the_outcome_of_the_first(self) -> None:
        for action, requests in ((self.fake.accept, 1), (say(400), 2), (utter(b""), 2)):
            with self.subTest(requests=requests):
                self.forget()
                self.fake.will("send", self.fake.hang_then(action))
                first = self.sends()
                self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
                second = self.sends()
                first.close()
                wait_for(lambda: self.running.ask(lambda: sum(
                    connection._session.holds_message
                    for connection in self.running.server._connections)) == 2)
                self.fake.release.set()
                reply = self.assertReply(second.next_reply(), "250 2.0.0")
                self.assertEqual(len(self.fake.delivered), 1)
                sent = self.fake.asked("send")
                self.assertEqual(len(sent), requests)
                self.assertTrue(reply.endswith(sent[-1].headers["client-request-id"]))
        self.assertEqual(self.running.relay.delivery._duplicates._in_progress, {})

    def test_a_waiting_duplicate_has_its_own_deadline(self) -> None:
        running = self.another(UPSTREAM_TIMEOUT="2")
        self.fake.will("send", self.fake.hang, self.fake.hang)
        clients = [self.sends(running=running) for _ in range(2)]
        replies = sorted(client.next_reply() for client in clients)
        self.assertReply(replies[0], "451 4.4.1")
        self.assertRegex(replies[1], "^451 4.4.[15] ")

    def test_a_duplicate_is_recognized_for_900_seconds(self) -> None:
        accepted = self.running.relay.delivery._duplicates._accepted
        clock = accepted._clock = Clock()
        self.addCleanup(setattr, accepted, "_clock", time.monotonic)
        for pause, number in ((0, 1), (899, 1), (2, 2)):    # a repetition does not extend it
            clock.now += pause
            self.assertReply(self.sends().next_reply(), "250 2.0.0")
            self.assertEqual(len(self.fake.delivered), number)

    def test_messages_do_not_wait_without_a_window_or_an_identification(self) -> None:
        for running, content in ((self.another(DUPLICATE_WINDOW="0"), IDENTIFIED),
                                 (self.running, b"Subject: s\r\n\r\n")):
            self.forget()
            self.fake.will("send", *[self.fake.hang_then(self.fake.accept)] * 2)
            clients = [self.sends(content, running) for _ in range(2)]
            for _ in clients:
                self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
            self.fake.release.set()
            self.assertEqual(len({client.next_reply() for client in clients}), 2)


class ConnectionTests(TlsCase):
    """Sessions over real sockets and real TLS."""

    settings = {"LARGE_MESSAGES": "refuse", "UPSTREAM_TIMEOUT": str(PATIENCE)}

    def test_a_client_logs_in_after_starttls_and_sends(self) -> None:
        client = self.connect()
        self.assertNotIn("auth", client.esmtp_features)
        self.assertReply(client.say("AUTH LOGIN"), "530 5.7.0")
        self.assertReply(client.say(f"MAIL FROM:<{SENDER}>"), "530 5.7.0")
        with kept_log() as kept:
            self.assertEqual(client.starttls(context=trusting())[0], 220)
            client.ehlo()
        self.assertIn("version=TLSv1.3", kept.find("tls")[0][1])
        self.assertIn("auth", client.esmtp_features)
        self.assertReply(client.say(f"MAIL FROM:<{SENDER}>"), "530 5.7.0")
        client.login(USER, self.password)
        self.assertReply(client.log_in(), "503 5.5.1")
        for number in range(3):
            self.assertReply(client.post(b"Subject: %d\r\n\r\n" % number), "250 2.0.0")
        self.assertEqual(client.quit()[0], 221)

    def test_a_client_logs_in_and_sends_with_implicit_tls(self) -> None:
        with smtplib.SMTP_SSL("localhost", self.running._config.smtps_port, timeout=PATIENCE,
                              local_hostname="test", context=trusting()) as client:
            client.ehlo()
            self.assertNotIn("starttls", client.esmtp_features)
            client.login(USER, self.password)
            head = f"From: {SENDER}\r\nTo: a@x.y\r\n\r\n".encode()
            message = head + random.Random(1).randbytes(1_000_000).hex("\r", 39).replace(
                "\r", "\r\n").encode() + b"\r\n"
            client.sendmail(SENDER, "a@x.y", message)
        self.assertTrue(self.fake.delivered[0].message == message)

    def test_plaintext_commands_after_starttls_are_never_executed(self) -> None:
        """CVE-2011-0411, CVE-2024-34083: in the same packet, or in the next before the 220."""
        # They fit one read of asyncio, need several, or exceed its buffer.
        for count in (1, 500, 1500, 5000, 40_000):
            injected = b"NOOP injected\r\n" * count
            with self.subTest(count):
                sock = self.raw()
                self.read_until(sock, b"\r\n")
                sock.sendall(b"EHLO x\r\n")
                self.read_until(sock, b"HELP\r\n")
                try:
                    sock.sendall(b"STARTTLS\r\n" + injected)
                    self.read_until(sock, b"220 2.0.0")
                    tls = trusting().wrap_socket(sock, server_hostname="localhost")
                except OSError:         # unread plaintext reaches TLS, and the handshake fails
                    self.assertGreaterEqual(count, 5000)
                    continue
                tls.sendall(b"EHLO real\r\nQUIT\r\n")
                replies = self.read(tls)
                tls.close()
                self.assertEqual(replies.count(b"STARTTLS"), 0)
                self.assertEqual(codes(replies), [250, 221])

    def test_the_log_explains_a_failed_handshake(self) -> None:
        strict = ssl.create_default_context(cafile=FILES["expired.pem"])
        for word, context, smtps in (
                ("SMTPS_PORT", trusting(), False),          # a ClientHello on the plain port
                ("did not start TLS", None, True),
                ("does not trust", strict, True)):
            with self.subTest(word), kept_log() as kept:
                sock = self.raw(smtps=smtps)
                if context:
                    with self.assertRaises(OSError):
                        context.wrap_socket(sock, server_hostname="localhost")
                else:
                    sock.sendall(b"EHLO x\r\n")
                    self.read(sock)
                wait_for(functools.partial(kept.find, "disconnected"))
                self.assertIn(word, kept.find("disconnected")[0][1])

    def test_an_internal_error_ends_the_session_with_421_and_is_logged(self) -> None:
        handler = logging.Handler()
        handler.emit = lambda record: 1 / ("NOOP d" not in record.getMessage())  # type: ignore
        relay.log.addHandler(handler)
        self.addCleanup(relay.log.removeHandler, handler)
        with kept_log() as kept:
            self.assertReply(self.connect().say("NOOP defect"), "421 4.3.0")
            wait_for(lambda: kept.find("disconnected"))
        self.assertEqual([level for level, line in kept.lines if " internal-error" in line],
                         ["ERROR"])
        self.assertIn('reason="internal error"', kept.find("disconnected")[0][1])

    def test_replies_to_pipelined_commands_are_sent_at_once_in_one_packet(self) -> None:
        """Without TCP_NODELAY a second packet would be delayed by 40 ms."""
        sock = self.raw()
        self.read_until(sock, b"\r\n")
        connection, = self.running.ask(lambda: list(self.running.server._connections))
        self.assertTrue(connection._writer.get_extra_info("socket").getsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY))
        for _ in range(20):             # repeated because two writes can share a packet by chance
            sock.sendall(b"NOOP\r\nRSET\r\nNOOP\r\n")
            self.assertEqual(codes(sock.recv(65536)), [250, 250, 250])

    def test_pipelined_messages_get_all_their_replies(self) -> None:
        client = self.connect()
        client.starttls(context=trusting())
        client.ehlo()
        client.log_in(password=self.password)
        client.send(MAIL + RCPT + RCPT + b"DATA\r\n")
        self.assertEqual([client.getreply()[0] for _ in range(4)], [250, 250, 250, 354])
        client.send(b"one\r\n.\r\n" + MAIL + RCPT + b"DATA\r\ntwo\r\n.\r\nQUIT\r\n")
        self.assertEqual([client.getreply()[0] for _ in range(6)], [250, 250, 250, 354, 250, 221])
        self.assertEqual(len(self.fake.delivered), 2)

    def test_the_log_of_a_session_is_ascii_under_one_id(self) -> None:
        with kept_log() as kept:
            client = self.connect()
            client.say("NOSUCH\tthing")
            client.send("NOOP \u202e x\r\n".encode())
            self.assertEqual(client.getreply()[0], 250)
            client.quit()
            wait_for(lambda: kept.find("disconnected"))
        events = [line.split()[1] for level, line in kept.lines if level == "INFO"]
        self.assertEqual(events, ["connected", "refused", "disconnected"])
        self.assertIn('< "NOOP \\u202e x"', repr(kept.lines).replace("\\\\", "\\"))
        self.assertTrue(all(line.isascii() for _, line in kept.lines))
        self.assertEqual(len({line.split()[0] for _, line in kept.lines}), 1)
        self.assertIn("client=127.0.0.1", kept.find("connected")[0][1])
        self.assertIn("reason=quit", kept.find("disconnected")[0][1])


class SlowReaderTests(TlsCase):
    """Clients that read late or not at all."""

    settings = {"REQUIRE_TLS": "false", "CLIENT_TIMEOUT": "2"}

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(relay.log.setLevel, relay.log.level)
        relay.log.setLevel("INFO")      # otherwise each command would be logged

    def fill(self, send: Callable[[], Any]) -> Any:
        """Send until replies pile up in the relay. Returns the connection."""
        def is_full() -> bool:
            send()
            return any(self.running.ask(lambda: [
                writer.transport.get_write_buffer_size()
                for connection in self.running.server._connections
                for writer in (connection._writer, connection._plain_writer)]))
        wait_for(is_full)
        return self.running.ask(lambda: next(iter(self.running.server._connections)))

    def test_a_late_reader_gets_every_reply_before_the_close(self) -> None:
        for stops in (False, True):
            self.running = self.another(CLIENT_TIMEOUT="300")
            # LINGER must be long enough for this thread on a slow machine.
            with self.subTest(stops=stops), kept_log() as kept, \
                    unittest.mock.patch.object(relay, "LINGER", PATIENCE):
                sock = self.deaf()
                connection = self.fill(functools.partial(sock.sendall, b"HELP\r\n" * 100))
                sock.sendall(b"QUIT\r\n")
                wait_for(lambda: kept.find("disconnected"))
                if stops:
                    self.running.begin_stop()
                    wait_for(lambda: kept.find("stopping"))
                self.assertIn(b"\r\n221 2.0.0", last_octets(sock))
                wait_for(connection.task.done)
                self.assertIsNone(connection.task.exception())

    def test_the_relay_ends_tls_with_a_close_notify(self) -> None:
        """Otherwise a client could not know whether it has received everything."""
        sock = trusting().wrap_socket(self.raw(smtps=True), server_hostname="localhost",
                                      suppress_ragged_eofs=False)
        self.addCleanup(sock.close)
        self.read_until(sock, b"220 ")
        sock.sendall(b"QUIT\r\n")
        self.read_until(sock, b"221 ")
        while sock.recv(4096):
            pass

    def test_a_client_that_ends_tls_without_reading_is_closed(self) -> None:
        """Without help asyncio would wait forever for the client to read the rest."""
        before = len(os.listdir("/proc/self/fd")) if IS_LINUX else 0
        raw = self.deaf(smtps=True)
        into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = trusting().wrap_bio(into, out, server_hostname="localhost")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                raw.sendall(out.read())
                into.write(raw.recv(16384))
        self.fill(lambda: tls.write(b"HELP\r\n" * 300) and raw.sendall(out.read()))  # type: ignore
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        raw.sendall(out.read())
        wait_for(lambda: not self.running.ask(lambda: len(self.running.server._connections)))
        if IS_LINUX:                    # only the client's socket is still open
            wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


class ConnectionLimitTests(TlsCase):
    """Limits on the number of connections; CLIENT_TIMEOUT must not end these early."""

    settings = {"MAX_CONNECTIONS": "6", "MAX_CONNECTIONS_PER_CLIENT": "3", "REQUIRE_TLS": "false"}

    def tearDown(self) -> None:
        """Wait until the connections of a test are closed."""
        self.doCleanups()
        wait_for(lambda: not self.running.ask(lambda: len(self.running.server._connections)))

    def test_connections_above_the_limit_of_one_client_get_421(self) -> None:
        held = [self.connect() for _ in range(3)]
        with kept_log() as kept:
            reply = self.read(self.raw())
        self.assertTrue(reply.startswith(b"421 4.7.0 Too many connections from your"), reply)
        self.assertEqual(kept.find("connection-refused")[0][0], "WARNING")
        self.assertEqual(self.read(self.raw(smtps=True)), b"")
        held[0].close()
        wait_for(lambda: self.running.ask(lambda: len(self.running.server._connections)) < 3)
        self.connect()

    def test_an_ipv6_64_network_counts_as_one_client(self) -> None:
        def come(address: str) -> None:
            reader, writer = asyncio.StreamReader(), unittest.mock.MagicMock()
            sock = unittest.mock.MagicMock(fileno=lambda: 5)
            writer.get_extra_info = {"peername": (address, 9, 0, 0), "sockname": ("::", 25),
                                     "socket": sock}.get
            writer.drain = writer.wait_closed = unittest.mock.AsyncMock()
            reader.feed_eof()
            self.running.server._accept(False, reader, writer)
        addresses = ("2001:db8::1", "2001:db8::2", "2001:db8::ffff:1", "2001:db8::3",
                     "2001:db8:0:1::1")
        with kept_log() as kept:
            self.running.ask(lambda: list(map(come, addresses)))    # all before the first ends
        (_, line), = kept.find("connection-refused")
        self.assertIn("client=2001:db8::3 ", line)


class LimitTests(TlsCase):
    """Time limits for a client that stops anywhere or is slow."""

    settings = {"CLIENT_TIMEOUT": "1.5", "REQUIRE_TLS": "false"}
    DATA = b"EHLO x\r\n*MAIL FROM:<a@x.y>\r\nRCPT TO:<a@x.y>\r\nDATA\r\n"
    # What the client sends ("*" is a login), and what it then sends repeatedly, byte by byte.
    CASES = {
        "after the greeting": (b"", b""), "in a command": (b"EHLO x\r\nNOO", b""),
        "after EHLO": (b"EHLO x\r\n", b""), "in a login": (b"EHLO x\r\nAUTH LOGIN\r\n", b""),
        "after a login": (b"EHLO x\r\n*", b""), "in an envelope": (DATA[:-6], b""),
        "before a message": (DATA, b""), "in a message": (DATA + b"To: b\r\n.", b""),
        "in BDAT, which is not supported": (b"EHLO x\r\n*BDAT 9\r\nx", b""),
        "a slow command": (b"", b"x"), "a slow message": (DATA, b"x\r\n")}

    def test_a_silent_or_slow_client_gets_421_in_every_state(self) -> None:
        def play(sent: bytes, slow: bytes, is_tls: bool) -> tuple[bytes, float]:
            begun = time.monotonic()
            with contextlib.ExitStack() as stack:
                sock = stack.enter_context(self.raw(smtps=is_tls))
                if is_tls:
                    sock = stack.enter_context(trusting().wrap_socket(
                        sock, server_hostname="localhost"))
                for line in sent.replace(b"*", login_line(password=self.password)
                                         ).splitlines(keepends=True):
                    sock.sendall(line)
                received = self.read_until(sock, b"354 ") if slow and sent else b""
                sock.settimeout(0.05 if slow else PATIENCE)
                for byte in itertools.cycle(split_octets(slow)):
                    sock.sendall(byte)
                    with contextlib.suppress(socket.timeout):
                        received += sock.recv(1000)
                    if b"421 4.4.2" in received or time.monotonic() - begun > PATIENCE:
                        break
                return received + self.read(sock), time.monotonic() - begun
        cases = {f"{name}{', TLS' * is_tls}": (*case, is_tls)
                 for name, case in self.CASES.items() for is_tls in (False, True)}
        self.logged_in()            # caches the token, so that no login waits
        for name, (received, seconds) in at_once(play, cases).items():
            with self.subTest(name):
                self.assertTrue(received.splitlines()[-1].startswith(b"421 4.4.2 "), received)
                self.assertGreaterEqual(seconds, 1.5)
                self.assertLess(seconds, PATIENCE)

    @unittest.mock.patch.object(relay, "NO_PROGRESS_TIMEOUT", relay.NO_PROGRESS_TIMEOUT)
    def test_a_session_without_progress_for_an_hour_gets_421(self) -> None:
        idle, busy = self.logged_in(), self.begun()
        self.assertReply(idle.say("NOOP"), "250 2.0.0")
        relay.NO_PROGRESS_TIMEOUT = 0.0
        self.assertReply(idle.say("NOOP"), "421 4.7.0 Too long")
        busy.send(b"Subject: s\r\n\r\nText\r\n.\r\n")        # a message is not interrupted
        self.assertReply(busy.next_reply(), "250 2.0.0")
        self.assertReply(busy.next_reply(), "421 4.7.0 Too long")

    def test_a_client_that_never_reads_is_disconnected(self) -> None:
        for smtps in (False, True):
            sock = self.deaf(smtps=smtps)
            if smtps:
                sock = trusting().wrap_socket(sock, server_hostname="localhost")
                self.addCleanup(sock.close)
            with self.assertRaises((ConnectionError, ssl.SSLError)):    # no socket timeout
                while True:
                    sock.sendall(b"EHLO x\r\n" * 2_000)

    def test_an_unfinished_handshake_ends_after_its_timeout(self) -> None:
        """Whether it is silent or slow; other clients are served meanwhile."""
        self.assertEqual(relay.HANDSHAKE_TIMEOUT, 30)
        with unittest.mock.patch.object(relay, "HANDSHAKE_TIMEOUT", 0.3):
            for smtps, is_slow in itertools.product((False, True), repeat=2):
                with self.subTest(smtps=smtps, is_slow=is_slow):
                    begun = time.monotonic()
                    sock = self.half_way(b"\x16\x03\x01\x3f\xff\x01\x00\x3f\xfb\x03\x03",
                                         smtps=smtps)
                    with contextlib.suppress(ConnectionError):
                        while is_slow and time.monotonic() - begun < PATIENCE:
                            sock.sendall(b"x")
                            time.sleep(0.02)
                    self.assertReply(self.connect().say("NOOP"), "250 2.0.0")
                    self.assertEqual(self.read(sock), b"")
                    self.assertGreaterEqual(time.monotonic() - begun, 0.3)


class ShutdownTests(RelayCase):
    """SIGTERM: messages in progress are completed, and idle clients get 421."""

    def test_a_client_accepted_while_the_ports_close_gets_421(self) -> None:
        running, clients = self.another(), list[socket.socket]()

        def connect_and_stop() -> None:
            clients.append(socket.create_connection(("127.0.0.1", running.port)))
            running._loop.call_soon(running._stop.set)      # while asyncio accepts the connection
        running._loop.call_soon_threadsafe(connect_and_stop)
        running.wait()
        with clients[0] as client:
            client.settimeout(PATIENCE)
            self.assertIn(b"\r\n421 4.3.2 ", client.makefile("rb").read())

    def test_messages_in_progress_complete_and_idle_clients_get_421(self) -> None:
        running = self.another()
        self.fake.will("send", self.fake.hang_then(self.fake.accept))
        idle, busy, writing = self.connect(running), self.begun(running), self.begun(running)
        busy.send(b"one\r\n.\r\n")
        writing.send(b"half")
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))

        def come() -> socket.socket:
            """Connect so that the system accepts it and the server learns of it too late."""
            sock = socket.create_connection(("127.0.0.1", running.port), PATIENCE)
            asyncio.get_running_loop().call_later(0, running._stop.set)     # in this iteration
            return sock
        with running.ask(come) as sock:
            self.assertRegex(last_octets(sock), rb"\A220 .*\r\n421 4\.3\.2 .*\r\n\Z")
        self.assertReply(idle.next_reply(), "421 4.3.2")
        self.assertEqual(idle.next_reply(), "")
        with self.assertRaises(OSError):
            Client(running.port)
        writing.send(b" two\r\n.\r\n")
        self.assertReply(writing.next_reply(), "250 2.0.0")
        self.assertReply(writing.next_reply(), "421 4.3.2")
        self.fake.release.set()
        self.assertReply(busy.next_reply(), "250 2.0.0")
        self.assertReply(busy.next_reply(), "421 4.3.2")
        running.wait()
        self.assertEqual(len(self.fake.delivered), 2)

    def test_clients_without_a_message_do_not_delay_shutdown(self) -> None:
        """One is logging in, the other does not read its replies."""
        running = self.another(SHUTDOWN_TIMEOUT="60")
        self.fake.will("token", self.fake.hang)
        client, deaf = self.connect(running), self.connect(running)
        client.putcmd(f"AUTH PLAIN {plain(USER, self.password).decode()}")
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        assert deaf.sock is not None
        deaf.sock.settimeout(0.3)
        deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)     # fills soon
        with contextlib.suppress(OSError):
            while True:
                deaf.sock.sendall(b"HELP\r\n" * 1_000)
        running.stop()
        self.assertReply(client.next_reply(), "421 4.3.2")

    def test_a_message_accepted_at_the_moment_of_the_abort_is_acknowledged(self) -> None:
        """Otherwise the client would send it again. An accepted chunk is not a message."""
        for step, action, message, reply, counts in (
                ("send", self.fake.accept, b"one\r\n", "250 2.0.0", (1, 0, 0)),
                ("put", say(202), LARGE, "421 4.3.2", (0, 1, 1))):
            self.fake.reset()
            running = self.another()
            client = self.begun(running)
            self.fake.will(step, self.fake.hang_then(action))
            client.send(message + b".\r\n")
            self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
            running.ask(functools.partial(cut_when_done, running, self.fake.release))
            self.assertReply(client.next_reply(), reply)
            self.assertEqual((len(self.fake.delivered), len(self.fake.asked("put")),
                              len(self.fake.deleted)), counts)

    def test_a_message_aborted_at_the_deadline_leaves_no_draft_or_a_log_line(self) -> None:
        for step, message, action, deleted, left in (
                ("send", b"one\r\n", self.fake.accept, 0, 0),
                ("put", LARGE, self.fake.accept, 1, 0), ("put", LARGE, self.fake.hang, 0, 1)):
            self.fake.reset()
            running = self.another(SHUTDOWN_TIMEOUT="0.2")
            self.fake.will(step, self.fake.hang)
            self.fake.will("delete", action)
            client = self.begun(running)
            client.sock.sendall(message + b".\r\n")
            self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
            with kept_log() as kept:
                running.stop()
            self.assertReply(client.next_reply(), "421 4.3.2")
            message_id = self.fake.asked("send" if step == "send" else "draft")[0].headers[
                "client-request-id"]
            self.assertIn(f"{message_id} aborted ", str(kept.find("aborted")))
            self.assertEqual((len(self.fake.deleted), len(kept.find("draft-left"))),
                             (deleted, left))


@unittest.skipUnless(sys.platform == "linux", "needs /proc, and the addresses of 127/8")
class OverloadTests(unittest.TestCase):
    """Abuse of a relay in its own process: other clients are served meanwhile, memory is bounded,
    and all resources are released in the end.
    """

    MB = 1_000_000
    DEVICES, COMMANDS = 1200, 25_000        # `soak` replaces them with FULL
    FULL: Any = {"DEVICES": 5000, "COMMANDS": 100_000}
    fake: FakeMicrosoft

    @classmethod
    def setUpClass(cls) -> None:
        """Start Microsoft, and raise the limit of descriptors, which the clients need too."""
        cls.fake = FakeMicrosoft()
        cls.addClassCleanup(cls.fake.close)
        soft, hard = relay.resource.getrlimit(relay.resource.RLIMIT_NOFILE)
        relay.resource.setrlimit(relay.resource.RLIMIT_NOFILE, (hard, hard))
        cls.addClassCleanup(relay.resource.setrlimit, relay.resource.RLIMIT_NOFILE, (soft, hard))
        cls.descriptors = hard

    def setUp(self) -> None:
        self.fake.reset()

    @contextlib.contextmanager
    def watch(self, *, change: str = "", errors: str = "", **settings: str) -> Iterator[Watched]:
        """Start a relay; in the end check that it holds what it held at first, and that it logged
        no errors except those containing `errors`. `change` is code to run before the start.
        """
        port = free_port()
        code = f"import smtp_oauth_relay as r\n{change}\nr.main([])"
        environ: dict[str, Any] = {
            "SMTP_PORT": "0", "SMTPS_PORT": str(port), "LISTEN_ADDRESS": "127.0.0.1",
            "TLS_CERT_FILEPATH": FILES["cert.pem"], "TLS_KEY_FILEPATH": FILES["key.pem"],
            "AZURE_AUTHORITY_HOST": self.fake.url, "GRAPH_ENDPOINT": self.fake.url,
            "REQUIRE_TLS": "false", "MAX_CONNECTIONS": "6000",
            "MAX_CONNECTIONS_PER_CLIENT": "6000", **settings}
        with start_python("-c", code, **environ) as process:
            watched = Watched(process, self.fake.url)
            with self.honest(watched) as client:
                self.assertServed(client)
                before = watched.left() - 1

            def settle() -> None:
                wait_for(lambda: watched.events["disconnected"] == watched.events["connected"])
                wait_for(lambda: watched.left() <= before)      # less if a thread has ended
            settle()
            watched.forget_peak()
            yield watched
            settle()
            with self.honest(watched) as client:
                self.assertServed(client)
            settle()
            # A closed connection is counted until the next loop iteration, which is over when a
            # new client has its replies.
            with contextlib.closing(Client(watched.port)) as client:
                client.ehlo()
                client.noop()
                self.assertSound(watched.stop(), errors)

    def assertSound(self, log: str, errors: str) -> None:
        """Check that a log has no errors, and that only one connection was left at the stop."""
        self.assertIn("stopping connections=1\n", log[-3000:])
        self.assertTrue(log.endswith("stopped\nexit 0"), log[-1000:])
        self.assertNotIn("Traceback", log)
        for line in log.splitlines():
            if errors and errors in line:
                continue
            self.assertNotRegex(line, " ERROR | CRITICAL |internal.error")

    @contextlib.contextmanager
    def honest(self, watched: Watched) -> Iterator[Client]:
        """Connect a well-behaved client and log it in."""
        with contextlib.closing(Client(watched.port)) as client:
            client.ehlo()
            self.assertRegex(client.log_in(), "^235 ")
            yield client

    def assertServed(self, client: Client) -> None:
        self.assertRegex(client.post(), "^250 2.0.0 ")

    def assertMemory(self, watched: Watched, begun: int, limit: int) -> None:
        """Check that memory never grew by as many bytes as `limit`."""
        self.assertLess(watched.memory("HWM") - begun, limit)

    @contextlib.contextmanager
    def crowd(self, watched: Watched, number: int, *, smtps: bool = False, send: bytes = b"",
              expect: bytes = b"220 ", sources: int = 1) -> Iterator[list[socket.socket]]:
        """Open connections from `sources` addresses; on each send and expect something."""
        port = watched.smtps_port if smtps else watched.port
        with contextlib.ExitStack() as stack:
            socks: list[socket.socket] = []
            for _ in range(number):
                sock = stack.enter_context(socket.socket())
                sock.settimeout(PATIENCE)
                high, low = divmod(len(socks) % sources, 250)
                sock.bind((f"127.2.{high}.{low + 1}", 0))
                sock.connect(("127.0.0.1", port))
                socks.append(sock)
                if send:
                    sock.sendall(send)
                if len(socks) % 100 == 0:       # the listen backlog is limited
                    self.expect(socks[-100:], expect, bool(expect))
            self.expect(socks[number // 100 * 100:], expect, bool(expect))
            yield socks

    def expect(self, socks: list[socket.socket], wanted: bytes, times: int = 1) -> None:
        """Read on each connection until `wanted` has arrived so many times."""
        for sock in socks:
            received = b""
            while received.count(wanted) < times:
                part = sock.recv(65536)
                self.assertTrue(part, f"{received!r} ended before {wanted!r}")
                received += part

    def test_connections_above_the_limit_use_no_descriptors(self) -> None:
        """A refused client holds nothing, even if it never closes its connection."""
        with self.watch(MAX_CONNECTIONS="21", MAX_CONNECTIONS_PER_CLIENT="20") as watched:
            with self.honest(watched) as client:
                with self.crowd(watched, 20):
                    count = watched.descriptors()
                    with self.crowd(watched, 300, expect=b"421 4.7.0 Too many connections;"), \
                            self.crowd(watched, 300, smtps=True, expect=b"", sources=300):
                        self.assertServed(client)
                        wait_for(lambda: watched.events["connection-refused"] == 600)
                        wait_for(lambda: watched.descriptors() <= count + 1)
                wait_for(lambda: watched.descriptors() < count)
                wait_for(lambda: watched.events["disconnected"] == 21)
                self.assertServed(client)       # and their places are free again
                with self.crowd(watched, 20):
                    self.assertServed(client)

    def test_many_devices_with_an_expired_secret_cause_one_token_request(self) -> None:
        if self.descriptors < 2 * self.DEVICES + 2000:
            self.skipTest("needs more descriptors")
        wrong = f"AUTH PLAIN {plain(password='wrong').decode()}\r\n".encode()
        with self.watch(change="r.FAILURE_DELAY, r.NEGATIVE_CACHE_TTL = 0.01, 3600.0") as watched:
            begun, asked = watched.memory(), len(self.fake.asked("token"))
            # No address reaches the limit of failed logins.
            with self.crowd(watched, self.DEVICES, send=b"EHLO x\r\n", expect=b"HELP",
                            sources=self.DEVICES // 4) as socks, self.honest(watched) as client:
                self.assertServed(client)
                self.assertGreater(watched.descriptors(), self.DEVICES)
                self.assertMemory(watched, begun, self.DEVICES * 21_000)
                self.fake.will("token", say(401, aadsts(7000215, "invalid_client")))
                for sock in socks:
                    sock.sendall(wrong * 2)
                for _ in range(50):
                    self.assertServed(client)
                self.expect(socks, b"535 ", 2)
                self.assertMemory(watched, begun, self.DEVICES * 21_000)
            self.assertEqual(len(self.fake.asked("token")) - asked, 1)
            wait_for(lambda: watched.lines("result=refused") >= 2 * self.DEVICES)
            self.assertEqual(watched.lines("result=refused"), 2 * self.DEVICES)

    def test_messages_above_the_memory_limit_get_452(self) -> None:
        """40 clients send 0.45 MB each, and the limit is 5 MB."""
        block = (b"x" * 78 + b"\r\n") * 625
        head = (f"EHLO x\r\nAUTH PLAIN {plain().decode()}\r\nMAIL FROM:<{SENDER}>\r\n"
                "RCPT TO:<a@x.y>\r\nDATA\r\n").encode()
        with self.watch(MAX_MEMORY_FOR_MESSAGES="5000000", MAX_MESSAGE_SIZE="2000000") as watched:
            begun = watched.memory()
            with self.crowd(watched, 40, send=head, expect=b"354 ") as socks, \
                    self.honest(watched) as client:
                for part in range(9):
                    for sock in socks:
                        sock.sendall(b"\r\n" * (not part) + block)
                self.assertServed(client)
                for sock in socks:
                    sock.sendall(b".\r\nQUIT\r\n")
                replies = [last_octets(sock)[:9] for sock in socks]
                self.assertEqual(collections.Counter(replies), {b"250 2.0.0": 11, b"452 4.3.1": 29})
                self.assertMemory(watched, begun, 30 * self.MB)
                for _ in range(12):             # the memory is free again
                    self.assertRegex(client.post(block * 9), "^250 ")

    def test_the_relay_recovers_from_a_lack_of_descriptors(self) -> None:
        """It serves the open connections, waits without a busy loop, and accepts again later."""
        with self.watch(CLIENT_TIMEOUT="3", errors="out of system resource") as watched, \
                self.honest(watched) as client:
            self.assertServed(client)       # leaves an idle connection to Microsoft
            limit = watched.descriptors() + 8
            watched.allow_descriptors(limit)
            with self.crowd(watched, 16, expect=b"") as socks:
                wait_for(lambda: watched.descriptors() >= limit)
                begun, work, lines = time.monotonic(), watched.processor(), len(watched.log)
                self.assertServed(client)
                self.assertIn(b"421 4.4.2", last_octets(socks[0]))
                # asyncio calls accept() `backlog` times at once. Each failure makes a log line and
                # a timer that tries again, so only a backlog of 1 does not multiply them.
                self.assertLess(watched.processor() - work, (time.monotonic() - begun) / 2)
                self.assertLess(len(watched.log) - lines, 50)
                self.expect(socks[8:], b"220 ")     # the waiting clients are accepted now

    def test_400_unfinished_handshakes_use_bounded_memory(self) -> None:
        """On both ports, after 50 bytes and after all of it. asyncio takes 300 kB for each."""
        hello = client_hello()
        with self.watch(change="r.HANDSHAKE_TIMEOUT = 3") as watched:
            begun = watched.memory()
            with self.crowd(watched, 200, send=b"EHLO x\r\nSTARTTLS\r\n",
                            expect=b"Ready") as socks, \
                    self.crowd(watched, 200, smtps=True, expect=b"") as smtps_socks:
                socks += smtps_socks
                for sock, part in zip(socks, itertools.cycle((hello, hello[:50]))):
                    sock.sendall(part)
                with self.honest(watched) as client:
                    client.starttls(context=trusting())
                    self.assertEqual(client.ehlo()[0], 250)
                for sock in socks:
                    last_octets(sock)
            self.assertMemory(watched, begun, 400 * 120_000)

    def test_a_flood_of_commands_ends_with_421(self) -> None:
        """The relay does not process all of them."""
        with self.watch() as watched, self.honest(watched) as client:
            for command in (b"NOOP", b"Unknown"):
                with self.crowd(watched, 1) as (sock,), \
                        concurrent.futures.ThreadPoolExecutor(2) as pool:
                    end = pool.submit(last_octets, sock)
                    pool.submit(sock.sendall, (command + b"\r\n") * self.COMMANDS + b"QUIT\r\n")
                    self.assertEqual(end.result().splitlines()[-1][:9], b"421 4.7.0")
            self.assertServed(client)


class ResetTests(TlsCase):
    """Clients that disappear at any point of a session."""

    settings = {"REQUIRE_TLS": "false", "UPSTREAM_TIMEOUT": str(PATIENCE)}
    EHLO = ((b"EHLO x\r\n", b"HELP"),)

    def script(self, state: str) -> tuple[tuple[bytes, bytes], ...]:
        """Return what a client sends and expects until it is in a state."""
        login = (*self.EHLO, (b"AUTH PLAIN " + plain(password=self.password) + b"\r\n", b"235 "))
        mail = (*login, (f"MAIL FROM:<{SENDER}>\r\n".encode(), b"250 2.1.0"))
        rcpt = (*mail, (b"RCPT TO:<a@x.y>\r\n", b"250 2.1.5"))
        data = (*rcpt, (b"DATA\r\n", b"354 "))
        return {
            "greeted": (), "within a command": ((b"EH", b""),), "EHLO": self.EHLO,
            "AUTH": (*self.EHLO, (b"AUTH PLAIN\r\n", b"334")),
            "half of AUTH": (*self.EHLO, (b"AUTH LOGIN\r\nbmFtZQ==\r\n", b"UGFzc3dvcmQ6")),
            "login": login, "MAIL": mail, "RCPT": rcpt, "DATA": data,
            "content": (*data, (b"Subject: s\r\n" * 10_000 + b"\r\n.", b"")),
            "QUIT": (*rcpt, (b"QUIT\r\n", b"")), "after QUIT": (*rcpt, (b"QUIT\r\n", b"221 ")),
            "login in progress": (*login[:1], (login[1][0], b"")),
            "message in progress": (*data, (b"To: a@x.y\r\n\r\nText\r\n.\r\n", b"")),
        }[state]

    def come(self, state: str, *, tls: bool = False) -> socket.socket:
        """Bring a client into a state."""
        sock = self.raw(smtps=tls)
        if tls:
            sock = trusting().wrap_socket(sock, server_hostname="localhost")
        self.addCleanup(sock.close)
        self.read_until(sock, b"220 ")
        for sent, wanted in self.script(state):
            sock.sendall(sent)
            if wanted:
                self.read_until(sock, wanted)
        return sock

    def everyone(self) -> Iterator[socket.socket]:
        """Bring a client into each state without a request to Microsoft in progress."""
        for smtps in (False, True):
            yield self.raw(smtps=smtps)
            for data in (b"", client_hello()[:50], client_hello(), b"EHLO x\r\n",
                         b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\0\2xx"):
                yield self.half_way(data, smtps=smtps)
            for state in ("greeted", "within a command", "EHLO", "AUTH", "half of AUTH", "login",
                          "MAIL", "RCPT", "DATA", "content", "QUIT", "after QUIT"):
                yield self.come(state, tls=smtps)

    @unittest.skipUnless(sys.platform == "linux", "needs /proc")
    def test_clients_that_disappear_in_any_state_leave_nothing_behind(self) -> None:
        self.assertReply(self.logged_in().post(), "250 2.0.0")
        self.doCleanups()
        self.assertEqual(settled(lambda: what_is_left(self.running)), [])
        count = len(os.listdir("/proc/self/fd"))
        with kept_log() as kept:
            for number in range(10):
                for sock in self.everyone():
                    (reset if number % 2 else type(sock).close)(sock)
                with self.logged_in() as client:
                    self.assertReply(client.post(), "250 2.0.0")
            self.assertEqual(settled(lambda: what_is_left(self.running)), [])
        self.assertEqual([line for line in kept.lines if line[0] in ("WARNING", "ERROR")], [])
        self.assertEqual(len(kept.find("disconnected")), len(kept.find("connected")))
        self.assertGreaterEqual(len(kept.find("connected")), 380)
        self.doCleanups()
        gc.collect()                    # closes the clients' sockets in this process
        # Idle connections to Microsoft may remain, but not one per client.
        wait_for(lambda: len(os.listdir("/proc/self/fd")) < count + 10)

    def test_a_message_is_sent_although_its_client_disappears(self) -> None:
        """A login is discarded. A message is sent, and the log records it."""
        for tls in (False, True):
            for step, state in (("token", "login in progress"), ("send", "message in progress")):
                self.fake.reset()
                self.fake.will(step, self.fake.hang_then(self.fake.accept))
                self.password = f"secret of {tls} {step}"
                with self.subTest(state, tls=tls), kept_log() as kept:
                    sock = self.come(state, tls=tls)
                    self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
                    reset(sock)
                    with self.connect() as client:
                        client.log_in(password="another")
                        self.assertReply(client.post(), "250 2.0.0")
                    self.fake.release.set()
                    self.assertEqual(settled(lambda: what_is_left(self.running)), [])
                    sent = 1 + (step == "send")
                    self.assertEqual(len(self.fake.delivered), sent)
                    self.assertEqual(len(kept.find("sent")), sent)


class ServeTests(unittest.TestCase):
    """The program serves, and stops on a signal."""

    def setUp(self) -> None:
        self.fake = FakeMicrosoft()
        self.addCleanup(self.fake.close)
        self.endpoints: dict[str, Any] = {"AZURE_AUTHORITY_HOST": self.fake.url,
                                          "GRAPH_ENDPOINT": self.fake.url}

    def serve(self, **environ: Any) -> Any:
        return start_program(**{"SMTP_PORT": "0", "LISTEN_ADDRESS": "127.0.0.1",
                                "TLS_CERT_FILEPATH": FILES["cert.pem"],
                                "TLS_KEY_FILEPATH": FILES["key.pem"], **self.endpoints,
                                **environ})

    def port(self, process: subprocess.Popen[str]) -> int:
        """Read the log until it names the port."""
        return int(wait_for_line(process, "listening").rpartition("port=")[2].split()[0])

    def test_sigterm_drains_and_a_second_signal_ends_at_once(self) -> None:
        """SIGINT does the same as SIGTERM. SIGHUP never ends the relay."""
        fake = self.fake
        for first, second in ((signal.SIGTERM, None), (signal.SIGINT, signal.SIGTERM)):
            fake.reset()
            fake.will("send", fake.hang_then(fake.accept))
            with self.subTest(second), self.serve(TLS_SOURCE="off", REQUIRE_TLS="false") as process:
                port = self.port(process)
                process.send_signal(getattr(signal, "SIGHUP", 0))
                idle, busy = Client(port), Client(port)
                self.addCleanup(idle.close)
                self.addCleanup(busy.close)
                busy.ehlo()
                busy.log_in()
                begin_message(busy, b"\r\n")
                self.assertTrue(fake.arrived.acquire(timeout=PATIENCE))
                process.send_signal(first)
                self.assertTrue(idle.next_reply().startswith("421 4.3.2"))
                if second:
                    process.send_signal(second)
                    self.assertEqual(process.wait(PATIENCE), 128 + second)
                fake.release.set()
                self.assertEqual(process.wait(PATIENCE), 128 + second if second else 0)
        fake.reset()
        fake.will("imds", fake.hang)            # before the event loop handles signals
        with self.serve(TLS_SOURCE="keyvault", AZURE_KEY_VAULT_URL=fake.url,
                        AZURE_KEY_VAULT_CERT_NAME="relay",
                        AZURE_POD_IDENTITY_AUTHORITY_HOST=fake.url) as process:
            wait_for(lambda: fake.asked("imds"))
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)

    def test_a_signal_delivered_to_another_thread_stops_the_relay(self) -> None:
        """It wakes the loop, like a signal that arrives just before the loop sleeps."""
        code = """if True:
            import logging, signal, threading, time, smtp_oauth_relay as relay
            def send():
                time.sleep(0.2)
                signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
                time.sleep(60)
            handler = logging.Handler()
            handler.emit = lambda record: "listening" in record.getMessage() and (
                threading.Thread(target=send, daemon=True).start())
            relay.log.addHandler(handler)
            raise SystemExit(relay.main([]))"""
        with start_python("-c", code, SMTP_PORT="0", TLS_SOURCE="off",
                          REQUIRE_TLS="false") as process:
            self.assertEqual(process.wait(PATIENCE), 0)

    @unittest.skipUnless(relay.resource, "needs limits of open files")
    def test_connections_above_the_limit_of_open_files_get_421(self) -> None:
        """The soft limit is raised. At the hard limit the accepted clients are served."""
        code = ("import resource, smtp_oauth_relay as relay\n"
                "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 60))\nrelay.main([])")
        with start_python("-c", code, SMTP_PORT="0", LISTEN_ADDRESS="127.0.0.1",
                          TLS_SOURCE="off", REQUIRE_TLS="false", MAX_CONNECTIONS="200",
                          **self.endpoints) as process:
            port, clients, reply = self.port(process), [], "220"
            while reply.startswith("220"):
                sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
                self.addCleanup(sock.close)
                reply = sock.recv(1000).decode()
                clients.append(sock)
            self.assertRegex(reply, "^421 4.7.0 Too many connections for the limit of open ")
            self.assertGreater(len(clients), 10)
            for number, sock in enumerate(clients[:-1]):
                sock.sendall(b"EHLO x\r\n" + login_line() + b"MAIL FROM:<%d@x.y>\r\n"
                             b"RCPT TO:<a@x.y>\r\nDATA\r\n\r\n.\r\nQUIT\r\n" % number)
            for sock in clients[:-1]:
                self.assertRegex(last_octets(sock), rb"\r\n250 2\.0\.0 [^\r]+\r\n221 ")

    @unittest.skipUnless(relay.resource, "needs limits of open files")
    def test_the_soft_limit_of_open_files_is_raised_as_far_as_possible(self) -> None:
        """The limits can be infinite, as on macOS, and a sandbox can forbid raising them."""
        resource, endless = relay.resource, relay.resource.RLIM_INFINITY
        for limits, error, raised, wanted in (
                ((endless, endless), None, [], math.inf), ((600, 900), None, [], 600),
                ((50, endless), None, [500], 500), ((50, 300), None, [300], 300),
                ((50, endless), ValueError, [500], 50), ((50, 900), OSError, [500], 50)):
            with self.subTest(limits), unittest.mock.patch.multiple(
                    resource, getrlimit=lambda _, limits=limits: limits,
                    setrlimit=unittest.mock.Mock(side_effect=error)):
                self.assertEqual(relay.raise_open_files(500), wanted)
                self.assertEqual([call.args[1][0] for call in
                                  resource.setrlimit.call_args_list], raised)

    def test_ipv4_and_ipv6_clients_reach_the_same_port(self) -> None:
        """One socket serves both, and the log shows IPv4 addresses in IPv4 notation."""
        with self.serve(LISTEN_ADDRESS="") as process:
            port = self.port(process)
            for host in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
                smtplib.SMTP(host, port, "test", PATIENCE).close()
                self.assertIn(f"client={host} ", wait_for_line(process, " connected"))

    @unittest.skipUnless(sys.platform == "linux" and os.geteuid() == 0, "needs root")
    def test_root_switches_to_run_as_after_reading_the_key(self) -> None:
        FILES.folder.chmod(0o700)
        with self.serve(RUN_AS="nobody", groups=(0, 4)) as process:
            self.port(process)
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        nobody = relay.pwd.getpwnam("nobody")
        self.assertRegex(status, rf"Uid:(\t{nobody.pw_uid}){{4}}\n")
        self.assertRegex(status, rf"Gid:(\t{nobody.pw_gid}){{4}}\n")
        groups, = re.findall(r"Groups:\t(.*)\n", status)
        self.assertEqual({int(group) for group in groups.split()},
                         set(os.getgrouplist("nobody", nobody.pw_gid)))

    def test_a_message_is_sent_with_default_settings_and_no_secret_is_logged(self) -> None:
        with self.serve(LOG_LEVEL="debug") as process:
            with Client(self.port(process)) as client:
                client.starttls(context=trusting())
                client.ehlo()
                client.login(USER, "top-hidden")
                self.assertRegex(client.post(b"Subject: privately\r\n\r\nconfidential\r\n"),
                                 "^250 ")
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read()
        self.assertEqual(len(self.fake.delivered), 1)
        self.assertIn("DEBUG", log)
        for hidden in ("top-hidden", plain(USER, "top-hidden").decode(), "privately",
                       "confidential", "token-"):
            self.assertNotIn(hidden, log)


class DemoTests(unittest.TestCase):
    """The demo works as printed, without an account."""

    def test_the_printed_commands_send_a_message(self) -> None:
        folder = tempfile.mkdtemp(dir=FILES.folder)
        with start_program("demo", folder=folder, SMTP_PORT="0") as process:
            assert process.stdout is not None
            text = ""
            for line in process.stdout:
                text += line
                if "Ctrl-C" in line:
                    break
            commands = [re.sub(r"\\\n\s*", "", block) for block in
                        re.findall(r"(?m)^  (?=printf|python3)((?:.*\\\n)*.*)\n", text)]
            self.assertEqual(len(commands), 2, text)
            sent = 0
            for command in commands:
                if "curl" in command and (not shutil.which("curl") or os.name == "nt"):
                    continue
                command = command.replace("python3 -c", f'"{sys.executable}" -c')
                subprocess.run(command, shell=True, check=True, timeout=PATIENCE,
                               capture_output=True)
                line = "\n"
                while line == "\n":
                    line = process.stdout.readline()
                path, _, rest = line.partition(": ")
                self.assertEqual(rest, "78 bytes from scanner@example.com\n"
                                 if sent or "curl" not in command else
                                 "80 bytes from scanner@example.com\n")
                self.assertRegex(path, r"^outbox/\d{8}-\d{6}-[0-9a-f-]{36}\.eml$")
                self.assertIn(b"Bcc: you@example.com\r\nSubject: Hello\r\n\r\nIt works.",
                              (pathlib.Path(folder) / path).read_bytes())
                sent += 1
            self.assertGreater(sent, 0)
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(PATIENCE), 0)

    def test_a_scan_arrives_unchanged_and_a_deleted_outbox_gives_452(self) -> None:
        folder = tempfile.mkdtemp(dir=FILES.folder)
        with start_program("demo", folder=folder, SMTP_PORT="0", RUN_AS="nobody") as process:
            match = re.search(r"port (\d+)", process.stdout.readline())
            with Client(int(match[1])) as client:
                client.ehlo()
                self.assertRegex(client.log_in("scanner", "x"), "^535 5.7.8 ")
                client.log_in()
                self.assertRegex(client.post_octets(LARGE, SENDER, ["a@x.y"]), "^250 ")
                path, = pathlib.Path(folder).glob("outbox/*.eml")
                self.assertTrue(path.read_bytes() == LARGE)
                shutil.rmtree(path.parent)
                self.assertRegex(client.post(), "^452 4.3.1 outbox/.*: No such ")

    def test_the_demo_needs_no_azure_table(self) -> None:
        with start_program("demo", folder=tempfile.mkdtemp(dir=FILES.folder), SMTP_PORT="0",
                           AZURE_TABLES_URL="x.table.core.windows.net/users") as process:
            match = re.search(r"port (\d+)", process.stdout.readline())
            with Client(int(match[1])) as client:
                client.ehlo()
                self.assertRegex(client.log_in("scanner@lookup", "x"), "^535 5.7.8 ")

    def test_an_outbox_that_cannot_be_created_ends_the_demo(self) -> None:
        folder = tempfile.mkdtemp(dir=FILES.folder)
        (pathlib.Path(folder) / "outbox").write_text("in the way")
        with start_program("demo", folder=folder, SMTP_PORT="0") as process:
            _, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 1)
        self.assertIn("outbox", err)


class ExplainTests(unittest.TestCase):
    """The explain command shows how a message would be sent, without using the network."""

    def explain(self, message: bytes, *arguments: str, **environ: str) -> tuple[int, str]:
        """Run the command; returns the exit status and the output."""
        path = FILES.folder / "message.eml"
        path.write_bytes(message)
        arguments = arguments or ("--from", SENDER, "--to", "a@x.y", "--to", "h@x.y")
        code, out, err = call_main("explain", str(path), *arguments, **environ)
        return code, out + err

    def test_the_recipients_and_edits_of_a_message_are_shown(self) -> None:
        message = (b"From x@y Thu Nov 24 18:22:48 2026\nFrom: <scanner@example.com>\n"
                   b"To: \xc3\xbc\xc2\x85 <a@x.y>, o@x.y\nSubject: s\n\nText\n")
        self.assertEqual(self.explain(message), (0, f"""\
Sent by:  {SENDER}
Sent to:
  h@x.y  (Bcc)
  a@x.y  (To)
Edits:
  - From x@y Thu Nov 24 18:22:48 2026
  + Bcc: h@x.y
  - To: \u00fc\\x85 <a@x.y>, o@x.y
  + To: \u00fc\\x85 <a@x.y>
  + X-Original-To: o@x.y
Path:     sendMail, 101 bytes
"""))

    def test_an_unchanged_message_and_recipients_of_the_header_alone_are_shown(self) -> None:
        code, text = self.explain(crlf(NAMED + "\n.\n"), "--from", SENDER, "--to", "A@x.y")
        self.assertEqual((code, text.splitlines()[3:]),
                         (0, ["Edits:    none",
                              f"Path:     sendMail, {len(crlf(NAMED)) + 5} bytes"]))
        _, text = self.explain(crlf(FROM + "To: o@x.y\n\n"), HEADER_RECIPIENTS="keep")
        self.assertIn("  o@x.y  (To, not a recipient in SMTP)\n", text)
        self.assertNotIn("a@x.y  (Bcc, ", text)

    def test_a_leading_dot_and_non_ascii_addresses_are_shown(self) -> None:
        for message, sender, size in ((b".\n", SENDER, 44), (b"..\n", "\u00fc@x.y", 32)):
            _, text = self.explain(message, "--from", sender, "--to", "a@x.y")
            self.assertIn(f"sendMail, {size} bytes", text)
        path = FILES.write("message.eml", "To: \u00fc <o@x.y>\n\n")
        with start_program("explain", path, "--from", SENDER, "--to", "a@x.y",
                           PYTHONIOENCODING="ascii") as process:
            self.assertIn("  - To: \\xfc <o@x.y>\n", process.communicate(timeout=PATIENCE)[0])

    def test_unchanged_lines_are_not_shown_as_edits(self) -> None:
        unchanged = b"X: y\r\n" * 300
        self.assertEqual(list(relay._edits(unchanged + b"To: o@x.y\r\n",
                                           b"Bcc: a@x.y\r\n" + unchanged + b"Cc: o@x.y\r\n")),
                         ["  + Bcc: a@x.y", "  - To: o@x.y", "  + Cc: o@x.y"])

    def test_the_attachments_of_a_draft_are_shown(self) -> None:
        message = crlf(multipart("mixed", multipart(
            "related", HTML, IMAGE), SCAN.replace("scan.pdf", "a=?utf-8?q?=0Ab?="), header=NAMED))
        code, text = self.explain(message)
        self.assertEqual(code, 0)
        self.assertIn("Path:     draft (over 3145728 bytes), ", text)
        self.assertTrue(text.endswith(
            "  ATT00001.png  (image/png, 4 bytes, in one request, inline)\n"
            "  a_b  (application/pdf, 3200000 bytes, by upload session)\n"), text)

    def test_the_reply_to_a_refused_message_is_shown(self) -> None:
        for message, sender, environ, reply in (
                (b"", "", {}, "550 5.1.7"), (b"", "a", {}, "501 5.1.7"),
                (b"x" * 5000, SENDER, {"MAX_MESSAGE_SIZE": "5000"}, "552 5.3.4"),
                (LARGE, SENDER, {"LARGE_MESSAGES": "refuse"}, "552 5.3.4"),
                (b"Subject: s\r\nX: " + b"x" * 1_048_576 + b"\r\n", SENDER, {}, "552 5.3.4"),
                (b"Subject: " + b"x" * 1_048_560 + b"\r\n\r\n", SENDER, {}, "552 5.3.4"),
                (LARGE.replace(b"mixed", b"signed"), SENDER, {}, "552 5.3.4")):
            with self.subTest(reply, environ=environ):
                code, text = self.explain(message, "--from", sender, "--to", "a@x.y", **environ)
                self.assertEqual((code, text[:18]), (1, f"Refused: {reply}"))
        self.assertEqual(self.explain(b"", "--from", SENDER, "--to", "a@x.y", "--to", "@"), (
            1, "Refused: 501 5.1.3 Bad recipient address syntax: use TO:<address>, with a "
               "complete address such as user@example.com\n"))

    def test_invalid_arguments_and_settings_end_with_2(self) -> None:
        for arguments, environ, word in (
                (("--from", SENDER), {}, "--to"), (("--to", "a@x.y"), {}, "--from"),
                (("--from", "a\r\nb", "--to", "a@x.y"), {}, "control"),
                (("--from", SENDER, "--to", "a@x.y>\r\nRSET"), {}, "control"),
                (("--from", "x" * 2100 + "@x.y", "--to", "a@x.y"), {}, "too long"),
                (("--from", SENDER, "--to", "a@x.y"), {"FROM_MISMATCH": "x"}, "FROM_MISMATCH")):
            with self.subTest(word):
                code, text = self.explain(b"", *arguments, **environ)
                self.assertEqual(code, 2)
                self.assertIn(word, text)
        code, _, err = call_main("explain", "no-such-file", "--from", "", "--to", "a@x.y")
        self.assertEqual(code, 2)
        self.assertIn("no-such-file", err)


class CommandLineTests(ProgramCase):
    """Output and exit status of the program."""

    def test_help_lists_every_variable_and_an_unknown_command_ends_with_2(self) -> None:
        status, out, _ = self.outcome("--help")
        self.assertEqual(status, 0)
        for name, setting in relay.settings().items():
            self.assertIn(f"{name} (default: {setting.default or 'empty'})", out)
        self.assertEqual(self.outcome("--version")[:2],
                         (0, f"smtp_oauth_relay.py {relay.__version__}\n"))
        self.assertEqual(self.outcome("frobnicate")[0], 2)

    def test_invalid_settings_end_with_2(self) -> None:
        for command in ((), ("serve",), ("demo",)):
            with unittest.mock.patch.object(relay, "OUTBOX", FILES.folder / "early"):
                status, _, err = self.outcome(*command, SMTP_PORT="x", LOG_LEVEL="loud")
            self.assertEqual((status, (FILES.folder / "early").exists()), (2, False))
            self.assertIn("SMTP_PORT='x'", err)
            self.assertIn("LOG_LEVEL='loud'", err)

    def test_unusable_files_and_ports_end_with_1_and_one_line(self) -> None:
        files = {"TLS_CERT_FILEPATH": FILES["cert.pem"], "TLS_KEY_FILEPATH": FILES["key.pem"],
                 "SMTP_PORT": "0"}
        busy = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(busy.close)
        port = str(busy.getsockname()[1])
        text = FILES.write("text.pem", "no certificate\n")
        for changed, *words in (
                ({"TLS_CERT_FILEPATH": "/no/such"}, "TLS_CERT_FILEPATH='/no/such'", "No such"),
                ({"TLS_KEY_FILEPATH": FILES["."]}, "TLS_KEY_FILEPATH=", "directory"),
                ({"TLS_KEY_FILEPATH": FILES["other.pem"]}, "does not match"),
                ({"TLS_KEY_FILEPATH": FILES["encrypted.pem"]}, "encrypted"),
                ({"TLS_CERT_FILEPATH": text}, "TLS_CERT_FILEPATH", "no usable PEM certificate"),
                ({"TLS_KEY_FILEPATH": text}, "TLS_KEY_FILEPATH", "no usable PEM key"),
                ({"SMTP_PORT": port, "LISTEN_ADDRESS": "127.0.0.1"},
                 f"SMTP_PORT={port}", "in use"),
                ({"SMTPS_PORT": port}, f"SMTPS_PORT={port}", "in use"),
                ({"LISTEN_ADDRESS": "192.0.2.1"}, "192.0.2.1", "assign")):
            with self.subTest(changed):
                status, _, err = self.outcome(**{**files, **changed})
                self.assertEqual(status, 1)
                self.assertEqual(err.count("\n"), 1, err)
                for word in words:
                    self.assertIn(word, err)

    @unittest.skipUnless(relay.pwd, "needs users")
    def test_a_failed_switch_to_run_as_ends_with_1(self) -> None:
        """As in a container without the permission to change users."""
        user = relay.pwd.getpwuid(os.getuid()).pw_name
        with unittest.mock.patch.multiple(
                os, geteuid=lambda: 0, initgroups=unittest.mock.Mock(
                    side_effect=PermissionError(errno.EPERM, "Operation not permitted"))):
            self.assertEqual(self.outcome(
                RUN_AS=user, SMTP_PORT="0", TLS_SOURCE="off", REQUIRE_TLS="false"), (
                1, "", f"smtp_oauth_relay: RUN_AS={user}: cannot become this user: Operation not "
                       "permitted; start as another user, with RUN_AS empty\n"))
        with unittest.mock.patch.object(os, "geteuid", lambda: 1000), kept_log() as kept:
            relay.drop_privileges(user)
        self.assertIn(f"run-as={user} ", kept.find("run-as-ignored")[0][1])

    @unittest.skipIf(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0),
                     "root reads every file")
    def test_an_unreadable_key_ends_with_1(self) -> None:
        os.chmod(FILES["other.pem"], 0)
        self.addCleanup(os.chmod, FILES["other.pem"], 0o600)
        status, _, err = self.outcome(TLS_CERT_FILEPATH=FILES["cert.pem"],
                                      TLS_KEY_FILEPATH=FILES["other.pem"])
        self.assertEqual(status, 1)
        self.assertIn("Permission denied", err)


class AccountCommandTests(ProgramCase):
    """The commands encode, hash-password and accounts, and a start with accounts."""

    def test_encode_prints_the_short_user_name(self) -> None:
        for tenant, environ, wanted in (
                (TENANT, {}, f"{SHORT_TENANT}@{SHORT_CLIENT}\n"),
                (SHORT_TENANT, {"USERNAME_DELIMITER": "|"}, f"{SHORT_TENANT}|{SHORT_CLIENT}\n"),
                ("Contoso.com", {}, f"contoso.com@{SHORT_CLIENT}\n")):
            self.assertEqual(self.outcome("encode", tenant, CLIENT, **environ), (0, wanted, ""))
        for arguments in ((TENANT, "x"), ("x", CLIENT), (TENANT, "contoso.com")):
            status, out, err = self.outcome("encode", *arguments)
            self.assertEqual((status, out), (2, ""))
            self.assertIn("the ID of", err)

    def test_hash_password_reads_the_first_line_of_a_pipe(self) -> None:
        for text, password in ((PASSWORD, PASSWORD), (f" {PASSWORD} \n", f" {PASSWORD} "),
                               (f"{PASSWORD}\r\nsecond line\n", PASSWORD)):
            status, out, _ = call_main("hash-password", stdin=text)
            self.assertEqual(status, 0)
            self.assertTrue(relay.verify_password(password, out.strip()))
        self.assertNotEqual(*(call_main("hash-password", stdin="a")[1] for _ in range(2)))
        for text in ("", "\n", "a\tb", "\ufffd"):
            status, out, err = call_main("hash-password", stdin=text)
            self.assertEqual((status, out), (2, ""))
            self.assertIn("empty", err)

    @unittest.skipUnless(hasattr(os, "openpty"), "needs a terminal")
    def test_hash_password_asks_twice_without_echo(self) -> None:
        for second, status in ((PASSWORD, 0), ("other", 2)):
            terminal, tty = os.openpty()
            process = subprocess.Popen([sys.executable, str(PROGRAM), "hash-password"],
                                       stdin=tty, stdout=subprocess.PIPE, stderr=tty,
                                       start_new_session=True)      # without access to /dev/tty
            os.close(tty)
            shown = b""
            for prompt, answer in ((b"Password: ", PASSWORD), (b"Again: ", second)):
                while prompt not in shown:
                    shown += os.read(terminal, 1000)
                os.write(terminal, answer.encode() + b"\n")
            out, _ = process.communicate(timeout=PATIENCE)
            with contextlib.suppress(OSError):
                while part := os.read(terminal, 1000):
                    shown += part
            os.close(terminal)
            self.assertEqual(process.returncode, status)
            self.assertNotIn(PASSWORD.encode(), shown + out)
            with unittest.mock.patch.object(relay, "SCRYPT_COST", REAL_COST):
                self.assertEqual(
                    not status and relay.verify_password(PASSWORD, out.decode().strip()),
                    not status)

    def test_accounts_are_listed_without_secrets(self) -> None:
        path = FILES.write("listed.ini", EXAMPLE)
        secret = FILES.write("listed-secret", "hidden")
        os.chmod(path, 0o600)
        status, out, _ = self.outcome("accounts", ACCOUNTS_FILE=path)
        self.assertEqual((status, out), (0, f"""\
[scan2]
tenant_id = {TENANT}
client_id = {CLIENT}
client_secret = ***
password = ***
from_email = scanner@example.com
allowed_recipients = example.com, boss@partner.example
allowed_senders = example.com
networks = 192.168.7.0/24, fd00:7::/64
authentication = optional
require_tls = false
tls_min_version = 1.0

[direct@example.com]
tenant_id = {TENANT}
client_id = {CLIENT}
authentication = required
"""))
        text = EXAMPLE.replace("client_secret = s3cr~t._-", f"client_secret_file = {secret}")
        _, out, _ = self.outcome("accounts", ACCOUNTS_FILE=FILES.write("listed2.ini", text))
        self.assertIn(f"\nclient_secret_file = {secret}\npassword", out)
        self.assertNotIn("client_secret = ", out)

    def test_accounts_match_shows_what_applies_to_an_address(self) -> None:
        path = FILES.write("matched.ini", f"{EXAMPLE}\n[guest]\nclient_secret = s\npassword =\n"
                                          "networks = 192.168.0.0/16\nlogin = optional\n")
        for address, guest, tls, version, names in (
                ("192.168.7.9", "as [scan2]", "false", "1.0", "[scan2] [direct@example.com]"),
                ("192.168.8.9", "as [guest]", "true", "1.2", "[direct@example.com]"),
                ("10.0.0.1", "no", "true", "1.2", "[direct@example.com]")):
            self.assertEqual(
                self.outcome("accounts", "--match", address, ACCOUNTS_FILE=path)[:2],
                (0, f"{address}\nwithout login:    {guest}\nrequire_tls:      {tls}\n"
                    f"tls_min_version:  {version}\nmay log in as:    {names}\n"))
        status, _, err = self.outcome("accounts", "--match", "printer", ACCOUNTS_FILE=path)
        self.assertEqual(status, 2)
        self.assertIn("'printer' is not an IP address", err)

    def test_missing_or_invalid_accounts_end_with_2_and_show_no_secret(self) -> None:
        faulty = FILES.write("faulty.ini", "[a]\ntenant_id = x\n[b]\npassword = hidden\n")
        for environ, words in (
                ({}, ["ACCOUNTS_FILE is not set"]),
                ({"ACCOUNTS_FILE": "/no/such"}, ["ACCOUNTS_FILE='/no/such'", "No such file"]),
                ({"ACCOUNTS_FILE": faulty}, ["[a] tenant_id = x", "[b] password = ***"])):
            for command in (("accounts",), ()) if environ else (("accounts",),):
                with self.subTest(environ, command=command):
                    status, _, err = self.outcome(*command, TLS_SOURCE="off",
                                                  REQUIRE_TLS="false", SMTP_PORT="0", **environ)
                    self.assertEqual(status, 2)
                    for word in words:
                        self.assertIn(word, err)
                    self.assertNotIn("hidden", err)

    @unittest.skipUnless(os.name == "posix", "needs modes")
    def test_a_world_readable_file_with_secrets_is_warned_about(self) -> None:
        secret = FILES.write("mode-secret", "hidden")
        for text, mode, file in (
                (EXAMPLE, 0o644, "modes.ini"), (EXAMPLE, 0o640, ""),
                (f"[a]\n{APPLICATION}", 0o644, ""),
                (f"[a]\n{APPLICATION}client_secret = s\nlogin = optional\n"
                 "networks = 10.0.0.0/8", 0o604, "modes.ini"),
                (f"[a]\ncredential = managed-identity\npassword = {HASH}", 0o604, "modes.ini"),
                (f"[a]\n{APPLICATION}client_secret_file = {secret}\npassword = {HASH}\n", 0o600,
                 "mode-secret")):
            path = FILES.write("modes.ini", text)
            os.chmod(path, mode)
            with kept_log() as kept:
                relay.Relay(make_config(ACCOUNTS_FILE=path))
            self.assertEqual([pathlib.Path(line.partition("file=")[2].split()[0]).name
                              for _, line in kept.find("secrets-exposed")], [file] if file else [])

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")
    def test_sighup_reloads_the_accounts_at_once(self) -> None:
        path = FILES.write("hup.ini", EXAMPLE)
        with start_program(ACCOUNTS_FILE=path, TLS_SOURCE="off", REQUIRE_TLS="false",
                           SMTP_PORT="0", LISTEN_ADDRESS="127.0.0.1") as process:
            wait_for_line(process, "listening")
            FILES.write("hup.ini", EXAMPLE.replace("[scan2]", "[scan3]"))
            process.send_signal(signal.SIGHUP)
            wait_for_line(process, "accounts=2")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_an_accounts_file_that_run_as_cannot_reload_is_warned_about(self) -> None:
        path = FILES.write("own.ini", EXAMPLE)
        os.chmod(path, 0o600)
        with start_program(ACCOUNTS_FILE=path, TLS_SOURCE="off", REQUIRE_TLS="false",
                           SMTP_PORT="0", LISTEN_ADDRESS="127.0.0.1",
                           RUN_AS="nobody") as process:
            lines = wait_for_line(process, "listening")
        self.assertRegex(lines, "WARNING - reload-blocked file=.*own.ini problem=.*RUN_AS")


class FuzzTests(unittest.TestCase):
    """Short runs of the fuzzer and of the soak test."""

    maxDiff = None

    def seeds(self, *fixed: str) -> tuple[str, ...]:
        """Return the fixed seeds and a random one."""
        return (*fixed, str(random.SystemRandom().randrange(10 ** 9)))

    def test_random_dialogues_match_the_model(self) -> None:
        for seed in self.seeds("1", "2"):
            for number in range(150):
                self.assertEqual("", fuzz_dialogue(f"{seed}.{number}"),
                                 f"fuzz --seed {seed} --only dialogue:{number}")

    def test_a_round_of_traffic_violates_no_rule(self) -> None:
        for seed in self.seeds("1"):
            self.assertEqual([], fuzz_round(f"{seed}.0", timeout=SHORT),
                             f"fuzz --seed {seed} --only round:0")

    @unittest.skipUnless(relay.fcntl, "needs locks of files")
    def test_a_round_of_traffic_with_a_queue_violates_no_rule(self) -> None:
        for seed in self.seeds("1"):
            self.assertEqual([], fuzz_spool(f"{seed}.0", SHORT),
                             f"fuzz --seed {seed} --only spool:0")

    def test_a_short_soak_finds_nothing(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.assertEqual([], soak(1, "3", SHORT))
        self.assertRegex(output.getvalue(), "(?m)^end after .* [1-9][0-9]* accepted")


# ---------------------------------------------------------------------------
# Long tests (fuzz, soak, kill), and the test runner

class Kills:
    """Kills a relay while clients send. A message with 250 arrives; no run sends it twice."""

    def __init__(self, seed: str) -> None:
        self.chance = random.Random(seed)
        self.plan = random.Random(seed)         # for the kills; used by one thread only
        self.fake = FakeMicrosoft()
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=FILES.folder))
        self.accepted: dict[str, str] = {}      # replies by subject
        self.sent = 0
        self.arrived: collections.Counter[tuple[str, str]] = collections.Counter()
        self.is_over = threading.Event()
        self.port = free_port()
        self.accounts = FILES.write("kill.ini", f"""
[device]
tenant_id = {TENANT}
client_id = {CLIENT}
client_secret = secret
networks = 127.0.0.0/8
login = optional
""")

    def take(self, sock: socket.socket, request: Request) -> bool:
        """Act as Microsoft. The token tells the runs of the relay apart."""
        with self.fake._lock:
            luck, pause = self.chance.random(), self.chance.random() / 50
        if luck < 0.4:
            return say(503)(sock, request)
        subject = re.search(rb"Subject: (\S+)", base64.b64decode(request.body))
        if subject is None:                     # the relay was killed during the request
            return False
        with self.fake._lock:
            self.arrived[subject[1].decode(), request.headers["authorization"]] += 1
        if luck < 0.7:
            self.is_over.wait(pause)            # gives time to kill the relay
        return self.fake.accept(sock, request)

    def start(self, left: int = 0) -> Any:
        """Start a relay that kills itself after `left` disk operations; with 0 it does not."""
        return start_python(
            "-c", KILLED, str(left), SMTP_PORT=str(self.port), LISTEN_ADDRESS="127.0.0.1",
            TLS_SOURCE="off", REQUIRE_TLS="false", AZURE_AUTHORITY_HOST=self.fake.url,
            GRAPH_ENDPOINT=self.fake.url, UPSTREAM_TIMEOUT="20", LOG_LEVEL="ERROR",
            SPOOL_DIRECTORY=str(self.folder), ACCOUNTS_FILE=self.accounts)

    def post(self, dead: threading.Event) -> None:
        while not dead.is_set():
            try:
                with Client(self.port) as client:
                    client.ehlo()
                    for _ in range(5):
                        self.post_one(client)
            except (OSError, smtplib.SMTPException):
                dead.wait(0.005)                # it is starting, or was killed

    def post_one(self, client: Client) -> None:
        with self.fake._lock:
            self.sent += 1
            subject = f"m{self.sent}"
            size = self.chance.choice((10, 10, 1000, 200_000))
        text = f"To: a@x.y\r\nSubject: {subject}\r\n\r\n" + "x" * size + "\r\n"
        reply = client.post(text.encode(), sender=f"s{self.sent % 3}@example.com")
        if reply.startswith("250"):
            self.accepted[subject] = reply

    def kill(self) -> None:
        dead = threading.Event()
        senders = [threading.Thread(target=self.post, args=(dead,)) for _ in range(3)]
        is_exact = self.plan.random() < 0.6
        end = len(self.accepted) + (60 if is_exact else self.plan.randrange(30))
        with self.start(self.plan.randrange(1, 120) if is_exact else 0) as process:
            for sender in senders:
                sender.start()
            wait_for(lambda: len(self.accepted) >= end or process.poll() is not None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.plan.random() / 20)
            dead.set()
            self.end(process, signal.SIGKILL)
        for sender in senders:
            sender.join(PATIENCE)

    def is_up(self) -> bool:
        """Return whether the relay accepts connections; from then on it handles SIGTERM."""
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    def end(self, process: subprocess.Popen[str], number: int) -> None:
        """End the relay with a signal. Raises AssertionError if it has logged errors."""
        process.send_signal(number)
        log = process.communicate(timeout=PATIENCE)[1]
        if log:
            raise AssertionError(log)

    def run(self, times: int) -> str:
        """Kill the relay so many times, then let it empty its queue. Returns a summary."""
        self.fake.will("send", *[self.take] * 1_000_000)
        for _ in range(times):
            self.kill()
        queue = self.folder / "queue"

        def wait_for_less(than: int) -> None:
            wait_for(lambda: len(list(queue.iterdir())) < than)
        with self.start() as process:
            wait_for(self.is_up)
            while left := len(list(queue.iterdir())):
                wait_for_less(left)
            self.end(process, signal.SIGTERM)
        self.is_over.set()
        self.fake.close()
        return self.judge(times)

    def judge(self, times: int) -> str:
        runs = collections.Counter(subject for subject, _ in self.arrived)
        lost = sorted(self.accepted.keys() - runs.keys())
        twice = [arrival for arrival, count in self.arrived.items() if count > 1]
        left = [str(path) for path in self.folder.glob("*/*")]
        queued = sum("Queued" in reply for reply in self.accepted.values())
        again = sum(runs[subject] - 1 for subject in self.accepted)
        summary = (f"kills {times}, sent {self.sent}, accepted {len(self.accepted)} (queued "
                   f"{queued}), of these lost {len(lost)}, sent again after a kill {again}, "
                   f"twice in one run {len(twice)}; files left {len(left)}")
        if lost or twice or left:
            raise AssertionError(f"{summary}: {lost} {twice} {left}")
        return summary


#
#     python3 test_relay.py fuzz --seconds 600 --seed 7      random input
#     python3 test_relay.py fuzz --seed 7 --only dialogue:12345
#     python3 test_relay.py soak --seconds 1200              a long run under load
#
# The fuzzer has two parts. Dialogues are valid client input that is then damaged. Session gets
# each one cut into packets in several ways, and Model computes the expected replies and events
# from the same bytes. Rounds of traffic go through a whole relay to a FakeMicrosoft that often
# fails, and DeliveryRules says how often each message may have been sent. The seed and a number
# determine a dialogue or a round, except for the timing of a round's threads.

class Violation(Exception):
    """The relay has broken a rule."""


class Scenario(NamedTuple):
    """The conditions of a dialogue."""

    offers_tls: bool
    require_tls: bool
    guest: bool             # the client may send without login
    secure: bool            # TLS is on from the start
    size: int               # MAX_MESSAGE_SIZE, in bytes
    memory: int             # free bytes of MAX_MEMORY_FOR_MESSAGES


class Decisions:
    """The relay's random decisions about the logins and messages of a dialogue, in order."""

    def __init__(self, chance: random.Random) -> None:
        weights = chance.choice(((12, 3, 2, 1), (12, 3, 2, 1), (1, 8, 1, 0)))
        self.logins = chance.choices((235, 535, 454, 421), weights, k=50)
        self.messages = chance.choices((250, 451, 550, 554, 421), (12, 2, 1, 3, 1), k=50)
        self.asked: collections.Counter[str] = collections.Counter()

    def __call__(self, session: relay.Session, event: relay.Event) -> None:
        name = type(event).__name__
        number, self.asked[name] = self.asked[name] % 50, self.asked[name] + 1
        code = (self.logins if name == "Authenticate" else self.messages)[number]
        if name in ("StartTls", "Close") or code in (235, 250):
            accept(session, event)
        else:
            session.refuse(relay.Reply(code, f"{code // 100}.7.0", "No", code == 421,
                                       {535: 34, 550: 0}.get(code, 1)))


ANYWHERE = "cold ready mail rcpt"
# By verb: the phases that allow it, and whether it needs an argument (None: optional), TLS,
# a login.
RULES: dict[bytes, tuple[str, bool | None, bool, bool]] = {
    b"EHLO": (ANYWHERE, True, False, False), b"HELO": (ANYWHERE, True, False, False),
    b"STARTTLS": ("ready", False, False, False), b"AUTH": ("ready", True, True, False),
    b"MAIL": ("ready", True, True, True), b"RCPT": ("mail rcpt", True, False, False),
    b"DATA": ("rcpt", False, False, False), b"RSET": (ANYWHERE, False, False, False),
    b"QUIT": (ANYWHERE, False, False, False), b"VRFY": (ANYWHERE, True, False, False),
    b"EXPN": (ANYWHERE, None, False, False), b"HELP": (ANYWHERE, None, False, False),
    b"NOOP": (ANYWHERE, None, False, False)}
FIXED_REPLIES = {b"VRFY": 252, b"EXPN": 502, b"HELP": 214, b"NOOP": 250}
HTTP = (b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT")


class Model:
    """The expected replies and events of a dialogue, according to RFC 5321 and the README.

    It reads the bytes once, a line or a message at a time, and compares each step with the
    replies and events of the session. If an argument is not in the tables, the session may
    accept or refuse it.
    """

    def __init__(self, scenario: Scenario, data: bytes, ends: list[int], *, eof: bool) -> None:
        self.scenario, self.data, self.ends, self.eof = scenario, data, ends, eof
        self.decisions: Decisions
        self.pos = 0
        self.phase, self.secure = "cold", scenario.secure
        self.login = "guest" if scenario.guest else ""
        self.closed = False
        self.cost = self.lines = self.asked_logins = self.asked_messages = 0
        self.mechanism, self.answers = "", [""]
        self.sender: str | bytes = ""
        self.utf8 = False
        self.recipients: dict[str, str] = {}
        self.unsure: list[bytes] = []       # RCPT lines that are not in the tables
        self.discarded: list[tuple[int, int]] = []      # input that STARTTLS discarded

    def judge(self, said: bytes, events: list[relay.Event], decisions: Decisions) -> None:
        """Compare with the replies and events of a session. Raises Violation."""
        self.decisions = decisions
        self.replies = collections.deque(read_replies(said))
        self.events = collections.deque(events)
        self.step: Callable[[bytes], None] = self.command
        while not self.closed:
            if not self.secure and not self.lines and self.data[:2] == b"\x16\x03":
                self.close()
                break
            end = self.data.find(b"\r\n", self.pos)
            line = self.data[self.pos:end] if end >= 0 else self.data[self.pos:]
            is_auth = self.step == self.auth_answer or line[:5].upper() == b"AUTH "
            if len(line) + 2 * (end >= 0) > (12288 if is_auth else 2048):
                self.take(line[:50], 500)
                self.close()
                break
            if end < 0:
                break
            self.pos = end + 2
            self.lines += 1
            self.step(line)
        if not self.closed and self.eof:
            self.close()
        if self.replies or self.events:
            raise Violation(f"unexpected: {self.replies} {self.events}")

    def reply(self, *wanted: int, context: object = "") -> int:
        """Take a reply, and another one if the session ends because it makes no progress."""
        code, lines = self.take(context, *wanted)
        if code not in (220, 334, 354, 421, 452, 550) and not lines[0].startswith("2.1.5 "):
            self.cost += 34 if code == 535 else 10 if 500 <= code < 550 or code in (553, 555) else 1
        if self.cost >= 100:
            self.take("no progress", 421)
            self.close()
        return code

    def take(self, context: object, *wanted: int) -> tuple[int, list[str]]:
        if not self.replies:
            raise Violation(f"no reply instead of {wanted}: {context!r}")
        code, lines = self.replies.popleft()
        if code not in wanted:
            raise Violation(f"{code} {lines} instead of {wanted}: {context!r}, {self.phase}")
        is_bare = code in (334, 354) or (code == 250 and not re.match(r"2\.", lines[0]))
        if not is_bare and not re.match(rf"{code // 100}\.[0-9]\.[0-9]+ ", lines[0]):
            raise Violation(f"missing or wrong enhanced status code: {code} {lines}")
        return code, lines

    def event(self, wanted: type) -> Any:
        if not self.events or not isinstance(self.events[0], wanted):
            raise Violation(f"no {wanted.__name__} at byte {self.pos}, but {self.events}")
        return self.events.popleft()

    def close(self) -> None:
        self.event(relay.Close)
        self.closed = True

    def command(self, line: bytes) -> None:
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line):
            self.reply(500, context=line[:50])
            return
        verb, _, argument = line.rstrip(b" \t").partition(b" ")
        verb = verb.upper()
        if verb in HTTP:
            self.take(line, 421)
            self.close()
            return
        code = self.out_of_order(verb, argument)
        if code:
            self.reply(code, context=line[:50])
        elif verb in FIXED_REPLIES:
            self.reply(FIXED_REPLIES[verb], context=line[:50])
        else:
            getattr(self, f"do_{verb.decode().lower()}")(argument, line)

    def out_of_order(self, verb: bytes, argument: bytes) -> int:
        if verb not in RULES:
            return 500
        phases, wants_argument, wants_tls, wants_login = RULES[verb]
        if wants_tls and self.scenario.require_tls and not self.secure:
            return 530
        if wants_login and not self.login:
            return 530
        if self.phase not in phases.split():
            return 503
        return 501 if wants_argument not in (None, bool(argument)) else 0

    def forget(self) -> None:
        self.sender, self.utf8, self.recipients, self.unsure = "", False, {}, []
        self.phase = "cold" if self.phase == "cold" else "ready"

    def do_ehlo(self, argument: bytes, line: bytes) -> None:
        lines = self.replies[0][1] if self.replies else []
        self.reply(250, context=line)
        wanted = {"relay.test", f"SIZE {self.scenario.size}", "PIPELINING", "8BITMIME", "SMTPUTF8",
                  "ENHANCEDSTATUSCODES", "HELP"}
        wanted |= {"STARTTLS"} if self.scenario.offers_tls and not self.secure else set()
        wanted |= {"AUTH PLAIN LOGIN"} if self.secure or not self.scenario.require_tls else set()
        if set(lines) != wanted or len(lines) != len(wanted):
            raise Violation(f"EHLO says {lines}")
        self.phase = "ready"
        self.forget()

    def do_helo(self, argument: bytes, line: bytes) -> None:
        self.reply(250, context=line)
        self.phase = "ready"
        self.forget()

    def do_rset(self, argument: bytes, line: bytes) -> None:
        self.reply(250, context=line)
        self.forget()

    def do_quit(self, argument: bytes, line: bytes) -> None:
        self.take(line, 221)
        self.close()

    def do_starttls(self, argument: bytes, line: bytes) -> None:
        if self.secure or not self.scenario.offers_tls:
            self.reply(503 if self.secure else 502, context=line)
            return
        self.reply(220, context=line)
        self.event(relay.StartTls)
        self.phase, self.secure = "cold", True
        self.login = "guest" if self.scenario.guest else ""
        self.forget()
        end = next(end for end in self.ends if end >= self.pos)
        self.discarded.append((self.pos, end))
        self.pos = end

    def do_auth(self, argument: bytes, line: bytes) -> None:
        if self.login == "user":
            self.reply(503, context=line)
            return
        name, _, initial = argument.partition(b" ")
        self.mechanism, self.answers = name.decode("latin-1").upper(), []
        if self.mechanism not in ("PLAIN", "LOGIN"):
            self.reply(504, context=line)
        elif initial:
            self.auth_answer(b"" if initial == b"=" else initial)
        else:
            self.challenge()

    def challenge(self) -> None:
        wanted = {"PLAIN": [""], "LOGIN": ["VXNlcm5hbWU6", "UGFzc3dvcmQ6"]}
        _, lines = self.take("AUTH", 334)
        if lines != [wanted[self.mechanism][len(self.answers)]]:
            raise Violation(f"wrong challenge {lines}")
        self.step = self.auth_answer

    def auth_answer(self, line: bytes) -> None:
        self.step = self.command
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line):
            self.reply(500, context=line[:50])
            return
        # For an initial response, command() has checked the whole line.
        if line == b"*" or len(line) % 4 or not re.fullmatch(rb"[A-Za-z0-9+/]*={0,2}", line):
            self.reply(501, context=line[:50])
            return
        self.answers.append(base64.b64decode(line).decode("latin-1"))
        if self.mechanism == "LOGIN" and len(self.answers) == 1:
            self.challenge()
            return
        answers = self.answers
        if self.mechanism == "PLAIN":
            parts = answers[0].split("\0")
            answers = parts[1:] if len(parts) == 3 and parts[0] in ("", parts[1]) else []
        try:
            user, password = (answer.encode("latin-1").decode() for answer in answers)
        except ValueError:
            self.reply(501, context=line[:50])
            return
        self.log_in(user, password)

    def log_in(self, user: str, password: str) -> None:
        event = self.event(relay.Authenticate)
        if (event.username, event.password) != (user, password):
            raise Violation(f"{event} {event.password} instead of {user!r} {password!r}")
        code = self.decisions.logins[self.asked_logins % 50]
        self.asked_logins += 1
        if code == 235:
            self.login, self.cost = "user", 0
        self.reply(code, context="a login")
        self.forget()
        if code == 421:
            self.close()

    def do_mail(self, argument: bytes, line: bytes) -> None:
        text = argument.decode("utf-8", "replace")
        code, mailbox = MAIL_ARGUMENTS.get(text, (0, ""))
        if not code:
            code = self.reply(250, 501, 552, 553, 550, 555, 452, context=line[:80])
            self.sender = line
        else:
            if code == 550 and self.login == "user":
                code = 250
            if self.scenario.memory < 100 and "SIZE=100" in text and code == 250:
                code = 452
            self.reply(code, context=line)
            self.sender = mailbox
        if code == 250:
            self.phase, self.utf8 = "mail", b"SMTPUTF8" in line.upper()

    def do_rcpt(self, argument: bytes, line: bytes) -> None:
        code, mailbox, key = RCPT_ARGUMENTS.get(argument.decode("utf-8", "replace"), (0, "", ""))
        # It is unknown whether a sender that is not in the tables had SMTPUTF8.
        is_loose = not code or (code == 553 and isinstance(self.sender, bytes))
        if code == 553 and self.utf8:
            code = 250
        if code == 550 and self.login == "user":
            code = 250
        if code == 250 and key not in self.recipients:
            highest = len(self.recipients) + len(self.unsure)
            if len(self.recipients) >= MOST_RECIPIENTS:
                code = 452
            is_loose = is_loose or highest >= MOST_RECIPIENTS > len(self.recipients)
        if is_loose:
            if self.reply(250, 452, 501, 550, 553, 555, context=line[:80]) == 250:
                self.phase = "rcpt"
                self.unsure.append(line)
        elif self.reply(code, context=line) == 250:
            self.phase = "rcpt"
            self.recipients.setdefault(key, mailbox)

    def do_data(self, argument: bytes, line: bytes) -> None:
        self.reply(354, context=line)
        end = self.data.find(b"\r\n.\r\n", self.pos - 2)
        if end < 0:
            self.pos = len(self.data)
            return
        lines = self.data[self.pos:max(self.pos, end + 2)].split(b"\r\n")
        text = b"\r\n".join(line[1:] if line[:1] == b"." else line for line in lines)
        message = re.sub(rb"\r\n|\r|\n", b"\r\n", text)
        self.pos = end + 5
        refusals = [code for code, limit in ((552, self.scenario.size), (452, self.scenario.memory))
                    if len(message) > limit]
        if refusals:
            self.reply(*refusals, context=f"a message of {len(message)} bytes")
        else:
            self.deliver(message)
        self.forget()

    def deliver(self, message: bytes) -> None:
        envelope = self.event(relay.Deliver).envelope
        if bytes(envelope.message) != message:
            raise Violation(f"message {bytes(envelope.message)[:200]!r} instead of "
                            f"{message[:200]!r}")
        self.check_envelope(envelope)
        code = self.decisions.messages[self.asked_messages % 50]
        self.asked_messages += 1
        self.cost = 0 if code == 250 else self.cost
        self.reply(code, context="a message")
        if code == 421:
            self.close()

    def check_envelope(self, envelope: relay.Envelope) -> None:
        sender = envelope.reverse_path
        is_right = (sender == self.sender if isinstance(self.sender, str) else
                    sender.encode("utf-8", "surrogateescape") in self.sender)
        actual = dict(envelope.recipients)
        if not is_right or (not self.unsure and list(actual.values()) != list(
                self.recipients.values())):
            raise Violation(f"{envelope} instead of {self.sender!r} {self.recipients}")
        others = set(actual.values()) - set(self.recipients.values())
        if not set(self.recipients) <= set(actual) or len(others) > len(self.unsure) or not all(
                any(mailbox.encode("utf-8", "surrogateescape") in line for line in self.unsure)
                for mailbox in others):
            raise Violation(f"{envelope} instead of {self.recipients} and some of {self.unsure}")


def read_replies(data: bytes) -> list[tuple[int, list[str]]]:
    """Parse replies into codes and lines. Raises Violation if a reply is malformed."""
    try:
        expected = codes(data)
    except ValueError as error:
        raise Violation(str(error)) from None
    replies: list[tuple[int, list[str]]] = []
    begun: list[tuple[int, str]] = []
    for line in data.decode().split("\r\n")[:-1]:
        begun.append((int(line[:3]), line[4:]))
        if line[3] == " ":
            if len({code for code, _ in begun}) > 1:
                raise Violation(f"several codes in one reply: {begun}")
            replies.append((begun[0][0], [text for _, text in begun]))
            begun = []
    if begun or [code for code, _ in replies] != expected:
        raise Violation(f"incomplete reply: {begun}")
    return replies


def make_scenario(chance: random.Random) -> Scenario:
    """Choose the conditions of a dialogue."""
    offers_tls = chance.random() < 0.8
    # Only one limit can be reached: with two, the packets would decide which one refuses.
    size, memory = chance.choice(((1200, 10 ** 9), (36_700_160, 10 ** 9), (36_700_160, 1000),
                                  (36_700_160, 50)))
    return Scenario(offers_tls, offers_tls and chance.random() < 0.6, chance.random() < 0.2,
                 offers_tls and chance.random() < 0.4, size, memory)


LOGINS = (LOGIN, LOGIN, b"AUTH PLAIN\r\n" + plain() + b"\r\n", b"auth login\r\nQQ==\r\nQg==\r\n",
          b"AUTH LOGIN QQ==\r\nQg==\r\n", b"AUTH LOGIN\r\n*\r\n", b"AUTH LOGIN =\r\n=\r\n",
          b"AUTH PLAIN =\r\n", b"AUTH PLAIN QQ\r\n", b"AUTH PLAIN\r\nA===\r\n", b"AUTH X\r\n",
          b"AUTH PLAIN " + plain(authorize=USER) + b"\r\n", b"AUTH PLAIN AAAA\r\n",
          b"AUTH PLAIN " + plain(authorize="x") + b"\r\n", b"AUTH LOGIN\r\n/w==\r\n/w==\r\n",
          b"AUTH PLAIN " + plain(password="p\u00e4" * 2700) + b"\r\n", b"AUTH\r\n",
          b"AUTH PLAIN\r\n" + plain(authorize="x\0y") + b"\r\n", b"AUTH PLAIN\r\n*\r\n",
          b"AUTH PLAIN " + plain(password="p" * 10_000) + b"\r\n",
          b"AUTH LOGIN\r\nQQ==\r\nRSET\r\n", b"AUTH LOGIN QQ== QQ==\r\n")
ODDITIES = (b"NOOP\r\n", b"noop x\r\n", b"HELP\r\n", b"VRFY a\r\n", b"VRFY\r\n", b"EXPN\r\n",
            b"RSET\r\n", b"RSET x\r\n", b"\r\n", b"BDAT 5\r\n", b"DATA x\r\n", b"STARTTLS x\r\n",
            b"QUIT\r\n", b"QUIT x\r\n", b"NOOP" + b" x" * 1021 + b"\r\n", b"X" * 2047 + b"\r\n",
            b"NOOP " + b"y" * 2041 + b"\r\n", b"NOOP " + b"y" * 2042 + b"\r\n", b"HELO\r\n",
            b"x" * 13_000 + b"\r\n", b"GET / HTTP/1.1\r\n", b"MAIL\r\n", b"RCPT\r\n",
            b"post /x HTTP/1.0\r\n", b"CONNECT x:25 HTTP/1.1\r\n", b"HELO B\xfcro 1\r\n",
            b"AUTH LOGIN\r\n" + b"A" * 12_287 + b"\r\n",
            b"HELO x\r\n", b"EHLO  [::1] \t\r\n", b"DATA\r\n", b"NOOP\nNOOP\r\n", b".\r\n",
            b"NO\0OP\r\n", b"\xff\r\n", b"STARTTLS\r\n", b"EHLO x\r\n", "R\u017fET\r\n".encode(),
            "QU\u0131T\r\n".encode())


def make_dialogue(chance: random.Random) -> bytes:
    """Make the input of a mostly correct client; half of the time damage it."""
    parts = [b"EHLO x\r\n"] if chance.random() < 0.95 else []
    if chance.random() < 0.2:
        parts.append(chance.choice(LOGINS))
    if chance.random() < 0.5:
        parts += [b"STARTTLS\r\n", b"EHLO y\r\n"]
    if chance.random() < 0.8:
        parts += chance.choices(LOGINS, k=chance.choice((1, 1, 1, 2, 6)))
    for _ in range(chance.randrange(5)):
        parts += make_transaction(chance)
    for _ in range(chance.choice((0, 0, 1, 2, 5, 12))):
        parts.insert(chance.randrange(len(parts) + 1), chance.choice(ODDITIES))
    if chance.random() < 0.5:
        parts.append(b"QUIT\r\n")
    data = b"".join(parts)
    if chance.random() < 0.5:
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            data = damage(data, chance)
    return data


CONTENT_LINES = (b"", b"", b"text", b"..", b"...", b"..x", b".x", b"a.b", b"x.", b"\n.", b"\r.",
                 b".\n", b".\r", b"a\nb", b"a\rb", b"\r", b"\n", b"\0", b"\xff\xfe", b".\0",
                 b"Subject: s", b"x" * 998, b"QUIT", b"\r\r", b"\n\n", b". ", b"RSET\n.\n")


def make_transaction(chance: random.Random) -> Iterator[bytes]:
    """Make the commands of a transaction; most are valid."""
    def pick(table: dict[str, Any]) -> bytes:
        valid = [argument for argument, row in table.items() if row[0] == 250]
        return chance.choice(valid if chance.random() < 0.8 else list(table)).encode()
    yield chance.choice((b"MAIL ", b"mail ")) + pick(MAIL_ARGUMENTS) + b"\r\n"
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        yield b"RCPT " + pick(RCPT_ARGUMENTS) + chance.choice((b"\r\n", b"\r\n", b" \r\n"))
    if chance.random() < 0.1:
        yield b"RSET\r\n"
    yield b"DATA\r\n"
    lines = chance.choices(CONTENT_LINES, k=chance.choice((0, 1, 2, 5, 20)))
    yield b"\r\n".join(lines) + b"\r\n" * (bool(lines) and chance.random() < 0.9) + b".\r\n"


def damage(data: bytes, chance: random.Random) -> bytes:
    """Change some bytes at a random position."""
    begin = chance.randrange(len(data) + 1)
    end = min(len(data), begin + chance.choice((1, 1, 1, 2, 5, 30)))
    part, noise = data[begin:end], bytes([chance.randrange(256)])
    new = chance.choice((
        b"", part * 2, part[::-1], noise, part + noise, b"\r" + part, b"\n" + part, b"\0",
        b"\r\n" + part, b"\r\n.\r\n" + part, b"." + part, b"\xff" + part, b"\r\n.",
        part.swapcase(), bytes(byte ^ 1 << chance.randrange(8) for byte in part),
        part + b"z" * chance.choice((10, 2000, 13_000)), b" " + part, b"\r\n..\r\n"))
    if chance.random() < 0.05:
        return data[:begin]
    return data[:begin] + new + data[end:]


def make_cuts(data: bytes, chance: random.Random) -> list[int]:
    """Choose the ends of the packets."""
    size = len(data)
    style = chance.randrange(6)
    if style == 0:
        return []
    if style == 1 and size < 3000:
        return list(range(1, size))
    if style == 2:                          # near line ends and dots
        near = [match.start() + chance.randrange(2) for match in re.finditer(rb"[\r\n.]", data)]
        return sorted({cut for cut in near if 0 < cut < size and chance.random() < 0.6})
    if style == 3:
        return list(range(7, size, chance.choice((7, 64, 512, 4096))))
    return sorted({chance.randrange(size + 1) for _ in range(chance.randrange(9))} - {0, size})


@functools.cache
def scenario_config(offers_tls: bool, require_tls: bool, size: int) -> relay.Config:
    """Make the settings of a scenario."""
    return make_config(TLS_SOURCE="file" if offers_tls else "off", MAX_RECIPIENTS=str(
        MOST_RECIPIENTS), REQUIRE_TLS=str(require_tls).lower(), MAX_MESSAGE_SIZE=str(size))


GUEST_OF_TESTS = relay.Account("guest", allowed_senders=("a@b.c",),
                               allowed_recipients=("d@e.f", "ok.example"))


class Playback:
    """Feeds a dialogue to a new session."""

    def __init__(self, scenario: Scenario, chance: random.Random, data: bytes,
                 cuts: list[int]) -> None:
        self.scenario, self.data = scenario, data
        self.ends = [*cuts, len(data)]
        self.memory = relay.MemoryBudget(scenario.memory)
        self.decisions = Decisions(chance)
        config = scenario_config(scenario.offers_tls, scenario.require_tls, scenario.size)
        self.dialogue = Dialogue(
            config, secure=scenario.secure, answer=self.decisions, memory=self.memory,
            policy=policy_of(GUEST_OF_TESTS, config) if scenario.guest else None)

    def run(self, late: random.Random | None = None, *, eof: bool, packets: int = -1) -> None:
        """Feed all packets, or the first `packets`. With `late` events are answered late."""
        session, waiting = self.dialogue.session, collections.deque[relay.Event]()
        if late:
            self.dialogue.answer = lambda session, event: waiting.append(event)

        def answer() -> None:
            while waiting and not self.dialogue.closed:
                self.decisions(session, waiting.popleft())
                self.dialogue.work()
        begin = 0
        for end in self.ends[:packets if packets >= 0 else None]:
            self.dialogue.feed(self.data[begin:end])
            begin = end
            if late and late.random() < 0.5:
                answer()
            if not waiting and not self.dialogue.closed and len(session._buffer) > 12_290:
                raise Violation(f"{len(session._buffer)} bytes of a line are buffered")
        if packets < 0:
            answer()
            if eof:
                session.receive(b"")
                self.dialogue.work()
                answer()
        else:
            session.reset()

    def check_memory(self) -> None:
        """Check that the session has released all memory."""
        self.dialogue.session.reset()
        if self.memory.free != self.scenario.memory:
            raise Violation(f"{self.scenario.memory - self.memory.free} bytes of memory are "
                            "not released")


def check_dialogue(scenario: Scenario, data: bytes, seed: str) -> None:
    """Play a dialogue in several ways. Raises Violation, and every error of the session."""
    chance = random.Random(seed)
    eof, decisions_seed = chance.random() < 0.5, chance.random()

    def play(cuts: list[int], **options: Any) -> Playback:
        playback = Playback(scenario, random.Random(decisions_seed), data, cuts)
        playback.run(eof=eof, **options)
        playback.check_memory()
        return playback
    first = play(make_cuts(data, chance))
    model = Model(scenario, data, first.ends, eof=eof)
    model.judge(first.dialogue.said, first.dialogue.events, first.decisions)
    # The session discards what follows STARTTLS in its packet, so these packets must not change.
    cuts = [cut for cut in make_cuts(data, chance)
            if not any(begin <= cut < end for begin, end in model.discarded)]
    cuts = sorted({*cuts, *(end for _, end in model.discarded)} - {len(data)})
    second = play(cuts, late=None if model.discarded else chance)
    if (first.dialogue.said, first.dialogue.events) != (second.dialogue.said,
                                                        second.dialogue.events):
        raise Violation(f"the packets change the outcome: {first.dialogue.said!r} "
                        f"{first.dialogue.events}; {second.dialogue.said!r} "
                        f"{second.dialogue.events}")
    # The same from a client that disconnects in between.
    third = play(first.ends[:-1], packets=chance.randrange(len(first.ends) + 1),
                 late=None if model.discarded else chance)
    if not first.dialogue.said.startswith(third.dialogue.said):
        raise Violation(f"the first packets alone get {third.dialogue.said!r}")


def shrink(data: bytes, is_bad: Callable[[bytes], bool]) -> bytes:
    """Remove from a dialogue all parts that are not needed to show its defect."""
    size = max(1, len(data) // 2)
    while size:
        begin = 0
        while begin < len(data):
            shorter = data[:begin] + data[begin + size:]
            if is_bad(shorter):
                data = shorter
            else:
                begin += size
        size //= 2
    return data


def find_problem(scenario: Scenario, data: bytes, seed: str) -> str:
    """Return the problem of a dialogue, or ""."""
    try:
        check_dialogue(scenario, data, seed)
    except Violation as error:
        return f"{error}"
    except Exception as error:              # noqa: BLE001 - a session must not raise
        return f"{type(error).__name__}: {error}"
    return ""


def fuzz_dialogue(seed: str) -> str:
    """Play the dialogue of a seed. Returns its problem and how to reproduce it, or ""."""
    chance = random.Random(seed)
    scenario, data = make_scenario(chance), make_dialogue(chance)
    problem = find_problem(scenario, data, seed)
    if not problem:
        return ""
    shortest = shrink(data, lambda shorter: bool(find_problem(scenario, shorter, seed)))
    return (f"{problem}\n  of {data!r}\n  in short {find_problem(scenario, shortest, seed)}\n  of\n"
            f"  find_problem({scenario}, {shortest!r}, {seed!r})")


# Rounds of traffic. Only DeliveryRules decides which outcomes are correct.

class Delivery(NamedTuple):
    """A message that Microsoft accepted."""

    message_id: str         # client-request-id, also part of the reply to the client
    mailbox: str
    recipients: list[str]
    is_whole: bool          # the content is unchanged


@dataclasses.dataclass
class TrackedMessage:
    """A message of a visitor and what became of it. A marker in its text identifies it."""

    marker: str
    sender: str
    recipients: list[str]
    content: bytes
    # Planned faults by step, used up one by one. Then requests succeed.
    plan: dict[str, collections.deque[str]] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)         # that have occurred
    began: list[float] = dataclasses.field(default_factory=list)        # sent, without a reply yet
    replies: list[tuple[str, str]] = dataclasses.field(default_factory=list)    # reply, message ID
    unanswered: int = 0     # how often it was sent completely without receiving a reply
    deliveries: list[Delivery] = dataclasses.field(default_factory=list)
    # Deliveries without a timely success response, by message ID. The relay cannot know them.
    unknown: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    is_calm: bool = True    # no fault is planned for it or its login
    is_identified: bool = False     # by Message-ID and Date
    ended: float = 0.0


# Possible replies to a calm message: faults of other messages can use up the slots of its
# mailbox, its time, or a connection.
CALM = ("250 2.", "451 4.4.1", "451 4.4.5", "451 4.7.0")

# Faults that refuse a message or a login permanently, or that ask for a long delay.
PERMANENT = ("200", "302", "400", "403", "never", "refused")


class DeliveryRules:
    """How often Microsoft may have accepted a message, depending on the reply to its client.

    250: once, and with `at_least_once` once more for each unknown delivery. Refused: never, but
    once if there was an unknown delivery. No reply: like 250 or like refused. A repeated message
    with Message-ID and Date: once in total. Each delivery must have the sender, the recipients
    and the whole content. The message ID in the reply tells the deliveries apart.
    """

    def __init__(self, *, at_least_once: bool = False) -> None:
        self.at_least_once = at_least_once

    def possible(self, faults: Iterable[str]) -> tuple[str, ...]:
        """Return the usable faults: with `at_least_once` none that refuse or delay for long."""
        return tuple(fault for fault in faults
                     if not (self.at_least_once and fault.split()[-1] in PERMANENT))

    def judge(self, message: TrackedMessage) -> Iterator[str]:
        """Yield the problems with the outcome of a message."""
        counts = collections.Counter(delivery.message_id for delivery in message.deliveries)
        for reply, message_id in message.replies:
            if reply[:3] == "250" and not counts[message_id]:
                yield f"lost, but the reply was {reply}"
            if counts[message_id] > self.limit(reply[:3] == "250", message.unknown[message_id]):
                yield f"delivered {counts[message_id]} times, but the reply was {reply}"
        accepted = collections.Counter(
            message_id for reply, message_id in message.replies if reply[:3] == "250")
        if not message.is_identified and any(number > 1 for number in accepted.values()):
            yield "treated as a duplicate, although nothing identifies it"
        if message.is_identified and len(message.deliveries) > 1 + sum(message.unknown.values()):
            yield "delivered twice, although it is identified"
        others = set(counts) - {message_id for _, message_id in message.replies}
        if len(others) > message.unanswered:
            yield f"delivered as {others}, which no client has sent"
        if any(counts[message_id] > self.limit(True, message.unknown[message_id])
               for message_id in others):
            yield f"delivered too often for clients that left: {counts}"
        wanted = (message.sender, sorted(message.recipients), True)
        for delivery in message.deliveries:
            if delivery[1:] != wanted:
                yield f"delivered as {delivery} instead of {wanted}"
        if message.is_calm:
            yield from (f"no fault was planned, but the reply was {reply}"
                        for reply, _ in message.replies if not reply.startswith(CALM))

    def is_late(self, message: TrackedMessage, arrived: float, timeout: float) -> bool:
        """Return whether the relay may have reached its deadline when Microsoft accepted.

        The timeout covers a whole message. An attempt from the queue has a timeout of its own.
        """
        begun = (arrived if self.at_least_once and not message.began
                 else min(message.began, default=0.0))
        return time.monotonic() - min(begun, arrived) > timeout / 2

    def limit(self, is_accepted: bool, unknown: int) -> int:
        """Return how often a message may have been delivered."""
        if is_accepted:
            return 1 + unknown * self.at_least_once
        return unknown if self.at_least_once else min(unknown, 1)


class FaultyMicrosoft(FakeMicrosoft):
    """Fails as planned for each message and each login."""

    def __init__(self, timeout: float, rules: DeliveryRules) -> None:
        self._timeout, self.rules = timeout, rules      # UPSTREAM_TIMEOUT of the relay
        self.messages: dict[str, TrackedMessage] = {}
        self.logins: dict[str, collections.deque[str]] = {}
        self.strangers: list[str] = []  # requests for messages that no visitor sent
        self.unknown_drafts = 0         # created without a success response
        super().__init__()

    def accept(self, sock: socket.socket, request: Request) -> bool:
        self.requests.clear()           # saves memory
        self.delivered.clear()
        arrived = time.monotonic()
        if request.kind == "token":
            return self._answer_token(sock, request)
        message = self.messages.get(self._marker(request))
        if message is None:
            self.strangers.append(f"{request.kind} {request.path} {request.body[:3000]!r}")
            return super().accept(sock, request)
        fault = next_fault(message.plan.get(request.kind))
        if fault:
            message.faults.append(f"{request.kind} {fault}")
        if fault == "slow":
            self.release.wait(self._timeout / 6)
        action: Action = utter(b"")
        word, _, rest = fault.partition(" ")
        if word in ("", "slow", "then", "taken", "202"):
            action = answer = self._accept_message(request, message)
            # The relay gets no success response, or gets it too late.
            if answer.status in (201, 202) and (word == "taken" or self.rules.is_late(
                    message, arrived, self._timeout)):
                self.unknown_drafts += request.kind == "draft"
                if request.kind in ("send", "send-draft"):
                    message.unknown[request.headers["client-request-id"]] += 1
        action = self._action(rest if word == "taken" else fault, action)
        return action(sock, request) and fault != "then close"

    def _action(self, fault: str, otherwise: Action) -> Action:
        return {"expire": self.expire, "hang": self._hang, **ANSWERS, **SAID_202}.get(
            fault, otherwise)

    def _hang(self, sock: socket.socket, request: Request) -> bool:
        self.release.wait(3 * self._timeout)
        return False

    def _accept_message(self, request: Request, message: TrackedMessage) -> Answer:
        """Act as Microsoft without faults, and record a delivery."""
        answer = self.answer(request)
        if answer.status == 202:
            message_id = request.headers["client-request-id"]
            if request.kind == "send":
                sent = base64.b64decode(request.body)
                body = message.content.partition(b"\r\n\r\n")[2]
                message.deliveries.append(Delivery(
                    message_id, request.part(3), sorted(named_by(sent)),
                    sent.partition(b"\r\n\r\n")[2] == body))
            else:
                draft = self._drafts[request.part(5)]
                message.deliveries.append(Delivery(message_id, draft.mailbox, draft.recipients, [
                    bytes(content) for _, content in draft.files] == [SCAN_OCTETS]))
        if answer.status in (202, 204) and request.kind != "send":
            for _, content in self._drafts[request.part(5)].files:
                content.clear()         # saves memory
        return answer

    def _marker(self, request: Request) -> str:
        data = request.body
        if request.kind == "send":
            data = base64.b64decode(data[:8000])
        elif request.kind == "put":
            data = self._uploads[int(re.findall("[0-9]+", request.path)[0])][1]["name"].encode()
        elif request.kind != "draft":
            data = self._drafts[request.part(5)].properties["subject"].encode()
        match = re.search(rb"message-[0-9]+-[0-9]+", data)
        return match[0].decode() if match else ""

    def _answer_token(self, sock: socket.socket, request: Request) -> bool:
        secret = urllib.parse.parse_qs(request.body.decode())["client_secret"][0]
        fault = next_fault(self.logins.get(secret))
        action: Action = super().accept
        if secret not in self.logins:
            action = say(401, aadsts(7000215, "invalid_client",
                                     f"AADSTS7000215: Invalid client secret: {secret}"))
        elif fault in TOKEN_ANSWERS:
            status, text = TOKEN_ANSWERS[fault]
            return say(status, text.format(secret=secret).encode())(sock, request)
        elif fault == "short":
            action = say(200, {"access_token": self.make_token(self.url), "expires_in": 1})
        elif fault == "slow":
            self.release.wait(self._timeout / 6)
        return self._action(fault, action)(sock, request)

    @property
    def left_drafts(self) -> int:
        return sum(not draft.sent for draft in self.drafts.values())


def next_fault(plan: collections.deque[str] | None) -> str:
    """Take the next fault of a plan, or "". Several threads may call this."""
    try:
        return plan.popleft() if plan else ""
    except IndexError:
        return ""


class Traffic:
    """Runs visitors against a relay and judges the outcome of their messages."""

    def __init__(self, seed: str, fake: FaultyMicrosoft, port: int, rules: DeliveryRules, *,
                 uploads: bool = True) -> None:
        self.seed, self.fake, self.port, self.rules = seed, fake, port, rules
        self.problems: list[str] = []
        self.replies: collections.Counter[str] = collections.Counter()
        self.ending = threading.Event()
        self.with_uploads = uploads
        # Several visitors may send the same alarm, repeatedly and at the same time.
        chance = random.Random(f"{seed}.alarms")
        self.alarms = [self.make_message(chance, f"message-0-{number}") for number in range(3)]
        for message in self.alarms:
            message.is_calm = False     # the logins of other visitors may have faults

    def make_message(self, chance: random.Random, marker: str, *, large: bool = False,
                     calm: bool = False, identified: bool = False) -> TrackedMessage:
        """Make a message and plan the faults of Microsoft."""
        recipients = [f"{marker}.{number}@x.y" for number in range(chance.choice((1, 1, 2, 3)))]
        sender = f"{chance.choice(('box1', 'box2', marker))}@example.com"
        lines = chance.choices((b"", b".", b"..", b"...x", b"Text", b"b\xc3\xbc\xff\0", b"x" * 900),
                               k=chance.choice((0, 3, 30, 300)))
        head = (f"Subject: {marker}\nTo: {recipients[0]}, stranger@x.y\n"
                f"Cc: {', '.join([*recipients[1:2], 'other@x.y'])}\n")
        if identified:
            head += f"Message-ID: <{marker}@x.y>\nDate: Sat, 28 Nov 2026 03:00:00 +0000\n"
        content = crlf(head) + b"\r\n" + b"".join(line + b"\r\n" for line in lines)
        faults: dict[str, tuple[str, ...]] = {"send": SEND_FAULTS}
        if large:
            content = LARGE.replace(b"Subject: s", f"Subject: {marker}".encode()).replace(
                b"To: a@x.y", crlf(head.partition("\n")[2]).rstrip()).replace(
                b"scan.pdf", f"{marker}.pdf".encode())
            others = (*(fault for fault in ANSWERS if fault != "200"), "hang", "slow", "then close")
            faults = {"send-draft": SEND_FAULTS, "draft": (*others, "taken 504", "taken close"),
                      "open": (*others, "200"), "put": others, "delete": others}
        message = TrackedMessage(marker, sender, recipients, content, is_identified=identified)
        if not calm:
            weights = (2, 3, 2, 1) if not large else (6, 2, 1, 0)
            message.plan = {step: collections.deque(chance.choices(
                self.rules.possible(choices), k=chance.choices(range(4), weights)[0]))
                for step, choices in faults.items()}
        message.is_calm = not any(message.plan.values())
        self.fake.messages[marker] = message
        return message

    def visit(self, visitor: Visitor) -> None:
        problem = ""
        try:
            visitor.run()
        except (OSError, smtplib.SMTPException) as error:
            if "timed out" in str(error) or not visitor.may_break:
                problem = f"{error!r}"
        except Exception as error:      # noqa: BLE001 - reported in the end
            problem = f"{error!r}"
        if problem:
            self.problems.append(f"visitor {visitor.number}, {visitor.way}: {problem} after "
                                 f"{visitor.last!r}")
        for message in visitor.messages:
            message.ended = time.monotonic()

    def visit_all(self, number: int) -> None:
        """Run so many visitors at the same time, and wait until they have left."""
        visitors = [Visitor(self, index) for index in range(number)]
        with concurrent.futures.ThreadPoolExecutor(number) as pool:
            active = [pool.submit(self.visit, visitor) for visitor in visitors
                      if visitor.way != "idle"]
            idle = [pool.submit(self.visit, visitor) for visitor in visitors
                    if visitor.way == "idle"]
            concurrent.futures.wait(active)     # every wait in a visit has a timeout
            self.ending.set()
            concurrent.futures.wait(idle)
        self.fake.release.set()

    def judge(self, messages: Iterable[TrackedMessage]) -> None:
        """Collect the violations of the rules."""
        for message in messages:
            self.problems += [f"{message.marker}: {problem}; faults {message.faults}, replies "
                              f"{message.replies}, unanswered {message.unanswered}, deliveries "
                              f"{message.deliveries}" for problem in self.rules.judge(message)]
        for problems in (self.fake.strangers, self.fake.complaints):
            self.problems += problems
            problems.clear()


TOKEN_FAULTS = (*TOKEN_ANSWERS, "hang", "slow", "close", "reset", "short", "short")


class Visitor:
    """A simulated client; the seed and its number determine its behavior."""

    def __init__(self, traffic: Traffic, number: int) -> None:
        self.traffic, self.number = traffic, number
        self.chance = random.Random(f"{traffic.seed}.{number}")
        self.messages: list[TrackedMessage] = []
        self.last = ""                  # latest reply
        self.may_break = False
        self.password = f"{SECRET}+\u00fc/{number}"
        self.is_calm = self.chance.random() < 0.6
        if number == 0 and traffic.with_uploads:
            self.way = "large"
        else:
            self.way = self.chance.choices(
                ("plain", "pipelined", "alarm", "leave", "wrong" if IS_LINUX else "plain", "idle",
                 "large" if traffic.with_uploads else "plain"), (30, 25, 10, 25, 6, 2, 1))[0]

    def run(self) -> None:
        options: dict[str, Any] = {}
        if IS_LINUX:
            options["source_address"] = (
                f"127.{self.number >> 16 & 127}.{self.number >> 8 & 255}.{self.number % 250 + 1}",
                0)
        self.may_break = self.way == "leave"
        self.make_plan()
        with contextlib.closing(Client(self.traffic.port, **options)) as client:
            {"wrong": self.guess, "idle": self.idle, "leave": self.leave}.get(
                self.way, self.send_all)(client)

    def make_plan(self) -> None:
        """Plan the faults of the login, and the messages."""
        faults = tuple(fault for fault in self.traffic.rules.possible(TOKEN_FAULTS)
                       if IS_LINUX or fault != "refused")
        self.faults = [] if self.is_calm else self.chance.choices(faults,
                                                                  k=self.chance.randrange(3))
        if self.way != "wrong":
            self.traffic.fake.logins[self.password] = collections.deque(self.faults)
        if self.way in ("alarm", "idle", "wrong"):
            return
        for number in range(self.chance.choice((1, 1, 2, 3)) if self.way != "large" else 1):
            self.messages.append(self.traffic.make_message(
                self.chance, f"message-{self.number + 1}-{number}", large=self.way == "large",
                calm=self.is_calm and self.chance.random() < 0.5,
                identified=self.chance.random() < 0.5))
            self.messages[-1].is_calm &= not self.faults

    def say(self, client: Client, line: str, *wanted: str) -> str:
        """Send a command; any other reply than `wanted` is a problem."""
        self.last = client.say(line)
        self.count(self.last)
        if wanted and not self.last.startswith(wanted):
            self.may_break = self.may_break or self.last.startswith("421")
            raise smtplib.SMTPException(f"{self.last!r} to {line[:20]}")
        return self.last

    def count(self, reply: str) -> None:
        match = re.match(r"\d+( \d\.\d+\.\d+)?", reply)
        self.traffic.replies[match[0] if match else reply] += 1

    def guess(self, client: Client) -> None:
        self.say(client, "EHLO x", "250")
        self.may_break = True           # after three, or ten from one address, the relay closes
        for _ in range(self.chance.choice((1, 3))):
            if client.log_in(password=f"{self.password} wrong")[:3] not in ("535", "454", "421"):
                self.traffic.problems.append(f"visitor {self.number} logged in")

    def idle(self, client: Client) -> None:
        self.traffic.ending.wait(PATIENCE)

    def log_in(self, client: Client) -> bool:
        for _ in range(3):
            self.say(client, "EHLO x", "250")
            if self.chance.random() < 0.5:
                self.last = client.log_in(password=self.password)
            else:
                user, password = (base64.b64encode(text.encode()).decode()
                                  for text in (USER, self.password))
                self.say(client, f"AUTH LOGIN {user}", "334")
                self.last = client.say(password)
            self.count(self.last)
            if self.last.startswith("235"):
                return True
            if self.last[:3] not in (("454", "535") if "refused" in self.faults else ("454",)):
                self.traffic.problems.append(f"visitor {self.number}: login {self.last}")
            self.may_break = True       # the relay closes after three
        return False

    def send_all(self, client: Client) -> None:
        if not self.log_in(client):
            return
        messages = list(self.messages)
        if self.way == "alarm":
            messages = self.chance.choices(self.traffic.alarms, k=self.chance.randrange(1, 5))
        # Occasionally reset the connection of the next request, of any visitor, before its body.
        if self.chance.random() < 0.05:
            self.traffic.fake.will("send", BeforeBody(utter(b"", reset=True)))
        if self.way == "pipelined":
            self.pipeline(client, messages)
            return
        for message in messages:
            for _ in range(self.chance.choice((1, 1, 2, 3))):
                for line in self.envelope(message):
                    self.say(client, line, "250", "354")
                reply = self.submit(client, message)
                if reply.startswith("421"):
                    return
                # Occasionally repeat an identified message although it got its reply.
                if not reply.startswith("45") and not (message.is_identified
                                                       and self.chance.random() < 0.3):
                    break
        self.say(client, "QUIT", "221")

    def pipeline(self, client: Client, messages: list[TrackedMessage]) -> None:
        """Send each envelope together with the content of the message before it."""
        groups = [self.envelope(message) for message in messages]
        self.send(client, as_lines(groups[0]))
        for number, message in enumerate(messages):
            for line in groups[number]:
                code, text = client.getreply()
                if code not in (250, 354):
                    raise smtplib.SMTPException(f"{code} {text!r} to {line}")
            following = groups[number + 1] if number + 1 < len(messages) else ["NOOP", "QUIT"]
            if self.submit(client, message, as_lines(following)).startswith("421"):
                return
        last = [client.getreply()[0] for _ in range(2)]
        if last != [250, 221]:
            raise smtplib.SMTPException(f"{last} to NOOP and QUIT")

    def leave(self, client: Client) -> None:
        """Behave correctly, but disconnect in between."""
        where = self.chance.choice(("connected", "AUTH", "login", "DATA", "content", "end", "end"))
        message = self.messages[0]
        if where == "AUTH":
            self.send(client, b"EHLO x\r\nAUTH PLAIN " + plain(USER, self.password)
                      + self.chance.choice((b"", b"\r\n")))
        if where in ("connected", "AUTH") or not self.log_in(client):
            self.disappear(client)
            return
        lines = self.envelope(message)
        self.send(client, as_lines(lines[:1 if where == "login" else len(lines)]))
        if where in ("content", "end"):
            for _ in lines:
                client.getreply()
            content = stuffed(message.content)
            cut = self.chance.randrange(len(content) + 1) if where == "content" else len(content)
            self.send(client, content[:cut])
        if where == "end":
            message.began.append(time.monotonic())
            message.unanswered += 1
            self.send(client, b".\r\n")
        self.disappear(client)
        if where == "end" and self.chance.random() < 0.5:
            self.send_again(message)

    def send_again(self, message: TrackedMessage) -> None:
        """Send a message once more because its reply was not received."""
        with contextlib.closing(Client(self.traffic.port)) as client:
            if self.log_in(client):
                for line in self.envelope(message):
                    self.say(client, line, "250", "354")
                self.submit(client, message)

    def disappear(self, client: Client) -> None:
        if self.chance.random() < 0.5:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if client.file:
            client.file.close()
        client.sock.close()

    def envelope(self, message: TrackedMessage) -> list[str]:
        return [f"MAIL FROM:<{message.sender}>",
                *(f"RCPT TO:<{recipient}>" for recipient in message.recipients), "DATA"]

    def send(self, client: Client, data: bytes) -> None:
        cuts = sorted(self.chance.randrange(len(data) + 1)
                      for _ in range(self.chance.choice((0, 0, 1, 5))))
        for begin, end in zip([0, *cuts], [*cuts, len(data)]):
            client.sock.sendall(data[begin:end])

    def submit(self, client: Client, message: TrackedMessage, following: bytes = b"") -> str:
        """Send the content of a message and the following commands. Returns its reply."""
        self.send(client, stuffed(message.content))
        began, reply = time.monotonic(), ""
        message.began.append(began)
        try:
            self.send(client, b".\r\n" + following)
            code, text = client.getreply()
            reply = self.last = f"{code} {text.decode()}"
        finally:
            message.began.remove(began)
            if reply:
                match = re.search("[0-9a-f]{8}-[0-9a-f-]{27}", reply)
                message.replies.append((reply, match[0] if match else ""))
            else:
                message.began.append(began)
                message.unanswered += 1
        self.count(reply)
        return reply


def as_lines(commands: Iterable[str]) -> bytes:
    """Encode commands as lines."""
    return "".join(f"{command}\r\n" for command in commands).encode()


SECRET_FORMS = (SECRET, base64.b64encode(SECRET.encode())[:12].decode())


def wrong_in_log(level: str, line: str) -> str:
    """Return the problem with a log line, or ""."""
    words = line.split()
    is_bad = ("Traceback" in line or "internal-error" in words
              or level == "CRITICAL" or any(form in line for form in SECRET_FORMS)
              or re.search("token-[0-9]", line))
    return f"in the log: {line}" if is_bad else ""


# A round: some visitors at the same time. When they have left, all resources must be released.

def descriptors(pid: int | str = "self") -> int:
    """Return the number of descriptors of a process; 0 on systems without /proc."""
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def what_is_left(running: Running) -> list[str]:
    """Return the resources that a relay still holds; none if it is idle."""
    def look() -> list[str]:
        joined = running.relay
        held = {"connections": len(running.server._connections),
                # Without this task and those of the server and of the queue.
                "tasks": len(asyncio.all_tasks()) - 2 - (joined.queue is not None),
                "memory": joined.config.max_memory_for_messages - joined.memory.free,
                "slots": sum(limiter.in_use for limiter in joined._graph._limiters.values()),
                "fetches": len(joined._tokens._fetches), "loop errors": len(running.loop_errors)}
        return [f"{number} {name} left" for name, number in held.items() if number]
    held: list[str] = running.ask(look)
    return held


def settled(check: Callable[[], list[str]]) -> list[str]:
    """Wait until the list of a check is empty; returns the final list."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not check())
    return check()


def fuzz_round(seed: str, visitors: int = 16, *, uploads: bool = True, timeout: float = 1.5,
               rules: DeliveryRules | None = None,
               is_over: Callable[[Running], bool] = lambda running: True,
               **settings: str) -> list[str]:
    """Play a round of traffic until `is_over`, with all resources free; return problems."""
    before = descriptors(), calls_under_way()
    rules = rules or DeliveryRules()
    fake = FaultyMicrosoft(timeout, rules)
    running = Running(make_config(SMTP_PORT="0", AZURE_AUTHORITY_HOST=fake.url,
                                  GRAPH_ENDPOINT=fake.url, SERVER_NAME="relay.test",
                                  UPSTREAM_TIMEOUT=str(timeout), **settings))
    traffic = Traffic(seed, fake, running.port, rules, uploads=uploads)
    with kept_log() as kept:
        traffic.visit_all(visitors)
        problems = settled(lambda: what_is_left(running) or (
            [] if is_over(running) else ["messages are still waiting"]))
        try:
            running.stop()
        except AssertionError as error:
            problems.append(f"{error}")
    fake.close()
    traffic.judge(fake.messages.values())
    problems += traffic.problems + list(filter(None, itertools.starmap(wrong_in_log, kept.lines)))
    if fake.left_drafts > len(kept.find("draft-left")) + fake.unknown_drafts:
        problems.append(f"{fake.left_drafts} drafts are left")

    def growth() -> list[str]:
        now = descriptors(), calls_under_way()
        return [f"{now} descriptors and threads, but {before} before"] if any(
            after > first for after, first in zip(now, before)) else []
    return problems + settled(growth)


@contextlib.contextmanager
def patient_for(**pauses: float) -> Iterator[None]:
    """Change constants of the relay, mostly its delays and timeouts."""
    with contextlib.ExitStack() as stack:
        for name, value in pauses.items():
            stack.enter_context(unittest.mock.patch.object(relay, name, value))
        yield


def fuzz_spool(seed: str, timeout: float = 1.5) -> list[str]:
    """Play a round with a queue directory, until that is empty; returns the problems."""
    with patient_for(MIN_BACKOFF=0.05, MAX_BACKOFF=0.3, MAX_SLEEP=0.1, DEFAULT_RETRY_DELAY=0.3), \
            tempfile.TemporaryDirectory() as folder:
        problems = fuzz_round(
            seed, timeout=timeout, rules=DeliveryRules(at_least_once=True), SPOOL_DIRECTORY=folder,
            is_over=lambda running: running.ask(lambda: not running.relay.queue._mailboxes))
        left = [str(path) for path in pathlib.Path(folder).glob("*/*")]
    return problems + left


def figures(pid: int) -> dict[str, int]:
    """Return memory in kB, descriptors and threads of a process; {} on systems without /proc."""
    with contextlib.suppress(OSError):
        status = dict(re.findall(r"(VmRSS|VmHWM|Threads):\s+(\d+)",
                                 pathlib.Path(f"/proc/{pid}/status").read_text()))
        return {"kB": int(status["VmRSS"]), "most kB": int(status["VmHWM"]),
                "descriptors": descriptors(pid), "threads": int(status["Threads"])}
    return {}


# The soak test: the relay in its own process, for any time.

MAX_GROWTH = {"kB": 49_152, "descriptors": 60, "threads": 8}      # from the start to the end


class Soak:
    """Sends mixed traffic through a relay in its own process."""

    def __init__(self, process: subprocess.Popen[str], seed: str, fake: FaultyMicrosoft,
                 port: int, folder: str) -> None:
        self.process, self.fake, self.folder = process, fake, pathlib.Path(folder)
        self.traffic = Traffic(seed, fake, port, fake.rules)
        self.numbers = itertools.count()
        self.drafts_reported = 0
        self.start: dict[str, int] = {}
        self.begun = time.monotonic()
        self.delivered = 0              # of forgotten messages

    def run(self, seconds: float, workers: int = 8) -> list[str]:
        """Run visitors for so many seconds; returns the problems."""
        reader = threading.Thread(target=self._read_log, daemon=True)
        reader.start()
        end = self.begun + seconds
        threads = [threading.Thread(target=self._work, args=(end,)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        # The memory of the first seconds is the baseline.
        pauses = [min(30.0, seconds / 3)] + [60.0] * int(seconds / 60)
        while time.monotonic() < end and not self.traffic.ending.is_set():
            pause = pauses.pop(0) if pauses else 60.0
            self.traffic.ending.wait(max(0.0, min(pause, end - time.monotonic())))
            self.start = self.start or figures(self.process.pid)
            self.report()
        self.traffic.ending.set()
        for thread in threads:
            thread.join()
        self.fake.release.set()
        problems = settled(self.left) + settled(self.growth)
        self.report(last=True)
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(PATIENCE) != 0:
            problems.append(f"exit status {self.process.returncode}")
        reader.join(PATIENCE)
        if self.fake.left_drafts > self.drafts_reported + self.fake.unknown_drafts:
            problems.append(f"{self.fake.left_drafts} drafts are left")
        return problems + self.traffic.problems

    def _work(self, end: float) -> None:
        while time.monotonic() < end and not self.traffic.problems:
            self.traffic.visit(Visitor(self.traffic, next(self.numbers)))
        if self.traffic.problems:
            self.traffic.ending.set()

    def _read_log(self) -> None:
        for line in self.process.stderr or ():
            self.drafts_reported += " draft-left " in line
            problem = wrong_in_log("", line)
            if problem:
                self.traffic.problems.append(problem)

    def left(self) -> list[str]:
        try:
            return [path.read_text(errors="replace")[:2000] for path in self.folder.glob("*/*")]
        except FileNotFoundError as error:      # the relay has just removed it
            return [str(error)]

    def growth(self) -> list[str]:
        """Return the resources of which the relay has more than at the start."""
        now = figures(self.process.pid)
        return [f"{now[name]} {name}, but {self.start[name]} at the start"
                for name, limit in MAX_GROWTH.items()
                if now and now[name] > self.start[name] + limit]

    def report(self, *, last: bool = False) -> None:
        """Print the progress; judge and forget messages that ended long ago."""
        now = time.monotonic()
        ended = [message for message in list(self.fake.messages.values())
                 if last or (message.ended and now - message.ended > 3 * PATIENCE)]
        self.traffic.judge(ended)
        for message in ended:
            self.delivered += len(message.deliveries)
            del self.fake.messages[message.marker]
        delivered = self.delivered + sum(
            len(message.deliveries) for message in list(self.fake.messages.values()))
        replies = dict(sorted(self.traffic.replies.items()))
        failures = {reply: number for reply, number in replies.items() if reply[0] in "45"}
        print(f"{'end' if last else 'now'} after {now - self.begun:.0f} s: {delivered} messages "
              f"delivered, {replies.get('250 2.0.0', 0)} accepted; failures {failures}\n"
              f"    start {self.start}\n    now   {figures(self.process.pid)}", flush=True)


def soak(seconds: float, seed: str, timeout: float = 2.0) -> list[str]:
    """Run a soak test, with a queue where file locks exist; returns the problems."""
    folder = tempfile.mkdtemp(dir=FILES.folder)
    fake = FaultyMicrosoft(timeout, DeliveryRules(at_least_once=bool(relay.fcntl)))
    with contextlib.closing(fake), start_python(
            "-c", KILLED, "0",
            SMTP_PORT="0", AZURE_AUTHORITY_HOST=fake.url, GRAPH_ENDPOINT=fake.url,
            TLS_SOURCE="off", REQUIRE_TLS="false", LISTEN_ADDRESS="127.0.0.1",
            UPSTREAM_TIMEOUT=str(timeout), CLIENT_TIMEOUT="10",
            SPOOL_DIRECTORY=folder if relay.fcntl else "") as process:
        port = int(re.findall("port=([0-9]+)", wait_for_line(process, "listening"))[0])
        return Soak(process, seed, fake, port, folder).run(seconds)


def fuzz(seconds: float, seed: str, only: str) -> list[str]:
    """Fuzz for so many seconds, or only the case that `only` names; returns the problems."""
    end, counts = time.monotonic() + seconds, collections.Counter[str]()
    # 250 dialogues, a round, 250 dialogues, a round with a queue directory, and so on.
    names = [only] if only else (
        f"{('round', 'spool')[number // 251 % 2]}:{number // 251}" if number % 251 == 250 else
        f"dialogue:{number - number // 251}" for number in itertools.count())
    for name in names:
        part, _, number = name.partition(":")
        problems = (fuzz_round(f"{seed}.{number}") if part == "round" else
                    fuzz_spool(f"{seed}.{number}") if part == "spool" else
                    list(filter(None, [fuzz_dialogue(f"{seed}.{number}")])))
        counts[part] += 1
        if problems:
            return [*problems, f"reproduce with: fuzz --seed {seed} --only {name}"]
        if time.monotonic() > end:
            break
    print(f"no problems in {dict(counts)}")
    return []


def kill(times: int, seed: str) -> list[str]:
    """Kill the relay so many times; returns the problems."""
    try:
        print(Kills(seed).run(times))
    except AssertionError as error:
        return [str(error)]
    return []


def overload() -> list[str]:
    """Run the overload tests at full size; returns the problems."""
    result = unittest.TestResult()
    with unittest.mock.patch.multiple(OverloadTests, **OverloadTests.FULL):
        unittest.defaultTestLoader.loadTestsFromTestCase(OverloadTests).run(result)
    print(f"{result.testsRun} overload tests at full size")
    return [text for _, text in result.failures + result.errors]


def run_long(arguments: list[str]) -> int:
    """Run fuzz, soak or kill; returns the exit status."""
    parser = argparse.ArgumentParser(prog="test_relay.py")
    parser.add_argument("test", choices=("fuzz", "soak", "kill"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10 ** 9)))
    parser.add_argument("--only", default="",
                        help="fuzz: dialogue:NUMBER, round:NUMBER or spool:NUMBER")
    parser.add_argument("--times", type=int, default=300, help="kill: number of kills")
    options = parser.parse_args(arguments)
    print(f"{options.test} --seed {options.seed}", flush=True)
    setUpModule()
    try:
        problems = (fuzz(options.seconds, options.seed, options.only) if options.test == "fuzz"
                    else soak(options.seconds, options.seed) if options.test == "soak"
                    else kill(options.times, options.seed))
    finally:
        tearDownModule()
    if options.test == "soak":
        problems += overload()
    for problem in problems:
        print(f"VIOLATION {problem}")
    return int(bool(problems))


class Result(unittest.TextTestResult):
    """A result that can include those of other processes, whose tests are descriptions."""

    def getDescription(self, test: Any) -> str:
        return test if isinstance(test, str) else super().getDescription(test)


def tests_of(suite: Any) -> Iterator[unittest.TestCase]:
    """Yield the tests of a suite and of the suites in it."""
    for test in suite:
        yield from tests_of(test) if isinstance(test, unittest.TestSuite) else (test,)


def run_here(names: list[str], options: dict[str, Any], answer: Any, output: pathlib.Path) -> None:
    """Run tests in this child process, redirect its output to a file, and send the results."""
    for number in (signal.SIGTERM, signal.SIGINT):      # so that `with` and `finally` clean up
        signal.signal(number, signal.default_int_handler)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    runner = unittest.TextTestRunner(io.StringIO())
    result = Result(runner.stream, True, options["verbosity"])
    vars(result).update(options)
    unittest.defaultTestLoader.loadTestsFromNames(names, sys.modules[__name__]).run(result)
    answer.send((runner.stream.getvalue(), result.testsRun, [
        [(result.getDescription(test), value) for test, value in getattr(result, name, [])]
        for name in LISTS]))


FIRST = (*APART, "LargeMessageTests", "MemoryTests", "RecipientTests", "SpoolTests", "HangTests",
         "KillTests", "SendTests", "ServeTests", "SlowReaderTests", "DraftTests")


class ParallelRunner(unittest.TextTestRunner):
    """Runs each test class in its own process, `jobs` at a time."""

    resultclass: Any = Result
    jobs = 1

    def run(self, test: Any) -> Any:
        """Run tests as TextTestRunner does, but in other processes."""
        spread: Any = functools.partial(self.spread, test)
        return super().run(spread)

    def spread(self, suite: unittest.TestSuite, result: Any) -> None:
        """Run a process for each class, starting with the longest."""
        units = collections.defaultdict[str, list[str]](list)
        for test in tests_of(suite):
            if type(test).__module__ != __name__:
                test(result)                    # fails because there is no test of that name
                continue
            case, method = test.id().split(".")[-2:]
            units[f"{case}.{method}" if case in APART else case].append(f"{case}.{method}")
        waiting = sorted(units, key=lambda name: FIRST.index(case) if (
            case := name.partition(".")[0]) in FIRST else len(FIRST))
        fork = "fork" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        options = {name: getattr(self, name) for name in (
            "verbosity", "failfast", "buffer", "tb_locals")}
        running: dict[Any, tuple[Any, pathlib.Path]] = {}
        try:
            while (waiting or running) and not result.shouldStop:
                while waiting and len(running) < self.jobs:
                    name = waiting.pop(0)
                    output = pathlib.Path(tempfile.gettempdir(), name)
                    output.touch()
                    ours, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=run_here, daemon=True, args=(
                        units[name], options, theirs, output))
                    process.start()
                    theirs.close()
                    running[ours] = process, output
                for answer in multiprocessing.connection.wait(list(running)):
                    self.collect(result, answer, *running.pop(answer))
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join(5)
                process.kill()

    def collect(self, result: Any, answer: Any, process: Any, output: pathlib.Path) -> None:
        try:
            dots, number, lists = answer.recv()
            process.join()
        except EOFError:
            process.join()
            dots, number, lists = "E", 1, [[], [
                (output.name, f"The process ended with exit code {process.exitcode}\n")], [], []]
        printed = output.read_text("utf-8", "replace")
        if failed := lists[0] or lists[1]:
            test, text = failed[-1]
            failed[-1] = test, f"{text}\nPrinted by {output.name}:\n{printed}" if printed else text
        self.stream.write(dots)
        self.stream.flush()
        result.testsRun += number
        for name, entries in zip(LISTS, lists):
            getattr(result, name, []).extend(entries)
        if failed and self.failfast:
            result.stop()


@contextlib.contextmanager
def private_folder() -> Iterator[None]:
    """Keep temporary files and byte code in a folder: compiling would hide growth of memory."""
    with tempfile.TemporaryDirectory(prefix="relay-tests-") as folder:
        os.chmod(folder, 0o711)             # RUN_AS must be able to enter it
        code = os.path.join(folder, "code")
        with unittest.mock.patch.object(tempfile, "tempdir", folder), \
                unittest.mock.patch.object(sys, "pycache_prefix", code), \
                unittest.mock.patch.dict(os.environ, TMPDIR=folder, PYTHONPYCACHEPREFIX=code):
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            py_compile.compile(str(PROGRAM))
            yield


def main() -> None:
    """Run the tests, or fuzz, soak or kill."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count() or 1)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, epilog=(
        "The long tests are the commands fuzz, soak and kill; see fuzz --help. "
        "All other options are those of unittest:"))
    # More processes than cores because most tests wait for something.
    parser.add_argument("--jobs", type=int, metavar="N", default=min(max(4, 4 * cores), 16),
                        help="processes (default: %(default)s); 1: run in this process")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), private_folder():
        if sys.argv[1:2] in (["fuzz"], ["soak"], ["kill"]):
            sys.exit(run_long(sys.argv[1:]))
        options, rest = parser.parse_known_args()
        if "-h" in rest or "--help" in rest:
            parser.print_help()
        ParallelRunner.jobs = options.jobs
        unittest.main(argv=[sys.argv[0], *rest],
                      testRunner=ParallelRunner if options.jobs > 1 else None)
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
