"""Tests of the project's files: Dockerfile, README, and the layout of the program."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import socket
import sys
import threading
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import smtp_oauth_relay as relay
import test_relay as tests

SOURCE = tests.PROGRAM.read_text(encoding="utf-8")
setUpModule, tearDownModule = tests.setUpModule, tests.tearDownModule


class DockerfileTests(unittest.TestCase):
    """The Dockerfile, checked without a container."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = (tests.HERE / "Dockerfile").read_text(encoding="utf-8")

    def test_the_image_keeps_its_directory_port_and_command(self) -> None:
        for line in ("WORKDIR /usr/src/smtp-relay", "EXPOSE 8025",
                     'CMD ["python", "smtp_oauth_relay.py"]'):
            self.assertIn(f"\n{line}\n", self.text)
        self.assertRegex(self.text, r"^FROM python:3\.\d+-slim\n")
        self.assertRegex(self.text, r"\nENV .*RUN_AS=nobody")
        self.assertNotRegex(self.text, "(?i)pip")

    def test_the_health_check_speaks_smtp_to_the_listener(self) -> None:
        match = re.search(r"HEALTHCHECK .*\\\n +CMD (.*)\n", self.text)
        assert match is not None
        program, *arguments = json.loads(match[1])
        self.assertEqual(program, "python")
        running = tests.Running(tests.make_config(SMTP_PORT="0"))
        self.addCleanup(running.stop)
        with tests.kept_log() as kept:
            with tests.start_python(*arguments, SMTP_PORT=str(running.port)) as process:
                self.assertEqual(process.wait(tests.PATIENCE), 0)
            tests.wait_for(lambda: kept.find("disconnected"))
        self.assertIn("reason=quit", kept.find("disconnected")[0][1])
        with socket.create_server(("127.0.0.1", 0)) as server:     # a server that is not a relay
            port = str(server.getsockname()[1])
            threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
            with tests.start_python(*arguments, SMTP_PORT=port,
                                    LISTEN_ADDRESS="127.0.0.1") as process:
                self.assertNotEqual(process.wait(tests.PATIENCE), 0)


class ReadmeTests(unittest.TestCase):
    """The README agrees with the program."""

    def test_the_readme_lists_every_setting_and_key(self) -> None:
        readme = (tests.HERE / "README.md").read_text(encoding="utf-8")
        for title, rows in (("Variable", relay.settings()),
                            ("Key", relay.settings_of(relay.Account))):
            table = [f"| {title} | Default | Meaning |", "| --- | --- | --- |", *(
                f"| `{name}` | {f'`{row.default}`' if row.default else ''} | {row.help} |"
                for name, row in rows.items())]
            for line in (*table, "\n".join(table)):
                self.assertTrue(f"\n{line}\n" in readme, line)

    def test_the_accounts_file_of_the_readme_is_valid(self) -> None:
        readme = (tests.HERE / "README.md").read_text(encoding="utf-8")
        example, = re.findall(r"(?s)```ini\n(\[DEFAULT\].*?)```", readme)
        example = example.replace("scrypt$...", tests.HASH)
        scan, nas = tests.parse(example)
        self.assertEqual((scan.name, scan.authentication, scan.tls_min_version),
                         ("scan2", "optional", "1.0"))
        self.assertEqual((nas.name, nas.authentication), ("nas", "required"))
        file = tests.FILES.folder / "bom.ini"
        file.write_bytes(b"\xef\xbb\xbf" + example.replace(
            "client_secret_file = /opt/smtp-relay/accounts/graph", "client_secret = s").encode())
        accounts = relay.AccountsFile(tests.make_config(ACCOUNTS_FILE=str(file)))
        accounts.load()
        self.assertEqual(len(list(accounts.accounts)), 2)

    def test_the_readme_lists_every_event_and_key_of_the_log(self) -> None:
        readme = (tests.HERE / "README.md").read_text(encoding="utf-8")
        section = readme.partition("\n## The log\n")[2].partition("\n## ")[0]
        table, _, rest = section.partition("\nAnd these are all keys: ")
        events, keys = log_names()
        self.assertEqual(set(re.findall("`([a-z-]+)`", "".join(
            re.findall(r"(?m)^\| (`.*?) \|", table)))), events)
        self.assertEqual(set(re.findall("`([a-z-]+)`", rest.partition("\n")[0])), keys)


