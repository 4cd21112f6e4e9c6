#!/usr/bin/env python3
"""Property tests of cs.py over random inputs, with hypothesis and the project's own simulator.

    python3 .ci/fuzz.py                         20 seconds
    python3 .ci/fuzz.py --seconds 300           that long in all, shared evenly among the properties
    python3 .ci/fuzz.py --examples 2000         that many examples of each property instead
    python3 .ci/fuzz.py --only argv --seed 7    some properties, from a seed; each failure says how to repeat it

It makes a virtual environment with hypothesis (kept in the temporary directory for the next time) and starts itself
again in it. Exit code: 0 all held, 1 something did not; every failure is printed minimised.

Sections: material (what inputs are made of), properties, running them.
"""
import argparse
import contextlib
import copy
import csv
import gzip
import io
import json
import os
import pickle
import random
import sys
import tempfile
import time
from unittest import mock

HYPOTHESIS = "6.141.1"  # the last for Python 3.9
HERE = os.path.dirname(os.path.abspath(__file__))


sys.dont_write_bytecode = True
try:
    import hypothesis
except ImportError:
    import own
    own.run_with("hypothesis==" + HYPOTHESIS)

sys.path.insert(0, os.path.dirname(HERE))
from hypothesis import strategies as st  # noqa: E402

import cs  # noqa: E402
import test_cs  # noqa: E402

SIMULATOR = test_cs.Simulator(job_seconds=0)
SECRET = "CANARY~secret+/%==1"  # what nothing may ever quote
OWN = {"command", "response", "apikey", "signature", "signatureversion", "expires", "sessionkey"}
CONTROL = {"self", "command", "json", "opcode_name", "fetch_list", "headers", "fetch_result"}


# ---- material ---------------------------------------------------------------------------------------------------

anything = st.text(max_size=20)
words = st.sampled_from("name id zoneid details tags Name count jobid jobstatus page pagesize".split())
scalars = st.none() | st.booleans() | st.integers() | st.floats() | anything | st.binary(max_size=8)
flats = st.lists(scalars, max_size=4) | st.frozensets(st.integers() | anything, max_size=4)
entries = st.dictionaries(words | anything, scalars | flats, max_size=3)
values = scalars | flats | entries | st.lists(entries | scalars, max_size=3)
names = (words | anything).filter(lambda name: name not in CONTROL and name.lower() not in OWN)
parameters = st.dictionaries(names, values, max_size=5)

json_names = words | anything | st.sampled_from(
    "jobresult errorcode errortext sessionkey listzonesresponse zone success displaytext nic password".split())
json_leaves = st.none() | st.booleans() | st.integers(-2, 700) | st.integers() | st.floats() | anything
documents = st.recursive(
    json_leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_names, inner, max_size=4))
jobs = st.fixed_dictionaries({"r": st.dictionaries(st.sampled_from(["jobid", "jobstatus", "jobresult"]), documents)})
lists = st.fixed_dictionaries({"r": st.fixed_dictionaries({"count": json_leaves, "thing": st.lists(documents)})})
odd_bodies = st.sampled_from([b"[" * 20000, b'{"r":' * 5000 + b"1" + b"}" * 5000, b'{"r":' + b"9" * 5000 + b"}",
                              b'{"r":NaN}', b'\xef\xbb\xbf{"r":{}}'])
bodies = (documents | jobs | lists).map(lambda tree: json.dumps(tree).encode()) | st.binary(max_size=60) | odd_bodies
latin = st.text(st.characters(max_codepoint=255, blacklist_characters="\r\n"), max_size=12)
statuses = st.sampled_from([200, 200, 200, 401, 429, 431, 503, 302, 530]) | st.integers(100, 999)
header_names = st.sampled_from("Content-Type Location Retry-After Set-Cookie Content-Encoding Connection".split())
answers = st.tuples(statuses, latin, st.dictionaries(header_names, latin | st.sampled_from(["application/json", "9"]),
                                                     max_size=3), bodies)

lines = st.sampled_from("""[cloudstack]
[ cloudstack ]
[x
[other]
endpoint = http://h.example/api
endpoint = http://u:SECRET@h/?x=SECRET
key = k
secret = SECRET
  secret = SECRET
password: SECRET
username = u
secret SECRET
=SECRET
timeout = 1
domain = %(secret)s
retry = %(nowhere)s
header_x-auth-token = SECRET
expiration = 1e999
""".replace("SECRET", SECRET).split("\n")) | anything
ends = st.sampled_from(["", "\n  secret = " + SECRET, "\nsecret " + SECRET])
tidy_files = st.dictionaries(st.sampled_from([setting.name for setting in cs.SETTINGS[2:]]), anything | st.just("1"),
                             max_size=3).map(lambda found: "".join("\n%s = %s" % pair for pair in found.items()))
