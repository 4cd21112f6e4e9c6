import os
import re

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def version():
    """Read from the source: a build must not have to run the module."""
    return re.search(r'^__version__ = "([^"]+)"', read("cs.py"), re.MULTILINE).group(1)


setup(
    name="cs",
    version=version(),
    description="A CloudStack API client in one file: library and command line",
    long_description=read("README.rst"),
    long_description_content_type="text/x-rst",
    author="The cs authors",
    license="BSD-3-Clause",
    py_modules=["cs"],
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
    + ["Programming Language :: Python :: 3.%d" % minor for minor in range(6, 15)]
    + [
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Topic :: System :: Systems Administration",
    ],
)
