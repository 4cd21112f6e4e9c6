#!/usr/bin/env python3
"""Mutation tests of cs.py: small faults are put in one at a time, and the tests must notice.

    python3 .ci/mutate.py                                 60 mutants, of all sections but the command line
    python3 .ci/mutate.py --mutants 20 --section protocol,transport --seed 3
    python3 .ci/mutate.py --kind redaction --mutants 0    every redaction taken out, one by one (0: all)
    python3 .ci/mutate.py --lines 300-420 --list          what there would be
    python3 .ci/mutate.py --tests ../before --mutants 300 --section all --output before.jsonl
    python3 .ci/mutate.py --mutants 300 --section all --compare before.jsonl

The last two show what a change of the tests has lost: the tests of another tree (a `git worktree` of the commit before)
judge a sample of this tree's cs.py, then its own judge the same sample, and every mutant that the former killed and the
latter do not is named. For the figures of a commit by itself: --tree DIR, which takes cs.py from there as well.

First the suite is run once under coverage, with one context for each test, in the processes that tests start as well.
A mutant is a copy of the tree in the temporary directory, in which only those tests run that execute the mutated line,
the quickest first, up to the first failure; that test must fail twice, since a busy machine makes tests fail, too. What
is executed only by the import is judged by the tests that execute a line which uses its name. Tests that fail without
any mutation are left out. Exit code: 0 all killed (with --compare: none lost), 1 some survived.

A mutator of our own, because the tests start cs.py as a program: mutmut wants pytest and wraps every function (what
inspect, pickle and tracebacks tell changes), cosmic-ray takes no sample and cannot stop at the first failing test;
neither knows what a redaction is. Needs Python 3.8 or later, and pip for coverage.
"""
import argparse
import ast
import collections
import concurrent.futures
import difflib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time

try:
    import coverage
except ImportError:
    import own
    own.run_with("coverage==7.17.3")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEEDLESS = "Simulator|Sandbox|Runner"  # tests that do not touch cs.py, or run what other tests run
SLOWER = 5  # a mutant may take so many times what its tests take without it, and LIMIT seconds more
LIMIT = 20

# Run in a copy of the tree: all tests, or those of a file. Each in a context of its own, if coverage runs; its line on
# standard output: whether it passed, how long it took, its id.
RUNNER = """
import os, re, signal, sys, time, unittest
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what was started in the background
try:
    import coverage
    measured = coverage.Coverage.current()
except ImportError:
    measured = None
import test_cs

class Result(unittest.TestResult):
    def startTest(self, test):
        super().startTest(test)
        os.environ["CS_CONTEXT"] = test.id()
        if measured:
            measured.switch_context(test.id())
        self.bad, self.since = len(self.errors + self.failures + self.unexpectedSuccesses), time.perf_counter()

    def stopTest(self, test):
        super().stopTest(test)
        bad = len(self.errors + self.failures + self.unexpectedSuccesses) > self.bad
        seconds = round(time.perf_counter() - self.since, 4)
        print("FAILED" if bad else "PASSED", seconds, test.id(), file=out, flush=True)

out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
tests = [test for group in unittest.defaultTestLoader.loadTestsFromModule(test_cs) for test in group
         if not re.match(sys.argv[1], type(test).__name__)]
if len(sys.argv) > 2:
    wanted = open(sys.argv[2]).read().split("\\n")
    tests = sorted([test for test in tests if test.id() in set(wanted)], key=lambda test: wanted.index(test.id()))
result = Result()
result.failfast = len(sys.argv) > 2
unittest.TestSuite(tests).run(result)
bad = result.errors + result.failures
print("END", 0, "-" if bad or result.unexpectedSuccesses else "+", file=out, flush=True)
"""

SETTINGS = """
[run]
branch = False
parallel = True
sigterm = True
data_file = {folder}/data
include = {tree}/cs.py
context = ${{CS_CONTEXT-import}}
"""

Mutant = collections.namedtuple("Mutant", "kind line start end text")


