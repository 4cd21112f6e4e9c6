#!/usr/bin/env python3
"""Hold the simulator of test_cs.py against recordings of a live server.

    python3 .ci/replay.py             the recordings in ../shared/live beside the project; says so where there are none
    python3 .ci/replay.py FOLDER      those in FOLDER

FOLDER holds exchanges.jsonl, one exchange a line: {note, as, method, command, params, status, reason, headers, body},
and commands.jsonl, one command a line: {command, params: [[name, type, required, length, since]], isasync, key,
errors: [[params, status, beginning of the text]], answer: {field: type}}.

The exchanges' commands are sent to a simulator in their order, with the ids that it gave where the live server gave
others, on a clock that is moved past the end of every job unless the live server's was still pending. Compared are
status, reason, headers, top-level key, the keys and types of answers, and code, cserrorcode and wording of errors;
then what listApis says of each command that the simulator has, and how it answers what is missing or wrong.

Every difference is printed, with where it was seen. The exit code is 1 where EXPLAINED has no reason for one, or a
reason for none.
"""
import collections
import http.client
import json
import os
import re
import sys
from urllib.parse import urlencode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
sys.dont_write_bytecode = True
import test_cs  # noqa: E402, the path comes first

# A pattern that finds a place and a difference, and why the difference may stay.
EXPLAINED = (
    (r".*: (?!jobresult)[a-z]+ lacks (?!.*\b(id|name|state|account|jobid|jobstatus|count)\b).*",
     "rows have the fields that people and tests look at, the live server's up to 90"),
    (r".*: tags has domainpath, which live has not",
     "a tag is the same row in listTags, where live has it, and in others"),
    (r".*: does not take .*",
     "what is not taken is ignored in silence, as the live server ignores what it does not take"),
    (r".*: the simulator has no (list(CaCertificate|Clusters|Configurations|Counters|OsTypes|Pods|Tags|SSHKeyPairs)"
     r"|(create|delete)(SSHKeyPair|AffinityGroup|ServiceOffering)|(create|attach|detach|delete)Volume"
     r"|updateVirtualMachine)",
     "no test and no page needs these; an offering too big for every host is there"),
    (r"#(4[0145]|7[245]) queryAsyncJobResult.*", "these ask for the job of a command that the simulator does not have"),
    (r"#83 .*, missing id in commands that answer with nothing: .*",
     "the one command that says nothing where its id is missing is refused here as all others are"),
    (r".*: domain has parentdomainid, which live has not", "the recorded cloud has one domain"),
    (r"#32 startVirtualMachine.*|#32 .*: the job is done, live pending",
     "a job that fails ends when it begins; the live server's was looked at in between"),
    (r"#77 startVirtualMachine, bad id: .*", "an admin may give row numbers there, and row 5 was a machine"),
)

HEADERS = ("Content-Type", "X-Description", "Retry-After", "Location")
USERS = {"admin": "admin", "plain": "user"}
FREE = ("details",)  # objects whose keys are whatever somebody put there

# Ids that the recording uses before it shows them: the parameter, and the table whose first row stands in for it.
FIRST_ROWS = {"zoneid": "zone", "templateid": "template", "serviceofferingid": "serviceoffering",
              "networkids": "network"}
# What stands in for what a command made that the simulator does not have.
STAND_INS = {"createServiceOffering": ("serviceoffering", "Titan")}

