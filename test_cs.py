"""The tests of cs.py, and the stand-in management server they run against.

    python3 test_cs.py                           run the tests (--help says how to choose)
    python3 test_cs.py sandbox COMMAND [args]    start the simulator, run cs.py against it once, end with its exit code
    python3 test_cs.py sandbox                   keep the simulator running until Ctrl-C (sandbox --help has more)

The simulator is a small cloud behind a real socket. It is written from how the server behaves, not from what cs.py
sends: nothing of cs.py is used for it, least of all to check a signature. The tests follow in the same file.
.ci/replay.py holds what it answers against recordings of a live server.

Contents, in the order of the file (search for the tag; the numbers are those of the sections of cs.py):
    [C] what the tests share     [S1] to [S3] the simulator     [X] the sandbox     [S4] tests of these two
    [1] errors     [2] parameters and signature     [3] clients
    [4.1] to [4.7] protocol: call and request, answer, retry, session, pages, jobs, recovery
    [5] transport     [6] redaction     [7.1] settings     [7.2] configuration
    [8.1] to [8.10] command line: options, run and report, formats, the list of commands, completion, configure, names
    for ids, --where, --each, the shell
    [W] what is written about it: README and --help     [H] what the front page of cs.py promises
    [R] running the tests

To give it another test: what a call sends, waits for, returns and raises is a ProtocolCase: `play(script, call)` runs
it through both clients, without a socket and in no time. Many calls of one asynchronous client at once: JumpingCase.
What only a socket can break, by a server that is scripted byte by byte: TransportCase. A command line against the
simulator: CloudCase, whose `good`, `fails` and `usage` run it in this process, and `cs` in a process of its own. All
else that needs files or an environment: Case. What has an answer for each of many values is one table, each of whose
rows `@each` gives a setUp of its own; a question that a table asks is asked nowhere else.

To give it another command: `_list(...)` is one line for a command that lists a table, `_machine_job(...)` one for a job
that changes a machine's state; for any other write a function under `@command(name, parameters, description, table)`,
which is given the Call and returns the answer, or, with job=True, a generator that returns the job's result. A
parameter that is no string, or needs more words than its name, gets an entry in _TYPES or _TEXTS. What the server
refuses is `require(condition, text, code)`. listApis and the checks of parameters come out of the same words.

To give it another fault: for the next requests `Simulator.script` says what happens (an Answer of any kind, a callable
that may also sleep before the command runs, DROP, RUN_THEN_DROP); a way to be wrong for as long as it is wanted is
an entry in Simulator.OPTIONS, an attribute that is asked where it applies; the sandbox offers it by --fault.
"""

import argparse
import ast
import asyncio
import atexit
import base64
import collections
import configparser
import contextlib
import copy
import csv
import datetime
import decimal
import email.message
import enum
import faulthandler
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import http.server
import inspect
import io
import itertools
import json
import os
import pickle
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import unittest
import uuid
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from unittest import mock
from urllib.parse import parse_qsl, quote, quote_plus, urlencode

import cs

try:
    import fcntl
    import pty
    import termios

    for descriptor in pty.openpty():
        os.close(descriptor)
except (ImportError, OSError):  # Windows; a container without /dev/pts
    fcntl = pty = termios = None
try:
    import readline
except ImportError:
    readline = None


# === [C] what the tests share =========================================================================================

TEST_PATH = os.path.abspath(__file__)  # now: before 3.9 it is relative, and tests change the working directory
CS_PATH = os.path.join(os.path.dirname(TEST_PATH), "cs.py")
ENDPOINT = "http://cloud.invalid/client/api"
unittest.TestCase.maxDiff = None  # a difference that is cut does not say what differs


def setUpModule():
    """Have Ctrl-C end what it should, as in the foreground: what a shell starts in the background inherits it as
    ignored, and so would every process that a test starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tearDownModule():
    """End what tests left running, and say so."""
    left = [(child.args, child.end())[0] for child in list(Child.running)]
    assert not left, f"left running: {left}"


def clean_environment(*drop, **extra):
    """This process's environment without settings of a client, proxies, and names to drop; plus what is given."""
    kept = {name: value for name, value in os.environ.items() if name not in drop
            and not name.upper().startswith("CLOUDSTACK_") and not name.upper().endswith("_PROXY")}
    return dict(kept, **extra)


def run(coroutine):
    """asyncio.run, which 3.6 lacks."""
    loop = asyncio.new_event_loop()
    loop.set_debug(False)  # -X dev turns it on, and it is slow
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def each(names, *rows):
    """Run a test method once for each row, as a subtest between a setUp and a tearDown of its own; what is in the row
    are its arguments of these names.

    One name: a row is its value. Two of these above one method: each row of the one with each of the other."""
    names = names.split(", ")

    def decorate(test):
        @functools.wraps(test)
        def run_each(self, **outer):
            for number, row in enumerate(rows):
                given = dict(zip(names, row if len(names) > 1 else [row]))
                with self.subTest(**dict({"row": number}, **given)):
                    if number:
                        self.tearDown()
                        self.doCleanups()
                        self.setUp()
                    test(self, **dict(outer, **given))

        return run_each

    return decorate


KINDS = (cs.CloudStack, cs.AIOCloudStack)
both = each("kind", *KINDS)
CHILD_LIMIT = 60  # seconds after which a process that a test started hangs


class Child(subprocess.Popen):
    """A process that leads a session of its own, so that it can be ended together with all that it started."""

    running = set()

    def __init__(self, command, **options):
        given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        super().__init__(command, start_new_session=True, **dict(given, **options))
        self.running.add(self)

    def finish(self, stdin=None):
        """Wait for its end: (exit code, standard output, standard error), both as bytes. Raises TimeoutExpired where it
        has to be ended."""
        try:
            out, err = self.communicate(stdin, CHILD_LIMIT)
        finally:
            self.end()
        return self.returncode, out or b"", err or b""

    def end(self):
        """End it if it still runs, with what it started, and close its pipes. May be done twice."""
        end_group(self.pid)
        self.wait()
        self.running.discard(self)
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            stream.close()


def end_group(leader):
    """Kill every process of a group, if there is any; where there are no groups, nothing."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):  # Windows; none; on macOS all are dead already
        pass


class Case(unittest.TestCase):
    """A test with an environment, a home and a working directory of its own."""

    def setUp(self):
        self.home = tempfile.mkdtemp(prefix="cs-test-")
        self.addCleanup(shutil.rmtree, self.home, True)
        environment = clean_environment("XDG_CACHE_HOME", "NO_COLOR", "PYTHONWARNINGS", "PYTHONIOENCODING",
                                        "PYTHONUNBUFFERED", HOME=self.home, PYTHONDONTWRITEBYTECODE="1")
        patched = mock.patch.dict(os.environ, environment, clear=True)
        patched.start()
        self.addCleanup(patched.stop)
        self.addCleanup(os.chdir, os.getcwd())
        self.cwd = os.path.join(self.home, "work")
        os.mkdir(self.cwd)
        os.chdir(self.cwd)

    def write(self, name, text, mode=0o600):
        """A file below the home directory ("work/x" is in the working directory); its path."""
        path = os.path.join(self.home, name)
        if os.path.isfile(path):
            os.chmod(path, 0o600)  # only root may write what nobody may
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode("utf-8"))
        os.chmod(path, mode)
        return path

    def cs(self, *args, **env):
        """The command line as a process of its own: (exit code, standard output, standard error), both as bytes."""
        return Child([sys.executable, CS_PATH, *args], env=dict(os.environ, **env)).finish()

    def main(self, *args):
        """The command line within this process: (exit code, standard output, standard error). Faster than cs()."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cs.main(list(args))
        return code, out.getvalue(), err.getvalue()

    def good(self, *args):
        """A command line that must end with 0 and say nothing on standard error; its output."""
        code, out, err = self.main(*args)
        self.assertEqual((0, ""), (code, err), out)
        return out

    def fails(self, code, *args):
        """A command line that must end with this exit code and print nothing; what it says on standard error."""
        ended, out, err = self.main(*args)
        self.assertEqual((code, ""), (ended, out), err)
        return err

    def says(self, code, *args):
        """What a command line that must end with this exit code says on standard error, whatever it prints."""
        ended, _, err = self.main(*args)
        self.assertEqual(code, ended, err)
        return err

    def raised(self, kind, function, *args, **options):
        """The exception of this kind that a function must raise."""
        with self.assertRaises(kind) as caught:
            function(*args, **options)
        return caught.exception

    def assertHolds(self, whole, *parts):
        for part in parts:
            self.assertIn(part, whole)

    def assertLacks(self, whole, *parts):
        for part in parts:
            self.assertNotIn(part, whole)

    def ini(self, text):
        """Write ~/.cloudstack.ini; its path."""
        return self.write(".cloudstack.ini", text)

    def unset(self, *names):
        for name in names:
            os.environ.pop("CLOUDSTACK_" + name.upper(), None)


def answer(document, status=200, reason="OK", headers=None):
    """An answer as the transport gives it: a document as JSON, bytes and text as HTML."""
    message = email.message.Message()
    is_page = isinstance(document, (bytes, str))
    message["Content-Type"] = "text/html" if is_page else "application/json; charset=UTF-8"
    for name, value in (headers or {}).items():
        del message[name]
        message[name] = value
    if not is_page:
        document = json.dumps(document)
    content = document if isinstance(document, bytes) else document.encode("utf-8")
    return cs._Response(status, reason, message, content)


def refusal(code, text, key="errorresponse"):
    """The document of an error in the server's own JSON."""
    return {key: {"uuidList": [], "errorcode": code, "cserrorcode": 9999, "errortext": text}}


def api_error(code, text="no", status=None, key="errorresponse", headers=None):
    """An error in the server's own JSON."""
    return answer(refusal(code, text, key), status or code, str(status or code), headers)


def unsent(kind=cs.CloudStackConnectionError):
    error = kind("Cannot connect to " + ENDPOINT, "Connection refused")
    error.unsent = True
    return error


def lost(stale=False):
    error = cs.CloudStackConnectionError("Connection lost to " + ENDPOINT, "Remote end closed connection")
    error.stale = stale
    return error


def silent():
    return cs.CloudStackTimeoutError("No answer from " + ENDPOINT, "nothing for 10 s (timeout)")


def transport_of(client):
    return client._kept


def wire(request):
    """The decoded parameters of a request."""
    if request.url is None:
        request.prepare()
    text = request.url.partition("?")[2] if request.body is None else request.body.decode("ascii")
    return dict(parse_qsl(text, keep_blank_values=True))


def answered_by(exchange, kind=cs.CloudStack, **settings):
    """A client whose requests a function answers, without a socket."""
    credentials = {} if "username" in settings else {"key": "k", "secret": "s"}
    client = kind(ENDPOINT, **dict(credentials, **settings))
    object.__setattr__(client, "_exchange", exchange)
    return client


def in_threads(number, work):
    """Run work(0), work(1) and so on in so many threads that begin together; wait for all."""
    gate = threading.Barrier(number)

    def begin(index):
        gate.wait()
        work(index)

    threads = [threading.Thread(target=begin, args=(index,), daemon=True) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_OF_TESTS)
        assert not thread.is_alive(), "a thread hangs"


REQUESTS_MOMENT = 1767225600  # 2026-01-01T00:00:00Z


class Played:
    """What became of one call: value or error, the requests that were made, and the pauses between them."""

    moment = REQUESTS_MOMENT  # time.time() when it began

    def __init__(self):
        self.value = self.error = None
        self.requests, self.pauses = [], []
        self.now = 1000.0

    def time(self):
        return self.moment + self.now - 1000.0

    def params(self, index=-1):
        """The decoded parameters of one request."""
        return wire(self.requests[index])

    def column(self, name):
        """The values that a parameter had in the requests, one after another."""
        return [wire(request).get(name) for request in self.requests]

    @property
    def commands(self):
        return self.column("command")

    @property
    def methods(self):
        return [request.method for request in self.requests]

    @property
    def slept(self):
        return sum(self.pauses)


class ProtocolCase(unittest.TestCase):
    """Every case is played through both clients, without a socket and without waiting."""

    def play(self, script, call, **settings):
        """Call both clients against a script; returns what became of it, after checking that it was the same for both.

        script: a list whose items are answers, exceptions to raise, or functions of the Played and the request that
        return either; the last item is used again for whatever more is asked. Or such a function itself.
        call: a function of the client that makes the call (it may return a coroutine), e.g. lambda c: c.listZones().
        The clock stands still but for pauses, and for what a function adds to played.now."""
        settings = dict({"endpoint": ENDPOINT, "key": "key1", "secret": "secret1"}, **settings)
        outcomes = []
        for kind in (cs.CloudStack, cs.AIOCloudStack):
            client = kind(**dict({"fetch_result": False}, **settings))
            outcomes.append(self._play_one(client, script, call))
        sync, aio = outcomes
        self.assertEqual(aio.value, sync.value)
        self.assertEqual((type(aio.error), str(aio.error)), (type(sync.error), str(sync.error)))
        if len(set(sync.commands)) > 1 or abs(len(sync.commands) - len(aio.commands)) > 3:
            self.assertEqual(aio.commands, sync.commands)  # else: how many pages were under way at the end is luck
        self.assertEqual(aio.pauses, sync.pauses)
        for attribute in ("jobid", "outcome_unknown", "args"):
            self.assertEqual(getattr(aio.error, attribute, None), getattr(sync.error, attribute, None))
        return sync

    def _play_one(self, client, script, call):
        played = Played()
        items = list(script) if isinstance(script, (list, tuple)) else [script]
        lock = threading.Lock()

        def exchange(request):
            request.prepare()
            with lock:
                played.requests.append(request)
                item = items.pop(0) if len(items) > 1 else items[0]
            if callable(item):
                item = item(played, request)
            if isinstance(item, BaseException):
                raise copy.copy(item)  # the client writes on what is raised
            return item

        def sleep(seconds):
            played.pauses.append(round(seconds, 6))
            played.now += seconds

        async def asleep(seconds):
            sleep(seconds)

        object.__setattr__(client, "_exchange", exchange)
        with mock.patch.multiple(cs, _clock=lambda: played.now, _sleep=sleep, _random=lambda: 1.0):
            with mock.patch("asyncio.sleep", asleep), mock.patch("time.time", played.time):
                try:
                    value = call(client)
                    if hasattr(value, "__next__"):  # asyncio.iscoroutine takes a generator for one before 3.12
                        value = list(value)
                    elif hasattr(value, "__aiter__") or asyncio.iscoroutine(value):
                        value = run(rows_out_of(value))
                    played.value = value
                except Exception as error:
                    played.error = error
                finally:
                    if isinstance(client, cs.AIOCloudStack):
                        client._forget()
        return played


NEVER = {"expiration": -1}
AS_JSON = {"Content-Type": "application/json"}
COPIERS = [copy.copy, copy.deepcopy]
COPIERS += [lambda x, n=n: pickle.loads(pickle.dumps(x, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)]


def one(document=None):
    """A script of one answer."""
    return [answer({"r": {} if document is None else document})]


def asking(command, **params):
    """A call for play(): client.command(**params)."""
    return lambda client: getattr(client, command)(**params)


def a_while_later(seconds, item):
    """A script's item that comes so many seconds after it was asked for."""

    def later(played, request):
        played.now += seconds
        return item(played, request) if callable(item) else item

    return later


async def rows_out_of(outcome):
    return [row async for row in outcome] if hasattr(outcome, "__aiter__") else await outcome


def one_after_another(*calls):
    """A call for play() that makes several and gives the list of what they return."""

    def call(client):
        async def awaited():
            return [await rows_out_of(each(client)) for each in calls]

        return awaited() if isinstance(client, cs.AIOCloudStack) else [each(client) for each in calls]

    return call


def rows_of(first, last):
    return [{"id": str(number)} for number in range(first, last)]


def login_answer(key="SK/1+", cookie="J1"):
    response = answer({"loginresponse": {"sessionkey": key, "userid": "u"}})
    response.headers["Set-Cookie"] = f"JSESSIONID={cookie}; Path=/client; HttpOnly"
    response.headers["Set-Cookie"] = f"sessionkey=cookie-{cookie}; HttpOnly"
    return response


LOGIN = {"username": "u", "password": "p"}
USER = {"key": None, "secret": None, "username": "admin", "password": "pa~ss"}


class JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: where a loop would sleep, its clock jumps."""

    now = 1000.0

    def select(self, timeout=None):
        ready = super().select(0)
        if timeout is None and not ready:
            raise AssertionError("everybody waits and nothing will happen")
        if not ready:
            self.now += max(timeout, 0)
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.clock = JumpingSelector()
        super().__init__(self.clock)
        self.set_debug(False)  # -X dev looks at the stack for every one of thousands of pauses

    def time(self):
        return self.clock.now


class JumpingCase(unittest.TestCase):
    """Many calls of one asynchronous client at once, without threads, deterministic.

    A test gives self.server: of a request's parameters it makes an answer or an exception, or (seconds, that)."""

    def setUp(self):
        self.loop = JumpingLoop()
        self.addCleanup(lambda: self.loop.close())  # whichever it is by then
        self.requests = []
        self.flying = self.most_flying = 0

        async def in_worker(client, request):
            params = wire(request)
            self.requests.append((self.loop.time(), params, request))
            seconds, outcome = 0.01, self.server(params)
            if isinstance(outcome, tuple):
                seconds, outcome = outcome
            self.flying += 1
            self.most_flying = max(self.flying, self.most_flying)
            try:
                await asyncio.sleep(min(seconds, request.total))
            finally:
                self.flying -= 1
            if seconds > request.total:
                raise silent()
            if isinstance(outcome, BaseException):
                raise copy.copy(outcome)
            return outcome

        for patch in (mock.patch.object(cs.AIOCloudStack, "_send", in_worker),
                      mock.patch.multiple(cs, _clock=lambda: self.loop.time(), _random=lambda: 1.0)):
            patch.start()
            self.addCleanup(patch.stop)

    def client(self, **settings):
        return cs.AIOCloudStack(**dict({"endpoint": ENDPOINT, "key": "key1", "secret": "secret1"}, **settings))

    def all_of(self, coroutines):
        """What became of each: its result or its exception."""

        async def gathered():
            return await asyncio.gather(*coroutines, return_exceptions=True)

        return self.loop.run_until_complete(gathered())

    def count(self, command):
        return sum(params["command"] == command for _, params, _ in self.requests)


# === [S1] simulator: wire =============================================================================================
# Requests into parameters, the signature, and answers into bytes.

MAX_LINE = 8192  # bytes of a request's first line
CREDENTIALS_TEXT = "unable to verify user credentials and/or request signature"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
DROP = "close the connection without running the command"
RUN_THEN_DROP = "run the command, then close the connection without an answer"

_CONTROL = re.compile("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]")


class ApiError(Exception):
    """An error that the server states in its own words: code and text.

    cserrorcode tells who threw it: a command's own check of its values 4350, of the caller's rights 4365, the checks
    before a command runs 9999. None: the error is written early, and has neither cserrorcode nor X-Description.
    """

    def __init__(self, code, text, cserrorcode=0):
        super().__init__(code, text)
        self.code, self.text = code, text
        self.cserrorcode = {431: 4350, 531: 4365}.get(code, 9999) if cserrorcode == 0 else cserrorcode

    def body(self):
        return without_none(uuidList=[], errorcode=self.code, cserrorcode=self.cserrorcode, errortext=self.text)

    def headers(self):
        return {} if self.cserrorcode is None else {"X-Description": " ".join(self.text.splitlines())}


def require(condition, text, code=431, **named):
    """Raise the ApiError that these words make, unless the condition is met."""
    if not condition:
        raise ApiError(code, text, **named)


class Record:
    """One request as it was received. `connection` tells its connection from all others."""

    def __init__(self, method, target, headers, body, connection):
        self.method, self.headers, self.connection = method, headers, connection
        self.path, _, self.query = target.partition("?")
        # The last of a name wins in a query, the first in a form, the query over the form.
        is_form = headers.get("Content-Type", "").lower().startswith(FORM["Content-Type"])
        form = parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True) if is_form else []
        self.params = dict(form[::-1] + parse_qsl(self.query, keep_blank_values=True))
        self.command = self.params.get("command")

    def cookies(self):
        pairs = (piece.partition("=") for piece in self.headers.get("Cookie", "").split(";"))
        return {name.strip(): value.strip().strip('"') for name, _, value in pairs}

    def __repr__(self):
        return f"<Record {self.method} {self.command}>"


class Answer:
    """What goes back: a dict is sent as JSON, text and bytes as they are."""

    def __init__(self, status=200, body=b"", headers=None, cookies=()):
        self.status, self.cookies = status, cookies
        kind = "application/json" if isinstance(body, dict) else "text/html"
        self.headers = dict({"Content-Type": kind + ";charset=utf-8"}, **headers or {})
        text = to_json(body) if isinstance(body, dict) else body
        self.body = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def html_page(code):
    """An error of the servlet container, or of a proxy: nothing ran."""
    reason = f"{code} {http.client.responses.get(code, '')}"
    return Answer(code, f"<html>\n<body><h2>HTTP ERROR {reason}</h2></body>\n</html>\n")


def without_none(**fields):
    return {name: value for name, value in fields.items() if value is not None}


def java_encode(value):
    """What Java's URLEncoder makes of a value once each "+" became "%20"."""
    return quote(value.encode("utf-8", "replace"), safe="*").replace("~", "%7E")


def signature_of(params, secret):
    """The signature of the decoded parameters: names raw, in the order of Java strings (UTF-16 units)."""
    names = sorted(params, key=lambda name: name.encode("utf-16-be", "replace"))
    text = "&".join([name + "=" + java_encode(params[name]) for name in names if name != "signature"]).lower()
    digest = hmac.new(secret.encode("utf-8"), text.encode("utf-8", "replace"), hashlib.sha1).digest()
    return base64.b64encode(digest).decode("ascii")


def parse_date(text):
    """Seconds since 1970 of a date with an offset, or None."""
    offset = r"(?a)(?:\.\d+)?(?:Z|([+-]\d\d):?(\d\d))\Z"
    plain = re.sub(offset, lambda found: (found.group(1) or "+00") + (found.group(2) or "00"), text)
    try:
        return datetime.datetime.strptime(plain, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def format_date(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(seconds))


def is_reading(command):
    """Whether a server that enforces POST lets this command through by GET."""
    return bool(re.fullmatch(r"(get|list|query|find)\w+", command.lower(), re.ASCII))


def to_json(tree):
    """JSON as the server writes it: control characters stand raw, having been un-escaped once more at the end."""
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    if "\\u00" not in text:
        return text
    return re.sub(r"\\\\|\\u00([01][0-9a-f])", lambda m: chr(int(m.group(1), 16)) if m.group(1) else m.group(), text)


# === [S2] simulator: the cloud ========================================================================================
# Rows in tables, jobs, and one registry of commands; listApis and the checks of parameters both come from the registry.

Rows = collections.namedtuple("Rows", "member rows")
OWNING, PAGING = "account domainid projectid listall isrecursive".split(), "keyword page pagesize".split()
OWNER_FIELDS = ("account", "domainid", "domain", "domainpath", "projectid", "project")
FURNISHED = "2026-01-12T09:30:00+0000"  # when all that is there from the beginning was made
COMMANDS = {}
OWNED = "virtualmachine volume snapshot network securitygroup project event resourcelimit".split()

# The types of parameters that are no strings. An "id" without a table is one of the command's own entity.
_TYPES = {
    "boolean": "available expunge forced isrecursive listall startvm",
    "integer": "endport page pagesize startport",
    "list": "cidrlist ids networkids resourceids",
    "long": "rootdisksize",
    "map": "details tags",
    "uuid": "domainid hostid id jobid networkid projectid securitygroupid serviceofferingid templateid "
            "virtualmachineid volumeid zoneid"}
_TYPES = {name: kind for kind, names in _TYPES.items() for name in names.split()}
_TEXTS = {
    "available": "true for zones that take new machines",
    "isrecursive": "true to include the domains below domainid",
    "listall": "true to list all that the caller may see, not only what is its own; false by default",
    "networkids": "list the networks of the machine, the default one first",
    "projectid": "the project; -1 for all projects",
    "rootdisksize": "the size of the root disk in GB",
    "startvm": "false to leave the machine stopped; true by default",
    "tags": "the tags, as key and value",
    "templatefilter": "featured, self, selfexecutable, sharedexecutable, executable, community or all",
    "userdata": "user data, base64",
}


class Command:
    """What a command is called, takes and answers with, and the function that runs it.

    Parameters are words, the required ones in the order in which the server misses them: name, then, where they apply,
    ":type" unless it is the one of _TYPES, and "!" if it is required. "+owner" is three.
    """

    def __init__(self, run, name, parameters, description, entity="success", job=False, admin=False):
        self.run, self.name, self.description, self.entity = run, name, description, entity
        self.job, self.admin, self.key = job, admin, name.lower() + "response"
        words = parameters.replace("+owner", "account domainid projectid").split()
        self.parameters = [self._parameter(word) for word in words]  # as listApis shows them

    def _parameter(self, word):
        name, _, kind = word.rstrip("!").partition(":")
        kind = kind or _TYPES.get(name, "string")
        entity = self.table_of(name) if kind == "uuid" else ""
        text = _TEXTS.get(name) or ("the id of the " + entity if entity else "the " + name)
        return {"name": name, "type": kind, "required": word.endswith("!"), "description": text,
                "length": 1048576 if name == "userdata" else 255}

    def table_of(self, name):
        """The table of what a parameter names by its id."""
        return self.entity if name == "id" else name[:-len("id")]


def command(*words, **more):
    """Register a command: its name, parameters, description and entity, as Command takes them.

    The function of a job is a generator: it yields (lock, id) when it has checked its arguments, runs to the next yield
    when the job begins, and to its return, the job's result, when the job ends. What it has made by the first yield
    stays, even if the job is refused for its customjobid.
    """

    def register(run):
        COMMANDS[words[0]] = Command(run, *words, **more)
        return run

    return register


class User:
    """Who calls: key and secret, or user name, password and domain (a path)."""

    def __init__(self, row, password, domain):
        self.row, self.password, self.domain, self.admin = row, password, domain, row["accounttype"] == 1
        self.id, self.username, self.key = row["id"], row["username"], row["apikey"]
        self.account, self.secret = row["account"], make_key(self.username + " secret")
        self.owner = dict({name: row[name] for name in ("account", "domainid", "domain")},
                          domainpath=("ROOT" + domain).rstrip("/"))


class Job:
    """An asynchronous job. What its state is depends on the clock alone: nothing runs until somebody asks."""

    _KINDS = {"virtualmachine": "VirtualMachine", "snapshot": "Snapshot"}

    def __init__(self, uuid, call, body, instance, begins):
        self.id, self.spec, self.user, self.body = uuid, call.spec, call.user, body
        self.created, self.begins, self.due = call.cloud.clock(), begins, begins + call.simulator.job_seconds
        self.status, self.code, self.result, self.completed, self.begun = 0, 0, None, None, False
        self.kind = self._KINDS.get(self.spec.entity)  # what it works on
        self.instance = instance if self.kind else None  # and the id of it

    def advance(self, now):
        if not self.begun and self.begins <= now:
            self.begun = True
            next(self.body)
        if self.begun and self.due <= now:
            next(self.body)

    def succeed(self, result):
        """Keep the result; an object in it names the job, as if it were still running."""
        self.status, self.result = 1, copy.deepcopy(result)
        for member in self.result.values() if self.instance else ():
            if "id" in member:
                member.update(jobid=self.id, jobstatus=0)

    def fail(self, error):
        self.status, self.code = 2, error.code
        self.result = {"errorcode": error.code, "errortext": error.text}

    def row(self):
        user, name, running = self.user.row, self.spec.name, None if self.status else "simulator"
        return without_none(
            account=user["account"], accountid=user["accountid"], userid=user["id"], domainid=user["domainid"],
            domainpath=self.user.owner["domainpath"], jobstatus=self.status, jobprocstatus=0, jobresultcode=self.code,
            cmd=f"org.apache.cloudstack.api.command.user.{name[0].upper()}{name[1:]}Cmd",
            jobinstancetype=self.kind, jobinstanceid=self.instance,
            managementserverid=running, managementservername=running,
            jobresulttype="object" if self.status else None, jobresult=self.result, jobid=self.id,
            created=format_date(self.created), completed=self.completed and format_date(self.completed))


def make_key(seed):
    return base64.urlsafe_b64encode(hashlib.sha512(seed.encode()).digest()).decode().rstrip("=")


def owned_by(row, owner):
    mine = ("projectid",) if "projectid" in owner else ("account", "domainid")
    return all(row.get(field) == owner[field] for field in mine)


def in_zone(zone):
    return {"zoneid": zone["id"], "zonename": zone["name"]}


class Cloud:
    """The state. The same in every run: ids are drawn from a counter."""

    def __init__(self, clock=time.time):
        self.clock, self.lock = clock, threading.RLock()
        self.jobs, self._pending, self._busy = {}, [], {}
        self.tables, self.users, self.removed = collections.defaultdict(list), {}, set()
        self._serial = self._machines = 0
        self._furnish()

    def uuid(self):
        self._serial += 1
        digest = hashlib.md5(b"simulator %d" % self._serial).hexdigest()
        return "-".join((digest[:8], digest[8:12], "4" + digest[13:16], "a" + digest[17:20], digest[20:]))

    def add(self, table, name=None, *more, **values):
        """Append a row; dicts in `more` and keywords are its fields, None ones left out as the server does."""
        row = without_none(id=self.uuid(), name=name)
        for fields in more + (values,):
            row.update(without_none(**fields))
        self.tables[table].append(row)
        return row

    def rows(self, table, **fields):
        """The rows that have these fields."""
        return [row for row in self.tables[table] if all(row.get(name) == fields[name] for name in fields)]

    def find(self, table, uuid):
        return next((row for row in self.tables[table] if row["id"] == uuid), None)

    def named(self, table, name):
        return next(iter(self.rows(table, name=name)), None)

    def remove(self, table, row):
        """Take a row away; lists that are asked for its id then show nothing, where an id that never was is refused."""
        self.tables[table].remove(row)
        self.removed.add(row["id"])

    # the furniture

    def _furnish(self):
        root = self.add("domain", "ROOT", level=0, path="ROOT", haschild=True, state="Active")
        lab = self.add("domain", "research", level=1, path="ROOT/research", haschild=False, state="Active",
                       parentdomainid=root["id"])
        admin = self._account("admin", root, 1, "Root Admin", "correct horse battery staple", "/")
        user = self._account("user", lab, 0, "User", "tilde~and+plus*", "/research")
        self.owner = admin.owner
        for name in ("north", "south"):
            self._zone(name)
        self._offerings()
        project = self.add("project", "apollo", self.owner, displaytext="The Apollo project", state="Active",
                           owner=[{"account": "admin"}], created=FURNISHED)
        apollo = dict(self.owner, projectid=project["id"], project="apollo")
        del apollo["account"]
        for owner, count in ((self.owner, 32), (user.owner, 6), (apollo, 4)):
            self._properties(owner)
            self.add_machines(count, owner)
        self.new_snapshot(self.tables["volume"][0], "before-upgrade").update(state="BackedUp", created=FURNISHED)
        self.tables["resourcelimit"] = [
            dict(owner, resourcetype=str(number), resourcetypename=kind, max=-1 if number else 500)
            for number, kind in enumerate("user_vm public_ip volume snapshot template project network".split())
            for owner in (self.owner, user.owner)]

    def _account(self, name, domain, kind, role, password, path):
        place = {"domainid": domain["id"], "domain": domain["name"]}
        account = self.add("account", name, place, accounttype=kind, rolename=role, state="enabled",
                           domainpath=("ROOT" + path).rstrip("/"))
        row = self.add("user", None, place, username=name, firstname=name.title(), lastname="Sample", state="enabled",
                       email=name + "@cloud.example", account=name, accountid=account["id"], accounttype=kind,
                       rolename=role, apikey=make_key(name + " key"))
        account["user"] = [row]
        self.users[name] = User(row, password, path)
        return self.users[name]

    def _zone(self, name):
        zone = self.add("zone", name, networktype="Advanced", internaldns1="10.0.0.53", allocationstate="Enabled",
                        tags=[])
        for number in (1, 2, 3):
            self.add("host", f"{name}-kvm-{number}", in_zone(zone), state="Up", type="Routing", hypervisor="KVM",
                     memorytotal=1 << 39, created=FURNISHED, ipaddress=f"10.0.{len(self.tables['zone'])}.{number}")

    def _offerings(self):
        north, south = self.tables["zone"]
        for name, system, has_password, zone in (
                ("Debian 12", "Debian GNU/Linux 12 (64-bit)", False, north),
                ("Debian 12", "Debian GNU/Linux 12 (64-bit)", False, south),
                ("Rocky Linux 9", "Rocky Linux 9", True, north), ("Ubuntu 24.04", "Ubuntu 24.04 LTS", False, south)):
            same = self.named("template", name)  # one template in two zones is two rows of one id
            self.add("template", name, self.owner, in_zone(zone), ostypename=system, passwordenabled=has_password,
                     displaytext=name + " cloud image", isfeatured=True, isready=True, hypervisor="KVM",
                     size=2147483648, created=FURNISHED, tags=[], id=same and same["id"])
        common = {"state": "Active", "storagetype": "shared", "created": FURNISHED}
        for name, cpus, memory in (
                ("Small", 1, 1024), ("Medium", 2, 4096), ("Large", 4, 16384), ("Titan", 512, 1 << 22)):
            self.add("serviceoffering", name, common, displaytext=f"{cpus} CPUs, {memory} MB", cpunumber=cpus,
                     cpuspeed=2000, memory=memory, iscustomized=False, issystem=False)
        for name, size in (("20 GB", 20), ("100 GB", 100)):
            self.add("diskoffering", name, common, displaytext=name + " disk", disksize=size, iscustomized=False)

    def _properties(self, owner):
        for zone in self.tables["zone"]:
            for name in ("web", "backend"):
                number = len(self.tables["network"]) + 1
                self.add("network", name, owner, in_zone(zone), displaytext=name + " tier", type="Isolated",
                         cidr=f"10.1.{number}.0/24", gateway=f"10.1.{number}.1", state="Implemented",
                         created=FURNISHED, tags=[])
        for name, text, ports in (("default", "Default Security Group", ()), ("web", "HTTP and HTTPS", (80, 443))):
            rules = [self.rule("tcp", port, port, "0.0.0.0/0") for port in ports]
            self.add("securitygroup", name, owner, description=text, ingressrule=rules, egressrule=[], tags=[])

    def rule(self, protocol, first, last, cidr):
        return without_none(ruleid=self.uuid(), protocol=protocol, startport=first, endport=last, cidr=cidr, tags=[])

    def add_machines(self, count, owner=None):
        """Put `count` more machines, each with its root volume, into the cloud; the admin's unless told otherwise."""
        owner = owner or self.owner
        for number in range(self._machines, self._machines + count):
            zone, role = self.tables["zone"][number % 2], ("web", "db", "cache", "worker")[number % 4]
            template = self.rows("template", zoneid=zone["id"])[number // 2 % 2]
            offering, seconds = self.tables["serviceoffering"][number % 3], 1771200000 + 3600 * number
            machine = self.new_machine(f"{role}-{number // 4 + 1:02d}", owner, zone, template, offering)
            machine["created"] = self.tables["volume"][-1]["created"] = format_date(seconds)
            self.leave(machine, "Running" if number % 5 != 4 else "Stopped")
            self.tag(machine, "UserVm", "role", role)
            self.event("VM.CREATE", "Successfully completed starting Vm. Vm Id: " + machine["id"], owner, seconds)

    # what commands do

    def new_machine(self, name, owner, zone, template, offering, networks=()):
        self._machines += 1
        number = self._machines
        machine = self.add(
            "virtualmachine", name, owner, in_zone(zone), displayname=name, instancename=f"i-2-{number}-VM",
            userid=self.users["admin"].id, username="admin", created=format_date(self.clock()), state="Stopped",
            templateid=template["id"], templatename=template["name"], osdisplayname=template["ostypename"],
            passwordenabled=template["passwordenabled"], hypervisor="KVM", serviceofferingid=offering["id"],
            serviceofferingname=offering["name"], details={}, securitygroup=[], affinitygroup=[], tags=[],
            **{field: offering[field] for field in ("cpunumber", "cpuspeed", "memory")})
        own = [row for row in self.rows("network", zoneid=zone["id"]) if owned_by(row, owner)][:1]
        machine["nic"] = [self._nic(network, number, not index) for index, network in enumerate(networks or own)]
        machine["ipaddress"] = machine["nic"][0]["ipaddress"]
        self.add("volume", f"ROOT-{number}", owner, in_zone(zone), size=20 << 30, type="ROOT", state="Ready", tags=[],
                 created=machine["created"], deviceid=0, vmname=name, virtualmachineid=machine["id"])
        return machine

    def _nic(self, network, number, default):
        address = f"{network['cidr'].rpartition('.')[0]}.{10 + number % 240}"
        return {"id": self.uuid(), "networkid": network["id"], "networkname": network["name"], "isdefault": default,
                "gateway": network["gateway"], "ipaddress": address, "type": network["type"],
                "netmask": "255.255.255.0", "macaddress": f"02:01:00:{number >> 8 & 255:02x}:{number & 255:02x}:01"}

    def new_snapshot(self, volume, name):
        owner = {field: volume[field] for field in OWNER_FIELDS if field in volume}
        return self.add("snapshot", name or volume["name"] + "_snapshot", owner, zoneid=volume["zoneid"],
                        volumeid=volume["id"], volumename=volume["name"], virtualsize=volume["size"],
                        state="BackingUp", created=format_date(self.clock()), tags=[])

    def leave(self, machine, state):
        """Leave a machine in a state, on a host if it runs."""
        hosts = self.rows("host", zoneid=machine["zoneid"])
        host = hosts[int(machine["instancename"].split("-")[2]) % len(hosts)]
        machine.update(state=state, hostid=host["id"], hostname=host["name"])
        if state != "Running":
            del machine["hostid"], machine["hostname"]

    def tag(self, row, kind, key, value):
        owner = {field: row[field] for field in OWNER_FIELDS if field in row}
        row["tags"].append(dict(owner, key=key, value=value, resourcetype=kind, resourceid=row["id"]))

    def event(self, kind, text, owner, seconds):
        self.add("event", None, owner, username="admin", type=kind, level="INFO", description=text, state="Completed",
                 created=format_date(seconds))

    # jobs

    def submit(self, call, body):
        """Start a job: its generator has the arguments checked now, and begins when nothing holds its lock.

        The caller's own id for it is looked at last: what the generator has made by then stays.
        """
        (lock, entity), custom = next(body), call.plain.get("customjobid")
        require(not custom or re.fullmatch("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", custom),
                f"UUID: {custom} doesn't follow the UUID format")
        require(custom not in self.jobs, "Entity already exists ", 530)
        job = Job(custom or self.uuid(), call, body, entity or lock, max(self.clock(), self._busy.get(lock, 0)))
        if lock:
            self._busy[lock] = job.due
        self.jobs[job.id] = job
        self._pending.append(job)
        self.settle()
        return without_none(id=entity, jobid=job.id)

    def settle(self):
        """Let every job come as far as the clock says it is."""
        now, pending, self._pending = self.clock(), self._pending, []
        for job in pending:
            try:
                job.advance(now)
                self._pending.append(job)
                continue
            except StopIteration as stop:
                job.succeed(stop.value)
                kind = re.sub("(?<=[a-z])(?=[A-Z])", ".", job.spec.name).upper()
                self.event(kind, "Successfully completed " + job.spec.name, job.user.owner, now)
            except ApiError as error:
                job.fail(error)
            job.completed = max(job.due, job.created)


class Call:
    """One command being run: who asks, with which converted arguments."""

    def __init__(self, simulator, user, spec, params):
        self.simulator, self.cloud, self.user, self.spec = simulator, simulator.cloud, user, spec
        self.plain, self.maps, self.args, self.cookies = {}, {}, {}, ()  # maps: {"tags": {0: {"key": .., "value": ..}}}
        self.get = self.args.get
        for name, value in params.items():
            if "[" not in name and "]" not in name:
                self.plain[name.lower()] = value
                continue
            match = re.fullmatch(r"([^\[\]]+)\[([0-9]+)\]\.([^\[\]]+)", name)
            text = f"Unable to decode parameter: {name}; an array of objects is written parameter[index].field=value"
            require(match, text, 430)
            table, index, field = match.groups()
            self.maps.setdefault(table.lower(), {}).setdefault(int(index), {})[field] = value

    def convert(self):
        """Fill args from the parameters that the command declares; everything else is ignored in silence."""
        for parameter in self.spec.parameters:
            name, kind = parameter["name"], parameter["type"]
            value = self.maps.get(name) if kind == "map" else self.plain.get(name)
            if value or (value == "" and kind == "string"):
                self.args[name] = self._converted(name, kind, value, parameter["length"])
            elif parameter["required"]:
                text = f"Unable to execute API command {self.spec.name.lower()} due to missing parameter {name}"
                raise ApiError(431, text, cserrorcode=9999)

    def _converted(self, name, kind, value, length):
        if kind == "map":
            return [value[index] for index in sorted(value)]
        if kind == "boolean":
            return value.lower() == "true"
        if kind == "list":
            return value.split(",")
        if kind == "uuid":
            require(self._is_known(name, value), self.invalid(name, value), cserrorcode=9999)
        elif kind != "string":
            require(re.fullmatch("-?[0-9]+", value), self.invalid(name, value), cserrorcode=9999)
            return int(value)
        text = f"Value greater than max allowed length {length} for param: {name}"
        require(len(value) <= length, text, cserrorcode=9999)
        return value

    def _is_known(self, name, value):
        """Whether there is what an id names; jobs are looked for by the command itself."""
        if name == "jobid" or (name == "projectid" and value == "-1"):
            return True
        is_gone = is_reading(self.spec.name) and value in self.cloud.removed
        return is_gone or self.cloud.find(self.spec.table_of(name), value)

    def invalid(self, name, value):
        return (f"Unable to execute API command {self.spec.name.lower()} due to invalid value. Invalid parameter "
                f"{name} value={value} due to incorrect long value format, or entity does not exist or due to "
                "incorrect parameter annotation for the field in api cmd class.")

    def entity(self, table, name="id"):
        """The row that an argument names, the caller's right to it checked; None without the argument."""
        row = self.cloud.find(table, self.args[name]) if name in self.args else None
        if row and table in OWNED:
            self.check_access(row)
        return row

    def check_access(self, row):
        text = "Caller does not have permission to operate with provided resource."
        require(self.user.admin or owned_by(row, self.user.owner), text, 531)

    def entities(self, table, name):
        """The rows of a list of ids, in the order given."""
        rows = [self.cloud.find(table, uuid) for uuid in self.get(name, ())]
        require(None not in rows, f"Unable to find {table} by id")
        for row in rows:
            self.check_access(row)
        return rows

    def mine(self, table, name):
        owner = self.owner()
        return next((row for row in self.cloud.rows(table, name=name) if owned_by(row, owner)), None)

    def owner(self):
        """Who will own what is created: the caller, or the account or project that it names."""
        if "projectid" in self.args:
            row = self.entity("project", "projectid")
            place = {field: row[field] for field in ("domainid", "domain", "domainpath")}
            return dict(place, projectid=row["id"], project=row["name"])
        owner = self.cloud.users.get(self.get("account"), self.user).owner
        self.check_access(owner)
        return owner

    def tags(self):
        """A map in key and value style."""
        tags = self.get("tags", ())
        require(all("key" in tag for tag in tags), "Malformed parameter tags: key and value are needed", 430)
        return [(tag["key"], tag.get("value")) for tag in tags]

    def page(self, rows):
        """The part of the rows that the page parameters ask for."""
        limit, page, size = self.simulator.default_page_size, self.get("page"), self.get("pagesize")
        if (page is None) != (size is None):
            given, needed = ("pagesize", "page") if page is None else ("page", "pagesize")
            raise ApiError(431, f'"{needed}" parameter is required when "{given}" is specified', cserrorcode=9999)
        if page is None:
            return rows[:limit]
        require(size <= limit, f"Page size can't exceed max allowed page size value: {limit}")
        require(page >= 1 and size >= 1, "page and pagesize have to be positive")
        return rows[(page - 1) * size:page * size]


# lists

_NO_FILTER = {*OWNING, *PAGING, "available", "details", "templatefilter"}
_TEMPLATE_FILTERS = "featured self selfexecutable sharedexecutable executable community all".split()


def visible(call, rows):
    """Those of the rows of owned things that the call is about."""
    user, project = call.user, call.get("projectid")
    if project:
        return [row for row in rows if "projectid" in row and project in ("-1", row["projectid"])
                and (user.admin or row["domainid"] == user.owner["domainid"])]
    wanted = {name: call.args[name] for name in ("account", "domainid") if name in call.args}
    if not user.admin or not (wanted or call.get("listall")):
        wanted = {name: user.owner[name] for name in ("account", "domainid")}
    return [row for row in rows if "projectid" not in row and all(row[name] == wanted[name] for name in wanted)]


def select(call, rows):
    """The rows that pass every filter among the arguments."""
    require(not ("id" in call.args and "ids" in call.args), "Specify either id or ids but not both parameters")
    require(call.get("templatefilter", "all") in _TEMPLATE_FILTERS, "Please specify a valid template filter")
    is_machine = call.spec.entity == "virtualmachine"
    for name, value in call.args.items():
        word = str(value).lower()
        if name == "keyword" or (name == "name" and is_machine):
            fields = ("name", "displayname") if is_machine and name == "keyword" else ("name",)
            rows = [row for row in rows if any(word in row.get(field, "").lower() for field in fields)]
        elif name == "tags":
            rows = [row for row in rows if all(has_tag(row, *tag) for tag in call.tags())]
        elif name == "ids":
            rows = [row for row in rows if row["id"] in value]
        elif name == "networkid":
            rows = [row for row in rows if value in [nic["networkid"] for nic in row["nic"]]]
        elif name not in _NO_FILTER:
            rows = [row for row in rows if str(row.get(name, "")).lower() == word]
    return rows


def has_tag(row, key, value):
    return any(tag["key"] == key and value in (None, tag["value"]) for tag in row.get("tags", ()))


def _list(name, table, parameters="", description=None, rows=None, admin=False):
    """Register a command that lists a table, or of it what `rows` gives for a call."""
    owned = table in OWNED or table == "template"
    parameters = " ".join([parameters, *PAGING, *(word for word in OWNING if owned and word != table + "id")])

    def run(call):
        found = call.cloud.tables[table]
        return Rows(table, select(call, rows(call, found) if rows else visible(call, found) if owned else found))

    command(name, parameters, description or f"Lists {table}s.", table, admin=admin)(run)


def _accounts(call, rows):
    every = call.user.admin and call.get("listall")
    return [row for row in rows if every or row["name"] == call.user.account]


_list("listZones", "zone", "id name available networktype tags")
_list("listHosts", "host", "id name zoneid type state hypervisor", admin=True)
_list("listServiceOfferings", "serviceoffering", "id name virtualmachineid", "Lists service offerings.")
_list("listDiskOfferings", "diskoffering", "id name", "Lists disk offerings.")
_list("listNetworks", "network", "id name zoneid type tags")
_list("listDomains", "domain", "id name listall", admin=True)
_list("listUsers", "user", "id username account", admin=True)
_list("listProjects", "project", "id name state")
_list("listVirtualMachines", "virtualmachine", "id ids name zoneid state hostid templateid serviceofferingid networkid "
      "tags details:list", "Lists the virtual machines of the caller.")
_list("listVolumes", "volume", "id ids name zoneid type state virtualmachineid tags")
_list("listSnapshots", "snapshot", "id ids name volumeid zoneid tags")
_list("listEvents", "event", "id type level", rows=lambda call, rows: visible(call, rows)[::-1])
_list("listResourceLimits", "resourcelimit", "resourcetype:integer", "Lists resource limits.")
_list("listTemplates", "template", "templatefilter! id ids name zoneid hypervisor tags", rows=lambda call, rows: rows)
_list("listAccounts", "account", "id name state domainid listall isrecursive", rows=_accounts)
_list("listSecurityGroups", "securitygroup", "id tags", "Lists security groups.")


@command("listAsyncJobs", "account domainid listall isrecursive keyword page pagesize",
         "Lists the jobs that are not done yet.", "job")
def _list_async_jobs(call):
    every = call.user.admin and call.get("listall")
    pending = [job for job in call.cloud.jobs.values() if job.status == 0
               and (every or job.user.account == call.user.account)]
    return Rows("asyncjobs", [job.row() for job in sorted(pending, key=lambda job: job.created)])


@command("queryAsyncJobResult", "jobid", "Asks for the state and the result of a job.", "job")
def _query_job(call):
    require("jobid" in call.args, "Expected parameter job id or parameters resource type and resource id")
    user, job = call.user, call.cloud.jobs.get(call.args["jobid"])
    require(job, call.invalid("jobid", call.args["jobid"]), cserrorcode=9999)
    who = to_json({"accountName": user.account, "id": 1, "uuid": user.row["accountid"]})
    text = f"Account Account [{who}] is not authorized to see job id=1"
    require(user.admin or job.user.account == user.account, text, 531)
    return job.row()


@command("listCapabilities", "", "Lists what the server can do.", "capability")
def _list_capabilities(call):
    return {"capability": {"cloudstackversion": "4.23.0.0", "securitygroupsenabled": True, "defaultuipagesize": 20,
                           "userpublictemplateenabled": True, "dynamicrolesenabled": True}}


# what makes and changes things


def failing(body):
    """The course of a job that comes to nothing once it has begun."""
    yield next(body)
    yield
    raise ApiError(530, "Failed, as the simulator was told")


@command("deployVirtualMachine",
         "serviceofferingid! zoneid! templateid name displayname networkids rootdisksize details userdata hostid "
         "startvm +owner", "Creates a virtual machine and starts it.", "virtualmachine", job=True)
def _deploy(call):
    cloud, get = call.cloud, call.get
    require("templateid" in call.args, "Unable to use template null")
    require(re.fullmatch(r"[A-Za-z0-9+/_\s-]*=*\s*", get("userdata", "")), "User data is not base64 encoded")
    zone, networks = call.entity("zone", "zoneid"), call.entities("network", "networkids")
    template, offering = call.entity("template", "templateid"), call.entity("serviceoffering", "serviceofferingid")
    name = get("name") or "VM-" + cloud.uuid()
    machine = cloud.new_machine(name, call.owner(), zone, template, offering, networks)
    machine["displayname"], uuid = get("displayname", name), machine["id"]
    yield uuid, uuid
    machine["state"] = "Starting"
    yield
    if machine["cpunumber"] > 64:
        machine["state"] = "Error"
        who = {"id": 1, "instanceName": machine["instancename"], "state": "Stopped", "type": "User", "uuid": uuid}
        raise ApiError(533, "No destination found for a deployment for VM instance " + to_json(who))
    cloud.leave(machine, "Running" if get("startvm", True) else "Stopped")
    return {"virtualmachine": dict(machine, password=make_key(uuid)[:12]) if machine["passwordenabled"] else machine}


def _machine_job(name, parameters, description, needed, meanwhile, then):
    """Register a job that finds a machine in one of some states and leaves it in another."""

    def run(call):
        machine = call.entity("virtualmachine")
        yield machine["id"], None
        text = f"The virtual machine {machine['id']} ({machine['name']}) is already {machine['state'].lower()}"
        require(machine["state"] in needed.split(), text)
        machine["state"] = meanwhile
        yield
        call.cloud.leave(machine, then)
        return {"virtualmachine": machine}

    command(name, parameters, description, "virtualmachine", job=True)(run)


_machine_job("startVirtualMachine", "id!", "Starts a virtual machine.", "Stopped", "Starting", "Running")
_machine_job("stopVirtualMachine", "id! forced", "Stops a virtual machine.", "Running Stopped", "Stopping", "Stopped")
_machine_job("rebootVirtualMachine", "id! forced", "Reboots a virtual machine.", "Running", "Running", "Running")


@command("destroyVirtualMachine", "id! expunge", "Destroys a virtual machine.", "virtualmachine", job=True)
def _destroy(call):
    machine, cloud = call.entity("virtualmachine"), call.cloud
    yield machine["id"], None
    yield
    cloud.leave(machine, "Destroyed")
    if not call.get("expunge"):
        return {"virtualmachine": machine}
    for volume in cloud.rows("volume", virtualmachineid=machine["id"]):
        cloud.remove("volume", volume)
    cloud.remove("virtualmachine", machine)
    lists = {name: [] for name in ("affinitygroup", "nic", "securitygroup", "tags")}
    return {"virtualmachine": dict(lists, deleteprotection=False)}  # nothing else is left to tell of


@command("createSnapshot", "volumeid! name account domainid", "Takes a snapshot of a volume.", "snapshot", job=True)
def _create_snapshot(call):
    snapshot = call.cloud.new_snapshot(call.entity("volume", "volumeid"), call.get("name"))
    yield snapshot["volumeid"], snapshot["id"]
    yield
    snapshot["state"] = "BackedUp"
    return {"snapshot": snapshot}


@command("createTags", "tags! resourcetype! resourceids!", "Puts tags on resources.", "tag", job=True)
def _create_tags(call):
    kind, tags = call.args["resourcetype"], call.tags()
    rows = call.entities(kind.lower().replace("uservm", "virtualmachine"), "resourceids")
    yield None, None
    yield
    for row, (key, value) in itertools.product(rows, tags):
        require(not has_tag(row, key, None), f"tag {key} already on {kind} with id {row['id']}", 530)
        call.cloud.tag(row, kind, key, value)
    return {"success": True}


@command("createSecurityGroup", "name! description +owner", "Creates a security group.", "securitygroup")
def _create_security_group(call):
    name = call.args["name"]
    require(not call.mine("securitygroup", name), f"A security group with name '{name}' already exists.")
    group = call.cloud.add("securitygroup", name, call.owner(), description=call.get("description", ""),
                           ingressrule=[], egressrule=[], tags=[])
    return {"securitygroup": group}


@command("authorizeSecurityGroupIngress",
         "securitygroupid securitygroupname protocol startport endport cidrlist +owner",
         "Lets traffic into a security group.", "securitygroup", job=True)
def _authorize(call):
    get = call.get
    group = call.entity("securitygroup", "securitygroupid") or call.mine("securitygroup", get("securitygroupname"))
    require(group, "Unable to find security group")
    yield group["id"], None
    yield
    rules = [call.cloud.rule(get("protocol", "all").lower(), get("startport"), get("endport"), cidr)
             for cidr in get("cidrlist", ["0.0.0.0/0"])]
    group["ingressrule"] += rules
    return {"securitygroup": dict(group, ingressrule=rules)}


# listApis

_KINDS = {bool: "boolean", int: "integer", dict: "map", list: "list"}
_JOB_FIELDS = [
    {"name": name, "description": f"the {text} of the latest async job acting on this object", "type": kind}
    for name, text, kind in (("jobid", "UUID", "string"), ("jobstatus", "current status", "integer"))]


def _response_fields(entity, rows):
    """Name and type of each field in the rows of an entity, nested lists of objects described in turn."""
    fields = {}
    for row in rows:
        fields.update({name: value for name, value in row.items() if value or name not in fields})
    described = []
    for name, value in fields.items():
        kind = "date" if name == "created" else _KINDS.get(type(value), "string")
        described.append({"name": name, "description": f"the {name} of the {entity}", "type": kind})
        if kind == "list" and value and isinstance(value[0], dict):
            described[-1]["response"] = _response_fields(name, value)
    return described


@functools.lru_cache(maxsize=None)
def schema():
    """Pairs of a command and its entry in listApis, made once: (Command, dict)."""
    tables, pairs = Cloud().tables, []
    for spec in COMMANDS.values():
        fields = _response_fields(spec.entity, tables[spec.entity] or [{"success": True, "displaytext": ""}])
        pairs.append((spec, {
            "name": spec.name, "description": spec.description, "isasync": spec.job, "params": spec.parameters,
            "response": fields + (_JOB_FIELDS if spec.job else []) + [{}]}))  # the server ends it so
    return pairs


@command("listApis", "name", "Lists the commands that the caller may use.", "api")
def _list_apis(call):
    name = call.get("name", "").lower()
    entries = [entry for spec, entry in schema()
               if call.simulator.allowed(call.user, spec) and name in ("", spec.name.lower())]
    require(entries, f"Unable to find the API {name}")
    random.shuffle(entries)
    return {"count": len(entries), "api": entries}


@command("login", "username! password! domain", "Starts a session; by POST only.", "session")
def _login(call):
    return call.simulator.sessions.open(call)


@command("logout", "", "Ends the session.", "session")
def _logout(call):
    return {"description": "success"}


# === [S3] simulator: server ===========================================================================================
# Sessions, the checks before a command runs, connections, and the Simulator that holds them together.


class Sessions:
    """Who has logged in. A session is a cookie and a session key that has to come with it."""

    def __init__(self, simulator):
        self.simulator, self.open_sessions = simulator, {}

    def open(self, call):
        name, domain = call.args["username"], call.get("domain", "/").strip("/")
        user = call.cloud.users.get(name)
        is_known = user and user.password == call.args["password"] and user.domain.strip("/") == domain
        text = f"Failed to authenticate user {name} in domain 1; please provide valid credentials"
        require(is_known, text, 531, cserrorcode=None)
        uuid, key = "node0" + call.cloud.uuid().replace("-", ""), make_key(call.cloud.uuid())[:27]
        self.open_sessions[uuid] = [user, key, self.simulator.clock()]
        call.cookies = [f"JSESSIONID={uuid}; Path=/client; HttpOnly", f"sessionkey={key}; HttpOnly"]
        shown = {field: user.row[field] for field in ("username", "domainid", "account", "firstname", "lastname")}
        return dict(shown, userid=user.id, timeout=self.simulator.session_timeout, registered="false", sessionkey=key,
                    type=str(user.row["accounttype"]))

    def user(self, record):
        """The user of a live session, or None without one. What does not know the session key ends the session."""
        cookies, now = record.cookies(), self.simulator.clock()
        session = self.open_sessions.get(cookies.get("JSESSIONID"))
        if session is None or now > session[2] + self.simulator.session_timeout:
            self.close(record)
            return None
        if not session[1] == cookies.get("sessionkey") == record.params.get("sessionkey"):
            self.close(record)
            raise ApiError(401, CREDENTIALS_TEXT, cserrorcode=None)
        session[2] = now
        return session[0]

    def close(self, record):
        self.open_sessions.pop(record.cookies().get("JSESSIONID"), None)


class Simulator:
    """A management server on loopback.

    `with Simulator() as cloud:` or start() and stop(). Every option is an attribute that may be changed while it runs.
    """

    OPTIONS = {  # name: (value, what it is, for the sandbox's --help)
        "job_seconds": (0.3, "how long a job takes"),
        "latency": (0.0, "how long the server thinks before each answer"),
        "fails": ((), "commands that fail; if they make a job, the job"),
        "maintenance": (False, "every command is refused with 503"),
        "html_error": (0, "a status: every answer is this one in HTML, as a proxy's"),
        "enforce_post": (False, "commands that change something must come by POST, and expire"),
        "rate_limit": (0, "requests a second that an account has"),
        "default_page_size": (500, "rows of a page at most"),
        "session_timeout": (1800, "seconds until an idle session ends"),
        "role_lacks": (("listAsyncJobs", "listApis"), 'commands that the role of "user" may not call'),
        "clock": (time.time, "seconds since 1970"),
    }

    def __init__(self, port=0, **options):
        self.port = port
        vars(self).update({name: value for name, (value, _) in self.OPTIONS.items()}, **options)
        self.requests, self.sessions = [], Sessions(self)
        self._scripts, self._counts = collections.defaultdict(collections.deque), collections.Counter()
        self._lock, self.cloud = threading.RLock(), Cloud(lambda: self.clock())
        self.users = self.cloud.users  # by user name: "admin", and "user" whose role lacks some commands
        self.key, self.secret = self.users["admin"].key, self.users["admin"].secret

    # the public face

    def start(self):
        self._listener = Listener(self)
        self.port = self._listener.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}/client/api"
        threading.Thread(target=self._listener.serve_forever, args=[0.02], name="simulator", daemon=True).start()
        return self

    __enter__ = start

    def stop(self):
        """Close every socket."""
        self._listener.shutdown()
        self._listener.server_close()
        for sock in list(self._listener.connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __exit__(self, *exc_info):
        self.stop()

    def script(self, command_name, *answers):
        """Have the next exchanges of a command (None: of any) answered by these: an Answer, DROP, RUN_THEN_DROP, None
        (as usual), or a callable that is given the Record and returns one of these."""
        with self._lock:
            self._scripts[command_name].extend(answers)

    def allowed(self, user, spec):
        return user.admin or not (spec.admin or spec.name in self.role_lacks)

    def receive(self, record):
        self.requests.append(record)

    def scripted(self, record):
        """What the script has for this exchange: an Answer, DROP, RUN_THEN_DROP, or None."""
        with self._lock:
            queue = self._scripts.get(record.command) or self._scripts.get(None)
            step = queue.popleft() if queue else None
        return step(record) if callable(step) else step

    # one exchange

    def answer(self, record):
        """Check and run the command of a request; the Answer."""
        if self.html_error or record.path.rstrip("/") != "/client/api":
            return html_page(self.html_error or 404)
        if record.command == "login" and record.method != "POST":
            return Answer(405, "login takes POST requests only", {"Content-Type": "text/plain", "Allow": "POST"})
        spec, headers, cookies = COMMANDS.get(record.command), {"X-Content-Type-Options": "nosniff"}, ()
        key, status = spec.key if spec else "errorresponse", 200
        with self.cloud.lock:
            try:
                body, cookies = self._checked(record, spec)
            except Exception as error:  # a mistake in the simulator itself must not look like a network failure
                failure = error if isinstance(error, ApiError) else ApiError(530, f"Internal error: {error!r}")
                status, body = failure.code, failure.body()
                headers.update(failure.headers())
                if status == 432:
                    key = "errorresponse" if spec else "null"
            return Answer(status, {key: body}, headers, cookies=cookies)

    def _checked(self, record, spec):
        """Every check before a command runs, then the command: (body, cookies)."""
        self.cloud.settle()
        user = self._authenticated(record, spec)
        if user and spec and not self.allowed(user, spec):
            text = f"The API [{spec.name}] does not exist or is not available for the account {user.account}."
            raise ApiError(432, text)
        require(spec, f"The given command '{record.command}' either does not exist, is not available for user, or not "
                      "available from ip address '127.0.0.1'.", 432)
        require(not self.maintenance, "The server is in maintenance and does not take requests", 503)
        if user and self.rate_limit:
            now = self.clock()
            self._counts[user.account, int(now)] += 1
            text = "The given user has reached his/her account api limit, please retry after [{}] ms."
            is_within = self._counts[user.account, int(now)] <= self.rate_limit
            require(is_within, text.format(1000 - int(now % 1 * 1000)), 429)
        for name, value in record.params.items():
            shown = _CONTROL.sub("?", name)
            text = "Received value containing illegal ASCII non-printable characters for parameter " + shown
            require(shown == name and not _CONTROL.search(value), text, cserrorcode=9999)
        call = Call(self, user, spec, record.params)
        call.convert()
        return self._run(call), call.cookies

    def _authenticated(self, record, spec):
        """The user who asks; None where nobody needs to be known."""
        if spec and spec.name in ("login", "logout"):
            if spec.name == "logout":
                self.sessions.close(record)
            return None
        if self.enforce_post and record.method != "POST" and not is_reading(record.command or ""):
            raise ApiError(400, f"State changing command {record.command} needs to be sent using POST request")
        return self.sessions.user(record) or self._verified(record.params, spec)

    def _verified(self, params, spec):
        """The user whose key and signature these are. What is wrong is not told."""
        user = next((user for user in self.users.values() if user.key == params.get("apiKey")), None)
        if user and spec and self._fresh(params):
            given = params.get("signature", "").encode("utf-8", "replace")
            if hmac.compare_digest(signature_of(params, user.secret).encode(), given):
                return user
        raise ApiError(401, CREDENTIALS_TEXT, cserrorcode=None)

    def _fresh(self, params):
        lowered = {name.lower(): value for name, value in params.items()}
        if lowered.get("signatureversion") != "3":
            return not self.enforce_post
        expires, now = parse_date(lowered.get("expires", "")), self.clock()
        return expires is not None and expires >= now and not (self.enforce_post and expires > now + 900)

    def _run(self, call):
        spec, fails = call.spec, call.spec.name in self.fails
        if spec.job:
            body = spec.run(call)
            return self.cloud.submit(call, failing(body) if fails else body)
        require(not fails, "Failed, as the simulator was told", 530)
        result = spec.run(call)
        if not isinstance(result, Rows):
            return result
        page = call.page(result.rows)
        return dict({"count": len(result.rows)} if result.rows else {}, **{result.member: page} if page else {})


class Listener(socketserver.ThreadingTCPServer):
    """The sockets of a simulator: one that listens, and the connections."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 512

    def __init__(self, simulator):
        self.simulator, self.connections = simulator, set()
        super().__init__(("127.0.0.1", simulator.port), Connection)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_):
        """A client that is gone, or speaks no HTTP."""


class Connection(http.server.BaseHTTPRequestHandler):
    """One TCP connection, served request after request in a thread of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30  # seconds until an idle connection is closed

    def do_GET(self):
        simulator, body = self.server.simulator, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        record = Record(self.command, self.path, self.headers, body, self.client_address)
        simulator.receive(record)
        step = simulator.scripted(record) if len(self.requestline) <= MAX_LINE else html_page(414)
        time.sleep(simulator.latency)
        answer = simulator.answer(record) if step in (None, RUN_THEN_DROP) else step
        if step in (DROP, RUN_THEN_DROP):
            self.close_connection = True
        else:
            self._send(answer)

    do_POST = do_GET

    def _send(self, answer):
        headers = [*answer.headers.items(), ("Content-Length", len(answer.body))]
        headers += [("Set-Cookie", cookie) for cookie in answer.cookies]
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, answer.status)}"]
        lines += [f"{name}: {value}" for name, value in headers] + ["Connection: close"] * self.close_connection
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + answer.body)

    def log_message(self, *_):
        """Standard error is the client's."""


# === [X] sandbox ======================================================================================================
# The simulator for people: one command against it, or the server alone until Ctrl-C.

FAULTS = [name for name, (value, _) in Simulator.OPTIONS.items() if type(value) in (bool, int)]


def fault(text):
    """NAME or NAME=NUMBER as (name, value)."""
    name, equals, number = text.partition("=")
    if name not in FAULTS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(FAULTS)}")
    return name, int(number) if equals or Simulator.OPTIONS[name][0] is not False else True


def wide_help(prog):
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=120)


def sandbox_parser():
    parser = argparse.ArgumentParser(
        usage="test_cs.py sandbox [OPTION ...] [COMMAND [name=value ...]]", add_help=False, allow_abbrev=False,
        formatter_class=wide_help, description=inspect.getdoc(sandbox),
        epilog="".join(f"{name:18} {Simulator.OPTIONS[name][1]}\n" for name in FAULTS))
    option = parser.add_argument
    option("--port", type=int, default=0, metavar="N", help="listen on this port of 127.0.0.1 instead of any free one")
    option("--job-seconds", type=float, default=0.3, metavar="S",
           help="how long a job takes (0.3); 8 leaves time for Ctrl-C")
    option("--latency", type=float, default=0, metavar="S", help="how long the server thinks before each answer")
    option("--fail", action="append", default=[], metavar="COMMAND", choices=sorted(COMMANDS),
           help="let this command fail, or the job that it makes; may be repeated")
    option("--fault", action="append", default=[], metavar="NAME[=NUMBER]", type=fault,
           help="a server in trouble, or one with other limits, as below; may be repeated")
    return parser


class Sandbox(Simulator):
    """Says so when it is asked for a command that it does not have: the server's own answer blames the credentials."""

    def receive(self, record):
        if record.command not in COMMANDS:
            print(f"sandbox: there is no command {record.command!r} here; `cs --list` shows those that there are",
                  file=sys.stderr, flush=True)
        super().receive(record)


def sandbox(argv):
    """With a command: start a small simulated cloud, run cs.py with these words against it once, and end with its exit
    code. Without one: keep the cloud running until Ctrl-C, and print the lines to paste into another shell.

    No file of yours is read or written: the home directory and the cache are temporary ones. The list of commands is
    already there, so names can be given for ids: test_cs.py sandbox stopVirtualMachine id=name:web-01
    --help before a command shows this; after it, cs.py's own help about the command."""
    parser = sandbox_parser()
    given, words = parser.parse_known_args(argv)
    if words[:1] in (["--help"], ["-h"]):
        print(parser.format_help(), end="")
        return 0
    try:
        simulator = Sandbox(given.port).start()
    except (OSError, OverflowError) as error:
        parser.error(f"--port: {error}")
    try:
        end_on_signals()
        with tempfile.TemporaryDirectory(prefix="cs-sandbox-") as home:
            settings = {"CLOUDSTACK_ENDPOINT": simulator.endpoint, "CLOUDSTACK_KEY": simulator.key,
                        "CLOUDSTACK_SECRET": simulator.secret, "XDG_CACHE_HOME": home}
            with mock.patch.dict(os.environ, clean_environment(**settings), clear=True):
                cs.main(["--sync", "-q"])
            vars(simulator).update(
                given.fault, job_seconds=given.job_seconds, latency=given.latency, fails=given.fail)
            return run_command(words, dict(settings, HOME=home)) if words else stay(simulator, settings)
    except KeyboardInterrupt:
        return 130
    finally:
        simulator.stop()


def end_on_signals():
    """Let SIGTERM and SIGHUP end this process in order, so that what it started ends as well."""
    for number in {getattr(signal, name, signal.SIGTERM) for name in ("SIGTERM", "SIGHUP")}:
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def run_command(argv, settings):
    """Run cs.py's command line as a process of its own; Ctrl-C is the child's to answer."""
    child = subprocess.Popen([sys.executable, CS_PATH] + argv, env=clean_environment(**settings))
    try:
        while child.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):
                child.wait()
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def stay(simulator, settings):
    """Print the settings as lines for a shell, with what else there is to try, and wait for Ctrl-C."""
    user = simulator.users["user"]
    session = {"USERNAME": user.username, "PASSWORD": shlex.quote(user.password), "DOMAIN": user.domain}
    with contextlib.suppress(KeyboardInterrupt):
        for name, value in sorted(settings.items()):
            print(f"export {name}={value}", flush=True)
        print("A small cloud answers until Ctrl-C. Paste these lines into another shell, then try:\n"
              "  python3 cs.py listZones\n"
              "and one that fails:\n"
              "  python3 cs.py deployVirtualMachine zoneid=name:north templateid='name:Debian 12' "
              "serviceofferingid=name:Titan\n"
              "or log in by user name instead of the key:\n"
              "  export CLOUDSTACK_KEY=", " ".join(f"CLOUDSTACK_{name}={value}" for name, value in session.items()),
              file=sys.stderr, flush=True)
        while True:
            time.sleep(3600)
    return 0


# === [S4] tests of the simulator and the sandbox ======================================================================
# What the tests of the client would not notice, and .ci/replay.py, which holds the simulator beside a live server's
# recordings, cannot see: signatures, time, refusals. Requests are written by hand; the client has part in what a server
# that demands more does to it.


class SimulatorTest(unittest.TestCase):
    """A simulator without sockets, whose clock stands still unless a test moves it."""

    def setUp(self):
        self.now = 1788249600.25  # 2026-09-01T08:00:00.25Z
        self.simulator = Simulator(clock=lambda: self.now)

    def exchange(self, target, method="GET", body="", **headers):
        """The Answer to one request."""
        return self.simulator.answer(Record(method, target, headers, body.encode("ascii"), None))

    def call(self, command_name, params=None, user="admin", **more):
        """(status, the value of the single key) of a signed command."""
        account = self.simulator.users[user]
        params = dict(params or {}, command=command_name, response="json", apiKey=account.key, **more)
        answer = self.exchange("/client/api?" + urlencode(dict(params, signature=signature_of(params, account.secret))))
        (value,) = json.loads(answer.body.decode("utf-8"), strict=False).values()
        return answer.status, value

    def ok(self, command_name, params=None, **more):
        status, value = self.call(command_name, params, **more)
        self.assertEqual(200, status, value)
        return value

    def fails(self, code, command_name, params=None, **more):
        status, value = self.call(command_name, params, **more)
        self.assertEqual((code, code), (status, value["errorcode"]), value)
        return value["errortext"]

    def first(self, table, **fields):
        return self.simulator.cloud.rows(table, **fields)[0]

    # signatures: the vectors were made with the openssl program from texts written by hand

    @each("secret, params, expected",
          ("Secret", {"name": "a~b *+\u00e9-_.\n", "apiallowed": "1", "command": "listZones", "response": "json",
                      "empty": "", "apiKey": "KEY", "details[0].key": "x/Y", "signature": "left out"},
           "QW63KNEFjGW2GXgJMtwL9vZ9jbM="),
          ("s", {"\uff61": "4", "\U0001f600": "3", "a": "2", "Z": "1"}, "v179xoXYWeGVoHIu3e+soppR7A0="))
    def test_signatures(self, secret, params, expected):
        self.assertEqual(expected, signature_of(params, secret))

    def test_refusals_are_all_alike(self):
        good = {"command": "listZones", "response": "json", "apiKey": self.simulator.key}
        signature = signature_of(good, self.simulator.secret)
        for params in (dict(good, signature="x"), good, dict(good, signature=signature, name="added"),
                       dict(good, apiKey="nobody", signature=signature), {"command": "listZones", "response": "json"}):
            answer = self.exchange("/client/api?" + urlencode(params))
            self.assertEqual((401, True), (answer.status, CREDENTIALS_TEXT in answer.body.decode()), params)

    @each("expires, status, strict_status",
          ("2026-09-01T08:00:01+0000", 200, 200), ("2026-09-01T10:15:00+02:00", 200, 200),
          ("2026-09-01T08:15:01Z", 200, 401), ("2026-09-01T08:00:00Z", 401, 401), ("2026-09-01T08:00:01", 401, 401),
          ("", 401, 401))
    def test_expiry(self, expires, status, strict_status):
        for self.simulator.enforce_post, expected in (False, status), (True, strict_status):
            self.assertEqual(expected, self.call("listZones", signatureVersion="3", expires=expires)[0])

    # parameters, errors

    def test_parameters(self):
        record = Record("POST", "/client/api?a=1&a=2&b=3", FORM, b"b=4&c=5&c=6", None)
        self.assertEqual({"a": "2", "b": "3", "c": "5"}, record.params)
        self.assertEqual(1, self.ok("listZones", {"ID": self.first("zone")["id"], "Nonsense": "x"})["count"])
        for params, count in (({"tags[0].key": "role", "tags[0].value": "db"}, 8), ({"listall": "1"}, 32),
                              ({"listall": "TRUE"}, 38), ({"projectid": "-1"}, 4), ({"account": "user"}, 6)):
            self.assertEqual(count, self.ok("listVirtualMachines", params)["count"], params)

    @each("code, name, params, options",
          (430, "listVirtualMachines", {"tags[0]": "x"}, {}), (431, "startVirtualMachine", {}, {}),
          (431, "listZones", {"id": "no-such-id"}, {}), (431, "listZones", {"name": "a\tb"}, {}),
          (431, "createSecurityGroup", {"name": "x" * 256}, {}), (401, "noSuchCommand", {}, {}),
          (431, "listVirtualMachines", {"page": "1"}, {}),
          (431, "listVirtualMachines", {"page": "1", "pagesize": "501"}, {}),
          (431, "listVirtualMachines", {"page": "x", "pagesize": "1"}, {}),
          (431, "queryAsyncJobResult", {"jobid": "x"}, {}), (432, "listHosts", {"user": "user"}, {}),
          (503, "listZones", {}, {"maintenance": True}), (429, "listZones", {}, {"rate_limit": -1}),
          (530, "listZones", {}, {"fails": ["listZones"]}), (401, "listZones", {}, {"enforce_post": True}),
          (400, "createSecurityGroup", {"name": "x"}, {"enforce_post": True}))
    def test_what_is_refused(self, code, name, params, options):
        vars(self.simulator).update(options)
        self.fails(code, name, **params)

    def test_what_is_answered_in_html(self):
        self.assertEqual(404, self.exchange("/client").status)
        self.simulator.html_error = 502
        self.assertIn(b"502 Bad Gateway", self.exchange("/client/api?command=listZones").body)

    # jobs

    def test_a_job_after_another(self):
        self.simulator.fails = ["rebootVirtualMachine"]
        machine = self.first("virtualmachine", state="Running")["id"]
        names = ["stopVirtualMachine", "startVirtualMachine", "rebootVirtualMachine"]
        jobs = [self.ok(name, id=machine)["jobid"] for name in names]
        for jobid, status, told in zip(jobs, (1, 1, 2), ("Stopped", "Running", "as the simulator was told")):
            self.assertIn(jobid, [row["jobid"] for row in self.ok("listAsyncJobs")["asyncjobs"]])
            self.now += self.simulator.job_seconds
            job = self.ok("queryAsyncJobResult", jobid=jobid)
            self.assertEqual((status, True), (job["jobstatus"], told in str(job["jobresult"])), job)
        again = self.ok("queryAsyncJobResult", jobid=self.ok("startVirtualMachine", id=machine)["jobid"])
        self.assertEqual((2, 431), (again["jobstatus"], again["jobresultcode"]))
        self.fails(531, "queryAsyncJobResult", user="user", jobid=jobs[0])
        self.fails(531, "stopVirtualMachine", user="user", id=machine)

    def test_a_job_under_the_caller_s_own_id_is_refused_twice_and_yet_leaves_a_machine(self):
        own, template = "4d6eea3d-729f-493b-894f-7048159c4bd9", self.first("template")
        order = {"zoneid": template["zoneid"], "templateid": template["id"], "customjobid": own,
                 "serviceofferingid": self.first("serviceoffering")["id"]}
        self.assertEqual(own, self.ok("deployVirtualMachine", order)["jobid"])
        self.fails(530, "deployVirtualMachine", order, name="second")
        self.assertEqual([own], list(self.simulator.cloud.jobs))
        self.assertEqual(1, self.ok("listVirtualMachines", name="second")["count"])

    def test_a_session(self):
        def login(**wrong):
            fields = {"command": "login", "response": "json", "username": "user", "password": "tilde~and+plus*",
                      "domain": "/research"}
            return self.exchange("/client/api", "POST", urlencode(dict(fields, **wrong)), **FORM)

        answer = login()
        target = "/client/api?command=listVirtualMachines&response=json&sessionkey=" + quote(
            json.loads(answer.body.decode())["loginresponse"]["sessionkey"])
        cookie = "; ".join(each.partition(";")[0] for each in answer.cookies)
        for pause, status in ((1800, 200), (1800, 200), (1801, 401)):
            self.now += pause
            self.assertEqual(status, self.exchange(target, Cookie=cookie).status)
        for wrong in ({"password": "wrong"}, {"domain": "/"}, {"domain": "ROOT"}):
            self.assertEqual(531, login(**wrong).status)

    def test_the_client_meets_what_a_strict_server_demands(self):
        self.simulator.enforce_post = True
        with self.simulator as cloud, cs.CloudStack(cloud.endpoint, cloud.key, cloud.secret) as client:
            with mock.patch("time.time", lambda: self.now):
                self.assertEqual("g", client.createSecurityGroup(name="g")["securitygroup"]["name"])
                self.assertEqual("POST", cloud.requests[-1].method)


class SandboxTest(Case):
    """`python3 test_cs.py sandbox`: the command line against the simulator, over real signed requests."""

    def start(self, *words, **env):
        # What is configured here must not lead the sandbox elsewhere.
        self.ini("no ini file at all")
        elsewhere = {"CLOUDSTACK_ENDPOINT": "http://cloud.invalid/", "CLOUDSTACK_REGION": "mars",
                     "CLOUDSTACK_TIMEOUT": "x", "http_proxy": "http://127.0.0.1:9/"}
        child = Child([sys.executable, TEST_PATH, "sandbox", *words], env=dict(os.environ, **dict(elsewhere, **env)))
        self.addCleanup(child.end)
        return child

    def run_sandbox(self, *words, **env):
        code, out, err = self.start(*words, **env).finish()
        return code, out.decode("utf-8"), err.decode("utf-8")

    @each("line, code, out, err",
          ("listZones -o text -c name", 0, "north\nsouth\n", ""),
          ("stopVirtualMachine id=name:web-01 -o text -c state --job-seconds 0", 0, "Stopped\n", ""),
          ("startVirtualMachine id=nonsense", 1, "", "CloudStack error: HTTP 431 response from CloudStack"),
          ("rebootVirtualMachine id=name:web-01 --fail=rebootVirtualMachine", 1, "", "as the simulator was told"),
          ("--fault=default_page_size=5 listVirtualMachines -o text -c name -q", 0, "web-01\n", ""))
    def test_a_command(self, line, code, out, err):
        ended, printed, said = self.run_sandbox(*line.split())
        self.assertEqual((code, True, True), (ended, out in printed, err in said if err else not said), printed + said)

    @each("words", ["--port"], ["--port", "x"], ["--port="], ["--job-seconds"], ["--latency", "soon"],
          ["--fail", "listNothing"], ["--fault", "bad_luck"], ["--fault", "html_error"])
    def test_what_is_refused(self, words):
        with self.assertRaises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()) as err:
            sandbox(words)
        self.assertEqual(2, ended.exception.code)
        self.assertIn("error: argument " + words[0].partition("=")[0], err.getvalue())

    def test_a_port_that_cannot_be_had(self):
        with Simulator() as other:
            for port in (other.port, 65536):
                code, out, err = self.run_sandbox("--port", str(port))
                self.assertEqual((2, "", True), (code, out, "error: --port: " in err), err)

    def test_help_fits_a_screen_and_names_every_switch(self):
        code, out, err = self.run_sandbox("--help")
        self.assertEqual((0, "", True), (code, err, out.count("\n") <= 24), out)
        self.assertHolds(out, "--port", "--job-seconds", "--latency", "--fail", "--fault", *FAULTS)
        self.assertNotIn("--port", self.run_sandbox("listZones", "--help")[2])

    def test_a_command_that_it_does_not_have(self):
        with Sandbox() as cloud, contextlib.redirect_stderr(io.StringIO()) as err:
            with cs.CloudStack(cloud.endpoint, cloud.key, cloud.secret) as client:
                self.assertRaises(cs.CloudStackException, client.listOsTypes)
        self.assertIn("sandbox: there is no command 'listOsTypes' here", err.getvalue())

    def test_nothing_of_the_users_is_written(self):
        cache = os.path.join(self.home, "cache")
        self.assertEqual(0, self.run_sandbox("--sync", XDG_CACHE_HOME=cache, TMPDIR=self.cwd)[0])
        self.assertEqual([[".cloudstack.ini", "work"], []], [sorted(os.listdir(self.home)), os.listdir(self.cwd)])

    @unittest.skipUnless(os.name == "posix", "signals are for POSIX")
    @each("number, code", (signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM))
    def test_without_a_command_it_runs_until_interrupted(self, number, code):
        child = self.start()
        lines = [child.stdout.readline().decode("utf-8") for _ in range(4)]
        said = [child.stderr.readline().decode("utf-8") for _ in range(6)]
        self.assertIn("until Ctrl-C", said[0])
        settings, session = (dict(word.split("=", 1) for line in given for word in shlex.split(line)[1:])
                             for given in (lines, said[5:]))
        for given in (settings, dict(settings, **session)):
            with mock.patch.dict(os.environ, given):
                self.assertEqual("north\nsouth\n", self.good("listZones", "-o", "text", "-c", "name"))
        with mock.patch.dict(os.environ, settings):
            failing = shlex.split(said[3].partition("cs.py ")[2])
            self.assertIn("No destination found", self.says(1, *failing))
        child.send_signal(number)
        self.assertEqual((code, b"", b""), child.finish())
        self.assertFalse(os.path.exists(settings["XDG_CACHE_HOME"]))


# === [1] errors =======================================================================================================


class ErrorsTest(ProtocolCase):
    @each("kind, bases", (cs.CloudStackException, [Exception]), (cs.CloudStackApiException, [cs.CloudStackException]),
          (cs.CloudStackConnectionError, [cs.CloudStackException, ConnectionError]),
          (cs.CloudStackTimeoutError, [cs.CloudStackException, TimeoutError]),
          (cs.CloudStackJobTimeout, [cs.CloudStackTimeoutError]))
    def test_the_tree(self, kind, bases):
        self.assertEqual(bases, list(kind.__bases__))

    @each("error, text", (cs.CloudStackException(), ""), (cs.CloudStackException(1, None, "c"), "1: None: c"),
          (cs.CloudStackApiException("HTTP 431", error={"errorcode": 431}), "HTTP 431, error: {'errorcode': 431}"),
          (cs.CloudStackConnectionError("Cannot connect", "refused"), "Cannot connect: refused"),
          (cs.CloudStackTimeoutError("No answer", "10 s"), "No answer: 10 s"),
          (cs.CloudStackJobTimeout("Timeout", "job"), "Timeout: job"))
    def test_what_is_built_by_hand_knows_nothing_and_shows_its_arguments(self, error, text):
        self.assertEqual((text, None, None), (str(error), error.response, error.jobid))
        self.assertEqual([False] * 4, [error.outcome_unknown, error.unsent, error.stale, error.job_failed])
        self.assertEqual(5, type(error)("a", response=5).response)

    @each("error", cs.CloudStackException("a", "b", response=answer({"x": 1}, 504, "Gateway Time-out")),
          cs.CloudStackApiException("m", error={"errorcode": 1}, response=answer({"x": 1}, 431)),
          cs.CloudStackConnectionError("a", "b"), cs.CloudStackTimeoutError("a"),
          cs.CloudStackJobTimeout("a", "job", response=answer({"x": 1}, 408)), cs.CloudStackException())
    @each("copier", *COPIERS)
    def test_copies_and_pickles_know_all_that_the_error_knows(self, error, copier):
        def known(error):
            response = error.response
            answered = response and (response.status_code, response.reason, response.json(), dict(response.headers))
            return type(error), error.args, str(error), error.jobid, error.outcome_unknown, error.error, answered

        error.jobid, error.outcome_unknown = "j", True
        self.assertEqual(known(error), known(copier(error)))

    @each("status, ok", (299, True), (399, True), (400, False), (599, False))
    def test_the_response_has_what_requests_has(self, status, ok):
        script = [answer(refusal(431, "b\xe4d"), status, "Reason", {"x-server": "1", "Location": "/"})]
        response = self.play(script, asking("listZones", json=False)).error.response
        told = (response.status_code, response.reason, response.headers["X-SERVER"], response.ok)
        self.assertEqual((status, "Reason", "1", ok), told)
        self.assertEqual(refusal(431, "b\xe4d"), response.json())
        self.assertEqual(response.json(), json.loads(response.text))

    def test_the_server_s_words_are_shown_without_the_secrets_of_the_request(self):
        text = "the password c4nary-1 of c4nary-secret and c4nary-key is wrong"
        for script in ([api_error(431, text)], [SUBMITTED, looked(2, jobresult={"errortext": text})]):
            error = self.play(script, asking("createUser", password="c4nary-1", fetch_result=True), key="c4nary-key",
                              secret="c4nary-secret").error
            self.assertRegex(str(error), r"the password \S+ of \S+ and \S+ is wrong")
            self.assertNotIn("c4nary", str(error))
            self.assertEqual(text, error.error["errortext"])


# === [2] parameters and signature =====================================================================================


def lying(kind, value):
    """A value of a subclass (as Ansible tags its strings) whose own str() and repr() are not to be trusted."""
    return type("Lying", (kind,), {"__str__": lambda self: "lies!", "__repr__": lambda self: "lies!"})(value)


class FlattenTest(ProtocolCase):
    """What becomes of `p=value`. 5.2.0 sends Python's own True, None and [1, 2] within dicts."""

    @each("value, sent", ("text", "text"), ("", ""), (0, "0"), (-7, "-7"), (2**70, str(2**70)), (1.5, "1.5"),
          (b"bytes \xc3\xbc", "bytes \xfc"), (b"", ""), (True, "true"), (False, "false"), (lying(str, "v"), "v"),
          (lying(int, 5), "5"), (lying(float, 0.5), "0.5"), (lying(bytes, b"o"), "o"),
          (enum.Enum("State", {"ON": "Running"}, type=str).ON, "Running"), (enum.IntEnum("Size", "ONE TWO").TWO, "2"),
          (["b", "a", "b"], "b,a,b"), (("b", "a"), "b,a"), ([1, 2.5, b"x"], "1,2.5,x"),
          ([True, None, False], "true,false"), ([0], "0"), ([lying(str, "a"), lying(int, 2)], "a,2"),
          ({"b", "c", "a"}, "a,b,c"), (frozenset("cab"), "a,b,c"), ({10, 9}, "10,9"))
    def test_values_and_lists_and_sets(self, value, sent):
        self.assertEqual({"p": sent}, cs.flatten({"p": value}))

    @each("value, sent", ({"cpuNumber": 2, "memory": 1024}, {"p[0].cpuNumber": "2", "p[0].memory": "1024"}),
          ({"a.b": "dots", "e": ""}, {"p[0].a.b": "dots", "p[0].e": ""}),
          (collections.OrderedDict(k="v"), {"p[0].k": "v"}),
          ([{"key": "a", "no": "1"}, {"key": "b"}], {"p[0].key": "a", "p[0].no": "1", "p[1].key": "b"}),
          (({"k": 1}, {"k": 2}), {"p[0].k": "1", "p[1].k": "2"}), ([None, {"k": 1}], {"p[0].k": "1"}),
          ({"k": True, "l": False, "n": None, "m": []}, {"p[0].k": "true", "p[0].l": "false"}),
          ({"k": [1, True, None, "x"], "l": {"b", "a"}}, {"p[0].k": "1,true,x", "p[0].l": "a,b"}),
          ([{"k": (1, 2), "l": b"\xc3\xbc"}], {"p[0].k": "1,2", "p[0].l": "\xfc"}),
          ({"k": lying(str, "v")}, {"p[0].k": "v"}))
    def test_maps(self, value, sent):
        self.assertEqual(sent, cs.flatten({"p": value}))

    @each("value", None, [], (), set(), frozenset(), {}, [None], [{}], [None, {}], {"k": None})
    def test_nothing_is_left_out(self, value):
        self.assertEqual({}, cs.flatten({"p": value}))

    @each("value, kind", (object(), "object"), (decimal.Decimal("1.5"), "Decimal"), (datetime.date(2026, 1, 1), "date"),
          (1j, "complex"), (iter("ab"), "iterator"), (bytearray(b"s3cret"), "bytearray"), ([object()], "object"),
          ({"k": object()}, "object"), ({"k": {"s3cret": "s3cret"}}, "dict"), ([["s3cret"]], "list"),
          ({"k": [["s3cret"]]}, "list"), ({"k": [{"s3cret": 1}]}, "dict"), ([{"k": 1}, "s3cret"], "str"),
          (b"s3cret\xff", "bytes"), ([b"\xff"], "bytes"), ("s3cret\ud800", r"U\+D800"))
    def test_what_cannot_be_sent_is_refused_by_name_and_type_without_the_value(self, value, kind):
        played = self.play([AssertionError("sent")], asking("listZones", theparam=value))
        self.assertEqual((ValueError, []), (type(played.error), played.commands))
        self.assertRegex(str(played.error), f"'theparam.*{kind}")
        self.assertNotIn("s3cret", str(played.error))

    def test_control_characters_are_refused_but_for_tab_and_line_ends(self):
        for number in [*range(32), 127]:
            for params in ({"p": "a" + chr(number)}, {"p" + chr(number): "a"}):
                error = self.play(one(), asking("listZones", **params)).error
                expected = (type(None), "") if chr(number) in "\t\n\r" else (ValueError, f"U+00{number:02X}")
                self.assertEqual(expected, (type(error), str(error or "")[-6:]), params)


class HelpersTest(unittest.TestCase):
    @each("text, expected", ("ABCXYZabcxyz0189.-_*", "ABCXYZabcxyz0189.-_*"), ("~ +/%", "%7E%20%2B%2F%25"),
          ("", ""), ("&=[0]\n", "%26%3D%5B0%5D%0A"), ("\xfc\u20ac\U0001f600", "%C3%BC%E2%82%AC%F0%9F%98%80"),
          (b"a~\xff", "a%7E%FF"))
    def test_cs_encode_is_java_s_url_encoder_with_percent_twenty(self, text, expected):
        self.assertEqual(expected, cs.cs_encode(text))

    def test_strtobool(self):
        self.assertEqual([True] * 8, [cs.strtobool(word) for word in "y yes t true on 1 TRUE Yes".split()])
        self.assertEqual([False] * 8, [cs.strtobool(word) for word in "n no f false off 0 False OFF".split()])
        for word in ("", "2", "nope", "False ; comment", " true"):
            self.assertRaises(ValueError, cs.strtobool, word)
        self.assertFalse(cs.CloudStack(ENDPOINT, trace=enum.Enum("Word", {"OFF": "off"}, type=str).OFF).trace)

    def test_an_exception_of_a_program_s_own_may_do_without_the_constructor(self):
        own = type("Own", (cs.CloudStackApiException,), {"__init__": lambda self, text: None})("x")
        self.assertEqual(("x, error: None", None), (str(own), own.response))

    def test_all_is_what_programs_use(self):
        needed = {"CloudStack", "AIOCloudStack", "CloudStackException", "CloudStackApiException", "read_config"}
        self.assertLessEqual(needed | {"read_config_from_ini", "main"}, set(cs.__all__))
        self.assertEqual([], [name for name in cs.__all__ if not hasattr(cs, name)])


LONG_KEY = "plgWJfZK4gyS3mOMTVmjUVg-X-jlWlnfaUJ9GAbBbf9EdM-kAYMmAkLqzzq1ElZLYq_u38zCm0bewzGUdP66mg"
LONG_SECRET = "VDaACYb0LV9eNjTetIOElcVQkvJck_J_QljX_FcHRj87ZKiy0z0ty0ZsYBkoXkY9b7eq1EhwJaw7FF3akA3KBQ"


class SignatureTest(ProtocolCase):
    """Vectors by `printf %s "$canonical" | openssl dgst -sha1 -hmac "$secret" -binary | base64`; a row begins with what
    its canonical text holds beside or instead of `apikey=key1&command=listzones&response=json`."""

    @each("canonical, signature, params, settings",
          ("apikey=plgwjfzk...", "r3txb5VGa1Edn8QdItS0vgBH8OI=", {"command": "listUsers"},
           dict(NEVER, key=LONG_KEY, secret=LONG_SECRET)),
          ("command=createuser&password=a%7eb", "EskxZ1w8fof0YcKXq8JpMvOhipE=",
           {"command": "createUser", "password": "a~b"}, NEVER),
          ("command=createtags&name=a%20b%2bc*d", "7Lb/E1sQjNKHC0lNgGmspKCkzPM=",
           {"command": "createTags", "name": "a b+c*d"}, NEVER),
          ("name=z%c3%bcrich%20%e2%82%ac%20%f0%9f%98%80", "XIX1UbGemO2A5fpk5VoLPlAszB8=",
           {"name": "Z\xfcrich \u20ac \U0001f600"}, NEVER),
          ("name=%21%22%23%24%25%26%27%28%29%2c%2f%3a%3b%3c%3d%3e%3f%40%5b%5c%5d%5e%60%7b%7c%7d.-_",
           "YNxWO/J+hcrnpdyzDwJHhn0lkgo=", {"name": "!\"#$%&'(),/:;<=>?@[\\]^`{|}.-_"}, NEVER),
          ("name=a%09b%0ac%0dd", "MTVy481NGOV8xRzWyK1yDM7o0gE=", {"name": "a\tb\nc\rd"}, NEVER),
          ("keyword=", "3PSH4qbfMHPLwTYdBKGqwTni4Nk=", {"keyword": ""}, NEVER),
          # Names are not encoded, sorted raw (upper case first), and beyond ASCII by UTF-16 units, as Java compares.
          ("command=deployvirtualmachine&details[0].cpunumber=2&details[0].memory=1024", "5bDEtblUTqK9tcGtsV8q7ShQxZg=",
           {"command": "deployVirtualMachine", "details": {"memory": 1024, "cpuNumber": 2}}, NEVER),
          ("zone=1&apikey=key1&apiallowed=x", "15B73S1VI7q6xrKyawQm1JkmZbc=", {"apiallowed": "x", "Zone": "1"}, NEVER),
          ("z=1&(u umlaut)=2&(astral)=3&(U+FF5E)=4", "gaQx7Boq+QnVxwEBX4GqQx7E8iA=",
           {"\uff5e": "4", "\U0001f600": "3", "\xfc": "2", "z": "1"}, NEVER),
          ("expires=2026-01-01t00%3a10%3a00%2b0000&signatureversion=3", "LoMpzTNToMAHd6Q9OF6HMYD2Th4=", {}, {}),
          ("a secret beyond ASCII", "ZTqgpgRGb4ffnoGQ0voWE98aItc=", {}, dict(NEVER, secret="geh\xebim~ \u20ac")))
    def test_vectors(self, canonical, signature, params, settings):
        params = dict(params)
        played = self.play(one(), asking(params.pop("command", "listZones"), **params), **settings)
        self.assertEqual((None, signature), (played.error, played.params()["signature"]), played.requests[0].url)

    def test_names_values_and_the_signature_are_encoded_on_the_wire(self):
        url = self.play(one(), asking("listZones", tags={"key": "~ +"}), **NEVER).requests[0].url
        self.assertIn("&tags%5B0%5D.key=%7E%20%2B", url)
        self.assertRegex(url, r"&signature=[A-Za-z0-9%]+%3D&")


# === [3] clients ======================================================================================================


class Auditing(cs.CloudStack):
    """As programs override it; on module level, so that it can be pickled."""

    def _request(self, command, **params):
        self.__dict__.setdefault("seen", []).append(command)
        return super()._request(command, **dict(params, tenant="7"))


class AuditingAsync(cs.AIOCloudStack):
    async def _request(self, command, **params):
        self.__dict__.setdefault("seen", []).append(command)
        return await super()._request(command, **dict(params, tenant="7"))


def list_server(total, count="total", limit=500, ignores=False, key="thing", rows=None):
    """A script, or what answers a request's parameters: a list of `total` rows, with the habits that servers have.

    count: "total", "page" (the length of this page), a number, or None (missing); limit: default.page.size;
    ignores: pages and sizes are ignored."""
    everything = rows if rows is not None else rows_of(0, total)

    def serve(played, request):
        given = request if isinstance(request, dict) else wire(request)
        params = {name.lower(): text for name, text in given.items()}
        if ("page" in params) != ("pagesize" in params):
            return api_error(431, "page and pagesize go together")
        size, page = int(params.get("pagesize", limit)), int(params.get("page", 1))
        if size > limit:
            return api_error(431, f"Page size can't exceed max allowed page size value: {limit}")
        found = everything if ignores else everything[(page - 1) * size : page * size]
        document = {"count": {"total": len(everything), "page": len(found)}.get(count, count), key: found}
        given = {name: value for name, value in document.items() if everything and value not in (None, [])}
        return answer({"listthingsresponse": given})

    return serve


SUBMITTED = answer({"startvirtualmachineresponse": {"jobid": "job-1"}})
PENDING = answer({"queryasyncjobresultresponse": {"jobid": "job-1", "jobstatus": 0}})


def looked(status=1, **more):
    return answer({"queryasyncjobresultresponse": dict({"jobid": "job-1", "jobstatus": status}, **more)})


MACHINE = {"virtualmachine": {"id": "vm"}}
DONE = looked(jobresult=MACHINE)


def settings_of(client):
    return {setting.name: client.get_setting(setting.name) for setting in cs.SETTINGS if setting.given_in != "tool"}


class SeamTest(ProtocolCase):
    """What programs, and the command line, do beyond calling methods: call, pages, prepare, on_event."""

    @each("command, options, settings, script, found, expected",
          ("listThings", {}, {}, one({"a": 1}), lambda p: (p.value, p.params()["name"]), ({"a": 1}, "x")),
          ("listThings", {"pages": True}, {}, list_server(3), lambda p: p.value, rows_of(0, 3)),
          ("listThings", {"timeout": "0.5"}, {}, one(), lambda p: p.requests[0].timeout, 0.5),
          ("listThings", {"retry": 1}, {}, [silent(), *one()], lambda p: p.commands, ["listThings"] * 2),
          ("listThings", {"retry": None}, {"retry": 2}, [silent()], lambda p: p.commands, ["listThings"] * 3),
          ("listThings", {"retry": 1, "pages": True}, {}, [lost(), list_server(700), lost(), list_server(700)],
           lambda p: p.column("page"), ["1", "1", "2", "2"]),
          ("listThings", {"post": True}, {}, one(), lambda p: p.methods, ["POST"]),
          ("listThings", {"post": False}, {"method": "post"}, one(), lambda p: p.methods, ["GET"]),
          ("listThings", {"json": False}, {}, [answer("<r/>")], lambda p: p.value, "<r/>"),
          ("listThings", {"opcode_name": "action"}, {}, one(), lambda p: p.params()["action"], "listThings"),
          ("listThings", {"headers": {"X-A": "1"}}, {}, one(), lambda p: p.requests[0].headers["X-A"], "1"),
          ("startThing", {"recover": True}, {}, one(), lambda p: "customjobid" in p.params(), True),
          ("startThing", {"recover": False}, {"recover": True}, one(), lambda p: "customjobid" in p.params(), False),
          ("startThing", {"wait": False}, {"fetch_result": True}, [SUBMITTED], lambda p: p.value, {"jobid": "job-1"}),
          ("startThing", {"wait": True, "timeout": 3, "poll_interval": 0.05}, {}, [SUBMITTED, PENDING, PENDING, DONE],
           lambda p: (p.value, p.pauses, {request.timeout for request in p.requests}), (MACHINE, [0.05] * 2, {3})),
          ("startThing", {"wait": True, "job_timeout": 5}, {}, [SUBMITTED, PENDING],
           lambda p: (type(p.error), p.slept), (cs.CloudStackJobTimeout, 5)))
    def test_call_takes_options_of_its_own(self, command, options, settings, script, found, expected):
        clients = []

        played = self.play(script, lambda client: clients.append((client, settings_of(client))) or client.call(
            command, {"name": "x"}, **options), **settings)
        self.assertEqual(expected, found(played), (played.error, played.commands))
        for client, before in clients:
            self.assertEqual(before, settings_of(client), "the client's own settings were changed")

    @each("options, kind, says", ({"timeout": "x"}, ValueError, r"\Atimeout: "),
          ({"headers": 5}, ValueError, r"\Aheaders: "), ({"name": "x"}, TypeError, "'name'"),
          ({"verify": "/ca"}, TypeError, "'verify'"))
    @each("method", "call", "pages", "prepare", "wait_job")
    def test_options_that_are_refused(self, method, options, kind, says):
        played = self.play([AssertionError("sent")], lambda client: getattr(client, method)("listThings", **options))
        self.assertEqual((kind, []), (type(played.error), played.commands))
        self.assertRegex(str(played.error), says)

    @each("method", "call", "pages")
    def test_parameters_in_a_dict_may_have_the_names_of_arguments(self, method):
        given = dict.fromkeys("json opcode_name headers fetch_list fetch_result self _options timeout".split(), "1")
        played = self.play(one(), lambda client: getattr(client, method)("listThings", given))
        self.assertEqual(given, {name: played.params().get(name) for name in given}, played.error)

    @each("script, expected", (list_server(1148), [500, 500, 148]), (list_server(0), []), (one({"a": {"b": 1}}), [1]))
    def test_pages_gives_lists_of_rows_as_they_come(self, script, expected):
        played = self.play(script, lambda client: client.pages("listThings", {"keyword": "k"}, headers={"X-A": "1"}))
        self.assertEqual((None, expected), (played.error, [len(rows) for rows in played.value]))
        self.assertEqual({"k"}, set(played.column("keyword")))
        self.assertEqual("1", played.requests[-1].headers["X-A"])
        self.assertEqual(expected == [1], {"a": {"b": 1}} in [rows[0] for rows in played.value])

    @each("command, params, options, settings, expected", ("listThings", {"name": "a b"}, {}, {},
           ("GET", ENDPOINT + "?apiKey=***&command=listThings&name=a%20b&response=json&signature=***")),
          ("listThings", {"page": 2}, {}, {},
           ("GET", ENDPOINT + "?apiKey=***&command=listThings&page=2&pagesize=500&response=json&signature=***")),
          ("listThings", {}, {"json": False, "opcode_name": "action"}, {"key": None, "secret": None},
           ("GET", ENDPOINT + "?action=listThings")),
          ("listThings", {}, {"post": True}, {"endpoint": "http://h?x=c4nary"}, ("POST", "http://h/")),
          ("createUser", {"password": "c4nary"}, {}, {}, ("POST", ENDPOINT)),
          ("listThings", {}, {}, USER, ("GET", ENDPOINT + "?command=listThings&response=json")))
    def test_prepare_says_what_would_be_sent_and_sends_nothing(self, command, params, options, settings, expected):
        def call(client):
            request = client.prepare(command, params, **options)
            wired = {name: text for name, text in wire(request).items() if name not in ("x", "signature")}
            self.assertEqual(wired, {name: text for name, text in request.params.items() if name != "signature"})
            self.assertNotIn("c4nary", str(request.masked_params()) + request.masked_url())
            return request.method, request.masked_url().replace(cs.cs_encode(cs.MASK), "***")

        played = self.play([AssertionError("sent")], call, **dict(NEVER, **settings))
        self.assertEqual((None, expected, []), (played.error, played.value, played.commands))

    def watched(self, script, call):
        """What on_event is called with while a call is played: names, and what stands beside requests and answers."""
        seen = {}

        def watch(client):
            transport_of(client).send = client.__dict__.pop("_exchange")
            events = seen.setdefault(type(client), [])
            client.on_event = lambda event: events.append((type(event).__name__, *[
                value.status_code if hasattr(value, "status_code") else type(value).__name__
                if isinstance(value, cs.CloudStackException) else value for value in event
                if not isinstance(value, cs.Request)]))
            return call(client)

        self.play(script, watch)
        self.assertEqual(seen[cs.CloudStack], seen[cs.AIOCloudStack])
        return seen[cs.CloudStack]

    @each("script, call, expected",
          ([a_while_later(2, one()[0])], asking("listZones"), [("Sent",), ("Answered", 200, 2)]),
          ([a_while_later(3, silent())], asking("listZones"), [("Sent",), ("Failed", "CloudStackTimeoutError", 3)]),
          (list_server(700), lambda client: client.pages("listThings"),
           [("Sent",), ("Answered", 200, 0), ("Rows", "listThings", 500, 700),
            ("Sent",), ("Answered", 200, 0), ("Rows", "listThings", 700, 700)]),
          (list_server(700, count=None), lambda client: client.pages("listThings", {"page": 2}),
           [("Sent",), ("Answered", 200, 0), ("Rows", "listThings", 700, None)]),
          (list_server(700, limit=300), lambda client: client.pages("listThings", {"page": 2, "pagesize": 500}),
           [("Sent",), ("Answered", 431, 0), ("Sent",), ("Answered", 200, 0), ("Rows", "listThings", 600, 700),
            ("Sent",), ("Answered", 200, 0), ("Rows", "listThings", 700, 700)]),
          ([SUBMITTED, PENDING, a_while_later(0.25, api_error(503)), DONE], asking("startThing", fetch_result=True),
           [("Sent",), ("Answered", 200, 0), ("Waiting", "startThing", "job-1", 0),
            ("Sent",), ("Answered", 200, 0), ("Waiting", "startThing", "job-1", 0),
            ("Sent",), ("Answered", 503, 0.25), ("Waiting", "startThing", "job-1", 0.35),
            ("Sent",), ("Answered", 200, 0)]))
    def test_events_come_in_their_order(self, script, call, expected):
        events = [tuple(round(value, 3) if isinstance(value, float) else value for value in event)
                  for event in self.watched(script, call)]
        repeated = [("Waiting",) == event[:1] == before[:1] for before, event in zip([()] + events, events)]
        self.assertEqual(expected, [event for event, again in zip(events, repeated) if not again])

    @each("event, commands, jobid", (cs.Sent, [], None), (cs.Answered, ["startThing"], None),
          (cs.Waiting, ["startThing"], "job-1"))
    def test_what_on_event_raises_ends_the_call(self, event, commands, jobid):
        def call(client):
            def observe(seen):
                if isinstance(seen, event):
                    raise RuntimeError("enough")

            transport_of(client).send = client.__dict__.pop("_exchange")
            client.on_event = observe
            return client.startThing(fetch_result=True)

        played = self.play([SUBMITTED, DONE], call)
        self.assertEqual(("enough", commands), (str(played.error), played.commands))
        self.assertEqual(jobid, getattr(played.error, "jobid", None))


class ClientObjectTest(ProtocolCase):
    @each("kind", *KINDS, Auditing)
    @each("copier", *COPIERS)
    def test_copies_are_clients_of_their_own(self, kind, copier):
        original = kind(ENDPOINT, "k", "s", timeout=3, verify="/ca.pem", cert="/c.pem", cert_key="/k.pem", retry=2,
                        expiration=60, headers={"X-A": "1"}, name="n", dangerous_no_tls_verify=True, domain="/sub")
        original.own, kept = [1], original._kept
        twin = copier(original)
        self.assertEqual((kind, settings_of(original), [1]), (type(twin), settings_of(twin), twin.own))
        self.assertIsNot(kept, twin._kept)
        twin.timeout = 4
        self.assertEqual(3, original.timeout)

    @both
    def test_names_with_an_underscore_are_no_commands_and_commands_take_no_positional_arguments(self, kind):
        for name in ("_private", "__len__", "__wrapped__", "_repr_html_", "_ipython_display_"):
            self.assertRaises(AttributeError, getattr, kind(ENDPOINT), name)
        self.assertRaises(TypeError, kind(ENDPOINT).listZones, "name")

    def test_the_async_client_s_commands_are_coroutines_up_to_request(self):
        """So that tests of programs may replace _request, and a bad parameter is raised where it is awaited."""
        self.assertTrue(inspect.iscoroutinefunction(cs.AIOCloudStack._request))
        client = cs.AIOCloudStack(ENDPOINT, "k", "s")

        async def use():
            calls = [client.deployX(bad=object()), client.call("x", {"bad": object()}), client.wait_job("\x00")]
            return await asyncio.gather(*calls, return_exceptions=True)

        self.assertEqual([ValueError] * 3, [type(error) for error in run(use())])

    @both
    def test_subclasses_may_use_the_names_of_settings_that_the_package_has_not(self, kind):
        class Program(kind):
            def __init__(self, *args, **settings):
                self.domain = {"id": 1}
                super().__init__(*args, **settings)
                self.username, self.password, self.recover = "root", b"\xff", object()
                self.concurrency = self.max_response_size = None

        client = Program(ENDPOINT, "k", "s")
        played = self._play_one(client, one({"a": 1}), asking("listZones"))
        self.assertEqual((None, {"a": 1}), (played.error, played.value))
        self.assertEqual(({"id": 1}, "root"), (client.domain, client.username))
        self.assertEqual((None, 128), (client.get_setting("domain"), client.get_setting("concurrency")))

    def test_a_signature_is_made_when_the_request_is_sent(self):
        """A call that waits for a thread longer than `expiration` would be refused."""
        now, sent = [float(REQUESTS_MOMENT)], []

        def send(request):
            sent.append(wire(request)["expires"])
            now[0] += 100
            return one()[0]

        client = cs.AIOCloudStack(ENDPOINT, "k", "s", concurrency=1, expiration=60)
        transport_of(client).send = send

        async def use():
            await asyncio.gather(client.listZones(), client.listZones())
            await client.aclose()

        with mock.patch("time.time", lambda: now[0]):
            run(use())
        self.assertEqual(["2026-01-01T00:01:00+0000", "2026-01-01T00:02:40+0000"], sent)

    @each("kind", Auditing, AuditingAsync)
    def test_a_subclass_sees_and_may_change_every_command_but_no_page_poll_or_login(self, kind):
        def serve(played, request):
            answers = {"login": login_answer(), "startThing": SUBMITTED, "queryAsyncJobResult": DONE}
            command = wire(request)["command"]
            return answers[command] if command in answers else list_server(3)(played, request)

        calls = [asking("listThings"), asking("listThings", fetch_list=True, pagesize=2),
                 lambda client: client.call("listThings", {"pagesize": 2}, pages=True),
                 asking("startThing", fetch_result=True)]
        whole = list if kind is Auditing else lambda rows: rows
        calls += [lambda client: whole(client.iter_list("listThings", pagesize=2)),
                  lambda client: whole(client.pages("listThings", {"pagesize": 2}))]
        client = kind(ENDPOINT, **LOGIN)
        played = self._play_one(client, serve, one_after_another(*calls))
        rows = rows_of(0, 3)
        self.assertEqual([{"count": 3, "thing": rows}, rows, rows, MACHINE, rows, [rows[:2], rows[2:]]], played.value)
        self.assertEqual(["listThings"] * 3 + ["startThing"] + ["listThings"] * 2, client.seen)
        own = [tenant for command, tenant in zip(played.commands, played.column("tenant")) if command in client.seen]
        self.assertEqual(["7"] * 10, own, played.commands)

    def test_closing(self):
        with mock.patch.object(cs.CloudStack, "close") as close:
            with cs.CloudStack(ENDPOINT) as client:
                self.assertEqual((cs.CloudStack, 0), (type(client), close.call_count))
            self.assertEqual(1, close.call_count)

        client = answered_by(lambda request: one({"a": 1})[0], cs.AIOCloudStack)
        for _ in range(3):  # each time with another event loop, after the client was closed
            self.assertEqual({"a": 1}, run(client.listZones()))
            run(client.aclose())
        client.close()


# === [4.1] protocol: call and request =================================================================================

GIVEN = "2030-01-01T00:00:00+0000"
AS_SETTINGS = dict.fromkeys((
    "timeout mode port path interval method retry key name endpoint params call client value verify page_size url"
    " domain username session trace data options pages wait").split(), "1")
UNSIGNED = {"key": None, "secret": None}
WANTS_POST = api_error(400, "State changing command createTags needs to be sent using POST request")


class RequestTest(ProtocolCase):
    """What a call puts on the wire."""

    def sent(self, params, settings, expected):
        """A call of listZones sends these beside what every signed call sends; None: does not send it."""
        with mock.patch.object(Played, "moment", REQUESTS_MOMENT + 0.9):
            played = self.play(one(), asking("listZones", **params), **settings)
        self.assertIsNone(played.error)
        found = dict(played.params(), signature=played.params().get("signature") not in (None, "forged"))
        whole = dict({"command": "listZones", "response": "json", "apiKey": "key1", "signature": True}, **expected)
        self.assertEqual({name: text for name, text in whole.items() if text is not None}, found)

    @each("expiration, expires", (600, "2026-01-01T00:10:00+0000"), ("60", "2026-01-01T00:01:00+0000"),
          (0, "2026-01-01T00:00:00+0000"), (datetime.timedelta(days=1), "2026-01-02T00:00:00+0000"),
          (86400 * 365 * 8500, "9999-12-31T23:59:59+0000"), (-1, None), ("-1", None),
          (datetime.timedelta(seconds=-1), None))
    def test_the_expiry_of_a_request(self, expiration, expires):
        self.sent({"name": "x"}, {"expiration": expiration},
                  {"name": "x", "expires": expires, "signatureVersion": expires and "3"})

    @each("settings, expected", ({}, {"signatureVersion": "3"}), (NEVER, {"signatureVersion": "3"}),
          (UNSIGNED, {"apiKey": None, "signature": False}))
    @each("name", "expires", "Expires", "EXPIRES")
    def test_a_given_expires_is_kept(self, name, settings, expected):
        self.sent({name: GIVEN}, settings, dict(expected, expires=GIVEN))

    @each("params, expected", ({"signature": "forged", "signatureVersion": "9"}, {}), ({"Signature": "forged"}, {}),
          ({"apikey": "other"}, {}), (AS_SETTINGS, AS_SETTINGS),
          ({"json": True, "opcode_name": "command", "fetch_list": False, "headers": {"X-A": "1"}, "fetch_result": False,
            "id": 1}, {"id": "1"}),
          ({"opcode_name": "action"}, {"command": None, "action": "listZones"}), ({"json": False}, {"response": None}),
          ({"json": False, "response": "xml"}, {"response": "xml"}), ({"response": "xml"}, {}),
          ({"Response": "xml"}, {}),
          # The server wants page and pagesize together, in any case.
          ({"page": 2}, {"page": "2", "pagesize": "500"}), ({"PAGE": 2}, {"PAGE": "2", "pagesize": "500"}),
          ({"page": 1, "pageSize": 20}, {"page": "1", "pageSize": "20"}), ({"page": None}, {}))
    def test_names_that_mean_something(self, params, expected):
        self.sent(params, NEVER, expected)

    @each("endpoint, expected", (ENDPOINT, "gzip"), ("http://127.0.0.1:8080/client/api", "identity"),
          ("https://localhost/client/api", "identity"), ("http://[::1]:8080/client/api", "identity"))
    def test_gzip_is_asked_for_but_on_loopback(self, endpoint, expected):
        headers = self.play(one(), asking("listZones"), endpoint=endpoint).requests[0].headers
        self.assertEqual((expected, "cs/" + cs.__version__), (headers["Accept-Encoding"], headers["User-Agent"]))

    def test_an_endpoint_with_a_query_of_its_own(self):
        url = self.play(one(), asking("listZones"), endpoint="https://h/api?tenant=7#part").requests[0].url
        self.assertRegex(url, r"\Ahttps://h/api\?tenant=7&apiKey=")

    def test_the_same_call_gives_the_same_bytes_and_changes_nothing_it_was_given(self):
        given, headers = {"tags": [{"key": "a"}], "ids": [1, 2]}, {"X-A": "1"}
        first = self.play(one(), asking("listZones", headers=headers, **given), **NEVER).requests[0].url
        second = self.play(one(), asking("listZones", ids=[1, 2], tags={"key": "a"}), **NEVER).requests[0].url
        self.assertEqual((second, {"tags": [{"key": "a"}], "ids": [1, 2]}, {"X-A": "1"}), (first, given, headers))


class VerbTest(ProtocolCase):
    @each("method, command, params, settings", ("GET", "listZones", {}, {}), ("GET", "deployVirtualMachine", {}, {}),
          ("POST", "listZones", {}, {"method": "post"}), ("POST", "listZones", {}, {"method": "POST"}),
          ("POST", "createUser", {"details": {"password": "x"}}, {}),
          ("GET", "listUsers", {"username": "x", "passwordenabled": True}, {}),
          ("POST", "login", {"username": "u"}, {}), ("POST", "login", {"username": "u"}, UNSIGNED),
          *[("POST", "updateUser", {name: "x"}, {}) for name in ("Password", "userdata", "a[0].password")],
          ("GET", "listZones", {"name": "x" * 7000}, {}), ("POST", "listZones", {"name": "x" * 8200}, {}),
          ("GET", "listZones", {"name": "\U0001f600" * 500}, {}),
          ("POST", "listZones", {"name": "\U0001f600" * 700}, {}),
          # An unsigned call may go to the integration port, which reads the query string only.
          ("GET", "createUser", {"password": "x"}, UNSIGNED), ("GET", "listZones", {"name": "x" * 9000}, UNSIGNED),
          ("GET", "createTags", {}, dict(UNSIGNED, method="post")))
    def test_which_verb_is_used(self, method, command, params, settings):
        self.assertEqual([method], self.play(one(), asking(command, **params), **settings).methods)

    def test_a_post_carries_everything_in_its_body_and_a_get_nothing(self):
        call = asking("listZones", name="a b")
        post, get = [self.play(one(), call, method=method).requests[0] for method in ("post", "get")]
        self.assertEqual((ENDPOINT, "application/x-www-form-urlencoded"), (post.url, post.headers["Content-Type"]))
        self.assertRegex(post.body, rb"\AapiKey=key1&.*&name=a%20b&.*&signature=")
        self.assertEqual((None, None), (get.body, get.headers.get("Content-Type")))

    def test_no_get_is_longer_than_a_server_takes(self):
        """It refuses a request line and headers of more than 8192 bytes."""
        seen = set()
        for length in range(7300, 8300, 60):
            for headers in (None, {"X-Long": "h" * 500}):
                request = self.play(one(), asking("listZones", name="x" * length), headers=headers).requests[0]
                lines = [f"GET {request.url} HTTP/1.1", "Host: cloud.invalid", *map(": ".join, request.headers.items())]
                seen.add(request.method)
                self.assertTrue(request.method == "POST" or len("\r\n".join(lines) + "\r\n\r\n") <= 8192, length)
        self.assertEqual({"GET", "POST"}, seen)

    def test_enforced_post_is_learned_once_and_not_for_reading_commands(self):
        reading = (
            "listZones getVirtualMachineUserData queryAsyncJobResult findHostsForMigration quotaBalance quotaIsEnabled"
            " readyForShutdown verifyOAuthCodeAndGetUser isAccountAllowedToCreateOfferingsWithTags quotaStatement"
            " quotaSummary quotaTariffList cloudianIsEnabled").split()
        changing = "createTags quotaUpdate deployVirtualMachine list prepareForShutdown relistThings".split()

        def serve(played, request):
            refused = request.method == "GET" and wire(request)["command"] not in reading
            return WANTS_POST if refused else one({"ok": True})[0]

        played = self.play(serve, one_after_another(*map(asking, changing + reading)))
        self.assertEqual((None, []), (played.error, played.pauses))
        expected = [("GET", "createTags")] + [("POST", name) for name in changing] + [("GET", name) for name in reading]
        self.assertEqual(expected, list(zip(played.methods, played.commands)))

    @each("item, methods, params, settings", (WANTS_POST, ["GET", "POST"], {}, {}), (WANTS_POST, ["GET"], {}, UNSIGNED),
          (WANTS_POST, ["POST"], {"password": "x"}, {}), (WANTS_POST, ["POST"], {}, {"method": "post"}),
          *[(api_error(400, text), ["GET"], {}, {"retry": 3}) for text in ("bad", "", None)])
    def test_a_server_that_asks_for_post_twice_or_for_nothing_is_not_believed(self, item, methods, params, settings):
        played = self.play([item], asking("createTags", **params), **settings)
        self.assertEqual((methods, 400), (played.methods, played.error.response.status_code))
        self.assertIs(False, played.error.outcome_unknown)


# === [4.2] protocol: answer ===========================================================================================


def typed(kind, document=None):
    """An answer of this Content-Type; None: without any."""
    response = answer(document or {"r": {"a": 1}})
    del response.headers["Content-Type"]
    if kind:
        response.headers["Content-Type"] = kind
    return response


def raw(content, status=200):
    """An answer whose bytes are said to be JSON."""
    return answer(content, status, headers=AS_JSON)


class DecodingTest(ProtocolCase):
    URL = f"Make sure endpoint URL '{ENDPOINT}' is correct."
    MALFORMED = ("HTTP 200 OK", "Malformed JSON document. " + URL)
    EMPTY = ("HTTP 200 OK", "The answer is empty: an unexpected error inside the server.")
    UNEXPECTED = ("Unexpected response from CloudStack", "a single top-level key was expected")

    @each("response, value",
          # The value under the single key, whatever its name.
          (answer({"listzonesresponse": {"count": 1, "zone": [{"id": "1"}]}}), {"count": 1, "zone": [{"id": "1"}]}),
          (answer({"null": {"a": 1}}), {"a": 1}), (answer({"": {"a": 1}}), {"a": 1}), (answer({"r": {}}), {}),
          (answer({"r": []}), []), (answer({"r": "text"}), "text"), (answer({"r": None}), None), (answer({"r": 5}), 5),
          (answer({"r": {"success": False, "errortext": "x"}}), {"success": False, "errortext": "x"}),
          # Under any type that says JSON, or none.
          *[(typed(kind), {"a": 1}) for kind in (
              None, "text/javascript; charset=UTF-8", "application/JSON", "application/javascript")],
          # What JSON parsers trip over but servers send.
          (raw(b'{"r": {"t": "a\x01b\nc\x1bd"}}'), {"t": "a\x01b\nc\x1bd"}), (raw(b'\xef\xbb\xbf{"r": {}}'), {}),
          (raw(b'{"r": {"t": "\xff\xfe"}}'), {"t": "\ufffd\ufffd"}), (raw(b'{"r": {"t": "\\ud800"}}'), {"t": "\ud800"}),
          (answer({"r": {"t": "[" * 600 + '"]\\'}}), {"t": "[" * 600 + '"]\\'}),
          (raw(b'{"r": 1, "r": {"b": 2}}'), {"b": 2}), (raw(b' \n{"r": ' + b"9" * 4300 + b'}\n '), 10**4300 - 1))
    def test_answers_that_are_taken(self, response, value):
        played = self.play([response], asking("listZones"))
        self.assertEqual((None, value), (played.error, played.value))

    @each("response, args", (answer("<html>login</html>"), ("JSON (application/json) was expected, got 'text/html'",)),
          (typed("text/xml", "<r/>"), ("JSON (application/json) was expected, got 'text/xml'",)),
          (answer("<html>", 504, "Gateway Time-out"), ("HTTP 504 Gateway Time-out", URL)),
          (raw("<html>", 404), ("HTTP 404 OK", URL)), (answer("", 204, "No Content"), ("HTTP 204 No Content", URL)),
          (answer("", 500, "500"), ("HTTP 500 500", URL)),
          (answer(b""), EMPTY), (raw(b""), EMPTY), (raw("{"), MALFORMED), (raw("not json"), MALFORMED),
          (raw('{"r": NaN}'), MALFORMED), (raw('{"r": -Infinity}'), MALFORMED), (raw('{"r": 1e999}'), MALFORMED),
          (raw('{"r": ' + "[" * 10000), MALFORMED), (raw('{"a":' * 10000), MALFORMED), (raw('{"r": 1} x'), MALFORMED),
          (raw('{"r": ' + "[" * 600 + "]" * 600 + "}"), MALFORMED),
          (raw('{"r": ' + "[" * 600 + '"{"' + "]" * 600 + "}"), MALFORMED),
          (raw('{"r": ' + '["]",' * 600 + "1" + ',"["]' * 600 + "}"), MALFORMED),
          (raw('{"r": "\\\\",' + '"x": ' + '["\\"]",' * 600 + "1" + ',"\\"["]' * 600 + "}"), MALFORMED),
          (raw('{"r": ' + "9" * 5000 + "}"), MALFORMED), (answer({"r": {"count": 10**30, "x": [1]}}),
          (UNEXPECTED[0], "the count is out of range")), (answer({}), UNEXPECTED),
          (answer({"a": 1, "b": 2}), UNEXPECTED), (answer([1]), UNEXPECTED), (raw("5"), UNEXPECTED),
          (raw("null"), UNEXPECTED), (answer({"a": 1, "b": 2}, 500, "500"), UNEXPECTED))
    def test_answers_that_are_not_cloudstack_s(self, response, args):
        error = self.play([response], asking("listZones")).error
        self.assertEqual((cs.CloudStackException, args), (type(error), error.args))
        self.assertEqual((response.status_code, response.text), (error.response.status_code, error.response.text))

    @each("code, key", (401, "errorresponse"), (401, "null"), (530, "errorresponse"), (530, "null"),
          *[(code, "listzonesresponse") for code in (400, 405, 429, 430, 431, 432, 503, *range(531, 538))])
    def test_the_server_s_own_errors(self, code, key):
        error = self.play([api_error(code, "text", key=key)], asking("listZones")).error
        expected = {"uuidList": [], "errorcode": code, "cserrorcode": 9999, "errortext": "text"}
        message = f"HTTP {code} response from CloudStack"
        self.assertEqual((cs.CloudStackApiException, (message,), expected), (type(error), error.args, error.error))
        self.assertEqual((f"{message}, error: {expected}", {key: expected}), (str(error), error.response.json()))

    @each("value", "text", None, [1], 5, {"errortext": None}, {"errortext": ["x"]}, {"errortext": 5})
    @each("code", 400, 429, 431)
    def test_an_error_that_is_no_dict_is_what_stood_there(self, value, code):
        error = self.play([answer({"errorresponse": value}, code)], asking("listZones", fetch_list=True)).error
        self.assertEqual((cs.CloudStackApiException, value), (type(error), error.error))

    def test_a_type_of_html_does_not_hide_an_error_in_json(self):
        response = answer(json.dumps({"errorresponse": {"errorcode": 530}}), 530, "530")
        self.assertEqual({"errorcode": 530}, self.play([response], asking("listZones")).error.error)

    @each("status, place, says", (300, "http://h/", "http://h/"), (399, "http://h/", "http://h/"),
          (302, "https://other.example/login?apiKey=c4nary#c4nary", "https://other.example/login"),
          (307, "/client/?signature=c4nary", "/client/"), (308, "https://u:c4nary@h/x", "https://h/x"),
          (301, "http://[bad", ""), (303, "https://h/\x1b[2Jx", "h/"), (400, "http://h/", None),
          (299, "http://h/", None))
    @each("options", {}, {"json": False})
    def test_redirects_are_not_followed_and_named_without_their_query(self, options, status, place, says):
        """5.2.0 follows them with the signed URL, to other hosts too."""
        script = [answer({"r": {"passed": "for a result"}}, status, "Found", {"Location": place})]
        played = self.play(script, asking("listZones", **options), retry=2)
        self.assertEqual(["listZones"], played.commands)
        self.assertIs(says is not None, "Redirects are not followed; the new address is" in str(played.error))
        if says is not None:
            self.assertIs(cs.CloudStackException, type(played.error))
            self.assertRegex(str(played.error), rf"\AHTTP {status} Found: .*{says}")
        self.assertNotRegex(str(played.error), "c4nary|\x1b")

    @each("response, expected", (answer("<listzonesresponse/>"), "<listzonesresponse/>"), (answer(""), ""),
          (answer("<errorresponse/>", 431), (cs.CloudStackApiException, "<errorresponse/>")))
    def test_without_json_the_text_is_returned_or_raised_as_it_is(self, response, expected):
        played = self.play([response], asking("listZones", json=False))
        error = played.error
        self.assertEqual(expected, played.value if error is None else (type(error), error.error))


class CollectorTest(unittest.TestCase):
    """Python's cyclic garbage collector rests while a long answer is decoded."""

    def setUp(self):
        self.addCleanup(gc.enable if gc.isenabled() else gc.disable)
        gc.enable()
        self.seen, really = [], json.JSONDecoder.decode

        def decode(*args):
            self.seen.append(gc.isenabled())
            return really(*args)

        patched = mock.patch.object(json.JSONDecoder, "decode", decode)
        patched.start()
        self.addCleanup(patched.stop)

    @each("size, before, during", (10, True, True), (100000, True, False), (100000, False, False))
    def test_only_while_a_long_answer_is_decoded_and_where_it_was_on(self, size, before, during):
        if not before:
            gc.disable()
        self.assertEqual({"r": "x" * size}, answer({"r": "x" * size}).json())
        self.assertEqual(([during], before), (self.seen, gc.isenabled()))

    def test_an_interrupt_just_as_it_is_stopped_leaves_it_on(self):
        really = gc.disable

        def interrupted():
            really()
            raise KeyboardInterrupt

        with mock.patch.object(gc, "disable", interrupted):
            self.assertRaises(KeyboardInterrupt, answer({"x": "y" * 200000}).json)
        self.assertTrue(gc.isenabled())


# === [4.3] protocol: retry ============================================================================================

READS = ("listZones", "getVirtualMachineUserData", "queryAsyncJobResult", "findHostsForMigration", "ListZones")
CHANGES = ("deployVirtualMachine", "createTags", "getUploadParamsForVolume", "getUploadParamsForTemplate",
           "getDiagnosticsData", "listAndSwitchSamlAccount", "login", "prepareForShutdown", "assignListeners")


def told_to_wait(text, status=503):
    """An answer with this Retry-After."""
    return answer("<html>", status, headers={"Retry-After": text})


class RetryTest(ProtocolCase):
    # what happens; whether a reading command and whether a changing one is sent again; whether the latter may have run
    @each("item, reading, changing, unknown", (unsent(), True, True, False),
          (unsent(cs.CloudStackTimeoutError), True, True, False), (lost(), True, False, True),
          (silent(), True, False, True), (api_error(429, "please retry after [100] ms."), True, True, False),
          (answer("<html>", 429), True, True, False), (api_error(503, "maintenance"), True, True, False),
          (answer("<html>", 503), True, False, True), (answer({"error": "from a proxy"}, 503), True, False, True),
          (answer({"a": 1, "b": 2}, 503), True, False, True), (answer("<html>", 502), True, False, True),
          (answer("<html>", 504), True, False, True), (answer("<html>", 500), False, False, True),
          (answer("<html>", 200), False, False, True), (answer(b"", 200), False, False, True),
          (answer([1]), False, False, True), (raw("{"), False, False, True),
          (answer("<html>", 404), False, False, False), (answer("<html>", 414), False, False, False),
          (answer("", 302, headers={"Location": "/"}), False, False, False),
          *[(api_error(code), False, False, False) for code in (400, 401, 405, 430, 431, 432, 511, 530, 531, 533, 537)])
    def test_what_is_tried_again_and_what_may_have_run(self, item, reading, changing, unknown):
        for command, again, told in (("listZones", reading, False), ("deployVirtualMachine", changing, unknown)):
            for retry, attempts in ((0, 1), (1, 1 + again), ("3", 1 + 3 * again)):
                played = self.play([item], asking(command), retry=retry)
                self.assertEqual([command] * attempts, played.commands, (item, retry))
                self.assertEqual((told, attempts - 1), (played.error.outcome_unknown, len(played.pauses)), item)
            played = self.play([item, one({"a": 1})[0]], asking(command), retry=1)
            self.assertEqual({"a": 1} if again else None, played.value, played.commands)

    @each("code, unknown", (502, True), (500, True), (401, False), (431, False))
    def test_what_may_have_run_does_not_depend_on_asking_for_json(self, code, unknown):
        error = self.play([answer("<html>", code)], asking("deployVirtualMachine", json=False)).error
        self.assertIs(unknown, error.outcome_unknown)

    def test_what_was_once_unsent_and_then_lost_may_have_run(self):
        played = self.play([unsent(), lost()], asking("deployVirtualMachine"), retry=5)
        self.assertEqual((["deployVirtualMachine"] * 2, True), (played.commands, played.error.outcome_unknown))

    @each("command", *READS + CHANGES)
    @each("settings", {}, {"retry": 5}, {"method": "post"})
    def test_a_kept_connection_that_died_is_replayed_once_for_reading_commands_alone(self, command, settings):
        reads = command in READS
        played = self.play([lost(stale=True), one({"a": 1})[0]], asking(command), **settings)
        self.assertEqual([command] * (1 + reads), played.commands)
        self.assertEqual(({"a": 1} if reads else None, []), (played.value, played.pauses))
        if reads:
            played = self.play([lost(stale=True)], asking(command))
            self.assertEqual([command] * 2, played.commands)
        else:
            self.assertEqual((True, 2), (played.error.outcome_unknown, len(played.error.args)))
            self.assertRegex(str(played.error), command + " may have run, its outcome is unknown")

    @each("backoff, pauses", (0.5, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]), ("100", [30.0] * 8), (0, [0.0] * 8))
    def test_pauses_grow_exponentially_up_to_30_seconds(self, backoff, pauses):
        self.assertEqual(pauses, self.play([lost()], asking("listZones"), retry=8, retry_backoff=backoff).pauses)

    @each("attempt", 0, 1, 6, 32, 1100, 10**6)
    @each("first", 0.5, 40, 1e300)
    def test_half_of_a_pause_is_jitter(self, attempt, first):
        most = min(30.0, first * 2.0 ** min(attempt, 32))
        for drawn, expected in ((0.0, most / 2), (1.0, most)):
            with mock.patch.object(cs, "_random", mock.Mock(return_value=drawn)):
                self.assertEqual(expected, cs.backoff(attempt, first))
        self.assertGreater(len({cs.backoff(attempt, first) for _ in range(20)}), 1)

    @each("item, pause", (api_error(429, "limit; please retry after [7000] ms."), 7.0), (told_to_wait("30", 502), 30.0),
          (api_error(429, "please retry after 7500 ms"), 7.5), (api_error(429, headers={"retry-after": " 12 "}), 12.0),
          (api_error(429, "please retry after [8000] ms.", headers={"Retry-After": "3"}), 8.0),
          # What is shorter than the pause, or cannot be read, changes nothing.
          (api_error(429, "please retry after [1] ms."), 0.5), (answer({"r": None}, 429), 0.5),
          *[(told_to_wait(text), 0.5) for text in (
              "0", "soon", "", "\xb2", "-5", "1.5", "1e999", ",", "\xa0", "Thu, 01 Jan 2026 00:00:09 GMT",
              "Mon, 01 Jan 99999999 00:00:00 GMT", "Thu, 01 Jan 2026 00:00:00 +99999999999999999999")])
    def test_the_wait_a_server_asks_for(self, item, pause):
        played = self.play([item, one({"a": 1})[0]], asking("listZones"), retry=1)
        self.assertEqual(([pause], {"a": 1}), (played.pauses, played.value))

    @each("item", api_error(429, "please retry after [30001] ms."), api_error(503, headers={"Retry-After": "3600"}),
          *[api_error(429, f"please retry after [{'9' * digits}] ms.") for digits in (400, 5000)],
          *[told_to_wait(text) for text in ("31", "9" * 30, "9" * 400, "9" * 5000)])
    @each("command", "listZones", "deployVirtualMachine")
    def test_a_wait_of_more_than_30_seconds_is_an_error_not_a_sleep(self, item, command):
        played = self.play([item, one()[0]], asking(command), retry=3)
        self.assertEqual(([command], []), (played.commands, played.pauses))
        self.assertEqual(item.status_code, played.error.response.status_code)

    @each("head, part", ("retry after", " "), ("", "retry after ["), ("retry after 1", " "))
    def test_a_hostile_text_costs_no_time(self, head, part):
        begun = time.process_time()
        self.play([api_error(429, head + part * 20000), one()[0]], asking("listZones"), retry=1)
        self.assertLess(time.process_time() - begun, 1)

    @each("expires, expected", (None, [f"2026-01-01T00:{minute}:00+0000" for minute in (10, 11, 12)]),
          (GIVEN, [GIVEN] * 3))
    def test_every_attempt_has_a_fresh_expiry_unless_one_was_given(self, expires, expected):
        """5.2.0 computes it once for the whole series."""
        script = [a_while_later(60, answer("<html>", 502))] * 2 + one()
        played = self.play(script, asking("listZones", expires=expires), retry=2, retry_backoff=0)
        self.assertEqual(expected, played.column("expires"))
        self.assertEqual(len(set(expected)), len(set(played.column("signature"))))


# === [4.4] protocol: session ==========================================================================================


def end(client):
    return client.aclose() if isinstance(client, cs.AIOCloudStack) else client.close()


class LoginTest(ProtocolCase):
    def test_a_session_from_log_in_to_log_out(self):
        calls = [asking("listZones", name="x"), asking("deployThing", userdata="eA=="), end, end, asking("listZones")]
        played = self.play([login_answer(), one({"a": 1})[0], one()[0], one()[0], login_answer("SK2", "J2"), one()[0]],
                           one_after_another(*calls), **USER)
        self.assertEqual((None, {"a": 1}), (played.error, played.value[0]))
        self.assertEqual(["login", "listZones", "deployThing", "logout", "login", "listZones"], played.commands)
        self.assertEqual(["POST", "GET", "POST", "POST", "POST", "GET"], played.methods)
        expected = {"command": "login", "username": "admin", "password": "pa~ss", "domain": "/", "response": "json"}
        self.assertEqual(expected, played.params(0))
        expected = {"command": "listZones", "name": "x", "sessionkey": "SK/1+", "response": "json"}
        self.assertEqual(expected, played.params(1))
        self.assertEqual([None, "SK/1+", "SK/1+", "SK/1+", None, "SK2"], played.column("sessionkey"))
        cookies = [None] + ["JSESSIONID=J1; sessionkey=cookie-J1"] * 3 + [None, "JSESSIONID=J2; sessionkey=cookie-J2"]
        self.assertEqual(cookies, [request.headers.get("Cookie") for request in played.requests])
        for name in ("signature", "apiKey", "expires", "signatureVersion"):
            self.assertEqual([None] * 6, played.column(name))

    def test_without_cookies_no_cookie_header_hides_those_that_a_session_keeps(self):
        played = self.play([answer({"loginresponse": {"sessionkey": "SK"}}), one()[0]], asking("listZones"), **USER)
        self.assertEqual(("SK", False), (played.params()["sessionkey"], "Cookie" in played.requests[-1].headers))

    @each("cookie", "J1\r\n folded", "J1\r\nX-Evil: 1", "J\x00")
    def test_a_cookie_that_would_break_out_of_its_line_is_not_sent(self, cookie):
        played = self.play([login_answer(cookie=cookie), one()[0]], asking("listZones"), **USER)
        sent = [request.headers.get("Cookie", "") for request in played.requests]
        self.assertEqual([], [text for text in sent if set(text) & set("\r\n\0")])

    @each("domain, sent", ("/a/b", "/a/b"), ("ROOT", "/"), ("ROOT/sub", "/sub"), ("ROOTS", "ROOTS"), (None, "/"))
    def test_the_domain_may_be_spelled_as_the_server_spells_it(self, domain, sent):
        played = self.play([login_answer(), one()[0]], asking("listZones"), **dict(USER, domain=domain))
        self.assertEqual(sent, played.params(0)["domain"])

    @each("settings", USER, {})
    def test_close_without_a_session_sends_nothing(self, settings):
        played = self.play([AssertionError("sent")], end, **settings)
        self.assertEqual((None, []), (played.error, played.commands))

    @each("item", lost(), silent(), answer("<html>", 502), api_error(401))
    def test_a_logout_that_fails_is_no_error(self, item):
        call = one_after_another(asking("listZones"), end)
        played = self.play([login_answer(), one()[0], item], call, retry=3, **USER)
        self.assertEqual((None, ["login", "listZones", "logout"]), (played.error, played.commands))

    def test_connections_are_closed_although_nothing_can_be_sent(self):
        clients = []
        calls = one_after_another(asking("listZones"), end)
        played = self.play([login_answer(), one()[0], ValueError("x")],
                           lambda client: clients.append(client) or calls(client), **USER)
        self.assertEqual(("x", [{}, {}]), (str(played.error), [client._by_process for client in clients]))

    # what the call and log-in are answered; the commands sent; what the error is
    @each("script, commands, error",
          ([login_answer(), api_error(401), login_answer("SK2"), one({"a": 1})[0]], "login X login X", None),
          ([login_answer(), api_error(401), login_answer("SK2"), api_error(401, "still")], "login X login X", "still"),
          ([api_error(531, "wrong password")], "login", "wrong password"),
          ([login_answer(), api_error(511, "2FA")], "login X", "two-factor.*API key"),
          ([api_error(511, "2FA")], "login", "two-factor.*API key"))
    @each("command", "listZones", "deployVirtualMachine")
    def test_refusals_in_a_session(self, script, commands, error, command):
        played = self.play(script, asking(command), retry=5, **USER)
        self.assertEqual(commands.replace("X", command).split(), played.commands)
        if error is None:
            self.assertEqual((None, {"a": 1}, "SK2"), (played.error, played.value, played.params()["sessionkey"]))
        else:
            self.assertEqual((cs.CloudStackApiException, False), (type(played.error), played.error.outcome_unknown))
            self.assertRegex(str(played.error), error)

    @each("item, again", (unsent(), True), (api_error(429), True), (api_error(503), True), (lost(), False),
          (silent(), False), (lost(stale=True), False), (answer("<html>", 502), False))
    def test_login_is_sent_again_only_where_the_server_did_not_run_it(self, item, again):
        played = self.play([item, login_answer(), one({"a": 1})[0]], asking("listZones"), retry=1, **USER)
        self.assertEqual(["login", "login", "listZones"] if again else ["login"], played.commands)

    @each("value", {}, {"sessionkey": 5}, {"sessionkey": None}, [], "text", None, {"sessionkey": "\ud800"})
    def test_a_login_answer_without_a_key_is_an_error(self, value):
        played = self.play([answer({"loginresponse": value}), one()[0]], asking("listZones"), **USER)
        self.assertEqual((cs.CloudStackException, ["login"]), (type(played.error), played.commands))

    @each("name, value", ("username", "v"), ("password", "other"), ("domain", "/b"),
          ("endpoint", "http://other.invalid/"))
    def test_another_user_is_another_session(self, name, value):
        calls = [asking("listZones"), lambda client: client.set_setting(name, value) or client.listZones()]
        played = self.play([login_answer(), one()[0], login_answer("SK2"), one()[0]],
                           one_after_another(*calls), **USER)
        self.assertEqual(["login", "listZones"] * 2, played.commands)
        self.assertEqual([None, "SK/1+", None, "SK2"], played.column("sessionkey"))

    def test_a_login_by_hand_in_another_case_logs_in_once(self):
        played = self.play([login_answer()], asking("Login", username="u", password="p"), **USER)
        self.assertEqual(["Login"], played.commands)


class SessionsAtOnceTest(JumpingCase):
    takes = 0.3  # seconds, to log in
    refused = None  # or the answer to log-in

    def client(self):
        return super().client(key=None, secret=None, **LOGIN)

    def server(self, params):
        if params["command"] == "login":
            number = self.count("login")
            return self.takes, self.refused or login_answer(f"key{number}")
        return one({"as": params["sessionkey"]})[0]

    @each("takes", 0.3, 2.5, 4, 95)
    def test_many_calls_log_in_once_however_long_it_takes(self, takes):
        self.takes = takes
        with mock.patch.object(self.loop.clock, "select", wraps=self.loop.clock.select) as rounds:
            client = self.client()
            self.assertEqual([{"as": "key1"}] * 50, self.all_of(client.listZones() for _ in range(50)))
        self.assertEqual(["login"] + ["listZones"] * 50, [params["command"] for _, params, _ in self.requests])
        self.assertLess(rounds.call_count, takes * 20 + 40, "who waits for a log-in does not keep looking")

    def test_a_failed_login_is_shared_by_all_who_waited_for_it(self):
        """Wrong passwords in a row would lock the account."""
        self.refused = api_error(531, "wrong")
        client = self.client()
        errors = self.all_of(client.listZones() for _ in range(50))
        self.assertEqual((["wrong"] * 50, 1), ([error.error["errortext"] for error in errors], len(self.requests)))
        self.assertEqual(50, len(set(map(id, errors))), "each is to carry the id of its own caller's job")
        self.all_of([client.listZones()])
        self.assertEqual(2, self.count("login"), "a later call tries anew")

    @each("late", 0, 0.1, 3)
    def test_an_expired_session_is_renewed_once_for_all(self, late):
        """Also where a 401 comes when another call has renewed the session already."""
        login = self.server

        def server(params):
            if params["command"] == "login" or params["sessionkey"] != "key1":
                return login(params)
            return 2 + late * int(params["id"]), api_error(401)

        self.server = server
        client = self.client()
        self.assertEqual([{"as": "key2"}] * 10, self.all_of(client.listZones(id=number) for number in range(10)))
        self.assertEqual(2, self.count("login"), [params["command"] for _, params, _ in self.requests])

    def test_whoever_logs_in_may_be_cancelled_without_hurting_the_others(self):
        client = self.client()

        async def use():
            tasks = [asyncio.ensure_future(client.listZones()) for _ in range(5)]
            await asyncio.sleep(0.1)
            tasks[0].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        outcomes = self.loop.run_until_complete(use())
        self.assertIsInstance(outcomes[0], asyncio.CancelledError)
        self.assertEqual(([{"as": "key2"}] * 4, 2), (outcomes[1:], self.count("login")))

    def test_a_log_in_of_a_loop_that_was_stopped_holds_nobody_up_for_longer_than_ten_timeouts(self):
        self.takes, client, stopped = 95, self.client(), self.loop
        task = stopped.create_task(client.listZones())
        stopped.run_until_complete(asyncio.sleep(2))
        self.loop = JumpingLoop()
        self.loop.clock.now, self.takes = stopped.time(), 0.3
        self.assertEqual([{"as": "key2"}], self.all_of([client.listZones()]))
        self.assertLess(self.loop.time() - 1000, 10 * 10 + 5)
        task.cancel()
        stopped.run_until_complete(asyncio.gather(task, return_exceptions=True))
        stopped.close()


# === [4.5] protocol: pages ============================================================================================


def fetched(**params):
    return lambda client: client.listThings(fetch_list=True, **params)


def iterated(**params):
    return lambda client: client.iter_list("listThings", **params)


each_way = each("how", fetched, iterated)
THREE_ZONES = [{"id": f"t{number // 3}", "zone": number % 3} for number in range(1200)]  # as listTemplates has them
LIMIT = "Page size can't exceed max allowed page size value: "
TEN_IDS = [{"id": str(number % 10), "zonename": str(number // 10), "isready": True} for number in range(40)]


class PagesTest(ProtocolCase):
    def rows(self, script, call, expected, most, **settings):
        """A call gives these rows in so many requests at most; what became of it."""
        played = self.play(script, call, **settings)
        self.assertEqual((None, expected), (played.error, played.value))
        self.assertLessEqual(len(played.requests), most, played.column("page"))
        return played

    # how many rows the list has; what list_server does otherwise; parameters; the requests
    @each("total, habits, params, requests",
          *[(total, {}, {}, requests) for total, requests in ((0, 1), (1, 1), (499, 1), (501, 2), (1148, 3),
          (2600, 6))],
          # A count that is the length of the page (5.2.0 stops at 500 of 1148), or missing.
          *[(total, {"count": count}, {}, requests) for count in ("page", None)
            for total, requests in ((7, 1), (1148, 3), (1000, 3))],
          *[(3, {"key": key}, {}, 1) for key in ("asyncjobs", "api", "dataStoreProvider", "LdapConfiguration")],
          # Rows are never compared by their ids alone.
          (1200, {"rows": THREE_ZONES}, {}, 3), (3, {"rows": THREE_ZONES[:3]}, {"pagesize": 1}, 4),
          (40, {"rows": TEN_IDS, "count": None}, {"pagesize": 10}, 5),
          (12, {"rows": list("abcdefghijkl")}, {"pagesize": 5}, 3),
          (25, {}, {"pagesize": 10}, 3), (25, {}, {"pageSize": "10"}, 3),
          # A lower limit than was asked for: 5.2.0 fails with the 431.
          (450, {"limit": 200}, {}, 4), (450, {"limit": 100}, {"pagesize": 250}, 6),
          # Commands that ignore pages and sizes: 5.2.0 gathers duplicates.
          *[(total, {"ignores": True, "count": count}, {"pagesize": 10}, 1 + (total == 10))
            for total in (1, 9, 10, 11, 20, 23) for count in ("total", None)])
    @each_way
    def test_every_row_once_and_in_order(self, how, total, habits, params, requests):
        expected = habits.get("rows") or rows_of(0, total)
        played = self.rows(list_server(total, **habits), how(**params), expected, requests)
        self.assertEqual(requests, len(played.requests), played.column("page"))

    @each("params, limit, first, most", ({"page": 2, "pagesize": 100}, 500, 100, 9), ({"page": 2}, 500, 500, 1),
          ({"Page": "2", "pageSize": "400"}, 500, 400, 2), ({"page": 2, "pagesize": 200}, 100, 200, 9),
          ({"page": 2, "pagesize": 500}, 300, 500, 4))
    @each_way
    def test_a_given_page_is_where_the_rows_begin_under_a_lower_limit_too(self, how, params, limit, first, most):
        self.rows(list_server(930, limit=limit), how(**params), rows_of(first, 930), most)

    @each("total, habits, most", (500, {}, 2), (1000, {}, 3),
          *[(230, {"count": count}, 70) for count in (0, 1, 15, -5, 10**6, 10**18, "23", 23.0, True)],
          *[(total, {"count": 10**6, "ignores": True}, 7) for total in (1, 9, 10, 11, 20)])
    @each_way
    def test_counts_that_are_wrong_cost_neither_rows_nor_many_requests(self, how, total, habits, most):
        params = {"pagesize": 10} if habits else {}
        self.rows(list_server(total, **habits), how(**params), rows_of(0, total), most)

    def test_what_the_requests_of_a_list_say(self):
        call = iterated(keyword="a b", tags={"key": "x"}, pageSize=400)
        played = self.play(a_while_later(300, list_server(1148)), call)
        self.assertEqual((["1", "2", "3"], ["400"] * 3), (played.column("page"), played.column("pagesize")))
        self.assertEqual((["a b"] * 3, ["x"] * 3), (played.column("keyword"), played.column("tags[0].key")))
        self.assertEqual((3, [None] * 3), (len(set(played.column("expires"))), played.column("pageSize")))

    @each("fetch_list", False, "false", None)
    def test_without_fetch_list_there_is_one_request_without_pages(self, fetch_list):
        played = self.play(list_server(1148), asking("listThings", fetch_list=fetch_list))
        self.assertEqual(({"count": 1148, "thing": rows_of(0, 500)}, [None]), (played.value, played.column("page")))
        self.assertEqual(rows_of(0, 1148), self.play(list_server(1148), asking("listThings", fetch_list="true")).value)

    @each("page", [{"id": 1, "cpuused": 0}, {"id": 2, "name": "h"}], [{"id": 1}, {"id": 2}, {"id": 3}])
    @each("pages", 1, 3)
    @each_way
    def test_a_server_that_begins_anew_is_known_by_its_ids_although_figures_move(self, how, pages, page):
        """A command that ignores `page`, and fills its page exactly, would be read for ever."""
        def around(played, request):
            number = (int(wire(request)["page"]) - 1) % pages
            rows = [dict(row, id=row["id"] + 10 * number, cpuused=int(wire(request)["page"])) for row in page]
            return answer({"r": {"count": 100, "host": rows}})

        played = self.play(around, how(pagesize=len(page)))
        expected = [row["id"] + 10 * number for number in range(pages) for row in page]
        self.assertEqual(expected, [row["id"] for row in played.value])
        self.assertLessEqual(len(played.requests), pages + 4)

    # the ids of the pages of the first reading, the second, and so on; the ids that fetch_list gives; the requests
    @each("readings, expected, requests", (["ab bd e", "ab cd e"], "abdec", 6), (["ab bd e", "ac bd e"], "abdec", 6),
          (["ab bd e"], "abbde", 9), (["ab cd e"], "abcde", 3))
    def test_a_list_without_a_fixed_order_is_read_again(self, readings, expected, requests):
        """So is listVolumes of 4.19: a row comes twice, another is lost, and their number is that of `count`."""
        def serve(played, request):
            page = int(wire(request)["page"]) - 1
            reading = readings[min(played.column("page").count("1"), len(readings)) - 1].split()
            rows = [{"id": name} for name in (reading[page] if page < len(reading) else "")]
            return answer({"r": {"count": 5, "volume": rows} if rows else {"count": 5}})

        self.rows(serve, fetched(pagesize=2), [{"id": name} for name in expected], requests)

    @each_way
    def test_no_list_is_without_end(self, how):
        def endless(played, request):
            page = int(wire(request)["page"])
            return answer({"r": {"thing": rows_of(page * 2, page * 2 + 2)}})

        with mock.patch.object(cs, "MOST_PAGES", 50):
            error = self.play(endless, how(pagesize=2)).error
        self.assertRegex(repr(error), r"\ACloudStackException\(.*more than 50 pages")

    @each_way
    def test_a_short_page_ends_no_list_whose_count_promises_more(self, how):
        pages = [answer({"r": {"count": 5, "thing": rows}}) for rows in (rows_of(0, 2), rows_of(2, 5))]
        self.rows(pages, how(pagesize=4), rows_of(0, 5), 2)

    @each("script, expected", *[(one(document), []) for document in (
        {}, {"count": 0}, {"count": 5}, {"thing": []}, {"count": 0, "thing": []})],
          ([answer({"r": {"count": 500, "thing": rows_of(0, 500)}}), answer({"r": {"count": 500}})], rows_of(0, 500)))
    @each_way
    def test_a_count_without_a_list_is_an_empty_page(self, how, script, expected):
        self.rows(script, how(), expected, len(script))

    @each("document", {"capability": {"cloudstackversion": "4.23"}},
          {"templatepermission": {"id": "1", "account": ["a"]}}, {"success": True}, {"count": 1, "thing": {"id": "1"}},
          {"a": [1], "b": [2]}, "text", None, 5, [1, 2], [])
    def test_an_object_is_returned_as_it_is_after_one_request(self, document):
        """5.2.0 asks 250 pages of it."""
        self.rows([answer({"r": document})], fetched(), document, 1)
        self.rows([answer({"r": document})], iterated(), [document], 1)

    def test_a_lower_limit_is_remembered(self):
        calls = [fetched(), fetched(), asking("listThings", page=2)]
        played = self.play(list_server(450, limit=200), one_after_another(*calls))
        self.assertEqual([rows_of(0, 450)] * 2 + [{"count": 450, "thing": rows_of(200, 400)}], played.value)
        self.assertEqual(["500"] + ["200"] * 7, played.column("pagesize"))

    @each("text, more, requests", ("Unable to find zone 500", "", 1), ("", "pagesize", 1), (LIMIT + "3", "", 2),
          (LIMIT, "9", 1), *[(LIMIT + limit, "", 1) for limit in ("0", "500", "501", "")])
    def test_another_431_or_a_limit_that_makes_no_sense_is_an_error(self, text, more, requests):
        begun = time.process_time()
        played = self.play([api_error(431, text + more * 12000)], fetched())
        self.assertEqual((cs.CloudStackApiException, ["listThings"] * requests), (type(played.error), played.commands))
        self.assertLess(time.process_time() - begun, 1)

    @each("name", "page", "pagesize")
    @each("value", "x", 0, -1, "1.5")
    @each_way
    def test_a_page_that_is_no_number_is_refused_by_name(self, name, value, how):
        played = self.play([AssertionError("sent")], how(**{name: value}))
        self.assertEqual((ValueError, []), (type(played.error), played.commands))
        self.assertIn(repr(name), str(played.error))

    @each_way
    def test_an_error_in_the_middle_is_raised(self, how):
        def broken(played, request):
            page = wire(request)["page"]
            return api_error(530, "page " + page) if page in "34" else list_server(2600)(played, request)

        played = self.play(broken, how())
        self.assertEqual("page 3", played.error.error["errortext"])
        self.assertLessEqual(len(played.requests), 5)

    def test_iter_list_is_lazy(self):
        requests = []
        client = answered_by(lambda request: requests.append(request) or list_server(2600)(None, request))
        rows = client.iter_list("listThings")
        for number, sent in ((0, 0), (1, 1), (499, 1), (1, 2)):
            self.assertEqual(number, len(list(itertools.islice(rows, number))))
            self.assertEqual(sent, len(requests))

    @each("command", "deployVirtualMachine", "resetThings", "getUploadParamsForVolume")
    def test_a_changing_command_is_sent_once_whatever_its_answer_looks_like(self, command):
        played = self.play([answer({"r": {"count": 3, "thing": [{"id": 1}]}})], asking(command, fetch_list=True))
        self.assertEqual(([command], {"count": 3, "thing": [{"id": 1}]}), (played.commands, played.value))
        for call in (lambda client: client.iter_list(command), lambda client: client.pages(command)):
            played = self.play([AssertionError("sent")], call)
            self.assertEqual((ValueError, []), (type(played.error), played.commands))


class PagesAheadTest(JumpingCase):
    """Pages that are under way at once."""

    total, habits, seconds = 5000, {}, 1

    def server(self, params):
        seconds = self.seconds(int(params["page"])) if callable(self.seconds) else self.seconds
        return seconds, list_server(self.total, **self.habits)(None, params)

    def pages(self, call=None, **settings):
        """The pages that a list is asked for, each with the seconds since the first, after a look at its rows."""
        (outcome,) = self.all_of([(call or fetched())(self.client(**settings))])
        self.assertEqual(rows_of(0, self.total), outcome)
        begun = self.requests[0][0]
        return [(int(params["page"]), round(at - begun)) for at, params, _ in self.requests]

    def test_at_most_four_overlap_and_only_after_the_first(self):
        pages = self.pages()
        self.assertEqual([(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2)], pages[:6])
        self.assertEqual((4, list(range(1, 11))), (self.most_flying, [page for page, _ in pages][:10]))
        self.assertLessEqual(len(pages), 11)

    def test_answers_that_overtake_each_other_stay_in_order(self):
        self.seconds = lambda page: 5 - page % 4
        self.pages()

    @each("total, expected", (400, [(1, 0)]), (501, [(1, 0), (2, 1)]), (1148, [(1, 0), (2, 1), (3, 1)]))
    def test_no_page_is_asked_for_that_the_count_does_not_promise(self, total, expected):
        self.total = total
        self.assertEqual(expected, self.pages())

    async def collect(client):
        return [row async for row in client.iter_list("listThings")]

    @each("habits, settings, call", ({"count": "page"}, {}, None), ({"count": None}, {}, None), ({"count": "5000"},
          {}, None), ({}, {"session": mock.Mock()}, None), ({}, {}, collect))
    def test_nothing_overlaps_without_a_count_through_a_session_object_or_in_iter_list(self, habits, settings, call):
        self.total, self.habits = 2600, habits
        self.pages(call, **settings)
        self.assertEqual(1, self.most_flying)

    def test_cancelling_ends_all_pages_under_way(self):
        async def use():
            task = asyncio.ensure_future(self.client().listThings(fetch_list=True))
            await asyncio.sleep(1.5)
            self.assertEqual(4, self.flying)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            self.assertEqual(0, self.flying)
            await asyncio.sleep(30)

        self.loop.run_until_complete(use())
        self.assertEqual(5, len(self.requests))

    @each("rest", 0, 0.001)
    def test_threads_overlap_too_and_drop_no_page(self, rest):
        together = threading.Barrier(4)

        def exchange(request):
            page = int(wire(request)["page"])
            if 2 <= page <= 5:
                together.wait(5)
            time.sleep(rest * (page % 3))
            return list_server(50)(None, request)

        self.assertEqual(rows_of(0, 50), answered_by(exchange).listThings(fetch_list=True, pagesize=5))


# === [4.6] protocol: jobs =============================================================================================


def started(**params):
    return lambda client: client.startVirtualMachine(**dict({"fetch_result": True}, **params))


TROUBLE = [silent(), lost(), lost(stale=True), unsent(), answer("<html>", 502), answer("<html>", 503),
           answer("<html>", 504), answer("<html>"), answer("<html>", 404), answer("<html>", 401), answer(b""), raw("{"),
           raw("[" * 10000), answer([1]), api_error(429, "please retry after [10] ms."), api_error(503, "maintenance"),
           answer({"r": {}}), answer({"r": "text"}), answer({"r": {"jobstatus": "x"}}), answer({"r": None}),
           answer({"r": {"jobstatus": None}}), answer({"r": [0]}), raw('{"r": {"jobstatus": 1e999}}')]
GROWING = [0.1, 0.1, 0.1, 0.15, 0.225, 0.3375, 0.50625, 0.759375, 1.139063, 1.708594]  # pauses between polls


class JobsTest(ProtocolCase):
    @each("interval, pauses", (2, GROWING + [2, 2]), ("5", GROWING + [2.562891, 3.844336]),
          (0.2, GROWING[:4] + [0.2] * 8), (0.05, [0.05] * 12), (0, []))
    def test_the_first_poll_is_at_once_and_the_next_are_ever_farther_apart(self, interval, pauses):
        played = self.play([SUBMITTED] + [PENDING] * 12 + [DONE], started(), poll_interval=interval)
        self.assertEqual((pauses, MACHINE), (played.pauses, played.value))

    @each("kind, settings, params, waits", (cs.CloudStack, {}, {}, False), (cs.AIOCloudStack, {}, {}, True),
          (cs.AIOCloudStack, {"fetch_result": False}, {}, False),
          (cs.AIOCloudStack, {"fetch_result": "false"}, {}, False),
          (cs.AIOCloudStack, {}, {"fetch_result": "no"}, False), (cs.CloudStack, {"fetch_result": True}, {}, True),
          (cs.CloudStack, {}, {"fetch_result": "true"}, True),
          (cs.CloudStack, {"fetch_result": True}, {"fetch_result": None}, True))
    def test_the_async_client_waits_unless_told_not_to_and_the_other_does_not(self, kind, settings, params, waits):
        """5.2.0 waits in neither."""
        client = kind(ENDPOINT, "k", "s", **settings)
        played = self._play_one(client, [SUBMITTED, DONE], asking("startVirtualMachine", **params))
        self.assertEqual(MACHINE if waits else {"jobid": "job-1"}, played.value)

    @each("more, expected", ({"jobresult": {"success": True}}, {"success": True}), ({}, {}), ({"jobresult": None}, {}),
          ({"jobresult": {}}, {}), ({"jobresult": "text"}, "text"), ({"jobresult": [1]}, [1]),
          ({"jobresult": False}, False))
    @each("status", 1, "1")
    def test_results_of_every_shape(self, more, expected, status):
        played = self.play([SUBMITTED, looked(status, **more)], started())
        self.assertEqual((None, expected), (played.error, played.value))

    @each("status", 2, 3, "2", 4, -1)
    @each("more", {"jobresult": {"errorcode": 530, "errortext": "no capacity"}}, {}, {"jobresult": None},
          {"jobresult": "text"}, {"jobresultcode": 0, "jobinstanceid": "vm"}, {"jobresult": {}})
    def test_failures_of_every_shape(self, status, more):
        """5.2.0 polls for ever where there is no jobresult."""
        response = looked(status, **more)
        played = self.play([SUBMITTED, PENDING, response], started(), job_timeout=100)
        error = played.error
        self.assertEqual(["startVirtualMachine"] + ["queryAsyncJobResult"] * 2, played.commands)
        whole = dict({"jobid": "job-1", "jobstatus": status}, **more)
        expected = whole if more.get("jobresult") is None else more["jobresult"]
        told = (type(error), error.args, error.error, error.jobid, error.job_failed, error.outcome_unknown)
        self.assertEqual((cs.CloudStackApiException, ("Job failure",), expected, "job-1", True, False), told)
        self.assertEqual(more.get("jobinstanceid"), error.jobinstanceid)
        self.assertEqual((f"Job failure, error: {expected}", response.json()), (str(error), error.response.json()))

    @each("script, params, value", *[(one(document), {}, document) for document in (
        {"id": "1"}, {"count": 1, "vm": [{"id": "1", "jobid": "j"}]}, {"jobid": "j", "jobstatus": 0}, "text", [], {})],
          ([answer('{"r": {"jobid": "j"}}')], {"json": False}, '{"r": {"jobid": "j"}}'))
    def test_what_is_no_job_is_returned_as_it_is(self, script, params, value):
        played = self.play(script, started(**params))
        self.assertEqual((None, value, ["startVirtualMachine"]), (played.error, played.value, played.commands))

    @each("script, settings, value, requests, slept",
          ([PENDING], {"job_timeout": 5, "poll_interval": 1}, None, 13, 5), ([PENDING], {"job_timeout": 0}, None, 2, 0),
          ([PENDING] * 10 + [DONE], {"job_timeout": "5"}, MACHINE, 12, 5), ([DONE], {"job_timeout": 0}, MACHINE, 2, 0),
          ([a_while_later(10, PENDING), DONE], {"job_timeout": 5}, MACHINE, 3, 0))
    def test_the_last_poll_is_at_the_deadline(self, script, settings, value, requests, slept):
        """5.2.0 overshoots it and leaves the poll out."""
        played = self.play([SUBMITTED] + script, started(), **settings)
        self.assertEqual((value, requests, slept), (played.value, len(played.requests), played.slept))
        self.assertEqual(cs.CloudStackJobTimeout if value is None else type(None), type(played.error))

    @each("item, status", (PENDING, 408), (silent(), None), (answer("<html>", 502), 408))
    def test_a_job_that_still_runs_at_the_deadline(self, item, status):
        played = self.play([SUBMITTED, item], started(), job_timeout=600)
        error = played.error
        self.assertEqual((cs.CloudStackJobTimeout, 600), (type(error), round(played.slept, 3)))
        self.assertEqual((("Timeout waiting for async job result", "job-1"), "job-1"), (error.args, error.jobid))
        self.assertEqual((status, 200), (error.response and error.response.status_code, PENDING.status_code))
        self.assertEqual(getattr(item, "text", None), error.response and error.response.text)

    @each("settings, totals", ({"timeout": 3, "job_timeout": 1000}, [30] * 4), ({"timeout": 3}, [30] * 4),
          ({"timeout": 3, "job_timeout": 0.25}, [30, 3.25, 3.15, 3.05, 3]))
    def test_a_poll_takes_ten_timeouts_at_most_and_not_much_longer_than_the_deadline(self, settings, totals):
        played = self.play([SUBMITTED, PENDING, PENDING, DONE if len(totals) == 4 else PENDING], started(), **settings)
        self.assertEqual(totals, [round(request.total, 6) for request in played.requests])

    @each("item", *TROUBLE)
    @each("settings", {}, {"job_timeout": 100})
    def test_trouble_on_the_way_is_ridden_out(self, item, settings):
        """5.2.0 gives up on a 503 or an HTML page."""
        played = self.play([SUBMITTED, item, PENDING, item, DONE], started(), **settings)
        self.assertEqual((None, MACHINE), (played.error, played.value))

    @each("item", silent(), answer("<html>", 502), api_error(503), answer({"r": {}}))
    def test_without_a_deadline_ten_troubles_in_a_row_end_the_wait(self, item):
        played = self.play([SUBMITTED, item], started(), retry=3)
        self.assertEqual([2, 4, 8, 16, 30, 30, 30, 30, 30], played.pauses)
        self.assertNotIsInstance(played.error, cs.CloudStackJobTimeout)
        self.assertEqual(("job-1", False), (played.error.jobid, played.error.job_failed))

    @each("script, settings", (([answer("<html>", 502)] * 9 + [PENDING]) * 3, {}),  # a good poll begins the count anew
          ([lost()] * 1100, {"job_timeout": 10**6}),
          ([lost()] * 1100, {"job_timeout": 10**6, "poll_interval": 0}))
    def test_trouble_may_last_for_hours(self, script, settings):
        """Long enough for the growing distances to overflow, were they without a bound."""
        played = self.play([SUBMITTED] + script + [DONE], started(), **settings)
        self.assertEqual((None, MACHINE, 30), (played.error, played.value, max(played.pauses)))

    @each("item, pause", (api_error(429, "please retry after [7000] ms."), 7), (told_to_wait("20"), 20),
          (api_error(429, f"please retry after [{'9' * 400}] ms."), 30), (told_to_wait("86400"), 30))
    @each("deadline", None, 3)
    def test_a_wait_the_server_asks_for_is_kept_within_bounds(self, item, pause, deadline):
        played = self.play([SUBMITTED, item, DONE], started(), job_timeout=deadline)
        self.assertEqual((MACHINE, [min(pause, deadline or pause)]), (played.value, played.pauses))

    @each("code", 401, 431, 432, 530, 531, 532, 533, 534, 535, 536, 537)
    def test_an_error_the_server_states_in_json_ends_the_wait(self, code):
        played = self.play([SUBMITTED, PENDING, api_error(code, "text")], started(), retry=5, job_timeout=100)
        self.assertEqual(["startVirtualMachine"] + ["queryAsyncJobResult"] * 2, played.commands)
        error = played.error
        self.assertEqual((code, "job-1", False, False), (error.error["errorcode"], error.jobid, error.job_failed,
                                                         error.outcome_unknown))
        self.assertIs(code != 431, "job job-1 may still run" in str(error))  # which knows no such job

    @each("script, jobid", ([silent()], None), ([api_error(533)], None), ([answer("<html>")], None),
          *[([SUBMITTED, error], "job-1") for error in (
              ValueError("x"), MemoryError(), cs.CloudStackException("x"), KeyboardInterrupt(), SystemExit(3))])
    def test_everything_raised_after_the_submission_carries_the_job_s_id(self, script, jobid):
        for kind in KINDS:
            with self.assertRaises(BaseException) as caught:
                raise self._play_one(kind(ENDPOINT, "k", "s", job_timeout=0), script, started()).error
            self.assertEqual(jobid, getattr(caught.exception, "jobid", None), kind)

    @each("jobid, sent", (5, "5"), ("a b/\xfc~", "a b/\xfc~"), ("", ""), (None, "None"), (True, "True"), ([], "[]"),
          ("\x00", None), ("\ud800", None))
    def test_a_job_id_of_any_kind(self, jobid, sent):
        played = self.play([answer({"r": {"jobid": jobid}}), DONE], started())
        if sent is None:
            self.assertEqual((cs.CloudStackException, ["startVirtualMachine"]), (type(played.error), played.commands))
        else:
            self.assertEqual((MACHINE, sent), (played.value, played.params()["jobid"]))

    def test_polls_are_sent_as_the_call_was_with_a_fresh_expiry(self):
        call = started(headers={"X-A": "1"}, opcode_name="action", expires=GIVEN)
        played = self.play([SUBMITTED, a_while_later(60, PENDING), DONE], call, headers={"X-B": "2"}, method="post")
        self.assertEqual(["startVirtualMachine"] + ["queryAsyncJobResult"] * 2, played.column("action"))
        self.assertEqual((["POST"] * 3, [None] * 3), (played.methods, played.commands))
        self.assertEqual([("1", "2")] * 3, [(each.headers["X-A"], each.headers["X-B"]) for each in played.requests])
        self.assertEqual([GIVEN, "2026-01-01T00:10:00+0000", "2026-01-01T00:11:00+0000"], played.column("expires"))

    def test_poll_interval_may_change_during_the_wait(self):
        clients = []

        def faster(played, request):
            clients[-1].poll_interval = 0.05
            return PENDING

        played = self.play([SUBMITTED, PENDING, faster, PENDING, DONE],
                           lambda client: clients.append(client) or started()(client))
        self.assertEqual([0.1, 0.05, 0.05], played.pauses)

    def test_job_timeout_may_change_during_the_wait(self):
        clients = []

        def sooner(played, request):
            clients[-1].job_timeout = 3
            return PENDING

        played = self.play([SUBMITTED, PENDING, sooner, PENDING],
                           lambda client: clients.append(client) or started()(client), job_timeout=100)
        self.assertIs(cs.CloudStackJobTimeout, type(played.error))
        self.assertAlmostEqual(3, sum(played.pauses))

    @each("script, options, settings, expected", *[([PENDING, DONE], {"json": json}, {}, MACHINE) for json in (1, 0)],
          ([looked(2)], {}, {}, cs.CloudStackApiException), ([api_error(431, "Unable to find")], {},
          {}, cs.CloudStackApiException), ([PENDING], {}, {"job_timeout": 5}, cs.CloudStackJobTimeout),
          ([PENDING], {"job_timeout": 5}, {}, cs.CloudStackJobTimeout))
    def test_wait_job(self, script, options, settings, expected):
        played = self.play(script, asking("wait_job", jobid="job-1", **options), **settings)
        self.assertEqual({"queryAsyncJobResult"}, set(played.commands))
        self.assertEqual(expected, played.value or type(played.error))
        self.assertEqual("job-1", getattr(played.error, "jobid", "job-1"))


def length_of(number, jobs):
    """The seconds that a job takes: 0.1 to 7, in no order."""
    return 0.1 * 70 ** (number * 7 % jobs / (jobs - 1))


class JobsAtOnceTest(JumpingCase):
    """Many waiters of one client share what listAsyncJobs tells. 5.2.0 polls each job every two seconds."""

    def setUp(self):
        super().setUp()
        self.ends, self.known, self.strangers, self.hidden, self.fails = {}, {}, [], set(), set()
        self.listing, self.lasts = self.list_pending, lambda number: 20 * (1 + number % 5 / 10)

    def list_pending(self, params):
        running = (job for job, end in self.ends.items() if self.loop.time() < end and job not in self.hidden)
        rows = [{"jobid": job, "jobstatus": 0} for job in self.strangers + sorted(running)]
        return list_server(0, key="asyncjobs", rows=rows)(None, params)

    def server(self, params):
        if params["command"] == "listAsyncJobs":
            return self.listing(params)
        if params["command"] == "queryAsyncJobResult":
            jobid = params["jobid"]
            if self.loop.time() < self.ends[jobid]:
                return PENDING
            failure = {"errorcode": 530, "job": jobid}
            return looked(2, jobresult=failure) if jobid in self.fails else looked(jobresult={"job": jobid})
        jobid = f"job-{int(params['id']):04}"
        self.ends[jobid] = self.loop.time() + self.lasts(int(params["id"]))
        return answer({"r": {"jobid": jobid}})

    async def job(self, client, number):
        result = await client.startVirtualMachine(id=number)
        self.known[f"job-{number:04}"] = self.loop.time()
        return result

    def start(self, number, client=None, **settings):
        client = client or self.client(**settings)
        return self.all_of(self.job(client, index) for index in range(number))

    def check(self, number, client=None, **settings):
        """All jobs end well, and no later than after two poll intervals; the client."""
        client = client or self.client(**settings)
        self.assertEqual([{"job": f"job-{index:04}"} for index in range(number)], self.start(number, client))
        self.assertLess(max(self.late()), 4.5)
        return client

    def late(self):
        return [known - self.ends[jobid] for jobid, known in self.known.items()]

    def asked(self, command="queryAsyncJobResult"):
        """The moment and the job of each request."""
        return [(at, params.get("jobid")) for at, params, _ in self.requests if params["command"] == command]

    @each("jobs, lasts, in_turn, requests, late", (1000, lambda number: 31, False, 0.35, 1),
          (60, lambda number: length_of(number, 60), False, 1, 0.35),
          (16, lambda number: length_of(number, 16), True, 2.5, 0.3))
    def test_what_jobs_cost_and_how_late_they_are_beside_5_2_0(self, jobs, lasts, in_turn, requests, late):
        self.lasts, client = lasts, self.client()
        if in_turn:
            for number in range(jobs):
                self.all_of([self.job(client, number)])
        else:
            self.start(jobs, client)
        rounds = [-(-lasts(number) // 2) for number in range(jobs)]
        others_late = [2 * count - lasts(number) for number, count in enumerate(rounds)]
        self.assertLessEqual(len(self.requests) / sum(count + 2 for count in rounds), requests)
        self.assertLessEqual(sum(self.late()) / sum(others_late), late)

    def test_fewer_than_four_are_asked_for_singly_also_after_many(self):
        client = self.check(3)
        self.assertEqual(0, self.count("listAsyncJobs"))
        self.fails = {"job-0001"}
        self.start(20, client)
        lists = self.count("listAsyncJobs")
        self.assertGreater(lists, 3)
        self.fails, self.lasts = set(), lambda number: 100
        self.check(3, client)
        self.assertEqual(lists, self.count("listAsyncJobs"), "a waiter was not forgotten")

    @each("strangers, jobs, most, most_lists", (0, 4, 60, 50), (1200, 40, 40 * 14, 300), (50000, 10, 10 * 22, 10))
    def test_jobs_of_others_in_the_list(self, strangers, jobs, most, most_lists):
        self.strangers = [f"stranger-{number}" for number in range(strangers)]
        self.check(jobs)
        self.assertLessEqual(self.count("listAsyncJobs"), most_lists)
        self.assertLessEqual(len(self.requests), most)

    def test_jobs_the_list_leaves_out_are_asked_for_singly(self):
        self.hidden = {"job-0003", "job-0007"}
        self.check(10)
        polls = collections.Counter(jobid for _, jobid in self.asked())
        self.assertGreater(polls["job-0003"], 5)
        self.assertLessEqual(polls["job-0001"], 4)

    @each("listed, most", (api_error(432, "unknown command"), 1), (answer("<html>", 502), 15),
          *[(listed, 4) for listed in (
        answer({"r": {"success": True}}), answer({"r": "x"}), api_error(401), answer([1]))],
          *[(answer({"r": {"count": 3, "asyncjobs": rows}}), 60) for rows in (
              [None, 5, "x", []], [{"jobid": None}, {"jobid": ["job-0001"]}, {}], [{"jobid": {"a": 1}}] * 3)])
    def test_lists_of_no_use_fall_back_to_single_polls(self, listed, most):
        self.listing = lambda params: listed
        self.check(6, retry=3)
        self.assertLessEqual(self.count("listAsyncJobs"), most)

    def test_a_list_that_never_helped_is_asked_for_twice_a_minute_all_the_same(self):
        self.strangers, self.hidden = ["stranger"], {f"job-{number:04}" for number in range(5)}
        self.lasts = lambda number: 300
        self.check(5)
        self.assertTrue(8 < self.count("listAsyncJobs") < 16, self.count("listAsyncJobs"))

    def test_passing_trouble_with_the_list_is_no_trouble_for_the_jobs(self):
        troubles = [silent(), lost(), answer("<html>", 502), api_error(503), api_error(429), unsent()]
        self.lasts = lambda number: 300
        self.listing = lambda params: troubles.pop(0) if troubles else self.list_pending(params)
        self.check(10)
        self.assertEqual([], troubles)
        self.assertGreater(self.count("listAsyncJobs"), 12)

    @each("recover, seconds", (False, 5), (True, 5), (True, 0.005))
    def test_a_cancelled_call_carries_the_id_and_starts_no_further_request(self, recover, seconds):
        async def one_job():
            try:
                await self.client(recover=recover).startVirtualMachine(id=1)
            except asyncio.CancelledError as error:
                return error.jobid

        async def use():
            task = asyncio.ensure_future(one_job())
            await asyncio.sleep(seconds)
            task.cancel()
            jobid, before = await task, len(self.requests)
            await asyncio.sleep(60)
            return jobid, len(self.requests) - before

        told = self.loop.run_until_complete(use())
        self.assertEqual(("job-0001" if seconds == 5 else self.requests[0][1]["customjobid"], 0), told)

    @each("slow", 0, 90)
    def test_the_deadline_s_last_poll_is_at_the_job_itself(self, slow):
        """Also where a list does not come."""
        self.lasts = lambda number: 1000
        self.listing = lambda params: (slow, self.list_pending(params))
        outcomes = self.start(10, job_timeout=7)
        told = [(type(outcome), outcome.jobid, outcome.response.status_code) for outcome in outcomes]
        self.assertEqual([(cs.CloudStackJobTimeout, f"job-{index:04}", 408) for index in range(10)], told)
        last = {jobid: round(at - 1000) for at, jobid in self.asked()}
        self.assertEqual(set(self.ends), {job for job, at in last.items() if 7 <= at <= 7 + slow / 9}, last)

    @each("status, late", (lambda over: int(over), 4.5), (lambda over: 0, 32.5))
    def test_finished_jobs_in_the_list(self, status, late):
        """Servers up to 4.19 list them among the pending ones; and no list is believed for ever."""
        def listing(params):
            now = self.loop.time()
            rows = [{"jobid": job, "jobstatus": status(now >= end)} for job, end in sorted(self.ends.items())]
            return answer({"r": {"count": len(rows), "asyncjobs": rows}})

        self.listing = listing
        self.start(10)
        self.assertEqual((10, True), (len(self.known), max(self.late()) <= late), self.late())

    def test_a_list_that_hangs_delays_no_result_for_long(self):
        self.listing = lambda params: (90, self.list_pending(params))
        self.check(20)

    def test_a_crowd_costs_a_list_each_tenth_of_a_second_at_most(self):
        """Jobs that are submitted all the time have somebody poll soon all the time."""
        client = self.client()

        async def use():
            tasks = []
            for number in range(200):
                tasks.append(asyncio.ensure_future(client.startVirtualMachine(id=number)))
                await asyncio.sleep(0.05)
            await asyncio.gather(*tasks)

        self.loop.run_until_complete(use())
        self.assertLess(self.count("listAsyncJobs"), (self.loop.time() - 1000) / 0.1)
        self.assertLess(self.count("queryAsyncJobResult"), 200 * 2)

    def test_the_shared_list_is_tied_to_no_event_loop(self):
        client = self.client()
        for _ in range(2):
            old, self.loop = self.loop, JumpingLoop()
            self.loop.clock.now = old.time()
            old.close()
            self.check(6, client)


# === [4.7] protocol: recovery =========================================================================================

UNKNOWN_JOB = api_error(431, "Unable to execute API command queryasyncjobresult due to invalid value.")
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z")
LOSSES = [silent(), lost(), answer("<html>", 502), answer("<html>", 500), answer("<html>"), answer(b""),
          answer([1]), raw("{")]


def found_job(status=0, **more):
    """queryAsyncJobResult's answer for whatever job is asked for."""
    def answered(played, request):
        job = dict({"jobid": wire(request)["jobid"], "jobstatus": status, "jobinstanceid": "vm-1"}, **more)
        return answer({"queryasyncjobresultresponse": job})

    return answered


class RecoveryTest(ProtocolCase):
    """recover: an answer that is lost is not a deployment that is lost."""

    def deploy(self, script, call=None, **settings):
        """Play a deployment, which must be sent once whatever happens."""
        settings = dict({"recover": True}, **settings)
        played = self.play(script, call or asking("deployVirtualMachine", name="x"), **settings)
        if call is None:
            self.assertEqual(1, played.commands.count("deployVirtualMachine"), played.commands)
        return played

    def _play_one(self, *args):
        """As ever; each client draws the same ids, which the texts of errors name."""
        draw = random.Random(7)
        with mock.patch("uuid.uuid4", lambda: uuid.UUID(int=draw.getrandbits(128), version=4)):
            return super()._play_one(*args)

    @each("command", "deployVirtualMachine", "getUploadParamsForVolume", "activateProject")
    def test_what_changes_something_carries_a_fresh_id_for_its_job(self, command):
        ids = self.deploy([SUBMITTED], one_after_another(asking(command), asking(command))).column("customjobid")
        self.assertEqual(([True, True], 2), ([bool(UUID4.match(name)) for name in ids], len(set(ids))), ids)

    @each("command, recover, params", ("listZones", True, {}), ("queryAsyncJobResult", True, {"jobid": "1"}),
          ("deployVirtualMachine", False, {}), ("deployVirtualMachine", True, {"json": False}), ("logout", True, {}),
          ("deployVirtualMachine", None, {}))
    def test_nothing_else_does(self, command, recover, params):
        self.assertEqual([None], self.deploy(one(), asking(command, **params), recover=recover).column("customjobid"))

    @each("name", "customjobid", "customJobId")
    def test_an_id_of_the_caller_s_own_is_kept(self, name):
        played = self.deploy([lost(), found_job()], asking("deployVirtualMachine", **{name: "mine"}))
        self.assertEqual((["mine", None], [None, "mine"]), (played.column(name), played.column("jobid")))
        self.assertEqual({"id": "vm-1", "jobid": "mine"}, played.value)

    @each("item", *LOSSES)
    @each("script, pauses, entity", ([found_job()], [], {"id": "vm-1"}), ([found_job(jobinstanceid=None)], [], {}),
          ([UNKNOWN_JOB] * 3 + [found_job()], [0.1] * 3, {"id": "vm-1"}))
    def test_the_job_of_a_lost_answer_is_found(self, item, script, pauses, entity):
        """Also one that is queued a little later, and one that has no entity."""
        played = self.deploy([item] + script)
        job = played.params(0)["customjobid"]
        self.assertEqual((None, dict(entity, jobid=job)), (played.error, played.value))
        self.assertEqual(([None] + [job] * len(script), pauses), (played.column("jobid"), played.pauses))

    @each("last, expected", (found_job(1, jobresult=MACHINE), MACHINE),
          (found_job(2, jobresult={"errortext": "full"}), cs.CloudStackApiException))
    def test_and_waited_for_as_ever(self, last, expected):
        call = asking("deployVirtualMachine", fetch_result=True)
        played = self.deploy([lost(), found_job(), found_job(), last], call)
        self.assertEqual(expected, played.value or type(played.error))
        self.assertEqual(["deployVirtualMachine"] + ["queryAsyncJobResult"] * 3, played.commands)

    @each("item, kind", (silent(), cs.CloudStackTimeoutError), (lost(), cs.CloudStackConnectionError),
          (answer("<html>", 502), cs.CloudStackException), (answer("<html>"), cs.CloudStackException))
    def test_a_job_that_stays_unknown_for_a_timeout_is_the_first_error(self, item, kind):
        played = self.deploy([item, UNKNOWN_JOB], timeout=6, retry=5)
        job, error = played.params(0)["customjobid"], played.error
        self.assertEqual((kind, True, job, 2), (type(error), error.outcome_unknown, error.jobid, len(error.args)))
        self.assertIn(f"the server knows no job {job}; wait_job() or `cs --wait {job}`", str(error))
        self.assertTrue(6 <= played.slept <= 8, played.slept)

    @each("item", *TROUBLE)
    def test_trouble_is_ridden_out_while_the_job_is_looked_for(self, item):
        played = self.deploy([lost(), item, item, UNKNOWN_JOB, item, found_job()])
        self.assertEqual((None, "vm-1"), (played.error, (played.value or {}).get("id")))

    def test_trouble_breaks_a_row_of_answers_that_know_no_job(self):
        script = [lost()] + [UNKNOWN_JOB] * 9 + [silent()] + [UNKNOWN_JOB] * 3 + [found_job()]
        self.assertEqual("vm-1", self.deploy(script, timeout=6).value["id"])

    @each("settings, requests, slept", ({}, 11, 180), ({"job_timeout": 20}, 6, 20))
    def test_trouble_that_does_not_end_is_the_first_error(self, settings, requests, slept):
        played = self.deploy([lost(), answer("<html>", 502)], **settings)
        told = (type(played.error), len(played.requests), round(played.slept))
        self.assertEqual((cs.CloudStackConnectionError, requests, slept), told)
        self.assertIn("could not be asked for job", str(played.error))

    @each("script, requests, unknown", *[([lost(), api_error(code)], 2, True) for code in (401, 432, 531)],
          # what surely did not run is not looked for
          *[([item], 1, False) for item in (unsent(), api_error(530), api_error(431), api_error(401))])
    def test_answers_that_end_it(self, script, requests, unknown):
        played = self.deploy(script)
        self.assertEqual((requests, unknown), (len(played.requests), played.error.outcome_unknown))
        self.assertIs(unknown, played.error.jobid is not None)

    @each("item", unsent(), api_error(429), WANTS_POST)
    def test_what_may_be_sent_again_has_the_same_id_again(self, item):
        ids = self.deploy([item, SUBMITTED], asking("deployVirtualMachine"), retry=1).column("customjobid")
        self.assertEqual([ids[0]] * 2, ids)

    def test_the_search_is_an_event_at_each_step(self):
        seen = []

        def call(client):
            client.on_event = seen.append
            return client.deployVirtualMachine()

        self.deploy([lost(), answer("<html>", 502), UNKNOWN_JOB, found_job()], call)
        self.assertEqual({("deployVirtualMachine", cs.Waiting)}, {(event.command, type(event)) for event in seen})
        self.assertEqual(2 * len(KINDS), len(seen))

    def test_what_was_never_sent_has_no_job(self):
        def call(client):
            client.headers["X"] = "a\nb"
            return client.deployVirtualMachine()

        played = self.deploy([], call)
        self.assertEqual((ValueError, False), (type(played.error), hasattr(played.error, "jobid")))

    @each("script", [KeyboardInterrupt()], [lost(), KeyboardInterrupt()])
    @both
    def test_whoever_interrupts_it_gets_the_id(self, kind, script):
        with self.assertRaises(KeyboardInterrupt) as caught:
            self._play_one(kind(ENDPOINT, "k", "s", recover=True), script, asking("deployVirtualMachine"))
        self.assertRegex(caught.exception.jobid, UUID4)
        self.assertTrue(caught.exception.outcome_unknown)


# === [5] transport ====================================================================================================
# Real sockets on 127.0.0.1. A scripted server records every byte it is sent, and answers, pauses and breaks where a
# script says so; what it has recorded is what the tests judge by.

LOST, LATE = cs.CloudStackConnectionError, cs.CloudStackTimeoutError
ATTACK_SEED = 20260101
ATTACK_RUNS = int(os.environ.get("CS_ATTACK_RUNS") or 160)  # broken connections that are tried; 16000 is all of them
PATIENCE_OF_TESTS = 30.0  # seconds after which something that should have happened by now has not


def until(condition, what="it"):
    """Wait for what another thread is about to do. (A scripted server, which may then close, is more patient.)"""
    end = time.monotonic() + PATIENCE_OF_TESTS / 2
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not happen")
        time.sleep(0.002)


async def until_async(condition, what="it"):
    await asyncio.get_event_loop().run_in_executor(None, until, condition, what)


async def gathered(calls):
    return await asyncio.gather(*calls)


class Received:
    """One request as it came: method, target, headers as (name, value) pairs, body, and its parameters decoded."""

    def __init__(self, head, body):
        self.line, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.target, _ = self.line.split(" ")
        self.headers = [tuple(line.split(": ", 1)) for line in lines]
        self.body = body
        self.params = dict(parse_qsl(body.decode("ascii") or self.target.partition("?")[2], keep_blank_values=True))
        self.command = self.params.get("command", self.method)  # CONNECT has no other

    def all(self, name):
        """The values of the headers of this name, in any case."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


class Wire:
    """One connection, seen by the server; an OSError ends its script."""

    def __init__(self, sock):
        self.sock = sock
        self.raw = b""  # all that came, as the TLS layer gave it
        self.taken = 0  # how much of it was read as requests
        self.requests = []
        self.ended = threading.Event()

    def more(self, most=65536):
        """Receive at most so many bytes; False if the client has gone away."""
        part = self.sock.recv(most)
        self.raw += part
        return bool(part)

    def read_request(self, most=float("inf")):
        """The next request; None if the client has gone away, or if it is not whole after so many bytes."""
        end = self.taken + most
        while True:
            head, gap, rest = self.raw[self.taken :].partition(b"\r\n\r\n")
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            length = int(found.group(1)) if found else 0
            if gap and len(rest) >= length:
                self.taken += len(head) + 4 + length
                self.requests.append(Received(head, rest[:length]))
                return self.requests[-1]
            if len(self.raw) >= end or not self.more(int(min(65536, end - len(self.raw)))):
                return None

    def send(self, content):
        self.sock.sendall(content)
        return True


class Step:
    """What a script may hold beside what ScriptedServer names."""

    def AGAIN(wire):
        """Start over with the first step."""

    def READ(wire):
        """Take one whole request."""
        return wire.read_request() is not None

    def HOLD(wire):
        """Wait until the client has gone away."""
        while wire.more():
            pass

    def RESET(wire):
        """End the connection with a reset."""
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.sock.close()


class ScriptedServer:
    """Plays a list of steps to each connection: the first list to the first one, and the last to all that follow.

    A step is bytes to send, an Event to wait for, an SSLContext to start TLS with, or a function of the Wire, which
    ends the script by returning False. A connection is closed after its last step."""

    def __init__(self, *scripts, tls=None):
        self.scripts = list(scripts)
        self.tls = tls
        self.gates = [step for script in scripts for step in script if isinstance(step, threading.Event)]
        self.wires, self.threads, self.is_stopping = [], [], False
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(128)
        self.place = "127.0.0.1:%d" % self.listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{self.place}/client/api"
        self._start(self._accept)

    @property
    def requests(self):
        return [request for wire in list(self.wires) for request in list(wire.requests)]

    @property
    def asked(self):
        """The commands that came over each connection: what was sent, and how often."""
        return [[request.command for request in list(wire.requests)] for wire in list(self.wires)]

    @property
    def open_wires(self):
        return [wire for wire in list(self.wires) if not wire.ended.is_set()]

    def _start(self, function, *args):
        self.threads.append(threading.Thread(target=function, args=args, daemon=True))
        self.threads[-1].start()

    def _accept(self):
        while True:
            sock, _ = self.listener.accept()
            if self.is_stopping:
                sock.close()
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(PATIENCE_OF_TESTS)  # so that a client which waits for ever fails its test
            self.wires.append(Wire(sock))
            self._start(self._play, self.wires[-1], self.scripts.pop(0) if self.scripts[1:] else self.scripts[0])

    def _play(self, wire, steps):
        try:
            if self.tls:
                self.do(wire, self.tls)
            all(self.do(wire, step) for step in (itertools.cycle(steps) if Step.AGAIN in steps else steps))
        except (OSError, ValueError):
            pass  # what became of it shows in what the client says
        finally:
            wire.sock.close()
            wire.ended.set()

    def do(self, wire, step):
        """One step; False if the script is over."""
        if isinstance(step, bytes):
            return wire.send(step)
        if isinstance(step, ssl.SSLContext):
            wire.sock = step.wrap_socket(wire.sock, server_side=True)  # closes what it was given when it fails
            return True
        if isinstance(step, threading.Event):
            return step.wait(PATIENCE_OF_TESTS)
        return step(wire) is not False

    def close(self):
        self.is_stopping = True
        for gate in self.gates:
            gate.set()
        with contextlib.suppress(OSError):
            socket.create_connection(self.listener.getsockname(), 1).close()  # wakes accept()
        for wire in list(self.wires):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(wire.sock, socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE_OF_TESTS)
        self.listener.close()


ZONE = {"id": "1", "name": "z\u00fcrich"}
RESULT = {"count": 1, "zone": [ZONE]}
ZONES = json.dumps({"listzonesresponse": RESULT}).encode("utf-8")
PACKED = gzip.compress(ZONES)
GZIP = "Content-Encoding: gzip"
JOB = "00000000-0000-4000-8000-000000000001"


def deployment(jobid=JOB):
    return json.dumps({"deployvirtualmachineresponse": {"jobid": jobid, "id": "vm-1"}}).encode("utf-8")


def reply(body=ZONES, status="200 OK", *headers, length=True, version="1.1"):
    """The bytes of an answer, whose body is bytes, or a document to send as JSON; length=False leaves Content-Length
    out, version is that of HTTP."""
    body = json.dumps(body).encode("utf-8") if isinstance(body, dict) else body
    lines = [f"HTTP/{version} {status}", "Content-Type: application/json;charset=UTF-8", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines + ["", ""]).encode("latin-1") + body


def gzipped(body=PACKED, **options):
    """An answer whose body is, or claims to be, packed already."""
    return reply(body, "200 OK", GZIP, **options)


def chunked(body=ZONES, size=20, last=b"0\r\n\r\n", headers=()):
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    content = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
    return reply(b"", "200 OK", "Transfer-Encoding: chunked", *headers, length=False) + content + last


DEPLOYED = deployment()
SERVE = [Step.READ, reply(), Step.AGAIN]


def echo(wire):
    """Answer with the name that was asked for."""
    return wire.send(reply({"listzonesresponse": {"zone": [{"id": wire.requests[-1].params.get("name")}]}}))


def dripping(content, filler=b" "):
    """A step that sends 4000 bytes one at a time: the content, and then the filler."""

    def drip(wire):
        for byte in itertools.islice(itertools.chain(content, itertools.cycle(filler)), 4000):
            wire.send(bytes([byte]))
            time.sleep(0.0005)

    return drip


# What must never be seen but on the wire, in any of the forms that it may have there.
CANARIES = (CANARY_KEY, CANARY_SECRET, CANARY_PASSWORD, CANARY_SESSION, CANARY_PROXY, CANARY_TOKEN) = (
    "CANARYkey-4f9a", "CANARYsecret-77c1", "CANARYpass%/+word-9d02", "CANARYsession+key/51==", "CANARYproxy-e6b3",
    "CANARYtoken-0c5d")


def forms_of(secret):
    """A secret as it is, percent-encoded in each way, and in base64 at any offset."""
    forms = {secret, cs.cs_encode(secret), quote_plus(secret), repr(secret)[1:-1], json.dumps(secret)[1:-1]}
    for offset in range(3):
        code = base64.b64encode(b"\0" * offset + secret.encode("utf-8")).decode("ascii").rstrip("=")
        forms.add(code[4 if offset else 0 : -4])
    return forms


def printed(error):
    """What Python prints of an exception, and of those that it was raised from or while handling."""
    return "".join(traceback.format_exception(type(error), error, None))


def all_texts(error, seen=()):
    """Everything that a log, a traceback, a debugger's repr or a pickle could show of an exception."""
    if not isinstance(error, BaseException) or error in seen:
        return
    yield str(error)
    yield repr(error)
    yield repr(error.args)
    yield repr({name: value for name, value in vars(error).items() if name != "response"})
    yield "".join(traceback.format_exception(type(error), error, error.__traceback__, chain=False))
    for linked in (error.__cause__, error.__context__, getattr(error, "reason", None)):
        yield from all_texts(linked, (*seen, error))


class TransportCase(Case):
    """A test with scripted servers, and clients (of this kind, if no other is named) whose credentials are canaries."""

    KIND = cs.CloudStack

    def setUp(self):
        super().setUp()
        self.servers = []
        os.environ["SSL_CERT_FILE"] = os.devnull  # the system's CA certificates, which take 30 ms to read

    def serve(self, *scripts, **options):
        server = ScriptedServer(*scripts, **options)
        self.servers.append(server)
        self.addCleanup(server.close)
        return server

    def client(self, server, kind=None, **settings):
        endpoint = server.url if isinstance(server, ScriptedServer) else server
        keys = {} if "username" in settings else {"key": CANARY_KEY, "secret": CANARY_SECRET}
        client = (kind or self.KIND)(endpoint, **dict(dict(keys, timeout=5, fetch_result=False), **settings))
        self.addCleanup(self._close, client)
        return client

    def pair(self, *scripts, kind=None, tls=None, **settings):
        """A server that plays these scripts, and a client of it; tls=True: by TLS that the client trusts."""
        if tls is True:
            tls, settings["verify"] = tls_context(), pem()
        server = self.serve(*scripts, tls=tls)
        return server, self.client(server, kind, **settings)

    @staticmethod
    def _close(client):
        with contextlib.redirect_stderr(io.StringIO()):  # of a trace
            run(client.aclose()) if isinstance(client, cs.AIOCloudStack) else client.close()

    @staticmethod
    def call(client, command="listZones", **params):
        value = getattr(client, command)(**params)
        return run(value) if asyncio.iscoroutine(value) else value

    def failure(self, client, says="", kind=LOST, outcome=None, command=None, **params):
        """The exception of a call: it is of that very class, says this, can be pickled, and tells no secret.

        outcome: "unsent" or "unknown", which is what the error of a command that changes something must say."""
        command = command or ("deployVirtualMachine" if outcome else "listZones")
        error = self.raised(cs.CloudStackException, self.call, client, command, **params)
        self.assertIs(kind, type(error), repr(error))
        self.assert_tells_nothing(error)
        self.assertIn(says, str(error))
        if outcome:
            self.assertEqual((outcome == "unsent", outcome == "unknown"), (error.unsent, error.outcome_unknown), error)
        if error.response is None:
            self.assertNotIn("\n", str(error))
        return error

    def unsent(self, client, says="", kind=LOST, **options):
        return self.failure(client, says, kind, "unsent", **options)

    def unknown(self, client, says="", kind=LOST, **options):
        return self.failure(client, says, kind, "unknown", **options)

    def refusal(self, function, *args, kind=ValueError, **options):
        """The exception, which tells no secret, that a function raises."""
        error = self.raised(kind, function, *args, **options)
        self.assert_tells_nothing(*all_texts(error))
        return error

    def assert_tells_nothing(self, *told):
        texts = [item for item in told if isinstance(item, str)]
        for error in [item for item in told if isinstance(item, BaseException)]:
            pickled = pickle.dumps(error)
            copied = pickle.loads(pickled)
            self.assertEqual((type(error), str(error)), (type(copied), str(copied)))
            texts += [*all_texts(error), pickled.decode("latin-1")]
        signatures = {request.params.get("signature") for server in self.servers for request in server.requests}
        told = "\n".join(texts)
        for secret in signatures.union(CANARIES) - {None}:
            self.assertLacks(told, *forms_of(secret))

    def imported(self, name):
        with contextlib.suppress(ImportError):
            return __import__(name)
        return self.skipTest(f"{name} is not installed")

    def traced(self, client, command="listZones", **params):
        """What a call that may fail writes to standard error, which must tell no secret."""
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.suppress(cs.CloudStackException):
            self.call(client, command, **params)
        self.assert_tells_nothing(err.getvalue())
        return err.getvalue()

    def assert_child(self, code, *args, flags=(), env=()):
        """Run Python code in a process of its own, which ends well and says nothing on standard error; its output."""
        env = dict(os.environ, PYTHONPATH=os.path.dirname(CS_PATH), **dict(env))
        status, out, err = Child([sys.executable, *flags, "-c", code, *map(str, args)], env=env).finish()
        self.assertEqual((0, b""), (status, err), out)
        return out.decode("utf-8")


# Certificates, made once a run by the openssl program.

OPENSSL = shutil.which("openssl")
OPENSSL_CONFIG = """
[ req ]
distinguished_name = dn
[ dn ]
[ authority ]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[ here ]
subjectAltName = IP:127.0.0.1, DNS:cloud.invalid
authorityKeyIdentifier = keyid
[ elsewhere ]
subjectAltName = DNS:elsewhere.invalid, IP:192.0.2.1
authorityKeyIdentifier = keyid
"""
NEW_KEY = "req -config config -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 "
OPENSSL_COMMANDS = [NEW_KEY + f"-x509 -days 9 -subj /CN={ca} -extensions authority -keyout {ca}.key -out {ca}.pem"
                    for ca in ("ca", "other_ca")]
OPENSSL_COMMANDS += [NEW_KEY + "-subj /CN=leaf -keyout leaf.key -out leaf.csr",
                     "ec -in leaf.key -aes128 -passout pass:letmein -out locked.key"]
OPENSSL_COMMANDS += [f"x509 -req -in leaf.csr -extfile config -out {name}.pem {options}" for name, options in (
    ("self_signed", "-days 9 -extensions here -signkey leaf.key"),
    ("good", "-days 9 -extensions here -CA ca.pem -CAkey ca.key -set_serial 1"),
    ("expired", "-days -1 -extensions here -CA ca.pem -CAkey ca.key -set_serial 2"),
    ("elsewhere", "-days 9 -extensions elsewhere -CA ca.pem -CAkey ca.key -set_serial 3"))]


@functools.lru_cache(maxsize=None)
def certificates():
    """The directory of what openssl made: PEM files, and `directory` with the CA as OpenSSL looks for one."""
    folder = tempfile.mkdtemp(prefix="cs-test-certificates-")
    atexit.register(shutil.rmtree, folder, True)
    with open(os.path.join(folder, "config"), "w") as file:
        file.write(OPENSSL_CONFIG)
    for command in OPENSSL_COMMANDS + ["x509 -hash -noout -in ca.pem"]:
        status, out, err = Child([OPENSSL] + command.split(), cwd=folder).finish()
        if status:
            raise RuntimeError(err.decode())
    concatenate(os.path.join(folder, "both.pem"), *[os.path.join(folder, name) for name in ("good.pem", "leaf.key")])
    os.mkdir(os.path.join(folder, "directory"))
    shutil.copy(os.path.join(folder, "ca.pem"), os.path.join(folder, "directory", out.decode().strip() + ".0"))
    return folder


def pem(name="ca.pem"):
    """The path of a certificate or key."""
    return os.path.join(certificates(), name)


def concatenate(path, *sources):
    with open(path, "wb") as file:
        for source in sources:
            with open(source, "rb") as part:
                file.write(part.read())
    return path


def tls_context(name="good", client_ca=None):
    """The context of a server that shows this certificate, and may demand one of its clients."""
    context = ssl.SSLContext(getattr(ssl, "PROTOCOL_TLS_SERVER", ssl.PROTOCOL_TLS))
    context.load_cert_chain(pem(name + ".pem"), pem("leaf.key"))
    if client_ca:
        context.load_verify_locations(pem(client_ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


with_and_without_tls = each("tls", *[False, True][: 2 if OPENSSL else 1])
needs_openssl = unittest.skipUnless(OPENSSL, "the openssl program, which makes the certificates, is not there")


class Clock:
    """A clock for cs that is set by hand, or moves a step each time it is looked at, and by each pause."""

    def __init__(self, step=0.0):
        self.now = 5000.0
        self.step = step

    def __call__(self):
        self.sleep(self.step)
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    async def sleep_async(self, seconds):
        self.now += seconds


def refusing_place(case):
    """The address of a port that refuses connections: bound, so that nobody else gets it, but not listening."""
    taken = socket.socket()
    case.addCleanup(taken.close)
    taken.bind(("127.0.0.1", 0))
    return "127.0.0.1:%d" % taken.getsockname()[1]


class KeptConnectionTest(TransportCase):
    """When a connection is used again, and when it is not. (BodyTest: which answers leave it open.)"""

    def test_not_used_again_after_twenty_seconds(self):
        server, client = self.pair(SERVE)
        with mock.patch.object(cs, "_clock", Clock()) as clock:
            for pause in (0, 19.5, 20):
                clock.now += pause
                client.listZones()
        self.assertEqual([["listZones"] * 2, ["listZones"]], server.asked)
        until(server.wires[0].ended.is_set, "closing the old one")

    def test_after_a_burst_at_most_concurrency_are_kept_and_those_not_used_are_closed(self):
        """As the one that was used last is used next, the others come to rest."""
        together = threading.Barrier(6)
        steps = [Step.READ, lambda wire: together.wait(PATIENCE_OF_TESTS), reply()] + [Step.READ, reply()] * 6
        server, client = self.pair(steps + [Step.HOLD], concurrency=4)
        with mock.patch.object(cs, "_clock", Clock()) as clock:
            in_threads(6, lambda number: client.listZones())
            until(lambda: len(server.open_wires) == 4, "closing those that are too many")
            for _ in range(6):
                clock.now += 4
                client.listZones()
        self.assertEqual([["listZones"]] * 5 + [["listZones"] * 7], sorted(server.asked))
        until(lambda: len(server.open_wires) == 1, "closing the old ones")

    def test_another_endpoint_has_its_own_which_are_closed_when_they_are_old(self):
        (one, client), other = self.pair(SERVE), self.serve(SERVE)
        with mock.patch.object(cs, "_clock", Clock()) as clock:
            for server in (one, other, one, other):
                client.endpoint = server.url
                client.listZones()
            self.assertEqual([[["listZones"] * 2]] * 2, [one.asked, other.asked])
            clock.now += cs.IDLE + 1
            client.listZones()
        until(lambda: not one.open_wires, "closing the old one")

    @with_and_without_tls
    @each("steps", [], [Step.RESET], [b"HTTP/1.1 408 Too slow\r\n\r\n", lambda wire: wire.ended.set(), Step.HOLD])
    def test_one_that_died_or_that_said_something_unasked_is_noticed_before_use(self, tls, steps):
        go_on = threading.Event()
        server, client = self.pair([Step.READ, reply(), go_on] + steps, SERVE, tls=tls)
        client.listZones()
        go_on.set()
        until(server.wires[0].ended.is_set, "that")  # in the last row: it has been said
        self.assertEqual(RESULT, client.updateZone())
        self.assertEqual([["listZones"], ["updateZone"]], server.asked)

    def test_one_that_dies_unnoticed_is_replaced_once_for_a_reading_command(self):
        die = [Step.READ, reply(), Step.READ]
        server, client = self.pair([Step.READ], die, die, [Step.READ])
        self.failure(client, "Remote end closed", command="listPods")  # a fresh one: it is not asked again
        client.listZones()
        self.assertEqual(RESULT, client.listUsers())
        self.failure(client, "Remote end closed", command="listHosts")  # nor is the one that took its place
        self.assertEqual([["listPods"], ["listZones", "listUsers"], ["listUsers", "listHosts"], ["listHosts"]],
                         server.asked)

    @both
    def test_with_and_close_close_the_connections_and_the_client_works_on(self, kind):
        server, client = self.pair(SERVE, kind=kind)

        def leave(client):
            nothing_raised = (None, None, None)
            client.__exit__(*nothing_raised) if kind is cs.CloudStack else run(client.__aexit__(*nothing_raised))

        for number, close in enumerate([leave, self._close]):
            self.assertEqual(RESULT, self.call(client))
            close(client)
            close(client)
            until(server.wires[number].ended.is_set, "closing")

    @unittest.skipUnless(hasattr(signal, "pthread_kill"), "no signals of that kind here")
    @each("kind", KeyboardInterrupt, SystemExit, MemoryError, TimeoutError, OSError, ValueError)
    def test_what_a_signal_handler_raises_passes_as_it_is_and_the_connection_is_closed(self, kind):
        """Python's own for Ctrl-C, or a program's, whose exceptions may be of the kinds that the network raises."""
        def handle(*args):
            raise kind("of a handler")

        self.addCleanup(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, handle))
        main = threading.main_thread().ident
        ring = lambda wire: signal.pthread_kill(main, signal.SIGUSR1)  # noqa: E731
        server, client = self.pair([Step.READ, ring, Step.HOLD], SERVE, retry=3)
        raised = []
        try:
            client.updateZone()
        except kind as error:
            raised.append(error)  # whose traceback keeps all that garbage collection would else close
        until(server.wires[0].ended.is_set, "closing")
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual([["updateZone"], ["listZones"]], server.asked)
        self.assertEqual([(kind, "of a handler")], [(type(error), str(error)) for error in raised])

    def test_an_interrupt_while_the_connections_get_ready_gives_no_warning(self):
        """They are then unmade before they are made."""
        with contextlib.redirect_stderr(io.StringIO()) as err:
            cs._Transport.__new__(cs._Transport)
            gc.collect()
        self.assertEqual("", err.getvalue())


class BodyTest(TransportCase):
    """Answers, whole and broken."""

    @each("then, content", *[([Step.AGAIN], content) for content in (
          reply(), reply(ZONES, "200 OK", "Connection: keep-alive", version="1.0"), chunked(), chunked(size=10000),
          chunked(size=1), chunked(last=b"0;x=y\r\nX-A: b\r\nX-C: d\r\n\r\n"),
          chunked().replace(b"\r\n14\r\n", b"\r\n0000014\r\n"), gzipped(), chunked(PACKED, 1, headers=[GZIP]),
          reply(PACKED, "200 OK", "Content-Encoding: X-GZIP"), reply(ZONES, "200 OK", "Content-Encoding: identity"),
          reply().replace(b"\r\n", b"\n"), reply(ZONES, "200"), reply().replace(b": ", b":", 2),
          reply(b"\xef\xbb\xbf" + ZONES), b"HTTP/1.1 100 Continue\r\n\r\n" + reply(),
          b"HTTP/1.1 100 Continue\r\nX-A: b\r\n\r\n" * 3 + reply())],
          *[([Step.HOLD], reply(ZONES, "200 OK", "Connection: " + word)) for word in ("close", "Close")],
          *[([], reply(ZONES, "200 OK", "Content-Length: " + text, length=False)) for text in ("-5", "x", "")],
          ([Step.HOLD], reply(version="1.0")), *[([], reply(length=False, version=version)) for version in (
              "1.0", "1.1")], ([], gzipped(length=False)))
    def test_whole_answers_and_whether_they_leave_the_connection_open(self, then, content):
        server, client = self.pair([Step.READ, content, *then])
        self.assertEqual([RESULT] * 2, [client.listZones() for _ in range(2)])
        self.assertEqual([["listZones"] * 2] if then == [Step.AGAIN] else [["listZones"]] * 2, server.asked)

    DAMAGED, CHECKSUM = bytearray(PACKED), bytearray(PACKED)
    DAMAGED[len(PACKED) // 2] ^= 0xFF
    CHECKSUM[-6] ^= 0xFF
    TOO_MUCH = b"x" * 100001
    BOMB = gzip.compress(b"[" * 5000000, 9)
    TLS_ALERT = b"\x15\x03\x01\x00\x02\x02\x46"
    NOT_HTTP = [
        b"HTTP/1.1", b"HTTP/1.1 20", b"\r\n", b"220 mail.invalid ESMTP\r\n", bytes(range(256)) * 4, b"\0" * 1000,
        b"ICY 200 OK\r\n\r\n", TLS_ALERT, reply(version="9.9"), *[reply(ZONES, status) for status in (
            "abc OK", "99 OK", "1000 OK", "200 " + "x" * 70000)],
        *[reply(ZONES, "200 OK", *headers) for headers in (["X-A: " + "x" * 70000], ["x" * 70000], ["X-A: b"] * 200)]]
    CUT_OFF = [
        reply()[:-10], reply()[: -len(ZONES)], reply().replace(b"Content-Length: ", b"Content-Length: 9"),
        chunked()[:-30], chunked(last=b""), chunked(size=10000, last=b""), chunked(last=b"zz\r\n"),
        chunked(last=b"0" * 70000), gzipped()[:-10], gzipped(PACKED[:-10]), gzipped(PACKED[:10]),
        gzipped(PACKED[:-10], length=False), gzipped().replace(b"Content-Length: ", b"Content-Length: 9"),
        chunked(PACKED, 20, b"", [GZIP])[:-20], gzipped(bytes(DAMAGED)), gzipped(bytes(CHECKSUM)), gzipped(ZONES),
        # A second member of gzip, or whatever it is that follows the first:
        gzipped(gzip.compress(ZONES[:9]) + gzip.compress(ZONES[9:])), gzipped(PACKED + b"more"),
        gzipped(gzip.compress(b"") * 2000 + PACKED)]
    NO_JSON = [
        reply(length=False)[:-10], reply(zlib.compress(ZONES), "200 OK", "Content-Encoding: deflate"),
        reply(b"\x0b\x02\x80" + ZONES[:9], "200 OK", "Content-Encoding: br")]
    OVER_LIMIT = [
        gzipped(BOMB), chunked(BOMB, 1000, headers=[GZIP]), gzipped(BOMB, length=False), reply(TOO_MUCH),
        chunked(TOO_MUCH, 5000), reply(TOO_MUCH, length=False),
        *[reply(b"", "200 OK", f"Content-Length: {length}", length=False) for length in (10**12, 2**63, 10**30)]]
    NO_BODY = [b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK\r\nContent-Ty", b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\n"]

    @each("says, kind, content", ("Remote end closed", LOST, b""), ("Connection lost", LOST, Step.RESET),
          ("Connection lost", LOST, lambda wire: wire.send(reply()[:-5]) and Step.RESET(wire)),
          *[("not HTTP", LOST, content) for content in NOT_HTTP],
          *[("Broken answer", LOST, content) for content in CUT_OFF],
          *[("Malformed JSON", cs.CloudStackException, content) for content in NO_JSON],
          *[("max_response_size", cs.CloudStackException, content) for content in OVER_LIMIT],
          *[("HTTP 200 OK", cs.CloudStackException, content) for content in NO_BODY])
    def test_broken_answers(self, says, kind, content):
        """They leave a changing command unknown, and the client goes on over another connection."""
        server, client = self.pair([Step.READ, content], SERVE, max_response_size=100000)
        self.unknown(client, says, kind)
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual([["deployVirtualMachine"], ["listZones"]], server.asked)

    @each("content", reply()[:-5], reply(length=False)[:-5], chunked(last=b""), reply(TOO_MUCH))
    def test_an_answer_that_failed_is_closed(self, content):
        """Else Python 3.13 writes on standard error, when it disposes of one together with an exception."""
        answers = []
        _, client = self.pair([Step.READ, content, Step.HOLD], max_response_size=100000, timeout=0.1)

        def made(*args, **named):
            answers.append(http.client.HTTPResponse(*args, **named))
            return answers[-1]

        with mock.patch.object(http.client.HTTPConnection, "response_class", staticmethod(made)):
            error = self.raised(cs.CloudStackException, client.listZones)
        self.assertEqual([True], [answer.isclosed() for answer in answers], error)

    @each("head", b"", b"HTTP/1.1 200 OK\r\nX-A: ", chunked(last=b""), reply(b"", length=False),
          *[chunked(b"", last=size + b"\r\n") for size in
            (b"-1", b"-5", b"ffffffffffffffff", b"-ffffffffffffffff", b"1_0", b"+a", b"0x5")])
    def test_what_has_no_end_is_not_read_to_its_end(self, head):
        sent = []

        def pour(wire):
            while len(sent) < 200 and wire.send(b"0" * 65536):
                sent.append(1)

        server, client = self.pair([Step.READ, head, pour], max_response_size=1000)
        self.assertRaises(cs.CloudStackException, client.listZones)
        until(server.wires[0].ended.is_set, "giving up")
        self.assertLess(len(sent), 200)  # 13 MB; what the buffers of the system hold is sent in any case

    def test_a_bomb_is_not_unpacked_far_beyond_the_limit(self):
        tracemalloc = self.imported("tracemalloc")
        server, client = self.pair([Step.READ, reply()], [Step.READ, gzipped(self.BOMB)], max_response_size=100000)
        client.listZones()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertRaises(cs.CloudStackException, client.listZones)
        self.assertLess(tracemalloc.get_traced_memory()[1], 1500000)

    def test_an_answer_of_just_max_response_size_is_fine(self):
        body = ZONES + b" " * 1000
        for content in (reply(body), chunked(body), gzipped(gzip.compress(body)), reply(body, length=False)):
            server, client = self.pair([Step.READ, content], max_response_size=len(body))
            self.assertEqual(RESULT, client.listZones())

    @each("status", "204 No Content", "304 Not Modified")
    def test_statuses_without_a_body(self, status):
        content = f"HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\n".encode()
        server, client = self.pair([Step.READ, content] + SERVE, timeout=2)
        error = self.failure(client, "HTTP " + status, cs.CloudStackException)
        self.assertEqual((int(status[:3]), b""), (error.response.status_code, error.response.content))
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual([["listZones"] * 2], server.asked)

    def test_what_the_response_tells(self):
        page = "<h1>M\u00fcll</h1>"
        content = reply(gzip.compress(page.encode("utf-8")), "502 Bad Gateway", "X-Node: a7", GZIP)
        client = self.client(self.serve([Step.READ, content.replace(b"application/json", b"text/html")]))
        response = self.failure(client, "HTTP 502 Bad Gateway", cs.CloudStackException).response
        self.assertEqual((502, "Bad Gateway", page, page.encode("utf-8"), "a7", "a7"), (
            response.status_code, response.reason, response.text, response.content, response.headers["x-node"],
            response.headers.get("X-NODE")))
        self.assertRaises(ValueError, response.json)


class TimeoutTest(TransportCase):
    @each("content", b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nX-A: b\r\n", reply()[:-3], chunked()[:-20],
          chunked(last=b""), gzipped()[:-3], reply(length=False))
    def test_silence(self, content):
        server, client = self.pair([Step.READ, content, Step.HOLD], SERVE, timeout=0.03)
        error = self.unknown(client, "nothing for 0.03 s (timeout)", LATE)
        self.assertEqual([True] * 2, [isinstance(error, TimeoutError), isinstance(error.__cause__, OSError)])
        until(server.wires[0].ended.is_set, "hanging up")
        client.timeout = 5
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual([["deployVirtualMachine"], ["listZones"]], server.asked)

    @each("content, drops", (b"", dripping(b"HTTP/1.1 200 ", b"x")), (b"HTTP/1.1 200 OK\r\n", dripping(b"X-A: ", b"x")),
          (reply(b" " * 100000)[:-99999], dripping(b"")), (chunked(b" " * 100000, 100000)[:-99999], dripping(b"")),
          (chunked(last=b""), dripping(b"0", b"0")), (chunked(last=b"0\r\n"), dripping(b"X-A: b\r\n" * 500)),
          (gzipped(gzip.compress(bytes(range(256)) * 2000) * 20)[:300], dripping(b"")),
          (reply(length=False), dripping(b"")), (b"", dripping(b"HTTP/1.1 100 Continue\r\n\r\n" * 150)))
    def test_an_exchange_ends_after_ten_times_the_timeout_in_all(self, content, drops):
        """However steadily bytes come."""
        server, client = self.pair([Step.READ, content, drops], timeout=2)
        with mock.patch.object(cs, "_clock", Clock(step=0.5)):
            self.unknown(client, "not whole after 20 s", LATE)
        until(server.wires[0].ended.is_set, "hanging up")

    def test_what_is_left_of_that_bounds_a_silence_too(self):
        clock = Clock()

        def almost_over(wire):
            clock.now += 49.97  # of 50 s in all, while a silence might last 5

        server, client = self.pair([Step.READ, b"HTTP/1.1 2", almost_over, b"0", Step.HOLD])
        begun = time.monotonic()
        with mock.patch.object(cs, "_clock", clock):
            self.failure(client, "", LATE)
        self.assertLess(time.monotonic() - begun, 4)

    def test_a_steady_answer_within_ten_times_the_timeout_is_read(self):
        content = chunked(PACKED, 7, headers=[GZIP])
        parts = [content[start : start + 9] for start in range(0, len(content), 9)]
        steps = [step for part in parts for step in (part, lambda wire: time.sleep(0.001))]
        server, client = self.pair([Step.READ] + steps, timeout=2)
        with mock.patch.object(cs, "_clock", Clock(step=0.02)):
            self.assertEqual(RESULT, client.listZones())

    def test_a_connection_that_is_not_made_in_time(self):
        with mock.patch("socket.create_connection", side_effect=socket.timeout("timed out")) as connect:
            self.unsent(self.client(ENDPOINT, timeout=0.05), "Cannot connect to http://cloud.invalid/client/api: "
                        "nothing for 0.05 s (timeout)", LATE)
        self.assertEqual(0.05, connect.call_args[0][1])

    def test_a_server_that_does_not_read_a_large_body(self):
        narrow = lambda wire: wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # noqa: E731
        client = self.client(self.serve([narrow, threading.Event()]), timeout=0.1)
        self.unknown(client, "", LATE, userdata="x" * 6000000)

    def test_a_timeout_set_later_counts_for_kept_connections_too(self):
        server, client = self.pair([Step.READ, reply(), Step.READ, Step.HOLD])
        client.listZones()
        client.timeout = "0.03"
        self.failure(client, "nothing for 0.03 s", LATE)
        self.assertEqual([["listZones"] * 2], server.asked)


class ConnectTest(TransportCase):
    """Requests that surely were not sent, and answers that send somewhere else."""

    def test_a_refused_connection(self):
        url = f"http://{refusing_place(self)}/client/api"
        error = self.unsent(self.client(url))
        self.assertEqual(f"Cannot connect to {url}: Connection refused", str(error))
        self.assertIsInstance(error, ConnectionError)
        self.assertIsInstance(error.__cause__, ConnectionRefusedError)

    def test_a_name_that_is_not_found(self):
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch("socket.getaddrinfo", side_effect=unknown):
            error = self.unsent(self.client(ENDPOINT))
        self.assertEqual(f"Cannot find {ENDPOINT}: name look-up: Name or service not known", str(error))
        self.assertIs(unknown, error.__cause__)

    @each("host", "a" * 70 + ".invalid", "a..invalid")
    def test_a_name_that_cannot_be_one(self, host):
        self.unsent(self.client(f"http://{host}/client/api"))

    def test_the_scheme_of_an_endpoint_may_be_in_capitals(self):
        client = self.client("HTTP://" + self.serve(SERVE).place)
        self.assertEqual(RESULT, client.listZones())

    @each("says, content", ("https://cloud.invalid/client/api", lambda got: reply(
              b"", "302 Found", "Location: https://cloud.invalid" + got.target)),
          ("HTTP 400 GET /client/api?", lambda got: reply(b"", "400 GET " + got.target)),
          ("not HTTP", lambda got: got.line.encode() + b"\r\n\r\n"))
    def test_what_quotes_the_request_shows_nothing_of_it(self, says, content):
        """A redirect (whose answer the exception keeps), a reason phrase, and a line that http.client quotes."""
        server = self.serve([Step.READ, lambda wire: wire.send(content(wire.requests[-1])), Step.AGAIN])
        error = self.raised(cs.CloudStackException, self.client(server).listZones)
        self.assertIn(says, str(error))
        self.assert_tells_nothing(*all_texts(error))
        self.assertIn("GET " + server.url, self.traced(self.client(server, trace=True)))


def some_of_it(wire):
    """Read some of the client's first message. (Before 3.12, ssl leaks a socket that was reset before it.)"""
    wire.more(50)


def shake_hands_up_to(share):
    """A step that sends this share of the server's side of a handshake, which is computed apart from any socket."""

    def answer(wire):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = tls_context().wrap_bio(incoming, outgoing, server_side=True)
        wire.more()
        incoming.write(wire.raw)
        with contextlib.suppress(ssl.SSLError):
            tls.do_handshake()
        return wire.send(outgoing.read()[: int(share * 1000)]) and False

    return answer


@needs_openssl
class TlsTest(TransportCase):
    def secure(self, name="good", **settings):
        """A server with this certificate, and a client of it."""
        return self.pair(SERVE, tls=tls_context(name), **dict({"verify": pem()}, **settings))

    @each("certificate, verify, unverified", ("good", "ca.pem", None), ("good", "directory", None),
          ("good", None, None),
          *[] if sys.version_info >= (3, 13) else [("self_signed", "self_signed.pem", None)],  # strict: it names no key
          *[(name, None, "true") for name in ("good", "self_signed", "expired", "elsewhere")])
    def test_certificates_that_are_trusted(self, certificate, verify, unverified):
        """By a CA file, a CA directory, the system's CA certificates, or because verification is turned off."""
        os.environ["SSL_CERT_FILE"] = pem("" if verify else "ca.pem")
        server, client = self.secure(certificate, verify=verify and pem(verify), dangerous_no_tls_verify=unverified)
        self.assertEqual([RESULT] * 2, [client.listZones() for _ in range(2)])
        self.assertEqual([["listZones"] * 2], server.asked)

    @each("certificate, says, verify, unverified", ("good", "certificate", None, None),
          ("good", "certificate", "other_ca.pem", None), ("self_signed", "certificate", "ca.pem", None),
          ("expired", "expired", "ca.pem", None), ("elsewhere", "127.0.0.1", "ca.pem", None),
          ("good", "", "other_ca.pem", True), ("good", "", os.curdir, None),
          *[("good", "", value, None) for value in (False, "false", "0", "", True, "no")],
          *[("good", "", None, value) for value in ("false", "0")])
    def test_certificates_that_are_not_trusted(self, certificate, says, verify, unverified):
        """The last rows: nothing but dangerous_no_tls_verify, and no path with it, turns verification off."""
        if str(verify).endswith(".pem"):
            verify = pem(verify)
        server, client = self.secure(certificate, verify=verify, dangerous_no_tls_verify=unverified)
        error = self.unsent(client, "TLS failure with " + server.url)
        self.assertIsInstance(error.__cause__, (OSError, ssl.CertificateError))
        self.assertEqual([[]], server.asked)
        if sys.version_info >= (3, 7):  # noqa: UP036  (3.6 does not tell why)
            self.assertIn(says, str(error).lower())
        if certificate != "elsewhere":
            self.assertIn("`verify`", str(error))

    def test_settings_changed_later_count_for_the_next_call(self):
        """A connection made without verification is not used if verification is asked for."""
        server, client = self.secure(verify=None, dangerous_no_tls_verify=True)
        client.listZones()
        client.set_setting("dangerous_no_tls_verify", False)
        self.failure(client, "TLS failure")
        client.verify = pem()
        self.assertEqual(RESULT, client.listUsers())
        client.verify = pem("other_ca.pem")
        self.failure(client, "TLS failure")
        self.assertEqual([["listZones"], [], ["listUsers"], []], server.asked)

    def test_files_that_cannot_be_used(self):
        """CA certificates, client certificates and their keys. For an encrypted key OpenSSL would ask on the terminal;
        that what is said is ours shows that it was not left to."""
        good, missing, nonsense = pem("good.pem"), "/nonexistent/own.pem", self.write("nonsense.pem", "nonsense")
        broken = self.write("broken.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        locked = concatenate(os.path.join(self.home, "locked.pem"), good, pem("locked.key"))
        certs = [(missing, None), (good, None), (good, missing), (good, pem("ca.key")), (good, nonsense),
                 (self.home, None), (good, pem("locked.key")), (locked, None)]
        for setting, path, settings in itertools.chain(
                [("verify", path, {"verify": path}) for path in (missing, broken, self.write("empty.pem", ""))],
                [("cert", cert, {"cert": cert, "cert_key": key}) for cert, key in certs]):
            with self.subTest(settings):
                server, client = self.secure(**settings)
                error = self.refusal(client.listZones)
                self.assertRegex(str(error), rf"\A{setting}: .*{re.escape(path)}.*\Z")
                self.assertEqual("locked" in str(settings), "key is encrypted" in str(error))
                self.assertNotIn("Errno", str(error))
                self.assertEqual([], server.wires)

    @each("authority, cert, cert_key, served", ("ca.pem", ["both.pem"], None, True), ("ca.pem", [], None, False),
          ("ca.pem", ["good.pem"], "leaf.key", True), ("ca.pem", ["good.pem", "leaf.key"], None, True),
          ("other_ca.pem", ["good.pem", "leaf.key"], None, False))
    def test_a_server_that_demands_a_client_certificate(self, authority, cert, cert_key, served):
        cert = tuple(map(pem, cert))
        settings = {"cert": cert if len(cert) > 1 else "".join(cert) or None, "cert_key": cert_key and pem(cert_key)}
        server, client = self.pair(SERVE, tls=tls_context(client_ca=authority), verify=pem(), **settings)
        if served:
            self.assertEqual([RESULT] * 2, [client.listZones() for _ in range(2)])
        else:
            self.failure(client, command="deployVirtualMachine")
        until(lambda: served or server.wires[0].ended.is_set(), "refusing")
        self.assertEqual([["listZones"] * 2] if served else [[]], server.asked)

    @each("steps", [], [some_of_it], [some_of_it, Step.RESET],
          *[[shake_hands_up_to(share)] for share in (0.001, 0.1, 0.6)])
    def test_a_handshake_cut_in_the_middle(self, steps):
        server = self.serve(steps, steps, [tls_context(), Step.READ, reply(DEPLOYED)])
        client = self.client(server.url.replace("http:", "https:"), verify=pem(), retry_backoff=0)
        self.unsent(client)
        self.assertEqual([], server.requests)
        client.retry = 1
        self.assertEqual(JOB, client.deployVirtualMachine()["jobid"])
        self.assertEqual([[], [], ["deployVirtualMachine"]], server.asked)

    def test_a_handshake_that_hangs(self):
        url = self.serve([Step.HOLD]).url.replace("http:", "https:")
        self.unsent(self.client(url, timeout=0.05), "nothing for 0.05 s", LATE)

    def test_a_plain_http_server_behind_https_and_the_reverse(self):
        plain, secure = self.serve([lambda wire: wire.more(), reply()]), self.serve(SERVE, tls=tls_context())
        self.unsent(self.client(plain.url.replace("http:", "https:")), "TLS failure")
        self.failure(self.client(secure.url.replace("https:", "http:")))
        self.assertEqual([], plain.requests + secure.requests)

    @each("steps, says, kind", ([reply()[:-10]], "", LOST), ([chunked()[:-10]], "", LOST), ([], "", LOST),
          ([reply()[:-5], Step.HOLD], "nothing for 0.5 s", LATE))
    def test_an_answer_that_is_cut_off_or_late(self, steps, says, kind):
        server, client = self.pair([Step.READ] + steps, SERVE, tls=True, timeout=0.5)
        self.unknown(client, says, kind)
        self.assertEqual(RESULT, client.listZones())

    def test_no_version_of_tls_before_1_2_is_offered_and_one_context_serves_all_connections(self):
        made, really = [], ssl.create_default_context
        server, client = self.pair([Step.READ, reply()], tls=True)
        with mock.patch.object(ssl, "create_default_context", lambda **files: made.append(really(**files)) or made[-1]):
            for endpoint in (server.url, server.url, self.serve(SERVE, tls=tls_context()).url):
                client.endpoint = endpoint
                self.assertEqual(RESULT, client.listZones())
        (context,) = made
        if hasattr(context, "minimum_version"):  # 3.7
            self.assertGreaterEqual(context.minimum_version, ssl.TLSVersion.TLSv1_2)
        else:
            older = ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
            self.assertEqual(older, context.options & older)

    def test_plain_http_reads_no_certificates(self):
        client = self.client(self.serve(SERVE), verify="/nonexistent/ca.pem", cert="/nonexistent/own.pem")
        self.assertEqual(RESULT, client.listZones())

    @unittest.skipIf(sys.version_info < (3, 8), "ssl reads SSLKEYLOGFILE since 3.8")
    def test_a_file_of_openssl_s_own_is_not_blamed_on_verify(self):
        os.environ["SSLKEYLOGFILE"] = os.path.join(self.home, "no", "keys")
        error = self.refusal(self.client("https://cloud.invalid/").deployVirtualMachine)
        self.assertHolds(str(error), "TLS cannot be set up: ", os.environ["SSLKEYLOGFILE"])
        self.assertNotIn("verify", str(error))
        self.assertTrue(error.unsent)


class ProxyTest(TransportCase):
    """Proxies as the environment names them."""

    HTTP, HTTPS = ENDPOINT, "https://cloud.invalid/client/api"
    WAYS = [("http_proxy", HTTP), ("https_proxy", HTTPS)]
    LOGIN = f"me:{CANARY_PROXY}@"
    BASIC = "Basic " + base64.b64encode(f"me:{CANARY_PROXY}".encode()).decode()
    MADE = b"HTTP/1.1 200 Connection established\r\n\r\n"

    def proxy(self, *scripts, login="", name="http_proxy"):
        server = self.serve(*scripts)
        os.environ[name] = f"http://{login}{server.place}"
        return server

    @each("login, sent", ("", []), (LOGIN, [BASIC]), *[
        (login + "@", ["Basic " + base64.b64encode(decoded).decode()]) for login, decoded in (
            ("m%40e:p%3Aw%2F", b"m@e:p:w/"), ("me", b"me:"), ("me:p\udce4ss", b"me:p\xe4ss"))])
    @each("scheme", "http", "HTTP")
    def test_plain_http_goes_through_in_absolute_form(self, login, sent, scheme):
        proxy = self.proxy(SERVE, login=login)
        client = self.client(self.HTTP.replace("http", scheme))
        client.listZones()
        client.method = "post"
        client.listZones()
        get, post = proxy.requests
        self.assertRegex(get.line, rf"\AGET {re.escape(self.HTTP)}\?apiKey=.* HTTP/1.1\Z")
        self.assertEqual(f"POST {self.HTTP} HTTP/1.1", post.line)
        self.assertEqual([["cloud.invalid"], sent] * 2,
                         [one.all(name) for one in proxy.requests for name in ("Host", "Proxy-Authorization")])
        self.assertEqual([["listZones"] * 2], proxy.asked)

    @staticmethod
    def inside(wire):
        """What comes from now on came through the tunnel."""
        wire.raw, wire.taken = b"", 0

    @needs_openssl
    @each("login, sent", ("", []), (LOGIN, [BASIC]))
    def test_https_goes_through_a_tunnel(self, login, sent):
        proxy = self.proxy([Step.READ, self.MADE, tls_context(), self.inside, Step.READ, reply(), Step.READ, reply(),
                            Step.HOLD], login=login, name="https_proxy")
        client = self.client(self.HTTPS, verify=pem())
        self.assertEqual([RESULT] * 2, [client.listZones() for _ in range(2)])
        self.assertEqual([["CONNECT", "listZones", "listZones"]], proxy.asked)
        connect, *requests = proxy.requests
        self.assertRegex(connect.line, r"\ACONNECT cloud\.invalid:443 HTTP/1\.[01]\Z")
        self.assertEqual(sent, connect.all("Proxy-Authorization"))
        for request in requests:
            self.assertTrue(request.target.startswith("/client/api?apiKey="), request.line)
            self.assertEqual((["cloud.invalid"], []), (request.all("Host"), request.all("Proxy-Authorization")))

    @needs_openssl
    def test_the_certificate_in_the_tunnel_is_that_of_the_origin(self):
        script = [Step.READ, self.MADE, tls_context("elsewhere"), Step.READ, reply()]
        proxy = self.proxy(script, name="https_proxy")
        self.unsent(self.client(self.HTTPS, verify=pem()), "TLS failure")
        self.assertEqual([["CONNECT"]], proxy.asked)

    @each("content, says", (b"HTTP/1.1 403 Forbidden\r\n\r\nno", "403 Forbidden"),
          (reply(b"", "407 Proxy Authentication Required"), "407 Proxy Authentication"),
          (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", "502 Bad Gateway"),
          (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "302 Found"), (b"", ""),
          (b"no such thing\r\n\r\n", ""), (b"HTTP/1.1 2", ""), (b"HTTP/1.1 200 " + b"x" * 70000, ""),
          (lambda wire: wire.send(f"HTTP/1.1 407 {wire.requests[-1].headers}\r\n\r\n".encode()), "407"))
    def test_a_tunnel_that_is_not_made(self, content, says):
        """Its words are shown, but not the password that they may repeat."""
        proxy = self.proxy([Step.READ, content], login=self.LOGIN, name="https_proxy")
        error = self.unsent(self.client(self.HTTPS), "Cannot connect to " + self.HTTPS)
        self.assertHolds(str(error), says, f"(proxy {proxy.place})")
        self.assertEqual([["CONNECT"]], proxy.asked)
        until(proxy.wires[0].ended.is_set, "hanging up")

    @each("steps, step", ([Step.HOLD], 0.0), ([dripping(b"HTTP/1.1 200 ok\r\nX-A: b\r\nX-B", b"x")], 0.5),
          ([b"HTTP/1.1 200 ok\r\n", dripping(b"X-A: b\r\n" * 500)], 0.5))
    def test_a_tunnel_that_hangs_or_drips(self, steps, step):
        self.proxy([Step.READ] + steps, name="https_proxy")
        with mock.patch.object(cs, "_clock", Clock(step) if step else cs._clock):
            client, why = self.client(self.HTTPS, timeout=2 if step else 0.05), "nothing for 0.05 s (timeout)"
            self.unsent(client, "it was not whole after 20 s" if step else why, LATE)

    BY_IP, BY_V6, BY_NAME = "http://10.1.2.3:80/x", "http://[fd00::5]:8080/", "http://api.cloud.invalid:81/"

    @each("endpoint, no_proxy, direct", *[(endpoint, entry, direct) for endpoint, direct, entries in (
        (BY_IP, True, ["10.1.2.3", "*", "x.invalid, 10.1.2.3", "10.0.0.0/8", "172.16.0.0/12, 10.1.2.3/32",
                       "10.1.2.3/255.0.0.0", "10.5.5.5/8", "localhost,10.0.0.0/8,x", "a.invalid,*", "10.1.2.3:80"]),
        (BY_IP, False, ["172.16.0.0/12", "::1,fd00::/8", "10.1.2.3:1", "nonsense/8,/,300.1.1.1", "", " , "]),
        (BY_V6, True, ["fd00::5", "[fd00::5]", "fd00::/8", "[fd00::]/8", "FD00:0::5", "[fd00::5]:8080"]),
        (BY_V6, False, ["::1", "fd01::/16", "10.0.0.0/8", "0/0", "fd00::5:8080"]),
        (BY_NAME, True, ["api.cloud.invalid", "cloud.invalid", ".cloud.invalid", "Invalid", "api.cloud.invalid:81"]),
        (BY_NAME, False, ["pi.cloud.invalid", "cloud.invalid:82", "0/0", "10.0.0.0/8"])) for entry in entries])
    def test_what_no_proxy_excludes(self, endpoint, no_proxy, direct):
        """Addresses, ranges, names with their subdomains, each also with a port, and IPv6 with or without brackets."""
        os.environ.update(http_proxy="http://proxy.invalid:1", no_proxy=no_proxy)
        host = re.match(r"http://\[?(.*?)\]?:\d+/", endpoint).group(1)
        self.assertEqual(host if direct else "proxy.invalid", self.host_asked_for(endpoint))

    def host_asked_for(self, endpoint):
        """The host that a client connects to, where no host is found."""
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(socket.EAI_NONAME, "unknown")) as find:
            self.unsent(self.client(endpoint), "Cannot find")
        host = find.call_args[0][0]
        return host.decode() if isinstance(host, bytes) else host

    @each("scheme, variables, proxied", *[
        (scheme, {f"{scheme}_proxy": prefix + "proxy.invalid:1"}, True)
        for scheme in ("http", "https") for prefix in ("http://", "", "HTTP://")],
        ("http", {"HTTP_PROXY": "proxy.invalid"}, True), ("https", {"HTTPS_PROXY": "proxy.invalid"}, True),
        ("http", {"https_proxy": "proxy.invalid"}, False), ("https", {"http_proxy": "proxy.invalid"}, False),
        ("http", {"all_proxy": "proxy.invalid"}, True), ("https", {"ALL_PROXY": "proxy.invalid"}, True),
        ("http", {"all_proxy": "other.invalid", "http_proxy": "proxy.invalid"}, True), ("http", {}, False))
    def test_which_variable_counts(self, scheme, variables, proxied):
        with mock.patch.dict(os.environ, variables):
            asked_for = self.host_asked_for(scheme + "://cloud.invalid/")
        self.assertEqual("proxy.invalid" if proxied else "cloud.invalid", asked_for)

    @each("value, says", *[(scheme + "://{login}{place}", scheme.lower()) for scheme in (
              "https", "HTTPS", "socks5", "socks5h", "socks4", "socks", "ftp")],
          ("{login}://", "proxies cannot be used"), *[(wrong, "the address of the proxy") for wrong in (
              "http://{login}://x@h:1", "http:/{login}h:1", "http://{login}h:1x", "http://me:1/{login}h:1", "http://{login}[::1")],
          ("http://{login}{refusing}", "Connection refused (proxy {refusing})"))
    @each("name, endpoint", *WAYS + [("ALL_PROXY", HTTPS)])
    def test_proxies_that_cannot_be_used(self, value, says, name, endpoint):
        """Of another scheme (TLS to a proxy among them), written wrongly, or not there: nothing is sent, and the
        password is not shown."""
        server, place = self.serve([Step.HOLD]), refusing_place(self)
        value = value.format(login=self.LOGIN, place=server.place, refusing=place)
        with mock.patch.dict(os.environ, {name: value}):
            self.unsent(self.client(endpoint, timeout=0.5), says.format(refusing=place))
        self.assertEqual([], server.wires)


class HeaderTest(TransportCase):
    @both
    def test_what_every_request_carries(self, kind):
        """On loopback the answer is not packed: that would cost more than it saves."""
        server, client = self.pair(SERVE, kind=kind)
        self.call(client)
        client.method = "post"
        self.call(client)
        get, post = server.requests
        expected = [("Accept-Encoding", "identity"), ("Host", server.place), ("User-Agent", "cs/" + cs.__version__)]
        self.assertEqual(("GET", b"", expected), (get.method, get.body, sorted(get.headers)))
        expected += [("Content-Type", "application/x-www-form-urlencoded"), ("Content-Length", str(len(post.body)))]
        self.assertEqual([["listZones"] * 2], server.asked)  # over one connection
        self.assertEqual("POST /client/api HTTP/1.1", post.line)
        self.assertEqual(sorted(expected), sorted(post.headers))

    def test_headers_of_the_client_and_of_the_call(self):
        """A name keeps the spelling it was given last, and stands once; values are text, bytes in latin-1, numbers."""
        server = self.serve(SERVE)
        client = self.client(server, headers={"X-One": "client", "x-two": "client", "user-AGENT": "mine", "hOST": "h"})
        client.listZones(headers={"X-TWO": "call", "X-One": None, "A": b"b\xe4", "B": 5, "C": 1.5, "D": "\xe4\tb"})
        self.assertEqual([("A", "b\xe4"), ("Accept-Encoding", "identity"), ("B", "5"), ("C", "1.5"), ("D", "\xe4\tb"),
                          ("X-TWO", "call"), ("hOST", "h"), ("user-AGENT", "mine")], sorted(server.requests[0].headers))


class SessionAnswer:
    def __init__(self, status_code=200, reason="OK", text=json.dumps({"r": RESULT}), headers=None):  # noqa: B008
        self.status_code, self.reason, self.text = status_code, reason, text
        self.content = text.encode("utf-8")
        self.headers = headers or {"Content-Type": "application/json"}


def fake_session(*outcomes):
    """What `session=` asks for, and no more: answers and exceptions, of which the last comes again."""
    outcomes = outcomes or [SessionAnswer()]
    request = mock.Mock(side_effect=itertools.chain(outcomes, itertools.repeat(outcomes[-1])))
    return mock.Mock(spec=["request"], request=request)


class SessionTest(TransportCase):
    """A program's own session. (That an aiohttp session is refused is a matter of settings.)"""

    def through(self, *outcomes, kind=None, **settings):
        return self.client(ENDPOINT, kind, session=fake_session(*outcomes), **settings)

    @both
    def test_it_is_called_as_the_contract_says(self, kind):
        client = self.through(kind=kind)
        self.assertEqual(RESULT, self.call(client))
        self.assertEqual(RESULT, self.call(client, password="x", headers={"X-A": "b"}))
        ((get_args, get), (post_args, post)) = client.session.request.call_args_list
        self.assertEqual(("GET", ENDPOINT), (get_args[0], get_args[1].partition("?apiKey=")[0]))
        self.assertEqual(("POST", ENDPOINT), post_args)
        agent = {"User-Agent": "cs/" + cs.__version__, "Accept-Encoding": "gzip"}
        self.assertEqual({"data": None, "headers": agent, "timeout": 5, "allow_redirects": False}, get)
        self.assertIn(b"signature=", post.pop("data"))
        headers = dict(agent, **{"Content-Type": "application/x-www-form-urlencoded", "X-A": "b"})
        self.assertEqual({"headers": headers, "timeout": 5, "allow_redirects": False}, post)

    @each("settings, sent", ({}, {}), ({"verify": "/ca.pem"}, {"verify": "/ca.pem"}),
          ({"dangerous_no_tls_verify": True}, {"verify": False}), ({"cert": "/own.pem"}, {"cert": "/own.pem"}),
          ({"cert": "/own.pem", "cert_key": "/own.key"}, {"cert": ("/own.pem", "/own.key")}))
    def test_verify_and_cert_only_where_set(self, settings, sent):
        client = self.through(**settings)
        client.listZones()
        options = client.session.request.call_args[1]
        self.assertEqual(sent, {name: options[name] for name in ("verify", "cert") if name in options})

    @each("says, given",
          ("HTTP 504 Gateway Time-out", (504, "Gateway Time-out", "<html>", {"Content-Type": "text/html"})),
          ("http://other.invalid/", (302, "Found", "", {"Location": "http://other.invalid/?signature=x"})),
          ("not so", (431, "431", json.dumps(refusal(431, "not so")))),
          ("HTTP 404 it was ***", (404, "it was " + CANARY_PASSWORD, "no")))
    def test_its_answers_are_read_as_any(self, says, given):
        client, api_error = self.through(SessionAnswer(*given)), cs.CloudStackApiException
        kind = api_error if given[0] == 431 else cs.CloudStackException
        error = self.failure(client, says, kind, command="getUser", password=CANARY_PASSWORD)
        self.assertEqual((given[0], given[1].replace(CANARY_PASSWORD, "***")),
                         (error.response.status_code, error.response.reason))

    class ReadTimeout(OSError):
        """As requests has it."""

    @both
    @each("error, kind_of_ours", (ConnectionError, LOST), (OSError, LOST), (TimeoutError, LATE), (ReadTimeout, LATE))
    def test_its_exceptions_are_wrapped_and_not_quoted(self, kind, error, kind_of_ours):
        raised = error(f"refused: http://cloud.invalid/?apiKey={CANARY_KEY}&signature=abc")
        ours = self.unknown(self.through(raised, kind=kind), error.__name__, kind_of_ours)
        self.assertNotIn("signature=", "".join(all_texts(ours)))

    @each("kind, raised, seen", (cs.CloudStack, KeyboardInterrupt, KeyboardInterrupt),
          *[(kind, StopIteration, RuntimeError) for kind in KINDS],
          *[(kind, error, error) for error in (AssertionError, ValueError, RuntimeError) for kind in KINDS])
    def test_what_it_raises_of_its_own_is_passed_on_as_it_is(self, kind, raised, seen):
        """A mock's AssertionError, and what may be a mistake in the session. (A mock's end is a StopIteration, which no
        coroutine lets through: a RuntimeError says so.)"""
        client = self.through(raised("its own"), kind=kind, retry=2, retry_backoff=0)
        error = self.raised(seen, self.call, client, "deployVirtualMachine")
        self.assertEqual(seen is raised, str(error) == "its own")
        self.assertEqual(1, client.session.request.call_count)

    def test_the_real_requests(self):
        requests = self.imported("requests")
        moved = reply(b"", "302 Found", "Location: /x")
        server = self.serve([Step.READ, reply(), Step.READ, chunked(), Step.READ, moved, Step.READ, Step.HOLD])
        with requests.Session() as session:
            client = self.client(server, session=session)
            for client.method in ("get", "post"):
                self.assertEqual(RESULT, client.listZones(name="a b~*\u00fc"))
            self.assertEqual(["a b~*\u00fc"] * 2, [request.params["name"] for request in server.requests])
            self.failure(client, "HTTP 302", cs.CloudStackException)
            client.timeout = 0.05
            self.failure(client, "", LATE)
            self.assertEqual([["cs/" + cs.__version__]] * 4, [one.all("User-Agent") for one in server.requests])
            server.close()
            self.failure(client)


def own_threads(before=()):
    """The threads of cs.py that run, but for those given."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("cs")} - set(before)


class AsyncTransportTest(TransportCase):
    """What is AIOCloudStack's own: event loops, threads, cancelling. And each kind of failure once, which is all that
    the transport, being the same, has to be asked again."""

    KIND = cs.AIOCloudStack

    @each("says, kind, steps", ("Remote end closed", LOST, []), ("cut off", LOST, [reply()[:-5]]),
          ("not HTTP", LOST, [b"x\r\n"]), ("nothing for 0.3 s", LATE, [Step.HOLD]),
          ("max_response_size", cs.CloudStackException, [reply(b"x" * 5000)]))
    def test_each_kind_of_failure(self, says, kind, steps):
        server, client = self.pair(SERVE[:2] + [Step.READ] + steps, SERVE, timeout=0.3, retry=3, max_response_size=4000)
        self.assertEqual(RESULT, self.call(client))
        self.unknown(client, says, kind)
        self.assertEqual(RESULT, self.call(client))
        self.assertEqual([["listZones", "deployVirtualMachine"], ["listZones"]], server.asked)
        self.unsent(self.client("http://" + refusing_place(self)), "Connection refused")

    async def cancel(self, call, condition=lambda: True):
        """Make a call, and cancel it soon after this has come about."""
        task = asyncio.ensure_future(call)
        await until_async(condition)
        await asyncio.sleep(0.01)
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task

    def test_concurrency_bounds_its_threads_and_that_many_run_at_once(self):
        together = threading.Barrier(3)  # so that none is answered before three have asked
        before = own_threads()
        steps = [Step.READ, lambda wire: together.wait(PATIENCE_OF_TESTS), reply(), Step.AGAIN]
        server, client = self.pair(steps, concurrency=3)
        self.assertEqual([RESULT] * 21, run(gathered(client.listZones() for _ in range(21))))
        self.assertEqual((3, 3), (len(own_threads(before)), len(server.wires)))

    def test_a_call_that_got_no_thread_never_runs_afterwards(self):
        """The caller was told that nothing was sent, and may have done something else meanwhile."""
        server, client = self.pair(SERVE)
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            self.unsent(client, "thread")
        self.assertEqual(RESULT, self.call(client))
        self.assertEqual(["listZones"], [request.command for request in server.requests])

    def test_an_event_loop_that_was_closed_meanwhile_is_no_harm(self):
        go_on = threading.Event()
        server, client = self.pair([Step.READ, go_on] + [reply()] + SERVE, concurrency=1)
        loop = asyncio.new_event_loop()
        task = loop.create_task(client.listZones())
        loop.run_until_complete(until_async(lambda: server.requests, "asking"))
        task._log_destroy_pending = False
        loop.close()
        go_on.set()
        self.assertEqual(RESULT, run(client.listZones()))  # in the one thread, which is still there

    def test_a_client_that_is_dropped_leaves_no_threads(self):
        server, before = self.serve(SERVE), own_threads()
        run(cs.AIOCloudStack(server.url, "k", "s").listZones())

        def ended():
            gc.collect()  # PyPy takes more than one to get there
            return not own_threads(before)

        until(ended, "ending the threads")
        until(server.wires[0].ended.is_set, "closing the connection")

    @with_and_without_tls
    @each("content", b"", reply()[:-5])
    def test_cancelling_wakes_the_reading_thread(self, tls, content):
        """In an answer, over plain HTTP and TLS; long before the time-out of 1000 s."""
        server, client = self.pair([Step.READ, content, Step.HOLD], SERVE, tls=tls, timeout=1000)
        run(self.cancel(client.deployVirtualMachine(), lambda: server.requests))
        until(server.wires[0].ended.is_set, "hanging up")
        self.assertEqual(RESULT, self.call(client))
        self.assertEqual([["deployVirtualMachine"], ["listZones"]], server.asked)

    def test_a_process_ends_at_once_after_a_cancel(self):
        """In a handshake that hangs, with a time-out far beyond the test's."""
        code = (
            "import asyncio, cs, sys\n"
            "async def main():\n"
            "    task = asyncio.ensure_future(cs.AIOCloudStack(sys.argv[1], 'k', 's', timeout=1000).listZones())\n"
            "    await asyncio.wait([task], timeout=0.2)\n"
            "    task.cancel()\n"
            "    await asyncio.wait([task])\n"
            "    print(task.cancelled())\n"
            + RUN_MAIN
        )
        server, begun = self.serve([Step.HOLD]), time.monotonic()
        self.assertEqual("True\n", self.assert_child(code, f"https://{server.place}/"))
        self.assertLess(time.monotonic() - begun, 10)

    @needs_openssl
    def test_cancelling_before_the_connection_is_made_or_a_thread_is_free_sends_nothing(self):
        go_on = threading.Event()
        steps = [tls_context(), Step.READ, reply(), Step.READ, reply(), Step.HOLD]
        server = self.serve([go_on] + steps, steps)
        client = self.client(server.url.replace("http:", "https:"), verify=pem(), concurrency=1)

        async def work():
            shaking_hands = asyncio.ensure_future(client.deployVirtualMachine())
            await until_async(lambda: server.wires)
            await self.cancel(client.updateZone())
            await self.cancel(shaking_hands)
            go_on.set()
            return await client.listZones()  # in the one thread, so the others are done with by then

        self.assertEqual(RESULT, run(work()))
        self.assertEqual(["listZones"], [request.command for request in server.requests])

    @unittest.skipIf(sys.version_info < (3, 7), "there are no context variables before 3.7")
    def test_context_variables_are_carried_over(self):
        import contextvars

        variable = contextvars.ContextVar("variable", default="none")
        seen = []

        def request(*args, **options):
            seen.append((variable.get(), threading.current_thread() is threading.main_thread()))
            return SessionAnswer()

        async def work(value):
            variable.set(value)
            await self.client(ENDPOINT, session=mock.Mock(request=request)).listZones()

        run(gathered(map(work, "ab")))
        self.assertEqual([("a", False), ("b", False)], sorted(seen))


RUN_MAIN = "loop = asyncio.new_event_loop()\nloop.run_until_complete(main())\nloop.close()\n"  # what a child ends with


class ProcessTest(TransportCase):
    """What shows only in a process of its own: imports, forks, warnings, other places and names."""

    def test_a_plain_call_imports_nothing_slow_that_it_does_not_need(self):
        """(ImportCostTest: what importing it does.)"""
        slow = "asyncio argparse configparser dataclasses concurrent.futures pygments requests aiohttp urllib.request"
        code = ("import cs, sys\ncs.CloudStack(sys.argv[1], 'k', 's').listZones()\n"
                "print(*set(sys.argv[2].split()) & set(sys.modules))\n")
        env = {"NO_PROXY": "10.0.0.0/8"}
        self.assertEqual("\n", self.assert_child(code, self.serve(SERVE).url, slow, flags=("-S",), env=env))

    def test_where_poll_fork_and_the_unix_modules_are_missing(self):
        code = (
            "import os, select, sys\n"
            "for module, name in ((select, 'poll'), (select, 'epoll'), (os, 'fork'), (os, 'getuid')):\n"
            "    if hasattr(module, name): delattr(module, name)\n"
            "for name in 'termios fcntl pwd grp resource readline curses pty tty'.split(): sys.modules[name] = None\n"
            "import cs\n"
            "client = cs.CloudStack(sys.argv[1], 'k', 's')\n"
            "for name in 'abc': print(client.listZones(name=name)['zone'][0]['id'])\n"
        )
        server = self.serve([Step.READ, echo] * 2, [Step.READ, echo])
        self.assertEqual("a\nb\nc\n", self.assert_child(code, server.url))
        self.assertEqual([["listZones"] * 2, ["listZones"]], server.asked)

    @with_and_without_tls
    def test_dropping_a_client_gives_no_warning(self, tls):
        """Sync and async, at once, with a list under way, after errors, and at the end of the interpreter."""
        code = (
            "import asyncio, cs, sys\n"
            "url, broken, hanging, ca = sys.argv[1:]\n"
            "make = lambda kind, url=url: kind(url, 'k', 's', verify=ca or None, timeout=20)\n"
            "make(cs.CloudStack).listZones()\n"
            "kept = make(cs.CloudStack)\n"
            "kept.listZones()\n"
            "rows = kept.iter_list('listZones')\n"
            "next(rows)\n"
            "try: make(cs.CloudStack, broken).listZones()\n"
            "except cs.CloudStackException: pass\n"
            "async def main():\n"
            "    one = make(cs.AIOCloudStack)\n"
            "    await asyncio.gather(*[one.listZones() for _ in range(4)])\n"
            "    async for row in make(cs.AIOCloudStack).iter_list('listZones'): pass\n"
            "    task = asyncio.ensure_future(make(cs.AIOCloudStack, hanging).listZones())\n"
            "    await asyncio.sleep(0.1)\n"
            "    task.cancel()\n"
            "    global left\n"
            "    left = make(cs.AIOCloudStack)\n"
            "    await left.listZones()\n"
            + RUN_MAIN + "print('done')\n"
        )

        scripts = SERVE, [Step.READ, reply()[:-5]], [Step.READ, Step.HOLD]
        urls = [self.pair(script, tls=tls)[0].url for script in scripts]
        flags = ("-X", "dev", "-W", "error", "-bb")
        self.assertEqual("done\n", self.assert_child(code, *urls, pem() if tls else "", flags=flags))

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    @each("kind, tls", (cs.CloudStack, False), (cs.AIOCloudStack, False), (cs.CloudStack, bool(OPENSSL)))
    def test_a_fork_starts_with_connections_of_its_own(self, kind, tls):
        code = (
            "import asyncio, cs, os, sys, warnings\n"
            "warnings.simplefilter('ignore')  # a fork beside threads is what is tried here\n"
            "client = getattr(cs, sys.argv[1])(sys.argv[2], 'k', 's', verify=sys.argv[3] or None)\n"
            "def call(name):\n"
            "    got = client.listZones(name=name)\n"
            "    if asyncio.iscoroutine(got): got = asyncio.new_event_loop().run_until_complete(got)\n"
            "    assert got['zone'][0]['id'] == name, got\n"
            "call('parent')\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    try: call('child'), call('child'), os._exit(0)\n"
            "    finally: os._exit(1)\n"
            "call('parent')\n"
            "assert os.waitpid(child, 0)[1] == 0\n"
            "call('parent')\n"
        )
        server, _ = self.pair([Step.READ, echo, Step.AGAIN], tls=tls)
        self.assert_child(code, kind.__name__, server.url, pem() if tls else "")
        names = sorted([request.params["name"] for request in wire.requests] for wire in server.wires)
        self.assertEqual([["child"] * 2, ["parent"] * 3], names)


@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc here")
class LeakTest(TransportCase):
    """Hundreds of broken exchanges leave no socket, no thread and no file descriptor behind."""

    BREAKS = [[], [Step.RESET], [Step.HOLD]] + [[Step.READ] + steps for steps in (
        [], [Step.RESET], [Step.HOLD], [b"garbage\r\n\r\n"], [b"HTTP/1.1 2"], [reply()[:-5]], [chunked()[:-5]],
        [reply(b"xx", "200 OK", GZIP)], [reply(b"", "302 Found", "Location: /")], [reply(b"x" * 5000)],
        [reply(b"<html>", "503 x")], [b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"], [reply() + b"surplus"],
        [reply(b"", "204 No Content")], [reply(length=False)], [b"x" * 70000])]

    def assert_no_leak(self, work, rounds, server):
        """Run the work, once to warm up and then many times, without the garbage collector."""
        def settled():
            until(lambda: not server.open_wires, "closing")
            until(lambda: sum(thread.is_alive() for thread in server.threads) == 1, "ending")
            return len(os.listdir("/proc/self/fd")), threading.active_count()

        work()
        settled()
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        before = settled()
        for _ in range(rounds):
            work()
        self.assertEqual(before, settled())

    @both
    def test_every_way_to_break(self, kind):
        server = self.serve(*self.BREAKS * ATTACK_RUNS)
        client = self.client(server, kind, max_response_size=4000, concurrency=1, timeout=0.1)

        def work():
            for _ in self.BREAKS:
                with contextlib.suppress(cs.CloudStackException):
                    self.call(client)

        self.assert_no_leak(work, max(8, ATTACK_RUNS // 20), server)

    @needs_openssl
    def test_tls_and_tunnels_that_fail(self):
        ways = [[tls_context("elsewhere"), Step.READ], [Step.READ, b"HTTP/1.1 407 no\r\n\r\n"],
                [some_of_it, Step.RESET], [Step.READ, Step.RESET]]
        server = self.serve(*ways * 50)
        direct = self.client(server.url.replace("http:", "https:"), verify=pem())
        os.environ.update(https_proxy=server.url, no_proxy="127.0.0.1")
        tunnelled = self.client("https://cloud.invalid/", verify=pem())

        def work():
            for client in (direct, tunnelled, direct, tunnelled):
                with contextlib.suppress(cs.CloudStackException):
                    client.listZones()

        self.assert_no_leak(work, 20, server)


class AtMostOnceTest(TransportCase):
    """A deployment whose connection breaks, at any byte of the request and of the answer: the server never accepts more
    than were called for, and who gets an exception is told whether it may have happened."""

    FRAMINGS = {"length": reply, "chunked": chunked, "until the end": functools.partial(reply, length=False)}

    def setUp(self):
        super().setUp()
        self.plan, self.accepted = None, 0  # (side, position, framing, reset) for the request that comes next
        self.jobs = set()  # the ids that the accepted deployments chose
        self.server = self.serve([self.play])

    def play(self, wire):
        while wire.sock.recv(1, socket.MSG_PEEK):
            plan, self.plan = self.plan, None
            if not self.answer(wire, *(plan or (None, None, "length", False))):
                break

    def answer(self, wire, side, position, framing, reset):
        """Read and answer one request, or break off; False if the connection is over."""
        request = wire.read_request(position) if side == "request" else wire.read_request()
        content = self.accept(request, framing) if request is not None else b""
        if side == "answer":
            wire.send(content[:position])
        if side is not None or request is None:
            return reset and Step.RESET(wire)
        return wire.send(content) and framing != "until the end"

    def accept(self, request, framing):
        """The answer to a request, which is carried out."""
        if request.command == "deployVirtualMachine":
            self.accepted += 1
            jobid = request.params.get("customjobid", JOB)
            self.jobs.add(jobid)
            return self.FRAMINGS[framing](deployment(jobid))
        if request.command != "queryAsyncJobResult":
            return reply()
        if request.params["jobid"] in self.jobs:
            job = {"jobid": request.params["jobid"], "jobstatus": 0, "jobinstanceid": "vm-1"}
            return reply({"queryasyncjobresultresponse": job})
        return reply(refusal(431, "entity does not exist", "queryasyncjobresultresponse"), "431 431")

    def break_one(self, kind, method, kept, plan, retry=2, **settings):
        """The exception of a deployment, or None, once what is said of it and its results have been checked."""
        client = self.client(self.server, kind, method=method, retry=retry, retry_backoff=0, **settings)
        try:
            if kept:
                self.assertEqual(RESULT, self.call(client))
            self.plan, self.accepted = plan, 0
            value = error = None
            try:
                value = self.call(client, "deployVirtualMachine", name="x")
            except cs.CloudStackException as raised:
                error = raised
            self.plan = None
            accepted = self.last_accepted = self.accepted
            self.assertLessEqual(accepted, 1, self.server.asked)
            if error is None:
                self.assertEqual((1, [{"jobid": job, "id": "vm-1"} for job in self.jobs]), (accepted, [value]))
            else:
                if plan[1] % 4 == 0:  # as in every other attack; it takes longer than the attack
                    self.assert_tells_nothing(error)
                self.assertFalse(accepted and (error.unsent or not error.outcome_unknown), repr(error))
                self.assertFalse(error.unsent and error.outcome_unknown)
                self.assertEqual(RESULT, self.call(client))  # over another connection
            return error
        finally:
            self._close(client)
            until(lambda: not self.server.open_wires, "closing")
            self.jobs.clear()
            del self.server.wires[:]
            del self.server.threads[1:]

    def attacks(self, seed):
        """A sample of every kind of client, method, new or kept connection, and plan: side and position, framing, and
        whether it ends with a reset."""
        plans = [("request", position, "length") for position in range(480)]
        for name, framed in self.FRAMINGS.items():
            plans += [("answer", position, name) for position in range(len(framed(DEPLOYED)) + 1)]
        resets = [plan + (reset,) for plan in plans for reset in (False, True)]
        runs = list(itertools.product(KINDS, ("get", "post"), (False, True), resets))
        return random.Random(seed).sample(runs, min(ATTACK_RUNS, len(runs)))

    @each("recover", False, True)
    def test_wherever_the_connection_breaks(self, recover):
        """With recover, and while the server is up, no accepted deployment ends in an unknown outcome."""
        chosen, clock, told = self.attacks(ATTACK_SEED + recover), Clock(), 0
        for attack in chosen:
            with self.subTest(attack), mock.patch.multiple(cs, _clock=clock, _sleep=clock.sleep), \
                    mock.patch("asyncio.sleep", clock.sleep_async):
                error = self.break_one(*attack, recover=recover)
                told += error is None if recover else error is not None and error.outcome_unknown
                if recover:
                    self.assertEqual((error is None, self.last_accepted), (bool(self.last_accepted), error is None))
        self.assertGreater(told, len(chosen) // (4 if recover else 2))

    def test_at_the_first_and_last_bytes(self):
        """Those that a sample may miss: nothing read, all but one byte, all of it; no answer, all but one byte, all."""
        ends = [("request", 0), ("request", 1), ("request", 100000), ("answer", 0), ("answer", 1)]
        for framing, framed in self.FRAMINGS.items():
            end = 4 if framing == "chunked" else 0  # what follows the last chunk's 0 says nothing
            whole = len(framed(DEPLOYED)) - end
            plans = ends + [("answer", whole - 1), ("answer", whole)]
            for (side, position), kind in itertools.product(plans, KINDS):
                with self.subTest(side=side, position=position, framing=framing, kind=kind.__name__):
                    error = self.break_one(kind, "get", False, (side, position, framing, False))
                    self.assertEqual((side, position) == ("answer", whole), error is None)

    def test_many_at_once(self):
        """Threads and loops share clients whose server breaks every third connection; each gets its own answer."""
        counter = itertools.count()
        accepted, outcomes = [], {}

        def moody(wire):
            while next(counter) % 3:
                request = wire.read_request()
                if request is None:
                    return
                accepted.append(request.params["name"])
                if next(counter) % 5 == 0:
                    return
                wire.send(reply(deployment(accepted[-1])))
            wire.read_request(50)

        server = self.serve([moody])
        clients = [self.client(server, kind, retry=2, retry_backoff=0) for kind in KINDS]

        def work(number):
            for name in [f"{number}-{turn}" for turn in range(10)]:
                try:
                    outcomes[name] = self.call(clients[number % 2], "deployVirtualMachine", name=name)["jobid"]
                except cs.CloudStackException as error:
                    outcomes[name] = error

        in_threads(10, work)
        self.assertEqual((100, len(set(accepted))), (len(outcomes), len(accepted)))
        for name, outcome in outcomes.items():
            if isinstance(outcome, cs.CloudStackException):
                self.assertTrue(outcome.outcome_unknown or name not in accepted, name)
            else:
                self.assertEqual((name, True), (outcome, name in accepted))


class SecretsTest(TransportCase):
    """Keys, passwords, session keys and tokens are seen on the wire, and nowhere else."""

    SECRET_ANSWER = {"user": [{"apikey": CANARY_KEY, "secretkey": CANARY_SECRET, "username": "me"}],
                     "password": CANARY_PASSWORD, "sessionkey": CANARY_SESSION,
                     "virtualmachine": {"userdata": CANARY_TOKEN, "details": {"vnc.password": CANARY_PASSWORD}}}
    SESSION = {"username": "me", "password": CANARY_PASSWORD, "trace": True}

    @staticmethod
    def with_session(document):
        """A step that logs in, and answers everything else with this document."""
        cookies = f"JSESSIONID={CANARY_TOKEN}; Path=/client; HttpOnly", "sessionkey=" + CANARY_SESSION
        login = {"loginresponse": {"sessionkey": CANARY_SESSION, "username": "me"}}
        logged_in = reply(login, "200 OK", *["Set-Cookie: " + cookie for cookie in cookies])
        return lambda wire: wire.send(logged_in if wire.requests[-1].command == "login" else reply({"r": document}))

    @both
    @each("method", "get", "post")
    def test_the_trace_of_signed_requests(self, kind, method):
        headers = {"Authorization": "Bearer " + CANARY_TOKEN, "Cookie": "a=" + CANARY_TOKEN, "X-Tenant": "t1"}
        headers.update(dict.fromkeys(["X-Api-Key", "X-Auth-Token", "Proxy-Authorization"], CANARY_TOKEN))
        document = {"r": dict(self.SECRET_ANSWER, echo=CANARY_KEY + " and " + CANARY_SECRET)}
        content = reply(document, "200 OK", "Set-Cookie: a=" + CANARY_TOKEN)
        server = self.serve([Step.READ, content, Step.AGAIN])
        client = self.client(server, kind, method=method, trace=True, headers=headers)
        secrets = {"password": CANARY_PASSWORD, "userdata": CANARY_SECRET}
        self.assertHolds(self.traced(client, "updateUser", name="visible", **secrets), "name=visible", "X-Tenant: t1",
                         "200 OK", "password=***", "signature=***", '"username": "me"')
        request = server.requests[0]
        self.assertEqual(("POST", CANARY_PASSWORD), (request.method, request.params["password"]))
        self.traced(client, "listZones", json=False)

    def test_the_trace_of_a_page_that_quotes_the_request(self):
        page = "<h1>404</h1><p>visible: {0.target} {0.params[signature]}</p>"
        answers = lambda wire: wire.send(reply(page.format(wire.requests[-1]).encode(), "404 Not Found"))  # noqa: E731
        server, client = self.pair([Step.READ, answers, Step.AGAIN], trace=True)
        self.assertIn("visible: /client/api?", self.traced(client))

    @both
    def test_the_trace_of_a_session(self, kind):
        document = dict(self.SECRET_ANSWER, echo=CANARY_SESSION + CANARY_TOKEN)
        server, client = self.pair([Step.READ, self.with_session(document), Step.AGAIN], kind=kind, **self.SESSION)
        self.assertHolds(self.traced(client), "command=login", "username=me")
        self.assertEqual(CANARY_SESSION, server.requests[1].params["sessionkey"])
        self.assertIn("JSESSIONID=" + CANARY_TOKEN, server.requests[1].all("Cookie")[0])
        with contextlib.redirect_stderr(io.StringIO()) as err:
            run(client.aclose()) if kind is cs.AIOCloudStack else client.close()
        self.assertIn("command=logout", err.getvalue())
        self.assert_tells_nothing(err.getvalue())

    @both
    @each("steps", [], [Step.READ], [Step.READ, reply()[:-5]], [Step.READ, b"garbage\r\n"],
          [Step.READ, reply(b"<html>", "500 x")],
          [Step.READ, reply({"loginresponse": {"errorcode": 531, "errortext": "Failed to authenticate"}}, "531 531")])
    def test_the_trace_and_the_errors_of_exchanges_that_fail(self, kind, steps):
        client = self.client(self.serve(steps), kind, trace=True)
        self.assertIn("command=deployVirtualMachine", self.traced(client, "deployVirtualMachine"))
        client = self.client(self.serve(steps), kind, **self.SESSION)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.refusal(self.call, client, kind=cs.CloudStackException)
        self.assertIn("command=login", err.getvalue())
        self.assert_tells_nothing(err.getvalue())

    def test_the_trace_through_a_proxy(self):
        server = self.serve(SERVE[:2] + [Step.READ, reply()], [Step.READ, b"HTTP/1.1 407 no\r\n\r\n"])
        os.environ["http_proxy"] = os.environ["https_proxy"] = f"http://me:{CANARY_PROXY}@{server.place}"
        for endpoint in (ENDPOINT, ENDPOINT.replace("http:", "https:")):
            self.assertIn("cloud.invalid", self.traced(self.client(endpoint, trace=True)))
        self.assertEqual([1, 1], [len(request.all("Proxy-Authorization")) for request in server.requests])

    @both
    def test_reprs(self, kind):
        """Of clients, of their connections, and of the requests that the protocol makes."""
        seen = []
        one = kind(ENDPOINT + "?token=" + CANARY_TOKEN, CANARY_KEY, CANARY_SECRET, headers={"X-Token": CANARY_TOKEN})
        exchange = lambda self, request: seen.append(request) or answer({"r": {}})  # noqa: E731
        with mock.patch.object(cs.CloudStack, "_exchange", exchange):
            self.call(one)
        self.assertIn(ENDPOINT, repr(one))
        seen.append(one.prepare("updateUser", {"password": CANARY_PASSWORD, "name": "shown"}))
        self.assertIn(f"<Request POST {ENDPOINT}?apiKey=***&command=updateUser&", repr(seen[-1]))
        self.assertIn("&name=shown&password=***&", repr(seen[-1]))
        self.assert_tells_nothing(str(one), *map(repr, (one, one.listZones, transport_of(one), *seen)))

    def test_what_the_checks_look_for_can_be_found(self):
        """The search itself: an exception that does tell is caught, in each of the places where it may tell."""
        telling = cs.CloudStackException("x", "signed with " + CANARY_SECRET)
        caused, inside, kept = (cs.CloudStackException("x") for _ in range(3))
        caused.__cause__ = OSError("?password=" + quote_plus(CANARY_PASSWORD))
        inside.__context__ = ValueError(b"Basic " + base64.b64encode(b"me:" + CANARY_PROXY.encode()))
        kept.request = CANARY_KEY
        for error in (telling, caused, inside, kept):
            self.assertRaises(AssertionError, self.assert_tells_nothing, error)


# === [5] nothing is lost, whatever the server does ====================================================================


class NothingLostTest(Case):
    """The server drops a tenth of the connections, answers a tenth of the requests with 503 or 429, and restarts twice:
    with `retry` set every row and every job's outcome still arrives, once.

    CS_TEST_SEED=N makes the draws of the run whose failure names that seed."""

    JOBS = 500 if os.environ.get("CS_ATTACK_RUNS") else 150
    SEED = int(os.environ.get("CS_TEST_SEED") or random.randrange(1 << 32))

    def setUp(self):
        super().setUp()
        self.draw = random.Random(self.SEED)
        self.simulator = Simulator(job_seconds=0.4).start()
        self.addCleanup(self.simulator.stop)
        self.settings = {"endpoint": self.simulator.endpoint, "key": self.simulator.key,
                         "secret": self.simulator.secret, "retry": 25, "retry_backoff": 0.01, "poll_interval": 0.1,
                         "timeout": 5}

    def misbehave(self):
        """From now on, until the script is used up."""
        busy = {"errorresponse": {"errorcode": 429, "errortext": "please retry after [20] ms."}}
        faults = [DROP, DROP, Answer(503, "<html>restarting</html>"), Answer(429, busy)]

        def fault(record):
            return self.draw.choice(faults) if self.draw.random() < 0.2 else None

        self.simulator.script(None, *[fault] * 20000)

    def while_it_restarts(self, work):
        def restart_twice():
            for _ in range(2):
                time.sleep(0.15)
                self.simulator.stop()
                time.sleep(0.05)
                self.simulator.start()

        with ThreadPoolExecutor(1) as other, self.subTest(CS_TEST_SEED=self.SEED):
            other.submit(restart_twice)
            return work()

    def test_every_row_of_a_list(self):
        self.simulator.cloud.add_machines(1500)
        with cs.CloudStack(**self.settings) as client:
            expected = [row["id"] for row in client.listVirtualMachines(fetch_list=True)]
            self.assertGreater(len(expected), 1500)
            self.misbehave()
            for fetch in (lambda: client.listVirtualMachines(fetch_list=True, pagesize=50),
                          lambda: list(client.iter_list("listVirtualMachines", pagesize=50))):
                rows = self.while_it_restarts(fetch)
                self.assertEqual(expected, [row["id"] for row in rows], f"CS_TEST_SEED={self.SEED}")

    def test_every_outcome_of_many_jobs(self):
        self.simulator.cloud.add_machines(2 * self.JOBS)
        with cs.CloudStack(**self.settings) as client:
            running = client.listVirtualMachines(fetch_list=True, state="Running")
            expected = [row["id"] for row in running][: self.JOBS]
            submitted = [client.rebootVirtualMachine(id=machine) for machine in expected]
        self.misbehave()

        async def wait_for_all():
            async with cs.AIOCloudStack(concurrency=16, **self.settings) as client:
                return await asyncio.gather(*[client.wait_job(answer["jobid"]) for answer in submitted])

        results = self.while_it_restarts(lambda: run(wait_for_all()))
        machines = [result["virtualmachine"]["id"] for result in results]
        self.assertEqual(expected, machines, f"CS_TEST_SEED={self.SEED}")
        self.assertEqual(self.JOBS, len(set(machines)))


# === [6] redaction ====================================================================================================


class RedactionTest(TransportCase):
    """Each redaction by itself: where one is gone, something that nobody may see is shown."""

    QUERY = "?token=" + CANARY_TOKEN

    @each("content", b"", reply(b"<html>", "404 x"), reply(b"{"), reply(b"[1]"), reply(b""), reply(b"{}", "500 x"))
    def test_no_error_quotes_the_query_of_the_endpoint(self, content):
        endpoint = self.serve([Step.READ, content]).url + self.QUERY + "#" + CANARY_SECRET
        self.refusal(self.client(endpoint).listZones, kind=cs.CloudStackException)

    @each("secret", 'CANARY~"quoted"', "CANARY*star(1)", "CANARY/slash ü", "CANARY\\back\n")
    def test_a_secret_that_an_answer_quotes_is_hidden_in_each_form_and_whole(self, secret):
        """As it is, percent-encoded as the server does and as everybody else does, and escaped in JSON."""
        for text in (secret, cs.cs_encode(secret), quote(secret), json.dumps(secret)[1:-1]):
            self.assertEqual("<***>", cs.mask_text("<" + text + ">", ["", None, "abc", secret]), text)

    @each("text, secrets, shown", ("<CANARY-and-more>", ["CANARY", "CANARY-and-more"], "<***>"),
          ("abcd abc", ["abc", "abcd"], "*** abc"))  # four letters, not three
    def test_which_secrets_are_hidden_whole(self, text, secrets, shown):
        self.assertEqual(shown, cs.mask_text(text, secrets))

    @each("name", *(
        "password passwd passphrase secret secretkey secret_key privatekey private-key userdata user_data"
        " sessionkey JSESSIONID signature apikey api-key accesskey token credential credentials psk presharedkey"
        " pre-shared-key bindpass secretcode codefor2fa configdata").split())
    def test_what_is_secret_by_its_name(self, name):
        """Every name that is told apart, on its own and as the end of another, however it is written."""
        for written in (name, name.upper(), "my" + name, "details[0]." + name):
            self.assertEqual({written: "***"}, cs.mask_params({written: "CANARY"}))
            for escaped in ('"CANARY"', '"a\\"CANARY"', '"CANARY', '"a\\"CANARY'):
                shown = cs.mask_text('{"%s" : %s' % (written, escaped), [])
                self.assertEqual('{"%s" : "***"' % written, shown)
        for written in (name, name.upper(), "my" + name, "vnc." + name):
            shown = cs.mask_text(f"<{written}>CANARY</{written}>", [])
            self.assertEqual(f"<{written}>***</{written}>", shown)
        self.assertEqual({name + "s1": "seen"}, cs.mask_params({name + "s1": "seen"}))

    @each("before, secret, after", ("GET /api?apiKey=", "CANARY", "&a=b"),
          ("to=%2Fapi%3FsessionKey%3D", "CANARY", "%26a%3Db"), ("<a href='?signature=", "CANARY", "'>seen</a>"),
          ("Location: https://c/x?apiKey=", "CANARY", ""), ('"url": "https://c/?token=', "CANARY", '&x=1"'),
          *[('{"passwords": 1, "password": ', secret, "") for secret in (
              '["CANARY", "CANARY"]', '{"a": "CANARY"}', '["CANARY')],
          ('"password":', "CANARY", ","), ("<password>", "CANARY", "</password>"),
          ('"name": "saml2.password", "value": ', '"CANARY"', "}"),
          ('{"value": ', '"CANARY"', ', "type": "s", "name": "saml2.password"}'),
          ('{"text": "{\\"password\\":', '\\"CANARY\\"}"', "}"),
          *[(text, "", "") for text in (  # what is no secret
              '"name": "web", "value": "kept"', '{"id": "kept"} {"name": "x.password"}', "?token&kept=1")])
    def test_secrets_of_every_shape_are_masked_and_nothing_else(self, before, secret, after):
        mask = ('"***"' if before.rstrip().endswith(":") else "***") if secret else ""
        self.assertEqual(before + mask + after, cs.mask_text(before + secret + after, []))

    def test_headers_that_are_secret(self):
        names = "Authorization Proxy-Authorization Cookie Set-Cookie X-Api-Key X-Auth X-KEY X-Auth-Token".split()
        for name in names + [name.lower() for name in names] + [name.upper() for name in names]:
            self.assertEqual([name + ": ***"], cs._mask_headers({name: "CANARY"}))
        self.assertEqual(["X-Tenant: seen"], cs._mask_headers({"X-Tenant": "seen"}))

    def test_the_query_of_the_endpoint_where_a_session_fails(self):
        self.failure(self.client(ENDPOINT + self.QUERY, session=fake_session(OSError("x"))), "cloud.invalid", LOST)

    def test_a_list_in_a_server_s_error_that_repeats_a_secret(self):
        body = {"errorcode": 431, "errortext": "no", "uuidList": [{"x": [CANARY_PASSWORD]}]}
        client = self.client(self.serve([Step.READ, reply({"r": body}, "431 431")]))
        error = self.raised(cs.CloudStackApiException, client.getUser, password=CANARY_PASSWORD)
        self.assertEqual(body, error.error)
        self.assertIn("'uuidList': [{'x': ['***']}]", str(error))

    @each("title", "key", "name")
    @each("front", "tags[0].", "")
    def test_values_that_are_secret_by_the_name_they_are_given_for(self, title, front):
        params = {front + title: "my.password", front + "value": "CANARY", "tags[1].value": "seen"}
        self.assertEqual(dict(params, **{front + "value": "***"}), cs.mask_params(params))

    @each("settings, quoted",
          *[(SecretsTest.SESSION, text) for text in (CANARY_PASSWORD, CANARY_SESSION, CANARY_TOKEN)],
          *[({"trace": True}, text) for text in (CANARY_SECRET, CANARY_KEY, CANARY_PASSWORD)])
    def test_secrets_are_hidden_wherever_an_answer_quotes_them(self, settings, quoted):
        """Those of a session or of a key, one at a time, outside of any field that tells by its name."""
        step = SecretsTest.with_session({"echo": quoted})
        client = self.client(self.serve([Step.READ, step, Step.AGAIN]), **settings)
        self.assertIn('"echo": "***"', self.traced(client, "updateUser", password=CANARY_PASSWORD))

    @each("attempt", *[lambda value=value: cs.CloudStack(ENDPOINT).listZones(name=value) for value in (
        CANARY_SECRET + "\0", CANARY_SECRET + "\ud800", CANARY_SECRET.encode() + b"\xff")],
        lambda: cs.flatten({"name": {CANARY_SECRET}, "other": [object()]}))
    def test_what_cannot_be_sent_is_refused_without_its_value_and_without_a_second_traceback(self, attempt):
        """What is raised while another exception is handled would be printed after it, value and all."""
        told = printed(self.raised(ValueError, attempt))
        self.assert_tells_nothing(told)
        self.assertNotIn("During handling", told)

    @each("endpoint, shown", ("https://user:hunter/two@host/api", "https://host/api"),
          ("https://user:pa#ss@host/api", "https://host/api"), ("http://u:a?b@host/", "http://host/"),
          ("user:pw@host/x", "host/x"))
    def test_a_password_with_a_slash_is_not_shown(self, endpoint, shown):
        self.assertEqual(shown, cs.mask_address(endpoint))


# === [7.1] settings: the constructor and the attributes ===============================================================

POSITIONAL = [("endpoint", inspect.Parameter.empty), ("key", None), ("secret", None), ("timeout", 10),
              ("method", "get"), ("verify", None), ("cert", None), ("cert_key", None), ("name", None), ("retry", 0),
              ("retry_backoff", 0.5), ("job_timeout", None), ("poll_interval", 2.0), ("expiration", 600),
              ("trace", False), ("dangerous_no_tls_verify", False), ("headers", None), ("session", None)]
MINUTE = datetime.timedelta(minutes=1)
NOTHING_SENT = [AssertionError("sent")]


class ConstructorTest(ProtocolCase):
    @both
    def test_the_signature_shows_every_setting_in_the_promised_order_and_with_the_table_s_default(self, kind):
        """It is written out for inspect; it must not say something else than the table."""
        parameters = list(inspect.signature(kind).parameters.values())
        shown = [(parameter.name, parameter.default) for parameter in parameters]
        self.assertEqual((POSITIONAL, "fetch_result"), (shown[:18], shown[18][0]))
        kinds = {parameter.kind for parameter in parameters[:19]}, {parameter.kind for parameter in parameters[19:]}
        self.assertEqual(({inspect.Parameter.POSITIONAL_OR_KEYWORD}, {inspect.Parameter.KEYWORD_ONLY}), kinds)
        own = [(setting.name, setting.default) for setting in cs.SETTINGS]
        expected, found = [{name: default for name, default in pairs if name not in ("endpoint", "fetch_result")}
                           for pairs in (own, shown)]
        self.assertEqual(expected, found)

    @both
    def test_arguments_that_are_refused_or_ignored(self, kind):
        self.assertEqual(ENDPOINT, kind(ENDPOINT, theme="monokai", output="json").endpoint)
        for args, settings in (((), {}), ((ENDPOINT,), {"nonesuch": 1}), ((ENDPOINT, *[None] * 18, "theme"), {})):
            self.assertRaises(TypeError, kind, *args, **settings)

    # what an ini file gives, and what other kinds of values mean
    @each("name, given, value", ("timeout", "0.5", 0.5), ("timeout", "10", 10), ("timeout", "1e1", 10),
          ("method", "POST", "post"), ("retry", "3", 3), ("retry_backoff", "0.25", 0.25), ("job_timeout", "60", 60),
          ("job_timeout", "", None), ("poll_interval", "5", 5), ("poll_interval", ".5", 0.5),
          ("expiration", "60", MINUTE), ("expiration", 60.0, MINUTE),
          ("expiration", "-1", -MINUTE / 60), ("expiration", "1.5", MINUTE / 40), ("expiration", MINUTE, MINUTE),
          ("trace", "true", True), ("trace", "off", False), ("dangerous_no_tls_verify", "Yes", True),
          ("trace", "", False), ("dangerous_no_tls_verify", "0", False), ("dangerous_no_tls_verify", None, False),
          ("trace", 1, True), ("fetch_result", "", False), ("fetch_result", "true", True), ("recover", "on", True),
          ("recover", "", False), ("cert", "/c.pem", "/c.pem"), ("cert", ["/c", b"/k"], ("/c", "/k")),
          ("cert_key", "/k.pem", "/k.pem"), ("cert", "", None), ("name", "region", "region"), ("key", "", None),
          ("secret", b"\xc3\xbc", "\xfc"), ("username", lying(str, "u"), "u"), ("domain", "/a/b", "/a/b"),
          ("domain", "ROOT/b", "/b"), ("concurrency", "4", 4), ("max_response_size", "1024", 1024),
          ("headers", None, {}))
    def test_what_values_mean(self, name, given, value):
        later = cs.CloudStack(ENDPOINT)
        later.set_setting(name, given)
        for client in (cs.CloudStack(ENDPOINT, **{name: given}), later, copy.copy(later)):
            found = client.get_setting(name)
            self.assertEqual((value, type(value)), (found, type(found)))

    def test_none_means_the_default(self):
        client = cs.CloudStack(ENDPOINT, **{setting.name: None for setting in cs.SETTINGS[1:]})
        self.assertEqual(settings_of(cs.CloudStack(ENDPOINT)), settings_of(client))

    REFUSED = {
        "timeout": ["abc", "", "nan", "inf", "-1", 0, -1, True, [], float("nan"), float("inf"), 10**400, "1e12", 2e9,
                    decimal.Decimal("NaN")],
        "method": ["put", "", 1, b"get"], "retry": ["-1", 1.5, "x", True, float("inf"), [], ""],
        "retry_backoff": ["-1", "x", float("nan")], "job_timeout": [-1, "x", "nan"],
        "poll_interval": [-0.1, "x", "", "1e300"],
        "expiration": ["x", "nan", 1e300, "inf", []], "trace": ["maybe", 2, []], "fetch_result": ["perhaps", 7],
        "dangerous_no_tls_verify": ["nope", "False ; comment", 2, 1.5], "verify": [5, 1.5, []], "cert": [5, {}, ("a",)],
        "cert_key": [5, ("/a", "/b")], "endpoint": [5, ["http://h/"]], "name": [5], "username": [1], "domain": [1],
        "concurrency": [0, -1, "x", 1.5], "max_response_size": [0, "big"],
        "key": [5, b"c4nary\xff", ["c4nary"], "c4nary\udcff"],
        "secret": [object(), b"c4nary\xff", {"c4nary": 1}, "c4nary\udcff"],
        "password": [1, b"c4nary\xff", "c4nary\udcff"],
        "session": [type("ClientSession", (), {"__module__": "aiohttp.client"})()]}

    @each("name, value", *[(name, value) for name, values in REFUSED.items() for value in values])
    def test_what_cannot_be_a_setting_is_refused_by_name_in_one_line_and_secrets_are_not_quoted(self, name, value):
        for refuse in (lambda: cs.CloudStack(**dict({"endpoint": ENDPOINT}, **{name: value})),
                       lambda: cs.CloudStack(ENDPOINT).set_setting(name, value)):
            with self.assertRaisesRegex(ValueError, rf"\A{name}: .+\Z") as caught:
                refuse()
            self.assertNotRegex(printed(caught.exception), "c4nary|During handling")

    @each("headers", "x: y", 5, {"X": "c4nary\nb"}, {"X": b"c4nary\r"}, {"X": "c4nary\x00b"}, {"X Y": "a"}, {"": "a"},
          {"X:": "a"}, {"X\n": "a"}, {"\xfc": "a"}, {5: "a"}, {"X": ["c4nary"]}, {"X": "c4nary\u20ac"},
          {"Content-Length": "5"}, {"transfer-encoding": "chunked"})
    def test_headers_that_break_out_are_refused(self, headers):
        def write(client):
            client.headers.update(headers)
            return client.listZones()

        ways = [asking("listZones", headers=headers), lambda client: client.set_setting("headers", headers)]
        for call in ways + [write] * isinstance(headers, dict):
            played = self.play(NOTHING_SENT, call)
            self.assertEqual((ValueError, []), (type(played.error), played.commands))
            self.assertNotRegex(printed(played.error), "c4nary|During handling")

    def test_headers_of_one_client_are_not_another_s(self):
        given = {"X": "1"}
        first, second = cs.CloudStack(ENDPOINT, headers=given), cs.CloudStack(ENDPOINT, headers=given)
        copy.deepcopy(first).headers["Z"] = "3"
        first.headers["Y"] = "2"
        self.assertEqual([{"X": "1", "Y": "2"}, {"X": "1"}, {"X": "1"}, {}],
                         [first.headers, second.headers, given, cs.CloudStack(ENDPOINT).headers])

    @both
    def test_the_constructor_opens_nothing(self, kind):
        with mock.patch("builtins.open", side_effect=MemoryError), mock.patch("socket.socket", side_effect=MemoryError):
            client = kind("https://nowhere.invalid/", verify="/no/ca.pem", cert="/no/c.pem", cert_key="/no/k.pem")
            self.assertEqual(("/no/ca.pem", ("/no/c.pem", "/no/k.pem")), (client.verify, client.cert))


class AttributesTest(ProtocolCase):
    @each("verify, dangerous, expected", (None, False, True), (False, False, True), ("false", False, True),
          ("0", False, True), ("", False, True), ("/ca.pem", False, "/ca.pem"), ("/ca.pem", True, "/ca.pem"),
          (None, True, False), (True, True, False), (False, "true", False), (False, "false", True))
    def test_verify_reads_true_or_a_path_or_false_only_where_that_is_said(self, verify, dangerous, expected):
        later = cs.CloudStack(ENDPOINT, verify="/other.pem")
        later.verify = verify
        later.set_setting("dangerous_no_tls_verify", dangerous)
        for client in (cs.CloudStack(ENDPOINT, verify=verify, dangerous_no_tls_verify=dangerous), later):
            self.assertEqual((expected, type(expected)), (client.verify, type(client.verify)))

    def test_every_promised_attribute_can_be_read(self):
        expected = {"endpoint": ENDPOINT, "key": "k", "secret": "s", "timeout": 10, "method": "get", "verify": True,
                    "cert": None, "name": None, "retry": 0, "job_timeout": None, "poll_interval": 2.0, "trace": False,
                    "fetch_result": False, "expiration": 10 * MINUTE, "headers": {}, "session": None}
        client = cs.CloudStack(ENDPOINT, "k", "s")
        self.assertEqual(expected, {name: getattr(client, name) for name in expected})
        for refused in (lambda: client.get_setting("theme"), lambda: client.set_setting("nonesuch", 1)):
            self.assertRaises(KeyError, refused)

    @each("name, value, found, expected",
          ("endpoint", "http://h.invalid/", lambda p: p.requests[-1].url.partition("?")[0], "http://h.invalid/"),
          ("key", "key2", lambda p: p.params()["apiKey"], "key2"),
          ("method", "post", lambda p: p.methods, ["GET", "POST"]),
          ("secret", "secret2", lambda p: p.params()["signature"] == p.params(0)["signature"], False),
          ("timeout", "0.5", lambda p: (p.requests[-1].timeout, p.requests[-1].total), (0.5, 5.0)),
          ("verify", "/ca.pem", lambda p: p.requests[-1].tls[0], "/ca.pem"),
          ("dangerous_no_tls_verify", True, lambda p: p.requests[-1].tls[1], True),
          ("cert", "/c.pem", lambda p: p.requests[-1].tls[2], "/c.pem"),
          ("headers", {"X-A": "1"}, lambda p: p.requests[-1].headers["X-A"], "1"),
          ("expiration", 60, lambda p: p.params()["expires"], "2026-01-01T00:01:00+0000"),
          ("max_response_size", 9, lambda p: p.requests[-1].limit, 9))
    def test_settings_are_read_anew_by_each_call(self, name, value, found, expected):
        def change_and_call(client):
            client.set_setting(name, value)
            return client.listZones()

        played = self.play(one(), one_after_another(asking("listZones"), change_and_call))
        self.assertEqual((None, expected), (played.error, found(played)))

    @both
    @each("endpoint, name, shown", (ENDPOINT, None, ENDPOINT), (ENDPOINT, "zurich", "zurich"),
          *[(endpoint, None, None) for endpoint in (
              "http://user:c4nary@h/api", "http://h/api?token=c4nary", "user:c4nary@h/api", "http://h:x/",
              "https://h/#c4nary", "", None, "file:///etc/passwd", "//user:c4nary@h/", "http://[::1", "//u:c4nary/@h")])
    def test_repr_is_the_name_or_the_endpoint_and_never_fails_nor_shows_a_secret(self, kind, endpoint, name, shown):
        text = repr(kind(endpoint, "c4nary-key", "c4nary-secret", password="c4nary", name=name))
        self.assertRegex(text, rf"\A<CloudStack: {re.escape(shown) if shown else '.*'}>\Z")
        self.assertNotIn("c4nary", text)

    # settings that do not go together, or cannot be used: what the error begins with, and what it must not quote
    @each("settings, name, secret",
          *[({"endpoint": endpoint}, "endpoint", "c4nary") for endpoint in (
              None, "", "cloud.example/client/api", "file:///etc/passwd", "ftp://h/", "http://", "https:///client/api",
              "http://h:x/", "http://h:99999/", "http://h:0/", "http://[::1/", "http://h/a b", "http://h/\n",
              "http://h/\xfc", "http://user:c4nary@h/api", "user:c4nary@h/api", "http://user:c4nary@h:x/",
              "//user:c4nary@h/", "data:,x", "http://u:c4nary/x@h/", "http://u:c4#c4nary@h/", "http://u:a?c4nary@h/")],
          ({"endpoint": "https://b\u00fccher.example/client/api"}, "endpoint: .*xn--", "c4nary"),
          ({"key": None}, "key", "secret1"), ({"secret": None}, "secret", "key1"), ({"key": ""}, "key", "secret1"),
          (dict(UNSIGNED, username="admin"), "password", "admin"),
          (dict(UNSIGNED, password="c4nary"), "username", "c4nary"),
          ({"username": "admin", "password": "c4nary"}, "username", "c4nary"), ({"cert_key": "/k"}, "cert", "c4nary"))
    @each("method", "listZones", "check", "call", "pages", "prepare", "wait_job")
    def test_what_does_not_go_together_is_refused_before_anything_is_sent(self, settings, name, secret, method):
        def call(client):
            outcome = getattr(client, method)(*[] if method in ("check", "listZones") else ["listZones"])
            return list(outcome) if hasattr(outcome, "__next__") else outcome

        played = self.play(NOTHING_SENT, call, **settings)
        self.assertEqual((ValueError, []), (type(played.error), played.commands))
        self.assertRegex(str(played.error), rf"\A{name}")
        self.assertNotIn(secret, str(played.error))


# === [7.2] configuration ==============================================================================================

# Values that may go over the wire where they belong, and may be shown nowhere. Their letters are what tests look for.
KEY, SECRET, PASSWORD, USERDATA = "CANARY-key-6c1", "CANARY-secret-9d4", "CANARY-password-2b8", "CANARY-userdata-5e7"

READ_CONFIG_DEFAULTS = {"timeout": 10, "method": "get", "retry": 0, "verify": None, "cert": None, "cert_key": None,
                        "name": None, "trace": None, "expiration": 600, "poll_interval": 2.0,
                        "dangerous_no_tls_verify": False}
FROM_ENVIRONMENT = ("endpoint key secret username password domain method timeout retry retry_backoff job_timeout theme"
                    " poll_interval expiration verify cert cert_key trace dangerous_no_tls_verify").split()


class Replies(Simulator):
    """The simulator's sockets, with the test's words: each command is answered by what replies has for it.

    A reply is a document, (status, document or text), a function of the record that returns one, or a list of these, of
    which the last is used again. Text that looks like JSON is sent as such, other text as HTML."""

    def __init__(self):
        super().__init__()
        self.replies = {}
        self.start()
        self.address = self.endpoint.replace("/client/api", "")

    def reset(self):
        self.replies = {}
        del self.requests[:]

    @property
    def commands(self):
        return [record.command for record in self.requests]

    def scripted(self, record):
        reply = self.replies.get(record.command, self.replies.get("*", {}))
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        if callable(reply):
            reply = reply(record)
        status, body = reply if isinstance(reply, tuple) else (200, reply)
        text = body if isinstance(body, str) else json.dumps(body)
        if 300 <= status < 400:
            return Answer(status, "", {"Location": text})
        is_json = not isinstance(body, str) or text.lstrip()[:1] in ("{", "[")
        return Answer(status, text, {"Content-Type": "application/json" if is_json else "text/html"})


test_is_over = threading.Event()


class ServerCase(Case):
    """A test with a server whose answers it writes, which the environment does not name yet."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.server = Replies()

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()
        super().tearDownClass()

    def setUp(self):
        super().setUp()
        self.server.reset()
        test_is_over.clear()
        self.addCleanup(test_is_over.set)

    def replies(self, **by_command):
        self.server.replies.update(by_command)

    def assertOneLine(self, err):
        self.assertNotIn("Traceback", err)
        self.assertEqual(1, err.count("\n"), err)
        self.assertTrue(err.endswith("\n") and err.strip(), err)

    def assertNoCanary(self, *texts):
        for text in texts:
            self.assertNotIn("CANARY", str(text))


def environ(**settings):
    os.environ.update({"CLOUDSTACK_" + name.upper(): str(value) for name, value in settings.items()})


GOOD_INI = f"[cloudstack]\nendpoint = http://e/\nkey = {KEY}\nsecret = {SECRET}\n"
OF = {"endpoint": "http://e/"}
OF_K = dict(OF, key="k", secret="s")
# What the files hold (.cloudstack.ini | work/cloudstack.ini | named.ini, which CLOUDSTACK_CONFIG names), a word a line,
# below [cloudstack] unless it begins otherwise; E is `endpoint=http://e/`, K is `key=k secret=s`. Then the environment;
# the region asked for; and what read_config gives beside its defaults and the name of the region.
WINS = {
    "each file alone": [("E|", {}, None, OF), ("|E", {}, None, OF), ("||E", {}, None, OF)],
    "later files win": [("E retry=1 method=1|retry=2 method=2|retry=3 theme=3", {}, None,
                         dict(OF, retry="3", method="2", theme="3")),
                        ("E K|endpoint= key=", {}, None, OF_K),  # an empty value leaves the earlier one
                        ("E|[DEFAULT] timeout=3 endpoint=x", {}, None, OF)],
    "regions": [("E [eu] endpoint=http://eu/", {}, "eu", {"endpoint": "http://eu/", "name": "eu"}),
                ("E [eu] endpoint=http://eu/", {"region": "eu"}, None, {"endpoint": "http://eu/", "name": "eu"}),
                ("E [eu] endpoint=http://eu/", {"region": "eu"}, "cloudstack", OF),
                ("E [eu] endpoint=http://eu/ timeout=5", {"endpoint": "x", "timeout": "7", "retry": "2"}, "eu",
                 {"endpoint": "http://eu/", "timeout": "5", "retry": "2", "name": "eu"}),
                ("[eu] endpoint=http://eu/ K timeout=5", {"endpoint": "http://env/", "region": "eu"}, None,
                 {"endpoint": "http://env/", "key": "k", "secret": "s", "timeout": "5", "name": "eu"}),
                ("[eu] endpoint=http://eu/", OF, "cloudstack", dict(OF, name=None))],
    "an endpoint in the environment wins and files fill": [
        ("endpoint=x K timeout=5 retry=5", {"endpoint": "http://e/", "timeout": "7"}, None,
         dict(OF_K, timeout="7", retry="5")),
        ("no ini", OF_K, None, dict(OF_K, name=None)), ("no ini", OF_K, "cloudstack", dict(OF_K, name=None))],
    "else the section wins and the environment fills": [
        ("E timeout=5", {"timeout": "7", "retry": "2", "key": "k", "secret": "s"}, None,
         dict(OF_K, timeout="5", retry="2")),
        ("E verify=/ca", {"key": "k", "secret": "s", "header_x": "y", "cert": "/c"}, None,
         dict(OF_K, verify="/ca", cert="/c", headers={"x": "y"}))],
    "overrides": [
        ("E K timeout=5 retry=5", {"endpoint": "x", "timeout": "7", "retry": "8", "overrides": " timeout , RETRY "},
         None, dict(OF_K, timeout="7", retry="8")),
        ("E K timeout=5", {"endpoint": "http://env/", "overrides": "endpoint"}, None,
         dict(OF_K, endpoint="http://env/", timeout="5")),
        ("[eu] E timeout=5", {"timeout": "7", "overrides": "timeout"}, "eu", dict(OF, timeout="7", name="eu"))],
    "headers": [
        *[("E header_x-a=f header_x-b=f", {"header_x_a": "e", "header_x_b": "e", "overrides": overrides}, None,
           dict(OF, headers=headers)) for overrides, headers in (
               ("timeout", {"x-a": "f", "x-b": "f"}), ("header_x-a", {"x-a": "e", "x-b": "f"}),
               ("headers", {"x-a": "e", "x-b": "e"}))],
        ("K header_x-a=f header_x-f=f", {"endpoint": "http://e/", "header_x_a": "e", "header_x_e": "e"}, None,
         dict(OF_K, headers={"x-a": "e", "x-f": "f", "x-e": "e"}))],
    "a key or a user name": [
        ("E K", {"key": ""}, None, OF_K), ("E K", {"key": "", "overrides": "key"}, None, OF),
        ("E K timeout=4", {"endpoint": "http://e/", "key": "", "secret": "es"}, None, dict(OF, name=None)),
        ("E username=u password=p domain=/d", {}, None, dict(OF, username="u", password="p", domain="/d")),
        ("username=u password=p", OF_K, None, dict(OF_K, name=None)),
        ("K timeout=4", dict(OF, username="u", password="p"), None, dict(OF, username="u", password="p", name=None))],
    "what is spelled otherwise": [
        ("EndPoint=http://e/ TIMEOUT=3 session=x foo=bar", {"foo": "bar", "session": "x"}, None, dict(OF, timeout="3")),
        ("E timeout= theme= header_x= header_=n", {"retry": "", "region": "", "config": "", "overrides": ""}, None, OF),
        ("[DEFAULT] timeout=3 key=k [cloudstack] E secret=s", {}, None, dict(OF_K, timeout="3")),
        ("E trace=YES dangerous_no_tls_verify=0", {}, None, dict(OF, trace=True, dangerous_no_tls_verify=False)),
        ("E", {"trace": "off", "dangerous_no_tls_verify": "T"}, None,
         dict(OF, trace=False, dangerous_no_tls_verify=True)),
        ("E trace=tru verify=no", {}, None, dict(OF, trace="tru", verify="no"))]}  # the constructor refuses "tru"


class ConfigCase(Case):
    def files(self, text):
        """Write the files of a row of WINS."""
        for name, words in zip((".cloudstack.ini", "work/cloudstack.ini", "named.ini"), text.split("|")):
            lines = ("" if words.startswith(("[", "no ")) else "[cloudstack] ") + words
            lines = re.sub(r"\bE\b", "endpoint=http://e/", re.sub(r"\bK\b", "key=k secret=s", lines)).replace(" ", "\n")
            if words:
                self.write(name, lines)
                if name == "named.ini":
                    environ(config="~/named.ini")

    def assertReads(self, *args, **settings):
        """read_config gives these settings, and of all others the defaults."""
        self.assertEqual(dict(READ_CONFIG_DEFAULTS, **settings), cs.read_config(*args))


class SourcesTest(ConfigCase):
    """Where settings come from, and which source wins."""

    @each("case, files, env, region, expected", *[(case, *row) for case, rows in WINS.items() for row in rows])
    def test_what_wins(self, case, files, env, region, expected):
        self.files(files)
        environ(**env)
        self.assertReads(*([region] if region else []), **dict({"name": "cloudstack"}, **expected))

    @each("source", "environment", "file")
    def test_every_setting_is_read(self, source):
        values = {name: name + "-value" for name in FROM_ENVIRONMENT}
        if source == "environment":
            environ(**values)
        else:
            self.ini("[cloudstack]\n" + "\n".join([f"{name} = {value}" for name, value in values.items()]))
        self.assertReads(name=None if source == "environment" else "cloudstack", **values)

    @each("written, read", ("a%b", "a%b"), ("%", "%"), ("a%%b", "a%b"), ("a%%%b", "a%%b"), ("%s%d%1", "%s%d%1"),
          ("%(endpoint)d", "%(endpoint)d"), ("%()s", "%()s"), ("<%(Domain)s>", "<x%y>"), ("%%(domain)s", "%(domain)s"),
          ("%%%(domain)s", "%x%y"), ("%(base)s", "from DEFAULT"), ("\u00fc\u20ac", "\u00fc\u20ac"))
    def test_percent_signs_and_letters(self, written, read):
        """`%%` and `%(name)s` as configparser has them; any other `%` is literal (5.2.0: a traceback)."""
        text = "[DEFAULT]\nbase = from DEFAULT\n[50% off]\nendpoint = http://e/\ntheme = a\n  [5%] b%\ndomain = x%y\n"
        self.ini("\ufeff" + (text + f"secret = {written}\n").replace("\n", "\r\n"))
        with mock.patch("locale.getpreferredencoding", lambda *args: "ascii"):
            found = cs.read_config("50% off")
        self.assertEqual((read, "a\n[5%] b%"), (found["secret"], found["theme"]))

    @both
    def test_every_configuration_can_be_given_to_both_clients(self, kind):
        """With 5.2.0 a file that has `theme` cannot; and each call returns a dict of its own."""
        self.ini("[cloudstack]\nendpoint = http://e/\nkey = k\nsecret = s\ntheme = monokai\noutput = table\n"
                 "timeout = 0.5\nexpiration = -1\nheader_x-y = z\n")
        cs.read_config()["headers"].clear()
        client = kind(**cs.read_config())
        self.assertEqual((0.5, {"x-y": "z"}, "<CloudStack: cloudstack>"),
                         (client.timeout, client.headers, repr(client)))

    def test_read_config_from_ini_gives_what_the_section_holds(self):
        environ(endpoint="http://env/", key="k", timeout="3", header_a="b")
        self.assertEqual({"name": None}, cs.read_config_from_ini())
        self.ini("[eu]\nendpoint = http://e/\ntimeout = 5\ntrace = yes\nheader_x-y = z\ntheme = t\nfoo = 1\n")
        expected = {"endpoint": "http://e/", "timeout": "5", "trace": True, "theme": "t", "name": "eu",
                    "headers": {"x-y": "z"}}
        self.assertEqual(expected, cs.read_config_from_ini(ini_group="eu"))
        self.assertEqual({"name": None}, cs.read_config_from_ini("mars"))
        environ(region="eu")
        self.assertEqual(expected, cs.read_config_from_ini())


class LoadConfigTest(ConfigCase):
    """What load_config knows beyond the settings."""

    # files and environment as in WINS; options; then where each value came from: ini, work, option, or a variable
    @each("files, env, options, origins",
          ("E K|timeout=3", {"retry": "2", "header_x_y": "z"}, {},
           {"endpoint": "ini", "key": "ini", "secret": "ini", "timeout": "work", "retry": "CLOUDSTACK_RETRY",
            "header_x-y": "CLOUDSTACK_HEADER_X_Y"}),
          ("E K||timeout=3 retry=3", {"timeout": "7", "retry": "7", "overrides": "timeout retry"}, {"retry": "5"},
           {"endpoint": "ini", "key": "ini", "secret": "ini", "timeout": "CLOUDSTACK_TIMEOUT", "retry": "option"}),
          ("E K timeout=3", OF_K, {"timeout": "9"},
           dict({name: "CLOUDSTACK_" + name.upper() for name in OF_K}, timeout="option")))
    def test_origins(self, files, env, options, origins):
        self.files(files)
        environ(**env)
        found = cs.load_config(None, options)
        paths = {os.path.join(self.home, ".cloudstack.ini"): "ini", os.path.join(self.cwd, "cloudstack.ini"): "work",
                 os.path.join(self.home, "named.ini"): "named"}
        self.assertEqual(origins, {name: paths.get(origin, origin) for name, origin in found.origins.items()})
        self.assertEqual(options, {name: found.settings[name] for name in options})

    @each("path", "{}/other.ini", "~/other.ini")
    def test_a_path_is_read_even_beside_a_complete_environment_and_in_the_place_of_CLOUDSTACK_CONFIG(self, path):
        environ(config="/nowhere.ini", retry="2", **OF_K)
        self.write("other.ini", "[cloudstack]\ntimeout = 3\nretry = 9\n[eu]\nendpoint = http://eu/\n")
        found = cs.load_config(path=path.format(self.home))
        expected = dict(READ_CONFIG_DEFAULTS, timeout="3", name="cloudstack")
        self.assertEqual(dict(expected, retry="2", **OF_K), found.settings)
        self.assertEqual({"cloudstack", "eu"}, found.regions)
        self.assertEqual("http://eu/", cs.load_config("eu", path=path.format(self.home)).settings["endpoint"])
        self.assertRaisesRegex(SystemExit, "Tried .*/none.ini", cs.load_config, path="/none.ini")

    def test_keys_that_no_setting_has(self):
        path = self.ini("[DEFAULT]\nbase = 1\n[cloudstack]\nendpoint = http://%(Host)s/\nhost = e\nfoo = %(base)s\n"
                        "session = x\nheader_ = n\nheader_a = b\n[eu]\nbar = 1\n")
        found = cs.load_config()
        self.assertEqual([("foo", path), ("header_", path), ("session", path)], sorted(found.unknown))
        with mock.patch.dict(os.environ, CLOUDSTACK_header_b="c", CLOUDSTACK_HEADER_D="e", CLOUDSTACK_timeout="1"):
            self.assertEqual(["CLOUDSTACK_timeout"], cs.unknown_variables())

    def test_list_regions(self):
        self.assertEqual([], cs.list_regions())
        self.ini("[cloudstack]\n[eu]\n")
        self.write("work/cloudstack.ini", "no ini")
        environ(config=self.write("named.ini", "[us]\n[eu]\n"))
        self.assertEqual(["cloudstack", "eu", "us"], cs.list_regions())
        self.assertEqual(["cloudstack", "eu", "x"], cs.list_regions(self.write("other.ini", "[x]\n")))


class ReadableFilesTest(ConfigCase):
    """A file with a secret is for its owner alone."""

    @each("mode, text, env, warned", (0o644, GOOD_INI, {}, True), (0o640, GOOD_INI, {}, True),
          (0o600, GOOD_INI, {}, False),
          (0o644, "[cloudstack]\nendpoint = http://e/\nusername = u\npassword = p\n", {}, True),
          (0o644, "[cloudstack]\nendpoint = http://e/\nkey = k\n[eu]\nsecret = s\n", {}, False),
          (0o644, GOOD_INI, {"secret": "es", "overrides": "secret"}, False))
    def test_a_secret_that_others_can_read_is_warned_of(self, mode, text, env, warned):
        environ(**env)
        path = self.write(".cloudstack.ini", text, mode)
        expected = [f"{path} holds a secret and can be read by others; chmod 600 {path}"] * warned
        self.assertEqual(expected, cs.load_config().warnings)


BAD_INI = [("secret = " + SECRET, "line 1"), ("\n\n" + GOOD_INI.partition("\n")[2], "line 3"),
           (GOOD_INI + SECRET + "\n", "line 5"), (f"[cloudstack\nsecret = {SECRET}\n", "line 1"),
           (GOOD_INI + "Secret = " + SECRET, "secret"), (GOOD_INI + GOOD_INI, "cloudstack"),
           (GOOD_INI + f"= {SECRET}\n", "line 5"), (b"[cloudstack]\nsecret = CANARY\xff\n", "UTF-8"),
           *[(f"[cloudstack]\nendpoint = http://e/\nsecret = {SECRET}%({to})s\n", "secret") for to in ("no", "secret")],
           (GOOD_INI + "".join(f"x{n} = %(x{n + 1})s%(x{n + 1})s\n" for n in range(40)) + "x40 = CANARY\n", "x0"),
           *[(f"[cloudstack]\nendpoint = http://e/\n{key} = 1\n  secret = CANARY\n", key) for key in (
               "timeout", "key", "verify", "trace")]]  # an indented line goes on with the value above it


class BadFilesTest(ConfigCase):
    """Files that cannot be used: one clear ValueError that names the file, and never a secret of it."""

    def refused(self, path, *parts):
        for read in (cs.read_config_from_ini, cs.read_config):
            error = self.raised(ValueError, read)
            self.assertHolds(str(error), path, *parts)
            self.assertLacks(str(error), "\n", "CANARY")
            self.assertNotIn("CANARY", printed(error))

    @each("text, part", *BAD_INI)
    @each("name", ".cloudstack.ini", "named.ini")
    def test_files_that_are_no_ini_files(self, text, part, name):
        path = self.write(name, text)
        environ(config=path)
        self.refused(path, part)

    def test_files_that_cannot_be_read(self):
        path = self.ini("[cloudstack]\n")
        refused = PermissionError(13, "Permission denied", path)  # root may read all
        with mock.patch("builtins.open", side_effect=refused):
            self.refused(path, "cannot read", "Permission denied")
        os.remove(path)
        os.mkdir(path)
        self.refused(path, "cannot read")
        environ(config="x" * 5000)
        self.assertRaisesRegex(ValueError, "cannot read", cs.read_config)

    # the text of ~/.cloudstack.ini, if it is there; the environment; the region; what is raised
    @each("text, env, region, kind, says",
          (None, {"key": "k"}, None, SystemExit, "Config file not found. Tried {home}/.cloudstack.ini, {home}/"),
          (None, {}, "eu", SystemExit, "Config file not found. Tried "),
          *[(GOOD_INI, {"config": name}, None, SystemExit, "Config file not found. Tried .*" + name) for name in (
              "missing.ini", "/dev/null/x.ini")],
          ("[cloudstack]\nkey = k\n", {}, None, ValueError, "missing the following keys: endpoint\\Z"),
          ("", {"region": "mars"}, None, ValueError, r"keys: endpoint \(there is no section \[mars\] in {home}"),
          ("[DEFAULT]\ntimeout = 1\n" + GOOD_INI, {}, "DEFAULT", configparser.NoSectionError, "DEFAULT"),
          (GOOD_INI, {}, "Cloudstack", configparser.NoSectionError, "Cloudstack"),
          (GOOD_INI, OF_K, "mars", configparser.NoSectionError, "mars"),
          (None, OF_K, "mars", configparser.NoSectionError, "mars"))
    def test_what_is_missing(self, text, env, region, kind, says):
        environ(**env)
        if text is not None:
            self.ini(text)
        self.assertRaisesRegex(kind, says.replace("{home}", re.escape(self.home)), cs.read_config, region)


class FilesTogetherTest(ConfigCase):
    """Endpoint, credentials, TLS settings and headers belong together: never from two files. (5.2.0 sends the key of
    ~/.cloudstack.ini to the endpoint that a file in the working directory names.)"""

    def setUp(self):
        super().setUp()
        self.own = self.ini(f"[cloudstack]\nendpoint = {ENDPOINT}\nkey = {KEY}\nsecret = {SECRET}\n")

    @each("line", "endpoint=http://other/", "key=k", "username=u", "password=p", "verify=/ca", "cert=/c", "cert_key=/k",
          "dangerous_no_tls_verify=true", "header_x-tenant=t", "[DEFAULT] endpoint=http://x/ [cloudstack] timeout=3")
    @each("where", "|", "||")
    def test_each_of_them_is_refused_from_a_second_file(self, line, where):
        self.files(where + line)
        path = os.path.join(self.home, "named.ini" if where == "||" else "work/cloudstack.ini")
        for read in (cs.read_config, cs.read_config_from_ini):
            error = self.raised(ValueError, read)
            self.assertHolds(str(error), self.own, path)
            self.assertNotIn("CANARY", str(error))

    @each("text, env, expected", ("[cloudstack]\nendpoint = b\nkey = k\nsecret = t\n", {}, ("b", "k", "t")),
          ("[cloudstack]\ntimeout = 3\n[eu]\nendpoint = x\n", {}, (ENDPOINT, KEY, SECRET)),
          ("[cloudstack]\nendpoint = x\n", {"endpoint": "env"}, ("env", KEY, SECRET)))
    def test_what_does_not_mix_them(self, text, env, expected):
        self.write("work/cloudstack.ini", text)
        environ(**env)
        found = cs.read_config()
        self.assertEqual(expected, tuple(found[name] for name in ("endpoint", "key", "secret")))

    def test_one_file_by_two_names_is_one_file(self):
        os.symlink(self.own, os.path.join(self.cwd, "cloudstack.ini"))
        environ(config=self.own)
        self.assertEqual(KEY, cs.read_config()["key"])



# === [8] command line: what its classes share =========================================================================

# CommandLineCase asks a server that says what the test wrote (Replies); CloudCase asks a simulated cloud.

README_PATH = os.path.join(os.path.dirname(CS_PATH), "README.rst")
OPTIONS = list(dict.fromkeys(cs._FLAGS.values()))
OWN_PARAMETERS = {"command", "response", "apikey", "signature", "signatureversion", "expires", "customjobid"}
EVIL = "x\x1b]0;x\x07\x9b2J\u202ey"
EVIL_TITLE = "\x1b]0;pwned\x07"  # would set the title of the window
HARMFUL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066\u2028\ud800]"  # what a terminal would obey
ZONES_ANSWER = {"listzonesresponse": {"count": 1, "zone": [{"name": "z\u00fcrich", "id": "1"}]}}
ZONES_TEXT = '{\n  "count": 1,\n  "zone": [\n    {\n      "id": "1",\n      "name": "z\u00fcrich"\n    }\n  ]\n}\n'
DEPLOYED_JOB = {"r": {"jobid": "job-1", "id": "vm-1"}}


def job_pending(record=None):
    return {"queryasyncjobresultresponse": {"jobid": "job-1", "jobstatus": 0, "jobprocstatus": 0}}


def job_done(result, status=1):
    return {"queryasyncjobresultresponse": {"jobid": "job-1", "jobstatus": status, "jobresult": result}}


def forever(record):
    """Give no answer while the test runs."""
    test_is_over.wait(PATIENCE_OF_TESTS)
    return {}


def have_terminals():
    return pty is not None and os.path.isdir("/proc")


def posix_only(test):
    return unittest.skipUnless(os.name == "posix", "needs a POSIX system")(test)


class FakeTerminal(io.StringIO):
    """Standard output or error that says it is a terminal."""

    def isatty(self):
        return True

    def fileno(self):
        return sys.__stderr__.fileno()


def screen(text):
    """What a terminal shows of a text after all of it was written: its lines, without colours."""
    lines, column = [""], 0
    for part in re.findall("\x1b\\[K|\x1b\\[[0-9;]*m|\r|\n|[^\x1b\r\n]|\x1b", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
            column = 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif not part.startswith("\x1b["):
            lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + 1 :]
            column += 1
    return "\n".join(lines)


def columns_of(text):
    """Columns that a terminal takes for a text, counted by the tests themselves."""
    count = 0
    for char in text:
        if unicodedata.category(char) not in ("Mn", "Me", "Cf"):
            count += 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1
    return count


def open_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def later(seconds):
    """Another time of day, for cs.py; the simulator's clock goes on as it was."""
    now = time.time() + seconds
    return mock.patch("time.time", lambda: now)


def api_entry(api):
    """An entry of listApis out of a name and parameter words: "id!" is required, "x:type" has a type."""
    if isinstance(api, dict):
        return api
    params = []
    for word in api[1:]:
        given, _, kind = word.rstrip("!").partition(":")
        params.append({"name": given, "type": kind or "string", "required": word.endswith("!"), "length": 255,
                       "description": "the " + given})
    return {"name": api[0], "description": f"Does {api[0]}.", "isasync": False, "params": params, "response": []}


class CommandLineCase(ServerCase):
    """A command line whose environment names a server with the test's words, and a key."""

    def setUp(self):
        super().setUp()
        environ(endpoint=self.server.endpoint, key=KEY, secret=SECRET, poll_interval="0.01", timeout="5")
        self.replies(listZones=ZONES_ANSWER, **{"*": {"anyresponse": {"ok": True}}})

    def asked_with(self, *args):
        """The parameters of the one request that a command line makes, without those that every request has."""
        self.server.requests.clear()
        self.good(*args)
        (record,) = self.server.requests
        return {name: value for name, value in record.params.items() if name.lower() not in OWN_PARAMETERS}

    def refused(self, *args, says=()):
        """A command line that is refused with exit code 2 and one line, before anything is sent; that line."""
        self.server.requests.clear()
        err = self.fails(2, *args)
        self.assertOneLine(err)
        self.assertEqual([], self.server.requests)
        self.assertHolds(err, *says)
        return err


class CloudCase(Case):
    """A command line whose environment names a simulator, which each test class has one of."""

    options = {}  # type: dict

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.kept = None  # the name and the content of the list of commands, once a test has fetched it
        cls.cloud = Simulator(**dict({"job_seconds": 0.02}, **cls.options)).start()

    @classmethod
    def tearDownClass(cls):
        cls.cloud.stop()
        super().tearDownClass()

    def setUp(self):
        super().setUp()
        self.cloud.requests.clear()
        self.cloud._scripts.clear()
        self.configure("admin", poll_interval="0.02", timeout="5", retry_backoff="0.01")

    def configure(self, user=None, **settings):
        """Settings into the environment; a user's endpoint and credentials with it."""
        if user is not None:
            user = self.cloud.users[user]
            settings = dict(settings, endpoint=self.cloud.endpoint, key=user.key, secret=user.secret)
        environ(**settings)

    def option(self, **options):
        """Options of the simulator for this test."""
        patched = mock.patch.multiple(self.cloud, **options)
        patched.start()
        self.addCleanup(patched.stop)

    def reply(self, command_name, *documents, **more):
        """Have the next exchanges of a command answered by these, whatever was asked."""
        key = command_name.lower() + "response"
        self.cloud.script(command_name, *[Answer(more.get("status", 200), {key: body}) for body in documents])

    def printed(self, document, command_name, *args):
        """What a command prints of this answer, and of nothing else."""
        self.reply(command_name, document)
        return self.good(command_name, *args)

    def say_error(self, command_name, code, text="no", **fields):
        document = dict({"uuidList": [], "errorcode": code, "cserrorcode": 4350, "errortext": text}, **fields)
        self.reply(command_name, document, status=code)

    @property
    def asked(self):
        """The commands the server was asked."""
        return [record.command for record in self.cloud.requests]

    def sent(self, index=-1):
        """The parameters of one request, without those that every request has."""
        params = self.cloud.requests[index].params
        return {name: value for name, value in params.items() if name.lower() not in OWN_PARAMETERS}

    def usage(self, *args):
        """A command line that must be refused before anything is sent; what it says."""
        del self.cloud.requests[:]
        err = self.fails(2, *args)
        self.assertEqual([], self.asked)
        self.assertNotIn("Traceback", err)
        return err

    def sync(self):
        """Fetch the list of commands; the path of the file."""
        self.assertEqual((0, "", ""), self.main("--sync", "-q"))
        del self.cloud.requests[:]
        return self.cache_file()

    def known(self):
        """As sync(), but the server is asked for the first test of a class only."""
        cls = type(self)
        if cls.kept is None:
            path = self.sync()
            cls.kept = os.path.basename(path), open_bytes(path)
            return path
        os.makedirs(os.path.join(self.home, ".cache", "cs"), mode=0o700)
        return self.write(os.path.join(".cache", "cs", cls.kept[0]), cls.kept[1])

    def cache_file(self):
        """The one file that the cache holds."""
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(self.home, ".cache"), "cs")
        (name,) = os.listdir(folder)
        return os.path.join(folder, name)

    def sync_as(self, *apis):
        """Have the server offer these commands, and fetch the list: (name, parameter words) or whole entries."""
        self.reply("listApis", {"count": len(apis), "api": [api_entry(api) for api in apis]})
        return self.sync()

    def on_terminal(self, *args, both=False, columns=80, term="xterm", **env):
        """main() where standard output, and with both=True standard error too (the same one), is a terminal."""
        out = FakeTerminal()
        err = out if both else io.StringIO()
        with mock.patch.dict(os.environ, dict(env, COLUMNS=str(columns), LINES="24", TERM=term)):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cs.main(list(args))
        return code, out.getvalue(), "" if both else err.getvalue()

    def on_pty(self, *args):
        """A process on a terminal that is closed with the test."""
        typed = Typed(*args)
        self.addCleanup(typed.close)
        return typed

    def table(self, *args, **options):
        """The lines of a table on a terminal, uncoloured."""
        code, out, err = self.on_terminal(*args + ("-o", "table", "--color", "never"), **options)
        self.assertEqual((0, ""), (code, err))
        return out.splitlines()


# === [8.1, 8.2] command line: options, run and report =================================================================


class ArgumentsTest(CommandLineCase):
    """cs [options] COMMAND [name=value ...]"""

    @each("line", "-q -t -r eu listZones name=x", "listZones name=x -q -t -r eu", "-qt listZones -reu name=x",
          "-qtreu listZones name=x", "--region=eu --quiet listZones --trace name=x")
    def test_options_stand_anywhere_and_a_region_beats_the_environment(self, line):
        """5.2.0 refuses `cs listZones -q name=x`, and ignores --region when CLOUDSTACK_ENDPOINT is set."""
        text = f"[eu]\nendpoint = {self.server.endpoint}\nkey = k\nsecret = s\nmethod = get\nheader_x-tenant = t\n"
        self.write("work/cloudstack.ini", text)
        environ(endpoint=ENDPOINT)
        self.server.requests.clear()
        code, out, err = self.main(*line.split())
        self.assertEqual((0, ZONES_TEXT, "GET http://"), (code, out, err[:11]))
        (record,) = self.server.requests
        self.assertEqual(("k", "x", "t"), (record.params["apiKey"], record.params["name"], record.headers["x-tenant"]))

    @each("line, says",
          # options: unknown, abbreviated, without a value, with one that they cannot have
          *[(line, "there is no option " + says) for line, says in (
              ("--nope listZones", "'--nope'"), ("listZones -x 5", "'-x'; parameters are"), ("listZones -qx", "'-x'"),
              ("listZones -v", "'-v'; did you mean --version?"), ("--xyzzy", "'--xyzzy'; parameters"),
              ("-S listZones", "'-S'; did you mean --sort or --sync or --stop-on-error?"),
              ("--ouput=json", "'--ouput'; did you mean --output?"), ("--id=5", "'--id'; parameters are name=value"),
              ("listZones -", "'-'"), ("listZones ---", "'---'"), ("--dry listZones", "'--dry'"))],
          ("listZones -r", "option --region needs a value"), ("listZones -o -q", "option --output needs a value"),
          ("listZones --wait", "--wait needs a value"), ("listZones --quiet=1", "option --quiet takes no value: '1'"),
          ("listZones -o tabel", "'tabel' is not one of json, jsonl, table, csv, text; did you mean table?"),
          *[("listZones --timeout=" + value, "timeout: ") for value in ("abc", "0", "-1")],
          ("listZones --retry 1.5", "retry: "), ("listZones --retry=-1", "retry: "), ("-r mars listZones", "'mars'"),
          ("--shell listZones", "--shell does not go with a command"),
          ("listZones json=false --where id=1", "--where does not go with json=false"),
          # words: no command, or not where it should be; what is no parameter
          ("", "no command"), ("-q", "no command"), ("--wait j a=b", "--wait takes ids"),
          *[(line, "is not the name of a command") for line in ("name=x", "list\x01Zones", "list\udcff")],
          ("-q listZones x", "'x' has no '='; parameters are name=value, such as id=name:web-01"),
          ("listZones =x", "'=x' has no name; parameters are name=value"),
          ("listZones json=maybe", "json='maybe' is neither true nor false"), ("listZones fetch_list=", "fetch_list"),
          *[("listZones " + word, says) for word, says in (
              ("keyword=a\x1bb", "keyword"), ("keyword=a\udcffb", "keyword"), ("a\x1bb=x", "U+001B"),
              ("name=@missing", "file 'missing'"), ("--dry-run name=\x01", "name"))])
    def test_what_is_refused_in_one_line_before_anything_is_sent(self, line, says):
        self.refused(*line.split(" ") if line else (), says=[says])

    @each("given, sent, literal", *[("name=" + sent, sent, None) for sent in (
              "x", "", "a=b", "'x\"", "'", "~+*%20&x", "z\u00fcrich \u20ac \U0001f511", "True", "-q", "a@b",
              '"x","y"', "'x' , 'y'")],
          ("name=  x \t", "x", None), (" name = x ", "x", None), ("name=@@x", "@x", None), ("name=@@@x", "@@x", None),
          *[("name=" + given, given[1:-1], "quoted") for given in (
              '""', "'x'", "' x '", "\"'x'\"", '""x""', "'@x'", "'{\"x\",\"y\"}'")])
    def test_a_value(self, given, sent, literal):
        """A text, and whether it was quoted."""
        self.assertEqual({"name": [(sent, literal)]}, cs._parse_parameters([given]))
        self.assertEqual({"name": sent}, self.asked_with("listZones", "--", given))

    def test_repeated_names_are_joined_in_the_order_given(self):
        """5.2.0 sorts and de-duplicates them, although the order of networkids matters."""
        args = ["networkids=c", "zoneid=1", "networkids=a", "networkids=c", "networkids= b ", "a[0].b=1", "a[1].b=2"]
        self.assertEqual({"networkids": "c,a,c,b", "zoneid": "1", "a[0].b": "1", "a[1].b": "2"},
                         self.asked_with("deployVirtualMachine", "--async", *args))

    @each("content, sent", ("x", "x"), ("x\n\n", "x\n"), ("  'x' \n", "  'x' "), ("@@x\n", "@@x"), ("a\r\n", "a"),
          ("z\u00fcrich\n", "z\u00fcrich"), ("", ""), ("\ufeffa b\n", "a b"))
    def test_a_value_from_a_file_or_standard_input(self, content, sent):
        self.write("value", content)
        self.assertEqual({"name": sent}, self.asked_with("listZones", "name= @~/value "))
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode("utf-8")), encoding="ascii")):
            self.assertEqual({"name": sent}, self.asked_with("listZones", "name=@-"))

    def test_a_repeated_name_keeps_what_each_value_is(self):
        path = self.write("f", "name:b\n")
        self.assertEqual({"ids": [("name:a", None), ("name:b", "file")]},
                         cs._parse_parameters(["ids=name:a", "ids=@" + path]))

    @each("content, sent",
          (b"#cloud-config\npackages: [nginx]\n", "I2Nsb3VkLWNvbmZpZwpwYWNrYWdlczogW25naW54XQo="),
          (b"I2Nsb3Vk\nLWNvbmZpZwo=\n", "I2Nsb3VkLWNvbmZpZwo="), (b"\x1f\x8b\xff", "H4v/"), (b"", ""), (b"abc", "YWJj"))
    def test_a_file_of_userdata_is_made_base64_unless_it_is(self, content, sent):
        path = self.write("userdata", content)
        self.assertEqual({"UserData": sent}, self.asked_with("deployVirtualMachine", "UserData=@" + path))

    def test_what_cannot_be_a_value(self):
        binary = self.write("binary", b"\xff\x00")
        for value, says in (("@" + binary, "is not UTF-8 text"), ("@" + self.home, "directory"), ("@", "'@'")):
            self.refused("listZones", "name=" + value, says=["name", says.strip("'")])
        for stdin in (io.TextIOWrapper(io.BytesIO(b"\xff")), None):
            with mock.patch("sys.stdin", stdin):
                self.refused("listZones", "name=@-", says=["name", "standard input"])

    def test_control_arguments_are_not_sent(self):
        words = ("json=true", "fetch_list=no", "fetch_result=off", "opcode_name=command")
        self.assertEqual({}, self.asked_with("listZones", *words))
        self.replies(listZones=[{"r": {"count": 3, "zone": [1, 2, 3]}}])
        self.assertEqual([1, 2, 3], json.loads(self.good("listZones", "fetch_list=YES")))
        self.good("listZones", "opcode_name=cmd")
        self.assertEqual(("listZones", None), tuple(map(self.server.requests[-1].params.get, ("cmd", "command"))))
        self.replies(listZones=(200, "<zone>z\u00fcrich</zone>\x1b[1m"))
        self.assertEqual("<zone>z\u00fcrich</zone>\x1b[1m\n", self.good("listZones", "json=false"))
        self.assertNotIn("response", self.server.requests[-1].params)
        self.replies(listZones=(200, ""))
        self.assertEqual("", self.good("listZones", "json=false"))

    def test_version_and_help_need_no_configuration(self):
        self.unset("endpoint", "key", "secret")
        for args in (["--version"], ["-q", "listZones", "--version"]):
            self.assertEqual(f"cs {cs.__version__}\n", self.good(*args))
        with mock.patch("sys.argv", ["/usr/bin/cs", "-h"]), contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(0, cs.main())
        lines = out.getvalue().splitlines()
        self.assertTrue(lines[0].startswith("cs [options] COMMAND [name=value ...]"))
        self.assertEqual((True, True), (len(lines) <= 24, max(map(len, lines)) <= 80), "it does not fit a screen")


class OutputTest(CommandLineCase):
    """What is printed where, and the exit code."""

    @each("document, printed", ({"r": {}}, ""), ({"r": []}, ""), ({"r": None}, ""), ({"r": 0}, "0\n"),
          ({"r": False}, "false\n"), ({"r": "text"}, '"text"\n'), (ZONES_ANSWER, ZONES_TEXT))
    def test_json_with_indent_2_and_sorted_keys_and_text_as_it_is(self, document, printed):
        """5.2.0 prints \\u00fc for what is no ASCII."""
        self.replies(listZones=document)
        self.assertEqual(printed, self.good("listZones"))

    def test_what_would_harm_a_terminal_is_escaped_and_valid_json(self):
        text = "a\ud800\x1b[2J\x7f\x9b\u202e\u2066\u2028\tb\nc"
        self.replies(listZones={"r": {"name": text}})
        out = self.good("listZones")
        self.assertEqual({"name": text}, json.loads(out))
        self.assertEqual([], re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066\u2028\ud800]", out))
        self.replies(listZones=(503, "<html>\x1b]0;title\x07</html>"))
        self.assertIn("<html>\\x1b]0;title\\x07</html>", self.fails(1, "listZones"))

    @each("encoding, errors, printed", ("ascii", "strict", b"z\\xfcrich \\u20ac\n"),
          ("latin-1", "strict", b"z\xfcrich \\u20ac\n"),
          ("ascii", "surrogateescape", "z\u00fcrich \u20ac\n".encode()))  # the last: Python 3.6 under a C locale
    def test_a_standard_output_that_cannot_show_every_letter(self, encoding, errors, printed):
        self.replies(listZones=(200, "z\u00fcrich \u20ac"))
        raw = io.BytesIO()
        with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="\n")):
            self.assertEqual(0, cs.main(["listZones", "json=false"]))
            self.assertEqual(printed, raw.getvalue())

    @each("settings, says", ({"timeout": "0.05"}, "timeout"), ({"endpoint": "http://127.0.0.1:1/"}, "refused"),
          ({"endpoint": "https"}, "TLS"))
    def test_no_answer_is_exit_code_3(self, settings, says):
        self.replies(listZones=forever)
        environ(**settings)
        if settings.get("endpoint") == "https":
            environ(endpoint=self.server.endpoint.replace("http:", "https:"))
        err = self.fails(3, "listZones", "password=" + PASSWORD)
        self.assertTrue(err.startswith("CloudStack error: "), err)
        self.assertIn(says, err)
        self.assertNoCanary(err)
        self.assertEqual((3, "", ""), self.main("listZones", "-q"))

    @each("broken", mock.Mock(**{"write.side_effect": OSError(28, "No space left on device")}), None)
    def test_standard_error_that_cannot_be_written_is_no_matter(self, broken):
        self.replies(listZones=(431, refusal(431, "no")))
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(broken):
            self.assertEqual(1, cs.main(["listZones", "-t"]))
        self.assertEqual(refusal(431, "no"), json.loads(out.getvalue()))

    def test_a_failure_of_status_200_is_one_and_stays_one_when_nobody_reads_its_answer(self):
        self.replies(updateZone=[{"r": {"success": False}}, {"r": {"success": "false"}}, refusal(431, "no")])
        self.assertEqual([1, 1, 1], [self.main("updateZone", "id=1")[0] for _ in range(3)])
        with mock.patch("sys.stdout", io.StringIO()) as out:
            out.flush = mock.Mock(side_effect=BrokenPipeError)
            self.assertEqual((1, 0), (cs.main(["updateZone", "id=1"]), cs.main(["listZones"])))


class CommandLineJobsTest(CommandLineCase):
    """Commands that start a job."""

    def setUp(self):
        super().setUp()
        self.replies(deployVirtualMachine=DEPLOYED_JOB)

    def test_a_job_is_waited_for_unless_async(self):
        self.replies(queryAsyncJobResult=[job_pending(), job_done({"virtualmachine": {"id": "vm-1"}})])
        self.assertEqual({"virtualmachine": {"id": "vm-1"}}, json.loads(self.good("deployVirtualMachine")))
        self.assertEqual(["deployVirtualMachine"] + ["queryAsyncJobResult"] * 2, self.server.commands)
        self.replies(**{"*": DEPLOYED_JOB})
        for line in ("deployVirtualMachine --async", "deployVirtualMachine fetch_result=false", "doThingAsync"):
            self.server.requests.clear()
            self.assertEqual(DEPLOYED_JOB["r"], json.loads(self.good(*line.split())))
            self.assertEqual([line.split()[0]], self.server.commands)

    @each("line", "deployVirtualMachine", "--wait job-1")
    def test_what_becomes_of_a_job(self, line):
        reason = {"errorcode": 533, "cserrorcode": 4535, "errortext": "no capacity \x1b[1m"}
        args, failed = line.split(), job_done(reason, 2)
        self.replies(queryAsyncJobResult=[job_pending(), job_done({"success": True})])
        self.assertEqual({"success": True}, json.loads(self.good(*args)))
        self.replies(queryAsyncJobResult=failed)
        code, out, err = self.main(*args)
        self.assertEqual((1, failed), (code, json.loads(out)))
        self.assertEqual(["CloudStack error: Job failure: no capacity \\x1b[1m", f"  Call: cs {line}",
                          f"  Server: {self.server.endpoint}", "  Codes: errorcode 533, cserrorcode 4535"],
                         err.splitlines()[:4])
        self.assertIn("\n  Hint: There is no room", err)
        self.replies(queryAsyncJobResult=job_pending)
        args += ["--job-timeout", "0.03", "--poll-interval", "0.01"]
        self.assertHolds(self.fails(4, *args), "Timeout waiting for async job result", "cs --wait job-1")
        self.assertIn("cs --wait job-1", self.fails(4, "-q", *args))

    def test_a_job_id_that_cannot_be_sent_is_no_usage_error(self):
        """It was the server's word, and a machine may be on its way."""
        self.replies(deployVirtualMachine={"r": {"jobid": "1\x1b[2J"}})
        err = self.fails(1, "deployVirtualMachine")
        self.assertTrue(err.startswith("CloudStack error: "), err)
        self.assertNotIn("\x1b", err)

    @each("recover, line, told",
          ("true", "deployVirtualMachine", r"; if it started a job, this waits for it: cs --wait [0-9a-f-]{36}"),
          ("false", "deployVirtualMachine", "; check before you send it again."), ("true", "listZones", None))
    def test_an_interrupt_before_the_answer_tells_what_may_have_run(self, recover, line, told):
        environ(recover=recover)
        with mock.patch.object(cs.CloudStack, "_exchange", side_effect=KeyboardInterrupt):
            err = self.fails(130, line)
        self.assertRegex(err, rf"\AInterrupted\. {line} may have run{told}\n\Z" if told else r"\A\Z")


class TraceTest(CommandLineCase):
    """--trace shows every exchange and nothing secret."""

    QUERY = "apiKey=***&command=listZones&expires=NOW&name=x&response=json&signature=***&signatureVersion=3"
    ANSWER = ["200 OK", "Content-Type: application/json", f"Content-Length: {len(json.dumps(ZONES_ANSWER))}",
              json.dumps(ZONES_ANSWER), "(TIME)"]

    def lines(self, code, *args):
        """The trace of a command line without its blank lines, and with what changes from run to run replaced."""
        err = self.says(code, "-t", *args)
        self.assertNoCanary(err)
        err = re.sub(r"expires=20\d\d-\d\d-\d\dT\d\d%3A\d\d%3A\d\d%2B0000", "expires=NOW", err)
        err = err.replace(self.server.address, "http://host")
        return [re.sub(r"^\(\d+ ms\)$", "(TIME)", line) for line in err.splitlines() if line]

    def test_get_and_post(self):
        own = ["User-Agent: cs/" + cs.__version__, "Accept-Encoding: identity"]
        form = ["Content-Type: application/x-www-form-urlencoded", self.QUERY]
        self.assertEqual(["GET http://host/client/api?" + self.QUERY] + own + self.ANSWER,
                         self.lines(0, "listZones", "name=x"))
        self.assertEqual(["POST http://host/client/api"] + own + form + self.ANSWER,
                         self.lines(0, "listZones", "name=x", "--post"))
        environ(endpoint=self.server.address + "?site=" + PASSWORD)
        self.assertTrue(self.lines(0, "listZones")[0].startswith("GET http://host/?"))

    def test_every_exchange_and_every_kind_of_end(self):
        self.replies(deployVirtualMachine=DEPLOYED_JOB, queryAsyncJobResult=[job_pending(), job_done({"a": 1})])
        lines = self.lines(0, "deployVirtualMachine")
        self.assertEqual((3, 3), (lines.count("200 OK"), lines.count("(TIME)")))
        environ(timeout="0.05")
        self.replies(listZones=forever)
        lines = self.lines(3, "listZones", "password=" + PASSWORD)
        self.assertTrue([line for line in lines if line.startswith("No answer from http://host/client/api")], lines)


class DryRunTest(CommandLineCase):
    """--dry-run prints what would be sent, and sends nothing."""

    def plan(self, *args):
        out = self.good("--dry-run", *args)
        self.assertNoCanary(out)
        self.assertEqual([], self.server.requests)
        head, *lines = out.splitlines()
        return head, dict(line.split("=", 1) for line in lines)

    def test_method_address_and_parameters(self):
        head, params = self.plan("listZones", "name=z\u00fcrich &\u202ex", "tags[0].key=a", "page=2", "fetch_list=no")
        self.assertRegex(params.pop("expires"), r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+0000$")
        expected = {"name": "z\u00fcrich &\\u202ex", "tags[0].key": "a", "page": "2", "pagesize": "500",
                    "apiKey": "***", "command": "listZones", "response": "json", "signature": "***",
                    "signatureVersion": "3"}
        self.assertEqual((f"GET {self.server.endpoint}", expected), (head, params))
        head, params = self.plan("updateUser", "password=" + PASSWORD, "details[0].userdata=" + USERDATA)
        self.assertEqual(f"POST {self.server.endpoint}", head)
        self.assertLessEqual({"password": "***", "details[0].userdata": "***"}.items(), params.items())

    def test_sessions_unsigned_clients_and_jobs(self):
        self.assertEqual("job-1", self.plan("--wait", "job-1")[1]["jobid"])
        self.unset("key", "secret")
        self.assertEqual({"command": "listZones", "response": "json"}, self.plan("listZones")[1])
        environ(username="admin", password=PASSWORD)
        self.assertNotIn("signature", self.plan("listZones")[1])
        self.assertEqual(36, len(self.plan("deployVirtualMachine")[1]["customjobid"]))


class BadInputTest(CommandLineCase):
    """One clear line that names the setting, before anything is sent; what is refused, the settings' own tests ask."""

    @each("settings, says", ({"timeout": "abc"}, "timeout: "), ({"endpoint": f"http://u:{PASSWORD}@h/"}, "endpoint: "),
          ({"username": "u"}, "password: missing"), ({"header_x": PASSWORD + "\r\nX-Admin: 1"}, "header"),
          ({"endpoint": "https://127.0.0.1:1/", "verify": "/missing.pem"}, "/missing.pem"))
    def test_a_setting_that_cannot_be_used(self, settings, says):
        environ(**settings)
        self.assertNoCanary(self.refused("listZones", says=[says]))


class CommandLineProcessTest(CommandLineCase):
    """What only a process of its own can show."""

    def start(self, *args, **options):
        command = options.pop("command", [sys.executable, CS_PATH])
        child = Child(command + list(args), **options)
        self.addCleanup(child.end)
        return child

    def finish(self, child):
        """(exit code, standard output, standard error) of a child."""
        code, out, err = child.finish()
        return code, out.decode("utf-8"), err.decode("utf-8")

    @staticmethod
    def until_blocked(child):
        """Wait until a child waits for something itself. An interrupt that comes while a module is imported may be
        lost in the interpreter."""
        if not os.path.exists(f"/proc/{child.pid}/stat"):
            time.sleep(0.5)
            return
        states = ""
        while not states.endswith("SSSSS"):
            with open(f"/proc/{child.pid}/stat") as file:
                states += file.read().rpartition(") ")[2][0]
            time.sleep(0.01)

    @each("command", [sys.executable, CS_PATH], [sys.executable, "-m", "cs"])
    def test_cs_py_and_python_m_cs_are_the_same_program(self, command):
        env = dict(os.environ, PYTHONDEVMODE="1", PYTHONWARNINGS="default")  # nothing is left open
        child = self.start("listZones", command=command, cwd=os.path.dirname(CS_PATH), env=env)
        self.assertEqual((0, ZONES_TEXT, ""), self.finish(child))

    @posix_only
    def test_a_reader_that_closes_early(self):
        self.replies(listZones={"r": {"zone": ["x" * 1000] * 1000}})
        child = self.start("listZones")
        self.assertEqual(b"{", child.stdout.read(1))
        child.stdout.close()
        self.assertEqual((b"", 0), (child.stderr.read(), child.wait()))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk(self):
        with open("/dev/full", "wb") as full:
            code, out, err = self.finish(self.start("listZones", stdout=full))
        self.assertEqual((1, 1), (code, err.count("\n")))
        self.assertIn("No space left on device", err)

    @posix_only
    @each("closed, args, expected", (1, "listHosts", 1), (1, "--version", 0), (2, "listHosts -t", 1))
    def test_no_standard_output_or_error_at_all(self, closed, args, expected):
        self.replies(listHosts=(431, refusal(431, "no")))
        shell = ["sh", "-c", f'exec "$0" "$@" {closed}>&-', sys.executable, CS_PATH]
        code, out, err = self.finish(self.start(*args.split(), command=shell))
        self.assertEqual(expected, code, err)
        self.assertNotIn("Traceback", err)
        if closed == 2:
            self.assertEqual(refusal(431, "no"), json.loads(out))

    @unittest.skipUnless(os.path.exists("/proc/self/cmdline"), "needs /proc")
    def test_the_process_list_shows_no_secret(self):
        asked, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)
        self.replies(updateUser=lambda record: asked.set() or (release.wait(CHILD_LIMIT) and {"r": {}}))
        child = self.start("updateUser", "password=@" + self.write("password", PASSWORD), "-t")
        self.assertTrue(asked.wait(CHILD_LIMIT))
        line = open_bytes(f"/proc/{child.pid}/cmdline")
        self.assertEqual(b"", open_bytes(f"/proc/{child.pid}/task/{child.pid}/children"))
        release.set()
        self.assertEqual(0, self.finish(child)[0])
        self.assertEqual((True, False), (b"updateUser" in line, b"CANARY" in line))
        self.assertEqual(PASSWORD, self.server.requests[0].params["password"])


class ThemeTest(CommandLineCase):
    @each("args, styles", (["listZones"], ["autumn"]), (["listZones", "--theme", "monokai"], ["monokai"]),
          (["--theme=nosuch", "listZones"], ["nosuch"]), (["listZones", "--color", "never"], []))
    def test_json_on_a_terminal_is_coloured_by_pygments(self, args, styles):
        """The option beats the setting; a theme that Pygments does not have colours nothing."""
        modules = {"pygments": mock.Mock()}
        used = []

        def formatter(style="default"):
            used.append(style)
            if style == "nosuch":
                raise ValueError(style)  # of which Pygments' ClassNotFound is a kind

        modules["pygments"].formatters.Terminal256Formatter = formatter
        modules["pygments"].highlight = lambda text, lexer, formatter: f"<{text}>"
        environ(theme="autumn")
        with mock.patch.dict(sys.modules, modules), mock.patch.dict(os.environ, TERM="xterm"):
            with contextlib.redirect_stdout(FakeTerminal()) as out:
                self.assertEqual(0, cs.main(args))
        text = "<" + ZONES_TEXT.rstrip("\n") + ">\n" if styles and styles != ["nosuch"] else ZONES_TEXT
        self.assertEqual((styles, text), (used, out.getvalue()))


# === [8.2] progress and errors ========================================================================================

JOB_DONE = {"jobid": "j-1", "jobstatus": 1, "jobresult": {"success": True}}
JOB_FAILED = {"jobid": "j-1", "jobstatus": 2, "jobresultcode": 533,
              "jobresult": {"errorcode": 533, "cserrorcode": 4535, "errortext": "full"}}


class OptionsTest(CloudCase):
    def test_every_way_to_write_options(self):
        args = "-qt -ojson -o=csv --sort -name --where a=1 --where=b=2 -- --wait - -r lab".split()
        options = {name: value for name, value in cs._parse_arguments(args)[0].items() if value is not None}
        self.assertEqual({"quiet": True, "trace": True, "output": "csv", "sort": "-name", "where": ["a=1", "b=2"],
                          "wait": "-", "region": "lab"}, options)

    def test_options_of_a_call(self):
        words = "--timeout 7 --retry 0 --job-timeout 9 --poll-interval 3 --post".split()
        invocation = cs._Invocation(cs._parse_arguments(words)[0])
        invocation.connect()
        names = ("timeout", "retry", "job_timeout", "poll_interval", "method", "recover")
        self.assertEqual([7, 0, 9, 3, "post", True], [invocation.client.get_setting(name) for name in names])


class ExitsTest(CloudCase):
    """How a command ends, and what its account says."""

    JOB = "11111111-2222-4333-8444-555555555555"

    @each("code", 401, 432, 531)
    def test_an_accepted_job_whose_poll_is_refused_may_still_run(self, code):
        self.reply("startThing", {"jobid": self.JOB})
        self.say_error("queryAsyncJobResult", code)
        err = self.says(1, "startThing")
        self.assertHolds(err, "  Hint: The command was accepted; only asking for its job failed.\n",
                         f"Job {self.JOB} may still be running; to go on waiting for it: cs --wait {self.JOB}\n")

    @each("args, told", (["startThing"], "\n  Left behind: VirtualMachine vm-1\n"),
          (["startThing", "ids=vm-0,vm-1"], ""), (["--wait", "job-1"], "\n  It was about: VirtualMachine vm-1\n"))
    def test_a_failed_job_says_what_it_leaves_behind_and_nothing_of_its_request(self, args, told):
        """What the call names was there before; --wait cannot tell."""
        self.reply("startThing", {"jobid": self.JOB})
        self.reply("queryAsyncJobResult", {"jobstatus": 2, "jobinstancetype": "VirtualMachine", "jobinstanceid": "vm-1",
                   "jobresult": {"errorcode": 431, "errortext": "used"}})
        err = self.says(1, *args)
        self.assertIn(told, err)
        self.assertEqual(bool(told), "VirtualMachine" in err)
        self.assertLacks(err, "Hint: ", "to go on waiting")

    def test_several_jobs_the_first_failure_counts(self):
        done = {"jobstatus": 1, "jobresult": {"success": True}}
        failed = {"jobstatus": 2, "jobresult": {"errorcode": 530, "errortext": "full"}}
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"j-1\nj-2\n"))):
            self.reply("queryAsyncJobResult", done, failed, done)
            code, out, err = self.main("--wait", "-", "j-3", "-o", "jsonl")
        self.assertEqual(1, code)
        self.assertEqual(['{"success": true}'] * 2, out.splitlines())
        self.assertEqual(["j-1", "j-2", "j-3"], [record.params["jobid"] for record in self.cloud.requests])
        self.assertIn("Call: cs --wait j-2 j-3\n", err)

    def test_an_interrupt_names_the_jobs_that_are_left(self):
        with mock.patch.object(cs.CloudStack, "_exchange", side_effect=[KeyboardInterrupt]):
            code, _, err = self.main("--wait", "j-1", "j-2")
        self.assertEqual((130, "cs --wait j-1 j-2"), (code, err.strip()[-17:]))

    @each("args", ["--wait", "id=1"], ["--wait", "-"], ["--wait", "a:b"])
    def test_what_cannot_be_waited_for(self, args):
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b""))):
            self.assertIn("--wait takes ids of jobs", self.usage(*args))

    def test_hints_carry_the_configuration_of_the_call(self):
        self.say_error("listThings", 432)
        err = self.says(1, "listThings", "--endpoint", self.cloud.endpoint)
        self.assertIn(f": cs --endpoint {self.cloud.endpoint} --sync, then", err)

    def test_a_401_without_a_key_says_so(self):
        self.unset("key", "secret")
        environ(api_key="k", header_="x")  # nor is the latter a header
        self.say_error("listThings", 401)
        err = self.says(1, "listThings", "-o", "text")
        self.assertHolds(err, "Warning: not known as settings: 'CLOUDSTACK_API_KEY' (key?), 'CLOUDSTACK_HEADER_",
                         "  Hint: There was no key, so the request was not signed.\n")

    @each("section, env, told", ("url = {}", {}, "'url' in"), ("endpiont = {}", {}, "(endpoint?)"),
          ("endpoint = {}\nkey = k\nsecret_key = s", {}, "(secret?)"),
          (None, {"api_url": "http://e/", "header_": "x"}, "'CLOUDSTACK_API_URL', 'CLOUDSTACK_HEADER_'"))
    def test_settings_as_other_tools_spell_them_are_named_when_one_is_missing(self, section, env, told):
        self.unset("endpoint", "key", "secret")
        environ(**env)
        path = self.ini("[cloudstack]\n" + section.format(self.cloud.endpoint)) if section else ".cloudstack.ini"
        self.assertHolds(self.usage("listZones"), "; not known as settings: ", told, path)

    def test_secrets_in_the_server_s_words_are_masked(self):
        words = "Invalid parameter password value={} due to signature {}"  # which a hint is made of
        self.say_error("updateUser", 431, words.format("hunter2hunter2", os.environ["CLOUDSTACK_SECRET"]))
        err = self.says(1, "updateUser", "id=1", "password=hunter2hunter2", "-o", "text")
        self.assertLacks(err, "hunter2", os.environ["CLOUDSTACK_SECRET"])
        self.say_error("updateUser", 431, words.format("hunter2" * 2000, ""))
        self.assertLacks(self.says(1, "updateUser", "id=1", "password=" + "hunter2" * 2000), "hunter2")

    def test_an_empty_list_is_said_to_a_person(self):
        for both, expected in ((True, "no rows\n"), (False, "")):
            self.reply("listThings", {})
            code, out, err = self.on_terminal("listThings", both=both)
            self.assertEqual((0, expected), (code, out + err))

    def test_alone_without_a_configuration_it_says_how_to_make_one(self):
        self.unset("endpoint", "key", "secret")
        with mock.patch("sys.stdin", FakeTerminal()):
            code, out, err = self.on_terminal()
        self.assertEqual((2, ""), (code, out))
        self.assertHolds(err, "`cs --configure` makes one", "CLOUDSTACK_ENDPOINT, CLOUDSTACK_KEY, CLOUDSTACK_SECRET")


@unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs POSIX signals")
class SignalsTest(CloudCase):
    """The first signal ends the wait; others do not cut its account."""

    def setUp(self):
        super().setUp()
        admin = self.cloud.users["admin"]
        self.unset("key", "secret")
        self.configure(username="admin", password=admin.password)

    @each("first", signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None))
    @each("seconds", 0.0, 0.03, 0.5)
    def test_two_signals(self, first, seconds):
        self.option(job_seconds=30)
        del self.cloud.requests[:]
        machine = self.cloud.cloud.named("virtualmachine", "web-01")["id"]
        child = Child([sys.executable, CS_PATH, "rebootVirtualMachine", "id=" + machine], env=dict(os.environ))
        until(lambda: "queryAsyncJobResult" in self.asked, "a poll")
        child.send_signal(first)
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        code, out, err = child.finish()
        self.assertEqual((130, b""), (code, out))
        self.assertRegex(err, rb"\AInterrupted. Job \S+ may still be running; to go on .*: cs --wait \S+\n\Z")

    def test_a_signal_does_not_cut_the_report_of_a_failure(self):
        report = cs._report
        with mock.patch.object(cs, "_report", lambda *args: os.kill(os.getpid(), signal.SIGINT) or report(*args)):
            self.assertIn("CloudStack error: ", self.says(1, "listNothing"))

    @unittest.skipUnless(sys.implementation.name == "cpython", "where a trace function stands for a signal's handler")
    def test_ctrl_c_is_never_lost(self):
        """Python drops what is raised while it disposes of an object, and a handler runs wherever a function begins."""
        gc.collect()  # clients of other tests: what ends them is dropped there
        gc.disable()
        self.addCleanup(gc.enable)
        client, begun, lost, place = cs.CloudStack(**cs.read_config()), [None], [], -1

        def interrupt(frame, event, arg):
            begun.append(frame.f_code)
            if len(begun) > place:
                sys.settrace(None)
                raise KeyboardInterrupt

        while len(begun) > place:  # else all of them were tried
            place += 1
            begun.clear()
            client.listZones()
            with contextlib.redirect_stderr(io.StringIO()):  # objects that were not finished are disposed of
                try:
                    sys.settrace(interrupt)
                    client.listZones()
                    sys.settrace(None)
                    lost += begun[place:]
                except KeyboardInterrupt:
                    pass
        with contextlib.redirect_stderr(io.StringIO()):
            gc.collect()  # or these objects would be told of in another test
        self.assertEqual([], [code for code in lost if code.co_filename == cs.__file__])
        self.assertGreater(place, 100)

    def test_what_was_ignored_stays_ignored_and_usual_effects_come_back(self):
        before = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
                  signal.SIGHUP: signal.SIG_IGN}
        for number, handler in before.items():
            self.addCleanup(signal.signal, number, signal.signal(number, handler))
        interrupts = cs._Interrupts()
        with interrupts:
            self.assertEqual(signal.SIG_IGN, signal.getsignal(signal.SIGHUP))
            with self.assertRaises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)  # not the first: without effect
            interrupts._quiet_until -= 2
            with self.assertRaises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)  # the first may be lost, in a finalizer
                time.sleep(1)
            interrupts.is_over, interrupts._quiet_until = True, 0.0
            os.kill(os.getpid(), signal.SIGINT)
        self.assertEqual(before, {number: signal.getsignal(number) for number in before})


class ProgressTest(CloudCase):
    """One line on standard error, on a terminal only, and gone when the work is done."""

    options = {"job_seconds": 0.15, "default_page_size": 500}

    def job(self, *outcomes, jobid="j-1"):
        self.reply("startThing", {"jobid": jobid})
        self.reply("queryAsyncJobResult", {"jobid": "j-1", "jobstatus": 0}, *outcomes)

    @each("line, outcome, code, progress, left",
          ("startThing -o text", JOB_DONE, 0, r"job j-1, \d s", r"true\n\Z"),
          ("--wait j-1 -o text", JOB_DONE, 0, r"job j-1, \d s", r"true\n\Z"),
          ("startThing", JOB_FAILED, 1, r"job j-1, \d s", "CloudStack error: Job failure: full\n"),
          ("listVirtualMachines --all pagesize=10 -o jsonl -c id", None, 0, r"\d+ of 32 rows",
           r'(\{"id": "[0-9a-f-]{36}"\}\n){32}\Z'),
          ("startThing -o text -q", JOB_DONE, 0, None, r"true\n\Z"), ("startThing -t", JOB_DONE, 0, None, "GET http"))
    def test_it_is_shown_while_something_is_awaited_and_gone_before_anything_is_written(
            self, line, outcome, code, progress, left):
        self.job(outcome)
        self.option(default_page_size=10)
        ended, text, _ = self.on_terminal(*line.split(), "--color", "never", both=True)
        self.assertEqual(code, ended, text)
        self.assertRegex(screen(text), r"\A" + left)
        if progress:
            self.assertRegex(text, progress)
            self.assertNotIn("queryAsyncJobResult", text)
        else:
            self.assertNotIn("\x1b", text)

    @each("env", {"term": "dumb"}, {"CLOUDSTACK_TRACE": "true"})
    def test_there_is_none_where_it_is_not_wanted(self, env):
        self.job(JOB_DONE)
        self.assertNotIn("\x1b", self.on_terminal("startThing", "--color", "never", both=True, **env)[1])
        self.job(JOB_DONE)
        self.assertEqual("true\n", self.good("startThing", "-o", "text"))  # no terminal

    def test_there_is_none_while_a_pipe_s_reader_may_write_to_the_same_terminal(self):
        self.job(JOB_DONE)
        pipe = mock.Mock(**{"isatty.return_value": False, "seekable.return_value": False})
        with mock.patch.dict(os.environ, TERM="xterm"), contextlib.redirect_stderr(FakeTerminal()) as err:
            with contextlib.redirect_stdout(pipe):
                self.assertEqual((0, ""), (cs.main(["startThing", "-o", "text"]), err.getvalue()))

    def test_an_interrupt_is_told_in_its_place(self):
        self.job(jobid="j-1\u202e")
        with mock.patch.object(cs, "_sleep", side_effect=KeyboardInterrupt):
            code, text, _ = self.on_terminal("startThing", both=True)
        self.assertHolds(text, "waiting for job j-1\\u202e, ")
        self.assertRegex(screen(text), r"\AInterrupted\. Job j-1\\u202e .*cs --wait 'j-1\\u202e'\n\Z")


class ErrorTextsTest(CloudCase):
    """What was asked, what was answered, its codes, what to try."""

    def error(self, code, *args):
        """What a command line that must end with this exit code says of an error."""
        err = self.says(code, *args)
        self.assertTrue(err.startswith("CloudStack error: "), err)
        self.assertNotIn("Traceback", err)
        return err

    def test_an_error_of_the_server_in_full(self):
        self.say_error("startVirtualMachine", 530, "It broke")
        self.assertEqual(["CloudStack error: HTTP 530 response from CloudStack: It broke",
                          "  Call: cs startVirtualMachine id=5", "  Server: " + self.cloud.endpoint,
                          "  Codes: errorcode 530, cserrorcode 4350", "  Hint: The management server's log says more."],
                         self.error(1, "startVirtualMachine", "id=5").splitlines())

    @each("code, part", (401, "key"), (430, "startThing --help"), (431, "startThing --help"), (432, "cs --list"),
          (429, "--retry"), (503, "--retry"), (530, "log"), (531, "role"), (532, "cs listResourceLimits"),
          (533, "room"), (536, "uses"), (404, "/client/api."))
    def test_each_code_has_something_to_try(self, code, part):
        self.say_error("startThing", code)
        self.assertIn(part, self.error(1, "startThing", "id=5").partition("  Hint: ")[2])

    UUID = "11111111-2222-4333-8444-555555555555"

    @each("line, command, code, text, told",
          ("stopThing projectid=1", "stopThing", 432, "no", "You may not be in this project."),
          ("stopThing id=web-01", "stopThing", 431, "Invalid parameter id value=web-01 due to incorrect long value",
           "id=name:web-01, if that is a name."),
          ("stopThing id={id}", "stopThing", 431, "Invalid parameter id value={id} due to incorrect long value",
           "{id} is filled in from the rows of standard input with --each."),
          ("stopThing id=" + UUID, "stopThing", 431, f"Invalid parameter id value={UUID} due to incorrect",
           "Nothing has this id, or it is not yours."),
          ("--sync", "listApis", 432, "no", "Your role may not ask for the list of commands; calls work without it."),
          ("--wait nope", "queryAsyncJobResult", 431, "no", "The server knows no such job."))
    def test_hints_for_the_call(self, line, command, code, text, told):
        self.say_error(command, code, text)
        err = self.error(1, *line.split())
        self.assertIn(f"  Hint: {told}\n", err)
        self.assertNotIn("may still be running", err)

    @each("status, told", (200, True), (404, True), (405, True), (502, False))
    def test_where_there_is_no_api_the_usual_address_is_told(self, status, told):
        self.cloud.script("listZones", Answer(status, "<html>not here</html>"))
        err = self.error(1, "listZones")
        self.assertHolds(err, "  Call: cs listZones\n", "<html>not here</html>")
        self.assertEqual(told, "  Hint: Check the endpoint: it usually ends in /client/api." in err)

    def test_a_form_that_is_too_large(self):
        self.cloud.script("startThing", Answer(404, "<html>Not Found", {"Content-Type": "text/html"}))
        err = self.error(1, "startThing", "name=@" + self.write("large", "x" * (cs.LONGEST_FORM + 1)))
        self.assertHolds(err, "forms of 1048576 bytes", "  Hint: It is over 1 MiB, the most that servers usually take.")

    def test_what_was_asked_is_shown_without_secrets_cut_and_escaped(self):
        words = "password=HIDDEN details[0].password=HIDDEN userdata=HIDDEN secretkey=HIDDEN privatekey=HIDDEN".split()
        words += ["tags[0].key=password", "tags[0].value=HIDDEN", "name=\u202eshown\u2028", "b=x\n  Codes: none\ty",
                  "text=@" + self.write("text", "x" * 100000), "long=" + "y" * 9000]
        self.say_error("updateThing", 431, EVIL_TITLE)
        err = self.error(1, "updateThing", *words)
        self.assertLacks(err, "HIDDEN", "xxxx", "y" * 600)
        self.assertHolds(err, "shown", "password=***", "\n  Hint: ")
        self.assertEqual([], re.findall(HARMFUL, err))
        self.assertEqual(1, err.count("\n  Codes: "))

    @each("args", ["startThing"], ["--dry-run", "startThing"], ["--sync"], ["startThing", "password=x", "--dry-run"],
          ["startThing", "-t"])
    @each("is_option", False, True)
    def test_the_query_of_an_endpoint_is_not_shown(self, is_option, args):
        self.say_error("startThing", 530)
        self.reply("listApis", {"count": 1, "api": [{"name": "startThing"}]})
        endpoint = self.cloud.endpoint + "?token=HIDDEN"
        if not is_option:
            self.configure(endpoint=endpoint)
        code, out, err = self.main(*(["--endpoint", endpoint] if is_option else []), *args)
        self.assertEqual(1 if args[0] == "startThing" and "--dry-run" not in args else 0, code)
        self.assertIn(self.cloud.endpoint, out + err)
        self.assertLacks(out + err, "HIDDEN")

    @unittest.skipUnless(shutil.which("bash"), "bash is not installed")
    def test_what_was_asked_can_be_pasted_into_a_shell(self):
        """With the configuration that was chosen, a file that was named, quotes, and what the shell would evaluate."""
        path = self.write("a file", "content")
        words = ["name=a b", "x=$(touch pwned)", "y='q'", "z=it's", "u=z\u00fcrich", "f=@" + path]
        self.say_error("startThing", 431)
        err = self.error(1, "startThing", *(words + ["--timeout", "7", "--endpoint", self.cloud.endpoint]))
        line = re.search("  Call: (.*)", err).group(1)
        env = dict(os.environ, LC_ALL="C.UTF-8")
        out = subprocess.check_output(["bash", "-c", 'cs() { printf "%s\\0" "$@"; }; ' + line], env=env)
        self.assertEqual(["--endpoint", self.cloud.endpoint, "startThing"] + words, out.decode().split("\0")[:-1])

    @each("status, kind, form, args", (200, "text/html", "<p>{}</p>", []), (404, "text/plain", "{}", []),
          (403, "application/json", '{{"message": "{}", "x": "', []), (502, "text/html", "<html>{}", []),
          (200, "text/html", "<html>{}", ["json=false"]))
    def test_an_answer_that_is_not_cloudstack_s_is_shown_masked_and_only_its_beginning(self, status, kind, form, args):
        """It is by whoever stands before the server, and may repeat the address."""

        def repeat(record):
            text = form.format(record.path + "?" + record.query) + "x" * 5000 + "THE END"
            return Answer(status, text, {"Content-Type": kind})

        self.cloud.script("listZones", repeat)
        err = self.fails(1, "listZones", "name=shown", *args)
        self.assertHolds(err, "/client/api?", "name=shown")
        self.assertLacks(err, "THE END", self.cloud.key, self.cloud.secret)
        self.cloud.script("listZones", repeat)
        self.assertEqual((1, "", ""), self.main("listZones", "-q", *args))
        self.assertNotRegex(err, "(?i)(apikey|signature)=[^*]")

    @each("args, piped, typed", ([], True, False), (["-o", "json"], True, False), (["-q"], True, True),
          *[(["-o", shape], False, False) for shape in cs.FORMATS if shape != "json"])
    def test_the_body_of_an_error_is_printed_as_json_only_and_not_where_its_text_is_read(self, args, piped, typed):
        body = {"startthingresponse": {"uuidList": [], "errorcode": 431, "cserrorcode": 4350, "errortext": "no"}}
        for run_it, is_printed in ((self.main, piped), (self.on_terminal, typed)):
            self.say_error("startThing", 431)
            code, out, _ = run_it("startThing", "--color", "never", *args)
            self.assertEqual((1, body if is_printed else None), (code, json.loads(out) if out else None))

    def test_a_log_in_that_fails(self):
        """No role is to blame, though the server gives the code for that."""
        self.unset("key", "secret")
        self.configure(username="admin", password="HIDDEN", domain="/")
        err = self.error(1, "listZones", "name=x")
        self.assertHolds(err, "HTTP 531", "  Call: cs listZones name=x\n", "  Hint: Check user name, password")
        self.assertLacks(err, "role", "HIDDEN")

    UNSURE, NO_API = "Check whether it was done before you send it again", "Make sure endpoint"

    @each("command, answer, code, told, untold", ("startThing", RUN_THEN_DROP, 3, UNSURE, NO_API),
          *[(command, Answer(502, "<html>Bad Gateway", {"Content-Type": "text/html"}), 1, told, untold)
            for command, told, untold in (("startThing", UNSURE, NO_API), ("listThings", NO_API, UNSURE))])
    def test_of_a_command_that_changes_something_it_is_told_first_that_it_may_have_run(
            self, command, answer, code, told, untold):
        self.configure(timeout="0.3", recover="false")
        self.cloud.script(command, answer)
        err = self.error(code, command, "id=1")
        self.assertIn(told, err)
        self.assertNotIn(untold, err)

    def test_what_was_never_sent(self):
        self.configure(endpoint="http://127.0.0.1:1/")
        self.assertIn("  Hint: Check the endpoint, its name, the network", self.error(3, "startThing", "id=1"))

    @each("document", {"errorcode": 431}, {"errortext": "only text"}, {"errorcode": None, "errortext": None},
          {"errorcode": "x"}, {"errorcode": [431], "errortext": {"a": 1}}, {"errorcode": 431, "errortext": ""}, {}, [],
          "text", None, 7)
    def test_errors_of_odd_shapes(self, document):
        self.reply("startThing", document, status=431)
        self.assertIn("HTTP 431", self.error(1, "startThing"))


MAY_BE_EMPTY = ("columns", "sort", "theme")  # an empty one asks for nothing, or for what is usual


class FlagSettingsTest(CloudCase):
    """--endpoint, --config, --timeout, --retry, and how options go together."""

    def section(self, name="cloudstack", **settings):
        return f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in sorted(settings.items()))

    def test_endpoint_and_config_come_before_other_sources(self):
        user = self.cloud.users["admin"]
        good = {"endpoint": self.cloud.endpoint, "key": user.key, "secret": user.secret}
        self.unset(*good)
        self.ini(self.section(**dict(good, endpoint="http://cloud.invalid/")))
        self.good("listZones", "--endpoint=" + self.cloud.endpoint)
        self.write("other.ini", self.section(**good) + self.section("lab", endpoint="http://cloud.invalid/"))
        self.configure(config=self.write("broken.ini", "nonsense"))
        self.good("--config=~/other.ini", "listZones")  # it stands for CLOUDSTACK_CONFIG
        self.assertEqual(3, self.main("--config", "~/other.ini", "-r", "lab", "listZones", "--retry", "0")[0])

    def test_an_unknown_region_names_those_of_all_files(self):
        self.unset("endpoint", "key", "secret")
        self.ini(self.section("lab", endpoint="http://lab.invalid/") + self.section("zoo"))
        self.write("work/cloudstack.ini", self.section("cloudstack"))
        self.assertEqual("Error: region 'labs' not in config; there are cloudstack, lab, zoo\n",
                         self.usage("listZones", "-r", "labs"))
        self.assertIn("'x' not in config; there are cloudstack, lab, lab2, zoo",
                      self.usage("listZones", "-r", "x", "--config", self.write("other.ini", self.section("lab2"))))
        os.remove(self.ini(""))
        self.write("work/cloudstack.ini", "")
        self.assertEqual("Error: region 'x' not in config; there are none\n", self.usage("-q", "listZones", "-r", "x"))

    def warned(self, *args):
        """What a command line that must end with 0 says where standard error is a terminal."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(FakeTerminal()) as err:
            with mock.patch.dict(os.environ, TERM="xterm"):
                self.assertEqual(0, cs.main(list(args)))
        return err.getvalue()

    def test_what_is_odd_in_a_file_is_said_on_a_terminal(self):
        self.unset("key", "secret")
        section = self.section(tiemout=5, zzz=1, host="x", output="table", key="k", secret="s")
        path = self.write("other.ini", "[DEFAULT]\nbase = x\n" + section + "header_x-y = %(host)s\n", 0o644)
        warnings = [f"{path} holds a secret and can be read by others; chmod 600 {path}"] * (os.name == "posix")
        warnings += [f"not known as settings: 'tiemout' in {path} (timeout?), 'zzz' in {path}"]
        line = ("listZones", "--dry-run", "--config", path)
        self.assertEqual("".join(f"Warning: {text}\n" for text in warnings), self.warned(*line))
        self.assertEqual("", self.warned("-q", *line))
        self.good(*line)  # no terminal

    @each("option", *[option for option in OPTIONS if option.value and option.name not in MAY_BE_EMPTY])
    def test_an_empty_value_is_a_mistake(self, option):
        """`cs -r "$LAB" destroyVirtualMachine ...` where LAB is not set must not go to the usual region."""
        for args in [["--" + option.name + "="], *([flag, ""] for flag, other in cs._FLAGS.items() if other == option)]:
            self.assertIn(option.name, self.usage("listZones", *args))

    STANDS_ALONE = {"sync", "wait", "list", "shell"}  # takes no command
    REFUSED = [{"each", name} for name in "columns sort wait list sync shell".split()]
    REFUSED += [{"shell", name} for name in ("wait", "list", "sync")]

    def test_any_two_options_together(self):
        """They do something or are refused; nothing is sent with --dry-run, or twice."""
        values = {"FILE": os.devnull, "URL": self.cloud.endpoint, "NAME": "cloudstack", "COUNT": "1", "SECONDS": "5",
                  "JOBID": "j", "CONDITION": "id~.", "STYLE": "x"}
        self.sync()
        for pair in itertools.combinations([option for option in OPTIONS if option.name != "configure"], 2):
            names = {option.name for option in pair}
            args = [] if names & self.STANDS_ALONE else ["listZones"]
            for option in pair:
                value = option.value[0] if isinstance(option.value, tuple) else values.get(option.value, "id")
                args += ["--" + option.name, value] if option.value else ["--" + option.name]
            self.reply("queryAsyncJobResult", {"jobid": "j", "jobstatus": 1, "jobresult": {"id": "1"}})
            del self.cloud.requests[:]
            lacks = names & {"parallel", "stop-on-error"} and "each" not in names
            with self.subTest(args), mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b""))):
                self.assertEqual(2 if lacks or names in self.REFUSED else 0, self.main(*args)[0])
                self.assertEqual([] if "dry-run" in names else sorted(set(self.asked)), sorted(self.asked))

    @each("option", *OPTIONS)
    def test_no_option_takes_a_secret(self, option):
        self.assertNotRegex(option.name, "key|secret|password|token")


    @each("shape", *cs.FORMATS)
    def test_no_format_steers_a_terminal(self, shape):
        """Names that tenants gave, as a cell and as a column."""
        for row in ({"name": EVIL}, {EVIL: "x"}):
            self.reply("listThings", {"count": 1, "thing": [row]})
            code, out, err = self.on_terminal("listThings", "-o", shape, "--color", "never")
            self.assertEqual((0, []), (code, re.findall(HARMFUL, out.replace("\r\n", "\n") + err)), out)


# === [8.3] formats ====================================================================================================


WEB = {"id": "1", "name": "web", "state": "Running"}


class RowsCase(CloudCase):
    """Its lists have these rows."""

    ROWS = []  # type: list

    def rows(self, *rows, times=1):
        """Have so many lists answered with these rows, or those of the class."""
        rows = list(rows) or self.ROWS
        self.reply("listThings", *[{"count": len(rows), "thing": rows}] * times)


class FormatsTest(RowsCase):
    ROWS = [{"id": "1", "name": "a\rb", "size": 9, "on": True}, {"id": "2", "name": 'x"y,z', "size": 10, "on": False},
            {"id": "3", "name": "tab\there\nline\\end", "size": None}]  # fmt: skip

    def shown(self, *args):
        return self.good("listThings", *args)

    def test_the_option_beats_the_setting(self):
        self.rows({"id": "1"}, times=3)
        self.configure(output="Table")
        for expected, args in (("id\n1\n", []), ('{"id": "1"}\n', ["-o", "jsonl"]), ("id\r\n1\r\n", ["--output=CSV"])):
            self.assertEqual(expected, self.shown(*args))

    @each("args", ["listZones"], ["--wait", "1"], ["--sync"], ["--list"])
    def test_a_bad_setting_is_told_before_anything_is_sent(self, args):
        self.configure(output="xml")
        self.assertHolds(self.usage(*args), "output: 'xml'", *cs.FORMATS)
        self.rows({"id": "1"})
        self.assertEqual("1\n", self.shown("-o", "text"))  # what the option says, the setting need not

    @each("document, args, table, csv, text, jsonl",
          # One object, also within another or a job's result, is one row.
          *[(document, args, "id  name  state\n1   web   Running\n", "id,name,state\r\n1,web,Running\r\n",
             "1\tweb\tRunning\n", json.dumps(WEB) + "\n") for document in ({"r": WEB}, WEB) for args in ("", "--all")],
          ({"thing": WEB}, "-c state,nic.ip", "state    nic.ip\nRunning\n", "state,nic.ip\r\nRunning,\r\n",
           "Running\t\n", '{"nic.ip": null, "state": "Running"}\n'),
          ({"success": True}, "", "success\ntrue\n", "success\r\ntrue\r\n", "true\n", '{"success": true}\n'),
          ({"thing": ["a b", 7]}, "", "value\na b\n7\n", "value\r\na b\r\n7\r\n", "a b\n7\n", '"a b"\n7\n'),
          ({"thing": [{"id": "b", "n": [1, 2]}, {"id": "a"}]}, "-c id,n --sort id", "id  n\na\nb   1,2\n",
           'id,n\r\na,\r\nb,"1,2"\r\n', "a\t\nb\t1,2\n", '{"id": "a", "n": null}\n{"id": "b", "n": [1, 2]}\n'),
          # Nothing at all has a header only if the columns were chosen.
          *[(empty, args, *shown) for empty in ({}, {"count": 0}, {"count": 0, "thing": []}) for args, shown in [
              ("", [""] * 4), ("--all", [""] * 4), ("-c id,n --sort n", ["id  n\n", "id,n\r\n", "", ""])]],
          ({"thing": [{"id": 1}]}, "--where id=2 -c id", "id\n", "id\r\n", "", ""))  # fmt: skip
    def test_what_is_printed(self, document, args, **expected):
        for shape, text in expected.items():
            self.reply("listThings", document)
            code, out, err = self.main("listThings", "-o", shape, "-q", *args.split())
            self.assertEqual((0, "", text), (code, err, out), shape)

    @each("document, args, expected",
          ({"count": 7, "thing": [WEB]}, "", {"count": 7, "thing": [WEB]}), ({"thing": WEB}, "", {"thing": WEB}),
          ({"count": 2, "thing": [WEB, {"id": "0"}]}, "-c id --sort id",
           {"count": 2, "thing": [{"id": "0"}, {"id": "1"}]}),
          ({"count": 2, "thing": [WEB, {"id": "0"}]}, "-c id --all", [{"id": "1"}, {"id": "0"}]),
          ({"thing": WEB}, "-c nic,id", {"thing": {"id": "1", "nic": None}}), (WEB, "-c state", {"state": "Running"}),
          ({"count": 7, "thing": [WEB]}, "--where id=1", {"count": 1, "thing": [WEB]}),
          ({"count": 7, "thing": [WEB]}, "--where id=2", {"count": 0, "thing": []}),
          ({"thing": WEB}, "--all", {"thing": WEB}), ({"count": 0}, "", {"count": 0}),
          # What is empty is printed if JSON was asked for, and only then.
          ({}, "", None), ({}, "--all", None), ({"count": 0, "thing": []}, "--all", None),
          ({}, "-o json", {}), ({}, "-o json -c id", {}), ({}, "-o json --all", []), ({}, "-o json --where id=1", {}),
          ("", "-o json", ""),
          ({"thing": WEB}, "--where id!=1", {}), (WEB, "--where id!=1", {}),
          ({"count": 1, "thing": [WEB]}, "--where id!=1 --all", []))  # fmt: skip
    def test_json(self, document, args, expected):
        self.reply("listThings", document)
        out = self.good("listThings", "-q", *args.split())
        self.assertEqual(expected, json.loads(out) if out else None)

    @each("line, document, out",
          # The result of a job is shown and not the job.
          ("startThing -o table", {"x": dict(WEB, jobid="j", jobstatus=0, ipaddress="::1", nic=[{"ipaddress": "::1"}])},
           "id  name  state    nic.ipaddress\n1   web   Running  ::1\n"),
          ("startThing -o table --async", {"jobid": "j", "id": "1"}, "id  jobid\n1   j\n"),
          ("listAsyncJobs -o text", {"count": 1, "job": [{"jobid": "j", "jobstatus": 0, "cmd": "x"}]}, "j\t0\tx\n"),
          # The text of one value is the value. Of a list it would be taken for two rows, and a tenant chooses names.
          ("createPair -o text -c privatekey", {"pair": {"privatekey": "BEGIN\nEND\n"}}, "BEGIN\nEND\n"),
          ("createPair -o text", {"pair": {"privatekey": "a\tb\\"}}, "a\tb\\\n"),
          ("createPair -o text", {"pair": {"id": 1, "privatekey": "BEGIN\nEND\n"}}, "1\tBEGIN\\nEND\\n\n"),
          ("listPairs -o text -c name", {"count": 1, "pair": [{"name": "web\nprod"}]}, "web\\nprod\n"))  # fmt: skip
    def test_jobs_and_single_values(self, line, document, out):
        self.assertEqual(out, self.printed(document, *line.split()))

    def test_a_list_has_one_header_whatever_rows_come(self):
        """Where the list of commands tells which fields there are; csv has what only the rows have, too."""
        fields = [{"name": "state"}, {"name": "id"}, {"name": "nic", "response": [{"name": "ipaddress"}]}]
        self.sync_as(dict(api_entry(("listThings",)), response=fields))
        for row in {"id": "1"}, {"id": "1", "state": "up", "zzz": "z"}:
            for shape, header in ("table", "id  state  nic.ipaddress\n"), ("csv", "id,state,nic"):
                self.rows(row)
                self.assertTrue(self.shown("-o", shape).startswith(header), (row, shape))
        self.rows({"id": "1", "zzz": "z"}, times=2)
        self.assertEqual("1\t\t\n", self.shown("-o", "text"))
        self.assertEqual("id,state,nic,zzz\r\n1,,,z\r\n", self.shown("-o", "csv"))
        self.reply("listThings", {"success": True})
        self.assertEqual("true\n", self.shown("-o", "text"))

    def test_csv_and_text_are_read_back(self):
        def read(cell):
            return re.sub(r"\\(.)", lambda found: {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}[found.group(1)], cell)

        line, names = ("-c", "id,name,size,on", "-o"), ["id", "name", "size", "on"]
        cells = [["1", "a\rb", "9", "true"], ["2", 'x"y,z', "10", "false"], ["3", "tab\there\nline\\end", "", ""]]
        self.rows(times=2)
        lines = self.shown(*line, "text").split("\n")
        self.assertEqual([*cells, [""]], [[read(cell) for cell in line.split("\t")] for line in lines])
        self.assertEqual([names, *cells], list(csv.reader(io.StringIO(self.shown(*line, "csv"), newline=""))))

    @each("rows", [{}], [{}, {"id": "1"}], [None], [[]], [[1, [2, [3]]]],
          [{"id": 1}, "text", None, [1], {"name": "n"}, 7.5], [{"id": {"id": {"id": 1}}}], [{"": "nameless"}],
          [{"id": "a\0b"}], [{"a.b": 1, "a": {"b": 2}}], [{"id": 10**400}], [{"id": 1e308}], [{"id": -0.0}],
          [{"name": "\u202e\u200b\ud7ff\uffff"}], [{f"n{number}": number for number in range(500)}],
          [{"value": [None, True, {"x": 1}]}],
          [{"id": id} for id in (True, "x", {"a": 1}, ["a"], 7, "", False, [], {}, 1.0, "\ud7ff", "1.2.3", "7%")])
    @each("shape", *cs.FORMATS)
    def test_odd_rows_do_no_harm(self, rows, shape):
        self.rows(*rows, times=2)
        self.shown("-o", shape, "-c", "id,a.b,name.0.x", "--sort", "-id", "-q")
        code, out, err = self.on_terminal("listThings", "-o", shape, "--sort", "name", "-q", columns=20)
        self.assertEqual((0, ""), (code, err))

    @each("opening, closing", ("[", "]"), ('{"a":', "}"))
    @each("shape", *cs.FORMATS)
    def test_rows_nested_as_deep_as_json_is_read_do_no_harm(self, opening, closing, shape):
        """Whatever can be read can be shown, or is an error; never a traceback."""
        for depth in 50, 900:
            deep = opening * depth + '"leaf"' + closing * depth
            self.cloud.script("listThings", Answer(200, '{"r":{"thing":[{"name":' + deep + "}]}}", AS_JSON))
            code, out, err = self.main("listThings", "-o", shape, "-c", "name")
            self.assertIn("leaf" if code == 0 or depth == 50 else "CloudStack error", out + err)

    def test_what_standard_output_cannot_show(self):
        body = r'{"r":{"count":1,"thing":[{"id":"a\u0000b","name":"x\ud800y"}]}}'
        self.cloud.script("listThings", *[Answer(200, body, AS_JSON)] * 6)
        for shape in cs.FORMATS:
            self.shown("-o", shape)
        self.assertEqual((0, b"id,name\r\na\0b,x\\ud800y\r\n", b""), self.cs("listThings", "-o", "csv"))
        self.rows({"id": "zürich 宽"}, times=2)
        for shape, text in ("table", b"id\nz\\xfcrich \\u5bbd\n"), ("jsonl", b'{"id": "z\\u00fcrich \\u5bbd"}\n'):
            self.assertEqual((0, text, b""), self.cs("listThings", "-o", shape, PYTHONIOENCODING="ascii"))

    @each("told, total, args", *[("3 of 1148 rows came; --all for the rest\n", 1148, args) for args in ("", "-o csv")],
          ("3 of 1148 rows came; --all for the rest\n", 1148, "--where id=2"), ("", 1148, "-q"),
          ("", 1148, "page=1 pagesize=3"), ("", 1148, "Page=1 PageSize=3"), ("", 3, ""), ("", 2, ""), ("", "1148", ""))
    def test_rows_that_are_missing_are_told(self, told, total, args):
        for document in {"count": total, "thing": [{"id": 1}] * 3}, {"count": total, "id": "x"}, {"count": total}:
            self.reply("listThings", document)
            self.assertEqual(told if "thing" in document else "", self.says(0, "listThings", *args.split()), document)

    def test_rows_that_got_lost_between_pages_are_told(self):
        """One came twice, another not at all, in each of three times that the list was fetched."""
        pages = [{"count": 3, "thing": [{"id": 1}, {"id": 2}]}, {"count": 3, "thing": [{"id": 2}]}]
        self.reply("listThings", *pages * 3)
        told = "2 of 3 rows came; the list changed while it was read\n"
        self.assertEqual(told, self.says(0, "listThings", "--all", "pagesize=2"))

    @each("is_told, command, document, args", *[
        (True, "listThings", document, args) for document in ({}, {"count": 0})
        for args in ("", "-o json", "-o table -c id", "--all", "--all -o jsonl")],
        (True, "listThings", {"thing": [{"id": 1}]}, "--where id=2"), (False, "listThings", {}, "-q"),
        (False, "deleteThings", {}, ""), (False, "listThings", {"thing": [{"id": 1}]}, ""))  # fmt: skip
    def test_a_terminal_is_told_that_there_are_no_rows(self, is_told, command, document, args):
        self.reply(command, document)
        code, out, err = self.on_terminal(command, *args.split(), both=True)
        self.assertEqual((0, is_told), (code, out.endswith("no rows\n")))

    def test_text_as_the_server_sent_it(self):
        self.cloud.script("getThing", Answer(200, "<r>\x1b</r>\n", {}))
        self.assertEqual("<r>\x1b</r>\n", self.good("getThing", "json=false", "--all", "-o", "jsonl"))


class StreamTest(CloudCase):
    """--all with -o jsonl: a whole list is written page by page."""

    def test_a_row_is_written_while_others_are_still_to_come(self):
        """The second page is given only after the row of the first that --where lets through has been flushed."""
        rows = [{"id": "x", "n": 1}] + [{"id": str(number), "n": 2} for number in range(500)]
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")

        def second(record):
            until(out.buffer.getvalue, "the first row")
            return Answer(200, {"r": {"count": 501, "thing": rows[500:]}})

        self.cloud.script("listThings", Answer(200, {"r": {"count": 501, "thing": rows[:500]}}), second, second)
        with contextlib.redirect_stdout(out):
            self.assertEqual(0, cs.main(["listThings", "--all", "-o", "jsonl", "--where", "n=1", "-c", "id"]))
        self.assertEqual(b'{"id": "x"}\n', out.buffer.getvalue())

    def test_a_page_or_two_are_kept(self):
        alive = []

        def page(record):
            gc.collect()
            alive.append(sum(type(thing) is dict and "is-a-row" in thing for thing in gc.get_objects()))
            number = int(record.params["page"])
            rows = [{"is-a-row": [], "id": str(number * 100 + row)} for row in range(100 if number < 12 else 1)]
            return Answer(200, json.dumps({"r": {"thing": rows}}), AS_JSON)

        self.cloud.script("listThings", *[page] * 13)
        self.assertEqual(1101, self.good("listThings", "--all", "-o", "jsonl", "pagesize=100").count("\n"))
        self.assertLessEqual(max(alive), 300)

    def test_one_that_breaks_off_shows_what_arrived(self):
        self.cloud.script("listThings", Answer(200, {"r": {"count": 2, "thing": [{"id": "1"}]}}))
        self.say_error("listThings", 530, "no more")
        code, out, err = self.main("listThings", "--all", "-o", "jsonl")
        self.assertEqual((1, '{"id": "1"}\n'), (code, out))
        self.assertIn("no more", err)

    @each("code, document", (0, {"success": True}), (1, {"success": False}), (1, {"errortext": "no"}))
    def test_the_exit_code_tells_a_failure(self, code, document):
        self.reply("getThing", document)
        self.assertEqual((code, ""), self.main("getThing", "--all", "-o", "jsonl")[::2])

    @each("words, code, ids, told", ("id,hostname", 0, "12", ""), ("id --where hostname!=", 0, "2", ""),
          ("id,hostnam", 0, "12", "Warning: no row has 'hostnam'; did you mean hostname?\n"),
          ("id --where hostname!=x", 0, "12", ""),
          ("id --where hostnam!=x", 2, "", "cs: --where: no row has 'hostnam'; did you mean hostname?\n"))
    def test_a_column_is_missing_only_if_no_page_has_it(self, words, code, ids, told):
        pages = [[{"id": "1"}], [{"id": "2", "hostname": "h"}], []]
        self.reply("listThings", *[{"count": 2, "thing": page} for page in pages])
        found = self.main("listThings", "--all", "-o", "jsonl", "pagesize=1", "-c", *words.split())
        self.assertEqual((code, ids, told), (found[0], "".join(re.findall('"id": "(.)"', found[1])), found[2]))


class ColumnsTest(RowsCase):
    ROWS = [{"id": "b", "name": "two", "size": "10", "nic": [{"ip": "p1"}, {"ip": "p2"}], "tags": [{"key": "env"}]},
            {"id": "a", "name": "one", "size": "9", "nic": [{"ip": "q1"}], "detail": {"cpu": {"n": 4}}},
            {"id": "c", "name": "Three", "nic": [], "a.b": 1, "a": {"b": 2, "c.d": 3}}]  # fmt: skip
    for row in ROWS:
        row["like"] = "all"

    def cells(self, *args):
        self.rows()
        out = self.good("listThings", "-o", "text", "-q", *args)
        return [line.split("\t") for line in out.split("\n")[:-1]]

    @each("columns, expected", (" name , id ,", [["two", "b"], ["one", "a"], ["Three", "c"]]),
          ("nic.ip,nic.0.ip", [["p1,p2", "p1"], ["q1", "q1"], ["", ""]]), ("nic.1.ip", [["p2"], [""], [""]]),
          ("nic.9.ip", [[""]] * 3), ("tags.key", [["env"], [""], [""]]), ("detail.cpu.n", [[""], ["4"], [""]]),
          ("detail.cpu", [[""], ['{"n":4}'], [""]]), ("detail.cpu.n.x", [[""], [""], [""]]),
          ("nic.0", [['{"ip":"p1"}'], ['{"ip":"q1"}'], [""]]), ("id.x,name.0,nic.x", [[""] * 3] * 3),
          ("nic.\u00b2.ip,nic.\u0663.ip,nic.-1.ip,nic." + "9" * 5000, [[""] * 4] * 3),
          (".id,.,..,nic..ip,-,id name,\x1b[2J,*", [[""] * 8] * 3),
          ("a.b,a.c.d", [[""] * 2] * 2 + [["1", "3"]]),  # a name that holds a dot is found as it stands
          # Default columns: nic.ipaddress is one of them if there is a nic.
          *[(columns, [["b", "two", "", "10", "all", ""], ["a", "one", "", "9", "all", ""],
                       ["c", "Three", "", "", "all", "1"]]) for columns in ("", ",", " , ")])  # fmt: skip
    def test_dotted_paths(self, columns, expected):
        self.assertEqual(expected, self.cells("-c", columns))

    @each("name, near", ("nmae", "name"), ("NAME", "name"), ("nic.0.pi", "nic.ip"), ("tag.key", "tags.key"), ("z", ""))
    @each("words", ["-c"], ["--sort"], ["-o", "csv", "-c"], ["--all", "-o", "jsonl", "-c"])
    def test_a_column_that_no_row_has(self, words, name, near):
        self.rows(times=2)
        told = f"Warning: no row has {name!r}" + (f"; did you mean {near}?\n" if near else "\n")
        self.assertEqual(told, self.says(0, "listThings", *words, name))
        self.assertEqual("", self.says(0, "listThings", *words, name, "-q"))

    @each("row", {"tags": []}, {"tags": {}}, {"tags": None}, {"tags": [{"key": []}]}, {"tags": [{}, {"key": {"x": 1}}]})
    def test_where_lists_are_empty_nobody_can_tell(self, row):
        self.reply("listThings", {"thing": [row]})
        self.good("listThings", "-c", "tags.key.x,tags")

    @each("column, expected", ("id", "abc"), ("-id", "cba"), ("name", "acb"), ("-name", "bca"), ("size", "abc"),
          ("-size", "bac"), ("nic.ip", "bac"), ("-nic.0.ip", "abc"), ("detail.cpu.n", "abc"), ("nosuch", "bac"),
          ("like", "bac"), ("-like", "bac"))  # fmt: skip
    def test_sort(self, column, expected):
        self.assertEqual(expected, "".join(row[0] for row in self.cells("--sort", column, "-c", "id")))

    @each("values, column", ([-3, 1.5, 9, 10, 100], "v"), (["-3", "1.5", "9", "10", "1e2"], "v"),
          (["b", "a", "10", 9, None], "-v"), ([2**80 - 1, 2**80, 2**80 + 1], "v"),
          (["9", "10", "1_0", "a", "b", "inf", "nan"], "v"),  # words that Python takes for numbers
          (["9.1%", "87.3%", "100%"], "v"), (["9.50 GB", "48.00 GB", "192 gb"], "v"), (["2.5 GHz", "100 MHz"], "v"),
          (["4.9.1", "4.19.2", "4.20.0.0", "v5.0.1"], "v"), (["10.1.2.9", "10.1.2.10", "10.1.10.1/24"], "v"),
          (["2023-05-01", "2024-02-01"], "v"))  # fmt: skip
    def test_numbers_have_their_own_order(self, values, column):
        for given in values[::-1], values[1:] + values[:1]:
            document = {"thing": [{"v": value} for value in given]}
            out = self.printed(document, "listThings", "--sort", column, "-o", "jsonl")
            self.assertEqual(values, [json.loads(line)["v"] for line in out.splitlines()])


class TableTest(RowsCase):
    """Tables on a terminal."""

    def test_id_name_and_state_come_first(self):
        """And what matters most of other things."""
        self.option(rate_limit=100)
        for command, columns in (("listVirtualMachines", "id name state"), ("listZones", "id name allocationstate"),
                                 ("listHosts", "id name state type"), ("listCapabilities", "cloudstackversion"),
                                 ("listEvents", "id state type account username level description"),
                                 ("listResourceLimits", "account resourcetypename resourcetype max")):  # fmt: skip
            header = self.table(command, columns=150)[0].split()
            self.assertEqual(columns, " ".join(header[: columns.count(" ") + 1]))

    @each("columns, header", (86, "id name state zonename"), (85, "id name state"), (64, "id name state"),
          (63, "id name"), (42, "id name"), (41, "name"), (20, "name"), (5, "name"))  # fmt: skip
    def test_what_has_no_room(self, columns, header):
        """Columns go from the end; but the id goes where it would be the only one."""
        row = {"id": "1" * 20, "name": "n" * 20, "state": "s" * 20, "zonename": "z" * 20}
        self.rows(row, row)
        code, out, err = self.on_terminal("listThings", "-o", "table", "--color", "never", columns=columns, both=True)
        first, *lines = out.splitlines()
        gone = [name for name in row if name not in header.split()]
        told = [f"no room for {', '.join(gone)}; -c chooses columns"] if gone else []
        self.assertEqual((header.split(), told), (first.split(), lines[2:]))
        self.assertEqual([columns < 20] * 2, ["…" in line for line in lines[:2]])

    @each("args, rows, lines",
          # A long text at the end is cut before it is left out; what was chosen is never left out.
          ("", [{"id": "1" * 20, "name": "n" * 99}], [f"{'id':20}  name", "1" * 20 + "  " + "n" * 19 + "…"]),
          ("-c id,name,state", [{"id": "12345678", "name": "n" * 100}, {"id": "1", "name": "ok", "state": "x"}],
           ["id        name" + " " * 27 + "…", "12345678  " + "n" * 31 + "…", "1         ok" + " " * 29 + "…"]),
          # Line breaks and tabs do not break rows.
          ("", [{"id": "1", "name": "a\nb\tc", "state": "x"}, {"id": "2", "name": "d", "state": "y"}],
           ["id  name   state", "1   a b c  x", "2   d      y"]))  # fmt: skip
    def test_lines(self, args, rows, lines):
        self.rows(*rows)
        self.assertEqual(lines, self.table("listThings", *args.split(), columns=42))

    def test_without_a_terminal_nothing_is_cut(self):
        self.rows({"id": "1", "name": "x" * 3000}, {"id": "22", "name": "宽"})
        with mock.patch.dict(os.environ, COLUMNS="40"):
            self.assertEqual(f"id  name\n1   {'x' * 3000}\n22  宽\n", self.good("listThings", "-o", "table"))

    def test_wide_and_combining_characters(self):
        names = ["ascii", "日本語", "日本語の長い名前のマシン", "e\u0301te\u0301", "🙂🚀", "한국어", "ｆｕｌｌ",
                 "zürich", "\u0e19\u0e49\u0e33"]
        self.rows(*[{"id": "1", "name": name, "state": "|"} for name in names])
        header, *lines = self.table("listThings")
        self.assertEqual({header.index("state")}, {columns_of(line[: line.index("|")]) for line in lines}, lines)

    @each("text", "x" * 100000, "字" * 100000, "e\u0301" * 100000)
    def test_a_huge_cell(self, text):
        """It is cut without ado: not a character at a time, measured each time."""
        cut = []
        in_threads(1, lambda number: cut.append(cs._cut(text, 20)))
        self.assertIn(columns_of(cut[0]), (19, 20))
        self.assertEqual("…", cut[0][-1])

    @each("args, env, colored", ([], {}, True), (["--color", "auto"], {}, True), (["--color", "never"], {}, False),
          ([], {"NO_COLOR": "1"}, False), ([], {"NO_COLOR": ""}, True), ([], {"term": "dumb"}, False),
          (["--color", "always"], {"NO_COLOR": "1", "term": "dumb"}, True))  # fmt: skip
    def test_the_header_is_bold(self, args, env, colored):
        """On a terminal that has colours, or where one insists."""
        line, bold, plain = ["listThings", *args, "-o"], "\x1b[1mid\x1b[0m\n1\n", "id\n1\n"
        self.rows({"id": "1"}, times=3)
        self.assertEqual((0, bold if colored else plain, ""), self.on_terminal(*line, "table", **env))
        self.assertEqual(bold if "always" in args else plain, self.good(*line, "table"))
        self.assertEqual("id\r\n1\r\n", self.good(*line, "csv"))

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_on_a_real_terminal(self):
        env = dict(os.environ, TERM="xterm")
        typed = self.on_pty([sys.executable, CS_PATH, "listVirtualMachines", "-o", "table"], env, 100)
        self.assertEqual(0, typed.end())
        *lines, told = screen(typed.text).rstrip("\n").split("\n")
        self.assertEqual((33, "no room for "), (len(lines), told[:12]))
        self.assertIn(max(map(len, lines)), range(80, 101))
        self.assertIn("\x1b[1mid", typed.text)


# === [8.4] the list of commands =======================================================================================


class CatalogFileTest(CloudCase):
    """listApis is read once for an endpoint and account, and kept."""

    @each("value, folder", (None, ".cache"), ("", ".cache"), ("relative", ".cache"), ("/elsewhere", "elsewhere"))
    def test_it_is_below_XDG_CACHE_HOME_or_else_the_home_directory(self, value, folder):
        """A relative one is ignored, as the specification says."""
        if value is not None:
            os.environ["XDG_CACHE_HOME"] = value.replace("/", self.home + "/")
        self.good("--sync", "-q")
        self.assertEqual((1, []), (len(os.listdir(os.path.join(self.home, folder, "cs"))), os.listdir(self.cwd)))

    @unittest.skipUnless(os.name == "posix", "needs file modes")
    def test_nobody_else_can_read_it(self):
        self.addCleanup(os.umask, os.umask(0))
        for _ in range(2):  # made anew, and replaced
            path = self.sync()
            self.assertEqual(0o600, os.stat(path).st_mode & 0o777)
            self.assertEqual(0o700, os.stat(os.path.dirname(path)).st_mode & 0o777)

    def test_each_endpoint_and_account_has_its_own_whose_name_says_nothing(self):
        admin = {"endpoint": ENDPOINT, "key": "KEY1", "secret": "SECRET1"}
        ann = {"endpoint": ENDPOINT, "username": "ann", "password": "x"}
        clients = (admin, dict(admin, key="KEY2"), dict(admin, endpoint="http://other.invalid"),
                   {"endpoint": ENDPOINT}, ann, dict(ann, domain="/one"), dict(ann, domain="/two"))
        names = [os.path.basename(cs._cache_path(cs.CloudStack(**settings))) for settings in clients]
        self.assertEqual(len(clients), len(set(names)))
        for name in names:
            self.assertRegex(name, r"\A[0-9a-f]{32}\Z")

    def test_it_holds_the_server_s_own_rows_and_nothing_secret(self):
        row = {"name": "a", "x": {"y": [1, "ü"]}, "description": None}
        name, _, text = open_bytes(self.sync_as(row)).decode("utf-8").partition(" ")
        self.assertEqual(("a", row), (name, json.loads(text)))
        admin = self.cloud.users["admin"]
        self.assertLacks(open_bytes(self.sync()).decode("utf-8"), admin.key, admin.secret)

    def test_it_is_replaced_in_one_step_or_stays(self):
        path = self.sync()
        before = open_bytes(path)
        with mock.patch("os.replace", side_effect=OSError("no")):
            self.assertIn("cannot write the cache", self.fails(2, "--sync"))
        for api in ([], [{"description": "nameless"}]):
            self.reply("listApis", {"count": len(api), "api": api})
            self.assertIn("listApis", self.says(1, "--sync"))
        self.assertEqual((before, [os.path.basename(path)]), (open_bytes(path), os.listdir(os.path.dirname(path))))

    @unittest.skipUnless(os.name == "posix", "needs a directory that is a file")
    def test_only_sync_fails_where_it_cannot_be_kept(self):
        os.environ["XDG_CACHE_HOME"] = self.write("file", "")
        self.assertIn("cannot write the cache", self.fails(2, "--sync"))
        for args, part in ((["--list", "zone"], "listZones"), (["listZones", "--help"], "Lists zones")):
            code, out, err = self.main(*args)
            self.assertEqual((0, True), (code, err.startswith("Warning: cannot write the cache")))
            self.assertIn(part, out)
        del self.cloud.requests[:]
        self.main("listVirtualMachines", "zoneid=name:north", "templateid=name:Debian 12", "--dry-run")
        self.assertEqual(1, self.asked.count("listApis"))

    def test_an_ordinary_call_never_fetches_it(self):
        for args in (["listZones"], ["listVirtualMachines", "-o", "table", "-c", "nosuch,name"],
                     ["listvirtualmachines"], ["listZones", "--dry-run"], ["--complete=cs listZ"],
                     ["--complete=cs stopVirtualMachine id="], ["startVirtualMachine", 'id="name:x"']):
            self.main(*args)
        self.assertEqual((False, False), ("listApis" in self.asked, os.path.exists(os.path.join(self.home, ".cache"))))
        self.assertIn("'zones' has no '='", self.usage("list", "zones"))
        path = self.sync()
        with later(400 * 86400):
            self.good("listZones")
        self.assertEqual(["listZones"], self.asked)
        for content in (b"\xff\xfe", None):  # one that cannot be read is as good as none
            os.unlink(path)
            os.mkdir(path) if content is None else self.write(path, content)
            self.assertIn('"zone"', self.good("listZones"))

    def test_a_role_that_may_not_ask_for_it_is_told_so_once_and_names_work(self):
        self.configure("user")
        for args in (["--sync"], ["--list"], ["listZones", "--help"]):
            self.assertIn("listApis", self.says(1, *args))
        del self.cloud.requests[:]
        self.option(role_lacks=frozenset(["listApis"]))
        ids = [f"{table}id=" + self.cloud.cloud.named(table, name)["id"]
               for table, name in (("zone", "north"), ("template", "Debian 12"))]
        for told in ("Your role may not ask for the list of commands; names work without it\n", ""):
            words = ["listVirtualMachines", "zoneid=name:north", "templateid=name:Debian 12", "--dry-run"]
            code, out, err = self.main(*words)
            self.assertEqual((0, told), (code, err))
            self.assertHolds(out, *ids)
        self.assertEqual(("", 1), (self.good("--complete=cs listZ"), self.asked.count("listApis")))
        self.good("listZones", "nonsense=1")
        self.option(role_lacks=frozenset())
        self.assertIn("listZones", self.good("--list", "zones", "-q"))  # asks again
        self.assertIn("no parameter", self.usage("listZones", "nonsense=1"))

    def test_sync_may_stand_before_a_command(self):
        self.sync_as(("listZones",))
        self.assertIn("no command", self.usage("listVolumes"))
        self.assertEqual(["listApis", "listVolumes"], self.good("--sync", "-q", "listVolumes") and self.asked)

    def test_sync_waits_longer_than_other_calls(self):
        """The first listApis of a fresh, busy server took 19.5 s."""
        self.assertGreaterEqual(cs._SYNC_TIMEOUT, 60)
        self.configure(timeout="0.05")
        for limit, code in ((60, 0), (0, 3)):
            self.cloud.script("listApis", lambda _: time.sleep(0.3))
            with mock.patch.object(cs, "_SYNC_TIMEOUT", limit):
                self.assertEqual(code, self.main("--sync", "-q")[0])

    def test_entries_of_odd_shapes_do_no_harm(self):
        self.reply("listApis", {"count": 9, "api": [
            {"name": "listOdd", "params": None, "response": None, "description": None, "isasync": None},
            {"name": "listOdder", "params": [{}, None, 7, {"name": "x"}],
             "response": [{}, None, {"name": "a", "response": [{}, 7]}]},
            {"name": "listOddest", "params": [{"name": 7, "type": [], "description": {}}]}, {"name": 7},
            {"name": None}, {"name": ["listX"]}, "text", None, {"name": 'a"b'}, {"name": "l" * 101}]})
        self.sync()
        names = self.good("--list").split()
        for name in names:
            self.assertTrue(self.good(name, "--help").startswith(name + "\n"))
        self.assertEqual((["listOdd", "listOdder", "listOddest"], "\n".join(names) + "\n"),
                         (names, self.good("--complete=cs listO")))
        self.assertIn("ok", self.printed({"ok": True}, "listOdd"))

    def test_a_hundred_thousand_characters_of_a_hostile_server_take_no_time(self):
        for text in ("s" * 99999 + "x", "es" * 50000, "ies" * 33000, " " * 99999 + "x", "name:," * 17000, "A" * 99999):
            entry = dict(api_entry(("listEvil", "ids", text + "id!")), description=text, since=text)
            self.sync_as(("listZones",), entry)
            begun = time.process_time()
            for args in (["nosuch"], ["list", "nosuch"], ["listEvil", "--help"], ["listEvil", "x=y"],
                         ["--complete=cs l"], ["--complete=cs listEvil "], ["--complete=cs listEvil ids=" + text]):
                self.main(*args)
            self.assertLess(time.process_time() - begun, 5, text[:10])


class CatalogChecksTest(CloudCase):
    """What the server would ignore in silence, or refuse, stops a call before it is sent."""

    def setUp(self):
        super().setUp()
        self.path = self.known()

    @each("line, told", *(row.split(" -> ") for row in r"""
listZone --help -> no command 'listZone'|listZones|--list
listVirtualMachine -> no command 'listVirtualMachine' is available|did you mean listVirtualMachines|--sync|--force
listZones nam=x -q -> listZones has no parameter 'nam'; did you mean name?\n    Nothing was sent.
deployVirtualMachine nam=x zone=y templateid=t -> 'nam'; did you mean name?|'zone'; did|needs serviceofferingid, zoneid
rebootVirtualMachine name=web-01 -> no parameter 'name'; did you mean id=name:web-01?
createSnapshot -> createSnapshot needs volumeid; see cs createSnapshot --help
stopVirtualMachine x=1 -> needs id|no parameter 'x'|\n    Nothing was sent. `cs --sync` fetches|--force
stopVirtualMachine ID="" -> stopVirtualMachine needs id
listZones tagz[0].key=a details[0].x=1 --dry-run -> 'tagz[0].key'|'details[0].x'
createTags resourceids=1 resourcetype=UserVm -> createTags needs tags
listzones (=y -> listZones has no parameter '('
list.ones -> no command
vm -> no command 'vm' is available to you; did you mean listVirtualMachines?
reboot id=1 -> did you mean rebootVirtualMachine?
deployVM name=x -> did you mean deployVirtualMachine?
start vms id=1 -> no command 'startvms' is available to you; did you mean startVirtualMachine?
LIST Virtual machine name=x -> no command 'LISTVirtualmachine' is available to you; did you mean listVirtualMachines?
list zonez -> 'zonez' has no '='
listZones s -> 's' has no '='
""".strip().split("\n")))
    def test_refused(self, line, told):
        self.assertHolds(self.usage(*line.split()), *told.replace("\\n", "\n").split("|"))

    def test_what_would_not_help_is_not_suggested(self):
        self.assertNotIn("did you mean", self.usage("zzzzzz"))
        self.assertEqual("cs: stopVirtualMachine needs id; see cs stopVirtualMachine --help\n",
                         self.usage("stopVirtualMachine"))

    @each("line, command, sent", *((line, line.split()[0], None) for line in (
        "listZones fetch_list=true fetch_result=false json=true opcode_name=command", "login username=a password=b",
        "listVirtualMachines tags[0].key=env tags[0].value=prod Tags[11].key=x details[0].memory=7",
        "createTags resourceids=1 resourcetype=UserVm tags[0].key=a tags[0].value=b", "stopVirtualMachine --force",
        "listZones customjobid=1 page=2 pagesize=3 signatureversion=3 sessionkey=1 ctxuserid=1 response=json uuid=1")),
        ("list zones", "listZones", {}), ("LISTZONES NAME=x", "listZones", {"NAME": "x"}),
        ("stop virtualmachine id=1", "stopVirtualMachine", {"id": "1"}), ("listZones name=", "listZones", {"name": ""}),
        ("createSecurityGroup name=", "createSecurityGroup", {"name": ""}),  # required, and the server's to judge
        ("listZones nam=x --force", "listZones", {"nam": "x"}), ("inventThings a=b --force", "inventThings", None))
    def test_sent(self, line, command, sent):
        self.reply(command, {"ok": True})
        self.good(*line.split())
        self.assertEqual([command], self.asked)
        self.assertEqual(self.sent() if sent is None else sent, self.sent())

    def test_a_case_that_fits_two_commands_is_not_guessed(self):
        self.path = self.sync_as(("listThings",), ("listthingS",))
        self.assertIn("no command", self.usage("LISTTHINGS"))
        self.printed({"ok": True}, "listthingS")

    @each("days, old", (29, False), (31, True), (-1, True))
    def test_an_old_list_only_warns(self, days, old):
        self.reply("listZones", *[{"ok": True}] * 3)
        with later(days * 86400):
            code, out, err = self.main("listZones", "nam=x")
            self.assertEqual((0 if old else 2, old), (code, err.startswith("Warning: ")))
            self.assertHolds(err, "listZones has no parameter 'nam'", "`cs --sync` fetches")
            if old:
                self.assertIn(f"(the list of commands is {days} days old; ", err)
                self.assertEqual("", self.main("listZones", "nam=x", "-q")[2])
                self.good("listZones")  # nothing wrong, no warning

    @each("command, words, given", ("createSecurityGroup", "name=x", False), ("startVirtualMachine", "id=1", True),
          ("inventThings", "--force", True), ("createSecurityGroup", "", True), ("startVirtualMachine", "id=2", False))
    def test_only_what_may_start_a_job_is_given_an_id_for_it(self, command, words, given):
        """By it a lost answer is found again; where the list says that there is no job, nothing is added."""
        self.configure(recover="false" if words == "id=2" else "true")
        if not words:
            os.unlink(self.path)
        self.printed({"ok": True}, command, *words.split())
        self.assertEqual(given, "customjobid" in self.cloud.requests[-1].params)



class CommandHelpTest(CloudCase):
    """cs COMMAND --help and cs --list"""

    def setUp(self):
        super().setUp()
        self.path = self.known()

    def test_the_list_is_fetched_once_and_kept(self):
        os.unlink(self.path)
        code, out, err = self.main("listZones", "--help")
        self.assertEqual((0, ["listApis"], "listZones\n  Lists zones.\n\nOptional:\n"), (code, self.asked, out[:36]))
        for args in (["--help", "listZones"], ["listZones", "name=x", "-h"], ["help", "-o", "table", "list", "zones"]):
            self.assertEqual(out, self.good(*args))
        self.good("--list")
        self.assertEqual(["listApis"], self.asked)
        self.main("--list", "--sync")
        self.assertEqual(["listApis"] * 2, self.asked)

    def test_what_a_command_takes_and_returns(self):
        entry = api_entry(("growThing", "zeal", "id!", "by:integer!", "tags:map!"))
        entry.update(isasync=True, response=[{"name": "id"}, {"name": "nic", "response": [{"name": "ip"}]}, {}])
        self.sync_as(entry)
        lines = ["growThing", "  Does growThing.", "  It starts a job, which is waited for unless --async.", "",
                 "Required:", "  by (integer)  the by", "  id (string)  the id", "  tags (map)  the tags", "",
                 "Optional:", "  zeal (string)  the zeal", "", "Returns: id, nic", "",
                 "Example: cs growThing by=... id=name:... 'tags[0].key=...' 'tags[0].value=...'", ""]
        self.assertEqual("\n".join(lines), self.good("growthing", "--help", "-q"))

    @each("command, example",
          ("deployVirtualMachine", " serviceofferingid=name:... zoneid=name:... templateid=name:..."),
          ("authorizeSecurityGroupIngress", " securitygroupid=name:..."), ("listCapabilities", ""))
    def test_the_example(self, command, example):
        self.assertTrue(self.good(command, "--help").endswith(f"\n\nExample: cs {command}{example}\n"))

    @each("columns, most", (60, 60), (200, 100))
    def test_help_fits_the_terminal(self, columns, most):
        code, out, err = self.on_terminal("deployVirtualMachine", "--help", columns=columns)
        longest = max(len(line) for line in out.splitlines() if not line.startswith("Example"))
        self.assertEqual((0, "", True), (code, err, most - 20 < longest <= most))

    def test_list(self):
        lines = self.good("--list").splitlines()
        self.assertEqual([[name, COMMANDS[name].description] for name in sorted(COMMANDS)],
                         [line.split(None, 1) for line in lines])
        self.assertEqual(1, len({re.match(r"\S+ +", line).end() for line in lines}))  # aligned
        self.assertEqual("No command has 'zzz' and 'name=x' in its name or description\n",
                         self.fails(1, "--list", "zzz", "name=x"))

    @each("words, names", ("VOLUME attach", ["attachVolume"]), ("vm snapshots", ["listVMSnapshot"]),
          ("VM reboots", ["rebootVirtualMachine"]))
    def test_list_with_words_gives_what_has_all_of_them_in_name_or_description(self, words, names):
        self.sync_as(*[dict(api_entry((name,)), description=text) for name, text in (
            ("attachVolume", "Attaches"), ("listVMSnapshot", "Lists snapshots"), ("rebootVirtualMachine", "Reboots"))])
        self.assertEqual(names, [line.split()[0] for line in self.good("--list", *words.split()).splitlines()])

    def test_list_on_a_terminal_is_a_line_each(self):
        self.sync_as(dict(api_entry(("listWide",)), description="宽" * 300),
                     dict(api_entry(("listLong",)), description="word\n" * 90))
        code, out, err = self.on_terminal("--list", columns=60)
        self.assertEqual((0, "", 2), (code, err, out.count("\n")))
        for line in out.splitlines():
            self.assertLessEqual(columns_of(line), 60)
        self.assertHolds(self.good("--list"), "宽" * 300, "word " * 89)  # not on one, all of it

    def test_what_the_server_sends_is_shown_escaped(self):
        evil = "evil" + EVIL_TITLE + "\x9b2J\u202e"
        entry = api_entry(("listEvil", "a!", "b"))
        entry.update(description=evil, since=evil, response=[{"name": evil}])
        for param in entry["params"]:
            param.update(description=evil, type=evil, since=evil)
        entry["params"].append({"name": evil, "type": "string", "description": "x", "required": True})
        self.sync_as(entry, dict(entry, name="find" + EVIL_TITLE))
        for args in (["listEvil", "--help"], ["--list"], ["listEvil", "c=1"]):
            code, out, err = self.on_terminal(*args)
            self.assertIn("pwned", out + err)
            self.assertEqual([], re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err))


# === [8.5] completion =================================================================================================


class CompletionCase(CloudCase):
    """Completion as the shells' scripts ask for it."""

    def setUp(self):
        super().setUp()
        self.path = self.known()

    def completed(self, line):
        """[word, description] for each that `cs --complete=LINE` offers."""
        out = self.good("--complete=" + line)
        return [(row + "\t").split("\t")[:2] for row in out.splitlines()]

    def words(self, line):
        return [word for word, _ in self.completed(line)]

    def machine(self, name="web-01"):
        return self.cloud.cloud.named("virtualmachine", name)["id"]

    def rename(self, machine, **fields):
        self.change(self.cloud.cloud.named("virtualmachine", machine), **fields)

    def change(self, row, **fields):
        patched = mock.patch.dict(row, fields)
        patched.start()
        self.addCleanup(patched.stop)

    def rows(self, command, rows):
        """Have a list command answer with these rows for as long as the test takes."""
        self.reply(command, *[{"count": len(rows), "thing": rows}] * 20)


class CompletionTest(CompletionCase):
    @each("line, expected",
        ("cs listzo", ["listZones"]), ("cs -o table listZo", ["listZones"]),
        ("cs nosuch", []), ("cs --output=table --region  listZo", []),  # a region, not a command
        ("cs startvirtualmachine i", ["id="]), ("cs listZones name=", []), ("cs nosuch na", []),
        ("cs stopVirtualMachine forced=", ["forced=true", "forced=false"]),
        ("cs stopVirtualMachine forced=f", ["forced=false"]), ("cs stopVirtualMachine nosuchid=", []),
        ("cs stop virtual machine forced=f", ["forced=false"]), ("cs stop -q virtualmachine i", ["id="]),
        ("cs --outp", ["--output"]), ("cs listZones --col", ["--color", "--columns"]),
        ("cs -o ", ["json", "jsonl", "table", "csv", "text"]), ("cs listZones --output t", ["table", "text"]),
        ("cs listZones --output=ta", ["--output=table"]), ("cs --complet", ["--completion"]),
        *((f"cs {option} l", []) for option in "--timeout --retry --config --endpoint --wait --theme".split()),
        ("cs listVirtualMachines -c instancen", ["instancename"]),
        ("cs listVirtualMachines --columns=id,instancen", ["--columns=id,instancename"]),
        ("cs listVirtualMachines -c nic.ipa", ["nic.ipaddress"]), ("cs -c instancen", []),
        ("cs -o table listvirtualmachines state=Running -c instancen", ["instancename"]),
        ("cs listVirtualMachines --sort -instancen", ["-instancename"]),
        ("cs listVirtualMachines --where=instancen", ["--where=instancename="]),
        ("cs listVirtualMachines --where 'instancen", []),
    )
    def test_words(self, line, expected):
        self.assertEqual((expected, []), (self.words(line), self.asked))

    def test_commands_and_parameters(self):
        self.assertEqual([["listZones", "Lists zones."]], self.completed("cs listZo"))
        self.assertEqual(sorted(COMMANDS), sorted(self.words("cs -q --all ")))
        words = self.words("cs deployVirtualMachine ")
        self.assertEqual((["serviceofferingid=", "zoneid="], sorted(words[2:])), (words[:2], words[2:]))
        self.assertEqual([["available=", "true for zones that take new machines"]],
                         self.completed("cs listZones avail"))
        words = self.words("cs deployVirtualMachine zoneid=1 NAME='x y' ")
        self.assertEqual({"templateid="}, {"zoneid=", "name=", "templateid="}.intersection(words))
        self.path = self.sync_as(dict(api_entry(("listLong",)), description="word " * 1000))
        self.assertLessEqual(len(self.completed("cs listL")[0][1]), 80)

    @each("line, expected", ("cs -r ", ["cloudstack", "lab", "lagoon", "local"]),
          ("cs --config ~/other.ini -r else", ["elsewhere"]), ("cs --region=la", ["--region=lab", "--region=lagoon"]))
    def test_regions(self, line, expected):
        self.ini("[cloudstack]\nendpoint = x\n[lab]\n[lagoon]\n[my place]\n[$(touch x)]\n")
        self.write("work/cloudstack.ini", "[local]\n")
        self.write("other.ini", "[elsewhere]\n")
        self.assertEqual(expected, self.words(line))

    def test_the_line_chooses_the_region(self):
        user = self.cloud.users["user"]
        self.option(role_lacks=frozenset())
        self.ini(f"[lab]\nendpoint = {self.cloud.endpoint}\nkey = {user.key}\nsecret = {user.secret}\n")
        self.reply("listApis", {"count": 1, "api": [api_entry(("onlyInTheLab", "depth"))]})
        self.good("--sync", "-q", "-r", "lab")
        self.assertEqual(["onlyInTheLab"], self.words("cs -r lab only"))
        self.assertEqual((["depth="], []), (self.words("cs onlyInTheLab --region=lab d"), self.words("cs only")))

    def test_names_for_ids(self):
        web, db, cache = map(self.machine, ("web-01", "db-01", "cache-01"))
        self.rename("db-01", displayname="Database:1")
        self.rename("cache-01", name="front end (2)", displayname="front end (2)")
        stop = "cs stopVirtualMachine id="
        for line, expected in (
            (stop + "WEB-01", [["id=name:web-01", web]]), (stop + "name:web-01", [["id=name:web-01", web]]),
            (stop + "name:dat", [["id=name:Database:1", db]]), (stop + "nothing", []),
            (stop + web[:9], [["id=" + web, "web-01"]]), (stop + "name:" + web[:9], []),
            (stop + "fr", [["id=name:'front end (2)'", cache]]), (stop + "'fr", [["id='name:front end (2)'", cache]]),
            (stop + "name:'front e", [["id=name:'front end (2)'", cache]]),
            (stop + "front\\ e", [["id=name:'front end (2)'", cache]]),
            (f"cs listVirtualMachines ids={db},{web[:9]}", [[f"ids={db},{web}", "web-01"]]),
            ("cs listVirtualMachines ids=name:'a b',fr", [["ids=name:'a b',name:'front end (2)'", cache]]),
            ("cs listVolumes name='x y' virtualmachineid=web-01", [["virtualmachineid=name:web-01", web]]),
        ):
            with self.subTest(line):
                self.assertEqual(expected, self.completed(line))
        self.assertEqual({"listVirtualMachines"}, set(self.asked))
        both = dict(self.completed(stop))
        self.assertEqual((web, cache), (both["id=name:'web-01'"], both["id=name:'front end (2)'"]))

    def test_a_name_is_offered_where_nothing_else_has_it(self):
        rows = [{"id": "1", "name": "web"}, {"id": "2", "name": "web"}, {"id": "3", "name": "x", "displayname": "web"},
                {"id": "4", "name": "db"}, {"id": "4", "name": "db", "x": 1}, {"id": "5"}, {"id": 6, "name": "y"}]
        self.rows("listVirtualMachines", rows)
        self.assertEqual([["id=1", "web"], ["id=2", "web"], ["id=name:x", "3"], ["id=name:db", "4"], ["id=5", ""],
                          ["id=name:y", "6"]], self.completed("cs stopVirtualMachine id="))
        for typed in ("We", "name:web"):
            self.assertEqual(["id=1", "id=2", "id=3"], self.words("cs stopVirtualMachine id=" + typed))
        self.cloud._scripts.clear()
        self.rows("listVirtualMachines", [{"id": "aB1", "name": "web 1"}, {"id": "-2", "name": "web-2"}])
        for typed, offered in ("we", ["id=name:'web 1'", "id=name:'web-2'"]), ("Ab", ["id=aB1"]), ("-", ["id=-2"]):
            self.assertEqual(offered, self.words("cs stopVirtualMachine id=" + typed))

    @each("line, question, offered",
        ("zoneid=z1 virtualmachineid=", {"listall": "true"}, ["a", "d"]),
        ("zoneid=name:north virtualmachineid=", {"listall": "true"}, ["a", "d"]),
        ("account=bob virtualmachineid=", {"listall": "true"}, ["b"]),
        ("projectid=p virtualmachineid=", {"listall": "true", "projectid": "p"}, ["c"]),
        ("projectid=name:apollo virtualmachineid=", {"listall": "true", "projectid": "-1"}, ["c"]),
        ("projectid=other virtualmachineid=", {"listall": "true", "projectid": "other"}, ["a", "b", "c", "d"]),
        ("resourcetype=UserVm resourceids=", {"listall": "true"}, ["a", "b", "c", "d"]),
    )
    def test_what_is_on_the_line_counts(self, line, question, offered):
        self.rows("listVirtualMachines", [
            {"id": "1", "name": "a", "zoneid": "z1", "zonename": "north", "account": "ann"},
            {"id": "2", "name": "b", "zoneid": "z2", "zonename": "south", "account": "bob"},
            {"id": "3", "name": "c", "zoneid": "z2", "zonename": "south", "projectid": "p", "project": "apollo"},
            {"id": "4", "name": "d"}])
        self.assertEqual([f"{line.split()[1]}name:{name}" for name in offered], self.words("cs listVolumes " + line))
        self.assertEqual(question, self.sent())

    def test_a_list_that_needs_what_the_line_lacks_is_not_asked(self):
        self.path = self.sync_as(("listNics", "virtualmachineid!"), ("removeNic", "nicid", "virtualmachineid"))
        self.assertEqual(([], []), (self.words("cs removeNic nicid="), self.asked))
        self.rows("listNics", [{"id": "n1", "name": "eth0"}])
        self.assertEqual(["nicid=name:eth0"], self.words("cs removeNic virtualmachineid=7 nicid="))
        self.assertEqual({"virtualmachineid": "7"}, self.sent())

    def test_without_a_list_options_and_regions_are_completed_all_the_same(self):
        os.unlink(self.path)
        self.ini("[lab]\n")
        for told, *lines in (  # no word, but what to type
            ("type: cs --sync", "cs listZo", "cs stopVirtualMachine id=", "cs listZones -c na"),
            ("no option '--nosuch'", "cs --nosuch l"), ("--quiet takes no value", "cs --quiet=l"),
            ("", "cs --endpoint http://cloud.invalid/$(x) listZo"),
        ):
            for line in lines:
                ((word, message),) = self.completed(line)
                self.assertEqual(("", True), (word, told in message), message)
        self.assertEqual(["--output"], self.words("cs --outp"))
        self.unset("endpoint", "key", "secret")
        self.assertEqual((["lab"], []), (self.words("cs -r la"), self.asked))

    @each("settings, told", ({"timeout": "abc"}, "timeout: 'abc' is not a number from"),
          ({"secret": ""}, "secret: missing; key and secret go together"), ({"endpoint": ""}, "`cs --configure` makes"))
    def test_a_configuration_that_cannot_be_used_is_told(self, settings, told):
        self.configure(**settings)
        ((word, message),) = self.completed("cs listZo")
        self.assertEqual(("", True), (word, told in message), message)

    def test_a_server_that_fails_or_hangs_gives_nothing_soon(self):
        self.assertLessEqual(cs._KEY_TIMEOUT, 1)
        self.configure(timeout="10", retry="3")
        release = threading.Event()
        self.addCleanup(release.set)
        for name, step in (("an error", Answer(431, {"r": {"errorcode": 431, "errortext": "no"}})),
                           ("a page", Answer(200, "<html>" + EVIL_TITLE)), ("dropped", DROP),
                           ("hangs", lambda _: release.wait(10) and DROP), ("nothing", Answer(200, {"r": {}})),
                           ("a list of other things", Answer(200, {"r": {"count": 6, "x": [1, None, "x", [2], {}]}})),
                           ("rate limit", Answer(429, {"r": {"errorcode": 429, "errortext": "retry after 9000 ms"}}))):
            with self.subTest(name), mock.patch.object(cs, "_KEY_TIMEOUT", 0.2):
                del self.cloud.requests[:]
                self.cloud.script("listVirtualMachines", step)
                self.assertEqual(([], ["listVirtualMachines"]), (self.words("cs stopVirtualMachine id="), self.asked))
        self.assertFalse(release.is_set())
        self.assertEqual(["zoneid=name:north"], self.words("cs listVolumes zoneid=nor"))  # others are asked

    def log_in_as(self, password):
        self.unset("key", "secret")
        user = self.cloud.users["admin"]
        self.configure(username="admin", password=password or user.password, domain=user.domain, retry="3")
        self.path = shutil.copy(self.path, cs._cache_path(cs.CloudStack(**cs.read_config())))

    def test_ids_with_a_user_name(self):
        self.log_in_as(None)
        self.assertEqual(["id=name:web-01"], self.words("cs stopVirtualMachine id=web-01"))
        self.assertEqual(["login", "listVirtualMachines"], self.asked[:2])
        self.say_error("listVirtualMachines", 531)
        self.assertEqual([], self.words("cs stopVirtualMachine id="))
        self.assertTrue(os.path.exists(self.path))

    def test_a_log_in_that_was_refused_is_not_tried_again_at_the_next_key(self):
        """Five of them lock an account."""
        self.log_in_as("wrong")
        self.cloud.script("login", DROP, DROP)
        self.assertEqual(([], ["login"]), (self.words("cs stopVirtualMachine id="), self.asked))
        self.cloud._scripts.clear()
        for _ in range(3):
            self.words("cs stopVirtualMachine id=")
        self.assertEqual(["login"] * 2, self.asked)  # after what was lost once, and then no more
        self.assertEqual([["", "to have commands completed, type: cs --sync"]], self.completed("cs listZ"))

    HOSTILE = ("$(touch pwned)", "`touch pwned`", "$HOME", "; touch pwned", "a\nb", "a\tb", "'", '"', "a'b", "@/etc/x",
               "\\", "~", "~root", "*", "?", "{a,b}", "a|b", "a&b", "<x", ">x", "!x", "#x", "^x", "a\x00b",
               "\x1b[2J", "\x9b2J", "\u202eabc", "ü", "\ud800", "", " ", "a ", " a", "x" + EVIL_TITLE)

    def test_no_word_is_offered_that_a_shell_could_evaluate(self):
        safe = r"(?:[A-Za-z0-9_.,:/@%+=\[\]-]|'[A-Za-z0-9_.:/@%+() -]+')+(?:\t[^\0-\x1f\x7f-\x9f\u202e]*)?\Z"
        entry = api_entry(["stopVirtualMachine", "id!"] + [name + "id" for name in self.HOSTILE])
        entry["response"] = [{"name": name} for name in self.HOSTILE]
        entries = [dict(api_entry((name, "id")), description=name) for name in self.HOSTILE if name]
        self.path = self.sync_as(entry, ("listVirtualMachines",), *entries)
        rows = [{"id": name, "name": f"bad-{number}"} for number, name in enumerate(self.HOSTILE)]
        rows += [{"id": f"good-{number}", "name": name} for number, name in enumerate(self.HOSTILE)]
        self.ini("".join(f"[{name}]\n" for name in self.HOSTILE if name.strip() and name.isprintable()))
        self.rows("listVirtualMachines", rows)
        stop = "cs stopVirtualMachine "
        for line in ("cs ", stop, stop + "id=", stop + "-c ", stop + "--where ", "cs -r "):
            for row in self.good("--complete=" + line).split("\n")[:-1]:
                self.assertRegex(row, safe, line)
        words = self.words("cs stopVirtualMachine id=")
        self.assertEqual(len(self.HOSTILE), len(words))  # the good ones, by name or by id
        self.assertEqual(["id=name:@/etc/x"], [word for word in words if ":" in word])

    @each("line", "cs $(touch pwned) list", "cs `touch pwned` ", "cs -r $(touch pwned) list",
          "cs listZones id=$(touch pwned", "cs listZones name='", 'cs listZones name="a b', "cs listZones -c $(x),",
          "cs \\", "cs -c", "cs -r", "cs -", "cs --=", "cs --output=", "cs --nosuch=", "cs --nosuch x ",
          "cs -o nonsense list", "", "cs", " ", "cs\t", "cs\nlistZ", "cs -- list", "cs =", "cs listZones =",
          "cs listZones =x", "cs --complete=x ", "cs listZones \x1b[2J", "cs listZones \udcff=", "cs --help l",
          "cs --config @ l", "cs " + "x" * 100000, "cs " + "'x y" * 30000, "cs listVirtualMachines tags[0].",
          "cs listVirtualMachines ids=,,", "cs \u00fc", "cs -r '", "cs --sort")
    def test_what_stands_on_the_line_is_never_evaluated(self, line):
        code, out, err = self.main("--complete=" + line)
        self.assertEqual((0, []), (code, re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)))
        self.assertEqual([], os.listdir(self.cwd))

class Typed:
    """A process on a pseudo-terminal of its own, and what is typed there."""

    def __init__(self, argv, env, columns=80, rows=24):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # Opened by the leader of a new session, the terminal becomes the one that Ctrl-C comes from.
        opened = ["/bin/sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(slave)]
        null = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.child = Child(opened + list(argv), env=env, **null)
        self.slave = slave
        self.output = b""
        self.ready = selectors.SelectSelector()
        self.ready.register(self.master, selectors.EVENT_READ)

    def read(self, seconds):
        """Take what is written there within this time; whether there is anything."""
        try:
            data = os.read(self.master, 65536) if self.ready.select(max(seconds, 0)) else b""
        except OSError:  # Linux says so that the other end is closed
            data = b""
        self.output += data
        return data != b""

    @property
    def text(self):
        while self.read(0):
            pass
        return self.output.decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_for(self, word):
        """Wait until this was written after what was waited for before."""
        deadline = time.monotonic() + 20
        while word not in self.output[self.at :]:
            if not self.read(deadline - time.monotonic()):
                raise AssertionError(f"{word} was not written: {self.output}")
        self.at = self.output.index(word, self.at) + len(word)

    at = 0

    def type(self, text):
        os.write(self.master, text.encode("utf-8"))

    def end(self):
        """The exit code; all output is in text then."""
        while self.child.poll() is None:
            self.read(0.05)
        os.close(self.slave)  # only now: a terminal that nobody has opened yet would seem closed
        return self.child.wait()

    def close(self):
        """End whatever still runs there."""
        self.child.end()
        for end in (self.slave, self.master):
            try:
                os.close(end)
            except OSError:
                pass


STUB = """#!/bin/sh
case "$1" in --complete=*|--completion) exec {python} -S -E {cs} "$@" ;; esac
printf '%s\\n' "$@" > "$HOME/typed.new" && mv "$HOME/typed.new" "$HOME/typed"
"""


@unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
class ShellCompletionTest(CompletionCase):
    """Real shells. Their `cs` completes by cs.py, and notes what else it is called with."""

    def setUp(self):
        super().setUp()
        os.mkdir(os.path.join(self.home, "bin"))
        self.write("bin/cs", STUB.format(python=shlex.quote(sys.executable), cs=shlex.quote(CS_PATH)), 0o755)
        path = os.path.join(self.home, "bin") + os.pathsep + os.environ["PATH"]
        self.env = dict(os.environ, PATH=path, TERM="xterm", LC_ALL="C.UTF-8", PS1="$ ", FISH_UNIT_TESTS_RUNNING="1")
        self.ini("[lab]\nendpoint = http://cloud.invalid/\n[lagoon]\n[$(touch pwned)]\n")
        self.rename("db-01", name="front end (2)", displayname="front end (2)")

    # What each is started with, and what is typed there first, as README says.
    SHELLS = {
        "bash": ("--norc --noprofile", "bind 'set enable-bracketed-paste off' 'set show-all-if-ambiguous on'",
                 'eval "$(cs --completion bash)"'),
        # compinit reads the head of every function it finds; those of other programs are of no interest here.
        "zsh": ("-f", "PS1='$ '; setopt extendedglob; unsetopt prompt_sp",
                "fpath=(${fpath:#*/Completion/(^(Base|Zsh|Unix))})",
                'autoload -Uz compinit; compinit -u -d "$HOME/dump"; eval "$(cs --completion zsh)"'),
        "fish": ("", "cs --completion fish | source"),
    }

    def start(self, name):
        """A shell on a terminal."""
        found = shutil.which(name) or self.skipTest(f"{name} is not installed")
        options, *setup = self.SHELLS[name]
        shell = self.on_pty([found, *options.split(), "-i"], self.env)
        for line in [*setup, 'printf "REA%s\\n" DY']:
            shell.type(line + "\n")
        shell.wait_for(b"READY")
        return shell

    def typed(self, shell, line):
        """The arguments that `cs` is called with after a line was typed, its tabs included, and Enter."""
        path = os.path.join(self.home, "typed")
        shell.type(line + "\n")
        deadline = time.time() + 20
        while not os.path.exists(path):
            self.assertLess(time.time(), deadline, shell.text)
            shell.read(0.005)
        words = open_bytes(path).decode("utf-8").split("\n")[:-1]
        os.unlink(path)
        return words

    @each("name", *SHELLS)
    def test_it_completes(self, name):
        machine = self.machine()
        self.write("cloud-init.yaml", "#cloud-config")
        shell = self.start(name)
        for line, *expected in (("cs deployV\t templ\tx", "deployVirtualMachine", "templateid=x"),
                                (f"cs stopVirtualMachine forced=f\t id={machine[:6]}\t",
                                 "stopVirtualMachine", "forced=false", "id=" + machine),
                                ("cs listZones -r lag\t --output=ta\t", "listZones", "-r", "lagoon", "--output=table"),
                                ("true; A=1 cs listZones -c internald\t", "listZones", "-c", "internaldns1"),
                                ("cs listVirtualMachines ids=name:x,web-01\t", "listVirtualMachines",
                                 "ids=name:x,name:web-01"),
                                (f"cs deployVirtualMachine userdata=@{self.home}/cloud-in\t", "deployVirtualMachine",
                                 f"userdata=@{self.home}/cloud-init.yaml")):
            self.assertEqual(expected, self.typed(shell, line))
        begun = ["fr", "name:fr"] + (["name:'front e", "name:'fr", "'name:front e", "'fr"] if name != "fish" else [])
        for name, words in (("web-01", ["web-01", "name:web-01"]), ("front end (2)", begun)):
            for word in words:
                self.assertEqual(["stopVirtualMachine", "id=name:" + name],
                                 self.typed(shell, f"cs stopVirtualMachine id={word}\t"), word)

    @each("name", *SHELLS)
    def test_nothing_is_evaluated(self, name):
        names = ("$(touch pwned)", "`touch pwned`", "x;touch pwned", "a' b", 'a" b', "%F{red}%(?..)", EVIL_TITLE)
        names += ("..", "é")
        rows = [{"id": f"good-{letter}-{letter}", "name": name} for letter, name in zip("abcdefghi", names)]
        rows += [{"id": name, "name": "bad"} for name in names]
        self.path = self.sync_as(("stopVirtualMachine", "id!"), ("listVirtualMachines",), *[(name,) for name in names])
        self.rows("listVirtualMachines", rows)
        shell = self.start(name)
        if name == "fish":
            self.assertIn("id=good-a-a\t$(touch pwned)\n", self.fish_offers("cs stopVirtualMachine id="))
        else:
            shell.type("cs \t\t")
            shell.wait_for(b"stopVirtualMachine")
            shell.type("\x15cs stopVirtualMachine id=good-\t\t")
            shell.wait_for(b"good-i-i")
            shell.type("\x15")
        self.assertEqual(["stopVirtualMachine", "id=good-c-c"], self.typed(shell, "cs stopVirtualMachine id=good-c\t"))
        self.assertEqual([], [path for path in os.listdir(self.cwd) + os.listdir(self.home) if "pwned" in path])
        self.assertNotIn(EVIL_TITLE, shell.text)

    def fish_offers(self, line):
        """What fish would show, whose pager writes more than words."""
        words = ["fish", "-c", f"cs --completion fish | source; complete -C '{line}'"]
        return Child(words, env=self.env).finish()[1].decode("utf-8")

    @each("name", *SHELLS)
    def test_what_to_type_without_a_list_is_shown_and_not_put_on_the_line(self, name):
        os.unlink(self.path)
        shell = self.start(name)
        shell.type("cs listZ\t\t")
        shell.wait_for(b"type: cs --sync")
        self.assertEqual(["listZ"], self.typed(shell, ""))

    @each("name", *SHELLS)
    def test_required_parameters_come_first_and_what_was_typed_stays(self, name):
        shell = self.start(name)
        if name == "fish":
            for line, first in (("cs deployVirtualMachine ", "serviceofferingid="),
                                ("cs stopVirtualMachine id=web-01", "id=name:web-01\t" + self.machine())):
                self.assertTrue(self.fish_offers(line).startswith(first), line)
            return
        shell.type("cs deployVirtualMachine \t")
        for word in (b"serviceofferingid=", b"zoneid=", b"account="):
            shell.wait_for(word)
        shell.type("\x15cs stopVirtualMachine id=web-0\t")
        shell.wait_for(b"name:web-02" if name == "bash" else b"name:web-02  -- ")
        self.assertEqual(["stopVirtualMachine", "id=name:web-01"], self.typed(shell, "1\t"))

    def test_bash_may_take_a_word_apart_or_not(self):
        """The script must do with and without `=` and `:` among the characters that end a word."""
        self.start("bash")
        self.write("script", self.good("--completion", "bash"))
        program = """
            source "$HOME/script"; COMP_LINE="cs stopVirtualMachine id=name:web-01" COMP_POINT=${#COMP_LINE}
            COMP_WORDS=(cs)
            for COMP_WORDBREAKS in ' =:' ' =' ' '; do _cs_complete; printf '%s\\n' "${COMPREPLY[@]}"; done
        """
        code, out, err = Child(["bash", "-c", program], env=self.env).finish()
        self.assertEqual((0, ["web-01", "name:web-01", "id=name:web-01"]), (code, out.decode().split()), err)


# === [8.6] configure ==================================================================================================


def configparser_of(path):
    parser = configparser.RawConfigParser()
    with open(path, encoding="utf-8-sig") as file:
        parser.read_file(file)
    return parser


class ConfigureTest(CloudCase):
    """cs --configure asks, tries, and writes a section of ~/.cloudstack.ini."""

    LAB = "[lab]\nendpoint = http://x/\n"
    QUESTIONS = ("Endpoint", "API key", "Secret key", "Output format")

    def setUp(self):
        super().setUp()
        self.unset("endpoint", "key", "secret", "poll_interval", "timeout", "retry_backoff")
        self.path = os.path.join(self.home, ".cloudstack.ini")
        self.admin = self.cloud.users["admin"]
        self.answers = [self.cloud.endpoint, self.admin.key, self.admin.secret, "table"]

    def asking(self, code, *args, answers=None):
        """--configure with these answers on standard input, which must end with this exit code; what it says."""
        answers = self.answers if answers is None else answers
        with mock.patch("sys.stdin", io.StringIO("".join(answer + "\n" for answer in answers))):
            return self.says(code, "--configure", *args)

    def text(self):
        return open_bytes(self.path).decode("utf-8")

    def test_it_writes_a_section_that_works_and_that_nobody_else_can_read(self):
        self.addCleanup(os.umask, os.umask(0))
        err = self.asking(0)
        self.assertHolds(err, *self.QUESTIONS, f"[cloudstack] is in {self.path}")
        self.assertRegex(err, r"\d\d+ commands of \S+ are now known\nThey work\.\n")
        self.assertNotIn(self.admin.secret, err)
        self.assertEqual("[cloudstack]\nendpoint = {}\nkey = {}\nsecret = {}\noutput = {}\n".format(*self.answers),
                         self.text())
        self.assertEqual(["listApis"], self.asked)
        self.assertIn("no command 'listNothing'", self.usage("listNothing"))
        os.chmod(self.path, 0o644)
        self.asking(0, "--region", "my lab")
        self.good("listZones", "-r", "my lab")
        if os.name == "posix":
            self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)

    def test_an_environment_that_goes_before_it_is_said(self):
        self.configure(endpoint=self.cloud.endpoint)
        self.assertIn("CLOUDSTACK_ENDPOINT, key and secret go before it", self.asking(0))

    def test_a_role_that_may_not_list_commands(self):
        self.say_error("listApis", 432)
        self.assertRegex(self.asking(0), "Your role may not ask for the list of commands; .*\nThey work.")
        self.assertEqual(["listApis", "listCapabilities"], self.asked)

    @each("more, written", ([], "json"), ([""], "json"), (["CSV"], "CSV"))
    def test_the_output_format(self, more, written):
        self.asking(0, answers=self.answers[:3] + more)
        self.assertEqual(f"output = {written}", self.text().splitlines()[-1])
        self.good("listZones")

    @each("other, code", ("[other]\nkey = x\n", 0), ("[cloudstack]\nkey = x\n", 2))
    def test_what_another_wrote_meanwhile_stays_and_no_section_is_doubled(self, other, code):
        self.cloud.script("listApis", lambda record: self.ini(other) and None)
        err = self.asking(code)
        self.assertEqual(code == 2, "[cloudstack] stands in" in err)
        self.assertTrue(self.text().startswith(other + "\n[cloudstack]\n" if code == 0 else other), self.text())
        self.assertEqual(1, self.text().count("[cloudstack]"))

    @each("args, env, path, section", ([], {"region": "lagoon"}, ".cloudstack.ini", "lagoon"),
          (["--config", "~/other.ini", "-r", "eu"], {}, "other.ini", "eu"))
    def test_where_it_writes(self, args, env, path, section):
        self.configure(**env)
        self.assertNotIn("go before it", self.asking(0, *args))
        self.assertEqual([section], configparser_of(os.path.join(self.home, path)).sections())
        self.good("listZones", *args)

    @each("before, args, says",
          ("", ["-r", "a]b"], "a]b"), ("", ["-r", "[a"], "[a"), ("", ["-r", " a"], " a"), ("", ["-r", "a\nb"], "name"),
          ("", ["-r", "DEFAULT"], "DEFAULT"), ("", ["lab"], "does not go with a command"),
          ("# mine\n[cloudstack]\nkey = old\n", [], "[cloudstack] stands in {};"),
          ("[a]\nx = 1\n[lab] ; the second\nkey = 1\n", ["-r", "lab"], "[lab] stands in {};"),
          ("[a]\nx = [b]\n [lab]\n[lab]\n", ["-r", "lab"], "[lab] stands in {};"),
          ("no section\n", [], "{}"), ("[a]\n[a]\n", [], "{}"), (b"\xff\xfe", [], "{}"), ("[cloudstack\n", [], "{}"))
    def test_what_is_refused_before_anything_is_asked(self, before, args, says):
        """A section that exists is not edited, and a broken file not made worse."""
        self.ini(before)
        err = self.asking(2, *args)
        self.assertIn(says.format(self.path), err)
        self.assertNotIn("Endpoint", err)
        self.assertEqual(before if isinstance(before, bytes) else before.encode(), open_bytes(self.path))
        self.assertEqual([], self.asked)

    @each("before", "", "\n\n", "# only a comment", "[lab]\nendpoint = http://x/", "\ufeff[lab]\nkey = old\n",
          "[lab]\nkey = old\r\n\r\n[a]\r\nkey = 1\r\n", "[DEFAULT]\ntimeout = 3\n[lab]\nkey = 1\n",
          "[Cloudstack]\nkey = 1\n", "[lab]\nheader_a = 1\n  [cloudstack]\nkey = 1\n", "[lab]\n  key = 1\n",
          "# page\x0cbreak = \u2028 x\n[lab]\nkey = a\x85b\x1cc\n", "[lab]\nkey = 1\n#[cloudstack]\n; x = 100%\n\n\n")
    def test_everything_else_in_the_file_stays(self, before):
        """And what could be read before can be read afterwards, and says the same about other regions."""
        self.ini(before)
        others = {name: dict(section) for name, section in configparser_of(self.path).items()}
        self.asking(0)
        kept = before.lstrip("\ufeff").replace("\r\n", "\n").rstrip("\n")
        self.assertTrue(self.text().startswith(kept))
        after = {name: dict(section) for name, section in configparser_of(self.path).items()}
        self.assertEqual(others, {name: section for name, section in after.items() if name != "cloudstack"})
        settings = cs.read_config()
        self.assertEqual(self.answers[:3], [settings[name] for name in ("endpoint", "key", "secret")])
        self.assertEqual("3" if "timeout = 3" in before else "10", str(settings["timeout"]))

    @each("secret", "100%", "%%", "%(endpoint)s", "a%b%%c%%%d", "a=b:c", "#x", ";x", "x # y ; z", "[lab]", '"x"', "'",
          "\u00e4\u20ac\U0001f680", "a  b", "a\tb", "$HOME", "key = value", "\\n", "x" * 3000)
    def test_secrets_of_every_kind_are_read_back_the_same(self, secret):
        self.reply("listApis", {"count": 1, "api": [api_entry(("listZones",))]})  # whatever the key
        self.asking(0, answers=[self.cloud.endpoint, "k" + secret, secret, ""])
        settings = cs.read_config()
        self.assertEqual(("k" + secret, secret), (settings["key"], settings["secret"]))

    @each("answers, says", ([None, None, "CANARY"], "HTTP 401"),
          (["http://127.0.0.1:1/client/api?site=CANARY", "k", "CANARY"], "refused"))
    @each("more, code", (["n"], 1), ([""], 1), (["what?"], 1), ([], 2), (["y"], 0), (["YES"], 0))
    def test_what_does_not_work_is_asked_about(self, answers, says, more, code):
        self.ini(self.LAB)
        self.configure(timeout="1")
        self.say_error("listApis", 401, "CANARY is wrong")
        given = [given or usual for given, usual in zip(answers, self.answers)]
        err = self.asking(code, answers=given + more)
        self.assertHolds(err, "Save them all the same?", says)
        self.assertLacks(err, "CANARY", "They work")
        self.assertEqual((code != 0, code == 0), (self.text() == self.LAB, "secret = CANARY\n" in self.text()))

    @each("place, wrong", (0, ["", "HIDDEN", "HIDDEN.example/client/api", "file:///HIDDEN", "http://HIDDEN:b@c/"]),
          (1, ["", "  "]), (2, [""]), (3, ["HIDDEN"]))
    def test_an_answer_that_cannot_be_used_is_asked_for_again_before_the_next(self, place, wrong):
        """And is never repeated: it may be a secret, pasted one line too early."""
        err = self.asking(0, answers=self.answers[:place] + wrong + self.answers[place:])
        self.assertEqual(len(wrong) + 1, err.count(self.QUESTIONS[place]))
        self.assertNotIn("HIDDEN", err)
        self.assertEqual(self.admin.secret, cs.read_config()["secret"])

    @each("count, wrong", (0, []), (0, ["nonsense"]), (1, []), (1, [""]), (2, []), (None, []))
    def test_the_end_of_input_leaves_everything_as_it_was(self, count, wrong):
        self.ini(self.LAB)
        if count is None:
            with mock.patch("sys.stdin", None):
                err = self.fails(2, "--configure")
        else:
            err = self.asking(2, answers=self.answers[:count] + wrong)
        self.assertEqual([question in err for question in self.QUESTIONS], [at <= (count or 0) for at in range(4)])
        self.assertEqual(([], self.LAB), (self.asked, self.text()))

    def test_it_is_written_in_one_step_or_not_at_all(self):
        self.ini(self.LAB)
        with mock.patch("os.replace", side_effect=OSError("no")):
            self.assertIn("cannot write", self.asking(2))
        self.assertEqual(self.LAB, self.text())
        self.assertEqual([".cloudstack.ini"], [name for name in os.listdir(self.home) if "cloudstack" in name])
        err = self.asking(2, "--config", os.path.join(self.home, "no", "such", "folder.ini"))
        self.assertLacks(err, "Traceback", self.admin.secret)

    @unittest.skipUnless(hasattr(os, "symlink"), "needs symbolic links")
    def test_a_symbolic_link_is_followed(self):
        target = self.write("work/cs.ini", "# mine\n")
        os.symlink(os.path.join("work", "cs.ini"), self.path)
        self.asking(0)
        self.assertTrue(os.path.islink(self.path))
        self.assertTrue(open_bytes(target).startswith(b"# mine\n\n[cloudstack]\n"))
        self.assertEqual(["cs.ini"], os.listdir(os.path.dirname(target)))

    def test_certificates_of_the_file_are_used_for_the_trial(self):
        """A private authority's, for instance: without them the right answers would seem wrong."""
        self.ini("[DEFAULT]\nverify = /no/such/authority.pem\nheader_x-tenant = blue\n")
        self.asking(0)
        self.assertEqual("blue", self.cloud.requests[0].headers.get("X-Tenant"))

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    @each("typed, code", ("{}\n", 0), ("half of it\x03", 130), ("\x04", 2))
    def test_on_a_terminal_the_secret_is_not_shown(self, typed, code):
        """And Ctrl-C and Ctrl-D leave everything as it was."""
        self.ini(self.LAB.replace("lab", "other"))
        terminal = self.on_pty([sys.executable, CS_PATH, "--configure", "-r", "lab"], dict(os.environ, TERM="xterm"))
        for question, reply in zip(self.QUESTIONS[:3], self.answers[:2] + [None]):
            terminal.wait_for(question.encode())
            terminal.wait_for(b": ")
            terminal.type(reply + "\n" if reply else typed.format(self.admin.secret))
        if code == 0:
            terminal.wait_for(b"[json]: ")
            terminal.type("\n")
        self.assertEqual(code, terminal.end(), terminal.text)
        self.assertIn(self.admin.key, terminal.text)
        self.assertLacks(terminal.text, self.admin.secret, "half", "Traceback")
        self.assertEqual(code == 0, "[lab]" in self.text())


# === [8.7] names for ids ==============================================================================================


class NamesForIdsTest(CompletionCase):
    """name:web-01 in the place of an id."""

    def row(self, table, name, **where):
        return next(row for row in self.cloud.cloud.tables[table] if row.get("name", row.get("username")) == name
                    and all(row.get(key) == value for key, value in where.items()))

    def id_of(self, table, name, **where):
        return self.row(table, name, **where)["id"]

    def planned(self, *words):
        """The parameters that --dry-run says would be sent."""
        code, out, self.told = self.main("--dry-run", *words)
        self.assertEqual(0, code, self.told)
        pairs = [line.partition("=")[::2] for line in out.splitlines()[1:]]
        return {name: value for name, value in pairs if name.lower() not in OWN_PARAMETERS}

    def refused(self, *words):
        """What is said of a call that is not made; lists are all that the server was asked for."""
        del self.cloud.requests[:]
        code, out, err = self.main(*words)
        self.assertEqual((2, ""), (code, out), err)
        self.assertEqual([], [name for name in self.asked if not name.startswith("list")])
        self.assertRegex(err, r"\Acs: (?s:.*)\n    The call was not sent\.\n\Z")
        return err

    def test_what_names_become(self):
        web, db, web11 = (self.id_of("virtualmachine", name) for name in ("web-01", "db-01", "web-11"))
        ours, root = self.row("virtualmachine", "cache-01"), self.id_of("domain", "ROOT")
        north, apollo = self.id_of("zone", "north"), self.id_of("project", "apollo")
        net = self.id_of("network", "web", zonename="north", account="admin")
        self.change(ours, displayname="The cache, no. 1")
        start, listed = "startVirtualMachine|", "listVirtualMachines|"
        for line, expected in (
            ("startvirtualmachine|ID=name:web-01", {"ID": web}), (start + "id=name:WEB-01", {"id": web}),
            (start + "id=name:The cache, no. 1", {"id": ours["id"]}), (start + "id=name:web-11", {"id": web11}),
            (listed + "ids=name:web-01|ids=" + db, {"ids": web + "," + db}),
            (f"{listed}ids=name:The cache, no. 1,{db},name:web-01", {"ids": f"{ours['id']},{db},{web}"}),
            (listed + "zoneid=name:north|templateid=name:Debian 12",  # one id in two zones
             {"zoneid": north, "templateid": self.id_of("template", "Debian 12")}),
            (listed + "networkid=name:web|zoneid=name:north|account=admin|domainid=name:/",
             {"networkid": net, "zoneid": north, "account": "admin", "domainid": root}),
            ("listUsers|id=name:admin", {"id": self.id_of("user", "admin")}),
            ("createVolume|projectid=name:apollo|diskofferingid=name:20 GB|--force",
             {"projectid": apollo, "diskofferingid": self.id_of("diskoffering", "20 GB")}),
            ("createTags|resourceids=name:web-01,name:db-01|resourcetype=UserVm|tags[0].key=a",
             {"resourceids": web + "," + db, "resourcetype": "UserVm", "tags[0].key": "a"}),
            (listed + "ids=name:web-01,name:web-11",  # the project is named, or its things are not seen
             {"ids": web + "," + web11, "projectid": apollo}),
            ("startAnew|virtualmachineid=name:web-01|--force", {"virtualmachineid": web}),
        ):
            with self.subTest(line):
                self.assertEqual(expected, self.planned(*line.split("|")))
        self.assertEqual({"list"}, {name[:4] for name in self.asked})

    def test_what_is_no_name(self):
        path = self.write("id.txt", "name:web-01\n")
        for words, expected in (
            (['id="name:web-01"'], "name:web-01"), (["id='name:x'"], "name:x"), (["id=@" + path], "name:web-01"),
            (["id=@@name:x"], "@name:x"), (["id=x,name:web-01"], "x,name:web-01"), (["id=Name:x"], "Name:x"),
            (["id='name:x'", "id=y"], "name:x,y"), (["id=y", "id=@" + path], "y,name:web-01"),
        ):
            self.assertEqual({"id": expected}, self.planned("startVirtualMachine", *words))
        self.assertEqual({"name": "name:x"}, self.planned("listVirtualMachines", "name=name:x"))
        self.assertEqual([], self.asked)
        one_name = cs._Value("name:x,name:y", "name")  # out of a row
        self.assertEqual([one_name], cs._split_names("ids", one_name))

    @each("word, told", ("startVirtualMachine id=name:", "id=name:: a name is missing after name:"),
          ("createTags tags[0].key=a tags[0].value=b resourceids=name:x resourcetype=Nonsense",
           "no list command to look a name up by; give an id"))
    def test_refused_without_a_question(self, word, told):
        self.assertIn(told, self.usage(*word.split()))

    def test_none(self):
        err = self.refused("startVirtualMachine", "id=name:web-1")
        self.assertIn("id=name:web-1: listVirtualMachines has nothing of this name; did you mean", err)
        self.assertHolds(err, f"      {self.id_of('virtualmachine', 'web-01')}  web-01  domain ROOT, account admin",
                         f"      {self.id_of('virtualmachine', 'web-11')}  web-11  domain ROOT, project apollo")
        self.assertIn("Rocky Linux 9", self.refused("listVirtualMachines", "templateid=name:rocky"))
        self.assertIn("has nothing of this name; cs listServiceOfferings -o table -c id,name shows what there is\n",
                      self.refused("listVirtualMachines", "serviceofferingid=name:zzzzzz"))
        self.assertIn("cs listVirtualMachines --all --where 'name~^qqq-' | cs ... --each",
                      self.refused("stopVirtualMachine", "id=name:qqq-*"))

    def test_several(self):
        err = self.refused("restartNetwork", "id=name:web", "--force")
        self.assertIn("id=name:web: listNetworks has 6 of this name; did you mean", err)
        for zone, account in itertools.product(("north", "south"), ("admin", "user")):
            row = self.row("network", "web", zonename=zone, account=account)
            self.assertIn(f"      {row['id']}  web  zonename {zone}, domain {row['domain']}, account {account}\n", err)
        many = [{"id": str(number), "name": "x"} for number in range(13)]
        self.reply("listVirtualMachines", {"count": 13, "virtualmachine": many})
        self.reply("listVirtualMachines", {})
        err = self.refused("stopVirtualMachine", "id=name:x")
        self.assertHolds(err, "\n      9  x\n      and 3 more\n    The call was not sent.")

    def test_names_are_shown_so_that_they_do_no_harm(self):
        self.change(self.row("virtualmachine", "db-01"), name="evil" + EVIL_TITLE + "\nid")
        err = self.refused("startVirtualMachine", "id=name:evil")
        self.assertEqual((True, [], 3), ("evil\\x1b" in err, re.findall("[\x00-\x09\x0b-\x1f]", err), err.count("\n")))

    def answers(self, command, function):
        """Have a list command answer with the rows that a function gives for its parameters, or an error's code."""

        def answer(record):
            rows = function(record.params)
            if isinstance(rows, int):
                return Answer(rows, {"r": {"errorcode": rows, "errortext": "Not for you"}})
            return Answer(200, {"r": {"count": len(rows), "thing": rows} if rows else {}})

        self.cloud._scripts.pop(command, None)
        self.cloud.script(command, *[answer] * 30)

    OWN = {"id": "1", "name": "web", "account": "admin"}
    PROJECTS = {"id": "2", "name": "web", "project": "apollo", "projectid": "p"}
    OTHERS = {"id": "3", "name": "web", "account": "bob"}

    @each("rows, own, words, sent", ([OWN, PROJECTS], [OWN], "stopVirtualMachine id=name:web", None),
          ([OWN, OTHERS], [OWN], "stopVirtualMachine id=name:web", {"id": "1"}),
          ([OWN, OTHERS], [], "stopVirtualMachine id=name:web", None),
          ([OWN, OTHERS, dict(OWN, id="4")], [OWN, dict(OWN, id="4")], "stopVirtualMachine id=name:web", None),
          ([OTHERS, PROJECTS], [], "listVolumes virtualmachineid=name:web projectid=p",
           {"virtualmachineid": "2", "projectid": "p"}),
          ([OTHERS, PROJECTS], [], "listVolumes virtualmachineid=name:web account=bob",
           {"virtualmachineid": "3", "account": "bob"}),
          ([OTHERS, PROJECTS], [], "listVolumes virtualmachineid=name:web", None),
          ([PROJECTS], [], "listVolumes virtualmachineid=name:web", {"virtualmachineid": "2", "projectid": "p"}),
          ([PROJECTS], [], "stopVirtualMachine id=name:web", {"id": "2"}))
    def test_an_account_s_and_a_project_s(self, rows, own, words, sent):
        """Nothing stops at the first hit; one's own comes first among accounts, and that is said."""

        def found(params):
            if "listall" not in params:
                return own
            return [row for row in rows if ("projectid" in row) == ("projectid" in params)]

        self.answers("listVirtualMachines", found)
        if sent is None:
            self.assertHolds(self.refused(*words.split()), *(f"      {row['id']}  web  " for row in rows))
        else:
            self.assertEqual(sent, self.planned(*words.split()))
            said = "id=name:web: several have it; your account's own is 1\n" if len(rows) == 2 and own else ""
            self.assertEqual(said, self.told)

    def test_what_a_new_thing_uses_is_the_account_s_where_it_is_made_for_the_account(self):
        self.answers("listNetworks", lambda params: [self.PROJECTS] if "projectid" in params else [self.OWN])
        words = ["deployVirtualMachine", "zoneid=z", "templateid=t", "serviceofferingid=s", "networkids=name:web"]
        self.assertEqual("1", self.planned(*words)["networkids"])
        self.assertEqual("2", self.planned(*words, "projectid=p")["networkids"])

    @each("found, zone, expected", ("A1 A2 B2", "1", "A"), ("A1 A2 B1", "1", None), ("A1 A2", "2", "A"),
          ("A1 B2", "3", None), ("A1 C", "2", "C"))
    def test_one_template_in_several_zones(self, found, zone, expected):
        rows = [dict({"id": place[0], "name": "ubuntu"}, **({"zoneid": place[1]} if place[1:] else {}))
                for place in found.split()]
        self.answers("listTemplates", lambda params: rows)
        self.answers("listZones", lambda params: [{"id": zone, "name": "x"}])
        words = ["deployVirtualMachine", "serviceofferingid=s", "templateid=name:ubuntu", "zoneid=name:x"]
        if expected:
            self.assertEqual(expected, self.planned(*words)["templateid"])
        else:
            self.assertHolds(self.refused(*words), *(f"  {row['id']}  ubuntu" for row in rows))

    def test_what_tells_candidates_apart(self):
        for field in "path vpcname vmname volumename created state domain".split():
            rows = [{"id": number, "name": "x", field: f"{field}-{number}", "account": "a"} for number in (1, 2)]
            error = self.raised(LookupError, cs.pick_row, "listVolumes", "x", rows)
            self.assertIn(f"\n      1  x  {field} {field}-1\n      2  x  {field} {field}-2", str(error))

    def test_a_domain_by_its_path(self):
        rows = [{"id": str(number), "name": "dev", "path": f"ROOT/{name}/dev"} for number, name in enumerate("ab")]
        self.answers("listDomains", lambda params: rows)
        for name, ident in (("ROOT/a/dev", "0"), ("/b/dev", "1")):
            self.assertEqual({"domainid": ident}, self.planned("listVirtualMachines", "domainid=name:" + name))
            self.assertEqual("dev", self.sent()["keyword"])

    def test_what_the_look_up_asks(self):
        """Few rows where a name can be a keyword; nothing is lost by that. And once for one name."""
        self.planned("listVolumes", "virtualmachineid=name:web-01", "virtualmachineid=name:web-01")
        asked = [[self.sent(number).get(name) for name in ("listall", "keyword", "projectid")] for number in range(2)]
        self.assertEqual(([["true", "web-01", None], ["true", "web-01", "-1"]], 2), (asked, len(self.asked)))
        self.planned("listVirtualMachines", "templateid=name:Rocky Linux 9")
        self.assertEqual(["executable", "self", "all"], [self.sent(number)["templatefilter"] for number in (2, 4, 6)])

        del self.cloud.requests[:]
        last = self.cloud.cloud.tables["virtualmachine"][31]
        self.change(last, displayname="Müller % 1")
        with mock.patch.object(cs, "PAGE_SIZE", 5):
            self.assertEqual({"id": last["id"]}, self.planned("startVirtualMachine", "id=name:Müller % 1"))
        self.assertGreater(len(self.asked), 5)
        self.assertEqual([], [number for number in range(len(self.asked)) if "keyword" in self.sent(number)])

    def test_what_not_everybody_may_ask_for(self):
        """`all` templates, those of projects; but not the list itself."""
        words = ["listVirtualMachines", "templateid=name:x"]
        self.answers("listTemplates", lambda params: 431 if params.get("templatefilter") == "all" else [])
        self.assertIn("has nothing of this name", self.refused(*words))
        for code in (431, 432, 531):
            self.answers("listTemplates", lambda params, code=code: code)
            err = self.says(2, *words)
            self.assertIn(f"templateid=name:x: HTTP {code} response from CloudStack: Not for you; give an id\n", err)
        self.answers("listTemplates", lambda params: 530 if "-1" in params.values() else [{"id": "1", "name": "x"}])
        self.assertIn("Not for you\n  Call: cs listTemplates", self.says(1, *words))  # more may have the name

    def test_an_error_of_the_call_shows_what_was_typed(self):
        self.say_error("stopVirtualMachine", 530, "out of order")
        code, out, err = self.main("stopVirtualMachine", "id=name:web-01")
        self.assertEqual((1, {"id": self.id_of("virtualmachine", "web-01")}), (code, self.sent()))
        self.assertIn("  Call: cs stopVirtualMachine id=name:web-01\n", err)

    def test_the_list_of_commands_is_fetched_when_it_is_missing(self):
        os.unlink(self.cache_file())
        web = {"id": self.id_of("virtualmachine", "web-01")}
        self.assertEqual(web, self.planned("startVirtualMachine", "id=name:web-01"))
        self.assertEqual(f"{len(COMMANDS)} commands of {self.cloud.endpoint} are now known\n", self.told)
        self.planned("startVirtualMachine", "id=name:web-01")
        self.assertEqual((1, ""), (self.asked.count("listApis"), self.told))
        os.unlink(self.cache_file())
        self.say_error("listApis", 530)
        self.assertIn("530", self.says(1, "startVirtualMachine", "id=name:web-01"))

    def test_a_list_command_that_needs_more(self):
        self.sync_as(("listProjectRoles", "projectid!", "keyword"), ("updateProjectRole", "id!", "projectid"))
        self.answers("listProjectRoles", lambda params: [{"id": "7", "name": "x"}] if "projectid" in params else 431)
        told = "id=name:x: listProjectRoles looks it up, and needs projectid; or give an id\n"
        self.assertIn(told, self.usage("updateProjectRole", "id=name:x"))
        self.assertEqual({"id": "7", "projectid": "p"}, self.planned("updateProjectRole", "id=name:x", "projectid=p"))
        self.assertIn("has nothing of this name", self.refused("updateProjectRole", "id=name:no", "projectid=p"))

    # List commands of 4.23; of two with what they require.
    LISTS = ("VirtualMachines Templates:templatefilter Isos Users UserKeys Clusters ClusterDrsPlan Hosts GpuDevices "
             "SystemVms Routers StoragePools Networks NetworkACLLists PublicIpAddresses LoadBalancerRules Volumes "
             "LoadBalancers Zones InstanceGroups Domains OsTypes KubernetesClusters AutoScalePolicies "
             "TemplatePermissions:id")

    @each("lister, uses", *(line.split(": ") for line in """
Users: registerUserKeys.id getUserKeys.id
Clusters: generateClusterDrsPlan.id executeClusterDrsPlan.id
ClusterDrsPlan: listClusterDrsPlan.id
Hosts: discoverGpuDevices.id prepareHostForMaintenance.id importVm.convertinstancehostid
Templates: updateTemplatePermissions.id listTemplatePermissions.id createTags.resourceids.Template
SystemVms: migrateSystemVm.virtualmachineid
VirtualMachines: resetPasswordForVirtualMachine.id updateVMAffinityGroup.id getVMPassword.id
VirtualMachines: createTags.resourceids.UserVm
Routers: changeServiceForRouter.id upgradeRouterTemplate.id
LoadBalancerRules: assignToLoadBalancerRule.id removeFromLoadBalancerRule.id createTags.resourceids.LoadBalancer
LoadBalancers: deleteLoadBalancer.id
Volumes: findStoragePoolsForMigration.id
StoragePools: createVolume.storageid createSnapshot.storageids enableStorageMaintenance.id
Networks: createNetwork.associatednetworkid
NetworkACLLists: createNetwork.aclid
PublicIpAddresses: createFirewallRule.ipaddressid disassociateIpAddress.id
Zones: copyTemplate.destzoneids
InstanceGroups: listVirtualMachines.groupid
Domains: createDomain.parentdomainid
OsTypes: updateGuestOs.id importVm.osid
KubernetesClusters: getKubernetesClusterConfig.id
AutoScalePolicies: deleteAutoScalePolicy.id createAutoScaleVmGroup.scaleuppolicyids
None: removeIpFromNic.id createTags.resourceids createTags.resourceids.Nonsense deployVirtualMachine.customid
None: revokeSecurityGroupIngress.id
""".strip().split("\n")))
    def test_which_list_has_the_ids(self, lister, uses):
        catalog = cs._make_catalog(api_entry(("list" + name, *(more + "!" for more in needs)))
                                   for name, *needs in (text.split(":") for text in self.LISTS.split()))
        for use in uses.split():
            command, param, *kind = use.split(".")
            found = cs._lister(catalog, command, param, {"resourcetype": kind[0]} if kind else {})
            self.assertEqual(lister, found.name[4:] if found else "None", use)

    def test_where_the_server_relates_a_parameter_to_list_commands_it_is_one_of_them(self):
        entry = api_entry(("stopThing", "id!", "otherid"))
        for name in ("listThings", "listUsers,stopThing", "listNothing", "stopThing", ""):
            entry["params"][0]["related"] = name
            catalog = cs._make_catalog([entry, api_entry(("listThings",)), api_entry(("listUsers", "x!"))])
            found = cs._lister(catalog, "stopThing", "id", {})
            self.assertEqual({"listUsers,stopThing": "listUsers", "listNothing": None}.get(name, "listThings"),
                             found and found.name, name)


class FindIdTest(ProtocolCase):
    """client.find_id()"""

    ROWS = [{"id": 1, "name": "Zurich"}, {"id": 2, "name": "geneva"}, {"id": 2, "name": "geneva", "x": 1}, 7,
            {"id": 3, "name": "Geneva"}, {"id": 4, "username": "ann"}, {"id": 5, "name": "x", "displayname": "y"},
            {"name": "Zurich"}]

    @each("name, expected", ("Zurich", "1"), ("zurich", "1"), ("geneva", "2"), ("ann", "4"), ("y", "5"))
    def test_the_id_of_a_name(self, name, expected):
        played = self.play(one({"count": 8, "zone": self.ROWS}), lambda c: c.find_id("listZones", name, available=True))
        self.assertEqual((expected, {"listZones"}, "true"),
                         (played.value, set(played.commands), played.params()["available"]))

    def test_candidates_are_escaped(self):
        rows = [{"id": 1, "name": "Zurich\u202e\n1"}]
        error = self.play(one({"count": 1, "zone": rows}), lambda c: c.find_id("listZones", "zurich")).error
        self.assertIn("\n      1  Zurich\\u202e 1", str(error))

    @each("name, told", ("GENEVA", "has 2 of this name; did you mean one of these? Give its id:\n      2  geneva\n"),
          ("Zuric", "has nothing of this name; did you mean one of these? Give its id:\n      1  Zurich"),
          ("nowhere", "has nothing of this name"))
    def test_candidates(self, name, told):
        error = self.play(one({"count": 8, "zone": self.ROWS}), lambda c: c.find_id("listZones", name)).error
        self.assertEqual((LookupError, True), (type(error), str(error).startswith("listZones " + told)), str(error))


# === [8.8, 8.9] rows: --where and --each ==============================================================================


class WhereTest(RowsCase):
    ROWS = [
        {"id": "1", "name": "web-01", "on": True, "size": 2048, "n": "2048", "when": "2026-01-02T00:00:00+0000",
         "tags": [{"key": "env", "value": "prod"}, {"key": "role", "value": "web"}], "nic": [{"ip": ["a", "b"]}],
         "used": "9.1%", "mem": "9.50 GB", "v": "4.9.1.0"},
        {"id": "2", "name": "Web 02", "on": False, "size": 512.5, "n": "1e3", "tags": [], "details": {"cpu": 4},
         "used": "87.3%", "mem": "48.00 GB", "v": "4.20.0.0"},
        {"id": "3", "name": "db", "size": 2**80 + 1, "n": "x", "when": "2025-12-31T00:00:00+0000",
         "tags": [{"key": "env", "value": "test"}], "used": "100%", "mem": "192.00 GB", "v": "4.20.1-rc1"},
    ]  # fmt: skip

    def met(self, *conditions):
        """The ids of the rows that meet these, joined; and what is said."""
        self.rows()
        words = [word for condition in conditions for word in ("--where", condition)]
        code, out, err = self.main("listThings", "-o", "text", "-c", "id", *words)
        self.assertEqual(0, code, err)
        return "".join(out.split()), err

    @each("condition, ids",
          ("name=db", "3"), ("name=DB", ""), (" name = db ", "3"), ("name==db", "3"), ("name!=db", "12"),
          ("name~^web", "12"), ("name=~B", "123"), ("name~0[12]$", "12"), ("name~", "123"), ("name~=", ""),
          ("size=2048", "1"), ("n=2048", "1"), ("n=2048.0", "1"), ("n=1000", "2"), ("size>512", "123"),
          ("size<=512.5", "2"), ("size>=2048", "13"), ("size<2048", "2"),
          (f"size>{2**80}", "3"), (f"size={2**80}", ""), ("size<" + "9" * 5000, "123"),
          ("on=true", "1"), ("on!=true", "23"), ("on=True", ""), ("when=", "2"), ("when!=", "13"), ("when<~", "13"),
          ("tags.key=env", "13"), ("tags.key!=env", "2"), ("tags.value~^w", "1"), ("tags=", "2"),
          ("tags.1.key=role", "1"), ("nic.ip=b", "1"), ("nic.ip!=b", "23"), ("details.cpu>3", "2"),
          ("details~cpu", "2"),
          ("tags.key=env & name~web", "1"), ("tags.key=env & name~web & size<5", ""),  # all of them must hold
          # Dates are texts; units and versions have numbers; but only what is the same is equal.
          ("when<2026", "3"), ("when>2025", "13"), ("when<2026-01-01", "3"), ("when>=2026-01", "1"), ("name<M", "3"),
          ("used>80", "23"), ("used<=87.3%", "12"), ("used=87.3", ""), ("used=87.30%", "2"),
          ("mem>=48", "23"), ("mem<48 gb", "1"), ("mem>48.0GB", "3"), ("v>=4.20", "23"), ("v<4.20", "1"),
          ("v<=4.20.0", "12"), ("v>4.9", "123"), ("v=4.20", ""), ("v>4", "123"))  # fmt: skip
    def test_a_condition(self, condition, ids):
        self.assertEqual((ids, ""), self.met(*condition.split(" & ")))

    @each("condition, ids, odd", ("size>x", "", "2048"), ("size<=x", "", "2048"), ("n>999", "12", "x"),
          ("n<x", "", "2048"), ("n>=x", "3", "2048"), ("mem>48 MHz", "", "9.50 GB"), ("v>x", "", None),
          ("name>7", "", "web-01"))  # fmt: skip
    def test_what_has_no_order_is_told_once(self, condition, ids, odd):
        column, wanted = re.split("[<>]=?", condition)
        told = f"--where {column}: {odd!r} and {wanted!r} do not compare\n" if odd else ""
        self.assertEqual((ids, told), self.met(condition))

    @each("condition, told", *[(text, f"--where {text!r}: it should be 'COLUMN=VALUE'") for text in (
        "", "name", "=x", " =x", "name!x", "!=x", "~x", "name>", "name<= ", "name=>1", "name=<1")],
        *[("name~" + text, "not a regular expression") for text in ("(", "*", "a{99999999999}", "(?<x", "(" * 5000)])
    def test_what_is_no_condition(self, condition, told):
        err = self.usage("listThings", "--where", "name=x", "--where", condition)
        self.assertEqual(1, err.count("\n"))
        self.assertIn(told, err)

    @each("condition", "nmae=x", "nmae!=x", "nmae~.")
    @each("words", [], ["-o", "csv"], ["-c", "nmae"], ["--all", "-o", "jsonl"], ["-q"])
    def test_a_column_that_no_row_has(self, condition, words):
        """It is a mistake if rows came, and != would hold for all of them."""
        self.rows()
        err = self.fails(2, "listThings", "--where", condition, "--where", "when!=y", *words)
        self.assertEqual("cs: --where: no row has 'nmae'; did you mean name?\n", err)
        self.reply("listThings", {})
        self.good("listThings", "--where", condition, *words)

    def test_a_column_that_the_answer_of_a_change_lacks(self):
        """What was done cannot be refused."""
        self.reply("createThing", {"thing": {"id": "1"}})
        code, out, err = self.main("createThing", "--where", "nmae!=x")
        self.assertEqual((0, {"thing": {"id": "1"}}, "Warning: no row has 'nmae'\n"), (code, json.loads(out), err))

    @each("text", "1." * 50000, "1" * 100000, "9-" * 50000, "1e" * 50000, "v1" + ".0" * 50000 + "x", "1" + " " * 100000)
    def test_a_server_s_long_texts_take_no_time(self, text):
        in_threads(1, lambda number: [cs._order(text, "4.20.1"), cs._order_key(text)])


class EachCase(CloudCase):
    def each(self, stdin, *args, main=None):
        """main() with --each and this on standard input: (exit code, standard output, standard error)."""
        if not isinstance(stdin, str):
            stdin = "".join(json.dumps(row) + "\n" for row in stdin)
        stream = io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape")), encoding="utf-8")
        with mock.patch.object(sys, "stdin", stream):
            return (main or self.main)("--each", *args)

    def refused(self, stdin, *args):
        """What is said of rows or a line for which nothing may be sent."""
        del self.cloud.requests[:]
        code, out, err = self.each(stdin, *args)
        self.assertEqual((2, "", []), (code, out, self.asked), err)
        self.assertEqual(1, err.count("\n"), err)
        return err

    def values(self, stdin, *args):
        """The values that doThing was called with for each row, in the order of rows."""
        del self.cloud.requests[:]
        code, out, err = self.each(stdin, "doThing", "--parallel", "1", *args)
        self.assertEqual((0, ""), (code, err), out)
        return [self.sent(index).get("x") for index in range(len(self.asked))]

    def setUp(self):
        super().setUp()
        self.option(scripted=self.scripted)
        for job in self.cloud.cloud.jobs.values():  # those that other tests have left
            job.begins = job.due = 0
        self.cloud.cloud._busy.clear()

    def scripted(self, record):
        """doThing repeats its x; others are the simulator's."""
        if record.command == "doThing":
            return Answer(200, {"r": {"done": record.params.get("x", "")}})
        return type(self.cloud).scripted(self.cloud, record)

    def machines(self, count=20):
        """The first of the machines that run, as rows."""
        words = ["listVirtualMachines", "--all", "--where", "state=Running", "-c", "id,name"]
        rows = json.loads(self.good(*words))
        del self.cloud.requests[:]
        return rows[:count]

    @staticmethod
    def lines(out):
        return [json.loads(line) for line in out.splitlines()]


class EachTest(EachCase):
    @each("expected, text", *[(["a", "b"], text) for text in (
              '{"id": "a"}\n{"id": "b"}\n', '\r\n{"id": "a"}\r\n\r\n{"id": "b"}', '[{"id": "a"},\n {"id": "b"}]',
              '{"id":\n"a"}{"id": "b"}', '{"count": 2, "thing": [{"id": "a"}, {"id": "b"}]}',
              '\ufeff{"count": 2,\n "thing": [{"id": "a"}, {"id": "b"}]}', '[{"id": "a"}]\n[{"id": "b"}]',
              '{"row": {"id": "a"}, "unsent": true}\n{"id": "b"}',
              '[{"row": {"id": "a"}, "unsent": true}, {"error": {}, "row": {"id": "b"}, "unsent": true}]')],
          (["a", "b"], "a\nb\n"), (["a", " b ", "-"], "a\r\n\n b \r\n  \n-"), (["a,b", "c"], "a,b\nc"),
          (["a", "b"], '"a" "b"\n'),
          (["a", "b"], '["a"]\n"b"'),
          # A line is a row, whatever it holds.
          *[([text], text) for text in ('{"tags":["a","b"]}', '{"tags":[]}', '{"tags":[{"key":"a"}]}', "{}",
                                        '{"count":3}', '{"i":"a","nic":[{"ip":1}]}', '{"row":{"id":"a"}}',
                                        '{"k":"errorcode","v":"\\"errortext\\":"}')])
    def test_rows_in_every_form(self, expected, text):
        word = "x={id}" if '"id": ' in text or '"id":\n' in text else "x={}"
        self.assertEqual(expected, self.values(text, word))

    @each("text, told", *[(text, "standard input is not JSON: ") for text in (
              '{"id": 1}\n{"id": 2', '{"id": 1},\n', "[1, 2", '{"id": 1}\nweb-02\n', "[" * 100000, '{"id": 1x}')],
          ("{}\n{}\nx", "line 3"), ("\udcff", "not UTF-8"),
          *[(text, "holds the answer of a call that failed") for text in (
              '{"errorcode": 401, "errortext": "no"}', '{"r": {"errorcode": 401}}', '{"id": 1}\n{"errortext": "no"}',
              '[{"id": 1}, {"r": {"errortext": "no"}}]', '{"r": {"jobstatus": 2, "jobresult": {"errorcode": 530}}}',
              '{"a": [{"b": {"errorcode": 1}}]}', '{"row": "a", "error": {"errorcode": 530}}',
              'web-01\n{"errorcode": 401, "errortext": "x"}', 'web-01\n{"r": {"errortext": "x"}}',
              "<html>401</html>", "CloudStack error: HTTP 401")],
          *[(text, "begins like a table") for text in (
              "id,name\r\n1,web\r\n", "id  name\n1   web\n", "id\n1\n", "name\r\nweb\r\n", "id,nic.0.ip\r\n",
              "state,name,zonename\n")])
    def test_rows_that_cannot_be_read(self, text, told):
        self.assertIn(told, self.refused(text, "doThing", "x={}"))

    def test_rows_that_are_nested_deeply_give_no_traceback(self):
        """Some Pythons recurse as deeply as this, others refuse."""
        text = '{"n": ' + "[" * 700 + "1" + "]" * 700 + "}"
        code, out, err = self.each(text, "doThing", "x=1", "--where", "n=2")
        self.assertEqual(("", 1), (out, err.count("\n")), err)
        self.assertIn(code, (0, 2))

    def test_no_standard_input(self):
        with mock.patch.object(sys, "stdin", None):
            self.assertIn("no standard input", self.usage("doThing", "--each"))
        for text in "", "\n \n", "[]", '{"count": 0, "thing": []}':
            told = (0, "", "No rows: nothing to do\n")
            self.assertEqual((told, []), (self.each(text, "doThing", "x={id}"), self.asked))

    ROW = {"id": "a", "n": 7, "on": True, "empty": "", "a.b": "dot", "d": {"k": ["p", "q"]}, "s p": "space"}

    @each("expected, words", ("a", "x={id}"), ("<a-7-a>", "x=<{id}-{n}-{id}>"), ("true", "x={on}"), ("dot", "x={a.b}"),
          ("p,q", "x={d.k}"), ('{"k":["p","q"]}', "x={d}"), ("q", "x={d.k.1}"), ("{id}", "x={{id}}"),
          ("{a}", "x={{{id}}}"), ("}{", "x=}}{{"), ("a ", "x='{id} '"), ("@a", "x=@@{id}"), ("", "x={empty}"),
          ("space", "x={s p}"), ("plain", "x=plain"), ("a", " x = {id} "),
          (json.dumps(ROW, sort_keys=True, separators=(",", ":")), "x={}"),
          ("a,7", "x={id} x={n}"))  # fmt: skip
    def test_what_is_filled_in(self, expected, words):
        self.assertEqual([expected], self.values([self.ROW], *re.split(r"(?<=}) (?=x)", words)))

    def test_a_value_of_a_row_is_never_more_than_text(self):
        secret = self.write("secret", "CANARY")
        for text in ("@" + secret, "@-", "@@x", "'q'", '"q"', " s ", "name:web-01", "{id}", "{{", "a=b", "\u00e9", '"'):
            self.assertEqual([text], self.values([{"id": text}], "x={id}"))
            self.assertEqual(["name:y," + text], self.values([{"id": text}], "x='name:y'", "x={id}", "{id}=1"))
            self.assertEqual("1", self.sent()["{id}"])  # nor is a parameter's name filled in

    def test_a_row_s_name_is_looked_up_as_one_name(self):
        """Whatever a tenant calls a machine: nothing is cut off, and nothing is taken for several."""
        self.sync_as(("listThings", "keyword", "listall"), ("stopThings", "ids"), ("stopThing", "id"))
        things = [{"id": name, "name": f"name of {name}"} for name in ("p", "q")]
        things += [{"id": "r", "name": "x,name:name of p"}, {"id": "s", "name": "name of p "}]
        asked = {"listThings": {"count": 4, "thing": things}}
        self.option(scripted=lambda record: Answer(200, {"r": asked.get(record.command, {"success": True})}))
        for row in things:
            for command, param in ("stopThings", "ids"), ("stopThing", "id"):
                code, out, err = self.each([row], command, param + "=name:{name}")
                self.assertEqual((0, {param: row["id"]}), (code, self.sent()), err)
        self.each([things[2]], "stopThings", "ids=name:{name},name:name of q")
        self.assertEqual({"ids": "r,q"}, self.sent())
        err = self.each([{"n": "no,name:name of q"}], "stopThings", "ids=name:{n}")[2]
        self.assertIn("ids=name:no,name:name of q", err)
        self.each([{"n": "name:name of p"}] * 2, "stopThings", "ids={n}", "ids='name:x'")
        self.assertEqual({"ids": "name:name of p,name:x"}, self.sent())
        del self.cloud.requests[:]
        self.assertEqual(0, self.each([{"n": n} for n in range(9)], "stopThings", "ids=name:name of p")[0])
        self.assertEqual(1, self.asked.count("listThings"))  # once for all of them

    def test_a_file_is_read_once_and_its_braces_are_its_own(self):
        path = self.write("data", '{"id": "{id}"}\n')
        with mock.patch.object(cs, "_read_value", side_effect=cs._read_value) as reading:
            self.assertEqual(['{"id": "{id}"}'] * 2, self.values("a\nb\n", "x=@" + path))
        self.assertEqual([mock.call("--each", "-"), mock.call("x", path)], sorted(reading.mock_calls))

    @each("rows, words, told", ([{"id": "1", "name": "n"}, {"name": "m"}], "x={id}", "row 2 (m): there is no 'id'\n"),
          ([{"nmae": "1"}], "x={name}", "row 1: there is no 'name'; did you mean nmae?"), (["a"], "x={id}", "row 1: "),
          ([{"id": None}], "x={id}", "row 1: there is no 'id'\n"), ([{"nic": []}], "x={nic.0.ip}", "'nic.0.ip'"),
          ([{"id": "x" * 500}], "x={no}", "x…): there"), ([{"id": "b\u0007"}], "x={id}", "(b\\x07): parameter 'x': "),
          ([{"name": "bob", "password": "CANARY"}], "password={password} name={user}", "row 1 (bob): "), *[
          ([{"id": "1"}], word, "written twice") for word in ("x={id", "x=id}", "x={{id}", "x={a{id}}")])  # fmt: skip
    def test_a_row_that_cannot_be_used_stops_everything_before_the_first_call(self, rows, words, told):
        err = self.refused(rows, "doThing", *words.split())
        self.assertIn(told, err)
        self.assertNotIn("CANARY", err)

    @each("words", "--parallel 0", "--parallel x", "--parallel=-1", "--parallel 1.5", "-c id", "--sort id", "--shell",
          "x=@-", "json=false", "x", "--list x", "--wait j")  # fmt: skip
    def test_options_that_make_no_sense(self, words):
        self.refused(["a"], *(["doThing"] if "-l" not in words and "-w" not in words else []), *words.split())
        if words.startswith("--parallel"):
            self.assertIn("needs --each", self.usage("doThing", "--parallel", "2"))
        self.assertIn("no command", self.refused(["a"]))

    def test_where_chooses_among_the_rows(self):
        rows = [{"id": "a", "state": "Running"}, {"id": "b", "state": "Stopped"}]
        self.assertEqual(["b"], self.values(rows, "x={id}", "--where", "state!=Running"))
        for condition in "stat=Running", "stat!=Running":  # the latter would hold for every row
            self.assertIn("no row has 'stat'; did you mean state?", self.refused(rows, "doThing", "--where", condition))
        self.assertEqual((0, "", "No rows: nothing to do\n"),
                         self.each(rows, "doThing", "--where", "state=Lost"))  # fmt: skip
        self.assertIn("'Running' and '5' do not compare", self.each(rows, "doThing", "--where", "state>5")[2])

    JOB = Answer(200, {"r": {"jobid": "j1", "id": "m1"}})
    FAILED = Answer(200, {"r": {"jobstatus": 2, "jobinstancetype": "VirtualMachine", "jobinstanceid": "m1",
                                "jobresult": {"errorcode": 533, "errortext": "full"}}})  # fmt: skip
    REFUSED = Answer(432, {"r": {"errorcode": 432, "errortext": "no"}})

    @each("state, error, answers, word", ("failed", {"errorcode": 432, "errortext": "no"}, [REFUSED], "x=1"),
          ("failed", {"success": False, "displaytext": "hm"},
           [Answer(200, {"r": {"success": False, "displaytext": "hm"}})], "x=1"),
          ("unknown", {"errorcode": 432, "errortext": "no", "jobid": "j1"}, [JOB, REFUSED], "x=1"),
          ("failed", {"errorcode": 533, "errortext": "full", "jobid": "j1", "left_behind": "VirtualMachine m1"},
           [JOB, FAILED], "x=1"),
          # Whatever becomes of a parameter that is the client's own: what was sent is not said to be unsent.
          *[("unknown", None, [DROP], word) for word in (
              "x=1", "response=xml", "apiKey=z", "signature=q", "signatureVersion=2", "opcode_name=c")])  # fmt: skip
    def test_what_became_of_a_row(self, state, error, answers, word):
        """It failed only if the server or the job said so; what may still run is waited for by one line."""
        self.configure(recover="false" if DROP in answers else "true")
        answers = list(answers)
        self.option(scripted=lambda record: answers.pop(0))
        code, out, err = self.each(["a"], "breakThing", word)
        (line,) = self.lines(out)
        self.assertEqual({"row": "a", "error": error or line["error"], "outcome_unknown": state == "unknown"}, line)
        waits = state == "unknown" and error
        told = "To go on waiting: cs --wait j1\n" if waits else ""
        self.assertEqual((1, f"1 {state}, of 1 rows\n{told}", []), (code, err, answers))

    @each("settings", {"endpoint": "http://127.0.0.1:1/client/api", "recover": "false"},
          {"endpoint": "http://127.0.0.1:1/client/api"}, {"username": "admin", "password": "wrong"},
          {"endpoint": "https://127.0.0.1:1/client/api", "verify": os.devnull + "/ca"})  # fmt: skip
    def test_what_was_never_sent_is_unsent(self, settings):
        """The connection was refused, or an error came before: the log-in's."""
        if "username" in settings:
            self.unset("key", "secret")
        self.configure(**settings)
        code, out, err = self.each(["a", "b"], "stopThing", "id={}")
        self.assertEqual((1, "2 unsent, of 2 rows\n", 2), (code, err, out.count('"unsent": true')))

    @each("first, state", (Answer(431, {"r": {"errorcode": 431, "errortext": "no"}}), "failed"), (DROP, "unknown"))
    def test_a_failure_stops_what_is_not_started_if_that_is_wanted(self, first, state):
        self.configure(recover="false")
        for option, done in ("--stop-on-error", "2 unsent"), ("-q", ""):
            del self.cloud.requests[:]
            self.cloud.script("doOther", *[first if row == "b" else Answer(200, {"r": {"a": 1}}) for row in "abcd"])
            code, out, err = self.each("a\nb\nc\nd\n", "doOther", "x={}", "--parallel", "1", option)
            self.assertEqual((1, f"1 done, 1 {state}, {done}, of 4 rows\n" if done else ""), (code, err))
            self.assertEqual(2 if done else 4, len(self.asked))
            unsent = [{"row": row, "unsent": True} for row in ("cd" if done else "")]
            self.assertEqual(unsent, [line for line in self.lines(out) if "unsent" in line])

    def test_the_list_of_commands_is_looked_at_once(self):
        self.known()
        rows = self.machines()
        self.assertIn("no parameter 'nmae'", self.each(rows, "stopVirtualMachine", "id={id}", "nmae={name}")[2])
        with mock.patch.object(cs, "_Catalog", side_effect=cs._Catalog) as reading, later(40 * 86400):
            code, out, err = self.each(rows, "listvirtualmachines", "id={id}", "nmae={name}", "--dry-run")
        self.assertEqual((0, 1, 1), (code, err.count("Warning"), reading.call_count))
        self.assertEqual(20, out.count("listVirtualMachines id="))
        self.assertIn("needs id", self.refused([{"id": "x"}, {"id": ""}], "stopVirtualMachine", "id={id}"))
        self.each([{"id": "x"}], "stop", "virtualmachine", "id={id}")
        self.each([{"id": "x"}], "createSecurityGroup", "name={id}")  # which starts no job
        sent = [(record.command, "customjobid" in record.params) for record in self.cloud.requests]
        self.assertEqual([("stopVirtualMachine", True), ("createSecurityGroup", False)], sent)

    def test_dry_run_is_a_line_for_each_row(self):
        rows = [{"id": "1", "name": "web 01", "p": "CANARY"}, {"id": "2", "p": ""}]
        out = self.each(rows, "stopThing", "id={id}", "password={p}", "x=a b", "--dry-run")
        lines = "stopThing id=1 'password=***' 'x=a b' (web 01)\nstopThing id=2 'password=***' 'x=a b' (2)\n"
        self.assertEqual(((0, lines, ""), []), (out, self.asked))

    def test_a_session_logs_in_once_and_out(self):
        self.unset("key", "secret")
        self.configure(username="admin", password=self.cloud.users["admin"].password)
        code, out, err = self.each(self.machines(5), "listVirtualMachines", "id={id}", "-t")
        self.assertEqual((0, 1, 1), (code, self.asked.count("login"), self.asked.count("logout")))
        self.assertIn("listVirtualMachines", err)

    @each("count, args", (10, []), (3, ["--parallel", "3"]), (1, ["--parallel", "1"]))
    def test_so_many_are_under_way_at_once_and_no_more(self, count, args):
        """A request has its own connection."""
        def scripted(record):
            together.wait(20)
            return self.scripted(record)

        together = threading.Barrier(count)
        self.option(scripted=scripted)
        code, out, err = self.each(map(str, range(90)), "doThing", "x={}", *args)
        self.assertEqual((0, "", 90), (code, err, len(self.asked)))
        self.assertEqual(list(range(90)), sorted(int(line["result"]["done"]) for line in self.lines(out)))
        self.assertEqual(count, len({record.connection for record in self.cloud.requests}))

    def test_progress_is_shown_on_a_terminal_and_gone_afterwards(self):
        self.say_error("doOther", 431)
        self.reply("doOther", {"a": 1})
        self.say_error("doOther", 431)
        main = functools.partial(self.on_terminal, both=True)
        code, text, _ = self.each("a\nb\nc\n", "doOther", "--parallel", "1", main=main)
        self.assertHolds(text, *[f"\x1b[K{done}, of 3 rows\r" for done in ("0 done", "1 failed", "1 done, 1 failed")])
        self.assertRegex(screen(text), r"\A(\{.*\}\n){3}1 done, 2 failed, of 3 rows\n\Z")


class EachProcessTest(EachCase):
    """What only processes show: pipes between them, readers that go away, signals."""

    def start(self, stdin, *args, **options):
        child = Child([sys.executable, CS_PATH, *args], stdin=subprocess.PIPE, env=dict(os.environ), **options)
        self.addCleanup(child.end)
        child.stdin.write("".join(json.dumps(row) + "\n" for row in stdin).encode())
        child.stdin.close()
        return child

    def test_one_command_line_feeds_another(self):
        line = ('"$0" "$1" listVirtualMachines --all --where state=Running --where name~-0 -c id,name -o jsonl |'
                ' "$0" "$1" rebootVirtualMachine id={id} --each')  # fmt: skip
        child = Child(["sh", "-c", line, sys.executable, CS_PATH], env=dict(os.environ))
        code, out, err = child.finish()
        self.assertEqual((0, b""), (code, err))
        rebooted = [record.params["id"] for record in self.cloud.requests if record.command == "rebootVirtualMachine"]
        self.assertEqual(sorted(rebooted), sorted(line["row"]["id"] for line in self.lines(out.decode("utf-8"))))

    @posix_only
    def test_a_reader_that_goes_away_stops_what_is_not_started(self):
        """What ran then is said on standard error, whatever came of it, but not all that is in its row."""
        self.option(job_seconds=0.5)
        rows = [dict(row, password="CANARY") for row in self.machines()]
        child = self.start(rows, "rebootVirtualMachine", "id={id}", "--each", "--parallel", "2", "-q")
        child.stdout.close()
        err = child.stderr.read().decode("utf-8")
        self.assertEqual(1, child.wait())
        told = {f"row {number} ({rows[number - 1]['name']}): done" for number in (1, 2)}
        self.assertEqual(told | {"2 done, 18 unsent, of 20 rows"}, set(err.splitlines()))
        child = self.start(rows[:2], "rebootVirtualMachine", "id={id}", "--each")  # and if all were, that is success
        child.stdout.close()
        self.assertEqual(told, set(child.stderr.read().decode("utf-8").splitlines()))
        self.assertEqual(0, child.wait())

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk(self):
        with open("/dev/full", "wb") as full:
            child = self.start(["a", "b"], "doThing", "--each", "--parallel", "1", stdout=full)
            err = child.stderr.read().decode("utf-8")
            self.assertEqual(1, child.wait())
        told = "row 1: done\n1 done, 1 unsent, of 2 rows\ncs: cannot write the answer: No space left on device\n"
        self.assertEqual(told, err)

    @posix_only
    @each("number, pause", (signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGINT, 0.03), (signal.SIGINT, 0.3))
    def test_a_signal_loses_no_job_and_no_row(self, number, pause):
        """Nor does a second one, that a wrapper sends at once, or a person who has no patience."""
        rows = self.machines(8)
        with open(os.path.join(self.home, "out"), "wb") as out:
            self.option(job_seconds=30)
            child = self.start(rows, "rebootVirtualMachine", "id={id}", "--each", "--parallel", "3", stdout=out)
            until(lambda: self.asked.count("rebootVirtualMachine") == 3 and len(self.asked) > 6, "looks at three jobs")
            child.send_signal(number)
            if pause:
                time.sleep(pause)
                child.send_signal(number)
            err = child.stderr.read().decode("utf-8")
            self.assertEqual(130, child.wait(), err)
        lines = self.lines(open_bytes(out.name).decode("utf-8"))
        jobs = [line["error"]["jobid"] for line in lines[:3]]
        self.assertEqual([True] * 3, [line["outcome_unknown"] for line in lines[:3]])
        self.assertEqual([{"row": row, "unsent": True} for row in rows[3:]], lines[3:])
        self.assertLessEqual(set(jobs), set(self.cloud.cloud.jobs))
        told = "Interrupted: 3 unknown, 5 unsent, of 8 rows\n"
        told += f"To go on waiting: cs --wait {' '.join(jobs)}\n"
        self.assertEqual(told, err)
        self.option(job_seconds=0.02)
        self.assertEqual((0, ""), self.each(lines[3:], "rebootVirtualMachine", "id={id}")[::2])
        asked = [record.params["id"] for record in self.cloud.requests if record.command == "rebootVirtualMachine"]
        self.assertEqual(sorted(row["id"] for row in rows), sorted(asked))  # each of them once

    @unittest.skipUnless(have_terminals(), "needs FIONREAD")
    def test_a_signal_does_not_cut_the_account(self):
        """The account waits for its reader; then the first signal comes."""
        self.say_error("breakThing", 431)
        child = self.start(map(str, range(5000)), "breakThing", "--each", "--parallel", "1", "--stop-on-error")
        unread = lambda: struct.unpack("i", fcntl.ioctl(child.stdout, termios.FIONREAD, bytes(4)))[0]  # noqa: E731
        until(lambda: unread() > 60000, "a full pipe")
        child.send_signal(signal.SIGINT)
        out, err = child.stdout.read(), child.stderr.read()
        self.assertEqual((5000, b"1 failed, 4999 unsent, of 5000 rows\n", 1), (out.count(b"\n"), err, child.wait()))

    @posix_only
    @each("has_reader, command, state", (True, "updateThing", "unknown"), (False, "updateThing", "unknown"),
          (True, "listThings", "failed"))
    def test_a_signal_while_answers_are_awaited(self, has_reader, command, state):
        """Of commands without a job nobody knows what became. The reader of standard output may have got it, too."""
        release = threading.Event()
        self.addCleanup(release.set)
        self.option(scripted=lambda record: Answer(200, {"r": {"x": release.wait(20)}}))
        self.configure(recover="false")
        child = self.start("123", command, "x={}", "--each", "--parallel", "2")
        until(lambda: len(self.asked) == 2, "two requests")
        if not has_reader:
            child.stdout.close()
        child.send_signal(signal.SIGINT)
        out = child.stdout.read().decode("utf-8") if has_reader else ""
        err = child.stderr.read().decode("utf-8")
        self.assertEqual((130, 2), (child.wait(), len(self.asked)), err)
        *lines, told = err.splitlines()
        self.assertEqual(f"Interrupted: 2 {state}, 1 unsent, of 3 rows", told)
        self.assertEqual([] if has_reader else ["row 1: unknown", "row 2: unknown"], sorted(lines))
        lost = {"error": {"message": "interrupted"}, "outcome_unknown": state == "unknown"}
        expected = [dict(lost, row="1"), dict(lost, row="2"), {"row": "3", "unsent": True}]
        self.assertEqual(expected if has_reader else [], sorted(self.lines(out), key=lambda line: line["row"]))

    def test_a_signal_before_anything_is_sent(self):
        """It comes as the first task is made: rows are unsent, and asyncio makes no noise."""
        code = """import asyncio, cs, os, signal, sys
make = asyncio.ensure_future
def make_and_signal(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return make(*args, **options)
asyncio.ensure_future = make_and_signal
sys.exit(cs.main(["stopThing", "id={}", "--each"]))"""
        env = dict(os.environ, PYTHONPATH=os.path.dirname(CS_PATH))
        child = Child([sys.executable, "-c", code], stdin=subprocess.PIPE, env=env)
        out = b'{"row": "1", "unsent": true}\n{"row": "2", "unsent": true}\n'
        self.assertEqual((130, out, b"Interrupted: 2 unsent, of 2 rows\n"), child.finish(b"1\n2\n"))
        self.assertEqual([], self.asked)


# === [8.10] the shell =================================================================================================


class SplitLineTest(Case):
    """A line is taken apart as a shell does it."""

    @each("line", "a b=c", " a  b\t", "", "a 'b c' \"d e\"", "a='b c'd\"e\"", "a ''", r"a\ b \'c \"",
          r'"a\"b" "a\\b" "a\b"', r"'a\b'", "x #y", "\u00fc='\u00e4 b'")
    def test_words(self, line):
        self.assertEqual(shlex.split(line), cs._split_line(line))

    @each("line", 'a "b', "a 'b", "a\\", "a 'b' \"c\\\"")
    def test_a_line_that_nothing_closes(self, line):
        self.assertIn("is not closed", str(self.raised(cs._Usage, cs._split_line, line)))

    @each("line", "x userdata=" + "A" * 400000, "x '" + "a\\" * 200000 + "'", '"' + "\\a" * 200000, "a " * 100000)
    def test_long_lines_take_no_time(self, line):
        began = time.monotonic()
        with contextlib.suppress(cs._Usage):
            cs._split_line(line)
        self.assertLess(time.monotonic() - began, 2)

    @each("line, is_secret",
        ("listZones name=x", False), ("list password", True), ("updateUser password=@file name=x", True),
        ('listZones "name', False), ("createTags tags[0].key=env tags[0].value=prod", False),
        ("registerUserData userdata=@init.yaml", True), ("x name=own-hush", True),
        ("updateUser id=1 password=geheim", True), ("x --password y", True), ("x --sort y", False),
        ("updateUser PASSWORD=@@x", True), ("x usersecretkey='y'", True),
        ('x "password=y', True), ("x password = y", True), ("x pass\\word=y", True), ("password: y", True),
        ('{"secret": "y"}', True), ("createTags tags[0].key=password tags[0].value=y", True),
        ("createTags tags[0].key='\"my password\"' tags[0].value=y", True),
        ("http://h/api?command=x&signature=y", True),
    )
    def test_a_line_with_a_secret_is_not_remembered(self, line, is_secret):
        self.assertEqual(is_secret, cs._holds_secret(line, ["own-hush"]))


class ShellTest(CloudCase):
    """Lines on standard input that is no terminal."""

    def shell(self, *lines, args=(), code=0):
        """The lines in this process: (standard output, standard error)."""
        text = "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(text))):
            found, out, err = self.main("--shell", *args)
        self.assertEqual(code, found, err)
        self.assertNotIn("Traceback", err)
        return out, err

    def test_its_own_words_are_completed_without_a_list_of_commands(self):
        shell = cs._Shell(dict.fromkeys(cs._parse_arguments([])[0]))
        self.assertEqual([["exit "], ["set "]], [shell._candidates(typed) for typed in ("ex", "se")])

    def test_lines_are_carried_out_one_after_another_as_a_shell_takes_them_apart(self):
        out, err = self.shell("listZones -o text -c name", "", "  # a comment", "help",
                              "\ufeffcs  listHosts 'name=a b' keyword=c\\ d hypervisor=\"#e\" type=f#g\r",
                              "listZones name=@-", "nor", "th")  # the rest of standard input
        self.assertTrue(out.startswith("north\nsouth\n" + self.main("--help")[1]), out)
        self.assertEqual((["listZones", "listHosts", "listZones"], "nor\nth"), (self.asked, self.sent()["name"]))
        self.assertEqual({"name": "a b", "keyword": "c d", "hypervisor": "#e", "type": "f#g"}, self.sent(1))

    def test_an_option_is_set_for_every_line_and_taken_back(self):
        out, _ = self.shell("set output text", "set columns name", "listZones", "set columns off", "set output off",
                            "listZones")
        self.assertTrue(out.startswith("north\nsouth\n{\n"), out)

    @each("line, told",
        ("set", "set takes an option that holds for every line"), ("set nosuch 1", "there is no option '--nosuch'"),
          ("set nosuch off", "set takes an option"),
          ("set help", "set takes an option"), ("set each", "--each does not go with a line of the shell"),
          ("set output csv table", "set takes an option"), ("set timeout abc", "'abc' is not a number"),
          ("set output tabel", "did you mean table?"),
        ("set timeout", "option --timeout needs a value"), ("use nowhere", "region 'nowhere' not in config"),
        ("listZones | head", "pipes and redirections are a real shell's: cs ... | head"),
        ("listZones > file", "cs ... > file"),
    )
    def test_what_is_refused_leaves_the_options_as_they_were(self, line, told):
        out, err = self.shell("listZones -o text -c name", line, "listZones -o text -c name", code=2)
        self.assertEqual("north\nsouth\n" * 2, out)
        self.assertHolds(err, "line 2: ", told)

    def test_errors_of_a_script_have_the_number_of_their_line(self):
        err = self.shell("# first", "", "listZones x", "listNothing", code=2)[1]
        self.assertHolds(err, "cs: line 3: 'x' has no '='", "CloudStack error: line 4: HTTP ")

    @each("word", "exit", "quit")
    def test_the_end(self, word):
        self.assertEqual(("", ""), self.shell(word, "listZones"))

    @each("lines, code, err",
          (['listZones "x', "listNothing -q"], 2,
           "cs: line 1: the line cannot be taken apart: a quote in it is not closed\n"),
          (["listZones x", "listNothing -q"], 2, "cs: line 1: 'x' has no "),
          (["listNothing -q", "listZones x"], 1, "cs: line 2: 'x' has no "),
          (["--shell"], 2, "cs: line 1: --shell does not go with a line of the shell\n"),
          (["-q"], 2, "cs: line 1: no command given; see cs --help\n"), (["exit now"], 2, "cs: line 1: 'now' has no "),
          (["use nowhere"], 2, "region 'nowhere' not in config"), (["listZones zoneid=\udcff"], 2, "cs: line 1: "))
    def test_the_exit_code_is_the_first_that_is_not_0_and_a_failure_is_not_the_end(self, lines, code, err):
        _, said = self.shell(*lines, "listZones", code=code)
        self.assertEqual(("listZones", 1), (self.asked[-1], said.count("\n")), said)
        self.assertIn(err, said)

    def test_without_standard_input_it_ends_at_once(self):
        with mock.patch("sys.stdin", None):
            self.assertEqual("", self.good("--shell"))

    def test_options_at_the_start_hold_for_every_line_whose_own_win(self):
        out, _ = self.shell("listZones", "listZones -o jsonl", "listZones -c id -q", args="-o text -c name".split())
        self.assertEqual(["north", "south", '{"name": "north"}', '{"name": "south"}'], out.splitlines()[:4])
        self.assertEqual(36, len(out.splitlines()[4]))
        self.assertIn("GET ", self.shell("listZones", args=["--dry-run"])[0])

    def test_one_connection_and_one_session_for_lines_of_the_same_settings_which_end_with_the_line(self):
        self.unset("key", "secret")
        self.configure(username="admin", password=self.cloud.users["admin"].password, retry="0")
        self.cloud.script("listHosts", *[Answer(503, "<html>busy</html>")] * 3)
        _, err = self.shell("listZones", "listZones --post -t", "listZones x", "listHosts -q --retry 1",
                            "listHosts -q", "listZones", code=2)
        asked = "login listZones login listZones login listHosts listHosts listHosts listZones logout logout logout"
        self.assertEqual(asked.split(), self.asked)
        requests = self.cloud.requests
        self.assertEqual((3, 1), (len({record.connection for record in requests}), err.count("command=listZones")))
        self.assertEqual(["GET", "POST", "GET"], [requests[place].method for place in (1, 3, 8)])

    def test_regions(self):
        users = [self.cloud.users[name] for name in ("admin", "user")]
        self.unset("endpoint", "key", "secret")
        self.write(".cloudstack.ini", "".join(
            f"[{name}]\nendpoint = {self.cloud.endpoint}\nkey = {user.key}\nsecret = {user.secret}\n"
            for name, user in zip(("cloudstack", "my lab"), users)))
        _, err = self.shell("listZones", "listZones -r 'my lab'", "use my lab", "listZones", "use nowhere",
                            "listZones", "use", "listZones", code=2)
        keys = [record.params["apiKey"] for record in self.cloud.requests]
        self.assertEqual([users[number].key for number in (0, 1, 1, 1, 0)], keys)
        self.assertEqual(2, len({record.connection for record in self.cloud.requests}))  # `use` alone is the usual one
        self.assertIn("there are cloudstack, my lab", err)

    def test_a_line_sees_the_list_of_commands_that_one_before_it_fetched(self):
        self.sync()
        api = {"listapisresponse": {"count": 1, "api": [api_entry(("listZones", "id!"))]}}
        self.cloud.script("listApis", Answer(200, api))
        out, err = self.shell("listZones -q", "list zones", "help listZones", "--sync -q", "listZones", code=2)
        self.assertHolds(out, "listZones  ", "Lists zones.")
        self.assertEqual("cs: line 5: listZones needs id; see cs listZones --help\n", err)

    @posix_only
    def test_a_closed_pipe_ends_it(self):
        reading, writing = os.pipe()
        os.close(reading)
        child = Child([sys.executable, CS_PATH, "--shell"], stdin=subprocess.PIPE, stdout=writing, env=dict(os.environ))
        os.close(writing)
        code, _, err = child.finish(b"listZones\nlistHosts\n")
        self.assertEqual((0, b"", ["listZones"]), (code, err, self.asked))

    def test_an_interrupt_ends_it_all_where_nobody_types(self):
        with mock.patch.object(cs.CloudStack, "_exchange", side_effect=KeyboardInterrupt):
            self.assertEqual(("", "Interrupted.\n"), self.shell("listZones", "listHosts", code=130))
        self.assertEqual([], self.asked)


@unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
@unittest.skipUnless(hasattr(readline, "set_auto_history"), "needs CPython's readline")
class TypedShellTest(CloudCase):
    """A person at a terminal."""

    def setUp(self):
        super().setUp()
        self.known()
        user = self.cloud.users["admin"]
        section = "]\nendpoint = {}\nkey = {}\nsecret = {}\n".format(self.cloud.endpoint, user.key, user.secret)
        self.ini("[lab" + section + "[lab:two" + section)
        self.history = os.path.join(self.home, ".local", "state", "cs", "history")

    def start(self, *args, prompt=b"cs cloudstack> ", **env):
        env = dict(os.environ, TERM="dumb", INPUTRC=os.devnull, **env)
        shell = self.on_pty([sys.executable, CS_PATH] + list(args), env)
        shell.wait_for(prompt)
        return shell

    def enter(self, shell, line, *words):
        shell.type(line + "\n")
        for word in words + (b"> ",):
            shell.wait_for(word)

    def end(self, shell):
        shell.type("\x04")
        self.assertEqual(0, shell.end())
        self.assertNotIn("Traceback", shell.text)
        return shell.text

    def test_cs_alone_opens_it(self):
        shell = self.start()
        self.enter(shell, "listZones -o text -c name", b"north\r\n")
        self.enter(shell, "listNothing", b"no command 'listNothing'")
        self.enter(shell, "use lab", b"cs lab")
        self.enter(shell, "help listZones", b"Lists zones.")
        text = self.end(shell)
        self.assertIn("In the shell: help", text)
        self.assertTrue(text.endswith("cs lab> \n"), text)

    def test_a_region_that_cannot_be_used_is_said_and_another_can_be_used(self):
        shell = self.start("--shell", "-q", "-r", "nowhere", prompt=b"cs nowhere> ")
        self.enter(shell, "listZones", b"region 'nowhere' not in config")
        self.enter(shell, "use lab", b"cs lab")
        self.assertNotIn("In the shell", self.end(shell))

    def test_it_completes(self):
        machine = self.cloud.cloud.named("virtualmachine", "web-01")["id"]
        self.unset("endpoint", "key", "secret")
        shell = self.start("-r", "lab:two", "--dry-run", prompt=b"cs lab:two> ")
        for typed, expected in (
                ("listZ\t-o te\t", b"command=listZones"), ("hel\tlistZ\t", b"Lists zones."),
                ("listZones -r lab:\t", b"command=listZones"), ("us\tlab:t\t", b"cs lab:two"),
                ("list listZ\t", b"Lists zones."), ("set colo\tnev\t", b"set color never"),
                ("listZones avail\ttrue", b"available=true"),
                ("stopVirtualMachine id=web-0\t1\t", b"id=" + machine.encode())):  # by its name
            self.enter(shell, typed, expected)
        shell.type("listV\t\t")
        shell.wait_for(b"listVirtualMachines")
        shell.type("\x15")
        shutil.rmtree(os.path.join(self.home, ".cache"))
        shell.type("listZ\t\t")
        shell.wait_for(b"to have commands completed, type: cs --region lab:two --sync")
        shell.type("\x15")
        self.end(shell)

    @each("content, env", (b"a\n\0\0\n", {"LC_ALL": "C.UTF-8"}), (b"z\xc3\xbcrich\n", {"LC_ALL": "C"}))
    def test_a_history_that_cannot_be_used_does_not_keep_it_from_starting(self, content, env):
        os.makedirs(os.path.dirname(self.history))
        self.write(self.history, content)
        shell = self.start(**env)
        self.enter(shell, "set each", b"--each does not go")
        self.end(shell)

    def test_history_keeps_the_last_lines_of_all_shells_and_no_secret(self):
        os.makedirs(os.path.dirname(self.history))
        lines = b"old \xff\n" + b"".join(b"line %d\n" % number for number in range(999))
        os.symlink(self.write("real", lines, 0o644), self.history)
        shell, other = self.start(), self.start()
        self.enter(other, "listHosts -q", b"")
        self.enter(shell, "updateUser id=1 password=geheim", b"cs: ")
        self.enter(shell, "listZones -q name=" + self.cloud.secret, b"")
        self.enter(shell, "  ", b"")
        self.enter(shell, "\x10", b"'998' ")  # Ctrl-P, where no arrow is known: the one before
        self.enter(shell, "listZones nix", b"name=value")
        self.enter(shell, "\x10 -o text", b"name=value")
        self.end(shell)
        kept = open_bytes(self.history).splitlines()
        self.assertEqual((1000, [b"line 998", b"listZones nix", b"listZones nix -o text"]), (len(kept), kept[-3:]))
        self.assertNotIn(b"geheim", b"".join(kept))
        self.assertTrue(os.path.islink(self.history))
        self.assertEqual(0o600, os.stat(self.history).st_mode & 0o777)

    @each("env, folder", ({}, ".local/state/cs"), ({"XDG_STATE_HOME": "{}/a/b"}, "a/b/cs"),
          ({"XDG_STATE_HOME": "{}/file"}, None), ({"PYTHONPATH": "{}/none"}, None))
    def test_where_history_is_kept_and_that_the_shell_works_without_a_place_or_readline(self, env, folder):
        self.write("file", "")
        os.mkdir(os.path.join(self.home, "none"))
        self.write("none/readline.py", "raise ImportError('not here')\n")
        shell = self.start(**{name: text.format(self.home) for name, text in env.items()})
        self.enter(shell, "listZones -r lab -o text -c name", b"north")
        warnings = self.end(shell).count("Warning: no history is kept: ")
        self.assertEqual(folder is None, warnings == 1)
        self.assertEqual(folder is None, not os.path.exists(os.path.join(self.home, folder or ".local")))
        if folder:
            path = os.path.join(self.home, folder)
            self.assertEqual(b"listZones -r lab -o text -c name\n", open_bytes(os.path.join(path, "history")))
            self.assertEqual(0o700, os.stat(path).st_mode & 0o777)

    def test_an_interrupt_ends_the_line_and_not_the_shell(self):
        shell = self.start()

        def interrupt(*words):
            CommandLineProcessTest.until_blocked(shell.child)
            shell.type("\x03")
            for word in words + (b"> ",):
                shell.wait_for(word)

        shell.type("nonsense")
        shell.wait_for(b"nonsense")
        interrupt()
        self.option(latency=20)
        shell.type("listZones\n")
        until(lambda: self.asked, "a request")
        interrupt(b"Interrupted.")
        self.option(latency=0)
        self.enter(shell, "listZones -o text -c name", b"north")
        self.end(shell)
        self.assertEqual(["listZones", "listZones"], self.asked)


# === [W] what is written about it =====================================================================================


def readme():
    with open(README_PATH, encoding="utf-8") as file:
        return file.read()


def section_of(title):
    """The text under a heading of README, up to the next one of its kind or above."""
    found = re.search(rf"(?m)^{re.escape(title)}\n([=~-])\1+\n", readme())
    above = "=-" if found.group(1) == "-" else "=~-"
    return re.split(rf"(?m)^\S.*\n([{above}])\1\1+$", readme()[found.end():])[0]


def blocks(language):
    """The code blocks of README in a language, without their indentation."""
    found = re.findall(rf"(?m)^\.\. code-block:: {language}\n\n((?:(?: {{4}}.*)?\n)+)", readme() + "\n")
    return [re.sub("(?m)^ {4}", "", block).strip("\n") + "\n" for block in found]


def first_column(text):
    """The cells of the first column of the first simple table in a text, without markup."""
    width, body = re.search(r"(?ms)^(=+) .*?\n(?:.*?\n=.*?\n)?(.*?)\n=", text).groups()
    cells = [line[: len(width)].replace("``", "").strip() for line in body.split("\n")]
    return [cell for cell in cells if cell and not cell.startswith("=")]


class HelpAndReadmeTest(CloudCase):
    """README and --help say what the program does."""

    FLAGS = set(cs._FLAGS)

    def help(self):
        self.unset("endpoint", "key", "secret")
        return self.good("--help")

    def test_help_names_no_option_that_does_not_exist(self):
        self.assertEqual(self.FLAGS, set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", self.help())))

    def test_readme_documents_every_option_and_no_other(self):
        text = section_of("Options")
        self.assertEqual(self.FLAGS, set(re.findall(r"(?<=``)--?[a-z][a-z-]*", text)))
        values = {word for option in OPTIONS if isinstance(option.value, tuple) for word in option.value}
        self.assertEqual(set(), {word for word in values if f"``{word}``" not in text})
        used = re.findall(r"(?<![\w-])--[a-z][a-z-]*", "".join(line for line in readme().split("\n") if " cs " in line))
        self.assertEqual(set(), set(used) - self.FLAGS)

    def test_readme_and_help_tell_the_exit_codes(self):
        self.assertIn("\nexit: 0 done  1 error  2 usage  3 no answer  4 job still runs  130 interrupted\n", self.help())
        self.assertEqual(list(map(str, cs._EXITS)), first_column(section_of("Exit codes")))

    @each("setting", *cs.SETTINGS)
    def test_readme_documents_every_setting_with_its_default(self, setting):
        names = [(line.partition("  ")[0], line) for line in section_of("Settings").split("\n")]
        lines = [line for first, line in names if f"``{setting.name}``" in first]
        self.assertTrue(lines, "README.rst has no line about " + setting.name)
        if setting.default is not None:
            self.assertRegex("\n".join(lines), r"[`(]" + re.escape(str(setting.default)) + r"[`)]")

    def test_readme_names_every_variable_of_the_environment_and_no_other(self):
        named = set(re.findall(r"CLOUDSTACK_([A-Z_]+)", readme()))
        self.assertEqual(set(), {"CONFIG", "REGION", "OVERRIDES"} - named)
        known = {setting.name.upper() for setting in cs.SETTINGS} | {"CONFIG", "REGION", "OVERRIDES", "NAME"}
        self.assertEqual(set(), {name for name in named - known if not name.startswith("HEADER_")})

    def test_the_ini_example_can_be_used(self):
        self.unset("endpoint", "key", "secret", "poll_interval", "timeout", "retry_backoff")
        self.ini(blocks("ini")[0])
        regions = configparser_of(os.path.join(self.home, ".cloudstack.ini")).sections()
        self.assertGreater(len(regions), 1)
        for region in regions:
            self.assertTrue(cs.CloudStack(**cs.read_config(region)).endpoint.startswith("https://"))
            self.assertTrue(self.good("listZones", "--dry-run", "-r", region, "--endpoint", self.cloud.endpoint))

    @each("text", *blocks("python"))
    def test_the_python_examples_are_python_and_import_what_is_there(self, text):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "cs":
                self.assertEqual([], [alias.name for alias in node.names if alias.name not in cs.__all__])

    def examples(self):
        """(words of a pipeline's `cs` commands, what README shows below it) of the console examples."""
        for block in blocks("console"):
            for part in re.split(r"(?m)^\$ ", re.sub(r"\\\n\s*", "", block))[1:]:
                line, _, shown = part.partition("\n")
                words = [list(group) for is_sign, group in itertools.groupby(shlex.split(line, comments=True),
                                                                             lambda word: word in "|>") if not is_sign]
                yield [command[1:] for command in words if command[0] == "cs"], shown

    def test_the_console_examples_are_understood(self):
        commands = [words for found, _ in self.examples() for words in found]
        self.assertGreater(len(commands), 8)
        self.write("work/cloud-init.yaml", "#cloud-config\n")
        for words in commands:
            with self.subTest(words):
                options, rest = cs._parse_arguments(words)
                if rest and not options["list"]:
                    cs._parse_parameters(rest[1:])

    def test_the_examples_are_what_the_sandbox_prints(self):
        """As words, since README breaks long lines; `...` stands for any."""
        found = [(commands[0], shown) for commands, shown in self.examples() if commands and shown.strip()]
        self.assertGreaterEqual(len(found), 3)
        self.main("--sync", "-q")
        for words, shown in found:
            with self.subTest(words):
                code, out, err = self.main(*words)
                printed = " ".join((err if code else out).split())
                printed = printed.replace(self.cloud.endpoint, "https://cloud.example/client/api")
                pattern = re.escape(" ".join(shown.split())).replace(re.escape("..."), ".*")
                self.assertRegex(printed, r"\A" + pattern + r"\Z")


# === [W] what it costs ================================================================================================


class ImportCostTest(CloudCase):
    """What is not needed is not imported."""

    PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
import cs
for line in sys.argv[2:]:
    code = cs.main(line.split())
    assert code == 0, code
names = set(sys.modules) - before
sys.stderr.write(" ".join(names))
"""
    # From 3.6 to 3.15: what the interpreter's own modules need of one another differs.
    IMPORT = set("binascii collections copyreg cs enum errno functools genericpath hashlib heapq hmac ipaddress"
                 " itertools json keyword linecache math operator os posixpath re reprlib sre_compile sre_constants"
                 " sre_parse stat threading time token tokenize traceback types urllib warnings weakref".split())
    CALL = IMPORT | set("argparse array base64 bisect calendar configparser contextlib copy datetime email gettext"
                        " http locale quopri random select selectors shlex signal socket ssl string struct textwrap"
                        " uu gc".split())

    def imported(self, *lines):
        """The modules, without private ones, that an interpreter has after these lines and not at its start."""
        command = [sys.executable, "-S", "-c", self.PROGRAM, os.path.dirname(CS_PATH)]
        code, _, err = Child(command + list(lines), env=dict(os.environ)).finish()
        self.assertEqual(0, code, err)
        return {name.partition(".")[0] for name in err.decode("utf-8").split() if not name.startswith("_")}

    def test_importing_it(self):
        self.assertEqual(set(), self.imported() - self.IMPORT)

    def test_a_plain_call(self):
        """Without a list of commands, and with one."""
        self.assertEqual(set(), self.imported("listZones") - self.CALL)
        self.sync()
        lines = ("listZones", "listZones -o table", "listZones -o jsonl --all")
        self.assertEqual(set(), self.imported(*lines) - self.CALL)

    def test_help_and_completion_open_no_connection(self):
        self.unset("endpoint", "key", "secret")
        found = self.imported("--help", "--version", "--completion bash")
        self.assertEqual(set(), found & {"configparser", "email", "http", "socket", "ssl"})


# === [H] the house: what its front page promises ======================================================================


def rooms():
    """{number: (first line, last line)} of cs.py's rooms, by their banners."""
    with open(CS_PATH, encoding="utf-8") as file:
        lines = file.read().split("\n")
    starts = [(int(line.split()[2]), number) for number, line in enumerate(lines, 1) if re.match("# --- [0-9] ", line)]
    ends = [number - 1 for _, number in starts[1:]] + [len(lines)]
    return {0: (1, starts[0][1] - 1), **{room: (first, last) for (room, first), last in zip(starts, ends)}}


def dotted(node):
    """A name as it is written in the source, "" for what is none."""
    if isinstance(node, ast.Attribute):
        return dotted(node.value) + "." + node.attr
    return node.id if isinstance(node, ast.Name) else ""


class HouseTest(Case):
    LIBRARY = ["AIOCloudStack", "CloudStack", "CloudStackApiException", "CloudStackConnectionError",
               "CloudStackException", "CloudStackJobTimeout", "CloudStackTimeoutError", "load_config",
               "read_config", "read_config_from_ini"]

    def setUp(self):
        super().setUp()
        with open(CS_PATH, encoding="utf-8") as file:
            self.source = file.read()

    def found_in(self, wanted):
        """The rooms in which a pattern fits a name that is imported or called, dotted as it is written."""
        found = set()
        for node in ast.walk(ast.parse(self.source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call):
                names = [dotted(node.func)]
            if any(re.match(f"({wanted})\\Z", name) for name in names):
                found |= {room for room, (first, last) in rooms().items() if first <= node.lineno <= last}
        return sorted(found)

    @each("wanted, expected",
          (r"(ssl|http\.client)(\..*)?|select|urllib\.request|socket\.(socket|create_connection)", [5]),
          (r"open", [7, 8]), (r"tempfile|os\.(open|fdopen|replace|unlink|makedirs|dup2|mkdir|rename)", [8]),
          (r"eval|exec|compile|__import__|subprocess.*|pickle.*|marshal.*|ctypes.*", []),
          (r"os\.(system|popen|exec.*|spawn.*)", []), (r"argparse|readline", [8]))
    def test_the_auditor_s_paragraph_is_true(self, wanted, expected):
        self.assertEqual(expected, self.found_in(wanted))

    def test_nothing_runs_at_import_but_definitions(self):
        allowed = (r"(re\.compile|.*\.replace|frozenset|functools\..*|collections\.namedtuple|jsonlib\.JSONDecoder"
                   r"|hasattr|bytes|set|range|dict(\.fromkeys)?|tuple|_[A-Z]\w+|_read_options|sys\.exit|main|_number"
                   r"|.*\.(split|items|join))\Z")
        for statement in ast.parse(self.source).body:
            self.assertNotIsInstance(statement, (ast.For, ast.While, ast.With, ast.Try))
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                for node in ast.walk(statement):
                    if isinstance(node, ast.Call):
                        self.assertRegex(dotted(node.func), allowed)

    def test_what_an_asterisk_imports(self):
        names = {}
        exec("from cs import *", names)
        self.assertEqual(self.LIBRARY + ["main"], cs.__all__)
        self.assertEqual(set(cs.__all__), set(names) - {"__builtins__"})

    def test_a_copy_without_the_command_line_is_a_whole_library(self):
        """As README says how to cut it, under a name of its own."""
        (command,) = re.findall(r"(?m)^ +(sed '.*)$", readme())
        path = os.path.join(self.home, "cloud.py")
        subprocess.check_call(command.replace("cs.py", shlex.quote(CS_PATH)).replace("cloud.py", path), shell=True)
        with open(path, encoding="utf-8") as file:
            self.assertEqual("\n".join(self.source.split("\n")[: rooms()[8][0] - 1]) + "\n", file.read())
        code = ("import pickle, sys\nsys.path.insert(0, sys.argv[1])\nfrom cloud import *\nimport cloud\n"
                "c = CloudStack(*sys.argv[2:5], fetch_result=True, poll_interval=0.02)\n"
                "c, error = pickle.loads(pickle.dumps((c, CloudStackConnectionError('x'))))\n"
                "print(c.listZones()['count'], len(c.listVirtualMachines(fetch_list=True)))\n"
                "print(cloud.read_config.__module__, sorted(cloud.__all__) == cloud.__all__, hasattr(cloud, 'main'))\n"
                "print(error)\n"
                "machine = next(c.iter_list('listVirtualMachines', state='Running'))\n"
                "print(c.rebootVirtualMachine(id=machine['id'])['virtualmachine']['state'])\n")
        with Simulator(job_seconds=0.02) as cloud:
            command = [sys.executable, "-I", "-c", code, self.home, cloud.endpoint, cloud.key, cloud.secret]
            self.assertEqual((0, b"2 32\ncloud True False\nx\nRunning\n", b""), Child(command).finish())


# === [R] running the tests ============================================================================================
# Two processes share the tests. Each writes a line of JSON about every test, which the one that started it reads.

TEST_LIMIT = int(os.environ.get("CS_TEST_LIMIT") or 180)  # seconds for one test
STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)  # ends a process; SIGTERM is left to the tests where it can be


def name_of(test):
    return ".".join(test.id().split(".")[-2:])


class Result(unittest.TestResult):
    """Writes of each test [outcome, name, seconds, why it was skipped], and to standard error what failed."""

    def __init__(self, out):
        super().__init__()
        self.out, self.since = out, time.monotonic()

    def startTest(self, test):
        self.settle()
        super().startTest(test)
        self.since = time.monotonic()
        faulthandler.dump_traceback_later(TEST_LIMIT, exit=True, file=sys.__stderr__)

    def stopTest(self, test):
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        self.settle(name_of(test))

    def settle(self, name=None):
        """Write what became of a test; without a name, what a class or the module could not set up."""
        bad, skipped = self.errors + self.failures, self.skipped
        sys.__stderr__.write("".join(f"\nFAIL: {test}\n{text}" for test, text in bad))  # at once: two write here
        if bad or name:
            outcome = "failed" if bad else "skipped" if skipped else "passed"
            reason = skipped[0][1] if outcome == "skipped" else ""
            print(json.dumps([outcome, name or str(bad[0][0]), time.monotonic() - self.since, reason]), file=self.out)
        self.errors, self.failures, self.skipped = [], [], []


def run_part(given, number, count):
    """Run every test whose place is this number, counted by `count`."""

    def end(*_):
        for child in Child.running:
            end_group(child.pid)
        os._exit(1)

    signal.signal(STOP, end)
    with open(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # for what tests print
        warnings.simplefilter("default")
        result = Result(out)
        result.failfast = given.failfast
        loaded = unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"])
        tests = [test for group in loaded for test in group
                 if not given.words or any(word.lower() in name_of(test).lower() for word in given.words)]
        unittest.TestSuite(tests[number::count]).run(result)
        result.settle()
    return 0


def run_parts(given, argv, count):
    """Run the tests in so many processes, and print how they go; what the processes wrote about them."""
    told, parts, (receiver, sender) = [], [], os.pipe()
    env = dict(os.environ, TMPDIR=tempfile.mkdtemp(prefix="cs-tests-"))
    if sys.getfilesystemencoding() != "utf-8":  # as Python 3.7 and later do it themselves
        env["LC_ALL"] = "en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8"
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), sys.modules["__main__"].__file__]
    try:
        for number in range(count):  # in sessions of their own: Ctrl-C is for this process, which then stops them
            parts.append(subprocess.Popen([*command, f"--part={number}/{count}", *argv], stdin=subprocess.DEVNULL,
                                          stdout=sender, env=env, start_new_session=True))
        os.close(sender)
        with open(receiver) as lines:
            for line in lines:
                told.append(json.loads(line))
                print("{:8} {}\n".format(*told[-1]) if given.verbose else ".", end="", flush=True)
        told += [["failed", f"a process that ran tests ended too early: {part.returncode}", 0, ""]
                 for part in parts if part.wait()]
    finally:
        for part in parts:
            part.send_signal(STOP)
            part.wait()
        shutil.rmtree(env["TMPDIR"], True)
    return told


def run_tests(argv):
    """Run the tests whose name (class, a dot, method) holds one of the words, in any case; without words all of them.

    Exit code 0: all passed; 1: some failed; 2: this command line was not understood.
    `test_cs.py sandbox` runs cs.py against a small simulated cloud; `test_cs.py sandbox --help` says how.
    `pytest test_cs.py` and `python3 -m unittest test_cs` run the same tests.
    CS_TEST_LIMIT=SECONDS: how long one test may take (180). CS_ATTACK_RUNS=N: how many broken connections to try (160).
    CS_TEST_SEED=N: the seed of what is drawn, to repeat a failure.
    """
    parser = argparse.ArgumentParser("test_cs.py", description=inspect.getdoc(run_tests), formatter_class=wide_help)
    parser.add_argument("-v", "--verbose", action="store_true", help="name each test")
    parser.add_argument("-x", "--failfast", action="store_true", help="stop at the first failure (one process)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", metavar="WORD", help="a part of a test's name")
    given, begun = parser.parse_args(argv), time.time()
    if given.part:
        return run_part(given, *map(int, given.part.split("/")))
    end_on_signals()
    try:
        told = run_parts(given, argv, 1 if given.words or given.failfast else 2)
    except KeyboardInterrupt:
        return 130
    told = told or [["failed", "no test has a name with " + " or ".join(given.words), 0, ""]]
    count = collections.Counter(outcome for outcome, _, _, _ in told)
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    slowest = sorted(told, key=lambda row: -row[2])[:10]
    print("\n\nThe slowest:", *(f"{seconds:7.2f} s  {name}" for _, name, seconds, _ in slowest),
          *sorted({f"skipped: {reason}" for _, _, _, reason in told if reason}),
          *(f"FAIL: {name}" for outcome, name, _, _ in told if outcome == "failed"),
          f"Python {sys.version.split()[0]}, {time.time() - begun:.1f} s",
          f"{count['passed']} passed, {count['failed']} failed{skipped}", sep="\n")
    return 1 if count["failed"] else 0


SAMPLE = """
import sys, time, unittest
sys.path.insert(0, {folder!r})
import test_cs
from test_cs import tearDownModule

class SampleTest(unittest.TestCase):
    def test_1_passes(self):
        pass

    def test_2_leaves_a_child(self):
        test_cs.Child([sys.executable, "-c", "import time; time.sleep(300)"])

    @test_cs.each("number", 1, 2)
    def test_3_fails(self, number):
        self.assertEqual(1, number, "z\\u00fcrich")

    def test_4_hangs(self):
        time.sleep(300)

if __name__ == "__main__":
    sys.exit(test_cs.run_tests(sys.argv[1:]))
"""


class RunnerTest(Case):
    @each("words, code, last, says",
          ("sampleTEST.test_1 TEST_2 test_3", 1, "2 passed, 2 failed", ["left running: ", "row=1", "number=2"]),
          ("-x test_1 test_3 test_4", 1, "1 passed, 1 failed", ["AssertionError: 1 != 2 : z\\xfcrich"]),
          ("-v test_1 test_4", 1, "1 passed, 1 failed", [
              "passed   SampleTest.test_1_passes", "ended too early", "sample.py\", line 19 in test_4_hangs"]),
          ("__main__", 1, "0 passed, 1 failed", ["no test has a name with __main__"]))
    def test_what_it_says_and_returns(self, words, code, last, says):
        program = self.write("sample.py", SAMPLE.format(folder=os.path.dirname(CS_PATH)))
        env = dict(os.environ, CS_TEST_LIMIT="2", PYTHONIOENCODING="ascii")
        ended, out, err = Child([sys.executable, program, *words.split()], env=env).finish()
        out, err = out.decode("utf-8"), err.decode("utf-8")
        self.assertEqual((code, last), (ended, out[-len(last) - 1:].strip()), out + err)
        self.assertHolds(out + err, *says)


if __name__ == "__main__":
    sys.exit(sandbox(sys.argv[2:]) if sys.argv[1:2] == ["sandbox"] else run_tests(sys.argv[1:]))
