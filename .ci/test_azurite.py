"""Tests of the accounts table against Azurite: AZURITE=COMMAND .ci/test_azurite.py"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import pathlib
import subprocess
import sys
import time
import unittest
import urllib.parse
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import smtp_oauth_relay as relay
import test_relay as tests

setUpModule, tearDownModule = tests.setUpModule, tests.tearDownModule


def storage_token(lifetime: int = 3600) -> str:
    """Return a token without a signature, which Azurite accepts."""
    now = int(time.time())
    claims = {"aud": "https://storage.azure.com", "iss": f"https://sts.windows.net/{tests.TENANT}/",
              "iat": now - 7200, "nbf": now - 7200, "exp": now + lifetime}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
             for part in ({"alg": "none", "typ": "JWT"}, claims)]
    return ".".join([*parts, "x"])


# The account of Azurite. Name and key are published in its documentation.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = ("Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KB"
               "HBeksoGMGw==")


def account_sas(permissions: str) -> str:
    """Return a SAS for the tables of the account; Microsoft, "Create an account SAS"."""
    expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
    lines = (AZURITE_ACCOUNT, permissions, "t", "co", "", expiry, "", "https", "2020-12-06", "")
    digest = hmac.digest(base64.b64decode(AZURITE_KEY),
                         "".join(f"{line}\n" for line in lines).encode(), "sha256")
    return urllib.parse.urlencode({
        "sv": "2020-12-06", "ss": "t", "srt": "co", "sp": permissions, "se": expiry,
        "spr": "https", "sig": base64.b64encode(digest).decode()})


def token_response(token: str) -> tests.Answer:
    """Respond with a token as Entra does."""
    return tests.say(200, {"access_token": token, "expires_in": 3599})


class AzuriteTests(tests.RelayCase):
    """Logins through a real table service, but without Azure."""

    settings = tests.UNHURRIED
    account = ""

    @classmethod
    def setUpClass(cls) -> None:
        """Start Azurite and the relay, and fill the table."""
        environ = tests.at_environ(SSL_CERT_FILE=tests.FILES["ca.pem"],
                                   NO_PROXY="127.0.0.1,localhost")
        environ.start()
        cls.addClassCleanup(environ.stop)
        port = tests.free_port()
        cls.account = f"https://127.0.0.1:{port}/{AZURITE_ACCOUNT}"
        azurite = subprocess.Popen(
            [os.environ["AZURITE"], "--silent", "--inMemoryPersistence", "--disableTelemetry",
             "--tableHost", "127.0.0.1", "--tablePort", str(port), "--oauth", "basic", "--cert",
             tests.FILES["cert.pem"], "--key", tests.FILES["key.pem"]], cwd=tests.FILES.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cls.addClassCleanup(azurite.wait)
        cls.addClassCleanup(azurite.kill)
        tests.wait_for(lambda: cls.post("Tables", TableName="users"), 6 * tests.PATIENCE)
        super().setUpClass()
        entity = {"tenant_id": tests.TENANT, "client_id": tests.CLIENT}
        for name, properties in (
                *((name, entity) for name in tests.ODD_NAMES),
                ("broken", {"tenant_id": tests.TENANT}),
                ("app1", {**entity, "from_email": "app1@example.com", "description": "x"})):
            assert cls.post("users", PartitionKey="user", RowKey=name, **properties)

    @classmethod
    def post(cls, path: str, **body: str) -> bool:
        """Create a table or an entity; return whether that succeeded."""
        request = urllib.request.Request(f"{cls.account}/{path}", json.dumps(body).encode(), {
            "Authorization": f"Bearer {storage_token()}", "x-ms-version": "2020-12-06",
            "Accept": "application/json;odata=nometadata", "Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tests.trusting()))
        with contextlib.suppress(OSError):
            opener.open(request, timeout=tests.PATIENCE).close()
            return True
        return False

    @classmethod
    def config(cls, **settings: str) -> relay.Config:
        """Return settings that include the table."""
        return super().config(**{
            "AZURE_TABLES_URL": f"{cls.account}/users", "AZURE_TENANT_ID": tests.TENANT,
            "AZURE_CLIENT_ID": tests.CLIENT, "AZURE_CLIENT_SECRET": "s", **settings})

    def test_logins_find_their_row_in_the_table(self) -> None:
        self.fake.will("token", token_response(storage_token()))
        for names, reply in ((("app1", *tests.ODD_NAMES), "235 2.7.0"), (("broken",), "454 4.7.0"),
                             (("none", "APP1", "o''brien", "x' or 'a' eq 'a"), "535 5.7.8")):
            for name in names:
                with self.subTest(name):
                    self.assertReply(self.log_in(f"{name}@lookup"), reply)
        self.assertReply(self.logged_in("app1@lookup").post(), "250 2.0.0")
        self.assertEqual(self.fake.delivered[0].mailbox, "app1@example.com")

    def test_a_refused_table_request_is_not_a_wrong_password(self) -> None:
        good, url = storage_token(), f"{self.account}/users"
        required, missing = {"ACCOUNTS_REQUIRED": "true"}, {"AZURE_TABLES_URL": f"{url}2"}
        read, add = ({"AZURE_TABLES_URL": f"{url}?{account_sas(letter)}"} for letter in "ra")
        for token, settings, user, reply in (
                (good, required, tests.USER, "235 2.7.0"),
                (good, required, f"{tests.CLIENT}@{tests.CLIENT}", "535 5.7.8"),
                (storage_token(-60), {}, "app1@lookup", "454 4.7.0"),
                ("garbage", {}, "app1@lookup", "454 4.7.0"),
                (good, missing, "app1@lookup", "454 4.7.0"),
                ("", read, "app1@lookup", "235 2.7.0"),
                ("", add, "app1@lookup", "454 4.7.0"),
                ("", {**read, **required}, tests.USER, "235 2.7.0")):
            with self.subTest(user, token=token, **settings):
                self.fake.reset()
                if token:
                    self.fake.will("token", token_response(token))
                self.assertReply(self.log_in(user, running=self.another(**settings)), reply)


if __name__ == "__main__":
    unittest.main()
