"""Interpreters that have imported torch and nothing else, one for each run: forks, as the import takes seconds."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

FORK = sys.platform == "linux"  # elsewhere each run imports torch again
# seconds for what hangs: a machine that is busy with other things is no reason to fail
PATIENCE = 900

# -P keeps the working directory off sys.path; an editable installation of this checkout is hidden too
SERVER = f"""
import importlib, json, os, signal, sys, types
sys.path[:] = [one for one in sys.path if "__editable__" not in one]
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
import torch
for library in sys.argv[1:]:
    importlib.import_module(library)
sys.argv[1:] = []
for wish in map(json.loads, sys.stdin):
    child = os.fork() if {FORK} else 0
    if child == 0:
        break
    print(wish["number"], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for descriptor, file in enumerate((os.devnull, wish["stdout"], wish["stderr"])):
    os.dup2(os.open(file, os.O_RDWR), descriptor)
if hasattr(signal, "alarm"):
    signal.alarm({PATIENCE})
os.environ.clear()
os.environ.update(wish["environment"])
os.chdir(wish["cwd"])
sys.path[:0] = wish["path"]
if "numpy.random" in sys.modules:
    sys.modules["numpy.random"].seed()  # as in a process that has just begun; Python's own does it after a fork
sys.modules["__main__"] = main = types.ModuleType("__main__")
exec(compile(wish["code"], "<test>", "exec"), main.__dict__)
"""

FORBID = """
import builtins
_import = builtins.__import__
def _guarded(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and name.split(".")[0] in {forbidden!r}:
        raise ModuleNotFoundError(f"No module named {{name!r}} (forbidden by the test)", name=name)
    return _import(name, globals, locals, fromlist, level)
builtins.__import__ = _guarded
"""


class Fresh:
    """`run` executes code in an interpreter that has seen neither this checkout nor another run.

    It has imported torch, and the libraries that are named.
    """

    def __init__(self, *libraries):
        self.libraries, self.server, self.served = libraries, None, 0

    def start(self):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-P", "-c", SERVER, *self.libraries]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, code, *, cwd, path=(), forbid=(), environment=None):
        """What subprocess.run returns; `forbid` names packages whose import fails from here on."""
        prefix = FORBID.format(forbidden=set(forbid)) if forbid else ""
        given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder, name) for name in ("stdout", "stderr"))
            out.touch()
            err.touch()
            wish = dict(code=prefix + textwrap.dedent(code), cwd=str(cwd), path=[str(one) for one in path])
            wish |= dict(environment=given if environment is None else environment, stdout=str(out), stderr=str(err))
            status = self.serve(wish)
            return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    def serve(self, wish):
        self.served += 1
        line = json.dumps(wish | dict(number=self.served)) + "\n"
        if not FORK:
            server = self.start()
            server.communicate(line)
            return server.returncode
        if self.server is None:
            self.server = self.start()
        try:
            self.server.stdin.write(line)
            self.server.stdin.flush()
            answer = self.server.stdout.readline().split()
        except BaseException:  # a time limit of pytest: what is answered later belongs to this run
            self.stop()
            raise
        if not answer or int(answer[0]) != self.served:
            self.stop()
            raise RuntimeError(f"the server of interpreters has ended, or answers another run: {answer}")
        return int(answer[1])

    def stop(self):
        self.server.kill()
        self.server.wait()
        self.server = None

    def close(self):
        if self.server is not None:
            self.server.communicate()
