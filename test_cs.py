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
    [9] command line: options, run and report, formats, the list of commands, completion, configure
    [W] what is written about it: README and --help     [R] running the tests

To give it another command: `_list(...)` is one line for a command that lists a table; for any other write a function
under `@command(name, parameters, description, table)`, which is given the Call and returns the answer, or, with
job=True, a generator that returns the job's result. Parameters it does not know yet get a line in _PARAMETERS. What
the server refuses is `raise ApiError(code, text)`. listApis and the checks of parameters come out of the same words.

To give it another fault: for the next requests `Simulator.script` says what happens (an Answer of any kind, a callable
that may also sleep before the command runs, DROP, RUN_THEN_DROP); a way to be wrong for as long as it is wanted is
an attribute of Simulator, named in OPTIONS, that is asked where it applies.
"""

import asyncio
import base64
import calendar
import collections
import contextlib
import copy
import datetime
import decimal
import email.message
import enum
import faulthandler
import functools
import gc
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
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
import zlib
from unittest import mock
from urllib.parse import parse_qsl, quote, unquote, urlencode

import cs

# --- simulator: wire ------------------------------------------------------------------------------------------------
# Requests into parameters, the signature, and answers into bytes.

MAX_HEAD = 8192  # request line and headers
MAX_FORM = 1 << 20
MAX_FORM_KEYS = 5000
CREDENTIALS_TEXT = "unable to verify user credentials and/or request signature"

_READING = re.compile(r"(get|list|query|find)\w+", re.ASCII)
_ANNOTATED_READING = frozenset(
    "isAccountAllowedToCreateOfferingsWithTags quotaBalance quotaIsEnabled quotaStatement quotaSummary quotaTariffList "
    "cloudianIsEnabled readyForShutdown verifyOAuthCodeAndGetUser".split()
)
_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]*=*\s*")
_CONTROL = re.compile("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]")
_MAP_NAME = re.compile(r"([^\[\]]+)\[([0-9]+)\]\.([^\[\]]+)")
_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.\d+)?(Z|[+-]\d\d:?\d\d)", re.ASCII)
_JAVA_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_*")
_ENCODED = [chr(byte) if byte in _JAVA_UNRESERVED else "%{:02X}".format(byte) for byte in range(256)]


class ApiError(Exception):
    """An error the server states in its own words: code, text, and the entities it is about.

    cserrorcode tells who threw it: a command's own check of its values 4350, of the caller's rights 4365, the checks
    before a command runs 9999. None: the error is written early, and has neither cserrorcode nor X-Description.
    """

    def __init__(self, code, text, uuids=(), cserrorcode=0):
        Exception.__init__(self, code, text)
        self.code, self.text, self.uuids = code, text, uuids
        self.cserrorcode = {431: 4350, 531: 4365}.get(code, 9999) if cserrorcode == 0 else cserrorcode

    def body(self):
        named = [{"uuid": uuid, "description": description} for uuid, description in self.uuids]
        body = {"uuidList": named, "errorcode": self.code, "cserrorcode": self.cserrorcode, "errortext": self.text}
        if self.cserrorcode is None:
            del body["cserrorcode"]
        return body

    def headers(self):
        return {} if self.cserrorcode is None else {"X-Description": " ".join(self.text.splitlines())}


class HtmlError(Exception):
    """An error of the servlet container, or of a proxy: an HTML page, and nothing ran."""

    def __init__(self, code, text=None, close=True):
        Exception.__init__(self, code, text)
        self.code, self.text, self.close = code, text or http.client.responses.get(code, str(code)), close

    def answer(self):
        page = "<html>\n<head><title>Error {0} {1}</title></head>\n<body><h2>HTTP ERROR {0} {1}</h2></body>\n</html>\n"
        body = page.format(self.code, html.escape(self.text))
        return Answer(self.code, body, {"Content-Type": "text/html;charset=iso-8859-1"}, close=self.close)


class Silence(HtmlError):
    """What an unexpected error of the server comes out as: 200 with nothing."""

    def __init__(self):
        HtmlError.__init__(self, 200, close=False)

    def answer(self):
        return Answer(200, b"", {"Content-Type": "text/xml;charset=utf-8"})


class Headers(dict):
    """Header fields by name in any case; the names of the same spelling twice are joined by a comma."""

    def __init__(self, pairs=()):
        dict.__init__(self)
        for name, value in pairs:
            name = name.lower()
            self[name] = dict.get(self, name) + ", " + value if name in self else value

    def get(self, name, default=None):
        return dict.get(self, name.lower(), default)

    def __getitem__(self, name):
        return dict.__getitem__(self, name.lower())

    def __contains__(self, name):
        return dict.__contains__(self, name.lower())


class Record:
    """One request as it was received."""

    def __init__(self, method, target, version, headers, connection):
        self.method, self.version, self.headers, self.connection = method, version, headers, connection
        self.path, _, self.query = target.partition("?")
        self.body = b""
        self.params = {}
        self.time = time.monotonic()

    @property
    def command(self):
        return self.params.get("command")

    def read_parameters(self, form=True):
        """Merge query and form: the last of a name wins in a query, the first in a form, the query over the form."""
        content_type = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if form and self.body and content_type == "application/x-www-form-urlencoded":
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
        return "<Record {} {}>".format(self.method, self.command)


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
        if isinstance(body, dict):
            body = to_json(body)
        self.body = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body


DROP = "close the connection without running the command"
RUN_THEN_DROP = "run the command, then close the connection without an answer"
GO_ON = "answer as usual"


def decode(text):
    return unquote(text.replace("+", " "), errors="replace")


def parse_pairs(text):
    pairs = (piece.partition("=") for piece in text.split("&") if piece)
    return [(decode(name), decode(value)) for name, _, value in pairs]


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
    match = _DATE.match(text)
    if not match or match.end() != len(text):
        return None
    try:
        seconds = calendar.timegm(time.strptime("".join(match.group(1, 2, 3, 4, 5, 6)), "%Y%m%d%H%M%S"))
    except ValueError:
        return None
    offset = match.group(7)
    if offset == "Z":
        return seconds
    shift = int(offset[1:3]) * 3600 + int(offset[-2:]) * 60
    return seconds - shift if offset[0] == "+" else seconds + shift


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
        match = _MAP_NAME.match(name)
        if not match or match.end() != len(name):
            text = "Unable to decode parameter: {}; an array of objects is written parameter[index].field=value"
            raise ApiError(430, text.format(name))
        maps.setdefault(match.group(1).lower(), {}).setdefault(int(match.group(2)), {})[match.group(3)] = value
    return plain, maps


def to_json(tree):
    """JSON as the server writes it: control characters stand raw, having been un-escaped once more at the end."""
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    if "\\u00" not in text:
        return text
    return re.sub(r"\\\\|\\u00([01][0-9a-f])", lambda m: chr(int(m.group(1), 16)) if m.group(1) else m.group(), text)


def to_xml(tree):
    (key, value), = tree.items()
    parts = ['<?xml version="1.0" encoding="UTF-8"?><{} cloud-stack-version="4.23.0.0">'.format(key)]
    for name, member in value.items():
        _xml(name, member, parts)
    return "".join(parts) + "</{}>".format(key)


def _xml(name, value, parts):
    if isinstance(value, list):
        for item in value:
            _xml(name, item, parts)
    elif isinstance(value, dict):
        parts.append("<{}>".format(name))
        for inner, member in value.items():
            _xml(inner, member, parts)
        parts.append("</{}>".format(name))
    else:
        text = str(value).lower() if isinstance(value, bool) else html.escape(str(value), quote=False)
        parts.append("<{0}>{1}</{0}>".format(name, text))


# --- simulator: the cloud -------------------------------------------------------------------------------------------
# Rows in tables, jobs, and one registry of commands; listApis and the checks of parameters both come from the registry.

Parameter = collections.namedtuple("Parameter", "name type entity required description length since")
Rows = collections.namedtuple("Rows", "member rows")
PAGING = ("keyword", "page", "pagesize")
OWNING = ("account", "domainid", "projectid", "listall", "isrecursive")
OWNER_FIELDS = ("account", "domainid", "domain", "domainpath", "projectid", "project")
LONGEST = {"userdata": 1048576, "publickey": 5120}
SILENT = frozenset(["activateProject"])  # 200 with nothing where the id is missing
LENIENT = ("userdataid", "backupofferingid")  # newer ones: what is no UUID is dropped in silence, with the filter
COMMANDS = {}
OWNED = set("virtualmachine volume snapshot network securitygroup affinitygroup sshkeypair project event".split())
TABLES = (
    "zone pod cluster host template serviceoffering diskoffering networkoffering network account domain project user "
    "virtualmachine volume snapshot securitygroup affinitygroup sshkeypair event resourcelimit counter hosttag provider"
).split()

# name, type ("uuid:zone": an id of that table), what it is; ids without a table are those of the command's own entity
_PARAMETERS = """
account string the account of the resource, used with domainid
affinitygroupid uuid:affinitygroup list by affinity group
affinitygroupids list the ids of the affinity groups the machine belongs to
affinitygroupnames list the names of the affinity groups the machine belongs to
available boolean true for zones that take new machines
backupofferingid uuid list by backup offering
cidrlist list the CIDR list associated
clusterid uuid:cluster the cluster
description string the description
details map details as key and value
deviceid long the device of the volume in the machine
diskofferingid uuid:diskoffering the disk offering
displayname string the name to show
domain string the path of the domain that the user belongs to
domainid uuid:domain the domain of the resource, used with account
enddate date nothing after this date
endport integer the last port of the rule
expunge boolean true to expunge the machine at once
fingerprint string the fingerprint of the public key
forced boolean force it
format string the format of the volume
group string a group for the machine
haenable boolean true for high availability
hostid uuid:host the host
hypervisor string the hypervisor
icmpcode integer the code of the ICMP message
icmptype integer the type of the ICMP message
id uuid the id
ids list the ids, mutually exclusive with id
iptonetworklist map ip and networkid of each nic, instead of networkids
isrecursive boolean true to include the domains below domainid
key string list by tag key
keypair string the name of the ssh key pair for the machine
keyword string list by keyword
level string the level of the event
listall boolean true to list all the caller may see, not only what is its own; false by default
maxiops long the most input and output operations a second
name string the name
networkid uuid:network list by network
networkids list the networks of the machine, the default one first
networktype string list by type of network
page integer the page to list
pagesize integer the rows of a page
password string the password
podid uuid:pod list by pod
projectid uuid:project the project; -1 for all projects
protocol string tcp, udp, icmp or all
publickey string the public key
resourceid string list by resource
resourceids list the resources to tag
resourcetype string the type of the resource
rootdisksize long the size of the root disk in GB
securitygroupid uuid:securitygroup the security group
securitygroupids list the ids of the security groups of the machine
securitygroupname string the name of the security group
securitygroupnames list the names of the security groups of the machine
serviceofferingid uuid:serviceoffering the service offering
size long the size in GB
snapshotid uuid:snapshot the snapshot to start from
startdate date nothing before this date
startport integer the first port of the rule
startvm boolean false to leave the machine stopped; true by default
state string list by state
tags map list by tags, or the tags, as key and value
templatefilter string featured, self, selfexecutable, sharedexecutable, executable, community or all
templateid uuid:template the template
type string list by type
userdata string user data, base64
userdataid uuid the registered user data
username string the name of the user
value string list by tag value
virtualmachineid uuid:virtualmachine the virtual machine
volumeid uuid:volume the volume
zoneid uuid:zone the zone
jobid uuid:job the job
"""
_PARAMETERS = {line.split()[0]: line.split(None, 2)[1:] for line in _PARAMETERS.strip().splitlines()}
_INSTANCES = {"virtualmachine": "VirtualMachine", "volume": "Volume", "snapshot": "Snapshot"}


class Command:
    """What a command is called, takes and answers with, and the function that runs it.

    Parameters are words, the required ones in the order in which the server misses them: name, then, where they apply,
    ":type" unless it is the one of _PARAMETERS, "@release" that brought it, "!" if it is required.
    """

    def __init__(self, name, parameters, description, entity, run, job, key, admin):
        self.name, self.description, self.entity, self.run = name, description, entity, run
        self.job, self.key, self.admin = job, key or name.lower() + "response", admin
        self.parameters = [self._parameter(word) for word in parameters.split()]
        self.reading = is_reading(name)

    def _parameter(self, word):
        word, required = word.rstrip("!"), word.endswith("!")
        word, _, since = word.partition("@")
        name, _, own = word.partition(":")
        kind, text = _PARAMETERS[name]
        kind, _, entity = kind.partition(":")
        if name == "id":
            entity, text = self.entity, "the id of the " + self.entity
        return Parameter(name, own or kind, entity, required, text, LONGEST.get(name, 255), since or None)

    @property
    def short(self):
        """What errors call the command."""
        return self.key[:-len("response")]


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

    def __init__(self, row, password, domain, account_type):
        self.id, self.username, self.account = row["id"], row["username"], row["account"]
        self.accountid, self.domainid = row["accountid"], row["domainid"]
        self.row, self.password, self.domain = row, password, domain
        self.domainpath = ("ROOT" + domain).rstrip("/")
        self.admin = account_type == 1
        self.key, self.secret = row["apikey"], make_key(self.username + " secret")

    @property
    def owner(self):
        return {"account": self.account, "domainid": self.domainid, "domain": self.row["domain"],
                "domainpath": self.domainpath}


class Job:
    """An asynchronous job. What its state is depends on the clock alone: nothing runs until somebody asks."""

    def __init__(self, uuid, spec, user, created, begins, seconds):
        self.id, self.spec, self.user, self.created = uuid, spec, user, created
        self.begins, self.due, self.begun, self.body = begins, begins + seconds, False, None
        self.status, self.code, self.result, self.completed, self.lost = 0, 0, None, None, False
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
        row = collections.OrderedDict(account=user.account, accountid=user.accountid, userid=user.id)
        row.update(domainid=user.domainid, domainpath=user.domainpath)
        row["cmd"] = "org.apache.cloudstack.api.command.user.{}Cmd".format(name[0].upper() + name[1:])
        row.update(jobstatus=self.status, jobprocstatus=0, jobresultcode=self.code)
        row.update((name, value) for name, value in (("jobinstancetype", self.kind), ("jobinstanceid", self.instance))
                   if value)
        if self.status == 0:
            row.update(managementserverid="00000000-0000-4000-a000-000000000000", managementservername="simulator")
        if self.result is not None:
            row.update(jobresulttype="object", jobresult=self.result)
        row["created"] = format_date(self.created)
        if self.completed is not None:
            row["completed"] = format_date(self.completed)
        row["jobid"] = self.id
        return row


def make_key(seed):
    return base64.urlsafe_b64encode(hashlib.sha512(seed.encode()).digest()).decode().rstrip("=")


class Cloud:
    """The state. The same in every run: ids are drawn from a counter."""

    _furnished = None  # the furniture, pickled: ten times faster than to make it again for every simulator

    def __init__(self, clock=time.time):
        self.clock, self.lock = clock, threading.RLock()
        self.jobs, self._pending, self._busy = collections.OrderedDict(), [], {}
        if Cloud._furnished is None:
            self.tables, self.users, self.userdata, self.removed = {name: [] for name in TABLES}, {}, {}, set()
            self._serial = self._machines = self._addresses = 0
            self._furnish()
            skipped = ("clock", "lock", "jobs", "_pending", "_busy")
            Cloud._furnished = pickle.dumps({k: v for k, v in vars(self).items() if k not in skipped}, 4)
        vars(self).update(pickle.loads(Cloud._furnished))

    def uuid(self):
        self._serial += 1
        digest = hashlib.md5(b"simulator %d" % self._serial).hexdigest()
        return "-".join((digest[:8], digest[8:12], "4" + digest[13:16], "a" + digest[17:20], digest[20:]))

    def add(self, table, name=None, *more, **values):
        """Append a row; dicts in `more` and keywords are its fields, None ones left out as the server does."""
        row = {"id": self.uuid()}
        if name is not None:
            row["name"] = name
        for fields in more + (values,):
            row.update((field, value) for field, value in fields.items() if value is not None)
        if table == "sshkeypair":
            row.pop("domainpath", None)  # the one thing with an owner that does not show it
        self.tables[table].append(row)
        return row

    def find(self, table, uuid):
        for row in self.tables[table]:
            if row["id"] == uuid:
                return row
        return None

    def number(self, table, uuid):
        """The id of a row in the server's database, which some texts name."""
        return 1 + [row["id"] for row in self.tables[table]].index(uuid)

    def remove(self, table, row):
        """Take a row away; lists that are asked for its id then show nothing, where an id that never was is refused."""
        self.tables[table] = [other for other in self.tables[table] if other is not row]
        self.removed.add(row["id"])

    def named(self, table, name):
        return next((row for row in self.tables[table] if row.get("name") == name), None)

    # the furniture

    def _furnish(self):
        created = "2026-01-12T09:30:00+0000"
        root = self.add("domain", "ROOT", level=0, path="ROOT", haschild=True, state="Active")
        lab = self.add("domain", "research", level=1, path="ROOT/research", haschild=False, state="Active")
        lab["parentdomainid"] = root["id"]
        admin = self._account("admin", root, 1, "Root Admin", "correct horse battery staple", "/")
        user = self._account("user", lab, 0, "User", "tilde~and+plus*", "/research")
        self.admin, self.owner = admin, admin.owner
        for name, kind in (("north", "Advanced"), ("south", "Advanced")):
            self._zone(name, kind, created)
        self._offerings(created)
        project = self.add("project", "apollo", admin.owner, displaytext="The Apollo project", state="Suspended",
                           owner=[{"account": "admin"}], created=created)
        self.apollo = {"projectid": project["id"], "project": "apollo", "domainid": root["id"], "domain": "ROOT",
                       "domainpath": "ROOT"}
        for owner in (admin.owner, user.owner, self.apollo):
            self._properties(owner, created)
        for owner, count in ((admin.owner, 32), (user.owner, 6), (self.apollo, 4)):
            self.add_machines(count, owner)
        self._small_tables(admin, created)

    def _account(self, name, domain, kind, role, password, path):
        place = {"domainid": domain["id"], "domain": domain["name"]}
        account = self.add("account", name, place, accounttype=kind, rolename=role, state="enabled",
                           domainpath=("ROOT" + path).rstrip("/"))
        row = self.add("user", None, place, username=name, firstname=name.title(), lastname="Sample", state="enabled",
                       email=name + "@cloud.example", account=name, accountid=account["id"], accounttype=kind,
                       rolename=role, apikey=make_key(name + " key"))
        account["user"] = [row]
        self.users[name] = User(row, password, path, kind)
        return self.users[name]

    def _zone(self, name, kind, created):
        zone = self.add("zone", name, networktype=kind, securitygroupsenabled=False, allocationstate="Enabled",
                        dns1="192.0.2.53", internaldns1="10.0.0.53", localstorageenabled=True, tags=[])
        place = {"zoneid": zone["id"], "zonename": name}
        pod = self.add("pod", name + "-pod-1", place, netmask="255.255.255.0", allocationstate="Enabled")
        place = dict(place, podid=pod["id"], podname=pod["name"])
        cluster = self.add("cluster", name + "-cluster-1", place, hypervisortype="KVM", clustertype="CloudManaged")
        place.update(clusterid=cluster["id"], clustername=cluster["name"])
        for number in range(1, 4):
            self.add("host", "{}-kvm-{}".format(name, number), place, state="Up", type="Routing", hypervisor="KVM",
                     cpunumber=64, memorytotal=549755813888, resourcestate="Enabled", created=created,
                     ipaddress="10.0.{}.{}".format(len(self.tables["zone"]), number), hosttags="ssd")

    def _offerings(self, created):
        north, south = self.tables["zone"]
        both = {"ostypename": "Debian GNU/Linux 12 (64-bit)", "passwordenabled": False}
        rocky = {"ostypename": "Rocky Linux 9", "passwordenabled": True}
        ubuntu = {"ostypename": "Ubuntu 24.04 LTS", "passwordenabled": False}
        debian = None
        for name, system, zone in (("Debian 12", both, north), ("Debian 12", both, south),
                                   ("Rocky Linux 9", rocky, north), ("Ubuntu 24.04", ubuntu, south)):
            row = self.add("template", name, system, self.owner, zoneid=zone["id"], zonename=zone["name"],
                           displaytext=name + " cloud image", ispublic=True, isfeatured=True, isready=True,
                           status="Download Complete", format="QCOW2", hypervisor="KVM", templatetype="USER",
                           size=2147483648, created=created, tags=[])
            if system is both:  # one template in two zones is two rows of one id
                debian = debian or row["id"]
                row["id"] = debian
        for name, cpus, memory in (("Small", 1, 1024), ("Medium", 2, 4096), ("Large", 4, 16384),
                                   ("Titan", 512, 4194304)):
            self.add("serviceoffering", name, displaytext="{} CPUs, {} MB".format(cpus, memory), cpunumber=cpus,
                     cpuspeed=2000, memory=memory, storagetype="shared", iscustomized=False, issystem=False,
                     state="Active", created=created)
        self.add("serviceoffering", "Custom", displaytext="As you like it", iscustomized=True, issystem=False,
                 state="Active", storagetype="shared", created=created)
        for name, size in (("20 GB", 20), ("100 GB", 100)):
            self.add("diskoffering", name, displaytext=name + " disk", disksize=size, iscustomized=False,
                     state="Active", storagetype="shared", created=created)
        self.add("diskoffering", "Any size", displaytext="A disk of any size", iscustomized=True, state="Active",
                 storagetype="shared", created=created)
        for name, kind in (("Isolated with source NAT", "Isolated"), ("Layer 2", "L2")):
            self.add("networkoffering", name, displaytext=name, guestiptype=kind, traffictype="Guest", state="Enabled",
                     created=created, service=[{"name": "Dhcp"}, {"name": "Dns"}] if kind == "Isolated" else [])

    def _properties(self, owner, created):
        offering = self.tables["networkoffering"][0]
        for zone in self.tables["zone"]:
            for name in ("web", "backend"):
                number = len(self.tables["network"]) + 1
                self.add("network", name, owner, displaytext=name + " tier", traffictype="Guest", type="Isolated",
                         zoneid=zone["id"], zonename=zone["name"], networkofferingid=offering["id"],
                         networkofferingname=offering["name"], cidr="10.1.{}.0/24".format(number), state="Implemented",
                         gateway="10.1.{}.1".format(number), netmask="255.255.255.0", issystem=False, created=created,
                         tags=[])
        self.add("securitygroup", "default", owner, description="Default Security Group", ingressrule=[], egressrule=[],
                 tags=[])
        web = self.add("securitygroup", "web", owner, description="HTTP and HTTPS", ingressrule=[], egressrule=[],
                       tags=[])
        for port in (80, 443):
            web["ingressrule"].append(self.rule("tcp", port, port, "0.0.0.0/0"))
        self.add("affinitygroup", "spread", owner, type="host anti-affinity", description="Not on one host")
        self.add("sshkeypair", "laptop", owner, fingerprint="4b:5d:1f:aa:02:1c:44:9e:7e:91:3a:0c:55:61:de:12")

    def _small_tables(self, admin, created):
        kinds = "user_vm public_ip volume snapshot template project network vpc cpu memory primary_storage".split()
        for number, kind in enumerate(kinds):
            for owner in (admin.owner, self.users["user"].owner):
                self.tables["resourcelimit"].append(
                    dict(owner, resourcetype=str(number), resourcetypename=kind, max=-1 if number else 500))
        for source in ("cpu", "memory", "network", "virtualrouter", "snmp", "netscaler", "vpn"):
            self.add("counter", source + " used", source=source, value=source, provider="VirtualRouter")
        self.tables["hosttag"] = [{"id": self.uuid(), "name": name} for name in ("gpu", "ssd", "windows")]
        self.tables["provider"] = [{"name": name, "type": "PRIMARY"} for name in ("DefaultPrimary", "StorPool")]

    def rule(self, protocol, first, last, cidr, **more):
        values = dict(more, ruleid=self.uuid(), protocol=protocol, startport=first, endport=last, cidr=cidr, tags=[])
        return {field: value for field, value in values.items() if value is not None}

    def add_machines(self, count, owner=None):
        """Put `count` more machines, each with its root volume, into the cloud; the admin's unless told otherwise."""
        with self.lock:
            return [self._furnished_machine(owner or self.owner) for _ in range(count)]

    def _furnished_machine(self, owner):
        number = self._machines
        zone = self.tables["zone"][number % 2]
        templates = [row for row in self.tables["template"] if row["zoneid"] == zone["id"]]
        networks = [row for row in self.tables["network"] if row["zoneid"] == zone["id"] and owned_by(row, owner)]
        role = ("web", "db", "cache", "worker")[number % 4]
        machine = self.new_machine(
            owner, zone, templates[number // 2 % 2], self.tables["serviceoffering"][number % 3], networks[:1],
            "{}-{:02d}".format(role, number // 4 + 1))
        machine["created"] = format_date(1771200000 + 3600 * number)
        self.tables["volume"][-1]["created"] = machine["created"]
        if number % 5 == 4:
            machine["state"] = "Stopped"
        else:
            self.place(machine)
        self.tag(machine, "UserVm", "role", role)
        if number % 8 == 1:
            volume = self.new_volume(owner, zone, "data-{:02d}".format(number), 20, machine, 1)
            volume["created"] = machine["created"]
        self.event("VM.CREATE", "Successfully completed starting Vm. Vm Id: " + machine["id"], owner,
                   1771200000 + 3600 * number)
        return machine

    # what commands do

    def new_machine(self, owner, zone, template, offering, networks, name, addresses=(), custom=None):
        self._machines += 1
        number = self._machines
        machine = self.add(
            "virtualmachine", name, owner, displayname=name, instancename="i-2-{}-VM".format(number),
            userid=self.users["admin"].id, username="admin", created=format_date(self.clock()), state="Stopped",
            haenable=False, zoneid=zone["id"], zonename=zone["name"], templateid=template["id"],
            templatename=template["name"], templatedisplaytext=template["displaytext"],
            osdisplayname=template["ostypename"], passwordenabled=template["passwordenabled"],
            rootdeviceid=0, rootdevicetype="ROOT", hypervisor="KVM",
            securitygroup=[], nic=[], tags=[], affinitygroup=[], isdynamicallyscalable=False, details={})
        self.size(machine, offering, custom or {})
        for index, network in enumerate(networks):
            address = addresses[index] if index < len(addresses) else None
            machine["nic"].append(self._nic(network, index == 0, address))
        if machine["nic"]:
            machine["ipaddress"] = machine["nic"][0]["ipaddress"]
        self.new_volume(owner, zone, "ROOT-{}".format(number), 20, machine, 0)
        return machine

    def size(self, machine, offering, custom):
        machine.update(serviceofferingid=offering["id"], serviceofferingname=offering["name"])
        machine["cpunumber"] = int(custom.get("cpuNumber") or offering.get("cpunumber", 1))
        machine["cpuspeed"] = int(custom.get("cpuSpeed") or offering.get("cpuspeed", 1000))
        machine["memory"] = int(custom.get("memory") or offering.get("memory", 512))
        machine["details"].update(custom)

    def _nic(self, network, default, address=None):
        self._addresses += 1
        number = self._addresses
        address = address or "{}.{}".format(network["cidr"].rpartition(".")[0], 10 + number % 240)
        return {"id": self.uuid(), "networkid": network["id"], "networkname": network["name"], "isdefault": default,
                "gateway": network["gateway"], "ipaddress": address, "traffictype": "Guest", "type": network["type"],
                "netmask": "255.255.255.0",
                "macaddress": "02:01:00:{:02x}:{:02x}:01".format(number >> 8 & 255, number & 255)}

    def new_volume(self, owner, zone, name, gigabytes, machine=None, device=None, **more):
        volume = self.add("volume", name, owner, more, zoneid=zone["id"], zonename=zone["name"], size=gigabytes << 30,
                          type="ROOT" if device == 0 else "DATADISK", state="Ready" if machine else "Allocated",
                          created=format_date(self.clock()), storagetype="shared", hypervisor="KVM", tags=[])
        if machine:
            self.attach(volume, machine, device)
        return volume

    def attach(self, volume, machine, device=None):
        if device is None:
            taken = {row.get("deviceid") for row in self.volumes_of(machine)}
            device = next(number for number in range(1, 1000) if number not in taken)
        volume.update(virtualmachineid=machine["id"], vmname=machine["name"], vmdisplayname=machine["displayname"],
                      vmstate=machine["state"], deviceid=device, state="Ready")

    def detach(self, volume):
        for field in ("virtualmachineid", "vmname", "vmdisplayname", "vmstate", "deviceid"):
            volume.pop(field, None)

    def volumes_of(self, machine):
        return [row for row in self.tables["volume"] if row.get("virtualmachineid") == machine["id"]]

    def place(self, machine, host=None):
        if host is None:
            hosts = [row for row in self.tables["host"] if row["zoneid"] == machine["zoneid"]]
            host = hosts[int(machine["instancename"].split("-")[2]) % len(hosts)]
        machine.update(state="Running", hostid=host["id"], hostname=host["name"])

    def unplace(self, machine, state):
        machine["state"] = state
        machine.pop("hostid", None)
        machine.pop("hostname", None)

    def expunge(self, machine):
        for volume in self.volumes_of(machine):
            if volume["type"] == "ROOT":
                self.remove("volume", volume)
            else:
                self.detach(volume)
        self.remove("virtualmachine", machine)

    def tag(self, row, kind, key, value):
        row["tags"] = [tag for tag in row.get("tags", ()) if tag["key"] != key]
        tag = {"key": key, "value": value, "resourcetype": kind, "resourceid": row["id"]}
        tag.update((field, row[field]) for field in OWNER_FIELDS if field in row)
        row["tags"].append(tag)

    def event(self, kind, text, owner, seconds):
        self.add("event", None, owner, username="admin", type=kind, level="INFO", description=text, state="Completed",
                 created=format_date(seconds))

    # jobs

    def submit(self, spec, user, body, seconds, custom=None, lost=False):
        """Start a job: its generator has the arguments checked now, and begins when nothing holds its lock.

        custom is the caller's own id for it. It is looked at last: what the generator has made by then stays.
        """
        lock, entity = next(body)
        self._check_custom(custom, user)
        now = self.clock()
        job = Job(custom or self.uuid(), spec, user, now, max(now, self._busy.get(lock, 0)), seconds)
        job.body, job.lost = body, lost
        if spec.entity in _INSTANCES:
            job.kind, job.instance = _INSTANCES[spec.entity], entity or lock
        elif spec.entity == "affinitygroup" and entity:
            job.kind = "AffinityGroup"  # and no id
        if lock:
            self._busy[lock] = job.due
        self.jobs[job.id] = job
        self._pending.append(job)
        self.settle()
        return dict({"id": entity} if entity else {}, jobid=job.id)

    def _check_custom(self, custom, user):
        if custom and not _UUID.fullmatch(custom):
            raise ApiError(431, "UUID: {} doesn't follow the UUID format".format(custom))
        if custom in self.jobs and user.admin:
            raise ApiError(530, "Entity already exists ")
        if custom in self.jobs:
            raise ApiError(431, "UUID: {} already exists so can't create/update with custom id".format(custom))

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
                self.event(re.sub("(?<=[a-z])(?=[A-Z])", ".", name).upper(), "Successfully completed " + name,
                           job.user.owner, now)
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


def owned_by(row, owner):
    mine = ("projectid",) if "projectid" in owner else ("account", "domainid")
    return all(row.get(field) == owner[field] for field in mine)


class Call:
    """One command being run: who asks, with which converted arguments."""

    def __init__(self, simulator, user, spec, params):
        self.simulator, self.cloud, self.user, self.spec = simulator, simulator.cloud, user, spec
        self.plain, self.maps = lower_names(params)
        self.args, self.cookies = {}, ()

    def convert(self):
        """Fill args from the parameters the command declares; everything else is ignored in silence."""
        for parameter in self.spec.parameters:
            name = parameter.name
            value = self.maps.get(name) if parameter.type == "map" else self.plain.get(name)
            if value or (value == "" and parameter.type == "string"):
                value = self._converted(parameter, value)
                if value is not None:
                    self.args[name] = value
            elif parameter.required and self.spec.name in SILENT:
                raise Silence
            elif parameter.required:
                text = "Unable to execute API command {} due to missing parameter {}"
                raise ApiError(431, text.format(self.spec.short, name), cserrorcode=9999)

    def _converted(self, parameter, value):
        kind = parameter.type
        if kind == "map":
            return [value[index] for index in sorted(value)]
        if kind == "string" and len(value) > parameter.length:
            text = "Value greater than max allowed length {} for param: {}"
            raise ApiError(431, text.format(parameter.length, parameter.name), cserrorcode=9999)
        if kind == "boolean":
            return value.lower() == "true"
        if kind == "list":
            return value.split(",")
        if kind == "uuid":
            return self._entity_id(parameter, value)
        try:
            if kind in ("integer", "long"):
                return int(value)
            if kind == "date":
                return read_date(value)
        except ValueError:
            raise self.invalid(parameter.name, value) from None
        return value

    def _entity_id(self, parameter, value):
        if parameter.name in LENIENT:
            return value if _UUID.fullmatch(value) else None
        known = parameter.entity not in self.cloud.tables or self.cloud.find(parameter.entity, value)
        known = known or self.spec.reading and value in self.cloud.removed
        if not known and not (parameter.name == "projectid" and value == "-1"):
            raise self.invalid(parameter.name, value)
        return value

    def invalid(self, name, value):
        text = ("Unable to execute API command {} due to invalid value. Invalid parameter {} value={} due to incorrect "
                "long value format, or entity does not exist or due to incorrect parameter annotation for the field in "
                "api cmd class.")
        return ApiError(431, text.format(self.spec.short, name, value), cserrorcode=9999)

    def get(self, name, default=None):
        return self.args.get(name, default)

    def entity(self, table, name="id"):
        """The row an argument names, the caller's right to it checked; None without the argument."""
        row = self.cloud.find(table, self.args.get(name)) if name in self.args else None
        if row and table in OWNED:
            self.check_access(row)
        return row

    def check_access(self, row):
        if not self.user.admin and not owned_by(row, self.user.owner):
            raise ApiError(531, "Caller does not have permission to operate with provided resource.")

    def entities(self, table, name, names=None):
        """The rows a list of ids, or of names, stands for, in the order given."""
        rows = [(uuid, self.cloud.find(table, uuid)) for uuid in self.args.get(name, ())]
        rows += [(word, self.mine(table, word)) for word in self.args.get(names, ())]
        for word, row in rows:
            if row is None:
                raise ApiError(431, "Unable to find {} {}".format(table, word))
            self.check_access(row)
        return [row for _, row in rows]

    def mine(self, table, name):
        owner = self.owner()
        return next((row for row in self.cloud.tables[table] if row["name"] == name and owned_by(row, owner)), None)

    def owner(self):
        """Who will own what is created: the caller, or the account or project it names."""
        if "projectid" in self.args:
            project = self.entity("project", "projectid")
            return dict({field: project[field] for field in ("domainid", "domain", "domainpath")},
                        projectid=project["id"], project=project["name"])
        for user in self.cloud.users.values():
            if user.account == self.args.get("account") and user.domainid == self.args.get("domainid", user.domainid):
                self.check_access(user.owner)
                return user.owner
        return self.user.owner

    def details(self, name="details"):
        """A map written flat, all in index 0, or with an index an entry; as one dict."""
        merged = {}
        for entry in self.args.get(name, ()):
            merged.update(entry)
        return merged

    def pairs(self, name="tags"):
        """A map in key and value style."""
        entries = self.args.get(name, ())
        if any("key" not in entry for entry in entries):
            raise ApiError(430, "Malformed parameter {}: key and value are needed".format(name))
        return [(entry["key"], entry.get("value")) for entry in entries]

    def page(self, rows):
        """The part of the rows that the page parameters ask for."""
        limit = self.simulator.default_page_size
        page, size = self.args.get("page"), self.args.get("pagesize")
        if (page is None) != (size is None):
            given, needed = ("pagesize", "page") if page is None else ("page", "pagesize")
            text = '"{}" parameter is required when "{}" is specified'
            raise ApiError(431, text.format(needed, given), cserrorcode=9999)
        if page is None:
            return rows[:limit]
        if size > limit:
            raise ApiError(431, "Page size can't exceed max allowed page size value: {}".format(limit))
        if page < 1 or size < 1:
            raise ApiError(431, "page and pagesize have to be positive")
        return rows[(page - 1) * size:page * size]


def read_date(text):
    """Seconds of a date parameter; without an offset it is in the server's time zone, which is UTC here."""
    text = text.strip().replace(" ", "T")
    seconds = parse_date(text)
    if seconds is None:
        seconds = parse_date((text if "T" in text else text + "T00:00:00") + "Z")
    if seconds is None:
        raise ValueError(text)
    return seconds


# lists

_NO_FILTER = set(OWNING + PAGING + ("templatefilter", "details"))
_FILTERS = {
    "ids": lambda row, ids: row["id"] in ids,
    "networkid": lambda row, uuid: any(nic["networkid"] == uuid for nic in row["nic"]),
    "securitygroupid": lambda row, uuid: any(group["id"] == uuid for group in row["securitygroup"]),
    "affinitygroupid": lambda row, uuid: any(group["id"] == uuid for group in row["affinitygroup"]),
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
    if not user.admin:
        return [row for row in rows if owned_by(row, user.owner)]
    if "account" in call.args:
        owner = {"account": call.args["account"], "domainid": call.get("domainid", user.domainid)}
        return [row for row in rows if owned_by(row, owner)]
    if "domainid" in call.args:
        return [row for row in rows if row["domainid"] == call.args["domainid"]]
    return rows if call.get("listall") else [row for row in rows if owned_by(row, user.owner)]


def select(call, rows):
    """The rows that pass every filter among the arguments."""
    if "id" in call.args and "ids" in call.args:
        raise ApiError(431, "Specify either id or ids but not both parameters")
    for name, value in call.args.items():
        if name in _NO_FILTER:
            continue
        if name == "tags":
            wanted = call.pairs()
            rows = [row for row in rows if has_tags(row, wanted)]
        elif name in _FILTERS:
            rows = [row for row in rows if _FILTERS[name](row, value)]
        elif name == "name" and call.spec.entity == "virtualmachine":
            rows = [row for row in rows if value.lower() in row["name"].lower()]
        else:
            word = str(value).lower()
            rows = [row for row in rows if str(row.get(name, "")).lower() == word]
    if "keyword" in call.args:
        word = call.args["keyword"].lower()
        rows = [row for row in rows if word in row.get("name", "").lower()]
    return rows


def has_tags(row, wanted):
    tags = {tag["key"]: tag["value"] for tag in row.get("tags", ())}
    return all(key in tags and value in (None, tags[key]) for key, value in wanted)


def _list(name, table, parameters="", description=None, member=None, key=None, admin=False, newest_first=False):
    """Register a command that lists a table."""
    owned = table in OWNED or table == "resourcelimit"
    owning = [name for name in OWNING if owned and (table, name) != ("project", "projectid")]
    parameters = " ".join([parameters, *PAGING, *owning])

    def run(call):
        rows = call.cloud.tables[table][::-1 if newest_first else 1]
        return Rows(member or table, select(call, visible(call, rows) if owned else rows))

    text = description or "Lists {}s.".format(table)
    COMMANDS[name] = Command(name, parameters, text, table, run, False, key, admin)


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
_list("listEvents", "event", "id type level startdate enddate", newest_first=True)
_list("listResourceLimits", "resourcelimit", "resourcetype:integer", "Lists resource limits.")
_list("listCounters", "counter", "id name", key="counterresponse")
_list("listHostTags", "hosttag", "", "Lists the tags of hosts.", admin=True)
_list("listStorageProviders", "provider", "type!", "Lists storage providers.", "dataStoreProvider", admin=True)
_LIST = " ".join(PAGING + OWNING)


@command("listTemplates", "templatefilter! id ids@4.9 name zoneid hypervisor tags " + _LIST, "Lists templates.",
         "template")
def _list_templates(call):
    known = "featured self selfexecutable sharedexecutable executable community all".split()
    if call.args["templatefilter"] not in known:
        raise ApiError(431, "Please specify a valid template filter")
    return Rows("template", select(call, call.cloud.tables["template"]))


@command("listAccounts", "id name state domainid listall isrecursive keyword page pagesize", "Lists accounts.",
         "account")
def _list_accounts(call):
    every = call.user.admin and call.get("listall")
    rows = [row for row in call.cloud.tables["account"] if every or row["id"] == call.user.accountid]
    return Rows("account", select(call, rows))


@command("listSecurityGroups", "id securitygroupname virtualmachineid tags " + _LIST, "Lists security groups.",
         "securitygroup")
def _list_security_groups(call):
    return Rows("securitygroup", of_machine(call, "securitygroup"))


@command("listAffinityGroups", "id name type virtualmachineid " + _LIST, "Lists affinity groups.", "affinitygroup")
def _list_affinity_groups(call):
    return Rows("affinitygroup", of_machine(call, "affinitygroup"))


def of_machine(call, table):
    """The groups of the table, or those of the machine that the call names."""
    rows = visible(call, call.cloud.tables[table])
    machine = call.entity("virtualmachine", "virtualmachineid")
    if machine:
        del call.args["virtualmachineid"]
        rows = [row for row in rows if any(group["id"] == row["id"] for group in machine[table])]
    return select(call, rows)


@command("listTags", "key value resourceid resourcetype " + _LIST, "Lists the tags of resources.", "tag")
def _list_tags(call):
    tables = [call.cloud.tables[table] for table in sorted(OWNED)]
    tags = [tag for table in tables for row in table for tag in row.get("tags", ())]
    return Rows("tag", select(call, visible(call, tags)))


@command("listAsyncJobs", "startdate account domainid listall isrecursive keyword page pagesize",
         "Lists the jobs that are not done yet.", "job")
def _list_async_jobs(call):
    cloud, retention = call.cloud, call.simulator.job_retention
    pending = [job for job in cloud.jobs.values() if job.status == 0 and cloud.job(job.id, retention)]
    if not (call.user.admin and call.get("listall")):
        pending = [job for job in pending if job.user.account == call.user.account]
    pending = [job for job in pending if job.created >= call.get("startdate", 0)]
    return Rows("asyncjobs", [job.row() for job in sorted(pending, key=lambda job: job.created)])


@command("queryAsyncJobResult", "jobid", "Asks for the state and the result of a job.", "job")
def _query_job(call):
    if "jobid" not in call.args:
        raise ApiError(431, "Expected parameter job id or parameters resource type and resource id")
    job = call.cloud.job(call.args["jobid"], call.simulator.job_retention)
    if job is None:
        raise call.invalid("jobid", call.args["jobid"])
    if not call.user.admin and job.user.account != call.user.account:
        who = {"accountName": call.user.account, "id": call.cloud.number("account", call.user.accountid),
               "uuid": call.user.accountid}
        text = "Account Account [{}] is not authorized to see job id={}"
        raise ApiError(531, text.format(to_json(who), list(call.cloud.jobs).index(job.id) + 1))
    return job.row()


@command("listCapabilities", "", "Lists what the server can do.", "capability")
def _list_capabilities(call):
    limit = call.simulator.rate_limit
    return {"capability": dict(
        {"apilimitmax": limit, "apilimitinterval": 1} if limit else {}, cloudstackversion="4.23.0.0",
        securitygroupsenabled=True, userpublictemplateenabled=True, defaultuipagesize=20, dynamicrolesenabled=True)}


@command("getApiLimit", "", "Tells what is left of the caller's API limit.", "apilimit")
def _get_api_limit(call):
    issued, limit = call.simulator.issued(call.user), call.simulator.rate_limit
    if not limit:
        raise ApiError(432, "This api is only available when api.throttling.enabled = true.")
    return {"apilimit": {"account": call.user.account, "accountid": call.user.accountid, "apiIssued": issued,
                         "apiAllowed": max(0, limit - issued), "expireAfter": 1000}}


@command("getVirtualMachineUserData", "virtualmachineid!", "Returns the user data of a machine.", "virtualmachine")
def _get_user_data(call):
    machine = call.entity("virtualmachine", "virtualmachineid")
    found = {"virtualmachineid": machine["id"], "userdata": call.cloud.userdata.get(machine["id"])}
    return {"virtualmachineuserdata": {name: value for name, value in found.items() if value is not None}}


@command("getUploadParamsForVolume", "name! zoneid! format! diskofferingid projectid account domainid",
         "Makes a volume to upload to.", "volume", key="postuploadvolumeresponse")
def _get_upload_params(call):
    volume = call.cloud.new_volume(call.owner(), call.entity("zone", "zoneid"), call.args["name"], 1)
    volume["state"] = "NotUploaded"
    return {"getuploadparams": {"id": volume["id"], "postURL": "https://upload.cloud.example/upload/" + volume["id"],
                                "metadata": "c2ltdWxhdGVk", "expires": format_date(call.cloud.clock() + 600),
                                "signature": make_key(volume["id"])}}


# virtual machines


def need(row, *states):
    """A job that finds its resource in another state fails."""
    if row["state"] not in states:
        text = "Unable to do this with {} {}: it is {}, not {}"
        raise ApiError(530, text.format(row.get("instancename") or row["name"], row["id"], row["state"],
                                        " or ".join(states)), [(row["id"], "")])


def check_userdata(call):
    if not _BASE64.fullmatch(call.get("userdata", "")):
        raise ApiError(431, "User data is not base64 encoded")


def check_host_name(call, name, networks):
    """A name stands once in a network."""
    wanted = {network["id"]: network for network in networks}
    for machine in call.cloud.tables["virtualmachine"]:
        for nic in machine["nic"]:
            if machine["name"] == name and nic["networkid"] in wanted:
                text = "The vm with hostName {} already exists in the network domain: {}; network={}"
                raise ApiError(431, text.format(name, "cs2cloud.internal", nic["networkname"]))


@command("deployVirtualMachine",
         "serviceofferingid! zoneid! templateid name displayname networkids iptonetworklist diskofferingid size "
         "rootdisksize@4.4 details@4.3 userdata keypair securitygroupids securitygroupnames affinitygroupids "
         "affinitygroupnames hostid group startvm hypervisor account domainid projectid",
         "Creates a virtual machine and starts it.", "virtualmachine", job=True)
def _deploy(call):
    cloud, get = call.cloud, call.get
    machine = deployed(call)
    host = call.entity("host", "hostid")
    yield machine["id"], machine["id"]
    machine["state"] = "Starting"
    yield
    if machine["memory"] > 1 << 20 or machine["cpunumber"] > 64:
        machine["state"] = "Error"
        who = {"id": cloud.number("virtualmachine", machine["id"]), "instanceName": machine["instancename"],
               "state": "Stopped", "type": "User", "uuid": machine["id"]}
        raise ApiError(533, "No destination found for a deployment for VM instance " + to_json(who))
    if get("startvm", True):
        cloud.place(machine, host)
    else:
        cloud.unplace(machine, "Stopped")
    result = dict(machine)
    if machine["passwordenabled"]:
        result["password"] = make_key(machine["id"])[:12]
    return {"virtualmachine": result}


def deployed(call):
    """The new row of a machine, its arguments checked."""
    cloud, get, owner = call.cloud, call.get, call.owner()
    if "templateid" not in call.args:
        raise ApiError(431, "Unable to use template null")
    check_userdata(call)
    if "networkids" in call.args and "iptonetworklist" in call.args:
        raise ApiError(431, "networkids can't be given along with iptonetworklist")
    zone = call.entity("zone", "zoneid")
    networks, addresses = call.entities("network", "networkids"), []
    for entry in get("iptonetworklist", ()):
        network = cloud.find("network", entry.get("networkid"))
        if network is None:
            raise ApiError(431, "Unable to find network {}".format(entry.get("networkid")))
        networks.append(network)
        addresses.append(entry.get("ip"))
    if not networks:
        mine = (row for row in cloud.tables["network"] if row["zoneid"] == zone["id"] and owned_by(row, owner))
        networks = list(mine)[:1]
    groups = call.entities("securitygroup", "securitygroupids", "securitygroupnames")
    affinity = call.entities("affinitygroup", "affinitygroupids", "affinitygroupnames")
    if "keypair" in call.args and not cloud.named("sshkeypair", get("keypair")):
        raise ApiError(431, "A key pair with name '{}' was not found.".format(get("keypair")))
    template, offering = call.entity("template", "templateid"), call.entity("serviceoffering", "serviceofferingid")
    name = get("name") or "VM-" + cloud.uuid()
    check_host_name(call, name, networks)
    machine = cloud.new_machine(owner, zone, template, offering, networks, name, addresses, call.details())
    machine.update({field: get(field) for field in ("displayname", "keypair", "group") if field in call.args})
    machine["securitygroup"] = [{"id": row["id"], "name": row["name"]} for row in groups]
    machine["affinitygroup"] = [{"id": row["id"], "name": row["name"]} for row in affinity]
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
    if machine["state"] == "Running":
        raise ApiError(431, "The virtual machine {id} ({name}) is already running".format(**machine))
    need(machine, "Stopped")
    machine["state"] = "Starting"
    yield
    call.cloud.place(machine, host)
    return {"virtualmachine": machine}


@command("stopVirtualMachine", "id! forced", "Stops a virtual machine.", "virtualmachine", job=True)
def _stop(call):
    machine = call.entity("virtualmachine")
    yield machine["id"], None
    need(machine, "Running", "Stopped")
    machine["state"] = "Stopping"
    yield
    call.cloud.unplace(machine, "Stopped")
    return {"virtualmachine": machine}


@command("rebootVirtualMachine", "id! forced@4.16.0", "Reboots a virtual machine.", "virtualmachine", job=True)
def _reboot(call):
    machine = call.entity("virtualmachine")
    yield machine["id"], None
    need(machine, "Running")
    yield
    return {"virtualmachine": machine}


@command("destroyVirtualMachine", "id! expunge@4.2.1", "Destroys a virtual machine.", "virtualmachine", job=True)
def _destroy(call):
    machine = call.entity("virtualmachine")
    yield machine["id"], None
    need(machine, "Running", "Stopped", "Error", "Destroyed")
    yield
    call.cloud.unplace(machine, "Destroyed")
    if not call.get("expunge"):
        return {"virtualmachine": machine}
    call.cloud.expunge(machine)
    lists = {name: [] for name in ("affinitygroup", "nic", "securitygroup", "tags")}
    return {"virtualmachine": dict(lists, deleteprotection=False)}  # nothing else is left to tell of


@command("restoreVirtualMachine", "virtualmachineid! templateid", "Puts a machine back to its template.",
         "virtualmachine", job=True, key="restorevmresponse")
def _restore(call):
    machine, template = call.entity("virtualmachine", "virtualmachineid"), call.entity("template", "templateid")
    yield machine["id"], None
    need(machine, "Running", "Stopped")
    yield
    if template:
        machine.update(templateid=template["id"], templatename=template["name"])
    return {"virtualmachine": machine}


@command("updateVirtualMachine", "id! name@4.4 displayname group haenable userdata@4.16.0 details securitygroupids",
         "Changes the properties of a machine.", "virtualmachine")
def _update(call):
    machine = call.entity("virtualmachine")
    check_userdata(call)
    if call.get("name", machine["name"]) != machine["name"]:
        check_host_name(call, call.get("name"), [{"id": nic["networkid"]} for nic in machine["nic"]])
    for field in ("name", "displayname", "group", "haenable"):
        if field in call.args:
            machine[field] = call.args[field]
    machine["details"].update(call.details())
    if "userdata" in call.args:
        call.cloud.userdata[machine["id"]] = call.args["userdata"]
    if "securitygroupids" in call.args:
        groups = call.entities("securitygroup", "securitygroupids")
        machine["securitygroup"] = [{"id": row["id"], "name": row["name"]} for row in groups]
    return {"virtualmachine": machine}


# volumes and snapshots


@command("createVolume", "name zoneid diskofferingid snapshotid size maxiops account domainid projectid",
         "Creates a volume.", "volume", job=True)
def _create_volume(call):
    zone, offering = call.entity("zone", "zoneid"), call.entity("diskoffering", "diskofferingid")
    snapshot = call.entity("snapshot", "snapshotid")
    if not offering and not snapshot:
        raise ApiError(431, "Missing parameter(s), either a positive volume size or snapshotid must be specified.")
    size = call.get("size") or (offering or {}).get("disksize") or (snapshot or {}).get("virtualsize", 1 << 30) >> 30
    zone = zone or call.cloud.tables["zone"][0]
    volume = call.cloud.new_volume(call.owner(), zone, call.get("name") or "VOL-" + call.cloud.uuid(), size)
    if offering:
        volume.update(diskofferingid=offering["id"], diskofferingname=offering["name"])
    yield volume["id"], volume["id"]
    yield
    return {"volume": volume}


@command("attachVolume", "id! virtualmachineid! deviceid", "Attaches a volume to a machine.", "volume", job=True)
def _attach(call):
    volume, machine = call.entity("volume"), call.entity("virtualmachine", "virtualmachineid")
    yield volume["id"], None
    need(machine, "Running", "Stopped")
    if "virtualmachineid" in volume:
        raise ApiError(431, "Please specify a volume that is not attached to any VM.", [(volume["id"], "volumeId")])
    yield
    call.cloud.attach(volume, machine, call.get("deviceid"))
    return {"volume": volume}


@command("detachVolume", "id virtualmachineid deviceid", "Detaches a volume from its machine.", "volume", job=True)
def _detach(call):
    volume, machine = call.entity("volume"), call.entity("virtualmachine", "virtualmachineid")
    if machine and not volume:
        found = [row for row in call.cloud.volumes_of(machine) if row["deviceid"] == call.get("deviceid")]
        volume = found[0] if found else None
    if volume is None:
        raise ApiError(431, "Please provide either a volume id, or a tuple(device id, instance id)")
    yield volume["id"], None
    if "virtualmachineid" not in volume or volume["type"] == "ROOT":
        raise ApiError(431, "The specified volume is not attached, or is a root volume.", [(volume["id"], "volumeId")])
    yield
    call.cloud.detach(volume)
    return {"volume": volume}


@command("deleteVolume", "id!", "Deletes a detached volume.", "volume")
def _delete_volume(call):
    volume = call.entity("volume")
    if "virtualmachineid" in volume:
        raise ApiError(431, "Please specify a volume that is not attached to any VM.", [(volume["id"], "volumeId")])
    call.cloud.remove("volume", volume)
    return {"success": True}


@command("deleteSnapshot", "id!", "Deletes a snapshot.", "snapshot", job=True)
def _delete_snapshot(call):
    snapshot = call.entity("snapshot")
    yield snapshot["id"], None
    yield
    call.cloud.remove("snapshot", snapshot)
    return {"success": True}


# tags, groups, keys, projects

_TAGGED = {"uservm": "virtualmachine", "virtualmachine": "virtualmachine"}


def _resources(call):
    table = call.args["resourcetype"].lower()
    table = _TAGGED.get(table, table)
    if table not in OWNED and table != "template":
        raise ApiError(431, "Unknown resource type {}".format(call.args["resourcetype"]))
    return call.entities(table, "resourceids")


@command("createTags", "tags! resourcetype! resourceids!", "Puts tags on resources.", "tag", job=True)
def _create_tags(call):
    rows, pairs = _resources(call), call.pairs()
    yield None, None
    yield
    kind = call.args["resourcetype"]
    for row in rows:
        for key, _ in pairs:
            if has_tags(row, [(key, None)]):
                raise ApiError(530, "tag {} already on {} with id {}".format(key, kind, row["id"]))
    for row in rows:
        for key, value in pairs:
            call.cloud.tag(row, kind, key, value)
    return {"success": True}


def _new(call, table, **values):
    """A row of the caller's with a name that it has not given before."""
    name, owner = call.args["name"], call.owner()
    if call.mine(table, name):
        raise ApiError(431, "A {} with name '{}' already exists.".format(table, name))
    return call.cloud.add(table, name, owner, **values)


@command("createSecurityGroup", "name! description account domainid projectid", "Creates a security group.",
         "securitygroup")
def _create_security_group(call):
    return {"securitygroup": _new(call, "securitygroup", description=call.get("description", ""), ingressrule=[],
                                  egressrule=[], tags=[])}


def _traffic(rule):
    """What a rule lets in; no two rules of a group let in the same."""
    return tuple(rule.get(name) for name in ("protocol", "startport", "endport", "icmptype", "icmpcode", "cidr"))


@command("authorizeSecurityGroupIngress",
         "securitygroupid securitygroupname protocol startport endport icmptype icmpcode cidrlist account domainid "
         "projectid",
         "Lets traffic into a security group.", "securitygroup", job=True)
def _authorize(call):
    group = call.entity("securitygroup", "securitygroupid")
    group = group or call.mine("securitygroup", call.get("securitygroupname"))
    if group is None:
        raise ApiError(431, "Unable to find security group")
    protocol, first = call.get("protocol", "all").lower(), call.get("startport")
    if protocol in ("tcp", "udp") and first is None:
        raise ApiError(431, "Invalid port: startport and endport are needed for " + protocol)
    yield group["id"], None
    yield
    last = call.get("endport", first)
    codes = {name: call.get(name) for name in ("icmptype", "icmpcode")}
    there = {_traffic(rule) for rule in group["ingressrule"]}
    rules = [call.cloud.rule(protocol, first, last, cidr, **codes) for cidr in call.get("cidrlist", ["0.0.0.0/0"])]
    rules = [rule for rule in rules if _traffic(rule) not in there]
    if not rules:
        raise ApiError(530, "Failed to authorize security group ingress rule(s)")
    group["ingressrule"] += rules
    return {"securitygroup": dict(group, ingressrule=rules)}


@command("createAffinityGroup", "name! type! description account domainid projectid", "Creates an affinity group.",
         "affinitygroup", job=True)
def _create_affinity_group(call):
    group = _new(call, "affinitygroup", type=call.args["type"], description=call.get("description"))
    yield group["id"], group["id"]
    yield
    return {"affinitygroup": group}


@command("deleteAffinityGroup", "id name account domainid projectid", "Deletes an affinity group.", "affinitygroup",
         job=True)
def _delete_affinity_group(call):
    group = call.entity("affinitygroup") or call.mine("affinitygroup", call.get("name"))
    if group is None:
        raise ApiError(431, "Unable to find affinity group")
    yield group["id"], None
    yield
    call.cloud.remove("affinitygroup", group)
    return {"success": True}


def _fingerprint(seed):
    digest = hashlib.md5(seed.encode("utf-8")).hexdigest()
    return ":".join(digest[index:index + 2] for index in range(0, 32, 2))


@command("createSSHKeyPair", "name! account domainid projectid", "Creates an ssh key pair.", "sshkeypair")
def _create_key_pair(call):
    pair = _new(call, "sshkeypair", fingerprint=_fingerprint(call.args["name"]))
    lines = "\n".join(make_key(pair["id"] + str(line))[:64] for line in range(4))
    pem = "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----\n".format(lines)
    return {"keypair": dict(pair, privatekey=pem)}


@command("deleteSSHKeyPair", "name! account domainid projectid", "Deletes an ssh key pair.", "sshkeypair")
def _delete_key_pair(call):
    pair = call.mine("sshkeypair", call.args["name"])
    if pair is None:
        raise ApiError(431, "A key pair with name '{}' does not exist.".format(call.args["name"]))
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
    project = call.entity("project")
    yield project["id"], None
    yield
    project["state"] = "Active"
    return {"project": project}


# listApis

_KINDS = {bool: "boolean", int: "integer", dict: "map", list: "list"}
_schema = []


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
        field = {"name": name, "description": "the {} of the {}".format(name, entity), "type": kind}
        if kind == "list" and value and isinstance(value[0], dict):
            field["response"] = _response_fields(name, value)
        described.append(field)
    return described


def schema():
    """Pairs of a command and its entry in listApis, made once: (Command, dict)."""
    if not _schema:
        tables = Cloud().tables
        by_entity = collections.defaultdict(list)
        for spec in COMMANDS.values():
            by_entity[spec.entity].append(spec.name)
        _schema.extend((spec, _api(spec, tables, by_entity[spec.entity])) for spec in COMMANDS.values())
    return _schema


def _api(spec, tables, related):
    success = [{"success": True, "displaytext": ""}]
    response = _response_fields(spec.entity, tables.get(spec.entity) or success)
    if spec.job:
        response += [{"name": name, "description": text, "type": kind} for name, text, kind in (
            ("jobid", "the UUID of the latest async job acting on this object", "string"),
            ("jobstatus", "the current status of the latest async job acting on this object", "integer"))]
    entry = {"name": spec.name, "description": spec.description, "isasync": spec.job, "params": [
        dict({"name": p.name, "description": p.description, "type": p.type, "length": p.length, "required": p.required},
             **({"since": p.since} if p.since else {})) for p in spec.parameters]}
    others = ",".join(name for name in related if name != spec.name)
    if others:
        entry["related"] = others
    entry["response"] = response + [{}]
    entry["httprequesttype"] = "GET" if spec.reading else "POST"
    return entry


@command("listApis", "name", "Lists the commands the caller may use.", "api")
def _list_apis(call):
    entries = [entry for spec, entry in schema() if call.simulator.allowed(call.user, spec)]
    entries += [dict(schema()[0][1], name="listSynthetic{:04d}".format(number), description="Made for tests.")
                for number in range(call.simulator.extra_apis)]
    if "name" in call.args:
        entries = [entry for entry in entries if entry["name"].lower() == call.args["name"].lower()]
        if not entries:
            raise ApiError(431, "Unable to find the API {}".format(call.args["name"]))
    random.shuffle(entries)
    return {"count": len(entries), "api": entries}


@command("login", "username! password! domain", "Starts a session; by POST only.", "session")
def _login(call):
    return call.simulator.sessions.open(call)


@command("logout", "", "Ends the session.", "session")
def _logout(call):
    return {"description": "success"}


# --- simulator: server ----------------------------------------------------------------------------------------------
# Sessions, the checks before a command runs, connections, and the Simulator that holds them together.


class Sessions:
    """Who has logged in. A session is a cookie and a session key that has to come with it."""

    def __init__(self, simulator):
        self.simulator, self.open_sessions, self.opened = simulator, {}, 0

    def open(self, call):
        path = ("/" + call.get("domain", "/").strip("/") + "/").replace("//", "/")
        paths = [row["path"][len("ROOT"):] + "/" for row in call.cloud.tables["domain"]]
        if path not in paths:
            raise ApiError(531, "Unable to find the domain from the path " + path, cserrorcode=None)
        for user in call.cloud.users.values():
            if (user.username, user.password) == (call.args["username"], call.args["password"]):
                if user.domain.rstrip("/") + "/" == path:
                    return self._opened(call, user)
        text = "Failed to authenticate user {} in domain {}; please provide valid credentials"
        raise ApiError(531, text.format(call.args["username"], paths.index(path) + 1), cserrorcode=None)

    def _opened(self, call, user):
        self.opened += 1
        uuid, key = "node0" + call.cloud.uuid().replace("-", ""), make_key(call.cloud.uuid())[:27]
        self.open_sessions[uuid] = [user, key, self.simulator.clock()]
        call.cookies = ["JSESSIONID={}; Path=/client; HttpOnly".format(uuid), "sessionkey={}; HttpOnly".format(key)]
        return {"username": user.username, "userid": user.id, "domainid": user.domainid, "account": user.account,
                "timeout": self.simulator.session_timeout, "firstname": user.row["firstname"], "registered": "false",
                "lastname": user.row["lastname"], "type": str(user.row["accounttype"]), "sessionkey": key}

    def user(self, record, cookies):
        """The user of a live session, or None without one. What does not know the session key ends the session."""
        uuid = cookies.get("JSESSIONID")
        session = self.open_sessions.get(uuid)
        now = self.simulator.clock()
        if session and now > session[2] + self.simulator.session_timeout:
            session = self.open_sessions.pop(uuid, None) and None
        if session is None:
            return None
        if not session[1] == cookies.get("sessionkey") == record.params.get("sessionkey"):
            del self.open_sessions[uuid]
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

    def __init__(self, port=0, host="127.0.0.1", tls=None, **options):
        self.port, self.host, self.tls = port, host, tls
        for name, value in options.items():
            if name not in OPTIONS:
                raise TypeError("Simulator has no option {!r}".format(name))
            setattr(self, name, value)
        self.requests = []
        self.sessions = Sessions(self)
        self._received, self._accepted = collections.Counter(), collections.Counter()
        self._scripts = collections.defaultdict(collections.deque)
        self._windows = {}
        self._cloud, self._lock = None, threading.RLock()
        self._listeners, self._connections, self._connected = [], set(), 0
        self._integration = None
        self._stopping = threading.Event()

    # the public face

    def start(self):
        self._stopping.clear()
        self.port = self._listen(self.port, self.tls, False)
        return self

    def stop(self):
        """Close every socket, and wait a moment for the threads."""
        self._stopping.set()
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
        return "{}://{}/client/api".format("https" if self.tls else "http", self._authority(self.port))

    @property
    def integration_endpoint(self):
        with self._lock:
            if self._integration is None:
                self._integration = self._listen(0, None, True)
        return "http://{}/client/api".format(self._authority(self._integration))

    @property
    def cloud(self):
        with self._lock:
            if self._cloud is None:
                self._cloud = Cloud(lambda: self.clock())
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

    def count(self, command_name):
        """How many requests of the command were received."""
        return self._received[command_name]

    def accepted(self, command_name):
        """How many requests of the command passed every check and ran."""
        return self._accepted[command_name]

    def script(self, command_name, *answers):
        """Have the next exchanges of a command (None: of any) answered by these: an Answer, a callable that is given
        the Record and returns an Answer or None, DROP, RUN_THEN_DROP or GO_ON.
        """
        with self._lock:
            self._scripts[command_name].extend(answers)

    def allowed(self, user, spec):
        return user.admin or not (spec.admin or spec.name in self.role_lacks)

    def issued(self, user):
        start, count = self._windows.get(user.account, (0, 0))
        return count if self.clock() < start + 1 else 0

    # sockets

    def _authority(self, port):
        return "{}:{}".format("[" + self.host + "]" if ":" in self.host else self.host, port)

    def _listen(self, port, tls, integration):
        listener = Listener(self, self.host, port, tls, integration)
        self._listeners.append(listener)
        return listener.port

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

    def pause(self):
        """Sit out the latency; whether the server is stopping."""
        return self._stopping.wait(self.latency) if self.latency else self._stopping.is_set()

    # one exchange

    def receive(self, record):
        with self._lock:
            self.requests.append(record)
            self._received[record.command] += 1

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
        if self.html_error:
            raise HtmlError(self.html_error, close=False)
        if not integration and record.path.rstrip("/") != "/client/api":
            raise HtmlError(404, close=False)
        if record.method not in ("GET", "POST"):
            raise HtmlError(405, "HTTP method {} is not supported by this URL".format(record.method), close=False)
        name = record.params.get("command")
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
            except ApiError as error:
                failure = error
            except HtmlError as error:
                return error.answer()
            except Exception as error:  # a mistake in the simulator itself must not look like a network failure
                failure = ApiError(530, "Internal error: {!r}".format(error))
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
            text = "The API [{}] does not exist or is not available for the account {}."
            raise ApiError(432, text.format(spec.name, user.account))
        if spec is None:
            raise ApiError(432, "The given command '{}' either does not exist, is not available for user, or not "
                                "available from ip address '127.0.0.1'.".format(record.command))
        if self.maintenance:
            raise ApiError(503, "The server is in maintenance and does not take requests")
        if user and not integration:
            self._throttle(user)
        for name, value in record.params.items():
            if _CONTROL.search(value) or _CONTROL.search(name):
                text = "Received value containing illegal ASCII non-printable characters for parameter {}"
                raise ApiError(431, text.format(_CONTROL.sub("?", name)), cserrorcode=9999)
        call = Call(self, user, spec, record.params)
        call.convert()
        body = self._run(call)
        with self._lock:
            self._accepted[spec.name] += 1
        return body, call.cookies

    def _authenticated(self, record, spec, integration):
        """The user who asks; None where nobody needs to be known."""
        params, cookies = record.params, record.cookies()
        if integration:
            if any(name.lower() in ("apikey", "signature") for name in params):
                raise ApiError(401, "The integration port takes no credentials")
            return self.cloud.users["admin"]
        if spec and spec.name in ("login", "logout"):
            if spec.name == "logout":
                self.sessions.close(cookies)
            return None
        if self.enforce_post and record.method != "POST" and not is_reading(params.get("command", "")):
            text = "State changing command {} needs to be sent using POST request"
            raise ApiError(400, text.format(record.command))
        user = self.sessions.user(record, cookies)
        if user is None:
            return self._verified(params, spec)
        if self.two_factor:
            raise ApiError(511, "Two factor authentication is mandatory, and this session has not passed it")
        return user

    def _verified(self, params, spec):
        """The user whose key and signature these are. What is wrong is not told."""
        user = next((user for user in self.cloud.users.values() if user.key == params.get("apiKey")), None)
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
        now = self.clock()
        start, count = self._windows.get(user.account, (0, 0))
        if now >= start + 1:
            start, count = now, 0
        if count >= self.rate_limit:
            text = "The given user has reached his/her account api limit, please retry after [{}] ms."
            raise ApiError(429, text.format(max(1, int((start + 1 - now) * 1000))))
        self._windows[user.account] = (start, count + 1)

    def _run(self, call):
        spec = call.spec
        result = spec.run(call)
        if spec.job:
            lost = spec.name in self.job_fails_without_result
            return self.cloud.submit(spec, call.user, result, self.job_seconds, call.plain.get("customjobid"), lost)
        return self._paged(call, result) if isinstance(result, Rows) else result

    def _paged(self, call, result):
        name, total = call.spec.name, len(result.rows)
        page = call.page(result.rows)
        if name in self.ignores_paging:
            page = result.rows
        if name in self.count_is_page_length:
            total = len(page)
        if not total:
            return {}
        body = {} if name in self.count_missing else {"count": total}
        if page:
            body[result.member] = page
        return body


OPTIONS = frozenset(
    "job_seconds job_retention clock enforce_post default_page_size count_is_page_length count_missing ignores_paging "
    "role_lacks rate_limit gzip chunk_over idle_close json_content_type latency maintenance html_error empty_200 "
    "two_factor session_timeout job_fails_without_result extra_apis".split()
)


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
        self.address = self.sock.getsockname()
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
            socket.create_connection(self.address[:2], 1).close()
        except OSError:
            pass
        self.thread.join(1)
        self.sock.close()


class Connection:
    """One TCP connection and the thread that serves it, request after request."""

    def __init__(self, simulator, sock, tls, integration, number):
        self.simulator, self.sock, self.tls, self.integration, self.number = simulator, sock, tls, integration, number
        self.buffer = b""
        self.thread = threading.Thread(target=self._serve, name="simulator", daemon=True)

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
            while self._exchange():
                self.sock.settimeout(max(0.001, self.simulator.idle_close))
        except (OSError, EOFError, ValueError):  # gone, idle for too long, or no HTTP
            pass
        finally:
            self.simulator.disconnected(self)
            self.sock.close()

    def _exchange(self):
        """Read a request and answer it; whether the connection goes on."""
        try:
            record = self._request()
        except HtmlError as error:
            self._send(error.answer(), None, False)
            self._linger()
            return False
        keep = self._keeps(record)
        step = self.simulator.scripted(record)
        if self.simulator.pause() or step is DROP:
            return False
        if step in (GO_ON, RUN_THEN_DROP):
            answer = self._answer(record)
            if step is RUN_THEN_DROP:
                return False
        else:
            answer = step
        keep = keep and not answer.close
        self._send(answer, record, keep)
        if not keep and self.integration:
            self._linger()
        return keep

    def _answer(self, record):
        try:
            if "Content-Encoding" in record.headers and not self.integration:
                raise HtmlError(415, close=False)
            return self.simulator.answer(record, self.integration)
        except HtmlError as error:
            return error.answer()

    def _keeps(self, record):
        options = record.headers.get("Connection", "").lower()
        if self.integration or "close" in options:
            return False
        return record.version == "HTTP/1.1" or "keep-alive" in options

    # reading

    def _more(self):
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        self.buffer += data

    def _head(self):
        while b"\r\n\r\n" not in self.buffer:
            if len(self.buffer) > MAX_HEAD:
                break
            self._more()
            self.buffer = self.buffer.lstrip(b"\r\n")
        head, _, rest = self.buffer.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD:
            raise HtmlError(414 if len(head.partition(b"\r\n")[0]) > MAX_HEAD else 431)
        self.buffer = rest
        return head.decode("latin-1")

    def _request(self):
        lines = self._head().split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise HtmlError(400)
        pairs = (line.partition(":") for line in lines[1:])
        headers = Headers((name.strip(), value.strip()) for name, _, value in pairs)
        target = words[1]
        if "://" in target[:8]:  # what a proxy is sent
            target = "/" + target.partition("://")[2].partition("/")[2]
        record = Record(words[0], target, words[2], headers, self.number)
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

    def _take(self, size):
        while len(self.buffer) < size:
            self._more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def _line(self):
        while b"\r\n" not in self.buffer:
            self._more()
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def _chunks(self):
        body = b""
        while True:
            size = int(self._line().partition(b";")[0], 16)
            if not size:
                while self._line():
                    pass
                return body
            body += self._take(size)
            self._line()

    # writing

    def _send(self, answer, record, keep):
        body, headers = answer.body, dict(answer.headers)
        if answer.gzip and len(body) > 32:
            packer = zlib.compressobj(4, zlib.DEFLATED, 31)
            body = packer.compress(body) + packer.flush()
            headers.update({"Content-Encoding": "gzip", "Vary": "Accept-Encoding"})
        lowered = {name.lower() for name in headers}
        chunks = answer.gzip is not None and record.version == "HTTP/1.1"
        if chunks and len(body) > self.simulator.chunk_over:
            headers["Transfer-Encoding"] = "chunked"
            pieces = [body[start:start + 8192] for start in range(0, len(body), 8192)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        elif not lowered & {"content-length", "transfer-encoding"} and answer.status not in (204, 304):
            headers["Content-Length"] = str(len(body))
        if not keep:
            headers["Connection"] = "close"
        elif record.version == "HTTP/1.0":
            headers["Connection"] = "keep-alive"
        reason = answer.reason
        if reason is None:
            reason = http.client.responses.get(answer.status, str(answer.status))
        lines = ["HTTP/1.1 {} {}".format(answer.status, reason)]
        lines += ["{}: {}".format(name, value) for name, value in headers.items()]
        lines += ["Set-Cookie: " + cookie for cookie in answer.cookies]
        self.sock.sendall("\r\n".join(lines + ["", ""]).encode("latin-1", "replace") + body)

    def _linger(self):
        """Read what the client still sends, so that closing does not tear the answer away from it."""
        socket.socket.shutdown(self.sock, socket.SHUT_WR)
        self.sock.settimeout(0.2)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and self.sock.recv(65536):
            pass


# --- sandbox --------------------------------------------------------------------------------------------------------
# The simulator for people: one command against it, or the server alone until Ctrl-C.

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def sandbox_environment(**more):
    """The environment without what would lead cs.py elsewhere: its own settings and proxies."""
    kept = {name: value for name, value in os.environ.items()
            if not name.upper().startswith("CLOUDSTACK_") and name.lower() not in PROXIES}
    kept.update(more)
    return kept


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
        simulator = Simulator(port)
        simulator.start()
    except ValueError as error:
        return complain("sandbox: {}".format(error))
    except OSError as error:
        return complain("sandbox: port {}: {}".format(port, error.strerror))
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
            raise ValueError("--port wants a number from 0 to 65535, not {!r}".format(text))
        port = int(text)
    return port, words


def complain(text):
    """Say in one line what was wrong with the words; returns the exit code for that."""
    print("test_cs.py {} (see --help)".format(text), file=sys.stderr)
    return 2


def end_on_signals():
    """Let SIGTERM and SIGHUP end this process in order, so that what it started ends as well."""

    def end(number, _):
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)


def run_command(argv, settings):
    """Run cs.py's command line as a process of its own; Ctrl-C is the child's to answer."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cs.py")
    child = subprocess.Popen([sys.executable, program] + argv, env=sandbox_environment(**settings))
    try:
        while True:
            try:
                code = child.wait()
            except KeyboardInterrupt:
                continue
            return code if code >= 0 else 128 - code
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def stay(settings):
    """Print the settings as lines for a shell, and wait for Ctrl-C."""
    try:
        for name, value in sorted(settings.items()):
            print("export {}={}".format(name, value))
        sys.stdout.flush()
        print("A small cloud answers until Ctrl-C. Paste these lines into another shell, then: python3 cs.py listZones",
              file=sys.stderr, flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return 0


# --- tests of the simulator -----------------------------------------------------------------------------------------
# It is held to how the server behaves, with raw requests; the client has no part in these.


class SimulatorCase(unittest.TestCase):
    """A simulator whose clock stands still unless a test moves it, and requests written by hand."""

    options = {}

    def setUp(self):
        self.now = 1788249600.25  # 2026-09-01T08:00:00.25Z
        self.simulator = Simulator(clock=lambda: self.now, **self.options).start()
        self.addCleanup(self.simulator.stop)
        self.connection = http.client.HTTPConnection("127.0.0.1", self.simulator.port, timeout=5)
        self.addCleanup(self.connection.close)

    def exchange(self, method="GET", target="/client/api", body=None, headers=None):
        """(status, headers, body) of one exchange on the kept connection."""
        self.connection.request(method, target, body, headers or {})
        response = self.connection.getresponse()
        return response.status, response.headers, response.read()

    def signed(self, params, user="admin"):
        account = self.simulator.users[user]
        params = dict(params, apiKey=account.key)
        return urlencode(dict(params, signature=signature_of(params, account.secret)))

    def call(self, command_name, params=None, user="admin", method="GET", **more):
        """(status, the value of the single key) of a signed command."""
        query = self.signed(dict(params or {}, command=command_name, response="json", **more), user)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        if method == "GET":
            status, _, body = self.exchange(target="/client/api?" + query)
        else:
            status, _, body = self.exchange(method, body=query, headers=form)
        (self.key, value), = json.loads(body.decode("utf-8"), strict=False).items()
        return status, value

    def ok(self, command_name, params=None, **more):
        status, value = self.call(command_name, params, **more)
        self.assertEqual(status, 200, value)
        return value

    def fails(self, code, command_name, params=None, **more):
        status, value = self.call(command_name, params, **more)
        self.assertEqual((status, value["errorcode"]), (code, code))
        return value["errortext"]

    def first(self, command_name, **params):
        return next(rows for rows in self.ok(command_name, **params).values() if isinstance(rows, list))[0]

    def finish(self, submitted):
        """The job's answer once its time has come."""
        self.now += self.simulator.job_seconds
        return self.ok("queryAsyncJobResult", jobid=submitted["jobid"])


class SimulatorSignatureTest(SimulatorCase):
    # The vectors were made with the openssl program from texts written by hand.

    def test_vector_of_every_kind_of_value(self):
        params = {"name": "a~b *+\u00e9-_.\n", "apiallowed": "1", "command": "listZones", "response": "json",
                  "empty": "", "apiKey": "KEY", "details[0].key": "x/Y", "signature": "left out"}
        self.assertEqual(signature_of(params, "Secret"), "QW63KNEFjGW2GXgJMtwL9vZ9jbM=")

    def test_names_in_the_order_of_java_strings(self):
        params = {"\uff61": "4", "\U0001f600": "3", "a": "2", "Z": "1"}  # UTF-16 puts U+1F600 before U+FF61
        self.assertEqual(signature_of(params, "s"), "v179xoXYWeGVoHIu3e+soppR7A0=")

    def test_vector_over_the_wire(self):
        target = "/client/api?command=listZones&response=json&apiKey={}&signature={}".format(
            "0VUlN_mkn8wZCj9DfJtuvxU3L132iHiXGj9VoMqCXASv620-Tgbk5hmgt-24q0CAR_ZIihPRwHAMVm_D0p0S0w",
            "xPiwwaJ%2Bbbu03C%2Fb%2B%2BeoVI3i7QY%3D")
        self.assertEqual(self.exchange(target=target)[0], 200)

    def test_refusals_are_all_alike(self):
        good = {"command": "listZones", "response": "json", "apiKey": self.simulator.key}
        signature = signature_of(good, self.simulator.secret)
        bad = [dict(good, signature="x"), good, dict(good, signature=signature, name="added"),
               dict(good, apiKey="nobody", signature=signature), {"command": "listZones", "response": "json"}]
        unknown = dict(good, command="noSuchCommand")
        bad.append(dict(unknown, signature=signature_of(unknown, self.simulator.secret)))
        misspelt = {"command": "listZones", "response": "json", "apikey": self.simulator.key}
        bad.append(dict(misspelt, signature=signature_of(misspelt, self.simulator.secret)))
        for params in bad:
            status, _, body = self.exchange(target="/client/api?" + urlencode(params))
            (_, value), = json.loads(body.decode()).items()
            self.assertEqual((status, value["errorcode"], value["errortext"]), (401, 401, CREDENTIALS_TEXT))
        self.assertEqual(self.simulator.accepted("listZones"), 0)
        self.assertEqual(self.simulator.count("listZones"), 6)

    def test_a_bare_plus_in_the_signature_is_a_space(self):
        for number in range(100):
            params = {"command": "listZones", "response": "json", "apiKey": self.simulator.key, "n": str(number)}
            signature = signature_of(params, self.simulator.secret)
            if "+" in signature:
                break
        bare = urlencode(params) + "&signature=" + signature.replace("=", "%3D").replace("/", "%2F")
        self.assertEqual(self.exchange(target="/client/api?" + bare)[0], 401)
        self.assertEqual(self.exchange(target="/client/api?" + bare.replace("+", "%2B"))[0], 200)

    def test_expiry(self):
        for expires, status in (
                ("2026-09-01T08:00:01+0000", 200), ("2026-09-01T08:00:01Z", 200), ("2026-09-01T08:00:01+00:00", 200),
                ("2026-09-01T10:00:01+0200", 200), ("2026-09-01T08:00:00+0000", 401), ("2026-09-01T09:00:00+0200", 401),
                ("2026-09-01T08:00:01", 401), ("soon", 401), ("", 401)):
            got, _ = self.call("listZones", signatureVersion="3", expires=expires)
            self.assertEqual(got, status, expires)
        self.assertEqual(self.call("listZones", signatureVersion="3")[0], 401)
        self.assertEqual(self.call("listZones", expires="2001-01-01T00:00:00+0000")[0], 200)  # read by version 3 only


class SimulatorParameterTest(SimulatorCase):
    def test_the_last_of_a_name_in_a_query_the_first_in_a_form_and_the_query_over_the_form(self):
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        self.exchange("POST", "/client/api?a=1&a=2&b=3", "b=4&c=5&c=6", form)
        self.assertEqual(self.simulator.requests[-1].params, {"a": "2", "b": "3", "c": "5"})
        self.exchange("POST", "/client/api?a=1", "b=4", {"Content-Type": "multipart/form-data; boundary=x"})
        self.assertEqual(self.simulator.requests[-1].params, {"a": "1"})

    def test_names_in_any_case_once_verified(self):
        zone = self.first("listZones")
        self.assertEqual(self.ok("listZones", {"ID": zone["id"], "Nonsense": "x"})["count"], 1)
        self.assertEqual(self.call("LISTZONES")[0], 401)

    def test_only_true_is_true(self):
        everything = self.ok("listVirtualMachines", listall="TRUE")["count"]
        own = self.ok("listVirtualMachines")["count"]
        self.assertGreater(everything, own)
        for word in ("1", "yes", "on", "false"):
            self.assertEqual(self.ok("listVirtualMachines", listall=word)["count"], own)
        projects = self.ok("listVirtualMachines", projectid="-1")["virtualmachine"]
        self.assertEqual({row["project"] for row in projects}, {"apollo"})

    def test_maps(self):
        self.assertEqual(self.ok("listVirtualMachines", {"tags[0].key": "role", "tags[0].value": "db"})["count"], 8)
        for name in ("tags[a].key", "tags[0]", "tags[0].a[1]", "tags[", "tags[0]key", "[0].key"):
            self.fails(430, "listVirtualMachines", {name: "x"})
        plain, maps = lower_names({"Details[0].cpuNumber": "2", "details[0].a.b": "c", "DETAILS[1].x": "y"})
        self.assertEqual((plain, maps), ({}, {"details": {0: {"cpuNumber": "2", "a.b": "c"}, 1: {"x": "y"}}}))

    def test_what_is_refused(self):
        self.assertIn("missing parameter id", self.fails(431, "startVirtualMachine"))
        self.fails(431, "listZones", id="no-such-id")
        self.fails(431, "listZones", name="a\x07b")
        text = self.fails(431, "listZones", name="a\tb")
        self.assertEqual(text, "Received value containing illegal ASCII non-printable characters for parameter name")
        self.ok("listZones", name="b\r\nc")
        self.fails(431, "createSecurityGroup", name="x" * 256)
        self.assertEqual(self.ok("listVirtualMachines", userdataid="no-such-id")["count"], 32)  # dropped in silence
        nobody = "00000000-0000-0000-0000-000000000000"
        text = self.fails(431, "queryAsyncJobResult", jobid=nobody)
        self.assertEqual(text, "Unable to execute API command queryasyncjobresult due to invalid value. Invalid "
                         "parameter jobid value=" + nobody + " due to incorrect long value format, or entity does not "
                         "exist or due to incorrect parameter annotation for the field in api cmd class.")
        self.assertIn("command restorevm due", self.fails(431, "restoreVirtualMachine"))

    def test_dates(self):
        self.assertEqual(parse_date("2026-01-01T00:00:00+0130"), parse_date("2025-12-31T22:30:00Z"))
        self.assertIsNone(parse_date("2026-13-01T00:00:00Z"))
        self.assertEqual(read_date("2026-01-01"), read_date("2026-01-01 00:00:00"))


class SimulatorHttpTest(SimulatorCase):
    def test_kept_alive_and_without_a_date(self):
        headers = [self.exchange(target="/client/api?" + self.signed({"command": "listZones"}))[1] for _ in range(3)]
        self.assertEqual({record.connection for record in self.simulator.requests}, {1})
        self.assertNotIn("Date", headers[0])

    def test_idle_connections_are_closed(self):
        self.simulator.idle_close = 0.05
        with socket.create_connection(("127.0.0.1", self.simulator.port), 5) as sock:
            self.assertEqual(sock.recv(1), b"")

    def test_a_long_request_line(self):
        status, headers, body = self.exchange(target="/client/api?" + "x" * 8200)
        self.assertEqual((status, headers.get_content_type(), headers["Connection"]), (414, "text/html", "close"))
        self.assertTrue(body.startswith(b"<html>"))
        self.assertEqual(self.exchange(headers={"X-Long": "x" * 8200})[0], 431)

    def test_request_bodies(self):
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        self.assertEqual(self.call("listZones", method="POST", name="x" * 200)[0], 200)
        self.assertEqual(self.exchange("POST", body="a=" + "x" * (1 << 20), headers=form)[0], 400)
        self.assertEqual(self.exchange("POST", body="a=1&" * 5001, headers=form)[0], 400)
        self.assertEqual(self.exchange("POST", body="x", headers=dict(form, **{"Content-Encoding": "gzip"}))[0], 415)
        query = self.signed({"command": "listZones", "response": "json"}).encode()
        self.connection.putrequest("POST", "/client/api")
        self.connection.putheader("Content-Type", form["Content-Type"])
        self.connection.putheader("Transfer-Encoding", "chunked")
        self.connection.endheaders(b"%x\r\n%b\r\n0\r\n\r\n" % (len(query), query))
        response = self.connection.getresponse()
        self.assertEqual((response.status, response.read()[:20]), (200, b'{"listzonesresponse"'))

    def test_paths_and_methods(self):
        cases = ("GET", "/client", 404), ("PUT", "/client/api", 405), ("GET", "/client/api/", 401)
        for method, path, status in cases:
            self.assertEqual(self.exchange(method, path)[0], status)

    def test_gzip_and_chunks(self):
        target = "/client/api?" + self.signed({"command": "listVirtualMachines", "response": "json"})
        _, headers, plain = self.exchange(target=target)
        self.assertEqual((headers["Transfer-Encoding"], headers["Content-Length"]), ("chunked", None))
        for method in ("GET", "POST"):
            _, headers, packed = self.exchange(method, target, headers={"Accept-Encoding": "gzip"})
            self.assertEqual((headers["Content-Encoding"], zlib.decompress(packed, 31)), ("gzip", plain))
        self.simulator.gzip, self.simulator.chunk_over = False, 1 << 20
        _, headers, body = self.exchange(target=target, headers={"Accept-Encoding": "gzip"})
        self.assertEqual((headers["Content-Encoding"], headers["Content-Length"]), (None, str(len(body))))

    def test_http_1_0(self):
        with socket.create_connection(("127.0.0.1", self.simulator.port), 5) as sock:
            query = self.signed({"command": "listVirtualMachines", "response": "json"})
            sock.sendall("GET /client/api?{} HTTP/1.0\r\n\r\n".format(query).encode())
            with sock.makefile("rb") as stream:
                head, _, body = stream.read().partition(b"\r\n\r\n")
        self.assertNotIn(b"chunked", head)
        self.assertEqual(json.loads(body.decode())["listvirtualmachinesresponse"]["count"], 32)

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
        self.assertEqual(self.call("listZones")[0], 200)


class SimulatorAnswerTest(SimulatorCase):
    def test_xml_unless_json_is_asked_for(self):
        _, headers, body = self.exchange(target="/client/api?" + self.signed({"command": "listZones"}))
        self.assertEqual(headers.get_content_type(), "text/xml")
        self.assertIn(b"<listzonesresponse cloud-stack-version=", body)
        self.assertIn(b"<count>2</count><zone><id>", body)

    def test_keys(self):
        for name, key in (("listZones", "listzonesresponse"), ("listCounters", "counterresponse"),
                          ("restoreVirtualMachine", "restorevmresponse"),
                          ("activateProject", "activaterojectresponse")):
            self.call(name, id="no-such-id")
            self.assertEqual(self.key, key)
        self.call("noSuchCommand")
        self.assertEqual(self.key, "errorresponse")

    def test_errors(self):
        status, value = self.call("deleteVolume", id=self.first("listVolumes")["id"])
        self.assertEqual((status, value["errorcode"], value["cserrorcode"]), (431, 431, 4350))
        self.assertEqual(set(value["uuidList"][0]), {"uuid", "description"})
        self.fails(432, "listApis", user="user")
        self.assertEqual(self.fails(432, "listHosts", user="user"),
                         "The API [listHosts] does not exist or is not available for the account user.")
        self.assertEqual(self.key, "errorresponse")
        text = self.fails(531, "stopVirtualMachine", user="user", id=self.first("listVirtualMachines")["id"])
        self.assertEqual(text, "Caller does not have permission to operate with provided resource.")

    def test_errors_are_told_twice_unless_they_come_early(self):
        query = self.signed({"command": "startVirtualMachine", "response": "json", "id": "5\u20ac"})
        status, headers, body = self.exchange(target="/client/api?" + query)
        error = json.loads(body.decode())["startvirtualmachineresponse"]
        self.assertEqual(headers["X-Description"], error["errortext"].replace("\u20ac", "?"))
        self.assertEqual((status, error["cserrorcode"], headers["Content-Type"]),
                         (431, 9999, "application/json;charset=utf-8"))
        _, headers, body = self.exchange(target="/client/api?command=listZones&response=json")
        error = json.loads(body.decode())["listzonesresponse"]
        self.assertEqual((headers["X-Description"], set(error)), (None, {"uuidList", "errorcode", "errortext"}))

    def test_nothing_at_all_instead_of_a_missing_parameter(self):
        query = self.signed({"command": "activateProject", "response": "json"})
        status, headers, body = self.exchange(target="/client/api?" + query)
        self.assertEqual((status, headers["Content-Type"], body), (200, "text/xml;charset=utf-8", b""))

    def test_objects_control_characters_and_content_type(self):
        self.assertIsInstance(self.ok("listCapabilities")["capability"], dict)
        self.assertEqual(to_json({"a": "\x1b\n\\u001b"}), '{"a":"\x1b\\n\\\\u001b"}')
        self.simulator.json_content_type = "text/javascript; charset=UTF-8"
        target = "/client/api?" + self.signed({"command": "listZones", "response": "json"})
        self.assertEqual(self.exchange(target=target)[1]["Content-Type"], "text/javascript; charset=UTF-8")

    def test_list_apis(self):
        self.simulator.extra_apis = 2
        answer = self.ok("listApis")
        self.assertEqual(answer["count"], len(answer["api"]))
        apis = {api["name"]: api for api in answer["api"]}
        self.assertEqual(len(apis), len(COMMANDS) + 2)
        deploy = apis["deployVirtualMachine"]
        self.assertEqual((deploy["isasync"], deploy["httprequesttype"]), (True, "POST"))
        self.assertEqual(apis["getUploadParamsForVolume"]["httprequesttype"], "GET")
        params = {param["name"]: param for param in deploy["params"]}
        self.assertEqual((params["zoneid"]["type"], params["zoneid"]["required"]), ("uuid", True))
        self.assertEqual((params["details"]["type"], params["startvm"]["type"]), ("map", "boolean"))
        self.assertIn({}, deploy["response"])
        self.assertIn("nic", {field.get("name") for field in deploy["response"] if "response" in field})
        self.assertFalse({"response", "customjobid"} & set(params))

    def test_switches(self):
        self.simulator.empty_200 = {"listZones"}
        target = "/client/api?" + self.signed({"command": "listZones", "response": "json"})
        self.assertEqual(self.exchange(target=target)[::2], (200, b""))
        self.simulator.maintenance = True
        self.fails(503, "listPods")
        self.simulator.html_error = 502
        status, headers, _ = self.exchange(target=target)
        self.assertEqual((status, headers.get_content_type()), (502, "text/html"))
        with self.assertRaises(TypeError):
            Simulator(start=1)

    def test_rate_limit(self):
        self.simulator.rate_limit = 2
        self.ok("listZones")
        self.assertEqual(self.ok("getApiLimit")["apilimit"]["apiIssued"], 2)
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
        self.assertEqual(text, "State changing command createSecurityGroup needs to be sent using POST request")
        self.assertEqual(self.simulator.accepted("createSecurityGroup"), 0)
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
        self.assertEqual(answer, {"count": 32})  # past the last page: no list
        self.assertEqual(len(set(names)), 32)
        self.assertEqual(self.ok("listVirtualMachines", name="no such machine"), {})

    def test_limits(self):
        self.simulator.default_page_size = 10
        answer = self.ok("listVirtualMachines")
        self.assertEqual((answer["count"], len(answer["virtualmachine"])), (32, 10))
        text = self.fails(431, "listVirtualMachines", page="1", pagesize="11")
        self.assertEqual(text, "Page size can't exceed max allowed page size value: 10")
        for given, missing in ("page", "pagesize"), ("pagesize", "page"):
            text = self.fails(431, "listVirtualMachines", {given: "1"})
            self.assertEqual(text, '"{}" parameter is required when "{}" is specified'.format(missing, given))
        self.fails(431, "listVirtualMachines", page="one", pagesize="5")

    def test_quirks(self):
        self.assertEqual(self.ok("listResourceLimits", page="2", pagesize="4")["count"], 4)
        self.assertEqual(self.ok("listResourceLimits", page="3", pagesize="4")["count"], 3)
        first, second = (self.ok("listHostTags", page=page, pagesize="2") for page in "12")
        self.assertEqual(first, second)
        self.simulator.count_missing = {"listZones"}
        self.assertEqual(set(self.ok("listZones")), {"zone"})
        templates = self.ok("listTemplates", templatefilter="featured")["template"]
        self.assertEqual(len(templates), len({row["id"] for row in templates}) + 1)  # one stands in both zones


class SimulatorJobsTest(SimulatorCase):
    def test_a_job_from_submission_to_expiry(self):
        machine = self.first("listVirtualMachines", state="Running")
        submitted = self.ok("stopVirtualMachine", id=machine["id"])
        self.assertEqual(set(submitted), {"jobid"})
        self.assertEqual(self.ok("listVirtualMachines", id=machine["id"])["virtualmachine"][0]["state"], "Stopping")
        job = self.ok("queryAsyncJobResult", submitted)
        self.assertEqual((job["jobstatus"], "jobresult" in job, "completed" in job), (0, False, False))
        self.assertEqual(self.ok("listAsyncJobs")["asyncjobs"][0]["jobid"], submitted["jobid"])
        job = self.finish(submitted)
        self.assertEqual((job["jobstatus"], job["jobresulttype"]), (1, "object"))
        self.assertEqual(job["jobresult"]["virtualmachine"]["state"], "Stopped")
        self.assertEqual(self.ok("listAsyncJobs"), {})
        self.assertEqual((job["jobinstancetype"], job["jobinstanceid"], job["domainpath"]),
                         ("VirtualMachine", machine["id"], "ROOT"))
        self.assertEqual((job["jobresult"]["virtualmachine"]["jobid"], "jobid" in machine), (job["jobid"], False))
        self.now += self.simulator.job_retention
        self.fails(431, "queryAsyncJobResult", submitted)

    def test_jobs_on_one_machine_run_one_after_another(self):
        machine = self.first("listVirtualMachines", state="Running")
        jobs = [self.ok(name, id=machine["id"]) for name in ("stopVirtualMachine", "startVirtualMachine")]
        self.assertEqual(self.finish(jobs[0])["jobstatus"], 1)
        self.assertEqual(self.ok("queryAsyncJobResult", jobs[1])["jobstatus"], 0)
        self.assertEqual(self.finish(jobs[1])["jobresult"]["virtualmachine"]["state"], "Running")

    def test_failures(self):
        machine = self.first("listVirtualMachines", state="Running")
        job = self.finish(self.ok("startVirtualMachine", id=machine["id"]))
        self.assertEqual((job["jobstatus"], job["jobresultcode"], job["jobresult"]["errorcode"]), (2, 431, 431))
        zone, template = machine["zoneid"], machine["templateid"]
        titan = self.first("listServiceOfferings", name="Titan")["id"]
        submitted = self.ok("deployVirtualMachine", zoneid=zone, templateid=template, serviceofferingid=titan)
        self.assertEqual(set(submitted), {"id", "jobid"})
        self.assertEqual(self.finish(submitted)["jobresult"]["errorcode"], 533)
        self.simulator.job_fails_without_result = {"rebootVirtualMachine"}
        job = self.finish(self.ok("rebootVirtualMachine", id=machine["id"]))
        self.assertEqual((job["jobstatus"], "jobresult" in job), (2, False))

    def test_a_machine_from_deployment_to_expunging(self):
        zone, other = self.ok("listZones")["zone"]
        template = self.ok("listTemplates", templatefilter="all", zoneid=zone["id"])["template"][-1]
        networks = self.ok("listNetworks", zoneid=zone["id"])["network"]
        params = {"networkids": networks[1]["id"] + "," + networks[0]["id"], "details[0].cpuNumber": "3",
                  "details[0].memory": "2048", "name": "web-99", "keypair": "laptop", "userdata": "aGVsbG8="}
        machine = self.finish(self.ok(
            "deployVirtualMachine", params, zoneid=zone["id"], templateid=template["id"],
            serviceofferingid=self.first("listServiceOfferings", name="Custom")["id"]))["jobresult"]["virtualmachine"]
        self.assertEqual([nic["networkid"] for nic in machine["nic"]], [networks[1]["id"], networks[0]["id"]])
        self.assertEqual((machine["state"], machine["cpunumber"], machine["memory"]), ("Running", 3, 2048))
        self.assertTrue(machine["password"])
        userdata = self.ok("getVirtualMachineUserData", virtualmachineid=machine["id"])["virtualmachineuserdata"]
        self.assertEqual(userdata["userdata"], "aGVsbG8=")
        job = self.finish(self.ok("destroyVirtualMachine", id=machine["id"], expunge="true"))
        self.assertEqual(sorted(job["jobresult"]["virtualmachine"]),
                         "affinitygroup deleteprotection nic securitygroup tags".split())
        self.assertEqual(self.ok("listVirtualMachines", id=machine["id"]), {})
        self.fails(431, "startVirtualMachine", id=machine["id"])

    def test_list_async_jobs_is_the_caller_s_own_and_paged(self):
        jobs = []
        for machine in self.ok("listVirtualMachines", state="Running")["virtualmachine"][:3]:
            jobs.append(self.ok("rebootVirtualMachine", id=machine["id"])["jobid"])
            self.now += 0.01
        theirs = self.ok("listVirtualMachines", user="user", state="Running")["virtualmachine"][0]["id"]
        self.ok("rebootVirtualMachine", user="user", id=theirs)
        self.assertEqual([row["jobid"] for row in self.ok("listAsyncJobs")["asyncjobs"]], jobs)
        self.assertEqual(self.ok("listAsyncJobs", listall="true")["count"], 4)
        page = self.ok("listAsyncJobs", page="2", pagesize="2")
        self.assertEqual((page["count"], [row["jobid"] for row in page["asyncjobs"]]), (3, jobs[2:]))
        self.fails(432, "listAsyncJobs", user="user")
        self.fails(531, "queryAsyncJobResult", user="user", jobid=jobs[0])


    OWN = "4d6eea3d-729f-493b-894f-7048159c4bd9"

    def deploy(self, **params):
        """Submit a deployment; (status, answer)."""
        user = params.get("user", "admin")
        found = {"zoneid": self.first("listZones", user=user)["id"],
                 "templateid": self.first("listTemplates", user=user, templatefilter="all")["id"],
                 "serviceofferingid": self.first("listServiceOfferings", user=user)["id"]}
        return self.call("deployVirtualMachine", method="POST", **dict(found, **params))

    def test_a_job_under_the_caller_s_own_id(self):
        _, submitted = self.deploy(customjobid=self.OWN, name="mine")
        self.assertEqual((set(submitted), submitted["jobid"]), ({"id", "jobid"}, self.OWN))
        job = self.ok("queryAsyncJobResult", jobid=self.OWN)  # at once
        self.assertEqual((job["jobstatus"], job["jobinstanceid"]), (0, submitted["id"]))
        self.assertEqual(self.ok("listAsyncJobs")["asyncjobs"][0]["jobid"], self.OWN)
        self.assertEqual(self.finish(submitted)["jobresult"]["virtualmachine"]["state"], "Running")
        self.assertEqual(self.ok("createSecurityGroup", customjobid=self.OWN, name="g")["securitygroup"]["name"], "g")

    def test_an_own_id_is_refused_after_the_row_was_made(self):
        self.deploy(customjobid=self.OWN)
        twice = "UUID: {} already exists so can't create/update with custom id".format(self.OWN)
        for user, own, code, text in (
                ("admin", self.OWN, 530, "Entity already exists "), ("user", self.OWN, 431, twice),
                ("admin", "mine", 431, "UUID: mine doesn't follow the UUID format")):
            name = "left-" + str(code) + user
            status, error = self.deploy(user=user, customjobid=own, name=name)
            self.assertEqual((status, error["errorcode"], error["errortext"]), (code, code, text))
            self.now += 60
            left = self.first("listVirtualMachines", user=user, name=name)
            self.assertEqual(left["state"], "Stopped")
        self.assertEqual(len(self.simulator.cloud.jobs), 1)

    def test_what_is_given_twice(self):
        network = self.first("listNetworks")
        for status in (200, 431):
            self.assertEqual(self.deploy(name="twin", networkids=network["id"])[0], status)
        self.assertEqual(self.ok("listVirtualMachines", name="twin")["count"], 1)
        machine = self.first("listVirtualMachines", state="Running")
        group = self.first("listSecurityGroups")
        rule = {"securitygroupid": group["id"], "protocol": "tcp", "startport": "22", "endport": "22"}
        tag = {"tags[0].key": "a", "tags[0].value": "b", "resourceids": machine["id"], "resourcetype": "UserVm"}
        stop = {"id": machine["id"]}
        for command_name, params, codes in (("authorizeSecurityGroupIngress", rule, [0, 530]),
                                            ("createTags", tag, [0, 530]), ("stopVirtualMachine", stop, [0, 0])):
            jobs = [self.finish(self.ok(command_name, params)) for _ in codes]
            self.assertEqual([job["jobresultcode"] for job in jobs], codes, command_name)
        self.assertEqual(len(self.first("listSecurityGroups", id=group["id"])["ingressrule"]), 1)

    def test_user_data_is_base64(self):
        for userdata, status in (("aGVsbG8=", 200), ("aGVsbG8", 200), ("#!/bin/sh", 431), ("caf\u00e9", 431)):
            self.assertEqual(self.deploy(userdata=userdata)[0], status, userdata)

    def test_events_newest_first(self):
        self.finish(self.deploy(name="newest")[1])
        events = self.ok("listEvents")["event"]
        self.assertEqual(events[0]["type"], "DEPLOY.VIRTUAL.MACHINE")
        created = [event["created"] for event in events]
        self.assertEqual(created, sorted(created, reverse=True))


class SimulatorScriptTest(SimulatorCase):
    def test_what_a_script_may_hold(self):
        self.simulator.script("listZones", Answer(504, "<html>", reason="Gateway Time-out"), GO_ON, DROP)
        self.simulator.script(None, lambda record: Answer(200, {record.command.lower(): {"scripted": True}}))
        self.simulator.script("createSecurityGroup", RUN_THEN_DROP)
        target = "/client/api?" + self.signed({"command": "listZones", "response": "json"})
        self.assertEqual(self.exchange(target=target)[::2], (504, b"<html>"))
        self.assertEqual(self.ok("listZones")["count"], 2)
        with self.assertRaises((http.client.HTTPException, OSError)):
            self.exchange(target=target)
        self.connection.close()
        self.assertEqual(self.ok("listZones"), {"scripted": True})
        with self.assertRaises((http.client.HTTPException, OSError)):
            self.call("createSecurityGroup", name="x")
        self.connection.close()
        self.assertEqual(self.simulator.accepted("createSecurityGroup"), 1)
        self.assertEqual((self.simulator.count("listZones"), self.simulator.accepted("listZones")), (4, 1))


class SimulatorSessionTest(SimulatorCase):
    def login(self, password="tilde~and+plus*", method="POST", user="user", domain="/research"):
        fields = {"username": user, "password": password, "domain": domain}
        body = urlencode(dict(fields, command="login", response="json"))
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        status, headers, answer = self.exchange(method, body=body, headers=form)
        cookies = headers.get_all("Set-Cookie") or ()
        self.cookie = "; ".join(cookie.partition(";")[0] for cookie in cookies)
        return status, cookies, json.loads(answer.decode())["loginresponse"]

    def use(self, command_name="listVirtualMachines", cookie=None, **params):
        headers = {"Cookie": self.cookie if cookie is None else cookie}
        query = urlencode(dict(params, command=command_name, response="json"))
        status, _, body = self.exchange(target="/client/api?" + query, headers=headers)
        (_, value), = json.loads(body.decode()).items()
        return status, value

    def test_a_session(self):
        status, cookies, answer = self.login()
        self.assertEqual((status, answer["username"], answer["timeout"]), (200, "user", 1800))
        self.assertIn("sessionkey={}; HttpOnly".format(answer["sessionkey"]), cookies)
        key = answer["sessionkey"]
        status, value = self.use(sessionkey=key, signature="ignored", apiKey="ignored")
        self.assertEqual((status, value["count"]), (200, 6))
        self.assertEqual(self.use("noSuchCommand", sessionkey=key)[0], 432)
        self.assertEqual(self.use("logout", sessionkey=key)[0], 200)
        self.assertEqual(self.use(sessionkey=key)[0], 401)

    def test_both_cookies_and_the_parameter_are_needed(self):
        for spoil in ("parameter", "cookie"):
            key = self.login()[2]["sessionkey"]
            cookie = self.cookie.partition(";")[0] if spoil == "cookie" else None
            parameter = {"sessionkey": key} if spoil == "cookie" else {}
            self.assertEqual(self.use(cookie=cookie, **parameter)[0], 401)
            self.assertEqual(self.use(sessionkey=key)[0], 401)  # and the session is gone

    def test_refusals(self):
        status, headers, body = self.exchange(target="/client/api?command=login&username=user&password=x&response=json")
        self.assertEqual((status, headers.get_content_type()), (405, "text/plain"))
        status, cookies, error = self.login(password="wrong")
        self.assertEqual((status, list(cookies), error["errorcode"], error["errortext"]), (
            531, [], 531, "Failed to authenticate user user in domain 2; please provide valid credentials"))
        self.assertEqual(self.login(domain="/")[0], 531)
        for domain, path in (("ROOT", "/ROOT/"), ("ROOT/research", "/ROOT/research/"), ("/nowhere", "/nowhere/")):
            error = self.login(domain=domain)[2]
            self.assertEqual((error["errorcode"], error["errortext"]),
                             (531, "Unable to find the domain from the path " + path))

    def test_idle_for_too_long(self):
        key = self.login()[2]["sessionkey"]
        for pause, status in ((1800, 200), (1800, 200), (1801, 401)):
            self.now += pause
            self.assertEqual(self.use(sessionkey=key)[0], status)

    def test_the_second_factor_is_for_sessions(self):
        self.simulator.two_factor = True
        key = self.login()[2]["sessionkey"]
        self.assertEqual(self.use(sessionkey=key)[0], 511)
        self.assertEqual(self.call("listZones")[0], 200)


class SimulatorIntegrationTest(SimulatorCase):
    def test_the_integration_port(self):
        address = self.simulator.integration_endpoint.partition("//")[2].partition("/")[0]
        self.connection.close()
        self.connection = http.client.HTTPConnection(address, timeout=5)
        self.addCleanup(self.connection.close)
        status, headers, body = self.exchange(target="/?command=listZones&response=json")
        self.assertEqual((status, headers["Connection"]), (200, "close"))
        self.assertEqual(json.loads(body.decode())["listzonesresponse"]["count"], 2)
        self.assertEqual(self.call("listZones")[0], 401)  # a key and a signature
        status, _, body = self.exchange(target="/client/api?command=noSuchCommand&response=json")
        self.assertEqual((status, list(json.loads(body.decode()))), (432, ["null"]))
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        self.assertEqual(self.exchange("POST", "/client/api", "command=listZones&response=json", form)[0], 432)


class SandboxTest(unittest.TestCase):
    def test_environment(self):
        names = {"CLOUDSTACK_REGION": "x", "HTTP_PROXY": "x", "https_proxy": "x"}
        kept = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(kept)))
        os.environ.update(names)
        environment = sandbox_environment(CLOUDSTACK_KEY="k")
        self.assertFalse(set(names) & set(environment))
        self.assertEqual((environment["CLOUDSTACK_KEY"], environment.get("HOME")), ("k", kept.get("HOME")))


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


def api_error(code, text="no", status=None, key="errorresponse", headers=None):
    """An error in the server's own JSON."""
    document = {key: {"uuidList": [], "errorcode": code, "cserrorcode": 9999, "errortext": text}}
    return answer(document, status or code, str(status or code), headers)


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

    threads = [threading.Thread(target=begin, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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
        expected.update(endpoint=inspect.Parameter.empty, theme=None, output=None)
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

    @each("setting", *[setting for setting in cs.SETTINGS if setting.name not in ("endpoint", "verify", "expiration")])
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
                for setting in cs.SETTINGS:
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


# === the transport ==================================================================================================
# Real sockets on 127.0.0.1. A scripted server records every byte it is sent, and answers, pauses and breaks where a
# script says so; what it has recorded is what the tests judge by.

import atexit  # noqa: E402
import gzip  # noqa: E402
import ssl  # noqa: E402
import struct  # noqa: E402
import traceback  # noqa: E402
from urllib.parse import quote_plus  # noqa: E402

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
    raise AssertionError("{} did not happen".format(what))


async def until_async(condition, what="it"):
    for _ in range(int(PATIENCE_OF_TESTS / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("{} did not happen".format(what))


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
        self.error = None
        self.ended = threading.Event()
        self.client_left = threading.Event()

    def more(self, most=65536):
        """Receive at most so many bytes; False where the client has gone away."""
        try:
            part = self.sock.recv(most)
        except OSError:
            part = b""
        self.raw += part
        if not part:
            self.client_left.set()
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
            self.client_left.set()
            return False

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class ScriptedServer:
    """Plays a list of steps to each connection: the first list to the first one, and the last to all that follow.

    A step is bytes to send, a number of seconds to pause, READ, HOLD, RESET, AGAIN, an SSLContext to start TLS with,
    or a function of the Wire (which ends the script by returning False). A connection is closed after its last step."""

    def __init__(self, *scripts, tls=None, receive_buffer=None):
        self.scripts = list(scripts)
        self.tls = tls
        self.wires = []
        self.threads = []
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
        return "127.0.0.1:{}".format(self.port)

    @property
    def url(self):
        return "{}://{}/client/api".format("https" if self.tls else "http", self.place)

    @property
    def requests(self):
        return [request for wire in list(self.wires) for request in list(wire.requests)]

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
        except (OSError, ValueError) as error:
            wire.error = error
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
            wire.reset()
            return False
        if step is AGAIN:
            return True
        if isinstance(step, ssl.SSLContext):
            return self._start_tls(wire, step)
        if isinstance(step, bytes):
            return wire.send(step)
        if callable(step):
            return step(wire) is not False
        return not self.stopping.wait(step)

    @staticmethod
    def _start_tls(wire, context):
        plain = wire.sock
        try:
            wire.sock = context.wrap_socket(plain, server_side=True)
        except (OSError, ValueError) as error:
            # wrap_socket has taken the descriptor over, and closed it where the handshake failed.
            wire.error = error
            plain.close()
            return False
        return True

    def close(self):
        self.stopping.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()  # wakes accept()
        for wire in list(self.wires):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(wire.sock, socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE_OF_TESTS)
        self.listener.close()


ZONE = {"id": "1", "name": "z\u00fcrich"}
ZONES = json.dumps({"listzonesresponse": {"count": 1, "zone": [ZONE]}}).encode("utf-8")
RESULT = {"count": 1, "zone": [ZONE]}
JOB = "00000000-0000-4000-8000-000000000001"


def deployment(jobid=JOB):
    return json.dumps({"deployvirtualmachineresponse": {"jobid": jobid, "id": "vm-1"}}).encode("utf-8")


DEPLOYED = deployment()


def reply(body=ZONES, status="200 OK", *headers, **options):
    """The bytes of an answer; length=False leaves Content-Length out, version is that of HTTP."""
    lines = ["HTTP/{} {}".format(options.get("version", "1.1"), status), "Content-Type: application/json;charset=UTF-8"]
    if options.get("length", True):
        lines.append("Content-Length: {}".format(len(body)))
    return "\r\n".join(lines + list(headers) + ["", ""]).encode("latin-1") + body


def chunked(body=ZONES, size=20, last=b"0\r\n\r\n", headers=()):
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    content = b"".join("{:x}\r\n".format(len(chunk)).encode() + chunk + b"\r\n" for chunk in chunks)
    return reply(b"", "200 OK", "Transfer-Encoding: chunked", *headers, length=False) + content + last


SERVE = [READ, reply(), AGAIN]
BOTH = (cs.CloudStack, cs.AIOCloudStack)

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
    """A test with scripted servers, and clients whose credentials are canaries."""

    def setUp(self):
        Case.setUp(self)
        self.servers = []

    def serve(self, *scripts, **options):
        server = ScriptedServer(*scripts, **options)
        self.servers.append(server)
        self.addCleanup(server.close)
        return server

    def client(self, server=None, kind=cs.CloudStack, **settings):
        given = {"key": CANARY_KEY, "secret": CANARY_SECRET, "timeout": 5, "fetch_result": False}
        if isinstance(server, ScriptedServer):
            given["endpoint"] = server.url
        elif server:
            given["endpoint"] = server
        given.update(settings)
        client = kind(**given)
        self.addCleanup(client.__exit__) if kind is cs.CloudStack else self.addCleanup(self._close, client)
        return client

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
            value = self.call(client, command, **params)
        except cs.CloudStackException as raised:
            error = raised
        else:
            self.fail("no exception, but {!r}".format(value))
        self.assertIs(kind, type(error), repr(error))
        self.assert_tells_nothing(error)
        if error.response is None:
            self.assertNotIn("\n", str(error))
        return error

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

    def child(self, code, *args, **options):
        """Run Python code in a process of its own, in the directory of cs.py: (exit code, output, errors)."""
        command = [sys.executable] + list(options.get("flags", ())) + ["-c", code] + [str(arg) for arg in args]
        env = dict(os.environ, PYTHONPATH=options.get("path", os.path.dirname(CS_PATH)), **options.get("env", {}))
        status, out, err = Child(command, env=env).finish()
        return status, out.decode("utf-8"), err.decode("utf-8")

    def assert_child(self, code, *args, **options):
        """A child that ends well and says nothing on standard error; its standard output."""
        status, out, err = self.child(code, *args, **options)
        self.assertEqual((0, ""), (status, err), out)
        return out

    def share_contexts(self):
        """Read the system's CA certificates once for all clients of this test, which takes 30 ms each time."""
        patched = mock.patch.object(cs, "_make_context", functools.lru_cache(None)(cs._make_context))
        patched.start()
        self.addCleanup(patched.stop)

    def traced(self, client, command="listZones", **params):
        """What a call that may fail writes to standard error, which must tell no secret."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            with contextlib.suppress(cs.CloudStackException):
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
            self._openssl("ecparam -name prime256v1 -genkey -noout -out {}.key".format(name))
        for name in ("ca", "other_ca"):
            request = (
                "req -new -x509 -key {0}.key -config config -extensions authority -out {0}.pem -days 30 -subj /CN={0}"
            )
            self._openssl(request.format(name))
        self._openssl(
            "req -new -x509 -key leaf.key -config config -extensions here -out self_signed.pem -days 30 -subj /CN=me"
        )
        self._openssl("req -new -key leaf.key -config config -out leaf.csr -subj /CN=leaf")
        self._issue("good", "here", "-days 30")
        self._issue("expired", "here", "-startdate 20200101000000Z -enddate 20200201000000Z")
        self._issue("elsewhere", "elsewhere", "-days 30")
        self._openssl("ec -in leaf.key -aes128 -passout pass:letmein -out locked.key")
        self._write("both.pem", self.read("good.pem") + self.read("leaf.key"))
        os.mkdir(self.path("directory"))
        shutil.copy(
            self.path("ca.pem"), self.path("directory/" + self._openssl("x509 -hash -noout -in ca.pem").strip() + ".0")
        )

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

    def _issue(self, name, extensions, dates):
        command = (
            "ca -batch -notext -config config -in leaf.csr -out {}.pem -cert ca.pem -keyfile ca.key -extensions {} {}"
        )
        self._openssl(command.format(name, extensions, dates))

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

    def test_a_connection_is_used_again(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__):
                server = self.serve(SERVE)
                client = self.client(server, kind)
                self.assertEqual([RESULT] * 3, [self.call(client) for _ in range(3)])
                self.assertEqual([3], [len(wire.requests) for wire in server.wires])

    def test_get_and_post_share_a_connection(self):
        server = self.serve(SERVE)
        client = self.client(server)
        client.listZones()
        client.method = "post"
        client.listZones(name="x")
        client.method = "get"
        client.listZones()
        self.assertEqual([["GET", "POST", "GET"]], [[r.method for r in wire.requests] for wire in server.wires])

    def test_errors_of_the_server_leave_the_connection_open(self):
        error = json.dumps({"errorresponse": {"errorcode": 431, "errortext": "no"}}).encode()
        server = self.serve([READ, reply(error, "431 431"), AGAIN])
        client = self.client(server)
        for _ in range(3):
            self.fails(client, cs.CloudStackApiException)
        self.assertEqual(1, len(server.wires))

    def test_whether_it_is_used_again_is_the_servers_to_say(self):
        cases = [
            ("HTTP/1.1", reply(), True),
            ("chunked", chunked(), True),
            ("chunked with trailers", chunked(last=b"0\r\nX-Sum: 1\r\n\r\n"), True),
            ("HTTP/1.1, close", reply(ZONES, "200 OK", "Connection: close"), False),
            ("HTTP/1.1, Close", reply(ZONES, "200 OK", "Connection: Close"), False),
            ("HTTP/1.0", reply(version="1.0"), False),
            ("HTTP/1.0, keep-alive", reply(ZONES, "200 OK", "Connection: keep-alive", version="1.0"), True),
            ("after 100 Continue", b"HTTP/1.1 100 Continue\r\n\r\n" + reply(), True),
        ]
        for name, content, kept in cases:
            with self.subTest(name):
                server = self.serve([READ, content, AGAIN])
                client = self.client(server)
                for _ in range(2):
                    self.assertEqual(RESULT, client.listZones())
                self.assertEqual(1 if kept else 2, len(server.wires))

    def test_after_an_answer_that_ends_with_the_connection(self):
        server = self.serve([READ, reply(length=False)])
        client = self.client(server)
        self.assertEqual([RESULT, RESULT], [client.listZones() for _ in range(2)])
        self.assertEqual(2, len(server.wires))

    def test_not_used_again_after_twenty_seconds(self):
        clock = Clock()
        with mock.patch.object(cs, "_clock", clock):
            server = self.serve(SERVE)
            client = self.client(server)
            client.listZones()
            clock.now += 19.5
            client.listZones()
            self.assertEqual(1, len(server.wires))
            clock.now += 20
            client.listZones()
            self.assertEqual(2, len(server.wires))
            until(server.wires[0].ended.is_set, "closing the old one")

    def test_one_that_the_server_closed_meanwhile_is_noticed_before_use(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__):
                server = self.serve([READ, reply()])
                client = self.client(server, kind)
                for _ in range(3):
                    self.assertEqual(RESULT, self.call(client, "updateZone"))
                    until(server.wires[-1].ended.is_set, "closing")
                self.assertEqual([1, 1, 1], [len(wire.requests) for wire in server.wires])

    def test_one_that_was_reset_or_that_said_something_unasked_is_noticed_before_use(self):
        for name, steps in (("reset", [RESET]), ("said something", [b"HTTP/1.1 408 Request Timeout\r\n\r\n", HOLD])):
            with self.subTest(name):
                go_on = threading.Event()
                wait = functools.partial(go_on.wait, PATIENCE_OF_TESTS)
                server = self.serve([READ, reply(), lambda wire, wait=wait: wait()] + steps, SERVE)
                client = self.client(server)
                client.listZones()
                ((sock, _),) = itertools.chain.from_iterable(transport_of(client)._idle.values())
                go_on.set()
                until(functools.partial(cs._has_news, sock), "noticing")
                self.assertEqual(RESULT, client.updateZone())
                self.assertEqual([1, 1], [len(wire.requests) for wire in server.wires])

    def test_one_that_dies_unnoticed_is_replaced_once_for_a_reading_command(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__), mock.patch.object(cs, "_has_news", lambda sock: False):
                server = self.serve([READ, reply(), READ], [READ, reply(), READ], [READ])
                client = self.client(server, kind)
                self.call(client)
                self.assertEqual(RESULT, self.call(client))
                self.fails(client)  # the replay was on a fresh connection, and that one broke too: enough

    def test_one_that_dies_unnoticed_leaves_a_changing_command_unknown(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__), mock.patch.object(cs, "_has_news", lambda sock: False):
                server = self.serve([READ, reply(), READ], SERVE)
                client = self.client(server, kind, retry=3)
                self.call(client)
                error = self.fails(client, command="deployVirtualMachine")
                self.assertTrue(error.outcome_unknown)
                self.assertFalse(error.unsent)
                self.assertIn("outcome is unknown", str(error))
                self.assertEqual(1, len(server.wires))

    def test_bytes_beyond_an_answer_end_the_connection(self):
        stray = reply(b'{"listzonesresponse": {"count": 1, "zone": [{"id": "smuggled"}]}}')
        cases = [
            ("Content-Length", reply() + stray, RESULT),
            ("chunked", chunked() + stray, RESULT),
            ("one byte", reply() + b"\n", RESULT),
            ("204", b"HTTP/1.1 204 No Content\r\n\r\n" + stray, None),
            ("gzip", reply(gzip.compress(ZONES), "200 OK", "Content-Encoding: gzip") + stray, RESULT),
        ]
        for name, content, result in cases:
            with self.subTest(name):
                server = self.serve([READ, content, HOLD], SERVE)
                client = self.client(server)
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

        server = self.serve([READ, hold_back, reply(), READ, reply(), AGAIN])
        client = self.client(server)
        threads = []
        for index in range(2):
            threads.append(threading.Thread(target=client.listZones))
            threads[-1].start()
            self.assertTrue(events[index].wait(PATIENCE_OF_TESTS))
        for index in (1, 0):  # the first connection is the one used last
            events[2 + index].set()
            threads[index].join()
        client.listZones()
        self.assertEqual([2, 1], [len(wire.requests) for wire in server.wires])

    def test_at_most_concurrency_connections_are_kept(self):
        together = threading.Barrier(6)

        def gather(wire):
            if len(wire.requests) == 1:
                together.wait(PATIENCE_OF_TESTS)

        server = self.serve([READ, gather, reply(), AGAIN])
        client = self.client(server, concurrency=2)
        threads = [threading.Thread(target=client.listZones) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: len(server.open_wires) <= 2, "closing those that are too many")
        client.listZones()
        self.assertEqual(6, len(server.wires))

    def test_threads_share_a_client(self):
        """Each thread gets the answer to its own request, and there are no more connections than threads."""

        def echo(wire):
            name = wire.requests[-1].params["name"]
            return wire.send(reply(json.dumps({"r": {"zone": [{"id": name}]}}).encode()))

        server = self.serve([READ, echo, AGAIN])
        client = self.client(server)
        wrong = []

        def work(number):
            for turn in range(10):
                name = "{}-{}".format(number, turn)
                try:
                    got = client.listZones(name=name)
                except Exception as error:
                    got = error
                if got != {"zone": [{"id": name}]}:
                    wrong.append((name, got))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
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
        server = self.serve(SERVE)
        client = self.client(server)
        client.listZones()
        copied = pickle.loads(pickle.dumps(client))
        copied.listZones()
        copied.close()
        client.listZones()
        self.assertEqual([2, 1], [len(wire.requests) for wire in server.wires])

    def test_an_interrupted_exchange_does_not_leave_its_connection_behind(self):
        for kind in (KeyboardInterrupt, SystemExit, MemoryError):
            with self.subTest(kind=kind.__name__):
                server = self.serve(SERVE)
                client = self.client(server)
                with mock.patch.object(cs, "_read_body", side_effect=kind):
                    self.assertRaises(kind, client.listZones)
                until(server.wires[0].ended.is_set, "closing")
                self.assertEqual(RESULT, client.listZones())
                self.assertEqual(2, len(server.wires))


class BodyTest(TransportCase):
    """Answers, whole and broken."""

    def clients(self, content, **settings):
        """A client of each kind, each with a server that gives this answer once and closes, and then serves."""
        for kind in BOTH:
            server = self.serve([READ, content], SERVE)
            yield server, self.client(server, kind, **settings)

    def assert_broken(self, content, detail, kind=cs.CloudStackConnectionError, **settings):
        """Both clients fail with this text, and go on over another connection."""
        for server, client in self.clients(content, **settings):
            error = self.fails(client, kind, "deployVirtualMachine")
            self.assertIn(detail, str(error))
            self.assertEqual((True, False), (error.outcome_unknown, error.unsent))
            self.assertEqual(RESULT, self.call(client))
            self.assertEqual(2, len(server.wires))

    def assert_result(self, content, **settings):
        for _, client in self.clients(content, **settings):
            self.assertEqual(RESULT, self.call(client))

    def test_every_framing_of_a_whole_answer(self):
        packed = gzip.compress(ZONES)
        members = gzip.compress(ZONES[:9]) + gzip.compress(b"") + gzip.compress(ZONES[9:])
        names = ("Content-Encoding: gzip",)
        cases = {
            "length": reply(),
            "chunked": chunked(),
            "one chunk": chunked(size=10000),
            "chunks of a byte": chunked(size=1),
            "chunk extensions and trailers": chunked(last=b"0;x=y\r\nX-A: b\r\nX-C: d\r\n\r\n"),
            "chunk sizes with zeros": chunked().replace(b"\r\n14\r\n", b"\r\n0000014\r\n"),
            "no end but the connection's": reply(length=False),
            "HTTP/1.0": reply(length=False, version="1.0"),
            "gzip": reply(packed, "200 OK", *names),
            "gzip, chunked": chunked(packed, headers=names),
            "gzip until the end": reply(packed, "200 OK", *names, length=False),
            "x-gzip": reply(packed, "200 OK", "Content-Encoding: X-GZIP"),
            "gzip of several members": reply(members, "200 OK", *names),
            "gzip of several members, chunks of a byte": chunked(members, size=1, headers=names),
            "identity": reply(ZONES, "200 OK", "Content-Encoding: identity"),
            "bare line feeds": reply().replace(b"\r\n", b"\n"),
            "no reason phrase": reply(ZONES, "200"),
            "headers without a space": reply(b"").replace(b": 0", b":%d" % len(ZONES)).replace(b": ", b":") + ZONES,
            "a byte order mark": reply(b"\xef\xbb\xbf" + ZONES),
        }
        for name, content in cases.items():
            with self.subTest(name):
                self.assert_result(content)

    def test_an_answer_in_drops(self):
        content = chunked(gzip.compress(ZONES), size=7, headers=("Content-Encoding: gzip",))
        server = self.serve([READ] + [content[index : index + 1] for index in range(len(content))])
        self.assertEqual(RESULT, self.client(server).listZones())

    def test_a_large_answer(self):
        rows = [{"id": str(number), "name": "x" * 1000} for number in range(2000)]
        body = json.dumps({"listzonesresponse": {"zone": rows}}).encode()
        cases = [reply(body), chunked(body, 100000), reply(gzip.compress(body, 1), "200 OK", "Content-Encoding: gzip")]
        server = self.serve([READ, cases[0], READ, cases[1], READ, cases[2]])
        client = self.client(server)
        for _ in cases:
            self.assertEqual(rows, client.listZones()["zone"])
        self.assertEqual(1, len(server.wires))

    def test_closed_before_any_answer(self):
        self.assert_broken(b"", "closed without an answer")

    def test_closed_before_the_body_is_whole(self):
        packed = gzip.compress(ZONES)
        gzipped = ("Content-Encoding: gzip",)
        cases = {
            "in the body": reply()[:-10],
            "before the body": reply()[: -len(ZONES)],
            "lying length": reply().replace(b"Content-Length: ", b"Content-Length: 9"),
            "in a chunk": chunked()[:-30],
            "before a chunk's size": chunked(last=b""),
            "before the last chunk": chunked(size=10000, last=b""),
            "in a chunk's size": chunked(last=b""),
            "no last chunk but garbage": chunked(last=b"zz\r\n"),
            "gzip in a length": reply(packed, "200 OK", *gzipped)[:-10],
            "gzip until the end": reply(packed[:-10], "200 OK", *gzipped, length=False),
            "gzip, its length kept": reply(packed[:-10], "200 OK", *gzipped),
            "gzip, only its head": reply(packed[:10], "200 OK", *gzipped),
            "gzip, lying length": reply(packed, "200 OK", *gzipped).replace(b"Content-Length: ", b"Content-Length: 9"),
            "gzip in a chunk": chunked(packed, 20, b"", gzipped)[:-20],
        }
        for name, content in cases.items():
            with self.subTest(name):
                self.assert_broken(content, "Broken answer")

    def test_what_ends_with_the_connection_is_told_broken_by_its_json(self):
        self.assert_broken(reply(length=False)[:-10], "Malformed JSON", cs.CloudStackException)

    def test_closed_in_the_head(self):
        for cut in (b"H", b"HTTP/1.1", b"HTTP/1.1 20", b"\r\n"):
            with self.subTest(cut=cut):
                self.assert_broken(cut, "not HTTP")
        for cut in (
            b"HTTP/1.1 200 OK",
            b"HTTP/1.1 200 OK\r\nContent-Ty",
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n",
        ):
            with self.subTest(cut=cut):
                self.assert_broken(cut, "HTTP 200 OK", cs.CloudStackException)

    def test_reset_instead_of_an_answer(self):
        for name, steps in (("at once", [READ, RESET]), ("in the answer", [READ, reply()[:-5], RESET])):
            for kind in BOTH:
                with self.subTest(name, kind=kind.__name__):
                    server = self.serve(steps, SERVE)
                    client = self.client(server, kind)
                    error = self.fails(client, command="deployVirtualMachine")
                    self.assertIsInstance(error, ConnectionError)
                    self.assertIsInstance(error.__cause__, ConnectionError)
                    self.assertTrue(error.outcome_unknown)
                    self.assertEqual(RESULT, self.call(client))

    def test_bytes_that_are_no_http(self):
        cases = {
            "a greeting": b"220 mail.invalid ESMTP\r\n",
            "garbage": bytes(range(256)) * 4,
            "zeros": b"\0" * 1000,
            "another protocol": b"ICY 200 OK\r\n\r\n",
            "another version": b"HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            "a status that is no number": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\n{}",
            "a status too small": b"HTTP/1.1 99 OK\r\nContent-Length: 2\r\n\r\n{}",
            "a status too large": b"HTTP/1.1 1000 OK\r\nContent-Length: 2\r\n\r\n{}",
            "an endless status line": b"HTTP/1.1 200 " + b"x" * 70000,
            "an endless header line": b"HTTP/1.1 200 OK\r\nX-A: " + b"x" * 70000,
            "an endless header name": b"HTTP/1.1 200 OK\r\n" + b"x" * 70000,
            "too many headers": b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 200 + b"\r\n",
            "an endless chunk size": chunked(last=b"0" * 70000),
            "a TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
        }
        for name, content in cases.items():
            with self.subTest(name):
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
        packed = bytearray(gzip.compress(ZONES))
        packed[len(packed) // 2] ^= 0xFF
        checksum = bytearray(gzip.compress(ZONES))
        checksum[-6] ^= 0xFF
        gzipped = ("Content-Encoding: gzip",)
        for name, body in (
            ("damaged", bytes(packed)),
            ("checksum", bytes(checksum)),
            ("none at all", ZONES),
            ("html", b"<html>"),
            ("a second member that ends early", gzip.compress(ZONES[:9]) + gzip.compress(ZONES[9:])[:-9]),
            ("a second member that is damaged", gzip.compress(ZONES[:9]) + bytes(packed)),
            ("members without end", gzip.compress(b"") * 20000 + gzip.compress(ZONES)),
        ):
            with self.subTest(name):
                self.assert_broken(reply(body, "200 OK", *gzipped), "Broken answer")

    def test_an_encoding_nobody_asked_for_is_an_error(self):
        for name, body in (("deflate", zlib.compress(ZONES)), ("br", b"\x0b\x02\x80" + ZONES[:9])):
            with self.subTest(name):
                content = reply(body, "200 OK", "Content-Encoding: " + name)
                self.assert_broken(content, "Malformed JSON", cs.CloudStackException)

    def test_an_answer_may_not_expand_beyond_max_response_size(self):
        gzipped = ("Content-Encoding: gzip",)
        bomb = gzip.compress(b"[" * 30000000, 9)
        self.assertLess(len(bomb), 100000)
        cases = {
            "bomb": reply(bomb, "200 OK", *gzipped),
            "bomb in chunks": chunked(bomb, 1000, headers=gzipped),
            "bomb until the end": reply(bomb, "200 OK", *gzipped, length=False),
            "length": reply(b"x" * 100001),
            "chunks": chunked(b"x" * 100001, 5000),
            "until the end": reply(b"x" * 100001, length=False),
        }
        for name, content in cases.items():
            with self.subTest(name):
                self.assert_broken(content, "max_response_size", cs.CloudStackException, max_response_size=100000)

    def test_an_answer_of_just_max_response_size_is_fine(self):
        body = ZONES + b" " * 1000
        packed = reply(gzip.compress(body), "200 OK", "Content-Encoding: gzip")
        for content in (reply(body), chunked(body), packed, reply(body, length=False)):
            self.assert_result(content, max_response_size=len(body))

    def test_a_bomb_is_not_unpacked_far_beyond_the_limit(self):
        unpacked = []
        really = cs._Gunzip.unpack

        def watched(*args):
            part = really(*args)
            unpacked.append(len(part))
            return part

        bomb = gzip.compress(b"[" * 30000000, 9)
        server = self.serve([READ, reply(bomb, "200 OK", "Content-Encoding: gzip")])
        with mock.patch.object(cs._Gunzip, "unpack", watched):
            self.fails(self.client(server, max_response_size=100000), cs.CloudStackException)
        self.assertLess(sum(unpacked), 200000)

    def test_a_huge_length_is_refused_at_once(self):
        """Nothing of the body is waited for: the server holds back, and the time-out is far away."""
        for length in (10**12, 2**63, 10**30):
            with self.subTest(length=length):
                head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n".format(length)
                server = self.serve([READ, head.encode(), HOLD])
                error = self.fails(self.client(server, timeout=1000), cs.CloudStackException)
                self.assertIn("max_response_size", str(error))

    def test_lengths_that_are_none_cannot_get_past_max_response_size(self):
        pour = b"x" * 3000000
        read = []
        really = cs._Flight.readinto

        def counted(self, buffer):
            read.append(really(self, buffer))
            return read[-1]

        for size in (b"-1", b"-5", b"ffffffffffffffff", b"-ffffffffffffffff", b"1_0", b"+a", b"0x5"):
            with self.subTest(size=size):
                content = reply(b"", "200 OK", "Transfer-Encoding: chunked", length=False) + size + b"\r\n" + pour
                server = self.serve([READ, content])
                client = self.client(server, max_response_size=1000)
                del read[:]
                with mock.patch.object(cs._Flight, "readinto", counted):
                    with self.assertRaises(cs.CloudStackException):
                        client.listZones()
                self.assertLess(sum(filter(None, read)), 1500000)

    def test_a_negative_or_unreadable_length_counts_as_none(self):
        for length in ("-5", "x", ""):
            with self.subTest(length=length):
                self.assert_result(reply(ZONES, "200 OK", "Content-Length: " + length, length=False))

    def test_statuses_without_a_body(self):
        for status in ("204 No Content", "304 Not Modified"):
            for kind in BOTH:
                with self.subTest(status, kind=kind.__name__):
                    server = self.serve(
                        [READ, "HTTP/1.1 {}\r\nContent-Length: 5\r\n\r\n".format(status).encode(), READ, reply()]
                    )
                    client = self.client(server, kind, timeout=2)
                    error = self.fails(client, cs.CloudStackException)
                    self.assertEqual("HTTP " + status, error.args[0])
                    self.assertEqual((int(status[:3]), b""), (error.response.status_code, error.response.content))
                    self.assertEqual(RESULT, self.call(client))
                    self.assertEqual(1, len(server.wires))

    def test_an_interim_answer_is_passed_over(self):
        for interim in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\nX-A: b\r\n\r\n" * 3):
            self.assert_result(interim + reply())

    def test_what_the_response_tells(self):
        page = "<h1>M\u00fcll</h1>".encode("utf-8")
        content = reply(page, "502 Bad Gateway", "X-Node: a7", "Content-Encoding: gzip").replace(
            b"application/json", b"text/html"
        )
        content = content.replace(b"Content-Length: %d" % len(page), b"Content-Length: %d" % len(gzip.compress(page)))
        content = content[: -len(page)] + gzip.compress(page)
        for _, client in self.clients(content):
            response = self.fails(client, cs.CloudStackException).response
            self.assertEqual((502, "Bad Gateway"), (response.status_code, response.reason))
            self.assertEqual(("a7", "a7"), (response.headers["x-node"], response.headers.get("X-NODE")))
            self.assertEqual(("<h1>M\u00fcll</h1>", page), (response.text, response.content))
            self.assertRaises(ValueError, response.json)


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
    def test_silence(self):
        places = {
            "no answer": [READ, HOLD],
            "in the status line": [READ, b"HTTP/1.1 2", HOLD],
            "in the headers": [READ, b"HTTP/1.1 200 OK\r\nX-A: b\r\n", HOLD],
            "in the body": [READ, reply()[:-3], HOLD],
            "in a chunk": [READ, chunked()[:-20], HOLD],
            "before the last chunk": [READ, chunked(last=b""), HOLD],
            "in gzip": [READ, reply(gzip.compress(ZONES), "200 OK", "Content-Encoding: gzip")[:-3], HOLD],
            "before the end of the connection": [READ, reply(length=False), HOLD],
        }
        for name, steps in places.items():
            with self.subTest(name):
                server = self.serve(steps, SERVE)
                client = self.client(server, timeout=0.03)
                error = self.fails(client, cs.CloudStackTimeoutError, "deployVirtualMachine")
                self.assertIsInstance(error, TimeoutError)
                self.assertIsInstance(error.__cause__, OSError)
                self.assertIn("nothing for 0.03 s (timeout)", str(error))
                self.assertEqual((True, False), (error.outcome_unknown, error.unsent))
                until(lambda: server.wires and server.wires[0].ended.is_set(), "hanging up")  # noqa: B023
                client.timeout = 5
                self.assertEqual(RESULT, client.listZones())
                self.assertEqual(2, len(server.wires))

    def test_silence_towards_the_async_client(self):
        server = self.serve([READ, HOLD])
        error = self.fails(self.client(server, cs.AIOCloudStack, timeout=0.03), cs.CloudStackTimeoutError)
        self.assertIn("nothing for 0.03 s (timeout)", str(error))

    def test_an_exchange_ends_after_ten_times_the_timeout_in_all(self):
        """However steadily bytes come: in the head, in the body, in a chunk, after interim answers."""

        def drip(content):
            def pour(wire):
                part = content
                while wire.send(part[:1] or b" "):
                    part = part[1:]
                    time.sleep(0.0005)
                return False

            return pour

        places = {
            "status line": [READ, drip(b"HTTP/1.1 200 " + b"x" * 60000)],
            "headers": [READ, b"HTTP/1.1 200 OK\r\n", drip(b"X-A: " + b"x" * 60000)],
            "body": [READ, reply(b" " * 100000)[:-99999], drip(b"")],
            "chunk": [READ, chunked(b" " * 100000, 100000)[:-99999], drip(b"")],
            "chunk size": [READ, chunked(last=b""), drip(b"0" * 60000)],
            "trailers": [READ, chunked(last=b"0\r\n"), drip(b"X-A: b\r\n" * 9000)],
            "body until the end": [READ, reply(length=False), drip(b"")],
            "gzip": [
                READ,
                reply(gzip.compress(bytes(range(256)) * 2000) * 20, "200 OK", "Content-Encoding: gzip")[:300],
                drip(b""),
            ],
            "interim answers": [READ, drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)],
        }
        for name, steps in places.items():
            with self.subTest(name):
                server = self.serve(steps)
                with mock.patch.object(cs, "_clock", Clock(step=0.5)):
                    error = self.fails(
                        self.client(server, timeout=2), cs.CloudStackTimeoutError, "deployVirtualMachine"
                    )
                self.assertIn("not whole after 20 s", str(error))
                self.assertTrue(error.outcome_unknown)
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

    @unittest.skipUnless(
        sys.platform.startswith("linux"), "how a full queue of connections behaves is the system's own"
    )
    def test_a_connection_that_is_not_made_in_time(self):
        listener = full_listener(self)
        url = "http://127.0.0.1:{}/client/api".format(listener.getsockname()[1])
        for kind in BOTH:
            error = self.fails(self.client(url, kind, timeout=0.05), cs.CloudStackTimeoutError, "deployVirtualMachine")
            self.assertIn("Cannot connect to {}: no answer within 0.05 s".format(url), str(error))
            self.assertEqual((False, True), (error.outcome_unknown, error.unsent))

    def test_a_server_that_does_not_read_a_large_body(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__):
                stop = threading.Event()
                self.addCleanup(stop.set)
                wait = functools.partial(stop.wait, PATIENCE_OF_TESTS)
                server = self.serve([lambda wire, wait=wait: wait()], receive_buffer=4096)
                client = self.client(server, kind, timeout=0.1)
                error = self.fails(client, cs.CloudStackTimeoutError, "deployVirtualMachine", userdata="x" * 6000000)
                self.assertEqual((True, False), (error.outcome_unknown, error.unsent))
                stop.set()

    def test_a_timeout_set_later_counts_for_kept_connections_too(self):
        server = self.serve([READ, reply(), READ, HOLD])
        client = self.client(server, timeout=1000)
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

    def test_a_refused_connection(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody else gets this port meanwhile
            url = "http://127.0.0.1:{}/client/api".format(taken.getsockname()[1])
            for kind in BOTH:
                error = self.fails(self.client(url, kind), command="deployVirtualMachine")
                self.assertEqual("Cannot connect to {}: Connection refused".format(url), str(error))
                self.assertIsInstance(error, ConnectionError)
                self.assertIsInstance(error.__cause__, ConnectionRefusedError)
                self.assertEqual((False, True), (error.outcome_unknown, error.unsent))

    def test_a_name_that_is_not_found(self):
        failure = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        for kind in BOTH:
            with mock.patch("socket.getaddrinfo", side_effect=failure):
                client = self.client("http://cloud.invalid/client/api", kind)
                error = self.fails(client, command="deployVirtualMachine")
            self.assertEqual(
                "Cannot find http://cloud.invalid/client/api: name look-up: Name or service not known", str(error)
            )
            self.assertIs(failure, error.__cause__)
            self.assertEqual((False, True), (error.outcome_unknown, error.unsent))

    def test_a_name_that_cannot_be_one(self):
        for host in ("a" * 70 + ".invalid", "a..invalid"):
            error = self.fails(self.client("http://{}/client/api".format(host)), command="deployVirtualMachine")
            self.assertTrue(error.unsent)

    def test_what_the_standard_library_quotes_of_a_request_is_not_passed_on(self):
        def repeat(wire):
            return wire.send(wire.requests[-1].line.encode() + b"\r\n\r\n")

        for kind in BOTH:
            error = self.fails(self.client(self.serve([READ, repeat]), kind))
            self.assertNotIn("apiKey", "".join(all_texts(error)))

    def test_what_was_not_sent_is_sent_again_within_retry(self):
        server = self.serve([READ, reply(DEPLOYED), AGAIN])
        refused = []

        class Moody(socket.socket):
            def connect(self, address):
                if len(refused) < 2:
                    refused.append(1)
                    raise ConnectionRefusedError(111, "Connection refused")
                return super().connect(address)

        for kind in BOTH:
            del refused[:]
            with mock.patch.object(cs, "_random", lambda: 0.0), mock.patch("socket.socket", Moody):
                client = self.client(server, kind, retry=2, retry_backoff=0.01)
                self.assertEqual(JOB, self.call(client, "deployVirtualMachine")["jobid"])
        self.assertEqual(2, len(server.requests))

    def test_only_http_and_https(self):
        secret = self.write("secret", '{"x": {"read": "a file"}}')
        for endpoint in (
            "file://" + secret, "file:" + secret, "ftp://127.0.0.1/x", "data:application/json,{}", "unix:/x",
            "//127.0.0.1/x", "127.0.0.1:8080/x", "http:///x", "http://127.0.0.1:0/", "http://127.0.0.1:x/", "HTTPS:",
            "ws://127.0.0.1/", "http:127.0.0.1",
        ):  # fmt: skip
            for kind in BOTH:
                with self.subTest(endpoint, kind=kind.__name__):
                    client = self.client(endpoint, kind)
                    with self.assertRaises(ValueError) as caught:
                        self.call(client)
                    self.assertTrue(str(caught.exception).startswith("endpoint: "), caught.exception)
                    self.assert_tells_nothing(caught.exception)

    def test_redirects_are_not_followed(self):
        other = self.serve(SERVE)
        for status in (
            "301 Moved Permanently",
            "302 Found",
            "303 See Other",
            "307 Temporary Redirect",
            "308 Permanent Redirect",
        ):
            for place in (other.url + "?command=listZones&token=x", "/elsewhere", "file:///etc/passwd"):
                for kind in BOTH:
                    with self.subTest(status, place=place, kind=kind.__name__):
                        server = self.serve([READ, reply(ZONES, status, "Location: " + place), AGAIN])
                        client = self.client(server, kind, retry=2)
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
    def test_a_reason_phrase_that_quotes_the_request_shows_nothing_of_it(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__):
                server = self.serve([READ, lambda wire: wire.send(reply(b"", "400 GET " + wire.requests[-1].target))])
                error = self.fails(self.client(server, kind), cs.CloudStackException)
                self.assertRegex(error.response.reason, r"\AGET /client/api\?apiKey=\*\*\*&.*&signature=\*\*\*(&|\Z)")
                self.assert_tells_nothing(*all_texts(error))

    def test_the_scheme_of_an_endpoint_may_be_in_capitals(self):
        with Simulator() as simulator:
            endpoint = simulator.endpoint.replace("http://", "HTTP://")
            with cs.CloudStack(endpoint, simulator.key, simulator.secret) as client:
                self.assertEqual(client.listZones()["count"], 2)


@needs_openssl
class TlsTest(TransportCase):
    def setUp(self):
        TransportCase.setUp(self)
        self.files = certificates()
        self.ca = self.files.path("ca.pem")

    def secure(self, name="good", steps=SERVE, client_ca=None):
        return self.serve(steps, tls=self.files.server(name, client_ca))

    def refused(self, server, kind=cs.CloudStackConnectionError, **settings):
        """A TLS failure before anything was sent, by both clients."""
        for client_kind in BOTH:
            client = self.client(server, client_kind, **settings)
            error = self.fails(client, kind, "deployVirtualMachine")
            self.assertIn("TLS failure with " + server.url, str(error))
            self.assertIsInstance(error, ConnectionError)
            self.assertIsInstance(error.__cause__, (OSError, ssl.CertificateError))
            self.assertEqual((False, True), (error.outcome_unknown, error.unsent))
            self.assertEqual([], server.requests)
        return str(error)

    def test_a_ca_file_and_a_ca_directory(self):
        for path in (self.ca, self.files.path("directory")):
            for kind in BOTH:
                with self.subTest(os.path.basename(path), kind=kind.__name__):
                    server = self.secure()
                    client = self.client(server, kind, verify=path)
                    self.assertEqual([RESULT] * 3, [self.call(client) for _ in range(3)])
                    self.assertEqual(1, len(server.wires))

    def test_a_path_beats_dangerous_no_tls_verify(self):
        server = self.secure()
        self.refused(server, verify=self.files.path("other_ca.pem"), dangerous_no_tls_verify=True)

    def test_certificates_that_are_not_trusted(self):
        cases = [
            ("the system's CA certificates", "good", None, "certificate"),
            ("another CA", "good", "other_ca.pem", "certificate"),
            ("self-signed", "self_signed", "ca.pem", "certificate"),
            ("expired", "expired", "ca.pem", "expired"),
            ("another host's", "elsewhere", "ca.pem", "127.0.0.1"),
        ]
        for name, certificate, authority, word in cases:
            with self.subTest(name):
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

    def test_dangerous_no_tls_verify(self):
        for kind in BOTH:
            client = self.client("https://x/", kind, dangerous_no_tls_verify="true")
            for name in ("good", "self_signed", "expired", "elsewhere"):
                with self.subTest(name, kind=kind.__name__):
                    client.endpoint = self.secure(name).url
                    self.assertEqual(RESULT, self.call(client))

    def test_nothing_else_turns_verification_off(self):
        self.share_contexts()
        for settings in (
            {"verify": False}, {"verify": "false"}, {"verify": "0"}, {"verify": ""}, {"verify": True}, {"verify": "no"},
            {"dangerous_no_tls_verify": "false"}, {"dangerous_no_tls_verify": "0"}, {"dangerous_no_tls_verify": None},
        ):  # fmt: skip
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

    def test_ca_certificates_that_cannot_be_read(self):
        broken = self.write("broken.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        empty = self.write("empty.pem", "")
        for path in ("/nonexistent/ca.pem", broken, empty):
            for kind in BOTH:
                with self.subTest(path, kind=kind.__name__):
                    server = self.secure()
                    with self.assertRaises(ValueError) as caught:
                        self.call(self.client(server, kind, verify=path))
                    self.assertRegex(str(caught.exception), r"\Averify: .*{}.*\Z".format(re.escape(path)))
                    self.assertNotIn("Errno", str(caught.exception))
                    self.assert_tells_nothing(*all_texts(caught.exception))
                    self.assertEqual([], server.wires)

    def test_a_client_certificate_that_the_server_demands(self):
        good, key, both = map(self.files.path, ("good.pem", "leaf.key", "both.pem"))
        for settings in ({"cert": both}, {"cert": good, "cert_key": key}, {"cert": (good, key)}):
            for kind in BOTH:
                with self.subTest(settings, kind=kind.__name__):
                    server = self.secure(client_ca="ca")
                    client = self.client(server, kind, verify=self.ca, **settings)
                    self.assertEqual([RESULT, RESULT], [self.call(client) for _ in range(2)])
                    self.assertEqual(1, len(server.wires))

    def test_a_demanded_client_certificate_that_is_missing_or_not_trusted(self):
        cases = [({}, "ca"), ({"cert": self.files.path("both.pem")}, "other_ca")]
        for settings, authority in cases:
            for kind in BOTH:
                with self.subTest(settings, kind=kind.__name__):
                    server = self.secure(client_ca=authority)
                    client = self.client(server, kind, verify=self.ca, **settings)
                    self.fails(client, command="deployVirtualMachine")
                    until(server.wires[0].ended.is_set, "refusing")
                    self.assertEqual([], server.requests)

    def test_client_certificates_that_cannot_be_used(self):
        good, key, locked = map(self.files.path, ("good.pem", "leaf.key", "locked.key"))
        cases = [
            {"cert": "/nonexistent/own.pem"},
            {"cert": good},  # there is no key in it
            {"cert": good, "cert_key": "/nonexistent/own.key"},
            {"cert": good, "cert_key": self.files.path("ca.key")},  # another's
            {"cert": good, "cert_key": self.write("broken.key", "nonsense")},
            {"cert": self.home},
            {"cert": good, "cert_key": locked},
            {"cert": self.write("both_locked.pem", self.files.read("good.pem") + self.files.read("locked.key"))},
        ]
        self.assertTrue(os.path.exists(key))
        for settings in cases:
            for kind in BOTH:
                with self.subTest(settings, kind=kind.__name__):
                    server = self.secure()
                    with self.assertRaises(ValueError) as caught:
                        self.call(self.client(server, kind, verify=self.ca, **settings))
                    self.assertRegex(str(caught.exception), r"\Acert.*{}.*\Z".format(re.escape(settings["cert"])))
                    self.assertEqual("locked" in str(settings), "key is encrypted" in str(caught.exception))
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
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, theirs)
        os.write(ours, b"wrong\n")
        out = self.assert_child(code, os.ttyname(theirs), self.files.path("good.pem"), self.files.path("locked.key"))
        self.assertIn("cert: ", out)
        os.set_blocking(ours, False)
        shown = b""
        with contextlib.suppress(OSError):
            shown = os.read(ours, 10000)
        self.assertNotIn(b"pass phrase", shown)

    @staticmethod
    def some_of_it(wire):
        """Read some of the client's first message. (Before 3.12, ssl leaks a socket that was reset before it.)"""
        wire.more(50)

    def test_a_handshake_cut_in_the_middle(self):
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
        cuts.update({"answered {}".format(share): [answer_up_to(share)] for share in (0.001, 0.1, 0.6)})
        for name, steps in cuts.items():
            for kind in BOTH:
                with self.subTest(name, kind=kind.__name__):
                    server = self.serve(steps, [context, READ, reply(DEPLOYED)])
                    url = server.url.replace("http:", "https:")
                    error = self.fails(self.client(url, kind, verify=self.ca), command="deployVirtualMachine")
                    self.assertEqual((False, True), (error.outcome_unknown, error.unsent))
                    self.assertEqual([], server.requests)
                    server.scripts.insert(0, steps)
                    client = self.client(url, kind, verify=self.ca, retry=1, retry_backoff=0)
                    self.assertEqual(JOB, self.call(client, "deployVirtualMachine")["jobid"])

    def test_a_handshake_that_hangs(self):
        for kind in BOTH:
            server = self.serve([HOLD])
            url = server.url.replace("http:", "https:")
            client = self.client(url, kind, verify=self.ca, timeout=0.05)
            error = self.fails(client, cs.CloudStackTimeoutError, "deployVirtualMachine")
            self.assertEqual((False, True), (error.outcome_unknown, error.unsent))

    def test_a_plain_http_server_behind_https_and_the_reverse(self):
        plain = self.serve([lambda wire: wire.more(), reply()])
        error = self.fails(self.client(plain.url.replace("http:", "https:")))
        self.assertIn("TLS failure", str(error))
        self.assertTrue(error.unsent)
        secure = self.secure()
        error = self.fails(self.client(secure.url.replace("https:", "http:")))
        self.assertEqual([], secure.requests)

    def test_an_answer_cut_off_over_tls(self):
        for name, content in (("length", reply()[:-10]), ("chunked", chunked()[:-10]), ("nothing", b"")):
            with self.subTest(name):
                server = self.serve([READ, content], SERVE, tls=self.files.server())
                client = self.client(server, verify=self.ca)
                error = self.fails(client, command="deployVirtualMachine")
                self.assertEqual((True, False), (error.outcome_unknown, error.unsent))
                self.assertEqual(RESULT, client.listZones())

    def test_silence_over_tls(self):
        server = self.secure(steps=[READ, reply()[:-5], HOLD])
        client = self.client(server, verify=self.ca, timeout=1)
        self.assertIn("nothing for 1 s", str(self.fails(client, cs.CloudStackTimeoutError)))

    def test_a_kept_tls_connection_that_was_closed_is_noticed_before_use(self):
        server = self.secure(steps=[READ, reply()])
        client = self.client(server, verify=self.ca)
        for _ in range(3):
            self.assertEqual(RESULT, client.updateZone())
            until(server.wires[-1].ended.is_set, "closing")
        self.assertEqual([1, 1, 1], [len(wire.requests) for wire in server.wires])

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


def fail(error):
    raise error


class ProxyTest(TransportCase):
    """Proxies as the environment names them."""

    HTTP = "http://cloud.invalid/client/api"
    HTTPS = "https://cloud.invalid/client/api"
    LOGIN = "me:{}@".format(CANARY_PROXY)
    BASIC = "Basic " + base64.b64encode("me:{}".format(CANARY_PROXY).encode()).decode()

    def setUp(self):
        TransportCase.setUp(self)
        self.share_contexts()

    def proxy(self, *scripts, login="", name="http_proxy"):
        server = self.serve(*scripts)
        os.environ[name] = "http://{}{}".format(login, server.place)
        return server

    def test_plain_http_goes_through_in_absolute_form(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__):
                proxy = self.proxy(SERVE)
                client = self.client(self.HTTP, kind)
                self.call(client)
                client.method = "post"
                self.call(client)
                get, post = proxy.requests
                self.assertTrue(get.target.startswith("http://cloud.invalid/client/api?apiKey="), get.line)
                self.assertEqual("POST http://cloud.invalid/client/api HTTP/1.1", post.line)
                self.assertEqual(["cloud.invalid"] * 2, [get.header("Host"), post.header("Host")])
                self.assertEqual([None] * 2, [get.header("Proxy-Authorization"), post.header("Proxy-Authorization")])
                self.assertEqual(1, len(proxy.wires))

    def test_plain_http_with_proxy_authentication(self):
        for kind in BOTH:
            proxy = self.proxy(SERVE, login=self.LOGIN)
            self.call(self.client(self.HTTP, kind))
            self.assertEqual([self.BASIC], proxy.requests[0].all("Proxy-Authorization"))

    def test_a_proxy_password_is_percent_decoded(self):
        proxy = self.proxy(SERVE, login="m%40e:p%3Aw%2F@")
        self.client(self.HTTP).listZones()
        self.assertEqual(
            ["Basic " + base64.b64encode(b"m@e:p:w/").decode()], proxy.requests[0].all("Proxy-Authorization")
        )

    @needs_openssl
    def test_https_goes_through_a_tunnel(self):
        tunnel = [READ, b"HTTP/1.1 200 Connection established\r\n\r\n", certificates().server() if OPENSSL else None]
        for login in ("", self.LOGIN):
            for kind in BOTH:
                with self.subTest(login=bool(login), kind=kind.__name__):
                    proxy = self.proxy(
                        tunnel + [self.fresh, READ, reply(), READ, reply(), HOLD], login=login, name="https_proxy"
                    )
                    client = self.client(self.HTTPS, kind, verify=certificates().path("ca.pem"))
                    self.assertEqual([RESULT] * 2, [self.call(client) for _ in range(2)])
                    connect, first, second = proxy.requests
                    self.assertEqual(("CONNECT", "cloud.invalid:443"), (connect.method, connect.target))
                    self.assertEqual([self.BASIC] * bool(login), connect.all("Proxy-Authorization"))
                    self.assertNotIn("apiKey", connect.line)
                    for request in (first, second):
                        self.assertTrue(request.target.startswith("/client/api?apiKey="), request.line)
                        self.assertEqual("cloud.invalid", request.header("Host"))
                        self.assertEqual([], request.all("Proxy-Authorization"))
                    self.assertEqual(1, len(proxy.wires))

    @staticmethod
    def fresh(wire):
        """What comes from now on came through the tunnel."""
        wire.raw, wire.taken = b"", 0

    @needs_openssl
    def test_the_certificate_in_the_tunnel_is_that_of_the_origin(self):
        tls = certificates().server("elsewhere")
        proxy = self.proxy([READ, b"HTTP/1.1 200 ok\r\n\r\n", tls, READ, reply()], name="https_proxy")
        error = self.fails(self.client(self.HTTPS, verify=certificates().path("ca.pem")))
        self.assertIn("TLS failure", str(error))
        self.assertTrue(error.unsent)
        self.assertEqual(["CONNECT"], [request.method for request in proxy.requests])

    def test_a_tunnel_that_is_not_made(self):
        answers = {
            "407": (
                b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
                "407 Proxy Authentication",
            ),
            "403": (b"HTTP/1.1 403 Forbidden\r\n\r\nno", "403 Forbidden"),
            "502": (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", "502 Bad Gateway"),
            "302": (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "302 Found"),
            "nothing": (b"", ""),
            "garbage": (b"no such thing\r\n\r\n", ""),
            "half": (b"HTTP/1.1 2", ""),
            "an endless line": (b"HTTP/1.1 200 " + b"x" * 70000, ""),
        }
        for name, (content, text) in answers.items():
            for kind in BOTH:
                with self.subTest(name, kind=kind.__name__):
                    proxy = self.proxy(
                        [READ, content, AGAIN] if name == "407" else [READ, content],
                        login=self.LOGIN,
                        name="https_proxy",
                    )
                    error = self.fails(self.client(self.HTTPS, kind), command="deployVirtualMachine")
                    self.assertIn("Cannot connect to " + self.HTTPS, str(error))
                    self.assertIn(text, str(error))
                    self.assertEqual((False, True), (error.outcome_unknown, error.unsent))
                    self.assertEqual(["CONNECT"], [request.method for request in proxy.requests])
                    until(proxy.wires[0].ended.is_set, "hanging up")

    def test_a_tunnel_that_hangs_or_drips(self):
        def drip(wire):
            while wire.send(b"HTTP/1.1 200 ok\r\nX-A: b\r\nX-B"[len(wire.sent) :][:1] or b"x"):
                wire.sent += b"x"
                time.sleep(0.0005)

        def begin(wire):
            wire.sent = b""

        self.proxy([READ, HOLD], name="https_proxy")
        error = self.fails(self.client(self.HTTPS, timeout=0.05), cs.CloudStackTimeoutError, "deployVirtualMachine")
        self.assertTrue(error.unsent)
        self.proxy([READ, begin, drip], name="https_proxy")
        with mock.patch.object(cs, "_clock", Clock(step=0.5)):
            error = self.fails(self.client(self.HTTPS, timeout=2), cs.CloudStackTimeoutError, "deployVirtualMachine")
        self.assertTrue(error.unsent)

    def test_a_407_for_plain_http_is_the_proxys_answer(self):
        page = reply(b"<html>", "407 Proxy Authentication Required").replace(b"application/json", b"text/html")
        self.proxy([READ, page, AGAIN], login=self.LOGIN)
        error = self.fails(self.client(self.HTTP), cs.CloudStackException, "deployVirtualMachine")
        self.assertEqual("HTTP 407 Proxy Authentication Required", error.args[0])

    def test_no_proxy(self):
        for names in ("127.0.0.1", "*", "x.invalid, 127.0.0.1"):
            with self.subTest(names):
                proxy = self.proxy(SERVE)
                origin = self.serve(SERVE)
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

    def test_addresses_and_ranges_that_no_proxy_excludes(self):
        """Finding 06: a signed request went through a proxy that was excluded by its range."""
        cases = [
            ("127.0.0.0/8", True), ("10.0.0.0/8, 127.0.0.1/32", True), ("127.0.0.1/255.0.0.0", True),
            ("127.0.0.5/8", True), ("localhost,127.0.0.0/8,x", True), ("a.invalid,*", True), ("{place}", True),
            ("10.0.0.0/8", False), ("::1,fd00::/8", False), ("127.0.0.1:1", False), ("nonsense/8,/,300.1.1.1", False),
            ("", False), (" , ", False),
        ]  # fmt: skip
        for excluded, direct in cases:
            with self.subTest(excluded):
                proxy, origin = self.proxy(SERVE), self.serve(SERVE)
                os.environ["no_proxy"] = excluded.format(place=origin.place)
                self.assertEqual(RESULT, self.client(origin).listZones())
                self.assertEqual((0, 1) if direct else (1, 0), (len(proxy.requests), len(origin.requests)))

    def test_hosts_that_no_proxy_excludes(self):
        """By name, with a port, by the end of the name, and IPv6 addresses with and without brackets."""
        cases = {
            "http://[fd00::5]:8080/": ["fd00::5", "[fd00::5]", "fd00::/8", "[fd00::]/8", "FD00:0::5", "[fd00::5]:8080"],
            "http://api.cloud.invalid:81/": ["api.cloud.invalid", "cloud.invalid", ".cloud.invalid", "Invalid",
                                             "api.cloud.invalid:81"],
        }  # fmt: skip
        others = ["::1", "fd01::/16", "10.0.0.0/8", "pi.cloud.invalid", "cloud.invalid:82", "0/0", "fd00::5:8080"]
        for endpoint, excluding in cases.items():
            for excluded in excluding + others:
                with self.subTest(endpoint, excluded=excluded):
                    proxy = self.proxy(SERVE)
                    os.environ["no_proxy"] = excluded
                    gone = socket.gaierror(socket.EAI_NONAME, "unknown")
                    really = socket.getaddrinfo
                    only_proxy = lambda host, *args: really(host, *args) if host == "127.0.0.1" else fail(gone)  # noqa
                    with mock.patch("socket.getaddrinfo", only_proxy):
                        if excluded in excluding:
                            self.assertIs(gone, self.fails(self.client(endpoint)).__cause__)
                        else:
                            self.client(endpoint).listZones()
                    self.assertEqual(0 if excluded in excluding else 1, len(proxy.requests))

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
        code = (
            "import sys, cs\n"
            "cs.CloudStack(sys.argv[1], 'k', 's').listZones()\n"
            "print('urllib.request' in sys.modules)\n"
        )
        out = self.assert_child(code, self.serve(SERVE).url, env={"NO_PROXY": "10.0.0.0/8"}, flags=("-S",))
        self.assertEqual("False\n", out)

    def secure_proxy(self, origin=None, login="", name="https_proxy"):
        """A proxy that speaks TLS: serves by itself, or makes a tunnel to the origin."""
        from select import select as wait_for

        def relay(wire):
            wire.raw, wire.taken = b"", 0
            with socket.create_connection(("127.0.0.1", origin.port)) as inner:
                ends = {wire.sock: inner, inner: wire.sock}
                while True:
                    ready = [wire.sock] if wire.sock.pending() else wait_for(list(ends), [], [], 10)[0]
                    for end in ready:
                        try:
                            part = end.recv(65536)
                        except OSError:
                            part = b""
                        if not part:
                            return False
                        ends[end].sendall(part)

        steps = [READ, b"HTTP/1.1 200 ok\r\n\r\n", relay] if origin else SERVE
        proxy = self.serve(steps, tls=certificates().server())
        os.environ[name] = "https://{}{}".format(login, proxy.place)
        return proxy

    @needs_openssl
    def test_an_https_proxy_is_spoken_to_over_tls(self):
        """Finding 07: it got its password in plain text. For https, TLS to the origin runs inside that to the proxy."""
        big = {"listzonesresponse": {"count": 1, "zone": [ZONE], "padding": "x" * 300000}}
        origin = self.serve([READ, reply(), READ, reply(json.dumps(big).encode()), AGAIN], tls=certificates().server())
        for kind in BOTH:
            for endpoint, proxy in (
                (self.HTTP, self.secure_proxy(login=self.LOGIN, name="http_proxy")),
                (self.HTTPS, self.secure_proxy(origin, login=self.LOGIN)),
            ):
                with self.subTest(endpoint, kind=kind.__name__):
                    client = self.client(endpoint, kind, verify=certificates().path("ca.pem"))
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
        for endpoint, name in ((self.HTTP, "http_proxy"), (self.HTTPS, "https_proxy")):
            plain = self.proxy([lambda wire: wire.more(), b"HTTP/1.1 400 no\r\n\r\n"], login=self.LOGIN, name=name)
            os.environ[name] = os.environ[name].replace("http:", "https:")
            error = self.fails(self.client(endpoint), command="deployVirtualMachine")
            self.assertIn("TLS failure with " + endpoint, str(error))
            self.assertIn("(proxy {})".format(plain.place), str(error))
            self.assertTrue(error.unsent)
            self.assertEqual(b"\x16\x03", plain.wires[0].raw[:2])  # a TLS handshake, and nothing else
            unknown = self.secure_proxy(login=self.LOGIN, name=name)
            error = self.fails(self.client(endpoint), command="deployVirtualMachine")
            self.assertIn("certificate", str(error))
            self.assertTrue(error.unsent)
            self.assertEqual([], unknown.requests)

    @needs_openssl
    def test_the_certificate_inside_of_an_https_proxy_is_that_of_the_origin(self):
        origin = self.serve(SERVE, tls=certificates().server("elsewhere"))
        self.secure_proxy(origin)
        error = self.fails(self.client(self.HTTPS, verify=certificates().path("ca.pem")), command="updateZone")
        self.assertIn("TLS failure", str(error))
        self.assertTrue(error.unsent)
        self.assertEqual([], origin.requests)

    @needs_openssl
    def test_an_answer_that_ends_early_inside_of_an_https_proxy(self):
        for content, kind in ((reply()[:-5], cs.CloudStackConnectionError), (b"", cs.CloudStackConnectionError)):
            origin = self.serve([READ, content], tls=certificates().server())
            self.secure_proxy(origin)
            error = self.fails(self.client(self.HTTPS, verify=certificates().path("ca.pem")), kind, "updateZone")
            self.assertEqual((True, False), (error.outcome_unknown, error.unsent))
        self.secure_proxy(self.serve([READ, reply()[:-5], HOLD], tls=certificates().server()))
        client = self.client(self.HTTPS, verify=certificates().path("ca.pem"), timeout=1)
        self.fails(client, cs.CloudStackTimeoutError, "updateZone")

    def test_a_proxys_reason_that_repeats_its_password_is_masked(self):
        def repeat(wire):
            code = wire.requests[-1].header("Proxy-Authorization")
            return wire.send("HTTP/1.1 407 {}\r\n\r\n".format(code).encode())

        self.proxy([READ, repeat], login=self.LOGIN, name="https_proxy")
        self.assertIn("407", str(self.fails(self.client(self.HTTPS))))

    def test_a_socks_proxy_is_refused_in_one_line(self):
        for scheme in ("socks5", "socks5h", "socks4", "socks", "ftp"):
            for endpoint, name in (
                (self.HTTP, "http_proxy"), (self.HTTPS, "https_proxy"),
                (self.HTTP, "all_proxy"), (self.HTTPS, "ALL_PROXY"),
            ):  # fmt: skip
                for kind in BOTH:
                    with self.subTest(scheme, endpoint=endpoint, kind=kind.__name__):
                        server = self.serve([HOLD])
                        for other in [other for other in os.environ if other.lower().endswith("_proxy")]:
                            del os.environ[other]
                        os.environ[name] = "{}://{}{}".format(scheme, self.LOGIN, server.place)
                        error = self.fails(self.client(endpoint, kind, timeout=0.1), command="deployVirtualMachine")
                        self.assertIn(scheme, str(error))
                        self.assertEqual((False, True), (error.outcome_unknown, error.unsent))
                        self.assertEqual([], server.wires)

    def test_a_proxys_scheme_may_be_missing_or_in_capitals(self):
        for prefix in ("", "HTTP://", "Http://"):
            for endpoint, name in ((self.HTTP, "http_proxy"), (self.HTTPS, "https_proxy")):
                with self.subTest(prefix, endpoint=endpoint):
                    proxy = self.serve([READ, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"])
                    os.environ[name] = prefix + proxy.place
                    with self.assertRaises(cs.CloudStackException) as caught:
                        self.client(endpoint).listZones()
                    self.assertIn("403 Forbidden", str(caught.exception))
                    self.assertEqual(1, len(proxy.requests))

    def test_a_proxy_that_is_written_wrongly_tells_no_password(self):
        port = "@127.0.0.1:1"
        for wrong in ("http://me:{0}://x" + port, "http:/me:{0}" + port, "http://me:{0}" + port + "x", "me:{0}@://"):
            for endpoint, name in ((self.HTTP, "http_proxy"), (self.HTTPS, "https_proxy")):
                for kind in BOTH:
                    with self.subTest(wrong, endpoint=endpoint, kind=kind.__name__):
                        os.environ[name] = wrong.format(CANARY_PROXY)
                        with self.assertRaises((cs.CloudStackException, ValueError)) as caught:
                            with mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(-2, "unknown")):
                                self.call(self.client(endpoint, kind))
                        self.assert_tells_nothing(*all_texts(caught.exception))

    def test_a_proxy_that_refuses_connections(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            for name, endpoint in (("http_proxy", self.HTTP), ("https_proxy", self.HTTPS)):
                os.environ[name] = "http://{}127.0.0.1:{}".format(self.LOGIN, taken.getsockname()[1])
                for kind in BOTH:
                    with self.subTest(name, kind=kind.__name__):
                        error = self.fails(self.client(endpoint, kind), command="deployVirtualMachine")
                        self.assertIn("Connection refused", str(error))
                        self.assertEqual((False, True), (error.outcome_unknown, error.unsent))

    def test_a_kept_connection_through_a_proxy_belongs_to_its_credentials(self):
        proxy = self.proxy(SERVE, login=self.LOGIN)
        self.client(self.HTTP).listZones()
        os.environ["http_proxy"] = "http://other:word@" + proxy.place
        self.client(self.HTTP).listZones()
        self.assertEqual(2, len({request.header("Proxy-Authorization") for request in proxy.requests}))

    def test_gzip_is_asked_for_where_the_host_is_not_loopback(self):
        proxy = self.proxy([READ, reply(gzip.compress(ZONES), "200 OK", "Content-Encoding: gzip"), AGAIN])
        client = self.client(self.HTTP)
        self.assertEqual(RESULT, client.listZones())
        self.assertEqual(["gzip"], proxy.requests[0].all("Accept-Encoding"))
        for host in ("127.0.0.1:1", "127.8.8.8", "localhost:1", "localhost"):
            client.endpoint = "http://{}/client/api".format(host)
            self.assertEqual(RESULT, client.listZones())
            self.assertEqual(["identity"], proxy.requests[-1].all("Accept-Encoding"), host)


class HeaderTest(TransportCase):
    def sent(self, command="listZones", settings=None, **params):
        """The one request that a call makes."""
        server = self.serve([READ, reply(), AGAIN])
        self.call(self.client(server, **(settings or {})), command, **params)
        (request,) = server.requests
        return request

    def test_what_every_request_carries(self):
        for kind in BOTH:
            server = self.serve(SERVE)
            client = self.client(server, kind)
            self.call(client)
            client.method = "post"
            self.call(client)
            get, post = server.requests
            expected = {"Host": server.place, "User-Agent": "cs/" + cs.__version__, "Accept-Encoding": "identity"}
            self.assertEqual(expected, dict(get.headers))
            expected.update(
                {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": str(len(post.body))}
            )
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
        request = self.sent(
            settings={"headers": {"user-AGENT": "mine", "hOST": "other.invalid"}}, headers={"ACCEPT-encoding": "gzip"}
        )
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

    def test_headers_that_are_refused(self):
        bad = [
            {"X-A": "b\r\nX-C: " + CANARY_TOKEN}, {"X-A": CANARY_TOKEN + "\n"}, {"X-A": "\r" + CANARY_TOKEN},
            {"X-A": "b\0c"}, {"X-A": b"b\r\n" + CANARY_TOKEN.encode()}, {"X-A": "\u20ac" + CANARY_TOKEN},
            {"X-A": "\x7f"}, {"X-A": "\x1b[2J"},
            {"X-A": [CANARY_TOKEN]}, {"X-A": {"b": "c"}}, {"X A": "b"}, {"X-A:": "b"}, {"X-A\r\nX-B": "c"}, {"": "b"},
            {"\u00e4": "b"}, {5: "b"}, {b"X-A": "b"}, {"Content-Length": "5"}, {"transfer-ENCODING": "chunked"},
        ]  # fmt: skip
        server = self.serve(SERVE)
        for headers in bad:
            with self.subTest(headers=ascii(headers)):
                for attempt in (
                    lambda headers: self.client(server, headers=headers),
                    lambda headers: self.call(self.client(server), headers=headers),
                    lambda headers: self.call(self.client(server, cs.AIOCloudStack), headers=headers),
                    lambda headers: setattr(self.client(server), "headers", headers),
                ):
                    with self.assertRaises(ValueError) as caught:
                        attempt(headers)
                    self.assert_tells_nothing(*all_texts(caught.exception))
        self.assertEqual([], server.wires)

    def test_headers_put_in_behind_the_clients_back_are_refused_too(self):
        server = self.serve(SERVE)
        client = self.client(server, headers={"X-A": "b"})
        client.headers["X-A"] = "b\r\nX-C: " + CANARY_TOKEN
        with self.assertRaises(ValueError) as caught:
            client.listZones()
        self.assert_tells_nothing(*all_texts(caught.exception))
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
    ENDPOINT = "http://cloud.invalid/client/api"

    def test_it_is_called_as_the_contract_says(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__):
                session = FakeSession()
                client = self.client(self.ENDPOINT, kind, session=session, timeout=3)
                self.assertEqual(RESULT, self.call(client))
                client.method = "post"
                self.assertEqual(RESULT, self.call(client, headers={"X-A": "b"}))
                ((get_args, get), (post_args, post)) = session.calls
                self.assertEqual(("GET", 2), (get_args[0], len(get_args)))
                self.assertTrue(get_args[1].startswith(self.ENDPOINT + "?apiKey="))
                self.assertEqual(("POST", self.ENDPOINT), post_args)
                self.assertEqual({"data", "headers", "timeout", "allow_redirects"}, set(get))
                self.assertEqual((None, 3, False), (get["data"], get["timeout"], get["allow_redirects"]))
                self.assertEqual("cs/" + cs.__version__, get["headers"]["User-Agent"])
                self.assertIn(b"signature=", post["data"])
                self.assertEqual("b", post["headers"]["X-A"])
                self.assertEqual("application/x-www-form-urlencoded", post["headers"]["Content-Type"])

    def test_verify_and_cert_only_where_set(self):
        cases = [
            ({}, {}),
            ({"verify": True}, {}),
            ({"verify": "/x/ca.pem"}, {"verify": "/x/ca.pem"}),
            ({"dangerous_no_tls_verify": True}, {"verify": False}),
            ({"verify": "/x/ca.pem", "dangerous_no_tls_verify": True}, {"verify": "/x/ca.pem"}),
            ({"cert": "/x/own.pem"}, {"cert": "/x/own.pem"}),
            ({"cert": "/x/own.pem", "cert_key": "/x/own.key"}, {"cert": ("/x/own.pem", "/x/own.key")}),
        ]
        for settings, expected in cases:
            with self.subTest(settings):
                session = FakeSession()
                self.client(self.ENDPOINT, session=session, **settings).listZones()
                options = session.calls[0][1]
                self.assertEqual(expected, {name: options[name] for name in ("verify", "cert") if name in options})

    def test_its_answers_are_read_as_any(self):
        html = FakeSession.Answer(504, "Gateway Time-out", "<html>", {"Content-Type": "text/html"})
        refusal = FakeSession.Answer(431, "431", '{"errorresponse": {"errorcode": 431, "errortext": "no"}}')
        moved = FakeSession.Answer(302, "Found", "", {"Location": "http://other.invalid/?signature=x"})
        for kind in BOTH:
            client = self.client(self.ENDPOINT, kind, session=FakeSession(html))
            error = self.fails(client, cs.CloudStackException)
            self.assertEqual(("HTTP 504 Gateway Time-out", 504), (error.args[0], error.response.status_code))
            client.session = FakeSession(refusal)
            self.assertEqual(431, self.fails(client, cs.CloudStackApiException).error["errorcode"])
            client.session = FakeSession(moved)
            self.assertIn("http://other.invalid/", str(self.fails(client, cs.CloudStackException)))

    def test_its_exceptions_are_wrapped_and_not_quoted(self):
        class ReadTimeout(OSError):
            pass

        url = "http://cloud.invalid/?apiKey={}&signature=abc".format(CANARY_KEY)
        cases = [
            (ConnectionError("refused: " + url), cs.CloudStackConnectionError),
            (OSError(5, url), cs.CloudStackConnectionError),
            (TimeoutError(url), cs.CloudStackTimeoutError),
            (ReadTimeout(url), cs.CloudStackTimeoutError),
        ]
        for raised, expected in cases:
            for kind in BOTH:
                with self.subTest(type(raised).__name__, kind=kind.__name__):
                    client = self.client(self.ENDPOINT, kind, session=FakeSession(raised))
                    error = self.fails(client, expected, "deployVirtualMachine")
                    self.assertIn(type(raised).__name__, str(error))
                    self.assertEqual((True, False), (error.outcome_unknown, error.unsent))
                    self.assertNotIn("signature=", "".join(all_texts(error)))

    def test_what_it_raises_of_its_own_is_passed_on_as_it_is(self):
        """A mock's AssertionError, and what may be a mistake in the session; only OSErrors are told as ours."""
        for raised in (AssertionError("not called so"), ValueError("its own"), RuntimeError()):
            for kind in BOTH:
                with self.subTest(type(raised).__name__, kind=kind.__name__):
                    client = self.client(self.ENDPOINT, kind, session=FakeSession(raised), retry=2, retry_backoff=0)
                    with self.assertRaises(type(raised)) as caught:
                        self.call(client, "deployVirtualMachine")
                    self.assertIs(raised, caught.exception)
                    self.assertEqual(1, len(client.session.calls))

    def test_a_mock_without_a_further_answer_does_not_hang_the_event_loop(self):
        """No future takes a StopIteration, which is what a mock raises then."""
        client = self.client(self.ENDPOINT, cs.AIOCloudStack, session=FakeSession(StopIteration()))
        self.assertRaises(RuntimeError, self.call, client)

    def test_an_interrupt_passes_through_it(self):
        client = self.client(self.ENDPOINT, session=FakeSession(KeyboardInterrupt()))
        self.assertRaises(KeyboardInterrupt, client.listZones)

    def test_reading_commands_are_tried_again_through_it(self):
        with mock.patch.object(cs, "_sleep", lambda seconds: None):
            session = FakeSession(ConnectionError("x"), FakeSession.Answer())
            self.assertEqual(RESULT, self.client(self.ENDPOINT, session=session, retry=1).listZones())

    def test_an_aiohttp_session_is_refused_in_one_line(self):
        module = type(sys)("aiohttp.client")
        kind = type("ClientSession", (), {"__module__": module.__name__})
        for client_kind in BOTH:
            with self.assertRaises(ValueError) as caught:
                client_kind(self.ENDPOINT, session=kind())
            self.assertRegex(str(caught.exception), r"\Asession: .*aiohttp.*\Z")
        client = self.client(self.ENDPOINT)
        with self.assertRaises(ValueError):
            client.session = kind()

    def test_the_real_requests(self):
        try:
            import requests
        except ImportError:
            self.skipTest("requests is not installed")
        server = self.serve([READ, reply(), READ, chunked(), READ, reply(b"", "302 Found", "Location: /x"), READ, HOLD])
        for kind in BOTH[:1]:
            with requests.Session() as session:
                client = self.client(server, kind, session=session)
                self.assertEqual(RESULT, client.listZones(name="a b~*\u00fc"))
                client.method = "post"
                self.assertEqual(RESULT, client.listZones(name="a b~*\u00fc"))
                self.assertEqual(["a b~*\u00fc"] * 2, [request.params["name"] for request in server.requests])
                self.fails(client, cs.CloudStackException)
                client.timeout = 0.05
                self.fails(client, cs.CloudStackTimeoutError)
                self.assertEqual(
                    ["cs/" + cs.__version__] * 4, [request.header("User-Agent") for request in server.requests]
                )
                server.close()
                self.fails(client)
def echo(wire):
    """Answer with the name that was asked for."""
    name = wire.requests[-1].params.get("name")
    return wire.send(reply(json.dumps({"listzonesresponse": {"zone": [{"id": name}]}}).encode()))


class AsyncTransportTest(TransportCase):
    """What is AIOCloudStack's own: event loops, threads, cancelling."""

    def aio(self, server, **settings):
        return self.client(server, cs.AIOCloudStack, **settings)

    async def cancelled(self, task):
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task

    def test_several_event_loops_one_after_another(self):
        server = self.serve(SERVE)
        client = self.aio(server)

        async def with_it():
            async with client:
                return await client.listZones()

        async def without_it():
            return await asyncio.gather(*[client.listZones() for _ in range(3)])

        for _ in range(2):
            self.assertEqual(RESULT, run(client.listZones()))
            self.assertEqual([RESULT] * 3, run(without_it()))
            self.assertEqual(RESULT, run(with_it()))

    def test_two_event_loops_at_once(self):
        server = self.serve([READ, echo, AGAIN])
        client = self.aio(server)
        got = {}

        async def work(number):
            calls = [client.listZones(name="{}-{}".format(number, turn)) for turn in range(8)]
            got[number] = [answer["zone"][0]["id"] for answer in await asyncio.gather(*calls)]

        threads = [threading.Thread(target=lambda number=number: run(work(number))) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual({number: ["{}-{}".format(number, turn) for turn in range(8)] for number in range(3)}, got)

    def test_concurrency_bounds_its_threads(self):
        under_way, most = [], []

        def count(wire):
            under_way.append(wire)
            most.append(len(under_way))
            time.sleep(0.002)
            under_way.remove(wire)

        server = self.serve([READ, count, reply(), AGAIN])
        client = self.aio(server, concurrency=3)

        async def work():
            names = {thread.name for thread in threading.enumerate()}
            answers = await asyncio.gather(*[client.listZones() for _ in range(20)])
            return answers, {thread.name for thread in threading.enumerate()} - names

        answers, started = run(work())
        self.assertEqual([RESULT] * 20, answers)
        own = [name for name in started if name.startswith("cs")]
        self.assertTrue(1 <= len(own) <= 3, own)
        self.assertLessEqual(max(most), 3)
        self.assertLessEqual(len(server.wires), 3)

    def test_as_many_as_concurrency_run_at_once(self):
        together = threading.Barrier(40)
        server = self.serve([READ, lambda wire: together.wait(PATIENCE_OF_TESTS) and None, reply(), AGAIN])
        client = self.aio(server)

        async def work():
            return await asyncio.gather(*[client.listZones() for _ in range(40)])

        self.assertEqual([RESULT] * 40, run(work()))

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

    def test_under_a_limit_of_threads_every_call_is_answered(self):
        """Finding 02: commands ran although the caller got a RuntimeError."""
        for threads in (0, 1, 3):
            with self.subTest(threads=threads), self.at_most(threads):
                server = self.serve([READ, echo, AGAIN])
                client = self.aio(server)

                async def work(client=client):
                    calls = [client.updateZone(name=str(number)) for number in range(20)]
                    return [answer["zone"][0]["id"] for answer in await asyncio.gather(*calls)]

                self.assertEqual([str(number) for number in range(20)], run(work()))
                self.assertEqual(20, len(server.requests))
                self.assertEqual(threads, len(workers_of(client).threads))

    def test_under_a_limit_of_threads_a_list_is_whole(self):
        """Finding 02: the pages that no thread is to be had for are asked for one after another."""

        def page(wire):
            number = int(wire.requests[-1].params["page"])
            rows = [{"id": str(5 * number + row)} for row in range(5 if number <= 7 else 0)]
            return wire.send(reply(json.dumps({"r": {"count": 35, "zone": rows}}).encode()))

        for threads in range(4):
            server = self.serve([READ, page, AGAIN])
            with self.subTest(threads=threads), self.at_most(threads):
                rows = self.client(server).listZones(fetch_list=True, pagesize=5)
                self.assertEqual([str(number) for number in range(5, 40)], [row["id"] for row in rows])

    @unittest.skipUnless(hasattr(os, "fork"), "RLIMIT_NPROC is Unix's own")
    def test_where_the_system_gives_no_thread_at_all_and_at_the_interpreters_exit(self):
        code = (
            "import atexit, asyncio, os, resource, sys\n"
            "import cs\n"
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

        def page(wire):
            number = int(wire.requests[-1].params.get("page", 1))
            rows = [{"id": number}] if number <= 9 else []
            return wire.send(reply(json.dumps({"r": {"count": 9, "zone": rows}}).encode()))

        server = self.serve([READ, page, AGAIN])
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
                await asyncio.gather(*[client.updateZone() for _ in range(15)])

        threads = [threading.Thread(target=lambda: run(work()), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_OF_TESTS)
        self.assertEqual((900, False), (len(done), any(thread.is_alive() for thread in threads)))
        self.assertLessEqual(len(workers_of(client).threads), 3)

    def test_an_event_loop_that_was_closed_meanwhile_is_no_harm(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        server = self.serve([READ, lambda wire: go_on.wait(PATIENCE_OF_TESTS), reply(), AGAIN])
        client = self.aio(server, concurrency=1)
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

    def test_cancelling_wakes_the_reading_thread(self):
        """In an answer, over plain HTTP and TLS; long before the time-out of 1000 s."""
        for tls in (False, True):
            for content in (b"", reply()[:-5]):
                with self.subTest(tls=tls, content=content[:15]):
                    if tls and not OPENSSL:
                        continue
                    server = self.serve([READ, content, HOLD], tls=certificates().server() if tls else None)
                    client = self.aio(server, timeout=1000, verify=certificates().path("ca.pem") if tls else None)

                    async def work(client=client, server=server):
                        task = asyncio.ensure_future(client.deployVirtualMachine())
                        await until_async(lambda: server.requests, "asking")
                        await self.cancelled(task)

                    run(work())
                    until(server.wires[0].ended.is_set, "hanging up")
                    until(lambda client=client: not any(map(len, transport_of(client)._idle.values())), "forgetting it")
                    self.assertEqual(1, len(server.requests))

    @unittest.skipUnless(sys.platform.startswith("linux"), "needs /proc, and how Linux takes a full queue")
    def test_cancelling_wakes_a_thread_that_connects_or_shakes_hands(self):
        """Finding 05; long before the time-out, and no descriptor is left."""
        listener = full_listener(self)
        full = "127.0.0.1:{}".format(listener.getsockname()[1])
        silent, proxy = self.serve([HOLD]), self.serve([READ, HOLD])
        self.share_contexts()
        for endpoint, proxied, begun in (
            ("http://" + full, None, lambda: True),
            ("https://" + full, None, lambda: True),
            ("https://" + silent.place, None, lambda: any(wire.raw for wire in silent.wires)),
            ("https://cloud.invalid", proxy.url, lambda: proxy.requests),
        ):
            with self.subTest(endpoint, proxied=proxied):
                if proxied:
                    os.environ["https_proxy"] = proxied
                client = self.aio(endpoint, timeout=1000, concurrency=1)
                before = len(os.listdir("/proc/self/fd"))

                async def work(client=client, begun=begun):
                    task = asyncio.ensure_future(client.deployVirtualMachine())
                    await until_async(lambda: workers_of(client).threads and not workers_of(client)._idle, "starting")
                    await until_async(begun, "connecting")
                    await asyncio.sleep(0.02)
                    await self.cancelled(task)

                run(work())
                until(lambda client=client: workers_of(client)._idle, "waking up")
                until(lambda: not any(server.open_wires for server in (silent, proxy)), "hanging up")
                self.assertEqual([], [request.line for request in silent.requests])
                until(lambda before=before: len(os.listdir("/proc/self/fd")) <= before, "closing")

    def test_a_process_ends_at_once_after_a_cancel(self):
        """Finding 05: in a handshake and in a name look-up that hang; the time-out is far beyond the test's."""
        code = (
            "import asyncio, socket, sys, time\n"
            "import cs\n"
            "if sys.argv[2]: socket.getaddrinfo = lambda *args: time.sleep(1000)\n"
            "async def main():\n"
            "    client = cs.AIOCloudStack(sys.argv[1], 'k', 's', timeout=1000)\n"
            "    task = asyncio.ensure_future(client.listZones())\n"
            "    await asyncio.wait([task], timeout=0.2)\n"
            "    task.cancel()\n"
            "    await asyncio.wait([task])\n"
            "    print(task.cancelled())\n"
            "loop = asyncio.new_event_loop()\n"
            "loop.run_until_complete(main())\n"
            "loop.close()\n"
        )
        server = self.serve([HOLD])
        for slow_names in ("", "yes"):
            with self.subTest(slow_names=slow_names):
                self.assertEqual("True\n", self.assert_child(code, "https://" + server.place, slow_names))

    @needs_openssl
    def test_cancelling_before_the_connection_is_made_sends_nothing(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        tls = certificates().server()
        waiting = [lambda wire: go_on.wait(PATIENCE_OF_TESTS)]
        steps = [tls, READ, reply(), READ, reply(), HOLD]
        server = self.serve(waiting + steps, steps)
        url = server.url.replace("http:", "https:")
        client = self.aio(url, verify=certificates().path("ca.pem"), concurrency=1)

        async def work():
            task = asyncio.ensure_future(client.deployVirtualMachine())
            await until_async(lambda: server.wires, "connecting")
            await self.cancelled(task)
            go_on.set()
            return await client.listZones()  # in the one thread, so the other is done with by then

        self.assertEqual(RESULT, run(work()))
        self.assertEqual(["listZones"], [request.params["command"] for request in server.requests])

    def test_cancelling_a_call_that_waits_for_a_thread_sends_nothing(self):
        server = self.serve([READ, lambda wire: go_on.wait(PATIENCE_OF_TESTS), reply(), READ, reply(), HOLD])
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        client = self.aio(server, concurrency=1)

        async def work():
            first = asyncio.ensure_future(client.listZones(name="first"))
            await until_async(lambda: server.requests, "asking")
            second = asyncio.ensure_future(client.deployVirtualMachine())
            await asyncio.sleep(0.01)
            await self.cancelled(second)
            go_on.set()
            await first
            await client.listZones(name="third")

        run(work())
        self.assertEqual(["listZones", "listZones"], [request.params["command"] for request in server.requests])

    def test_cancelling_between_two_tries_starts_no_other(self):
        server = self.serve([READ, RESET])
        client = self.aio(server, retry=50)

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
        page = json.dumps({"r": {"count": 50, "zone": [{"id": str(number)} for number in range(5)]}}).encode()
        server = self.serve([READ, reply(page), READ, HOLD], [READ, HOLD])
        client = self.aio(server, timeout=1000)

        async def work():
            task = asyncio.ensure_future(client.listZones(fetch_list=True, pagesize=5))
            await until_async(lambda: len(server.requests) == 1 + cs.PAGES_AHEAD, "asking ahead")
            await self.cancelled(task)
            await until_async(lambda: not server.open_wires, "hanging up")

        run(work())
        self.assertEqual(1 + cs.PAGES_AHEAD, len(server.requests))

    def test_wait_for(self):
        server = self.serve([READ, HOLD], SERVE)
        client = self.aio(server, timeout=1000)

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

        client = self.aio("http://cloud.invalid/client/api", session=Session())

        async def work(value):
            variable.set(value)
            await client.listZones()

        async def all_of_them():
            await asyncio.gather(work("a"), work("b"))

        run(all_of_them())
        self.assertEqual([("a", False), ("b", False)], sorted(seen))

    def test_the_event_loop_is_never_held_up(self):
        """While the server is silent, other tasks go on."""
        server = self.serve([READ, lambda wire: ticks.wait(PATIENCE_OF_TESTS), reply()])
        ticks = threading.Event()
        client = self.aio(server)

        async def work():
            task = asyncio.ensure_future(client.listZones())
            for _ in range(5):
                await asyncio.sleep(0.001)
            ticks.set()
            return await task

        self.assertEqual(RESULT, run(work()))


class ProcessTest(TransportCase):
    """What shows only in a process of its own: imports, forks, warnings, other places and names."""

    SLOW = (
        "asyncio argparse configparser typing logging dataclasses concurrent.futures ssl urllib.request http.client"
        " email pygments random datetime socket select tempfile subprocess requests aiohttp"
    )

    def test_importing_it_imports_nothing_slow(self):
        code = (
            "import hmac, sys\n"  # which brings in socket on PyPy
            "before = set(sys.modules)\n"
            "import cs\n"
            "print(' '.join(sorted(set(sys.argv[1].split()) & (set(sys.modules) - before))))\n"
        )
        self.assertEqual("", self.assert_child(code, self.SLOW, flags=("-S",)).strip())

    def test_a_plain_call_imports_no_module_that_it_does_not_need(self):
        code = (
            "import sys, cs\n"
            "cs.CloudStack(sys.argv[1], 'k', 's').listZones()\n"
            "print(' '.join(sorted(set(sys.argv[2].split()) & set(sys.modules))))\n"
        )
        unneeded = "asyncio argparse configparser dataclasses concurrent.futures pygments requests aiohttp"
        out = self.assert_child(code, self.serve(SERVE).url, unneeded, flags=("-S",))
        self.assertEqual("", out.strip())

    def test_all_is_what_is_exported(self):
        names = {}
        exec("from cs import *", names)
        del names["__builtins__"]
        self.assertEqual(sorted(cs.__all__), sorted(names))
        self.assertEqual(sorted(set(cs.__all__)), cs.__all__)
        contract = (
            "CloudStack AIOCloudStack CloudStackException CloudStackApiException read_config read_config_from_ini main"
        )
        self.assertLessEqual(set(contract.split()), set(cs.__all__))
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
        self.assertEqual([2, 1], [len(wire.requests) for wire in server.wires])

    def test_under_another_name_and_inside_a_package(self):
        os.mkdir(os.path.join(self.home, "package"))
        self.write("package/__init__.py", "")
        for path, name in (("vendored.py", "vendored"), ("package/_cs.py", "package._cs")):
            shutil.copy(CS_PATH, os.path.join(self.home, path))
            code = (
                "import pickle, sys, importlib\n"
                "cs = importlib.import_module(sys.argv[1])\n"
                "assert 'cs' not in sys.modules\n"
                "client = pickle.loads(pickle.dumps(cs.CloudStack(sys.argv[2], 'k', 's')))\n"
                "print(client.listZones(name='x')['zone'][0]['id'])\n"
                "client.endpoint = 'http://127.0.0.1:1/'\n"
                "try: client.listZones()\n"
                "except cs.CloudStackConnectionError as error: error = pickle.loads(pickle.dumps(error))\n"
                "print(type(cs.CloudStackException()).__module__, cs.AIOCloudStack.__module__)\n"
            )
            with self.subTest(name):
                out = self.assert_child(code, name, self.serve([READ, echo, AGAIN]).url, path=self.home)
                self.assertEqual("x\n{0} {0}\n".format(name), out)

    def test_dropping_a_client_gives_no_warning(self):
        """Sync and async, at once, with a walk under way, after errors, and at the end of the interpreter."""
        code = (
            "import asyncio, sys\n"
            "import cs\n"
            "url, broken, ca = sys.argv[1:]\n"
            "make = lambda kind, url=url: kind(url, 'k', 's', verify=ca or None, timeout=20)\n"
            "make(cs.CloudStack).listZones()\n"
            "client = make(cs.CloudStack)\n"
            "client.listZones()\n"
            "del client\n"
            "kept = make(cs.CloudStack)\n"
            "kept.listZones()\n"
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
            "loop = asyncio.new_event_loop()\n"
            "loop.run_until_complete(main())\n"
            "loop.close()\n"
            "print('done')\n"
        )

        def break_or_hang(wire):
            while "hang" in wire.requests[-1].target and wire.more():
                pass
            return wire.send(reply()[:-5]) and False

        for tls in (False, True)[: 2 if OPENSSL else 1]:
            with self.subTest(tls=tls):
                context = certificates().server() if tls else None
                server, broken = self.serve(SERVE, tls=context), self.serve([READ, break_or_hang], tls=context)
                ca = certificates().path("ca.pem") if tls else ""
                flags = ("-X", "dev", "-W", "error", "-bb")
                self.assertEqual("done\n", self.assert_child(code, server.url, broken.url, ca, flags=flags))

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_fork_starts_with_connections_of_its_own(self):
        code = (
            "import asyncio, os, sys, warnings\n"
            "import cs\n"
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
            "    status = 1\n"
            "    try:\n"
            "        call('child')\n"
            "        call('child')\n"
            "        status = 0\n"
            "    finally: os._exit(status)\n"
            "call('parent')\n"
            "assert os.waitpid(child, 0)[1] == 0\n"
            "call('parent')\n"
        )
        for kind, tls in ((cs.CloudStack, False), (cs.AIOCloudStack, False), (cs.CloudStack, bool(OPENSSL))):
            with self.subTest(kind=kind.__name__, tls=tls):
                server = self.serve([READ, echo, AGAIN], tls=certificates().server() if tls else None)
                ca = certificates().path("ca.pem") if tls else ""
                self.assert_child(code, kind.__name__, server.url, ca)
                names = sorted([request.params["name"] for request in wire.requests] for wire in server.wires)
                self.assertEqual([["child"] * 2, ["parent"] * 3], names)

    def test_an_unpickled_or_copied_client_starts_no_thread_and_opens_nothing(self):
        import copy

        for kind in BOTH:
            threads = threading.active_count()
            client = kind("http://127.0.0.1:1/", "k", "s")
            for other in (client, copy.copy(client), copy.deepcopy(client), pickle.loads(pickle.dumps(client))):
                self.assertFalse(other._state._by_process)
            self.assertEqual(threads, threading.active_count())


class LeakTest(TransportCase):
    """Hundreds of broken exchanges leave no socket, no thread and no file descriptor behind."""

    BREAKS = [
        [], [RESET], [READ], [READ, RESET], [READ, b"garbage\r\n\r\n"], [READ, b"HTTP/1.1 2"], [READ, reply()[:-5]],
        [READ, chunked()[:-5]], [READ, reply(b"xx", "200 OK", "Content-Encoding: gzip")],
        [READ, reply(b"", "302 Found", "Location: /")], [READ, reply(b"x" * 5000)], [READ, reply(b"<html>", "503 x")],
        [READ, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"], [READ, reply() + b"surplus"],
        [READ, reply(b"", "204 No Content")], [READ, reply(length=False)], [READ, b"x" * 70000],
    ]  # fmt: skip

    def descriptors(self):
        return len(os.listdir("/proc/self/fd"))

    def assert_no_leak(self, work, rounds, server):
        """Run the work, once to warm up and then many times, without the garbage collector."""
        work()
        until(lambda: not server.open_wires, "closing")
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        until(lambda: len([thread for thread in server.threads if thread.is_alive()]) == 1, "ending")
        before, threads = self.descriptors(), threading.active_count()
        for _ in range(rounds):
            work()
        until(lambda: not server.open_wires, "closing")
        until(lambda: len([thread for thread in server.threads if thread.is_alive()]) == 1, "ending")
        self.assertEqual((before, threads), (self.descriptors(), threading.active_count()))

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc here")
    def test_every_way_to_break(self):
        ways = itertools.cycle(self.BREAKS)

        def break_somehow(wire):
            return all(server._do(wire, step) for step in next(ways))

        server = self.serve([break_somehow])
        for kind in BOTH:
            with self.subTest(kind=kind.__name__):
                client = self.client(server, kind, max_response_size=4000, concurrency=1)

                def work(client=client):
                    for _ in self.BREAKS:
                        with contextlib.suppress(cs.CloudStackException):
                            self.call(client)

                self.assert_no_leak(work, max(8, ATTACK_RUNS // 20), server)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc here")
    def test_time_outs(self):
        server = self.serve([READ, HOLD])
        client = self.client(server, timeout=0.002)

        def work():
            with contextlib.suppress(cs.CloudStackTimeoutError):
                client.listZones()

        self.assert_no_leak(work, 30, server)

    @needs_openssl
    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc here")
    def test_tls_and_tunnels_that_fail(self):
        refusal = b"HTTP/1.1 407 no\r\n\r\n"
        ways = [[certificates().server("elsewhere"), READ], [READ, refusal], [TlsTest.some_of_it, RESET], [READ, RESET]]
        ways = itertools.cycle(ways)

        def break_somehow(wire):
            return all(server._do(wire, step) for step in next(ways))

        server = self.serve([break_somehow])
        direct = self.client(server.url.replace("http:", "https:"), verify=certificates().path("ca.pem"))
        os.environ["https_proxy"] = server.url
        os.environ["no_proxy"] = "127.0.0.1"
        tunnelled = self.client("https://cloud.invalid/", verify=certificates().path("ca.pem"))

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

    with mock.patch.multiple(cs, _clock=lambda: time.monotonic() + jumped[0], _sleep=sleep):
        with mock.patch("asyncio.sleep", asleep):
            yield


class AtMostOnceTest(TransportCase):
    """A deployment whose connection breaks, at any byte of the request and of the answer: the server never accepts more
    than were called for, and who gets an exception is told whether it may have happened."""

    FRAMINGS = {"length": reply, "chunked": chunked, "until the end": functools.partial(reply, length=False)}

    def setUp(self):
        TransportCase.setUp(self)
        self.plan = None  # (side, position, framing, reset) for the request that comes next
        self.accepted = 0
        self.jobs = set()  # the ids that the accepted deployments chose
        self.server = self.serve([self.play])

    def play(self, wire):
        while self.first_byte(wire):
            plan, self.plan = self.plan, None
            if not self.answer(wire, *(plan or (None, None, "length", False))):
                return False
        return False

    @staticmethod
    def first_byte(wire):
        try:
            return wire.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""

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
            return wire.reset() if reset else False
        if side == "answer":
            wire.send(content[:position])
            return wire.reset() if reset else False
        return wire.send(content) and framing != "until the end"

    def job(self, jobid):
        if jobid in self.jobs:
            job = {"jobid": jobid, "jobstatus": 0, "jobinstanceid": "vm-1"}
            return reply(json.dumps({"queryasyncjobresultresponse": job}).encode("utf-8"))
        error = {"errorcode": 431, "cserrorcode": 9999, "errortext": "entity does not exist"}
        return reply(json.dumps({"queryasyncjobresultresponse": error}).encode("utf-8"), "431 431")

    def break_one(self, kind, method, kept, plan, retry=2, **settings):
        client = self.client(self.server, kind, method=method, retry=retry, retry_backoff=0, **settings)
        try:
            if kept:
                self.assertEqual(RESULT, self.call(client))
            self.accepted = 0
            self.plan = plan
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

    def positions(self):
        """Every plan: side and position, framing, and whether it ends with a reset."""
        requests = [("request", position, "length") for position in range(480)]
        answers = [
            ("answer", position, name)
            for name, framed in self.FRAMINGS.items()
            for position in range(len(framed(DEPLOYED)) + 1)
        ]
        return [plan + (reset,) for plan in requests + answers for reset in (False, True)]

    def test_wherever_the_connection_breaks(self):
        runs = list(itertools.product(BOTH, ("get", "post"), (False, True), self.positions()))
        chosen = random.Random(ATTACK_SEED).sample(runs, min(ATTACK_RUNS, len(runs)))
        unknown = 0
        for kind, method, kept, plan in chosen:
            with self.subTest(kind=kind.__name__, method=method, kept=kept, plan=plan):
                error = self.break_one(kind, method, kept, plan)
                unknown += error is not None and error.outcome_unknown
        self.assertGreater(unknown, len(chosen) // 2)

    def test_wherever_it_breaks_the_job_of_what_was_accepted_is_found(self):
        """With recover, and while the server is up, no accepted deployment ends in an unknown outcome."""
        runs = list(itertools.product(BOTH, ("get", "post"), (False, True), self.positions()))
        chosen = random.Random(ATTACK_SEED + 1).sample(runs, min(ATTACK_RUNS, len(runs)))
        found = 0
        with hurried():
            for kind, method, kept, plan in chosen:
                with self.subTest(kind=kind.__name__, method=method, kept=kept, plan=plan):
                    error = self.break_one(kind, method, kept, plan, recover=True)
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
            for (side, position), kind in itertools.product(plans, BOTH):
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

        server = self.serve([moody])
        outcomes = {}

        def note(name, deploy):
            try:
                outcomes[name] = deploy()
            except cs.CloudStackException as error:
                outcomes[name] = error

        client = self.client(server, retry=2, retry_backoff=0)
        work = lambda number: [  # noqa: E731
            note(
                "{}-{}".format(number, turn),
                lambda turn=turn: client.deployVirtualMachine(name="{}-{}".format(number, turn)),
            )
            for turn in range(10)
        ]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        aio = self.client(server, cs.AIOCloudStack, retry=2, retry_backoff=0)

        async def tasks():
            names = ["task-{}".format(number) for number in range(40)]
            results = await asyncio.gather(
                *[aio.deployVirtualMachine(name=name) for name in names], return_exceptions=True
            )
            outcomes.update(zip(names, results))

        run(tasks())
        self.assertEqual(100, len(outcomes))
        self.assertEqual(len(set(accepted)), len(accepted))
        for name, outcome in outcomes.items():
            if isinstance(outcome, cs.CloudStackException):
                self.assertTrue(outcome.outcome_unknown or name not in accepted, name)
            else:
                self.assertIn(name, accepted)


class SecretsTest(TransportCase):
    """Keys, passwords, session keys and tokens are seen on the wire, and nowhere else."""

    SECRET_ANSWER = json.dumps(
        {
            "r": {
                "user": [{"apikey": CANARY_KEY, "secretkey": CANARY_SECRET, "username": "me"}],
                "password": CANARY_PASSWORD, "sessionkey": CANARY_SESSION, "echo": CANARY_KEY + " and " + CANARY_SECRET,
                "virtualmachine": {"userdata": CANARY_TOKEN, "details": {"vnc.password": CANARY_PASSWORD}},
            }
        }
    ).encode()  # fmt: skip

    ECHO = (CANARY_KEY + " and " + CANARY_SECRET).encode()

    def login(self, wire):
        """A server with sessions, which is shown the secrets and gives some back."""
        request = wire.requests[-1]
        if request.params["command"] != "login":
            return wire.send(reply(self.SECRET_ANSWER.replace(self.ECHO, (CANARY_SESSION + CANARY_TOKEN).encode())))
        body = json.dumps({"loginresponse": {"sessionkey": CANARY_SESSION, "username": "me"}}).encode()
        cookies = [
            "Set-Cookie: JSESSIONID={}; Path=/client; HttpOnly".format(CANARY_TOKEN),
            "Set-Cookie: sessionkey=" + CANARY_SESSION,
        ]
        return wire.send(reply(body, "200 OK", *cookies))

    def test_the_trace_of_signed_requests(self):
        headers = {
            "Authorization": "Bearer " + CANARY_TOKEN,
            "X-Api-Key": CANARY_TOKEN,
            "X-Auth-Token": CANARY_TOKEN,
            "X-Tenant": "t1",
        }
        headers.update({"Cookie": "a=" + CANARY_TOKEN, "Proxy-Authorization": CANARY_TOKEN})
        for kind in BOTH:
            for method in ("get", "post"):
                with self.subTest(kind=kind.__name__, method=method):
                    server = self.serve(
                        [READ, reply(self.SECRET_ANSWER, "200 OK", "Set-Cookie: a=" + CANARY_TOKEN), AGAIN]
                    )
                    client = self.client(server, kind, method=method, trace=True, headers=headers)
                    text = self.traced(
                        client, "updateUser", password=CANARY_PASSWORD, userdata=CANARY_SECRET, name="visible"
                    )
                    self.assertEqual("POST", server.requests[0].method)
                    self.assertEqual(CANARY_PASSWORD, server.requests[0].params["password"])
                    for shown in (
                        "name=visible",
                        "X-Tenant: t1",
                        "200 OK",
                        "password=***",
                        "signature=***",
                        '"username": "me"',
                    ):
                        self.assertIn(shown, text)
                    self.traced(client, "listZones", json=False)

    def test_the_trace_of_xml(self):
        body = "<r><password>{}</password><sessionkey>{}</sessionkey><userdata>{}</userdata><name>visible</name></r>"
        body = body.format(CANARY_PASSWORD, CANARY_SESSION, CANARY_TOKEN)
        server = self.serve([READ, reply(body.encode()), AGAIN])
        self.assertIn("visible", self.traced(self.client(server, trace=True), "listUsers", json=False))

    def test_the_trace_of_a_page_that_quotes_the_request(self):
        def quote_back(wire):
            request = wire.requests[-1]
            body = "<h1>404</h1><p>visible: {} {}</p>".format(request.target, request.params["signature"])
            return wire.send(reply(body.encode(), "404 Not Found"))

        server = self.serve([READ, quote_back, AGAIN])
        self.assertIn("visible: /client/api?", self.traced(self.client(server, trace=True)))

    def test_the_trace_of_a_session(self):
        for kind in BOTH:
            with self.subTest(kind=kind.__name__):
                server = self.serve([READ, self.login, AGAIN])
                client = kind(server.url, username="me", password=CANARY_PASSWORD, trace=True, timeout=5)
                text = self.traced(client)
                self.assertIn("command=login", text)
                self.assertIn("username=me", text)
                self.assertEqual(CANARY_SESSION, server.requests[1].params["sessionkey"])
                self.assertIn("JSESSIONID=" + CANARY_TOKEN, server.requests[1].header("Cookie"))
                err = io.StringIO()
                with contextlib.redirect_stderr(err):
                    client.close()
                self.assert_tells_nothing(err.getvalue())

    def test_the_trace_of_exchanges_that_fail(self):
        breaks = [
            [],
            [READ],
            [READ, reply()[:-5]],
            [READ, b"garbage\r\n"],
            [READ, reply(b"<html>" + CANARY_KEY.encode(), "500 x")],
        ]
        for steps in breaks:
            for kind in BOTH:
                client = self.client(self.serve(steps), kind, trace=True)
                self.assertIn("command=deployVirtualMachine", self.traced(client, "deployVirtualMachine"))

    def test_the_trace_through_a_proxy(self):
        server = self.serve(SERVE[:2] + [READ, reply()], [READ, b"HTTP/1.1 407 no\r\n\r\n"])
        os.environ["http_proxy"] = os.environ["https_proxy"] = "http://me:{}@{}".format(CANARY_PROXY, server.place)
        for endpoint in ("http://cloud.invalid/client/api", "https://cloud.invalid/client/api"):
            self.assertIn("cloud.invalid", self.traced(self.client(endpoint, trace=True)))
        self.assertEqual(2, len([request for request in server.requests if request.all("Proxy-Authorization")]))

    def test_errors_of_a_session(self):
        refusal = json.dumps({"loginresponse": {"errorcode": 531, "errortext": "Failed to authenticate"}}).encode()
        for steps in (
            [READ, reply(refusal, "531 531")],
            [READ],
            [READ, b"garbage\r\n"],
            [READ, reply(b"<html>", "502 x")],
        ):
            for kind in BOTH:
                server = self.serve(steps)
                client = kind(server.url, username="me", password=CANARY_PASSWORD, timeout=5)
                with self.assertRaises(cs.CloudStackException) as caught:
                    self.call(client)
                self.assert_tells_nothing(caught.exception)
                transport_of(client).close()

    def test_reprs(self):
        settings = {"headers": {"X-Token": CANARY_TOKEN}}
        for kind in BOTH:
            one = kind("http://cloud.invalid/client/api?token=" + CANARY_TOKEN, CANARY_KEY, CANARY_SECRET, **settings)
            other = kind("http://cloud.invalid/", username="me", password=CANARY_PASSWORD, name="region")
            self.assert_tells_nothing(repr(one), str(one), repr(other), repr(transport_of(one)), repr(one.listZones))
            self.assertIn("http://cloud.invalid/client/api", repr(one))

    def test_requests_are_no_open_book_either(self):
        """A debugger or a log that shows what the protocol yields must not show secrets."""
        seen = []
        client = self.client("http://cloud.invalid/")
        with mock.patch.object(
            cs.CloudStack, "_exchange", lambda self, request: seen.append(repr(request)) or answer({"r": {}})
        ):
            client.listZones()
        self.assert_tells_nothing(*seen)

    def test_errors_name_the_endpoint_without_its_query(self):
        server = self.serve([])
        error = self.fails(self.client(server.url + "?token=" + CANARY_TOKEN + "#" + CANARY_SECRET))
        self.assertIn(server.url, str(error))

    def test_a_user_in_the_endpoint_is_refused_and_not_quoted(self):
        for endpoint in (
            "http://me:{}@127.0.0.1/",
            "http://{}@127.0.0.1/",
            "http://me:{}@127.0.0.1:x/",
            "ftp://me:{}@127.0.0.1/",
        ):
            with self.subTest(endpoint), self.assertRaises(ValueError) as caught:
                self.client(endpoint.format(CANARY_TOKEN)).listZones()
            self.assert_tells_nothing(*all_texts(caught.exception))

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


# === configuration ==================================================================================================

import configparser  # noqa: E402

# Values that may go over the wire where they belong, and may be shown nowhere. Their letters are what tests look for.
KEY, SECRET, PASSWORD, USERDATA = "CANARY-key-6c1", "CANARY-secret-9d4", "CANARY-password-2b8", "CANARY-userdata-5e7"

READ_CONFIG_DEFAULTS = {
    "timeout": 10,
    "method": "get",
    "retry": 0,
    "verify": None,
    "cert": None,
    "cert_key": None,
    "name": None,
    "trace": None,
    "expiration": 600,
    "poll_interval": 2.0,
    "dangerous_no_tls_verify": False,
}
FROM_ENVIRONMENT = (
    "endpoint key secret username password domain method timeout retry retry_backoff job_timeout poll_interval"
    " expiration verify cert cert_key trace dangerous_no_tls_verify theme"
).split()


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
        self.assertEqual(err.count("\n"), 1, err)
        self.assertTrue(err.endswith("\n") and err.strip(), err)

    def assertNoCanary(self, *texts):
        for text in texts:
            self.assertNotIn("CANARY", str(text))


def config(**settings):
    return dict(READ_CONFIG_DEFAULTS, **settings)


def environ(**settings):
    os.environ.update({"CLOUDSTACK_" + name.upper(): value for name, value in settings.items()})


class SourcesTest(Case):
    """Where settings come from, and which source wins."""

    def test_every_setting_is_read_from_the_environment(self):
        values = {name: name + "-value" for name in FROM_ENVIRONMENT}
        environ(**values)
        self.assertEqual(cs.read_config(), config(**values))

    def test_every_setting_is_read_from_an_ini_file(self):
        values = {name: name + "-value" for name in FROM_ENVIRONMENT}
        lines = ["{} = {}".format(*item) for item in values.items()]
        self.write(".cloudstack.ini", "[cloudstack]\n" + "\n".join(lines))
        self.assertEqual(cs.read_config(), config(name="cloudstack", **values))

    def test_the_files_are_read_in_their_order_and_later_ones_win(self):
        text = "[cloudstack]\nretry = {0}\n{1} = {0}\n"
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\nretry = 1\nmethod = 1\ntimeout = 1\n")
        self.write("work/cloudstack.ini", text.format(2, "method"))
        self.assertEqual(
            cs.read_config(), config(name="cloudstack", endpoint="http://e/", retry="2", method="2", timeout="1")
        )
        environ(config=self.write("named.ini", text.format(3, "theme")))
        self.assertEqual(
            cs.read_config(),
            config(name="cloudstack", endpoint="http://e/", retry="3", method="2", timeout="1", theme="3"),
        )

    def test_each_file_alone_is_enough(self):
        for name in ("named.ini", "work/cloudstack.ini", ".cloudstack.ini"):
            with self.subTest(name):
                path = self.write(name, "[cloudstack]\nendpoint = http://e/\n")
                if name == "named.ini":
                    environ(config=path)
                self.assertEqual(cs.read_config(), config(name="cloudstack", endpoint="http://e/"))
                os.environ.pop("CLOUDSTACK_CONFIG", None)
                os.remove(path)

    def test_a_tilde_in_CLOUDSTACK_CONFIG_is_the_home_directory(self):
        self.write("named.ini", "[cloudstack]\nendpoint = http://e/\n")
        environ(config="~/named.ini")
        self.assertEqual(cs.read_config()["endpoint"], "http://e/")

    def test_the_explicit_region_beats_CLOUDSTACK_REGION_beats_cloudstack(self):
        sections = "[{0}]\nendpoint = http://{0}/\n"
        self.write(".cloudstack.ini", "".join(map(sections.format, ("cloudstack", "eu", "us"))))
        self.assertEqual(cs.read_config(), config(endpoint="http://cloudstack/", name="cloudstack"))
        environ(region="eu")
        self.assertEqual(cs.read_config(), config(endpoint="http://eu/", name="eu"))
        self.assertEqual(cs.read_config("us"), config(endpoint="http://us/", name="us"))
        self.assertEqual(cs.read_config(ini_group="us"), config(endpoint="http://us/", name="us"))
        self.assertEqual(cs.read_config_from_ini(), {"endpoint": "http://eu/", "name": "eu"})

    def test_with_an_endpoint_in_the_environment_it_wins_and_files_fill_what_it_leaves_open(self):
        self.write(
            ".cloudstack.ini", "[cloudstack]\nendpoint = http://file/\nkey = k\nsecret = s\ntimeout = 5\nretry = 5\n"
        )
        environ(endpoint="http://env/", timeout="7")
        expected = config(endpoint="http://env/", key="k", secret="s", timeout="7", retry="5", name="cloudstack")
        self.assertEqual(cs.read_config(), expected)

    def test_with_endpoint_key_and_secret_in_the_environment_no_file_is_read(self):
        self.write(".cloudstack.ini", "no ini file")
        self.write("work/cloudstack.ini", b"\xff\xfe")
        environ(endpoint="http://env/", key="k", secret="s", config=os.path.join(self.home, "missing.ini"))
        self.assertEqual(cs.read_config(), config(endpoint="http://env/", key="k", secret="s"))

    def test_an_explicit_region_beats_the_environment(self):
        """5.2.0 ignores it when CLOUDSTACK_ENDPOINT is set."""
        self.write(".cloudstack.ini", "[eu]\nendpoint = http://eu/\nkey = k\nsecret = s\ntimeout = 5\n")
        environ(endpoint="http://env/", key="ek", secret="es", timeout="7", retry="2")
        expected = config(endpoint="http://eu/", key="k", secret="s", timeout="5", retry="2", name="eu")
        self.assertEqual(cs.read_config("eu"), expected)

    def test_CLOUDSTACK_REGION_is_no_explicit_region(self):
        self.write(".cloudstack.ini", "[eu]\nendpoint = http://eu/\nkey = k\nsecret = s\ntimeout = 5\n")
        environ(endpoint="http://env/", region="eu")
        self.assertEqual(cs.read_config(), config(endpoint="http://env/", key="k", secret="s", timeout="5", name="eu"))

    def test_without_an_endpoint_in_the_environment_the_section_wins_and_the_environment_fills(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://file/\ntimeout = 5\n")
        environ(timeout="7", retry="2", key="k", secret="s")
        expected = config(endpoint="http://file/", timeout="5", retry="2", key="k", secret="s", name="cloudstack")
        self.assertEqual(cs.read_config(), expected)

    def test_overrides_name_the_keys_for_which_the_environment_beats_the_section(self):
        self.write(
            ".cloudstack.ini", "[cloudstack]\nendpoint = http://file/\nkey = k\nsecret = s\ntimeout = 5\nretry = 5\n"
        )
        environ(endpoint="http://env/", key="ek", secret="es", timeout="7", retry="8")
        for overrides, changed in (
            ("timeout", {"timeout": "7"}),
            ("timeout,retry", {"timeout": "7", "retry": "8"}),
            (" timeout , RETRY ", {"timeout": "7", "retry": "8"}),
            ("endpoint", {"endpoint": "http://env/"}),
            ("theme", {}),
        ):
            with self.subTest(overrides):
                environ(overrides=overrides)
                expected = config(
                    endpoint="http://file/", key="k", secret="s", timeout="5", retry="5", name="cloudstack"
                )  # fmt: skip
                expected.update(changed)
                self.assertEqual(cs.read_config(), expected)

    def test_overrides_work_with_an_explicit_region(self):
        self.write(".cloudstack.ini", "[eu]\nendpoint = http://eu/\ntimeout = 5\nretry = 5\n")
        environ(timeout="7", retry="8", overrides="timeout")
        self.assertEqual(cs.read_config("eu"), config(endpoint="http://eu/", timeout="7", retry="5", name="eu"))

    def test_headers_come_from_ini_files(self):
        self.write(
            ".cloudstack.ini",
            "[cloudstack]\nendpoint = http://e/\nheader_X-Tenant = a\nheader_x-b = 50 %\nheader_ = n\n",
        )
        self.assertEqual(cs.read_config()["headers"], {"x-tenant": "a", "x-b": "50 %"})

    def test_headers_come_from_the_environment(self):
        """With 5.2.0 they never do."""
        environ(endpoint="http://e/", header_x_tenant="a", header_accept="b")
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", headers={"x-tenant": "a", "accept": "b"}))

    def test_headers_of_the_environment_and_of_a_file_are_merged_one_by_one(self):
        self.write(
            ".cloudstack.ini", "[cloudstack]\nkey = k\nsecret = s\nheader_x-tenant = file\nheader_x-file = file\n"
        )
        environ(endpoint="http://e/", header_x_tenant="env", header_x_env="env")
        self.assertEqual(cs.read_config()["headers"], {"x-tenant": "env", "x-file": "file", "x-env": "env"})

    def test_unknown_keys_are_dropped(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\nsession = x\nfetch_result = 1\nfoo = bar\n")
        environ(foo="bar", session="x", fetch_result="1")
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", name="cloudstack"))
        self.assertEqual(cs.read_config_from_ini(), {"endpoint": "http://e/", "name": "cloudstack"})

    def test_keys_are_read_in_any_case(self):
        self.write(".cloudstack.ini", "[cloudstack]\nEndPoint = http://e/\nTIMEOUT = 3\n")
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", timeout="3", name="cloudstack"))

    def test_a_default_section_counts_within_its_file(self):
        self.write(
            ".cloudstack.ini", "[DEFAULT]\ntimeout = 3\nkey = k\n[cloudstack]\nendpoint = http://e/\nsecret = s\n"
        )
        expected = config(endpoint="http://e/", key="k", secret="s", timeout="3", name="cloudstack")
        self.assertEqual(cs.read_config(), expected)

    def test_a_default_section_counts_in_no_other_file(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\n")
        self.write("work/cloudstack.ini", "[DEFAULT]\ntimeout = 3\nendpoint = http://other/\n")
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", name="cloudstack"))

    def test_percent_signs(self):
        """`%%` and `%(name)s` as configparser has them; any other `%` is literal (5.2.0: a traceback)."""
        for written, read in (
            ("a%b", "a%b"),
            ("%", "%"),
            ("100%", "100%"),
            ("a%%b", "a%b"),
            ("a%%%b", "a%%b"),
            ("%%%%", "%%"),
            ("%s%d%1", "%s%d%1"),
            ("%(endpoint)", "%(endpoint)"),
            ("%(endpoint)d", "%(endpoint)d"),
            ("%()s", "%()s"),
            ("<%(domain)s>", "<x%y>"),
            ("%%(domain)s", "%(domain)s"),
            ("%%%(domain)s", "%x%y"),
            ("%(base)s", "from DEFAULT"),
        ):
            with self.subTest(written):
                text = "[DEFAULT]\nbase = from DEFAULT\n[cloudstack]\nendpoint = http://e/\ndomain = x%y\nsecret = {}\n"
                self.write(".cloudstack.ini", text.format(written))
                self.assertEqual(cs.read_config()["secret"], read)

    def test_a_percent_sign_in_a_continuation_line_or_a_section_name_is_literal_too(self):
        self.write(".cloudstack.ini", "[50% off]\nendpoint = http://e/\ntheme = a\n  [5%] b%\n")
        self.assertEqual(cs.read_config("50% off")["theme"], "a\n[5%] b%")

    def test_a_reference_that_leads_nowhere_is_an_error_that_names_file_section_and_key(self):
        path = self.write(".cloudstack.ini", "[eu]\nendpoint = http://e/\nsecret = {0}%(nope)s{0}\n".format(SECRET))
        for read in (cs.read_config, cs.read_config_from_ini):
            with self.assertRaises(ValueError) as caught:
                read("eu")
            for part in (path, "eu", "secret"):
                self.assertIn(part, str(caught.exception))
            self.assertNotIn("CANARY", "".join(traceback.format_exception(None, caught.exception, None)))

    def test_values_stay_strings(self):
        self.write(
            ".cloudstack.ini",
            "[cloudstack]\nendpoint = http://e/\ntimeout = 5\nretry = 1\nexpiration = -1\nverify = no\n",
        )
        environ(poll_interval="3")
        values = {"timeout": "5", "retry": "1", "expiration": "-1", "verify": "no", "poll_interval": "3"}
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", name="cloudstack", **values))

    def test_the_two_booleans_are_parsed_wherever_they_come_from(self):
        words = {True: "y YES t True on 1".split(), False: "n No f FALSE off 0".split()}
        for name in ("trace", "dangerous_no_tls_verify"):
            for value, word in [(value, word) for value, spelled in words.items() for word in spelled]:
                with self.subTest(name, word=word):
                    self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\n{} = {}\n".format(name, word))
                    self.assertIs(cs.read_config()[name], value)
                    self.assertIs(cs.read_config_from_ini()[name], value)
                    with mock.patch.dict(os.environ, {"CLOUDSTACK_ENDPOINT": "http://e/"}):
                        os.environ["CLOUDSTACK_" + name.upper()] = word
                        self.assertIs(cs.read_config()[name], value)

    def test_what_is_no_boolean_is_handed_on_and_the_constructor_refuses_it(self):
        """With 5.2.0 `dangerous_no_tls_verify = nope` turns TLS verification off."""
        for word in ("nope", "False ; comment", "2", "tru"):
            for name in ("dangerous_no_tls_verify", "trace"):
                with self.subTest(name, word=word):
                    self.write(".cloudstack.ini", "[cloudstack]\nendpoint = https://e/\n{} = {}\n".format(name, word))
                    settings = cs.read_config()
                    self.assertEqual(settings[name], word)
                    for kind in (cs.CloudStack, cs.AIOCloudStack):
                        with self.assertRaisesRegex(ValueError, name):
                            kind(**settings)

    def test_an_empty_value_is_none(self):
        self.write(
            ".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\ntimeout =\nkey =\nverify =\ntheme =\nheader_x =\n"
        )
        environ(retry="", method="", secret="", header_y="")
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", name="cloudstack"))

    def test_an_empty_value_in_a_later_file_leaves_the_earlier_one(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\nkey = k\nsecret = s\n")
        self.write("work/cloudstack.ini", "[cloudstack]\nkey =\nendpoint =\n")
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", key="k", secret="s", name="cloudstack"))

    def test_an_empty_CLOUDSTACK_REGION_CONFIG_or_OVERRIDES_is_none(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\n")
        environ(region="", config="", overrides="")
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", name="cloudstack"))

    def test_an_empty_CLOUDSTACK_KEY_means_unsigned(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://file/\nkey = k\nsecret = s\ntimeout = 4\n")
        for more in ({}, {"secret": "es"}):
            with self.subTest(more):
                environ(endpoint="http://env/", key="", **more)
                settings = cs.read_config()
                self.assertNotIn("key", settings)
                self.assertIsNone(cs.CloudStack(**settings).key)
                self.assertEqual(settings["endpoint"], "http://env/")

    def test_an_empty_CLOUDSTACK_KEY_does_not_beat_a_section_unless_overrides_names_it(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://file/\nkey = k\nsecret = s\n")
        environ(key="")
        self.assertEqual(cs.read_config(), config(endpoint="http://file/", key="k", secret="s", name="cloudstack"))
        environ(overrides="key")
        self.assertEqual(cs.read_config(), config(endpoint="http://file/", name="cloudstack"))

    def test_a_user_name_comes_from_environment_or_file_like_a_key(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\nusername = u\npassword = p\ndomain = /d\n")
        expected = config(endpoint="http://e/", username="u", password="p", domain="/d", name="cloudstack")
        self.assertEqual(cs.read_config(), expected)
        environ(endpoint="http://env/", key="k", secret="s")
        self.assertEqual(cs.read_config(), config(endpoint="http://env/", key="k", secret="s"))

    def test_every_configuration_can_be_given_to_both_clients(self):
        """With 5.2.0 a file that has `theme` cannot."""
        self.write(
            ".cloudstack.ini",
            "[cloudstack]\nendpoint = http://e/\nkey = k\nsecret = s\ntheme = monokai\noutput = table\ntimeout = 0.5\n"
            "method = POST\nretry = 2\nexpiration = -1\njob_timeout = 60\npoll_interval = 5\ntrace = no\n"
            "header_x-y = z\n",
        )
        for kind in (cs.CloudStack, cs.AIOCloudStack):
            client = kind(**cs.read_config())
            self.assertEqual((client.timeout, client.method, client.retry), (0.5, "post", 2))
            self.assertEqual((client.job_timeout, client.poll_interval, client.headers), (60, 5, {"x-y": "z"}))
            self.assertEqual(repr(client), "<CloudStack: cloudstack>")
            self.assertEqual(kind(**dict(cs.read_config(), poll_interval=7)).poll_interval, 7)

    def test_headers_are_overridden_one_by_one_or_together(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\nheader_x-a = file\nheader_x-b = file\n")
        os.environ.update(CLOUDSTACK_HEADER_X_A="env", CLOUDSTACK_HEADER_X_B="env")
        for overrides, expected in (
            ("timeout", {"x-a": "file", "x-b": "file"}),
            ("header_x-a", {"x-a": "env", "x-b": "file"}),
            ("headers", {"x-a": "env", "x-b": "env"}),
        ):
            with self.subTest(overrides):
                os.environ["CLOUDSTACK_OVERRIDES"] = overrides
                self.assertEqual(cs.read_config()["headers"], expected)


class ReadConfigTest(Case):
    """What read_config and read_config_from_ini return and raise."""

    def test_the_defaults_and_no_other_key(self):
        environ(endpoint="http://e/")
        settings = cs.read_config()
        self.assertEqual(settings, config(endpoint="http://e/"))
        self.assertEqual({name: type(value) for name, value in settings.items()}["poll_interval"], float)
        self.assertIs(settings["dangerous_no_tls_verify"], False)

    def test_each_call_returns_a_dict_of_its_own(self):
        environ(endpoint="http://e/", header_x="y")
        cs.read_config().update(timeout=1)
        cs.read_config()["headers"].clear()
        self.assertEqual(cs.read_config(), config(endpoint="http://e/", headers={"x": "y"}))

    def test_no_file_and_no_endpoint_is_SystemExit(self):
        for more in ({}, {"key": "k", "secret": "s"}):
            environ(**more)
            with self.assertRaises(SystemExit) as caught:
                cs.read_config()
            tried = [os.path.join(self.home, ".cloudstack.ini"), os.path.join(os.getcwd(), "cloudstack.ini")]
            self.assertEqual(str(caught.exception), "Config file not found. Tried " + ", ".join(tried))

    def test_a_region_where_there_is_no_file_is_SystemExit_too(self):
        self.assertRaisesRegex(SystemExit, "Config file not found. Tried ", cs.read_config, "eu")

    def test_no_endpoint_is_ValueError(self):
        self.write(".cloudstack.ini", "[cloudstack]\nkey = k\n[eu]\nsecret = s\n")
        for region in (None, "eu"):
            with self.assertRaises(ValueError) as caught:
                cs.read_config(region)
            self.assertEqual(str(caught.exception), "the configuration is missing the following keys: endpoint")

    def test_an_unknown_CLOUDSTACK_REGION_is_ValueError_that_names_it(self):
        path = self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\n")
        environ(region="mars")
        with self.assertRaises(ValueError) as caught:
            cs.read_config()
        self.assertIn("the configuration is missing the following keys: endpoint", str(caught.exception))
        self.assertIn("mars", str(caught.exception))
        self.assertIn(path, str(caught.exception))

    def test_an_unknown_explicit_region_is_NoSectionError(self):
        self.write(".cloudstack.ini", "[DEFAULT]\ntimeout = 1\n[cloudstack]\nendpoint = http://e/\n")
        for region in ("mars", "DEFAULT", "Cloudstack"):
            for more in ({}, {"endpoint": "http://env/", "key": "k", "secret": "s"}):
                with self.subTest(region, more=more):
                    environ(**more)
                    with self.assertRaises(configparser.NoSectionError) as caught:
                        cs.read_config(region)
                    self.assertEqual(caught.exception.section, region)

    def test_an_unknown_explicit_region_with_the_endpoint_in_the_environment_and_no_file(self):
        environ(endpoint="http://env/", key="k", secret="s")
        self.assertRaises(configparser.NoSectionError, cs.read_config, "mars")

    def test_read_config_from_ini_gives_what_the_section_holds(self):
        self.write(
            ".cloudstack.ini",
            "[eu]\nendpoint = http://e/\ntimeout = 5\ntrace = yes\nheader_x-y = z\ntheme = t\nfoo = 1\n",
        )
        environ(endpoint="http://env/", key="k", timeout="3", header_a="b")
        expected = {
            "endpoint": "http://e/",
            "timeout": "5",
            "trace": True,
            "theme": "t",
            "name": "eu",
            "headers": {"x-y": "z"},
        }
        self.assertEqual(cs.read_config_from_ini("eu"), expected)
        self.assertEqual(cs.read_config_from_ini(ini_group="eu"), expected)

    def test_read_config_from_ini_without_the_section(self):
        self.assertEqual(cs.read_config_from_ini(), {"name": None})
        self.write(".cloudstack.ini", "[eu]\nendpoint = http://e/\n")
        self.assertEqual(cs.read_config_from_ini(), {"name": None})
        self.assertEqual(cs.read_config_from_ini("mars"), {"name": None})


class RegionOfTheDefaultNameTest(Case):
    """Ansible's modules up to 2.9 always ask for the region `cloudstack`, with everything in the environment."""

    def both(self):
        """What read_config gives for the region, after checking that it gives that for none, too."""
        found = cs.read_config("cloudstack")
        self.assertEqual(cs.read_config(), found)
        return found

    def test_everything_in_the_environment(self):
        with mock.patch.dict(os.environ, CLOUDSTACK_ENDPOINT="http://e/", CLOUDSTACK_KEY="k", CLOUDSTACK_SECRET="s"):
            self.assertEqual(self.both()["endpoint"], "http://e/")
            self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://file/\nkey = fk\nsecret = fs\n")
            self.assertEqual((self.both()["endpoint"], self.both()["key"]), ("http://e/", "k"))

    def test_no_section_of_that_name(self):
        self.write(".cloudstack.ini", "[other]\nendpoint = http://file/\n")
        with mock.patch.dict(os.environ, CLOUDSTACK_ENDPOINT="http://e/"):
            self.assertEqual(self.both()["endpoint"], "http://e/")
        with self.assertRaisesRegex(ValueError, "missing"):
            cs.read_config("cloudstack")

    def test_it_names_its_own_section_whatever_the_environment_s_region(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://a/\n[other]\nendpoint = http://b/\n")
        with mock.patch.dict(os.environ, CLOUDSTACK_REGION="other"):
            self.assertEqual(cs.read_config("cloudstack")["endpoint"], "http://a/")
            self.assertEqual(cs.read_config()["endpoint"], "http://b/")

    def test_the_command_line_s_region(self):
        with mock.patch.dict(os.environ, CLOUDSTACK_ENDPOINT="http://e/", CLOUDSTACK_KEY="k", CLOUDSTACK_SECRET="s"):
            code, out, err = self.main("--region", "cloudstack", "listZones", "--dry-run")
        self.assertEqual((code, out.splitlines()[0], err), (0, "GET http://e/", ""))


class BadFilesTest(Case):
    """Files that cannot be used: one clear ValueError that names the file, and never a secret of it."""

    def refused(self, path, *parts):
        """The text of the ValueError that both functions raise."""
        for read in (cs.read_config_from_ini, cs.read_config):
            with self.assertRaises(ValueError) as caught:
                read()
            text = str(caught.exception)
            for part in (path,) + parts:
                self.assertIn(part, text)
            self.assertNotIn("\n", text)
            shown = traceback.format_exception(type(caught.exception), caught.exception, None)
            self.assertNotIn("CANARY", "".join(shown))
        return text

    def test_files_that_are_no_ini_files(self):
        good = "[cloudstack]\nendpoint = http://e/\nkey = {}\nsecret = {}\n".format(KEY, SECRET)
        for name, text, part in (
            ("no section header", "secret = " + SECRET, "line 1"),
            ("a section header late", "\n\n" + good.partition("\n")[2], "line 3"),
            ("a line without =", good + SECRET + "\n", "line 5"),
            ("a section without its end", "[cloudstack\nsecret = {}\n".format(SECRET), "line 1"),
            ("a key twice", good + "Secret = " + SECRET, "secret"),
            ("a section twice", good + good, "cloudstack"),
            ("JSON", '{"secret": "%s"}' % SECRET, "line 1"),
            ("a line that is only =", good + "= {}\n".format(SECRET), "line 5"),
        ):
            for where in (".cloudstack.ini", "work/cloudstack.ini", "named.ini"):
                with self.subTest(name, where=where):
                    path = self.write(where, text)
                    if where == "named.ini":
                        environ(config=path)
                    self.refused(path, part)
                    os.environ.pop("CLOUDSTACK_CONFIG", None)
                    os.remove(path)

    def test_a_file_that_is_not_UTF_8(self):
        for content in (b"[cloudstack]\nsecret = CANARY\xff\n", "[cloudstack]\nendpoint = http://e/".encode("utf-16")):
            path = self.write(".cloudstack.ini", content)
            self.refused(path, "UTF-8")

    def test_a_directory_in_place_of_a_file(self):
        for name in (".cloudstack.ini", "work/cloudstack.ini", "named.ini"):
            with self.subTest(name):
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
        missing = os.path.join(self.home, "missing.ini")
        environ(config=missing)
        self.assertRaisesRegex(SystemExit, "Config file not found. Tried .*missing.ini", cs.read_config)
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://e/\n")
        self.assertRaisesRegex(SystemExit, "Config file not found. Tried .*missing.ini", cs.read_config)
        environ(config=os.path.join(self.write("file", ""), "x.ini"))
        self.assertRaisesRegex(SystemExit, "Config file not found. Tried .*x.ini", cs.read_config)

    def test_a_CLOUDSTACK_CONFIG_that_can_be_no_path(self):
        environ(config="x" * 5000)
        self.assertRaisesRegex(ValueError, "cannot read", cs.read_config)

    def test_a_byte_order_mark_and_foreign_line_ends_are_no_matter(self):
        for content in (
            b"\xef\xbb\xbf[cloudstack]\nendpoint = http://e/\n",
            b"[cloudstack]\r\nendpoint = http://e/\r\n",
        ):
            self.write(".cloudstack.ini", content)
            self.assertEqual(cs.read_config(), config(endpoint="http://e/", name="cloudstack"))

    def test_text_that_is_not_ASCII_is_read_as_UTF_8_whatever_the_locale(self):
        self.write(".cloudstack.ini", "[z\u00fcrich]\nendpoint = http://e/\npassword = \u00fc\u20ac\U0001f511\n")
        with mock.patch("locale.getpreferredencoding", lambda *args: "ascii"):
            settings = cs.read_config("z\u00fcrich")
        self.assertEqual((settings["name"], settings["password"]), ("z\u00fcrich", "\u00fc\u20ac\U0001f511"))

    def test_an_empty_file_is_a_file_without_sections(self):
        path = self.write(".cloudstack.ini", "")
        with self.assertRaises(ValueError) as caught:
            cs.read_config()
        self.assertIn(path, str(caught.exception))
        self.assertEqual(cs.read_config_from_ini(), {"name": None})

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
            self.write(".cloudstack.ini", text)
            try:
                outcomes[type(cs.read_config())] += 1
            except (ValueError, configparser.NoSectionError) as error:
                outcomes[type(error)] += 1
                self.assertNotIn("CANARY", str(error), text)
        self.assertEqual(set(outcomes), {dict, ValueError})

    def test_a_secret_on_an_indented_line_is_not_quoted(self):
        """An indented line goes on with the value above it; what it holds must not be quoted with that."""
        for key in ("timeout", "method", "retry", "endpoint", "verify", "poll_interval", "trace"):
            with self.subTest(key):
                lines = ["[cloudstack]", "endpoint = http://127.0.0.1:9/api", "key = k", key + " = 1"]
                lines.append("  secret = CANARY")
                if key == "endpoint":
                    del lines[1]
                self.write(".cloudstack.ini", "\n".join(lines) + "\n")
                code, out, err = self.main("listZones")
                self.assertEqual((code, out, err.count("\n")), (2, "", 1), err)
                self.assertIn(key, err)
                self.assertNotIn("CANARY", err)


class FilesTogetherTest(ServerCase):
    """Endpoint, credentials, TLS settings and headers belong together: never from two files."""

    def setUp(self):
        super().setUp()
        good = "[cloudstack]\nendpoint = {}\nkey = {}\nsecret = {}\n".format(ENDPOINT, KEY, SECRET)
        self.own = self.write(".cloudstack.ini", good)

    def assertRefused(self, *paths):
        for read in (cs.read_config, cs.read_config_from_ini):
            with self.assertRaises(ValueError) as caught:
                read()
            for path in paths:
                self.assertIn(path, str(caught.exception))
            self.assertNotIn("CANARY", str(caught.exception))

    def test_each_of_them_is_refused_from_a_second_file(self):
        for line in (
            "endpoint = http://other/",
            "key = k",
            "secret = s",
            "username = u",
            "password = p",
            "verify = /ca",
            "cert = /c",
            "cert_key = /k",
            "dangerous_no_tls_verify = true",
            "header_x-tenant = t",
        ):
            for name in ("work/cloudstack.ini", "named.ini"):
                with self.subTest(line, name=name):
                    path = self.write(name, "[cloudstack]\n{}\n".format(line))
                    if name == "named.ini":
                        environ(config=path)
                    self.assertRefused(self.own, path)
                    os.environ.pop("CLOUDSTACK_CONFIG", None)
                    os.remove(path)

    def test_a_whole_set_from_a_second_file_does_not_combine_with_leftovers_of_the_first(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://a/\nkey = k\nsecret = s\ncert = /c\n")
        path = self.write("work/cloudstack.ini", "[cloudstack]\nendpoint = http://b/\nkey = k2\nsecret = s2\n")
        self.assertRefused(self.own, path)

    def test_a_second_file_may_be_complete_by_itself(self):
        self.write("work/cloudstack.ini", "[cloudstack]\nendpoint = http://b/\nkey = k2\nsecret = s2\n")
        self.assertEqual(cs.read_config(), config(endpoint="http://b/", key="k2", secret="s2", name="cloudstack"))

    def test_a_later_file_may_set_other_things(self):
        self.write(
            "work/cloudstack.ini", "[cloudstack]\ntimeout = 3\nretry = 2\nmethod = post\ntheme = t\ntrace = on\n"
        )
        more = {"timeout": "3", "retry": "2", "method": "post", "theme": "t", "trace": True}
        self.assertEqual(cs.read_config(), config(endpoint=ENDPOINT, key=KEY, secret=SECRET, name="cloudstack", **more))

    def test_a_default_section_counts_as_its_own_file(self):
        path = self.write("work/cloudstack.ini", "[DEFAULT]\nendpoint = http://other/\n[cloudstack]\ntimeout = 3\n")
        self.assertRefused(self.own, path)

    def test_the_sections_of_other_regions_do_not_matter(self):
        self.write("work/cloudstack.ini", "[eu]\nendpoint = http://other/\n")
        self.assertEqual(cs.read_config()["endpoint"], ENDPOINT)

    def test_one_file_by_two_names_is_one_file(self):
        environ(config=self.own)
        self.assertEqual(cs.read_config()["key"], KEY)
        os.chdir(self.home)
        os.symlink(self.own, os.path.join(self.home, "cloudstack.ini"))
        os.environ.pop("CLOUDSTACK_CONFIG")
        self.assertEqual(cs.read_config()["key"], KEY)

    def test_the_environment_combines_with_any_file(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = http://a/\nverify = /ca\n")
        environ(key="k", secret="s", header_x="y", cert="/c")
        expected = config(
            endpoint="http://a/", verify="/ca", key="k", secret="s", cert="/c", headers={"x": "y"}, name="cloudstack"
        )
        self.assertEqual(cs.read_config(), expected)

    def test_what_the_environment_replaces_is_no_conflict(self):
        self.write("work/cloudstack.ini", "[cloudstack]\nendpoint = http://other/\n")
        environ(endpoint="http://env/")
        self.assertEqual(cs.read_config()["endpoint"], "http://env/")
        self.assertEqual(cs.read_config()["key"], KEY)

    def test_a_hostile_file_in_the_working_directory_receives_nothing(self):
        """5.2.0 sends it the key, and a signed request, of ~/.cloudstack.ini."""
        here = os.path.join(os.getcwd(), "cloudstack.ini")
        for text in (
            "[cloudstack]\nendpoint = {}\n",
            "[cloudstack]\nendpoint = {}\nkey =\nsecret =\n",
            "[DEFAULT]\nendpoint = {}\n[cloudstack]\n",
            "[cloudstack]\nendpoint = {}?%(key)s%(secret)s\n",
            "[cloudstack]\nendpoint = {}\nmethod = post\nkey = attacker\n",
        ):
            with self.subTest(text):
                self.write("work/cloudstack.ini", text.format(self.server.endpoint))
                with self.assertRaises(ValueError) as caught:
                    cs.CloudStack(**cs.read_config()).listZones()
                self.assertNoCanary(caught.exception)
                code, out, err = self.main("listZones")
                self.assertEqual((code, out), (2, ""))
                self.assertOneLine(err)
                self.assertIn(here, err)
                self.assertNoCanary(err)
                self.assertEqual(self.server.requests, [])


# === command line ===================================================================================================


def job_pending(record=None):
    return {"queryasyncjobresultresponse": {"jobid": "job-1", "jobstatus": 0, "jobprocstatus": 0}}


def job_done(result, status=1):
    return {"queryasyncjobresultresponse": {"jobid": "job-1", "jobstatus": status, "jobresult": result}}


def refusal(code, text):
    return {"errorresponse": {"uuidList": [], "errorcode": code, "cserrorcode": 9999, "errortext": text}}


def forever(record):
    """Give no answer while the test runs."""
    test_is_over.wait(PATIENCE_OF_TESTS)
    return {}


ZONES_ANSWER = {"listzonesresponse": {"count": 1, "zone": [{"name": "z\u00fcrich", "id": "1"}]}}
ZONES_TEXT = '{\n  "count": 1,\n  "zone": [\n    {\n      "id": "1",\n      "name": "z\u00fcrich"\n    }\n  ]\n}\n'


class CommandLineCase(ServerCase):
    """A command line whose environment names the server, with a key."""

    def setUp(self):
        super().setUp()
        environ(endpoint=self.server.endpoint, key=KEY, secret=SECRET, poll_interval="0.01", timeout="5")
        self.replies(listZones=ZONES_ANSWER, **{"*": {"anyresponse": {"ok": True}}})

    def unset(self, *names):
        for name in names:
            os.environ.pop("CLOUDSTACK_" + name.upper(), None)

    def asked_with(self, *args):
        """The parameters of the one request that a command line makes, without those that every request has."""
        self.server.requests.clear()
        code, out, err = self.main(*args)
        self.assertEqual((code, err, len(self.server.requests)), (0, "", 1), out)
        own = ("command", "response", "apiKey", "signature", "signatureVersion", "expires", "customjobid")
        return {name: value for name, value in self.server.requests[0].params.items() if name not in own}

    def assertTold(self, err, line):
        """Standard error begins with this line; lines with more on the same matter are indented."""
        lines = err.splitlines()
        self.assertEqual(lines[0], line)
        self.assertEqual([more for more in lines[1:] if not more.startswith("  ")], [])

    def assertUsage(self, *args, **checks):
        """A command line that is refused with exit code 2 and one line, before anything is sent."""
        self.server.requests.clear()
        code, out, err = self.main(*args)
        self.assertEqual((code, out), (2, ""))
        self.assertOneLine(err)
        self.assertEqual(self.server.requests, [])
        for part in checks.get("says", ()):
            self.assertIn(part, err)
        return err


class ArgumentsTest(CommandLineCase):
    """cs [options] COMMAND [name=value ...]"""

    def test_options_stand_anywhere_and_can_be_combined(self):
        """5.2.0 refuses `cs listZones -q name=x`."""
        self.write("work/cloudstack.ini", "[eu]\nendpoint = {}\nkey = k\nsecret = s\n".format(self.server.endpoint))
        for args in (
            "-q -t -r eu listZones name=x",
            "listZones name=x -q -t -r eu",
            "listZones -q name=x -t --region eu",
            "-qt listZones -reu name=x",
            "listZones -tqr eu name=x",
            "-qtreu listZones name=x",
            "--region=eu --quiet listZones --trace name=x",
            "--region eu listZones name=x --trace -q",
        ):
            with self.subTest(args):
                self.server.requests.clear()
                code, out, err = self.main(*args.split())
                self.assertEqual((code, out), (0, ZONES_TEXT))
                self.assertIn("GET http://", err)
                (record,) = self.server.requests
                self.assertEqual((record.params["apiKey"], record.params["name"]), ("k", "x"))

    def test_a_double_dash_is_no_argument(self):
        self.assertEqual(self.asked_with("listZones", "--", "name=x"), {"name": "x"})

    def test_unknown_options_are_refused(self):
        for option in ("--nope", "--nope=1", "-x", "-qx", "-1", "--Trace", "-T", "-name=x", "--region-x", "---", "-"):
            for args in ((option, "listZones"), ("listZones", "name=x", option)):
                with self.subTest(args):
                    self.assertUsage(*args, says=["option", option.partition("=")[0][-1]])

    def test_abbreviations_are_refused(self):
        """An option that is added tomorrow would change what they mean."""
        for option in (
            "--regio",
            "--reg=eu",
            "--po",
            "--asyn",
            "--qui",
            "--trac",
            "--vers",
            "--hel",
            "--them=x",
            "--dry",
            "--wai=1",
        ):
            with self.subTest(option):
                self.assertUsage(option, "listZones", says=["there is no option", option.partition("=")[0]])

    def test_options_and_their_values(self):
        for args in (["-r"], ["--region"], ["--theme"], ["--wait"], ["--quiet=1"], ["--post=yes"]):
            with self.subTest(args):
                self.assertUsage("listZones", *args, says=[args[0].partition("=")[0]])

    def test_a_value_may_look_like_an_option(self):
        self.assertEqual(self.asked_with("listZones", "name=-q", "keyword=--nope"), {"name": "-q", "keyword": "--nope"})

    def test_no_command(self):
        for args in ([], ["-q"], ["--post"]):
            self.assertUsage(*args, says=["no command"])

    def test_a_command_that_can_be_none(self):
        for command in ("", " ", "name=x", "list\x01Zones", "list\udcff"):
            with self.subTest(command):
                self.assertUsage(command)

    def test_an_argument_without_equals_sign(self):
        for word in ("x", "listHosts", "@file", '"x"'):
            self.assertUsage("listZones", word, says=["{!r} is not a correctly formatted option".format(word)])
        self.assertUsage("listZones", "=x", says=["is not a correctly formatted option"])

    def test_values(self):
        for given, sent in (
            ("name=x", {"name": "x"}),
            ("name=", {"name": ""}),
            ('name=""', {"name": ""}),
            ("name=a=b", {"name": "a=b"}),
            ("name=a b", {"name": "a b"}),
            ("name=  x \t", {"name": "x"}),
            (" name = x ", {"name": "x"}),
            ('name="x"', {"name": "x"}),
            ("name='x'", {"name": "x"}),
            ("name= 'x' ", {"name": "x"}),
            ("name=' x '", {"name": " x "}),
            ("name=\"'x'\"", {"name": "'x'"}),
            ('name=""x""', {"name": '"x"'}),
            ("name='x\"", {"name": "'x\""}),
            ("name='", {"name": "'"}),
            ('name=x"', {"name": 'x"'}),
            ("name=a,b", {"name": "a,b"}),
            ("name=~+*%20&x", {"name": "~+*%20&x"}),
            ("name=z\u00fcrich \u20ac \U0001f511", {"name": "z\u00fcrich \u20ac \U0001f511"}),
            ("name=True", {"name": "True"}),
            ("listall=true", {"listall": "true"}),
            ("tags[0].key=a b", {"tags[0].key": "a b"}),
            ("details[0].cpuNumber=2", {"details[0].cpuNumber": "2"}),
            ("timeout=5", {"timeout": "5"}),
            ("method=post", {"method": "post"}),
            ("name=@@x", {"name": "@x"}),
            ("name=@@", {"name": "@"}),
            ("name=@@@x", {"name": "@@x"}),
            ("name='@x'", {"name": "@x"}),
            ("name=a@b", {"name": "a@b"}),
        ):
            with self.subTest(given):
                self.assertEqual(self.asked_with("listZones", given), sent)

    def test_repeated_names_are_joined_in_the_order_given(self):
        """5.2.0 sorts and de-duplicates them, although the order of networkids matters."""
        args = (
            "deployVirtualMachine",
            "networkids=c",
            "zoneid=1",
            "networkids=a",
            "networkids=c",
            "networkids= b ",
            "--async",
        )
        self.assertEqual(self.asked_with(*args), {"networkids": "c,a,c,b", "zoneid": "1"})
        self.assertEqual(self.asked_with("listZones", "a[0].b=1", "a[1].b=2"), {"a[0].b": "1", "a[1].b": "2"})

    def test_a_value_from_a_file(self):
        for content, sent in (
            ("x", "x"),
            ("x\n", "x"),
            ("x\n\n", "x\n"),
            ("  'x' \n", "  'x' "),
            ("@@x\n", "@@x"),
            ("a\nb\n", "a\nb"),
            ("z\u00fcrich\n", "z\u00fcrich"),
            ("", ""),
        ):
            with self.subTest(content):
                path = self.write("value", content)
                self.assertEqual(self.asked_with("listZones", "name=@" + path), {"name": sent})
        self.write("work/here", "here")
        self.assertEqual(self.asked_with("listZones", "name=@here", "id= @~/value "), {"name": "here", "id": ""})

    def test_a_value_from_standard_input(self):
        for content, sent in (("a\nb\n", "a\nb"), ("z\u00fc\n\n", "z\u00fc\n"), ("", "")):
            stdin = io.TextIOWrapper(io.BytesIO(content.encode("utf-8")), encoding="ascii")
            with mock.patch("sys.stdin", stdin):
                self.assertEqual(self.asked_with("listZones", "name=@-"), {"name": sent})

    def test_a_file_that_cannot_be_a_value(self):
        binary = self.write("binary", b"\xff\x00")
        for value, says in (
            ("@missing", "missing"),
            ("@" + binary, "UTF-8"),
            ("@" + self.home, "directory"),
            ("@", "@"),
        ):
            with self.subTest(value):
                self.assertUsage("listZones", "name=" + value, says=["name", says])
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"))):
            self.assertUsage("listZones", "name=@-", says=["name", "standard input"])
        with mock.patch("sys.stdin", None):
            self.assertUsage("listZones", "name=@-", says=["name", "standard input"])

    def test_headers_is_no_parameter(self):
        for word in ("headers=x", "headers=", "headers=x:y"):
            self.assertUsage("listZones", word, says=["headers"])

    def test_names_that_python_would_trip_over(self):
        for word in ("self=x", "command=x"):
            self.assertUsage("listZones", word, says=[word.partition("=")[0]])
        for name in ("cls", "params", "call", "client", "kwargs", "class", "session", "endpoint", "_x", "a b", "jobid"):
            self.assertEqual(self.asked_with("listZones", name + "=x"), {name: "x"})

    def test_control_arguments_are_not_sent(self):
        args = ("json=true", "fetch_list=no", "fetch_result=off", "opcode_name=command")
        self.assertEqual(self.asked_with("listZones", *args), {})

    def test_a_control_argument_that_is_no_boolean(self):
        for name in ("json", "fetch_list", "fetch_result"):
            for value in ("maybe", "", "2"):
                self.assertUsage("listZones", "{}={}".format(name, value), says=[name])

    def test_fetch_list(self):
        def page(record):
            first = 500 * (int(record.params["page"]) - 1)
            return {"r": {"count": 700, "zone": list(range(first, min(700, first + 500)))}}

        self.replies(listZones=page)
        for word in ("true", "YES", "on", "1", "t"):
            code, out, err = self.main("listZones", "fetch_list=" + word)
            self.assertEqual((code, json.loads(out), err), (0, list(range(700)), ""))

    def test_fetch_list_false_does_not_page(self):
        """With 5.2.0 `fetch_list=false` turns paging on."""
        for word in ("false", "No", "off", "0"):
            self.server.requests.clear()
            code, out, err = self.main("listZones", "fetch_list=" + word)
            self.assertEqual((code, out, err), (0, ZONES_TEXT, ""))
            (record,) = self.server.requests
            self.assertNotIn("page", record.params)

    def test_json_false_prints_text_as_it_is(self):
        text = "<zones>\n  <zone>z\u00fcrich</zone>\u001b[1m\n</zones>"
        self.replies(listZones=(200, text))
        self.assertEqual(self.main("listZones", "json=false"), (0, text + "\n", ""))
        self.assertNotIn("response", self.server.requests[0].params)

    def test_opcode_name(self):
        code, out, err = self.main("listZones", "opcode_name=cmd", "name=x")
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(self.server.requests[0].params["cmd"], "listZones")
        self.assertNotIn("command", self.server.requests[0].params)

    def test_a_value_the_server_would_refuse(self):
        for value in ("a\x00b", "a\x1bb", "\x7f", "a\udcffb"):
            with self.subTest(ascii(value)):
                self.assertUsage("listZones", "keyword=" + value, says=["keyword"])
        self.assertUsage("listZones", "a\x1bb=x", says=["U+001B"])

    def test_post(self):
        self.main("listZones", "name=x")
        self.main("listZones", "name=x", "--post")
        self.main("--post", "listZones", "name=x")
        self.assertEqual([record.method for record in self.server.requests], ["GET", "POST", "POST"])
        self.assertEqual(self.server.requests[1].query, "")
        self.assertEqual(self.server.requests[1].params["name"], "x")

    def test_flags_beat_environment_and_files(self):
        self.write(
            "work/cloudstack.ini", "[eu]\nendpoint = {}\nmethod = get\ntrace = false\n".format(self.server.endpoint)
        )
        environ(method="get", trace="no", region="cloudstack", overrides="method,trace")
        code, out, err = self.main("--post", "-t", "-r", "eu", "listZones")
        self.assertEqual(code, 0)
        self.assertTrue(err.startswith("POST http://"), err)

    def test_the_method_of_the_configuration_is_used(self):
        environ(method="POST")
        self.main("listZones")
        self.assertEqual(self.server.requests[0].method, "POST")

    def test_a_region(self):
        """5.2.0 ignores --region when CLOUDSTACK_ENDPOINT is set."""
        text = "[eu]\nendpoint = {}\nkey = eu-key\nsecret = s\nheader_x-tenant = t\n".format(self.server.endpoint)
        self.write("work/cloudstack.ini", text)
        environ(endpoint=ENDPOINT)
        code, out, err = self.main("-r", "eu", "listZones")
        self.assertEqual((code, out), (0, ZONES_TEXT))
        self.assertEqual(self.server.requests[0].params["apiKey"], "eu-key")
        self.assertEqual(self.server.requests[0].headers["x-tenant"], "t")

    def test_an_unknown_region(self):
        for text, there in (("", ""), ("[eu]\nendpoint = http://e/\n", "; there are eu")):
            self.write("work/cloudstack.ini", text)
            told = "Error: region 'x' not in config{}\n".format(there)
            self.assertEqual(self.assertUsage("-r", "x", "listZones"), told)
            self.unset("endpoint", "key", "secret")
            self.assertEqual(self.assertUsage("-q", "listZones", "--region", "x"), told)

    def test_version(self):
        for args in (["--version"], ["listZones", "--version"], ["-q", "--version"]):
            code, out, err = self.main(*args)
            self.assertEqual((code, err), (0, ""))
            self.assertEqual(out, "cs {}\n".format(cs.__version__))
        self.assertEqual(self.server.requests, [])

    def test_help_names_every_option(self):
        self.unset("endpoint")
        for args in (["--help"], ["-h"], ["-q", "--help"]):
            code, out, err = self.main(*args)
            self.assertEqual((code, err), (0, ""))
            for option in "-r --region --theme --post --async --wait -q --quiet -t --trace --dry-run --version".split():
                self.assertRegex(out, r"(?<![\w-]){}(?![\w-])".format(re.escape(option)))
            self.assertIn("cs [options] COMMAND [name=value ...]", out)
        self.assertEqual(self.server.requests, [])

    def test_main_without_arguments_reads_sys_argv(self):
        with mock.patch("sys.argv", ["/usr/bin/cs", "--version"]):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                self.assertEqual(cs.main(), 0)
        self.assertEqual(out.getvalue(), "cs {}\n".format(cs.__version__))

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
        self.assertEqual(set(codes) - {0, 1, 2}, set())
        self.assertGreater(codes[0], 2)


class OutputTest(CommandLineCase):
    """What is printed where, and the exit code."""

    def test_json_with_indent_2_and_sorted_keys_and_text_as_it_is(self):
        """5.2.0 prints \\u00fc for what is no ASCII."""
        self.assertEqual(self.main("listZones"), (0, ZONES_TEXT, ""))

    def test_an_empty_answer_prints_nothing(self):
        for reply, args in (
            ({"listzonesresponse": {}}, ()),
            ({"listzonesresponse": []}, ()),
            ({"listzonesresponse": None}, ()),
            ({"listzonesresponse": {}}, ("fetch_list=true",)),
            ((200, ""), ("json=false",)),
        ):
            with self.subTest(reply=reply, args=args):
                self.replies(listZones=reply)
                self.assertEqual(self.main("listZones", *args), (0, "", ""))

    def test_an_answer_that_is_no_object_is_still_json(self):
        for value in (0, False, True, 1.5, "text", [1]):
            with self.subTest(value=value):
                self.replies(listZones={"listzonesresponse": value})
                code, out, err = self.main("listZones")
                self.assertEqual((code, json.loads(out), err), (0, value, ""))

    def test_lone_surrogates_and_control_characters_are_valid_json_and_harm_no_terminal(self):
        text = "a\ud800\x1b[2J\x7f\x9b\u202e\u2066\u2028\tb\nc"
        self.replies(listZones={"r": {"name": text}})
        code, out, err = self.main("listZones")
        self.assertEqual((code, json.loads(out), err), (0, {"name": text}, ""))
        self.assertEqual(re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066\u2028\ud800]", out), [])
        out.encode("utf-8")

    def test_raw_control_characters_in_an_answer(self):
        self.replies(listZones='{"r": {"name": "a\x1bb\x01"}}')
        code, out, err = self.main("listZones")
        self.assertEqual((code, json.loads(out), err), (0, {"name": "a\x1bb\x01"}, ""))

    def test_an_ascii_standard_output(self):
        result = self.cs("listZones", env={"PYTHONIOENCODING": "ascii"})
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(json.loads(result.raw.decode("ascii")), ZONES_ANSWER["listzonesresponse"])
        self.replies(listZones=(200, "z\u00fcrich \u20ac"))
        for encoding, text in (("ascii", b"z\\xfcrich \\u20ac\n"), ("latin-1", b"z\xfcrich \\u20ac\n")):
            raw = io.BytesIO()
            with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding=encoding, newline="\n")):
                self.assertEqual(cs.main(["listZones", "json=false"]), 0)
                self.assertEqual(raw.getvalue(), text)

    def test_an_api_error(self):
        document = refusal(431, "Unable to find zone \u20ac")
        self.replies(listZones=(431, document))
        printed = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        code, out, err = self.main("listZones")
        self.assertEqual((code, out), (1, printed))
        self.assertTold(err, "CloudStack error: HTTP 431 response from CloudStack: Unable to find zone \u20ac")
        self.assertEqual(self.main("listZones", "-q"), (1, printed, ""))

    def test_escape_sequences_in_an_error_are_shown_escaped(self):
        self.replies(listZones=(431, refusal(431, "a\x1b[2Jb\x9bc\u202ed\x07")))
        code, out, err = self.main("listZones")
        self.assertEqual(code, 1)
        self.assertIn("a\\x1b[2Jb\\x9bc\\u202ed\\x07", err)
        self.replies(listZones=(503, "<html>\x1b]0;title\x07</html>"))
        code, out, err = self.main("listZones")
        self.assertIn("<html>\\x1b]0;title\\x07</html>", err)

    def test_an_answer_that_is_no_json_is_shown_on_standard_error(self):
        page = "<html><body>login</body></html>"
        for status in (200, 403, 502):
            with self.subTest(status):
                self.replies(listZones=(status, page))
                code, out, err = self.main("listZones")
                self.assertEqual((code, out), (1, ""))
                self.assertIn("CloudStack error: ", err)
                self.assertIn(page, err)
                self.assertEqual(self.main("listZones", "--quiet"), (1, "", ""))

    def test_a_long_page_is_shown_from_its_beginning_only(self):
        self.replies(listZones=(502, "<html>" + "x" * 100000))
        code, out, err = self.main("listZones")
        self.assertIn("<html>xxxx", err)
        self.assertLess(len(err), 5000)

    def test_json_that_is_no_answer_of_cloudstack_is_shown_on_standard_error(self):
        self.replies(listZones={"a": 1, "b": 2})
        code, out, err = self.main("listZones")
        self.assertEqual((code, out), (1, ""))
        self.assertIn('{"a": 1, "b": 2}', err)
        self.assertIn("CloudStack error: Unexpected response from CloudStack", err)

    def test_broken_json(self):
        self.replies(listZones='{"r": ')
        code, out, err = self.main("listZones")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("Malformed JSON document", err)

    def test_deeply_nested_answers(self):
        for depth in (300, 960, 980, 100000):
            for status in (200, 431):
                with self.subTest(depth=depth, status=status):
                    self.replies(listZones=(status, '{"r": ' + "[" * depth + "]" * depth + "}"))
                    code, out, err = self.main("listZones")
                    self.assertIn(code, (0, 1))
                    self.assertNotIn("Traceback", err)

    def test_a_redirect_is_an_error_that_names_the_new_address_without_its_query(self):
        self.replies(listZones=(302, "https://other.example/login?token=" + PASSWORD))
        code, out, err = self.main("listZones")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("https://other.example/login", err)
        self.assertNoCanary(err)
        self.assertEqual(len(self.server.requests), 1)

    def test_a_success_that_holds_an_errortext_is_an_error(self):
        self.replies(listZones={"r": {"errorcode": 530, "errortext": "broken"}})
        code, out, err = self.main("listZones")
        self.assertEqual((code, json.loads(out)), (1, {"errorcode": 530, "errortext": "broken"}))

    def test_no_answer_is_exit_code_3(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            environ(endpoint="http://127.0.0.1:{}/".format(unused.getsockname()[1]))
            self.no_answer("refused")
        with self.no_tls() as port:
            environ(endpoint="https://127.0.0.1:{}/".format(port))
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
        code, out, err = self.main("listZones", "password=" + PASSWORD)
        self.assertEqual((code, out), (3, ""))
        self.assertTold(err, err.splitlines()[0])
        self.assertTrue(err.startswith("CloudStack error: "), err)
        self.assertIn(part, err)
        self.assertNoCanary(err)
        self.assertEqual(self.main("listZones", "-q"), (3, "", ""))

    def test_a_command_that_may_have_run_is_told(self):
        environ(timeout="0.05")
        self.replies(startVirtualMachine=forever)
        code, out, err = self.main("startVirtualMachine", "id=1")
        self.assertEqual((code, out), (3, ""))
        self.assertIn("its outcome is unknown", err)

    def test_standard_error_that_cannot_be_written_is_no_matter(self):
        self.replies(listZones=(431, refusal(431, "no")))
        broken = mock.Mock(spec=io.StringIO)
        broken.write.side_effect = OSError(28, "No space left on device")
        for stderr in (broken, None):
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(stderr):
                self.assertEqual(cs.main(["listZones", "-t"]), 1)
            self.assertEqual(json.loads(out.getvalue()), refusal(431, "no"))


class CommandLineJobsTest(CommandLineCase):
    """Commands that start a job."""

    def setUp(self):
        super().setUp()
        self.replies(deployVirtualMachine={"deployvirtualmachineresponse": {"jobid": "job-1", "id": "vm-1"}})

    def test_a_job_is_waited_for(self):
        self.replies(queryAsyncJobResult=[job_pending(), job_pending(), job_done({"virtualmachine": {"id": "vm-1"}})])
        code, out, err = self.main("deployVirtualMachine")
        self.assertEqual((code, json.loads(out), err), (0, {"virtualmachine": {"id": "vm-1"}}, ""))
        self.assertEqual(self.server.commands, ["deployVirtualMachine"] + ["queryAsyncJobResult"] * 3)

    def test_async_does_not_wait(self):
        for args in (["--async"], ["fetch_result=false"]):
            self.server.requests.clear()
            code, out, err = self.main("deployVirtualMachine", *args)
            self.assertEqual((code, json.loads(out), err), (0, {"jobid": "job-1", "id": "vm-1"}, ""))
            self.assertEqual(self.server.commands, ["deployVirtualMachine"])

    def test_a_command_with_async_in_its_name_is_not_waited_for(self):
        self.replies(**{"*": {"r": {"jobid": "job-1"}}})
        for command in ("queryAsyncJobResult", "doThingAsync", "asyncThing"):
            self.server.requests.clear()
            code, out, err = self.main(command)
            self.assertEqual((code, json.loads(out), err), (0, {"jobid": "job-1"}, ""))
            self.assertEqual(self.server.commands, [command])

    def test_a_failed_job(self):
        failed = {"errorcode": 533, "errortext": "no capacity \x1b[1m"}
        self.replies(queryAsyncJobResult=job_done(failed, 2))
        code, out, err = self.main("deployVirtualMachine")
        self.assertEqual((code, json.loads(out)), (1, job_done(failed, 2)))
        self.assertTold(err, "CloudStack error: Job failure: no capacity \\x1b[1m")
        code, out, err = self.main("deployVirtualMachine", "-q")
        self.assertEqual((code, json.loads(out), err), (1, job_done(failed, 2), ""))

    def test_a_job_still_running_at_job_timeout(self):
        environ(job_timeout="0.03")
        self.replies(queryAsyncJobResult=job_pending)
        code, out, err = self.main("deployVirtualMachine")
        self.assertEqual((code, out), (4, ""))
        self.assertIn("Timeout waiting for async job result", err)
        self.assertIn("cs --wait job-1", err)

    def test_no_answer_while_waiting_tells_how_to_go_on(self):
        environ(job_timeout="0.03", timeout="1")  # time enough for the answer that names the job
        self.replies(queryAsyncJobResult=forever)
        code, out, err = self.main("deployVirtualMachine")
        self.assertIn(code, (3, 4))
        self.assertEqual(out, "")
        self.assertIn("cs --wait job-1", err)

    def test_wait(self):
        self.replies(queryAsyncJobResult=[job_pending(), job_done({"success": True})])
        code, out, err = self.main("--wait", "job-1")
        self.assertEqual((code, json.loads(out), err), (0, {"success": True}, ""))
        self.assertEqual([record.params["jobid"] for record in self.server.requests], ["job-1", "job-1"])
        code, out, err = self.main("--wait=job-1", "-q", "--post")
        self.assertEqual((code, json.loads(out)), (0, {"success": True}))
        self.assertEqual(self.server.requests[-1].method, "POST")

    def test_wait_for_a_failed_an_unknown_and_an_endless_job(self):
        self.replies(queryAsyncJobResult=job_done({"errorcode": 530, "errortext": "it broke"}, 2))
        code, out, err = self.main("--wait", "job-1")
        self.assertEqual(code, 1)
        self.assertTold(err, "CloudStack error: Job failure: it broke")
        self.replies(queryAsyncJobResult=(431, refusal(431, "unable to find job")))
        code, out, err = self.main("--wait", "job-2")
        self.assertEqual(code, 1)
        self.assertTold(err, "CloudStack error: HTTP 431 response from CloudStack: unable to find job")
        environ(job_timeout="0.03")
        self.replies(queryAsyncJobResult=job_pending)
        code, out, err = self.main("--wait", "job-1")
        self.assertEqual((code, out), (4, ""))
        self.assertIn("cs --wait job-1", err)

    def test_a_job_id_that_cannot_be_sent_is_no_usage_error(self):
        """It was the server's word, and a machine may be on its way."""
        self.replies(deployVirtualMachine={"r": {"jobid": "1\x1b[2J"}}, queryAsyncJobResult=job_pending)
        environ(job_timeout="0.03")
        code, out, err = self.main("deployVirtualMachine")
        self.assertNotEqual(code, 2)
        self.assertTrue(err.startswith("CloudStack error: "), err)
        self.assertNotIn("\x1b", err)

    def test_an_interrupt_while_waiting_tells_how_to_go_on(self):
        self.replies(queryAsyncJobResult=job_pending)
        with mock.patch.object(cs, "_sleep", side_effect=KeyboardInterrupt):
            code, out, err = self.main("deployVirtualMachine")
        self.assertEqual((code, out), (130, ""))
        self.assertIn("job-1", err)
        self.assertIn("cs --wait job-1", err)

    def test_an_interrupt_before_there_is_a_job(self):
        interrupted = mock.patch.object(cs.CloudStack, "_exchange", side_effect=KeyboardInterrupt)
        with interrupted, mock.patch.dict(os.environ, CLOUDSTACK_RECOVER="false"):
            self.assertEqual(self.main("deployVirtualMachine"), (130, "", ""))
        with interrupted:
            self.assertEqual(self.main("listZones"), (130, "", ""))

    def test_an_interrupt_before_the_answer_shows_the_id_that_the_job_gets(self):
        sent = []

        def exchange(client, request):
            sent.append(wire(request)["customjobid"])
            raise KeyboardInterrupt

        with mock.patch.object(cs.CloudStack, "_exchange", exchange):
            code, out, err = self.main("deployVirtualMachine")
        self.assertEqual((code, out), (130, ""))
        told = "Interrupted. Job {0} may still be running; to go on waiting for it: cs --wait {0}\n"
        self.assertEqual(err, told.format(*sent))


class TraceTest(CommandLineCase):
    """--trace shows every exchange and nothing secret."""

    def lines(self, *args):
        """The trace of a command line without its blank lines, and with what changes from run to run replaced."""
        code, out, err = self.main("-t", *args)
        self.assertEqual(code, 0)
        self.assertNoCanary(err)
        err = re.sub(r"expires=20\d\d-\d\d-\d\dT\d\d%3A\d\d%3A\d\d%2B0000", "expires=NOW", err)
        err = err.replace(self.server.address, "http://host")
        return [re.sub(r"^\(\d+ ms\)$", "(TIME)", line) for line in err.splitlines() if line]

    QUERY = "apiKey=***&command=listZones&expires=NOW&name=x&response=json&signature=***&signatureVersion=3"
    ANSWER = [
        "200 OK",
        "Content-Type: application/json",
        "Content-Length: {}".format(len(json.dumps(ZONES_ANSWER))),
        json.dumps(ZONES_ANSWER),
        "(TIME)",
    ]

    def test_get(self):
        expected = ["GET http://host/client/api?" + self.QUERY, "User-Agent: cs/" + cs.__version__]
        self.assertEqual(self.lines("listZones", "name=x"), expected + ["Accept-Encoding: identity"] + self.ANSWER)

    def test_an_endpoint_without_a_path_is_shown_with_a_slash(self):
        environ(endpoint=self.server.address)
        self.assertEqual(self.lines("listZones", "name=x")[0], "GET http://host/?" + self.QUERY)

    def test_an_endpoint_with_a_query(self):
        environ(endpoint=self.server.endpoint + "?site=" + PASSWORD)
        self.assertRegex(self.lines("listZones", "name=x")[0], "^GET http://host/client/api[?]")

    def test_post_with_its_form_body(self):
        expected = [
            "POST http://host/client/api",
            "User-Agent: cs/" + cs.__version__,
            "Accept-Encoding: identity",
            "Content-Type: application/x-www-form-urlencoded",
            self.QUERY,
        ]
        self.assertEqual(self.lines("listZones", "name=x", "--post"), expected + self.ANSWER)
        environ(endpoint=self.server.address)
        self.assertEqual(self.lines("listZones", "name=x", "--post")[0], "POST http://host/")

    def test_the_body_is_shown_as_received(self):
        body = '{ "listzonesresponse" :\n{"zone": [ ], "name": "z\u00fcrich"}}'
        self.replies(listZones=body)
        lines = self.lines("listZones")
        self.assertIn("\n".join(body.splitlines()), "\n".join(lines))

    def test_every_exchange_is_shown(self):
        self.replies(
            deployVirtualMachine={"r": {"jobid": "job-1"}},
            queryAsyncJobResult=[job_pending(), job_done({"success": True})],
        )
        lines = self.lines("deployVirtualMachine")
        requests = [re.search("command=([A-Za-z]+)", line).group(1) for line in lines if "command=" in line]
        self.assertEqual(requests, ["deployVirtualMachine", "queryAsyncJobResult", "queryAsyncJobResult"])
        self.assertEqual(lines.count("200 OK"), 3)
        self.assertEqual(lines.count("(TIME)"), 3)

    def test_errors_and_pages_of_html_are_shown_too(self):
        self.replies(listZones=(502, "<html>\x1b[2J</html>"))
        code, out, err = self.main("-t", "listZones")
        self.assertEqual(code, 1)
        self.assertIn("\n502 Bad Gateway\nContent-Type: text/html\n", err)
        self.assertIn("\n<html>\\x1b[2J</html>\n", err)

    def test_an_exchange_without_an_answer_is_shown_with_its_reason(self):
        environ(timeout="0.05")
        self.replies(listZones=forever)
        code, out, err = self.main("-t", "listZones", "password=" + PASSWORD)
        self.assertEqual(code, 3)
        self.assertIn("No answer from " + self.server.endpoint, err)
        self.assertRegex(err, r"\(\d+ ms\)")
        self.assertNoCanary(err)

    def test_the_setting_does_what_the_option_does(self):
        environ(trace="true")
        code, out, err = self.main("listZones")
        self.assertIn("GET " + self.server.endpoint, err)

    def test_nothing_secret_is_shown(self):
        """Neither in what is sent, nor in an answer that repeats it, under any name."""
        environ(header_authorization="Bearer " + PASSWORD, header_x_auth_token=PASSWORD, header_cookie="a=" + PASSWORD)
        echo = {
            "apikey": KEY,
            "odd": [SECRET, PASSWORD, USERDATA],
            "secretkey": "CANARY-new",
            "privatekey": 'CANARY\n"pem',
        }
        echo["user"] = {
            "password": "CANARY-other",
            "sessionkey": "CANARY-session",
            "details": {"rootPassword": "CANARY-root"},
        }
        self.replies(**{"*": {"r": echo}})
        for params in (
            ["password=" + PASSWORD, "userdata=" + USERDATA],
            ["details[0].password=" + PASSWORD, "details[0].userData=" + USERDATA],
            ["newPassword=" + PASSWORD, "USERDATA=" + USERDATA],
            ["privatekey=" + PASSWORD, "usersecretkey=" + USERDATA],
            ["sessionkey=" + PASSWORD, "token=" + USERDATA],
            ["signature=" + PASSWORD, "userdata=" + USERDATA, "password=" + PASSWORD],
        ):
            for option in ("-t", "--post"):
                with self.subTest(params, option=option):
                    code, out, err = self.main("-t", option, "updateUser", *params)
                    self.assertEqual(code, 0)
                    self.assertNoCanary(err)
                    sent = self.server.requests[-1].params
                    for param in params[:2]:
                        name, _, value = param.partition("=")
                        if name != "signature":
                            self.assertEqual(sent[name], value)
        self.assertEqual(self.server.requests[-1].headers["authorization"], "Bearer " + PASSWORD)

    def test_a_session_is_shown_without_its_secrets(self):
        self.unset("key", "secret")
        environ(username="admin", password=PASSWORD)
        self.replies(login={"loginresponse": {"sessionkey": "CANARY-session", "username": "admin"}})
        code, out, err = self.main("-t", "listZones")
        self.assertEqual((code, out), (0, ZONES_TEXT))
        self.assertNoCanary(err)
        self.assertEqual(self.server.commands, ["login", "listZones", "logout"])
        self.assertEqual(self.server.requests[0].params["password"], PASSWORD)
        self.assertEqual(self.server.requests[1].params["sessionkey"], "CANARY-session")
        self.assertNotIn("signature", self.server.requests[1].params)


class DryRunTest(CommandLineCase):
    """--dry-run prints what would be sent, and sends nothing."""

    def plan(self, *args):
        code, out, err = self.main("--dry-run", *args)
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(self.server.requests, [])
        self.assertNoCanary(out)
        lines = out.splitlines()
        return lines[0], dict(line.split("=", 1) for line in lines[1:])

    def test_method_address_and_parameters(self):
        head, params = self.plan("listZones", "name=z\u00fcrich &x", "tags[0].key=a")
        self.assertEqual(head, "GET {}".format(self.server.endpoint))
        self.assertRegex(params.pop("expires"), r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+0000$")
        fixed = {
            "apiKey": "***",
            "command": "listZones",
            "response": "json",
            "signature": "***",
            "signatureVersion": "3",
        }
        self.assertEqual(params, dict({"name": "z\u00fcrich &x", "tags[0].key": "a"}, **fixed))

    def test_post(self):
        self.assertEqual(self.plan("listZones", "--post")[0], "POST {}".format(self.server.endpoint))
        self.assertEqual(self.plan("listZones", "a=" + "x" * 9000)[0], "POST {}".format(self.server.endpoint))

    def test_what_is_secret_is_replaced(self):
        head, params = self.plan("updateUser", "password=" + PASSWORD, "details[0].userdata=" + USERDATA)
        self.assertEqual(head, "POST {}".format(self.server.endpoint))
        self.assertEqual((params["password"], params["details[0].userdata"]), ("***", "***"))

    def test_control_arguments_are_no_parameters(self):
        for word in ("json=true", "fetch_result=true"):
            self.assertNotIn(word.partition("=")[0], self.plan("listZones", word)[1])
        head, params = self.plan("listZones", "json=false", "opcode_name=cmd")
        self.assertEqual(params["cmd"], "listZones")
        self.assertNotIn("response", params)

    def test_page_without_pagesize_shows_the_size_that_is_added(self):
        self.assertEqual(self.plan("listZones", "page=2")[1]["pagesize"], "500")

    def test_a_session_is_not_opened(self):
        self.unset("key", "secret")
        environ(username="admin", password=PASSWORD)
        self.assertNotIn("signature", self.plan("listZones")[1])

    def test_an_unsigned_client(self):
        self.unset("key", "secret")
        self.assertEqual(self.plan("listZones")[1], {"command": "listZones", "response": "json"})

    def test_waiting_for_a_job(self):
        self.replies(queryAsyncJobResult=job_done({"success": True}))
        code, out, err = self.main("--dry-run", "--wait", "job-1")
        self.assertIn(code, (0, 2))
        self.assertEqual(self.server.requests, [])
        self.assertNotIn("Traceback", err)

    def test_control_characters_are_shown_escaped(self):
        code, out, err = self.main("--dry-run", "listZones", "name=a\u202eb\x9bc")
        self.assertIn("name=a\\u202eb\\x9bc", out)

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
        self.assertEqual((code, out), (0, ZONES_TEXT))
        self.assertNoCanary(err)
        if err:
            self.assertOneLine(err)
            self.assertTrue(err.startswith("Warning: "), err)
            self.assertIn(path, err)
        return bool(err)

    @unittest.skipUnless(os.name == "posix", "other systems have no such modes")
    def test_modes(self):
        signed = "[cloudstack]\nkey = {}\nsecret = {}\n".format(KEY, SECRET)
        for mode, warned in (
            (0o600, False),
            (0o400, False),
            (0o640, True),
            (0o604, True),
            (0o644, True),
            (0o666, True),
        ):
            with self.subTest(oct(mode)):
                self.assertIs(self.warnings(signed, mode), warned)
                self.assertFalse(self.warnings(signed, mode, "-q"))

    @unittest.skipUnless(os.name == "posix", "other systems have no such modes")
    def test_only_where_it_holds_a_secret(self):
        self.assertFalse(self.warnings("[cloudstack]\ntimeout = 3\n[eu]\nsecret = {}\n".format(SECRET), 0o644))

    @unittest.skipUnless(os.name == "posix", "other systems have no such modes")
    def test_once_however_many_secrets_and_requests(self):
        self.replies(
            login={"r": {"sessionkey": "CANARY-session"}},
            listZones=[{"r": {"jobid": "job-1"}}],
            queryAsyncJobResult=[job_pending(), job_done(ZONES_ANSWER["listzonesresponse"])],
        )
        text = "[cloudstack]\nusername = u\npassword = {}\n".format(PASSWORD)
        self.assertTrue(self.warnings(text, 0o644))


# What nobody can send: {setting: value} as the environment gives it, and what the line says.
BAD_SETTINGS = (
    ({"endpoint": "cloud.example/client/api"}, "endpoint"),
    ({"endpoint": "localhost:8080/client/api"}, "endpoint"),
    ({"endpoint": "file:///etc/passwd"}, "endpoint"),
    ({"endpoint": "ftp://cloud.example/"}, "endpoint"),
    ({"endpoint": "http://"}, "endpoint"),
    ({"endpoint": "http:///client/api"}, "endpoint"),
    ({"endpoint": "http://[::1/client/api"}, "endpoint"),
    ({"endpoint": "http://cloud.example:port/"}, "endpoint"),
    ({"endpoint": "http://cloud.example:99999/"}, "endpoint"),
    ({"endpoint": "http://cloud example/"}, "endpoint"),
    ({"endpoint": "http://cloud.example/\r\nX: y"}, "endpoint"),
    ({"endpoint": "http://z\u00fcrich.example/"}, "endpoint"),
    ({"endpoint": "http://user:" + PASSWORD + "@cloud.example/"}, "endpoint"),
    ({"endpoint": "user:" + PASSWORD + "@cloud.example/"}, "endpoint"),
    ({"endpoint": "http:user:" + PASSWORD + "@cloud.example/"}, "endpoint"),
    ({"endpoint": "cloud.example/client/api?password=" + PASSWORD}, "endpoint"),
    ({"secret": ""}, "secret"),
    ({"key": None}, "key"),
    ({"key": None, "secret": None, "username": "u"}, "password"),
    ({"key": None, "secret": None, "password": PASSWORD}, "username"),
    ({"username": "u", "password": PASSWORD}, "username"),
    ({"timeout": "abc"}, "timeout"),
    ({"timeout": "0"}, "timeout"),
    ({"timeout": "-1"}, "timeout"),
    ({"timeout": "nan"}, "timeout"),
    ({"timeout": "inf"}, "timeout"),
    ({"timeout": "1e300"}, "timeout"),
    ({"timeout": "1" * 400}, "timeout"),
    ({"retry": "-1"}, "retry"),
    ({"retry": "1.5"}, "retry"),
    ({"retry": "x"}, "retry"),
    ({"retry_backoff": "-0.5"}, "retry_backoff"),
    ({"method": "put"}, "method"),
    ({"job_timeout": "soon"}, "job_timeout"),
    ({"job_timeout": "-1"}, "job_timeout"),
    ({"poll_interval": "x"}, "poll_interval"),
    ({"poll_interval": "-1"}, "poll_interval"),
    ({"poll_interval": "1e300"}, "poll_interval"),
    ({"expiration": "x"}, "expiration"),
    ({"expiration": "1e300"}, "expiration"),
    ({"trace": "maybe"}, "trace"),
    ({"dangerous_no_tls_verify": "nope"}, "dangerous_no_tls_verify"),
    ({"dangerous_no_tls_verify": "False ; comment"}, "dangerous_no_tls_verify"),
    ({"header_x": PASSWORD + "\r\nX-Admin: 1"}, "'x'"),
    ({"header_x": "\u20ac" + PASSWORD}, "'x'"),
    ({"header_a b": PASSWORD}, "'a b'"),
    ({"header_content_length": "5"}, "content-length"),
    ({"endpoint": "https://127.0.0.1:1/", "verify": "/missing/ca.pem"}, "verify"),
    ({"endpoint": "https://127.0.0.1:1/", "verify": "{empty}"}, "verify"),
    ({"endpoint": "https://127.0.0.1:1/", "verify": "{garbage}"}, "verify"),
    ({"endpoint": "https://127.0.0.1:1/", "cert": "/missing/cert.pem"}, "cert"),
    ({"endpoint": "https://127.0.0.1:1/", "cert": "{garbage}"}, "cert"),
    ({"endpoint": "https://127.0.0.1:1/", "cert": "{home}"}, "cert"),
    ({"endpoint": "https://127.0.0.1:1/", "cert": "{garbage}", "cert_key": "/missing/key.pem"}, "cert"),
)


class BadInputTest(CommandLineCase):
    """One clear line that names the setting, before anything is sent."""

    def setUp(self):
        super().setUp()
        self.files = {
            "home": self.home,
            "empty": self.write("empty.pem", ""),
            "garbage": self.write("garbage.pem", "-----BEGIN CERTIFICATE-----\nCANARY\n-----END CERTIFICATE-----\n"),
        }

    def bad_settings(self):
        """Each case with an environment of its own: (settings, what the line says)."""
        for settings, says in BAD_SETTINGS:
            settings = {
                name: value and value.replace("{", "{0[").replace("}", "]}") for name, value in settings.items()
            }
            settings = {name: value and value.format(self.files) for name, value in settings.items()}
            with self.subTest(settings), mock.patch.dict(os.environ):
                for name, value in settings.items():
                    os.environ.pop("CLOUDSTACK_" + name.upper(), None)
                    environ(**{name: value} if value is not None else {})
                yield settings, says
            self.assertEqual(self.server.requests, [])

    def test_settings_on_the_command_line(self):
        for _, says in self.bad_settings():
            code, out, err = self.main("listZones")
            self.assertEqual((code, out), (2, ""), err)
            self.assertOneLine(err)
            self.assertIn(says, err)
            self.assertNoCanary(err)

    def test_settings_in_the_library(self):
        for kind in (cs.CloudStack, cs.AIOCloudStack):
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

    def test_settings_in_the_file_are_refused_as_those_of_the_environment(self):
        self.unset("endpoint", "key", "secret")
        for line, says in (
            ("timeout = abc", "timeout"),
            ("retry = -1", "retry"),
            ("header_x = a\n  b", "'x'"),
            ("key = k", "secret"),
        ):
            with self.subTest(line):
                self.write(".cloudstack.ini", "[cloudstack]\nendpoint = {}\n{}\n".format(self.server.endpoint, line))
                self.assertUsage("listZones", says=[says])

    def test_settings_of_the_wrong_type(self):
        for name, value in (
            ("endpoint", 5),
            ("key", 5),
            ("secret", ["x"]),
            ("timeout", "x"),
            ("timeout", True),
            ("timeout", None.__class__),
            ("method", 1),
            ("verify", 1.5),
            ("cert", 5),
            ("retry", True),
            ("retry", 1.5),
            ("expiration", object()),
            ("trace", 2),
            ("dangerous_no_tls_verify", "nope"),
            ("headers", "x: y"),
            ("headers", {"a b": "c"}),
            ("headers", {"a": ["c"]}),
            ("headers", {"a": "c\r\nd"}),
            ("fetch_result", "perhaps"),
            ("concurrency", 0),
            ("username", 7),
        ):
            for kind in (cs.CloudStack, cs.AIOCloudStack):
                with self.subTest(name, value=value):
                    with self.assertRaisesRegex(ValueError, "^" + name + ": "):
                        kind(**dict({"endpoint": ENDPOINT}, **{name: value}))
                    client = kind(ENDPOINT)
                    with self.assertRaisesRegex(ValueError, "^" + name + ": "):
                        client.set_setting(name, value)

    def test_parameters_that_cannot_be_sent(self):
        client = cs.CloudStack(self.server.endpoint, KEY, SECRET)
        self.addCleanup(client.close)
        for value, says in (
            (object(), "object"),
            ({"a": {"b": 1}}, "dict"),
            ([[1]], "list"),
            ([{"a": object()}], "object"),
            (b"\xff" + PASSWORD.encode(), "UTF-8"),
            (PASSWORD + "\x00", "U+0000"),
            (PASSWORD + "\ud800", "U+D800"),
            (len, type(len).__name__),
        ):
            with self.subTest(ascii(value)):
                with self.assertRaises(ValueError) as caught:
                    client.listZones(userdata=value)
                self.assertIn("userdata", str(caught.exception))
                self.assertIn(says, str(caught.exception))
                self.assertNoCanary(caught.exception)
        with self.assertRaisesRegex(ValueError, "'x'"):
            client.listZones(headers={"x": "a\r\nb"})
        self.assertEqual(self.server.requests, [])

    def test_files(self):
        self.unset("endpoint", "key", "secret")
        missing = os.path.join(self.home, "missing.ini")
        for name, content, says in (
            ("no file at all", None, "Config file not found. Tried "),
            (
                "no endpoint",
                "[cloudstack]\nkey = {}\n".format(KEY),
                "the configuration is missing the following keys: endpoint",
            ),
            ("no ini file", "secret = {}\n".format(SECRET), "is not an ini file"),
            ("a reference", "[cloudstack]\nendpoint = http://e/\nsecret = {}%(x)s\n".format(SECRET), "secret"),
            ("undecodable", b"[cloudstack]\nsecret = CANARY\xff\n", "UTF-8"),
        ):
            with self.subTest(name):
                if content is not None:
                    self.write(".cloudstack.ini", content)
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
        if not os.path.exists("/proc/{}/stat".format(child.pid)):
            time.sleep(0.5)
            return
        states = ""
        while not states.endswith("SSSSS"):
            with open("/proc/{}/stat".format(child.pid)) as file:
                states += file.read().rpartition(") ")[2][0]
            time.sleep(0.01)

    def held(self, reply):
        """A reply that is given once release is set, and sets asked before."""
        asked, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        def wait(_):
            asked.set()
            release.wait(CHILD_LIMIT)
            return reply

        return wait, asked, release

    def test_cs_py_and_python_m_cs_are_the_same_program(self):
        for command in ([sys.executable, CS_PATH], [sys.executable, "-m", "cs"]):
            result = self.finish(self.start("listZones", "-q", command=command, cwd=os.path.dirname(CS_PATH)))
            self.assertEqual(result, (0, ZONES_TEXT, ""))

    def test_the_exit_code_is_that_of_main(self):
        result = self.cs("listZones", "x")
        self.assertEqual((result.returncode, result.stdout), (2, ""))
        self.assertOneLine(result.stderr)

    def test_nothing_is_left_open(self):
        result = self.cs("listZones", env={"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "default"})
        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, ZONES_TEXT, ""))

    def test_a_value_from_standard_input(self):
        result = self.cs("listZones", "name=@-", stdin="z\u00fcrich\n\n")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(self.server.requests[0].params["name"], "z\u00fcrich\n")

    @posix_only
    def test_an_argument_that_cannot_be_decoded(self):
        code, out, err = self.finish(self.start(b"listZones", b"name=\xff"))
        self.assertEqual((code, out, self.server.requests), (2, "", []))
        self.assertOneLine(err)

    @posix_only
    def test_a_reader_that_closes_early(self):
        self.replies(listZones={"r": {"zone": ["x" * 1000] * 1000}})
        child = self.start("listZones")
        self.assertEqual(child.stdout.read(1), b"{")
        child.stdout.close()
        self.assertEqual(child.stderr.read(), b"")
        self.assertEqual(child.wait(), 0)

    @posix_only
    def test_a_reader_that_is_gone_before_anything_is_written(self):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            self.assertEqual(self.finish(self.start("listZones", stdout=writing)), (0, "", ""))
        finally:
            os.close(writing)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk(self):
        self.replies(listHosts=(431, refusal(431, "no")))
        for args in (["listZones"], ["-q", "listHosts"]):
            with self.subTest(args), open("/dev/full", "wb") as full:
                code, out, err = self.finish(self.start(*args, stdout=full))
                self.assertEqual(code, 1)
                self.assertOneLine(err)
                self.assertIn("No space left on device", err)

    @posix_only
    def test_no_standard_output_at_all(self):
        self.replies(listHosts=(431, refusal(431, "no")))
        for args in (["listHosts"], ["--version"]):
            with self.subTest(args):
                shell = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, CS_PATH]
                code, out, err = self.finish(self.start(*args, command=shell))
                self.assertIn(code, (0, 1))
                self.assertNotIn("Traceback", err)

    @posix_only
    def test_no_standard_error_at_all(self):
        self.replies(listZones=(431, refusal(431, "no")))
        shell = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, CS_PATH]
        code, out, err = self.finish(self.start("-t", "listZones", command=shell))
        self.assertEqual((code, json.loads(out)), (1, refusal(431, "no")))

    @posix_only
    def test_an_interrupt_while_waiting_for_a_job(self):
        """While a look at it is under way, and between two looks. With 5.2.0 it never shows the job's id."""
        for holding in (True, False):
            for args in (["deployVirtualMachine"], ["--wait", "job-1"]):
                with self.subTest(args, holding=holding):
                    self.interrupt_a_wait(args, holding)

    def interrupt_a_wait(self, args, holding):
        wait, asked, release = self.held(job_pending())
        looks = []

        def pending(record):
            looks.append(record)
            return wait(record) if holding and len(looks) == 2 else job_pending()

        self.replies(deployVirtualMachine={"r": {"jobid": "job-1"}}, queryAsyncJobResult=pending)
        child = self.start(*args, env=dict(os.environ, CLOUDSTACK_POLL_INTERVAL="0.05"))
        until(asked.is_set if holding else lambda: looks, "a look")
        self.until_blocked(child)
        child.send_signal(signal.SIGINT)
        code, out, err = self.finish(child)
        release.set()
        self.assertEqual((code, out), (130, ""), err)
        self.assertIn("cs --wait job-1", err)
        self.assertNotIn("Traceback", err)

    @posix_only
    def test_an_interrupt_while_waiting_for_an_answer(self):
        wait, asked, release = self.held(ZONES_ANSWER)
        self.replies(listZones=wait)
        child = self.start("listZones")
        self.assertTrue(asked.wait(CHILD_LIMIT))
        self.until_blocked(child)
        child.send_signal(signal.SIGINT)
        code, out, err = self.finish(child)
        self.assertEqual((code, out), (130, ""), err)
        self.assertNotIn("Traceback", err)
        self.assertNotIn("--wait", err)

    @posix_only
    def test_an_interrupt_before_the_answer_shows_the_id_of_the_job(self):
        wait, asked, release = self.held({"r": {"jobid": "job-1"}})
        self.replies(deployVirtualMachine=wait)
        child = self.start("deployVirtualMachine", "--retry", "0")
        self.assertTrue(asked.wait(10))
        child.send_signal(signal.SIGINT)
        code, out, err = self.finish(child)
        told = "Interrupted. Job {0} may still be running; to go on waiting for it: cs --wait {0}\n"
        ident = self.server.requests[0].params["customjobid"]
        self.assertEqual((code, out, err), (130, "", told.format(ident)))

    @unittest.skipUnless(os.path.exists("/proc/self/cmdline"), "needs /proc")
    def test_the_process_list_shows_no_secret(self):
        wait, asked, release = self.held({"r": {}})
        self.replies(updateUser=wait)
        path = self.write("password", PASSWORD)
        child = self.start("updateUser", "password=@" + path, "-t")
        self.assertTrue(asked.wait(CHILD_LIMIT))
        with open("/proc/{}/cmdline".format(child.pid), "rb") as file:
            line = file.read()
        with open("/proc/{0}/task/{0}/children".format(child.pid)) as file:
            self.assertEqual(file.read(), "")
        release.set()
        self.assertEqual(self.finish(child)[0], 0)
        self.assertIn(b"updateUser", line)
        self.assertNotIn(b"CANARY", line)
        self.assertEqual(self.server.requests[0].params["password"], PASSWORD)


FAKE_PYGMENTS = {
    "__init__.py": "def highlight(text, lexer, formatter):\n"
    "    return '\\x1b[36m<' + lexer.name + ' in ' + formatter.style + '>\\n' + text + '\\x1b[39m\\n'\n",
    "formatters.py": "from .util import ClassNotFound\n"
    "class Terminal256Formatter:\n"
    "    def __init__(self, style='default', **options):\n"
    "        if style == 'nosuch':\n            raise ClassNotFound(style)\n"
    "        self.style = style\n",
    "lexers.py": "class JsonLexer:\n    name = 'JSON'\n",
    "util.py": "class ClassNotFound(ValueError):\n    pass\n",
}


class TerminalTest(CommandLineCase):
    """Output on a terminal: coloured where Pygments is installed, and nothing in it that the server made up."""

    def setUp(self):
        super().setUp()
        try:
            import pty

            self.openpty = pty.openpty
        except ImportError:
            self.skipTest("needs pseudo-terminals")
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
        ends = [self.openpty(), self.openpty()]
        env = dict(os.environ, TERM="xterm", **env)
        child = Child([sys.executable, CS_PATH] + list(args), stdout=ends[0][1], stderr=ends[1][1], env=env)
        texts = [b"", b""]
        readers = [threading.Thread(target=self.drain, args=(texts, n, ends[n])) for n in (0, 1)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
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
        self.assertEqual(
            (code, out, err), (0, "\x1b[36m<JSON in default>\n" + ZONES_TEXT.strip("\n") + "\x1b[39m\n", "")
        )
        result = self.cs("listZones", env={"PYTHONPATH": folder})
        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, ZONES_TEXT, ""))

    def test_json_is_plain_where_pygments_is_not_installed(self):
        code, out, err = self.on_terminal("listZones", PYTHONPATH=self.pygments(False))
        self.assertEqual((code, out, err), (0, ZONES_TEXT, ""))

    def test_themes(self):
        """The option beats the setting; a theme that Pygments does not have is no reason to fail."""
        modules = {
            name: mock.Mock() for name in ("pygments", "pygments.formatters", "pygments.lexers", "pygments.util")
        }
        modules["pygments.util"].ClassNotFound = LookupError
        used = []

        def formatter(style="default"):
            used.append(style)
            if style == "nosuch":
                raise LookupError(style)

        modules["pygments.formatters"].Terminal256Formatter = formatter
        modules["pygments"].highlight = lambda text, lexer, formatter: "\x1b[1m" + text + "\x1b[0m"
        environ(theme="autumn")
        for args, expected in (
            (["listZones"], ["autumn"]),
            (["listZones", "--theme", "monokai"], ["monokai"]),
            (["--theme=nosuch", "listZones"], ["nosuch", "default"]),
        ):
            out = io.StringIO()
            out.isatty = lambda: True
            used.clear()
            with mock.patch.dict(sys.modules, modules), contextlib.redirect_stdout(out):
                with mock.patch.dict(os.environ, TERM="xterm"):
                    self.assertEqual(cs.main(args), 0)
            self.assertEqual(used, expected)
            self.assertEqual(out.getvalue(), "\x1b[1m" + ZONES_TEXT.rstrip("\n") + "\x1b[0m\n")

    EVIL = "a\x1b[2J\x1b[8mb\x9b31mc\u202ed\x07e\x1b]0;title\x07\x7f"
    HARMFUL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]"

    def test_what_the_server_sends_cannot_steer_the_terminal(self):
        folder = self.pygments(False)
        as_json, as_text = (
            {"r": {"name": self.EVIL}},
            "a\\x1b[2J\\x1b[8mb\\x9b31mc\\u202ed\\x07e\\x1b]0;title\\x07\\x7f",
        )
        for name, reply, args, where, shown in (
            ("JSON", as_json, [], 1, None),
            ("text", (200, self.EVIL), ["json=false"], 1, as_text + "\n"),
            ("an error", (431, refusal(431, self.EVIL)), [], 2, as_text),
        ):
            with self.subTest(name):
                self.replies(listZones=reply)
                result = self.on_terminal("listZones", *args, PYTHONPATH=folder)
                for text in result[1:]:
                    # What the client itself may write to a terminal: colours of its own are off here.
                    self.assertEqual(re.findall(self.HARMFUL, text.replace("\r\x1b[K", "")), [], text)
                if shown is None:
                    self.assertEqual(json.loads(result[where]), reply["r"])
                else:
                    self.assertIn(shown, result[where])


class CommandLineSandboxTest(Case):
    """`python3 test_cs.py sandbox`: the command line against the simulator, over real signed requests."""

    def sandbox(self, *args, **options):
        # What is configured here must not lead the sandbox elsewhere.
        env = dict(
            os.environ, CLOUDSTACK_ENDPOINT="http://cloud.invalid/", CLOUDSTACK_REGION="mars", CLOUDSTACK_TIMEOUT="x"
        )
        env.update(options.pop("env", {}))
        child = Child([sys.executable, TEST_PATH, "sandbox"] + list(args), env=env, **options)
        self.addCleanup(child.end)
        return child

    def test_a_command(self):
        code, out, err = self.sandbox("listZones").finish()
        self.assertEqual((code, err), (0, b""))
        zones = json.loads(out.decode("utf-8"))
        self.assertEqual(zones["count"], len(zones["zone"]))
        self.assertGreater(zones["count"], 0)

    def test_the_exit_code_is_the_commands(self):
        code, out, err = self.sandbox("startVirtualMachine", "id=nonsense").finish()
        self.assertEqual(code, 1)
        self.assertTrue(err.startswith(b"CloudStack error: HTTP 431 response from CloudStack: "), err)
        self.assertEqual(list(json.loads(out.decode("utf-8")).values())[0]["errorcode"], 431)

    def free_port(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return str(free.getsockname()[1])

    def test_the_port_may_stand_anywhere(self):
        for words in (["--port={}", "--dry-run", "listZones"], ["--dry-run", "--port", "{}", "listZones"]):
            port = self.free_port()
            code, out, err = self.sandbox(*[word.format(port) for word in words]).finish()
            self.assertEqual((code, err), (0, b""), words)
            self.assertIn("http://127.0.0.1:{}/".format(port).encode("ascii"), out)

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
            self.assertEqual((code, out.getvalue(), err.getvalue().count("\n")), (2, "", 1), words)
            self.assertIn("port", err.getvalue())

    def test_help(self):
        for words in (["--help"], ["-h"], ["--port", "0", "--help"]):
            code, out, err = self.sandbox(*words).finish()
            self.assertEqual((code, err), (0, b""))
            self.assertIn(b"--port N", out)
        self.assertNotIn(b"--port", self.sandbox("listZones", "--help").finish()[1])

    def test_nothing_of_the_users_is_read_or_written(self):
        for path in (".cloudstack.ini", "work/cloudstack.ini"):
            self.write(path, "no ini file at all")
        cache = os.path.join(self.home, "cache")
        before = sorted(os.listdir(self.home))
        code, out, err = self.sandbox("--sync", env={"XDG_CACHE_HOME": cache, "TMPDIR": self.cwd}).finish()
        self.assertEqual(code, 0, err)
        self.assertEqual(sorted(os.listdir(self.home)), before)
        self.assertEqual(os.listdir(self.cwd), ["cloudstack.ini"])

    @posix_only
    def test_without_a_command_it_runs_until_interrupted(self):
        for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)):
            with self.subTest(number):
                self.check_stay(number, code)

    def check_stay(self, number, code):
        child = self.sandbox(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        lines = [child.stdout.readline().decode("ascii") for _ in range(4)]
        settings = dict(re.match(r"export ([A-Z_]+)=(\S+)\n\Z", line).groups() for line in lines)
        named = ["CLOUDSTACK_ENDPOINT", "CLOUDSTACK_KEY", "CLOUDSTACK_SECRET", "XDG_CACHE_HOME"]
        self.assertEqual(sorted(settings), named)
        self.assertIn(b"until Ctrl-C", child.stderr.readline())
        os.environ.update(settings)
        status, out, err = self.main("listVirtualMachines", "fetch_list=true", "state=Running")
        self.assertEqual((status, err), (0, ""))
        self.assertGreater(len(json.loads(out)), 1)
        child.send_signal(number)
        self.assertEqual(child.finish(), (code, b"", b""))
        self.assertFalse(os.path.exists(settings["XDG_CACHE_HOME"]))

    def test_the_command_line_against_the_simulator(self):
        """Signatures checked by another implementation, jobs that take a moment, secrets by POST."""
        with Simulator(job_seconds=0.05) as cloud:
            environ(endpoint=cloud.endpoint, key=cloud.key, secret=cloud.secret, poll_interval="0.05")
            code, out, err = self.main("listVirtualMachines", "state=Running", "pagesize=1", "page=1")
            self.assertEqual((code, err.count("Traceback")), (0, 0))
            (machine,) = json.loads(out)["virtualmachine"]
            code, out, err = self.main("stopVirtualMachine", "id=" + machine["id"])
            self.assertEqual((code, err), (0, ""))
            self.assertEqual(json.loads(out)["virtualmachine"]["state"], "Stopped")
            code, out, err = self.main(
                "updateVirtualMachine", "id=" + machine["id"], "displayname=~ * z\u00fcrich +%", "-t"
            )
            self.assertEqual((code, json.loads(out)["virtualmachine"]["displayname"]), (0, "~ * z\u00fcrich +%"))
            self.assertNotIn(cloud.key, err)
            self.assertNotIn(cloud.secret, err)
            code, out, err = self.main("startVirtualMachine", "id=" + machine["id"], "--async")
            job = json.loads(out)["jobid"]
            code, out, err = self.main("--wait", job)
            self.assertEqual((code, json.loads(out)["virtualmachine"]["state"]), (0, "Running"))
            code, out, err = self.main("startVirtualMachine", "id=" + machine["id"])
            self.assertEqual(code, 1)
            self.assertTrue(err.startswith("CloudStack error: "), err)
            environ(secret="wrong")
            self.assertEqual(self.main("listZones", "-q")[0], 1)


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
            until(lambda: not is_alive(pid), "the end of {}".format(pid))  # noqa: B023  (now)

    def assert_fails(self, out, *names):
        for name in names:
            self.assertRegex(out, "(?m)^(FAIL|ERROR): .*" + name)

    def test_a_child_that_hangs_fails_its_test_and_is_ended_with_its_own(self):
        code, out = self.suite("test_1", "test_2", limit=0.5)
        self.assertEqual((code, out.splitlines()[-1]), (1, "1 passed, 1 failed"), out)
        self.assert_fails(out, "test_2_waits_for_a_child_that_hangs")
        self.assertIn("did not end within 0.5 s", out)
        self.assert_gone()

    def test_a_test_that_hangs_fails_and_the_others_are_run(self):
        """In both processes, and with text that the C locale of Python 3.6 cannot show."""
        code, out = self.suite(LC_ALL="C", LANG="")
        self.assertEqual((code, out.splitlines()[-1]), (1, "1 passed, 4 failed"), out)
        self.assert_fails(out, "test_3_waits_for_nothing", "test_4_says", "test_5_does_not_heed_the_alarm")
        self.assertIn("not done after 2 s", out)
        self.assertRegex(out, "hanging.py\", line \\d+ in test_5_does_not_heed")
        self.assert_gone()

    @posix_only
    def test_one_that_is_ended_ends_what_it_started(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            text = HANGING.format(folder=os.path.dirname(CS_PATH), home=self.home, limit=300)
            child = Child([sys.executable, self.write("hanging.py", text), "test_3"], env=dict(os.environ),
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
            self.addCleanup(child.end)
            path = os.path.join(self.home, "pids")
            until(lambda path=path: os.path.exists(path) and os.path.getsize(path), "the test's beginning")
            child.send_signal(number)
            self.assertEqual(child.wait(), 128 + number)
            self.assert_gone()
            os.unlink(path)

    def test_it_says_what_it_can_do(self):
        for word in ("--help", "-h"):
            code, out, err = Child([sys.executable, TEST_PATH, word]).finish()
            self.assertEqual((code, err), (0, b""))
            for word in (b"WORD", b"-v", b"sandbox"):
                self.assertIn(word, out)

    def test_an_unknown_option_is_one_line(self):
        for words in (["--verbos"], ["-x", "SuiteTest"], ["RunningTest", "--failfast"]):
            code, out, err = Child([sys.executable, TEST_PATH] + words).finish()
            self.assertEqual((code, out, err.count(b"\n")), (2, b"", 1))

    def test_a_word_that_no_name_holds_is_a_failure(self):
        code, out, err = Child([sys.executable, TEST_PATH, "no such test"]).finish()
        self.assertEqual((code, err), (1, b""))
        self.assertIn(b"no test has a name with no such test\n", out.replace(b"\r", b""))


def is_alive(pid):
    """Whether a process runs; one that has ended and waits to be asked for its status does not."""
    try:
        os.kill(int(pid), 0)
        with open("/proc/{}/stat".format(pid)) as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not os.path.exists("/proc/self")  # macOS has no such place


# === the command line's extras ======================================================================================
# The list of commands, completion, formats, terminals, --configure, and what README says.

import ast  # noqa: E402
import csv  # noqa: E402
import errno  # noqa: E402
import shlex  # noqa: E402
import unicodedata  # noqa: E402

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
        os.environ.update({"CLOUDSTACK_" + name.upper(): str(value) for name, value in settings.items()})

    def unset(self, *names):
        for name in names:
            os.environ.pop("CLOUDSTACK_" + name.upper(), None)

    def option(self, **options):
        """Options of the simulator for this test."""
        patched = mock.patch.multiple(self.cloud, **options)
        patched.start()
        self.addCleanup(patched.stop)

    def reply(self, command_name, *documents, **more):
        """Have the next exchanges of a command answered by these, whatever was asked."""
        key = command_name.lower() + "response"
        self.cloud.script(command_name, *[Answer(more.get("status", 200), {key: body}) for body in documents])

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

    def good(self, *args):
        """A command line that must end with 0 and say nothing on standard error; its output."""
        code, out, err = self.main(*args)
        self.assertEqual((code, err), (0, ""), out)
        return out

    def usage(self, *args):
        """A command line that must be refused before anything is sent; what it says."""
        del self.cloud.requests[:]
        code, out, err = self.main(*args)
        self.assertEqual((code, out, self.asked), (2, "", []))
        self.assertNotIn("Traceback", err)
        return err

    def sync(self):
        """Fetch the list of commands; the path of the file."""
        code, out, err = self.main("--sync", "-q")
        self.assertEqual((code, out, err), (0, "", ""))
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
        self.assertEqual(len(names), 1, names)
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

    def table(self, *args, **options):
        """The lines of a table on a terminal, uncoloured."""
        code, out, err = self.on_terminal(*args + ("-o", "table", "--color", "never"), **options)
        self.assertEqual((code, err), (0, ""))
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
    return {"name": name, "description": "Does {}.".format(name), "isasync": False, "params": params, "response": []}


# --- the cached list of commands ------------------------------------------------------------------------------------


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
                self.assertEqual(len(os.listdir(folder)), 1)
                shutil.rmtree(folder)
        self.assertEqual(os.listdir(self.cwd), [])

    @unittest.skipUnless(os.name == "posix", "needs file modes")
    def test_modes(self):
        mask = os.umask(0)
        self.addCleanup(os.umask, mask)
        for _ in range(2):  # made anew, and replaced
            path = self.sync()
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
            self.assertEqual(os.stat(os.path.dirname(path)).st_mode & 0o777, 0o700)

    def test_each_endpoint_and_account_has_its_own(self):
        folder = os.path.dirname(self.sync())
        for settings in (
            {"key": "another"},
            {"endpoint": self.cloud.endpoint.replace("127.0.0.1", "localhost")},
            {"key": "", "secret": ""},
        ):
            before = set(os.listdir(folder))
            with mock.patch.dict(os.environ):
                self.configure(**settings)
                self.reply("listApis", {"count": 1, "api": [api_entry(("listZones",))]})
                self.good("--sync", "-q")
            self.assertEqual(len(set(os.listdir(folder)) - before), 1, settings)

    def test_users_of_one_name_in_two_domains_have_their_own(self):
        self.unset("key", "secret")
        self.configure(username="ann", password="x")
        paths = set()
        for domain in ("/one", "/two", ""):
            self.configure(domain=domain)
            paths.add(cs._cache_path(cs.CloudStack(**cs.read_config())))
        self.assertEqual(len(paths), 3)

    def test_nothing_secret_is_in_the_file_or_its_name(self):
        self.unset("key", "secret")
        user = self.cloud.users["admin"]
        self.configure(key=user.key, secret=user.secret)
        path = self.sync()
        with open(path, encoding="utf-8") as file:
            text = file.read()
        for secret in (user.key, user.secret):
            self.assertNotIn(secret, text)
            self.assertNotIn(secret[:12], path)
        self.assertNotIn("127.0.0.1", os.path.basename(path))

    def test_it_is_replaced_in_one_step(self):
        path = self.sync()
        with open(path, "rb") as file:
            before = file.read()
        with mock.patch("os.replace", side_effect=OSError("no")):
            code, out, err = self.main("--sync")
        self.assertEqual((code, out), (2, ""))
        self.assertIn("cannot write", err)
        with open(self.cache_file(), "rb") as file:  # and nothing half done lies beside it
            self.assertEqual(file.read(), before)

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
        contents = [
            ("another version", open_bytes(path)),
            ("empty", b""),
            ("cut short", good[: len(good) // 2]),
            ("cut short by little", good.rstrip(b"\n")[:-1]),
            ("cut short at the end of a line", b"\n".join(lines[: len(lines) // 2]) + b"\n"),
            ("without its last line", b"\n".join(good.rstrip(b"\n").split(b"\n")[:-1]) + b"\n"),
            ("a line missing", b"\n".join(lines[:5] + lines[6:])),
            ("a line twice", b"\n".join(lines[:6] + lines[5:])),
            ("twice", good + good),
            ("another letter", good.replace(b"Lists zones", b"Lists Zones")),
            ("not UTF-8", good.replace(b"Lists zones", b"Lists \xff\xfezones")),
            ("binary", bytes(bytearray(range(256))) * 10),
            ("nested for ever", b"[" * 200000),
            ("nested for ever in its middle", b"\n".join(lines[:zones] + [b"[" * 200000] + lines[zones + 1 :])),
        ]
        heads = (b"", b"0", b"nan", b"-inf", b"1" * 400, b"{}", b"[]", b"null", b'{"version": 1}')
        for number, first in enumerate(heads):
            contents.append(("another first line ({})".format(number), b"\n".join([first] + lines[1:])))
        for number, line in enumerate((b'["listZones",', b'["listZones"]', b'["listZones",7,7,7,7,7]', b'"listZones"')):
            content = b"\n".join(lines[:zones] + [line] + lines[zones + 1 :])
            contents.append(("another line ({})".format(number), content))
        for name, content in contents:
            with self.subTest(name):
                self.assertNotEqual(content, good)
                self.write(path, content)
                del self.cloud.requests[:]
                code, out, err = self.main("listZones", "name=nobody")
                self.assertEqual((code, out, err, self.asked), (0, "", "", ["listZones"]))
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
        self.assertEqual(self.asked, ["listApis"])

    @unittest.skipUnless(os.name == "posix", "needs a directory that is a file")
    def test_a_cache_that_cannot_be_kept_is_no_reason_to_fail(self):
        """Only --sync, which is asked for nothing else, fails."""
        os.environ["XDG_CACHE_HOME"] = self.write("file", "")
        self.assertIn('"zone"', self.good("listZones"))
        code, out, err = self.main("--sync")
        self.assertEqual((code, out), (2, ""))
        self.assertIn("cache", err)
        for args, part in ((["--list", "zone"], "listZones"), (["listZones", "--help"], "Lists zones")):
            code, out, err = self.main(*args)
            self.assertEqual(code, 0, err)
            self.assertIn(part, out)

    def test_a_file_in_whose_place_is_a_directory(self):
        path = self.sync()
        os.unlink(path)
        os.mkdir(path)
        self.assertIn('"zone"', self.good("listZones"))

    def test_an_ordinary_call_never_fetches_it(self):
        for args in (
            ["listZones"],
            ["listVirtualMachines", "-o", "table", "-c", "nosuch,name"],
            ["listvirtualmachines"],
            ["listZones", "--dry-run"],
            ["--complete=cs listZ"],
            ["--complete=cs stopVirtualMachine id="],
        ):
            self.main(*args)
            self.assertNotIn("listApis", self.asked)
        self.assertFalse(os.path.exists(os.path.join(self.home, ".cache")))
        self.sync()
        with later(400 * 86400):
            self.good("listZones")
        self.assertEqual(self.asked, ["listZones"])

    def test_a_role_without_listApis(self):
        self.configure("user")
        self.assertIn('"zone"', self.good("listZones"))
        self.assertIn("name", self.good("listVirtualMachines", "-o", "table"))
        for args in (["--sync"], ["--list"], ["listZones", "--help"]):
            with self.subTest(args):
                code, out, err = self.main(*args)
                self.assertEqual(code, 1)
                self.assertIn("listApis", err)
                self.assertNotIn("cs --sync, then", err)  # which is what just failed
        self.assertEqual(self.good("--complete=cs listZ"), "")

    def test_sync_says_what_it_did(self):
        code, out, err = self.main("--sync")
        self.assertEqual((code, out), (0, ""))
        self.assertEqual(err, "{} commands of {} are now known\n".format(len(COMMANDS), self.cloud.endpoint))
        self.assertEqual(self.main("--sync", "-q"), (0, "", ""))

    def test_sync_then_a_command(self):
        code, out, err = self.main("--sync", "listzones", "-q")
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(self.asked, ["listApis", "listZones"])

    def test_sync_refreshes(self):
        self.sync_as(("listZones",))
        self.assertIn("no command", self.usage("listVolumes"))
        self.sync()
        self.assertIn("{", self.good("listVolumes"))

    def test_a_server_without_any_commands_is_an_error_and_keeps_the_old_list(self):
        path = self.sync()
        before = open_bytes(path)
        for document in ({}, {"count": 0, "api": []}, {"count": 1, "api": [{"description": "nameless"}]}):
            self.reply("listApis", document)
            code, out, err = self.main("--sync")
            self.assertEqual(code, 1)
            self.assertIn("listApis", err)
            self.assertEqual(open_bytes(path), before)

    def test_entries_of_odd_shapes_do_no_harm(self):
        self.reply("listApis", {"count": 9, "api": [
            {"name": "listOdd", "params": None, "response": None, "description": None, "isasync": None},
            {"name": "listOdder", "params": [{}, None, 7, {"name": "x"}], "response": [{}, None, {"name": "a"}]},
            {"name": "listOddest", "params": [{"name": 7, "type": [], "length": "x", "description": {}}]},
            {"name": 7}, {"name": None}, {"name": ["listX"]}, "text", None, {"name": 'a"b'},
        ]})  # fmt: skip
        self.sync()
        for name in ("listOdd", "listOdder", "listOddest"):
            self.assertTrue(self.good(name, "--help").startswith(name + "\n"))
        self.assertIn("listOdder", self.good("--list", "odder"))
        self.assertIn("listOddest", self.good("--complete=cs listO"))
        self.reply("listOdd", {"ok": True})
        self.assertIn("ok", self.good("listOdd"))


class CatalogChecksTest(CloudCase):
    """What the server would ignore in silence, or refuse, stops a call before it is sent."""

    def setUp(self):
        super().setUp()
        self.path = self.known()

    def test_an_unknown_command(self):
        err = self.usage("listVirtualMachine")
        self.assertIn("no command 'listVirtualMachine'", err)
        self.assertIn("did you mean listVirtualMachines", err)
        self.assertIn("--sync", err)
        self.assertIn("--force", err)

    def test_a_command_like_no_other(self):
        err = self.usage("zzzzzz")
        self.assertIn("no command 'zzzzzz'", err)
        self.assertNotIn("did you mean", err)

    def test_an_unknown_parameter(self):
        err = self.usage("destroyVirtualMachine", "id=1", "expung=true")
        self.assertIn("destroyVirtualMachine has no parameter 'expung'; did you mean expunge?", err)
        self.assertIn("--sync", err)
        self.assertIn("--force", err)

    def test_all_that_is_wrong_is_told_at_once(self):
        err = self.usage("deployVirtualMachine", "nam=x", "zone=y", "templateid=t")
        for part in ("'nam'; did you mean name?", "'zone'; did you mean zoneid", "serviceofferingid, zoneid"):
            self.assertIn(part, err)
        self.assertNotIn("templateid,", err)
        err = self.usage("attachVolume")
        self.assertIn("id, virtualmachineid", err)

    def test_it_is_told_in_spite_of_quiet(self):
        self.assertIn("no parameter", self.usage("listZones", "nam=x", "-q"))

    def test_names_compare_without_regard_to_case(self):
        self.reply("listZones", {"ok": True}, {"ok": True})
        self.good("listZones", "NAME=x", "Available=true")
        self.good("listZones", "pageSize=5", "PAGE=1")
        self.assertEqual(self.sent(), {"pageSize": "5", "PAGE": "1"})

    def test_one_client_may_make_calls_with_and_without_a_job_in_turn(self):
        """A command that starts no job takes no id for one; the next line's may."""
        invocation = cs._Invocation()
        invocation.connect()
        self.addCleanup(invocation.client.close)
        seen = []
        for command in ("updateVirtualMachine", "stopVirtualMachine", "updateVirtualMachine"):
            call = cs._checked_call(invocation, [command, "id=1"])
            seen.append((call.command, invocation.client.get_setting("recover")))
        self.assertEqual(seen, [("updateVirtualMachine", False), ("stopVirtualMachine", True),
                                ("updateVirtualMachine", False)])  # fmt: skip

    def test_force_sends_it_all_the_same(self):
        self.reply("listZones", {"ok": True})
        self.good("listZones", "nam=x", "--force")
        self.assertEqual(self.sent(), {"nam": "x"})
        self.reply("inventThings", {"ok": True})
        self.good("--force", "inventThings", "a=b")
        self.assertEqual(self.asked[-1], "inventThings")
        code, out, err = self.main("startVirtualMachine", "--force")
        self.assertEqual((code, self.asked[-1]), (1, "startVirtualMachine"))

    def test_an_old_list_only_warns(self):
        for seconds, old in ((29 * 86400, False), (31 * 86400, True), (-86400, True)):
            with self.subTest(seconds), later(seconds):
                self.reply("listZones", {"ok": True})
                code, out, err = self.main("listZones", "nam=x")
                self.assertEqual(code, 0 if old else 2)
                self.assertIn("listZones has no parameter 'nam'", err)
                self.assertIn("--sync", err)
                self.assertEqual(err.startswith("Warning: "), old)
                self.cloud._scripts.clear()
        with later(31 * 86400):
            self.reply("listZones", {"ok": True})
            self.assertEqual(self.main("listZones", "nam=x", "-q")[2], "")
            self.good("listZones")  # nothing wrong, no warning

    def test_names_of_maps_are_known_by_their_base(self):
        self.reply("listVirtualMachines", {"ok": True}, {"ok": True})
        self.good("listVirtualMachines", "tags[0].key=env", "tags[0].value=prod", "Tags[11].key=x")
        self.good("listVirtualMachines", "details[0].memory=7")
        err = self.usage("listZones", "tagz[0].key=a", "details[0].x=1")
        self.assertIn("'tagz[0].key'", err)
        self.assertIn("'details[0].x'", err)

    def test_a_required_map_is_given_by_its_members(self):
        self.reply("createTags", {"success": True})
        self.good("createTags", "resourceids=1", "resourcetype=UserVm", "tags[0].key=a", "tags[0].value=b")
        self.assertIn("createTags needs tags", self.usage("createTags", "resourceids=1", "resourcetype=UserVm"))

    def test_a_required_parameter_without_a_value_is_missing(self):
        self.assertIn("stopVirtualMachine needs id", self.usage("stopVirtualMachine", "id="))
        self.assertIn("stopVirtualMachine needs id", self.usage("stopVirtualMachine", 'ID=""'))
        self.reply("listZones", {"ok": True})
        self.good("listZones", "name=")
        self.assertEqual(self.sent(), {"name": ""})

    def test_what_is_only_missing_is_no_matter_for_sync_or_force(self):
        err = self.usage("stopVirtualMachine")
        self.assertEqual(err, "cs: stopVirtualMachine needs id; see cs stopVirtualMachine --help\n")
        err = self.usage("stopVirtualMachine", "x=1")
        for part in ("needs id", "'x'", "--sync", "--force"):
            self.assertIn(part, err)

    def test_parameters_of_every_call_are_known(self):
        always = "response customjobid page pagesize expires signature signatureversion apikey sessionkey".split()
        for name in always + "ctxuserid ctxaccountid ctxstarteventid".split():
            with self.subTest(name):
                self.reply("listZones", {"ok": True})
                code, out, err = self.main("listZones", name + "=1", "json=false")
                self.assertEqual((code, err), (0, ""))

    def test_control_arguments_are_known(self):
        self.reply("listZones", {"count": 1, "zone": [{"id": "1"}]})
        self.good("listZones", "fetch_list=true", "fetch_result=false", "json=true")
        self.good("listZones", "opcode_name=command")

    def test_a_command_in_another_case(self):
        for name in ("listzones", "LISTZONES", "ListZones"):
            self.good(name)
            self.assertEqual(self.asked[-1], "listZones")
        self.assertIn("no parameter 'x'", self.usage("listzones", "x=y"))

    def test_a_case_that_fits_two_commands_is_not_guessed(self):
        self.path = self.sync_as(("listThings",), ("listthingS",))
        self.assertIn("no command", self.usage("LISTTHINGS"))
        self.reply("listthingS", {"ok": True})
        self.good("listthingS")

    def test_without_a_list_everything_is_sent(self):
        os.unlink(self.path)
        self.reply("inventThings", {"ok": True})
        self.good("inventThings", "nam=x")
        self.assertEqual(self.sent(), {"nam": "x"})

    def test_a_dry_run_is_checked_too(self):
        self.assertIn("no parameter", self.usage("listZones", "nam=x", "--dry-run"))
        self.assertIn("nam=x", self.good("listZones", "nam=x", "--dry-run", "--force"))
        self.assertEqual(self.asked, [])

    def test_login_and_waiting_need_no_entry(self):
        self.path = self.sync_as(("listZones",))
        self.reply("login", {"sessionkey": "x"})
        self.assertEqual(self.main("login", "username=a", "password=b")[0], 0)
        self.reply("queryAsyncJobResult", {"jobid": "j", "jobstatus": 1, "jobresult": {"ok": True}})
        self.assertIn("ok", self.good("--wait", "j"))

    def test_only_what_may_start_a_job_is_given_an_id_for_it(self):
        """By it a lost answer is found again; where the list says that there is no job, nothing is added."""
        cases = [("createSecurityGroup", "name=x", False), ("startVirtualMachine", "id=1", True)]
        for command, word, given in cases + [("inventThings", "--force", True)]:
            with self.subTest(command=command):
                self.reply(command, {"ok": True})
                self.assertEqual(self.main(command, word, "-q")[0], 0)
                self.assertEqual("customjobid" in self.cloud.requests[-1].params, given)
        os.unlink(self.path)
        self.reply("createSecurityGroup", {"ok": True})
        self.good("createSecurityGroup", "name=x")
        self.assertIn("customjobid", self.cloud.requests[-1].params)

    def test_names_that_are_patterns(self):
        for word in ("list.ones", "list[Z]ones=1", ".*=1", "(=1", "\\=1"):
            args = ("listZones", word) if "=" in word else (word,)
            self.assertIn("has no" if "=" in word else "no command", self.usage(*args))


class CommandHelpTest(CloudCase):
    """cs COMMAND --help and cs --list"""

    def test_the_list_is_fetched_once_and_kept(self):
        code, out, err = self.main("listZones", "--help")
        self.assertEqual((code, self.asked), (0, ["listApis"]))
        self.assertTrue(out.startswith("listZones\n  Lists zones.\n"), out)
        self.good("listVolumes", "--help")
        self.good("--list")
        self.assertEqual(self.asked, ["listApis"])

    def test_sync_with_help_fetches_it_again(self):
        self.sync()
        self.main("listZones", "--help", "--sync")
        self.main("--list", "--sync")
        self.assertEqual(self.asked, ["listApis", "listApis"])

    def test_what_a_command_takes_and_returns(self):
        self.reply("listApis", {"count": 1, "api": [{
            "name": "growThing", "description": "Makes a thing grow.", "isasync": True, "since": "4.2",
            "params": [
                {"name": "zeal", "type": "string", "length": 255, "required": False, "description": "how much"},
                {"name": "id", "type": "uuid", "length": 255, "required": True, "description": "the thing"},
                {"name": "note", "type": "string", "length": 4096, "required": False, "since": "4.9",
                 "description": "why"},
                {"name": "by", "type": "integer", "length": 255, "required": True, "description": "how far"},
                {"name": "safe", "type": "boolean", "required": True, "description": "slowly"},
            ],
            "response": [{"name": "id"}, {"name": "nic", "response": [{"name": "ip"}]}, {}],
        }]})  # fmt: skip
        self.assertEqual(
            self.good("growthing", "--help", "-q"),
            "growThing (since 4.2)\n"
            "  Makes a thing grow.\n"
            "  It starts a job, which is waited for unless --async.\n"
            "\n"
            "Required:\n"
            "  by (integer)  how far\n"
            "  id (uuid)  the thing\n"
            "  safe (boolean)  slowly\n"
            "\n"
            "Optional:\n"
            "  note (string, at most 4096, since 4.9)  why\n"
            "  zeal (string)  how much\n"
            "\n"
            "Returns: id, nic\n"
            "\n"
            "Example: cs growThing by=1 id=ID safe=true\n",
        )

    def test_the_example_of_every_command_is_one_that_passes_the_checks(self):
        self.sync()
        for name in COMMANDS:
            out = self.good(name, "--help")
            line = out.rstrip("\n").splitlines()[-1]
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
            self.assertEqual(self.good(*args), plain)
        self.assertEqual(self.asked, [])

    def test_an_unknown_command(self):
        self.sync()
        for name, near in (("listZone", "listZones"), ("nosuch", "")):
            err = self.usage(name, "--help")
            self.assertIn("no command {!r}".format(name), err)
            self.assertIn(near, err)
            self.assertIn("--list", err)

    def test_login_has_no_entry_where_the_server_lists_none(self):
        self.sync_as(("listZones",))
        err = self.usage("login", "--help")
        self.assertIn("'login'", err)

    def test_help_fits_the_terminal(self):
        self.sync()
        for columns in (60, 80, 200):
            code, out, err = self.on_terminal("deployVirtualMachine", "--help", columns=columns)
            self.assertEqual((code, err), (0, ""))
            longest = max(len(line) for line in out.splitlines() if not line.startswith("Example"))
            self.assertLessEqual(longest, columns)

    def test_list(self):
        self.sync()
        lines = self.good("--list").splitlines()
        self.assertEqual(len(lines), len(COMMANDS))
        self.assertEqual([line.split()[0] for line in lines], sorted(COMMANDS))
        for line in lines:
            self.assertIn(COMMANDS[line.split()[0]].description, line)
        self.assertEqual(len({re.match(r"\S+ +", line).end() for line in lines}), 1)  # aligned

    def test_list_with_words_gives_what_has_all_of_them_in_name_or_description(self):
        self.sync()
        names = [line.split()[0] for line in self.good("--list", "VOLUME", "attach").splitlines()]
        self.assertEqual(names, ["attachVolume"])
        self.assertEqual(self.good("volume", "--list", "attach"), self.good("--list", "volume", "attach"))
        self.assertIn("startVirtualMachine", self.good("--list", "Start"))

    def test_list_of_nothing(self):
        self.sync()
        code, out, err = self.main("--list", "zzz", "name=x")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("zzz", err)
        self.assertEqual(self.main("--list", "zzz", "-q"), (1, "", ""))

    def test_list_on_a_terminal_is_a_line_each(self):
        self.sync_as(dict(api_entry(("listWide",)), description="宽" * 300), dict(
            api_entry(("listLong",)), description="word\n" * 90))  # fmt: skip
        code, out, err = self.on_terminal("--list", columns=60)
        self.assertEqual((code, err, out.count("\n")), (0, "", 2))
        for line in out.splitlines():
            self.assertLessEqual(columns_of(line), 60)
        out = self.good("--list")  # not on one, all of it
        self.assertIn("宽" * 300, out)
        self.assertIn("word " * 89, out)

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
            self.assertEqual(re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + err), [])


# --- completion -----------------------------------------------------------------------------------------------------


class CompletionCase(CloudCase):
    """Completion as the shells' scripts ask for it."""

    def setUp(self):
        super().setUp()
        self.path = self.known()

    def completed(self, line):
        """[word, description] for each that `cs --complete=LINE` offers."""
        code, out, err = self.main("--complete=" + line)
        self.assertEqual((code, err), (0, ""))
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
        self.assertEqual(self.completed("cs listZo"), [["listZones", "Lists zones."]])
        self.assertEqual(sorted(self.words("cs ")), sorted(COMMANDS))
        self.assertEqual(sorted(self.words("cs -q --all ")), sorted(COMMANDS))
        self.assertEqual(self.words("cs -o table listZo"), ["listZones"])
        self.assertEqual(self.words("cs --output=table --region  listZo"), [])  # a region, not a command
        self.assertEqual(self.words("cs nosuch"), [])

    def test_a_command_in_another_case(self):
        self.assertEqual(self.words("cs listzo"), ["listZones"])
        self.assertIn("id=", self.words("cs startvirtualmachine "))

    def test_parameters_required_ones_first(self):
        words = self.words("cs deployVirtualMachine ")
        self.assertEqual(words[:2], ["serviceofferingid=", "zoneid="])
        self.assertEqual(words[2:], sorted(words[2:]))
        expected = [["available=", "true for zones that take new machines"]]
        self.assertEqual(self.completed("cs listZones avail"), expected)

    def test_parameters_that_are_given_are_not_offered_again(self):
        words = self.words("cs deployVirtualMachine zoneid=1 NAME=x ")
        self.assertNotIn("zoneid=", words)
        self.assertNotIn("name=", words)
        self.assertIn("templateid=", words)

    def test_booleans(self):
        self.assertEqual(self.words("cs stopVirtualMachine forced="), ["forced=true", "forced=false"])
        self.assertEqual(self.words("cs stopVirtualMachine forced=f"), ["forced=false"])
        self.assertEqual(self.words("cs listZones name="), [])

    def test_options(self):
        words = self.words("cs --")
        for option in "--output --region --columns --all --sync --help --configure".split():
            self.assertIn(option, words)
        self.assertNotIn("--complete", words)
        self.assertEqual(self.words("cs --outp"), ["--output"])
        self.assertEqual(self.words("cs listZones --col"), ["--color", "--columns"])

    def test_values_of_options(self):
        for line, expected in (
            ("cs -o ", list(cs.FORMATS)),
            ("cs listZones --output t", ["table", "text"]),
            ("cs listZones --output=ta", ["--output=table"]),
            ("cs --color ", ["auto", "always", "never"]),
            ("cs --completion z", ["zsh"]),
        ):
            with self.subTest(line):
                self.assertEqual(self.words(line), expected)

    def test_a_value_that_is_not_known_is_not_completed_as_a_command(self):
        for option in ("--timeout", "--retry", "--config", "--endpoint", "--wait", "--theme"):
            with self.subTest(option):
                self.assertEqual(self.words("cs {} l".format(option)), [])

    def test_regions(self):
        self.write(".cloudstack.ini", "[cloudstack]\nendpoint = x\n[lab]\n[lagoon]\n[my place]\n[$(touch x)]\n")
        self.write("work/cloudstack.ini", "[local]\n")
        for line, expected in (
            ("cs -r ", ["cloudstack", "lab", "lagoon", "local"]),
            ("cs listZones --region lag", ["lagoon"]),
            ("cs --region=la", ["--region=lab", "--region=lagoon"]),
        ):
            with self.subTest(line):
                self.assertEqual(self.words(line), expected)
        path = self.write("other.ini", "[elsewhere]\n")
        os.environ["CLOUDSTACK_CONFIG"] = path
        self.assertEqual(self.words("cs -r else"), ["elsewhere"])
        os.environ.pop("CLOUDSTACK_CONFIG")
        self.assertEqual(self.words("cs --config {} -r else".format(path)), ["elsewhere"])

    def test_columns(self):
        for line, expected in (
            ("cs listVirtualMachines -c instancen", ["instancename"]),
            ("cs listVirtualMachines --columns instancen", ["instancename"]),
            ("cs listVirtualMachines --sort instancen", ["instancename"]),
            ("cs listVirtualMachines --columns=instancen", ["--columns=instancename"]),
            ("cs listVirtualMachines -c id,instancen", ["id,instancename"]),
            ("cs listVirtualMachines --columns=id,instancen", ["--columns=id,instancename"]),
            ("cs listVirtualMachines -c nic.ipa", ["nic.ipaddress"]),
            ("cs -o table listvirtualmachines state=Running -c instancen", ["instancename"]),
            ("cs -c instancen", []),
        ):
            with self.subTest(line):
                self.assertEqual(self.words(line), expected)

    def test_the_line_chooses_the_region(self):
        user = self.cloud.users["user"]
        self.option(role_lacks=frozenset())
        ini = "[lab]\nendpoint = {}\nkey = {}\nsecret = {}\n".format(self.cloud.endpoint, user.key, user.secret)
        self.write(".cloudstack.ini", ini)
        self.reply("listApis", {"count": 1, "api": [api_entry(("onlyInTheLab", "depth"))]})
        self.good("--sync", "-q", "-r", "lab")
        self.assertEqual(self.words("cs -r lab only"), ["onlyInTheLab"])
        self.assertEqual(self.words("cs onlyInTheLab --region=lab d"), ["depth="])
        self.assertEqual(self.words("cs only"), [])

    def test_ids_with_names_beside_them(self):
        machine = self.machine()
        self.assertEqual(self.completed("cs stopVirtualMachine id=" + machine[:6]), [["id=" + machine, "web-01"]])
        self.assertEqual(self.asked, ["listVirtualMachines"])
        rows = self.completed("cs listVolumes virtualmachineid=")
        self.assertIn(["virtualmachineid=" + machine, "web-01"], rows)

    def test_which_list_gives_the_ids(self):
        for line, command in (
            ("cs deployVirtualMachine zoneid=", "listZones"),
            ("cs deployVirtualMachine templateid=", "listTemplates"),
            ("cs deployVirtualMachine serviceofferingid=", "listServiceOfferings"),
            ("cs deployVirtualMachine networkids=", "listNetworks"),
            ("cs deployVirtualMachine hostid=", "listHosts"),
            ("cs deleteSnapshot id=", "listSnapshots"),
            ("cs listVolumes id=", "listVolumes"),
            ("cs attachVolume id=", "listVolumes"),
            ("cs activateProject id=", "listProjects"),
            ("cs createTags resourceids=", None),
            ("cs listZones id=", "listZones"),
        ):
            with self.subTest(line):
                self.forget_ids()
                del self.cloud.requests[:]
                words = self.words(line)
                self.assertEqual(self.asked, [command] if command else [])
                if command not in (None, "listSnapshots"):
                    self.assertRegex(words[0], r"\A\w+=[0-9a-f-]{36}\Z")

    def test_several_ids(self):
        first, second = self.machine("web-01"), self.machine("db-01")
        line = "cs listVirtualMachines ids={},{}".format(first, second[:6])
        self.assertEqual(self.words(line), ["ids={},{}".format(first, second)])

    def test_ids_are_remembered_for_a_minute(self):
        line = "cs stopVirtualMachine id=" + self.machine()[:6]
        now = time.time()
        with mock.patch("time.time", lambda: now):
            expected = self.words(line)
            self.assertEqual(len(expected), 1)
            self.assertEqual(self.words(line), expected)
            self.assertEqual(self.words("cs startVirtualMachine id=" + self.machine()[:6]), expected)
        self.assertEqual(self.asked, ["listVirtualMachines"])
        for moved, times in ((59, 1), (61, 2)):
            with mock.patch("time.time", lambda moved=moved: now + moved):
                self.assertEqual(self.words(line), expected)
            self.assertEqual(self.asked, ["listVirtualMachines"] * times)

    @unittest.skipUnless(os.name == "posix", "needs file modes")
    def test_remembered_ids_are_private_too(self):
        self.words("cs stopVirtualMachine id=")
        folder = os.path.dirname(self.path)
        self.assertEqual(len(os.listdir(folder)), 2)
        for name in os.listdir(folder):
            self.assertEqual(os.stat(os.path.join(folder, name)).st_mode & 0o777, 0o600)

    def test_damaged_remembered_ids_are_asked_for_again(self):
        line = "cs stopVirtualMachine id=" + self.machine()[:6]
        expected = self.words(line)
        folder = os.path.dirname(self.path)
        path = next(os.path.join(folder, name) for name in os.listdir(folder) if not self.path.endswith(name))
        now = str(int(time.time()))
        for content in (
            b"", b"{", b"[]", b"7", b"{}", b"\xff", b"[" * 100000, b'{"at": "now", "rows": []}',
            '{{"at": {}, "rows": [1]}}'.format(now).encode(), '{{"at": {}, "rows": [[1, 2]]}}'.format(now).encode(),
            '{{"at": {}, "rows": 7}}'.format(now).encode(), '{{"at": {}}}'.format(now).encode(),
        ):  # fmt: skip
            with self.subTest(content[:30]):
                self.write(path, content)
                self.assertEqual(self.words(line), expected)

    def test_all_but_ids_comes_from_what_is_cached(self):
        self.write(".cloudstack.ini", "[lab]\n")
        lines = "cs |cs list|cs deployVirtualMachine |cs stopVirtualMachine forced=|cs -r |cs -o |cs --"
        for line in lines.split("|") + ["cs listVirtualMachines -c ", "cs listVirtualMachines name="]:
            self.assertTrue(self.words(line) or line.endswith("name="), line)
        self.assertEqual(self.asked, [])

    def test_without_a_list_options_and_regions_are_completed_all_the_same(self):
        os.unlink(self.path)
        self.write(".cloudstack.ini", "[lab]\n")
        self.assertEqual(self.words("cs listZo"), [])
        self.assertEqual(self.words("cs stopVirtualMachine id="), [])
        self.assertEqual(self.words("cs -r la"), ["lab"])
        self.assertEqual(self.words("cs --outp"), ["--output"])
        self.unset("endpoint", "key", "secret")
        self.assertEqual(self.words("cs listZo"), [])
        self.assertEqual(self.words("cs -r la"), ["lab"])
        self.assertEqual(self.asked, [])

    def test_a_configuration_that_cannot_be_used_gives_nothing(self):
        for settings in (
            {"timeout": "abc"}, {"endpoint": "nonsense"}, {"secret": ""}, {"config": "/no/such/file"},
            {"username": "x"}, {"verify": "/no/such/file"}, {"dangerous_no_tls_verify": "nope"},
        ):  # fmt: skip
            with mock.patch.dict(os.environ):
                self.configure(**settings)
                for line in ("cs listZo", "cs stopVirtualMachine id=", "cs listZones -c na", "cs -r x"):
                    self.main("--complete=" + line)  # whatever comes of it, no traceback

    def test_a_server_that_fails_gives_nothing(self):
        html = Answer(200, "<html>" + EVIL_TITLE)
        things = [1, None, "x", [2], {"id": 7}, {"id": None}]
        for name, step in (
            ("an error", Answer(431, {"r": {"errorcode": 431, "errortext": "no"}})),
            ("a page", html),
            ("dropped", DROP),
            ("no list", Answer(200, {"r": {"success": True}})),
            ("a list of other things", Answer(200, {"r": {"count": 6, "x": things}})),
            ("nothing", Answer(200, {"r": {}})),
            ("rate limit", Answer(429, {"r": {"errorcode": 429, "errortext": "retry after 9000 ms"}})),
        ):
            with self.subTest(name):
                self.configure(retry="3")
                del self.cloud.requests[:]
                self.cloud.script("listVirtualMachines", step)
                self.assertEqual(self.words("cs stopVirtualMachine id="), [])
                self.assertEqual(self.asked, ["listVirtualMachines"])
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
            self.assertEqual(self.words("cs stopVirtualMachine id="), [])
        self.assertFalse(release.is_set())
        self.assertEqual(self.asked, ["listVirtualMachines"])

    def test_a_log_in_that_fails_is_not_tried_again(self):
        self.unset("key", "secret")
        self.configure(username="admin", password="x", domain="/", retry="3")
        self.sync_anonymously()
        busy = Answer(503, {"loginresponse": {"errorcode": 503, "errortext": "busy"}})
        self.cloud.script("login", busy, busy, busy, busy)
        self.assertEqual(self.words("cs stopVirtualMachine id="), [])
        self.assertEqual(self.asked, ["login"])

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
        self.assertEqual(self.words("cs stopVirtualMachine id=" + machine[:6]), ["id=" + machine])
        self.assertEqual(self.asked[:2], ["login", "listVirtualMachines"])

    HOSTILE = (
        "$(touch pwned)", "`touch pwned`", "$HOME", "; touch pwned", "a b", "a\nb", "a\tb", "'", '"', "a'b", "\\", "~",
        "~root", "*", "?", "{a,b}", "a|b", "a&b", "<x", ">x", "(a)", "!x", "#x", "^x", "a\x00b", "\x1b[2J", "\x9b2J",
        "\u202eabc", "ü", "\ud800", "", " ", "x" + EVIL_TITLE,
    )  # fmt: skip

    def test_no_word_is_offered_that_a_shell_could_evaluate(self):
        safe = re.compile(r"[A-Za-z0-9_.,:/@%+=\[\]-]+\Z")
        entries = [dict(api_entry((name, "id")), description=name) for name in self.HOSTILE if name]
        params = ["id!"] + [name + "id" for name in self.HOSTILE]
        entry = api_entry(["stopVirtualMachine"] + params)
        entry["response"] = [{"name": name} for name in self.HOSTILE]
        self.path = self.sync_as(entry, ("listVirtualMachines",), *entries)
        rows = [{"id": name, "name": name} for name in self.HOSTILE]
        rows += [{"id": "good-{}".format(number), "name": name} for number, name in enumerate(self.HOSTILE)]
        ini = "".join("[{}]\n".format(name) for name in self.HOSTILE if name.strip() and name.isprintable())
        self.write(".cloudstack.ini", ini)
        self.reply("listVirtualMachines", {"count": len(rows), "virtualmachine": rows})
        stop = "cs stopVirtualMachine "
        for line in ("cs ", stop, stop + "id=", stop + "-c ", "cs -r "):
            with self.subTest(line):
                code, out, err = self.main("--complete=" + line)
                self.assertEqual((code, err), (0, ""))
                for row in out.splitlines():
                    self.assertRegex(row.split("\t")[0], safe)
                    self.assertLess(row.count("\t"), 2)
                self.assertEqual(re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out), [])
        self.assertEqual(len(self.words("cs stopVirtualMachine id=good")), len(self.HOSTILE))

    def test_what_stands_on_the_line_is_never_evaluated(self):
        for line in (
            "cs $(touch pwned) list", "cs `touch pwned` ", "cs -r $(touch pwned) list", "cs listZones id=$(touch pwned",
            "cs listZones name='", 'cs listZones name="a b', "cs listZones -c $(x),", "cs \\", "cs -c", "cs -r", "cs -",
            "cs --=", "cs --output=", "cs --nosuch=", "cs --nosuch x ", "cs -o nonsense list", "", "cs", " ", "cs\t",
            "cs\nlistZ", "cs -- list", "cs =", "cs listZones =", "cs listZones =x", "cs --complete=x ",
            "cs listZones \x1b[2J", "cs listZones \udcff=", "cs --help l", "cs --config @ l", "cs " + "x" * 100000,
            "cs listVirtualMachines tags[0].", "cs listVirtualMachines ids=,,", "cs \u00fc", "cs -r '", "cs --sort",
        ):  # fmt: skip
            with self.subTest(line[:40]):
                code, out, err = self.main("--complete=" + line)
                self.assertEqual(re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out), [])
                self.assertIn(code, (0, 2))
        self.assertEqual(os.listdir(self.cwd), [])

    def test_long_descriptions_are_cut(self):
        entry = dict(api_entry(("listLong",)), description="word " * 1000)
        self.path = self.sync_as(entry)
        self.assertLessEqual(len(self.completed("cs listL")[0][1]), 80)

    def test_the_scripts(self):
        for shell in ("bash", "zsh", "fish"):
            script = self.good("--completion", shell)
            self.assertIn("--complete=", script)
            for evaluating in ("eval ", "compgen", "-W", "print -P"):
                self.assertNotIn(evaluating, script)
        self.assertEqual(self.asked, [])
        self.usage("--completion", "tcsh")


def have_terminals():
    try:
        import fcntl
        import pty
        import termios

        return bool(pty.openpty and fcntl and termios.TIOCSWINSZ) and os.path.isdir("/proc")
    except (ImportError, AttributeError):
        return False


class Typed:
    """A process on a pseudo-terminal of its own, and what is typed there."""

    def __init__(self, argv, env, columns=80, rows=24):
        import fcntl
        import pty
        import struct
        import termios

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
                raise AssertionError("{} was not written: {}".format(words, self.output))
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
        stub = STUB.format(python=shlex.quote(sys.executable), cs=shlex.quote(CS_PATH))
        self.write("bin/cs", stub, 0o755)
        path = os.path.join(self.home, "bin") + os.pathsep + os.environ["PATH"]
        self.env = dict(os.environ, PATH=path, TERM="xterm", LC_ALL="C.UTF-8", PS1="$ ", FISH_UNIT_TESTS_RUNNING="1")
        self.write(".cloudstack.ini", "[lab]\nendpoint = http://cloud.invalid/\n[lagoon]\n[$(touch pwned)]\n")

    def shell(self, name):
        found = shutil.which(name)
        if found is None:
            self.skipTest("{} is not installed".format(name))
        return found

    def start(self, argv, *setup):
        shell = Typed(argv, self.env)
        self.addCleanup(shell.close)
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
        with open(path, encoding="utf-8") as file:
            words = file.read().split("\n")[:-1]
        os.unlink(path)
        return words

    def assertCompletes(self, shell):
        """What every shell must do."""
        machine = self.machine()
        for line, expected in (
            ("cs deployV\t templ\tx", ["deployVirtualMachine", "templateid=x"]),
            ("cs stopVirtualMachine forced=f\t id={}\t".format(machine[:6]),
             ["stopVirtualMachine", "forced=false", "id=" + machine]),
            ("cs listZones -r lag\t --output=ta\t", ["listZones", "-r", "lagoon", "--output=table"]),
            ("true; A=1 cs listZones -c internald\t", ["listZones", "-c", "internaldns1"]),
        ):  # fmt: skip
            self.assertEqual(self.typed(shell, line), expected)

    def hostile(self):
        """Machines and commands with names that would like to be evaluated."""
        names = ("$(touch pwned)", "`touch pwned`", "x;touch pwned", "a' b", 'a" b', "%F{red}%(?..)", EVIL_TITLE)
        names += ("..", "é")
        rows = [{"id": "good-{}-{}".format(letter, letter), "name": name} for letter, name in zip("abcdefghi", names)]
        rows += [{"id": name, "name": "bad"} for name in names]
        self.path = self.sync_as(("stopVirtualMachine", "id!"), ("listVirtualMachines",), *[(name,) for name in names])
        self.reply("listVirtualMachines", {"count": len(rows), "virtualmachine": rows})

    def assertUnharmed(self, shell):
        """Nothing was evaluated, and no escape sequence of the server's reached the terminal."""
        self.assertFalse([name for name in os.listdir(self.cwd) if name.startswith("pwned")])
        self.assertFalse([name for name in os.listdir(self.home) if name.startswith("pwned")])
        self.assertNotIn(EVIL_TITLE, shell.text)


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
        self.assertEqual(self.typed(shell, "good-c\t"), ["stopVirtualMachine", "id=good-c-c"])
        self.assertUnharmed(shell)

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
        self.assertEqual((code, out.decode().split()), (0, ["true", "forced=true"]), err)


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
        shell = self.zsh()
        self.assertCompletes(shell)

    def test_nothing_is_evaluated(self):
        self.hostile()
        shell = self.zsh()
        shell.type("cs stopVirtualMachine id=good-\t\t")
        shell.wait_for(b"%F{red}%(?..)")
        shell.type("\x15")
        self.assertEqual(
            self.typed(shell, "cs stopVirtualMachine id=good-c\t"), ["stopVirtualMachine", "id=good-c-c"]
        )
        self.assertIn("$(touch pwned)", shell.text)
        self.assertUnharmed(shell)


class FishCompletionTest(ShellCompletionCase):
    def setUp(self):
        super().setUp()
        self.fish = self.shell("fish")
        os.makedirs(os.path.join(self.home, ".config", "fish", "completions"))
        self.write(".config/fish/completions/cs.fish", self.good("--completion", "fish"))

    def test_it_completes(self):
        self.assertCompletes(self.start([self.fish, "-i"]))

    def test_nothing_is_evaluated(self):
        """By the shell's own command for it."""
        self.hostile()
        program = 'complete -C "cs stopVirtualMachine id="; complete -C "cs "'
        code, out, err = Child([self.fish, "-c", program], env=self.env).finish()
        self.assertEqual(code, 0, err)
        out = out.decode("utf-8")
        self.assertIn("id=good-a-a\t$(touch pwned)\n", out)
        self.assertIn("id=good-c-c\t", out)
        self.assertIn("stopVirtualMachine\tDoes stopVirtualMachine.\n", out)
        self.assertNotIn("\x1b", out)
        self.assertFalse([name for name in os.listdir(self.cwd) + os.listdir(self.home) if name.startswith("pwned")])


# --- formats --------------------------------------------------------------------------------------------------------


class FormatsTest(CloudCase):
    ROWS = [
        {"id": "1", "name": "web", "size": 9, "on": True,
         "tags": [{"key": "a", "value": "1"}, {"key": "b", "value": "2"}],
         "nic": [{"ipaddress": "10.0.0.1"}, {"ipaddress": "10.0.0.2"}]},
        {"id": "2", "name": 'x"y,z', "size": 10, "on": False, "nic": []},
        {"id": "3", "name": "tab\there\nline\\end\r", "size": None, "details": {"a": {"b": 1}}},
    ]  # fmt: skip

    def rows(self, *rows, **more):
        """The rows that listThings answers with, once for each `times`."""
        rows = list(rows) or self.ROWS
        for _ in range(more.get("times", 1)):
            self.reply("listThings", {"count": len(rows), "thing": rows})

    def shown(self, *args):
        return self.good("listThings", *args)

    def test_the_option_beats_the_environment_beats_the_ini_file(self):
        self.rows({"id": "1"}, times=6)
        self.assertEqual(json.loads(self.shown()), {"count": 1, "thing": [{"id": "1"}]})
        user = self.cloud.users["admin"]
        text = "[{}]\nendpoint = {}\nkey = {}\nsecret = {}\noutput = {}\n"
        keys = (self.cloud.endpoint, user.key, user.secret)
        text = text.format("cloudstack", *keys + ("csv",)) + text.format("lab", *keys + ("text",))
        self.write(".cloudstack.ini", text)
        self.unset("endpoint", "key", "secret")
        self.assertEqual(self.shown(), "id\r\n1\r\n")
        self.assertEqual(self.shown("-r", "lab"), "1\n")
        self.configure("admin", output="Table")
        self.assertEqual(self.shown(), "id\n1\n")
        self.assertEqual(self.shown("-o", "jsonl"), '{"id": "1"}\n')
        self.assertEqual(self.shown("--output=CSV"), "id\r\n1\r\n")

    def test_a_bad_value_is_told_before_anything_is_sent(self):
        self.assertIn("xml", self.usage("listZones", "-o", "xml"))
        self.usage("listZones", "-o")
        self.usage("listZones", "--output=")
        self.configure(output="xml")
        for args in (["listZones"], ["--wait", "1"], ["--sync"], ["--list"]):
            err = self.usage(*args)
            self.assertIn("output: 'xml'", err)
            for name in cs.FORMATS:
                self.assertIn(name, err)
        self.rows({"id": "1"})
        self.assertEqual(self.shown("-o", "text"), "1\n")  # what the option says, the setting need not

    def test_json(self):
        self.rows()
        self.assertEqual(json.loads(self.shown("-o", "json")), {"count": 3, "thing": self.ROWS})

    def test_jsonl_is_a_row_a_line(self):
        self.rows()
        lines = self.shown("-o", "jsonl").split("\n")
        self.assertEqual([json.loads(line) for line in lines[:-1]], self.ROWS)
        self.assertEqual(lines[-1], "")

    def test_csv_is_read_back_by_the_csv_module(self):
        self.rows()
        out = self.shown("-o", "csv")
        read = list(csv.reader(io.StringIO(out, newline="")))
        self.assertEqual(read[0][:2], ["id", "name"])
        self.assertEqual(sorted(read[0]), sorted({key for row in self.ROWS for key in row}))
        for row, line in zip(self.ROWS, read[1:]):
            cells = dict(zip(read[0], line))
            self.assertEqual((cells["id"], cells["name"]), (row["id"], row["name"]))
            for name in ("tags", "details"):
                if name in row:
                    self.assertEqual(json.loads(cells[name]), row[name])
        cells = dict(zip(read[0], read[1]))
        self.assertEqual((cells["size"], cells["on"], cells["details"]), ("9", "true", ""))

    def test_csv_is_what_RFC_4180_says(self):
        """Lines end in CRLF, the last one too; quotes where they are needed, and doubled inside; line breaks stay."""
        self.rows({"id": "1", "name": 'a"b'}, {"id": "x,y", "name": "l1\nl2"}, {"id": "p q", "name": ""})
        self.assertEqual(self.shown("-o", "csv"), 'id,name\r\n1,"a""b"\r\n"x,y","l1\nl2"\r\np q,\r\n')

    def test_text_is_values_between_tabs_and_is_read_back(self):
        self.rows()
        lines = self.shown("-o", "text", "-c", "id,name,size,on,nosuch", "-q").split("\n")
        self.assertEqual(lines.pop(), "")

        def read(cell):
            return re.sub(r"\\(.)", lambda found: {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}[found.group(1)], cell)

        cells = [[read(cell) for cell in line.split("\t")] for line in lines]
        expected = [[row["id"], row["name"], "" if row["size"] is None else str(row["size"])] for row in self.ROWS]
        self.assertEqual([row[:3] for row in cells], expected)
        self.assertEqual([row[3:] for row in cells], [["true", ""], ["false", ""], ["", ""]])

    def test_text_of_a_shell_s_read(self):
        """An empty cell in the middle is still a cell, and each row a line."""
        self.rows({"id": "1", "name": "", "state": "up"})
        self.assertEqual(self.shown("-o", "text", "-c", "id,name,state"), "1\t\tup\n")

    def test_a_table_without_a_terminal_is_never_cut(self):
        long = "x" * 3000
        self.rows({"id": "1", "name": long, "state": "Running"}, {"id": "22", "name": "n", "state": "宽"})
        with mock.patch.dict(os.environ, COLUMNS="40"):
            lines = self.shown("-o", "table").split("\n")
        self.assertEqual(lines[0], "id  name" + " " * 2998 + "state")
        self.assertEqual(lines[1], "1   " + long + "  Running")
        self.assertEqual(lines[2], "22  n" + " " * 3001 + "宽")
        self.assertEqual(lines[3], "")

    def test_objects_and_job_results(self):
        """What stands inside is shown, in every format."""
        machine = {"id": "1", "name": "web", "state": "Running"}
        for name, documents in (
            ("an object", [("getThing", {"thing": machine})]),
            ("a bare object", [("getThing", machine)]),
            ("a job", [("getThing", {"jobid": "j"}), ("queryAsyncJobResult", {
                "jobid": "j", "jobstatus": 1, "jobresult": {"thing": machine}})]),
        ):  # fmt: skip
            with self.subTest(name):
                for shape, expected in (
                    ("table", "id  name  state\n1   web   Running\n"),
                    ("csv", "id,name,state\r\n1,web,Running\r\n"),
                    ("text", "1\tweb\tRunning\n"),
                    ("jsonl", '{"id": "1", "name": "web", "state": "Running"}\n'),
                ):
                    for command, document in documents:
                        self.reply(command, document)
                    self.assertEqual(self.good("getThing", "-o", shape), expected)
        self.reply("queryAsyncJobResult", {"jobid": "j", "jobstatus": 1, "jobresult": {"thing": machine}})
        self.assertEqual(self.good("--wait", "j", "-o", "text", "-c", "name"), "web\n")

    def test_a_table_of_a_job_s_result_shows_the_thing_and_not_the_job(self):
        machine = {"id": "1", "name": "web", "jobid": "j", "jobstatus": 0, "ipaddress": "10.0.0.1",
                   "nic": [{"ipaddress": "10.0.0.1"}]}  # fmt: skip
        self.reply("startThing", {"jobid": "j", "id": "1"})
        self.reply("queryAsyncJobResult", {"jobid": "j", "jobstatus": 1, "jobresult": {"thing": machine}})
        self.assertEqual(self.good("startThing", "-o", "table"), "id  name  nic.ipaddress\n1   web   10.0.0.1\n")
        self.reply("startThing", {"jobid": "j", "id": "1"})
        self.assertEqual(self.good("startThing", "-o", "table", "--async"), "id  jobid\n1   j\n")
        job = {"jobid": "j", "jobstatus": 0, "cmd": "x.StartVMCmd"}
        self.reply("listAsyncJobs", {"count": 1, "asyncjobs": [job]})
        self.assertEqual(self.good("listAsyncJobs", "-o", "text"), "j\t0\tx.StartVMCmd\n")
        self.reply("getThing", {"thing": machine})
        self.assertIn("ipaddress", self.good("getThing", "-o", "csv").split("\r\n")[0].split(","))

    def test_an_answer_that_only_says_success(self):
        for document in ({"success": True}, {"success": "true", "displaytext": ""}):
            for shape in ("table", "csv", "text"):
                self.reply("deleteThing", document)
                self.assertIn("true", self.good("deleteThing", "-o", shape))

    def test_a_job_that_is_not_waited_for_shows_its_id_in_every_format(self):
        for shape in cs.FORMATS:
            self.reply("startThing", {"jobid": "job-77"})
            self.assertIn("job-77", self.good("startThing", "--async", "-o", shape))

    def test_a_list_of_plain_values(self):
        for shape, expected in (
            ("table", "value\na\n7\n"), ("csv", "value\r\na\r\n7\r\n"), ("text", "a\n7\n"), ("jsonl", '"a"\n7\n'),
        ):  # fmt: skip
            self.rows("a", 7)
            self.assertEqual(self.shown("-o", shape), expected)

    def test_empty_lists_print_nothing_but_json_s_own(self):
        for document in ({}, {"count": 0}, {"count": 0, "thing": []}):
            for shape in ("table", "csv", "text", "jsonl"):
                with self.subTest("{} {}".format(document, shape)):
                    self.reply("listThings", document)
                    self.assertEqual(self.shown("-o", shape), "")
                    self.reply("listThings", document)
                    expected = "id\r\n" if shape == "csv" else ""
                    self.assertEqual(self.shown("-o", shape, "-c", "id", "--sort", "name"), expected)

    def test_csv_of_an_empty_list_keeps_the_header_that_was_asked_for(self):
        for document in ({}, {"count": 0}, {"count": 0, "thing": []}):
            for args in ((), ("--all",)):
                self.reply("listThings", document)
                self.assertEqual(self.shown("-o", "csv", "-c", "id,nic.0.ip", *args), "id,nic.0.ip\r\n")

    def test_odd_rows_do_no_harm(self):
        for rows in (
            [{}], [{}, {"id": "1"}], [None], [[]], [[1, [2, [3]]]], [{"id": 1}, "text", None, [1], {"name": "n"}, 7.5],
            [{"id": {"id": {"id": 1}}}], [{"": "nameless"}], [{"id": "a\0b"}], [{"a.b": 1, "a": {"b": 2}}],
            [{"id": 10**400}], [{"id": 1e308}], [{"id": -0.0}], [{"name": "\u202e\u200b\ud7ff\uffff"}],
            [{"n{}".format(number): number for number in range(500)}], [{"value": [None, True, {"x": 1}]}],
        ):  # fmt: skip
            for shape in cs.FORMATS:
                with self.subTest("{} {}".format(str(rows)[:60], shape)):
                    self.rows(*rows, times=2)
                    self.shown("-o", shape, "-c", "id,a.b,name.0.x", "--sort", "-id", "-q")
                    code, out, err = self.on_terminal("listThings", "-o", shape, "--sort", "name", "-q", columns=20)
                    self.assertEqual((code, err), (0, ""))

    def test_rows_nested_as_deep_as_json_is_read_do_no_harm(self):
        """Whatever can be read can be shown, or is an error; never a traceback."""
        for depth in (300, 900):
            for opening, closing in (("[", "]"), ('{"a":', "}")):
                deep = opening * depth + '"leaf"' + closing * depth
                body = '{"r":{"count":1,"thing":[{"id":"1","name":' + deep + "}]}}"
                for shape in cs.FORMATS:
                    with self.subTest("{} {} {}".format(depth, opening, shape)):
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
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(result.raw.replace(b'"', b""), b"id,name\r\na\0b,x\\ud800y\r\n")  # quoted before 3.11

    def test_non_ascii_on_an_ascii_standard_output(self):
        for shape in ("table", "jsonl"):
            self.rows({"id": "1", "name": "zürich 宽"})
            result = self.cs("listThings", "-o", shape, env={"PYTHONIOENCODING": "ascii"})
            self.assertEqual((result.returncode, result.stderr), (0, ""))
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
            ({"count": 3, "thing": [row] * 3}, [], ""),
            ({"count": 2, "thing": [row] * 3}, [], ""),
            ({"thing": [row] * 3}, [], ""),
            ({"count": "1148", "thing": [row]}, [], ""),
            ({"count": 1148}, [], ""),
            ({"count": 1148, "name": "no list"}, [], ""),
        ):
            with self.subTest("{} {}".format(document, args)):
                self.reply("listThings", document)
                code, out, err = self.main("listThings", *args)
                self.assertEqual((code, err), (0, told))

    def test_all_is_fetch_list(self):
        self.option(default_page_size=10)
        code, out, err = self.main("listVirtualMachines", "-o", "text", "-c", "name")
        self.assertEqual((code, out.count("\n"), err), (0, 10, "10 of 32 shown; --all for the rest\n"))
        for args in (["--all"], ["fetch_list=true"], ["--all", "pagesize=7"]):
            for shape in ("text", "jsonl", "table", "csv"):
                out = self.good("listVirtualMachines", "-o", shape, "-c", "name", *args)
                self.assertEqual(out.count("\n"), 32 + (shape in ("table", "csv")), (args, shape))
            rows = json.loads(self.good("listVirtualMachines", *args))
            self.assertEqual(len(rows), 32)
        self.reply("getThing", {"thing": {"id": "1"}})
        self.assertEqual(json.loads(self.good("getThing", "--all")), {"thing": {"id": "1"}})

    def test_jsonl_of_a_long_list_is_written_as_it_arrives(self):
        """The second page is given only after the row of the first has come out of the process."""
        arrived = threading.Event()
        self.addCleanup(arrived.set)

        def second(record):
            self.assertEqual(record.params["page"], "2")
            return Answer(200, {"r": {"count": 2, "thing": [{"id": "2" if arrived.wait(20) else "too late"}]}})

        self.cloud.script("listThings", Answer(200, {"r": {"count": 2, "thing": [{"id": "1"}]}}), second, second)
        child = Child([sys.executable, CS_PATH, "listThings", "--all", "-o", "jsonl"], env=dict(os.environ))
        self.addCleanup(child.end)
        first = child.stdout.readline()
        arrived.set()
        self.assertEqual((first,) + child.finish(), (b'{"id": "1"}\n', 0, b'{"id": "2"}\n', b""))

    def test_jsonl_of_a_long_list_keeps_a_page_or_two(self):
        import gc

        alive = []

        def page(record):
            gc.collect()
            alive.append(sum(type(thing) is dict and "is-a-row" in thing for thing in gc.get_objects()))
            number = int(record.params["page"])
            rows = [{"is-a-row": [], "id": str(number * 100 + row)} for row in range(100 if number < 12 else 1)]
            return Answer(200, json.dumps({"r": {"thing": rows}}), {"Content-Type": "application/json"})

        self.cloud.script("listThings", *[page] * 13)
        out = self.good("listThings", "--all", "-o", "jsonl", "pagesize=100")
        self.assertEqual(out.count("\n"), 1101)
        self.assertLessEqual(max(alive), 300)

    def test_jsonl_of_a_list_that_breaks_off_shows_what_arrived(self):
        self.cloud.script("listThings", Answer(200, {"r": {"count": 2, "thing": [{"id": "1"}]}}))
        self.say_error("listThings", 530, "no more")
        code, out, err = self.main("listThings", "--all", "-o", "jsonl")
        self.assertEqual((code, out.split("\n")[0]), (1, '{"id": "1"}'))
        self.assertIn("no more", err)

    def test_jsonl_of_what_is_no_list(self):
        self.reply("getThing", {"thing": {"id": "1"}}, {"success": True}, {})
        self.assertEqual(self.good("getThing", "--all", "-o", "jsonl"), '{"thing": {"id": "1"}}\n')
        self.assertEqual(self.good("getThing", "--all", "-o", "jsonl"), '{"success": true}\n')
        self.assertEqual(self.good("getThing", "--all", "-o", "jsonl"), "")


class ColumnsTest(CloudCase):
    ROWS = [
        {"id": "b", "name": "two", "size": "10", "nic": [{"ip": "p1"}, {"ip": "p2"}], "tags": [{"key": "env"}]},
        {"id": "a", "name": "one", "size": "9", "nic": [{"ip": "q1"}], "detail": {"cpu": {"n": 4}}},
        {"id": "c", "name": "Three", "nic": []},
    ]  # fmt: skip
    answer = {"count": 3, "thing": ROWS}

    def cells(self, *args):
        self.reply("listThings", self.answer)
        code, out, err = self.main("listThings", "-o", "text", "-q", *args)
        self.assertEqual((code, err), (0, ""))
        return [line.split("\t") for line in out.split("\n")[:-1]]

    def test_dotted_paths(self):
        for columns, expected in (
            ("id", [["b"], ["a"], ["c"]]),
            ("name,id", [["two", "b"], ["one", "a"], ["Three", "c"]]),
            (" name , id ,", [["two", "b"], ["one", "a"], ["Three", "c"]]),
            ("nic.ip", [["p1,p2"], ["q1"], [""]]),
            ("nic.0.ip", [["p1"], ["q1"], [""]]),
            ("nic.1.ip", [["p2"], [""], [""]]),
            ("nic.99.ip", [[""], [""], [""]]),
            ("tags.key", [["env"], [""], [""]]),
            ("detail.cpu.n", [[""], ["4"], [""]]),
            ("detail.cpu", [[""], ['{"n":4}'], [""]]),
            ("detail.cpu.n.x", [[""], [""], [""]]),
            ("nic.0", [['{"ip":"p1"}'], ['{"ip":"q1"}'], [""]]),
            ("id.x,name.0,nic.x", [[""] * 3] * 3),
            ("nic.\u00b2.ip,nic.\u0663.ip,nic.-1.ip,nic." + "9" * 5000, [[""] * 4] * 3),
        ):
            with self.subTest(columns[:40]):
                self.assertEqual(self.cells("-c", columns), expected)

    def test_paths_that_are_none(self):
        for columns in ("id.", ".id", ".", "..", "nic..ip", "nic.0.", "-", "id name", "\x1b[2J", "*"):
            self.assertEqual(len(self.cells("-c", columns)), 3)

    def test_a_name_that_holds_a_dot_is_found_as_it_stands(self):
        self.reply("listThings", {"count": 1, "thing": [{"a.b": "1", "a": {"b": "2", "c.d": "3"}}]})
        self.assertEqual(self.good("listThings", "-o", "text", "-c", "a.b,a.c.d"), "1\t3\n")

    def test_every_format(self):
        for shape, expected in (
            ("table", "name   nic.0.ip\none    q1\nThree\ntwo    p1\n"),
            ("csv", "name,nic.0.ip\r\none,q1\r\nThree,\r\ntwo,p1\r\n"),
            ("text", "one\tq1\nThree\t\ntwo\tp1\n"),
            ("jsonl", '{"name": "one", "nic.0.ip": "q1"}\n{"name": "Three", "nic.0.ip": null}\n'
                      '{"name": "two", "nic.0.ip": "p1"}\n'),
        ):  # fmt: skip
            self.reply("listThings", self.answer)
            self.assertEqual(self.good("listThings", "-o", shape, "--sort", "name", "-c", "name,nic.0.ip"), expected)
        self.reply("listThings", self.answer, self.answer, self.answer)
        rows = [{"name": "one"}, {"name": "Three"}, {"name": "two"}]
        out = self.good("listThings", "--sort", "name", "-c", "name")
        self.assertEqual(json.loads(out), {"count": 3, "thing": rows})
        out = self.good("listThings", "--sort", "-id", "-o", "json")
        self.assertEqual([row["id"] for row in json.loads(out)["thing"]], ["c", "b", "a"])
        self.assertEqual(len(json.loads(out)["thing"][1]), 5)  # all of it
        out = self.good("listThings", "--sort", "-id", "--all", "-c", "id")
        self.assertEqual(json.loads(out), [{"id": "c"}, {"id": "b"}, {"id": "a"}])

    def test_objects_and_job_results(self):
        thing = {"id": "1", "nic": [{"ip": "p1"}]}
        self.reply("getThing", {"thing": thing}, {"id": "1", "detail": {"cpu": 4}})
        self.assertEqual(json.loads(self.good("getThing", "-c", "nic.ip,id")), {"thing": {"id": "1", "nic.ip": ["p1"]}})
        self.assertEqual(json.loads(self.good("getThing", "-c", "detail.cpu")), {"detail.cpu": 4})
        result = {"jobid": "j", "jobstatus": 1, "jobresult": {"thing": thing}}
        for shape, expected in (
            ("table", "nic.ip\np1\n"), ("text", "p1\n"), ("csv", "nic.ip\r\np1\r\n"), ("jsonl", '{"nic.ip": ["p1"]}\n'),
        ):  # fmt: skip
            self.reply("startThing", {"jobid": "j"})
            self.reply("queryAsyncJobResult", result)
            self.assertEqual(self.good("startThing", "-o", shape, "-c", "nic.ip", "--sort", "id"), expected)

    def test_a_column_that_no_row_has(self):
        cases = ("nmae", "name"), ("NAME", "name"), ("nic.0.pi", "nic.ip"), ("tag.key", "tags.key"), ("zzz", "")
        for name, near in cases:
            for shape in cs.FORMATS:
                with self.subTest("{} {}".format(name, shape)):
                    self.reply("listThings", self.answer)
                    code, out, err = self.main("listThings", "-o", shape, "-c", "id," + name)
                    self.assertEqual(code, 0)
                    self.assertIn("Warning: no row has {!r}".format(name), err)
                    self.assertEqual("did you mean" in err, bool(near))
                    self.assertIn(near, err)
        self.reply("listThings", self.answer, self.answer, self.answer)
        self.assertIn("no row has 'nmae'", self.main("listThings", "--sort", "-nmae")[2])
        self.assertEqual(self.main("listThings", "-c", "nmae", "-q")[2], "")
        self.assertEqual(self.main("listThings", "-c", "tags.key,detail.cpu.n")[2], "")  # some row has it

    def test_a_column_that_only_a_later_row_has_is_no_reason_to_warn(self):
        """Also where rows are written as they arrive."""
        self.reply("listThings", {"count": 2, "thing": [{"id": "1"}, {"id": "2", "hostname": "h"}]})
        out = self.good("listThings", "--all", "-o", "jsonl", "-c", "id,hostname")
        self.assertEqual([json.loads(line)["hostname"] for line in out.splitlines()], [None, "h"])
        self.reply("listThings", {"count": 2, "thing": [{"id": "1"}, {"id": "2", "hostname": "h"}]})
        code, out, err = self.main("listThings", "--all", "-o", "jsonl", "-c", "id,hostnam")
        self.assertEqual(code, 0)
        self.assertIn("no row has 'hostnam'; did you mean hostname?", err)
        self.assertEqual(err.count("\n"), 1)

    def test_no_columns_at_all_are_those_of_every_day(self):
        for columns in ("", ",", " , "):
            self.assertEqual(self.cells("-c", columns), self.cells())
            self.reply("listThings", self.answer)
            self.assertEqual(json.loads(self.good("listThings", "-c", columns)), self.answer)

    def test_sort(self):
        for column, expected in (
            ("id", "abc"), ("-id", "cba"), ("name", "acb"), ("-name", "bca"), ("size", "abc"), ("-size", "bac"),
            ("nic.ip", "bac"), ("nic.0.ip", "bac"), ("-nic.0.ip", "abc"), ("detail.cpu.n", "abc"), ("nosuch", "bac"),
        ):  # fmt: skip
            with self.subTest(column):
                self.assertEqual("".join(row[0] for row in self.cells("--sort", column, "-c", "id")), expected)
                self.assertEqual("".join(row[0] for row in self.cells("--sort=" + column, "-c", "id")), expected)

    def order(self, values, column="v"):
        self.reply("listThings", {"thing": [{"v": value} for value in values]})
        out = self.good("listThings", "--sort", column, "-o", "jsonl")
        return [json.loads(line)["v"] for line in out.splitlines()]

    def test_numbers_are_sorted_as_numbers_also_where_they_are_text(self):
        self.assertEqual(self.order([10, 9, 1.5, -3, 100]), [-3, 1.5, 9, 10, 100])
        self.assertEqual(self.order(["10", "9", "1.5", "-3", "1e2"]), ["-3", "1.5", "9", "10", "1e2"])
        self.assertEqual(self.order(["10", 9, "b", "a", None], "-v"), ["b", "a", "10", 9, None])
        self.assertEqual(self.order([2**80, 2**80 + 1, 2**80 - 1][::-1]), [2**80 - 1, 2**80, 2**80 + 1])

    def test_words_that_python_takes_for_numbers_are_words(self):
        words = ["b", "nan", "a", "infinity", "10", "9", "inf", "c", "1_0"]
        self.assertEqual(self.order(words), ["9", "10", "1_0", "a", "b", "c", "inf", "infinity", "nan"])

    def test_rows_that_are_alike_keep_their_order(self):
        self.reply("listThings", *[{"thing": [{"k": "x", "n": number} for number in range(9)]}] * 2)
        for column in ("k", "-k"):
            out = self.good("listThings", "--sort", column, "-o", "text", "-c", "n")
            self.assertEqual(out.split(), list("012345678"))

    def test_what_cannot_be_compared_is_sorted_somehow(self):
        values = [True, "x", {"a": 1}, ["a"], 7, "", False, [], {}, 1.0, "\ud7ff"]
        self.assertEqual(len(self.order(values)), len(values))


class TableTest(CloudCase):
    """Tables on a terminal."""

    def rows(self, *rows):
        self.reply("listThings", {"count": len(rows), "thing": list(rows)})

    def test_it_fits(self):
        for columns in (200, 120, 80, 60, 40, 20):
            for args in (["listVirtualMachines"], ["listEvents"], ["listTemplates", "templatefilter=all"]):
                for line in self.table(*args, columns=columns):
                    self.assertLessEqual(columns_of(line), columns)

    def test_id_name_and_state_come_first(self):
        header = self.table("listVirtualMachines", columns=80)[0].split()
        self.assertEqual(header[:3], ["id", "name", "state"])
        self.assertIn("zonename", self.table("listVirtualMachines", columns=120)[0].split())
        for command, expected in (
            ("listZones", "id name allocationstate"), ("listVolumes", "id name state"), ("listHosts", "id name state"),
        ):  # fmt: skip
            self.assertEqual(" ".join(self.table(command)[0].split()[:3]), expected)

    def test_what_an_answer_is_about_is_not_left_out_while_there_is_room(self):
        self.option(rate_limit=100)
        cases = ("listResourceLimits", "max"), ("getApiLimit", "apiAllowed"), ("listEvents", "description")
        for command, column in cases:
            self.assertIn(column, self.table(command, columns=150)[0].split())

    def test_default_columns_are_left_out_from_the_end_before_anything_is_cut(self):
        self.rows({"id": "1" * 20, "name": "n" * 20, "state": "s" * 20, "zonename": "z" * 20})
        self.assertEqual(self.table("listThings", columns=86), [
            "id                    name                  state                 zonename",
            "1" * 20 + "  " + "n" * 20 + "  " + "s" * 20 + "  " + "z" * 20,
        ])  # fmt: skip
        self.rows({"id": "1" * 20, "name": "n" * 20, "state": "s" * 20, "zonename": "z" * 20})
        lines = self.table("listThings", columns=85)
        self.assertEqual(lines[0].split(), ["id", "name", "state"])
        self.assertNotIn("…", lines[1])

    def test_chosen_columns_are_cut_but_never_left_out(self):
        self.rows({"id": "12345678", "name": "n" * 100, "state": "Running"}, {"id": "1", "name": "ok", "state": "x"})
        lines = self.table("listThings", "-c", "id,name,state", columns=40)
        self.assertEqual(lines[0].split(), ["id", "name", "state"])
        self.assertEqual([len(lines[0]), len(lines[1])], [38, 40])
        self.assertTrue(lines[1].startswith("12345678  nnnn"), lines[1])
        self.assertTrue(lines[1].endswith("n…  Running"), lines[1])
        self.assertEqual(lines[2].split(), ["1", "ok", "x"])

    def test_an_id_is_whole_or_useless(self):
        """What can be cut otherwise is cut before the ids, which are there to be copied."""
        ident = "53d0c13a-1e82-4995-ae92-093286df12db"
        self.rows({"id": ident, "name": "a name of thirty-one characters", "state": "x" * 30})
        line = self.table("listThings", "-c", "id,name,state", columns=80)[1]
        self.assertIn(ident + " ", line)
        self.assertLessEqual(len(line), 80)

    def test_more_chosen_columns_than_fit(self):
        row = {"c{:03d}".format(number): "value" for number in range(400)}
        self.rows(row)
        lines = self.table("listThings", "-c", ",".join(sorted(row)), columns=40)
        self.assertEqual(len(lines), 2)
        self.assertEqual(len(lines[0].split()), 400)

    def test_wide_and_combining_characters_are_aligned(self):
        names = ["ascii", "日本語", "日本語の長い名前のマシン", "e\u0301te\u0301", "🙂🚀"]
        names += ["한국어", "ｆｕｌｌ", "zürich", "\u0e19\u0e49\u0e33"]
        rows = [{"id": "1", "name": name, "state": "|"} for name in names]
        for shape in (self.table, lambda *args: self.good(*args + ("-o", "table")).splitlines()):
            self.rows(*rows)
            lines = shape("listThings")
            edges = {columns_of(line[: line.index("|")]) for line in lines[1:]} | {lines[0].index("state")}
            self.assertEqual(len(edges), 1, lines)

    def test_wide_characters_are_cut_at_whole_ones(self):
        for columns in range(10, 24):
            self.rows({"id": "1", "name": "日本語の長い名前", "state": "e\u0301" * 9})
            for line in self.table("listThings", "-c", "id,name,state", columns=columns):
                self.assertLessEqual(columns_of(line), max(columns, 4 + 4 + 4 + 4), line)

    def test_what_would_steer_the_terminal_is_escaped(self):
        evil = "a\x1b[2J" + EVIL_TITLE + "\x9b31mc\u202ed\x08\x7f\r\u2028\u200b"
        for shape in ("table", "text", "csv", "json", "jsonl"):
            with self.subTest(shape):
                self.rows({"id": evil, "name": [evil], "state": {evil: evil}, evil: evil}, {evil + "2": 1})
                for args in (["-c", "id,name,state," + evil], []):
                    self.rows({"id": evil, "name": [evil], "state": {evil: evil}, evil: evil}, {evil + "2": 1})
                    code, out, err = self.on_terminal("listThings", "-o", shape, "--color", "never", *args, columns=500)
                    self.assertEqual(code, 0)
                    bare = out.replace("\r\n", "\n")
                    self.assertEqual(re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028\u200b]", bare + err), [])
                self.cloud._scripts.clear()

    def test_names_of_columns_come_from_the_server_too(self):
        self.rows({"a" + EVIL_TITLE + "b\nc": "1"})
        lines = self.table("listThings")
        self.assertEqual(len(lines), 2)
        self.assertIn("\\x1b]0;pwned\\x07", lines[0])

    def test_line_breaks_and_tabs_do_not_break_rows(self):
        self.rows({"id": "1", "name": "a\nb\tc", "state": "x"}, {"id": "2", "name": "d", "state": "y"})
        self.assertEqual(self.table("listThings"), ["id  name   state", "1   a b c  x", "2   d      y"])

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
        lines = self.table("listThings", "-c", "id,name,state")
        self.assertEqual(lines[1], "1   " + "x" * 68 + "…  x")

    def test_the_header_is_bold_where_there_is_colour(self):
        bold = "\x1b[1mid\x1b[0m\n"
        for args, env, colored in (
            ([], {}, True),
            (["--color", "auto"], {}, True),
            (["--color", "never"], {}, False),
            ([], {"NO_COLOR": "1"}, False),
            ([], {"NO_COLOR": ""}, True),
            ([], {"term": "dumb"}, False),
            (["--color", "always"], {"NO_COLOR": "1", "term": "dumb"}, True),
        ):
            with self.subTest("{} {}".format(args, env)):
                self.rows({"id": "1"})
                code, out, err = self.on_terminal("listThings", "-o", "table", *args, **env)
                self.assertEqual(out, (bold if colored else "id\n") + "1\n")
        self.rows({"id": "1"})
        self.assertEqual(self.good("listThings", "-o", "table"), "id\n1\n")  # no terminal
        self.rows({"id": "1"})
        self.assertEqual(self.good("listThings", "-o", "table", "--color=always"), bold + "1\n")
        self.usage("listThings", "--color", "sometimes")

    def test_nothing_but_json_and_the_header_is_coloured(self):
        for shape in ("csv", "text"):
            self.rows({"id": "1"})
            self.assertNotIn("\x1b", self.good("listThings", "-o", shape, "--color", "always"))

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_on_a_real_terminal(self):
        env = dict(os.environ, TERM="xterm")
        typed = Typed([sys.executable, CS_PATH, "listVirtualMachines", "-o", "table"], env, 100)
        self.addCleanup(typed.close)
        self.assertEqual(typed.end(), 0)
        lines = screen(typed.text).rstrip("\n").split("\n")
        self.assertEqual(len(lines), 33)
        self.assertIn(max(map(len, lines)), range(80, 101))
        self.assertIn("\x1b[1mid", typed.text)


# --- progress and errors --------------------------------------------------------------------------------------------


class ProgressTest(CloudCase):
    """One line on standard error, on a terminal only, and gone when the work is done."""

    options = {"job_seconds": 0.15, "default_page_size": 500}

    def run_on_terminals(self, *args, **options):
        """(exit code, standard output, standard error), standard error a terminal; both=True: both the same one."""
        err = FakeTerminal()
        out = err if options.pop("both", False) else io.StringIO()
        with mock.patch.dict(os.environ, dict({"TERM": "xterm", "COLUMNS": "80"}, **options)):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cs.main(list(args))
        return code, out.getvalue(), err.getvalue()

    def job(self, *outcomes):
        self.reply("startThing", {"jobid": "j-1"})
        self.reply("queryAsyncJobResult", {"jobid": "j-1", "jobstatus": 0}, *outcomes)

    DONE = {"jobid": "j-1", "jobstatus": 1, "jobresult": {"success": True}}
    FAILED = {"jobid": "j-1", "jobstatus": 2, "jobresult": {"errorcode": 530, "errortext": "full"}}

    def test_a_job_shows_command_and_time_and_is_gone_afterwards(self):
        self.job(self.DONE)
        code, out, err = self.run_on_terminals("startThing", "-o", "text")
        self.assertEqual(code, 0)
        self.assertRegex(err, r"startThing: .*\d s")
        self.assertEqual(screen(err), "")

    def test_a_job_that_is_waited_for_by_its_id_shows_the_id_and_is_gone_before_the_answer(self):
        self.reply("queryAsyncJobResult", {"jobid": "j-1", "jobstatus": 0}, self.DONE)
        code, text, _ = self.run_on_terminals("--wait", "j-1", "-o", "text", both=True)
        self.assertEqual(code, 0)
        self.assertRegex(text, r"job j-1: .*\d s")
        self.assertNotIn("queryAsyncJobResult", text)
        self.assertEqual(screen(text), "true\n")

    def test_the_time_moves_every_second_also_while_the_server_is_silent(self):
        def look_late(record):
            time.sleep(1.2)
            return Answer(200, {"r": self.DONE})

        self.reply("startThing", {"jobid": "j-1"})
        self.cloud.script("queryAsyncJobResult", look_late)
        code, text, _ = self.run_on_terminals("startThing", "-o", "text", both=True)
        self.assertEqual(code, 0)
        self.assertIn("startThing: waiting for the job, 0 s", text)
        self.assertIn("startThing: waiting for the job, 1 s", text)
        self.assertEqual(screen(text), "true\n")
        for thread in threading.enumerate():
            if thread.name == "cs-progress":
                thread.join(5)
                self.assertFalse(thread.is_alive())

    def test_pages_show_rows_so_far_of_their_count(self):
        self.option(default_page_size=10)
        code, out, err = self.run_on_terminals("listVirtualMachines", "--all", "pagesize=10")
        self.assertEqual((code, len(json.loads(out))), (0, 32))
        self.assertRegex(err, r"\d+ of 32 rows")
        self.assertEqual(screen(err), "")

    def test_it_is_gone_before_an_error_is_told(self):
        self.job(self.FAILED)
        code, out, err = self.run_on_terminals("startThing")
        self.assertEqual(code, 1)
        self.assertIn("startThing: ", err)
        self.assertTrue(screen(err).startswith("CloudStack error: Job failure: full\n"), screen(err))

    def test_it_is_gone_when_interrupted(self):
        self.job(self.DONE)
        looks = []

        def sleep(seconds):
            looks.append(seconds)
            raise KeyboardInterrupt

        with mock.patch.object(cs, "_sleep", sleep):
            code, out, err = self.run_on_terminals("startThing")
        self.assertEqual(code, 130)
        told = "Interrupted. Job j-1 may still be running; to go on waiting for it: cs --wait j-1\n"
        self.assertEqual(screen(err), told)

    def test_a_streamed_list_and_its_progress_do_not_mix(self):
        """Both on one terminal, as they are where nothing is redirected."""
        self.option(latency=0.11)
        code, text, _ = self.run_on_terminals("listVirtualMachines", "--all", "-o", "jsonl", "pagesize=16", both=True)
        self.assertEqual(code, 0)
        self.assertIn("of 32 rows", text)
        lines = screen(text).rstrip("\n").split("\n")
        self.assertEqual([len(json.loads(line)["id"]) for line in lines], [36] * 32)

    def test_there_is_none_where_it_is_not_wanted(self):
        for args, env in ((["-q"], {}), (["-t"], {}), ([], {"CLOUDSTACK_TRACE": "true"}), ([], {"TERM": "dumb"})):
            with self.subTest("{} {}".format(args, env)):
                self.job(self.DONE)
                code, out, err = self.run_on_terminals("startThing", *args, **env)
                self.assertEqual(code, 0)
                self.assertNotIn("\x1b", err)
        self.job(self.DONE)
        code, out, err = self.main("startThing")  # no terminal
        self.assertEqual((code, err), (0, ""))

    def test_an_answer_on_standard_output_holds_none_of_it(self):
        self.job(self.DONE)
        self.assertEqual(self.run_on_terminals("startThing", "-o", "text")[1], "true\n")

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_a_session_on_a_real_terminal(self):
        """Progress while a job runs, then its result as a table that fits, coloured; then Ctrl-C in the next one."""
        self.option(job_seconds=0.3)
        machine = self.cloud.cloud.named("virtualmachine", "web-02")["id"]
        command = [sys.executable, CS_PATH, "startVirtualMachine", "id=" + machine, "-o", "table"]
        env = dict(os.environ, TERM="xterm")
        typed = Typed(command, env, 100)
        self.addCleanup(typed.close)
        typed.wait_for(b"startVirtualMachine: ")
        self.assertEqual(typed.end(), 0)
        self.assertIn("\x1b[1m", typed.text)
        lines = screen(typed.text).rstrip("\n").split("\n")
        self.assertEqual(len(lines), 2)
        self.assertIn("web-02", lines[1])
        self.assertLessEqual(max(map(len, lines)), 100)
        self.option(job_seconds=30)
        typed = Typed([word.replace("start", "stop") for word in command], env)
        self.addCleanup(typed.close)
        typed.wait_for(b"stopVirtualMachine: ")
        typed.type("\x03")
        typed.wait_for(b"cs --wait ")
        self.assertEqual(typed.end(), 130)
        self.assertRegex(screen(typed.text), r"\A(\^C)?Interrupted\. Job [0-9a-f-]{36} .*cs --wait [0-9a-f-]{36}\n\Z")


class ErrorTextsTest(CloudCase):
    """What was asked, what was answered, its codes, what to try."""

    def error(self, *args):
        code, out, err = self.main(*args)
        self.assertNotIn("Traceback", err)
        self.assertTrue(err.startswith("CloudStack error: "), err)
        return code, err

    def test_an_error_of_the_server(self):
        self.say_error("startVirtualMachine", 431, "Invalid parameter id value=5")
        code, err = self.error("startVirtualMachine", "id=5")
        self.assertEqual(code, 1)
        told = "CloudStack error: HTTP 431 response from CloudStack: Invalid parameter id value=5\n"
        self.assertTrue(err.startswith(told), err)
        self.assertIn("  Asked: cs startVirtualMachine id=5\n  Server: {}\n".format(self.cloud.endpoint), err)
        self.assertIn("  Codes: errorcode 431, cserrorcode 4350\n", err)
        self.assertRegex(err, r"  Try: .*cs startVirtualMachine --help")

    def test_each_code_has_something_to_try(self):
        for code, part in (
            (401, "key"), (430, "--help"), (431, "--help"), (432, "cs --list"), (503, "--retry"), (530, "log"),
            (531, "role"), (532, "cs listResourceLimits"), (533, "room"), (536, "uses"), (429, "--retry"),
        ):  # fmt: skip
            self.say_error("startThing", code)
            code, err = self.error("startThing", "id=5")
            self.assertEqual(code, 1)
            self.assertIn(part, err.partition("  Try: ")[2])

    def test_a_failed_job(self):
        self.reply("startThing", {"jobid": "j-1"})
        failed = {"errorcode": 533, "cserrorcode": 4535, "errortext": "no room"}
        self.reply("queryAsyncJobResult", {"jobid": "j-1", "jobstatus": 2, "jobresultcode": 533, "jobresult": failed})
        code, err = self.error("startThing", "id=5")
        self.assertEqual((code, err.split("\n")[0]), (1, "CloudStack error: Job failure: no room"))
        self.assertIn("  Asked: cs startThing id=5\n", err)
        self.assertIn("errorcode 533, cserrorcode 4535", err)
        self.assertIn("  Try: ", err)

    def test_what_is_secret_is_not_shown(self):
        words = "password=HIDDEN details[0].password=HIDDEN userdata=HIDDEN secretkey=HIDDEN privatekey=HIDDEN".split()
        words += ["tags[0].key=password", "tags[0].value=HIDDEN", "name=shown"]
        self.say_error("updateThing", 431)
        code, err = self.error("updateThing", *words)
        self.assertNotIn("HIDDEN", err)
        self.assertIn("name=shown", err)
        self.assertIn("password=***", err)

    def test_a_long_parameter_is_not_repeated_in_full(self):
        text = "x" * 100000
        self.say_error("updateThing", 431, "too long")
        code, err = self.error("updateThing", "text=@" + self.write("text", text), "more=1")
        self.assertLess(len(err), 3000)
        self.assertIn("Try: ", err)

    def test_no_answer(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.configure(endpoint="http://127.0.0.1:{}/client/api".format(free.getsockname()[1]))
            code, err = self.error("listZones", "name=x")
        self.assertEqual(code, 3)
        self.assertIn("refused", err)
        self.assertIn("  Asked: cs listZones name=x\n  Server: http://127.0.0.1:", err)

    def test_a_page_that_is_not_cloudstack_s(self):
        self.cloud.script("listZones", Answer(404, "<html>not here</html>"))
        code, err = self.error("listZones")
        self.assertEqual(code, 1)
        self.assertIn("Asked: cs listZones", err)
        self.assertIn("endpoint", err)
        self.assertIn("not here", err)

    def echo(self, status, kind, form):
        """An answer by whoever stands before the server, which repeats the address."""

        def repeat(record):
            text = form.format(record.path + "?" + record.query) + "x" * 5000 + "THE END"
            return Answer(status, text, {"Content-Type": kind})

        self.cloud.script("listZones", repeat)

    def test_an_answer_that_is_not_cloudstack_s_is_shown_masked_and_only_its_beginning(self):
        user = self.cloud.users["admin"]
        for status in (200, 403, 404, 502):
            for kind, form in (
                ("text/html", "<p>{}</p>"), ("application/json", '{{"message": "{}", "x": "'), ("text/plain", "{}"),
            ):  # fmt: skip
                self.echo(status, kind, form)
                with self.subTest(status, kind=kind):
                    code, out, err = self.main("listZones", "name=shown")
                    self.assertEqual((code, out), (1, ""))
                    self.assertIn("/client/api?", err)
                    self.assertIn("name=shown", err)
                    for secret in (user.key, user.secret):
                        self.assertNotIn(secret, err)
                    self.assertNotRegex(err, "(?i)(apikey|signature)=[^*]")
                    self.assertNotIn("THE END", err)

    def test_json_that_repeats_the_address_is_masked_too(self):
        def repeat(record):
            return Answer(502, json.dumps({"message": "/client/api?" + record.query}), JSON_HEADERS)

        self.cloud.script("listZones", repeat)
        code, out, err = self.main("listZones")
        self.assertEqual((code, out), (1, ""))
        self.assertIn('"message": "/client/api?', err)
        self.assertNotRegex(err, "(?i)(apikey|signature)=[^*]")

    def test_a_page_of_html_is_no_answer_as_text_either(self):
        self.echo(200, "text/html", "<html>{}</html>")
        code, out, err = self.main("listZones", "json=false")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("<html>/client/api?", err)
        self.assertNotRegex(err, "(?i)(apikey|signature)=[^*]")

    def test_where_there_is_no_api_the_usual_address_is_told(self):
        for status in (200, 404, 405):
            with self.subTest(status):
                self.cloud.script("listZones", Answer(status, "<html>not here</html>"))
                code, err = self.error("listZones")
                self.assertIn("  Try: Check the endpoint: it usually ends in /client/api.", err)
        self.say_error("listZones", 404)
        self.assertIn("/client/api.", self.error("listZones")[1].partition("  Try: ")[2])
        self.cloud.script("listZones", Answer(502, "<html>busy</html>"))
        self.assertNotIn("/client/api.", self.error("listZones")[1])

    def test_json_is_not_printed_on_a_terminal_where_its_text_was(self):
        self.say_error("startThing", 431, "the text")
        code, out, err = self.on_terminal("startThing", "-o", "json")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("the text", err)
        for args, fields in (((), {"errortext": ""}), (("-q",), {})):  # nothing else tells of it
            self.say_error("startThing", 431, **dict({"text": "the text"}, **fields))
            code, out, err = self.on_terminal("startThing", "--color", "never", *args)
            self.assertEqual((code, json.loads(out)["startthingresponse"]["errorcode"]), (1, 431))

    def test_a_log_in_that_fails(self):
        """It is another command that failed than the one asked for, and no role is to blame."""
        self.unset("key", "secret")
        self.configure(username="admin", password="HIDDEN", domain="/")
        code, err = self.error("listZones", "name=x")
        self.assertEqual(code, 1)
        self.assertIn("HTTP 531", err)
        self.assertIn("  Asked: login username=admin domain=/\n", err)
        self.assertNotIn("listZones", err)
        self.assertNotIn("role", err)
        self.assertNotIn("HIDDEN", err)
        self.assertRegex(err, "  Try: .*password")

    @unittest.skipUnless(shutil.which("bash"), "bash is not installed")
    def test_what_was_asked_can_be_pasted_into_a_shell(self):
        """With the configuration that was chosen, a file that was named, quotes, and what the shell would evaluate."""
        path = self.write("a file", "content")
        words = ["name=a b", "x=$(touch pwned)", "y='q'", "z=it's", "n=\n\t\u202e\\'", "u=z\u00fcrich", "f=@" + path]
        self.say_error("startThing", 431)
        code, err = self.error("startThing", *(words + ["--timeout", "7", "--endpoint", self.cloud.endpoint]))
        line = re.search("  Asked: (.*)", err).group(1)
        env = dict(os.environ, LC_ALL="C.UTF-8")
        out = subprocess.check_output(["bash", "-c", 'cs() { printf "%s\\0" "$@"; }; ' + line], env=env)
        shown = out.decode("utf-8").split("\0")[:-1]
        self.assertEqual(shown, ["--endpoint", self.cloud.endpoint, "startThing"] + words)
        self.assertIn("\n  Server: {}\n".format(self.cloud.endpoint), err)

    def test_what_may_have_run_is_told(self):
        self.cloud.script("startThing", RUN_THEN_DROP)
        code, err = self.error("startThing", "id=1")
        self.assertEqual(code, 3)
        self.assertIn("outcome is unknown", err)
        self.assertIn("before you send it again", err)

    def test_a_job_that_takes_too_long(self):
        self.configure(job_timeout="0.01")
        self.reply("startThing", {"jobid": "j-1"})
        self.reply("queryAsyncJobResult", *[{"jobid": "j-1", "jobstatus": 0}] * 5)
        code, err = self.error("startThing", "id=5")
        self.assertEqual(code, 4)
        self.assertIn("cs --wait j-1", err)
        self.assertIn("Asked: cs startThing id=5", err)

    def test_an_error_while_waiting_for_a_job_by_its_id(self):
        self.say_error("queryAsyncJobResult", 431, "no such job")
        code, err = self.error("--wait", "j-1")
        self.assertEqual(code, 1)
        self.assertIn("j-1", err)
        self.assertNotIn("cs  ", err)

    def test_errors_of_odd_shapes(self):
        for document in (
            {"errorcode": 431}, {"errortext": "only text"}, {"errorcode": None, "errortext": None}, {"errorcode": "x"},
            {"errorcode": [431], "errortext": {"a": 1}}, {"errorcode": 431, "errortext": ""}, {}, [], "text", None, 7,
        ):  # fmt: skip
            self.reply("startThing", document, status=431)
            code, err = self.error("startThing")
            self.assertEqual(code, 1)
            self.assertIn("HTTP 431", err)

    def test_quiet(self):
        self.say_error("startThing", 431)
        code, out, err = self.main("startThing", "-q")
        self.assertEqual((code, err), (1, ""))
        self.assertEqual(json.loads(out)["startthingresponse"]["errorcode"], 431)

    def test_the_answer_is_json_whatever_the_format(self):
        for shape in cs.FORMATS:
            self.say_error("startThing", 431)
            code, out, err = self.main("startThing", "-o", shape, "-c", "id")
            self.assertEqual(json.loads(out)["startthingresponse"]["errorcode"], 431)

    def test_what_was_asked_is_shown_escaped(self):
        self.say_error("startThing", 431, EVIL_TITLE)
        code, err = self.error("startThing", "name=\u202eabc\u2028", "b=x\n  Codes: none\ty")
        self.assertEqual(re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", err), [])
        self.assertEqual(err.count("\n  Codes: "), 1)


class FlagSettingsTest(CloudCase):
    """--endpoint, --config, --timeout, --retry"""

    def section(self, name="cloudstack", **settings):
        lines = ["{} = {}".format(*pair) for pair in sorted(settings.items())]
        return "\n".join(["[" + name + "]"] + lines) + "\n"

    def test_endpoint(self):
        user = self.cloud.users["admin"]
        self.unset("endpoint", "key", "secret")
        self.write(".cloudstack.ini", self.section(endpoint="http://cloud.invalid/", key=user.key, secret=user.secret))
        self.good("--endpoint", self.cloud.endpoint, "listZones")
        self.good("listZones", "--endpoint=" + self.cloud.endpoint)
        self.assertEqual(self.asked, ["listZones"] * 2)
        self.assertIn("endpoint", self.usage("listZones", "--endpoint", "nonsense"))
        self.assertIn("endpoint", self.usage("listZones", "--endpoint", "file:///etc/passwd"))

    def test_config(self):
        user = self.cloud.users["admin"]
        self.unset("endpoint", "key", "secret")
        good = {"endpoint": self.cloud.endpoint, "key": user.key, "secret": user.secret}
        path = self.write("other.ini", self.section(**good) + self.section("lab", endpoint="http://cloud.invalid/"))
        self.good("listZones", "--config", path)
        self.good("--config=~/other.ini", "listZones")
        self.assertEqual(self.main("--config", path, "-r", "lab", "listZones", "--retry", "0")[0], 3)
        self.configure(config=self.write("broken.ini", "nonsense"))
        self.good("listZones", "--config", path)  # it stands for CLOUDSTACK_CONFIG
        err = self.usage("listZones", "--config", os.path.join(self.home, "nosuch.ini"))
        self.assertIn("nosuch.ini", err)

    def test_an_unknown_region_names_those_there_are(self):
        self.unset("endpoint", "key", "secret")
        self.write(".cloudstack.ini", self.section("lab", endpoint="http://lab.invalid/") + self.section("zoo"))
        self.write("work/cloudstack.ini", self.section("cloudstack"))
        self.assertEqual(self.usage("listZones", "-r", "labs"),
                         "Error: region 'labs' not in config; there are cloudstack, lab, zoo\n")  # fmt: skip
        self.assertIn("'x' not in config; there are cloudstack, lab, lab2, zoo", self.usage(
            "listZones", "-r", "x", "--config", self.write("other.ini", self.section("lab2"))))  # fmt: skip
        os.remove(os.path.join(self.home, ".cloudstack.ini"))
        self.write("work/cloudstack.ini", "")
        self.assertEqual(self.usage("listZones", "-r", "x"), "Error: region 'x' not in config\n")

    def test_keys_that_are_no_settings_are_named_in_one_line(self):
        self.unset("endpoint", "key", "secret")
        section = "\n".join(["[cloudstack]", f"endpoint = {self.cloud.endpoint}", "tiemout = 5", "key = key-of-ini", "zzz = 1",
                             "secret = s-of-ini", "host = x", "header_x-y = %(host)s", "output = table"])  # fmt: skip
        path = self.write(".cloudstack.ini", "[DEFAULT]\nbase = x\n" + section + "\n")
        code, out, err = self.main("listZones", "--dry-run")
        self.assertEqual((0, f"Warning: not known as settings: 'tiemout' in {path} (timeout?), 'zzz' in {path}\n"), (code, err))
        self.assertEqual("", self.main("listZones", "--dry-run", "-q")[2])
        self.assertEqual("", self.main("--complete=cs listZ")[2])

    def test_timeout(self):
        release = threading.Event()
        self.addCleanup(release.set)
        self.cloud.script("listZones", lambda record: release.wait(10) and None)
        code, out, err = self.main("--timeout", "0.1", "listZones")
        self.assertEqual((code, out), (3, ""))
        self.assertIn("0.1 s", err)
        for value in ("abc", "0", "-1", "nan", "1e99"):
            with self.subTest(value):
                self.assertIn("timeout", self.usage("listZones", "--timeout", value))

    def test_retry(self):
        busy = Answer(503, "<html>busy</html>")
        self.cloud.script("listZones", busy, busy)
        self.good("--retry", "2", "listZones")
        self.assertEqual(self.asked, ["listZones"] * 3)
        self.cloud.script("listZones", busy, busy)
        self.assertEqual(self.main("listZones", "--retry=1")[0], 1)
        self.configure(retry="5")
        self.cloud.script("listZones", busy)
        self.assertEqual(self.main("listZones", "--retry", "0")[0], 1)  # 0 is a value, too
        self.cloud._scripts.clear()
        for value in ("-1", "abc", "1.5"):
            self.assertIn("retry", self.usage("listZones", "--retry", value))

    def test_an_empty_value_is_a_mistake(self):
        """`cs -r "$LAB" destroyVirtualMachine ...` where LAB is not set must not go to the usual region."""
        for option in ("--endpoint", "--region", "-r", "--config", "--timeout", "--retry", "--wait"):
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
                    self.assertEqual(len(set(self.asked)), len(self.asked))
                    if ["--dry-run"] in (first, second):
                        self.assertNotIn("listZones", self.asked)

    def test_no_option_takes_a_secret(self):
        for option in cs._OPTIONS:
            self.assertNotRegex(option.name, "key|secret|password|token")


# --- --configure ----------------------------------------------------------------------------------------------------


class ConfigureTest(CloudCase):
    """cs --configure asks, tries, and writes a section of ~/.cloudstack.ini."""

    def setUp(self):
        super().setUp()
        self.unset("endpoint", "key", "secret", "poll_interval", "timeout", "retry_backoff")
        self.path = os.path.join(self.home, ".cloudstack.ini")
        self.admin = self.cloud.users["admin"]
        self.answers = [self.cloud.endpoint, self.admin.key, self.admin.secret]

    def asking(self, *args, **options):
        """--configure with these answers on standard input: (exit code, standard output, standard error)."""
        answers = options.get("answers", self.answers)
        with mock.patch("sys.stdin", io.StringIO("".join(answer + "\n" for answer in answers))):
            return self.main("--configure", *args)

    def text(self):
        with open(self.path, encoding="utf-8", newline="") as file:
            return file.read()

    def assertWorks(self, *args):
        self.assertIn('"zone"', self.good("listZones", *args))

    def test_it_writes_a_section_that_works(self):
        code, out, err = self.asking()
        self.assertEqual((code, out), (0, ""))
        for question in ("Endpoint", "API key", "Secret key"):
            self.assertIn(question, err)
        self.assertIn("[cloudstack]", err)
        self.assertIn(self.path, err)
        self.assertNotIn(self.admin.secret, err)
        self.assertEqual(self.text(), "[cloudstack]\nendpoint = {}\nkey = {}\nsecret = {}\n".format(*self.answers))
        self.assertEqual(self.asked, ["listCapabilities"])
        self.assertWorks()

    def test_a_region(self):
        for args, region in ((["--region", "lab"], "lab"), (["-r", "my lab"], "my lab")):
            self.assertEqual(self.asking(*args)[0], 0)
            self.assertWorks("-r", region)
        self.configure(region="lagoon")
        self.assertEqual(self.asking()[0], 0)
        self.assertIn("[lagoon]\n", self.text())
        self.assertWorks()

    def test_a_name_that_no_section_can_have(self):
        for region in ("a]b", "[a", " a", "a\nb", "\n", "DEFAULT"):
            with self.subTest(region):
                code, out, err = self.asking("--region", region)
                self.assertEqual((code, out), (2, ""))
                self.assertNotIn("Endpoint", err)
                self.assertFalse(os.path.exists(self.path))

    def test_a_command_beside_it_is_a_mistake(self):
        """`cs --configure lab` does not write the section cloudstack."""
        self.assertEqual(self.asking("lab")[0], 2)
        self.assertFalse(os.path.exists(self.path))

    def test_another_file(self):
        path = os.path.join(self.home, "other.ini")
        self.assertEqual(self.asking("--config", path)[0], 0)
        self.assertFalse(os.path.exists(self.path))
        self.assertWorks("--config", path)

    @unittest.skipUnless(os.name == "posix", "needs file modes")
    def test_nobody_else_can_read_it(self):
        self.addCleanup(os.umask, os.umask(0))
        self.asking()
        self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)
        os.chmod(self.path, 0o644)
        self.asking("--region", "lab")
        self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)

    @unittest.skipUnless(hasattr(os, "symlink"), "needs symbolic links")
    def test_a_symbolic_link_is_followed(self):
        os.mkdir(os.path.join(self.home, "dotfiles"))
        target = self.write("dotfiles/cs.ini", "# mine\n")
        os.symlink(os.path.join("dotfiles", "cs.ini"), self.path)
        self.assertEqual(self.asking()[0], 0)
        self.assertTrue(os.path.islink(self.path))
        self.assertTrue(open_bytes(target).startswith(b"# mine\n"))
        self.assertEqual(os.listdir(os.path.dirname(target)), ["cs.ini"])
        self.assertWorks()

    def test_it_is_written_in_one_step(self):
        self.write(".cloudstack.ini", "[lab]\nendpoint = http://x/\n")
        with mock.patch("os.replace", side_effect=OSError("no")):
            code, out, err = self.asking()
        self.assertEqual(code, 2)
        self.assertIn("cannot write", err)
        self.assertEqual(self.text(), "[lab]\nendpoint = http://x/\n")
        self.assertEqual([name for name in os.listdir(self.home) if "cloudstack" in name], [".cloudstack.ini"])

    def test_a_section_that_exists_is_not_edited(self):
        """It says where it is, before anything is asked."""
        for region, before, line in (
            ("cloudstack", "# mine\n[cloudstack]\nkey = old\n", 2),
            ("lab", "[a]\nx = 1\n[lab] ; the second\nkey = 1\n", 3), ("lab", "[a]\nx = [b]\n [lab]\n[lab]\n", 4),
        ):  # fmt: skip
            with self.subTest(before):
                self.write(".cloudstack.ini", before)
                code, out, err = self.asking("--region", region)
                self.assertEqual((code, out, self.asked, self.text()), (2, "", [], before))
                self.assertNotIn("API key", err)
                self.assertIn("[{}] stands in {}, line {};".format(region, self.path, line), err)

    def test_everything_else_in_the_file_stays(self):
        """And what could be read before can be read afterwards, and says the same about other regions."""
        for number, before in enumerate((
            "", "\n\n", "# only a comment", "[lab]\nendpoint = http://x/", "\ufeff[lab]\nkey = old\n",
            "[lab]\nkey = old\r\n\r\n[a]\r\nkey = 1\r\n", "[DEFAULT]\ntimeout = 3\n[lab]\nkey = 1\n",
            "[Cloudstack]\nkey = 1\n", "[lab]\nheader_a = 1\n  [cloudstack]\nkey = 1\n", "[lab]\n  key = 1\n",
            "# page\x0cbreak = \u2028 x\n[lab]\nkey = a\x85b\x1cc\n", "[lab]\nkey = 1\n#[cloudstack]\n; x = 100%\n\n\n",
        )):  # fmt: skip
            with self.subTest(before):
                self.path = self.write("{}.ini".format(number), before)
                other = self.others()
                code, out, err = self.asking("--config", self.path)
                self.assertEqual(code, 0, err)
                self.assertEqual(self.others(), other)
                kept = before.lstrip("\ufeff").replace("\r\n", "\n").rstrip("\n")
                self.assertTrue(self.text().startswith(kept))
                self.assertWorks("--config", self.path)
                with mock.patch.dict(os.environ, CLOUDSTACK_CONFIG=self.path):
                    settings = cs.read_config("cloudstack")
                self.assertEqual([settings[name] for name in ("endpoint", "key", "secret")], self.answers)
                self.assertEqual(str(settings["timeout"]), "3" if "timeout = 3" in before else "10")

    def others(self):
        parser = configparser_of(self.path)
        return {name: dict(parser.items(name)) for name in parser.sections() if name != "cloudstack"}

    def test_secrets_of_every_kind_are_read_back_the_same(self):
        for secret in (
            "100%", "%", "%%", "%(endpoint)s", "a%b%%c%%%d", "a=b:c", "#x", ";x", "x # y ; z", "[lab]", '"x"', "'",
            "\u00e4\u20ac\U0001f680", "a  b", "a\tb", "%s", "$HOME", "key = value", "\\n", "x" * 3000,
        ):  # fmt: skip
            with self.subTest(secret[:30]):
                self.write(".cloudstack.ini", "")
                code, out, err = self.asking(answers=[self.cloud.endpoint, "k" + secret, secret, "y"])
                self.assertEqual(code, 0, err)
                settings = cs.read_config()
                self.assertEqual((settings["key"], settings["secret"]), ("k" + secret, secret))

    def test_credentials_that_fail_are_asked_about(self):
        self.write(".cloudstack.ini", "[lab]\nendpoint = http://x/\n")
        before = self.text()
        wrong = [self.cloud.endpoint, self.admin.key, "wrong"]
        for more, code, written in ((["n"], 1, False), ([""], 1, False), (["what?"], 1, False), ([], 2, False),
                                    (["y"], 0, True), (["YES"], 0, True)):  # fmt: skip
            with self.subTest(more):
                self.write(".cloudstack.ini", before)
                result, out, err = self.asking(answers=wrong + more)
                self.assertEqual((result, out), (code, ""))
                self.assertIn("401", err)
                self.assertNotIn("wrong", err)
                self.assertEqual("secret = wrong\n" in self.text(), written)
                self.assertEqual(self.text() == before, not written)

    def test_a_server_that_does_not_answer_is_asked_about(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = "http://127.0.0.1:{}/client/api".format(free.getsockname()[1])
            code, out, err = self.asking(answers=[endpoint, "k", "s", "n"])
        self.assertEqual(code, 1)
        self.assertIn("refused", err)
        self.assertFalse(os.path.exists(self.path))

    def test_an_answer_that_cannot_be_used_is_asked_for_again_before_the_next(self):
        """And is never repeated: it may be a secret, pasted one line too early."""
        endpoint, key, secret = self.answers
        for wrong, question in (
            (["", "HIDDEN", "HIDDEN.example/client/api", "file:///HIDDEN", "http://HIDDEN:b@c/"], "Endpoint"),
            (["", "  "], "API key"), ([""], "Secret key"),
        ):  # fmt: skip
            with self.subTest(question):
                place = ("Endpoint", "API key", "Secret key").index(question)
                answers = self.answers[:place] + wrong + self.answers[place:]
                self.write(".cloudstack.ini", "")
                code, out, err = self.asking(answers=answers)
                self.assertEqual((code, out), (0, ""))
                self.assertEqual(err.count(question), len(wrong) + 1)
                self.assertNotIn("HIDDEN", err)
                self.assertEqual(cs.read_config()["secret"], secret)

    def test_nothing_more_is_asked_for_while_an_answer_cannot_be_used(self):
        for answers, last in ((["nonsense"], "Endpoint"), ([self.cloud.endpoint, ""], "API key")):
            code, out, err = self.asking(answers=answers)
            self.assertEqual((code, self.asked), (2, []))
            self.assertNotIn("Secret key", err)
            self.assertEqual("API key" in err, last == "API key")
            self.assertNotIn("Traceback", err)
            self.assertFalse(os.path.exists(self.path))

    def test_the_end_of_input_leaves_everything_as_it_was(self):
        self.write(".cloudstack.ini", "[lab]\n")
        for count in range(3):
            code, out, err = self.asking(answers=self.answers[:count])
            self.assertEqual((code, self.text()), (2, "[lab]\n"))
        with mock.patch("sys.stdin", None):
            code, out, err = self.main("--configure")
            self.assertEqual((code, self.text()), (2, "[lab]\n"))
        self.assertNotIn("Traceback", err)

    def test_a_file_that_is_broken_is_not_made_worse(self):
        for content in (b"no section\n", b"[a]\n[a]\n", b"\xff\xfe", b"[cloudstack\n"):
            self.write(".cloudstack.ini", content)
            code, out, err = self.asking()
            self.assertEqual((code, out), (2, ""))
            self.assertNotIn("Endpoint", err)  # told before the questions
            self.assertEqual(open_bytes(self.path), content)

    def test_a_place_that_cannot_be_written(self):
        code, out, err = self.asking("--config", os.path.join(self.home, "no", "such", "folder.ini"))
        self.assertEqual((code, out), (2, ""))
        self.assertNotIn("Traceback", err)
        self.assertNotIn(self.admin.secret, err)

    def test_certificates_of_the_file_are_used_for_the_trial(self):
        """A private authority's, for instance: without them the right answers would seem wrong."""
        self.write(".cloudstack.ini", "[DEFAULT]\nverify = /no/such/authority.pem\nheader_x-tenant = blue\n")
        code, out, err = self.asking(answers=self.answers)
        self.assertEqual(code, 0, err)
        self.assertEqual(self.cloud.requests[0].headers.get("X-Tenant"), "blue")
        self.assertIn("verify = /no/such/authority.pem", self.text())

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_on_a_terminal_the_secret_is_not_shown(self):
        typed = Typed([sys.executable, CS_PATH, "--configure", "-r", "lab"], dict(os.environ, TERM="xterm"))
        self.addCleanup(typed.close)
        for question, reply in zip((b"Endpoint", b"API key", b"Secret key"), self.answers):
            typed.wait_for(question)
            typed.wait_for(b": ")
            typed.type(reply + "\n")
        typed.wait_for(b"is written")
        self.assertEqual(typed.end(), 0)
        self.assertIn(self.admin.key, typed.text)
        self.assertNotIn(self.admin.secret, typed.text)
        self.assertWorks("-r", "lab")

    @unittest.skipUnless(have_terminals(), "needs pseudo-terminals")
    def test_ctrl_c_and_ctrl_d_on_a_terminal_leave_everything_as_it_was(self):
        self.write(".cloudstack.ini", "[lab]\n")
        for key, code in (("\x03", 130), ("\x04", 2)):
            typed = Typed([sys.executable, CS_PATH, "--configure"], dict(os.environ, TERM="xterm"))
            self.addCleanup(typed.close)
            for question, reply in zip((b"Endpoint", b"API key"), self.answers):
                typed.wait_for(question)
                typed.wait_for(b": ")
                typed.type(reply + "\n")
            typed.wait_for(b"Secret key")
            typed.wait_for(b": ")
            typed.type("half of it" + key if key == "\x03" else key)
            self.assertEqual(typed.end(), code, typed.text)
            self.assertNotIn("Traceback", typed.text)
            self.assertNotIn("half", typed.text)
            self.assertEqual(self.text(), "[lab]\n")


def configparser_of(path):
    import configparser

    parser = configparser.RawConfigParser()
    with open(path, encoding="utf-8-sig") as file:
        parser.read_file(file)
    return parser


# --- rows: --where and --each ---------------------------------------------------------------------------------------


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
        err = self.each(rows, "doThing", "--where", "stat=Running")[2]
        self.assertIn("no row has 'stat'; did you mean state?", err)

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


# --- what is written about it ---------------------------------------------------------------------------------------


def readme():
    with open(README_PATH, encoding="utf-8") as file:
        return file.read()


def section_of(title, underline):
    """The text under a heading of README, up to the next one of its kind or above."""
    text = readme()
    start = text.index("\n" + title + "\n" + underline * len(title) + "\n") + 2 * len(title) + 3
    ends = [found.start() for found in re.finditer(r"(?m)^.+\n(={3,}|-{3,}|~{3,})$", text) if found.start() > start]
    if underline == "-":
        ends = [found.start() for found in re.finditer(r"(?m)^.+\n(={3,}|-{3,})$", text) if found.start() > start]
    return text[start : min(ends)] if ends else text[start:]


def blocks(language):
    """The code blocks of README in a language, without their indentation."""
    found = re.findall(r"(?m)^\.\. code-block:: {}\n\n((?:(?: {{4}}.*)?\n)+)".format(language), readme() + "\n")
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
            self.assertRegex(text, r"(?<![\w-]){}(?![\w-])".format(re.escape(name)))
            if name.startswith("--") and name not in ("--list", "--help"):
                after = re.search(re.escape(name) + r"(?![\w-])(.*)", text).group(1)
                value = option.value if isinstance(option.value, (str, type(None))) else "|".join(option.value)
                if value is None:
                    self.assertNotRegex(after, r"\A ([A-Z\[]|\w+(\||,\w))")
                else:
                    self.assertTrue(after.startswith(" " + value), after)

    def test_help_names_no_option_that_does_not_exist(self):
        self.assertEqual(set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", self.help())) - set(shown_options()), set())

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
                row = re.search(r"(?ms)^``[^\n]*--{}\b.*?(?=^``|^==)".format(option.name), text).group(0)
                self.assertEqual([], [word for word in option.value if f"``{word}``" not in row])
        self.assertEqual({flag: option.value is not None for flag, option in expected.items() if len(flag) > 2}, documented)

    def test_readme_documents_every_exit_code(self):
        rows = grid_rows(section_of("Exit codes", "~"))
        self.assertEqual([row[0] for row in rows], ["0", "1", "2", "3", "4", "130"])
        for code in ("0", "1", "2", "3", "4", "130"):
            self.assertIn(code, cs.main.__doc__ or code)

    def test_readme_documents_every_setting(self):
        rows = grid_rows(section_of("Configuration", "-"))
        self.assertEqual([row[0] for row in rows], [setting.name for setting in cs.SETTINGS])
        for row, setting in zip(rows, cs.SETTINGS):
            with self.subTest(setting.name):
                default = "" if setting.default is None else str(setting.default)
                self.assertEqual(row, [setting.name, default, setting.where, setting.meaning])

    def test_settings_are_what_the_constructor_takes(self):
        import inspect

        parameters = dict(inspect.signature(cs.CloudStack).parameters)
        for name in ("theme", "output"):
            del parameters[name]
        self.assertEqual(sorted(parameters), sorted(setting.name for setting in cs.SETTINGS))
        for setting in cs.SETTINGS[1:]:
            self.assertEqual(parameters[setting.name].default, setting.default, setting.name)

    def test_readme_names_every_variable_of_the_environment(self):
        text = readme()
        for name in ("CONFIG", "REGION", "OVERRIDES", "OUTPUT", "THEME"):
            self.assertIn("CLOUDSTACK_" + name, text)
        for name in set(re.findall(r"CLOUDSTACK_([A-Z_]+)", text)):
            known = {setting.name.upper() for setting in cs.SETTINGS if setting.where == "both"}
            known |= {"NAME", "CONFIG", "REGION", "OVERRIDES", "OUTPUT", "THEME", "HEADER_X_TENANT", "HEADER_"}
            self.assertIn(name, known)

    def test_the_ini_example_can_be_used(self):
        self.unset("endpoint", "key", "secret", "poll_interval", "timeout", "retry_backoff")
        (text,) = blocks("ini")
        self.write(".cloudstack.ini", text)
        for region, endpoint in ((None, "https://cloud.example/client/api"), ("lab", "https://lab.example/client/api")):
            client = cs.CloudStack(**cs.read_config(region))
            cs._check_client(client)
            self.assertEqual(client.endpoint, endpoint)
        self.assertEqual((client.verify, client.cert), ("/etc/ssl/lab-ca.pem", "/home/me/lab.pem"))

    def test_the_python_examples_are_python(self):
        for text in blocks("python"):
            ast.parse(text)

    def test_the_names_the_python_examples_use_are_there(self):
        for text in blocks("python"):
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
                printed = " ".join((err if code else out).split()).replace(self.cloud.endpoint, "https://cloud.example/client/api")
                pattern = re.escape(" ".join(shown.split())).replace(re.escape("..."), ".*")
                self.assertRegex(printed, r"\A" + pattern + r"\Z")


# --- what it costs --------------------------------------------------------------------------------------------------


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
        self.assertEqual(code, 0, err)
        return set(err.decode("utf-8").split())

    EXTRAS = set("difflib textwrap csv unicodedata getpass shutil tempfile random asyncio concurrent".split())

    def test_importing_it(self):
        more = set("argparse configparser hashlib ssl socket http email gzip copy calendar datetime".split())
        self.assertEqual(self.imported() & (self.EXTRAS | more), set())

    def test_an_ordinary_call(self):
        """Without a list of commands, and with one."""
        self.assertEqual(self.imported(["listZones"]) & self.EXTRAS, set())
        self.sync()
        shapes = [["listZones", "-o", shape] for shape in ("table", "jsonl", "text")]
        calls = [["listZones", "--sort", "name", "-c", "id"], ["listzones", "name=x"], ["--complete=cs listZ"]] + shapes
        self.assertEqual(self.imported(*calls) & self.EXTRAS, set())

    def test_help_and_version_look_at_nothing(self):
        self.unset("endpoint", "key", "secret")
        needless = self.EXTRAS | set("configparser hashlib ssl socket http email".split())
        self.assertEqual(self.imported(["--help"], ["--version"], ["--completion", "bash"]) & needless, set())
class SecretsOnTheCommandLineTest(TransportCase):
    def test_no_format_steers_a_terminal(self):
        """Control characters out of names that tenants gave, in each format, as a cell and as a column."""

        class Terminal(io.StringIO):
            def isatty(self):
                return True

        nasty = "a\x1b]0;x\x07\x9b2J\u202eb"
        for shape in cs.FORMATS:
            for row in ({"name": nasty}, {nasty: "x"}):
                job = cs._Invocation(cs._parse_arguments(["-o", shape, "--color", "never"])[0])
                out = Terminal()
                with self.subTest(shape=shape, row=row), contextlib.redirect_stdout(out):
                    cs._print_answer(job, {"count": 1, "row": [row]})
                self.assertEqual([], re.findall("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", out.getvalue()), shape)

    def test_catalog_and_completion_do_not_steer_a_terminal(self):
        nasty = "x\x1b]0;x\x07\x9b2J\u202ey"
        field = {"name": nasty, "type": "string", "description": nasty, "since": nasty}
        api = {"name": "listZones", "description": nasty, "since": nasty, "params": [field], "response": [field]}
        server = self.serve([READ, reply(json.dumps({"r": {"count": 1, "api": [api]}}).encode()), AGAIN])
        os.environ.update(CLOUDSTACK_ENDPOINT=server.url, CLOUDSTACK_KEY="k", CLOUDSTACK_SECRET="s")
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
        for args, document, status in (
            (["--sync"], catalog, "200 OK"), (["listZones", "--dry-run"], catalog, "200 OK"),
            (["listZones"], refused, "431 no")):  # fmt: skip
            server = self.serve([READ, reply(json.dumps(document).encode(), status), AGAIN])
            os.environ.update(CLOUDSTACK_ENDPOINT=server.url + RedactionTest.QUERY, CLOUDSTACK_KEY="k",
                              CLOUDSTACK_SECRET="s")  # fmt: skip
            with self.subTest(args=args):
                code, out, err = self.main(*args)
                self.assertIn(server.place, out + err)
                self.assert_tells_nothing(out, err)

    def test_configure_does_not_say_what_it_was_told(self):
        for status in ("200 OK", "401 x"):
            server = self.serve([READ, reply(b'{"r": {"errorcode": 401, "errortext": "no"}}', status), AGAIN])
            told = "\n".join([server.url + RedactionTest.QUERY, CANARY_KEY, CANARY_SECRET, "n", ""])
            with self.subTest(status=status), mock.patch.object(sys, "stdin", io.StringIO(told)):
                code, out, err = self.main("--configure", "--region", "r" + status[:3])
                self.assertEqual(0 if status == "200 OK" else 1, code, err)
                self.assert_tells_nothing(out, err)

    def test_the_report_of_an_error_shows_what_was_asked_without_secrets(self):
        server = self.serve([READ, reply(b'{"r": {"errorcode": 431, "errortext": "no"}}', "431 no"), AGAIN])
        os.environ.update(CLOUDSTACK_ENDPOINT=server.url, CLOUDSTACK_KEY=CANARY_KEY, CLOUDSTACK_SECRET=CANARY_SECRET)
        code, out, err = self.main("updateUser", "name=visible", "password=" + CANARY_PASSWORD)
        self.assertEqual(1, code)
        self.assertIn("name=visible", err)
        self.assertIn("password=***", err)
        self.assert_tells_nothing(out, err)


# === running them ===================================================================================================
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
    raise Overdue("not done after {:g} s".format(TEST_LIMIT))


class CountingResult(unittest.TextTestResult):
    """Counts tests, a test with failing subtests as one; unexpected successes are failures."""

    def __init__(self, *args):
        super().__init__(*args)
        self.failed_ids = set()
        self.broken = 0
        self.parent = os.getppid()

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
        super().stopTest(test)

    def _failed(self, test):
        test = getattr(test, "test_case", test)  # a subtest's own test
        if isinstance(test, unittest.TestCase):
            self.failed_ids.add(test.id())
            note("failed", test.id())
        else:
            self.broken += 1  # a class or module that could not be set up

    def addError(self, test, err):
        super().addError(test, err)
        self._failed(test)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._failed(test)

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._failed(test)

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self._failed(test)


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
    runner = unittest.TextTestRunner(
        stream=sys.stdout, verbosity=2 if "-v" in argv else 1, resultclass=CountingResult, warnings="default"
    )
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
        program = os.path.abspath(sys.modules["__main__"].__file__)
        command = [sys.executable] + subprocess._args_from_interpreter_flags() + [program, "--part", part, self.path]
        self.process = subprocess.Popen(
            command + argv, stdin=subprocess.DEVNULL, env=part_environment(), start_new_session=True, **options
        )
        self.size, self.since, self.ended = 0, time.monotonic(), ""

    def journal(self, word):
        """What follows a word in the journal, line by line."""
        with open(self.path, encoding="utf-8") as file:
            lines = [line.rstrip("\n").partition(" ") for line in file]
        return [rest for first, _, rest in lines if first == word]

    def is_running(self):
        """Whether it still runs; where nothing has happened for too long, end it."""
        if self.process.poll() is not None:
            self.ended = self.ended or "ended with status {}".format(self.process.returncode)
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
        print("\nFAIL: {}: the process that ran it {}; the tests after it were not run".format(last, self.ended))
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
                parts.append(Part("{}/{}".format(number, count), folder, argv, **options))
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
        return complain("knows no option {}".format(unknown[0]))
    words = [word for word in argv if not word.startswith("-")]
    if not list(chosen_tests(words)):
        print("no test has a name with " + " or ".join(words))
        print("0 passed, 1 failed")
        return 1
    begun = time.time()
    end_on_signals()
    try:
        verbose = ["-v"] if len(words) < len(argv) else []
        passed, failed, skipped = run_parts(verbose + words, 1 if words else 2)
    except KeyboardInterrupt:
        return 130
    print("Python {}, {:.1f} s".format(sys.version.split()[0], time.time() - begun))
    print("{} passed, {} failed".format(passed, failed) + (", {} skipped".format(skipped) if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(sandbox(sys.argv[2:]) if sys.argv[1:2] == ["sandbox"] else run_tests(sys.argv[1:]))