def log_names() -> tuple[set[str], set[str]]:
    """Return the events and the keys of the program's log lines."""
    events, keys = set(re.findall(r'log\.error\("%s ([a-z-]+)"', SOURCE)), set()
    for node in ast.walk(ast.parse(SOURCE)):
        facts: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            event = node.args[2:3] if name == "log_event" else node.args[:1]
            if name in ("log_event", "Outcome") and isinstance(event[0], ast.Constant):
                events.add(str(event[0].value))
            if name in ("log_event", "facts.update"):
                keys |= {keyword.arg for keyword in node.keywords if keyword.arg}
            facts = [keyword.value for keyword in node.keywords if keyword.arg == "facts"]
            facts += node.args[2:3] if name == "Outcome" else []
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            facts = [node.value] if "facts" in ast.unparse(target) and node.value else []
            if isinstance(target, ast.Subscript) and facts:
                keys.add(ast.literal_eval(target.slice))
        for value in facts:
            keys |= {str(key.value) for part in ast.walk(value) if isinstance(part, ast.Dict)
                     for key in part.keys if isinstance(key, ast.Constant)}
    return events, {key.replace("_", "-") for key in keys}


class LayoutTests(unittest.TestCase):
    """The program can be read from the top: each section uses only the sections above it."""

    PURE = range(1, 10)     # sections without I/O

    @classmethod
    def setUpClass(cls) -> None:
        cls.text = SOURCE
        cls.tree = ast.parse(cls.text)
        cls.starts = {int(number): cls.text[:match.start()].count("\n") + 1
                      for match in re.finditer(r"(?m)^# §(\d+)  .*$", cls.text)
                      for number in [match[1]]}

    def section(self, line: int) -> int:
        return max((number for number, start in self.starts.items() if start <= line), default=0)

    def test_the_table_of_contents_matches_the_banners(self) -> None:
        banners = re.findall(r"(?m)^# §(\d+)  (.*)$", self.text)
        contents = re.findall(r"(?m)^    §(\d+) +(.+?)(?:  .*)?$", ast.get_docstring(self.tree)
                              or "")
        self.assertEqual(contents, banners)
        self.assertEqual([number for number, _ in banners],
                         [str(index + 1) for index in range(len(banners))])

    def test_the_walks_at_the_top_name_every_class_but_errors(self) -> None:
        walks = (ast.get_docstring(self.tree) or "").partition("The path of a message")[2]
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not issubclass(
                    getattr(relay, node.name), Exception):
                self.assertRegex(walks.partition("\nContents ")[0], rf"\b{node.name}\b")

    def test_no_section_uses_a_later_section_and_pure_sections_do_no_io(self) -> None:
        defined: dict[str, int] = {}
        for node in self.tree.body:
            names = ([node.name] if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef,
                                                      ast.ClassDef)) else
                     [target.id for target in ast.walk(node) if isinstance(target, ast.Name)
                      and isinstance(target.ctx, ast.Store)])
            for name in names:
                defined.setdefault(name, self.section(node.lineno))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name):
                section, place = self.section(node.lineno), f"{node.id} in line {node.lineno}"
                self.assertLessEqual(defined.get(node.id, 0), section, place)
                if section in self.PURE:
                    self.assertNotIn(node.id, {
                        "asyncio", "fcntl", "open", "os", "pathlib", "pwd", "resource", "signal",
                        "socket", "ssl", "subprocess", "tempfile", "threading", "time"}, place)

    def test_no_function_is_longer_than_40_lines_and_no_line_than_92_columns(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.assertLessEqual((node.end_lineno or 0) - node.lineno + 1, 40, node.name)
        for number, line in enumerate(self.text.splitlines(), 1):
            self.assertLessEqual(len(line), 92, f"line {number}")

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "needs Python 3.10")
    def test_only_the_standard_library_is_imported(self) -> None:
        for path in (tests.PROGRAM, tests.HERE / "test_relay.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                         else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
                for name in names:
                    self.assertIn(name.split(".")[0],
                                  {*sys.stdlib_module_names, "smtp_oauth_relay"})

    def test_the_docstring_of_the_tests_lists_their_classes_in_order(self) -> None:
        """Banners separate the helpers, the tests and the long-running tests."""
        text = (tests.HERE / "test_relay.py").read_text(encoding="utf-8")
        parts = re.split(r"(?m)^# -{70,}\n# .*\n", text)
        self.assertEqual(len(parts), 4)
        classes = re.compile(r"(?m)^class (\w+Tests)\b")
        self.assertEqual([classes.findall(part) for part in parts],
                         [[], [], re.findall(r"\b\w+Tests\b", tests.__doc__ or ""), []])


if __name__ == "__main__":
    unittest.main()