UUID = re.compile("[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
Reply = collections.namedtuple("Reply", "status reason headers body")


def main(argv):
    if len(argv) > 1 or argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0 if len(argv) == 1 else 2

    folder = argv[0] if argv else os.path.join(os.path.dirname(ROOT), "shared", "live")
    if not os.path.isdir(folder):
        print("no recordings of a live server in {}: nothing is compared".format(folder))
        return 2 if argv else 0

    differences = Differences()
    exchanges, commands = read_lines(folder, "exchanges.jsonl"), read_lines(folder, "commands.jsonl")
    with Server() as server:
        replay = Replay(server, differences)
        for number, exchange in enumerate(exchanges):
            replay.play(number, exchange)
    with Server() as server:
        compare_commands(server, {entry["command"]: entry for entry in commands}, differences)

    print("{} exchanges played, {} commands compared".format(len(exchanges), len(test_cs.COMMANDS)))
    return differences.report()


def read_lines(folder, name):
    with open(os.path.join(folder, name), encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---- the simulator ------------------------------------------------------------------------------------------------


class Server:
    """A simulator on a clock of its own, and signed requests to it."""

    def __enter__(self):
        self.now = 1788249600.0
        self.simulator = test_cs.Simulator(clock=lambda: self.now).start()
        self.connection = http.client.HTTPConnection("127.0.0.1", self.simulator.port, timeout=30)
        return self

    def __exit__(self, *exc_info):
        self.connection.close()
        self.simulator.stop()

    def ask(self, command_name, params, user="admin", method="GET"):
        """The Reply to a signed command."""
        account = self.simulator.users[user]
        signed = {name: str(value) for name, value in params.items()}
        signed.update(command=command_name, response="json", apiKey=account.key)
        query = urlencode(dict(signed, signature=test_cs.signature_of(signed, account.secret)))
        if method == "POST":
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            self.connection.request("POST", "/client/api", query, form)
        else:
            self.connection.request("GET", "/client/api?" + query)

        response = self.connection.getresponse()
        body = response.read().decode("utf-8")
        return Reply(response.status, response.reason, response.headers, json.loads(body, strict=False) if body else "")


class Replay:
    """The exchanges of a recording, played in their order."""

    def __init__(self, server, differences):
        self.server, self.differences = server, differences
        self.ids = {}  # an id of the live server: the simulator's

    def play(self, number, exchange):
        command_name, live = exchange["command"], exchange["body"] or ""
        where = "#{} {}, {}".format(number, command_name, exchange["note"])
        if exchange["status"] != 401 and command_name not in test_cs.COMMANDS:
            self.differences.add(where, "the simulator has no " + command_name)
            self.stand_in(command_name, live)
            return

        if not is_pending(live):
            self.server.now += 3600  # the recording waited, too
        params = {name: self.translated(name, str(value)) for name, value in exchange["params"].items()}
        reply = self.server.ask(command_name, params, USERS[exchange["as"]], exchange["method"])
        if is_pending(live) and not is_pending(reply.body):
            self.differences.add(where, "the job is done, live pending")
            return
        recorded = Reply(exchange["status"], exchange["reason"], exchange["headers"], live)
        for difference in compare(recorded, reply):
            self.differences.add(where, difference)
        self.learn(live, reply.body)

    def translated(self, name, value):
        """What a parameter of the recording is here."""
        if name in FIRST_ROWS and UUID.fullmatch(value) and value not in self.ids:
            self.ids[value] = self.server.simulator.cloud.tables[FIRST_ROWS[name]][0]["id"]
        return UUID.sub(lambda match: self.ids.get(match.group(), match.group()), value)

    def stand_in(self, command_name, live):
        if command_name in STAND_INS:
            row = self.server.simulator.cloud.named(*STAND_INS[command_name])
            for made in next(iter(live.values())).values():
                self.ids[made["id"]] = row["id"]

    def learn(self, live, here):
        """Take the ids that stand in the same place of both answers to mean the same thing."""
        if isinstance(live, dict) and isinstance(here, dict):
            for name in live:
                self.learn(live[name], here.get(name))
        elif isinstance(live, list) and isinstance(here, list):
            for one, other in zip(live, here):
                self.learn(one, other)
        elif isinstance(live, str) and isinstance(here, str) and UUID.fullmatch(live) and UUID.fullmatch(here):
            self.ids.setdefault(live, here)


def is_pending(body):
    """Whether an answer tells of jobs that are not done."""
    answer = next(iter(body.values())) if body else {}
    return answer.get("jobstatus") == 0 or "asyncjobs" in answer


# ---- comparing ----------------------------------------------------------------------------------------------------


def compare(live, here):
    """Every difference between two replies, in words."""
    if live[:2] != here[:2]:
        yield "answers {} {}, live {} {}".format(here.status, here.reason, live.status, live.reason)
    for name in HEADERS:
        theirs, ours = live.headers.get(name), here.headers.get(name)
        if masked(theirs) != masked(ours):
            yield "header {}: {!r}, live {!r}".format(name, ours, theirs)
    for difference in compare_keys(live.body, here.body):
        yield difference
    if live.body and here.body:
        for difference in compare_values("", next(iter(live.body.values())), next(iter(here.body.values()))):
            yield difference


def compare_keys(live, here):
    if list(live) != list(here):
        yield "answers under {}, live {}".format(list(here) or "nothing", list(live) or "nothing")


def compare_fields(name, live, here):
    """Differences in the keys of two objects."""
    lacking, extra = sorted(set(live) - set(here)), sorted(set(here) - set(live))
    if lacking:
        yield "{} lacks {}".format(name, ", ".join(lacking))
    if extra:
        yield "{} has {}, which live has not".format(name, ", ".join(extra))


def compare_values(path, live, here):
    """Differences in keys and types; where both tell of an error, in what it says."""
    name = path.rpartition(".")[2] or "the answer"
    if kind(live) != kind(here):
        yield "{} is {}, live {}".format(name, kind(here), kind(live))
    elif isinstance(live, list):
        if live and here:
            for difference in compare_values(path, merged(live), merged(here)):
                yield difference
    elif isinstance(live, dict) and name not in FREE:
        yield from compare_fields(name, live, here)
        for key in sorted(set(live) & set(here)):
            for difference in compare_values(path + "." + key, live[key], here[key]):
                yield difference
    elif name in ("errorcode", "cserrorcode", "errortext", "jobstatus", "jobresultcode", "jobinstancetype"):
        if masked(live) != masked(here):
            yield "{} {!r}, live {!r}".format(name, here, live)


def kind(value):
    if isinstance(value, bool):
        return "boolean"
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), repr(value))