# ---- mutants: (where in the source, what stands there instead) --------------------------------------------------

SWAPS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
         ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*"}
REDACTIONS = re.compile("mask|redact|hid|shown|printable|quotable|escape")  # one is in the name of what hides something


class Finder(ast.NodeVisitor):
    """Every mutant of a source text."""

    def __init__(self, source):
        self.source = source.encode("utf-8")  # ast counts bytes
        self.starts = [0]
        for line in self.source.splitlines(True):
            self.starts.append(self.starts[-1] + len(line))
        self.found = []
        self.visit(ast.parse(source))

    def span(self, node):
        return (self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset)

    def text(self, node):
        start, end = self.span(node)
        return self.source[start:end].decode("utf-8")

    def add(self, kind, node, text, span=None):
        self.found.append(Mutant(kind, node.lineno, *(span or self.span(node)), text))

    def between(self, kind, left, right, pattern, text):
        """Replace an operator, which has no place of its own in the tree."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[start:end].decode("utf-8")
        self.add(kind, left, re.sub(pattern, lambda found: text, gap, count=1), (start, end))

    def visit_Compare(self, node):
        self.generic_visit(node)
        if len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
            self.between("compare", node.left, node.comparators[0], r"not in|is not|is\b|in\b|[<>=!]+",
                         SWAPS[type(node.ops[0])])

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        for left, right in zip(node.values, node.values[1:]):
            self.between("and/or", left, right, r"\b(and|or)\b", "or" if isinstance(node.op, ast.And) else "and")

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.Not):
            self.add("negation", node, "(%s)" % self.text(node.operand))

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if type(node.op) in OPERATORS and not any(isinstance(side, ast.Constant) and isinstance(side.value, str)
                                                  for side in (node.left, node.right)):
            self.between("arithmetic", node.left, node.right, r"//|[-+*/]", OPERATORS[type(node.op)])

    def condition(self, node):
        self.generic_visit(node)
        self.add("negation", node.test, "not (%s)" % self.text(node.test))

    visit_If = visit_While = condition

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            self.add("constant", node, str(not value))
        elif isinstance(value, (int, float)):
            self.add("constant", node, "(%s + 1)" % self.text(node))
        elif isinstance(value, str) and value:
            self.add("string", node, '""' if len(value) > 1 else '"XX"')

    def drop(self, node):
        self.generic_visit(node)
        self.add("dropped", node, "pass")

    visit_AugAssign = visit_Delete = drop

    def visit_Assign(self, node):
        self.generic_visit(node)
        if isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
            self.add("dropped", node, "pass")

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.drop(node)

    def visit_Raise(self, node):
        self.drop(node)
        if node.cause is not None:
            self.add("cause", node, self.text(node).rpartition(" from ")[0])

    def visit_Return(self, node):
        self.generic_visit(node)
        if node.value is not None:
            self.add("return", node, "return" if self.text(node.value) != "None" else "return 1")

    def visit_Continue(self, node):
        self.add("dropped", node, "break")

    def visit_Break(self, node):
        self.add("dropped", node, "pass")

    def visit_Call(self, node):
        self.generic_visit(node)
        name, given = self.text(node.func), [self.text(argument) for argument in node.args]
        if re.match(r"_?[A-Z_]*(SECRET|PRINTABLE)[A-Z_]*\.sub\Z", name):
            self.add("redaction", node, given[1])
        elif ".masked_" in name and not given:
            self.add("redaction", node, name.replace(".masked_", "."))
        elif name.endswith("secrets") and not given:
            self.add("redaction", node, "[]")
        elif "." not in name and REDACTIONS.search(name) and len(given) in (1, 2):
            header = '"{}: {}".format(%s)' % ", ".join(given)
            self.add("redaction", node, header if name.endswith("_header") else "(%s)" % given[0])

    def visit_IfExp(self, node):
        self.condition(node)
        if self.text(node.body) == "MASK":
            self.add("redaction", node, self.text(node.orelse))


# ---- which mutants ----------------------------------------------------------------------------------------------

class Source:
    """cs.py: its text, its sections, and the lines that say which tests execute a place."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.text = file.read()
        self.raw, self.lines = self.text.encode("utf-8"), self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        banners = ((number, re.match(r"# --- \d+ (.*?) -+$", line)) for number, line in enumerate(self.lines, 1))
        self.banners = [(number, found.group(1)) for number, found in banners if found]

    def section_of(self, line):
        return ([name for first, name in self.banners if first <= line] or ["front page"])[-1]

    def mutated(self, mutant):
        return (self.raw[:mutant.start] + mutant.text.encode("utf-8") + self.raw[mutant.end:]).decode("utf-8")

    def show(self, mutant):
        lines = difflib.unified_diff(self.lines, self.mutated(mutant).splitlines(), lineterm="", n=1)
        return "\n".join("    " + line for line in list(lines)[2:])

    def statement(self, line):
        """The innermost statement that stands on a line, and the function around it, if any."""
        around = [node for node in ast.walk(self.tree)
                  if isinstance(node, ast.stmt) and first_line(node) <= line <= node.end_lineno]
        functions = [node for node in around if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                     and node.body[0].lineno <= line]
        return max(around, key=first_line, default=None), max(functions, key=first_line, default=None)

    def lines_for(self, line):
        """The lines of which at least one is executed by whoever executes, or uses, what stands on this one."""
        node, function = self.statement(line)
        if node is None:
            return set()
        if function is not None:
            body = [child.lineno for child in getattr(node, "body", ()) if isinstance(child, ast.stmt)]
            return set(range(node.lineno, min(body + [node.end_lineno + 1])))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):  # its signature
            return set(range(node.body[0].lineno, node.end_lineno + 1))
        top = node
        while not isinstance(self.parents[top], ast.Module):
            top = self.parents[top]
        names = {found.id for found in ast.walk(top)
                 if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Store)}
        names.update([top.name] if hasattr(top, "name") else [])
        uses = {found.lineno for found in ast.walk(self.tree)
                if getattr(found, "id", getattr(found, "attr", None)) in names}
        return {number for use in uses if self.statement(use)[1] for number in self.lines_for(use)}


