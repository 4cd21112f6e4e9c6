#!/usr/bin/env python3
"""Print how large and how readable cs.py is, and any other file beside it: the figures, no verdict.

    python3 .ci/measure.py                    cs.py, and the lines of test_cs.py and README.rst
    python3 .ci/measure.py OTHER.py ...       the same figures of these files in further columns
    python3 .ci/measure.py --longest N        the N longest functions of cs.py as well
    python3 .ci/measure.py --names            the helpers used once, the lines that are too long, and the private names
                                              of the library that the command line uses, by name

A line of code holds something other than a comment, a docstring or nothing. Functions are measured from `def` to their
last line, docstring and blank lines included. The library is all that stands before the banner of the command line.
Needs Python 3.8 or later, for the ends of functions.
"""
import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COLUMNS = 100
SMALL = 4  # lines
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = FUNCTIONS + (ast.ClassDef, ast.Module)
NO_CODE = frozenset([tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                     tokenize.ENCODING, tokenize.ENDMARKER])


# ---- one file ---------------------------------------------------------------------------------------------------

class Source:
    """A file as text, lines, tokens and tree."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        with tokenize.open(path) as file:
            self.text = file.read()
        self.lines = self.text.splitlines()
        self.tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        self.tree = ast.parse(self.text)
        self.functions = [node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS)]

    def docstring_lines(self):
        """Every line that a docstring covers, its blank ones included."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                found.update(lines_of(node.body[0]))
        return found

    def code_lines(self):
        """Lines with code, a string over many lines counted whole but for its blank lines."""
        covered = set()
        for token in self.tokens:
            if token.type not in NO_CODE:
                covered.update(range(token.start[0], token.end[0] + 1))
        return {number for number in covered - self.docstring_lines() if self.lines[number - 1].strip()}

    def comments(self):
        return [token for token in self.tokens if token.type == tokenize.COMMENT]

    def words_for_readers(self):
        """Count the lines of docstrings, and those that hold nothing but a comment."""
        return len(self.docstring_lines() | {token.start[0] for token in self.comments() if self.alone(token)})

    def alone(self, token):
        return not self.lines[token.start[0] - 1][:token.start[1]].strip()

    def blank_lines_in_functions(self):
        """(blank lines, all lines) of functions, each counted once; those of docstrings are not counted."""
        inside = set().union(*map(lines_of, self.functions)) - self.docstring_lines()
        return sum(not self.lines[number - 1].strip() for number in inside), len(inside)

    def long_lines(self):
        return [number for number, line in enumerate(self.lines, 1)
                if len(line) > COLUMNS and not re.search("https?://", line)]

    def used_once(self):
        """The functions of the module itself that one place of the file names, beside their definition."""
        uses = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name):
                uses[node.id] = uses.get(node.id, 0) + 1
        return [node for node in self.top_level() if uses.get(node.name) == 1]

    def banner(self):
        """The line with the banner of the command line; None where there is no such."""
        found = [number for number, line in enumerate(self.lines, 1) if re.match("# --- [0-9]+ command line -", line)]
        return found[0] if found else None

    def sections(self):
        """{banner: lines of code} of the sections, in their order."""
        found, name = {"front page": 0}, "front page"
        code = self.code_lines()
        for number, line in enumerate(self.lines, 1):
            banner = re.match("# --- ([0-9]+ .*?) -+$", line)
            name = banner.group(1) if banner else name
            found[name] = found.get(name, 0) + (number in code)
        return found

    def private_names_used(self):
        """{name: lines} of the underscored names of the library that the command line uses."""
        library, tool = {}, {}
        for node in ast.walk(self.tree):
            part = tool if getattr(node, "lineno", 0) >= self.banner() else library
            for name, is_made in names_in(node):
                if re.match("_[^_]", name):
                    part.setdefault(name, {True: [], False: []})[is_made].append(node.lineno)
        return {name: uses[False] for name, uses in tool.items()
                if uses[False] and not uses[True] and library.get(name, {True: []})[True]}

    def top_level(self):
        return [node for node in self.tree.body if isinstance(node, FUNCTIONS)]


def names_in(node):
    """(name, whether it is made here and not used) of one node of a tree."""
    if isinstance(node, FUNCTIONS + (ast.ClassDef,)):
        yield node.name, True
    elif isinstance(node, ast.Name):
        yield node.id, not isinstance(node.ctx, ast.Load)
    elif isinstance(node, ast.Attribute):
        yield node.attr, not isinstance(node.ctx, ast.Load)
    elif isinstance(node, ast.arg):
        yield node.arg, True


def lines_of(node):
    return range(node.lineno, node.end_lineno + 1)


def length(node):
    return len(lines_of(node))


def percentile(numbers, share):
    ordered = sorted(numbers) or [0]
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def figures_of(path):
    """[(what, figure)] of one file."""
    source = Source(path)
    lengths = [length(node) for node in source.functions]
    blank, inside = source.blank_lines_in_functions()
    once = source.used_once()
    code, words = len(source.code_lines()), source.words_for_readers()
    hints = [token for token in source.comments() if re.match(r"#\s*type:(?!\s*ignore)", token.string)]
    calls = calls_of(source.path)
    library, private = "-", "-"
    if source.banner():
        library = sum(number < source.banner() for number in source.code_lines())
        library = f"{library} ({percent(library, code)})"
        used = source.private_names_used()
        private = f"{len(used)} / {sum(map(len, used.values()))}"
    return [
        ("lines", len(source.lines)),
        ("lines of code", code),
        ("  of them the library", library),
        ("private names of it that the command line uses, uses", private),
        ("docstrings and comments", f"{words} ({percent(words, len(source.lines))})"),
        ("functions", len(lengths)),
        ("  median / p90 / longest",
         f"{percentile(lengths, 0.5)} / {percentile(lengths, 0.9)} / {max(lengths, default=0)}"),
        ("  blank lines inside", f"{blank} ({percent(blank, inside)})"),
        (f"lines over {COLUMNS} columns", len(source.long_lines())),
        ("# type: comments", len(hints)),
        (".format(", source.text.count(".format(")),
        ("top-level functions", len(source.top_level())),
        ("  used once", len(once)),
        (f"  and of {SMALL} lines or fewer", sum(length(node) <= SMALL for node in once)),
        ("classes", sum(isinstance(node, ast.ClassDef) for node in ast.walk(source.tree))),
        ('functions entered by listZones(name="x")', calls["first"]),
        ("  again, on the kept connection", calls["second"]),
        ("  calls made to them, first / again", f"{calls['first calls']} / {calls['second calls']}"),
    ]


