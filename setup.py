import ast
import os
import re

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def version():
    """Read from the source: a build must not have to run the module."""
    return re.search(r'^__version__ = "([^"]+)"', read("cs.py"), re.MULTILINE).group(1)


# A definition's text up to the line that ends its signature, and that line's comment.
HEAD = re.compile(r"(.*?:)(  #[^\n]*)?\n", re.DOTALL)


def declarations(lines, body, in_class=False):
    """Yield the lines of a stub: the public names of a module or a class, without what they do.

    Only annotated functions count; in a class a subclass inherits the others. What is under TYPE_CHECKING stands in the
    stub as it is. The text is the source's own: Python 3.6 cannot write one from a syntax tree."""
    for node in body:
        text = lines[node.lineno - 1]
        if isinstance(node, ast.If) and text.strip() == "if TYPE_CHECKING:":
            yield from block(lines, node)
        elif isinstance(node, ast.Assign):
            yield from constant(node)
        elif isinstance(node, ast.AugAssign):
            if node.target.id == "__all__":
                yield text
        elif isinstance(node, ast.AnnAssign):
            if not node.target.id.startswith("_"):
                yield text.rstrip().partition(" = ")[0] + "\n"
        elif isinstance(node, ast.ClassDef):
            if not node.name.startswith("_"):
                yield "\n" + head(lines, node) + "\n"
                yield from list(declarations(lines, node.body, in_class=True)) or ["    ...\n"]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.returns is not None and (in_class or not node.name.startswith("_")):
                yield head(lines, node, " ...") + "\n"


def block(lines, node):
    """Yield the lines below an `if`, as far out as the `if` itself."""
    margin = " " * (node.col_offset + 4)
    for line in lines[node.lineno :]:
        if line.strip() and not line.startswith(margin):
            break
        yield line[4:] or "\n"


def constant(node):
    """Yield a line for public names, or a dunder, that stand for something literal or for a named tuple."""
    names = [getattr(target, "id", "_") for target in node.targets]
    if names[0][0] != "_" and getattr(getattr(node.value, "func", None), "attr", None) == "namedtuple":
        yield names[0] + ": Any\n"
        return
    try:
        value = ast.literal_eval(node.value)
    except ValueError:
        return
    if value is not None and re.match("__|[^_]", names[0]):
        yield "{}{} = {!r}\n".format(" " * node.col_offset, " = ".join(names), value)


def head(lines, node, body=""):
    """Return a definition, decorators and all, with another body."""
    first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    signature, comment = HEAD.match("".join(lines[first - 1 :])).groups()
    if any(isinstance(part, ast.Yield) for part in ast.walk(node)):
        # An asynchronous generator: without its body it would read as a coroutine.
        signature = signature.replace("async def", "def", 1)
    if "json=True" in signature:  # what is left out below makes the override a proper one
        signature = signature.replace("  # type: ignore[override]", "")
    # A checker would hold every entry of a call's **dict against their types, and a subclass to naming them all.
    signature = re.sub(r", json=True.*(?=\*\*params)", ", ", signature, flags=re.DOTALL)
    return signature + body + (comment or "")


def with_other_default(stub):
    """Return the stub with AIOCloudStack's constructor: that of CloudStack, but for the default of fetch_result."""
    init = re.search(r" +def __init__\([^)]*fetch_result(?:.|\n)*?\.\.\.[^\n]*\n", stub).group()
    init = re.sub(r"(fetch_result: [^=]*= )\w+", r"\1True", init)
    return re.sub(r"(class AIOCloudStack\(CloudStack\):\n)", lambda found: found.group() + init, stub)


class SdistWithTests(sdist):
    """Put the tests into the source distribution, too."""

    def add_defaults(self):
        super().add_defaults()
        self.filelist.append("test_cs.py")


class BuildWithStub(build_py):
    """Build the package cs-stubs, too: a module cannot say that it is annotated, a package beside it can (PEP 561)."""

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            source = read("cs.py")
            self.mkpath(os.path.dirname(self.stub_path()))
            stub = "".join(declarations(source.splitlines(True), ast.parse(source).body))
            with open(self.stub_path(), "w", encoding="utf-8", newline="\n") as file:
                file.write(with_other_default(stub))

    def get_outputs(self, *args, **options):
        return super().get_outputs(*args, **options) + [self.stub_path()]

    def stub_path(self):
        return os.path.join(self.build_lib, "cs-stubs", "__init__.pyi")


setup(
    name="cs",
    version=version(),
    description="A CloudStack API client in one file: library and command line",
    long_description=read("README.rst"),
    long_description_content_type="text/x-rst",
    author="The cs authors",
    # Metadata 2.4 (PEP 639) is written by setuptools 77 and later.
    **{"license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license": "BSD-3-Clause"},
    url="https://cloudstack.apache.org/api.html",
    project_urls={"API documentation": "https://cloudstack.apache.org/api.html"},
    py_modules=["cs"],
    cmdclass={"build_py": BuildWithStub, "sdist": SdistWithTests},
    python_requires=">=3.6",
    # Nothing is needed for AIOCloudStack; the extra stays for those who ask for cs[async].
    extras_require={"highlight": ["pygments"], "async": []},
    entry_points={"console_scripts": ["cs = cs:main"]},
    keywords="cloudstack api client command-line",
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
    ]
    + ["Programming Language :: Python :: 3.%d" % minor for minor in range(6, 16)]
    + [
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Topic :: System :: Systems Administration",
    ],
)