def first_line(node):
    return min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", ())])


def wanted(mutant, source, options):
    if options.lines:
        return any(first <= mutant.line <= last for first, last in options.lines)
    section = source.section_of(mutant.line)
    if options.section is None:
        return section != "command line"
    return any(word == "all" or word in section for word in options.section)


def sample(mutants, options):
    """A seeded choice, of each kind in turn, so that the most frequent kinds do not crowd out the rest.

    A larger one from the same seed begins with the smaller one."""
    draw = random.Random(options.seed)
    by_kind = collections.defaultdict(list)
    for mutant in mutants:
        by_kind[mutant.kind].append(mutant)
    for group in by_kind.values():
        draw.shuffle(group)
    chosen, groups = [], [by_kind[kind] for kind in sorted(by_kind)]
    while any(groups) and (not options.mutants or len(chosen) < options.mutants):
        chosen += [group.pop() for group in groups if group]
    return chosen[:options.mutants or None]


# ---- running the tests on one -----------------------------------------------------------------------------------

class Bench:
    """Copies of the tree, and what is known of its tests: how long each takes, and which lines it executes."""

    def __init__(self, options, scratch):
        self.scratch, self.tests = scratch, options.tests or options.tree
        self.source = Source(os.path.join(options.tree, "cs.py"))
        self.options, self.seconds, self.contexts, self.left_out = options, {}, {}, []

    def tree(self, text):
        tree = tempfile.mkdtemp(dir=self.scratch)
        for name in ("test_cs.py", "README.rst", "setup.py", "LICENSE"):
            shutil.copy(os.path.join(self.tests, name), tree)
        with open(os.path.join(tree, "cs.py"), "w", encoding="utf-8") as file:
            file.write(text)
        return tree

    def run(self, tree, tests=None, limit=None, command=(), **env):
        """[(verdict, seconds, test)] of the tests, of all without any; a TIMEOUT is the last."""
        words = [*(command or [sys.executable]), os.path.join(tree, "runner.py"), NEEDLESS]
        with open(words[-2], "w") as file:
            file.write(RUNNER)
        if tests is not None:
            words.append(os.path.join(tree, "wanted"))
            with open(words[-1], "w") as file:
                file.write("\n".join(tests))
        env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", PYTHONWARNINGS="ignore", TMPDIR=tree, **env)
        child = subprocess.Popen(words, cwd=tree, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, universal_newlines=True, start_new_session=True)
        try:
            out, hung = child.communicate(timeout=limit)[0], []
        except subprocess.TimeoutExpired:
            hung = [("TIMEOUT", limit, "-")]
        try:
            os.killpg(child.pid, signal.SIGKILL)  # and what it started
        except ProcessLookupError:
            pass
        out = child.communicate()[0] if hung else out
        rows = [line.split(" ", 2) for line in out.splitlines()]
        rows = [(verdict, float(seconds), test) for verdict, seconds, test in rows]
        return rows + hung if hung or rows[-1:] and rows[-1][0] == "END" else rows + [("FAILED", 0, "-")]

    def baseline(self):
        """Run all tests under coverage, and remember which of them execute which lines."""
        begun, folder = time.monotonic(), tempfile.mkdtemp(dir=self.scratch)
        tree, settings = self.tree(self.source.text), os.path.join(folder, "coveragerc")
        with open(settings, "w") as file:
            file.write(SETTINGS.format(folder=folder, tree=tree))
        site = sysconfig.get_path("purelib")
        with open(os.path.join(site, "cs_mutate_children.pth"), "w") as file:
            file.write("import coverage; coverage.process_startup()\n")
        rows = self.run(tree, command=[sys.executable, "-m", "coverage", "run", "--rcfile", settings],
                        COVERAGE_PROCESS_START=settings)
        self.left_out = sorted(test for verdict, _, test in rows if verdict == "FAILED")
        self.seconds = {test: seconds for verdict, seconds, test in rows if verdict == "PASSED"}
        data = coverage.CoverageData(os.path.join(folder, "all"))
        for name in os.listdir(folder):
            if name.startswith("data."):
                part = coverage.CoverageData(os.path.join(folder, name))
                try:
                    part.read()
                    data.update(part)
                except coverage.exceptions.CoverageException:
                    continue  # of a process that was killed
        for path in data.measured_files():
            for line, contexts in data.contexts_by_lineno(path).items():
                self.contexts.setdefault(line, set()).update(name.rpartition("|")[2] for name in contexts)
        shutil.rmtree(tree, True)
        print("without mutation: %.0f s, %d tests; left out, as they fail: %s" % (
            time.monotonic() - begun, len(self.seconds), ", ".join(self.left_out) or "none"), flush=True)

    def tests_of(self, line):
        """The tests that execute a line, the quickest first. Of what only the import executes: all, if need be."""
        found = set().union(*[self.contexts.get(number, set()) for number in self.source.lines_for(line)])
        return sorted(found & set(self.seconds), key=self.seconds.get)

    def judge(self, mutant):
        """What became of a mutant, as a row of --output."""
        text = self.source.mutated(mutant)
        row = dict(mutant._asdict(), section=self.source.section_of(mutant.line), by="", seconds=0)
        try:
            compile(text, "cs.py", "exec")
        except SyntaxError:
            return dict(row, verdict="invalid")
        tests = self.tests_of(mutant.line)
        row["tests"] = len(tests)
        if not tests:
            return dict(row, verdict="not executed")
        begun, tree = time.monotonic(), self.tree(text)
        limit = LIMIT + SLOWER * sum(map(self.seconds.get, tests))
        while True:
            verdict, _, test = next(found for found in self.run(tree, tests, limit) if found[0] != "PASSED")
            if verdict == "END" or test == "-" or self.run(tree, [test], limit)[0][0] != "PASSED":
                break
            tests = tests[tests.index(test) + 1:]  # it failed by itself, and not again: go on behind it
        shutil.rmtree(tree, True)
        verdict = {"END": "survived" if test == "+" else "killed", "TIMEOUT": "timed out"}.get(verdict, "killed")
        return dict(row, verdict=verdict, by=test if verdict == "killed" else "", seconds=time.monotonic() - begun)


