#!/usr/bin/env python3
"""Mutation tests of cs.py: small faults are put in one at a time, and the tests must notice.

    python3 .ci/mutate.py                                 60 mutants of sections 1 to 8
    python3 .ci/mutate.py --mutants 20 --section protocol,transport --seed 3
    python3 .ci/mutate.py --kind redaction --mutants 0    every redaction taken out, one by one (0: all)
    python3 .ci/mutate.py --lines 300-420 --list          what there would be

Each mutant is a copy of the tree in the temporary directory. The test classes that matter for its section run first
and then the rest, up to the first failure; that test must fail twice, since a busy machine makes tests fail, too.
Tests that fail without any mutation are left out. Exit code: 0 all killed, 1 some survived.

A mutator of our own, because the tests are run by test_cs.py itself and start cs.py as a program: mutmut wants pytest
and wraps every function (what inspect, pickle and tracebacks tell changes), cosmic-ray takes no sample and cannot
stop at the first failing test; neither knows what a redaction is. Needs Python 3.8 or later.
"""
import argparse
import ast
import collections
import concurrent.futures
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECTIONS = "settings errors parameters redaction protocol transport clients configuration command_line".split()
# The classes to begin with, as regular expressions; all others follow.
FIRST = {
    "settings": "Constructor|Attributes|Sources|ReadConfig",
    "errors": "Errors|Decoding|Connect|Secrets",
    "parameters": "Flatten|Helpers|Signature|Request|Secrets|Trace|DryRun",
    "redaction": "Redaction|Secrets|Trace|DryRun",
    "protocol": "Request|Decoding|Verb|Retry|Login|Pages|Jobs|AtOnce|Ahead|Helpers|Constructor|Secrets",
    "transport": "Body|KeptConnection|Connect|Header|Session|Proxy|Tls|Timeout|AsyncTransport|Process|Leak|AtMostOnce"
                 "|Secrets|Trace",
    "clients": "ClientObject|Attributes|Constructor|AsyncTransport|Pages|Jobs|KeptConnection|Process|Leak",
    "configuration": "Sources|ReadConfig|BadFiles|FilesTogether|ReadableFiles",
    "command_line": "Arguments|Output|CommandLine|Trace|DryRun|BadInput|Terminal|ReadableFiles",
}
NEEDLESS = "Simulator|Sandbox"  # tests that do not touch cs.py, or run what other tests run
SLOWER = 3  # a mutant may take so many times what the tests take without it

# Run in the copy: the classes in order, failing fast; the last line names the test that failed.
RUNNER = """
import sys, unittest
import test_cs
first, skip, left_out, only = sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4]
import re
groups = [group for group in unittest.defaultTestLoader.loadTestsFromModule(test_cs) if group.countTestCases()]
name = lambda group: type(next(iter(group))).__name__
groups = [group for group in groups if not re.match(skip, name(group))]
groups.sort(key=lambda group: not re.match(first, name(group)))
tests = [test for group in groups for test in group if test.id() not in left_out and only in ("", test.id())]
result = unittest.TextTestRunner(stream=open("tests.log", "w"), failfast=left_out != ["ALL"],
                                 resultclass=test_cs.CountingResult).run(unittest.TestSuite(tests))
failed = sorted(result.failed_ids) or (["-"] if result.broken else [])
print("\\nFAILED " + ",".join(failed) if failed else "\\nPASSED")
"""

Mutant = collections.namedtuple("Mutant", "kind line start end text")


# ---- mutants: (where in the source, what stands there instead) --------------------------------------------------

SWAPS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
         ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*"}
REDACTIONS = re.compile(r"_(masked|shown|printable|quotable)")


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
        name = self.text(node.func)
        if name.startswith(("_SECRET", "_UNPRINTABLE")) and name.endswith(".sub"):
            self.add("redaction", node, self.text(node.args[1]))
        elif name == "_masked_header":
            self.add("redaction", node, '"{}: {}".format(%s)' % ", ".join(map(self.text, node.args)))
        elif name.endswith("shown_url"):
            self.add("redaction", node, name.replace("shown_url", "url"))
        elif name.endswith("all_secrets"):
            self.add("redaction", node, "[]")
        elif REDACTIONS.match(name) and name.isidentifier():
            self.add("redaction", node, "(%s)" % self.text(node.args[0]))

    def visit_IfExp(self, node):
        self.condition(node)
        if self.text(node.body) == "MASK":
            self.add("redaction", node, self.text(node.orelse))


def within(mutant, section_of, options):
    if options.lines:
        return any(first <= mutant.line <= last for first, last in options.lines)
    return section_of(mutant.line) in options.section


def sample(mutants, options):
    """A seeded choice, of each kind in turn, so that the most frequent kinds do not crowd out the rest."""
    draw = random.Random(options.seed)
    by_kind = collections.defaultdict(list)
    for mutant in mutants:
        by_kind[mutant.kind].append(mutant)
    for group in by_kind.values():
        draw.shuffle(group)
    chosen, groups = [], [by_kind[kind] for kind in sorted(by_kind)]
    while any(groups) and (not options.mutants or len(chosen) < options.mutants):
        chosen += [group.pop() for group in groups if group]
    return sorted(chosen[:options.mutants or None], key=lambda mutant: mutant.line)


