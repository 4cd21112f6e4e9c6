"""The tests of cs.py, and the stand-in management server they run against.

    python3 test_cs.py                           run the tests (--help says how to choose)
    python3 test_cs.py sandbox COMMAND [args]    start the simulator, run cs.py against it once, end with its exit code
    python3 test_cs.py sandbox                   keep the simulator running (--port N for a fixed port) until Ctrl-C

The simulator is a small cloud behind a real socket. It is written from how the server behaves, not from what cs.py
sends: nothing of cs.py is used for it, least of all to check a signature. The tests follow in the same file.
.ci/replay.py holds what it answers against recordings of a live server.

Contents (search for the tag; the numbers are those of the rooms of cs.py):
    [S] the simulator     [X] the sandbox: its command line     [C] what the tests share
    [1] settings          [2] errors          [3] parameters and signature     [4] redaction
    [5.1] protocol: call and request     [5.2] answer     [5.3] retry     [5.4] session     [5.5] pages     [5.6] jobs
    [5.7] recovery        [6] transport       [7] clients     [8] configuration
    [9.1] to [9.10] command line: options, run and report, formats, the list of commands, completion, configure, names
    for ids, --where, --each, the shell
    [W] what is written about it: README and --help     [H] what the front page of cs.py promises
    [R] running the tests

To give it another command: `_list(...)` is one line for a command that lists a table; for any other write a function
under `@command(name, parameters, description, table)`, which is given the Call and returns the answer, or, with
job=True, a generator that returns the job's result (`held` for one on a single row). Parameters it does not know yet
get an entry in _PARAMETERS. What the server refuses is `require(condition, text, code)`, or an ApiError that is raised.
listApis and the checks of parameters come out of the same words.

To give it another fault: for the next requests `Simulator.script` says what happens (an Answer of any kind, a callable
that may also sleep before the command runs, DROP, RUN_THEN_DROP); a way to be wrong for as long as it is wanted is
an attribute of Simulator, above its OPTIONS, that is asked where it applies.
"""

import ast
import asyncio
import atexit
import base64
import calendar
import collections
import configparser
import contextlib
import copy
import csv
import datetime
import decimal
import email.message
import enum
import errno
import faulthandler
import functools
import gc
import gzip
import hashlib
import hmac
import html
import http.client
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
import zlib
from select import select as wait_for
from unittest import mock
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlencode

import cs

try:
    import fcntl
    import pty
    import termios
except ImportError:  # Windows
    fcntl = pty = termios = None
try:
    import readline
except ImportError:
    readline = None

# === [S1] simulator: wire ===========================================================================================
# Requests into parameters, the signature, and answers into bytes.

MAX_HEAD, MAX_FORM, MAX_FORM_KEYS = 8192, 1 << 20, 5000  # bytes of a head and of a form, and the fields of a form
CREDENTIALS_TEXT = "unable to verify user credentials and/or request signature"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
DROP = "close the connection without running the command"
RUN_THEN_DROP = "run the command, then close the connection without an answer"
GO_ON = "answer as usual"

_READING = re.compile(r"(get|list|query|find)\w+", re.ASCII)
_ANNOTATED_READING = frozenset(
    "isAccountAllowedToCreateOfferingsWithTags quotaBalance quotaIsEnabled quotaStatement quotaSummary quotaTariffList "
    "cloudianIsEnabled readyForShutdown verifyOAuthCodeAndGetUser".split())  # fmt: skip
_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]*=*\s*")
_CONTROL = re.compile("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]")
_MAP_NAME = re.compile(r"([^\[\]]+)\[([0-9]+)\]\.([^\[\]]+)")
_DATE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:?\d\d)", re.ASCII)
_JAVA_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_*")
_ENCODED = [chr(byte) if byte in _JAVA_UNRESERVED else f"%{byte:02X}" for byte in range(256)]


class ApiError(Exception):
    """An error the server states in its own words: code, text, and the entities it is about.

    cserrorcode tells who threw it: a command's own check of its values 4350, of the caller's rights 4365, the checks
    before a command runs 9999. None: the error is written early, and has neither cserrorcode nor X-Description.
    """

    def __init__(self, code, text, uuids=(), cserrorcode=0):
        super().__init__(code, text)
        self.code, self.text, self.uuids = code, text, uuids
        self.cserrorcode = {431: 4350, 531: 4365}.get(code, 9999) if cserrorcode == 0 else cserrorcode

    def body(self):
        named = [{"uuid": uuid, "description": description} for uuid, description in self.uuids]
        stated = {} if self.cserrorcode is None else {"cserrorcode": self.cserrorcode}
        return dict({"uuidList": named, "errorcode": self.code}, **stated, errortext=self.text)

    def headers(self):
        return {} if self.cserrorcode is None else {"X-Description": " ".join(self.text.splitlines())}


def require(condition, text, code=431, *more, **named):
    """Raise the ApiError that these words make, unless the condition is met."""
    if not condition:
        raise ApiError(code, text, *more, **named)


class HtmlError(Exception):
    """An error of the servlet container, or of a proxy: an HTML page, and nothing ran."""

    def __init__(self, code, text=None, close=True):
        super().__init__(code, text)
        page = "<html>\n<head><title>Error {0}</title></head>\n<body><h2>HTTP ERROR {0}</h2></body>\n</html>\n"
        body = page.format(f"{code} {html.escape(text or reason_of(code))}")
        self.answer = Answer(code, body, {"Content-Type": "text/html;charset=iso-8859-1"}, close=close)


class Silence(HtmlError):
    """What an unexpected error of the server comes out as: 200 with nothing."""

    def __init__(self):
        Exception.__init__(self)
        self.answer = Answer(200, b"", {"Content-Type": "text/xml;charset=utf-8"})


class Record:
    """One request as it was received; of a header that it has twice the values are joined by a comma."""

    def __init__(self, method, target, version, lines, connection):
        self.method, self.version, self.connection = method, version, connection
        self.path, _, self.query = target.partition("?")
        self.headers, self.body, self.params = email.message.Message(), b"", {}
        for name, _, value in (line.partition(":") for line in lines):
            values = self.headers.get_all(name.strip(), []) + [value.strip()]
            del self.headers[name.strip()]
            self.headers[name.strip()] = ", ".join(values)

    @property
    def command(self):
        return self.params.get("command")

    def read_parameters(self, form=True):
        """Merge query and form: the last of a name wins in a query, the first in a form, the query over the form."""
        content_type = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if form and self.body and content_type == FORM["Content-Type"]:
            pairs = parse_pairs(self.body.decode("utf-8", "replace"))
            if len(self.body) > MAX_FORM or len(pairs) > MAX_FORM_KEYS:
                raise HtmlError(400, "Unable to parse form content")
            for name, value in pairs:
                self.params.setdefault(name, value)
        self.params.update(parse_pairs(self.query))

    def cookies(self):
        pairs = (piece.partition("=") for piece in self.headers.get("Cookie", "").split(";"))
        return {name.strip(): value.strip().strip('"') for name, _, value in pairs}

    def __repr__(self):
        return f"<Record {self.method} {self.command}>"


class Answer:
    """What goes back: a dict is sent as JSON, text and bytes as they are. close: and then the connection is closed."""

    cookies = ()
    gzip = None  # whether the client may get it packed; None for what a script gave, which is sent as it is

    def __init__(self, status=200, body=b"", headers=None, reason=None, close=False):
        self.status, self.reason, self.close = status, reason, close
        self.headers = dict(headers or {})
        if not any(name.lower() == "content-type" for name in self.headers):
            kind = "application/json" if isinstance(body, dict) else "text/html"
            self.headers["Content-Type"] = kind + ";charset=utf-8"
        text = to_json(body) if isinstance(body, dict) else body
        self.body = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def reason_of(status):
    return http.client.responses.get(status, str(status))


def parse_pairs(text):
    pairs = (piece.partition("=")[::2] for piece in text.replace("+", " ").split("&") if piece)
    return [(unquote(name), unquote(value)) for name, value in pairs]


def java_encode(value):
    """What Java's URLEncoder makes of a value once each "+" became "%20"."""
    return "".join([_ENCODED[byte] for byte in value.encode("utf-8", "replace")])


def signature_of(params, secret):
    """The signature of the decoded parameters: names raw, in the order of Java strings (UTF-16 units)."""
    names = sorted(params, key=lambda name: name.encode("utf-16-be", "replace"))
    text = "&".join([name + "=" + java_encode(params[name]) for name in names if name != "signature"]).lower()
    digest = hmac.new(secret.encode("utf-8"), text.encode("utf-8", "replace"), hashlib.sha1).digest()
    return base64.b64encode(digest).decode("ascii")


def parse_date(text):
    """Seconds since 1970 of a date with an offset, or None."""
    match = _DATE.fullmatch(text)
    try:
        seconds = calendar.timegm(time.strptime(match.group(1), "%Y-%m-%dT%H:%M:%S")) if match else None
    except ValueError:
        return None
    if match is None or match.group(2) == "Z":
        return seconds
    offset = match.group(2)
    shift = int(offset[1:3]) * 3600 + int(offset[-2:]) * 60
    return seconds - shift if offset[0] == "+" else seconds + shift


def read_date(text):
    """Seconds of a date parameter; without an offset it is in the server's time zone, which is UTC here."""
    text = text.strip().replace(" ", "T")
    for dated in (text, text + "Z", text + "T00:00:00Z"):
        seconds = parse_date(dated)
        if seconds is not None:
            return seconds
    raise ValueError(text)


def format_date(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(seconds))


def is_reading(command):
    """Whether a server that enforces POST lets this command through by GET."""
    return bool(_READING.fullmatch(command.lower())) or command in _ANNOTATED_READING


def lower_names(params):
    """Split verified parameters into plain ones and maps: {"zoneid": ..}, {"tags": {0: {"key": .., "value": ..}}}."""
    plain, maps = {}, {}
    for name, value in params.items():
        if "[" not in name and "]" not in name:
            plain[name.lower()] = value
            continue
        match = _MAP_NAME.fullmatch(name)
        text = f"Unable to decode parameter: {name}; an array of objects is written parameter[index].field=value"
        require(match, text, 430)
        table, index, field = match.groups()
        maps.setdefault(table.lower(), {}).setdefault(int(index), {})[field] = value
    return plain, maps


def to_json(tree):
    """JSON as the server writes it: control characters stand raw, having been un-escaped once more at the end."""
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    if "\\u00" not in text:
        return text
    return re.sub(r"\\\\|\\u00([01][0-9a-f])", lambda m: chr(int(m.group(1), 16)) if m.group(1) else m.group(), text)


def to_xml(tree):
    (key, value), = tree.items()
    members = "".join([_xml(name, member) for name, member in value.items()])
    return f'<?xml version="1.0" encoding="UTF-8"?><{key} cloud-stack-version="4.23.0.0">{members}</{key}>'


def _xml(name, value):
    if isinstance(value, list):
        return "".join([_xml(name, item) for item in value])
    if isinstance(value, dict):
        text = "".join([_xml(inner, member) for inner, member in value.items()])
    else:
        text = str(value).lower() if isinstance(value, bool) else html.escape(str(value), quote=False)
    return f"<{name}>{text}</{name}>"


# === [S2] simulator: the cloud ======================================================================================
# Rows in tables, jobs, and one registry of commands; listApis and the checks of parameters both come from the registry.

Parameter = collections.namedtuple("Parameter", "name type entity required description length since")
Rows = collections.namedtuple("Rows", "member rows")
OWNING, PAGING = "account domainid projectid listall isrecursive".split(), "keyword page pagesize".split()
OWNER_FIELDS = ("account", "domainid", "domain", "domainpath", "projectid", "project")
LONGEST = {"userdata": 1048576}
SILENT = frozenset(["activateProject"])  # 200 with nothing where the id is missing
LENIENT = ("userdataid", "backupofferingid")  # newer ones: what is no UUID is dropped in silence, with the filter
FURNISHED = "2026-01-12T09:30:00+0000"  # when all that is there from the beginning was made
COMMANDS = {}
OWNED = set("virtualmachine volume snapshot network securitygroup affinitygroup sshkeypair project event".split())
TABLES = (
    "zone pod cluster host template serviceoffering diskoffering networkoffering network account domain project user "
    "virtualmachine volume snapshot securitygroup affinitygroup sshkeypair event resourcelimit counter hosttag provider"
).split()  # fmt: skip

# name, type ("uuid:zone": an id of that table), what it is; ids without a table are those of the command's own entity
_PARAMETERS = """
account string the account of the resource, used with domainid |
affinitygroupid uuid:affinitygroup list by affinity group |
affinitygroupids list the ids of the affinity groups the machine belongs to |
affinitygroupnames list the names of the affinity groups the machine belongs to |
available boolean true for zones that take new machines | backupofferingid uuid list by backup offering |
cidrlist list the CIDR list associated | clusterid uuid:cluster the cluster | description string the description |
details map details as key and value | deviceid long the device of the volume in the machine |
diskofferingid uuid:diskoffering the disk offering | displayname string the name to show |
domain string the path of the domain that the user belongs to |
domainid uuid:domain the domain of the resource, used with account | enddate date nothing after this date |
endport integer the last port of the rule | expunge boolean true to expunge the machine at once |
fingerprint string the fingerprint of the public key | forced boolean force it |
format string the format of the volume | group string a group for the machine |
haenable boolean true for high availability | hostid uuid:host the host | hypervisor string the hypervisor |
icmpcode integer the code of the ICMP message | icmptype integer the type of the ICMP message | id uuid the id |
ids list the ids, mutually exclusive with id | iptonetworklist map ip and networkid of each nic, instead of networkids |
isrecursive boolean true to include the domains below domainid | key string list by tag key |
keypair string the name of the ssh key pair for the machine | keyword string list by keyword |
level string the level of the event |
listall boolean true to list all the caller may see, not only what is its own; false by default |
maxiops long the most input and output operations a second | name string the name |
networkid uuid:network list by network | networkids list the networks of the machine, the default one first |
networktype string list by type of network | page integer the page to list | pagesize integer the rows of a page |
password string the password | podid uuid:pod list by pod | projectid uuid:project the project; -1 for all projects |
protocol string tcp, udp, icmp or all | resourceid string list by resource | resourceids list the resources to tag |
resourcetype string the type of the resource | rootdisksize long the size of the root disk in GB |
securitygroupid uuid:securitygroup the security group |
securitygroupids list the ids of the security groups of the machine |
securitygroupname string the name of the security group |
securitygroupnames list the names of the security groups of the machine |
serviceofferingid uuid:serviceoffering the service offering | size long the size in GB |
snapshotid uuid:snapshot the snapshot to start from | startdate date nothing before this date |
startport integer the first port of the rule | startvm boolean false to leave the machine stopped; true by default |
state string list by state | tags map list by tags, or the tags, as key and value |
templatefilter string featured, self, selfexecutable, sharedexecutable, executable, community or all |
templateid uuid:template the template | type string list by type | userdata string user data, base64 |
userdataid uuid the registered user data | username string the name of the user | value string list by tag value |
virtualmachineid uuid:virtualmachine the virtual machine | volumeid uuid:volume the volume | zoneid uuid:zone the zone |
jobid uuid:job the job
"""
_PARAMETERS = {name: rest for name, *rest in (entry.strip().split(None, 2) for entry in _PARAMETERS.split("|"))}
_INSTANCES = {"virtualmachine": "VirtualMachine", "volume": "Volume", "snapshot": "Snapshot"}


class Command:
    """What a command is called, takes and answers with, and the function that runs it.

    Parameters are words, the required ones in the order in which the server misses them: name, then, where they apply,
    ":type" unless it is the one of _PARAMETERS, "@release" that brought it, "!" if it is required. "+owner" is three.
    """

    def __init__(self, name, parameters, description, entity, run, job, key, admin):
        self.name, self.description, self.entity, self.run = name, description, entity, run
        self.job, self.key, self.admin = job, key or name.lower() + "response", admin
        words = parameters.replace("+owner", "account domainid projectid").split()
        self.parameters = [self._parameter(word) for word in words]
        self.reading = is_reading(name)
        self.short = self.key[:-len("response")]  # what errors call it

    def _parameter(self, word):
        required, (word, _, since) = word.endswith("!"), word.rstrip("!").partition("@")
        name, _, own = word.partition(":")
        kind, text = _PARAMETERS[name]
        kind, _, entity = kind.partition(":")
        if name == "id":
            entity, text = self.entity, "the id of the " + self.entity
        return Parameter(name, own or kind, entity, required, text, LONGEST.get(name, 255), since or None)


def command(name, parameters, description, entity="success", job=False, key=None, admin=False):
    """Register a command. The function of a job is a generator: it yields (lock, id) when it has checked its arguments,
    runs to the next yield when the job begins, and to its return, the job's result, when the job ends. What it has made
    by the first yield stays, even if the job is refused for its customjobid.
    """

    def register(run):
        COMMANDS[name] = Command(name, parameters, description, entity, run, job, key, admin)
        return run

    return register


class User:
    """Who calls: key and secret, or user name, password and domain (a path)."""

    def __init__(self, row, password, domain):
        self.row, self.password, self.domain, self.admin = row, password, domain, row["accounttype"] == 1
        self.id, self.username, self.key = row["id"], row["username"], row["apikey"]
        self.account, self.accountid, self.domainid = row["account"], row["accountid"], row["domainid"]
        self.secret, self.domainpath = make_key(self.username + " secret"), ("ROOT" + domain).rstrip("/")
        self.owner = dict({name: row[name] for name in ("account", "domainid", "domain")}, domainpath=self.domainpath)


class Job:
    """An asynchronous job. What its state is depends on the clock alone: nothing runs until somebody asks."""

    def __init__(self, uuid, spec, user, body, created, begins, due, lost):
        self.id, self.spec, self.user, self.body, self.lost = uuid, spec, user, body, lost
        self.created, self.begins, self.due, self.completed, self.begun = created, begins, due, None, False
        self.status, self.code, self.result = 0, 0, None
        self.kind = self.instance = None  # what it works on, and the id of it

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
            if isinstance(member, dict) and "id" in member:
                member.update(jobid=self.id, jobstatus=0)

    def fail(self, code, text=None):
        self.status, self.code = 2, code
        if text is not None:
            self.result = {"errorcode": code, "errortext": text}

    def row(self):
        user, name = self.user, self.spec.name
        row = {"account": user.account, "accountid": user.accountid, "userid": user.id, "domainid": user.domainid,
               "domainpath": user.domainpath, "jobstatus": self.status, "jobprocstatus": 0, "jobresultcode": self.code,
               "cmd": f"org.apache.cloudstack.api.command.user.{name[0].upper()}{name[1:]}Cmd"}  # fmt: skip
        row.update(without_none(jobinstancetype=self.kind, jobinstanceid=self.instance))
        if self.status == 0:
            row.update(managementserverid="00000000-0000-4000-a000-000000000000", managementservername="simulator")
        if self.result is not None:
            row.update(jobresulttype="object", jobresult=self.result)
        row["created"] = format_date(self.created)
        if self.completed is not None:
            row["completed"] = format_date(self.completed)
        return dict(row, jobid=self.id)


def make_key(seed):
    return base64.urlsafe_b64encode(hashlib.sha512(seed.encode()).digest()).decode().rstrip("=")


def without_none(**fields):
    return {name: value for name, value in fields.items() if value is not None}


def owned_by(row, owner):
    mine = ("projectid",) if "projectid" in owner else ("account", "domainid")
    return all(row.get(field) == owner[field] for field in mine)


def in_zone(zone):
    return {"zoneid": zone["id"], "zonename": zone["name"]}


def brief(rows):
    """What other rows show of these."""
    return [{"id": row["id"], "name": row["name"]} for row in rows]


class Cloud:
    """The state. The same in every run: ids are drawn from a counter."""

    _furnished = None  # the furniture, pickled: ten times faster than to make it again for every simulator

    def __init__(self, clock=time.time):
        self.clock, self.lock = clock, threading.RLock()
        self.jobs, self._pending, self._busy = collections.OrderedDict(), [], {}
        if Cloud._furnished is None:
            kept_apart = set(vars(self))
            self.tables, self.users, self.userdata, self.removed = {name: [] for name in TABLES}, {}, {}, set()
            self._serial = self._machines = self._addresses = 0
            self._furnish()
            Cloud._furnished = pickle.dumps({k: v for k, v in vars(self).items() if k not in kept_apart}, 4)
        vars(self).update(pickle.loads(Cloud._furnished))

    def uuid(self):
        self._serial += 1
        digest = hashlib.md5(b"simulator %d" % self._serial).hexdigest()
        return "-".join((digest[:8], digest[8:12], "4" + digest[13:16], "a" + digest[17:20], digest[20:]))

    def add(self, table, name=None, *more, **values):
        """Append a row; dicts in `more` and keywords are its fields, None ones left out as the server does."""
        row = without_none(id=self.uuid(), name=name)
        for fields in more + (values,):
            row.update(without_none(**fields))
        if table == "sshkeypair":
            row.pop("domainpath", None)  # the one thing with an owner that does not show it
        self.tables[table].append(row)
        return row

    def rows(self, table, **fields):
        """The rows that have these fields."""
        return [row for row in self.tables[table] if all(row.get(name) == fields[name] for name in fields)]

    def find(self, table, uuid):
        return next((row for row in self.tables[table] if row["id"] == uuid), None)

    def named(self, table, name):
        return next(iter(self.rows(table, name=name)), None)

    def number(self, table, uuid):
        """The id of a row in the server's database, which some texts name."""
        return 1 + [row["id"] for row in self.tables[table]].index(uuid)

    def remove(self, table, row):
        """Take a row away; lists that are asked for its id then show nothing, where an id that never was is refused."""
        self.tables[table] = [other for other in self.tables[table] if other is not row]
        self.removed.add(row["id"])

    # the furniture

    def _furnish(self):
        root = self.add("domain", "ROOT", level=0, path="ROOT", haschild=True, state="Active")
        lab = self.add("domain", "research", level=1, path="ROOT/research", haschild=False, state="Active")
        lab["parentdomainid"] = root["id"]
        self.admin = self._account("admin", root, 1, "Root Admin", "correct horse battery staple", "/")
        user = self._account("user", lab, 0, "User", "tilde~and+plus*", "/research")
        self.owner = self.admin.owner
        for name in ("north", "south"):
            self._zone(name)
        self._offerings()
        project = self.add("project", "apollo", self.owner, displaytext="The Apollo project", state="Suspended",
                           owner=[{"account": "admin"}], created=FURNISHED)  # fmt: skip
        apollo = dict(self.owner, projectid=project["id"], project="apollo")
        del apollo["account"]
        owners = (self.owner, user.owner, apollo)
        for owner in owners:
            self._properties(owner)
        for owner, count in zip(owners, (32, 6, 4)):
            self.add_machines(count, owner)
        self._small_tables(user)

    def _account(self, name, domain, kind, role, password, path):
        place = {"domainid": domain["id"], "domain": domain["name"]}
        account = self.add("account", name, place, accounttype=kind, rolename=role, state="enabled",
                           domainpath=("ROOT" + path).rstrip("/"))
        row = self.add("user", None, place, username=name, firstname=name.title(), lastname="Sample", state="enabled",
                       email=name + "@cloud.example", account=name, accountid=account["id"], accounttype=kind,
                       rolename=role, apikey=make_key(name + " key"))  # fmt: skip
        account["user"] = [row]
        self.users[name] = User(row, password, path)
        return self.users[name]

    def _zone(self, name):
        zone = self.add("zone", name, networktype="Advanced", securitygroupsenabled=False, allocationstate="Enabled",
                        dns1="192.0.2.53", internaldns1="10.0.0.53", localstorageenabled=True, tags=[])
        place = in_zone(zone)
        pod = self.add("pod", name + "-pod-1", place, netmask="255.255.255.0", allocationstate="Enabled")
        place.update(podid=pod["id"], podname=pod["name"])
        cluster = self.add("cluster", name + "-cluster-1", place, hypervisortype="KVM", clustertype="CloudManaged")
        place.update(clusterid=cluster["id"], clustername=cluster["name"])
        for number in (1, 2, 3):
            self.add("host", f"{name}-kvm-{number}", place, state="Up", type="Routing", hypervisor="KVM", cpunumber=64,
                     memorytotal=549755813888, resourcestate="Enabled", created=FURNISHED, hosttags="ssd",
                     ipaddress=f"10.0.{len(self.tables['zone'])}.{number}")  # fmt: skip

    def _offerings(self):
        north, south = self.tables["zone"]
        debian = None
        debian_12 = ("Debian 12", "Debian GNU/Linux 12 (64-bit)", False)
        for name, system, has_password, zone in (
                (*debian_12, north), (*debian_12, south), ("Rocky Linux 9", "Rocky Linux 9", True, north),
                ("Ubuntu 24.04", "Ubuntu 24.04 LTS", False, south)):  # fmt: skip
            row = self.add(
                "template", name, self.owner, in_zone(zone), ostypename=system, passwordenabled=has_password,
                displaytext=name + " cloud image", ispublic=True, isfeatured=True, isready=True, hypervisor="KVM",
                status="Download Complete", format="QCOW2", templatetype="USER", size=2147483648, created=FURNISHED,
                tags=[])  # fmt: skip
            if name == "Debian 12":  # one template in two zones is two rows of one id
                debian = row["id"] = debian or row["id"]
        common = {"issystem": False, "state": "Active", "storagetype": "shared", "created": FURNISHED}
        for name, cpus, memory in ("Small", 1, 1024), ("Medium", 2, 4096), ("Large", 4, 16384), ("Titan", 512, 1 << 22):
            self.add("serviceoffering", name, displaytext=f"{cpus} CPUs, {memory} MB", cpunumber=cpus, cpuspeed=2000,
                     memory=memory, iscustomized=False, **common)  # fmt: skip
        self.add("serviceoffering", "Custom", displaytext="As you like it", iscustomized=True, **common)
        del common["issystem"]
        for name, size in (("20 GB", 20), ("100 GB", 100)):
            self.add("diskoffering", name, displaytext=name + " disk", disksize=size, iscustomized=False, **common)
        self.add("diskoffering", "Any size", displaytext="A disk of any size", iscustomized=True, **common)
        services = [{"name": "Dhcp"}, {"name": "Dns"}]
        for name, kind, number in ("Isolated with source NAT", "Isolated", 2), ("Layer 2", "L2", 0):
            self.add("networkoffering", name, displaytext=name, guestiptype=kind, traffictype="Guest", state="Enabled",
                     created=FURNISHED, service=services[:number])

    def _properties(self, owner):
        offering = self.tables["networkoffering"][0]
        for zone in self.tables["zone"]:
            for name in ("web", "backend"):
                number = len(self.tables["network"]) + 1
                self.add("network", name, owner, in_zone(zone), displaytext=name + " tier", traffictype="Guest",
                         type="Isolated", networkofferingid=offering["id"], networkofferingname=offering["name"],
                         cidr=f"10.1.{number}.0/24", gateway=f"10.1.{number}.1", netmask="255.255.255.0",
                         state="Implemented", issystem=False, created=FURNISHED, tags=[])
        for name, text, ports in (("default", "Default Security Group", ()), ("web", "HTTP and HTTPS", (80, 443))):
            group = self.add("securitygroup", name, owner, description=text, ingressrule=[], egressrule=[], tags=[])
            group["ingressrule"] += [self.rule("tcp", port, port, "0.0.0.0/0") for port in ports]
        self.add("affinitygroup", "spread", owner, type="host anti-affinity", description="Not on one host")
        self.add("sshkeypair", "laptop", owner, fingerprint="4b:5d:1f:aa:02:1c:44:9e:7e:91:3a:0c:55:61:de:12")

    def _small_tables(self, user):
        kinds = "user_vm public_ip volume snapshot template project network vpc cpu memory primary_storage".split()
        self.tables["resourcelimit"] = [
            dict(owner, resourcetype=str(number), resourcetypename=kind, max=-1 if number else 500)
            for number, kind in enumerate(kinds) for owner in (self.owner, user.owner)]  # fmt: skip
        for source in ("cpu", "memory", "network", "virtualrouter", "snmp", "netscaler", "vpn"):
            self.add("counter", source + " used", source=source, value=source, provider="VirtualRouter")
        self.tables["hosttag"] = [{"id": self.uuid(), "name": name} for name in ("gpu", "ssd", "windows")]
        self.tables["provider"] = [{"name": name, "type": "PRIMARY"} for name in ("DefaultPrimary", "StorPool")]

    def rule(self, protocol, first, last, cidr, **more):
        more.update(ruleid=self.uuid(), protocol=protocol, startport=first, endport=last, cidr=cidr, tags=[])
        return without_none(**more)

    def add_machines(self, count, owner=None):
        """Put `count` more machines, each with its root volume, into the cloud; the admin's unless told otherwise."""
        with self.lock:
            return [self._furnished_machine(owner or self.owner) for _ in range(count)]

    def _furnished_machine(self, owner):
        number = self._machines
        zone, role = self.tables["zone"][number % 2], ("web", "db", "cache", "worker")[number % 4]
        template = self.rows("template", zoneid=zone["id"])[number // 2 % 2]
        machine = self.new_machine(owner, zone, template, self.tables["serviceoffering"][number % 3],
                                   self.networks_of(owner, zone), f"{role}-{number // 4 + 1:02d}")  # fmt: skip
        seconds = 1771200000 + 3600 * number
        machine["created"] = self.tables["volume"][-1]["created"] = format_date(seconds)
        if number % 5 == 4:
            machine["state"] = "Stopped"
        else:
            self.place(machine)
        self.tag(machine, "UserVm", "role", role)
        if number % 8 == 1:
            volume = self.new_volume(owner, zone, f"data-{number:02d}", 20, machine, 1)
            volume["created"] = machine["created"]
        self.event("VM.CREATE", "Successfully completed starting Vm. Vm Id: " + machine["id"], owner, seconds)
        return machine

    # what commands do

    def new_machine(self, owner, zone, template, offering, networks, name, addresses=(), custom=None):
        self._machines += 1
        number = self._machines
        machine = self.add(
            "virtualmachine", name, owner, in_zone(zone), displayname=name, instancename=f"i-2-{number}-VM",
            userid=self.users["admin"].id, username="admin", created=format_date(self.clock()), state="Stopped",
            haenable=False, templateid=template["id"], templatename=template["name"], details={}, securitygroup=[],
            templatedisplaytext=template["displaytext"], osdisplayname=template["ostypename"], nic=[], tags=[],
            passwordenabled=template["passwordenabled"], rootdeviceid=0, rootdevicetype="ROOT", hypervisor="KVM",
            affinitygroup=[], isdynamicallyscalable=False)  # fmt: skip
        self.size(machine, offering, custom or {})
        for network, address in itertools.zip_longest(networks, addresses):
            machine["nic"].append(self._nic(network, not machine["nic"], address))
            machine["ipaddress"] = machine["nic"][0]["ipaddress"]
        self.new_volume(owner, zone, f"ROOT-{number}", 20, machine, 0)
        return machine

    def size(self, machine, offering, custom):
        machine.update(serviceofferingid=offering["id"], serviceofferingname=offering["name"])
        for detail, least in ("cpuNumber", 1), ("cpuSpeed", 1000), ("memory", 512):
            machine[detail.lower()] = int(custom.get(detail) or offering.get(detail.lower(), least))
        machine["details"].update(custom)

    def _nic(self, network, default, address=None):
        self._addresses += 1
        number = self._addresses
        address = address or f"{network['cidr'].rpartition('.')[0]}.{10 + number % 240}"
        return {"id": self.uuid(), "networkid": network["id"], "networkname": network["name"], "isdefault": default,
                "gateway": network["gateway"], "ipaddress": address, "traffictype": "Guest", "type": network["type"],
                "netmask": "255.255.255.0", "macaddress": f"02:01:00:{number >> 8 & 255:02x}:{number & 255:02x}:01"}

    def networks_of(self, owner, zone):
        """The network, if any, of a machine that names none."""
        return [row for row in self.rows("network", zoneid=zone["id"]) if owned_by(row, owner)][:1]

    def new_volume(self, owner, zone, name, gigabytes, machine=None, device=None):
        volume = self.add("volume", name, owner, in_zone(zone), size=gigabytes << 30, storagetype="shared", tags=[],
                          type="ROOT" if device == 0 else "DATADISK", state="Ready" if machine else "Allocated",
                          created=format_date(self.clock()), hypervisor="KVM")
        if machine:
            self.attach(volume, machine, device)
        return volume

    def attach(self, volume, machine, device=None):
        if device is None:
            taken = {row.get("deviceid") for row in self.volumes_of(machine)}
            device = next(number for number in range(1, 1000) if number not in taken)
        volume.update(virtualmachineid=machine["id"], vmname=machine["name"], vmdisplayname=machine["displayname"],
                      vmstate=machine["state"], deviceid=device, state="Ready")  # fmt: skip

    def detach(self, volume):
        for field in ("virtualmachineid", "vmname", "vmdisplayname", "vmstate", "deviceid"):
            volume.pop(field, None)

    def volumes_of(self, machine):
        return self.rows("volume", virtualmachineid=machine["id"])

    def place(self, machine, host=None):
        hosts = self.rows("host", zoneid=machine["zoneid"])
        host = host or hosts[int(machine["instancename"].split("-")[2]) % len(hosts)]
        machine.update(state="Running", hostid=host["id"], hostname=host["name"])

    def unplace(self, machine, state):
        machine["state"] = state
        for field in ("hostid", "hostname"):
            machine.pop(field, None)

    def expunge(self, machine):
        for volume in self.volumes_of(machine):
            if volume["type"] == "ROOT":
                self.remove("volume", volume)
            else:
                self.detach(volume)
        self.remove("virtualmachine", machine)

    def tag(self, row, kind, key, value):
        tag = {"key": key, "value": value, "resourcetype": kind, "resourceid": row["id"]}
        tag.update((field, row[field]) for field in OWNER_FIELDS if field in row)
        row["tags"] = [other for other in row.get("tags", ()) if other["key"] != key] + [tag]

    def event(self, kind, text, owner, seconds):
        self.add("event", None, owner, username="admin", type=kind, level="INFO", description=text, state="Completed",
                 created=format_date(seconds))  # fmt: skip

    # jobs

    def submit(self, spec, user, body, seconds, custom=None, lost=False):
        """Start a job: its generator has the arguments checked now, and begins when nothing holds its lock.

        custom is the caller's own id for it. It is looked at last: what the generator has made by then stays.
        """
        lock, entity = next(body)
        require(not custom or _UUID.fullmatch(custom), f"UUID: {custom} doesn't follow the UUID format")
        if custom in self.jobs:
            require(not user.admin, "Entity already exists ", 530)
            raise ApiError(431, f"UUID: {custom} already exists so can't create/update with custom id")
        now = self.clock()
        begins = max(now, self._busy.get(lock, 0))
        job = Job(custom or self.uuid(), spec, user, body, now, begins, begins + seconds, lost)
        if spec.entity in _INSTANCES:
            job.kind, job.instance = _INSTANCES[spec.entity], entity or lock
        elif spec.entity == "affinitygroup" and entity:
            job.kind = "AffinityGroup"  # and no id
        if lock:
            self._busy[lock] = job.due
        self.jobs[job.id] = job
        self._pending.append(job)
        self.settle()
        return without_none(id=entity, jobid=job.id)

    def settle(self):
        """Let every job come as far as the clock says it is."""
        if not self._pending:
            return
        now, waiting = self.clock(), []
        for job in self._pending:
            try:
                if job.lost and job.due <= now:
                    job.fail(530)
                elif job.status == 0 and not job.lost:
                    job.advance(now)
            except StopIteration as stop:
                job.succeed(stop.value)
                name = job.spec.name
                kind = re.sub("(?<=[a-z])(?=[A-Z])", ".", name).upper()
                self.event(kind, "Successfully completed " + name, job.user.owner, now)
            except ApiError as error:
                job.fail(error.code, error.text)
            if job.status == 0:
                waiting.append(job)
            else:
                job.completed = max(job.due, job.created)
        self._pending = waiting

    def job(self, uuid, retention):
        job = self.jobs.get(uuid)
        return job if job and self.clock() < job.created + retention else None


class Call:
    """One command being run: who asks, with which converted arguments."""

    def __init__(self, simulator, user, spec, params):
        self.simulator, self.cloud, self.user, self.spec = simulator, simulator.cloud, user, spec
        self.plain, self.maps = lower_names(params)
        self.args, self.cookies = {}, ()
        self.get = self.args.get

    def convert(self):
        """Fill args from the parameters the command declares; everything else is ignored in silence."""
        for parameter in self.spec.parameters:
            name = parameter.name
            value = self.maps.get(name) if parameter.type == "map" else self.plain.get(name)
            if value or (value == "" and parameter.type == "string"):
                value = self._converted(parameter, value)
                if value is not None:
                    self.args[name] = value
            elif parameter.required:
                if self.spec.name in SILENT:
                    raise Silence
                text = f"Unable to execute API command {self.spec.short} due to missing parameter {name}"
                raise ApiError(431, text, cserrorcode=9999)

    def _converted(self, parameter, value):
        kind, name = parameter.type, parameter.name
        if kind == "map":
            return [value[index] for index in sorted(value)]
        if kind == "boolean":
            return value.lower() == "true"
        if kind == "list":
            return value.split(",")
        if kind == "uuid":
            return self._entity_id(parameter, value)
        text = f"Value greater than max allowed length {parameter.length} for param: {name}"
        require(kind != "string" or len(value) <= parameter.length, text, cserrorcode=9999)
        try:
            return {"integer": int, "long": int, "date": read_date}.get(kind, str)(value)
        except ValueError:
            raise self.invalid(name, value) from None

    def _entity_id(self, parameter, value):
        if parameter.name in LENIENT:
            return value if _UUID.fullmatch(value) else None
        known = parameter.entity not in self.cloud.tables or self.cloud.find(parameter.entity, value)
        known = known or self.spec.reading and value in self.cloud.removed
        if not known and not (parameter.name == "projectid" and value == "-1"):
            raise self.invalid(parameter.name, value)
        return value

    def invalid(self, name, value):
        text = (f"Unable to execute API command {self.spec.short} due to invalid value. Invalid parameter {name} "
                f"value={value} due to incorrect long value format, or entity does not exist or due to incorrect "
                "parameter annotation for the field in api cmd class.")  # fmt: skip
        return ApiError(431, text, cserrorcode=9999)

    def entity(self, table, name="id"):
        """The row an argument names, the caller's right to it checked; None without the argument."""
        row = self.cloud.find(table, self.args[name]) if name in self.args else None
        if row and table in OWNED:
            self.check_access(row)
        return row

    def check_access(self, row):
        text = "Caller does not have permission to operate with provided resource."
        require(self.user.admin or owned_by(row, self.user.owner), text, 531)

    def entities(self, table, name, names=None):
        """The rows a list of ids, or of names, stands for, in the order given."""
        rows = [(uuid, self.cloud.find(table, uuid)) for uuid in self.get(name, ())]
        rows += [(word, self.mine(table, word)) for word in self.get(names, ())]
        for word, row in rows:
            require(row is not None, f"Unable to find {table} {word}")
            self.check_access(row)
        return [row for _, row in rows]

    def mine(self, table, name):
        owner = self.owner()
        return next((row for row in self.cloud.rows(table, name=name) if owned_by(row, owner)), None)

    def owner(self):
        """Who will own what is created: the caller, or the account or project it names."""
        if "projectid" in self.args:
            row = self.entity("project", "projectid")
            place = {field: row[field] for field in ("domainid", "domain", "domainpath")}
            return dict(place, projectid=row["id"], project=row["name"])
        for user in self.cloud.users.values():
            if user.account == self.get("account") and user.domainid == self.get("domainid", user.domainid):
                self.check_access(user.owner)
                return user.owner
        return self.user.owner

    def details(self):
        """A map written flat, all in index 0, or with an index an entry; as one dict."""
        return {name: value for entry in self.get("details", ()) for name, value in entry.items()}

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

_NO_FILTER = {*OWNING, *PAGING, "templatefilter", "details"}
_TEMPLATE_FILTERS = "featured self selfexecutable sharedexecutable executable community all".split()
_FILTERS = {
    "ids": lambda row, ids: row["id"] in ids,
    "networkid": lambda row, uuid: uuid in [nic["networkid"] for nic in row["nic"]],
    "securitygroupid": lambda row, uuid: uuid in [group["id"] for group in row["securitygroup"]],
    "affinitygroupid": lambda row, uuid: uuid in [group["id"] for group in row["affinitygroup"]],
    "securitygroupname": lambda row, name: row["name"] == name,
    "startdate": lambda row, seconds: parse_date(row["created"]) >= seconds,
    "enddate": lambda row, seconds: parse_date(row["created"]) <= seconds,
    "available": lambda row, wanted: True,
}


def visible(call, rows):
    """Those of the rows of owned things that the call is about."""
    user, project = call.user, call.get("projectid")
    if project == "-1":
        return [row for row in rows if "projectid" in row and (user.admin or row["domainid"] == user.domainid)]
    if project:
        return [row for row in rows if row.get("projectid") == project]
    rows = [row for row in rows if "projectid" not in row]
    if user.admin and "account" in call.args:
        owner = {"account": call.args["account"], "domainid": call.get("domainid", user.domainid)}
        return [row for row in rows if owned_by(row, owner)]
    if user.admin and "domainid" in call.args:
        return [row for row in rows if row["domainid"] == call.args["domainid"]]
    return rows if user.admin and call.get("listall") else [row for row in rows if owned_by(row, user.owner)]


def select(call, rows):
    """The rows that pass every filter among the arguments."""
    require(not ("id" in call.args and "ids" in call.args), "Specify either id or ids but not both parameters")
    require(call.get("templatefilter", "all") in _TEMPLATE_FILTERS, "Please specify a valid template filter")
    for name, value in call.args.items():
        if name in _NO_FILTER:
            continue
        word = str(value).lower()
        if name == "tags":
            wanted = call.tags()
            rows = [row for row in rows if has_tags(row, wanted)]
        elif name in _FILTERS:
            rows = [row for row in rows if _FILTERS[name](row, value)]
        elif name == "name" and call.spec.entity == "virtualmachine":
            rows = [row for row in rows if word in row["name"].lower()]
        else:
            rows = [row for row in rows if str(row.get(name, "")).lower() == word]
    if "keyword" in call.args:
        word = call.args["keyword"].lower()
        names = ("name", "displayname") if call.spec.entity == "virtualmachine" else ("name",)
        rows = [row for row in rows if any(word in row.get(name, "").lower() for name in names)]
    return rows


def has_tags(row, wanted):
    tags = {tag["key"]: tag["value"] for tag in row.get("tags", ())}
    return all(key in tags and value in (None, tags[key]) for key, value in wanted)


def of_machine(call):
    """The groups of the caller, or those of the machine that the call names."""
    table = call.spec.entity
    rows, machine = visible(call, call.cloud.tables[table]), call.entity("virtualmachine", "virtualmachineid")
    if machine is None:
        return rows
    del call.args["virtualmachineid"]
    return [row for row in rows if row["id"] in [group["id"] for group in machine[table]]]


def accounts(call):
    every = call.user.admin and call.get("listall")
    return [row for row in call.cloud.tables["account"] if every or row["id"] == call.user.accountid]


def all_tags(call):
    rows = (row for table in sorted(OWNED) for row in call.cloud.tables[table])
    return visible(call, [tag for row in rows for tag in row.get("tags", ())])


def newest_first(call):
    return visible(call, call.cloud.tables["event"])[::-1]


def _list(name, table, parameters="", description=None, member=None, key=None, admin=False, rows=None):
    """Register a command that lists a table, or of it what `rows` gives for a call."""
    owned = table in OWNED or table in ("resourcelimit", "template", "tag")
    parameters = " ".join([parameters, *PAGING, *(word for word in OWNING if owned and word != table + "id")])

    def run(call):
        found = rows(call) if rows else call.cloud.tables[table]
        return Rows(member or table, select(call, visible(call, found) if owned and not rows else found))

    command(name, parameters, description or f"Lists {table}s.", table, False, key, admin)(run)


_list("listZones", "zone", "id name available networktype tags@4.3")
_list("listPods", "pod", "id name zoneid", admin=True)
_list("listClusters", "cluster", "id name zoneid podid hypervisor", admin=True)
_list("listHosts", "host", "id name zoneid podid clusterid type state hypervisor", admin=True)
_list("listServiceOfferings", "serviceoffering", "id name virtualmachineid", "Lists service offerings.")
_list("listDiskOfferings", "diskoffering", "id name", "Lists disk offerings.")
_list("listNetworks", "network", "id name@4.22.0 zoneid type tags")
_list("listDomains", "domain", "id name listall", admin=True)
_list("listUsers", "user", "id username account", admin=True)
_list("listProjects", "project", "id name state")
_list("listVirtualMachines", "virtualmachine",
      "id ids@4.4 name zoneid state hostid templateid serviceofferingid@4.4 networkid securitygroupid@4.15 "
      "affinitygroupid keypair hypervisor tags details:list userdataid@4.20.1 backupofferingid@4.17",
      "Lists the virtual machines of the caller.")
_list("listVolumes", "volume", "id ids@4.9 name zoneid type state virtualmachineid diskofferingid@4.4 tags")
_list("listSnapshots", "snapshot", "id ids@4.9 name volumeid zoneid tags")
_list("listSSHKeyPairs", "sshkeypair", "id name fingerprint", "Lists ssh key pairs.")
_list("listEvents", "event", "id type level startdate enddate", rows=newest_first)
_list("listResourceLimits", "resourcelimit", "resourcetype:integer", "Lists resource limits.")
_list("listCounters", "counter", "id name", key="counterresponse")
_list("listHostTags", "hosttag", "", "Lists the tags of hosts.", admin=True)
_list("listStorageProviders", "provider", "type!", "Lists storage providers.", "dataStoreProvider", admin=True)
_list("listTemplates", "template", "templatefilter! id ids@4.9 name zoneid hypervisor tags",
      rows=lambda call: call.cloud.tables["template"])  # fmt: skip
_list("listAccounts", "account", "id name state domainid listall isrecursive", rows=accounts)
_list("listSecurityGroups", "securitygroup", "id securitygroupname virtualmachineid tags", "Lists security groups.",
      rows=of_machine)  # fmt: skip
_list("listAffinityGroups", "affinitygroup", "id name type virtualmachineid", "Lists affinity groups.", rows=of_machine)
_list("listTags", "tag", "key value resourceid resourcetype", "Lists the tags of resources.", rows=all_tags)


@command("listAsyncJobs", "startdate account domainid listall isrecursive keyword page pagesize",
         "Lists the jobs that are not done yet.", "job")  # fmt: skip
def _list_async_jobs(call):
    cloud, retention = call.cloud, call.simulator.job_retention
    every = call.user.admin and call.get("listall")
    pending = [job for job in cloud.jobs.values() if job.status == 0 and cloud.job(job.id, retention)
               and (every or job.user.account == call.user.account) and job.created >= call.get("startdate", 0)]
    return Rows("asyncjobs", [job.row() for job in sorted(pending, key=lambda job: job.created)])


@command("queryAsyncJobResult", "jobid", "Asks for the state and the result of a job.", "job")
def _query_job(call):
    require("jobid" in call.args, "Expected parameter job id or parameters resource type and resource id")
    user, job = call.user, call.cloud.job(call.args["jobid"], call.simulator.job_retention)
    if job is None:
        raise call.invalid("jobid", call.args["jobid"])
    if not user.admin and job.user.account != user.account:
        who = to_json({"accountName": user.account, "id": call.cloud.number("account", user.accountid),
                       "uuid": user.accountid})  # fmt: skip
        number = list(call.cloud.jobs).index(job.id) + 1
        raise ApiError(531, f"Account Account [{who}] is not authorized to see job id={number}")
    return job.row()


@command("listCapabilities", "", "Lists what the server can do.", "capability")
def _list_capabilities(call):
    limit = call.simulator.rate_limit
    return {"capability": dict(
        {"apilimitmax": limit, "apilimitinterval": 1} if limit else {}, cloudstackversion="4.23.0.0",
        securitygroupsenabled=True, userpublictemplateenabled=True, defaultuipagesize=20, dynamicrolesenabled=True)}


@command("getApiLimit", "", "Tells what is left of the caller's API limit.", "apilimit")
def _get_api_limit(call):
    (_, issued), limit = call.simulator.window(call.user), call.simulator.rate_limit
    require(limit, "This api is only available when api.throttling.enabled = true.", 432)
    return {"apilimit": {"account": call.user.account, "accountid": call.user.accountid, "apiIssued": issued,
                         "apiAllowed": max(0, limit - issued), "expireAfter": 1000}}  # fmt: skip


@command("getVirtualMachineUserData", "virtualmachineid!", "Returns the user data of a machine.", "virtualmachine")
def _get_user_data(call):
    uuid = call.entity("virtualmachine", "virtualmachineid")["id"]
    return {"virtualmachineuserdata": without_none(virtualmachineid=uuid, userdata=call.cloud.userdata.get(uuid))}


@command("getUploadParamsForVolume", "name! zoneid! format! diskofferingid projectid account domainid",
         "Makes a volume to upload to.", "volume", key="postuploadvolumeresponse")  # fmt: skip
def _get_upload_params(call):
    volume = call.cloud.new_volume(call.owner(), call.entity("zone", "zoneid"), call.args["name"], 1)
    volume["state"], uuid = "NotUploaded", volume["id"]
    return {"getuploadparams": {"id": uuid, "postURL": "https://upload.cloud.example/upload/" + uuid,
                                "metadata": "c2ltdWxhdGVk", "expires": format_date(call.cloud.clock() + 600),
                                "signature": make_key(uuid)}}  # fmt: skip


# virtual machines


def need(row, states):
    """A job that finds its resource in none of the states fails."""
    if row["state"] not in states.split():
        name, wanted = row.get("instancename") or row["name"], " or ".join(states.split())
        raise ApiError(530, f"Unable to do this with {name} {row['id']}: it is {row['state']}, not {wanted}")


def held(call, table, name="id", states="", meanwhile=None):
    """The course of a job on the one row that an argument names, up to its end: the row."""
    row = call.entity(table, name)
    yield row["id"], None
    if states:
        need(row, states)
    if meanwhile:
        row["state"] = meanwhile
    yield
    return row


def check_userdata(call):
    require(_BASE64.fullmatch(call.get("userdata", "")), "User data is not base64 encoded")


def check_host_name(call, name, networks):
    """A name stands once in a network."""
    for machine in call.cloud.rows("virtualmachine", name=name):
        for nic in machine["nic"]:
            text = f"The vm with hostName {name} already exists in the network domain: cs2cloud.internal; network="
            require(nic["networkid"] not in networks, text + nic["networkname"])


@command("deployVirtualMachine",
         "serviceofferingid! zoneid! templateid name displayname networkids iptonetworklist diskofferingid size "
         "rootdisksize@4.4 details@4.3 userdata keypair securitygroupids securitygroupnames affinitygroupids "
         "affinitygroupnames hostid group startvm hypervisor +owner",
         "Creates a virtual machine and starts it.", "virtualmachine", job=True)  # fmt: skip
def _deploy(call):
    machine, host = deployed(call), call.entity("host", "hostid")
    uuid = machine["id"]
    yield uuid, uuid
    machine["state"] = "Starting"
    yield
    if machine["memory"] > 1 << 20 or machine["cpunumber"] > 64:
        machine["state"] = "Error"
        who = {"id": call.cloud.number("virtualmachine", uuid), "instanceName": machine["instancename"],
               "state": "Stopped", "type": "User", "uuid": uuid}  # fmt: skip
        raise ApiError(533, "No destination found for a deployment for VM instance " + to_json(who))
    if call.get("startvm", True):
        call.cloud.place(machine, host)
    else:
        call.cloud.unplace(machine, "Stopped")
    return {"virtualmachine": dict(machine, password=make_key(uuid)[:12]) if machine["passwordenabled"] else machine}


def deployed(call):
    """The new row of a machine, its arguments checked."""
    cloud, get, owner = call.cloud, call.get, call.owner()
    require("templateid" in call.args, "Unable to use template null")
    check_userdata(call)
    both_given = "networkids" in call.args and "iptonetworklist" in call.args
    require(not both_given, "networkids can't be given along with iptonetworklist")
    zone = call.entity("zone", "zoneid")
    networks, addresses = call.entities("network", "networkids"), []
    for entry in get("iptonetworklist", ()):
        networks.append(cloud.find("network", entry.get("networkid")))
        require(networks[-1] is not None, f"Unable to find network {entry.get('networkid')}")
        addresses.append(entry.get("ip"))
    networks = networks or cloud.networks_of(owner, zone)
    groups = call.entities("securitygroup", "securitygroupids", "securitygroupnames")
    affinity = call.entities("affinitygroup", "affinitygroupids", "affinitygroupnames")
    is_known = "keypair" not in call.args or cloud.named("sshkeypair", get("keypair"))
    require(is_known, f"A key pair with name '{get('keypair')}' was not found.")
    template, offering = call.entity("template", "templateid"), call.entity("serviceoffering", "serviceofferingid")
    name = get("name") or "VM-" + cloud.uuid()
    check_host_name(call, name, [network["id"] for network in networks])
    machine = cloud.new_machine(owner, zone, template, offering, networks, name, addresses, call.details())
    machine.update({field: get(field) for field in ("displayname", "keypair", "group") if field in call.args})
    machine.update(securitygroup=brief(groups), affinitygroup=brief(affinity))
    for row in affinity:
        row.setdefault("virtualmachineIds", []).append(machine["id"])
    if "userdata" in call.args:
        cloud.userdata[machine["id"]] = get("userdata")
    if "diskofferingid" in call.args:
        size = call.entity("diskoffering", "diskofferingid").get("disksize") or get("size", 1)
        cloud.new_volume(owner, zone, "DATA-" + machine["instancename"].split("-")[2], size, machine, 1)
    return machine


@command("startVirtualMachine", "id! hostid@3.0.1", "Starts a virtual machine.", "virtualmachine", job=True)
def _start(call):
    machine, host = call.entity("virtualmachine"), call.entity("host", "hostid")
    yield machine["id"], None
    text = f"The virtual machine {machine['id']} ({machine['name']}) is already running"
    require(machine["state"] != "Running", text)
    need(machine, "Stopped")
    machine["state"] = "Starting"
    yield
    call.cloud.place(machine, host)
    return {"virtualmachine": machine}


@command("stopVirtualMachine", "id! forced", "Stops a virtual machine.", "virtualmachine", job=True)
def _stop(call):
    machine = yield from held(call, "virtualmachine", "id", "Running Stopped", "Stopping")
    call.cloud.unplace(machine, "Stopped")
    return {"virtualmachine": machine}


@command("rebootVirtualMachine", "id! forced@4.16.0", "Reboots a virtual machine.", "virtualmachine", job=True)
def _reboot(call):
    return {"virtualmachine": (yield from held(call, "virtualmachine", "id", "Running"))}


@command("destroyVirtualMachine", "id! expunge@4.2.1", "Destroys a virtual machine.", "virtualmachine", job=True)
def _destroy(call):
    machine = yield from held(call, "virtualmachine", "id", "Running Stopped Error Destroyed")
    call.cloud.unplace(machine, "Destroyed")
    if not call.get("expunge"):
        return {"virtualmachine": machine}
    call.cloud.expunge(machine)
    lists = {name: [] for name in ("affinitygroup", "nic", "securitygroup", "tags")}
    return {"virtualmachine": dict(lists, deleteprotection=False)}  # nothing else is left to tell of


@command("restoreVirtualMachine", "virtualmachineid! templateid", "Puts a machine back to its template.",
         "virtualmachine", job=True, key="restorevmresponse")  # fmt: skip
def _restore(call):
    machine = yield from held(call, "virtualmachine", "virtualmachineid", "Running Stopped")
    template = call.entity("template", "templateid")
    if template:
        machine.update(templateid=template["id"], templatename=template["name"])
    return {"virtualmachine": machine}


@command("updateVirtualMachine", "id! name@4.4 displayname group haenable userdata@4.16.0 details securitygroupids",
         "Changes the properties of a machine.", "virtualmachine")  # fmt: skip
def _update(call):
    machine, name = call.entity("virtualmachine"), call.get("name")
    check_userdata(call)
    if name not in (None, machine["name"]):
        check_host_name(call, name, [nic["networkid"] for nic in machine["nic"]])
    for field in ("name", "displayname", "group", "haenable"):
        if field in call.args:
            machine[field] = call.args[field]
    machine["details"].update(call.details())
    if "userdata" in call.args:
        call.cloud.userdata[machine["id"]] = call.args["userdata"]
    if "securitygroupids" in call.args:
        machine["securitygroup"] = brief(call.entities("securitygroup", "securitygroupids"))
    return {"virtualmachine": machine}


# volumes and snapshots


@command("createVolume", "name zoneid diskofferingid snapshotid size maxiops +owner", "Creates a volume.", "volume",
         job=True)  # fmt: skip
def _create_volume(call):
    zone = call.entity("zone", "zoneid") or call.cloud.tables["zone"][0]
    offering, snapshot = call.entity("diskoffering", "diskofferingid"), call.entity("snapshot", "snapshotid")
    text = "Missing parameter(s), either a positive volume size or snapshotid must be specified."
    require(offering or snapshot, text)
    size = call.get("size") or (offering or {}).get("disksize") or (snapshot or {}).get("virtualsize", 1 << 30) >> 30
    volume = call.cloud.new_volume(call.owner(), zone, call.get("name") or "VOL-" + call.cloud.uuid(), size)
    if offering:
        volume.update(diskofferingid=offering["id"], diskofferingname=offering["name"])
    yield volume["id"], volume["id"]
    yield
    return {"volume": volume}


def check_detached(volume):
    text = "Please specify a volume that is not attached to any VM."
    require("virtualmachineid" not in volume, text, 431, [(volume["id"], "volumeId")])


@command("attachVolume", "id! virtualmachineid! deviceid", "Attaches a volume to a machine.", "volume", job=True)
def _attach(call):
    volume, machine = call.entity("volume"), call.entity("virtualmachine", "virtualmachineid")
    yield volume["id"], None
    need(machine, "Running Stopped")
    check_detached(volume)
    yield
    call.cloud.attach(volume, machine, call.get("deviceid"))
    return {"volume": volume}


@command("detachVolume", "id virtualmachineid deviceid", "Detaches a volume from its machine.", "volume", job=True)
def _detach(call):
    volume, machine = call.entity("volume"), call.entity("virtualmachine", "virtualmachineid")
    if machine and not volume:
        volume = next((row for row in call.cloud.volumes_of(machine) if row["deviceid"] == call.get("deviceid")), None)
    require(volume, "Please provide either a volume id, or a tuple(device id, instance id)")
    yield volume["id"], None
    may_go = "virtualmachineid" in volume and volume["type"] != "ROOT"
    require(may_go, "The specified volume is not attached, or is a root volume.")
    yield
    call.cloud.detach(volume)
    return {"volume": volume}


@command("deleteVolume", "id!", "Deletes a detached volume.", "volume")
def _delete_volume(call):
    volume = call.entity("volume")
    check_detached(volume)
    call.cloud.remove("volume", volume)
    return {"success": True}


@command("deleteSnapshot", "id!", "Deletes a snapshot.", "snapshot", job=True)
def _delete_snapshot(call):
    call.cloud.remove("snapshot", (yield from held(call, "snapshot")))
    return {"success": True}


# tags, groups, keys, projects


@command("createTags", "tags! resourcetype! resourceids!", "Puts tags on resources.", "tag", job=True)
def _create_tags(call):
    kind = call.args["resourcetype"]
    table = {"uservm": "virtualmachine"}.get(kind.lower(), kind.lower())
    require(table in OWNED or table == "template", f"Unknown resource type {kind}")
    rows, tags = call.entities(table, "resourceids"), call.tags()
    yield None, None
    yield
    given = [(row, key, value) for row in rows for key, value in tags]
    for row, key, _ in given:
        require(not has_tags(row, [(key, None)]), f"tag {key} already on {kind} with id {row['id']}", 530)
    for row, key, value in given:
        call.cloud.tag(row, kind, key, value)
    return {"success": True}


def _new(call, table, **values):
    """A row of the caller's with a name that it has not given before."""
    name, owner = call.args["name"], call.owner()
    require(not call.mine(table, name), f"A {table} with name '{name}' already exists.")
    return call.cloud.add(table, name, owner, **values)


@command("createSecurityGroup", "name! description +owner", "Creates a security group.", "securitygroup")
def _create_security_group(call):
    text = call.get("description", "")
    return {"securitygroup": _new(call, "securitygroup", description=text, ingressrule=[], egressrule=[], tags=[])}


def _traffic(rule):
    """What a rule lets in; no two rules of a group let in the same."""
    return tuple(rule.get(name) for name in ("protocol", "startport", "endport", "icmptype", "icmpcode", "cidr"))


@command("authorizeSecurityGroupIngress",
         "securitygroupid securitygroupname protocol startport endport icmptype icmpcode cidrlist +owner",
         "Lets traffic into a security group.", "securitygroup", job=True)  # fmt: skip
def _authorize(call):
    group = call.entity("securitygroup", "securitygroupid")
    group = group or call.mine("securitygroup", call.get("securitygroupname"))
    require(group is not None, "Unable to find security group")
    protocol, first = call.get("protocol", "all").lower(), call.get("startport")
    needs_ports = protocol in ("tcp", "udp")
    require(not needs_ports or first is not None, "Invalid port: startport and endport are needed for " + protocol)
    yield group["id"], None
    yield
    last, known = call.get("endport", first), {_traffic(rule) for rule in group["ingressrule"]}
    codes = {name: call.get(name) for name in ("icmptype", "icmpcode")}
    rules = [call.cloud.rule(protocol, first, last, cidr, **codes) for cidr in call.get("cidrlist", ["0.0.0.0/0"])]
    rules = [rule for rule in rules if _traffic(rule) not in known]
    require(rules, "Failed to authorize security group ingress rule(s)", 530)
    group["ingressrule"] += rules
    return {"securitygroup": dict(group, ingressrule=rules)}


@command("createAffinityGroup", "name! type! description +owner", "Creates an affinity group.", "affinitygroup",
         job=True)  # fmt: skip
def _create_affinity_group(call):
    group = _new(call, "affinitygroup", type=call.args["type"], description=call.get("description"))
    yield group["id"], group["id"]
    yield
    return {"affinitygroup": group}


@command("deleteAffinityGroup", "id name +owner", "Deletes an affinity group.", "affinitygroup", job=True)
def _delete_affinity_group(call):
    group = call.entity("affinitygroup") or call.mine("affinitygroup", call.get("name"))
    require(group is not None, "Unable to find affinity group")
    yield group["id"], None
    yield
    call.cloud.remove("affinitygroup", group)
    return {"success": True}


@command("createSSHKeyPair", "name! +owner", "Creates an ssh key pair.", "sshkeypair")
def _create_key_pair(call):
    digest = hashlib.md5(call.args["name"].encode("utf-8")).hexdigest()
    pair = _new(call, "sshkeypair", fingerprint=":".join(re.findall("..", digest)))
    lines = "\n".join(make_key(pair["id"] + str(line))[:64] for line in range(4))
    pem = f"-----BEGIN RSA PRIVATE KEY-----\n{lines}\n-----END RSA PRIVATE KEY-----\n"
    return {"keypair": dict(pair, privatekey=pem)}


@command("deleteSSHKeyPair", "name! +owner", "Deletes an ssh key pair.", "sshkeypair")
def _delete_key_pair(call):
    name = call.args["name"]
    pair = call.mine("sshkeypair", name)
    require(pair is not None, f"A key pair with name '{name}' does not exist.")
    call.cloud.remove("sshkeypair", pair)
    return {"success": True}


@command("registerUserKeys", "id!", "Gives a user a new API key and secret.", "user", job=True)
def _register_user_keys(call):
    user = next(user for user in call.cloud.users.values() if user.id == call.args["id"])
    call.check_access(user.owner)
    yield user.id, None
    yield
    user.key, user.secret = make_key(call.cloud.uuid()), make_key(call.cloud.uuid())
    user.row["apikey"] = user.key
    return {"userkeys": {"apikey": user.key, "secretkey": user.secret}}


@command("activateProject", "id!", "Activates a project.", "project", job=True, key="activaterojectresponse")
def _activate(call):
    project = yield from held(call, "project")
    project["state"] = "Active"
    return {"project": project}


# listApis

_KINDS = {bool: "boolean", int: "integer", dict: "map", list: "list"}
_JOB_FIELDS = [
    {"name": name, "description": f"the {text} of the latest async job acting on this object", "type": kind}
    for name, text, kind in (("jobid", "UUID", "string"), ("jobstatus", "current status", "integer"))]  # fmt: skip


def _response_fields(entity, rows):
    """Name and type of each field in the rows of an entity, nested lists of objects described in turn."""
    fields = {}
    for row in rows:
        for name, value in row.items():
            if name not in fields or (value and not fields[name]):
                fields[name] = value
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
    tables = Cloud().tables
    return [(spec, _api(spec, tables)) for spec in COMMANDS.values()]


def _api(spec, tables):
    params = [without_none(name=p.name, description=p.description, type=p.type, length=p.length, required=p.required,
                           since=p.since) for p in spec.parameters]  # fmt: skip
    related = [other.name for other in COMMANDS.values() if other.entity == spec.entity and other is not spec]
    response = _response_fields(spec.entity, tables.get(spec.entity) or [{"success": True, "displaytext": ""}])
    return without_none(
        name=spec.name, description=spec.description, isasync=spec.job, params=params,
        related=",".join(related) or None, response=response + (_JOB_FIELDS if spec.job else []) + [{}],
        httprequesttype="GET" if spec.reading else "POST")  # fmt: skip


@command("listApis", "name", "Lists the commands the caller may use.", "api")
def _list_apis(call):
    entries = [entry for spec, entry in schema() if call.simulator.allowed(call.user, spec)]
    entries += [dict(schema()[0][1], name=f"listSynthetic{number:04d}", description="Made for tests.")
                for number in range(call.simulator.extra_apis)]  # fmt: skip
    if "name" in call.args:
        name = call.args["name"]
        entries = [entry for entry in entries if entry["name"].lower() == name.lower()]
        require(entries, f"Unable to find the API {name}")
    random.shuffle(entries)
    return {"count": len(entries), "api": entries}


@command("login", "username! password! domain", "Starts a session; by POST only.", "session")
def _login(call):
    return call.simulator.sessions.open(call)


@command("logout", "", "Ends the session.", "session")
def _logout(call):
    return {"description": "success"}


# === [S3] simulator: server =========================================================================================
# Sessions, the checks before a command runs, connections, and the Simulator that holds them together.


class Sessions:
    """Who has logged in. A session is a cookie and a session key that has to come with it."""

    def __init__(self, simulator):
        self.simulator, self.open_sessions = simulator, {}

    def open(self, call):
        name, secret = call.args["username"], call.args["password"]
        path = ("/" + call.get("domain", "/").strip("/") + "/").replace("//", "/")
        paths = [row["path"][len("ROOT"):] + "/" for row in call.cloud.tables["domain"]]
        require(path in paths, "Unable to find the domain from the path " + path, 531, cserrorcode=None)
        text = f"Failed to authenticate user {name} in domain {paths.index(path) + 1}; please provide valid credentials"
        user = call.cloud.users.get(name)
        is_known = user and user.password == secret and user.domain.rstrip("/") + "/" == path
        require(is_known, text, 531, cserrorcode=None)
        uuid, key = "node0" + call.cloud.uuid().replace("-", ""), make_key(call.cloud.uuid())[:27]
        self.open_sessions[uuid] = [user, key, self.simulator.clock()]
        call.cookies = [f"JSESSIONID={uuid}; Path=/client; HttpOnly", f"sessionkey={key}; HttpOnly"]
        return {"username": user.username, "userid": user.id, "domainid": user.domainid, "account": user.account,
                "timeout": self.simulator.session_timeout, "firstname": user.row["firstname"], "registered": "false",
                "lastname": user.row["lastname"], "type": str(user.row["accounttype"]), "sessionkey": key}

    def user(self, record, cookies):
        """The user of a live session, or None without one. What does not know the session key ends the session."""
        uuid, now = cookies.get("JSESSIONID"), self.simulator.clock()
        session = self.open_sessions.get(uuid)
        if session is None or now > session[2] + self.simulator.session_timeout:
            self.close(cookies)
            return None
        if not session[1] == cookies.get("sessionkey") == record.params.get("sessionkey"):
            self.close(cookies)
            raise ApiError(401, CREDENTIALS_TEXT, cserrorcode=None)
        session[2] = now
        return session[0]

    def close(self, cookies):
        self.open_sessions.pop(cookies.get("JSESSIONID"), None)


class Simulator:
    """A management server on loopback.

    `with Simulator() as cloud:` or start() and stop(). Every option is an attribute that may be changed while it runs.
    """

    job_seconds = 0.3  # how long a job takes
    job_retention = 86400  # seconds until a job is forgotten
    clock = staticmethod(time.time)
    enforce_post = False  # enforce.post.requests.and.timestamps
    default_page_size = 500
    count_is_page_length = frozenset("listCounters listResourceLimits".split())
    count_missing = frozenset()
    ignores_paging = frozenset("listHostTags listStorageProviders".split())
    role_lacks = frozenset("listAsyncJobs listApis".split())  # what the role of "user" may not call
    rate_limit = None  # requests a second an account
    gzip = True
    chunk_over = 16384  # bytes from which an answer is chunked
    idle_close = 30.0
    json_content_type = "application/json;charset=utf-8"
    latency = 0.0
    maintenance = False
    html_error = None  # a status: every answer is this one in HTML, as a proxy's
    empty_200 = frozenset()  # commands that end in 200 with nothing
    two_factor = False  # sessions have not passed the second factor
    session_timeout = 1800
    job_fails_without_result = frozenset()  # commands whose jobs end as if the server had been restarted
    extra_apis = 0  # synthetic entries more in listApis
    OPTIONS = frozenset(name for name in vars() if not name.startswith("_"))

    def __init__(self, port=0, host="127.0.0.1", tls=None, **options):
        self.port, self.host, self.tls = port, host, tls
        for name, value in options.items():
            if name not in self.OPTIONS:
                raise TypeError(f"Simulator has no option {name!r}")
            setattr(self, name, value)
        self.requests, self.sessions = [], Sessions(self)
        self.received, self.accepted = collections.Counter(), collections.Counter()  # of each command; those that ran
        self._scripts, self._windows = collections.defaultdict(collections.deque), {}
        self._cloud, self._lock, self.stopping = None, threading.RLock(), threading.Event()
        self._listeners, self._connections, self._connected, self._integration = [], set(), 0, None

    # the public face

    def start(self):
        self.stopping.clear()
        self.port = self._listen(self.port, self.tls, False)
        return self

    def stop(self):
        """Close every socket, and wait a moment for the threads."""
        self.stopping.set()
        listeners, self._listeners, self._integration = self._listeners, [], None
        for listener in listeners:
            listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.abort()
        deadline = time.monotonic() + 0.02
        for connection in connections:
            connection.thread.join(max(0, deadline - time.monotonic()))

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc_info):
        self.stop()

    @property
    def endpoint(self):
        return self._url("https" if self.tls else "http", self.port)

    @property
    def integration_endpoint(self):
        with self._lock:
            self._integration = self._integration or self._listen(0, None, True)
        return self._url("http", self._integration)

    @property
    def cloud(self):
        with self._lock:
            self._cloud = self._cloud or Cloud(lambda: self.clock())
        return self._cloud

    @property
    def users(self):
        """The accounts by user name: "admin", and "user" whose role lacks some commands."""
        return self.cloud.users

    @property
    def key(self):
        return self.users["admin"].key

    @property
    def secret(self):
        return self.users["admin"].secret

    def script(self, command_name, *answers):
        """Have the next exchanges of a command (None: of any) answered by these: an Answer, a callable that is given
        the Record and returns an Answer or None, DROP, RUN_THEN_DROP or GO_ON.
        """
        with self._lock:
            self._scripts[command_name].extend(answers)

    def allowed(self, user, spec):
        return user.admin or not (spec.admin or spec.name in self.role_lacks)

    def window(self, user):
        """When the second began in which the account's requests are counted, and their number."""
        start, count = self._windows.get(user.account, (0, 0))
        return (start, count) if self.clock() < start + 1 else (self.clock(), 0)

    # sockets

    def _url(self, scheme, port):
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{port}/client/api"

    def _listen(self, port, tls, integration):
        self._listeners.append(Listener(self, self.host, port, tls, integration))
        return self._listeners[-1].port

    def connected(self, sock, tls, integration):
        """Serve a connection in a thread of its own."""
        with self._lock:
            self._connected += 1
            connection = Connection(self, sock, tls, integration, self._connected)
            self._connections.add(connection)
        connection.thread.start()

    def disconnected(self, connection):
        with self._lock:
            self._connections.discard(connection)

    # one exchange

    def receive(self, record):
        with self._lock:
            self.requests.append(record)
            self.received[record.command] += 1

    def scripted(self, record):
        """What the script has for this exchange: an Answer, DROP, RUN_THEN_DROP, or GO_ON."""
        with self._lock:
            queue = self._scripts.get(record.command) or self._scripts.get(None)
            step = queue.popleft() if queue else GO_ON
        if callable(step):
            step = step(record)
        return GO_ON if step is None else step

    def answer(self, record, integration):
        """Check and run the command of a request; the Answer in JSON or XML."""
        if "Content-Encoding" in record.headers and not integration:
            raise HtmlError(415, close=False)
        if self.html_error:
            raise HtmlError(self.html_error, close=False)
        if not integration and record.path.rstrip("/") != "/client/api":
            raise HtmlError(404, close=False)
        if record.method not in ("GET", "POST"):
            raise HtmlError(405, f"HTTP method {record.method} is not supported by this URL", close=False)
        name = record.command
        if name == "login" and record.method != "POST" and not integration:
            return Answer(405, "login takes POST requests only", {"Content-Type": "text/plain", "Allow": "POST"})
        if name in self.empty_200:
            return Answer(200, b"", {"Content-Type": self.json_content_type})
        spec = COMMANDS.get(name)
        key = spec.key if spec else "errorresponse"
        with self.cloud.lock:
            try:
                body, cookies = self._checked(record, spec, integration)
                return self._written(record, 200, {key: body}, cookies)
            except HtmlError:
                raise
            except Exception as error:  # a mistake in the simulator itself must not look like a network failure
                failure = error if isinstance(error, ApiError) else ApiError(530, f"Internal error: {error!r}")
            if failure.code == 432:
                key = "errorresponse" if spec else "null"
            answer = self._written(record, failure.code, {key: failure.body()})
            answer.headers.update(failure.headers())
            return answer

    def _written(self, record, status, tree, cookies=()):
        if record.params.get("response", "").lower() == "json":
            answer = Answer(status, to_json(tree), {"Content-Type": self.json_content_type})
        else:
            answer = Answer(status, to_xml(tree), {"Content-Type": "text/xml;charset=utf-8"})
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.cookies = cookies
        answer.gzip = self.gzip and "gzip" in record.headers.get("Accept-Encoding", "").lower()
        return answer

    def _checked(self, record, spec, integration):
        """Every check before a command runs, then the command: (body, cookies)."""
        self.cloud.settle()
        user = self._authenticated(record, spec, integration)
        if user and spec and not self.allowed(user, spec):
            text = f"The API [{spec.name}] does not exist or is not available for the account {user.account}."
            raise ApiError(432, text)
        require(spec, f"The given command '{record.command}' either does not exist, is not available for user, or not "
                      "available from ip address '127.0.0.1'.", 432)  # fmt: skip
        require(not self.maintenance, "The server is in maintenance and does not take requests", 503)
        if user and not integration:
            self._throttle(user)
        for name, value in record.params.items():
            shown = _CONTROL.sub("?", name)
            text = "Received value containing illegal ASCII non-printable characters for parameter " + shown
            require(shown == name and not _CONTROL.search(value), text, cserrorcode=9999)
        call = Call(self, user, spec, record.params)
        call.convert()
        body = self._run(call)
        with self._lock:
            self.accepted[spec.name] += 1
        return body, call.cookies

    def _authenticated(self, record, spec, integration):
        """The user who asks; None where nobody needs to be known."""
        params, cookies = record.params, record.cookies()
        if integration:
            has_credentials = any(name.lower() in ("apikey", "signature") for name in params)
            require(not has_credentials, "The integration port takes no credentials", 401)
            return self.cloud.users["admin"]
        if spec and spec.name in ("login", "logout"):
            if spec.name == "logout":
                self.sessions.close(cookies)
            return None
        if self.enforce_post and record.method != "POST" and not is_reading(params.get("command", "")):
            raise ApiError(400, f"State changing command {record.command} needs to be sent using POST request")
        user = self.sessions.user(record, cookies)
        if user is None:
            return self._verified(params, spec)
        text = "Two factor authentication is mandatory, and this session has not passed it"
        require(not self.two_factor, text, 511)
        return user

    def _verified(self, params, spec):
        """The user whose key and signature these are. What is wrong is not told."""
        user = next((user for user in self.users.values() if user.key == params.get("apiKey")), None)
        if user and spec and "signature" in params and self._fresh(params):
            given = params["signature"].encode("utf-8", "replace")
            if hmac.compare_digest(signature_of(params, user.secret).encode(), given):
                return user
        raise ApiError(401, CREDENTIALS_TEXT, cserrorcode=None)

    def _fresh(self, params):
        lowered = {name.lower(): value for name, value in params.items()}
        if lowered.get("signatureversion") != "3":
            return not self.enforce_post
        expires, now = parse_date(lowered.get("expires", "")), self.clock()
        return expires is not None and expires >= now and not (self.enforce_post and expires > now + 900)

    def _throttle(self, user):
        if not self.rate_limit:
            return
        start, count = self.window(user)
        wait = max(1, int((start + 1 - self.clock()) * 1000))
        text = f"The given user has reached his/her account api limit, please retry after [{wait}] ms."
        require(count < self.rate_limit, text, 429)
        self._windows[user.account] = (start, count + 1)

    def _run(self, call):
        spec = call.spec
        result = spec.run(call)
        if spec.job:
            lost = spec.name in self.job_fails_without_result
            return self.cloud.submit(spec, call.user, result, self.job_seconds, call.plain.get("customjobid"), lost)
        return self._paged(call, result) if isinstance(result, Rows) else result

    def _paged(self, call, result):
        name, page = call.spec.name, call.page(result.rows)
        if name in self.ignores_paging:
            page = result.rows
        total = len(page if name in self.count_is_page_length else result.rows)
        if not total:
            return {}
        body = {} if name in self.count_missing else {"count": total}
        return dict(body, **{result.member: page}) if page else body


class Listener:
    """A listening socket and the thread that accepts from it."""

    def __init__(self, simulator, host, port, tls, integration):
        self.simulator, self.tls, self.integration, self.closing = simulator, tls, integration, False
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.sock.bind((host, port))
            self.sock.listen(512)
        except BaseException:
            self.sock.close()
            raise
        self.address = self.sock.getsockname()[:2]
        self.port = self.address[1]
        self.thread = threading.Thread(target=self._accept, name="simulator", daemon=True)
        self.thread.start()

    def _accept(self):
        while not self.closing:
            try:
                sock = self.sock.accept()[0]
            except OSError:
                continue
            if self.closing:
                sock.close()
            else:
                self.simulator.connected(sock, self.tls, self.integration)

    def close(self):
        self.closing = True
        try:  # wakes accept on every system, which closing the socket does not
            socket.create_connection(self.address, 1).close()
        except OSError:
            pass
        self.thread.join(1)
        self.sock.close()


class Connection:
    """One TCP connection and the thread that serves it, request after request."""

    def __init__(self, simulator, sock, tls, integration, number):
        self.simulator, self.sock, self.tls, self.integration, self.number = simulator, sock, tls, integration, number
        self.stream, self.thread = None, threading.Thread(target=self._serve, name="simulator", daemon=True)

    def abort(self):
        """Make whatever the thread does on the socket end, from outside."""
        try:
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # ssl's own would pull its state from under the thread
        except OSError:
            pass

    def _serve(self):
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock.settimeout(max(0.001, self.simulator.idle_close))
            if self.tls:
                self.sock = self.tls.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
                self.sock.do_handshake()
            self.stream = self.sock.makefile("rb")
            while self._exchange():
                self.sock.settimeout(max(0.001, self.simulator.idle_close))
        except (OSError, EOFError, ValueError):  # gone, idle for too long, or no HTTP
            pass
        finally:
            self.simulator.disconnected(self)
            if self.stream:
                self.stream.close()
            self.sock.close()

    def _exchange(self):
        """Read a request and answer it; whether the connection goes on."""
        try:
            record = self._request()
        except HtmlError as error:
            self._send(error.answer, None, False)
            self._linger()
            return False
        options = record.headers.get("Connection", "").lower()
        keep = not self.integration and "close" not in options
        keep = keep and (record.version == "HTTP/1.1" or "keep-alive" in options)
        answer = self.simulator.scripted(record)
        if self.simulator.stopping.wait(self.simulator.latency) or answer is DROP:
            return False
        if answer in (GO_ON, RUN_THEN_DROP):
            drops = answer is RUN_THEN_DROP
            try:
                answer = self.simulator.answer(record, self.integration)
            except HtmlError as error:
                answer = error.answer
            if drops:
                return False
        keep = keep and not answer.close
        self._send(answer, record, keep)
        if not keep and self.integration:
            self._linger()
        return keep

    # reading

    def _take(self, size):
        data = self.stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _line(self):
        line = self.stream.readline(MAX_HEAD + 4)
        if not line:
            raise EOFError
        return line

    def _head(self):
        """The lines of a head."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head = (head + self._line()).lstrip(b"\r\n")
            if len(head) > MAX_HEAD + 4:
                raise HtmlError(414 if len(head.partition(b"\r\n")[0]) > MAX_HEAD else 431)
        return head[:-4].decode("latin-1").split("\r\n")

    def _request(self):
        first, *lines = self._head()
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise HtmlError(400)
        method, target, version = words
        if "://" in target[:8]:  # what a proxy is sent
            target = "/" + target.partition("://")[2].partition("/")[2]
        record = Record(method, target, version, lines, self.number)
        try:
            if not self.integration:
                self._read_body(record)
            record.read_parameters(form=not self.integration)
        finally:
            self.simulator.receive(record)
        return record

    def _read_body(self, record):
        headers = record.headers
        if headers.get("Expect", "").lower() == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get("Transfer-Encoding", "").lower() == "chunked":
            record.body = self._chunks()
            return
        length = headers.get("Content-Length", "0")
        if not length.isdigit():
            raise HtmlError(400)
        if int(length) > 8 * MAX_FORM:
            raise HtmlError(413)
        record.body = self._take(int(length))

    def _chunks(self):
        body, size = b"", -1
        while size:
            size = int(self._line().partition(b";")[0], 16)
            body += self._take(size)
            while self._line().strip() and not size:  # behind the last one trailers, too
                pass
        return body

    # writing

    def _send(self, answer, record, keep):
        body, headers = answer.body, dict(answer.headers)
        if answer.gzip and len(body) > 32:
            packer = zlib.compressobj(4, zlib.DEFLATED, 31)
            body = packer.compress(body) + packer.flush()
            headers.update({"Content-Encoding": "gzip", "Vary": "Accept-Encoding"})
        may_chunk = answer.gzip is not None and record.version == "HTTP/1.1"
        if may_chunk and len(body) > self.simulator.chunk_over:
            headers["Transfer-Encoding"] = "chunked"
            pieces = [body[start:start + 8192] for start in range(0, len(body), 8192)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        elif not {"content-length", "transfer-encoding"}.intersection(map(str.lower, headers)):
            if answer.status not in (204, 304):
                headers["Content-Length"] = str(len(body))
        if not keep:
            headers["Connection"] = "close"
        elif record.version == "HTTP/1.0":
            headers["Connection"] = "keep-alive"
        reason = reason_of(answer.status) if answer.reason is None else answer.reason
        lines = [f"HTTP/1.1 {answer.status} {reason}"] + [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Set-Cookie: " + cookie for cookie in answer.cookies] + ["", ""]
        self.sock.sendall("\r\n".join(lines).encode("latin-1", "replace") + body)

    def _linger(self):
        """Read what the client still sends, so that closing does not tear the answer away from it."""
        socket.socket.shutdown(self.sock, socket.SHUT_WR)
        self.sock.settimeout(0.2)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and self.sock.recv(65536):
            pass


# === [X] sandbox ====================================================================================================
# The simulator for people: one command against it, or the server alone until Ctrl-C.

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def sandbox_environment(**more):
    """The environment without what would lead cs.py elsewhere: its own settings and proxies."""
    kept = {name: value for name, value in os.environ.items()
            if not name.upper().startswith("CLOUDSTACK_") and name.lower() not in PROXIES}  # fmt: skip
    return dict(kept, **more)


SANDBOX_HELP = """usage: test_cs.py sandbox [--port N] [COMMAND [name=value ...]]

With a command: start a small simulated cloud, run cs.py with these words against it once, and end with its exit code.
Without one: keep the cloud running until Ctrl-C, and print the lines to paste into another shell.

  --port N    listen on this port of 127.0.0.1 instead of any free one
  --help      show this help (after a command: cs.py's own about it)

No file of yours is read or written: the home directory and the cache are temporary ones."""


def sandbox(argv):
    """Carry out `sandbox ...`; returns the exit code."""
    try:
        port, argv = take_port(argv)
        if argv[:1] in (["--help"], ["-h"]):
            print(SANDBOX_HELP)
            return 0
        simulator = Simulator(port).start()
    except ValueError as error:
        return complain(f"sandbox: {error}")
    except OSError as error:
        return complain(f"sandbox: port {port}: {error.strerror}")
    try:
        end_on_signals()
        with tempfile.TemporaryDirectory(prefix="cs-sandbox-") as home:
            settings = {"CLOUDSTACK_ENDPOINT": simulator.endpoint, "CLOUDSTACK_KEY": simulator.key,
                        "CLOUDSTACK_SECRET": simulator.secret, "XDG_CACHE_HOME": home}
            return run_command(argv, dict(settings, HOME=home)) if argv else stay(settings)
    except KeyboardInterrupt:
        return 130
    finally:
        simulator.stop()


def take_port(argv):
    """Take `--port N`, wherever it stands, out of the words: (port, the other words). Raises ValueError."""
    port, words, rest = 0, [], iter(argv)
    for word in rest:
        if word != "--port" and not word.startswith("--port="):
            words.append(word)
            continue
        text = word[len("--port="):] or next(rest, "")
        if not re.match(r"[0-9]{1,5}\Z", text) or int(text) > 65535:
            raise ValueError(f"--port wants a number from 0 to 65535, not {text!r}")
        port = int(text)
    return port, words


def complain(text):
    """Say in one line what was wrong with the words; returns the exit code for that."""
    print(f"test_cs.py {text} (see --help)", file=sys.stderr)
    return 2


def end_on_signals():
    """Let SIGTERM and SIGHUP end this process in order, so that what it started ends as well."""
    for number in {getattr(signal, name, signal.SIGTERM) for name in ("SIGTERM", "SIGHUP")}:
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def run_command(argv, settings):
    """Run cs.py's command line as a process of its own; Ctrl-C is the child's to answer."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cs.py")
    child = subprocess.Popen([sys.executable, program] + argv, env=sandbox_environment(**settings))
    try:
        while child.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):
                child.wait()
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def stay(settings):
    """Print the settings as lines for a shell, and wait for Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        for name, value in sorted(settings.items()):
            print(f"export {name}={value}")
        sys.stdout.flush()
        print("A small cloud answers until Ctrl-C. Paste these lines into another shell, then: python3 cs.py listZones",
              file=sys.stderr, flush=True)
        while True:
            time.sleep(3600)
    return 0


# === [S4] tests of the simulator ====================================================================================
# It is held to how the server behaves, with raw requests; the client has no part in these.


class SimulatorCase(unittest.TestCase):
    """A simulator whose clock stands still unless a test moves it, and requests written by hand."""

    def setUp(self):
        self.now = 1788249600.25  # 2026-09-01T08:00:00.25Z
        self.simulator = Simulator(clock=lambda: self.now).start()
        self.addCleanup(self.simulator.stop)
        self.connect(f"127.0.0.1:{self.simulator.port}")

    def connect(self, address):
        self.connection = http.client.HTTPConnection(address, timeout=5)
        self.addCleanup(self.connection.close)

    def exchange(self, method="GET", target="/client/api", body=None, headers=None):
        """(status, headers, body) of one exchange on the kept connection."""
        self.connection.request(method, target, body, headers or {})
        response = self.connection.getresponse()
        return response.status, response.headers, response.read()

    def value(self, body):
        """What stands under the single key of an answer, which is kept as self.key."""
        (self.key, value), = json.loads(body.decode("utf-8"), strict=False).items()
        return value

    def signed(self, params, user="admin"):
        account = self.simulator.users[user]
        params = dict(params, apiKey=account.key)
        return urlencode(dict(params, signature=signature_of(params, account.secret)))

    def target(self, command_name, **params):
        """What a signed GET for JSON asks for."""
        return "/client/api?" + self.signed(dict(params, command=command_name, response="json"))

    def call(self, command_name, params=None, user="admin", method="GET", **more):
        """(status, the value of the single key) of a signed command."""
        query = self.signed(dict(params or {}, command=command_name, response="json", **more), user)
        where = {"target": "/client/api?" + query} if method == "GET" else {"body": query, "headers": FORM}
        status, _, body = self.exchange(method, **where)
        return status, self.value(body)

    def ok(self, command_name, params=None, **more):
        status, value = self.call(command_name, params, **more)
        self.assertEqual(200, status, value)
        return value

    def fails(self, code, command_name, params=None, **more):
        status, value = self.call(command_name, params, **more)
        self.assertEqual((code, code), (status, value["errorcode"]))
        return value["errortext"]

    def first(self, command_name, **params):
        return next(rows for rows in self.ok(command_name, **params).values() if isinstance(rows, list))[0]

    def finish(self, submitted):
        """The job's answer once its time has come."""
        self.now += self.simulator.job_seconds
        return self.ok("queryAsyncJobResult", jobid=submitted["jobid"])

    def done(self, command_name, params=None, **more):
        """The answer of the job that a command makes, once its time has come."""
        return self.finish(self.ok(command_name, params, **more))


class SimulatorSignatureTest(SimulatorCase):
    # The vectors were made with the openssl program from texts written by hand.

    def test_vector_of_every_kind_of_value(self):
        params = {"name": "a~b *+\u00e9-_.\n", "apiallowed": "1", "command": "listZones", "response": "json",
                  "empty": "", "apiKey": "KEY", "details[0].key": "x/Y", "signature": "left out"}  # fmt: skip
        self.assertEqual("QW63KNEFjGW2GXgJMtwL9vZ9jbM=", signature_of(params, "Secret"))

    def test_names_in_the_order_of_java_strings(self):
        params = {"\uff61": "4", "\U0001f600": "3", "a": "2", "Z": "1"}  # UTF-16 puts U+1F600 before U+FF61
        self.assertEqual("v179xoXYWeGVoHIu3e+soppR7A0=", signature_of(params, "s"))

    def test_vector_over_the_wire(self):
        key = "0VUlN_mkn8wZCj9DfJtuvxU3L132iHiXGj9VoMqCXASv620-Tgbk5hmgt-24q0CAR_ZIihPRwHAMVm_D0p0S0w"
        signature = "xPiwwaJ%2Bbbu03C%2Fb%2B%2BeoVI3i7QY%3D"
        target = f"/client/api?command=listZones&response=json&apiKey={key}&signature={signature}"
        self.assertEqual(200, self.exchange(target=target)[0])

    def test_refusals_are_all_alike(self):
        plain = {"command": "listZones", "response": "json"}
        good = dict(plain, apiKey=self.simulator.key)
        signature = signature_of(good, self.simulator.secret)
        bad = [dict(good, signature="x"), good, dict(good, signature=signature, name="added"),
               dict(good, apiKey="nobody", signature=signature), plain]  # fmt: skip
        for params in (dict(good, command="noSuchCommand"), dict(plain, apikey=self.simulator.key)):
            bad.append(dict(params, signature=signature_of(params, self.simulator.secret)))
        for params in bad:
            status, _, body = self.exchange(target="/client/api?" + urlencode(params))
            value = self.value(body)
            self.assertEqual((401, 401, CREDENTIALS_TEXT), (status, value["errorcode"], value["errortext"]))
        self.assertEqual((0, 6), (self.simulator.accepted["listZones"], self.simulator.received["listZones"]))

    def test_a_bare_plus_in_the_signature_is_a_space(self):
        for number in range(100):
            params = {"command": "listZones", "response": "json", "apiKey": self.simulator.key, "n": str(number)}
            signature = signature_of(params, self.simulator.secret)
            if "+" in signature:
                break
        bare = urlencode(params) + "&signature=" + signature.replace("=", "%3D").replace("/", "%2F")
        self.assertEqual(401, self.exchange(target="/client/api?" + bare)[0])
        self.assertEqual(200, self.exchange(target="/client/api?" + bare.replace("+", "%2B"))[0])

    def test_expiry(self):
        for expires, status in (
                ("2026-09-01T08:00:01+0000", 200), ("2026-09-01T08:00:01Z", 200), ("2026-09-01T08:00:01+00:00", 200),
                ("2026-09-01T10:00:01+0200", 200), ("2026-09-01T08:00:00+0000", 401), ("2026-09-01T09:00:00+0200", 401),
                ("2026-09-01T08:00:01", 401), ("soon", 401), ("", 401)):  # fmt: skip
            self.assertEqual(status, self.call("listZones", signatureVersion="3", expires=expires)[0], expires)
        self.assertEqual(401, self.call("listZones", signatureVersion="3")[0])
        self.assertEqual(200, self.call("listZones", expires="2001-01-01T00:00:00+0000")[0])  # read by version 3 only


class SimulatorParameterTest(SimulatorCase):
    def test_the_last_of_a_name_in_a_query_the_first_in_a_form_and_the_query_over_the_form(self):
        self.exchange("POST", "/client/api?a=1&a=2&b=3", "b=4&c=5&c=6", FORM)
        self.assertEqual({"a": "2", "b": "3", "c": "5"}, self.simulator.requests[-1].params)
        self.exchange("POST", "/client/api?a=1", "b=4", {"Content-Type": "multipart/form-data; boundary=x"})
        self.assertEqual({"a": "1"}, self.simulator.requests[-1].params)

    def test_names_in_any_case_once_verified(self):
        zone = self.first("listZones")
        self.assertEqual(1, self.ok("listZones", {"ID": zone["id"], "Nonsense": "x"})["count"])
        self.assertEqual(401, self.call("LISTZONES")[0])

    def test_only_true_is_true(self):
        own = self.ok("listVirtualMachines")["count"]
        self.assertGreater(self.ok("listVirtualMachines", listall="TRUE")["count"], own)
        for word in ("1", "yes", "on", "false"):
            self.assertEqual(own, self.ok("listVirtualMachines", listall=word)["count"])
        projects = self.ok("listVirtualMachines", projectid="-1")["virtualmachine"]
        self.assertEqual({"apollo"}, {row["project"] for row in projects})

    def test_maps(self):
        self.assertEqual(8, self.ok("listVirtualMachines", {"tags[0].key": "role", "tags[0].value": "db"})["count"])
        for name in ("tags[a].key", "tags[0]", "tags[0].a[1]", "tags[", "tags[0]key", "[0].key"):
            self.fails(430, "listVirtualMachines", {name: "x"})
        lowered = lower_names({"Details[0].cpuNumber": "2", "details[0].a.b": "c", "DETAILS[1].x": "y"})
        self.assertEqual(({}, {"details": {0: {"cpuNumber": "2", "a.b": "c"}, 1: {"x": "y"}}}), lowered)

    def test_what_is_refused(self):
        self.assertIn("missing parameter id", self.fails(431, "startVirtualMachine"))
        self.fails(431, "listZones", id="no-such-id")
        self.fails(431, "listZones", name="a\x07b")
        text = "Received value containing illegal ASCII non-printable characters for parameter name"
        self.assertEqual(text, self.fails(431, "listZones", name="a\tb"))
        self.ok("listZones", name="b\r\nc")
        self.fails(431, "createSecurityGroup", name="x" * 256)
        self.assertEqual(32, self.ok("listVirtualMachines", userdataid="no-such-id")["count"])  # dropped in silence
        nobody = "00000000-0000-0000-0000-000000000000"
        text = ("Unable to execute API command queryasyncjobresult due to invalid value. Invalid parameter jobid "
                f"value={nobody} due to incorrect long value format, or entity does not exist or due to incorrect "
                "parameter annotation for the field in api cmd class.")  # fmt: skip
        self.assertEqual(text, self.fails(431, "queryAsyncJobResult", jobid=nobody))
        self.assertIn("command restorevm due", self.fails(431, "restoreVirtualMachine"))

    def test_dates(self):
        self.assertEqual(parse_date("2025-12-31T22:30:00Z"), parse_date("2026-01-01T00:00:00+0130"))
        self.assertIsNone(parse_date("2026-13-01T00:00:00Z"))
        self.assertEqual(read_date("2026-01-01 00:00:00"), read_date("2026-01-01"))


class SimulatorHttpTest(SimulatorCase):
    def test_kept_alive_and_without_a_date(self):
        headers = [self.exchange(target=self.target("listZones"))[1] for _ in range(3)]
        self.assertEqual({1}, {record.connection for record in self.simulator.requests})
        self.assertNotIn("Date", headers[0])

    def test_idle_connections_are_closed(self):
        self.simulator.idle_close = 0.05
        with socket.create_connection(("127.0.0.1", self.simulator.port), 5) as sock:
            self.assertEqual(b"", sock.recv(1))

    def test_a_long_request_line(self):
        status, headers, body = self.exchange(target="/client/api?" + "x" * 8200)
        self.assertEqual((414, "text/html", "close"), (status, headers.get_content_type(), headers["Connection"]))
        self.assertTrue(body.startswith(b"<html>"))
        self.assertEqual(431, self.exchange(headers={"X-Long": "x" * 8200})[0])

    def test_request_bodies(self):
        self.assertEqual(200, self.call("listZones", method="POST", name="x" * 200)[0])
        self.assertEqual(400, self.exchange("POST", body="a=" + "x" * (1 << 20), headers=FORM)[0])
        self.assertEqual(400, self.exchange("POST", body="a=1&" * 5001, headers=FORM)[0])
        self.assertEqual(415, self.exchange("POST", body="x", headers=dict(FORM, **{"Content-Encoding": "gzip"}))[0])
        query = self.signed({"command": "listZones", "response": "json"}).encode()
        self.connection.putrequest("POST", "/client/api")
        for name, value in dict(FORM, **{"Transfer-Encoding": "chunked"}).items():
            self.connection.putheader(name, value)
        self.connection.endheaders(b"%x\r\n%b\r\n0\r\n\r\n" % (len(query), query))
        response = self.connection.getresponse()
        self.assertEqual((200, b'{"listzonesresponse"'), (response.status, response.read()[:20]))

    def test_paths_and_methods(self):
        for method, path, status in ("GET", "/client", 404), ("PUT", "/client/api", 405), ("GET", "/client/api/", 401):
            self.assertEqual(status, self.exchange(method, path)[0])

    def test_gzip_and_chunks(self):
        target, accepting = self.target("listVirtualMachines"), {"Accept-Encoding": "gzip"}
        _, headers, plain = self.exchange(target=target)
        self.assertEqual(("chunked", None), (headers["Transfer-Encoding"], headers["Content-Length"]))
        for method in ("GET", "POST"):
            _, headers, packed = self.exchange(method, target, headers=accepting)
            self.assertEqual(("gzip", plain), (headers["Content-Encoding"], zlib.decompress(packed, 31)))
        self.simulator.gzip, self.simulator.chunk_over = False, 1 << 20
        _, headers, body = self.exchange(target=target, headers=accepting)
        self.assertEqual((None, str(len(body))), (headers["Content-Encoding"], headers["Content-Length"]))

    def test_http_1_0(self):
        with socket.create_connection(("127.0.0.1", self.simulator.port), 5) as sock:
            sock.sendall(f"GET {self.target('listVirtualMachines')} HTTP/1.0\r\n\r\n".encode())
            with sock.makefile("rb") as stream:
                head, _, body = stream.read().partition(b"\r\n\r\n")
        self.assertNotIn(b"chunked", head)
        self.assertEqual(32, json.loads(body.decode())["listvirtualmachinesresponse"]["count"])

    def test_stopping_is_quick_and_closes_what_is_open(self):
        self.simulator.latency = 60
        self.connection.request("GET", "/client/api")
        while not self.simulator.requests:
            time.sleep(0.001)
        start = time.monotonic()
        self.simulator.stop()
        self.assertLess(time.monotonic() - start, 5)  # the latency is not sat out
        with self.assertRaises((http.client.HTTPException, OSError)):
            self.connection.getresponse()
        with self.assertRaises(OSError):
            socket.create_connection(("127.0.0.1", self.simulator.port), 5)
        self.simulator.latency = 0
        self.simulator.start()  # on the same port
        self.assertEqual(200, self.call("listZones")[0])


class SimulatorAnswerTest(SimulatorCase):
    def test_xml_unless_json_is_asked_for(self):
        _, headers, body = self.exchange(target="/client/api?" + self.signed({"command": "listZones"}))
        self.assertEqual("text/xml", headers.get_content_type())
        self.assertIn(b"<listzonesresponse cloud-stack-version=", body)
        self.assertIn(b"<count>2</count><zone><id>", body)

    def test_keys(self):
        for name, key in (
                ("listZones", "listzonesresponse"), ("listCounters", "counterresponse"),
                ("restoreVirtualMachine", "restorevmresponse"), ("activateProject", "activaterojectresponse"),
                ("noSuchCommand", "errorresponse")):  # fmt: skip
            self.call(name, id="no-such-id")
            self.assertEqual(key, self.key)

    def test_errors(self):
        status, value = self.call("deleteVolume", id=self.first("listVolumes")["id"])
        self.assertEqual((431, 431, 4350), (status, value["errorcode"], value["cserrorcode"]))
        self.assertEqual({"uuid", "description"}, set(value["uuidList"][0]))
        self.fails(432, "listApis", user="user")
        text = "The API [listHosts] does not exist or is not available for the account user."
        self.assertEqual((text, "errorresponse"), (self.fails(432, "listHosts", user="user"), self.key))
        text = self.fails(531, "stopVirtualMachine", user="user", id=self.first("listVirtualMachines")["id"])
        self.assertEqual("Caller does not have permission to operate with provided resource.", text)

    def test_errors_are_told_twice_unless_they_come_early(self):
        status, headers, body = self.exchange(target=self.target("startVirtualMachine", id="5\u20ac"))
        error = json.loads(body.decode())["startvirtualmachineresponse"]
        self.assertEqual(error["errortext"].replace("\u20ac", "?"), headers["X-Description"])
        self.assertEqual((431, 9999, "application/json;charset=utf-8"),
                         (status, error["cserrorcode"], headers["Content-Type"]))  # fmt: skip
        _, headers, body = self.exchange(target="/client/api?command=listZones&response=json")
        error = json.loads(body.decode())["listzonesresponse"]
        self.assertEqual((None, {"uuidList", "errorcode", "errortext"}), (headers["X-Description"], set(error)))

    def test_nothing_at_all_instead_of_a_missing_parameter(self):
        status, headers, body = self.exchange(target=self.target("activateProject"))
        self.assertEqual((200, "text/xml;charset=utf-8", b""), (status, headers["Content-Type"], body))

    def test_objects_control_characters_and_content_type(self):
        self.assertIsInstance(self.ok("listCapabilities")["capability"], dict)
        self.assertEqual('{"a":"\x1b\\n\\\\u001b"}', to_json({"a": "\x1b\n\\u001b"}))
        self.simulator.json_content_type = "text/javascript; charset=UTF-8"
        headers = self.exchange(target=self.target("listZones"))[1]
        self.assertEqual("text/javascript; charset=UTF-8", headers["Content-Type"])

    def test_list_apis(self):
        self.simulator.extra_apis = 2
        answer = self.ok("listApis")
        apis = {api["name"]: api for api in answer["api"]}
        self.assertEqual([len(COMMANDS) + 2] * 3, [answer["count"], len(answer["api"]), len(apis)])
        deploy = apis["deployVirtualMachine"]
        self.assertEqual((True, "POST"), (deploy["isasync"], deploy["httprequesttype"]))
        self.assertEqual("GET", apis["getUploadParamsForVolume"]["httprequesttype"])
        params = {param["name"]: param for param in deploy["params"]}
        self.assertEqual(("uuid", True), (params["zoneid"]["type"], params["zoneid"]["required"]))
        self.assertEqual(("map", "boolean"), (params["details"]["type"], params["startvm"]["type"]))
        self.assertIn({}, deploy["response"])
        self.assertIn("nic", {field.get("name") for field in deploy["response"] if "response" in field})
        self.assertFalse({"response", "customjobid"} & set(params))

    def test_switches(self):
        self.simulator.empty_200 = {"listZones"}
        self.assertEqual((200, b""), self.exchange(target=self.target("listZones"))[::2])
        self.simulator.maintenance = True
        self.fails(503, "listPods")
        self.simulator.html_error = 502
        status, headers, _ = self.exchange(target=self.target("listZones"))
        self.assertEqual((502, "text/html"), (status, headers.get_content_type()))
        with self.assertRaises(TypeError):
            Simulator(start=1)

    def test_rate_limit(self):
        self.simulator.rate_limit = 2
        self.ok("listZones")
        self.assertEqual(2, self.ok("getApiLimit")["apilimit"]["apiIssued"])
        self.assertRegex(self.fails(429, "listZones"), r"please retry after \[1000\] ms\.$")
        self.ok("listZones", user="user")
        self.now += 1
        self.ok("listZones")
        self.simulator.rate_limit = None
        self.fails(432, "getApiLimit")

    def test_enforced_post(self):
        self.simulator.enforce_post = True
        fresh = {"signatureVersion": "3", "expires": "2026-09-01T08:15:00+0000"}
        self.ok("listZones", fresh)
        self.fails(401, "listZones")
        self.fails(401, "listZones", dict(fresh, expires="2026-09-01T08:15:02+0000"))
        text = self.fails(400, "createSecurityGroup", dict(fresh, name="x"))
        self.assertEqual("State changing command createSecurityGroup needs to be sent using POST request", text)
        self.assertEqual(0, self.simulator.accepted["createSecurityGroup"])
        self.ok("createSecurityGroup", dict(fresh, name="x"), method="POST")
        zone = self.first("listZones", **fresh)["id"]
        self.ok("getUploadParamsForVolume", dict(fresh, name="v", format="RAW", zoneid=zone))
        self.assertTrue(is_reading("quotaSummary") and is_reading("FINDHostsForMigration"))
        self.assertFalse(is_reading("list") or is_reading("relist") or is_reading("login"))


class SimulatorPagesTest(SimulatorCase):
    def test_pages(self):
        names = []
        for page in (1, 2, 3, 4):
            answer = self.ok("listVirtualMachines", page=str(page), pagesize="15")
            names += [row["id"] for row in answer.get("virtualmachine", ())]
        self.assertEqual({"count": 32}, answer)  # past the last page: no list
        self.assertEqual(32, len(set(names)))
        self.assertEqual({}, self.ok("listVirtualMachines", name="no such machine"))

    def test_limits(self):
        self.simulator.default_page_size = 10
        answer = self.ok("listVirtualMachines")
        self.assertEqual((32, 10), (answer["count"], len(answer["virtualmachine"])))
        text = self.fails(431, "listVirtualMachines", page="1", pagesize="11")
        self.assertEqual("Page size can't exceed max allowed page size value: 10", text)
        for given, missing in ("page", "pagesize"), ("pagesize", "page"):
            text = self.fails(431, "listVirtualMachines", {given: "1"})
            self.assertEqual(f'"{missing}" parameter is required when "{given}" is specified', text)
        self.fails(431, "listVirtualMachines", page="one", pagesize="5")

    def test_quirks(self):
        for page, count in (("2", 4), ("3", 3)):
            self.assertEqual(count, self.ok("listResourceLimits", page=page, pagesize="4")["count"])
        first, second = (self.ok("listHostTags", page=page, pagesize="2") for page in "12")
        self.assertEqual(first, second)
        self.simulator.count_missing = {"listZones"}
        self.assertEqual({"zone"}, set(self.ok("listZones")))
        templates = self.ok("listTemplates", templatefilter="featured")["template"]
        self.assertEqual(len({row["id"] for row in templates}) + 1, len(templates))  # one stands in both zones


class SimulatorJobsTest(SimulatorCase):
    OWN = "4d6eea3d-729f-493b-894f-7048159c4bd9"

    def deploy(self, **params):
        """Submit a deployment; (status, answer)."""
        user = params.get("user", "admin")
        found = {"zoneid": self.first("listZones", user=user)["id"],
                 "templateid": self.first("listTemplates", user=user, templatefilter="all")["id"],
                 "serviceofferingid": self.first("listServiceOfferings", user=user)["id"]}  # fmt: skip
        return self.call("deployVirtualMachine", method="POST", **dict(found, **params))

    def test_a_job_from_submission_to_expiry(self):
        machine = self.first("listVirtualMachines", state="Running")
        submitted = self.ok("stopVirtualMachine", id=machine["id"])
        self.assertEqual({"jobid"}, set(submitted))
        self.assertEqual("Stopping", self.first("listVirtualMachines", id=machine["id"])["state"])
        job = self.ok("queryAsyncJobResult", submitted)
        self.assertEqual((0, False, False), (job["jobstatus"], "jobresult" in job, "completed" in job))
        self.assertEqual(submitted["jobid"], self.ok("listAsyncJobs")["asyncjobs"][0]["jobid"])
        job = self.finish(submitted)
        stopped = job["jobresult"]["virtualmachine"]
        self.assertEqual((1, "object", "Stopped"), (job["jobstatus"], job["jobresulttype"], stopped["state"]))
        self.assertEqual({}, self.ok("listAsyncJobs"))
        self.assertEqual(("VirtualMachine", machine["id"], "ROOT"),
                         (job["jobinstancetype"], job["jobinstanceid"], job["domainpath"]))  # fmt: skip
        self.assertEqual((job["jobid"], False), (stopped["jobid"], "jobid" in machine))
        self.now += self.simulator.job_retention
        self.fails(431, "queryAsyncJobResult", submitted)

    def test_jobs_on_one_machine_run_one_after_another(self):
        machine = self.first("listVirtualMachines", state="Running")
        jobs = [self.ok(name, id=machine["id"]) for name in ("stopVirtualMachine", "startVirtualMachine")]
        self.assertEqual(1, self.finish(jobs[0])["jobstatus"])
        self.assertEqual(0, self.ok("queryAsyncJobResult", jobs[1])["jobstatus"])
        self.assertEqual("Running", self.finish(jobs[1])["jobresult"]["virtualmachine"]["state"])

    def test_failures(self):
        machine = self.first("listVirtualMachines", state="Running")
        job = self.done("startVirtualMachine", id=machine["id"])
        self.assertEqual((2, 431, 431), (job["jobstatus"], job["jobresultcode"], job["jobresult"]["errorcode"]))
        titan = self.first("listServiceOfferings", name="Titan")["id"]
        submitted = self.ok("deployVirtualMachine", zoneid=machine["zoneid"], templateid=machine["templateid"],
                            serviceofferingid=titan)  # fmt: skip
        self.assertEqual({"id", "jobid"}, set(submitted))
        self.assertEqual(533, self.finish(submitted)["jobresult"]["errorcode"])
        self.simulator.job_fails_without_result = {"rebootVirtualMachine"}
        job = self.done("rebootVirtualMachine", id=machine["id"])
        self.assertEqual((2, False), (job["jobstatus"], "jobresult" in job))

    def test_a_machine_from_deployment_to_expunging(self):
        zone, _ = self.ok("listZones")["zone"]
        template = self.ok("listTemplates", templatefilter="all", zoneid=zone["id"])["template"][-1]
        networks = [row["id"] for row in self.ok("listNetworks", zoneid=zone["id"])["network"][1::-1]]
        params = {"networkids": ",".join(networks), "details[0].cpuNumber": "3", "details[0].memory": "2048",
                  "name": "web-99", "keypair": "laptop", "userdata": "aGVsbG8=", "zoneid": zone["id"],
                  "templateid": template["id"],
                  "serviceofferingid": self.first("listServiceOfferings", name="Custom")["id"]}  # fmt: skip
        machine = self.done("deployVirtualMachine", params)["jobresult"]["virtualmachine"]
        self.assertEqual(networks, [nic["networkid"] for nic in machine["nic"]])
        self.assertEqual(("Running", 3, 2048), (machine["state"], machine["cpunumber"], machine["memory"]))
        self.assertTrue(machine["password"])
        userdata = self.ok("getVirtualMachineUserData", virtualmachineid=machine["id"])["virtualmachineuserdata"]
        self.assertEqual("aGVsbG8=", userdata["userdata"])
        job = self.done("destroyVirtualMachine", id=machine["id"], expunge="true")
        fields = sorted(job["jobresult"]["virtualmachine"])
        self.assertEqual("affinitygroup deleteprotection nic securitygroup tags".split(), fields)
        self.assertEqual({}, self.ok("listVirtualMachines", id=machine["id"]))
        self.fails(431, "startVirtualMachine", id=machine["id"])

    def test_list_async_jobs_is_the_caller_s_own_and_paged(self):
        jobs = []
        for machine in self.ok("listVirtualMachines", state="Running")["virtualmachine"][:3]:
            jobs.append(self.ok("rebootVirtualMachine", id=machine["id"])["jobid"])
            self.now += 0.01
        theirs = self.first("listVirtualMachines", user="user", state="Running")["id"]
        self.ok("rebootVirtualMachine", user="user", id=theirs)
        self.assertEqual(jobs, [row["jobid"] for row in self.ok("listAsyncJobs")["asyncjobs"]])
        self.assertEqual(4, self.ok("listAsyncJobs", listall="true")["count"])
        page = self.ok("listAsyncJobs", page="2", pagesize="2")
        self.assertEqual((3, jobs[2:]), (page["count"], [row["jobid"] for row in page["asyncjobs"]]))
        self.fails(432, "listAsyncJobs", user="user")
        self.fails(531, "queryAsyncJobResult", user="user", jobid=jobs[0])

    def test_a_job_under_the_caller_s_own_id(self):
        _, submitted = self.deploy(customjobid=self.OWN, name="mine")
        self.assertEqual(({"id", "jobid"}, self.OWN), (set(submitted), submitted["jobid"]))
        job = self.ok("queryAsyncJobResult", jobid=self.OWN)  # at once
        self.assertEqual((0, submitted["id"]), (job["jobstatus"], job["jobinstanceid"]))
        self.assertEqual(self.OWN, self.ok("listAsyncJobs")["asyncjobs"][0]["jobid"])
        self.assertEqual("Running", self.finish(submitted)["jobresult"]["virtualmachine"]["state"])
        self.assertEqual("g", self.ok("createSecurityGroup", customjobid=self.OWN, name="g")["securitygroup"]["name"])

    def test_an_own_id_is_refused_after_the_row_was_made(self):
        self.deploy(customjobid=self.OWN)
        twice = f"UUID: {self.OWN} already exists so can't create/update with custom id"
        for user, own, code, text in (
                ("admin", self.OWN, 530, "Entity already exists "), ("user", self.OWN, 431, twice),
                ("admin", "mine", 431, "UUID: mine doesn't follow the UUID format")):  # fmt: skip
            name = f"left-{code}{user}"
            status, error = self.deploy(user=user, customjobid=own, name=name)
            self.assertEqual((code, code, text), (status, error["errorcode"], error["errortext"]))
            self.now += 60
            self.assertEqual("Stopped", self.first("listVirtualMachines", user=user, name=name)["state"])
        self.assertEqual(1, len(self.simulator.cloud.jobs))

    def test_what_is_given_twice(self):
        network = self.first("listNetworks")
        for status in (200, 431):
            self.assertEqual(status, self.deploy(name="twin", networkids=network["id"])[0])
        self.assertEqual(1, self.ok("listVirtualMachines", name="twin")["count"])
        machine, group = self.first("listVirtualMachines", state="Running"), self.first("listSecurityGroups")
        rule = {"securitygroupid": group["id"], "protocol": "tcp", "startport": "22", "endport": "22"}
        tag = {"tags[0].key": "a", "tags[0].value": "b", "resourceids": machine["id"], "resourcetype": "UserVm"}
        for command_name, params, codes in (
                ("authorizeSecurityGroupIngress", rule, [0, 530]), ("createTags", tag, [0, 530]),
                ("stopVirtualMachine", {"id": machine["id"]}, [0, 0])):  # fmt: skip
            self.assertEqual(codes, [self.done(command_name, params)["jobresultcode"] for _ in codes], command_name)
        self.assertEqual(1, len(self.first("listSecurityGroups", id=group["id"])["ingressrule"]))

    def test_user_data_is_base64(self):
        for userdata, status in (("aGVsbG8=", 200), ("aGVsbG8", 200), ("#!/bin/sh", 431), ("caf\u00e9", 431)):
            self.assertEqual(status, self.deploy(userdata=userdata)[0], userdata)

    def test_events_newest_first(self):
        self.finish(self.deploy(name="newest")[1])
        events = self.ok("listEvents")["event"]
        self.assertEqual("DEPLOY.VIRTUAL.MACHINE", events[0]["type"])
        created = [event["created"] for event in events]
        self.assertEqual(sorted(created, reverse=True), created)


class SimulatorScriptTest(SimulatorCase):
    def test_what_a_script_may_hold(self):
        self.simulator.script("listZones", Answer(504, "<html>", reason="Gateway Time-out"), GO_ON, DROP)
        self.simulator.script(None, lambda record: Answer(200, {record.command.lower(): {"scripted": True}}))
        self.simulator.script("createSecurityGroup", RUN_THEN_DROP)
        self.assertEqual((504, b"<html>"), self.exchange(target=self.target("listZones"))[::2])
        self.assertEqual(2, self.ok("listZones")["count"])
        with self.assertRaises((http.client.HTTPException, OSError)):
            self.call("listZones")
        self.connection.close()
        self.assertEqual({"scripted": True}, self.ok("listZones"))
        with self.assertRaises((http.client.HTTPException, OSError)):
            self.call("createSecurityGroup", name="x")
        self.connection.close()
        self.assertEqual(1, self.simulator.accepted["createSecurityGroup"])
        self.assertEqual((4, 1), (self.simulator.received["listZones"], self.simulator.accepted["listZones"]))


class SimulatorSessionTest(SimulatorCase):
    def login(self, password="tilde~and+plus*", domain="/research"):
        fields = {"username": "user", "password": password, "domain": domain, "command": "login", "response": "json"}
        status, headers, answer = self.exchange("POST", body=urlencode(fields), headers=FORM)
        cookies = headers.get_all("Set-Cookie") or []
        self.cookie = "; ".join(cookie.partition(";")[0] for cookie in cookies)
        return status, cookies, json.loads(answer.decode())["loginresponse"]

    def use(self, command_name="listVirtualMachines", cookie=None, **params):
        query = urlencode(dict(params, command=command_name, response="json"))
        headers = {"Cookie": self.cookie if cookie is None else cookie}
        status, _, body = self.exchange(target="/client/api?" + query, headers=headers)
        return status, self.value(body)

    def test_a_session(self):
        status, cookies, answer = self.login()
        self.assertEqual((200, "user", 1800), (status, answer["username"], answer["timeout"]))
        key = answer["sessionkey"]
        self.assertIn(f"sessionkey={key}; HttpOnly", cookies)
        status, value = self.use(sessionkey=key, signature="ignored", apiKey="ignored")
        self.assertEqual((200, 6), (status, value["count"]))
        for command_name, status in (("noSuchCommand", 432), ("logout", 200), ("listVirtualMachines", 401)):
            self.assertEqual(status, self.use(command_name, sessionkey=key)[0])

    def test_both_cookies_and_the_parameter_are_needed(self):
        for spoil in ("parameter", "cookie"):
            key = self.login()[2]["sessionkey"]
            cookie = self.cookie.partition(";")[0] if spoil == "cookie" else None
            parameter = {"sessionkey": key} if spoil == "cookie" else {}
            self.assertEqual(401, self.use(cookie=cookie, **parameter)[0])
            self.assertEqual(401, self.use(sessionkey=key)[0])  # and the session is gone

    def test_refusals(self):
        status, headers, body = self.exchange(target="/client/api?command=login&username=user&password=x&response=json")
        self.assertEqual((405, "text/plain"), (status, headers.get_content_type()))
        text = "Failed to authenticate user user in domain 2; please provide valid credentials"
        status, cookies, error = self.login(password="wrong")
        self.assertEqual((531, [], 531, text), (status, cookies, error["errorcode"], error["errortext"]))
        self.assertEqual(531, self.login(domain="/")[0])
        for domain, path in (("ROOT", "/ROOT/"), ("ROOT/research", "/ROOT/research/"), ("/nowhere", "/nowhere/")):
            error, text = self.login(domain=domain)[2], "Unable to find the domain from the path " + path
            self.assertEqual((531, text), (error["errorcode"], error["errortext"]))

    def test_idle_for_too_long(self):
        key = self.login()[2]["sessionkey"]
        for pause, status in ((1800, 200), (1800, 200), (1801, 401)):
            self.now += pause
            self.assertEqual(status, self.use(sessionkey=key)[0])

    def test_the_second_factor_is_for_sessions(self):
        self.simulator.two_factor = True
        key = self.login()[2]["sessionkey"]
        self.assertEqual(511, self.use(sessionkey=key)[0])
        self.assertEqual(200, self.call("listZones")[0])


class SimulatorIntegrationTest(SimulatorCase):
    def test_the_integration_port(self):
        self.connect(self.simulator.integration_endpoint.partition("//")[2].partition("/")[0])
        status, headers, body = self.exchange(target="/?command=listZones&response=json")
        self.assertEqual((200, "close"), (status, headers["Connection"]))
        self.assertEqual(2, json.loads(body.decode())["listzonesresponse"]["count"])
        self.assertEqual(401, self.call("listZones")[0])  # a key and a signature
        status, _, body = self.exchange(target="/client/api?command=noSuchCommand&response=json")
        self.assertEqual((432, ["null"]), (status, list(json.loads(body.decode()))))
        self.assertEqual(432, self.exchange("POST", "/client/api", "command=listZones&response=json", FORM)[0])


class SandboxTest(unittest.TestCase):
    def test_environment(self):
        names = {"CLOUDSTACK_REGION": "x", "HTTP_PROXY": "x", "https_proxy": "x"}
        with mock.patch.dict(os.environ, names):
            environment = sandbox_environment(CLOUDSTACK_KEY="k")
        self.assertFalse(set(names) & set(environment))
        self.assertEqual(("k", os.environ.get("HOME")), (environment["CLOUDSTACK_KEY"], environment.get("HOME")))


# === [C] what the tests share =======================================================================================

TEST_PATH = os.path.abspath(__file__)  # now: before 3.9 it is relative, and tests change the working directory
CS_PATH = os.path.join(os.path.dirname(TEST_PATH), "cs.py")
ENDPOINT = "http://cloud.invalid/client/api"


def clean_environment(**extra):
    """This process's environment without anything that configures a client, plus what is given."""
    drop = ("CLOUDSTACK_", "XDG_CACHE_HOME", "NO_COLOR", "PYTHONWARNINGS", "PYTHONIOENCODING", "PYTHONUNBUFFERED",
            "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "FTP_PROXY")  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(drop)}
    return dict(kept, PYTHONDONTWRITEBYTECODE="1", **extra)


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
    """Run a test method once for each row, as a subtest; what is in the row are its arguments of these names.

    One name: a row is its value. Two of these above one method: each row of the one with each of the other."""
    names = names.split(", ")

    def decorate(test):
        @functools.wraps(test)
        def run_each(self, **outer):
            for number, row in enumerate(rows):
                given = dict(zip(names, row if len(names) > 1 else [row]))
                with self.subTest(number, **given):
                    test(self, **dict(outer, **given))

        return run_each

    return decorate


KINDS = (cs.CloudStack, cs.AIOCloudStack)
both = each("kind", *KINDS)
CHILD_LIMIT = 60  # seconds after which a process that a test started hangs


class Child(subprocess.Popen):
    """A process that can be ended together with all that it started, as it leads a session of its own; and it is, when
    it runs for longer than any should, so that whatever waits for it or reads from it goes on."""

    def __init__(self, command, limit=CHILD_LIMIT, **options):
        given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.limit, self.hung = limit, False
        super().__init__(command, start_new_session=True, **dict(given, **options))
        note("group", self.pid)
        self.alarm = threading.Timer(limit, self.ring)
        self.alarm.daemon = True
        self.alarm.start()

    def ring(self):
        self.hung = True
        end_group(self.pid)

    def finish(self, stdin=None):
        """Wait for its end: (exit code, standard output, standard error), both as bytes. Raises AssertionError where it
        has to be ended."""
        try:
            out, err = self.communicate(stdin)
        finally:
            self.end()
        if self.hung:
            raise AssertionError(f"{self.args} did not end within {self.limit} s; output {out!r}, errors {err!r}")
        return self.returncode, out or b"", err or b""

    def end(self):
        """End it if it still runs, with what it started, and close its pipes. May be done twice."""
        self.alarm.cancel()
        end_group(self.pid)
        self.wait()
        note("ended", self.pid)
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
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
        patched = mock.patch.dict(os.environ, clean_environment(HOME=self.home), clear=True)
        patched.start()
        self.addCleanup(patched.stop)
        self.addCleanup(os.chdir, os.getcwd())
        self.cwd = os.path.join(self.home, "work")
        os.mkdir(self.cwd)
        os.chdir(self.cwd)

    def write(self, name, text, mode=0o600):
        """A file below the home directory ("work/x" is in the working directory); its path."""
        path = os.path.join(self.home, name)
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode("utf-8"))
        os.chmod(path, mode)
        return path

    def cs(self, *args, **options):
        """The command line as a process of its own: an object with returncode, stdout, stderr (text)."""
        env = dict(os.environ, **options.pop("env", {}))
        stdin = options.pop("stdin", "")
        child = Child([sys.executable, CS_PATH] + list(args), stdin=subprocess.PIPE, env=env, **options)
        result = mock.Mock(spec=["returncode", "stdout", "stderr", "raw"])
        result.returncode, result.raw, err = child.finish(stdin.encode("utf-8"))
        result.stdout, result.stderr = result.raw.decode("utf-8", "replace"), err.decode("utf-8", "replace")
        return result

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
    error = cs.CloudStackConnectionError("Connection lost to " + ENDPOINT, "closed without an answer")
    error.stale = stale
    return error


def silent():
    return cs.CloudStackTimeoutError("No answer from " + ENDPOINT, "nothing for 10 s (timeout)")


def workers_of(client):
    return client._state.in_this_process().workers


def transport_of(client):
    return client._state.in_this_process().transport


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

    began = 1000.0
    moment = REQUESTS_MOMENT  # time.time() when it began

    def __init__(self):
        self.value = self.error = None
        self.requests = []
        self.pauses = []
        self.now = self.began

    def time(self):
        return float(self.moment) + self.now - self.began

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
                    elif hasattr(value, "__aiter__"):
                        value = run(self._gather(value))
                    elif asyncio.iscoroutine(value):
                        value = run(value)
                    played.value = value
                except Exception as error:
                    played.error = error
                finally:
                    if isinstance(client, cs.AIOCloudStack):
                        client._state.close()
        return played

    @staticmethod
    async def _gather(rows):
        return [row async for row in rows]


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


def afresh(item):
    """A script's item that gives every request an exception or answer of its own."""
    return lambda played, request: copy.copy(item)


def a_while_later(seconds, item):
    """A script's item that comes so many seconds after it was asked for."""

    def later(played, request):
        played.now += seconds
        return item(played, request) if callable(item) else item

    return later


def scripted(items):
    """An _exchange that gives the items of a list, one a request."""

    def exchange(request):
        item = items.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    return exchange


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

        for patch in (mock.patch.object(cs.AIOCloudStack, "_exchange_in_worker", in_worker),
                      mock.patch.object(cs, "_clock", self.loop.time), mock.patch.object(cs, "_random", lambda: 1.0)):
            patch.start()
            self.addCleanup(patch.stop)

    def server(self, params):
        raise NotImplementedError

    def client(self, **settings):
        return cs.AIOCloudStack(**dict({"endpoint": ENDPOINT, "key": "key1", "secret": "secret1"}, **settings))

    def all_of(self, coroutines):
        """What became of each: its result or its exception."""

        async def gathered():
            return await asyncio.gather(*coroutines, return_exceptions=True)

        return self.loop.run_until_complete(gathered())

    def count(self, command):
        return sum(params["command"] == command for _, params, _ in self.requests)


# === [1] settings: the constructor and the attributes ===============================================================

POSITIONAL = [("endpoint", inspect.Parameter.empty), ("key", None), ("secret", None), ("timeout", 10),
              ("method", "get"), ("verify", None), ("cert", None), ("cert_key", None), ("name", None), ("retry", 0),
              ("retry_backoff", 0.5), ("job_timeout", None), ("poll_interval", 2.0), ("expiration", 600),
              ("trace", False), ("dangerous_no_tls_verify", False), ("headers", None), ("session", None),
              ("fetch_result", False)]  # fmt: skip


class ConstructorTest(unittest.TestCase):
    @both
    def test_the_signature_shows_every_setting_in_the_promised_order(self, kind):
        parameters = list(inspect.signature(kind).parameters.values())[: len(POSITIONAL)]
        self.assertEqual({inspect.Parameter.POSITIONAL_OR_KEYWORD}, {parameter.kind for parameter in parameters})
        shown = [(parameter.name, parameter.default) for parameter in parameters]
        self.assertEqual(POSITIONAL[:-1], shown[:-1])
        self.assertEqual(("fetch_result", kind is cs.AIOCloudStack), shown[-1])

    @both
    def test_later_settings_are_keyword_only(self, kind):
        positional = (ENDPOINT, "k", "s", 1, "get", None, None, None, "n", 0, 0.5, None, 2.0, 600, False, False, None,
                      None, False)  # fmt: skip
        self.assertEqual("n", kind(*positional).name)
        self.assertRaises(TypeError, kind, *positional, "theme")

    def test_every_setting_is_a_keyword_with_the_table_s_default(self):
        """The constructors are written out for inspect; they must not say something else than the table."""
        shown = {name: parameter.default for name, parameter in inspect.signature(cs.CloudStack).parameters.items()}
        expected = {setting.name: setting.default for setting in cs.SETTINGS}
        expected.update(endpoint=inspect.Parameter.empty)
        self.assertEqual(expected, shown)

    @both
    def test_theme_and_output_are_ignored(self, kind):
        self.assertEqual(ENDPOINT, kind(ENDPOINT, theme="monokai", output="json").endpoint)

    def test_an_unknown_setting_is_a_type_error(self):
        for kind in KINDS:
            self.assertRaises(TypeError, kind, ENDPOINT, nonesuch=1)
        self.assertRaises(TypeError, cs.CloudStack)

    @both
    def test_strings_as_an_ini_file_gives_them(self, kind):
        second = datetime.timedelta(seconds=1)
        cases = [("timeout", "0.5", 0.5), ("timeout", "10", 10), ("timeout", "1e1", 10.0), ("method", "POST", "post"),
                 ("method", "Get", "get"), ("retry", "3", 3), ("retry_backoff", "0.25", 0.25),
                 ("job_timeout", "60", 60), ("job_timeout", "1.5", 1.5), ("job_timeout", "", None),
                 ("poll_interval", "5", 5), ("poll_interval", ".5", 0.5), ("expiration", "60", 60 * second),
                 ("expiration", "-1", -second), ("expiration", "1.5", 1.5 * second), ("trace", "true", True),
                 ("trace", "off", False), ("dangerous_no_tls_verify", "Yes", True), ("trace", "", False),
                 ("dangerous_no_tls_verify", "", False), ("fetch_result", "", False), ("recover", "", False),
                 ("recover", "on", True), ("dangerous_no_tls_verify", "0", False), ("fetch_result", "true", True),
                 ("fetch_result", "no", False), ("verify", "/ca.pem", "/ca.pem"), ("cert", "/c.pem", "/c.pem"),
                 ("cert_key", "/k.pem", "/k.pem"), ("name", "region", "region"), ("key", "", None),
                 ("secret", "", None), ("concurrency", "4", 4), ("max_response_size", "1024", 1024),
                 ("username", "u", "u"), ("domain", "/a/b", "/a/b")]  # fmt: skip
        for name, text, expected in cases:
            with self.subTest(name=name, text=text):
                value = kind(ENDPOINT, **{name: text}).get_setting(name)
                self.assertEqual((expected, type(expected)), (value, type(value)))

    @each("setting", *[setting for name, setting in cs._CLIENT_SETTINGS.items()
                       if name not in ("endpoint", "verify", "expiration")])  # fmt: skip
    def test_none_means_the_default(self, setting):
        client = cs.CloudStack(ENDPOINT, **{setting.name: None})
        self.assertEqual(setting.convert(setting.default), client.get_setting(setting.name))

    @both
    def test_what_cannot_be_a_setting_is_refused_by_the_setting_s_name(self, kind):
        cases = {
            "timeout": ["abc", "", "nan", "inf", "-1", 0, -1, True, [], float("nan"), float("inf"), 10**400, "1e12"],
            "method": ["put", "", 1, b"get"], "retry": ["-1", -1, 1.5, "x", True, float("inf"), float("nan"), [], ""],
            "retry_backoff": ["-1", "x", float("nan")], "job_timeout": [-1, "x", "nan"],
            "poll_interval": [-0.1, "x", "", "1e300"], "expiration": ["x", "nan", 1e300, "inf", []],
            "trace": ["maybe", 2, []], "headers": ["x: y", 5], "fetch_result": ["perhaps", 7],
            "dangerous_no_tls_verify": ["nope", "False ; comment", 2, 1.5], "verify": [5, 1.5, []], "cert": [5, {}],
            "cert_key": [5], "endpoint": [5, ["http://h/"]], "key": [5, b"\xff"], "secret": [object()], "name": [5],
            "concurrency": [0, -1, "x", 1.5], "max_response_size": [0, "big"], "username": [1], "password": [1],
            "domain": [1]}  # fmt: skip
        for name, value in [(name, value) for name, values in cases.items() for value in values]:
            with self.subTest(name=name, value=value):
                with self.assertRaisesRegex(ValueError, rf"\A{name}: .") as caught:
                    kind(**dict({"endpoint": ENDPOINT}, **{name: value}))
                self.assertNotIn("\n", str(caught.exception))
                self.assertRaisesRegex(ValueError, rf"\A{name}: ", kind(ENDPOINT).set_setting, name, value)

    @each("name, value", ("key", b"c4nary\xff"), ("key", ["c4nary"]), ("secret", b"c4nary\xff"), ("secret", ["c4nary"]),
          ("secret", {"c4nary": 1}), ("password", b"c4nary\xff"), ("password", ("c4nary",)),
          ("headers", {"X": "c4nary\r\nX: y"}), ("headers", {"X": b"c4nary\n"}), ("headers", {"X": ["c4nary"]}),
          ("headers", {"X": "c4nary\u20ac"}))  # fmt: skip
    def test_a_refused_secret_is_not_quoted(self, name, value):
        with self.assertRaises(ValueError) as caught:
            cs.CloudStack(ENDPOINT, **{name: value})
        self.assertNotIn("c4nary", str(caught.exception))
        self.assertTrue(str(caught.exception).startswith(name), str(caught.exception))

    @each("name, pair", ("key", "secret"), ("secret", "key"), ("username", "password"), ("password", "username"))
    def test_credentials_that_have_no_utf_8_are_refused_by_name(self, name, pair):
        """Undecodable bytes in an environment variable arrive as lone surrogates."""
        with self.assertRaisesRegex(ValueError, name):
            client = cs.CloudStack(ENDPOINT, **{name: "c4nary\udcff", pair: "x"})
            object.__setattr__(client, "_exchange", lambda request: self.fail("sent"))
            client.listZones()

    @each("headers", {"X": "a\nb"}, {"X": "a\rb"}, {"X": "a\x00b"}, {"X Y": "a"}, {"": "a"}, {"X:": "a"}, {"X\n": "a"},
          {"\xfc": "a"}, {5: "a"}, {"X": object()}, {"X": "\u20ac"}, {"Content-Length": "5"},
          {"transfer-encoding": "chunked"})  # fmt: skip
    def test_header_names_and_values_that_break_out_are_refused(self, headers):
        self.assertRaisesRegex(ValueError, r"\Aheaders: ", cs.CloudStack, ENDPOINT, headers=headers)
        client = answered_by(lambda request: self.fail("sent"))
        self.assertRaises(ValueError, client.listZones, headers=headers)

    def test_a_header_written_into_the_client_s_own_map_is_checked_too(self):
        sent = []
        client = answered_by(lambda request: sent.append(request) or one()[0], headers={"X-A": "1"})
        client.headers["X-B"] = "good"
        client.listZones()
        self.assertEqual("good", sent[0].headers["X-B"])
        client.headers["X-B"] = "c4nary\r\nX-Evil: 1"
        with self.assertRaisesRegex(ValueError, "X-B") as caught:
            client.listZones()
        self.assertNotIn("c4nary", str(caught.exception))
        self.assertEqual(1, len(sent))

    def test_headers_of_one_client_are_not_another_s(self):
        given = {"X": "1"}
        first, second = cs.CloudStack(ENDPOINT, headers=given), cs.CloudStack(ENDPOINT, headers=given)
        first.headers["Y"] = "2"
        self.assertEqual(({"X": "1"}, {"X": "1"}, {}), (second.headers, given, cs.CloudStack(ENDPOINT).headers))

    @both
    def test_the_constructor_opens_nothing(self, kind):
        with mock.patch("builtins.open", side_effect=MemoryError), mock.patch("socket.socket", side_effect=MemoryError):
            client = kind("https://nowhere.invalid/", verify="/no/ca.pem", cert="/no/c.pem", cert_key="/no/k.pem")
            self.assertEqual(("/no/ca.pem", ("/no/c.pem", "/no/k.pem")), (client.verify, client.cert))

    @both
    def test_an_aiohttp_session_is_refused_in_one_line(self, kind):
        foreign = type("ClientSession", (), {"__module__": "aiohttp.client"})()
        with self.assertRaisesRegex(ValueError, r"\Asession: .*aiohttp") as caught:
            kind(ENDPOINT, session=foreign)
        self.assertNotIn("\n", str(caught.exception))

    @each("name, value, says", ("timeout", decimal.Decimal("NaN"), "1e+09"), ("timeout", 2e9, "up to 1e+09"),
          ("cert_key", ("/a", "/b"), "cert_key"))  # fmt: skip
    def test_values_of_unusual_kinds_are_refused_as_all_others_are(self, name, value, says):
        with self.assertRaisesRegex(ValueError, rf"\A{name}: ") as caught:
            cs.CloudStack(ENDPOINT, **{name: value})
        self.assertIn(says, str(caught.exception))


class AttributesTest(ProtocolCase):
    @each("verify, dangerous, expected", (None, False, True), (True, False, True), (False, False, True),
          ("false", False, True), ("true", False, True), ("0", False, True), ("", False, True),
          ("/ca.pem", False, "/ca.pem"), ("/ca.pem", True, "/ca.pem"), (None, True, False), (True, True, False),
          (False, True, False), (False, "true", False), (False, "false", True))  # fmt: skip
    def test_verify_reads_true_or_a_path_or_false_only_where_that_is_said(self, verify, dangerous, expected):
        client = cs.CloudStack(ENDPOINT, verify=verify, dangerous_no_tls_verify=dangerous)
        self.assertEqual(expected, client.verify)
        self.assertIs(type(client.verify), type(expected))

    def test_verify_set_to_false_later_does_not_turn_verification_off(self):
        client = cs.CloudStack(ENDPOINT, verify="/ca.pem")
        client.verify = False
        self.assertIs(client.verify, True)
        client.set_setting("dangerous_no_tls_verify", True)
        self.assertIs(client.verify, False)

    def test_cert_is_a_pair_once_there_is_a_key(self):
        client = cs.CloudStack(ENDPOINT, cert="/c.pem")
        self.assertEqual("/c.pem", client.cert)
        client.set_setting("cert_key", "/k.pem")
        self.assertEqual(("/c.pem", "/k.pem"), client.cert)
        self.assertEqual(("/c.pem", "/k.pem"), cs.CloudStack(ENDPOINT, cert=["/c.pem", "/k.pem"]).cert)
        self.assertIsNone(cs.CloudStack(ENDPOINT).cert)

    @each("given", 60, "60", 60.0, datetime.timedelta(minutes=1))
    def test_expiration_reads_as_a_timedelta(self, given):
        self.assertEqual(datetime.timedelta(seconds=60), cs.CloudStack(ENDPOINT, expiration=given).expiration)

    def test_every_promised_attribute_can_be_read(self):
        expected = {"endpoint": ENDPOINT, "key": "k", "secret": "s", "timeout": 10, "method": "get", "verify": True,
                    "cert": None, "name": None, "retry": 0, "job_timeout": None, "poll_interval": 2.0, "trace": False,
                    "fetch_result": False, "expiration": datetime.timedelta(minutes=10), "headers": {}, "session": None}
        client = cs.CloudStack(ENDPOINT, "k", "s")
        self.assertEqual(expected, {name: getattr(client, name) for name in expected})

    def test_attributes_of_the_program_s_own_are_kept(self):
        client = cs.CloudStack(ENDPOINT)
        client.my_context = {"a": 1}
        self.assertEqual(({"a": 1}, {"a": 1}), (client.my_context, copy.copy(client).my_context))

    @each("name, value, holds",
          ("endpoint", "http://other.invalid/api", lambda p: "//other.invalid/api?" in p.requests[-1].url),
          ("key", "key2", lambda p: p.params()["apiKey"] == "key2"),
          ("method", "post", lambda p: p.requests[-1].method == "POST"),
          ("secret", "secret2", lambda p: p.params()["signature"] != p.params(0)["signature"]),
          ("timeout", "0.5", lambda p: (p.requests[-1].timeout, p.requests[-1].total) == (0.5, 5.0)),
          ("verify", "/ca.pem", lambda p: p.requests[-1].verify == "/ca.pem"),
          ("dangerous_no_tls_verify", True, lambda p: p.requests[-1].verify is False),
          ("cert", "/c.pem", lambda p: p.requests[-1].cert == "/c.pem"),
          ("headers", {"X-A": "1"}, lambda p: p.requests[-1].headers["X-A"] == "1"),
          ("expiration", 60, lambda p: p.params()["expires"] == "2026-01-01T00:01:00+0000"),
          ("max_response_size", 9, lambda p: p.requests[-1].limit == 9))  # fmt: skip
    def test_settings_are_looked_at_anew_by_each_call(self, name, value, holds):
        def change_and_call(client):
            client.set_setting(name, value)
            return client.listZones()

        played = self.play(one(), one_after_another(asking("listZones"), change_and_call))
        self.assertEqual((None, 2), (played.error, len(played.requests)))
        self.assertTrue(holds(played))

    def test_retry_set_later_counts(self):
        def call(client):
            client.retry = "1"
            return client.listZones()

        self.assertEqual(2, len(self.play([silent(), silent(), one()[0]], call).requests))

    def test_fetch_result_set_later_counts(self):
        def call(client):
            client.fetch_result = "yes"
            return client.startVirtualMachine(id="1")

        script = [answer({"r": {"jobid": "j"}}), answer({"r": {"jobstatus": 1, "jobresult": {"a": 1}}})]
        self.assertEqual({"a": 1}, self.play(script, call).value)

    @both
    def test_repr_is_the_name_or_the_endpoint(self, kind):
        self.assertEqual(f"<CloudStack: {ENDPOINT}>", repr(kind(ENDPOINT, "k", "s")))
        self.assertEqual("<CloudStack: zurich>", repr(kind(ENDPOINT, name="zurich")))

    @each("endpoint", "http://user:c4nary@h/api", "http://h/api?token=c4nary", "user:c4nary@h/api", "http://[c4nary",
          "http://h:x/", "https://h/#c4nary", "", None, "file:///etc/passwd", "//user:c4nary@h/")  # fmt: skip
    def test_repr_never_shows_a_secret_and_never_fails(self, endpoint):
        shown = repr(cs.CloudStack(endpoint, "c4nary-key", "c4nary-secret", password="c4nary"))
        self.assertTrue(shown.startswith("<CloudStack: "), shown)
        if endpoint != "http://[c4nary":
            self.assertNotIn("c4nary", shown)

    @each("endpoint", None, "", "cloud.example/client/api", "file:///etc/passwd", "ftp://h/", "http://",
          "https:///client/api", "http://h:x/", "http://h:99999/", "http://h:0/", "http://[::1/", "http://h/a b",
          "http://h/\n", "http://h/\xfc", "http://user:c4nary@h/api", "user:c4nary@h/api", "http://user:c4nary@h:x/",
          "//user:c4nary@h/", "data:,x")  # fmt: skip
    def test_an_endpoint_that_cannot_be_one_is_refused_before_anything_is_sent_and_not_with_its_secrets(self, endpoint):
        played = self.play([AssertionError("sent")], asking("listZones"), endpoint=endpoint)
        self.assertIsInstance(played.error, ValueError)
        self.assertRegex(str(played.error), r"\Aendpoint: ")
        self.assertNotIn("c4nary", str(played.error))

    @each("settings, name, value", ({"key": None}, "key", "secret1"), ({"secret": None}, "secret", "key1"),
          ({"key": ""}, "key", "secret1"), ({"key": None, "secret": None, "username": "admin"}, "password", "admin"),
          ({"key": None, "secret": None, "password": "c4nary"}, "username", "c4nary"),
          ({"username": "admin", "password": "c4nary"}, "username", "c4nary"))  # fmt: skip
    def test_half_a_pair_of_credentials_is_refused_before_anything_is_sent(self, settings, name, value):
        played = self.play([AssertionError("sent")], asking("listZones"), **settings)
        self.assertIsInstance(played.error, ValueError)
        self.assertRegex(str(played.error), rf"\A{name}: ")
        self.assertNotIn(value, str(played.error))

    def test_none_is_the_default_wherever_it_is_given(self):
        client = cs.CloudStack(ENDPOINT, "k", "s", trace=True, fetch_result=True)
        client.trace = client.fetch_result = None
        client.set_setting("dangerous_no_tls_verify", None)
        self.assertEqual([False] * 2, [client.trace, client.fetch_result])
        self.assertIs(False, client.get_setting("dangerous_no_tls_verify"))
        played = self.play(one({"jobid": "1"}), asking("listZones", fetch_list=None, fetch_result=None))
        self.assertEqual(({"jobid": "1"}, 1), (played.value, len(played.requests)))


# === [2] errors =====================================================================================================


class ErrorsTest(ProtocolCase):
    def test_the_tree(self):
        self.assertTrue(issubclass(cs.AIOCloudStack, cs.CloudStack))
        self.assertTrue(issubclass(cs.CloudStackApiException, cs.CloudStackException))
        self.assertFalse(issubclass(cs.CloudStackException, OSError))

    @each("kind, parent", (cs.CloudStackConnectionError, ConnectionError), (cs.CloudStackTimeoutError, TimeoutError),
          (cs.CloudStackJobTimeout, TimeoutError), (cs.CloudStackJobTimeout, cs.CloudStackTimeoutError))  # fmt: skip
    def test_the_tree_of_network_errors(self, kind, parent):
        self.assertTrue(issubclass(kind, cs.CloudStackException) and issubclass(kind, parent))
        self.assertTrue(issubclass(kind, OSError))

    @each("kind", cs.CloudStackException, cs.CloudStackApiException)
    @each("args", (), ("a",), ("a", "b"), ("a", "b", "c"), (1, None))
    def test_errors_can_be_built_by_hand_with_any_arguments(self, kind, args):
        error = kind(*args)
        self.assertEqual((args, None, None), (error.args, error.response, error.jobid))
        self.assertFalse(error.outcome_unknown)
        str(error), repr(error)
        self.assertEqual(5, cs.CloudStackException("a", response=5).response)

    def test_the_text_of_an_api_error(self):
        error = cs.CloudStackApiException("HTTP 431 response from CloudStack", error={"errorcode": 431}, response=None)
        self.assertEqual("HTTP 431 response from CloudStack, error: {'errorcode': 431}", str(error))
        self.assertEqual((("HTTP 431 response from CloudStack",), {"errorcode": 431}), (error.args, error.error))

    @each("kind", cs.CloudStackConnectionError, cs.CloudStackTimeoutError, cs.CloudStackJobTimeout)
    def test_the_text_of_a_network_error_is_no_errno_text(self, kind):
        error = kind("Cannot connect to http://h/", "refused")
        self.assertEqual(("Cannot connect to http://h/", "refused"), error.args)
        self.assertEqual("Cannot connect to http://h/: refused", str(error))

    def test_a_host_beyond_ascii_is_told_how_to_be_written(self):
        played = self.play([], asking("listZones"), endpoint="https://b\u00fccher.example/client/api")
        self.assertIsInstance(played.error, ValueError)
        self.assertRegex(str(played.error), r"\Aendpoint: .*xn--")

    @each("status, ok", (200, True), (302, True), (399, True), (400, False), (431, False), (599, False))
    def test_the_answer_of_an_error_says_whether_it_is_ok_as_requests_has_it(self, status, ok):
        self.assertIs(answer({"x": 1}, status).ok, ok)

    @each("error", cs.CloudStackException("a", "b", response=answer({"x": 1}, 504, "Gateway Time-out")),
          cs.CloudStackApiException("m", error={"errorcode": 1}, response=answer({"x": 1}, 431)),
          cs.CloudStackConnectionError("a", "b"), cs.CloudStackTimeoutError("a", "b"), cs.CloudStackTimeoutError("a"),
          cs.CloudStackJobTimeout("a", "job", response=answer({"x": 1}, 408)), cs.CloudStackException())  # fmt: skip
    @each("copier", *COPIERS)
    def test_errors_survive_pickle_and_copy_with_all_they_know(self, error, copier):
        error.jobid, error.outcome_unknown = "j", True
        twin = copier(error)
        self.assertEqual((type(error), error.args, str(error)), (type(twin), twin.args, str(twin)))
        self.assertEqual(("j", True), (twin.jobid, twin.outcome_unknown))
        self.assertEqual(getattr(error, "error", 0), getattr(twin, "error", 0))
        if error.response is not None:
            self.assertEqual(error.response.status_code, twin.response.status_code)
            self.assertEqual({"x": 1}, twin.response.json())
            self.assertEqual("application/json; charset=UTF-8", twin.response.headers["content-type"])

    def test_a_raised_api_error_survives_pickle(self):
        error = self.play([api_error(431, "bad")], asking("listZones")).error
        told = [(str(each), each.error, each.response.reason) for each in (error, pickle.loads(pickle.dumps(error)))]
        self.assertEqual(told[0], told[1])

    @both
    def test_the_response_of_an_error_for_both_clients(self, kind):
        response = api_error(431, "b\xe4d", headers={"X-Server": "1"})
        client = answered_by(lambda request: response, kind)
        with self.assertRaises(cs.CloudStackApiException) as caught:
            run(client.listZones()) if kind is cs.AIOCloudStack else client.listZones()
        client.close()
        got = caught.exception.response
        self.assertEqual((431, "431", "1"), (got.status_code, got.reason, got.headers["x-server"]))
        self.assertEqual("b\xe4d", got.json()["errorresponse"]["errortext"])
        self.assertEqual(got.json(), json.loads(got.text))

    @each("item", api_error(401, "unable to verify"), answer("<html>", 504), answer("<html>"), answer(b""), answer([1]),
          unsent(), lost(), silent(), answer("", 302, headers={"Location": "http://h/?apiKey=c4nary-key"}))  # fmt: skip
    @each("command", "listZones", "deployVirtualMachine")
    def test_no_error_quotes_key_secret_or_signature(self, item, command):
        played = self.play([item], asking(command), key="c4nary-key", secret="c4nary-secret")
        shown = str(played.error) + repr(played.error) + repr(played.error.args)
        self.assertNotIn("c4nary", shown)
        self.assertNotIn(played.params()["signature"][:8], shown)


# === [3] parameters and signature ===================================================================================


class Tagged(str):
    """As Ansible tags its strings: a subclass whose own str() is not to be trusted."""

    def __str__(self):
        return "Tagged!"


class Number(int):
    def __repr__(self):
        return "Number!"

    __str__ = __repr__


class Fraction(float):
    def __repr__(self):
        return "Fraction!"

    __str__ = __repr__


class Octets(bytes):
    pass


class State(str, enum.Enum):
    RUNNING = "Running"


class Size(enum.IntEnum):
    BIG = 3


class FlattenTest(unittest.TestCase):
    def check(self, cases):
        for given, expected in cases:
            with self.subTest(given=given):
                self.assertEqual(expected, cs.flatten({"p": given}))

    def test_scalars_become_text(self):
        self.check([("text", {"p": "text"}), ("", {"p": ""}), (0, {"p": "0"}), (-7, {"p": "-7"}),
                   (2**70, {"p": str(2**70)}), (1.5, {"p": "1.5"}), (b"bytes \xc3\xbc", {"p": "bytes \xfc"}),
                   (b"", {"p": ""}), (None, {})])  # fmt: skip

    def test_booleans_are_true_and_false_in_lower_case_since_the_server_knows_only_these(self):
        self.check([(True, {"p": "true"}), (False, {"p": "false"})])

    def test_subclasses_are_sent_as_their_base_type(self):
        self.check([(Tagged("v"), {"p": "v"}), (Number(5), {"p": "5"}), (Fraction(0.5), {"p": "0.5"}),
                   (Octets(b"o"), {"p": "o"}), (State.RUNNING, {"p": "Running"}), (Size.BIG, {"p": "3"}),
                   ([Tagged("a"), Number(2)], {"p": "a,2"}), ({"k": Tagged("v")}, {"p[0].k": "v"})])  # fmt: skip

    def test_lists_are_joined_by_commas_in_their_order(self):
        self.check([(["b", "a", "b"], {"p": "b,a,b"}), (("b", "a"), {"p": "b,a"}), ([1, 2.5, b"x"], {"p": "1,2.5,x"}),
                   ([True, None, False], {"p": "true,false"}), ([0], {"p": "0"}), (["only"], {"p": "only"})])

    def test_sets_are_sorted(self):
        self.check([({"b", "c", "a"}, {"p": "a,b,c"}), (frozenset("cab"), {"p": "a,b,c"}), ({10, 9}, {"p": "10,9"})])

    def test_empty_collections_are_dropped(self):
        self.check([(empty, {}) for empty in ([], (), set(), frozenset(), {}, [None], [{}], [None, {}], {"k": None})])

    def test_a_dict_is_one_entry_of_a_map(self):
        self.check([({"cpuNumber": 2, "memory": 1024}, {"p[0].cpuNumber": "2", "p[0].memory": "1024"}),
                   ({"a.b": "dots"}, {"p[0].a.b": "dots"}), ({"k": ""}, {"p[0].k": ""}),
                   (collections.OrderedDict(k="v"), {"p[0].k": "v"})])  # fmt: skip

    def test_a_list_of_dicts_is_a_map_with_an_index_each(self):
        self.check([([{"key": "a", "value": "1"}, {"key": "b", "value": "2"}],
                   {"p[0].key": "a", "p[0].value": "1", "p[1].key": "b", "p[1].value": "2"}),
                   (({"k": 1}, {"k": 2}), {"p[0].k": "1", "p[1].k": "2"}), ([None, {"k": 1}], {"p[0].k": "1"})])

    def test_within_dicts_values_are_converted_as_outside(self):
        """5.2.0 sends Python's own True, None and [1, 2]."""
        self.check([({"k": True, "l": False, "n": None}, {"p[0].k": "true", "p[0].l": "false"}),
                   ({"k": [1, True, None, "x"]}, {"p[0].k": "1,true,x"}), ({"k": {"b", "a"}}, {"p[0].k": "a,b"}),
                   ({"k": b"\xc3\xbc"}, {"p[0].k": "\xfc"}), ([{"k": (1, 2)}], {"p[0].k": "1,2"}), ({"k": []}, {})])

    def test_ready_made_keys_pass_through(self):
        params = {"tags[0].key": "a", "tags[0].value": True, "tags[1].key": ["x", "y"]}
        expected = {"tags[0].key": "a", "tags[0].value": "true", "tags[1].key": "x,y"}
        self.assertEqual(expected, cs.flatten(params))

    @each("value, kind", (object(), "object"), (decimal.Decimal("1.5"), "Decimal"), (datetime.date(2026, 1, 1), "date"),
          (1j, "complex"), (iter("ab"), "iterator"), (bytearray(b"s3cret"), "bytearray"), ([object()], "object"),
          ({"k": object()}, "object"), ({"k": {"s3cret": "s3cret"}}, "dict"), ([{"k": {"a": 1}}], "dict"),
          ([["s3cret"]], "list"), ({"k": [["s3cret"]]}, "list"), ({"k": [{"s3cret": 1}]}, "dict"),
          ([{"k": 1}, "s3cret"], "str"), (b"s3cret\xff", "bytes"), ([b"\xff"], "bytes"))  # fmt: skip
    def test_other_types_are_refused_by_name_and_type_without_the_value(self, value, kind):
        with self.assertRaises(ValueError) as caught:
            cs.flatten({"theparam": value})
        self.assertIn("theparam", str(caught.exception))
        self.assertIn(kind, str(caught.exception))
        self.assertNotIn("s3cret", str(caught.exception))

    @both
    def test_what_is_refused_is_refused_before_anything_is_sent(self, kind):
        client = answered_by(lambda request: self.fail("sent"), kind)
        for value in (object(), {"a": {"b": 1}}, "\x00", "\x1b[1m", "\x7f", "\ud800"):
            with self.assertRaisesRegex(ValueError, "'name"):
                run(client.listZones(name=value))

    @each("number", *list(range(32)) + [127])
    def test_control_characters_are_refused_but_for_tab_and_line_ends(self, number):
        if chr(number) in "\t\n\r":
            cs._Call("listX", {"p": chr(number)})
        else:
            with self.assertRaisesRegex(ValueError, rf"'p'.*U\+00{number:02X}"):
                cs._Call("listX", {"p": "a" + chr(number)})


class HelpersTest(unittest.TestCase):
    def test_transform_works_in_place_and_leaves_bytes_alone(self):
        params = {"a": b"x", "b": [1, 2], "c": None, "d": {"k": True, "b": b"y"}, "e": "", "f": {}, "g": {"b", "a"}}
        self.assertIsNone(cs.transform(params))
        self.assertEqual({"a": b"x", "b": "1,2", "d[0].k": "true", "d[0].b": "y", "e": "", "g": "a,b"}, params)

    def test_transform_refuses_what_flatten_refuses(self):
        with self.assertRaisesRegex(ValueError, "'p.*dict"):
            cs.transform({"p": {"k": {}}})

    @each("text, expected", ("ABCXYZabcxyz0189.-_*", "ABCXYZabcxyz0189.-_*"), ("~", "%7E"), (" ", "%20"), ("+", "%2B"),
          ("/", "%2F"), ("%", "%25"), ("&=", "%26%3D"), ("[0]", "%5B0%5D"), ("\xfc", "%C3%BC"), ("\u20ac", "%E2%82%AC"),
          ("\U0001f600", "%F0%9F%98%80"), ("\n", "%0A"), ("", ""))  # fmt: skip
    def test_cs_encode_is_java_s_url_encoder_with_percent_twenty(self, text, expected):
        self.assertEqual(expected, cs.cs_encode(text))

    @each("key, expected", ("key", True), ("header_x", True), ("keys", False), ("Key", False), ("xheader_a", False))
    def test_check_key_takes_names_and_patterns(self, key, expected):
        self.assertIs(cs.check_key(key, ["key", "header_*"]), expected)

    @each("expected, words", (True, "y yes t true on 1 TRUE Yes"), (False, "n no f false off 0 False OFF"))
    def test_strtobool(self, expected, words):
        for word in words.split():
            self.assertIs(cs.strtobool(word), expected, word)

    @each("word", "", "2", "nope", "False ; comment", " true")
    def test_what_is_no_boolean(self, word):
        self.assertRaises(ValueError, cs.strtobool, word)

    def test_expires_format(self):
        moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
        self.assertEqual("2026-01-01T00:00:00+0000", moment.strftime(cs.EXPIRES_FORMAT))

    def test_all_is_what_programs_use(self):
        needed = {"CloudStack", "AIOCloudStack", "CloudStackException", "CloudStackApiException", "read_config"}
        self.assertLessEqual(needed | {"read_config_from_ini", "main"}, set(cs.__all__))
        self.assertEqual([], [name for name in cs.__all__ if not hasattr(cs, name)])


class SignatureTest(ProtocolCase):
    """Vectors by `printf %s "$canonical" | openssl dgst -sha1 -hmac "$secret" -binary | base64`."""

    def signature(self, command="listZones", settings=NEVER, **params):
        played = self.play(one(), asking(command, **params), **settings)
        self.assertIsNone(played.error)
        return played.params()["signature"]

    def test_the_common_case(self):
        # apikey=plgwjfzk...&command=listusers&response=json
        key = "plgWJfZK4gyS3mOMTVmjUVg-X-jlWlnfaUJ9GAbBbf9EdM-kAYMmAkLqzzq1ElZLYq_u38zCm0bewzGUdP66mg"
        secret = "VDaACYb0LV9eNjTetIOElcVQkvJck_J_QljX_FcHRj87ZKiy0z0ty0ZsYBkoXkY9b7eq1EhwJaw7FF3akA3KBQ"
        settings = dict(NEVER, key=key, secret=secret)
        self.assertEqual("r3txb5VGa1Edn8QdItS0vgBH8OI=", self.signature("listUsers", settings))

    def test_a_tilde_is_encoded_in_the_signature(self):
        # apikey=key1&command=createuser&password=a%7eb&response=json
        self.assertEqual("EskxZ1w8fof0YcKXq8JpMvOhipE=", self.signature("createUser", password="a~b"))

    def test_space_plus_and_star(self):
        # apikey=key1&command=createtags&name=a%20b%2bc*d&response=json
        self.assertEqual("7Lb/E1sQjNKHC0lNgGmspKCkzPM=", self.signature("createTags", name="a b+c*d"))

    def test_unicode_values(self):
        # apikey=key1&command=listzones&name=z%c3%bcrich%20%e2%82%ac%20%f0%9f%98%80&response=json
        name = "Z\xfcrich \u20ac \U0001f600"
        self.assertEqual("XIX1UbGemO2A5fpk5VoLPlAszB8=", self.signature(name=name))
        self.assertEqual("XIX1UbGemO2A5fpk5VoLPlAszB8=", self.signature(name=name.encode("utf-8")))

    def test_every_other_punctuation_mark(self):
        # ...&name=%21%22%23%24%25%26%27%28%29%2c%2f%3a%3b%3c%3d%3e%3f%40%5b%5c%5d%5e%60%7b%7c%7d.-_&response=json
        self.assertEqual("YNxWO/J+hcrnpdyzDwJHhn0lkgo=", self.signature(name="!\"#$%&'(),/:;<=>?@[\\]^`{|}.-_"))

    def test_tab_and_line_ends(self):
        # apikey=key1&command=listzones&name=a%09b%0ac%0dd&response=json
        self.assertEqual("MTVy481NGOV8xRzWyK1yDM7o0gE=", self.signature(name="a\tb\nc\rd"))

    def test_an_empty_value(self):
        # apikey=key1&command=listzones&keyword=&response=json
        self.assertEqual("3PSH4qbfMHPLwTYdBKGqwTni4Nk=", self.signature(keyword=""))

    def test_names_are_not_encoded(self):
        # apikey=key1&command=deployvirtualmachine&details[0].cpunumber=2&details[0].memory=1024&response=json
        details = {"memory": 1024, "cpuNumber": 2}
        self.assertEqual("5bDEtblUTqK9tcGtsV8q7ShQxZg=", self.signature("deployVirtualMachine", details=details))

    def test_names_are_sorted_raw_with_upper_case_first(self):
        # zone=1&apikey=key1&apiallowed=x&command=listzones&response=json
        self.assertEqual("15B73S1VI7q6xrKyawQm1JkmZbc=", self.signature(apiallowed="x", Zone="1"))

    def test_names_beyond_ascii_are_sorted_by_utf_16_units(self):
        """An astral character sorts before U+FF5E, as Java compares."""
        # apikey=key1&command=listzones&response=json&z=1&(u umlaut)=2&(astral)=3&(U+FF5E)=4
        params = {"\uff5e": "4", "\U0001f600": "3", "\xfc": "2", "z": "1"}
        self.assertEqual("gaQx7Boq+QnVxwEBX4GqQx7E8iA=", self.signature(**params))

    def test_version_3_signs_its_expiry(self):
        # apikey=key1&command=listzones&expires=2026-01-01t00%3a10%3a00%2b0000&response=json&signatureversion=3
        self.assertEqual("LoMpzTNToMAHd6Q9OF6HMYD2Th4=", self.signature(settings={}))

    def test_a_secret_beyond_ascii(self):
        settings = dict(NEVER, secret="geh\xebim~ \u20ac")
        self.assertEqual("ZTqgpgRGb4ffnoGQ0voWE98aItc=", self.signature(settings=settings))

    def test_the_signature_is_percent_encoded_on_the_wire(self):
        played = self.play(one(), asking("listZones", name="Z\xfcrich \u20ac \U0001f600 "), **NEVER)
        raw = dict(pair.split("=") for pair in played.requests[0].url.partition("?")[2].split("&"))
        self.assertRegex(raw["signature"], r"\A[A-Za-z0-9%]+%3D\Z")

    def test_names_are_encoded_on_the_wire(self):
        played = self.play(one(), asking("listZones", tags={"key": "~ +"}), **NEVER)
        self.assertIn("&tags%5B0%5D.key=%7E%20%2B", played.requests[0].url)


# === [5.1] protocol: call and request ===============================================================================


class RequestTest(ProtocolCase):
    """What a call puts on the wire."""

    def sent(self, call, script=None, **settings):
        played = self.play(script or one(), call, **settings)
        self.assertIsNone(played.error)
        return played.params()

    def test_the_parameters_of_a_signed_call(self):
        with mock.patch.object(Played, "moment", REQUESTS_MOMENT + 0.9):
            params = self.sent(asking("listZones", name="x"))
        del params["signature"]
        expected = {"command": "listZones", "response": "json", "apiKey": "key1", "name": "x", "signatureVersion": "3"}
        self.assertEqual(dict(expected, expires="2026-01-01T00:10:00+0000"), params)

    @each("expiration, expected", (600, "2026-01-01T00:10:00+0000"), ("60", "2026-01-01T00:01:00+0000"),
          (0, "2026-01-01T00:00:00+0000"), (datetime.timedelta(days=1), "2026-01-02T00:00:00+0000"),
          (86400 * 365 * 8500, "9999-12-31T23:59:59+0000"))  # fmt: skip
    def test_the_expiry_of_a_request(self, expiration, expected):
        self.assertEqual(expected, self.sent(asking("listZones"), expiration=expiration)["expires"])

    @each("expiration", -1, "-1", datetime.timedelta(seconds=-1))
    def test_a_negative_expiration_means_no_expiry(self, expiration):
        params = self.sent(asking("listZones"), expiration=expiration)
        self.assertEqual(["apiKey", "command", "response", "signature"], sorted(params))

    @each("name", "expires", "Expires", "EXPIRES")
    @each("settings", {}, NEVER)
    def test_a_given_expires_is_kept(self, name, settings):
        params = self.sent(asking("listZones", **{name: "2030-01-01T00:00:00+0000"}), **settings)
        given = {key: text for key, text in params.items() if key.lower() == "expires"}
        self.assertEqual({"expires": "2030-01-01T00:00:00+0000"}, given)
        self.assertEqual("3", params["signatureVersion"])

    @each("name", "signature", "Signature", "SIGNATURE")
    def test_a_given_signature_is_dropped(self, name):
        params = self.sent(asking("listZones", **{name: "forged"}))
        self.assertEqual(["signature"], [key for key in params if key.lower() == "signature"])
        self.assertNotEqual(params["signature"], "forged")

    def test_control_arguments_are_never_sent(self):
        params = self.sent(asking("listZones", json=True, opcode_name="command", fetch_list=False, headers={"X-A": "1"},
                           fetch_result=False, id="1"), **NEVER)  # fmt: skip
        self.assertEqual(["apiKey", "command", "id", "response", "signature"], sorted(params))

    def test_names_that_look_like_settings_go_on_the_wire(self):
        given = {"timeout": "1", "mode": "2", "port": "3", "path": "4", "interval": "5", "method": "6", "retry": "7",
                 "key": "8", "name": "9", "endpoint": "10", "params": "11", "call": "12", "client": "13", "value": "14",
                 "verify": "15", "page_size": "16", "url": "17", "domain": "18", "username": "19", "session": "20",
                 "trace": "21", "data": "22"}  # fmt: skip
        params = self.sent(asking("listZones", **given))
        self.assertEqual(given, {name: params.get(name) for name in given})

    def test_opcode_name_renames_the_command(self):
        params = self.sent(asking("listZones", opcode_name="action"), **NEVER)
        self.assertEqual(("listZones", None), (params.get("action"), params.get("command")))

    def test_without_json_no_format_is_asked_for_but_one_may_be_given(self):
        self.assertNotIn("response", self.sent(asking("listZones", json=False)))
        self.assertEqual("xml", self.sent(asking("listZones", json=False, response="xml"))["response"])

    @each("name", "response", "Response")
    def test_with_json_a_given_response_gives_way(self, name):
        params = self.sent(asking("listZones", **{name: "xml"}))
        self.assertEqual(["json"], [text for key, text in params.items() if key.lower() == "response"])

    @each("name", "page", "Page", "PAGE")
    def test_page_without_pagesize_adds_500(self, name):
        params = self.sent(asking("listZones", **{name: 2}))
        self.assertEqual(("2", "500"), (params[name], params["pagesize"]))

    @each("name", "pagesize", "pageSize", "PAGESIZE")
    def test_a_pagesize_in_any_case_counts(self, name):
        params = self.sent(asking("listZones", page=1, **{name: 20}))
        self.assertEqual(["20"], [text for key, text in params.items() if key.lower() == "pagesize"])

    def test_without_page_no_pagesize_is_added(self):
        self.assertFalse({"page", "pagesize"} & set(self.sent(asking("listZones", page=None))))

    def test_headers_of_client_and_call_are_sent_and_the_call_s_win(self):
        played = self.play(one(), asking("listZones", headers={"x-b": "call", "X-C": 3}),
                           headers={"X-A": "client", "X-B": "client"})  # fmt: skip
        headers = {name.lower(): value for name, value in played.requests[0].headers.items()}
        self.assertEqual(("client", "call", "3"), (headers["x-a"], headers["x-b"], headers["x-c"]))
        self.assertEqual("cs/" + cs.__version__, headers["user-agent"])

    def test_a_header_may_be_taken_out_or_replaced(self):
        played = self.play(one(), asking("listZones", headers={"user-agent": "mine", "accept-encoding": None}))
        self.assertEqual([("user-agent", "mine")], list(played.requests[0].headers.items()))

    @each("endpoint, expected", (ENDPOINT, "gzip"), ("http://127.0.0.1:8080/client/api", "identity"),
          ("https://localhost/client/api", "identity"), ("http://[::1]:8080/client/api", "identity"))  # fmt: skip
    def test_gzip_is_asked_for_but_on_loopback(self, endpoint, expected):
        played = self.play(one(), asking("listZones"), endpoint=endpoint)
        self.assertEqual(expected, played.requests[0].headers["Accept-Encoding"])

    def test_an_endpoint_with_a_query_of_its_own(self):
        played = self.play(one(), asking("listZones"), endpoint="https://h/api?tenant=7#part")
        self.assertTrue(played.requests[0].url.startswith("https://h/api?tenant=7&apiKey="), played.requests[0].url)

    def test_without_credentials_nothing_is_signed(self):
        params = self.sent(asking("listZones", name="x"), key=None, secret=None)
        self.assertEqual({"command": "listZones", "name": "x", "response": "json"}, params)

    def test_the_same_call_gives_the_same_bytes(self):
        first = self.play(one(), asking("listZones", a=1, b=2), **NEVER).requests[0].url
        second = self.play(one(), asking("listZones", b=2, a=1), **NEVER).requests[0].url
        self.assertEqual(second, first)

    def test_what_a_call_was_given_is_not_changed(self):
        given = {"tags": [{"key": "a"}], "ids": [1, 2]}
        headers = {"X-A": "1"}
        self.sent(asking("listZones", headers=headers, **given))
        self.assertEqual(({"tags": [{"key": "a"}], "ids": [1, 2]}, {"X-A": "1"}), (given, headers))


class VerbTest(ProtocolCase):
    def verbs(self, script, call, **settings):
        return self.play(script, call, **settings).methods

    def test_get_unless_post_is_asked_for(self):
        self.assertEqual(["GET"], self.verbs(one(), asking("listZones")))
        self.assertEqual(["GET"], self.verbs(one(), asking("deployVirtualMachine")))
        for method in ("post", "POST"):
            self.assertEqual(["POST"], self.verbs(one(), asking("listZones"), method=method))

    def test_a_post_carries_everything_in_its_body(self):
        played = self.play(one(), asking("listZones", name="a b"), method="post")
        request = played.requests[0]
        self.assertEqual(ENDPOINT, request.url)
        self.assertEqual("application/x-www-form-urlencoded", request.headers["Content-Type"])
        self.assertIn(b"&name=a%20b&", request.body)
        self.assertIn("signature", played.params())

    def test_get_carries_no_body(self):
        request = self.play(one(), asking("listZones")).requests[0]
        self.assertIsNone(request.body)
        self.assertNotIn("Content-Type", request.headers)

    def test_secrets_go_by_post(self):
        names = ("password", "Password", "userdata", "userData", "privatekey", "privateKey", "secretkey",
                 "usersecretkey", "passphrase", "details[0].password", "cmkpassword", "sharedsecret",
                 "ipsecpresharedsecret", "oauthtoken")  # fmt: skip
        for name in names:
            with self.subTest(name=name):
                self.assertEqual(["POST"], self.verbs(one(), asking("updateUser", **{name: "x"})))
        self.assertEqual(["POST"], self.verbs(one(), asking("createUser", details={"password": "x"})))
        self.assertEqual(["GET"], self.verbs(one(), asking("listUsers", username="x", passwordenabled=True)))

    def test_login_is_always_posted(self):
        self.assertEqual(["POST"], self.verbs(one(), asking("login", username="u", password="p")))
        self.assertEqual(["POST"], self.verbs(one(), asking("login", username="u"), key=None, secret=None))

    def test_what_is_too_long_for_a_request_line_goes_by_post(self):
        """The server refuses a request line and headers of more than 8192 bytes."""
        seen = set()
        for length in list(range(7300, 8300, 60)) + [100, 20000]:
            for headers in (None, {"X-Long": "h" * 500}):
                request = self.play(one(), asking("listZones", name="x" * length), headers=headers).requests[0]
                seen.add(request.method)
                if request.method == "GET":
                    headers = [f"{name}: {value}" for name, value in request.headers.items()]
                    head = [f"GET {request.url} HTTP/1.1", *headers, "Host: cloud.invalid", ""]
                    self.assertLessEqual(len("\r\n".join(head)), 8192)
        self.assertEqual({"GET", "POST"}, seen)
        self.assertEqual(["GET"], self.verbs(one(), asking("listZones", name="x" * 7000)))
        self.assertEqual(["POST"], self.verbs(one(), asking("listZones", name="x" * 8200)))

    def test_enforced_post_is_learned_once_and_remembered(self):
        refusal = api_error(400, "State changing command createTags needs to be sent using POST request")

        def server(played, request):
            command = wire(request)["command"]
            return refusal if request.method == "GET" and not command.startswith("list") else one({"ok": command})[0]

        commands = ["createTags", "deployVirtualMachine", "listZones"]
        played = self.play(server, one_after_another(*map(asking, commands)))
        self.assertEqual([{"ok": command} for command in commands], played.value)
        self.assertEqual(["GET", "POST", "POST", "GET"], played.methods)
        self.assertEqual([], played.pauses)

    def test_the_reading_commands_stay_get_where_post_is_enforced(self):
        requests = []
        client = answered_by(lambda request: requests.append(request) or one()[0])
        client._server.post_only = True
        reading = (
            "listZones getVirtualMachineUserData queryAsyncJobResult findHostsForMigration quotaBalance quotaIsEnabled"
            " readyForShutdown verifyOAuthCodeAndGetUser isAccountAllowedToCreateOfferingsWithTags quotaStatement"
            " quotaSummary quotaTariffList cloudianIsEnabled").split()  # fmt: skip
        changing = "quotaUpdate deployVirtualMachine list prepareForShutdown relistThings".split()
        for command in reading + changing:
            with self.subTest(command=command):
                getattr(client, command)()
                self.assertEqual("GET" if command in reading else "POST", requests[-1].method)

    def test_a_server_that_keeps_asking_for_post_is_believed_once(self):
        script = [api_error(400, "State changing command x needs to be sent using POST request")]
        played = self.play(script, asking("createTags"))
        self.assertEqual(["GET", "POST"], played.methods)
        self.assertEqual(400, played.error.response.status_code)
        self.assertFalse(played.error.outcome_unknown)

    @each("text", "bad", "", None)
    def test_another_400_is_no_reason_to_send_again(self, text):
        self.assertEqual(["GET"], self.verbs([api_error(400, text)], asking("createTags"), retry=3))

    def test_the_integration_port_is_never_posted_to(self):
        """It reads the query string only."""
        unsigned = {"key": None, "secret": None}
        cases = [(asking("createUser", password="x"), {}), (asking("listZones", name="x" * 9000), {}),
                 (asking("createTags"), {"method": "post"}), (asking("deployVirtualMachine", userdata="eA=="), {})]
        for call, settings in cases:
            with self.subTest(settings=settings):
                self.assertEqual(["GET"], self.verbs(one(), call, **dict(unsigned, **settings)))
        script = [api_error(400, "State changing command x needs to be sent using POST request")]
        self.assertNotIn("POST", self.verbs(script, asking("createTags"), **unsigned))

    def test_characters_beyond_the_basic_plane_count_as_twelve_bytes(self):
        text = "\U0001f600" * 700
        self.assertEqual(["POST"], self.verbs(one(), asking("listZones", name=text)))
        self.assertEqual(["GET"], self.verbs(one(), asking("listZones", name=text[:500])))


# === [5.2] protocol: answer =========================================================================================


class DecodingTest(ProtocolCase):
    URL = f"Make sure endpoint URL '{ENDPOINT}' is correct."

    @each("document, expected",
          ({"listzonesresponse": {"count": 1, "zone": [{"id": "1"}]}}, {"count": 1, "zone": [{"id": "1"}]}),
          ({"restorevmresponse": {"a": 1}}, {"a": 1}), ({"null": {"a": 1}}, {"a": 1}), ({"": {"a": 1}}, {"a": 1}),
          ({"createSSHKeyPairResponse": {"a": 1}}, {"a": 1}), ({"listzonesresponse": {}}, {}), ({"r": []}, []),
          ({"r": "text"}, "text"), ({"r": None}, None), ({"r": 5}, 5),
          ({"r": {"success": False, "errortext": "x"}}, {"success": False, "errortext": "x"}))  # fmt: skip
    def test_the_value_under_the_single_key_whatever_its_name(self, document, expected):
        played = self.play([answer(document)], asking("listZones"))
        self.assertEqual((None, expected), (played.error, played.value))

    @each("kind", None, "application/json", "text/javascript; charset=UTF-8", "application/JSON",
          "application/javascript")  # fmt: skip
    def test_json_under_any_type_that_says_so_or_none(self, kind):
        response = answer({"r": {"a": 1}})
        del response.headers["Content-Type"]
        if kind:
            response.headers["Content-Type"] = kind
        self.assertEqual({"a": 1}, self.play([response], asking("listZones")).value)

    @each("content, expected", (b'{"r": {"t": "a\x01b\nc\x1bd"}}', {"t": "a\x01b\nc\x1bd"}),
          (b'\xef\xbb\xbf{"r": {}}', {}), (b'{"r": {"t": "\xff\xfe"}}', {"t": "\ufffd\ufffd"}),
          (b'{"r": {"t": "\\ud800"}}', {"t": "\ud800"}), (b'{"r": 1, "r": {"b": 2}}', {"b": 2}),
          (b' \n{"r": {"n": 123456789012345678901234567890}}\n ', {"n": 123456789012345678901234567890}))  # fmt: skip
    def test_what_json_parsers_trip_over_but_servers_send(self, content, expected):
        response = answer({})
        response.content = content
        played = self.play([response], asking("listZones"))
        self.assertEqual((None, expected), (played.error, played.value))

    def test_a_number_of_too_many_digits_is_refused(self):
        """Python 3.6 and early ones of 3.7 to 3.10 would take minutes for a million of them."""
        response = answer({})
        response.content = b'{"x": {"a": ' + b"9" * 4301 + b"}}"
        error = self.play([response], asking("listZones")).error
        self.assertEqual((cs.CloudStackException, "HTTP 200 OK"), (type(error), error.args[0]))
        response.content = b'{"x": {"a": ' + b"9" * 4300 + b"}}"
        self.assertEqual(10**4300 - 1, self.play([response], asking("listZones")).value["a"])

    def test_answers_that_are_not_cloudstack_s(self):
        malformed = ("HTTP 200 OK", "Malformed JSON document. " + self.URL)
        unexpected = ("Unexpected response from CloudStack", "a single top-level key was expected")
        cases = [
            (answer("<html>login</html>"), ("JSON (application/json) was expected, got 'text/html'",)),
            (answer("<r/>", headers={"Content-Type": "text/xml"}),
                ("JSON (application/json) was expected, got 'text/xml'",)),
            (answer("<html>", 504, "Gateway Time-out"), ("HTTP 504 Gateway Time-out", self.URL)),
            (answer("<html>", 404, "Not Found", AS_JSON), ("HTTP 404 Not Found", self.URL)),
            (answer("", 404, "Not Found"), ("HTTP 404 Not Found", self.URL)),
            (answer("", 204, "No Content"), ("HTTP 204 No Content", self.URL)),
            (answer("{", headers=AS_JSON), malformed), (answer("", 500, "500"), ("HTTP 500 500", self.URL)),
            (answer("not json", headers=AS_JSON), malformed), (answer('{"r": NaN}', headers=AS_JSON), malformed),
            (answer('{"r": -Infinity}', headers=AS_JSON), malformed), (answer("[" * 10000, headers=AS_JSON), malformed),
            (answer('{"a":' * 10000, headers=AS_JSON), malformed), (answer('{"r": 1} x', headers=AS_JSON), malformed),
            (answer('{"r": ' + "9" * 5000 + "x}", headers=AS_JSON), malformed), (answer({}), unexpected),
            (answer({"a": 1, "b": 2}), unexpected), (answer([1]), unexpected), (answer([]), unexpected),
            (answer("5", headers=AS_JSON), unexpected), (answer('"text"', headers=AS_JSON), unexpected),
            (answer("null", headers=AS_JSON), unexpected), (answer({"a": 1, "b": 2}, 500, "500"), unexpected)]
        for response, args in cases:
            with self.subTest(status=response.status_code, content=response.content[:30]):
                played = self.play([response], asking("listZones"))
                self.assertIs(type(played.error), cs.CloudStackException)
                self.assertEqual(args, played.error.args)
                self.assertEqual(response.status_code, played.error.response.status_code)
                self.assertEqual(response.text, played.error.response.text)

    @each("kind", "application/json", "text/html")
    def test_an_empty_200_is_an_error(self, kind):
        played = self.play([answer(b"", headers={"Content-Type": kind})], asking("deployVirtualMachine"))
        self.assertIsInstance(played.error, cs.CloudStackException)
        self.assertEqual("HTTP 200 OK", played.error.args[0])
        self.assertIn("empty", str(played.error))
        self.assertTrue(played.error.outcome_unknown)

    @each("code, key", (401, "errorresponse"), (401, "null"), (530, "errorresponse"), (530, "null"),
          *[(code, "listzonesresponse") for code in (400, 405, 429, 430, 431, 432, 503, *range(531, 538))])  # fmt: skip
    def test_the_server_s_own_errors(self, code, key):
        played = self.play([api_error(code, "text", key=key)], asking("listZones"))
        error = {"uuidList": [], "errorcode": code, "cserrorcode": 9999, "errortext": "text"}
        self.assertIs(type(played.error), cs.CloudStackApiException)
        message = f"HTTP {code} response from CloudStack"
        self.assertEqual(((message,), error), (played.error.args, played.error.error))
        self.assertEqual(f"{message}, error: {error}", str(played.error))
        self.assertEqual({key: error}, played.error.response.json())

    @each("value", "text", None, [1], 5, {"errortext": None}, {"errortext": ["x"]}, {"errortext": 5})
    @each("code", 400, 429, 431)
    def test_an_error_that_is_no_dict_is_what_stood_there(self, value, code):
        played = self.play([answer({"errorresponse": value}, code)], asking("listZones", fetch_list=True))
        self.assertIs(type(played.error), cs.CloudStackApiException)
        self.assertEqual(value, played.error.error)

    def test_a_type_of_html_does_not_hide_an_error_in_json(self):
        response = answer(json.dumps({"errorresponse": {"errorcode": 530}}), 530, "530")
        self.assertEqual({"errorcode": 530}, self.play([response], asking("listZones")).error.error)

    @each("code, options", (301, {}), (302, {"json": False}), (303, {}), (307, {}), (308, {}))
    @each("place, shown", ("https://other.example/login?apiKey=c4nary#c4nary", "https://other.example/login"),
          ("/client/?signature=c4nary", "/client/"), ("https://u:c4nary@h/x", "https://h/x"), ("http://[bad", ""),
          ("https://h/\x1b[2Jx", "h/"))  # fmt: skip
    def test_redirects_are_not_followed_and_named_without_their_query(self, code, options, place, shown):
        """5.2.0 follows them with the signed URL, to other hosts too."""
        script = [answer({"r": {"passed": "for a result"}}, code, "Found", {"Location": place})]
        played = self.play(script, asking("listZones", **options), retry=2)
        self.assertIs(type(played.error), cs.CloudStackException)
        self.assertEqual((1, f"HTTP {code} Found"), (len(played.requests), played.error.args[0]))
        self.assertIn(shown, str(played.error))
        self.assertNotIn("c4nary", str(played.error))
        self.assertNotIn("\x1b", str(played.error))

    @each("text", "<listzonesresponse/>", "", '{"a": 1, "b": 2}')
    def test_without_json_the_text_is_returned_as_it_is(self, text):
        self.assertEqual(text, self.play([answer(text)], asking("listZones", json=False)).value)

    def test_without_json_an_error_holds_the_text(self):
        played = self.play([answer("<errorresponse/>", 431, "431")], asking("listZones", json=False))
        self.assertIs(type(played.error), cs.CloudStackApiException)
        self.assertEqual("<errorresponse/>", played.error.error)
        self.assertEqual(("HTTP 431 response from CloudStack",), played.error.args)

    def test_every_status_from_300_to_399_with_a_location_is_a_redirect(self):
        for status, told in ((300, True), (399, True), (400, False), (299, False)):
            with self.subTest(status=status):
                script = [answer({"r": {}}, status, "x", {"Location": "http://elsewhere.invalid/"})]
                played = self.play(script, asking("listZones"))
                self.assertIs(told, "Redirects are not followed" in str(played.error))


class CollectorTest(unittest.TestCase):
    """Python's cyclic garbage collector rests while a long answer is decoded."""

    def setUp(self):
        self.addCleanup(gc.enable if gc.isenabled() else gc.disable)
        gc.enable()
        self.seen = []
        decoder = mock.Mock(decode=lambda text: self.seen.append(gc.isenabled()) or json.loads(text))
        patched = mock.patch.object(cs, "_JSON", decoder)
        patched.start()
        self.addCleanup(patched.stop)

    @each("size, expected", (10, True), (100000, False))
    def test_only_while_a_long_answer_is_decoded(self, size, expected):
        self.assertEqual({"r": "x" * size}, answer({"r": "x" * size}).json())
        self.assertEqual((expected, True), (self.seen.pop(), gc.isenabled()))

    def test_where_a_program_has_turned_it_off_it_stays_off(self):
        gc.disable()
        answer({"r": "x" * 100000}).json()
        self.assertEqual(([False], False), (self.seen, gc.isenabled()))

    def test_an_answer_that_cannot_be_decoded_leaves_it_as_it_was(self):
        with self.assertRaises(ValueError):
            answer("{" * 100000).json()
        self.assertTrue(gc.isenabled())

    def test_an_interrupt_just_as_it_is_stopped_leaves_it_on(self):
        really = gc.disable

        def interrupted():
            really()
            raise KeyboardInterrupt

        with mock.patch.object(gc, "disable", interrupted), self.assertRaises(KeyboardInterrupt):
            cs._parse_json(answer({"x": "y" * 200000}))
        self.assertTrue(gc.isenabled())

    def test_a_thread_that_comes_in_between_leaves_it_off_and_the_first_one_turns_it_on(self):
        def decode(text):
            self.seen.append(gc.isenabled())
            if len(self.seen) == 1:
                other = threading.Thread(target=answer({"r": "x" * 100000}).json)
                other.start()
                other.join(PATIENCE_OF_TESTS)
                self.seen.append(gc.isenabled())
            return json.loads(text)

        cs._JSON.decode = decode
        answer({"r": "x" * 100000}).json()
        self.assertEqual(([False, False, False], True), (self.seen, gc.isenabled()))


# === [5.3] protocol: retry ==========================================================================================

READS = ("listZones", "getVirtualMachineUserData", "queryAsyncJobResult", "findHostsForMigration", "ListZones")
CHANGES = ("deployVirtualMachine", "createTags", "getUploadParamsForVolume", "getUploadParamsForTemplate",
           "getDiagnosticsData", "listAndSwitchSamlAccount", "login", "prepareForShutdown", "assignListeners")


class RetryTest(ProtocolCase):
    @each("item", unsent(), lost(), silent(), answer("<html>", 503), api_error(429), api_error(503),
          answer("<html>", 502))  # fmt: skip
    @each("command", "listZones", "deployVirtualMachine")
    def test_nothing_is_retried_by_default(self, item, command):
        played = self.play([item, one()[0]], asking(command))
        self.assertEqual(1, len(played.requests))
        self.assertIsInstance(played.error, cs.CloudStackException)

    @each("item, reading, changing", (unsent(), True, True), (unsent(cs.CloudStackTimeoutError), True, True),
          (lost(), True, False), (silent(), True, False), (api_error(429, "please retry after [100] ms."), True, True),
          (answer("<html>", 429), True, True), (api_error(503, "maintenance"), True, True),
          (answer("<html>", 503), True, False), (answer({"error": "from a proxy"}, 503), True, False),
          (answer("<html>", 502), True, False), (answer("<html>", 504), True, False),
          (answer({"a": 1, "b": 2}, 503), True, False), (answer("<html>", 500), False, False),
          (answer("<html>", 404), False, False), (answer("<html>", 200), False, False),
          (answer(b"", 200), False, False), (answer("", 302, headers={"Location": "/"}), False, False),
          *[(api_error(code), False, False) for code in (400, 401, 405, 430, 431, 432, 511, 530, 531, 533, 537)])
    def test_what_is_tried_again(self, item, reading, changing):
        """(what happens, whether a reading command is sent again, whether a changing one is)"""
        for command, expected in (("listZones", reading), ("deployVirtualMachine", changing)):
            with self.subTest(command=command):
                played = self.play([item, one({"a": 1})[0]], asking(command), retry=1)
                self.assertEqual(2 if expected else 1, len(played.requests))
                self.assertEqual({"a": 1} if expected else None, played.value)

    @each("command", *READS + CHANGES)
    def test_what_counts_as_reading(self, command):
        played = self.play([silent(), one()[0]], asking(command), retry=1)
        self.assertEqual(2 if command in READS else 1, len(played.requests))

    @each("retry", 1, "3")
    @each("item", lost(), unsent(), answer("<html>", 502), api_error(429))
    def test_retry_bounds_the_number_of_attempts(self, retry, item):
        played = self.play([item], asking("listZones"), retry=retry)
        self.assertEqual((int(retry) + 1, int(retry)), (len(played.requests), len(played.pauses)))
        self.assertIsInstance(played.error, cs.CloudStackException)

    def test_pauses_grow_exponentially_up_to_30_seconds(self):
        played = self.play([lost()], asking("listZones"), retry=9)
        self.assertEqual([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0], played.pauses)
        self.assertEqual([30.0, 30.0], self.play([lost()], asking("listZones"), retry=2, retry_backoff=100).pauses)
        self.assertEqual([0.0, 0.0], self.play([lost()], asking("listZones"), retry=2, retry_backoff=0).pauses)

    @each("attempt", 0, 1, 5, 6, 32, 1100, 10**6)
    @each("first", 0.5, 1, 40, 1e300)
    def test_backoff_is_bounded_and_has_jitter(self, attempt, first):
        with mock.patch.object(cs, "_random", lambda: 0.0):
            low = cs.backoff(attempt, first)
        with mock.patch.object(cs, "_random", lambda: 1.0):
            high = cs.backoff(attempt, first)
        self.assertLess(0, low)
        self.assertLess(low, high)
        self.assertLessEqual(high, 30.0)
        self.assertGreater(len({round(cs.backoff(3, 0.5), 9) for _ in range(20)}), 1)

    @each("item, expected", (api_error(429, "limit; please retry after [7000] ms."), 7.0),
          (api_error(429, "please retry after 7500 ms"), 7.5), (api_error(429, headers={"Retry-After": "12"}), 12.0),
          (answer("<html>", 503, headers={"Retry-After": " 12 "}), 12.0),
          (answer("<html>", 503, headers={"retry-after": "Thu, 01 Jan 2026 00:00:09 GMT"}), 9.0),
          (answer("<html>", 502, headers={"Retry-After": "30"}), 30.0),
          (answer("<html>", 503, headers={"Retry-After": "Thu, 01 Jan 2020 00:00:00 GMT"}), 0.5),
          (answer("<html>", 503, headers={"Retry-After": "0"}), 0.5),
          (answer("<html>", 503, headers={"Retry-After": "soon"}), 0.5),
          (answer("<html>", 503, headers={"Retry-After": ""}), 0.5),
          (api_error(429, "please retry after [1] ms."), 0.5),
          (api_error(429, "please retry after [8000] ms.", headers={"Retry-After": "3"}), 8.0),
          (answer({"r": None}, 429), 0.5))  # fmt: skip
    def test_the_wait_a_server_asks_for(self, item, expected):
        played = self.play([item, one({"a": 1})[0]], asking("listZones"), retry=1)
        self.assertEqual(([expected], {"a": 1}), (played.pauses, played.value))

    @each("item", api_error(429, "please retry after [30001] ms."),
          answer("<html>", 503, headers={"Retry-After": "31"}),
          answer("<html>", 503, headers={"Retry-After": "Thu, 01 Jan 2026 00:00:31 GMT"}),
          api_error(503, headers={"Retry-After": "3600"}), answer("<html>", 429, headers={"Retry-After": "9" * 30}))
    @each("command", "listZones", "deployVirtualMachine")
    def test_a_wait_of_more_than_30_seconds_is_an_error_not_a_sleep(self, item, command):
        played = self.play([item, one()[0]], asking(command), retry=3)
        self.assertEqual((1, []), (len(played.requests), played.pauses))
        self.assertEqual(item.status_code, played.error.response.status_code)

    @each("value", "\xb2", "-5", "1.5", "1e999", "9" * 400, "9" * 5000, "Mon, 01 Jan 99999999 00:00:00 GMT",
          "Mon, 01 Jan 0000 00:00:00 GMT", "Mon, 99 Foo 2026", "Thu, 01 Jan 2026 00:00:00",
          "Thu, 01 Jan 2026 99:99:99 +9999", ",", "\xa0", "Thu, 01 Jan 2026 00:00:00 +99999999999999999999")
    def test_a_wait_that_cannot_be_read_does_no_harm(self, value):
        script = [answer("<html>", 503, headers={"Retry-After": value}), one({"a": 1})[0]]
        played = self.play(script, asking("listZones"), retry=1)
        self.assertTrue(played.value == {"a": 1} or isinstance(played.error, cs.CloudStackException), played.error)
        self.assertLessEqual(played.slept, 30.0)

    @each("digits", "9" * 400, "9" * 5000)
    def test_a_wait_beyond_all_measure_is_an_error(self, digits):
        script = [api_error(429, f"please retry after [{digits}] ms."), one()[0]]
        self.assertIsInstance(self.play(script, asking("listZones"), retry=1).error, cs.CloudStackException)

    def test_every_attempt_has_a_fresh_expiry(self):
        """5.2.0 computes it once for the whole series."""
        script = [a_while_later(60, answer("<html>", 502))] * 2 + one()
        played = self.play(script, asking("listZones"), retry=2, retry_backoff=0)
        self.assertEqual([f"2026-01-01T00:{minute}:00+0000" for minute in (10, 11, 12)], played.column("expires"))
        self.assertEqual(3, len(set(played.column("signature"))))

    def test_a_given_expires_is_kept_by_every_attempt(self):
        played = self.play([lost(), one()[0]], asking("listZones", expires="2030-01-01T00:00:00+0000"), retry=1)
        self.assertEqual({"2030-01-01T00:00:00+0000"}, {played.params(index)["expires"] for index in range(2)})

    @each("command", *READS)
    def test_a_kept_connection_that_died_is_replayed_once_for_reading_commands_whatever_retry_is(self, command):
        call = asking(command)
        played = self.play([lost(stale=True), one({"a": 1})[0]], call)
        self.assertEqual((2, [], {"a": 1}), (len(played.requests), played.pauses, played.value))
        played = self.play([lost(stale=True)], call)
        self.assertEqual(2, len(played.requests))
        self.assertIsInstance(played.error, cs.CloudStackConnectionError)

    @each("command", *CHANGES)
    @each("settings", {"retry": 5}, {"method": "post"})
    def test_a_kept_connection_that_died_is_never_replayed_for_changing_commands(self, command, settings):
        played = self.play([lost(stale=True), one()[0]], asking(command), **settings)
        self.assertEqual(1, len(played.requests))
        self.assertTrue(played.error.outcome_unknown)
        self.assertIn("outcome is unknown", str(played.error))
        self.assertIn(command, str(played.error))
        self.assertEqual(2, len(played.error.args))

    @each("item, unknown", (lost(), True), (silent(), True), (answer("<html>", 502), True),
          (answer("<html>", 503), True), (answer("<html>", 504), True), (answer("<html>", 500), True),
          (answer("<html>", 200), True), (answer(b""), True), (answer([1]), True), (answer("{", headers=AS_JSON), True),
          (unsent(), False), (api_error(429), False), (api_error(503), False), (api_error(401), False),
          (api_error(431), False), (api_error(533), False), (answer("<html>", 404), False),
          (answer("<html>", 414), False), (answer("", 302, headers={"Location": "/"}), False))  # fmt: skip
    def test_outcome_unknown_says_whether_a_change_may_have_happened(self, item, unknown):
        script = [afresh(item)]
        self.assertIs(self.play(script, asking("deployVirtualMachine")).error.outcome_unknown, unknown)
        self.assertFalse(self.play(script, asking("listZones")).error.outcome_unknown)

    @each("code, unknown", (502, True), (503, True), (504, True), (500, True), (401, False), (431, False))
    def test_outcome_unknown_does_not_depend_on_asking_for_json(self, code, unknown):
        played = self.play([answer("<html>", code)], asking("deployVirtualMachine", json=False))
        self.assertIs(played.error.outcome_unknown, unknown)

    def test_a_change_that_was_once_unsent_and_then_lost_is_unknown(self):
        played = self.play([unsent(), lost()], asking("deployVirtualMachine"), retry=5)
        self.assertEqual((2, True), (len(played.requests), played.error.outcome_unknown))

    def test_the_arguments_of_an_answered_error_stay_as_promised(self):
        played = self.play([answer("<html>", 504, "Gateway Time-out")], asking("deployVirtualMachine"))
        url = f"Make sure endpoint URL '{ENDPOINT}' is correct."
        self.assertEqual(("HTTP 504 Gateway Time-out", url), played.error.args)

    @each("error", ValueError("verify: no such file"), RuntimeError("x"))
    def test_other_exceptions_pass_untouched(self, error):
        played = self.play([error, one()[0]], asking("listZones"), retry=3)
        self.assertIs(type(played.error), type(error))
        self.assertEqual(1, len(played.requests))

    def test_the_time_allowed_for_an_exchange(self):
        request = self.play(one(), asking("listZones"), timeout="0.5").requests[0]
        self.assertEqual((0.5, 5.0), (request.timeout, request.total))


# === [5.4] protocol: session ========================================================================================


class LoginTest(ProtocolCase):
    def test_without_cookies_no_cookie_header_hides_those_that_a_session_keeps(self):
        bare = answer({"loginresponse": {"sessionkey": "SK"}})
        played = self.play([bare, one()[0]], asking("listZones"), **USER)
        self.assertEqual("SK", played.params()["sessionkey"])
        self.assertNotIn("Cookie", played.requests[-1].headers)

    def test_the_first_call_logs_in_by_post_and_carries_key_and_cookies(self):
        played = self.play([login_answer(), one({"a": 1})[0]], asking("listZones", name="x"), **USER)
        self.assertEqual(({"a": 1}, ["login", "listZones"]), (played.value, played.commands))
        expected = {"command": "login", "username": "admin", "password": "pa~ss", "domain": "/", "response": "json"}
        self.assertEqual(expected, played.params(0))
        self.assertEqual(["POST", "GET"], played.methods)
        self.assertEqual(ENDPOINT, played.requests[0].url)
        self.assertNotIn("Cookie", played.requests[0].headers)
        self.assertEqual("JSESSIONID=J1; sessionkey=cookie-J1", played.requests[1].headers["Cookie"])
        expected = {"command": "listZones", "name": "x", "sessionkey": "SK/1+", "response": "json"}
        self.assertEqual(expected, played.params(1))

    def test_the_domain_is_sent(self):
        played = self.play([login_answer(), one()[0]], asking("listZones"), domain="/a/b", **USER)
        self.assertEqual("/a/b", played.params(0)["domain"])

    def test_a_session_never_carries_a_signature(self):
        def close(client):
            return client.aclose() if isinstance(client, cs.AIOCloudStack) else client.close()

        call = one_after_another(asking("listZones"), asking("deployVirtualMachine", userdata="eA=="), close)
        played = self.play([login_answer(), one()[0]], call, **USER)
        self.assertEqual(["login", "listZones", "deployVirtualMachine", "logout"], played.commands)
        for index in range(4):
            self.assertFalse({"signature", "apiKey", "expires", "signatureVersion"} & set(played.params(index)))
        self.assertEqual(["POST", "GET", "POST", "POST"], played.methods)
        self.assertEqual("SK/1+", played.params(3)["sessionkey"])
        self.assertEqual("JSESSIONID=J1; sessionkey=cookie-J1", played.requests[3].headers["Cookie"])

    @each("script, settings", (one(), {"key": None, "secret": None}), ([login_answer(), one()[0]], USER))
    def test_a_given_expires_is_kept_without_a_signature_too(self, script, settings):
        moment = "2030-01-01T00:00:00+0000"
        played = self.play(script, asking("createThing", expires=moment), **settings)
        self.assertEqual(moment, played.params().get("expires"))

    def test_close_without_a_session_sends_nothing(self):
        for settings in (USER, {}):
            played = self.play([AssertionError("sent")], lambda c: c.close(), **settings)
            self.assertEqual((None, []), (played.error, played.requests))

    def test_logging_out_twice_sends_one_logout(self):
        commands = []
        client = answered_by(lambda request: commands.append(wire(request)["command"]) or login_answer(), **LOGIN)
        with client:
            client.listZones()
        client.close()
        self.assertEqual(["login", "listZones", "logout"], commands)
        client.listZones()
        self.assertEqual(["login", "listZones"], commands[3:])

    @each("item", lost(), silent(), answer("<html>", 502), api_error(401))
    def test_a_logout_that_fails_is_no_error(self, item):
        script = [login_answer(), one()[0], item]
        client = answered_by(scripted(script), **LOGIN)
        client.listZones()
        client.close()
        self.assertEqual([], script)

    @each("command", "listZones", "deployVirtualMachine")
    def test_an_expired_session_is_renewed_once_for_reads_and_changes(self, command):
        script = [login_answer(), api_error(401), login_answer("SK2", "J2"), one({"a": 1})[0]]
        played = self.play(script, asking(command), **USER)
        self.assertEqual(({"a": 1}, ["login", command] * 2), (played.value, played.commands))
        self.assertEqual("SK2", played.params()["sessionkey"])
        self.assertEqual("JSESSIONID=J2; sessionkey=cookie-J2", played.requests[3].headers["Cookie"])

    def test_a_second_401_is_an_error(self):
        script = [login_answer(), api_error(401), login_answer("SK2", "J2"), api_error(401, "still")]
        played = self.play(script, asking("listZones"), retry=5, **USER)
        self.assertEqual((4, "still"), (len(played.requests), played.error.error["errortext"]))

    def test_a_401_without_a_session_is_not_tried_again(self):
        self.assertEqual(1, len(self.play([api_error(401)], asking("listZones"), retry=5).requests))

    def test_a_failed_login_is_the_server_s_error_and_not_repeated(self):
        played = self.play([api_error(531, "wrong password")], asking("deployVirtualMachine"), retry=5, **USER)
        self.assertEqual(["login"], played.commands)
        self.assertEqual("wrong password", played.error.error["errortext"])
        self.assertFalse(played.error.outcome_unknown)

    @each("item, again", (unsent(), True), (api_error(429), True), (api_error(503), True), (lost(), False),
          (silent(), False), (lost(stale=True), False), (answer("<html>", 502), False))  # fmt: skip
    def test_login_is_sent_again_only_where_the_server_did_not_run_it(self, item, again):
        played = self.play([item, login_answer(), one({"a": 1})[0]], asking("listZones"), retry=1, **USER)
        self.assertEqual(["login", "login", "listZones"] if again else ["login"], played.commands)

    @each("value", {}, {"sessionkey": 5}, {"sessionkey": None}, [], "text", None, {"sessionkey": "\ud800"})
    def test_a_login_answer_without_a_key_is_an_error(self, value):
        played = self.play([answer({"loginresponse": value}), one()[0]], asking("listZones"), **USER)
        self.assertIsInstance(played.error, cs.CloudStackException)
        self.assertEqual(["login"], played.commands)

    @each("script", [login_answer(), api_error(511, "2FA")], [api_error(511, "2FA")])
    def test_two_factor_authentication_says_what_to_do(self, script):
        played = self.play(script, asking("listZones"), retry=3, **USER)
        self.assertIsInstance(played.error, cs.CloudStackApiException)
        self.assertRegex(str(played.error), "two-factor.*API key")
        self.assertEqual(len(script), len(played.requests))

    def test_another_user_is_another_session(self):
        users = []

        def exchange(request):
            params = wire(request)
            if params["command"] == "login":
                users.append(params["username"])
                return login_answer("key-of-" + params["username"])
            return one({"as": params["sessionkey"]})[0]

        client = answered_by(exchange, **LOGIN)
        self.assertEqual({"as": "key-of-u"}, client.listZones())
        client.set_setting("username", "v")
        self.assertEqual({"as": "key-of-v"}, client.listZones())
        self.assertEqual(["u", "v"], users)

    def test_many_threads_log_in_once(self):
        commands, values = [], []  # to append is atomic

        def exchange(request):
            command = wire(request)["command"]
            commands.append(command)
            if command == "login":
                time.sleep(0.03)
                return login_answer()
            return one({"a": 1})[0]

        client = answered_by(exchange, **LOGIN)
        in_threads(8, lambda number: values.append(client.listZones()))
        self.assertEqual(([{"a": 1}] * 8, 1), (values, commands.count("login")))

    def test_another_domain_or_password_is_another_session(self):
        asked = []

        def exchange(request):
            asked.append(wire(request))
            return login_answer() if asked[-1]["command"] == "login" else one({"count": 1})[0]

        for name, value in (("domain", "/b"), ("password", "other")):
            asked.clear()
            client = answered_by(exchange, domain="/a", **LOGIN)
            client.listZones()
            client.set_setting(name, value)
            client.listZones()
            self.assertEqual([dict(LOGIN, domain="/a")[name], value],
                             [params[name] for params in asked if params["command"] == "login"])  # fmt: skip

    def test_the_domain_may_be_spelled_as_the_server_spells_it(self):
        for given, sent in (("ROOT", "/"), ("ROOT/sub", "/sub"), ("/sub", "/sub"), ("ROOTS", "ROOTS"), (None, "/")):
            played = self.play([login_answer(), one()[0]], asking("listZones"), **dict(USER, domain=given))
            self.assertEqual(sent, played.params(0)["domain"])

    def test_a_login_by_hand_in_another_case_logs_in_once(self):
        played = self.play([login_answer()], asking("Login", username="u", password="p"), **USER)
        self.assertEqual(["Login"], played.commands)


class SessionsAtOnceTest(JumpingCase):
    takes = 0.3  # seconds, to log in

    def client(self):
        return super().client(key=None, secret=None, **LOGIN)

    def server(self, params):
        return (self.takes, login_answer()) if params["command"] == "login" else one({"a": 1})[0]

    def test_many_calls_log_in_once(self):
        client = self.client()
        self.assertEqual([{"a": 1}] * 50, self.all_of(client.listZones() for _ in range(50)))
        self.assertEqual(1, self.count("login"))

    def test_who_waits_for_a_log_in_does_not_keep_looking(self):
        """5,000 calls that looked every 20 ms took a whole CPU."""
        client, self.takes = self.client(), 2.5
        with mock.patch.object(self.loop.clock, "select", wraps=self.loop.clock.select) as rounds:
            self.assertEqual([{"a": 1}] * 50, self.all_of(client.listZones() for _ in range(50)))
        self.assertLess(rounds.call_count, 20)

    def test_a_failed_login_is_shared_by_all_who_waited_for_it(self):
        """Wrong passwords in a row would lock the account."""
        self.server = lambda params: (0.3, api_error(531, "wrong"))
        client = self.client()
        errors = self.all_of(client.listZones() for _ in range(50))
        self.assertEqual({"wrong"}, {error.error["errortext"] for error in errors})
        self.assertEqual(1, len(self.requests))
        self.all_of([client.listZones()])
        self.assertEqual(2, len(self.requests), "a later call tries anew")

    def test_an_expired_session_is_renewed_once_for_all(self):
        keys = []

        def server(params):
            if params["command"] == "login":
                keys.append(f"key{len(keys)}")
                return login_answer(keys[-1])
            return one({"a": 1})[0] if params["sessionkey"] == "key1" else (2, api_error(401))

        self.server = server
        client = self.client()
        self.assertEqual([{"a": 1}] * 30, self.all_of(client.listZones() for _ in range(30)))
        self.assertEqual(2, len(keys))

    def test_whoever_logs_in_may_be_cancelled_without_hurting_the_others(self):
        client = self.client()

        async def use():
            tasks = [asyncio.ensure_future(client.listZones()) for _ in range(5)]
            await asyncio.sleep(0.1)
            tasks[0].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        outcomes = self.loop.run_until_complete(use())
        self.assertIsInstance(outcomes[0], asyncio.CancelledError)
        self.assertEqual([{"a": 1}] * 4, outcomes[1:])
        self.assertEqual(2, self.count("login"))

    def test_a_failure_shared_by_several_jobs_tells_each_its_own_id(self):
        logins = []

        def server(params):
            if params["command"] == "login":
                logins.append(1)
                return (0.3, login_answer() if len(logins) == 1 else api_error(531, "locked"))
            if params["command"] == "queryAsyncJobResult":
                return (1, api_error(401))
            return one({"jobid": "job-" + params["id"]})[0]

        self.server = server
        client = self.client()
        errors = self.all_of(client.startVirtualMachine(id=number) for number in range(3))
        self.assertEqual(["locked"] * 3, [error.error["errortext"] for error in errors])
        self.assertEqual(["job-0", "job-1", "job-2"], [error.jobid for error in errors])
        self.assertEqual(2, len(logins))


# === [5.5] protocol: pages ==========================================================================================


def list_server(total, count="total", limit=500, ignores=False, key="thing", rows=None):
    """A script: a list of `total` rows, with the habits that servers have.

    count: "total", "page" (the length of this page), a number, or None (missing); limit: default.page.size;
    ignores: pages and sizes are ignored."""
    everything = rows if rows is not None else rows_of(0, total)

    def serve(played, request):
        params = {name.lower(): text for name, text in wire(request).items()}
        if ("page" in params) != ("pagesize" in params):
            return api_error(431, "page and pagesize go together")
        size, page = int(params.get("pagesize", limit)), int(params.get("page", 1))
        if size > limit:
            return api_error(431, f"Page size can't exceed max allowed page size value: {limit}")
        found = everything if ignores else everything[(page - 1) * size : page * size]
        number = {"total": len(everything), "page": len(found)}.get(count, count)
        document = {} if number is None else {"count": number}
        if not everything:
            document = {}
        elif found:
            document[key] = found
        return answer({"listthingsresponse": document})

    return serve


def fetched(**params):
    return lambda client: client.listThings(fetch_list=True, **params)


def iterated(**params):
    def call(client):
        rows = client.iter_list("listThings", **params)
        return rows if hasattr(rows, "__aiter__") else list(rows)

    return call


each_way = each("how", fetched, iterated)


class PagesTest(ProtocolCase):
    def walk(self, script, call, expected, most, **settings):
        """A walk gives these rows in so many requests at most; what became of it."""
        played = self.play(script, call, **settings)
        self.assertEqual((None, expected), (played.error, played.value))
        self.assertLessEqual(len(played.requests), most)
        return played

    def both_ways(self, script, expected, requests, **params):
        """fetch_list and iter_list give the same rows, in order, in as many requests."""
        for how in (fetched, iterated):
            with self.subTest(how=how.__name__):
                played = self.walk(script, how(**params), expected, requests)
                self.assertEqual(requests, len(played.requests))

    def test_without_fetch_list_there_is_one_request_without_pages(self):
        played = self.play(list_server(1148), asking("listThings"))
        self.assertEqual((1, 1148, 500), (len(played.requests), played.value["count"], len(played.value["thing"])))
        self.assertFalse({"page", "pagesize"} & set(played.params()))

    def test_fetch_list_takes_the_strings_of_a_boolean(self):
        played = self.play(list_server(3), asking("listThings", fetch_list="false"))
        self.assertEqual({"count": 3, "thing": rows_of(0, 3)}, played.value)
        self.assertEqual(rows_of(0, 3), self.play(list_server(3), asking("listThings", fetch_list="true")).value)

    @each("total, requests", (0, 1), (1, 1), (499, 1), (501, 2), (1148, 3), (2600, 6))
    def test_every_page_is_fetched_in_order(self, total, requests):
        self.both_ways(list_server(total), rows_of(0, total), requests)

    @each("total", 500, 1000)
    @each_way
    def test_a_total_that_is_full_pages_needs_at_most_one_more_request(self, total, how):
        self.walk(list_server(total), how(), rows_of(0, total), total // 500 + 1)

    def test_pages_are_numbered_from_one_with_500_rows_each(self):
        played = self.play(list_server(1148), iterated())
        self.assertEqual((["1", "2", "3"], ["500"] * 3), (played.column("page"), played.column("pagesize")))

    def test_other_parameters_go_with_every_page(self):
        played = self.play(list_server(1148), iterated(keyword="a b", tags={"key": "x"}))
        self.assertEqual((["a b"] * 3, ["x"] * 3), (played.column("keyword"), played.column("tags[0].key")))

    def test_a_count_that_is_the_length_of_the_page(self):
        """5.2.0 stops at 500 of 1148."""
        self.both_ways(list_server(1148, count="page"), rows_of(0, 1148), 3)
        self.both_ways(list_server(7, count="page"), rows_of(0, 7), 1)
        self.both_ways(list_server(1000, count="page"), rows_of(0, 1000), 3)

    def test_a_missing_count(self):
        self.both_ways(list_server(1148, count=None), rows_of(0, 1148), 3)
        self.both_ways(list_server(1000, count=None), rows_of(0, 1000), 3)

    @each("count", 0, 1, -5, 10**6, "23", 23.0, True)
    @each_way
    def test_counts_that_are_wrong(self, count, how):
        self.walk(list_server(23, count=count), how(pagesize=10), rows_of(0, 23), 7)

    @each_way
    def test_a_count_that_is_too_low_ends_no_walk_while_pages_are_full(self, how):
        self.assertEqual(rows_of(0, 43), self.play(list_server(43, count=15), how(pagesize=10)).value)

    @each_way
    def test_a_count_beyond_all_measure_does_no_harm(self, how):
        self.walk(list_server(43, count=10**18), how(pagesize=10), rows_of(0, 43), 9)

    @each("total", 1, 9, 10, 11, 16, 20, 23)
    @each("count", "total", None, 10**6)
    @each_way
    def test_commands_that_ignore_pages_are_not_gathered_twice(self, total, count, how):
        """5.2.0 gathers duplicates."""
        played = self.walk(list_server(total, count=count, ignores=True), how(pagesize=10), rows_of(0, total), 5)
        if count != 10**6:
            self.assertEqual(2 if total == 10 else 1, len(played.requests))

    def test_rows_are_never_compared_by_id(self):
        """listTemplates has a row for every zone."""
        rows = [{"id": f"t{number // 3}", "zone": number % 3} for number in range(1200)]
        self.both_ways(list_server(1200, rows=rows), rows, 3)
        same = [{"id": "s"}] * 700
        self.both_ways(list_server(700, rows=same), same, 2)

    @each_way
    def test_a_page_whose_figures_move_is_known_by_its_ids(self, how):
        """A command that ignores `page`, and fills its page exactly, would be walked for ever (finding 10)."""
        def hosts(played, request):
            rows = [{"id": number, "name": "h", "cpuused": len(played.requests)} for number in range(10)]
            return answer({"r": {"count": 100, "host": rows}})

        played = self.play(hosts, how(pagesize=10))
        self.assertEqual(list(range(10)), [row["id"] for row in played.value])
        self.assertLessEqual(len(played.requests), 1 + cs.PAGES_AHEAD)

    @each_way
    def test_a_server_that_begins_anew_after_its_last_page(self, how):
        def around(played, request):
            first = (int(wire(request)["page"]) - 1) % 3 * 10
            rows = [{"id": number, "cpuused": len(played.requests)} for number in range(first, first + 10)]
            return answer({"r": {"host": rows}})

        played = self.play(around, how(pagesize=10))
        self.assertEqual(list(range(30)), [row["id"] for row in played.value])

    def test_the_same_ids_in_another_zone_are_other_rows(self):
        rows = [{"id": str(number % 10), "zoneid": number // 10, "isready": True} for number in range(40)]
        self.both_ways(list_server(40, rows=rows, count=None), rows, 5, pagesize=10)

    @each_way
    def test_no_walk_is_without_end(self, how):
        def endless(played, request):
            page = int(wire(request)["page"])
            return answer({"r": {"thing": rows_of(page * 2, page * 2 + 2)}})

        with mock.patch.object(cs, "MOST_PAGES", 50):
            error = self.play(endless, how(pagesize=2)).error
        self.assertIs(type(error), cs.CloudStackException)
        self.assertIn("more than 50 pages", str(error))

    @each("document", {}, {"count": 0}, {"count": 5}, {"thing": []}, {"count": 0, "thing": []})
    def test_an_empty_list(self, document):
        self.both_ways(one(document), [], 1)

    @each_way
    def test_past_the_last_page_there_is_a_count_without_a_list(self, how):
        script = [answer({"r": {"count": 500, "thing": rows_of(0, 500)}}), answer({"r": {"count": 500}})]
        self.assertEqual(rows_of(0, 500), self.play(script, how()).value)

    @each("key", "asyncjobs", "api", "dataStoreProvider", "LdapConfiguration", "stickinesspolicies")
    def test_the_list_s_name_does_not_matter(self, key):
        self.both_ways(list_server(3, key=key), rows_of(0, 3), 1)

    @each("document", {"capability": {"cloudstackversion": "4.23"}},
          {"templatepermission": {"id": "1", "account": ["a"]}}, {"success": True}, {"count": 1, "thing": {"id": "1"}},
          {"a": [1], "b": [2]}, "text", None, 5, [1, 2], [])  # fmt: skip
    def test_an_object_is_returned_as_it_is_after_one_request(self, document):
        """5.2.0 asks 250 pages of it."""
        for how, expected in ((fetched, document), (iterated, [document])):
            played = self.play([answer({"r": document})], how())
            self.assertEqual((None, expected, 1), (played.error, played.value, len(played.requests)))

    @each_way
    def test_a_lower_limit_is_learned_and_remembered(self, how):
        """5.2.0 fails with the 431."""
        played = self.play(list_server(450, limit=200), one_after_another(how(), how()))
        self.assertEqual([rows_of(0, 450)] * 2, played.value)
        self.assertEqual(1 + 3 + 3, len(played.requests))
        self.assertEqual(["200"] * 6 + ["500"], sorted(played.column("pagesize")))

    def test_a_learned_limit_is_what_a_bare_page_gets(self):
        call = one_after_another(fetched(), asking("listThings", page=2))
        played = self.play(list_server(450, limit=200), call)
        self.assertEqual(rows_of(200, 400), played.value[1]["thing"])

    def test_a_limit_below_a_given_page_size_is_gone_on_with(self):
        self.both_ways(list_server(450, limit=100), rows_of(0, 450), 6, pagesize=250)
        for how in (fetched, iterated):
            self.walk(list_server(450, limit=100), how(pagesize=200, page=2), rows_of(200, 450), 6)

    @each("limit, requests", ("0", 1), ("500", 1), ("501", 1), ("", 1), ("9" * 400, 1), ("9" * 5000, 1), ("3", 2))
    def test_a_limit_that_makes_no_sense_is_an_error_in_finite_requests(self, limit, requests):
        script = [api_error(431, "Page size can't exceed max allowed page size value: " + limit)]
        played = self.play(script, fetched())
        self.assertEqual((cs.CloudStackApiException, requests), (type(played.error), len(played.requests)))

    def test_another_431_is_an_error(self):
        played = self.play([api_error(431, "Unable to find zone 500")], fetched())
        self.assertEqual((cs.CloudStackApiException, 1), (type(played.error), len(played.requests)))

    def test_a_given_page_size_is_used(self):
        self.both_ways(list_server(25), rows_of(0, 25), 3, pagesize=10)
        self.both_ways(list_server(25), rows_of(0, 25), 3, pageSize="10")
        played = self.play(list_server(25), iterated(pageSize=10))
        self.assertEqual(["10"], [text for name, text in played.params().items() if name.lower() == "pagesize"])

    @each("params", {"page": 2, "pagesize": 10}, {"Page": "2", "pageSize": "10"})
    @each_way
    def test_a_given_page_is_where_the_walk_begins(self, params, how):
        self.walk(list_server(25), how(**params), rows_of(10, 25), 3)
        self.assertEqual(rows_of(500, 1148), self.play(list_server(1148), fetched(page=2)).value)

    @each("name", "page", "pagesize")
    @each("value", "x", 0, -1, "1.5")
    @each_way
    def test_a_page_that_is_no_number_is_refused_by_name(self, name, value, how):
        played = self.play([AssertionError("sent")], how(**{name: value}))
        self.assertIsInstance(played.error, ValueError)
        self.assertIn(repr(name), str(played.error))

    @each_way
    def test_an_error_in_the_middle_is_raised_and_ends_the_walk(self, how):
        def broken(played, request):
            page = wire(request)["page"]
            return api_error(530, "page " + page) if page in "34" else list_server(2600)(played, request)

        played = self.play(broken, how())
        self.assertEqual("page 3", played.error.error["errortext"])
        self.assertLessEqual(len(played.requests), 5)

    @each_way
    def test_every_page_is_retried_within_retry(self, how):
        def flaky(played, request):
            page = wire(request)["page"]
            return lost() if played.column("page").count(page) == 1 else list_server(2600)(played, request)

        played = self.play(flaky, how(), retry=1, retry_backoff=0)
        self.assertEqual((None, rows_of(0, 2600)), (played.error, played.value))
        self.assertEqual(12, len(played.requests))

    def test_every_page_has_a_fresh_expiry(self):
        """5.2.0 computes it once for the whole list."""
        played = self.play(a_while_later(300, list_server(1148)), iterated())
        self.assertEqual(3, len(set(played.column("expires"))))

    def test_iter_list_is_lazy(self):
        requests = []
        client = answered_by(lambda request: requests.append(request) or list_server(2600)(None, request))
        rows = client.iter_list("listThings")
        self.assertEqual([], requests)
        next(rows)
        self.assertEqual(1, len(requests))
        for _ in range(500):
            next(rows)
        self.assertEqual(2, len(requests))
        rows.close()
        self.assertEqual(2, len(requests))

    def test_iter_list_s_control_arguments(self):
        played = self.play(list_server(3), iterated(headers={"X-A": "1"}, opcode_name="command"))
        self.assertEqual((rows_of(0, 3), "1"), (played.value, played.requests[0].headers["X-A"]))
        self.assertNotIn("headers", played.params())

    def test_random_servers_give_all_rows_in_finite_requests(self):
        draw = random.Random(7)
        for _ in range(25):
            total, size = draw.choice([0, 1, 5, 9, 10, 11, 20, 39, 40, 41, 95]), draw.choice([1, 2, 5, 10, 40])
            habits = {"count": draw.choice(["total", "page", None]), "ignores": draw.random() < 0.3,
                      "limit": draw.choice([7, 50])}  # fmt: skip
            how = draw.choice([fetched, iterated])
            with self.subTest(total=total, size=size, how=how.__name__, **habits):
                most = 2 + total // min(size, habits["limit"]) + cs.PAGES_AHEAD
                self.walk(list_server(total, **habits), how(pagesize=size), rows_of(0, total), most)

    @each("command", "deployVirtualMachine", "resetThings", "getUploadParamsForVolume")
    def test_a_changing_command_is_sent_once_whatever_its_answer_looks_like(self, command):
        played = self.play([answer({"r": {"count": 3, "thing": [{"id": 1}]}})], asking(command, fetch_list=True))
        self.assertEqual(([command], {"count": 3, "thing": [{"id": 1}]}), (played.commands, played.value))
        played = self.play([], lambda client: client.iter_list(command))
        self.assertEqual((ValueError, []), (type(played.error), played.commands))

    def test_reading_commands_of_other_names_are_lists_too(self):
        played = self.play(list_server(1200), asking("quotaSummary", fetch_list=True))
        self.assertEqual(rows_of(0, 1200), played.value)

    @each_way
    def test_a_page_that_was_asked_for_begins_where_it_should_under_a_lower_limit_too(self, how):
        played = self.play(list_server(1000, limit=300), how(page=2, pagesize=500))
        self.assertEqual(rows_of(500, 1000), played.value)


class PagesAheadTest(JumpingCase):
    """Pages that are under way at once."""

    def setUp(self):
        super().setUp()
        self.thing = list_server(5000)

    def serve(self, params, seconds=1):
        request = mock.Mock(body=None, url="?" + urlencode({name: params[name] for name in ("page", "pagesize")}))
        return seconds, self.thing(None, request)

    def walk(self, call=None, **settings):
        self.server = getattr(self, "server_used", self.serve)
        client = self.client(**settings)
        (outcome,) = self.all_of([(call or fetched())(client)])
        return outcome

    def pages(self):
        return [int(params["page"]) for _, params, _ in self.requests]

    def test_at_most_four_overlap_and_only_after_the_first(self):
        self.assertEqual(rows_of(0, 5000), self.walk())
        self.assertEqual(4, self.most_flying)
        self.assertEqual(sorted(set(self.pages())), sorted(self.pages()))
        self.assertLessEqual(len(self.pages()), 11)
        moments = [moment for moment, _, _ in self.requests]
        self.assertEqual([0, 1, 1, 1, 1, 2], [moment - moments[0] for moment in moments[:6]])

    def test_answers_that_overtake_each_other_stay_in_order(self):
        self.server_used = lambda params: self.serve(params, seconds=5 - int(params["page"]) % 4)
        self.assertEqual(rows_of(0, 5000), self.walk())

    @each("total, pages", (400, [1]), (501, [1, 2]), (1148, [1, 2, 3]))
    def test_no_page_is_asked_for_that_the_count_does_not_promise(self, total, pages):
        self.requests.clear()
        self.thing = list_server(total)
        self.assertEqual(rows_of(0, total), self.walk())
        self.assertEqual(pages, sorted(self.pages()))

    @each("habits", {"count": "page"}, {"count": None}, {"count": "5000"})
    def test_nothing_overlaps_without_a_full_page_and_a_count_above_it(self, habits):
        self.most_flying = 0
        self.thing = list_server(2600, **habits)
        self.assertEqual(rows_of(0, 2600), self.walk())
        self.assertEqual(1, self.most_flying)

    def test_nothing_overlaps_with_a_session_object(self):
        self.assertEqual(rows_of(0, 5000), self.walk(session=mock.Mock()))
        self.assertEqual(1, self.most_flying)

    def test_nothing_overlaps_in_iter_list(self):
        async def collect(client):
            return [row async for row in client.iter_list("listThings")]

        self.assertEqual(rows_of(0, 5000), self.walk(collect))
        self.assertEqual(1, self.most_flying)

    def test_cancelling_ends_all_pages_under_way(self):
        self.server = self.serve
        client = self.client()

        async def use():
            task = asyncio.ensure_future(client.listThings(fetch_list=True))
            await asyncio.sleep(1.5)
            self.assertEqual(4, self.flying)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            self.assertEqual(0, self.flying)
            await asyncio.sleep(30)

        self.loop.run_until_complete(use())
        self.assertEqual(5, len(self.requests))

    def test_a_page_that_was_taken_is_never_dropped(self):
        """Where its thread was switched away just then, and another found the end (finding 04)."""
        class Slow(list):
            def __iter__(self):
                return map(self.taken, list.__iter__(self))

            @staticmethod
            def taken(page):
                if page == slow:
                    time.sleep(0.02)
                return page

            def __getitem__(self, index):
                found = list.__getitem__(self, index)
                return Slow(found) if isinstance(index, slice) else found

        sure_pages = cs._Walk._sure_pages
        client = answered_by(lambda request: list_server(50)(None, request))
        for slow in (10, 9, 5):
            with self.subTest(slow=slow):
                with mock.patch.object(cs._Walk, "_sure_pages", lambda walk: Slow(sure_pages(walk))):
                    self.assertEqual(rows_of(0, 50), client.listThings(fetch_list=True, pagesize=5))

    def test_threads_overlap_too(self):
        lock, state = threading.Lock(), {"now": 0, "most": 0}
        serve = list_server(5000)

        def exchange(request):
            with lock:
                state["now"] += 1
                state["most"] = max(state.values())
            time.sleep(0.01)
            with lock:
                state["now"] -= 1
            return serve(None, request)

        self.assertEqual(rows_of(0, 5000), answered_by(exchange).listThings(fetch_list=True))
        self.assertIn(state["most"], (2, 3, 4))


# === [5.6] protocol: jobs ===========================================================================================

SUBMITTED = answer({"startvirtualmachineresponse": {"jobid": "job-1"}})
PENDING = answer({"queryasyncjobresultresponse": {"jobid": "job-1", "jobstatus": 0}})


def looked(status=1, **more):
    return answer({"queryasyncjobresultresponse": dict({"jobid": "job-1", "jobstatus": status}, **more)})


MACHINE = {"virtualmachine": {"id": "vm"}}
DONE = looked(jobresult=MACHINE)


def started(**params):
    return lambda client: client.startVirtualMachine(**dict({"fetch_result": True}, **params))


TROUBLE = [silent(), lost(), lost(stale=True), unsent(), answer("<html>", 502), answer("<html>", 503),
           answer("<html>", 504), answer("<html>"), answer("<html>", 404), answer("<html>", 401), answer(b""),
           answer("{", headers=AS_JSON), answer("[" * 10000, headers=AS_JSON), answer([1]),
           api_error(429, "please retry after [10] ms."), api_error(503, "maintenance"), answer({"r": {}}),
           answer({"r": "text"}), answer({"r": {"jobstatus": "x"}}), answer({"r": None}),
           answer({"r": {"jobstatus": None}}), answer({"r": [0]}),
           answer('{"r": {"jobstatus": 1e999}}', headers=AS_JSON)]  # fmt: skip
GROWING = [0.1, 0.1, 0.1, 0.15, 0.225, 0.3375, 0.50625, 0.759375, 1.139063, 1.708594]  # pauses between looks


class JobsTest(ProtocolCase):
    def test_a_job_is_waited_for_and_its_result_returned(self):
        played = self.play([SUBMITTED, PENDING, PENDING, DONE], started(id="vm"))
        self.assertEqual(MACHINE, played.value)
        self.assertEqual(["startVirtualMachine"] + ["queryAsyncJobResult"] * 3, played.commands)
        self.assertEqual(["job-1"] * 3, played.column("jobid")[1:])
        self.assertEqual([0.1, 0.1], played.pauses)

    @each("interval, pauses", (2, GROWING + [2, 2]), ("5", GROWING + [2.562891, 3.844336]),
          (0.2, GROWING[:4] + [0.2] * 8), (0.05, [0.05] * 12), (0, []))  # fmt: skip
    def test_the_first_look_is_at_once_and_the_next_are_ever_farther_apart(self, interval, pauses):
        played = self.play([SUBMITTED] + [PENDING] * 12 + [DONE], started(), poll_interval=interval)
        self.assertEqual(pauses, played.pauses)
        self.assertEqual([], self.play([SUBMITTED, DONE], started(), poll_interval=interval).pauses)

    def test_without_fetch_result_the_job_s_id_is_returned(self):
        played = self.play([SUBMITTED], asking("startVirtualMachine", id="vm"))
        self.assertEqual(({"jobid": "job-1"}, 1), (played.value, len(played.requests)))

    @each("kind, settings, params, waits", (cs.CloudStack, {}, {}, False), (cs.AIOCloudStack, {}, {}, True),
          (cs.AIOCloudStack, {"fetch_result": False}, {}, False),
          (cs.AIOCloudStack, {"fetch_result": "false"}, {}, False),
          (cs.AIOCloudStack, {}, {"fetch_result": False}, False), (cs.AIOCloudStack, {}, {"fetch_result": "no"}, False),
          (cs.CloudStack, {"fetch_result": True}, {}, True), (cs.CloudStack, {}, {"fetch_result": "true"}, True),
          (cs.CloudStack, {"fetch_result": True}, {"fetch_result": None}, True))  # fmt: skip
    def test_the_async_client_waits_unless_told_not_to_and_the_other_does_not(self, kind, settings, params, waits):
        """5.2.0 waits in neither."""
        client = answered_by(scripted([SUBMITTED, DONE]), kind, poll_interval=0, **settings)
        outcome = client.startVirtualMachine(**params)
        outcome = run(outcome) if kind is cs.AIOCloudStack else outcome
        self.assertEqual(MACHINE if waits else {"jobid": "job-1"}, outcome)
        client.close()

    @each("more, expected", ({"jobresult": {"success": True}}, {"success": True}), ({}, {}), ({"jobresult": None}, {}),
          ({"jobresult": {}}, {}), ({"jobresult": "text", "jobresulttype": "text"}, "text"), ({"jobresult": [1]}, [1]),
          ({"jobresult": False}, False))  # fmt: skip
    @each("status", 1, "1")
    def test_results_of_every_shape(self, more, expected, status):
        played = self.play([SUBMITTED, looked(status, **more)], started())
        self.assertEqual((None, expected), (played.error, played.value))

    @each("status", 2, 3, "2", 4, -1)
    @each("more", {"jobresult": {"errorcode": 530, "errortext": "no capacity"}}, {}, {"jobresult": None},
          {"jobresult": "text"}, {"jobresultcode": 0}, {"jobresult": {}})  # fmt: skip
    def test_failures_of_every_shape(self, status, more):
        """5.2.0 polls for ever where there is no jobresult."""
        response = looked(status, **more)
        error = self.play([SUBMITTED, PENDING, response], started()).error
        whole = dict({"jobid": "job-1", "jobstatus": status}, **more)
        expected = whole if more.get("jobresult") is None else more["jobresult"]
        self.assertIs(type(error), cs.CloudStackApiException)
        self.assertEqual((("Job failure",), expected), (error.args, error.error))
        self.assertEqual(f"Job failure, error: {expected}", str(error))
        self.assertEqual(("job-1", response.json()), (error.jobid, error.response.json()))
        self.assertFalse(error.outcome_unknown)

    @each("document", {"id": "1"}, {"count": 1, "vm": [{"id": "1", "jobid": "other"}]}, {"jobid": "j", "jobstatus": 0},
          "text", [], {})  # fmt: skip
    def test_what_is_no_job_is_returned_as_it_is(self, document):
        played = self.play(one(document), started())
        self.assertEqual((document, 1), (played.value, len(played.requests)))

    def test_a_job_in_a_text_is_not_waited_for(self):
        played = self.play([answer('{"r": {"jobid": "j"}}')], started(json=False))
        self.assertEqual(('{"r": {"jobid": "j"}}', 1), (played.value, len(played.requests)))

    def test_a_query_for_a_job_is_not_waited_for_itself(self):
        played = self.play([PENDING], asking("queryAsyncJobResult", jobid="job-1", fetch_result=True))
        self.assertEqual((0, 1), (played.value["jobstatus"], len(played.requests)))

    def test_the_last_look_is_at_the_deadline(self):
        """5.2.0 overshoots it and leaves the look out."""
        played = self.play([SUBMITTED, PENDING], started(), job_timeout=5, poll_interval=1)
        self.assertEqual([1.0, 1.0, 0.721875], played.pauses[-3:])
        self.assertEqual((13, 5.0), (len(played.requests), played.slept))
        played = self.play([SUBMITTED] + [PENDING] * 10 + [DONE], started(), job_timeout="5")
        self.assertEqual((MACHINE, 5.0), (played.value, played.slept))

    def test_a_job_that_still_runs_at_the_deadline(self):
        error = self.play([SUBMITTED, PENDING], started(), job_timeout=5).error
        self.assertIsInstance(error, (cs.CloudStackJobTimeout, TimeoutError))
        self.assertNotIsInstance(error, cs.CloudStackApiException)
        self.assertEqual(("Timeout waiting for async job result", "job-1"), error.args)
        self.assertEqual((408, PENDING.json()), (error.response.status_code, error.response.json()))
        self.assertEqual(("job-1", 200), (error.jobid, PENDING.status_code))

    def test_a_deadline_without_any_answer_has_no_response(self):
        error = self.play([SUBMITTED, afresh(silent())], started(), job_timeout=20).error
        self.assertEqual(("Timeout waiting for async job result", "job-1"), error.args)
        self.assertEqual((None, "job-1", cs.CloudStackJobTimeout), (error.response, error.jobid, type(error)))

    @each("script, value", ([SUBMITTED, DONE], MACHINE), ([SUBMITTED, PENDING], None))
    def test_a_deadline_of_nothing_is_one_look(self, script, value):
        played = self.play(script, started(), job_timeout=0)
        self.assertEqual((value, 2, 0), (played.value, len(played.requests), played.slept))

    def test_a_look_that_takes_beyond_the_deadline_is_followed_by_the_last(self):
        played = self.play([SUBMITTED, a_while_later(10, PENDING), DONE], started(), job_timeout=5)
        self.assertEqual((MACHINE, 0), (played.value, played.slept))

    def test_no_look_may_take_much_longer_than_the_deadline(self):
        played = self.play([SUBMITTED, PENDING], started(), job_timeout=5, timeout=1)
        for request in played.requests[1:]:
            self.assertLessEqual(request.total, 6)
        self.assertLessEqual(played.requests[-1].total, 1)

    @each("item", *TROUBLE)
    @each("settings", {}, {"job_timeout": 100})
    def test_trouble_on_the_way_is_ridden_out(self, item, settings):
        """5.2.0 gives up on a 503 or an HTML page."""
        played = self.play([SUBMITTED, item, PENDING, item, DONE], started(), **settings)
        self.assertEqual((None, MACHINE), (played.error, played.value))

    @each("item", silent(), answer("<html>", 502), api_error(503), answer({"r": {}}))
    def test_without_a_deadline_ten_troubles_in_a_row_end_the_wait(self, item):
        played = self.play([SUBMITTED, afresh(item)], started(), retry=3)
        self.assertEqual(11, len(played.requests))
        self.assertEqual([2, 4, 8, 16, 30, 30, 30, 30, 30], played.pauses)
        self.assertIsInstance(played.error, cs.CloudStackException)
        self.assertNotIsInstance(played.error, cs.CloudStackJobTimeout)
        self.assertEqual("job-1", played.error.jobid)

    def test_a_good_look_begins_the_count_anew(self):
        script = [SUBMITTED] + ([answer("<html>", 502)] * 9 + [PENDING]) * 3 + [DONE]
        self.assertEqual(MACHINE, self.play(script, started()).value)

    def test_with_a_deadline_trouble_is_ridden_out_as_long_as_it_allows(self):
        played = self.play([SUBMITTED] + [answer("<html>", 502)] * 40 + [DONE], started(), job_timeout=3600)
        self.assertEqual(MACHINE, played.value)
        played = self.play([SUBMITTED, answer("<html>", 502)], started(), job_timeout=600)
        self.assertEqual(600, played.slept)
        self.assertEqual((cs.CloudStackJobTimeout, 408), (type(played.error), played.error.response.status_code))

    def test_a_wait_the_server_asks_for_is_kept_within_the_deadline(self):
        throttled = api_error(429, "please retry after [7000] ms.")
        self.assertEqual([7.0], self.play([SUBMITTED, throttled, DONE], started()).pauses)
        self.assertEqual([3.0], self.play([SUBMITTED, throttled, DONE], started(), job_timeout=3).pauses)

    @each("item", api_error(429, f"please retry after [{'9' * 400}] ms."),
          *[answer("<html>", 503, headers={"Retry-After": told}) for told in ("9" * 30, "\xb2", "86400",
                  "Mon, 01 Jan 99999 00:00:00 GMT")])  # fmt: skip
    def test_no_wait_the_server_asks_for_holds_a_job_for_ever(self, item):
        played = self.play([SUBMITTED, item, DONE], started())
        self.assertTrue(played.value or isinstance(played.error, cs.CloudStackException), played.error)
        self.assertLessEqual(max(played.pauses), 30.0)
        played = self.play([SUBMITTED, item, DONE], started(), job_timeout=60)
        self.assertLessEqual(played.slept, 60)

    @each("code", 401, 431, 432, 530, 531, 532, 533, 534, 535, 536, 537)
    def test_an_error_the_server_states_in_json_ends_the_wait(self, code):
        played = self.play([SUBMITTED, PENDING, api_error(code, "text")], started(), retry=5, job_timeout=100)
        self.assertEqual(3, len(played.requests))
        self.assertEqual((code, "job-1"), (played.error.error["errorcode"], played.error.jobid))
        self.assertFalse(played.error.outcome_unknown)

    def test_an_error_before_there_was_a_job_has_no_id(self):
        for item in (silent(), api_error(533), answer("<html>")):
            self.assertIsNone(self.play([item], started()).error.jobid)

    @each("error", ValueError("x"), RuntimeError("x"), MemoryError(), cs.CloudStackException("x"))
    def test_everything_raised_after_the_submission_carries_the_id(self, error):
        played = self.play([SUBMITTED, afresh(error)], started(), job_timeout=0)
        self.assertEqual("job-1", played.error.jobid)

    def test_an_interrupt_between_two_steps_of_a_wait_carries_the_job_s_id(self):
        """Where no step is under way, it is raised in the driver and not in the protocol."""
        really, steps = cs._advance, []

        def advance(*args):
            steps.append(really(*args))
            if len(steps) == 3:
                raise KeyboardInterrupt
            return steps[-1]

        script = [answer({"x": {"jobid": JOB}}), answer({"x": {"jobstatus": 0}})]
        client = answered_by(scripted(script), fetch_result=True)
        with mock.patch.object(cs, "_advance", advance), self.assertRaises(KeyboardInterrupt) as caught:
            client.deployVirtualMachine()
        self.assertEqual(JOB, caught.exception.jobid)

    @each("interruption", KeyboardInterrupt(), SystemExit(3))
    def test_ctrl_c_carries_the_id(self, interruption):
        client = answered_by(scripted([SUBMITTED, interruption]), poll_interval=0)
        with self.assertRaises(type(interruption)) as caught:
            client.startVirtualMachine(fetch_result=True)
        self.assertEqual("job-1", caught.exception.jobid)

    def test_ctrl_c_between_two_looks_carries_the_id(self):
        client = answered_by(lambda request: SUBMITTED)
        with mock.patch.object(cs, "_sleep", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt) as caught:
                client.startVirtualMachine(fetch_result=True)
        self.assertEqual("job-1", caught.exception.jobid)

    @each("jobid, expected", (5, "5"), ("a b/\xfc~", "a b/\xfc~"), ("", ""))
    def test_a_job_id_of_any_kind(self, jobid, expected):
        self.assertEqual(expected, self.play([answer({"r": {"jobid": jobid}}), DONE], started()).params()["jobid"])

    @each("jobid", "\x00", "\ud800", None, [], {}, True, 1.5)
    def test_what_cannot_be_a_job_id_does_no_harm(self, jobid):
        played = self.play([answer({"r": {"jobid": jobid}}), DONE], started())
        self.assertTrue(played.error is None or isinstance(played.error, cs.CloudStackException), played.error)

    def test_looks_are_sent_as_the_call_was(self):
        played = self.play([SUBMITTED, DONE], started(headers={"X-A": "1"}, opcode_name="action"), headers={"X-B": "2"})
        headers = played.requests[1].headers
        self.assertEqual(("1", "2"), (headers["X-A"], headers["X-B"]))
        self.assertEqual(("queryAsyncJobResult", None), (played.params()["action"], played.params().get("command")))
        self.assertEqual(["GET", "GET"], played.methods)
        played = self.play([SUBMITTED, DONE], started(), method="post")
        self.assertEqual(["POST", "POST"], played.methods)

    def test_every_look_has_a_fresh_expiry(self):
        given, later = "2030-01-01T00:00:00+0000", a_while_later(400, PENDING)
        played = self.play([SUBMITTED, later, later, DONE], started(expires=given))
        self.assertEqual((given, 3), (played.params(0)["expires"], len(set(played.column("expires")[1:]))))

    def test_a_session_that_expires_during_the_wait_is_renewed(self):
        script = [login_answer(), SUBMITTED, PENDING, api_error(401), login_answer("SK2"), PENDING, api_error(401),
                  login_answer("SK3"), DONE]  # fmt: skip
        played = self.play(script, started(), **USER)
        self.assertEqual((MACHINE, 3), (played.value, played.commands.count("login")))

    def test_the_settings_of_a_wait_may_change_while_it_lasts(self):
        clients = []

        def call(client):
            clients.append(client)
            return started()(client)

        def faster(played, request):
            clients[-1].poll_interval = 0.05
            return PENDING

        self.assertEqual([0.1, 0.05, 0.05], self.play([SUBMITTED, PENDING, faster, PENDING, DONE], call).pauses)

    def test_wait_job(self):
        played = self.play([PENDING, DONE], asking("wait_job", jobid="job-1"))
        self.assertEqual((MACHINE, ["queryAsyncJobResult"] * 2), (played.value, played.commands))
        error = self.play([looked(2)], asking("wait_job", jobid="job-1")).error
        self.assertEqual((("Job failure",), "job-1"), (error.args, error.jobid))
        error = self.play([PENDING], asking("wait_job", jobid="job-1"), job_timeout=5).error
        self.assertEqual((cs.CloudStackJobTimeout, "job-1"), (type(error), error.jobid))
        for jobid in ("\x00", ""):
            with self.subTest(jobid=jobid):
                played = self.play([api_error(431, "Unable to find the job")], asking("wait_job", jobid=jobid))
                self.assertIsInstance(played.error, (ValueError, cs.CloudStackApiException))

    def test_threads_that_wait_share_one_list(self):
        lock, commands, results = threading.Lock(), [], {}

        def exchange(request):
            params = wire(request)
            with lock:
                commands.append(params["command"])
                lists = commands.count("listAsyncJobs")
            if params["command"] == "listAsyncJobs":
                rows = [{"jobid": str(number)} for number in range(8)] if lists < 5 else []
                return answer({"r": {"count": len(rows), "asyncjobs": rows} if rows else {}})
            if params["command"] == "queryAsyncJobResult":
                return looked(jobresult={"job": params["jobid"]}) if lists >= 5 else PENDING
            return answer({"r": {"jobid": params["id"]}})

        client = answered_by(exchange, poll_interval=0.02, fetch_result=True)
        in_threads(8, lambda number: results.update({number: client.startVirtualMachine(id=number)}))
        self.assertEqual({number: {"job": str(number)} for number in range(8)}, results)
        self.assertGreater(commands.count("listAsyncJobs"), 4)

    def test_a_look_at_a_job_takes_ten_timeouts_at_most(self):
        played = self.play([SUBMITTED, PENDING, DONE], started(), timeout=3, job_timeout=1000)
        self.assertEqual([30, 30, 30], [request.total for request in played.requests])
        played = self.play([SUBMITTED, PENDING], started(), timeout=3, job_timeout=5)
        self.assertEqual(3, played.requests[-1].total)
        self.assertLessEqual(played.requests[1].total, 8)

    def test_trouble_that_lasts_for_hours_is_ridden_out(self):
        """Long enough for the growing distances to overflow, were they without a bound."""
        for settings in ({"poll_interval": 2}, {"poll_interval": 0}):
            script = [SUBMITTED] + [afresh(lost())] * 1100 + [DONE]
            played = self.play(script, started(), job_timeout=10**6, **settings)
            self.assertEqual((None, {"virtualmachine": {"id": "vm"}}), (played.error, played.value))
            self.assertEqual(cs.LONGEST_WAIT, max(played.pauses))


class JobsAtOnceTest(JumpingCase):
    """Many waiters of one client share what listAsyncJobs tells."""

    lasts = 20.0

    def setUp(self):
        super().setUp()
        self.ends, self.strangers, self.hidden, self.fails = {}, [], set(), set()
        self.listing = self.list_pending

    def list_pending(self, params):
        running = (job for job, end in self.ends.items() if self.loop.time() < end and job not in self.hidden)
        pending = self.strangers + sorted(running)
        size, page = int(params.get("pagesize", 500)), int(params.get("page", 1))
        rows = [{"jobid": job, "jobstatus": 0} for job in pending[(page - 1) * size : page * size]]
        document = {"count": len(pending), "asyncjobs": rows} if rows else ({"count": len(pending)} if pending else {})
        return answer({"listasyncjobsresponse": document})

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
        self.ends[jobid] = self.loop.time() + self.lasts * (1 + int(params["id"]) % 5 / 10)
        return answer({"r": {"jobid": jobid}})

    def start(self, number, client=None, **settings):
        client = client or self.client(**settings)
        return self.all_of(client.startVirtualMachine(id=index) for index in range(number))

    def check(self, number, **settings):
        outcomes = self.start(number, **settings)
        self.assertEqual([{"job": f"job-{index:04}"} for index in range(number)], outcomes)

    def test_fewer_than_four_are_asked_for_singly(self):
        self.check(3)
        self.assertEqual(0, self.count("listAsyncJobs"))

    def test_four_and_more_share_the_list(self):
        self.check(4)
        self.assertGreater(self.count("listAsyncJobs"), 3)
        self.assertLess(len(self.requests), 4 * 10)

    def test_many_jobs_cost_few_requests(self):
        self.check(120)
        self.assertLessEqual(self.count("queryAsyncJobResult"), 120 * 1.2)
        self.assertLessEqual(self.count("listAsyncJobs"), 2 * 16)

    def test_news_come_as_soon_as_by_single_looks(self):
        self.check(50)
        self.assertLessEqual(self.loop.time() - max(self.ends.values()), 2.5)

    def test_a_list_of_several_pages(self):
        self.strangers = [f"stranger-{number}" for number in range(1200)]
        self.check(40)
        self.assertLessEqual(self.count("queryAsyncJobResult"), 40 * 1.5)

    def test_far_too_many_jobs_of_others_are_not_read_over_and_over(self):
        self.strangers = [f"stranger-{number}" for number in range(50000)]
        self.check(10)
        self.assertLessEqual(self.count("listAsyncJobs"), 10)

    def test_jobs_the_list_leaves_out_are_asked_for_singly(self):
        self.hidden = {"job-0003", "job-0007"}
        self.check(10)
        others = [params["jobid"] for _, params, _ in self.requests if params["command"] == "queryAsyncJobResult"]
        self.assertGreater(others.count("job-0003"), 5)
        self.assertLessEqual(others.count("job-0001"), 2)

    def test_a_role_that_may_not_list_jobs_falls_back_to_single_looks(self):
        self.listing = lambda params: api_error(432, "unknown command")
        self.check(10)
        self.assertEqual(1, self.count("listAsyncJobs"))

    @each("listed", answer({"r": {"success": True}}), answer({"r": "x"}), answer("<html>"), api_error(401),
          api_error(530), answer([1]))  # fmt: skip
    def test_lists_of_no_use_fall_back_to_single_looks(self, listed):
        self.requests.clear()
        self.listing = lambda params, listed=listed: listed
        self.check(6)
        self.assertLessEqual(self.count("listAsyncJobs"), 2)

    @each("rows", [None, 5, "x", []], [{"jobid": None}, {"jobid": ["job-0001"]}, {}], [{"jobid": {"a": 1}}] * 3)
    def test_rows_of_any_shape_do_no_harm(self, rows):
        listed = answer({"r": {"count": len(rows), "asyncjobs": rows}})
        self.listing = lambda params, listed=listed: listed
        self.check(5)

    def test_passing_trouble_with_the_list_is_no_trouble_for_the_jobs(self):
        troubles = [silent(), lost(), answer("<html>", 502), api_error(503), api_error(429), unsent()]
        self.listing = lambda params: troubles.pop(0) if troubles else self.list_pending(params)
        self.check(10)
        self.assertEqual([], troubles)
        self.assertGreater(self.count("listAsyncJobs"), 7)

    def test_failures_tell_each_waiter_its_own(self):
        self.fails = {"job-0002", "job-0005"}
        outcomes = self.start(8)
        for index, outcome in enumerate(outcomes):
            jobid = f"job-{index:04}"
            if jobid in self.fails:
                self.assertEqual(({"errorcode": 530, "job": jobid}, jobid), (outcome.error, outcome.jobid))
            else:
                self.assertEqual({"job": jobid}, outcome)

    def test_whoever_reads_the_list_may_be_cancelled_without_hurting_the_others(self):
        current = getattr(asyncio, "current_task", None) or asyncio.Task.current_task
        cancelled = []

        def listing(params):
            if len(cancelled) < 3:
                cancelled.append(current())
                self.loop.call_later(0.005, cancelled[-1].cancel)
            return self.list_pending(params)

        self.listing = listing
        outcomes = self.start(10)
        self.assertEqual(3, sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes))
        self.assertEqual(7, sum(isinstance(outcome, dict) for outcome in outcomes))

    def test_a_cancelled_wait_carries_the_id_and_starts_no_further_request(self):
        client = self.client()

        async def use():
            caught = []

            async def one_job():
                try:
                    await client.startVirtualMachine(id=1)
                except asyncio.CancelledError as error:
                    caught.append(error)
                    raise

            task = asyncio.ensure_future(one_job())
            await asyncio.sleep(5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            before = len(self.requests)
            await asyncio.sleep(60)
            return caught[0].jobid, len(self.requests) - before

        self.assertEqual(("job-0001", 0), self.loop.run_until_complete(use()))
        self.assertEqual(0, len(client._server.jobs.waiting))

    def test_the_deadline_s_last_look_is_at_the_job_itself(self):
        self.lasts = 1000
        begun = self.loop.time()
        outcomes = self.start(10, job_timeout=7)
        for index, outcome in enumerate(outcomes):
            self.assertIsInstance(outcome, cs.CloudStackJobTimeout)
            self.assertEqual((f"job-{index:04}", 408), (outcome.jobid, outcome.response.status_code))
        self.assertLess(self.loop.time() - begun, 7.5)
        looks = [(params, at) for at, params, _ in self.requests if params["command"] == "queryAsyncJobResult"]
        last = {params["jobid"]: at - begun for params, at in looks}
        self.assertEqual(dict.fromkeys(self.ends, True), {jobid: 7 <= at < 7.2 for jobid, at in last.items()})

    def test_a_list_that_does_not_come_makes_nobody_miss_the_deadline(self):
        self.lasts = 1000
        self.listing = lambda params: (90, self.list_pending(params))
        begun = self.loop.time()
        outcomes = self.start(10, job_timeout=7)
        self.assertEqual({cs.CloudStackJobTimeout}, {type(outcome) for outcome in outcomes})
        self.assertLess(self.loop.time() - begun, 7 + 10 + 1)

    def test_finished_jobs_among_the_pending_ones_are_not_waited_for(self):
        """Servers up to 4.19 list both (finding 01)."""
        def listing(params):
            rows = [{"jobid": job, "jobstatus": int(self.loop.time() >= end)} for job, end in sorted(self.ends.items())]
            return answer({"r": {"count": len(rows), "asyncjobs": rows}})

        self.listing = listing
        self.check(10)
        self.assertLessEqual(self.loop.time() - max(self.ends.values()), 2.5)
        self.assertLessEqual(self.count("queryAsyncJobResult"), 10 * 3)

    def test_a_list_that_goes_on_showing_a_job_is_not_believed_for_ever(self):
        rows = lambda: [{"jobid": job, "jobstatus": 0} for job in self.ends]  # noqa: E731
        self.listing = lambda params: answer({"r": {"count": len(self.ends), "asyncjobs": rows()}})
        self.check(10)
        self.assertLessEqual(self.loop.time() - max(self.ends.values()), cs.OWN_LOOK * 2.0 + 2.5)

    def test_what_a_young_waiter_learns_is_known_to_the_old_ones_at_once(self):
        """By themselves they would look every 20 seconds by then."""
        client, known = self.client(poll_interval=20), {}

        async def one_job(number):
            (jobid,) = (await client.startVirtualMachine(id=number)).values()
            known[jobid] = self.loop.time()

        async def use():
            old = [asyncio.ensure_future(one_job(number)) for number in range(100, 120)]
            await asyncio.sleep(1)
            self.ends.update({job: 1015.0 + index / 100 for index, job in enumerate(sorted(self.ends))})
            await asyncio.sleep(13.9)
            young = asyncio.ensure_future(one_job(0))
            await asyncio.gather(*old)
            young.cancel()
            await asyncio.gather(young, return_exceptions=True)

        self.loop.run_until_complete(use())
        late = [known[jobid] - self.ends[jobid] for jobid in known if jobid != "job-0000"]
        self.assertEqual(20, len(late))
        self.assertLess(max(late), 0.5)

    def test_a_list_that_hangs_delays_no_result_for_long(self):
        self.listing = lambda params: (90, self.list_pending(params))
        known = {}
        client = self.client()

        async def one_job(number):
            (jobid,) = (await client.startVirtualMachine(id=number)).values()
            known[jobid] = self.loop.time()

        self.all_of(one_job(number) for number in range(20))
        self.assertLessEqual(max(known[jobid] - end for jobid, end in self.ends.items()), 4.5)

    def test_the_news_of_a_crowd_cost_a_request_each_tenth_of_a_second_at_most(self):
        """Jobs that are submitted all the time have somebody look soon all the time."""
        client = self.client()

        async def use():
            tasks = []
            for number in range(200):
                tasks.append(asyncio.ensure_future(client.startVirtualMachine(id=number)))
                await asyncio.sleep(0.05)
            await asyncio.gather(*tasks)

        begun = self.loop.time()
        self.loop.run_until_complete(use())
        self.assertLess(self.count("listAsyncJobs"), (self.loop.time() - begun) / 0.1)
        self.assertLess(self.count("queryAsyncJobResult"), 200 * 1.3)

    def test_waiters_are_forgotten_when_they_are_done(self):
        client = self.client()
        self.fails = {"job-0001"}
        self.start(6, client)
        self.assertEqual(0, len(client._server.jobs.waiting))

    def test_the_shared_list_is_tied_to_no_event_loop(self):
        client = self.client()
        for _ in range(2):
            self.loop.close()
            self.loop = JumpingLoop()
            with mock.patch.object(cs, "_clock", self.loop.time):
                client._server.jobs.asked_at = float("-inf")  # each of these loops has a clock of its own
                self.assertEqual(6, len([outcome for outcome in self.start(6, client) if isinstance(outcome, dict)]))

    def test_a_list_of_others_jobs_is_never_thought_useful_for_fewer_than_four(self):
        jobs = cs._JobList()
        for _ in jobs._read_rows(answered_by(list_server(10**4, key="asyncjobs")), cs._Call("listAsyncJobs", {})):
            self.fail("asked")
        self.assertEqual(jobs.FEWEST, jobs.needed)


# === [5.7] protocol: recovery =======================================================================================

UNKNOWN_JOB = api_error(431, "Unable to execute API command queryasyncjobresult due to invalid value.")
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z")
LOSSES = [afresh(silent()), afresh(lost()), answer("<html>", 502), answer("<html>", 504), answer("<html>", 500),
          answer("<html>"), answer(b""), answer(b"", headers={"Content-Type": "text/html"}), answer([1]),
          answer("{", headers={"Content-Type": "json"})]  # fmt: skip


class RecoveryTest(ProtocolCase):
    """recover: an answer that is lost is not a deployment that is lost."""

    def deploy(self, script, recover=True, call=None, **settings):
        return self.play(script, call or asking("deployVirtualMachine", name="x"), recover=recover, **settings)

    @staticmethod
    def known(status=0, **more):
        """queryAsyncJobResult's answer for whatever job is asked for."""
        def answered(played, request):
            job = dict({"jobid": wire(request)["jobid"], "jobstatus": status, "jobinstanceid": "vm-1"}, **more)
            return answer({"queryasyncjobresultresponse": job})

        return answered

    @each("command", "deployVirtualMachine", "getUploadParamsForVolume", "activateProject")
    def test_what_changes_something_carries_a_fresh_id_for_its_job(self, command):
        call = one_after_another(asking(command), asking(command))
        played = self.deploy([SUBMITTED], call=call)
        first, second = (played.params(index)["customjobid"] for index in (0, 1))
        self.assertTrue(UUID4.match(first) and UUID4.match(second) and first != second, (first, second))

    @each("command, recover, params", ("listZones", True, {}), ("queryAsyncJobResult", True, {"jobid": "1"}),
          ("deployVirtualMachine", False, {}), ("deployVirtualMachine", True, {"json": False}), ("logout", True, {}))
    def test_nothing_else_does(self, command, recover, params):
        self.assertNotIn("customjobid", self.deploy(one(), recover, asking(command, **params)).params())

    def test_the_library_sends_it_only_where_it_is_asked_to(self):
        self.assertNotIn("customjobid", self.play(one(), asking("deployVirtualMachine")).params())

    @each("name", "customjobid", "customJobId")
    def test_an_id_of_the_caller_s_own_is_kept(self, name):
        script = [lost(), self.known()]
        played = self.deploy(script, call=asking("deployVirtualMachine", **{name: "mine"}))
        self.assertEqual(("mine", "mine"), (played.params(0)[name], played.params(1)["jobid"]))
        self.assertEqual({"id": "vm-1", "jobid": "mine"}, played.value)

    @each("item", *LOSSES)
    def test_the_job_of_a_lost_answer_is_found(self, item):
        played = self.deploy([item, self.known()])
        self.assertIsNone(played.error)
        job = played.params(0)["customjobid"]
        self.assertEqual({"id": "vm-1", "jobid": job}, played.value)
        self.assertEqual(["deployVirtualMachine", "queryAsyncJobResult"], played.commands)
        self.assertEqual((job, []), (played.params(1)["jobid"], played.pauses))

    def test_and_waited_for_as_ever(self):
        done = self.known(1, jobresult={"virtualmachine": {"id": "vm-1"}})
        call = asking("deployVirtualMachine", fetch_result=True)
        played = self.deploy([lost(), self.known(), self.known(), done], call=call)
        self.assertEqual({"virtualmachine": {"id": "vm-1"}}, played.value)
        self.assertEqual(["deployVirtualMachine"] + ["queryAsyncJobResult"] * 3, played.commands)
        failed = self.known(2, jobresult={"errorcode": 530, "errortext": "full"})
        error = self.deploy([lost(), failed], call=call).error
        self.assertEqual((cs.CloudStackApiException, ("Job failure",)), (type(error), error.args))

    def test_a_job_without_an_entity_has_no_id(self):
        played = self.deploy([lost(), self.known(jobinstanceid=None)])
        self.assertEqual(["jobid"], list(played.value))

    def test_a_job_that_is_queued_a_little_later_is_found(self):
        played = self.deploy([lost(), UNKNOWN_JOB, UNKNOWN_JOB, UNKNOWN_JOB, self.known()])
        self.assertEqual(("vm-1", [0.1, 0.1, 0.1]), (played.value["id"], played.pauses))

    @each("item, kind", (afresh(silent()), cs.CloudStackTimeoutError), (afresh(lost()), cs.CloudStackConnectionError),
          (answer("<html>", 502), cs.CloudStackException), (answer("<html>"), cs.CloudStackException))  # fmt: skip
    def test_a_job_that_stays_unknown_is_the_first_error(self, item, kind):
        played = self.deploy([item, UNKNOWN_JOB], timeout=6)
        job, error = played.params(0)["customjobid"], played.error
        self.assertIs(type(error), kind)
        self.assertEqual((True, job), (error.outcome_unknown, error.jobid))
        self.assertIn(f"the server knows no job {job}; wait_job() or `cs --wait {job}`", str(error))
        self.assertEqual(2, len(error.args))
        self.assertTrue(6 <= played.slept <= 8, played.slept)
        self.assertEqual(1, played.commands.count("deployVirtualMachine"))

    def _play_one(self, *args):
        """As ever; each client draws the same ids, which the texts of errors name."""
        draw = random.Random(7)
        drawn = lambda: uuid.UUID(int=draw.getrandbits(128), version=4)  # noqa: E731
        with mock.patch("uuid.uuid4", drawn):
            return super()._play_one(*args)

    @each("item", *TROUBLE)
    def test_trouble_is_ridden_out_while_the_job_is_looked_for(self, item):
        played = self.deploy([lost(), item, item, UNKNOWN_JOB, item, self.known()])
        self.assertEqual((None, "vm-1"), (played.error, played.value["id"]))

    def test_trouble_breaks_a_row_of_answers_that_know_no_job(self):
        script = [lost()] + [UNKNOWN_JOB] * 9 + [silent()] + [UNKNOWN_JOB] * 3 + [self.known()]
        self.assertEqual("vm-1", self.deploy(script, timeout=6).value["id"])

    def test_trouble_that_does_not_end_is_the_first_error(self):
        played = self.deploy([lost(), afresh(answer("<html>", 502))])
        self.assertIs(type(played.error), cs.CloudStackConnectionError)
        self.assertEqual(1 + cs.PATIENCE, len(played.requests))
        self.assertIn("could not be asked for job", str(played.error))
        played = self.deploy([lost(), afresh(answer("<html>", 502))], job_timeout=20)
        self.assertEqual((cs.CloudStackConnectionError, 20), (type(played.error), played.slept))

    @each("code", 401, 432, 531)
    def test_an_answer_about_the_caller_ends_it(self, code):
        played = self.deploy([lost(), api_error(code)])
        self.assertEqual((cs.CloudStackConnectionError, 2), (type(played.error), len(played.requests)))
        self.assertTrue(played.error.outcome_unknown)

    @each("item", afresh(unsent()), api_error(530), api_error(431), api_error(401))
    def test_what_surely_did_not_run_is_not_looked_for(self, item):
        played = self.deploy([item])
        self.assertEqual((1, None), (len(played.requests), played.error.jobid))
        self.assertFalse(played.error.outcome_unknown)

    def test_what_may_be_sent_again_has_the_same_id_again(self):
        refused = api_error(400, "State changing command deployVirtualMachine needs to be sent using POST request")
        for script in ([unsent(), SUBMITTED], [api_error(429), SUBMITTED], [refused, SUBMITTED]):
            played = self.deploy(script, retry=1)
            self.assertEqual(played.params(1)["customjobid"], played.params(0)["customjobid"])

    @each("item", *LOSSES)
    def test_nothing_is_ever_sent_twice(self, item):
        played = self.deploy([item, UNKNOWN_JOB], retry=5, timeout=1)
        self.assertEqual(1, played.commands.count("deployVirtualMachine"))

    @each("script", [KeyboardInterrupt()], [lost(), KeyboardInterrupt()])
    def test_whoever_interrupts_it_gets_the_id(self, script):
        client = answered_by(scripted(script), recover=True)
        with self.assertRaises(KeyboardInterrupt) as caught:
            client.deployVirtualMachine()
        self.assertTrue(UUID4.match(caught.exception.jobid))

    def test_whoever_cancels_it_gets_the_id(self):
        gate = threading.Event()
        client = answered_by(lambda request: gate.wait(10) and SUBMITTED, cs.AIOCloudStack, recover=True)

        async def use():
            caught = []

            async def deploy():
                try:
                    await client.deployVirtualMachine()
                except asyncio.CancelledError as error:
                    caught.append(error)

            task = asyncio.ensure_future(deploy())
            await asyncio.sleep(0.05)
            task.cancel()
            await task
            gate.set()
            return caught[0].jobid

        self.assertTrue(UUID4.match(run(use())))
        client.close()


# === [7] clients ====================================================================================================


class Auditing(cs.CloudStack):
    """As programs override it; on module level, so that it can be pickled."""

    def _request(self, command, **params):
        self.__dict__.setdefault("seen", []).append(command)
        return super()._request(command, **params)


class AuditingAsync(cs.AIOCloudStack):
    async def _request(self, command, **params):
        self.__dict__.setdefault("seen", []).append(command)
        return await super()._request(command, **params)


class ClientObjectTest(ProtocolCase):
    @each("kind", *KINDS, Auditing)
    def test_copies_are_clients_of_their_own(self, kind):
        original = kind(ENDPOINT, "k", "s", timeout=3, verify="/ca.pem", cert="/c.pem", cert_key="/k.pem", retry=2,
                        expiration=60, headers={"X-A": "1"}, name="n", job_timeout=9, dangerous_no_tls_verify=True,
                        fetch_result=True)  # fmt: skip
        original._server.page_limit = 7
        self.assertIsNotNone(transport_of(original))
        original.own = [1]
        for index, copier in enumerate(COPIERS):
            with self.subTest(copier=index):
                twin = copier(original)
                self.assertIs(type(twin), kind)
                for setting in cs._CLIENT_SETTINGS.values():
                    self.assertEqual(original.get_setting(setting.name), twin.get_setting(setting.name), setting.name)
                self.assertEqual([1], twin.own)
                self.assertIsNot(transport_of(twin), transport_of(original))
                self.assertEqual(cs.PAGE_SIZE, twin._server.page_limit)
                twin.timeout = 4
                self.assertEqual(3, original.timeout)
        original.close()

    def test_a_copy_s_headers_are_its_own(self):
        original = cs.CloudStack(ENDPOINT, headers={"X-A": "1"})
        copy.deepcopy(original).headers["X-B"] = "2"
        self.assertEqual({"X-A": "1"}, original.headers)

    @both
    @each("name", "_private", "__len__", "__wrapped__", "_repr_html_", "_ipython_display_")
    def test_names_that_begin_with_an_underscore_are_attribute_errors(self, kind, name):
        client = kind(ENDPOINT)
        self.assertFalse(hasattr(client, name))
        self.assertRaises(AttributeError, getattr, client, name)

    def test_the_async_client_s_commands_are_coroutines_up_to_request(self):
        """So that tests of programs may replace _request, and a bad parameter is raised where it is awaited (09)."""
        self.assertTrue(inspect.iscoroutinefunction(cs.AIOCloudStack._request))
        client = cs.AIOCloudStack(ENDPOINT, "k", "s")

        async def use():
            calls = [client.deployX(bad=object()), client.deployX(bad=object()), client.wait_job("\x00")]
            return await asyncio.gather(*calls, return_exceptions=True)

        self.assertEqual([ValueError] * 3, [type(outcome) for outcome in run(use())])

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

    def test_settings_by_name(self):
        client = cs.CloudStack(ENDPOINT, "k", "s", username=None, timeout=3)
        client.set_setting("timeout", "4")
        client.set_setting("domain", "/sub")
        self.assertEqual((4, 4), (client.timeout, client.get_setting("timeout")))
        self.assertEqual("/sub", copy.copy(client).get_setting("domain"))
        for refused in (lambda: client.get_setting("nonesuch"), lambda: client.set_setting("nonesuch", 1)):
            self.assertRaises(KeyError, refused)

    def test_a_signature_is_made_when_the_request_is_sent(self):
        """A call that waits for a thread longer than `expiration` would be refused (finding 11)."""
        now = [float(REQUESTS_MOMENT)]
        sent = []

        def exchange(request):
            sent.append(wire(request)["expires"])
            now[0] += 100
            return one()[0]

        client = answered_by(exchange, cs.AIOCloudStack, concurrency=1, expiration=60)

        async def use():
            await asyncio.gather(client.listZones(), client.listZones())

        with mock.patch("time.time", lambda: now[0]):
            run(use())
        client.close()
        self.assertEqual(["2026-01-01T00:01:00+0000", "2026-01-01T00:02:40+0000"], sent)

    @both
    def test_positional_arguments_to_a_command_are_type_errors(self, kind):
        self.assertRaises(TypeError, kind(ENDPOINT).listZones, "name")

    def test_any_command_name_is_a_method(self):
        played = self.play(one({"a": 1}), asking("futureCommandOf2030", x=1))
        self.assertEqual((["futureCommandOf2030"], {"a": 1}), (played.commands, played.value))

    def listing(self, request):
        page = wire(request).get("page", "1")
        return answer({"r": {"count": 3, "zone": rows_of(0, 2) if page == "1" else rows_of(2, 3)}})

    def test_a_subclass_sees_every_command_but_no_page_poll_or_login(self):
        def exchange(request):
            command = wire(request)["command"]
            if command == "listZones":
                return self.listing(request)
            answers = {"login": {"sessionkey": "s"},
                       "queryAsyncJobResult": {"jobstatus": 1, "jobresult": {"done": True}}}  # fmt: skip
            return answer({"r": answers.get(command, {"jobid": "j"})})

        settings = {"username": "u", "password": "p", "poll_interval": 0}
        client = answered_by(exchange, Auditing, **settings)
        self.assertEqual(rows_of(0, 3), client.listZones(fetch_list=True, pagesize=2))
        self.assertEqual(rows_of(0, 3), list(client.iter_list("listZones", pagesize=2)))
        self.assertEqual({"done": True}, client.startVirtualMachine(id=1, fetch_result=True))
        self.assertEqual(["listZones", "listZones", "startVirtualMachine"], client.seen)
        client.close()

        client = answered_by(exchange, AuditingAsync, **settings)

        async def use():
            self.assertEqual(rows_of(0, 3), await client.listZones(fetch_list=True, pagesize=2))
            self.assertEqual(rows_of(0, 3), [row async for row in client.iter_list("listZones", pagesize=2)])
            self.assertEqual({"done": True}, await client.startVirtualMachine(id=1))
            await client.aclose()

        run(use())
        self.assertEqual(["listZones", "listZones", "startVirtualMachine"], client.seen)

    def test_a_subclass_may_change_the_parameters(self):
        class Tenant(cs.CloudStack):
            def _request(self, command, **params):
                return super()._request(command, **dict(params, tenant="7"))

        sent = []
        client = answered_by(lambda request: sent.append(wire(request)) or self.listing(request), Tenant)
        client.listZones()
        list(client.iter_list("listZones", pagesize=2))
        self.assertEqual(["7", "7", "7"], [params["tenant"] for params in sent])

    @both
    def test_a_client_can_be_used_again_after_close(self, kind):
        client = answered_by(lambda request: one({"a": 1})[0], kind)
        for _ in range(2):
            outcome = client.listZones()
            self.assertEqual({"a": 1}, run(outcome) if kind is cs.AIOCloudStack else outcome)
            client.close()
        client.close()

    def test_with_closes(self):
        with mock.patch.object(cs.CloudStack, "close") as close:
            with cs.CloudStack(ENDPOINT) as client:
                self.assertIsInstance(client, cs.CloudStack)
            self.assertEqual(1, close.call_count)

    def test_one_async_client_serves_several_event_loops_one_after_another(self):
        client = answered_by(lambda request: one({"a": 1})[0], cs.AIOCloudStack)
        self.assertEqual([{"a": 1}] * 3, [run(client.listZones()) for _ in range(3)])
        run(client.aclose())


class StoppedLoopTest(unittest.TestCase):
    """An event loop may be stopped at any moment, in the midst of what its task does for all (finding 12)."""

    def stop_in_the_midst_of(self, command, client, server):
        """Have a task of a loop that is then stopped send a command; returns the loop."""
        asked, gate = threading.Event(), threading.Event()

        def exchange(request):
            if wire(request)["command"] == command and not asked.is_set():
                asked.set()
                gate.wait(10)
            return server(wire(request))

        object.__setattr__(client, "_exchange", exchange)
        loop = asyncio.new_event_loop()

        async def begin():
            tasks = [asyncio.ensure_future(client.startThing(id=number)) for number in range(5)]
            while not asked.is_set():
                await asyncio.sleep(0.001)
            return tasks

        tasks = loop.run_until_complete(begin())
        gate.set()

        def end():
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.close()

        self.addCleanup(end)

    def test_one_that_logs_in_for_all_holds_nobody_up(self):
        client = cs.AIOCloudStack(ENDPOINT, fetch_result=False, **LOGIN)
        serve = lambda params: login_answer() if params["command"] == "login" else one({"a": 1})[0]  # noqa: E731
        with mock.patch.object(cs, "LEASE", 0.05):
            self.stop_in_the_midst_of("login", client, serve)
            self.assertEqual({"a": 1}, run(asyncio.wait_for(client.listZones(), 10)))

    def test_one_that_reads_the_list_of_jobs_for_all_holds_nobody_up(self):
        client = cs.AIOCloudStack(ENDPOINT, "k", "s", poll_interval=0.05)
        looks = collections.Counter()

        def serve(params):
            if params["command"] == "startThing":
                return answer({"r": {"jobid": params["id"]}})
            looks[params.get("jobid")] += 1
            if params["command"] == "listAsyncJobs":
                return answer({"r": {"count": 1, "asyncjobs": [{"jobid": "0", "jobstatus": 0}]}})
            return looked(int(looks[params["jobid"]] > 1), jobresult={"job": params["jobid"]})

        with mock.patch.object(cs, "LEASE", 0.05):
            self.stop_in_the_midst_of("listAsyncJobs", client, serve)
            self.assertEqual({"job": "new"}, run(asyncio.wait_for(client.startThing(id="new"), 10)))


# === [6] transport ==================================================================================================
# Real sockets on 127.0.0.1. A scripted server records every byte it is sent, and answers, pauses and breaks where a
# script says so; what it has recorded is what the tests judge by.

READ = object()  # take one whole request
HOLD = object()  # wait until the client has gone away
RESET = object()  # end the connection with a reset
AGAIN = object()  # start over with the first step

ATTACK_SEED = 20260101
ATTACK_RUNS = int(os.environ.get("CS_ATTACK_RUNS") or 160)  # broken connections that are tried; 16000 is all of them
PATIENCE_OF_TESTS = 30.0  # seconds after which something that should have happened by now has not


def until(condition, what="it"):
    """Wait for what another thread is about to do."""
    for _ in range(int(PATIENCE_OF_TESTS / 0.002)):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError(f"{what} did not happen")


async def until_async(condition, what="it"):
    for _ in range(int(PATIENCE_OF_TESTS / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"{what} did not happen")


async def gathered(calls):
    return await asyncio.gather(*calls)


class Received:
    """One request as it came: method, target, headers as (name, value) pairs, body, and its parameters decoded."""

    def __init__(self, head, body):
        lines = head.decode("latin-1").split("\r\n")
        self.line = lines[0]
        self.method, self.target, self.version = lines[0].split(" ")
        self.headers = [tuple(line.split(": ", 1)) for line in lines[1:] if line]
        self.body = body
        text = body.decode("ascii") if body else self.target.partition("?")[2]
        self.params = dict(parse_qsl(text, keep_blank_values=True))

    def all(self, name):
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name):
        return ", ".join(self.all(name)) or None


class Wire:
    """One connection, seen by the server."""

    def __init__(self, sock):
        self.sock = sock
        self.raw = b""  # all that came, as the TLS layer gave it
        self.taken = 0  # how much of it was read as requests
        self.requests = []
        self.ended = threading.Event()

    def more(self, most=65536):
        """Receive at most so many bytes; False where the client has gone away."""
        try:
            part = self.sock.recv(most)
        except OSError:
            part = b""
        self.raw += part
        return bool(part)

    def take(self):
        """The next whole request among what came, or None."""
        head, gap, rest = self.raw[self.taken :].partition(b"\r\n\r\n")
        if not gap:
            return None
        found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        length = int(found.group(1)) if found else 0
        if len(rest) < length:
            return None
        self.taken += len(head) + 4 + length
        self.requests.append(Received(head, rest[:length]))
        return self.requests[-1]

    def read_request(self, most=float("inf")):
        """The next request; None where the client has gone away, or where it is not whole after so many bytes."""
        end = self.taken + most
        while True:
            request = self.take()
            if request is not None:
                return request
            if len(self.raw) >= end or not self.more(int(min(65536, end - len(self.raw)))):
                return None

    def send(self, content):
        try:
            self.sock.sendall(content)
            return True
        except OSError:
            return False

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        return False


class ScriptedServer:
    """Plays a list of steps to each connection: the first list to the first one, and the last to all that follow.

    A step is bytes to send, a number of seconds to pause, an Event to wait for, READ, HOLD, RESET, AGAIN, an SSLContext
    to start TLS with, or a function of the Wire (which ends the script by returning False). A connection is closed
    after its last step."""

    def __init__(self, *scripts, tls=None, receive_buffer=None):
        self.scripts = list(scripts)
        self.tls = tls
        self.wires, self.threads, self.gates = [], [], []
        self.stopping = threading.Event()
        self.listener = socket.socket()
        if receive_buffer:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(128)
        self.port = self.listener.getsockname()[1]
        self._start(self._accept)

    @property
    def place(self):
        return f"127.0.0.1:{self.port}"

    @property
    def url(self):
        return f"{'https' if self.tls else 'http'}://{self.place}/client/api"

    @property
    def requests(self):
        return [request for wire in list(self.wires) for request in list(wire.requests)]

    @property
    def counts(self):
        """How many requests came over each connection."""
        return [len(wire.requests) for wire in list(self.wires)]

    @property
    def open_wires(self):
        return [wire for wire in list(self.wires) if not wire.ended.is_set()]

    def _start(self, function, *args):
        thread = threading.Thread(target=function, args=args, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            if self.stopping.is_set():
                sock.close()
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(PATIENCE_OF_TESTS)  # so that a client which waits for ever fails its test
            steps = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
            self.wires.append(Wire(sock))
            self._start(self._play, self.wires[-1], [self.tls] * bool(self.tls) + list(steps))

    def _play(self, wire, steps):
        try:
            index = 0
            while index < len(steps) and self._do(wire, steps[index]):
                index = bool(self.tls) if steps[index] is AGAIN else index + 1
        except (OSError, ValueError):
            pass  # what became of it shows in what the client says
        finally:
            wire.sock.close()
            wire.ended.set()

    def _do(self, wire, step):
        """One step; False where the script is over."""
        if step is READ:
            return wire.read_request() is not None
        if step is HOLD:
            while wire.more():
                pass
            return False
        if step is RESET:
            return wire.reset()
        if step is AGAIN:
            return True
        if isinstance(step, ssl.SSLContext):
            return self._start_tls(wire, step)
        if isinstance(step, bytes):
            return wire.send(step)
        if isinstance(step, threading.Event):
            self.gates.append(step)
            return not self.stopping.is_set() and step.wait(PATIENCE_OF_TESTS)
        if callable(step):
            return step(wire) is not False
        return not self.stopping.wait(step)

    @staticmethod
    def _start_tls(wire, context):
        plain = wire.sock
        try:
            wire.sock = context.wrap_socket(plain, server_side=True)
            return True
        except (OSError, ValueError):  # wrap_socket has taken the descriptor over, and closed it
            plain.close()
            return False

    def close(self):
        self.stopping.set()
        for gate in self.gates:
            gate.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()  # wakes accept()
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


DEPLOYED = deployment()


def reply(body=ZONES, status="200 OK", *headers, **options):
    """The bytes of an answer, whose body is bytes, or a document to send as JSON; length=False leaves Content-Length
    out, version is that of HTTP."""
    body = json.dumps(body).encode("utf-8") if isinstance(body, dict) else body
    lines = [f"HTTP/{options.get('version', '1.1')} {status}", "Content-Type: application/json;charset=UTF-8"]
    if options.get("length", True):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines + list(headers) + ["", ""]).encode("latin-1") + body


def gzipped(body=PACKED, **options):
    """An answer whose body is, or claims to be, packed already."""
    return reply(body, "200 OK", GZIP, **options)


def chunked(body=ZONES, size=20, last=b"0\r\n\r\n", headers=()):
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    content = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
    return reply(b"", "200 OK", "Transfer-Encoding: chunked", *headers, length=False) + content + last


SERVE = [READ, reply(), AGAIN]


def echo(wire):
    """Answer with the name that was asked for."""
    return wire.send(reply({"listzonesresponse": {"zone": [{"id": wire.requests[-1].params.get("name")}]}}))


def dripping(content, filler=b" "):
    """A step that sends a byte at a time, the content and then the filler, until the client has gone away."""

    def drip(wire):
        for byte in itertools.chain(content, itertools.cycle(filler)):
            if not wire.send(bytes([byte])):
                break
            time.sleep(0.0005)
        return False

    return drip


def paged(count):
    """A step that answers with the page that was asked for of so many rows."""

    def page(wire):
        size = int(wire.requests[-1].params.get("pagesize", 1))
        first = size * (int(wire.requests[-1].params.get("page", 1)) - 1)
        rows = [{"id": str(number)} for number in range(first, min(first + size, count))]
        return wire.send(reply({"r": {"count": count, "zone": rows}}))

    return page


# What must never be seen but on the wire, in any of the forms that it may have there.
CANARY_KEY = "CANARYkey-4f9a"
CANARY_SECRET = "CANARYsecret-77c1"
CANARY_PASSWORD = "CANARYpass%/+word-9d02"
CANARY_SESSION = "CANARYsession+key/51=="
CANARY_PROXY = "CANARYproxy-e6b3"
CANARY_TOKEN = "CANARYtoken-0c5d"
CANARIES = (CANARY_KEY, CANARY_SECRET, CANARY_PASSWORD, CANARY_SESSION, CANARY_PROXY, CANARY_TOKEN)


def forms_of(secret):
    """A secret as it is, percent-encoded in each way, and in base64 at any offset."""
    forms = {secret, cs.cs_encode(secret), quote_plus(secret), repr(secret)[1:-1], json.dumps(secret)[1:-1]}
    for offset in range(3):
        code = base64.b64encode(b"\0" * offset + secret.encode("utf-8")).decode("ascii").rstrip("=")
        forms.add(code[4 if offset else 0 : -4])
    return forms


def all_texts(error, seen=None):
    """Everything that a log, a traceback, a debugger's repr or a pickle could show of an exception."""
    seen = set() if seen is None else seen
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield str(error)
    yield repr(error)
    yield repr(error.args)
    yield repr({name: value for name, value in vars(error).items() if name != "response"})
    yield "".join(traceback.format_exception(type(error), error, error.__traceback__, chain=False))
    for linked in (error.__cause__, error.__context__, getattr(error, "reason", None)):
        if isinstance(linked, BaseException):
            yield from all_texts(linked, seen)


class TransportCase(Case):
    """A test with scripted servers, and clients (of this kind, if no other is named) whose credentials are canaries."""

    KIND = cs.CloudStack

    def setUp(self):
        Case.setUp(self)
        self.servers = []

    def serve(self, *scripts, **options):
        server = ScriptedServer(*scripts, **options)
        self.servers.append(server)
        self.addCleanup(server.close)
        return server

    def client(self, server=None, kind=None, **settings):
        kind = kind or self.KIND
        endpoint = server.url if isinstance(server, ScriptedServer) else server
        given = {"key": CANARY_KEY, "secret": CANARY_SECRET, "timeout": 5, "fetch_result": False}
        client = kind(endpoint, **dict(given, **settings))
        self.addCleanup(client.__exit__) if kind is cs.CloudStack else self.addCleanup(self._close, client)
        return client

    def pair(self, *scripts, kind=None, tls=None, **settings):
        """A server that plays these scripts, and a client of it."""
        server = self.serve(*scripts, tls=tls)
        return server, self.client(server, kind, **settings)

    @staticmethod
    def _close(client):
        threads = workers_of(client).threads
        client._state.close()
        for thread in threads:
            thread.join(PATIENCE_OF_TESTS)

    @staticmethod
    def call(client, command="listZones", **params):
        value = getattr(client, command)(**params)
        return run(value) if asyncio.iscoroutine(value) else value

    def fails(self, client, kind=cs.CloudStackConnectionError, command="listZones", **params):
        """Call, and return the exception, which is of that very class, can be pickled, and tells no secret."""
        try:
            self.fail(f"no exception, but {self.call(client, command, **params)!r}")
        except cs.CloudStackException as raised:
            error = raised
        self.assertIs(kind, type(error), repr(error))
        self.assert_tells_nothing(error)
        if error.response is None:
            self.assertNotIn("\n", str(error))
        return error

    def fails_unsent(self, client, kind=cs.CloudStackConnectionError, command="deployVirtualMachine", **params):
        """Call a command that changes something, and return the exception, which says that nothing was sent."""
        error = self.fails(client, kind, command, **params)
        self.assertEqual((False, True), (error.outcome_unknown, error.unsent))
        return error

    def fails_unknown(self, client, kind=cs.CloudStackConnectionError, command="deployVirtualMachine", **params):
        """Call a command that changes something, and return the exception, which says that it may have been done."""
        error = self.fails(client, kind, command, **params)
        self.assertEqual((True, False), (error.outcome_unknown, error.unsent))
        return error

    def refuses(self, function, *args, kind=ValueError, **options):
        """The exception, which tells no secret, that a function raises."""
        with self.assertRaises(kind) as caught:
            function(*args, **options)
        self.assert_tells_nothing(*all_texts(caught.exception))
        return caught.exception

    def assert_tells_nothing(self, *told):
        texts = []
        for item in told:
            if isinstance(item, BaseException):
                texts.extend(all_texts(item))
                copied = pickle.dumps(item)
                texts.append(copied.decode("latin-1"))
                self.assertEqual((type(item), str(item)), (type(pickle.loads(copied)), str(pickle.loads(copied))))
            else:
                texts.append(item)
        secrets = set(CANARIES)
        for server in self.servers:
            secrets.update(filter(None, (request.params.get("signature") for request in server.requests)))
        told = "\n".join(texts)
        for form in itertools.chain.from_iterable(map(forms_of, secrets)):
            self.assertNotIn(form, told)

    def assert_child(self, code, *args, flags=(), path=None, env=()):
        """Run Python code in a process of its own, which ends well and says nothing on standard error; its output."""
        env = dict(os.environ, PYTHONPATH=path or os.path.dirname(CS_PATH), **dict(env))
        status, out, err = Child([sys.executable, *flags, "-c", code, *map(str, args)], env=env).finish()
        self.assertEqual((0, b""), (status, err), out)
        return out.decode("utf-8")

    def share_contexts(self):
        """Read the system's CA certificates once for all clients of this test, which takes 30 ms each time."""
        patched = mock.patch.object(cs, "_make_context", functools.lru_cache(None)(cs._make_context))
        patched.start()
        self.addCleanup(patched.stop)

    def traced(self, client, command="listZones", **params):
        """What a call that may fail writes to standard error, which must tell no secret."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.suppress(cs.CloudStackException):
            self.call(client, command, **params)
        self.assert_tells_nothing(err.getvalue())
        return err.getvalue()


# Certificates, made once a run by the openssl program.

OPENSSL = shutil.which("openssl")
OPENSSL_CONFIG = """
[ req ]
distinguished_name = dn
[ dn ]
[ ca ]
default_ca = this
[ this ]
database = index.txt
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
unique_subject = no
[ any ]
commonName = supplied
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


class Certificates:
    """Files made by openssl, each a PEM file in `directory`; None where there is no openssl program."""

    made = None

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="cs-test-certificates-")
        atexit.register(shutil.rmtree, self.directory, True)
        self._write("config", OPENSSL_CONFIG)
        self._write("index.txt", "")
        self._write("serial", "01\n")
        for name in ("ca", "other_ca", "leaf"):
            self._openssl(f"ecparam -name prime256v1 -genkey -noout -out {name}.key")
        self._sign("ca", "ca", "authority")
        self._sign("other_ca", "other_ca", "authority")
        self._sign("self_signed", "leaf", "here")
        self._openssl("req -new -key leaf.key -config config -out leaf.csr -subj /CN=leaf")
        self._issue("good", "here", "-days 30")
        self._issue("expired", "here", "-startdate 20200101000000Z -enddate 20200201000000Z")
        self._issue("elsewhere", "elsewhere", "-days 30")
        self._openssl("ec -in leaf.key -aes128 -passout pass:letmein -out locked.key")
        self._write("both.pem", self.read("good.pem") + self.read("leaf.key"))
        os.mkdir(self.path("directory"))
        hash_of_ca = self._openssl("x509 -hash -noout -in ca.pem").strip()
        shutil.copy(self.path("ca.pem"), self.path(f"directory/{hash_of_ca}.0"))

    def path(self, name):
        return os.path.join(self.directory, name)

    def read(self, name):
        with open(self.path(name)) as file:
            return file.read()

    def _write(self, name, text):
        with open(self.path(name), "w") as file:
            file.write(text)

    def _openssl(self, args):
        status, out, err = Child([OPENSSL] + args.split(), cwd=self.directory).finish()
        if status:
            raise RuntimeError(err.decode())
        return out.decode()

    def _sign(self, name, key, extensions):
        """Make a certificate that is signed by its own key."""
        options = f"-key {key}.key -extensions {extensions} -out {name}.pem -subj /CN={name}"
        self._openssl("req -new -x509 -config config -days 30 " + options)

    def _issue(self, name, extensions, dates):
        options = f"-in leaf.csr -out {name}.pem -extensions {extensions} {dates}"
        self._openssl("ca -batch -notext -config config -cert ca.pem -keyfile ca.key " + options)

    def server(self, name="good", client_ca=None):
        """The context of a server that shows this certificate, and may demand one of its clients."""
        context = ssl.SSLContext(getattr(ssl, "PROTOCOL_TLS_SERVER", ssl.PROTOCOL_TLS))
        context.load_cert_chain(self.path(name + ".pem"), self.path("leaf.key"))
        if client_ca:
            context.load_verify_locations(self.path(client_ca + ".pem"))
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def certificates():
    if Certificates.made is None:
        Certificates.made = Certificates()
    return Certificates.made


def tls_and_ca(tls):
    """For a server its context and for a client the path of the CA certificate, both None without TLS."""
    return (certificates().server(), certificates().path("ca.pem")) if tls else (None, None)


with_and_without_tls = each("tls", *[False, True][: 2 if OPENSSL else 1])
needs_openssl = unittest.skipUnless(OPENSSL, "the openssl program, which makes the certificates, is not there")


class Clock:
    """A clock for cs that is set by hand, or moves a step each time it is looked at."""

    def __init__(self, step=0.0):
        self.now = 5000.0
        self.step = step

    def __call__(self):
        self.now += self.step
        return self.now


class KeptConnectionTest(TransportCase):
    """When a connection is used again, and when it is not."""

    SURPLUS = reply({"listzonesresponse": {"count": 1, "zone": [{"id": "smuggled"}]}})

    @both
    def test_a_connection_is_used_again(self, kind):
        server, client = self.pair(SERVE, kind=kind)
        self.assertEqual([RESULT] * 3, [self.call(client) for _ in range(3)])
        self.assertEqual([3], server.counts)

    def test_get_and_post_share_a_connection(self):
        server, client = self.pair(SERVE)
        client.listZones()
        client.method = "post"
        client.listZones(name="x")
        client.method = "get"
        client.listZones()
        self.assertEqual([["GET", "POST", "GET"]], [[r.method for r in wire.requests] for wire in server.wires])

    def test_errors_of_the_server_leave_the_connection_open(self):
        error = reply({"errorresponse": {"errorcode": 431, "errortext": "no"}}, "431 431")
        server, client = self.pair([READ, error, AGAIN])
        for _ in range(3):
            self.fails(client, cs.CloudStackApiException)
        self.assertEqual(1, len(server.wires))

    @each("name, content, kept", ("HTTP/1.1", reply(), True), ("chunked", chunked(), True),
          ("chunked with trailers", chunked(last=b"0\r\nX-Sum: 1\r\n\r\n"), True),
          ("HTTP/1.1, close", reply(ZONES, "200 OK", "Connection: close"), False),
          ("HTTP/1.1, Close", reply(ZONES, "200 OK", "Connection: Close"), False),
          ("HTTP/1.0", reply(version="1.0"), False),
          ("HTTP/1.0, keep-alive", reply(ZONES, "200 OK", "Connection: keep-alive", version="1.0"), True),
          ("after 100 Continue", b"HTTP/1.1 100 Continue\r\n\r\n" + reply(), True))  # fmt: skip
    def test_whether_it_is_used_again_is_the_servers_to_say(self, name, content, kept):
        server, client = self.pair([READ, content, AGAIN])
        for _ in range(2):
            self.assertEqual(RESULT, client.listZones())
        self.assertEqual(1 if kept else 2, len(server.wires))

    def test_after_an_answer_that_ends_with_the_connection(self):
        server, client = self.pair([READ, reply(length=False)])
        self.assertEqual([RESULT, RESULT], [client.listZones() for _ in range(2)])
        self.assertEqual(2, len(server.wires))

    def test_not_used_again_after_twenty_seconds(self):
        clock = Clock()
        with mock.patch.object(cs, "_clock", clock):
            server, client = self.pair(SERVE)
            client.listZones()
            clock.now += 19.5
            client.listZones()
            self.assertEqual(1, len(server.wires))
            clock.now += 20
            client.listZones()
            self.assertEqual(2, len(server.wires))
            until(server.wires[0].ended.is_set, "closing the old one")

    @both
    @with_and_without_tls
    def test_one_that_the_server_closed_meanwhile_is_noticed_before_use(self, kind, tls):
        context, ca = tls_and_ca(tls)
        server, client = self.pair([READ, reply()], kind=kind, tls=context, verify=ca)
        for _ in range(3):
            self.assertEqual(RESULT, self.call(client, "updateZone"))
            until(server.wires[-1].ended.is_set, "closing")
        self.assertEqual([1, 1, 1], server.counts)

    @each("name, steps", ("reset", [RESET]), ("said something", [b"HTTP/1.1 408 Request Timeout\r\n\r\n", HOLD]))
    def test_one_that_was_reset_or_that_said_something_unasked_is_noticed_before_use(self, name, steps):
        go_on = threading.Event()
        server, client = self.pair([READ, reply(), go_on] + steps, SERVE)
        client.listZones()
        ((sock, _),) = itertools.chain.from_iterable(transport_of(client)._idle.values())
        go_on.set()
        until(functools.partial(cs._has_news, sock), "noticing")
        self.assertEqual(RESULT, client.updateZone())
        self.assertEqual([1, 1], server.counts)

    @both
    def test_one_that_dies_unnoticed_is_replaced_once_for_a_reading_command(self, kind):
        with mock.patch.object(cs, "_has_news", lambda sock: False):
            server, client = self.pair([READ, reply(), READ], [READ, reply(), READ], [READ], kind=kind)
            self.call(client)
            self.assertEqual(RESULT, self.call(client))
            self.fails(client)  # the replay was on a fresh connection, and that one broke too: enough

    @both
    def test_one_that_dies_unnoticed_leaves_a_changing_command_unknown(self, kind):
        with mock.patch.object(cs, "_has_news", lambda sock: False):
            server, client = self.pair([READ, reply(), READ], SERVE, kind=kind, retry=3)
            self.call(client)
            self.assertIn("outcome is unknown", str(self.fails_unknown(client)))
            self.assertEqual(1, len(server.wires))

    @each("name, content, result", ("Content-Length", reply() + SURPLUS, RESULT), ("one byte", reply() + b"\n", RESULT),
          ("chunked", chunked() + SURPLUS, RESULT), ("gzip", gzipped() + SURPLUS, RESULT),
          ("204", b"HTTP/1.1 204 No Content\r\n\r\n" + SURPLUS, None))  # fmt: skip
    def test_bytes_beyond_an_answer_end_the_connection(self, name, content, result):
        server, client = self.pair([READ, content, HOLD], SERVE)
        if result is None:
            self.fails(client, cs.CloudStackException)
        else:
            self.assertEqual(result, client.listZones())
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual(2, len(server.wires))

    def test_the_one_used_last_is_used_next(self):
        events = [threading.Event() for _ in range(4)]
        arrived = iter(events[:2])

        def hold_back(wire):
            mine = next(arrived)
            mine.set()
            return events[2 + events.index(mine)].wait(PATIENCE_OF_TESTS)

        server, client = self.pair([READ, hold_back, reply(), READ, reply(), AGAIN])
        threads = []
        for index in range(2):
            threads.append(threading.Thread(target=client.listZones))
            threads[-1].start()
            self.assertTrue(events[index].wait(PATIENCE_OF_TESTS))
        for index in (1, 0):  # the first connection is the one used last
            events[2 + index].set()
            threads[index].join()
        client.listZones()
        self.assertEqual([2, 1], server.counts)

    def test_at_most_concurrency_connections_are_kept(self):
        together = threading.Barrier(6)

        def gather(wire):
            if len(wire.requests) == 1:
                together.wait(PATIENCE_OF_TESTS)

        server, client = self.pair([READ, gather, reply(), AGAIN], concurrency=2)
        in_threads(6, lambda number: client.listZones())
        until(lambda: len(server.open_wires) <= 2, "closing those that are too many")
        client.listZones()
        self.assertEqual(6, len(server.wires))

    def test_threads_share_a_client(self):
        """Each thread gets the answer to its own request, and there are no more connections than threads."""
        server, client = self.pair([READ, echo, AGAIN])
        wrong = []

        def work(number):
            for turn in range(10):
                name = f"{number}-{turn}"
                try:
                    got = client.listZones(name=name)
                except Exception as error:
                    got = error
                if got != {"zone": [{"id": name}]}:
                    wrong.append((name, got))

        in_threads(12, work)
        self.assertEqual([], wrong)
        self.assertEqual(120, len(server.requests))
        self.assertLessEqual(len(server.wires), 12)

    def test_another_endpoint_has_connections_of_its_own(self):
        one, other = self.serve(SERVE), self.serve(SERVE)
        client = self.client(one)
        for server in (one, other, one, other):
            client.endpoint = server.url
            client.listZones()
        self.assertEqual([(1, 2), (1, 2)], [(len(server.wires), len(server.requests)) for server in (one, other)])

    def test_close_and_with_close_the_connections_and_the_client_works_on(self):
        server = self.serve(SERVE)
        with self.client(server) as client:
            client.listZones()
        until(server.wires[0].ended.is_set, "closing")
        client.listZones()
        client.close()
        client.close()
        until(server.wires[1].ended.is_set, "closing")
        self.assertEqual(RESULT, client.listZones())

    def test_async_with_and_aclose_close_the_connections_and_the_client_works_on(self):
        server = self.serve(SERVE)

        async def work():
            async with self.client(server, cs.AIOCloudStack) as client:
                await client.listZones()
            await until_async(server.wires[0].ended.is_set, "closing")
            await client.listZones()
            await client.aclose()
            await until_async(server.wires[1].ended.is_set, "closing")
            return await client.listZones()

        self.assertEqual(RESULT, run(work()))

    def test_copies_have_connections_of_their_own(self):
        server, client = self.pair(SERVE)
        client.listZones()
        copied = pickle.loads(pickle.dumps(client))
        copied.listZones()
        copied.close()
        client.listZones()
        self.assertEqual([2, 1], server.counts)

    @each("error", KeyboardInterrupt, SystemExit, MemoryError)
    def test_an_interrupted_exchange_does_not_leave_its_connection_behind(self, error):
        server, client = self.pair(SERVE)
        with mock.patch.object(cs, "_read_body", side_effect=error):
            self.assertRaises(error, client.listZones)
        until(server.wires[0].ended.is_set, "closing")
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual(2, len(server.wires))


class BodyTest(TransportCase):
    """Answers, whole and broken."""

    MEMBERS = gzip.compress(ZONES[:9]) + gzip.compress(b"") + gzip.compress(ZONES[9:])

    def clients(self, content, **settings):
        """A client of each kind, each with a server that gives this answer once and closes, and then serves."""
        for kind in KINDS:
            yield self.pair([READ, content], SERVE, kind=kind, **settings)

    def assert_broken(self, content, detail, kind=cs.CloudStackConnectionError, **settings):
        """Both clients fail with this text, and go on over another connection."""
        for server, client in self.clients(content, **settings):
            error = self.fails_unknown(client, kind)
            self.assertIn(detail, str(error))
            self.assertEqual(RESULT, self.call(client))
            self.assertEqual(2, len(server.wires))

    def assert_result(self, content, **settings):
        for _, client in self.clients(content, **settings):
            self.assertEqual(RESULT, self.call(client))

    @each("name, content", *{"length": reply(), "chunked": chunked(), "one chunk": chunked(size=10000),
          "chunks of a byte": chunked(size=1),
          "chunk extensions and trailers": chunked(last=b"0;x=y\r\nX-A: b\r\nX-C: d\r\n\r\n"),
          "chunk sizes with zeros": chunked().replace(b"\r\n14\r\n", b"\r\n0000014\r\n"),
          "no end but the connection's": reply(length=False), "HTTP/1.0": reply(length=False, version="1.0"),
          "gzip": gzipped(), "gzip, chunked": chunked(PACKED, headers=[GZIP]),
          "gzip until the end": gzipped(length=False), "x-gzip": reply(PACKED, "200 OK", "Content-Encoding: X-GZIP"),
          "gzip of several members": gzipped(MEMBERS),
          "gzip of several members, chunks of a byte": chunked(MEMBERS, size=1, headers=[GZIP]),
          "identity": reply(ZONES, "200 OK", "Content-Encoding: identity"),
          "bare line feeds": reply().replace(b"\r\n", b"\n"), "no reason phrase": reply(ZONES, "200"),
          "headers without a space": reply(b"").replace(b": 0", b":%d" % len(ZONES)).replace(b": ", b":") + ZONES,
          "a byte order mark": reply(b"\xef\xbb\xbf" + ZONES)}.items())  # fmt: skip
    def test_every_framing_of_a_whole_answer(self, name, content):
        self.assert_result(content)

    def test_an_answer_in_drops(self):
        content = chunked(gzip.compress(ZONES), size=7, headers=[GZIP])
        server = self.serve([READ] + [content[index : index + 1] for index in range(len(content))])
        self.assertEqual(RESULT, self.client(server).listZones())

    def test_a_large_answer(self):
        rows = [{"id": str(number), "name": "x" * 1000} for number in range(2000)]
        body = json.dumps({"listzonesresponse": {"zone": rows}}).encode()
        cases = [reply(body), chunked(body, 100000), gzipped(gzip.compress(body, 1))]
        server, client = self.pair([READ, cases[0], READ, cases[1], READ, cases[2]])
        for _ in cases:
            self.assertEqual(rows, client.listZones()["zone"])
        self.assertEqual(1, len(server.wires))

    def test_closed_before_any_answer(self):
        self.assert_broken(b"", "closed without an answer")

    @each("name, content", *{"in the body": reply()[:-10], "before the body": reply()[: -len(ZONES)],
          "lying length": reply().replace(b"Content-Length: ", b"Content-Length: 9"), "in a chunk": chunked()[:-30],
          "before a chunk's size": chunked(last=b""), "before the last chunk": chunked(size=10000, last=b""),
          "in a chunk's size": chunked(last=b""), "no last chunk but garbage": chunked(last=b"zz\r\n"),
          "gzip in a length": gzipped()[:-10], "gzip until the end": gzipped(PACKED[:-10], length=False),
          "gzip, its length kept": gzipped(PACKED[:-10]), "gzip, only its head": gzipped(PACKED[:10]),
          "gzip, lying length": gzipped().replace(b"Content-Length: ", b"Content-Length: 9"),
          "gzip in a chunk": chunked(PACKED, 20, b"", [GZIP])[:-20]}.items())  # fmt: skip
    def test_closed_before_the_body_is_whole(self, name, content):
        self.assert_broken(content, "Broken answer")

    def test_what_ends_with_the_connection_is_told_broken_by_its_json(self):
        self.assert_broken(reply(length=False)[:-10], "Malformed JSON", cs.CloudStackException)

    @each("cut", b"H", b"HTTP/1.1", b"HTTP/1.1 20", b"\r\n")
    def test_closed_in_the_status_line(self, cut):
        self.assert_broken(cut, "not HTTP")

    @each("cut", b"", b"\r\nContent-Ty", b"\r\nContent-Type: application/json\r\n")
    def test_closed_in_the_headers(self, cut):
        self.assert_broken(b"HTTP/1.1 200 OK" + cut, "HTTP 200 OK", cs.CloudStackException)

    @both
    @each("name, steps", ("at once", [READ, RESET]), ("in the answer", [READ, reply()[:-5], RESET]))
    def test_reset_instead_of_an_answer(self, kind, name, steps):
        server, client = self.pair(steps, SERVE, kind=kind)
        error = self.fails_unknown(client)
        self.assertEqual([True] * 2, [isinstance(one, ConnectionError) for one in (error, error.__cause__)])
        self.assertEqual(RESULT, self.call(client))

    @each("name, content", *{"a greeting": b"220 mail.invalid ESMTP\r\n", "garbage": bytes(range(256)) * 4,
          "zeros": b"\0" * 1000, "another protocol": b"ICY 200 OK\r\n\r\n",
          "another version": b"HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\n{}",
          "a status that is no number": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\n{}",
          "a status too small": b"HTTP/1.1 99 OK\r\nContent-Length: 2\r\n\r\n{}",
          "a status too large": b"HTTP/1.1 1000 OK\r\nContent-Length: 2\r\n\r\n{}",
          "an endless status line": b"HTTP/1.1 200 " + b"x" * 70000,
          "an endless header line": b"HTTP/1.1 200 OK\r\nX-A: " + b"x" * 70000,
          "an endless header name": b"HTTP/1.1 200 OK\r\n" + b"x" * 70000,
          "too many headers": b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 200 + b"\r\n",
          "an endless chunk size": chunked(last=b"0" * 70000),
          "a TLS alert": b"\x15\x03\x01\x00\x02\x02\x46"}.items())  # fmt: skip
    def test_bytes_that_are_no_http(self, name, content):
        self.assert_broken(content, "Broken answer")

    def test_a_line_without_an_end_is_not_read_to_its_end(self):
        sent = []

        def pour(wire):
            while len(sent) < 3000 and wire.send(b"x" * 65536):
                sent.append(1)
            return False

        for head in (b"HTTP/1.1 200 OK\r\nX-A: ", chunked(last=b""), b""):
            with self.subTest(head=head[:20]):
                del sent[:]
                server = self.serve([READ, head, pour])
                self.fails(self.client(server))
                until(server.wires[0].ended.is_set, "giving up")
                self.assertLess(len(sent), 1000)

    def test_bad_gzip(self):
        packed, checksum = bytearray(PACKED), bytearray(PACKED)
        packed[len(packed) // 2] ^= 0xFF
        checksum[-6] ^= 0xFF
        for name, body in (("damaged", bytes(packed)), ("checksum", bytes(checksum)), ("none at all", ZONES),
                ("html", b"<html>"),
                ("a second member that ends early", gzip.compress(ZONES[:9]) + gzip.compress(ZONES[9:])[:-9]),
                ("a second member that is damaged", gzip.compress(ZONES[:9]) + bytes(packed)),
                ("members without end", gzip.compress(b"") * 20000 + gzip.compress(ZONES))):  # fmt: skip
            with self.subTest(name):
                self.assert_broken(gzipped(body), "Broken answer")

    @each("name, body", ("deflate", zlib.compress(ZONES)), ("br", b"\x0b\x02\x80" + ZONES[:9]))
    def test_an_encoding_nobody_asked_for_is_an_error(self, name, body):
        content = reply(body, "200 OK", "Content-Encoding: " + name)
        self.assert_broken(content, "Malformed JSON", cs.CloudStackException)

    def test_an_answer_may_not_expand_beyond_max_response_size(self):
        bomb = gzip.compress(b"[" * 30000000, 9)
        self.assertLess(len(bomb), 100000)
        cases = {"bomb": gzipped(bomb), "bomb in chunks": chunked(bomb, 1000, headers=[GZIP]),
            "bomb until the end": gzipped(bomb, length=False), "length": reply(b"x" * 100001),
            "chunks": chunked(b"x" * 100001, 5000), "until the end": reply(b"x" * 100001, length=False)}  # fmt: skip
        for name, content in cases.items():
            with self.subTest(name):
                self.assert_broken(content, "max_response_size", cs.CloudStackException, max_response_size=100000)

    def test_an_answer_of_just_max_response_size_is_fine(self):
        body = ZONES + b" " * 1000
        for content in (reply(body), chunked(body), gzipped(gzip.compress(body)), reply(body, length=False)):
            self.assert_result(content, max_response_size=len(body))

    def test_a_bomb_is_not_unpacked_far_beyond_the_limit(self):
        unpacked = []
        really = cs._Gunzip.unpack

        def watched(*args):
            part = really(*args)
            unpacked.append(len(part))
            return part

        bomb = gzip.compress(b"[" * 30000000, 9)
        server = self.serve([READ, reply(bomb, "200 OK", GZIP)])
        with mock.patch.object(cs._Gunzip, "unpack", watched):
            self.fails(self.client(server, max_response_size=100000), cs.CloudStackException)
        self.assertLess(sum(unpacked), 200000)

    @each("length", 10**12, 2**63, 10**30)
    def test_a_huge_length_is_refused_at_once(self, length):
        """Nothing of the body is waited for: the server holds back, and the time-out is far away."""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        server = self.serve([READ, head.encode(), HOLD])
        error = self.fails(self.client(server, timeout=1000), cs.CloudStackException)
        self.assertIn("max_response_size", str(error))

    @each("size", b"-1", b"-5", b"ffffffffffffffff", b"-ffffffffffffffff", b"1_0", b"+a", b"0x5")
    def test_lengths_that_are_none_cannot_get_past_max_response_size(self, size):
        read = []
        really = cs._Flight.readinto

        def counted(self, buffer):
            read.append(really(self, buffer))
            return read[-1]

        content = chunked(b"", last=size + b"\r\n" + b"x" * 3000000)
        server, client = self.pair([READ, content], max_response_size=1000)
        with mock.patch.object(cs._Flight, "readinto", counted):
            self.assertRaises(cs.CloudStackException, client.listZones)
        self.assertLess(sum(filter(None, read)), 1500000)

    @each("length", "-5", "x", "")
    def test_a_negative_or_unreadable_length_counts_as_none(self, length):
        self.assert_result(reply(ZONES, "200 OK", "Content-Length: " + length, length=False))

    @both
    @each("status", "204 No Content", "304 Not Modified")
    def test_statuses_without_a_body(self, kind, status):
        content = f"HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\n".encode()
        server, client = self.pair([READ, content, READ, reply()], kind=kind, timeout=2)
        error = self.fails(client, cs.CloudStackException)
        self.assertEqual("HTTP " + status, error.args[0])
        self.assertEqual((int(status[:3]), b""), (error.response.status_code, error.response.content))
        self.assertEqual(RESULT, self.call(client))
        self.assertEqual(1, len(server.wires))

    @each("interim", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\nX-A: b\r\n\r\n" * 3)
    def test_an_interim_answer_is_passed_over(self, interim):
        self.assert_result(interim + reply())

    def test_what_the_response_tells(self):
        page = "<h1>M\u00fcll</h1>".encode("utf-8")
        content = reply(gzip.compress(page), "502 Bad Gateway", "X-Node: a7", GZIP)
        for _, client in self.clients(content.replace(b"application/json", b"text/html")):
            response = self.fails(client, cs.CloudStackException).response
            self.assertEqual((502, "Bad Gateway"), (response.status_code, response.reason))
            self.assertEqual(("a7", "a7"), (response.headers["x-node"], response.headers.get("X-NODE")))
            self.assertEqual(("<h1>M\u00fcll</h1>", page), (response.text, response.content))
            self.assertRaises(ValueError, response.json)

    def test_what_follows_gzip_is_not_looked_at_again_and_again(self):
        gunzip = cs._Gunzip()
        self.assertEqual(ZONES, gunzip.unpack(PACKED + b"garbage", 10**6))
        for part in (b"\x1f more", b"x", b"\x1f\x8b"):
            self.assertEqual(b"", gunzip.unpack(part, 10**6))
        self.assertEqual((True, b"garbage"), (gunzip.is_whole(), gunzip._member.unused_data))


def full_listener(case):
    """A socket whose queue of connections is full: further ones are dropped, which keeps who connects waiting."""
    listener = socket.socket()
    case.addCleanup(listener.close)
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    for _ in range(4):
        filler = socket.socket()
        case.addCleanup(filler.close)
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
    return listener


class TimeoutTest(TransportCase):
    @each("name, steps", *{"no answer": [READ, HOLD], "in the status line": [READ, b"HTTP/1.1 2", HOLD],
          "in the headers": [READ, b"HTTP/1.1 200 OK\r\nX-A: b\r\n", HOLD], "in the body": [READ, reply()[:-3], HOLD],
          "in a chunk": [READ, chunked()[:-20], HOLD], "before the last chunk": [READ, chunked(last=b""), HOLD],
          "in gzip": [READ, gzipped()[:-3], HOLD],
          "before the end of the connection": [READ, reply(length=False), HOLD]}.items())  # fmt: skip
    def test_silence(self, name, steps):
        server, client = self.pair(steps, SERVE, timeout=0.03)
        error = self.fails_unknown(client, cs.CloudStackTimeoutError)
        self.assertIsInstance(error, TimeoutError)
        self.assertIsInstance(error.__cause__, OSError)
        self.assertIn("nothing for 0.03 s (timeout)", str(error))
        until(lambda: server.wires and server.wires[0].ended.is_set(), "hanging up")
        client.timeout = 5
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual(2, len(server.wires))

    def test_silence_towards_the_async_client(self):
        server, client = self.pair([READ, HOLD], kind=cs.AIOCloudStack, timeout=0.03)
        error = self.fails(client, cs.CloudStackTimeoutError)
        self.assertIn("nothing for 0.03 s (timeout)", str(error))

    def test_an_exchange_ends_after_ten_times_the_timeout_in_all(self):
        """However steadily bytes come: in the head, in the body, in a chunk, after interim answers."""
        places = {"status line": [READ, dripping(b"HTTP/1.1 200 " + b"x" * 60000)],
            "headers": [READ, b"HTTP/1.1 200 OK\r\n", dripping(b"X-A: " + b"x" * 60000)],
            "body": [READ, reply(b" " * 100000)[:-99999], dripping(b"")],
            "chunk": [READ, chunked(b" " * 100000, 100000)[:-99999], dripping(b"")],
            "chunk size": [READ, chunked(last=b""), dripping(b"0" * 60000)],
            "trailers": [READ, chunked(last=b"0\r\n"), dripping(b"X-A: b\r\n" * 9000)],
            "body until the end": [READ, reply(length=False), dripping(b"")],
            "gzip": [READ, gzipped(gzip.compress(bytes(range(256)) * 2000) * 20)[:300], dripping(b"")],
            "interim answers": [READ, dripping(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)]}  # fmt: skip
        for name, steps in places.items():
            with self.subTest(name):
                server, client = self.pair(steps, timeout=2)
                with mock.patch.object(cs, "_clock", Clock(step=0.5)):
                    error = self.fails_unknown(client, cs.CloudStackTimeoutError)
                self.assertIn("not whole after 20 s", str(error))
                until(server.wires[0].ended.is_set, "hanging up")

    def test_what_is_left_of_that_bounds_a_silence_too(self):
        clock = Clock()

        def almost_over(wire):
            clock.now += 9999.97  # of 10000 s in all, while a silence might last 1000

        server = self.serve([READ, b"HTTP/1.1 2", almost_over, b"0", HOLD])
        with mock.patch.object(cs, "_clock", clock):
            self.fails(self.client(server, timeout=1000), cs.CloudStackTimeoutError)

    def test_a_steady_answer_within_ten_times_the_timeout_is_read(self):
        content = reply()
        steps = [READ] + [content[index : index + 40] for index in range(0, len(content), 40)]
        server = self.serve([step for part in steps for step in (part, 0.001)])
        with mock.patch.object(cs, "_clock", Clock(step=0.1)):
            self.assertEqual(RESULT, self.client(server, timeout=2).listZones())

    @unittest.skipUnless(sys.platform.startswith("linux"), "how a full queue of connections behaves differs")
    @both
    def test_a_connection_that_is_not_made_in_time(self, kind):
        listener = full_listener(self)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/client/api"
        error = self.fails_unsent(self.client(url, kind, timeout=0.05), cs.CloudStackTimeoutError)
        self.assertIn(f"Cannot connect to {url}: no answer within 0.05 s", str(error))

    @both
    def test_a_server_that_does_not_read_a_large_body(self, kind):
        server = self.serve([threading.Event()], receive_buffer=4096)
        self.fails_unknown(self.client(server, kind, timeout=0.1), cs.CloudStackTimeoutError, userdata="x" * 6000000)

    def test_a_timeout_set_later_counts_for_kept_connections_too(self):
        server, client = self.pair([READ, reply(), READ, HOLD], timeout=1000)
        client.listZones()
        client.timeout = "0.03"
        self.fails(client, cs.CloudStackTimeoutError)
        self.assertEqual(1, len(server.wires))

    def test_no_time_out_holds_a_read_command_back_from_its_retry(self):
        with mock.patch.object(cs, "_sleep", lambda seconds: None):
            server = self.serve([READ, HOLD], SERVE)
            self.assertEqual(RESULT, self.client(server, timeout=0.5, retry=1).listZones())


class ConnectTest(TransportCase):
    """Requests that surely were not sent."""

    @both
    def test_a_refused_connection(self, kind):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody else gets this port meanwhile
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/client/api"
            error = self.fails_unsent(self.client(url, kind))
            self.assertEqual(f"Cannot connect to {url}: Connection refused", str(error))
            self.assertIsInstance(error, ConnectionError)
            self.assertIsInstance(error.__cause__, ConnectionRefusedError)

    @both
    def test_a_name_that_is_not_found(self, kind):
        failure = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch("socket.getaddrinfo", side_effect=failure):
            error = self.fails_unsent(self.client(ENDPOINT, kind))
        self.assertEqual(f"Cannot find {ENDPOINT}: name look-up: Name or service not known", str(error))
        self.assertIs(failure, error.__cause__)

    @each("host", "a" * 70 + ".invalid", "a..invalid")
    def test_a_name_that_cannot_be_one(self, host):
        self.fails_unsent(self.client(f"http://{host}/client/api"))

    @both
    def test_what_the_standard_library_quotes_of_a_request_is_not_passed_on(self, kind):
        def repeat(wire):
            return wire.send(wire.requests[-1].line.encode() + b"\r\n\r\n")

        error = self.fails(self.client(self.serve([READ, repeat]), kind))
        self.assertNotIn("apiKey", "".join(all_texts(error)))

    @both
    def test_what_was_not_sent_is_sent_again_within_retry(self, kind):
        server = self.serve([READ, reply(DEPLOYED), AGAIN])
        refused = []

        class Moody(socket.socket):
            def connect(self, address):
                if len(refused) < 2:
                    refused.append(1)
                    raise ConnectionRefusedError(111, "Connection refused")
                return super().connect(address)

        with mock.patch.object(cs, "_random", lambda: 0.0), mock.patch("socket.socket", Moody):
            client = self.client(server, kind, retry=2, retry_backoff=0.01)
            self.assertEqual(JOB, self.call(client, "deployVirtualMachine")["jobid"])
        self.assertEqual(1, len(server.requests))

    @both
    def test_only_http_and_https(self, kind):
        secret = self.write("secret", '{"x": {"read": "a file"}}')
        for endpoint in ("file://" + secret, "file:" + secret, "ftp://127.0.0.1/x", "data:application/json,{}",
                "unix:/x", "//127.0.0.1/x", "127.0.0.1:8080/x", "http:///x", "http://127.0.0.1:0/",
                "http://127.0.0.1:x/", "HTTPS:", "ws://127.0.0.1/", "http:127.0.0.1"):  # fmt: skip
            with self.subTest(endpoint):
                error = self.refuses(self.call, self.client(endpoint, kind))
                self.assertTrue(str(error).startswith("endpoint: "), error)
                self.assert_tells_nothing(error)

    @both
    @each("status", "301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect",
          "308 Permanent Redirect")  # fmt: skip
    def test_redirects_are_not_followed(self, kind, status):
        other = self.serve(SERVE)
        for place in (other.url + "?command=listZones&token=x", "/elsewhere", "file:///etc/passwd"):
            with self.subTest(place):
                moved = reply(ZONES, status, "Location: " + place)
                server, client = self.pair([READ, moved, AGAIN], kind=kind, retry=2)
                error = self.fails(client, cs.CloudStackException, "deployVirtualMachine")
                self.assertEqual("HTTP " + status, error.args[0])
                self.assertIn(place.partition("?")[0], error.args[1])
                self.assertNotIn("token", str(error))
                self.assertEqual(1, len(server.requests))
        self.assertEqual([], other.wires)

    def test_a_redirect_that_quotes_the_request_shows_nothing_of_it(self):
        def quote_back(wire):
            target = wire.requests[-1].target
            return wire.send(reply(b"", "302 Found", "Location: https://cloud.invalid" + target))

        server = self.serve([READ, quote_back, AGAIN])
        with self.assertRaises(cs.CloudStackException) as caught:
            self.client(server).listZones()
        self.assert_tells_nothing(str(caught.exception), repr(caught.exception), repr(caught.exception.args))
        self.assertIn("https://cloud.invalid/client/api", str(caught.exception))
        self.assertIn("302 Found", self.traced(self.client(server, trace=True)))

    @both
    def test_a_reason_phrase_that_quotes_the_request_shows_nothing_of_it(self, kind):
        server = self.serve([READ, lambda wire: wire.send(reply(b"", "400 GET " + wire.requests[-1].target))])
        error = self.fails(self.client(server, kind), cs.CloudStackException)
        self.assertRegex(error.response.reason, r"\AGET /client/api\?apiKey=\*\*\*&.*&signature=\*\*\*(&|\Z)")
        self.assert_tells_nothing(*all_texts(error))

    def test_the_scheme_of_an_endpoint_may_be_in_capitals(self):
        with Simulator() as simulator:
            endpoint = simulator.endpoint.replace("http://", "HTTP://")
            with cs.CloudStack(endpoint, simulator.key, simulator.secret) as client:
                self.assertEqual(2, client.listZones()["count"])

    def test_a_family_that_the_system_lacks_is_passed_over(self):
        class Lacking(socket.socket):
            def __init__(self, family=socket.AF_INET, *args, **options):
                if family == socket.AF_INET6:
                    raise OSError(97, "Address family not supported by protocol")
                super().__init__(family, *args, **options)

        server = self.serve(SERVE)
        found = [(socket.AF_INET6, 1, 6, "", ("::1", server.port, 0, 0)),
                 (socket.AF_INET, 1, 6, "", ("127.0.0.1", server.port))]  # fmt: skip
        with mock.patch("socket.getaddrinfo", lambda *args: found), mock.patch("socket.socket", Lacking):
            self.assertEqual(RESULT, self.client(server).listZones())


@needs_openssl
class TlsTest(TransportCase):
    def setUp(self):
        TransportCase.setUp(self)
        self.files = certificates()
        self.ca = self.files.path("ca.pem")

    def secure(self, name="good", steps=SERVE, client_ca=None):
        return self.serve(steps, tls=self.files.server(name, client_ca))

    def secure_pair(self, kind=None, steps=SERVE, client_ca=None, **settings):
        server = self.secure("good", steps, client_ca)
        return server, self.client(server, kind, **dict({"verify": self.ca}, **settings))

    def refused(self, server, kind=cs.CloudStackConnectionError, **settings):
        """A TLS failure before anything was sent, by both clients."""
        for client_kind in KINDS:
            client = self.client(server, client_kind, **settings)
            error = self.fails_unsent(client, kind)
            self.assertIn("TLS failure with " + server.url, str(error))
            self.assertIsInstance(error, ConnectionError)
            self.assertIsInstance(error.__cause__, (OSError, ssl.CertificateError))
            self.assertEqual([], server.requests)
        return str(error)

    @both
    @each("name", "ca.pem", "directory")
    def test_a_ca_file_and_a_ca_directory(self, kind, name):
        server, client = self.secure_pair(kind, verify=self.files.path(name))
        self.assertEqual([RESULT] * 3, [self.call(client) for _ in range(3)])
        self.assertEqual(1, len(server.wires))

    def test_a_path_beats_dangerous_no_tls_verify(self):
        server = self.secure()
        self.refused(server, verify=self.files.path("other_ca.pem"), dangerous_no_tls_verify=True)

    @each("name, certificate, authority, word", ("the system's CA certificates", "good", None, "certificate"),
          ("another CA", "good", "other_ca.pem", "certificate"),
          ("self-signed", "self_signed", "ca.pem", "certificate"), ("expired", "expired", "ca.pem", "expired"),
          ("another host's", "elsewhere", "ca.pem", "127.0.0.1"))  # fmt: skip
    def test_certificates_that_are_not_trusted(self, name, certificate, authority, word):
        server = self.secure(certificate)
        text = self.refused(server, verify=authority and self.files.path(authority))
        if sys.version_info >= (3, 7):  # noqa: UP036  (3.6 does not tell why)
            self.assertIn(word, text.lower())
        if certificate != "elsewhere":
            self.assertIn("`verify`", text)

    def test_an_empty_ca_directory_trusts_nobody(self):
        empty = os.path.join(self.home, "empty")
        os.mkdir(empty)
        self.refused(self.secure(), verify=empty)

    def test_a_self_signed_certificate_may_be_its_own_ca(self):
        server = self.secure("self_signed")
        try:
            self.assertEqual(RESULT, self.client(server, verify=self.files.path("self_signed.pem")).listZones())
        except cs.CloudStackConnectionError as error:  # strict since 3.13: it must name its key, which ours does not
            self.assertGreaterEqual(sys.version_info, (3, 13), error)

    @both
    def test_dangerous_no_tls_verify(self, kind):
        client = self.client("https://x/", kind, dangerous_no_tls_verify="true")
        for name in ("good", "self_signed", "expired", "elsewhere"):
            client.endpoint = self.secure(name).url
            self.assertEqual(RESULT, self.call(client), name)

    def test_nothing_else_turns_verification_off(self):
        self.share_contexts()
        for settings in ({"verify": False}, {"verify": "false"}, {"verify": "0"}, {"verify": ""}, {"verify": True},
                {"verify": "no"}, {"dangerous_no_tls_verify": "false"}, {"dangerous_no_tls_verify": "0"},
                {"dangerous_no_tls_verify": None}):  # fmt: skip
            with self.subTest(settings):
                server = self.secure()
                self.assertIn("TLS failure", str(self.fails(self.client(server, **settings))))
                self.assertEqual([], server.requests)

    def test_settings_changed_later_count_for_the_next_call(self):
        """A connection made without verification is not used where verification is asked for."""
        server = self.secure()
        client = self.client(server, dangerous_no_tls_verify=True)
        client.listZones()
        client.set_setting("dangerous_no_tls_verify", False)
        self.fails(client)
        client.verify = self.ca
        self.assertEqual(RESULT, client.listZones())
        client.verify = self.files.path("other_ca.pem")
        self.fails(client)
        self.assertEqual(2, len(server.requests))

    @both
    def test_ca_certificates_that_cannot_be_read(self, kind):
        broken = self.write("broken.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        empty = self.write("empty.pem", "")
        for path in ("/nonexistent/ca.pem", broken, empty):
            with self.subTest(path):
                server, client = self.secure_pair(kind, verify=path)
                error = self.refuses(self.call, client)
                self.assertRegex(str(error), rf"\Averify: .*{re.escape(path)}.*\Z")
                self.assertNotIn("Errno", str(error))
                self.assertEqual([], server.wires)

    @both
    def test_a_client_certificate_that_the_server_demands(self, kind):
        good, key, both = map(self.files.path, ("good.pem", "leaf.key", "both.pem"))
        for settings in ({"cert": both}, {"cert": good, "cert_key": key}, {"cert": (good, key)}):
            with self.subTest(settings):
                server, client = self.secure_pair(kind, client_ca="ca", **settings)
                self.assertEqual([RESULT, RESULT], [self.call(client) for _ in range(2)])
                self.assertEqual(1, len(server.wires))

    @both
    @each("name, authority", (None, "ca"), ("both.pem", "other_ca"))
    def test_a_demanded_client_certificate_that_is_missing_or_not_trusted(self, kind, name, authority):
        server, client = self.secure_pair(kind, client_ca=authority, cert=name and self.files.path(name))
        self.fails(client, command="deployVirtualMachine")
        until(server.wires[0].ended.is_set, "refusing")
        self.assertEqual([], server.requests)

    @both
    def test_client_certificates_that_cannot_be_used(self, kind):
        good, others, locked = map(self.files.path, ("good.pem", "ca.key", "locked.key"))
        both_locked = self.write("both_locked.pem", self.files.read("good.pem") + self.files.read("locked.key"))
        broken = self.write("broken.key", "nonsense")
        for cert, key in (("/nonexistent/own.pem", None), (good, None), (good, "/nonexistent/own.key"), (good, others),
                (good, broken), (self.home, None), (good, locked), (both_locked, None)):  # fmt: skip
            with self.subTest(cert=cert, key=key):
                server, client = self.secure_pair(kind, cert=cert, cert_key=key)
                error = self.refuses(self.call, client)
                self.assertRegex(str(error), rf"\Acert.*{re.escape(cert)}.*\Z")
                self.assertEqual("locked" in f"{cert} {key}", "key is encrypted" in str(error))
                self.assertEqual([], server.wires)

    @unittest.skipUnless(hasattr(os, "openpty"), "no pseudo-terminals here")
    def test_an_encrypted_key_never_asks_on_the_terminal(self):
        """In a session, as every child leads one, whose controlling terminal would show the question."""
        code = (
            "import os, sys\n"
            "terminal = os.open(sys.argv[1], os.O_RDWR)\n"
            "os.dup2(terminal, 0)\n"
            "import cs\n"
            "try: cs.CloudStack('https://127.0.0.1:1/', 'k', 's', cert=sys.argv[2], cert_key=sys.argv[3]).listZones()\n"
            "except ValueError as error: print(error)\n"
        )
        ours, theirs = os.openpty()
        for end in (ours, theirs):
            self.addCleanup(os.close, end)
        os.write(ours, b"wrong\n")
        out = self.assert_child(code, os.ttyname(theirs), self.files.path("good.pem"), self.files.path("locked.key"))
        self.assertIn("cert: ", out)
        os.set_blocking(ours, False)
        with contextlib.suppress(OSError):
            self.assertNotIn(b"pass phrase", os.read(ours, 10000))

    @staticmethod
    def some_of_it(wire):
        """Read some of the client's first message. (Before 3.12, ssl leaks a socket that was reset before it.)"""
        wire.more(50)

    @both
    def test_a_handshake_cut_in_the_middle(self, kind):
        context = self.files.server()

        def first_flight(wire):
            """The server's side of the handshake, computed apart from any socket."""
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(incoming, outgoing, server_side=True)
            wire.more()
            incoming.write(wire.raw)
            with contextlib.suppress(ssl.SSLError):
                tls.do_handshake()
            return outgoing.read()

        def answer_up_to(share):
            return lambda wire: wire.send(first_flight(wire)[: int(share * 1000)]) and False

        cuts = {"at once": [], "after hello": [self.some_of_it], "reset": [self.some_of_it, RESET]}
        cuts.update({f"answered {share}": [answer_up_to(share)] for share in (0.001, 0.1, 0.6)})
        for name, steps in cuts.items():
            with self.subTest(name):
                server = self.serve(steps, [context, READ, reply(DEPLOYED)])
                url = server.url.replace("http:", "https:")
                self.fails_unsent(self.client(url, kind, verify=self.ca))
                self.assertEqual([], server.requests)
                server.scripts.insert(0, steps)
                client = self.client(url, kind, verify=self.ca, retry=1, retry_backoff=0)
                self.assertEqual(JOB, self.call(client, "deployVirtualMachine")["jobid"])

    @both
    def test_a_handshake_that_hangs(self, kind):
        url = self.serve([HOLD]).url.replace("http:", "https:")
        self.fails_unsent(self.client(url, kind, verify=self.ca, timeout=0.05), cs.CloudStackTimeoutError)

    def test_a_plain_http_server_behind_https_and_the_reverse(self):
        plain = self.serve([lambda wire: wire.more(), reply()])
        error = self.fails_unsent(self.client(plain.url.replace("http:", "https:")))
        self.assertIn("TLS failure", str(error))
        secure = self.secure()
        self.fails(self.client(secure.url.replace("https:", "http:")))
        self.assertEqual([], secure.requests)

    @each("name, content", ("length", reply()[:-10]), ("chunked", chunked()[:-10]), ("nothing", b""))
    def test_an_answer_cut_off_over_tls(self, name, content):
        server, client = self.pair([READ, content], SERVE, tls=self.files.server(), verify=self.ca)
        self.fails_unknown(client)
        self.assertEqual(RESULT, client.listZones())

    def test_silence_over_tls(self):
        server, client = self.secure_pair(steps=[READ, reply()[:-5], HOLD], timeout=1)
        self.assertIn("nothing for 1 s", str(self.fails(client, cs.CloudStackTimeoutError)))

    def test_no_version_of_tls_before_1_2_is_offered(self):
        made = []
        really = ssl.create_default_context

        def make(*args, **options):
            made.append(really(*args, **options))
            return made[-1]

        with mock.patch.object(ssl, "create_default_context", make):
            self.assertEqual(RESULT, self.client(self.secure(), verify=self.ca).listZones())
        (context,) = made
        if hasattr(context, "minimum_version"):  # 3.7
            self.assertGreaterEqual(context.minimum_version, ssl.TLSVersion.TLSv1_2)
        else:
            older = ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
            self.assertEqual(context.options & older, older)

    def test_one_context_serves_all_connections(self):
        made = []
        really = cs._make_context
        with mock.patch.object(cs, "_make_context", lambda *args: made.append(args) or really(*args)):
            client = self.client(self.secure(steps=[READ, reply()]), verify=self.ca)
            for _ in range(3):
                client.listZones()
            client.endpoint = self.secure().url
            client.listZones()
        self.assertEqual(1, len(made))

    def test_plain_http_needs_no_context_and_reads_no_certificates(self):
        client = self.client(self.serve(SERVE), verify="/nonexistent/ca.pem", cert="/nonexistent/own.pem")
        with mock.patch.object(cs, "_make_context", side_effect=AssertionError):
            self.assertEqual(RESULT, client.listZones())


class ProxyTest(TransportCase):
    """Proxies as the environment names them."""

    HTTP, HTTPS = ENDPOINT, "https://cloud.invalid/client/api"
    WAYS = [("http_proxy", HTTP), ("https_proxy", HTTPS)]
    LOGIN = f"me:{CANARY_PROXY}@"
    BASIC = "Basic " + base64.b64encode(f"me:{CANARY_PROXY}".encode()).decode()

    def setUp(self):
        TransportCase.setUp(self)
        self.share_contexts()

    @property
    def ca(self):
        return certificates().path("ca.pem")

    @staticmethod
    def tls(name="good"):
        return certificates().server(name)

    def proxy(self, *scripts, login="", name="http_proxy"):
        server = self.serve(*scripts)
        os.environ[name] = f"http://{login}{server.place}"
        return server

    @both
    def test_plain_http_goes_through_in_absolute_form(self, kind):
        proxy = self.proxy(SERVE)
        client = self.client(self.HTTP, kind)
        self.call(client)
        client.method = "post"
        self.call(client)
        get, post = proxy.requests
        self.assertTrue(get.target.startswith(self.HTTP + "?apiKey="), get.line)
        self.assertEqual(f"POST {self.HTTP} HTTP/1.1", post.line)
        self.assertEqual(["cloud.invalid"] * 2, [get.header("Host"), post.header("Host")])
        self.assertEqual([None] * 2, [get.header("Proxy-Authorization"), post.header("Proxy-Authorization")])
        self.assertEqual(1, len(proxy.wires))

    @both
    def test_plain_http_with_proxy_authentication(self, kind):
        proxy = self.proxy(SERVE, login=self.LOGIN)
        self.call(self.client(self.HTTP, kind))
        self.assertEqual([self.BASIC], proxy.requests[0].all("Proxy-Authorization"))

    def test_a_proxy_password_is_percent_decoded(self):
        proxy = self.proxy(SERVE, login="m%40e:p%3Aw%2F@")
        self.client(self.HTTP).listZones()
        expected = "Basic " + base64.b64encode(b"m@e:p:w/").decode()
        self.assertEqual([expected], proxy.requests[0].all("Proxy-Authorization"))

    @needs_openssl
    @both
    @each("login", "", LOGIN)
    def test_https_goes_through_a_tunnel(self, kind, login):
        tunnel = [READ, b"HTTP/1.1 200 Connection established\r\n\r\n", self.tls(), self.fresh]
        proxy = self.proxy(tunnel + [READ, reply(), READ, reply(), HOLD], login=login, name="https_proxy")
        client = self.client(self.HTTPS, kind, verify=self.ca)
        self.assertEqual([RESULT] * 2, [self.call(client) for _ in range(2)])
        connect, first, second = proxy.requests
        self.assertEqual(("CONNECT", "cloud.invalid:443"), (connect.method, connect.target))
        self.assertEqual([self.BASIC] if login else [], connect.all("Proxy-Authorization"))
        self.assertNotIn("apiKey", connect.line)
        for request in (first, second):
            self.assertTrue(request.target.startswith("/client/api?apiKey="), request.line)
            self.assertEqual(("cloud.invalid", []), (request.header("Host"), request.all("Proxy-Authorization")))
        self.assertEqual(1, len(proxy.wires))

    @staticmethod
    def fresh(wire):
        """What comes from now on came through the tunnel."""
        wire.raw, wire.taken = b"", 0

    @needs_openssl
    def test_the_certificate_in_the_tunnel_is_that_of_the_origin(self):
        tls = self.tls("elsewhere")
        proxy = self.proxy([READ, b"HTTP/1.1 200 ok\r\n\r\n", tls, READ, reply()], name="https_proxy")
        error = self.fails_unsent(self.client(self.HTTPS, verify=self.ca))
        self.assertIn("TLS failure", str(error))
        self.assertEqual(["CONNECT"], [request.method for request in proxy.requests])

    @both
    @each("content, text, last", (b"HTTP/1.1 403 Forbidden\r\n\r\nno", "403 Forbidden", []),
          (reply(b"", "407 Proxy Authentication Required"), "407 Proxy Authentication", [AGAIN]),
          (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", "502 Bad Gateway", []),
          (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "302 Found", []), (b"", "", []),
          (b"no such thing\r\n\r\n", "", []), (b"HTTP/1.1 2", "", []),
          (b"HTTP/1.1 200 " + b"x" * 70000, "", []))  # fmt: skip
    def test_a_tunnel_that_is_not_made(self, kind, content, text, last):
        proxy = self.proxy([READ, content] + last, login=self.LOGIN, name="https_proxy")
        error = self.fails_unsent(self.client(self.HTTPS, kind))
        self.assertIn("Cannot connect to " + self.HTTPS, str(error))
        self.assertIn(text, str(error))
        self.assertEqual(["CONNECT"], [request.method for request in proxy.requests])
        until(proxy.wires[0].ended.is_set, "hanging up")

    def test_a_tunnel_that_hangs_or_drips(self):
        self.proxy([READ, HOLD], name="https_proxy")
        self.fails_unsent(self.client(self.HTTPS, timeout=0.05), cs.CloudStackTimeoutError)
        self.proxy([READ, dripping(b"HTTP/1.1 200 ok\r\nX-A: b\r\nX-B", b"x")], name="https_proxy")
        with mock.patch.object(cs, "_clock", Clock(step=0.5)):
            self.fails_unsent(self.client(self.HTTPS, timeout=2), cs.CloudStackTimeoutError)

    def test_a_407_for_plain_http_is_the_proxys_answer(self):
        page = reply(b"<html>", "407 Proxy Authentication Required").replace(b"application/json", b"text/html")
        self.proxy([READ, page, AGAIN], login=self.LOGIN)
        error = self.fails(self.client(self.HTTP), cs.CloudStackException, "deployVirtualMachine")
        self.assertEqual("HTTP 407 Proxy Authentication Required", error.args[0])

    @each("names", "127.0.0.1", "*", "x.invalid, 127.0.0.1")
    def test_no_proxy(self, names):
        proxy, origin = self.proxy(SERVE), self.serve(SERVE)
        os.environ["no_proxy"] = names
        self.assertEqual(RESULT, self.client(origin).listZones())
        self.assertEqual([], proxy.wires)
        self.assertTrue(origin.requests[0].target.startswith("/client/api?"))

    def test_upper_case_names_count_too(self):
        proxy = self.proxy(SERVE, name="HTTPS_PROXY")
        os.environ["HTTP_PROXY"] = os.environ.pop("HTTPS_PROXY")
        self.assertEqual(RESULT, self.client(self.HTTP).listZones())
        self.assertEqual(1, len(proxy.requests))

    def test_a_proxy_for_http_is_none_for_https(self):
        proxy = self.proxy(SERVE)
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(socket.EAI_NONAME, "unknown")):
            self.fails(self.client(self.HTTPS))
        self.assertEqual([], proxy.wires)

    @each("excluded, direct", ("127.0.0.0/8", True), ("10.0.0.0/8, 127.0.0.1/32", True), ("127.0.0.1/255.0.0.0", True),
          ("127.0.0.5/8", True), ("localhost,127.0.0.0/8,x", True), ("a.invalid,*", True), ("{place}", True),
          ("10.0.0.0/8", False), ("::1,fd00::/8", False), ("127.0.0.1:1", False), ("nonsense/8,/,300.1.1.1", False),
          ("", False), (" , ", False))  # fmt: skip
    def test_addresses_and_ranges_that_no_proxy_excludes(self, excluded, direct):
        """Finding 06: a signed request went through a proxy that was excluded by its range."""
        proxy, origin = self.proxy(SERVE), self.serve(SERVE)
        os.environ["no_proxy"] = excluded.format(place=origin.place)
        self.assertEqual(RESULT, self.client(origin).listZones())
        self.assertEqual((0, 1) if direct else (1, 0), (len(proxy.requests), len(origin.requests)))

    @each("endpoint, excluding",
          ("http://[fd00::5]:8080/", "fd00::5 [fd00::5] fd00::/8 [fd00::]/8 FD00:0::5 [fd00::5]:8080"),
          ("http://api.cloud.invalid:81/",
           "api.cloud.invalid cloud.invalid .cloud.invalid Invalid api.cloud.invalid:81"))  # fmt: skip
    def test_hosts_that_no_proxy_excludes(self, endpoint, excluding):
        """By name, with a port, by the end of the name, and IPv6 addresses with and without brackets."""
        others = ["::1", "fd01::/16", "10.0.0.0/8", "pi.cloud.invalid", "cloud.invalid:82", "0/0", "fd00::5:8080"]
        gone = socket.gaierror(socket.EAI_NONAME, "unknown")
        really = socket.getaddrinfo

        def find(host, *args):
            if host != "127.0.0.1":  # where the proxy is
                raise gone
            return really(host, *args)

        for excluded in excluding.split() + others:
            with self.subTest(excluded), mock.patch("socket.getaddrinfo", find):
                proxy = self.proxy(SERVE)
                os.environ["no_proxy"] = excluded
                if excluded in others:
                    self.client(endpoint).listZones()
                else:
                    self.assertIs(gone, self.fails(self.client(endpoint)).__cause__)
                self.assertEqual(1 if excluded in others else 0, len(proxy.requests))

    def test_all_proxy_counts_where_the_scheme_has_no_proxy_of_its_own(self):
        for name in ("all_proxy", "ALL_PROXY"):
            for endpoint in (self.HTTP, self.HTTPS):
                with self.subTest(name, endpoint=endpoint):
                    general = self.proxy([READ, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"], name=name)
                    self.assertRaises(cs.CloudStackException, self.client(endpoint).listZones)
                    self.assertEqual(1, len(general.requests))
            own = self.proxy(SERVE)
            self.client(self.HTTP).listZones()
            self.assertEqual((1, 1), (len(general.requests), len(own.requests)))
            del os.environ[name], os.environ["http_proxy"]

    def test_no_proxy_alone_imports_nothing(self):
        code = "import cs, sys; cs.CloudStack(sys.argv[1]).listZones(); print('urllib.request' in sys.modules)"
        out = self.assert_child(code, self.serve(SERVE).url, env={"NO_PROXY": "10.0.0.0/8"}, flags=("-S",))
        self.assertEqual("False\n", out)

    def secure_proxy(self, origin=None, login="", name="https_proxy"):
        """A proxy that speaks TLS: serves by itself, or makes a tunnel to the origin."""
        def relay(wire):
            wire.raw, wire.taken = b"", 0
            with socket.create_connection(("127.0.0.1", origin.port)) as inner:
                ends = {wire.sock: inner, inner: wire.sock}
                while True:
                    ready = [wire.sock] if wire.sock.pending() else wait_for(list(ends), [], [], 10)[0]
                    for end in ready:
                        part = end.recv(65536)
                        if not part:
                            return False
                        ends[end].sendall(part)

        steps = [READ, b"HTTP/1.1 200 ok\r\n\r\n", relay] if origin else SERVE
        proxy = self.serve(steps, tls=self.tls())
        os.environ[name] = f"https://{login}{proxy.place}"
        return proxy

    @needs_openssl
    @both
    def test_an_https_proxy_is_spoken_to_over_tls(self, kind):
        """Finding 07: it got its password in plain text. For https, TLS to the origin runs inside that to the proxy."""
        big = reply({"listzonesresponse": {"count": 1, "zone": [ZONE], "padding": "x" * 300000}})
        origin = self.serve([READ, reply(), READ, big, AGAIN], tls=self.tls())
        for endpoint, proxy in ((self.HTTP, self.secure_proxy(login=self.LOGIN, name="http_proxy")),
                (self.HTTPS, self.secure_proxy(origin, login=self.LOGIN))):  # fmt: skip
            with self.subTest(endpoint, kind=kind.__name__):
                client = self.client(endpoint, kind, verify=self.ca)
                self.assertEqual(RESULT, self.call(client))
                self.call(client, userdata="x" * 100000)
                self.assertEqual(1, len(proxy.wires))
                self.assertEqual([self.BASIC], proxy.requests[0].all("Proxy-Authorization"))
                if endpoint == self.HTTPS:
                    (connect,) = proxy.requests
                    self.assertEqual("CONNECT cloud.invalid:443 HTTP/1.1", connect.line)
                    self.assertEqual([RESULT["zone"]] * 2, [self.call(client)["zone"] for _ in range(2)])
        self.assertEqual([100000], [len(request.params["userdata"]) for request in origin.requests[1:2]])
        self.assertEqual({4}, {len(wire.requests) for wire in origin.wires})

    @needs_openssl
    def test_an_https_proxy_that_is_not_trusted_or_speaks_no_tls_gets_nothing(self):
        for name, endpoint in self.WAYS:
            plain = self.proxy([lambda wire: wire.more(), b"HTTP/1.1 400 no\r\n\r\n"], login=self.LOGIN, name=name)
            os.environ[name] = os.environ[name].replace("http:", "https:")
            error = self.fails_unsent(self.client(endpoint))
            self.assertIn("TLS failure with " + endpoint, str(error))
            self.assertIn(f"(proxy {plain.place})", str(error))
            self.assertEqual(b"\x16\x03", plain.wires[0].raw[:2])  # a TLS handshake, and nothing else
            unknown = self.secure_proxy(login=self.LOGIN, name=name)
            error = self.fails_unsent(self.client(endpoint))
            self.assertIn("certificate", str(error))
            self.assertEqual([], unknown.requests)

    @needs_openssl
    def test_the_certificate_inside_of_an_https_proxy_is_that_of_the_origin(self):
        origin = self.serve(SERVE, tls=self.tls("elsewhere"))
        self.secure_proxy(origin)
        error = self.fails_unsent(self.client(self.HTTPS, verify=self.ca), command="updateZone")
        self.assertIn("TLS failure", str(error))
        self.assertEqual([], origin.requests)

    @needs_openssl
    @each("steps, kind", ([reply()[:-5]], cs.CloudStackConnectionError), ([], cs.CloudStackConnectionError),
          ([reply()[:-5], HOLD], cs.CloudStackTimeoutError))  # fmt: skip
    def test_an_answer_that_ends_early_inside_of_an_https_proxy(self, steps, kind):
        self.secure_proxy(self.serve([READ] + steps, tls=self.tls()))
        self.fails_unknown(self.client(self.HTTPS, verify=self.ca, timeout=1), kind, "updateZone")

    def test_a_proxys_reason_that_repeats_its_password_is_masked(self):
        def repeat(wire):
            code = wire.requests[-1].header("Proxy-Authorization")
            return wire.send(f"HTTP/1.1 407 {code}\r\n\r\n".encode())

        self.proxy([READ, repeat], login=self.LOGIN, name="https_proxy")
        self.assertIn("407", str(self.fails(self.client(self.HTTPS))))

    @both
    @each("scheme", "socks5", "socks5h", "socks4", "socks", "ftp")
    @each("name, endpoint", *WAYS + [("all_proxy", HTTP), ("ALL_PROXY", HTTPS)])
    def test_a_socks_proxy_is_refused_in_one_line(self, kind, scheme, name, endpoint):
        server = self.serve([HOLD])
        for other in [other for other in os.environ if other.lower().endswith("_proxy")]:
            del os.environ[other]
        os.environ[name] = f"{scheme}://{self.LOGIN}{server.place}"
        self.assertIn(scheme, str(self.fails_unsent(self.client(endpoint, kind, timeout=0.1))))
        self.assertEqual([], server.wires)

    @each("prefix", "", "HTTP://", "Http://")
    @each("name, endpoint", *WAYS)
    def test_a_proxys_scheme_may_be_missing_or_in_capitals(self, prefix, name, endpoint):
        proxy = self.serve([READ, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"])
        os.environ[name] = prefix + proxy.place
        error = self.refuses(self.client(endpoint).listZones, kind=cs.CloudStackException)
        self.assertIn("403 Forbidden", str(error))
        self.assertEqual(1, len(proxy.requests))

    @both
    @each("wrong", "http://me:{}@://x@127.0.0.1:1", "http:/me:{}@127.0.0.1:1", "http://me:{}@127.0.0.1:1x", "me:{}@://")
    @each("name, endpoint", *WAYS)
    def test_a_proxy_that_is_written_wrongly_tells_no_password(self, kind, wrong, name, endpoint):
        os.environ[name] = wrong.format(CANARY_PROXY)
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(-2, "unknown")):
            call = lambda: self.call(self.client(endpoint, kind))  # noqa: E731
            self.refuses(call, kind=(cs.CloudStackException, ValueError))

    @both
    @each("name, endpoint", *WAYS)
    def test_a_proxy_that_refuses_connections(self, kind, name, endpoint):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            os.environ[name] = f"http://{self.LOGIN}127.0.0.1:{taken.getsockname()[1]}"
            self.assertIn("Connection refused", str(self.fails_unsent(self.client(endpoint, kind))))

    def test_a_kept_connection_through_a_proxy_belongs_to_its_credentials(self):
        proxy = self.proxy(SERVE, login=self.LOGIN)
        self.client(self.HTTP).listZones()
        os.environ["http_proxy"] = "http://other:word@" + proxy.place
        self.client(self.HTTP).listZones()
        self.assertEqual(2, len({request.header("Proxy-Authorization") for request in proxy.requests}))

    def test_gzip_is_asked_for_where_the_host_is_not_loopback(self):
        proxy = self.proxy([READ, gzipped(), AGAIN])
        client = self.client(self.HTTP)
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual(["gzip"], proxy.requests[0].all("Accept-Encoding"))
        for host in ("127.0.0.1:1", "127.8.8.8", "localhost:1", "localhost"):
            client.endpoint = f"http://{host}/client/api"
            self.assertEqual(RESULT, client.listZones())
            self.assertEqual(["identity"], proxy.requests[-1].all("Accept-Encoding"), host)

    def test_a_password_that_is_not_utf_8_is_sent_as_it_is(self):
        proxy = cs._parse_proxy("http://user:p%E4ss\udcff@proxy:1")
        self.assertEqual(b"user:p\xef\xbf\xbdss\xff", base64.b64decode(proxy.headers[0].split()[-1]))


class HeaderTest(TransportCase):
    def sent(self, command="listZones", settings=None, **params):
        """The one request that a call makes."""
        server = self.serve([READ, reply(), AGAIN])
        self.call(self.client(server, **(settings or {})), command, **params)
        (request,) = server.requests
        return request

    @both
    def test_what_every_request_carries(self, kind):
        server, client = self.pair(SERVE, kind=kind)
        self.call(client)
        client.method = "post"
        self.call(client)
        get, post = server.requests
        expected = {"Host": server.place, "User-Agent": "cs/" + cs.__version__, "Accept-Encoding": "identity"}
        self.assertEqual(expected, dict(get.headers))
        expected.update({"Content-Type": "application/x-www-form-urlencoded", "Content-Length": str(len(post.body))})
        self.assertEqual(expected, dict(post.headers))
        self.assertEqual(len(expected), len(post.headers))
        self.assertEqual(("GET", "POST", "/client/api"), (get.method, post.method, post.target))
        self.assertEqual(b"", get.body)

    def test_headers_of_the_client_and_of_the_call(self):
        settings = {"headers": {"X-One": "client", "x-two": "client", "User-Agent": "mine/1"}}
        request = self.sent(settings=settings, headers={"X-TWO": "call", "x-three": "call"})
        for name, value in (("X-One", "client"), ("X-TWO", "call"), ("x-three", "call"), ("User-Agent", "mine/1")):
            self.assertIn((name, value), request.headers)
        self.assertEqual(["call"], request.all("x-two"))
        self.assertEqual(["mine/1"], request.all("user-agent"))

    def test_names_compare_without_regard_to_case_and_keep_their_spelling(self):
        settings = {"headers": {"user-AGENT": "mine", "hOST": "other.invalid"}}
        request = self.sent(settings=settings, headers={"ACCEPT-encoding": "gzip"})
        self.assertIn(("user-AGENT", "mine"), request.headers)
        self.assertIn(("ACCEPT-encoding", "gzip"), request.headers)
        self.assertEqual(["other.invalid"], request.all("host"))
        self.assertEqual([["mine"], ["gzip"]], [request.all("user-agent"), request.all("accept-encoding")])

    def test_none_takes_a_header_out(self):
        request = self.sent(settings={"headers": {"X-One": "1", "User-Agent": None}}, headers={"x-one": None})
        self.assertEqual(([], []), (request.all("x-one"), request.all("user-agent")))

    def test_values_may_be_text_bytes_and_numbers(self):
        request = self.sent(headers={"A": b"b\xe4", "B": 5, "C": 1.5, "D": "t\u00e4b\there", "E": ""})
        got = {name: request.header(name) or "" for name in "ABCDE"}
        self.assertEqual({"A": "b\xe4", "B": "5", "C": "1.5", "D": "t\u00e4b\there", "E": ""}, got)

    @each("headers", {"X-A": "b\r\nX-C: " + CANARY_TOKEN}, {"X-A": CANARY_TOKEN + "\n"}, {"X-A": "\r" + CANARY_TOKEN},
          {"X-A": "b\0c"}, {"X-A": b"b\r\n" + CANARY_TOKEN.encode()}, {"X-A": "\u20ac" + CANARY_TOKEN}, {"X-A": "\x7f"},
          {"X-A": "\x1b[2J"}, {"X-A": [CANARY_TOKEN]}, {"X-A": {"b": "c"}}, {"X A": "b"}, {"X-A:": "b"},
          {"X-A\r\nX-B": "c"}, {"": "b"}, {"\u00e4": "b"}, {5: "b"}, {b"X-A": "b"}, {"Content-Length": "5"},
          {"transfer-ENCODING": "chunked"})  # fmt: skip
    def test_headers_that_are_refused(self, headers):
        server = self.serve(SERVE)
        self.refuses(self.client, server, headers=headers)
        self.refuses(self.call, self.client(server), headers=headers)
        self.refuses(self.call, self.client(server, cs.AIOCloudStack), headers=headers)
        self.refuses(setattr, self.client(server), "headers", headers)
        self.assertEqual([], server.wires)

    def test_headers_put_in_behind_the_clients_back_are_refused_too(self):
        server, client = self.pair(SERVE, headers={"X-A": "b"})
        client.headers["X-A"] = "b\r\nX-C: " + CANARY_TOKEN
        self.refuses(client.listZones)
        self.assertEqual([], server.wires)


class FakeSession:
    """What `session=` asks for, and no more."""

    class Answer:
        def __init__(self, status_code=200, reason="OK", text=None, headers=None):
            text = ZONES.decode("utf-8") if text is None else text
            self.status_code, self.reason, self.text = status_code, reason, text
            self.content = text.encode("utf-8")
            self.headers = headers or {"Content-Type": "application/json"}

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes) or [self.Answer()]
        self.calls = []

    def request(self, *args, **options):
        self.calls.append((args, options))
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class SessionTest(TransportCase):
    @both
    def test_it_is_called_as_the_contract_says(self, kind):
        session = FakeSession()
        client = self.client(ENDPOINT, kind, session=session, timeout=3)
        self.assertEqual(RESULT, self.call(client))
        client.method = "post"
        self.assertEqual(RESULT, self.call(client, headers={"X-A": "b"}))
        ((get_args, get), (post_args, post)) = session.calls
        self.assertEqual(("GET", 2), (get_args[0], len(get_args)))
        self.assertTrue(get_args[1].startswith(ENDPOINT + "?apiKey="))
        self.assertEqual(("POST", ENDPOINT), post_args)
        self.assertEqual({"data", "headers", "timeout", "allow_redirects"}, set(get))
        self.assertEqual((None, 3, False), (get["data"], get["timeout"], get["allow_redirects"]))
        self.assertEqual("cs/" + cs.__version__, get["headers"]["User-Agent"])
        self.assertIn(b"signature=", post["data"])
        self.assertEqual("b", post["headers"]["X-A"])
        self.assertEqual("application/x-www-form-urlencoded", post["headers"]["Content-Type"])

    @each("settings, expected", ({}, {}), ({"verify": True}, {}), ({"verify": "/x/ca.pem"}, {"verify": "/x/ca.pem"}),
          ({"dangerous_no_tls_verify": True}, {"verify": False}),
          ({"verify": "/x/ca.pem", "dangerous_no_tls_verify": True}, {"verify": "/x/ca.pem"}),
          ({"cert": "/x/own.pem"}, {"cert": "/x/own.pem"}),
          ({"cert": "/x/own.pem", "cert_key": "/x/own.key"}, {"cert": ("/x/own.pem", "/x/own.key")}))  # fmt: skip
    def test_verify_and_cert_only_where_set(self, settings, expected):
        session = FakeSession()
        self.client(ENDPOINT, session=session, **settings).listZones()
        options = session.calls[0][1]
        self.assertEqual(expected, {name: options[name] for name in ("verify", "cert") if name in options})

    @both
    def test_its_answers_are_read_as_any(self, kind):
        html = FakeSession.Answer(504, "Gateway Time-out", "<html>", {"Content-Type": "text/html"})
        refusal = FakeSession.Answer(431, "431", '{"errorresponse": {"errorcode": 431, "errortext": "no"}}')
        moved = FakeSession.Answer(302, "Found", "", {"Location": "http://other.invalid/?signature=x"})
        client = self.client(ENDPOINT, kind, session=FakeSession(html))
        error = self.fails(client, cs.CloudStackException)
        self.assertEqual(("HTTP 504 Gateway Time-out", 504), (error.args[0], error.response.status_code))
        client.session = FakeSession(refusal)
        self.assertEqual(431, self.fails(client, cs.CloudStackApiException).error["errorcode"])
        client.session = FakeSession(moved)
        self.assertIn("http://other.invalid/", str(self.fails(client, cs.CloudStackException)))

    @both
    def test_its_exceptions_are_wrapped_and_not_quoted(self, kind):
        class ReadTimeout(OSError):
            pass

        url = f"http://cloud.invalid/?apiKey={CANARY_KEY}&signature=abc"
        unknown, late = cs.CloudStackConnectionError, cs.CloudStackTimeoutError
        for raised, expected in ((ConnectionError("refused: " + url), unknown), (OSError(5, url), unknown),
                (TimeoutError(url), late), (ReadTimeout(url), late)):  # fmt: skip
            with self.subTest(type(raised).__name__):
                client = self.client(ENDPOINT, kind, session=FakeSession(raised))
                error = self.fails_unknown(client, expected)
                self.assertIn(type(raised).__name__, str(error))
                self.assertNotIn("signature=", "".join(all_texts(error)))

    @both
    @each("raised", AssertionError("not called so"), ValueError("its own"), RuntimeError())
    def test_what_it_raises_of_its_own_is_passed_on_as_it_is(self, kind, raised):
        """A mock's AssertionError, and what may be a mistake in the session; only OSErrors are told as ours."""
        client = self.client(ENDPOINT, kind, session=FakeSession(raised), retry=2, retry_backoff=0)
        with self.assertRaises(type(raised)) as caught:
            self.call(client, "deployVirtualMachine")
        self.assertIs(raised, caught.exception)
        self.assertEqual(1, len(client.session.calls))

    def test_a_mock_without_a_further_answer_raises_what_mocks_raise_then(self):
        client = self.client(ENDPOINT, session=FakeSession(StopIteration()))
        self.assertRaises(StopIteration, client.listZones)

    def test_a_mock_without_a_further_answer_does_not_hang_the_event_loop(self):
        """No future takes a StopIteration, which is what a mock raises then."""
        client = self.client(ENDPOINT, cs.AIOCloudStack, session=FakeSession(StopIteration()))
        self.assertRaises(RuntimeError, self.call, client)

    def test_an_interrupt_passes_through_it(self):
        client = self.client(ENDPOINT, session=FakeSession(KeyboardInterrupt()))
        self.assertRaises(KeyboardInterrupt, client.listZones)

    def test_reading_commands_are_tried_again_through_it(self):
        with mock.patch.object(cs, "_sleep", lambda seconds: None):
            session = FakeSession(ConnectionError("x"), FakeSession.Answer())
            self.assertEqual(RESULT, self.client(ENDPOINT, session=session, retry=1).listZones())

    def test_an_aiohttp_session_is_refused_in_one_line(self):
        session = type("ClientSession", (), {"__module__": "aiohttp.client"})()
        for refused in (self.refuses(kind, ENDPOINT, session=session) for kind in KINDS):
            self.assertRegex(str(refused), r"\Asession: .*aiohttp.*\Z")
        self.refuses(setattr, self.client(ENDPOINT), "session", session)

    def test_the_real_requests(self):
        try:
            import requests
        except ImportError:
            self.skipTest("requests is not installed")
        server = self.serve([READ, reply(), READ, chunked(), READ, reply(b"", "302 Found", "Location: /x"), READ, HOLD])
        with requests.Session() as session:
            client = self.client(server, session=session)
            self.assertEqual(RESULT, client.listZones(name="a b~*\u00fc"))
            client.method = "post"
            self.assertEqual(RESULT, client.listZones(name="a b~*\u00fc"))
            self.assertEqual(["a b~*\u00fc"] * 2, [request.params["name"] for request in server.requests])
            self.fails(client, cs.CloudStackException)
            client.timeout = 0.05
            self.fails(client, cs.CloudStackTimeoutError)
            agents = [request.header("User-Agent") for request in server.requests]
            self.assertEqual(["cs/" + cs.__version__] * 4, agents)
            server.close()
            self.fails(client)


RUN_MAIN = "loop = asyncio.new_event_loop()\nloop.run_until_complete(main())\nloop.close()\n"  # what a child ends with


class AsyncTransportTest(TransportCase):
    """What is AIOCloudStack's own: event loops, threads, cancelling."""

    KIND = cs.AIOCloudStack

    async def cancel(self, call, *conditions, after=0):
        """Make a call, and cancel it so many seconds after all this has come about."""
        task = asyncio.ensure_future(call)
        for condition in conditions:
            await until_async(condition)
        await asyncio.sleep(after)
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task

    def test_several_event_loops_one_after_another(self):
        server, client = self.pair(SERVE)

        async def with_it():
            async with client:
                return await client.listZones()

        for _ in range(2):
            self.assertEqual(RESULT, run(client.listZones()))
            self.assertEqual([RESULT] * 3, run(gathered(client.listZones() for _ in range(3))))
            self.assertEqual(RESULT, run(with_it()))

    def test_two_event_loops_at_once(self):
        server, client = self.pair([READ, echo, AGAIN])
        got = {}

        def work(number):
            answers = run(gathered(client.listZones(name=f"{number}-{turn}") for turn in range(8)))
            got[number] = [answer["zone"][0]["id"] for answer in answers]

        in_threads(3, work)
        self.assertEqual({number: [f"{number}-{turn}" for turn in range(8)] for number in range(3)}, got)

    def test_concurrency_bounds_its_threads(self):
        under_way, most = [], []

        def count(wire):
            under_way.append(wire)
            most.append(len(under_way))
            time.sleep(0.002)
            under_way.remove(wire)

        server, client = self.pair([READ, count, reply(), AGAIN], concurrency=3)
        names = {thread.name for thread in threading.enumerate()}
        self.assertEqual([RESULT] * 20, run(gathered(client.listZones() for _ in range(20))))
        started = {thread.name for thread in threading.enumerate()} - names
        own = [name for name in started if name.startswith("cs")]
        self.assertTrue(1 <= len(own) <= 3, own)
        self.assertLessEqual(max(most), 3)
        self.assertLessEqual(len(server.wires), 3)

    def test_as_many_as_concurrency_run_at_once(self):
        together = threading.Barrier(40)
        server, client = self.pair([READ, lambda wire: together.wait(PATIENCE_OF_TESTS) and None, reply(), AGAIN])
        self.assertEqual([RESULT] * 40, run(gathered(client.listZones() for _ in range(40))))

    @staticmethod
    def at_most(number):
        """Let so many threads of cs.py be started, and no more, as a limit of the system does."""
        really = threading.Thread.start
        started = []

        def start(thread):
            if thread.name.startswith("cs"):
                if len(started) >= number:
                    raise RuntimeError("can't start new thread")
                started.append(thread)
            really(thread)

        return mock.patch.object(threading.Thread, "start", start)

    @each("threads", 0, 1, 3)
    def test_under_a_limit_of_threads_every_call_is_answered(self, threads):
        """Finding 02: commands ran although the caller got a RuntimeError."""
        with self.at_most(threads):
            server, client = self.pair([READ, echo, AGAIN])
            names = [str(number) for number in range(20)]
            answers = run(gathered(client.updateZone(name=name) for name in names))
            self.assertEqual(names, [answer["zone"][0]["id"] for answer in answers])
            self.assertEqual(20, len(server.requests))
            self.assertEqual(threads, len(workers_of(client).threads))

    @each("threads", 0, 1, 2, 3)
    def test_under_a_limit_of_threads_a_list_is_whole(self, threads):
        """Finding 02: the pages that no thread is to be had for are asked for one after another."""
        with self.at_most(threads):
            server, client = self.pair([READ, paged(35), AGAIN], kind=cs.CloudStack)
            rows = client.listZones(fetch_list=True, pagesize=5)
            self.assertEqual([str(number) for number in range(35)], [row["id"] for row in rows])

    @unittest.skipUnless(hasattr(os, "fork"), "RLIMIT_NPROC is Unix's own")
    def test_where_the_system_gives_no_thread_at_all_and_at_the_interpreters_exit(self):
        code = (
            "import asyncio, atexit, cs, os, resource, sys\n"
            "client, aio = cs.CloudStack(sys.argv[1], 'k', 's'), cs.AIOCloudStack(sys.argv[1], 'k', 's')\n"
            "loop = asyncio.new_event_loop()\n"
            "def work():\n"
            "    rows = client.listZones(fetch_list=True, pagesize=1)\n"
            "    print(len(rows), loop.run_until_complete(aio.listZones())['count'])\n"
            "client.listZones(fetch_list=True, pagesize=1)  # all that is imported is imported\n"
            "atexit.register(lambda: sys.argv[2] and os.getresuid()[2] == 0 and os.setresuid(0, 0, 0))\n"
            "atexit.register(work)\n"
            "if sys.argv[2] == 'limited':\n"
            "    if os.getuid() == 0:  # no limit holds for root, who comes back for what else is done at the exit\n"
            "        os.setresuid(54321, 54321, 0)\n"
            "    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))\n"
            "    work()\n"
        )
        server = self.serve([READ, paged(9), AGAIN])
        self.assertEqual("9 9\n", self.assert_child(code, server.url, ""))
        if sys.platform.startswith("linux"):
            self.assertEqual("9 9\n9 9\n", self.assert_child(code, server.url, "limited"))

    def test_many_calls_from_several_event_loops_are_each_done_once(self):
        """A call is lost where a worker falls asleep just when work comes."""
        client = cs.AIOCloudStack(ENDPOINT, "k", "s", concurrency=3)
        done = collections.deque()
        object.__setattr__(client, "_exchange", lambda request: done.append(1) or answer({"r": {}}))
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        self.addCleanup(sys.setswitchinterval, interval)

        async def work():
            for _ in range(20):
                await gathered(client.updateZone() for _ in range(15))

        in_threads(3, lambda number: run(work()))
        self.assertEqual(900, len(done))
        self.assertLessEqual(len(workers_of(client).threads), 3)

    def test_an_event_loop_that_was_closed_meanwhile_is_no_harm(self):
        go_on = threading.Event()
        server, client = self.pair([READ, go_on, reply(), AGAIN], concurrency=1)
        loop = asyncio.new_event_loop()
        task = loop.create_task(client.listZones())
        loop.run_until_complete(until_async(lambda: server.requests, "asking"))
        task._log_destroy_pending = False
        loop.close()
        go_on.set()
        self.assertEqual(RESULT, run(client.listZones()))  # in the one thread, which is still there

    def test_a_client_that_is_dropped_leaves_no_threads(self):
        server = self.serve(SERVE)

        def work():
            client = cs.AIOCloudStack(server.url, "k", "s")
            run(client.listZones())
            return list(workers_of(client).threads)

        threads = work()

        def ended():
            gc.collect()  # PyPy takes more than one to get there
            return not any(thread.is_alive() for thread in threads)

        until(ended, "ending the threads")
        until(server.wires[0].ended.is_set, "closing the connection")

    @with_and_without_tls
    @each("content", b"", reply()[:-5])
    def test_cancelling_wakes_the_reading_thread(self, tls, content):
        """In an answer, over plain HTTP and TLS; long before the time-out of 1000 s."""
        context, ca = tls_and_ca(tls)
        server, client = self.pair([READ, content, HOLD], tls=context, timeout=1000, verify=ca)
        run(self.cancel(client.deployVirtualMachine(), lambda: server.requests))
        until(server.wires[0].ended.is_set, "hanging up")
        until(lambda: not any(map(len, transport_of(client)._idle.values())), "forgetting it")
        self.assertEqual(1, len(server.requests))

    @unittest.skipUnless(sys.platform.startswith("linux"), "needs /proc, and how Linux takes a full queue")
    def test_cancelling_wakes_a_thread_that_connects_or_shakes_hands(self):
        """Finding 05; long before the time-out, and no descriptor is left."""
        listener = full_listener(self)
        full = f"127.0.0.1:{listener.getsockname()[1]}"
        silent, proxy = self.serve([HOLD]), self.serve([READ, HOLD])
        self.share_contexts()
        for endpoint, proxied, begun in (
            ("http://" + full, None, lambda: True), ("https://" + full, None, lambda: True),
            ("https://" + silent.place, None, lambda: any(wire.raw for wire in silent.wires)),
            ("https://cloud.invalid", proxy.url, lambda: proxy.requests)
        ):  # fmt: skip
            with self.subTest(endpoint, proxied=proxied):
                if proxied:
                    os.environ["https_proxy"] = proxied
                client = self.client(endpoint, timeout=1000, concurrency=1)
                before = len(os.listdir("/proc/self/fd"))
                workers = workers_of(client)
                started = lambda workers=workers: workers.threads and not workers._idle  # noqa: E731
                run(self.cancel(client.deployVirtualMachine(), started, begun, after=0.02))
                until(lambda workers=workers: workers._idle, "waking up")
                until(lambda: not any(server.open_wires for server in (silent, proxy)), "hanging up")
                self.assertEqual([], [request.line for request in silent.requests])
                until(lambda before=before: len(os.listdir("/proc/self/fd")) <= before, "closing")

    def test_a_process_ends_at_once_after_a_cancel(self):
        """Finding 05: in a handshake and in a name look-up that hang; the time-out is far beyond the test's."""
        code = (
            "import asyncio, cs, socket, sys, time\n"
            "if sys.argv[2]: socket.getaddrinfo = lambda *args: time.sleep(1000)\n"
            "async def main():\n"
            "    client = cs.AIOCloudStack(sys.argv[1], 'k', 's', timeout=1000)\n"
            "    task = asyncio.ensure_future(client.listZones())\n"
            "    await asyncio.wait([task], timeout=0.2)\n"
            "    task.cancel()\n"
            "    await asyncio.wait([task])\n"
            "    print(task.cancelled())\n"
            + RUN_MAIN
        )
        server = self.serve([HOLD])
        for slow_names in ("", "yes"):
            with self.subTest(slow_names=slow_names):
                self.assertEqual("True\n", self.assert_child(code, "https://" + server.place, slow_names))

    @needs_openssl
    def test_cancelling_before_the_connection_is_made_sends_nothing(self):
        go_on = threading.Event()
        tls = certificates().server()
        steps = [tls, READ, reply(), READ, reply(), HOLD]
        server = self.serve([go_on] + steps, steps)
        url = server.url.replace("http:", "https:")
        client = self.client(url, verify=certificates().path("ca.pem"), concurrency=1)

        async def work():
            await self.cancel(client.deployVirtualMachine(), lambda: server.wires)
            go_on.set()
            return await client.listZones()  # in the one thread, so the other is done with by then

        self.assertEqual(RESULT, run(work()))
        self.assertEqual(["listZones"], [request.params["command"] for request in server.requests])

    def test_cancelling_a_call_that_waits_for_a_thread_sends_nothing(self):
        go_on = threading.Event()
        server, client = self.pair([READ, go_on, reply(), READ, reply(), HOLD], concurrency=1)

        async def work():
            first = asyncio.ensure_future(client.listZones(name="first"))
            await until_async(lambda: server.requests, "asking")
            await self.cancel(client.deployVirtualMachine(), after=0.01)
            go_on.set()
            await first
            await client.listZones(name="third")

        run(work())
        self.assertEqual(["listZones", "listZones"], [request.params["command"] for request in server.requests])

    def test_cancelling_between_two_tries_starts_no_other(self):
        server, client = self.pair([READ, RESET], retry=50)

        async def work():
            pausing, over = asyncio.Event(), asyncio.Event()

            async def pause(seconds):
                pausing.set()
                await over.wait()

            with mock.patch("asyncio.sleep", pause):
                task = asyncio.ensure_future(client.listZones())
                await pausing.wait()
                task.cancel()
                over.set()
                with self.assertRaises(asyncio.CancelledError):
                    await task

        run(work())
        self.assertEqual(1, len(server.requests))

    def test_cancelling_a_walk_cuts_off_all_its_pages(self):
        server, client = self.pair([READ, paged(50), READ, HOLD], [READ, HOLD], timeout=1000)

        async def work():
            walk = client.listZones(fetch_list=True, pagesize=5)
            await self.cancel(walk, lambda: len(server.requests) == 1 + cs.PAGES_AHEAD)
            await until_async(lambda: not server.open_wires, "hanging up")

        run(work())
        self.assertEqual(1 + cs.PAGES_AHEAD, len(server.requests))

    def test_wait_for(self):
        server, client = self.pair([READ, HOLD], SERVE, timeout=1000)

        async def work():
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(client.listZones(), 0.2)
            await until_async(server.wires[0].ended.is_set, "hanging up")
            return await client.listZones()

        self.assertEqual(RESULT, run(work()))

    @unittest.skipIf(sys.version_info < (3, 7), "there are no context variables before 3.7")
    def test_context_variables_are_carried_over(self):
        import contextvars

        variable = contextvars.ContextVar("variable", default="none")
        seen = []

        class Session(FakeSession):
            def request(self, *args, **options):
                seen.append((variable.get(), threading.current_thread() is threading.main_thread()))
                return FakeSession.request(self, *args, **options)

        client = self.client(ENDPOINT, session=Session())

        async def work(value):
            variable.set(value)
            await client.listZones()

        run(gathered(map(work, "ab")))
        self.assertEqual([("a", False), ("b", False)], sorted(seen))

    def test_the_event_loop_is_never_held_up(self):
        """While the server is silent, other tasks go on."""
        ticks = threading.Event()
        server, client = self.pair([READ, ticks, reply()])

        async def work():
            task = asyncio.ensure_future(client.listZones())
            for _ in range(5):
                await asyncio.sleep(0.001)
            ticks.set()
            return await task

        self.assertEqual(RESULT, run(work()))


class ProcessTest(TransportCase):
    """What shows only in a process of its own: imports, forks, warnings, other places and names."""

    NEVER = "asyncio argparse configparser dataclasses concurrent.futures pygments requests aiohttp"
    LATER = " typing logging ssl urllib.request http.client email random datetime socket select tempfile subprocess"

    def test_importing_it_imports_nothing_slow(self):
        code = (
            "import hmac, sys\n"  # which brings in socket on PyPy
            "before = set(sys.modules)\n"
            "import cs\n"
            "print(' '.join(sorted(set(sys.argv[1].split()) & (set(sys.modules) - before))))\n"
        )
        self.assertEqual("\n", self.assert_child(code, self.NEVER + self.LATER, flags=("-S",)))

    def test_a_plain_call_imports_no_module_that_it_does_not_need(self):
        code = (
            "import cs, sys\n"
            "cs.CloudStack(sys.argv[1], 'k', 's').listZones()\n"
            "print(' '.join(sorted(set(sys.argv[2].split()) & set(sys.modules))))\n"
        )
        self.assertEqual("\n", self.assert_child(code, self.serve(SERVE).url, self.NEVER, flags=("-S",)))

    def test_all_is_what_is_exported(self):
        names = {}
        exec("from cs import *", names)
        del names["__builtins__"]
        self.assertEqual(sorted(cs.__all__), sorted(names))
        self.assertEqual(sorted(set(cs.__all__)), sorted(cs.__all__))
        contract = "CloudStack AIOCloudStack CloudStackException CloudStackApiException main".split()
        self.assertLessEqual({"read_config", "read_config_from_ini"}.union(contract), set(cs.__all__))
        for name in "transform cs_encode check_key strtobool EXPIRES_FORMAT __version__".split():
            self.assertTrue(hasattr(cs, name), name)

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
        server = self.serve([READ, echo, READ, echo], SERVE[:1] + [echo])
        self.assertEqual("a\nb\nc\n", self.assert_child(code, server.url))
        self.assertEqual([2, 1], server.counts)

    @each("path, name", ("vendored.py", "vendored"), ("package/_cs.py", "package._cs"))
    def test_under_another_name_and_inside_a_package(self, path, name):
        os.makedirs(os.path.join(self.home, "package"), exist_ok=True)
        self.write("package/__init__.py", "")
        shutil.copy(CS_PATH, os.path.join(self.home, path))
        code = (
            "import importlib, pickle, sys\n"
            "cs = importlib.import_module(sys.argv[1])\n"
            "assert 'cs' not in sys.modules\n"
            "client = pickle.loads(pickle.dumps(cs.CloudStack(sys.argv[2], 'k', 's')))\n"
            "print(client.listZones(name='x')['zone'][0]['id'])\n"
            "client.endpoint = 'http://127.0.0.1:1/'\n"
            "try: client.listZones()\n"
            "except cs.CloudStackConnectionError as error: error = pickle.loads(pickle.dumps(error))\n"
            "print(type(cs.CloudStackException()).__module__, cs.AIOCloudStack.__module__)\n"
        )
        out = self.assert_child(code, name, self.serve([READ, echo, AGAIN]).url, path=self.home)
        self.assertEqual(f"x\n{name} {name}\n", out)

    @with_and_without_tls
    def test_dropping_a_client_gives_no_warning(self, tls):
        """Sync and async, at once, with a walk under way, after errors, and at the end of the interpreter."""
        code = (
            "import asyncio, cs, sys\n"
            "url, broken, ca = sys.argv[1:]\n"
            "make = lambda kind, url=url: kind(url, 'k', 's', verify=ca or None, timeout=20)\n"
            "make(cs.CloudStack).listZones()\n"
            "client, kept = make(cs.CloudStack), make(cs.CloudStack)\n"
            "client.listZones(), kept.listZones()\n"
            "del client\n"
            "rows = kept.iter_list('listZones')\n"
            "next(rows)\n"
            "for _ in range(3):\n"
            "    try: make(cs.CloudStack, broken).listZones()\n"
            "    except cs.CloudStackException: pass\n"
            "async def main():\n"
            "    one = make(cs.AIOCloudStack)\n"
            "    await asyncio.gather(*[one.listZones() for _ in range(4)])\n"
            "    async for row in make(cs.AIOCloudStack).iter_list('listZones'): pass\n"
            "    task = asyncio.ensure_future(make(cs.AIOCloudStack, broken + '?hang').listZones())\n"
            "    await asyncio.sleep(0.1)\n"
            "    task.cancel()\n"
            "    async with make(cs.AIOCloudStack) as two: await two.listZones()\n"
            "    global left\n"
            "    left = make(cs.AIOCloudStack)\n"
            "    await left.listZones()\n"
            + RUN_MAIN + "print('done')\n"
        )

        def break_or_hang(wire):
            while "hang" in wire.requests[-1].target and wire.more():
                pass
            return wire.send(reply()[:-5]) and False

        context, ca = tls_and_ca(tls)
        server, broken = self.serve(SERVE, tls=context), self.serve([READ, break_or_hang], tls=context)
        flags = ("-X", "dev", "-W", "error", "-bb")
        self.assertEqual("done\n", self.assert_child(code, server.url, broken.url, ca or "", flags=flags))

    def test_an_interrupt_just_before_an_answer_is_read_gives_no_warning(self):
        code = (
            "import sys, unittest.mock as mock, cs\n"
            "client = cs.CloudStack(sys.argv[1], 'k', 's')\n"
            "with mock.patch('cs._AnswerReader.makefile', side_effect=KeyboardInterrupt):\n"
            "    try: client.listZones()\n"
            "    except KeyboardInterrupt: print('interrupted')\n"
        )
        self.assertEqual("interrupted\n", self.assert_child(code, self.serve(SERVE).url, flags=("-X", "dev")))

    def test_an_interrupt_while_a_client_gets_ready_gives_no_warning(self):
        """Its parts are unmade before they are made; os.getpid stands for any moment of theirs."""
        code = (
            "import asyncio, os, sys, unittest.mock as mock\n"
            "import cs\n"
            "for kind in (cs.CloudStack, cs.AIOCloudStack):\n"
            "    for moment in range(12):\n"
            "        loop = asyncio.new_event_loop()\n"
            "        client = kind(sys.argv[1], 'k', 's')\n"
            "        pids = [os.getpid()] * moment + [KeyboardInterrupt]\n"
            "        with mock.patch('os.getpid', side_effect=pids) as getpid:\n"
            "            try:\n"
            "                if kind is cs.CloudStack: client.listZones()\n"
            "                else: loop.run_until_complete(client.listZones())\n"
            "            except (KeyboardInterrupt, StopIteration): print('interrupted')\n"
            "            except RuntimeError: print('ended')\n"
            "        del client\n"
            "        loop.close()\n"
        )
        out = self.assert_child(code, self.serve(SERVE).url, flags=("-W", "ignore::RuntimeWarning"))  # asyncio's, 3.6
        self.assertGreaterEqual(out.count("interrupted"), 4)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    @each("kind, tls", (cs.CloudStack, False), (cs.AIOCloudStack, False), (cs.CloudStack, bool(OPENSSL)))
    def test_a_fork_starts_with_connections_of_its_own(self, kind, tls):
        code = (
            "import asyncio, cs, os, sys, warnings\n"
            "warnings.simplefilter('ignore')  # a fork beside threads is what is tried here\n"
            "client = getattr(cs, sys.argv[1])(sys.argv[2], 'k', 's', verify=sys.argv[3] or None)\n"
            "def call(name):\n"
            "    got = client.listZones(name=name)\n"
            "    if asyncio.iscoroutine(got):\n"
            "        loop = asyncio.new_event_loop()\n"
            "        got = loop.run_until_complete(got)\n"
            "        loop.close()\n"
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
        context, ca = tls_and_ca(tls)
        server = self.serve([READ, echo, AGAIN], tls=context)
        self.assert_child(code, kind.__name__, server.url, ca or "")
        names = sorted([request.params["name"] for request in wire.requests] for wire in server.wires)
        self.assertEqual([["child"] * 2, ["parent"] * 3], names)

    @both
    def test_an_unpickled_or_copied_client_starts_no_thread_and_opens_nothing(self, kind):
        threads = threading.active_count()
        client = kind("http://127.0.0.1:1/", "k", "s")
        for other in (client, copy.copy(client), copy.deepcopy(client), pickle.loads(pickle.dumps(client))):
            self.assertFalse(other._state._by_process)
        self.assertEqual(threads, threading.active_count())


@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc here")
class LeakTest(TransportCase):
    """Hundreds of broken exchanges leave no socket, no thread and no file descriptor behind."""

    BREAKS = [[], [RESET], [READ], [READ, RESET], [READ, b"garbage\r\n\r\n"], [READ, b"HTTP/1.1 2"],
        [READ, reply()[:-5]], [READ, chunked()[:-5]], [READ, reply(b"xx", "200 OK", GZIP)],
        [READ, reply(b"", "302 Found", "Location: /")], [READ, reply(b"x" * 5000)], [READ, reply(b"<html>", "503 x")],
        [READ, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"], [READ, reply() + b"surplus"],
        [READ, reply(b"", "204 No Content")], [READ, reply(length=False)], [READ, b"x" * 70000]]  # fmt: skip

    @staticmethod
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def breaking_server(self, ways):
        """A server that breaks each connection in the next of these ways."""
        ways = itertools.cycle(ways)
        server = self.serve([lambda wire: all(server._do(wire, step) for step in next(ways))])
        return server

    @staticmethod
    def settle(server):
        until(lambda: not server.open_wires, "closing")
        until(lambda: len([thread for thread in server.threads if thread.is_alive()]) == 1, "ending")

    def assert_no_leak(self, work, rounds, server):
        """Run the work, once to warm up and then many times, without the garbage collector."""
        work()
        self.settle(server)
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        before, threads = self.descriptors(), threading.active_count()
        for _ in range(rounds):
            work()
        self.settle(server)
        self.assertEqual((before, threads), (self.descriptors(), threading.active_count()))

    @both
    def test_every_way_to_break(self, kind):
        server = self.breaking_server(self.BREAKS)
        client = self.client(server, kind, max_response_size=4000, concurrency=1)

        def work():
            for _ in self.BREAKS:
                with contextlib.suppress(cs.CloudStackException):
                    self.call(client)

        self.assert_no_leak(work, max(8, ATTACK_RUNS // 20), server)

    def test_time_outs(self):
        server, client = self.pair([READ, HOLD], timeout=0.002)

        def work():
            with contextlib.suppress(cs.CloudStackTimeoutError):
                client.listZones()

        self.assert_no_leak(work, 30, server)

    @needs_openssl
    def test_tls_and_tunnels_that_fail(self):
        refusal = b"HTTP/1.1 407 no\r\n\r\n"
        ways = [[certificates().server("elsewhere"), READ], [READ, refusal], [TlsTest.some_of_it, RESET], [READ, RESET]]
        server, ca = self.breaking_server(ways), certificates().path("ca.pem")
        direct = self.client(server.url.replace("http:", "https:"), verify=ca)
        os.environ.update(https_proxy=server.url, no_proxy="127.0.0.1")
        tunnelled = self.client("https://cloud.invalid/", verify=ca)

        def work():
            for client in (direct, tunnelled, direct, tunnelled):
                with contextlib.suppress(cs.CloudStackException):
                    client.listZones()

        self.assert_no_leak(work, 20, server)


@contextlib.contextmanager
def hurried():
    """The clients' pauses take no time; their clock jumps instead."""
    jumped = [0.0]

    def sleep(seconds):
        jumped[0] += seconds

    async def asleep(seconds):
        sleep(seconds)

    clock = lambda: time.monotonic() + jumped[0]  # noqa: E731
    with mock.patch.multiple(cs, _clock=clock, _sleep=sleep), mock.patch("asyncio.sleep", asleep):
        yield


class AtMostOnceTest(TransportCase):
    """A deployment whose connection breaks, at any byte of the request and of the answer: the server never accepts more
    than were called for, and who gets an exception is told whether it may have happened."""

    FRAMINGS = {"length": reply, "chunked": chunked, "until the end": functools.partial(reply, length=False)}

    def setUp(self):
        TransportCase.setUp(self)
        self.plan, self.accepted = None, 0  # (side, position, framing, reset) for the request that comes next
        self.jobs = set()  # the ids that the accepted deployments chose
        self.server = self.serve([self.play])

    def play(self, wire):
        while wire.sock.recv(1, socket.MSG_PEEK):
            plan, self.plan = self.plan, None
            if not self.answer(wire, *(plan or (None, None, "length", False))):
                break
        return False

    def answer(self, wire, side, position, framing, reset):
        """Read and answer one request, or break off; False where the connection is over."""
        request = wire.read_request(position) if side == "request" else wire.read_request()
        command = request.params["command"] if request is not None else None
        content = reply()
        if command == "deployVirtualMachine":
            self.accepted += 1
            jobid = request.params.get("customjobid", JOB)
            self.jobs.add(jobid)
            content = self.FRAMINGS[framing](deployment(jobid))
        elif command == "queryAsyncJobResult":
            content = self.job(request.params["jobid"])
        if side == "request" or request is None:
            return reset and wire.reset()
        if side == "answer":
            wire.send(content[:position])
            return reset and wire.reset()
        return wire.send(content) and framing != "until the end"

    def job(self, jobid):
        if jobid in self.jobs:
            job = {"jobid": jobid, "jobstatus": 0, "jobinstanceid": "vm-1"}
            return reply({"queryasyncjobresultresponse": job})
        error = {"errorcode": 431, "cserrorcode": 9999, "errortext": "entity does not exist"}
        return reply({"queryasyncjobresultresponse": error}, "431 431")

    def break_one(self, kind, method, kept, plan, retry=2, **settings):
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
            self.assertLessEqual(accepted, 1)
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
            self._close(client) if kind is cs.AIOCloudStack else client.close()
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

    def test_wherever_the_connection_breaks(self):
        chosen = self.attacks(ATTACK_SEED)
        unknown = 0
        for attack in chosen:
            with self.subTest(attack):
                error = self.break_one(*attack)
                unknown += error is not None and error.outcome_unknown
        self.assertGreater(unknown, len(chosen) // 2)

    def test_wherever_it_breaks_the_job_of_what_was_accepted_is_found(self):
        """With recover, and while the server is up, no accepted deployment ends in an unknown outcome."""
        chosen = self.attacks(ATTACK_SEED + 1)
        found = 0
        for attack in chosen:
            with self.subTest(attack), hurried():
                error = self.break_one(*attack, recover=True)
                self.assertEqual((error is None, self.last_accepted), (bool(self.last_accepted), error is None))
                found += error is None
        self.assertGreater(found, len(chosen) // 4)

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
        """Threads and tasks share one client whose server breaks every third connection."""
        counter = itertools.count()
        accepted = []

        def moody(wire):
            while True:
                if next(counter) % 3 == 0:
                    wire.read_request(50)
                    return False
                request = wire.read_request()
                if request is None:
                    return False
                accepted.append(request.params["name"])
                if next(counter) % 5 == 0 or not wire.send(reply(DEPLOYED)):
                    return False

        server, client = self.pair([moody], retry=2, retry_backoff=0)
        outcomes = {}

        def work(number):
            for name in [f"{number}-{turn}" for turn in range(10)]:
                try:
                    outcomes[name] = client.deployVirtualMachine(name=name)
                except cs.CloudStackException as error:
                    outcomes[name] = error

        in_threads(6, work)
        aio = self.client(server, cs.AIOCloudStack, retry=2, retry_backoff=0)
        names = [f"task-{number}" for number in range(40)]

        async def tasks():
            calls = [aio.deployVirtualMachine(name=name) for name in names]
            return await asyncio.gather(*calls, return_exceptions=True)

        outcomes.update(zip(names, run(tasks())))
        self.assertEqual(100, len(outcomes))
        self.assertEqual(len(set(accepted)), len(accepted))
        for name, outcome in outcomes.items():
            if isinstance(outcome, cs.CloudStackException):
                self.assertTrue(outcome.outcome_unknown or name not in accepted, name)
            else:
                self.assertIn(name, accepted)


class SecretsTest(TransportCase):
    """Keys, passwords, session keys and tokens are seen on the wire, and nowhere else."""

    ECHO = CANARY_KEY + " and " + CANARY_SECRET
    SECRET_ANSWER = json.dumps({"r": {"user": [{"apikey": CANARY_KEY, "secretkey": CANARY_SECRET, "username": "me"}],
        "password": CANARY_PASSWORD, "sessionkey": CANARY_SESSION, "echo": ECHO,
        "virtualmachine": {"userdata": CANARY_TOKEN, "details": {"vnc.password": CANARY_PASSWORD}}}})  # fmt: skip

    def login(self, wire):
        """A server with sessions, which is shown the secrets and gives some back."""
        if wire.requests[-1].params["command"] != "login":
            return wire.send(reply(self.SECRET_ANSWER.replace(self.ECHO, CANARY_SESSION + CANARY_TOKEN).encode()))
        cookies = f"JSESSIONID={CANARY_TOKEN}; Path=/client; HttpOnly", "sessionkey=" + CANARY_SESSION
        document = {"loginresponse": {"sessionkey": CANARY_SESSION, "username": "me"}}
        return wire.send(reply(document, "200 OK", *["Set-Cookie: " + cookie for cookie in cookies]))

    @both
    @each("method", "get", "post")
    def test_the_trace_of_signed_requests(self, kind, method):
        headers = {"Authorization": "Bearer " + CANARY_TOKEN, "Cookie": "a=" + CANARY_TOKEN, "X-Tenant": "t1"}
        headers.update(dict.fromkeys(["X-Api-Key", "X-Auth-Token", "Proxy-Authorization"], CANARY_TOKEN))
        content = reply(self.SECRET_ANSWER.encode(), "200 OK", "Set-Cookie: a=" + CANARY_TOKEN)
        server, client = self.pair([READ, content, AGAIN], kind=kind, method=method, trace=True, headers=headers)
        secrets = {"password": CANARY_PASSWORD, "userdata": CANARY_SECRET}
        text = self.traced(client, "updateUser", name="visible", **secrets)
        request = server.requests[0]
        self.assertEqual(("POST", CANARY_PASSWORD), (request.method, request.params["password"]))
        for shown in "name=visible|X-Tenant: t1|200 OK|password=***|signature=***|\"username\": \"me\"".split("|"):
            self.assertIn(shown, text)
        self.traced(client, "listZones", json=False)

    def test_the_trace_of_xml(self):
        secrets = {"password": CANARY_PASSWORD, "sessionkey": CANARY_SESSION, "userdata": CANARY_TOKEN}
        body = "".join(f"<{name}>{value}</{name}>" for name, value in dict(secrets, name="visible").items())
        server, client = self.pair([READ, reply(f"<r>{body}</r>".encode()), AGAIN], trace=True)
        self.assertIn("visible", self.traced(client, "listUsers", json=False))

    def test_the_trace_of_a_page_that_quotes_the_request(self):
        def quote_back(wire):
            request = wire.requests[-1]
            body = f"<h1>404</h1><p>visible: {request.target} {request.params['signature']}</p>"
            return wire.send(reply(body.encode(), "404 Not Found"))

        server = self.serve([READ, quote_back, AGAIN])
        self.assertIn("visible: /client/api?", self.traced(self.client(server, trace=True)))

    @both
    def test_the_trace_of_a_session(self, kind):
        server = self.serve([READ, self.login, AGAIN])
        client = kind(server.url, username="me", password=CANARY_PASSWORD, trace=True, timeout=5)
        text = self.traced(client)
        self.assertIn("command=login", text)
        self.assertIn("username=me", text)
        self.assertEqual(CANARY_SESSION, server.requests[1].params["sessionkey"])
        self.assertIn("JSESSIONID=" + CANARY_TOKEN, server.requests[1].header("Cookie"))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            client.close()
        self.assert_tells_nothing(err.getvalue())

    @both
    @each("steps", [], [READ], [READ, reply()[:-5]], [READ, b"garbage\r\n"],
          [READ, reply(b"<html>" + CANARY_KEY.encode(), "500 x")])  # fmt: skip
    def test_the_trace_of_exchanges_that_fail(self, kind, steps):
        client = self.client(self.serve(steps), kind, trace=True)
        self.assertIn("command=deployVirtualMachine", self.traced(client, "deployVirtualMachine"))

    def test_the_trace_through_a_proxy(self):
        server = self.serve(SERVE[:2] + [READ, reply()], [READ, b"HTTP/1.1 407 no\r\n\r\n"])
        os.environ["http_proxy"] = os.environ["https_proxy"] = f"http://me:{CANARY_PROXY}@{server.place}"
        for endpoint in (ENDPOINT, ENDPOINT.replace("http:", "https:")):
            self.assertIn("cloud.invalid", self.traced(self.client(endpoint, trace=True)))
        self.assertEqual(2, len([request for request in server.requests if request.all("Proxy-Authorization")]))

    @both
    @each("content", reply({"loginresponse": {"errorcode": 531, "errortext": "Failed to authenticate"}}, "531 531"),
          b"", b"garbage\r\n", reply(b"<html>", "502 x"))  # fmt: skip
    def test_errors_of_a_session(self, kind, content):
        client = kind(self.serve([READ, content]).url, username="me", password=CANARY_PASSWORD, timeout=5)
        self.assert_tells_nothing(self.refuses(self.call, client, kind=cs.CloudStackException))
        transport_of(client).close()

    @both
    def test_reprs(self, kind):
        settings = {"headers": {"X-Token": CANARY_TOKEN}}
        one = kind(ENDPOINT + "?token=" + CANARY_TOKEN, CANARY_KEY, CANARY_SECRET, **settings)
        other = kind("http://cloud.invalid/", username="me", password=CANARY_PASSWORD, name="region")
        self.assert_tells_nothing(repr(one), str(one), repr(other), repr(transport_of(one)), repr(one.listZones))
        self.assertIn(ENDPOINT, repr(one))

    def test_requests_are_no_open_book_either(self):
        """A debugger or a log that shows what the protocol yields must not show secrets."""
        seen = []
        client = self.client("http://cloud.invalid/")
        exchange = lambda self, request: seen.append(repr(request)) or answer({"r": {}})  # noqa: E731
        with mock.patch.object(cs.CloudStack, "_exchange", exchange):
            client.listZones()
        self.assert_tells_nothing(*seen)

    def test_errors_name_the_endpoint_without_its_query(self):
        server = self.serve([])
        error = self.fails(self.client(server.url + "?token=" + CANARY_TOKEN + "#" + CANARY_SECRET))
        self.assertIn(server.url, str(error))

    @each("scheme, user, port", ("http", "me:", ""), ("http", "", ""), ("http", "me:", ":x"), ("ftp", "me:", ""))
    def test_a_user_in_the_endpoint_is_refused_and_not_quoted(self, scheme, user, port):
        endpoint = f"{scheme}://{user}{CANARY_TOKEN}@127.0.0.1{port}/"
        self.refuses(lambda: self.client(endpoint).listZones())

    def test_what_the_checks_look_for_can_be_found(self):
        """The search itself: an exception that does tell is caught, in each of the places where it may tell."""
        telling = cs.CloudStackException("x", "signed with " + CANARY_SECRET)
        caused = cs.CloudStackException("x")
        caused.__cause__ = OSError("?password=" + quote_plus(CANARY_PASSWORD))
        inside = cs.CloudStackException("x")
        inside.__context__ = ValueError(b"Basic " + base64.b64encode(b"me:" + CANARY_PROXY.encode()))
        kept = cs.CloudStackException("x")
        kept.request = CANARY_KEY
        for error in (telling, caused, inside, kept):
            self.assertRaises(AssertionError, self.assert_tells_nothing, error)


# === [4] redaction ==================================================================================================


class RedactionTest(TransportCase):
    """Each redaction by itself: where one is gone, something that nobody may see is shown."""

    QUERY = "?token=" + CANARY_TOKEN

    @each("body, status", (b"<html>", "404 Not Found"), (b"{", "200 OK"), (b"[1]", "200 OK"), (b"", "200 OK"),
          (b"{}", "500 x"))  # fmt: skip
    @both
    def test_no_advice_quotes_the_query_of_the_endpoint(self, body, status, kind):
        server = self.serve([READ, reply(body, status), AGAIN])
        self.fails(self.client(server.url + self.QUERY, kind), cs.CloudStackException)

    @each("secret", 'CANARY~"quoted"', "CANARY*star(1)", "CANARY/slash ü", "CANARY\\back\n")
    def test_a_secret_that_an_answer_quotes_is_hidden_in_each_form_and_whole(self, secret):
        """As it is, percent-encoded as the server does and as everybody else does, and escaped in JSON."""
        for text in (secret, cs.cs_encode(secret), quote(secret), json.dumps(secret)[1:-1]):
            self.assertEqual("<***>", cs._mask_text("<" + text + ">", ["", None, "abc", secret]), text)

    def test_a_secret_that_holds_another_is_hidden_whole(self):
        self.assertEqual("<***>", cs._mask_text("<CANARY-and-more>", ["CANARY", "CANARY-and-more"]))

    def test_secrets_of_four_letters_are_hidden_and_shorter_ones_are_not(self):
        self.assertEqual("*** abc", cs._mask_text("abcd abc", ["abc", "abcd"]))

    @each("name", *(
        "password passwd passphrase secret secretkey secret_key privatekey private-key userdata user_data"
        " sessionkey JSESSIONID signature apikey api-key accesskey token credential credentials psk presharedkey"
        " pre-shared-key bindpass secretcode codefor2fa configdata").split())  # fmt: skip
    def test_what_is_secret_by_its_name(self, name):
        """Every name that is told apart, on its own and as the end of another, however it is written."""
        for written in (name, name.upper(), "my" + name, "details[0]." + name):
            with self.subTest(name=written):
                self.assertEqual({written: "***"}, cs._mask_params({written: "CANARY"}))
                for escaped in ('"CANARY"', '"a\\"CANARY"', '"CANARY', '"a\\"CANARY'):
                    shown = cs._mask_text('{"%s" : %s' % (written, escaped), [])
                    self.assertNotIn("CANARY", shown)
                    self.assertTrue(shown.startswith('{"%s" : "***"' % written), shown)
        for written in (name, name.upper(), "my" + name, "vnc." + name):
            with self.subTest(element=written):
                shown = cs._mask_text(f"<{written}>CANARY</{written}>", [])
                self.assertEqual(f"<{written}>***</{written}>", shown)
        self.assertEqual({name + "s1": "seen"}, cs._mask_params({name + "s1": "seen"}))

    def test_headers_that_are_secret(self):
        for name in "Authorization Proxy-Authorization Cookie Set-Cookie X-Api-Key X-Auth X-KEY X-Auth-Token".split():
            for written in (name, name.lower(), name.upper()):
                self.assertEqual(written + ": ***", cs._mask_header(written, "CANARY"))
        self.assertEqual("X-Tenant: seen", cs._mask_header("X-Tenant", "seen"))

    @each("title", "key", "name")
    @each("front", "tags[0].", "")
    def test_values_that_are_secret_by_the_name_they_are_given_for(self, title, front):
        params = {front + title: "my.password", front + "value": "CANARY", "tags[1].value": "seen"}
        self.assertEqual(dict(params, **{front + "value": "***"}), cs._mask_params(params))

    @each("quoted", CANARY_PASSWORD, CANARY_SESSION, CANARY_TOKEN)
    def test_a_session_s_secrets_are_hidden_wherever_an_answer_quotes_them(self, quoted):
        """Password, session key and cookies, one at a time, outside of any field that tells by its name."""
        def reply_to(wire):
            if wire.requests[-1].params["command"] == "login":
                return SecretsTest.login(self, wire)
            return wire.send(reply(json.dumps({"r": {"echo": quoted}}).encode()))

        server = self.serve([READ, reply_to, AGAIN])
        client = cs.CloudStack(server.url, username="me", password=CANARY_PASSWORD, trace=True, timeout=5)
        self.addCleanup(transport_of(client).close)
        self.assertIn('"echo": "***"', self.traced(client))

    @each("quoted", CANARY_SECRET, CANARY_KEY, CANARY_PASSWORD)
    def test_a_key_s_secrets_are_hidden_wherever_an_answer_quotes_them(self, quoted):
        server = self.serve([READ, reply(json.dumps({"r": {"echo": quoted}}).encode()), AGAIN])
        client = self.client(server, trace=True)
        self.assertIn('"echo": "***"', self.traced(client, "updateUser", password=CANARY_PASSWORD))

    def test_what_cannot_be_sent_or_set_is_refused_without_its_value_and_without_a_second_traceback(self):
        """What is raised while another exception is handled would be printed after it, value and all."""
        octets = CANARY_SECRET.encode() + b"\xff"
        lone = CANARY_SECRET + "\ud800"
        attempts = [lambda: cs.flatten({"name": octets}),
                    lambda: cs.flatten({"name": {CANARY_SECRET}, "other": [object()]}),
                    lambda: cs.CloudStack(ENDPOINT, "k", octets), lambda: cs.CloudStack(ENDPOINT, "k", lone),
                    lambda: cs.CloudStack(ENDPOINT, "k", [CANARY_SECRET]),
                    lambda: cs.CloudStack(ENDPOINT, "k", "s", headers={"X-Token": CANARY_SECRET + "\n"}),
                    lambda: cs.CloudStack(ENDPOINT, "k", "s", headers={"X-Token": [CANARY_SECRET]}),
                    lambda: cs.CloudStack(ENDPOINT, "k", "s").listZones(name=CANARY_SECRET + "\0"),
                    lambda: cs.CloudStack(ENDPOINT, "k", "s").listZones(name=lone)]  # fmt: skip
        for number, attempt in enumerate(attempts):
            with self.subTest(number=number), self.assertRaises(ValueError) as caught:
                attempt()
            error = caught.exception
            self.assert_tells_nothing(str(error), repr(error))
            self.assertTrue(error.__context__ is None or error.__suppress_context__)

    @each("text", '"url": "https://c/?token=SECRET&x=1"', "Location: https://c/x?apiKey=SECRET",
          "go to /x%3Fsignature%3DSECRET%26a",
          '{"name": "saml2.password", "value": "SECRET"}', '{"value": "SECRET", "type": "s", "name": "saml2.password"}',
          '"password":SECRET,', '{"text": "{\\"password\\":\\"SECRET\\"}"}', "<password>SECRET</password>")
    def test_secrets_of_every_shape_are_masked(self, text):
        masked = cs._mask_text(text, [])
        self.assertNotIn("SECRET", masked)
        self.assertIn(cs.MASK, masked)

    @each("text", '"name": "web", "value": "kept"', '{"id": "kept"} {"name": "x.password"}', "?token&kept=1")
    def test_what_is_no_secret_is_shown(self, text):
        self.assertIn("kept", cs._mask_text(text, []))

    @each("endpoint", "https://user:hunter/two@host/api", "https://user:pa#ss@host/api", "http://u:a?b@host/",
          "user:pw@host/x")  # fmt: skip
    def test_a_password_with_a_slash_is_not_shown(self, endpoint):
        self.assertRegex(cs._mask_address(endpoint), r"\A(https?://)?host/")
        client = cs.CloudStack(endpoint, "k", "s")
        for text in (repr(client), str(self.assertRaises(ValueError, client.listZones) or "")):
            self.assertNotRegex(text, "hunter|two@|pa#|a[?]b|pw")


# === [5.3] nothing is lost, whatever the server does ================================================================


class NothingLostTest(Case):
    """The server drops a tenth of the connections, answers a tenth of the requests with 503 or 429, and restarts twice:
    with `retry` set every row and every job's outcome still arrives, once."""

    JOBS = 500 if os.environ.get("CS_ATTACK_RUNS") else 150

    def setUp(self):
        super().setUp()
        self.seed = random.randrange(1 << 32)
        self.draw = random.Random(self.seed)
        self.simulator = Simulator(job_seconds=0.4).start()
        self.addCleanup(self.simulator.stop)
        self.settings = {"endpoint": self.simulator.endpoint, "key": self.simulator.key,
                         "secret": self.simulator.secret, "retry": 25, "retry_backoff": 0.01, "poll_interval": 0.1,
                         "timeout": 5}  # fmt: skip

    def misbehave(self):
        """From now on, until the script is used up."""
        busy = {"errorresponse": {"errorcode": 429, "errortext": "please retry after [20] ms."}}
        troubles = [DROP, DROP, Answer(503, "<html>restarting</html>"), Answer(429, busy)]

        def trouble(record):
            return self.draw.choice(troubles) if self.draw.random() < 0.2 else None

        self.simulator.script(None, *[trouble] * 20000)

    def restart_twice(self):
        for _ in range(2):
            time.sleep(0.15)
            self.simulator.stop()
            time.sleep(0.05)
            self.simulator.start()

    def while_it_restarts(self, work):
        thread = threading.Thread(target=self.restart_twice)
        thread.start()
        try:
            return work()
        finally:
            thread.join()

    def test_every_row_of_a_list(self):
        self.simulator.cloud.add_machines(1500)
        with cs.CloudStack(**self.settings) as client:
            expected = [row["id"] for row in client.listVirtualMachines(fetch_list=True)]
            self.assertGreater(len(expected), 1500)
            self.misbehave()
            for walk in (lambda: client.listVirtualMachines(fetch_list=True, pagesize=50),
                         lambda: list(client.iter_list("listVirtualMachines", pagesize=50))):  # fmt: skip
                with self.subTest(seed=self.seed):
                    rows = self.while_it_restarts(walk)
                    self.assertEqual([row["id"] for row in rows], expected)

    def test_every_outcome_of_many_jobs(self):
        with cs.CloudStack(**self.settings) as client:
            zone = client.listZones()["zone"][0]["id"]
            template = client.listTemplates(templatefilter="executable", zoneid=zone)["template"][0]["id"]
            offering = client.listServiceOfferings()["serviceoffering"][0]["id"]
            order = {"zoneid": zone, "templateid": template, "serviceofferingid": offering}
            submitted = [client.deployVirtualMachine(**order) for _ in range(self.JOBS)]
        self.misbehave()

        async def wait_for_all():
            async with cs.AIOCloudStack(concurrency=16, **self.settings) as client:
                return await asyncio.gather(*[client.wait_job(answer["jobid"]) for answer in submitted])

        with self.subTest(seed=self.seed):
            results = self.while_it_restarts(lambda: run(wait_for_all()))
            machines = [result["virtualmachine"]["id"] for result in results]
            self.assertEqual(machines, [answer["id"] for answer in submitted])
            self.assertEqual(len(set(machines)), self.JOBS)


# === [8] configuration ==============================================================================================

# Values that may go over the wire where they belong, and may be shown nowhere. Their letters are what tests look for.
KEY, SECRET, PASSWORD, USERDATA = "CANARY-key-6c1", "CANARY-secret-9d4", "CANARY-password-2b8", "CANARY-userdata-5e7"

READ_CONFIG_DEFAULTS = {"timeout": 10, "method": "get", "retry": 0, "verify": None, "cert": None, "cert_key": None,
                        "name": None, "trace": None, "expiration": 600, "poll_interval": 2.0,
                        "dangerous_no_tls_verify": False}  # fmt: skip
FROM_ENVIRONMENT = (
    "endpoint key secret username password domain method timeout retry retry_backoff job_timeout poll_interval"
    " expiration verify cert cert_key trace dangerous_no_tls_verify theme").split()  # fmt: skip


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


class ConfigCase(Case):
    def assertReads(self, *args, **settings):
        """read_config gives these settings, and of all others the defaults."""
        self.assertEqual(dict(READ_CONFIG_DEFAULTS, **settings), cs.read_config(*args))

    @contextlib.contextmanager
    def standing(self, name, text):
        """A file, for a moment, whose path CLOUDSTACK_CONFIG holds if it is called named.ini; the path."""
        path = self.write(name, text)
        with mock.patch.dict(os.environ, {"CLOUDSTACK_CONFIG": path} if name == "named.ini" else {}):
            yield path
        os.remove(path)


class SourcesTest(ConfigCase):
    """Where settings come from, and which source wins."""

    def test_every_setting_is_read_from_the_environment(self):
        values = {name: name + "-value" for name in FROM_ENVIRONMENT}
        environ(**values)
        self.assertReads(**values)

    def test_every_setting_is_read_from_an_ini_file(self):
        values = {name: name + "-value" for name in FROM_ENVIRONMENT}
        self.ini("[cloudstack]\n" + "\n".join([f"{name} = {value}" for name, value in values.items()]))
        self.assertReads(name="cloudstack", **values)

    def test_the_files_are_read_in_their_order_and_later_ones_win(self):
        text = "[cloudstack]\nretry = {0}\n{1} = {0}\n"
        self.ini("[cloudstack]\nendpoint = http://e/\nretry = 1\nmethod = 1\ntimeout = 1\n")
        self.write("work/cloudstack.ini", text.format(2, "method"))
        self.assertReads(name="cloudstack", endpoint="http://e/", retry="2", method="2", timeout="1")
        environ(config=self.write("named.ini", text.format(3, "theme")))
        self.assertReads(name="cloudstack", endpoint="http://e/", retry="3", method="2", timeout="1", theme="3")

    @each("name", "named.ini", "work/cloudstack.ini", ".cloudstack.ini")
    def test_each_file_alone_is_enough(self, name):
        with self.standing(name, "[cloudstack]\nendpoint = http://e/\n"):
            self.assertReads(name="cloudstack", endpoint="http://e/")

    def test_a_tilde_in_CLOUDSTACK_CONFIG_is_the_home_directory(self):
        self.write("named.ini", "[cloudstack]\nendpoint = http://e/\n")
        environ(config="~/named.ini")
        self.assertEqual("http://e/", cs.read_config()["endpoint"])

    def test_the_explicit_region_beats_CLOUDSTACK_REGION_beats_cloudstack(self):
        sections = "[{0}]\nendpoint = http://{0}/\n"
        self.ini("".join(map(sections.format, ("cloudstack", "eu", "us"))))
        self.assertReads(endpoint="http://cloudstack/", name="cloudstack")
        environ(region="eu")
        self.assertReads(endpoint="http://eu/", name="eu")
        self.assertReads("us", endpoint="http://us/", name="us")
        self.assertEqual(cs.read_config("us"), cs.read_config(ini_group="us"))
        self.assertEqual({"endpoint": "http://eu/", "name": "eu"}, cs.read_config_from_ini())

    def test_with_an_endpoint_in_the_environment_it_wins_and_files_fill_what_it_leaves_open(self):
        self.ini("[cloudstack]\nendpoint = http://file/\nkey = k\nsecret = s\ntimeout = 5\nretry = 5\n")
        environ(endpoint="http://env/", timeout="7")
        self.assertReads(endpoint="http://env/", key="k", secret="s", timeout="7", retry="5", name="cloudstack")

    def test_with_endpoint_key_and_secret_in_the_environment_no_file_is_read(self):
        self.ini("no ini file")
        self.write("work/cloudstack.ini", b"\xff\xfe")
        environ(endpoint="http://env/", key="k", secret="s", config=os.path.join(self.home, "missing.ini"))
        self.assertReads(endpoint="http://env/", key="k", secret="s")

    def test_an_explicit_region_beats_the_environment(self):
        """5.2.0 ignores it when CLOUDSTACK_ENDPOINT is set."""
        self.ini("[eu]\nendpoint = http://eu/\nkey = k\nsecret = s\ntimeout = 5\n")
        environ(endpoint="http://env/", key="ek", secret="es", timeout="7", retry="2")
        self.assertReads("eu", endpoint="http://eu/", key="k", secret="s", timeout="5", retry="2", name="eu")

    def test_CLOUDSTACK_REGION_is_no_explicit_region(self):
        self.ini("[eu]\nendpoint = http://eu/\nkey = k\nsecret = s\ntimeout = 5\n")
        environ(endpoint="http://env/", region="eu")
        self.assertReads(endpoint="http://env/", key="k", secret="s", timeout="5", name="eu")

    def test_without_an_endpoint_in_the_environment_the_section_wins_and_the_environment_fills(self):
        self.ini("[cloudstack]\nendpoint = http://file/\ntimeout = 5\n")
        environ(timeout="7", retry="2", key="k", secret="s")
        self.assertReads(endpoint="http://file/", timeout="5", retry="2", key="k", secret="s", name="cloudstack")

    @each("overrides, changed", ("timeout", {"timeout": "7"}), ("timeout,retry", {"timeout": "7", "retry": "8"}),
          (" timeout , RETRY ", {"timeout": "7", "retry": "8"}), ("endpoint", {"endpoint": "http://env/"}),
          ("theme", {}))  # fmt: skip
    def test_overrides_name_the_keys_for_which_the_environment_beats_the_section(self, overrides, changed):
        self.ini("[cloudstack]\nendpoint = http://file/\nkey = k\nsecret = s\ntimeout = 5\nretry = 5\n")
        environ(endpoint="http://env/", key="ek", secret="es", timeout="7", retry="8", overrides=overrides)
        expected = {"endpoint": "http://file/", "key": "k", "secret": "s", "timeout": "5", "retry": "5"}
        self.assertReads(name="cloudstack", **dict(expected, **changed))

    def test_overrides_work_with_an_explicit_region(self):
        self.ini("[eu]\nendpoint = http://eu/\ntimeout = 5\nretry = 5\n")
        environ(timeout="7", retry="8", overrides="timeout")
        self.assertReads("eu", endpoint="http://eu/", timeout="7", retry="5", name="eu")

    def test_headers_come_from_ini_files(self):
        self.ini("[cloudstack]\nendpoint = http://e/\nheader_X-Tenant = a\nheader_x-b = 50 %\nheader_ = n\n")
        self.assertEqual({"x-tenant": "a", "x-b": "50 %"}, cs.read_config()["headers"])

    def test_headers_come_from_the_environment(self):
        """With 5.2.0 they never do."""
        environ(endpoint="http://e/", header_x_tenant="a", header_accept="b")
        self.assertReads(endpoint="http://e/", headers={"x-tenant": "a", "accept": "b"})

    def test_headers_of_the_environment_and_of_a_file_are_merged_one_by_one(self):
        self.ini("[cloudstack]\nkey = k\nsecret = s\nheader_x-tenant = file\nheader_x-file = file\n")
        environ(endpoint="http://e/", header_x_tenant="env", header_x_env="env")
        self.assertEqual({"x-tenant": "env", "x-file": "file", "x-env": "env"}, cs.read_config()["headers"])

    def test_unknown_keys_are_dropped(self):
        self.ini("[cloudstack]\nendpoint = http://e/\nsession = x\nfetch_result = 1\nfoo = bar\n")
        environ(foo="bar", session="x", fetch_result="1")
        self.assertReads(endpoint="http://e/", name="cloudstack")
        self.assertEqual({"endpoint": "http://e/", "name": "cloudstack"}, cs.read_config_from_ini())

    def test_keys_are_read_in_any_case(self):
        self.ini("[cloudstack]\nEndPoint = http://e/\nTIMEOUT = 3\n")
        self.assertReads(endpoint="http://e/", timeout="3", name="cloudstack")

    def test_a_default_section_counts_within_its_file(self):
        self.ini("[DEFAULT]\ntimeout = 3\nkey = k\n[cloudstack]\nendpoint = http://e/\nsecret = s\n")
        self.assertReads(endpoint="http://e/", key="k", secret="s", timeout="3", name="cloudstack")

    def test_a_default_section_counts_in_no_other_file(self):
        self.ini("[cloudstack]\nendpoint = http://e/\n")
        self.write("work/cloudstack.ini", "[DEFAULT]\ntimeout = 3\nendpoint = http://other/\n")
        self.assertReads(endpoint="http://e/", name="cloudstack")

    @each("written, read", ("a%b", "a%b"), ("%", "%"), ("100%", "100%"), ("a%%b", "a%b"), ("a%%%b", "a%%b"),
          ("%%%%", "%%"), ("%s%d%1", "%s%d%1"), ("%(endpoint)", "%(endpoint)"), ("%(endpoint)d", "%(endpoint)d"),
          ("%()s", "%()s"), ("<%(domain)s>", "<x%y>"), ("%%(domain)s", "%(domain)s"), ("%%%(domain)s", "%x%y"),
          ("%(base)s", "from DEFAULT"))  # fmt: skip
    def test_percent_signs(self, written, read):
        """`%%` and `%(name)s` as configparser has them; any other `%` is literal (5.2.0: a traceback)."""
        text = "[DEFAULT]\nbase = from DEFAULT\n[cloudstack]\nendpoint = http://e/\ndomain = x%y\nsecret = {}\n"
        self.ini(text.format(written))
        self.assertEqual(read, cs.read_config()["secret"])

    def test_a_percent_sign_in_a_continuation_line_or_a_section_name_is_literal_too(self):
        self.ini("[50% off]\nendpoint = http://e/\ntheme = a\n  [5%] b%\n")
        self.assertEqual("a\n[5%] b%", cs.read_config("50% off")["theme"])

    @each("read", cs.read_config, cs.read_config_from_ini)
    def test_a_reference_that_leads_nowhere_is_an_error_that_names_file_section_and_key(self, read):
        path = self.ini("[eu]\nendpoint = http://e/\nsecret = {0}%(nope)s{0}\n".format(SECRET))
        error = self.raised(ValueError, read, "eu")
        self.assertHolds(str(error), path, "eu", "secret")
        self.assertNotIn("CANARY", "".join(traceback.format_exception(None, error, None)))

    def test_values_stay_strings(self):
        self.ini("[cloudstack]\nendpoint = http://e/\ntimeout = 5\nretry = 1\nexpiration = -1\nverify = no\n")
        environ(poll_interval="3")
        values = {"timeout": "5", "retry": "1", "expiration": "-1", "verify": "no", "poll_interval": "3"}
        self.assertReads(endpoint="http://e/", name="cloudstack", **values)

    @each("name", "trace", "dangerous_no_tls_verify")
    def test_the_two_booleans_are_parsed_wherever_they_come_from(self, name):
        words = {True: "y YES t True on 1".split(), False: "n No f FALSE off 0".split()}
        for value, word in [(value, word) for value, spelled in words.items() for word in spelled]:
            with self.subTest(name, word=word):
                self.ini(f"[cloudstack]\nendpoint = http://e/\n{name} = {word}\n")
                self.assertIs(cs.read_config()[name], value)
                self.assertIs(cs.read_config_from_ini()[name], value)
                with mock.patch.dict(os.environ, {"CLOUDSTACK_ENDPOINT": "http://e/"}):
                    os.environ["CLOUDSTACK_" + name.upper()] = word
                    self.assertIs(cs.read_config()[name], value)

    @each("word", "nope", "False ; comment", "2", "tru")
    @each("name", "dangerous_no_tls_verify", "trace")
    @both
    def test_what_is_no_boolean_is_handed_on_and_the_constructor_refuses_it(self, word, name, kind):
        """With 5.2.0 `dangerous_no_tls_verify = nope` turns TLS verification off."""
        self.ini(f"[cloudstack]\nendpoint = https://e/\n{name} = {word}\n")
        settings = cs.read_config()
        self.assertEqual(word, settings[name])
        with self.assertRaisesRegex(ValueError, name):
            kind(**settings)

    def test_an_empty_value_is_none(self):
        self.ini("[cloudstack]\nendpoint = http://e/\ntimeout =\nkey =\nverify =\ntheme =\nheader_x =\n")
        environ(retry="", method="", secret="", header_y="")
        self.assertReads(endpoint="http://e/", name="cloudstack")

    def test_an_empty_value_in_a_later_file_leaves_the_earlier_one(self):
        self.ini("[cloudstack]\nendpoint = http://e/\nkey = k\nsecret = s\n")
        self.write("work/cloudstack.ini", "[cloudstack]\nkey =\nendpoint =\n")
        self.assertReads(endpoint="http://e/", key="k", secret="s", name="cloudstack")

    def test_an_empty_CLOUDSTACK_REGION_CONFIG_or_OVERRIDES_is_none(self):
        self.ini("[cloudstack]\nendpoint = http://e/\n")
        environ(region="", config="", overrides="")
        self.assertReads(endpoint="http://e/", name="cloudstack")

    @each("more", {}, {"secret": "es"})
    def test_an_empty_CLOUDSTACK_KEY_means_unsigned(self, more):
        self.ini("[cloudstack]\nendpoint = http://file/\nkey = k\nsecret = s\ntimeout = 4\n")
        environ(endpoint="http://env/", key="", **more)
        settings = cs.read_config()
        self.assertNotIn("key", settings)
        self.assertIsNone(cs.CloudStack(**settings).key)
        self.assertEqual("http://env/", settings["endpoint"])

    def test_an_empty_CLOUDSTACK_KEY_does_not_beat_a_section_unless_overrides_names_it(self):
        self.ini("[cloudstack]\nendpoint = http://file/\nkey = k\nsecret = s\n")
        environ(key="")
        self.assertReads(endpoint="http://file/", key="k", secret="s", name="cloudstack")
        environ(overrides="key")
        self.assertReads(endpoint="http://file/", name="cloudstack")

    def test_a_user_name_comes_from_environment_or_file_like_a_key(self):
        self.ini("[cloudstack]\nendpoint = http://e/\nusername = u\npassword = p\ndomain = /d\n")
        self.assertReads(endpoint="http://e/", username="u", password="p", domain="/d", name="cloudstack")
        environ(endpoint="http://env/", key="k", secret="s")
        self.assertReads(endpoint="http://env/", key="k", secret="s")

    @both
    def test_every_configuration_can_be_given_to_both_clients(self, kind):
        """With 5.2.0 a file that has `theme` cannot."""
        self.ini(
            "[cloudstack]\nendpoint = http://e/\nkey = k\nsecret = s\ntheme = monokai\noutput = table\ntimeout = 0.5\n"
            "method = POST\nretry = 2\nexpiration = -1\njob_timeout = 60\npoll_interval = 5\ntrace = no\n"
            "header_x-y = z\n")  # fmt: skip
        client = kind(**cs.read_config())
        self.assertEqual((0.5, "post", 2), (client.timeout, client.method, client.retry))
        self.assertEqual((60, 5, {"x-y": "z"}), (client.job_timeout, client.poll_interval, client.headers))
        self.assertEqual("<CloudStack: cloudstack>", repr(client))
        self.assertEqual(7, kind(**dict(cs.read_config(), poll_interval=7)).poll_interval)

    @each("overrides, expected", ("timeout", {"x-a": "file", "x-b": "file"}),
          ("header_x-a", {"x-a": "env", "x-b": "file"}), ("headers", {"x-a": "env", "x-b": "env"}))  # fmt: skip
    def test_headers_are_overridden_one_by_one_or_together(self, overrides, expected):
        self.ini("[cloudstack]\nendpoint = http://e/\nheader_x-a = file\nheader_x-b = file\n")
        os.environ.update(CLOUDSTACK_HEADER_X_A="env", CLOUDSTACK_HEADER_X_B="env")
        os.environ["CLOUDSTACK_OVERRIDES"] = overrides
        self.assertEqual(expected, cs.read_config()["headers"])


class ReadConfigTest(ConfigCase):
    """What read_config and read_config_from_ini return and raise."""

    def test_the_defaults_and_no_other_key(self):
        environ(endpoint="http://e/")
        settings = cs.read_config()
        self.assertEqual((dict(READ_CONFIG_DEFAULTS, endpoint="http://e/"), float),
                         (settings, type(settings["poll_interval"])))  # fmt: skip
        self.assertIs(settings["dangerous_no_tls_verify"], False)

    def test_each_call_returns_a_dict_of_its_own(self):
        environ(endpoint="http://e/", header_x="y")
        cs.read_config().update(timeout=1)
        cs.read_config()["headers"].clear()
        self.assertReads(endpoint="http://e/", headers={"x": "y"})

    @each("more", {}, {"key": "k", "secret": "s"})
    def test_no_file_and_no_endpoint_is_SystemExit(self, more):
        environ(**more)
        error = self.raised(SystemExit, cs.read_config)
        tried = [os.path.join(self.home, ".cloudstack.ini"), os.path.join(os.getcwd(), "cloudstack.ini")]
        self.assertEqual("Config file not found. Tried " + ", ".join(tried), str(error))

    def test_a_region_where_there_is_no_file_is_SystemExit_too(self):
        self.assertRaisesRegex(SystemExit, "Config file not found. Tried ", cs.read_config, "eu")

    @each("region", None, "eu")
    def test_no_endpoint_is_ValueError(self, region):
        self.ini("[cloudstack]\nkey = k\n[eu]\nsecret = s\n")
        error = self.raised(ValueError, cs.read_config, region)
        self.assertEqual("the configuration is missing the following keys: endpoint", str(error))

    def test_an_unknown_CLOUDSTACK_REGION_is_ValueError_that_names_it(self):
        path = self.ini("[cloudstack]\nendpoint = http://e/\n")
        environ(region="mars")
        error = self.raised(ValueError, cs.read_config)
        self.assertIn("the configuration is missing the following keys: endpoint", str(error))
        self.assertIn("mars", str(error))
        self.assertIn(path, str(error))

    @each("region", "mars", "DEFAULT", "Cloudstack")
    def test_an_unknown_explicit_region_is_NoSectionError(self, region):
        self.ini("[DEFAULT]\ntimeout = 1\n[cloudstack]\nendpoint = http://e/\n")
        for more in ({}, {"endpoint": "http://env/", "key": "k", "secret": "s"}):
            with self.subTest(region, more=more):
                environ(**more)
                error = self.raised(configparser.NoSectionError, cs.read_config, region)
                self.assertEqual(region, error.section)

    def test_an_unknown_explicit_region_with_the_endpoint_in_the_environment_and_no_file(self):
        environ(endpoint="http://env/", key="k", secret="s")
        self.assertRaises(configparser.NoSectionError, cs.read_config, "mars")

    def test_read_config_from_ini_gives_what_the_section_holds(self):
        self.ini("[eu]\nendpoint = http://e/\ntimeout = 5\ntrace = yes\nheader_x-y = z\ntheme = t\nfoo = 1\n")
        environ(endpoint="http://env/", key="k", timeout="3", header_a="b")
        expected = {"endpoint": "http://e/", "timeout": "5", "trace": True, "theme": "t", "name": "eu",
                    "headers": {"x-y": "z"}}  # fmt: skip
        self.assertEqual(expected, cs.read_config_from_ini("eu"))
        self.assertEqual(expected, cs.read_config_from_ini(ini_group="eu"))

    def test_read_config_from_ini_without_the_section(self):
        self.assertEqual({"name": None}, cs.read_config_from_ini())
        self.ini("[eu]\nendpoint = http://e/\n")
        self.assertEqual({"name": None}, cs.read_config_from_ini())
        self.assertEqual({"name": None}, cs.read_config_from_ini("mars"))


class RegionOfTheDefaultNameTest(Case):
    """Ansible's modules up to 2.9 always ask for the region `cloudstack`, with everything in the environment."""

    def both(self):
        """What read_config gives for the region, after checking that it gives that for none, too."""
        found = cs.read_config("cloudstack")
        self.assertEqual(found, cs.read_config())
        return found

    def test_everything_in_the_environment(self):
        with mock.patch.dict(os.environ, CLOUDSTACK_ENDPOINT="http://e/", CLOUDSTACK_KEY="k", CLOUDSTACK_SECRET="s"):
            self.assertEqual("http://e/", self.both()["endpoint"])
            self.ini("[cloudstack]\nendpoint = http://file/\nkey = fk\nsecret = fs\n")
            self.assertEqual(("http://e/", "k"), (self.both()["endpoint"], self.both()["key"]))

    def test_no_section_of_that_name(self):
        self.ini("[other]\nendpoint = http://file/\n")
        with mock.patch.dict(os.environ, CLOUDSTACK_ENDPOINT="http://e/"):
            self.assertEqual("http://e/", self.both()["endpoint"])
        with self.assertRaisesRegex(ValueError, "missing"):
            cs.read_config("cloudstack")

    def test_it_names_its_own_section_whatever_the_environment_s_region(self):
        self.ini("[cloudstack]\nendpoint = http://a/\n[other]\nendpoint = http://b/\n")
        with mock.patch.dict(os.environ, CLOUDSTACK_REGION="other"):
            self.assertEqual("http://a/", cs.read_config("cloudstack")["endpoint"])
            self.assertEqual("http://b/", cs.read_config()["endpoint"])

    def test_the_command_line_s_region(self):
        with mock.patch.dict(os.environ, CLOUDSTACK_ENDPOINT="http://e/", CLOUDSTACK_KEY="k", CLOUDSTACK_SECRET="s"):
            code, out, err = self.main("--region", "cloudstack", "listZones", "--dry-run")
        self.assertEqual((0, "GET http://e/", ""), (code, out.splitlines()[0], err))


class BadFilesTest(ConfigCase):
    """Files that cannot be used: one clear ValueError that names the file, and never a secret of it."""

    def refused(self, path, *parts):
        """The text of the ValueError that both functions raise."""
        for read in (cs.read_config_from_ini, cs.read_config):
            error = self.raised(ValueError, read)
            text = str(error)
            self.assertHolds(text, *(path,) + parts)
            self.assertNotIn("\n", text)
            self.assertNotIn("CANARY", "".join(traceback.format_exception(type(error), error, None)))
        return text

    @each("case, text, part", ("no section header", "secret = " + SECRET, "line 1"),
          ("a section header late", "\n\n" + GOOD_INI.partition("\n")[2], "line 3"),
          ("a line without =", GOOD_INI + SECRET + "\n", "line 5"),
          ("a section without its end", f"[cloudstack\nsecret = {SECRET}\n", "line 1"),
          ("a key twice", GOOD_INI + "Secret = " + SECRET, "secret"),
          ("a section twice", GOOD_INI + GOOD_INI, "cloudstack"), ("JSON", '{"secret": "%s"}' % SECRET, "line 1"),
          ("a line that is only =", GOOD_INI + f"= {SECRET}\n", "line 5"))  # fmt: skip
    @each("name", ".cloudstack.ini", "work/cloudstack.ini", "named.ini")
    def test_files_that_are_no_ini_files(self, case, text, part, name):
        with self.standing(name, text) as path:
            self.refused(path, part)

    @each("content", b"[cloudstack]\nsecret = CANARY\xff\n", "[cloudstack]\nendpoint = http://e/".encode("utf-16"))
    def test_a_file_that_is_not_UTF_8(self, content):
        self.refused(self.ini(content), "UTF-8")

    @each("name", ".cloudstack.ini", "work/cloudstack.ini", "named.ini")
    def test_a_directory_in_place_of_a_file(self, name):
        path = os.path.join(self.home, name)
        os.mkdir(path)
        if name == "named.ini":
            environ(config=path)
        self.refused(path, "cannot read")
        os.environ.pop("CLOUDSTACK_CONFIG", None)
        os.rmdir(path)

    def test_a_file_that_may_not_be_read(self):
        path = self.write(".cloudstack.ini", "[cloudstack]\n", mode=0)
        # root may read all
        with mock.patch("builtins.open", side_effect=PermissionError(13, "Permission denied", path)):
            self.refused(path, "cannot read", "Permission denied")

    def test_a_missing_CLOUDSTACK_CONFIG(self):
        environ(config=os.path.join(self.home, "missing.ini"))
        self.assertRaisesRegex(SystemExit, "Config file not found. Tried .*missing.ini", cs.read_config)
        self.ini("[cloudstack]\nendpoint = http://e/\n")
        self.assertRaisesRegex(SystemExit, "Config file not found. Tried .*missing.ini", cs.read_config)
        environ(config=os.path.join(self.write("file", ""), "x.ini"))
        self.assertRaisesRegex(SystemExit, "Config file not found. Tried .*x.ini", cs.read_config)

    def test_a_CLOUDSTACK_CONFIG_that_can_be_no_path(self):
        environ(config="x" * 5000)
        self.assertRaisesRegex(ValueError, "cannot read", cs.read_config)

    @each("content", b"\xef\xbb\xbf[cloudstack]\nendpoint = http://e/\n", b"[cloudstack]\r\nendpoint = http://e/\r\n")
    def test_a_byte_order_mark_and_foreign_line_ends_are_no_matter(self, content):
        self.ini(content)
        self.assertReads(endpoint="http://e/", name="cloudstack")

    def test_text_that_is_not_ASCII_is_read_as_UTF_8_whatever_the_locale(self):
        self.ini("[z\u00fcrich]\nendpoint = http://e/\npassword = \u00fc\u20ac\U0001f511\n")
        with mock.patch("locale.getpreferredencoding", lambda *args: "ascii"):
            settings = cs.read_config("z\u00fcrich")
        self.assertEqual(("z\u00fcrich", "\u00fc\u20ac\U0001f511"), (settings["name"], settings["password"]))

    def test_an_empty_file_is_a_file_without_sections(self):
        path = self.ini("")
        self.assertIn(path, str(self.raised(ValueError, cs.read_config)))
        self.assertEqual({"name": None}, cs.read_config_from_ini())

    def test_any_file_gives_settings_or_one_clear_error(self):
        """Files made at random out of what ini files are made of."""
        pieces = "[cloudstack] [DEFAULT] [ ] key = : % %(key)s %% %(secret)s # ; timeout=".split() + [SECRET]
        pieces += ["endpoint = http://e/", "secret = " + SECRET, "\n", "\n", "\n", "  ", "\x00", "\u2028", "\r", "\t"]
        draw = random.Random(50)
        outcomes = collections.Counter()
        for number in range(250):
            text = "".join(draw.choice(pieces) for _ in range(draw.randrange(20)))
            if number % 2:
                text = "[cloudstack]\nendpoint = http://e/\nkey = k\n" + text
            self.ini(text)
            try:
                outcomes[type(cs.read_config())] += 1
            except (ValueError, configparser.NoSectionError) as error:
                outcomes[type(error)] += 1
                self.assertNotIn("CANARY", str(error), text)
        self.assertEqual({dict, ValueError}, set(outcomes))

    @each("key", "timeout", "method", "retry", "endpoint", "verify", "poll_interval", "trace")
    def test_a_secret_on_an_indented_line_is_not_quoted(self, key):
        """An indented line goes on with the value above it; what it holds must not be quoted with that."""
        lines = ["[cloudstack]", "endpoint = http://127.0.0.1:9/api", "key = k", key + " = 1"]
        lines.append("  secret = CANARY")
        if key == "endpoint":
            del lines[1]
        self.ini("\n".join(lines) + "\n")
        code, out, err = self.main("listZones")
        self.assertEqual((2, "", 1), (code, out, err.count("\n")), err)
        self.assertIn(key, err)
        self.assertNotIn("CANARY", err)


class FilesTogetherTest(ConfigCase, ServerCase):
    """Endpoint, credentials, TLS settings and headers belong together: never from two files."""

    def setUp(self):
        super().setUp()
        self.own = self.ini(f"[cloudstack]\nendpoint = {ENDPOINT}\nkey = {KEY}\nsecret = {SECRET}\n")

    def assertRefused(self, *paths):
        for read in (cs.read_config, cs.read_config_from_ini):
            error = self.raised(ValueError, read)
            self.assertHolds(str(error), *paths)
            self.assertNotIn("CANARY", str(error))

    @each("line", "endpoint = http://other/", "key = k", "secret = s", "username = u", "password = p", "verify = /ca",
          "cert = /c", "cert_key = /k", "dangerous_no_tls_verify = true", "header_x-tenant = t")  # fmt: skip
    @each("name", "work/cloudstack.ini", "named.ini")
    def test_each_of_them_is_refused_from_a_second_file(self, line, name):
        with self.standing(name, f"[cloudstack]\n{line}\n") as path:
            self.assertRefused(self.own, path)

    def test_a_whole_set_from_a_second_file_does_not_combine_with_leftovers_of_the_first(self):
        self.ini("[cloudstack]\nendpoint = http://a/\nkey = k\nsecret = s\ncert = /c\n")
        path = self.write("work/cloudstack.ini", "[cloudstack]\nendpoint = http://b/\nkey = k2\nsecret = s2\n")
        self.assertRefused(self.own, path)

    def test_a_second_file_may_be_complete_by_itself(self):
        self.write("work/cloudstack.ini", "[cloudstack]\nendpoint = http://b/\nkey = k2\nsecret = s2\n")
        self.assertReads(endpoint="http://b/", key="k2", secret="s2", name="cloudstack")

    def test_a_later_file_may_set_other_things(self):
        self.write("work/cloudstack.ini",
                   "[cloudstack]\ntimeout = 3\nretry = 2\nmethod = post\ntheme = t\ntrace = on\n")  # fmt: skip
        more = {"timeout": "3", "retry": "2", "method": "post", "theme": "t", "trace": True}
        self.assertReads(endpoint=ENDPOINT, key=KEY, secret=SECRET, name="cloudstack", **more)

    def test_a_default_section_counts_as_its_own_file(self):
        path = self.write("work/cloudstack.ini", "[DEFAULT]\nendpoint = http://other/\n[cloudstack]\ntimeout = 3\n")
        self.assertRefused(self.own, path)

    def test_the_sections_of_other_regions_do_not_matter(self):
        self.write("work/cloudstack.ini", "[eu]\nendpoint = http://other/\n")
        self.assertEqual(ENDPOINT, cs.read_config()["endpoint"])

    def test_one_file_by_two_names_is_one_file(self):
        environ(config=self.own)
        self.assertEqual(KEY, cs.read_config()["key"])
        os.chdir(self.home)
        os.symlink(self.own, os.path.join(self.home, "cloudstack.ini"))
        os.environ.pop("CLOUDSTACK_CONFIG")
        self.assertEqual(KEY, cs.read_config()["key"])

    def test_the_environment_combines_with_any_file(self):
        self.ini("[cloudstack]\nendpoint = http://a/\nverify = /ca\n")
        environ(key="k", secret="s", header_x="y", cert="/c")
        self.assertReads(endpoint="http://a/", verify="/ca", key="k", secret="s", cert="/c", headers={"x": "y"},
                         name="cloudstack")  # fmt: skip

    def test_what_the_environment_replaces_is_no_conflict(self):
        self.write("work/cloudstack.ini", "[cloudstack]\nendpoint = http://other/\n")
        environ(endpoint="http://env/")
        self.assertEqual(("http://env/", KEY), (cs.read_config()["endpoint"], cs.read_config()["key"]))

    @each("text", "[cloudstack]\nendpoint = {}\n", "[cloudstack]\nendpoint = {}\nkey =\nsecret =\n",
          "[DEFAULT]\nendpoint = {}\n[cloudstack]\n", "[cloudstack]\nendpoint = {}?%(key)s%(secret)s\n",
          "[cloudstack]\nendpoint = {}\nmethod = post\nkey = attacker\n")  # fmt: skip
    def test_a_hostile_file_in_the_working_directory_receives_nothing(self, text):
        """5.2.0 sends it the key, and a signed request, of ~/.cloudstack.ini."""
        here = os.path.join(os.getcwd(), "cloudstack.ini")
        self.write("work/cloudstack.ini", text.format(self.server.endpoint))
        with self.assertRaises(ValueError) as caught:
            cs.CloudStack(**cs.read_config()).listZones()
        self.assertNoCanary(caught.exception)
        err = self.fails(2, "listZones")
        self.assertOneLine(err)
        self.assertIn(here, err)
        self.assertNoCanary(err)
        self.assertEqual([], self.server.requests)


# === [9.1, 9.2] command line: options, run and report ===============================================================


def job_pending(record=None):
    return {"queryasyncjobresultresponse": {"jobid": "job-1", "jobstatus": 0, "jobprocstatus": 0}}


def job_done(result, status=1):
    return {"queryasyncjobresultresponse": {"jobid": "job-1", "jobstatus": status, "jobresult": result}}


def forever(record):
    """Give no answer while the test runs."""
    test_is_over.wait(PATIENCE_OF_TESTS)
    return {}


MAY_HAVE_RUN = "Interrupted. deployVirtualMachine may have run; if it starts a job, this waits for it: cs --wait {}\n"
ZONES_ANSWER = {"listzonesresponse": {"count": 1, "zone": [{"name": "z\u00fcrich", "id": "1"}]}}
ZONES_TEXT = '{\n  "count": 1,\n  "zone": [\n    {\n      "id": "1",\n      "name": "z\u00fcrich"\n    }\n  ]\n}\n'


class CommandLineCase(ServerCase):
    """A command line whose environment names the server, with a key."""

    def setUp(self):
        super().setUp()
        environ(endpoint=self.server.endpoint, key=KEY, secret=SECRET, poll_interval="0.01", timeout="5")
        self.replies(listZones=ZONES_ANSWER, **{"*": {"anyresponse": {"ok": True}}})

    def asked_with(self, *args):
        """The parameters of the one request that a command line makes, without those that every request has."""
        self.server.requests.clear()
        code, out, err = self.main(*args)
        self.assertEqual((0, "", 1), (code, err, len(self.server.requests)), out)
        own = ("command", "response", "apiKey", "signature", "signatureVersion", "expires", "customjobid")
        return {name: value for name, value in self.server.requests[0].params.items() if name not in own}

    def assertTold(self, err, line):
        """Standard error begins with this line; lines with more on the same matter are indented."""
        lines = err.splitlines()
        self.assertEqual((line, []), (lines[0], [more for more in lines[1:] if not more.startswith("  ")]))

    def assertUsage(self, *args, **checks):
        """A command line that is refused with exit code 2 and one line, before anything is sent."""
        self.server.requests.clear()
        err = self.fails(2, *args)
        self.assertOneLine(err)
        self.assertEqual([], self.server.requests)
        self.assertHolds(err, *checks.get("says", ()))
        return err


class ArgumentsTest(CommandLineCase):
    """cs [options] COMMAND [name=value ...]"""

    @each("args", "-q -t -r eu listZones name=x", "listZones name=x -q -t -r eu", "listZones -q name=x -t --region eu",
          "-qt listZones -reu name=x", "listZones -tqr eu name=x", "-qtreu listZones name=x",
          "--region=eu --quiet listZones --trace name=x", "--region eu listZones name=x --trace -q")  # fmt: skip
    def test_options_stand_anywhere_and_can_be_combined(self, args):
        """5.2.0 refuses `cs listZones -q name=x`."""
        self.write("work/cloudstack.ini", f"[eu]\nendpoint = {self.server.endpoint}\nkey = k\nsecret = s\n")
        self.server.requests.clear()
        code, out, err = self.main(*args.split())
        self.assertEqual((0, ZONES_TEXT), (code, out))
        self.assertIn("GET http://", err)
        (record,) = self.server.requests
        self.assertEqual(("k", "x"), (record.params["apiKey"], record.params["name"]))

    def test_a_double_dash_is_no_argument(self):
        self.assertEqual({"name": "x"}, self.asked_with("listZones", "--", "name=x"))

    @each("option", "--nope", "--nope=1", "-x", "-qx", "-1", "--Trace", "-T", "-name=x", "--region-x", "---", "-")
    def test_unknown_options_are_refused(self, option):
        for args in ((option, "listZones"), ("listZones", "name=x", option)):
            with self.subTest(args):
                self.assertUsage(*args, says=["option", option.partition("=")[0][-1]])

    @each("option", "--regio", "--reg=eu", "--po", "--asyn", "--qui", "--trac", "--vers", "--hel", "--them=x", "--dry",
          "--wai=1")  # fmt: skip
    def test_abbreviations_are_refused(self, option):
        """An option that is added tomorrow would change what they mean."""
        self.assertUsage(option, "listZones", says=["there is no option", option.partition("=")[0]])

    @each("args", ["-r"], ["--region"], ["--theme"], ["--wait"], ["--quiet=1"], ["--post=yes"])
    def test_options_and_their_values(self, args):
        self.assertUsage("listZones", *args, says=[args[0].partition("=")[0]])

    def test_a_value_may_look_like_an_option(self):
        self.assertEqual({"name": "-q", "keyword": "--nope"}, self.asked_with("listZones", "name=-q", "keyword=--nope"))

    @each("args", [], ["-q"], ["--post"])
    def test_no_command(self, args):
        self.assertUsage(*args, says=["no command"])

    @each("command", "", " ", "name=x", "list\x01Zones", "list\udcff")
    def test_a_command_that_can_be_none(self, command):
        self.assertUsage(command)

    def test_an_argument_without_equals_sign(self):
        for word in ("x", "listHosts", "@file", '"x"'):
            self.assertUsage("listZones", word, says=[f"{word!r} is not a correctly formatted option"])
        self.assertUsage("listZones", "=x", says=["is not a correctly formatted option"])

    @each("given, sent", ("name=x", {"name": "x"}), ("name=", {"name": ""}), ('name=""', {"name": ""}),
          ("name=a=b", {"name": "a=b"}), ("name=a b", {"name": "a b"}), ("name=  x \t", {"name": "x"}),
          (" name = x ", {"name": "x"}), ('name="x"', {"name": "x"}), ("name='x'", {"name": "x"}),
          ("name= 'x' ", {"name": "x"}), ("name=' x '", {"name": " x "}), ("name=\"'x'\"", {"name": "'x'"}),
          ('name=""x""', {"name": '"x"'}), ("name='x\"", {"name": "'x\""}), ("name='", {"name": "'"}),
          ('name=x"', {"name": 'x"'}), ("name=a,b", {"name": "a,b"}), ("name=~+*%20&x", {"name": "~+*%20&x"}),
          ("name=z\u00fcrich \u20ac \U0001f511", {"name": "z\u00fcrich \u20ac \U0001f511"}),
          ("name=True", {"name": "True"}), ("listall=true", {"listall": "true"}),
          ("tags[0].key=a b", {"tags[0].key": "a b"}), ("details[0].cpuNumber=2", {"details[0].cpuNumber": "2"}),
          ("timeout=5", {"timeout": "5"}), ("method=post", {"method": "post"}), ("name=@@x", {"name": "@x"}),
          ("name=@@", {"name": "@"}), ("name=@@@x", {"name": "@@x"}), ("name='@x'", {"name": "@x"}),
          ("name=a@b", {"name": "a@b"}))  # fmt: skip
    def test_values(self, given, sent):
        self.assertEqual(sent, self.asked_with("listZones", given))

    def test_repeated_names_are_joined_in_the_order_given(self):
        """5.2.0 sorts and de-duplicates them, although the order of networkids matters."""
        args = ("deployVirtualMachine", "networkids=c", "zoneid=1", "networkids=a", "networkids=c", "networkids= b ",
                "--async")  # fmt: skip
        self.assertEqual({"networkids": "c,a,c,b", "zoneid": "1"}, self.asked_with(*args))
        self.assertEqual({"a[0].b": "1", "a[1].b": "2"}, self.asked_with("listZones", "a[0].b=1", "a[1].b=2"))

    def test_a_value_from_a_file(self):
        for content, sent in (("x", "x"), ("x\n", "x"), ("x\n\n", "x\n"), ("  'x' \n", "  'x' "), ("@@x\n", "@@x"),
                              ("a\nb\n", "a\nb"), ("z\u00fcrich\n", "z\u00fcrich"), ("", "")):  # fmt: skip
            with self.subTest(content):
                path = self.write("value", content)
                self.assertEqual({"name": sent}, self.asked_with("listZones", "name=@" + path))
        self.write("work/here", "here")
        self.assertEqual({"name": "here", "id": ""}, self.asked_with("listZones", "name=@here", "id= @~/value "))

    @each("content, sent", ("a\nb\n", "a\nb"), ("z\u00fc\n\n", "z\u00fc\n"), ("", ""))
    def test_a_value_from_standard_input(self, content, sent):
        stdin = io.TextIOWrapper(io.BytesIO(content.encode("utf-8")), encoding="ascii")
        with mock.patch("sys.stdin", stdin):
            self.assertEqual({"name": sent}, self.asked_with("listZones", "name=@-"))

    def test_a_file_that_cannot_be_a_value(self):
        binary = self.write("binary", b"\xff\x00")
        for value, says in (("@missing", "missing"), ("@" + binary, "UTF-8"), ("@" + self.home, "directory"),
                            ("@", "@")):  # fmt: skip
            with self.subTest(value):
                self.assertUsage("listZones", "name=" + value, says=["name", says])
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"))):
            self.assertUsage("listZones", "name=@-", says=["name", "standard input"])
        with mock.patch("sys.stdin", None):
            self.assertUsage("listZones", "name=@-", says=["name", "standard input"])

    @each("word", "headers=x", "headers=", "headers=x:y")
    def test_headers_is_no_parameter(self, word):
        self.assertUsage("listZones", word, says=["headers"])

    def test_names_that_python_would_trip_over(self):
        for word in ("self=x", "command=x"):
            self.assertUsage("listZones", word, says=[word.partition("=")[0]])
        for name in ("cls", "params", "call", "client", "kwargs", "class", "session", "endpoint", "_x", "a b", "jobid"):
            self.assertEqual({name: "x"}, self.asked_with("listZones", name + "=x"))

    def test_control_arguments_are_not_sent(self):
        args = ("json=true", "fetch_list=no", "fetch_result=off", "opcode_name=command")
        self.assertEqual({}, self.asked_with("listZones", *args))

    @each("name", "json", "fetch_list", "fetch_result")
    @each("value", "maybe", "", "2")
    def test_a_control_argument_that_is_no_boolean(self, name, value):
        self.assertUsage("listZones", f"{name}={value}", says=[name])

    def test_fetch_list(self):
        def page(record):
            first = 500 * (int(record.params["page"]) - 1)
            return {"r": {"count": 700, "zone": list(range(first, min(700, first + 500)))}}

        self.replies(listZones=page)
        for word in ("true", "YES", "on", "1", "t"):
            self.assertEqual(list(range(700)), json.loads(self.good("listZones", "fetch_list=" + word)))

    @each("word", "false", "No", "off", "0")
    def test_fetch_list_false_does_not_page(self, word):
        """With 5.2.0 `fetch_list=false` turns paging on."""
        self.server.requests.clear()
        self.assertEqual((0, ZONES_TEXT, ""), self.main("listZones", "fetch_list=" + word))
        (record,) = self.server.requests
        self.assertNotIn("page", record.params)

    def test_json_false_prints_text_as_it_is(self):
        text = "<zones>\n  <zone>z\u00fcrich</zone>\u001b[1m\n</zones>"
        self.replies(listZones=(200, text))
        self.assertEqual((0, text + "\n", ""), self.main("listZones", "json=false"))
        self.assertNotIn("response", self.server.requests[0].params)

    def test_opcode_name(self):
        code, out, err = self.main("listZones", "opcode_name=cmd", "name=x")
        self.assertEqual((0, "", "listZones"), (code, err, self.server.requests[0].params["cmd"]))
        self.assertNotIn("command", self.server.requests[0].params)

    @each("value", "a\x00b", "a\x1bb", "\x7f", "a\udcffb")
    def test_a_value_the_server_would_refuse(self, value):
        self.assertUsage("listZones", "keyword=" + value, says=["keyword"])
        self.assertUsage("listZones", "a\x1bb=x", says=["U+001B"])

    def test_post(self):
        self.main("listZones", "name=x")
        self.main("listZones", "name=x", "--post")
        self.main("--post", "listZones", "name=x")
        self.assertEqual(["GET", "POST", "POST"], [record.method for record in self.server.requests])
        self.assertEqual(("", "x"), (self.server.requests[1].query, self.server.requests[1].params["name"]))

    def test_flags_beat_environment_and_files(self):
        self.write("work/cloudstack.ini", f"[eu]\nendpoint = {self.server.endpoint}\nmethod = get\ntrace = false\n")
        environ(method="get", trace="no", region="cloudstack", overrides="method,trace")
        err = self.says(0, "--post", "-t", "-r", "eu", "listZones")
        self.assertTrue(err.startswith("POST http://"), err)

    def test_the_method_of_the_configuration_is_used(self):
        environ(method="POST")
        self.main("listZones")
        self.assertEqual("POST", self.server.requests[0].method)

    def test_a_region(self):
        """5.2.0 ignores --region when CLOUDSTACK_ENDPOINT is set."""
        text = f"[eu]\nendpoint = {self.server.endpoint}\nkey = eu-key\nsecret = s\nheader_x-tenant = t\n"
        self.write("work/cloudstack.ini", text)
        environ(endpoint=ENDPOINT)
        code, out, err = self.main("-r", "eu", "listZones")
        self.assertEqual((0, ZONES_TEXT, "eu-key"), (code, out, self.server.requests[0].params["apiKey"]))
        self.assertEqual("t", self.server.requests[0].headers["x-tenant"])

    @each("text, there", ("", ""), ("[eu]\nendpoint = http://e/\n", "; there are eu"))
    def test_an_unknown_region(self, text, there):
        self.write("work/cloudstack.ini", text)
        told = f"Error: region 'x' not in config{there}\n"
        self.assertEqual(told, self.assertUsage("-r", "x", "listZones"))
        self.unset("endpoint", "key", "secret")
        self.assertEqual(told, self.assertUsage("-q", "listZones", "--region", "x"))

    @each("args", ["--version"], ["listZones", "--version"], ["-q", "--version"])
    def test_version(self, args):
        self.assertEqual(f"cs {cs.__version__}\n", self.good(*args))
        self.assertEqual([], self.server.requests)

    @each("args", ["--help"], ["-h"], ["-q", "--help"])
    def test_help_names_every_option(self, args):
        self.unset("endpoint")
        out = self.good(*args)
        for option in "-r --region --theme --post --async --wait -q --quiet -t --trace --dry-run --version".split():
            self.assertRegex(out, rf"(?<![\w-]){re.escape(option)}(?![\w-])")
        self.assertIn("cs [options] COMMAND [name=value ...]", out)
        self.assertEqual([], self.server.requests)

    def test_main_without_arguments_reads_sys_argv(self):
        with mock.patch("sys.argv", ["/usr/bin/cs", "--version"]), contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(0, cs.main())
        self.assertEqual(f"cs {cs.__version__}\n", out.getvalue())

    def test_any_arguments_give_an_exit_code_and_no_traceback(self):
        """Command lines made at random out of what command lines are made of."""
        pieces = "listZones deployVirtualMachine x --async -q -t --trace -r eu --region=x --post --dry-run --theme x"
        pieces += " --theme= -- = - --- a=b a= =b name=@nofile name=@@ json=no json=x fetch_list=1 fetch_result=1"
        pieces += " headers=x --wait=1 --wait opcode_name= response=xml page=0 page=x pagesize=-1 expires= apiKey=k"
        pieces = (pieces + " --version -qq -rt command=x a[0].b=c signature=x").split()
        pieces += ["", "a=\x00", "\udcff", "a=\udcff", "opcode_name=\x01", "a" * 9000 + "=b", "-\u00fc", "\u00fc"]
        draw = random.Random(51)
        codes = collections.Counter()
        self.replies(queryAsyncJobResult=job_done({}))
        for _ in range(150):
            args = [draw.choice(pieces) for _ in range(draw.randrange(6))]
            with self.subTest(args):
                code, out, err = self.main(*args)
                codes[code] += 1
                if code == 2:
                    self.assertTold(err, err.splitlines()[0])
        self.assertEqual(set(), set(codes) - {0, 1, 2})
        self.assertGreater(codes[0], 2)


class OutputTest(CommandLineCase):
    """What is printed where, and the exit code."""

    def test_json_with_indent_2_and_sorted_keys_and_text_as_it_is(self):
        """5.2.0 prints \\u00fc for what is no ASCII."""
        self.assertEqual((0, ZONES_TEXT, ""), self.main("listZones"))

    @each("reply, args", ({"listzonesresponse": {}}, ()), ({"listzonesresponse": []}, ()),
          ({"listzonesresponse": None}, ()), ({"listzonesresponse": {}}, ("fetch_list=true",)),
          ((200, ""), ("json=false",)))  # fmt: skip
    def test_an_empty_answer_prints_nothing(self, reply, args):
        self.replies(listZones=reply)
        self.assertEqual((0, "", ""), self.main("listZones", *args))

    @each("value", 0, False, True, 1.5, "text", [1])
    def test_an_answer_that_is_no_object_is_still_json(self, value):
        self.replies(listZones={"listzonesresponse": value})
        self.assertEqual(value, json.loads(self.good("listZones")))

    def test_lone_surrogates_and_control_characters_are_valid_json_and_harm_no_terminal(self):
        text = "a\ud800\x1b[2J\x7f\x9b\u202e\u2066\u2028\tb\nc"
        self.replies(listZones={"r": {"name": text}})
        code, out, err = self.main("listZones")
        self.assertEqual((0, {"name": text}, ""), (code, json.loads(out), err))
        self.assertEqual([], re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066\u2028\ud800]", out))
        out.encode("utf-8")

    def test_raw_control_characters_in_an_answer(self):
        self.replies(listZones='{"r": {"name": "a\x1bb\x01"}}')
        self.assertEqual({"name": "a\x1bb\x01"}, json.loads(self.good("listZones")))

    def test_an_ascii_standard_output(self):
        result = self.cs("listZones", env={"PYTHONIOENCODING": "ascii"})
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        self.assertEqual(ZONES_ANSWER["listzonesresponse"], json.loads(result.raw.decode("ascii")))
        self.replies(listZones=(200, "z\u00fcrich \u20ac"))
        for encoding, text in (("ascii", b"z\\xfcrich \\u20ac\n"), ("latin-1", b"z\xfcrich \\u20ac\n")):
            raw = io.BytesIO()
            with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding=encoding, newline="\n")):
                self.assertEqual(0, cs.main(["listZones", "json=false"]))
                self.assertEqual(text, raw.getvalue())
        raw = io.BytesIO()  # as Python 3.6 has it under a C locale
        out = io.TextIOWrapper(raw, encoding="ascii", errors="surrogateescape", newline="\n")
        with contextlib.redirect_stdout(out):
            self.assertEqual(0, cs.main(["listZones", "json=false"]))
            self.assertEqual("z\u00fcrich \u20ac\n".encode("utf-8"), raw.getvalue())

    def test_an_api_error(self):
        document = refusal(431, "Unable to find zone \u20ac")
        self.replies(listZones=(431, document))
        printed = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        code, out, err = self.main("listZones")
        self.assertEqual((1, printed), (code, out))
        self.assertTold(err, "CloudStack error: HTTP 431 response from CloudStack: Unable to find zone \u20ac")
        self.assertEqual((1, printed, ""), self.main("listZones", "-q"))

    def test_escape_sequences_in_an_error_are_shown_escaped(self):
        self.replies(listZones=(431, refusal(431, "a\x1b[2Jb\x9bc\u202ed\x07")))
        self.assertIn("a\\x1b[2Jb\\x9bc\\u202ed\\x07", self.says(1, "listZones"))
        self.replies(listZones=(503, "<html>\x1b]0;title\x07</html>"))
        self.assertIn("<html>\\x1b]0;title\\x07</html>", self.says(1, "listZones"))

    @each("status", 200, 403, 502)
    def test_an_answer_that_is_no_json_is_shown_on_standard_error(self, status):
        page = "<html><body>login</body></html>"
        self.replies(listZones=(status, page))
        self.assertHolds(self.fails(1, "listZones"), "CloudStack error: ", page)
        self.assertEqual((1, "", ""), self.main("listZones", "--quiet"))

    def test_a_long_page_is_shown_from_its_beginning_only(self):
        self.replies(listZones=(502, "<html>" + "x" * 100000))
        code, out, err = self.main("listZones")
        self.assertIn("<html>xxxx", err)
        self.assertLess(len(err), 5000)

    def test_json_that_is_no_answer_of_cloudstack_is_shown_on_standard_error(self):
        self.replies(listZones={"a": 1, "b": 2})
        err = self.fails(1, "listZones")
        self.assertHolds(err, '{"a": 1, "b": 2}', "CloudStack error: Unexpected response from CloudStack")

    def test_broken_json(self):
        self.replies(listZones='{"r": ')
        self.assertIn("Malformed JSON document", self.fails(1, "listZones"))

    @each("depth", 300, 960, 980, 100000)
    @each("status", 200, 431)
    def test_deeply_nested_answers(self, depth, status):
        self.replies(listZones=(status, '{"r": ' + "[" * depth + "]" * depth + "}"))
        code, out, err = self.main("listZones")
        self.assertIn(code, (0, 1))
        self.assertNotIn("Traceback", err)

    def test_a_redirect_is_an_error_that_names_the_new_address_without_its_query(self):
        self.replies(listZones=(302, "https://other.example/login?token=" + PASSWORD))
        err = self.fails(1, "listZones")
        self.assertIn("https://other.example/login", err)
        self.assertNoCanary(err)
        self.assertEqual(1, len(self.server.requests))

    def test_a_success_that_holds_an_errortext_is_an_error(self):
        self.replies(listZones={"r": {"errorcode": 530, "errortext": "broken"}})
        code, out, err = self.main("listZones")
        self.assertEqual((1, {"errorcode": 530, "errortext": "broken"}), (code, json.loads(out)))

    def test_no_answer_is_exit_code_3(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            environ(endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}/")
            self.no_answer("refused")
        with self.no_tls() as port:
            environ(endpoint=f"https://127.0.0.1:{port}/")
            self.no_answer("TLS")
        environ(endpoint=self.server.endpoint, timeout="0.05")
        self.replies(listZones=forever)
        self.no_answer("timeout")
        environ(endpoint="http://cloud.invalid/")
        with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(-2, "Name or service not known")):
            self.no_answer("cloud.invalid")

    @staticmethod
    @contextlib.contextmanager
    def no_tls():
        """The port of a server that answers whatever comes with plain text."""

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        connection.recv(10000)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(5)
            listener.settimeout(10)
            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            yield listener.getsockname()[1]
            socket.socket.shutdown(listener, socket.SHUT_RDWR)
        thread.join()

    def no_answer(self, part):
        err = self.fails(3, "listZones", "password=" + PASSWORD)
        self.assertTold(err, err.splitlines()[0])
        self.assertTrue(err.startswith("CloudStack error: "), err)
        self.assertIn(part, err)
        self.assertNoCanary(err)
        self.assertEqual((3, "", ""), self.main("listZones", "-q"))

    def test_a_command_that_may_have_run_is_told(self):
        environ(timeout="0.05")
        self.replies(startVirtualMachine=forever, queryAsyncJobResult=(431, refusal(431, "unknown")))
        self.assertIn("its outcome is unknown", self.fails(3, "startVirtualMachine", "id=1"))

    def test_standard_error_that_cannot_be_written_is_no_matter(self):
        self.replies(listZones=(431, refusal(431, "no")))
        broken = mock.Mock(spec=io.StringIO)
        broken.write.side_effect = OSError(28, "No space left on device")
        for stderr in (broken, None):
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(stderr):
                self.assertEqual(1, cs.main(["listZones", "-t"]))
            self.assertEqual(refusal(431, "no"), json.loads(out.getvalue()))


class CommandLineJobsTest(CommandLineCase):
    """Commands that start a job."""

    def setUp(self):
        super().setUp()
        self.replies(deployVirtualMachine={"deployvirtualmachineresponse": {"jobid": "job-1", "id": "vm-1"}})

    def test_a_job_is_waited_for(self):
        self.replies(queryAsyncJobResult=[job_pending(), job_pending(), job_done({"virtualmachine": {"id": "vm-1"}})])
        self.assertEqual({"virtualmachine": {"id": "vm-1"}}, json.loads(self.good("deployVirtualMachine")))
        self.assertEqual(["deployVirtualMachine"] + ["queryAsyncJobResult"] * 3, self.server.commands)

    @each("args", ["--async"], ["fetch_result=false"])
    def test_async_does_not_wait(self, args):
        self.server.requests.clear()
        self.assertEqual({"jobid": "job-1", "id": "vm-1"}, json.loads(self.good("deployVirtualMachine", *args)))
        self.assertEqual(["deployVirtualMachine"], self.server.commands)

    @each("command", "queryAsyncJobResult", "doThingAsync", "asyncThing")
    def test_a_command_with_async_in_its_name_is_not_waited_for(self, command):
        self.replies(**{"*": {"r": {"jobid": "job-1"}}})
        self.server.requests.clear()
        self.assertEqual({"jobid": "job-1"}, json.loads(self.good(command)))
        self.assertEqual([command], self.server.commands)

    def test_a_failed_job(self):
        failed = {"errorcode": 533, "errortext": "no capacity \x1b[1m"}
        self.replies(queryAsyncJobResult=job_done(failed, 2))
        code, out, err = self.main("deployVirtualMachine")
        self.assertEqual((1, job_done(failed, 2)), (code, json.loads(out)))
        self.assertTold(err, "CloudStack error: Job failure: no capacity \\x1b[1m")
        code, out, err = self.main("deployVirtualMachine", "-q")
        self.assertEqual((1, job_done(failed, 2), ""), (code, json.loads(out), err))

    def test_a_job_still_running_at_job_timeout(self):
        environ(job_timeout="0.03")
        self.replies(queryAsyncJobResult=job_pending)
        err = self.fails(4, "deployVirtualMachine")
        self.assertHolds(err, "Timeout waiting for async job result", "cs --wait job-1")

    def test_no_answer_while_waiting_tells_how_to_go_on(self):
        environ(job_timeout="0.03", timeout="1")  # time enough for the answer that names the job
        self.replies(queryAsyncJobResult=forever)
        code, out, err = self.main("deployVirtualMachine")
        self.assertIn(code, (3, 4))
        self.assertEqual("", out)
        self.assertIn("cs --wait job-1", err)

    def test_wait(self):
        self.replies(queryAsyncJobResult=[job_pending(), job_done({"success": True})])
        self.assertEqual({"success": True}, json.loads(self.good("--wait", "job-1")))
        self.assertEqual(["job-1", "job-1"], [record.params["jobid"] for record in self.server.requests])
        code, out, err = self.main("--wait=job-1", "-q", "--post")
        self.assertEqual((0, {"success": True}, "POST"), (code, json.loads(out), self.server.requests[-1].method))

    def test_wait_for_a_failed_an_unknown_and_an_endless_job(self):
        self.replies(queryAsyncJobResult=job_done({"errorcode": 530, "errortext": "it broke"}, 2))
        self.assertTold(self.says(1, "--wait", "job-1"), "CloudStack error: Job failure: it broke")
        self.replies(queryAsyncJobResult=(431, refusal(431, "unable to find job")))
        err = self.says(1, "--wait", "job-2")
        self.assertTold(err, "CloudStack error: HTTP 431 response from CloudStack: unable to find job")
        environ(job_timeout="0.03")
        self.replies(queryAsyncJobResult=job_pending)
        self.assertIn("cs --wait job-1", self.fails(4, "--wait", "job-1"))

    def test_a_job_id_that_cannot_be_sent_is_no_usage_error(self):
        """It was the server's word, and a machine may be on its way."""
        self.replies(deployVirtualMachine={"r": {"jobid": "1\x1b[2J"}}, queryAsyncJobResult=job_pending)
        environ(job_timeout="0.03")
        code, out, err = self.main("deployVirtualMachine")
        self.assertNotEqual(2, code)
        self.assertTrue(err.startswith("CloudStack error: "), err)
        self.assertNotIn("\x1b", err)

    def test_an_interrupt_while_waiting_tells_how_to_go_on(self):
        self.replies(queryAsyncJobResult=job_pending)
        with mock.patch.object(cs, "_sleep", side_effect=KeyboardInterrupt):
            self.assertHolds(self.fails(130, "deployVirtualMachine"), "job-1", "cs --wait job-1")

    def test_an_interrupt_before_there_is_a_job(self):
        interrupted = mock.patch.object(cs.CloudStack, "_exchange", side_effect=KeyboardInterrupt)
        may_have_run = "Interrupted. deployVirtualMachine may have run: look before it is sent again.\n"
        with interrupted, mock.patch.dict(os.environ, CLOUDSTACK_RECOVER="false"):
            self.assertEqual((130, "", may_have_run), self.main("deployVirtualMachine"))
        with interrupted:
            self.assertEqual((130, "", ""), self.main("listZones"))

    def test_a_failure_stays_one_when_nobody_reads_its_answer(self):
        self.replies(updateZone=refusal(431, "no"))
        with mock.patch.object(cs, "_flush", side_effect=cs._OutputFailed(BrokenPipeError())):
            self.assertEqual((1, 0), (self.main("updateZone", "id=1")[0], self.main("listZones")[0]))

    def test_an_interrupt_before_the_answer_shows_the_id_that_the_job_gets(self):
        sent = []

        def exchange(client, request):
            sent.append(wire(request)["customjobid"])
            raise KeyboardInterrupt

        with mock.patch.object(cs.CloudStack, "_exchange", exchange):
            err = self.fails(130, "deployVirtualMachine")
        self.assertEqual(MAY_HAVE_RUN.format(*sent), err)


class TraceTest(CommandLineCase):
    """--trace shows every exchange and nothing secret."""

    def lines(self, *args):
        """The trace of a command line without its blank lines, and with what changes from run to run replaced."""
        err = self.says(0, "-t", *args)
        self.assertNoCanary(err)
        err = re.sub(r"expires=20\d\d-\d\d-\d\dT\d\d%3A\d\d%3A\d\d%2B0000", "expires=NOW", err)
        err = err.replace(self.server.address, "http://host")
        return [re.sub(r"^\(\d+ ms\)$", "(TIME)", line) for line in err.splitlines() if line]

    QUERY = "apiKey=***&command=listZones&expires=NOW&name=x&response=json&signature=***&signatureVersion=3"
    ANSWER = ["200 OK", "Content-Type: application/json", f"Content-Length: {len(json.dumps(ZONES_ANSWER))}",
              json.dumps(ZONES_ANSWER), "(TIME)"]  # fmt: skip

    def test_get(self):
        expected = ["GET http://host/client/api?" + self.QUERY, "User-Agent: cs/" + cs.__version__]
        self.assertEqual(expected + ["Accept-Encoding: identity"] + self.ANSWER, self.lines("listZones", "name=x"))

    def test_an_endpoint_without_a_path_is_shown_with_a_slash(self):
        environ(endpoint=self.server.address)
        self.assertEqual("GET http://host/?" + self.QUERY, self.lines("listZones", "name=x")[0])

    def test_an_endpoint_with_a_query(self):
        environ(endpoint=self.server.endpoint + "?site=" + PASSWORD)
        self.assertRegex(self.lines("listZones", "name=x")[0], "^GET http://host/client/api[?]")

    def test_post_with_its_form_body(self):
        expected = ["POST http://host/client/api", "User-Agent: cs/" + cs.__version__, "Accept-Encoding: identity",
                    "Content-Type: application/x-www-form-urlencoded", self.QUERY]  # fmt: skip
        self.assertEqual(expected + self.ANSWER, self.lines("listZones", "name=x", "--post"))
        environ(endpoint=self.server.address)
        self.assertEqual("POST http://host/", self.lines("listZones", "name=x", "--post")[0])

    def test_the_body_is_shown_as_received(self):
        body = '{ "listzonesresponse" :\n{"zone": [ ], "name": "z\u00fcrich"}}'
        self.replies(listZones=body)
        lines = self.lines("listZones")
        self.assertIn("\n".join(body.splitlines()), "\n".join(lines))

    def test_every_exchange_is_shown(self):
        self.replies(deployVirtualMachine={"r": {"jobid": "job-1"}},
                     queryAsyncJobResult=[job_pending(), job_done({"success": True})])  # fmt: skip
        lines = self.lines("deployVirtualMachine")
        requests = [re.search("command=([A-Za-z]+)", line).group(1) for line in lines if "command=" in line]
        self.assertEqual(["deployVirtualMachine", "queryAsyncJobResult", "queryAsyncJobResult"], requests)
        self.assertEqual((3, 3), (lines.count("200 OK"), lines.count("(TIME)")))

    def test_errors_and_pages_of_html_are_shown_too(self):
        self.replies(listZones=(502, "<html>\x1b[2J</html>"))
        err = self.says(1, "-t", "listZones")
        self.assertHolds(err, "\n502 Bad Gateway\nContent-Type: text/html\n", "\n<html>\\x1b[2J</html>\n")

    def test_an_exchange_without_an_answer_is_shown_with_its_reason(self):
        environ(timeout="0.05")
        self.replies(listZones=forever)
        err = self.says(3, "-t", "listZones", "password=" + PASSWORD)
        self.assertIn("No answer from " + self.server.endpoint, err)
        self.assertRegex(err, r"\(\d+ ms\)")
        self.assertNoCanary(err)

    def test_the_setting_does_what_the_option_does(self):
        environ(trace="true")
        self.assertIn("GET " + self.server.endpoint, self.says(0, "listZones"))

    def test_nothing_secret_is_shown(self):
        """Neither in what is sent, nor in an answer that repeats it, under any name."""
        environ(header_authorization="Bearer " + PASSWORD, header_x_auth_token=PASSWORD, header_cookie="a=" + PASSWORD)
        echo = {"apikey": KEY, "odd": [SECRET, PASSWORD, USERDATA], "secretkey": "CANARY-new",
                "privatekey": 'CANARY\n"pem'}  # fmt: skip
        echo["user"] = {"password": "CANARY-other", "sessionkey": "CANARY-session",
                        "details": {"rootPassword": "CANARY-root"}}  # fmt: skip
        self.replies(**{"*": {"r": echo}})
        for params in (["password=" + PASSWORD, "userdata=" + USERDATA],
                       ["details[0].password=" + PASSWORD, "details[0].userData=" + USERDATA],
                       ["newPassword=" + PASSWORD, "USERDATA=" + USERDATA],
                       ["privatekey=" + PASSWORD, "usersecretkey=" + USERDATA],
                       ["sessionkey=" + PASSWORD, "token=" + USERDATA],
                       ["signature=" + PASSWORD, "userdata=" + USERDATA, "password=" + PASSWORD]):  # fmt: skip
            for option in ("-t", "--post"):
                with self.subTest(params, option=option):
                    self.assertNoCanary(self.says(0, "-t", option, "updateUser", *params))
                    sent = self.server.requests[-1].params
                    for param in params[:2]:
                        name, _, value = param.partition("=")
                        if name != "signature":
                            self.assertEqual(value, sent[name])
        self.assertEqual("Bearer " + PASSWORD, self.server.requests[-1].headers["authorization"])

    def test_a_session_is_shown_without_its_secrets(self):
        self.unset("key", "secret")
        environ(username="admin", password=PASSWORD)
        self.replies(login={"loginresponse": {"sessionkey": "CANARY-session", "username": "admin"}})
        code, out, err = self.main("-t", "listZones")
        self.assertEqual((0, ZONES_TEXT), (code, out))
        self.assertNoCanary(err)
        self.assertEqual(["login", "listZones", "logout"], self.server.commands)
        self.assertEqual(PASSWORD, self.server.requests[0].params["password"])
        self.assertEqual("CANARY-session", self.server.requests[1].params["sessionkey"])
        self.assertNotIn("signature", self.server.requests[1].params)


class DryRunTest(CommandLineCase):
    """--dry-run prints what would be sent, and sends nothing."""

    def plan(self, *args):
        code, out, err = self.main("--dry-run", *args)
        self.assertEqual((0, "", []), (code, err, self.server.requests))
        self.assertNoCanary(out)
        lines = out.splitlines()
        return lines[0], dict(line.split("=", 1) for line in lines[1:])

    def test_method_address_and_parameters(self):
        head, params = self.plan("listZones", "name=z\u00fcrich &x", "tags[0].key=a")
        self.assertEqual(f"GET {self.server.endpoint}", head)
        self.assertRegex(params.pop("expires"), r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+0000$")
        fixed = {"apiKey": "***", "command": "listZones", "response": "json", "signature": "***",
                 "signatureVersion": "3"}  # fmt: skip
        self.assertEqual(dict({"name": "z\u00fcrich &x", "tags[0].key": "a"}, **fixed), params)

    def test_post(self):
        self.assertEqual(f"POST {self.server.endpoint}", self.plan("listZones", "--post")[0])
        self.assertEqual(f"POST {self.server.endpoint}", self.plan("listZones", "a=" + "x" * 9000)[0])

    def test_what_is_secret_is_replaced(self):
        head, params = self.plan("updateUser", "password=" + PASSWORD, "details[0].userdata=" + USERDATA)
        self.assertEqual(f"POST {self.server.endpoint}", head)
        self.assertEqual(("***", "***"), (params["password"], params["details[0].userdata"]))

    def test_control_arguments_are_no_parameters(self):
        for word in ("json=true", "fetch_result=true"):
            self.assertNotIn(word.partition("=")[0], self.plan("listZones", word)[1])
        head, params = self.plan("listZones", "json=false", "opcode_name=cmd")
        self.assertEqual("listZones", params["cmd"])
        self.assertNotIn("response", params)

    def test_page_without_pagesize_shows_the_size_that_is_added(self):
        self.assertEqual("500", self.plan("listZones", "page=2")[1]["pagesize"])

    def test_a_session_is_not_opened(self):
        self.unset("key", "secret")
        environ(username="admin", password=PASSWORD)
        self.assertNotIn("signature", self.plan("listZones")[1])

    def test_an_unsigned_client(self):
        self.unset("key", "secret")
        self.assertEqual({"command": "listZones", "response": "json"}, self.plan("listZones")[1])

    def test_waiting_for_a_job(self):
        self.replies(queryAsyncJobResult=job_done({"success": True}))
        code, out, err = self.main("--dry-run", "--wait", "job-1")
        self.assertIn(code, (0, 2))
        self.assertEqual([], self.server.requests)
        self.assertNotIn("Traceback", err)

    def test_control_characters_are_shown_escaped(self):
        self.assertIn("name=a\\u202eb\\x9bc", self.good("--dry-run", "listZones", "name=a\u202eb\x9bc"))

    def test_bad_input_is_refused_as_it_would_be(self):
        self.assertUsage("--dry-run", "listZones", "name=\x01", says=["name"])
        self.assertUsage("--dry-run", "listZones", "x", says=["'x'"])
        self.unset("secret")
        self.assertUsage("--dry-run", "listZones", says=["secret"])


class ReadableFilesTest(CommandLineCase):
    """An ini file that holds a secret and can be read by others works, with a warning."""

    def setUp(self):
        super().setUp()
        self.unset("key", "secret")

    def warnings(self, text, mode, *args):
        path = self.write(".cloudstack.ini", text, mode)
        code, out, err = self.main("listZones", *args)
        self.assertEqual((0, ZONES_TEXT), (code, out))
        self.assertNoCanary(err)
        if err:
            self.assertOneLine(err)
            self.assertTrue(err.startswith("Warning: "), err)
            self.assertIn(path, err)
        return bool(err)

    @unittest.skipUnless(os.name == "posix", "other systems have no such modes")
    @each("mode, warned", (0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o644, True), (0o666, True))
    def test_modes(self, mode, warned):
        signed = f"[cloudstack]\nkey = {KEY}\nsecret = {SECRET}\n"
        self.assertIs(self.warnings(signed, mode), warned)
        self.assertFalse(self.warnings(signed, mode, "-q"))

    @unittest.skipUnless(os.name == "posix", "other systems have no such modes")
    def test_only_where_it_holds_a_secret(self):
        self.assertFalse(self.warnings(f"[cloudstack]\ntimeout = 3\n[eu]\nsecret = {SECRET}\n", 0o644))

    @unittest.skipUnless(os.name == "posix", "other systems have no such modes")
    def test_once_however_many_secrets_and_requests(self):
        self.replies(login={"r": {"sessionkey": "CANARY-session"}}, listZones=[{"r": {"jobid": "job-1"}}],
                     queryAsyncJobResult=[job_pending(), job_done(ZONES_ANSWER["listzonesresponse"])])  # fmt: skip
        self.assertTrue(self.warnings(f"[cloudstack]\nusername = u\npassword = {PASSWORD}\n", 0o644))


# What nobody can send, of one setting, and of several: what the environment gives, and what the line says.
BAD_VALUES = {"endpoint": ["cloud.example/client/api", "localhost:8080/client/api", "file:///etc/passwd",
                           "ftp://cloud.example/", "http://", "http:///client/api", "http://[::1/client/api",
                           "http://cloud.example:port/", "http://cloud.example:99999/", "http://cloud example/",
                           "http://cloud.example/\r\nX: y", "http://z\u00fcrich.example/",
                           f"http://user:{PASSWORD}@cloud.example/", f"user:{PASSWORD}@cloud.example/",
                           f"http:user:{PASSWORD}@cloud.example/", f"cloud.example/client/api?password={PASSWORD}"],
              "secret": [""], "key": [None], "timeout": ["abc", "0", "-1", "nan", "inf", "1e300", "1" * 400],
              "retry": ["-1", "1.5", "x"], "retry_backoff": ["-0.5"], "method": ["put"], "job_timeout": ["soon", "-1"],
              "poll_interval": ["x", "-1", "1e300"], "expiration": ["x", "1e300"], "trace": ["maybe"],
              "dangerous_no_tls_verify": ["nope", "False ; comment"]}  # fmt: skip
BAD_FILES = [{"verify": "/missing/ca.pem"}, {"verify": "{empty}"}, {"verify": "{garbage}"},
             {"cert": "/missing/cert.pem"}, {"cert": "{garbage}"}, {"cert": "{home}"},
             {"cert": "{garbage}", "cert_key": "/missing/key.pem"}]  # fmt: skip
BAD_SETTINGS = [({name: value}, name) for name, values in BAD_VALUES.items() for value in values]
BAD_SETTINGS += [(dict(files, endpoint="https://127.0.0.1:1/"), next(iter(files))) for files in BAD_FILES]
BAD_SETTINGS += [({"key": None, "secret": None, "username": "u"}, "password"),
                 ({"key": None, "secret": None, "password": PASSWORD}, "username"),
                 ({"username": "u", "password": PASSWORD}, "username"),
                 ({"header_x": PASSWORD + "\r\nX-Admin: 1"}, "'x'"), ({"header_x": "\u20ac" + PASSWORD}, "'x'"),
                 ({"header_a b": PASSWORD}, "'a b'"), ({"header_content_length": "5"}, "content-length")]  # fmt: skip


class BadInputTest(CommandLineCase):
    """One clear line that names the setting, before anything is sent."""

    def setUp(self):
        super().setUp()
        self.files = {"home": self.home, "empty": self.write("empty.pem", ""),
                      "garbage": self.write("garbage.pem",
                                            "-----BEGIN CERTIFICATE-----\nCANARY\n-----END CERTIFICATE-----\n")}

    def bad_settings(self):
        """Each case with an environment of its own: (settings, what the line says)."""
        for settings, says in BAD_SETTINGS:
            settings = {name: value and value.format(**self.files) for name, value in settings.items()}
            with self.subTest(settings), mock.patch.dict(os.environ):
                self.unset(*settings)
                environ(**{name: value for name, value in settings.items() if value is not None})
                yield settings, says
            self.assertEqual([], self.server.requests)

    def test_settings_on_the_command_line(self):
        for _, says in self.bad_settings():
            err = self.fails(2, "listZones")
            self.assertOneLine(err)
            self.assertIn(says, err)
            self.assertNoCanary(err)

    @both
    def test_settings_in_the_library(self, kind):
        for _, says in self.bad_settings():
            with self.assertRaises((ValueError, cs.CloudStackException)) as caught:
                client = kind(**cs.read_config())
                outcome = client.listZones()
                if asyncio.iscoroutine(outcome):
                    run(self.closing(client, outcome))
            self.assertIn(says, str(caught.exception))
            self.assertNoCanary(*traceback.format_exception(type(caught.exception), caught.exception, None))

    @staticmethod
    async def closing(client, outcome):
        try:
            return await outcome
        finally:
            client.close()

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() != 0, "root may read every file")
    def test_an_unreadable_ca_file(self):
        environ(endpoint="https://127.0.0.1:1/", verify=self.write("ca.pem", "", mode=0))
        self.assertUsage("listZones", says=["verify"])

    @each("line, says", ("timeout = abc", "timeout"), ("retry = -1", "retry"), ("header_x = a\n  b", "'x'"),
          ("key = k", "secret"))  # fmt: skip
    def test_settings_in_the_file_are_refused_as_those_of_the_environment(self, line, says):
        self.unset("endpoint", "key", "secret")
        self.ini(f"[cloudstack]\nendpoint = {self.server.endpoint}\n{line}\n")
        self.assertUsage("listZones", says=[says])

    @each("name, value", ("endpoint", 5), ("key", 5), ("secret", ["x"]), ("timeout", "x"), ("timeout", True),
          ("timeout", None.__class__), ("method", 1), ("verify", 1.5), ("cert", 5), ("retry", True), ("retry", 1.5),
          ("expiration", object()), ("trace", 2), ("dangerous_no_tls_verify", "nope"), ("headers", "x: y"),
          ("headers", {"a b": "c"}), ("headers", {"a": ["c"]}), ("headers", {"a": "c\r\nd"}),
          ("fetch_result", "perhaps"), ("concurrency", 0), ("username", 7))  # fmt: skip
    @both
    def test_settings_of_the_wrong_type(self, name, value, kind):
        with self.assertRaisesRegex(ValueError, "^" + name + ": "):
            kind(**dict({"endpoint": ENDPOINT}, **{name: value}))
        client = kind(ENDPOINT)
        with self.assertRaisesRegex(ValueError, "^" + name + ": "):
            client.set_setting(name, value)

    @each("value, says", (object(), "object"), ({"a": {"b": 1}}, "dict"), ([[1]], "list"),
          ([{"a": object()}], "object"), (b"\xff" + PASSWORD.encode(), "UTF-8"), (PASSWORD + "\x00", "U+0000"),
          (PASSWORD + "\ud800", "U+D800"), (len, type(len).__name__))  # fmt: skip
    def test_parameters_that_cannot_be_sent(self, value, says):
        client = cs.CloudStack(self.server.endpoint, KEY, SECRET)
        self.addCleanup(client.close)
        error = self.raised(ValueError, client.listZones, userdata=value)
        self.assertIn("userdata", str(error))
        self.assertIn(says, str(error))
        self.assertNoCanary(error)
        with self.assertRaisesRegex(ValueError, "'x'"):
            client.listZones(headers={"x": "a\r\nb"})
        self.assertEqual([], self.server.requests)

    def test_files(self):
        self.unset("endpoint", "key", "secret")
        missing = os.path.join(self.home, "missing.ini")
        for name, content, says in (("no file at all", None, "Config file not found. Tried "),
                                    ("no endpoint", f"[cloudstack]\nkey = {KEY}\n",
                                     "the configuration is missing the following keys: endpoint"),
                                    ("no ini file", f"secret = {SECRET}\n", "is not an ini file"),
                                    ("a reference", f"[cloudstack]\nendpoint = http://e/\nsecret = {SECRET}%(x)s\n",
                                     "secret"), ("undecodable", b"[cloudstack]\nsecret = CANARY\xff\n", "UTF-8")):
            with self.subTest(name):
                if content is not None:
                    self.ini(content)
                self.assertNoCanary(self.assertUsage("listZones", says=[says]))
        os.remove(os.path.join(self.home, ".cloudstack.ini"))
        environ(config=missing)
        self.assertUsage("listZones", says=["Config file not found. Tried ", missing])
        environ(config=self.home)
        self.assertUsage("listZones", says=["cannot read", self.home])

    def test_usage_errors_are_told_in_spite_of_quiet(self):
        self.assertUsage("-q", "listZones", "x", says=["'x'"])
        environ(timeout="abc")
        self.assertUsage("-q", "listZones", says=["timeout"])


def posix_only(test):
    return unittest.skipUnless(os.name == "posix", "needs a POSIX system")(test)


class CommandLineProcessTest(CommandLineCase):
    """What only a process of its own can show."""

    def start(self, *args, **options):
        """A child whose Ctrl-C works even where the tests themselves were started in the background."""

        def take_interrupts():
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        command = options.pop("command", [sys.executable, CS_PATH])
        child = Child(command + list(args), preexec_fn=take_interrupts, **options)
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

    def interrupt(self, child):
        """Press Ctrl-C for a child that waits; what it says."""
        self.until_blocked(child)
        child.send_signal(signal.SIGINT)
        code, out, err = self.finish(child)
        self.assertEqual((130, ""), (code, out), err)
        return err

    def held(self, reply):
        """A reply that is given once release is set, and sets asked before."""
        asked, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        def wait(_):
            asked.set()
            release.wait(CHILD_LIMIT)
            return reply

        return wait, asked, release

    @each("command", [sys.executable, CS_PATH], [sys.executable, "-m", "cs"])
    def test_cs_py_and_python_m_cs_are_the_same_program(self, command):
        result = self.finish(self.start("listZones", "-q", command=command, cwd=os.path.dirname(CS_PATH)))
        self.assertEqual((0, ZONES_TEXT, ""), result)

    def test_the_exit_code_is_that_of_main(self):
        result = self.cs("listZones", "x")
        self.assertEqual((2, ""), (result.returncode, result.stdout))
        self.assertOneLine(result.stderr)

    def test_nothing_is_left_open(self):
        result = self.cs("listZones", env={"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "default"})
        self.assertEqual((0, ZONES_TEXT, ""), (result.returncode, result.stdout, result.stderr))

    def test_a_value_from_standard_input(self):
        result = self.cs("listZones", "name=@-", stdin="z\u00fcrich\n\n")
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        self.assertEqual("z\u00fcrich\n", self.server.requests[0].params["name"])

    @posix_only
    def test_an_argument_that_cannot_be_decoded(self):
        code, out, err = self.finish(self.start(b"listZones", b"name=\xff"))
        self.assertEqual((2, "", []), (code, out, self.server.requests))
        self.assertOneLine(err)

    @posix_only
    def test_a_reader_that_closes_early(self):
        self.replies(listZones={"r": {"zone": ["x" * 1000] * 1000}})
        child = self.start("listZones")
        self.assertEqual(b"{", child.stdout.read(1))
        child.stdout.close()
        self.assertEqual((b"", 0), (child.stderr.read(), child.wait()))

    @posix_only
    def test_a_reader_that_is_gone_before_anything_is_written(self):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            self.assertEqual((0, "", ""), self.finish(self.start("listZones", stdout=writing)))
        finally:
            os.close(writing)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    @each("args", ["listZones"], ["-q", "listHosts"])
    def test_a_full_disk(self, args):
        self.replies(listHosts=(431, refusal(431, "no")))
        with self.subTest(args), open("/dev/full", "wb") as full:
            code, out, err = self.finish(self.start(*args, stdout=full))
            self.assertEqual(1, code)
            self.assertOneLine(err)
            self.assertIn("No space left on device", err)

    @posix_only
    @each("args", ["listHosts"], ["--version"])
    def test_no_standard_output_at_all(self, args):
        self.replies(listHosts=(431, refusal(431, "no")))
        shell = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, CS_PATH]
        code, out, err = self.finish(self.start(*args, command=shell))
        self.assertIn(code, (0, 1))
        self.assertNotIn("Traceback", err)

    @posix_only
    def test_no_standard_error_at_all(self):
        self.replies(listZones=(431, refusal(431, "no")))
        shell = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, CS_PATH]
        code, out, err = self.finish(self.start("-t", "listZones", command=shell))
        self.assertEqual((1, refusal(431, "no")), (code, json.loads(out)))

    @posix_only
    @each("holding", True, False)
    @each("args", ["deployVirtualMachine"], ["--wait", "job-1"])
    def test_an_interrupt_while_waiting_for_a_job(self, holding, args):
        """While a look at it is under way, and between two looks. With 5.2.0 it never shows the job's id."""
        wait, asked, release = self.held(job_pending())
        looks = []

        def pending(record):
            looks.append(record)
            return wait(record) if holding and len(looks) == 2 else job_pending()

        self.replies(deployVirtualMachine={"r": {"jobid": "job-1"}}, queryAsyncJobResult=pending)
        child = self.start(*args, env=dict(os.environ, CLOUDSTACK_POLL_INTERVAL="0.05"))
        until(asked.is_set if holding else lambda: looks, "a look")
        err = self.interrupt(child)
        self.assertIn("cs --wait job-1", err)
        self.assertNotIn("Traceback", err)

    @posix_only
    def test_an_interrupt_while_waiting_for_an_answer(self):
        wait, asked, release = self.held(ZONES_ANSWER)
        self.replies(listZones=wait)
        child = self.start("listZones")
        self.assertTrue(asked.wait(CHILD_LIMIT))
        self.assertLacks(self.interrupt(child), "Traceback", "--wait")

    @posix_only
    def test_an_interrupt_before_the_answer_shows_the_id_of_the_job(self):
        wait, asked, release = self.held({"r": {"jobid": "job-1"}})
        self.replies(deployVirtualMachine=wait)
        child = self.start("deployVirtualMachine", "--retry", "0")
        self.assertTrue(asked.wait(10))
        child.send_signal(signal.SIGINT)
        code, out, err = self.finish(child)
        told = MAY_HAVE_RUN.format(self.server.requests[0].params["customjobid"])
        self.assertEqual((130, "", told), (code, out, err))

    @unittest.skipUnless(os.path.exists("/proc/self/cmdline"), "needs /proc")
    def test_the_process_list_shows_no_secret(self):
        wait, asked, release = self.held({"r": {}})
        self.replies(updateUser=wait)
        path = self.write("password", PASSWORD)
        child = self.start("updateUser", "password=@" + path, "-t")
        self.assertTrue(asked.wait(CHILD_LIMIT))
        line = open_bytes(f"/proc/{child.pid}/cmdline")
        self.assertEqual(b"", open_bytes(f"/proc/{child.pid}/task/{child.pid}/children"))
        release.set()
        self.assertEqual(0, self.finish(child)[0])
        self.assertIn(b"updateUser", line)
        self.assertNotIn(b"CANARY", line)
        self.assertEqual(PASSWORD, self.server.requests[0].params["password"])


FAKE_PYGMENTS = {
    "__init__.py": "def highlight(text, lexer, formatter):\n"
                   "    return '\\x1b[36m<' + lexer.name + ' in ' + formatter.style + '>\\n' + text + '\\x1b[39m\\n'\n",
    "formatters.py": "from .util import ClassNotFound\n"
                     "class Terminal256Formatter:\n"
                     "    def __init__(self, style='default', **options):\n"
                     "        if style == 'nosuch':\n            raise ClassNotFound(style)\n"
                     "        self.style = style\n",
    "lexers.py": "class JsonLexer:\n    name = 'JSON'\n",
    "util.py": "class ClassNotFound(ValueError):\n    pass\n"}  # fmt: skip


@unittest.skipIf(pty is None, "needs pseudo-terminals")
class TerminalTest(CommandLineCase):
    """Output on a terminal: coloured where Pygments is installed, and nothing in it that the server made up."""

    def setUp(self):
        super().setUp()
        environ(timeout="10")

    def pygments(self, installed=True):
        """A stand-in for Pygments, or something in its way, in front of what may be installed; the folder it is in."""
        folder = os.path.join(self.home, "fake" if installed else "none")
        os.makedirs(os.path.join(folder, "pygments"))
        for name, text in (FAKE_PYGMENTS if installed else {"__init__.py": "raise ImportError('not here')\n"}).items():
            self.write(os.path.join(folder, "pygments", name), text)
        return folder

    def on_terminal(self, *args, **env):
        """(exit code, standard output, standard error) of a child with both on terminals of their own."""
        ends = [pty.openpty(), pty.openpty()]
        env = dict(os.environ, TERM="xterm", **env)
        child = Child([sys.executable, CS_PATH] + list(args), stdout=ends[0][1], stderr=ends[1][1], env=env)
        texts = [b"", b""]
        in_threads(2, lambda number: self.drain(texts, number, ends[number]))
        return [child.finish()[0]] + [text.decode("utf-8").replace("\r\n", "\n") for text in texts]

    @staticmethod
    def drain(texts, number, ends):
        """All that a child writes to a terminal; it ends when the child does."""
        os.close(ends[1])
        try:
            data = b"x"
            while data:
                data = os.read(ends[0], 65536)
                texts[number] += data
        except OSError:  # Linux says so that the other end is closed
            pass
        finally:
            os.close(ends[0])

    def test_json_is_coloured_where_pygments_is_installed(self):
        folder = self.pygments()
        code, out, err = self.on_terminal("listZones", PYTHONPATH=folder)
        self.assertEqual((0, "\x1b[36m<JSON in default>\n" + ZONES_TEXT.strip("\n") + "\x1b[39m\n", ""),
                         (code, out, err))  # fmt: skip
        result = self.cs("listZones", env={"PYTHONPATH": folder})
        self.assertEqual((0, ZONES_TEXT, ""), (result.returncode, result.stdout, result.stderr))

    def test_json_is_plain_where_pygments_is_not_installed(self):
        code, out, err = self.on_terminal("listZones", PYTHONPATH=self.pygments(False))
        self.assertEqual((0, ZONES_TEXT, ""), (code, out, err))

    @each("args, expected", (["listZones"], ["autumn"]), (["listZones", "--theme", "monokai"], ["monokai"]),
          (["--theme=nosuch", "listZones"], ["nosuch", "default"]))  # fmt: skip
    def test_themes(self, args, expected):
        """The option beats the setting; a theme that Pygments does not have is no reason to fail."""
        modules = {name: mock.Mock() for name in ("pygments", "pygments.formatters", "pygments.lexers",
                                                  "pygments.util")}  # fmt: skip
        modules["pygments.util"].ClassNotFound = LookupError
        used = []

        def formatter(style="default"):
            used.append(style)
            if style == "nosuch":
                raise LookupError(style)

        modules["pygments.formatters"].Terminal256Formatter = formatter
        modules["pygments"].highlight = lambda text, lexer, formatter: "\x1b[1m" + text + "\x1b[0m"
        environ(theme="autumn")
        out = FakeTerminal()
        used.clear()
        with mock.patch.dict(sys.modules, modules), contextlib.redirect_stdout(out):
            with mock.patch.dict(os.environ, TERM="xterm"):
                self.assertEqual(0, cs.main(args))
        self.assertEqual((expected, "\x1b[1m" + ZONES_TEXT.rstrip("\n") + "\x1b[0m\n"), (used, out.getvalue()))

    EVIL = "a\x1b[2J\x1b[8mb\x9b31mc\u202ed\x07e\x1b]0;title\x07\x7f"
    HARMFUL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]"

    def test_what_the_server_sends_cannot_steer_the_terminal(self):
        folder = self.pygments(False)
        as_text = "a\\x1b[2J\\x1b[8mb\\x9b31mc\\u202ed\\x07e\\x1b]0;title\\x07\\x7f"
        for name, reply, args, where, shown in (("JSON", {"r": {"name": self.EVIL}}, [], 1, None),
                                                ("text", (200, self.EVIL), ["json=false"], 1, as_text + "\n"),
                                                ("an error", (431, refusal(431, self.EVIL)), [], 2, as_text)):
            with self.subTest(name):
                self.replies(listZones=reply)
                result = self.on_terminal("listZones", *args, PYTHONPATH=folder)
                for text in result[1:]:
                    # What the client itself may write to a terminal: colours of its own are off here.
                    self.assertEqual([], re.findall(self.HARMFUL, text.replace("\r\x1b[K", "")), text)
                if shown is None:
                    self.assertEqual(reply["r"], json.loads(result[where]))
                else:
                    self.assertIn(shown, result[where])


class CommandLineSandboxTest(Case):
    """`python3 test_cs.py sandbox`: the command line against the simulator, over real signed requests."""

    def sandbox(self, *args, **options):
        # What is configured here must not lead the sandbox elsewhere.
        env = dict(os.environ, CLOUDSTACK_ENDPOINT="http://cloud.invalid/", CLOUDSTACK_REGION="mars",
                   CLOUDSTACK_TIMEOUT="x")  # fmt: skip
        env.update(options.pop("env", {}))
        child = Child([sys.executable, TEST_PATH, "sandbox"] + list(args), env=env, **options)
        self.addCleanup(child.end)
        return child

    def test_a_command(self):
        code, out, err = self.sandbox("listZones").finish()
        self.assertEqual((0, b""), (code, err))
        zones = json.loads(out.decode("utf-8"))
        self.assertEqual(len(zones["zone"]), zones["count"])
        self.assertGreater(zones["count"], 0)

    def test_the_exit_code_is_the_commands(self):
        code, out, err = self.sandbox("startVirtualMachine", "id=nonsense").finish()
        self.assertEqual(1, code)
        self.assertTrue(err.startswith(b"CloudStack error: HTTP 431 response from CloudStack: "), err)
        self.assertEqual(431, list(json.loads(out.decode("utf-8")).values())[0]["errorcode"])

    def free_port(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return str(free.getsockname()[1])

    @each("words", ["--port={}", "--dry-run", "listZones"], ["--dry-run", "--port", "{}", "listZones"])
    def test_the_port_may_stand_anywhere(self, words):
        port = self.free_port()
        code, out, err = self.sandbox(*[word.format(port) for word in words]).finish()
        self.assertEqual((0, b""), (code, err), words)
        self.assertIn(f"http://127.0.0.1:{port}/".encode("ascii"), out)

    def test_a_bad_port_is_one_line(self):
        taken = socket.socket()
        self.addCleanup(taken.close)
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        for words in (["--port"], ["--port", "x"], ["--port", "65536", "listZones"], ["--port=-1"], ["--port="],
                      ["--port", str(taken.getsockname()[1])]):  # fmt: skip
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = sandbox(words)
            self.assertEqual((2, "", 1), (code, out.getvalue(), err.getvalue().count("\n")), words)
            self.assertIn("port", err.getvalue())

    def test_help(self):
        for words in (["--help"], ["-h"], ["--port", "0", "--help"]):
            code, out, err = self.sandbox(*words).finish()
            self.assertEqual((0, b""), (code, err))
            self.assertIn(b"--port N", out)
        self.assertNotIn(b"--port", self.sandbox("listZones", "--help").finish()[1])

    def test_nothing_of_the_users_is_read_or_written(self):
        for path in (".cloudstack.ini", "work/cloudstack.ini"):
            self.write(path, "no ini file at all")
        cache = os.path.join(self.home, "cache")
        before = sorted(os.listdir(self.home))
        code, out, err = self.sandbox("--sync", env={"XDG_CACHE_HOME": cache, "TMPDIR": self.cwd}).finish()
        self.assertEqual((0, before), (code, sorted(os.listdir(self.home))), err)
        self.assertEqual(["cloudstack.ini"], os.listdir(self.cwd))

    @posix_only
    @each("number, code", (signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM))
    def test_without_a_command_it_runs_until_interrupted(self, number, code):
        child = self.sandbox(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        lines = [child.stdout.readline().decode("ascii") for _ in range(4)]
        settings = dict(re.match(r"export ([A-Z_]+)=(\S+)\n\Z", line).groups() for line in lines)
        named = ["CLOUDSTACK_ENDPOINT", "CLOUDSTACK_KEY", "CLOUDSTACK_SECRET", "XDG_CACHE_HOME"]
        self.assertEqual(named, sorted(settings))
        self.assertIn(b"until Ctrl-C", child.stderr.readline())
        os.environ.update(settings)
        status, out, err = self.main("listVirtualMachines", "fetch_list=true", "state=Running")
        self.assertEqual((0, ""), (status, err))
        self.assertGreater(len(json.loads(out)), 1)
        child.send_signal(number)
        self.assertEqual((code, b"", b""), child.finish())
        self.assertFalse(os.path.exists(settings["XDG_CACHE_HOME"]))

    def test_the_command_line_against_the_simulator(self):
        """Signatures checked by another implementation, jobs that take a moment, secrets by POST."""
        with Simulator(job_seconds=0.05) as cloud:
            environ(endpoint=cloud.endpoint, key=cloud.key, secret=cloud.secret, poll_interval="0.05")
            code, out, err = self.main("listVirtualMachines", "state=Running", "pagesize=1", "page=1")
            self.assertEqual((0, 0), (code, err.count("Traceback")))
            (machine,) = json.loads(out)["virtualmachine"]
            code, out, err = self.main("stopVirtualMachine", "id=" + machine["id"])
            self.assertEqual((0, "", "Stopped"), (code, err, json.loads(out)["virtualmachine"]["state"]))
            code, out, err = self.main("updateVirtualMachine", "id=" + machine["id"], "displayname=~ * z\u00fcrich +%",
                                       "-t")  # fmt: skip
            self.assertEqual((0, "~ * z\u00fcrich +%"), (code, json.loads(out)["virtualmachine"]["displayname"]))
            self.assertLacks(err, cloud.key, cloud.secret)
            code, out, err = self.main("startVirtualMachine", "id=" + machine["id"], "--async")
            code, out, err = self.main("--wait", json.loads(out)["jobid"])
            self.assertEqual((0, "Running"), (code, json.loads(out)["virtualmachine"]["state"]))
            err = self.says(1, "startVirtualMachine", "id=" + machine["id"])
            self.assertTrue(err.startswith("CloudStack error: "), err)
            environ(secret="wrong")
            self.assertEqual(1, self.main("listZones", "-q")[0])


HANGING = """
import os, subprocess, sys, time, unittest
sys.path.insert(0, {folder!r})
import test_cs

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]
TREE = ("import os, subprocess, sys; child = subprocess.Popen(sys.argv[1:]); print(os.getpid(), child.pid, flush=True);"
        "child.wait()")

def keep(*pids):
    with open(os.path.join({home!r}, "pids"), "a") as file:
        print(*pids, file=file)

class HangingTest(unittest.TestCase):
    def start(self):
        child = test_cs.Child([sys.executable, "-c", TREE] + SLEEP, limit={limit})
        self.addCleanup(child.end)
        keep(child.stdout.readline().decode())
        return child

    def test_1_passes(self):
        pass

    def test_2_waits_for_a_child_that_hangs(self):
        self.start().finish()

    def test_3_waits_for_nothing(self):
        self.start()
        time.sleep(300)

    def test_4_says_a_word_that_ascii_has_not(self):
        self.fail("z\u00fcrich")

    def test_5_does_not_heed_the_alarm(self):
        self.start()
        keep(os.getpid())
        while True:
            try:
                time.sleep(300)
            except BaseException:
                pass

if __name__ == "__main__":
    sys.exit(test_cs.run_tests(sys.argv[1:]))
"""


class RunningTest(Case):
    """What runs the tests."""

    def suite(self, *args, **env):
        """(exit code, output) of a suite of tests of which most hang."""
        text = HANGING.format(folder=os.path.dirname(CS_PATH), home=self.home, limit=env.pop("limit", 300))
        command = [sys.executable, self.write("hanging.py", text)] + list(args)
        env = dict(os.environ, CS_TEST_LIMIT="2", **env)
        code, out, err = Child(command, env=env, stderr=subprocess.STDOUT).finish()
        return code, out.decode("utf-8")

    def assert_gone(self):
        """None of the processes that the tests started is left."""
        with open(os.path.join(self.home, "pids")) as file:
            pids = file.read().split()
        self.assertGreater(len(pids), 1)
        for pid in pids:
            until(lambda: not is_alive(pid), f"the end of {pid}")  # noqa: B023  (now)

    def assert_fails(self, out, *names):
        for name in names:
            self.assertRegex(out, "(?m)^(FAIL|ERROR): .*" + name)

    def test_a_child_that_hangs_fails_its_test_and_is_ended_with_its_own(self):
        code, out = self.suite("test_1", "test_2", limit=0.5)
        self.assertEqual((1, "1 passed, 1 failed"), (code, out.splitlines()[-1]), out)
        self.assert_fails(out, "test_2_waits_for_a_child_that_hangs")
        self.assertIn("did not end within 0.5 s", out)
        self.assert_gone()

    def test_a_test_that_hangs_fails_and_the_others_are_run(self):
        """In both processes, and with text that the C locale of Python 3.6 cannot show."""
        code, out = self.suite(LC_ALL="C", LANG="")
        self.assertEqual((1, "1 passed, 4 failed"), (code, out.splitlines()[-1]), out)
        self.assert_fails(out, "test_3_waits_for_nothing", "test_4_says", "test_5_does_not_heed_the_alarm")
        self.assertIn("not done after 2 s", out)
        self.assertRegex(out, "hanging.py\", line \\d+ in test_5_does_not_heed")
        self.assert_gone()

    @posix_only
    @each("number", signal.SIGTERM, signal.SIGINT)
    def test_one_that_is_ended_ends_what_it_started(self, number):
        text = HANGING.format(folder=os.path.dirname(CS_PATH), home=self.home, limit=300)
        child = Child([sys.executable, self.write("hanging.py", text), "test_3"], env=dict(os.environ),
                      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
        self.addCleanup(child.end)
        path = os.path.join(self.home, "pids")
        until(lambda path=path: os.path.exists(path) and os.path.getsize(path), "the test's beginning")
        child.send_signal(number)
        self.assertEqual(128 + number, child.wait())
        self.assert_gone()
        os.unlink(path)

    @each("word", "--help", "-h")
    def test_it_says_what_it_can_do(self, word):
        code, out, err = Child([sys.executable, TEST_PATH, word]).finish()
        self.assertEqual((0, b""), (code, err))
        self.assertHolds(out, b"WORD", b"-v", b"sandbox")

    @each("words", ["--verbos"], ["-x", "SuiteTest"], ["RunningTest", "--failfast"])
    def test_an_unknown_option_is_one_line(self, words):
        code, out, err = Child([sys.executable, TEST_PATH] + words).finish()
        self.assertEqual((2, b"", 1), (code, out, err.count(b"\n")))

    def test_a_word_that_no_name_holds_is_a_failure(self):
        code, out, err = Child([sys.executable, TEST_PATH, "no such test"]).finish()
        self.assertEqual((1, b""), (code, err))
        self.assertIn(b"no test has a name with no such test\n", out.replace(b"\r", b""))


def is_alive(pid):
    """Whether a process runs; one that has ended and waits to be asked for its status does not."""
    try:
        os.kill(int(pid), 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not os.path.exists("/proc/self")  # macOS has no such place


# === [9] command line: what its further classes share ===============================================================
# The list of commands, completion, formats, terminals, --configure, and what README says.

README_PATH = os.path.join(os.path.dirname(CS_PATH), "README.rst")
OWN_PARAMETERS = {"command", "response", "apikey", "signature", "signatureversion", "expires", "customjobid"}
EVIL_TITLE = "\x1b]0;pwned\x07"  # would set the title of the window
JSON_HEADERS = {"Content-Type": "application/json"}


class FakeTerminal(io.StringIO):
    """Standard output or error that says it is a terminal."""

    def isatty(self):
        return True


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


class CloudCase(Case):
    """A command line whose environment names a simulator, which each test class has one of."""

    options = {}  # type: dict

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
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
        code, out, err = self.main(*args)
        self.assertEqual((2, "", []), (code, out, self.asked))
        self.assertNotIn("Traceback", err)
        return err

    def sync(self):
        """Fetch the list of commands; the path of the file."""
        self.assertEqual((0, "", ""), self.main("--sync", "-q"))
        del self.cloud.requests[:]
        return self.cache_file()

    def known(self):
        """As sync(), but the server is asked for the first test of a class only."""
        kept = type(self).__dict__.get("kept")
        if kept is None:
            path = self.sync()
            type(self).kept = os.path.basename(path), open_bytes(path)
            return path
        os.makedirs(os.path.join(self.home, ".cache", "cs"), mode=0o700)
        return self.write(os.path.join(".cache", "cs", kept[0]), kept[1])

    def cache_file(self):
        """The one file that the cache holds."""
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(self.home, ".cache"), "cs")
        names = os.listdir(folder)
        self.assertEqual(1, len(names), names)
        return os.path.join(folder, names[0])

    def sync_as(self, *apis):
        """Have the server offer these commands, and fetch the list: (name, parameter words) or whole entries."""
        self.reply("listApis", {"count": len(apis), "api": [api_entry(api) for api in apis]})
        return self.sync()

    def on_terminal(self, *args, **options):
        """main() where standard output, and with both=True standard error too (the same one), is a terminal."""
        out = FakeTerminal()
        err = out if options.pop("both", False) else io.StringIO()
        size = {"COLUMNS": str(options.pop("columns", 80)), "LINES": "24", "TERM": options.pop("term", "xterm")}
        with mock.patch.dict(os.environ, dict(size, **options)):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cs.main(list(args))
        return code, out.getvalue(), "" if err is out else err.getvalue()

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
    name, words = api[0], api[1:]
    params = []
    for word in words:
        given, _, kind = word.rstrip("!").partition(":")
        params.append({"name": given, "type": kind or "string", "required": word.endswith("!"), "length": 255,
                       "description": "the " + given})  # fmt: skip
    return {"name": name, "description": f"Does {name}.", "isasync": False, "params": params, "response": []}


# === [9.4] the list of commands =====================================================================================


class CatalogFileTest(CloudCase):
    """listApis is read once for an endpoint and account, and kept."""

    def test_it_is_below_XDG_CACHE_HOME_or_else_the_home_directory(self):
        for variable, folder in (
            (None, os.path.join(self.home, ".cache", "cs")),
            ("", os.path.join(self.home, ".cache", "cs")),
            ("relative", os.path.join(self.home, ".cache", "cs")),  # the specification has such ones ignored
            (os.path.join(self.home, "elsewhere"), os.path.join(self.home, "elsewhere", "cs")),
        ):
            with self.subTest(variable):
                if variable is not None:
                    os.environ["XDG_CACHE_HOME"] = variable
                self.good("--sync", "-q")
                self.assertEqual(1, len(os.listdir(folder)))
                shutil.rmtree(folder)
        self.assertEqual([], os.listdir(self.cwd))

    @unittest.skipUnless(os.name == "posix", "needs file modes")
    def test_modes(self):
        self.addCleanup(os.umask, os.umask(0))
        for _ in range(2):  # made anew, and replaced
            path = self.sync()
            self.assertEqual(0o600, os.stat(path).st_mode & 0o777)
            self.assertEqual(0o700, os.stat(os.path.dirname(path)).st_mode & 0o777)

    def test_each_endpoint_and_account_has_its_own(self):
        folder = os.path.dirname(self.sync())
        for settings in ({"key": "another"}, {"endpoint": self.cloud.endpoint.replace("127.0.0.1", "localhost")},
                         {"key": "", "secret": ""}):  # fmt: skip
            before = set(os.listdir(folder))
            with mock.patch.dict(os.environ):
                self.configure(**settings)
                self.reply("listApis", {"count": 1, "api": [api_entry(("listZones",))]})
                self.good("--sync", "-q")
            self.assertEqual(1, len(set(os.listdir(folder)) - before), settings)

    def test_users_of_one_name_in_two_domains_have_their_own(self):
        self.unset("key", "secret")
        self.configure(username="ann", password="x")
        paths = set()
        for domain in ("/one", "/two", ""):
            self.configure(domain=domain)
            paths.add(cs._cache_path(cs.CloudStack(**cs.read_config())))
        self.assertEqual(3, len(paths))

    def test_nothing_secret_is_in_the_file_or_its_name(self):
        self.unset("key", "secret")
        user = self.cloud.users["admin"]
        self.configure(key=user.key, secret=user.secret)
        path = self.sync()
        text = open_bytes(path).decode("utf-8")
        for secret in (user.key, user.secret):
            self.assertNotIn(secret, text)
            self.assertNotIn(secret[:12], path)
        self.assertNotIn("127.0.0.1", os.path.basename(path))

    def test_it_is_replaced_in_one_step(self):
        before = open_bytes(self.sync())
        with mock.patch("os.replace", side_effect=OSError("no")):
            code, out, err = self.main("--sync")
        self.assertEqual((2, ""), (code, out))
        self.assertIn("cannot write", err)
        self.assertEqual(before, open_bytes(self.cache_file()))  # and nothing half done lies beside it

    def test_what_a_killed_process_left_behind_is_no_obstacle(self):
        """In a container every process has the same id."""
        path = self.sync()
        with mock.patch("os.replace", side_effect=KeyboardInterrupt), mock.patch("os.unlink", side_effect=OSError):
            try:
                self.main("--sync", "-q")
            except OSError:
                pass
        self.assertGreater(len(os.listdir(os.path.dirname(path))), 1)
        self.good("--sync", "-q")

    def test_a_damaged_one_is_thrown_away(self):
        path = self.sync()
        good = open_bytes(path)
        lines = good.split(b"\n")
        zones = next(number for number, line in enumerate(lines) if b'"listZones"' in line)
        with mock.patch.object(cs, "_CATALOG_VERSION", 999):
            self.sync()
        contents = [("another version", open_bytes(path)), ("empty", b""), ("cut short", good[: len(good) // 2]),
                    ("cut short by little", good.rstrip(b"\n")[:-1]),
                    ("cut short at the end of a line", b"\n".join(lines[: len(lines) // 2]) + b"\n"),
                    ("without its last line", b"\n".join(good.rstrip(b"\n").split(b"\n")[:-1]) + b"\n"),
                    ("a line missing", b"\n".join(lines[:5] + lines[6:])),
                    ("a line twice", b"\n".join(lines[:6] + lines[5:])), ("twice", good + good),
                    ("another letter", good.replace(b"Lists zones", b"Lists Zones")),
                    ("not UTF-8", good.replace(b"Lists zones", b"Lists \xff\xfezones")),
                    ("binary", bytes(bytearray(range(256))) * 10), ("nested for ever", b"[" * 200000),
                    ("nested for ever in its middle", b"\n".join(lines[:zones] + [b"[" * 200000] + lines[zones + 1 :]))]
        heads = (b"", b"0", b"nan", b"-inf", b"1" * 400, b"{}", b"[]", b"null", b'{"version": 1}')
        for number, first in enumerate(heads):
            contents.append((f"another first line ({number})", b"\n".join([first] + lines[1:])))
        for number, line in enumerate((b'["listZones",', b'["listZones"]', b'["listZones",7,7,7,7,7]', b'"listZones"')):
            content = b"\n".join(lines[:zones] + [line] + lines[zones + 1 :])
            contents.append((f"another line ({number})", content))
        for name, content in contents:
            with self.subTest(name):
                self.assertNotEqual(good, content)
                self.write(path, content)
                del self.cloud.requests[:]
                code, out, err = self.main("listZones", "name=nobody")
                self.assertEqual((0, "", "", ["listZones"]), (code, out, err, self.asked))
                self.assertFalse(os.path.exists(path), "still there")

    def test_one_that_cannot_be_read_just_now_is_kept(self):
        path = self.sync()
        plain = open

        def refuse(name, *args, **options):
            if name == path:
                raise OSError(errno.EMFILE, "Too many open files")
            return plain(name, *args, **options)

        with mock.patch("builtins.open", refuse):
            self.assertIn("zone", self.good("listZones", "nam=x"))  # not checked
        self.assertTrue(os.path.exists(path))
        self.assertIn("'nam'", self.usage("listZones", "nam=x"))

    def test_a_damaged_one_is_fetched_anew_for_help(self):
        path = self.sync()
        self.write(path, open_bytes(path).replace(b'"listZones"', b'"listZones'))
        self.assertIn("listZones", self.good("listZones", "--help", "-q"))
        self.assertEqual(["listApis"], self.asked)

    @unittest.skipUnless(os.name == "posix", "needs a directory that is a file")
    def test_a_cache_that_cannot_be_kept_is_no_reason_to_fail(self):
        """Only --sync, which is asked for nothing else, fails."""
        os.environ["XDG_CACHE_HOME"] = self.write("file", "")
        self.assertIn('"zone"', self.good("listZones"))
        code, out, err = self.main("--sync")
        self.assertEqual((2, ""), (code, out))
        self.assertIn("cache", err)
        for args, part in ((["--list", "zone"], "listZones"), (["listZones", "--help"], "Lists zones")):
            code, out, err = self.main(*args)
            self.assertEqual(0, code, err)
            self.assertIn(part, out)

    def test_a_file_in_whose_place_is_a_directory(self):
        path = self.sync()
        os.unlink(path)
        os.mkdir(path)
        self.assertIn('"zone"', self.good("listZones"))

    def test_an_ordinary_call_never_fetches_it(self):
        for args in (["listZones"], ["listVirtualMachines", "-o", "table", "-c", "nosuch,name"],
                     ["listvirtualmachines"], ["listZones", "--dry-run"], ["--complete=cs listZ"],
                     ["--complete=cs stopVirtualMachine id="]):  # fmt: skip
            self.main(*args)
            self.assertNotIn("listApis", self.asked)
        self.assertFalse(os.path.exists(os.path.join(self.home, ".cache")))
        self.sync()
        with later(400 * 86400):
            self.good("listZones")
        self.assertEqual(["listZones"], self.asked)

    @each("args", ["--sync"], ["--list"], ["listZones", "--help"])
    def test_a_role_without_listApis(self, args):
        self.configure("user")
        self.assertIn('"zone"', self.good("listZones"))
        self.assertIn("name", self.good("listVirtualMachines", "-o", "table"))
        err = self.says(1, *args)
        self.assertIn("listApis", err)
        self.assertNotIn("cs --sync, then", err)  # which is what just failed
        self.assertEqual("\t", self.good("--complete=cs listZ")[:1])  # no word, but what to type

    def test_sync_says_what_it_did(self):
        told = f"{len(COMMANDS)} commands of {self.cloud.endpoint} are now known\n"
        self.assertEqual((0, "", told), self.main("--sync"))
        self.assertEqual((0, "", ""), self.main("--sync", "-q"))

    def test_sync_then_a_command(self):
        code, out, err = self.main("--sync", "listzones", "-q")
        self.assertEqual((0, "", ["listApis", "listZones"]), (code, err, self.asked))

    def test_sync_refreshes(self):
        self.sync_as(("listZones",))
        self.assertIn("no command", self.usage("listVolumes"))
        self.sync()
        self.assertIn("{", self.good("listVolumes"))

    @each("document", {}, {"count": 0, "api": []}, {"count": 1, "api": [{"description": "nameless"}]})
    def test_a_server_without_any_commands_is_an_error_and_keeps_the_old_list(self, document):
        path = self.sync()
        before = open_bytes(path)
        self.reply("listApis", document)
        self.assertIn("listApis", self.says(1, "--sync"))
        self.assertEqual(before, open_bytes(path))

    def test_entries_of_odd_shapes_do_no_harm(self):
        self.reply("listApis", {"count": 9, "api": [
            {"name": "listOdd", "params": None, "response": None, "description": None, "isasync": None},
            {"name": "listOdder", "params": [{}, None, 7, {"name": "x"}], "response": [{}, None, {"name": "a"}]},
            {"name": "listOddest", "params": [{"name": 7, "type": [], "length": "x", "description": {}}]}, {"name": 7},
            {"name": None}, {"name": ["listX"]}, "text", None, {"name": 'a"b'}]})  # fmt: skip
        self.sync()
        for name in ("listOdd", "listOdder", "listOddest"):
            self.assertTrue(self.good(name, "--help").startswith(name + "\n"))
        self.assertIn("listOdder", self.good("--list", "odder"))
        self.assertIn("listOddest", self.good("--complete=cs listO"))
        self.assertIn("ok", self.printed({"ok": True}, "listOdd"))


class CatalogChecksTest(CloudCase):
    """What the server would ignore in silence, or refuse, stops a call before it is sent."""

    def setUp(self):
        super().setUp()
        self.path = self.known()

    def test_an_unknown_command(self):
        err = self.usage("listVirtualMachine")
        self.assertHolds(err, "no command 'listVirtualMachine'", "did you mean listVirtualMachines", "--sync")
        self.assertIn("--force", err)

    def test_a_command_like_no_other(self):
        err = self.usage("zzzzzz")
        self.assertIn("no command 'zzzzzz'", err)
        self.assertNotIn("did you mean", err)

    def test_an_unknown_parameter(self):
        err = self.usage("destroyVirtualMachine", "id=1", "expung=true")
        self.assertHolds(err, "destroyVirtualMachine has no parameter 'expung'; did you mean expunge?", "--sync")
        self.assertIn("--force", err)

    def test_all_that_is_wrong_is_told_at_once(self):
        err = self.usage("deployVirtualMachine", "nam=x", "zone=y", "templateid=t")
        self.assertHolds(err, "'nam'; did you mean name?", "'zone'; did you mean zoneid", "serviceofferingid, zoneid")
        self.assertNotIn("templateid,", err)
        self.assertIn("id, virtualmachineid", self.usage("attachVolume"))

    def test_it_is_told_in_spite_of_quiet(self):
        self.assertIn("no parameter", self.usage("listZones", "nam=x", "-q"))

    def test_names_compare_without_regard_to_case(self):
        self.reply("listZones", {"ok": True}, {"ok": True})
        self.good("listZones", "NAME=x", "Available=true")
        self.good("listZones", "pageSize=5", "PAGE=1")
        self.assertEqual({"pageSize": "5", "PAGE": "1"}, self.sent())

    def test_one_client_may_make_calls_with_and_without_a_job_in_turn(self):
        """A command that starts no job takes no id for one; the next line's may."""
        invocation = cs._Invocation()
        invocation.connect()
        self.addCleanup(invocation.client.close)
        seen = []
        for command in ("updateVirtualMachine", "stopVirtualMachine", "updateVirtualMachine"):
            call = cs._checked_call(invocation, [command, "id=1"])
            seen.append((call.command, invocation.client.get_setting("recover")))
        self.assertEqual([("updateVirtualMachine", False), ("stopVirtualMachine", True),
                          ("updateVirtualMachine", False)], seen)  # fmt: skip

    def test_force_sends_it_all_the_same(self):
        self.printed({"ok": True}, "listZones", "nam=x", "--force")
        self.assertEqual({"nam": "x"}, self.sent())
        self.reply("inventThings", {"ok": True})
        self.good("--force", "inventThings", "a=b")
        self.assertEqual("inventThings", self.asked[-1])
        code, out, err = self.main("startVirtualMachine", "--force")
        self.assertEqual((1, "startVirtualMachine"), (code, self.asked[-1]))

    @each("seconds, old", (29 * 86400, False), (31 * 86400, True), (-86400, True))
    def test_an_old_list_only_warns(self, seconds, old):
        with self.subTest(seconds), later(seconds):
            self.reply("listZones", {"ok": True})
            code, out, err = self.main("listZones", "nam=x")
            self.assertEqual(0 if old else 2, code)
            self.assertHolds(err, "listZones has no parameter 'nam'", "--sync")
            self.assertEqual(old, err.startswith("Warning: "))
            self.cloud._scripts.clear()
        with later(31 * 86400):
            self.reply("listZones", {"ok": True})
            self.assertEqual("", self.main("listZones", "nam=x", "-q")[2])
            self.good("listZones")  # nothing wrong, no warning

    def test_names_of_maps_are_known_by_their_base(self):
        self.reply("listVirtualMachines", {"ok": True}, {"ok": True})
        self.good("listVirtualMachines", "tags[0].key=env", "tags[0].value=prod", "Tags[11].key=x")
        self.good("listVirtualMachines", "details[0].memory=7")
        self.assertHolds(self.usage("listZones", "tagz[0].key=a", "details[0].x=1"), "'tagz[0].key'", "'details[0].x'")

    def test_a_required_map_is_given_by_its_members(self):
        self.reply("createTags", {"success": True})
        self.good("createTags", "resourceids=1", "resourcetype=UserVm", "tags[0].key=a", "tags[0].value=b")
        self.assertIn("createTags needs tags", self.usage("createTags", "resourceids=1", "resourcetype=UserVm"))

    def test_a_required_parameter_without_a_value_is_missing(self):
        self.assertIn("stopVirtualMachine needs id", self.usage("stopVirtualMachine", "id="))
        self.assertIn("stopVirtualMachine needs id", self.usage("stopVirtualMachine", 'ID=""'))
        self.printed({"ok": True}, "listZones", "name=")
        self.assertEqual({"name": ""}, self.sent())

    def test_what_is_only_missing_is_no_matter_for_sync_or_force(self):
        err = self.usage("stopVirtualMachine")
        self.assertEqual("cs: stopVirtualMachine needs id; see cs stopVirtualMachine --help\n", err)
        self.assertHolds(self.usage("stopVirtualMachine", "x=1"), "needs id", "'x'", "--sync", "--force")

    def test_parameters_of_every_call_are_known(self):
        always = "response customjobid page pagesize expires signature signatureversion apikey sessionkey".split()
        for name in always + "ctxuserid ctxaccountid ctxstarteventid".split():
            with self.subTest(name):
                self.printed({"ok": True}, "listZones", name + "=1", "json=false")

    def test_control_arguments_are_known(self):
        self.reply("listZones", {"count": 1, "zone": [{"id": "1"}]})
        self.good("listZones", "fetch_list=true", "fetch_result=false", "json=true")
        self.good("listZones", "opcode_name=command")

    @each("name", "listzones", "LISTZONES", "ListZones")
    def test_a_command_in_another_case(self, name):
        self.good(name)
        self.assertEqual("listZones", self.asked[-1])
        self.assertIn("no parameter 'x'", self.usage("listzones", "x=y"))

    def test_a_case_that_fits_two_commands_is_not_guessed(self):
        self.path = self.sync_as(("listThings",), ("listthingS",))
        self.assertIn("no command", self.usage("LISTTHINGS"))
        self.printed({"ok": True}, "listthingS")

    def test_without_a_list_everything_is_sent(self):
        os.unlink(self.path)
        self.printed({"ok": True}, "inventThings", "nam=x")
        self.assertEqual({"nam": "x"}, self.sent())

    def test_a_dry_run_is_checked_too(self):
        self.assertIn("no parameter", self.usage("listZones", "nam=x", "--dry-run"))
        self.assertIn("nam=x", self.good("listZones", "nam=x", "--dry-run", "--force"))
        self.assertEqual([], self.asked)

    def test_login_and_waiting_need_no_entry(self):
        self.path = self.sync_as(("listZones",))
        self.reply("login", {"sessionkey": "x"})
        self.assertEqual(0, self.main("login", "username=a", "password=b")[0])
        self.reply("queryAsyncJobResult", {"jobid": "j", "jobstatus": 1, "jobresult": {"ok": True}})
        self.assertIn("ok", self.good("--wait", "j"))

    def test_only_what_may_start_a_job_is_given_an_id_for_it(self):
        """By it a lost answer is found again; where the list says that there is no job, nothing is added."""
        cases = [("createSecurityGroup", "name=x", False), ("startVirtualMachine", "id=1", True)]
        for command, word, given in cases + [("inventThings", "--force", True)]:
            with self.subTest(command=command):
                self.reply(command, {"ok": True})
                self.assertEqual(0, self.main(command, word, "-q")[0])
                self.assertEqual(given, "customjobid" in self.cloud.requests[-1].params)
        os.unlink(self.path)
        self.printed({"ok": True}, "createSecurityGroup", "name=x")
        self.assertIn("customjobid", self.cloud.requests[-1].params)

    @each("word", "list.ones", "list[Z]ones=1", ".*=1", "(=1", "\\=1")
    def test_names_that_are_patterns(self, word):
        args = ("listZones", word) if "=" in word else (word,)
        self.assertIn("has no" if "=" in word else "no command", self.usage(*args))


class CommandHelpTest(CloudCase):
    """cs COMMAND --help and cs --list"""

    def test_the_list_is_fetched_once_and_kept(self):
        code, out, err = self.main("listZones", "--help")
        self.assertEqual((0, ["listApis"]), (code, self.asked))
        self.assertTrue(out.startswith("listZones\n  Lists zones.\n"), out)
        self.good("listVolumes", "--help")
        self.good("--list")
        self.assertEqual(["listApis"], self.asked)

    def test_sync_with_help_fetches_it_again(self):
        self.sync()
        self.main("listZones", "--help", "--sync")
        self.main("--list", "--sync")
        self.assertEqual(["listApis", "listApis"], self.asked)

    def test_what_a_command_takes_and_returns(self):
        self.reply("listApis", {"count": 1, "api": [
            {"name": "growThing", "description": "Makes a thing grow.", "isasync": True, "since": "4.2",
             "params": [{"name": "zeal", "type": "string", "length": 255, "required": False, "description": "how much"},
                        {"name": "id", "type": "uuid", "length": 255, "required": True, "description": "the thing"},
                        {"name": "note", "type": "string", "length": 4096, "required": False, "since": "4.9",
                         "description": "why"},
                        {"name": "by", "type": "integer", "length": 255, "required": True, "description": "how far"},
                        {"name": "safe", "type": "boolean", "required": True, "description": "slowly"}],
             "response": [{"name": "id"}, {"name": "nic", "response": [{"name": "ip"}]}, {}]}]})  # fmt: skip
        lines = ["growThing (since 4.2)", "  Makes a thing grow.",
                 "  It starts a job, which is waited for unless --async.", "", "Required:", "  by (integer)  how far",
                 "  id (uuid)  the thing", "  safe (boolean)  slowly", "", "Optional:",
                 "  note (string, at most 4096, since 4.9)  why", "  zeal (string)  how much", "",
                 "Returns: id, nic", "", "Example: cs growThing by=1 id=ID safe=true", ""]  # fmt: skip
        self.assertEqual("\n".join(lines), self.good("growthing", "--help", "-q"))

    def test_the_example_of_every_command_is_one_that_passes_the_checks(self):
        self.sync()
        for name in COMMANDS:
            line = self.good(name, "--help").rstrip("\n").splitlines()[-1]
            self.assertTrue(line.startswith("Example: cs " + name), line)
            words = shlex.split(line[len("Example: cs ") :])
            self.assertTrue(self.good("--dry-run", *words))

    def test_the_example_of_a_map_is_one_that_can_be_sent(self):
        self.sync()
        self.assertRegex(self.good("createTags", "--help").splitlines()[-1], r"tags\[0\]\.")

    def test_options_and_parameters_beside_help_are_no_matter(self):
        self.sync()
        plain = self.good("listZones", "--help")
        for args in (["--help", "listZones"], ["listZones", "name=x", "-h"], ["-o", "table", "listZones", "--help"]):
            self.assertEqual(plain, self.good(*args))
        self.assertEqual([], self.asked)

    @each("name, near", ("listZone", "listZones"), ("nosuch", ""))
    def test_an_unknown_command(self, name, near):
        self.sync()
        self.assertHolds(self.usage(name, "--help"), f"no command {name!r}", near, "--list")

    def test_login_has_no_entry_where_the_server_lists_none(self):
        self.sync_as(("listZones",))
        self.assertIn("'login'", self.usage("login", "--help"))

    @each("columns", 60, 80, 200)
    def test_help_fits_the_terminal(self, columns):
        self.sync()
        code, out, err = self.on_terminal("deployVirtualMachine", "--help", columns=columns)
        self.assertEqual((0, ""), (code, err))
        longest = max(len(line) for line in out.splitlines() if not line.startswith("Example"))
        self.assertLessEqual(longest, columns)

    def test_list(self):
        self.sync()
        lines = self.good("--list").splitlines()
        self.assertEqual((len(COMMANDS), sorted(COMMANDS)), (len(lines), [line.split()[0] for line in lines]))
        for line in lines:
            self.assertIn(COMMANDS[line.split()[0]].description, line)
        self.assertEqual(1, len({re.match(r"\S+ +", line).end() for line in lines}))  # aligned

    def test_list_with_words_gives_what_has_all_of_them_in_name_or_description(self):
        self.sync()
        names = [line.split()[0] for line in self.good("--list", "VOLUME", "attach").splitlines()]
        self.assertEqual(["attachVolume"], names)
        self.assertEqual(self.good("--list", "volume", "attach"), self.good("volume", "--list", "attach"))
        self.assertIn("startVirtualMachine", self.good("--list", "Start"))

    def test_list_of_nothing(self):
        self.sync()
        self.assertIn("zzz", self.fails(1, "--list", "zzz", "name=x"))
        self.assertEqual((1, "", ""), self.main("--list", "zzz", "-q"))

    def test_list_on_a_terminal_is_a_line_each(self):
        self.sync_as(dict(api_entry(("listWide",)), description="宽" * 300),
                     dict(api_entry(("listLong",)), description="word\n" * 90))  # fmt: skip
        code, out, err = self.on_terminal("--list", columns=60)
        self.assertEqual((0, "", 2), (code, err, out.count("\n")))
        for line in out.splitlines():
            self.assertLessEqual(columns_of(line), 60)
        out = self.good("--list")  # not on one, all of it
        self.assertHolds(out, "宽" * 300, "word " * 89)

    def test_what_the_server_sends_is_shown_escaped(self):
        evil = "evil" + EVIL_TITLE + "\x9b2J\u202e"
        entry = api_entry(("listEvil", "a!", "b"))
        entry.update(description=evil, since=evil, response=[{"name": evil}])
        for param in entry["params"]:
            param.update(description=evil, type=evil, since=evil)
        entry["params"].append({"name": evil, "type": "string", "description": "x", "required": True})
        self.sync_as(entry, dict(entry, name="find" + EVIL_TITLE))
        for args in (["listEvil", "--help"], ["--list"], ["listEvil", "c=1"], ["find0pwned"]):
            code, out, err = self.on_terminal(*args)
            self.assertIn("pwned", out + err)
            self.assertEqual([], re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err))


# === [9.5] completion ===============================================================================================


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

    def forget_ids(self):
        folder = os.path.dirname(self.path)
        for name in os.listdir(folder):
            if not self.path.endswith(name):
                os.unlink(os.path.join(folder, name))

    def machine(self, name="web-01"):
        return self.cloud.cloud.named("virtualmachine", name)["id"]


class CompletionTest(CompletionCase):
    def test_commands(self):
        self.assertEqual([["listZones", "Lists zones."]], self.completed("cs listZo"))
        self.assertEqual(sorted(COMMANDS), sorted(self.words("cs ")))
        self.assertEqual(sorted(COMMANDS), sorted(self.words("cs -q --all ")))
        self.assertEqual(["listZones"], self.words("cs -o table listZo"))
        self.assertEqual([], self.words("cs --output=table --region  listZo"))  # a region, not a command
        self.assertEqual([], self.words("cs nosuch"))

    def test_a_command_in_another_case(self):
        self.assertEqual(["listZones"], self.words("cs listzo"))
        self.assertIn("id=", self.words("cs startvirtualmachine "))

    def test_parameters_required_ones_first(self):
        words = self.words("cs deployVirtualMachine ")
        self.assertEqual((["serviceofferingid=", "zoneid="], sorted(words[2:])), (words[:2], words[2:]))
        expected = [["available=", "true for zones that take new machines"]]
        self.assertEqual(expected, self.completed("cs listZones avail"))

    def test_parameters_that_are_given_are_not_offered_again(self):
        words = self.words("cs deployVirtualMachine zoneid=1 NAME=x ")
        self.assertLacks(words, "zoneid=", "name=")
        self.assertIn("templateid=", words)

    def test_booleans(self):
        self.assertEqual(["forced=true", "forced=false"], self.words("cs stopVirtualMachine forced="))
        self.assertEqual(["forced=false"], self.words("cs stopVirtualMachine forced=f"))
        self.assertEqual([], self.words("cs listZones name="))

    def test_options(self):
        words = self.words("cs --")
        self.assertHolds(words, *"--output --region --columns --all --sync --help --configure".split())
        self.assertNotIn("--complete", words)
        self.assertEqual(["--output"], self.words("cs --outp"))
        self.assertEqual(["--color", "--columns"], self.words("cs listZones --col"))

    @each("line, expected", ("cs -o ", list(cs.FORMATS)), ("cs listZones --output t", ["table", "text"]),
          ("cs listZones --output=ta", ["--output=table"]), ("cs --color ", ["auto", "always", "never"]),
          ("cs --completion z", ["zsh"]))  # fmt: skip
    def test_values_of_options(self, line, expected):
        self.assertEqual(expected, self.words(line))

    @each("option", "--timeout", "--retry", "--config", "--endpoint", "--wait", "--theme")
    def test_a_value_that_is_not_known_is_not_completed_as_a_command(self, option):
        self.assertEqual([], self.words(f"cs {option} l"))

    @each("line, expected", ("cs -r ", ["cloudstack", "lab", "lagoon", "local"]),
          ("cs listZones --region lag", ["lagoon"]), ("cs --region=la", ["--region=lab", "--region=lagoon"]))
    def test_regions(self, line, expected):
        self.ini("[cloudstack]\nendpoint = x\n[lab]\n[lagoon]\n[my place]\n[$(touch x)]\n")
        self.write("work/cloudstack.ini", "[local]\n")
        self.assertEqual(expected, self.words(line))
        path = self.write("other.ini", "[elsewhere]\n")
        os.environ["CLOUDSTACK_CONFIG"] = path
        self.assertEqual(["elsewhere"], self.words("cs -r else"))
        os.environ.pop("CLOUDSTACK_CONFIG")
        self.assertEqual(["elsewhere"], self.words(f"cs --config {path} -r else"))

    @each("line, expected", ("cs listVirtualMachines -c instancen", ["instancename"]),
          ("cs listVirtualMachines --columns instancen", ["instancename"]),
          ("cs listVirtualMachines --sort instancen", ["instancename"]),
          ("cs listVirtualMachines --columns=instancen", ["--columns=instancename"]),
          ("cs listVirtualMachines -c id,instancen", ["id,instancename"]),
          ("cs listVirtualMachines --columns=id,instancen", ["--columns=id,instancename"]),
          ("cs listVirtualMachines -c nic.ipa", ["nic.ipaddress"]),
          ("cs -o table listvirtualmachines state=Running -c instancen", ["instancename"]), ("cs -c instancen", []))
    def test_columns(self, line, expected):
        self.assertEqual(expected, self.words(line))

    def test_the_line_chooses_the_region(self):
        user = self.cloud.users["user"]
        self.option(role_lacks=frozenset())
        self.ini(f"[lab]\nendpoint = {self.cloud.endpoint}\nkey = {user.key}\nsecret = {user.secret}\n")
        self.reply("listApis", {"count": 1, "api": [api_entry(("onlyInTheLab", "depth"))]})
        self.good("--sync", "-q", "-r", "lab")
        self.assertEqual(["onlyInTheLab"], self.words("cs -r lab only"))
        self.assertEqual((["depth="], []), (self.words("cs onlyInTheLab --region=lab d"), self.words("cs only")))

    def test_ids_with_names_beside_them(self):
        machine = self.machine()
        self.assertEqual([["id=" + machine, "web-01"]], self.completed("cs stopVirtualMachine id=" + machine[:6]))
        self.assertEqual(["listVirtualMachines"], self.asked)
        rows = self.completed("cs listVolumes virtualmachineid=")
        self.assertIn(["virtualmachineid=" + machine, "web-01"], rows)

    @each("line, command", ("cs deployVirtualMachine zoneid=", "listZones"),
          ("cs deployVirtualMachine templateid=", "listTemplates"),
          ("cs deployVirtualMachine serviceofferingid=", "listServiceOfferings"),
          ("cs deployVirtualMachine networkids=", "listNetworks"), ("cs deployVirtualMachine hostid=", "listHosts"),
          ("cs deleteSnapshot id=", "listSnapshots"), ("cs listVolumes id=", "listVolumes"),
          ("cs attachVolume id=", "listVolumes"), ("cs activateProject id=", "listProjects"),
          ("cs createTags resourceids=", None), ("cs listZones id=", "listZones"))  # fmt: skip
    def test_which_list_gives_the_ids(self, line, command):
        self.forget_ids()
        del self.cloud.requests[:]
        words = self.words(line)
        self.assertEqual([command] if command else [], self.asked)
        if command not in (None, "listSnapshots"):
            self.assertRegex(words[0], r"\A\w+=[0-9a-f-]{36}\Z")

    def test_several_ids(self):
        first, second = self.machine("web-01"), self.machine("db-01")
        line = f"cs listVirtualMachines ids={first},{second[:6]}"
        self.assertEqual([f"ids={first},{second}"], self.words(line))

    def test_the_beginning_of_a_name_does_for_an_id(self):
        web, db = self.machine("web-01"), self.machine("db-01")
        self.addCleanup(self.cloud.cloud.named("virtualmachine", "db-01").update, displayname="db-01")
        self.cloud.cloud.named("virtualmachine", "db-01").update(displayname="Database:1")
        for line, expected in (
            ("cs stopVirtualMachine id=web-01", [["id=" + web, "web-01"]]),
            ("cs stopVirtualMachine id=WEB-01", [["id=" + web, "web-01"]]),
            ("cs stopVirtualMachine id=db-01", [["id=" + db, "db-01"]]),
            ("cs stopVirtualMachine id=Data", [["id=" + db, "Database:1"]]),
            ("cs listVirtualMachines ids={},web-01".format(db), [["ids={},{}".format(db, web), "web-01"]]),
            ("cs stopVirtualMachine id=name:web-01", [["id=name:web-01", web]]),
            ("cs stopVirtualMachine id=name:dat", [["id=name:Database:1", db]]),
            ("cs listVirtualMachines ids=name:x,name:db", [["ids=name:x,name:db-01", db]]),
        ):  # fmt: skip
            with self.subTest(line):
                shown = [pair for pair in self.completed(line) if line[-5:] != "name:db" or "01" in pair[0]]
                self.assertIn(expected[0], shown)
                if "ids=name" not in line:
                    self.assertEqual(shown, expected)
        both = self.words("cs stopVirtualMachine id=d")  # an id that begins so, and names
        self.assertLessEqual({"id=" + db}, set(both))
        self.assertEqual(len(both), len(set(both)))
        self.assertEqual(self.asked, ["listVirtualMachines"])

    def test_ids_are_remembered_for_a_minute(self):
        line = "cs stopVirtualMachine id=" + self.machine()[:6]
        now = time.time()
        with mock.patch("time.time", lambda: now):
            expected = self.words(line)
            self.assertEqual((1, expected), (len(expected), self.words(line)))
            self.assertEqual(expected, self.words("cs startVirtualMachine id=" + self.machine()[:6]))
        self.assertEqual(["listVirtualMachines"], self.asked)
        for moved, times in ((59, 1), (61, 2)):
            with mock.patch("time.time", lambda moved=moved: now + moved):
                self.assertEqual(expected, self.words(line))
            self.assertEqual(["listVirtualMachines"] * times, self.asked)

    @unittest.skipUnless(os.name == "posix", "needs file modes")
    def test_remembered_ids_are_private_too(self):
        self.words("cs stopVirtualMachine id=")
        folder = os.path.dirname(self.path)
        self.assertEqual(2, len(os.listdir(folder)))
        for name in os.listdir(folder):
            self.assertEqual(0o600, os.stat(os.path.join(folder, name)).st_mode & 0o777)

    def test_damaged_remembered_ids_are_asked_for_again(self):
        line = "cs stopVirtualMachine id=" + self.machine()[:6]
        expected = self.words(line)
        folder = os.path.dirname(self.path)
        path = next(os.path.join(folder, name) for name in os.listdir(folder) if not self.path.endswith(name))
        now = str(int(time.time()))
        for content in (b"", b"{", b"[]", b"7", b"{}", b"\xff", b"[" * 100000, b'{"at": "now", "rows": []}',
                        f'{{"at": {now}, "rows": [1]}}'.encode(), f'{{"at": {now}, "rows": [[1, 2]]}}'.encode(),
                        f'{{"at": {now}, "rows": 7}}'.encode(), f'{{"at": {now}}}'.encode()):  # fmt: skip
            with self.subTest(content[:30]):
                self.write(path, content)
                self.assertEqual(expected, self.words(line))

    def test_all_but_ids_comes_from_what_is_cached(self):
        self.ini("[lab]\n")
        lines = "cs |cs list|cs deployVirtualMachine |cs stopVirtualMachine forced=|cs -r |cs -o |cs --"
        for line in lines.split("|") + ["cs listVirtualMachines -c ", "cs listVirtualMachines name="]:
            self.assertTrue(self.words(line) or line.endswith("name="), line)
        self.assertEqual([], self.asked)

    def test_without_a_list_options_and_regions_are_completed_all_the_same(self):
        os.unlink(self.path)
        self.ini("[lab]\n")
        for line in ("cs listZo", "cs stopVirtualMachine id=", "cs listZones -c na"):  # no word, but what to type
            self.assertEqual(self.completed(line), [["", "to have commands completed, type: cs --sync"]])
        self.assertEqual(self.words("cs --endpoint http://cloud.invalid/$(x) listZo"), [""])
        self.assertEqual(self.words("cs -r la"), ["lab"])
        self.assertEqual(self.words("cs --outp"), ["--output"])
        self.unset("endpoint", "key", "secret")
        self.assertEqual(([], ["lab"], []), (self.words("cs listZo"), self.words("cs -r la"), self.asked))

    @each("settings", {"timeout": "abc"}, {"endpoint": "nonsense"}, {"secret": ""}, {"config": "/no/such/file"},
          {"username": "x"}, {"verify": "/no/such/file"}, {"dangerous_no_tls_verify": "nope"})  # fmt: skip
    def test_a_configuration_that_cannot_be_used_gives_nothing(self, settings):
        with mock.patch.dict(os.environ):
            self.configure(**settings)
            for line in ("cs listZo", "cs stopVirtualMachine id=", "cs listZones -c na", "cs -r x"):
                self.main("--complete=" + line)  # whatever comes of it, no traceback

    def test_a_server_that_fails_gives_nothing(self):
        html = Answer(200, "<html>" + EVIL_TITLE)
        things = [1, None, "x", [2], {"id": 7}, {"id": None}]
        for name, step in (("an error", Answer(431, {"r": {"errorcode": 431, "errortext": "no"}})), ("a page", html),
                           ("dropped", DROP), ("no list", Answer(200, {"r": {"success": True}})),
                           ("a list of other things", Answer(200, {"r": {"count": 6, "x": things}})),
                           ("nothing", Answer(200, {"r": {}})),
                           ("rate limit", Answer(429, {"r": {"errorcode": 429, "errortext": "retry after 9000 ms"}}))):
            with self.subTest(name):
                self.configure(retry="3")
                del self.cloud.requests[:]
                self.cloud.script("listVirtualMachines", step)
                self.assertEqual(([], ["listVirtualMachines"]), (self.words("cs stopVirtualMachine id="), self.asked))
                self.forget_ids()

    def test_a_server_that_hangs_gives_nothing_soon(self):
        self.assertLessEqual(cs._PATIENCE_AT_A_KEY, 1)  # to connect, and once more for the answer
        release = threading.Event()
        self.addCleanup(release.set)

        def hang(_):
            release.wait(10)
            return DROP

        self.configure(timeout="10", retry="3")
        self.cloud.script("listVirtualMachines", hang)
        with mock.patch.object(cs, "_PATIENCE_AT_A_KEY", 0.1):
            self.assertEqual([], self.words("cs stopVirtualMachine id="))
        self.assertFalse(release.is_set())
        self.assertEqual(["listVirtualMachines"], self.asked)

    def test_a_log_in_that_fails_is_not_tried_again(self):
        self.unset("key", "secret")
        self.configure(username="admin", password="x", domain="/", retry="3")
        self.sync_anonymously()
        busy = Answer(503, {"loginresponse": {"errorcode": 503, "errortext": "busy"}})
        self.cloud.script("login", busy, busy, busy, busy)
        self.assertEqual(([], ["login"]), (self.words("cs stopVirtualMachine id="), self.asked))

    def sync_anonymously(self):
        """The list of commands for whoever the environment says, without asking."""
        other = cs._cache_path(cs.CloudStack(**cs.read_config()))
        shutil.copy(self.path, other)
        self.path = other

    def test_ids_with_a_user_name(self):
        user = self.cloud.users["admin"]
        self.unset("key", "secret")
        self.configure(username="admin", password=user.password, domain=user.domain)
        self.sync_anonymously()
        machine = self.machine()
        self.assertEqual(["id=" + machine], self.words("cs stopVirtualMachine id=" + machine[:6]))
        self.assertEqual(["login", "listVirtualMachines"], self.asked[:2])

    HOSTILE = ("$(touch pwned)", "`touch pwned`", "$HOME", "; touch pwned", "a b", "a\nb", "a\tb", "'", '"', "a'b",
               "\\", "~", "~root", "*", "?", "{a,b}", "a|b", "a&b", "<x", ">x", "(a)", "!x", "#x", "^x", "a\x00b",
               "\x1b[2J", "\x9b2J", "\u202eabc", "ü", "\ud800", "", " ", "x" + EVIL_TITLE)  # fmt: skip

    def test_no_word_is_offered_that_a_shell_could_evaluate(self):
        safe = re.compile(r"[A-Za-z0-9_.,:/@%+=\[\]-]+\Z")
        entries = [dict(api_entry((name, "id")), description=name) for name in self.HOSTILE if name]
        params = ["id!"] + [name + "id" for name in self.HOSTILE]
        entry = api_entry(["stopVirtualMachine"] + params)
        entry["response"] = [{"name": name} for name in self.HOSTILE]
        self.path = self.sync_as(entry, ("listVirtualMachines",), *entries)
        rows = [{"id": name, "name": name} for name in self.HOSTILE]
        rows += [{"id": f"good-{number}", "name": name} for number, name in enumerate(self.HOSTILE)]
        self.ini("".join(f"[{name}]\n" for name in self.HOSTILE if name.strip() and name.isprintable()))
        self.reply("listVirtualMachines", {"count": len(rows), "virtualmachine": rows})
        stop = "cs stopVirtualMachine "
        for line in ("cs ", stop, stop + "id=", stop + "-c ", "cs -r "):
            with self.subTest(line):
                out = self.good("--complete=" + line)
                for row in out.splitlines():
                    self.assertRegex(row.split("\t")[0], safe)
                    self.assertLess(row.count("\t"), 2)
                self.assertEqual([], re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out))
        self.assertEqual(len(self.HOSTILE), len(self.words("cs stopVirtualMachine id=good")))

    @each("line", "cs $(touch pwned) list", "cs `touch pwned` ", "cs -r $(touch pwned) list",
          "cs listZones id=$(touch pwned", "cs listZones name='", 'cs listZones name="a b', "cs listZones -c $(x),",
          "cs \\", "cs -c", "cs -r", "cs -", "cs --=", "cs --output=", "cs --nosuch=", "cs --nosuch x ",
          "cs -o nonsense list", "", "cs", " ", "cs\t", "cs\nlistZ", "cs -- list", "cs =", "cs listZones =",
          "cs listZones =x", "cs --complete=x ", "cs listZones \x1b[2J", "cs listZones \udcff=", "cs --help l",
          "cs --config @ l", "cs " + "x" * 100000, "cs listVirtualMachines tags[0].", "cs listVirtualMachines ids=,,",
          "cs \u00fc", "cs -r '", "cs --sort")  # fmt: skip
    def test_what_stands_on_the_line_is_never_evaluated(self, line):
        code, out, err = self.main("--complete=" + line)
        self.assertEqual([], re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out))
        self.assertIn(code, (0, 2))
        self.assertEqual([], os.listdir(self.cwd))

    def test_long_descriptions_are_cut(self):
        self.path = self.sync_as(dict(api_entry(("listLong",)), description="word " * 1000))
        self.assertLessEqual(len(self.completed("cs listL")[0][1]), 80)

    def test_the_scripts(self):
        for shell in ("bash", "zsh", "fish"):
            script = self.good("--completion", shell)
            self.assertIn("--complete=", script)
            self.assertLacks(script, "eval ", "compgen", "-W", "print -P")
        self.assertEqual([], self.asked)
        self.usage("--completion", "tcsh")


def have_terminals():
    return hasattr(termios, "TIOCSWINSZ") and os.path.isdir("/proc")


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
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        data = b"x"
        while data:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux says so that the other end is closed
                data = b""
            with self.news:
                self.output += data
                self.news.notify_all()

    @property
    def text(self):
        with self.news:
            return self.output.decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_for(self, *words):
        """Wait until one of these was written after what was waited for before."""
        found = []

        def there():
            found[:] = [word for word in words if word in self.output[self.at :]]
            return found

        with self.news:
            if not self.news.wait_for(there, 20):
                raise AssertionError(f"{words} was not written: {self.output}")
            self.at = self.output.index(found[0], self.at) + len(found[0])
        return found[0]

    at = 0

    def type(self, text):
        os.write(self.master, text.encode("utf-8"))

    def end(self):
        """The exit code; all output is in text then."""
        code = self.child.wait()
        os.close(self.slave)  # only now: a terminal that nobody has opened yet would seem closed
        self.reader.join(10)
        return code

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
class ShellCompletionCase(CompletionCase):
    """Real shells. Their `cs` completes by cs.py, and notes what else it is called with."""

    def setUp(self):
        super().setUp()
        os.mkdir(os.path.join(self.home, "bin"))
        self.write("bin/cs", STUB.format(python=shlex.quote(sys.executable), cs=shlex.quote(CS_PATH)), 0o755)
        path = os.path.join(self.home, "bin") + os.pathsep + os.environ["PATH"]
        self.env = dict(os.environ, PATH=path, TERM="xterm", LC_ALL="C.UTF-8", PS1="$ ", FISH_UNIT_TESTS_RUNNING="1")
        self.ini("[lab]\nendpoint = http://cloud.invalid/\n[lagoon]\n[$(touch pwned)]\n")

    def shell(self, name):
        found = shutil.which(name)
        if found is None:
            self.skipTest(f"{name} is not installed")
        return found

    def start(self, argv, *setup):
        shell = self.on_pty(argv, self.env)
        for line in setup + ('printf "REA%s\\n" DY',):
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
            time.sleep(0.005)
        words = open_bytes(path).decode("utf-8").split("\n")[:-1]
        os.unlink(path)
        return words

    def assertCompletes(self, shell):
        """What every shell must do."""
        machine = self.machine()
        for line, expected in (("cs deployV\t templ\tx", ["deployVirtualMachine", "templateid=x"]),
                               (f"cs stopVirtualMachine forced=f\t id={machine[:6]}\t",
                                ["stopVirtualMachine", "forced=false", "id=" + machine]),
                               ("cs listZones -r lag\t --output=ta\t", ["listZones", "-r", "lagoon", "--output=table"]),
                               ("true; A=1 cs listZones -c internald\t", ["listZones", "-c", "internaldns1"]),
                               ("cs stopVirtualMachine id=web-01\t", ["stopVirtualMachine", "id=" + machine]),
                               ("cs stopVirtualMachine id=name:web-01\t", ["stopVirtualMachine", "id=name:web-01"])):
            self.assertEqual(expected, self.typed(shell, line))

    def hostile(self):
        """Machines and commands with names that would like to be evaluated."""
        names = ("$(touch pwned)", "`touch pwned`", "x;touch pwned", "a' b", 'a" b', "%F{red}%(?..)", EVIL_TITLE)
        names += ("..", "é")
        rows = [{"id": f"good-{letter}-{letter}", "name": name} for letter, name in zip("abcdefghi", names)]
        rows += [{"id": name, "name": "bad"} for name in names]
        self.path = self.sync_as(("stopVirtualMachine", "id!"), ("listVirtualMachines",), *[(name,) for name in names])
        self.reply("listVirtualMachines", {"count": len(rows), "virtualmachine": rows})

    def assertUnharmed(self, shell):
        """Nothing was evaluated, and no escape sequence of the server's reached the terminal."""
        self.assertFalse([name for name in os.listdir(self.cwd) if name.startswith("pwned")])
        self.assertFalse([name for name in os.listdir(self.home) if name.startswith("pwned")])
        self.assertNotIn(EVIL_TITLE, shell.text)


    def assertAdvises(self, start):
        """Without a list of commands what to type is shown, and nothing is put on the line."""
        os.unlink(self.path)
        shell = start()
        shell.type("cs listZ\t\t")
        shell.wait_for(b"type: cs --sync")
        self.assertEqual(self.typed(shell, ""), ["listZ"])


    def assertShowsRequiredFirst(self, shell):
        shell.type("cs deployVirtualMachine \t")
        for word in (b"serviceofferingid=", b"zoneid=", b"account="):
            shell.wait_for(word)


class BashCompletionTest(ShellCompletionCase):
    def bash(self):
        argv = [self.shell("bash"), "--norc", "--noprofile", "-i"]
        quick = "bind 'set enable-bracketed-paste off' 'set show-all-if-ambiguous on'"
        return self.start(argv, quick, 'eval "$(cs --completion bash)"')

    def test_it_completes(self):
        self.assertCompletes(self.bash())

    def test_nothing_is_evaluated(self):
        self.hostile()
        shell = self.bash()
        shell.type("cs \t")
        shell.wait_for(b"stopVirtualMachine")
        shell.type("stopVirtualMachine id=\t")
        shell.wait_for(b"good-i-i")
        self.assertEqual(["stopVirtualMachine", "id=good-c-c"], self.typed(shell, "good-c\t"))
        self.assertUnharmed(shell)

    def test_what_to_type_without_a_list(self):
        self.assertAdvises(self.bash)

    def test_required_parameters_come_first(self):
        self.assertShowsRequiredFirst(self.bash())

    def test_names_are_shown_and_what_was_typed_stays(self):
        shell = self.bash()
        shell.type("cs stopVirtualMachine id=web-0\t")
        shell.wait_for((self.machine("web-01") + "  web-01").encode())
        self.assertEqual(self.typed(shell, "1\t"), ["stopVirtualMachine", "id=" + self.machine()])

    def test_descriptions_are_never_put_on_the_line(self):
        """Only where words are listed: not where one after the other is put there, or all."""
        self.write("script", self.good("--completion", "bash"))
        program = """
            source "$HOME/script"; COMP_LINE="cs stopVirtualMachine id=web-0" COMP_POINT=${#COMP_LINE}
            COMP_WORDBREAKS=' =:' COMP_WORDS=(cs) COMP_CWORD=0 COMP_TYPE=$1
            _cs_complete; printf '%s\\n' "${COMPREPLY[@]}"
        """
        for kind, described in ((9, False), (37, False), (42, False), (63, True), (33, True), (64, True)):
            code, out, err = Child([self.shell("bash"), "-c", program, "bash", str(kind)], env=self.env).finish()
            self.assertEqual((b"web-01" in out, code), (described, 0), err)
            self.assertIn(self.machine().encode(), out)

    def test_a_word_is_taken_apart_or_not(self):
        """The script must do with and without `=` among the characters that end a word."""
        self.shell("bash")
        self.write("script", self.good("--completion", "bash"))
        program = """
            source "$HOME/script"; COMP_LINE="cs stopVirtualMachine forced=t" COMP_POINT=${#COMP_LINE}
            COMP_WORDBREAKS=' =:' COMP_WORDS=(cs stopVirtualMachine forced = t) COMP_CWORD=4
            _cs_complete; printf '%s\\n' "${COMPREPLY[@]}"
            COMP_WORDBREAKS=' :' COMP_WORDS=(cs stopVirtualMachine forced=t) COMP_CWORD=2
            _cs_complete; printf '%s\\n' "${COMPREPLY[@]}"
        """
        code, out, err = Child(["bash", "-c", program], env=self.env).finish()
        self.assertEqual((0, ["true", "forced=true"]), (code, out.decode().split()), err)


class ZshCompletionTest(ShellCompletionCase):
    def zsh(self):
        argv = [self.shell("zsh"), "-f", "-i"]
        os.mkdir(os.path.join(self.home, "functions"))
        self.write("functions/_cs", self.good("--completion", "zsh"))
        # compinit reads the head of every function it finds; those of other programs are of no interest here.
        functions = 'fpath=("$HOME/functions" ${fpath:#*/Completion/(^(Base|Zsh))})'
        begin = 'autoload -U compinit; compinit -u -d "$HOME/dump"'
        return self.start(argv, "PS1='$ '; setopt extendedglob; unsetopt prompt_sp", functions, begin)

    def test_it_completes(self):
        self.assertCompletes(self.zsh())

    def test_nothing_is_evaluated(self):
        self.hostile()
        shell = self.zsh()
        shell.type("cs stopVirtualMachine id=good-\t\t")
        shell.wait_for(b"%F{red}%(?..)")
        shell.type("\x15")
        self.assertEqual(["stopVirtualMachine", "id=good-c-c"], self.typed(shell, "cs stopVirtualMachine id=good-c\t"))
        self.assertIn("$(touch pwned)", shell.text)
        self.assertUnharmed(shell)


    def test_what_to_type_without_a_list(self):
        self.assertAdvises(self.zsh)

    def test_required_parameters_come_first(self):
        self.assertShowsRequiredFirst(self.zsh())

    def test_names_are_shown_and_what_was_typed_stays(self):
        shell = self.zsh()
        shell.type("cs stopVirtualMachine id=web-0\t")
        shell.wait_for((self.machine("web-01") + "  -- web-01").encode())
        self.assertEqual(self.typed(shell, "1\t"), ["stopVirtualMachine", "id=" + self.machine()])


class FishCompletionTest(ShellCompletionCase):
    def setUp(self):
        super().setUp()
        self.fish = self.shell("fish")
        os.makedirs(os.path.join(self.home, ".config", "fish", "completions"))
        self.write(".config/fish/completions/cs.fish", self.good("--completion", "fish"))

    def test_it_completes(self):
        self.assertCompletes(self.start([self.fish, "-i"]))

    def test_what_to_type_without_a_list(self):
        self.assertAdvises(lambda: self.start([self.fish, "-i"]))

    def test_required_parameters_come_first(self):
        program = 'complete -C "cs deployVirtualMachine " | head -n 3'
        code, out, err = Child([self.fish, "-c", program], env=self.env).finish()
        words = [line.partition(b"\t")[0] for line in out.splitlines()]
        self.assertEqual(words, [b"serviceofferingid=", b"zoneid=", b"account="], err)

    def test_nothing_is_evaluated(self):
        """By the shell's own command for it."""
        self.hostile()
        program = 'complete -C "cs stopVirtualMachine id="; complete -C "cs "'
        code, out, err = Child([self.fish, "-c", program], env=self.env).finish()
        self.assertEqual(0, code, err)
        out = out.decode("utf-8")
        self.assertHolds(out, "id=good-a-a\t$(touch pwned)\n", "id=good-c-c\t")
        self.assertIn("stopVirtualMachine\tDoes stopVirtualMachine.\n", out)
        self.assertNotIn("\x1b", out)
        self.assertFalse([name for name in os.listdir(self.cwd) + os.listdir(self.home) if name.startswith("pwned")])


# === [9.3] formats ==================================================================================================


class FormatsTest(CloudCase):
    ROWS = [{"id": "1", "name": "web", "size": 9, "on": True,
             "tags": [{"key": "a", "value": "1"}, {"key": "b", "value": "2"}],
             "nic": [{"ipaddress": "10.0.0.1"}, {"ipaddress": "10.0.0.2"}]},
            {"id": "2", "name": 'x"y,z', "size": 10, "on": False, "nic": []},
            {"id": "3", "name": "tab\there\nline\\end\r", "size": None, "details": {"a": {"b": 1}}}]  # fmt: skip

    def rows(self, *rows, **more):
        """The rows that listThings answers with, once for each `times`."""
        rows = list(rows) or self.ROWS
        for _ in range(more.get("times", 1)):
            self.reply("listThings", {"count": len(rows), "thing": rows})

    def shown(self, *args):
        return self.good("listThings", *args)

    def test_the_option_beats_the_environment_beats_the_ini_file(self):
        self.rows({"id": "1"}, times=6)
        self.assertEqual({"count": 1, "thing": [{"id": "1"}]}, json.loads(self.shown()))
        user = self.cloud.users["admin"]
        text = "[{}]\nendpoint = {}\nkey = {}\nsecret = {}\noutput = {}\n"
        keys = (self.cloud.endpoint, user.key, user.secret)
        text = text.format("cloudstack", *keys + ("csv",)) + text.format("lab", *keys + ("text",))
        self.ini(text)
        self.unset("endpoint", "key", "secret")
        self.assertEqual(("id\r\n1\r\n", "1\n"), (self.shown(), self.shown("-r", "lab")))
        self.configure("admin", output="Table")
        self.assertEqual(("id\n1\n", '{"id": "1"}\n'), (self.shown(), self.shown("-o", "jsonl")))
        self.assertEqual("id\r\n1\r\n", self.shown("--output=CSV"))

    def test_a_bad_value_is_told_before_anything_is_sent(self):
        self.assertIn("xml", self.usage("listZones", "-o", "xml"))
        self.usage("listZones", "-o")
        self.usage("listZones", "--output=")
        self.configure(output="xml")
        for args in (["listZones"], ["--wait", "1"], ["--sync"], ["--list"]):
            err = self.usage(*args)
            self.assertIn("output: 'xml'", err)
            self.assertHolds(err, *cs.FORMATS)
        self.rows({"id": "1"})
        self.assertEqual("1\n", self.shown("-o", "text"))  # what the option says, the setting need not

    def test_json(self):
        self.rows()
        self.assertEqual({"count": 3, "thing": self.ROWS}, json.loads(self.shown("-o", "json")))

    def test_jsonl_is_a_row_a_line(self):
        self.rows()
        lines = self.shown("-o", "jsonl").split("\n")
        self.assertEqual((self.ROWS, ""), ([json.loads(line) for line in lines[:-1]], lines[-1]))

    def test_csv_is_read_back_by_the_csv_module(self):
        self.rows()
        read = list(csv.reader(io.StringIO(self.shown("-o", "csv"), newline="")))
        self.assertEqual(["id", "name"], read[0][:2])
        self.assertEqual(sorted({key for row in self.ROWS for key in row}), sorted(read[0]))
        for row, line in zip(self.ROWS, read[1:]):
            cells = dict(zip(read[0], line))
            self.assertEqual((row["id"], row["name"]), (cells["id"], cells["name"]))
            for name in ("tags", "details"):
                if name in row:
                    self.assertEqual(row[name], json.loads(cells[name]))
        cells = dict(zip(read[0], read[1]))
        self.assertEqual(("9", "true", ""), (cells["size"], cells["on"], cells["details"]))

    def test_csv_is_what_RFC_4180_says(self):
        """Lines end in CRLF, the last one too; quotes where they are needed, and doubled inside; line breaks stay."""
        self.rows({"id": "1", "name": 'a"b'}, {"id": "x,y", "name": "l1\nl2"}, {"id": "p q", "name": ""})
        self.assertEqual('id,name\r\n1,"a""b"\r\n"x,y","l1\nl2"\r\np q,\r\n', self.shown("-o", "csv"))

    def test_text_is_values_between_tabs_and_is_read_back(self):
        self.rows()
        lines = self.shown("-o", "text", "-c", "id,name,size,on,nosuch", "-q").split("\n")
        self.assertEqual("", lines.pop())

        def read(cell):
            return re.sub(r"\\(.)", lambda found: {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}[found.group(1)], cell)

        cells = [[read(cell) for cell in line.split("\t")] for line in lines]
        expected = [[row["id"], row["name"], "" if row["size"] is None else str(row["size"])] for row in self.ROWS]
        self.assertEqual(expected, [row[:3] for row in cells])
        self.assertEqual([["true", ""], ["false", ""], ["", ""]], [row[3:] for row in cells])

    def test_text_of_a_shell_s_read(self):
        """An empty cell in the middle is still a cell, and each row a line."""
        self.rows({"id": "1", "name": "", "state": "up"})
        self.assertEqual("1\t\tup\n", self.shown("-o", "text", "-c", "id,name,state"))

    def test_a_table_without_a_terminal_is_never_cut(self):
        long = "x" * 3000
        self.rows({"id": "1", "name": long, "state": "Running"}, {"id": "22", "name": "n", "state": "宽"})
        with mock.patch.dict(os.environ, COLUMNS="40"):
            lines = self.shown("-o", "table").split("\n")
        self.assertEqual(("id  name" + " " * 2998 + "state", "1   " + long + "  Running"), (lines[0], lines[1]))
        self.assertEqual(("22  n" + " " * 3001 + "宽", ""), (lines[2], lines[3]))

    def test_objects_and_job_results(self):
        """What stands inside is shown, in every format."""
        machine = {"id": "1", "name": "web", "state": "Running"}
        for name, documents in (
            ("an object", [("getThing", {"thing": machine})]), ("a bare object", [("getThing", machine)]),
            ("a job", [("getThing", {"jobid": "j"}),
                       ("queryAsyncJobResult", {"jobid": "j", "jobstatus": 1, "jobresult": {"thing": machine}})])):
            with self.subTest(name):
                for shape, expected in (("table", "id  name  state\n1   web   Running\n"),
                                        ("csv", "id,name,state\r\n1,web,Running\r\n"), ("text", "1\tweb\tRunning\n"),
                                        ("jsonl", '{"id": "1", "name": "web", "state": "Running"}\n')):  # fmt: skip
                    for command, document in documents:
                        self.reply(command, document)
                    self.assertEqual(expected, self.good("getThing", "-o", shape))
        self.reply("queryAsyncJobResult", {"jobid": "j", "jobstatus": 1, "jobresult": {"thing": machine}})
        self.assertEqual("web\n", self.good("--wait", "j", "-o", "text", "-c", "name"))

    def test_a_table_of_a_job_s_result_shows_the_thing_and_not_the_job(self):
        machine = {"id": "1", "name": "web", "jobid": "j", "jobstatus": 0, "ipaddress": "10.0.0.1",
                   "nic": [{"ipaddress": "10.0.0.1"}]}  # fmt: skip
        self.reply("startThing", {"jobid": "j", "id": "1"})
        self.reply("queryAsyncJobResult", {"jobid": "j", "jobstatus": 1, "jobresult": {"thing": machine}})
        self.assertEqual("id  name  nic.ipaddress\n1   web   10.0.0.1\n", self.good("startThing", "-o", "table"))
        self.reply("startThing", {"jobid": "j", "id": "1"})
        self.assertEqual("id  jobid\n1   j\n", self.good("startThing", "-o", "table", "--async"))
        job = {"jobid": "j", "jobstatus": 0, "cmd": "x.StartVMCmd"}
        self.reply("listAsyncJobs", {"count": 1, "asyncjobs": [job]})
        self.assertEqual("j\t0\tx.StartVMCmd\n", self.good("listAsyncJobs", "-o", "text"))
        self.reply("getThing", {"thing": machine})
        self.assertIn("ipaddress", self.good("getThing", "-o", "csv").split("\r\n")[0].split(","))

    @each("document", {"success": True}, {"success": "true", "displaytext": ""})
    @each("shape", "table", "csv", "text")
    def test_an_answer_that_only_says_success(self, document, shape):
        self.assertIn("true", self.printed(document, "deleteThing", "-o", shape))

    @each("shape", *cs.FORMATS)
    def test_a_job_that_is_not_waited_for_shows_its_id_in_every_format(self, shape):
        self.assertIn("job-77", self.printed({"jobid": "job-77"}, "startThing", "--async", "-o", shape))

    @each("shape, expected", ("table", "value\na\n7\n"), ("csv", "value\r\na\r\n7\r\n"), ("text", "a\n7\n"),
          ("jsonl", '"a"\n7\n'))  # fmt: skip
    def test_a_list_of_plain_values(self, shape, expected):
        self.rows("a", 7)
        self.assertEqual(expected, self.shown("-o", shape))

    @each("document", {}, {"count": 0}, {"count": 0, "thing": []})
    @each("shape", "table", "csv", "text", "jsonl")
    def test_empty_lists_print_nothing_but_json_s_own(self, document, shape):
        self.reply("listThings", document)
        self.assertEqual("", self.shown("-o", shape))
        self.reply("listThings", document)
        expected = "id\r\n" if shape == "csv" else ""
        self.assertEqual(expected, self.shown("-o", shape, "-c", "id", "--sort", "name"))

    @each("document", {}, {"count": 0}, {"count": 0, "thing": []})
    @each("args", (), ("--all",))
    def test_csv_of_an_empty_list_keeps_the_header_that_was_asked_for(self, document, args):
        self.reply("listThings", document)
        self.assertEqual("id,nic.0.ip\r\n", self.shown("-o", "csv", "-c", "id,nic.0.ip", *args))

    @each("rows", [{}], [{}, {"id": "1"}], [None], [[]], [[1, [2, [3]]]],
          [{"id": 1}, "text", None, [1], {"name": "n"}, 7.5], [{"id": {"id": {"id": 1}}}], [{"": "nameless"}],
          [{"id": "a\0b"}], [{"a.b": 1, "a": {"b": 2}}], [{"id": 10**400}], [{"id": 1e308}], [{"id": -0.0}],
          [{"name": "\u202e\u200b\ud7ff\uffff"}], [{f"n{number}": number for number in range(500)}],
          [{"value": [None, True, {"x": 1}]}])  # fmt: skip
    @each("shape", *cs.FORMATS)
    def test_odd_rows_do_no_harm(self, rows, shape):
        self.rows(*rows, times=2)
        self.shown("-o", shape, "-c", "id,a.b,name.0.x", "--sort", "-id", "-q")
        code, out, err = self.on_terminal("listThings", "-o", shape, "--sort", "name", "-q", columns=20)
        self.assertEqual((0, ""), (code, err))

    @each("depth", 300, 900)
    @each("opening, closing", ("[", "]"), ('{"a":', "}"))
    @each("shape", *cs.FORMATS)
    def test_rows_nested_as_deep_as_json_is_read_do_no_harm(self, depth, opening, closing, shape):
        """Whatever can be read can be shown, or is an error; never a traceback."""
        deep = opening * depth + '"leaf"' + closing * depth
        body = '{"r":{"count":1,"thing":[{"id":"1","name":' + deep + "}]}}"
        self.cloud.script("listThings", Answer(200, body, {"Content-Type": "application/json"}))
        code, out, err = self.main("listThings", "-o", shape, "-c", "id,name")
        self.assertIn(code, (0, 1))
        self.assertIn("leaf" if code == 0 else "CloudStack error", out + err)

    def test_null_bytes_and_surrogates(self):
        body = r'{"r":{"count":1,"thing":[{"id":"a\u0000b","name":"x\ud800y"}]}}'
        for shape in cs.FORMATS:
            self.cloud.script("listThings", Answer(200, body, {"Content-Type": "application/json"}))
            self.shown("-o", shape)
        self.cloud.script("listThings", Answer(200, body, {"Content-Type": "application/json"}))
        result = self.cs("listThings", "-o", "csv")
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        self.assertEqual(b"id,name\r\na\0b,x\\ud800y\r\n", result.raw.replace(b'"', b""))  # quoted before 3.11

    @each("shape", "table", "jsonl")
    def test_non_ascii_on_an_ascii_standard_output(self, shape):
        self.rows({"id": "1", "name": "zürich 宽"})
        result = self.cs("listThings", "-o", shape, env={"PYTHONIOENCODING": "ascii"})
        self.assertEqual((0, ""), (result.returncode, result.stderr))
        self.assertIn(b"rich", result.raw)
        if shape.startswith("json"):
            self.assertIn("zürich 宽", json.dumps(json.loads(result.stdout), ensure_ascii=False))

    def test_the_note_about_rows_that_are_missing(self):
        row = {"id": "1"}
        for document, args, told in (
            ({"count": 1148, "thing": [row] * 3}, [], "3 of 1148 shown; --all for the rest\n"),
            ({"count": 1148, "thing": [row] * 3}, ["-o", "csv"], "3 of 1148 shown; --all for the rest\n"),
            ({"count": 1148, "thing": [row] * 3}, ["-q"], ""),
            ({"count": 1148, "thing": [row] * 3}, ["page=1", "pagesize=3"], ""),
            ({"count": 1148, "thing": [row] * 3}, ["Page=1", "PageSize=3"], ""),
            ({"count": 3, "thing": [row] * 3}, [], ""), ({"count": 2, "thing": [row] * 3}, [], ""),
            ({"thing": [row] * 3}, [], ""), ({"count": "1148", "thing": [row]}, [], ""), ({"count": 1148}, [], ""),
            ({"count": 1148, "name": "no list"}, [], "")):  # fmt: skip
            with self.subTest(f"{document} {args}"):
                self.reply("listThings", document)
                code, out, err = self.main("listThings", *args)
                self.assertEqual((0, told), (code, err))

    def test_all_is_fetch_list(self):
        self.option(default_page_size=10)
        code, out, err = self.main("listVirtualMachines", "-o", "text", "-c", "name")
        self.assertEqual((0, 10, "10 of 32 shown; --all for the rest\n"), (code, out.count("\n"), err))
        for args in (["--all"], ["fetch_list=true"], ["--all", "pagesize=7"]):
            for shape in ("text", "jsonl", "table", "csv"):
                out = self.good("listVirtualMachines", "-o", shape, "-c", "name", *args)
                self.assertEqual(32 + (shape in ("table", "csv")), out.count("\n"), (args, shape))
            self.assertEqual(32, len(json.loads(self.good("listVirtualMachines", *args))))
        self.assertEqual({"thing": {"id": "1"}}, json.loads(self.printed({"thing": {"id": "1"}}, "getThing", "--all")))

    def test_jsonl_of_a_long_list_is_written_as_it_arrives(self):
        """The second page is given only after the row of the first has come out of the process."""
        arrived = threading.Event()
        self.addCleanup(arrived.set)

        def second(record):
            self.assertEqual("2", record.params["page"])
            return Answer(200, {"r": {"count": 2, "thing": [{"id": "2" if arrived.wait(20) else "too late"}]}})

        self.cloud.script("listThings", Answer(200, {"r": {"count": 2, "thing": [{"id": "1"}]}}), second, second)
        child = Child([sys.executable, CS_PATH, "listThings", "--all", "-o", "jsonl"], env=dict(os.environ))
        self.addCleanup(child.end)
        first = child.stdout.readline()
        arrived.set()
        self.assertEqual((b'{"id": "1"}\n', 0, b'{"id": "2"}\n', b""), (first,) + child.finish())

    def test_jsonl_of_a_long_list_keeps_a_page_or_two(self):
        alive = []

        def page(record):
            gc.collect()
            alive.append(sum(type(thing) is dict and "is-a-row" in thing for thing in gc.get_objects()))
            number = int(record.params["page"])
            rows = [{"is-a-row": [], "id": str(number * 100 + row)} for row in range(100 if number < 12 else 1)]
            return Answer(200, json.dumps({"r": {"thing": rows}}), {"Content-Type": "application/json"})

        self.cloud.script("listThings", *[page] * 13)
        self.assertEqual(1101, self.good("listThings", "--all", "-o", "jsonl", "pagesize=100").count("\n"))
        self.assertLessEqual(max(alive), 300)

    def test_jsonl_of_a_list_that_breaks_off_shows_what_arrived(self):
        self.cloud.script("listThings", Answer(200, {"r": {"count": 2, "thing": [{"id": "1"}]}}))
        self.say_error("listThings", 530, "no more")
        code, out, err = self.main("listThings", "--all", "-o", "jsonl")
        self.assertEqual((1, '{"id": "1"}'), (code, out.split("\n")[0]))
        self.assertIn("no more", err)

    def test_jsonl_of_what_is_no_list(self):
        self.reply("getThing", {"thing": {"id": "1"}}, {"success": True}, {})
        self.assertEqual('{"thing": {"id": "1"}}\n', self.good("getThing", "--all", "-o", "jsonl"))
        self.assertEqual('{"success": true}\n', self.good("getThing", "--all", "-o", "jsonl"))
        self.assertEqual("", self.good("getThing", "--all", "-o", "jsonl"))


class ColumnsTest(CloudCase):
    ROWS = [{"id": "b", "name": "two", "size": "10", "nic": [{"ip": "p1"}, {"ip": "p2"}], "tags": [{"key": "env"}]},
            {"id": "a", "name": "one", "size": "9", "nic": [{"ip": "q1"}], "detail": {"cpu": {"n": 4}}},
            {"id": "c", "name": "Three", "nic": []}]  # fmt: skip
    answer = {"count": 3, "thing": ROWS}

    def cells(self, *args):
        out = self.printed(self.answer, "listThings", "-o", "text", "-q", *args)
        return [line.split("\t") for line in out.split("\n")[:-1]]

    @each("columns, expected", ("id", [["b"], ["a"], ["c"]]), ("name,id", [["two", "b"], ["one", "a"], ["Three", "c"]]),
          (" name , id ,", [["two", "b"], ["one", "a"], ["Three", "c"]]), ("nic.ip", [["p1,p2"], ["q1"], [""]]),
          ("nic.0.ip", [["p1"], ["q1"], [""]]), ("nic.1.ip", [["p2"], [""], [""]]), ("nic.99.ip", [[""], [""], [""]]),
          ("tags.key", [["env"], [""], [""]]), ("detail.cpu.n", [[""], ["4"], [""]]),
          ("detail.cpu", [[""], ['{"n":4}'], [""]]), ("detail.cpu.n.x", [[""], [""], [""]]),
          ("nic.0", [['{"ip":"p1"}'], ['{"ip":"q1"}'], [""]]), ("id.x,name.0,nic.x", [[""] * 3] * 3),
          ("nic.\u00b2.ip,nic.\u0663.ip,nic.-1.ip,nic." + "9" * 5000, [[""] * 4] * 3))  # fmt: skip
    def test_dotted_paths(self, columns, expected):
        self.assertEqual(expected, self.cells("-c", columns))

    @each("columns", "id.", ".id", ".", "..", "nic..ip", "nic.0.", "-", "id name", "\x1b[2J", "*")
    def test_paths_that_are_none(self, columns):
        self.assertEqual(3, len(self.cells("-c", columns)))

    def test_a_name_that_holds_a_dot_is_found_as_it_stands(self):
        self.reply("listThings", {"count": 1, "thing": [{"a.b": "1", "a": {"b": "2", "c.d": "3"}}]})
        self.assertEqual("1\t3\n", self.good("listThings", "-o", "text", "-c", "a.b,a.c.d"))

    def test_every_format(self):
        for shape, expected in (("table", "name   nic.0.ip\none    q1\nThree\ntwo    p1\n"),
                                ("csv", "name,nic.0.ip\r\none,q1\r\nThree,\r\ntwo,p1\r\n"),
                                ("text", "one\tq1\nThree\t\ntwo\tp1\n"),
                                ("jsonl", '{"name": "one", "nic.0.ip": "q1"}\n{"name": "Three", "nic.0.ip": null}\n'
                                 '{"name": "two", "nic.0.ip": "p1"}\n')):  # fmt: skip
            self.reply("listThings", self.answer)
            self.assertEqual(expected, self.good("listThings", "-o", shape, "--sort", "name", "-c", "name,nic.0.ip"))
        self.reply("listThings", self.answer, self.answer, self.answer)
        rows = [{"name": "one"}, {"name": "Three"}, {"name": "two"}]
        out = self.good("listThings", "--sort", "name", "-c", "name")
        self.assertEqual({"count": 3, "thing": rows}, json.loads(out))
        out = self.good("listThings", "--sort", "-id", "-o", "json")
        self.assertEqual(["c", "b", "a"], [row["id"] for row in json.loads(out)["thing"]])
        self.assertEqual(5, len(json.loads(out)["thing"][1]))  # all of it
        out = self.good("listThings", "--sort", "-id", "--all", "-c", "id")
        self.assertEqual([{"id": "c"}, {"id": "b"}, {"id": "a"}], json.loads(out))

    def test_objects_and_job_results(self):
        thing = {"id": "1", "nic": [{"ip": "p1"}]}
        self.reply("getThing", {"thing": thing}, {"id": "1", "detail": {"cpu": 4}})
        self.assertEqual({"thing": {"id": "1", "nic.ip": ["p1"]}}, json.loads(self.good("getThing", "-c", "nic.ip,id")))
        self.assertEqual({"detail.cpu": 4}, json.loads(self.good("getThing", "-c", "detail.cpu")))
        result = {"jobid": "j", "jobstatus": 1, "jobresult": {"thing": thing}}
        for shape, expected in (("table", "nic.ip\np1\n"), ("text", "p1\n"), ("csv", "nic.ip\r\np1\r\n"),
                                ("jsonl", '{"nic.ip": ["p1"]}\n')):  # fmt: skip
            self.reply("startThing", {"jobid": "j"})
            self.reply("queryAsyncJobResult", result)
            self.assertEqual(expected, self.good("startThing", "-o", shape, "-c", "nic.ip", "--sort", "id"))

    def test_a_column_that_no_row_has(self):
        cases = ("nmae", "name"), ("NAME", "name"), ("nic.0.pi", "nic.ip"), ("tag.key", "tags.key"), ("zzz", "")
        for name, near in cases:
            for shape in cs.FORMATS:
                with self.subTest(f"{name} {shape}"):
                    self.reply("listThings", self.answer)
                    err = self.says(0, "listThings", "-o", shape, "-c", "id," + name)
                    self.assertIn(f"Warning: no row has {name!r}", err)
                    self.assertEqual(bool(near), "did you mean" in err)
                    self.assertIn(near, err)
        self.reply("listThings", self.answer, self.answer, self.answer)
        self.assertIn("no row has 'nmae'", self.main("listThings", "--sort", "-nmae")[2])
        self.assertEqual("", self.main("listThings", "-c", "nmae", "-q")[2])
        self.assertEqual("", self.main("listThings", "-c", "tags.key,detail.cpu.n")[2])  # some row has it

    def test_a_column_that_only_a_later_row_has_is_no_reason_to_warn(self):
        """Also where rows are written as they arrive."""
        self.reply("listThings", {"count": 2, "thing": [{"id": "1"}, {"id": "2", "hostname": "h"}]})
        out = self.good("listThings", "--all", "-o", "jsonl", "-c", "id,hostname")
        self.assertEqual([None, "h"], [json.loads(line)["hostname"] for line in out.splitlines()])
        self.reply("listThings", {"count": 2, "thing": [{"id": "1"}, {"id": "2", "hostname": "h"}]})
        err = self.says(0, "listThings", "--all", "-o", "jsonl", "-c", "id,hostnam")
        self.assertIn("no row has 'hostnam'; did you mean hostname?", err)
        self.assertEqual(1, err.count("\n"))

    @each("columns", "", ",", " , ")
    def test_no_columns_at_all_are_those_of_every_day(self, columns):
        self.assertEqual(self.cells(), self.cells("-c", columns))
        self.assertEqual(self.answer, json.loads(self.printed(self.answer, "listThings", "-c", columns)))

    @each("column, expected", ("id", "abc"), ("-id", "cba"), ("name", "acb"), ("-name", "bca"), ("size", "abc"),
          ("-size", "bac"), ("nic.ip", "bac"), ("nic.0.ip", "bac"), ("-nic.0.ip", "abc"), ("detail.cpu.n", "abc"),
          ("nosuch", "bac"))  # fmt: skip
    def test_sort(self, column, expected):
        self.assertEqual(expected, "".join(row[0] for row in self.cells("--sort", column, "-c", "id")))
        self.assertEqual(expected, "".join(row[0] for row in self.cells("--sort=" + column, "-c", "id")))

    def order(self, values, column="v"):
        out = self.printed({"thing": [{"v": value} for value in values]}, "listThings", "--sort", column, "-o", "jsonl")
        return [json.loads(line)["v"] for line in out.splitlines()]

    def test_numbers_are_sorted_as_numbers_also_where_they_are_text(self):
        self.assertEqual([-3, 1.5, 9, 10, 100], self.order([10, 9, 1.5, -3, 100]))
        self.assertEqual(["-3", "1.5", "9", "10", "1e2"], self.order(["10", "9", "1.5", "-3", "1e2"]))
        self.assertEqual(["b", "a", "10", 9, None], self.order(["10", 9, "b", "a", None], "-v"))
        self.assertEqual([2**80 - 1, 2**80, 2**80 + 1], self.order([2**80, 2**80 + 1, 2**80 - 1][::-1]))

    def test_words_that_python_takes_for_numbers_are_words(self):
        words = ["b", "nan", "a", "infinity", "10", "9", "inf", "c", "1_0"]
        self.assertEqual(["9", "10", "1_0", "a", "b", "c", "inf", "infinity", "nan"], self.order(words))

    @each("column", "k", "-k")
    def test_rows_that_are_alike_keep_their_order(self, column):
        self.reply("listThings", *[{"thing": [{"k": "x", "n": number} for number in range(9)]}] * 2)
        out = self.good("listThings", "--sort", column, "-o", "text", "-c", "n")
        self.assertEqual(list("012345678"), out.split())

    def test_what_cannot_be_compared_is_sorted_somehow(self):
        values = [True, "x", {"a": 1}, ["a"], 7, "", False, [], {}, 1.0, "\ud7ff"]
        self.assertEqual(len(values), len(self.order(values)))


class TableTest(CloudCase):
    """Tables on a terminal."""

    def rows(self, *rows):
        self.reply("listThings", {"count": len(rows), "thing": list(rows)})

    @each("columns", 200, 120, 80, 60, 40, 20)
    @each("args", ["listVirtualMachines"], ["listEvents"], ["listTemplates", "templatefilter=all"])
    def test_it_fits(self, columns, args):
        for line in self.table(*args, columns=columns):
            self.assertLessEqual(columns_of(line), columns)

    def test_id_name_and_state_come_first(self):
        self.assertEqual(["id", "name", "state"], self.table("listVirtualMachines", columns=80)[0].split()[:3])
        self.assertIn("zonename", self.table("listVirtualMachines", columns=120)[0].split())
        for command, expected in (("listZones", "id name allocationstate"), ("listVolumes", "id name state"),
                                  ("listHosts", "id name state")):  # fmt: skip
            self.assertEqual(expected, " ".join(self.table(command)[0].split()[:3]))

    def test_what_an_answer_is_about_is_not_left_out_while_there_is_room(self):
        self.option(rate_limit=100)
        cases = ("listResourceLimits", "max"), ("getApiLimit", "apiAllowed"), ("listEvents", "description")
        for command, column in cases:
            self.assertIn(column, self.table(command, columns=150)[0].split())

    def test_default_columns_are_left_out_from_the_end_before_anything_is_cut(self):
        self.rows({"id": "1" * 20, "name": "n" * 20, "state": "s" * 20, "zonename": "z" * 20})
        self.assertEqual(["id                    name                  state                 zonename", "1" * 20 + "  "
                          + "n" * 20 + "  " + "s" * 20 + "  " + "z" * 20], self.table("listThings", columns=86))
        self.rows({"id": "1" * 20, "name": "n" * 20, "state": "s" * 20, "zonename": "z" * 20})
        lines = self.table("listThings", columns=85)
        self.assertEqual(["id", "name", "state"], lines[0].split())
        self.assertNotIn("…", lines[1])

    def test_chosen_columns_are_cut_but_never_left_out(self):
        self.rows({"id": "12345678", "name": "n" * 100, "state": "Running"}, {"id": "1", "name": "ok", "state": "x"})
        lines = self.table("listThings", "-c", "id,name,state", columns=40)
        self.assertEqual((["id", "name", "state"], [38, 40]), (lines[0].split(), [len(lines[0]), len(lines[1])]))
        self.assertTrue(lines[1].startswith("12345678  nnnn"), lines[1])
        self.assertTrue(lines[1].endswith("n…  Running"), lines[1])
        self.assertEqual(["1", "ok", "x"], lines[2].split())

    def test_an_id_is_whole_or_useless(self):
        """What can be cut otherwise is cut before the ids, which are there to be copied."""
        ident = "53d0c13a-1e82-4995-ae92-093286df12db"
        self.rows({"id": ident, "name": "a name of thirty-one characters", "state": "x" * 30})
        line = self.table("listThings", "-c", "id,name,state", columns=80)[1]
        self.assertIn(ident + " ", line)
        self.assertLessEqual(len(line), 80)

    def test_more_chosen_columns_than_fit(self):
        row = {f"c{number:03d}": "value" for number in range(400)}
        self.rows(row)
        lines = self.table("listThings", "-c", ",".join(sorted(row)), columns=40)
        self.assertEqual((2, 400), (len(lines), len(lines[0].split())))

    def test_wide_and_combining_characters_are_aligned(self):
        names = ["ascii", "日本語", "日本語の長い名前のマシン", "e\u0301te\u0301", "🙂🚀"]
        names += ["한국어", "ｆｕｌｌ", "zürich", "\u0e19\u0e49\u0e33"]
        rows = [{"id": "1", "name": name, "state": "|"} for name in names]
        for shape in (self.table, lambda *args: self.good(*args + ("-o", "table")).splitlines()):
            self.rows(*rows)
            lines = shape("listThings")
            edges = {columns_of(line[: line.index("|")]) for line in lines[1:]} | {lines[0].index("state")}
            self.assertEqual(1, len(edges), lines)

    @each("columns", *range(10, 24))
    def test_wide_characters_are_cut_at_whole_ones(self, columns):
        self.rows({"id": "1", "name": "日本語の長い名前", "state": "e\u0301" * 9})
        for line in self.table("listThings", "-c", "id,name,state", columns=columns):
            self.assertLessEqual(columns_of(line), max(columns, 4 + 4 + 4 + 4), line)

    @each("shape", "table", "text", "csv", "json", "jsonl")
    def test_what_would_steer_the_terminal_is_escaped(self, shape):
        evil = "a\x1b[2J" + EVIL_TITLE + "\x9b31mc\u202ed\x08\x7f\r\u2028\u200b"
        self.rows({"id": evil, "name": [evil], "state": {evil: evil}, evil: evil}, {evil + "2": 1})
        for args in (["-c", "id,name,state," + evil], []):
            self.rows({"id": evil, "name": [evil], "state": {evil: evil}, evil: evil}, {evil + "2": 1})
            code, out, err = self.on_terminal("listThings", "-o", shape, "--color", "never", *args, columns=500)
            self.assertEqual(0, code)
            bare = out.replace("\r\n", "\n")
            self.assertEqual([], re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028\u200b]", bare + err))
        self.cloud._scripts.clear()

    def test_names_of_columns_come_from_the_server_too(self):
        self.rows({"a" + EVIL_TITLE + "b\nc": "1"})
        lines = self.table("listThings")
        self.assertEqual(2, len(lines))
        self.assertIn("\\x1b]0;pwned\\x07", lines[0])

    def test_line_breaks_and_tabs_do_not_break_rows(self):
        self.rows({"id": "1", "name": "a\nb\tc", "state": "x"}, {"id": "2", "name": "d", "state": "y"})
        self.assertEqual(["id  name   state", "1   a b c  x", "2   d      y"], self.table("listThings"))

    def test_a_huge_cell(self):
        """A page of text, and of wide text, is cut without ado: not a character at a time, measured each time."""
        cut = []
        for text in ("x" * 100000, "字" * 100000, "e\u0301" * 100000):
            thread = threading.Thread(target=lambda text=text: cut.append(cs._cut(text, 20)), daemon=True)
            thread.start()
            thread.join(20)
            self.assertFalse(thread.is_alive(), "still at it")
            self.assertTrue(cut[-1].endswith("…"))
            self.assertIn(columns_of(cut[-1]), (19, 20))
        self.rows({"id": "1", "name": "x" * 300000, "state": "x"})
        self.assertEqual("1   " + "x" * 68 + "…  x", self.table("listThings", "-c", "id,name,state")[1])

    @each("args, env, colored", ([], {}, True), (["--color", "auto"], {}, True), (["--color", "never"], {}, False),
          ([], {"NO_COLOR": "1"}, False), ([], {"NO_COLOR": ""}, True), ([], {"term": "dumb"}, False),
          (["--color", "always"], {"NO_COLOR": "1", "term": "dumb"}, True))  # fmt: skip
    def test_the_header_is_bold_where_there_is_colour(self, args, env, colored):
        bold = "\x1b[1mid\x1b[0m\n"
        self.rows({"id": "1"})
        code, out, err = self.on_terminal("listThings", "-o", "table", *args, **env)
        self.assertEqual((bold if colored else "id\n") + "1\n", out)
        self.rows({"id": "1"})
        self.assertEqual("id\n1\n", self.good("listThings", "-o", "table"))  # no terminal
        self.rows({"id": "1"})
        self.assertEqual(bold + "1\n", self.good("listThings", "-o", "table", "--color=always"))
        self.usage("listThings", "--color", "sometimes")

    @each("shape", "csv", "text")
    def test_nothing_but_json_and_the_header_is_coloured(self, shape):
        self.rows({"id": "1"})
        self.assertNotIn("\x1b", self.good("listThings", "-o", shape, "--color", "always"))

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_on_a_real_terminal(self):
        env = dict(os.environ, TERM="xterm")
        typed = self.on_pty([sys.executable, CS_PATH, "listVirtualMachines", "-o", "table"], env, 100)
        self.assertEqual(0, typed.end())
        lines = screen(typed.text).rstrip("\n").split("\n")
        self.assertEqual(33, len(lines))
        self.assertIn(max(map(len, lines)), range(80, 101))
        self.assertIn("\x1b[1mid", typed.text)


# === [9.2] progress and errors ======================================================================================


class ProgressTest(CloudCase):
    """One line on standard error, on a terminal only, and gone when the work is done."""

    options = {"job_seconds": 0.15, "default_page_size": 500}

    def shown(self, code, *args, **options):
        """What comes of a command line that ends with this exit code where standard error is a terminal: (standard
        output, standard error); both=True: both the same one."""
        err = FakeTerminal()
        out = err if options.pop("both", False) else io.StringIO()
        with mock.patch.dict(os.environ, dict({"TERM": "xterm", "COLUMNS": "80"}, **options)):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                self.assertEqual(code, cs.main(list(args)))
        return out.getvalue(), err.getvalue()

    def job(self, *outcomes):
        self.reply("startThing", {"jobid": "j-1"})
        self.reply("queryAsyncJobResult", {"jobid": "j-1", "jobstatus": 0}, *outcomes)

    DONE = {"jobid": "j-1", "jobstatus": 1, "jobresult": {"success": True}}
    FAILED = {"jobid": "j-1", "jobstatus": 2, "jobresult": {"errorcode": 530, "errortext": "full"}}

    def test_a_job_shows_command_and_time_and_is_gone_afterwards(self):
        self.job(self.DONE)
        out, err = self.shown(0, "startThing", "-o", "text")
        self.assertRegex(err, r"startThing: .*\d s")
        self.assertEqual("", screen(err))

    def test_a_job_that_is_waited_for_by_its_id_shows_the_id_and_is_gone_before_the_answer(self):
        self.reply("queryAsyncJobResult", {"jobid": "j-1", "jobstatus": 0}, self.DONE)
        text, _ = self.shown(0, "--wait", "j-1", "-o", "text", both=True)
        self.assertRegex(text, r"job j-1: .*\d s")
        self.assertNotIn("queryAsyncJobResult", text)
        self.assertEqual("true\n", screen(text))

    def test_the_time_moves_every_second_also_while_the_server_is_silent(self):
        def look_late(record):
            time.sleep(1.2)
            return Answer(200, {"r": self.DONE})

        self.reply("startThing", {"jobid": "j-1"})
        self.cloud.script("queryAsyncJobResult", look_late)
        text, _ = self.shown(0, "startThing", "-o", "text", both=True)
        self.assertHolds(text, "startThing: waiting for the job, 0 s", "startThing: waiting for the job, 1 s")
        self.assertEqual("true\n", screen(text))
        for thread in threading.enumerate():
            if thread.name == "cs-progress":
                thread.join(5)
                self.assertFalse(thread.is_alive())

    def test_pages_show_rows_so_far_of_their_count(self):
        self.option(default_page_size=10)
        out, err = self.shown(0, "listVirtualMachines", "--all", "pagesize=10")
        self.assertEqual(32, len(json.loads(out)))
        self.assertRegex(err, r"\d+ of 32 rows")
        self.assertEqual("", screen(err))

    def test_it_is_gone_before_an_error_is_told(self):
        self.job(self.FAILED)
        out, err = self.shown(1, "startThing")
        self.assertIn("startThing: ", err)
        self.assertTrue(screen(err).startswith("CloudStack error: Job failure: full\n"), screen(err))

    def test_it_is_gone_when_interrupted(self):
        self.job(self.DONE)
        looks = []

        def sleep(seconds):
            looks.append(seconds)
            raise KeyboardInterrupt

        with mock.patch.object(cs, "_sleep", sleep):
            out, err = self.shown(130, "startThing")
        told = "Interrupted. Job j-1 may still be running; to go on waiting for it: cs --wait j-1\n"
        self.assertEqual(told, screen(err))

    def test_a_streamed_list_and_its_progress_do_not_mix(self):
        """Both on one terminal, as they are where nothing is redirected."""
        self.option(latency=0.11)
        text, _ = self.shown(0, "listVirtualMachines", "--all", "-o", "jsonl", "pagesize=16", both=True)
        self.assertIn("of 32 rows", text)
        lines = screen(text).rstrip("\n").split("\n")
        self.assertEqual([36] * 32, [len(json.loads(line)["id"]) for line in lines])

    @each("args, env", (["-q"], {}), (["-t"], {}), ([], {"CLOUDSTACK_TRACE": "true"}), ([], {"TERM": "dumb"}))
    def test_there_is_none_where_it_is_not_wanted(self, args, env):
        self.job(self.DONE)
        out, err = self.shown(0, "startThing", *args, **env)
        self.assertNotIn("\x1b", err)
        self.job(self.DONE)
        code, out, err = self.main("startThing")  # no terminal
        self.assertEqual((0, ""), (code, err))

    def test_an_answer_on_standard_output_holds_none_of_it(self):
        self.job(self.DONE)
        self.assertEqual("true\n", self.shown(0, "startThing", "-o", "text")[0])

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_a_session_on_a_real_terminal(self):
        """Progress while a job runs, then its result as a table that fits, coloured; then Ctrl-C in the next one."""
        self.option(job_seconds=0.3)
        machine = self.cloud.cloud.named("virtualmachine", "web-02")["id"]
        command = [sys.executable, CS_PATH, "startVirtualMachine", "id=" + machine, "-o", "table"]
        env = dict(os.environ, TERM="xterm")
        typed = self.on_pty(command, env, 100)
        typed.wait_for(b"startVirtualMachine: ")
        self.assertEqual(0, typed.end())
        self.assertIn("\x1b[1m", typed.text)
        lines = screen(typed.text).rstrip("\n").split("\n")
        self.assertEqual(2, len(lines))
        self.assertIn("web-02", lines[1])
        self.assertLessEqual(max(map(len, lines)), 100)
        self.option(job_seconds=30)
        typed = self.on_pty([word.replace("start", "stop") for word in command], env)
        typed.wait_for(b"stopVirtualMachine: ")
        typed.type("\x03")
        typed.wait_for(b"cs --wait ")
        self.assertEqual(130, typed.end())
        self.assertRegex(screen(typed.text), r"\A(\^C)?Interrupted\. Job [0-9a-f-]{36} .*cs --wait [0-9a-f-]{36}\n\Z")


class ErrorTextsTest(CloudCase):
    """What was asked, what was answered, its codes, what to try."""

    def error(self, code, *args):
        """What a command line that must end with this exit code says of an error."""
        ended, out, err = self.main(*args)
        self.assertEqual(code, ended, err)
        self.assertNotIn("Traceback", err)
        self.assertTrue(err.startswith("CloudStack error: "), err)
        return err

    def test_an_error_of_the_server(self):
        self.say_error("startVirtualMachine", 431, "Invalid parameter id value=5")
        err = self.error(1, "startVirtualMachine", "id=5")
        told = "CloudStack error: HTTP 431 response from CloudStack: Invalid parameter id value=5\n"
        self.assertTrue(err.startswith(told), err)
        self.assertHolds(err, f"  Asked: cs startVirtualMachine id=5\n  Server: {self.cloud.endpoint}\n",
                         "  Codes: errorcode 431, cserrorcode 4350\n")  # fmt: skip
        self.assertRegex(err, r"  Try: .*cs startVirtualMachine --help")

    @each("code, part", (401, "key"), (430, "--help"), (431, "--help"), (432, "cs --list"), (503, "--retry"),
          (530, "log"), (531, "role"), (532, "cs listResourceLimits"), (533, "room"), (536, "uses"), (429, "--retry"))
    def test_each_code_has_something_to_try(self, code, part):
        self.say_error("startThing", code)
        self.assertIn(part, self.error(1, "startThing", "id=5").partition("  Try: ")[2])

    def test_a_failed_job(self):
        self.reply("startThing", {"jobid": "j-1"})
        failed = {"errorcode": 533, "cserrorcode": 4535, "errortext": "no room"}
        self.reply("queryAsyncJobResult", {"jobid": "j-1", "jobstatus": 2, "jobresultcode": 533, "jobresult": failed})
        err = self.error(1, "startThing", "id=5")
        self.assertEqual("CloudStack error: Job failure: no room", err.split("\n")[0])
        self.assertHolds(err, "  Asked: cs startThing id=5\n", "errorcode 533, cserrorcode 4535", "  Try: ")

    def test_what_is_secret_is_not_shown(self):
        words = "password=HIDDEN details[0].password=HIDDEN userdata=HIDDEN secretkey=HIDDEN privatekey=HIDDEN".split()
        words += ["tags[0].key=password", "tags[0].value=HIDDEN", "name=shown"]
        self.say_error("updateThing", 431)
        err = self.error(1, "updateThing", *words)
        self.assertNotIn("HIDDEN", err)
        self.assertHolds(err, "name=shown", "password=***")

    def test_a_long_parameter_is_not_repeated_in_full(self):
        text = "x" * 100000
        self.say_error("updateThing", 431, "too long")
        err = self.error(1, "updateThing", "text=@" + self.write("text", text), "more=1")
        self.assertLess(len(err), 3000)
        self.assertIn("Try: ", err)

    def test_no_answer(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.configure(endpoint=f"http://127.0.0.1:{free.getsockname()[1]}/client/api")
            err = self.error(3, "listZones", "name=x")
        self.assertHolds(err, "refused", "  Asked: cs listZones name=x\n  Server: http://127.0.0.1:")

    def test_a_page_that_is_not_cloudstack_s(self):
        self.cloud.script("listZones", Answer(404, "<html>not here</html>"))
        self.assertHolds(self.error(1, "listZones"), "Asked: cs listZones", "endpoint", "not here")

    def echo(self, status, kind, form):
        """An answer by whoever stands before the server, which repeats the address."""

        def repeat(record):
            text = form.format(record.path + "?" + record.query) + "x" * 5000 + "THE END"
            return Answer(status, text, {"Content-Type": kind})

        self.cloud.script("listZones", repeat)

    @each("status", 200, 403, 404, 502)
    def test_an_answer_that_is_not_cloudstack_s_is_shown_masked_and_only_its_beginning(self, status):
        user = self.cloud.users["admin"]
        for kind, form in (("text/html", "<p>{}</p>"), ("application/json", '{{"message": "{}", "x": "'),
                           ("text/plain", "{}")):  # fmt: skip
            self.echo(status, kind, form)
            with self.subTest(status, kind=kind):
                err = self.fails(1, "listZones", "name=shown")
                self.assertHolds(err, "/client/api?", "name=shown")
                self.assertLacks(err, user.key, user.secret)
                self.assertNotRegex(err, "(?i)(apikey|signature)=[^*]")
                self.assertNotIn("THE END", err)

    def test_json_that_repeats_the_address_is_masked_too(self):
        def repeat(record):
            return Answer(502, json.dumps({"message": "/client/api?" + record.query}), JSON_HEADERS)

        self.cloud.script("listZones", repeat)
        err = self.fails(1, "listZones")
        self.assertIn('"message": "/client/api?', err)
        self.assertNotRegex(err, "(?i)(apikey|signature)=[^*]")

    def test_a_page_of_html_is_no_answer_as_text_either(self):
        self.echo(200, "text/html", "<html>{}</html>")
        err = self.fails(1, "listZones", "json=false")
        self.assertIn("<html>/client/api?", err)
        self.assertNotRegex(err, "(?i)(apikey|signature)=[^*]")

    @each("status", 200, 404, 405)
    def test_where_there_is_no_api_the_usual_address_is_told(self, status):
        self.cloud.script("listZones", Answer(status, "<html>not here</html>"))
        self.assertIn("  Try: Check the endpoint: it usually ends in /client/api.", self.error(1, "listZones"))
        self.say_error("listZones", 404)
        self.assertIn("/client/api.", self.error(1, "listZones").partition("  Try: ")[2])
        self.cloud.script("listZones", Answer(502, "<html>busy</html>"))
        self.assertNotIn("/client/api.", self.error(1, "listZones"))

    def test_json_is_not_printed_on_a_terminal_where_its_text_was(self):
        self.say_error("startThing", 431, "the text")
        code, out, err = self.on_terminal("startThing", "-o", "json")
        self.assertEqual((1, ""), (code, out))
        self.assertIn("the text", err)
        for args, fields in (((), {"errortext": ""}), (("-q",), {})):  # nothing else tells of it
            self.say_error("startThing", 431, **dict({"text": "the text"}, **fields))
            code, out, err = self.on_terminal("startThing", "--color", "never", *args)
            self.assertEqual((1, 431), (code, json.loads(out)["startthingresponse"]["errorcode"]))

    def test_a_log_in_that_fails(self):
        """It is another command that failed than the one asked for, and no role is to blame."""
        self.unset("key", "secret")
        self.configure(username="admin", password="HIDDEN", domain="/")
        err = self.error(1, "listZones", "name=x")
        self.assertHolds(err, "HTTP 531", "  Asked: login username=admin domain=/\n")
        self.assertLacks(err, "listZones", "role", "HIDDEN")
        self.assertRegex(err, "  Try: .*password")

    @unittest.skipUnless(shutil.which("bash"), "bash is not installed")
    def test_what_was_asked_can_be_pasted_into_a_shell(self):
        """With the configuration that was chosen, a file that was named, quotes, and what the shell would evaluate."""
        path = self.write("a file", "content")
        words = ["name=a b", "x=$(touch pwned)", "y='q'", "z=it's", "n=\n\t\u202e\\'", "u=z\u00fcrich", "f=@" + path]
        self.say_error("startThing", 431)
        err = self.error(1, "startThing", *(words + ["--timeout", "7", "--endpoint", self.cloud.endpoint]))
        line = re.search("  Asked: (.*)", err).group(1)
        env = dict(os.environ, LC_ALL="C.UTF-8")
        out = subprocess.check_output(["bash", "-c", 'cs() { printf "%s\\0" "$@"; }; ' + line], env=env)
        shown = out.decode("utf-8").split("\0")[:-1]
        self.assertEqual(["--endpoint", self.cloud.endpoint, "startThing"] + words, shown)
        self.assertIn(f"\n  Server: {self.cloud.endpoint}\n", err)

    def test_what_may_have_run_is_told(self):
        self.configure(timeout="0.3")
        self.cloud.script("startThing", RUN_THEN_DROP)
        self.assertHolds(self.error(3, "startThing", "id=1"), "outcome is unknown", "before you send it again")

    def test_a_job_that_takes_too_long(self):
        self.configure(job_timeout="0.01")
        self.reply("startThing", {"jobid": "j-1"})
        self.reply("queryAsyncJobResult", *[{"jobid": "j-1", "jobstatus": 0}] * 5)
        self.assertHolds(self.error(4, "startThing", "id=5"), "cs --wait j-1", "Asked: cs startThing id=5")

    def test_an_error_while_waiting_for_a_job_by_its_id(self):
        self.say_error("queryAsyncJobResult", 431, "no such job")
        err = self.error(1, "--wait", "j-1")
        self.assertIn("j-1", err)
        self.assertNotIn("cs  ", err)

    @each("document", {"errorcode": 431}, {"errortext": "only text"}, {"errorcode": None, "errortext": None},
          {"errorcode": "x"}, {"errorcode": [431], "errortext": {"a": 1}}, {"errorcode": 431, "errortext": ""}, {}, [],
          "text", None, 7)  # fmt: skip
    def test_errors_of_odd_shapes(self, document):
        self.reply("startThing", document, status=431)
        self.assertIn("HTTP 431", self.error(1, "startThing"))

    def test_quiet(self):
        self.say_error("startThing", 431)
        code, out, err = self.main("startThing", "-q")
        self.assertEqual((1, "", 431), (code, err, json.loads(out)["startthingresponse"]["errorcode"]))

    @each("shape", *cs.FORMATS)
    def test_the_answer_is_json_whatever_the_format(self, shape):
        self.say_error("startThing", 431)
        code, out, err = self.main("startThing", "-o", shape, "-c", "id")
        self.assertEqual(431, json.loads(out)["startthingresponse"]["errorcode"])

    def test_what_was_asked_is_shown_escaped(self):
        self.say_error("startThing", 431, EVIL_TITLE)
        err = self.error(1, "startThing", "name=\u202eabc\u2028", "b=x\n  Codes: none\ty")
        self.assertEqual([], re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", err))
        self.assertEqual(1, err.count("\n  Codes: "))


class FlagSettingsTest(CloudCase):
    """--endpoint, --config, --timeout, --retry"""

    def section(self, name="cloudstack", **settings):
        lines = [f"{key} = {value}" for key, value in sorted(settings.items())]
        return "\n".join(["[" + name + "]"] + lines) + "\n"

    def test_endpoint(self):
        user = self.cloud.users["admin"]
        self.unset("endpoint", "key", "secret")
        self.ini(self.section(endpoint="http://cloud.invalid/", key=user.key, secret=user.secret))
        self.good("--endpoint", self.cloud.endpoint, "listZones")
        self.good("listZones", "--endpoint=" + self.cloud.endpoint)
        self.assertEqual(["listZones"] * 2, self.asked)
        self.assertIn("endpoint", self.usage("listZones", "--endpoint", "nonsense"))
        self.assertIn("endpoint", self.usage("listZones", "--endpoint", "file:///etc/passwd"))

    def test_config(self):
        user = self.cloud.users["admin"]
        self.unset("endpoint", "key", "secret")
        good = {"endpoint": self.cloud.endpoint, "key": user.key, "secret": user.secret}
        path = self.write("other.ini", self.section(**good) + self.section("lab", endpoint="http://cloud.invalid/"))
        self.good("listZones", "--config", path)
        self.good("--config=~/other.ini", "listZones")
        self.assertEqual(3, self.main("--config", path, "-r", "lab", "listZones", "--retry", "0")[0])
        self.configure(config=self.write("broken.ini", "nonsense"))
        self.good("listZones", "--config", path)  # it stands for CLOUDSTACK_CONFIG
        self.assertIn("nosuch.ini", self.usage("listZones", "--config", os.path.join(self.home, "nosuch.ini")))

    def test_an_unknown_region_names_those_there_are(self):
        self.unset("endpoint", "key", "secret")
        self.ini(self.section("lab", endpoint="http://lab.invalid/") + self.section("zoo"))
        self.write("work/cloudstack.ini", self.section("cloudstack"))
        self.assertEqual("Error: region 'labs' not in config; there are cloudstack, lab, zoo\n",
                         self.usage("listZones", "-r", "labs"))  # fmt: skip
        self.assertIn("'x' not in config; there are cloudstack, lab, lab2, zoo",
                      self.usage("listZones", "-r", "x", "--config", self.write("other.ini", self.section("lab2"))))
        os.remove(os.path.join(self.home, ".cloudstack.ini"))
        self.write("work/cloudstack.ini", "")
        self.assertEqual("Error: region 'x' not in config\n", self.usage("listZones", "-r", "x"))

    def test_keys_that_are_no_settings_are_named_in_one_line(self):
        self.unset("endpoint", "key", "secret")
        section = "\n".join(["[cloudstack]", f"endpoint = {self.cloud.endpoint}", "tiemout = 5", "key = key-of-ini",
                             "zzz = 1", "secret = s-of-ini", "host = x", "header_x-y = %(host)s", "output = table"])
        path = self.ini("[DEFAULT]\nbase = x\n" + section + "\n")
        code, out, err = self.main("listZones", "--dry-run")
        self.assertEqual((0, f"Warning: not known as settings: 'tiemout' in {path} (timeout?), 'zzz' in {path}\n"),
                         (code, err))  # fmt: skip
        self.assertEqual("", self.main("listZones", "--dry-run", "-q")[2])
        self.assertEqual("", self.main("--complete=cs listZ")[2])

    def test_timeout(self):
        release = threading.Event()
        self.addCleanup(release.set)
        self.cloud.script("listZones", lambda record: release.wait(10) and None)
        self.assertIn("0.1 s", self.fails(3, "--timeout", "0.1", "listZones"))
        for value in ("abc", "0", "-1", "nan", "1e99"):
            with self.subTest(value):
                self.assertIn("timeout", self.usage("listZones", "--timeout", value))

    def test_retry(self):
        busy = Answer(503, "<html>busy</html>")
        self.cloud.script("listZones", busy, busy)
        self.good("--retry", "2", "listZones")
        self.assertEqual(["listZones"] * 3, self.asked)
        self.cloud.script("listZones", busy, busy)
        self.assertEqual(1, self.main("listZones", "--retry=1")[0])
        self.configure(retry="5")
        self.cloud.script("listZones", busy)
        self.assertEqual(1, self.main("listZones", "--retry", "0")[0])  # 0 is a value, too
        self.cloud._scripts.clear()
        for value in ("-1", "abc", "1.5"):
            self.assertIn("retry", self.usage("listZones", "--retry", value))

    @each("option", "--endpoint", "--region", "-r", "--config", "--timeout", "--retry", "--wait")
    def test_an_empty_value_is_a_mistake(self, option):
        """`cs -r "$LAB" destroyVirtualMachine ...` where LAB is not set must not go to the usual region."""
        for args in ([option, ""], [option + "="] if option.startswith("--") else [option, ""]):
            with self.subTest(args):
                self.usage("listZones", *args)

    def test_any_two_options_together(self):
        """They do something or are refused; no traceback, and nothing is sent with --dry-run or twice."""
        self.sync()
        self.reply("queryAsyncJobResult", *[{"jobid": "j", "jobstatus": 1, "jobresult": {"ok": True}}] * 99)
        alone = "--all --dry-run --force --list --sync --help --async --post -q -t --configure".split()
        singles = [[option] for option in alone] + [["--wait", "j"], ["-o", "text"], ["-c", "id"], ["--sort", "id"]]
        for number, first in enumerate(singles):
            for second in singles[number:]:
                alone = {"--sync", "--wait", "--list", "--configure"} & set(first + second)
                args = first + second + ([] if alone else ["listZones"])
                with self.subTest(args), mock.patch("sys.stdin", io.StringIO()):
                    del self.cloud.requests[:]
                    code, out, err = self.main(*args)
                    self.assertIn(code, (0, 1, 2))
                    self.assertEqual(len(self.asked), len(set(self.asked)))
                    if ["--dry-run"] in (first, second):
                        self.assertNotIn("listZones", self.asked)

    @each("option", *cs._OPTIONS)
    def test_no_option_takes_a_secret(self, option):
        self.assertNotRegex(option.name, "key|secret|password|token")


class SecretsOnTheCommandLineTest(TransportCase):
    @each("shape", *cs.FORMATS)
    def test_no_format_steers_a_terminal(self, shape):
        """Control characters out of names that tenants gave, in each format, as a cell and as a column."""

        nasty = "a\x1b]0;x\x07\x9b2J\u202eb"
        for row in ({"name": nasty}, {nasty: "x"}):
            job = cs._Invocation(cs._parse_arguments(["-o", shape, "--color", "never"])[0])
            out = FakeTerminal()
            with self.subTest(shape=shape, row=row), contextlib.redirect_stdout(out):
                cs._print_answer(job, {"count": 1, "row": [row]})
            self.assertEqual([], re.findall("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", out.getvalue()), shape)

    def test_catalog_and_completion_do_not_steer_a_terminal(self):
        nasty = "x\x1b]0;x\x07\x9b2J\u202ey"
        field = {"name": nasty, "type": "string", "description": nasty, "since": nasty}
        api = {"name": "listZones", "description": nasty, "since": nasty, "params": [field], "response": [field]}
        server = self.serve([READ, reply(json.dumps({"r": {"count": 1, "api": [api]}}).encode()), AGAIN])
        environ(endpoint=server.url, key="k", secret="s")
        self.assertEqual(0, self.main("--sync")[0])
        for args in (["--list"], ["listZones", "--help"], ["--complete", "cs "]):
            with self.subTest(args=args):
                code, out, err = self.main(*args)
                self.assertIn("listZones", out)
                self.assertEqual([], re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out))

    def test_no_message_of_the_command_line_quotes_the_query_of_the_endpoint(self):
        """--sync, --dry-run and the report of an error."""
        catalog = {"listapisresponse": {"count": 1, "api": [{"name": "listZones"}]}}
        refused = {"r": {"errorcode": 431, "errortext": "no"}}
        for args, document, status in ((["--sync"], catalog, "200 OK"), (["listZones", "--dry-run"], catalog, "200 OK"),
                                       (["listZones"], refused, "431 no")):  # fmt: skip
            server = self.serve([READ, reply(json.dumps(document).encode(), status), AGAIN])
            environ(endpoint=server.url + RedactionTest.QUERY, key="k", secret="s")
            with self.subTest(args=args):
                code, out, err = self.main(*args)
                self.assertIn(server.place, out + err)
                self.assert_tells_nothing(out, err)

    @each("status", "200 OK", "401 x")
    def test_configure_does_not_say_what_it_was_told(self, status):
        server = self.serve([READ, reply(b'{"r": {"errorcode": 401, "errortext": "no"}}', status), AGAIN])
        told = "\n".join([server.url + RedactionTest.QUERY, CANARY_KEY, CANARY_SECRET, "n", ""])
        with self.subTest(status=status), mock.patch.object(sys, "stdin", io.StringIO(told)):
            code, out, err = self.main("--configure", "--region", "r" + status[:3])
            self.assertEqual(0 if status == "200 OK" else 1, code, err)
            self.assert_tells_nothing(out, err)

    def test_the_report_of_an_error_shows_what_was_asked_without_secrets(self):
        server = self.serve([READ, reply(b'{"r": {"errorcode": 431, "errortext": "no"}}', "431 no"), AGAIN])
        environ(endpoint=server.url, key=CANARY_KEY, secret=CANARY_SECRET)
        code, out, err = self.main("updateUser", "name=visible", "password=" + CANARY_PASSWORD)
        self.assertHolds(err, "name=visible", "password=***")
        self.assert_tells_nothing(out, err)


# === [9.6] configure ================================================================================================


class ConfigureTest(CloudCase):
    """cs --configure asks, tries, and writes a section of ~/.cloudstack.ini."""

    def setUp(self):
        super().setUp()
        self.unset("endpoint", "key", "secret", "poll_interval", "timeout", "retry_backoff")
        self.path = os.path.join(self.home, ".cloudstack.ini")
        self.admin = self.cloud.users["admin"]
        self.answers = [self.cloud.endpoint, self.admin.key, self.admin.secret]

    def asking(self, code, *args, **options):
        """--configure with these answers on standard input, which must end with this exit code; what it says."""
        answers = options.get("answers", self.answers)
        with mock.patch("sys.stdin", io.StringIO("".join(answer + "\n" for answer in answers))):
            return self.fails(code, "--configure", *args)

    def text(self):
        return open_bytes(self.path).decode("utf-8")

    def assertWorks(self, *args):
        self.assertIn('"zone"', self.good("listZones", *args))

    def test_it_writes_a_section_that_works(self):
        err = self.asking(0)
        self.assertHolds(err, "Endpoint", "API key", "Secret key")
        self.assertHolds(err, "[cloudstack]", self.path)
        self.assertNotIn(self.admin.secret, err)
        self.assertEqual("[cloudstack]\nendpoint = {}\nkey = {}\nsecret = {}\n".format(*self.answers), self.text())
        self.assertEqual(["listCapabilities"], self.asked)
        self.assertWorks()

    def test_a_region(self):
        for args, region in ((["--region", "lab"], "lab"), (["-r", "my lab"], "my lab")):
            self.asking(0, *args)
            self.assertWorks("-r", region)
        self.configure(region="lagoon")
        self.asking(0)
        self.assertIn("[lagoon]\n", self.text())
        self.assertWorks()

    @each("region", "a]b", "[a", " a", "a\nb", "\n", "DEFAULT")
    def test_a_name_that_no_section_can_have(self, region):
        self.assertNotIn("Endpoint", self.asking(2, "--region", region))
        self.assertFalse(os.path.exists(self.path))

    def test_a_command_beside_it_is_a_mistake(self):
        """`cs --configure lab` does not write the section cloudstack."""
        self.asking(2, "lab")
        self.assertFalse(os.path.exists(self.path))

    def test_another_file(self):
        path = os.path.join(self.home, "other.ini")
        self.asking(0, "--config", path)
        self.assertFalse(os.path.exists(self.path))
        self.assertWorks("--config", path)

    @unittest.skipUnless(os.name == "posix", "needs file modes")
    def test_nobody_else_can_read_it(self):
        self.addCleanup(os.umask, os.umask(0))
        self.asking(0)
        self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)
        os.chmod(self.path, 0o644)
        self.asking(0, "--region", "lab")
        self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)

    @unittest.skipUnless(hasattr(os, "symlink"), "needs symbolic links")
    def test_a_symbolic_link_is_followed(self):
        os.mkdir(os.path.join(self.home, "dotfiles"))
        target = self.write("dotfiles/cs.ini", "# mine\n")
        os.symlink(os.path.join("dotfiles", "cs.ini"), self.path)
        self.asking(0)
        self.assertTrue(os.path.islink(self.path))
        self.assertTrue(open_bytes(target).startswith(b"# mine\n"))
        self.assertEqual(["cs.ini"], os.listdir(os.path.dirname(target)))
        self.assertWorks()

    def test_it_is_written_in_one_step(self):
        self.ini("[lab]\nendpoint = http://x/\n")
        with mock.patch("os.replace", side_effect=OSError("no")):
            err = self.asking(2)
        self.assertIn("cannot write", err)
        self.assertEqual("[lab]\nendpoint = http://x/\n", self.text())
        self.assertEqual([".cloudstack.ini"], [name for name in os.listdir(self.home) if "cloudstack" in name])

    @each("region, before, line", ("cloudstack", "# mine\n[cloudstack]\nkey = old\n", 2),
          ("lab", "[a]\nx = 1\n[lab] ; the second\nkey = 1\n", 3), ("lab", "[a]\nx = [b]\n [lab]\n[lab]\n", 4))
    def test_a_section_that_exists_is_not_edited(self, region, before, line):
        """It says where it is, before anything is asked."""
        self.ini(before)
        err = self.asking(2, "--region", region)
        self.assertEqual(([], before), (self.asked, self.text()))
        self.assertNotIn("API key", err)
        self.assertIn(f"[{region}] stands in {self.path}, line {line};", err)

    @each("number, before", *enumerate(
        ("", "\n\n", "# only a comment", "[lab]\nendpoint = http://x/", "\ufeff[lab]\nkey = old\n",
         "[lab]\nkey = old\r\n\r\n[a]\r\nkey = 1\r\n", "[DEFAULT]\ntimeout = 3\n[lab]\nkey = 1\n",
         "[Cloudstack]\nkey = 1\n", "[lab]\nheader_a = 1\n  [cloudstack]\nkey = 1\n", "[lab]\n  key = 1\n",
         "# page\x0cbreak = \u2028 x\n[lab]\nkey = a\x85b\x1cc\n", "[lab]\nkey = 1\n#[cloudstack]\n; x = 100%\n\n\n")))
    def test_everything_else_in_the_file_stays(self, number, before):
        """And what could be read before can be read afterwards, and says the same about other regions."""
        self.path = self.write(f"{number}.ini", before)
        other = self.others()
        self.asking(0, "--config", self.path)
        self.assertEqual(other, self.others())
        kept = before.lstrip("\ufeff").replace("\r\n", "\n").rstrip("\n")
        self.assertTrue(self.text().startswith(kept))
        self.assertWorks("--config", self.path)
        with mock.patch.dict(os.environ, CLOUDSTACK_CONFIG=self.path):
            settings = cs.read_config("cloudstack")
        self.assertEqual(self.answers, [settings[name] for name in ("endpoint", "key", "secret")])
        self.assertEqual("3" if "timeout = 3" in before else "10", str(settings["timeout"]))

    def others(self):
        parser = configparser_of(self.path)
        return {name: dict(parser.items(name)) for name in parser.sections() if name != "cloudstack"}

    @each("secret", "100%", "%", "%%", "%(endpoint)s", "a%b%%c%%%d", "a=b:c", "#x", ";x", "x # y ; z", "[lab]", '"x"',
          "'", "\u00e4\u20ac\U0001f680", "a  b", "a\tb", "%s", "$HOME", "key = value", "\\n", "x" * 3000)  # fmt: skip
    def test_secrets_of_every_kind_are_read_back_the_same(self, secret):
        self.ini("")
        self.asking(0, answers=[self.cloud.endpoint, "k" + secret, secret, "y"])
        settings = cs.read_config()
        self.assertEqual(("k" + secret, secret), (settings["key"], settings["secret"]))

    @each("more, code, written", (["n"], 1, False), ([""], 1, False), (["what?"], 1, False), ([], 2, False),
          (["y"], 0, True), (["YES"], 0, True))  # fmt: skip
    def test_credentials_that_fail_are_asked_about(self, more, code, written):
        self.ini("[lab]\nendpoint = http://x/\n")
        before = self.text()
        wrong = [self.cloud.endpoint, self.admin.key, "wrong"]
        self.ini(before)
        err = self.asking(code, answers=wrong + more)
        self.assertIn("401", err)
        self.assertNotIn("wrong", err)
        self.assertEqual((written, not written), ("secret = wrong\n" in self.text(), self.text() == before))

    def test_a_server_that_does_not_answer_is_asked_about(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{free.getsockname()[1]}/client/api"
            err = self.asking(1, answers=[endpoint, "k", "s", "n"])
        self.assertIn("refused", err)
        self.assertFalse(os.path.exists(self.path))

    @each("wrong, question", (["", "HIDDEN", "HIDDEN.example/client/api", "file:///HIDDEN", "http://HIDDEN:b@c/"],
                              "Endpoint"), (["", "  "], "API key"), ([""], "Secret key"))  # fmt: skip
    def test_an_answer_that_cannot_be_used_is_asked_for_again_before_the_next(self, wrong, question):
        """And is never repeated: it may be a secret, pasted one line too early."""
        endpoint, key, secret = self.answers
        place = ("Endpoint", "API key", "Secret key").index(question)
        answers = self.answers[:place] + wrong + self.answers[place:]
        self.ini("")
        err = self.asking(0, answers=answers)
        self.assertEqual(len(wrong) + 1, err.count(question))
        self.assertNotIn("HIDDEN", err)
        self.assertEqual(secret, cs.read_config()["secret"])

    def test_nothing_more_is_asked_for_while_an_answer_cannot_be_used(self):
        for answers, last in ((["nonsense"], "Endpoint"), ([self.cloud.endpoint, ""], "API key")):
            err = self.asking(2, answers=answers)
            self.assertEqual([], self.asked)
            self.assertNotIn("Secret key", err)
            self.assertEqual(last == "API key", "API key" in err)
            self.assertNotIn("Traceback", err)
            self.assertFalse(os.path.exists(self.path))

    def test_the_end_of_input_leaves_everything_as_it_was(self):
        self.ini("[lab]\n")
        for count in range(3):
            self.asking(2, answers=self.answers[:count])
            self.assertEqual("[lab]\n", self.text())
        with mock.patch("sys.stdin", None):
            self.assertNotIn("Traceback", self.fails(2, "--configure"))
        self.assertEqual("[lab]\n", self.text())

    @each("content", b"no section\n", b"[a]\n[a]\n", b"\xff\xfe", b"[cloudstack\n")
    def test_a_file_that_is_broken_is_not_made_worse(self, content):
        self.ini(content)
        err = self.asking(2)
        self.assertNotIn("Endpoint", err)  # told before the questions
        self.assertEqual(content, open_bytes(self.path))

    def test_a_place_that_cannot_be_written(self):
        err = self.asking(2, "--config", os.path.join(self.home, "no", "such", "folder.ini"))
        self.assertLacks(err, "Traceback", self.admin.secret)

    def test_certificates_of_the_file_are_used_for_the_trial(self):
        """A private authority's, for instance: without them the right answers would seem wrong."""
        self.ini("[DEFAULT]\nverify = /no/such/authority.pem\nheader_x-tenant = blue\n")
        self.asking(0)
        self.assertEqual("blue", self.cloud.requests[0].headers.get("X-Tenant"))
        self.assertIn("verify = /no/such/authority.pem", self.text())

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_on_a_terminal_the_secret_is_not_shown(self):
        typed = self.on_pty([sys.executable, CS_PATH, "--configure", "-r", "lab"], dict(os.environ, TERM="xterm"))
        for question, reply in zip((b"Endpoint", b"API key", b"Secret key"), self.answers):
            typed.wait_for(question)
            typed.wait_for(b": ")
            typed.type(reply + "\n")
        typed.wait_for(b"is written")
        self.assertEqual(0, typed.end())
        self.assertIn(self.admin.key, typed.text)
        self.assertNotIn(self.admin.secret, typed.text)
        self.assertWorks("-r", "lab")

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    @each("key, code", ("\x03", 130), ("\x04", 2))
    def test_ctrl_c_and_ctrl_d_on_a_terminal_leave_everything_as_it_was(self, key, code):
        self.ini("[lab]\n")
        typed = self.on_pty([sys.executable, CS_PATH, "--configure"], dict(os.environ, TERM="xterm"))
        for question, reply in zip((b"Endpoint", b"API key"), self.answers):
            typed.wait_for(question)
            typed.wait_for(b": ")
            typed.type(reply + "\n")
        typed.wait_for(b"Secret key")
        typed.wait_for(b": ")
        typed.type("half of it" + key if key == "\x03" else key)
        self.assertEqual(code, typed.end(), typed.text)
        self.assertLacks(typed.text, "Traceback", "half")
        self.assertEqual("[lab]\n", self.text())


def configparser_of(path):
    parser = configparser.RawConfigParser()
    with open(path, encoding="utf-8-sig") as file:
        parser.read_file(file)
    return parser


# === [9.7] names for ids ============================================================================================


class NamesForIdsTest(CloudCase):
    """name:web-01 in the place of an id."""

    def setUp(self):
        super().setUp()
        self.known()

    def row(self, table, name, **where):
        return next(row for row in self.cloud.cloud.tables[table] if row.get("name", row.get("username")) == name
                    and all(row.get(key) == value for key, value in where.items()))  # fmt: skip

    def change(self, row, **fields):
        patched = mock.patch.dict(row, fields)
        patched.start()
        self.addCleanup(patched.stop)

    def planned(self, *words):
        """The parameters that --dry-run says would be sent."""
        pairs = [line.partition("=")[::2] for line in self.good("--dry-run", *words).splitlines()[1:]]
        return {name: value for name, value in pairs if name.lower() not in OWN_PARAMETERS}

    def refused(self, *words):
        """What is said of a call that is not made; lists are all that the server was asked for."""
        del self.cloud.requests[:]
        code, out, err = self.main(*words)
        self.assertEqual((code, out), (2, ""))
        self.assertEqual([name for name in self.asked if not name.startswith("list")], [])
        self.assertRegex(err, r"\Acs: (?s:.*)\n    The call was not sent\.\n\Z")
        return err

    def test_what_names_become(self):
        web, db = (self.row("virtualmachine", name)["id"] for name in ("web-01", "db-01"))
        ours, north = self.row("virtualmachine", "cache-01"), self.row("zone", "north")["id"]
        net = self.row("network", "web", zonename="north", account="admin")["id"]
        self.change(ours, displayname="The cache, no. 1")
        for words, expected in (
            ("startVirtualMachine id=name:web-01", {"id": web}),
            ("startvirtualmachine ID=name:web-01", {"ID": web}),
            ("startVirtualMachine|id=name:The cache, no. 1", {"id": ours["id"]}),
            ("startVirtualMachine id=name:WEB-01", {"id": web}),
            ("startVirtualMachine id=name:web-11", {"id": self.row("virtualmachine", "web-11")["id"]}),  # a project's
            ("listVirtualMachines ids=name:web-01,name:db-01", {"ids": web + "," + db}),
            ("listVirtualMachines ids=name:web-01 ids=" + db, {"ids": web + "," + db}),
            ("listVirtualMachines|ids=name:The cache, no. 1,{},name:web-01".format(db),
             {"ids": ",".join([ours["id"], db, web])}),
            ("listVirtualMachines|zoneid=name:north|templateid=name:Debian 12",  # one id in two zones
             {"zoneid": north, "templateid": self.row("template", "Debian 12")["id"]}),
            ("listVirtualMachines networkid=name:web zoneid=name:north domainid=name:ROOT",
             {"networkid": net, "zoneid": north, "domainid": self.row("domain", "ROOT")["id"]}),
            ("listUsers id=name:admin", {"id": self.row("user", "admin")["id"]}),
            ("createVolume|name=x|projectid=name:apollo|diskofferingid=name:20 GB",
             {"name": "x", "projectid": self.row("project", "apollo")["id"],
              "diskofferingid": self.row("diskoffering", "20 GB")["id"]}),
        ):  # fmt: skip
            with self.subTest(words):
                self.assertEqual(self.planned(*words.split("|" if "|" in words else " ")), expected)
        self.assertLessEqual({name[:4] for name in self.asked}, {"list"})

    def test_the_same_case_first(self):
        self.change(self.row("virtualmachine", "db-01"), name="WEB-01")
        for name in ("web-01", "WEB-01"):
            expected = {"id": self.row("virtualmachine", name)["id"]}
            self.assertEqual(self.planned("startVirtualMachine", "id=name:" + name), expected)
        self.assertIn("has 2 of this name", self.refused("startVirtualMachine", "id=name:Web-01"))

    def test_what_is_no_name(self):
        path = self.write("id.txt", "name:web-01\n")
        for word, expected in (
            ('id="name:web-01"', "name:web-01"), ("id='name:x'", "name:x"), ("id=@" + path, "name:web-01"),
            ("id=@@name:x", "@name:x"), ("id=x,name:web-01", "x,name:web-01"), ("id=Name:x", "Name:x"),
        ):  # fmt: skip
            self.assertEqual(self.planned("startVirtualMachine", word), {"id": expected})
        for words in (["listVirtualMachines", "name=name:web-01"], ["createTags", "resourceids=name:x"]):
            name, _, value = words[1].partition("=")
            self.assertEqual(self.planned("--force", *words), {name: value})
        self.assertEqual(self.asked, [])
        words = ["createTags", "resourceids=name:x", "resourcetype=UserVm", "tags[0].key=a", "tags[0].value=b"]
        self.assertIn("resourceids: there is no list command", self.usage(*words))

    def test_a_name_without_the_word_is_answered_with_how_it_is_typed(self):
        for word, expected in (("id=web-01", "Try: id=name:web-01, if"), ("id=web 01", "Try: id='name:web 01', if"),
                               ("id=5", "Try: See cs"), ("id=" + str(uuid.uuid4()), "Try: See cs")):
            self.assertIn(expected, self.main("startVirtualMachine", word)[2])

    def test_none(self):
        err = self.refused("startVirtualMachine", "id=name:web-1")
        self.assertIn("id=name:web-1: listVirtualMachines has nothing of this name; did you mean", err)
        rows = re.findall(r"(?m)^      (\S+)  (web-\d+)  domain (\w+), (?:account|project) (\w+)", err)
        self.assertIn((self.row("virtualmachine", "web-11")["id"], "web-11", "ROOT", "apollo"), rows)
        self.assertIn((self.row("virtualmachine", "web-01")["id"], "web-01", "ROOT", "admin"), rows)
        self.assertIn("Rocky Linux 9", self.refused("listVirtualMachines", "templateid=name:rocky"))
        self.assertNotIn("did you mean", self.refused("startVirtualMachine", "id=name:nothing like it"))

    def test_several(self):
        err = self.refused("restartNetwork", "id=name:web", "--force")
        self.assertIn("id=name:web: listNetworks has 4 of this name; did you mean", err)
        for zone, account in itertools.product(("north", "south"), ("admin", "user")):
            row = self.row("network", "web", zonename=zone, account=account)
            facts = "zonename {}, domain {}, account {}".format(zone, row["domain"], account)
            self.assertIn("      {}  web  {}\n".format(row["id"], facts), err)
        self.change(self.row("virtualmachine", "db-01"), displayname="web-01")
        err = self.refused("destroyVirtualMachine", "id=name:web-01")
        self.assertIn("  db-01 / web-01  zonename south", err)

    def test_names_are_shown_so_that_they_do_no_harm(self):
        self.change(self.row("virtualmachine", "db-01"), name="evil" + EVIL_TITLE + "\nid")
        err = self.refused("startVirtualMachine", "id=name:evil")
        self.assertIn("evil\\x1b", err)
        self.assertNotIn("\x1b", err)
        self.assertEqual(err.count("\n"), 3)

    def test_what_the_look_up_asks(self):
        """One question for a name that is there, few rows; nothing is lost by that."""
        self.planned("listVolumes", "virtualmachineid=name:web-01", "id=name:ROOT-1")
        self.planned("listVirtualMachines", "templateid=name:Rocky Linux 9")
        self.assertEqual([self.sent(0)["keyword"], self.sent(-1)["keyword"]], ["web-01", "Rocky Linux 9"])
        self.assertEqual([self.sent(0)["listall"], self.sent(-1)["templatefilter"]], ["true", "executable"])

        del self.cloud.requests[:]
        last = self.cloud.cloud.tables["virtualmachine"][31]
        self.change(last, displayname="Müller % 1")
        with mock.patch.object(cs, "PAGE_SIZE", 5):
            self.assertEqual(self.planned("startVirtualMachine", "id=name:Müller % 1"), {"id": last["id"]})
        self.assertGreater(len(self.asked), 5)
        self.assertEqual([number for number in range(len(self.asked)) if "keyword" in self.sent(number)], [])

    def test_a_name_is_looked_up_once(self):
        self.planned("listVirtualMachines", "ids=name:web-01,name:web-01", "id=name:web-01")
        self.assertEqual(self.asked, ["listVirtualMachines"])

    def test_a_list_that_not_everybody_may_see(self):
        """`all` templates, and those of all projects."""
        refusal = {"errorcode": 431, "errortext": "Filter all can be specified by root admin only"}

        def answer(record):
            if record.params.get("templatefilter") == "all":
                return Answer(431, {"listtemplatesresponse": refusal})
            return Answer(200, {"listtemplatesresponse": {}})

        self.cloud.script("listTemplates", *[answer] * 20)
        self.assertIn("has nothing of this name", self.refused("listVirtualMachines", "templateid=name:x"))
        self.assertEqual({self.sent(number)["templatefilter"] for number in range(len(self.asked))},
                         {"executable", "self", "all"})  # fmt: skip

    def test_an_error_of_the_look_up_is_its_own(self):
        self.say_error("listZones", 530, "out of order")
        code, out, err = self.main("listVirtualMachines", "zoneid=name:north", "--dry-run")
        self.assertEqual(code, 1)
        self.assertIn("out of order\n  Asked: cs listZones keyword=north\n", err)

    def test_an_error_of_the_call_shows_what_was_typed(self):
        self.say_error("stopVirtualMachine", 530, "out of order")
        code, out, err = self.main("stopVirtualMachine", "id=name:web-01")
        self.assertEqual((code, self.sent()), (1, {"id": self.row("virtualmachine", "web-01")["id"]}))
        self.assertIn("  Asked: cs stopVirtualMachine id=name:web-01\n", err)

    def test_without_the_list_of_commands(self):
        os.unlink(self.cache_file())
        err = self.usage("startVirtualMachine", "id=name:web-01")
        self.assertEqual(err, "cs: id: names need cs --sync first\n")
        self.assertEqual(self.planned("listVirtualMachines", "name=name:x"), {"name": "name:x"})

    def test_they_are_looked_up_with_a_command_that_is_not_known(self):
        word = "virtualmachineid=name:web-01"
        self.assertEqual(self.planned("startAnew", word, "--force")["virtualmachineid"],
                         self.row("virtualmachine", "web-01")["id"])  # fmt: skip


# === [9.10] the shell ===============================================================================================


class ShellTest(CloudCase):
    """Lines on standard input that is no terminal."""

    def shell(self, *lines, args=(), code=0):
        """The lines in this process: (standard output, standard error)."""
        stdin = io.TextIOWrapper(io.BytesIO("".join(line + "\n" for line in lines).encode("utf-8")))
        with mock.patch("sys.stdin", stdin):
            found, out, err = self.main("--shell", *args)
        self.assertEqual(found, code, err)
        self.assertNotIn("Traceback", err)
        return out, err

    def test_lines_are_carried_out_one_after_another(self):
        out, err = self.shell("listZones -o text -c name", "", "  # a comment", "help", "exit", "listHosts")
        self.assertEqual((out, err), ("north\nsouth\n" + cs._HELP, ""))
        self.assertEqual(self.asked, ["listZones"])

    def test_words_are_those_of_a_shell(self):
        self.shell("\ufeffcs  listVirtualMachines 'name=a b' keyword=c\\ d displayname=\"#e\" account=f#g\r")
        expected = {"name": "a b", "keyword": "c d", "displayname": "#e", "account": "f#g"}
        self.assertEqual({name: self.sent()[name] for name in expected}, expected)

    @each("lines, code, err",
        (['listZones "x', "listZones -q"], 2, "cs: the line cannot be taken apart: No closing quotation\n"),
        (["listZones x", "listNothing -q"], 2, "cs: 'x' is not a correctly formatted option"),
        (["listNothing -q", "listZones x"], 1, "cs: 'x' is not a correctly formatted option"),
        (["--shell"], 2, "cs: --shell stands alone: it reads line by line what is to be done\n"),
        (["-q"], 2, "cs: no command given; see cs --help\n"),
        (["use nowhere"], 2, "Error: region 'nowhere' not in config\n"),
        (["listZones zoneid=\udcff"], 2, "cs: "),
    )  # fmt: skip
    def test_the_exit_code_is_the_first_that_is_not_0(self, lines, code, err):
        lines = [line.encode("utf-8", "surrogateescape") for line in lines]
        stdin = io.TextIOWrapper(io.BytesIO(b"\n".join(lines + [b"listZones"])))
        with mock.patch("sys.stdin", stdin):
            found, _, said = self.main("--shell")
        self.assertEqual((found, self.asked[-1:]), (code, ["listZones"]))
        self.assertEqual(said.count("\n"), 1, said)
        self.assertTrue(said.startswith(err), said)

    def test_what_cannot_be_a_shell(self):
        for args in (["listZones"], ["--sync"], ["--list"], ["--wait", "1"]):
            self.assertIn("--shell stands alone", self.usage("--shell", *args))
        with mock.patch("sys.stdin", None):
            self.assertEqual(self.main("--shell"), (0, "", ""))
        self.assertEqual(self.cs().stderr, "cs: no command given; see cs --help\n")

    def test_options_at_the_start_hold_for_every_line_whose_own_win(self):
        out, _ = self.shell("listZones", "listZones -o jsonl", "listZones -c id -q", args="-o text -c name".split())
        self.assertEqual(out.splitlines()[:4], ["north", "south", '{"name": "north"}', '{"name": "south"}'])
        self.assertEqual(len(out.splitlines()[4]), 36)
        self.assertIn("GET ", self.shell("listZones", args=["--dry-run"])[0])

    def test_one_connection_and_one_session_whatever_the_lines_options(self):
        admin = self.cloud.users["admin"]
        self.unset("key", "secret")
        self.configure(username="admin", password=admin.password)
        self.shell("listZones", "listZones --post", "listZones x", "listZones --timeout 60 -t", "listNothing -q",
                   "listZones --retry 1", code=2)  # fmt: skip
        self.assertEqual(len({record.connection for record in self.cloud.requests}), 1)
        expected = ["login", "listZones", "listZones", "listZones", "listNothing", "listZones", "logout"]
        self.assertEqual(self.asked, expected)
        self.assertEqual([record.method for record in self.cloud.requests][1:4], ["GET", "POST", "GET"])

    def test_what_a_line_sets_ends_with_it(self):
        seen = []

        def request(client, command, **params):
            names = ("timeout", "retry", "method", "trace", "recover")
            seen.append([client.get_setting(name) for name in names] + [client._state.progress])
            return {}

        self.sync()
        with mock.patch.object(cs.CloudStack, "_request", request):
            self.shell("listZones", "listZones --timeout 7 --retry 2 --post -t", "rebootVirtualMachine id=1",
                       "x --force")  # fmt: skip
        usual = [5.0, 0, "get", False]
        self.assertEqual(seen, [usual + [False, None], [7.0, 2, "post", True, False, None], usual + [True, None],
                                usual + [True, None]])  # fmt: skip

    def test_regions(self):
        ini = "[{}]\nendpoint = {}\nkey = {}\nsecret = {}\n"
        users = [self.cloud.users[name] for name in ("admin", "user")]
        self.unset("endpoint", "key", "secret")
        text = "".join(ini.format(*one) for one in zip(("cloudstack", "my lab"), [self.cloud.endpoint] * 2,
                       [user.key for user in users], [user.secret for user in users]))  # fmt: skip
        self.write(".cloudstack.ini", text, 0o644)
        out, err = self.shell("listZones", "listZones -r 'my lab'", "use my lab", "listZones", "use nowhere",
                              "listZones", "use", "listZones", code=2)  # fmt: skip
        keys = [record.params["apiKey"] for record in self.cloud.requests]
        self.assertEqual(keys, [users[number].key for number in (0, 1, 1, 1, 0)])
        self.assertEqual(len({record.connection for record in self.cloud.requests}), 3)  # `use` alone is the usual one
        self.assertEqual(err.count("holds a secret"), 3)
        self.assertIn("there are cloudstack, my lab", err)

    def test_the_list_of_commands_is_kept_in_memory_until_it_changes(self):
        self.sync()
        cs._read_catalog.cache_clear()
        with mock.patch.object(cs, "_Catalog", wraps=cs._Catalog) as read:
            self.shell("listZones -q", "listZones -q", "list zones", "help listZones")
        self.assertEqual(read.call_count, 1)
        api = {"listapisresponse": {"count": 1, "api": [api_entry(("listZones", "id!"))]}}
        self.cloud.script("listApis", Answer(200, api))
        out, err = self.shell("listZones -q", "--sync -q", "listZones", code=2)
        self.assertEqual(err, "cs: listZones needs id; see cs listZones --help\n")

    def test_the_rest_of_standard_input_may_be_a_value(self):
        self.shell("listZones name=@-", "nor", "th")
        self.assertEqual(self.sent()["name"], "nor\nth")

    @unittest.skipUnless(os.name == "posix", "needs POSIX")
    def test_a_closed_pipe_ends_it(self):
        reading, writing = os.pipe()
        os.close(reading)
        child = Child([sys.executable, CS_PATH, "--shell"], stdin=subprocess.PIPE, stdout=writing, env=dict(os.environ))
        os.close(writing)
        code, _, err = child.finish(b"listZones\nlistHosts\n")
        self.assertEqual((code, err, self.asked), (0, b"", ["listZones"]))

    def test_an_interrupt_ends_it_all_where_nobody_types(self):
        with mock.patch.object(cs.CloudStack, "_exchange", side_effect=[KeyboardInterrupt]):
            out, err = self.shell("listZones", "listHosts", code=130)
        self.assertEqual((out, err, self.asked), ("", "Interrupted.\n", []))

    @each("line, is_kept",
        ("listZones name=x", True), ("list password", True), ("updateUser password=@file name=x", True),
        ('listZones "name', True), ("updateUser password=@file", True),
        ("updateUser id=1 password=geheim", False), ("updateUser PASSWORD=@@x", False), ("x usersecretkey='y'", False),
        ('x "password=y', False), ("x password = y", False), ("x pass\\word=y", False), ("password: y", False),
        ("createTags tags[0].key=env tags[0].value=prod", True), ('{"secret": "y"}', False),
        ("createTags tags[0].key=password tags[0].value=y", False),
        ("createTags tags[0].key='\"my password\"' tags[0].value=@file", True),
        ("createTags tags[0].key='\"my password\"' tags[0].value=y", False),
        ("http://h/api?command=x&signature=y", False),
    )  # fmt: skip
    def test_what_holds_a_secret(self, line, is_kept):
        shell = cs._Shell(cs._parse_arguments([])[0])
        client = cs.CloudStack(self.cloud.endpoint, key="own-key", secret="own-secret")
        shell.clients["place"] = ({}, client)
        self.assertEqual(shell._holds_secret(line), not is_kept)
        self.assertTrue(shell._holds_secret("listZones name=own-secret"))


@unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
@unittest.skipUnless(hasattr(readline, "set_auto_history"), "needs CPython's readline")
class TypedShellTest(CloudCase):
    """A person at a terminal."""

    def setUp(self):
        super().setUp()
        self.known()
        user = self.cloud.users["admin"]
        text = "[{}]\nendpoint = {}\nkey = {}\nsecret = {}\n"
        sections = [text.format(name, self.cloud.endpoint, user.key, user.secret) for name in ("lab", "lab:two")]
        self.write(".cloudstack.ini", "\n".join(sections))
        self.history = os.path.join(self.home, ".local", "state", "cs", "history")

    def start(self, *args, prompt=b"127.0.0.1> ", **env):
        env = dict(os.environ, TERM="dumb", INPUTRC=os.devnull, **env)
        shell = Typed([sys.executable, CS_PATH] + list(args), env)
        self.addCleanup(shell.close)
        shell.wait_for(prompt)
        return shell

    def enter(self, shell, line, *words):
        shell.type(line + "\n")
        for word in words + (b"> ",):
            shell.wait_for(word)

    def end(self, shell, code=0):
        shell.type("\x04")
        self.assertEqual(shell.end(), code)
        self.assertNotIn("Traceback", shell.text)
        return shell.text

    def lines(self):
        return open_bytes(self.history).decode("utf-8").splitlines()

    def readline(self):
        try:
            import readline  # noqa: F401
        except ImportError:
            self.skipTest("this Python has no readline")

    def test_cs_alone_opens_it(self):
        shell = self.start()
        self.enter(shell, "listZones -o text -c name", b"north\r\n")
        self.enter(shell, "listNothing", b"no command 'listNothing'")
        self.enter(shell, "use lab", b"cs lab")
        self.enter(shell, "listZones -r lab:two -o text -c name", b"south")
        self.enter(shell, "use nowhere", b"'nowhere' not in config; there are lab, lab:two", b"cs lab")
        self.enter(shell, "help listZones", b"Lists zones.")
        text = self.end(shell)
        self.assertIn("In the shell: help", text)
        self.assertTrue(text.endswith("cs lab> \n"), text)

    def test_a_region_that_cannot_be_used_is_said_at_the_beginning(self):
        shell = self.start("--shell", "-q", "-r", "nowhere", prompt=b"cs nowhere> ")
        self.enter(shell, "use lab", b"cs lab")
        self.assertIn("region 'nowhere' not in config", self.end(shell))
        self.assertNotIn("In the shell", shell.text)

    def test_it_completes(self):
        self.readline()
        machine = self.cloud.cloud.named("virtualmachine", "web-01")["id"]
        self.unset("endpoint", "key", "secret")
        shell = self.start("-r", "lab:two", "--dry-run", prompt=b"cs lab:two> ")
        for typed, expected in (
            ("listZ\t-o te\t", b"command=listZones"), ("hel\tlistZ\t", b"Lists zones."),
            ("stopVirtualMachine id=" + machine[:9] + "\t", b"id=" + machine.encode()),
            ("listZones -r lab:\t", b"command=listZones"), ("us\tlab:t\t", b"cs lab:two"),
            ("list listZ\t", b"Lists zones."), ("listZones avail\ttrue", b"available=true"),
            ("stopVirtualMachine id=web-0\t1\t", b"id=" + machine.encode()),  # by its name
            ("stopVirtualMachine id=name:web-01", b"id=" + machine.encode()),
        ):  # fmt: skip
            self.enter(shell, typed, expected)
        shell.type("listV\t\t")
        shell.wait_for(b"listVirtualMachines  Lists the virtual")
        shell.type("\x15")
        self.write(".cloudstack.ini", "nonsense")
        self.enter(shell, "nosuch id=\t\t-r \t\t", b"cs: ")
        self.end(shell)

    def test_without_a_list_of_commands_it_says_how_to_get_one(self):
        self.readline()
        shutil.rmtree(os.path.join(self.home, ".cache"))
        shell = self.start()
        shell.type("listZ\t\t")
        shell.wait_for(b"to have commands completed, type: cs --sync")
        self.enter(shell, "ones -o text -c name", b"north")
        self.end(shell)

    def test_history(self):
        self.readline()
        os.makedirs(os.path.dirname(self.history))
        old = b"old-1\nold-2 \xff\n" + b"".join(b"line %d\n" % number for number in range(999))
        self.write(".local/state/cs/history", old, 0o644)
        shell = self.start()
        other = self.start()
        self.enter(other, "listHosts -q", b"")
        self.enter(shell, "updateUser id=1 password=geheim", b"cs: ")
        self.enter(shell, "  ", b"")
        self.enter(shell, "\x10", b"'998' is not")  # Ctrl-P, where no arrow is known: the one before
        self.enter(shell, "listZones nix", b"name=value")
        self.enter(shell, "\x10 -o text", b"name=value")
        self.end(shell)
        self.assertEqual(self.lines()[-3:], ["line 998", "listZones nix", "listZones nix -o text"])
        self.assertEqual(self.lines()[-5:-3], ["line 998", "listHosts -q"])
        self.assertEqual(len(self.lines()), 1000)
        self.assertEqual(os.stat(self.history).st_mode & 0o777, 0o600)

    def test_history_has_a_place_of_its_own(self):
        self.readline()
        for folder, variable in ((".local/state/cs", {}), ("a/b/cs", {"XDG_STATE_HOME": self.home + "/a/b"})):
            shell = self.start(**variable)
            self.enter(shell, "list zones", b"Lists zones")
            self.end(shell)
            path = os.path.join(self.home, folder)
            self.assertEqual(open_bytes(os.path.join(path, "history")), b"list zones\n")
            while path != self.home:
                self.assertEqual(os.stat(path).st_mode & 0o777, 0o700)
                path = os.path.dirname(path)

    def test_without_a_place_for_history_there_is_one_warning(self):
        self.readline()
        self.write("file", "")
        shell = self.start(XDG_STATE_HOME=os.path.join(self.home, "file"))
        self.enter(shell, "list zones", b"Lists zones")
        self.enter(shell, "list zones", b"Lists zones")
        self.assertEqual(self.end(shell).count("Warning: no history is kept: "), 1)

    def test_without_readline(self):
        os.mkdir(os.path.join(self.home, "none"))
        self.write("none/readline.py", "raise ImportError('not here')\n")
        shell = self.start(PYTHONPATH=os.path.join(self.home, "none"))
        self.enter(shell, "listZones -o text -c name", b"north")
        self.end(shell)
        self.assertFalse(os.path.exists(self.history))

    def interrupt(self, shell, *words):
        """Ctrl-C, once the shell waits for something: one before that may be lost in the interpreter."""
        CommandLineProcessTest.until_blocked(shell.child)
        shell.type("\x03")
        for word in words + (b"> ",):
            shell.wait_for(word)

    def test_an_interrupt_ends_the_call_and_not_the_shell(self):
        self.option(job_seconds=30)
        machine = self.cloud.cloud.named("virtualmachine", "web-01")["id"]
        shell = self.start()
        shell.type("nonsense")
        shell.wait_for(b"nonsense")
        self.interrupt(shell)
        shell.type("rebootVirtualMachine id={}\n".format(machine))
        until(lambda: "queryAsyncJobResult" in self.asked, "a look at the job")
        self.interrupt(shell, b"to go on waiting for it: cs --wait ")
        self.option(latency=20)
        del self.cloud.requests[:]
        shell.type("listZones\n")
        until(lambda: self.asked, "a request")
        self.interrupt(shell, b"Interrupted.")
        self.option(latency=0)
        self.enter(shell, "listZones -o text -c name", b"north")
        self.end(shell)
        self.assertEqual(self.asked, ["listZones", "listZones"])


# === [9.4] habits from elsewhere ====================================================================================


class HabitsTest(CloudCase):
    """What people type who come from other programs."""

    def setUp(self):
        super().setUp()
        self.list_path = self.known()

    @each("line, told",
        ("help", "help is an option: cs --help"), ("help listZones", "help is an option: cs listZones --help"),
        ("list zones", "there is no command 'list zones'; did you mean listZones?"),
        ("LIST Virtual machine name=x", "no command 'LIST Virtual machine'; did you mean listVirtualMachines?"),
        ("start vms id=1", "there is no command 'start vms'; did you mean startVirtualMachine?"),
        ("zones", "no command 'zones' for you; did you mean listZones?"),
        ("vm", "no command 'vm' for you; did you mean listVirtualMachines?"),
        ("listZones zones", "'zones' is not a correctly formatted option"),
        ("listZones --colums=x", "there is no option '--colums'; did you mean --columns?"),
        ("listZones --complet", "there is no option '--complet'; did you mean --completion?"),
        ("listZones --xyzzy", "there is no option '--xyzzy'; see cs --help"),
        ("listZones -x", "there is no option '-x'; see cs --help"),
    )  # fmt: skip
    def test_the_command_that_is_meant(self, line, told):
        self.assertIn(told, self.usage(*line.split()))

    def test_without_the_list_of_commands_nothing_is_guessed(self):
        os.unlink(self.list_path)
        self.assertIn("'zones' is not a correctly formatted option", self.usage("list", "zones"))
        self.unset("endpoint", "key", "secret")
        self.assertIn("help is an option", self.usage("help"))

    def test_profile_is_region(self):
        for flag in ("-p", "--profile", "-r"):
            self.assertIn("region 'nowhere' not in config", self.usage("listZones", flag, "nowhere"))
        self.write(".cloudstack.ini", "[lab]\nendpoint = x\n")
        self.assertEqual(self.good("--complete=cs listZones --profile l"), "lab\n")

    def test_states_are_coloured(self):
        states = {32: "Running enabled Ready Implemented", 33: "Starting Migrating Maintenance",
                  31: "Error Alert Down UploadError", None: "Stopped Free"}  # fmt: skip
        colors, names = zip(*[(color, state) for color in states for state in states[color].split()])
        rows = [{"name": state, "state": state} for state in names]
        self.reply("listZones", *[{"count": len(rows), "thing": rows}] * 4)
        lines = self.good("listZones", "-o", "table", "--color", "always", "-c", "state,name").splitlines()
        plain = self.good("listZones", "-o", "table", "-c", "state,name").splitlines()
        self.assertEqual([re.sub("\x1b\\[[0-9]*m", "", line) for line in lines], plain)
        for row, color, line in zip(rows, colors, lines[1:]):
            shown = "\x1b[{}m{}\x1b[0m".format(color, row["state"]) if color else row["state"]
            self.assertEqual(line, shown + " " * (13 - len(row["state"])) + row["name"])
        with mock.patch.dict(os.environ, NO_COLOR="1"):
            self.assertNotIn("\x1b", self.on_terminal("listZones", "-o", "table")[1])
        narrow = self.on_terminal("listZones", "-o", "table", columns=12)[1]
        self.assertRegex(narrow, "\x1b\\[32mRun\\w*…\x1b\\[0m")
        self.assertEqual([line for line in screen(narrow).splitlines() if columns_of(line) > 12], [])


# === [9.8, 9.9] rows: --where and --each ============================================================================


class WhereTest(CloudCase):
    ROWS = [
        {"id": "1", "name": "web-01", "on": True, "size": 2048, "n": "2048", "when": "2026-01-02T00:00:00+0000",
         "tags": [{"key": "env", "value": "prod"}, {"key": "role", "value": "web"}], "nic": [{"ip": ["a", "b"]}]},
        {"id": "2", "name": "Web 02", "on": False, "size": 512.5, "n": "1e3", "tags": [], "details": {"cpu": 4}},
        {"id": "3", "name": "db", "size": 2**80 + 1, "n": "x", "when": "2025-12-31T00:00:00+0000",
         "tags": [{"key": "env", "value": "test"}]},
    ]  # fmt: skip

    def rows(self, times=1):
        for _ in range(times):
            self.reply("listThings", {"count": 3, "thing": self.ROWS})

    def met(self, *conditions):
        """The ids of the rows that meet these, joined."""
        self.rows()
        words = [word for condition in conditions for word in ("--where", condition)]
        return "".join(self.good("listThings", "-o", "text", "-c", "id", "-q", *words).split())

    @each("condition, ids",
        ("name=db", "3"), ("name=DB", ""), (" name = db ", "3"), ("name==db", "3"), ("name!=db", "12"),
        ("name~^web", "12"), ("name=~B", "123"), ("name~0[12]$", "12"), ("name~", "123"), ("name~=", ""),
        ("size=2048", "1"), ("n=2048", "1"), ("n=2048.0", "1"), ("n=1000", "2"), ("size>512", "123"),
        ("size<=512.5", "2"),
        ("size>=2048", "13"), ("size<2048", "2"), ("n>999", "12"), ("n<x", ""), ("n>=x", "3"), ("size>x", ""),
        ("size>1208925819614629174706176", "3"), ("size=1208925819614629174706176", ""), ("size<" + "9" * 5000, "123"),
        ("on=true", "1"), ("on!=true", "23"), ("on=True", ""), ("when<2026", ""), ("when<2026-01-01", "3"),
        ("when>=2026-01-01", "1"), ("when=", "2"), ("when!=", "13"), ("when<~", "13"),
        ("tags.key=env", "13"), ("tags.key!=env", "2"), ("tags.value~^w", "1"), ("tags=", "2"),
        ("tags.1.key=role", "1"),
        ("nic.ip=b", "1"), ("nic.ip!=b", "23"), ("details.cpu>3", "2"), ("details~cpu", "2"),
        ("zzz=1", ""), ("zzz!=1", "123"),
    )  # fmt: skip
    def test_a_condition(self, condition, ids):
        self.assertEqual(self.met(condition), ids)

    def test_all_of_them_must_hold(self):
        self.assertEqual(self.met("tags.key=env", "name~web"), "1")
        self.assertEqual(self.met("tags.key=env", "name~web", "size<5"), "")

    @each("condition", "", "name", "=x", " =x", "name!x", "!=x", "~x")
    def test_what_is_no_condition(self, condition):
        err = self.usage("listThings", "--where", condition)
        self.assertEqual(err.count("\n"), 1)
        self.assertIn("--where {!r}: it should be COLUMN=VALUE".format(condition), err)

    @each("pattern", "(", "*", "a{99999999999}", "(?<x", "(" * 5000)
    def test_a_pattern_that_is_none(self, pattern):
        err = self.usage("listThings", "--where", "name=x", "--where", "name~" + pattern)
        self.assertEqual(err.count("\n"), 1)
        self.assertIn("no regular expression", err)

    def test_every_format(self):
        for shape, expected in (
            ("table", "id  name\n1   web-01\n"), ("csv", "id,name\r\n1,web-01\r\n"), ("text", "1\tweb-01\n"),
            ("jsonl", '{"id": "1", "name": "web-01"}\n'),
        ):  # fmt: skip
            for more in ([], ["--all"], ["--sort", "-id"]):
                self.rows()
                out = self.good("listThings", "-o", shape, "-c", "id,name", "--where", "name=web-01", *more)
                self.assertEqual(out, expected)
        for shape, nothing in ("table", ""), ("csv", "id\r\n"), ("text", ""), ("jsonl", ""):
            self.rows(2)
            self.assertEqual(self.good("listThings", "-o", shape, "-c", "id", "--where", "id=9"), nothing)
            self.assertNotIn("web", self.good("listThings", "-o", shape, "--where", "id=9"))

    def test_json_keeps_its_envelope_and_counts_what_is_left(self):
        self.rows(4)
        out = json.loads(self.good("listThings", "--where", "tags.key=env"))
        self.assertEqual(out, {"count": 2, "thing": [self.ROWS[0], self.ROWS[2]]})
        out = json.loads(self.good("listThings", "--where", "tags.key=env", "--sort", "-id", "-c", "id"))
        self.assertEqual(out, {"count": 2, "thing": [{"id": "3"}, {"id": "1"}]})
        self.assertEqual(json.loads(self.good("listThings", "--where", "id=9")), {"count": 0, "thing": []})
        self.assertEqual(json.loads(self.good("listThings", "--where", "id=2", "--all")), [self.ROWS[1]])

    def test_one_object_is_one_row(self):
        thing = {"thing": {"id": "1", "count": 7}}
        for shape in cs.FORMATS:
            self.reply("getThing", thing, thing)
            self.assertIn("7", self.good("getThing", "-o", shape, "--where", "id=1"))
            self.assertEqual(self.good("getThing", "-o", shape, "--where", "id!=1"), "")

    def test_a_list_that_was_cut_short_says_that_a_part_was_seen(self):
        self.reply("listThings", *[{"count": 7, "thing": self.ROWS}] * 2)
        code, out, err = self.main("listThings", "--where", "id=1", "-o", "text", "-c", "id")
        self.assertEqual((code, out, err), (0, "1\n", "3 of 7 seen by --where; --all for the rest\n"))

    def test_a_column_that_no_row_has(self):
        for more in ([], ["-o", "csv"], ["--all", "-o", "jsonl"]):
            self.rows()
            code, out, err = self.main("listThings", "-c", "id,nmae", "--where", "nmae=x", "--where", "when!=y", *more)
            self.assertEqual((code, err), (0, "Warning: no row has 'nmae'; did you mean name?\n"))

    def test_a_column_that_the_answer_cannot_have_is_refused(self):
        self.sync()
        for condition in "nmae!=web-01", "nmae=x":
            err = self.usage("listVirtualMachines", "--where", condition)
            self.assertIn("listVirtualMachines returns no 'nmae'; did you mean name", err)
        self.assertEqual([], self.asked)
        self.good("listVirtualMachines", "--where", "nic.ipaddress~^10", "--where", "hostname!=", "-o", "text")
        self.assertEqual(0, self.main("listVirtualMachines", "--force", "--where", "nmae!=x", "-o", "text")[0])

    def test_text_has_no_rows(self):
        self.assertIn("json=false", self.usage("listThings", "json=false", "--where", "id=1"))

    def test_rows_that_meet_it_are_written_while_others_are_still_to_come(self):
        """A process that reads the first row of the first page, while the second page is held back."""
        release, rest = threading.Event(), [{"id": str(number)} for number in range(500)]
        self.addCleanup(release.set)
        self.cloud.script("listThings", Answer(200, {"r": {"count": 501, "thing": [{"id": "x", "n": 1}] + rest[:499]}}),
                          lambda record: release.wait(20) and Answer(200, {"r": {"count": 501, "thing": rest[499:]}}))
        command = [sys.executable, CS_PATH, "listThings", "--all", "-o", "jsonl", "--where", "n=1"]
        child = Child(command, env=dict(os.environ))
        self.addCleanup(child.end)
        self.assertEqual(child.stdout.readline(), b'{"id": "x", "n": 1}\n')
        release.set()
        self.assertEqual(child.finish(), (0, b"", b""))


class EachCase(CloudCase):
    def each(self, stdin, *args):
        """main() with --each and this on standard input: (exit code, standard output, standard error)."""
        if not isinstance(stdin, str):
            stdin = "".join(json.dumps(row) + "\n" for row in stdin)
        stream = io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape")), encoding="utf-8")
        with mock.patch.object(sys, "stdin", stream):
            return self.main("--each", *args)

    def refused(self, stdin, *args):
        """What is said of rows or a line for which nothing may be sent."""
        del self.cloud.requests[:]
        code, out, err = self.each(stdin, *args)
        self.assertEqual((code, out, self.asked), (2, "", []))
        self.assertEqual(err.count("\n"), 1, err)
        return err

    def values(self, stdin, *args):
        """The values that doThing was called with for each row, in the order of rows."""
        code, out, err = self.each(stdin, "doThing", "--parallel", "1", *args)
        self.assertEqual((code, err), (0, ""), out)
        found = [self.sent(index).get("x") for index in range(len(self.asked))]
        del self.cloud.requests[:]
        return found

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
    def test_a_name_is_looked_up_once_for_all_rows(self):
        self.sync()
        rows = [{"n": number} for number in range(30)]
        code, out, err = self.each(rows, "rebootVirtualMachine", "id=name:web-01")
        self.assertEqual((0, 30), (code, out.count('"result"')), err)
        self.assertEqual(1, self.asked.count("listVirtualMachines"))

    def test_not_within_a_shell(self):
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"listZones --each\n"))):
            code, out, err = self.main("--shell")
        self.assertEqual((2, ""), (code, out))
        self.assertIn("--each reads standard input", err)

    def test_rows_in_every_form(self):
        rows = [{"id": "a"}, {"id": "b"}]
        answer = {"count": 2, "thing": rows}
        for text in (
            '{"id": "a"}\n{"id": "b"}\n', '\r\n{"id": "a"}\r\n\r\n{"id": "b"}', json.dumps(rows),
            json.dumps(rows, indent=2), json.dumps(answer), json.dumps(answer, indent=2),
            json.dumps(rows[0], indent=2) + json.dumps(rows[1], indent=2), "\ufeff" + json.dumps({"thing": rows}),
            '{"row": {"id": "a"}, "unsent": true}\n{"id": "b"}', "[{}]\n[{}]".format(*map(json.dumps, rows)),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(self.values(text, "x={id}"), ["a", "b"])
        for text in ("a\nb\n", "a\r\n\n  b \r\n\n", '"a" "b"\n', '["a", "b"]', '["a"]\n"b"'):
            with self.subTest(text):
                self.assertEqual(self.values(text, "x={}"), ["a", "b"])
        self.assertEqual(self.values("7\ntrue\n-\n", "x={}"), ["7", "true", "-"])

    def test_one_row_that_holds_a_list_is_no_answer(self):
        row = {"name": "a", "nic": [{"ip": "1"}, {"ip": "2"}]}
        self.assertEqual(self.values([row], "x={name}:{nic.ip}:{nic.1.ip}"), ["a:1,2:2"])

    def test_what_is_filled_in(self):
        row = {"id": "a", "n": 7, "on": True, "empty": "", "a.b": "dot", "d": {"k": ["p", "q"]}, "s p": "space"}
        for word, expected in (
            ("x={id}", "a"), ("x=<{id}-{n}-{id}>", "<a-7-a>"), ("x={on}", "true"), ("x={a.b}", "dot"),
            ("x={d.k}", "p,q"), ("x={d}", '{"k":["p","q"]}'), ("x={d.k.1}", "q"), ("x={{id}}", "{id}"),
            ("x={{{id}}}", "{a}"), ("x=}}{{", "}{"),
            ("x='{id} '", "a "), ("x=@@{id}", "@a"), ("x={empty}", ""), ("x={s p}", "space"), ("x=plain", "plain"),
            ("x={}", json.dumps(row, sort_keys=True, separators=(",", ":"))), (" x = {id} ", "a"),
        ):  # fmt: skip
            with self.subTest(word):
                self.assertEqual(self.values([row], word), [expected])
        self.assertEqual(self.values([row], "x={id}", "x={n}"), ["a,7"])  # joined in their order, as ever

    def test_a_value_of_a_row_is_never_more_than_text(self):
        secret = self.write("secret", "CANARY")
        for text in ("@" + secret, "@-", "@@x", "'q'", '"q"', " s ", "name:web-01", "{id}", "{{", "a=b", "\u00e9", '"'):
            with self.subTest(text):
                self.assertEqual(self.values([{"id": text}], "x={id}"), [text])

    def test_a_file_is_read_once_and_its_braces_are_its_own(self):
        path = self.write("data", '{"id": "{id}"}\n')
        with mock.patch.object(cs, "_read_text", side_effect=cs._read_text) as reading:
            self.assertEqual(self.values("a\nb\n", "x=@" + path), ['{"id": "{id}"}'] * 2)
        self.assertEqual([call for call in reading.call_args_list if path in call[0]], reading.call_args_list[:1])

    def test_a_field_that_a_row_lacks_stops_everything_before_the_first_call(self):
        for rows, field, says in (
            ([{"id": "1", "name": "n"}, {"name": "m"}], "id", "row 2, {\"name\": \"m\"}: there is no 'id'"),
            ([{"nmae": "1"}], "name", "did you mean nmae?"), ([{"id": None}], "id", "row 1, "),
            ("a\nb\n", "id", 'row 1, "a": '),
            ([{"n": 1, "nic": []}], "nic.0.ip", "no 'nic.0.ip'"), ([{"id": "x" * 500}], "no", "x…: there is no 'no'"),
        ):  # fmt: skip
            with self.subTest(field):
                self.assertIn(says, self.refused(rows, "doThing", "x={%s}" % field))
        for word in "x={id", "x=id}", "x={{id}", "x={a{id}}":
            self.assertIn("a brace that is text is written twice", self.refused([{"id": "1"}], "doThing", word))

    def test_rows_that_cannot_be_read(self):
        for text in (
            '{"id": 1}\n{"id": 2', '{"id": 1},\n', "[1, 2", '{"id": 1}\nweb-02\n', "[" * 100000, '{"id": 1x}',
        ):  # fmt: skip
            with self.subTest(text[:30]):
                self.assertIn("standard input, line ", self.refused(text, "doThing"))
        self.assertIn("line 3", self.refused("{}\n{}\nx", "doThing"))
        self.assertIn("not UTF-8", self.refused("\udcff", "doThing"))
        self.assertIn("row 2, ", self.refused(["a", "b\u0007"], "doThing", "x={}"))
        self.assertIn("U+0007", self.refused(["b\u0007"], "doThing", "x={}"))
        with mock.patch.object(sys, "stdin", None):
            self.assertIn("no standard input", self.usage("doThing", "--each"))

    def test_no_rows(self):
        for text in "", "\n \n", "[]", '{"count": 0, "thing": []}', "{}":
            code, out, err = self.each(text, "doThing", "x={id}")
            self.assertEqual((code, out, err, self.asked), (0, "", "No rows on standard input: nothing to do\n", []))

    def test_options_that_make_no_sense(self):
        for words in (
            "--parallel 0", "--parallel x", "--parallel=-1", "--parallel 1.5", "-c id", "--sort id", "--shell", "x=@-",
            "json=false", "x",
        ):  # fmt: skip
            with self.subTest(words):
                self.refused(["a"], "doThing", *words.split())
        for words in "--parallel 2", "--parallel x", "--stop-on-error":
            self.assertIn("without --each", self.usage("doThing", *words.split()))
        self.refused(["a"], "--wait", "j")
        self.refused(["a"], "--list", "x")
        self.refused(["a"])

    def test_where_chooses_among_the_rows(self):
        rows = [{"id": "a", "state": "Running"}, {"id": "b", "state": "Stopped"}]
        self.assertEqual(self.values(rows, "x={id}", "--where", "state!=Running"), ["b"])
        for condition in "stat=Running", "stat!=Running":  # the latter would hold for every row
            self.assertIn("no row has 'stat'; did you mean state?", self.refused(rows, "doThing", "--where", condition))
        self.assertEqual((0, "", "None of the rows meets --where: nothing to do\n"),
                         self.each(rows, "doThing", "--where", "state=Lost"))  # fmt: skip

    def test_a_line_of_json_for_each_row(self):
        self.say_error("breakThing", 431, "no such thing")
        self.reply("breakThing", {"success": False, "displaytext": "hm"}, {"success": "true"})
        code, out, err = self.each(["a", "b", "c"], "breakThing", "--parallel", "1")
        a, b, c = self.lines(out)
        self.assertEqual((code, err), (1, "1 done, 2 failed, of 3 rows\n"))
        self.assertEqual((a["row"], a["outcome_unknown"], a["error"]["errorcode"]), ("a", False, 431))
        self.assertEqual(a["error"]["errortext"], "no such thing")
        message = '{"displaytext":"hm","success":false}'
        self.assertEqual(b, {"row": "b", "error": {"message": message}, "outcome_unknown": False})
        self.assertEqual(c, {"row": "c", "result": {"success": "true"}})
        self.say_error("breakThing", 431)
        self.assertEqual(self.each(["a"], "breakThing", "-q")[::2], (1, ""))

    def test_the_other_formats_come_at_the_end_in_the_order_of_rows(self):
        def fail_late(record):
            if record.params["x"] != "1":
                return Answer(200, {"r": {"a": 1}})
            time.sleep(0.1)
            return Answer(431, {"r": {"errorcode": 431, "errortext": "no"}})

        self.option(scripted=fail_late)
        rows = [{"account": "x", "id": "1", "n": 1}, {"zone": "z", "name": "two", "n": 2}, {"zone": "z", "n": 3}]
        for shape, expected in (
            ("table", "row  state   error\n1    failed  no\ntwo  done\nz    done\n"),
            ("text", "1\tfailed\tno\ntwo\tdone\t\nz\tdone\t\n"),
            ("csv", "row,state,error\r\n1,failed,no\r\ntwo,done,\r\nz,done,\r\n"),
        ):  # fmt: skip
            code, out, err = self.each(rows, "failLate", "x={n}", "-o", shape)
            self.assertEqual((code, out, err), (1, expected, "2 done, 1 failed, of 3 rows\n"))

    def test_a_lost_answer_says_that_the_outcome_is_unknown(self):
        self.configure(recover="false")
        self.cloud.script("loseThing", DROP)
        code, out, err = self.each(["a"], "loseThing")
        (line,) = self.lines(out)
        self.assertEqual((code, line["outcome_unknown"], self.asked), (1, True, ["loseThing"]))
        self.assertEqual(err, "1 unknown, of 1 rows\n")
        self.cloud.script("loseThing", DROP)
        self.assertEqual(self.each(["a"], "loseThing", "-o", "text")[1].split("\t")[:2], ["a", "unknown"])

    def test_a_job_that_outlives_its_time_is_said_with_its_id(self):
        self.configure(job_timeout="0.05")
        self.option(job_seconds=30)
        rows = self.machines(1)
        code, out, err = self.each(rows, "rebootVirtualMachine", "id={id}", "-q")
        (line,) = self.lines(out)
        self.assertEqual(code, 1)
        self.assertIn("to go on waiting for it: cs --wait " + line["error"]["jobid"], err)

    def test_a_failure_stops_what_is_not_started_if_that_is_wanted(self):
        rows = list("abcdef")
        release = threading.Event()

        def fail(record):
            release.set()
            return Answer(431, {"r": {"errorcode": 431, "errortext": "no"}})

        def wait(record):
            release.wait(20)
            time.sleep(0.05)
            return Answer(200, {"r": {"a": 1}})

        self.cloud.script("doOther", fail, wait)
        code, out, err = self.each(rows, "doOther", "x={}", "--parallel", "2", "--stop-on-error")
        lines = self.lines(out)
        self.assertEqual((code, len(self.asked), err.split("\n")[0]), (1, 2, "1 done, 1 failed, 4 unsent, of 6 rows"))
        self.assertEqual(lines[2:], [{"row": row, "unsent": True} for row in "cdef"])
        again = "".join(line for line in out.splitlines(True) if '"unsent": true' in line)
        self.assertEqual(self.values(again, "x={}")[-4:], list("cdef"))
        self.say_error("doOther", 431)
        self.reply("doOther", *[{"a": 1}] * 5)
        self.assertEqual(self.each(rows, "doOther", "x={}")[2], "5 done, 1 failed, of 6 rows\n")

    def test_the_list_of_commands_is_looked_at_once(self):
        self.known()
        rows = self.machines()
        self.assertIn("no parameter 'nmae'", self.each(rows, "stopVirtualMachine", "id={id}", "nmae={name}")[2])
        with mock.patch.object(cs, "_cached_catalog", side_effect=cs._cached_catalog) as reading, later(40 * 86400):
            code, out, err = self.each(rows, "listvirtualmachines", "id={id}", "nmae={name}", "--dry-run")
        self.assertEqual((code, err.count("Warning"), reading.call_count), (0, 1, 1))
        self.assertEqual(out.count("command=listVirtualMachines\n"), 20)
        self.assertIn("needs id", self.refused([{"id": "x"}, {"id": ""}], "stopVirtualMachine", "id={id}"))

    def test_dry_run_shows_every_call_and_sends_none(self):
        code, out, err = self.each(self.machines(3), "stopVirtualMachine", "id={id}", "password={name}", "--dry-run")
        self.assertEqual((code, err, self.asked), (0, "", []))
        self.assertEqual(re.findall("(?m)^id=(.*)$", out), [row["id"] for row in self.machines(3)])
        self.assertEqual(out.count("password=***"), 3)

    def test_lists_and_async(self):
        zones = json.loads(self.good("listZones", "-c", "id"))["zone"]
        code, out, err = self.each(zones, "listVirtualMachines", "zoneid={id}", "pagesize=5", "--all")
        self.assertEqual((code, sum(len(line["result"]) for line in self.lines(out))), (0, 32))
        code, out, err = self.each(self.machines(2), "rebootVirtualMachine", "id={id}", "--async")
        self.assertEqual([set(line["result"]) >= {"jobid"} for line in self.lines(out)], [True] * 2)

    def test_a_session_logs_in_once_and_out(self):
        self.unset("key", "secret")
        self.configure(username="admin", password=self.cloud.users["admin"].password)
        self.assertEqual(self.each(self.machines(5), "listVirtualMachines", "id={id}")[0], 0)
        self.assertEqual((self.asked.count("login"), self.asked.count("logout")), (1, 1))

    @each("count, args", (10, []), (3, ["--parallel", "3"]), (1, ["--parallel", "1"]))
    def test_so_many_are_under_way_at_once_and_no_more(self, count, args):
        """A thousand rows: the threads that are started are as many as calls at once, and so are the connections."""
        most = []

        def workers():
            return len([thread for thread in threading.enumerate() if re.match(r"cs-\d", thread.name)])

        def scripted(record):
            most.append(workers())
            return Answer(200, {"r": {"done": record.params["x"]}})

        until(lambda: not workers(), "the end of other tests' workers")
        del self.cloud.requests[:]
        self.option(scripted=scripted)
        code, out, err = self.each(map(str, range(1000)), "doThing", "x={}", *args)
        self.assertEqual((code, err, len(self.asked)), (0, "", 1000))
        self.assertEqual(sorted(int(line["result"]["done"]) for line in self.lines(out)), list(range(1000)))
        self.assertLessEqual(max(most), count)
        self.assertLessEqual(len({record.connection for record in self.cloud.requests}), count)
        until(lambda: not workers(), "the end of the workers")

    def test_jobs_are_waited_for_together(self):
        self.option(job_seconds=0.4)
        code, out, err = self.each(self.machines(), "rebootVirtualMachine", "id={id}", "--parallel", "20")
        self.assertEqual((code, err, len(self.lines(out))), (0, "", 20))
        self.assertIn("listAsyncJobs", self.asked)
        self.assertLess(self.asked.count("queryAsyncJobResult"), 20 * 3)

    def test_progress_is_shown_on_a_terminal_and_gone_afterwards(self):
        terminal = FakeTerminal()
        with mock.patch.object(sys, "stderr", terminal), mock.patch.dict(os.environ, TERM="xterm"):
            stream = io.TextIOWrapper(io.BytesIO(b"a\nb\nc\n"), encoding="utf-8")
            with mock.patch.object(sys, "stdin", stream), contextlib.redirect_stdout(terminal):
                self.say_error("doOther", 431)
                self.reply("doOther", {"a": 1})
                self.say_error("doOther", 431)
                self.assertEqual(cs.main(["doOther", "--each", "--parallel", "1"]), 1)
        text = terminal.getvalue()
        self.assertIn("\x1b[K1 running, of 3", text)
        for shown in "1 failed, 1 running, of 3", "1 done, 1 failed, 1 running, of 3", "1 done, 2 failed, of 3":
            self.assertIn("\x1b[K{}\r".format(shown), text)
        self.assertRegex(screen(text), r"\A(\{.*\}\n){3}1 done, 2 failed, of 3 rows\n\Z")


class EachProcessTest(EachCase):
    """What only processes show: pipes between them, readers that go away, Ctrl-C."""

    def start(self, *args, **options):
        command = [sys.executable, CS_PATH] + list(args)
        child = Child(command, stdin=subprocess.PIPE, env=dict(os.environ), **options)
        self.addCleanup(child.end)
        return child

    def test_one_command_line_feeds_another(self):
        line = ('"$0" "$1" listVirtualMachines --all --where state=Running --where name~-0 -c id,name -o jsonl |'
                ' "$0" "$1" stopVirtualMachine id={id} --each')  # fmt: skip
        running = self.machines()
        child = Child(["sh", "-c", line, sys.executable, CS_PATH], env=dict(os.environ))
        code, out, err = child.finish()
        self.assertEqual((code, err), (0, b""))
        lines = self.lines(out.decode("utf-8"))
        self.assertGreaterEqual(len(lines), len(running))
        self.assertEqual({line["result"]["virtualmachine"]["state"] for line in lines}, {"Stopped"})
        stopped = [record.params["id"] for record in self.cloud.requests if record.command == "stopVirtualMachine"]
        self.assertEqual(sorted(stopped), sorted(line["row"]["id"] for line in lines))
        self.assertEqual(self.each([line["row"] for line in lines], "startVirtualMachine", "id={id}")[0], 0)

    @posix_only
    def test_a_reader_that_goes_away_stops_what_is_not_started(self):
        """What ran then is said on standard error, whatever came of it."""
        self.option(job_seconds=0.5)
        child = self.start("rebootVirtualMachine", "id={id}", "--each", "--parallel", "2", "-q")
        child.stdout.close()
        child.stdin.write("".join(json.dumps(row) + "\n" for row in self.machines()).encode())
        child.stdin.close()
        err = child.stderr.read().decode("utf-8")
        self.assertEqual(child.wait(), 1)
        *lines, counted = err.splitlines()
        self.assertEqual(len(self.lines("\n".join(lines))), self.asked.count("rebootVirtualMachine"))
        self.assertEqual(counted, "2 done, 18 unsent, of 20 rows")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk(self):
        for more in [], ["-o", "table"]:
            with open("/dev/full", "wb") as full:
                child = self.start("doThing", "--each", *more, stdout=full)
                code, _, err = child.finish(b"a\n")
            self.assertEqual(code, 1)
            self.assertIn(b"No space left on device", err)

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_an_interrupt_says_what_was_done_what_runs_and_what_was_never_sent(self):
        """On a real terminal, rows from a file, standard output in another: its lines of unsent rows are sent then."""
        rows = self.machines(8)
        self.write("rows", "".join(json.dumps(row) + "\n" for row in rows))
        self.option(job_seconds=30)
        shell = '"$0" "$1" rebootVirtualMachine "id={id}" --each --parallel 3 <"$HOME/rows" >"$HOME/out"'
        command = ["/bin/sh", "-c", "exec " + shell, sys.executable, CS_PATH]
        typed = Typed(command, dict(os.environ, TERM="xterm"), columns=200)
        self.addCleanup(typed.close)
        typed.wait_for(b"3 running, of 8")
        until(lambda: self.asked.count("rebootVirtualMachine") == 3 and len(self.asked) > 6, "looks at three jobs")
        typed.type("\x03")
        self.assertEqual(typed.end(), 130)
        text = screen(typed.text).replace("^C", "")
        lines = self.lines(open_bytes(os.path.join(self.home, "out")).decode("utf-8"))
        jobs = [line["error"]["jobid"] for line in lines[:3]]
        self.assertEqual([line["row"] for line in lines[3:]], rows[3:])
        self.assertTrue(all(line["outcome_unknown"] for line in lines[:3]))
        self.assertTrue(text.startswith("Interrupted: 3 running, 5 unsent, of 8 rows\n"), text)
        for job in jobs:
            self.assertIn("cs --wait " + job, text)
        self.assertLessEqual(set(jobs), set(self.cloud.cloud.jobs))

        self.option(job_seconds=0.02)
        again = "".join(json.dumps(line) + "\n" for line in lines if "unsent" in line)
        code, out, err = self.each(again, "rebootVirtualMachine", "id={id}")
        self.assertEqual((code, err), (0, ""))
        asked = [record.params["id"] for record in self.cloud.requests if record.command == "rebootVirtualMachine"]
        self.assertEqual(sorted(asked), sorted(row["id"] for row in rows))  # each of them once

    @posix_only
    @each("has_reader", True, False)
    def test_an_interrupt_while_answers_are_awaited(self, has_reader):
        """Of commands that have no job, nobody knows what became; nothing more is sent. All of it is said on standard
        error if the reader of standard output got the Ctrl-C, too, as in a pipe."""
        release = threading.Event()
        self.addCleanup(release.set)
        asked = []

        def hold(record):
            asked.append(record.params["x"])
            release.wait(20)
            return Answer(200, {"r": {}})

        self.option(scripted=hold)
        self.configure(recover="false")
        child = self.start("updateThing", "x={}", "--each", "--parallel", "2")
        child.stdin.write(b"1\n2\n3\n")
        child.stdin.close()
        until(lambda: len(asked) == 2, "two requests")
        time.sleep(0.1)
        if not has_reader:
            child.stdout.close()
        child.send_signal(signal.SIGINT)
        out = child.stdout.read().decode("utf-8") if has_reader else ""
        err = child.stderr.read().decode("utf-8")
        self.assertEqual(child.wait(), 130, err)
        if not has_reader:
            out, err = err[: err.index("Interrupted")], err[err.index("Interrupted") :]
        lost = {"error": {"message": "interrupted"}, "outcome_unknown": True}
        self.assertEqual(sorted(self.lines(out)[:2], key=str), [dict(lost, row="1"), dict(lost, row="2")])
        self.assertEqual(self.lines(out)[2:], [{"row": "3", "unsent": True}])
        told = 'Interrupted: 2 unknown, 1 unsent, of 3 rows\nThose that say "unsent" can be piped in again.\n'
        self.assertEqual(err, told)
        self.assertEqual(sorted(asked), ["1", "2"])


# === [W] what is written about it ===================================================================================


def readme():
    with open(README_PATH, encoding="utf-8") as file:
        return file.read()


def section_of(title, underline):
    """The text under a heading of README, up to the next one of its kind or above."""
    text = readme()
    start = text.index("\n" + title + "\n" + underline * len(title) + "\n") + 2 * len(title) + 3
    above = "={3,}|-{3,}" if underline == "-" else "={3,}|-{3,}|~{3,}"
    ends = [found.start() for found in re.finditer(rf"(?m)^.+\n({above})$", text) if found.start() > start]
    return text[start : min(ends)] if ends else text[start:]


def blocks(language):
    """The code blocks of README in a language, without their indentation."""
    found = re.findall(rf"(?m)^\.\. code-block:: {language}\n\n((?:(?: {{4}}.*)?\n)+)", readme() + "\n")
    return [re.sub("(?m)^ {4}", "", block).strip("\n") + "\n" for block in found]


def grid_rows(text):
    """The rows of the first simple table in a text: a list of cells each, without markup."""
    lines = text[text.index("\n==") + 1 :].split("\n")
    edges = [(found.start(), found.end()) for found in re.finditer("=+", lines[0])]
    edges[-1] = (edges[-1][0], None)
    rows = []
    for line in lines[3:]:
        if line.startswith("=="):
            return rows
        rows.append([line[start:end].strip().replace("``", "").replace("\\", "") for start, end in edges])
    raise AssertionError("the table has no end")


def shown_options():
    """{spelling: option} of the table of options, without the one that is for scripts only."""
    shown = {}
    for option in cs._OPTIONS:
        if option.name != "complete":
            shown["--" + option.name] = option
            if option.letter:
                shown["-" + option.letter] = option
    return shown


class HelpAndReadmeTest(CloudCase):
    """README and --help say what the program does."""

    def help(self):
        self.unset("endpoint", "key", "secret")
        return self.good("--help")

    def test_help_fits_a_screen(self):
        lines = self.help().rstrip("\n").split("\n")
        self.assertLessEqual(len(lines), 24)
        self.assertLessEqual(max(map(len, lines)), 80)

    def test_help_names_every_option_and_its_values(self):
        text = self.help()
        for name, option in shown_options().items():
            self.assertRegex(text, rf"(?<![\w-]){re.escape(name)}(?![\w-])")
            if name.startswith("--") and name not in ("--list", "--help"):
                after = re.search(re.escape(name) + r"(?![\w-])(.*)", text).group(1)
                value = option.value if isinstance(option.value, (str, type(None))) else "|".join(option.value)
                if value is None:
                    self.assertNotRegex(after, r"\A ([A-Z\[]|\w+(\||,\w))")
                else:
                    self.assertTrue(after.startswith(" " + value), after)

    def test_help_names_no_option_that_does_not_exist(self):
        self.assertEqual(set(), set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", self.help())) - set(shown_options()))

    def test_help_ends_with_where_to_read_more(self):
        self.assertIn("https://", self.help().rstrip("\n").split("\n")[-1])

    def test_help_tells_the_exit_codes(self):
        self.assertEqual(set(re.findall(r"(?:exit:|  )\s*(\d+) \w", self.help().partition("exit:")[2])) | {"0"},
                         {row[0] for row in grid_rows(section_of("Exit codes", "~"))})  # fmt: skip

    def test_readme_documents_every_option(self):
        text = section_of("Options", "~")
        documented = {flag: bool(value) for flag, value in re.findall(r"``(--?[a-z][a-z-]*)( [^`]+)?``", text)}
        expected = shown_options()
        for flag, option in expected.items():
            if len(flag) == 2:  # the value stands beside the long form
                documented["--" + option.name] |= documented.pop(flag)
            if isinstance(option.value, tuple):
                row = re.search(rf"(?ms)^``[^\n]*--{option.name}\b.*?(?=^``|^==)", text).group(0)
                self.assertEqual([], [word for word in option.value if f"``{word}``" not in row])
        self.assertEqual({flag: option.value is not None for flag, option in expected.items() if len(flag) > 2},
                         documented)  # fmt: skip

    def test_readme_documents_every_exit_code(self):
        rows = grid_rows(section_of("Exit codes", "~"))
        self.assertEqual(["0", "1", "2", "3", "4", "130"], [row[0] for row in rows])
        for code in ("0", "1", "2", "3", "4", "130"):
            self.assertIn(code, cs.main.__doc__ or code)

    def test_readme_documents_every_setting(self):
        rows = grid_rows(section_of("Configuration", "-"))
        self.assertEqual([setting.name for setting in cs.SETTINGS], [row[0] for row in rows])
        for row, setting in zip(rows, cs.SETTINGS):
            with self.subTest(setting.name):
                default = "" if setting.default is None else str(setting.default)
                self.assertEqual([setting.name, default, setting.given_in, setting.meaning], row)

    def test_settings_are_what_the_constructor_takes(self):
        parameters = dict(inspect.signature(cs.CloudStack).parameters)
        self.assertEqual(sorted(setting.name for setting in cs.SETTINGS), sorted(parameters))
        for setting in cs.SETTINGS[1:]:
            self.assertEqual(setting.default, parameters[setting.name].default, setting.name)

    def test_readme_names_every_variable_of_the_environment(self):
        text = readme()
        for name in ("CONFIG", "REGION", "OVERRIDES"):
            self.assertIn("CLOUDSTACK_" + name, text)
        for name in set(re.findall(r"CLOUDSTACK_([A-Z_]+)", text)):
            known = {setting.name.upper() for setting in cs.SETTINGS if setting.given_in == "both"}
            known |= {"NAME", "CONFIG", "REGION", "OVERRIDES", "OUTPUT", "THEME", "HEADER_X_TENANT", "HEADER_"}
            self.assertIn(name, known)

    def test_the_ini_example_can_be_used(self):
        self.unset("endpoint", "key", "secret", "poll_interval", "timeout", "retry_backoff")
        (text,) = blocks("ini")
        self.ini(text)
        for region, endpoint in ((None, "https://cloud.example/client/api"), ("lab", "https://lab.example/client/api")):
            client = cs.CloudStack(**cs.read_config(region))
            cs._check_client(client)
            self.assertEqual(endpoint, client.endpoint)
        self.assertEqual(("/etc/ssl/lab-ca.pem", "/home/me/lab.pem"), (client.verify, client.cert))

    @each("text", *blocks("python"))
    def test_the_python_examples_are_python(self, text):
        ast.parse(text)

    @each("text", *blocks("python"))
    def test_the_names_the_python_examples_use_are_there(self, text):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "cs":
                for alias in node.names:
                    self.assertTrue(hasattr(cs, alias.name), alias.name)

    def commands(self):
        """The words of every `cs` command among the console examples."""
        for block in blocks("console"):
            for line in re.sub(r"\\\n\s*", "", block).split("\n"):
                if line.startswith("$ cs "):
                    for part in line[2:].split(" | "):
                        words = shlex.split(part, comments=True)[1:]
                        yield words[: words.index(">")] if ">" in words else words

    def test_the_console_examples_are_understood(self):
        found = list(self.commands())
        self.assertGreater(len(found), 8)
        for words in found:
            with self.subTest(words):
                options, rest = cs._parse_arguments(words)
                if rest and not options["list"]:
                    cs._parse_parameters(rest[1:])

    def examples(self):
        """(words, what README shows below them) of every `cs` command whose output README shows."""
        for block in blocks("console"):
            for part in re.split(r"(?m)^\$ ", re.sub(r"\\\n\s*", "", block)):
                line, _, shown = part.partition("\n")
                if line.startswith("cs ") and shown.strip():
                    yield shlex.split(line)[1:], shown

    def test_the_examples_are_what_the_sandbox_prints(self):
        """As words, since README breaks long lines; `...` stands for any."""
        found = list(self.examples())
        self.assertGreater(len(found), 3)
        for words, shown in found:
            with self.subTest(words):
                self.main("--sync", "-q")
                code, out, err = self.main(*words)
                printed = " ".join((err if code else out).split()).replace(self.cloud.endpoint,
                                                                           "https://cloud.example/client/api")
                pattern = re.escape(" ".join(shown.split())).replace(re.escape("..."), ".*")
                self.assertRegex(printed, r"\A" + pattern + r"\Z")


# === [W] what it costs ==============================================================================================


class ImportCostTest(CloudCase):
    """What is not needed is not imported."""

    PROGRAM = """
import builtins, sys
sys.path.insert(0, {folder!r})
imported, plain = set(), builtins.__import__
def watching(name, globals=None, *more, **named):
    if (globals or {{}}).get("__name__") == "cs":
        imported.add(name.partition(".")[0])
    return plain(name, globals, *more, **named)
builtins.__import__ = watching
import cs
for args in {calls!r}:
    code = cs.main(args)
    assert code == 0, code
sys.stderr.write(" ".join(sorted(imported)))
"""

    def imported(self, *calls):
        program = self.PROGRAM.format(folder=os.path.dirname(CS_PATH), calls=list(calls))
        code, _, err = Child([sys.executable, "-c", program], env=dict(os.environ)).finish()
        self.assertEqual(0, code, err)
        return set(err.decode("utf-8").split())

    EXTRAS = set("difflib textwrap csv unicodedata getpass shutil tempfile random asyncio concurrent".split())

    def test_importing_it(self):
        more = set("argparse configparser hashlib ssl socket http email gzip copy calendar datetime".split())
        self.assertEqual(set(), self.imported() & (self.EXTRAS | more))

    def test_an_ordinary_call(self):
        """Without a list of commands, and with one."""
        self.assertEqual(set(), self.imported(["listZones"]) & self.EXTRAS)
        self.sync()
        shapes = [["listZones", "-o", shape] for shape in ("table", "jsonl", "text")]
        calls = [["listZones", "--sort", "name", "-c", "id"], ["listzones", "name=x"], ["--complete=cs listZ"]] + shapes
        self.assertEqual(set(), self.imported(*calls) & self.EXTRAS)

    def test_help_and_version_look_at_nothing(self):
        self.unset("endpoint", "key", "secret")
        needless = self.EXTRAS | set("configparser hashlib ssl socket http email".split())
        self.assertEqual(set(), self.imported(["--help"], ["--version"], ["--completion", "bash"]) & needless)


# === [H] the house: what its front page promises ====================================================================


def rooms():
    """{number: (first line, last line)} of cs.py's rooms, by their banners."""
    with open(CS_PATH, encoding="utf-8") as file:
        lines = file.read().split("\n")
    starts = [(int(line.split()[2]), number) for number, line in enumerate(lines, 1) if re.match("# --- [0-9] ", line)]
    ends = [number - 1 for _, number in starts[1:]] + [len(lines)]
    return {0: (1, starts[0][1] - 1), **{room: (first, last) for (room, first), last in zip(starts, ends)}}


class HouseTest(Case):
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
                names = [self.dotted(node.func)]
            if any(re.match(wanted + r"\Z", name) for name in names):
                found |= {room for room, (first, last) in rooms().items() if first <= node.lineno <= last}
        return sorted(found)

    def dotted(self, node):
        if isinstance(node, ast.Attribute):
            return self.dotted(node.value) + "." + node.attr
        return node.id if isinstance(node, ast.Name) else ""

    def test_the_auditor_s_paragraph_is_true(self):
        for wanted, expected in (
            (r"socket|ssl|select|http\.client|urllib\.request|socket\..*|ssl\..*", [6]),
            (r"open", [8, 9]), (r"tempfile|os\.(open|fdopen|replace|unlink|makedirs|dup2|mkdir|rename)", [9]),
            (r"eval|exec|compile|__import__|subprocess.*|pickle.*|marshal.*|ctypes.*", []),
            (r"os\.(system|popen|exec.*|spawn.*)", []),
            (r"argparse|readline", [9]), (r"asyncio", [7, 9]),
        ):  # fmt: skip
            with self.subTest(wanted):
                self.assertEqual(expected, self.found_in(wanted))

    def test_nothing_runs_at_import_but_definitions(self):
        allowed = r"(re\.compile|frozenset|functools\..*|collections\.namedtuple|jsonlib\.JSONDecoder|hasattr|dict" \
                  r"|tuple|_Setting|_Option|_FLAGS\.update|sys\.exit|main|.*\.split|.*\.items)\Z"  # fmt: skip
        for statement in ast.parse(self.source).body:
            self.assertNotIsInstance(statement, (ast.For, ast.While, ast.With, ast.Try))
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                for node in ast.walk(statement):
                    if isinstance(node, ast.Call):
                        self.assertRegex(self.dotted(node.func), allowed)

    def test_a_copy_without_the_command_line_is_a_whole_library(self):
        """As README says how to cut it, under a name of its own."""
        (command,) = re.findall(r"(?m)^    (sed .*)$", readme())
        path = os.path.join(self.home, "cloud.py")
        subprocess.check_call(command.replace("cs.py", shlex.quote(CS_PATH)).replace("cloud.py", path), shell=True)
        with open(path, encoding="utf-8") as file:
            self.assertEqual("\n".join(self.source.split("\n")[: rooms()[9][0] - 1]) + "\n", file.read())
        code = "import sys\nsys.path.insert(0, sys.argv[1])\nfrom cloud import *\nimport cloud\n" \
               "c = CloudStack(*sys.argv[2:5], fetch_result=True, poll_interval=0.02)\n" \
               "print(c.listZones()['count'], len(c.listVirtualMachines(fetch_list=True)))\n" \
               "print(cloud.read_config.__module__)\n" \
               "print(c.rebootVirtualMachine(id=next(c.iter_list('listVirtualMachines', state='Running'))['id'])" \
               "['virtualmachine']['state'], hasattr(cloud, 'main'))\n"  # fmt: skip
        with Simulator(job_seconds=0.02) as cloud:
            admin = cloud.users["admin"]
            run = subprocess.run([sys.executable, "-I", "-c", code, self.home, cloud.endpoint, admin.key, admin.secret],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)  # fmt: skip
        self.assertEqual(b"", run.stderr)
        self.assertEqual("2 32\ncloud\nRunning False\n", run.stdout.decode().replace("\r", ""))


# === [R] running the tests ==========================================================================================
# The tests run in two processes that share them, each watched by this one: a test that hangs is ended from within, by
# an alarm, so that it cleans up as any failing test does; and where it does not heed that, with its process.

TEST_LIMIT = float(os.environ.get("CS_TEST_LIMIT") or 180)  # seconds for one test
START_LIMIT = 120  # seconds until the first one begins

TESTS_HELP = """usage: test_cs.py [-v] [WORD ...]
       test_cs.py sandbox [--port N] [COMMAND [name=value ...]]

Run the tests whose full name (class, a dot, method) holds one of the words; without words all of them.
Exit code 0: all passed; 1: some failed; 2: this command line was not understood.

  -v, --verbose    name each test
  --help           show this help

sandbox: run cs.py against a small simulated cloud; `test_cs.py sandbox --help` says how.
CS_TEST_LIMIT=SECONDS: how long one test may take (180). CS_ATTACK_RUNS=N: how many broken connections to try (160)."""

_journal = None  # where a process that runs tests writes down what it does, for the one that watches it


def note(*words):
    """Write a line into the journal, if there is one."""
    if _journal is not None:
        os.write(_journal, (" ".join(map(str, words)) + "\n").encode("utf-8"))


class Overdue(BaseException):
    """A test took too long. No Exception, which a client may take for a broken connection and try again."""


def ring(*_):
    raise Overdue(f"not done after {TEST_LIMIT:g} s")


class CountingResult(unittest.TextTestResult):
    """Counts tests, a test with failing subtests as one; unexpected successes are failures."""

    def __init__(self, *args):
        super().__init__(*args)
        self.parent = os.getppid()

    def _failed(self):
        """The tests that failed, and what stands for classes and modules that could not be set up."""
        failed = [getattr(test, "test_case", test) for test, _ in self.errors + self.failures]  # a subtest's own test
        return failed + self.unexpectedSuccesses

    @property
    def failed_ids(self):
        return {test.id() for test in self._failed() if isinstance(test, unittest.TestCase)}

    @property
    def broken(self):
        return sum(not isinstance(test, unittest.TestCase) for test in self._failed())

    def startTest(self, test):
        note("start", test.id())
        if _journal is not None:
            if os.getppid() != self.parent:
                os._exit(1)  # nobody waits for the outcome any more
            signal.setitimer(signal.ITIMER_REAL, TEST_LIMIT, TEST_LIMIT / 4)  # again, for what cleans up
        super().startTest(test)

    def stopTest(self, test):
        if _journal is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if test.id() in self.failed_ids:
            note("failed", test.id())
        super().stopTest(test)


def chosen_tests(words):
    """Every test of the program whose name holds one of the words; all without words."""
    for group in unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]):
        for test in group:
            if not words or any(word in test.id() for word in words):
                yield test


def printable(stream):
    """The stream as one that writes whatever it is given, in the C locale, too."""
    return io.TextIOWrapper(stream.detach(), stream.encoding, "backslashreplace", line_buffering=True)


def run_part(part, path, argv):
    """Run the tests of one process: `part` is its number, a slash and how many there are. The journal is at path."""
    global _journal
    faulthandler.enable()  # what is done at the end shows where it hung
    _journal = os.open(path, os.O_WRONLY | os.O_APPEND)
    note("begun")
    signal.signal(signal.SIGALRM, ring)
    number, parts = map(int, part.split("/"))
    tests = list(chosen_tests([word for word in argv if word != "-v"]))[number - 1::parts]
    runner = unittest.TextTestRunner(stream=sys.stdout, verbosity=2 if "-v" in argv else 1, warnings="default",
                                     resultclass=CountingResult)  # fmt: skip
    result = runner.run(unittest.TestSuite(tests))
    for reason in sorted({reason for _, reason in result.skipped}):
        print("skipped: " + reason)
    skipped, failed = len(result.skipped), len(result.failed_ids)
    note("done", result.testsRun - skipped - failed, failed + result.broken, skipped)
    return 0


def part_environment():
    """The environment of a process that runs tests: in a locale that is not for UTF-8, with one that is, as Python 3.7
    and later arrange it themselves."""
    if sys.getfilesystemencoding().replace("-", "").lower() == "utf8":
        return dict(os.environ)
    return dict(os.environ, LC_ALL="en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8")


class Part:
    """A process that runs a part of the tests, and the watch over it."""

    def __init__(self, part, folder, argv, **options):
        self.path = os.path.join(folder, "journal-" + part.replace("/", "-of-"))
        open(self.path, "w").close()
        program, flags = os.path.abspath(sys.modules["__main__"].__file__), subprocess._args_from_interpreter_flags()
        command = [sys.executable, *flags, program, "--part", part, self.path, *argv]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=part_environment(),
                                        start_new_session=True, **options)  # fmt: skip
        self.size, self.since, self.ended = 0, time.monotonic(), ""

    def journal(self, word):
        """What follows a word in the journal, line by line."""
        with open(self.path, encoding="utf-8") as file:
            lines = [line.rstrip("\n").partition(" ") for line in file]
        return [rest for first, _, rest in lines if first == word]

    def is_running(self):
        """Whether it still runs; where nothing has happened for too long, end it."""
        if self.process.poll() is not None:
            self.ended = self.ended or f"ended with status {self.process.returncode}"
            return False
        size, now = os.path.getsize(self.path), time.monotonic()
        if size != self.size:
            self.size, self.since = size, now
        if now - self.since > (1.5 * TEST_LIMIT if self.size else START_LIMIT):
            self.ended = "did not end"
            self.stop()
        return True

    def stop(self):
        """End it with all that it started. On SIGABRT it prints where each of its threads is."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGABRT)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        for group in {self.process.pid}.union(map(int, self.journal("group"))) - set(map(int, self.journal("ended"))):
            end_group(group)
        self.process.kill()
        self.process.wait()

    def counts(self):
        """[passed, failed, skipped]; says so where the process did not come to its end."""
        for line in self.journal("done"):
            return list(map(int, line.split()))
        begun, failed = self.journal("start"), set(self.journal("failed"))
        last = begun[-1] if begun else "no test yet"
        print(f"\nFAIL: {last}: the process that ran it {self.ended}; the tests after it were not run")
        for test in sorted(failed - {last}):
            print("FAIL: " + test)
        failed.add(last)
        return [len(set(begun) - failed), len(failed), 0]


def run_parts(argv, count):
    """Run the tests in so many processes: [passed, failed, skipped]. The first one's output appears as it comes."""
    parts = []
    with tempfile.TemporaryDirectory(prefix="cs-tests-") as folder, tempfile.TemporaryFile() as out:
        try:
            for number in range(1, count + 1):
                options = {"stdout": out, "stderr": subprocess.STDOUT} if number > 1 else {}
                parts.append(Part(f"{number}/{count}", folder, argv, **options))
            while [part for part in parts if part.is_running()]:
                time.sleep(0.05)
            out.seek(0)
            sys.stdout.write(out.read().decode("utf-8", "replace"))
            return [sum(column) for column in zip(*[part.counts() for part in parts])]
        finally:
            for part in parts:
                part.stop()


def run_tests(argv):
    """Run the tests as the words say. Returns the exit code."""
    sys.stdout = printable(sys.stdout)
    if argv[:1] == ["--part"]:
        return run_part(argv[1], argv[2], argv[3:])
    if "--help" in argv or "-h" in argv:
        print(TESTS_HELP)
        return 0
    unknown = [word for word in argv if word.startswith("-") and word not in ("-v", "--verbose")]
    if unknown:
        return complain("knows no option " + unknown[0])
    words = [word for word in argv if not word.startswith("-")]
    if not list(chosen_tests(words)):
        print("no test has a name with " + " or ".join(words) + "\n0 passed, 1 failed")
        return 1
    begun = time.time()
    end_on_signals()
    try:
        verbose = ["-v"] if len(words) < len(argv) else []
        passed, failed, skipped = run_parts(verbose + words, 1 if words else 2)
    except KeyboardInterrupt:
        return 130
    print(f"Python {sys.version.split()[0]}, {time.time() - begun:.1f} s")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(sandbox(sys.argv[2:]) if sys.argv[1:2] == ["sandbox"] else run_tests(sys.argv[1:]))