# ---- the command line -------------------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=60, help="how many; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--section", type=lambda text: text.split(","), help="words of the banners of sections, or all")
    parser.add_argument("--lines", help="FIRST-LAST,... instead of sections", type=lambda text: [
        tuple(map(int, (part + "-" + part).split("-")[:2])) for part in text.split(",")])
    parser.add_argument("--kind", type=lambda text: text.split(","), help="compare, and/or, negation, redaction, ...")
    parser.add_argument("--tree", default=ROOT, help="the tree that is judged, instead of this one")
    parser.add_argument("--tests", metavar="DIR", help="take the tests from another tree")
    parser.add_argument("--minutes", type=float, help="begin no mutant after that time")
    parser.add_argument("--output", metavar="FILE", help="write what became of each mutant, a line of JSON each")
    parser.add_argument("--compare", metavar="FILE", help="name what an --output says is killed and is not now")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    return parser.parse_args()


def place(row):
    """What tells a mutant from others, in one and the same cs.py."""
    return row["kind"], row["start"], row["end"], row["text"]


def main():
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="cs-mutate-") as scratch:
        bench = Bench(options, scratch)
        source = bench.source
        found = [mutant for mutant in Finder(source.text).found if wanted(mutant, source, options)]
        chosen = sample([mutant for mutant in found if not options.kind or mutant.kind in options.kind], options)
        print("%d of %d mutants, seed %d" % (len(chosen), len(found), options.seed), flush=True)
        if not chosen:
            raise SystemExit("mutate.py: no such mutant; has a section, or what marks a redaction, another name now?")
        if options.list:
            print("\n".join("%s, line %d\n%s" % (each.kind, each.line, source.show(each)) for each in chosen))
            return 0
        bench.baseline()
        rows = run_all(bench, chosen, options)
    return report(rows, options)


