"""Standard output is for what commands print."""

import subprocess
import sys

PROGRAM = """
import ctypes, sys
from ppcl_rt.cli.output import our_standard_output
libc = ctypes.CDLL(None)
print("before")
with our_standard_output():
    print("ours")
    libc.puts(b"a library's")
    libc.fflush(None)
print("after")
libc.puts(b"a library's, later")
libc.fflush(None)
"""


def test_what_libraries_write_is_kept_out_of_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert "ours" in done.stdout and "before" in done.stdout and "after" in done.stdout
    assert "a library's, later" in done.stdout and done.stdout.count("a library's") == 1
    assert done.stderr.count("a library's") == 1