ini_files = (st.lists(lines, max_size=9).map("\n".join) | st.builds(
    "[cloudstack]\nendpoint = http://h.example/api\nkey = k{}{}".format, tidy_files, ends)
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=80)

commands = st.sampled_from(sorted(test_cs.COMMANDS))
endpoints = st.sampled_from(["@SIMULATOR", "http://127.0.0.1:9/client/api", "ftp://x", "http://u:p@h/", "http://[", ""])
argument = anything.map(lambda text: text.replace("\0", "").encode("utf-8", "replace").decode())
switches = "-h -q -t --post --all --dry-run --force --list --sync --async --version --configure -- - -qt"
valued = "-r -c --columns --sort --theme --wait --timeout --retry -o --output --color --completion"
pairs = "fetch_list=true json=false fetch_result=x id=@- x=@here.ini a=@@ page=1 zoneid="
option = st.one_of(
    st.sampled_from((switches + " " + pairs).split()).map(lambda word: [word]),
    st.tuples(st.sampled_from(valued.split()), argument | st.sampled_from("1 json table csv -name".split())),
    st.tuples(st.just("--endpoint"), endpoints),
    st.tuples(st.just("--config"), st.sampled_from(["here.ini", "no/such.ini", ".", ""])),
    st.builds(lambda *parts: ["--complete=cs " + " ".join(parts)], commands | argument, argument | words),
    st.builds(lambda name, text: [name + "=" + text], words | argument, argument),
    (commands | argument).map(lambda word: [word]),
).map(list)
command_lines = st.builds(lambda first, rest: first + sum(rest, []), commands.map(lambda name: [name]) | st.just([]),
                          st.lists(option, max_size=5))


@st.composite
def server_bytes(draw):
    """What a server may send: an answer that is nearly right, or anything."""
    body = draw(bodies | st.just(test_cs.ZONES))
    if draw(st.booleans()):
        body = gzip.compress(body)[:draw(st.none() | st.integers(0, 40))]
    size = draw(st.just(len(body)) | st.integers(-1, 10 ** 6) | latin)
    head = draw(st.sampled_from("200 OK,503 x,204 x,100 c,304 x,302 x,200,".split(",")).map("HTTP/1.1 {}".format)
                | st.just("HTTP/1.0 200 OK") | latin)
    options = ["Content-Length: %s" % size, "Transfer-Encoding: chunked", "Content-Encoding: gzip", "Connection: close",
               "Connection: keep-alive", "Location: http://127.0.0.1:9/", "X" * 70000, "a: b\r\n" * 200, ": x", " y"]
    heads = [head] + draw(st.lists(st.sampled_from(options) | latin, max_size=4))
    if draw(st.booleans()):
        body = b"%x%b\r\n%b\r\n0\r\n\r\n" % (len(body), draw(st.sampled_from([b"", b";x", b"0", b"-"])), body)
    whole = "\r\n".join(heads + ["", ""]).encode("latin-1") + body + draw(st.just(b"") | st.binary(max_size=9))
    return draw(st.just(whole) | st.binary(max_size=99) | st.integers(0, len(whole)).map(lambda end: whole[:end]))


# ---- properties -------------------------------------------------------------------------------------------------

def check_raised(error, *allowed):
    """An exception of an allowed class that says something, quotes no secret, and can be copied."""
    assert isinstance(error, allowed), repr(error)
    assert str(error) and SECRET not in str(error) and SECRET not in repr(error), "quoted: %r" % error
    if isinstance(error, cs.CloudStackException):
        assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == str(error)


def holds_signature(params, post):
    """The server verifies the signature of any parameters that can be sent, and reads what flatten() says."""
    client = cs.CloudStack(SIMULATOR.endpoint, SIMULATOR.key, SIMULATOR.secret, method="post" if post else "get")
    del SIMULATOR.requests[:]
    with client:
        try:
            client.listZones(**params)
        except ValueError as error:
            return check_raised(error, ValueError)
        except cs.CloudStackApiException as error:
            assert error.response.status_code in (430, 431), error  # values it does not like, but no 401
    got = {name: text for name, text in SIMULATOR.requests[-1].params.items() if name.lower() not in OWN}
    sent = {name: text for name, text in cs.flatten(params).items() if name.lower() not in OWN}
    if "page" in sent and "pagesize" not in sent:
        assert got.pop("pagesize") == str(cs.PAGE_SIZE)
    assert got == sent
    return None