def run_all(bench, chosen, options):
    rows, end = [], time.monotonic() + 60 * (options.minutes or float("inf"))
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda mutant: bench.judge(mutant) if time.monotonic() < end else None, chosen):
            if row is None:
                continue
            rows.append(row)
            shown = row["line"], row["kind"], row["seconds"], row["verdict"], row["by"]
            print("%5d %-10s %5.1f s  %s %s" % shown, flush=True)
            if row["verdict"] in ("survived", "not executed"):
                print(bench.source.show(Mutant(*(row[name] for name in Mutant._fields))), flush=True)
            if options.output:
                with open(options.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def report(rows, options):
    """Print the score, by section; the exit code."""
    alive = {"survived", "not executed"}
    for section in sorted({row["section"] for row in rows}) + [""]:
        judged = [row for row in rows if row["verdict"] != "invalid" and row["section"].startswith(section)]
        killed = sum(row["verdict"] not in alive for row in judged)
        print("%-28s %d of %d, %.0f %%" % (section or "all", killed, len(judged), 100 * killed / max(1, len(judged))))
    if not options.compare:
        return 1 if any(row["verdict"] in alive for row in rows) else 0
    now = {place(row): row["verdict"] for row in rows}
    with open(options.compare, encoding="utf-8") as file:
        before = [json.loads(line) for line in file]
    both = [row for row in before if place(row) in now]
    lost = [row for row in both if row["verdict"] in ("killed", "timed out") and now[place(row)] in alive]
    for row in lost:
        print("lost: line %d, %s, killed before by %s" % (row["line"], row["kind"], row["by"]))
    print("of %d mutants that both judged, %d kills lost" % (len(both), len(lost)))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