# ---- running the tests on one -----------------------------------------------------------------------------------

def run_tests(tree, first, left_out, only="", limit=None):
    """"PASSED", "FAILED name", or "TIMEOUT", and seconds."""
    begun = time.monotonic()
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", PYTHONWARNINGS="ignore")
    command = [sys.executable, "-c", RUNNER, first, NEEDLESS, ",".join(left_out), only]
    child = subprocess.Popen(command, cwd=tree, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, universal_newlines=True, start_new_session=True)
    try:
        verdict = child.communicate(timeout=limit)[0].strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        verdict = "TIMEOUT"
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)  # and what it started
        except ProcessLookupError:
            pass
        child.wait()
        child.stdout.close()
    return (verdict or "FAILED -"), time.monotonic() - begun


class Bench:
    def __init__(self, source, section_of, scratch):
        self.source, self.section_of, self.scratch = source, section_of, scratch
        self.left_out, self.limit = [], None

    def tree(self, source):
        tree = tempfile.mkdtemp(dir=self.scratch)
        for name in ("test_cs.py", "README.rst", "setup.py", "LICENSE"):
            shutil.copy(os.path.join(ROOT, name), tree)
        with open(os.path.join(tree, "cs.py"), "w", encoding="utf-8") as file:
            file.write(source)
        return tree

    def mutated(self, mutant):
        raw = self.source.encode("utf-8")
        return (raw[:mutant.start] + mutant.text.encode("utf-8") + raw[mutant.end:]).decode("utf-8")

    def baseline(self):
        verdict, seconds = run_tests(self.tree(self.source), "", ["ALL"])
        self.left_out = verdict[len("FAILED "):].split(",") if verdict.startswith("FAILED") else []
        self.limit = SLOWER * seconds
        print("without mutation: %.0f s; left out: %s" % (seconds, ", ".join(self.left_out) or "none"), flush=True)

    def judge(self, mutant):
        """(mutant, verdict, seconds)"""
        source = self.mutated(mutant)
        try:
            compile(source, "cs.py", "exec")
        except SyntaxError:
            return mutant, "invalid", 0
        tree = self.tree(source)
        left_out = list(self.left_out)
        first = FIRST[self.section_of(mutant.line)]
        taken = 0
        for _ in range(3):
            verdict, seconds = run_tests(tree, first, left_out, limit=self.limit)
            taken += seconds
            failed = verdict.partition(" ")[2]
            if not failed or failed == "-" or run_tests(tree, first, [], failed, self.limit)[0] != "PASSED":
                break
            left_out.append(failed)  # it failed by itself, and not again: go on without it
        shutil.rmtree(tree, True)
        return mutant, {"PASSED": "survived", "TIMEOUT": "timed out"}.get(verdict, "killed by " + failed), taken

    def show(self, mutant):
        lines = difflib.unified_diff(self.source.splitlines(), self.mutated(mutant).splitlines(), lineterm="", n=1)
        return "\n".join("    " + line for line in list(lines)[2:])


# ---- the command line -------------------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=60, help="how many; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--section", type=lambda text: text.split(","), default=SECTIONS[:8], help=", ".join(SECTIONS))
    parser.add_argument("--lines", help="FIRST-LAST,... instead of sections", type=lambda text: [
        tuple(map(int, (part + "-" + part).split("-")[:2])) for part in text.split(",")])
    parser.add_argument("--kind", type=lambda text: text.split(","), help="compare, and/or, negation, redaction, ...")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    return parser.parse_args()


def main():
    options = parse_arguments()
    with open(os.path.join(ROOT, "cs.py"), encoding="utf-8") as file:
        source = file.read()
    heads = [number for number, line in enumerate(source.splitlines(), 1) if re.match(r"# --- \d ", line)]

    def section_of(line):
        return SECTIONS[max(0, sum(head <= line for head in heads) - 1)]

    found = [mutant for mutant in Finder(source).found if within(mutant, section_of, options)]
    chosen = sample([mutant for mutant in found if not options.kind or mutant.kind in options.kind], options)
    print("%d of %d mutants, seed %d" % (len(chosen), len(found), options.seed), flush=True)
    counts = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="cs-mutate-") as scratch:
        bench = Bench(source, section_of, scratch)
        if options.list:
            print("\n".join("%s, line %d\n%s" % (each.kind, each.line, bench.show(each)) for each in chosen))
            return 0
        bench.baseline()
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for mutant, verdict, seconds in pool.map(bench.judge, chosen):
                counts[verdict.partition(" by ")[0]] += 1
                print("%5d %-10s %5.1f s  %s" % (mutant.line, mutant.kind, seconds, verdict), flush=True)
                if verdict == "survived":
                    print(bench.show(mutant), flush=True)
    judged = len(chosen) - counts["invalid"]
    caught = judged - counts["survived"]
    print(", ".join("%d %s" % (count, name) for name, count in counts.items()))
    print("score: %d of %d, %.0f %%" % (caught, judged, 100.0 * caught / max(judged, 1)))
    return 1 if counts["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
