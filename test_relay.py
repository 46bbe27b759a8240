#!/usr/bin/env python3
"""Tests of smtp_oauth_relay.py:  python3 test_relay.py

They need nothing but Python. The protocol is tested with bytes, whole and in pieces;
everything else through real sockets, with smtplib on the one side and FakeMicrosoft, which
plays Entra ID and Graph, on the other.

Helpers come first, then the tests in the order of the program's sections:

    §1 to §4    ReplyTests SecretTests SettingTests PathTests AccountTests UsernameTests
    §5          SessionTests
    §6, §7      RecipientTests CorpusTests FidelityTests DraftTests MemoryTests
    §8 to §10   EntraAnswerTests GraphAnswerTests QueuedMessageTests LogTests
    §11         ThreadTests HttpsTests HangTests SlowWorkTests LookUpTests
    §12, §13    SignInTests CacheTests IdentityTests AccountLoginTests FailureTests
                ReloadTests TableTests
    §14         SendTests LargeMessageTests DraftFaultTests SlowUploadTests LimiterTests
    §15         SpoolTests FailedTests FullSpoolTests SlowDiskTests SpoolAccountTests
                SpoolStartTests SpoolCommandTests KillTests
    §16         VaultTests OldTlsTests NetworkTlsTests
    §17         DuplicateTests ShellTests DeafTests ConnectionLimitTests LimitTests
                ShutdownTests OverloadTests ResetTests ServeTests
    §18 to §20  DemoTests ExplainTests CommandLineTests AccountCommandTests
    the whole   FuzzTests

The long looks (fuzz, soak, kill) and the code that runs the tests come last.
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
PATIENCE = 20.0         # seconds until a test that waits for something has failed
HANGING = 6 * PATIENCE  # seconds that something hangs, if nobody ends it before
# For tests in which Microsoft answers in time: so it must be on a machine that stands still
# for seconds. It is below PATIENCE, so that a test hears of what hangs all the same.
UNHURRIED = {"UPSTREAM_TIMEOUT": "15"}

TENANT = "11111111-1111-4111-8111-111111111111"
CLIENT = "22222222-2222-4222-8222-222222222222"
USER = f"{TENANT}@{CLIENT}"
SENDER = "scanner@example.com"

REAL_COST, relay.SCRYPT_COST = relay.SCRYPT_COST, 2 ** 4    # before the first hash is made

PDF = ("Content-Type: application/pdf; name=scan.pdf\nContent-Transfer-Encoding: base64\n"
       "Content-Disposition: attachment; filename=scan.pdf\n\nJVBERi0x\n")
PLAIN = "Content-Type: text/plain; charset=utf-8\n\nHello\n"

FROM = f"From: {SENDER}\n"
NAMED = f"From: Scan <{SENDER}>\nTo: a@x.y\n"


def crlf(text: bytes | str) -> bytes:
    """A message in the source of this file, with the line ends that SMTP has."""
    octets = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def multipart(subtype: str, *parts: str, header: str = "") -> str:
    """A part with parts; the boundary depends on them."""
    mark = f"b{len(''.join(parts))}"
    return (f"{header}Content-Type: multipart/{subtype}; boundary=\"{mark}\"\n\n"
            + "".join(f"--{mark}\n{part}\n" for part in parts) + f"--{mark}--\n")


class Mail(NamedTuple):
    """A message of the corpus: as a client sends it, and as Graph gets it."""

    name: str
    sent: bytes | str
    wanted: bytes | str     # "" is: as it was sent; "550 5.7.1" and the like a refusal
    to: str = "a@x.y"
    sender: str = SENDER
    mailbox: str = SENDER       # that sends


# By settings. Each message goes through a real socket and is compared octet for octet.
CORPUS: dict[str, tuple[Mail, ...]] = {
    "": (
        # What is right stays as it is.
        *(Mail(name, NAMED.encode() + crlf(rest), "") for name, rest in (
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
        # From: what becomes of it; "" is nothing.
        *(Mail(f"From {old}", f"From:{old}\nTo: a@x.y\n\nText\n",
               f"From:{new or old}\nTo: a@x.y\n\nText\n")
          for old, new in (
              ("", f" {SENDER}"), (" ", f" {SENDER}"), (f" J\udcf6rg <{SENDER}>", ""),
              (SENDER.upper(), ""), (" o@x.y", ""), (" Scanner", ""), (f" D, J <{SENDER}>", ""),
              (f" {SENDER}\nFrom: {SENDER}", ""), (f" =?utf-8?Q?=C3=BC?= <{SENDER}>", ""),
              (f" \"scan@office\" <{SENDER}>", ""), (f" [Scan] <{SENDER}>", ""),
              (f" (Scan) {SENDER}", ""), (" =?utf-8?q?x?= @ home", ""),
              # A name with a bare "@".
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
        Mail("no From", "To: a@x.y\nSubject: \udcff\n\n", FROM + "To: a@x.y\nSubject: \udcff\n\n"),
        Mail("nobody at all", "From: Me <me@x.y>\nTo: a@x.y\n\n", "", sender="",
             mailbox="me@x.y"),
        Mail("nobody at all, not even in From", "To: a@x.y\n\n", "550 5.1.7", sender=""),
        # No header: an empty line comes before what is text.
        *(Mail(f"text {text[:20]!r}", text, FROM.encode() + crlf("Bcc: a@x.y\n" + "\n" * more)
               + crlf(text))
          for more, text in (
              (1, ""), (0, "\n"), (0, "\nHello\n"), (0, "Subject: s\n"), (1, "H\n\nTo: o@x.y\n"),
              (1, "\udcfc\0\n.\n"), (1, "From today on we are closed.\n"),
              (1, "UPS on battery\nTime: 12:00\nLoad: 40 %\n"), (1, "Hello\n" * 300_000),
              (1, "Alarm: zone 3\nTime: 12:00\n"), (1, "  Alarm\nTime: 12:00\n"))),
        *(Mail("text right after the header", NAMED + text, f"{NAMED}\n{text}")
          for text in ("Hello\n\nText\n", "Hello\nhttp://a/b\nBye\n", "HTTPS://a/b\n",
                       "ftp://a/b\n")),
        Mail("a header that is absurd", NAMED + "X-A: b\n" * 200_000 + "\nText\n", "552 5.3.4"),
        *(Mail("an mbox line", f"From {rest}\n{NAMED}\nText\n", NAMED + "\nText\n") for rest in (
            "scan@x.y Thu Nov 24 18:22:48 2026", "scan at x.y  Thu Nov 24 2026", "MAILER-DAEMON")),
        # Recipients, as Graph finds them.
        Mail("several", NAMED.replace("a@x.y", "A\n\t<a@x.y>; G <o@x.y>") + "Cc: T: b@x.y;\n\n",
             f"Bcc: \u00fc@x.y\n{NAMED}".replace("a@x.y", "A\n\t<a@x.y>")
             + "X-Original-To: G <o@x.y>\nCc: T: b@x.y;\n\n", "a@x.y b@x.y \u00fc@x.y"),
        Mail("two Bcc", NAMED + "Bcc: b@x.y\nBCC: c@x.y\n\n",
             "Bcc: b@x.y,\n c@x.y,\n d@x.y\n" + NAMED + "\n", "a@x.y b@x.y c@x.y d@x.y"),
    ),
    "SENDER_FROM=header": (
        Mail("a comma in the name", "From: Doe, John <Me@x.y>\nTo: a@x.y\n\n", "",
             mailbox="Me@x.y"),
        Mail("a mailbox that is no text", "From: \"m\udcfc\"@x.y\nTo: a@x.y\n\n", ""),
        Mail("From sends", "From: Me <Me@x.y>, n@x.y\nTo: a@x.y\n\n", "",
             mailbox="Me@x.y"),
        Mail("no From", "To: a@x.y\n\n", FROM + "To: a@x.y\n\n"),
        Mail("a From that nobody can read", "From: Scanner\nTo: a@x.y\n\n", ""),
        Mail("neither", "Subject: s\n\n", "550 5.1.7", sender=""),
    ),
    "FROM_MISMATCH=rewrite": (
        Mail("agrees", NAMED + "\n", ""),
        *(Mail(f"rewrite {old}", f"From: {old}\nTo: a@x.y\n\n",
               f"From: {new}\nReply-To: o@real.com\nTo: a@x.y\n\n")
          for old, new in (
              ('"Scan, 2" <o@real.com>', f'"Scan, 2" <{SENDER}>'), ("o@real.com", SENDER),
              ("o@real.com <o@real.com>", f"<{SENDER}>"),
              ("J\udcf6rg\n (x)\n <o@real.com>", f'"J\udcf6rg (x)" <{SENDER}>'),
              ("scan@office <o@real.com>", f'"scan@office" <{SENDER}>'),
              ("o@real.com (Scan)", f"{SENDER} (Scan)"))),
        Mail("a Reply-To stays", "From: S <o@real.com>\nReply-To: r@x.y\nTo: a@x.y\n\n",
             f"From: S <{SENDER}>\nReply-To: r@x.y\nTo: a@x.y\n\n"),
        *(Mail(f"no answer to {old}", f"From: S <{old}>\nTo: a@x.y\n\n",
               f"From: S <{SENDER}>\nTo: a@x.y\n\n")
          for old in ("scan@printer.local", "scan@printer", "scan@[192.168.1.7]", "root@localhost",
                      "scan@x.lan", "scan@192.168.1.7", "scan@PRINTER.LOCAL", USER,
                      *(f"scan@x.{top}" for top in ("arpa", "corp", "example", "home", "internal",
                                                    "invalid", "localhost", "test")))),
        Mail("no answer but to itself", f"From: A <{SENDER}>, B <scan@printer>\nTo: a@x.y\n\n",
             f"From: A <{SENDER}>\nX-Original-From: A <{SENDER}>, B <scan@printer>\n"
             "To: a@x.y\n\n"),
        Mail("several", f"From: A <o@real.com>, B <{SENDER}>\nFrom: p@real.com\nTo: a@x.y\n\n",
             f"From: A <{SENDER}>\nReply-To: o@real.com,\n {SENDER},\n p@real.com\n"
             "X-Original-From: A "
             f"<o@real.com>, B <{SENDER}>\nX-Original-From: p@real.com\nTo: a@x.y\n\n"),
        # What is no address list may still have a name, and an address.
        *(Mail(f"loose: {old}", f"From: {old}\nTo: a@x.y\n\n",
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
        Mail("agrees", NAMED + "\n", ""),
        Mail("others, who stay", FROM + "To: o@x.y; p@x.y\nCc: a@x.y\nBcc: q@x.y\n\n", ""),
        Mail("others, and hidden ones", FROM + "To: o@x.y\nBcc: Q <q@x.y>, a@x.y\nBcc: (\n\n",
             "Bcc: Q <q@x.y>,\n a@x.y,\n b@x.y\n" + FROM + "To: o@x.y\nBcc: (\n\n",
             "a@x.y b@x.y"),
        Mail("others, whom not everybody parts", FROM + "To: o@x.y; a@x.y\n\n",
             "Bcc: a@x.y\n" + FROM + "To: o@x.y; a@x.y\n\n"),
    ),
}


def pem(kind: str, text: str) -> str:
    """Return base64 as PEM, whose lines have 64 characters."""
    lines = re.findall(".{1,64}", text.replace("\n", ""))
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----", ""])


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
HASH = relay.hash_password(PASSWORD, b"sixteen octets..")
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
    """The one answer of AUTH PLAIN."""
    return base64.b64encode(f"{authorize}\0{user}\0{password}".encode())


LOGIN = b"AUTH PLAIN " + plain() + b"\r\n"
MAIL = b"MAIL FROM:<a@b.c>\r\n"
RCPT = b"RCPT TO:<d@e.f>\r\n"

HTML = "Content-Type: text/html\n\n<p>Hello <img src=\"cid:logo@x.y\"></p>\n"
IMAGE = ("Content-Type: image/png\nContent-ID: <Logo@x.y>\nContent-Transfer-Encoding: base64\n"
         "\niVBORw==\n")


class Request(NamedTuple):
    """What was asked of the fake."""

    kind: str               # a name of KINDS, or "other"
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int         # number of the connection that it came on

    def part(self, number: int) -> str:
        """Return a part of the path: 3 is a mailbox, 5 a draft."""
        return urllib.parse.unquote(self.path.split("/")[number])

    @property
    def form(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.body.decode()))


# An action answers a request on a socket; it returns whether the connection goes on.
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


def scan(size: int, kind: str = "application/pdf", name: str = "scan.pdf") -> tuple[str, bytes]:
    """A part with a file of so many octets, and the file."""
    octets = random.Random(size).getrandbits(8 * size).to_bytes(size, "little") if size else b""
    return (f"Content-Type: {kind}; name={name}\nContent-Disposition: attachment; "
            f"filename={name}\nContent-Transfer-Encoding: base64\n\n"
            + base64.encodebytes(octets).decode()), octets


SCAN, SCAN_OCTETS = scan(3_200_000)     # two pieces
LARGE = crlf(multipart("mixed", PLAIN, SCAN, header=NAMED + "Subject: s\n"))

# The program, with short pauses; at the Nth thing that it does to the disk it kills itself,
# before or after.
KILLED = """
import os, pathlib, signal, sys
import smtp_oauth_relay as relay
relay.MIN_BACKOFF, relay.MAX_BACKOFF, relay.MAX_SLEEP = 0.02, 0.1, 0.1
relay.LEAST_PAUSE, relay.THROTTLED_PAUSE = 0.1, 0.3
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

SHORT = 2.0             # seconds of UPSTREAM_TIMEOUT where the end of a wait is looked at
SIMPLE = b"To: a@x.y\r\nSubject: s\r\n\r\nText\r\n"
BULKY = b"To: a@x.y\r\n\r\n" + b"x" * 2_990_000 + b"\r\n"        # and yet one request
TWO_FILES = crlf(multipart("mixed", PLAIN, PDF, SCAN, header=NAMED))
LOOK_UP_USER = "app1@lookup"        # one that is in the table
# Where a stand-in can stop, but for what Between does: what it says, and what it repeats then,
# an octet at a time, each within any time-out of a socket.
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
STOPPED_KINDS = {       # who waits then: a login, or a message, and what is said at best
    "token": (None, 200), "imds": (None, 200), "table": (None, 200), "send": (BULKY, 403),
    "draft": (TWO_FILES, 201), "attach": (TWO_FILES, 201), "open": (TWO_FILES, 201),
    "put": (TWO_FILES, 200), "send-draft": (TWO_FILES, 403)}

# What MAIL is answered when it is in order, and to which mailbox; 550 is for the guest only.
MAIL_ARGUMENTS = {
    "FROM:<a@b.c>": (250, "a@b.c"), "from:<a@b.c>": (250, "a@b.c"),
    "FROM: a@b.c": (250, "a@b.c"), "FROM:<>": (250, ""), "FROM:<@r.s:a@b.c>": (250, "a@b.c"),
    "FROM:<a@b.c> SIZE=100 BODY=8BITMIME": (250, "a@b.c"),
    "FROM:<a@b.c> SMTPUTF8 AUTH=<>": (250, "a@b.c"), "FROM:<z@b.c>": (550, "z@b.c"),
    "FROM:<\u00fc@b.c>": (553, ""), "FROM:<a b@c>": (501, ""), "FROM:<a@b.c": (501, ""),
    "TO:<a@b.c>": (501, ""), "FROM:<a@b.c> SIZE=x": (501, ""), "FROM:<a@b.c>SIZE=1": (501, ""),
    "FROM:<a@b.c> SIZE=1 SIZE=1": (501, ""), "FROM:<a@b.c> RET=HDRS": (555, ""),
    "FROM:<a@b.c> SIZE=36700161": (552, "")}
# The same for RCPT; the last is what two that mean the same have in common.
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


def split_octets(octets: bytes) -> list[bytes]:
    """Single octets, as a slow client sends them."""
    return [bytes([octet]) for octet in octets]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An action that sends an answer."""

    status: int
    octets: bytes

    def __call__(self, sock: socket.socket, request: Request) -> bool:
        sock.sendall(self.octets)
        return True


def say(status: int, body: Any = b"", **headers: str) -> Answer:
    """Answer with a status, a body (JSON unless octets) and headers."""
    octets = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Some Reason", f"Content-Length: {len(octets)}",
             "request-id: graph-request-1",
             *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return Answer(status, "\r\n".join([*lines, "", ""]).encode() + octets)


def graph_says(status: int, code: str, **headers: str) -> Answer:
    """Answer with an error as Graph does."""
    return say(status, {"error": {"code": code, "message": "Some message."}}, **headers)


def utter(octets: bytes, *, reset: bool = False) -> Action:
    """Send octets as they are, and close."""
    def action(sock: socket.socket, request: Request) -> bool:
        sock.sendall(octets)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return False
    return action


def trickle(head: bytes, tail: bytes) -> Action:
    """Send octets, then one at a time, each within any time-out, for ever."""
    def action(sock: socket.socket, request: Request) -> bool:
        sock.sendall(head)
        pause = threading.Event()
        with contextlib.suppress(OSError):
            for octet in itertools.cycle(split_octets(tail)):
                sock.sendall(octet)
                pause.wait(0.02)
        return False
    return action


def reset(sock: Any) -> None:
    """Close without a goodbye: the other side gets a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()        # without a close_notify, under TLS


ANSWERS: dict[str, Action] = {          # each a failure; "taken" may stand before some
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
# Microsoft takes the message, says 202, and then fails: it counts as taken.
SAID_202 = {name: utter(b"HTTP/1.1 202 Accepted\r\n" + rest) for name, rest in (
    ("202 close", b""), ("202 half", b"Content-Length: 5\r\n\r\nx"), ("202 header", b"Content-Le"))}
GOOD = ("slow", "expire", "then close", *SAID_202)
# Those twice, as each is a message that is sent twice if it is tried again.
SEND_FAULTS = (*ANSWERS, "hang", *GOOD, *(f"taken {one}" for one in TAKEN * 2))

# Faults of the token endpoint; {secret} is what Entra might repeat.
TOKEN_ANSWERS = {
    "429": (429, "Too many requests"), "503": (503, "{secret}"), "html": (200, "<html>{secret}"),
    "400": (400, "{{ {secret}"), "500": (500, '{{"error": "server_error"}}'),
    "200": (200, '{{"access_token": 5, "expires_in": "x"}}'),
    "refused": (400, '{{"error": "invalid_request", "error_description": "AADSTS1: {secret}"}}')}

# All passwords begin with a word, so that they are found in the log, in base64 too: behind
# USER and two NULs it begins at a multiple of three.
SECRET = "hidden-word"

IS_LINUX = sys.platform == "linux"      # where each visitor has an address of its own

# The longest classes start first. Those in APART are split into their tests.
APART = ("OverloadTests", "FuzzTests")

LISTS = ("failures", "errors", "skipped", "collectedDurations")      # of a result

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
    """A temporary folder with the certificates."""

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
    """Find a port that nobody listens on, and that no client is given meanwhile: systems
    take those of clients from 32768, or 49152, on.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def setUpModule() -> None:
    """Make the files; the log stays silent, tests that read it say so."""
    global FILES
    FILES = Files()
    relay.log.addHandler(logging.NullHandler())
    relay.log.setLevel("DEBUG")         # so that its formatting is tested too
    relay.log.propagate = False
    # The waits that are for people and attackers; FailureTests has them as they are.
    relay.FAILURE_DELAY, relay.ACCOUNTS_POLL_INTERVAL = 0.0, 0.05


def tearDownModule() -> None:
    """Remove the files."""
    shutil.rmtree(FILES.folder)


@functools.lru_cache(None)
def make_config(**values: str) -> relay.Config:
    """Settings for tests: no TLS unless said otherwise."""
    return relay.Config.from_environ({"TLS_SOURCE": "off", "REQUIRE_TLS": "false",
                                      "LISTEN_ADDRESS": "127.0.0.1", **values})


def tls_config(**values: str) -> relay.Config:
    """Settings for tests, with TLS."""
    return make_config(**{"TLS_SOURCE": "file", "REQUIRE_TLS": "true",
                          "TLS_CERT_FILEPATH": FILES["cert.pem"],
                          "TLS_KEY_FILEPATH": FILES["key.pem"], **values})


def parse(text: str, **settings: str) -> list[relay.Account]:
    """Read accounts that have no faults."""
    accounts, faults = relay.parse_accounts(text, make_config(**settings))
    if faults:
        raise AssertionError(faults)
    return accounts


LOGIN_OF_TESTS = relay.Principal(relay.Account(), relay.Application("", ""), "test")


def accept(session: relay.Session, event: relay.Event) -> None:
    """Answer an event with yes."""
    if isinstance(event, relay.StartTls):
        session.tls_started()
    elif isinstance(event, relay.Authenticate):
        session.authenticated(LOGIN_OF_TESTS)
    elif isinstance(event, relay.Deliver):
        session.delivered("id 1")


class Dialogue:
    """A session that is fed octets; replies and events are kept."""

    def __init__(self, config: relay.Config, *, secure: bool = False,
                 answer: Callable[[relay.Session, relay.Event], None] = accept,
                 **options: Any) -> None:
        self.log: list[tuple[str, object]] = []
        self.session = relay.Session(config, "relay.test",
                                     lambda mark, what: self.log.append((mark, what)),
                                     **options)
        if secure:
            self.session.tls_started()
        self.answer = answer
        self.events: list[relay.Event] = []
        self.said = b""

    def feed(self, *pieces: bytes) -> bytes:
        """Feed octets; returns what the session says to them."""
        before = len(self.said)
        for piece in filter(None, pieces):
            self.session.receive(piece)
            self.work()
        return self.said[before:]

    def work(self) -> None:
        """Let the session work until it wants more."""
        while not self.closed:
            event = self.session.next_event()
            self.said += self.session.output()
            if event is None:
                return
            # An envelope is reset later; keep it as it is now.
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
    """The codes of replies; raises ValueError if one is malformed."""
    found = []
    for line in replies.splitlines(keepends=True):
        match = re.fullmatch(rb"([2-5]\d\d)([ -])([ -~]*)\r\n", line)
        if match is None:
            raise ValueError(f"malformed reply {line!r}")
        if match[2] == b" ":
            found.append(int(match[1]))
    return found


class SessionCase(unittest.TestCase):
    """Sessions that are fed whole and an octet at a time, with the same outcome."""

    def start(self, prelude: bytes = b"", *, secure: bool = False,
              answer: Callable[[relay.Session, relay.Event], None] = accept,
              **settings: str) -> Dialogue:
        dialogue = Dialogue(tls_config(**settings), secure=secure, answer=answer)
        dialogue.feed(prelude)
        return dialogue

    def converse(self, octets: bytes, prelude: bytes = b"EHLO x\r\n" + LOGIN, *,
                 secure: bool = True,
                 answer: Callable[[relay.Session, relay.Event], None] = accept,
                 **settings: str) -> Dialogue:
        """Feed octets after a prelude, in both ways; `said` is what they are answered."""
        outcomes = []
        for pieces in ([octets], split_octets(octets)):
            dialogue = self.start(prelude, secure=secure, answer=answer, **settings)
            dialogue.events, dialogue.said = [], b""
            dialogue.feed(*pieces)
            outcomes.append(dialogue)
        whole, slow = outcomes
        self.assertEqual(whole.said, slow.said, "whole and octet by octet differ")
        self.assertEqual(whole.events, slow.events)
        return whole

    def assertSays(self, octets: bytes, *wanted: int, **options: Any) -> Dialogue:
        dialogue = self.converse(octets, **options)
        self.assertEqual(codes(dialogue.said), list(wanted), dialogue.said)
        return dialogue


def named_by(message: bytes) -> collections.Counter[str]:
    """Whom a message names in To, Cc and Bcc, as the standard library reads them."""
    header = email.message_from_bytes(message)
    values = [str(value) for name in ("to", "cc", "bcc") for value in header.get_all(name, [])]
    lenient = {"strict": False} if getattr(email.utils, "supports_strict_parsing", 0) else {}
    return collections.Counter(
        address.lower() for _, address in email.utils.getaddresses(values, **lenient) if address)


def prepared(message: bytes, *recipients: str, sender: str = SENDER, login: str = "",
             **settings: str) -> bytes:
    """What becomes of a message for these recipients."""
    envelope = relay.Envelope(sender, {relay.normalize_mailbox(one): one for one in recipients},
                              bytearray(message))
    options = relay.Account().message_options(make_config(**settings))
    outcome = relay.edit_message(envelope, options, login)
    return outcome.header + bytes(outcome.body)


def deliver_to(header: str, *recipients: str, body: str = "\r\nText\r\n", **settings: str) -> str:
    """What becomes of a message for these recipients, but for the From that it lacks."""
    message = (header + body).encode("utf-8", "surrogateescape")
    outcome = prepared(message, *recipients, **settings)
    return outcome.decode("utf-8", "surrogateescape").replace(f"From: {SENDER}\r\n", "", 1)


def check_time(play: Callable[..., object], size: int, *arguments: Any) -> None:
    """Check that four times the size takes less than ten times the time: not the square."""
    times = []
    for length in (size, 4 * size):
        begun = time.process_time()
        with contextlib.suppress(relay.DeliveryError):
            play(length, *arguments)
        times.append(time.process_time() - begun)
    assert times[1] < 10 * times[0] + 0.5, times


def take_apart(message: bytes, *recipients: str, **settings: str) -> relay.Draft:
    """Make a draft of a message, however small it is."""
    recipients = recipients or ("a@x.y",)
    envelope = relay.Envelope(SENDER, {relay.normalize_mailbox(one): one for one in recipients},
                              bytearray(crlf(message)))
    return relay.make_draft(envelope.message,
                            relay.edit_message(envelope, relay.Account().message_options(
                                make_config(**settings)), ""))


def octets_of(attachment: relay.Attachment) -> bytes:
    """The decoded octets of an attachment."""
    octets = b"".join(attachment.part.iter_decoded())
    assert len(octets) == attachment.size
    return octets


def response(status: int, body: Any = b"", **headers: str) -> relay.HttpResponse:
    """An answer; a body that is no octets is sent as JSON."""
    octets = body if isinstance(body, bytes) else json.dumps(body).encode()
    return relay.HttpResponse(status, {name.replace("_", "-"): value
                                       for name, value in headers.items()}, octets)


def aadsts(code: int, error: str, text: str = "Something is wrong.") -> dict[str, Any]:
    """The body of an error of Entra, as its documentation has it."""
    return {"error": error, "error_codes": [code], "timestamp": "2026-01-09 02:02:12Z",
            "error_description": f"AADSTS{code}: {text} Trace ID: 0000aaaa-11bb-cccc-dd22-"
            "eeeeee333333 Correlation ID: aaaa0000-bb11-2222-33cc-444444dddddd Timestamp: "
            "2026-01-09 02:02:12Z",
            "trace_id": "0000aaaa-11bb-cccc-dd22-eeeeee333333",
            "error_uri": f"https://login.microsoftonline.com/error?code={code}"}


class KeptLog(logging.Handler):
    """Keeps what is logged."""

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
    """Keep the log for a while."""
    handler = KeptLog()
    relay.log.addHandler(handler)
    try:
        yield handler
    finally:
        relay.log.removeHandler(handler)


@contextlib.contextmanager
def after(word: str, do: Callable[[], None]) -> Iterator[None]:
    """Do something in the pass of the loop that follows the one of an event in the log."""
    def emit(record: logging.LogRecord) -> None:
        if f" {word} " in record.getMessage():
            asyncio.get_running_loop().call_soon(do)
    handler = logging.Handler()
    handler.emit = emit                 # type: ignore[method-assign]
    relay.log.addHandler(handler)
    try:
        yield
    finally:
        relay.log.removeHandler(handler)


class Delivered(NamedTuple):
    """A message that the fake has taken."""

    mailbox: str
    message: bytes
    recipients: list[str]   # whom Graph would mail: To, Cc and Bcc


@dataclasses.dataclass
class FakeDraft:
    """A draft that the fake has, or had."""

    mailbox: str
    properties: dict[str, Any]
    files: list[tuple[dict[str, Any], bytearray]] = dataclasses.field(default_factory=list)
    sent: bool = False
    deleted: bool = False

    @property
    def recipients(self) -> list[str]:
        return sorted(one["emailAddress"]["address"].lower()
                      for name in ("toRecipients", "ccRecipients", "bccRecipients")
                      for one in self.properties.get(name, []))


class BeforeBody(functools.partial[bool]):
    """An action that is done before the body of the request is read."""


KINDS = {                   # what is asked of Entra and Graph, by method and path
    "token": "POST /[^/]+/oauth2/v2.0/token", "send": "POST .*/users/[^/]+/sendMail",
    "draft": "POST .*/users/[^/]+/messages", "attach": "POST .*/messages/[^/]+/attachments",
    "open": "POST .*/messages/[^/]+/attachments/createUploadSession",
    "put": r"PUT /upload/[0-9]+\?authtoken=a%2Fb", "send-draft": "POST .*/messages/[^/]+/send",
    "delete": "DELETE .*/messages/[^/]+",
    "imds": r"GET /metadata/identity/oauth2/token\?.*", "app-service": r"GET /msi/token\?.*",
    "table": "GET /account/users.*", "vault": "GET /secrets/.*"}
GRAPH = ("send", "draft", "attach", "open", "send-draft", "delete")


class FakeMicrosoft:
    """Plays Entra ID and Graph on a loopback port; what it is to do can be scripted."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._lock = threading.RLock()
        self._script: dict[str, collections.deque[Action]] = collections.defaultdict(
            collections.deque)
        self._tokens: dict[str, str] = {}       # and what for
        self._numbers = itertools.count()
        self.entities: dict[str, dict[str, str]] = {}
        self.secret: dict[str, Any] = {}
        self.least_upload = 2_097_152
        self._uploads: list[tuple[FakeDraft, dict[str, Any], bytearray]] = []
        self._busy: collections.Counter[str] = collections.Counter()
        self._sockets: set[socket.socket] = set()
        self.closed: set[int] = set()           # numbers of connections
        self.release = threading.Event()        # ends what hangs
        self.reset()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        port = self._listener.getsockname()[1]
        self.url = f"https://localhost:{port}" if context else f"http://127.0.0.1:{port}"
        # Files go to another host, and it has the path and a query that are its own.
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
        """Close what is open, as front ends do with what is idle."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):      # its thread may be about to close it
                sock.shutdown(how)

    def will(self, kind: str, *actions: Action) -> None:
        """Script the next answers to requests for a "token" or to "send"."""
        self._script[kind].extend(actions)

    def asked(self, kind: str) -> list[Request]:
        return [request for request in self.requests if request.kind == kind]

    @property
    def drafts(self) -> dict[str, FakeDraft]:
        return {ident: draft for ident, draft in list(self._drafts.items()) if not draft.deleted}

    @property
    def sent_drafts(self) -> list[FakeDraft]:
        return [draft for draft in self.drafts.values() if draft.sent]

    @property
    def deleted(self) -> list[str]:
        return [ident for ident, draft in list(self._drafts.items()) if draft.deleted]

    # Actions.

    def accept(self, sock: socket.socket, request: Request) -> bool:
        """Do what Microsoft does when all is well."""
        return self.answer(request)(sock, request)

    def hang(self, sock: socket.socket, request: Request) -> bool:
        """Answer nothing until `release`, then close."""
        self.arrived.release()
        self.release.wait(HANGING)
        return False

    def say_and_hang(self, octets: bytes) -> Action:
        return lambda sock, request: utter(octets)(sock, request) or self.hang(sock, request)

    def hang_then(self, action: Action) -> Action:
        return lambda sock, request: self.hang(sock, request) or action(sock, request)

    def expire(self, sock: socket.socket, request: Request) -> bool:
        self._tokens.pop(request.headers["authorization"].partition(" ")[2], None)
        return graph_says(401, "InvalidAuthenticationToken")(sock, request)

    # One thread for a connection.

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
        asked, path = line.rpartition(" ")[0], line.split()[1]
        kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, asked)),
                    "other")
        with self._lock:
            script = self._script[kind]
            action = script.popleft() if script else self.accept
        body = b"" if isinstance(action, BeforeBody) else stream.read(
            int(headers.get("content-length", 0)))
        request = Request(kind, path, headers, body, number)
        limited = path.lower() + headers.get("authorization", "")
        with self._lock:
            self.requests.append(request)
            self._busy[limited] += 1
            if kind in ("send", "draft"):
                self.most_busy = max(self.most_busy, self._busy[limited])
        try:
            return action(sock, request)
        finally:
            with self._lock:
                self._busy[limited] -= 1

    # What Microsoft answers. A complaint is about what it may take, but the relay must not do.

    def answer(self, request: Request) -> Answer:
        with self._lock:
            refusal = self._refuse(request) if request.kind in GRAPH else None
            return refusal or getattr(self, "_do_" + request.kind.replace("-", "_"))(request)

    def complain_unless(self, is_right: bool, about: str) -> None:
        if not is_right:
            self.complaints.append(about)

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
        """Whether a request has a token, and one for what it asks."""
        bearer, _, token = request.headers.get("authorization", "").partition(" ")
        return bearer == "Bearer" and self._tokens.get(token) in resources

    # Managed identities, facts 6.

    def _do_imds(self, request: Request) -> Answer:
        if request.headers.get("metadata") != "true":
            return say(400, {"error": "bad_request_102", "error_description":
                             "Required metadata header not specified"})
        return self._give_identity(request, "2018-02-01", expires_in="3599")

    def _do_app_service(self, request: Request) -> Answer:
        if request.headers.get("x-identity-header") != "header":
            return say(401)
        return self._give_identity(request, "2019-08-01")

    def _give_identity(self, request: Request, version: str, **more: str) -> Answer:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
        self.complain_unless(
            query["api-version"] == [version] and set(query) <= {
                "api-version", "resource", "client_id", "x"},
            f"bad request for an identity {request.path}")
        resource, = query["resource"]
        return say(200, {"access_token": self.make_token(resource), "resource": resource,
                         "expires_on": str(int(time.time()) + 3599), "token_type": "Bearer",
                         **more})

    # Tables and Key Vault, facts 7 and 8.

    def _do_table(self, request: Request) -> Answer:
        if "sig=" not in request.path and not self._is_for(request, "https://storage.azure.com"):
            return say(401, b"<?xml?>", x_ms_error_code="InvalidAuthenticationInfo")
        where, _, text = request.path.partition("?")
        literal = "'((?:[^']|'')*)'"
        match = re.fullmatch(rf"/account/users\(PartitionKey={literal},RowKey={literal}\)",
                             urllib.parse.unquote(where))
        if match:
            partition, row = (one.replace("''", "'") for one in match.groups())
            entity = self.entities.get(row) if partition == "user" else None
            return say(200, entity) if entity is not None else say(
                404, {"odata.error": {"code": "ResourceNotFound"}},
                x_ms_error_code="ResourceNotFound")
        term = rf"\w+ eq {literal}"
        terms = dict(urllib.parse.parse_qsl(text)).get("$filter", "").split(" and ")
        if where != "/account/users()" or not all(
                re.fullmatch(rf"\({term}( or {term})*\)", one) for one in terms):
            return say(400, {}, x_ms_error_code="InvalidInput")
        wanted = [{(name, value.replace("''", "'")) for name, value in
                   re.findall(rf"(\w+) eq {literal}", one)} for one in terms]
        found = [one for one in self.entities.values() if all(
            any({"PartitionKey": "user", **one}.get(name) == value for name, value in some)
            for some in wanted)]
        return say(200, {"value": found[:1]})

    def _do_vault(self, request: Request) -> Answer:
        clouds = ("azure.net", "azure.cn", "usgovcloudapi.net")
        if not self._is_for(request, *(f"https://vault.{domain}" for domain in clouds)):
            return say(401)
        return say(200, self.secret)

    # Graph: messages, and drafts, facts 4.

    def _refuse(self, request: Request) -> Answer | None:
        """Refuse what Graph would; None: all is well."""
        if not self._is_for(request, self.url):
            return graph_says(401, "InvalidAuthenticationToken")
        if len(request.body) > 4_194_304:
            return say(413)
        wanted = ("text/plain" if request.kind == "send" else
                  "application/json" if request.body else None)
        found = request.headers.get("content-type")
        self.complain_unless(found == wanted, f"{request.kind} with {found}")
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
                             "a lone CR or LF, of which Exchange eats text")
        recipients = sorted(named_by(message))
        if not recipients:
            return graph_says(400, "ErrorInvalidRecipients")
        self.delivered.append(Delivered(request.part(3), message, recipients))
        return say(202, client_request_id=request.headers["client-request-id"])

    def _do_draft(self, request: Request) -> Answer:
        properties = json.loads(request.body)
        headers = properties.get("internetMessageHeaders", [])
        if len(headers) > 5 or not all(one["name"].lower().startswith("x-") and one["value"]
                                       for one in headers):
            return graph_says(400, "InvalidInternetMessageHeader")
        ident = f"AAMk{next(self._numbers)}/+="
        self._drafts[ident] = FakeDraft(request.part(3), properties)
        # The answer repeats the text, and the id stands behind it.
        answer = {"@odata.etag": "W/\"x\"", **properties, "id": ident, "isDraft": True}
        return say(201, json.dumps(answer).replace("<", "\\u003c").encode())     # as .NET escapes

    def _do_attach(self, request: Request) -> Answer:
        properties = json.loads(request.body)
        self.complain_unless(properties.pop("@odata.type") == "#microsoft.graph.fileAttachment",
                             "not a fileAttachment")
        octets = bytearray(base64.b64decode(properties.pop("contentBytes"), validate=True))
        self._drafts[request.part(5)].files.append((properties, octets))
        return say(201, {"id": "x"})

    def _do_open(self, request: Request) -> Answer:
        item = json.loads(request.body)["AttachmentItem"]
        if item.pop("attachmentType") != "file" or item["size"] < self.least_upload:
            return graph_says(400, "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize")
        draft, octets = self._drafts[request.part(5)], bytearray()
        draft.files.append((item, octets))
        self._uploads.append((draft, item, octets))
        return say(201, {"uploadUrl": self.upload_url.format(len(self._uploads) - 1),
                         "nextExpectedRanges": ["0-"]})

    def _do_put(self, request: Request) -> Answer:
        self.complain_unless("authorization" not in request.headers,
                             "the token went to the upload host")
        draft, item, octets = self._uploads[int(re.findall(r"[0-9]+", request.path)[0])]
        if draft.deleted:
            return say(404)
        begin, last, total = map(int, re.fullmatch(
            "bytes ([0-9]+)-([0-9]+)/([0-9]+)", request.headers["content-range"]).groups())
        if (begin != len(octets) or last - begin + 1 != len(request.body)
                or total != item["size"] or len(request.body) >= 4_000_000):
            self.complaints.append(f"a piece out of order: {request.headers['content-range']}")
            return say(416)
        octets += request.body
        if len(octets) == total:
            return say(201, location="https://outlook.office.com/x")
        return say(200, {"NextExpectedRanges": [str(len(octets))]})

    def _do_send_draft(self, request: Request) -> Answer:
        if request.headers.get("content-length") != "0":
            return say(411)
        draft = self._drafts[request.part(5)]
        for item, octets in draft.files:
            self.complain_unless(item.pop("size", len(octets)) == len(octets),
                                 "sent with half of a file")
        draft.sent = True
        return say(202)

    def _do_delete(self, request: Request) -> Answer:
        self._drafts[request.part(5)].deleted = True
        return say(204)


class Running:
    """A relay that serves on loopback ports, in a thread with a loop of its own."""

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
        """Ask something in the thread of the loop."""
        async def answer() -> Any:
            return question()
        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(PATIENCE)

    def forget_failures(self) -> None:
        """Start counting refused logins from zero."""
        self.ask(self.relay.directory.failures._times._values.clear)

    def begin_stop(self) -> None:
        """Do what SIGTERM does."""
        with contextlib.suppress(RuntimeError):         # it has ended
            self._loop.call_soon_threadsafe(self._stop.set)

    def wait(self) -> None:
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise AssertionError("the relay does not stop")

    def waiting(self) -> int:
        """How many messages wait for a slot of their mailbox."""
        waiting: int = self.ask(lambda: sum(len(one._live) + len(one._queued)
                                            for one in self.relay._graph._limiters.values()))
        return waiting

    def stop(self) -> None:
        self.begin_stop()
        self.wait()


class Client(smtplib.SMTP):
    """smtplib, which is not ours, with the replies as text."""

    def __init__(self, port: int, **options: Any) -> None:
        super().__init__("127.0.0.1", port, timeout=PATIENCE, local_hostname="test", **options)

    def say(self, line: str) -> str:
        """Send a command; returns the reply, code and text."""
        code, text = self.docmd(line)
        return f"{code} {text.decode()}"

    def log_in(self, user: str = USER, password: str = "secret") -> str:
        return self.say(f"AUTH PLAIN {plain(user, password).decode()}")

    def post(self, message: bytes = SIMPLE, sender: str = SENDER,
             recipients: tuple[str, ...] = ("a@x.y",)) -> str:
        """Send a message; returns the reply to its end, or to what was refused before."""
        for line in (f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{one}>" for one in recipients)):
            reply = self.say(line)
            if not reply.startswith("250"):
                return reply
        code, text = self.data(message)
        return f"{code} {text.decode()}"

    def post_octets(self, message: bytes, sender: str, recipients: Iterable[str]) -> str:
        """Send a message whose lines end as they do; returns the last reply."""
        utf8 = "" if "".join([sender, *recipients]).isascii() else " SMTPUTF8"
        self.command_encoding = "utf-8"
        for line in (f"MAIL FROM:<{sender}>{utf8}", *(f"RCPT TO:<{one}>" for one in recipients),
                     "DATA"):
            reply = self.say(line)
            if reply[0] not in "23":
                return reply
        self.sock.sendall(stuffed(message) + b".\r\n")
        code, text = self.getreply()
        return f"{code} {text.decode()}"

    def next_reply(self) -> str:
        """Read a reply that was not asked for; "" at the end of the connection."""
        try:
            code, text = self.getreply()
        except (smtplib.SMTPServerDisconnected, OSError):
            return ""
        return f"{code} {text.decode()}"


def trusting() -> ssl.SSLContext:
    """What a client knows that trusts the CA of the tests."""
    return ssl.create_default_context(cafile=FILES["ca.pem"])


class RelayCase(unittest.TestCase):
    """A relay without TLS in front of FakeMicrosoft; each test has a password of its own,
    so that no token of another test is in the cache.
    """

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
        """Stop both; nothing may be left behind."""
        cls.fake.reset()
        cls.running.stop()
        cls.fake.close()
        assert not cls.running.loop_errors, cls.running.loop_errors
        assert not cls.running.server._connections, "connections are left"

    def setUp(self) -> None:
        """Begin with a clean fake, and without the clients of other tests."""
        self.fake.reset()
        wait_for(lambda: not self.running.ask(lambda: len(self.running.server._connections)))
        self.running.forget_failures()
        self.open_lines()
        self.password = f"secret of {self.id()}"
        self.addCleanup(setattr, relay, "MAX_COST", relay.MAX_COST)
        relay.MAX_COST = 10 ** 9        # replies to many commands fill the buffers
        self.addCleanup(lambda: self.assertEqual(self.fake.complaints, []))

    def open_lines(self) -> None:
        """Let mailboxes send that Microsoft has made wait."""
        self.running.ask(self.running.relay._graph._resume_at._values.clear)

    def connect(self, running: Running | None = None) -> Client:
        return self.come_from("127.0.0.1", running)

    def come_from(self, address: str, running: Running | None = None) -> Client:
        """Connect from an address of this machine, and say EHLO."""
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
    """Count for a while how often a password is hashed."""
    return unittest.mock.patch.object(relay.hashlib, "scrypt", wraps=relay.hashlib.scrypt)


def wait_for(condition: Callable[[], Any], patience: float = PATIENCE) -> None:
    """Wait until something is so, that no socket tells."""
    pause, end = 0.002, time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("it never came")
        time.sleep(pause)
        pause = min(1.2 * pause, 0.05)


def stuffed(message: bytes) -> bytes:
    """A message as a client sends it."""
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
    """Set environment variables for a while."""
    return unittest.mock.patch.dict(os.environ, variables)


def as_exchange_decodes(text: bytes) -> bytes:
    """Decode quoted-printable where "=" CRLF alone is a soft line break."""
    return re.sub(rb"=(\r\n|..)", lambda match: (
        b"" if match[1] == b"\r\n" else bytes([int(match[1], 16)])
        if re.fullmatch(b"[0-9A-Fa-f]{2}", match[1]) else b"="), text, flags=re.S)


@contextlib.contextmanager
def alone(**settings: str) -> Iterator[tuple[FakeMicrosoft, Client]]:
    """A fake, a relay and a client that nobody else has."""
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
    """Play cases that mostly wait, each in a thread; returns what comes of each."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        plays = {name: pool.submit(play, *arguments) for name, arguments in cases.items()}
        return {name: one.result() for name, one in plays.items()}


def clean_environ(values: dict[str, str]) -> dict[str, str]:
    """Return the environment without settings, for a Python that finds the program."""
    names = {*relay.settings(), "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return {**clean, "PYTHONPATH": str(HERE), **values}


@contextlib.contextmanager
def start_python(*arguments: str, folder: str = "", groups: tuple[int, ...] = (),
                 **environ: str) -> Iterator[
        subprocess.Popen[str]]:
    """Run Python in an environment without settings; kill it in the end."""
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
    """Read the log until a word is in a line; returns all that was read."""
    said = ""
    for line in process.stderr or ():
        said += line
        if word in line:
            return said
    raise AssertionError(f"{word} is not in {said}")


def start_program(*arguments: str, **options: Any) -> Any:
    """Run the program."""
    return start_python("-m", "smtp_oauth_relay", *arguments, **options)


def call_main(*arguments: str, stdin: str = "", **environ: str) -> tuple[int, str, str]:
    """Do in this process what the program does; returns its exit status, output and errors."""
    handlers = {number: signal.getsignal(number) for number in (
        signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT))}
    texts = [io.TextIOWrapper(io.BytesIO(octets), "utf-8", newline="")
             for octets in (stdin.encode(), b"", b"")]
    with unittest.mock.patch.dict(os.environ, clean_environ(environ), clear=True), \
            unittest.mock.patch.multiple(sys, stdin=texts[0], stdout=texts[1], stderr=texts[2]), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)        # as Python does by itself
        try:
            status: Any = relay.main(list(arguments))
        except SystemExit as error:         # of argparse
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
    """A queued message as it may be."""
    return relay.QueuedMessage(**{
        "id": "8d6f", "account": "", "tenant": TENANT, "client": CLIENT,
        "mailbox": "scanner@example.com", "reverse_path": "boss@example.com",
        "recipients": ["a@x.y"], "header_size": 11, "size": 15, "is_bounce": False,
        "queued_at": 1_700_000_000.0, **values})


@unittest.skipUnless(relay.fcntl, "needs locks of files")
class SpoolCase(RelayCase):
    """Relays with a queue, which try again after a moment."""

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
        """Let the pauses that begin from now on not end."""
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
        """The IDs of what waits, by the first character of the subject."""
        return {path.read_bytes().partition(b"Subject: ")[2][:1]: path.stem
                for path in self.queue.glob("*.eml")}

    def waiting(self) -> list[str]:
        return sorted(path.stem for path in self.queue.glob("*.json"))

    def only(self, folder: str = "queue") -> tuple[pathlib.Path, Any]:
        """The one message in a folder: the path of its state, and that."""
        path, = (self.folder / folder).glob("*.json")
        return path, relay.parse_queued_message(path.read_bytes())

    def be_down(self, action: Action | None = None, times: int = 1000) -> None:
        """Let Microsoft take no message."""
        self.fake.will("send", *[action or say(503)] * times)

    def be_up(self, *actions: Action) -> None:
        """Let it take messages again, after these actions."""
        with self.fake._lock:               # no request comes between
            self.fake._script.clear()
            self.fake.will("send", *actions)

    def subjects(self) -> list[bytes]:
        return [re.search(rb"(?m)^Subject: (.*)\r$", one.message)[1] for one in self.fake.delivered]

    def age(self, path: pathlib.Path) -> None:
        """Let the lifetime of a message be over, while no relay runs."""
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
    """A relay with TLS, on both kinds of port."""

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
        octets = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while part := sock.recv(65536):
                octets += part
        return octets

    def deaf(self, *, smtps: bool = False) -> socket.socket:
        """Connect so that the systems of both sides do not hold megabytes that are not read."""
        sock = socket.socket()
        self.addCleanup(sock.close)
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        sock.connect(("127.0.0.1", self.running._config.smtps_port if smtps else self.running.port))
        return sock

    def half_way(self, octets: bytes, *, smtps: bool = False) -> socket.socket:
        """Begin a handshake with some octets, after STARTTLS if need be."""
        sock = self.raw(smtps=smtps)
        if not smtps:
            sock.sendall(b"EHLO x\r\nSTARTTLS\r\n")
            self.read_until(sock, b"Ready")
        sock.sendall(octets)
        return sock

    def read_until(self, sock: socket.socket, end: bytes) -> bytes:
        octets = b""
        while end not in octets:
            part = sock.recv(65536)
            self.assertTrue(part, f"{octets!r} ended before {end!r}")
            octets += part
        return octets


class Watched:
    """A relay as a process: its log, and what it takes of the machine."""

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
        """How many lines of the log have these words; they come later than the replies."""
        return sum(words in line for line in self.log)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def left(self) -> int:
        """How many descriptors it has, and threads; but connections to Microsoft may be kept."""
        links = []
        for path in pathlib.Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):        # closed meanwhile
                links.append(os.readlink(path))
        table = pathlib.Path(f"/proc/{self.process.pid}/net/tcp").read_text().splitlines()
        kept = {f"socket:[{line.split()[9]}]" for line in table
                if line.split()[2].endswith(f":{self._upstream:04X}")}
        return (sum(link not in kept for link in links)
                + len(os.listdir(f"/proc/{self.process.pid}/task")))

    def memory(self, name: str = "RSS") -> int:
        """Its memory, now (RSS) or at most since forget_peak() (HWM), in octets."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"Vm{name}:\s+(\d+) kB", status)[0]) * 1024

    def forget_peak(self) -> None:
        """Let HWM begin anew, proc_pid_clear_refs(5)."""
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def processor(self) -> float:
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def allow_descriptors(self, number: int) -> None:
        _, hard = relay.resource.prlimit(self.process.pid, relay.resource.RLIMIT_NOFILE)
        relay.resource.prlimit(self.process.pid, relay.resource.RLIMIT_NOFILE, (number, hard))

    def stop(self) -> str:
        """Stop it as it should be stopped; returns its log."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return f"{''.join(self.log)}exit {status}"


def client_hello() -> bytes:
    """The first octets of a TLS handshake."""
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        trusting().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    return out.read()


def last_octets(sock: Any) -> bytes:
    """Read to the end, or to a reset; returns the end of what was read."""
    said = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := sock.recv(65536):
            said = (said + part)[-1000:]
    return said


class Waiting:
    """A client that says something, and waits for the reply in a thread."""

    def __init__(self, client: Client, octets: bytes) -> None:
        self.reply, self.seconds = "", 0.0
        self._client, self._begun = client, time.monotonic()
        assert client.sock is not None
        client.sock.settimeout(HANGING)     # others may come to their stops one by one
        client.sock.sendall(octets)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        self.reply = self._client.next_reply()
        self.seconds = time.monotonic() - self._begun

    @property
    def is_waiting(self) -> bool:
        return self._thread.is_alive()

    def hear(self) -> str:
        self._thread.join(2 * PATIENCE)
        return self.reply


def login_line(user: str = USER, password: str = "secret") -> bytes:
    """A login as a line."""
    return b"AUTH PLAIN %b\r\n" % plain(user, password)


NUMBERS = itertools.count()


def begin_message(client: Client, message: bytes, sender: str = SENDER) -> Waiting:
    """Send a message like no other, and do not wait for the reply to its end."""
    for line in (f"MAIL FROM:<{sender}>", "RCPT TO:<a@x.y>", "DATA"):
        client.docmd(line)
    return Waiting(client, message + b"%d\r\n.\r\n" % next(NUMBERS))


def calls_under_way() -> int:
    """How many threads of relays ask others, or wait for the system; the idle do not count."""
    return sum(one.name == "relay-call" for one in threading.enumerate()) - relay._idle._value


def cut_when_done(running: Running, release: threading.Event) -> None:
    """In the loop: let the calls under way end, and then cut who waits for them, as at the end
    of SHUTDOWN_TIMEOUT, all in one pass.
    """
    release.set()
    wait_for(lambda: not calls_under_way())
    for one in running.server._connections:
        one.task.cancel()


def stop_at(fake: FakeMicrosoft, client: Client, kind: str, where: str, *,
            password: str = "secret", sender: str = SENDER) -> Waiting:
    """Have the stand-in stop there; returns who waits for it, when it has come so far."""
    message, status = STOPPED_KINDS[kind]
    if message is not None:
        assert client.log_in(password=password).startswith("235"), kind
    head, tail = STOPS[where]
    head, before = head.replace(b"STATUS", b"%d" % status), len(fake.asked(kind))
    action = trickle(head, tail) if tail else fake.say_and_hang(head)
    fake.will(kind, BeforeBody(action) if where == "half of the request" else action)
    if message is None:
        user = USER if kind == "token" else LOOK_UP_USER
        waiting = Waiting(client, login_line(user, password))
    else:
        waiting = begin_message(client, message, sender)
    wait_for(lambda: len(fake.asked(kind)) > before)
    return waiting


class HangCase(RelayCase):
    """Waits have an end, and nothing is left of them."""

    def tearDown(self) -> None:
        self.doCleanups()
        wait_for(lambda: not calls_under_way())

    def beside(self, *near: str, **settings: str) -> tuple[FakeMicrosoft, Running]:
        """A relay that has all it asks, a table and an identity too, from one stand-in; which
        has to be looked up for the settings that are `near`.
        """
        fake = FakeMicrosoft()
        fake.entities["app1"] = {"tenant_id": TENANT, "client_id": CLIENT}
        self.addCleanup(lambda: self.assertEqual(fake.complaints, []))
        self.addCleanup(fake.close)             # what hangs in it ends with the test
        running = Running(make_config(**{
            "SMTP_PORT": "0", "AZURE_AUTHORITY_HOST": fake.url, "GRAPH_ENDPOINT": fake.url,
            "AZURE_TABLES_URL": f"{fake.url}/account/users", "SERVER_NAME": "relay.test",
            "AZURE_POD_IDENTITY_AUTHORITY_HOST": fake.url, "UPSTREAM_TIMEOUT": str(SHORT),
            **dict.fromkeys(near, fake.url.replace("127.0.0.1", "localhost")), **settings}))
        self.addCleanup(running.stop)
        return fake, running

    def served(self, running: Running, password: str, sender: str = "other@example.com",
               message: bytes = SIMPLE) -> None:
        client = self.connect(running)
        self.assertEqual(client.log_in(password=password)[:9], "235 2.7.0")
        self.assertEqual(client.post_octets(message, sender, ["a@x.y"])[:9], "250 2.0.0")

    def assertTimely(self, waiting: Waiting, wanted: str, least: float = SHORT) -> None:
        """See what was heard, and when: not before, and soon after.

        What hangs in the tests does so for PATIENCE, so that this is soon enough.
        """
        reply = waiting.hear()
        self.assertEqual(reply[:len(wanted)], wanted, reply)
        self.assertGreaterEqual(waiting.seconds, least)
        self.assertLess(waiting.seconds, PATIENCE)


class Stuck:
    """A function of the standard library that hangs, where it should, until it is released."""

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
                raise AssertionError("too few hang")


class Between:
    """Stands between the relay and Microsoft, at a port or as a proxy, and works or not: "full"
    (connect() hangs), "silent" (nobody accepts), "half" (what comes back stops after some
    octets), "trickle" (it comes an octet at a time). As a proxy it wants a user and a password.
    """

    def __init__(self, case: unittest.TestCase, way: str, to: int = 0) -> None:
        self.asked: list[tuple[str, str]] = []      # of the proxy: where to, and by whom
        self._way, self._to = way, to
        self._end = threading.Event()
        self._held = [socket.create_server(("127.0.0.1", 0), backlog=0 if way == "full" else 100)]
        self.port = self._held[0].getsockname()[1]
        case.addCleanup(self._close)
        if way == "full":
            self._held.append(socket.create_connection(("127.0.0.1", self.port), PATIENCE))
        elif way != "silent":
            threading.Thread(target=self._accept, daemon=True).start()

    def _close(self) -> None:
        self._end.set()
        for sock in self._held:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._held[0].accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            place = ("127.0.0.1", self._to)
            if not self._to:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += sock.recv(1)
                host, _, port = head.split()[1].decode().rpartition(":")
                place = (host, int(port))
                match = re.search(rb"(?i)Proxy-Authorization: (.*)\r\n", head)
                self.asked.append((f"{host}:{port}", match[1].decode() if match else ""))
                if not match:
                    sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                    return
                slow = b"X-Slow: x\r\n" * 100 * (self._way == "trickle")
                self._say(sock, b"HTTP/1.1 200 Established\r\n" + slow + b"\r\n", 20)
            with socket.create_connection(place, PATIENCE) as upstream:
                threading.Thread(target=self._ask, args=(sock, upstream), daemon=True).start()
                while octets := upstream.recv(65536):
                    self._say(sock, octets, 100)

    def _say(self, sock: socket.socket, octets: bytes, some: int) -> None:
        for part in split_octets(octets) if self._way == "trickle" else [octets]:
            sock.sendall(part[:some] if self._way == "half" else part)
            self._end.wait({"trickle": 0.05, "half": PATIENCE}.get(self._way, 0.0))

    @staticmethod
    def _ask(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while octets := source.recv(65536):
                sink.sendall(octets)
            sink.shutdown(socket.SHUT_WR)


def stuck_look_ups() -> Stuck:
    """Look-ups of localhost that hang."""
    return Stuck(socket, "getaddrinfo", lambda host, *_: host == "localhost")


# ---------------------------------------------------------------------------
# Tests, in the order of the program

class ReplyTests(unittest.TestCase):
    """A reply is what RFC 5321 section 4.2 and RFC 2034 want."""

    def test_replies(self) -> None:
        for reply, octets in (
                ((250, "2.0.0", "one\ntwo"), b"250-2.0.0 one\r\n250 2.0.0 two\r\n"),
                ((334, "", ""), b"334 \r\n"),                       # RFC 2034 wants none here
                ((550, "5.1.8", "no\r250 x\x1b[1m\x00\xe9"), b"550 5.1.8 no?250 x?[1m??\r\n")):
            self.assertEqual(bytes(relay.Reply(*reply)), octets)
        self.assertLess(len(bytes(relay.Reply(550, "5.1.8", "x" * 5000))), 512)


class SecretTests(unittest.TestCase):
    """No class that holds a secret shows it."""

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
    """Settings are read from variables; faults are reported at once and in words."""

    def assertFaults(self, environ: dict[str, str], *names: str) -> str:
        with self.assertRaises(relay.ConfigError) as caught:
            relay.Config.from_environ(environ)
        lines = str(caught.exception).splitlines()
        self.assertEqual([re.match("[A-Za-z_]+", line)[0] for line in lines], list(names))
        return str(caught.exception)

    def test_values(self) -> None:
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
                    shown = self.assertFaults({name: text}, name)
                    self.assertIn(": must be ", shown)
                    self.assertNotRegex(shown, "u:p|hidden")

    def test_what_this_system_does_not_know_is_a_fault_where_it_is_used(self) -> None:
        for wanted, use in (
                ("RUN_AS='nobody-here': must be the name of a user",
                 lambda: relay.drop_privileges("nobody-here")),
                ("TLS_CIPHER_SUITE='NONSENSE': must be an OpenSSL cipher list",
                 lambda: relay.make_tls_contexts(tls_config(TLS_CIPHER_SUITE="NONSENSE")))):
            with self.subTest(wanted), self.assertRaisesRegex(relay.ConfigError, f"^{wanted}"):
                use()

    def test_what_is_secret_is_not_shown(self) -> None:
        hidden = "https://x.table.core.windows.net/users?sig=hidden"
        self.assertNotIn("hidden", repr(relay.Config.from_environ({
            "AZURE_TABLES_URL": hidden, "AZURE_CLIENT_SECRET": "hidden",
            "IDENTITY_HEADER": "hidden", "IDENTITY_ENDPOINT": "http://localhost/?hidden"})))

    def test_settings_that_contradict_each_other(self) -> None:
        """They are compared when all values are sound; the ways out are named."""
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
                ({**local, "AZURE_TABLES_URL": table}, "HTTPS_PROXY=.*: must be http://host:port")):
            with self.subTest(environ):
                try:
                    relay.Config.from_environ(environ)
                    lines = []
                except relay.ConfigError as error:
                    lines = str(error).splitlines()
                self.assertEqual(len(lines), len(wanted), lines)
                for line, pattern in zip(lines, wanted):
                    self.assertRegex(line, f"^{pattern}")

    def test_clouds(self) -> None:
        for environ, login, graph in (
                *((one, "login.microsoftonline.com", "graph.microsoft.com")
                  for one in ({}, {"AZURE_CLOUD": "Global"})),
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
        self.assertFaults({"AZURE_CLOUD": "germany"}, "AZURE_CLOUD")

    def test_every_setting_is_explained(self) -> None:
        for name, one in relay.settings().items():
            with self.subTest(name):
                self.assertRegex(one.help, r"^[A-Z].*\.$")
                self.assertIn(f"  {name} (default: {one.default or 'empty'})\n"
                              f"      {one.help}", relay.settings_help())


class PathTests(unittest.TestCase):
    """Paths and parameters, RFC 5321 section 4.1.2."""

    def test_good_paths(self) -> None:
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

    def test_bad_paths(self) -> None:
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

    def test_base64_is_strict(self) -> None:
        for text, octets in (("", b""), ("QQ==", b"A"), ("QUI=", b"AB"), ("QUJD", b"ABC"),
                             ("+/+/", b"\xfb\xff\xbf")):
            self.assertEqual(relay.decode_base64(text), octets)
        for text in ("Q", "QQ", "QQ=", "QQ===", "=", "==", "QQ==QQ==", "Q Q=", "QQ==\n",
                     "Q-__", "*", "\u00fcQQQ"):
            with self.subTest(text), self.assertRaises(relay.ProtocolError):
                relay.decode_base64(text)


# What is wrong with a section [a]; "; " ends a line of it. The values replace VALUE.
FAULTS = """
tenant_id = x -> tenant_id = x: must be the ID of a tenant
client_id = x -> client_id = x: must be the ID of an application
{app}client_id = contoso.com -> line 4: [a] client_id is there twice
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
{app}colour = red -> colour: is no key
{app}VALUE -> ***: is no key -> client_secret: hidden= | [b] networks = 10.0.0.0/8
{app}networks = 10.0.0.0/8;   client_secret = hidden -> networks: goes on in a line that is indented
{app}client_secret = x;   hidden -> client_secret: goes on in a line that is indented
{app}client_secret = x;  networks = 10.0.0.0/8 -> client_secret: goes on in a line
 -> tenant_id: must be set
tenant_id = {tenant} -> client_id: must be set
{own}client_secret_file = /x; {pw} -> set one of client_secret, client_secret_file, credential
{app}{pw} -> password: needs client_secret
VALUE -> password: must be set, as anybody could log in -> \
{own} | {app}client_secret_file = /x | credential = managed-identity
{app}{net}login = optional -> login: optional needs client_secret
{own}login = optional -> login: optional needs networks
{own}login = optional; networks = VALUE -> networks: VALUE without login is an open relay \
-> 0.0.0.0/0 | ::/0 | 10.0.0.0/7 | fc00::/6
{app}require_tls = false -> require_tls: needs networks
{app}tls_min_version = 1.0 -> tls_min_version: needs networks
{app}{net}require_tls = true -> require_tls: true needs a certificate
credential = workload-identity -> credential: workload-identity needs AZURE_FEDERATED_TOKEN_FILE
VALUE -> line 2: is no [section], key = value or comment -> hidden words | [ | = hidden
{app}[ ] -> line 4: is no [section]
{app}[a] -> line 4: [a] is there twice
{app}[A]; {app} -> [A] is there twice; case does not matter
{app}[default]; {app} -> [default]: must be [DEFAULT]
"""


class AccountTests(unittest.TestCase):
    """What an accounts file says."""

    def test_the_example(self) -> None:
        scan, direct = parse(EXAMPLE)
        self.assertEqual(
            (scan.name, scan.tenant_id, scan.client_id, scan.from_email, scan.password,
             scan.client_secret, scan.allowed_recipients, [str(one) for one in scan.networks],
             scan.login, scan.require_tls, scan.tls_min_version),
            ("scan2", TENANT, CLIENT, "scanner@example.com", HASH, "s3cr~t._-",
             ("example.com", "boss@partner.example"), ["192.168.7.0/24", "fd00:7::/64"],
             "optional", False, "1.0"))
        self.assertNotRegex(repr(scan), "s3cr|scrypt")
        # Only with a secret of its own is it ours. An empty key takes back what DEFAULT says.
        for account, secret, is_ours in ((scan, "s3cr~t._-", True), (direct, "typed", False)):
            self.assertEqual(account.as_application("typed"), relay.Application(
                TENANT, CLIENT, secret, relay_holds_secret=is_ours))

    def test_which_credential_a_section_has(self) -> None:
        """A secret of its own takes the place of that of DEFAULT."""
        env = {"AZURE_FEDERATED_TOKEN_FILE": "/t", "AZURE_TENANT_ID": CLIENT,
               "AZURE_CLIENT_ID": TENANT}
        default = f"[DEFAULT]\n{APPLICATION}client_secret = s\n"
        for text, tenant, client, secret, credential in (
                (f"{default}[a]\nclient_secret_file = /x", TENANT, CLIENT, "", "secret"),
                (f"{default}[a]\nclient_secret = %~%(x)s:", TENANT, CLIENT, "%~%(x)s:", "secret"),
                (f"{default}[a]\ncredential = Managed-Identity", TENANT, CLIENT, "",
                 "managed-identity"),
                ("[a]\ncredential = Managed-Identity", "", "", "", "managed-identity"),
                # What the section says comes before the settings.
                ("[a]\ncredential = workload-identity", CLIENT, TENANT, "", "workload-identity"),
                (f"[a]\n{APPLICATION}credential = workload-identity", TENANT, CLIENT, "",
                 "workload-identity")):
            with self.subTest(text):
                account, = parse(f"{text}\npassword = {HASH}\n", **env)
                self.assertEqual(account.as_application("typed"),
                                 relay.Application(tenant, client, secret, credential, True))

    def test_each_fault_names_section_and_key(self) -> None:
        parts = {"app": APPLICATION, "own": f"{APPLICATION}client_secret = hidden\n",
                 "net": "networks = 10.0.0.0/8\n", "pw": f"password = {HASH}", "tenant": TENANT}
        for row in FAULTS.strip("\n").splitlines():
            lines, fault, *values = row.split(" -> ")
            for value in "".join(values).split(" | "):
                with self.subTest(lines, value=value):
                    text = lines.replace("VALUE", value).format(**parts).replace("; ", "\n")
                    _, faults = relay.parse_accounts(f"[a]\n{text}\n", make_config())
                    wanted = fault.replace("VALUE", value)
                    self.assertIn(wanted, [one.removeprefix("[a] ")[:len(wanted)]
                                           for one in faults])
                    self.assertNotIn("hidden", "".join(faults))

    def test_all_faulty_values_are_told_at_once_or_else_all_contradictions(self) -> None:
        for text, wanted in (
                ("", ["there is no account in it"]), ("[DEFAULT]\n", ["there is no account in it"]),
                ("hidden = x\n", ["line 1"]),
                ("[DEFAULT]\ntenant_id = x\n[a]\n[b]\n", ["[DEFAULT] tenant_id = x"]),
                ("[a]\ntenant_id = x\ncolour = red\n[b]\nlogin = x\n",
                 ["[a] tenant_id = x", "[a] colour", "[b] login = x"]),
                ("[a]\n[b]\n", ["[a] tenant_id", "[a] client_id", "[b] tenant_id",
                                "[b] client_id"])):
            _, faults = relay.parse_accounts(text, make_config())
            self.assertEqual([one.partition(":")[0] for one in faults], wanted)

    def test_accounts_that_cannot_be_told_apart(self) -> None:
        def two(first: str, second: str) -> list[str]:
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
                 "[a] and [b] tls_min_version: must be the same, as both have 10.0.0.0/8")):
            self.assertEqual(two(first, second), wanted)

    def test_the_most_specific_network_decides(self) -> None:
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
        for address, guest, require_tls, least in (
                ("10.2.0.1", "office", True, "1.2"), ("10.1.0.1", "old", False, "1.0"),
                ("10.1.2.3", None, False, "1.0"), ("10.1.9.1", None, True, "1.0"),
                ("192.168.1.1", None, True, "1.2"),
                ("fd00::1", "office", True, "1.2"), ("fe80::1%eth0", None, True, "1.2"),
                ("::ffff:10.1.0.1", "old", False, "1.0"), ("unknown", None, True, "1.2")):
            with self.subTest(address):
                login, config = accounts.at(relay.parse_address(address), tls_config())
                self.assertEqual(login and login.account.name, guest)
                self.assertEqual((config.require_tls, config.tls_min_version), (require_tls, least))
                if login:
                    self.assertEqual(login.application.secret, "s")

    def test_who_is_among_the_allowed(self) -> None:
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

    def test_where_a_device_must_be(self) -> None:
        account = relay.Account("a", networks=relay.settings_of(relay.Account)["networks"].parse(
            "10.0.0.0/8, 192.0.2.1, fd00::/8"))
        for address, is_held in (("10.1.2.3", True), ("192.0.2.1", True), ("fd00::1", True),
                                 ("192.0.2.2", False), ("::1", False), ("unknown", False)):
            self.assertEqual(account.allows_address(relay.parse_address(address)), is_held, address)
            self.assertTrue(relay.Account("a").allows_address(relay.parse_address(address)))
        for text, wanted in (("fe80::1%eth0", "fe80::1"), ("::ffff:10.0.0.1", "10.0.0.1")):
            self.assertEqual(str(relay.parse_address(text)), wanted)

    def test_passwords(self) -> None:
        self.assertRegex(HASH, r"^scrypt\$[\w-]{22}\$[\w-]{43}$")
        self.assertTrue(relay.verify_password(PASSWORD, HASH))
        for wrong in ("", PASSWORD[:-1], PASSWORD + " ", PASSWORD.upper()):
            self.assertFalse(relay.verify_password(wrong, HASH))
        self.assertFalse(relay.verify_password("", relay.DUMMY_HASH))
        # RFC 7914 section 12 has no vector of our parameters; this is OpenSSL's answer.
        with unittest.mock.patch.object(relay, "SCRYPT_COST", REAL_COST):
            self.assertEqual(
                relay.hash_password("\u00fc", bytes(range(16))),
                "scrypt$AAECAwQFBgcICQoLDA0ODw$AP8dJQet8qsK2VB-snAjmLJ5a-0Oj5eB9CtaFcakSOs")

    def test_names_for_the_table(self) -> None:
        for username, name in (("scan2@lookup", "scan2"), ("a.b@lookup", "a.b"),
                               ("a@b.c@LookUp.local", "a@b.c"), ("@lookup", None),
                               ("scan2", None), ("scan2@lookups", None), (USER, None),
                               ("a\nb@lookup.c\nd", "a\nb")):
            self.assertEqual(relay.lookup_name(username, "@"), name, username)
        self.assertEqual(relay.lookup_name("a|lookup", "|"), "a")

    def test_who_the_relay_is(self) -> None:
        for tenant, client, secret, file, *wanted in (
                (TENANT, CLIENT, "s", "/t", TENANT, CLIENT, "s", "secret"),
                (TENANT, CLIENT, "", "/t", TENANT, CLIENT, "", "workload-identity"),
                *((tenant, client, secret, file, "", client, "", "managed-identity")
                  for tenant, client, secret, file in (
                      (TENANT, CLIENT, "", ""), ("", CLIENT, "s", ""),
                      ("", CLIENT, "", "/t"), (TENANT, "", "s", "/t")))):
            config = make_config(AZURE_TENANT_ID=tenant, AZURE_CLIENT_ID=client,
                                 AZURE_CLIENT_SECRET=secret, AZURE_FEDERATED_TOKEN_FILE=file)
            self.assertEqual(dataclasses.astuple(relay.relay_identity(config)),
                             (*wanted, True))


class UsernameTests(unittest.TestCase):
    """What a user name means."""

    def test_good_names(self) -> None:
        for name in (USER, USER.upper(), f"{SHORT_TENANT}@{SHORT_CLIENT}",
                     f"{TENANT}@{SHORT_CLIENT}", f"{SHORT_TENANT}==@{CLIENT}", f"{TENANT}:{CLIENT}",
                     f"{TENANT}|{CLIENT}", f"{USER}.local", f"{USER}.example.com", f"{USER}.a@b"):
            delimiter = next(one for one in "@:|" if one in name)
            self.assertEqual(relay.parse_username(name, delimiter), (TENANT, CLIENT))
        self.assertEqual(relay.parse_username(f"Contoso.com@{CLIENT[:-1]}B.local", "@"),
                         ("contoso.com", f"{CLIENT[:-1]}b"))

    def test_bad_names(self) -> None:
        for name in ("", "scan", "@", TENANT, f"{TENANT}:{CLIENT}", f"{TENANT}@contoso.com",
                     f"{TENANT}@{SHORT_CLIENT[:-1]}", f"{USER}x", f"{USER}\n", "id@lookup",
                     *(f"{tenant}@{CLIENT}" for tenant in (
                         "", "contoso", "a..b", "-a.b", "../x.y", "a.b/c", "a.\u212abc",
                         f"{TENANT} ", f"{TENANT}@", f"{SHORT_TENANT}=")), f"{TENANT}@"):
            with self.subTest(name), self.assertRaises(relay.AuthError) as caught:
                relay.parse_username(name, "@")
            self.assertRegex(str(caught.exception.reply), "535 5.7.8 .*TENANT@CLIENT")


SITUATIONS: dict[str, tuple[bytes, bool]] = {
    "cold": (b"", False),
    "plain": (b"EHLO x\r\n", False),
    "tls": (b"EHLO x\r\n", True),
    "login": (b"EHLO x\r\n" + LOGIN, True),
    "mail": (b"EHLO x\r\n" + LOGIN + MAIL, True),
    "rcpt": (b"EHLO x\r\n" + LOGIN + MAIL + RCPT, True),
}

# What each command is answered in each situation, with TLS on offer and REQUIRE_TLS=true.
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
    """What a session answers and asks. FuzzTests compares far more with Model."""

    def test_every_command_in_every_situation(self) -> None:
        titles, *rows = [re.split(r"  +", line.strip()) for line in MATRIX.strip("\n").splitlines()]
        for commands, *wanted in rows:
            commands = commands.format(plain=plain().decode(), empty="").split(", ")
            for command, (situation, code) in itertools.product(commands, zip(titles, wanted)):
                with self.subTest(command, situation=situation):
                    prelude, secure = SITUATIONS[situation]
                    octets = command.encode() + b"\r\n"
                    for spelt in (octets, octets.lower() if "PLAIN" not in command
                                  else octets, octets.replace(b"\r\n", b" \r\n")):
                        self.assertSays(spelt, int(code), prelude=prelude, secure=secure)

    def test_the_greeting_names_the_domain_first(self) -> None:
        session = relay.Session(make_config(SERVER_GREETING="Hello there"), "relay.test")
        session.greet()
        self.assertEqual(session.output(), b"220 relay.test ESMTP Hello there\r\n")

    def test_a_group_is_answered_at_once_and_in_order(self) -> None:
        dialogue = self.start(SITUATIONS["login"][0], secure=True)
        dialogue.session.receive(MAIL + RCPT + b"RCPT TO:<x>\r\nDATA\r\n")
        self.assertIsNone(dialogue.session.next_event())
        self.assertEqual(codes(dialogue.session.output()), [250, 250, 501, 354])

    def test_a_client_hello_on_the_plain_port_is_recognised(self) -> None:
        dialogue = self.assertSays(b"\x16\x03\x01\x02\x00\x01\r\n", prelude=b"", secure=False)
        self.assertTrue(dialogue.closed)
        self.assertIn("SMTPS_PORT", dialogue.events[-1].reason)
        self.assertSays(b"NOOP\r\n\x16\x03\x01\r\n", 250, 500, prelude=b"", secure=False)
        self.assertIn("STARTTLS", dialogue.events[-1].reason)

    def test_a_session_that_gets_nowhere_ends(self) -> None:
        """What counts is what was said since the last login or message that was accepted."""
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
        for octets, *wanted in cases:
            with self.subTest(octets[:30]):
                dialogue = self.start(b"EHLO x\r\n" + LOGIN, secure=True, MAX_RECIPIENTS="100")
                said = dialogue.feed(octets)
                self.assertEqual(codes(said), wanted)
                self.assertEqual(dialogue.closed, wanted[-1] == 421)
                # The log has each reply, and a mistake that is made again and again once.
                logged = [(mark, what.code) for mark, what in dialogue.log if mark != "<"]
                self.assertEqual([code for mark, code in logged if mark == ">"],
                                 [250, 235, *wanted])
                self.assertLessEqual(logged.count(("!", 500)), 1)
                self.assertEqual(("!", 500) in logged, 500 in wanted)
        self.assertSays(b"NOOP\r\n" * 98 + b"STARTTLS\r\n", *[250] * 98, 220,
                        prelude=b"EHLO x\r\n", secure=False)

    def test_mail_parameters(self) -> None:
        for reply, *rows in (
                ("250 2.1.0", "SIZE=1000", "size=36700160", "SIZE=0", "BODY=7BIT", "SMTPUTF8",
                 "BODY=8bitmime", "AUTH=a@b.c", "SIZE=1 BODY=8BITMIME SMTPUTF8 AUTH=+3C+3E"),
                ("501 5.5.4", "SIZE=999999999999999999999", "SIZE=-1", "SIZE=1_0", "SIZE=\u0661",
                 "SIZE", "SIZE=1 SIZE=1", "BODY=BINARYMIME", "BODY", "SMTPUTF8=1", "AUTH"),
                ("552 5.3.4", "SIZE=36700161", "SIZE=99999999999999999999"),
                ("555 5.5.4", "RET=HDRS")):
            for parameters in rows:
                with self.subTest(parameters):
                    octets = f"MAIL FROM:<a@b.c> {parameters}\r\n".encode()
                    self.assertTrue(self.converse(octets).said.startswith(reply.encode()))

    def test_only_crlf_dot_crlf_ends_a_message(self) -> None:
        """SMTP smuggling: CVE-2023-51764, CVE-2024-27305 and their kin."""
        for end in (b"\n.\n", b"\n.\r\n", b"\r.\r\n", b"\r\n.\n", b"\r\n.\r", b"\r.\r",
                    b"\n.\r", b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\r\n.\n", b"\r\n.\n\r\n",
                    b"\r\n.\r\r\n", b"\r\n .\r\n", b"\r\n. \r\n", b"\r\n.\r\n"[:4]):
            with self.subTest(end):
                dialogue = self.assertSays(
                    b"DATA\r\na" + end + b"MAIL FROM:<evil@b.c>\r\n.\r\n", 354, 250,
                    prelude=SITUATIONS["rcpt"][0])
                self.assertIn(b"evil", dialogue.messages[0])

    def test_the_limit_is_exact(self) -> None:
        for size, code in ((5000, 250), (5001, 552)):
            for content in (b"x" * (size - 2) + b"\r\n", b"..\r\n" + b"x" * (size - 5) + b"\r\n",
                            b"\n" + b"x" * (size - 4) + b"\r\n"):
                with self.subTest(size, content=content[:5]):
                    self.assertSays(b"DATA\r\n" + content + b".\r\n", 354, code,
                                    prelude=SITUATIONS["rcpt"][0], MAX_MESSAGE_SIZE="5000")

    def test_what_is_advertised_and_what_is_taken(self) -> None:
        for size, large, limit in (
                ("", "", 36_700_160), ("157286400", "", 157_286_400), ("5000", "", 5000),
                ("", "refuse", 3_145_728), ("5000", "refuse", 5000)):
            with self.subTest(size, large=large):
                dialogue = self.start(b"EHLO x\r\n" + LOGIN, secure=True,
                                      MAX_MESSAGE_SIZE=size, LARGE_MESSAGES=large)
                self.assertIn(b"250-SIZE %d\r\n" % limit, dialogue.said)
                said = dialogue.feed(b"MAIL FROM:<a@b.c> SIZE=%d\r\nRSET\r\n" % limit
                                     + b"MAIL FROM:<a@b.c> SIZE=%d\r\n" % (limit + 1))
                self.assertEqual(codes(said), [250, 250, 552])
                self.assertEqual(b"LARGE_MESSAGES=refuse" in said, limit == 3_145_728)

    def test_more_than_the_memory_is_refused_for_now_and_others_notice_nothing(self) -> None:
        memory = relay.MemoryBudget(10_000)

        def begin() -> Dialogue:
            dialogue = Dialogue(tls_config(), secure=True, memory=memory)
            dialogue.feed(b"EHLO x\r\n" + LOGIN + MAIL + RCPT + b"DATA\r\n")
            return dialogue
        line = b"x" * 998 + b"\r\n"
        first, second = begin(), begin()
        first.feed(line * 6)
        self.assertEqual(memory.free, 4002)             # the last CRLF may begin the end
        # Who announces too much is told at once, who sends too much at the end.
        third = Dialogue(tls_config(), secure=True, memory=memory)
        said = third.feed(b"EHLO x\r\n" + LOGIN + b"MAIL FROM:<a@b.c> SIZE=4003\r\n"
                          + b"MAIL FROM:<a@b.c> SIZE=4002\r\n")
        self.assertEqual(codes(said)[-2:], [452, 250])
        self.assertIn(b"452 4.3.1 ", said)
        second.feed(line * 5)
        self.assertEqual(memory.free, 4002)             # nothing is kept of it
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

    def test_memory_is_taken_until_the_answer_to_the_message(self) -> None:
        memory = relay.MemoryBudget(100)
        dialogue = Dialogue(tls_config(), secure=True, memory=memory,
                            answer=lambda session, event: accept(session, event)
                            if not isinstance(event, relay.Deliver) else None)
        dialogue.feed(b"EHLO x\r\n" + LOGIN + MAIL + RCPT + b"DATA\r\nabc\r\n.\r\n")
        self.assertEqual(memory.free, 95)
        dialogue.session.delivered("id 1")
        self.assertEqual(memory.free, 100)

    def test_octets_behind_starttls_are_never_obeyed(self) -> None:
        dialogue = self.start(b"EHLO x\r\n", answer=lambda session, event: None)
        dialogue.feed(b"STARTTLS\r\nEHLO injected\r\nNOOP\r\n")
        self.assertEqual(dialogue.events, [relay.StartTls()])
        self.assertTrue(dialogue.said.endswith(b"220 2.0.0 Ready to start TLS\r\n"))
        dialogue.session.receive(b"NOOP\r\n")
        dialogue.session.tls_started()
        self.assertIsNone(dialogue.session.next_event())
        self.assertEqual(dialogue.session.output(), b"")
        self.assertEqual(codes(dialogue.feed(b"MAIL FROM:<a@b.c>\r\nEHLO real\r\n")), [530, 250])

    def test_the_log_never_shows_what_belongs_to_auth(self) -> None:
        prelude = SITUATIONS["tls"][0]
        secret = base64.b64encode(b"\0user\0hidden")
        word = base64.b64encode(b"hidden")
        for octets in (b"AUTH PLAIN " + secret, b"AUTH PLAIN\r\n" + secret,
                       b"AUTH LOGIN\r\n" + word + b"\r\n" + word, b"AUTH LOGIN " + word,
                       b"auth\tPLAIN " + secret, word, b"AUTHPLAIN " + secret,
                       b"AUTH CRAM-MD5\r\n" + word):
            with self.subTest(octets[:20]):
                dialogue = self.start(prelude, secure=True)
                dialogue.feed(octets + b"\r\n")
                shown = repr(dialogue.log)
                for hidden in ("hidden", secret.decode(), word.decode()):
                    self.assertNotIn(hidden, shown)

    def test_senders_and_recipients(self) -> None:
        login = relay.Principal(relay.Account("scan2", allowed_senders=("a.b",),
                                          allowed_recipients=("d.e", "boss@f.g")),
                            relay.Application("", "", "s"), "scan2")
        dialogue = Dialogue(tls_config(), secure=True, guest=login)
        said = dialogue.feed(b"EHLO x\r\nMAIL FROM:<x@b.c>\r\nMAIL FROM:<x@A.B>\r\n"
                             b"RCPT TO:<x@y.z>\r\nRCPT TO:<x@d.e>\r\nRCPT TO:<Boss@f.g>\r\n"
                             + b"RCPT TO:<other@f.g>\r\n" * 150 + b"DATA\r\nText\r\n.\r\n")
        self.assertEqual(codes(said)[1:], [550, 250, 550, 250, 250, *[550] * 150, 354, 250])
        self.assertIn(b"550 5.7.1 This account may not send as x@b.c", said)
        self.assertIn(b"550 5.7.1 This account may not send to other@f.g", said)
        self.assertEqual(list(dialogue.events[0].envelope.recipients.values()),
                         ["x@d.e", "Boss@f.g"])


class RecipientTests(unittest.TestCase):
    """Who gets it is the envelope, no one else."""

    def test_edits(self) -> None:
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
                # Whom no field names gets into one Bcc.
                ("To: a@x.y\n", "a@x.y h@x.y", "Bcc: h@x.y\nTo: a@x.y\n"),
                ("Subject: x\n", "a@x.y b@x.y", "Bcc: a@x.y,\n b@x.y\nSubject: x\n"),
                ("To: a@x.y\nBcc: \"B\" <b@x.y>\nX: y\nBcc: c@x.y\n", "a@x.y b@x.y c@x.y h@x.y",
                 "Bcc: \"B\" <b@x.y>,\n c@x.y,\n h@x.y\nTo: a@x.y\nX: y\n"),
                # Whom the envelope does not name is taken out, and kept readable.
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
                # What cannot be read beyond doubt names nobody.
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
                # Semicolons, as people type them; not every reader parts there.
                ("To: a@x.y; B <b@x.y>;\n", "a@x.y b@x.y", "To: a@x.y,\n B <b@x.y>\n"),
                ("To: Team: a@x.y; b@x.y;\n", "a@x.y b@x.y", "To: a@x.y,\n b@x.y\n"),
                # With a malformed line all are in Bcc too; a Resent-Bcc never stays.
                ("To: a@x.y\nno field\nCc: b@x.y\n", "a@x.y b@x.y",
                 "Bcc: a@x.y,\n b@x.y\nTo: a@x.y\nno field\nCc: b@x.y\n"),
                ("To: a@x.y\nRESENT-BCC: h@x.y,\n o@x.y\nResent-To: r@x.y\n", "a@x.y",
                 "To: a@x.y\nResent-To: r@x.y\n"),
                ("To : a@x.y\n", "a@x.y", "Bcc: a@x.y\nTo : a@x.y\n"),
                ("To : o@x.y\n", "a@x.y", "Bcc: a@x.y\nX-Original-To: o@x.y\n"),
                ("no field\nBcc: a@x.y, o@x.y\n", "a@x.y", "Bcc: a@x.y\nno field\n"),
                ("To: a@x.y\nSubject: s\nno field\n", "a@x.y",
                 "To: a@x.y\nSubject: s\n\nno field\n"),
                # Which fields make a header.
                *((f"oops\n{name}: x\n", "a@x.y", f"Bcc: a@x.y\n{more}oops\n{name}: x\n")
                  for more, names in (
                      ("", "Subject DATE Sender Message-ID Received Return-Path MIME-Version "
                           "Importance Priority Content-Type Resent-Date List-Id X-Mailer"),
                      ("\n", "Topic Subjects Importances Xa")) for name in names.split()),
                # Quoted local parts.
                ("To: \"a b\"@x.y\n", "\"a b\"@x.y", "To: \"a b\"@x.y\n"),
                ("To: \"a\\ b\"@x.y\n", "\"A b\"@x.y c@x.y", "Bcc: c@x.y\nTo: \"a\\ b\"@x.y\n"),
                ("Subject: x\n", "\u00fc@x.y", "Bcc: \u00fc@x.y\nSubject: x\n"),
                # Malformed lines end nothing; text behind the last field is text.
                ("oops\nTo: o@x.y\n", "a@x.y", "Bcc: a@x.y\noops\nX-Original-To: o@x.y\n"),
                ("To: o@x.y\nHello there\n", "a@x.y",
                 "Bcc: a@x.y\nX-Original-To: o@x.y\n\nHello there\n")):
            with self.subTest(header):
                outcome = deliver_to(header.replace("\n", "\r\n"),
                                     *re.findall(r'(?:"[^"]*"|[^ "])+', recipients))
                self.assertEqual(outcome.replace("\r\n", "\n"), wanted + "\nText\n")

    def test_random_headers(self) -> None:
        """No reader finds anybody but the envelope in To, Cc and Bcc; the rest stays."""
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
                came = header.encode("utf-8", "surrogateescape") + b"\r\nTo: o@x.y\r\n"
                went = prepared(came, *envelope, FROM_MISMATCH=policy)
                self.assertTrue(went.endswith(b"\r\n\r\nTo: o@x.y\r\n"))
                wanted = {relay.normalize_mailbox(one) for one in envelope}
                after = relay.split_header(went)
                self.assertEqual({address.key for one in after.find(*edited)
                                  for address in relay._parse_addresses(one).addresses}, wanted)
                self.assertTrue(after.find(b"from"))
                for one in relay.split_header(came).fields:
                    if one.name not in (*edited, b"from"):
                        self.assertIn(one.raw, went)
                # Two other readers, which stop at malformed lines.
                self.assertEqual({relay.normalize_mailbox(one) for one in named_by(went)}, wanted)
                with contextlib.suppress(AttributeError, TypeError):    # defects of Python's
                    read = email.message_from_bytes(went, policy=email.policy.default)
                    self.assertEqual({relay.normalize_mailbox(address.addr_spec)
                                      for name in ("to", "cc", "bcc")
                                      for value in read.get_all(name, [])
                                      for address in value.addresses}, wanted)

    def test_a_huge_header_takes_no_quadratic_time(self) -> None:
        def play(size: int, opening: str, shape: str) -> None:
            deliver_to(f"{opening}{shape * (size // len(shape))}\r\n", "a@x.y",
                       FROM_MISMATCH="rewrite")
        for shape in ("a@x.y, ", "(", "((a))", "\"", "[", "<", "a ", "\\", "\r\n ", ":;",
                      "x\r\n", "T: x\r\n", "G:a@x.y;", "\\\"", "\\[", "<@a", "@a,", ".", "@",
                      "a.", "\" \"", "To: a@x.y\r\n"):
            for opening in ("To: ", "To: <", "To: \"", "To: [", "To: (", "From: ", "From "):
                with self.subTest(opening + shape):
                    check_time(play, 4000, opening, shape)

    def test_an_absurd_number_of_lines(self) -> None:
        for line in ("To: a@x.y\r\n", "X-Y: y\r\n", " \r\n"):
            header = "To: a@x.y\r\n" + line * 9999
            self.assertEqual(deliver_to(header, "a@x.y"), f"{header}\r\nText\r\n")
            with self.assertRaisesRegex(relay.DeliveryError, "too many lines"):
                deliver_to(header + line, "a@x.y")

    def test_an_absurd_number_of_addresses_is_doubtful(self) -> None:
        many = ",".join(f"u{number}@x.y" for number in range(40_000))
        self.assertEqual(deliver_to(f"To: {many}\r\n", "u1@x.y"),
                         f"Bcc: u1@x.y\r\nX-Original-To: {many}\r\n\r\nText\r\n")
        # In From they may stay, but say nothing.
        header = f"From: {', '.join([SENDER] * 14_000)}\r\nTo: a@x.y\r\n\r\n".encode()
        self.assertEqual(prepared(header, "a@x.y"), header)


class CorpusTests(unittest.TestCase):
    """Mail arrives as it was sent: octet for octet, but for the edits that are named."""

    def test_corpus(self) -> None:
        for setting, mails in CORPUS.items():
            name, _, value = setting.partition("=")
            with alone(**({name: value} if name else {})) as (fake, client):
                client.log_in()
                for mail in mails:
                    with self.subTest(setting, mail=mail.name):
                        self.check(fake, client, mail)
                self.assertEqual(fake.complaints, [])

    def check(self, fake: FakeMicrosoft, client: Client, mail: Mail) -> None:
        """Send a message and look at what has become of it."""
        fake.delivered.clear()
        recipients = re.findall(r'(?:"[^"]*"|[^ "])+', mail.to)
        reply = client.post_octets(crlf(mail.sent), mail.sender, recipients)
        if isinstance(mail.wanted, str) and mail.wanted[:1] in ("4", "5"):
            self.assertTrue(reply.startswith(mail.wanted + " "), reply)
            self.assertEqual(fake.delivered, [])
            return
        self.assertTrue(reply.startswith("250 2.0.0 "), reply)
        delivered, = fake.delivered
        self.assertEqual(delivered.message, crlf(mail.wanted or mail.sent))
        self.assertEqual(delivered.mailbox, mail.mailbox)
        if re.fullmatch("[ -!#-~]+", mail.to) and not mail.name.startswith("others,"):
            # As the standard library reads it, which cannot read everything.
            self.assertEqual(set(delivered.recipients), set(recipients))


class FidelityTests(RelayCase):
    """What Exchange and signatures need."""

    def test_quoted_printable_that_a_client_damaged_is_repaired(self) -> None:
        """Exchange knows a soft line break with CRLF only, and eats text of the others."""
        text = "The cen\u00fcter of a very long line. " * 20
        encoded = quopri.encodestring(text.encode())
        self.assertNotIn(b"\r", encoded)                # Python has lone LF
        damaged = NAMED.encode() + b"Content-Transfer-Encoding: quoted-printable\n\n" + encoded
        self.assertNotEqual(as_exchange_decodes(encoded), text.encode())
        self.assertReply(self.logged_in().post_octets(damaged + b"\r\n", SENDER, ["a@x.y"]),
                         "250 2.0.0")
        body = self.fake.delivered[0].message.partition(b"\r\n\r\n")[2]
        self.assertEqual(as_exchange_decodes(body), text.encode() + b"\r\n")

    def test_no_answer_goes_to_the_login_of_a_device(self) -> None:
        login = f"{USER}.Printers.com"
        with alone(FROM_MISMATCH="rewrite") as (fake, client):
            self.assertReply(client.log_in(login), "235 2.7.0")
            message = crlf(f"From: S <{login.lower()}>\nTo: a@x.y\n\n")
            self.assertReply(client.post_octets(message, SENDER, ["a@x.y"]), "250 2.0.0")
            self.assertEqual(fake.delivered[0].message, crlf(f"From: S <{SENDER}>\nTo: a@x.y\n\n"))

    @unittest.skipUnless(shutil.which("openssl"), "there is no openssl here")
    def test_a_signature_stays_good(self) -> None:
        def openssl(*arguments: str, octets: bytes) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(["openssl", *arguments], input=octets, timeout=PATIENCE,
                                  capture_output=True)
        text = crlf(multipart("mixed", "Content-Type: text/plain; charset=iso-8859-1\n"
                              "Content-Transfer-Encoding: 8bit\n\n\udcfc trailing \t\n.\n", PDF))
        for command in ("smime", "cms"):
            with self.subTest(command):
                signed = openssl(command, "-sign", "-signer", FILES["cert.pem"], "-inkey",
                                 FILES["key.pem"], octets=text).stdout
                self.assertIn(b"multipart/signed", signed)
                for head in (b"To: o@x.y, a@x.y\r\nCc: p@x.y\r\n", b"From: o@x.y <a@b>\r\n", b""):
                    self.fake.reset()
                    client = self.logged_in()
                    self.assertReply(client.post_octets(head + crlf(signed), SENDER,
                                                        ["a@x.y", "h@x.y"]), "250 2.0.0")
                    delivered = self.fake.delivered[0].message
                    self.assertNotIn(b"\r\nTo: o@x.y", delivered)
                    done = openssl(command, "-verify", "-CAfile", FILES["ca.pem"], "-purpose",
                                   "any", octets=delivered)
                    self.assertEqual((done.returncode, done.stdout), (0, text), done.stderr)
                    broken = delivered.replace(b"trailing", b"Trailing")
                    self.assertNotEqual(openssl(command, "-verify", "-CAfile", FILES["ca.pem"],
                                                "-purpose", "any", octets=broken).returncode, 0)


class DraftTests(unittest.TestCase):
    """What a message becomes as a draft: nothing is lost, or it is refused."""

    def test_the_structure(self) -> None:
        def shape(draft: relay.Draft) -> tuple[Any, ...]:
            body = json.loads(draft.content)["body"]
            return (body["contentType"], body["content"].strip(),
                    *(f"{one.name} {one.part.media_type} {octets_of(one)!r} {one.content_id}"
                      for one in draft.attachments))
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
                # An image that the text does not show must not be hidden.
                (multipart("mixed", PLAIN, IMAGE),
                 ("Text", "Hello", "ATT00001.png image/png b'\\x89PNG' ")),
                # Apple Mail: text, file, text. All of it arrives.
                (multipart("alternative", PLAIN, multipart("mixed", HTML, PDF, HTML)),
                 ("HTML", html, pdf, f"ATT00002.html text/html {crlf(html + chr(10))!r} ")),
                (multipart("mixed", PLAIN, HTML),
                 ("Text", "Hello", f"ATT00001.html text/html {crlf(html + chr(10))!r} ")),
                # A text that says it is a file is one.
                (multipart("mixed", "Content-Disposition: attachment\n\nlog\n", PLAIN),
                 ("Text", "Hello", "ATT00001.txt text/plain b'log\\r\\n' ")),
                (multipart("mixed", "Content-Type: text/plain; name=a.txt\n\nlog\n"),
                 ("Text", "", "a.txt text/plain b'log\\r\\n' ")),
                # A forwarded message stays whole, boundaries and all.
                (multipart("mixed", PLAIN, "Content-Type: message/rfc822\n\n" + PLAIN),
                 ("Text", "Hello", "ATT00001.eml message/rfc822 b'Content-Type: text/plain; "
                                   "charset=utf-8\\r\\n\\r\\nHello\\r\\n' ")),
                # A type that is none is text, unless it cannot be.
                ("Content-Type: text\n\nHello\n", ("Text", "Hello")),
                ("Content-Type: text / HTML\n\nHello\n", ("HTML", "Hello")),
                ("Content-Type: multipart\n\nHello\n", ("Text", "Hello")),
                # A signed file is a file, and a blank text is none.
                *((multipart("mixed", "\n" + " \n" * 300, HTML, f"Content-Type: {kind}\n"
                             "Content-Disposition: attachment; filename=a.xml.p7m\n\nx\n"),
                   ("HTML", html, f"a.xml.p7m {kind} b'x\\r\\n' "))
                  for kind in ("application/pkcs7-mime", "application/x-pkcs7-mime")),
                # An invitation as a file is a file.
                (multipart("mixed", PLAIN, "Content-Type: text/calendar\nContent-Disposition: "
                           "attachment; filename=a.ics\n\nBEGIN\n"),
                 ("Text", "Hello", "a.ics text/calendar b'BEGIN\\r\\n' ")),
                # Unknown multiparts count as mixed, RFC 2046 section 5.1.3.
                (multipart("x-odd", PLAIN, PDF), ("Text", "Hello", pdf)),
                ("Content-Type: nonsense\nContent-Transfer-Encoding: base64\n\nJVBERi0x\n",
                 ("Text", "", "ATT00001.bin application/octet-stream b'%PDF-1' ")),
                ("CONTENT-TYPE: TEXT/HTML; CHARSET=\"UTF-8\"\n\n<b>\n", ("HTML", "<b>"))):
            with self.subTest(message):
                self.assertEqual(shape(take_apart(message.encode())), wanted)

    def test_boundaries(self) -> None:
        """RFC 2046 section 5.1.1, and what is made of less."""
        head = b"Content-Type: multipart/mixed; boundary=\"b c\"\n\n"
        for body, wanted in (
                (b"--b c\n\none\n--b c\n\ntwo\n--b c--\n", [b"one", b"two"]),
                (b"preamble\n--b c\n\none\n--b c--\nepilogue\n--b c\n\nno\n", [b"one"]),
                (b"--b c \t\n\none\n--b c--  \n", [b"one"]),
                # It must stand at the begin of a line, and alone.
                (b"--b c\n\none --b c\n --b c\n--b cd\n--b c-\n--b c--\n",
                 [b"one --b c\r\n --b c\r\n--b cd\r\n--b c-"]),
                # The last delimiter is missing.
                (b"--b c\n\none\n--b c\n\ntwo\n", [b"one", b"two\r\n"]),
                (b"--b c\n\none\n--b c", [b"one"]),
                # The CRLF before a delimiter belongs to it; blank parts are left out.
                (b"--b c\n\none\n\n--b c\n--b c\n\n\n--b c--", [b"one\r\n"]),
                # A header that no empty line ends, and one that is none.
                (b"--b c\nX-A: y\n--b c\n\none\n--b c--", [b"one"]),
                (b"--b c\njust text\n--b c--", [b"just text"]),
                (b"--b c\nX-A: y\nhalf", [b"half"]), (b"--b c\n", [b""]),
                # What is within a part is sought only there.
                (b"--b c\nContent-Type: multipart/mixed; boundary=i\n\n--i\n\none\n--b c\n\n"
                 b"--i\ntwo\n--b c--", [b"one", b"--i\r\ntwo"]),
                (b"--b c\nContent-Type: multipart/mixed; boundary=i\n\n--i\nX-A: y\n--b c--",
                 [b"X-A: y"]),
                (b"--b c\nContent-Type: multipart/mixed; boundary=\"b cd\"\n\n--b cd\n\none\n"
                 b"--b cd--\n--b c--\n", [b"one"])):
            with self.subTest(body):
                draft = take_apart(head + body)
                found = [json.loads(draft.content)["body"]["content"].encode(),
                         *map(octets_of, draft.attachments)]
                self.assertEqual(found, wanted)

    def test_names(self) -> None:
        for parameters, wanted in (
                *((f"filename={value}", wanted) for value, wanted in (
                    ("\"a b.pdf\"", "a b.pdf"), ("\"\u00fc.pdf\"", "\u00fc.pdf"),
                    ("x" * 300 + ".pdf", "x" * 251 + ".pdf"),
                    ("\"C:\\\\scan\\\\a.pdf\"", "C:\\scan\\a.pdf"),
                    ("\"x_.pdf\"; filename*=utf-8''x%e2%82%ac.pdf", "x\u20ac.pdf"),
                    ('""\nContent-Type: x/y; name=a.b', "a.b"), ('"\udcfc.pdf"', "\u00fc.pdf"),
                    # Encoded words where RFC 2047 wants none, but everybody writes them.
                    ("\"=?utf-8?B?w7wucGRm?=\"", "\u00fc.pdf"),
                    ("=?utf-8?B?w7w=?=.tif", "\u00fc.tif"), ('"=?utf-8?q?_a.pdf_?="', "a.pdf"),
                    ("\"\u20ac =?utf-8?Q?=C3?= =?utf-8?Q?=BC?= C:\\users\"",
                     "\u20ac \u00fc C:\\users"))),
                ("filename*=UTF-8''%c3%bc%20b.pdf", "\u00fc b.pdf"),
                ("\n filename*0*=iso-8859-1'de'%fc;\n filename*1=b.pdf", "\u00fcb.pdf"),
                ("x=y\nContent-Type: x/y; name=\"=?iso-8859-1?Q?=FC=2Epdf?=\"", "\u00fc.pdf"),
                ("filename*=utf-8''a%0d%0ab%00.pdf", "a__b_.pdf"),
                ("x=y", "ATT00001.txt"), ("filename*=no-such-charset''%ff", "\u00ff"),
                # Nonsense has some name or another.
                *((nonsense, None) for nonsense in (
                    "filename*=utf-7''+2AA-.pdf", "x\nContent-Type: x/y; name*=utf-8''x; name*0=y",
                    "filename*" + "9" * 4000 + "*=x", "filename*=a%00b''%ff",
                    "filename==?x?b?=?="))):
            with self.subTest(parameters):
                message = multipart("mixed", PLAIN, "Content-Disposition: attachment; "
                                                    f"{parameters}\n\nx\n")
                attachment, = take_apart(message.encode("utf-8", "surrogateescape")).attachments
                self.assertIn(wanted, (attachment.name, None))
                json.loads(attachment.as_json())

    def test_which_images_the_text_shows(self) -> None:
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
                attachment, = take_apart(message.encode()).attachments
                self.assertEqual(attachment.content_id, content_id * wanted)
                self.assertEqual("isInline" in attachment.properties(), wanted)

    def test_no_value_has_a_second_line(self) -> None:
        """Encoded words can hide one, and Exchange might make a field of it."""
        evil = "=?utf-8?q?a=0D=0ABcc:_evil=40x.y=00?="
        draft = take_apart(f"From: {evil} <{SENDER}>\nSubject: {evil}\nX-A: {evil}\nMessage-ID: "
                           f"<\0{evil}>\nTo: {evil} <o@x.y>\nReply-To: {evil} <r@x.y>\n\n"
                           .encode())
        text = draft.content.decode()
        for escape in ("\\n", "\\r", "\\u0000"):
            self.assertNotIn(escape, text.replace('"content": ""', ""))
        self.assertIn("a  Bcc: evil@x.y", text)

    def test_a_header_that_grows_too_large(self) -> None:
        head = f"From: {SENDER}\r\nTo: b@x.y\r\nX-A: "
        for size, *recipients in ((1_048_576, "b@x.y"), (1_048_564, "b@x.y", "c@x.y")):
            header = head + "x" * (size - len(head) - 2)
            take_apart(f"{header}\r\n\r\n".encode(), *recipients)
            with self.assertRaises(relay.DeliveryError):
                take_apart(f"{header}x\r\n\r\n".encode(), *recipients)
        with self.assertRaises(relay.DeliveryError):    # nobody knows whether it is a field
            take_apart(multipart("mixed", PLAIN, "x" * 1_048_577).encode())

    def test_what_the_relay_adds_may_be_too_much(self) -> None:
        config = make_config(LARGE_MESSAGES="refuse")
        message = bytearray(crlf(NAMED + "\n").ljust(3_145_728, b"x"))
        envelope = relay.Envelope(SENDER, {"a@x.y": "a@x.y"}, message)
        self.assertIsNone(relay.prepare_message(envelope, config).draft)
        envelope.recipients["b@x.y"] = "b@x.y"
        with self.assertRaisesRegex(relay.DeliveryError, "LARGE_MESSAGES=refuse") as caught:
            relay.prepare_message(envelope, config)
        self.assertTrue(str(caught.exception.reply).startswith("552 5.3.4 "))

    def test_encodings(self) -> None:
        for encoding, text, wanted in (
                ("base64", b"QUJD\r\nRA==", b"ABCD"), ("BASE64", b"QUJD\r\nRA=", b"ABCD"),
                ("base64", b"QUJDRA", b"ABCD"), ("base64", b"Q U-J*D\r\n\r\nRA==\r\n..", b"ABCD"),
                ("base64", b"", b""), ("base64 (x)", b"QQ==", b"A"), ("", b"=41", b"=41"),
                ("quoted-printable", b"=41b=\r\nc\r\n=C3=BC", b"Abc\r\n\xc3\xbc"),
                ("Quoted-Printable", b"=4 =zz", b"=4 =zz"), ("8bit", b"\xfc\0", b"\xfc\0"),
                ("7bit", b"=41", b"=41"), ("binary", b"x", b"x"),
                # What readers read differently is not guessed.
                ("base64", b"QQ==QQ==", None), ("base64", b"QQ=\r\n=QQ==", None),
                ("base64", b"QQ==" + b"\n" * 4_100_000 + b"QQ==", None),     # in three slices
                ("base64", b"QUJDR", None), ("x-uuencode", b"begin 644", None)):
            with self.subTest(encoding, text=text):
                message = (b"Content-Disposition: attachment\nContent-Transfer-Encoding: "
                           + encoding.encode() + b"\n\n" + text)
                if wanted is None:
                    with self.assertRaises(relay.NotConvertible):
                        take_apart(message)
                else:
                    attachment, = take_apart(message).attachments
                    self.assertEqual(octets_of(attachment), wanted)

    def test_pieces_are_below_4_megabytes_and_cut_no_character(self) -> None:
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
                attachment, = take_apart(message).attachments
                pieces = list(attachment.part.iter_decoded())
                self.assertLess(max(map(len, pieces)), 4_000_000)
                self.assertGreater(len(pieces), 1)
                text = text.replace(b"\n", b"\r\n")
                wanted = (scan if encoding == "base64" else text if "bi" in encoding
                          else quopri.decodestring(text))
                self.assertEqual(b"".join(pieces), wanted)
                self.assertEqual(attachment.size, len(wanted))

    def test_the_properties(self) -> None:
        draft = take_apart(
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
        # What is not there is not said.
        self.assertEqual(set(json.loads(take_apart(b"\nText\n").content)),
                         {"from", "bccRecipients", "body"})
        for field, wanted in (
                ("X-Priority: 1\nImportance: low", "low"), ("X-Priority: 1 (Highest)", "high"),
                ("X-Priority: 2 (High)", "high"), ("Importance: normal", "normal"),
                ("X-Priority: 4", "low"), ("X-Priority: 5 (Lowest)", "low"),
                ("X-Priority: 3", None), ("Priority: urgent", "high"),
                ("Priority: non-urgent", "low"), ("Importance: odd", None),
                ("X-MSMail-Priority: High", "high")):
            content = json.loads(take_apart(f"{field}\n\n".encode()).content)
            self.assertEqual(content.get("importance"), wanted, field)
        content = json.loads(take_apart(b"Subject: =?utf-8?q?_s=0D?=\nTo: A <a@x.y> (x)\nReply-To: "
                                        + b"a@b.c," * 50_000 + b"\n\n").content)
        self.assertNotIn("replyTo", content)
        self.assertEqual((content["subject"], content["toRecipients"]), (
            "s", [{"emailAddress": {"address": "a@x.y", "name": "A"}}]))
        # Many encoded words take their time, and stay as they are.
        for count, wanted in ((500, "x" * 500), (501, ("=?utf-8?q?x?= " * 501).strip())):
            draft = take_apart(b"Subject: " + b"=?utf-8?q?x?= " * count + b"\n\n")
            self.assertEqual(json.loads(draft.content)["subject"], wanted)
        take_apart(b"Subject: =?utf-7?q?+2AA-?=\n\n")      # a surrogate

    def test_the_text(self) -> None:
        for head, text, wanted in (
                ("", "\u00fc".encode(), "\u00fc"), ("", b"\xfc \x80", "\u00fc \u20ac"),
                # An unknown encoding.
                ("\nContent-Transfer-Encoding: 8 bit", b"=41", "=41"),
                ("\nContent-Transfer-Encoding: x-uuencode", b"x", "x"),
                ("\nContent-Transfer-Encoding: \"base64\"", b"QQ==", "A"),
                *((f"; charset={charset}", text, wanted) for charset, text, wanted in (
                    # Most of these mean nothing; the last two would take quadratic time.
                    *((charset, b"\xfc", "\u00fc") for charset in (
                        "iso-8859-1", "us-ascii", "utf8", '"a\0b"', "no-such", "undefined",
                        "unicode:escape", "hex", "x" * 9000, "punycode", "idna")),
                    *((charset, b"\x80", "\u20ac") for charset in ("latin-1", "L1")),
                    *((charset, b"plain", "plain") for charset in ("utf-16", "utf-32")),
                    *((charset, b"x", "x") for charset in ("no-such", "zlib")),
                    ("iso-8859-1", "\u0141".encode(), "\u0141"),
                    ("utf-16", "\u00fc".encode("utf-16"), "\u00fc"),
                    ("utf-16", "\u00fc".encode("utf-16") + b"x", "\u00fc\ufffd"),
                    # What says it is UTF-8, and is not, or is with a fault.
                    *(("utf-8", text, "\u00fc\ufffd")
                      for text in (b"\xfc\x81", b"\xc3\xbc\xff")),
                    ("iso-8859-1", b"\x80 \x93x\x94", "\u20ac \u201cx\u201d"),
                    ("gb2312", "\u6731\u9555\u57fa".encode("gbk"), "\u6731\u9555\u57fa"),
                    ("Shift_JIS", "\u2460".encode("cp932"), "\u2460"),
                    ("koi8-r", b"\xf0\xd2", "\u041f\u0440"),
                    ("utf-7", b"1+1=2, +49", "1+1=2, +49"),
                    # A character that Python lacks; the rest must not become escapes.
                    ("iso-2022-jp", b"\x1b$B%F%9%H-!\x1b(B", "\u30c6\u30b9\u30c8\ufffd")))):
            with self.subTest(head, text=text):
                message = f"Content-Type: text/plain{head}\n\n".encode() + text
                self.assertEqual(json.loads(take_apart(message).content)["body"]["content"], wanted)
        # A field counts more than <meta>, and what stands further down is text.
        meta, cyrillic = b"<meta charset=windows-1251>", "\u041f"
        for head, text, wanted in (
                ("html", meta + b"\xcf", cyrillic), ("html", b" " * 1024 + meta + b"\xfc", "\xfc"),
                ("html", b"<META content='text/html; charset=\"Windows-1251\"'>\xcf", cyrillic),
                ("html; charset=utf-8", meta + b"\xc3\xbc", "\u00fc"),
                *((f"plain; charset={charset}", ("x" * size).encode(charset), "x" * size)
                  for charset, size in (("utf-16", 2_200_000), ("utf-32", 1_000_000)))):
            draft = take_apart(f"Content-Type: text/{head}\n\n".encode() + text)
            self.assertEqual(json.loads(draft.content)["body"]["content"].rpartition(">")[2].strip(),
                             wanted)

    def test_what_cannot_be_said_is_refused_and_the_reason_given(self) -> None:
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
                take_apart(message.encode())
        self.assertTrue(str(caught.exception.reply).startswith("552 5.3.4 "))
        room = 4_194_304 - len(take_apart(b"\n").content)
        with self.assertRaises(relay.NotConvertible):
            take_apart(b"\nx" + b"x" * room)
        # The limits themselves are all right.
        for message in (multipart("mixed", *[PLAIN] * 250), deepest, "\n" + "x" * room):
            take_apart(message.encode())

    def test_the_author_and_the_answers_are_read_as_in_the_header(self) -> None:
        for field, name in (("M\u00fcller, Hans <o@x.y>", "M\u00fcller, Hans"),
                            ("Doe, =?utf-8?q?J=C3=BC?= <o@x.y>", "Doe, J\u00fc"),
                            ("\"Long\n name\" <o@x.y>", "Long name"), ("o@x.y (Me)", "Me"),
                            ("a@x.y <o@x.y>", "a@x.y"), ("S (x) @office <o@x.y>", "S (x) @office")):
            draft = take_apart(f"From: {field}\nReply-To: {field}\n\n".encode())
            content = json.loads(draft.content)
            person = {"emailAddress": {"address": "o@x.y", "name": name}}
            self.assertEqual((content["from"], content["replyTo"]), (person, [person]))
        draft = take_apart(b"From: Scanner\nReply-To: Scanner\n\n")
        self.assertEqual(json.loads(draft.content)["from"], {"emailAddress": {"address": SENDER}})
        self.assertNotIn("replyTo", json.loads(draft.content))

    def test_a_part_takes_no_quadratic_time(self) -> None:
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
                check_time(lambda size, make: take_apart(make(size).encode()), 20_000, make)

    def test_random_mime(self) -> None:
        """It is refused, or what the standard library finds is all there."""
        pieces = ["Content-Type: multipart/mixed; boundary=b\n", "Content-Type: text/html\n",
                  "Content-Type: multipart/alternative; boundary=c\n", "--b\n", "--b--\n",
                  "--c\n", "--c--\n", "\n", "\n", "text\n", "Content-Type: x/y; name=a\n",
                  "Content-Transfer-Encoding: base64\n", "QUJD\n", "Content-Type: text/plain\n",
                  "Content-Transfer-Encoding: quoted-printable\n", "=41=\n", "junk\n", " f\n",
                  "Content-Disposition: attachment; filename*0*=\n", "Content-ID: <x>\n",
                  "To: o@x.y\n", "From: \udcff <\n", "=?utf-8?q?=FF?=\n"]
        chance = random.Random(33)
        drafts = 0
        for number in range(3000):
            text = "".join(chance.choices(pieces, k=chance.randrange(25)))
            message = text.encode("utf-8", "surrogateescape")
            with self.subTest(number, message=message):
                try:
                    draft = take_apart(message)
                except relay.NotConvertible:
                    continue
                drafts += 1
                content = json.loads(draft.content)
                self.assertEqual(content["bccRecipients"], [{"emailAddress": {"address": "a@x.y"}}])
                self.assertNotIn("toRecipients", content)
                for attachment in draft.attachments:
                    octets_of(attachment)
                    json.loads(attachment.as_json())
        self.assertGreater(drafts, 700)


@unittest.skipUnless(pathlib.Path("/proc/self/status").exists(), "needs /proc")
class MemoryTests(unittest.TestCase):
    """One large message costs at most 2.5 times its size, and nothing when it is gone."""

    def test_scans_of_25_and_35_megabytes_and_a_long_text(self) -> None:
        fake = FakeMicrosoft()
        self.addCleanup(fake.close)
        text = "Content-Type: text/html; charset=utf-8\n\n\U0001f600" + "x" * 4_100_000 + "\n"
        for size, body in ((25, PLAIN), (35, text)):
            # Of these base64 makes megabytes.
            file, octets = scan(size * 756_000 - len(body) * 3 // 4)
            message = crlf(multipart("mixed", body, file, header=NAMED))
            port = free_port()
            # As in the Dockerfile: else glibc keeps up to half of a message for the next.
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
                        most = before["kB"] + len(message) / 4096
                        wait_for(lambda: figures(process.pid)["kB"] < most)     # noqa: B023
            self.assertTrue(fake.sent_drafts[-1].files[0][1] == octets)
            self.assertGreater(len(message), size * 990_000)
            self.assertGreater(cost, len(message) * 0.9)        # so it is really measured
            self.assertLess(cost, 2.5 * len(message))


class EntraAnswerTests(unittest.TestCase):
    """What Entra's answers mean, facts 1.2 to 1.5; see SignInTests too."""

    def test_tokens(self) -> None:
        lives: tuple[tuple[Any, float], ...] = (
            (3599, 3299), ("3599", 3299), (300, 0), (301, 1), (0, 0), (-5, 0), (None, 0),
            ("soon", 0), ([], 0), ("nan", 0), ("inf", 0), (10 ** 400, 0), (1e9, 86400))
        # App Service says when it ends, in text; IMDS says both, in text.
        for expires_in, expires_on, life in (
                *((expires_in, None, life) for expires_in, life in lives),
                (None, "1600", 300), ("600", "9", 300)):
            with self.subTest(expires_in, expires_on=expires_on):
                self.assertEqual(relay.parse_token(response(200, {
                    "token_type": "Bearer", "access_token": "eyJ", "expires_in": expires_in,
                    "expires_on": expires_on}), "s", 1000.0), ("eyJ", life))

    def test_the_secret_is_never_repeated(self) -> None:
        with self.assertRaises(relay.AuthError) as caught:
            relay.parse_token(response(401, aadsts(7000215, "invalid_client",
                                                  "no hid den&, no hid+den%26!")), "hid den&", 0)
        self.assertNotIn("hid", repr(caught.exception.facts))


class GraphAnswerTests(unittest.TestCase):
    """Which answer is which reply: the table of the contract."""

    TABLE = [(int(answer[:3]), answer[4:], wanted) for wanted, answers in {
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
    }.items() for answer in answers.split(", ")]

    def test_garbage(self) -> None:
        for body in (b"", b"null", b"5", b"[]", b'{"error": 5}', b'{"error": {"code": []}}',
                     b'{"error": {}}', b"\xff", b"[" * 100_000, b'{"error": {"code": "Err'):
            with self.subTest(body[:20]):
                self.assertEqual(relay.graph_error(response(403, body), SENDER).reply.status,
                                 "5.7.1")

    def test_retry_after(self) -> None:
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
    """What is in the files of the queue, and what is said when it failed."""

    def test_a_state(self) -> None:
        whole = vars(make_message(recipients=["a@x.y", "\u00fc@x.y"], reason="a\nb\u00fc"))
        found = relay.parse_queued_message(json.dumps(whole).encode())
        self.assertEqual(vars(found), whole)
        without = {name: whole[name] for name in whole if name != "mailbox"}
        for text in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, *(
                json.dumps(values).encode() for values in (without, *(
                    {**whole, **change} for change in (
                        {"size": "15"}, {"size": True}, {"attempts": 1.0}, {"is_bounce": 0},
                        {"junk": 1}, {"recipients": "a@x.y"}, {"queued_at": None}))))):
            with self.subTest(text[-30:]), self.assertRaises(ValueError):
                relay.parse_queued_message(text)

    def test_backoff(self) -> None:
        with patient_for(MIN_BACKOFF=60.0, MAX_BACKOFF=1800.0):
            for failures, wanted in ((1, 60), (2, 120), (3, 240), (6, 1800), (10_000, 1800)):
                pauses = [relay.backoff(failures) / wanted for _ in range(200)]
                self.assertTrue(0.8 <= min(pauses) < 0.9 and 1.1 < max(pauses) <= 1.201, pauses)

    def test_a_bounce(self) -> None:
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
        # A subject that is not text, and as many and as long lines as possible.
        message.recipients = [f"{chr(0x20ac) * 60}-{number}@example.com" for number in range(500)]
        message.reason *= 200
        header = b"Subject: =?utf-7?Q?+2AA-?=" + b"\r\n s" * 600 + b"\r\n"
        content = relay.make_bounce(message, header, "relay.test", "0a1b", 0.0)
        self.assertLessEqual(max(map(len, content.split(b"\r\n"))), 998)
        self.assertIn(b"Subject:    ? s s s", content)
        self.assertEqual(content.count(b"Recipient:"), 500)
        content = relay.make_bounce(make_message(), b"", "relay.test", "0a1b", 0.0)
        self.assertEqual(content.count(b"Subject:"), 1)

    def test_how_it_is_listed(self) -> None:
        for folder, values, word, is_there in (
                ("queue", {"account": "scanner8"}, "account=scanner8", True),
                ("queue", {}, "account", False), ("queue", {}, "bounce", False),
                ("queue", {"is_bounce": True}, "bounce=", True),
                ("queue", {"next_attempt_at": 4e9}, "next-attempt=2096-10-02T07:06:40Z", True),
                ("queue", {"next_attempt_at": 5.0}, "next-attempt", False),
                ("failed", {"next_attempt_at": 4e9}, "next-attempt", False)):
            said = relay.describe_message(pathlib.Path(folder) / "8d6f.json",
                                          make_message(**values))
            self.assertEqual(word in said, is_there, said)


class LogTests(unittest.TestCase):
    """One line for an event, whatever is in it."""

    def test_values_are_escaped(self) -> None:
        for value, wanted in (("plain@x.y", "plain@x.y"), ("a b", '"a b"'), ("", '""'),
                              ("a\r\nERROR b", '"a\\r\\nERROR b"'), ('a"b', '"a\\"b"'),
                              ("\x1b[1m", '"\\x1b[1m"'), ("\u202e\u00fc", '"\\u202e\\xfc"'),
                              ("\udcff", '"\\udcff"'), ("a=b", '"a=b"'), (5, "5"),
                              (0.12345, "0.123"), ("a\\b", '"a\\\\b"')):
            with self.subTest(value):
                self.assertEqual(relay.quote_value(value), wanted)
        self.assertLess(len(relay.quote_value("x" * 100_000)), 1100)

    def test_facts_follow_the_id_and_none_is_left_out(self) -> None:
        with kept_log() as kept:
            relay.log_event(logging.INFO, "id", "sent", request_id="r", size=5, other=None)
        self.assertEqual(kept.lines, [("INFO", "id sent request-id=r size=5")])

    def test_a_full_pipe_blocks_nobody_and_keeps_the_exit_status(self) -> None:
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

    def test_lines_are_whole_have_a_zone_and_lost_ones_are_counted(self) -> None:
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
                relay.log.error("%s broken", "id", exc_info=True)
            relay.log_event(logging.INFO, "id", "last")
        relay.log.setLevel("DEBUG")
        when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"
        self.assertRegex(err.getvalue(), rf"\A{when} ERROR id broken\nTraceback (?s:.*)\n"
                                         rf"OSError: why\n{when} INFO id last\n\Z")
        self.assertEqual(err.getvalue().count("Traceback"), 1)


class ThreadTests(HangCase):
    """Calls run in idle threads where there are some, and in as many as it takes."""

    def test_threads_are_used_again_and_end_when_they_are_idle(self) -> None:
        gate, seen = threading.Event(), set()

        def call(number: int) -> int:
            seen.add(threading.get_ident())
            gate.wait(PATIENCE)
            return number

        async def play(numbers: range) -> bool:
            return await asyncio.gather(*[
                relay.run_in_thread(functools.partial(call, one)) for one in numbers]) == [*numbers]
        with unittest.mock.patch.object(relay, "THREAD_IDLE_TIMEOUT", 0.2), \
                concurrent.futures.ThreadPoolExecutor(4) as loops:
            first = loops.submit(asyncio.run, play(range(50)))
            wait_for(lambda: len(seen) == 50)           # none waits for another
            gate.set()
            rounds = [loops.submit(asyncio.run, play(range(10))) for _ in range(300)]
            self.assertTrue(all(one.result() for one in (first, *rounds)))
            self.assertLess(len(seen), 300)             # of 3,050 calls, 40 at once
            # The system gives the number of a thread that has ended to another one.
            wait_for(lambda: not any(one.name == "relay-call" and one.ident in seen
                                     for one in threading.enumerate()))


class HttpsTests(HangCase):
    """Microsoft over TLS: verified, kept, and through a proxy."""

    @classmethod
    def setUpClass(cls) -> None:
        """Trust the CA of the tests as an admin would: SSL_CERT_FILE."""
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
        """Connect to a relay with an environment."""
        change = unittest.mock.patch.dict(os.environ, variables)
        change.start()
        self.addCleanup(change.stop)
        running = Running(self.config(**{"UPSTREAM_TIMEOUT": "10", **settings}))
        self.addCleanup(running.stop)
        return self.connect(running)

    def test_messages_and_uploads_over_https(self) -> None:
        client = self.logged_in()
        for _ in range(3):
            self.assertReply(client.post(), "250 2.0.0")
        self.assertEqual(len({request.connection for request in self.fake.requests}), 1)
        # An upload goes to the host that Graph names.
        self.assertReply(client.post_octets(LARGE, SENDER, ["a@x.y"]), "250 2.0.0")
        self.assertTrue(self.fake.sent_drafts[0].files[0][1] == SCAN_OCTETS)
        self.assertEqual({request.headers["host"].partition(":")[0]
                          for request in self.fake.asked("put")}, {"127.0.0.1"})
        # Plain http is refused here, for this machine too.
        url = self.fake.url.replace("https:", "http:")
        self.fake.will("open", say(201, {"uploadUrl": f"{url}/upload/0?authtoken=a%2Fb"}))
        self.assertReply(client.post_octets(LARGE, SENDER, ["a@x.y"]), "451 4.4.1")
        self.assertEqual(len(self.fake.deleted), 1)

    def test_what_cannot_be_reached(self) -> None:
        """The device is told to try again, and the log says why."""
        proxy = Between(self, "")
        for variables, authority, problem in (
                ({"SSL_CERT_FILE": FILES["expired.pem"]}, self.fake.url,
                 "CERTIFICATE_VERIFY_FAILED"),
                ({}, f"http://127.0.0.1:{free_port()}", "refused"),
                ({"HTTPS_PROXY": f"127.0.0.1:{proxy.port}"},    # and a URL without a port
                 "https://login.microsoftonline.com", "407")):
            with self.subTest(problem), kept_log() as kept:
                client = self.with_environ(variables, AZURE_AUTHORITY_HOST=authority)
                self.assertReply(client.log_in(), "454 4.7.0")
                self.assertIn(problem, kept.find("auth")[0][1])
        self.assertEqual(self.fake.requests, [])
        self.assertEqual(proxy.asked, [("login.microsoftonline.com:443", "")])

    def test_a_url_without_a_port(self) -> None:
        asked = []

        def look_up(host: str, port: int, *_: Any) -> None:
            asked.append((host, port))
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
            self.assertEqual(asked.pop(), wanted)

    def test_a_machine_that_has_no_more_threads(self) -> None:
        start, client = threading.Thread.start, self.connect()

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "relay-call":
                raise RuntimeError("can't start new thread")
            start(thread)
        with unittest.mock.patch.object(threading.Thread, "start", refuse), \
                unittest.mock.patch.object(relay, "_idle", threading.Semaphore(0)):
            self.assertReply(client.log_in(password=self.password), "454 4.7.0")
        self.assertReply(client.log_in(password=self.password), "235 2.7.0")

    def test_the_proxy_is_used_with_its_credentials(self) -> None:
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
                self.assertEqual(proxy.asked, [])       # the connection was kept
        # NO_PROXY counts.
        dead = "http://127.0.0.1:9"
        client = self.with_environ({"HTTPS_PROXY": dead,
                                    "NO_PROXY": self.fake.url.partition("//")[2]})
        self.assertReply(client.log_in(), "235 2.7.0")
        # This machine over http needs none.
        with alone() as (fake, _):
            client = self.with_environ({"http_proxy": dead, "https_proxy": dead, "NO_PROXY": ""},
                                       AZURE_AUTHORITY_HOST=fake.url)
            self.assertReply(client.log_in(), "235 2.7.0")

    def test_what_hangs_before_the_request_is_sent(self) -> None:
        """In connect(), in the handshake, or at the proxy."""
        port, begun = int(self.fake.url.rpartition(":")[2]), {}

        def begin(kind: str, way: str, **settings: str) -> None:
            client = self.with_environ({}, UPSTREAM_TIMEOUT=str(SHORT), **settings)
            if kind == "send":
                self.assertReply(client.log_in(password=self.password), "235 2.7.0")
            begun[kind, way] = (Waiting(client, login_line()) if kind == "token" else
                                begin_message(client, SIMPLE))
        for way in ("half", "trickle"):
            proxy = Between(self, way)
            with unittest.mock.patch.dict(
                    os.environ, HTTPS_PROXY=f"http://a:b@127.0.0.1:{proxy.port}"):
                begin("token", f"proxy, {way}")
                wait_for(functools.partial(getattr, proxy, "asked"))
        # Where a full backlog hangs; elsewhere it refuses.
        for way in ("full",) * (sys.platform == "linux") + ("silent", "half", "trickle"):
            for kind, name in (("token", "AZURE_AUTHORITY_HOST"), ("send", "GRAPH_ENDPOINT")):
                begin(kind, way, **{name: f"https://localhost:{Between(self, way, port).port}"})
        for (kind, way), waiting in begun.items():
            with self.subTest(kind, way=way):
                self.assertTimely(waiting, "454 4.7.0" if kind == "token" else "451 4.4.1")
        self.assertEqual(self.fake.asked("send"), [])
        wait_for(lambda: not calls_under_way())     # the gates still hang


@unittest.mock.patch.object(relay, "GRACE", HANGING)    # only the thread keeps its deadline
class HangTests(HangCase):
    """Microsoft stops answering, anywhere."""

    # All stops for a login and a message, for the others only some.
    cases = [(kind, where) for kind in STOPPED_KINDS for where in STOPS
             if where in ("before the headers", "in the body") or kind in ("token", "send")
             or (kind, where) in (("put", "half of the request"), ("imds", "in the headers"))]

    def test_what_who_waits_hears_and_when(self) -> None:
        """One after the other comes to its stop, as all at once might be late; then all wait."""
        plays = {}
        # Those with files first: they have more time, so that they come to their stop.
        for kind, where in sorted(self.cases, key=lambda case: -self.time_of(case[0])):
            fake, running = self.beside(UPSTREAM_TIMEOUT=str(self.time_of(kind)))
            plays[kind, where] = fake, running, stop_at(fake, self.connect(running), kind, where)
        for (kind, where), (fake, running, waiting) in plays.items():
            with self.subTest(kind, where=where):
                wanted = "454 4.7.0" if STOPPED_KINDS[kind][0] is None else "451 4.4.1"
                if kind.startswith("send") and "body" in where:     # the status is known
                    wanted = "452 4.2.2" if "after" in where else "550 5.7.1"
                self.assertTimely(waiting, wanted, self.time_of(kind))
                # What may have been obeyed is not asked again; nothing went out later.
                self.assertEqual(len(fake.asked(kind)), 1)
                self.assertEqual((fake.delivered, fake.drafts), ([], {}))
                self.assertEqual(len(fake.deleted), int(
                    kind in ("attach", "open", "put", "send-draft")))
                self.served(running, "secret")      # on another connection

    @staticmethod
    def time_of(kind: str) -> float:
        """UPSTREAM_TIMEOUT for a stop."""
        return 2 * SHORT if STOPPED_KINDS[kind][0] == TWO_FILES else SHORT

    def test_others_notice_nothing_and_the_relay_stops(self) -> None:
        """All of it at once, for as long as it takes to look at others."""
        fake, running = self.beside(UPSTREAM_TIMEOUT="3600", SHUTDOWN_TIMEOUT="0.1")
        waiting = {f"{kind} {where}": stop_at(
            fake, self.connect(running), kind, where, password=f"{kind} {where}",
            sender=f"{number}@example.com") for number, (kind, where) in enumerate(self.cases)
            if kind != "imds"}              # all who look into the table need its token
        for number in range(relay.REQUESTS_AT_ONCE):
            waiting[f"turn {number}"] = stop_at(
                fake, self.connect(running), "send", "before the headers",
                password=f"turn {number}", sender="turn@example.com")
        before = len(fake.asked("send"))
        waiting["fifth"] = begin_message(
            self.logged_in(running=running), SIMPLE, "turn@example.com")
        self.served(running, "secret")
        self.served(running, "another", "1@example.com", TWO_FILES)
        self.assertEqual(self.connect(running).log_in(LOOK_UP_USER)[:9], "235 2.7.0")
        self.assertEqual(len(fake.asked("send")), before + 1)
        self.assertEqual([name for name, one in waiting.items() if not one.is_waiting], [])
        begun = time.monotonic()
        running.stop()
        self.assertLess(time.monotonic() - begun, PATIENCE)
        self.assertEqual({name: one.hear()[:9] for name, one in waiting.items()},
                         dict.fromkeys(waiting, "421 4.3.2"))
        # Who is cancelled cuts off its exchange.
        wait_for(lambda: not calls_under_way())
        self.assertTrue(+fake._busy, "the calls ended only because the stand-in did")

    @unittest.mock.patch.object(relay, "DISCARD_TIMEOUT", HANGING)
    def test_who_waits_for_a_turn(self) -> None:
        fake, running = self.beside()
        clients = [self.logged_in(running=running)
                   for _ in range(relay.REQUESTS_AT_ONCE + 1)]
        # The drafts cannot be deleted either: so the turns are taken until the release.
        fake.will("attach", *[fake.hang] * relay.REQUESTS_AT_ONCE)
        fake.will("delete", *[fake.hang] * relay.REQUESTS_AT_ONCE)
        waiting = []
        for client in clients[:-1]:
            waiting.append(begin_message(client, TWO_FILES))
            wait_for(lambda: len(fake.asked("attach")) == len(waiting))
        fifth = begin_message(clients[-1], SIMPLE)
        self.served(running, "secret")
        # It gives up a little earlier: a turn at the last moment would be of no use.
        self.assertTimely(fifth, "451 4.4.5", SHORT * (1 - relay.MIN_TIME_LEFT))
        self.assertTrue(all(one.is_waiting for one in waiting))
        fake.release.set()
        for one in waiting:
            self.assertEqual(one.hear()[:9], "451 4.4.1")
        self.assertEqual([one.mailbox for one in fake.delivered], ["other@example.com"])
        self.assertEqual(len(fake.asked("send")), 1)
        self.served(running, "secret", SENDER)      # the turns are there again


MEDIUM = crlf(multipart("mixed", PLAIN, scan(2_500_000)[0], header=NAMED))      # no upload


class SlowWorkTests(HangCase):
    """A machine that is too slow for a message."""

    def test_what_who_waits_hears_and_when(self) -> None:
        """While it is read, while a file is put into a request, or a piece of it is."""
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
            for one, wanted in zip(waiting, ("451 4.3.0", "451 4.4.1", "451 4.4.1")):
                self.assertTimely(one, wanted)
            self.assertEqual(len(fake.deleted), 2)
            wait_for(lambda: calls_under_way() == 3)   # those that deleted have ended
        self.assertEqual([fake.asked(kind) for kind in ("send", "attach", "put")], [[], [], []])


class LookUpTests(HangCase):
    """The system does not say where Microsoft is."""

    MANY = 60           # more than any default pool has threads

    def test_many_look_ups_hang_and_others_are_served(self) -> None:
        fake, running = self.beside("AZURE_AUTHORITY_HOST")
        self.served(running, "known")
        clients = [self.connect(running) for _ in range(self.MANY)]
        fake.drop_connections()
        with stuck_look_ups() as look_ups:
            waiting = [Waiting(client, login_line(password=f"secret {number}"))
                       for number, client in enumerate(clients)]
            look_ups.wait(self.MANY)
            self.served(running, "known")           # all hang still, and will until released
            for one in waiting:
                self.assertTimely(one, "454 4.7.0")
            self.served(running, "known")
            wait_for(lambda: calls_under_way() == self.MANY)
            asked = len(fake.requests)
        wait_for(lambda: not calls_under_way())
        self.assertEqual(len(fake.requests), asked)     # nothing was sent later
        self.assertEqual(clients[0].log_in()[:9], "235 2.7.0")

    def test_a_message_is_not_kept_while_its_look_up_hangs(self) -> None:
        """Only its thread is, and not even until the garbage collector comes: the client has
        its answer, and sends it again.
        """
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        fake, running = self.beside("GRAPH_ENDPOINT")
        clients = [self.logged_in(running=running) for _ in range(2)]
        with stuck_look_ups() as look_ups:
            waiting = [begin_message(client, message, f"{len(message)}@example.com")
                       for client, message in zip(clients, (BULKY, TWO_FILES))]
            look_ups.wait(2)
            for one in waiting:
                self.assertTimely(one, "451 4.4.1")
            held = (relay.HttpRequest, relay.EditedMessage, relay.Draft, relay.Attachment)
            wait_for(lambda: not any(isinstance(one, held) for one in gc.get_objects()))
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
            said = wait_for_line(process, "stopped") + process.stderr.read()
            self.assertNotIn("Traceback", said)
            self.assertReply(waiting.hear(), "421 4.3.2")


# AADSTS number, HTTP status, error, a word of the remedy.
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
# What says nothing of the password.
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
    *(response(200, {"access_token": one}) for one in ("", None, 5, "a b", "a\r\nX: y")),
    response(200, b'{"access_token": "abc'), response(200, b"[" * 100_000),
    response(200, b"\xff\xfe"), response(201, {"access_token": "abc"}),
    response(302, b"", location="https://elsewhere.example"),
)


class SignInTests(RelayCase):
    """A login is a request for a token."""

    settings = UNHURRIED

    def test_good_logins(self) -> None:
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

    def test_a_domain_and_the_tenants_id_are_one_tenant(self) -> None:
        """Once a token has said so; what says nothing does no harm."""
        def jwt(claims: Any) -> str:
            payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode()
            return f"e30.{payload.rstrip('=')}.signature"
        good = jwt({"tid": TENANT.upper()})
        for tenant, token, wanted, requests in (
                ("one.example", good, TENANT, 1), (TENANT, "", TENANT, 0),
                ("one.example", "", TENANT, 0), (CLIENT, good, CLIENT, 1),    # never for an ID
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

    def test_a_malformed_name_is_refused_without_asking(self) -> None:
        for user, password, has_hint in (("scanner", "x", True), ("", "x", True),
                                         (f"{TENANT}@lookup", "x", False), (USER, "", False)):
            reply = self.assertReply(self.log_in(user, password), "535 5.7.8")
            self.assertEqual("TENANT@CLIENT" in reply, has_hint)
        self.assertEqual(self.fake.requests, [])

    def test_each_refusal_of_entra(self) -> None:
        """The reply says the number and what to do."""
        for number, (code, status, error, word) in enumerate(REFUSALS):
            with self.subTest(word), kept_log() as kept:
                is_odd = not 0 < code < 10 ** 9
                answer = aadsts(code, error)
                if is_odd:
                    answer["error_description"] = "odd"
                self.fake.will("token", say(status, answer))
                reply = self.assertReply(self.log_in(password=f"{self.password} {number}"),
                                         "535 5.7.8")
                self.assertIn(word, reply)
                self.assertEqual(reply.startswith(f"535 5.7.8 AADSTS{code}: "), not is_odd)
                self.assertEqual(f" aadsts={code} " in kept.find("auth")[0][1], not is_odd)

    def test_each_passing_failure_of_entra(self) -> None:
        """What says nothing of the password, and what is no answer."""
        for octets in (b"", b"HTTP/1.1", b"nonsense\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n",
                       b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{\"acc",
                       b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                       b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
                       b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
                       b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"[" * 100_000,
                       b"\x16\x03\x01\0\0", *TRANSIENT):
            with self.subTest(str(octets)[:60]), kept_log() as kept:
                self.fake.will("token", utter(octets) if isinstance(octets, bytes) else say(
                    octets.status, octets.body, **octets.headers))
                self.assertReply(self.log_in(), "454 4.7.0")
                line = kept.find("auth")[0][1]
                self.assertIn("result=tempfail", line)
                self.assertEqual('said="Too Many Requests"' in line, octets is TRANSIENT[0])
                if octets in TRANSIENT and octets.status == 200:
                    self.assertNotIn("said=", line)

    def test_no_secret_is_held_when_a_login_has_failed(self) -> None:
        """Not even until the garbage collector comes, nor by a refusal that is remembered."""
        client = self.connect()
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        self.fake.will("token", say(503), utter(b""), say(401, aadsts(7000215, "invalid_client")))
        for wanted in ("454 4.7.0", "454 4.7.0", "535 5.7.8", "535 5.7.8"):
            self.assertReply(client.log_in(password=self.password), wanted)
            wait_for(lambda: not [one for one in gc.get_objects() if isinstance(
                one, relay.Application) and one.secret == self.password])
        self.assertEqual(len(self.fake.asked("token")), 3)

    def test_one_request_serves_all_who_need_the_same(self) -> None:
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

    def test_a_wrong_secret_never_meets_the_token_of_another(self) -> None:
        self.assertReply(self.log_in(), "235 2.7.0")
        self.fake.will("token", say(401, aadsts(7000215, "invalid_client")))
        self.assertReply(self.log_in(password=self.password + "x"), "535 5.7.8")
        self.assertReply(self.log_in(f"{CLIENT}@{CLIENT}"), "235 2.7.0")
        self.assertReply(self.log_in(f"{TENANT}@{TENANT}"), "235 2.7.0")
        self.assertEqual(len(self.fake.asked("token")), 4)
        self.fake.will("token", say(503))           # a passing failure is not remembered
        self.assertReply(self.log_in(password="other"), "454 4.7.0")
        self.assertReply(self.log_in(password="other"), "235 2.7.0")

    def test_the_log_of_a_login(self) -> None:
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
        self.assertEqual([one[0] for one in kept.find("auth")], ["WARNING", "INFO", "INFO"])
        self.assertNotIn("secret", malformed[1])
        for hidden in (self.password, plain(USER, self.password).decode(), "token-"):
            self.assertNotIn(hidden, repr(kept.lines))


class CacheTests(RelayCase):
    """Tokens and refusals are kept for their time, and not too many of them."""

    def tokens(self) -> tuple[relay.Tokens, Clock]:
        clock = Clock()
        pool = relay.HttpPool([self.fake.url])
        self.addCleanup(pool.close)
        return relay.Tokens(self.config(), pool, clock), clock

    def get(self, tokens: relay.Tokens, secret: str, resource: str = "") -> str:
        return asyncio.run(tokens.get(relay.Application(TENANT, CLIENT, secret),
                                      time.monotonic() + PATIENCE, resource))

    def test_how_long_answers_are_kept(self) -> None:
        """A token until five minutes before its end, a refusal for 30 seconds."""
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
            found = {self.get(tokens, "s"), self.get(tokens, "s", vault)}
            self.assertEqual(found & {token, other}, left)

    def test_the_hash_of_a_secret_is_keyed(self) -> None:
        (tokens, _), (others, _) = self.tokens(), self.tokens()
        one = relay.Application(TENANT, CLIENT, "s")
        keys = {tokens._key(one, "r"), others._key(one, "r"), tokens._key(
            dataclasses.replace(one, credential="managed-identity"), "r")}
        self.assertEqual(len(keys), 3)

    def test_a_cache(self) -> None:
        clock = Clock()
        cache: relay.Cache[int, str] = relay.Cache(clock)
        cache.put(1, "a", 10.0)
        self.assertEqual((cache.get(1), cache.get(2)), ("a", None))
        clock.now += 10.0
        self.assertIsNone(cache.get(1))
        for number in (*range(relay.MAX_CACHED + 10), 10, 2000):    # what is put again is new
            cache.put(number, str(number), 10.0)
        self.assertEqual([cache.get(number) for number in (9, 10, 11, 12, 2000)],
                         [None, "10", None, "12", "2000"])


class IdentityTests(RelayCase):
    """Who the relay is to Azure, facts 6; asked here for a token of Graph."""

    def ask(self, resource: Any = "", timeout: Any = PATIENCE, **settings: str) -> str:
        """Ask for a token of `resource` as the relay; returns it."""
        config = self.config(**{"AZURE_POD_IDENTITY_AUTHORITY_HOST": self.fake.url, **settings})
        with contextlib.closing(relay.HttpPool(config.endpoints)) as pool:
            return asyncio.run(relay.Tokens(config, pool).get(
                relay.relay_identity(config), time.monotonic() + timeout, resource))

    def failure(self, **settings: Any) -> str:
        """Ask in vain; returns what the log says of it."""
        with self.assertRaises(relay.TemporaryError) as caught:
            self.ask(**settings)
        return relay.format_fields(caught.exception.facts)

    def form(self) -> dict[str, str]:
        """The fields of the last request for a token."""
        return self.fake.asked("token")[-1].form

    def test_a_secret_comes_first(self) -> None:
        self.ask(AZURE_TENANT_ID=TENANT, AZURE_CLIENT_ID=CLIENT, AZURE_CLIENT_SECRET="s&",
                 AZURE_FEDERATED_TOKEN_FILE="/t", IDENTITY_ENDPOINT=f"{self.fake.url}/msi/token",
                 IDENTITY_HEADER="header", resource="https://vault.azure.net")
        self.assertEqual(self.form(), {"client_id": CLIENT, "client_secret": "s&",
                                       "scope": "https://vault.azure.net/.default",
                                       "grant_type": "client_credentials"})

    def test_a_workload_identity(self) -> None:
        path = FILES.write("federated", "eyJ.assertion.1\n")
        settings = {"AZURE_TENANT_ID": TENANT, "AZURE_CLIENT_ID": CLIENT,
                    "AZURE_FEDERATED_TOKEN_FILE": path,
                    "IDENTITY_ENDPOINT": f"{self.fake.url}/msi/token", "IDENTITY_HEADER": "h"}
        self.ask(**settings)
        self.assertEqual(self.form(), {
            "client_id": CLIENT, "client_assertion": "eyJ.assertion.1",
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "scope": f"{self.fake.url}/.default", "grant_type": "client_credentials"})
        FILES.write("federated", "eyJ.assertion.2")         # Kubernetes renews it
        self.ask(**settings)
        self.assertEqual(self.form()["client_assertion"], "eyJ.assertion.2")
        self.fake.will("token", say(401, aadsts(700024, "invalid_client", "eyJ.assertion.2!")))
        self.assertNotIn("assertion", self.failure(**settings))
        for text in ("", "two\nlines", "\x80"):
            FILES.write("federated", text)
            self.assertIn(f"{path}: must hold one line of", self.failure(**settings))
        settings["AZURE_FEDERATED_TOKEN_FILE"] = path = FILES["fifo"]
        self.assertIn("No such file", self.failure(**settings))
        os.mkfifo(path)                         # a file that hangs, as one far away may
        self.addCleanup(os.close, os.open(path, os.O_RDWR))
        self.assertIn(f"{path}: time is up", self.failure(timeout=0.2, **settings))

    def test_app_service_and_container_apps(self) -> None:
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

    def test_imds(self) -> None:
        for alone in ({"IDENTITY_HEADER": "header"}, {"IDENTITY_ENDPOINT": "http://127.0.0.1:1"}):
            self.ask(AZURE_CLIENT_ID=CLIENT, **alone)       # this is not App Service
            request = self.fake.asked("imds").pop()
            self.assertEqual(
                request.path, "/metadata/identity/oauth2/token?api-version=2018-02-01"
                f"&resource={urllib.parse.quote(self.fake.url, safe='')}&client_id={CLIENT}")
            self.assertNotIn("content-length", request.headers)
        self.assertEqual([one.kind for one in self.fake.requests], ["imds"] * 2)

    @unittest.mock.patch.object(relay, "IDENTITY_TIMEOUT", relay.IDENTITY_TIMEOUT)
    @unittest.mock.patch.object(relay, "IDENTITY_RETRY_DELAYS", (0.0,) * 5)
    def test_imds_that_fails(self) -> None:
        self.fake.will("imds", say(404), say(410), say(429), say(500, b"<html>"))
        self.ask()
        self.assertEqual(len(self.fake.asked("imds")), 5)
        relay.IDENTITY_RETRY_DELAYS = (PATIENCE,) * 5     # but not if there is no time for it
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

    def test_no_proxy_for_what_is_near(self) -> None:
        """Nothing listens at the proxy: who asks it gets no answer."""
        with at_environ(HTTP_PROXY="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1",
                        HTTPS_PROXY="http://127.0.0.1:1", NO_PROXY=""):
            self.ask()
            self.ask(IDENTITY_ENDPOINT=f"{self.fake.url}/msi/token", IDENTITY_HEADER="header")


class AccountLoginTests(AccountCase):
    """A device logs in with a short name."""

    def test_a_short_name_and_a_short_password(self) -> None:
        running = self.another()
        for name in ("scan2", "SCAN2", "scan2@lookup", "Scan2@lookup.local"):
            with self.subTest(name):
                self.assertReply(self.logged_in_as(name, running=running).post(), "250 2.0.0")
        request, = self.fake.asked("token")
        self.assertEqual(request.form["client_secret"], "secret of the relay")
        self.assertEqual(request.path, f"/{TENANT}/oauth2/v2.0/token")
        self.assertEqual({one.mailbox for one in self.fake.delivered}, {"scanner@example.com"})

    def test_the_password_may_be_the_secret(self) -> None:
        client = self.logged_in_as("own.secret", self.password)
        self.assertEqual(self.fake.asked("token")[0].form["client_secret"], self.password)
        self.assertReply(client.post(sender="a@b.c"), "550 5.7.1")
        self.assertReply(client.post(), "250 2.0.0")

    def test_what_is_wrong_is_told_to_the_log_alone(self) -> None:
        """And each login costs as much, whether there is such an account or not."""
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
    def test_networks(self) -> None:
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

    def test_it_sends_as_its_mailbox_and_keeps_the_name(self) -> None:
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
            self.assertIn("as scanner@example.com", self.assertReply(reply, "552 5.3.4"))

    def test_nobody_else_gets_it_even_if_the_header_says_so(self) -> None:
        running = self.another(HEADER_RECIPIENTS="keep")
        for user, whom, reply in (("scan2", ["a@x.y"], "550 5.7.1"),
                                  (USER, ["a@x.y", "o@evil.example"], "250 2.0.0")):
            client = self.logged_in_as(user, running=running)
            self.assertReply(client.post(recipients=("o@evil.example",), sender="any@b.c"), reply)
            client.say("RSET")
            self.assertReply(client.post(b"To: a@x.y, o@evil.example\r\n\r\nText\r\n"), "250 2.0.0")
            self.assertEqual(sorted(self.fake.delivered[-1].recipients), whom)

    def test_a_sender_that_only_the_header_names(self) -> None:
        """With MAIL FROM:<> and SENDER_FROM=header allowed_senders are about From alone."""
        by_header = self.another(SENDER_FROM="header")
        for running, sender in ((self.running, ""), (by_header, "root@printer.local")):
            client = self.logged_in_as("own.secret", self.password, running)
            for name, reply in (("boss@b.c", "550 5.7.1"), ("a@example.com", "250 2.0.0")):
                message = f"From: {name}\r\nTo: a@x.y\r\n\r\nText\r\n".encode()
                self.assertReply(client.post(message, sender=sender), reply)
        self.assertEqual(len(self.fake.delivered), 2)

    def test_allow_lists(self) -> None:
        for running, wanted in (
                (self.another(ACCOUNTS_REQUIRED="true"),
                 {USER: "535 5.7.8", "scan2": "235 2.7.0"}),
                (self.with_accounts(f"[{USER}]\n{APPLICATION}", ACCOUNTS_REQUIRED="true"),
                 {USER: "235 2.7.0"}),
                (self.another(ALLOWED_TENANTS=f"contoso.com, {TENANT}"),
                 {USER: "235 2.7.0", f"Contoso.com@{CLIENT}": "235 2.7.0", "scan2": "235 2.7.0",
                  f"{CLIENT}@{CLIENT}": "535 5.7.8 This tenant may not log in here, see ALLOWED"})):
            for user, reply in wanted.items():
                with self.subTest(user), kept_log() as kept:
                    said = self.log_in(user, running=running)
                    self.assertTrue(said.startswith(reply), said)
                    self.assertEqual("Only accounts that the relay knows" in str(kept.lines),
                                     reply == "535 5.7.8")

    @needs_loopbacks
    def test_the_relays_own_secret_is_no_fault_of_the_device(self) -> None:
        running = self.another()
        self.fake.will("token", *[say(401, aadsts(7000222, "invalid_client"))] * 2)
        with kept_log() as kept:
            reply = self.log_in("scan2", running=running)
        self.assertIn("AADSTS7000222", self.assertReply(reply, "454 4.7.0"))
        self.assertEqual(kept.find("auth")[0][0], "ERROR")
        self.assertNotIn("secret of the relay", str(kept.lines))
        client = self.come_from("127.0.0.2", running)           # without login
        self.assertIn("AADSTS7000222", self.assertReply(client.post(), "451 4.7.0"))
        self.assertReply(client.say("NOOP"), "250 2.0.0")       # it may go on

    def test_an_account_without_any_secret(self) -> None:
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

    def test_without_scrypt_in_this_python(self) -> None:
        self.addCleanup(relay.has_scrypt.cache_clear)
        relay.has_scrypt.cache_clear()
        with hashed_passwords() as scrypt:
            scrypt.side_effect = ValueError("disabled for FIPS")
            _, faults = relay.parse_accounts(ACCOUNTS, make_config())
            self.assertIn("[scan2] password = ***: must be empty, as this Python has no scrypt",
                          faults)
            running = self.with_accounts(f"[a]\n{APPLICATION}")
            self.assertReply(self.log_in("none", "x", running), "535 5.7.8")
            self.assertReply(self.log_in("a", self.password, running), "235 2.7.0")

    @needs_loopbacks
    def test_a_login_where_none_is_needed(self) -> None:
        with kept_log() as kept:
            client = self.come_from("127.0.0.2")
            self.assertReply(client.log_in("printer", "x"), "535 5.7.8")
            self.assertReply(client.post(), "250 2.0.0")
            self.fake.will("token", say(503))
            self.assertReply(self.come_from("127.0.0.2").log_in(USER, "x"), "454 4.7.0")
        line, passing = kept.find("auth")
        self.assertIn("client=127.0.0.2", line[1])
        self.assertIn("from here no login is needed", line[1])
        self.assertNotIn("remedy", passing[1])

    @needs_loopbacks
    def test_what_is_allowed_without_login(self) -> None:
        client = self.connect(self.with_accounts(
            f"[a]\n{APPLICATION}client_secret = s\nlogin = optional\nnetworks = 127.0.0.0/8\n"
            "from_email = scanner@b.c\nallowed_senders = example.com\nallowed_recipients = x.y\n"))
        self.assertReply(client.post(sender="a@b.c"), "550 5.7.1")
        self.assertReply(client.post(recipients=("a@b.c",)), "550 5.7.1")
        client.say("RSET")
        self.assertReply(client.post(), "250 2.0.0")
        self.assertEqual(self.fake.delivered[0].mailbox, "scanner@b.c")

    @needs_loopbacks
    def test_two_that_are_refused_by_one_answer_are_told_apart_in_the_log(self) -> None:
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

    def test_passwords_are_checked_two_at_once(self) -> None:
        """While both are busy others wait, the loop goes on, and who gives up costs nothing."""
        running = self.another(UPSTREAM_TIMEOUT="1.5")
        places = running.relay.directory._scrypt
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
    """Who guesses passwords is slowed down, and shut out for a while."""

    @unittest.mock.patch.object(relay, "FAILURE_DELAY", 0.5)
    def test_the_pauses_and_the_end(self) -> None:
        clock = Clock()
        failures = relay.LoginLimiter(clock)
        one, other = map(relay.parse_address, ("192.0.2.1", "192.0.2.2"))
        pauses = []
        for _ in range(10):
            failures.check(one)
            pauses.append(failures.add(one))
            clock.now += 1
        self.assertEqual(pauses, [0.5 * number for number in range(1, 11)])
        with self.assertRaises(relay.TooManyFailures) as caught:
            failures.check(one)
        self.assertTrue(caught.exception.reply.close)
        failures.check(other)
        clock.now += 600 - 10 + 0.5         # the first is forgotten
        failures.check(one)
        self.assertEqual(failures.add(one), 5.0)
        clock.now += 10_000
        self.assertEqual(failures.add(one), 0.5)
        for number in range(10):            # who has an IPv6 address has a whole network
            failures.add(relay.parse_address(f"2001:db8::{number}"))
        failures.check(relay.parse_address("2001:db8:0:1::1"))
        with self.assertRaises(relay.TooManyFailures):
            failures.check(relay.parse_address("2001:db8::1:2:3:4"))

    @needs_loopbacks
    def test_who_guesses_at_once_learns_nothing(self) -> None:
        """Ten guesses are judged; the right one behind them is answered as the wrong ones."""
        clients = [self.come_from("127.0.0.8") for _ in range(40)]
        lines = [f"AUTH PLAIN {plain('scan2', password).decode()}\r\n".encode()
                 for password in ["wrong"] * 39 + [PASSWORD]]
        self.running.ask(lambda: None)      # or epoll may name the last connection first
        for client, line in zip(clients, lines):
            client.sock.sendall(line)
        replies = [client.next_reply() for client in clients]
        self.assertLessEqual(sum(reply.startswith("535") for reply in replies), 12)
        self.assertReply(replies[-1], "421 4.7.0")
        self.assertGreater(len([one for one in replies if one == replies[-1]]), 25)

    @needs_loopbacks
    def test_a_right_secret_behind_too_many_wrong_ones(self) -> None:
        failures, address = self.running.relay.directory.failures, "127.0.0.10"
        self.fake.will("token", self.fake.hang_then(self.fake.accept))
        client = self.come_from(address)
        client.putcmd(f"AUTH PLAIN {plain(USER, self.password).decode()}")
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        for _ in range(10):
            self.running.ask(functools.partial(failures.add, relay.parse_address(address)))
        self.fake.release.set()
        self.assertReply(client.next_reply(), "421 4.7.0")

    @needs_loopbacks
    def test_too_many_failures(self) -> None:
        begun = time.monotonic()
        with unittest.mock.patch.object(relay, "FAILURE_DELAY", 0.5):
            self.assertReply(self.log_in("scan2", "wrong"), "535 5.7.8")
        self.assertGreater(time.monotonic() - begun, 0.5)
        for _ in range(10):
            self.assertReply(self.come_from("127.0.0.9").log_in("scan2", "wrong"), "535 5.7.8")
        for user in ("scan2", USER):
            client = self.come_from("127.0.0.9")
            self.assertReply(client.log_in(user, PASSWORD), "421 4.7.0")
            self.assertEqual(client.next_reply(), "")           # it is closed
        self.assertEqual(self.fake.requests, [])
        self.assertReply(self.log_in("scan2", PASSWORD), "235 2.7.0")


ACCOUNTS_POLL_INTERVAL = relay.ACCOUNTS_POLL_INTERVAL       # as it is; setUpModule makes it shorter


class ReloadTests(AccountCase):
    """The accounts may change while mail flows."""

    def setUp(self) -> None:
        """Have a file of one's own."""
        super().setUp()
        self.path = FILES.write(f"{self.id()}.ini", ACCOUNTS)
        self.running = self.another(ACCOUNTS_FILE=self.path)

    def write(self, text: str, name: str = "") -> None:
        """Replace a file at one stroke."""
        path = pathlib.Path(name or self.path)
        path.with_suffix(".new").write_text(text)
        os.replace(path.with_suffix(".new"), path)

    def loaded(self) -> relay.AccountsFile:
        """Read the file as a relay does, which looks at it only when asked to."""
        file = relay.AccountsFile(self.config(ACCOUNTS_FILE=self.path))
        file.load()
        return file

    def test_a_change_takes_effect_and_sessions_keep_their_account(self) -> None:
        client = self.logged_in_as("scan2")
        with kept_log() as kept:
            self.write(ACCOUNTS.replace("[scan2]", "[scan3]").replace("x.y", "z.z"))
            wait_for(lambda: kept.find("loaded=6"))
        self.assertReply(self.log_in("scan2"), "535 5.7.8")
        self.assertReply(self.log_in("scan3"), "235 2.7.0")
        self.assertReply(client.post(), "250 2.0.0")

    def test_a_faulty_version_is_reported_once_and_the_old_one_stays(self) -> None:
        with kept_log() as kept:
            for number in (1, 2):               # once for each time
                self.write(ACCOUNTS.replace("from_email", "form_email") + "[b]\nx = y\n")
                wait_for(lambda: str(kept.lines).count("[b] x: is no key") == number)  # noqa: B023
                self.write(ACCOUNTS.replace("[scan2]", f"[scan{number + 2}]"))
                wait_for(lambda: len(kept.find("loaded=6")) == number)      # noqa: B023
                faults = [level for level, text in kept.find("accounts")
                          if "[scan2] form_email: is no key" in text]
                self.assertEqual(faults, ["ERROR"] * number)
        self.assertReply(self.log_in("scan4"), "235 2.7.0")

    def test_what_cannot_be_read(self) -> None:
        with kept_log() as kept:
            os.unlink(self.path)
            wait_for(lambda: "No such file" in str(kept.lines))
            watched = self.running.relay.directory.file
            for _ in range(2):              # at the second look the first has ended
                self.running.ask(watched.ask)
                wait_for(lambda: not watched._wake.is_set())
            self.assertEqual(str(kept.lines).count("No such file"), 1)
            for octets, problem in ((b"[\xff]", "UTF-8"), (b"", "there is no account")):
                pathlib.Path(self.path).write_bytes(octets)
                wait_for(lambda: problem in str(kept.lines))    # noqa: B023
        self.assertReply(self.log_in("scan2"), "235 2.7.0")

    def test_a_secret_in_a_file_of_its_own(self) -> None:
        secret = FILES.write("graph-secret", "first~secret\n")
        with kept_log() as kept:
            self.write(ACCOUNTS.replace("client_secret = secret of the relay",
                                        f"client_secret_file = {secret}"))
            wait_for(lambda: kept.find("loaded=6"))
            self.assertReply(self.log_in("scan2"), "235 2.7.0")
            self.write("second~secret\n", secret)
            wait_for(lambda: len(kept.find("loaded=6")) == 2)
            os.unlink(secret)
            wait_for(lambda: "client_secret_file" in str(kept.lines))
        self.assertReply(self.log_in("scan2"), "235 2.7.0")
        self.assertEqual([one.form["client_secret"] for one in self.fake.asked("token")],
                         ["first~secret", "second~secret"])

    def test_faulty_files(self) -> None:
        secret = FILES.write("faulty-secret", "")
        for name, octets, word in (
                (secret, b"", "one line"), (secret, b"a\nb", "one line"),
                (secret, b"\xff", "one line"), (FILES["none"], b"", "No such file"),
                (FILES.folder, b"", "Is a directory"),
                ("a\0b", b"", "client_secret_file = a\0b: ")):
            self.write(f"[a]\n{APPLICATION}client_secret_file = {name}\npassword = {HASH}\n")
            pathlib.Path(secret).write_bytes(octets)
            file = relay.AccountsFile(self.config(ACCOUNTS_FILE=self.path))
            for load in (file.load, lambda: file._poll(False)):     # noqa: B023
                with self.subTest(word), self.assertRaises(relay.ConfigError) as caught:
                    load()
                    file._poll(False)       # the first one has only looked
                self.assertIn(word, str(caught.exception))

    def test_what_is_a_change(self) -> None:
        """Time, size and file, each alone; it is read at the second poll that sees it the
        same, whatever the clock says, and once.
        """
        path, file = pathlib.Path(self.path), self.loaded()
        self.assertLess(2.5 * ACCOUNTS_POLL_INTERVAL, 10)       # seconds, says the README
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
        for text in (ACCOUNTS[:300], f"{ACCOUNTS}[new]\n"):     # half of a file is not read
            self.write(text)
            self.assertFalse(file._poll(False))
        self.assertTrue(file._poll(False))
        self.assertEqual(len(list(file.accounts)), 7)
        self.write(ACCOUNTS)
        self.assertTrue(file._poll(True))           # on SIGHUP at once

    def test_what_fails_for_a_moment_is_tried_again(self) -> None:
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

    def test_nothing_ends_the_watch(self) -> None:
        """Whatever goes wrong once, the next change is seen."""
        watched = self.running.relay.directory.file
        for trap in (MemoryError("hidden"), relay.TemporaryError("x"), ValueError("hidden")):
            with kept_log() as kept, unittest.mock.patch.object(watched, "load", side_effect=trap):
                self.running.ask(watched.ask)
                wait_for(lambda: [one for one in kept.find("accounts") if one[0] == "ERROR"])
            self.assertNotIn("hidden", str(kept.lines))
        with kept_log() as kept:
            self.write(f"{ACCOUNTS}[new]\n")
            wait_for(lambda: kept.find("loaded=7"))


@unittest.mock.patch.object(relay, "AZURE_RETRY_DELAYS", (0.0, 0.0))
class TableTests(RelayCase):
    """Accounts in an Azure table, facts 7."""

    settings = UNHURRIED

    @classmethod
    def config(cls, **settings: str) -> relay.Config:
        """Settings with a table, read with a managed identity."""
        return super().config(**{
            "AZURE_TABLES_URL": f"{cls.fake.url}/account/users",
            "AZURE_POD_IDENTITY_AUTHORITY_HOST": cls.fake.url, **settings})

    def setUp(self) -> None:
        """Have entries, and a relay that remembers none."""
        super().setUp()
        entry = {"tenant_id": TENANT, "client_id": CLIENT}
        self.fake.entities = dict.fromkeys(ODD_NAMES, entry)
        self.fake.entities["app1"] = {**entry, "from_email": "app1@example.com"}
        self.running = self.another()

    def test_a_name_of_the_table(self) -> None:
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

    def test_odd_names_are_data(self) -> None:
        for names, reply, requests in (
                (ODD_NAMES, "235 2.7.0", 1), (("none", "' or 'a' eq 'a", "APP1"), "535 5.7.8", 1),
                (("a/b", "a\\b", "a#b", "a?b", "x" * 513, "\u0085"), "535 5.7.8", 0)):
            for name in names:
                with self.subTest(name):
                    before = len(self.fake.asked("table"))
                    self.assertReply(self.log_in(f"{name}@lookup"), reply)
                    self.assertEqual(len(self.fake.asked("table")) - before, requests)

    def test_answers_are_remembered_for_a_minute(self) -> None:
        self.running.relay.directory.table._found._clock = clock = Clock()
        for pause, requests in ((0, 2), (0, 2), (59, 2), (2, 4)):
            clock.now += pause
            self.assertReply(self.log_in("app1@lookup"), "235 2.7.0")
            self.assertReply(self.log_in("none@lookup"), "535 5.7.8")
            self.assertEqual(len(self.fake.asked("table")), requests)

    def test_a_table_that_cannot_be_read_is_no_wrong_password(self) -> None:
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

    def test_what_passes_is_tried_again(self) -> None:
        self.fake.will("table", say(503), say(500), say(401))
        self.assertReply(self.log_in("app1@lookup"), "235 2.7.0")
        self.assertEqual(len(self.fake.asked("imds")), 2)       # the token is another one
        for name, status in zip(ODD_NAMES, (429, 500, 502, 503, 504)):
            self.fake.will("table", say(status))
            self.assertReply(self.log_in(f"{name}@lookup"), "235 2.7.0")
        relay.AZURE_RETRY_DELAYS = (PATIENCE, PATIENCE)       # but not if there is no time for it
        self.fake.will("table", say(503))
        with kept_log() as kept:
            self.assertReply(self.log_in("late@lookup"), "454 4.7.0")
        self.assertIn("status=503", kept.find("auth")[0][1])

    def test_neither_secret_nor_sas_is_logged(self) -> None:
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
        self.assertIn("own credential is refused", reply)
        self.assertNotIn("hid", str(kept.lines))
        request = self.fake.asked("table")[0]
        self.assertTrue(request.path.endswith(f"&{sas}"))
        self.assertNotIn("authorization", request.headers)      # it needs no identity
        self.assertEqual(self.fake.asked("imds"), [])

    def test_an_allow_list(self) -> None:
        # Without it a direct login goes on beside the table, and does not ask it.
        self.assertReply(self.log_in(f"{CLIENT}@{CLIENT}"), "235 2.7.0")
        self.assertEqual(self.fake.asked("table"), [])
        self.fake.entities = {"x": self.fake.entities["app1"]}
        for setting in ("AZURE_TABLES_FORCE_USAGE", "ACCOUNTS_REQUIRED"):
            with self.subTest(setting), kept_log() as kept:
                own = self.another(**{setting: "true"})
                self.fake.reset()
                client = self.logged_in(running=own)
                self.assertNotIn("account=", str(kept.lines))       # it has no name
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
        by_filter, by_key = (urllib.parse.unquote(one.path) for one in self.fake.asked("table"))
        self.assertIn("(PartitionKey='o''p q',RowKey='app1')", by_key)
        self.assertIn("(PartitionKey eq 'o''p q') and ", by_filter)

    def test_the_file_is_asked_first(self) -> None:
        path = FILES.write("first.ini", f"[App1]\n{APPLICATION}from_email = file@example.com\n")
        own = self.another(ACCOUNTS_FILE=path)
        self.assertReply(self.logged_in("app1@lookup", running=own).post(), "250 2.0.0")
        self.assertEqual(self.fake.delivered[0].mailbox, "file@example.com")
        self.assertEqual(self.fake.asked("table"), [])
        self.assertReply(self.log_in("a.b@lookup", running=own), "235 2.7.0")

    def test_ids_in_the_table_may_be_written_as_devices_may(self) -> None:
        tenant = "aaaaaaaa-1111-4111-8111-111111111111"
        own = self.another(ACCOUNTS_REQUIRED="true")
        for form, user in ((tenant, ""), (tenant.upper(), ""), (relay.encode_uuid(tenant), ""),
                           (f" {tenant}\n", "x@lookup")):
            client = CLIENT[:-1] + str(len(self.fake.asked("table")))
            self.fake.entities = {"x": {"tenant_id": form, "client_id": client}}
            self.assertReply(self.log_in(user or f"{tenant}@{client}", running=own), "235 2.7.0")

    def test_table_and_entra_share_the_time_of_a_login(self) -> None:
        own = self.another(AZURE_TABLES_URL=f"{self.fake.url}/account/users?sig=x")
        pool = own.relay._pool
        with unittest.mock.patch.object(pool, "send", wraps=pool.send) as send:
            self.assertReply(self.log_in("app1@lookup", running=own), "235 2.7.0")
        self.assertEqual([one.kind for one in self.fake.requests], ["table", "token"])
        first, second = send.call_args_list
        self.assertEqual(first.args[1], second.args[1])

    def test_the_start_tries_the_table(self) -> None:
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
    """250 means that Graph said 202, and nothing else does."""

    settings = UNHURRIED

    def test_a_message_goes_out_as_it_came(self) -> None:
        message = (b"From: Scan <scanner@example.com>\r\nTo: a@x.y\r\nSubject:  odd \t x\r\n"
                   b"\r\n.dot\r\n..\r\nna\xefve\0\r\n" + b"x" * 5000 + b"\r\n")
        with kept_log() as kept:
            reply = self.assertReply(self.logged_in().post(message), "250 2.0.0")
        request, = self.fake.asked("send")
        delivered, = self.fake.delivered
        self.assertEqual(delivered, Delivered(SENDER, message, ["a@x.y"]))
        self.assertEqual(request.path, "/v1.0/users/scanner%40example.com/sendMail")
        self.assertNotIn(b"\n", request.body)
        ident = request.headers["client-request-id"]
        self.assertEqual(reply, f"250 2.0.0 Accepted by Microsoft 365, id {ident}")
        (level, line), = kept.find("sent")
        self.assertEqual(level, "INFO")
        self.assertRegex(line, rf"^{ident} sent session=[0-9a-f]{{8}} sender={SENDER} "
                               rf"recipients=1 size={len(message)} "
                               r"request-id=graph-request-1 seconds=\d+\.\d{3}$")

    def test_whose_mailbox_it_is(self) -> None:
        """The sender's, encoded whole; with the null reverse-path that of From."""
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
    def test_each_answer_of_graph(self) -> None:
        client = self.logged_in()
        for status, code, wanted in GraphAnswerTests.TABLE:
            with self.subTest(f"{status} {code}"), kept_log() as kept:
                self.fake.will("send", graph_says(status, code) if code else
                               say(status, b"" if status == 204 else b"<html>oops"))
                self.open_lines()
                reply = self.assertReply(client.post(), wanted)
                ident = self.fake.asked("send")[-1].headers["client-request-id"]
                self.assertTrue(reply.endswith(f", id {ident}"))
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

    def test_broken_answers(self) -> None:
        """A status counts, whatever becomes of the body; what is broken before is no answer."""
        client, head = self.logged_in(), b"HTTP/1.1 403 No\r\n"
        cases = [(octets, "451 4.4.1") for octets in (
            b"", b"HTTP/1.1", b"nonsense\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 103 Early\r\n\r\n", head + b"X: " + b"y" * 70_000,
            head + b"X: y\r\n" * 200 + b"\r\n")]
        cases += [(b"HTTP/1.1 %d No\r\n%b" % (status, rest), wanted)
                  for status, wanted in ((413, "552 5.3.4"), (403, "550 5.7.1"), (500, "451 4.3.0"))
                  for rest in (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                               b"Content-Length: 50\r\n\r\n{", b"Connection: close\r\n\r\n<html>")]
        cases += [(octets, "250 2.0.0") for octets in (
            b"HTTP/1.1 202 Accepted\r\n", b"HTTP/1.1 202\r\n",
            b"HTTP/1.1 202 Accepted\r\nContent-Length: 50\r\n\r\nabc",
            b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 202 Accepted\r\nContent-Length: -5\r\n\r\n",
            b"HTTP/1.1 202 Accepted\r\n\x00\xff broken\r\n\r\n",
            b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\nHTTP/1.1 202 Accepted\r\n",
            b"HTTP/1.1 202 Accepted\r\nRetry-After: 9\r\n\r\n")]
        for octets, wanted in cases:
            for reset in (False, True):
                with self.subTest(octets[:60], reset=reset):
                    before = len(self.fake.asked("send"))
                    self.fake.will("send", utter(octets, reset=reset))
                    reply = client.post()
                    # A reset may take the status line with it, before it is read.
                    if not reset or not reply.startswith("451 4.4.1"):
                        self.assertReply(reply, wanted)
                    self.assertEqual(len(self.fake.asked("send")), before + 1)
                    # Or the next message might meet the end of this connection.
                    number = self.fake.asked("send")[-1].connection
                    wait_for(lambda: number in self.fake.closed)    # noqa: B023

    def test_after_a_broken_body_nothing_else_is_read_from_there(self) -> None:
        """What comes late would be taken for the answer to another message."""
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

    def test_a_202_of_which_the_rest_hangs(self) -> None:
        """It is not waited for, whatever its form."""
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
    def test_what_is_tried_again(self) -> None:
        """Only what cannot send a message twice."""
        date = email.utils.formatdate(time.time() + 1, usegmt=True)
        unauthorized = graph_says(401, "ErrorAccessDenied")     # of 401 no code counts
        self.assertEqual(relay.DEFAULT_RETRY_DELAY, 5)
        # The pause if Microsoft says none, answers, reply, requests to send and for tokens.
        for pause, answers, wanted, sends, tokens in (
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
                relay.DEFAULT_RETRY_DELAY = pause
                self.fake.will("send", *answers)
                begun = time.monotonic()
                self.assertReply(self.logged_in().post(), wanted)
                self.assertLess(time.monotonic() - begun, PATIENCE / 2)
                if (sends, tokens) == (2, 1):
                    self.assertGreaterEqual(time.monotonic() - begun, 0.2)
                self.assertEqual([len(self.fake.asked(one)) for one in ("send", "token")],
                                 [sends, tokens])
                self.assertEqual(len(self.fake.delivered), wanted == "250 2.0.0")

    def test_a_session_outlives_its_token_until_a_renewal_is_refused(self) -> None:
        self.fake.will("token", say(200, {"access_token": "short", "expires_in": 300}))
        client = self.logged_in()
        self.assertReply(client.post(), "250 2.0.0")
        self.assertEqual(len(self.fake.asked("token")), 2)
        refused = say(401, aadsts(7000222, "invalid_client"))
        for answer, wanted in ((say(503), "451 4.7.0"), (refused, "421 4.7.0")):
            self.assertReply(client.post(), "250 2.0.0")
            self.fake.will("send", self.fake.expire)
            self.fake.will("token", answer)
            self.assertReply(client.post(), wanted)
        self.assertEqual(client.next_reply(), "")
        self.assertIn("AADSTS7000222", self.assertReply(
            self.connect().log_in(password=self.password), "535 5.7.8"))

    def test_a_429_is_for_all_of_its_mailbox_and_for_no_other(self) -> None:
        """Nobody tries in turn: who waits is told at once, and who comes later too."""
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

    def test_a_burst_is_carried_by_waiting(self) -> None:
        """Microsoft takes 8 messages, then none for half a second, and so on; that begins
        when somebody asks, as a slow machine might not do so before its end.
        """
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
            return [client.post(f"Subject: {number}.{index}\r\n\r\n".encode())
                    for index in range(5)]
        self.fake.will("send", *[limit] * 1000)
        replies = at_once(send, {str(number): (number,) for number in range(8)})
        for reply in itertools.chain.from_iterable(replies.values()):
            self.assertReply(reply, "250 2.0.0")
        self.assertEqual(len({one.message for one in self.fake.delivered}), 40)
        self.assertEqual(len(self.fake.delivered), 40)
        # Each time those on their way are told, and then nobody asks until it is open.
        self.assertLessEqual(len(refused), 4 * 5)
        self.assertGreater(len(refused), 0)

    @unittest.mock.patch.object(relay, "DEFAULT_RETRY_DELAY", 99.0)
    def test_the_longest_pause_counts_and_has_an_end(self) -> None:
        """For a message that waits already, too, and whatever Microsoft says."""
        for longest in ("99", "999999999"):
            self.open_lines()
            self.fake.reset()
            clients = [self.begun() for _ in range(3)]
            for client, pause in zip(clients, ("1", longest, "0")):
                self.fake.will("send", self.fake.hang_then(
                    graph_says(429, "X", retry_after=pause)))
                client.send(pause.encode() + b"\r\n.\r\n")
                self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
            self.fake.release.set()
            for client in clients:
                self.assertReply(client.next_reply(), "451 4.4.5")
            self.assertReply(self.logged_in().post(), "451 4.4.5")
            self.assertEqual(len(self.fake.asked("send")), 3)
            self.assertLessEqual(self.running.ask(lambda: self.running.relay._graph.throttled_for(
                (TENANT, CLIENT, SENDER))), 1800)

    def test_a_connection_that_is_idle_for_long_is_closed(self) -> None:
        with unittest.mock.patch.object(relay, "KEEPALIVE_TIMEOUT", 0.1):
            client = self.logged_in()
            wait_for(lambda: self.fake.requests[0].connection in self.fake.closed)
        self.assertReply(client.post(), "250 2.0.0")

    def test_a_connection_that_is_closed_while_a_request_is_written(self) -> None:
        """Nothing can have happened: so it is sent again, if the connection was a kept one."""
        client = self.logged_in()
        for times, wanted in ((2, "451 4.4.1"), (1, "250 2.0.0")):
            # So that one is kept, for which the system does not take 4 MB at once yet.
            self.assertReply(client.post(), "250 2.0.0")
            self.fake.requests.clear()
            self.fake.will("send", *[BeforeBody(utter(b"", reset=True))] * times)
            self.assertReply(client.post(BULKY + b"%d" % times), wanted)
            self.assertEqual(len(self.fake.asked("send")), 2)

    def test_two_that_wait_for_one_token_hear_their_own_id(self) -> None:
        clients = [self.logged_in() for _ in range(2)]
        self.running.ask(self.running.relay._tokens._answers._values.clear)
        self.fake.will("token", self.fake.hang_then(say(503)))
        waiting = [begin_message(client, SIMPLE) for client in clients]
        free = self.running._config.max_memory_for_messages - 2 * len(SIMPLE)
        wait_for(lambda: self.running.ask(lambda: self.running.relay.memory.free <= free))
        self.fake.release.set()
        idents = [re.findall(", id [0-9a-f-]{36}", self.assertReply(one.hear(), "451 4.7.0"))
                  for one in waiting]
        self.assertEqual([len(found) for found in idents], [1, 1])

    def test_an_early_answer_counts_although_the_request_is_not_taken(self) -> None:
        """And there is no second request, on a connection that was kept too."""
        client = self.logged_in()
        for status, wanted in ((413, "552 5.3.4"), (202, "250 2.0.0")):
            with self.subTest(status):
                self.assertReply(client.post(), "250 2.0.0")        # so that one is kept
                before = len(self.fake.asked("send"))
                self.fake.will("send", BeforeBody(utter(
                    b"HTTP/1.1 %d Early\r\nContent-Length: 0\r\n\r\n" % status)))
                reply = client.post(BULKY)
                if reply.startswith("451 4.4.1"):
                    self.skipTest("the kernel threw the answer away when it reset")
                self.assertReply(reply, wanted)
                self.assertEqual(len(self.fake.asked("send")), before + 1)

    def test_four_at_once_for_a_mailbox_and_the_others_wait(self) -> None:
        self.fake.will("send", *[self.fake.hang_then(self.fake.accept)] * 4)
        messages = [begin_message(self.logged_in(), b"", sender)
                    for sender in (SENDER, SENDER.title()) * 5]     # the same mailbox
        for _ in range(4):
            self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        # Waiting holds no thread.
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

    def test_a_kept_connection_is_looked_at_before_it_is_written_to(self) -> None:
        """It is closed, or the server will send no more, or sent what nobody asked for."""
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

    def test_an_error_body_that_takes_its_time_is_read(self) -> None:
        body = json.dumps({"error": {"code": "ErrorQuotaExceeded"}}).encode()

        def slow(sock: socket.socket, request: Request) -> bool:
            sock.sendall(b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n" % len(body))
            time.sleep(relay.ACCEPTED_BODY_TIMEOUT + 0.2)
            sock.sendall(body)
            return True
        self.fake.will("send", slow)
        self.assertReply(self.logged_in().post(), "452 4.2.2")

    def test_the_envelope_decides_who_gets_it(self) -> None:
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
                                 sorted(one.lower() for one in recipients))

    def test_what_comes_after_a_refused_message_is_another(self) -> None:
        client = self.logged_in()
        self.fake.will("send", graph_says(404, "ErrorInvalidUser"))
        self.assertReply(client.post(b"\r\nfirst\r\n", "b@x.y", ("b@x.y",)), "550 5.1.8")
        self.assertReply(client.post(b"\r\nsecond\r\n"), "250 2.0.0")
        self.assertEqual(self.fake.delivered, [Delivered(
            SENDER, b"From: scanner@example.com\r\nBcc: a@x.y\r\n\r\nsecond\r\n",
            ["a@x.y"])])


class LargeMessageTests(RelayCase):
    """What is too large for one request goes as a draft, whole or not at all."""

    settings = {"UPSTREAM_TIMEOUT": "30"}

    def post(self, client: Client, message: bytes = LARGE, *recipients: str) -> str:
        return client.post_octets(message, SENDER, recipients or ("a@x.y",))

    def test_a_scan(self) -> None:
        small, small_octets = scan(100_000, "image/tiff", "=?utf-8?B?w7w=?=.tif")
        image, image_octets = scan(3_130_000, "image/png", "logo.png")
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
        self.assertTrue([octets for _, octets in draft.files]
                        == [image_octets, small_octets, SCAN_OCTETS])
        self.assertEqual([request.kind for request in self.fake.requests],
                         ["token", "draft", "open", "put", "put", "attach", "open", "put",
                          "put", "send-draft"])
        self.assertEqual(self.fake.deleted, [])
        self.assertEqual({one.headers["user-agent"] for one in self.fake.requests},
                         {relay.USER_AGENT})
        # One id for all of it, but for the upload, which is another host's.
        ident = reply.rpartition(" ")[2]
        for request in self.fake.requests[1:]:
            self.assertEqual(request.headers.get("client-request-id"),
                             ident if request.kind != "put" else None)
        (_, line), = kept.find("sent")
        self.assertTrue(line.startswith(f"{ident} sent "))
        self.assertIn(f" size={len(message) + len('Bcc: h@x.y') + 2} attachments=3 ", line)

    def test_the_limits_of_one_request_and_of_an_upload_session_are_exact(self) -> None:
        client, head = self.logged_in(), crlf(NAMED + "Content-Type: text/plain\n\n")
        for size, *kinds in ((3_145_728, "send"), (3_145_729, "draft", "send-draft"),
                             (3_129_999, "draft", "attach", "send-draft"),
                             (3_130_000, "draft", "open", "put", "put", "send-draft")):
            self.fake.reset()
            file, octets = scan(size, name="\u20ac" * 250)
            is_file = len(kinds) > 2
            self.assertReply(self.post(client, crlf(multipart(
                "mixed", file, header=NAMED)) if is_file else
                head + b"x" * (size - len(head) - 2) + b"\r\n"), "250 2.0.0")
            self.assertEqual([one.kind for one in self.fake.requests if one.kind != "token"], kinds)
            if is_file:
                self.assertTrue(self.fake.sent_drafts[0].files[0][1] == octets)
            elif kinds == ["send"]:
                self.assertEqual(len(self.fake.requests[-1].body), 4_194_304)

    def test_pieces_in_which_there_is_nothing_are_not_sent(self) -> None:
        head, _, text = SCAN.partition("\n\n")
        message = crlf(multipart("mixed", f"{head}\n\n" + "\n" * 2_000_000 + text, header=NAMED))
        self.assertReply(self.post(self.logged_in(), message), "250 2.0.0")
        self.assertTrue(self.fake.sent_drafts[0].files[0][1] == SCAN_OCTETS)
        self.assertEqual(len(self.fake.asked("put")), 2)

    def test_a_long_text_that_comes_back_in_the_answer(self) -> None:
        for text in ("<\u00fc>" * 900_000, "<" * 3_200_000):
            self.fake.reset()
            message = crlf(NAMED + "Content-Type: text/html\n\n" + text + "\n")
            self.assertReply(self.post(self.logged_in(), message), "250 2.0.0")
            self.assertTrue(self.fake.sent_drafts[0].properties["body"]["content"] == text + "\r\n")

    def test_what_cannot_be_said_is_refused_and_nothing_is_asked(self) -> None:
        client = self.logged_in()
        message = crlf(multipart("signed", PLAIN, SCAN, header=NAMED))
        self.assertIn("is signed", self.assertReply(self.post(client, message), "552 5.3.4"))
        self.assertEqual([one.kind for one in self.fake.requests], ["token"])
        self.assertReply(client.post(), "250 2.0.0")

    def test_the_memory_of_a_client_that_is_gone(self) -> None:
        client, memory = self.begun(), self.running.server._relay.memory
        client.send(b"x" * 1000 + b"\r\nx")
        wait_for(lambda: memory.free < 268_435_456)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        wait_for(lambda: memory.free == 268_435_456)

    def test_too_little_memory_is_a_warning_and_a_mistake_of_the_client_is_not(self) -> None:
        client, memory = self.logged_in(), self.running.server._relay.memory
        self.running.ask(lambda: memory.take(268_435_456))
        self.addCleanup(self.running.ask, lambda: memory.take(-268_435_456))
        with kept_log() as kept:
            self.assertReply(client.say(f"MAIL FROM:<{SENDER}> SIZE=1"), "452 4.3.1")
            self.assertReply(client.say("MAIL FROM:<a>"), "501 5.1.7")
        self.assertEqual([level for level, _ in kept.find("refused")], ["WARNING", "INFO"])

    def test_what_is_sent_late_would_be_cut_off(self) -> None:
        """A tenth of UPSTREAM_TIMEOUT must be left, or the pause is too long."""
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
    relay, GRAPH_MESSAGE_LIMIT=31_457, LARGE_ATTACHMENT=31_300, UPLOAD_PIECE=39_322,
    MIN_RETRY_DELAY=0.01, DRAFT_RETRY_DELAYS=(0.01, 0.02))
class DraftFaultTests(RelayCase):
    """Each step of a large message may fail: what is answered, asked, deleted and logged."""

    settings = {"UPSTREAM_TIMEOUT": "30"}
    UPLOADED = scan(32_000)[0]          # two pieces
    MESSAGE = crlf(multipart("mixed", PLAIN, PDF, UPLOADED, header=NAMED))
    # In "open" these are no place for a file.
    BAD_URLS = ("http://outlook.office.com/x", "ftp://127.0.0.1/x", "//127.0.0.1/x", "", 5, None,
                "http://u:p@127.0.0.1/upload/0", "http://127.0.0.1:0/x", "http://127.0.0.1:99999/x",
                "http://127.0.0.1/a b", "http://127.0.0.1/\r\nX: y", "https://", "http://[::1",
                "https://\u00fc", "http://x/?authtoken=a%2Fb")
    # What comes of these answers, in these steps: reply, and requests of the step.
    TABLE: tuple[tuple[str, tuple[Action, ...], str, int], ...] = (
        ("draft attach open put send-draft", (graph_says(403, "ErrorQuotaExceeded"),),
         "452 4.2.2", 1),
        ("draft attach open put send-draft", (say(413),), "552 5.3.4 Microsoft", 1),
        ("draft attach open put send-draft", (say(500),), "451 4.3.0", 1),
        ("draft attach open put send-draft", (utter(b""),), "451 4.4.1", 1),
        ("draft attach open put send-draft", (say(429, retry_after="99"),), "451 4.4.5", 1),
        ("draft attach open send-draft", (graph_says(400, "BadRequest"),), "554 5.6.0", 1),
        ("draft attach open send-draft", (say(302),), "554 5.3.0", 1),
        ("send-draft", (say(200),), "554 5.3.0", 1),
        ("draft", (graph_says(404, "ErrorInvalidUser"),), "550 5.1.8", 1),
        # The upload is between Graph and Exchange, and has no token.
        ("put", (graph_says(400, "BadRequest"),), "451 4.3.0", 1),
        ("put", (say(302),), "451 4.3.0", 1), ("put", (say(401),), "451 4.3.0", 1),
        ("put", (say(404),), "451 4.3.0", 1),
        # A missing right; nothing is remembered.
        ("draft attach open", (graph_says(403, "ErrorAccessDenied"),),
         "552 5.3.4 The message is larger than 3 MB, and to send such as scanner@example.com "
         "the application needs the right Mail.ReadWrite", 1),
        ("send-draft", (graph_says(403, "ErrorAccessDenied"),), "550 5.7.1", 1),
        # A draft that not all servers know yet; the mailbox was there a moment ago.
        ("attach open send-draft", (NOT_FOUND, NOT_FOUND), "250 2.0.0", 3),
        ("attach open send-draft", (NOT_FOUND,) * 5, "451 4.3.0", 3),
        ("attach open send-draft", (graph_says(404, "ErrorInvalidUser"),) * 5, "451 4.3.0", 3),
        # Tried again, as it does no harm.
        ("draft attach open put send-draft", (SOON,), "250 2.0.0", 2),
        ("draft attach open put send-draft", (say(503, retry_after="0.1"),), "250 2.0.0", 2),
        # Garbage.
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

    def test_each_step(self) -> None:
        client = self.logged_in()
        with kept_log() as all_kept:
            for steps, answers, wanted, requests in self.TABLE:
                for step in steps.split():
                    with self.subTest(step, wanted=wanted), kept_log() as kept:
                        self.fake.reset()
                        self.fake.will(step, *answers)
                        self.assertTrue(self.post(client).startswith(f"{wanted} "), wanted)
                        is_sent = wanted == "250 2.0.0"
                        asked = self.fake.asked(step)
                        self.assertEqual(len(asked), requests + (is_sent and step == "put"))
                        self.assertEqual(len(self.fake.deleted), not is_sent and step != "draft")
                        self.assertEqual([one.sent for one in self.fake.drafts.values()],
                                         [True] * is_sent)
                        self.assertEqual(self.fake.asked("other"), [])
                        self.assertEqual(len(kept.find("sent")), is_sent)
                        self.assertEqual([f' reply="{wanted}' in line for _, line in
                                          kept.find("refused")], [True] * (not is_sent))
        shown = repr(all_kept.lines)
        for hidden in ("draft-left", "authtoken", "a%2Fb", self.password, "token-", "Hello",
                       "JVBER"):
            self.assertNotIn(hidden, shown)

    def test_other_statuses_of_success(self) -> None:
        self.fake.will("draft", say(200, {"id": "x"}))
        self.fake.will("attach", say(200, {"id": "x"}))
        self.fake.will("open", say(200, {"uploadUrl": self.fake.upload_url.format(0)}))
        self.fake.will("put", say(202), say(202))
        self.fake.will("send-draft", say(202))
        self.assertReply(self.post(self.logged_in()), "250 2.0.0")

    def test_a_new_token_in_each_step(self) -> None:
        for step in ("draft", "attach", "open", "send-draft", "delete"):
            with self.subTest(step):
                client = self.logged_in()
                self.fake.reset()
                self.fake.will(step, self.fake.expire)
                self.fake.will("put", *[say(500)] * (step == "delete"))
                self.assertReply(self.post(client), "451" if step == "delete" else "250")
                self.assertEqual([len(self.fake.asked(one)) for one in (step, "token")], [2, 1])

    def test_the_draft_is_deleted(self) -> None:
        client = self.logged_in()
        # The answers, and the requests, how many drafts are left, and what is logged.
        for answers, requests, left, logged in (
                ((), 1, 0, ""), ((NOT_FOUND,), 1, 1, ""),      # it was sent after all
                ((SOON, SOON), 3, 0, ""),
                ((say(500),), 1, 1, 'reply="451 4.3.0'), ((utter(b""),), 1, 1, 'reply="451 4.4.1'),
                ((graph_says(403, "ErrorAccessDenied"),), 1, 1, "Mail.ReadWrite")):
            with self.subTest(requests=requests, logged=logged), kept_log() as kept:
                self.fake.reset()
                self.fake.will("put", say(500))
                self.fake.will("delete", *answers)
                self.assertReply(self.post(client), "451 4.3.0")
                self.assertEqual(len(self.fake.asked("delete")), requests)
                self.assertEqual(len(self.fake.drafts), left)
                self.assertEqual([(level, logged in line) for level, line in
                                  kept.find("draft-left")], [("WARNING", True)] * bool(logged))

    def test_no_message_is_held_when_it_has_failed(self) -> None:
        """Not even until the garbage collector comes: it may not, for a long time."""
        client, large = self.logged_in(), self.MESSAGE
        signed = large.replace(b"multipart/mixed", b"multipart/signed")

        def held() -> list[object]:
            return [one for one in gc.get_objects() if isinstance(one, relay.HttpRequest)
                    or (isinstance(one, relay.Envelope) and one.message)]
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        for name, kind, action, message, wanted in (
                ("refused", "", None, signed, "552"), ("junk", "draft", utter(b"x"), large, "451"),
                ("error", "put", say(500), large, "451"),
                ("reset", "put", utter(b""), large, "451"),
                ("early reset", "put", BeforeBody(utter(b"", reset=True)), large, "451"),
                ("reset", "send", utter(b""), b"\r\n", "451"),
                ("error", "send", say(500), b"\r\n", "451"),
                ("renewal", "send", self.fake.expire, b"\r\n", "451"),
                ("sent", "", None, large, "250")):
            with self.subTest(name, kind=kind):
                self.fake.will(kind, *([action] if action else []))
                self.fake.will("token", *([say(503)] if name == "renewal" else []))
                self.assertEqual(client.post_octets(message, SENDER, ["a@x.y"])[:3], wanted)
                wait_for(lambda: not held())            # the reply comes a moment earlier
        self.assertEqual(self.running.ask(lambda: self.running.server._relay.memory.free),
                         268_435_456)

    def test_answers_about_an_upload(self) -> None:
        for url, is_good in (("https://outlook.office.com/a?b=c", True), ("https:///a", False),
                             ("http://127.0.0.1/a", True), ("http://10.0.0.1/a", False)):
            answer = response(201, {"uploadUrl": url})
            self.assertEqual(relay.parse_upload_url(answer), url * is_good)
        for ranges, wanted in ((["7"], 7), (["7-"], 7), (["7-9"], 7), ([7], 7), ([], None),
                               (["x"], None), ("7", None)):
            for name in ("NextExpectedRanges", "nextExpectedRanges"):
                self.assertEqual(relay.parse_next_range(response(200, {name: ranges})), wanted)
        self.assertIsNone(relay.parse_next_range(response(201)))


class SlowUploadTests(RelayCase):
    """UPSTREAM_TIMEOUT is the whole of an upload too."""

    def test_a_draft_is_not_sent_when_its_time_is_almost_over(self) -> None:
        """It would be cut off, and nobody would hear whether it was sent."""
        config = self.config(UPSTREAM_TIMEOUT="86400")      # of it a tenth must be left
        pool = relay.HttpPool([self.fake.url])
        graph = relay.GraphClient(config, pool, relay.Tokens(config, pool))
        envelope = relay.Envelope(SENDER, {"a@x.y": "a@x.y"}, bytearray(LARGE))
        draft = relay.prepare_message(envelope, config).draft
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
    """A mailbox has REQUESTS_AT_ONCE slots; none is lost, and none is made up."""

    @contextlib.asynccontextmanager
    async def full(self) -> AsyncIterator[relay.MailboxLimiter]:
        """A limiter with all slots in use."""
        limiter = relay.MailboxLimiter()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(relay.REQUESTS_AT_ONCE):
                await stack.enter_async_context(limiter.slot(0.0, is_live=True))
            yield limiter

    def test_first_come_first_served_and_the_queue_last(self) -> None:
        async def work(limiter: relay.MailboxLimiter, name: str, order: list[str]) -> None:
            async with limiter.slot(time.monotonic() + PATIENCE, is_live=name != "q"):
                order.append(name)

        async def play(cancelled: set[int]) -> str:
            order: list[str] = []
            async with self.full() as limiter:
                tasks = [asyncio.ensure_future(work(limiter, name, order)) for name in "1q23456"]
                await asyncio.sleep(0)
            # The first four have a slot, and do not know it yet.
            for number in cancelled:
                tasks[number].cancel()
            _, late = await asyncio.wait(tasks, timeout=PATIENCE / 2)
            self.assertEqual((late, limiter.in_use), (set(), 0))
            return "".join(order)
        for cancelled, order in ((set[int](), "123456q"), ({0}, "23456q"), ({0, 2, 3, 4}, "56q"),
                                 ({1}, "123456"), ({6}, "12345q")):
            with self.subTest(cancelled):
                self.assertEqual(asyncio.run(play(cancelled)), order)

    def test_a_message_that_gets_no_slot_is_not_held(self) -> None:
        """Not even until the garbage collector comes."""
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
            await asyncio.sleep(0)              # this step still has the future that ended
            return held() is not None
        gc.disable()
        self.addCleanup(gc.enable)
        self.assertFalse(asyncio.run(play()))

    def test_cancellations_and_time_outs(self) -> None:
        async def play() -> int:
            limiter, busy, most = relay.MailboxLimiter(), 0, 0
            chance = random.Random(7)

            async def worker() -> None:
                nonlocal busy, most
                with contextlib.suppress(relay.TemporaryError, asyncio.CancelledError):
                    async with limiter.slot(time.monotonic() + chance.random() / 50,
                                            is_live=chance.random() < 0.8):
                        busy += 1
                        most = max(most, busy)
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
            return most
        self.assertEqual(asyncio.run(play()), relay.REQUESTS_AT_ONCE)


class SpoolTests(SpoolCase):
    """What Microsoft cannot take now is on the disk before its client is told 250."""

    def test_a_message_is_queued_and_sent_later(self) -> None:
        client = self.log_in_to(self.start())
        self.be_down()
        with kept_log() as kept:
            reply = self.assertReply(self.post(client), "250 2.0.0")
            ident = re.fullmatch("250 2.0.0 Queued, id ([0-9a-f-]{36})", reply)[1]
            path, message = self.only()
            self.assertEqual((path.stem, message.recipients), (ident, ["a@x.y"]))
            for file in self.queue.iterdir():
                self.assertEqual(file.stat().st_mode & 0o777, 0o600)
                for hidden in (self.password.encode(), plain(USER, self.password), b"token-"):
                    self.assertNotIn(hidden, file.read_bytes())
            stored = path.with_suffix(".eml").read_bytes()
            wait_for(lambda: self.only()[1].attempts > 3)
            self.assertRegex(self.only()[1].reason, "^451 4.3.0 ")
            self.be_up()
            self.wait_until_empty()
        self.assertEqual([(one.recipients, one.message) for one in self.fake.delivered],
                         [(["a@x.y"], stored)])         # any mail program can open it
        self.assertEqual({one.headers["client-request-id"] for one in self.fake.asked("send")},
                         {ident})
        (level, line), = kept.find("queued")
        self.assertEqual((level, line.split()[0]), ("WARNING", ident))
        self.assertIn('reply="451 4.3.0', line)
        self.assertRegex(kept.find("sent")[0][1], rf"^{ident} sent sender={SENDER} recipients=1 "
                         rf"size=\d+ tries={len(self.fake.asked('send'))} "
                         r"request-id=graph-request-1 queued=\d")
        self.assertEqual(kept.find("delayed")[0][0], "WARNING")
        first, second = re.findall(r"again=([0-9.]+)", str(kept.find("delayed")))[:2]
        self.assertTrue(float(first) > 0.07 and float(second) > 0.13, (first, second))

    def test_it_goes_out_as_it_would_have_gone_at_first(self) -> None:
        client = self.log_in_to(self.start())
        message = b"Subject: s\r\nTo: a@x.y, other@x.y\r\n\r\nT\xc3\xa9xt\r\n..\r\n"
        big = crlf(multipart("mixed", PDF, SCAN, header=NAMED))
        for name, octets in (("small", message), ("no header", b"Time: 12:00\r\nText\r\n"),
                             ("big", big)):
            with self.subTest(name):
                self.fake.reset()
                self.assertReply(client.post_octets(octets, SENDER, ["a@x.y"]), "250 2.0.0")
                self.be_down(times=1)
                self.fake.will("draft", say(503))
                self.assertIn("Queued", client.post_octets(octets + b"\r\n", SENDER, ["a@x.y"]))
                self.wait_until_empty()
                if name == "big":
                    first, second = self.fake.sent_drafts
                    self.assertEqual((first.properties, first.files),
                                     (second.properties, second.files))
                else:
                    once, again = (one.message for one in self.fake.delivered)
                    self.assertEqual(once + b"\r\n", again)

    def test_what_is_queued_and_what_is_not(self) -> None:
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
        self.fake.will("send", self.fake.expire)            # the device must log in again
        self.fake.will("token", say(401, aadsts(7000222, "invalid_client")))
        self.assertReply(self.post(client, sender="s99@example.com"), "421 4.7.0")
        self.assertEqual(len(self.waiting()), 11)

    def test_each_change_is_on_the_disk_at_once(self) -> None:
        """Files, names, and in which order; power loss may come between any two."""
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
            (lambda: files.note(path, message), state),
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
        with self.assertRaises(FileNotFoundError):      # somebody deleted it meanwhile
            files.note(path, message)
        self.assertEqual(list(self.folder.glob("*/*")), [])

    def test_the_least_tried_first_then_the_oldest(self) -> None:
        """So two messages that always fail, the oldest, hold up no other."""
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
        relay.QueueFiles(running.relay.config).report(self.idents()[b"2"])     # spool retry
        self.wait_until_empty()
        self.assertEqual((self.subjects(), self.fake.most_busy), ([b"2", b"1", b"3"], 1))

    def test_retry_after_is_obeyed(self) -> None:
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
            wait_for(lambda: kept.find("delayed"))
            self.enqueue(client, "2")               # at once, without a request
        self.wait_until_empty()
        self.assertGreaterEqual(times[1] - times[0], 4)
        self.assertRegex(kept.find("delayed")[0][1], r"again=[1-4]\.")
        self.assertEqual(len(self.fake.asked("send")), 4)

    def test_live_traffic_comes_first_and_no_more_than_four(self) -> None:
        running = self.start(UPSTREAM_TIMEOUT="60")
        client = self.log_in_to(running)
        self.rest_long()
        self.be_down(times=1)
        self.enqueue(client, "spooled")
        may_end = threading.Semaphore(0)

        def accept(sock: socket.socket, request: Request) -> bool:
            may_end.acquire(timeout=PATIENCE)
            return self.fake.accept(sock, request)

        def wait_for_requests(begun: int, in_line: int) -> None:
            wait_for(lambda: len(self.fake.asked("send")) == begun)
            wait_for(lambda: running.waiting() == in_line)
        self.be_up(*[accept] * 7)
        messages = []
        for number in range(6):
            if number == 4:                     # what was spooled waits before the last two
                wait_for_requests(5, 0)
                call_main("spool", "retry", **self.settings_of())
                wait_for_requests(5, 1)
            messages.append(begin_message(self.log_in_to(running),
                                          b"Subject: %d\r\n\r\n" % number))
            if number >= 4:
                wait_for_requests(5, number - 2)
        for in_line in (3, 2, 1, 0):            # one ends, and the next one begins
            wait_for_requests(8 - in_line, in_line)
            may_end.release()
        may_end.release(3)
        for message in messages:
            self.assertReply(message.hear(), "250 2.0.0")
        wait_for(lambda: not self.waiting())
        self.assertEqual([re.search(rb"Subject: (\w+)", base64.b64decode(one.body))[1]
                          for one in self.fake.asked("send")[5:]], [b"4", b"5", b"spooled"])
        self.assertEqual(self.fake.most_busy, 4)

    def test_after_a_restart_it_waits_for_the_secret(self) -> None:
        running = self.start()
        self.be_down()
        self.enqueue(self.log_in_to(running))
        running.stop()
        self.be_up()
        asked = len(self.fake.asked("send"))
        with kept_log() as kept:
            running = self.start()
            wait_for(lambda: kept.find("delayed"))
            another = self.connect(running)             # another application does not help it
            another.log_in(f"{TENANT}@{TENANT}", self.password)
            self.assertReply(self.post(another, "other"), "250 2.0.0")
            self.assertEqual(len(self.fake.asked("send")), asked + 1)
            self.log_in_to(running)
            self.wait_until_empty()
        self.assertIn(f"waits until {USER} logs in", kept.find("delayed")[0][1])
        self.assertEqual(len(kept.find("delayed")), 1)
        self.assertEqual(self.subjects(), [b"other", b"s"])
        wait_for(lambda: not running.ask(lambda: running.relay.spool._applications))

    def test_a_secret_that_is_no_longer_accepted_is_forgotten(self) -> None:
        running = self.start()
        client = self.log_in_to(running)

        def expire(sock: socket.socket, request: Request) -> bool:
            self.rest_long()                    # a new secret ends the next pause
            return self.fake.expire(sock, request)
        self.fake.will("send", say(503), expire)
        self.fake.will("token", say(401, aadsts(7000222, "invalid_client")))
        self.enqueue(client)
        wait_for(lambda: "AADSTS7000222" in self.only()[1].reason)
        self.assertEqual(self.connect(running).log_in(password="the new one")[:3], "235")
        self.wait_until_empty()
        self.assertEqual(len(self.fake.delivered), 1)

    def test_a_message_in_flight_is_queued_when_the_relay_stops(self) -> None:
        """A slow disk is waited for, longer than for anything else."""
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

    def test_a_try_under_way_ends_before_the_relay_does(self) -> None:
        running = self.start(UPSTREAM_TIMEOUT="30")
        client = self.log_in_to(running)
        self.be_down(times=1)
        self.fake.will("send", self.fake.hang_then(self.fake.accept))
        self.enqueue(client)
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        client.close()                          # so that nothing else is under way
        running.begin_stop()
        wait_for(lambda: running.ask(lambda: running.relay.spool._is_stopping))
        self.fake.release.set()
        running.wait()
        self.assertEqual((len(self.fake.delivered), self.waiting()), (1, []))

    def test_what_was_sent_and_cannot_be_removed_is_not_sent_again(self) -> None:
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

    def test_a_full_memory_delays_it(self) -> None:
        """Half of it is for clients, if they can still send one of any size."""
        for spare, size in ((5_000_000, "1000000"), (1_000_000, "9000000")):
            with self.subTest(size), kept_log() as kept:
                running = self.start(UPSTREAM_TIMEOUT="3", MAX_MEMORY_FOR_MESSAGES="10000000",
                                     MAX_MESSAGE_SIZE=size)
                memory = running.relay.memory
                client = self.log_in_to(running)
                self.be_down()
                self.enqueue(client)
                left = spare + self.only()[1].size - 1      # a byte less than it needs
                running.ask(lambda: memory.take(10_000_000 - left))     # noqa: B023
                wait_for(lambda: running.ask(lambda: memory.free) == left)      # noqa: B023
                self.be_up()
                asked = len(self.fake.asked("send"))
                wait_for(lambda: "452 4.3.1" in str(kept.lines))
                self.assertEqual(len(self.fake.asked("send")), asked)
                running.ask(lambda: memory.take(-1))        # noqa: B023
                self.wait_until_empty()
                self.assertEqual(running.ask(lambda: memory.free), left + 1)    # noqa: B023
                running.stop()

    def test_a_clock_that_is_set(self) -> None:
        """No pause depends on it, and what seems too old is tried once more."""
        client = self.log_in_to(self.start())
        real = time.time
        for change in (10_000, -10 ** 8):
            self.be_down(times=1)
            with unittest.mock.patch.object(time, "time", lambda: real() + change):  # noqa: B023
                self.enqueue(client, f"{change}")
            self.wait_until_empty()
        self.assertEqual((len(self.fake.delivered), list(self.failed.iterdir())), (2, []))


class FailedTests(SpoolCase):
    """What is given up is kept, and its sender is told."""

    def test_a_restart_before_a_message_is_moved(self) -> None:
        """Its sender is told once."""
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

    def test_a_second_notice_takes_the_place_of_the_first(self) -> None:
        running, sizes = self.start(), []
        self.rest_long()
        spool = running.relay.spool
        for size in (11, 12):
            message = make_message(size=size, queued_at=time.time())
            asyncio.run_coroutine_threadsafe(
                spool.put(message, [b"x" * size]), running._loop).result(PATIENCE)
            sizes += [one.size for mailbox in spool._mailboxes.values()
                      for one in mailbox.messages.values()]
        self.assertEqual(sizes, [11, 12])

    def test_files_that_somebody_has_removed(self) -> None:
        running = self.start()
        self.be_down()
        self.enqueue(self.log_in_to(running))
        running.stop()
        with kept_log() as kept:
            self.start(SPOOL_LIFETIME="1")          # it waits for its secret
            for path in self.queue.iterdir():
                path.unlink()
            wait_for(lambda: kept.find("dropped"))
        self.assertEqual([level for level, _ in kept.lines if level == "ERROR"], [])

    def test_a_state_that_cannot_be_read_now(self) -> None:
        """It is neither forgotten nor set aside."""
        running = self.start()
        self.be_down()
        self.enqueue(self.log_in_to(running))
        path, files = self.only()[0], relay.QueueFiles(running._config)

        def fail(path: pathlib.Path) -> bytes:
            raise OSError(errno.EMFILE, "Too many open files")
        with kept_log() as kept, unittest.mock.patch.object(pathlib.Path, "read_bytes", fail):
            files.report(path.stem)
            wait_for(lambda: any("spool" in line for _, line in kept.lines))
            running.stop()
            with self.assertRaises(relay.StartError), contextlib.closing(files):
                files.open()
        self.assertEqual((self.waiting(), kept.find("dropped")), ([path.stem], []))

    def test_what_becomes_of_a_message_and_who_is_told(self) -> None:
        self.let("RECOUNT_INTERVAL", 0.0)
        running = self.start(SPOOL_MAX_BYTES="1000")        # a notice has no such limit
        client = self.log_in_to(running)
        right, mailbox = graph_says(403, "ErrorAccessDenied"), say(404)
        # The sender and what Microsoft says after 503; what is delivered, and what fails.
        cases: tuple[tuple[str, list[Action], list[bytes], int, str], ...] = (
            (SENDER, [say(400)], [b"Undelivered mail"], 1, "554 5.6.0"),
            (SENDER, [say(400), say(503), say(503)], [b"Undelivered mail"], 1, "554 5.6.0"),
            (SENDER, [say(400), say(400)], [], 2, "554 5.6.0"),         # no notice of a notice
            ("", [say(400)], [], 1, "554 5.6.0"),
            (SENDER, [right, right], [b"s"], 0, "550 5.7.1"),           # they may come yet
            (SENDER, [mailbox, mailbox], [b"s"], 0, "550 5.1.8"))
        for number, (sender, actions, delivered, failed, reply) in enumerate(cases):
            with self.subTest(number=number), kept_log() as kept:
                self.fake.reset()
                shutil.rmtree(self.failed, ignore_errors=True)      # as somebody may
                self.fake.will("send", say(503), *actions)
                self.assertIn("Queued", client.post(
                    b"From: Boss@example.com\r\nSubject: s\r\n\r\nText\r\n", sender=sender))
                self.wait_until_empty()
                wait_for(lambda: len(kept.find("failed")) == failed)    # noqa: B023
                self.assertEqual((self.subjects(), len(list(self.failed.glob("*.json")))),
                                 (delivered, failed))
                self.assertEqual({level for level, _ in kept.find("failed")},
                                 {"ERROR"} if failed else set())
                self.assertIn(f'reply="{reply}', str(kept.find("failed") or kept.find("delayed")))
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
        self.assertNotIn(b"Text", bounce.message)           # of the message

    def test_a_message_that_is_too_old(self) -> None:
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
        self.assertRegex(kept.find("failed")[0][1], "reply=.*1 seconds; at last: 550 5.1.8")
        self.assertIn(b"at last: 550 5.1.8", self.fake.delivered[-1].message)

    def refuse_bad(self, sock: socket.socket, request: Request) -> bool:
        """Action: refuse for good what is called so, but no notice of it."""
        message = base64.b64decode(request.body)
        is_bad = b"Subject: bad" in message and b"auto-replied" not in message
        return (say(400) if is_bad else self.fake.accept)(sock, request)

    def test_a_notice_that_cannot_be_stored(self) -> None:
        """The message waits until its sender can be told."""
        client = self.log_in_to(self.start())
        self.be_down()
        self.enqueue(client, "bad")
        with kept_log() as kept:
            with patient_for(MIN_FREE_DISK=10 ** 18):
                self.be_up(*[self.refuse_bad] * 1000)
                wait_for(lambda: kept.find("spool"))
                self.assertEqual((len(self.waiting()), list(self.failed.iterdir())), (1, []))
            self.wait_until_empty()
        self.assertIn("cannot be queued", kept.find("spool")[0][1])
        self.assertEqual(self.subjects(), [b"Undelivered mail"])

    def test_what_cannot_be_moved_holds_up_no_other(self) -> None:
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

    def test_a_message_that_is_too_old_and_whose_secret_is_not_known(self) -> None:
        running = self.start()
        self.be_down()
        self.assertIn("Queued", self.log_in_to(running).post(b"From: me@x.y\r\n\r\n", sender=""))
        running.stop()
        self.age(self.only()[0])
        self.start()
        self.wait_until_empty()
        self.assertRegex(self.only("failed")[1].reason, "^It could not be sent .* 451 4.3.0")


class FullSpoolTests(SpoolCase):
    """A queue that cannot take a message: 452, and nothing is half there."""

    def assertTakesNothing(self, client: Client, word: str) -> None:
        before = {path.stem for path in self.queue.glob("*")}
        with kept_log() as kept:
            self.assertReply(self.post(client, "refused"), "452 4.3.1")
        self.assertEqual({path.stem for path in self.queue.glob("*")}, before)
        level, line = kept.find("refused")[0]
        self.assertEqual(level, "ERROR")
        for part in (word, "status=503", "452 4.3.1"):      # and why it was to be queued at all
            self.assertIn(part, line)

    def test_max_bytes(self) -> None:
        self.let("RECOUNT_INTERVAL", 0.0)
        client = self.log_in_to(self.start(SPOOL_MAX_BYTES="1000"))
        self.be_down()
        self.enqueue(client, "one" * 300)
        self.assertTakesNothing(client, "SPOOL_MAX_BYTES")
        self.be_up()
        self.wait_until_empty()
        (self.failed / "x").write_bytes(b"x" * 1400)        # what has failed counts
        self.be_down()
        self.assertTakesNothing(client, "SPOOL_MAX_BYTES")
        (self.failed / "x").unlink()
        self.enqueue(client)

    def test_the_folder_is_not_counted_for_each_message(self) -> None:
        """That would take long where many wait."""
        running = self.start()
        client = self.log_in_to(running)
        self.be_down()
        self.rest_long()
        with unittest.mock.patch.object(pathlib.Path, "glob", autospec=True,
                                        side_effect=pathlib.Path.glob) as glob:
            self.enqueue(client, *"abc")
        self.assertEqual(glob.call_count, 1)
        self.assertGreaterEqual(running.relay.spool._files._used, sum(      # with the states
            path.stat().st_size for path in self.queue.iterdir()))

    def test_a_message_that_cannot_be_stored_is_not_held(self) -> None:
        spool = self.start(SPOOL_MAX_BYTES="1000").relay.spool

        class Octets(bytearray):
            pass

        async def put() -> Any:
            octets = Octets(5000)
            with self.assertRaises(relay.TemporaryError):
                await spool.put(make_message(size=5000), [memoryview(octets)])
            return weakref.ref(octets)
        gc.disable()
        self.addCleanup(gc.enable)
        held = asyncio.run(put())
        wait_for(lambda: held() is None, 2)

    def test_a_message_that_is_cut_off_while_it_is_stored(self) -> None:
        """Its client hears 421: so it must not stay."""
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

    def test_a_disk_that_is_full_or_gone_or_fails(self) -> None:
        self.assertEqual(relay.MIN_FREE_DISK, 64 * 1024 * 1024)
        client = self.log_in_to(self.start())
        self.be_down()
        for number in (errno.EIO, errno.ENOSPC):
            for name in ("file", "queue"):          # in which it is noticed

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

    def test_a_disk_that_hangs(self) -> None:
        client = self.log_in_to(self.start())
        self.be_down()
        release, hung = threading.Event(), []

        def hang(descriptor: int) -> None:
            hung.append(descriptor)
            release.wait(PATIENCE)
        with unittest.mock.patch.object(os, "fsync", hang):
            with patient_for(DISK_TIMEOUT=0.2, GRACE=0.05), kept_log() as kept:
                self.assertReply(self.post(client, "refused"), "452 4.3.1")
            self.assertIn("time is up", kept.find("refused")[0][1])
            with patient_for(DISK_TIMEOUT=3600.0):      # the next one need not wait
                self.assertTakesNothing(client, "the disk does not answer")
            self.assertEqual(len(hung), 1)
            release.set()                           # it comes late, and must not stay
            wait_for(lambda: not calls_under_way())
        self.assertEqual((list(self.queue.iterdir()), self.fake.delivered), ([], []))
        self.enqueue(client)


@unittest.skipUnless(hasattr(os, "mkfifo"), "needs a file that hangs")
class SlowDiskTests(HangCase):
    """Reading a file hangs, as on a disk that is not there: here it is a pipe."""

    def pipe(self, name: str) -> str:
        """Make a file that nobody can open until there is somebody who writes."""
        path = FILES[name]
        os.mkfifo(path)

        def is_read() -> bool:
            with contextlib.suppress(OSError):      # end a read, if there is one
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return not calls_under_way()

        def let_go() -> None:
            # Not at once: who opens it only later would find nobody.
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
            wait_for(is_read)
            os.unlink(path)
        self.addCleanup(let_go)
        return path

    def test_the_token_of_a_workload_identity(self) -> None:
        _, running = self.beside(AZURE_TENANT_ID=TENANT, AZURE_CLIENT_ID=CLIENT,
                                 AZURE_FEDERATED_TOKEN_FILE=self.pipe("token"))
        client = self.connect(running)
        with kept_log() as kept:
            waiting = Waiting(client, login_line(LOOK_UP_USER))
            self.served(running, "secret")
            self.assertTimely(waiting, "454 4.7.0")
        self.assertIn(f"{FILES['token']}: time is up",
                      "".join(text for _, text in kept.find("result=tempfail")))

    def test_the_accounts_file(self) -> None:
        """The accounts from before stay in force, and the relay can be stopped."""
        path = FILES.write("slow.ini", f"[a]\n{APPLICATION}\n")
        _, running = self.beside(ACCOUNTS_FILE=path)
        os.unlink(path)
        self.pipe("slow.ini")
        wait_for(calls_under_way)
        running.ask(running.relay.directory.file.ask)
        self.served(running, "secret")
        running.stop()


class SpoolAccountTests(SpoolCase, AccountCase):
    """Accounts of ACCOUNTS_FILE need nobody's login."""

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

    def test_a_tenant_that_is_given_as_a_domain(self) -> None:
        """That its ID becomes known changes neither its queue nor what is a duplicate."""
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
        mailbox, = running.relay.spool._mailboxes.values()
        self.assertGreater(mailbox.resume_at, time.monotonic() + 900)
        self.assertEqual(self.only()[1].tenant, "one.example")

    def test_after_a_restart_it_is_sent(self) -> None:
        """The oldest first; and one that is too old is tried once more."""
        for is_old in (False, True):
            running = self.start()
            client = self.log_in_to(running)
            self.be_down()
            self.rest_long()                    # a restart ends a pause
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
        self.assertEqual({one.mailbox for one in self.fake.delivered}, {"scan@example.com"})
        self.assertEqual(len(self.fake.delivered), 10)
        self.assertEqual(list(self.failed.iterdir()), [])

    def test_it_logs_in_and_sends_while_microsoft_is_down(self) -> None:
        running = self.start()
        self.fake.will("token", *[say(503)] * 1000)
        self.enqueue(self.log_in_to(running))
        other = self.connect(running)               # who this is only Microsoft knows
        self.assertReply(other.log_in(password=self.password), "454 4.7.0")
        self.assertReply(self.connect(running).log_in("scanner8", "wrong"), "535 5.7.8")
        self.be_up()
        self.wait_until_empty()

    def test_who_gets_the_notice(self) -> None:
        """from_email says who, but not whether."""
        client = self.log_in_to(self.start())
        for sender, wanted in (("", ""), (SENDER, "scan@example.com")):
            self.be_down(times=1)
            self.enqueue(client, sender=sender)
            self.assertEqual(self.only()[1].reverse_path, wanted)
            self.wait_until_empty()

    def test_an_account_that_is_taken_away(self) -> None:
        """Its secret is not kept beside the file."""
        running = self.start()
        client = self.log_in_to(running)
        self.be_down()
        with kept_log() as kept:
            self.enqueue(client)
            self.log_in_to(running)
            text = pathlib.Path(FILES["spool.ini"]).read_text()
            renamed = text.replace("[scanner8]", "[scanner9]")
            FILES.write("spool.ini", renamed.replace(CLIENT, TENANT))   # another application
            wait_for(lambda: "waits until scanner8 logs in" in str(kept.lines))
        FILES.write("spool.ini", renamed)       # the same one by another name will do
        self.be_up()
        self.wait_until_empty()


class SpoolStartTests(SpoolCase):
    """A folder that cannot be used ends the relay at its start, with a reason; what a crash
    has left does not.
    """

    def assertEnds(self, word: str, **settings: str) -> None:
        environ = {"SMTP_PORT": "0", "LISTEN_ADDRESS": "127.0.0.1", "TLS_SOURCE": "off",
                   "REQUIRE_TLS": "false", **self.settings_of(**settings)}
        if "RUN_AS" in settings:        # not this process
            with start_program(**environ) as process:
                _, err = process.communicate(timeout=PATIENCE)
            status = process.returncode
        else:
            status, _, err = call_main(**environ)
        self.assertEqual(status, 1, err)
        self.assertIn("SPOOL_DIRECTORY", err)
        self.assertIn(word, err)
        self.assertNotIn("Traceback", err)

    def test_what_cannot_be_used(self) -> None:
        self.assertEnds("Not a directory", SPOOL_DIRECTORY=FILES["key.pem"] + "/x")
        self.assertEnds("cannot be used", SPOOL_DIRECTORY=FILES["key.pem"])
        self.assertEnds("No such file", SPOOL_DIRECTORY=str(self.folder / "a" / "b"))
        self.folder.chmod(0o733)
        self.assertEnds("chmod")
        self.folder.chmod(0o700)
        running = self.start()
        self.assertEnds("another relay works with it")
        running.stop()
        error = OSError(errno.EROFS, "Read-only file system")       # root has no other way
        with unittest.mock.patch.object(os, "open", side_effect=error):
            with self.assertRaisesRegex(relay.StartError, "SPOOL_DIRECTORY=.*Read-only file"):
                relay.QueueFiles(self.config(**self.settings_of())).open()
        made = self.folder / "made"             # and it makes what is missing
        self.start(SPOOL_DIRECTORY=str(made)).stop()
        self.assertEqual(made.stat().st_mode & 0o777, 0o700)

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_one_of_another_user(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp())      # where everybody can come
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

    def test_what_a_crash_has_left(self) -> None:
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
        # The files; where they are in the end, the log has it, and what is sent. The first
        # is so before there is a .json, and after a .json was removed.
        cases: tuple[tuple[dict[str, bytes], str, str, list[bytes]], ...] = (
            ({"queue/ID.eml": eml}, "", "removed", []),
            ({"queue/ID.eml": eml[:9], "queue/ID.tmp": b"{"}, "", "removed", []),
            ({"queue/ID.eml": eml, "queue/ID.json": state, "queue/ID.tmp": b"{"}, "", "removed",
             [b"s"]),
            # while it was moved to failed/, or from there
            ({"queue/ID.json": state, "failed/ID.eml": eml}, "failed", "set-aside", []),
            ({"queue/ID.eml": eml, "failed/ID.json": state}, "failed", "listening", []),
            ({"queue/ID.eml": b"x", "failed/ID.json": state, "failed/ID.eml": eml}, "failed",
             "removed", []),
            # damaged, or not the state of this message
            ({"queue/ID.json": b"\0" * 99, "queue/ID.eml": eml}, "failed", "set-aside", []),
            ({"queue/ID.json": b"", "queue/ID.eml": eml}, "failed", "set-aside", []),
            ({"queue/ID.json": state.replace(b"ID", b"other"), "queue/ID.eml": eml}, "failed",
             "set-aside", []),
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
    """The command line shows and changes the queue, beside the running relay too."""

    def spool(self, *arguments: str, wanted: int = 0) -> str:
        status, out, err = self.outcome("spool", *arguments, **self.settings_of())
        self.assertEqual(status, wanted, err)
        return out

    def test_list_and_show(self) -> None:
        running = self.start()
        self.assertEqual(self.spool(), "The queue is empty.\n")
        client = self.log_in_to(running)
        self.be_down()
        self.enqueue(client, "\x1b[31mred", recipients=("a@x.y", "B@X.y"))
        ident, = self.waiting()
        (self.queue / "6f.eml").write_bytes(b"{")          # as one that is being written
        wait_for(lambda: self.only()[1].attempts > 1)
        self.assertRegex(self.spool(), rf"(?m)^waiting {ident} queued=20\d\d-\d\d-\d\dT[0-9:]+Z "
                         rf"size=\d+ sender={SENDER} recipients=a@x.y,B@X.y attempts=\d+ "
                         r'reason="451 4.3.0 .*"( next-attempt=\S+)?$')
        self.assertEqual(self.spool().count("\n"), 1)
        shown = self.spool("show", ident)
        self.assertIn("\nSubject: \\x1b[31mred\n", shown)
        self.assertTrue(shown.endswith("\nText\n"), shown)
        self.assertIn("no such", self.spool("show", "../lock", wanted=1))

    def test_retry_and_drop_beside_the_relay(self) -> None:
        running = self.start()
        client = self.log_in_to(running)
        self.rest_long()
        self.be_down(times=3)
        for subject in "123":
            self.enqueue(client, subject, sender=f"s{subject}@example.com")
        idents = self.idents()
        self.assertEqual(self.spool("retry", idents[b"2"]), f"{idents[b'2']} will be retried; if "
                         f"the relay lacks its secret, when {USER} logs in\n")
        wait_for(lambda: len(self.waiting()) == 2)
        self.assertEqual(self.subjects(), [b"2"])
        with kept_log() as kept:
            self.log_in_to(running)                             # this does not end a pause
            self.assertEqual(self.spool("drop", idents[b"1"]), "")
            wait_for(lambda: kept.find("dropped"))
        self.assertEqual(kept.find("dropped")[0][1].split()[0], idents[b"1"])
        self.assertEqual(len(self.fake.asked("send")), 4)       # the other still rests
        self.spool("retry")
        self.wait_until_empty()
        self.assertEqual(self.subjects(), [b"2", b"3"])
        self.assertEqual(self.spool("drop", wanted=2), "")
        self.be_down(times=1)
        self.enqueue(client)
        for path in self.queue.iterdir():       # as somebody may do without the command line
            path.unlink()
        with kept_log() as kept:
            for mailbox in list(running.relay.spool._mailboxes.values()):
                running.ask(mailbox.resume)
            wait_for(lambda: kept.find("dropped"))

    def test_what_failed_can_be_tried_again(self) -> None:
        running = self.start()
        client = self.log_in_to(running)
        self.fake.will("send", say(503), say(400))
        self.enqueue(client, sender=SENDER)
        wait_for(lambda: self.fake.delivered)                   # the notice
        self.wait_until_empty()
        wait_for(lambda: not running.ask(lambda: running.relay.spool._applications))
        path, _ = self.only("failed")
        self.assertRegex(self.spool(), rf"^failed  {path.stem} .*reason=.554 5.6.0")
        self.assertEqual(self.spool("retry"), "")               # only what waits
        self.age(path)
        with kept_log() as kept:
            self.spool("retry", path.stem)
            wait_for(lambda: kept.find("delayed"))              # the secret was forgotten
        self.assertFalse(self.only()[1].bounce_sent)            # it begins anew
        self.fake.will("send", say(400))                        # and its sender is told again
        self.log_in_to(running)
        wait_for(lambda: len(self.fake.delivered) == 2)
        self.wait_until_empty()
        self.assertEqual(self.only("failed")[1].attempts, 1)

    def test_without_a_relay(self) -> None:
        running = self.start()
        client = self.log_in_to(running)
        self.be_down()
        self.enqueue(client, "1")
        running.stop()
        ident, = self.waiting()
        files = relay.QueueFiles(running.relay.config)
        with unittest.mock.patch.object(pathlib.Path, "read_bytes", side_effect=FileNotFoundError):
            self.assertEqual(list(files.read_all(self.queue)), [])      # it was sent just now
        (self.failed / "junk.json").write_bytes(b"junk")
        self.assertRegex(self.spool("list"), "^waiting .*\ndamaged junk file=.*\n$")
        self.spool("retry", ident)
        self.assertEqual(self.spool("retry", "junk"), "")
        self.assertEqual(self.spool("show", wanted=2), "")
        self.spool("drop", "junk")
        shutil.rmtree(self.failed)              # somebody has tidied up
        self.spool("drop", ident)
        self.assertEqual(self.spool(), "The queue is empty.\n")
        for folder, wanted, word in (("", 2, "SPOOL_DIRECTORY is not set"),
                                     (str(self.folder / "none"), 1, "No such file")):
            status, _, err = self.outcome("spool", SPOOL_DIRECTORY=folder)
            self.assertEqual(status, wanted)
            self.assertIn(word, err)


@unittest.skipUnless(relay.fcntl, "needs locks of files")
class KillTests(unittest.TestCase):
    """kill -9 at any moment loses nothing:  python3 test_relay.py kill --times N --seed S"""

    def test_some_kills(self) -> None:
        kills = Kills(seed="1")
        told = kills.run(6)
        self.assertGreater(len(kills.accepted), 20, told)


# A root, an intermediate and a server's certificate, as Key Vault gives them: in PKCS#12
# of the old kind (RC2-40, 3DES, MAC of one iteration), and as PEM.

ROOT_CERT = pem("CERTIFICATE", """\
MIIBbjCCARSgAwIBAgIUaMxfz+TTbLIAV8hd7TmMrMl5Ho0wCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJVGVzdCBSb290
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAlUZXN0IFJvb3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAAT2SUGu3iEh3PY4z43RUd4EC5tHW4XvoeqB3+2HEKXqZKztVykluC3qfCd3OcrcvV7XGZXahuCe
Ud316MW9ZdrKo0IwQDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQUYUZvGVR285Q8CO3n
jDuxRDicmTQwCgYIKoZIzj0EAwIDSAAwRQIhALbg73Qrm112dJNMlzpMmoxX2zI5UpLpb/m82hgTf8nNAiBa7y0jeLo4
bDros0TcJ1njqy1uJSwy/n569B180lmaZA==
""")


class VaultTests(RelayCase):
    """A certificate in Key Vault, facts 8."""

    def vault(self, **settings: str) -> dict[str, str]:
        return {"TLS_SOURCE": "keyvault", "AZURE_KEY_VAULT_URL": self.fake.url,
                "AZURE_KEY_VAULT_CERT_NAME": "relay", "REQUIRE_TLS": "true",
                "AZURE_POD_IDENTITY_AUTHORITY_HOST": self.fake.url, **settings}

    def give(self, value: str, kind: str = "application/x-pkcs12") -> None:
        """Have a secret in the vault."""
        self.fake.secret = {"value": value, "contentType": kind, "attributes": {"enabled": True},
                            "id": f"{self.fake.url}/secrets/relay/1"}

    def test_the_key_is_nobodys_else_and_soon_gone(self) -> None:
        """In memory, or on disk where memfd_create() or /proc is missing."""
        folder = tempfile.mkdtemp(dir=FILES.folder)
        refuse = unittest.mock.Mock(side_effect=OSError(errno.ENOSYS, "as of an old kernel"))
        for create, number in ((getattr(os, "memfd_create", refuse), int(not IS_LINUX)),
                               (refuse, 1), (lambda name: 10 ** 6, 1)):
            with unittest.mock.patch.object(os, "memfd_create", create, create=True), \
                    unittest.mock.patch.object(tempfile, "tempdir", folder), \
                    self.assertRaises(relay.StartError), relay._private_file(b"key") as path:
                self.assertEqual(pathlib.Path(path).read_bytes(), b"key")
                self.assertEqual(len(os.listdir(folder)), number)
                if number and os.name == "posix":
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
                raise relay.StartError("while it is there")
            self.assertFalse(os.path.exists(path))
            self.assertEqual(os.listdir(folder), [])

    def export(self, pem: str, *options: str) -> bytes:
        """Make PKCS#12; of the new kind (AES), if no options make it old."""
        return subprocess.run(
            ["openssl", "pkcs12", "-export", "-passout", "pass:", "-keypbe", "AES-256-CBC",
             "-certpbe", "AES-256-CBC", "-macalg", "sha256", *options],
            input=pem.encode(), check=True, capture_output=True).stdout

    def old_pfx(self) -> bytes:
        """Make PKCS#12 of the old kind (RC2), for which OpenSSL 3 needs an option."""
        known = subprocess.run(["openssl", "pkcs12", "-help"], capture_output=True).stderr
        return self.export(VAULT_PEM, "-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-RC2-40",
                           "-macalg", "sha1", *["-legacy"] * (b"-legacy" in known))

    @needs_openssl
    def test_each_kind(self) -> None:
        """The chain leads to the root alone: the intermediate one is sent too."""
        old, new = base64.encodebytes(self.old_pfx()).decode(), self.export(VAULT_PEM)
        for value, kind in ((old.replace("\n", ""), "application/x-pkcs12"),
                            (old, "application/x-pkcs12"),
                            (base64.b64encode(new).decode(), "application/x-pkcs12"),
                            (VAULT_PEM, "application/x-pem-file"), (VAULT_PEM, "")):
            with self.subTest(value[:20], kind=kind):
                self.give(value, kind)
                with Client(self.another(**self.vault()).port) as client:
                    client._host = "localhost"
                    client.starttls(context=ssl.create_default_context(cadata=ROOT_CERT))
                    client.ehlo()
                    self.assertReply(client.log_in(USER, self.password), "235 2.7.0")
        request = self.fake.asked("vault")[0]
        self.assertEqual(request.path, "/secrets/relay?api-version=7.4")
        self.assertIn("resource=https%3A%2F%2Fvault.azure.net", self.fake.asked("imds")[0].path)

    @needs_openssl
    def test_pkcs12_is_converted_in_order_or_the_problem_is_named(self) -> None:
        def blocks(pem: str) -> list[str]:
            return [re.sub(r"\s", "", one) for one in
                    re.findall("-----BEGIN.*?-----END [A-Z ]+-----", pem, re.S)]
        good = self.export(VAULT_PEM)
        for octets in (self.old_pfx(), good):
            self.assertEqual(blocks(relay.pfx_to_pem(octets).decode()), blocks(VAULT_PEM))
        for octets, word in ((b"", "openssl"), (b"garbage", "openssl"), (good[:-1], "openssl"),
                             (good[:600] + b"\0" * 500, "openssl"),
                             (self.export(ROOT_CERT, "-nokeys"), "no private key")):
            with self.subTest(octets[:10]), self.assertRaisesRegex(ValueError, word):
                relay.pfx_to_pem(octets)

    @unittest.skipUnless(os.name == "posix", "needs a script as a command")
    @unittest.mock.patch.object(relay, "OPENSSL_TIMEOUT", 0.1)
    def test_an_openssl_command_that_is_missing_or_hangs(self) -> None:
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
    def test_each_failure_is_one_clear_line(self) -> None:
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
                ("No answer from Microsoft", utter(b""))):
            with self.subTest(word):
                self.fake.will("vault", *actions)      # type: ignore[arg-type]
                with self.assertRaises(relay.StartError) as caught:
                    relay.make_tls_contexts(self.config(**self.vault()))
                self.assertIn(word, str(caught.exception))
                self.assertIn("AZURE_KEY_VAULT_CERT_NAME='relay'", str(caught.exception))
                self.assertNotIn("hid", str(caught.exception))

    def test_the_scope_is_that_of_the_cloud(self) -> None:
        self.give(VAULT_PEM, "application/x-pem-file")
        for cloud, scope in (("china", "vault.azure.cn"), ("usgov", "vault.usgovcloudapi.net"),
                             ("usgov-dod", "vault.usgovcloudapi.net")):
            relay.make_tls_contexts(self.config(**self.vault(AZURE_CLOUD=cloud)))
            self.assertTrue(self.fake.asked("imds")[-1].path.endswith(f"%2F%2F{scope}"))


class OldTlsTests(TlsCase):
    """TLS 1.0 and 1.1 really work for old printers, and are off otherwise."""

    @staticmethod
    def old_client(version: str) -> ssl.SSLContext:
        context = trusting()
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = relay.TLS_VERSIONS[version]
        return context

    def test_the_least_version_is_kept(self) -> None:
        versions = list(relay.TLS_VERSIONS)
        self.assertEqual(versions, ["1.0", "1.1", "1.2", "1.3"])
        for least in versions:
            running = self.another(TLS_MIN_VERSION=least)
            for version in versions:
                with self.subTest(least, version=version), kept_log() as kept, \
                        Client(running.port) as client:
                    if version >= least:
                        client.starttls(context=self.old_client(version))
                        self.assertEqual(client.sock.version(), "TLSv" + version.replace(".0", ""))
                    else:
                        with self.assertRaises(OSError):
                            client.starttls(context=self.old_client(version))
                        wait_for(functools.partial(kept.find, "disconnected"))
                        self.assertIn("TLS_MIN_VERSION", kept.find("disconnected")[0][1])

    @needs_openssl
    def test_a_certificate_that_is_as_old_as_the_printer(self) -> None:
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

    def test_ciphers(self) -> None:
        name = "ECDHE-ECDSA-AES128-GCM-SHA256"
        with Client(self.another(TLS_CIPHER_SUITE=name).port) as client:
            client.starttls(context=self.old_client("1.2"))
            self.assertEqual(client.sock.cipher()[0], name)


@needs_loopbacks
class NetworkTlsTests(TlsCase):
    """What an old printer needs is there for its network alone."""

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

    def test_the_dates_of_a_certificate(self) -> None:
        """Also if it has expired, or the root is not in the file."""
        chain = FILES.write("chain.pem", VAULT_PEM)
        for cert, key, years in ((FILES["expired.pem"], FILES["key.pem"], (2020, 2020)),
                                 (FILES["cert.pem"], FILES["key.pem"], (2026, 2126)),
                                 (chain, chain, (2020, 2120))):
            for context in relay.make_tls_contexts(tls_config(
                    TLS_CERT_FILEPATH=cert, TLS_KEY_FILEPATH=key)).values():
                dates = relay.certificate_dates(context, cert)
                self.assertEqual(tuple(time.gmtime(date).tm_year for date in dates), years)

    def test_a_version_that_this_openssl_lacks(self) -> None:
        text = f"[a]\n{APPLICATION}login = required\nnetworks = 10.0.0.1\ntls_min_version = 1.0"
        for name in ("HAS_TLSv1", "HAS_TLSv1_1"):
            with unittest.mock.patch.object(ssl, name, False):
                _, faults = relay.parse_accounts(text, make_config())
                self.assertEqual(["OpenSSL" in fault for fault in faults],
                                 [True] * (name == "HAS_TLSv1"))
                with self.assertRaisesRegex(relay.ConfigError, "TLS_MIN_VERSION='1.[01]'.*Open"):
                    make_config(TLS_MIN_VERSION="1.0" if name == "HAS_TLSv1" else "1.1")

    def test_weak_ciphers_are_for_old_tls_alone(self) -> None:
        def names(context: ssl.SSLContext) -> set[str]:
            return {one["name"] for one in context.get_ciphers()}
        contexts = relay.make_tls_contexts(tls_config())
        normal = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.assertEqual(names(contexts["1.2"]), names(normal))
        if hasattr(normal, "security_level"):
            self.assertEqual([contexts[version].security_level for version in ("1.2", "1.3")],
                             [normal.security_level] * 2)
            own = relay.make_tls_contexts(tls_config(TLS_CIPHER_SUITE="DEFAULT:@SECLEVEL=2"))
            self.assertEqual({one.security_level for one in own.values()}, {2})
        for context in contexts.values():       # a client must see whom it talks to
            self.assertNotIn("Au=None", str(context.get_ciphers()))
            self.assertTrue(context.options & ssl.OP_NO_RENEGOTIATION)

    def test_old_tls_from_its_network_alone(self) -> None:
        for address, least in (("127.0.0.2", "1.0"), ("127.0.0.1", "1.2"), ("127.0.0.3", "1.2"),
                               ("127.0.0.4", "1.3")):
            for version in relay.TLS_VERSIONS:
                with self.subTest(address, version=version):
                    client, is_fine = self.come_from(address), version >= least
                    with contextlib.nullcontext() if is_fine else self.assertRaises(OSError):
                        client.starttls(context=OldTlsTests.old_client(version))
                    if is_fine and address == "127.0.0.2":
                        client.ehlo()
                        self.assertReply(client.post(), "250 2.0.0")    # without login

    def test_implicit_tls_too(self) -> None:
        for address, wanted in (("127.0.0.2", b"220 "), ("127.0.0.1", b"")):
            sock = socket.create_connection(("127.0.0.1", self.running._config.smtps_port),
                                            PATIENCE, (address, 0))
            self.addCleanup(sock.close)
            said = b""
            with contextlib.suppress(OSError), OldTlsTests.old_client("1.0").wrap_socket(
                    sock, server_hostname="localhost") as tls:
                said = self.read_until(tls, b"\r\n")
            self.assertEqual(said[:4], wanted)

    def test_no_tls_from_its_network_alone(self) -> None:
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
        """Begin a case: nothing was sent yet."""
        self.fake.reset()
        self.running.ask(self.running.relay._duplicates._accepted._values.clear)

    def sends(self, content: bytes = IDENTIFIED, running: Running | None = None) -> Client:
        """Send the content of a message, and do not wait for the reply."""
        client = self.begun(running)
        client.send(content + b".\r\n")
        return client

    def test_more_messages_than_other_caches_hold(self) -> None:
        async def claim() -> object:
            guard = relay.DuplicateGuard(900.0)
            for number in range(relay.MAX_CACHED + 1):
                guard.accepted(b"%d" % number, "id", "reply")
            async with guard.claim(b"0", math.inf) as first:
                return first
        self.assertEqual(asyncio.run(claim()), ("id", "reply"))

    def test_the_same_message_again(self) -> None:
        for is_heard in (True, False):
            with self.subTest(is_heard=is_heard), kept_log() as kept:
                self.forget()
                self.fake.will("send", self.fake.hang_then(self.fake.accept))
                client = self.sends()
                self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
                if not is_heard:
                    client.close()
                self.fake.release.set()
                if is_heard:
                    self.assertReply(client.next_reply(), "250 2.0.0")
                for _ in range(2):
                    reply = self.sends().next_reply()
                    ident = self.fake.asked("send")[0].headers["client-request-id"]
                    self.assertEqual(reply, f"250 2.0.0 Accepted by Microsoft 365, id {ident}")
                    self.assertIn(f"first={ident} ", kept.find("repeated")[-1][1])
                self.assertEqual(len(self.fake.delivered), 1)

    def test_which_messages_are_the_same(self) -> None:
        head, text = IDENTIFIED.split(b"Subject")
        ident, date, _ = head.split(b"\r\n")
        other: dict[str, Any]
        for is_same, message, other in (
                (True, IDENTIFIED, {}),
                (True, IDENTIFIED, {"recipients": ("b@x.y", "A@X.Y")}),
                (False, IDENTIFIED, {"recipients": ("a@x.y",)}),
                (False, IDENTIFIED, {"sender": "other@example.com"}),
                (False, IDENTIFIED, {"message": IDENTIFIED + b".\r\n"}),
                (False, IDENTIFIED, {"user": f"{TENANT}@{TENANT}"}),
                # In any case and order; folded after the colon.
                (True, b"date:x\r\nMESSAGE-ID :\r\n\t <a@b>\r\n\r\n", {}),
                # Neither, one twice, one that is empty, one in the text or a longer name.
                (False, b"Subject" + text, {}),
                (False, date + b"\r\n" + date + b"\r\nSubject" + text, {}),
                (False, ident + b"\r\nSubject" + text, {}),
                (False, ident + b"\r\nDate: \r\n \r\nSubject" + text, {}),
                (False, ident + b"\r\nSubject" + text + date + b"\r\n", {}),
                (False, ident + b"\r\nX-" + date + b"\r\nResent-" + date + b"\r\n\r\n", {})):
            with self.subTest(f"{message!r} and {other}"):
                self.forget()
                for change in ({}, other):
                    values: dict[str, Any] = {"user": USER, "message": message, "sender": SENDER,
                                              "recipients": ("a@x.y", "b@x.y"), **change}
                    client = self.logged_in(values.pop("user"))
                    self.assertReply(client.post(**values), "250 2.0.0")
                self.assertEqual(len(self.fake.delivered), 1 if is_same else 2)

    def test_the_same_while_the_first_is_on_its_way(self) -> None:
        for action, requests in ((self.fake.accept, 1), (say(400), 2), (utter(b""), 2)):
            with self.subTest(requests=requests):
                self.forget()
                self.fake.will("send", self.fake.hang_then(action))
                first = self.sends()
                self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
                second = self.sends()
                first.close()
                wait_for(lambda: self.running.ask(lambda: sum(
                    one._session.holds_message for one in self.running.server._connections)) == 2)
                self.fake.release.set()
                reply = self.assertReply(second.next_reply(), "250 2.0.0")
                self.assertEqual(len(self.fake.delivered), 1)
                asked = self.fake.asked("send")
                self.assertEqual(len(asked), requests)
                self.assertTrue(reply.endswith(asked[-1].headers["client-request-id"]))
        self.assertEqual(self.running.relay._duplicates._under_way, {})

    def test_the_second_has_its_own_deadline(self) -> None:
        running = self.another(UPSTREAM_TIMEOUT="2")
        self.fake.will("send", self.fake.hang, self.fake.hang)
        clients = [self.sends(running=running) for _ in range(2)]
        replies = sorted(client.next_reply() for client in clients)
        self.assertReply(replies[0], "451 4.4.1")
        self.assertRegex(replies[1], "^451 4.4.[15] ")

    def test_the_window(self) -> None:
        clock = self.running.relay._duplicates._accepted._clock = Clock()
        self.addCleanup(setattr, self.running.relay._duplicates._accepted, "_clock", time.monotonic)
        for pause, number in ((0, 1), (899, 1), (2, 2)):    # a repetition adds no time
            clock.now += pause
            self.assertReply(self.sends().next_reply(), "250 2.0.0")
            self.assertEqual(len(self.fake.delivered), number)

    def test_without_a_window_and_without_identity_nobody_waits(self) -> None:
        for where, content in ((self.another(DUPLICATE_WINDOW="0"), IDENTIFIED),
                               (self.running, b"Subject: s\r\n\r\n")):
            self.forget()
            self.fake.will("send", *[self.fake.hang_then(self.fake.accept)] * 2)
            clients = [self.sends(content, where) for _ in range(2)]
            for _ in clients:
                self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
            self.fake.release.set()
            self.assertEqual(len({client.next_reply() for client in clients}), 2)


class ShellTests(TlsCase):
    """The session over real sockets and real TLS."""

    settings = {"LARGE_MESSAGES": "refuse", "UPSTREAM_TIMEOUT": str(PATIENCE)}

    def test_starttls_login_and_a_message(self) -> None:
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

    def test_implicit_tls(self) -> None:
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

    def test_octets_in_the_clear_behind_starttls_are_never_obeyed(self) -> None:
        """CVE-2011-0411, CVE-2024-34083: in one packet, or in the next before the 220."""
        # In one read of asyncio, in several, and more than it holds.
        for number in (1, 500, 1500, 5000, 40_000):
            injected = b"NOOP injected\r\n" * number
            with self.subTest(number):
                sock = self.raw()
                self.read_until(sock, b"\r\n")
                sock.sendall(b"EHLO x\r\n")
                self.read_until(sock, b"HELP\r\n")
                try:
                    sock.sendall(b"STARTTLS\r\n" + injected)
                    self.read_until(sock, b"220 2.0.0")
                    secure = trusting().wrap_socket(sock, server_hostname="localhost")
                except OSError:         # more was injected than was read before: no TLS
                    self.assertGreaterEqual(number, 5000)
                    continue
                secure.sendall(b"EHLO real\r\nQUIT\r\n")
                said = self.read(secure)
                secure.close()
                self.assertEqual(said.count(b"STARTTLS"), 0)
                self.assertEqual(codes(said), [250, 221])

    def test_a_tls_failure_is_explained(self) -> None:
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

    def test_a_defect_ends_the_session_and_is_logged_with_its_traceback(self) -> None:
        handler = logging.Handler()
        handler.emit = lambda record: 1 / ("NOOP d" not in record.getMessage())  # type: ignore
        relay.log.addHandler(handler)
        self.addCleanup(relay.log.removeHandler, handler)
        with kept_log() as kept:
            self.assertReply(self.connect().say("NOOP defect"), "421 4.3.0")
            wait_for(lambda: kept.find("disconnected"))
        self.assertEqual([level for level, line in kept.lines if " broken" in line], ["ERROR"])
        self.assertIn('reason="a defect of the relay"', kept.find("disconnected")[0][1])

    def test_pipelined_replies_leave_together_and_at_once_in_the_clear(self) -> None:
        """Without TCP_NODELAY the second of two would wait for 40 ms."""
        sock = self.raw()
        self.read_until(sock, b"\r\n")
        one, = self.running.ask(lambda: list(self.running.server._connections))
        self.assertTrue(one._writer.get_extra_info("socket").getsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY))
        for _ in range(20):             # the network might join two writes now and then
            sock.sendall(b"NOOP\r\nRSET\r\nNOOP\r\n")
            self.assertEqual(codes(sock.recv(65536)), [250, 250, 250])

    def test_pipelined_replies_leave_together(self) -> None:
        client = self.connect()
        client.starttls(context=trusting())
        client.ehlo()
        client.log_in(password=self.password)
        client.send(MAIL + RCPT + RCPT + b"DATA\r\n")
        self.assertEqual([client.getreply()[0] for _ in range(4)], [250, 250, 250, 354])
        client.send(b"one\r\n.\r\n" + MAIL + RCPT + b"DATA\r\ntwo\r\n.\r\nQUIT\r\n")
        self.assertEqual([client.getreply()[0] for _ in range(6)], [250, 250, 250, 354, 250, 221])
        self.assertEqual(len(self.fake.delivered), 2)

    def test_the_log_of_a_session(self) -> None:
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


class DeafTests(TlsCase):
    """Clients that do not read, or late."""

    settings = {"REQUIRE_TLS": "false", "CLIENT_TIMEOUT": "2"}

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(relay.log.setLevel, relay.log.level)
        relay.log.setLevel("INFO")      # or each command would be logged

    def fill(self, send: Callable[[], Any]) -> Any:
        """Send until the relay holds what the system cannot take; returns the connection."""
        def is_full() -> bool:
            send()
            return any(self.running.ask(lambda: [
                writer.transport.get_write_buffer_size()
                for one in self.running.server._connections
                for writer in (one._writer, one._plain_writer)]))
        wait_for(is_full)
        return self.running.ask(lambda: next(iter(self.running.server._connections)))

    def test_one_that_reads_all_in_the_end(self) -> None:
        """The connection is not closed before the last word has left."""
        for stops in (False, True):
            self.running = self.another(CLIENT_TIMEOUT="300")
            # However late this thread comes to read.
            with self.subTest(stops=stops), kept_log() as kept, \
                    unittest.mock.patch.object(relay, "LINGER", PATIENCE):
                sock = self.deaf()
                one = self.fill(functools.partial(sock.sendall, b"HELP\r\n" * 100))
                sock.sendall(b"QUIT\r\n")
                wait_for(lambda: kept.find("disconnected"))
                if stops:
                    self.running.begin_stop()
                    wait_for(lambda: kept.find("stopping"))
                self.assertIn(b"\r\n221 2.0.0", last_octets(sock))
                wait_for(one.task.done)
                self.assertIsNone(one.task.exception())

    def test_the_end_is_said_in_tls_too(self) -> None:
        """Or the client would not know whether it has heard all."""
        sock = trusting().wrap_socket(self.raw(smtps=True), server_hostname="localhost",
                                      suppress_ragged_eofs=False)
        self.addCleanup(sock.close)
        self.read_until(sock, b"220 ")
        sock.sendall(b"QUIT\r\n")
        self.read_until(sock, b"221 ")
        while sock.recv(4096):
            pass

    def test_a_deaf_client_that_ends_tls_is_let_go(self) -> None:
        """By itself asyncio waits for ever until it takes what is left."""
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
        if IS_LINUX:                    # ours is open still, and theirs is not
            wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


class ConnectionLimitTests(TlsCase):
    """Limits of connections, whose clients are not cut off meanwhile."""

    settings = {"MAX_CONNECTIONS": "6", "MAX_CONNECTIONS_PER_CLIENT": "3", "REQUIRE_TLS": "false"}

    def tearDown(self) -> None:
        """Wait until the connections of a test are gone."""
        self.doCleanups()
        wait_for(lambda: not self.running.ask(lambda: len(self.running.server._connections)))

    def test_connections_of_one_client(self) -> None:
        held = [self.connect() for _ in range(3)]
        with kept_log() as kept:
            said = self.read(self.raw())
        self.assertTrue(said.startswith(b"421 4.7.0 Too many connections from your"), said)
        self.assertEqual(kept.find("turned-away")[0][0], "WARNING")
        self.assertEqual(self.read(self.raw(smtps=True)), b"")
        held[0].close()
        wait_for(lambda: self.running.ask(lambda: len(self.running.server._connections)) < 3)
        self.connect()

    def test_a_network_of_ipv6_counts_as_one_client(self) -> None:
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
        (_, line), = kept.find("turned-away")
        self.assertIn("client=2001:db8::3 ", line)


class LimitTests(TlsCase):
    """Limits of time, for a client that stops anywhere, or is slow."""

    settings = {"CLIENT_TIMEOUT": "1.5", "REQUIRE_TLS": "false"}
    DATA = b"EHLO x\r\n*MAIL FROM:<a@x.y>\r\nRCPT TO:<a@x.y>\r\nDATA\r\n"
    # What is sent, where "*" is a login, and what is then sent again and again, slowly.
    CASES = {
        "after the greeting": (b"", b""), "in a command": (b"EHLO x\r\nNOO", b""),
        "after EHLO": (b"EHLO x\r\n", b""), "in a login": (b"EHLO x\r\nAUTH LOGIN\r\n", b""),
        "after a login": (b"EHLO x\r\n*", b""), "in an envelope": (DATA[:-6], b""),
        "before a message": (DATA, b""), "in a message": (DATA + b"To: b\r\n.", b""),
        "in BDAT, which there is not": (b"EHLO x\r\n*BDAT 9\r\nx", b""),
        "a slow command": (b"", b"x"), "a slow message": (DATA, b"x\r\n")}

    def test_each_silence_ends(self) -> None:
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
                said = self.read_until(sock, b"354 ") if slow and sent else b""
                sock.settimeout(0.05 if slow else PATIENCE)
                for octet in itertools.cycle(split_octets(slow)):
                    sock.sendall(octet)
                    with contextlib.suppress(socket.timeout):
                        said += sock.recv(1000)
                    if b"421 4.4.2" in said or time.monotonic() - begun > PATIENCE:
                        break
                return said + self.read(sock), time.monotonic() - begun
        cases = {f"{name}{', TLS' * is_tls}": (*case, is_tls)
                 for name, case in self.CASES.items() for is_tls in (False, True)}
        self.logged_in()            # so that no login has to wait
        for name, (said, seconds) in at_once(play, cases).items():
            with self.subTest(name):
                self.assertTrue(said.splitlines()[-1].startswith(b"421 4.4.2 "), said)
                self.assertGreaterEqual(seconds, 1.5)
                self.assertLess(seconds, PATIENCE)

    @unittest.mock.patch.object(relay, "NO_PROGRESS_TIMEOUT", relay.NO_PROGRESS_TIMEOUT)
    def test_a_session_that_gets_nowhere_for_an_hour_ends(self) -> None:
        idle, busy = self.logged_in(), self.begun()
        self.assertReply(idle.say("NOOP"), "250 2.0.0")
        relay.NO_PROGRESS_TIMEOUT = 0.0
        self.assertReply(idle.say("NOOP"), "421 4.7.0 Too long")
        busy.send(b"Subject: s\r\n\r\nText\r\n.\r\n")        # a message is not cut off
        self.assertReply(busy.next_reply(), "250 2.0.0")
        self.assertReply(busy.next_reply(), "421 4.7.0 Too long")

    def test_a_client_that_never_reads(self) -> None:
        for smtps in (False, True):
            sock = self.deaf(smtps=smtps)
            if smtps:
                sock = trusting().wrap_socket(sock, server_hostname="localhost")
                self.addCleanup(sock.close)
            with self.assertRaises((ConnectionError, ssl.SSLError)):    # no time-out of our own
                while True:
                    sock.sendall(b"EHLO x\r\n" * 2_000)

    def test_a_handshake_has_its_time(self) -> None:
        """Silent or slow, and others are served meanwhile."""
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
    """SIGTERM: messages in flight end, idle clients hear 421."""

    def begin(self, running: Running) -> Client:
        """A client whose message is in flight."""
        client = self.connect(running)
        client.log_in(password=self.password)
        for line in (f"MAIL FROM:<{SENDER}>", "RCPT TO:<a@x.y>", "DATA"):
            client.docmd(line)
        return client

    def test_a_client_that_is_accepted_as_the_ports_close_hears_421(self) -> None:
        running, clients = self.another(), list[socket.socket]()

        def connect_and_stop() -> None:
            clients.append(socket.create_connection(("127.0.0.1", running.port)))
            running._loop.call_soon(running._stop.set)      # as asyncio accepts it
        running._loop.call_soon_threadsafe(connect_and_stop)
        running.wait()
        with clients[0] as client:
            client.settimeout(PATIENCE)
            self.assertIn(b"\r\n421 4.3.2 ", client.makefile("rb").read())

    def test_a_message_in_flight_ends_and_idle_clients_hear_421(self) -> None:
        running = self.another()
        self.fake.will("send", self.fake.hang_then(self.fake.accept))
        idle, busy, writing = self.connect(running), self.begun(running), self.begun(running)
        busy.send(b"one\r\n.\r\n")
        writing.send(b"half")
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))

        def come() -> socket.socket:
            """Connect so that the system accepts it, and the server hears of it too late."""
            sock = socket.create_connection(("127.0.0.1", running.port), PATIENCE)
            asyncio.get_running_loop().call_later(0, running._stop.set)     # in the same pass
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

    def test_who_has_no_message_does_not_hold_it_up(self) -> None:
        """A login under way, and a client that does not read its replies."""
        running = self.another(SHUTDOWN_TIMEOUT="60")
        self.fake.will("token", self.fake.hang)
        client, deaf = self.connect(running), self.connect(running)
        client.putcmd(f"AUTH PLAIN {plain(USER, self.password).decode()}")
        self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
        assert deaf.sock is not None
        deaf.sock.settimeout(0.3)
        deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)     # it is soon full
        with contextlib.suppress(OSError):
            while True:
                deaf.sock.sendall(b"HELP\r\n" * 1_000)
        running.stop()
        self.assertReply(client.next_reply(), "421 4.3.2")

    def test_what_is_cut_at_the_moment_at_which_microsoft_accepts_it(self) -> None:
        """The client hears of a message, else it would send it again. A piece is not the end."""
        for kind, answer, message, reply, done in (
                ("send", self.fake.accept, b"one\r\n", "250 2.0.0", (1, 0, 0)),
                ("put", say(202), LARGE, "421 4.3.2", (0, 1, 1))):
            self.fake.reset()
            running = self.another()
            client = self.begun(running)
            self.fake.will(kind, self.fake.hang_then(answer))
            client.send(message + b".\r\n")
            self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
            running.ask(functools.partial(cut_when_done, running, self.fake.release))
            self.assertReply(client.next_reply(), reply)
            self.assertEqual((len(self.fake.delivered), len(self.fake.asked("put")),
                              len(self.fake.deleted)), done)

    def test_what_takes_too_long_is_cut_and_leaves_no_draft_or_the_log_says_so(self) -> None:
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
            ident = self.fake.asked("send" if step == "send" else "draft")[0].headers[
                "client-request-id"]
            self.assertIn(f"{ident} cut ", str(kept.find("cut")))
            self.assertEqual((len(self.fake.deleted), len(kept.find("draft-left"))),
                             (deleted, left))


@unittest.skipUnless(sys.platform == "linux", "needs /proc, and the addresses of 127/8")
class OverloadTests(unittest.TestCase):
    """Abuse of a relay that is a process of its own: others are served meanwhile, the memory
    is bounded, and in the end nothing of it is left.
    """

    MB = 1_000_000
    DEVICES, COMMANDS = 1200, 25_000        # `soak` has FULL in their place
    FULL: Any = {"DEVICES": 5000, "COMMANDS": 100_000}
    fake: FakeMicrosoft

    @classmethod
    def setUpClass(cls) -> None:
        """Start Microsoft; the tests need many descriptors themselves."""
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
        """A relay; in the end it must be as it was at first, and log no errors but those
        that are allowed. `change` is done before it starts.
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
                wait_for(lambda: watched.left() <= before)      # a thread may have ended since
            settle()
            watched.forget_peak()
            yield watched
            settle()
            with self.honest(watched) as client:
                self.assertServed(client)
            settle()
            # Who has just gone is counted until the loop has come by once more; when a new
            # client has had its replies, it has.
            with contextlib.closing(Client(watched.port)) as client:
                client.ehlo()
                client.noop()
                self.assertSound(watched.stop(), errors)

    def assertSound(self, log: str, errors: str) -> None:
        """Nothing is wrong in a log, and one was left when the relay stopped, who may be."""
        self.assertIn("stopping connections=1\n", log[-3000:])
        self.assertTrue(log.endswith("stopped\nexit 0"), log[-1000:])
        self.assertNotIn("Traceback", log)
        for line in log.splitlines():
            if errors and errors in line:
                continue
            self.assertNotRegex(line, " ERROR | CRITICAL |broken|a defect")

    @contextlib.contextmanager
    def honest(self, watched: Watched) -> Iterator[Client]:
        """A client that does nothing bad."""
        with contextlib.closing(Client(watched.port)) as client:
            client.ehlo()
            self.assertRegex(client.log_in(), "^235 ")
            yield client

    def assertServed(self, client: Client) -> None:
        self.assertRegex(client.post(), "^250 2.0.0 ")

    def assertMemory(self, watched: Watched, begun: int, most: int) -> None:
        """The memory never grew by more than that."""
        self.assertLess(watched.memory("HWM") - begun, most)

    @contextlib.contextmanager
    def crowd(self, watched: Watched, number: int, *, smtps: bool = False, say: bytes = b"",
              hear: bytes = b"220 ", sources: int = 1) -> Iterator[list[socket.socket]]:
        """Connections from so many addresses, that say and hear something."""
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
                if say:
                    sock.sendall(say)
                if len(socks) % 100 == 0:       # not too many may wait to be accepted
                    self.hear(socks[-100:], hear, bool(hear))
            self.hear(socks[number // 100 * 100:], hear, bool(hear))
            yield socks

    def hear(self, socks: list[socket.socket], what: bytes, times: int = 1) -> None:
        """Read on each until something has come, so many times."""
        for sock in socks:
            said = b""
            while said.count(what) < times:
                part = sock.recv(65536)
                self.assertTrue(part, f"{said!r} ended before {what!r}")
                said += part

    def test_more_connections_than_allowed(self) -> None:
        """Who is turned away leaves nothing behind, even if it never hangs up."""
        with self.watch(MAX_CONNECTIONS="21", MAX_CONNECTIONS_PER_CLIENT="20") as watched:
            with self.honest(watched) as client:
                with self.crowd(watched, 20):
                    count = watched.descriptors()
                    with self.crowd(watched, 300, hear=b"421 4.7.0 Too many connections;"), \
                            self.crowd(watched, 300, smtps=True, hear=b"", sources=300):
                        self.assertServed(client)
                        wait_for(lambda: watched.events["turned-away"] == 600)
                        wait_for(lambda: watched.descriptors() <= count + 1)
                wait_for(lambda: watched.descriptors() < count)
                wait_for(lambda: watched.events["disconnected"] == 21)
                self.assertServed(client)       # meanwhile their places are free, too
                with self.crowd(watched, 20):
                    self.assertServed(client)

    def test_many_idle_connections_that_fail_to_log_in_twice(self) -> None:
        """Many devices whose secret has expired: Microsoft is asked once."""
        if self.descriptors < 2 * self.DEVICES + 2000:
            self.skipTest("needs more descriptors")
        wrong = f"AUTH PLAIN {plain(password='wrong').decode()}\r\n".encode()
        with self.watch(change="r.FAILURE_PAUSE, r.REFUSALS_LAST = 0.01, 3600.0") as watched:
            begun, asked = watched.memory(), len(self.fake.asked("token"))
            # So many addresses that none of them fails too often.
            with self.crowd(watched, self.DEVICES, say=b"EHLO x\r\n", hear=b"HELP",
                            sources=self.DEVICES // 4) as socks, self.honest(watched) as client:
                self.assertServed(client)
                self.assertGreater(watched.descriptors(), self.DEVICES)
                self.assertMemory(watched, begun, self.DEVICES * 21_000)
                self.fake.will("token", say(401, aadsts(7000215, "invalid_client")))
                for sock in socks:
                    sock.sendall(wrong * 2)
                for _ in range(50):
                    self.assertServed(client)
                self.hear(socks, b"535 ", 2)
                self.assertMemory(watched, begun, self.DEVICES * 21_000)
            self.assertEqual(len(self.fake.asked("token")) - asked, 1)
            wait_for(lambda: watched.lines("result=refused") >= 2 * self.DEVICES)
            self.assertEqual(watched.lines("result=refused"), 2 * self.DEVICES)

    def test_more_messages_than_memory(self) -> None:
        """40 clients send 0.45 MB each, and the limit is 5 MB: the others are told."""
        octets = (b"x" * 78 + b"\r\n") * 625
        head = (f"EHLO x\r\nAUTH PLAIN {plain().decode()}\r\nMAIL FROM:<{SENDER}>\r\n"
                "RCPT TO:<a@x.y>\r\nDATA\r\n").encode()
        with self.watch(MAX_MEMORY_FOR_MESSAGES="5000000", MAX_MESSAGE_SIZE="2000000") as watched:
            begun = watched.memory()
            with self.crowd(watched, 40, say=head, hear=b"354 ") as socks, \
                    self.honest(watched) as client:
                for part in range(9):
                    for sock in socks:
                        sock.sendall(b"\r\n" * (not part) + octets)
                self.assertServed(client)
                for sock in socks:
                    sock.sendall(b".\r\nQUIT\r\n")
                replies = [last_octets(sock)[:9] for sock in socks]
                self.assertEqual(collections.Counter(replies), {b"250 2.0.0": 11, b"452 4.3.1": 29})
                self.assertMemory(watched, begun, 30 * self.MB)
                for _ in range(12):             # all of it is free again
                    self.assertRegex(client.post(octets * 9), "^250 ")

    def test_no_descriptors(self) -> None:
        """It goes on with whom it has, waits without work, and accepts again later."""
        with self.watch(CLIENT_TIMEOUT="3", errors="out of system resource") as watched, \
                self.honest(watched) as client:
            self.assertServed(client)       # the connection to Microsoft is kept
            limit = watched.descriptors() + 8
            watched.allow_descriptors(limit)
            with self.crowd(watched, 16, hear=b"") as socks:
                wait_for(lambda: watched.descriptors() >= limit)
                begun, work, lines = time.monotonic(), watched.processor(), len(watched.log)
                self.assertServed(client)
                self.assertIn(b"421 4.4.2", last_octets(socks[0]))
                # asyncio tries `backlog` times at once, makes a timer and a line of the log for
                # each, and the timers multiply: start_server() must be told a backlog of 1.
                self.assertLess(watched.processor() - work, (time.monotonic() - begun) / 2)
                self.assertLess(len(watched.log) - lines, 50)
                self.hear(socks[8:], b"220 ")       # they waited, and now have their turn

    def test_half_handshakes(self) -> None:
        """400 clients, on both ports, after some octets and after the whole ClientHello. asyncio
        by itself takes 300 kB for each.
        """
        hello = client_hello()
        with self.watch(change="r.HANDSHAKE_TIMEOUT = 3") as watched:
            begun = watched.memory()
            with self.crowd(watched, 200, say=b"EHLO x\r\nSTARTTLS\r\n",
                            hear=b"Ready") as socks, \
                    self.crowd(watched, 200, smtps=True, hear=b"") as others:
                socks += others
                for sock, part in zip(socks, itertools.cycle((hello, hello[:50]))):
                    sock.sendall(part)
                with self.honest(watched) as client:
                    client.starttls(context=trusting())
                    self.assertEqual(client.ehlo()[0], 250)
                for sock in socks:
                    last_octets(sock)
            self.assertMemory(watched, begun, 400 * 120_000)

    def test_many_commands_in_one_packet(self) -> None:
        """They are not read to their end."""
        with self.watch() as watched, self.honest(watched) as client:
            for command in (b"NOOP", b"Unknown"):
                with self.crowd(watched, 1) as (sock,), \
                        concurrent.futures.ThreadPoolExecutor(2) as pool:
                    said = pool.submit(last_octets, sock)
                    pool.submit(sock.sendall, (command + b"\r\n") * self.COMMANDS + b"QUIT\r\n")
                    self.assertEqual(said.result().splitlines()[-1][:9], b"421 4.7.0")
            self.assertServed(client)


class ResetTests(TlsCase):
    """Clients that are gone all at once, whatever they were doing."""

    settings = {"REQUIRE_TLS": "false", "UPSTREAM_TIMEOUT": str(PATIENCE)}
    EHLO = ((b"EHLO x\r\n", b"HELP"),)

    def script(self, state: str) -> tuple[tuple[bytes, bytes], ...]:
        """What is said and heard until a client is in a state."""
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
            "QUIT": (*rcpt, (b"QUIT\r\n", b"")), "QUIT answered": (*rcpt, (b"QUIT\r\n", b"221 ")),
            "login under way": (*login[:1], (login[1][0], b"")),
            "message under way": (*data, (b"To: a@x.y\r\n\r\nText\r\n.\r\n", b"")),
        }[state]

    def come(self, state: str, *, tls: bool = False) -> socket.socket:
        """Bring a client into a state."""
        sock = self.raw(smtps=tls)
        if tls:
            sock = trusting().wrap_socket(sock, server_hostname="localhost")
        self.addCleanup(sock.close)
        self.read_until(sock, b"220 ")
        for said, heard in self.script(state):
            sock.sendall(said)
            if heard:
                self.read_until(sock, heard)
        return sock

    def everyone(self) -> Iterator[socket.socket]:
        """A client in each state, but for those where something is under way."""
        for smtps in (False, True):
            yield self.raw(smtps=smtps)
            for octets in (b"", client_hello()[:50], client_hello(), b"EHLO x\r\n",
                           b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\0\2xx"):
                yield self.half_way(octets, smtps=smtps)
            for state in ("greeted", "within a command", "EHLO", "AUTH", "half of AUTH", "login",
                          "MAIL", "RCPT", "DATA", "content", "QUIT", "QUIT answered"):
                yield self.come(state, tls=smtps)

    @unittest.skipUnless(sys.platform == "linux", "needs /proc")
    def test_in_each_state(self) -> None:
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
        gc.collect()                    # the clients are of this process
        # Not one for each; connections to Microsoft may be kept.
        wait_for(lambda: len(os.listdir("/proc/self/fd")) < count + 10)

    def test_while_microsoft_is_asked(self) -> None:
        """The login is in vain; the message is sent all the same, and the log says so."""
        for tls in (False, True):
            for kind, state in (("token", "login under way"), ("send", "message under way")):
                self.fake.reset()
                self.fake.will(kind, self.fake.hang_then(self.fake.accept))
                self.password = f"secret of {tls} {kind}"
                with self.subTest(state, tls=tls), kept_log() as kept:
                    sock = self.come(state, tls=tls)
                    self.assertTrue(self.fake.arrived.acquire(timeout=PATIENCE))
                    reset(sock)
                    with self.connect() as client:
                        client.log_in(password="another")
                        self.assertReply(client.post(), "250 2.0.0")
                    self.fake.release.set()
                    self.assertEqual(settled(lambda: what_is_left(self.running)), [])
                    sent = 1 + (kind == "send")
                    self.assertEqual(len(self.fake.delivered), sent)
                    self.assertEqual(len(kept.find("sent")), sent)


class ServeTests(unittest.TestCase):
    """The program serves, and stops when it is told to."""

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

    def test_signals(self) -> None:
        """The first ends it with 0, a second one at once. SIGHUP never does."""
        fake = self.fake
        for first, second in ((signal.SIGTERM, None), (signal.SIGINT, signal.SIGTERM)):
            fake.reset()
            fake.will("send", fake.hang_then(fake.accept))
            with self.subTest(second), self.serve(TLS_SOURCE="off",
                                                  REQUIRE_TLS="false") as process:
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
        fake.will("imds", fake.hang)            # before there is a loop for them
        with self.serve(TLS_SOURCE="keyvault", AZURE_KEY_VAULT_URL=fake.url,
                        AZURE_KEY_VAULT_CERT_NAME="relay",
                        AZURE_POD_IDENTITY_AUTHORITY_HOST=fake.url) as process:
            wait_for(lambda: fake.asked("imds"))
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)

    def test_a_signal_that_another_thread_gets(self) -> None:
        """It wakes the loop, as one does that comes just before the loop sleeps."""
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
    def test_more_connections_than_open_files(self) -> None:
        """The soft limit is raised. At the hard one clients are refused, and those inside all
        reach Microsoft.
        """
        code = ("import resource, smtp_oauth_relay as relay\n"
                "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 60))\nrelay.main([])")
        with start_python("-c", code, SMTP_PORT="0", LISTEN_ADDRESS="127.0.0.1",
                          TLS_SOURCE="off", REQUIRE_TLS="false", MAX_CONNECTIONS="200",
                          **self.endpoints) as process:
            port, clients, said = self.port(process), [], "220"
            while said.startswith("220"):
                sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
                self.addCleanup(sock.close)
                said = sock.recv(1000).decode()
                clients.append(sock)
            self.assertRegex(said, "^421 4.7.0 Too many connections for the limit of open ")
            self.assertGreater(len(clients), 10)
            for number, sock in enumerate(clients[:-1]):
                sock.sendall(b"EHLO x\r\n" + login_line() + b"MAIL FROM:<%d@x.y>\r\n"
                             b"RCPT TO:<a@x.y>\r\nDATA\r\n\r\n.\r\nQUIT\r\n" % number)
            for sock in clients[:-1]:
                self.assertRegex(last_octets(sock), rb"\r\n250 2\.0\.0 [^\r]+\r\n221 ")

    @unittest.skipUnless(relay.resource, "needs limits of open files")
    def test_limits_of_open_files(self) -> None:
        """They may have no end, as on macOS, and a sandbox may forbid to raise them."""
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

    def test_both_families_listen_on_one_port(self) -> None:
        """On one socket, and the log names IPv4 as such."""
        with self.serve(LISTEN_ADDRESS="") as process:
            port = self.port(process)
            for host in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
                smtplib.SMTP(host, port, "test", PATIENCE).close()
                self.assertIn(f"client={host} ", wait_for_line(process, " connected"))

    @unittest.skipUnless(sys.platform == "linux" and os.geteuid() == 0, "needs root")
    def test_root_becomes_run_as_after_reading_the_key(self) -> None:
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

    def test_a_sender_reaches_microsoft_without_any_setting_but_the_endpoints(self) -> None:
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
    """The demo works as printed, on a bare machine."""

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

    def test_a_scan_a_malformed_user_name_and_an_outbox_that_is_gone(self) -> None:
        folder = tempfile.mkdtemp(dir=FILES.folder)
        with start_program("demo", folder=folder, SMTP_PORT="0", RUN_AS="nobody") as process:
            found = re.search(r"port (\d+)", process.stdout.readline())
            with Client(int(found[1])) as client:
                client.ehlo()
                self.assertRegex(client.log_in("scanner", "x"), "^535 5.7.8 ")
                client.log_in()
                self.assertRegex(client.post_octets(LARGE, SENDER, ["a@x.y"]), "^250 ")
                path, = pathlib.Path(folder).glob("outbox/*.eml")
                self.assertTrue(path.read_bytes() == LARGE)
                shutil.rmtree(path.parent)
                self.assertRegex(client.post(), "^452 4.3.1 outbox/.*: No such ")

    def test_an_outbox_that_cannot_be_made(self) -> None:
        folder = tempfile.mkdtemp(dir=FILES.folder)
        (pathlib.Path(folder) / "outbox").write_text("in the way")
        with start_program("demo", folder=folder, SMTP_PORT="0") as process:
            _, err = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 1)
        self.assertIn("outbox", err)


class ExplainTests(unittest.TestCase):
    """What would become of a message, without any network."""

    def explain(self, message: bytes, *arguments: str, **environ: str) -> tuple[int, str]:
        """Run it; returns the exit status, and what it says."""
        path = FILES.folder / "message.eml"
        path.write_bytes(message)
        arguments = arguments or ("--from", SENDER, "--to", "a@x.y", "--to", "h@x.y")
        code, out, err = call_main("explain", str(path), *arguments, **environ)
        return code, out + err

    def test_a_message_that_would_be_sent(self) -> None:
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

    def test_a_message_that_stays_as_it_is_and_whom_it_reaches_beside_the_recipients(self) -> None:
        code, text = self.explain(crlf(NAMED + "\n.\n"), "--from", SENDER, "--to", "A@x.y")
        self.assertEqual((code, text.splitlines()[3:]),
                         (0, ["Edits:    none",
                              f"Path:     sendMail, {len(crlf(NAMED)) + 5} bytes"]))
        _, text = self.explain(crlf(FROM + "To: o@x.y\n\n"), HEADER_RECIPIENTS="keep")
        self.assertIn("  o@x.y  (To, not a recipient in SMTP)\n", text)
        self.assertNotIn("a@x.y  (Bcc, ", text)

    def test_a_dot_at_the_begin_and_addresses_beyond_ascii(self) -> None:
        for message, sender, size in ((b".\n", SENDER, 44), (b"..\n", "\u00fc@x.y", 32)):
            _, text = self.explain(message, "--from", sender, "--to", "a@x.y")
            self.assertIn(f"sendMail, {size} bytes", text)
        path = FILES.write("message.eml", "To: \u00fc <o@x.y>\n\n")
        with start_program("explain", path, "--from", SENDER, "--to", "a@x.y",
                           PYTHONIOENCODING="ascii") as process:
            self.assertIn("  - To: \\xfc <o@x.y>\n", process.communicate(timeout=PATIENCE)[0])

    def test_many_lines_that_are_the_same_are_no_edits(self) -> None:
        same = b"X: y\r\n" * 300
        self.assertEqual(list(relay._edits(same + b"To: o@x.y\r\n",
                                           b"Bcc: a@x.y\r\n" + same + b"Cc: o@x.y\r\n")),
                         ["  + Bcc: a@x.y", "  - To: o@x.y", "  + Cc: o@x.y"])

    def test_a_draft(self) -> None:
        message = crlf(multipart("mixed", multipart(
            "related", HTML, IMAGE), SCAN.replace("scan.pdf", "a=?utf-8?q?=0Ab?="), header=NAMED))
        code, text = self.explain(message)
        self.assertEqual(code, 0)
        self.assertIn("Path:     draft (over 3145728 bytes), ", text)
        self.assertTrue(text.endswith(
            "  ATT00001.png  (image/png, 4 bytes, in one request, inline)\n"
            "  a_b  (application/pdf, 3200000 bytes, by upload session)\n"), text)

    def test_a_message_that_would_be_refused(self) -> None:
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
            1, "Refused: 501 5.1.3 Syntax: TO:<address>, and the address must be complete as in "
               "user@example.com\n"))

    def test_what_cannot_be_told(self) -> None:
        for arguments, environ, word in (
                (("--from", SENDER), {}, "--to"), (("--to", "a@x.y"), {}, "--from"),
                (("--from", "a\r\nb", "--to", "a@x.y"), {}, "control"),
                (("--from", SENDER, "--to", "a@x.y>\r\nRSET"), {}, "control"),
                (("--from", SENDER, "--to", "a@x.y"), {"FROM_MISMATCH": "x"}, "FROM_MISMATCH")):
            with self.subTest(word):
                code, text = self.explain(b"", *arguments, **environ)
                self.assertEqual(code, 2)
                self.assertIn(word, text)
        code, _, err = call_main("explain", "no-such-file", "--from", "", "--to", "a@x.y")
        self.assertEqual(code, 2)
        self.assertIn("no-such-file", err)


class CommandLineTests(ProgramCase):
    """What the program says and how it ends."""

    def test_help_lists_every_variable_and_other_commands(self) -> None:
        status, out, _ = self.outcome("--help")
        self.assertEqual(status, 0)
        for name, one in relay.settings().items():
            self.assertIn(f"{name} (default: {one.default or 'empty'})", out)
        self.assertEqual(self.outcome("--version")[:2],
                         (0, f"smtp_oauth_relay.py {relay.__version__}\n"))
        self.assertEqual(self.outcome("frobnicate")[0], 2)

    def test_bad_settings_end_with_2(self) -> None:
        for command in ((), ("serve",), ("demo",)):
            status, _, err = self.outcome(*command, SMTP_PORT="x", LOG_LEVEL="loud")
            self.assertEqual(status, 2)
            self.assertIn("SMTP_PORT='x'", err)
            self.assertIn("LOG_LEVEL='loud'", err)

    def test_what_cannot_be_had_ends_with_1_and_one_line(self) -> None:
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
    def test_a_user_that_root_may_not_become(self) -> None:
        """As where a container has no right to change users."""
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
        self.assertIn(f"run-as={user} ", kept.find("stays")[0][1])

    @unittest.skipIf(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0),
                     "root reads every file")
    def test_a_key_that_may_not_be_read(self) -> None:
        os.chmod(FILES["other.pem"], 0)
        self.addCleanup(os.chmod, FILES["other.pem"], 0o600)
        status, _, err = self.outcome(TLS_CERT_FILEPATH=FILES["cert.pem"],
                                      TLS_KEY_FILEPATH=FILES["other.pem"])
        self.assertEqual(status, 1)
        self.assertIn("Permission denied", err)


class AccountCommandTests(ProgramCase):
    """The commands about accounts, and a start with accounts."""

    def test_encode(self) -> None:
        for tenant, environ, wanted in (
                (TENANT, {}, f"{SHORT_TENANT}@{SHORT_CLIENT}\n"),
                (SHORT_TENANT, {"USERNAME_DELIMITER": "|"}, f"{SHORT_TENANT}|{SHORT_CLIENT}\n"),
                ("Contoso.com", {}, f"contoso.com@{SHORT_CLIENT}\n")):
            self.assertEqual(self.outcome("encode", tenant, CLIENT, **environ), (0, wanted, ""))
        for arguments in ((TENANT, "x"), ("x", CLIENT), (TENANT, "contoso.com")):
            status, out, err = self.outcome("encode", *arguments)
            self.assertEqual((status, out), (2, ""))
            self.assertIn("the ID of", err)

    def test_hash_password_from_a_pipe(self) -> None:
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
    def test_hash_password_asks_twice_and_shows_nothing(self) -> None:
        for second, status in ((PASSWORD, 0), ("other", 2)):
            terminal, other = os.openpty()
            process = subprocess.Popen([sys.executable, str(PROGRAM), "hash-password"],
                                       stdin=other, stdout=subprocess.PIPE, stderr=other,
                                       start_new_session=True)      # so without /dev/tty
            os.close(other)
            said = b""
            for prompt, answer in ((b"Password: ", PASSWORD), (b"Again: ", second)):
                while prompt not in said:
                    said += os.read(terminal, 1000)
                os.write(terminal, answer.encode() + b"\n")
            out, _ = process.communicate(timeout=PATIENCE)
            with contextlib.suppress(OSError):
                while part := os.read(terminal, 1000):
                    said += part
            os.close(terminal)
            self.assertEqual(process.returncode, status)
            self.assertNotIn(PASSWORD.encode(), said + out)
            with unittest.mock.patch.object(relay, "SCRYPT_COST", REAL_COST):
                self.assertEqual(
                    not status and relay.verify_password(PASSWORD, out.decode().strip()),
                    not status)

    def test_accounts(self) -> None:
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
login = optional
require_tls = false
tls_min_version = 1.0

[direct@example.com]
tenant_id = {TENANT}
client_id = {CLIENT}
login = required
"""))
        text = EXAMPLE.replace("client_secret = s3cr~t._-", f"client_secret_file = {secret}")
        _, out, _ = self.outcome("accounts", ACCOUNTS_FILE=FILES.write("listed2.ini", text))
        self.assertIn(f"\nclient_secret_file = {secret}\npassword", out)
        self.assertNotIn("client_secret = ", out)

    def test_accounts_of_an_address(self) -> None:
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

    def test_what_cannot_be_listed(self) -> None:
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
    def test_a_file_that_all_may_read_is_warned_about(self) -> None:
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
                              for _, line in kept.find("accounts")], [file] if file else [])

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")
    def test_sighup_reads_the_accounts_again_at_once(self) -> None:
        path = FILES.write("hup.ini", EXAMPLE)
        with start_program(ACCOUNTS_FILE=path, TLS_SOURCE="off", REQUIRE_TLS="false",
                           SMTP_PORT="0", LISTEN_ADDRESS="127.0.0.1") as process:
            wait_for_line(process, "listening")
            FILES.write("hup.ini", EXAMPLE.replace("[scan2]", "[scan3]"))
            process.send_signal(signal.SIGHUP)
            wait_for_line(process, "loaded=2")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0)

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_what_another_user_cannot_read_again_is_warned_about(self) -> None:
        path = FILES.write("own.ini", EXAMPLE)
        os.chmod(path, 0o600)
        with start_program(ACCOUNTS_FILE=path, TLS_SOURCE="off", REQUIRE_TLS="false",
                           SMTP_PORT="0", LISTEN_ADDRESS="127.0.0.1",
                           RUN_AS="nobody") as process:
            lines = wait_for_line(process, "listening")
        self.assertRegex(lines, "WARNING - accounts file=.*own.ini problem=.*RUN_AS")


class FuzzTests(unittest.TestCase):
    """A short run of the fuzzer and of the soak."""

    maxDiff = None

    def seeds(self, *fixed: str) -> tuple[str, ...]:
        """Some that are always the same, and one that is not."""
        return (*fixed, str(random.SystemRandom().randrange(10 ** 9)))

    def test_dialogues(self) -> None:
        for seed in self.seeds("1", "2"):
            for number in range(150):
                self.assertEqual("", fuzz_dialogue(f"{seed}.{number}"),
                                 f"fuzz --seed {seed} --only dialogue:{number}")

    def test_rounds(self) -> None:
        for seed in self.seeds("1"):
            self.assertEqual([], fuzz_round(f"{seed}.0", timeout=SHORT),
                             f"fuzz --seed {seed} --only round:0")

    @unittest.skipUnless(relay.fcntl, "needs locks of files")
    def test_rounds_with_a_spool(self) -> None:
        for seed in self.seeds("1"):
            self.assertEqual([], fuzz_spool(f"{seed}.0", SHORT),
                             f"fuzz --seed {seed} --only spool:0")

    def test_a_soak(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual([], soak(1, "3", SHORT))
        self.assertRegex(said.getvalue(), "(?m)^end after .* [1-9][0-9]* accepted")


# ---------------------------------------------------------------------------
# Long looks: fuzz, soak, kill, and running the tests

class Kills:
    """Kills a relay again and again while mail flows, and counts what arrives.

    Laws: what was answered 250 arrives; no life of the relay sends a message twice.
    """

    def __init__(self, seed: str) -> None:
        self.chance = random.Random(seed)
        self.fate = random.Random(seed)         # of each life; no other thread draws from it
        self.fake = FakeMicrosoft()
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=FILES.folder))
        self.accepted: dict[str, str] = {}      # by subject, what was said
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
        """Do what Microsoft does; the token says in which life of the relay it was asked."""
        with self.fake._lock:
            luck, pause = self.chance.random(), self.chance.random() / 50
        if luck < 0.4:
            return say(503)(sock, request)
        subject = re.search(rb"Subject: (\S+)", base64.b64decode(request.body))
        if subject is None:                     # the relay was killed within the request
            return False
        with self.fake._lock:
            self.arrived[subject[1].decode(), request.headers["authorization"]] += 1
        if luck < 0.7:
            self.is_over.wait(pause)            # so that it is killed meanwhile
        return self.fake.accept(sock, request)

    def start(self, left: int = 0) -> Any:
        """Start the relay; after `left` things done to the disk it is dead, 0: never."""
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
                dead.wait(0.005)                # it has not begun, or is killed

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
        is_exact = self.fate.random() < 0.6
        end = len(self.accepted) + (60 if is_exact else self.fate.randrange(30))
        with self.start(self.fate.randrange(1, 120) if is_exact else 0) as process:
            for one in senders:
                one.start()
            wait_for(lambda: len(self.accepted) >= end or process.poll() is not None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.fate.random() / 20)
            dead.set()
            self.end(process, signal.SIGKILL)
        for one in senders:
            one.join(PATIENCE)

    def is_up(self) -> bool:
        """See whether the relay accepts connections; then it can be stopped too."""
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    def end(self, process: subprocess.Popen[str], number: int) -> None:
        """End the relay; its log has errors only, and there must be none."""
        process.send_signal(number)
        log = process.communicate(timeout=PATIENCE)[1]
        if log:
            raise AssertionError(log)

    def run(self, times: int) -> str:
        """Kill it so often, then let it end its work; returns what happened."""
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
        lives = collections.Counter(subject for subject, _ in self.arrived)
        lost = sorted(self.accepted.keys() - lives.keys())
        twice = [one for one, count in self.arrived.items() if count > 1]
        left = [str(path) for path in self.folder.glob("*/*")]
        queued = sum("Queued" in reply for reply in self.accepted.values())
        more = sum(lives[subject] - 1 for subject in self.accepted)
        told = (f"kills {times}, sent {self.sent}, answered 250 {len(self.accepted)} (queued "
                f"{queued}), of these lost {len(lost)}, sent again after a kill {more}, twice "
                f"in one life {len(twice)}; files left {len(left)}")
        if lost or twice or left:
            raise AssertionError(f"{told}: {lost} {twice} {left}")
        return told


#
#     python3 test_relay.py fuzz --seconds 600 --seed 7      what nobody thought of
#     python3 test_relay.py fuzz --seed 7 --only dialogue:12345
#     python3 test_relay.py soak --seconds 1200              does it last?
#
# The fuzzer has two parts. Dialogues, as sensible as a client's and then damaged, go to
# Session in several ways of cutting them into packets; Model says what must come of the same
# octets. Rounds of traffic go through a whole relay, with a FakeMicrosoft that fails as often
# as it can; Law says for each message how often it may have been sent. A dialogue and a round
# come of the seed and their number alone (a round's threads do not).

class Violation(Exception):
    """Something is not as it must be."""


class Scene(NamedTuple):
    """Where a dialogue is played."""

    offers_tls: bool
    require_tls: bool
    guest: bool             # whether the client may send without login
    secure: bool            # whether TLS is on from the start
    size: int               # MAX_MESSAGE_SIZE
    memory: int             # what is left of MAX_MEMORY_FOR_MESSAGES


class Decisions:
    """What becomes of the logins and the messages of a dialogue, one after the other."""

    def __init__(self, chance: random.Random) -> None:
        weights = chance.choice(((12, 3, 2, 1), (12, 3, 2, 1), (1, 8, 1, 0)))
        self.logins = chance.choices((235, 535, 454, 421), weights, k=50)
        self.messages = chance.choices((250, 451, 550, 554, 421), (12, 2, 1, 3, 1), k=50)
        self.asked: collections.Counter[str] = collections.Counter()

    def __call__(self, session: relay.Session, event: relay.Event) -> None:
        kind = type(event).__name__
        number, self.asked[kind] = self.asked[kind] % 50, self.asked[kind] + 1
        code = (self.logins if kind == "Authenticate" else self.messages)[number]
        if kind in ("StartTls", "Close") or code in (235, 250):
            accept(session, event)
        else:
            session.refuse(relay.Reply(code, f"{code // 100}.7.0", "No", close=code == 421))


ANYWHERE = "cold ready mail rcpt"
# verb: where it is in order, whether it wants an argument, TLS, a login
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
    """What must come of the octets of a dialogue, told from RFC 5321 and the README.

    It walks through the octets once, a line or a message at a time, and takes a reply and
    the events for each from what the session said. An argument that is not of the tables
    may be answered as one that is right or as one that is wrong.
    """

    def __init__(self, scene: Scene, octets: bytes, ends: list[int], *, eof: bool) -> None:
        self.scene, self.octets, self.ends, self.eof = scene, octets, ends, eof
        self.decisions: Decisions
        self.pos = 0
        self.phase, self.secure = "cold", scene.secure
        self.login = "guest" if scene.guest else ""
        self.closed = False
        self.cost = self.lines = self.asked_logins = self.asked_messages = 0
        self.mechanism, self.answers = "", [""]
        self.sender: str | bytes = ""
        self.utf8 = False
        self.recipients: dict[str, str] = {}
        self.unsure: list[bytes] = []       # lines with recipients that the tables lack
        self.walls: list[tuple[int, int]] = []      # what STARTTLS let be forgotten

    def judge(self, said: bytes, events: list[relay.Event], decisions: Decisions) -> None:
        """Compare with what a session said and asked. Raises Violation."""
        self.decisions = decisions
        self.replies = collections.deque(read_replies(said))
        self.events = collections.deque(events)
        self.step: Callable[[bytes], None] = self.command
        while not self.closed:
            if not self.secure and not self.lines and self.octets[:2] == b"\x16\x03":
                self.close()
                break
            end = self.octets.find(b"\r\n", self.pos)
            line = self.octets[self.pos:end] if end >= 0 else self.octets[self.pos:]
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
            raise Violation(f"more than was asked for: {self.replies} {self.events}")

    def reply(self, *wanted: int, what: object = "") -> int:
        """Take a reply; a session that gets nowhere is told so in one more."""
        code, lines = self.take(what, *wanted)
        if code not in (220, 334, 354, 421, 452, 550) and not lines[0].startswith("2.1.5 "):
            self.cost += 34 if code == 535 else 10 if 500 <= code < 550 or code in (553, 555) else 1
        if self.cost >= 100:
            self.take("no progress", 421)
            self.close()
        return code

    def take(self, what: object, *wanted: int) -> tuple[int, list[str]]:
        if not self.replies:
            raise Violation(f"no reply, where {wanted} must be: {what!r}")
        code, lines = self.replies.popleft()
        if code not in wanted:
            raise Violation(f"{code} {lines} in place of {wanted}: {what!r}, {self.phase}")
        is_bare = code in (334, 354) or (code == 250 and not re.match(r"2\.", lines[0]))
        if not is_bare and not re.match(rf"{code // 100}\.[0-9]\.[0-9]+ ", lines[0]):
            raise Violation(f"no enhanced status code, or a wrong one: {code} {lines}")
        return code, lines

    def event(self, kind: type) -> Any:
        if not self.events or not isinstance(self.events[0], kind):
            raise Violation(f"no {kind.__name__} at octet {self.pos}, but {self.events}")
        return self.events.popleft()

    def close(self) -> None:
        self.event(relay.Close)
        self.closed = True

    def command(self, line: bytes) -> None:
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line):
            self.reply(500, what=line[:50])
            return
        verb, _, argument = line.rstrip(b" \t").partition(b" ")
        verb = verb.upper()
        if verb in HTTP:
            self.take(line, 421)
            self.close()
            return
        code = self.out_of_order(verb, argument)
        if code:
            self.reply(code, what=line[:50])
        elif verb in FIXED_REPLIES:
            self.reply(FIXED_REPLIES[verb], what=line[:50])
        else:
            getattr(self, f"do_{verb.decode().lower()}")(argument, line)

    def out_of_order(self, verb: bytes, argument: bytes) -> int:
        if verb not in RULES:
            return 500
        phases, wants_argument, wants_tls, wants_login = RULES[verb]
        if wants_tls and self.scene.require_tls and not self.secure:
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
        self.reply(250, what=line)
        wanted = {"relay.test", f"SIZE {self.scene.size}", "PIPELINING", "8BITMIME", "SMTPUTF8",
                  "ENHANCEDSTATUSCODES", "HELP"}
        wanted |= {"STARTTLS"} if self.scene.offers_tls and not self.secure else set()
        wanted |= {"AUTH PLAIN LOGIN"} if self.secure or not self.scene.require_tls else set()
        if set(lines) != wanted or len(lines) != len(wanted):
            raise Violation(f"EHLO says {lines}")
        self.phase = "ready"
        self.forget()

    def do_helo(self, argument: bytes, line: bytes) -> None:
        self.reply(250, what=line)
        self.phase = "ready"
        self.forget()

    def do_rset(self, argument: bytes, line: bytes) -> None:
        self.reply(250, what=line)
        self.forget()

    def do_quit(self, argument: bytes, line: bytes) -> None:
        self.take(line, 221)
        self.close()

    def do_starttls(self, argument: bytes, line: bytes) -> None:
        if self.secure or not self.scene.offers_tls:
            self.reply(503 if self.secure else 502, what=line)
            return
        self.reply(220, what=line)
        self.event(relay.StartTls)
        self.phase, self.secure = "cold", True
        self.login = "guest" if self.scene.guest else ""
        self.forget()
        end = next(end for end in self.ends if end >= self.pos)
        self.walls.append((self.pos, end))
        self.pos = end

    def do_auth(self, argument: bytes, line: bytes) -> None:
        if self.login == "user":
            self.reply(503, what=line)
            return
        name, _, initial = argument.partition(b" ")
        self.mechanism, self.answers = name.decode("latin-1").upper(), []
        if self.mechanism not in ("PLAIN", "LOGIN"):
            self.reply(504, what=line)
        elif initial:
            self.auth_answer(b"" if initial == b"=" else initial)
        else:
            self.challenge()

    def challenge(self) -> None:
        wanted = {"PLAIN": [""], "LOGIN": ["VXNlcm5hbWU6", "UGFzc3dvcmQ6"]}
        _, lines = self.take("AUTH", 334)
        if lines != [wanted[self.mechanism][len(self.answers)]]:
            raise Violation(f"a challenge {lines}")
        self.step = self.auth_answer

    def auth_answer(self, line: bytes) -> None:
        self.step = self.command
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line):
            self.reply(500, what=line[:50])
            return
        # Of those within AUTH the line with the verb was checked.
        if line == b"*" or len(line) % 4 or not re.fullmatch(rb"[A-Za-z0-9+/]*={0,2}", line):
            self.reply(501, what=line[:50])
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
            user, password = (one.encode("latin-1").decode() for one in answers)
        except ValueError:
            self.reply(501, what=line[:50])
            return
        self.log_in(user, password)

    def log_in(self, user: str, password: str) -> None:
        event = self.event(relay.Authenticate)
        if (event.username, event.password) != (user, password):
            raise Violation(f"{event} {event.password} in place of {user!r} {password!r}")
        code = self.decisions.logins[self.asked_logins % 50]
        self.asked_logins += 1
        if code == 235:
            self.login, self.cost = "user", 0
        self.reply(code, what="a login")
        self.forget()
        if code == 421:
            self.close()

    def do_mail(self, argument: bytes, line: bytes) -> None:
        text = argument.decode("utf-8", "replace")
        code, mailbox = MAIL_ARGUMENTS.get(text, (0, ""))
        if not code:
            code = self.reply(250, 501, 552, 553, 550, 555, 452, what=line[:80])
            self.sender = line
        else:
            if code == 550 and self.login == "user":
                code = 250
            if self.scene.memory < 100 and "SIZE=100" in text and code == 250:
                code = 452
            self.reply(code, what=line)
            self.sender = mailbox
        if code == 250:
            self.phase, self.utf8 = "mail", b"SMTPUTF8" in line.upper()

    def do_rcpt(self, argument: bytes, line: bytes) -> None:
        code, mailbox, key = RCPT_ARGUMENTS.get(argument.decode("utf-8", "replace"), (0, "", ""))
        # A sender that the tables lack may have come with SMTPUTF8 or without.
        is_loose = not code or (code == 553 and isinstance(self.sender, bytes))
        if code == 553 and self.utf8:
            code = 250
        if code == 550 and self.login == "user":
            code = 250
        if code == 250 and key not in self.recipients:
            most = len(self.recipients) + len(self.unsure)
            if len(self.recipients) >= MOST_RECIPIENTS:
                code = 452
            is_loose = is_loose or most >= MOST_RECIPIENTS > len(self.recipients)
        if is_loose:
            if self.reply(250, 452, 501, 550, 553, 555, what=line[:80]) == 250:
                self.phase = "rcpt"
                self.unsure.append(line)
        elif self.reply(code, what=line) == 250:
            self.phase = "rcpt"
            self.recipients.setdefault(key, mailbox)

    def do_data(self, argument: bytes, line: bytes) -> None:
        self.reply(354, what=line)
        end = self.octets.find(b"\r\n.\r\n", self.pos - 2)
        if end < 0:
            self.pos = len(self.octets)
            return
        lines = self.octets[self.pos:max(self.pos, end + 2)].split(b"\r\n")
        text = b"\r\n".join(one[1:] if one[:1] == b"." else one for one in lines)
        message = re.sub(rb"\r\n|\r|\n", b"\r\n", text)
        self.pos = end + 5
        refusals = [code for code, most in ((552, self.scene.size), (452, self.scene.memory))
                    if len(message) > most]
        if refusals:
            self.reply(*refusals, what=f"a message of {len(message)} octets")
        else:
            self.deliver(message)
        self.forget()

    def deliver(self, message: bytes) -> None:
        envelope = self.event(relay.Deliver).envelope
        if bytes(envelope.message) != message:
            raise Violation(f"message {bytes(envelope.message)[:200]!r} and not "
                            f"{message[:200]!r}")
        self.check_envelope(envelope)
        code = self.decisions.messages[self.asked_messages % 50]
        self.asked_messages += 1
        self.cost = 0 if code == 250 else self.cost
        self.reply(code, what="a message")
        if code == 421:
            self.close()

    def check_envelope(self, envelope: relay.Envelope) -> None:
        sender = envelope.reverse_path
        is_right = (sender == self.sender if isinstance(self.sender, str) else
                    sender.encode("utf-8", "surrogateescape") in self.sender)
        found = dict(envelope.recipients)
        if not is_right or (not self.unsure and list(found.values()) != list(
                self.recipients.values())):
            raise Violation(f"{envelope} and not {self.sender!r} {self.recipients}")
        others = set(found.values()) - set(self.recipients.values())
        if not set(self.recipients) <= set(found) or len(others) > len(self.unsure) or not all(
                any(one.encode("utf-8", "surrogateescape") in line for line in self.unsure)
                for one in others):
            raise Violation(f"{envelope} and not {self.recipients} and of {self.unsure}")


def read_replies(said: bytes) -> list[tuple[int, list[str]]]:
    """Read replies as codes and lines. Raises Violation if one is malformed."""
    try:
        found = codes(said)
    except ValueError as error:
        raise Violation(str(error)) from None
    replies: list[tuple[int, list[str]]] = []
    begun: list[tuple[int, str]] = []
    for line in said.decode().split("\r\n")[:-1]:
        begun.append((int(line[:3]), line[4:]))
        if line[3] == " ":
            if len({code for code, _ in begun}) > 1:
                raise Violation(f"several codes in one reply: {begun}")
            replies.append((begun[0][0], [text for _, text in begun]))
            begun = []
    if begun or [code for code, _ in replies] != found:
        raise Violation(f"half a reply: {begun}")
    return replies


def make_scene(chance: random.Random) -> Scene:
    """Choose where a dialogue is played."""
    offers_tls = chance.random() < 0.8
    # Of a message that is above both limits it is the first packet above one that decides.
    size, memory = chance.choice(((1200, 10 ** 9), (36_700_160, 10 ** 9), (36_700_160, 1000),
                                  (36_700_160, 50)))
    return Scene(offers_tls, offers_tls and chance.random() < 0.6, chance.random() < 0.2,
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
    """Make the octets of a client that mostly knows what it does, and then damage them."""
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
    octets = b"".join(parts)
    if chance.random() < 0.5:
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            octets = damage(octets, chance)
    return octets


CONTENT_LINES = (b"", b"", b"text", b"..", b"...", b"..x", b".x", b"a.b", b"x.", b"\n.", b"\r.",
                 b".\n", b".\r", b"a\nb", b"a\rb", b"\r", b"\n", b"\0", b"\xff\xfe", b".\0",
                 b"Subject: s", b"x" * 998, b"QUIT", b"\r\r", b"\n\n", b". ", b"RSET\n.\n")


def make_transaction(chance: random.Random) -> Iterator[bytes]:
    """Make the commands of a message; most are right."""
    def pick(table: dict[str, Any]) -> bytes:
        right = [one for one, row in table.items() if row[0] == 250]
        return chance.choice(right if chance.random() < 0.8 else list(table)).encode()
    yield chance.choice((b"MAIL ", b"mail ")) + pick(MAIL_ARGUMENTS) + b"\r\n"
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        yield b"RCPT " + pick(RCPT_ARGUMENTS) + chance.choice((b"\r\n", b"\r\n", b" \r\n"))
    if chance.random() < 0.1:
        yield b"RSET\r\n"
    yield b"DATA\r\n"
    lines = chance.choices(CONTENT_LINES, k=chance.choice((0, 1, 2, 5, 20)))
    yield b"\r\n".join(lines) + b"\r\n" * (bool(lines) and chance.random() < 0.9) + b".\r\n"


def damage(octets: bytes, chance: random.Random) -> bytes:
    """Change a little, at a random place."""
    begin = chance.randrange(len(octets) + 1)
    end = min(len(octets), begin + chance.choice((1, 1, 1, 2, 5, 30)))
    piece, wild = octets[begin:end], bytes([chance.randrange(256)])
    new = chance.choice((
        b"", piece * 2, piece[::-1], wild, piece + wild, b"\r" + piece, b"\n" + piece, b"\0",
        b"\r\n" + piece, b"\r\n.\r\n" + piece, b"." + piece, b"\xff" + piece, b"\r\n.",
        piece.swapcase(), bytes(one ^ 1 << chance.randrange(8) for one in piece),
        piece + b"z" * chance.choice((10, 2000, 13_000)), b" " + piece, b"\r\n..\r\n"))
    if chance.random() < 0.05:
        return octets[:begin]
    return octets[:begin] + new + octets[end:]


def make_cuts(octets: bytes, chance: random.Random) -> list[int]:
    """Choose where packets end."""
    size = len(octets)
    style = chance.randrange(6)
    if style == 0:
        return []
    if style == 1 and size < 3000:
        return list(range(1, size))
    if style == 2:                          # next to what matters
        near = [match.start() + chance.randrange(2) for match in re.finditer(rb"[\r\n.]", octets)]
        return sorted({one for one in near if 0 < one < size and chance.random() < 0.6})
    if style == 3:
        return list(range(7, size, chance.choice((7, 64, 512, 4096))))
    return sorted({chance.randrange(size + 1) for _ in range(chance.randrange(9))} - {0, size})


@functools.cache
def config_of(offers_tls: bool, require_tls: bool, size: int) -> relay.Config:
    """The settings of a scene."""
    return make_config(TLS_SOURCE="file" if offers_tls else "off", MAX_RECIPIENTS=str(
        MOST_RECIPIENTS), REQUIRE_TLS=str(require_tls).lower(), MAX_MESSAGE_SIZE=str(size))


GUEST_OF_TESTS = relay.Principal(relay.Account("guest", allowed_senders=("a@b.c",),
                                           allowed_recipients=("d@e.f", "ok.example")),
                             relay.Application("", ""), "")


class Play:
    """A dialogue that is played to a session of its own."""

    def __init__(self, scene: Scene, chance: random.Random, octets: bytes, cuts: list[int]) -> None:
        self.scene, self.octets = scene, octets
        self.ends = [*cuts, len(octets)]
        self.memory = relay.MemoryBudget(scene.memory)
        self.decisions = Decisions(chance)
        self.dialogue = Dialogue(
            config_of(scene.offers_tls, scene.require_tls, scene.size), secure=scene.secure,
            answer=self.decisions, memory=self.memory,
            guest=GUEST_OF_TESTS if scene.guest else None)

    def run(self, late: random.Random | None = None, *, eof: bool, packets: int = -1) -> None:
        """Feed packets, all or so many; with `late` answers to events come late."""
        session, waiting = self.dialogue.session, collections.deque[relay.Event]()
        if late:
            self.dialogue.answer = lambda session, event: waiting.append(event)

        def answer() -> None:
            while waiting and not self.dialogue.closed:
                self.decisions(session, waiting.popleft())
                self.dialogue.work()
        begin = 0
        for end in self.ends[:packets if packets >= 0 else None]:
            self.dialogue.feed(self.octets[begin:end])
            begin = end
            if late and late.random() < 0.5:
                answer()
            if not waiting and not self.dialogue.closed and len(session._buffer) > 12_290:
                raise Violation(f"{len(session._buffer)} octets are kept of a line")
        if packets < 0:
            answer()
            if eof:
                session.receive(b"")
                self.dialogue.work()
                answer()
        else:
            session.reset()

    def check_memory(self) -> None:
        """Whatever ended the dialogue, no octet is counted any more."""
        self.dialogue.session.reset()
        if self.memory.free != self.scene.memory:
            raise Violation(f"{self.scene.memory - self.memory.free} octets of memory are "
                            "not given back")


def check_dialogue(scene: Scene, octets: bytes, seed: str) -> None:
    """Play a dialogue in several ways. Raises Violation, or what the session raises."""
    chance = random.Random(seed)
    eof, destiny = chance.random() < 0.5, chance.random()

    def play(cuts: list[int], **options: Any) -> Play:
        one = Play(scene, random.Random(destiny), octets, cuts)
        one.run(eof=eof, **options)
        one.check_memory()
        return one
    first = play(make_cuts(octets, chance))
    model = Model(scene, octets, first.ends, eof=eof)
    model.judge(first.dialogue.said, first.dialogue.events, first.decisions)
    # What follows STARTTLS in its packet is forgotten: these packets stay as they are.
    cuts = [one for one in make_cuts(octets, chance)
            if not any(begin <= one < end for begin, end in model.walls)]
    cuts = sorted({*cuts, *(end for _, end in model.walls)} - {len(octets)})
    second = play(cuts, late=None if model.walls else chance)
    if (first.dialogue.said, first.dialogue.events) != (second.dialogue.said,
                                                        second.dialogue.events):
        raise Violation(f"other packets, another outcome: {first.dialogue.said!r} "
                        f"{first.dialogue.events}; {second.dialogue.said!r} "
                        f"{second.dialogue.events}")
    # And the same from a client that vanishes in between.
    third = play(first.ends[:-1], packets=chance.randrange(len(first.ends) + 1),
                 late=None if model.walls else chance)
    if not first.dialogue.said.startswith(third.dialogue.said):
        raise Violation(f"a part of it says {third.dialogue.said!r}")


def shrink(octets: bytes, is_bad: Callable[[bytes], bool]) -> bytes:
    """Leave out what can be left out of a dialogue that shows a defect."""
    size = max(1, len(octets) // 2)
    while size:
        begin = 0
        while begin < len(octets):
            shorter = octets[:begin] + octets[begin + size:]
            if is_bad(shorter):
                octets = shorter
            else:
                begin += size
        size //= 2
    return octets


def find_problem(scene: Scene, octets: bytes, seed: str) -> str:
    """Say what is wrong with the play of a dialogue, or ""."""
    try:
        check_dialogue(scene, octets, seed)
    except Violation as error:
        return f"{error}"
    except Exception as error:              # noqa: BLE001 - a session must raise none
        return f"{type(error).__name__}: {error}"
    return ""


def fuzz_dialogue(seed: str) -> str:
    """Play the dialogue of a seed; returns what is wrong and how to see it again, or ""."""
    chance = random.Random(seed)
    scene, octets = make_scene(chance), make_dialogue(chance)
    problem = find_problem(scene, octets, seed)
    if not problem:
        return ""
    least = shrink(octets, lambda one: bool(find_problem(scene, one, seed)))
    return (f"{problem}\n  of {octets!r}\n  in short {find_problem(scene, least, seed)}\n  of\n"
            f"  find_problem({scene}, {least!r}, {seed!r})")


# The whole relay. What a message's end must be is in Law and nowhere else.

class Take(NamedTuple):
    """A message that Microsoft took."""

    ident: str              # client-request-id; the client hears it too
    mailbox: str
    recipients: list[str]
    is_whole: bool          # whether the content is what the client sent


@dataclasses.dataclass
class Story:
    """What became of a message, which is known by its marker."""

    marker: str
    sender: str
    recipients: list[str]
    message: bytes
    # Faults to come, by what is asked; then all is well.
    plan: dict[str, collections.deque[str]] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)         # that came
    began: list[float] = dataclasses.field(default_factory=list)        # not yet answered
    heard: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # reply, id
    unheard: int = 0        # how often it was sent to its end, but no reply was heard
    takes: list[Take] = dataclasses.field(default_factory=list)
    # How often it was taken without a word, by id: the relay cannot know.
    unknown: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    is_calm: bool = True    # nothing is planned for it, nor for the login
    is_identified: bool = False     # by Message-ID and Date
    ended: float = 0.0


# What may be heard without a fault of its own: a fault of others took the turns, or all the
# time there was, or a connection.
CALM = ("250 2.", "451 4.4.1", "451 4.4.5", "451 4.7.0")

# With these Microsoft refuses a message, or a login, or says to wait for long.
FOR_GOOD = ("200", "302", "400", "403", "never", "refused")


class Law:
    """How often a message may have reached Microsoft, by what its client heard.

    250: once; with `at_least_once` again for each time that Microsoft took it and did not
    say so. Refused: never; but once if Microsoft took it and did not say so. Unheard: as if
    either had been heard. An identified message that a client sends again: once in all. And
    always from the sender, to the recipients, and whole. A message is known to Microsoft by
    the id that is in the reply.
    """

    def __init__(self, *, at_least_once: bool = False) -> None:
        self.at_least_once = at_least_once

    def possible(self, faults: Iterable[str]) -> tuple[str, ...]:
        """What may happen to a request: what was promised must be possible, and soon."""
        return tuple(one for one in faults
                     if not (self.at_least_once and one.split()[-1] in FOR_GOOD))

    def judge(self, story: Story) -> Iterator[str]:
        """Say what is wrong with the end of a story."""
        taken = collections.Counter(take.ident for take in story.takes)
        for reply, ident in story.heard:
            if reply[:3] == "250" and not taken[ident]:
                yield f"lost, but answered {reply}"
            if taken[ident] > self.most(reply[:3] == "250", story.unknown[ident]):
                yield f"taken {taken[ident]} times, but answered {reply}"
        heard = collections.Counter(ident for reply, ident in story.heard if reply[:3] == "250")
        if not story.is_identified and any(number > 1 for number in heard.values()):
            yield "answered as a duplicate, although nothing identifies it"
        if story.is_identified and len(story.takes) > 1 + sum(story.unknown.values()):
            yield "sent twice, although it is identified"
        others = set(taken) - {ident for _, ident in story.heard}
        if len(others) > story.unheard:
            yield f"taken as {others}, of which no client knows"
        if any(taken[ident] > self.most(True, story.unknown[ident]) for ident in others):
            yield f"taken too often by clients that left: {taken}"
        wanted = (story.sender, sorted(story.recipients), True)
        for take in story.takes:
            if take[1:] != wanted:
                yield f"taken as {take}, not as {wanted}"
        if story.is_calm:
            yield from (f"nothing was wrong with it, but answered {reply}"
                        for reply, _ in story.heard if not reply.startswith(CALM))

    def is_late(self, story: Story, arrived: float, timeout: float) -> bool:
        """Whether the relay may have given up when Microsoft took a message.

        Its time is for the whole of a message; what is sent later has a time of its own.
        """
        begun = arrived if self.at_least_once and not story.began else min(story.began, default=0.0)
        return time.monotonic() - min(begun, arrived) > timeout / 2

    def most(self, is_accepted: bool, unknown: int) -> int:
        """How often a message may have been taken."""
        if is_accepted:
            return 1 + unknown * self.at_least_once
        return unknown if self.at_least_once else min(unknown, 1)


class FaultyMicrosoft(FakeMicrosoft):
    """Fails as it is planned for each message and each login."""

    def __init__(self, timeout: float, law: Law) -> None:
        self._timeout, self.law = timeout, law      # UPSTREAM_TIMEOUT of the relay
        self.stories: dict[str, Story] = {}
        self.logins: dict[str, collections.deque[str]] = {}
        self.strangers: list[str] = []  # requests for messages that nobody sent
        self.unknown_drafts = 0         # made without a word
        super().__init__()

    def accept(self, sock: socket.socket, request: Request) -> bool:
        self.requests.clear()           # they would add up
        self.delivered.clear()
        arrived = time.monotonic()
        if request.kind == "token":
            return self._answer_token(sock, request)
        story = self.stories.get(self._marker(request))
        if story is None:
            self.strangers.append(f"{request.kind} {request.path} {request.body[:3000]!r}")
            return super().accept(sock, request)
        fault = next_of(story.plan.get(request.kind))
        if fault:
            story.faults.append(f"{request.kind} {fault}")
        if fault == "slow":
            self.release.wait(self._timeout / 6)
        action: Action = utter(b"")
        kind, _, rest = fault.partition(" ")
        if kind in ("", "slow", "then", "taken", "202"):
            action = answer = self._take(request, story)
            # The relay cannot know of it, or hears of it too late.
            if answer.status in (201, 202) and (kind == "taken" or self.law.is_late(
                    story, arrived, self._timeout)):
                self.unknown_drafts += request.kind == "draft"
                if request.kind in ("send", "send-draft"):
                    story.unknown[request.headers["client-request-id"]] += 1
        action = self._action(rest if kind == "taken" else fault, action)
        return action(sock, request) and fault != "then close"

    def _action(self, fault: str, otherwise: Action) -> Action:
        return {"expire": self.expire, "hang": self._hang, **ANSWERS, **SAID_202}.get(
            fault, otherwise)

    def _hang(self, sock: socket.socket, request: Request) -> bool:
        self.release.wait(3 * self._timeout)
        return False

    def _take(self, request: Request, story: Story) -> Answer:
        """Do what Microsoft does when all is well, and keep what it took."""
        answer = self.answer(request)
        if answer.status == 202:
            ident = request.headers["client-request-id"]
            if request.kind == "send":
                message = base64.b64decode(request.body)
                story.takes.append(Take(
                    ident, request.part(3), sorted(named_by(message)),
                    message.partition(b"\r\n\r\n")[2] == story.message.partition(b"\r\n\r\n")[2]))
            else:
                draft = self._drafts[request.part(5)]
                story.takes.append(Take(ident, draft.mailbox, draft.recipients, [
                    bytes(octets) for _, octets in draft.files] == [SCAN_OCTETS]))
        if answer.status in (202, 204) and request.kind != "send":
            for _, octets in self._drafts[request.part(5)].files:
                octets.clear()          # they would add up
        return answer

    def _marker(self, request: Request) -> str:
        octets = request.body
        if request.kind == "send":
            octets = base64.b64decode(octets[:8000])
        elif request.kind == "put":
            octets = self._uploads[int(re.findall("[0-9]+", request.path)[0])][1]["name"].encode()
        elif request.kind != "draft":
            octets = self._drafts[request.part(5)].properties["subject"].encode()
        match = re.search(rb"story-[0-9]+-[0-9]+", octets)
        return match[0].decode() if match else ""

    def _answer_token(self, sock: socket.socket, request: Request) -> bool:
        secret = urllib.parse.parse_qs(request.body.decode())["client_secret"][0]
        fault = next_of(self.logins.get(secret))
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


def next_of(plan: collections.deque[str] | None) -> str:
    """Take the next fault; several threads may ask."""
    try:
        return plan.popleft() if plan else ""
    except IndexError:
        return ""


class Traffic:
    """Visitors of a relay, and what became of their messages."""

    def __init__(self, seed: str, fake: FaultyMicrosoft, port: int, law: Law, *,
                 uploads: bool = True) -> None:
        self.seed, self.fake, self.port, self.law = seed, fake, port, law
        self.problems: list[str] = []
        self.replies: collections.Counter[str] = collections.Counter()
        self.ending = threading.Event()
        self.with_uploads = uploads
        # The same alarm may come from several at once, and again and again.
        chance = random.Random(f"{seed}.alarms")
        self.alarms = [self.make_story(chance, f"story-0-{number}") for number in range(3)]
        for story in self.alarms:
            story.is_calm = False       # other visitors may meet faults

    def make_story(self, chance: random.Random, marker: str, *, large: bool = False,
                   calm: bool = False, identified: bool = False) -> Story:
        """Invent a message, and what Microsoft will do about it."""
        recipients = [f"{marker}.{one}@x.y" for one in range(chance.choice((1, 1, 2, 3)))]
        sender = f"{chance.choice(('box1', 'box2', marker))}@example.com"
        lines = chance.choices((b"", b".", b"..", b"...x", b"Text", b"b\xc3\xbc\xff\0", b"x" * 900),
                               k=chance.choice((0, 3, 30, 300)))
        head = (f"Subject: {marker}\nTo: {recipients[0]}, stranger@x.y\n"
                f"Cc: {', '.join([*recipients[1:2], 'other@x.y'])}\n")
        if identified:
            head += f"Message-ID: <{marker}@x.y>\nDate: Sat, 28 Nov 2026 03:00:00 +0000\n"
        message = crlf(head) + b"\r\n" + b"".join(line + b"\r\n" for line in lines)
        kinds: dict[str, tuple[str, ...]] = {"send": SEND_FAULTS}
        if large:
            message = LARGE.replace(b"Subject: s", f"Subject: {marker}".encode()).replace(
                b"To: a@x.y", crlf(head.partition("\n")[2]).rstrip()).replace(
                b"scan.pdf", f"{marker}.pdf".encode())
            others = (*(one for one in ANSWERS if one != "200"), "hang", "slow", "then close")
            kinds = {"send-draft": SEND_FAULTS, "draft": (*others, "taken 504", "taken close"),
                     "open": (*others, "200"), "put": others, "delete": others}
        story = Story(marker, sender, recipients, message, is_identified=identified)
        if not calm:
            chances = (2, 3, 2, 1) if not large else (6, 2, 1, 0)
            story.plan = {kind: collections.deque(chance.choices(
                self.law.possible(faults), k=chance.choices(range(4), chances)[0]))
                for kind, faults in kinds.items()}
        story.is_calm = not any(story.plan.values())
        self.fake.stories[marker] = story
        return story

    def visit(self, visitor: Visitor) -> None:
        problem = ""
        try:
            visitor.run()
        except (OSError, smtplib.SMTPException) as error:
            if "timed out" in str(error) or not visitor.may_break:
                problem = f"{error!r}"
        except Exception as error:      # noqa: BLE001 - it is told in the end
            problem = f"{error!r}"
        if problem:
            self.problems.append(f"visitor {visitor.number}, {visitor.way}: {problem} after "
                                 f"{visitor.last!r}")
        for story in visitor.stories:
            story.ended = time.monotonic()

    def visit_all(self, number: int) -> None:
        """Let so many visitors come at once, and wait until they have gone."""
        visitors = [Visitor(self, one) for one in range(number)]
        with concurrent.futures.ThreadPoolExecutor(number) as pool:
            visits = [pool.submit(self.visit, one) for one in visitors if one.way != "idle"]
            idle = [pool.submit(self.visit, one) for one in visitors if one.way == "idle"]
            concurrent.futures.wait(visits)     # each wait within has its end
            self.ending.set()
            concurrent.futures.wait(idle)
        self.fake.release.set()

    def judge(self, stories: Iterable[Story]) -> None:
        """Find what the law does not allow."""
        for story in stories:
            self.problems += [f"{story.marker}: {problem}; faults {story.faults}, heard "
                              f"{story.heard}, unheard {story.unheard}, taken {story.takes}"
                              for problem in self.law.judge(story)]
        for found in (self.fake.strangers, self.fake.complaints):
            self.problems += found
            found.clear()


TOKEN_FAULTS = (*TOKEN_ANSWERS, "hang", "slow", "close", "reset", "short", "short")


class Visitor:
    """A client that does what its number wants."""

    def __init__(self, traffic: Traffic, number: int) -> None:
        self.traffic, self.number = traffic, number
        self.chance = random.Random(f"{traffic.seed}.{number}")
        self.stories: list[Story] = []
        self.last = ""                  # reply
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
        """Decide what the relay will meet on the way."""
        faults = tuple(one for one in self.traffic.law.possible(TOKEN_FAULTS)
                       if IS_LINUX or one != "refused")
        self.faults = [] if self.is_calm else self.chance.choices(faults,
                                                                  k=self.chance.randrange(3))
        if self.way != "wrong":
            self.traffic.fake.logins[self.password] = collections.deque(self.faults)
        if self.way in ("alarm", "idle", "wrong"):
            return
        for number in range(self.chance.choice((1, 1, 2, 3)) if self.way != "large" else 1):
            self.stories.append(self.traffic.make_story(
                self.chance, f"story-{self.number + 1}-{number}", large=self.way == "large",
                calm=self.is_calm and self.chance.random() < 0.5,
                identified=self.chance.random() < 0.5))
            self.stories[-1].is_calm &= not self.faults

    def say(self, client: Client, line: str, *wanted: str) -> str:
        """Say a command; any other reply than these is a problem."""
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
        self.may_break = True           # after three, or ten from one address, we are cut off
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
                user, password = (base64.b64encode(one.encode()).decode()
                                  for one in (USER, self.password))
                self.say(client, f"AUTH LOGIN {user}", "334")
                self.last = client.say(password)
            self.count(self.last)
            if self.last.startswith("235"):
                return True
            if self.last[:3] not in (("454", "535") if "refused" in self.faults else ("454",)):
                self.traffic.problems.append(f"visitor {self.number}: login {self.last}")
            self.may_break = True       # after three
        return False

    def send_all(self, client: Client) -> None:
        if not self.log_in(client):
            return
        stories = list(self.stories)
        if self.way == "alarm":
            stories = self.chance.choices(self.traffic.alarms, k=self.chance.randrange(1, 5))
        # Now and then the next request of anybody ends before it was read.
        if self.chance.random() < 0.05:
            self.traffic.fake.will("send", BeforeBody(utter(b"", reset=True)))
        if self.way == "pipelined":
            self.pipeline(client, stories)
            return
        for story in stories:
            for _ in range(self.chance.choice((1, 1, 2, 3))):
                for line in self.envelope(story):
                    self.say(client, line, "250", "354")
                reply = self.submit(client, story)
                if reply.startswith("421"):
                    return
                # Now and then an identified message again, although it was heard.
                if not reply.startswith("45") and not (story.is_identified
                                                       and self.chance.random() < 0.3):
                    break
        self.say(client, "QUIT", "221")

    def pipeline(self, client: Client, stories: list[Story]) -> None:
        """Send each group of commands behind the message before."""
        groups = [self.envelope(story) for story in stories]
        self.send(client, lines_of(groups[0]))
        for number, story in enumerate(stories):
            for line in groups[number]:
                code, text = client.getreply()
                if code not in (250, 354):
                    raise smtplib.SMTPException(f"{code} {text!r} to {line}")
            behind = groups[number + 1] if number + 1 < len(stories) else ["NOOP", "QUIT"]
            if self.submit(client, story, lines_of(behind)).startswith("421"):
                return
        ends = [client.getreply()[0] for _ in range(2)]
        if ends != [250, 221]:
            raise smtplib.SMTPException(f"{ends} to NOOP and QUIT")

    def leave(self, client: Client) -> None:
        """Do all that is right, but leave in between."""
        where = self.chance.choice(("connected", "AUTH", "login", "DATA", "content", "end", "end"))
        story = self.stories[0]
        if where == "AUTH":
            self.send(client, b"EHLO x\r\nAUTH PLAIN " + plain(USER, self.password)
                      + self.chance.choice((b"", b"\r\n")))
        if where in ("connected", "AUTH") or not self.log_in(client):
            self.disappear(client)
            return
        lines = self.envelope(story)
        self.send(client, lines_of(lines[:1 if where == "login" else len(lines)]))
        if where in ("content", "end"):
            for _ in lines:
                client.getreply()
            content = stuffed(story.message)
            cut = self.chance.randrange(len(content) + 1) if where == "content" else len(content)
            self.send(client, content[:cut])
        if where == "end":
            story.began.append(time.monotonic())
            story.unheard += 1
            self.send(client, b".\r\n")
        self.disappear(client)
        if where == "end" and self.chance.random() < 0.5:
            self.come_again(story)

    def come_again(self, story: Story) -> None:
        """Send a message once more, as its reply was not heard."""
        with contextlib.closing(Client(self.traffic.port)) as client:
            if self.log_in(client):
                for line in self.envelope(story):
                    self.say(client, line, "250", "354")
                self.submit(client, story)

    def disappear(self, client: Client) -> None:
        if self.chance.random() < 0.5:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if client.file:
            client.file.close()
        client.sock.close()

    def envelope(self, story: Story) -> list[str]:
        return [f"MAIL FROM:<{story.sender}>", *(f"RCPT TO:<{one}>" for one in story.recipients),
                "DATA"]

    def send(self, client: Client, octets: bytes) -> None:
        cuts = sorted(self.chance.randrange(len(octets) + 1)
                      for _ in range(self.chance.choice((0, 0, 1, 5))))
        for begin, end in zip([0, *cuts], [*cuts, len(octets)]):
            client.sock.sendall(octets[begin:end])

    def submit(self, client: Client, story: Story, behind: bytes = b"") -> str:
        """Send the content of a message; returns the reply to it."""
        self.send(client, stuffed(story.message))
        began, reply = time.monotonic(), ""
        story.began.append(began)
        try:
            self.send(client, b".\r\n" + behind)
            code, text = client.getreply()
            reply = self.last = f"{code} {text.decode()}"
        finally:
            story.began.remove(began)
            if reply:
                match = re.search("[0-9a-f]{8}-[0-9a-f-]{27}", reply)
                story.heard.append((reply, match[0] if match else ""))
            else:
                story.began.append(began)
                story.unheard += 1
        self.count(reply)
        return reply


def lines_of(commands: Iterable[str]) -> bytes:
    """Commands as octets."""
    return "".join(f"{one}\r\n" for one in commands).encode()


SECRET_FORMS = (SECRET, base64.b64encode(SECRET.encode())[:12].decode())


def wrong_in_log(level: str, line: str) -> str:
    """Say what may not be in the log, or ""."""
    words = line.split()
    is_bad = ("Traceback" in line or "broken" in words or "asyncio" in words
              or level == "CRITICAL" or any(form in line for form in SECRET_FORMS)
              or re.search("token-[0-9]", line))
    return f"in the log: {line}" if is_bad else ""


# A round: some visitors at once, and then nothing may be left.

def descriptors(pid: int | str = "self") -> int:
    """How many descriptors a process has; 0 where that is not told."""
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def what_is_left(running: Running) -> list[str]:
    """Say what a relay holds; empty: it is idle."""
    def look() -> list[str]:
        joined = running.relay
        held = {"connections": len(running.server._connections),
                # This one, the server's, and that of the spool.
                "tasks": len(asyncio.all_tasks()) - 2 - (joined.spool is not None),
                "memory": joined.config.max_memory_for_messages - joined.memory.free,
                "slots": sum(one.in_use for one in joined._graph._limiters.values()),
                "fetches": len(joined._tokens._fetches), "loop errors": len(running.loop_errors)}
        return [f"{number} {name} left" for name, number in held.items() if number]
    found: list[str] = running.ask(look)
    return found


def settled(what: Callable[[], list[str]]) -> list[str]:
    """Wait until nothing is left; returns what is."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not what())
    return what()


def fuzz_round(seed: str, visitors: int = 16, *, uploads: bool = True, timeout: float = 1.5,
               law: Law | None = None, is_over: Callable[[Running], bool] = lambda running: True,
               **settings: str) -> list[str]:
    """Play a round of traffic; returns what was wrong.

    It is judged when nothing is left and `is_over` says that no message is on its way.
    """
    before = descriptors(), calls_under_way()
    law = law or Law()
    fake = FaultyMicrosoft(timeout, law)
    running = Running(make_config(SMTP_PORT="0", AZURE_AUTHORITY_HOST=fake.url,
                                  GRAPH_ENDPOINT=fake.url, SERVER_NAME="relay.test",
                                  UPSTREAM_TIMEOUT=str(timeout), **settings))
    traffic = Traffic(seed, fake, running.port, law, uploads=uploads)
    with kept_log() as kept:
        traffic.visit_all(visitors)
        problems = settled(lambda: what_is_left(running) or (
            [] if is_over(running) else ["messages are on their way"]))
        try:
            running.stop()
        except AssertionError as error:
            problems.append(f"{error}")
    fake.close()
    traffic.judge(fake.stories.values())
    problems += traffic.problems + list(filter(None, itertools.starmap(wrong_in_log, kept.lines)))
    if fake.left_drafts > len(kept.find("draft-left")) + fake.unknown_drafts:
        problems.append(f"{fake.left_drafts} drafts are left")

    def growth() -> list[str]:
        now = descriptors(), calls_under_way()
        return [f"{now} descriptors and threads, and {before} before"] if any(
            more > less for more, less in zip(now, before)) else []
    return problems + settled(growth)


@contextlib.contextmanager
def patient_for(**pauses: float) -> Iterator[None]:
    """Let the relay wait for other times than it does."""
    with contextlib.ExitStack() as stack:
        for name, value in pauses.items():
            stack.enter_context(unittest.mock.patch.object(relay, name, value))
        yield


def fuzz_spool(seed: str, timeout: float = 1.5) -> list[str]:
    """Play a round with a spool, until that is empty."""
    with patient_for(MIN_BACKOFF=0.05, MAX_BACKOFF=0.3, MAX_SLEEP=0.1, DEFAULT_RETRY_DELAY=0.3), \
            tempfile.TemporaryDirectory() as folder:
        problems = fuzz_round(
            seed, timeout=timeout, law=Law(at_least_once=True), SPOOL_DIRECTORY=folder,
            is_over=lambda running: running.ask(lambda: not running.relay.spool._mailboxes))
        left = [str(path) for path in pathlib.Path(folder).glob("*/*")]
    return problems + left


def figures(pid: int) -> dict[str, int]:
    """Memory, in kB, descriptors and threads of a process; nothing where none tells."""
    with contextlib.suppress(OSError):
        status = dict(re.findall(r"(VmRSS|VmHWM|Threads):\s+(\d+)",
                                 pathlib.Path(f"/proc/{pid}/status").read_text()))
        return {"kB": int(status["VmRSS"]), "most kB": int(status["VmHWM"]),
                "descriptors": descriptors(pid), "threads": int(status["Threads"])}
    return {}


# The soak: the relay as a process, for as long as one likes.

MOST_GROWTH = {"kB": 49_152, "descriptors": 60, "threads": 8}      # when all is over


class Soak:
    """Mixed traffic through a relay that is a process of its own."""

    def __init__(self, process: subprocess.Popen[str], seed: str, fake: FaultyMicrosoft,
                 port: int, spool: str) -> None:
        self.process, self.fake, self.spool = process, fake, pathlib.Path(spool)
        self.traffic = Traffic(seed, fake, port, fake.law)
        self.numbers = itertools.count()
        self.drafts_told = 0
        self.start: dict[str, int] = {}
        self.begun = time.monotonic()
        self.taken = 0

    def run(self, seconds: float, workers: int = 8) -> list[str]:
        """Let visitors come for so long; returns what was wrong."""
        reader = threading.Thread(target=self._read_log, daemon=True)
        reader.start()
        end = self.begun + seconds
        threads = [threading.Thread(target=self._work, args=(end,)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        # What is needed in the first seconds is needed always.
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
        if self.fake.left_drafts > self.drafts_told + self.fake.unknown_drafts:
            problems.append(f"{self.fake.left_drafts} drafts are left")
        return problems + self.traffic.problems

    def _work(self, end: float) -> None:
        while time.monotonic() < end and not self.traffic.problems:
            self.traffic.visit(Visitor(self.traffic, next(self.numbers)))
        if self.traffic.problems:
            self.traffic.ending.set()

    def _read_log(self) -> None:
        for line in self.process.stderr or ():
            self.drafts_told += " draft-left " in line
            problem = wrong_in_log("", line)
            if problem:
                self.traffic.problems.append(problem)

    def left(self) -> list[str]:
        return [path.read_text(errors="replace")[:2000] for path in self.spool.glob("*/*")]

    def growth(self) -> list[str]:
        """Say of what the relay has more than at the start."""
        now = figures(self.process.pid)
        return [f"{now[name]} {name}, and {self.start[name]} at the start"
                for name, most in MOST_GROWTH.items()
                if now and now[name] > self.start[name] + most]

    def report(self, *, last: bool = False) -> None:
        """Print how it goes; stories that ended long ago are judged and forgotten."""
        over = [one for one in list(self.fake.stories.values())
                if last or (one.ended and time.monotonic() - one.ended > 3 * PATIENCE)]
        self.traffic.judge(over)
        for story in over:
            self.taken += len(story.takes)
            del self.fake.stories[story.marker]
        taken = self.taken + sum(len(one.takes) for one in list(self.fake.stories.values()))
        replies = dict(sorted(self.traffic.replies.items()))
        failures = {reply: number for reply, number in replies.items() if reply[0] in "45"}
        now = figures(self.process.pid)
        print(f"{'end' if last else 'now'} after {time.monotonic() - self.begun:.0f} s: {taken} "
              f"messages taken, {replies.get('250 2.0.0', 0)} accepted; failures {failures}\n"
              f"    start {self.start}\n    now   {now}", flush=True)


def soak(seconds: float, seed: str, timeout: float = 2.0) -> list[str]:
    """Run a soak, with a spool where that can be; returns what was wrong."""
    folder = tempfile.mkdtemp(dir=FILES.folder)
    fake = FaultyMicrosoft(timeout, Law(at_least_once=bool(relay.fcntl)))
    with contextlib.closing(fake), start_python(
            "-c", KILLED, "0",
            SMTP_PORT="0", AZURE_AUTHORITY_HOST=fake.url, GRAPH_ENDPOINT=fake.url,
            TLS_SOURCE="off", REQUIRE_TLS="false", LISTEN_ADDRESS="127.0.0.1",
            UPSTREAM_TIMEOUT=str(timeout), CLIENT_TIMEOUT="10",
            SPOOL_DIRECTORY=folder if relay.fcntl else "") as process:
        port = int(re.findall("port=([0-9]+)", wait_for_line(process, "listening"))[0])
        return Soak(process, seed, fake, port, folder).run(seconds)


def fuzz(seconds: float, seed: str, only: str) -> list[str]:
    """Fuzz for so long, or only what `only` names; returns what was wrong."""
    end, counts = time.monotonic() + seconds, collections.Counter[str]()
    # 250 dialogues, a round, 250 dialogues, a round with a spool.
    names = [only] if only else (
        f"{('round', 'spool')[number // 251 % 2]}:{number // 251}" if number % 251 == 250 else
        f"dialogue:{number - number // 251}" for number in itertools.count())
    for name in names:
        kind, _, number = name.partition(":")
        problems = (fuzz_round(f"{seed}.{number}") if kind == "round" else
                    fuzz_spool(f"{seed}.{number}") if kind == "spool" else
                    list(filter(None, [fuzz_dialogue(f"{seed}.{number}")])))
        counts[kind] += 1
        if problems:
            return [*problems, f"see it again: fuzz --seed {seed} --only {name}"]
        if time.monotonic() > end:
            break
    print(f"nothing found in {dict(counts)}")
    return []


def kill(times: int, seed: str) -> list[str]:
    """Kill the relay so often; returns what was wrong."""
    try:
        print(Kills(seed).run(times))
    except AssertionError as error:
        return [str(error)]
    return []


def overload() -> list[str]:
    """Play the overload tests at full size; returns what was wrong."""
    result = unittest.TestResult()
    with unittest.mock.patch.multiple(OverloadTests, **OverloadTests.FULL):
        unittest.defaultTestLoader.loadTestsFromTestCase(OverloadTests).run(result)
    print(f"{result.testsRun} overload tests at full size")
    return [text for _, text in result.failures + result.errors]


def play_long(arguments: list[str]) -> int:
    """Do what the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(prog="test_relay.py")
    parser.add_argument("what", choices=("fuzz", "soak", "kill"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(10 ** 9)))
    parser.add_argument("--only", default="",
                        help="fuzz: dialogue:NUMBER, round:NUMBER or spool:NUMBER")
    parser.add_argument("--times", type=int, default=300, help="kill: how often")
    options = parser.parse_args(arguments)
    print(f"{options.what} --seed {options.seed}", flush=True)
    setUpModule()
    try:
        problems = (fuzz(options.seconds, options.seed, options.only) if options.what == "fuzz"
                    else soak(options.seconds, options.seed) if options.what == "soak"
                    else kill(options.times, options.seed))
    finally:
        tearDownModule()
    if options.what == "soak":
        problems += overload()
    for problem in problems:
        print(f"VIOLATION {problem}")
    return int(bool(problems))


class Result(unittest.TextTestResult):
    """A result that takes over those of other processes, where tests are descriptions."""

    def getDescription(self, test: Any) -> str:
        return test if isinstance(test, str) else super().getDescription(test)


def tests_of(suite: Any) -> Iterator[unittest.TestCase]:
    """Return the tests of a suite and of the suites in it."""
    for one in suite:
        yield from tests_of(one) if isinstance(one, unittest.TestSuite) else (one,)


def run_here(names: list[str], options: dict[str, Any], answer: Any, output: pathlib.Path) -> None:
    """Run tests in this process, which is for them alone; what is printed goes to a file."""
    for number in (signal.SIGTERM, signal.SIGINT):      # `with` and `finally` do their work
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
         "KillTests", "SendTests", "ServeTests", "DeafTests", "DraftTests")


class ParallelRunner(unittest.TextTestRunner):
    """Runs each class of tests in a process of its own, `jobs` at a time."""

    resultclass: Any = Result
    jobs = 1

    def run(self, test: Any) -> Any:
        """Run tests as TextTestRunner does, but in other processes."""
        spread: Any = functools.partial(self.spread, test)
        return super().run(spread)

    def spread(self, suite: unittest.TestSuite, result: Any) -> None:
        """Run a process for each class, the longest first."""
        units = collections.defaultdict[str, list[str]](list)
        for test in tests_of(suite):
            if type(test).__module__ != __name__:
                test(result)                    # it fails, as there is no test of that name
                continue
            kind, method = test.id().split(".")[-2:]
            units[f"{kind}.{method}" if kind in APART else kind].append(f"{kind}.{method}")
        waiting = sorted(units, key=lambda name: FIRST.index(kind) if (
            kind := name.partition(".")[0]) in FIRST else len(FIRST))
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
                (output.name, f"These tests died: exit code {process.exitcode}\n")], [], []]
        printed = output.read_text("utf-8", "replace")
        if failed := lists[0] or lists[1]:
            test, text = failed[-1]
            failed[-1] = test, f"{text}\nPrinted by {output.name}:\n{printed}" if printed else text
        self.stream.write(dots)
        self.stream.flush()
        result.testsRun += number
        for kind, found in zip(LISTS, lists):
            getattr(result, kind, []).extend(found)
        if failed and self.failfast:
            result.stop()


@contextlib.contextmanager
def private_folder() -> Iterator[None]:
    """Keep temporary files, and the byte code of the program, in a folder that is removed.

    A relay that compiled the program would have free memory to take later, unseen.
    """
    with tempfile.TemporaryDirectory(prefix="relay-tests-") as folder:
        os.chmod(folder, 0o711)             # for RUN_AS
        code = os.path.join(folder, "code")
        with unittest.mock.patch.object(tempfile, "tempdir", folder), \
                unittest.mock.patch.object(sys, "pycache_prefix", code), \
                unittest.mock.patch.dict(os.environ, TMPDIR=folder, PYTHONPYCACHEPREFIX=code):
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            py_compile.compile(str(PROGRAM))
            yield


def main() -> None:
    """Do what the command line says."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
             else os.cpu_count() or 1)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, epilog=(
        "Long looks are commands of their own: fuzz, soak and kill; see fuzz --help. "
        "What else there is comes from unittest:"))
    # Most tests wait for something: so more processes than cores.
    parser.add_argument("--jobs", type=int, metavar="N", default=min(max(4, 4 * cores), 16),
                        help="processes (default: %(default)s); 1: none but this one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), private_folder():
        if sys.argv[1:2] in (["fuzz"], ["soak"], ["kill"]):
            sys.exit(play_long(sys.argv[1:]))
        options, rest = parser.parse_known_args()
        if "-h" in rest or "--help" in rest:
            parser.print_help()
        ParallelRunner.jobs = options.jobs
        unittest.main(argv=[sys.argv[0], *rest],
                      testRunner=ParallelRunner if options.jobs > 1 else None)
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