def holds_flatten(params):
    """flatten() changes nothing on what is flat, nor its argument."""
    before = repr(params)
    try:
        flat = cs.flatten(params)
    except ValueError as error:
        return check_raised(error, ValueError)
    assert repr(params) == before and all(type(text) is str for pair in flat.items() for text in pair)
    assert cs.flatten(flat) == flat
    return None


CALLS = {
    "plain": lambda client: client.listZones(fetch_result=False),
    "text": lambda client: client.listZones(json=False),
    "list": lambda client: client.listZones(fetch_list=True),
    "pages of two": lambda client: client.listZones(fetch_list=True, pagesize=2),
    "iter": lambda client: client.iter_list("listZones", pagesize=2),
    "job": lambda client: client.deployVirtualMachine(fetch_result=True),
    "both": lambda client: client.listZones(fetch_list=True, fetch_result=True),
    "wait": lambda client: client.wait_job("1"),
}


def holds_answer(script, call, asynchronous, session):
    """Any answers whatever give a result or a CloudStackException."""
    who = {"username": "u", "password": SECRET} if session else {"key": "k", "secret": SECRET}
    kind = cs.AIOCloudStack if asynchronous else cs.CloudStack
    client = kind("http://h.example/api", retry=2, job_timeout=60, fetch_result=False, concurrency=4, **who)
    first = [test_cs.login_answer()] if session else []
    made = [test_cs.answer(content, *answered) for *answered, content in
            [(status, reason, headers, body) for status, reason, headers, body in script]]
    played = test_cs.ProtocolCase()._play_one(client, first + made, CALLS[call])
    if played.error is not None:
        check_raised(played.error, cs.CloudStackException)
    assert len(played.requests) < 300


def holds_bytes(content, stays, asynchronous):
    """Any bytes of a server give a result or a CloudStackException, in time; the next call gets its own answer."""
    server = SCRIPTED
    server.scripts = [[test_cs.Step.READ, content] + test_cs.SERVE * stays, test_cs.SERVE]
    client = (cs.AIOCloudStack if asynchronous else cs.CloudStack)(
        server.url, "k", SECRET, timeout=0.2, max_response_size=100000)
    begun = time.monotonic()
    try:
        test_cs.TransportCase.call(client)
    except cs.CloudStackException as error:
        check_raised(error, cs.CloudStackException)
    assert time.monotonic() - begun < 10 * client.timeout + 2
    server.scripts = [test_cs.SERVE]
    assert test_cs.TransportCase.call(client) == test_cs.RESULT
    test_cs.TransportCase._close(client)
    del server.wires[:], server.threads[1:]


def holds_ini(home, named, region):
    """Any ini files give settings, or one clear error that quotes no secret."""
    import configparser
    for path, content in ((".cloudstack.ini", home), ("named.ini", named)):
        with open(path, "wb") as file:
            file.write(content)
    more = {"CLOUDSTACK_CONFIG": os.path.abspath("named.ini")} if named else {}
    for read in (cs.read_config, cs.read_config_from_ini):
        with mock.patch.dict(os.environ, more):
            try:
                settings = read(region)
                if settings.get("endpoint"):
                    cs.CloudStack(**settings).check()
            except (SystemExit, ValueError, configparser.NoSectionError) as error:
                check_raised(error, SystemExit, ValueError, configparser.NoSectionError)


class Impatient:
    """A sleep that ends as if somebody had pressed Ctrl-C the fifth time."""

    def __init__(self):
        self.left = 5

    def __call__(self, seconds):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def holds_argv(args, stdin, refused):
    """Any command line ends with one of the exit codes, without a traceback and without telling the secret."""
    endpoint = "http://127.0.0.1:9/client/api" if refused else SIMULATOR.endpoint
    args = [SIMULATOR.endpoint if arg == "@SIMULATOR" else arg for arg in args]
    env = {"CLOUDSTACK_ENDPOINT": endpoint, "CLOUDSTACK_KEY": SIMULATOR.key, "CLOUDSTACK_SECRET": SIMULATOR.secret}
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin.replace("@SIMULATOR", SIMULATOR.endpoint).encode("utf-8", "replace")))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, env))
        stack.enter_context(mock.patch.multiple(sys, stdin=given, stdout=out, stderr=err))
        stack.enter_context(mock.patch.object(cs, "_sleep", Impatient()))
        code = cs.main(args)
    told = [stream.detach().getvalue().decode() for stream in (out, err)]
    assert code in (0, 1, 2, 3, 4, 130), code
    assert "Traceback" not in told[1], told[1]
    assert SIMULATOR.secret not in "".join(told)
    assert code == 0 or code == 130 or told[1] or "-q" in args or "-qt" in args or told[0] or "--list" in args, told