def merged(items):
    """One item with all that the items of a list have."""
    if not all(isinstance(item, dict) for item in items):
        return items[0]
    whole = {}
    for item in items:
        for name, value in item.items():
            if not whole.get(name):
                whole[name] = value
    return whole


def masked(value):
    """A text without what differs from cloud to cloud: ids, numbers, the name of an account."""
    if not isinstance(value, str):
        return value
    text = re.sub(r"\bplain\b", USERS["plain"], UUID.sub("<id>", value))
    return re.sub("[0-9]+", "N", text)


# ---- the list of commands -----------------------------------------------------------------------------------------


def compare_commands(server, live, differences):
    listed = next(iter(server.ask("listApis", {}).body.values()))["api"]
    for entry in sorted(listed, key=lambda entry: entry["name"]):
        name = entry["name"]
        if name not in live:
            differences.add(name, "the live server has no " + name)
            continue
        for difference in compare_entry(live[name], entry):
            differences.add(name, difference)
        for difference in compare_calls(server, live[name], entry):
            differences.add(name, difference)


def compare_entry(live, entry):
    """Differences in what listApis says of a command."""
    if live["isasync"] != entry["isasync"]:
        yield "isasync is {}, live {}".format(entry["isasync"], live["isasync"])
    theirs = {name.lower(): (kind, required, length) for name, kind, required, length, since in live["params"]}
    ours = {param["name"]: (param["type"], param["required"], param["length"]) for param in entry["params"]}
    for name in sorted(set(ours) - set(theirs)):
        yield "takes {}, which live does not".format(name)
    for name in sorted(set(ours) & set(theirs)):
        if ours[name] != theirs[name]:
            yield "parameter {} is {}, live {}".format(name, ours[name], theirs[name])
    lacking = sorted(set(theirs) - set(ours))
    if lacking:
        yield "does not take {}".format(", ".join(lacking))


def compare_calls(server, live, entry):
    """Differences in how a command answers what is missing or wrong, and in the rows it shows."""
    name = live["command"]
    for params, status, text in live.get("errors", ()):
        reply = server.ask(name, params, method="GET" if test_cs.is_reading(name) else "POST")
        error = next(iter(reply.body.values()), {})
        told = error.get("errortext", "")[:len(text)]
        if (reply.status, masked(told)) != (status, masked(text)):
            yield "with {} answers {} {!r}, live {} {!r}".format(params, reply.status, told, status, text)
        if live.get("key") not in (None, *reply.body):
            yield "answers under {}, live {}".format(list(reply.body), live["key"])
    if "answer" in live:
        takes = {param["name"] for param in entry["params"]}
        reply = server.ask(name, {"listall": "true"} if "listall" in takes else {})
        for difference in compare_keys({live["key"]: 0}, reply.body):
            yield difference
        for difference in compare_shapes("the answer", live["answer"], next(iter(reply.body.values()))):
            yield difference


def compare_shapes(name, live, here):
    """Differences between the recorded shape of an answer and one here; "{}" is a shape that was not recorded."""
    names = {"str": "text", "int": "a number", "float": "a number", "bool": "boolean"}
    if live == "{}" or not live or not here:
        return
    if isinstance(live, list) and isinstance(here, list):
        for difference in compare_shapes(name, merged(live), merged(here)):
            yield difference
    elif isinstance(live, dict) and isinstance(here, dict):
        if name in FREE:
            return
        yield from compare_fields(name, live, here)
        for key in sorted(set(live) & set(here)):
            for difference in compare_shapes(key, live[key], here[key]):
                yield difference
    elif isinstance(live, (list, dict)) or names.get(live, live) != kind(here):
        yield "{} is {}, live {}".format(name, kind(here), live)


# ---- report -------------------------------------------------------------------------------------------------------


class Differences:
    """What differs, each with the places where it was seen, under the reason why it may."""

    def __init__(self):
        self.by_reason = collections.OrderedDict((reason, {}) for _, reason in EXPLAINED)
        self.unexplained = {}

    def add(self, where, what):
        found = self.unexplained
        for pattern, reason in EXPLAINED:
            if re.fullmatch(pattern, "{}: {}".format(where, what)):
                found = self.by_reason[reason]
                break
        found.setdefault(what, []).append(where)

    def report(self):
        """Print them by reason, those without one last; the exit code."""
        for reason, found in self.by_reason.items():
            print("\n{}:".format(reason))
            show(found or {"nothing any more: take it out of EXPLAINED": []})
        if self.unexplained:
            print("\nNOT EXPLAINED:")
            show(self.unexplained)

        explained = sum(map(len, self.by_reason.values()))
        print("\n{} differences explained, {} not".format(explained, len(self.unexplained)))
        return 1 if self.unexplained or not all(self.by_reason.values()) else 0


def show(found):
    for what, places in found.items():
        more = " and {} more".format(len(places) - 1) if len(places) > 1 else ""
        print("  {}{}".format(what, "   [{}{}]".format(places[0], more) if places else ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