def percent(part, whole):
    return f"{100 * part / max(whole, 1):.0f} %"


# ---- what one call enters ---------------------------------------------------------------------------------------

def calls_of(path):
    """Count what the first and the second listZones of a client enter; "-" where the file has no client.

    Each file is imported under its own name, so in a process of its own.
    """
    command = [sys.executable, os.path.abspath(__file__), "--calls", path]
    env = {name: value for name, value in os.environ.items()
           if not name.upper().startswith("CLOUDSTACK") and not name.lower().endswith("_proxy")}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    child = subprocess.run(command, env=env, cwd=os.path.dirname(path), stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60)
    none = dict.fromkeys(("first", "first calls", "second", "second calls"), "-")
    return json.loads(child.stdout) if child.returncode == 0 else none


def count_calls(path):
    """Print as JSON what the calling thread entered of this file (or of its package).

    Functions are counted once and without comprehensions, which a reader does not look up; calls are all of the
    profiler's call events, resumptions of generators and comprehensions among them.
    """
    with open(path, encoding="utf-8") as file:
        if not re.search(r"(?m)^class CloudStack\b", file.read()):
            return 1
    module = imported(path)
    files = os.path.dirname(path) + os.sep if "." in module.__name__ else path
    server = start_server()
    client = module.CloudStack(endpoint=f"http://127.0.0.1:{server.server_port}/client/api", key="k", secret="s")
    counts = {}
    for which in ("first", "second"):
        codes = entered(client, files)
        counts[which] = len({code for code in codes if not code.co_name.startswith("<")})
        counts[which + " calls"] = len(codes)
    print(json.dumps(counts))
    return 0


def entered(client, files):
    """List the code of each call that one listZones makes."""
    codes = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(files):
            codes.append(frame.f_code)

    sys.setprofile(profile)
    try:
        answer = client.listZones(name="x")
    finally:
        sys.setprofile(None)
    if answer != {"count": 1, "zone": [{"id": "z"}]}:
        raise SystemExit(f"not the answer: {answer!r}")
    return codes


def imported(path):
    """The module of a file, as part of its package if it is in one."""
    import importlib

    folder, name = os.path.dirname(path), os.path.basename(path)[:-len(".py")]
    while os.path.exists(os.path.join(folder, "__init__.py")):
        name = os.path.basename(folder) + "." + name
        folder = os.path.dirname(folder)
    sys.path.insert(0, folder)
    return importlib.import_module(name)


def start_server():
    import http.server
    import threading

    class Zones(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps the connection

        def do_GET(self):
            body = b'{"listzonesresponse": {"count": 1, "zone": [{"id": "z"}]}}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Zones)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


# ---- the command line -------------------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="OTHER.py", help="files to be measured beside cs.py")
    parser.add_argument("--longest", type=int, default=0, metavar="N", help="name the N longest functions of cs.py")
    parser.add_argument("--names", action="store_true", help="name the small helpers used once, and the long lines")
    parser.add_argument("--calls", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_table(paths):
    columns = [figures_of(path) for path in paths]
    heads = [os.path.relpath(path) for path in paths]
    wide = max(len(what) for what, _ in columns[0])
    widths = [max([len(head)] + [len(str(figure)) for _, figure in column])
              for head, column in zip(heads, columns)]
    for what, *figures in [("", *heads)] + [(row[0][0], *(figure for _, figure in row)) for row in zip(*columns)]:
        cells = [str(figure).rjust(width) for figure, width in zip(figures, widths)]
        print("  ".join([what.ljust(wide)] + cells).rstrip())


def print_others():
    test = Source(os.path.join(ROOT, "test_cs.py"))
    wide = sum(len(line) > 120 for line in test.lines)
    print(f"test_cs.py: {len(test.lines)} lines, {len(test.code_lines())} of code, {wide} over 120 columns")
    with open(os.path.join(ROOT, "README.rst"), encoding="utf-8") as file:
        print(f"README.rst: {len(file.readlines())} lines")


def print_names(source):
    print("\nlines of code by section:")
    for name, lines in source.sections().items():
        print(f"  {lines:5} {name}")
    print("private names of the library in the command line:")
    for name, lines in sorted(source.private_names_used().items()):
        print(f"  {name}: {', '.join(map(str, lines))}")
    print("\nused once, small:")
    for node in source.used_once():
        if length(node) <= SMALL:
            print(f"  {node.lineno:5} {node.name}")
    print(f"over {COLUMNS} columns:", ", ".join(map(str, source.long_lines())) or "none")


def main():
    options = parse_arguments()
    if options.calls:
        return count_calls(options.calls)
    main_file = os.path.join(ROOT, "cs.py")
    print_table([main_file] + options.files)
    print_others()
    source = Source(main_file)
    for node in sorted(source.functions, key=length, reverse=True)[:options.longest]:
        print(f"  {node.lineno:5} {length(node):4} lines  {node.name}")
    if options.names:
        print_names(source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