def holds_output(rows, shape, columns, column, wrapped):
    """Every format prints any rows, without a traceback; csv and JSON read back, and a table keeps its lines."""
    args = ["listZones", "-o", shape] + (["-c", ",".join(columns)] if columns else [])
    args += (["--sort=" + column] if column else []) + ([] if wrapped else ["--all"])
    SIMULATOR.script("listZones", test_cs.Answer(200, {"r": {"count": len(rows), "row": rows}}))
    env = {"CLOUDSTACK_ENDPOINT": SIMULATOR.endpoint, "CLOUDSTACK_KEY": SIMULATOR.key,
           "CLOUDSTACK_SECRET": SIMULATOR.secret}
    out, err = io.StringIO(newline=""), io.StringIO()
    with mock.patch.dict(os.environ, env), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cs.main(args)
    text = out.getvalue()
    SIMULATOR._scripts.clear()
    assert code in (0, 1, 2) and "Traceback" not in err.getvalue(), (code, err.getvalue())
    if code or shape == "text":
        return
    if shape in ("json", "jsonl"):
        for line in [text] if shape == "json" else text.split("\n"):
            json.loads(line or "{}")
    elif rows and all(isinstance(row, dict) for row in rows):
        lines = list(csv.reader(io.StringIO(text, newline=""))) if shape == "csv" else text.split("\n")[:-1]
        assert len(lines) == len(rows) + 1, text
        assert shape == "table" or len({len(line) for line in lines}) == 1, text


SCRIPTED = test_cs.ScriptedServer(test_cs.SERVE)
flag = st.booleans()
ENDS = st.lists(endpoints | argument, max_size=4).map("\n".join)
PROPERTIES = {
    "signature": (holds_signature, (parameters, flag)),
    "flatten": (holds_flatten, (parameters,)),
    "answer": (holds_answer, (st.lists(answers, min_size=1, max_size=5), st.sampled_from(sorted(CALLS)), flag, flag)),
    "bytes": (holds_bytes, (server_bytes(), st.sampled_from([False] * 9 + [True]), flag)),
    "ini": (holds_ini, (ini_files, ini_files | st.just(b""), st.sampled_from([None, "cloudstack", "DEFAULT"]))),
    "argv": (holds_argv, (command_lines, ENDS, st.sampled_from([False, False, True]))),
    "output": (holds_output, (st.lists(documents, max_size=4) | st.lists(st.dictionaries(json_names, documents)),
                              st.sampled_from("json jsonl table csv text".split()), st.lists(words, max_size=2),
                              words | argument, flag)),
}


# ---- running them -----------------------------------------------------------------------------------------------

def run_round(name, seed, count):
    """So many examples of one property from one seed; the failure, or None."""
    holds, material = PROPERTIES[name]
    test = hypothesis.seed(seed)(hypothesis.given(*material)(holds))
    test = hypothesis.settings(max_examples=count, deadline=None, database=None, report_multiple_bugs=False,
                               suppress_health_check=list(hypothesis.HealthCheck))(test)
    try:
        test()
    except Exception as error:
        return error
    return None


def run_property(name, options, seconds):
    """Rounds until the time is up, or the examples are done; whether the property held in all of them."""
    import traceback
    begun, seed, done, size = time.monotonic(), options.seed, 0, options.examples or 100
    while not done or (not options.examples and time.monotonic() - begun < seconds):
        error = run_round(name, seed, size)
        if error is not None:
            print("%-10s FAILED; again: --only %s --seed %d --examples %d" % (name, name, seed, size))
            traceback.print_exception(type(error), error, error.__traceback__, file=sys.stdout)
            return False
        seed, done = seed + 1, done + size
    print("%-10s %6d examples, %.0f s" % (name, done, time.monotonic() - begun), flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10 ** 6))
    parser.add_argument("--only", default="", metavar="NAME,NAME")
    options = parser.parse_args()
    chosen = [name for name in PROPERTIES if not options.only or name in options.only.split(",")]
    print("seed %d, hypothesis %s, Python %s" % (options.seed, hypothesis.__version__, sys.version.split()[0]))
    with SIMULATOR, tempfile.TemporaryDirectory(prefix="cs-fuzz-") as home:
        os.chdir(home)
        environment = test_cs.clean_environment("XDG_CACHE_HOME", "NO_COLOR", HOME=home)
        with mock.patch.dict(os.environ, environment, clear=True):
            failed = sum([not run_property(name, options, options.seconds / len(chosen)) for name in chosen])
        os.chdir(HERE)
    print("%d of %d properties held" % (len(chosen) - failed, len(chosen)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
